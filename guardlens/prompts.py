"""From presented queries to tensors: chat template, tokens, padding, and which tokens are the query's own. Knows processors, not models."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from guardlens.errors import ModelError, PresentationError, QueryError
from guardlens.pictures import preprocessed_once
from guardlens.queries import Presentation, Prompt, Query


def words_of(processor: Any) -> Any:
    """The tokenizer of a processor, which a text-only model's is itself."""
    return getattr(processor, "tokenizer", processor)


@contextmanager
def padding_token(words: Any) -> Iterator[str]:
    """Inside, a tokenizer without a pad token (Llama's, GPT-2's) pads with the end of text, or what else it has: the mask hides it."""
    if words.pad_token is not None:
        yield words.pad_token
        return
    words.pad_token = next((token for token in (words.eos_token, words.bos_token, words.unk_token) if token), None)
    words.pad_token = words.pad_token or words.convert_ids_to_tokens(0)
    try:
        yield words.pad_token
    finally:
        words.pad_token = None


def require_showable(
    queries: Sequence[Query], prompts: Sequence[Prompt], presentation: Presentation, processor: Any, sees_images: bool
) -> None:
    """Refuse what would not mean what it says.

    Raises:
        PresentationError: An image for a text-only model.
        QueryError: A text that contains the model's image token.
    """
    token = getattr(processor, "image_token", None) if sees_images else None
    for query, prompt in zip(queries, prompts, strict=True):
        if prompt.images and not sees_images:
            raise PresentationError(
                f"the presentation {presentation.name!r}, which shows an image, for a text-only model",
                "presentations.text_only",
                "load a vision-language model to show images",
            )
        if isinstance(token, str) and token in prompt.text:
            raise QueryError(f"the image token {token!r} in the text of query {query.id!r}", "plain text", "remove it; images are added")


def tokenise(processor: Any, prompts: Sequence[Prompt], padding_side: str, sees_images: bool) -> dict[str, Tensor]:
    """What the Hugging Face model takes, with the generation prompt at the end.

    Args:
        processor: A VLM's processor, or the tokenizer of a text-only model. Without a chat template, prompts are taken as they are.
        prompts: Presented queries.
        padding_side: `"left"` or `"right"`; the processor's own setting is left alone.
        sees_images: Whether it is a VLM.

    Raises:
        ModelError: A prompt without image for a processor that can't take one.
        PresentationError: A system prompt that the chat template has no place for, or a prefill that the processor does not end with.
    """
    texts = [render(processor, prompt, sees_images) for prompt in prompts]
    shown = any(prompt.images for prompt in prompts)
    # One list per prompt: families differ in how they read a flat one.
    images = {"images": [list(prompt.images) for prompt in prompts]} if shown else {}
    special = not _begins_with_bos(processor, texts[0])
    options = {"return_tensors": "pt", "padding": True, "padding_side": padding_side, "add_special_tokens": special}
    try:
        with padding_token(words_of(processor)), preprocessed_once(processor, [prompt.images for prompt in prompts]):
            inputs = dict(processor(text=texts, **images, **options))
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        if shown or not sees_images:
            raise
        raise needs_image(type(processor).__name__, str(error)) from None
    for prompt, text, ids, mask in zip(prompts, texts, inputs["input_ids"], inputs["attention_mask"], strict=True):
        if prompt.prefill and words_of(processor)(text, add_special_tokens=special)["input_ids"][-1] != ids[mask.bool()][-1]:
            raise PresentationError(
                f"the prefill {prompt.prefill!r}, after which {type(processor).__name__} adds more",
                "a processor that leaves the end of a prompt alone",
                "leave the prefill out",
            )
    return {name: value for name, value in inputs.items() if name != "labels"}  # PaliGemma's, of which it would compute a loss


def needs_image(what: str, why: str) -> ModelError:
    """The refusal of a prompt without an image."""
    return ModelError(
        f"{what}, which takes no prompt without an image ({why})",
        "a model with a text twin: one that also runs on text alone",
        "use plans without text_twin (amplify, project_out, add), load with llm=..., or another model",
    )


def render(processor: Any, prompt: Prompt, sees_images: bool) -> str:
    """The prompt as text, each image as its one placeholder, up to and with the words that the answer begins with.

    Raises:
        PresentationError: A system prompt that the chat template has no place for.
    """
    if not getattr(processor, "chat_template", None):
        images = "".join(getattr(processor, "image_token", "<image>") for _ in prompt.images)
        return images + "\n\n".join(filter(None, (prompt.system, prompt.text))) + prompt.prefill
    user = {"role": "user", "content": _content(prompt.text, len(prompt.images), sees_images)}
    if not prompt.system:
        return _templated(processor, prompt, [user]) + prompt.prefill
    # Most templates of VLMs take a system prompt as parts, some as a string, and these print the parts as Python would.
    for content in (_content(prompt.system, 0, sees_images), prompt.system):
        text = _templated(processor, prompt, [{"role": "system", "content": content}, user])
        if prompt.system.strip() in text and (content == prompt.system or str(content) not in text):
            return text + prompt.prefill
    raise _no_place(processor, prompt, "")


def _templated(processor: Any, prompt: Prompt, messages: list[dict[str, Any]]) -> str:
    from jinja2 import TemplateError

    try:
        return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise _no_place(processor, prompt, f" ({error})") from None


def instruction_mask(
    processor: Any, prompts: Sequence[Prompt], ids: Int[Tensor, "query seq"], sees_images: bool
) -> Bool[Tensor, "query seq"]:
    """The tokens of each query's own text, found with all that follows them: images, which come before, can't shift them.

    Nothing is marked where the tokenizer gives no offsets, or where the template or the processor changes the text.
    """
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    tokenizer = words_of(processor)
    for row, prompt in enumerate(prompts if tokenizer.is_fast else ()):
        text = render(processor, prompt, sees_images)
        start = text.rfind(prompt.text.strip(), 0, len(text) - len(prompt.prefill))
        stop = start + len(prompt.text.strip())
        tokens = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not _begins_with_bos(processor, text))
        inside = [i for i, (a, b) in enumerate(tokens["offset_mapping"]) if a < stop and b > start and b > a]
        if start >= 0 and inside:
            first = _last_occurrence(tokens["input_ids"][inside[0] :], ids[row].tolist())
            chosen[row, first : first + len(inside)] = first >= 0
    return chosen


def _last_occurrence(part: list[int], whole: list[int]) -> int:
    """Where `part` begins in `whole`, the last time that it does; -1 if it does not."""
    return next((i for i in range(len(whole) - len(part), -1, -1) if whole[i : i + len(part)] == part), -1)


def _begins_with_bos(processor: Any, text: str) -> bool:
    """Whether the template wrote the first special token itself, so that the tokenizer must not add another."""
    bos = words_of(processor).bos_token
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
