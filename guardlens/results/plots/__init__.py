"""Every figure: a tidy frame goes in, matplotlib axes come out in `figure_style`. Knows no type of guardlens.

In scripts call `save`, which also closes the figure; notebooks show and close it by themselves.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guardlens.errors import NumericsError
from guardlens.results.plots import panels as artists
from guardlens.results.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
else:
    Axes = Figure = DataFrame = Any  # lets a run-time type checker pass over what is loaded lazily

TITLES = {
    **{"auroc": "AUROC", "d_prime": "d′", "midpoint": "Accuracy at the midpoint", "midpoint_accuracy": "Accuracy at the midpoint"},
    **{"probe": "Probe accuracy", "transfer": "Probe accuracy, transferred", "centroid_cosine": "Cosine of class differences"},
    **{"drift_along": "Drift along direction (mean ‖h‖)", "drift_off": "Drift off direction (mean ‖h‖)"},
}
RATES = {"ASR": "harmful requests answered (%)", "over-refusal": "harmless requests refused (%)"}


@style.styled
def layer_curves(
    frame: DataFrame,
    axes: Axes | Iterable[Axes] | None = None,
    titles: dict[str, str] | None = None,
    unit: str = "",
    columns: int | None = None,
) -> np.ndarray:
    """Metrics over layers: a panel per metric, a line with its interval band per run, the chance line where there is one.

    Args:
        frame: Columns metric, run, layer, value, low, high, n. Order of appearance is order of panels and runs; nan leaves a gap.
        axes: Where to draw, one per metric; a new figure without it.
        titles: Panel titles by metric, before those of `TITLES`.
        unit: Of all panels, where they have one; labels the y axes of the first column, and all panels of a new figure share y.
        columns: How many panels stand beside each other in a new figure; chosen without it.

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
    metrics, runs = style.unique(rows, "metric"), style.unique(rows, "run")
    columns = columns or (len(metrics) if len(metrics) <= 3 else (2 if len(metrics) == 4 else 3))
    panels = style.axes_for(axes, len(metrics), columns, height=2.35, width=9.0 if columns > 1 else 6.4, share_y=bool(unit))
    for ax, metric in zip(panels, metrics, strict=True):
        artists.curves(ax, rows[rows["metric"] == metric], runs, metric)
        ax.set_title({**TITLES, **(titles or {})}.get(metric, metric.replace("_", " ")))
    for ax in panels[-columns:]:
        ax.set_xlabel("layer")
        ax.tick_params(labelbottom=True)
    for ax in panels[::columns]:
        ax.set_ylabel(unit)
    style.add_legend(panels, [*style.run_handles(runs), style.band_handle(rows["n"])], own=axes is None)
    return panels


@style.styled
def effect_maps(frame: DataFrame, unit: str = "Δ refusal log-odds (nats)", axes: Axes | Iterable[Axes] | None = None) -> np.ndarray:
    """What an intervention does at each layer and strength: a heat map per intervention (rows) and label (columns), on one scale centred at
    0.

    Args:
        frame: Columns intervention, label, layer, strength, value. An n column, if there, goes to the titles; with the columns low and
            high, cells whose interval holds 0 have a dot. Missing cells stay grey.
        unit: What the values are; labels the colour bar.
        axes: Where to draw, intervention by intervention; a new figure without it.

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
    interventions, labels = style.unique(rows, "intervention"), style.unique(rows, "label")
    layers, strengths = (("layer", np.unique(rows["layer"])), ("strength", np.unique(rows["strength"])))
    limit = float(rows["value"].abs().max())
    if not np.isfinite(limit):
        raise NumericsError(
            "effects without a finite extreme", "finite numbers, or nan for single cells", "look for an overflow in the scores"
        )
    panels = style.axes_for(
        axes, len(interventions) * len(labels), len(labels), height=0.75 + 0.3 * rows["strength"].nunique(), share_y=True
    )
    for ax, (intervention, label) in zip(
        panels, [(intervention, label) for intervention in interventions for label in labels], strict=True
    ):
        panel = rows[(rows["intervention"] == intervention) & (rows["label"] == label)]
        cells = artists.spread(panel, "value", strengths, layers)
        unsure = artists.holding_zero(panel, strengths, layers)
        artists.heat_map(ax, cells, [str(n) for n in layers[1]], [f"{n:g}" for n in strengths[1]], limit or 1.0, unsure)
        ax.set_title(f"{intervention} · {label}{style.of_items(panel)}")
    grid = panels.reshape(len(interventions), len(labels))
    for ax in grid[-1]:
        ax.set_xlabel("layer")
    for ax in grid[:, 0]:
        ax.set_ylabel("strength")
    style.add_colour_bar(panels, artists.with_dots(unit, rows), aspect=28, pad=0.02)
    return grid


@style.styled
def arms(frame: DataFrame, axes: Axes | Iterable[Axes] | None = None) -> np.ndarray:
    """Defences beside each other: a panel per rate (ASR, over-refusal), a row per defence, a point with its interval per presentation.

    Args:
        frame: Columns defence, presentation, rate, value, low, high (shares, 0 to 1), n. Order of appearance is order from the top.
        axes: Where to draw, one per rate; a new figure without it.

    Returns:
        The axes, one per rate; x in percent.

    Raises:
        MismatchError: A column is missing, or there are fewer axes than rates.
        NumericsError: The frame is empty.

    Examples:
        >>> import pandas as pd
        >>> measured = {"value": [0.4, 0.0], "low": [0.2, 0.0], "high": [0.7, 0.2], "n": 12}
        >>> frame = pd.DataFrame({"defence": ["none", "guard"], "presentation": "grey", "rate": "ASR", **measured})
        >>> plots.arms(frame)[0].get_xlabel()
        'harmful requests answered (%), n = 12'
    """
    rows = style.require(frame, "defence", "presentation", "rate", "value", "low", "high", "n")
    rates, defences, presentations = (style.unique(rows, column) for column in ("rate", "defence", "presentation"))
    height = 1.0 + len(defences) * max(0.36, 0.17 * len(presentations) + 0.12)
    panels = style.axes_for(axes, len(rates), len(rates), height=height, share_y=True)
    for ax, rate in zip(panels, rates, strict=True):
        panel = rows[rows["rate"] == rate]
        artists.points(ax, panel, defences, presentations)
        ax.set_title(rate)
        if rate in RATES:
            ax.set_title("← better", loc="right", fontsize=8.5, fontweight="normal", color=style.MUTED)
        ax.set_xlabel(f"{RATES.get(rate, rate)}, {style.counted(panel['n'])}")
    panels[0].set_yticks(range(len(defences)), labels=defences)
    panels[0].tick_params(axis="y", labelcolor=style.INK, labelsize=9.5)
    panels[0].set_ylim(len(defences) - 0.5, -0.5)
    style.add_legend(panels, [*style.run_handles(presentations, line="none"), style.whisker_handle()], own=axes is None)
    return panels


@style.styled
def coordinates(frame: DataFrame, axes: Axes | Iterable[Axes] | None = None, name: str = "projection on $v_1$") -> np.ndarray:
    """Where queries lie along a direction: a panel per run, harmful against harmless, class means as triangles, the gate's threshold.

    Args:
        frame: Columns run, label, coordinate, and threshold if there is one (nan for none).
        axes: Where to draw, one per run; a new figure without it.
        name: What the coordinate is, with its unit; labels the x axis.

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
        raise NumericsError("coordinates that are not finite", "finite numbers", "look for those queries in the cache")
    runs = style.unique(rows, "run")
    edges = np.histogram_bin_edges(rows["coordinate"], bins=44)
    panels = style.axes_for(axes, len(runs), 1, height=1.15, width=7.2, share_y=True)
    for ax, run in zip(panels, runs, strict=True):
        artists.histogram(ax, rows[rows["run"] == run], edges)
        ax.set_title(run)
    artists.mark_thresholds(panels, runs, rows)
    panels[-1].set_xlabel(name)
    panels[-1].tick_params(labelbottom=True)
    if axes is None:
        panels[0].figure.supylabel("queries in the bin (%)", fontsize=9.5, color=style.MUTED)
    style.add_legend(panels, style.label_handles(rows), own=axes is None)
    return panels


@style.styled
def basis(shares: DataFrame, alike: DataFrame, axes: Axes | Iterable[Axes] | None = None) -> np.ndarray:
    """Directions in one figure: their `spectrum`, and the `cosines` between layers. An empty frame is left out.

    Args:
        shares: What `spectrum` takes.
        alike: What `cosines` takes.
        axes: Where to draw, one per frame; a new figure without it.

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
            "directions without a spectrum and of a single layer", "either, to draw", "make them of pairs, or of several layers"
        )
    panels = style.axes_for(axes, len(found), len(found), height=3.0, width=9.6 if len(found) > 1 else 6.0)
    return np.array([draw(frame, ax) for (draw, frame), ax in zip(found, panels, strict=True)], object)


@style.styled
def cosines(frame: DataFrame, ax: Axes | None = None, name: str = "cosine of $v_1$ of two layers") -> Axes:
    """How alike the directions of two layers are: a heat map, from -1 (opposite) through 0 (unrelated) to 1 (the same).

    Args:
        frame: Columns layer, other, value: every layer with every other.
        ax: Where to draw; a new figure without it.
        name: What the values are; labels the colour bar.

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
    artists.heat_map(panels[0], artists.spread(rows, "value", ("other", layers), ("layer", layers)), names, names, limit=1.0)
    panels[0].set(xlabel="layer", ylabel="layer")
    style.add_colour_bar(panels, name, aspect=28, pad=0.02)
    return panels[0]


@style.styled
def spectrum(frame: DataFrame, ax: Axes | None = None, top: int = 5) -> Axes:
    """How many directions carry the difference: per layer, the share of the squared singular values that each direction holds, stacked.

    Args:
        frame: Columns layer, index (in order of size), share (0 to 1; what is missing to 1 is drawn as the rest).
        ax: Where to draw; a new figure without it.
        top: How many directions are shown one by one.

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
    import matplotlib

    (panel,) = style.axes_for(None if ax is None else [ax], 1, 1, height=3.0, width=7.2)
    shares = 100 * rows.pivot(index="layer", columns="index", values="share").sort_index(axis=1).iloc[:, :top].fillna(0)
    colours = matplotlib.colormaps["Blues_r"](np.linspace(0.08, 0.72, shares.shape[1]))
    bottoms = shares.cumsum(axis=1)
    place = np.arange(len(shares))
    for position, (index, colour) in enumerate(zip(shares.columns, colours, strict=True)):
        label = f"$v_{{{position + 1}}}$"
        panel.bar(place, shares[index], 0.8, bottoms[index] - shares[index], color=colour, edgecolor="white", linewidth=0.8, label=label)
    panel.bar(place, 100 - bottoms.iloc[:, -1], 0.8, bottoms.iloc[:, -1], color=style.FAINT, edgecolor="white", linewidth=0.8, label="rest")
    panel.set_xticks(*style.thinned(place, [str(layer) for layer in shares.index]))
    panel.set(xlabel="layer", ylabel="share of squared singular values (%)", ylim=(0, 100), xlim=(-0.6, len(place) - 0.4))
    handles, names = panel.get_legend_handles_labels()
    panel.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=1.0, handleheight=1.0)
    return style.dressed(panel, grid="y")


def save(figure: Figure, stem: str | Path) -> list[Path]:
    """Write `stem.png` (160 dpi) and `stem.svg`, each whole or not at all, the same bytes for the same figure; then close the figure.

    Returns:
        The two paths.

    Examples:
        >>> [path.name for path in plots.save(ssd.plot()[0].figure, "spectrum")]
        ['spectrum.png', 'spectrum.svg']
    """
    import matplotlib
    from matplotlib import pyplot

    from guardlens.results.files import atomic

    paths = [Path(stem).with_name(f"{Path(stem).name}.{kind}") for kind in ("png", "svg")]
    with matplotlib.rc_context({"svg.hashsalt": "guardlens"}):
        for path, unwanted in zip(paths, ("Software", "Date"), strict=True):
            with atomic(path) as partial:
                figure.savefig(partial, format=path.suffix[1:], dpi=160, metadata={unwanted: None})
    if not matplotlib.is_interactive():
        pyplot.close(figure)
    return paths
