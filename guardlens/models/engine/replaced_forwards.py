"""Modules whose `forward` is replaced for a while, and what a `forward` is given."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from torch import nn


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within this context, each module has another `forward`.

    A forward hook could change only what a module returns after it has run, so the bound method itself is replaced.
    """
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


@lru_cache
def argument_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """The names of the arguments of a class's `forward`, by their place."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]
