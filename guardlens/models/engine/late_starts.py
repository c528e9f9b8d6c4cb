"""Layers that run only on the branches that have begun, whatever else a family gives to its layers."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from guardlens.models.engine.layout import Layout
from guardlens.models.engine.replaced_forwards import argument_names, replaced


@dataclass(frozen=True, eq=False)
class Begun:
    """The part of each row that has begun.

    Attributes:
        width: The number of columns that have begun; they come first.
        whole: The number of all columns.
        source: For each token, itself if it has begun, else the same token of the first lane.
    """

    width: int
    whole: int
    source: Int[Tensor, "row whole"]

    def cut(self, name: str, value: Any) -> Any:
        """An argument of a layer for these columns alone. What has no axis of columns stays as it is."""
        if isinstance(value, tuple | list):
            return type(value)(self.cut(name, each) for each in value)
        if isinstance(value, dict):
            return {key: self.cut(name, each) for key, each in value.items()}
        if not isinstance(value, Tensor):
            return value
        if name == "attention_mask":
            return value[..., : self.width, : value.shape[-1] - self.whole + self.width]
        has_features = (value.is_floating_point() or value.is_complex()) and name != "position_ids"
        axis = -2 if has_features else -1
        has_columns = value.ndim >= -axis and value.shape[axis] == self.whole
        return value.narrow(axis, 0, self.width) if has_columns else value

    def complete(self, states: Tensor) -> Tensor:
        """The states of all columns, from those of the columns that have begun."""
        source = self.source.to(states.device)
        rows = torch.arange(len(source), device=states.device)[:, None]
        return states[..., rows, source, :]


def late_starts(blocks: Sequence[nn.Module], layout: Layout, starts: Sequence[int]) -> AbstractContextManager[None]:
    """Within this context, each layer runs on the lanes that have begun, and the others are copies of the first.

    Args:
        blocks: The layers.
        layout: Continuations.
        starts: The first layer of each lane, in the order in which the lanes lie in a row: it never falls, and the first is 0.
    """
    whole = layout.lane.shape[1]
    column = torch.arange(whole, device=layout.lane.device)
    tokens = (layout.lane == layout.lane[:, :1]).sum(1)
    first_lane = column % tokens[:, None]
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for layer, block in enumerate(blocks):
        width = sum(start <= layer for start in starts) * whole // len(starts)
        if width < whole:
            begun = Begun(width, whole, torch.where(column < width, column, first_lane))
            forwards[block] = partial(_of_begun, begun, argument_names(type(block)), block.forward)
    return replaced(forwards)


def _of_begun(begun: Begun, names: Sequence[str], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    by_place = (begun.cut(name, value) for name, value in zip(names, args, strict=False))
    output = forward(*by_place, **{name: begun.cut(name, value) for name, value in kwargs.items()})
    if isinstance(output, tuple):
        return begun.complete(output[0]), *output[1:]
    return begun.complete(output)
