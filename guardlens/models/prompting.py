"""From queries to a `Batch`: presented, put into the chat template, tokenized and padded, with masks of image and instruction tokens."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from guardlens.data.presentations import Presentation, Prompt
from guardlens.data.queries import Query
from guardlens.errors import PresentationError, QueryError, warn
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.forward import Engine
from guardlens.models.engine.model_lock import lock_of
from guardlens.models.engine.out_of_memory import at_work
from guardlens.models.processing.chat_template import (
    instruction_mask,
    needs_image,
    presented,
    require_showable,
    tokenize,
    tokenizer_of,
)
from guardlens.models.processing.image_batching import RowsWrittenOut, moved, repeats_one_row
from guardlens.results.files import digest


def make_batch(
    engine: Engine, processor: Any, queries: tuple[Query, ...], presentation: Presentation, padding_side: str, name: str
) -> Batch:
    """Make the prompts of some queries in one presentation.

    Args:
        engine: The model.
        processor: Its processor or tokenizer.
        queries: What to ask.
        presentation: How to show it.
        padding_side: `"left"` or `"right"`.
        name: The name of the model, for messages.
    """
    cfg = engine.cfg
    sees_images = cfg.image_token_id is not None
    with at_work("the presentation", presentation):
        prompts = presented(queries, presentation)
    require_showable(queries, prompts, presentation, processor, sees_images)
    _require_same_number_of_images(prompts, cfg.image_layers, name)
    with lock_of(engine.hf):  # another thread's prompts must not meet the settings that this one gives the processor
        inputs = tokenize(processor, prompts, padding_side, sees_images)
    if missing := engine.required - set(inputs):
        raise needs_image(type(engine.inner).__name__, f"it needs {', '.join(sorted(missing))}")
    mask = inputs["attention_mask"].bool()
    longest = int(mask.sum(1).argmax())
    _require_room(engine, queries[longest], int(mask[longest].sum()), name)
    image = inputs["input_ids"] == cfg.image_token_id if sees_images else torch.zeros_like(mask)
    instruction = instruction_mask(processor, prompts, inputs["input_ids"], mask, sees_images)
    return Batch(
        queries,
        presentation,
        _on_device(engine, _completed(engine, inputs, mask, image)),
        mask.to(engine.device),
        image.to(engine.device),
        instruction.to(engine.device),
        image_digests=_image_digests(prompts),
        tokenizer=tokenizer_of(processor),
    )


def _completed(
    engine: Engine, inputs: dict[str, Tensor], mask: Bool[Tensor, "query seq"], image: Bool[Tensor, "query seq"]
) -> dict[str, Tensor]:
    """The inputs with those that some processors leave out."""
    if image.any() and "mm_token_type_ids" in engine.parameters:
        inputs.setdefault("mm_token_type_ids", image.long())
    counts_padding = engine.cfg.image_token_id is None and "position_ids" in engine.parameters
    if counts_padding:  # learned positions would count padding; VLMs work theirs out themselves, which may have several dimensions
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return inputs


def _on_device(engine: Engine, inputs: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """The inputs on the model's device, and pixels in its precision, which not every family sees to."""
    placed = {name: moved(value, engine.device, engine.hf.dtype if value.is_floating_point() else None) for name, value in inputs.items()}
    return RowsWrittenOut(placed) if any(map(repeats_one_row, placed.values())) else placed


def _image_digests(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """A digest of each prompt's images. An image that many prompts show is digested once."""
    images = {id(image): image for prompt in prompts for image in prompt.images}
    known = {number: _digest_of(image) for number, image in images.items()}
    return tuple(digest(*(known[id(image)] for image in prompt.images)) for prompt in prompts)


def _digest_of(image: Any) -> bytes:
    return digest(repr((image.mode, image.size)).encode(), image.tobytes()).encode()


def _require_same_number_of_images(prompts: Sequence[Prompt], image_layers: Collection[int], name: str) -> None:
    """Refuse prompts of unlike numbers of images in a family with cross-attention, where some would attend to the padding of others.

    Raises:
        PresentationError: The numbers differ.
    """
    counts = sorted({len(prompt.images) for prompt in prompts})
    if image_layers and len(counts) > 1:
        raise PresentationError(
            f"prompts of {' and '.join(map(str, counts))} images in one batch of {name}, whose cross-attention mixes them up",
            "one number of images in a batch",
            "make a batch of each; collect, keep, sweep and evaluate do",
        )


def _require_room(engine: Engine, query: Query, tokens: int, name: str) -> None:
    """Refuse a prompt with more tokens than learned positions; warn about one that is longer than the model was trained for.

    Raises:
        QueryError: There are fewer learned positions than tokens.
    """
    config = engine.hf.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or tokens <= limit:
        return
    found = f"{tokens} tokens in the prompt of query {query.id!r}, and {limit} positions in {name}"
    if any(limit <= size <= limit + 2 for size in _position_tables(engine)):  # OPT's positions begin at 2
        raise QueryError(found, "no more tokens than positions", "shorten the query or what is put around it")
    if tokens > limit * _longest_factor(getattr(config, "rope_parameters", None) or {}):
        warn(f"{found}: it was not trained on so long a text")


def _position_tables(engine: Engine) -> list[int]:
    """The sizes of the embedding tables beside the layers, except that of the words."""
    words = engine.hf.get_input_embeddings()
    return [child.num_embeddings for child in engine.decoder.children() if isinstance(child, torch.nn.Embedding) and child is not words]


def _longest_factor(rope: dict[str, Any]) -> float:
    """By how much RoPE scaling stretches the positions."""
    factors = [scaling.get("factor") or 1 for scaling in (rope, *rope.values()) if isinstance(scaling, dict)]
    return float(max(factors, default=1))
