"""Execute the tutorials and write them as pages of the docs, with their figures and as notebooks to download."""

import argparse
import sys
from pathlib import Path

from nbclient.exceptions import CellExecutionError
from rich.console import Console

from analyses.tutorials.notebooks import executed, fingerprint
from analyses.tutorials.pages import up_to_date, write
from guardlens.errors import GuardlensError

SCRIPTS = Path(__file__).parent


def main(out: Path, only: list[int] | None = None, scripts: Path = SCRIPTS) -> None:
    """Execute every tutorial that changed since its page was written. Stops at the first that fails."""
    say = Console(highlight=False).print
    for script in found(scripts, only):
        mark = fingerprint(script)
        if up_to_date(out, script.stem, mark):
            say(f"{script.stem}: unchanged")
            continue
        notebook = executed(script)
        write(notebook, out, script.stem, mark)
        say(f"{script.stem}: {notebook.metadata.seconds:.0f} s")


def found(scripts: Path, only: list[int] | None) -> list[Path]:
    """The scripts named `N_slug.py`, in order, or those with the given numbers."""
    numbered = {int(path.stem.split("_")[0]): path for path in scripts.glob("[0-9]*_*.py")}
    return [numbered[number] for number in sorted(numbered) if not only or number in only]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m analyses.tutorials", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/tutorials"), help="where pages, figures and notebooks go")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the tutorials; without it, all")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(**vars(arguments()))
    except (CellExecutionError, GuardlensError) as error:
        sys.exit(str(error))
