"""Results as tidy tables: equal-length columns, facts about how they were made, saved as CSV beside JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from guardlens.errors import MismatchError, StorageError
from guardlens.notebooks import captioned, first_rows
from guardlens.storage import Provenance, atomic, write_text

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Kind = TypeVar("Kind", bound="Table")

KINDS = {
    "comparison": ("comparison", "Comparison"),
    "attribution": ("attribution", "Attribution"),
    "patching": ("patching", "Patching"),
    "sweep": ("sweeps", "Sweep"),
    "evaluation": ("evaluation", "Evaluation"),
}
"""Kind of a saved result -> its module and class, loaded when it is asked for."""

Frame = Any
"""A pandas data frame. pandas types its own selections too loosely to be checked."""


@dataclass(frozen=True, eq=False)
class Table:
    """One row per measurement.

    Attributes:
        columns: Column name -> values, all of one length.
        facts: How it was made: plans, presentations, seeds, the layout that ran.
        provenance: Model, template, versions, date.

    Raises:
        MismatchError: Columns of different lengths.

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
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise MismatchError(f"columns of the lengths {lengths}", "one length", "give every row every column")

    @classmethod
    def from_rows(cls: type[Kind], rows: Sequence[Mapping[str, Any]], **more: Any) -> Kind:
        """Make a table of dictionaries with the same keys."""
        names = list(rows[0]) if rows else []
        return cls({name: np.array([row[name] for row in rows]) for name in names}, **more)

    @cached_property
    def frame(self) -> Frame:
        """The columns as a pandas data frame."""
        import pandas as pd

        return pd.DataFrame(dict(self.columns))

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def where(self: Kind, **equal: Any) -> Kind:
        """The rows whose columns have these values.

        Raises:
            MismatchError: There is no such column.
        """
        unknown = set(equal) - set(self.columns)
        if unknown:
            raise MismatchError(f"the column {sorted(unknown)[0]!r}", f"one of {list(self.columns)}", "check its name")
        keep = np.ones(len(self), dtype=bool)
        for name, value in equal.items():
            keep &= self.columns[name] == value
        return type(self)({name: values[keep] for name, values in self.columns.items()}, self.facts, self.provenance)

    def save(self, path: str | Path) -> None:
        """Write `path`, which may leave out `.csv`, and the facts and the provenance as JSON beside it."""
        path = _csv(path)
        with atomic(path) as partial:
            self.frame.to_csv(partial, index=False, lineterminator="\r\n")  # so that a lone \r in an answer is quoted, too
        types = {name: str(values.dtype.kind) for name, values in self.columns.items()}
        meta = {"kind": self.kind, "types": types, "facts": dict(self.facts), "provenance": asdict(self.provenance)}
        write_text(path.with_suffix(".json"), json.dumps(meta, indent=1))

    @classmethod
    def load(cls: type[Kind], path: str | Path) -> Kind:
        """Read what `save` wrote; as `Table`, a result of any kind.

        Raises:
            StorageError: It can't be read, or is another kind of table.
        """
        import pandas as pd

        path = _csv(path)
        try:
            meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            strings = {name: str for name, kind in meta["types"].items() if kind in "UO"}
            frame = pd.read_csv(path, dtype=strings, keep_default_na=False, na_values={n: [""] for n in set(meta["types"]) - set(strings)})
        except (OSError, ValueError, KeyError) as error:
            raise StorageError(f"{path}, which can't be read ({error})", "a CSV with its JSON beside it", "check the path") from None
        made = KINDS.get(meta["kind"]) if cls is Table else None
        kind: type[Any] = cls if made is None else getattr(import_module(f"guardlens.{made[0]}"), made[1])
        if meta["kind"] != kind.kind:
            raise StorageError(f"a table of the kind {meta['kind']!r}", cls.kind, "load it with its own class")
        columns = {name: frame[name].to_numpy(dtype=_DTYPES[letter]) for name, letter in meta["types"].items()}
        return kind(columns, meta["facts"], Provenance(**meta["provenance"]))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} rows: {', '.join(self.columns)})"

    def _repr_html_(self) -> str:
        return captioned(repr(self), first_rows(self.frame))


def _csv(path: str | Path) -> Path:
    """The path with its ending; a point in a name (`alpha_0.25`) is none."""
    path = Path(path)
    return path if path.suffix == ".csv" else path.with_name(f"{path.name}.csv")


_DTYPES = {"U": object, "O": object, "f": float, "i": int, "b": bool}


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
