"""Keys and values that are computed once, and what goes on behind them: the one idea of every cheap run.

Nothing that is done to a later token changes what came before it. So a `Stem` keeps the keys and values of prompts' tokens, and *tails*
go on behind it: copies of the prompts' ends, one per intervention, of which each sees what the model itself would let it see of its own
prompt and of its own copy, and nothing of the others. Copies of the last token alone are *branches*. What many prompts begin with alike is
a `Prefix`: there, the tails are all that differs. `Prefill` is prompts of which everything is kept.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from guardlens.models.engine.batch import HOLE, Batch, Layout

Rule = dict[str, Bool[Tensor, "query new seq"]]
"""Which tokens of its own prompt each of the newest tokens sees; by type of layer where a family has several, else under an empty name."""


@dataclass(frozen=True, eq=False)
class Stem:
    """Tokens of a batch's prompts whose keys and values are kept.

    Attributes:
        batch: The prompts.
        cache: Keys and values.
        row: The row of the cache that each prompt is in: one for all, or one each.
        keys: The column of the cache that each token's keys are in; `HOLE` where there are none.
        positions: What the decoder is told of each token's position, in as many dimensions as the family counts.
        shared: Whether the prompts go on behind a common beginning.
    """

    batch: Batch
    cache: Any
    row: Int[Tensor, "query"]
    keys: Int[Tensor, "query seq"]
    positions: Num[Tensor, "*dimension query seq"]
    shared: bool = False

    @property
    def bytes(self) -> int:
        """What the keys and values take."""
        tensors = [tensor for layer in getattr(self.cache, "layers", ()) for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.nbytes for tensor in tensors)

    def answering(self, tokens: Int[Tensor, "query new"]) -> "Stem":
        """The same tokens, of prompts with an answer behind each."""
        batch = self.batch.answering(tokens)
        new = torch.arange(1, tokens.shape[1] + 1, device=self.positions.device)
        keys = torch.cat([self.keys, self.keys.new_full((len(self.keys), len(new)), HOLE)], dim=1)
        positions = torch.cat([self.positions, self.positions[..., -1:] + new], dim=-1)
        return replace(self, batch=batch, keys=keys, positions=positions)

    def tails(self, tail: Bool[Tensor, "query seq"], lanes: int) -> Layout:
        """Copies of these ends of the prompts, in the rows that their beginnings are in."""
        return Layout.tails(tail, self.row, lanes)

    def inputs(self, layout: Layout, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """What the decoder takes for tails."""
        first = int(layout.column[layout.lane != HOLE].min())
        rule = rule_of(config, self.batch.mask, self.batch.mask.shape[1] - first, dtype)
        masks = {kind: _written(self._visible(layout, rows, first), dtype) for kind, rows in rule.items()}
        return {
            "input_ids": layout.gather(self.batch.inputs["input_ids"]),
            "attention_mask": masks.get("", masks),
            "position_ids": self.positions[..., layout.query, layout.column],
            "past_key_values": self.cache,
            "use_cache": True,
        }

    def _visible(self, layout: Layout, rule: Bool[Tensor, "query new seq"], first: int) -> Bool[Tensor, "row width key"]:
        """What each physical token sees of the cache and, behind that, of those beside it: what its original sees of its own prompt.

        Of the cached tokens only those before the tails: the tails bring their own copies of the rest.
        """
        width = max(layer.get_seq_length() for layer in self.cache.layers)
        seen = rule[layout.query, layout.column - first]
        real = layout.lane != HOLE
        begins = torch.full_like(self.row, self.keys.shape[1])
        begins = begins.scatter_reduce(0, layout.query[real], layout.column[real], "amin")
        columns = torch.arange(self.keys.shape[1], device=self.keys.device)
        kept = torch.where(columns < begins[:, None], self.keys, HOLE)[layout.query] % (width + 1)  # holes go to a column more
        cached = torch.zeros(*layout.lane.shape, width + 1, dtype=torch.bool, device=seen.device).scatter(2, kept, seen)[..., :width]
        alike = (layout.query[:, :, None] == layout.query[:, None]) & (layout.lane[:, :, None] == layout.lane[:, None])
        beside = seen.gather(2, layout.column[:, None].expand(-1, seen.shape[1], -1)) & alike & real[:, None]
        return torch.cat([cached, beside], dim=2)

    def grown(self, layout: Layout) -> "Stem":
        """After a run of single tails, whose keys and values are in the cache now."""
        behind = max(layer.get_seq_length() for layer in self.cache.layers) - layout.lane.shape[1]
        rows, places = (layout.lane == 0).nonzero(as_tuple=True)
        keys = self.keys.index_put((layout.query[rows, places], layout.column[rows, places]), behind + places)
        return replace(self, keys=keys)

    def unpacked(self, queries: Int[Tensor, "row"]) -> Any:
        """A cache of the model's own form, with a row for each of these queries and its keys in the prompt's columns but the last."""
        kept = rows_of(self.cache)
        rows, columns = self.row[queries][:, None], self.keys[queries, :-1].clamp_min(0)
        for layer in kept.layers:
            if layer.is_initialized:  # those that share another layer's keys never are
                layer.keys, layer.values = (tensor.transpose(1, 2)[rows, columns].transpose(1, 2) for tensor in (layer.keys, layer.values))
        return kept

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Leaves the keys and values as they were, whatever a run adds to them, also one that fails half way."""
        lengths = [layer.get_seq_length() for layer in self.cache.layers]
        try:
            yield
        finally:
            for layer, length in zip(self.cache.layers, lengths, strict=True):
                if layer.get_seq_length() > length:
                    layer.crop(length - layer.get_seq_length())


@dataclass(frozen=True, eq=False)
class Prefill:
    """Prompts whose keys and values are kept, so that what is asked of their last tokens costs those tokens alone.

    Attributes:
        batch: The prompts.
        stem: Their keys and values; None where nothing can go on behind them.
        logits: The unedited run's, at the last token.
        held: States of other presentations' runs that have been asked for.
        flaw: Why nothing can go on behind them; empty if it can.
        models: The model that computed them, and the LLM beside it; then how their modules stood, and the hooks on them.
    """

    batch: Batch
    stem: Stem | None
    logits: Float[Tensor, "query vocab"]
    held: dict[Any, Tensor] = field(default_factory=dict)
    flaw: str = ""
    models: tuple[str, ...] = ("", "")

    def __len__(self) -> int:
        return len(self.batch.queries)

    def __repr__(self) -> str:
        return f"Prefill({self.batch!r}, {self.flaw or f'{self.bytes / 2**20:.1f} MiB'})"

    @property
    def bytes(self) -> int:
        """What the keys and values take."""
        return 0 if self.stem is None else self.stem.bytes

    def answering(self, tokens: Int[Tensor, "query new"]) -> "Prefill":
        """The same prompts with an answer behind each, as if the model had given it; see `Batch.answering`."""
        stem = None if self.stem is None else self.stem.answering(tokens)
        batch = self.batch.answering(tokens) if stem is None else stem.batch
        return replace(self, batch=batch, stem=stem)


@dataclass(frozen=True, eq=False)
class Prefix:
    """What prompts of one presentation have in common from their first token on.

    Attributes:
        ids: Its tokens.
        picture: Digest of the images in it.
        cache: Keys and values, in one row.
        positions: Of its tokens and of the one that follows.
        model: The model that computed it.
    """

    ids: Int[Tensor, "column"]
    picture: str
    cache: Any
    positions: Num[Tensor, "*dimension 1 column+1"]
    model: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Prefix({len(self)} tokens)"

    def begins(self, batch: Batch) -> "Prefix | None":
        """As much of it as all prompts of a batch begin with; None if that is nothing, or less than its images."""
        length = min(len(self), batch.common_start)
        first = batch.inputs["input_ids"][0][batch.mask[0]][:length]
        same = int((first == self.ids[:length]).long().cumprod(0).sum())
        beyond = bool((batch.image & (batch.mask.cumsum(1) > same)).any())
        if not same or beyond or batch.pictures[:1] != (self.picture,):
            return None
        return self if same == len(self) else self.cut(same)

    def cut(self, length: int) -> "Prefix":
        """Its first tokens."""
        cache = rows_of(self.cache, 1)
        cache.crop(length - len(self))
        return replace(self, ids=self.ids[:length], cache=cache, positions=self.positions[..., : length + 1])

    def stem(self, batch: Batch) -> Stem:
        """As the beginning of a batch's prompts, padded on the left. The prefix itself stays as it is.

        What follows lies beside each other in as few rows as hold no more of it than of the prefix: in a row, each token's attention is
        worked out for all others, so that longer rows would cost more than they save.
        """
        index = batch.mask.cumsum(1) - 1
        longest = max(1, int((index[:, -1] + 1 - len(self)).max()))
        row = torch.arange(len(index), device=index.device) // max(1, max(len(self), SHORT) // longest)
        keys = torch.where(batch.mask & (index < len(self)), index, HOLE)
        known, beyond = index.clamp(0, len(self)), (index - len(self)).clamp_min(0)
        positions = self.positions[..., 0, :][..., known] + beyond
        return Stem(batch, rows_of(self.cache, int(row[-1]) + 1), row, keys, positions, shared=True)

    def rest(self, batch: Batch) -> Bool[Tensor, "query seq"]:
        """What follows it in a batch's prompts."""
        return batch.mask & (batch.mask.cumsum(1) > len(self))


def answers_kind(batch: Batch, shared: bool) -> str:
    """What decides how answers count positions: whether prompts share a beginning, and whether they are padded."""
    return f"answers{' behind a prefix' if shared else ''}{'' if bool(batch.mask.all()) else ', padded'}"


SHORT = 256
"""Tokens that a row behind a prefix may always hold."""


def rows_of(cache: Any, rows: int | None = None) -> Any:
    """A cache with the same keys and values, in so many rows if it has one. What is added to it later leaves the given one as it is.

    The rows are views: what follows is joined to them in new tensors anyway.
    """
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in found.layers:
        if rows is not None and layer.is_initialized:  # those that share another layer's keys never are
            layer.keys, layer.values = (tensor.expand(rows, *tensor.shape[1:]) for tensor in (layer.keys, layer.values))
    return found


def rule_of(config: Any, mask: Bool[Tensor, "query seq"], new: int, dtype: torch.dtype) -> Rule:
    """What the newest tokens of prompts see of them, by the model's own rules (windows, chunks).

    Args:
        config: Of the language model.
        mask: Real tokens.
        new: How many last columns are asked about.
        dtype: Of the model.
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
    whole: Any = create_masks_for_generate(eager, inputs, mask.long(), before)
    return {kind: written[:, 0] == 0 for kind, written in (whole.items() if isinstance(whole, dict) else [("", whole)])}


def _written(visible: Bool[Tensor, "row width key"], dtype: torch.dtype) -> Float[Tensor, "row 1 width key"]:
    """A mask in the form that every attention adds: 0 where a token is seen."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None]


@contextmanager
def positions(decoder: nn.Module) -> Iterator[dict[str, Any]]:
    """The positions that the decoder is given in the forwards inside."""
    found: dict[str, Any] = {}
    handle = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: found.update(given=kwargs.get("position_ids")), with_kwargs=True
    )
    try:
        yield found
    finally:
        handle.remove()


def stem_of(decoder: Any, batch: Batch, call: Callable[[dict[str, Any]], Tensor]) -> tuple[Stem, Float[Tensor, "query vocab"]]:
    """Run prompts, padded on the left, as they are, and keep their keys and values; also gives the logits at their last tokens.

    Args:
        decoder: The language model's stack of blocks.
        batch: The prompts.
        call: Runs the model on inputs and gives its logits at the last token.
    """
    from transformers import DynamicCache

    cache = DynamicCache()  # without a config, so that layers with a window forget nothing
    with positions(decoder) as found:
        logits = call({**batch.inputs, "past_key_values": cache, "use_cache": True})
    columns = torch.arange(batch.mask.shape[1], device=batch.mask.device).expand_as(batch.mask)
    given = columns if found["given"] is None else found["given"]
    at = given.expand(*given.shape[:-2], *batch.mask.shape)
    return Stem(batch, cache, torch.arange(len(columns), device=columns.device), torch.where(batch.mask, columns, HOLE), at), logits


def prefix_of(decoder: Any, batch: Batch, length: int, call: Callable[[dict[str, Any]], Tensor]) -> Prefix:
    """The first tokens of one prompt, computed; arguments as those of `stem_of`."""
    stem, _ = stem_of(decoder, batch, call)
    stem.cache.crop(length - batch.mask.shape[1])
    return Prefix(batch.inputs["input_ids"][0, :length], batch.pictures[0], stem.cache, stem.positions[..., :1, : length + 1])
