"""From presented queries to tensors: chat template, tokens, padding, and which tokens are the query's own. Knows processors, not models."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from guardlens.errors import ModelError
from guardlens.queries import Prompt


def tokenise(processor: Any, prompts: Sequence[Prompt], padding_side: str, sees_images: bool) -> dict[str, Tensor]:
    """What the Hugging Face model takes, with the generation prompt at the end.

    Args:
        processor: A VLM's processor, or the tokenizer of a text-only model. Without a chat template, prompts are taken as they are.
        prompts: Presented queries.
        padding_side: `"left"` or `"right"`; the processor's own setting is left alone.
        sees_images: Whether it is a VLM.

    Raises:
        ModelError: A prompt without image for a processor that can't take one.
    """
    padding = {"padding": True, "padding_side": padding_side}
    if sees_images and _template(processor):
        return _through_template(processor, prompts, padding)
    texts = [render(processor, prompt, sees_images) for prompt in prompts]
    images = {"images": [image for prompt in prompts for image in prompt.images] or None} if sees_images else {}
    special = not _begins_with_bos(processor, texts[0])
    return dict(processor(text=texts, return_tensors="pt", add_special_tokens=special, **padding, **images))


def _through_template(processor: Any, prompts: Sequence[Prompt], padding: dict[str, Any]) -> dict[str, Tensor]:
    """The processor's own way, which knows how each family wants its images."""
    try:
        encoded = processor.apply_chat_template(
            [_message(prompt) for prompt in prompts],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=padding,
        )
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        if any(prompt.images for prompt in prompts):
            raise
        raise ModelError(
            f"{type(processor).__name__}, which takes no prompt without an image ({error})",
            "a model with a text twin: one that also runs on text alone",
            "use plans without text_twin (amplify, project_out, add), or another model",
        ) from None
    return dict(encoded)


def render(processor: Any, prompt: Prompt, sees_images: bool) -> str:
    """The prompt as text, each image as its one placeholder."""
    if not _template(processor):
        return "".join(getattr(processor, "image_token", "<image>") for _ in prompt.images) + prompt.text
    message = _message(prompt) if sees_images else [{"role": "user", "content": prompt.text}]
    return processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)


def instruction_mask(
    processor: Any, prompts: Sequence[Prompt], mask: Bool[Tensor, "query seq"], padding_side: str, sees_images: bool
) -> Bool[Tensor, "query seq"]:
    """The tokens of each query's own text: counted from the right, where images (which come first) can't shift them.

    Nothing is marked where the tokenizer gives no offsets, or where the template changes the text.
    """
    chosen = torch.zeros_like(mask)
    tokenizer = getattr(processor, "tokenizer", processor)
    for row, prompt in enumerate(prompts if tokenizer.is_fast else ()):
        text = render(processor, prompt, sees_images)
        start = text.rfind(prompt.text.strip())
        stop = start + len(prompt.text.strip())
        special = not _begins_with_bos(processor, text)
        offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)["offset_mapping"]
        inside = [len(offsets) - i for i, (a, b) in enumerate(offsets) if a < stop and b > start and b > a]
        end = mask.shape[1] if padding_side == "left" else int(mask[row].sum())
        if start >= 0 and inside:
            chosen[row, end - inside[0] : end - inside[-1] + 1] = True
    return chosen


def _template(processor: Any) -> str | None:
    return getattr(processor, "chat_template", None)


def _begins_with_bos(processor: Any, text: str) -> bool:
    """Whether the template wrote the first special token itself, so that the tokenizer must not add another."""
    bos = getattr(processor, "tokenizer", processor).bos_token
    return bos is not None and text.startswith(bos)


def _message(prompt: Prompt) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in prompt.images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": prompt.text}]}]
