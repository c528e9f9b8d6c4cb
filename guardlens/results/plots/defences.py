"""Figures of defences beside each other."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from guardlens.results.plots import style
from guardlens.results.plots.panels import points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame
else:
    Axes = DataFrame = Any  # lets a run-time type checker skip what is loaded lazily

RATES = {"ASR": "harmful requests answered (%)", "over-refusal": "harmless requests refused (%)"}
"""Rate -> label of its x axis."""


@style.styled
def arms(frame: DataFrame, axes: Axes | Iterable[Axes] | None = None) -> np.ndarray:
    """Defences compared: a panel per rate (ASR, over-refusal), a row per defence, and a point with its interval per presentation.

    Args:
        frame: Columns defence, presentation, rate, value, low, high (shares, 0 to 1), n. Defences are drawn from the top in order of
            appearance.
        axes: The axes to draw on, one per rate; a new figure by default.

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
    rates = style.unique(rows, "rate")
    defences = style.unique(rows, "defence")
    presentations = style.unique(rows, "presentation")
    height = 1.0 + len(defences) * max(0.36, 0.17 * len(presentations) + 0.12)
    panels = style.axes_for(axes, len(rates), len(rates), height=height, share_y=True)
    for ax, rate in zip(panels, rates, strict=True):
        panel = rows[rows["rate"] == rate]
        points(ax, panel, defences, presentations)
        ax.set_title(rate)
        if rate in RATES:
            ax.set_title("← better", loc="right", fontsize=8.5, fontweight="normal", color=style.MUTED)
        ax.set_xlabel(f"{RATES.get(rate, rate)}, {style.counted(panel['n'])}")
    panels[0].set_yticks(range(len(defences)), labels=defences)
    panels[0].tick_params(axis="y", labelcolor=style.INK, labelsize=9.5)
    panels[0].set_ylim(len(defences) - 0.5, -0.5)
    style.add_legend(panels, [*style.run_handles(presentations, line="none"), style.whisker_handle()], own=axes is None)
    return panels
