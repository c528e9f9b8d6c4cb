"""What a layer map costs: at the last token, at several, at all, along an answer, once and again, for one prompt and for many."""

from collections.abc import Iterator
from functools import partial

import torch

import guardlens as gl
from analyses.benchmarks import peers, subjects, timing, ways
from analyses.benchmarks.rows import Plan, Row, row
from guardlens import interventions as iv


def sampled(layers: list[int], of: int) -> str:
    """What a naive loop's row says of the forwards that were not timed."""
    return "a forward each" if len(layers) == of else f"a forward each ({len(layers)} of {of} layers timed, x {of / len(layers):g})"


def sweeps(plan: Plan) -> Iterator[Row]:
    """The layer map of one prompt at the last token, once and again."""
    subject = plan.model()
    ssd, batch = subjects.directions(subject), subject.batch(subjects.queries(1), subjects.blank(plan.size))
    edit, other = iv.add(ssd, 2.0), iv.add(gl.directions.random(ssd), 2.0)
    vectors, some, depth = subjects.pushes(subject, ssd, 2.0), plan.layers(subject), subject.cfg.n_layers
    layers, grid = ways.cells(subject, edit), ways.cells(subject, edit, plan.strengths)
    layers_again, grid_again = ways.cells(subject, other), ways.cells(subject, other, plan.strengths)
    kept = subject.prefill(batch)
    each = {
        "plain": lambda: ways.plain(subject, batch),
        "layers": lambda: subject.run(batch, layers),
        "grid": lambda: subject.run(batch, grid),
        "again": lambda: subject.run(kept, layers_again),
        "grid again": lambda: subject.run(kept, grid_again),
        "raw hooks": lambda: ways.raw_hooks(subject, batch, vectors, some),
        "nnsight": lambda: ways.naive_nnsight(subject, batch, vectors, some),
    }
    if peers.installed():
        bridge = peers.bridge(subjects.built(plan.size, plan.dtype, plan.device))
        each["bridge"] = lambda: peers.hooks(bridge, batch, vectors, some)
    seconds, times = timing.alternate(each, plan.repeats), depth / len(some)
    of_plain = partial(timing.ratio, seconds, under="plain")
    yield row("sweep_layers", "guardlens", of_plain("layers"), "<= 1.12")
    yield row("sweep_layers", f"raw hooks, {sampled(some, depth)}", of_plain("raw hooks", times=times))
    yield row("sweep_layers", f"nnsight, {sampled(some, depth)}", of_plain("nnsight", times=times))
    if "bridge" in seconds:
        yield row("sweep_layers", f"{peers.NAME} (eager attention), {sampled(some, depth)}", of_plain("bridge", times=times))
    yield row("sweep_grid", f"guardlens, layers x {plan.strengths} strengths", of_plain("grid"), "<= 1.35")
    cell_each = of_plain("raw hooks", times=times * plan.strengths)
    yield row("sweep_grid", f"raw hooks, {sampled(some, depth)}, x {plan.strengths} strengths", cell_each)
    yield row("sweep_again", "guardlens, layers", of_plain("again"), "<= 0.12")
    yield row("sweep_again", f"guardlens, layers x {plan.strengths} strengths", of_plain("grid again"), "<= 0.38")


def tokens(plan: Plan) -> Iterator[Row]:
    """The layer map of edits at the last several tokens."""
    subject = plan.model()
    ssd, batch = subjects.directions(subject), subject.batch([subjects.long_query()], subjects.blank(plan.size))
    cells = ways.cells(subject, iv.add(ssd, 2.0).at(positions=(-plan.tail, None)))
    vectors, some, depth = subjects.pushes(subject, ssd, 2.0), plan.layers(subject), subject.cfg.n_layers
    seconds = timing.alternate(
        {
            "plain": lambda: ways.plain(subject, batch),
            "branches": lambda: subject.run(batch, cells),
            "naive": lambda: ways.raw_hooks(subject, batch, vectors, some, slice(-plan.tail, None)),
        },
        plan.few,
    )
    found = subject.run(batch, cells).layout
    yield row("sweep_tokens", f"guardlens ({found}), the last {plan.tail} tokens", timing.ratio(seconds, "branches", "plain"))
    yield row("sweep_tokens", f"raw hooks, {sampled(some, depth)}", timing.ratio(seconds, "naive", "plain", depth / len(some)))


def everywhere(plan: Plan) -> Iterator[Row]:
    """The layer map of edits at all positions, where nothing before an edit stays as it is."""
    subject = plan.model()
    ssd, batch = subjects.directions(subject), subject.batch(subjects.queries(1), subjects.blank(plan.size))
    cells = ways.cells(subject, iv.add(ssd, 2.0).at(positions="all"))
    vectors, some, depth = subjects.pushes(subject, ssd, 2.0), plan.layers(subject), subject.cfg.n_layers
    seconds = timing.alternate(
        {
            "plain": lambda: ways.plain(subject, batch),
            "forks": lambda: subject.run(batch, cells, layout="fork"),
            "tiles": lambda: subject.run(batch, cells, layout="tile"),
            "naive": lambda: ways.raw_hooks(subject, batch, vectors, some, slice(None)),
        },
        plan.few,
    )
    chosen = subject.run(batch, cells).layout
    for name in ("forks", "tiles"):
        said = f"guardlens, {name}" + (" (as it chooses)" if name.startswith(chosen) else "")
        yield row("sweep_everywhere", said, timing.ratio(seconds, name, "plain"))
    yield row("sweep_everywhere", f"raw hooks, {sampled(some, depth)}", timing.ratio(seconds, "naive", "plain", depth / len(some)))


def answers(plan: Plan) -> Iterator[Row]:
    """The layer map of what an edit changes along an answer: KL at each of its tokens, the answer generated first."""
    subject = plan.model()
    ssd, batch = subjects.directions(subject), subject.batch(subjects.queries(1), subjects.blank(plan.size))
    cells, score = ways.cells(subject, iv.add(ssd, 2.0)), gl.scores.AnswerKL(plan.forced)
    vectors, some, depth = subjects.pushes(subject, ssd, 2.0), plan.layers(subject), subject.cfg.n_layers
    kept = subject.prefill(batch)
    words = torch.full((1, plan.forced), 5, device=subject.hf.device)
    forced, whole = kept.answering(words), batch.answering(words)
    before = slice(-1 - plan.forced, -plan.forced)
    seconds = timing.alternate(
        {
            "plain": lambda: ways.plain(subject, batch),
            "sweep": lambda: gl.sweep(subject, iv.add(ssd, 2.0), batch.queries, batch.presentation, scores=[score], placebos=0),
            "branches": lambda: subject.run(forced, cells, logits="answer"),
            "naive": lambda: ways.raw_hooks(subject, whole, vectors, some, before, ways.plain_answer),
        },
        plan.few,
    )
    of_plain = partial(timing.ratio, seconds, under="plain")
    yield row("sweep_answers", f"guardlens, KL along {plan.forced} tokens, which it generates", of_plain("sweep"))
    yield row("sweep_answers", "guardlens, forced answers behind kept prompts alone", of_plain("branches"))
    yield row("sweep_answers", f"raw hooks, forced answers, {sampled(some, depth)}", of_plain("naive", times=depth / len(some)))


def prefixes(plan: Plan) -> Iterator[Row]:
    """The layer map of several prompts beside one blank image, against a forward of the batch per layer."""
    subject = plan.model()
    ssd, batch = subjects.directions(subject), subject.batch(subjects.queries(plan.queries), subjects.blank(plan.size))
    cells, vectors = ways.cells(subject, iv.add(ssd, 2.0)), subjects.pushes(subject, ssd, 2.0)
    some, depth = plan.layers(subject)[:2], subject.cfg.n_layers
    seconds = timing.alternate(
        {
            "shared": lambda: subject.run(subject.prefill(batch.after(subject.share(batch))), cells),
            "naive": lambda: ways.raw_hooks(subject, batch, vectors, some),
        },
        plan.few,
    )
    found = timing.ratio(seconds, "naive", "shared", depth / len(some))
    way = f"guardlens against raw hooks, {len(batch.queries)} queries, {sampled(some, depth)}"
    yield row("shared_prefix_speedup", way, found | {"seconds": timing.absolute(seconds["shared"])["seconds"]}, ">= 90", "times as fast")
