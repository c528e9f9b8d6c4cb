"""Whose weights are these?"""

import torch
from torch import Tensor, nn

from guardlens.storage import digest


def fingerprint(hf: nn.Module) -> str:
    """A digest of the weights: names, shapes and 64 values of each parameter. Quick for any size, and changes with any training."""
    parts = []
    for name, parameter in sorted(hf.named_parameters()):
        flat = (_offloaded(hf, name) if parameter.is_meta else parameter.detach()).flatten()
        count = min(64, flat.numel())
        # In integers: float32 can't hold the places of a large embedding.
        picked = flat[torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(1, count - 1)]
        parts += [f"{name}{tuple(parameter.shape)}".encode(), picked.float().cpu().numpy().tobytes()]
    return digest(*parts)


def _offloaded(hf: nn.Module, name: str) -> Tensor:
    """A parameter that accelerate keeps in memory or on disk until its module runs; nothing of one that has no values at all."""
    owner, _, own = name.rpartition(".")
    kept = getattr(getattr(hf.get_submodule(owner), "_hf_hook", None), "weights_map", None)
    return torch.empty(0) if kept is None else kept[own]
