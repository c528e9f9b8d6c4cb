"""Reading queries from JSONL and CSV files."""

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
from guardlens.errors import QueryError

_COLUMNS = tuple(f.name for f in fields(Query))


def read_queries(path: str | Path) -> tuple[Query, ...]:
    """Read queries from a `.jsonl` or `.csv` file.

    The columns are the fields of `Query`, in capital or small letters; only `text` must be there. `images` is a path, or in JSONL a list of
    paths, relative to the file. Other columns are ignored, unless their name is that of a field but for a letter. A CSV file is read
    strictly: quotes are closed, and no line has more cells than the first.

    Raises:
        QueryError: The file can't be read, has no queries, names a column twice, or a line is not usable (the line is named).

    Examples:
        >>> from pathlib import Path
        >>> written = Path("mine.jsonl").write_text('{"text": "how to mend the hat ?", "label": "harmless"}')
        >>> gl.read_queries("mine.jsonl")[0].label
        'harmless'
    """
    if not isinstance(path, str | os.PathLike):
        raise QueryError(f"something of type {type(path).__name__} as a file", "the path of a .jsonl or .csv file", "write it there first")
    path = Path(path)
    readers = {".jsonl": _jsonl, ".csv": _csv}
    if path.suffix.lower() not in readers:
        raise QueryError(
            f"{path.name or str(path)!r}", "a .jsonl or .csv file", "convert it: one query per line, with the columns 'text' and 'label'"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise QueryError(f"{path}, which can't be read ({error})", "a text file in UTF-8", "check the path and its encoding") from None
    queries = [_query(row, path, line) for line, row in readers[path.suffix.lower()](text, path)]
    if not queries:
        raise QueryError(f"{path} without a single query", "one query per line", "check that it is the right file")
    return tuple(queries)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its names as they stand there, also those that are there twice."""


def _jsonl(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                row = json.loads(content, object_pairs_hook=_Pairs)
            except (ValueError, RecursionError) as error:
                raise _unreadable(path, line, f"not JSON ({str(error)[:100]})") from None
            yield line, _row(row, path, line) if isinstance(row, _Pairs) else row


def _csv(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(len(text) + 1)  # the module's own is far below what a text may have
    try:
        (_, header), *rows = [(reader.line_num, cells) for cells in reader] or [(1, [])]
    except csv.Error as error:
        raise _unreadable(path, reader.line_num, f"no CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)
    for line, cells in rows:
        if len(cells) > len(header):
            raise _unreadable(path, line, f"{len(cells)} cells under {len(header)} columns")
        if cells:
            pairs = [*zip(header, cells, strict=False), *((name, "") for name in header[len(cells) :])]
            yield line, {name: cell for name, cell in _row(pairs, path, 1).items() if cell != ""}


def _row(pairs: Iterable[tuple[str, Any]], path: Path, line: int) -> dict[str, Any]:
    """Names and values, the names as those of fields: each once, and none that is one of them but for a letter."""
    cells = [(name.strip().lower(), value) for name, value in pairs]
    names = [name for name, _ in cells]
    twice = next((name for name, number in Counter(names).items() if number > 1 and name in _COLUMNS), None)
    if twice is not None:
        raise _unreadable(path, line, f"{twice!r} twice")
    meant = {
        name: close for name in names if len(name) > 3 and name not in _COLUMNS and (close := get_close_matches(name, _COLUMNS, 1, 0.8))
    }
    if meant:
        name, (close,) = next(iter(meant.items()))
        raise _unreadable(path, line, f"the column {name!r}, which is not {close!r}")
    return dict(cells)


def _query(row: Any, path: Path, line: int) -> Query:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise _unreadable(path, line, "without a 'text'")
    known = {key: row[key] for key in _COLUMNS if row.get(key) is not None}
    images = known.pop("images", ())
    names = images if isinstance(images, list | tuple) else [images]
    try:
        as_images(names, "this line")  # before the folder in front makes a path of an empty or broken one
        return Query(**known, images=tuple(str(path.parent / name) for name in names))
    except QueryError as error:
        raise _unreadable(path, line, error.found) from None


def _unreadable(path: Path, line: int, why: str) -> QueryError:
    return QueryError(f"{path}, line {line}: {why}", 'a line such as {"text": "...", "label": "harmless"}', "mend that line")
