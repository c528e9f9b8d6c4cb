"""Tensors with one entry per layer: the numbers that edits and gates are made of."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor

from guardlens.errors import InterventionError, MismatchError, NumericsError, require_type
from guardlens.hooks import axis_layers

T = TypeVar("T")


def layer_axis(layers: Any, hook: str) -> tuple[int, ...] | None:
    """Return the layer of each entry as Python's integers; None if a single entry serves every layer.

    Raises:
        SiteError: There is no such hook, or a layer is not a layer or is there twice.
    """
    return None if layers is None else axis_layers(layers, hook)


def require_factors(label: str, layers: tuple[int, ...] | None, **factors: Any) -> None:
    """Require finite floating-point tensors with one entry per layer on their first axis.

    Args:
        label: The edit or gate that the factors belong to, for the error message.
        layers: The layer of each entry; None for a single entry that serves every layer.
        factors: The tensors by name.

    Raises:
        InterventionError: A factor is not a tensor, or does not hold floating-point numbers.
        MismatchError: A factor has more or fewer entries than there are layers.
        NumericsError: A factor holds NaN or infinity.
    """
    entries = 1 if layers is None else len(layers)
    for name, factor in factors.items():
        require_type(factor, Tensor, InterventionError, f"make {name} a tensor")
        if not factor.is_floating_point():
            raise InterventionError(f"{name} of {factor.dtype} in {label}", "floating-point numbers", f"pass {name}.float()")
        if factor.ndim == 0 or len(factor) != entries:
            shape = tuple(factor.shape)
            raise MismatchError(f"{name} of shape {shape} in {label}", f"{entries} on the first axis", "pass one entry per layer")
        if not torch.isfinite(factor).all():
            next_step = "look for it in the activations or vectors that it was made from"
            raise NumericsError(f"NaN or infinity in the {name} of {label}", "finite numbers", next_step)


def on_device(value: T, device: torch.device, *names: str) -> T:
    """Return a frozen dataclass with the tensors of these names on a device; the value itself if they are there.

    The copy is not constructed anew, because that would check its numbers again, for which a GPU must be waited for.
    """
    if all(getattr(value, name).device == device for name in names):
        return value
    moved = copy.copy(value)
    for name in names:
        object.__setattr__(moved, name, getattr(value, name).to(device))
    return moved


def precise(states: Tensor) -> Tensor:
    """Return states in float32, or in their own precision if that is higher."""
    return states.to(torch.promote_types(states.dtype, torch.float32))
