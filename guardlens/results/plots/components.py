"""Figures of components: heads as heat maps over layers, and everything else as bars beneath them."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from guardlens.errors import MismatchError
from guardlens.results.plots import style
from guardlens.results.plots.panels import as_cells, cells_around_zero, heat_map, with_dot_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame
else:
    Axes = DataFrame = Any  # lets a run-time type checker skip what is loaded lazily

KINDS = {
    "embed": "embedding",
    "mlp": "MLP",
    "attn_rest": "attention besides heads",
    "rest": "rest of the block",
    "between": "added after the block",
}
"""Components that are drawn as bars -> name in the legend."""
HATCHES = ("", "", "////", "....", "xxxx")
"""The hatches of these bars, in order."""
HAIRLINE = 0.002
"""The share of a scale below which a bar is too small to be seen."""
WHISKER: dict[str, Any] = {"color": style.INK, "linewidth": 0.9, "alpha": 0.7}


@style.styled
def component_maps(frame: DataFrame, axes: Axes | Iterable[Axes] | None = None) -> np.ndarray:
    """The contribution of each component: above, heads by layer as a heat map; below, over the same layers, everything else as bars.

    Args:
        frame: Columns panel, unit, component (`"head"`, or one of `KINDS`), block, head, value, low, high; -1 stands for no block and no
            head. Panels come in order of appearance; those of one unit must be adjacent, and share their scales.
        axes: The axes to draw on, first those of the heat maps, then those of the bars; a new figure by default.

    Returns:
        The axes, shape [2 panel].

    Raises:
        MismatchError: A column is missing, or there are too few axes.
        NumericsError: The frame is empty.
    """
    rows = style.require(frame, "panel", "unit", "component", "block", "head", "value", "low", "high")
    blocks = np.unique(rows.loc[rows["block"] >= 0, "block"])
    heads = np.unique(rows.loc[rows["component"] == "head", "head"])
    names = style.unique(rows, "panel")
    grid = _grid(axes, len(names), 0.9 + 0.24 * max(4, min(len(heads), 16)))
    for unit in style.unique(rows, "unit"):
        alike = rows[rows["unit"] == unit]
        places = [names.index(name) for name in style.unique(alike, "panel")]
        _panels_of_one_scale(grid[:, places], alike, unit, blocks, heads)
    grid[0, 0].set_ylabel("head")
    grid[1, 0].set_ylabel("all else")
    style.add_legend(grid[1], _handles(_visible(rows)), own=axes is None)
    return grid


def _panels_of_one_scale(grid: np.ndarray, rows: style.Rows, unit: str, blocks: np.ndarray, heads: np.ndarray) -> None:
    of_heads = rows[rows["component"] == "head"]
    others = rows[rows["component"] != "head"]
    limit = float(np.nan_to_num(of_heads["value"].abs().max())) or 1.0
    ends = others[["value", "low", "high"]]
    low = min(0.0, float(ends.min().min()))
    high = max(0.0, float(ends.max().max()))
    margin = 0.06 * (high - low)
    for (above, below), name in zip(grid.T, style.unique(rows, "panel"), strict=True):
        if len(heads):
            _head_map(above, of_heads[of_heads["panel"] == name], blocks, heads, limit)
        above.set_title(name)
        _bars(below, others[others["panel"] == name], blocks)
        below.set_ylim(low - margin, high + margin)
    if len(heads):
        style.add_color_bar(grid[0], with_dot_legend(unit, of_heads), aspect=18, pad=0.03 / grid.shape[1])


@style.styled
def head_maps(frame: DataFrame, unit: str = "", axes: Axes | Iterable[Axes] | None = None) -> np.ndarray:
    """One number per head: a heat map of heads over layers per panel, on a common scale around 0.

    Args:
        frame: Columns panel, block, head, value. An optional column n is shown in the titles; with the optional columns low and high,
            heads whose interval contains 0 are marked by a dot. nan and missing heads stay grey.
        unit: The unit of the values; labels the color bar.
        axes: The axes to draw on, one per panel; a new figure by default.

    Returns:
        The axes, one per panel.

    Raises:
        MismatchError: A column is missing, or there are fewer axes than panels.
        NumericsError: The frame is empty.
    """
    rows = style.require(frame, "panel", "block", "head", "value")
    names, blocks, heads = style.unique(rows, "panel"), np.unique(rows["block"]), np.unique(rows["head"])
    limit = float(np.nan_to_num(rows["value"].abs().max())) or 1.0
    panels = style.axes_for(axes, len(names), min(len(names), 2), height=0.9 + 0.24 * max(6, min(len(heads), 16)), share_y=True)
    for ax, name in zip(panels, names, strict=True):
        panel = rows[rows["panel"] == name]
        _head_map(ax, panel, blocks, heads, limit)
        ax.set_title(f"{name}{style.of_items(panel)}")
        ax.set_xlabel("layer")
    panels[0].set_ylabel("head")
    style.add_color_bar(panels, with_dot_legend(unit, rows), aspect=18, pad=0.03 / len(panels))
    return panels


def _grid(axes: Axes | Iterable[Axes] | None, panels: int, height: float) -> np.ndarray:
    if axes is not None:
        given = np.asarray(list(np.ravel(np.asarray(axes, object))), object)
        if len(given) < 2 * panels:
            raise MismatchError(f"{len(given)} axes for {panels} panels", "two per panel", "pass more axes, or none for a new figure")
        return given[: 2 * panels].reshape(2, panels)
    from matplotlib import pyplot

    size = (1.6 + 3.0 * panels, height + 2.4)
    return pyplot.subplots(2, panels, figsize=size, sharex=True, squeeze=False, layout="constrained", height_ratios=(height, 1.6))[1]


def _head_map(ax: Axes, rows: style.Rows, blocks: np.ndarray, heads: np.ndarray, limit: float) -> None:
    down = ("head", heads)
    across = ("block", blocks)
    cells = as_cells(rows, "value", down, across)
    undecided = cells_around_zero(rows, down, across)
    heat_map(ax, cells, [str(block) for block in blocks], [str(head) for head in heads], limit, undecided, with_numbers=False)


def _visible(rows: style.Rows) -> list[str]:
    """The kinds whose bars or intervals are large enough to be seen on the scale of their panels, and so belong in the legend."""
    others = rows[rows["component"] != "head"]
    extent = others[["value", "low", "high"]].abs().max(axis=1)
    scale = extent.groupby(others["unit"]).transform("max")
    seen = set(others.loc[extent > HAIRLINE * scale, "component"])
    return [kind for kind in KINDS if kind in seen]


def _bars(ax: Axes, rows: style.Rows, blocks: np.ndarray) -> None:
    """Bars at the layers' positions in the heat map above, and the bar of the embedding before the first of them."""
    kinds = [kind for kind in KINDS if (rows["component"] == kind).any()]
    beside = [kind for kind in kinds if kind != "embed"]
    width = 0.8 / max(1, len(beside))
    first = -max(1.0, len(blocks) / 6)  # far enough off to keep its name clear of the next one
    place = {block: position for position, block in enumerate(blocks)} | {-1: first}
    for kind in kinds:
        bars = rows[rows["component"] == kind]
        offset = 0.0 if kind == "embed" else (beside.index(kind) - (len(beside) - 1) / 2) * width
        x = bars["block"].map(place) + offset
        ax.bar(x, bars["value"], width=0.8 if kind == "embed" else width, **_look(kind))
        ax.vlines(x, bars["low"], bars["high"], **WHISKER)
    ax.axhline(0, color=style.MUTED, linewidth=0.9)
    places, numbers = style.thinned(np.arange(len(blocks)), [str(block) for block in blocks])
    ax.set_xticks([first, *places] if "embed" in kinds else places, ["emb", *numbers] if "embed" in kinds else numbers)
    ax.tick_params(labelbottom=True)
    ax.set_xlabel("block")
    style.dressed(ax, grid="y")


def _look(kind: str) -> dict[str, Any]:
    number = list(KINDS).index(kind)
    return {"facecolor": style.RUNS[number], "hatch": HATCHES[number], "edgecolor": "white", "linewidth": 0.6}


def _handles(kinds: Sequence[str]) -> list[Any]:
    from matplotlib.patches import Patch

    patches = [Patch(label=KINDS[kind], **_look(kind)) for kind in kinds]
    return [*patches, style.whisker_handle(**WHISKER)]
