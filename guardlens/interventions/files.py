"""Saving plans: frozen dataclasses as JSON, their tensors beside it. Only guardlens's own types are read back, and no code."""

import dataclasses
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guardlens.errors import StorageError
from guardlens.storage import digest, load_tensors, save_tensors

KIND = "intervention"


def save(plan: Any, path: str | Path) -> None:
    """Write a plan to one safetensors file."""
    tensors: dict[str, Tensor] = {}
    header = _encode(plan, tensors, "plan")
    save_tensors(path, KIND, tensors, header)


def load(path: str | Path) -> Any:
    """Read a plan."""
    tensors, header = load_tensors(path, KIND)
    return _decode(header, tensors)


def fingerprint(plan: Any) -> str:
    """A digest of everything that a plan consists of."""
    tensors: dict[str, Tensor] = {}
    header = json.dumps(_encode(plan, tensors, "plan"), sort_keys=True)
    return digest(header.encode(), *(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors.values()))


def _encode(value: Any, tensors: dict[str, Tensor], key: str) -> Any:
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors, f"{key}.{i}") for i, item in enumerate(value)]}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if dataclasses.is_dataclass(value) and type(value).__module__.startswith("guardlens."):
        names = [field.name for field in dataclasses.fields(value)]
        fields = {name: _encode(getattr(value, name), tensors, f"{key}.{name}") for name in names}
        return {"type": f"{type(value).__module__}:{type(value).__name__}", "fields": fields}
    raise StorageError(f"{value!r} in the plan", "data only", "rebuild a plan with custom functions in code; save the rest of it")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_decode(item, tensors) for item in value["tuple"])
    module, _, name = value["type"].partition(":")
    loadable = module.startswith("guardlens.") and importlib.util.find_spec(module) and not module.endswith("__main__")
    kind = getattr(importlib.import_module(module), name, None) if loadable else None
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise StorageError(f"the type {value['type']!r} in the file", "a type of guardlens", "save the plan anew with this version")
    return kind(**{name: _decode(field, tensors) for name, field in value["fields"].items()})
