"""What a gate is, and the gates that `&`, `|` and `~` make of others."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guardlens.errors import InterventionError, is_several, quoted, require_type
from guardlens.interventions.held_states import State
from guardlens.results.provenance import require_same_model

Lookup = Callable[[State], Float[Tensor, "query d_model"]]


class Gate(ABC):
    """Base of all gates. Combine them with `&`, `|` and `~`.

    Examples:
        >>> both = gates.harmful(ssd) & ~gates.harmful(ssd, threshold=100.0)
        >>> both
        (harmful(ssd(rank=1), threshold=midpoint) & ~harmful(ssd(rank=1), threshold=100.0))
    """

    model: str = ""
    """The model that the gate was made for; empty for any."""

    hook: str = ""
    """The hook whose states the gate was made from; empty for any."""

    d_model: int | None = None
    """The width of the states that the gate looks at; None for any."""

    @property
    @abstractmethod
    def requires(self) -> tuple[State, ...]:
        """The held states that the gate looks up."""

    @property
    def parts(self) -> tuple["Gate", ...]:
        """The gates that this one combines; itself if it combines none."""
        return (self,)

    @abstractmethod
    def decide(self, held: Lookup, layer: int | None) -> Bool[Tensor, "query"]:
        """Return for which queries the gate opens, at the layer of the edit that asks."""

    def to(self, device: torch.device) -> "Gate":
        """Return the gate with its tensors on a device."""
        return self

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
class _Several(Gate):
    """What `AllOf` and `AnyOf` have in common."""

    gates: tuple[Gate, ...]

    def __post_init__(self) -> None:
        if not is_several(self.gates):
            raise InterventionError(f"gates={quoted(self.gates)}", "gates in a tuple", "write a & b, or a | b")
        gates = tuple(self.gates)
        if not gates:
            raise InterventionError("a gate of no gates", "one gate at least", "write a & b, or a | b")
        for gate in gates:
            require_type(gate, Gate, InterventionError, "combine gates such as gates.harmful(directions)")
        model = next((gate.model for gate in gates if gate.model), "")
        for gate in gates:
            require_same_model(f"the gate {gate!r}", gate.model, model)
        object.__setattr__(self, "gates", gates)
        object.__setattr__(self, "model", model)

    @property
    def requires(self) -> tuple[State, ...]:
        return tuple(state for gate in self.gates for state in gate.requires)

    @property
    def parts(self) -> tuple[Gate, ...]:
        return tuple(part for gate in self.gates for part in gate.parts)

    def to(self, device: torch.device) -> "_Several":
        return replace(self, gates=tuple(gate.to(device) for gate in self.gates))

    def _decisions(self, held: Lookup, layer: int | None) -> Bool[Tensor, "gate query"]:
        return torch.stack([gate.decide(held, layer) for gate in self.gates])


@dataclass(frozen=True, eq=False, repr=False)
class AllOf(_Several):
    """Open where all of several gates are open: `a & b`.

    Raises:
        InterventionError: `gates` holds something other than gates, or nothing.
        MismatchError: The gates were made for different models.

    Examples:
        >>> gates.harmful(ssd) & gates.harmful(ssd, threshold=0.0)
        (harmful(ssd(rank=1), threshold=midpoint) & harmful(ssd(rank=1), threshold=0.0))
    """

    def decide(self, held: Lookup, layer: int | None) -> Bool[Tensor, "query"]:
        return self._decisions(held, layer).all(dim=0)

    def __repr__(self) -> str:
        return f"({' & '.join(map(repr, self.gates))})"


@dataclass(frozen=True, eq=False, repr=False)
class AnyOf(_Several):
    """Open where any of several gates is open: `a | b`.

    Raises:
        InterventionError: `gates` holds something other than gates, or nothing.
        MismatchError: The gates were made for different models.

    Examples:
        >>> gates.harmful(ssd) | gates.harmful(ssd, threshold=0.0)
        (harmful(ssd(rank=1), threshold=midpoint) | harmful(ssd(rank=1), threshold=0.0))
    """

    def decide(self, held: Lookup, layer: int | None) -> Bool[Tensor, "query"]:
        return self._decisions(held, layer).any(dim=0)

    def __repr__(self) -> str:
        return f"({' | '.join(map(repr, self.gates))})"


@dataclass(frozen=True, eq=False)
class Not(Gate):
    """Open where another gate is closed: `~a`.

    Raises:
        InterventionError: `gate` is not a gate.

    Examples:
        >>> ~gates.harmful(ssd)
        ~harmful(ssd(rank=1), threshold=midpoint)
    """

    gate: Gate

    def __post_init__(self) -> None:
        require_type(self.gate, Gate, InterventionError, "negate a gate such as gates.harmful(directions)")
        object.__setattr__(self, "model", self.gate.model)

    @property
    def requires(self) -> tuple[State, ...]:
        return self.gate.requires

    @property
    def parts(self) -> tuple[Gate, ...]:
        return self.gate.parts

    def to(self, device: torch.device) -> "Not":
        return replace(self, gate=self.gate.to(device))

    def decide(self, held: Lookup, layer: int | None) -> Bool[Tensor, "query"]:
        return ~self.gate.decide(held, layer)

    def __repr__(self) -> str:
        return f"~{self.gate!r}"


def require_gate(gate: object) -> None:
    """Require a gate.

    Raises:
        InterventionError: The value is not a gate: a number, a class, or None, say.
    """
    require_type(gate, Gate, InterventionError, "make one, as in gates.harmful(directions); leave .when out for all queries")
