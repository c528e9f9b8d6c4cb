"""Alternating repeats, so that whatever else the machine does meets all ways alike; medians and spreads of ratios within a repeat."""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Way = Callable[[], object]
Seconds = dict[str, list[float]]


def alternate(ways: Mapping[str, Way], repeats: int) -> Seconds:
    """Seconds of every way in every repeat, after one run of each that is not counted."""
    for way in ways.values():
        way()
    seconds: Seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            _wait()
            start = time.perf_counter()
            way()
            _wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(seconds: Seconds, over: str, under: str, times: float = 1.0) -> dict[str, float]:
    """Median of over / under within each repeat, with the smallest and the largest."""
    each = [times * a / b if b else float("nan") for a, b in zip(seconds[over], seconds[under], strict=True)]
    return {"median": statistics.median(each), "low": min(each), "high": max(each), "repeats": len(each)}


def peak_bytes(way: Way) -> float:
    """The most memory that a way takes beyond what is there before; nan where the system does not tell."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed counts as used until it is given back
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is used now
    except OSError:
        return float("nan")
    before = _status("VmRSS")
    way()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * float(line.split()[1])


def peak_ratio(ways: Mapping[str, Way], over: str, under: str, repeats: int) -> dict[str, float]:
    """As `ratio`, of peak memory."""
    for way in ways.values():
        way()
    peaks = {name: [peak_bytes(way) for _ in range(repeats)] for name, way in ways.items()}
    return ratio(peaks, over, under)
