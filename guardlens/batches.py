"""A batch of prompts as tensors, and how lanes (variants of a run) lie on its rows. Index algebra only: no model, no edits."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from guardlens.errors import PlanError, SiteError
from guardlens.queries import Presentation, Query
from guardlens.sites import Positions


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts of one presentation, ready for the model. It knows no lanes.

    Attributes:
        queries: The queries, in the order of the rows.
        presentation: How they are shown.
        inputs: What the Hugging Face model takes (input ids, mask, pixel values, ...).
        mask: Real tokens (not padding).
        image: Tokens whose embedding comes from an image.
        instruction: Tokens of the query's own text.
        pictures: Digest of each prompt's images, by which prompts beside the same picture are known; empty where nobody asked.
    """

    queries: tuple[Query, ...]
    presentation: Presentation
    inputs: Mapping[str, Tensor]
    mask: Bool[Tensor, "query seq"]
    image: Bool[Tensor, "query seq"]
    instruction: Bool[Tensor, "query seq"]
    pictures: tuple[str, ...] = ()

    @property
    def beside_image(self) -> bool:
        """Whether some prompt shows an image."""
        return bool(self.image.any())

    @property
    def padded_right(self) -> bool:
        """Whether some row ends in padding."""
        return not bool(self.mask[:, -1].all())

    @cached_property
    def common_start(self) -> int:
        """How many first tokens all prompts share, images included; one token of each is left at least.

        It never ends inside an image, nor behind images that differ.
        """
        width, shortest = self.mask.shape[1], int(self.mask.sum(1).min())
        columns = width - self.mask.sum(1, keepdim=True) + torch.arange(width, device=self.mask.device)
        columns = (
            columns.clamp_max(width - 1) if not self.padded_right else torch.arange(width, device=self.mask.device).expand_as(self.mask)
        )
        ids, image = (values.gather(1, columns) for values in (self.inputs["input_ids"], self.image))
        shared = int((ids == ids[:1]).all(0)[: shortest - 1].long().cumprod(0).sum())
        alike = len(set(self.pictures)) == 1 and not image[:, shared:].any()
        return shared if alike or not image.any() else min(shared, int(image.any(0).long().argmax()))

    def select(self, positions: Positions) -> Bool[Tensor, "query seq"]:
        """The tokens that `positions` names, padding never among them.

        Raises:
            SiteError: A query has no token there.
        """
        chosen = self._chosen(positions) & self.mask
        empty = (~chosen.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise SiteError(
                f"no token at positions {positions!r} in query {self.queries[empty[0]].id!r} (presentation {self.presentation.name!r})",
                "at least one in every query",
                "use a presentation with an image for 'image', or other positions",
            )
        return chosen

    def _chosen(self, positions: Positions) -> Bool[Tensor, "query seq"]:
        from_right = self.mask.flip(1).cumsum(1).flip(1)
        match positions:
            case "last":
                return from_right == 1
            case "all":
                return self.mask
            case "image":
                return self.image
            case "instruction":
                return self.instruction
            case "post_instruction":
                return ~self.instruction.flip(1).cumsum(1).flip(1).bool() & self.instruction.cumsum(1).bool()
            case (start, stop):
                index, length = self.mask.cumsum(1) - 1, self.mask.sum(1, keepdim=True)
                low = 0 if start is None else start if start >= 0 else length + start
                high = length if stop is None else stop if stop >= 0 else length + stop
                return (index >= low) & (index < high)
        raise SiteError(f"the positions {positions!r}", "names or a range", "see guardlens.sites.POSITIONS")


HOLE = -1
"""The lane of a physical token that belongs to none."""


class Placement(NamedTuple):
    """Places in a tensor `row width d_model`, and whose they are."""

    rows: Int[Tensor, "state"]
    columns: Int[Tensor, "state"]
    queries: Int[Tensor, "state"]

    def to(self, device: torch.device) -> "Placement":
        """On another device: the blocks of a large model may lie on several."""
        return Placement(*(index.to(device) for index in self))


@dataclass(frozen=True, eq=False)
class Layout:
    """Which query, column and lane each physical token is: how several plans share one forward.

    A lane is one plan. A plain run has one lane; a tile repeats the batch, lane by lane; branches repeat the last token alone, lane by lane
    within each row, behind what is cached of the prompts.

    Attributes:
        name: `"plain"`, `"tile"` or `"branch"`: what a result says about how it was computed.
        lanes: How many plans ride.
        query: The query of each row.
        column: The column of the batch that each physical token is a copy of.
        lane: The lane that each physical token belongs to.
    """

    name: str
    lanes: int
    query: Int[Tensor, "row"]
    column: Int[Tensor, "row width"]
    lane: Int[Tensor, "row width"]

    @classmethod
    def tile(cls, queries: int, width: int, lanes: int, device: torch.device | str = "cpu") -> "Layout":
        """`lanes` full copies of the batch below each other; a single lane is the plain layout."""
        query = torch.arange(queries, device=device).repeat(lanes)
        column = torch.arange(width, device=device).expand(queries * lanes, width)
        lane = torch.arange(lanes, device=device).repeat_interleave(queries)[:, None].expand(-1, width)
        return cls("plain" if lanes == 1 else "tile", lanes, query, column, lane)

    @classmethod
    def branch(cls, queries: int, width: int, lanes: int, device: torch.device | str = "cpu") -> "Layout":
        """Copies of each prompt's last token beside each other, a lane each; the tokens before it are not there (they are cached)."""
        column = torch.full((queries, lanes), width - 1, device=device)
        return cls("branch", lanes, torch.arange(queries, device=device), column, torch.arange(lanes, device=device).expand(queries, -1))

    @classmethod
    def suffix(cls, mask: Bool[Tensor, "query seq"], start: int) -> "Layout":
        """What follows the first `start` tokens, which are cached, of prompts padded on the left. Here the holes are on the right."""
        lengths = mask.sum(1) - start
        here = torch.arange(int(lengths.max()), device=mask.device).expand(len(mask), -1)
        column = (here + mask.shape[1] - lengths[:, None]).clamp_max(mask.shape[1] - 1)
        lane = torch.where(here < lengths[:, None], 0, HOLE)
        return cls("plain", 1, torch.arange(len(mask), device=mask.device), column, lane)

    def covers(self, chosen: Bool[Tensor, "query seq"]) -> bool:
        """Whether every chosen token is there in lane 0."""
        return int((self.gather(chosen) & (self.lane == 0)).sum()) == int(chosen.sum())

    def gather(self, values: Shaped[Tensor, "query seq"]) -> Shaped[Tensor, "row width"]:
        """The batch's values at the physical tokens."""
        return values[self.query[:, None], self.column]

    def spread(self, inputs: Mapping[str, Tensor], packed: Collection[str] = ()) -> dict[str, Tensor]:
        """The batch's inputs for all rows; those that are `packed` lie side by side in their last axis. One lane leaves them untouched."""
        if self.lanes == 1:
            return dict(inputs)
        return {name: torch.cat([value] * self.lanes, dim=-1 if name in packed else 0) for name, value in inputs.items()}

    def find(self, lane: int, chosen: Bool[Tensor, "query seq"]) -> Placement:
        """Where lane `lane` has the tokens chosen in the batch, ordered by query, then column.

        Raises:
            PlanError: It has not all of them: some are cached, or shared with other lanes.
        """
        here = self.gather(chosen) & (self.lane == lane)
        rows, columns = here.nonzero(as_tuple=True)
        if len(rows) != int(chosen.sum()):
            raise PlanError(
                f"{int(chosen.sum())} chosen tokens of which {len(rows)} are computed in the layout {self.name!r}",
                "tokens that are all computed",
                'choose layout="tile"',
            )
        return Placement(rows, columns, self.query[rows])

    def decoding(self, lane: int, new: int = 1) -> Placement:
        """Where lane `lane` has its `new` newest tokens during decoding: the last columns, ordered by query, then column."""
        rows = (self.lane[:, 0] == lane).nonzero().flatten().repeat_interleave(new)
        columns = torch.arange(-new, 0, device=rows.device).repeat(len(rows) // new)
        return Placement(rows, columns, self.query[rows])
