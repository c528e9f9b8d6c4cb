"""Results as tidy tables: equal-length columns, facts about how they were made, saved as CSV beside JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, wraps
from importlib import import_module
from io import BytesIO
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from guardlens.errors import MismatchError, StorageError, is_several, quoted, require_type
from guardlens.results.files import atomic, digest, encoded, reading, require_path
from guardlens.results.notebook_html import captioned, first_rows
from guardlens.results.provenance import Provenance

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Kind = TypeVar("Kind", bound="Table")

KINDS = {
    "comparison": ("experiments.comparison", "Comparison"),
    "attribution": ("experiments.attribution", "Attribution"),
    "patching": ("experiments.patching", "Patching"),
    "sweep": ("experiments.sweeps", "Sweep"),
    "evaluation": ("evaluation.runner", "Evaluation"),
}
"""Kind of a saved result -> its module and class, loaded when it is asked for."""

Frame = Any
"""A pandas data frame. pandas types its own selections too loosely to be checked."""


def cached_frame(compute: Callable[[Kind], Frame]) -> Callable[[Kind], Frame]:
    """Make a method of a table compute its data frame once, and return a copy of it at each call."""

    @wraps(compute)
    def copied(table: Kind) -> Frame:
        computed = table.__dict__.setdefault("_computed", {})
        if compute.__qualname__ not in computed:
            computed[compute.__qualname__] = compute(table)
        return computed[compute.__qualname__].copy()

    return copied


@dataclass(frozen=True, eq=False)
class Table:
    """One row per measurement.

    Attributes:
        columns: Column name -> values, all of one length. They are copied, and can't be written to.
        facts: How it was made: interventions, presentations, seeds, the layout that ran.
        provenance: Model, template, versions, date.

    Raises:
        MismatchError: Columns of different lengths, of several axes, or without a name.

    Examples:
        >>> rows = [{"layer": 5, "auroc": 0.9}, {"layer": 6, "auroc": 1.0}]
        >>> table = gl.Table.from_rows(rows, facts={"split": "validation"})
        >>> table.where(layer=6).frame["auroc"].item()
        1.0
        >>> table.save("auroc.csv")  # and auroc.json, with facts and provenance
        >>> gl.Table.load("auroc.csv").facts
        {'split': 'validation'}
    """

    columns: Mapping[str, np.ndarray]
    facts: Mapping[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    kind: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        require_type(self.columns, Mapping, MismatchError, "hand in a dictionary of columns, or Table.from_rows(rows)")
        object.__setattr__(self, "columns", {name: _column(name, values) for name, values in self.columns.items()})
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise MismatchError(f"columns of the lengths {lengths}", "one length", "give every row every column")

    @classmethod
    def from_rows(cls: type[Kind], rows: Sequence[Mapping[str, Any]], **more: Any) -> Kind:
        """Make a table of dictionaries with the same keys.

        Raises:
            MismatchError: Rows with other keys.
        """
        rows = list(rows) if is_several(rows) else [rows]  # type: ignore[list-item]
        for row in rows:
            require_type(row, Mapping, MismatchError, "hand in dictionaries; of a data frame, frame.to_dict('records')")
        names = list(rows[0]) if rows else []
        for place, row in enumerate(rows):
            if set(row) != set(names):
                raise MismatchError(
                    f"row {place} with the columns {list(row)}", f"those of the first, {names}", "give every row every column"
                )
        return cls({name: np.array([row[name] for row in rows]) for name in names}, **more)

    @property
    def frame(self) -> Frame:
        """The columns as a pandas data frame of the caller's own."""
        return self._frame.copy()

    @cached_property
    def _frame(self) -> Frame:
        import pandas as pd

        return pd.DataFrame(dict(self.columns))

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def where(self: Kind, **equal: Any) -> Kind:
        """The rows whose columns have these values.

        Raises:
            MismatchError: There is no such column, or a number is asked of a column of texts or the other way round.
        """
        unknown = set(equal) - set(self.columns)
        if unknown:
            raise MismatchError(f"the column {sorted(unknown)[0]!r}", f"one of {list(self.columns)}", "check its name")
        keep = np.ones(len(self), dtype=bool)
        for name, value in equal.items():
            _require_comparable(name, self.columns[name], value)
            keep &= self.columns[name] == value
        return type(self)({name: values[keep] for name, values in self.columns.items()}, self.facts, self.provenance)

    def save(self, path: str | Path) -> None:
        """Write `path`, which may leave out `.csv`, and the facts and the provenance as JSON beside it.

        Text is written as it is: a spreadsheet takes a cell that begins with `=` for a formula.

        Raises:
            StorageError: It can't be written, or it holds what can't be read back: None, dates, complex numbers, facts that aren't JSON.
        """
        path = _csv(path)
        rows, types = _written(self), {name: _type_of(name, values) for name, values in self.columns.items()}
        meta = {"kind": self.kind, "types": types, "facts": dict(self.facts), "provenance": asdict(self.provenance), "csv": digest(rows)}
        described = encoded(meta, "the facts of a table", indent=1).encode()
        with atomic(path.with_suffix(".json")) as json_file, atomic(path) as csv_file:
            json_file.write_bytes(described)
            csv_file.write_bytes(rows)

    @classmethod
    def load(cls: type[Kind], path: str | Path) -> Kind:
        """Read what `save` wrote; as `Table`, a result of any kind.

        Raises:
            StorageError: It can't be read, is another kind of table, or isn't what was saved.
        """
        path = _csv(path)
        with reading(path, "a CSV with its JSON beside it, as Table.save writes them"):
            rows, meta = path.read_bytes(), json.loads(path.with_suffix(".json").read_bytes())
            if meta["csv"] != digest(rows):
                raise StorageError(
                    f"{path}, which isn't the CSV that its JSON belongs to",
                    "both as they were saved",
                    "save it again, or read it with pandas",
                )
            made = KINDS.get(meta["kind"]) if cls is Table else None
            kind: type[Any] = cls if made is None else getattr(import_module(f"guardlens.{made[0]}"), made[1])
            if meta["kind"] != kind.kind:
                raise StorageError(f"a table of the kind {meta['kind']!r}", cls.kind, "load it with its own class")
            return kind(_read(rows, meta["types"]), meta["facts"], Provenance(**meta["provenance"]))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} rows: {', '.join(self.columns)})"

    def _repr_html_(self) -> str:
        return captioned(repr(self), first_rows(self.frame))


def _require_comparable(name: str, column: np.ndarray, value: Any) -> None:
    """Refuse a value that no row of a column can equal, such as '5' in one of numbers.

    Raises:
        MismatchError: As said.
    """
    texts = column.dtype.kind == "U" or (column.dtype.kind == "O" and all(isinstance(each, str) for each in column))
    fits = isinstance(value, str) if texts else isinstance(value, Real | np.generic) and not isinstance(value, str)
    if len(column) and not fits:
        held = column[0].item() if isinstance(column[0], np.generic) else column[0]
        raise MismatchError(
            f"{name}={quoted(value)}", f"one {'text' if texts else 'number'}, as in {name}={held!r}", "ask for a value of its kind"
        )


def _csv(path: str | Path) -> Path:
    """The path with its ending; a point in a name (`alpha_0.25`) is none."""
    path = require_path(path)
    return path if path.suffix == ".csv" else path.with_name(f"{path.name}.csv")


def _column(name: Any, values: Any) -> np.ndarray:
    """A copy that can't be written to."""
    try:
        column = np.array(values)
    except ValueError:  # rows of several lengths
        column = np.empty((0, 0))
    if not isinstance(name, str) or column.ndim != 1:
        raise MismatchError(f"the column {name!r} of shape {np.shape(column)}", "a text as name, and one value per row", "mend the column")
    column.flags.writeable = False
    return column


TYPES = (*"U?", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8")
"""What a column may hold when it is saved: text, truth values, whole numbers and floating ones."""


def _type_of(name: str, values: np.ndarray) -> str:
    """The type of a column, one of `TYPES`."""
    text = values.dtype.kind == "U" or all(isinstance(value, str) for value in values)
    kind = "U" if text and values.dtype.kind in "UO" else values.dtype.str.lstrip("<>|=").replace("b1", "?")
    if kind not in TYPES:
        odd = next((repr(value) for value in values if not isinstance(value, str)), "nothing")
        raise StorageError(
            f"the column {name!r} of {values.dtype}, with {odd}",
            "text or numbers",
            "convert it: dates to text, None to '' or nan",
        )
    return kind


def _written(table: Table) -> bytes:
    """The rows as CSV.

    Raises:
        StorageError: They couldn't be read back.
    """
    types = {name: _type_of(name, values) for name, values in table.columns.items()}
    frame = table._frame
    try:
        rows = frame.to_csv(index=False, lineterminator="\r\n").encode()  # with \r\n, a lone \r in an answer is quoted, too
        again = _read(rows, types)
    except (ValueError, LookupError, TypeError) as error:
        raise StorageError(f"a table that CSV can't hold ({error})", "text in Unicode, and numbers", "mend the column") from error
    for name, values in table.columns.items():
        if not np.array_equal(values.astype(again[name].dtype), again[name], equal_nan=values.dtype.kind == "f"):
            raise StorageError(f"the column {name!r}, which CSV can't hold", "text without NUL, and numbers", "mend the column")
    return rows


def _read(rows: bytes, types: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The columns of a CSV."""
    import pandas as pd

    if unknown := set(types.values()) - set(TYPES):
        raise ValueError(f"columns of the types {unknown}")
    if not types and rows.strip(b'\r\n"') == b"":
        return {}
    frame = pd.read_csv(BytesIO(rows), dtype=str, keep_default_na=False, skip_blank_lines=False)
    if list(frame.columns) != list(types):
        raise ValueError(f"the columns {list(frame.columns)} in place of {list(types)}")
    return {name: _parsed(frame[name].to_numpy(dtype=object), kind) for name, kind in types.items()}


def _parsed(cells: np.ndarray, kind: str) -> np.ndarray:
    """The values of a column from their text, exactly."""
    if kind == "U":
        return cells
    if kind == "?":
        return cells == "True"
    return np.where(cells == "", "nan", cells).astype(kind) if kind[0] == "f" else cells.astype(kind)


def rich_table(title: str, frame: Frame) -> "RichTable":
    """A data frame as a table for the terminal."""
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(title=title, title_justify="left")
    for name in frame.columns:
        table.add_column(str(name), no_wrap=not table.columns, overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(f"{value:.3f}" if isinstance(value, float) else str(value)) for value in row))
    return table
