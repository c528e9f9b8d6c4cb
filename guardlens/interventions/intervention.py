"""The algebra: an intervention is a sequence of steps (edit, site, gate, phase, strength), changed by modifiers and joined by `>>`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from guardlens.errors import InterventionError, MismatchError, as_number, require_type, type_of
from guardlens.hooks import HOOKS, Layers, Positions, Site, as_layers, require_same_space
from guardlens.interventions.edits import Affine, Placebo
from guardlens.interventions.gates import AllOf, AnyOf, Gate, Linear, Not
from guardlens.interventions.held_states import State, resolved, source_of
from guardlens.interventions.serialization import fingerprint, load, save
from guardlens.interventions.step import Phase, Step, require_gate, require_phase, require_writable
from guardlens.results.notebook_html import captioned, span, table
from guardlens.results.provenance import require_same_model


@dataclass(frozen=True, eq=False)
class Intervention:
    """An intervention of edits: immutable, composable, printable, savable.

    Every modifier returns a new intervention, applies to all its steps, and changes only what it is given.

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
            require_type(step, Step, InterventionError, "hand in steps; interventions are joined with >>")

    def at(self, *, hook: str | None = None, layers: Layers | None = None, positions: Positions | None = None) -> "Intervention":
        """Move all steps: to another hook, to these layers, to these positions.

        A full hook name says the layer, too; a hook that is in no block has none.

        Raises:
            SiteError: Unknown hook or positions, or layers that are none or contradict the hook's name.
            InterventionError: The hook can only be read.
        """
        place = Site("resid_post" if hook is None else hook, as_layers(layers), "last" if positions is None else positions)
        require_writable(place.hook if hook is None else hook)
        moved = {"hook": hook is not None, "positions": positions is not None}
        moved["layers"] = place.layers is not None or not HOOKS[place.hook].layered
        changes = {name: getattr(place, name) for name, given in moved.items() if given}
        return self._each(lambda step: replace(step, site=replace(step.site, **changes)))

    def when(self, gate: Gate) -> "Intervention":
        """Put all steps under a gate.

        Raises:
            InterventionError: A step has one already, or this is no gate.
        """
        require_gate(gate)
        gated = next((step for step in self.steps if step.gate is not None), None)
        if gated is not None:
            raise InterventionError(
                f"a second gate on {gated!r}", "one gate per step", "combine gates with &, | and ~, then call .when once"
            )
        return self._each(lambda step: replace(step, gate=gate))

    def during(self, phase: Phase) -> "Intervention":
        """Edit in the prefill (the default), in the decode steps, or always.

        Raises:
            InterventionError: Another word.
        """
        require_phase(phase)
        return self._each(lambda step: replace(step, phase=phase))

    def scaled(self, strength: float) -> "Intervention":
        """Multiply all strengths.

        Raises:
            InterventionError: No finite number.
        """
        by = as_number(strength, "strength", InterventionError, "say .scaled(0.5)")
        return self._each(lambda step: replace(step, strength=step.strength * by))

    def placebo(self, seed: int = 0) -> "Intervention":
        """The same intervention with every edit turned into random directions of equal norm: the control of any claim about it.

        Raises:
            InterventionError: A seed that is no whole number from 0 up.
        """
        return self._each(lambda step: replace(step, edit=Placebo(step.edit, seed)))

    def __rshift__(self, after: "Intervention") -> "Intervention":
        """First this intervention, then `after`. Associative; the order matters only where their sites meet.

        Raises:
            InterventionError: `after` is no intervention.
        """
        require_intervention(after)
        return Intervention(self.steps + after.steps)

    @property
    def free(self) -> bool:
        """Whether some step has no layers yet."""
        return any(step.site.free for step in self.steps)

    def placed(self, layers: Layers, strength: float = 1.0) -> "Intervention":
        """Put the free steps at these layers and scale them; the others stay as they are."""
        where, by = as_layers(layers), as_number(strength, "strength", InterventionError, "say placed(layers, 0.5)")

        def place(step: Step) -> Step:
            if not step.site.free:
                return step
            return replace(step, site=replace(step.site, layers=where), strength=step.strength * by)

        return self._each(place)

    def requires(self, n_layers: int) -> dict[State, set[int | None]]:
        """Every held state that the intervention asks for, with the layers it is read at.

        Raises:
            InterventionError: A step asks for a state of this run that comes after it.
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

    def check(self, models: tuple[str, ...], n_layers: int, widths: Mapping[str, int]) -> None:
        """Refuse an intervention that does not fit a model, or that model and the LLM beside it.

        Raises:
            MismatchError: Its directions are another model's, were read in another space, or have another width.
            SiteError: It has a layer that the model has not.
            InterventionError: It asks for a state that comes too late.
        """
        for step in self.steps:
            edit = step.edit.edit if isinstance(step.edit, Placebo) else step.edit
            if step.gate is not None:
                require_same_model(f"the directions of {step.gate!r}", step.gate.model, *models)
            met = [(edit, step.site.hook), *((edit, state.hook) for state in edit.requires if state.hook)]
            for owner, hook in (*met, *((gate, gate.seen.hook or "") for gate in _gates(step.gate))):
                require_same_model(f"the directions of {owner!r}", owner.model, *models)
                require_same_space(f"{owner!r}, with directions", getattr(owner, "hook", ""), hook)
                needed = widths.get(HOOKS[hook].width)
                width = getattr(owner, "d_model", needed)
                if needed is not None and width != needed:
                    raise MismatchError(
                        f"{owner!r} of width {width} at {hook}", f"width {needed}, the model's", "collect with this model, at this hook"
                    )
        self.requires(n_layers)

    def to(self, device: torch.device) -> "Intervention":
        """With the factors of its linear edits on a device."""

        def move(edit: Any) -> Any:
            if isinstance(edit, Placebo):
                return replace(edit, edit=move(edit.edit))
            return edit.to(device) if isinstance(edit, Affine) else edit

        return self._each(lambda step: replace(step, edit=move(step.edit)))

    @property
    def fingerprint(self) -> str:
        """Equal for interventions that do the same by the same numbers; a loaded intervention has that of the saved one."""
        return fingerprint(self)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file.

        Raises:
            StorageError: A custom edit is in it.
        """
        save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "Intervention":
        """Read what `save` wrote.

        Raises:
            StorageError: Not such a file.
        """
        return load(path)

    def _each(self, change: Callable[[Step], Step]) -> "Intervention":
        return Intervention(tuple(change(step) for step in self.steps))

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.steps)) or "nothing"

    def _repr_html_(self) -> str:
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
        return captioned(f"Intervention({steps})", table(rows)) if rows else captioned(repr(self))


def require_intervention(intervention: Any) -> None:
    """Refuse what is no intervention, such as a defence.

    Raises:
        InterventionError: As said.
    """
    require_type(
        intervention,
        Intervention,
        InterventionError,
        "take a defence's .intervention, and show the queries with its .present(presentation)",
    )


nothing = Intervention()
"""The intervention that changes nothing.

Examples:
    >>> iv.nothing.steps, (iv.nothing >> guard).fingerprint == guard.fingerprint
    ((), True)
"""


def _gates(gate: Gate | None) -> Iterator[Linear]:
    """The linear gates that a gate is made of."""
    if isinstance(gate, AllOf | AnyOf):
        for inner in gate.gates:
            yield from _gates(inner)
    elif isinstance(gate, Not):
        yield from _gates(gate.gate)
    elif isinstance(gate, Linear):
        yield gate
