"""The benchmark's arithmetic, that its ways agree, and the page in the docs: what it reports, not how fast this machine is."""

import json
import math
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import typer

import guardlens as gl
from analyses.benchmarks import __main__ as command
from analyses.benchmarks import breakdown, drawing, experiments, growing, peers, reading, rows, subjects, timing, ways
from analyses.benchmarks.page import CHECKPOINT, MEANING
from guardlens import interventions as iv

ROOT = Path(__file__).parents[2]
TINY = rows.PLANS["tiny"]
TARGETS = {
    *("sweep_layers", "sweep_grid", "sweep_again", "shared_prefix_speedup", "collect_time", "collect_memory", "collect_blank"),
    *("generate_guarded", "run_overhead", "import_seconds", "memory_sweep", "real_overhead", "real_memory"),
}


def test_ratios_are_taken_within_a_repeat():
    seconds = {"mine": [1.0, 9.0, 4.0], "floor": [1.0, 3.0, 2.0]}
    assert timing.ratio(seconds, "mine", "floor", times=2) == {"median": 4.0, "low": 2.0, "high": 6.0, "seconds": 8.0}
    assert math.isnan(timing.ratio({"mine": [1.0], "floor": [0.0]}, "mine", "floor")["median"])
    assert timing.absolute([1.0, 9.0, 4.0], 2) == {"median": 8.0, "low": 2.0, "high": 18.0, "seconds": 8.0}


def test_ways_alternate_after_one_run_that_does_not_count():
    order = []
    seconds = timing.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b", "a", "b", "a", "b"] and [len(each) for each in seconds.values()] == [2, 2]


def test_memory_is_what_a_way_takes_beyond_what_is_there():
    held = torch.ones(5_000_000)
    peak = timing.peak_bytes(lambda: torch.ones(10_000_000) + 1)
    assert math.isnan(peak) or 0.9 * 80e6 < peak < 1.5 * 80e6
    assert held.sum() > 0


@pytest.mark.parametrize(
    ("found", "target", "expected"),
    [
        ((1.2, 1.1, 1.4), "<= 1.2", "met"),
        ((1.26, 1.21, 1.4), "<= 1.2", "missed by 5 %"),
        ((1.26, 1.1, 1.4), "<= 1.2", "missed by 5 %, within the spread"),
        ((3.0, 2.9, 3.1), "<= 1.2", "missed by a factor of 2.5"),
        ((70.0, 60.0, 71.0), ">= 70", "met"),
        ((56.0, 50.0, 60.0), ">= 70", "missed by 25 %"),
        ((56.0, 50.0, 72.0), ">= 70", "missed by 25 %, within the spread"),
        ((9.0, 9.0, 9.0), "", ""),
    ],
)
def test_verdicts(found, target, expected):
    assert rows.reached(dict(zip(("ratio", "low", "high"), found, strict=True)) | {"target": target}) == expected


def test_all_ways_of_a_sweep_compute_the_same():
    subject = subjects.model(TINY.size)
    batch, ssd = subject.batch(subjects.queries(2), subjects.blank(TINY.size)), subjects.directions(subject)
    vectors, layers = subjects.pushes(subject, ssd, 2.0), [0, 1, 2]
    mine = subject.run(batch, ways.cells(subject, iv.add(ssd, 2.0)))
    assert mine.layout == "branch"
    for found in (ways.raw_hooks(subject, batch, vectors, layers), ways.naive_nnsight(subject, batch, vectors, layers)):
        close(mine.logits, torch.stack(found))
    assert not torch.allclose(mine.logits, ways.plain(subject, batch)[None], atol=1e-3)
    halves = [vector / 2 for vector in vectors]
    grid = subject.run(batch, ways.cells(subject, iv.add(ssd, 2.0), 2)).logits
    close(grid[::2], torch.stack(ways.raw_hooks(subject, batch, halves, layers)))


def test_all_ways_to_collect_read_the_same():
    subject = subjects.model(TINY.size)
    batch = subject.batch(subjects.queries(2), subjects.noise(TINY.size))
    states = ways.collected(subject, batch)
    close(states, ways.raw_collect(subject, batch))
    close(states[:, :-1], ways.hidden_states(subject, batch)[:, :-1])
    pool = subjects.queries(5)
    mine = gl.collect(subject, pool, subjects.blank(TINY.size)).states
    close(mine, ways.raw_pool(subject, pool, subjects.blank(TINY.size), 2))


@pytest.mark.parametrize(("layout", "found"), [("auto", "branch"), ("fork", "fork"), ("tile", "tile")])
def test_all_ways_to_edit_several_tokens_compute_the_same(layout, found):
    size = TINY.size.at(side=8)
    subject = subjects.model(size)
    batch, ssd = subject.batch([subjects.long_query()], subjects.blank(size)), subjects.directions(subject)
    cells = ways.cells(subject, iv.add(ssd, 2.0).at(positions=(-20, None)))
    run = subject.run(batch, cells, layout=layout)
    assert run.layout == found
    close(run.logits, torch.stack(ways.raw_hooks(subject, batch, subjects.pushes(subject, ssd, 2.0), [0, 1, 2], slice(-20, None))))


@pytest.mark.parametrize("layout", ["fork", "tile"])
def test_all_ways_to_edit_everywhere_compute_the_same(layout):
    subject = subjects.model(TINY.size)
    batch, ssd = subject.batch(subjects.queries(2), subjects.blank(TINY.size)), subjects.directions(subject)
    run = subject.run(batch, ways.cells(subject, iv.add(ssd, 2.0).at(positions="all")), layout=layout)
    close(run.logits, torch.stack(ways.raw_hooks(subject, batch, subjects.pushes(subject, ssd, 2.0), [0, 1, 2], slice(None))))


def test_all_ways_to_score_an_answer_compute_the_same():
    subject = subjects.model(TINY.size)
    batch, ssd = subject.batch(subjects.queries(2), subjects.blank(TINY.size)), subjects.directions(subject)
    words, vectors = torch.tensor([[5, 9, 7], [8, 5, 11]]), subjects.pushes(subject, ssd, 2.0)
    mine = subject.run(subject.prefill(batch).answering(words), ways.cells(subject, iv.add(ssd, 2.0)), logits="answer")
    assert mine.layout == "branch" and mine.logits.shape[:3] == (3, 2, 3)
    naive = ways.raw_hooks(subject, batch.answering(words), vectors, [0, 1, 2], slice(-4, -3), ways.plain_answer)
    close(mine.logits, torch.stack(naive))


def test_a_shared_image_changes_no_sweep_and_no_answer():
    size = TINY.size.at(side=12)
    subject = subjects.model(size)
    batch, ssd = subject.batch(subjects.queries(3), subjects.blank(size)), subjects.directions(subject)
    prefix = subject.share(batch)
    assert prefix is not None and len(prefix) > 144
    mine = subject.run(subject.prefill(batch.after(prefix)), ways.cells(subject, iv.add(ssd, 2.0))).logits
    close(mine, torch.stack(ways.raw_hooks(subject, batch, subjects.pushes(subject, ssd, 2.0), [0, 1, 2])))
    guard = ways.guard(subject, ssd, [0, 1])
    assert torch.equal(ways.guarded_generate(subject, batch, guard, 4, shared=True), ways.guarded_generate(subject, batch, guard, 4))
    plain = ways.plain_generate(subject, batch, 4)[:, batch.mask.shape[1] :]
    assert torch.equal(ways.guarded_generate(subject, batch, iv.nothing, 4, shared=True)[0], plain)


def test_all_ways_to_generate_under_an_edit_give_the_same_tokens():
    subject = subjects.model(TINY.size)
    batch, ssd = subject.batch(subjects.queries(2), subjects.blank(TINY.size)), subjects.directions(subject)
    vectors, width = subjects.pushes(subject, ssd, 20.0), batch.mask.shape[1]
    naive = ways.hooked_generate(subject, batch, vectors, [0, 2], 4)[:, width:]
    assert torch.equal(ways.guarded_generate(subject, batch, iv.add(ssd, 20.0).at(layers=[0, 2]), 4)[0], naive)
    assert not torch.equal(ways.plain_generate(subject, batch, 4)[:, width:], naive)


@pytest.mark.parametrize("name", [name for name in experiments.ALL if name != "imports"])
def test_every_experiment_reports_finite_numbers_with_their_spread(name):
    found = list(experiments.ALL[name](TINY))
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in found if not math.isnan(row["ratio"]))
    assert all(row["ratio"] > 0 for row in found if "memory" not in row["what"] and row["unit"] != "MiB")
    assert {row["what"] for row in found if row["target"]} <= TARGETS


def text_subject(size: subjects.TextSize = TINY.text) -> gl.HookedModel:
    return subjects.text_model(size)


@pytest.mark.parametrize("tokens", TINY.text_tokens)
def test_prompts_have_the_length_that_was_asked_for(tokens):
    subject = text_subject()
    batch = subject.batch(subjects.prompts(subject, 3, tokens))
    assert batch.mask.shape == (3, tokens) and bool(batch.mask.all())
    assert len({query.text for query in batch.queries}) == 3


def test_all_ways_of_a_text_model_compute_the_same():
    subject = text_subject()
    batch, ssd = subject.batch(subjects.prompts(subject, 2, 16)), subjects.directions(subject)
    vectors, layers = subjects.pushes(subject, ssd, 2.0), [0, 1, 2]
    mine = subject.run(batch, ways.cells(subject, iv.add(ssd, 2.0))).logits
    for found in (ways.raw_hooks(subject, batch, vectors, layers), ways.naive_nnsight(subject, batch, vectors, layers)):
        close(mine, torch.stack(found))
    assert not torch.allclose(mine, ways.plain(subject, batch)[None], atol=1e-3)


def test_a_sweep_and_the_naive_loop_give_the_same_scores():
    subject = text_subject()
    batch, ssd = subject.batch(subjects.prompts(subject, 2, 16)), subjects.directions(subject)
    naive = ways.scored_hooks(subject, batch, [subjects.pushes(subject, ssd, 2.0)], [0, 1, 2], ways.plain(subject, batch))
    frame = gl.sweep(subject, iv.add(ssd, 2.0), batch.queries, scores=ways.SCORES, placebos=0).frame
    for place, score in enumerate(ways.SCORES):
        mine = frame[frame["score"] == score.name].sort_values(["layer", "query"])["value"]
        close(torch.tensor(mine.to_numpy()).float(), torch.cat([values[place] for values in naive]))


def test_seconds_within_modules_leave_hooks_and_other_modules_out(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    inner = torch.nn.Linear(1, 1)
    outer = torch.nn.Sequential(inner, torch.nn.ReLU())
    outer.register_forward_hook(lambda module, args, out: next(clock) and None)
    with timing.seconds_within({inner, outer}) as seconds:
        torch.nn.Sequential(outer, torch.nn.ReLU())(torch.ones(1, 1))
        inner(torch.ones(1, 1))
    outer(torch.ones(1, 1))
    assert seconds == [2, 1]  # the outer one, with the inner one's look at the clock; the inner one alone


def test_the_models_own_modules_are_those_that_compute():
    subject = text_subject()
    own, blocks = reading.own_modules(subject), {subject.hf.get_submodule(path) for path in subject.cfg.blocks}
    assert own.isdisjoint({subject.hf, subject.hf.model, subject.hf.model.layers, *blocks})
    assert own >= {subject.hf.lm_head, subject.hf.model.embed_tokens, subject.hf.model.norm, *(block.self_attn for block in blocks)}


def test_the_model_of_real_proportions_is_qwens():
    subject = subjects.built_text(subjects.QWEN, "bfloat16", "meta")
    assert 490e6 < sum(weight.numel() for weight in subject.hf.parameters()) < 500e6  # Qwen2-0.5B has 494e6
    assert subjects.sizes(subject) == "24 layers, d_model 896, 14 query and 2 key-value heads, d_mlp 4,864, vocabulary 151,936"


def test_real_weights_are_measured_where_they_are_given(tmp_path):
    names = [name for name in experiments.ALL if name.startswith("smollm2")]
    assert not [row for name in names for row in experiments.ALL[name](TINY)]
    made, path = subjects.built_text(TINY.text), tmp_path / "weights"
    made.hf.save_pretrained(path)
    made.processor.save_pretrained(path)
    found = [row for name in names for row in experiments.ALL[name](replace(TINY, checkpoint=path))]
    assert list(dict.fromkeys(row["what"] for row in found)) == names
    assert {row["subject"] for row in found} == {f"`weights`, real weights: {subjects.sizes(made)}"}
    facts = command.facts(replace(TINY, checkpoint=path), False, "tiny", 2)
    assert facts["checkpoint"] == "weights" and facts["command"].endswith("--checkpoint weights")
    command.write(pd.DataFrame(found), tmp_path / "out", facts)
    assert CHECKPOINT not in (tmp_path / "out" / "benchmarks.md").read_text()


def test_importing_is_measured_in_a_process_of_its_own(monkeypatch):
    answer = subprocess.CompletedProcess([], 0, stdout="0.25 2.5\n")
    monkeypatch.setattr(subprocess, "run", lambda args, **options: answer if args[0] == sys.executable else None)
    alone, loaded = experiments.ALL["imports"](TINY)
    assert (alone["ratio"], alone["target"], loaded["ratio"]) == (0.25, "<= 0.3", 2.5)


def test_every_part_belongs_to_a_target():
    found = [*breakdown.where_time_goes(TINY), *breakdown.where_memory_goes(TINY)]
    assert {row["of"] for row in found} == set(MEANING)
    assert {name for row in found for name in row["of"].split(", ")} <= TARGETS


def test_curves_grow_from_one_point_that_is_measured_once(monkeypatch):
    asked = []
    monkeypatch.setattr(growing, "timed", lambda plan, axes, **point: asked.append((axes, tuple(point.values()))) or iter(()))
    assert not list(growing.growth(TINY))
    assert asked == [
        (["layers", "side", "vocabulary", "strengths", "queries"], (3, 4, 4096, 1, 1)),
        (["layers"], (2, 4, 4096, 1, 1)),
        (["side"], (3, 2, 4096, 1, 1)),
        (["vocabulary"], (3, 4, 2048, 1, 1)),
        (["strengths"], (3, 4, 4096, 2, 1)),
        (["queries"], (3, 4, 4096, 1, 2)),
    ]


def test_what_is_timed_comes_before_what_is_weighed():
    names = list(experiments.ALL)
    assert [name for name in names if "memory" in name] == names[-6:]


def test_the_peer_is_measured_where_it_is_installed(monkeypatch):
    def rows_of_the_peer():
        found = [row for name in ("sweeps", "collection", "collection_memory", "real_layers") for row in experiments.ALL[name](TINY)]
        return [row["what"] for row in found if row["way"].startswith(peers.NAME)]

    monkeypatch.setattr(peers, "installed", lambda: False)
    assert rows_of_the_peer() == []
    monkeypatch.setattr(peers, "installed", lambda: True)
    monkeypatch.setattr(peers, "bridge", lambda *arguments: None)
    monkeypatch.setattr(peers, "hooks", lambda *arguments: torch.ones(1000).sum())
    monkeypatch.setattr(peers, "collect", lambda *arguments: torch.ones(1000).sum())
    assert rows_of_the_peer() == ["sweep_layers", "collect_time", "collect_memory", "real_layers", "real_layers"]


def test_seven_billion_weights_are_made_in_the_precision_in_which_they_stay():
    subject = subjects.built(rows.PLANS["7b"].size, "bfloat16", "meta")
    weights = list(subject.hf.parameters())
    assert 7.0e9 < sum(weight.numel() for weight in weights) < 7.2e9  # LLaVA-1.5-7B has 7.06e9
    assert {weight.dtype for weight in weights} == {torch.bfloat16} and {weight.device.type for weight in weights} == {"meta"}


def test_random_weights_are_drawn_in_bfloat16_too():
    subject = subjects.built(TINY.size, "bfloat16")
    drawn = subject.hf.get_submodule(subject.cfg.unembed).weight.detach()
    assert drawn.dtype == torch.bfloat16 and 0.01 < float(drawn.float().std()) < 0.05
    whole = ways.plain(subject, subject.batch(subjects.queries(1), subjects.blank(TINY.size)))
    assert whole.dtype == torch.bfloat16 and bool(whole.isfinite().all()) and float(whole.float().std()) > 0


def growth_rows() -> list[rows.Row]:
    point = {"low": 0.5, "high": 4.0, "what": "growth", "target": "", "seconds": 1.0, "subject": ""}
    axes = {"s": growing.NAMED.values(), "MiB": ("layers", "tokens", "vocabulary")}
    each = [(unit, axis, way, value) for unit in axes for axis in axes[unit] for way in growing.WAYS for value in (2, 4)]
    return [point | {"unit": unit, "axis": axis, "way": way, "value": value, "ratio": float(value)} for unit, axis, way, value in each]


def test_every_panel_has_every_way_with_its_spread_and_the_floor():
    figure = drawing.growth(pd.DataFrame(growth_rows()))
    panels = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_ylabel() for ax in panels] == ["time (s)"] * 5 + ["peak memory (MiB)"] * 3
    for ax in panels:
        assert [list(line.get_ydata()) for line in ax.lines] == [[2, 4]] * 3
        assert [line.get_linestyle() for line in ax.lines] == ["-", "-", "--"]
        assert all(set(band.get_paths()[0].vertices[:, 1]) == {0.5, 4.0} for band in ax.collections)
        assert len(ax.collections) == 3 and ax.get_xscale() == ax.get_yscale() == "log"
    assert [text.get_text() for text in figure.legends[0].get_texts()][2] == "one plain forward: the floor"


def test_results_are_written_with_the_page(tmp_path):
    found = {"median": 1.25, "low": 1.22, "high": 1.29, "seconds": 0.5}
    measured = [
        rows.row("sweep_layers", "guardlens", found, "<= 1.2"),
        rows.row("sweep_layers", "raw hooks", found),
        rows.row("real_layers", "guardlens", found, subject="Random Qwen2: 24 layers"),
        rows.row(breakdown.TIME, "two parts", found, of="sweep_layers, sweep_again"),
        rows.row(breakdown.MEMORY, "keys and values", found, of="memory_sweep"),
        *growth_rows(),
    ]
    command.write(pd.DataFrame(measured), tmp_path, command.facts(TINY, False, "tiny", 2))
    summary, page = json.loads((tmp_path / "summary.json").read_text()), (tmp_path / "benchmarks.md").read_text()
    assert set(summary["ratios"]) == {"sweep_layers", "real_layers"}
    assert summary["ratios"]["real_layers"]["subject"] == "Random Qwen2: 24 layers" and "subject" not in summary["ratios"]["sweep_layers"]
    assert summary["ratios"]["sweep_layers"]["reached"] == "missed by 4 %"
    assert summary["command"] == "python -m analyses.benchmarks --size tiny" and summary["device"].startswith("CPU")
    assert "| `sweep_layers` | guardlens | 1.25 | <= 1.2 | missed by 4 % | 1.22 to 1.29 | plain forwards | 0.5 |" in page
    assert "**`sweep_layers` (1.25, missed by 4 %), `sweep_again`.**" in page
    assert "| two parts | 1.25 | 1.22 to 1.29 | plain forwards | 0.5 |" in page
    assert page.index("Where the memory goes") < page.index("**`memory_sweep`.**") < page.index("| keys and values | 1.25")
    mine, theirs = page.split("**Random Qwen2: 24 layers.**")
    assert "`real_layers`" in theirs and "`real_layers`" not in mine and peers.NNTERP in mine
    assert f"`{CHECKPOINT}` adds them" in mine
    assert "it has not been run for this page" in page and (tmp_path / "growth.png").exists()


def test_a_page_from_a_gpu_carries_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a large GPU")
    plan = replace(rows.PLANS["7b"], device="cuda", dtype="bfloat16")
    found = command.facts(plan, False, "7b", 2)
    command.write(pd.DataFrame([rows.row("sweep_layers", "guardlens", timing.absolute([0.5]))]), tmp_path, found)
    page = (tmp_path / "benchmarks.md").read_text()
    assert found["command"] == "python -m analyses.benchmarks --size 7b --device cuda --dtype bfloat16"
    assert "32 layers, d_model 4096, 576 image tokens, bfloat16, on a large GPU" in page and "has not been run" not in page


def test_the_command_says_what_it_leaves_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda: False)
    command.main(tmp_path, quick=True, only=["tokens"], size="tiny", dtype="bfloat16", threads=torch.get_num_threads())
    out = " ".join(capsys.readouterr().out.split())
    assert peers.COMMAND in out and "--checkpoint PATH" in out and "sweep_tokens" in out
    assert json.loads((tmp_path / "summary.json").read_text())["dtype"] == "bfloat16"


def test_an_experiment_that_is_unknown_is_refused(tmp_path):
    with pytest.raises(typer.BadParameter, match="no experiment 'sweep'; there are sweeps, tokens"):
        command.main(tmp_path, only=["tokens", "sweep"], threads=torch.get_num_threads())


@pytest.mark.slow
def test_the_quick_run_takes_forty_seconds_of_one_core_at_most(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "analyses.benchmarks", "--quick", "--threads", "1", "--out", str(tmp_path)], check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 40
    found = json.loads((tmp_path / "summary.json").read_text())["ratios"]
    assert set(found) >= TARGETS


def test_the_docs_page_is_the_one_that_its_numbers_make():
    summary = json.loads((ROOT / "docs/results/benchmarks.json").read_text())
    page = (ROOT / "docs/results/benchmarks.md").read_text()
    wanted = {"sweep_layers", "sweep_grid", "sweep_again", "shared_prefix_speedup", "collect_time", "collect_memory", "generate_guarded"}
    assert wanted <= set(summary["ratios"]) and summary["quick"] is False
    for name, found in summary["ratios"].items():
        spread = f"{found['low']:.3g} to {found['high']:.3g}"
        cells = f"`{name}`", found["way"], f"{found['ratio']:.3g}", found["target"], found["reached"], spread
        assert f"| {' | '.join(cells)} |" in page


def close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
