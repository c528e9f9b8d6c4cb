"""Executes the pages of `docs/how-to` and `docs/explanation` as a reader would, and says which did not do what they show.

`python -W error -m tests.docs.pages` runs all of them in one process (without pytest, and so without its type checks) and prints a JSON
object: the traceback of each page that failed. On a page,

- every block marked `python` is run, one after the other, in an empty directory;
- a block marked `text` right behind one is what that printed; numbers may differ by one in their last digit, as rounding does;
- in a table whose last column is headed `guardlens`, all code of that column is run, and all code of the one before must be Python.
"""

import ast
import contextlib
import io
import json
import os
import re
import tempfile
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for folder in ("how-to", "explanation") for page in (DOCS / folder).glob("*.md"))

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```$", re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"^\|.*\|\n\|[ :|-]+\|\n(?:\|.*\|\n?)+", re.MULTILINE)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Piece:
    """Code of a page: what it is for (`"run"`, `"parse"`, `"shown"`), its text, and the line it stands on."""

    purpose: str
    code: str
    line: int


def pieces(text: str) -> list[Piece]:
    """All code of a page, in order."""
    fences = [(match.start(), _fenced(match, text)) for match in FENCE.finditer(text)]
    outside = FENCE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)  # of the same length, so that lines keep their numbers
    tables = [(start, cells) for match in TABLE.finditer(outside) for start, cells in _rows(match, text)]
    return [piece for _, found in sorted([*fences, *tables], key=lambda item: item[0]) for piece in found]


def _fenced(match: re.Match[str], text: str) -> list[Piece]:
    purpose = {"python": "run", "text": "shown"}.get(match["language"])
    return [Piece(purpose, textwrap.dedent(match["code"]), _line(text, match.start("code")))] if purpose else []


def _rows(match: re.Match[str], text: str) -> list[tuple[int, list[Piece]]]:
    head, _, *rows = [cells(row) for row in match[0].splitlines()]
    if head[-1] != "guardlens":
        return []
    first = _line(text, match.start())
    return [(match.start() + place, _row(row, first + 2 + place)) for place, row in enumerate(rows)]


def _row(row: list[str], line: int) -> list[Piece]:
    theirs, ours = (re.findall("`([^`]+)`", cell) for cell in row[-2:])
    return [Piece("parse", code, line) for code in theirs] + [Piece("run", code, line) for code in ours]


def cells(row: str) -> list[str]:
    """The cells of a table's row."""
    return re.split(r" *\| *", row.strip(" |"))


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def same(shown: str, printed: str) -> bool:
    """Whether two texts differ by nothing but spaces and one in the last digit of a number."""
    (words, numbers), (other_words, other_numbers) = _split(shown), _split(printed)
    return words == other_words and all(map(_near, numbers, other_numbers))


def _split(text: str) -> tuple[list[list[str]], list[str]]:
    return [part.split() for part in NUMBER.split(text)], NUMBER.findall(text)


def _near(shown: str, printed: str) -> bool:
    digits = len(shown.partition(".")[2])
    return digits == len(printed.partition(".")[2]) and abs(float(shown) - float(printed)) <= (1.01 * 10**-digits if digits else 0)


def run(name: str) -> dict[str, object]:
    """The names that a page leaves behind.

    Raises:
        AssertionError: It shows another output than its code prints.
    """
    space: dict[str, object] = {}
    printed = ""
    for piece in pieces((DOCS / name).read_text()):
        if piece.purpose == "shown":
            assert same(piece.code, printed), f"{name}, line {piece.line} shows\n{piece.code}\nwhere its code printed\n{printed}"
        elif piece.purpose == "parse":
            ast.parse(piece.code)
        else:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("\n" * (piece.line - 1) + piece.code, name, "exec"), space)
            printed = out.getvalue()
    return space


def main() -> None:
    """Run and check every page, each in an empty directory of its own."""
    import matplotlib

    from tests.docs.page_checks import CHECKS

    matplotlib.use("agg")
    failures = {}
    for name in PAGES:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            try:
                CHECKS.get(name, lambda space: None)(run(name))
            except Exception:
                failures[name] = traceback.format_exc(limit=-4)
    print(json.dumps(failures))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
