"""One run at a time on each model. A second thread waits; a run inside of a run is refused."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from guardlens.errors import InterventionError
from guardlens.models.architectures import unwrapped


@dataclass(eq=False)
class _Turn:
    """The lock of one model, how deep its thread is in calls of guardlens, and whether the model is running."""

    lock: Any = field(default_factory=RLock)
    depth: int = 0
    running: bool = False


_TURNS: WeakKeyDictionary[Any, _Turn] = WeakKeyDictionary()
_MAKING = RLock()


def lock_of(hf: Any) -> Any:
    """The lock that other threads wait for before they run the model, or prepare its prompts."""
    return _turn(hf).lock


@contextmanager
def taken(hf: Any) -> Iterator[bool]:
    """Hold the model for this thread. Yields whether this is the outermost call of the thread.

    Raises:
        InterventionError: The model is running in this very thread, which an edit or a hook function has called from.
    """
    turn = _turn(hf)
    with turn.lock:
        if turn.running:
            raise nested()
        turn.depth += 1
        try:
            yield turn.depth == 1
        finally:
            turn.depth -= 1


@contextmanager
def running(hf: Any) -> Iterator[None]:
    """Mark the model as running."""
    turn = _turn(hf)
    with turn.lock:
        turn.running = True
        try:
            yield
        finally:
            turn.running = False


def nested() -> InterventionError:
    """The error about a run inside of a run."""
    return InterventionError(
        "a run of a model inside of a run of the same model, as of an edit or a hook function that calls it",
        "one run at a time",
        "run it before, and hand the edit what it gave; a state of another presentation is iv.State(presentation=...)",
    )


def _turn(hf: Any) -> _Turn:
    with _MAKING:
        return _TURNS.setdefault(unwrapped(hf), _Turn())


def _forget() -> None:
    """Forget all locks in a forked process, where the thread that held one does not exist."""
    global _MAKING
    _TURNS.clear()
    _MAKING = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
