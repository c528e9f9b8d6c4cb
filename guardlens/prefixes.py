"""Keys and values that are computed once: of what prompts have in common (`Prefix`), and of prompts up to their last token (`Prefill`).

Nothing that is done to a later token changes what came before it. So variants of a prompt's last token continue from one `Prefill`, as
*branches*: tokens beside each other that stand at one position, of which each sees the prompt and itself. And prompts that begin alike, as
all do beside one blank image, continue from one `Prefix`.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from guardlens.batches import Batch, Layout

Seen = dict[str, Bool[Tensor, "query 1 1 column"]] | Bool[Tensor, "query 1 1 column"]
"""Which columns of the cache the last token sees; by type of layer where a family has several."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """What prompts of one presentation have in common from their first token on.

    Attributes:
        ids: Its tokens.
        picture: Digest of the images in it.
        cache: Keys and values, in one row.
        positions: Of its tokens and of the one that follows, in as many dimensions as the family counts.
    """

    ids: Int[Tensor, "column"]
    picture: str
    cache: Any
    positions: Num[Tensor, "*dimension 1 column+1"]

    def __len__(self) -> int:
        return len(self.ids)

    def begins(self, batch: Batch) -> "Prefix | None":
        """As much of it as all prompts of a batch begin with; None if that is nothing, or less than its images."""
        length = min(len(self), batch.common_start)
        first = batch.inputs["input_ids"][0][batch.mask[0]][:length]
        same = int((first == self.ids[:length]).long().cumprod(0).sum())
        beyond = bool(batch.image[0][batch.mask[0]][same:].any())
        if not same or beyond or batch.pictures[:1] != (self.picture,):
            return None
        return self if same == len(self) else self.cut(same)

    def cut(self, length: int) -> "Prefix":
        """Its first tokens."""
        cache = copy.deepcopy(self.cache)
        cache.crop(length - len(self))
        return Prefix(self.ids[:length], self.picture, cache, self.positions[..., : length + 1])

    def continued(self, batch: Batch, layout: Layout) -> dict[str, Any]:
        """What the decoder takes for the rest of a batch's prompts. The prefix itself stays as it is."""
        rows, width = layout.column.shape
        cache = copy.deepcopy(self.cache)
        for layer in cache.layers:
            if layer.is_initialized:  # those that share another layer's keys never are
                # Views: what follows is joined to them in new tensors anyway.
                layer.keys, layer.values = (kept.expand(rows, *kept.shape[1:]) for kept in (layer.keys, layer.values))
        here = torch.arange(width, device=self.positions.device)
        position = self.positions[..., -1:] + here
        return {
            "input_ids": layout.gather(batch.inputs["input_ids"]),
            "attention_mask": torch.cat([torch.ones_like(layout.lane[:, :1]).expand(-1, len(self)), (layout.lane == 0).long()], dim=1),
            "position_ids": position.expand(*position.shape[:-2], rows, width),
            "past_key_values": cache,
            "use_cache": True,
        }


@dataclass(frozen=True, eq=False)
class Prefill:
    """Prompts whose keys and values are kept, so that anything asked of their last token costs that token alone.

    Attributes:
        batch: The prompts.
        cache: Keys and values.
        seen: Which of them the last token sees, besides itself.
        position: Of the last token.
        logits: The unedited run's, at the last token.
        held: States of other presentations' runs that have been asked for.
        flaw: Why branches can't continue from here; empty if they can.
        models: The model that computed them, and the LLM beside it.
    """

    batch: Batch
    cache: Any
    seen: Seen
    position: Num[Tensor, "*dimension query 1"]
    logits: Float[Tensor, "query vocab"]
    held: dict[Any, Tensor] = field(default_factory=dict)
    flaw: str = ""
    models: tuple[str, str] = ("", "")

    def __len__(self) -> int:
        return len(self.batch.queries)

    @property
    def width(self) -> int:
        """How many columns are cached."""
        return next(iter(self.seen.values())).shape[-1] if isinstance(self.seen, dict) else self.seen.shape[-1]

    @property
    def bytes(self) -> int:
        """What the keys and values take."""
        tensors = [tensor for layer in getattr(self.cache, "layers", ()) for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.nbytes for tensor in tensors)

    def branches(self, number: int, dtype: torch.dtype) -> dict[str, Any]:
        """What the decoder takes for so many copies of each prompt's last token, beside each other."""
        last = self.batch.inputs["input_ids"][:, -1:]
        masks = {
            kind: _beside(seen, number, dtype) for kind, seen in (self.seen.items() if isinstance(self.seen, dict) else [("", self.seen)])
        }
        return {
            "input_ids": last.expand(-1, number),
            "attention_mask": masks if isinstance(self.seen, dict) else masks[""],
            "position_ids": self.position.expand(*self.position.shape[:-1], number),
            "past_key_values": self.cache,
            "use_cache": True,
        }

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Leaves the keys and values as they were, whatever a run adds to them, also one that fails half way."""
        lengths = [layer.get_seq_length() for layer in self.cache.layers]
        try:
            yield
        finally:
            for layer, length in zip(self.cache.layers, lengths, strict=True):
                layer.crop(length - layer.get_seq_length())


def _beside(seen: Bool[Tensor, "query 1 1 column"], number: int, dtype: torch.dtype) -> Float[Tensor, "query 1 branch key"]:
    """The mask of branches, in the form that every attention adds: 0 where a branch sees the prompt and itself."""
    itself = torch.eye(number, dtype=torch.bool, device=seen.device).expand(len(seen), 1, number, number)
    visible = torch.cat([seen.expand(-1, 1, number, -1), itself], dim=-1)
    return torch.zeros(visible.shape, dtype=dtype, device=seen.device).masked_fill(~visible, torch.finfo(dtype).min)


def last_row(config: Any, mask: Bool[Tensor, "query column"], cache: Any, new: int, at: Int[Tensor, "query"], dtype: torch.dtype) -> Seen:
    """What the last token of each prompt sees of `mask`'s columns, by the model's own rules (windows, chunks), itself left out.

    Args:
        config: Of the language model.
        mask: Real tokens among the cached columns and, behind them, the `new` ones.
        cache: Keys and values of the columns before the new ones.
        new: How many columns come with the forward that the last token is in.
        at: Where the last token is among the new ones.
        dtype: Of the model.
    """
    from transformers.masking_utils import create_masks_for_generate

    eager = copy.copy(config)
    eager._attn_implementation = "eager"  # the one attention whose masks are always written out
    whole: Any = create_masks_for_generate(eager, torch.zeros(len(mask), new, 1, dtype=dtype, device=mask.device), mask.long(), cache)
    rows = torch.arange(len(mask), device=mask.device)
    itself = torch.zeros_like(mask)
    itself[rows, mask.shape[1] - new + at] = True

    def row(written: Tensor) -> Bool[Tensor, "query 1 1 column"]:
        return (written[rows, :, at][:, :, None] == 0) & ~itself[:, None, None]

    return {kind: row(written) for kind, written in whole.items()} if isinstance(whole, dict) else row(whole)


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


def prefill(decoder: Any, config: Any, batch: Batch, call: Callable[[dict[str, Any]], Tensor]) -> Prefill:
    """Run prompts, padded on the left, as they are, and keep their keys and values.

    Args:
        decoder: The language model's stack of blocks.
        config: Of the language model.
        batch: The prompts.
        call: Runs the model on inputs and gives its logits at the last token, `query vocab`.
    """
    from transformers import DynamicCache

    cache = DynamicCache()  # without a config, so that layers with a window forget nothing
    with positions(decoder) as found:
        logits = call({**batch.inputs, "past_key_values": cache, "use_cache": True})
    cache.crop(-1)
    (queries, width), given = batch.mask.shape, found["given"]
    position = torch.full((1, 1), width - 1, device=batch.mask.device) if given is None else given[..., -1:]
    seen = last_row(config, batch.mask, cache, 1, torch.zeros_like(batch.mask[:, 0], dtype=torch.long), logits.dtype)
    seen = {kind: row[..., :-1] for kind, row in seen.items()} if isinstance(seen, dict) else seen[..., :-1]
    return Prefill(batch, cache, seen, position.expand(*position.shape[:-2], queries, 1), logits)


def prefix_of(decoder: Any, batch: Batch, length: int, call: Callable[[dict[str, Any]], Tensor]) -> Prefix:
    """The first tokens of one prompt, computed.

    Args:
        decoder: The language model's stack of blocks.
        batch: The prompt.
        length: How many tokens.
        call: Runs the model on inputs.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    with positions(decoder) as found:
        call({**batch.inputs, "past_key_values": cache, "use_cache": True})
    cache.crop(length - batch.mask.shape[1])
    given = torch.arange(length + 1, device=batch.mask.device)[None] if found["given"] is None else found["given"]
    return Prefix(batch.inputs["input_ids"][0, :length], batch.pictures[0], cache, given[..., :1, : length + 1])


def prefill_after(
    prefix: Prefix, config: Any, batch: Batch, dtype: torch.dtype, call: Callable[[dict[str, Any], Int[Tensor, "query"]], Tensor]
) -> Prefill:
    """As `prefill`, from a prefix on.

    Args:
        prefix: What all prompts begin with.
        config: Of the language model.
        batch: The prompts.
        dtype: Of the model.
        call: Runs the decoder on inputs and gives the logits of each row at a column, `query vocab`.
    """
    layout = Layout.suffix(batch.mask, len(prefix))
    inputs, at = prefix.continued(batch, layout), (layout.lane == 0).sum(1) - 1
    seen = last_row(config, inputs["attention_mask"].bool(), inputs["past_key_values"], layout.column.shape[1], at, dtype)
    logits = call(inputs, at)
    rows = torch.arange(len(at), device=at.device)
    return Prefill(batch, inputs["past_key_values"], seen, inputs["position_ids"][..., rows, at][..., None], logits)
