"""What notebooks show: read back from the HTML, as a browser would."""

from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import guardlens as gl
from guardlens import directions, gates, presentations
from guardlens import interventions as iv
from guardlens.results.notebook_html import ROWS, span

GREY = presentations.blank("grey", size=32)


def pairs_of(harmful, harmless):
    sides = {"harmful": harmful, "harmless": harmless}
    return gl.QueryPairs(*(tuple(gl.Query(text, label) for text in texts) for label, texts in sides.items()))


PAIRS = pairs_of([f"harm {i} ?" for i in range(12)], [f"help {i} ?" for i in range(12)])


class Page(HTMLParser):
    """The text of a page, the names of its tags, and its tables as lists of rows."""

    def __init__(self, value):
        super().__init__()
        self.text, self.tags, self.tables = "", set(), []
        self.feed(value._repr_html_())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.lasttag in ("td", "th") and data.strip():
            self.tables[-1][-1][-1] += data


def tables(value):
    """The tables under the names of their columns, numbers as numbers."""
    made = [pd.DataFrame(rows[1:], columns=rows[0]) for rows in Page(value).tables]
    return [table.apply(numbers) for table in made]


def numbers(column):
    try:
        return pd.to_numeric(column)
    except ValueError:
        return column


def facts(value):
    return dict(Page(value).tables[0])


@pytest.fixture(scope="module")
def collected(vlm):
    return gl.collect(vlm, PAIRS)


def test_text_of_users_is_escaped():
    evil = "<img src=x onerror=alert(1)> & <b>bold</b>"
    pairs = pairs_of([evil], ["how to mend the hat ?"])
    table = gl.Table({evil: np.array([evil])})
    for shown in (pairs, pairs.harmful[0], table):
        page = Page(shown)
        assert not page.tags & {"img", "b"} and evil in page.text


def test_a_query_names_its_images_and_does_not_draw_them():
    query = gl.Query("how to mend the hat ?", "harmless", images=(Image.new("RGB", (640, 480)), "/somewhere/hat.png"))
    assert facts(query) == {"text": query.text, "label": "harmless", "id": query.id, "images": "640x480, hat.png"}
    assert "base64" not in query._repr_html_() and "/somewhere" not in query._repr_html_()


def test_pairs_stand_side_by_side_and_are_counted():
    (rows,) = tables(PAIRS)
    assert rows.columns.tolist() == ["pair", "harmful", "harmless"] and len(rows) == ROWS
    assert rows.iloc[3].tolist() == ["pair 3", "harm 3 ?", "help 3 ?"]
    text = Page(PAIRS).text
    assert "QueryPairs(12 pairs)" in text and f"the first {ROWS} of 12 rows" in text


def test_activations_say_their_shape_and_classes(collected, vlm):
    shown = facts(collected)
    assert shown["states"] == "24 x 8 x 128 (query, layer, d_model)" and shown["queries"] == "12 harmful, 12 harmless"
    assert (shown["layers"], shown["hook"], shown["positions"], shown["model"]) == ("0 to 7", "resid_post", "last", vlm.id)


def test_directions_say_for_each_layer_what_they_hold(collected):
    ssd = directions.ssd(collected)
    _, rows = tables(ssd)
    singular = torch.linalg.svdvals(collected.states[:12].transpose(0, 1) - collected.states[12:].transpose(0, 1)) ** 2
    assert rows["share of v1"].to_numpy() == pytest.approx((singular[:, 0] / singular.sum(1)).numpy(), rel=6e-3)  # three digits
    apart = ssd.coordinates(collected)[:12, 5, 0].mean() - ssd.coordinates(collected)[12:, 5, 0].mean()
    assert rows["class means apart"][5] == pytest.approx(float(apart), rel=6e-3)
    assert tables(ssd[5])[1]["layer"].tolist() == ["all"]


def test_an_intervention_is_a_row_per_step(collected):
    ssd = directions.ssd(collected)
    intervention = iv.replace(ssd, iv.text_twin).when(gates.harmful(ssd)) >> iv.add(ssd, 2.0).at(layers=[5, 6, 7]).during("decode").scaled(
        0.5
    )
    (rows,) = tables(intervention)
    assert rows["edit"].tolist() == ["replace(ssd(rank=1), text_twin, gain=1)", "add(ssd(rank=1), alpha=2)"]
    assert rows["layers"].tolist() == ["free", "5 to 7"] and rows["gate"].tolist()[1] == "always open"
    assert rows["phase"].tolist() == ["prefill", "decode"] and rows["strength"].tolist() == [1.0, 0.5]
    assert Page(iv.nothing).text == "nothing"


def test_a_table_shows_its_first_rows_and_counts_them():
    table = gl.Table({"layer": np.arange(2000), "value": np.arange(2000) / 7})
    (rows,) = tables(table)
    assert rows["layer"].tolist() == list(range(ROWS)) and rows["value"][1] == pytest.approx(0.143)
    assert f"the first {ROWS} of 2,000 rows" in Page(table).text
    assert "Table(2000 rows: layer, value)" in Page(table).text


def test_kept_prompts_say_how_many_and_how_large(vlm):
    kept = gl.keep(vlm, PAIRS, GREY)
    assert facts(kept) == {"prompts": "12 harmful, 12 harmless", "presentation": repr(GREY), "keys and values": f"{kept.bytes:,} bytes"}


def test_spans_of_layers():
    assert [span(layers) for layers in ((3,), (3, 4), (3, 4, 5), (3, 5, 6))] == ["3", "3, 4", "3 to 5", "3, 5, 6"]


def test_a_model_says_what_it_is(vlm, llm):
    shown = facts(vlm)
    assert shown["weights"] == vlm.id and shown["images"] == "32 pixels a side" and "LLM beside" not in shown
    assert shown["layers"] == "8, d_model 128, 4 heads, vocabulary 251"
    assert shown["parameters"] == f"{sum(p.numel() for p in vlm.hf.parameters()):,}, float32 on cpu"
    assert "images" not in facts(llm)
    beside = gl.load(vlm.hf, processor=vlm.processor, llm=vlm)
    assert facts(beside)["LLM beside"] == vlm.id
