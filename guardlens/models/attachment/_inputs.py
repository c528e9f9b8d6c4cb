"""The inputs of a forward pass as a `Batch`, whose queries are the rows."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from guardlens.data.presentations import TextOnly
from guardlens.data.queries import Query
from guardlens.errors import ModelError
from guardlens.models.architectures import Architecture
from guardlens.models.engine.batch import Batch

Inputs = Mapping[str, Any]
"""The keyword arguments of a model's forward."""

TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""The inputs that a batch keeps; pixels, for example, are not needed again."""


def batch_of(inputs: Inputs, cfg: Architecture) -> Batch:
    """Return the inputs of a forward pass as a batch.

    Raises:
        ModelError: There are no token ids, or ids or mask have an unexpected shape.
    """
    ids = token_ids(inputs)
    if ids.ndim != 2:
        raise ModelError(f"input_ids of shape {tuple(ids.shape)}", "a row of ids per prompt", "hand in input_ids[None] of a single prompt")
    mask = _mask(ids, inputs.get("attention_mask"))
    none = torch.zeros_like(mask)
    image = none if cfg.image_token_id is None else ids == cfg.image_token_id
    queries = tuple(Query(f"row {number}", id=f"row {number}") for number in range(len(ids)))
    text = {name: inputs[name] for name in TEXT_INPUTS if inputs.get(name) is not None}
    return Batch(queries, TextOnly("as it came"), text, mask, image, none)


def token_ids(inputs: Inputs) -> Tensor:
    """Return the token ids.

    Raises:
        ModelError: There are none.
    """
    ids = inputs.get("input_ids")
    if ids is None:
        raise ModelError("a forward without input_ids", "token ids, by which prompts are told apart", "pass input_ids, not inputs_embeds")
    return ids


def _mask(ids: Int[Tensor, "row seq"], given: Any) -> Bool[Tensor, "row seq"]:
    if given is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if getattr(given, "shape", None) != ids.shape:
        shape = f" of shape {tuple(given.shape)}" if isinstance(given, Tensor) else "s of each kind of layer"
        raise ModelError(
            f"attention mask{shape} beside ids of shape {tuple(ids.shape)}",
            "the tokenizer's mask, as wide as the ids",
            "generate with the default cache: a static one (cache_implementation) brings masks that are worked out already",
        )
    return given.to(ids.device).bool()


def text_twin_of(batch: Batch, inputs: Inputs, twin: Callable[[Inputs], Inputs], cfg: Architecture) -> Batch:
    """Return the same prompts without their images, as `twin` makes them.

    Raises:
        ModelError: `twin` does not return inputs, or returns another number of prompts or prompts with images.
    """
    made = twin({**inputs, "attention_mask": batch.mask.long()})
    if not isinstance(made, Mapping) or "input_ids" not in made:
        raise ModelError(
            f"a twin= that gives something of type {type(made).__name__}", "inputs of the model", "give input_ids and attention_mask"
        )
    other = batch_of(made, cfg)
    if other.beside_image or len(other.mask) != len(batch.mask):
        raise ModelError(
            f"a twin= that gives {len(other.mask)} rows{', some with image tokens' if other.beside_image else ''}",
            f"the same {len(batch.mask)} prompts without their images",
            "take the image tokens out of every row",
        )
    return other
