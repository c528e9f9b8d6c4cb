"""Saving interventions: frozen dataclasses as JSON, with tensors beside it. Loading makes only the types of `TAGS`, and runs no code."""

import dataclasses
import json
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from guardlens.errors import StorageError
from guardlens.interventions.edits import Custom, Placebo
from guardlens.results.files import checksum, digest, in_memory, load_tensors, reading, save_tensors

KIND = "intervention"

TAGS = {
    "intervention": "guardlens.interventions.intervention:Intervention",
    "step": "guardlens.interventions.step:Step",
    "affine": "guardlens.interventions.edits.affine:Affine",
    "relative_add": "guardlens.interventions.edits.relative_add:RelativeAdd",
    "swap": "guardlens.interventions.edits.swap:Swap",
    "placebo": "guardlens.interventions.edits.placebo:Placebo",
    "linear_gate": "guardlens.interventions.gates.linear:Linear",
    "all_of": "guardlens.interventions.gates.base:AllOf",
    "any_of": "guardlens.interventions.gates.base:AnyOf",
    "not": "guardlens.interventions.gates.base:Not",
    "state": "guardlens.interventions.held_states:State",
    "site": "guardlens.hooks:Site",
    "text_only": "guardlens.data.presentations.protocol:TextOnly",
    "without_images": "guardlens.data.presentations.wrappers:WithoutImages",
    "blank": "guardlens.data.presentations.with_image:Blank",
    "noise": "guardlens.data.presentations.with_image:Noise",
    "own": "guardlens.data.presentations.with_image:OwnImages",
    "framed": "guardlens.data.presentations.wrappers:Framed",
    "chat": "guardlens.data.presentations.wrappers:Chat",
}
"""The types that an intervention may consist of: tag -> module and class. A tag stands for its type in files and fingerprints, and stays
when the type moves."""

_TAG_OF = {place: tag for tag, place in TAGS.items()}


def save(intervention: Any, path: str | Path) -> None:
    """Write an intervention to one safetensors file.

    Raises:
        StorageError: The intervention has a custom edit, or the file cannot be written.
    """
    for step in intervention.steps:
        edit = step.edit.edit if isinstance(step.edit, Placebo) else step.edit
        if isinstance(edit, Custom):
            raise _unsaveable(edit)
    tensors: dict[str, Tensor] = {}
    header = _encode(intervention, tensors, "intervention")
    save_tensors(path, KIND, tensors, header)


def load(path: str | Path) -> Any:
    """Read an intervention.

    Raises:
        StorageError: The file cannot be read, or holds something other than an intervention of the types of `TAGS`.
    """
    tensors, header = load_tensors(path, KIND)
    with reading(Path(path), "an intervention that this version saved"):
        if header["type"] != KIND:
            raise StorageError(f"the type {header['type']!r} in {path}", "an intervention", "save the intervention anew with this version")
        return _decode(header, in_memory(tensors))


def fingerprint(intervention: Any) -> str:
    """Return a digest of everything that an intervention consists of. A custom function counts by its name.

    Raises:
        StorageError: A custom function has no name.
    """
    tensors: dict[str, Tensor] = {}
    header = json.dumps(_encode(intervention, tensors, "intervention"), sort_keys=True)
    return digest(header.encode(), *(checksum(tensor).encode() for tensor in tensors.values()))


def _encode(value: Any, tensors: dict[str, Tensor], key: str) -> Any:
    """Return a value as JSON, and collect its tensors under keys that say where they were."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors, f"{key}.{i}") for i, item in enumerate(value)]}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Custom):
        return _encode_custom(value, tensors, key)
    tag = _TAG_OF.get(f"{type(value).__module__}:{type(value).__qualname__}")
    if tag is None:
        raise _unsaveable(value)
    names = [field.name for field in dataclasses.fields(value)]
    return {"type": tag, "fields": {name: _encode(getattr(value, name), tensors, f"{key}.{name}") for name in names}}


def _encode_custom(edit: Custom, tensors: dict[str, Tensor], key: str) -> dict[str, Any]:
    """Return the name and the held states of a custom function, which are all that a fingerprint sees of it."""
    if not edit.name:
        next_step = "say custom(fn, name='...'), or leave out= away"
        raise StorageError(f"{edit!r} in the intervention, a function without a name", "data or a name", next_step)
    return {"custom": edit.name, "requires": _encode(edit.requires, tensors, f"{key}.requires")}


def _unsaveable(value: Any) -> StorageError:
    next_step = "make it of the edits, gates and presentations of guardlens, or rebuild this part in code and save the rest"
    return StorageError(f"{value!r} in the intervention", "data only", next_step)


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return what `_encode` was given."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_decode(item, tensors) for item in value["tuple"])
    tag = value["type"]
    if tag not in TAGS:
        raise StorageError(f"the type {tag!r} in the file", f"one of {', '.join(TAGS)}", "save the intervention anew with this version")
    kind = pkgutil.resolve_name(TAGS[tag])
    return kind(**{name: _decode(field, tensors) for name, field in value["fields"].items()})
