"""Draw the floors of the package from the import contract: `python -m analyses.architecture` writes `docs/figures/architecture.svg`.

The rows are those of `.importlinter`, high to low, so the picture says what `make check` holds the code to. Only the names of the floors,
and what each hands up, are written here.
"""

import argparse
from configparser import ConfigParser
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "figures" / "architecture.svg"

WIDTH, LEFT, RIGHT, ROW, GAP = 1010, 204, 764, 24, 10
"""In pixels: the picture, where the modules begin and end, the height of a row, and the space between floors."""

LETTER = 7.3
"""Width of a letter in the module's names."""


class Floor(NamedTuple):
    """Rows of the contract, from the one with the module `first` to the next floor's.

    Attributes:
        name: As the page calls it.
        first: A module of its highest row.
        gives: What the floors above get from it.
        colour: Of its band.
    """

    name: str
    first: str
    gives: str
    colour: str


FLOORS = (
    Floor("Door", "cli", "commands, a report", "#f3e6ee"),
    Floor("Embedded model", "organism", "a model and its queries", "#fdebd8"),
    Floor("Experiments", "evaluation", "tables with intervals", "#fbf3d0"),
    Floor("Reading", "collection", "states, terms, scores", "#e2f2ea"),
    Floor("Model", "model", "runs: reads, logits, tokens", "#dceefb"),
    Floor("Mathematics", "program", "directions, plans, taps", "#e4e8f7"),
    Floor("Data", "activations", "queries, batches, verdicts", "#ecebf0"),
    Floor("Ground", "sites", "places, files, intervals", "#eceeee"),
)


def rows(contract: Path = ROOT / ".importlinter") -> list[list[str]]:
    """The modules of each row, high to low, without `__main__`, which only starts `cli`."""
    parser = ConfigParser()
    parser.read(contract)
    lines = parser["importlinter:contract:floors"]["layers"].split("\n")
    found = [[name.strip() for name in line.split(":")] for line in lines if line.strip()]
    return [row for row in found if row != ["__main__"]]


def floors(found: list[list[str]]) -> list[tuple[Floor, list[list[str]]]]:
    """Each floor with its rows."""
    starts = [next(place for place, row in enumerate(found) if floor.first in row) for floor in FLOORS]
    if starts[0] or starts != sorted(starts):
        raise ValueError(
            f"floors that begin at the rows {starts} of .importlinter, where the first begins at 0 and each after the one before"
        )
    return [(floor, found[start:end]) for floor, start, end in zip(FLOORS, starts, [*starts[1:], None], strict=True)]


def draw(found: list[list[str]]) -> str:
    """The picture as SVG, on a ground of its own, so that it is legible on a dark page too."""
    top, bands = 46, []
    for floor, modules in floors(found):
        height = len(modules) * ROW + 12
        bands += _band(floor, modules, top, height)
        top += height + GAP
    return "\n".join([_head(top), *bands, *_arrows(top - GAP), "</svg>", ""])


def _head(height: int) -> str:
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title desc">
<title id="title">The floors of guardlens</title>
<desc id="desc">Each floor is a band with its modules, high to low. Imports point down, values are handed up.</desc>
<style>
text {{ font-family: "DejaVu Sans", "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px; fill: #1f2328 }}
.floor {{ font-weight: bold; font-size: 14px }}
.module {{ font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 12px }}
.chip {{ fill: #ffffff; stroke: #b9bec4 }}
.line {{ stroke: #5b6168; stroke-width: 2; fill: none }}
.tip {{ fill: #5b6168 }}
.note {{ fill: #5b6168; font-size: 12px }}
</style>
<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>"""


def _band(floor: Floor, modules: list[list[str]], top: int, height: int) -> list[str]:
    middle = top + height / 2 + 5
    chips = [chip for place, row in enumerate(modules) for chip in _row(row, top + 6 + place * ROW)]
    return [
        f'<rect x="36" y="{top}" width="{WIDTH - 72}" height="{height}" rx="6" fill="{floor.colour}"/>',
        f'<text class="floor" x="50" y="{middle:g}">{escape(floor.name)}</text>',
        *chips,
        f'<text class="gives" x="{RIGHT + 16}" y="{middle:g}">{escape(floor.gives)}</text>',
    ]


def _row(names: list[str], top: int) -> list[str]:
    drawn, x = [], float(LEFT)
    for name in names:
        width = len(name) * LETTER + 12
        drawn.append(f'<rect class="chip" x="{x:g}" y="{top + 2}" width="{width:g}" height="{ROW - 5}" rx="4"/>')
        drawn.append(f'<text class="module" x="{x + 6:g}" y="{top + 16}">{escape(name)}</text>')
        x += width + 6
    if x > RIGHT + 6:
        raise ValueError(f"a row of {x - LEFT:.0f} pixels, where {RIGHT - LEFT} are: {', '.join(names)}")
    return drawn


def _arrows(bottom: int) -> list[str]:
    right = WIDTH - 18
    return [
        f'<path class="line" d="M18 46 V{bottom - 8}"/><path class="tip" d="M12 {bottom - 9} H24 L18 {bottom} Z"/>',
        f'<path class="line" d="M{right} {bottom} V54"/><path class="tip" d="M{right - 6} 55 H{right + 6} L{right} 46 Z"/>',
        '<text class="note" x="12" y="32">imports point down</text>',
        f'<text class="note" x="{WIDTH - 12}" y="32" text-anchor="end">values are handed up</text>',
        f'<text class="note" x="{LEFT}" y="32">modules: a row imports from rows below it</text>',
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIGURE, help="The SVG to write.")
    parser.parse_args().out.write_text(draw(rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
