"""How many prompts go into one forward pass: those of similar length together, as many as memory holds, halved if memory runs out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import psutil
import torch
from torch import Tensor

from guardlens.data.presentations import Presentation
from guardlens.data.queries import Query
from guardlens.errors import ArgumentError, ModelError, as_count
from guardlens.models.architectures import Architecture
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.kv_cache import Prefix
from guardlens.models.engine.out_of_memory import OutOfMemory, out_of_memory
from guardlens.models.hooked_model import HookedModel

Result = TypeVar("Result")

MAX_BATCH_SIZE = 64
"""Prompts per forward pass if neither the user nor memory asks for fewer."""

FREE_PADDING_CHARACTERS = 1024
"""Characters of padding (about 256 tokens) that a batch may hold in any case: they cost less than another forward pass."""

MAX_PADDING_SHARE = 0.25
"""Largest share of a batch that may be padding once the padding exceeds `FREE_PADDING_CHARACTERS`."""


@dataclass(frozen=True, eq=False)
class BatchResult(Generic[Result]):
    """The result of one batch.

    Attributes:
        indices: The positions of its queries among all queries.
        result: The result for these queries, in this order.
    """

    indices: tuple[int, ...]
    result: Result

    def __len__(self) -> int:
        return len(self.indices)


def over_batches(
    model: HookedModel,
    queries: Sequence[Query],
    presentation: Presentation,
    work: Callable[[Batch], Result],
    batch_size: int | None = None,
    *,
    max_batch_size: int = MAX_BATCH_SIZE,
    new_tokens: int = 0,
) -> Iterator[BatchResult[Result]]:
    """Yield the result of `work` batch by batch; every query is in exactly one batch.

    Queries with long texts come first, so that prompts of similar length share a batch and a prompt that does not fit in memory shows at
    once. A batch that runs out of memory is halved, as often as needed, and later batches are no larger. Finished batches are not repeated.

    Args:
        model: The model.
        queries: The queries; there may be none.
        presentation: How to show them.
        work: Called with a batch, which continues from the KV cache of what its prompts begin with, if that is worth having.
        batch_size: Queries per batch; None for as many as `prompts_that_fit`, at most `max_batch_size`.
        max_batch_size: The most queries per batch if `batch_size` is None.
        new_tokens: How many tokens `work` will generate.

    Raises:
        ArgumentError: The batch size is below 1.
        ModelError: A single prompt does not fit, or a function of the user's (a judge, a score, an edit, a presentation) has no room.
    """
    if batch_size is not None:
        batch_size = as_count(batch_size, "batch_size", ArgumentError, "leave it out to have it chosen from free memory")
    images = _images_to_separate(model, queries, presentation)
    order = sorted(range(len(queries)), key=lambda index: (images[index], -len(queries[index].text)))
    size = batch_size or max_batch_size
    prefix: Prefix | None = None

    def attempt(indices: Sequence[int]) -> BatchResult[Result] | None:
        """The result of a batch; None if memory ran out, in which case the next batch is smaller."""
        nonlocal prefix, size
        part = [queries[index] for index in indices]
        try:
            batch = model.batch(part, presentation)
            if batch_size is None and (fitting := prompts_that_fit(model, batch, new_tokens)) < len(part):
                part = part[:fitting]
                batch = model.batch(part, presentation)
            shared = prefix.begins(batch) if prefix is not None else None
            if shared is None:
                prefix = shared = model.share(batch)
            return BatchResult(tuple(indices[: len(part)]), work(batch.after(shared)))
        except RuntimeError as error:
            _require_out_of_memory(error, part)
            size = len(part) // 2
            return None

    start = 0
    while start < len(order):
        candidates = [index for index in order[start : start + size] if images[index] == images[order[start]]]
        done = attempt(candidates[: bucket_size([len(queries[index].text) for index in candidates])])
        if done is not None:
            start += len(done)
            yield done
        elif torch.cuda.is_available():
            torch.cuda.empty_cache()


def _images_to_separate(model: HookedModel, queries: Sequence[Query], presentation: Presentation) -> list[int]:
    """How many images each prompt shows, if batches must not mix these numbers; zeros for models that can mix them."""
    if not model.cfg.image_layers:
        return [0] * len(queries)
    return [len(presentation(query).images) for query in queries]


def bucket_size(lengths: Sequence[int]) -> int:
    """How many of these texts, the longest first, share a batch without too much padding.

    Padding is too much if it exceeds both `FREE_PADDING_CHARACTERS` and `MAX_PADDING_SHARE` of the batch.
    """
    real = 0
    for number, length in enumerate(lengths, start=1):
        real += length
        padded = number * lengths[0]
        if padded - real > max(FREE_PADDING_CHARACTERS, MAX_PADDING_SHARE * padded):
            return number - 1
    return len(lengths)


def prompts_that_fit(model: HookedModel, batch: Batch, new_tokens: int = 0) -> int:
    """How many prompts of this batch's width fit in one forward pass, budgeting half of the free memory by `prompt_bytes`."""
    free = min(free_memory(device) for device in {parameter.device for parameter in model.hf.parameters()})
    needed = prompt_bytes(model.cfg, batch.mask.shape[1] + new_tokens, torch.finfo(model.hf.dtype).bits // 8)
    return max(1, free // 2 // needed)


def prompt_bytes(cfg: Architecture, tokens: int, precision: int) -> int:
    """Roughly the memory that a prompt takes in a forward pass: its whole KV cache, and the intermediate values of one block.

    Per token, these are 2 d_head numbers for each layer and each head of keys and values; 8 d_model and 3 d_mlp numbers inside a block; and
    one float32 number for each head and each token that an attention may look at. Logits at the last token, with what scores make of them,
    are 6 float32 numbers for each word of the vocabulary.

    Args:
        cfg: The model's sizes.
        tokens: Tokens of the prompt, images included, and tokens to be generated.
        precision: Bytes per number.
    """
    d_head = cfg.d_head or cfg.d_model // cfg.n_heads
    kv_cache = 2 * cfg.n_layers * cfg.n_kv_heads * d_head
    inside_a_block = 8 * cfg.d_model + 3 * (cfg.d_mlp or 4 * cfg.d_model)
    logits = 6 * 4 * cfg.d_vocab
    return tokens * (precision * (kv_cache + inside_a_block) + 4 * cfg.n_heads * tokens) + logits


def free_memory(device: torch.device) -> int:
    """Free bytes on a GPU (memory that torch has reserved but does not use counts as free), or in the machine for any other device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def in_query_order(results: Iterable[BatchResult], queries: int, axis: int = 0) -> Tensor:
    """Join the results of all batches into one tensor, in the order of the queries.

    Args:
        results: Tensors or arrays that have an axis of queries, batch by batch.
        queries: The number of all queries.
        axis: The axis of queries.
    """
    whole: Tensor | None = None
    for part in results:
        result = torch.as_tensor(part.result)
        if whole is None:
            whole = result.new_empty(*result.shape[:axis], queries, *result.shape[axis + 1 :])
        whole.index_copy_(axis, torch.tensor(part.indices), result)
    assert whole is not None
    return whole


def _require_out_of_memory(error: RuntimeError, part: Sequence[Query]) -> None:
    """Re-raise an error that is not about memory, and raise ModelError if no smaller batch is possible."""
    if not out_of_memory(error):
        raise error
    if len(part) == 1 and isinstance(error, OutOfMemory):
        raise ModelError(
            f"{error}, at query {part[0].id!r} alone", "room for it beside the model", "give it less to do at once, or a device of its own"
        ) from error
    if len(part) == 1:
        raise ModelError(f"The prompt of query {part[0].id!r} alone does not fit in memory.", "", "load in bfloat16 or 4 bits") from None
