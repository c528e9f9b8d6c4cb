"""Alternating repeats, so that whatever else the machine does meets all ways alike; medians and spreads of ratios within a repeat."""

import ctypes
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

Way = Callable[[], object]
Seconds = dict[str, list[float]]


def alternate(ways: Mapping[str, Way], repeats: int) -> Seconds:
    """Seconds of every way in every repeat, after one run of each that is not counted."""
    for way in ways.values():
        way()
    seconds: Seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            wait()
            start = time.perf_counter()
            way()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


@contextmanager
def seconds_within(modules: Collection[nn.Module]) -> Iterator[list[float]]:
    """Collect the seconds of each call of these modules. A call within another one's is a part of it and counts once.

    Hooks of the modules themselves, such as edits, run outside of what is timed.
    """
    seconds: list[float] = []
    starts: list[float] = []

    def start(module: nn.Module, args: Any) -> None:
        if module in modules:
            wait()
            starts.append(time.perf_counter())

    def stop(module: nn.Module, args: Any, out: Any) -> None:
        if module in modules:
            wait()
            began = starts.pop()
            if not starts:
                seconds.append(time.perf_counter() - began)

    handles = [register_module_forward_pre_hook(start), register_module_forward_hook(stop)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def wait() -> None:
    """Wait until the GPU has done what it was asked for, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(values: list[float], seconds: float = float("nan")) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "seconds": seconds}


def ratio(seconds: Seconds, over: str, under: str, times: float = 1.0) -> dict[str, float]:
    """Median of times x over / under within each repeat, with the smallest and the largest; and the seconds of times x over."""
    each = [times * a / b if b else float("nan") for a, b in zip(seconds[over], seconds[under], strict=True)]
    return summary(each, times * statistics.median(seconds[over]))


def absolute(values: list[float], times: float = 1.0) -> dict[str, float]:
    """Median, smallest and largest of seconds or bytes."""
    return summary([times * value for value in values], times * statistics.median(values))


def peak_bytes(way: Way, device: str = "cpu") -> float:
    """The most memory that a way takes beyond what is there before; nan where the system does not tell."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return torch.cuda.max_memory_allocated() - before
    try:
        with _given_back():
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is used now
            before = _status("VmRSS")
            way()
            return _status("VmHWM") - before
    except OSError:
        return float("nan")


@contextmanager
def _given_back() -> Iterator[None]:
    """Inside, glibc gives tensors back to the system as they are freed; else what they took counts as used for as long as it likes.

    Afterwards it keeps more than it did before, which is faster: so what is timed comes before what is weighed.
    """
    libc, trim_threshold, map_threshold = ctypes.CDLL("libc.so.6"), -1, -3
    libc.mallopt(map_threshold, 2**16)
    libc.malloc_trim(0)
    try:
        yield
    finally:
        libc.mallopt(map_threshold, 2**25)
        libc.mallopt(trim_threshold, 2**26)


def _status(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * float(line.split()[1])


def peaks(ways: Mapping[str, Way], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Peak memory of every way in every repeat, after one run of each that is not counted."""
    for way in ways.values():
        way()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            found[name].append(peak_bytes(way, device))
    return found


def peak_ratio(peaks: Mapping[str, list[float]], over: str, under: str) -> dict[str, float]:
    """As `ratio`, of peak memory; without seconds."""
    return ratio(dict(peaks), over, under) | {"seconds": float("nan")}
