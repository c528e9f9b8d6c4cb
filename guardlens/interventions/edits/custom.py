"""Edits by a function of the user."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from guardlens.errors import InterventionError, is_several, quoted, require_type, type_of
from guardlens.interventions.edits.base import Universal
from guardlens.interventions.held_states import Context, State


@dataclass(frozen=True, eq=False)
class Custom(Universal):
    """Any function of states and context. It cannot be saved.

    Attributes:
        fn: The function.
        requires: The held states that it asks its context for.
        model: The model that it was made for; empty for any.
        name: Stands for the function in `Intervention.fingerprint`, which raises an error if it is empty. Two functions of one name have
            one fingerprint. Runs with `out=` also compare the code of the function, so they notice a changed function under an old name.

    Raises:
        InterventionError: `fn` is not a function, `requires` holds something other than states, or `name` is not text.

    Examples:
        >>> iv.custom(lambda states, context: states * 0.5).steps[0].edit.requires
        ()
    """

    fn: Callable[[Tensor, Context], Tensor]
    requires: tuple[State, ...] = ()
    model: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        require_type(self.name, str, InterventionError, "say name='...'")
        if not callable(self.fn) or isinstance(self.fn, type):
            next_step = "pass a function, or an object that can be called"
            raise InterventionError(type_of(self.fn), "a function (states, context) -> states", next_step)
        if not is_several(self.requires):
            raise InterventionError(f"requires={quoted(self.requires)}", "states in a tuple", "say requires=(state,)")
        object.__setattr__(self, "requires", tuple(self.requires))
        for state in self.requires:
            require_type(state, State, InterventionError, "name states in requires=, as in requires=(interventions.text_twin,)")

    def __call__(self, states: Float[Tensor, "state d_model"], context: Context) -> Float[Tensor, "state d_model"]:
        # The function gets copies: if it works in place, it must change neither the states that the result is compared with nor the
        # indices of their queries.
        return self.fn(states.clone(), replace(context, query=context.query.clone()))

    def __repr__(self) -> str:
        return f"custom({self.name or getattr(self.fn, '__name__', self.fn)})"
