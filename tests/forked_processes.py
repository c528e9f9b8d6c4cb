"""Work in a process of its own that is killed at the end."""

import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


@contextmanager
def forked(work: Callable[[], object]) -> Iterator[int]:
    """Do some work in a copy of this process, whose id is yielded. It is killed at the end, and ends without a word before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking beside threads: the copies here compute nothing
        process = os.fork()
    if not process:
        try:
            work()
        finally:
            os._exit(0)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(process, 0)


def code_of(work: Callable[[], object]) -> int:
    """How a copy of this process ends that does some work: 0, or -9 if it is killed, or 1 after an exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        process = os.fork()
    if not process:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
