"""The algebra: an intervention is a sequence of steps, changed by modifiers and joined by `>>`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from guardlens.errors import InterventionError, MismatchError, as_number, require_type, type_of
from guardlens.hooks import HOOKS, Layers, Positions, Site, as_layers, require_same_space
from guardlens.interventions.edits import Placebo
from guardlens.interventions.gates.base import Gate, require_gate
from guardlens.interventions.held_states import State, resolved, source_of
from guardlens.interventions.serialization import fingerprint, load, save
from guardlens.interventions.step import Phase, Step, require_phase, require_writable
from guardlens.results.notebook_html import captioned, span, table
from guardlens.results.provenance import require_same_model


@dataclass(frozen=True, eq=False)
class Intervention:
    """A sequence of steps: immutable, and easy to compose, print and save.

    Every modifier returns a new intervention, applies to all steps, and changes only what it is given.

    Attributes:
        steps: The steps, in the order in which they are made where their sites meet.

    Raises:
        InterventionError: `steps` is not a tuple, or holds something other than steps.

    Examples:
        >>> intervention = guard.at(layers=[5, 6]) >> iv.add(ssd, 2.0).at(layers=7).during("decode")
        >>> [step.site.layers for step in intervention.steps]
        [(5, 6), (7,)]
        >>> intervention.save("intervention.safetensors")
        >>> gl.Intervention.load("intervention.safetensors").fingerprint == intervention.fingerprint
        True
        >>> guard.free, guard.placed([5, 6]).free  # a sweep moves free steps alone
        (True, False)
    """

    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.steps, tuple | list):
            raise InterventionError(type_of(self.steps), "steps in a tuple", "say Intervention((step,))")
        object.__setattr__(self, "steps", tuple(self.steps))
        for step in self.steps:
            require_type(step, Step, InterventionError, "pass steps; interventions are joined with >>")

    def at(self, *, hook: str | None = None, layers: Layers | None = None, positions: Positions | None = None) -> "Intervention":
        """Move all steps to another hook, to these layers, or to these positions.

        A full hook name such as `"blocks.5.hook_resid_post"` names the layer, too. A hook outside the layers has none.

        Raises:
            SiteError: The hook, a layer or the positions are unknown, or the layers contradict the hook's name.
            InterventionError: The hook can only be read.
        """
        given_hook = "resid_post" if hook is None else hook
        given_positions = "last" if positions is None else positions
        target = Site(given_hook, as_layers(layers), given_positions)
        require_writable(given_hook)
        changes: dict[str, Any] = {}
        if hook is not None:
            changes["hook"] = target.hook
        if target.layers is not None or not HOOKS[target.hook].layered:
            changes["layers"] = target.layers
        if positions is not None:
            changes["positions"] = target.positions
        return self._each(lambda step: replace(step, site=replace(step.site, **changes)))

    def when(self, gate: Gate) -> "Intervention":
        """Put all steps under a gate.

        Raises:
            InterventionError: A step has a gate already, or `gate` is not a gate.
        """
        require_gate(gate)
        gated = next((step for step in self.steps if step.gate is not None), None)
        if gated is not None:
            next_step = "combine gates with &, | and ~, then call .when once"
            raise InterventionError(f"a second gate on {gated!r}", "one gate per step", next_step)
        return self._each(lambda step: replace(step, gate=gate))

    def during(self, phase: Phase) -> "Intervention":
        """Edit in the prefill (the default), in the decode steps, or always.

        Raises:
            InterventionError: `phase` is none of these words.
        """
        require_phase(phase)
        return self._each(lambda step: replace(step, phase=phase))

    def scaled(self, strength: float) -> "Intervention":
        """Multiply all strengths.

        Raises:
            InterventionError: `strength` is not a finite number.
        """
        factor = as_number(strength, "strength", InterventionError, "say .scaled(0.5)")
        return self._each(lambda step: replace(step, strength=step.strength * factor))

    def placebo(self, seed: int = 0) -> "Intervention":
        """Return the control of any claim about this intervention: the same displacements, of equal norm, in random directions.

        Raises:
            InterventionError: `seed` is not a whole number from 0 up.
        """
        return self._each(lambda step: replace(step, edit=Placebo(step.edit, seed)))

    def __rshift__(self, after: "Intervention") -> "Intervention":
        """Make this intervention first, then `after`. Associative; the order matters only where their sites meet.

        Raises:
            InterventionError: `after` is not an intervention.
        """
        require_intervention(after)
        return Intervention(self.steps + after.steps)

    @property
    def free(self) -> bool:
        """Whether a step has no layers yet."""
        return any(step.site.free for step in self.steps)

    def placed(self, layers: Layers, strength: float = 1.0) -> "Intervention":
        """Put the free steps at these layers and multiply their strength; the other steps stay as they are.

        Raises:
            SiteError: `layers` holds something other than layers, or nothing.
            InterventionError: `strength` is not a finite number.
        """
        at_layers = as_layers(layers)
        factor = as_number(strength, "strength", InterventionError, "say placed(layers, 0.5)")

        def place(step: Step) -> Step:
            if not step.site.free:
                return step
            return replace(step, site=replace(step.site, layers=at_layers), strength=step.strength * factor)

        return self._each(place)

    def requires(self, n_layers: int) -> dict[State, set[int | None]]:
        """Return every held state that the intervention asks for, with the layers at which it is read.

        Raises:
            InterventionError: A step asks for a state of this run that comes after the step.
        """
        wanted: dict[State, set[int | None]] = {}
        for step in self.steps:
            for point in step.site.points(n_layers):
                for state in step.requires:
                    source = source_of(state, point, n_layers)
                    if state.presentation is None and source.order > point.order:
                        raise InterventionError(
                            f"an edit at {point.name} that needs this run's own {source.name}",
                            "a state from the same place or before",
                            "read an earlier layer, or the text twin",
                        )
                    wanted.setdefault(resolved(state, point), set()).add(source.layer)
        return wanted

    def require_fit(self, models: tuple[str, ...], n_layers: int, widths: Mapping[str, int]) -> None:
        """Require that the intervention fits a model, or a model and the LLM beside it.

        Args:
            models: Their ids.
            n_layers: How many layers they have.
            widths: The width of each kind of hook, as `Hook.width` names them.

        Raises:
            MismatchError: Its directions come from another model or another space, or have another width.
            SiteError: The model has no such layer.
            InterventionError: A step asks for a state of this run that comes after the step.
        """
        for step in self.steps:
            for part in step.parts:
                require_same_model(f"the directions of {part!r}", part.model, *models)
                for hook in step.hooks_of(part):
                    require_same_space(f"{part!r}, with directions", part.hook, hook)
                    width = widths.get(HOOKS[hook].width)
                    if width is not None and part.d_model not in (None, width):
                        raise MismatchError(
                            f"{part!r} of width {part.d_model} at {hook}",
                            f"width {width}, the model's",
                            "collect with this model, at this hook",
                        )
        self.requires(n_layers)

    def to(self, device: torch.device) -> "Intervention":
        """Return the intervention with the tensors of its edits and gates on a device."""
        return self._each(partial(_moved, device))

    @property
    def fingerprint(self) -> str:
        """A digest that is equal for interventions that do the same with the same numbers, saved and loaded ones included.

        Raises:
            StorageError: A custom function has no name.
        """
        return fingerprint(self)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file.

        Raises:
            StorageError: The intervention has a custom edit, or the file cannot be written.
        """
        save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "Intervention":
        """Read what `save` wrote.

        Raises:
            StorageError: The file cannot be read, or holds something other than an intervention.
        """
        return load(path)

    def _each(self, change: Callable[[Step], Step]) -> "Intervention":
        return Intervention(tuple(change(step) for step in self.steps))

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.steps)) or "nothing"

    def _repr_html_(self) -> str:
        if not self.steps:
            return captioned(repr(self))
        rows = [
            {
                "edit": repr(step.edit),
                "hook": step.site.hook,
                "layers": "free" if step.site.layers is None else span(step.site.layers),
                "positions": str(step.site.positions),
                "gate": "always open" if step.gate is None else repr(step.gate),
                "phase": step.phase,
                "strength": step.strength,
            }
            for step in self.steps
        ]
        steps = "1 step" if len(rows) == 1 else f"{len(rows)} steps"
        return captioned(f"Intervention({steps})", table(rows))


def require_intervention(intervention: Any) -> None:
    """Require an intervention.

    Raises:
        InterventionError: The value is not an intervention: a defence or an edit, say.
    """
    next_step = "take a defence's .intervention, and show the queries with its .present(presentation)"
    require_type(intervention, Intervention, InterventionError, next_step)


nothing = Intervention()
"""The intervention that changes nothing.

Examples:
    >>> iv.nothing.steps, (iv.nothing >> guard).fingerprint == guard.fingerprint
    ((), True)
"""


def _moved(device: torch.device, step: Step) -> Step:
    """A step with its tensors on a device."""
    gate = None if step.gate is None else step.gate.to(device)
    return replace(step, edit=step.edit.to(device), gate=gate)
