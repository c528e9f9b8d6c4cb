"""From presented queries to tensors: chat template, tokens, padding, and the instruction mask. Knows processors, but no models."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from guardlens.data.images import as_images, opened
from guardlens.data.presentations import Presentation, Prompt
from guardlens.data.queries import Query
from guardlens.errors import ArgumentError, ModelError, PresentationError, QueryError, require_type
from guardlens.models.processing.image_batching import processed


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor; the processor of a text-only model is its tokenizer."""
    return getattr(processor, "tokenizer", processor)


@contextmanager
def padding_token(tokenizer: Any) -> Iterator[str]:
    """Within this context, a tokenizer without a pad token (Llama's, GPT-2's) pads with another token, which the attention mask hides."""
    if tokenizer.pad_token is not None:
        yield tokenizer.pad_token
        return
    special = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    tokenizer.pad_token = next((token for token in special if token), None) or tokenizer.convert_ids_to_tokens(0)
    try:
        yield tokenizer.pad_token
    finally:
        tokenizer.pad_token = None


def pad_token_id(tokenizer: Any) -> int:
    """Return the id that answers are padded with."""
    with padding_token(tokenizer):
        return tokenizer.pad_token_id


def decoded(tokenizer: Any, tokens: Any) -> list[str]:
    """Return token ids as text, without special tokens.

    Raises:
        ArgumentError: They are no ids of this tokenizer.
    """
    try:
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    except (TypeError, ValueError, OverflowError, KeyError) as error:
        raise ArgumentError(f"token ids that are none ({error})", "whole numbers of the vocabulary", "hand in run.tokens[lane]") from None
    return [text.strip() for text in texts]


def presented(queries: Sequence[Query], presentation: Presentation) -> list[Prompt]:
    """Present each query, with all images converted to RGB.

    Raises:
        PresentationError: The presentation does not return a Prompt, or an image cannot be read.
    """
    return [_in_rgb(presentation(query), query, presentation.name) for query in queries]


def _in_rgb(prompt: Prompt, query: Query, name: str) -> Prompt:
    require_type(prompt, Prompt, PresentationError, f"let the presentation {name!r} return Prompt(query.text, images)")
    whose = f"query {query.id!r}"
    return replace(prompt, images=tuple(opened(image, whose) for image in as_images(prompt.images, whose)))


def require_showable(
    queries: Sequence[Query], prompts: Sequence[Prompt], presentation: Presentation, processor: Any, sees_images: bool
) -> None:
    """Reject prompts that the processor would misread.

    Raises:
        PresentationError: A prompt for a text-only model shows an image.
        QueryError: A text holds a special token, which would be read as the end of a turn, an image or the speaker's role.
    """
    if not sees_images and any(prompt.images for prompt in prompts):
        raise PresentationError(
            f"the presentation {presentation.name!r}, which shows an image, for a text-only model",
            "presentations.text_only",
            "load a vision-language model to show images",
        )
    for field, name in (("text", "text"), ("system", "system prompt"), ("prefill", "prefill")):
        texts = [getattr(prompt, field) for prompt in prompts]
        if not any(texts):
            continue
        for query, token in zip(queries, _special_tokens(processor, texts, prefill=field == "prefill"), strict=True):
            if token:
                kind = "image" if token == str(getattr(processor, "image_token", None)) else "special"
                raise QueryError(
                    f"the {kind} token {token!r} in the {name} of query {query.id!r}",
                    "plain text",
                    "remove it, or write it otherwise; turns and images are added by the chat template",
                )


def _special_tokens(processor: Any, texts: Sequence[str], prefill: bool) -> list[str]:
    """The first special token in each text, or an empty string.

    A prefill may hold special tokens that occur within an answer (such as those around its thinking), but not those that end it or stand
    for an image.
    """
    from transformers import AddedToken

    tokenizer = tokenizer_of(processor)
    marks = {str(mark) for name, mark in vars(processor).items() if name.endswith("_token") and isinstance(mark, str | AddedToken)}
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    if prefill:
        special = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(sorted(marks))} & special
    found = []
    for text, ids in zip(texts, tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"], strict=True):
        candidates = (tokenizer.convert_ids_to_tokens(number) for number in ids if number in special)
        # An unknown word also becomes a special token, but one that is not in the text.
        typed = (token for token in candidates if token.casefold() in text.casefold())
        found.append(next(typed, "") or next((mark for mark in sorted(marks) if mark and mark in text), ""))
    return found


def tokenize(processor: Any, prompts: Sequence[Prompt], padding_side: str, sees_images: bool) -> dict[str, Tensor]:
    """Turn prompts into the model's input tensors, with the generation prompt at the end.

    Args:
        processor: A VLM's processor, or the tokenizer of a text-only model. Without a chat template, prompts are tokenized as they are.
        prompts: Presented queries.
        padding_side: `"left"` or `"right"`; the processor's own setting is not changed.
        sees_images: Whether the model is a VLM.

    Raises:
        ModelError: A prompt has no image, and the processor requires one.
        PresentationError: The chat template has no place for a system prompt, the processor rejects an image or adds tokens behind a
            prefill.
    """
    texts = [render(processor, prompt, sees_images) for prompt in prompts]
    add_special_tokens, surplus = _special_tokens_to_add(processor, texts[0])
    options = {"return_tensors": "pt", "padding": True, "padding_side": padding_side, "add_special_tokens": add_special_tokens}
    inputs = _processed(processor, prompts, texts, options, sees_images)
    if surplus:
        inputs = _without_last_tokens(inputs, surplus)
    _require_prefills_last(processor, prompts, texts, inputs)
    inputs.pop("labels", None)  # PaliGemma's processor returns them, and its model would compute a loss
    return inputs


def _processed(
    processor: Any, prompts: Sequence[Prompt], texts: list[str], options: dict[str, Any], sees_images: bool
) -> dict[str, Tensor]:
    """Call the processor, and translate the errors that it raises."""
    kind = type(processor).__name__
    images = [list(prompt.images) for prompt in prompts]  # one list per prompt: families differ in how they read a flat one
    shown = any(images)
    try:
        with padding_token(tokenizer_of(processor)):
            return dict(processed(processor, texts, images, **options) if shown else processor(text=texts, **options))
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        if sees_images and not shown:
            raise needs_image(kind, str(error)) from None
        found = f"{'images' if shown else 'prompts'} that {kind} does not take ({str(error)[:200]})"
        raise PresentationError(found, "what its model was made for", "show other ones, or convert them beforehand") from error


def _require_prefills_last(processor: Any, prompts: Sequence[Prompt], texts: Sequence[str], inputs: dict[str, Tensor]) -> None:
    """Check that each prompt with a prefill ends with the prefill's last token."""
    tokenizer = tokenizer_of(processor)
    for prompt, text, ids, mask in zip(prompts, texts, inputs["input_ids"], inputs["attention_mask"], strict=True):
        if prompt.prefill and tokenizer(text, add_special_tokens=False)["input_ids"][-1] != ids[mask.bool()][-1]:
            raise PresentationError(
                f"the prefill {prompt.prefill!r}, after which {type(processor).__name__} adds more",
                "a processor that leaves the end of a prompt alone",
                "leave the prefill out",
            )


def _special_tokens_to_add(processor: Any, text: str) -> tuple[bool, int]:
    """Whether the tokenizer must add special tokens to get those at the front, and how many unwanted ones it then adds at the end."""
    tokenizer = tokenizer_of(processor)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    if tokenizer.bos_token is not None and text.lstrip().startswith(tokenizer.bos_token):
        return False, 0
    has_template = bool(getattr(processor, "chat_template", None))
    needed = tokenizer.bos_token_id in whole[:start] if has_template else start > 0
    return needed, len(whole) - start - len(plain) if needed else 0


def _without_last_tokens(inputs: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Remove the last tokens of every row, which would end the prompt before the model has answered."""
    mask = inputs["attention_mask"]
    tokens_from_here = mask.flip(1).cumsum(1).flip(1)
    inputs = inputs | {"attention_mask": mask * (tokens_from_here > count)}
    per_token = {name: value for name, value in inputs.items() if value.shape[:2] == mask.shape and not value.is_floating_point()}
    return inputs | {name: value[:, :-count] for name, value in per_token.items()}


def needs_image(what: str, why: str) -> ModelError:
    """Return the error for a prompt without an image, if the model or processor `what` requires one."""
    return ModelError(
        f"{what}, which takes no prompt without an image ({why})",
        "a model with a text twin: one that also runs on text alone",
        "use interventions without text_twin (amplify, project_out, add), load with llm=..., or another model",
    )


def render(processor: Any, prompt: Prompt, sees_images: bool) -> str:
    """Return the prompt as text, including the prefill, with one placeholder per image.

    Raises:
        PresentationError: The chat template has no place for the system prompt, or does not read one of `template_kwargs`.
    """
    template = getattr(processor, "chat_template", None)
    keywords = json.loads(prompt.template_kwargs or "{}")
    unknown = next((name for name in keywords if not re.search(rf"\b{name}\b", str(template))), None)
    if unknown is not None:
        raise PresentationError(
            f"template_kwargs with {unknown!r}, which the chat template of {type(processor).__name__} does not read",
            "a variable of the chat template",
            "compare its spelling with processor.chat_template, or leave it out",
        )
    if not template:
        images = "".join(getattr(processor, "image_token", "<image>") for _ in prompt.images)
        return images + "\n\n".join(filter(None, (prompt.system, prompt.text))) + prompt.prefill
    user = {"role": "user", "content": _content(prompt.text, len(prompt.images), sees_images)}
    if not prompt.system:
        return _templated(processor, prompt, [user], keywords) + prompt.prefill
    # Most VLM templates take a system prompt as a list of parts. Some take a string, and would print the list as Python code.
    for content in (_content(prompt.system, 0, sees_images), prompt.system):
        text = _templated(processor, prompt, [{"role": "system", "content": content}, user], keywords)
        shown = text.count(prompt.system.strip()) > prompt.text.count(prompt.system.strip())
        if shown and (content == prompt.system or str(content) not in text):
            return text + prompt.prefill
    raise _no_place(processor, prompt, "")


def _templated(processor: Any, prompt: Prompt, messages: list[dict[str, Any]], keywords: dict[str, Any]) -> str:
    from jinja2 import TemplateError

    try:
        return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **keywords)
    except TemplateError as error:
        raise _no_place(processor, prompt, f" ({error})") from None


def instruction_mask(
    processor: Any, prompts: Sequence[Prompt], ids: Int[Tensor, "query seq"], mask: Bool[Tensor, "query seq"], sees_images: bool
) -> Bool[Tensor, "query seq"]:
    """Mark the tokens of the instruction: each query's text, including the words that a presentation puts around it.

    No token is marked if the tokenizer gives no offsets, or if the template or the processor changes the text.
    """
    chosen = torch.zeros_like(mask)
    tokenizer = tokenizer_of(processor)
    if not tokenizer.is_fast:
        return chosen
    for row, prompt in enumerate(prompts):
        text, start, stop = _instruction_in_text(processor, prompt, sees_images)
        columns = mask[row].nonzero().flatten()
        found = _tokens_of(tokenizer, text, start, stop, ids[row, columns].tolist())
        chosen[row, columns[found.start : found.stop]] = True
    return chosen


def _instruction_in_text(processor: Any, prompt: Prompt, sees_images: bool) -> tuple[str, int, int]:
    """The prompt as text, and where the instruction starts and stops in it; an empty span if the template changes it.

    The instruction is located by rendering a marker in its place, since the template may contain the same words.
    """
    text = render(processor, prompt, sees_images)
    instruction = prompt.text.strip()
    marker = "§"
    while marker in text:
        marker += "§"
    head, _, tail = render(processor, replace(prompt, text=marker), sees_images).partition(marker)
    between = text[len(head) : len(text) - len(tail)]
    if not instruction or not text.startswith(head) or not text.endswith(tail) or between.strip() != instruction:
        return text, 0, 0
    start = text.index(instruction, len(head))
    return text, start, start + len(instruction)


def _tokens_of(tokenizer: Any, text: str, start: int, stop: int, ids: list[int]) -> range:
    """The tokens in `ids` that spell `text[start:stop]`.

    They are located together with all tokens that follow, because images, which come earlier in the prompt, shift them.
    """
    tokens = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    expected = tokens["input_ids"]
    offsets = tokens["offset_mapping"]
    inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start and b > a]
    if not inside:
        return range(0)
    # The text that a processor inserts for an image may merge with the first words, whose tokens then differ from the expected ones.
    matched, place = next((i, place) for i in range(inside[0], len(expected) + 1) if (place := _last_occurrence(expected[i:], ids)) >= 0)
    end = place + inside[-1] + 1 - matched
    if matched == inside[0] or end < place:
        return range(place, end)
    merged = text[start : offsets[matched][0] if matched < len(expected) else None]
    candidates = range(place - 1, max(-1, place - 2 - len(merged)), -1)
    first = next((first for first in candidates if _spells(tokenizer, ids[first:place], merged)), end)
    return range(first, end)


def _spells(tokenizer: Any, ids: list[int], text: str) -> bool:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).endswith(text)


def _last_occurrence(part: list[int], whole: list[int]) -> int:
    """The index of the last occurrence of `part` in `whole`; -1 if there is none."""
    return next((i for i in range(len(whole) - len(part), -1, -1) if whole[i : i + len(part)] == part), -1)


def _content(text: str, images: int, sees_images: bool) -> Any:
    return [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}] if sees_images else text


def _no_place(processor: Any, prompt: Prompt, why: str) -> PresentationError:
    what = f"the system prompt {prompt.system!r}" if prompt.system else "a prompt"
    return PresentationError(
        f"{what}, which the chat template of {type(processor).__name__} does not take{why}",
        "a template with a place for it",
        "put the words around the query instead: presentations.framed(inner, before=...)",
    )
