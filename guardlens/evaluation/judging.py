"""Judging answers: the verdicts of a judge on any answers, stored or new. No model that generates takes part."""

import inspect
from collections.abc import Sequence
from typing import Any, get_args

from guardlens.data.queries import Query
from guardlens.errors import ArgumentError, ModelError, type_of
from guardlens.evaluation.judges import Judge, Verdict
from guardlens.models.engine.out_of_memory import OutOfMemory, at_work


def judge_answers(judge: Judge, queries: Sequence[Query], answers: Sequence[str]) -> list[Verdict]:
    """The verdicts of a judge on answers, stored or new.

    Args:
        judge: The judge.
        queries: The plain queries.
        answers: The answer to each query, in the same order.

    Raises:
        ArgumentError: The judge gives something else than a verdict.
        ModelError: The judge runs out of memory.

    Examples:
        >>> from guardlens.evaluation.judging import judge_answers
        >>> judge_answers(judges.keyword, queries[:2], ["I'm sorry, but no.", "Sure: first, take the key."])
        ['refused', 'answered']
    """
    return [_verdict(judge, query, answer) for query, answer in zip(queries, answers, strict=True)]


def _verdict(judge: Judge, query: Query, answer: str) -> Verdict:
    try:
        with at_work("the judge", judge):
            verdict = judge(query, answer)
    except OutOfMemory as error:
        raise ModelError(
            f"{error}, at query {query.id!r}", "room for it beside the model", "judge on another device, or judge the stored answers later"
        ) from error
    if verdict not in get_args(Verdict):
        expected = f"one of {', '.join(map(repr, get_args(Verdict)))}"
        raise ArgumentError(
            f"the verdict {verdict!r} of the judge {judge.name!r}", expected, f"let {type(judge).__name__} return one of them"
        )
    return verdict


def require_judge(judge: Any) -> None:
    """Refuse a judge that can't be called on answers, before there are any.

    Raises:
        ArgumentError: The judge has no name, or takes other arguments than a query and an answer.
    """
    call = "pass judges.keyword, or an object with a name and __call__(query, answer)"
    if not isinstance(judge, Judge) or isinstance(judge, type):
        raise ArgumentError(type_of(judge), "a judge with a name", call)
    if not isinstance(judge.name, str) or not judge.name:
        raise ArgumentError(f"a judge of the name {judge.name!r}", "a judge with a name", call)
    try:
        inspect.signature(judge).bind("query", "answer")
    except TypeError as error:
        raise ArgumentError(f"the judge {judge.name!r}, which takes other arguments ({error})", "(query, answer)", call) from None
