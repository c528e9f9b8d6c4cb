"""Addition of a vector whose length is a share of each state's norm."""

from dataclasses import KW_ONLY, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.errors import InterventionError, as_number
from guardlens.hooks import layer_index
from guardlens.interventions.held_states import Context, State
from guardlens.interventions.layered import layer_axis, on_device, precise, require_factors


@dataclass(frozen=True, eq=False)
class RelativeAdd:
    """h -> h + alpha |h| v, with one unit vector v per layer.

    Attributes:
        label: How the edit was made, for `repr`.
        layers: The layer of each vector; None if one vector serves every layer.
        vectors: The vectors.
        alpha: Share of the norm of each state.
        model: The model that the edit was made for; empty for any.
        hook: The hook that the vectors were read at; empty for any.

    Raises:
        MismatchError: There are more or fewer vectors than layers.
        NumericsError: A vector holds NaN or infinity.
        InterventionError: `alpha` is not a finite number.

    Examples:
        >>> iv.add_relative(ssd, 0.1).steps[0].edit
        add_relative(ssd(rank=1), alpha=0.1)
    """

    label: str
    layers: tuple[int, ...] | None
    vectors: Float[Tensor, "layer d_model"]
    alpha: float
    _: KW_ONLY
    model: str = ""
    hook: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", layer_axis(self.layers, self.hook))
        object.__setattr__(self, "alpha", as_number(self.alpha, "alpha", InterventionError, "say add_relative(directions, 0.1)"))
        require_factors(self.label, self.layers, vectors=self.vectors)

    @property
    def requires(self) -> tuple[State, ...]:
        return ()

    @property
    def d_model(self) -> int:
        return self.vectors.shape[-1]

    def to(self, device: torch.device) -> "RelativeAdd":
        return on_device(self, device, "vectors")

    def __call__(self, states: Float[Tensor, "state d_model"], context: Context) -> Float[Tensor, "state d_model"]:
        h = precise(states)
        vector = self.vectors[layer_index(self.layers, context.layer, self.label)].to(h)
        return (h + self.alpha * h.norm(dim=-1, keepdim=True) * vector).to(states.dtype)

    def __repr__(self) -> str:
        return self.label
