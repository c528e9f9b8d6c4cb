"""How every figure of guardlens looks: colours, marks, panels, ticks and legends. What is drawn is up to `plots` and `component_plots`.

Colours are those of Okabe & Ito (safe for the colour-blind), and every colour is doubled by a marker, a place or a number, so figures
survive a grey print.
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
    Axes = DataFrame = Any  # lets a run-time type checker pass over what is loaded lazily

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

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Rows = Any  # a DataFrame inside the drawing modules: pandas types its own selections too loosely to be checked


def styled(draw: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Draws in the style of guardlens and leaves the user's settings as they were.

    Only the settings of the style are put back: `rc_context` would also undo what a notebook's backend sets as the first figure loads it,
    and no later figure would be shown.
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
    """The frame, if it has these columns and a row, with every `$` of its texts escaped: matplotlib would take names for mathematics.

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
    """Values in order of appearance."""
    return list(dict.fromkeys(rows[column]))


def counted(counts: Any) -> str:
    """Numbers of items as text, `"n = 54"` or `"n = 36 to 54"`."""
    low, high = int(min(counts)), int(max(counts))
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def of_items(rows: Rows) -> str:
    """What a title says of the number of items, `" (n = 54)"`; nothing where the rows have no column n."""
    return f" ({counted(rows['n'])})" if "n" in rows else ""


def axes_for(
    axes: Axes | Iterable[Axes] | None, count: int, columns: int, height: float, width: float = 9.0, share_y: bool = False
) -> np.ndarray:
    """`count` axes: the given ones, or those of a new figure with its last row cut short.

    Raises:
        MismatchError: Fewer were given.
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
    """Ticks without marks, and faint grid lines along one axis."""
    ax.tick_params(length=0, labelsize=9, labelcolor=MUTED, pad=4)
    if grid:
        ax.grid(axis=grid, color=FAINT, linewidth=0.8)
    return ax


def step(count: int, most: int = 12) -> int:
    """Every how many of `count` to show, so that no more than `most` are shown; a step that is easy to read."""
    return next((step for step in (1, 2, 4, 5, 8, 10) if count <= most * step), -(-count // most))


def thinned(places: np.ndarray, names: Sequence[str]) -> tuple[list[Any], list[str]]:
    """Ticks and their names, so few of them that they can be read."""
    every = step(len(names))
    return list(places[::every]), list(names[::every])


def marked(position: int) -> dict[str, Any]:
    """Colour and marker of a run, by its place among the runs."""
    return {"color": RUNS[position % len(RUNS)], "marker": MARKERS[position % len(MARKERS)]}


def run_handles(names: Sequence[str], line: Literal["-", "none"] = "-") -> list[Any]:
    """What a legend shows of the runs."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], **marked(position), linestyle=line, markersize=6, markeredgecolor="white", label=name)
        for position, name in enumerate(names)
    ]


def band_handle(counts: Any) -> Any:
    """What a legend shows of the intervals of curves."""
    from matplotlib.patches import Patch

    return Patch(facecolor=MUTED, alpha=0.25, linewidth=0, label=f"95 % interval, {counted(counts)}")


def whisker_handle(color: str = MUTED, linewidth: float = 1.8, alpha: float = 0.55) -> Any:
    """What a legend shows of the intervals of points and bars."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linewidth=linewidth, alpha=alpha, label="95 % interval")


def label_handles(rows: Rows) -> list[Any]:
    """What a legend shows of the classes of queries, with their number in a run."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    each = {label: rows[rows["label"] == label].groupby("run").size() for label in unique(rows, "label")}
    patches = [Patch(facecolor=LABELS.get(label, MUTED), alpha=0.6, label=f"{label}, {counted(sizes)}") for label, sizes in each.items()]
    return [*patches, Line2D([], [], color=MUTED, marker="^", markersize=7, markeredgecolor="white", linestyle="none", label="mean")]


def add_legend(panels: np.ndarray, handles: Sequence[Any], own: bool) -> None:
    """One legend: above our own figure (in as many rows as it takes), inside the first of axes that were given."""
    if own:
        widths = [len(str(handle.get_label())) + 8 for handle in handles]
        room = 12.5 * panels[0].figure.get_figwidth()
        columns = len(handles) if sum(widths) <= room else max(1, int(room / max(widths)))
        panels[0].figure.legend(handles=handles, loc="outside upper left", ncols=columns, columnspacing=1.6, handletextpad=0.6)
    else:
        panels[0].legend(handles=handles, fontsize=8.5)


def add_colour_bar(panels: np.ndarray, unit: str, aspect: int, pad: float) -> None:
    """One colour bar for heat maps on one scale."""
    bar = panels[0].figure.colorbar(panels[0].collections[0], ax=list(panels), label=unit, aspect=aspect, pad=pad)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelcolor=MUTED)
