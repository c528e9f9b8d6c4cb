"""What is evaluated: every draw of every defence in every presentation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guardlens.data.presentations import Presentation
from guardlens.defences import Defence
from guardlens.errors import InterventionError, require_type
from guardlens.interventions import Intervention

_BY_NAME = "pass defences or interventions by name, as in {'none': defences.none}"


@dataclass(frozen=True, eq=False)
class Condition:
    """One draw of a defence in one presentation.

    Attributes:
        name: The defence's name in the table.
        draw: The number of the draw, from 0.
        defence: The defence.
        presentation: The presentation, by whose name the table knows the condition.
        shown: What the defence makes of that presentation.
    """

    name: str
    draw: int
    defence: Defence
    presentation: Presentation
    shown: Presentation

    @property
    def key(self) -> tuple[str, int, str]:
        """Defence, draw and presentation: what tells this condition apart from the others."""
        return self.name, self.draw, self.presentation.name


def as_conditions(defences: Mapping[str, Sequence[Defence]], presentations: Sequence[Presentation]) -> list[Condition]:
    """Every draw of every defence in every presentation. Each defence is asked once what it makes of each presentation."""
    return [
        Condition(name, draw, defence, presentation, defence.present(presentation))
        for presentation in presentations
        for name, draws in defences.items()
        for draw, defence in enumerate(draws)
    ]


def as_draws(defences: Any) -> dict[str, tuple[Defence, ...]]:
    """The draws of each defence by name. A bare intervention becomes a defence that leaves the prompt alone.

    Raises:
        InterventionError: The defences are not a mapping, or a name or a draw is missing or of another type.
    """
    require_type(defences, Mapping, InterventionError, _BY_NAME)
    if not defences:
        raise InterventionError("no defences", "at least one", "pass {'none': defences.none} to evaluate the model as it is")
    return {_as_name(name): _as_draws(name, given) for name, given in defences.items()}


def _as_name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise InterventionError(f"the name {name!r} of a defence", "a text", "name it, as in {'none': defences.none}")
    return name


def _as_draws(name: str, given: Any) -> tuple[Defence, ...]:
    draws = given if isinstance(given, Sequence) else [given]
    if not draws:
        raise InterventionError(f"no draw of the defence {name!r}", "at least one", "leave this defence out, or pass an intervention")
    return tuple(_as_defence(name, draw) for draw in draws)


def _as_defence(name: str, draw: Any) -> Defence:
    defence = Defence(name, draw) if isinstance(draw, Intervention) else draw
    require_type(defence, Defence, InterventionError, _BY_NAME)
    return defence
