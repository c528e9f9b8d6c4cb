"""The measurements: each a list of rows (what, way, ratio with its spread, the target where there is one)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import guardlens as gl
from analyses.benchmarks import subjects, timing, ways
from analyses.benchmarks.subjects import Size
from guardlens import interventions as iv
from guardlens.queries import text_only

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    size: Size
    queries: int = 8
    pool: int = 100
    strengths: int = 8
    repeats: int = 7
    new_tokens: int = 64
    wide: int = 512


FULL = Plan(Size())
QUICK = Plan(Size(layers=6, width=128, side=12), queries=4, pool=12, strengths=4, repeats=3, new_tokens=16, wide=256)


def row(what: str, way: str, found: Mapping[str, float], target: str = "", about: Mapping[str, Any] | None = None) -> Row:
    return {
        "what": what,
        "way": way,
        "ratio": found["median"],
        "low": found["low"],
        "high": found["high"],
        "target": target,
        **(about or {}),
    }


def sweeps(plan: Plan) -> Iterator[Row]:
    """The layer map of one prompt, once and again, in units of one plain forward."""
    subject = subjects.model(plan.size)
    ssd = subjects.directions(subject)
    batch = subject.batch(subjects.queries(1), subjects.blank(plan.size))
    edit, other = iv.add(ssd, 2.0), iv.add(gl.directions.random(ssd), 2.0)
    vectors = list(ssd.vectors[:, 0])
    layers, grid = ways.cells(subject, edit), ways.cells(subject, edit, plan.strengths)
    kept = subject.prefill(batch)
    seconds = timing.alternate(
        {
            "plain": lambda: ways.plain(subject, batch),
            "layers": lambda: subject.run(batch, layers),
            "grid": lambda: subject.run(batch, grid),
            "again": lambda: subject.run(kept, ways.cells(subject, other)),
            "grid again": lambda: subject.run(kept, ways.cells(subject, other, plan.strengths)),
            "raw hooks": lambda: ways.raw_hooks(subject, batch, vectors),
            "naive nnsight": lambda: ways.naive_nnsight(subject, batch, vectors),
        },
        plan.repeats,
    )
    seen = {"tokens": batch.mask.shape[1]}
    yield row("sweep_layers", "guardlens", timing.ratio(seconds, "layers", "plain"), "<= 1.2", about=seen)
    yield row("sweep_layers", "raw hooks, a forward each", timing.ratio(seconds, "raw hooks", "plain"), about=seen)
    yield row("sweep_layers", "nnsight, a trace each", timing.ratio(seconds, "naive nnsight", "plain"), about=seen)
    yield row("sweep_grid", "guardlens", timing.ratio(seconds, "grid", "plain"), "<= 1.5", about=seen)
    per_strength = timing.ratio(seconds, "raw hooks", "plain", times=plan.strengths)
    yield row("sweep_grid", f"raw hooks, a forward each (one strength timed, x {plan.strengths})", per_strength, about=seen)
    yield row("sweep_again", "guardlens, layers", timing.ratio(seconds, "again", "plain"), "<= 0.5", about=seen)
    yield row("sweep_again", "guardlens, layers x strengths", timing.ratio(seconds, "grid again", "plain"), "<= 0.5", about=seen)


def prefixes(plan: Plan) -> Iterator[Row]:
    """The layer map of several prompts beside one blank image, against a forward of the batch per layer."""
    subject = subjects.model(plan.size)
    ssd, grey, asked = subjects.directions(subject), subjects.blank(plan.size), subjects.queries(plan.queries)
    batch, edit = subject.batch(asked, grey), iv.add(ssd, 2.0)
    plans, vectors = ways.cells(subject, edit), list(ssd.vectors[:, 0])
    seconds = timing.alternate(
        {
            "shared": lambda: subject.run(subject.prefill(batch, subject.share(batch)), plans),
            "naive": lambda: ways.raw_hooks(subject, batch, vectors),
        },
        max(3, plan.repeats // 2),
    )
    found = timing.ratio(seconds, "naive", "shared")
    yield row(
        "shared_prefix_speedup", "guardlens against raw hooks, a forward of the batch per layer", found, ">= 70", {"queries": len(asked)}
    )


def collection(plan: Plan) -> Iterator[Row]:
    """All layers at the last token, where nothing is shared, in units of a plain forward of the same batch; and a pool beside a blank."""
    subject = subjects.model(plan.size)
    asked = subjects.queries(plan.queries)
    batch = subject.batch(asked, subjects.noise(plan.size))
    each = {
        "plain": lambda: ways.plain(subject, batch),
        "guardlens": lambda: ways.collected(subject, batch),
        "raw hooks": lambda: ways.raw_collect(subject, batch),
        "output_hidden_states": lambda: ways.hidden_states(subject, batch),
    }
    seconds = timing.alternate(each, plan.repeats)
    for way in ("guardlens", "raw hooks", "output_hidden_states"):
        yield row(
            "collect_time", way, timing.ratio(seconds, way, "plain"), "<= 1.05" if way == "guardlens" else "", {"queries": len(asked)}
        )
    for way in ("guardlens", "raw hooks", "output_hidden_states"):
        peak = timing.peak_ratio(each, way, "plain", 3)
        yield row("collect_memory", way, peak, "<= 1.1" if way == "guardlens" else "", {"queries": len(asked)})
    pool, grey = subjects.queries(plan.pool), subjects.blank(plan.size)
    one = subject.batch(pool[:1], grey)
    several = timing.alternate(
        {
            "blank": lambda: gl.collect(subject, pool, grey, progress=False),
            "text": lambda: gl.collect(subject, pool, text_only, progress=False),
            "prefix": lambda: ways.plain(subject, one),
        },
        max(3, plan.repeats // 2),
    )
    text = several["text"]
    bound = {"bound": [1.3 * a + b for a, b in zip(text, several["prefix"], strict=True)], "blank": several["blank"]}
    yield row(
        "collect_blank",
        "guardlens, per (1.3 text-only + one prefix)",
        timing.ratio(bound, "blank", "bound"),
        "<= 1",
        {"queries": len(pool)},
    )


def generation(plan: Plan) -> Iterator[Row]:
    """VLM-Guard at three layers, its text twin included, in units of transformers' own `generate`."""
    subject = subjects.model(plan.size)
    batch = subject.batch(subjects.queries(1), subjects.blank(plan.size))
    layers = [subject.cfg.n_layers // 4, subject.cfg.n_layers // 2, subject.cfg.n_layers - 2]
    guard = ways.guard(subject, subjects.directions(subject), layers)
    seconds = timing.alternate(
        {
            "plain": lambda: ways.plain_generate(subject, batch, plan.new_tokens),
            "guarded": lambda: ways.guarded_generate(subject, batch, guard, plan.new_tokens),
        },
        max(3, plan.repeats // 2),
    )
    found = timing.ratio(seconds, "guarded", "plain")
    yield row("generate_guarded", "guardlens, 3 layers, twin included", found, "<= 1.05", {"tokens": batch.mask.shape[1]})


def overhead(plan: Plan) -> Iterator[Row]:
    """One edit through guardlens (plan, nnsight trace, checks) against one raw hook, at a wider model."""
    size = plan.size.at(width=plan.wide, layers=max(4, plan.size.layers // 2))
    subject = subjects.model(size)
    batch, ssd = subject.batch(subjects.queries(1), subjects.blank(size)), subjects.directions(subject)
    edit, vectors = iv.add(ssd, 2.0).at(layers=[2]), [torch.zeros(size.width)] * size.layers
    one = subject.cfg.blocks[2]

    def raw() -> None:
        handle = subject.hf.get_submodule(one).register_forward_hook(lambda module, args, out: out + vectors[0])
        try:
            ways.plain(subject, batch)
        finally:
            handle.remove()

    seconds = timing.alternate({"raw hook": raw, "guardlens": lambda: subject.run(batch, edit)}, plan.repeats)
    yield row(
        "run_overhead", f"guardlens against a raw hook, d_model {size.width}", timing.ratio(seconds, "guardlens", "raw hook"), "<= 1.05"
    )


def growth(plan: Plan) -> Iterator[Row]:
    """How the layer map grows with layers, strengths, prompt length and queries: guardlens, the naive loop, and one plain forward."""
    base = plan.size.at(layers=plan.size.layers // 2, side=plan.size.side // 2)
    for axis, values in (("layers", (4, 8, 16)), ("side", (6, 12, 24))):
        for value in values:
            yield from _cell(axis, base.at(**{axis: value}), 1, 1, plan.repeats)
    for strengths in (1, 4, 16):
        yield from _cell("strengths", base, strengths, 1, plan.repeats)
    for number in (1, 4, 16):
        yield from _cell("queries", base, 1, number, plan.repeats)


def _cell(axis: str, size: Size, strengths: int, number: int, repeats: int) -> Iterator[Row]:
    subject = subjects.model(size)
    ssd = subjects.directions(subject)
    batch = subject.batch(subjects.queries(number), subjects.blank(size))
    plans, vectors = ways.cells(subject, iv.add(ssd, 2.0), strengths), list(ssd.vectors[:, 0])
    seconds = timing.alternate(
        {
            "plain forward": lambda: ways.plain(subject, batch),
            "guardlens": lambda: subject.run(subject.prefill(batch, subject.share(batch)), plans),
            "naive loop": lambda: ways.raw_hooks(subject, batch, vectors),
        },
        max(3, repeats // 2),
    )
    value = {"layers": size.layers, "side": batch.mask.shape[1], "strengths": strengths, "queries": number}[axis]
    shown = "tokens" if axis == "side" else axis
    for way, times in (("plain forward", 1), ("guardlens", 1), ("naive loop", strengths)):
        found = timing.ratio(seconds | {"unit": [1.0] * len(seconds[way])}, way, "unit", times)
        yield row("growth", way, found, about={"axis": shown, "value": value, "unit": "s"})


ALL = {"sweeps": sweeps, "prefixes": prefixes, "collection": collection, "generation": generation, "overhead": overhead, "growth": growth}
