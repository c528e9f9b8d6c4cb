"""Look up submodules and numbers by candidate names."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def within(module: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule at a path, or None if there is none."""
    try:
        return module.get_submodule(path) if path else None
    except AttributeError:
        return None


def first_name(module: nn.Module, candidates: Iterable[str]) -> str:
    """Return the first candidate that names a submodule, or an empty string."""
    return next((name for name in candidates if within(module, name) is not None), "")


def first(module: nn.Module, candidates: Iterable[str]) -> Any:
    """Return the first submodule that a candidate names, or None."""
    return within(module, first_name(module, candidates))


def first_number(owner: Any, candidates: Iterable[str], default: Any) -> Any:
    """Return the first of these attributes that is not None, or the default."""
    return next((value for name in candidates if (value := getattr(owner, name, None)) is not None), default)


def unwrapped(hf: Any) -> Any:
    """Return the model inside an adapter's wrapper (PEFT), or the model itself."""
    return hf.get_base_model() if hasattr(hf, "get_base_model") else hf
