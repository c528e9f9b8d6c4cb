"""The control of an edit: displacements of equal norm in random directions."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.errors import InterventionError, as_count
from guardlens.interventions.edits.affine import Affine
from guardlens.interventions.edits.base import require_edit
from guardlens.interventions.held_states import Context, State
from guardlens.interventions.layered import precise


@dataclass(frozen=True, eq=False)
class Placebo:
    """Another edit's displacement, of the same norm for every state, turned into random directions: the placebo of that edit.

    The space that the edit writes to is mapped onto a random one of the same rank, layer by layer; where that space is not known (a custom
    edit), the norm alone is kept. So it adds as much, for the same queries, in a direction that means nothing.

    Examples:
        >>> guard.placebo(seed=1).steps[0].edit
        placebo(replace(ssd(rank=1), text_twin, gain=1), seed=1)
    """

    edit: Any
    seed: int = 0

    def __post_init__(self) -> None:
        require_edit(self.edit)
        object.__setattr__(self, "seed", as_count(self.seed, "seed", InterventionError, "say placebo(0), placebo(1), ...", least=0))

    @property
    def requires(self) -> tuple[State, ...]:
        return self.edit.requires

    @property
    def model(self) -> str:
        return self.edit.model

    def __call__(self, states: Float[Tensor, "state d_model"], context: Context) -> Float[Tensor, "state d_model"]:
        h = precise(states)
        delta = self.edit(h, context) - h  # before anything is rounded to the model's precision
        if isinstance(self.edit, Affine):
            coordinates = delta @ self.edit.span(context.layer).to(h).T
        else:
            coordinates = delta.norm(dim=-1, keepdim=True)
        turned = coordinates @ self._random_rows(coordinates.shape[-1], h.shape[-1], context.layer).to(h)
        return (h + turned).to(states.dtype)

    def _random_rows(self, rank: int, width: int, layer: int | None) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + (-1 if layer is None else layer) + 1)
        gaussian = torch.randn(width, rank, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(gaussian).Q.T

    def __repr__(self) -> str:
        return f"placebo({self.edit!r}, seed={self.seed})"
