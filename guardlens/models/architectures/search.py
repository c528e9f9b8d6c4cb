"""Looking things up by candidate names: submodules of a module, numbers of a config or a module."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def within(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a path; None where there is none."""
    try:
        return module.get_submodule(path) if path else None
    except AttributeError:
        return None


def first_name(module: nn.Module, candidates: Iterable[str]) -> str:
    """The first candidate that is a submodule; empty where none is."""
    return next((name for name in candidates if within(module, name) is not None), "")


def first(module: nn.Module, candidates: Iterable[str]) -> Any:
    """The first submodule that a candidate names; None where none does."""
    return within(module, first_name(module, candidates))


def unwrapped(hf: Any) -> Any:
    """The model itself, where an adapter (PEFT) is around it."""
    return hf.get_base_model() if hasattr(hf, "get_base_model") else hf


def first_number(owner: Any, candidates: Iterable[str], default: Any) -> Any:
    """The first candidate that the owner has and that is not None."""
    return next((value for name in candidates if (value := getattr(owner, name, None)) is not None), default)
