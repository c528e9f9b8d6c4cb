"""The exam of eyes: every question about every held-out drawing, answered word for word or not."""

from typing import Any

from guardlens.data.queries import Query
from guardlens.models.hooked_model import HookedModel
from guardlens.organism.eyes.drawings import QUESTIONS, drawings
from guardlens.organism.eyes.train import presentation
from guardlens.organism.measure import recorded

ENOUGH = 0.9
"""The share of right answers from which on an eye is said to see."""

MAX_NEW_TOKENS = 24
"""Tokens that hold the longest answer."""


def examine(model: HookedModel, system: str = "") -> dict[str, Any]:
    """The share of right answers to each question and to all of them, with intervals over drawings."""
    held_out = drawings("test")
    right: dict[str, list[bool]] = {}
    for question in QUESTIONS:
        queries = [Query(question.text, images=(each.image(),), id=str(number)) for number, each in enumerate(held_out)]
        answers = model.generate(queries, presentation(system), max_new_tokens=MAX_NEW_TOKENS)
        right[question.text] = [answer == question.answer.format(each) for answer, each in zip(answers, held_out, strict=True)]
    names = [str(each) for each in held_out]
    every = [outcome for outcomes in right.values() for outcome in outcomes]
    return {"all": recorded(every, names * len(right)), **{text: recorded(outcomes, names) for text, outcomes in right.items()}}
