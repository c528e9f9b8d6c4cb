"""Putting one state in place of another."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.errors import InterventionError, MismatchError, as_count, quoted, require_type
from guardlens.interventions.held_states import Context, State


@dataclass(frozen=True)
class Swap:
    """h -> r: the held state r in place of the state, or in place of one of its equal stretches (a head of z).

    Attributes:
        held: The state r, read at the same hook.
        part: `(index, of)`: only the stretch `index` of `of`; None for the whole state.

    Raises:
        InterventionError: No state, or no such part.

    Examples:
        >>> iv.swap(iv.text_twin, part=(3, 4)).steps[0].edit.part
        (3, 4)
    """

    held: State
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        require_type(self.held, State, InterventionError, "put in a State, such as interventions.text_twin")
        if self.part is None:
            return
        next_step = "give (index, of), as in (3, 32)"
        if not isinstance(self.part, tuple | list) or len(self.part) != 2:
            raise InterventionError(f"part={quoted(self.part)}", "an index and a number of parts", next_step)
        number, of = (as_count(each, "part", InterventionError, next_step, least=0) for each in self.part)
        if number >= of:
            raise InterventionError(f"part {number} of {of}", f"an index from 0 to {of - 1}", next_step)
        object.__setattr__(self, "part", (number, of))

    @property
    def requires(self) -> tuple[State, ...]:
        return (self.held,)

    @property
    def model(self) -> str:
        return ""

    def __call__(self, states: Float[Tensor, "state d_model"], context: Context) -> Float[Tensor, "state d_model"]:
        reference, (index, of) = context.held(self.held).to(states), self.part or (0, 1)
        if reference.shape != states.shape or states.shape[-1] % of:
            raise MismatchError(
                f"a held state of width {reference.shape[-1]} for states of width {states.shape[-1]}, in {of} parts",
                "equal widths that the parts divide",
                "hold the state of the hook that is edited, of a model with the same heads",
            )
        width = states.shape[-1] // of
        here = torch.arange(states.shape[-1], device=states.device) // width == index
        return torch.where(here, reference, states)

    def __repr__(self) -> str:
        return f"swap({self.held}{'' if self.part is None else f', part={self.part}'})"
