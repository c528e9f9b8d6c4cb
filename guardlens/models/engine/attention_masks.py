"""Attention masks by the model's own rules, in the form that every attention takes."""

import copy
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Visibility = dict[str, Bool[Tensor, "query new seq"]]
"""Which tokens of its own prompt each of the newest tokens attends to, by layer type if a family has several, else under an empty name."""


def visibility_of(config: Any, mask: Bool[Tensor, "query seq"], new: int, dtype: torch.dtype) -> Visibility:
    """What the newest tokens of prompts attend to, by the model's own rules (sliding windows, chunks).

    Args:
        config: The language model's config.
        mask: Real tokens.
        new: How many last columns count as new.
        dtype: The model's dtype.
    """
    from transformers import DynamicCache
    from transformers.masking_utils import create_masks_for_generate

    eager = copy.copy(config)
    eager._attn_implementation = "eager"  # the one attention whose masks are always written out
    before = DynamicCache()
    if mask.shape[1] > new:
        blank = torch.zeros(1, 1, mask.shape[1] - new, 1, device=mask.device)  # only its length counts
        before.update(blank, blank, 0)
    inputs = torch.zeros(len(mask), new, 1, dtype=dtype, device=mask.device)
    masks: Any = create_masks_for_generate(eager, inputs, mask.long(), before)
    by_kind = masks if isinstance(masks, dict) else {"": masks}
    return {kind: additive[:, 0] == 0 for kind, additive in by_kind.items()}


def additive(visible: Bool[Tensor, "row width key"], dtype: torch.dtype) -> Float[Tensor, "row 1 width key"]:
    """A mask in the form that every attention adds to its scores: 0 for a visible key."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None]
