"""One way to show how far long work has come, in terminals and notebooks."""

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item", bound=Sized)


def track(parts: Iterable[Item], total: int, what: str, show: bool) -> Iterator[Item]:
    """Yield the parts of a work under a bar that counts what is in them, with the time left.

    Args:
        parts: Sized pieces of work (batches of queries, groups of cells).
        total: How many things all parts hold together.
        what: Name of the work.
        show: Without a bar if false.
    """
    if not show:
        yield from parts
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(what, total=total)
        for part in parts:
            yield part
            progress.advance(task, len(part))
