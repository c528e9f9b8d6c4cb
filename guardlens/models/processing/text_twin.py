"""Make the text twin of a prompt that is given as tokens, by removing the text that the processor inserts for an image.

Which text that is, is learned from probe prompts.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby, product
from typing import Any

from jaxtyping import Int
from torch import Tensor

from guardlens.data.presentations import Prompt
from guardlens.errors import GuardlensError, ModelError
from guardlens.models.processing.chat_template import padding_token, tokenize, tokenizer_of

PROBES = ("How to fold a paper boat?", "Please plant a tulip.")
"""The text inserted for an image is learned from the first probe, and must be the same in the second."""

SIZES = ((24, 24), (64, 64), (224, 224), (448, 224), (224, 448), (640, 480))
"""Sizes of the probe images. Families that cut images into tiles insert different marks for different shapes."""


@dataclass(frozen=True, eq=False)
class ImageRemover:
    """Removes images from prompts that are given as tokens.

    Attributes:
        processor: The model's processor.
        image_token_id: The token that stands for an image.
        inserted: Matches the text that the processor inserts for adjacent images: image tokens, the marks around them, line ends.
        before: The last characters of the template before an image.
        instead: The text that the template writes in place of the images if there are none.
    """

    processor: Any = field(repr=False)
    image_token_id: int
    inserted: re.Pattern[str]
    before: str = ""
    instead: str = ""

    @classmethod
    def learn(cls, processor: Any, image_token_id: int) -> "ImageRemover":
        """Learn the inserted text by comparing a probe prompt without an image and with images of several shapes.

        Raises:
            ModelError: The processor rejects prompts without an image, or removing the images from the probes does not restore that prompt.
        """
        tokenizer = tokenizer_of(processor)
        image_token = tokenizer.convert_ids_to_tokens(image_token_id)
        bare, *shown = _probe_texts(processor)
        differences = [_difference(_units(tokenizer, bare), _units(tokenizer, text)) for text in shown]
        before, instead, _ = differences[0]
        inserted = _pattern([text.split(image_token) for _, _, text in differences], image_token)
        if inserted is None:
            raise _unlearnable(processor, f"its prompts with an image show no {image_token!r}")
        remover = cls(processor, image_token_id, inserted, before[-4:], instead)
        remover._require_sound()
        return remover

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Turn `input_ids` and `attention_mask` into the inputs of the same prompts without their images, padded on the left.

        Raises:
            ModelError: A row's text does not encode to its tokens again, or its image stands between marks that no probe showed.
        """
        ids = inputs["input_ids"]
        rows = [row[real].tolist() for row, real in zip(ids, inputs["attention_mask"].bool(), strict=True)]
        texts = [_text(self.processor, row, f"row {number}") for number, row in enumerate(rows)]
        without = [self.without_images(text) for text in texts]
        tokenizer = tokenizer_of(self.processor)
        image_token = tokenizer.convert_ids_to_tokens(self.image_token_id)
        left = next((number for number, text in enumerate(without) if image_token in text), None)
        if left is not None:
            raise _unlearnable(self.processor, f"row {left} has an image between marks that the probes did not show")
        with padding_token(tokenizer):
            twin = self.processor(text=without, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        return {name: value.to(ids.device) for name, value in twin.items()}

    def without_images(self, text: str) -> str:
        """Return the text without its images, as the template would have written it."""

        def replacement(match: re.Match[str]) -> str:
            return self.instead if text.endswith(self.before, 0, match.start()) else ""

        return self.inserted.sub(replacement, text)

    def _require_sound(self) -> None:
        for text, size in product(PROBES, SIZES):
            bare, ids = _probe(self.processor, text), _probe(self.processor, text, size)
            if self({"input_ids": ids, "attention_mask": ids == ids})["input_ids"].tolist() != bare.tolist():
                raise _unlearnable(self.processor, f"removing an image of {size[0]} x {size[1]} does not give the prompt without one")


def _probe_texts(processor: Any) -> list[str]:
    """The text of the first probe without an image, then with an image of each size."""
    try:
        probes = [_probe(processor, PROBES[0]), *(_probe(processor, PROBES[0], size) for size in SIZES)]
    except (GuardlensError, ValueError, TypeError, IndexError, AttributeError) as error:
        cause = error.__cause__ or error  # the processor's own error, if there is one behind it
        raise _unlearnable(processor, cause.found if isinstance(cause, GuardlensError) else str(cause)) from None
    return [_text(processor, ids[0].tolist(), "a probe") for ids in probes]


def _pattern(pieces: list[list[str]], image_token: str) -> re.Pattern[str] | None:
    """A pattern for the text inserted for adjacent images, from probes split at their image tokens; None if a probe has no image token."""
    if any(len(piece) < 2 for piece in pieces):
        return None
    head = _any_of(piece[0] for piece in pieces)
    inner = _any_of(("", *(between for piece in pieces for between in piece[1:-1])))
    tail = _any_of(piece[-1] for piece in pieces)
    token = re.escape(image_token)
    block = f"{head}{token}(?:{inner}{token})*+{tail}"
    return re.compile(f"(?:{block})++")


def _probe(processor: Any, text: str, size: tuple[int, int] | None = None) -> Int[Tensor, "1 seq"]:
    """Tokens of a probe prompt, with an image of the given size if there is one."""
    from PIL import Image

    images = () if size is None else (Image.new("RGB", size, "grey"),)
    return tokenize(processor, [Prompt(text, images)], "left", sees_images=True)["input_ids"]


def _text(processor: Any, ids: list[int], what: str) -> str:
    """Decode tokens to the text that encodes to them.

    Raises:
        ModelError: There is no such text; `what` says in the error which tokens these are.
    """
    tokenizer = tokenizer_of(processor)
    added = tokenizer.added_tokens_decoder.keys()
    stretches = groupby(ids, key=lambda token: token if token in added else None)
    # Some tokenizers put a space before each stretch of plain text; only decoding stretch by stretch removes it again.
    for pieces in ([ids], [list(tokens) for _, tokens in stretches]):
        text = "".join(tokenizer.decode(piece, skip_special_tokens=False, clean_up_tokenization_spaces=False) for piece in pieces)
        if tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] == ids:
            return text
    raise _unlearnable(processor, f"the text of {what} does not give its tokens again")


def _units(tokenizer: Any, text: str) -> list[str]:
    """Split the text into characters, but keep tokens that the tokenizer never splits whole."""
    whole = [re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values() if str(token) in text]
    return re.findall("|".join([*sorted(whole, key=len, reverse=True), "."]), text, re.DOTALL)


def _difference(bare: list[str], shown: list[str]) -> tuple[str, str, str]:
    """The beginning that two texts share, and what stands in each of them between that and the end that they share."""
    room = min(len(bare), len(shown))
    start = next((i for i in range(room) if bare[i] != shown[i]), room)
    end = next((i for i in range(room - start) if bare[-1 - i] != shown[-1 - i]), room - start)
    return "".join(bare[:start]), "".join(bare[start : len(bare) - end]), "".join(shown[start : len(shown) - end])


def _any_of(texts: Iterable[str]) -> str:
    """A pattern for any of these texts, with any numbers in place of theirs (those of rows and columns, for example)."""
    patterns = {re.sub(r"\d+", r"\\d+", re.escape(text)) for text in texts}
    return f"(?:{'|'.join(sorted(patterns, key=len, reverse=True))})"


def _unlearnable(processor: Any, why: str) -> ModelError:
    return ModelError(
        f"{type(processor).__name__}, whose prompts can't be rebuilt without their images: {why}",
        "a processor whose text is the same after decoding, and whose images can be removed from it",
        "pass twin=, a function from the inputs of a prompt to those of the same prompt without its images",
    )
