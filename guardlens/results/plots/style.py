"""The common look of all figures: colors, markers, axes, ticks and legends.

The colors are those of Okabe & Ito, which people with color blindness can tell apart. Every color comes with a marker, a position or a
number, so figures remain readable in greyscale.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import numpy as np

from guardlens.errors import MismatchError, NumericsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame
else:
    Axes = DataFrame = Any  # lets a run-time type checker skip what is loaded lazily

INK = "#1f2328"
MUTED = "#5b6168"
FAINT = "#e6e8eb"
RUNS = ("#1f2328", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LABELS = {"harmful": "#D55E00", "harmless": "#0072B2"}
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#b9bec4",
    "axes.facecolor": "white",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "text.color": INK,
}
"""Settings of matplotlib."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Rows = Any  # a DataFrame inside the drawing modules: pandas types its own selections too loosely to be checked


def styled(draw: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a function draw in the style of guardlens, and restore the user's settings afterwards.

    Only the settings of the style are restored. `rc_context` would also undo what the backend of a notebook sets when the first figure
    loads it, and no later figure would be shown.
    """

    @wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        from matplotlib import rcParams

        before = {name: rcParams[name] for name in STYLE}
        rcParams.update(STYLE)
        try:
            return draw(*args, **kwargs)
        finally:
            rcParams.update(before)

    return drawn


def require(frame: DataFrame, *columns: str) -> Rows:
    """Check that a frame has rows and the given columns, and escape every `$` in it, which matplotlib would read as mathematics.

    Raises:
        MismatchError: A column is missing.
        NumericsError: The frame is empty.
    """
    missing = [column for column in columns if column not in frame]
    if missing:
        found = f"a frame without {', '.join(missing)} (it has {', '.join(map(str, frame.columns))})"
        raise MismatchError(found, f"the columns {', '.join(columns)}", "rename the columns or pass the table's own frame")
    if frame.empty:
        raise NumericsError("a frame without rows", "at least one", "check the filter that made it")
    return frame.replace(r"\$", r"\\$", regex=True)


def unique(rows: Rows, column: str) -> list[Any]:
    """The values of a column in order of appearance, each once."""
    return list(dict.fromkeys(rows[column]))


def counted(counts: Any) -> str:
    """Counts of items as text: `"n = 54"` or `"n = 36 to 54"`."""
    low, high = int(min(counts)), int(max(counts))
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def of_items(rows: Rows) -> str:
    """The end of a title that tells the number of items, `" (n = 54)"`; empty if the rows have no column n."""
    return f" ({counted(rows['n'])})" if "n" in rows else ""


def axes_for(
    axes: Axes | Iterable[Axes] | None, count: int, columns: int, height: float, width: float = 9.0, share_y: bool = False
) -> np.ndarray:
    """The first `count` of the given axes, or the axes of a new figure.

    Raises:
        MismatchError: Fewer axes were given.
    """
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


def dressed(ax: Axes, grid: Literal["x", "y"] | None = None) -> Axes:
    """Remove the marks of ticks, and draw faint grid lines along one axis if asked to."""
    ax.tick_params(length=0, labelsize=9, labelcolor=MUTED, pad=4)
    if grid:
        ax.grid(axis=grid, color=FAINT, linewidth=0.8)
    return ax


def tick_step(count: int, most: int = 12) -> int:
    """A readable step between ticks such that at most `most` of `count` places have one."""
    return next((step for step in (1, 2, 4, 5, 8, 10) if count <= most * step), -(-count // most))


def thinned(places: np.ndarray, names: Sequence[str]) -> tuple[list[Any], list[str]]:
    """Places of ticks and their names, thinned out until they are readable."""
    every = tick_step(len(names))
    return list(places[::every]), list(names[::every])


def color_and_marker(position: int) -> dict[str, Any]:
    """Color and marker of a run, by its position among the runs."""
    return {"color": RUNS[position % len(RUNS)], "marker": MARKERS[position % len(MARKERS)]}


def run_handles(names: Sequence[str], line: Literal["-", "none"] = "-") -> list[Any]:
    """The legend entries of runs."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], **color_and_marker(position), linestyle=line, markersize=6, markeredgecolor="white", label=name)
        for position, name in enumerate(names)
    ]


def band_handle(counts: Any) -> Any:
    """The legend entry of the intervals of curves."""
    from matplotlib.patches import Patch

    return Patch(facecolor=MUTED, alpha=0.25, linewidth=0, label=f"95 % interval, {counted(counts)}")


def whisker_handle(color: str = MUTED, linewidth: float = 1.8, alpha: float = 0.55) -> Any:
    """The legend entry of the intervals of points and bars."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linewidth=linewidth, alpha=alpha, label="95 % interval")


def label_handles(rows: Rows) -> list[Any]:
    """The legend entries of the classes of queries, with their number in a run."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    sizes = {label: rows[rows["label"] == label].groupby("run").size() for label in unique(rows, "label")}
    patches = [Patch(facecolor=LABELS.get(label, MUTED), alpha=0.6, label=f"{label}, {counted(each)}") for label, each in sizes.items()]
    return [*patches, Line2D([], [], color=MUTED, marker="^", markersize=7, markeredgecolor="white", linestyle="none", label="mean")]


def add_legend(panels: np.ndarray, handles: Sequence[Any], own: bool) -> None:
    """Add one legend: above a figure of our own, in as many rows as needed, or inside the first of the axes that the user gave."""
    if own:
        widths = [len(str(handle.get_label())) + 8 for handle in handles]
        room = 12.5 * panels[0].figure.get_figwidth()
        columns = len(handles) if sum(widths) <= room else max(1, int(room / max(widths)))
        panels[0].figure.legend(handles=handles, loc="outside upper left", ncols=columns, columnspacing=1.6, handletextpad=0.6)
    else:
        panels[0].legend(handles=handles, fontsize=8.5)


def add_color_bar(panels: np.ndarray, unit: str, aspect: int, pad: float) -> None:
    """Add one color bar for heat maps on a common scale."""
    bar = panels[0].figure.colorbar(panels[0].collections[0], ax=list(panels), label=unit, aspect=aspect, pad=pad)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelcolor=MUTED)
