"""Every error that guardlens raises on purpose: what was found, what was expected, and what to do next.

GuardlensError
├── QueryError           a query, a label, a pair or a file of them
│   └── PresentationError    a query that cannot be shown in the way asked for
├── SiteError            a hook name, a layer or a set of positions that the model does not have
├── PlanError            an intervention that contradicts itself
├── MismatchError        two things that do not belong together (another model, width or configuration)
├── NumericsError        NaN or infinity, too few samples, a rank that is not there
├── ModelError           a model in which guardlens cannot find what it needs
└── StorageError         a file or a results directory that cannot be read or may not be written
"""


class GuardlensError(Exception):
    """Base class.

    Args:
        found: What guardlens met, with the offending value.
        expected: What it needs in that place.
        next_step: The call or the change that mends it.

    Example:
        >>> raise SiteError("layer 12", "a layer from 0 to 7", "choose one with .at(layers=[...])")
        Traceback (most recent call last):
        guardlens.errors.SiteError: Found layer 12.
        Expected a layer from 0 to 7.
        Next: choose one with .at(layers=[...]).
    """

    def __init__(self, found: str, expected: str, next_step: str) -> None:
        self.found, self.expected, self.next_step = found, expected, next_step
        end = "" if next_step.endswith("?") else "."
        super().__init__(f"Found {found}.\nExpected {expected}.\nNext: {next_step}{end}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.found, self.expected, self.next_step)


def require_type(value: object, kind: type, error: type[GuardlensError], next_step: str) -> None:
    """Refuse what is not of a type, for arguments that are easily taken for one another.

    Raises:
        GuardlensError: Of the given class; both types are named.
    """
    if not isinstance(value, kind):
        found = f"the class {value.__name__} itself" if isinstance(value, type) else f"something of type {type(value).__name__}"
        raise error(found, f"something of type {kind.__name__}", next_step)


class QueryError(GuardlensError):
    """A query, a label, a pair or a file of them is not usable."""


class PresentationError(QueryError):
    """A query cannot be shown in the way asked for."""


class SiteError(GuardlensError):
    """The model has no such hook, layer or positions."""


class PlanError(GuardlensError):
    """An intervention contradicts itself."""


class MismatchError(GuardlensError):
    """Two things do not belong together: another model, another width, another configuration."""


class NumericsError(GuardlensError):
    """A number is not finite, or there are too few samples for what was asked."""


class ModelError(GuardlensError):
    """guardlens cannot find in this model what it needs."""


class StorageError(GuardlensError):
    """A file or a results directory cannot be read, or may not be written."""
