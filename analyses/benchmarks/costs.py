"""What else costs: a run's own overhead, peak memory, memory of kept prompts, and importing."""

import statistics
import subprocess
import sys
from collections.abc import Iterator

from analyses.benchmarks import subjects, timing, ways
from analyses.benchmarks.rows import MIB, Plan, Row, row
from guardlens import interventions as iv

IMPORT = """
import time, torch
start = time.perf_counter()
import guardlens
alone = time.perf_counter() - start
guardlens.load
print(alone, time.perf_counter() - start)
"""


def overhead(plan: Plan) -> Iterator[Row]:
    """One edit through guardlens (plan, nnsight trace, checks) against one raw hook, at a wider model."""
    traits = {"width": plan.wide, "layers": max(4, plan.size.layers // 2)}
    subject, size = plan.model(**traits), plan.size.at(**traits)
    batch, ssd = subject.batch(subjects.queries(1), subjects.blank(size)), subjects.directions(subject)
    edit, vectors = iv.add(ssd, 2.0).at(layers=[2]), subjects.pushes(subject, ssd, 2.0)
    each = {"raw hook": lambda: ways.raw_hooks(subject, batch, vectors, [2]), "guardlens": lambda: subject.run(batch, edit)}
    found = timing.ratio(timing.alternate(each, 2 * plan.repeats), "guardlens", "raw hook")
    yield row("run_overhead", f"guardlens, one edit, d_model {size.width}", found, "<= 1.05", "forwards with one raw hook")


def memory(plan: Plan) -> Iterator[Row]:
    """Peak memory of a grid, and what kept prompts take."""
    subject = plan.model()
    ssd, batch = subjects.directions(subject), subject.batch(subjects.queries(1), subjects.blank(plan.size))
    grid, vectors = ways.cells(subject, iv.add(ssd, 2.0), plan.strengths), subjects.pushes(subject, ssd, 2.0)
    peaks = timing.peaks(
        {
            "plain": lambda: ways.plain(subject, batch),
            "grid": lambda: subject.run(batch, grid),
            "naive": lambda: ways.raw_hooks(subject, batch, vectors, [0, 1]),
        },
        plan.few,
        plan.device,
    )
    said = f"guardlens, {subject.cfg.n_layers} x {plan.strengths} cells"
    yield row("memory_sweep", said, timing.peak_ratio(peaks, "grid", "naive"), "<= 1.5", unit="the naive loop's peak")
    yield row("memory_sweep", said, timing.peak_ratio(peaks, "grid", "plain"), unit="a plain forward's peak")
    yield row("memory_sweep", said, timing.summary([peak / MIB for peak in peaks["grid"]]), unit="MiB")
    several = subject.batch(subjects.queries(plan.queries), subjects.blank(plan.size))
    together, apart = subject.prefill(several.after(subject.share(several))).bytes, subject.prefill(several).bytes
    said = f"guardlens, {plan.queries} prompts beside one blank image"
    yield row("memory_kept", said, timing.summary([together / apart]), unit="a cache per prompt")
    yield row("memory_kept", said, timing.summary([together / MIB]), unit="MiB")


def imports(plan: Plan) -> Iterator[Row]:
    """Beyond torch, each time in a new process."""
    command = [sys.executable, "-c", IMPORT]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() for _ in range(plan.few)]
    alone, loaded = ([float(run[place]) for run in runs] for place in (0, 1))
    yield row("import_seconds", "import guardlens, beyond torch", timing.summary(alone, statistics.median(alone)), "<= 0.3", "seconds")
    yield row("import_seconds", "with all that loads a model", timing.summary(loaded, statistics.median(loaded)), unit="seconds")
