"""One step of an intervention: which edit to make, where, for which queries, in which phase, and how strongly."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from guardlens.errors import InterventionError, as_number, one_of, quoted, require_type
from guardlens.hooks import BLOCKS, HOOKS, Site, parse
from guardlens.interventions.edits import Edit, require_edit
from guardlens.interventions.gates.base import Gate, require_gate
from guardlens.interventions.held_states import State

Phase = Literal["prefill", "decode", "always"]
"""When a step edits: in the prefill, in the decode steps (each new token), or both.

Examples:
    >>> guard.during("always").steps[0].phase
    'always'
"""


@dataclass(frozen=True, eq=False)
class Step:
    """One edit at one site.

    Attributes:
        edit: The map of the states.
        site: Where the edit is made. A site without layers means every layer, and a sweep may choose among them.
        gate: For which queries the edit is made; None for all.
        phase: Whether it is made in the prefill, in the decode steps (each new token), or both.
        strength: s of h + s (edit(h) - h); 0 leaves the state untouched.

    Raises:
        InterventionError: An attribute has another type or an unknown value, or the site's hook can only be read.

    Examples:
        >>> step = guard.at(layers=[5, 6]).scaled(0.5).steps[0]
        >>> step.site.layers, step.strength, step.phase
        ((5, 6), 0.5, 'prefill')
    """

    edit: Edit
    site: Site = field(default_factory=Site)
    gate: Gate | None = None
    phase: Phase = "prefill"
    strength: float = 1.0

    def __post_init__(self) -> None:
        require_edit(self.edit)
        require_type(self.site, Site, InterventionError, "say Site('resid_post')")
        require_writable(self.site.hook)
        if self.gate is not None:
            require_gate(self.gate)
        require_phase(self.phase)
        object.__setattr__(self, "strength", as_number(self.strength, "strength", InterventionError, "say .scaled(0.5)"))

    @property
    def requires(self) -> tuple[State, ...]:
        """The held states that the edit and the gate ask for."""
        of_gate = () if self.gate is None else self.gate.requires
        return self.edit.requires + of_gate

    @property
    def parts(self) -> tuple[Edit | Gate, ...]:
        """The edit, and the gates that its gate combines: whatever may have been made from a model's states."""
        gates = () if self.gate is None else self.gate.parts
        return (self.edit, *gates)

    def hooks_of(self, part: Edit | Gate) -> tuple[str, ...]:
        """The hooks at which a part of this step meets states: those of its held states, and for an edit the site's."""
        held = tuple(state.hook for state in part.requires if state.hook is not None)
        return (self.site.hook, *held) if part is self.edit else held

    def __repr__(self) -> str:
        hook = "" if self.site.hook == "resid_post" else f"hook={self.site.hook!r}, "
        layers = "" if self.site.layers is None else f"layers={list(self.site.layers)}, "
        gate = "" if self.gate is None else f".when({self.gate!r})"
        phase = "" if self.phase == "prefill" else f".during({self.phase!r})"
        strength = "" if self.strength == 1 else f".scaled({self.strength:g})"
        return f"{self.edit!r}.at({hook}{layers}positions={self.site.positions!r}){gate}{phase}{strength}"


def require_phase(phase: Any) -> None:
    """Require a phase.

    Raises:
        InterventionError: The value is not one of the words of `Phase`.
    """
    if not one_of(phase, get_args(Phase)):
        raise InterventionError(f"the phase {quoted(phase)}", "'prefill', 'decode' or 'always'", "say .during('always') for both")


def require_writable(hook: str) -> None:
    """Require a hook whose value can be replaced.

    Raises:
        InterventionError: The hook can only be read.
    """
    if not HOOKS[parse(hook).hook].writable:
        writable = ", ".join(other.name for other in HOOKS.values() if other.writable and other.width and other.stage == BLOCKS)
        raise InterventionError(f"an edit at {hook!r}", "a hook that can be written", f"edit one of {writable}")
