"""The HTML page: everything escaped, everything inline."""

import base64
from html.parser import HTMLParser

import pandas as pd
import pytest

from guardlens.cli import html_report as report

EVIL = '<script>alert("x")</script> & <b>"bold"</b>'


class Reader(HTMLParser):
    """Tags with attributes, and the text under each tag, character references resolved."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.stack = [], {}, []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "hr", "br"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.stack[-1] if self.stack else "", []).append(data)


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.stack == []
    return reader


@pytest.fixture
def figure(tmp_path):
    path = tmp_path / "figure.png"
    path.write_bytes(b"\x89PNG not really")
    return path


def test_everything_is_escaped(tmp_path, figure):
    table = pd.DataFrame({f"head {EVIL}": [f"cell {EVIL}"]})
    report.write(
        tmp_path / "page.html",
        f"title {EVIL}",
        [f"lead {EVIL}"],
        [report.Section(f"section {EVIL}", [f"prose {EVIL}"], [(figure, f"caption {EVIL}")], table, [f"note {EVIL}"])],
        f"foot {EVIL}",
    )
    page = read(tmp_path / "page.html")
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "b"})
    shown = {tag: texts for tag, texts in page.texts.items() if tag != "style"}
    assert shown["h1"] == shown["title"] == [f"title {EVIL}"]
    assert shown["p"] == [f"lead {EVIL}", f"prose {EVIL}", f"note {EVIL}"]
    tags = [tag for tag, _ in page.tags]
    assert tags.index("table") < len(tags) - 1 - tags[::-1].index("p"), "notes stand beneath the table"
    assert (shown["h2"], shown["figcaption"], shown["footer"]) == ([f"section {EVIL}"], [f"caption {EVIL}"], [f"foot {EVIL}"])
    assert shown["th"] == [f"head {EVIL}"] and shown["td"] == [f"cell {EVIL}"]
    assert next(attributes for tag, attributes in page.tags if tag == "img")["alt"] == f"caption {EVIL}"


def test_figures_are_inline_and_nothing_is_loaded(tmp_path, figure):
    report.write(tmp_path / "page.html", "t", [], [report.Section("s", (), [(figure, "one"), (figure, "two")])], "f")
    figure.unlink()
    page = read(tmp_path / "page.html")
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 2
    for source in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data) == b"\x89PNG not really"
    assert not [tag for tag, attributes in page.tags if tag in ("link", "script", "iframe") or "href" in attributes]


def test_table_shows_cells_as_they_are(tmp_path):
    table = pd.DataFrame({"defence": ["vlm_guard[replace]", "none"], "asr": ["1.0 % [0.0, 3.8]", None], "n": [144, 1]})
    report.write(tmp_path / "deep" / "page.html", "t", [], [report.Section("s", table=table), report.Section("empty")], "f")
    page = read(tmp_path / "deep" / "page.html")
    assert page.texts["th"] == ["defence", "asr", "n"]
    assert page.texts["td"] == ["vlm_guard[replace]", "1.0 % [0.0, 3.8]", "144", "none", "1"]
    assert [tag for tag, _ in page.tags].count("table") == 1
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["page.html"]
