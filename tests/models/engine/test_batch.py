import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guardlens import errors
from guardlens.models.engine.layout import Layout
from tests.strategies import make_batch

bounds = st.none() | st.integers(-6, 6)


def naive(batch, positions):
    """Row by row, over lists of columns of real tokens."""
    chosen = torch.zeros_like(batch.mask)
    for row in range(len(batch.mask)):
        real = [c for c in range(batch.mask.shape[1]) if batch.mask[row, c]]
        text = [c for c in real if batch.instruction[row, c]]
        named = {
            "last": real[-1:],
            "all": real,
            "image": [c for c in real if batch.image[row, c]],
            "instruction": text,
            "post_instruction": [c for c in real if text and c > text[-1]],
        }
        columns = named[positions] if isinstance(positions, str) else real[slice(*positions)]
        chosen[row, columns] = True
    return chosen


@given(
    st.lists(st.integers(4, 9), min_size=1, max_size=4),
    st.sampled_from(["left", "right"]),
    st.integers(0, 2),
    st.sampled_from(["last", "all", "image", "instruction", "post_instruction"]) | st.tuples(bounds, bounds),
)
def test_select_equals_a_loop_over_rows(lengths, side, extra, positions):
    batch = make_batch(lengths, side, image=(0, 2), instruction=(2, 3), width=max(lengths) + extra)
    expected = naive(batch, positions)
    if expected.any(1).all():
        assert torch.equal(batch.select(positions), expected)
    else:
        with pytest.raises(errors.SiteError, match=r"no token at positions"):
            batch.select(positions)


def test_no_token_names_the_query_and_the_way_out():
    with pytest.raises(errors.SiteError, match=r"positions \(3, 4\) in query 'q0' \(presentation 'text'\)[\s\S]*Next: use a presentation"):
        make_batch((3, 5)).select((3, 4))


def test_padded_right():
    assert make_batch((3, 5), "right").padded_right and not make_batch((3, 5), "left").padded_right


@pytest.mark.parametrize("side", ["left", "right"])
def test_tile_lays_lanes_below_each_other(side):
    batch = make_batch((3, 5), side)
    layout = Layout.tile(2, 5, 3)
    assert (layout.name, layout.lanes) == ("tile", 3) and Layout.tile(2, 5, 1).name == "plain"
    chosen = batch.select("all")
    spread = layout.spread(batch.inputs)["input_ids"]
    seen = []
    for lane in range(3):
        rows, columns, queries = layout.find(chosen)[lane]
        assert rows.tolist() == [q + 2 * lane for q in queries.tolist()]
        assert torch.equal(spread[rows, columns], batch.inputs["input_ids"][chosen])
        seen += list(zip(rows.tolist(), columns.tolist(), strict=True))
        decoding = layout.decoding(lane)
        assert (decoding.rows.tolist(), decoding.columns.tolist(), decoding.queries.tolist()) == (
            [2 * lane, 2 * lane + 1],
            [-1, -1],
            [0, 1],
        )
    assert len(set(seen)) == len(seen) == 3 * 8


def test_one_lane_leaves_inputs_untouched():
    inputs = make_batch().inputs
    assert Layout.tile(2, 5, 1).spread(inputs)["input_ids"] is inputs["input_ids"]


def test_packed_inputs_lie_side_by_side_in_their_last_axis():
    pixels = torch.arange(12.0).reshape(1, 3, 4)
    spread = Layout.tile(2, 5, 3).spread({"pixel_values": pixels, "sizes": torch.ones(2, 2)}, packed={"pixel_values"})
    assert torch.equal(spread["pixel_values"], torch.cat([pixels] * 3, dim=-1)) and spread["sizes"].shape == (6, 2)
