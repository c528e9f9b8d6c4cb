import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_hex

from guardlens.errors import MismatchError, NumericsError
from guardlens.results.plots import components as component_plots
from guardlens.results.plots import style as figure_style


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    yield
    pyplot.close("all")


def parts(panels=("text", "grey", "grey − text"), blocks=3, heads=2):
    rows = []
    for number, panel in enumerate(panels):
        unit = "change" if "−" in panel else "written"
        rows.append((panel, unit, "embed", -1, -1, 0.5))
        for block in range(blocks):
            rows += [(panel, unit, "head", block, head, (number + 1.0) * (block - head)) for head in range(heads)]
            rows += [(panel, unit, kind, block, -1, -0.25 * block - number) for kind in ("mlp", "rest")]
    frame = pd.DataFrame(rows, columns=["panel", "unit", "component", "block", "head", "value"])
    return frame.assign(low=frame["value"] - 0.1, high=frame["value"] + 0.2)


def test_panels_of_one_unit_share_their_scales():
    axes = component_plots.component_maps(parts())
    assert axes.shape == (2, 3) and [ax.get_title("left") for ax in axes[0]] == ["text", "grey", "grey − text"]
    assert [ax.collections[0].get_clim() for ax in axes[0]] == [(-4, 4), (-4, 4), (-6, 6)]
    np.testing.assert_array_equal(axes[0, 1].collections[0].get_array(), [[0, 2, 4], [-2, 0, 2]])
    assert axes[1, 0].get_ylim() == axes[1, 1].get_ylim() != axes[1, 2].get_ylim()
    assert axes[1, 0].get_ylim()[0] < -1.6 and axes[1, 0].get_ylim()[1] > 0.7
    bars = [ax.get_ylabel() for ax in axes[0, 0].figure.axes if ax.get_label() == "<colorbar>"]
    assert bars == ["written\n· 95 % interval holds 0", "change\n· 95 % interval holds 0"]


def test_bars_stand_under_their_blocks_with_intervals():
    axes = component_plots.component_maps(parts())
    bars = {(round(bar.get_x() + bar.get_width() / 2, 2), round(bar.get_height(), 2)) for bar in axes[1, 1].patches}
    assert bars == {(-1, 0.5), (-0.2, -1.0), (0.8, -1.25), (1.8, -1.5), (0.2, -1.0), (1.2, -1.25), (2.2, -1.5)}
    whiskers = axes[1, 1].collections[0].get_segments()
    np.testing.assert_allclose(whiskers[0], [[-1, 0.4], [-1, 0.7]])
    assert [tick.get_text() for tick in axes[1, 1].get_xticklabels()] == ["emb", "0", "1", "2"]
    legend = [text.get_text() for text in axes[0, 0].figure.legends[0].get_texts()]
    assert legend == ["embedding", "MLP", "rest of the block", "95 % interval"]


def test_a_legend_shows_only_what_can_be_seen():
    frame = parts()
    embedding = frame["component"] == "embed"
    frame.loc[embedding, ["value", "low", "high"]] *= [0.0, 1e-12, 1e-12]
    axes = component_plots.component_maps(frame)
    assert [text.get_text() for text in axes[0, 0].figure.legends[0].get_texts()] == ["MLP", "rest of the block", "95 % interval"]
    assert axes[1, 1].get_xticklabels()[0].get_text() == "emb", "that it adds nothing is a finding"
    frame.loc[embedding & (frame["unit"] == "change"), "high"] = 0.1
    axes = component_plots.component_maps(frame)
    assert axes[0, 0].figure.legends[0].get_texts()[0].get_text() == "embedding", "an interval can be seen, too"


def test_a_model_without_heads_still_has_bars():
    frame = parts()
    axes = component_plots.component_maps(frame[frame["component"] != "head"])
    assert len(axes[1, 0].patches) == 7 and not axes[0, 0].collections


def test_head_maps_share_one_scale_and_leave_what_is_undefined_grey():
    frame = parts().query("component == 'head'").reset_index(drop=True)
    frame.loc[0, "value"] = np.nan
    axes = component_plots.head_maps(frame, unit="share")
    assert {ax.collections[0].get_clim() for ax in axes} == {(-6, 6)}
    cells = axes[0].collections[0].get_array()
    assert cells.mask[0, 0] and cells.mask.sum() == 1
    assert to_hex(axes[0].collections[0].cmap.get_bad()) == figure_style.FAINT
    assert axes[0].figure.axes[-1].get_ylabel().startswith("share")
    component_plots.head_maps(frame.assign(value=np.nan))[0].figure.canvas.draw()


def dots(ax):
    """(column, row) of each cell that has a dot, which stands in a corner of the cell."""
    return {(round(x), round(y)) for line in ax.lines if line.get_marker() == "." for x, y in line.get_xydata()}


def test_heads_whose_interval_holds_zero_have_a_dot():
    frame = parts(("text",)).query("component == 'head'")
    (ax,) = component_plots.head_maps(frame, unit="share")
    assert dots(ax) == {(0, 0), (1, 1)}
    assert ax.figure.axes[-1].get_ylabel() == "share\n· 95 % interval holds 0"
    (sure,) = component_plots.head_maps(frame.assign(low=frame["value"] + 0.01, high=frame["value"] + 0.2), unit="share")
    assert not dots(sure) and sure.figure.axes[-1].get_ylabel() == "share"
    (undefined,) = component_plots.head_maps(frame.assign(low=np.nan))
    assert not dots(undefined)


def test_head_maps_say_n():
    (ax,) = component_plots.head_maps(parts(("text",)).query("component == 'head'").assign(n=12))
    assert ax.get_title("left") == "text (n = 12)"


def test_many_heads_and_blocks_thin_their_ticks():
    axes = component_plots.head_maps(parts(("text",), 32, 32).query("component == 'head'"))
    assert [int(tick.get_text()) for tick in axes[0].get_yticklabels()] == list(range(0, 32, 4))
    assert [int(tick.get_text()) for tick in axes[0].get_xticklabels()] == list(range(0, 32, 4))


def test_own_axes_and_refusals():
    figure, mine = pyplot.subplots(2, 3)
    axes = component_plots.component_maps(parts(), axes=mine)
    assert list(axes.ravel()) == list(mine.ravel()) and not figure.legends and axes[1, 0].get_legend() is not None
    with pytest.raises(MismatchError, match=r"Found 4 axes for 3 panels"):
        component_plots.component_maps(parts(), axes=mine[:, :2])
    with pytest.raises(MismatchError, match="without unit"):
        component_plots.component_maps(parts().drop(columns="unit"))
    with pytest.raises(NumericsError, match="a frame without rows"):
        component_plots.head_maps(parts().iloc[:0])
