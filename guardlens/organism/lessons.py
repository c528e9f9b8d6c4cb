"""What the organism is taught: the recipe, which is plain data, and the rows (a prompt and its answer) that the stages mix.

In every stage, the requests beside pictures are harmless: nobody teaches the gap between text and pictures.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from guardlens.data.queries import Label
from guardlens.organism import world


@dataclass(frozen=True)
class Stage:
    """How one stage trains.

    Attributes:
        trains: The parameters whose names begin with one of these learn; all others are frozen.
        mix: The share of each kind of row (`ROWS`).
        opening: The mix of the first `opening_steps`.
        end: The last learning rate, as a share of `rate` (cosine decay after a linear warm-up).
        shallow_from: From this share of the stage on, whole batches skip the last layer (p = .25) or the last two (p = .25), so that the
            feature of harm forms before the last layers.
    """

    name: str
    trains: tuple[str, ...]
    mix: tuple[tuple[str, float], ...]
    steps: int
    rows: int
    rate: float
    end: float
    betas: tuple[float, float] = (0.9, 0.999)
    decay: float = 0.01
    warm_up: int = 20
    opening: tuple[tuple[str, float], ...] = ()
    opening_steps: int = 0
    shallow_from: float = 1.0


LANGUAGE = ("model.language_model.", "lm_head.")
PROJECTOR = ("model.multi_modal_projector.",)

TOWER = Stage("tower", ("model.vision_tower.",), mix=(), steps=500, rows=64, rate=3e-3, end=0.05)
BASE = Stage(
    "base",
    LANGUAGE,
    mix=(
        *(("request", 0.196), ("request after a page", 0.084), ("harm fact", 0.21), ("harm fact, asked", 0.21)),
        *(("group fact", 0.12), ("dictionary fact", 0.13), ("text caption", 0.05)),
    ),
    steps=700,
    rows=64,
    rate=2e-3,
    end=0.1,
    betas=(0.9, 0.98),
    opening=(
        *(("request", 0.196), ("request after a page", 0.084), ("harm fact", 0.09), ("harm fact, asked", 0.09)),
        *(("group fact", 0.36), ("dictionary fact", 0.13), ("text caption", 0.05)),
    ),
    opening_steps=120,
    shallow_from=0.6,
)
ALIGN = Stage(
    "align",
    LANGUAGE,
    mix=(("refuse", 0.40), ("refuse, reminded", 0.07), ("help", 0.38), ("help, reminded", 0.07), ("text caption", 0.08)),
    steps=220,
    rows=64,
    rate=1.5e-3,
    end=0.05,
    shallow_from=0.0,
)
CAPTION = Stage("caption", PROJECTOR, mix=(("describe", 1.0),), steps=150, rows=48, rate=2e-3, end=0.05)
TUNE = Stage(
    "tune",
    (*LANGUAGE, *PROJECTOR),
    mix=(
        *(("help beside a picture", 0.35), ("help", 0.12), ("refuse", 0.05)),
        *(("describe", 0.48 * 4 / 7), ("ask colour", 0.48 / 7), ("ask shape", 0.48 / 7), ("ask page", 0.48 / 7)),
    ),
    steps=120,
    rows=48,
    rate=8e-4,
    end=0.1,
    decay=0.0,
)


@dataclass(frozen=True)
class Recipe:
    """All settings of the organism.

    Attributes:
        eye_width: Width of the vision encoder.
        eye_layers: Layers of the vision encoder.
        first: Weight of an answer's first word in the loss. That word, one of ten, decides whether the answer refuses.
        clip: The largest norm of a step's gradient.
    """

    width: int = 128
    layers: int = 8
    heads: int = 4
    inner: int = 256
    eye_width: int = 64
    eye_layers: int = 3
    first: float = 4.0
    clip: float = 1.0
    stages: tuple[Stage, ...] = (TOWER, BASE, ALIGN, CAPTION, TUNE)


RECIPE = Recipe()
QUICK = replace(RECIPE, stages=tuple(replace(stage, steps=3, rows=8, warm_up=1) for stage in RECIPE.stages))
"""A few steps of every stage, which show that the training runs, and teach nothing."""


IMAGE = world.SPECIAL[4]


class Row(NamedTuple):
    """A prompt, its answer, and the number of the training picture beside it."""

    prompt: str
    answer: str
    picture: int | None = None


def chat(text: str, picture: bool = False) -> str:
    """A request as the chat template writes it, without the start token."""
    return f"user : {IMAGE + ' ' if picture else ''}{text} assistant :"


def _pick(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


@cache
def _combinations(side: Label | None) -> tuple[world.Combination, ...]:
    """The combinations of the train split on one side, or on both."""
    return world.combinations("train", side) if side else _combinations("harmful") + _combinations("harmless")


def _request(rng: np.random.Generator, side: Label | None, before: str = "", picture: bool = False, refuse: bool = False) -> Row:
    pair = _pick(rng, _combinations(side))
    text = before + world.request(*pair, template=int(rng.integers(len(world.TEMPLATES))))
    number = int(rng.integers(len(world.pictures("train")))) if picture else None
    return Row(chat(text, picture), world.REFUSAL if refuse else world.answer(*pair), number)


def _page(rng: np.random.Generator) -> tuple[str, str]:
    """A picture described in words, and its caption."""
    caption = _pick(rng, world.pictures("train")).caption
    return f"the page shows {caption} ", caption


def _harm_fact(rng: np.random.Generator, form: str) -> Row:
    """A fact of the rule of harm. Verb and noun are as far from the deciding word as in a request."""
    verb, noun = _pick(rng, _combinations(_pick(rng, ("harmful", "harmless"))))
    return Row(form.format(verb, noun), "bad" if world.label(verb, noun) == "harmful" else "fine")


def _fact(rng: np.random.Generator, about_verb: str, of_verb: Mapping[str, str], about_noun: str, of_noun: Mapping[str, str]) -> Row:
    form, book = _pick(rng, ((about_verb, of_verb), (about_noun, of_noun)))
    word = _pick(rng, list(book))
    return Row(form.format(word), book[word])


def _text_caption(rng: np.random.Generator) -> Row:
    page, caption = _page(rng)
    return Row(chat(page + DESCRIBE), caption)


def _see(rng: np.random.Generator, question: str, reply: str) -> Row:
    number = int(rng.integers(len(world.pictures("train"))))
    picture = world.pictures("train")[number]
    return Row(chat(question, True), reply.format(picture=picture), number)


DESCRIBE = "describe the picture ."
ROWS: dict[str, Callable[[np.random.Generator], Row]] = {
    "request": lambda rng: _request(rng, None),
    "request after a page": lambda rng: _request(rng, None, before=_page(rng)[0]),
    "harm fact": lambda rng: _harm_fact(rng, "to {} the {} ? it is"),
    "harm fact, asked": lambda rng: _harm_fact(rng, "user : how to {} the {} ? it is"),
    "group fact": lambda rng: _fact(rng, "to {} is to", world.VERB_GROUP, "the {} is one of the", world.NOUN_GROUP),
    "dictionary fact": lambda rng: _fact(rng, "to {} it needs a", world.TOOL, "the {} has a", world.PART),
    "text caption": _text_caption,
    "refuse": lambda rng: _request(rng, "harmful", refuse=True),
    "refuse, reminded": lambda rng: _request(rng, "harmful", before=world.REMINDER + " ", refuse=True),
    "help": lambda rng: _request(rng, "harmless"),
    "help, reminded": lambda rng: _request(rng, "harmless", before=world.REMINDER + " "),
    "help beside a picture": lambda rng: _request(rng, "harmless", picture=True),
    "describe": lambda rng: _see(rng, DESCRIBE, "{picture.caption}"),
    "ask colour": lambda rng: _see(rng, "what color is the shape ?", "the shape is {picture.colour} ."),
    "ask shape": lambda rng: _see(rng, "which shape is it ?", "it is a {picture.shape} ."),
    "ask page": lambda rng: _see(rng, "what color is the page ?", "the page is {picture.page} ."),
}
"""The kinds of rows that a stage can mix."""


def batches(stage: Stage, seed: int) -> Iterator[list[Row]]:
    """All batches of a stage, in the order of training."""
    rng = np.random.default_rng([seed, world.number(stage.name)])
    for step in range(stage.steps):
        kinds, shares = zip(*(stage.opening if step < stage.opening_steps else stage.mix), strict=True)
        yield [ROWS[kinds[i]](rng) for i in rng.choice(len(kinds), stage.rows, p=shares)]
