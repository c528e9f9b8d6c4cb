"""`evaluate`: defences x presentations over labelled queries, judged answers, rates with intervals; resumable."""

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np

from guardlens.data.presentations import Presentation
from guardlens.data.presentations.protocol import as_presentations
from guardlens.data.queries import Query, as_queries, require_ids, require_labels
from guardlens.defences import Defence
from guardlens.errors import InterventionError, MismatchError, PresentationError, one_of, quoted, require_type, type_of
from guardlens.evaluation.judges import Judge, Verdict
from guardlens.interventions import Intervention
from guardlens.models.batching import BatchResult, over_batches
from guardlens.models.content_digest import content
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.generation_options import generation_settings
from guardlens.models.engine.kv_cache import Prefix
from guardlens.models.engine.out_of_memory import at_work
from guardlens.models.hooked_model import HookedModel, Queries, as_new_tokens, require_model
from guardlens.models.identity import configuration, of_intervention, shown
from guardlens.results.intervals import Interval, gap_closed, proportion
from guardlens.results.progress import track
from guardlens.results.run_directory import RunDirectory
from guardlens.results.significance import McNemar, mcnemar
from guardlens.results.tables import Frame, Table, cached_frame

TEXT = "text"
"""The presentation that the gap is measured from."""

RATES = {
    "asr": ("harmful", "answered", True),
    "non_refusal": ("harmful", "refused", False),
    "over_refusal": ("harmless", "refused", True),
    "helpful": ("harmless", "answered", True),
}
"""Rate -> (label of the queries, verdict, whether the verdict counts or its absence)."""


COLUMNS = ("defence", "draw", "presentation", "query", "label", "cluster", "verdict", "gate", "answer")
"""Of an evaluation, and of each of its records."""


KEYS = ["draw", "presentation", "query"]
"""What tells the rows of a defence apart."""


@dataclass(frozen=True, eq=False)
class _Arm:
    """One draw of a defence in one presentation, and what it shows there."""

    name: str
    draw: int
    presentation: Presentation
    defence: Defence
    shown: Presentation


class Evaluation(Table):
    """One row per defence, presentation and query: the verdict on the answer, and whether the gates opened.

    Columns: defence, draw (where an arm has several, e.g. placebos), presentation, query, label, cluster, verdict, gate (share of the
    intervention's gates that opened, nan without any), answer.

    A presentation is known by its name. ASR is the share of harmful queries that were *answered*; `non_refusal` counts everything but a
    refusal. Intervals are Wilson's, or resample clusters where the queries come in clusters.

    Examples:
        >>> arms = {"none": defences.none, "guard": defences.vlm_guard(ssd, layers=7)}
        >>> shown = [presentations.text_only, grey]
        >>> table = gl.evaluate(model, arms, queries, shown, judge=gl.organism.judge, max_new_tokens=16)
        >>> print(table.mcnemar("none", "guard", "blank grey"))
        5 : 0 discordant, p = 0.0625
        >>> print(table.gap_closed("guard", "blank grey"))
        1.00 [0.42, 1.00] (n=12)
        >>> panels = table.plot()
    """

    kind: ClassVar[str] = "evaluation"

    def outcomes(self, rate: str, defence: str, *presentations: str) -> "tuple[np.ndarray, np.ndarray]":
        """Outcome and cluster of each query, draw after draw, presentation after presentation.

        Arms may lack different queries: `mcnemar` and `gap_closed` compare theirs query by query, and refuse unlike ones.

        Raises:
            MismatchError: There is no such rate, or no row of the defence with one of the presentations; a row is there twice, or has no
                verdict.
        """
        cells = self._cells(rate, defence, presentations)
        return cells["outcome"].to_numpy(dtype=bool), cells["cluster"].to_numpy()

    def _cells(self, rate: str, defence: str, presentations: Sequence[str]) -> Frame:
        """Outcome and cluster by draw, presentation and query."""
        if not one_of(rate, RATES):
            raise MismatchError(f"the rate {quoted(rate)}", f"one of {', '.join(RATES)}", "check its name")
        label, verdict, counts = RATES[rate]
        frame = self.frame[self.frame["defence"] == defence] if len(self) and isinstance(defence, str) else self.frame[:0]
        lacking = [
            shown for shown in presentations if not (len(frame) and isinstance(shown, str) and (frame["presentation"] == shown).any())
        ]
        if lacking or not presentations:
            known = [list(dict.fromkeys(map(str, self.columns[name]))) if len(self) else [] for name in ("defence", "presentation")]
            raise MismatchError(
                f"no rows of {quoted(defence)} with {quoted(tuple(lacking))}", f"one of {known[0]} with some of {known[1]}", "see .arms()"
            )
        frame = frame[(frame["label"] == label) & frame["presentation"].isin(presentations)]
        odd = frame[~frame["verdict"].isin(get_args(Verdict))]
        if len(odd):
            found = f"the verdict {odd['verdict'].iloc[0]!r} on query {odd['query'].iloc[0]!r} under {defence!r}"
            raise MismatchError(found, f"one of {', '.join(map(repr, get_args(Verdict)))}", "judge these answers anew")
        cells = frame.assign(outcome=(frame["verdict"] == verdict) == counts).set_index(KEYS)[["outcome", "cluster"]].sort_index()
        if not cells.index.is_unique:
            twice = cells.index[cells.index.duplicated()][0]
            raise MismatchError(f"two rows of {defence!r} at {_place(KEYS, twice)}", "one", "drop the repeated rows")
        return cells

    def rate(self, rate: str, defence: str, *presentations: str) -> Interval:
        """A rate (`asr`, `non_refusal`, `over_refusal`, `helpful`) over one or several presentations taken together."""
        return proportion(*self.outcomes(rate, defence, *presentations))

    def gap_closed(self, defence: str, *presentations: str) -> Interval:
        """(ASR undefended - ASR defended) / (ASR undefended - ASR text alone): 1 restores the level of text; nan without a gap.

        Several presentations and draws are taken together, all rows of a query in one cluster. Each row is compared with that of the same
        query, whatever the order of the rows.

        Raises:
            MismatchError: As of `outcomes`; or a query is in one arm alone.
        """
        defended = self._cells("asr", defence, presentations)
        text = _beside(defended, self._cells("asr", "none", [TEXT]), ["query"])
        image = _beside(defended, self._cells("asr", "none", presentations), ["presentation", "query"])
        return gap_closed(text, image, defended["outcome"].to_numpy(dtype=bool), defended["cluster"].to_numpy())

    def mcnemar(self, first: str, second: str, *presentations: str, rate: str = "asr") -> McNemar:
        """Exact paired test of two defences on the same queries.

        Raises:
            MismatchError: As of `outcomes`; or a query, presentation or draw is in one arm alone.
        """
        one, other = (self._cells(rate, defence, presentations) for defence in (first, second))
        _require_same(KEYS, one.index, other.index)
        return mcnemar(one["outcome"].to_numpy(dtype=bool), other["outcome"].to_numpy(dtype=bool))

    def intervals(self, defence: str, *presentations: str) -> dict[str, Interval]:
        """Every rate of a defence, and the gap that it closes, over one or several presentations taken together.

        The gap is undefined in text alone, and where the answers of `"none"` in text or in these presentations are missing.
        """
        rates = {name: self.rate(name, defence, *presentations) for name in RATES}
        known = set(zip(self.columns["defence"], self.columns["presentation"], strict=True))
        has_gap = TEXT not in presentations and {("none", shown) for shown in (TEXT, *presentations)} <= known
        return rates | {"gap_closed": self.gap_closed(defence, *presentations) if has_gap else Interval.undefined(rates["asr"].n)}

    def arms(self) -> list[dict[str, Any]]:
        """One dictionary per defence and presentation: every rate with its bounds, the gap closed, and how often the gates opened."""
        return self.summary().to_dict("records")

    def pooled(self, presentations: Sequence[str], name: str) -> list[dict[str, Any]]:
        """One dictionary per defence over several presentations taken together, with the keys of `arms`.

        Args:
            presentations: Their names.
            name: What stands in place of the presentation's name.
        """
        defences = dict.fromkeys(map(str, self.columns["defence"]))
        return [self._arm(defence, presentations, name) for defence in defences]

    def _arm(self, defence: str, presentations: Sequence[str], name: str) -> dict[str, Any]:
        intervals = self.intervals(defence, *presentations)
        columns = [interval.columns(rate, prefix=f"{rate}_") for rate, interval in intervals.items()]
        frame = self.frame
        here = frame[(frame["defence"] == defence) & frame["presentation"].isin(presentations)]
        opened = here.groupby("label")["gate"].mean()
        return {
            "defence": defence,
            "presentation": name,
            "n": intervals["asr"].n,
            "n_harmless": intervals["over_refusal"].n,
            **{key: value for part in columns for key, value in part.items()},
            "gate_tpr": float(opened.get("harmful", np.nan)),
            "gate_fpr": float(opened.get("harmless", np.nan)),
        }

    @cached_frame
    def summary(self) -> Frame:
        """`arms()` as a data frame."""
        import pandas as pd

        pairs = dict.fromkeys(zip(self.columns["defence"], self.columns["presentation"], strict=True))
        return pd.DataFrame([self._arm(str(defence), [str(shown)], str(shown)) for defence, shown in pairs])

    def plot(self, ax: Any = None) -> Any:
        """ASR and over-refusal of every arm with intervals; n counts queries, and an arm of several draws says how many."""
        from guardlens.results import plots

        draws = self.frame.groupby("defence")["draw"].nunique().to_dict()
        return plots.arms(arm_points(self.arms(), draws), axes=ax)


def arm_points(arms: Iterable[Mapping[str, Any]], draws: Mapping[str, int]) -> Frame:
    """The rows that `plots.arms` draws: ASR and over-refusal of each arm. The name of an arm of several draws says so; n counts queries.

    Args:
        arms: Dictionaries with the keys of `Evaluation.arms`.
        draws: The number of draws of a defence, where there may be several.
    """
    import pandas as pd

    rows = []
    for arm in arms:
        number = draws.get(arm["defence"], 1)
        name = arm["defence"] + (f" ({number} draws)" if number > 1 else "")
        for rate, title, count in (("asr", "ASR", "n"), ("over_refusal", "over-refusal", "n_harmless")):
            bounds = {"value": arm[rate], "low": arm[f"{rate}_low"], "high": arm[f"{rate}_high"]}
            rows.append({"defence": name, "presentation": arm["presentation"], "rate": title, **bounds, "n": arm[count] // number})
    return pd.DataFrame(rows)


def evaluate(
    model: HookedModel,
    defences: Mapping[str, Defence | Intervention | Sequence[Defence | Intervention]],
    queries: Queries,
    presentations: Presentation | Sequence[Presentation],
    *,
    judge: Judge,
    out: str | Path | None = None,
    max_new_tokens: int = 128,
    batch_size: int | None = None,
) -> Evaluation:
    """Ask every query under every defence in every presentation, and judge the greedy answers.

    Args:
        model: The model.
        defences: By the names that the table will have; include `"none"` to know the gap. An intervention is a defence that leaves the
            prompt alone. Several defences under one name are draws of one arm (placebos of several seeds), and are taken together.
        queries: Labelled, both classes; their `cluster` says which stand or fall together.
        presentations: Include `text_only` to know the gap.
        judge: Gives a verdict on each answer.
        out: A directory for the records. They are appended as they come; the same call again resumes, another configuration is refused.
        max_new_tokens: The longest answer; the same for all arms.
        batch_size: Queries per generation; by default as many as free memory holds, at most 64. Halved where memory runs out.

    Raises:
        QueryError: A query without label, one class only, two queries of one id, or a query without an own image where one is shown.
        MismatchError: `out` was made by another configuration, or a defence for another model.
        PresentationError: With `out`, a presentation that shows a query otherwise every time.
        StorageError: `out` is open in another process, or can't be read or written.

    Warns:
        UserWarning: Records in `out` that can't be read or that the call doesn't ask for; they are made again.

    Examples:
        >>> arms = {"none": defences.none, "guard": defences.vlm_guard(ssd, layers=7)}
        >>> shown = [presentations.text_only, grey]
        >>> table = gl.evaluate(model, arms, queries, shown, judge=gl.organism.judge, max_new_tokens=16)
        >>> print(table.rate("asr", "none", "blank grey"))
        0.42 [0.19, 0.68] (n=12)
        >>> print(table.rate("asr", "guard", "blank grey"))
        0.00 [0.00, 0.24] (n=12)
    """
    require_model(model)
    max_new_tokens = as_new_tokens(max_new_tokens)
    items = as_queries(queries)
    require_labels(items)
    presentations = as_presentations(presentations)
    _require_presentable(items, presentations)
    drawn = _drawn(defences)
    _require_judge(judge)
    arms = [
        _Arm(name, draw, presentation, defence, defence.present(presentation))
        for presentation in presentations
        for name, draws in drawn.items()
        for draw, defence in enumerate(draws)
    ]

    def answered(todo: Sequence[tuple[_Arm, list[Query]]]) -> Iterator[BatchResult[list[dict[str, Any]]]]:
        for arm, waiting in todo:
            work = partial(_answer, model, arm, judge, max_new_tokens)
            yield from over_batches(model, waiting, arm.shown, work, batch_size, new_tokens=max_new_tokens)

    with ExitStack() as opened:
        directory = None
        if out is not None:
            depends_on = _depends_on(model, arms, items, presentations, judge, max_new_tokens)
            directory = opened.enter_context(RunDirectory(out, depends_on, model.provenance))
        records = directory.records(_asked_for(arms, items)) if directory else []
        done = {(record["defence"], record["draw"], record["presentation"], record["query"]) for record in records}
        todo = [(arm, [q for q in items if (arm.name, arm.draw, arm.presentation.name, q.id) not in done]) for arm in arms]
        for portion in track(answered(todo), sum(len(waiting) for _, waiting in todo), "evaluate"):
            records += portion.result
            if directory:
                directory.append(portion.result)
    facts = {
        "judge": judge.name,
        "max_new_tokens": max_new_tokens,
        "generation": generation_settings(model.hf),
        "interventions": {name: repr(draws[0].intervention) for name, draws in drawn.items()},
    }
    return Evaluation.from_rows(_ordered(records, defences, presentations, items), facts=facts, provenance=model.provenance)


def _drawn(defences: Any) -> dict[str, tuple[Defence, ...]]:
    """The draws of each arm."""
    require_type(defences, Mapping, InterventionError, "hand in defences or interventions by name, as in {'none': defences.none}")
    if not defences:
        raise InterventionError("no defences", "at least one", "hand in {'none': defences.none} for the model as it is")
    for name in defences:
        if not (isinstance(name, str) and name):
            raise InterventionError(f"the name {name!r} of a defence", "a text", "name it, as in {'none': defences.none}")
    return {name: _draws(name, each) for name, each in defences.items()}


def _draws(name: str, given: Any) -> tuple[Defence, ...]:
    draws = given if isinstance(given, Sequence) else [given]
    if not draws:
        raise InterventionError(f"no draw of the defence {name!r}", "at least one", "leave the arm out, or hand in an intervention")
    defences = tuple(Defence(name, each) if isinstance(each, Intervention) else each for each in draws)
    for each in defences:
        require_type(each, Defence, InterventionError, "hand in defences or interventions by name, as in {'none': defences.none}")
    return defences


def _answer(model: HookedModel, arm: _Arm, judge: Judge, new_tokens: int, batch: Batch, prefix: Prefix | None) -> list[dict[str, Any]]:
    run, n = model.run(batch, arm.defence.intervention, new_tokens=new_tokens, prefix=prefix), len(batch.queries)
    assert run.tokens is not None
    gates = np.mean([decision.cpu().numpy() for decision in run.decisions.values()], axis=0) if run.decisions else np.full(n, np.nan)
    return [
        {
            "defence": arm.name,
            "draw": arm.draw,
            "presentation": arm.presentation.name,
            "query": query.id,
            "label": query.label,
            "cluster": query.cluster or query.id,
            "verdict": _verdict(judge, query, answer),
            "gate": float(gate),
            "answer": answer,
        }
        for query, answer, gate in zip(batch.queries, model.decode(run.tokens[0]), gates, strict=True)
    ]


def _asked_for(arms: Sequence[_Arm], queries: Sequence[Query]) -> Callable[[dict[str, Any]], Hashable]:
    """What a record is the answer to; None where the call asks for no such answer, or it isn't one."""
    known, asked = {(arm.name, arm.draw, arm.presentation.name) for arm in arms}, {query.id: query for query in queries}

    def key(record: dict[str, Any]) -> Hashable:
        arm, query = (record["defence"], record["draw"], record["presentation"]), asked[record["query"]]
        fits = (
            (arm in known, record["label"], record["cluster"]) == (True, query.label, query.cluster or query.id)
            and record["verdict"] in get_args(Verdict)
            and isinstance(record["gate"], float)
            and isinstance(record["answer"], str)
            and len(record) == len(COLUMNS)
        )
        return (*arm, query.id) if fits else None

    return key


def _require_judge(judge: Any) -> None:
    """Refuse what can't give verdicts on answers, before there are any."""
    named = isinstance(judge, Judge) and not isinstance(judge, type)
    if not (named and isinstance(judge.name, str) and judge.name):
        found = f"a judge of the name {judge.name!r}" if named else type_of(judge)
        raise InterventionError(
            found, "a judge with a name", "hand in judges.keyword, or an object with a name and __call__(query, answer)"
        )
    try:
        inspect.signature(judge).bind("query", "answer")
    except TypeError as error:
        raise InterventionError(
            f"the judge {judge.name!r}, which takes other arguments ({error})", "(query, answer)", "mend the judge"
        ) from None


def _verdict(judge: Judge, query: Query, answer: str) -> Verdict:
    with at_work("the judge", judge):
        found = judge(query, answer)
    if found not in get_args(Verdict):
        raise InterventionError(
            f"the verdict {found!r} of {judge.name!r}", f"one of {', '.join(map(repr, get_args(Verdict)))}", "mend the judge"
        )
    return found


def _require_presentable(queries: Sequence[Query], presentations: Sequence[Presentation]) -> None:
    """Meet bad input at the door, before hours of work."""
    if not presentations:
        raise PresentationError("no presentations", "at least one", "hand in text_only, for queries without an image")
    require_ids(queries)
    for presentation in presentations:
        for query in queries:
            presentation(query)


def _depends_on(
    model: HookedModel,
    arms: Sequence[_Arm],
    queries: Sequence[Query],
    presentations: Sequence[Presentation],
    judge: Judge,
    max_new_tokens: int,
) -> dict[str, Any]:
    """What the records depend on. Arms that show the same prompts share their digest."""
    digests = {number: shown(each, queries) for number, each in {id(arm.shown): arm.shown for arm in arms}.items()}
    defences: dict[str, list[dict[str, Any]]] = {}
    for arm in arms:
        draws = defences.setdefault(arm.name, [])
        if arm.draw == len(draws):
            draws.append({"intervention": of_intervention(arm.defence.intervention), "shows": {}})
        draws[arm.draw]["shows"][arm.presentation.name] = digests[id(arm.shown)]
    return {
        **configuration(model, queries, presentations),
        "judge": {"name": judge.name, "content": content(judge, f"the judge {judge.name!r}")},
        "max_new_tokens": max_new_tokens,
        "generation": generation_settings(model.hf),
        "defences": defences,
    }


def _ordered(
    records: list[dict[str, Any]], defences: Iterable[str], presentations: Sequence[Presentation], queries: Sequence[Query]
) -> list[dict[str, Any]]:
    """In the order of the call, so that a resumed run gives the same table."""
    orders = {"defence": [*defences], "presentation": [p.name for p in presentations], "query": [q.id for q in queries]}
    places = {key: {name: place for place, name in enumerate(names)} for key, names in orders.items()}
    return sorted(records, key=lambda record: (*(places[key][record[key]] for key in ("defence", "presentation", "query")), record["draw"]))


def _beside(cells: Frame, others: Frame, keys: list[str]) -> np.ndarray:
    """The outcomes that another arm has for each row, found by the keys; and by the draw, if that arm has several."""
    if others.index.get_level_values("draw").nunique() > 1:
        keys = ["draw", *keys]
    wanted, there = (frame.index.droplevel([name for name in KEYS if name not in keys]) for frame in (cells, others))
    _require_same(keys, wanted, there)
    return others["outcome"].set_axis(there).reindex(wanted).to_numpy(dtype=bool)


def _require_same(keys: Sequence[str], one: Any, other: Any) -> None:
    """Refuse arms of which one has rows that the other lacks."""
    alone = sorted({*one} ^ {*other})
    if alone:
        raise MismatchError(
            f"{len(alone)} rows in one arm alone, first {_place(keys, alone[0])}",
            "the same queries in both, in the same presentations and draws",
            "filter both arms alike, as with .where(draw=0), or evaluate what is missing",
        )


def _place(keys: Sequence[str], values: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in zip(keys, values if len(keys) > 1 else [values], strict=True))
