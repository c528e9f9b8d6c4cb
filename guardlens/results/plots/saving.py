"""Saving a figure as PNG and SVG."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # lets a run-time type checker skip what is loaded lazily


def save(figure: Figure, stem: str | Path) -> list[Path]:
    """Write a figure as PNG (160 dpi) and as SVG, atomically and with the same bytes for the same figure, then close it.

    Args:
        figure: The figure.
        stem: The path of the two files without its ending.

    Returns:
        The two paths.

    Examples:
        >>> [path.name for path in plots.save(ssd.plot()[0].figure, "spectrum")]
        ['spectrum.png', 'spectrum.svg']
    """
    import matplotlib
    from matplotlib import pyplot

    from guardlens.results.files import atomic  # loads torch

    paths = [Path(stem).with_name(f"{Path(stem).name}.{kind}") for kind in ("png", "svg")]
    with matplotlib.rc_context({"svg.hashsalt": "guardlens"}):
        for path, unwanted in zip(paths, ("Software", "Date"), strict=True):
            with atomic(path) as partial:
                figure.savefig(partial, format=path.suffix[1:], dpi=160, metadata={unwanted: None})
    if not matplotlib.is_interactive():
        pyplot.close(figure)
    return paths
