"""From presented queries to tensors: chat template, tokens, padding, and which tokens are the query's own. Knows processors, not models."""

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
from guardlens.errors import ModelError, PresentationError, QueryError, require_type
from guardlens.models.processing.image_batching import preprocessed_once


def tokenizer_of(processor: Any) -> Any:
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


def presented(queries: Sequence[Query], presentation: Presentation) -> list[Prompt]:
    """What a presentation shows of each query, all images in RGB.

    Raises:
        PresentationError: It returns something else, or an image can't be read.
    """
    return [_in_rgb(presentation(query), query, presentation.name) for query in queries]


def _in_rgb(prompt: Prompt, query: Query, name: str) -> Prompt:
    require_type(prompt, Prompt, PresentationError, f"let the presentation {name!r} return Prompt(query.text, images)")
    whose = f"query {query.id!r}"
    return replace(prompt, images=tuple(opened(image, whose) for image in as_images(prompt.images, whose)))


def require_showable(
    queries: Sequence[Query], prompts: Sequence[Prompt], presentation: Presentation, processor: Any, sees_images: bool
) -> None:
    """Refuse what would not mean what it says.

    Raises:
        PresentationError: An image for a text-only model.
        QueryError: Words that the tokenizer or the processor takes for something else: the end of a turn, an image, the speaker's role.
    """
    if not sees_images and any(prompt.images for prompt in prompts):
        raise PresentationError(
            f"the presentation {presentation.name!r}, which shows an image, for a text-only model",
            "presentations.text_only",
            "load a vision-language model to show images",
        )
    for place, allowed in (("text", False), ("system prompt", False), ("prefill", True)):
        texts = [getattr(prompt, place.split()[0]) for prompt in prompts]
        for query, token in zip(queries, _special_tokens(processor, texts, allowed) if any(texts) else texts, strict=True):
            if token:
                kind = "image" if token == str(getattr(processor, "image_token", None)) else "special"
                raise QueryError(
                    f"the {kind} token {token!r} in the {place} of query {query.id!r}",
                    "plain text",
                    "remove it, or write it otherwise; turns and images are added by the chat template",
                )


def _special_tokens(processor: Any, texts: Sequence[str], prefill: bool) -> list[str]:
    """The first special token in each text, or nothing. A prefill may hold those with which an answer goes on (of its thinking, say)."""
    from transformers import AddedToken

    words = tokenizer_of(processor)
    marks = {str(mark) for name, mark in vars(processor).items() if name.endswith("_token") and isinstance(mark, str | AddedToken)}
    added = words.added_tokens_decoder
    special = {*words.all_special_ids, *(number for number, token in added.items() if token.special)}
    if prefill:
        special = {words.eos_token_id, *words.convert_tokens_to_ids(sorted(marks))} & special
    found = []
    for text, ids in zip(texts, words(list(texts), add_special_tokens=False, verbose=False)["input_ids"], strict=True):
        met = (words.convert_ids_to_tokens(number) for number in ids if number in special)
        typed = (token for token in met if token.casefold() in text.casefold())  # words that are unknown have a special token, too
        found.append(next(typed, "") or next((mark for mark in sorted(marks) if mark and mark in text), ""))
    return found


def tokenize(processor: Any, prompts: Sequence[Prompt], padding_side: str, sees_images: bool) -> dict[str, Tensor]:
    """What the Hugging Face model takes, with the generation prompt at the end.

    Args:
        processor: A VLM's processor, or the tokenizer of a text-only model. Without a chat template, prompts are taken as they are.
        prompts: Presented queries.
        padding_side: `"left"` or `"right"`; the processor's own setting is left alone.
        sees_images: Whether it is a VLM.

    Raises:
        ModelError: A prompt without image for a processor that can't take one.
        PresentationError: A system prompt that the chat template has no place for, an image that the processor refuses, or a prefill that
            it does not end with.
    """
    words, kind = tokenizer_of(processor), type(processor).__name__
    texts = [render(processor, prompt, sees_images) for prompt in prompts]
    shown = any(prompt.images for prompt in prompts)
    # One list per prompt: families differ in how they read a flat one.
    images = {"images": [list(prompt.images) for prompt in prompts]} if shown else {}
    front, behind = _opening(processor, texts[0])
    options = {"return_tensors": "pt", "padding": True, "padding_side": padding_side, "add_special_tokens": front}
    try:
        with padding_token(words), preprocessed_once(processor, [prompt.images for prompt in prompts]):
            inputs = dict(processor(text=texts, **images, **options))
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        if sees_images and not shown:
            raise needs_image(kind, str(error)) from None
        found = f"{'images' if shown else 'prompts'} that {kind} does not take ({str(error)[:200]})"
        raise PresentationError(found, "what its model was made for", "show other ones, or convert them beforehand") from error
    if behind:
        inputs = _without_end(inputs, behind)
    for prompt, text, ids, mask in zip(prompts, texts, inputs["input_ids"], inputs["attention_mask"], strict=True):
        if prompt.prefill and words(text, add_special_tokens=False)["input_ids"][-1] != ids[mask.bool()][-1]:
            raise PresentationError(
                f"the prefill {prompt.prefill!r}, after which {kind} adds more",
                "a processor that leaves the end of a prompt alone",
                "leave the prefill out",
            )
    return {name: value for name, value in inputs.items() if name != "labels"}  # PaliGemma's, of which it would compute a loss


def _opening(processor: Any, text: str) -> tuple[bool, int]:
    """Whether the tokenizer must add its special tokens, for those at the front, and how many that then puts behind."""
    words = tokenizer_of(processor)
    plain, whole = (words("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    begun = words.bos_token is not None and text.lstrip().startswith(words.bos_token)
    templated = bool(getattr(processor, "chat_template", None))
    front = not begun and (words.bos_token_id in whole[:start] if templated else start > 0)
    return front, len(whole) - start - len(plain) if front else 0


def _without_end(inputs: dict[str, Tensor], behind: int) -> dict[str, Tensor]:
    """Rows without their last tokens: what a tokenizer puts behind a prompt ends it before the model has answered."""
    mask = inputs["attention_mask"]
    inputs = inputs | {"attention_mask": mask * (mask.flip(1).cumsum(1).flip(1) > behind)}
    alike = {name: value for name, value in inputs.items() if value.shape[:2] == mask.shape and not value.is_floating_point()}
    return inputs | {name: value[:, :-behind] for name, value in alike.items()}


def needs_image(what: str, why: str) -> ModelError:
    """The refusal of a prompt without an image."""
    return ModelError(
        f"{what}, which takes no prompt without an image ({why})",
        "a model with a text twin: one that also runs on text alone",
        "use interventions without text_twin (amplify, project_out, add), load with llm=..., or another model",
    )


def render(processor: Any, prompt: Prompt, sees_images: bool) -> str:
    """The prompt as text, each image as its one placeholder, up to and with the words that the answer begins with.

    Raises:
        PresentationError: A system prompt that the chat template has no place for, or a keyword that it does not know.
    """
    template = getattr(processor, "chat_template", None)
    keywords = json.loads(prompt.template_kwargs or "{}")
    unknown = next((name for name in keywords if not re.search(rf"\b{name}\b", str(template))), None)
    if unknown is not None:
        raise PresentationError(
            f"template_kwargs with {unknown!r}, which the chat template of {type(processor).__name__} does not read",
            "a variable of the chat template",
            "check its spelling in processor.chat_template, or leave it out",
        )
    if not template:
        images = "".join(getattr(processor, "image_token", "<image>") for _ in prompt.images)
        return images + "\n\n".join(filter(None, (prompt.system, prompt.text))) + prompt.prefill
    user = {"role": "user", "content": _content(prompt.text, len(prompt.images), sees_images)}
    if not prompt.system:
        return _templated(processor, prompt, [user], keywords) + prompt.prefill
    # Most templates of VLMs take a system prompt as parts, some as a string, and these print the parts as Python would.
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
    """The tokens of what the user says: each query's text, with the words that a presentation puts around it.

    Nothing is marked where the tokenizer gives no offsets, or where the template or the processor changes the text.
    """
    chosen = torch.zeros_like(mask)
    words = tokenizer_of(processor)
    for row, prompt in enumerate(prompts if words.is_fast else ()):
        text, start, stop = _text_of(processor, prompt, sees_images)
        columns = mask[row].nonzero().flatten()
        found = _tokens_of(words, text, start, stop, ids[row, columns].tolist())
        chosen[row, columns[found.start : found.stop]] = True
    return chosen


def _text_of(processor: Any, prompt: Prompt, sees_images: bool) -> tuple[str, int, int]:
    """A prompt as text, and where in it the query's own begins and ends; nowhere if the template changes it.

    It is found by a mark in its place, since the template may well say the same words.
    """
    text, asked, mark = render(processor, prompt, sees_images), prompt.text.strip(), "§"
    while mark in text:
        mark += "§"
    head, _, tail = render(processor, replace(prompt, text=mark), sees_images).partition(mark)
    stop = len(text) - len(tail)
    if not asked or not text.startswith(head) or not text.endswith(tail) or text[len(head) : stop].strip() != asked:
        return text, 0, 0
    start = text.index(asked, len(head))
    return text, start, start + len(asked)


def _tokens_of(words: Any, text: str, start: int, stop: int, ids: list[int]) -> range:
    """Which of a prompt's tokens say `text[start:stop]`: found with all that follows them, since images, which come before, shift them."""
    tokens = words(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    known, offsets = tokens["input_ids"], tokens["offset_mapping"]
    inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start and b > a]
    if not inside:
        return range(0)
    # What a processor writes for an image may merge with the first words: these are found by what their tokens say.
    met, place = next((i, place) for i in range(inside[0], len(known) + 1) if (place := _last_occurrence(known[i:], ids)) >= 0)
    end = place + inside[-1] + 1 - met
    if met == inside[0] or end < place:
        return range(place, end)
    merged = text[start : offsets[met][0] if met < len(known) else None]
    said = (first for first in range(place - 1, max(-1, place - 2 - len(merged)), -1) if _says(words, ids[first:place], merged))
    return range(next(said, end), end)


def _says(words: Any, ids: list[int], text: str) -> bool:
    return words.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).endswith(text)


def _last_occurrence(part: list[int], whole: list[int]) -> int:
    """Where `part` begins in `whole`, the last time that it does; -1 if it does not."""
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
