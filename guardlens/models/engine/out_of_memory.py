"""Lack of memory, and who caused it: the model's forward pass, or a function of the user."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OutOfMemory(torch.OutOfMemoryError):
    """A function of the user ran out of memory."""


def out_of_memory(error: Exception) -> bool:
    """Whether an error means lack of memory, on a GPU or in the machine."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def at_work(kind: str, function: object) -> Iterator[None]:
    """Name the function of the user that runs inside, if it runs out of memory.

    Raises:
        OutOfMemory: The function ran out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error) or isinstance(error, OutOfMemory):
            raise
        raise OutOfMemory(f"{kind} {getattr(function, 'name', None) or repr(function)}, which ran out of memory ({error})") from error
