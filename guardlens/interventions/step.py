"""One step of an intervention: an edit, and where, when, for which queries and how strongly it is made."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from guardlens.errors import InterventionError, as_number, one_of, quoted, require_type
from guardlens.hooks import BLOCKS, HOOKS, Site, parse
from guardlens.interventions.edits import Edit, require_edit
from guardlens.interventions.gates import Gate
from guardlens.interventions.held_states import State

Phase = Literal["prefill", "decode", "always"]
"""When a step edits: in the prefill, in the decode steps (each new token), or both.

Examples:
    >>> guard.during("always").steps[0].phase
    'always'
"""


@dataclass(frozen=True, eq=False)
class Step:
    """One edit somewhere.

    Attributes:
        edit: The map.
        site: Where; no layers means every layer, and a sweep may choose.
        gate: For which queries; None for all.
        phase: In the prefill, in the decode steps (each new token), or both.
        strength: s of h + s (edit(h) - h); 0 leaves the state untouched.

    Raises:
        InterventionError: One of these is something else, or the site's hook can only be read.

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
        """The states that the edit and the gate ask for."""
        return self.edit.requires + (() if self.gate is None else self.gate.requires)

    def __repr__(self) -> str:
        site, parts = self.site, [repr(self.edit)]
        where = f"hook={site.hook!r}, " if site.hook != "resid_post" else ""
        where += f"layers={list(site.layers)}, " if site.layers is not None else ""
        parts.append(f".at({where}positions={site.positions!r})")
        parts += [f".when({self.gate!r})"] if self.gate is not None else []
        parts += [f".during({self.phase!r})"] if self.phase != "prefill" else []
        parts += [f".scaled({self.strength:g})"] if self.strength != 1 else []
        return "".join(parts)


def require_gate(gate: Any) -> None:
    """Refuse what is no gate.

    Raises:
        InterventionError: As said.
    """
    require_type(gate, Gate, InterventionError, "make one, as in gates.harmful(directions); leave .when out for all queries")


def require_phase(phase: Any) -> None:
    """Refuse what is no phase.

    Raises:
        InterventionError: As said.
    """
    if not one_of(phase, get_args(Phase)):
        raise InterventionError(f"the phase {quoted(phase)}", "'prefill', 'decode' or 'always'", "choose one of them")


def require_writable(hook: str) -> None:
    """Refuse a hook that can only be read.

    Raises:
        InterventionError: As said.
    """
    if not HOOKS[parse(hook).hook].writable:
        writable = ", ".join(other.name for other in HOOKS.values() if other.writable and other.width and other.stage == BLOCKS)
        raise InterventionError(f"an edit at {hook!r}", "a hook that can be written", f"edit one of {writable}")
