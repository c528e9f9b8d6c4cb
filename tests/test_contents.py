"""Digests of content: whatever differs in what it holds or does has another one, whatever its repr says."""

import dataclasses
import functools
import re
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
from guardlens.contents import content

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
    assert content({"a": 1, "b": {1, 2, 3}}) == content({"b": {3, 2, 1}, "a": 1})
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
