"""A batch of prompts as tensors, and how lanes (variants of a run) lie on its rows. Index algebra only: no model, no edits."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from guardlens.data.presentations import Presentation
from guardlens.data.queries import Query
from guardlens.errors import InterventionError, SiteError, require_type
from guardlens.hooks import Positions


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts of one presentation, ready for the model. It knows no lanes.

    Attributes:
        queries: The queries, in the order of the rows.
        presentation: How they are shown.
        inputs: What the Hugging Face model takes (input ids, mask, pixel values, ...).
        mask: Real tokens (not padding).
        image: Tokens whose embedding comes from an image.
        instruction: Tokens of what the user says: the query's text, with the words that a presentation puts around it.
        pictures: Digest of each prompt's images, by which prompts beside the same picture are known; empty where nobody asked.
        answered: How many of the last columns are an answer that is put into the model's mouth, behind the prompts.
        words: The tokenizer that made them; None where it is not known.
    """

    queries: tuple[Query, ...]
    presentation: Presentation
    inputs: Mapping[str, Tensor]
    mask: Bool[Tensor, "query seq"]
    image: Bool[Tensor, "query seq"]
    instruction: Bool[Tensor, "query seq"]
    pictures: tuple[str, ...] = ()
    answered: int = 0
    words: Any = field(default=None, repr=False)

    @cached_property
    def prompt(self) -> Bool[Tensor, "query seq"]:
        """Tokens of the prompts: neither padding nor an answer."""
        prompt = self.mask.clone()
        prompt[:, prompt.shape[1] - self.answered :] = False
        return prompt

    @property
    def answer(self) -> Bool[Tensor, "query seq"]:
        """Tokens of the answers."""
        return self.mask & ~self.prompt

    @property
    def beside_image(self) -> bool:
        """Whether some prompt shows an image."""
        return bool(self.image.any())

    @property
    def padded_right(self) -> bool:
        """Whether some prompt ends in padding."""
        return not bool(self.mask[:, -1 - self.answered].all())

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

    def __repr__(self) -> str:
        answers = f", answers of {self.answered} tokens" if self.answered else ""
        return f"Batch({len(self.queries)} prompts, {self.presentation.name!r}, {self.mask.shape[1]} tokens wide{answers})"

    def answering(self, tokens: Int[Tensor, "query new"]) -> "Batch":
        """The same prompts with an answer behind each, as if the model had given it. Rows of unlike length may end in any token.

        Raises:
            InterventionError: A batch padded on the right.
        """
        if self.padded_right:
            raise InterventionError("a batch padded on the right", "padding on the left for answers", "make it with padding_side='left'")
        (rows, width), told = self.mask.shape, "hand in one row of ids per prompt, as run.tokens[lane]"
        require_type(tokens, Tensor, InterventionError, told)
        if tokens.ndim != 2 or len(tokens) != rows or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise InterventionError(f"answers of shape {tuple(tokens.shape)} in {tokens.dtype}", f"whole numbers in {rows} rows", told)
        if (tokens < 0).any():
            raise InterventionError(f"the token {int(tokens.min())} in an answer", "ids from 0 up", told)
        new = tokens.shape[1]
        blank = self.mask.new_zeros(rows, new)
        added = {"input_ids": tokens.to(self.mask.device), "attention_mask": blank.long() + 1}
        inputs = dict(self.inputs)
        for name, value in self.inputs.items():
            if value.shape[-1:] == (width,) and value.shape[-2:-1] == (rows,):
                more = added[name] if name in added else blank.long()
                if name == "position_ids":
                    more = value[..., -1:] + 1 + torch.arange(new, device=value.device)
                inputs[name] = torch.cat([value, more.to(value)], dim=-1)
        masks = {name: torch.cat([getattr(self, name), blank], dim=1) for name in ("image", "instruction")}
        return replace(self, inputs=inputs, mask=torch.cat([self.mask, ~blank], dim=1), answered=self.answered + new, **masks)

    def select(self, positions: Positions) -> Bool[Tensor, "query seq"]:
        """The tokens that `positions` names, padding never among them.

        Raises:
            SiteError: A query has no token there.
        """
        chosen = self._chosen(positions) & self.prompt
        empty = (~chosen.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise SiteError(
                f"no token at positions {positions!r} in query {self.queries[empty[0]].id!r} (presentation {self.presentation.name!r})",
                "at least one in every query",
                "use a presentation with an image for 'image', or other positions",
            )
        return chosen

    def _chosen(self, positions: Positions) -> Bool[Tensor, "query seq"]:
        match positions:
            case "last":
                return self.prompt.flip(1).cumsum(1).flip(1) == 1
            case "all":
                return self.prompt
            case "image":
                return self.image
            case "instruction":
                return self.instruction
            case "post_instruction":
                return ~self.instruction.flip(1).cumsum(1).flip(1).bool() & self.instruction.cumsum(1).bool()
            case (start, stop):
                index, length = self.prompt.cumsum(1) - 1, self.prompt.sum(1, keepdim=True)
                low = 0 if start is None else start if start >= 0 else length + start
                high = length if stop is None else stop if stop >= 0 else length + stop
                return (index >= low) & (index < high)
        raise SiteError(f"the positions {positions!r}", "names or a range", "see guardlens.hooks.POSITIONS")


HOLE = -1
"""The lane of a physical token that belongs to none, and the place of a token that is nowhere."""


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
    """Which query, column and lane each physical token is: how several interventions share one forward.

    A lane is one intervention. A plain run has one lane; a tile repeats the batch, lane by lane; branches repeat the ends of the prompts
    alone, behind what is cached of the prompts.

    Attributes:
        name: `"plain"`, `"tile"` or `"branch"`: what a result says about how it was computed.
        lanes: How many interventions ride.
        query: The query of each physical token.
        column: The column of the batch that it is a copy of.
        lane: The lane that it belongs to.
    """

    name: str
    lanes: int
    query: Int[Tensor, "row width"]
    column: Int[Tensor, "row width"]
    lane: Int[Tensor, "row width"]

    @classmethod
    def tile(cls, queries: int, width: int, lanes: int, device: torch.device | str = "cpu", start: int = 0) -> "Layout":
        """`lanes` copies of the batch, from a column on, below each other; a single lane is the plain layout."""
        rows, columns = torch.arange(queries * lanes, device=device)[:, None], torch.arange(start, width, device=device)
        shape = len(rows), len(columns)
        name = "plain" if lanes == 1 else "tile"
        return cls(name, lanes, (rows % queries).expand(shape), columns.expand(shape), (rows // queries).expand(shape))

    @classmethod
    def tails(cls, tail: Bool[Tensor, "query seq"], row: Int[Tensor, "query"], lanes: int) -> "Layout":
        """`lanes` copies of the prompts' ends, beside each other; what comes before them is cached.

        Args:
            tail: The tokens of the ends.
            row: The row of the cache in which each query's beginning is, and so its end.
            lanes: How many copies.
        """
        (query, column), device = tail.nonzero(as_tuple=True), tail.device
        lane = torch.arange(lanes, device=device).repeat_interleave(len(query))
        query, column = query.repeat(lanes), column.repeat(lanes)
        order = row[query].argsort(stable=True)
        rows, sizes = row[query][order], torch.bincount(row[query], minlength=int(row.max()) + 1)
        places = torch.arange(len(order), device=device) - (sizes.cumsum(0) - sizes)[rows]

        def placed(values: Int[Tensor, "token"], elsewhere: int) -> Int[Tensor, "row width"]:
            blank = torch.full((len(sizes), int(sizes.max())), elsewhere, device=device)
            return blank.index_put((rows, places), values[order])

        last = tail.shape[1] - 1
        return cls("plain" if lanes == 1 else "branch", lanes, placed(query, 0), placed(column, last), placed(lane, HOLE))

    def gather(self, values: Shaped[Tensor, "query seq"]) -> Shaped[Tensor, "row width"]:
        """The batch's values at the physical tokens."""
        return values[self.query, self.column]

    def spread(self, inputs: Mapping[str, Tensor], packed: Collection[str] = ()) -> dict[str, Tensor]:
        """The batch's inputs for all rows; those that are `packed` lie side by side in their last axis. One lane leaves them untouched."""
        if self.lanes == 1:
            return dict(inputs)
        return {name: torch.cat([value] * self.lanes, dim=-1 if name in packed else 0) for name, value in inputs.items()}

    def find(self, chosen: Bool[Tensor, "query seq"]) -> tuple[Placement, ...]:
        """Where each lane has the tokens chosen in the batch, ordered by query, then column.

        Raises:
            InterventionError: Not all of them are there: some are cached.
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
        """Where lane `lane` has its `new` newest tokens during decoding: the last columns, ordered by query, then column."""
        rows = (self.lane[:, 0] == lane).nonzero().flatten().repeat_interleave(new)
        columns = torch.arange(-new, 0, device=rows.device).repeat(len(rows) // new)
        return Placement(rows, columns, self.query[rows, 0])
