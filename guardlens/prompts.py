"""From presented queries to tensors: chat template, tokens, padding, and which tokens are the query's own. Knows processors, not models."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from guardlens.errors import ModelError, PresentationError
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
        PresentationError: A system prompt that the chat template has no place for.
    """
    texts = [render(processor, prompt, sees_images) for prompt in prompts]
    shown = any(prompt.images for prompt in prompts)
    # One list per prompt: families differ in how they read a flat one.
    images = {"images": [list(prompt.images) for prompt in prompts]} if shown else {}
    special = not _begins_with_bos(processor, texts[0])
    options = {"return_tensors": "pt", "padding": True, "padding_side": padding_side, "add_special_tokens": special}
    try:
        return dict(processor(text=texts, **images, **options))
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        if shown or not sees_images:
            raise
        raise ModelError(
            f"{type(processor).__name__}, which takes no prompt without an image ({error})",
            "a model with a text twin: one that also runs on text alone",
            "use plans without text_twin (amplify, project_out, add), load with llm=..., or another model",
        ) from None


def render(processor: Any, prompt: Prompt, sees_images: bool) -> str:
    """The prompt as text, each image as its one placeholder, up to and with the words that the answer begins with.

    Raises:
        PresentationError: A system prompt that the chat template has no place for.
    """
    if not getattr(processor, "chat_template", None):
        images = "".join(getattr(processor, "image_token", "<image>") for _ in prompt.images)
        return images + "\n\n".join(filter(None, (prompt.system, prompt.text))) + prompt.prefill
    messages = [{"role": "system", "content": _content(prompt.system, 0, sees_images)}] if prompt.system else []
    messages.append({"role": "user", "content": _content(prompt.text, len(prompt.images), sees_images)})
    from jinja2 import TemplateError

    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise _no_place(processor, prompt, f" ({error})") from None
    if prompt.system.strip() not in text:
        raise _no_place(processor, prompt, "")
    return text + prompt.prefill


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
        start = text.rfind(prompt.text.strip(), 0, len(text) - len(prompt.prefill))
        stop = start + len(prompt.text.strip())
        special = not _begins_with_bos(processor, text)
        offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)["offset_mapping"]
        inside = [len(offsets) - i for i, (a, b) in enumerate(offsets) if a < stop and b > start and b > a]
        end = mask.shape[1] if padding_side == "left" else int(mask[row].sum())
        if start >= 0 and inside:
            chosen[row, end - inside[0] : end - inside[-1] + 1] = True
    return chosen


def _begins_with_bos(processor: Any, text: str) -> bool:
    """Whether the template wrote the first special token itself, so that the tokenizer must not add another."""
    bos = getattr(processor, "tokenizer", processor).bos_token
    return bos is not None and text.startswith(bos)


def _content(text: str, images: int, sees_images: bool) -> Any:
    return [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}] if sees_images else text


def _no_place(processor: Any, prompt: Prompt, why: str) -> PresentationError:
    what = f"the system prompt {prompt.system!r}" if prompt.system else "a prompt"
    return PresentationError(
        f"{what}, which the chat template of {type(processor).__name__} does not take{why}",
        "a template with a place for it",
        "put the words around the query instead: presentations.framed(inner, before=...)",
    )
