"""What sweeps cost on text-only models: a random one of real proportions, and SmolLM2-135M with its real weights."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

import guardlens as gl
from analyses.benchmarks import peers, subjects, timing, ways
from analyses.benchmarks.rows import MIB, Plan, Row, row
from analyses.benchmarks.sweeping import sampled
from guardlens import interventions as iv
from guardlens.experiments.scores import Score
from guardlens.models.engine import run
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.strategies import strategy


@dataclass(frozen=True)
class Reader:
    """A text-only model, and what its rows say of it.

    Attributes:
        rows: The beginning of its rows' names.
        origin: Where its weights come from.
        model: The model.
        anew: Makes the model again, for a peer that rewrites it.
    """

    rows: str
    origin: str
    model: gl.HookedModel
    anew: Callable[[], gl.HookedModel]

    @property
    def description(self) -> str:
        """The model in a line."""
        return f"{self.origin}: {subjects.sizes(self.model)}"


Measure = Callable[[Plan, Reader], Iterator[Row]]


def of_random(measure: Measure, plan: Plan) -> Iterator[Row]:
    """Measure the random model of real proportions."""
    asked = plan.text, plan.dtype, plan.device
    reader = Reader("real", "Random Qwen2, text only", subjects.text_model(*asked), partial(subjects.built_text, *asked))
    yield from _naming(reader, measure(plan, reader))


def of_checkpoint(measure: Measure, plan: Plan) -> Iterator[Row]:
    """Measure the model with real weights, if there is a checkpoint."""
    if plan.checkpoint is None:
        return
    asked = plan.checkpoint, plan.dtype, plan.device
    origin = f"`{plan.checkpoint.name}`, real weights"
    reader = Reader("smollm2", origin, subjects.text_checkpoint(*asked), partial(subjects.read_text, *asked))
    yield from _naming(reader, measure(plan, reader))


def _naming(reader: Reader, found: Iterator[Row]) -> Iterator[Row]:
    """The rows, with the model that they are of."""
    for each in found:
        yield each | {"subject": reader.description}


def layer_maps(plan: Plan, reader: Reader) -> Iterator[Row]:
    """The layer map of one prompt at the last token, for short and long prompts."""
    bridge = peers.bridge(reader.anew()) if peers.installed() else None
    for tokens in plan.text_tokens:
        yield from _layer_map(plan, reader, tokens, bridge)


def _layer_map(plan: Plan, reader: Reader, tokens: int, bridge: Any) -> Iterator[Row]:
    subject = reader.model
    ssd = subjects.directions(subject)
    batch = _batch(subject, 1, tokens)
    cells = ways.cells(subject, iv.add(ssd, 2.0))
    vectors = subjects.pushes(subject, ssd, 2.0)
    some = plan.layers(subject)[:2]
    depth = subject.cfg.n_layers
    each: dict[str, timing.Way] = {
        "plain": lambda: ways.plain(subject, batch),
        "guardlens": lambda: subject.run(batch, cells),
        "raw hooks": lambda: ways.raw_hooks(subject, batch, vectors, some),
        "nnsight": lambda: ways.naive_nnsight(subject, batch, vectors, some),
    }
    if peers.installed():
        each[f"{peers.NAME} (eager attention)"] = lambda: peers.hooks(bridge, batch, vectors, some)
    seconds = timing.alternate(each, plan.few)
    what = f"{reader.rows}_layers"
    length = f"prompt of {batch.mask.shape[1]} tokens"
    yield row(what, f"guardlens, {length}", timing.ratio(seconds, "guardlens", "plain"))
    for way in list(seconds)[2:]:
        yield row(what, f"{way}, {length}, {sampled(some, depth)}", timing.ratio(seconds, way, "plain", depth / len(some)))


def grids(plan: Plan, reader: Reader) -> Iterator[Row]:
    """Sweeps of several short prompts with two scores: layers with a placebo each, and layers x strengths."""
    subject = reader.model
    ssd = subjects.directions(subject)
    batch = _batch(subject, plan.queries, plan.text_tokens[0])
    edit = iv.add(ssd, 2.0)
    variants = _variants(subject, ssd)
    some = plan.layers(subject)[:2]
    depth = subject.cfg.n_layers
    strengths = [(number + 1) / plan.text_strengths for number in range(plan.text_strengths)]
    base = ways.plain(subject, batch)
    seconds = timing.alternate(
        {
            "plain": lambda: ways.plain(subject, batch),
            "placebos": lambda: _sweep(subject, edit, batch),
            "strengths": lambda: gl.sweep(subject, edit, batch.queries, scores=ways.SCORES, strengths=strengths, placebos=0),
            "naive": lambda: ways.scored_hooks(subject, batch, variants, some, base),
        },
        plan.few,
    )
    what = f"{reader.rows}_grid"
    of_plain = partial(timing.ratio, seconds, under="plain")
    unit = f"plain forwards of {len(batch.queries)} prompts of {batch.mask.shape[1]} tokens"
    naive = f"raw hooks and scores, {sampled(some, depth)}"
    pair_each = of_plain("naive", times=depth / len(some))
    cell_each = of_plain("naive", times=depth / len(some) * len(strengths) / len(variants))
    yield row(what, "guardlens, a sweep with scores, layers x (edit + placebo)", of_plain("placebos"), unit=unit)
    yield row(what, f"{naive}, x (edit + placebo)", pair_each, unit=unit)
    yield row(what, f"guardlens, a sweep with scores, layers x {len(strengths)} strengths", of_plain("strengths"), unit=unit)
    yield row(what, f"{naive}, x {len(strengths)} strengths", cell_each, unit=unit)


def overheads(plan: Plan, reader: Reader) -> Iterator[Row]:
    """The share of a sweep's time that scores and checks take, and the share of all that is outside of the model's own modules."""
    subject = reader.model
    ssd = subjects.directions(subject)
    batch = _batch(subject, plan.queries, plan.text_tokens[0])
    edit = iv.add(ssd, 2.0)
    own = own_modules(subject)
    outside: list[float] = []
    scoring: list[float] = []
    _sweep(subject, edit, batch)
    for _ in range(plan.few):
        scores = [TimedScore(score, []) for score in ways.SCORES]
        checking: list[float] = []
        with timing.seconds_within(own) as inside, patch.object(strategy, "checked", partial(_timed, checking, run.checked)):
            start = perf_counter()
            _sweep(subject, edit, batch, scores)
            whole = perf_counter() - start
        outside.append(1 - sum(inside) / whole)
        scoring.append((sum(checking) + sum(sum(score.seconds) for score in scores)) / whole)
    what = f"{reader.rows}_overhead"
    unit = "the sweep's time"
    yield row(what, "guardlens, two scores and the checks of logits", timing.summary(scoring), "<= 0.05", unit)
    yield row(
        what, "guardlens, all but the model's own modules: edits, masks, sums and bookkeeping, too", timing.summary(outside), unit=unit
    )


def own_modules(subject: gl.HookedModel) -> set[nn.Module]:
    """The modules that compute a forward pass: embedding, norms, attention, MLPs, unembedding.

    The blocks and what holds them are left out. They only call the others and add up what these return, and it is around blocks that edits
    and their checks run.
    """
    paths = [f"{block}." for block in subject.cfg.blocks]
    holders = {module for path, module in subject.hf.named_modules() if not path or any(each.startswith(f"{path}.") for each in paths)}
    return {child for holder in holders for child in holder.children()} - holders


@dataclass(frozen=True)
class TimedScore:
    """A score that notes the seconds of each call.

    Attributes:
        score: The score.
        seconds: The seconds, call by call.
    """

    score: Any
    seconds: list[float]

    @property
    def name(self) -> str:
        return self.score.name

    @property
    def unit(self) -> str:
        return self.score.unit

    def __call__(self, logits: Tensor, base: Tensor, tokenizer: Any) -> Tensor:
        return _timed(self.seconds, self.score, logits, base, tokenizer)

    def against(self, base: Tensor, tokenizer: Any) -> Callable[[Tensor], Tensor]:
        """The score as a function of logits; what it computes once is timed, too."""
        return partial(_timed, self.seconds, _timed(self.seconds, self.score.against, base, tokenizer))


def _timed(seconds: list[float], call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    timing.wait()
    start = perf_counter()
    result = call(*args, **options)
    timing.wait()
    seconds.append(perf_counter() - start)
    return result


def memories(plan: Plan, reader: Reader) -> Iterator[Row]:
    """Peak memory of the sweep and of the layer maps, beyond the model."""
    subject = reader.model
    ssd = subjects.directions(subject)
    batch = _batch(subject, plan.queries, plan.text_tokens[0])
    edit = iv.add(ssd, 2.0)
    variants = _variants(subject, ssd)
    peaks = timing.peaks(
        {
            "plain": lambda: ways.plain(subject, batch),
            "sweep": lambda: _sweep(subject, edit, batch),
            "naive": lambda: ways.scored_hooks(subject, batch, variants, [0], ways.plain(subject, batch)),
        },
        plan.few,
        plan.device,
    )
    what = f"{reader.rows}_memory"
    prompts = f"{len(batch.queries)} prompts of {batch.mask.shape[1]} tokens"
    target = "<= 2" if reader.rows == "real" else ""
    said = f"guardlens, a sweep with scores, layers x (edit + placebo), {prompts}"
    yield row(what, said, timing.peak_ratio(peaks, "sweep", "naive"), target, "the naive loop's peak")
    yield row(what, said, timing.peak_ratio(peaks, "sweep", "plain"), unit="a plain forward's peak")
    yield row(what, said, timing.summary([peak / MIB for peak in peaks["sweep"]]), unit="MiB")
    yield row(what, f"raw hooks and scores, {prompts}", timing.summary([peak / MIB for peak in peaks["naive"]]), unit="MiB")
    for tokens in plan.text_tokens:
        yield from _memory_of_layer_map(plan, reader, tokens)


def _memory_of_layer_map(plan: Plan, reader: Reader, tokens: int) -> Iterator[Row]:
    subject = reader.model
    ssd = subjects.directions(subject)
    batch = _batch(subject, 1, tokens)
    cells = ways.cells(subject, iv.add(ssd, 2.0))
    vectors = subjects.pushes(subject, ssd, 2.0)
    peaks = timing.peaks(
        {"guardlens": lambda: subject.run(batch, cells), "naive": lambda: ways.raw_hooks(subject, batch, vectors, [0])},
        plan.few,
        plan.device,
    )
    said = f"guardlens, a layer map, prompt of {batch.mask.shape[1]} tokens"
    yield row(f"{reader.rows}_memory", said, timing.peak_ratio(peaks, "guardlens", "naive"), unit="the naive loop's peak")
    yield row(f"{reader.rows}_memory", said, timing.summary([peak / MIB for peak in peaks["guardlens"]]), unit="MiB")


def _batch(subject: gl.HookedModel, number: int, tokens: int) -> Batch:
    return subject.batch(subjects.prompts(subject, number, tokens))


def _sweep(subject: gl.HookedModel, edit: gl.Intervention, batch: Batch, scores: Sequence[Score] = ways.SCORES) -> gl.Table:
    """Score the edit and a placebo at every layer."""
    return gl.sweep(subject, edit, batch.queries, scores=scores)


def _variants(subject: gl.HookedModel, ssd: gl.Directions) -> list[list[Tensor]]:
    """What the naive loop adds at every layer: the edit's vectors, and others of equal norm."""
    return [subjects.pushes(subject, each, 2.0) for each in (ssd, gl.directions.random(ssd))]
