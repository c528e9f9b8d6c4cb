"""KV caches of prompts, and how tokens continue from them: the one idea behind every cheap run.

In a causal model nothing that is done to a later token changes an earlier one. So a `KVCache` keeps the keys and values of prompts'
tokens, and *continuations* run after it: copies of the prompts' ends, one per lane, each of which attends to what the model would let
it attend to in its own prompt and lane, and to nothing of the others. A `Prefix` is the KV cache of what many prompts begin with; there, a
continuation is the rest of a prompt. A `Prefill` is a batch whose prompts are cached to the end.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from guardlens.errors import MismatchError
from guardlens.models.engine import limits
from guardlens.models.engine.attention_masks import additive, visibility_of
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.cache_layers import read_only, rows_of, view_of
from guardlens.models.engine.layout import HOLE, Layout


@dataclass(frozen=True, eq=False)
class KVCache:
    """The keys and values of tokens of a batch's prompts.

    Attributes:
        batch: The prompts.
        past: The keys and values, as a cache of transformers (`past_key_values`).
        row: The row of `past` that each prompt is in: rows of their own, or one that they share.
        column: The column of `past` that each token's keys are in; `HOLE` if they are not there.
        position_ids: The position of each token as the decoder is told, in as many dimensions as the family counts.
        shares_prefix: Whether the prompts continue from a common prefix.
    """

    batch: Batch
    past: Any
    row: Int[Tensor, "query"]
    column: Int[Tensor, "query seq"]
    position_ids: Num[Tensor, "*dimension query seq"]
    shares_prefix: bool = False

    @property
    def bytes(self) -> int:
        """The size of the keys and values."""
        layers = getattr(self.past, "layers", ())
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.nbytes for tensor in tensors)

    def answering(self, tokens: Int[Tensor, "query new"]) -> "KVCache":
        """The same keys and values, for prompts with an answer after each."""
        batch = self.batch.answering(tokens)
        new = torch.arange(1, tokens.shape[1] + 1, device=self.position_ids.device)
        uncached = self.column.new_full((len(self.column), len(new)), HOLE)
        column = torch.cat([self.column, uncached], dim=1)
        position_ids = torch.cat([self.position_ids, self.position_ids[..., -1:] + new], dim=-1)
        return replace(self, batch=batch, column=column, position_ids=position_ids)

    def of(self, queries: Int[Tensor, "chosen"]) -> "KVCache":
        """The KV cache of some of the prompts, with which they can be continued."""
        rows, row = self.row[queries].unique(return_inverse=True)
        position_ids = self.position_ids[..., queries, :]
        batch, past = self.batch.of(queries), rows_of(self.past, rows)
        return replace(self, batch=batch, past=past, row=row, column=self.column[queries], position_ids=position_ids)

    def continuations(self, ends: Bool[Tensor, "query seq"], lanes: Sequence[int]) -> Layout:
        """Copies of the prompts' ends, one per lane and in this order, in the rows of their cached beginnings."""
        return Layout.continuations(ends, self.row, lanes)

    def inputs(self, layout: Layout, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """The decoder's inputs for continuations."""
        first = int(layout.column[layout.lane != HOLE].min())
        visibility = visibility_of(config, self.batch.mask, self.batch.mask.shape[1] - first, dtype)
        masks = {kind: additive(self._visible(layout, seen, first), dtype) for kind, seen in visibility.items()}
        return {
            "input_ids": layout.gather(self.batch.inputs["input_ids"]),
            "attention_mask": masks.get("", masks),
            "position_ids": self.position_ids[..., layout.query, layout.column],
            "past_key_values": self.past,
            "use_cache": True,
        }

    def _visible(self, layout: Layout, own: Bool[Tensor, "query new seq"], first: int) -> Bool[Tensor, "row width key"]:
        """Which keys each physical token attends to: first the cached ones, then those computed beside it.

                        cached columns 0 ... width-1   |   tokens of this row
            a5, lane 0  x x x x .                      |   x .      a1 to a4 of its prompt, and itself
            a5, lane 1  x x x x .                      |   . x      not the copy in another lane

        Of the cached tokens of its prompt, it attends only to those before the continuation, which brings its own copies of the others.

        Args:
            layout: The continuations.
            own: What each token attends to in its own prompt, from the column `first` on.
            first: The first column of any continuation.
        """
        width = max(layer.get_seq_length() for layer in self.past.layers)
        seen = own[layout.query, layout.column - first]
        real = layout.lane != HOLE

        prompt_width = self.column.shape[1]
        starts = torch.full_like(self.row, prompt_width).scatter_reduce(0, layout.query[real], layout.column[real], "amin")
        is_before = torch.arange(prompt_width, device=self.column.device) < starts[:, None]
        column = torch.where(is_before, self.column, HOLE)[layout.query]
        column = column % (width + 1)  # tokens that are not cached go to one column more, which is then cut off
        blank = torch.zeros(*layout.lane.shape, width + 1, dtype=torch.bool, device=seen.device)
        cached = blank.scatter(2, column, seen)[..., :width]

        same_query = layout.query[:, :, None] == layout.query[:, None]
        same_lane = layout.lane[:, :, None] == layout.lane[:, None]
        of_its_prompt = seen.gather(2, layout.column[:, None].expand(-1, seen.shape[1], -1))
        beside = of_its_prompt & same_query & same_lane & real[:, None]
        return torch.cat([cached, beside], dim=2)

    def grown(self, layout: Layout) -> "KVCache":
        """The cache after a run of continuations in one lane, whose keys and values it then holds too."""
        before = max(layer.get_seq_length() for layer in self.past.layers) - layout.lane.shape[1]
        rows, places = (layout.lane == 0).nonzero(as_tuple=True)
        column = self.column.index_put((layout.query[rows, places], layout.column[rows, places]), before + places)
        return replace(self, column=column)

    def unpacked(self, queries: Int[Tensor, "row"]) -> Any:
        """A cache of transformers with a row for each of these queries, which holds the keys of the prompt's tokens but the last."""
        past = view_of(self.past)
        rows = self.row[queries][:, None]
        columns = self.column[queries, :-1].clamp_min(0)
        for layer in past.layers:
            if layer.is_initialized:  # layers that share another layer's keys never are
                layer.keys, layer.values = (tensor.transpose(1, 2)[rows, columns].transpose(1, 2) for tensor in (layer.keys, layer.values))
        return past

    @contextmanager
    def unchanged(self) -> Iterator["KVCache"]:
        """Yield the cache for runs that add nothing to it. What layers of other kinds add all the same is removed at the end."""
        lengths = [layer.get_seq_length() for layer in self.past.layers]
        try:
            yield replace(self, past=read_only(self.past))
        finally:
            for layer, length in zip(self.past.layers, lengths, strict=True):
                if layer.get_seq_length() > length:
                    layer.crop(length - layer.get_seq_length())


@dataclass(frozen=True, eq=False)
class Prefill:
    """A batch whose prompts were computed once, so that a question about their last tokens costs those tokens alone.

    Attributes:
        batch: The prompts.
        cache: Their KV cache; None if nothing can continue from it in this model.
        logits: The logits of the unedited run at the last token.
        held: Held states of other presentations' runs that interventions have asked for so far.
        flaw: Why nothing can continue from the KV cache; empty if it can.
        models: The model that computed them and the LLM beside it, the constants of their modules, and the hooks on them.
    """

    batch: Batch
    cache: KVCache | None
    logits: Float[Tensor, "query vocab"]
    held: dict[Any, Tensor] = field(default_factory=dict)
    flaw: str = ""
    models: tuple[str, ...] = ("", "")

    def __len__(self) -> int:
        return len(self.batch.queries)

    def __repr__(self) -> str:
        return f"Prefill({self.batch!r}, {self.flaw or f'{self.bytes / 2**20:.1f} MiB'})"

    @property
    def ids(self) -> tuple[str, str]:
        """The ids of the model and of the LLM beside it."""
        return self.models[0], self.models[1]

    @property
    def bytes(self) -> int:
        """The size of the keys and values."""
        return 0 if self.cache is None else self.cache.bytes

    def require_of(self, models: tuple[str, ...]) -> None:
        """Refuse prompts that were computed by other models than these, or before they were changed.

        Raises:
            MismatchError: The ids, the attributes of modules or the hooks differ.
        """
        if self.models == models:
            return
        ids = models[:2]
        is_changed = self.models[:2] == ids
        before = ", before an attribute or a hook of its modules was changed" if is_changed else ""
        raise MismatchError(f"prompts kept by {self.models[:2]}{before}", f"those of {ids}", "keep them anew with this model")

    def answering(self, tokens: Int[Tensor, "query new"]) -> "Prefill":
        """The prompts with an answer after each, as if the model had given it; see `Batch.answering`."""
        cache = None if self.cache is None else self.cache.answering(tokens)
        batch = self.batch.answering(tokens) if cache is None else cache.batch
        return replace(self, batch=batch, cache=cache)


@dataclass(frozen=True, eq=False)
class Prefix:
    """The KV cache of the tokens that prompts of one presentation begin with.

    Attributes:
        ids: The tokens.
        image_digest: The digest of the images among them.
        past: The keys and values, in one row.
        position_ids: The positions of its tokens and of the one that follows.
        model: The model that computed it.
    """

    ids: Int[Tensor, "column"]
    image_digest: str
    past: Any
    position_ids: Num[Tensor, "*dimension 1 column+1"]
    model: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Prefix({len(self)} tokens)"

    def require_of(self, model: str) -> None:
        """Refuse a prefix of another model.

        Raises:
            MismatchError: Another model computed it.
        """
        if self.model != model:
            raise MismatchError(f"a prefix of {self.model}", f"one of {model}", "share the prompts anew with this model")

    def begins(self, batch: Batch) -> "Prefix | None":
        """The longest part of this prefix that every prompt of a batch shares.

        None if they share nothing, or diverge before its images end.
        """
        length = min(len(self), batch.common_start)
        first = batch.inputs["input_ids"][0][batch.mask[0]][:length]
        same = int((first == self.ids[:length]).long().cumprod(0).sum())
        has_image_after = bool((batch.image & (batch.mask.cumsum(1) > same)).any())
        if not same or has_image_after or batch.image_digests[:1] != (self.image_digest,):
            return None
        return self if same == len(self) else self.cut(same)

    def cut(self, length: int) -> "Prefix":
        """The first `length` tokens of it."""
        past = view_of(self.past, 1)
        past.crop(length - len(self))
        return replace(self, ids=self.ids[:length], past=past, position_ids=self.position_ids[..., : length + 1])

    def cache(self, batch: Batch) -> KVCache:
        """The KV cache of a batch's prompts, padded on the left, of which only this prefix is computed. The prefix itself stays as it is.

        Continuations are packed into rows so that no row holds more continuation tokens than prefix tokens (or `PREFIX_ROW_TOKENS`).
        Attention is quadratic in a row, so packing more would cost more than it saves.
        """
        index = batch.mask.cumsum(1) - 1
        longest = max(1, int((index[:, -1] + 1 - len(self)).max()))
        prompts_per_row = max(1, max(len(self), limits.PREFIX_ROW_TOKENS) // longest)
        row = torch.arange(len(index), device=index.device) // prompts_per_row
        column = torch.where(batch.mask & (index < len(self)), index, HOLE)
        known = index.clamp(0, len(self))
        beyond = (index - len(self)).clamp_min(0)
        position_ids = self.position_ids[..., 0, :][..., known] + beyond
        return KVCache(batch, view_of(self.past, int(row[-1]) + 1), row, column, position_ids, shares_prefix=True)

    def rest(self, batch: Batch) -> Bool[Tensor, "query seq"]:
        """The tokens that follow it in a batch's prompts."""
        return batch.mask & (batch.mask.cumsum(1) > len(self))


@contextmanager
def _position_ids(decoder: nn.Module) -> Iterator[dict[str, Any]]:
    """Record the positions that the decoder is given in the forward passes inside."""
    found: dict[str, Any] = {}
    handle = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: found.update(given=kwargs.get("position_ids")), with_kwargs=True
    )
    try:
        yield found
    finally:
        handle.remove()


def cache_prompts(decoder: Any, batch: Batch, call: Callable[[dict[str, Any]], Tensor]) -> tuple[KVCache, Float[Tensor, "query vocab"]]:
    """Run prompts, padded on the left, and return their KV cache and the logits at their last tokens.

    Args:
        decoder: The language model's stack of layers.
        batch: The prompts.
        call: Runs the model on inputs and returns its logits at the last token.
    """
    from transformers import DynamicCache

    past = DynamicCache()  # without a config, so that layers with a window forget nothing
    with _position_ids(decoder) as found:
        logits = call({**batch.inputs, "past_key_values": past, "use_cache": True})
    columns = torch.arange(batch.mask.shape[1], device=batch.mask.device).expand_as(batch.mask)
    given = columns if found["given"] is None else found["given"]
    position_ids = given.expand(*given.shape[:-2], *batch.mask.shape)
    row = torch.arange(len(columns), device=columns.device)
    return KVCache(batch, past, row, torch.where(batch.mask, columns, HOLE), position_ids), logits


def cache_prefix(decoder: Any, batch: Batch, length: int, call: Callable[[dict[str, Any]], Tensor]) -> Prefix:
    """Compute the first `length` tokens of one prompt; the arguments are those of `cache_prompts`."""
    cache, _ = cache_prompts(decoder, batch, call)
    cache.past.crop(length - batch.mask.shape[1])
    return Prefix(batch.inputs["input_ids"][0, :length], batch.image_digests[0], cache.past, cache.position_ids[..., :1, : length + 1])
