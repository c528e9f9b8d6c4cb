"""The control of an edit: displacements of equal norm in random directions."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.errors import InterventionError, as_count
from guardlens.interventions.edits.affine import Affine
from guardlens.interventions.edits.base import Edit, require_edit
from guardlens.interventions.held_states import Context, State
from guardlens.interventions.layered import precise


@dataclass(frozen=True, eq=False)
class Placebo:
    """Another edit's displacements in random directions: each state moves as far, for the same queries, but nowhere in particular.

    In each layer, the space that an affine edit writes to is mapped onto a random space of the same rank. For other edits that space is
    unknown, so all their displacements go along one random direction, each with its own norm.

    Attributes:
        edit: The edit that this is the placebo of.
        seed: Which random directions are drawn.

    Raises:
        InterventionError: `edit` is not an edit, or `seed` is not a whole number from 0 up.

    Examples:
        >>> guard.placebo(seed=1).steps[0].edit
        placebo(replace(ssd(rank=1), text_twin, gain=1), seed=1)
    """

    edit: Edit
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

    @property
    def hook(self) -> str:
        return self.edit.hook

    @property
    def d_model(self) -> int | None:
        return self.edit.d_model

    def to(self, device: torch.device) -> "Placebo":
        return replace(self, edit=self.edit.to(device))

    def __call__(self, states: Float[Tensor, "state d_model"], context: Context) -> Float[Tensor, "state d_model"]:
        h = precise(states)
        displacement = self.edit(h, context) - h  # before anything is rounded to the model's precision
        if isinstance(self.edit, Affine):
            coordinates = displacement @ self.edit.span(context.layer).to(h).T
        else:
            coordinates = displacement.norm(dim=-1, keepdim=True)
        random_rows = self._random_rows(coordinates.shape[-1], h.shape[-1], context.layer)
        return (h + coordinates @ random_rows.to(h)).to(states.dtype)

    def _random_rows(self, rank: int, width: int, layer: int | None) -> Float[Tensor, "rank d_model"]:
        """Return random orthonormal rows, the same for every call at a layer."""
        number = 0 if layer is None else layer + 1
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        gaussian = torch.randn(width, rank, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(gaussian).Q.T

    def __repr__(self) -> str:
        return f"placebo({self.edit!r}, seed={self.seed})"
