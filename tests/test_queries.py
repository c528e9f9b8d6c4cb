import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from guardlens import Query, QueryPairs, errors, presentations, read_queries
from guardlens.queries import as_queries, require_labels, require_presentation, split
from tests.strategies import make_pairs

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


class TestPairs:
    def test_missing_names_are_made(self):
        pairs = make_pairs(3)
        assert [(a.pair, b.pair) for a, b in pairs] == [(f"pair {i}",) * 2 for i in range(3)]
        assert [q.text for q in pairs.queries] == ["bad 0", "bad 1", "bad 2", "good 0", "good 1", "good 2"] and len(pairs) == 3

    def test_own_names_are_kept(self):
        pairs = QueryPairs((Query("b", "harmful", pair="x"),), (Query("g", "harmless", pair="x"),))
        assert pairs.harmful[0].pair == pairs.harmless[0].pair == "x"

    def test_joined_sets_whose_names_collide_are_named_anew(self):
        a, b = make_pairs(2), make_pairs(3)
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
    def test_jsonl(self, tmp_path):
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
    def test_a_bad_line_is_named(self, tmp_path, name, text, why):
        with pytest.raises(errors.QueryError, match=rf"{why}[\s\S]*Expected a line such as[\s\S]*Next: mend that line"):
            read_queries(write(tmp_path, text, name))

    def test_bad_files(self, tmp_path):
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
    "wrong",
    [presentations.blank, presentations.Own, "grey", None, Image.new("RGB", (4, 4))],
    ids=["factory", "class", "name", "none", "image"],
)
def test_what_is_no_presentation(wrong):
    with pytest.raises(errors.PresentationError, match=r"as a presentation\.\nExpected text_only, presentations\.own, or what"):
        require_presentation(wrong)
    require_presentation(presentations.own)
    require_presentation(presentations.blank())


def test_split_shares_seeds_and_errors():
    items = [Query(f"q{i}") for i in range(40)]
    assert [len(part) for part in split(items, (2.0, 1.0, 1.0))] == [20, 10, 10]
    assert split(items, (1.0, 1.0), 0) != split(items, (1.0, 1.0), 1)
    with pytest.raises(errors.QueryError, match=r"1 independent groups of queries for 2 parts"):
        split([Query("a", pair="x"), Query("b", pair="x", cluster="c"), Query("c", cluster="c")], (1.0, 1.0))
