"""The whole analysis of one model: where does an image shift requests, what does each edit do, and which defence brings refusals back?

It runs on the embedded organism, or on a user's own model and pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guardlens import defences, directions, organism
from guardlens.cli.demo_report import DemoResults, write_report
from guardlens.cli.guard_selection import RANKS, Guard, choose, mildest_gated
from guardlens.data import presentations
from guardlens.data.presentations import Presentation, text_only
from guardlens.data.queries import Query, QueryPairs, require_labels
from guardlens.data.readers import read_queries
from guardlens.data.splits import split
from guardlens.defences import Defence, vlm_guard
from guardlens.errors import NumericsError, PresentationError, QueryError
from guardlens.evaluation.judges import Judge, keyword
from guardlens.evaluation.runner import evaluate
from guardlens.evaluation.table import Evaluation
from guardlens.experiments.collection import collect
from guardlens.experiments.comparison import compare
from guardlens.experiments.scores import refusal_logodds
from guardlens.experiments.separability import held_out
from guardlens.experiments.sweeps import sweep
from guardlens.models.hooked_model import HookedModel
from guardlens.models.loading import load
from guardlens.results.files import require_path
from guardlens.results.run_directory import locked

STRENGTHS = (0.5, 1.0, 2.0)
"""Strengths of the sweep that chooses the layer."""

PLACEBO_DRAWS = 4
"""Number of placebos of the chosen guard, which are reported together as one defence."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Subject:
    """A model with the queries that it is asked.

    Attributes:
        model: The model.
        pairs: The pairs that directions are made from.
        validation: The queries on which layers and settings are chosen.
        test: The queries on which results are reported.
        images: How queries are shown beside images.
        reminder: The defence by prompt.
        judge: The judge of answers.
        new_tokens: The length of the longest answer.
        note: The limits of what results on this model show.
        batch_size: Queries per generation.
        refusal: The words in which the model was taught to refuse; empty if they are not known.
    """

    model: HookedModel
    pairs: QueryPairs
    validation: tuple[Query, ...]
    test: tuple[Query, ...]
    images: tuple[Presentation, ...]
    reminder: Defence
    judge: Judge
    new_tokens: int
    note: str
    batch_size: int = 16
    refusal: str = ""

    @property
    def blanks(self) -> tuple[Presentation, ...]:
        """The flat images. The first is the grey one, beside which layers and settings are chosen."""
        return tuple(image for image in self.images if isinstance(image, presentations.Blank))


def organism_subject(**options: Any) -> Subject:
    """The embedded model and its queries; `options` are those of `guardlens.load`."""
    model = load("organism", **options)
    note = (
        "The organism is a LLaVA of 1.5 million parameters, trained from scratch on a toy language; its gap came from visual tuning on "
        "harmless data alone. It proves mechanisms. It says nothing about models of useful size."
    )
    return Subject(
        model=model,
        pairs=organism.pairs(),
        validation=organism.queries("validation"),
        test=organism.queries("test"),
        images=_images(model, own=True),
        reminder=defences.reminder(before=f"{organism.REMINDER} ", after=""),
        judge=organism.judge,
        new_tokens=16,
        note=note,
        batch_size=256,
        refusal=organism.REFUSAL,
    )


def own_subject(source: str, data: str | Path, new_tokens: int = 64, seed: int = 0, **options: Any) -> Subject:
    """A user's model and queries.

    Args:
        source: The model, as for `guardlens.load`.
        data: A file for `read_queries` in which every query has a label and a pair. Half of the pairs make the directions, a quarter is
            for validation and a quarter for the test; no pair or cluster is split.
        new_tokens: The length of the longest answer.
        seed: Seed of the split.
        options: Further options of `guardlens.load`.

    Raises:
        PresentationError: The model takes no images.
        QueryError: The file can't be read, a query has no label, or there are too few pairs.
    """
    queries = read_queries(data)
    require_labels(queries)
    model = load(source, **options)
    if not model.sees_images:
        raise PresentationError(f"the text-only model {model.name}", "a vision-language model", "pass --model a model that takes images")
    fit, validation, test = split(queries, (0.5, 0.25, 0.25), seed)
    pairs = QueryPairs.from_queries(fit)
    if len(pairs) < max(RANKS):
        raise QueryError(f"{len(pairs)} pairs to make directions from", f"at least {max(RANKS)}", "give more pairs")
    note = "Answers are judged by refusal phrases alone, which misses soft refusals: look at the records before you claim anything."
    return Subject(
        model=model,
        pairs=pairs,
        validation=validation,
        test=test,
        images=_images(model, own=all(query.images for query in queries)),
        reminder=defences.self_reminder,
        judge=keyword,
        new_tokens=new_tokens,
        note=note,
    )


def _images(model: HookedModel, own: bool) -> tuple[Presentation, ...]:
    size = model.cfg.image_size or 336
    images: list[Presentation] = [presentations.blank(color, size) for color in ("grey", "white", "black")]
    images.append(presentations.noise(size=size))
    if own:
        images.append(presentations.own_images)
    return tuple(images)


def run(subject: Subject, out: str | Path) -> dict[str, Any]:
    """Run the whole analysis, write everything to `out`, and return the summary, which is also in `out/summary.json`.

    Args:
        subject: The model and its queries.
        out: The directory. An interrupted run resumes there; another configuration is refused.

    Raises:
        MismatchError: `out` holds records of another configuration.
        StorageError: `out` can't be written, or another process has it open.
        QueryError: There are too few requests for validation.
    """
    _require_enough(subject.validation)
    with locked(require_path(out)):
        return _run(subject, Path(out))


def _require_enough(queries: Sequence[Query]) -> None:
    """Refuse too few requests before any work is done: `compare` will divide them into folds."""
    labels = np.array([query.label == "harmful" for query in queries])
    groups = np.array([query.stands_with for query in queries])
    try:
        held_out(labels, groups)
    except NumericsError as error:
        found = f"{error.found} among the {len(queries)} requests for validation"
        raise QueryError(found, error.expected, f"{error.next_step}; a quarter of the data is for validation") from None


def _run(subject: Subject, out: Path) -> dict[str, Any]:
    model = subject.model
    grey = subject.blanks[0]
    fit = collect(model, subject.pairs)
    ssd = directions.ssd(fit, rank=max(RANKS))
    llm = collect(model, subject.validation)
    compared = [image for image in subject.images if image not in subject.blanks[1:]]
    vlm = [collect(model, subject.validation, image) for image in compared]
    comparison = compare(llm, vlm, ssd)
    swept = {"vlm_guard[replace]": vlm_guard(ssd.truncate(1)).intervention}
    effects = sweep(model, swept, subject.validation, grey, scores=(refusal_logodds,), strengths=STRENGTHS)
    layers = effects.best(1)
    guards = choose(model, subject.validation, grey, ssd, fit, layers)
    chosen = mildest_gated(guards)
    guarded = collect(model, subject.validation, grey, chosen.defence.intervention)
    results = DemoResults(
        model=model.id,
        directions=ssd,
        activations={"LLM, text": llm, f"VLM, {grey.name}": vlm[0], f"VLM, {grey.name}, {chosen.defence.name}": guarded},
        comparison=comparison,
        sweep=effects,
        guards=guards,
        chosen=chosen,
        layers=layers,
        answers=_answers(subject, guards, chosen, out),
        blanks=tuple(blank.name for blank in subject.blanks),
        note=subject.note,
        refusal=subject.refusal,
    )
    return write_report(results, out)


def _answers(subject: Subject, guards: Sequence[Guard], chosen: Guard, out: Path) -> Evaluation:
    """The judged answers of all defences on the test split, in text and beside every image."""
    arms: dict[str, Defence | list[Defence]] = {"none": defences.none, "self_reminder": subject.reminder}
    arms |= {guard.defence.name: guard.defence for guard in guards}
    arms["random"] = [Defence("random", chosen.defence.intervention.placebo(seed)) for seed in range(PLACEBO_DRAWS)]
    return evaluate(
        subject.model,
        arms,
        subject.test,
        (text_only, *subject.images),
        judge=subject.judge,
        out=out / "records",
        max_new_tokens=subject.new_tokens,
        batch_size=subject.batch_size,
    )
