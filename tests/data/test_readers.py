import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardlens import Query, errors, read_queries


def write(tmp_path, text, name="q.jsonl", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


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
