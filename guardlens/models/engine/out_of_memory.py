"""Running out of memory, and whose doing it was: the model's forward, or a function that the user handed in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OutOfMemory(torch.OutOfMemoryError):
    """A function that the user handed in found no room."""


def out_of_memory(error: Exception) -> bool:
    """Whether there was no room, on a GPU or in the machine."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def at_work(kind: str, function: object) -> Iterator[None]:
    """A function of the user runs inside; if it runs out of memory, the error says so.

    Raises:
        OutOfMemory: As said.
    """
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error) or isinstance(error, OutOfMemory):
            raise
        raise OutOfMemory(f"{kind} {getattr(function, 'name', None) or repr(function)}, which ran out of memory ({error})") from error
