"""Presentations that show a query beside an image: a blank one, noise, or its own images."""

import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from guardlens.data.images import opened
from guardlens.data.presentations.protocol import Prompt
from guardlens.data.queries import Query, as_text, require_query
from guardlens.errors import PresentationError, as_count, quoted

if TYPE_CHECKING:
    from PIL import Image

LARGEST = 8192
"""Pixels a side of an image that is made here."""


@dataclass(frozen=True)
class Blank:
    """One flat image of a colour beside every query.

    Raises:
        PresentationError: Not an opaque colour that Pillow knows, or a size that is no number of pixels from 1 to 8192.

    Examples:
        >>> presentations.Blank("white", 8)(queries[0]).images[0].size
        (8, 8)
    """

    colour: str = "grey"
    size: int = 336

    def __post_init__(self) -> None:
        from PIL import ImageColor

        try:
            rgb = ImageColor.getrgb(as_text(self.colour, "a colour", PresentationError))
        except ValueError:
            rgb = None
        if rgb is None or len(rgb) > 3:
            raise PresentationError(
                f"the colour {quoted(self.colour)}", "an opaque colour that Pillow knows by name or code", "try 'grey', or '#808080'"
            )
        _set_size(self)

    @property
    def name(self) -> str:
        return f"blank {self.colour}"

    def __call__(self, query: Query) -> Prompt:
        require_query(query)
        return Prompt(query.text, (_flat(self.colour, self.size),))


def _set_size(shown: "Blank | Noise") -> None:
    size = as_count(shown.size, "size", PresentationError, "give the model's own image size, model.cfg.image_size")
    if size > LARGEST:
        raise PresentationError(f"size={size}", f"at most {LARGEST} pixels a side", "models scale images down to a few hundred")
    object.__setattr__(shown, "size", size)


@lru_cache(maxsize=8)
def _flat(colour: str, size: int) -> "Image.Image":
    """One object for all prompts, by which they are known to show the same."""
    from PIL import Image

    return Image.new("RGB", (size, size), colour)


@dataclass(frozen=True)
class Noise:
    """An image of uniform noise beside every query, drawn anew for each from the seed and the query's id.

    Raises:
        PresentationError: A size that is no number of pixels from 1 to 8192, or a seed that is no whole number from 0 up.

    Examples:
        >>> noise = presentations.Noise(seed=1, size=8)
        >>> [noise(query).images == noise(queries[0]).images for query in queries[:3]]
        [True, False, False]
    """

    seed: int = 0
    size: int = 336

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", as_count(self.seed, "seed", PresentationError, "noise(seed=0)", least=0))
        _set_size(self)

    @property
    def name(self) -> str:
        return f"noise {self.seed}" if self.seed else "noise"

    def __call__(self, query: Query) -> Prompt:
        from PIL import Image

        require_query(query)
        generator = np.random.default_rng([self.seed, zlib.crc32(query.id.encode())])
        pixels = generator.integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        return Prompt(query.text, (Image.fromarray(pixels),))


@dataclass(frozen=True)
class OwnImages:
    """The query's own images, in RGB: turned as their EXIF data say, transparency on white, 16 bits scaled to 8.

    Raises:
        PresentationError: A query without an image, or with one that Pillow can't read or whose black and white are not known.

    Examples:
        >>> presentations.OwnImages()(queries[0]).images == queries[0].images
        True
    """

    name: str = "own"

    def __call__(self, query: Query) -> Prompt:
        require_query(query)
        if not query.images:
            raise PresentationError(
                f"query {query.id!r} without an own image", "at least one in Query(images=...)", "add it, or show a blank image"
            )
        return Prompt(query.text, tuple(opened(image, f"query {query.id!r}") for image in query.images))


def blank(colour: str = "grey", size: int = 336) -> Blank:
    """A flat image of a colour: any name or code that Pillow knows, `"grey"`, `"white"`, `"black"`, `"#3060c0"`.

    Raises:
        PresentationError: Not a colour, or no size.

    Examples:
        >>> model.batch("how to mend the hat ?", presentations.blank("#3060c0")).image.sum()  # image tokens
        tensor(16)
    """
    return Blank(colour, size)


def noise(seed: int = 0, size: int = 336) -> Noise:
    """Uniform noise. Give the model's own image size, or resizing averages the noise away (`model.cfg.image_size`).

    Examples:
        >>> noise = presentations.noise(seed=1, size=model.cfg.image_size)
        >>> noise.name
        'noise 1'
    """
    return Noise(seed, size)


own_images = OwnImages()
"""The query's own images. Asking for it with a query that has none is an error.

Examples:
    >>> model.generate(queries[-1], presentations.own_images).split()[0]
    'sure'
"""
