"""Presentations with an image before the query: a blank image, noise, or the query's own images."""

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
"""The longest side, in pixels, of a blank or noise image."""


@dataclass(frozen=True)
class Blank:
    """The same image of a single colour with every query.

    Raises:
        PresentationError: Pillow does not know the colour, the colour is transparent, or the size is not a number of pixels from 1 to 8192.

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
    """One image object for all prompts, so that equal images can be told by identity."""
    from PIL import Image

    return Image.new("RGB", (size, size), colour)


@dataclass(frozen=True)
class Noise:
    """An image of uniform noise with every query. The seed and the query's id determine the noise.

    Raises:
        PresentationError: The size is not a number of pixels from 1 to 8192, or the seed is not a whole number from 0 up.

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
    """The query's own images in RGB, rotated as their EXIF data say, with transparency on white, and 16 bits scaled to 8.

    Raises:
        PresentationError: A query has no image, or an image that Pillow cannot read or whose range of values is unknown.

    Examples:
        >>> presentations.OwnImages()(queries[0]).images == queries[0].images
        True
    """

    name: str = "own"

    def __call__(self, query: Query) -> Prompt:
        require_query(query)
        if not query.images:
            next_step = "add it, or show a blank image"
            raise PresentationError(f"query {query.id!r} without an own image", "at least one in Query(images=...)", next_step)
        return Prompt(query.text, tuple(opened(image, f"query {query.id!r}") for image in query.images))


def blank(colour: str = "grey", size: int = 336) -> Blank:
    """Present queries with an image of a single colour. Pillow knows names and codes such as `"grey"`, `"white"`, `"black"`, `"#3060c0"`.

    Raises:
        PresentationError: Pillow does not know the colour, the colour is transparent, or the size is not a number of pixels from 1 to 8192.

    Examples:
        >>> model.batch("how to mend the hat ?", presentations.blank("#3060c0")).image.sum()  # image tokens
        tensor(16)
    """
    return Blank(colour, size)


def noise(seed: int = 0, size: int = 336) -> Noise:
    """Present queries with uniform noise. Pass the model's image size, `model.cfg.image_size`, since resizing would average the noise away.

    Examples:
        >>> noise = presentations.noise(seed=1, size=model.cfg.image_size)
        >>> noise.name
        'noise 1'
    """
    return Noise(seed, size)


own_images = OwnImages()
"""The query's own images. Presenting a query without images in this way is an error.

Examples:
    >>> model.generate(queries[-1], presentations.own_images).split()[0]
    'sure'
"""
