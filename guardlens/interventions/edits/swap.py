"""Replacement of a state, or of one head's part of it, by a held state: activation patching."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.errors import InterventionError, MismatchError, as_count, quoted, require_type
from guardlens.interventions.edits.base import Universal
from guardlens.interventions.held_states import Context, State


@dataclass(frozen=True)
class Swap(Universal):
    """h -> r: a held state r replaces the state, or one of its equal parts (a head at the hook z).

    Attributes:
        held: The state r, read at the hook that is edited.
        part: `(index, number)` replaces only one of a number of equal parts; None replaces the whole state.

    Raises:
        InterventionError: `held` is not a `State`, or there is no such part.

    Examples:
        >>> iv.swap(iv.text_twin, part=(3, 4)).steps[0].edit.part
        (3, 4)
    """

    held: State
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        require_type(self.held, State, InterventionError, "put in a State, such as interventions.text_twin")
        if self.part is not None:
            object.__setattr__(self, "part", _as_part(self.part))

    @property
    def requires(self) -> tuple[State, ...]:
        return (self.held,)

    def __call__(self, states: Float[Tensor, "state d_model"], context: Context) -> Float[Tensor, "state d_model"]:
        reference = context.held(self.held).to(states)
        width = states.shape[-1]
        index, number = self.part or (0, 1)
        if reference.shape != states.shape or width % number:
            raise MismatchError(
                f"a held state of width {reference.shape[-1]} for states of width {width}, in {number} parts",
                "equal widths that the parts divide",
                "hold the state at the hook that is edited, of a model with as many heads",
            )
        part_of_each = torch.arange(width, device=states.device) // (width // number)
        return torch.where(part_of_each == index, reference, states)

    def __repr__(self) -> str:
        part = "" if self.part is None else f", part={self.part}"
        return f"swap({self.held}{part})"


def _as_part(part: tuple[int, int] | list[int]) -> tuple[int, int]:
    """Return `(index, number)` in Python's own integers.

    Raises:
        InterventionError: The value is not a pair, or the index is not below the number of parts.
    """
    next_step = "give (index, number), as in (3, 32)"
    if not isinstance(part, tuple | list) or len(part) != 2:
        raise InterventionError(f"part={quoted(part)}", "an index and a number of parts", next_step)
    index, number = (as_count(each, "part", InterventionError, next_step, least=0) for each in part)
    if index >= number:
        raise InterventionError(f"part {index} of {number}", f"an index from 0 to {number - 1}", next_step)
    return index, number
