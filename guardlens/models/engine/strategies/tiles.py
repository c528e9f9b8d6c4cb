"""Tiles: a copy of the batch for each lane, stacked along the rows. They suit every request and cost a forward pass for each lane."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from guardlens.interventions import nothing
from guardlens.models.engine import limits
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.compiler import Held, Record, Tap, compile_taps
from guardlens.models.engine.forward import Engine
from guardlens.models.engine.kv_cache import Prefill
from guardlens.models.engine.layout import Layout
from guardlens.models.engine.request import RunRequest
from guardlens.models.engine.run import Run, checked, reads_of, require_finite_step
from guardlens.models.engine.strategies.strategy import require_agreement, taken


@dataclass(frozen=True)
class Tiles:
    """Each lane runs on its own copy of the batch. A single lane is a plain run."""

    name: str = "tile"

    def unsuited(self, request: RunRequest) -> str:
        """Return an empty string: tiles run everything."""
        return ""

    def cost(self, request: RunRequest) -> float:
        """Return one forward pass for each lane."""
        return float(request.lanes)

    def lanes_per_forward(self, request: RunRequest, prefill: Prefill) -> int:
        """Return a small constant: a batch that does not fit in memory is halved, the number of its copies is not."""
        return limits.TILES_PER_FORWARD

    def self_test(self, engine: Engine, batch: Batch, prefill: Prefill | None) -> None:
        """Check that the prompts do not see the answers after them. Tiles run both as one sequence, so a model must read left to right."""
        assert prefill is not None
        request = RunRequest(engine.cfg, batch, [nothing], logits="answer")
        found = self.run(engine, request, {}).logits
        assert found is not None
        require_agreement(found[:, :, 0], prefill.logits, "logits at the prompt's last token depend on what follows")

    def run(self, engine: Engine, request: RunRequest, held: Held, prefill: Prefill | None = None) -> Run:
        """Run all lanes in one forward pass, or in one generation."""
        batch = request.batch
        queries, width = batch.mask.shape
        layout = Layout.tile(queries, width, request.lanes, batch.mask.device)
        taps, record = compile_taps(request.interventions, request.read, layout, batch, engine.cfg.n_layers, held)
        copies = replace(batch, inputs=layout.spread(batch.inputs, engine.cfg.packed))
        tokens = _generated(engine, request, copies, taps, record) if request.new_tokens else None
        raw = None if request.new_tokens else engine.forward(copies, taps, _logits_to_keep(request))
        reads = reads_of(record, request.read, batch, engine.cfg.n_layers)
        logits = None if raw is None else _scored(raw.unflatten(0, (request.lanes, -1)), request)
        return Run(reads, logits if logits is None else taken(logits, request), tokens, record.decisions, layout.name)


def _generated(engine: Engine, request: RunRequest, copies: Batch, taps: Sequence[Tap], record: Record) -> Int[Tensor, "lane query new"]:
    watch = partial(require_finite_step, record, request.batch.queries)
    tokens = engine.generate(copies, taps, request.new_tokens, request.seed, request.options, watch)
    return tokens.unflatten(0, (request.lanes, -1))


def _logits_to_keep(request: RunRequest) -> int | None:
    """For how many last columns logits are computed: 0 for all, None for none. Left padding makes every row end in its last token."""
    if request.logits is None:
        return None
    if request.logits == "all" or request.batch.padded_right:
        return 0
    return 1 + request.batch.answered


def _scored(raw: Float[Tensor, "lane query seq vocab"], request: RunRequest) -> Float[Tensor, "lane query ... vocab"]:
    """The logits that were asked for, of those that were computed."""
    batch = request.batch
    if request.logits == "all":
        return checked(raw, batch, batch.mask)
    if request.logits == "answer":
        return checked(raw[:, :, :-1], batch)
    if not batch.padded_right:
        return checked(raw[:, :, -1 - batch.answered], batch)
    last = batch.select("last").long().argmax(dim=1).to(raw.device)
    return checked(raw[:, torch.arange(len(batch.queries)), last], batch)
