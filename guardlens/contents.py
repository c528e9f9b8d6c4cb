"""What an object consists of, as a digest: objects that differ in anything they hold or do have two. No `repr` is believed."""

import copyreg
import functools
import hashlib
import sys
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from guardlens.architectures import fingerprint
from guardlens.errors import StorageError
from guardlens.storage import bytes_of

Parts = Sequence[Any]
"""What a value is made of: bytes count as they are, anything else is taken apart in turn."""

ORIENTATION = 0x0112
"""The EXIF tag that says how a picture is turned."""

MADE_BY_PYTHON = {
    *("__dict__", "__weakref__", "__module__", "__qualname__", "__doc__", "__annotations__", "__annotate__", "__annotate_func__"),
    *("__dataclass_fields__", "__dataclass_params__", "__match_args__", "__firstlineno__", "__static_attributes__", "__orig_bases__"),
    *("__abstractmethods__", "_abc_impl", "__parameters__", "__slots__", "_is_protocol", "__protocol_attrs__", "__annotations_cache__"),
}
"""Entries of a class that say nothing of what its objects do."""


def content(value: Any, what: str = "an object") -> str:
    """A digest of all that an object holds and does: 12 hexadecimal digits.

    Data count by value: numbers, texts, paths (with the bytes of their file), arrays, tensors, pictures, and any nesting of these. Models
    count by their fingerprint, and so does whatever has a text named `fingerprint`. Other objects count by what pickle would keep of them,
    by the code of their class, and by what that code reads of its module; code of installed packages counts by its name alone.

    Args:
        value: The object.
        what: What an error calls it.

    Raises:
        StorageError: It holds something that can't say what it consists of, such as an open file or a lock.

    Examples:
        >>> from guardlens.contents import content
        >>> content(presentations.blank("grey")) == content(presentations.blank("grey"))
        True
        >>> content(presentations.blank("grey")) == content(presentations.blank("white"))
        False
    """
    return _hash(value, what, ()).hex()[:12]


def _hash(value: Any, what: str, within: tuple[Any, ...]) -> bytes:
    """A hash over the kind of a value and the hashes of its parts, so that no two values are spelled alike."""
    depth = next((depth for depth, outer in enumerate(within) if outer is value), None)
    if depth is not None:
        return f"again {depth}".encode()
    kind, parts = _taken_apart(value, what, within)
    found = hashlib.sha256(kind.encode())
    for part in parts:
        found.update(hashlib.sha256(part).digest() if isinstance(part, bytes) else _hash(part, what, (*within, value)))
    return found.digest()


def _taken_apart(value: Any, what: str, within: tuple[Any, ...]) -> tuple[str, Parts]:
    kind, in_order = f"{type(value).__module__}:{type(value).__qualname__}", partial(_hash, what=what, within=())
    match value:
        case bytes() | bytearray():
            return "bytes", [bytes(value)]
        case None | bool() | int() | float() | complex() | str() | range() | slice():
            return kind, [repr(value).encode("utf-8", "surrogatepass")]
        case Path():
            return "path", [str(value).encode("utf-8", "surrogateescape"), value.read_bytes() if value.is_file() else b""]
        case Tensor():
            return "tensor", [str(value.dtype), tuple(value.shape), bytes(bytes_of(value))]
        case np.ndarray() if value.dtype.hasobject:
            return kind, [value.shape, value.tolist()]
        case np.ndarray() | np.generic():
            return kind, [str(value.dtype), value.shape, value.tobytes()]
        case Image.Image():
            shown = value.getpalette(), value.info.get("transparency"), value.getexif().get(ORIENTATION)
            return "picture", [value.mode, value.size, value.tobytes(), shown]
        case Mapping():
            return kind, [part for key in sorted(value, key=in_order) for part in (key, value[key])]
        case Set():
            return kind, sorted(value, key=in_order)
        case list() | tuple() if type(value) in (list, tuple):
            return kind, value
        case types.ModuleType():
            return "module", [value.__name__, str(getattr(value, "__version__", ""))]
        case type():
            return "class", [value.__module__, value.__qualname__, *(_class_code(value) if _own(value) else ())]
        case types.FunctionType():
            return "function", [value.__module__, value.__qualname__, *(_function_code(value) if _own(value) else ())]
        case types.CodeType():
            return "code", [value.co_code, value.co_names, value.co_varnames, value.co_consts]
        case types.MethodType():
            return "method", [value.__self__, value.__func__]
        case property():
            return "property", [value.fget, value.fset, value.fdel]
        case staticmethod() | classmethod():
            return kind, [value.__func__]
        case functools.cached_property():
            return "property", [value.func]
        case functools._lru_cache_wrapper():
            return "function", [value.__wrapped__]
        case nn.Module():
            return kind, [fingerprint(value)]
    if isinstance(said := getattr(value, "fingerprint", None), str):
        return kind, [said, type(value)]
    return kind, _pickled(value, what, within)


def _pickled(value: Any, what: str, within: tuple[Any, ...]) -> Parts:
    """What pickle would make an object of again."""
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        made = value.__reduce_ex__(4) if reduce is None else reduce(value)
    except Exception as error:  # of whatever kind its class raises
        inside = " in ".join(type(outer).__name__ for outer in reversed((*within, value)))
        raise StorageError(
            f"{what}, in which something can't say what it consists of: {inside} ({error})",
            "data, or objects of data",
            "make it a frozen dataclass, or give it a text `fingerprint` that changes with what it does; or leave out= away",
        ) from None
    if isinstance(made, str):
        return [type(value), made]
    return [type(value), *(list(part) if isinstance(part, Iterator) else part for part in made)]


def _own(value: Any) -> bool:
    """Whether a class or function is a user's: of no installed package, whose version says what it does."""
    top = str(value.__module__).partition(".")[0]
    file = str(getattr(sys.modules.get(top), "__file__", None) or "")
    installed = "site-packages" in file or "dist-packages" in file
    return (not installed and top not in sys.stdlib_module_names | {"guardlens"}) or top == "__main__"


def _class_code(value: type) -> Parts:
    return [value.__bases__, {name: each for name, each in vars(value).items() if name not in MADE_BY_PYTHON}]


def _function_code(value: types.FunctionType) -> Parts:
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    read = {name: value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__}
    return [value.__code__, value.__defaults__, value.__kwdefaults__, cells, read]


def _names(code: types.CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))
