"""Where time and memory go: the parts of what is measured, in the same unit, so that a measurement explains each target that is missed."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import guardlens as gl
from analyses.benchmarks import subjects, timing, ways
from analyses.benchmarks.answering import guarded_layers
from analyses.benchmarks.rows import FORWARDS, Plan, Row, row
from analyses.benchmarks.timing import Way
from guardlens import interventions as iv
from guardlens.data.presentations import text_only
from guardlens.hooks import Site
from guardlens.interventions import Intervention, nothing
from guardlens.models.engine import limits
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.compiler import compile_taps
from guardlens.models.engine.kv_cache import Prefill

TIME = "where_time_goes"
MEMORY = "where_memory_goes"
UNIT = "the unit"
"""What each part is counted in."""


def where_time_goes(plan: Plan) -> Iterator[Row]:
    """The parts of all that has a target in time."""
    yield from _sweep(plan)
    yield from _prefix(plan)
    yield from _pool(plan)
    yield from _answer(plan)
    yield from _run(plan)


def where_memory_goes(plan: Plan) -> Iterator[Row]:
    """The parts of the peaks that have a target."""
    subject = plan.model()
    grid = ways.cells(subject, iv.add(subjects.directions(subject), 2.0), plan.strengths)
    yield from _weighed("memory_sweep", plan, subject, subject.batch(subjects.queries(1), subjects.blank(plan.size)), grid)
    reader = subjects.text_model(plan.text, plan.dtype, plan.device)
    ssd = subjects.directions(reader)
    pairs = [cell for edit in (ssd, gl.directions.random(ssd)) for cell in ways.cells(reader, iv.add(edit, 2.0))]
    prompts = reader.batch(subjects.prompts(reader, plan.queries, plan.text_tokens[0]))
    yield from _weighed("real_memory", plan, reader, prompts, pairs)


def _weighed(of: str, plan: Plan, subject: gl.HookedModel, batch: Batch, cells: list[Intervention]) -> Iterator[Row]:
    """Peaks of a sweep's parts, and the size of what it keeps, in peaks of a forward with one raw hook."""
    kept = subject.prefill(batch)
    vectors = subjects.pushes(subject, subjects.directions(subject), 2.0)
    parts: dict[str, Way] = {
        UNIT: lambda: ways.raw_hooks(subject, batch, vectors, [0]),
        "transformers' forward that keeps keys and values": lambda: ways.plain_keeping(subject, batch),
        "guardlens' prefill, which is that forward": lambda: subject.prefill(batch),
        f"{len(cells)} branches behind it, without scores": lambda: subject.run_each(kept, cells, _forgotten),
    }
    peaks = timing.peaks(parts, plan.few, plan.device)
    unit = f"peaks of a forward with one raw hook, {len(batch.queries)} prompt{'s' * (len(batch.queries) > 1)}"
    held = timing.summary([kept.bytes / peak for peak in peaks[UNIT]])
    logits = min(limits.LOGIT_ROWS, len(cells) * len(batch.queries)) * kept.logits[0].nbytes
    yield row(MEMORY, "floor: the keys and values themselves", held, unit=unit, of=of)
    for name in parts:
        if name != UNIT:
            yield row(MEMORY, name, timing.peak_ratio(peaks, name, UNIT), unit=unit, of=of)
    rows = timing.summary([logits / peak for peak in peaks[UNIT]])
    yield row(MEMORY, "of the branches: the logits that are computed at a time", rows, unit=unit, of=of)


def _forgotten(logits: Tensor) -> None:
    """Take a lane's logits and keep nothing of them."""


def _parts(of: str, ways: Mapping[str, Way], repeats: int, unit: str) -> Iterator[Row]:
    seconds = timing.alternate(ways, repeats)
    for name in ways:
        if name != UNIT:
            yield row(TIME, name, timing.ratio(seconds, name, UNIT), unit=unit, of=of)


def _compiled(subject: gl.HookedModel, kept: Prefill, cells: list[Intervention]) -> object:
    assert kept.cache is not None
    layout = kept.cache.continuations(kept.batch.select("last"), range(len(cells)))
    return compile_taps(cells, (), layout, kept.batch, subject.cfg.n_layers, {})


def _inputs(subject: gl.HookedModel, kept: Prefill, lanes: int) -> dict[str, Any]:
    assert kept.cache is not None
    layout = kept.cache.continuations(kept.batch.select("last"), range(lanes))
    config = subject.hf.config.get_text_config(decoder=True)
    return kept.cache.inputs(layout, config, subject.hf.dtype)


def _alone(subject: gl.HookedModel, inputs: Mapping[str, Any], kept: Prefill) -> object:
    """The decoder on the branches' tokens, behind the same keys: no plan, no check, no logits."""
    assert kept.cache is not None
    with torch.no_grad(), kept.cache.unchanged():
        return subject.hf.get_submodule(subject.cfg.decoder)(**inputs)


def _sweep(plan: Plan) -> Iterator[Row]:
    subject = plan.model()
    ssd, batch = subjects.directions(subject), subject.batch(subjects.queries(1), subjects.blank(plan.size))
    kept, edit = subject.prefill(batch), iv.add(ssd, 2.0)
    head: dict[str, Way] = {
        UNIT: lambda: ways.plain(subject, batch),
        "transformers' forward that keeps keys and values": lambda: ways.plain_keeping(subject, batch),
        "guardlens' prefill, which is that forward": lambda: subject.prefill(batch),
    }
    yield from _parts("sweep_layers, sweep_grid, sweep_again", head, plan.repeats, FORWARDS)
    for of, strengths in (("sweep_layers, sweep_again", 1), ("sweep_grid, sweep_again", plan.strengths)):
        cells = ways.cells(subject, edit, strengths)
        inputs = _inputs(subject, kept, len(cells))
        parts: dict[str, Way] = {
            UNIT: head[UNIT],
            f"floor: the decoder alone on {len(cells)} branches": lambda inputs=inputs: _alone(subject, inputs, kept),
            f"{len(cells)} branches, edited": lambda cells=cells: subject.run(kept, cells),
            f"{len(cells)} branches, no edits and no trace": lambda cells=cells: subject.run(kept, [nothing] * len(cells)),
            f"of {len(cells)} branches: the mask and the positions": lambda cells=cells: _inputs(subject, kept, len(cells)),
            f"of {len(cells)} branches: plans compiled to taps": lambda cells=cells: _compiled(subject, kept, cells),
        }
        yield from _parts(of, parts, plan.repeats, FORWARDS)


def _prefix(plan: Plan) -> Iterator[Row]:
    subject, grey = plan.model(), subjects.blank(plan.size)
    ssd, batch = subjects.directions(subject), subject.batch(subjects.queries(plan.queries), grey)
    one, cells = subject.batch(batch.queries[:1], grey), ways.cells(subject, iv.add(ssd, 2.0))
    words, prefix = subject.batch(batch.queries, text_only), subject.share(batch)
    kept = subject.prefill(batch.after(prefix))
    parts: dict[str, Way] = {
        UNIT: lambda: ways.plain(subject, batch),
        "floor: a plain forward of one prompt": lambda: ways.plain(subject, one),
        "floor: a plain forward of the texts alone": lambda: ways.plain(subject, words),
        "the prefix, once": lambda: subject.share(batch),
        "the prompts behind it": lambda: subject.prefill(batch.after(prefix)),
        f"{len(cells)} branches of each, edited": lambda: subject.run(kept, cells),
        f"{len(cells)} branches of each, no edits and no trace": lambda: subject.run(kept, [nothing] * len(cells)),
    }
    yield from _parts("shared_prefix_speedup", parts, plan.few, f"plain forwards of {plan.queries} prompts")


def _pool(plan: Plan) -> Iterator[Row]:
    subject, grey, pool = plan.model(), subjects.blank(plan.size), subjects.queries(plan.pool)
    one = subject.batch(pool[:1], grey)
    texts, beside = (_batches(subject, pool, presentation) for presentation in (text_only, grey))
    prefix = subject.share(beside[0])
    parts: dict[str, Way] = {
        UNIT: lambda: gl.collect(subject, pool, text_only),
        "one prefix: a plain forward of one prompt": lambda: ways.plain(subject, one),
        "prompts to tensors, text alone": lambda: _batches(subject, pool, text_only),
        "prompts to tensors, beside the blank image": lambda: _batches(subject, pool, grey),
        "runs, text alone": lambda: [subject.run(batch, read=[Site()], logits=None) for batch in texts],
        "runs behind the shared prefix": lambda: [subject.run(batch.after(prefix), read=[Site()], logits=None) for batch in beside],
    }
    yield from _parts("collect_blank", parts, plan.few, "text-only collections")


def _batches(subject: gl.HookedModel, pool: list[gl.Query], presentation: gl.presentations.Presentation) -> list[Batch]:
    ordered = sorted(pool, key=lambda query: -len(query.text))  # as `collect` does it
    return [subject.batch(ordered[start : start + 32], presentation) for start in range(0, len(ordered), 32)]


def _answer(plan: Plan) -> Iterator[Row]:
    subject, number = plan.model(), plan.new_tokens
    batch, layers = subject.batch(subjects.queries(1), subjects.blank(plan.size)), guarded_layers(plan)
    guard, twin = ways.guard(subject, subjects.directions(subject), layers), subject.batch(batch.queries, text_only)
    idle = iv.custom(_same).at(layers=layers)

    def attached() -> object:
        with gl.attach(guard, subject.hf, subject.processor):
            return ways.plain_generate(subject, batch, number)

    parts: dict[str, Way] = {
        UNIT: lambda: ways.plain_generate(subject, batch, number),
        "the guard through nnsight": lambda: ways.guarded_generate(subject, batch, guard, number),
        "an edit that does nothing, through nnsight": lambda: ways.guarded_generate(subject, batch, idle, number),
        "the guard under torch's own hooks (gl.attach, attaching included)": attached,
        "of the guard: the text twin's forward": lambda: subject.run(twin, read=[Site(layers=tuple(layers))], logits=None),
    }
    yield from _parts("generate_guarded", parts, plan.repeats, f"plain generate, {number} tokens")


def _run(plan: Plan) -> Iterator[Row]:
    traits = {"width": plan.wide, "layers": max(4, plan.size.layers // 2)}
    subject, size = plan.model(**traits), plan.size.at(**traits)
    batch, ssd = subject.batch(subjects.queries(1), subjects.blank(size)), subjects.directions(subject)
    vectors, idle = subjects.pushes(subject, ssd), iv.custom(_same).at(layers=[2])
    parts: dict[str, Way] = {
        UNIT: lambda: ways.raw_hooks(subject, batch, vectors, [2]),
        "a plain forward": lambda: ways.plain(subject, batch),
        "an edit that does nothing, through guardlens": lambda: subject.run(batch, idle),
        "a naive nnsight trace": lambda: ways.naive_nnsight(subject, batch, vectors, [2]),
    }
    yield from _parts("run_overhead", parts, plan.repeats, "forwards with one raw hook")


def _same(states: Tensor, context: iv.Context) -> Tensor:
    return states
