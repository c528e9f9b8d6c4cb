import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from guardlens import Query, QueryPairs, errors
from guardlens.data.queries import LABELS, as_queries, require_labels
from tests.strategies import make_batch, make_pairs

BAD, GOOD = Query("bad", "harmful"), Query("good", "harmless")


def test_ids_are_stable_and_of_the_text():
    assert Query("a").id == Query("a", "harmful").id != Query("b").id
    assert Query("a").id == "ca978112ca1b" and Query("a", id="mine").id == "mine"


def test_bad_queries():
    with pytest.raises(errors.QueryError, match=r"Found an empty text \(query 'x'\)\.\nExpected the text of a request"):
        Query(" \n", id="x")
    with pytest.raises(errors.QueryError, match=r"an empty text .query 'x'"):
        Query("", id="x")


NAN = float("nan")
RED = Image.new("RGB", (2, 2), "red")


@pytest.mark.parametrize("wrong", [5, b"how ?", ["how ?"], {"how ?": 1}, 1.5, True])
def test_a_text_is_text(wrong, unchecked):
    with pytest.raises(errors.QueryError, match=rf"Found something of type {type(wrong).__name__} as the text of a query"):
        Query(wrong)


@pytest.mark.parametrize("missing", [None, NAN, np.float64("nan"), pd.NA, pd.NaT])
def test_an_empty_cell_is_an_empty_field(missing, unchecked):
    """NaN as a cluster would be one cluster of all queries."""
    assert Query("a", missing, missing, missing, missing, missing, missing) == Query("a")
    with pytest.raises(errors.QueryError, match="an empty text"):
        Query(missing)


@pytest.mark.parametrize("field", ["id", "pair", "cluster", "source"])
def test_names_are_text(field, unchecked):
    for name in (7, np.int64(7), 7.0, np.float64(7), "7", np.str_("7")):
        found = getattr(Query("a", **{field: name}), field)
        assert found == "7" and type(found) is str
    assert getattr(Query("a", **{field: 0}), field) == "0"
    for wrong in (True, 1.5, float("inf"), 10**5000, ["x"], b"x"):
        with pytest.raises(errors.QueryError, match=f"as the {field} of a query"):
            Query("a", **{field: wrong})


def test_strings_of_numpy_are_strings(unchecked):
    query = Query(np.str_("a"), np.str_("harmful"))
    assert type(query.text) is type(query.label) is str and query == Query("a", "harmful")
    for wrong in (["harmful"], 1, ""):
        with pytest.raises(errors.QueryError, match="the label"):
            Query("a", wrong)


@pytest.mark.parametrize("field", ["text", "id", "pair", "cluster", "source"])
def test_half_a_character(field):
    with pytest.raises(errors.QueryError, match=rf"a lone surrogate, '\\ud83d'\) at letter 2 of the {field}"):
        Query(**{"text": "a"} | {field: "a \ud83d"})


@given(st.text(alphabet=st.characters(codec=None)), st.text(alphabet=st.characters(codec=None)))
def test_a_query_is_made_or_refused(text, name):
    try:
        query = Query(text, id=name)
    except errors.QueryError:
        return
    assert query.text == text and query.id.encode() and Query(query.text, id=query.id) == query


class TestImages:
    @pytest.mark.parametrize("one", [RED, "a.png", Path("a.png")], ids=["picture", "path", "Path"])
    def test_one_is_a_tuple_of_one(self, one, unchecked):
        assert Query("a", images=one).images == Query("a", images=[one]).images == (one,)
        assert {Query("a", images=[one])}

    def test_bytes_of_numpy_are_pictures(self, unchecked):
        pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 3), dtype=np.uint8)
        for images in (pixels, [pixels]):
            (found,) = Query("a", images=images).images
            assert found.size == (2, 3) and np.array_equal(np.asarray(found), pixels)

    @pytest.mark.parametrize(
        "wrong",
        [
            torch.ones(3, 2, 2), np.ones((2, 2, 3)), np.ones((2, 2), np.uint8), np.ones((0, 2, 3), np.uint8), b"GIF", io.BytesIO(), 5,
            {"a.png"}, {"a.png": 1}, [[RED]], [None], "", " ", "a\0.png", "a\ud800.png", "https://example.com/a.png",
            "data:image/png;base64," + "A" * 5000, Image.new("RGB", (0, 0)), Image.new("RGB", (1, 0)),
        ],
        ids=lambda wrong: str(wrong)[:16],
    )  # fmt: skip
    def test_what_is_no_picture(self, wrong, unchecked):
        for images in (wrong, [RED, wrong]):
            with pytest.raises(errors.PresentationError, match=r"of query 'q'\.\nExpected a PIL image, a path, or an array") as caught:
                Query("a", id="q", images=images)
            assert len(str(caught.value)) < 400


class TestPairs:
    @pytest.mark.parametrize("wrong", [None, 5, {"a": 1}, {"a"}, b"a"])
    def test_sides_are_queries(self, wrong, unchecked):
        with pytest.raises(errors.QueryError, match="Expected something of type Query"):
            QueryPairs(wrong, ("good",))

    def test_one_text_is_one_query(self, unchecked):
        assert QueryPairs("how to forge ?", "how to mend ?").harmless[0].text == "how to mend ?"

    def test_twins_differ_and_are_there_once(self, unchecked):
        with pytest.raises(errors.QueryError, match=r"a pair of two equal queries \('a'\)"):
            QueryPairs(("b", "a"), ("c", "a"))
        with pytest.raises(errors.QueryError, match=r"a pair that appears twice \('a'\)"):
            QueryPairs(("a", "b", "a"), ("x", "y", "x"))
        beside = [
            Query("a", label, images=(Image.new("RGB", (2, 2), colour),)) for label, colour in zip(LABELS, ("red", "blue"), strict=True)
        ]
        assert len(QueryPairs((beside[0], "a"), (beside[1], "b"))) == 2

    def test_missing_names_are_made(self):
        pairs = make_pairs(3)
        assert [(a.pair, b.pair) for a, b in pairs] == [(f"pair {i}",) * 2 for i in range(3)]
        assert [q.text for q in pairs.queries] == ["bad 0", "bad 1", "bad 2", "good 0", "good 1", "good 2"] and len(pairs) == 3

    def test_own_names_are_kept(self):
        pairs = QueryPairs((Query("b", "harmful", pair="x"),), (Query("g", "harmless", pair="x"),))
        assert pairs.harmful[0].pair == pairs.harmless[0].pair == "x"

    def test_joined_sets_whose_names_collide_are_named_anew(self, unchecked):
        a, b = make_pairs(2), QueryPairs(("forge", "steal", "break"), ("mend", "buy", "build"))
        joined = QueryPairs(a.harmful + b.harmful, a.harmless + b.harmless)
        assert [q.pair for q in joined.harmful] == [f"pair {i}" for i in range(5)] == [q.pair for q in joined.harmless]

    def test_from_queries_matches_by_name(self):
        queries = [
            Query("g1", "harmless", pair="1"),
            Query("b2", "harmful", pair="2"),
            Query("x"),
            Query("b1", "harmful", pair="1"),
            Query("g2", "harmless", pair="2"),
        ]
        assert [(a.text, b.text) for a, b in QueryPairs.from_queries(queries)] == [("b1", "g1"), ("b2", "g2")]

    def test_errors(self):
        with pytest.raises(errors.QueryError, match=r"Found 1 harmful and 0 harmless queries.*\n.*the same number of both"):
            QueryPairs((BAD,), ())
        with pytest.raises(errors.QueryError, match=rf"query '{GOOD.id}' with the label 'harmless' on the harmful side"):
            QueryPairs((GOOD,), (GOOD,))
        with pytest.raises(errors.QueryError, match=r"0 harmful and 0 harmless"):
            QueryPairs.from_queries([BAD])
        with pytest.raises(errors.QueryError, match=r"two harmful queries in pair 'p'"):
            QueryPairs.from_queries([Query("a", "harmful", pair="p"), Query("b", "harmful", pair="p")])
        with pytest.raises(errors.QueryError, match=r"pair 'p' with \['harmful'\]"):
            QueryPairs.from_queries([Query("a", "harmful", pair="p")])


def test_as_queries_and_labels():
    assert as_queries("a") == (Query("a"),) and as_queries(["a", BAD]) == (Query("a"), BAD) and len(as_queries(make_pairs(2))) == 4
    with pytest.raises(errors.QueryError, match=r"Found no queries"):
        as_queries([])
    with pytest.raises(errors.QueryError, match=r"query 'u' without a label[\s\S]*Query\(text, label="):
        require_labels([BAD, Query("u", id="u")])
    with pytest.raises(errors.QueryError, match=r"2 queries that are all harmful"):
        require_labels([BAD, BAD])


@pytest.mark.parametrize(("wrong", "named"), [({"input_ids": 1}, "dict"), (torch.ones(2, 3), "Tensor"), (None, "NoneType"), ([3], "int")])
def test_what_is_no_query_is_not_read_as_several(wrong, named):
    with pytest.raises(errors.QueryError, match=rf"Found something of type {named}\.\nExpected something of type Query\.\nNext: pass"):
        as_queries(wrong)


@pytest.mark.parametrize(
    ("wrong", "way"),
    [
        (pd.DataFrame({"text": ["a"]}), "to_dict"), ({"a", "b"}, "sorted"), (frozenset("ab"), "sorted"), (make_batch(), "its .queries"),
        (["a", None], "strings"), (b"ab", "strings"),
    ],
    ids=["frame", "set", "frozenset", "batch", "none", "bytes"],
)  # fmt: skip
def test_the_way_out_is_said(wrong, way):
    with pytest.raises(errors.QueryError, match=rf"Expected something of type Query\.\nNext: pass .*{way}"):
        as_queries(wrong)


def test_the_way_out_of_a_frame_works(unchecked):
    frame = pd.DataFrame({"text": ["a", "b"], "label": ["harmful", None], "pair": [1, None], "id": [1, 2]})
    assert [Query(**row) for row in frame.to_dict("records")] == [Query("a", "harmful", "1", pair="1"), Query("b", id="2")]
    assert as_queries(frame["text"]) == as_queries(frame["text"].to_numpy()) == as_queries(iter(["a", "b"])) == (Query("a"), Query("b"))
