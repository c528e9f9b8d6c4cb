"""What an edit is: the protocol, and the base of edits without numbers of their own."""

from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.errors import InterventionError, type_of
from guardlens.interventions.held_states import Context, State


@runtime_checkable
class Edit(Protocol):
    """A map of hidden states. It receives exactly the states that a site selects: no padding, no batches, no lanes.

    Examples:
        >>> isinstance(guard.steps[0].edit, iv.Edit), guard.steps[0].edit.requires == (iv.text_twin,)
        (True, True)
    """

    @property
    def requires(self) -> tuple[State, ...]:
        """The held states that the edit asks its context for."""
        ...

    @property
    def model(self) -> str:
        """The model that the edit was made for; empty for any."""
        ...

    @property
    def hook(self) -> str:
        """The hook whose states the edit was made from; empty for any."""
        ...

    @property
    def d_model(self) -> int | None:
        """The width of the states that the edit maps; None for any."""
        ...

    def to(self, device: torch.device) -> "Edit":
        """Return the edit with its tensors on a device."""
        ...

    def __call__(self, states: Float[Tensor, "state d_model"], context: Context) -> Float[Tensor, "state d_model"]: ...


U = TypeVar("U", bound="Universal")


class Universal:
    """Base of edits that hold no numbers: they fit every model, hook and width, and need not be moved to a device."""

    model: str = ""
    hook: str = ""
    d_model: int | None = None

    def to(self: U, device: torch.device) -> U:
        return self


def require_edit(edit: Any) -> None:
    """Require an edit.

    Raises:
        InterventionError: The value is not an edit: an intervention, a class, or a function, say.
    """
    if isinstance(edit, type) or not isinstance(edit, Edit):
        next_step = "take the edit of a step, or wrap a function in custom(fn); join interventions with >>"
        raise InterventionError(type_of(edit), "an edit", next_step)
