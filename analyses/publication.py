"""Shared parts of the analyses: the command line, the model with its queries, and how a result becomes a table, figures and a page.

An analysis measures once and writes one table. Its figures and its page are made from that table alone, so they can be made again from the
published file, and a test can compare them with it.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from guardlens.errors import GuardlensError, QueryError
from guardlens.results.intervals import Interval
from guardlens.results.tables import Table

QUICK_QUERIES = 24
"""Queries of each label in a split, with `--quick`."""

QUICK_PAIRS = 40
"""Pairs that directions are made from, with `--quick`."""


@dataclass(frozen=True)
class Settings:
    """The arguments of a run.

    Attributes:
        model: `"organism"`, a hub id or a directory.
        queries: JSONL or CSV with text, label, pair (and images); for every model but the organism.
        out: The directory for the results.
        quick: Whether to use few queries and images, to see whether the analysis runs. The numbers are for tests only.
        seed: Seed of the noise image, of placebos and, with `queries`, of the split.
    """

    model: str = "organism"
    queries: Path | None = None
    out: Path = Path("out")
    quick: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Analysis:
    """A question that is answered by one table.

    Attributes:
        name: The name of the script and of the files that it writes.
        measure: Makes the table.
        draw: Makes the figures from the table, by the names of their files. The first has the name of the analysis.
        tell: Makes the page from the table: blocks of Markdown, the title first.
        options: Options of `guardlens.load`.
    """

    name: str
    measure: Callable[[Any, Settings], Table]
    draw: Callable[[Any], Mapping[str, Any]]
    tell: Callable[[Any], Sequence[str]]
    options: Mapping[str, Any]


def application(analysis: Analysis) -> typer.Typer:
    """The command line of an analysis."""
    app = typer.Typer(add_completion=False)

    @app.command(help=(sys.modules[analysis.measure.__module__].__doc__ or "").split("\n\n")[0])
    def main(
        model: Annotated[str, typer.Option(help="organism, a hub id or a local directory.")] = "organism",
        queries: Annotated[Path | None, typer.Option(help="JSONL or CSV with text, label, pair; for all but the organism.")] = None,
        out: Annotated[Path, typer.Option(help="The directory for table, figures and page.")] = Path("out") / analysis.name,
        quick: Annotated[bool, typer.Option("--quick", help="Use few queries and images, to see whether it runs.")] = False,
        seed: Annotated[int, typer.Option(help="Seed of the noise image, of placebos and, with --queries, of the split.")] = 0,
    ) -> None:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        try:
            run(analysis, Settings(model, queries, out, quick, seed))
        except GuardlensError as error:
            sys.exit(f"guardlens: {error}")
        print(f"Written to {out}: {analysis.name}.csv, .json, .md, .png, .svg")

    return app


def run(analysis: Analysis, settings: Settings) -> Table:
    """Measure, write everything into `settings.out`, and return the table."""
    began = time.monotonic()
    measured = analysis.measure(subject(settings, **analysis.options), settings)
    made_by = {"command": command(analysis.name, settings), "seconds": round(time.monotonic() - began), "quick": settings.quick}
    path = settings.out / f"{analysis.name}.csv"
    replace(measured, facts={**measured.facts, **made_by, **_machine()}).save(path)
    return publish(analysis, type(measured).load(path), settings.out)


def publish(analysis: Analysis, table: Table, out: Path) -> Table:
    """Draw the figures and write the page of a saved table."""
    from guardlens import plots
    from guardlens.results.files import write_text

    for name, drawn in analysis.draw(table).items():
        plots.save(drawn, out / name)
    write_text(out / f"{analysis.name}.md", page(analysis, table))
    return table


def page(analysis: Analysis, table: Table) -> str:
    """The page in Markdown: the findings, then where they come from."""
    made, facts = table.provenance, table.facts
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    origin = (
        f"Made by `{facts['command']}` on {facts['device']}. The table is "
        f"[{analysis.name}.csv]({analysis.name}.csv); [{analysis.name}.json]({analysis.name}.json) has how it was made. "
        f"Model: {made.model}. {versions}. {made.date}."
    )
    warning = ["**A quick run: few queries. Its numbers are for tests.**"] if facts["quick"] else []
    title, *body = analysis.tell(table)
    return "\n\n".join([f"# {title}", *warning, *body, origin]) + "\n"


def command(name: str, settings: Settings) -> str:
    """The command that repeats a run."""
    words = [f"python -m analyses.{name} --model {settings.model}"]
    words += [f"--queries {settings.queries}"] if settings.queries else []
    words += [f"--out {settings.out.as_posix()}", *["--quick"] * settings.quick]
    return " ".join([*words, *([f"--seed {settings.seed}"] if settings.seed else [])])


def subject(settings: Settings, **options: Any) -> Any:
    """The model with its queries (`guardlens.cli.demo.Subject`), and with fewer of them for a quick run.

    Raises:
        QueryError: A model comes without queries, or the organism with some; or `guardlens.cli.demo.own_subject` refuses them.
    """
    from guardlens import presentations
    from guardlens.cli import demo

    if (settings.model == "organism") == (settings.queries is not None):
        found = "the organism with --queries" if settings.queries else f"the model {settings.model} without queries"
        raise QueryError(found, "--queries with every model but the organism", "pass both --model and --queries, or neither")
    if settings.queries is None:
        whole = demo.organism_subject(**options)
    else:
        whole = demo.own_subject(settings.model, settings.queries, seed=settings.seed, **options)
    images = [replace(image, seed=settings.seed) if isinstance(image, presentations.Noise) else image for image in whole.images]
    whole = replace(whole, images=tuple(images))
    return _fewer(whole) if settings.quick else whole


def _fewer(whole: Any) -> Any:
    from guardlens import presentations
    from guardlens.data.queries import QueryPairs

    pairs = QueryPairs(whole.pairs.harmful[:QUICK_PAIRS], whole.pairs.harmless[:QUICK_PAIRS])
    shown = (*whole.images[:2], *(image for image in whole.images if isinstance(image, presentations.Noise)))
    return replace(whole, pairs=pairs, validation=_sample(whole.validation), test=_sample(whole.test), images=shown, new_tokens=12)


def blanks_and_noise(subject: Any, *colors: str) -> list[Any]:
    """The blank images of these colors and the noise image of a subject."""
    from guardlens.data.presentations import Blank, Noise

    return [image for image in subject.images if isinstance(image, Noise) or (isinstance(image, Blank) and image.colour in colors)]


def _sample(queries: Sequence[Any]) -> tuple[Any, ...]:
    """Some queries of each label, spread evenly over the split."""
    sample: list[Any] = []
    for label in ("harmful", "harmless"):
        of_label = [query for query in queries if query.label == label]
        every = max(1, len(of_label) // QUICK_QUERIES)
        sample += of_label[::every][:QUICK_QUERIES]
    return tuple(sample)


def markdown(frame: Any) -> str:
    """A data frame of texts as a table in Markdown."""
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *frame.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(cell.replace('|', '¦') for cell in line)} |" for line in lines)


def interval(value: float, low: float, high: float, spec: str = ".2f") -> str:
    """A number with its interval; empty if it is undefined."""
    return "" if math.isnan(value) else format(Interval(value, low, high, n=0), spec)


def percent(value: float, low: float, high: float) -> str:
    """A share with its interval in percent, without the sign."""
    return interval(100 * value, 100 * low, 100 * high, ".1f")


def figure(name: str, caption: str) -> str:
    """The Markdown of a figure in the folder of the page."""
    return f"![{caption}]({name}.png)\n\n*{caption}*"


def guard_layer(subject: Any, ssd: Any) -> int:
    """The layer that `guardlens.cli.guard_selection.RULE` chooses on the validation split beside the grey image."""
    import guardlens as gl
    from guardlens.cli.demo import STRENGTHS

    guard = gl.defences.vlm_guard(ssd.truncate(1)).intervention
    options: dict[str, Any] = {"scores": (gl.scores.refusal_logodds,), "strengths": STRENGTHS, "placebos": 0}
    (layer,) = gl.sweep(subject.model, guard, subject.validation, subject.blanks[0], **options).best(1)
    return layer


def clusters(queries: Sequence[Any]) -> Any:
    """The cluster of each query."""
    import numpy as np

    return np.array([query.stands_with for query in queries])


def _machine() -> dict[str, Any]:
    import platform

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {"device": device, "threads": torch.get_num_threads()}
