"""Caches of transformers that share their keys and values with another one."""

import copy
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


def read_only(past: Any) -> Any:
    """A cache with the same keys and values, to which a forward pass adds nothing: new ones are appended for the pass alone.

    So memory holds the extended keys of one layer at a time. A single row serves all rows of the forward pass. Layers that do more than to
    append stay as they are.
    """
    from transformers.cache_utils import DynamicLayer

    found = view_of(past)
    for layer in found.layers:
        if type(layer) is DynamicLayer and layer.is_initialized:
            layer.update = partial(_appended, layer.keys, layer.values)
    return found


def _appended(keys: Any, values: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    rows = len(key_states)
    return (
        torch.cat([keys.expand(rows, -1, -1, -1), key_states], dim=-2),
        torch.cat([values.expand(rows, -1, -1, -1), value_states], dim=-2),
    )


def view_of(past: Any, rows: int | None = None) -> Any:
    """A cache with the same keys and values, repeated along `rows` rows if a number is given.

    The keys and values are views. What is added later is concatenated in new tensors, so the original stays as it is.
    """
    found = copy.copy(past)
    found.layers = [copy.copy(layer) for layer in past.layers]
    for layer in found.layers:
        if rows is not None and layer.is_initialized:  # layers that share another layer's keys never are
            layer.keys, layer.values = (tensor.expand(rows, *tensor.shape[1:]) for tensor in (layer.keys, layer.values))
    return found


def rows_of(past: Any, rows: Int[Tensor, "row"]) -> Any:
    """A cache with copies of some rows."""
    found = view_of(past)
    for layer in found.layers:
        if layer.is_initialized:  # layers that share another layer's keys never are
            chosen = rows.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[chosen], layer.values[chosen]
    return found
