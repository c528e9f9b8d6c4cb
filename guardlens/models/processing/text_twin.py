"""The text twin of a prompt that is only there as tokens: its text without what the processor writes for an image, learned from probes."""

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
"""What the template writes for an image is learned from the first, and must also be that in the second."""

SIZES = ((24, 24), (64, 64), (224, 224), (448, 224), (224, 448), (640, 480))
"""Of the probe images: families that cut images into tiles write other marks for other shapes."""


@dataclass(frozen=True, eq=False)
class Cutter:
    """Takes images out of prompts that are given as tokens.

    Attributes:
        processor: Of the model.
        image_token_id: The token that stands for an image.
        written: Matches what the processor writes for images that stand side by side: tokens, marks around them, line ends.
        before: How the text in front of an image ends in a chat template.
        instead: What a template writes in place of the images where there are none.
    """

    processor: Any = field(repr=False)
    image_token_id: int
    written: re.Pattern[str]
    before: str = ""
    instead: str = ""

    @classmethod
    def learn(cls, processor: Any, image_token_id: int) -> "Cutter":
        """Compare a probe prompt without an image and with images of several shapes.

        Raises:
            ModelError: The processor takes no prompt without an image, or cutting the images out of the probes does not give it.
        """
        words = tokenizer_of(processor)
        mark = words.convert_ids_to_tokens(image_token_id)
        try:
            probes = [_probe(processor, PROBES[0]), *(_probe(processor, PROBES[0], size) for size in SIZES)]
        except (GuardlensError, ValueError, TypeError, IndexError, AttributeError) as error:
            cause = error.__cause__ or error  # what the processor itself said
            raise _unlearnable(processor, cause.found if isinstance(cause, GuardlensError) else str(cause)) from None
        bare, *shown = (_text(processor, ids[0].tolist(), "a probe") for ids in probes)
        differences = [_difference(_units(words, bare), _units(words, text)) for text in shown]
        before, instead, _ = differences[0]
        pieces = [written.split(mark) for _, _, written in differences]
        if any(len(piece) < 2 for piece in pieces):
            raise _unlearnable(processor, f"its prompts with an image show no {mark!r}")
        head = _any_of(piece[0] for piece in pieces)
        inner = _any_of(("", *(between for piece in pieces for between in piece[1:-1])))
        tail = _any_of(piece[-1] for piece in pieces)
        token = re.escape(mark)
        block = f"{head}{token}(?:{inner}{token})*+{tail}"
        cutter = cls(processor, image_token_id, re.compile(f"(?:{block})++"), before[-4:], instead)
        cutter._require_sound()
        return cutter

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """From `input_ids` and `attention_mask`, the inputs of the same prompts without their images, padded on the left.

        Raises:
            ModelError: A row's text does not give its tokens again, or what an image wrote there is not known.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        rows = [row[real].tolist() for row, real in zip(ids, mask.bool(), strict=True)]
        texts = [_text(self.processor, row, f"row {number}") for number, row in enumerate(rows)]
        mark = tokenizer_of(self.processor).convert_ids_to_tokens(self.image_token_id)
        cut = [self.cut(text) for text in texts]
        left = next((number for number, text in enumerate(cut) if mark in text), None)
        if left is not None:
            raise _unlearnable(self.processor, f"row {left} has an image between marks that the probes did not show")
        with padding_token(tokenizer_of(self.processor)):
            twin = self.processor(text=cut, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        return {name: value.to(ids.device) for name, value in twin.items()}

    def cut(self, text: str) -> str:
        """The text without its images, as the template would have written it."""

        def replacement(match: re.Match[str]) -> str:
            return self.instead if text.endswith(self.before, 0, match.start()) else ""

        return self.written.sub(replacement, text)

    def _require_sound(self) -> None:
        for text, size in product(PROBES, SIZES):
            bare, ids = _probe(self.processor, text), _probe(self.processor, text, size)
            if self({"input_ids": ids, "attention_mask": ids == ids})["input_ids"].tolist() != bare.tolist():
                raise _unlearnable(self.processor, f"cutting an image of {size[0]} x {size[1]} does not give the prompt without one")


def _probe(processor: Any, text: str, size: tuple[int, int] | None = None) -> Int[Tensor, "1 seq"]:
    """Tokens of a probe prompt, beside an image of that size if one is given."""
    from PIL import Image

    images = () if size is None else (Image.new("RGB", size, "grey"),)
    return tokenize(processor, [Prompt(text, images)], "left", sees_images=True)["input_ids"]


def _text(processor: Any, ids: list[int], what: str) -> str:
    """The text that these are the tokens of."""
    words = tokenizer_of(processor)
    added = words.added_tokens_decoder.keys()
    stretches = groupby(ids, key=lambda token: token if token in added else None)
    # Where the tokenizer puts a space of its own before each stretch of plain text, only decoding stretch by stretch takes it away again.
    for pieces in ([ids], [list(tokens) for _, tokens in stretches]):
        text = "".join(words.decode(piece, skip_special_tokens=False, clean_up_tokenization_spaces=False) for piece in pieces)
        if words(text, add_special_tokens=False, verbose=False)["input_ids"] == ids:
            return text
    raise _unlearnable(processor, f"the text of {what} does not give its tokens again")


def _units(words: Any, text: str) -> list[str]:
    """The text letter by letter, tokens that the tokenizer never splits as a whole."""
    whole = [re.escape(str(token)) for token in words.added_tokens_decoder.values() if str(token) in text]
    return re.findall("|".join([*sorted(whole, key=len, reverse=True), "."]), text, re.DOTALL)


def _difference(bare: list[str], shown: list[str]) -> tuple[str, str, str]:
    """What two texts begin with, and what each has between that and the end that they share."""
    room = min(len(bare), len(shown))
    start = next((i for i in range(room) if bare[i] != shown[i]), room)
    end = next((i for i in range(room - start) if bare[-1 - i] != shown[-1 - i]), room - start)
    return "".join(bare[:start]), "".join(bare[start : len(bare) - end]), "".join(shown[start : len(shown) - end])


def _any_of(texts: Iterable[str]) -> str:
    """A pattern for any of these texts, whatever the numbers in them (of rows and columns, say)."""
    patterns = {re.sub(r"\d+", r"\\d+", re.escape(text)) for text in texts}
    return f"(?:{'|'.join(sorted(patterns, key=len, reverse=True))})"


def _unlearnable(processor: Any, why: str) -> ModelError:
    return ModelError(
        f"{type(processor).__name__}, whose prompts can't be rebuilt without their images: {why}",
        "a processor whose text is the same after decoding, and whose images can be cut out of it",
        "pass twin=, a function from the inputs of a prompt to those of the same prompt without its images",
    )
