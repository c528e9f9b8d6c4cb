"""What the analyses share: their command line, whom they ask, and how a result becomes a table, figures and a page.

An analysis measures once and writes one table; its figures and its page are made of that table alone, so that both can be made again from
the published file, and a test can hold them to it.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from guardlens.errors import GuardlensError, QueryError
from guardlens.results.tables import Table

QUICK_QUERIES, QUICK_PAIRS = 24, 40
"""Of each label in a split, and pairs, with `--quick`."""


@dataclass(frozen=True)
class Settings:
    """The arguments of a run.

    Attributes:
        model: `"organism"`, a hub id or a directory.
        queries: JSONL or CSV with text, label, pair (and images); for every model but the organism.
        out: Where the results go.
        quick: Few queries and images: does it run? Its numbers are for tests.
        seed: Of the noise image, of placebos and, with `queries`, of the split.
    """

    model: str = "organism"
    queries: Path | None = None
    out: Path = Path("out")
    quick: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Analysis:
    """One question that is answered by a table.

    Attributes:
        name: Of the script, and of the files that it writes.
        measure: Makes the table.
        draw: Makes the figures of a table, by the names of their files. The first is the analysis's own name.
        tell: Makes the page of a table: blocks of Markdown, the title first.
        options: Handed to `guardlens.load`.
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
        out: Annotated[Path, typer.Option(help="Where table, figures and page go.")] = Path("out") / analysis.name,
        quick: Annotated[bool, typer.Option("--quick", help="Few queries and images: does it run?")] = False,
        seed: Annotated[int, typer.Option(help="Of the noise image, of placebos and, with --queries, of the split.")] = 0,
    ) -> None:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        try:
            run(analysis, Settings(model, queries, out, quick, seed))
        except GuardlensError as error:
            sys.exit(f"guardlens: {error}")
        print(f"Written to {out}: {analysis.name}.csv, .json, .md, .png, .svg")

    return app


def run(analysis: Analysis, settings: Settings) -> Table:
    """Measure, write everything into `settings.out`, and give the table back."""
    began = time.monotonic()
    measured = analysis.measure(subject(settings, **analysis.options), settings)
    made_by = {"command": command(analysis.name, settings), "seconds": round(time.monotonic() - began), "quick": settings.quick}
    path = settings.out / f"{analysis.name}.csv"
    replace(measured, facts=_plain({**measured.facts, **made_by, **_machine()})).save(path)
    return publish(analysis, type(measured).load(path), settings.out)


def publish(analysis: Analysis, table: Table, out: Path) -> Table:
    """Draw the figures and write the page of a saved table."""
    from guardlens import plots
    from guardlens.results.files import write_text

    for name, figure in analysis.draw(table).items():
        plots.save(figure, out / name)
    write_text(out / f"{analysis.name}.md", page(analysis, table))
    return table


def page(analysis: Analysis, table: Table) -> str:
    """The page in Markdown: what was found, then where it comes from."""
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
    """The model and what it is asked (`guardlens.cli.demo.Subject`), fewer of everything for a quick run.

    Raises:
        QueryError: A model without queries or the organism with some; or what `guardlens.cli.demo.own_subject` refuses.
    """
    from guardlens import presentations
    from guardlens.cli import demo

    if (settings.model == "organism") == (settings.queries is not None):
        found = (
            "the organism, which has its own queries, with --queries" if settings.queries else f"the model {settings.model} without queries"
        )
        raise QueryError(found, "--queries with every model but the organism", "give both --model and --queries, or neither")
    whole = (
        demo.organism_subject(**options)
        if settings.queries is None
        else demo.own_subject(settings.model, settings.queries, seed=settings.seed, **options)
    )
    seeded = (replace(image, seed=settings.seed) if isinstance(image, presentations.Noise) else image for image in whole.images)
    whole = replace(whole, images=tuple(seeded))
    return _fewer(whole) if settings.quick else whole


def _fewer(whole: Any) -> Any:
    from guardlens import presentations
    from guardlens.data.queries import QueryPairs

    pairs = QueryPairs(whole.pairs.harmful[:QUICK_PAIRS], whole.pairs.harmless[:QUICK_PAIRS])
    shown = (*whole.images[:2], *(image for image in whole.images if isinstance(image, presentations.Noise)))
    return replace(whole, pairs=pairs, validation=_spread(whole.validation), test=_spread(whole.test), images=shown, new_tokens=12)


def blanks_and_noise(subject: Any, *colors: str) -> list[Any]:
    """The subject's blank images of these colors, and its noise."""
    from guardlens.data.presentations import Blank, Noise

    return [image for image in subject.images if isinstance(image, Noise) or (isinstance(image, Blank) and image.colour in colors)]


def _spread(queries: Sequence[Any]) -> tuple[Any, ...]:
    """Some of each label, from all over the split."""
    sides = [[query for query in queries if query.label == label] for label in ("harmful", "harmless")]
    return tuple(query for side in sides for query in side[:: max(1, len(side) // QUICK_QUERIES)][:QUICK_QUERIES])


def markdown(frame: Any) -> str:
    """A data frame of texts as a table in Markdown."""
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *frame.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(cell.replace('|', '¦') for cell in line)} |" for line in lines)


def interval(value: float, low: float, high: float, form: str = "{:.2f}") -> str:
    """A number with its interval; empty where it is undefined."""
    if value != value:
        return ""
    return f"{form.format(value + 0.0)} [{form.format(low + 0.0)}, {form.format(high + 0.0)}]"


def percent(value: float, low: float, high: float) -> str:
    """A share in percent with its interval."""
    return interval(100 * value, 100 * low, 100 * high, "{:.1f}")


def picture(name: str, caption: str) -> str:
    """A figure that lies beside the page."""
    return f"![{caption}]({name}.png)\n\n*{caption}*"


def guard_layer(subject: Any, ssd: Any) -> int:
    """The layer that the rule of `guardlens.cli.guard_selection.RULE` picks, on validation beside the grey image."""
    import guardlens as gl
    from guardlens.cli.demo import STRENGTHS

    guard = gl.defences.vlm_guard(ssd.truncate(1)).intervention
    options: dict[str, Any] = {"scores": (gl.scores.refusal_logodds,), "strengths": STRENGTHS, "placebos": 0}
    (layer,) = gl.sweep(subject.model, guard, subject.validation, subject.blanks[0], **options).best(1)
    return layer


def clusters(queries: Sequence[Any]) -> Any:
    """What is resampled together, query by query."""
    import numpy as np

    return np.array([query.stands_with for query in queries])


def _machine() -> dict[str, Any]:
    import platform

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {"device": device, "threads": torch.get_num_threads()}


def _plain(value: Any) -> Any:
    """What JSON gives back as it was given."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value
