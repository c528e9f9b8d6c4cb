"""Figures of directions: where queries lie along them, their spectrum, and how similar those of two layers are."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from guardlens.errors import NumericsError
from guardlens.results.plots import style
from guardlens.results.plots.panels import as_cells, heat_map, histogram, mark_thresholds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame
else:
    Axes = DataFrame = Any  # lets a run-time type checker skip what is loaded lazily

MOST_SHARES = 10
"""Directions of each layer whose shares are drawn."""


@style.styled
def coordinates(frame: DataFrame, axes: Axes | Iterable[Axes] | None = None, name: str = "projection on $v_1$") -> np.ndarray:
    """Coordinates of queries along a direction: per run a panel with a histogram of each class, the class means as triangles, and the
    threshold of the gate.

    Args:
        frame: Columns run, label, coordinate, and optionally threshold (nan for none).
        axes: The axes to draw on, one per run; a new figure by default.
        name: The name and unit of the coordinate; labels the x axis.

    Returns:
        The axes, one per run, sharing x.

    Raises:
        MismatchError: A column is missing, or there are fewer axes than runs.
        NumericsError: The frame is empty or a coordinate is not finite.

    Examples:
        >>> import pandas as pd
        >>> labels = [query.label for query in text.queries]
        >>> frame = pd.DataFrame({"run": "text", "label": labels, "coordinate": ssd.coordinates(text)[:, 5, 0]})
        >>> len(plots.coordinates(frame))
        1
    """
    rows = style.require(frame, "run", "label", "coordinate")
    if not np.isfinite(rows["coordinate"]).all():
        raise NumericsError("coordinates that are not finite", "finite numbers", "look at the activations of these queries")
    runs = style.unique(rows, "run")
    edges = np.histogram_bin_edges(rows["coordinate"], bins=44)
    panels = style.axes_for(axes, len(runs), 1, height=1.15, width=7.2, share_y=True)
    for ax, run in zip(panels, runs, strict=True):
        histogram(ax, rows[rows["run"] == run], edges)
        ax.set_title(run)
    mark_thresholds(panels, runs, rows)
    panels[-1].set_xlabel(name)
    panels[-1].tick_params(labelbottom=True)
    if axes is None:
        panels[0].figure.supylabel("queries in the bin (%)", fontsize=9.5, color=style.MUTED)
    style.add_legend(panels, style.label_handles(rows), own=axes is None)
    return panels


def coordinates_frame(along: Mapping[str, np.ndarray], labels: Mapping[str, Sequence[str]], threshold: float) -> DataFrame:
    """The frame for `coordinates`, from the coordinates and labels of the queries of each run."""
    import pandas as pd

    frames = [pd.DataFrame({"run": run, "label": labels[run], "coordinate": along[run], "threshold": threshold}) for run in along]
    return pd.concat(frames, ignore_index=True)


def basis_frames(layers: Sequence[int], shares: np.ndarray, cosines: np.ndarray) -> tuple[DataFrame, DataFrame]:
    """The frames for `basis`, from shares per layer and direction and cosines per pair of layers. A single layer has no cosines."""
    import pandas as pd

    ranks = range(1, min(shares.shape[1], MOST_SHARES) + 1)
    by_rank = pd.MultiIndex.from_product([layers, ranks], names=["layer", "index"])
    by_layer = pd.MultiIndex.from_product([layers, layers], names=["layer", "other"])
    share_frame = pd.DataFrame({"share": shares[:, : len(ranks)].ravel()}, index=by_rank).reset_index()
    cosine_frame = pd.DataFrame({"value": cosines.ravel()}, index=by_layer).reset_index()
    return share_frame, cosine_frame if len(layers) > 1 else cosine_frame.iloc[:0]


@style.styled
def basis(shares: DataFrame, alike: DataFrame, axes: Axes | Iterable[Axes] | None = None) -> np.ndarray:
    """A basis of directions in one figure: its `spectrum` and its `cosines` between layers. An empty frame is left out.

    Args:
        shares: The frame for `spectrum`.
        alike: The frame for `cosines`.
        axes: The axes to draw on, one per frame; a new figure by default.

    Returns:
        The axes, one per frame.

    Raises:
        MismatchError: A column is missing, or there are fewer axes than frames.
        NumericsError: Both frames are empty.

    Examples:
        >>> import pandas as pd
        >>> shares = pd.DataFrame({"layer": [5, 5, 6, 6], "index": [1, 2, 1, 2], "share": [0.7, 0.2, 0.8, 0.1]})
        >>> alike = pd.DataFrame({"layer": [5, 5, 6, 6], "other": [5, 6, 5, 6], "value": [1.0, 0.9, 0.9, 1.0]})
        >>> len(plots.basis(shares, alike))
        2
    """
    found = [(draw, frame) for draw, frame in ((spectrum, shares), (cosines, alike)) if len(frame)]
    if not found:
        raise NumericsError(
            "directions of a single layer and without a spectrum", "one of the two to draw", "make them from pairs, or for several layers"
        )
    panels = style.axes_for(axes, len(found), len(found), height=3.0, width=9.6 if len(found) > 1 else 6.0)
    return np.array([draw(frame, ax) for (draw, frame), ax in zip(found, panels, strict=True)], object)


@style.styled
def cosines(frame: DataFrame, ax: Axes | None = None, name: str = "cosine of $v_1$ of two layers") -> Axes:
    """Similarity of the directions of any two layers: a heat map from -1 (opposite) through 0 (unrelated) to 1 (equal).

    Args:
        frame: Columns layer, other, value, with a row for every pair of layers.
        ax: The axes to draw on; a new figure by default.
        name: The name of the values; labels the color bar.

    Returns:
        The axes.

    Raises:
        MismatchError: A column is missing.
        NumericsError: The frame is empty.

    Examples:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"layer": [0, 0, 1, 1], "other": [0, 1, 0, 1], "value": [1.0, 0.4, 0.4, 1.0]})
        >>> plots.cosines(frame).get_xlabel()
        'layer'
    """
    rows = style.require(frame, "layer", "other", "value")
    panels = style.axes_for(None if ax is None else [ax], 1, 1, height=4.0, width=5.2)
    layers = np.unique(rows["layer"])
    names = [str(layer) for layer in layers]
    heat_map(panels[0], as_cells(rows, "value", ("other", layers), ("layer", layers)), names, names, limit=1.0)
    panels[0].set(xlabel="layer", ylabel="layer")
    style.add_color_bar(panels, name, aspect=28, pad=0.02)
    return panels[0]


@style.styled
def spectrum(frame: DataFrame, ax: Axes | None = None, top: int = 5) -> Axes:
    """How many directions carry the difference: each direction's share of the squared singular values, stacked by layer.

    Args:
        frame: Columns layer, index (in order of size), share (0 to 1; the remainder is drawn as the rest).
        ax: The axes to draw on; a new figure by default.
        top: The number of directions that are shown one by one.

    Returns:
        The axes; y in percent.

    Raises:
        MismatchError: A column is missing.
        NumericsError: The frame is empty.

    Examples:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"layer": 5, "index": [1, 2], "share": [0.7, 0.2]})
        >>> plots.spectrum(frame).get_ylabel()
        'share of squared singular values (%)'
    """
    rows = style.require(frame, "layer", "index", "share")
    (panel,) = style.axes_for(None if ax is None else [ax], 1, 1, height=3.0, width=7.2)
    shares = 100 * rows.pivot(index="layer", columns="index", values="share").sort_index(axis=1).iloc[:, :top].fillna(0)
    _stack(panel, shares)
    place = np.arange(len(shares))
    panel.set_xticks(*style.thinned(place, [str(layer) for layer in shares.index]))
    panel.set(xlabel="layer", ylabel="share of squared singular values (%)", ylim=(0, 100), xlim=(-0.6, len(place) - 0.4))
    handles, names = panel.get_legend_handles_labels()
    panel.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=1.0, handleheight=1.0)
    return style.dressed(panel, grid="y")


def _stack(panel: Axes, shares: style.Rows) -> None:
    """A stacked bar per layer: a segment per direction, and one for the rest up to 100 %."""
    import matplotlib

    colors = matplotlib.colormaps["Blues_r"](np.linspace(0.08, 0.72, shares.shape[1]))
    tops = shares.cumsum(axis=1)
    place = np.arange(len(shares))
    edge = {"edgecolor": "white", "linewidth": 0.8}
    for position, (index, color) in enumerate(zip(shares.columns, colors, strict=True)):
        label = f"$v_{{{position + 1}}}$"
        panel.bar(place, shares[index], 0.8, tops[index] - shares[index], color=color, label=label, **edge)
    panel.bar(place, 100 - tops.iloc[:, -1], 0.8, tops.iloc[:, -1], color=style.FAINT, label="rest", **edge)
