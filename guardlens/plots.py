"""Every figure: a tidy frame goes in, matplotlib axes come out. Knows no type of guardlens.

Colours are those of Okabe & Ito (safe for the colour-blind), and every colour is doubled by a marker, a place or a number, so figures
survive a grey print. In scripts call `save`, which also closes the figure; notebooks show and close it by themselves.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import numpy as np

from guardlens.errors import MismatchError, NumericsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
else:
    Axes = Figure = DataFrame = Any  # lets a run-time type checker pass over what is loaded lazily

INK, MUTED, FAINT = "#1f2328", "#5b6168", "#e6e8eb"
RUNS = ("#1f2328", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LABELS = {"harmful": "#D55E00", "harmless": "#0072B2"}
STYLE: dict[Any, Any] = {
    **{"figure.constrained_layout.w_pad": 0.08, "figure.constrained_layout.h_pad": 0.06},
    **{"figure.facecolor": "white", "axes.facecolor": "white", "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK},
    **{"axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 8, "axes.titlecolor": INK},
    **{"axes.labelsize": 9.5, "axes.labelcolor": MUTED, "axes.edgecolor": "#b9bec4", "axes.linewidth": 0.8, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9.5, "lines.linewidth": 1.8},
}
TITLES = {
    **{"auroc": "AUROC", "d_prime": "d′", "midpoint": "Accuracy at the midpoint", "midpoint_accuracy": "Accuracy at the midpoint"},
    **{"probe": "Probe accuracy", "transfer": "Probe accuracy, transferred", "centroid_cosine": "Cosine of class differences"},
    **{"drift_along": "Drift along direction (mean ‖h‖)", "drift_off": "Drift off direction (mean ‖h‖)"},
}
RATES = {"ASR": "harmful requests answered (%)", "over-refusal": "harmless requests refused (%)"}
CHANCE = ("auroc", "accuracy", "probe", "transfer", "midpoint")
"""Metrics whose name holds one of these words are at chance at 0.5."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Rows = Any  # a DataFrame inside this module: pandas types its own selections too loosely to be checked


def _styled(draw: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Draws in the style of guardlens and leaves the user's settings as they were."""

    @wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


@_styled
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
    rows = _require(frame, "metric", "run", "layer", "value", "low", "high", "n")
    metrics, runs = _unique(rows, "metric"), _unique(rows, "run")
    columns = len(metrics) if len(metrics) <= 3 else (2 if len(metrics) == 4 else 3)
    panels = _panels(axes, len(metrics), columns, height=2.35, width=9.0 if columns > 1 else 6.4)
    for ax, metric in zip(panels, metrics, strict=True):
        _curve_panel(ax, rows[rows["metric"] == metric], runs, metric)
        ax.set_title({**TITLES, **(titles or {})}.get(metric, metric.replace("_", " ")))
    for ax in panels[-columns:]:
        ax.set_xlabel("layer")
        ax.tick_params(labelbottom=True)
    _legend(panels, [*_run_handles(runs), _band_handle(rows["n"])], own=axes is None)
    return panels


@_styled
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
    rows = _require(frame, "plan", "label", "layer", "strength", "value")
    plans, labels = _unique(rows, "plan"), _unique(rows, "label")
    limit = float(rows["value"].abs().max())
    if not np.isfinite(limit):
        raise NumericsError(
            "effects without a finite extreme", "finite numbers, or nan for single cells", "look for an overflow in the scores"
        )
    panels = _panels(axes, len(plans) * len(labels), len(labels), height=0.75 + 0.3 * rows["strength"].nunique(), share_y=True)
    for ax, (plan, label) in zip(panels, [(plan, label) for plan in plans for label in labels], strict=True):
        panel = rows[(rows["plan"] == plan) & (rows["label"] == label)]
        _heat_map(ax, panel, np.unique(rows["layer"]), np.unique(rows["strength"]), limit or 1.0)
        ax.set_title(f"{plan} · {label}{_of(panel)}")
    grid = panels.reshape(len(plans), len(labels))
    for ax in grid[-1]:
        ax.set_xlabel("layer")
    for ax in grid[:, 0]:
        ax.set_ylabel("strength")
    bar = panels[0].figure.colorbar(panels[0].collections[0], ax=list(panels), label=unit, aspect=28, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelcolor=MUTED)
    return grid


@_styled
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
    rows = _require(frame, "defence", "presentation", "rate", "value", "low", "high", "n")
    rates, defences, presentations = (_unique(rows, column) for column in ("rate", "defence", "presentation"))
    height = 1.0 + len(defences) * max(0.36, 0.17 * len(presentations) + 0.12)
    panels = _panels(axes, len(rates), len(rates), height=height, share_y=True)
    for ax, rate in zip(panels, rates, strict=True):
        panel = rows[rows["rate"] == rate]
        _arms_panel(ax, panel, defences, presentations)
        ax.set_title(rate)
        if rate in RATES:
            ax.set_title("← better", loc="right", fontsize=8.5, fontweight="normal", color=MUTED)
        ax.set_xlabel(f"{RATES.get(rate, rate)}, {_count(panel['n'])}")
    panels[0].set_yticks(range(len(defences)), labels=defences)
    panels[0].tick_params(axis="y", labelcolor=INK, labelsize=9.5)
    panels[0].set_ylim(len(defences) - 0.5, -0.5)
    _legend(panels, [*_run_handles(presentations, line="none"), _whisker_handle()], own=axes is None)
    return panels


@_styled
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
    rows = _require(frame, "run", "label", "coordinate")
    if not np.isfinite(rows["coordinate"]).all():
        raise NumericsError("coordinates that are not finite", "finite numbers", "look for those queries in the cache")
    runs = _unique(rows, "run")
    edges = np.histogram_bin_edges(rows["coordinate"], bins=44)
    panels = _panels(axes, len(runs), 1, height=1.15, width=7.2, share_y=True)
    for ax, run in zip(panels, runs, strict=True):
        _histogram_panel(ax, rows[rows["run"] == run], edges)
        ax.set_title(run)
    _mark_thresholds(panels, runs, rows)
    panels[-1].set_xlabel(name)
    panels[-1].tick_params(labelbottom=True)
    if axes is None:
        panels[0].figure.supylabel("queries in the bin (%)", fontsize=9.5, color=MUTED)
    _legend(panels, _label_handles(rows), own=axes is None)
    return panels


@_styled
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
    rows = _require(frame, "layer", "index", "share")
    import matplotlib

    (panel,) = _panels(None if ax is None else [ax], 1, 1, height=3.0, width=7.2)
    shares = 100 * rows.pivot(index="layer", columns="index", values="share").sort_index(axis=1).iloc[:, :top].fillna(0)
    colours = matplotlib.colormaps["Blues_r"](np.linspace(0.08, 0.72, shares.shape[1]))
    bottoms = shares.cumsum(axis=1)
    place = np.arange(len(shares))
    for position, (index, colour) in enumerate(zip(shares.columns, colours, strict=True)):
        label = f"$v_{{{position + 1}}}$"
        panel.bar(place, shares[index], 0.8, bottoms[index] - shares[index], color=colour, edgecolor="white", linewidth=0.8, label=label)
    panel.bar(place, 100 - bottoms.iloc[:, -1], 0.8, bottoms.iloc[:, -1], color=FAINT, edgecolor="white", linewidth=0.8, label="rest")
    panel.set_xticks(*_thinned(place, [str(layer) for layer in shares.index]))
    panel.set(xlabel="layer", ylabel="share of squared singular values (%)", ylim=(0, 100), xlim=(-0.6, len(place) - 0.4))
    handles, names = panel.get_legend_handles_labels()
    panel.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=1.0, handleheight=1.0)
    return _dressed(panel, grid="y")


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


def _curve_panel(ax: Axes, rows: Rows, runs: Sequence[str], metric: str) -> None:
    chance = any(word in metric.lower() for word in CHANCE)
    sparse = {"markersize": 4.2, "markeredgecolor": "white", "markeredgewidth": 0.6, "markevery": _step(rows["layer"].nunique())}
    ax.axhline(0.5 if chance else 0.0, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)) if chance else "-", zorder=1)
    for position, run in enumerate(runs):
        line = rows[rows["run"] == run].sort_values("layer")
        ax.fill_between(line["layer"], line["low"], line["high"], color=RUNS[position % len(RUNS)], alpha=0.16, linewidth=0)
        ax.plot(line["layer"], line["value"], label=run, **_marked(position), **sparse)
    if chance:
        ax.set_ylim(min(0.42, rows["low"].min() - 0.03, rows["value"].min() - 0.03), 1.03)
        ax.text(1, 0.49, "chance", transform=ax.get_yaxis_transform(), ha="right", va="top", fontsize=8.5, color=MUTED)
    ax.set_xticks(*_thinned(np.unique(rows["layer"]), [str(layer) for layer in np.unique(rows["layer"])]))
    _dressed(ax, grid="y")


def _heat_map(ax: Axes, rows: Rows, layers: np.ndarray, strengths: np.ndarray, limit: float) -> None:
    cells = rows.pivot(index="strength", columns="layer", values="value").reindex(index=strengths, columns=layers).to_numpy(float)
    ax.set_facecolor(FAINT)
    ax.pcolormesh(
        np.ma.masked_invalid(cells), cmap="RdBu_r", vmin=-limit, vmax=limit, edgecolors="white", linewidth=1.2 if len(layers) <= 12 else 0.5
    )
    if len(layers) <= 12:
        _annotate(ax, cells, limit)
    ax.set_xticks(*_thinned(np.arange(len(layers)) + 0.5, [str(layer) for layer in layers]))
    ax.set_yticks(np.arange(len(strengths)) + 0.5, labels=[f"{strength:g}" for strength in strengths])
    ax.spines[:].set_visible(False)
    _dressed(ax)


def _annotate(ax: Axes, cells: np.ndarray, limit: float) -> None:
    decimals = 2 if limit < 1 else (1 if limit < 10 else 0)
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            colour = "white" if abs(value) > 0.6 * limit else INK
            text = f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−")
            ax.text(column + 0.5, row + 0.48, text, ha="center", va="center", fontsize=7.5, color=colour)


def _arms_panel(ax: Axes, rows: Rows, defences: Sequence[str], presentations: Sequence[str]) -> None:
    step = 0.62 / max(1, len(presentations))
    for index in range(0, len(defences), 2):
        ax.axhspan(index - 0.5, index + 0.5, color="#f5f6f7", linewidth=0, zorder=0)
    for position, presentation in enumerate(presentations):
        arm = rows[rows["presentation"] == presentation]
        place = arm["defence"].map({name: index for index, name in enumerate(defences)}) + (position - (len(presentations) - 1) / 2) * step
        colour = RUNS[position % len(RUNS)]
        ax.hlines(place, 100 * arm["low"], 100 * arm["high"], color=colour, linewidth=1.8, alpha=0.55, zorder=2)
        mark = {**_marked(position), "linestyle": "none", "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.7}
        ax.plot(100 * arm["value"], place, label=presentation, **mark, zorder=3, clip_on=False)
    ax.set_xlim(0, 100)
    ax.set_xticks(range(0, 101, 20))
    ax.spines["left"].set_visible(False)
    _dressed(ax, grid="x")


def _histogram_panel(ax: Axes, rows: Rows, edges: np.ndarray) -> None:
    for label, values in rows.groupby("label", sort=False)["coordinate"]:
        colour = LABELS.get(str(label), MUTED)
        share = 100 * np.histogram(values, edges)[0] / len(values)
        ax.stairs(share, edges, fill=True, color=colour, alpha=0.38, linewidth=0)
        ax.stairs(share, edges, color=colour, linewidth=1.1)
        ax.plot(
            values.mean(), 0, marker="^", markersize=7, color=colour, markeredgecolor="white", markeredgewidth=0.8, clip_on=False, zorder=5
        )
    ax.spines["left"].set_visible(False)
    ax.yaxis.set_major_locator(_few_ticks())
    ax.margins(x=0.01)
    _dressed(ax, grid="y")


def _mark_thresholds(panels: np.ndarray, runs: Sequence[str], rows: Rows) -> None:
    for ax, run in zip(panels, runs, strict=True):
        given = rows.loc[rows["run"] == run, "threshold"].dropna().unique() if "threshold" in rows else []
        for threshold in given:
            ax.axvline(threshold, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
            if ax is panels[0]:
                ax.annotate("threshold", (threshold, 1), (4, 0), **_AT_TOP, fontsize=8.5, color=MUTED)


_AT_TOP: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "left", "va": "bottom"}


def _panels(axes: Iterable[Axes] | None, count: int, columns: int, height: float, width: float = 9.0, share_y: bool = False) -> np.ndarray:
    """`count` axes: the given ones, or those of a new figure with its last row cut short."""
    if axes is not None:
        given = np.atleast_1d(np.asarray(axes, object)).ravel()
        if len(given) < count:
            raise MismatchError(f"{len(given)} axes for {count} panels", "one per panel", "pass more axes, or none for a new figure")
        return given[:count]
    from matplotlib import pyplot

    rows = -(-count // columns)
    size = (width, height * rows + 0.55)
    grid = pyplot.subplots(rows, columns, figsize=size, sharex=True, sharey=share_y, squeeze=False, layout="constrained")[1]
    for ax in grid.ravel()[count:]:
        ax.set_visible(False)
    return grid.ravel()[:count]


def _dressed(ax: Axes, grid: Literal["x", "y"] | None = None) -> Axes:
    """Ticks without marks, and faint grid lines along one axis."""
    ax.tick_params(length=0, labelsize=9, labelcolor=MUTED, pad=4)
    if grid:
        ax.grid(axis=grid, color=FAINT, linewidth=0.8)
    return ax


def _legend(panels: np.ndarray, handles: Sequence[Any], own: bool) -> None:
    """One legend: above our own figure (in as many rows as it takes), inside the first of axes that were given."""
    if own:
        widths = [len(str(handle.get_label())) + 8 for handle in handles]
        room = 12.5 * panels[0].figure.get_figwidth()
        columns = len(handles) if sum(widths) <= room else max(1, int(room / max(widths)))
        panels[0].figure.legend(handles=handles, loc="outside upper left", ncols=columns, columnspacing=1.6, handletextpad=0.6)
    else:
        panels[0].legend(handles=handles, fontsize=8.5)


def _marked(position: int) -> dict[str, Any]:
    return {"color": RUNS[position % len(RUNS)], "marker": MARKERS[position % len(MARKERS)]}


def _run_handles(names: Sequence[str], line: Literal["-", "none"] = "-") -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], **_marked(position), linestyle=line, markersize=6, markeredgecolor="white", label=name)
        for position, name in enumerate(names)
    ]


def _band_handle(counts: Any) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=MUTED, alpha=0.25, linewidth=0, label=f"95 % interval, {_count(counts)}")


def _whisker_handle() -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=MUTED, alpha=0.55, linewidth=1.8, label="95 % interval")


def _label_handles(rows: Rows) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    each = {label: rows[rows["label"] == label].groupby("run").size() for label in _unique(rows, "label")}
    patches = [Patch(facecolor=LABELS.get(label, MUTED), alpha=0.6, label=f"{label}, {_count(sizes)}") for label, sizes in each.items()]
    return [*patches, Line2D([], [], color=MUTED, marker="^", markersize=7, markeredgecolor="white", linestyle="none", label="mean")]


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=2, integer=True)


def _step(count: int, most: int = 12) -> int:
    """Every how many of `count` to show, so that no more than `most` are shown; a step that is easy to read."""
    return next((step for step in (1, 2, 4, 5, 8, 10) if count <= most * step), -(-count // most))


def _thinned(places: np.ndarray, names: Sequence[str]) -> tuple[list[Any], list[str]]:
    step = _step(len(names))
    return list(places[::step]), list(names[::step])


def _count(counts: Any) -> str:
    low, high = int(min(counts)), int(max(counts))
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def _of(rows: Rows) -> str:
    return f" ({_count(rows['n'])})" if "n" in rows else ""


def _unique(rows: Rows, column: str) -> list[Any]:
    """Values in order of appearance."""
    return list(dict.fromkeys(rows[column]))


def _require(frame: DataFrame, *columns: str) -> Rows:
    """The frame, if it has these columns and a row."""
    missing = [column for column in columns if column not in frame]
    if missing:
        found = f"a frame without {', '.join(missing)} (it has {', '.join(map(str, frame.columns))})"
        raise MismatchError(found, f"the columns {', '.join(columns)}", "rename the columns or pass the table's own frame")
    if frame.empty:
        raise NumericsError("a frame without rows", "at least one", "check the filter that made it")
    return frame
