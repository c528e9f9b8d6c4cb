"""How the layer map grows with layers, tokens, strengths and queries: time and peak memory beside one plain forward, the physical floor."""

from collections.abc import Iterator

from analyses.benchmarks import subjects, timing, ways
from analyses.benchmarks.rows import MIB, Plan, Row, row
from guardlens import interventions as iv

FLOOR = "plain forward"
NAMED = {"layers": "layers", "side": "tokens", "strengths": "strengths", "queries": "queries"}
WAYS = ("naive loop", "guardlens", FLOOR)


def growth(plan: Plan) -> Iterator[Row]:
    """Along each axis from the plan's own size, one strength and one query; that point, which several axes share, is measured once."""
    axes = {"layers": plan.depths, "side": plan.sides, "strengths": plan.grids, "queries": plan.numbers}
    start = {"layers": plan.size.layers, "side": plan.size.side, "strengths": 1, "queries": 1}
    yield from cell(plan, [axis for axis, values in axes.items() if start[axis] in values], **start)
    for axis, values in axes.items():
        for value in values:
            if value != start[axis]:
                yield from cell(plan, [axis], **start | {axis: value})


def cell(plan: Plan, axes: list[str], strengths: int, queries: int, **traits: int) -> Iterator[Row]:
    """One question, for every axis that it is a point of; memory where the model or the prompt grows."""
    subject, size = plan.model(**traits), plan.size.at(**traits)
    ssd, batch = subjects.directions(subject), subject.batch(subjects.queries(queries), subjects.blank(size))
    cells, vectors = ways.cells(subject, iv.add(ssd, 2.0), strengths), subjects.pushes(subject, ssd, 2.0)
    some = plan.layers(subject)[:2]
    each = {
        FLOOR: lambda: ways.plain(subject, batch),
        "guardlens": lambda: subject.run(subject.prefill(batch, subject.share(batch)), cells),
        "naive loop": lambda: ways.raw_hooks(subject, batch, vectors, some),
    }
    seconds = timing.alternate(each, plan.few)
    heavy = [axis for axis in axes if axis in ("layers", "side")]
    peaks = timing.peaks(each, 2, plan.device) if heavy else {}
    values = {"layers": subject.cfg.n_layers, "side": batch.mask.shape[1], "strengths": strengths, "queries": queries}
    for way in WAYS:
        times = strengths * subject.cfg.n_layers / len(some) if way == "naive loop" else 1
        for axis in axes:
            yield row("growth", way, timing.absolute(seconds[way], times), unit="s", axis=NAMED[axis], value=values[axis])
        for axis in heavy:
            found = timing.summary([peak / MIB for peak in peaks[way]])
            yield row("growth", way, found, unit="MiB", axis=NAMED[axis], value=values[axis])
