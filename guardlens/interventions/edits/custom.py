"""Edits by a function of the user."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from guardlens.errors import InterventionError, is_several, quoted, require_type, type_of
from guardlens.interventions.held_states import Context, State


@dataclass(frozen=True, eq=False)
class Custom:
    """Any function of states and context. It can't be saved.

    Attributes:
        fn: The function.
        requires: The held states that it asks for.
        model: The model that it was made for; empty for any.
        name: What stands for the function in fingerprints: another name for whatever does something else. Empty for no fingerprint.

    Raises:
        InterventionError: What is no function, requires anything but states, or a name that is no text.

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
            raise InterventionError(type_of(self.fn), "a function (states, context) -> states", "hand in a function, or an object to call")
        if not is_several(self.requires):
            raise InterventionError(f"requires={quoted(self.requires)}", "states in a tuple", "say requires=(state,)")
        object.__setattr__(self, "requires", tuple(self.requires))
        for state in self.requires:
            require_type(state, State, InterventionError, "name states in requires=, as in requires=(interventions.text_twin,)")

    def __call__(self, states: Float[Tensor, "state d_model"], context: Context) -> Float[Tensor, "state d_model"]:
        # Copies: a function that works in place must not change what the edit is compared with, nor whose states these are.
        return self.fn(states.clone(), replace(context, query=context.query.clone()))

    def __repr__(self) -> str:
        return f"custom({self.name or getattr(self.fn, '__name__', self.fn)})"
