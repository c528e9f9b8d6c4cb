"""Adding a vector in units of the norm of each state."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from guardlens.errors import InterventionError, SiteError, as_number
from guardlens.hooks import axis_layers
from guardlens.interventions.held_states import Context, State
from guardlens.interventions.layered import precise, require_factors


@dataclass(frozen=True, eq=False)
class RelativeAdd:
    """h -> h + alpha |h| v, with a unit vector v of each layer.

    Raises:
        MismatchError: Other than one vector per layer.
        NumericsError: NaN or infinity in a vector.
        InterventionError: An alpha that is no finite number.

    Examples:
        >>> iv.add_relative(ssd, 0.1).steps[0].edit
        add_relative(ssd(rank=1), alpha=0.1)
    """

    label: str
    layers: tuple[int, ...] | None
    vectors: Float[Tensor, "layer d_model"]
    alpha: float
    model: str = ""
    hook: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", None if self.layers is None else axis_layers(self.layers, self.hook))
        object.__setattr__(self, "alpha", as_number(self.alpha, "alpha", InterventionError, "say add_relative(directions, 0.1)"))
        require_factors(self.label, self.layers, vectors=self.vectors)

    @property
    def requires(self) -> tuple[State, ...]:
        return ()

    @property
    def d_model(self) -> int:
        """Width of the states that it maps."""
        return self.vectors.shape[-1]

    def __call__(self, states: Float[Tensor, "state d_model"], context: Context) -> Float[Tensor, "state d_model"]:
        if self.layers is not None and context.layer not in self.layers:
            raise SiteError(f"{self.label} at layer {context.layer}", f"one of the layers {list(self.layers)}", "collect that layer too")
        h = precise(states)
        vector = self.vectors[0 if self.layers is None else self.layers.index(context.layer)]
        return (h + self.alpha * h.norm(dim=-1, keepdim=True) * vector.to(h)).to(states.dtype)

    def __repr__(self) -> str:
        return self.label
