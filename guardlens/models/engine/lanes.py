"""The ways to run interventions, the same numbers each. An intervention is a lane.

- *Tiles*: a copy of the batch for each intervention, below each other. Works always, and costs a run for each.
- *Branches*: a copy of the prompts' ends for each intervention, beside each other, behind what is cached of the prompts. For interventions
  that leave the beginnings of the prompts alone; costs the ends.
- *Forks*: each intervention goes on from the unedited run at the first block that it touches. For interventions that edit what can't
  branch; costs the blocks from there on.
- *Answers*: generation behind what is cached of the prompts.
"""

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guardlens.models.engine.batch import Batch, Layout
from guardlens.models.engine.compiler import Held, compile_taps
from guardlens.models.engine.forward import Engine
from guardlens.models.engine.kv_cache import Stem
from guardlens.models.engine.request import Asked, first_block, scored
from guardlens.models.engine.run import Run, checked, reads_of, require_finite_step


def run_tiles(engine: Engine, asked: Asked, held: Held) -> Run:
    """Each intervention on its own copy of the batch, below each other. One intervention is a plain run.

    Args:
        engine: The model.
        asked: What to run.
        held: What the interventions require of other presentations' runs.
    """
    batch, lanes, tokens, logits = asked.batch, len(asked.interventions), None, None
    layout = Layout.tile(len(batch.queries), batch.mask.shape[1], lanes, batch.mask.device)
    taps, record = compile_taps(asked.interventions, asked.read, layout, batch, engine.cfg.n_layers, held)
    run = replace(batch, inputs=layout.spread(batch.inputs, engine.cfg.packed))
    if asked.new_tokens:
        watch = partial(require_finite_step, record, batch.queries)
        tokens = engine.generate(run, taps, asked.new_tokens, asked.seed, asked.generation, watch).unflatten(0, (lanes, -1))
    else:
        raw = engine.forward(run, taps, _kept(batch, asked.logits))
        logits = None if raw is None else raw.unflatten(0, (lanes, -1))
    reads = reads_of(record, asked.read, batch, engine.cfg.n_layers)
    if logits is not None:
        logits = checked(logits, batch, batch.mask) if asked.logits == "all" else checked(_scored_of(logits, batch, asked.logits), batch)
    return Run(reads, logits, tokens, record.decisions, layout.name)


def run_tails(
    engine: Engine, asked: Asked, held: Held, stem: Stem, tail: Bool[Tensor, "query seq"], *, keep: bool = False
) -> tuple[Run, Stem]:
    """Each intervention on its own copy of the prompts' ends, beside each other, behind their beginnings.

    Args:
        engine: The model.
        asked: What to run.
        held: What the interventions require of other presentations' runs.
        stem: What is kept of the prompts.
        tail: Their ends.
        keep: Whether the keys and values of the ends stay with the stem, which is then handed back grown.
    """
    batch, lanes = asked.batch, len(asked.interventions)
    layout = stem.tails(tail, lanes)
    taps, record = compile_taps(asked.interventions, asked.read, layout, batch, engine.cfg.n_layers, held)
    at = None
    if asked.logits is not None:
        found = layout.find(scored(batch, asked.logits))
        at = torch.cat([places.rows for places in found]), torch.cat([places.columns for places in found])
    inputs = stem.inputs(layout, engine.config, engine.hf.dtype)
    if keep:
        raw = engine.continued(inputs, taps, batch, at)
        stem = stem.grown(layout)
    else:
        with stem.unchanged():
            raw = engine.continued(inputs, taps, batch, at)
    reads = reads_of(record, asked.read, batch, engine.cfg.n_layers)
    return Run(reads, _by_query(raw, asked, lanes), None, record.decisions, layout.name), stem


def run_answers(engine: Engine, asked: Asked, held: Held, stem: Stem) -> Run:
    """Answers under each intervention, from the prompts' last tokens on; arguments as those of `run_tails`."""
    batch, lanes = asked.batch, len(asked.interventions)
    (queries, width), device = batch.mask.shape, batch.mask.device
    layout = Layout.tile(queries, width, lanes, device, start=width - 1)
    taps, record = compile_taps(asked.interventions, asked.read, layout, batch, engine.cfg.n_layers, held)
    inputs = layout.spread({name: batch.inputs[name] for name in ("input_ids", "attention_mask")})
    rows = torch.arange(queries, device=device).repeat(lanes)
    options = {"past_key_values": stem.unpacked(rows), "position_ids": stem.positions[..., rows, :], **asked.generation}
    watch = partial(require_finite_step, record, batch.queries)
    tokens = engine.generate(replace(batch, inputs=inputs), taps, asked.new_tokens, asked.seed, options, watch)
    reads = reads_of(record, asked.read, batch, engine.cfg.n_layers)
    return Run(reads, None, tokens.unflatten(0, (lanes, -1)), record.decisions, layout.name)


def run_forks(engine: Engine, asked: Asked, held: Held) -> Run:
    """Each intervention from the first block on that it touches, after one unedited run; one after the other. Arguments as those of
    `run_tiles`.
    """
    batch, read = asked.batch, asked.read
    layout = Layout.tile(len(batch.queries), batch.mask.shape[1], 1, batch.mask.device)
    starts = [first_block(intervention, read, engine.cfg.n_layers) for intervention in asked.interventions]
    trunk = engine.trunk(batch, set(starts))
    at, runs = None, []
    if asked.logits is not None:
        rows, columns = scored(batch, asked.logits).nonzero(as_tuple=True)
        at = rows, columns
    for intervention, start in zip(asked.interventions, starts, strict=True):
        taps, record = compile_taps([intervention], read, layout, batch, engine.cfg.n_layers, held)
        raw = engine.forked(trunk, start, taps, batch, at)
        runs.append((reads_of(record, read, batch, engine.cfg.n_layers), _by_query(raw, asked, 1), record.decisions))
    reads = {site: torch.cat([found[site] for found, _, _ in runs]) for site in read}
    decisions = {(lane, *key[1:]): opened for lane, (_, _, found) in enumerate(runs) for key, opened in found.items()}
    logits = [found for _, found, _ in runs if found is not None]
    return Run(reads, torch.cat(logits) if logits else None, None, decisions, "fork")


def _by_query(raw: Float[Tensor, "state vocab"] | None, asked: Asked, lanes: int) -> Float[Tensor, "lane query ..."] | None:
    if raw is None:
        return None
    found = raw.unflatten(0, (lanes, len(asked.batch.queries), -1))
    return checked(found[:, :, 0] if asked.logits == "last" else found, asked.batch)


def _scored_of(raw: Float[Tensor, "lane query seq vocab"], batch: Batch, logits: str | None) -> Float[Tensor, "lane query ... vocab"]:
    if logits == "answer":
        return raw[:, :, :-1]
    if not batch.padded_right:
        return raw[:, :, -1 - batch.answered]
    return raw[:, torch.arange(len(batch.queries)), batch.select("last").long().argmax(dim=1).to(raw.device)]


def _kept(batch: Batch, logits: str | None) -> int | None:
    """For how many last columns logits are computed: 0 for all. On the left, every row ends in its last token."""
    if logits is None:
        return None
    return 0 if logits == "all" or batch.padded_right else 1 + batch.answered
