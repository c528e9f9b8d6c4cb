import importlib
import json
import math
import pkgutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import guardlens
from guardlens import Table, errors
from guardlens.results import tables

ROOT = Path(__file__).parents[2]


class Other(Table):
    kind = "other"


def same(a, b):
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


texts = st.sampled_from(
    ["", "nan", "NA", "None", "007", "1.0", "True", "a,b", 'say "x"', "a\rb", "c\r\nd", "e\nf", " g ", "ä\u2028"]
) | st.text("ab,\"'\n\r \t", max_size=5)
rows = st.fixed_dictionaries({"n": st.integers(-(2**53), 2**53), "flag": st.booleans(), "x": st.floats(), "text": texts})


@given(st.lists(rows, min_size=1, max_size=6), st.sets(st.sampled_from(["n", "flag", "x", "text"]), min_size=1))
def test_save_and_load_keep_every_value_and_type(tmp_path_factory, rows, names):
    rows = [{name: row[name] for name in names} for row in rows]
    path = tmp_path_factory.mktemp("t") / "t.csv"
    Table.from_rows(rows, facts={"seed": 1}).save(path)
    loaded = Table.load(path)
    back = [dict(zip(loaded.columns, values, strict=True)) for values in zip(*(c.tolist() for c in loaded.columns.values()), strict=True)]
    assert all(same(a[name], b[name]) and type(a[name]) is type(b[name]) for a, b in zip(rows, back, strict=True) for name in names)
    assert loaded.facts == {"seed": 1} and len(loaded) == len(rows)


def table():
    return Table({"layer": np.array([0, 1, 1]), "arm": np.array(["a", "a", "b"])}, {"f": 1})


def test_where():
    assert table().where(layer=1, arm="a").columns["layer"].tolist() == [1] and table().where(arm="b").facts == {"f": 1}
    assert len(table().where(arm="c")) == 0 and len(table()) == 3
    with pytest.raises(errors.MismatchError, match=r"the column 'layers'\.\nExpected one of \['layer', 'arm'\]"):
        table().where(layers=1)


def test_loaded_tables_filter_alike(tmp_path):
    table().save(tmp_path / "t")
    assert Table.load(tmp_path / "t").where(arm="a").columns["layer"].tolist() == [0, 1]


def test_rows_may_be_none_left(tmp_path):
    table().where(layer=9).save(tmp_path / "t")
    assert len(Table.load(tmp_path / "t")) == 0


def test_errors(tmp_path):
    with pytest.raises(errors.MismatchError, match=r"columns of the lengths {'a': 1, 'b': 2}[\s\S]*give every row every column"):
        Table({"a": np.zeros(1), "b": np.zeros(2)})
    table().save(tmp_path / "t")
    with pytest.raises(
        errors.StorageError, match=r"a table of the kind 'table'.\nExpected the kind 'other'.\nNext: load it with its own class"
    ):
        Other.load(tmp_path / "t")
    with pytest.raises(errors.StorageError, match=r"no.csv, which can't be read[\s\S]*a CSV with its JSON beside it"):
        Table.load(tmp_path / "no")


def test_a_result_of_any_kind_is_loaded_as_what_it_is(tmp_path):
    kinds = {each.kind: each for each in every_subclass(Table) if each.__module__.startswith("guardlens.")}
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert entry_points[tables.ENTRY_POINTS] == {kind: f"{each.__module__}:{each.__name__}" for kind, each in kinds.items()}
    for each in kinds.values():
        each({"score": np.array(["kl"])}, {"n": 1}).save(tmp_path / each.kind)
        loaded = Table.load(tmp_path / each.kind)
        assert type(loaded) is each and loaded.facts == {"n": 1}


def every_subclass(of):
    """With all modules imported."""
    for module in pkgutil.walk_packages(guardlens.__path__, "guardlens."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    return [found for each in of.__subclasses__() for found in (each, *each.__subclasses__())]


class Plugin:
    """An entry point that another package could have."""

    def __init__(self):
        self.loaded = 0

    def load(self):
        self.loaded += 1

        class Remote(Table):
            kind = "remote"

        return Remote


def test_a_kind_whose_module_was_not_imported_is_found_by_its_entry_point(tmp_path, monkeypatch):
    Table({"a": np.ones(1)}).save(tmp_path / "t")
    meta = json.loads((tmp_path / "t.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps(meta | {"kind": "remote"}))
    with pytest.raises(errors.StorageError, match=r"Found a table of the kind 'remote'\.\nExpected a kind that is installed"):
        Table.load(tmp_path / "t")
    plugin = Plugin()
    known = {(tables.ENTRY_POINTS, "remote"): [plugin]}
    monkeypatch.setattr(tables.metadata, "entry_points", lambda group, name: known.get((group, name), []))
    assert [type(Table.load(tmp_path / "t")).__name__ for _ in range(2)] == ["Remote", "Remote"] and plugin.loaded == 1
    del tables._REGISTERED["remote"]


def test_a_point_in_a_name_is_no_ending(tmp_path):
    for strength in (0.25, 0.5):
        Table({"strength": np.array([strength])}).save(tmp_path / f"alpha_{strength}")
    assert [Table.load(tmp_path / f"alpha_{strength}").columns["strength"].item() for strength in (0.25, 0.5)] == [0.25, 0.5]


ODD = {
    "None": np.array(["x", None], dtype=object),
    "complex numbers": np.array([1j]),
    "dates": np.array(["2020-01-01"], dtype="M8[D]"),
    "bytes": np.array([b"x"]),
    "long floats": np.array([1.0], dtype="g"),
    "integers beyond 64 bits": np.array([2**70]),
    "surrogates": np.array(["\ud800"]),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_a_csv_cannot_hold_is_refused_and_leaves_no_file(tmp_path, kind):
    with pytest.raises(errors.StorageError, match=r"the column 'a'|can't hold"):
        Table({"a": ODD[kind]}).save(tmp_path / "t")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "\ufeffa"])
def test_names_that_a_csv_cannot_hold(tmp_path, name):
    with pytest.raises(errors.StorageError, match=r"A CSV can't hold this table"):
        Table({name: np.ones(1)}).save(tmp_path / "t")


@pytest.mark.parametrize("facts", [{"a": np.ones(2)}, {"a": {1}}, {"a": object()}])
def test_facts_that_are_no_json_leave_the_old_table(tmp_path, facts):
    table().save(tmp_path / "t")
    with pytest.raises(errors.StorageError, match=r"in the facts of a table"):
        Table({"a": np.ones(1)}, facts).save(tmp_path / "t")
    assert Table.load(tmp_path / "t").columns["layer"].tolist() == [0, 1, 1]


def test_numbers_of_numpy_in_facts(tmp_path):
    Table({"a": np.ones(1)}, {"x": np.float32(0.5), "n": [np.int64(3)]}).save(tmp_path / "t")
    assert Table.load(tmp_path / "t").facts == {"x": 0.5, "n": [3]}


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i1", "u8", "?"])
def test_numbers_keep_their_type_and_every_bit(tmp_path, kind):
    values = np.array([0.1, -0.0, 3.0, 1e-7, np.inf, np.nan][: 6 if kind[0] == "f" else 1]).astype(kind)
    Table({"a": values}).save(tmp_path / "t")
    loaded = Table.load(tmp_path / "t").columns["a"]
    assert loaded.dtype == values.dtype and loaded.tobytes() == values.tobytes()


@pytest.mark.parametrize(("name", "values"), [("a", np.zeros((2, 2))), ("a", 5), ("a", [[1], [1, 2]]), (5, [0])])
def test_columns_have_a_name_and_one_axis(name, values):
    with pytest.raises(errors.MismatchError, match=r"the column .* of shape"):
        tables._column(name, values)


def test_lists_and_series_are_columns():
    import pandas as pd

    assert tables._column("a", [1, 2]).tolist() == [1, 2] and tables._column("b", pd.Series([0.5, 1])).tolist() == [0.5, 1]


def test_rows_have_the_same_keys():
    for rows in ([{"a": 1}, {"b": 1}], [{"a": 1}, {"a": 1, "b": 2}]):
        with pytest.raises(errors.MismatchError, match=r"row 1 with the columns .*\nExpected those of the first, \['a'\]"):
            Table.from_rows(rows)


def test_what_is_handed_out_is_the_callers_own():
    given = np.array([1, 2])
    made = Table({"a": given})
    given[0] = 7
    frame = made.frame
    frame.loc[0, "a"], frame["b"] = 9, 9
    with pytest.raises(ValueError, match="read-only"):
        made.columns["a"][0] = 9
    assert made.columns["a"].tolist() == made.frame["a"].tolist() == [1, 2] and [*made.frame] == ["a"]


CHANGES = {
    "a column more": lambda rows: rows.replace(b"a\r\n", b"a,z\r\n").replace(b"1\r\n", b"1,5\r\n"),
    "integers emptied": lambda rows: rows.replace(b"1", b""),
    "cut in the middle": lambda rows: rows[: len(rows) // 2],
    "another separator": lambda rows: rows.replace(b",", b";"),
    "text in numbers": lambda rows: rows.replace(b"1", b"abc"),
    "empty": lambda rows: b"",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_csv_that_was_changed_is_refused(tmp_path, change):
    Table({"b": np.array(["x", "y"]), "a": np.array([1, 2])}).save(tmp_path / "t")
    path = tmp_path / "t.csv"
    path.write_bytes(CHANGES[change](path.read_bytes()))
    with pytest.raises(
        errors.StorageError, match=r"The CSV .*t.csv is not the one that its JSON describes\.\nNext: save the table again, or"
    ):
        Table.load(path)


META = [
    *({"kind": kind} for kind in ([], "nowhere")),
    *({"types": types} for types in ({"a": "q"}, {"b": "i8"}, {}, None)),
    *({"provenance": provenance} for provenance in (None, {"x": 1}, {"model": 5})),
    *({missing: ...} for missing in ("kind", "types", "facts", "provenance", "csv")),
    {"csv": ""},
]


@pytest.mark.parametrize("change", META, ids=str)
def test_a_json_that_was_changed_is_refused(tmp_path, change):
    Table({"a": np.array([1, 2])}).save(tmp_path / "t")
    meta = json.loads((tmp_path / "t.json").read_text()) | change
    (tmp_path / "t.json").write_text(json.dumps({name: value for name, value in meta.items() if value is not ...}))
    with pytest.raises(errors.StorageError):
        Table.load(tmp_path / "t")


@pytest.mark.parametrize("text", ["", "[]", "null", "5", "{", "[" * 99_999])
def test_a_broken_json_is_refused(tmp_path, text):
    Table({"a": np.array([1, 2])}).save(tmp_path / "t")
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(errors.StorageError, match=r"t.csv, which can't be read"):
        Table.load(tmp_path / "t")


def test_rows_are_asked_for_by_values_of_their_columns_kind():
    table = Table({"layer": np.arange(3), "layers": np.array(["5", "6", "5+6"])})
    assert len(table.where(layer=np.int64(1))) == len(table.where(layers="5+6")) == len(table.where(layer=True)) == 1
    for odd in ({"layer": "1"}, {"layers": 5}, {"layers": None}, {"layer": [1, 2]}, {"layer": None}):
        with pytest.raises(errors.MismatchError, match=r"Found layers?=[\s\S]*\nExpected one (text|number), as in layers?="):
            table.where(**odd)
    assert len(Table({"layer": np.arange(0)}).where(layer="1")) == 0
