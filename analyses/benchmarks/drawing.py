"""The growth curves."""

from typing import Any

import numpy as np

from analyses.benchmarks.growing import FLOOR, WAYS
from guardlens.results.plots.style import MUTED, Rows, color_and_marker, dressed, styled

LABELS = {
    "layers": "layers",
    "tokens": "tokens in the prompt",
    "vocabulary": "tokens in the vocabulary",
    "strengths": "strengths per layer",
    "queries": "queries beside one image",
}
UNITS = {"s": "time (s)", "MiB": "peak memory (MiB)"}


@styled
def growth(frame: Rows) -> Any:
    """Time and peak memory over each axis, one line per way, with the least and the greatest; the physical floor is dashed."""
    from matplotlib import pyplot

    panels = [(unit, axis) for unit in UNITS for axis in LABELS if len(_part(frame, unit, axis))]
    rows = -(-len(panels) // 3)
    figure, grid = pyplot.subplots(rows, 3, figsize=(10, 3 * rows), squeeze=False, layout="constrained")
    for ax, (unit, axis) in zip(grid.ravel(), panels, strict=False):
        _curves(ax, _part(frame, unit, axis))
        ax.set(xlabel=LABELS[axis], ylabel=UNITS[unit], title=f"{'Time' if unit == 's' else 'Memory'} over {axis}")
    for ax in grid.ravel()[len(panels) :]:
        ax.set_visible(False)
    figure.legend(handles=_handles(), loc="outside upper left", ncols=len(WAYS) + 1)
    return figure


def _part(frame: Rows, unit: str, axis: str) -> Rows:
    return frame[(frame["unit"] == unit) & (frame["axis"] == axis)]


def _curves(ax: Any, frame: Rows) -> None:
    from matplotlib.ticker import LogLocator

    for place, way in enumerate(WAYS):
        part, style = frame[frame["way"] == way].sort_values("value"), _style(place, way)
        ax.plot(part["value"], part["ratio"], markersize=5, markeredgecolor="white", **style)
        ax.fill_between(part["value"], part["low"], part["high"], color=style["color"], alpha=0.25, linewidth=0)
    dressed(ax, "y").set(xscale="log", yscale="log")
    ticks = np.sort(frame["value"].unique())
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if _decades(frame) < 1.5 else (1,)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_yticks([], minor=True)


def _decades(frame: Rows) -> float:
    return float(np.log10(frame["high"].max() / frame["low"].min()))


def _style(place: int, way: str) -> dict[str, Any]:
    return {"color": MUTED, "linestyle": (0, (4, 2)), "marker": "none"} if way == FLOOR else color_and_marker(place + 1)


def _handles() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = {"markersize": 6, "markeredgecolor": "white"}
    lines = [Line2D([], [], label=_label(way), **shown, **_style(place, way)) for place, way in enumerate(WAYS)]
    return [*lines, Patch(facecolor=MUTED, alpha=0.25, linewidth=0, label="least to greatest")]


def _label(way: str) -> str:
    return f"one {way}: the floor" if way == FLOOR else way
