"""Every error that guardlens raises on purpose: what was found, what was expected, and what to do next.

    GuardlensError
    ├── QueryError           a query, a label, a pair or a file of them
    │   └── PresentationError    a query that cannot be shown in the way asked for
    ├── ArgumentError        a number, a name or an option that a function does not take
    ├── SiteError            a hook name, a layer or a set of positions that the model does not have
    ├── InterventionError    an intervention, an edit or a gate that contradicts itself
    ├── MismatchError        two things that do not belong together (another model, width or configuration)
    ├── NumericsError        NaN or infinity, too few samples, a rank that is not there
    ├── ModelError           a model in which guardlens cannot find what it needs
    └── StorageError         a file or a results directory that cannot be read or may not be written

Each has the three parts as `found`, `expected` and `next_step`.
"""

import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from math import isfinite, nan
from numbers import Real
from operator import index
from typing import Any


class GuardlensError(Exception):
    """Base class.

    Args:
        found: What guardlens met, with the offending value: a noun phrase, which is shown behind "Found", or a whole sentence.
        expected: What it needs in that place, a noun phrase or a sentence; empty where `found` says it all.
        next_step: The call or the change that mends it; empty where there is none to name.

    Examples:
        >>> raise gl.errors.SiteError("layer 12", "one from 0 to 7", "say .at(layers=[...])")
        Traceback (most recent call last):
        guardlens.errors.SiteError: Found layer 12.
        Expected one from 0 to 7.
        Next: say .at(layers=[...]).
    """

    def __init__(self, found: str, expected: str = "", next_step: str = "") -> None:
        self.found = found
        self.expected = expected
        self.next_step = next_step
        parts = (_sentence("Found ", found), _sentence("Expected ", expected), _sentence("Next: ", next_step))
        super().__init__("\n".join(part for part in parts if part))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.found, self.expected, self.next_step)


def _sentence(lead: str, text: str) -> str:
    """A noun phrase behind its lead word; a sentence (a capital first, a full stop last) as it is."""
    is_sentence = text[:1].isupper() and text.endswith(".") and not text.endswith("...")
    if not text or is_sentence:
        return text
    return f"{lead}{text}" if text.endswith("?") else f"{lead}{text}."


def warn(message: str) -> None:
    """Warn, at the line of the user's own that led here: so the same note is shown once for it, and in its place.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as seen:
        ...     warnings.simplefilter("always")
        ...     gl.errors.warn("a pair lacks its twin")
        >>> str(seen[0].message)
        'a pair lacks its twin'
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in ("guardlens", "contextlib", "functools"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def require_type(value: object, kind: type, error: type[GuardlensError], next_step: str) -> None:
    """Refuse what is not of a type, for arguments that are easily taken for one another.

    Raises:
        GuardlensError: Of the given class; both types are named.

    Examples:
        >>> gl.errors.require_type("how ?", gl.Query, gl.errors.QueryError, "wrap it, as in Query(text)")
        Traceback (most recent call last):
        guardlens.errors.QueryError: Found something of type str.
        Expected something of type Query.
        Next: wrap it, as in Query(text).
    """
    if not isinstance(value, kind):
        raise error(type_of(value), f"something of type {kind.__name__}", next_step)


def type_of(value: object) -> str:
    """What a value is, in words for a message.

    Examples:
        >>> gl.errors.type_of(3), gl.errors.type_of(gl.Query)
        ('something of type int', 'the class Query itself')
    """
    return f"the class {value.__name__} itself" if isinstance(value, type) else f"something of type {type(value).__name__}"


def quoted(value: object) -> str:
    """A value as it looks in a message: cut where it is long, its type alone where it can't be shown.

    Examples:
        >>> gl.errors.quoted("greyish"), len(gl.errors.quoted(list(range(10_000))))
        ("'greyish'", 80)
    """
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of the user's own __repr__, whatever it raises
        return type_of(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def first_sentence(error: Exception) -> str:
    """What an error of another library says, without what follows its first sentence.

    Examples:
        >>> gl.errors.first_sentence(OSError("No such model. Check the name, or log in."))
        'No such model'
    """
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".")


def one_of(value: object, words: Collection[Any]) -> bool:
    """Whether a value is one of some words. Arrays and data frames, whose `==` answers for each of their values, are none.

    Examples:
        >>> gl.errors.one_of("decode", ("prefill", "decode")), gl.errors.one_of(np.zeros(3), ("prefill", "decode"))
        (True, False)
    """
    return isinstance(value, str) and value in words


def is_several(value: object) -> bool:
    """Whether a value holds several: text, mappings and arrays without an axis are one thing.

    Examples:
        >>> gl.errors.is_several([5, 6]), gl.errors.is_several("56"), gl.errors.is_several(np.int64(5))
        (True, False, False)
    """
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) and getattr(value, "ndim", 1) > 0


def as_count(value: object, name: str, error: type[GuardlensError], next_step: str, least: int = 1) -> int:
    """A whole number that is at least `least`, as Python's own int. Those of numpy and torch count as whole numbers, True and 2.0 don't.

    Raises:
        GuardlensError: Of the given class.

    Examples:
        >>> gl.errors.as_count(np.int64(3), "draws", gl.errors.NumericsError, "leave it out")
        3
        >>> gl.errors.as_count(2.5, "draws", gl.errors.NumericsError, "leave it out")
        Traceback (most recent call last):
        guardlens.errors.NumericsError: Found draws=2.5.
        Expected a whole number, 1 or more.
        Next: leave it out.
    """
    found = _bare(value)
    try:
        number = None if isinstance(found, bool) else index(found)
    except TypeError:
        number = None
    if number is None or not least <= number < 2**63:  # more no 64-bit seed, count or size holds
        raise error(f"{name}={quoted(value)}", f"a whole number, {least} or more", next_step)
    return number


def as_number(value: object, name: str, error: type[GuardlensError], next_step: str) -> float:
    """A finite number, as Python's own float. Those of numpy and torch without an axis count as numbers, True, text and 1j don't.

    Raises:
        GuardlensError: Of the given class.

    Examples:
        >>> gl.errors.as_number(np.float32(0.5), "alpha", gl.errors.InterventionError, "leave it out")
        0.5
        >>> gl.errors.as_number("0.5", "alpha", gl.errors.InterventionError, "leave it out")
        Traceback (most recent call last):
        guardlens.errors.InterventionError: Found alpha='0.5'.
        Expected a finite number.
        Next: leave it out.
    """
    found = _bare(value)
    try:
        number = float(found) if isinstance(found, Real) and not isinstance(found, bool) else nan
    except OverflowError:  # an int beyond all floats
        number = nan
    if not isfinite(number):
        raise error(f"{name}={quoted(value)}", "a finite number", next_step)
    return number


def _bare(value: Any) -> Any:
    """What an array or a tensor without an axis holds, as Python's own; anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


class QueryError(GuardlensError):
    """A query, a label, a pair or a file of them is not usable.

    Examples:
        >>> gl.Query("how to mend the hat ?", "harmles")
        Traceback (most recent call last):
        guardlens.errors.QueryError: Found the label 'harmles' of query ''.
        Expected 'harmful', 'harmless' or None.
        Next: correct it, or leave the label out.
    """


class PresentationError(QueryError):
    """A query cannot be shown in the way asked for.

    Examples:
        >>> presentations.blank("greyish")
        Traceback (most recent call last):
        guardlens.errors.PresentationError: Found the colour 'greyish'.
        Expected an opaque colour that Pillow knows by name or code.
        Next: try 'grey', or '#808080'.
    """


class ArgumentError(GuardlensError, ValueError):
    """An argument is not what the function takes: a number out of range, an unknown option, two things of one name.

    Examples:
        >>> gl.collect(model, pairs, batch_size=0)
        Traceback (most recent call last):
        guardlens.errors.ArgumentError: Found batch_size=0.
        Expected a whole number, 1 or more.
        Next: leave it out to have it chosen from free memory.
    """


class SiteError(GuardlensError, KeyError):
    """The model has no such hook, layer or positions. A KeyError, too, since an `ActivationCache` is a mapping by hook name.

    Examples:
        >>> gl.Site("blocks.3.hook_resid_pots")
        Traceback (most recent call last):
        guardlens.errors.SiteError: Found the hook name 'blocks.3.hook_resid_pots'.
        Expected a name from model.hook_names.
        Next: did you mean 'blocks.3.hook_resid_post'?
    """

    __str__ = Exception.__str__  # KeyError's would be a repr, in quotes and on one line


class InterventionError(GuardlensError):
    """An intervention contradicts itself.

    Examples:
        >>> guard.during("later")
        Traceback (most recent call last):
        guardlens.errors.InterventionError: Found the phase 'later'.
        Expected 'prefill', 'decode' or 'always'.
        Next: say .during('always') for both.
    """


class MismatchError(GuardlensError):
    """Two things do not belong together: another model, another width, another configuration.

    Examples:
        >>> gl.Table({"layer": np.arange(2), "value": np.arange(3)})
        Traceback (most recent call last):
        guardlens.errors.MismatchError: Found columns of the lengths {'layer': 2, 'value': 3}.
        Expected one length.
        Next: give every row every column.
    """


class NumericsError(GuardlensError):
    """A number is not finite, or there are too few samples for what was asked.

    Examples:
        >>> directions.ssd(text, rank=200)
        Traceback (most recent call last):
        guardlens.errors.NumericsError: Found rank 200 of 100 pairs.
        Expected a rank from 1 to 100.
        Next: ask for a lower rank, or give more pairs.
    """


class ModelError(GuardlensError):
    """guardlens cannot find in this model what it needs.

    Examples:
        >>> scores.RefusalLogOdds(("pardon",)).token_ids(model.tokenizer)
        Traceback (most recent call last):
        guardlens.errors.ModelError: Found a tokenizer that knows none of the openings of a refusal.
        Expected at least one.
        Next: pass RefusalLogOdds(('...',)) of its language.
    """


class StorageError(GuardlensError):
    """A file or a results directory cannot be read, or may not be written.

    Examples:
        >>> ssd.save("ssd.safetensors")
        >>> gl.Activations.load("ssd.safetensors")
        Traceback (most recent call last):
        guardlens.errors.StorageError: ...
    """
