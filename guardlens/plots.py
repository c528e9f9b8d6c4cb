"""Every figure: a tidy frame goes in, matplotlib axes come out in `figure_style`. Knows no type of guardlens.

In scripts call `save`, which also closes the figure; notebooks show and close it by themselves.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guardlens import figure_style as style
from guardlens.errors import NumericsError

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
CHANCE = ("auroc", "accuracy", "probe", "transfer", "midpoint")
"""Metrics whose name holds one of these words are at chance at 0.5."""


@style.styled
def layer_curves(frame: DataFrame, axes: Iterable[Axes] | None = None, titles: dict[str, str] | None = None) -> np.ndarray:
    """Metrics over layers: a panel per metric, a line with its interval band per run, the chance line where there is one.

    Args:
        frame: Columns metric, run, layer, value, low, high, n. Order of appearance is order of panels and runs; nan leaves a gap.
        axes: Where to draw, one per metric; a new figure without it.
        titles: Panel titles by metric, before those of `TITLES`.

    Returns:
        The axes, one per metric.

    Raises:
        MismatchError: A column is missing, or there are fewer axes than metrics.
        NumericsError: The frame is empty.
    """
    rows = style.require(frame, "metric", "run", "layer", "value", "low", "high", "n")
    metrics, runs = style.unique(rows, "metric"), style.unique(rows, "run")
    columns = len(metrics) if len(metrics) <= 3 else (2 if len(metrics) == 4 else 3)
    panels = style.axes_for(axes, len(metrics), columns, height=2.35, width=9.0 if columns > 1 else 6.4)
    for ax, metric in zip(panels, metrics, strict=True):
        _curve_panel(ax, rows[rows["metric"] == metric], runs, metric)
        ax.set_title({**TITLES, **(titles or {})}.get(metric, metric.replace("_", " ")))
    for ax in panels[-columns:]:
        ax.set_xlabel("layer")
        ax.tick_params(labelbottom=True)
    style.add_legend(panels, [*style.run_handles(runs), style.band_handle(rows["n"])], own=axes is None)
    return panels


@style.styled
def effect_maps(frame: DataFrame, unit: str = "Δ refusal log-odds (nats)", axes: Iterable[Axes] | None = None) -> np.ndarray:
    """What a plan does at each layer and strength: a heat map per plan (rows) and label (columns), on one scale centred at 0.

    Args:
        frame: Columns plan, label, layer, strength, value; an n column, if there, goes to the titles. Missing cells stay grey.
        unit: What the values are; labels the colour bar.
        axes: Where to draw, plan by plan; a new figure without it.

    Returns:
        The axes, shape [plan label].

    Raises:
        MismatchError: A column is missing, or there are too few axes.
        NumericsError: The frame is empty or holds no finite value.
    """
    rows = style.require(frame, "plan", "label", "layer", "strength", "value")
    plans, labels = style.unique(rows, "plan"), style.unique(rows, "label")
    limit = float(rows["value"].abs().max())
    if not np.isfinite(limit):
        raise NumericsError(
            "effects without a finite extreme", "finite numbers, or nan for single cells", "look for an overflow in the scores"
        )
    panels = style.axes_for(axes, len(plans) * len(labels), len(labels), height=0.75 + 0.3 * rows["strength"].nunique(), share_y=True)
    for ax, (plan, label) in zip(panels, [(plan, label) for plan in plans for label in labels], strict=True):
        panel = rows[(rows["plan"] == plan) & (rows["label"] == label)]
        _heat_map(ax, panel, np.unique(rows["layer"]), np.unique(rows["strength"]), limit or 1.0)
        ax.set_title(f"{plan} · {label}{_of(panel)}")
    grid = panels.reshape(len(plans), len(labels))
    for ax in grid[-1]:
        ax.set_xlabel("layer")
    for ax in grid[:, 0]:
        ax.set_ylabel("strength")
    style.add_colour_bar(panels, unit, aspect=28, pad=0.02)
    return grid


@style.styled
def arms(frame: DataFrame, axes: Iterable[Axes] | None = None) -> np.ndarray:
    """Defences beside each other: a panel per rate (ASR, over-refusal), a row per defence, a point with its interval per presentation.

    Args:
        frame: Columns defence, presentation, rate, value, low, high (shares, 0 to 1), n. Order of appearance is order from the top.
        axes: Where to draw, one per rate; a new figure without it.

    Returns:
        The axes, one per rate; x in percent.

    Raises:
        MismatchError: A column is missing, or there are fewer axes than rates.
        NumericsError: The frame is empty.
    """
    rows = style.require(frame, "defence", "presentation", "rate", "value", "low", "high", "n")
    rates, defences, presentations = (style.unique(rows, column) for column in ("rate", "defence", "presentation"))
    height = 1.0 + len(defences) * max(0.36, 0.17 * len(presentations) + 0.12)
    panels = style.axes_for(axes, len(rates), len(rates), height=height, share_y=True)
    for ax, rate in zip(panels, rates, strict=True):
        panel = rows[rows["rate"] == rate]
        _arms_panel(ax, panel, defences, presentations)
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
def coordinates(frame: DataFrame, axes: Iterable[Axes] | None = None, name: str = "projection on $v_1$") -> np.ndarray:
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
    """
    rows = style.require(frame, "run", "label", "coordinate")
    if not np.isfinite(rows["coordinate"]).all():
        raise NumericsError("coordinates that are not finite", "finite numbers", "look for those queries in the cache")
    runs = style.unique(rows, "run")
    edges = np.histogram_bin_edges(rows["coordinate"], bins=44)
    panels = style.axes_for(axes, len(runs), 1, height=1.15, width=7.2, share_y=True)
    for ax, run in zip(panels, runs, strict=True):
        _histogram_panel(ax, rows[rows["run"] == run], edges)
        ax.set_title(run)
    _mark_thresholds(panels, runs, rows)
    panels[-1].set_xlabel(name)
    panels[-1].tick_params(labelbottom=True)
    if axes is None:
        panels[0].figure.supylabel("queries in the bin (%)", fontsize=9.5, color=style.MUTED)
    style.add_legend(panels, style.label_handles(rows), own=axes is None)
    return panels


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
    """
    import matplotlib
    from matplotlib import pyplot

    from guardlens.storage import atomic

    paths = [Path(stem).with_name(f"{Path(stem).name}.{kind}") for kind in ("png", "svg")]
    with matplotlib.rc_context({"svg.hashsalt": "guardlens"}):
        for path, unwanted in zip(paths, ("Software", "Date"), strict=True):
            with atomic(path) as partial:
                figure.savefig(partial, format=path.suffix[1:], dpi=160, metadata={unwanted: None})
    if not matplotlib.is_interactive():
        pyplot.close(figure)
    return paths


def _curve_panel(ax: Axes, rows: style.Rows, runs: Sequence[str], metric: str) -> None:
    chance = any(word in metric.lower() for word in CHANCE)
    sparse = {"markersize": 4.2, "markeredgecolor": "white", "markeredgewidth": 0.6, "markevery": style.step(rows["layer"].nunique())}
    ax.axhline(0.5 if chance else 0.0, color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)) if chance else "-", zorder=1)
    for position, run in enumerate(runs):
        line = rows[rows["run"] == run].sort_values("layer")
        ax.fill_between(line["layer"], line["low"], line["high"], color=style.RUNS[position % len(style.RUNS)], alpha=0.16, linewidth=0)
        ax.plot(line["layer"], line["value"], label=run, **style.marked(position), **sparse)
    if chance:
        ax.set_ylim(min(0.42, rows["low"].min() - 0.03, rows["value"].min() - 0.03), 1.03)
        ax.text(1, 0.49, "chance", transform=ax.get_yaxis_transform(), ha="right", va="top", fontsize=8.5, color=style.MUTED)
    ax.set_xticks(*style.thinned(np.unique(rows["layer"]), [str(layer) for layer in np.unique(rows["layer"])]))
    style.dressed(ax, grid="y")


def _heat_map(ax: Axes, rows: style.Rows, layers: np.ndarray, strengths: np.ndarray, limit: float) -> None:
    cells = rows.pivot(index="strength", columns="layer", values="value").reindex(index=strengths, columns=layers).to_numpy(float)
    ax.set_facecolor(style.FAINT)
    ax.pcolormesh(
        np.ma.masked_invalid(cells), cmap="RdBu_r", vmin=-limit, vmax=limit, edgecolors="white", linewidth=1.2 if len(layers) <= 12 else 0.5
    )
    if len(layers) <= 12:
        _annotate(ax, cells, limit)
    ax.set_xticks(*style.thinned(np.arange(len(layers)) + 0.5, [str(layer) for layer in layers]))
    ax.set_yticks(np.arange(len(strengths)) + 0.5, labels=[f"{strength:g}" for strength in strengths])
    ax.spines[:].set_visible(False)
    style.dressed(ax)


def _annotate(ax: Axes, cells: np.ndarray, limit: float) -> None:
    decimals = 2 if limit < 1 else (1 if limit < 10 else 0)
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            colour = "white" if abs(value) > 0.6 * limit else style.INK
            text = f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−")
            ax.text(column + 0.5, row + 0.48, text, ha="center", va="center", fontsize=7.5, color=colour)


def _arms_panel(ax: Axes, rows: style.Rows, defences: Sequence[str], presentations: Sequence[str]) -> None:
    step = 0.62 / max(1, len(presentations))
    for index in range(0, len(defences), 2):
        ax.axhspan(index - 0.5, index + 0.5, color="#f5f6f7", linewidth=0, zorder=0)
    for position, presentation in enumerate(presentations):
        arm = rows[rows["presentation"] == presentation]
        place = arm["defence"].map({name: index for index, name in enumerate(defences)}) + (position - (len(presentations) - 1) / 2) * step
        colour = style.RUNS[position % len(style.RUNS)]
        ax.hlines(place, 100 * arm["low"], 100 * arm["high"], color=colour, linewidth=1.8, alpha=0.55, zorder=2)
        mark = {**style.marked(position), "linestyle": "none", "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.7}
        ax.plot(100 * arm["value"], place, label=presentation, **mark, zorder=3, clip_on=False)
    ax.set_xlim(0, 100)
    ax.set_xticks(range(0, 101, 20))
    ax.spines["left"].set_visible(False)
    style.dressed(ax, grid="x")


def _histogram_panel(ax: Axes, rows: style.Rows, edges: np.ndarray) -> None:
    for label, values in rows.groupby("label", sort=False)["coordinate"]:
        colour = style.LABELS.get(str(label), style.MUTED)
        share = 100 * np.histogram(values, edges)[0] / len(values)
        ax.stairs(share, edges, fill=True, color=colour, alpha=0.38, linewidth=0)
        ax.stairs(share, edges, color=colour, linewidth=1.1)
        ax.plot(
            values.mean(), 0, marker="^", markersize=7, color=colour, markeredgecolor="white", markeredgewidth=0.8, clip_on=False, zorder=5
        )
    ax.spines["left"].set_visible(False)
    ax.yaxis.set_major_locator(_few_ticks())
    ax.margins(x=0.01)
    style.dressed(ax, grid="y")


def _mark_thresholds(panels: np.ndarray, runs: Sequence[str], rows: style.Rows) -> None:
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


def _of(rows: style.Rows) -> str:
    return f" ({style.counted(rows['n'])})" if "n" in rows else ""
