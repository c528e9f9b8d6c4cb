"""What a defence is: a change of the prompt and an intervention in the model, either of which may be empty."""

from collections.abc import Callable
from dataclasses import dataclass

from guardlens.data.presentations import Presentation
from guardlens.errors import InterventionError, quoted, require_type
from guardlens.interventions.intervention import Intervention, nothing, require_intervention


def unchanged(presentation: Presentation) -> Presentation:
    """Return the presentation: the prompt stays as it is."""
    return presentation


@dataclass(frozen=True, eq=False)
class Defence:
    """A named defence.

    Attributes:
        name: Its name in tables.
        intervention: What it changes in the hidden states.
        present: A function of a presentation that returns the presentation to show instead.

    Raises:
        InterventionError: `name` is not text, `intervention` is not an intervention, or `present` cannot be called.

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
                f"present={quoted(self.present)}", "a function of a presentation", "pass a function that returns the presentation to show"
            )

    def __repr__(self) -> str:
        parts = [repr(self.name)]
        if self.intervention.steps:
            parts.append(repr(self.intervention))
        if self.present is not unchanged:
            parts.append(f"present={getattr(self.present, '__name__', type(self.present).__name__)}")
        return f"Defence({', '.join(parts)})"


none = Defence("none")
"""No defence: the model as it is.

Examples:
    >>> defences.none.intervention, defences.none.present(grey) == grey
    (nothing, True)
"""
