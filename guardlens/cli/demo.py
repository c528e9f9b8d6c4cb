"""The whole of guardlens on one model: where does an image shift requests, what does each edit do, and which defence brings refusals back?

On the embedded organism by default; on a user's own model and pairs the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guardlens import defences, directions, organism
from guardlens.cli.findings import Findings, write
from guardlens.cli.guard_selection import RANKS, choose, mildest
from guardlens.data import presentations
from guardlens.data.presentations import Presentation, text_only
from guardlens.data.queries import Query, QueryPairs, require_labels
from guardlens.data.readers import read_queries
from guardlens.data.splits import split
from guardlens.defences import Defence, vlm_guard
from guardlens.errors import NumericsError, PresentationError, QueryError
from guardlens.evaluation.judges import Judge, keyword
from guardlens.evaluation.runner import evaluate
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
PLACEBO_DRAWS = 4


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with everything that it is asked."""

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
    """The words in which the model was taught to refuse, where they are known."""

    @property
    def blanks(self) -> tuple[Presentation, ...]:
        """The flat images; the first is the grey one, on which everything is chosen."""
        return tuple(image for image in self.images if isinstance(image, presentations.Blank))


def organism_subject(**options: Any) -> Subject:
    """The embedded model and its world; options are handed to `guardlens.load`."""
    model = load("organism", **options)
    note = (
        "The organism is a LLaVA of 1.5 million parameters, trained from scratch on a toy language; its gap came from visual tuning on "
        "harmless data alone. It proves mechanisms. It says nothing about models of useful size."
    )
    reminder = defences.reminder(before=f"{organism.REMINDER} ", after="")
    images = _images(model, own=True)
    queries = organism.queries
    return Subject(
        model, organism.pairs(), queries("validation"), queries("test"), images, reminder, organism.judge, 16, note, 256, organism.REFUSAL
    )


def own_subject(source: str, data: str | Path, new_tokens: int = 64, seed: int = 0, **options: Any) -> Subject:
    """A user's model and queries.

    Args:
        source: What `guardlens.load` takes.
        data: A file for `read_queries`, every query labelled and in a pair. Half of the pairs make the directions, a quarter chooses,
            a quarter is the test; pairs and clusters never straddle.
        new_tokens: The longest answer.
        seed: Of the split into halves and quarters.
        options: Handed to `guardlens.load`.

    Raises:
        PresentationError: The model takes no images.
        QueryError: The file can't be read, a query has no label, or there are too few pairs.
    """
    queries = read_queries(data)
    require_labels(queries)
    model = load(source, **options)
    if not model.sees_images:
        raise PresentationError(f"the text-only model {model.name}", "a vision-language model", "give --model one that takes images")
    fit, validation, test = split(queries, (0.5, 0.25, 0.25), seed)
    pairs = QueryPairs.from_queries(fit)
    if len(pairs) < max(RANKS):
        raise QueryError(f"{len(pairs)} pairs to make directions from", f"at least {max(RANKS)}", "give more pairs")
    note = "Answers are judged by refusal phrases alone, which misses soft refusals: look at the records before you claim anything."
    images = _images(model, own=all(query.images for query in queries))
    return Subject(model, pairs, validation, test, images, defences.self_reminder, keyword, new_tokens, note)


def _images(model: HookedModel, own: bool) -> tuple[Presentation, ...]:
    size = model.cfg.image_size or 336
    blanks = [presentations.blank(colour, size) for colour in ("grey", "white", "black")]
    return (*blanks, presentations.noise(size=size), *((presentations.own_images,) if own else ()))


def run(subject: Subject, out: str | Path) -> dict[str, Any]:
    """Do it all, write `out`, and return what `out/summary.json` holds.

    Args:
        subject: The model and its queries.
        out: The directory. An interrupted run resumes there; another configuration is refused.

    Raises:
        MismatchError: `out` holds records of another configuration.
        StorageError: `out` can't be written, or another process has it open.
        QueryError: Too few requests for validation.
    """
    _require_enough(subject.validation)
    with locked(require_path(out)):
        return _run(subject, Path(out))


def _require_enough(queries: Sequence[Query]) -> None:
    """Meet too few at the door, before any work: `compare` parts them into folds."""
    labels, groups = np.array([query.label == "harmful" for query in queries]), np.array([query.stands_with for query in queries])
    try:
        held_out(labels, groups)
    except NumericsError as error:
        found = f"{error.found} among the {len(queries)} requests for validation"
        raise QueryError(found, error.expected, f"{error.next_step}; a quarter of the data is for validation") from None


def _run(subject: Subject, out: Path) -> dict[str, Any]:
    model, grey = subject.model, subject.blanks[0]
    fit = collect(model, subject.pairs)
    ssd = directions.ssd(fit, rank=max(RANKS))
    llm = collect(model, subject.validation)
    shown = [image for image in subject.images if image not in subject.blanks[1:]]
    seen = [collect(model, subject.validation, image) for image in shown]
    gap = compare(llm, seen, ssd)
    guard = {"vlm_guard[replace]": vlm_guard(ssd.truncate(1)).intervention}
    effect = sweep(model, guard, subject.validation, grey, scores=(refusal_logodds,), strengths=STRENGTHS)
    layers = effect.best(1)
    guards = choose(model, subject.validation, grey, ssd, fit, layers)
    chosen = mildest([guard for guard in guards if guard.reading != "project"])
    guarded = collect(model, subject.validation, grey, chosen.defence.intervention)

    arms: dict[str, Defence | list[Defence]] = {"none": defences.none, "self_reminder": subject.reminder}
    arms |= {guard.defence.name: guard.defence for guard in guards}
    arms["random"] = [Defence("random", chosen.defence.intervention.placebo(seed)) for seed in range(PLACEBO_DRAWS)]
    table = evaluate(
        model,
        arms,
        subject.test,
        (text_only, *subject.images),
        judge=subject.judge,
        out=out / "records",
        max_new_tokens=subject.new_tokens,
        batch_size=subject.batch_size,
    )
    runs = {"LLM, text": llm, f"VLM, {grey.name}": seen[0], f"VLM, {grey.name}, {chosen.defence.name}": guarded}
    blanks = tuple(blank.name for blank in subject.blanks)
    return write(Findings(model.id, ssd, runs, gap, effect, guards, chosen, layers, table, blanks, subject.note, subject.refusal), out)
