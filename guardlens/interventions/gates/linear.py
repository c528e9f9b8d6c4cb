"""Gates that are linear in a held state."""

from dataclasses import KW_ONLY, dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guardlens.errors import InterventionError, MismatchError, require_type
from guardlens.hooks import layer_index
from guardlens.interventions.gates.base import Gate, Lookup
from guardlens.interventions.held_states import State, text_twin
from guardlens.interventions.layered import layer_axis, on_device, precise, require_factors


@dataclass(frozen=True, eq=False)
class Linear(Gate):
    """Open where state · weights > threshold, with weights and a threshold for each layer.

    Attributes:
        label: How the gate was made, for `repr`.
        layers: The layer of each entry; None if one entry serves every layer.
        weights: The weights.
        thresholds: The thresholds.
        state: What the gate looks at. A state without a hook of its own is read at the hook of the weights.
        model: The model that the gate was made for; empty for any.
        hook: The hook that the weights were read at; empty for any.

    Raises:
        MismatchError: There is not one row of weights and one threshold per layer.
        NumericsError: A weight or a threshold is NaN or infinite.
        InterventionError: All weights are zero, or `state` is not a `State`.

    Examples:
        >>> gate = gates.Linear("mine", None, torch.ones(1, 128), torch.zeros(1), model=model.id)
        >>> run = model.run(batch, iv.project_out(ssd).at(layers=5).when(gate))
        >>> run.decisions[0, 0, 5].shape  # (lane, step, layer) -> query
        torch.Size([3])
    """

    label: str
    layers: tuple[int, ...] | None
    weights: Float[Tensor, "layer d_model"]
    thresholds: Float[Tensor, "layer"]
    _: KW_ONLY
    state: State = text_twin
    model: str = ""
    hook: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", layer_axis(self.layers, self.hook))
        require_type(self.state, State, InterventionError, "look at a State, such as interventions.text_twin")
        require_factors(self.label, self.layers, weights=self.weights, thresholds=self.thresholds)
        if self.weights.ndim != 2 or self.thresholds.ndim != 1:
            shapes = f"weights {tuple(self.weights.shape)} and thresholds {tuple(self.thresholds.shape)}"
            raise MismatchError(f"{shapes} in {self.label}", "a row of weights and a threshold per layer", "index both by the layer")
        if not self.weights.any():
            raise InterventionError(
                f"weights of {self.label} that are all zero", "a direction", "leave the gate out: without a direction it decides nothing"
            )
        object.__setattr__(self, "d_model", self.weights.shape[-1])

    @property
    def seen(self) -> State:
        """The state with its hook, which does not depend on the hook of the edit."""
        return replace(self.state, hook=self.state.hook or self.hook or "resid_post")

    @property
    def requires(self) -> tuple[State, ...]:
        return (self.seen,)

    def to(self, device: torch.device) -> "Linear":
        return on_device(self, device, "weights", "thresholds")

    def decide(self, held: Lookup, layer: int | None) -> Bool[Tensor, "query"]:
        seen_layer = layer if self.state.layer is None else self.state.layer
        i = layer_index(self.layers, seen_layer, self.label)
        states = precise(held(self.seen))
        return states @ self.weights[i].to(states) > self.thresholds[i].to(states)

    def __repr__(self) -> str:
        return self.label
