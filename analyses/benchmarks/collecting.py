"""What looking costs: all layers at the last token, in time and memory, one pool beside a blank image, and LLM against VLM."""

from collections.abc import Iterator
from functools import partial

import guardlens as gl
from analyses.benchmarks import peers, subjects, timing, ways
from analyses.benchmarks.rows import Plan, Row, row
from guardlens.data.presentations import text_only


def _ways(plan: Plan) -> dict[str, timing.Way]:
    """The ways to read all layers at the last token of a batch in which nothing is shared."""
    subject = plan.model()
    batch = subject.batch(subjects.queries(plan.queries), subjects.noise(plan.size))
    each: dict[str, timing.Way] = {
        "plain": lambda: ways.plain(subject, batch),
        "guardlens": lambda: ways.collected(subject, batch),
        "raw hooks": lambda: ways.raw_collect(subject, batch),
        "output_hidden_states": lambda: ways.hidden_states(subject, batch),
    }
    if peers.installed():
        bridge = peers.bridge(subjects.built(plan.size, plan.dtype, plan.device))
        each[f"{peers.NAME} (eager attention), run_with_cache"] = lambda: peers.collect(bridge, batch, subject.cfg.n_layers)
    return each


def collection(plan: Plan) -> Iterator[Row]:
    """In time."""
    seconds, unit = timing.alternate(_ways(plan), plan.repeats), f"plain forwards of {plan.queries} prompts"
    for way in list(seconds)[1:]:
        yield row("collect_time", way, timing.ratio(seconds, way, "plain"), "<= 1.05" if way == "guardlens" else "", unit)


def collection_memory(plan: Plan) -> Iterator[Row]:
    """In peak memory."""
    peaks, unit = timing.peaks(_ways(plan), plan.few, plan.device), f"a plain forward's peak, {plan.queries} prompts"
    for way in list(peaks)[1:]:
        yield row("collect_memory", way, timing.peak_ratio(peaks, way, "plain"), "<= 1.1" if way == "guardlens" else "", unit)


def pools(plan: Plan) -> Iterator[Row]:
    """A pool beside a blank image, against its text alone."""
    subject, pool, grey = plan.model(), subjects.queries(plan.pool), subjects.blank(plan.size)
    one = subject.batch(pool[:1], grey)
    seconds = timing.alternate(
        {
            "blank": lambda: gl.collect(subject, pool, grey),
            "text": lambda: gl.collect(subject, pool, text_only),
            "prefix": lambda: ways.plain(subject, one),
        },
        plan.few,
    )
    bound = [1.3 * text + prefix for text, prefix in zip(seconds["text"], seconds["prefix"], strict=True)]
    found = timing.ratio(seconds | {"bound": bound}, "blank", "bound")
    yield row("collect_blank", f"guardlens, {plan.pool} queries", found, "<= 1", "(1.3 text-only + one prefix)")


def comparison(plan: Plan) -> Iterator[Row]:
    """LLM against VLM on one pool: both collections and what `compare` makes of them."""
    subject, grey = plan.model(), subjects.blank(plan.size)
    pool, ssd = subjects.queries(max(12, plan.pool // 4)), subjects.directions(subject)
    llm, vlm = (gl.collect(subject, pool, presentation) for presentation in (text_only, grey))
    seconds = timing.alternate(
        {
            "guardlens": lambda: [gl.collect(subject, pool, presentation) for presentation in (text_only, grey)],
            "naive": lambda: [ways.raw_pool(subject, pool, presentation, plan.queries) for presentation in (text_only, grey)],
            "compare": lambda: gl.compare(llm, vlm, ssd),
        },
        plan.few,
    )
    of_naive = partial(timing.ratio, seconds, under="naive")
    unit = f"raw hooks, {len(pool)} queries, {plan.queries} at a time"
    yield row("compare", "guardlens, both collections", of_naive("guardlens"), unit=unit)
    yield row("compare", "guardlens, the comparison of them, with intervals", of_naive("compare"), unit=unit)
