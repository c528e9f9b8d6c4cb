"""Figures over the layers of a model: curves of metrics, and heat maps of what interventions do."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from guardlens.errors import NumericsError
from guardlens.results.plots import style
from guardlens.results.plots.panels import as_cells, cells_around_zero, curves, heat_map, with_dot_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame
else:
    Axes = DataFrame = Any  # lets a run-time type checker skip what is loaded lazily

TITLES = {
    "auroc": "AUROC",
    "d_prime": "d′",
    "midpoint": "Accuracy at the midpoint",
    "midpoint_accuracy": "Accuracy at the midpoint",
    "probe": "Probe accuracy",
    "transfer": "Probe accuracy, transferred",
    "centroid_cosine": "Cosine of class differences",
    "drift_along": "Drift along direction (mean ‖h‖)",
    "drift_off": "Drift off direction (mean ‖h‖)",
}
"""Metric -> title of its panel."""


@style.styled
def layer_curves(
    frame: DataFrame,
    axes: Axes | Iterable[Axes] | None = None,
    titles: dict[str, str] | None = None,
    unit: str = "",
    columns: int | None = None,
) -> np.ndarray:
    """Metrics over layers: a panel per metric, in it a line with its interval band per run, and the chance line of metrics that have one.

    Args:
        frame: Columns metric, run, layer, value, low, high, n. Panels and runs come in order of appearance; nan leaves a gap.
        axes: The axes to draw on, one per metric; a new figure by default.
        titles: Panel titles by metric; they take precedence over `TITLES`.
        unit: The common unit of all panels, if there is one. It labels the y axes of the first column, and the panels of a new figure
            then share y.
        columns: The number of panels in a row of a new figure; chosen by default.

    Returns:
        The axes, one per metric.

    Raises:
        MismatchError: A column is missing, or there are fewer axes than metrics.
        NumericsError: The frame is empty.

    Examples:
        >>> import pandas as pd
        >>> measured = {"layer": [0, 1], "value": [0.6, 0.9], "low": [0.5, 0.8], "high": [0.7, 1.0], "n": 36}
        >>> frame = pd.DataFrame({"metric": "auroc", "run": "text", **measured})
        >>> [ax.get_title("left") for ax in plots.layer_curves(frame)]
        ['AUROC']
    """
    rows = style.require(frame, "metric", "run", "layer", "value", "low", "high", "n")
    metrics = style.unique(rows, "metric")
    runs = style.unique(rows, "run")
    columns = columns or _columns_for(len(metrics))
    panels = style.axes_for(axes, len(metrics), columns, height=2.35, width=9.0 if columns > 1 else 6.4, share_y=bool(unit))
    for ax, metric in zip(panels, metrics, strict=True):
        curves(ax, rows[rows["metric"] == metric], runs, metric)
        ax.set_title({**TITLES, **(titles or {})}.get(metric, metric.replace("_", " ")))
    for ax in panels[-columns:]:
        ax.set_xlabel("layer")
        ax.tick_params(labelbottom=True)
    for ax in panels[::columns]:
        ax.set_ylabel(unit)
    style.add_legend(panels, [*style.run_handles(runs), style.band_handle(rows["n"])], own=axes is None)
    return panels


def _columns_for(panels: int) -> int:
    """Three panels in a row, but four in two rows of two."""
    return 2 if panels == 4 else min(panels, 3)


@style.styled
def effect_maps(frame: DataFrame, unit: str = "Δ refusal log-odds (nats)", axes: Axes | Iterable[Axes] | None = None) -> np.ndarray:
    """The effect of interventions by layer and strength: a heat map per intervention (rows) and label (columns), on a common scale
    around 0.

    Args:
        frame: Columns intervention, label, layer, strength, value. An optional column n is shown in the titles; with the optional columns
            low and high, cells whose interval contains 0 are marked by a dot. Missing cells stay grey.
        unit: The unit of the values; labels the color bar.
        axes: The axes to draw on, intervention by intervention; a new figure by default.

    Returns:
        The axes, shape [intervention label].

    Raises:
        MismatchError: A column is missing, or there are too few axes.
        NumericsError: The frame is empty or holds no finite value.

    Examples:
        >>> import pandas as pd
        >>> measured = {"layer": [0, 1], "strength": 1.0, "value": [0.2, 1.5]}
        >>> frame = pd.DataFrame({"intervention": "guard", "label": "harmful", **measured})
        >>> plots.effect_maps(frame, unit="Δ refusal log-odds (nats)").shape  # intervention, label
        (1, 1)
    """
    rows = style.require(frame, "intervention", "label", "layer", "strength", "value")
    interventions = style.unique(rows, "intervention")
    labels = style.unique(rows, "label")
    layers = ("layer", np.unique(rows["layer"]))
    strengths = ("strength", np.unique(rows["strength"]))
    limit = float(rows["value"].abs().max())
    if not np.isfinite(limit):
        raise NumericsError(
            f"The largest effect is {limit}.", "finite numbers, or nan for single cells", "look for an overflow in the scores"
        )
    pairs = [(intervention, label) for intervention in interventions for label in labels]
    panels = style.axes_for(axes, len(pairs), len(labels), height=0.75 + 0.3 * rows["strength"].nunique(), share_y=True)
    for ax, (intervention, label) in zip(panels, pairs, strict=True):
        panel = rows[(rows["intervention"] == intervention) & (rows["label"] == label)]
        cells = as_cells(panel, "value", strengths, layers)
        undecided = cells_around_zero(panel, strengths, layers)
        heat_map(ax, cells, [str(n) for n in layers[1]], [f"{n:g}" for n in strengths[1]], limit or 1.0, undecided)
        ax.set_title(f"{intervention} · {label}{style.of_items(panel)}")
    grid = panels.reshape(len(interventions), len(labels))
    for ax in grid[-1]:
        ax.set_xlabel("layer")
    for ax in grid[:, 0]:
        ax.set_ylabel("strength")
    style.add_color_bar(panels, with_dot_legend(unit, rows), aspect=28, pad=0.02)
    return grid
