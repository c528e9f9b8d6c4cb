"""Readers of queries from JSONL and CSV files."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from guardlens.data.images import as_images
from guardlens.data.queries import Query
from guardlens.errors import QueryError, type_of

COLUMNS = tuple(field.name for field in fields(Query))

MISSPELT = 0.8
"""How similar (from 0 to 1) an unknown column must be to a field of `Query` to count as a misspelling of it."""


def read_queries(path: str | Path) -> tuple[Query, ...]:
    """Read queries from a `.jsonl` or `.csv` file.

    The columns are the fields of `Query`, in upper or lower case; only `text` is required. `images` holds a path, or in JSONL a list of
    paths, relative to the file. Other columns are ignored, unless they look like a misspelt field. CSV is parsed strictly: quotes must be
    closed, and no line may have more cells than the header.

    Raises:
        QueryError: The file cannot be read or has no queries, a column appears twice or is misspelt, or a line (which is named) is
            not a valid query.

    Examples:
        >>> from pathlib import Path
        >>> written = Path("mine.jsonl").write_text('{"text": "how to mend the hat ?", "label": "harmless"}')
        >>> gl.read_queries("mine.jsonl")[0].label
        'harmless'
    """
    if not isinstance(path, str | os.PathLike):
        raise QueryError(f"{type_of(path)} as a file", "the path of a .jsonl or .csv file", "write the queries to a file first")
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        next_step = "convert it: one query per line, with the columns 'text' and 'label'"
        raise QueryError(f"{path.name or str(path)!r}", "a .jsonl or .csv file", next_step)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise QueryError(f"{path}, which can't be read ({error})", "a text file in UTF-8", "check the path and its encoding") from None
    queries = [_as_query(row, path, line) for line, row in readers[path.suffix.lower()](text, path)]
    if not queries:
        raise QueryError(f"{path} without a single query", "one query per line", "check that it is the right file")
    return tuple(queries)


class _JsonObject(list[tuple[str, Any]]):
    """The names and values of a JSON object in order, including names that appear twice."""


def _read_jsonl(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the content of each line that is not blank."""
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content, object_pairs_hook=_JsonObject)
        except (ValueError, RecursionError) as error:
            raise _bad_line(path, line, f"not JSON ({str(error)[:100]})") from None
        yield line, _as_row(row, path, line) if isinstance(row, _JsonObject) else row


def _read_csv(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number of the last line and the cells of each row, without empty cells."""
    rows = _parse_csv(text, path)
    if not rows:
        return
    _, header = rows[0]
    for line, cells in rows[1:]:
        if len(cells) > len(header):
            raise _bad_line(path, line, f"{len(cells)} cells under {len(header)} columns")
        if cells:
            padded = cells + [""] * (len(header) - len(cells))
            row = _as_row(zip(header, padded, strict=True), path, line=1)  # errors about names are errors of the header
            yield line, {name: cell for name, cell in row.items() if cell != ""}


def _parse_csv(text: str, path: Path) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(len(text) + 1)  # the default limit is far below the length of some texts
    try:
        return [(reader.line_num, cells) for cells in reader]
    except csv.Error as error:
        raise _bad_line(path, reader.line_num, f"no CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _as_row(pairs: Iterable[tuple[str, Any]], path: Path, line: int) -> dict[str, Any]:
    """Return names and values by the lower-case name, after rejecting fields that appear twice and misspelt fields."""
    cells = [(name.strip().lower(), value) for name, value in pairs]
    counts = Counter(name for name, _ in cells)
    repeated = next((name for name in COLUMNS if counts[name] > 1), None)
    if repeated is not None:
        raise _bad_line(path, line, f"{repeated!r} twice")
    for name in counts:
        close = get_close_matches(name, COLUMNS, n=1, cutoff=MISSPELT) if len(name) > 3 and name not in COLUMNS else []
        if close:
            raise _bad_line(path, line, f"the column {name!r}, which is not {close[0]!r}")
    return dict(cells)


def _as_query(row: Any, path: Path, line: int) -> Query:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise _bad_line(path, line, "without a 'text'")
    known = {column: row[column] for column in COLUMNS if row.get(column) is not None}
    images = known.pop("images", ())
    names = images if isinstance(images, list | tuple) else [images]
    try:
        as_images(names, "this line")  # before the folder is put in front, which would turn an empty path into a valid one
        return Query(**known, images=tuple(str(path.parent / name) for name in names))
    except QueryError as error:
        raise _bad_line(path, line, error.found) from None


def _bad_line(path: Path, line: int, why: str) -> QueryError:
    return QueryError(f"{path}, line {line}: {why}", 'a line such as {"text": "...", "label": "harmless"}', "mend that line")
