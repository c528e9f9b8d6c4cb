"""What an edit is."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from guardlens.errors import InterventionError, type_of
from guardlens.interventions.held_states import Context, State


@runtime_checkable
class Edit(Protocol):
    """A map of states that never sees padding, batches or lanes.

    Examples:
        >>> isinstance(guard.steps[0].edit, iv.Edit), guard.steps[0].edit.requires == (iv.text_twin,)
        (True, True)
    """

    @property
    def requires(self) -> tuple[State, ...]:
        """The held states that it will ask its context for."""
        ...

    @property
    def model(self) -> str:
        """The model that it was made for; empty for any."""
        ...

    def __call__(self, states: Float[Tensor, "state d_model"], context: Context) -> Float[Tensor, "state d_model"]: ...


def require_edit(edit: Any) -> None:
    """Refuse what maps no states.

    Raises:
        InterventionError: As said.
    """
    if isinstance(edit, type) or not isinstance(edit, Edit):
        raise InterventionError(type_of(edit), "an edit", "take one of interventions, such as custom(fn); interventions are joined with >>")
