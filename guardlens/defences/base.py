"""What a defence is: a way to change the prompt and an intervention of edits, either of which may be empty."""

from collections.abc import Callable
from dataclasses import dataclass

from guardlens.data.presentations import Presentation
from guardlens.errors import InterventionError, quoted, require_type
from guardlens.interventions.intervention import Intervention, nothing, require_intervention


def unchanged(presentation: Presentation) -> Presentation:
    """Show queries as they are."""
    return presentation


@dataclass(frozen=True, eq=False)
class Defence:
    """A named defence.

    Attributes:
        name: As it appears in tables.
        intervention: What it changes in the run.
        present: What it makes of a presentation.

    Raises:
        InterventionError: A name that is no text, no intervention, or a `present` that can't be called.

    Examples:
        >>> def reminded(inner):
        ...     return presentations.framed(inner, before="please stay safe . ")
        >>> careful = defences.Defence("careful", guard.at(layers=7), present=reminded)
        >>> model.generate(queries[1], careful.present(grey), careful.intervention).split()[0]
        'sorry'
        >>> defences.Defence("reminded", present=reminded)
        Defence('reminded', present=reminded)
    """

    name: str
    intervention: Intervention = nothing
    present: Callable[[Presentation], Presentation] = unchanged

    def __post_init__(self) -> None:
        require_type(self.name, str, InterventionError, "name it first, as in Defence('guard', intervention)")
        require_intervention(self.intervention)
        if not callable(self.present):
            raise InterventionError(
                f"present={quoted(self.present)}", "a function of a presentation", "hand in one that gives the presentation to show"
            )

    def __repr__(self) -> str:
        intervention = f", {self.intervention!r}" if self.intervention.steps else ""
        shown = f", present={getattr(self.present, '__name__', type(self.present).__name__)}" if self.present is not unchanged else ""
        return f"Defence({self.name!r}{intervention}{shown})"


none = Defence("none")
"""The model as it is.

Examples:
    >>> defences.none.intervention, defences.none.present(grey) == grey
    (nothing, True)
"""
