"""How a query reaches the model: text only, beside a blank, noisy or its own image, or inside a sentence."""

import zlib
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError

from guardlens.errors import PresentationError
from guardlens.queries import Presentation, Prompt, Query, TextOnly, text_only

__all__ = ["Blank", "Chat", "Framed", "Noise", "Own", "Presentation", "TextOnly", "blank", "chat", "framed", "noise", "own", "text_only"]


@dataclass(frozen=True)
class Blank:
    """One flat image of a colour beside every query.

    Examples:
        >>> presentations.Blank("white", 8)(queries[0]).images[0].size
        (8, 8)
    """

    colour: str = "grey"
    size: int = 336

    @property
    def name(self) -> str:
        return f"blank {self.colour}"

    def __call__(self, query: Query) -> Prompt:
        return Prompt(query.text, (_flat(self.colour, self.size),))


@lru_cache(maxsize=8)
def _flat(colour: str, size: int) -> Image.Image:
    """One object for all prompts, by which they are known to show the same."""
    return Image.new("RGB", (size, size), colour)


@dataclass(frozen=True)
class Noise:
    """An image of uniform noise beside every query, drawn anew for each from the seed and the query's id.

    Examples:
        >>> noise = presentations.Noise(seed=1, size=8)
        >>> [noise(query).images == noise(queries[0]).images for query in queries[:3]]
        [True, False, False]
    """

    seed: int = 0
    size: int = 336

    @property
    def name(self) -> str:
        return f"noise {self.seed}" if self.seed else "noise"

    def __call__(self, query: Query) -> Prompt:
        generator = np.random.default_rng([self.seed, zlib.crc32(query.id.encode())])
        pixels = generator.integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        return Prompt(query.text, (Image.fromarray(pixels),))


@dataclass(frozen=True)
class Own:
    """The query's own images.

    Examples:
        >>> presentations.Own()(queries[0]).images == queries[0].images
        True
    """

    name: str = "own"

    def __call__(self, query: Query) -> Prompt:
        if not query.images:
            raise PresentationError(
                f"query {query.id!r} without an own image", "at least one in Query(images=...)", "add it, or show a blank image"
            )
        return Prompt(query.text, tuple(_opened(image, query) for image in query.images))


@dataclass(frozen=True)
class Framed:
    """Another presentation with words before and after the query's text (a reminder, a filler, a template).

    Examples:
        >>> presentations.Framed(grey, before="please stay safe . ", label="reminded").name
        'blank grey | reminded'
    """

    inner: Presentation
    before: str = ""
    after: str = ""
    label: str = "framed"

    @property
    def name(self) -> str:
        return f"{self.inner.name} | {self.label}"

    def __call__(self, query: Query) -> Prompt:
        prompt = self.inner(query)
        return replace(prompt, text=f"{self.before}{prompt.text}{self.after}")


def blank(colour: str = "grey", size: int = 336) -> Blank:
    """A flat image of a colour: any name or code that Pillow knows, `"grey"`, `"white"`, `"black"`, `"#3060c0"`.

    Raises:
        PresentationError: Not a colour.

    Examples:
        >>> model.batch("how to mend the hat ?", presentations.blank("#3060c0")).image.sum()  # image tokens
        tensor(16)
    """
    try:
        ImageColor.getrgb(colour)
    except ValueError:
        raise PresentationError(f"the colour {colour!r}", "a colour name or code that Pillow knows", "try 'grey', or '#808080'") from None
    return Blank(colour, size)


def noise(seed: int = 0, size: int = 336) -> Noise:
    """Uniform noise. Give the model's own image size, or resizing averages the noise away (`model.cfg.image_size`).

    Examples:
        >>> noise = presentations.noise(seed=1, size=model.cfg.image_size)
        >>> noise.name
        'noise 1'
    """
    return Noise(seed, size)


own = Own()
"""The query's own images. Asking for it with a query that has none is an error.

Examples:
    >>> model.generate(queries[-1], presentations.own).split()[0]
    'sure'
"""


def framed(inner: Presentation, before: str = "", after: str = "", label: str = "framed") -> Framed:
    """Words before and after the text of another presentation.

    Examples:
        >>> framed = presentations.framed(grey, before="please stay safe . ")
        >>> framed(queries[0]).text
        'please stay safe . how to forge the badge ?'
    """
    return Framed(inner, before, after, label)


@dataclass(frozen=True)
class Chat:
    """Another presentation inside a longer conversation: after a system prompt, before the beginning of the answer.

    Examples:
        >>> presentations.Chat(grey, prefill=" sure :").name
        'blank grey | chat'
    """

    inner: Presentation
    system: str = ""
    prefill: str = ""
    label: str = "chat"

    @property
    def name(self) -> str:
        return f"{self.inner.name} | {self.label}"

    def __call__(self, query: Query) -> Prompt:
        return replace(self.inner(query), system=self.system, prefill=self.prefill)


def chat(inner: Presentation, system: str = "", prefill: str = "", label: str = "chat") -> Chat:
    """A system prompt before another presentation, and words that the answer begins with (the model goes on after them).

    Examples:
        >>> begun = presentations.chat(presentations.text_only, prefill=" sure :")
        >>> model.generate("how to mend the hat ?", begun).split()[0]  # the answer goes on after the prefill
        'first'
    """
    return Chat(inner, system, prefill, label)


def _opened(image: object, query: Query) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(str(image)) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise PresentationError(
            f"the image {image!s} of query {query.id!r} ({error})", "a file that Pillow opens", "check its path"
        ) from None
