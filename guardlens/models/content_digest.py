"""A digest of an object's content: objects that differ in anything they hold or do have different digests. No `repr` is trusted."""

import copyreg
import dis
import functools
import hashlib
import importlib
import sys
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from guardlens.errors import StorageError
from guardlens.models.architectures import facts
from guardlens.results.files import bytes_of

Parts = Sequence[Any]
"""The parts of a value: bytes count as they are, anything else is decomposed in turn."""

ORIENTATION = 0x0112
"""The EXIF tag for the orientation of an image."""

DATA = (bytes, bytearray, int, float, complex, str, Mapping, Set)
"""Types that count by value, unless the object is of a class of the user's."""

NAMED = {"guardlens", "transformers_modules"}
"""Packages that count by name even if no installer has put them in place; the code of a checkpoint has its revision in its name."""

MADE_BY_PYTHON = {
    *("__dict__", "__weakref__", "__module__", "__qualname__", "__doc__", "__annotations__", "__annotate__", "__annotate_func__"),
    *("__dataclass_fields__", "__dataclass_params__", "__match_args__", "__firstlineno__", "__static_attributes__", "__orig_bases__"),
    *("__abstractmethods__", "_abc_impl", "__parameters__", "__slots__", "_is_protocol", "__protocol_attrs__", "__annotations_cache__"),
}
"""Entries of a class that do not affect what its objects do."""


def content(value: Any, what: str = "an object") -> str:
    """Return a digest of everything that an object holds and does: 12 hexadecimal digits.

    Data count by value: numbers, texts, paths (with the bytes of their file), arrays, tensors, images, and any nesting of these; entries of
    a dictionary count in their order, since code iterates over them in this order. Models count by everything that they compute with, and
    an object with a text attribute `fingerprint` counts by that. Other objects count by their pickled state (without values that
    `cached_property` has computed), by the code of their class, and by what that code reads from its module and from other modules of the
    user's. Code of installed packages counts by its name alone.

    Args:
        value: The object.
        what: What an error calls it.

    Raises:
        StorageError: The object holds something that cannot be decomposed, such as an open file or a lock.

    Examples:
        >>> from guardlens.models.content_digest import content
        >>> content(presentations.blank("grey")) == content(presentations.blank("grey"))
        True
        >>> content(presentations.blank("grey")) == content(presentations.blank("white"))
        False
    """
    return _hash(value, what, (), {}).hex()[:12]


def _hash(value: Any, what: str, within: tuple[Any, ...], met: dict[int, Any]) -> bytes:
    """Hash the kind of a value together with the hashes of its parts, so that different values are never spelled alike.

    Args:
        value: The value.
        what: What an error calls the whole object.
        within: The values around this one, from the outside in. A value inside itself counts by its depth.
        met: The functions and classes met so far. Each is decomposed only once, since everything in a program refers to everything.
    """
    depth = next((depth for depth, outer in enumerate(within) if outer is value), None)
    if depth is not None:
        return f"again {depth}".encode()
    if isinstance(value, type | types.FunctionType):
        if id(value) in met:
            return f"as before {[*met].index(id(value))}".encode()
        met[id(value)] = value
    kind, parts = _decomposed(value, what, within)
    found = hashlib.sha256(kind.encode())
    for part in parts:
        found.update(hashlib.sha256(part).digest() if isinstance(part, bytes) else _hash(part, what, (*within, value), met))
    return found.digest()


def _decomposed(value: Any, what: str, within: tuple[Any, ...]) -> tuple[str, Parts]:
    """The kind of a value and its parts."""
    kind = f"{type(value).__module__}:{type(value).__qualname__}"
    if isinstance(value, DATA) and _own(type(value)):  # a user's class decides what its numbers, texts or dictionaries mean
        return kind, _pickled(value, what, within)
    found = _decomposed_plain(value, kind) or _decomposed_array(value, kind) or _decomposed_container(value, kind, what)
    found = found or _decomposed_code(value, kind)
    if found is not None:
        return found
    if isinstance(value, nn.Module):
        return kind, [facts(value, anew=True), *{type(module): None for module in value.modules()}]
    if isinstance(said := getattr(value, "fingerprint", None), str):
        return kind, [said, type(value)]
    return kind, _pickled(value, what, within)


def _decomposed_plain(value: Any, kind: str) -> tuple[str, Parts] | None:
    match value:
        case bytes() | bytearray():
            return "bytes", [bytes(value)]
        case None | bool() | int() | float() | complex() | str() | range() | slice():
            return kind, [repr(value).encode("utf-8", "surrogatepass")]
        case Path():
            return "path", [str(value).encode("utf-8", "surrogateescape"), value.read_bytes() if value.is_file() else b""]
    return None


def _decomposed_array(value: Any, kind: str) -> tuple[str, Parts] | None:
    match value:
        case Tensor():
            return "tensor", [str(value.dtype), tuple(value.shape), _array(value)]
        case np.ndarray() if value.dtype.hasobject:
            return kind, [value.shape, value.tolist()]
        case np.ma.MaskedArray():
            return kind, [value.data, np.ma.getmaskarray(value)]
        case np.ndarray() | np.generic():
            return kind, [str(value.dtype), value.shape, value.tobytes()]
        case Image.Image():
            shown = value.getpalette(), value.info.get("transparency"), value.getexif().get(ORIENTATION)
            return "picture", [value.mode, value.size, value.tobytes(), shown]
    return None


def _decomposed_container(value: Any, kind: str, what: str) -> tuple[str, Parts] | None:
    match value:
        case Mapping():
            return kind, [getattr(value, "default_factory", None), *(part for entry in value.items() for part in entry)]
        case Set():
            return kind, sorted(value, key=partial(_hash, what=what, within=(), met={}))
        case list() | tuple() if type(value) in (list, tuple):
            return kind, value
    return None


def _decomposed_code(value: Any, kind: str) -> tuple[str, Parts] | None:
    match value:
        case types.ModuleType():
            return "module", [value.__name__, str(getattr(value, "__version__", "")), _source(value)]
        case type():
            return "class", [value.__module__, value.__qualname__, *(_class_code(value) if _own(value) else ())]
        case types.FunctionType():
            return "function", [value.__module__, value.__qualname__, *(_function_code(value) if _own(value) else ())]
        case types.CodeType():
            return "code", [value.co_code, value.co_names, value.co_varnames, value.co_consts, value.co_exceptiontable]
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
    return None


def _array(tensor: Tensor) -> bytes:
    """The bytes of a tensor's numbers; none for a tensor on the meta device."""
    values = (tensor if tensor.layout is torch.strided else tensor.to_dense()).detach()
    return b"" if values.is_meta else bytes(bytes_of(values.resolve_conj().resolve_neg()))


def _pickled(value: Any, what: str, within: tuple[Any, ...]) -> Parts:
    """The parts from which pickle would rebuild an object.

    Raises:
        StorageError: The object cannot be pickled.
    """
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        made = value.__reduce_ex__(4) if reduce is None else reduce(value)
    except Exception as error:  # the object's class may raise anything
        inside = " in ".join(type(outer).__name__ for outer in reversed((*within, value)))
        raise StorageError(
            f"{what}, in which something can't say what it consists of: {inside} ({error})",
            "data, or objects of data",
            "make it a frozen dataclass, or give it a text `fingerprint` that changes with what it does; or leave out= away",
        ) from None
    if isinstance(made, str):
        return [type(value), made]
    return [
        type(value),
        *_held_by_class(value),
        *(list(part) if isinstance(part, Iterator) else _uncached(type(value), part) for part in made),
    ]


def _held_by_class(value: Any) -> Parts:
    """The values of a dataclass's fields that its class holds for all instances, such as the version of a judge; pickle leaves them out."""
    if not is_dataclass(value):
        return []
    own = getattr(value, "__dict__", {})
    return [
        part for each in fields(value) if not each.init and each.name not in own for part in (each.name, getattr(value, each.name, None))
    ]


def _uncached(kind: type, state: Any) -> Any:
    """A state without values that `cached_property` has computed: whether they are there depends on what was used so far."""
    if not isinstance(state, dict):
        return state
    return {name: each for name, each in state.items() if not isinstance(getattr(kind, str(name), None), functools.cached_property)}


def _own(value: Any) -> bool:
    """Whether a class or function is the user's own; those of installed packages count by name alone."""
    return _is_own(str(value.__module__))


def _is_own(module: str) -> bool:
    """Whether a module is the user's own: a notebook, or files that no installer has put in place."""
    top = module.partition(".")[0]
    if top == "__main__" or top not in sys.modules:
        return top not in sys.stdlib_module_names
    found = sys.modules[top]
    places = [str(getattr(found, "__file__", None) or ""), *map(str, getattr(found, "__path__", ()))]
    installed = any(name in place for place in places for name in ("site-packages", "dist-packages"))
    return any(places) and not installed and top not in sys.stdlib_module_names | NAMED


def _source(module: types.ModuleType) -> bytes:
    """The source file of a module of the user's; empty for other modules."""
    file = Path(str(getattr(module, "__file__", None) or "."))
    return file.read_bytes() if _is_own(module.__name__) and file.is_file() else b""


def _class_code(value: type) -> Parts:
    return [type(value), value.__bases__, sorted((name, each) for name, each in vars(value).items() if name not in MADE_BY_PYTHON)]


def _function_code(value: types.FunctionType) -> Parts:
    cells = [_in_cell(cell) for cell in value.__closure__ or ()]
    attributes = {name: each for name, each in vars(value).items() if name != "__wrapped__"}
    globals_read = sorted(_globals_read(value).items(), key=lambda named: named[0])
    return [value.__code__, value.__defaults__, value.__kwdefaults__, cells, attributes, [list(named) for named in globals_read]]


def _in_cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the cell is empty: its variable has not been assigned yet
        return None


def _globals_read(function: types.FunctionType) -> dict[str, Any]:
    """The names that a function reads from its module, and from modules of the user's that it names or imports."""
    codes = list(_codes(function.__code__))
    instructions = [instruction for code in codes for instruction in dis.get_instructions(code)]
    names = {each.argval for each in instructions if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")} & set(function.__globals__)
    found = {name: function.__globals__[name] for name in names}
    imported = [_imported(each.argval, function.__globals__) for each in instructions if each.opname == "IMPORT_NAME"]
    waiting = [each for each in (*found.values(), *imported) if _is_own_module(each)]
    attributes = {name for code in codes for name in code.co_names}
    seen: list[types.ModuleType] = []
    while waiting:
        module = waiting.pop()
        seen.append(module)
        inner = {name: each for name, each in vars(module).items() if name in attributes}
        found |= {f"{module.__name__}.{name}": each for name, each in inner.items()}
        waiting += [each for each in inner.values() if _is_own_module(each) and each not in seen]
    return {name: each for name, each in found.items() if not _is_own_module(each)}


def _is_own_module(value: Any) -> TypeGuard[types.ModuleType]:
    return isinstance(value, types.ModuleType) and _is_own(value.__name__)


def _imported(name: str, names: Mapping[str, Any]) -> types.ModuleType | None:
    """The module of the user's that an import within a function would import; None if the module is not the user's."""
    for full in (name, f"{names.get('__package__') or ''}.{name}".strip(".")):
        with suppress(ImportError, ValueError):
            spec = None if full.partition(".")[0] in sys.stdlib_module_names else find_spec(full)
            if spec and not any(part in str(spec.origin) for part in ("site-packages", "dist-packages")):
                return importlib.import_module(full)
    return None


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a code object and the code objects nested in it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)
