"""Linear edits: one low-rank affine map per layer."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.errors import InterventionError, MismatchError, require_type
from guardlens.hooks import layer_index, require_same_space
from guardlens.interventions.held_states import Context, State
from guardlens.interventions.layered import layer_axis, on_device, precise, require_factors
from guardlens.results.provenance import require_same_model

FACTORS = ("down", "up", "held_down", "held_up", "shift")


@dataclass(frozen=True, eq=False, kw_only=True)
class Affine:
    """h -> h + h down^T up + r held_down^T held_up + shift, with factors for each layer and at most one held state r.

    Affine maps are closed under composition (`then`). They are computed in float32 at least, whatever the model's precision.

    Attributes:
        label: How the map was made, for `repr`.
        layers: The layer of each entry of the factors; None if one map serves every layer.
        down: Project the state to `rank` coordinates.
        up: Map these coordinates back to the state.
        held_down: Project the held state to coordinates; of rank 0 if there is no held state.
        held_up: Map these coordinates to the state.
        shift: A constant.
        held: The held state r; None if the map needs none.
        model: The model that the map was made for; empty for any.
        hook: The hook that its directions were read at; empty for any.

    Raises:
        InterventionError: A factor is not a tensor of floating-point numbers, or `held` is not a `State`.
        MismatchError: The factors fit neither each other nor the layers.
        NumericsError: A factor holds NaN or infinity.

    Examples:
        >>> out, back = (intervention.steps[0].edit for intervention in (iv.project_out(ssd), iv.add(ssd, 2.0)))
        >>> out.then(back)  # one map instead of two
        project_out(ssd(rank=1)) >> add(ssd(rank=1), alpha=2)
    """

    label: str
    layers: tuple[int, ...] | None
    down: Float[Tensor, "layer rank d_model"]
    up: Float[Tensor, "layer rank d_model"]
    held_down: Float[Tensor, "layer held_rank d_model"]
    held_up: Float[Tensor, "layer held_rank d_model"]
    shift: Float[Tensor, "layer d_model"]
    held: State | None = None
    model: str = ""
    hook: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", layer_axis(self.layers, self.hook))
        if self.held is not None:
            require_type(self.held, State, InterventionError, "hold a State, such as interventions.text_twin")
        factors: dict[str, Tensor] = {name: getattr(self, name) for name in FACTORS}
        require_factors(self.label, self.layers, **factors)
        paired = self.down.shape == self.up.shape and self.held_down.shape == self.held_up.shape
        widths = {factor.shape[-1] for factor in factors.values()}
        if not paired or len(widths) > 1:
            shapes = {name: tuple(factor.shape) for name, factor in factors.items()}
            raise MismatchError(
                f"factors of the shapes {shapes}", "down and up alike, all of one width", "make all factors from the same directions"
            )

    @property
    def requires(self) -> tuple[State, ...]:
        return () if self.held is None else (self.held,)

    @property
    def d_model(self) -> int:
        return self.shift.shape[-1]

    def to(self, device: torch.device) -> "Affine":
        return on_device(self, device, *FACTORS)

    def __call__(self, states: Float[Tensor, "state d_model"], context: Context) -> Float[Tensor, "state d_model"]:
        i = self.index(context.layer)
        h = precise(states)
        displacement = h @ self.down[i].to(h).T @ self.up[i].to(h) + self.shift[i].to(h)
        if self.held is not None:
            r = context.held(self.held).to(h)
            displacement = displacement + r @ self.held_down[i].to(h).T @ self.held_up[i].to(h)
        return (h + displacement).to(states.dtype)

    def index(self, layer: int | None) -> int:
        """Return where a layer's factors are on the first axis.

        Raises:
            SiteError: There are no factors for the layer.
        """
        return layer_index(self.layers, layer, self.label)

    def then(self, after: "Affine") -> "Affine":
        """Return one map that does what this one and then `after` do.

        Raises:
            InterventionError: The maps hold different states, or have factors for different layers.
            MismatchError: The maps were made for different models, or from directions in different spaces.
        """
        self._require_composable(after)

        def through(up: Tensor) -> Tensor:
            return up + up @ after.down.transpose(1, 2) @ after.up

        return Affine(
            label=f"{self.label} >> {after.label}",
            layers=after.layers if self.layers is None else self.layers,
            down=_side_by_side(self.down, after.down),
            up=_side_by_side(through(self.up), after.up),
            held_down=_side_by_side(self.held_down, after.held_down),
            held_up=_side_by_side(through(self.held_up), after.held_up),
            shift=through(self.shift[:, None])[:, 0] + after.shift,
            held=after.held if self.held is None else self.held,
            model=self.model or after.model,
            hook=self.hook or after.hook,
        )

    def _require_composable(self, after: "Affine") -> None:
        """Require maps for one model, in one space, with one held state, for the same layers."""
        require_same_model(f"the directions of {after!r}", after.model, self.model)
        if self.hook:
            require_same_space(f"{after!r}, with directions", after.hook, self.hook)
        if self.held is not None and after.held is not None and self.held != after.held:
            raise InterventionError(
                f"two held states, {self.held} and {after.held}", "at most one in a folded map", "keep them as two steps (a >> b)"
            )
        if self.layers is not None and after.layers is not None and self.layers != after.layers:
            raise InterventionError(
                f"maps of the layers {self.layers} and {after.layers}", "the same layers", "take one layer of both with directions[layer]"
            )

    def scaled(self, strength: float) -> "Affine":
        """Return the map h + strength (self(h) - h)."""
        factors = {name: strength * getattr(self, name) for name in ("up", "held_up", "shift")}
        return replace(self, label=f"{strength:g} * ({self.label})", **factors)

    def span(self, layer: int | None) -> Float[Tensor, "rank d_model"]:
        """Return orthonormal rows that span every displacement that the map can make at a layer."""
        i = self.index(layer)
        rows = torch.cat([self.up[i], self.held_up[i], self.shift[i][None]])
        _, values, basis = torch.linalg.svd(rows, full_matrices=False)
        smallest = torch.finfo(values.dtype).tiny
        return basis[values > 1e-6 * values.max().clamp_min(smallest)]

    def __repr__(self) -> str:
        return self.label


def _side_by_side(first: Tensor, second: Tensor) -> Tensor:
    """Join the ranks of two factors, one of which may serve every layer of the other."""
    layers = max(len(first), len(second))
    return torch.cat([first.expand(layers, -1, -1), second.expand(layers, -1, -1)], dim=1)
