"""The ways to run plans, the same numbers each. A plan is a lane.

- *Tiles*: a copy of the batch for each plan, below each other. Works always, and costs a run for each.
- *Branches*: a copy of the prompts' ends for each plan, beside each other, behind what is cached of the prompts. For plans that leave the
  beginnings of the prompts alone; costs the ends.
- *Forks*: each plan goes on from the unedited run at the first block that it touches. For plans that edit what can't branch; costs the
  blocks from there on.
- *Answers*: generation behind what is cached of the prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guardlens.batches import Batch, Layout
from guardlens.engine import Engine
from guardlens.interventions import Intervention
from guardlens.prefixes import Stem
from guardlens.program import Held, compile_taps
from guardlens.runs import Run, checked, reads_of
from guardlens.sites import Site
from guardlens.ways import first_block, scored


def run_tiles(
    engine: Engine,
    batch: Batch,
    plans: Sequence[Intervention],
    read: Sequence[Site],
    logits: str | None,
    held: Held,
    *,
    new_tokens: int = 0,
    seed: int | None = None,
    generation: Mapping[str, Any] = MappingProxyType({}),
) -> Run:
    """Each plan on its own copy of the batch, below each other. One plan is a plain run."""
    layout = Layout.tile(len(batch.queries), batch.mask.shape[1], len(plans), batch.mask.device)
    taps, record = compile_taps(plans, read, layout, batch, engine.cfg.n_layers, held)
    run, tokens, by_lane = replace(batch, inputs=layout.spread(batch.inputs, engine.cfg.packed)), None, None
    if new_tokens:
        tokens = engine.generate(run, taps, new_tokens, seed, generation).unflatten(0, (len(plans), -1))
    else:
        raw = engine.forward(run, taps, _kept(batch, logits))
        by_lane = None if raw is None else raw.unflatten(0, (len(plans), -1))
    reads = reads_of(record, read, batch, engine.cfg.n_layers)
    if by_lane is not None and logits != "all":
        by_lane = checked(_scored_of(by_lane, batch, logits), batch)
    return Run(reads, by_lane, tokens, record.verdicts, layout.name)


def run_tails(
    engine: Engine,
    stem: Stem,
    tail: Bool[Tensor, "query seq"],
    plans: Sequence[Intervention],
    read: Sequence[Site],
    logits: str | None,
    held: Held,
    *,
    keep: bool = False,
) -> tuple[Run, Stem]:
    """Each plan on its own copy of the prompts' ends, beside each other, behind their beginnings.

    Args:
        engine: The model.
        stem: What is kept of the prompts.
        tail: Their ends.
        plans: One per lane.
        read: Sites to read.
        logits: Of the prompts' last tokens, of an answer, or none.
        held: What the plans require of other presentations' runs.
        keep: Whether the keys and values of the ends stay with the stem, which is then handed back grown.
    """
    batch, layout = stem.batch, stem.tails(tail, len(plans))
    taps, record = compile_taps(plans, read, layout, batch, engine.cfg.n_layers, held)
    at = None
    if logits is not None:
        chosen = scored(batch, logits)
        found = [layout.find(lane, chosen) for lane in range(len(plans))]
        at = torch.cat([places.rows for places in found]), torch.cat([places.columns for places in found])
    inputs = stem.inputs(layout, engine.config, engine.hf.dtype)
    if keep:
        raw = engine.continued(inputs, taps, batch, at)
        stem = stem.grown(layout)
    else:
        with stem.unchanged():
            raw = engine.continued(inputs, taps, batch, at)
    reads = reads_of(record, read, batch, engine.cfg.n_layers)
    by_lane = None if raw is None else _by_query(raw, batch, len(plans), logits)
    return Run(reads, by_lane, None, record.verdicts, layout.name), stem


def run_answers(
    engine: Engine,
    stem: Stem,
    plans: Sequence[Intervention],
    read: Sequence[Site],
    held: Held,
    *,
    new_tokens: int,
    seed: int | None = None,
    generation: Mapping[str, Any] = MappingProxyType({}),
) -> Run:
    """Answers under each plan, from the prompts' last tokens on."""
    batch = stem.batch
    (queries, width), device = batch.mask.shape, batch.mask.device
    layout = Layout.tile(queries, width, len(plans), device, start=width - 1)
    taps, record = compile_taps(plans, read, layout, batch, engine.cfg.n_layers, held)
    inputs = layout.spread({name: batch.inputs[name] for name in ("input_ids", "attention_mask")})
    rows = torch.arange(queries, device=device).repeat(len(plans))
    behind = {"past_key_values": stem.unpacked(rows), "position_ids": stem.positions[..., rows, :]}
    tokens = engine.generate(replace(batch, inputs=inputs), taps, new_tokens, seed, {**behind, **generation})
    reads = reads_of(record, read, batch, engine.cfg.n_layers)
    return Run(reads, None, tokens.unflatten(0, (len(plans), -1)), record.verdicts, layout.name)


def run_forks(engine: Engine, batch: Batch, plans: Sequence[Intervention], read: Sequence[Site], logits: str | None, held: Held) -> Run:
    """Each plan from the first block on that it touches, after one unedited run; one after the other."""
    layout = Layout.tile(len(batch.queries), batch.mask.shape[1], 1, batch.mask.device)
    starts = [first_block(plan, read, engine.cfg.n_layers) for plan in plans]
    trunk = engine.trunk(batch, set(starts))
    at, runs = None, []
    if logits is not None:
        rows, columns = scored(batch, logits).nonzero(as_tuple=True)
        at = rows, columns
    for plan, start in zip(plans, starts, strict=True):
        taps, record = compile_taps([plan], read, layout, batch, engine.cfg.n_layers, held)
        raw = engine.forked(trunk, start, taps, batch, at)
        found = reads_of(record, read, batch, engine.cfg.n_layers)
        runs.append((found, None if raw is None else _by_query(raw, batch, 1, logits), record.verdicts))
    reads = {site: torch.cat([found[site] for found, _, _ in runs]) for site in read}
    verdicts = {(lane, *key[1:]): opened for lane, (_, _, found) in enumerate(runs) for key, opened in found.items()}
    return Run(reads, torch.cat([found for _, found, _ in runs]) if logits else None, None, verdicts, "fork")  # type: ignore[misc]


def _by_query(raw: Float[Tensor, "state vocab"], batch: Batch, lanes: int, logits: str | None) -> Float[Tensor, "lane query ..."]:
    found = raw.unflatten(0, (lanes, len(batch.queries), -1))
    return checked(found[:, :, 0] if logits == "last" else found, batch)


def _scored_of(raw: Float[Tensor, "lane query seq vocab"], batch: Batch, logits: str | None) -> Float[Tensor, "lane query ... vocab"]:
    if logits == "answer":
        return raw[:, :, :-1]
    last = batch.select("last").long().argmax(dim=1) if batch.padded_right else torch.full((len(batch.queries),), raw.shape[2] - 1)
    return raw[:, torch.arange(len(last)), last.to(raw.device)]


def _kept(batch: Batch, logits: str | None) -> int | None:
    """For how many last columns logits are computed: 0 for all. On the left, every row ends in its last token."""
    if logits is None:
        return None
    return 0 if logits == "all" or batch.padded_right else 1 + batch.answered
