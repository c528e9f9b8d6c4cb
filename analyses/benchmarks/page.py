"""The page in the docs that the numbers make."""

import math
from collections.abc import Iterator
from typing import Any

from analyses.benchmarks import breakdown, peers
from analyses.benchmarks.rows import reached
from guardlens.results.plots.style import Rows

GPU = "python -m analyses.benchmarks --device cuda --size 7b --dtype bfloat16"
CHECKPOINT = "python -m analyses.benchmarks --checkpoint PATH"
"""PATH is a directory or a GGUF file."""
MEANING = {
    "sweep_layers, sweep_grid, sweep_again": "Branches need the keys and values of the prompt, so a sweep begins with a forward that keeps"
    " them, which the plain forward does not.",
    "sweep_layers, sweep_again": "Behind them, a branch is one token, in one forward for all of them; the rest is edits, their trace and"
    " the mask. Asked again, nothing else is left: the decoder alone on these tokens is the floor of `sweep_again`.",
    "sweep_grid, sweep_again": "The same with every strength.",
    "shared_prefix_speedup": "Nothing can be cheaper than one prompt and the other texts once, the first two rows. The naive loop takes as"
    " many forwards of the batch as there are layers.",
    "collect_blank": "Making tensors of prompts and pictures counts on both sides; runs behind the prefix bring the queries' own tokens"
    " alone.",
    "generate_guarded": "A guard of the prompt's last token needs its text twin's forward, and nothing in the decode steps.",
    "memory_sweep": "Branches continue from the keys and values of the prompt, which a naive loop doesn't keep. This model has as many"
    " heads of keys and values as of queries, so transformers' own forward that keeps them takes more than the target.",
    "real_memory": "With two heads of keys and values, what is kept is small. The branches are as many tokens as the prompts, in one"
    " forward, and the logits of a few of them at a time.",
    "run_overhead": "What nnsight needs for a trace, and what guardlens adds: plans checked and compiled, states found, logits checked.",
}


def page(frame: Rows, facts: dict[str, Any]) -> str:
    """As Markdown."""
    parts = (_opening(frame, facts), _measured(frame), _figure(frame), _texts(frame, facts), _where(frame), _closing(facts))
    return "\n".join(line for part in parts for line in part)


def _opening(frame: Rows, facts: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    yield from ("# Benchmarks", "", f"Written by `{facts['command']}`.")
    yield f"Random LLaVA, {facts['subject']}, {facts['dtype']}, on {facts['device']}; {versions}."
    yield "Each number is the median of alternating repeats, of a ratio within one repeat where it is one, with the least and the greatest."
    yield "A plain forward is one of transformers, without a cache, with the logits of the last token: the floor of all that is asked."
    yield "The first sweep, fork, prefix and answer of a model are compared with whole runs, once; that is not counted."
    if not frame["way"].str.startswith(peers.NAME).any():
        yield f"{peers.NAME} needs an environment of its own: `{peers.COMMAND}` adds its rows."
    yield ""


def _measured(frame: Rows) -> Iterator[str]:
    """What was measured on the random LLaVA."""
    frame = frame[~frame["what"].isin(["growth", breakdown.TIME, breakdown.MEMORY])]
    yield from _table(frame[frame["subject"] == ""])


def _texts(frame: Rows, facts: dict[str, Any]) -> Iterator[str]:
    """What was measured on text-only models, a table for each."""
    frame = frame[frame["subject"] != ""]
    if frame.empty:
        return
    yield from ("## Text-only models", "")
    yield f"Each table is of another model than the random LLaVA above, in {facts['dtype']}. Sweeps are timed warm: after a first one."
    yield "Their scores are the refusal log-odds and the KL divergence of the next token; the naive loop computes the same scores."
    yield peers.NNTERP
    if facts["checkpoint"] is None:
        yield f"Rows of SmolLM2-135M with its real weights are left out: `{CHECKPOINT}` adds them."
    yield ""
    for subject, group in frame.groupby("subject", sort=False):
        yield from (f"**{subject}.**", "")
        yield from _table(group)


def _table(frame: Rows) -> Iterator[str]:
    if frame.empty:
        return
    yield "| what | way | result | target | reached | spread | in | seconds |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in frame.to_dict("records"):
        result, spread = _numbers(row)
        cells = (f"`{row['what']}`", row["way"], result, row["target"], reached(row), spread, row["unit"], _seconds(row))
        yield f"| {' | '.join(cells)} |"
    yield ""


def _numbers(row: dict[str, Any]) -> tuple[str, str]:
    """The median, and the spread."""
    return f"{row['ratio']:.3g}", f"{row['low']:.3g} to {row['high']:.3g}"


def _seconds(row: dict[str, Any]) -> str:
    return "" if math.isnan(row["seconds"]) else f"{row['seconds']:.3g}"


def _figure(frame: Rows) -> Iterator[str]:
    if "growth" in set(frame["what"]):
        yield "![Time and peak memory of a layer map over layers, tokens, vocabulary, strengths and queries](../figures/growth.png)"
        yield ""
        yield "*The layer map with guardlens, with a forward per cell (two of the layers timed), and one plain forward of the batch, as it"
        yield "grows. Over queries, guardlens computes the image that they share once, which a plain forward does not.*"
        yield ""


def _where(frame: Rows) -> Iterator[str]:
    """Of each target: whether it is met, and its parts."""
    for kind, title in ((breakdown.TIME, "Where the time goes"), (breakdown.MEMORY, "Where the memory goes")):
        parts = frame[frame["what"] == kind]
        if not parts.empty:
            yield from (f"## {title}", "", "The parts of what has a target, each measured alone in the same run.", "")
            yield from _parts(frame, parts)


def _parts(frame: Rows, parts: Rows) -> Iterator[str]:
    for of, group in parts.groupby("of", sort=False):
        names = str(of).split(", ")
        yield f"**{', '.join(f'`{name}`{_met(frame, name)}' for name in names)}.** {MEANING[str(of)]}"
        yield from ("", "| part | result | spread | in | seconds |", "| --- | --- | --- | --- | --- |")
        rows = ((row["way"], *_numbers(row), row["unit"], _seconds(row)) for row in group.to_dict("records"))
        yield from (f"| {' | '.join(cells)} |" for cells in rows)
        yield ""


def _met(frame: Rows, name: str) -> str:
    found = frame[(frame["what"] == name) & (frame["target"] != "")].to_dict("records")
    return f" ({found[0]['ratio']:.3g}, {reached(found[0])})" if found else ""


def _closing(facts: dict[str, Any]) -> Iterator[str]:
    if facts["device"].startswith("CPU"):
        yield f"These are numbers of a CPU. `{GPU}` measures a model of the size of LLaVA-1.5-7B on a GPU;"
        yield "it has not been run for this page."
        yield ""
