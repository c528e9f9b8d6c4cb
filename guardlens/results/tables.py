"""Results as tidy tables: columns of equal length with facts about how they were made, saved as CSV with JSON beside it.

Each kind of result is a subclass of `Table` with a `kind` of its own, under which it registers itself. `Table.load` imports the class of a
kind that is not registered yet by the entry points of the group `guardlens.tables`, to which other packages can add kinds of theirs:

    [project.entry-points."guardlens.tables"]
    sweep = "guardlens.experiments.sweeps:Sweep"
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, wraps
from importlib import metadata
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

Frame = Any
"""A pandas data frame; pandas types its own selections too loosely for them to be checked."""

ENTRY_POINTS = "guardlens.tables"
"""The group of entry points that says where the class of each kind of table is."""


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
        columns: Column name -> values, all of one length. They are read-only copies.
        facts: How the table was made: interventions, presentations, seeds, layouts.
        provenance: Model, chat template, package versions, date.

    Raises:
        MismatchError: The columns differ in length, or one has several axes or no name.

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

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in vars(cls):
            _REGISTERED[cls.kind] = cls

    def __post_init__(self) -> None:
        require_type(self.columns, Mapping, MismatchError, "pass a dictionary of columns, or call Table.from_rows(rows)")
        object.__setattr__(self, "columns", {name: _column(name, values) for name, values in self.columns.items()})
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise MismatchError(f"columns of the lengths {lengths}", "one length", "give every row every column")

    @classmethod
    def from_rows(cls: type[Kind], rows: Sequence[Mapping[str, Any]], **more: Any) -> Kind:
        """Make a table from dictionaries with the same keys.

        Args:
            rows: The dictionaries, one per row.
            more: `facts` and `provenance`.

        Raises:
            MismatchError: The rows have different keys.
        """
        rows = list(rows) if is_several(rows) else [rows]  # type: ignore[list-item]
        for row in rows:
            require_type(row, Mapping, MismatchError, "pass dictionaries, such as frame.to_dict('records') of a data frame")
        names = list(rows[0]) if rows else []
        for place, row in enumerate(rows):
            if set(row) != set(names):
                raise MismatchError(
                    f"row {place} with the columns {list(row)}", f"those of the first, {names}", "give every row every column"
                )
        return cls({name: np.array([row[name] for row in rows]) for name in names}, **more)

    @property
    def frame(self) -> Frame:
        """A new pandas data frame with these columns."""
        return self._frame.copy()

    @cached_property
    def _frame(self) -> Frame:
        import pandas as pd

        return pd.DataFrame(dict(self.columns))

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def where(self: Kind, **equal: Any) -> Kind:
        """Select the rows whose columns have the given values.

        Raises:
            MismatchError: There is no such column, or a number is compared with a column of texts, or a text with one of numbers.
        """
        unknown = set(equal) - set(self.columns)
        if unknown:
            raise MismatchError(f"the column {sorted(unknown)[0]!r}", f"one of {list(self.columns)}", "check its name")
        selected = np.ones(len(self), dtype=bool)
        for name, value in equal.items():
            _require_comparable(name, self.columns[name], value)
            selected &= self.columns[name] == value
        return type(self)({name: values[selected] for name, values in self.columns.items()}, self.facts, self.provenance)

    def save(self, path: str | Path) -> None:
        """Write the columns to a CSV, and facts and provenance to a JSON file beside it.

        Texts are written unchanged; beware that a spreadsheet reads a cell that begins with `=` as a formula.

        Args:
            path: The CSV; the ending `.csv` may be left out.

        Raises:
            StorageError: The files can't be written, or the table holds values that can't be read back: None, dates, complex numbers, or
                facts that are not JSON.
        """
        path = _csv_path(path)
        rows = _as_csv(self)
        types = {name: _type_of(name, values) for name, values in self.columns.items()}
        meta = {"kind": self.kind, "types": types, "facts": dict(self.facts), "provenance": asdict(self.provenance), "csv": digest(rows)}
        with atomic(path.with_suffix(".json")) as json_file, atomic(path) as csv_file:
            json_file.write_bytes(encoded(meta, "the facts of a table", indent=1).encode())
            csv_file.write_bytes(rows)

    @classmethod
    def load(cls: type[Kind], path: str | Path) -> Kind:
        """Read a table that `save` wrote. `Table.load` reads any kind, and returns an instance of its class.

        Raises:
            StorageError: The files can't be read, hold another kind of table, or were changed since they were saved.
        """
        path = _csv_path(path)
        with reading(path, "a CSV with its JSON beside it, as Table.save writes them"):
            rows = path.read_bytes()
            meta = json.loads(path.with_suffix(".json").read_bytes())
            if meta["csv"] != digest(rows):
                raise StorageError(
                    f"The CSV {path} is not the one that its JSON describes.", "", "save the table again, or read it with pandas"
                )
            kind: type[Any] = class_of_kind(meta["kind"]) if cls is Table else cls
            if meta["kind"] != kind.kind:
                raise StorageError(f"a table of the kind {meta['kind']!r}", f"the kind {kind.kind!r}", "load it with its own class")
            return kind(_parsed_csv(rows, meta["types"]), meta["facts"], Provenance(**meta["provenance"]))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} rows: {', '.join(self.columns)})"

    def _repr_html_(self) -> str:
        return captioned(repr(self), first_rows(self.frame))


_REGISTERED: dict[str, type[Table]] = {Table.kind: Table}


def class_of_kind(kind: str) -> type[Table]:
    """The class of a kind of table, imported by its entry point if need be.

    Raises:
        StorageError: No installed package has such a kind.
    """
    if kind not in _REGISTERED:
        for entry in metadata.entry_points(group=ENTRY_POINTS, name=kind):
            entry.load()  # defining the class registers it
    if kind not in _REGISTERED:
        raise StorageError(f"a table of the kind {kind!r}", "a kind that is installed", "import the module of its class first")
    return _REGISTERED[kind]


def _require_comparable(name: str, column: np.ndarray, value: Any) -> None:
    """Refuse a value that no row of a column can equal, such as '5' in a column of numbers.

    Raises:
        MismatchError: The value is no text and the column is, or the other way round.
    """
    texts = column.dtype.kind == "U" or (column.dtype.kind == "O" and all(isinstance(each, str) for each in column))
    fits = isinstance(value, str) if texts else isinstance(value, Real | np.generic) and not isinstance(value, str)
    if len(column) and not fits:
        example = column[0].item() if isinstance(column[0], np.generic) else column[0]
        raise MismatchError(f"{name}={quoted(value)}", f"one {'text' if texts else 'number'}, as in {name}={example!r}")


def _csv_path(path: str | Path) -> Path:
    """The path with the ending `.csv`. A dot within a name (`alpha_0.25`) begins no ending."""
    path = require_path(path)
    return path if path.suffix == ".csv" else path.with_name(f"{path.name}.csv")


def _column(name: Any, values: Any) -> np.ndarray:
    """A read-only copy of a column."""
    try:
        column = np.array(values)
    except ValueError:  # rows of several lengths
        column = np.empty((0, 0))
    if not isinstance(name, str) or column.ndim != 1:
        raise MismatchError(f"the column {name!r} of shape {np.shape(column)}", "a text as its name, and one value per row")
    column.flags.writeable = False
    return column


TYPES = (*"U?", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8")
"""The types of columns that can be saved: text, booleans, integers and floating-point numbers."""


def _type_of(name: str, values: np.ndarray) -> str:
    """The type of a column, one of `TYPES`."""
    text = values.dtype.kind == "U" or all(isinstance(value, str) for value in values)
    kind = "U" if text and values.dtype.kind in "UO" else values.dtype.str.lstrip("<>|=").replace("b1", "?")
    if kind not in TYPES:
        odd = next((repr(value) for value in values if not isinstance(value, str)), "nothing")
        raise StorageError(
            f"the column {name!r} of {values.dtype}, with {odd}",
            "text or numbers",
            "convert dates to text, and None to '' or nan",
        )
    return kind


def _as_csv(table: Table) -> bytes:
    """The rows of a table as CSV.

    Raises:
        StorageError: They could not be read back from it.
    """
    types = {name: _type_of(name, values) for name, values in table.columns.items()}
    frame = table._frame
    try:
        rows = frame.to_csv(index=False, lineterminator="\r\n").encode()  # with \r\n, a lone \r in an answer is quoted, too
        again = _parsed_csv(rows, types)
    except (ValueError, LookupError, TypeError) as error:
        raise StorageError(f"A CSV can't hold this table ({error}).", "text in Unicode, and numbers") from error
    for name, values in table.columns.items():
        if not np.array_equal(values.astype(again[name].dtype), again[name], equal_nan=values.dtype.kind == "f"):
            raise StorageError(f"A CSV can't hold the column {name!r}.", "text without NUL, and numbers")
    return rows


def _parsed_csv(rows: bytes, types: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The columns of a CSV."""
    import pandas as pd

    if unknown := set(types.values()) - set(TYPES):
        raise ValueError(f"columns of the types {unknown}")
    if not types and rows.strip(b'\r\n"') == b"":
        return {}
    frame = pd.read_csv(BytesIO(rows), dtype=str, keep_default_na=False, skip_blank_lines=False)
    if list(frame.columns) != list(types):
        raise ValueError(f"the columns {list(frame.columns)} in place of {list(types)}")
    return {name: _parsed_column(frame[name].to_numpy(dtype=object), kind) for name, kind in types.items()}


def _parsed_column(cells: np.ndarray, kind: str) -> np.ndarray:
    """The exact values of a column from their text."""
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
