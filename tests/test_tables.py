import importlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardlens import Table, errors, tables


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
    with pytest.raises(errors.StorageError, match=r"a table of the kind 'table'.\nExpected other.\nNext: load it with its own class"):
        Other.load(tmp_path / "t")
    with pytest.raises(errors.StorageError, match=r"no.csv, which can't be read[\s\S]*a CSV with its JSON beside it"):
        Table.load(tmp_path / "no")


def test_a_result_of_any_kind_is_loaded_as_what_it_is(tmp_path):
    kinds = {each.kind: each for each in every_subclass(Table) if each.__module__.startswith("guardlens.")}
    assert {kind: (f"guardlens.{module}", name) for kind, (module, name) in tables.KINDS.items()} == {
        kind: (each.__module__, each.__name__) for kind, each in kinds.items()
    }
    for each in kinds.values():
        each({"score": np.array(["kl"])}, {"n": 1}).save(tmp_path / each.kind)
        loaded = Table.load(tmp_path / each.kind)
        assert type(loaded) is each and loaded.facts == {"n": 1}


def every_subclass(of):
    """With the modules of all results imported."""
    [importlib.import_module(f"guardlens.{name}") for name in ("comparison", "attribution", "patching", "sweeps", "evaluation")]
    return [found for each in of.__subclasses__() for found in (each, *each.__subclasses__())]


def test_a_point_in_a_name_is_no_ending(tmp_path):
    for strength in (0.25, 0.5):
        Table({"strength": np.array([strength])}).save(tmp_path / f"alpha_{strength}")
    assert [Table.load(tmp_path / f"alpha_{strength}").columns["strength"].item() for strength in (0.25, 0.5)] == [0.25, 0.5]
