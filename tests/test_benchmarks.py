"""The benchmark's arithmetic, one experiment of it, and the page in the docs: what it reports, not how fast this machine is."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from analyses.benchmarks import __main__ as command
from analyses.benchmarks import experiments, subjects, timing, ways
from guardlens import interventions as iv

ROOT = Path(__file__).parents[1]
TINY = experiments.Plan(subjects.Size(layers=3, width=64, side=4), queries=2, pool=4, strengths=2, repeats=2, new_tokens=3, wide=64)


def test_ratios_are_taken_within_a_repeat():
    seconds = {"mine": [1.0, 9.0, 4.0], "floor": [1.0, 3.0, 2.0]}
    assert timing.ratio(seconds, "mine", "floor", times=2) == {"median": 4.0, "low": 2.0, "high": 6.0, "repeats": 3}
    assert math.isnan(timing.ratio({"mine": [1.0], "floor": [0.0]}, "mine", "floor")["median"])


def test_ways_alternate_after_one_run_that_does_not_count():
    order = []
    seconds = timing.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b", "a", "b", "a", "b"] and [len(each) for each in seconds.values()] == [2, 2]


def test_memory_is_what_a_way_takes_beyond_what_is_there():
    held = torch.ones(5_000_000)
    peak = timing.peak_bytes(lambda: torch.ones(10_000_000) + 1)
    assert math.isnan(peak) or 0.9 * 80e6 < peak < 1.5 * 80e6
    assert held.sum() > 0


def test_all_ways_of_a_sweep_compute_the_same():
    subject = subjects.model(TINY.size)
    batch, ssd = subject.batch(subjects.queries(2), subjects.blank(TINY.size)), subjects.directions(subject)
    vectors = list(ssd.vectors[:, 0])
    mine = subject.run(batch, ways.cells(subject, iv.add(ssd))).logits
    for found in (ways.raw_hooks(subject, batch, vectors), ways.naive_nnsight(subject, batch, vectors)):
        torch.testing.assert_close(mine, torch.stack(found), atol=1e-4, rtol=0)
    states = ways.collected(subject, batch)
    torch.testing.assert_close(states, ways.raw_collect(subject, batch), atol=1e-5, rtol=0)
    torch.testing.assert_close(states[:, :-1], ways.hidden_states(subject, batch)[:, :-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", list(experiments.ALL))
def test_every_experiment_reports_finite_ratios(name, monkeypatch):
    monkeypatch.setattr(experiments, "_cell", lambda *arguments: iter(())) if name == "growth" else None
    rows = list(experiments.ALL[name](TINY))
    assert all(row["ratio"] > 0 for row in rows if row["what"] != "collect_memory")


def test_results_are_written_with_the_page(tmp_path):
    rows = [experiments.row("sweep_layers", "guardlens", {"median": 1.25, "low": 1.2, "high": 1.29}, "<= 1.2")]
    command.write(pd.DataFrame(rows), tmp_path, True, 2, "3 layers")
    assert json.loads((tmp_path / "summary.json").read_text())["ratios"]["sweep_layers"]["ratio"] == 1.25
    assert "| `sweep_layers` | guardlens | 1.25 | 1.2 to 1.29 | <= 1.2 |" in (tmp_path / "benchmarks.md").read_text()


def test_the_docs_page_is_the_one_that_its_numbers_make():
    summary = json.loads((ROOT / "docs/results/benchmarks.json").read_text())
    page = (ROOT / "docs/results/benchmarks.md").read_text()
    wanted = {"sweep_layers", "sweep_grid", "sweep_again", "shared_prefix_speedup", "collect_time", "collect_memory", "generate_guarded"}
    assert wanted <= set(summary["ratios"]) and summary["quick"] is False
    for name, found in summary["ratios"].items():
        assert f"| `{name}` | {found['way']} | {found['ratio']:.3g} | {found['low']:.3g} to {found['high']:.3g} |" in page
