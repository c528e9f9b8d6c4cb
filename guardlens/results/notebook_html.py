"""The HTML that notebooks show for the main objects: a caption and small tables. Texts are escaped; images are named, not drawn."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

ROWS = 10
"""The number of rows of a table that are shown."""

WIDTH = 160
"""The number of characters of a text that are shown."""


def captioned(caption: str, *tables: str) -> str:
    """Tables under a caption, the `repr` of the object."""
    return f"<div><p><code>{escape(caption)}</code></p>{''.join(tables)}</div>"


def facts(named: Mapping[str, Any]) -> str:
    """A table of names and values, without those that are empty."""
    import pandas as pd

    rows = [(name, str(value)) for name, value in named.items() if value not in (None, "", ())]
    return _html(pd.DataFrame(rows), header=False)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A table of the first `ROWS` of rows with the same keys, with their total number."""
    import pandas as pd

    return first_rows(pd.DataFrame(list(rows)))


def first_rows(frame: Any) -> str:
    """The first `ROWS` rows of a data frame, with their total number."""
    more = f"<p>the first {ROWS} of {len(frame):,} rows</p>" if len(frame) > ROWS else ""
    return _html(frame.head(ROWS), na_rep="", float_format="{:.3g}".format) + more


def _html(frame: Any, **options: Any) -> str:
    """A data frame as HTML. Texts are escaped, and cut after `WIDTH` characters."""
    import pandas as pd

    with pd.option_context("display.max_colwidth", WIDTH):
        return frame.to_html(index=False, border=0, justify="left", **options)


def span(layers: Sequence[int]) -> str:
    """Layers as text: `0 to 7`, or one by one if there are gaps."""
    contiguous = len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if contiguous else ", ".join(map(str, layers))


def images_as_text(images: Sequence[Any]) -> str:
    """The size of each image, or the name of its file."""
    return ", ".join("x".join(map(str, image.size)) if hasattr(image, "size") else Path(image).name for image in images)
