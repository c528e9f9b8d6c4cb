"""Draw the packages of guardlens from its folders: `python -m analyses.architecture` writes `docs/figures/architecture.svg`.

The packages have the order of `.importlinter`, so the figure shows what `make check` enforces. Only their colors, and what each package
provides to those above it, are written here.
"""

import argparse
from collections.abc import Iterator
from configparser import ConfigParser
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "figures" / "architecture.svg"

WIDTH = 1060
"""Width of the figure in pixels, as all lengths here."""

LEFT = 186
RIGHT = 834
"""Where the modules of a package begin and end."""

ROW = 24
"""Height of a row of modules."""

GAP = 8
"""Space between packages."""

LETTER = 7.3
"""Width of a letter in the names of modules."""


class Look(NamedTuple):
    """How a package is drawn.

    Attributes:
        gives: What it provides to the packages above.
        color: The color of its band.
    """

    gives: str
    color: str


LOOKS = {
    "cli": Look("commands, a report", "#f3e6ee"),
    "organism": Look("a model and its queries", "#fdebd8"),
    "evaluation": Look("rates with intervals", "#fbf3d0"),
    "experiments": Look("tables, states", "#fbf3d0"),
    "models": Look("runs: reads, logits, tokens", "#dceefb"),
    "defences": Look("a prompt and an intervention", "#e2f2ea"),
    "interventions": Look("edits at sites, gates", "#e2f2ea"),
    "directions": Look("orthonormal rows per layer", "#e2f2ea"),
    "data": Look("queries, states", "#ecebf0"),
    "hooks": Look("sites", "#eceeee"),
    "results": Look("tables, files, figures", "#eceeee"),
    "errors": Look("errors", "#eceeee"),
}


class Row(NamedTuple):
    """One line of a package's band.

    Attributes:
        folder: The folder within the package, empty for the package itself.
        modules: The names of the modules in it.
    """

    folder: str
    modules: list[str]


def packages(contract: Path = ROOT / ".importlinter") -> list[str]:
    """The packages and modules at the top of guardlens, high to low, without `__main__`, which only starts `cli`."""
    parser = ConfigParser()
    parser.read(contract)
    lines = parser["importlinter:contract:packages"]["layers"].split()
    return [line for line in lines if line != "__main__"]


def rows(package: str) -> list[Row]:
    """The folders of a package with their modules, each in as many rows as it needs."""
    folder = ROOT / "guardlens" / package
    if not folder.is_dir():
        return [Row("", [package])]
    folders = [folder, *sorted(path.parent for path in folder.rglob("*/__init__.py"))]
    return [row for each in folders for row in _lines(each, folder)]


def _lines(folder: Path, package: Path) -> Iterator[Row]:
    names = sorted(path.stem.lstrip("_") for path in folder.glob("*.py") if path.stem not in ("__init__", "__main__"))
    inside = folder.relative_to(package).as_posix()
    label = "" if inside == "." else inside
    start = LEFT + (0 if not label else len(label) * LETTER + 14)
    line: list[str] = []
    for name in names:
        if start + sum(_width(each) + 6 for each in [*line, name]) > RIGHT:
            yield Row(label, line)
            line = []
        line.append(name)
    yield Row(label, line)


def draw() -> str:
    """The figure as SVG, with a background of its own so that it is legible on a dark page."""
    top = 46
    bands: list[str] = []
    for package in packages():
        lines = rows(package)
        height = len(lines) * ROW + 10
        bands += _band(package, lines, top, height)
        top += height + GAP
    return "\n".join([_head(top), *bands, *_arrows(top - GAP), "</svg>", ""])


def _head(height: int) -> str:
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title desc">
<title id="title">The packages of guardlens</title>
<desc id="desc">Each package is a band with its modules, high to low. Imports point down, values are handed up.</desc>
<style>
text {{ font-family: "DejaVu Sans", "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px; fill: #1f2328 }}
.package {{ font-weight: bold; font-size: 14px }}
.module, .folder {{ font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 12px }}
.folder {{ fill: #5b6168 }}
.chip {{ fill: #ffffff; stroke: #b9bec4 }}
.line {{ stroke: #5b6168; stroke-width: 2; fill: none }}
.tip {{ fill: #5b6168 }}
.note {{ fill: #5b6168; font-size: 12px }}
</style>
<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>"""


def _band(package: str, lines: list[Row], top: int, height: int) -> list[str]:
    middle = top + height / 2 + 5
    look = LOOKS[package]
    chips = [chip for place, row in enumerate(lines) for chip in _row(row, top + 5 + place * ROW)]
    return [
        f'<rect x="36" y="{top}" width="{WIDTH - 72}" height="{height}" rx="6" fill="{look.color}"/>',
        f'<text class="package" x="50" y="{middle:g}">{escape(package)}</text>',
        *chips,
        f'<text class="gives" x="{RIGHT + 12}" y="{middle:g}">{escape(look.gives)}</text>',
    ]


def _row(row: Row, top: int) -> list[str]:
    drawn = []
    x = float(LEFT)
    if row.folder:
        drawn.append(f'<text class="folder" x="{x:g}" y="{top + 16}">{escape(row.folder)}/</text>')
        x += len(row.folder) * LETTER + 14
    for name in row.modules:
        width = _width(name)
        drawn.append(f'<rect class="chip" x="{x:g}" y="{top + 2}" width="{width:g}" height="{ROW - 5}" rx="4"/>')
        drawn.append(f'<text class="module" x="{x + 6:g}" y="{top + 16}">{escape(name)}</text>')
        x += width + 6
    return drawn


def _width(name: str) -> float:
    return len(name) * LETTER + 12


def _arrows(bottom: int) -> list[str]:
    right = WIDTH - 18
    return [
        f'<path class="line" d="M18 46 V{bottom - 8}"/><path class="tip" d="M12 {bottom - 9} H24 L18 {bottom} Z"/>',
        f'<path class="line" d="M{right} {bottom} V54"/><path class="tip" d="M{right - 6} 55 H{right + 6} L{right} 46 Z"/>',
        '<text class="note" x="12" y="32">imports point down</text>',
        f'<text class="note" x="{WIDTH - 12}" y="32" text-anchor="end">values are handed up</text>',
        f'<text class="note" x="{LEFT}" y="32">a package imports only from the packages below it</text>',
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIGURE, help="The SVG to write.")
    parser.parse_args().out.write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
