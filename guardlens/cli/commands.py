"""The command line: `guardlens demo` and `guardlens check MODEL`."""

import os
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from guardlens.errors import GuardlensError

application = typer.Typer(no_args_is_help=True, add_completion=False)


def _version(wanted: bool | None) -> None:
    if wanted:
        print(f"guardlens {metadata.version('guardlens')}")
        raise typer.Exit()


@application.callback(help=__doc__)
def main(
    version: Annotated[bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is.")] = None,
) -> None:
    """Options of the command without a subcommand."""


@application.command()
def demo(
    out: Annotated[str, typer.Option(help="Where the report, figures and tables go.")] = "out/demo",
    model: Annotated[str | None, typer.Option(help="A hub id or a local directory; the embedded organism if left out.")] = None,
    data: Annotated[Path | None, typer.Option(help="JSONL or CSV with text, label, pair (and images); needed with --model.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="The longest answer, with --model; 64 if left out.", min=1)] = None,
    dtype: Annotated[str | None, typer.Option(help="As in transformers, with --model.")] = None,
    device_map: Annotated[str | None, typer.Option(help="As in transformers, e.g. auto, with --model.")] = None,
) -> None:
    """See where an image shifts requests and what brings refusals back: separability, a sweep, and defences, in one report."""
    from rich.console import Console

    from guardlens.cli import demo as work
    from guardlens.cli.demo_report import WIDTHS, lead, short_table
    from guardlens.results.files import require_writable
    from guardlens.results.tables import rich_table

    if (model is None) != (data is None):
        raise typer.BadParameter("--model and --data go together; leave both out for the organism")
    if model is None and (max_new_tokens, dtype, device_map) != (None, None, None):
        raise typer.BadParameter("--max-new-tokens, --dtype and --device-map go with --model; the organism has its own")
    folder = require_writable(out)
    if model is None or data is None:
        subject = work.organism_subject()
    else:
        subject = work.own_subject(model, data, max_new_tokens or 64, dtype=dtype or "auto", device_map=device_map)
    console = Console()
    say = partial(console.print, highlight=False, markup=False)
    say(f"guardlens demo on {subject.model!r}")
    summary = work.run(subject, folder)
    console.print(rich_table("Defences on the test split, blank images taken together (95 % intervals)", short_table(summary)))
    say(WIDTHS, style="dim")
    for sentence in lead(summary):
        say(sentence)
    say(f"\nReport: {folder / 'report.html'}   Everything in numbers: {folder / 'summary.json'}")


@application.command()
def check(
    model: Annotated[str, typer.Argument(help="'organism', a hub id, or a local directory.")],
    dtype: Annotated[str, typer.Option(help="As in transformers.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in transformers, e.g. auto.")] = None,
) -> None:
    """Say what of guardlens works on a model, in a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from guardlens.models.checks import check as try_everything
    from guardlens.models.loading import load

    loaded = load(model, dtype=dtype, device_map=device_map, self_check=False)
    results = try_everything(loaded)
    table = Table("", "what", "detail", title=Text(repr(loaded)), title_justify="left")
    signs: dict[Any, str] = {True: "[green]yes[/]", False: "[red]no[/]", None: "-"}
    for result in results:
        table.add_row(signs[result.works], Text(result.name), Text(result.detail))
    Console().print(table)
    if any(result.works is False for result in results):
        raise typer.Exit(1)


def app() -> None:
    """Run the command line, and print errors of guardlens as sentences, without a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        application()
    except GuardlensError as error:
        sys.exit(f"guardlens: {error}")
