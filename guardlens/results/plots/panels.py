"""Drawing inside one axes: curves, heat maps, points with whiskers, histograms. The figures in `plots` are made of these."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from guardlens.results.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any  # lets a run-time type checker skip what is loaded lazily

CHANCE = ("auroc", "accuracy", "probe", "transfer", "midpoint")
"""Metrics with one of these words in their name have their chance level at 0.5."""


def curves(ax: Axes, rows: style.Rows, runs: Sequence[str], metric: str) -> None:
    """A metric over the layers: a line with its interval band per run, and the chance line of metrics that have one."""
    chance = any(word in metric.lower() for word in CHANCE)
    layers = np.unique(rows["layer"])
    markers = {"markersize": 4.2, "markeredgecolor": "white", "markeredgewidth": 0.6, "markevery": style.tick_step(len(layers))}
    ax.axhline(0.5 if chance else 0.0, color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)) if chance else "-", zorder=1)
    for position, run in enumerate(runs):
        line = rows[rows["run"] == run].sort_values("layer")
        ax.fill_between(line["layer"], line["low"], line["high"], color=style.RUNS[position % len(style.RUNS)], alpha=0.16, linewidth=0)
        ax.plot(line["layer"], line["value"], label=run, **style.color_and_marker(position), **markers)
    if chance:
        ax.set_ylim(min(0.42, rows["low"].min() - 0.03, rows["value"].min() - 0.03), 1.03)
        ax.text(1, 0.49, "chance", transform=ax.get_yaxis_transform(), ha="right", va="top", fontsize=8.5, color=style.MUTED)
    ax.set_xticks(*style.thinned(layers, [str(layer) for layer in layers]))
    style.dressed(ax, grid="y")


def heat_map(
    ax: Axes,
    cells: np.ndarray,
    columns: Sequence[str],
    rows: Sequence[str],
    limit: float,
    undecided: np.ndarray | None = None,
    with_numbers: bool = True,
) -> None:
    """A heat map on a scale around 0.

    Args:
        ax: The axes to draw on.
        cells: Shape [row column]; nan is drawn in grey.
        columns: Names of the columns.
        rows: Names of the rows.
        limit: The end of the scale in both directions.
        undecided: Shape [row column], the cells that are marked by a dot.
        with_numbers: Whether to write each number into its cell if there are few columns.
    """
    import matplotlib

    few = len(columns) <= 12
    colors = matplotlib.colormaps["RdBu_r"].with_extremes(bad=style.FAINT)
    ax.pcolormesh(
        np.arange(len(columns) + 1) - 0.5, np.arange(len(rows) + 1) - 0.5, np.ma.masked_invalid(cells),
        cmap=colors, vmin=-limit, vmax=limit, edgecolors="white", linewidth=1.1 if few else 0.3,
    )  # fmt: skip
    if few and with_numbers:
        _write_numbers(ax, cells, limit)
    if undecided is not None and undecided.any():
        row, column = np.nonzero(undecided)
        right, up = (0.36, 0.3) if few else (0.0, 0.0)  # beside the number, if there is one
        ax.plot(column + right, row + up, marker=".", markersize=3, linestyle="none", color=style.MUTED)
    ax.set_xticks(*style.thinned(np.arange(len(columns)), columns))
    ax.set_yticks(*style.thinned(np.arange(len(rows)), rows))
    ax.spines[:].set_visible(False)
    style.dressed(ax)


def _write_numbers(ax: Axes, cells: np.ndarray, limit: float) -> None:
    decimals = 2 if limit <= 1 else (1 if limit < 10 else 0)
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            color = "white" if abs(value) > 0.6 * limit else style.INK
            text = f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−")
            ax.text(column, row - 0.02, text, ha="center", va="center", fontsize=7.5, color=color)


Axis = tuple[str, Sequence[Any] | np.ndarray]
"""The name of a column, and its values in the order of a heat map."""


def as_cells(rows: style.Rows, values: str, down: Axis, across: Axis) -> np.ndarray:
    """Tidy rows as the cells of a heat map; missing cells are nan."""
    wide = rows.pivot(index=down[0], columns=across[0], values=values)
    return wide.reindex(index=down[1], columns=across[1]).to_numpy(float)


def cells_around_zero(rows: style.Rows, down: Axis, across: Axis) -> np.ndarray | None:
    """The cells whose interval (columns low and high) contains 0; None if the rows have no intervals."""
    if not {"low", "high"} <= set(rows):
        return None
    low, high = (as_cells(rows, bound, down, across) for bound in ("low", "high"))
    return (low <= 0) & (high >= 0)


def with_dot_legend(unit: str, rows: style.Rows) -> str:
    """The unit, followed by the meaning of a dot if any interval contains 0."""
    dotted = {"low", "high"} <= set(rows) and bool(((rows["low"] <= 0) & (rows["high"] >= 0)).any())
    return f"{unit}\n· 95 % interval holds 0" if dotted else unit


def points(ax: Axes, rows: style.Rows, defences: Sequence[str], presentations: Sequence[str]) -> None:
    """A row per defence, in it a point with its interval per presentation; x is in percent."""
    step = 0.62 / max(1, len(presentations))
    for index in range(0, len(defences), 2):
        ax.axhspan(index - 0.5, index + 0.5, color="#f5f6f7", linewidth=0, zorder=0)
    for position, presentation in enumerate(presentations):
        arm = rows[rows["presentation"] == presentation]
        offset = (position - (len(presentations) - 1) / 2) * step
        place = arm["defence"].map({name: index for index, name in enumerate(defences)}) + offset
        marker = style.color_and_marker(position)
        ax.hlines(place, 100 * arm["low"], 100 * arm["high"], color=marker["color"], linewidth=1.8, alpha=0.55, zorder=2)
        look = {**marker, "linestyle": "none", "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.7}
        ax.plot(100 * arm["value"], place, label=presentation, **look, zorder=3, clip_on=False)
    ax.set_xlim(0, 100)
    ax.set_xticks(range(0, 101, 20))
    ax.spines["left"].set_visible(False)
    style.dressed(ax, grid="x")


def histogram(ax: Axes, rows: style.Rows, edges: np.ndarray) -> None:
    """The share of the queries of each class in each bin, with a triangle at the mean of the class."""
    for label, values in rows.groupby("label", sort=False)["coordinate"]:
        color = style.LABELS.get(str(label), style.MUTED)
        share = 100 * np.histogram(values, edges)[0] / len(values)
        ax.stairs(share, edges, fill=True, color=color, alpha=0.38, linewidth=0)
        ax.stairs(share, edges, color=color, linewidth=1.1)
        ax.plot(
            values.mean(), 0, marker="^", markersize=7, color=color, markeredgecolor="white", markeredgewidth=0.8, clip_on=False, zorder=5
        )
    ax.spines["left"].set_visible(False)
    ax.yaxis.set_major_locator(_few_ticks())
    ax.margins(x=0.01)
    style.dressed(ax, grid="y")


def mark_thresholds(panels: np.ndarray, runs: Sequence[str], rows: style.Rows) -> None:
    """A dashed line at the threshold of each run, labeled in the first panel."""
    for ax, run in zip(panels, runs, strict=True):
        given = rows.loc[rows["run"] == run, "threshold"].dropna().unique() if "threshold" in rows else []
        for threshold in given:
            ax.axvline(threshold, color=style.INK, linewidth=1.1, linestyle=(0, (4, 3)))
            if ax is panels[0]:
                ax.annotate("threshold", (threshold, 1), (4, 0), **_AT_TOP, fontsize=8.5, color=style.MUTED)


_AT_TOP: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "left", "va": "bottom"}


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=2, integer=True)
