"""Linear edits: one low-rank affine map per layer."""

import copy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.errors import InterventionError, MismatchError, SiteError, require_type
from guardlens.hooks import axis_layers, require_same_space
from guardlens.interventions.held_states import Context, State
from guardlens.interventions.layered import precise, require_factors
from guardlens.results.provenance import require_same_model


@dataclass(frozen=True, eq=False)
class Affine:
    """h -> h + h down^T up + r held_down^T held_up + shift, with factors of each layer and r one held state.

    Closed under composition (`then`). Projections are computed in float32 at least, whatever the model's precision.

    Attributes:
        label: How it was made, for `repr`.
        layers: The layer of each index of the first axis; None where one map serves every layer.
        held: The state r; None if the map needs none (its factors then have rank 0).
        model: The model that it was made for; empty for any.
        hook: The hook that its directions were read at; empty for any.

    Raises:
        MismatchError: Factors that don't fit each other or the layers.
        NumericsError: NaN or infinity in a factor.

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
        object.__setattr__(self, "layers", None if self.layers is None else axis_layers(self.layers, self.hook))
        if self.held is not None:
            require_type(self.held, State, InterventionError, "hold a State, such as interventions.text_twin")
        factors = {name: getattr(self, name) for name in _FACTORS}
        require_factors(self.label, self.layers, **factors)
        pairs = (self.down, self.up), (self.held_down, self.held_up)
        if any(one.shape != other.shape for one, other in pairs) or len({factor.shape[-1] for factor in factors.values()}) > 1:
            shapes = {name: tuple(factor.shape) for name, factor in factors.items()}
            raise MismatchError(f"factors of the shapes {shapes}", "down and up alike, all of one width", "make them of one basis")

    @property
    def requires(self) -> tuple[State, ...]:
        return () if self.held is None else (self.held,)

    @property
    def d_model(self) -> int:
        """Width of the states that it maps."""
        return self.shift.shape[-1]

    def index(self, layer: int | None) -> int:
        """Where a layer's factors are on the first axis.

        Raises:
            SiteError: There are none for it.
        """
        if self.layers is None:
            return 0
        if layer not in self.layers:
            raise SiteError(
                f"{self.label} at layer {layer}, with directions for the layers {list(self.layers)}",
                "a layer that has directions",
                "collect that layer too, or use one layer's everywhere with directions[layer]",
            )
        return self.layers.index(layer)

    def __call__(self, states: Float[Tensor, "state d_model"], context: Context) -> Float[Tensor, "state d_model"]:
        i, h = self.index(context.layer), precise(states)
        delta = h @ self.down[i].to(h).T @ self.up[i].to(h) + self.shift[i].to(h)
        if self.held is not None:
            delta = delta + context.held(self.held).to(h) @ self.held_down[i].to(h).T @ self.held_up[i].to(h)
        return (h + delta).to(states.dtype)

    def then(self, after: "Affine") -> "Affine":
        """One map that does this one first, then `after`.

        Raises:
            InterventionError: They hold different states, or have other layers.
            MismatchError: They were made for different models, or of directions in different spaces.
        """
        require_same_model(f"the directions of {after!r}", after.model, self.model)
        require_same_space(f"{after!r}, with directions", after.hook, *filter(None, (self.hook,)))
        if None not in (self.held, after.held) and self.held != after.held:
            raise InterventionError(
                f"two held states, {self.held} and {after.held}", "at most one in a folded map", "keep them as two steps (a >> b)"
            )
        if self.layers is not None and after.layers is not None and self.layers != after.layers:
            raise InterventionError(
                f"maps of the layers {self.layers} and {after.layers}", "the same layers", "restrict them with directions[layer]"
            )

        def through(up: Tensor) -> Tensor:
            return up + up @ after.down.transpose(1, 2) @ after.up

        return Affine(
            f"{self.label} >> {after.label}",
            after.layers if self.layers is None else self.layers,
            _join(self.down, after.down),
            _join(through(self.up), after.up),
            _join(self.held_down, after.held_down),
            _join(through(self.held_up), after.held_up),
            through(self.shift[:, None])[:, 0] + after.shift,
            after.held if self.held is None else self.held,
            self.model or after.model,
            self.hook or after.hook,
        )

    def scaled(self, strength: float) -> "Affine":
        """h + strength (self(h) - h)."""
        factors = {name: strength * getattr(self, name) for name in ("up", "held_up", "shift")}
        return replace(self, label=f"{strength:g} * ({self.label})", **factors)

    def to(self, device: torch.device) -> "Affine":
        """With its factors on a device."""
        if self.shift.device == device:
            return self
        moved = copy.copy(self)  # not anew: its numbers were checked where it was made, and a GPU would be waited for
        for name in _FACTORS:
            object.__setattr__(moved, name, getattr(self, name).to(device))
        return moved

    def span(self, layer: int | None) -> Float[Tensor, "rank d_model"]:
        """Orthonormal rows that span everything the map can add at a layer."""
        i = self.index(layer)
        rows = torch.cat([self.up[i], self.held_up[i], self.shift[i][None]])
        _, values, basis = torch.linalg.svd(rows, full_matrices=False)
        return basis[values > 1e-6 * values.max().clamp_min(torch.finfo(values.dtype).tiny)]

    def __repr__(self) -> str:
        return self.label


_FACTORS = ("down", "up", "held_down", "held_up", "shift")


def _join(first: Tensor, second: Tensor) -> Tensor:
    layers = max(len(first), len(second))
    return torch.cat([first.expand(layers, -1, -1), second.expand(layers, -1, -1)], dim=1)
