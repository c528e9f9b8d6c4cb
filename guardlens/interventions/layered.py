"""Tensors with one entry per layer, of which edits and gates are made."""

from typing import Any

import torch
from torch import Tensor

from guardlens.errors import InterventionError, MismatchError, NumericsError, require_type


def require_factors(label: str, layers: tuple[int, ...] | None, **factors: Any) -> None:
    """Refuse factors that are no tensors with one index per layer first, or that are not finite.

    Raises:
        InterventionError, MismatchError, NumericsError: As said.
    """
    number = 1 if layers is None else len(layers)
    for name, factor in factors.items():
        require_type(factor, Tensor, InterventionError, f"make {name} a tensor")
        if not factor.is_floating_point():
            raise InterventionError(f"{name} of {factor.dtype} in {label}", "floating-point numbers", f"say {name}.float()")
        if factor.ndim == 0 or len(factor) != number:
            raise MismatchError(f"{name} of shape {tuple(factor.shape)} in {label}", f"{number} on the first axis", "give one per layer")
        if not torch.isfinite(factor).all():
            raise NumericsError(f"NaN or infinity in the {name} of {label}", "finite numbers", "look at what it was made of")


def precise(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))
