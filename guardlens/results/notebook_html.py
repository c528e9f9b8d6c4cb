"""What notebooks show of the main objects: a caption and small HTML tables. Every text is escaped; images are named, never drawn."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

ROWS = 10
"""How many rows of a table are shown."""

WIDTH = 160
"""How many characters of a text are shown."""


def captioned(caption: str, *tables: str) -> str:
    """Tables under what `repr` says of the object."""
    return f"<div><p><code>{escape(caption)}</code></p>{''.join(tables)}</div>"


def facts(named: Mapping[str, Any]) -> str:
    """Names and values, one a line; empty values are left out."""
    import pandas as pd

    rows = [(name, str(value)) for name, value in named.items() if value not in (None, "", ())]
    return _html(pd.DataFrame(rows), header=False)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The first `ROWS` of rows with the same keys, and how many there are."""
    import pandas as pd

    return first_rows(pd.DataFrame(list(rows)))


def first_rows(frame: Any) -> str:
    """The first `ROWS` of a data frame, and how many there are."""
    more = f"<p>the first {ROWS} of {len(frame):,} rows</p>" if len(frame) > ROWS else ""
    return _html(frame.head(ROWS), na_rep="", float_format="{:.3g}".format) + more


def _html(frame: Any, **options: Any) -> str:
    """A data frame, escaped; texts longer than `WIDTH` are cut."""
    import pandas as pd

    with pd.option_context("display.max_colwidth", WIDTH):
        return frame.to_html(index=False, border=0, justify="left", **options)


def span(layers: Sequence[int]) -> str:
    """Layers as text: `0 to 7`, or one by one where some are left out."""
    whole = len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))


def pictured(images: Sequence[Any]) -> str:
    """Images by size, or by the name of their file."""
    return ", ".join("x".join(map(str, image.size)) if hasattr(image, "size") else Path(image).name for image in images)
