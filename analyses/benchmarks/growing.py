"""How the layer map grows along five axes, in time and peak memory, beside one plain forward, which is the physical floor."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from analyses.benchmarks import subjects, timing, ways
from analyses.benchmarks.rows import MIB, Plan, Row, row
from guardlens import interventions as iv

FLOOR = "plain forward"
TIMED = 2
"""Layers of the naive loop."""
NAMED = {"layers": "layers", "side": "tokens", "vocabulary": "vocabulary", "strengths": "strengths", "queries": "queries"}
WAYS = ("naive loop", "guardlens", FLOOR)


def growth(plan: Plan) -> Iterator[Row]:
    """Seconds along every axis."""
    yield from _along(plan, ("layers", "side", "vocabulary", "strengths", "queries"), timed)


def growth_memory(plan: Plan) -> Iterator[Row]:
    """Peak memory as the model, the prompt and the vocabulary grow."""
    yield from _along(plan, ("layers", "side", "vocabulary"), weighed)


def _along(plan: Plan, names: Sequence[str], measure: Callable[..., Iterator[Row]]) -> Iterator[Row]:
    """From the plan's own size, one strength and one query; that point, which several axes share, is measured once."""
    size = plan.size
    every = {
        "layers": plan.depths,
        "side": plan.sides,
        "vocabulary": plan.vocabularies,
        "strengths": plan.grids,
        "queries": plan.numbers,
    }
    axes = {name: every[name] for name in names}
    start = {"layers": size.layers, "side": size.side, "vocabulary": size.vocabulary, "strengths": 1, "queries": 1}
    yield from measure(plan, [axis for axis, values in axes.items() if start[axis] in values], **start)
    for axis, values in axes.items():
        for value in values:
            if value != start[axis]:
                yield from measure(plan, [axis], **start | {axis: value})


def timed(plan: Plan, axes: list[str], strengths: int, queries: int, **traits: int) -> Iterator[Row]:
    """Seconds at one point, for every axis that it is on."""
    layers, tokens, each = _point(plan, strengths, queries, **traits)
    seconds = timing.alternate(each, plan.few)
    values = traits | {"side": tokens, "strengths": strengths, "queries": queries}
    for way in WAYS:
        times = strengths * layers / TIMED if way == "naive loop" else 1
        for axis in axes:
            yield row("growth", way, timing.absolute(seconds[way], times), unit="s", axis=NAMED[axis], value=values[axis])


def weighed(plan: Plan, axes: list[str], strengths: int, queries: int, **traits: int) -> Iterator[Row]:
    """Peak memory at one point, for every axis that it is on."""
    _, tokens, each = _point(plan, strengths, queries, **traits)
    peaks, values = timing.peaks(each, plan.few, plan.device), traits | {"side": tokens}
    for way in WAYS:
        found = timing.summary([peak / MIB for peak in peaks[way]])
        for axis in axes:
            yield row("growth", way, found, unit="MiB", axis=NAMED[axis], value=values[axis])


def _point(plan: Plan, strengths: int, queries: int, **traits: int) -> tuple[int, int, dict[str, timing.Way]]:
    """Layers, tokens and the ways to one question."""
    subject, size = plan.model(**traits), plan.size.at(**traits)
    ssd, batch = subjects.directions(subject), subject.batch(subjects.queries(queries), subjects.blank(size))
    cells, vectors = ways.cells(subject, iv.add(ssd, 2.0), strengths), subjects.pushes(subject, ssd, 2.0)
    each = {
        FLOOR: partial(ways.plain, subject, batch),
        "guardlens": lambda: subject.run(subject.prefill(batch.after(subject.share(batch))), cells),
        "naive loop": partial(ways.raw_hooks, subject, batch, vectors, range(TIMED)),
    }
    return subject.cfg.n_layers, batch.mask.shape[1], each
