"""How much goes into one forward: prompts of like length together, as many as free memory holds, halved where even that is too many."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from guardlens.data.queries import Presentation, Query
from guardlens.errors import ArgumentError, ModelError, as_count
from guardlens.models.architectures import Architecture
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.kv_cache import Prefix
from guardlens.models.engine.out_of_memory import OutOfMemory, out_of_memory
from guardlens.models.hooked_model import HookedModel

Result = TypeVar("Result")

MOST = 64
"""Prompts per forward where neither the user nor memory asks for fewer."""

SLACK = 1024
"""Characters of padding in a batch (some 256 tokens) that are cheaper than a forward more."""

SHARE = 0.25
"""Of a batch that may be padding, where that is more than `SLACK`."""


@dataclass(frozen=True, eq=False)
class Portion(Generic[Result]):
    """What one batch gave.

    Attributes:
        places: Where its queries stand among all that were asked.
        result: Of these queries, in this order.
    """

    places: tuple[int, ...]
    result: Result

    def __len__(self) -> int:
        return len(self.places)


def over_batches(
    model: HookedModel,
    queries: Sequence[Query],
    presentation: Presentation,
    work: Callable[[Batch, Prefix | None], Result],
    batch_size: int | None = None,
    *,
    most: int = MOST,
    new_tokens: int = 0,
) -> Iterator[Portion[Result]]:
    """What `work` gives for batches of queries, batch by batch; every query is in exactly one.

    Queries with long texts come first, so that prompts of like length share a batch, and what does not fit in memory shows at once. A batch
    that does not fit is halved, as often as needed, and those after it are no larger; what was done before is kept.

    Args:
        model: The model.
        queries: What to ask; there may be none.
        presentation: How to show it.
        work: What to do with a batch and what its prompts begin with alike, computed.
        batch_size: Queries per batch; None for as many as `room` says, at most `most`.
        most: See there.
        new_tokens: How many tokens `work` will generate.

    Raises:
        ArgumentError: A batch size below 1.
        ModelError: A single prompt does not fit, or a function of the user's (a judge, a score, an edit, a presentation) has no room.
    """
    if batch_size is not None:
        batch_size = as_count(batch_size, "batch_size", ArgumentError, "leave it out to have it chosen from free memory")
    # A family with cross-attention takes prompts of one number of images alone.
    pictures = [len(presentation(query).images) if model.cfg.image_layers else 0 for query in queries]
    order = sorted(range(len(queries)), key=lambda place: (pictures[place], -len(queries[place].text)))
    lengths = [len(queries[place].text) for place in order]
    start, size, prefix = 0, batch_size or most, None

    def attempt(places: Sequence[int]) -> Portion[Result] | None:
        nonlocal prefix, size
        part = [queries[place] for place in places]
        try:
            batch = model.batch(part, presentation)
            if batch_size is None and (fitting := room(model, batch, new_tokens)) < len(part):
                part = part[:fitting]
                batch = model.batch(part, presentation)
            begun = prefix.begins(batch) if prefix is not None else None
            if begun is None:
                prefix = begun = model.share(batch)
            return Portion(tuple(places[: len(part)]), work(batch, begun))
        except RuntimeError as error:
            _require_out_of_memory(error, part)
            size = len(part) // 2
            return None

    while start < len(order):
        alike = sum(pictures[place] == pictures[order[start]] for place in order[start : start + size])
        portion = attempt(order[start : start + bucket(lengths[start : start + alike])])
        if portion is not None:
            start += len(portion)
            yield portion
        elif torch.cuda.is_available():
            torch.cuda.empty_cache()


def bucket(lengths: Sequence[int]) -> int:
    """How many of these texts, the longest first, go into one batch: all, unless padding would be both `SLACK` and `SHARE` of it."""
    real = 0
    for number, length in enumerate(lengths, start=1):
        real += length
        padded = number * lengths[0]
        if padded - real > max(SLACK, SHARE * padded):
            return number - 1
    return len(lengths)


def room(model: HookedModel, batch: Batch, new_tokens: int = 0) -> int:
    """How many prompts as wide as this batch one forward has room for: what `prompt_bytes` says of them is half of what is free."""
    free = [available for device in {p.device for p in model.hf.parameters()} if (available := free_memory(device)) is not None]
    needed = prompt_bytes(model.cfg, batch.mask.shape[1] + new_tokens, torch.finfo(model.hf.dtype).bits // 8)
    return max(1, min(free) // 2 // needed) if free else len(batch.queries)


def prompt_bytes(cfg: Architecture, tokens: int, precision: int) -> int:
    """What a prompt takes in a forward, roughly: all keys and values, and what one block computes at a time.

    That is, per token: 2 d_head numbers for each layer and head of keys and values; 8 d_model and 3 d_mlp numbers inside a block; and one
    number in float32 for each head and token that an attention may look at.

    Args:
        cfg: The model's sizes.
        tokens: In the prompt, images included, and to be generated.
        precision: Bytes of a number.
    """
    d_head = cfg.d_head or cfg.d_model // cfg.n_heads
    kept = 2 * cfg.n_layers * cfg.n_kv_heads * d_head
    at_once = 8 * cfg.d_model + 3 * (cfg.d_mlp or 4 * cfg.d_model)
    return tokens * (precision * (kept + at_once) + 4 * cfg.n_heads * tokens)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU, or in the machine; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def joined(portions: Iterable[Portion], queries: int, axis: int = 0) -> Tensor:
    """The results of all portions in one tensor, in the order in which the queries were asked.

    Args:
        portions: Of tensors or arrays that have an axis of queries.
        queries: How many there are in all.
        axis: Which axis that is.
    """
    whole: Tensor | None = None
    for portion in portions:
        result = torch.as_tensor(portion.result)
        if whole is None:
            whole = result.new_empty(*result.shape[:axis], queries, *result.shape[axis + 1 :])
        whole.index_copy_(axis, torch.tensor(portion.places), result)
    assert whole is not None
    return whole


def _require_out_of_memory(error: RuntimeError, part: Sequence[Query]) -> None:
    """Raise what is no lack of memory, and one that no smaller batch can mend."""
    if not out_of_memory(error):
        raise error
    if len(part) == 1 and isinstance(error, OutOfMemory):
        raise ModelError(
            f"{error}, at query {part[0].id!r} alone", "room for it beside the model", "give it less to do at once, or a device of its own"
        ) from error
    if len(part) == 1:
        raise ModelError(
            f"the prompt of query {part[0].id!r}, which alone does not fit in memory", "room for one prompt", "load in bfloat16 or 4 bits"
        ) from None
