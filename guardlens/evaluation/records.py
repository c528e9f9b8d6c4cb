"""Records of judged answers: what one holds, which ones a call has use for, which answers are missing, and what they depend on."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, get_args

from guardlens.data.presentations import Presentation
from guardlens.data.queries import Query
from guardlens.evaluation.answers import Answer
from guardlens.evaluation.conditions import Condition
from guardlens.evaluation.judges import Judge, Verdict
from guardlens.evaluation.table import COLUMNS
from guardlens.models.content_digest import content
from guardlens.models.engine.generation_options import generation_settings
from guardlens.models.hooked_model import HookedModel
from guardlens.models.identity import configuration, digest_of_prompts, of_intervention

Record = dict[str, Any]
"""One row of the table, as it is written to disk."""


def record(answer: Answer, verdict: Verdict) -> Record:
    """The record of a judged answer."""
    defence, draw, presentation = answer.condition.key
    return {
        "defence": defence,
        "draw": draw,
        "presentation": presentation,
        "query": answer.query.id,
        "label": answer.query.label,
        "cluster": _cluster(answer.query),
        "verdict": verdict,
        "gate": answer.gate,
        "answer": answer.text,
    }


def _cluster(query: Query) -> str:
    return query.cluster or query.id


def missing(conditions: Sequence[Condition], queries: Sequence[Query], records: Iterable[Record]) -> list[tuple[Condition, list[Query]]]:
    """The work that is left: each condition with the queries of which there is no record."""
    done = {(record["defence"], record["draw"], record["presentation"], record["query"]) for record in records}
    return [(condition, [query for query in queries if (*condition.key, query.id) not in done]) for condition in conditions]


def key_of(conditions: Sequence[Condition], queries: Sequence[Query]) -> Callable[[Record], Hashable]:
    """A function that identifies a record by condition and query. It gives None if this call does not ask for such a record."""
    keys = {condition.key for condition in conditions}
    by_id = {query.id: query for query in queries}

    def key(found: Record) -> Hashable:
        condition = (found["defence"], found["draw"], found["presentation"])
        query = by_id[found["query"]]
        is_wanted = condition in keys and found["label"] == query.label and found["cluster"] == _cluster(query)
        return (*condition, query.id) if is_wanted and _is_whole(found) else None

    return key


def _is_whole(found: Record) -> bool:
    return (
        found["verdict"] in get_args(Verdict)
        and isinstance(found["gate"], float)
        and isinstance(found["answer"], str)
        and len(found) == len(COLUMNS)
    )


def in_call_order(
    records: Iterable[Record], defences: Iterable[str], presentations: Sequence[Presentation], queries: Sequence[Query]
) -> list[Record]:
    """The records in the order of the call, so that a resumed run gives the same table as an undisturbed one."""
    defence_place = {name: place for place, name in enumerate(defences)}
    presentation_place = {presentation.name: place for place, presentation in enumerate(presentations)}
    query_place = {query.id: place for place, query in enumerate(queries)}

    def place(found: Record) -> tuple[int, int, int, int]:
        condition = defence_place[found["defence"]], presentation_place[found["presentation"]]
        return (*condition, query_place[found["query"]], found["draw"])

    return sorted(records, key=place)


def depends_on(
    model: HookedModel,
    conditions: Sequence[Condition],
    queries: Sequence[Query],
    presentations: Sequence[Presentation],
    judge: Judge,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Everything that determines the records of a run. A run directory refuses to resume if any of it differs.

    Raises:
        PresentationError: A presentation shows a query differently every time.
        StorageError: The judge, or a custom edit without a name, can't be told apart from another one.
    """
    facts = configuration(model, queries, presentations)
    digests = {id(each): facts["presentations"][each.name]["shows"] for each in presentations}
    for condition in conditions:
        if id(condition.shown) not in digests:
            digests[id(condition.shown)] = digest_of_prompts(condition.shown, queries)
    return {
        **facts,
        "judge": {"name": judge.name, "content": content(judge, f"the judge {judge.name!r}")},
        "max_new_tokens": max_new_tokens,
        "generation": generation_settings(model.hf),
        "defences": _defences(conditions, digests),
    }


def _defences(conditions: Sequence[Condition], digests: Mapping[int, str]) -> dict[str, list[dict[str, Any]]]:
    """The draws of each defence: what its intervention does, and a digest of the prompts that it shows in each presentation."""
    draws: dict[tuple[str, int], dict[str, Any]] = {}
    for condition in conditions:
        draw = (condition.name, condition.draw)
        if draw not in draws:
            draws[draw] = {"intervention": of_intervention(condition.defence.intervention), "shows": {}}
        draws[draw]["shows"][condition.presentation.name] = digests[id(condition.shown)]
    defences: dict[str, list[dict[str, Any]]] = {}
    for (name, _), facts in draws.items():
        defences.setdefault(name, []).append(facts)
    return defences
