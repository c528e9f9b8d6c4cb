"""Progress bars: a line on stderr in terminals, and HTML in notebooks, which needs no widgets."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any, TypeVar

Item = TypeVar("Item", bound=Sized)
Advance = Callable[[int], object]


_shown = True


class progress_bars:
    """Switch progress bars on or off. As a context manager, it restores the previous setting at its end.

    Examples:
        >>> with gl.progress_bars(False):
        ...     text = gl.collect(model.llm, pairs)
    """

    def __init__(self, show: bool) -> None:
        global _shown
        self._before = _shown
        _shown = bool(show)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global _shown
        _shown = self._before


def track(parts: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Iterate over `parts` with a progress bar that counts items and shows the time left, unless `progress_bars(False)` switched bars off.

    Args:
        parts: Sized pieces of work (batches of queries, groups of cells).
        total: The number of items in all parts together. Without any, there is no bar.
        what: The name of the work.
    """
    if not _shown or not total:
        yield from parts
        return
    with _bar(what, total) as advance:
        for part in parts:
            yield part
            advance(len(part))


def _bar(what: str, total: int) -> AbstractContextManager[Advance]:
    return _notebook_bar(what, total) if _in_notebook() else _terminal_bar(what, total)


def _in_notebook() -> bool:
    """Whether a notebook kernel (Jupyter, VS Code, Colab) runs this code; IPython in a terminal has none."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


@contextmanager
def _terminal_bar(what: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda number: progress.advance(task, number)


@contextmanager
def _notebook_bar(what: str, total: int) -> Iterator[Advance]:
    from IPython.display import display

    began = time.monotonic()
    done = 0
    shown: Any = display(Bar(what, 0, total), display_id=True)

    def advance(number: int) -> None:
        nonlocal done
        done += number
        shown.update(Bar(what, done, total, (time.monotonic() - began) / max(done, 1) * (total - done)))

    yield advance


@dataclass(frozen=True)
class Bar:
    """One rendering of a progress bar in a notebook.

    Attributes:
        what: The name of the work.
        done: The number of items that are done.
        total: The number of all items.
        left: The expected remaining time in seconds, at the speed so far.
    """

    what: str
    done: int
    total: int
    left: float = 0.0

    def __repr__(self) -> str:
        left = f", {self.left:.0f} s left" if self.done < self.total and self.left else ""
        return f"{self.what} {self.done}/{self.total}{left}"

    def _repr_html_(self) -> str:
        bar = f'<progress value="{self.done}" max="{self.total}" style="vertical-align: middle"></progress>'
        return f"<div>{bar} {escape(repr(self))}</div>"
