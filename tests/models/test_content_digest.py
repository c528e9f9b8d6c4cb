"""Digests of content: whatever differs in what it holds or does has another one, whatever its repr says."""

import dataclasses
import functools
import importlib
import os
import re
import runpy
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import guardlens as gl
from guardlens import errors, presentations
from guardlens.models.content_digest import content

LIMIT = 3


@dataclass(frozen=True, eq=False)
class Mine:
    """As users write them: an array, a field that repr leaves out, one that comparison leaves out."""

    pixels: np.ndarray
    hidden: int = field(default=0, repr=False)
    ignored: int = field(default=0, compare=False)


class Plain:
    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return "Plain()"


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Constant(str):
    def __repr__(self):
        return "Constant()"


class Table(dict):
    def __init__(self, limit=1):
        self.limit = limit


class Doubling(torch.nn.Module):
    def forward(self, states):
        return states * LIMIT


def picture(mode="RGB", colour=(1, 2, 3), size=(4, 4), palette=None):
    image = Image.new(mode, size, colour)
    if palette:
        image.putpalette(palette)
    return image


def judging(body):
    """A class whose one method has this body, as a notebook's cell would define it."""
    names = {"LIMIT": 3, "__name__": "__main__"}
    exec(f"class Judge:\n    name = 'mine'\n    def __call__(self, query, answer):\n        {body}", names)
    return names["Judge"]()


big = np.zeros(5000)
other = big.copy()
other[2500] = 1

DIFFERENT = {
    "numbers": (1, 2),
    "kinds of number": (1, 1.0),
    "a truth and a number": (True, 1),
    "text and bytes": ("a", b"a"),
    "nesting": (["a", ["b"]], [["a"], "b"]),
    "borders of texts": (["ab", "c"], ["a", "bc"]),
    "lists and tuples": ([1], (1,)),
    "keys": ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
    "sets": ({1, 2}, {1, 3}),
    "arrays that repr shortens": (big, other),
    "shapes": (np.zeros((2, 3)), np.zeros((3, 2))),
    "dtypes": (np.zeros(2, np.float32), np.zeros(2, np.int32)),
    "arrays of objects": (np.array([1, None], object), np.array([2, None], object)),
    "tensors": (torch.zeros(5000), torch.zeros(5000).index_fill(0, torch.tensor([7]), 1)),
    "bfloat16": (torch.ones(3, dtype=torch.bfloat16), torch.ones(3)),
    "pixels": (picture(), picture(colour=(1, 2, 4))),
    "modes of one size": (picture("RGBA", (1, 2, 3, 4)), picture("CMYK", (1, 2, 3, 4))),
    "palettes": (picture("P", 0, palette=[0, 0, 0]), picture("P", 0, palette=[9, 0, 0])),
    "fields of a dataclass": (Mine(big), Mine(other)),
    "a field without repr": (Mine(big), Mine(big, hidden=1)),
    "a field that is not compared": (Mine(big), Mine(big, ignored=1)),
    "an object of a constant repr": (Plain(1), Plain(2)),
    "slots": (Slotted(1), Slotted(2)),
    "patterns": (re.compile("a" * 300), re.compile("a" * 299 + "b")),
    "a deque": (deque([1]), deque([2])),
    "what a method does": (judging("return 'refused'"), judging("return 'answered'")),
    "a function behind a cache": (functools.cache(lambda: 1), functools.cache(lambda: 2)),
    "a default": (lambda a=1: a, lambda a=2: a),
    "what code reads of its module": (judging("return LIMIT"), judging("LIMIT = 4; return LIMIT")),
    "the order of entries": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "a text with a repr of its own": (Constant("a"), Constant("b")),
    "a dictionary with an attribute": (Table(), Table(limit=2)),
    "what a masked array hides": (np.ma.array([1, 2]), np.ma.array([1, 2], mask=[False, True])),
    "sparse tensors": (torch.eye(3).to_sparse(), torch.eye(4).to_sparse()),
    "a conjugate": (torch.tensor([1j]), torch.tensor([1j]).conj()),
    "generators": (np.random.default_rng(0), np.random.default_rng(1)),
    "an activation": (torch.nn.Sequential(torch.nn.ReLU()), torch.nn.Sequential(torch.nn.GELU())),
    "presentations": (presentations.blank("grey"), presentations.blank("grey", 32)),
    "queries": (gl.Query("a b", source="x"), gl.Query("a b", source="y")),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_has_another_digest(name):
    one, another = DIFFERENT[name]
    assert content(one) != content(another)
    assert content(one) == content(one)


def test_what_code_reads_of_its_module_counts(monkeypatch):
    def judge(query, answer):
        return answer if LIMIT > 2 else query

    def through(query):
        return judge(query, "")

    before = content(judge), content(through)
    monkeypatch.setitem(globals(), "LIMIT", 4)
    assert content(judge) != before[0] and content(through) != before[1]


def test_a_name_of_an_attribute_is_none_of_its_module(monkeypatch):
    def judge(query, answer):
        return query.other, answer.big

    before = content(judge)
    monkeypatch.setitem(globals(), "big", 4)
    assert content(judge) == before


def test_what_a_function_keeps_counts():
    def judge(query, answer):
        return judge.limit

    judge.limit = 1
    before = content(judge)
    judge.limit = 2
    assert content(judge) != before


def test_the_forward_of_a_module_counts(monkeypatch):
    before = content(Doubling())
    monkeypatch.setattr(Doubling, "forward", lambda self, states: states)
    assert content(Doubling()) != before


def test_a_write_behind_versions_counts():
    layer = torch.nn.Linear(2, 2)
    before = content(layer)
    layer.weight.data[0, 0] += 1
    assert content(layer) != before


@pytest.fixture
def rules(tmp_path, monkeypatch):
    """A module of one's own, as a file beside the notebook."""
    (tmp_path / "my_rules.py").write_text("LIMIT = 3\nUNREAD = 1\ndef long(answer): return len(answer) > LIMIT\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("my_rules")
    del sys.modules["my_rules"]


def judging_by(rules):
    names = {"my_rules": rules, "__name__": "__main__"}
    exec(
        "def named(answer): return my_rules.long(answer)\ndef imports(answer):\n    from my_rules import long\n    return long(answer)",
        names,
    )
    return [names["named"], names["imports"], Plain(rules)]


def test_what_a_module_of_ones_own_does_counts(rules):
    named, imports, _ = judging_by(rules)
    before = content(named), content(imports)
    rules.UNREAD = 2
    assert (content(named), content(imports)) == before
    rules.LIMIT = 4
    assert content(named) != before[0] and content(imports) != before[1]


def test_a_module_that_is_edited_and_loaded_anew_counts(rules):
    before = [content(each) for each in judging_by(rules)]
    Path(rules.__file__).write_text("def long(answer): return len(answer) > 100\n")
    importlib.invalidate_caches()
    importlib.reload(rules)
    assert all(content(each) != was for each, was in zip(judging_by(rules), before, strict=True))


def test_what_is_computed_once_and_kept_changes_nothing():
    @dataclass(frozen=True)
    class Judge:
        words: tuple = ("a", "b")

        @functools.cached_property
        def longest(self):
            return max(map(len, self.words))

    judge = Judge()
    before = content(judge)
    assert judge.longest == 1 and content(judge) == before


def test_code_that_calls_all_code_is_taken_apart_once():
    names = {"__name__": "__main__"}
    for i in range(40):
        exec(f"def f{i}(): return [{', '.join(f'f{j}' for j in range(i))}]", names)
    before = content(names["f39"])
    exec("def f0(): return 7", names)
    assert content(names["f39"]) != before


def test_a_name_that_is_not_there_yet_is_no_error():
    def outer():
        def inner():
            return later

        return content(inner)
        later = 1

    assert outer()


SCRIPT = """
import enum
from dataclasses import dataclass
import guardlens as gl
from guardlens import presentations
from guardlens.models.content_digest import content
from guardlens.models.identity import configuration

Word = enum.StrEnum("Word", ["NO", "YES"])

@dataclass(frozen=True)
class Mine:
    words: frozenset = frozenset("abcdefgh")
    kinds: tuple = (Word.NO,)
    name: str = "mine"
    def __call__(self, query, answer=""):
        return presentations.Prompt(query.text if answer in {"x", "y", "z"} else query.text + " ?")

model = gl.load("organism")
print(content(Mine()), content({"a", "b", ("c",)}), configuration(model, gl.organism.queries("validation")[:2], [Mine()]))
"""


def test_digests_are_those_of_every_process(tmp_path, capsys):
    (tmp_path / "run.py").write_text(SCRIPT)
    runpy.run_path(str(tmp_path / "run.py"), run_name="__main__")
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(gl.__file__).parents[1])}
    ran = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == capsys.readouterr().out and "mine" in ran.stdout


def test_what_a_closure_holds_counts():
    def made(value):
        return lambda: value

    assert content(made(1)) != content(made(2)) and content(made(1)) == content(made(1))


def test_a_file_counts_by_its_bytes(tmp_path):
    path = tmp_path / "a.png"
    picture().save(path)
    before = content(Path(path))
    assert content(Path(path)) == before
    picture(colour=(9, 9, 9)).save(path)
    assert content(Path(path)) != before


def test_equal_objects_have_one_digest():
    assert content(Mine(big)) == content(dataclasses.replace(Mine(big), pixels=big.copy()))
    assert content({"a": 1, "b": {1, 2, 3}}) == content({"a": 1, "b": {3, 2, 1}})
    assert content(gl.Query("a b", images=(picture(),))) == content(gl.Query("a b", images=(picture(),)))
    assert content(Plain(1)) == content(Plain(1))


def test_an_object_may_hold_itself():
    plain = Plain(None)
    plain.value = [plain]
    assert content(plain) == content(plain) != content(Plain([None]))


def test_a_fingerprint_of_its_own_is_believed():
    class Counting:
        fingerprint, calls = "v1", 0

    one, two = Counting(), Counting()
    two.calls = 5
    assert content(one) == content(two)
    two.fingerprint = "v2"
    assert content(one) != content(two)


def test_what_cannot_say_what_it_is_made_of_is_refused(tmp_path):
    with (tmp_path / "open").open("w") as file:
        for value in (Plain(threading.Lock()), Plain(file), Plain(i for i in (1, 2))):
            with pytest.raises(
                errors.StorageError,
                match=r"Found the judge, in which something can't say what it consists of: \w+ in dict in Plain",
            ):
                content(value, "the judge")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
)


@given(VALUES, VALUES)
def test_digests_are_equal_where_values_are(one, another):
    assert (content(one) == content(another)) == (repr(one) == repr(another) or _sorted(one) == _sorted(another))


def _sorted(value):
    """Values by kind, in which the order of keys does not count."""
    if isinstance(value, dict):
        return "dict", sorted((key, repr(_sorted(each))) for key, each in value.items())
    if isinstance(value, list | tuple):
        return type(value).__name__, [_sorted(each) for each in value]
    return type(value).__name__, repr(value)
