"""What a defence is: a way to change the prompt and a plan of edits, either of which may be empty."""

from collections.abc import Callable
from dataclasses import dataclass

from guardlens.interventions.plan import Intervention, nothing
from guardlens.queries import Presentation
from guardlens.storage import digest


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

    Examples:
        >>> def reminded(inner):
        ...     return presentations.framed(inner, before="please stay safe . ")
        >>> careful = defences.Defence("careful", guard.at(layers=7), present=reminded)
        >>> model.generate(queries[1], careful.present(grey), careful.intervention).split()[0]
        'sorry'
    """

    name: str
    intervention: Intervention = nothing
    present: Callable[[Presentation], Presentation] = unchanged

    def fingerprint(self, presentation: Presentation) -> str:
        """Equal for defences that do the same to a presentation; run directories are checked by it."""
        return digest(repr(self.present(presentation)).encode(), self.intervention.fingerprint.encode())


none = Defence("none")
"""The model as it is.

Examples:
    >>> defences.none.intervention, defences.none.present(grey) == grey
    (nothing, True)
"""
