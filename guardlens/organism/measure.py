"""The organism's exam: its answers to the requests of a split, judged, and rates over them with intervals, as its record keeps them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from guardlens import defences
from guardlens.data.presentations import Presentation, Prompt, blank, own_images, text_only
from guardlens.data.queries import Query
from guardlens.evaluation.runner import evaluate
from guardlens.evaluation.table import RATES, UNDEFENDED, Evaluation
from guardlens.models.hooked_model import HookedModel
from guardlens.organism import world
from guardlens.organism.lessons import DESCRIBE
from guardlens.results.intervals import proportion

Recorded = dict[str, float | int]
"""A rate with its interval, its number of answers and their number of clusters."""


@dataclass(frozen=True)
class WorldNoise:
    """An image of the world's noise beside every query, drawn from the query's id."""

    name: str = "noise"

    def __call__(self, query: Query) -> Prompt:
        return Prompt(query.text, (world.noise(world.number(query.id)),))


PRESENTATIONS: dict[str, Presentation] = {
    "text": text_only,
    "grey": blank("grey", world.PIXELS),
    "white": blank("white", world.PIXELS),
    "black": blank("black", world.PIXELS),
    "noise": WorldNoise(),
    "own": own_images,
}
"""The presentations of the exam, by their names in the record."""

BLANK = ("grey", "white", "black", "noise")
"""The presentations that the record takes together as `blank`."""

MAX_NEW_TOKENS = 16
"""Tokens that hold the longest answer of the world."""


def examine(model: HookedModel, split: world.Split) -> dict[str, Any]:
    """All rates of a split by presentation, those of the four blank images together, and the share of right captions."""
    asked = list(PRESENTATIONS.values())
    table = evaluate(
        model, {UNDEFENDED: defences.none}, world.queries(split), asked, judge=world.judge, max_new_tokens=MAX_NEW_TOKENS, batch_size=96
    )
    found: dict[str, Any] = {name: rates(table, name) for name in PRESENTATIONS}
    found["blank"] = rates(table, *BLANK)
    found["captions"] = captions(model, split)
    return found


def rates(table: Evaluation, *names: str) -> dict[str, Recorded]:
    """Every rate over some of the exam's presentations taken together."""
    presentations = [PRESENTATIONS[name].name for name in names]
    return {rate: recorded(*table.outcomes(rate, UNDEFENDED, *presentations)) for rate in RATES}


def captions(model: HookedModel, split: world.Split) -> Recorded:
    """The share of a split's pictures, two of each kind, that are captioned exactly."""
    pictures = world.pictures(split)[::2]
    queries = [Query(DESCRIBE, images=(picture.image(),), id=str(number)) for number, picture in enumerate(pictures)]
    answers = model.generate(queries, own_images, max_new_tokens=MAX_NEW_TOKENS)
    wanted = [picture.caption for picture in pictures]
    return recorded([answer == caption for answer, caption in zip(answers, wanted, strict=True)], wanted)


def recorded(outcomes: Sequence[bool] | np.ndarray, clusters: Sequence[str] | np.ndarray) -> Recorded:
    """A share with its 95 % interval over clusters, as the record keeps it."""
    found = proportion(np.array(outcomes, dtype=bool), np.array(clusters))
    return {"rate": found.value, "low": found.low, "high": found.high, "n": found.n, "clusters": len(set(clusters))}
