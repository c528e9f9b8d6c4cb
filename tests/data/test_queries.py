import csv
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from guardlens import Query, QueryPairs, errors, presentations, read_queries
from guardlens.data.presentations import require_presentation
from guardlens.data.queries import LABELS, as_queries, require_labels
from guardlens.data.splits import split
from tests.strategies import make_batch, make_pairs

BAD, GOOD = Query("bad", "harmful"), Query("good", "harmless")


def write(tmp_path, text, name="q.jsonl", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


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
        with pytest.raises(errors.QueryError, match=r"a pair that is there twice \('a'\)"):
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


class TestReaders:
    def test_jsonl(self, tmp_path, unchecked):
        rows = [
            {"text": "a\u2028b\x85", "label": "harmful", "pair": 0, "id": 7, "images": ["x.png", "d/y.png"], "note": 1},
            {"text": "c", "label": None},
        ]
        path = write(tmp_path, "\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
        first, second = read_queries(path)
        assert first == Query("a\u2028b\x85", "harmful", "7", (str(tmp_path / "x.png"), str(tmp_path / "d/y.png")), "0")
        assert second == Query("c")

    def test_csv(self, tmp_path):
        text = 'text,label,images,extra\r\n"a, ""b""\nc",harmful,x.png,1\r\nd\u2028e,,,\r\n'
        first, second = read_queries(write(tmp_path, text, "q.csv"))
        assert first == Query('a, "b"\nc', "harmful", images=(str(tmp_path / "x.png"),)) and second == Query("d\u2028e")

    @pytest.mark.parametrize(("name", "text"), [("q.jsonl", '{"text": "a"}'), ("q.csv", "text\na")])
    def test_byte_order_mark(self, tmp_path, name, text):
        assert read_queries(write(tmp_path, text, name, "utf-8-sig")) == (Query("a"),)

    @pytest.mark.parametrize(
        ("name", "text", "why"),
        [
            ("q.jsonl", '{"text": "a"}\n\n{"text": }', r"line 3: not JSON"),
            ("q.jsonl", '{"text": "a"}\n[1]', r"line 2: without a 'text'"),
            ("q.jsonl", '{"text": 3}', r"line 1: without a 'text'"),
            ("q.jsonl", '{"text": "a", "label": "evil"}', r"line 1: [\s\S]*'evil'"),
            ("q.csv", "text,label\na,harmful\nb,evil\n", r"line 3: [\s\S]*'evil'"),
            ("q.csv", "query\na\n", r"line 2: without a 'text'"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path, name, text, why, unchecked):
        with pytest.raises(errors.QueryError, match=rf"{why}[\s\S]*Expected a line such as[\s\S]*Next: mend that line"):
            read_queries(write(tmp_path, text, name))

    @pytest.mark.parametrize(
        ("name", "text", "why"),
        [
            ("q.csv", 'text,label\n"how to mend the hat ?,harmless\nhow to break the hat ?,harmful\n', r"line 3: no CSV \(unexpected end"),
            ("q.csv", 'text,label\n"a"b,harmless\n', r"line 2: no CSV"),
            ("q.csv", "text,text\na,b\n", r"line 1: 'text' twice"),
            ("q.csv", "text,label, Label\na,harmful,harmless\n", r"line 1: 'label' twice"),
            ("q.csv", "text,lable\na,harmful\n", r"line 1: the column 'lable', which is not 'label'"),
            ("q.csv", "text,label\na,harmful,b\n", r"line 2: 3 cells under 2 columns"),
            ("q.csv", "text;label\na;harmful\n", r"line 2: without a 'text'"),
            ("q.csv", "text,images\na, \n", r"line 2: the path ' ' of an image"),
            ("q.csv", "text,images\na,x\0y\n", r"line 2: the path 'x\\x00y' of an image"),
            ("q.jsonl", '{"text": "a", "text": "b"}', r"line 1: 'text' twice"),
            ("q.jsonl", '{"text": "a", "pairs": "b"}', r"line 1: the column 'pairs', which is not 'pair'"),
            ("q.jsonl", '{"text": "a", "images": ""}', r"line 1: the path '' of an image"),
            ("q.jsonl", '{"text": "a", "images": ["x.png", null]}', r"line 1: something of type NoneType as an image"),
            ("q.jsonl", '{"text": "a", "images": {"x": 1}}', r"line 1: something of type tuple as an image"),
            ("q.jsonl", '{"text": "a", "images": "https://example.com/a.png"}', r"line 1: the address 'https://example.com/a.png'"),
            ("q.jsonl", '{"text": "\\ud83d hi"}', r"line 1: half of a character"),
            ("q.jsonl", '{"text": "a", "id": ' + "9" * 5000 + "}", r"line 1: not JSON"),
            ("q.jsonl", '{"text": "a", "id": ' + "9" * 30 + "}", r"line 1: something of type int as the id"),
            ("q.jsonl", '{"text": "a"}\n' + "[" * 100_000, r"line 2: not JSON"),
            ("q.jsonl", '{"text": "a", "id": [1]}', r"line 1: something of type list as the id"),
            ("q.jsonl", '{"text": "a", "pair": false}', r"line 1: something of type bool as the pair"),
            ("q.jsonl", '{"text": "a", "label": {}}', r"line 1: the label \[\]"),
        ],
        ids=lambda value: str(value)[:24],
    )  # fmt: skip
    def test_what_a_line_can_not_mean(self, tmp_path, name, text, why, unchecked):
        with pytest.raises(errors.QueryError, match=rf"{why}[\s\S]*Next: mend that line") as caught:
            read_queries(write(tmp_path, text, name))
        assert len(str(caught.value)) < 600

    @pytest.mark.parametrize("name", ["q.CSV", "q.JSONL"])
    def test_capital_letters_and_spaces(self, tmp_path, name):
        content = " Text ,LABEL,Note\na,harmful,b\n" if name == "q.CSV" else '{"Text": "a", " LABEL": "harmful", "note": "b"}'
        assert read_queries(write(tmp_path, content, name)) == (Query("a", "harmful"),)

    @pytest.mark.parametrize("note", [{"labels": 1, "labels ": 2}, [{"text": 1}], "pairs"])
    def test_what_is_within_other_columns_is_left_alone(self, tmp_path, note):
        assert read_queries(write(tmp_path, json.dumps({"text": "a", "idx": 3, "note": note}))) == (Query("a"),)

    def test_a_long_cell(self, tmp_path):
        """The csv module's own limit is 131,072 letters, and is left as it was."""
        limit = csv.field_size_limit()
        (query,) = read_queries(write(tmp_path, "text,label\n" + "a" * 200_000 + ",harmless\n", "q.csv"))
        assert len(query.text) == 200_000 and csv.field_size_limit() == limit

    @given(st.binary(max_size=60), st.sampled_from(["q.csv", "q.jsonl"]))
    def test_any_file_is_read_or_refused(self, tmp_path_factory, content, name):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes((b"text,label,images\n" if name == "q.csv" else b'{"text": "') + content)
        try:
            assert all(query.text for query in read_queries(path))
        except errors.QueryError:
            return

    @pytest.mark.parametrize("wrong", [None, 5, b"q.csv", ["q.csv"], io.StringIO("text\na")])
    def test_what_is_no_path(self, wrong, unchecked):
        with pytest.raises(errors.QueryError):
            read_queries(wrong)

    def test_bad_files(self, tmp_path):
        with pytest.raises(errors.QueryError, match="can't be read"):
            read_queries("a\0b.csv")
        with pytest.raises(errors.QueryError, match="can't be read"):
            read_queries("n" * 5000 + ".csv")
        for name in ("q.jsonl", "q.csv"):
            with pytest.raises(errors.QueryError, match=r"without a single query"):
                read_queries(write(tmp_path, "", name))
        with pytest.raises(errors.QueryError, match=r"'q.xlsx'.\nExpected a .jsonl or .csv file"):
            read_queries(tmp_path / "q.xlsx")
        with pytest.raises(errors.QueryError, match=r"no.csv, which can't be read .*No such file"):
            read_queries(tmp_path / "no.csv")
        with pytest.raises(errors.QueryError, match=r"UTF-8"):
            read_queries(write(tmp_path, "text\nä", "l.csv", "latin-1"))


queries = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=40, max_size=60).map(
    lambda rows: [Query(f"q{i}", pair=f"{a}" if a < 8 else "", cluster=f"{b}" if b < 3 else "") for i, (a, b) in enumerate(rows)]
)


@given(queries, st.integers(0, 5))
def test_split_never_straddles(items, seed):
    try:
        parts = split(items, (0.5, 0.5), seed)
    except errors.QueryError:
        return
    assert sorted(q.id for part in parts for q in part) == sorted(q.id for q in items)
    for kind in ("pair", "cluster"):
        first, second = ({getattr(q, kind) for q in part} - {""} for part in parts)
        assert not first & second
    assert all(list(part) == [q for q in items if q in part] for part in parts)
    assert parts == split(items, (0.5, 0.5), seed)


@pytest.mark.parametrize(("wrong", "named"), [({"input_ids": 1}, "dict"), (torch.ones(2, 3), "Tensor"), (None, "NoneType"), ([3], "int")])
def test_what_is_no_query_is_not_read_as_several(wrong, named):
    with pytest.raises(errors.QueryError, match=rf"Found something of type {named}\.\nExpected something of type Query\.\nNext: hand in"):
        as_queries(wrong)


@pytest.mark.parametrize(
    ("wrong", "way"),
    [
        (pd.DataFrame({"text": ["a"]}), "to_dict"), ({"a", "b"}, "sorted"), (frozenset("ab"), "sorted"), (make_batch(), "its .queries"),
        (["a", None], "texts"), (b"ab", "texts"),
    ],
    ids=["frame", "set", "frozenset", "batch", "none", "bytes"],
)  # fmt: skip
def test_the_way_out_is_said(wrong, way):
    with pytest.raises(errors.QueryError, match=rf"Expected something of type Query\.\nNext: hand in .*{way}"):
        as_queries(wrong)


def test_the_way_out_of_a_frame_works(unchecked):
    frame = pd.DataFrame({"text": ["a", "b"], "label": ["harmful", None], "pair": [1, None], "id": [1, 2]})
    assert [Query(**row) for row in frame.to_dict("records")] == [Query("a", "harmful", "1", pair="1"), Query("b", id="2")]
    assert as_queries(frame["text"]) == as_queries(frame["text"].to_numpy()) == as_queries(iter(["a", "b"])) == (Query("a"), Query("b"))


@pytest.mark.parametrize(
    "wrong",
    [presentations.blank, presentations.Own, "grey", None, Image.new("RGB", (4, 4))],
    ids=["factory", "class", "name", "none", "image"],
)
def test_what_is_no_presentation(wrong):
    with pytest.raises(errors.PresentationError, match=r"as a presentation\.\nExpected text_only, presentations\.own, or what"):
        require_presentation(wrong)
    require_presentation(presentations.own)
    require_presentation(presentations.blank())


def test_split_shares_seeds_and_errors(unchecked):
    items = [Query(f"q{i}") for i in range(40)]
    assert [len(part) for part in split(items, (2.0, 1.0, 1.0))] == [20, 10, 10]
    assert split(items, (1.0, 1.0), 0) != split(items, (1.0, 1.0), 1)
    assert split(QueryPairs(("a", "b"), ("c", "d")), (1, 1)) and split(["a", "b"], np.array([1, 1]))
    for shares in (5, (), "ab", (1, 0), (1, -1), (1, NAN), (1, float("inf")), (1, "a"), None):
        with pytest.raises(errors.QueryError, match="Expected one positive number for each part"):
            split(items, shares)
    for seed in (-1, 1.5, "a", None):
        with pytest.raises(errors.QueryError, match="seed="):
            split(items, (1, 1), seed)
    with pytest.raises(errors.QueryError, match=r"1 independent groups of queries for 2 parts"):
        split([Query("a", pair="x"), Query("b", pair="x", cluster="c"), Query("c", cluster="c")], (1.0, 1.0))
