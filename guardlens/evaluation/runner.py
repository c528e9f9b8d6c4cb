"""`evaluate`: defences x presentations over labelled queries. Answers are generated, then judged, then recorded; a run can be resumed.

The steps are functions of their own, so that something else than this loop can call them: `records.missing` plans what is left to do,
`answers.generate` answers it, `judging.judge_answers` judges the answers, and `Evaluation` makes rates of the records.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from guardlens.data.presentations import Presentation
from guardlens.data.presentations.protocol import as_presentations
from guardlens.data.queries import Query, as_queries, require_ids, require_labels
from guardlens.defences import Defence
from guardlens.errors import PresentationError
from guardlens.evaluation.answers import Answer, generate
from guardlens.evaluation.conditions import as_conditions, as_draws
from guardlens.evaluation.judges import Judge
from guardlens.evaluation.judging import judge_answers, require_judge
from guardlens.evaluation.records import Record, depends_on, in_call_order, key_of, missing, record
from guardlens.evaluation.table import Evaluation
from guardlens.interventions import Intervention
from guardlens.models.engine.generation_options import as_new_tokens, generation_settings
from guardlens.models.hooked_model import HookedModel, Queries
from guardlens.models.loaded_model import require_model
from guardlens.results.progress import track
from guardlens.results.run_directory import RunDirectory


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
        defences: Defences by the names that they will have in the table; include `"none"` to measure the gap. An intervention is a defence
            that leaves the prompt alone. Several defences under one name are draws of one defence (placebos of several seeds), and are
            taken together.
        queries: Labelled queries of both classes. Queries of one `cluster` are resampled together.
        presentations: How to show the queries; include `text_only` to measure the gap.
        judge: Gives a verdict on each answer.
        out: A directory for the records, which are appended batch by batch. The same call again resumes; another configuration is refused.
        max_new_tokens: The length of the longest answer, the same in all conditions.
        batch_size: Queries per generation; by default as many as free memory holds, at most 64. It is halved if memory runs out.

    Raises:
        QueryError: A query has no label, all queries have one label, or two have one id.
        PresentationError: A query has no own image where one is shown; two presentations have one name; or, with `out`, a presentation
            shows a query differently every time.
        InterventionError: The defences are not defences or interventions by name.
        ArgumentError: The judge is not a judge, or gives something else than a verdict; or `max_new_tokens` or `batch_size` is no count.
        MismatchError: `out` was made by another configuration, or a defence is another model's.
        ModelError: The model is not a `HookedModel`, or a prompt or the judge does not fit in memory.
        StorageError: `out` is open in another process, or can't be read or written.

    Warns:
        UserWarning: Records in `out` can't be read, or are not asked for by this call. They are made again.

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
    require_ids(items)
    presentations = as_presentations(presentations)
    _require_presentable(items, presentations)
    draws = as_draws(defences)
    require_judge(judge)
    conditions = as_conditions(draws, presentations)
    with ExitStack() as opened:
        directory = None
        records: list[Record] = []
        if out is not None:
            configuration = depends_on(model, conditions, items, presentations, judge, max_new_tokens)
            directory = opened.enter_context(RunDirectory(out, configuration, model.provenance))
            records = directory.records(key_of(conditions, items))
        todo = missing(conditions, items, records)
        batches = (answers for condition, left in todo for answers in generate(model, condition, left, max_new_tokens, batch_size))
        for answers in track(batches, sum(len(left) for _, left in todo), "evaluate"):
            judged = _judged(judge, answers)
            records += judged
            if directory is not None:
                directory.append(judged)
    facts = {
        "judge": judge.name,
        "max_new_tokens": max_new_tokens,
        "generation": generation_settings(model.hf),
        "interventions": {name: repr(defence.intervention) for name, (defence, *_) in draws.items()},
    }
    rows = in_call_order(records, draws, presentations, items)
    return Evaluation.from_rows(rows, facts=facts, provenance=model.provenance)


def _judged(judge: Judge, answers: Sequence[Answer]) -> list[Record]:
    """The records of a batch of answers."""
    verdicts = judge_answers(judge, [answer.query for answer in answers], [answer.text for answer in answers])
    return [record(answer, verdict) for answer, verdict in zip(answers, verdicts, strict=True)]


def _require_presentable(queries: Sequence[Query], presentations: Sequence[Presentation]) -> None:
    """Show every query once, so that bad input is refused before hours of work."""
    if not presentations:
        raise PresentationError("no presentations", "at least one", "pass text_only for queries without an image")
    for presentation in presentations:
        for query in queries:
            presentation(query)
