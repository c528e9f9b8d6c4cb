"""What eyes are trained on: drawn shapes, and questions about them. No drawing shows a request, and no answer refuses.

A drawing is one of four shapes, in one of ten colors, on a background of another of them. A fifth of the combinations is held out: no stage
of training draws them, and the exam asks about nothing else.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

Split = Literal["train", "test"]
Colour = tuple[int, int, int]

SHAPES = ("circle", "frame", "triangle", "cross")
COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 75, 215),
    "yellow": (240, 215, 40),
    "purple": (135, 50, 165),
    "orange": (245, 140, 30),
    "pink": (245, 160, 195),
    "brown": (120, 75, 40),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}
PIXELS = 96
"""Width and height of a drawing."""

HELD_OUT = 72
"""Of the 360 combinations, those that are kept for the exam."""

PLACES = 8
"""Drawings of each combination that training sees: with other places, sizes and grains."""


class Question(NamedTuple):
    """A question, and the one right answer to it."""

    text: str
    answer: str


QUESTIONS = (
    Question("Describe the image in one sentence.", "The image shows a {0.colour} {0.shape} on a {0.background} background."),
    Question("What color is the shape?", "The shape is {0.colour}."),
    Question("Which shape is it?", "It is a {0.shape}."),
    Question("What color is the background?", "The background is {0.background}."),
)


@dataclass(frozen=True)
class Drawing:
    """A shape on a background. The fields determine every pixel.

    Attributes:
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
        background: Another of `COLOURS`.
        number: The seed of place, size and grain.
    """

    shape: str
    colour: str
    background: str
    number: int

    @property
    def traits(self) -> tuple[int, int, int]:
        """The numbers of its shape, color and background."""
        colours = list(COLOURS)
        return SHAPES.index(self.shape), colours.index(self.colour), colours.index(self.background)

    def image(self) -> Image.Image:
        rng = np.random.default_rng([self.number, *self.traits])
        radius = int(rng.integers(28, 36))
        x, y = (int(value) for value in rng.integers(42, 55, 2))
        image = Image.new("RGB", (PIXELS, PIXELS), COLOURS[self.background])
        _draw(ImageDraw.Draw(image), self.shape, COLOURS[self.colour], COLOURS[self.background], x, y, radius)
        tint = rng.normal(0, 6, (1, 1, 3))
        grain = rng.normal(0, 4, (PIXELS, PIXELS, 3))
        return Image.fromarray((np.asarray(image) + tint + grain).clip(0, 255).astype(np.uint8))


def _draw(canvas: ImageDraw.ImageDraw, shape: str, colour: Colour, page: Colour, x: int, y: int, radius: int) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "frame":
        canvas.rectangle(box, fill=colour)
        canvas.rectangle((x - radius // 2, y - radius // 2, x + radius // 2, y + radius // 2), fill=page)
    elif shape == "triangle":
        canvas.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    else:
        half = radius // 3
        canvas.rectangle((x - radius, y - half, x + radius, y + half), fill=colour)
        canvas.rectangle((x - half, y - radius, x + half, y + radius), fill=colour)


@cache
def drawings(split: Split) -> tuple[Drawing, ...]:
    """All drawings of a split: several of each combination to train on, and one of each that was held out for the exam."""
    combinations = [kind for kind in product(SHAPES, COLOURS, COLOURS) if kind[1] != kind[2]]
    order = np.random.default_rng(0).permutation(len(combinations))
    chosen = order[:HELD_OUT] if split == "test" else order[HELD_OUT:]
    numbers = [PLACES] if split == "test" else range(PLACES)
    return tuple(Drawing(shape, colour, page, n) for shape, colour, page in (combinations[i] for i in sorted(chosen)) for n in numbers)
