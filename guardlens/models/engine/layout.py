"""How lanes lie on the rows of a batch. Index algebra only: no model, no edits."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from guardlens.errors import InterventionError

HOLE = -1
"""The lane of a physical token that belongs to none, and the place of a token that is nowhere."""


class Placement(NamedTuple):
    """Places in a tensor `row width d_model`, and the query that each belongs to."""

    rows: Int[Tensor, "state"]
    columns: Int[Tensor, "state"]
    queries: Int[Tensor, "state"]

    def to(self, device: torch.device) -> "Placement":
        """The same places with indices on another device: the layers of a large model may lie on several."""
        return Placement(*(index.to(device) for index in self))


@dataclass(frozen=True, eq=False)
class Layout:
    """Which query, column and lane each physical token is: how several interventions share one forward pass.

    A lane is one intervention. A plain run has one lane; tiles repeat the batch, lane by lane; branches repeat only the ends of the
    prompts, which continue from their KV cache.

    Attributes:
        name: `"plain"`, `"tile"` or `"branch"`, which a result reports.
        lanes: The number of interventions.
        query: The query of each physical token.
        column: The column of the batch that it is a copy of.
        lane: The lane that it belongs to; `HOLE` for padding.
    """

    name: str
    lanes: int
    query: Int[Tensor, "row width"]
    column: Int[Tensor, "row width"]
    lane: Int[Tensor, "row width"]

    @classmethod
    def tile(cls, queries: int, width: int, lanes: int, device: torch.device | str = "cpu", start: int = 0) -> "Layout":
        """`lanes` copies of the batch from column `start` on, stacked along the rows. A single lane is the plain layout."""
        rows = torch.arange(queries * lanes, device=device)[:, None]
        columns = torch.arange(start, width, device=device)
        shape = (len(rows), len(columns))
        name = "plain" if lanes == 1 else "tile"
        return cls(name, lanes, (rows % queries).expand(shape), columns.expand(shape), (rows // queries).expand(shape))

    @classmethod
    def plain(cls, mask: Bool[Tensor, "query seq"]) -> "Layout":
        """The batch as it is, in one lane."""
        queries, width = mask.shape
        return cls.tile(queries, width, lanes=1, device=mask.device)

    @classmethod
    def continuations(cls, ends: Bool[Tensor, "query seq"], row: Int[Tensor, "query"], lanes: Sequence[int]) -> "Layout":
        """A copy of the prompts' ends for each lane, side by side; the tokens before them are in the KV cache.

        Args:
            ends: The tokens of the ends.
            row: The row of the KV cache that each query is in, and so the row of its ends.
            lanes: The lanes, in the order in which they lie in a row.
        """
        query, column = ends.nonzero(as_tuple=True)
        device = ends.device
        lane = torch.tensor(lanes, device=device).repeat_interleave(len(query))
        query = query.repeat(len(lanes))
        column = column.repeat(len(lanes))
        order = row[query].argsort(stable=True)
        rows = row[query][order]
        sizes = torch.bincount(row[query], minlength=int(row.max()) + 1)
        places = torch.arange(len(order), device=device) - (sizes.cumsum(0) - sizes)[rows]

        def placed(values: Int[Tensor, "token"], elsewhere: int) -> Int[Tensor, "row width"]:
            blank = torch.full((len(sizes), int(sizes.max())), elsewhere, device=device)
            return blank.index_put((rows, places), values[order])

        last = ends.shape[1] - 1
        return cls("plain" if len(lanes) == 1 else "branch", len(lanes), placed(query, 0), placed(column, last), placed(lane, HOLE))

    def gather(self, values: Shaped[Tensor, "query seq"]) -> Shaped[Tensor, "row width"]:
        """The batch's values at the physical tokens."""
        return values[self.query, self.column]

    def spread(self, inputs: Mapping[str, Tensor], packed: Collection[str] = ()) -> dict[str, Tensor]:
        """The batch's inputs, repeated for all lanes along the rows, or along the last axis for those that are `packed`.

        One lane leaves them untouched.
        """
        if self.lanes == 1:
            return dict(inputs)
        return {name: torch.cat([value] * self.lanes, dim=-1 if name in packed else 0) for name, value in inputs.items()}

    def find(self, chosen: Bool[Tensor, "query seq"]) -> tuple[Placement, ...]:
        """Where each lane has the tokens chosen in the batch, ordered by query, then column.

        Raises:
            InterventionError: Some of them are in the KV cache, so that this layout does not compute them.
        """
        rows, columns = (self.gather(chosen) & (self.lane != HOLE)).nonzero(as_tuple=True)
        number = int(chosen.sum())
        if len(rows) != self.lanes * number:
            raise InterventionError(
                f"{number} chosen tokens of which {len(rows) // self.lanes} are computed in the layout {self.name!r}",
                "tokens that are all computed",
                'choose layout="tile"',
            )
        order = self.lane[rows, columns].argsort(stable=True)
        by_lane = (index[order].unflatten(0, (self.lanes, number)) for index in (rows, columns, self.query[rows, columns]))
        return tuple(Placement(*places) for places in zip(*by_lane, strict=True))

    def decoding(self, lane: int, new: int = 1) -> Placement:
        """Where a lane has its `new` newest tokens while decoding: the last columns, ordered by query, then column."""
        rows = (self.lane[:, 0] == lane).nonzero().flatten().repeat_interleave(new)
        columns = torch.arange(-new, 0, device=rows.device).repeat(len(rows) // new)
        return Placement(rows, columns, self.query[rows, 0])
