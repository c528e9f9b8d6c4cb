"""When to edit: yes or no for each query, decided once from held states, then kept for the decode steps."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guardlens.data.activations import Activations
from guardlens.directions import Directions
from guardlens.directions.checks import require_directions
from guardlens.errors import InterventionError, MismatchError, NumericsError, SiteError, as_number, is_several, quoted, require_type
from guardlens.hooks import axis_layers
from guardlens.interventions.held_states import State, own_state, text_twin
from guardlens.interventions.layered import require_factors
from guardlens.results.provenance import require_same_model

Lookup = Callable[[State], Float[Tensor, "query d_model"]]


class Gate(ABC):
    """Base of all gates. Combine them with `&`, `|` and `~`.

    Examples:
        >>> both = gates.harmful(ssd) & ~gates.harmful(ssd, threshold=100.0)
        >>> both
        (harmful(ssd(rank=1), threshold=midpoint) & ~harmful(ssd(rank=1), threshold=100.0))
    """

    model: str
    """The model that it was made for; empty for any."""

    @property
    @abstractmethod
    def requires(self) -> tuple[State, ...]:
        """The held states that it will look up."""

    @abstractmethod
    def decide(self, held: Lookup, layer: int | None) -> Bool[Tensor, "query"]:
        """Which queries it opens for, at the layer of the edit that asks."""

    def __and__(self, other: "Gate") -> "Gate":
        return AllOf((self, other))

    def __or__(self, other: "Gate") -> "Gate":
        return AnyOf((self, other))

    def __invert__(self) -> "Gate":
        return Not(self)

    def __bool__(self) -> bool:
        raise InterventionError(
            f"{self!r} as yes or no", "one answer for each query, in a run", "combine gates with &, | and ~, not with and, or, not"
        )


@dataclass(frozen=True, eq=False)
class Linear(Gate):
    """Open where state · weights > threshold, with weights and a threshold of each layer.

    Attributes:
        label: How it was made, for `repr`.
        layers: The layer of each index of the first axis; None where one serves every layer.
        state: What it sees; without a hook of its own, at the hook of the weights.
        model: The model that it was made for; empty for any.
        hook: The hook that the weights were read at; empty for any.

    Raises:
        MismatchError: Other than one row of weights and one threshold per layer.
        NumericsError: NaN or infinity among them.
        InterventionError: Weights that are all zero, or no state.

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
    state: State = text_twin
    model: str = ""
    hook: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", None if self.layers is None else axis_layers(self.layers, self.hook))
        require_type(self.state, State, InterventionError, "look at a State, such as interventions.text_twin")
        require_factors(self.label, self.layers, weights=self.weights, thresholds=self.thresholds)
        if self.weights.ndim != 2 or self.thresholds.ndim != 1:
            shapes = f"weights {tuple(self.weights.shape)} and thresholds {tuple(self.thresholds.shape)}"
            raise MismatchError(f"{shapes} in {self.label}", "a row of weights and a threshold per layer", "index both by the layer")
        if not self.weights.any():
            raise InterventionError(
                f"weights of {self.label} that are all zero", "a direction", "a gate along nothing decides nothing: leave it out"
            )

    @property
    def seen(self) -> State:
        """Its state with its hook: not that of the edit, which may be elsewhere."""
        return replace(self.state, hook=self.state.hook or self.hook or "resid_post")

    @property
    def requires(self) -> tuple[State, ...]:
        return (self.seen,)

    @property
    def d_model(self) -> int:
        """Width of the states that it decides on."""
        return self.weights.shape[-1]

    def decide(self, held: Lookup, layer: int | None) -> Bool[Tensor, "query"]:
        layer = layer if self.state.layer is None else self.state.layer
        if self.layers is not None and layer not in self.layers:
            raise SiteError(f"{self.label} at layer {layer}", f"one of the layers {list(self.layers)}", "collect that layer too")
        i = 0 if self.layers is None else self.layers.index(layer)  # type: ignore[arg-type]
        states = held(self.seen)
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        return states @ self.weights[i].to(states) > self.thresholds[i].to(states)

    def __repr__(self) -> str:
        return self.label


@dataclass(frozen=True, eq=False)
class AllOf(Gate):
    """Open where all of several gates are open: `a & b`.

    Raises:
        InterventionError: The gates are not gates, or there are none.
        MismatchError: The gates were made for different models.

    Examples:
        >>> gates.harmful(ssd) & gates.harmful(ssd, threshold=0.0)
        (harmful(ssd(rank=1), threshold=midpoint) & harmful(ssd(rank=1), threshold=0.0))
    """

    gates: tuple[Gate, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "gates", _joinable(self.gates))
        object.__setattr__(self, "model", _model_of(self.gates))

    @property
    def requires(self) -> tuple[State, ...]:
        return tuple(state for gate in self.gates for state in gate.requires)

    def decide(self, held: Lookup, layer: int | None) -> Bool[Tensor, "query"]:
        return torch.stack([gate.decide(held, layer) for gate in self.gates]).all(dim=0)

    def __repr__(self) -> str:
        return f"({' & '.join(map(repr, self.gates))})"


@dataclass(frozen=True, eq=False)
class AnyOf(Gate):
    """Open where any of several gates is open: `a | b`.

    Raises:
        InterventionError: The gates are not gates, or there are none.
        MismatchError: The gates were made for different models.

    Examples:
        >>> gates.harmful(ssd) | gates.harmful(ssd, threshold=0.0)
        (harmful(ssd(rank=1), threshold=midpoint) | harmful(ssd(rank=1), threshold=0.0))
    """

    gates: tuple[Gate, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "gates", _joinable(self.gates))
        object.__setattr__(self, "model", _model_of(self.gates))

    @property
    def requires(self) -> tuple[State, ...]:
        return tuple(state for gate in self.gates for state in gate.requires)

    def decide(self, held: Lookup, layer: int | None) -> Bool[Tensor, "query"]:
        return torch.stack([gate.decide(held, layer) for gate in self.gates]).any(dim=0)

    def __repr__(self) -> str:
        return f"({' | '.join(map(repr, self.gates))})"


@dataclass(frozen=True, eq=False)
class Not(Gate):
    """Open where another gate is closed: `~a`.

    Raises:
        InterventionError: The gate is not a gate.

    Examples:
        >>> ~gates.harmful(ssd)
        ~harmful(ssd(rank=1), threshold=midpoint)
    """

    gate: Gate

    def __post_init__(self) -> None:
        _joinable((self.gate,))
        object.__setattr__(self, "model", self.gate.model)

    @property
    def requires(self) -> tuple[State, ...]:
        return self.gate.requires

    def decide(self, held: Lookup, layer: int | None) -> Bool[Tensor, "query"]:
        return ~self.gate.decide(held, layer)

    def __repr__(self) -> str:
        return f"~{self.gate!r}"


def _joinable(gates: Any) -> tuple[Gate, ...]:
    """The gates in a tuple, once it is known that one gate can be made of them."""
    if not is_several(gates):
        raise InterventionError(f"gates={quoted(gates)}", "gates in a tuple", "write a & b, or a | b")
    joined = tuple(gates)
    if not joined:
        raise InterventionError("a gate of no gates", "one gate at least", "write a & b, or a | b")
    for gate in joined:
        require_type(gate, Gate, InterventionError, "combine gates such as gates.harmful(directions)")
    for gate in joined:
        require_same_model(f"the gate {gate!r}", gate.model, _model_of(joined))
    return joined


def _model_of(gates: tuple[Gate, ...]) -> str:
    """The model that the first gate which was made for one was made for; empty if all fit any."""
    return next((gate.model for gate in gates if gate.model), "")


def harmful(directions: Directions, threshold: "float | str | Tensor" = "midpoint", state: State = text_twin) -> Linear:
    """Open where the state lies on the harmful side of the first direction.

    Args:
        directions: Their first row of each layer is v1.
        threshold: `"midpoint"` (between the class means), a number (0 is the paper's), or one number per layer.
        state: What the gate sees, by default at the hook that the directions were read at; the text twin, so an image can't fool it.

    Raises:
        InterventionError: Another word than "midpoint", directions that have none, other than a finite number for each layer, or no state.
        NumericsError: Directions that are zero at a layer.

    Source: VLM-Guard's g = 1[h(q) v1 > t].

    Examples:
        >>> batch = model.batch(queries[:3] + queries[-3:], grey)
        >>> run = model.run(batch, iv.replace(ssd, iv.text_twin).when(gates.harmful(ssd)).at(layers=5))
        >>> run.decisions[0, 0, 5]  # (lane, step, layer) -> query: it opens for the harmful ones
        tensor([ True,  True,  True, False, False, False])
    """
    require_directions(directions)
    require_type(state, State, InterventionError, "look at a State, such as interventions.text_twin")
    values, shown = _thresholds(threshold, directions)
    seen = "" if state == text_twin else f", state={'own_state' if state == own_state else state}"
    label = f"harmful({directions.method}, threshold={shown}{seen})"
    weights = directions.vectors[:, 0].contiguous()
    return Linear(label, directions.layers, weights, values, state, directions.provenance.model, directions.hook)


def _thresholds(threshold: Any, directions: Directions) -> tuple[Float[Tensor, "layer"], str | float]:
    """The threshold of each layer, and how it is named."""
    layers, next_step = len(directions.vectors), "say 'midpoint' or 0.0, or see gates.threshold_at_fpr"
    if isinstance(threshold, str):
        if threshold != "midpoint":
            raise InterventionError(f"the threshold {quoted(threshold)}", "'midpoint', a number, or one number per layer", next_step)
        if directions.midpoints.isnan().any():
            raise InterventionError(
                "directions without class means", "a threshold in numbers", "choose one with gates.threshold_at_fpr, or 0"
            )
        return directions.midpoints.contiguous(), threshold
    if isinstance(threshold, Tensor | np.ndarray | list | tuple) and np.ndim(threshold):
        if len(threshold) != layers:
            raise InterventionError(f"{len(threshold)} thresholds", f"one number, or one for each of {layers} layers", next_step)
        return torch.tensor([as_number(each, "threshold", InterventionError, next_step) for each in threshold]), "per layer"
    number = as_number(threshold, "threshold", InterventionError, next_step)
    return torch.full((layers,), number), number


def threshold_at_fpr(directions: Directions, activations: Activations, rate: float = 0.05) -> Float[Tensor, "layer"]:
    """The threshold of each layer at which at most `rate` of the harmless queries open the gate.

    Args:
        directions: Their first row is v1.
        activations: Labelled, with all layers of the directions (of one layer only where these serve every layer).
        rate: The false-positive rate, from 0 to 1.

    Raises:
        NumericsError: The rate is out of range, or there is no harmless query.
        SiteError: A layer of the directions was not collected.
        MismatchError: States of another width or space, or of a model that the directions were not made for.

    Examples:
        >>> threshold = gates.threshold_at_fpr(ssd, text, rate=0.05)  # one number per layer
        >>> above = ssd.coordinates(text)[~torch.from_numpy(text.harmful), :, 0] > threshold
        >>> bool((above.float().mean(dim=0) <= 0.05).all())
        True
        >>> careful = gates.harmful(ssd, threshold)
    """
    require_directions(directions)
    directions.require_fit(activations)
    rate = as_number(rate, "rate", NumericsError, "say rate=0.05")
    chosen = torch.tensor([query.label == "harmless" for query in activations.queries])
    if not (0 <= rate <= 1 and chosen.any()):
        raise NumericsError(f"a rate of {rate} over {int(chosen.sum())} harmless queries", "a rate from 0 to 1 and a query", "check both")
    layers = activations.layers[:1] if directions.layers is None else directions.layers
    scores = torch.stack([activations.at(layer)[chosen].to(directions.vectors) @ directions.at(layer)[0] for layer in layers], dim=1)
    return torch.from_numpy(np.quantile(scores.numpy(), 1 - rate, axis=0, method="higher")).float()
