"""Forks: each lane continues the unedited run at the first layer that its intervention touches.

They suit interventions that branches can't run, such as edits of all tokens, and cost the layers from there on.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from guardlens.models.engine.batch import Batch
from guardlens.models.engine.compiler import Held, compile_taps
from guardlens.models.engine.forward import Engine, Places
from guardlens.models.engine.kv_cache import Prefill
from guardlens.models.engine.layout import Layout
from guardlens.models.engine.request import RunRequest, scored_tokens
from guardlens.models.engine.run import Run, reads_of
from guardlens.models.engine.strategies.selftest_edit import push
from guardlens.models.engine.strategies.strategy import by_query, require_agreement
from guardlens.models.engine.strategies.tiles import Tiles
from guardlens.models.engine.unedited_run import UneditedRun


@dataclass(frozen=True)
class Forks:
    """After one unedited run, each lane runs from its first layer on, one lane after the other."""

    name: str = "fork"

    def unsuited(self, request: RunRequest) -> str:
        """Return why not all edits and reads are in the layers of the decoder, or after them."""
        if request.new_tokens:
            return "answers are generated"
        if request.beyond_decoder:
            return request.beyond_decoder
        return "something before the blocks is edited or read" if request.is_early else ""

    def cost(self, request: RunRequest) -> float:
        """Return the unedited run, and for each lane the share of the layers that it runs."""
        n_layers = request.cfg.n_layers
        layers_run = request.lanes * n_layers - sum(request.first_layers)
        return 1 + layers_run / n_layers

    def lanes_per_forward(self, request: RunRequest, prefill: Prefill) -> int:
        """Return all of them: lanes run one after the other."""
        return request.lanes

    def self_test(self, engine: Engine, batch: Batch, prefill: Prefill | None) -> None:
        """Check that runs which begin at a later layer are whole runs."""
        layers = engine.cfg.n_layers
        request = RunRequest(engine.cfg, batch, [push("all", layers // 2), push("all", layers - 1)])
        forked = self.run(engine, request, {}).logits
        plain = Tiles().run(engine, request, {}).logits
        assert plain is not None
        require_agreement(forked, plain, "a run that begins at a later block differs from a whole run")

    def run(self, engine: Engine, request: RunRequest, held: Held, prefill: Prefill | None = None) -> Run:
        """Run the batch unedited, then each lane from its first layer on."""
        unedited = engine.unedited(request.batch, set(request.first_layers))
        each = [
            replace(request, interventions=[intervention], first_lane=request.first_lane + lane)
            for lane, intervention in enumerate(request.interventions)
        ]
        return _joined([_forked(engine, alone, held, unedited) for alone in each], request)


def _forked(engine: Engine, request: RunRequest, held: Held, unedited: UneditedRun) -> Run:
    batch, first = request.batch, request.first_layers[0]
    layout = Layout.plain(batch.mask)
    taps, record = compile_taps(request.interventions, request.read, layout, batch, engine.cfg.n_layers, held)
    ends = engine.forked(unedited, first, taps, batch, _places(request))
    reads = reads_of(record, request.read, batch, engine.cfg.n_layers)
    return Run(reads, by_query(ends, request), None, record.decisions, "fork")


def _places(request: RunRequest) -> Places | None:
    if request.logits is None:
        return None
    rows, columns = scored_tokens(request.batch, request.logits).nonzero(as_tuple=True)
    return rows, columns


def _joined(runs: list[Run], request: RunRequest) -> Run:
    """Runs of one lane each as one run of several lanes."""
    reads = {site: torch.cat([run.reads[site] for run in runs]) for site in request.read}
    logits: list[Tensor] = [run.logits for run in runs if run.logits is not None]
    decisions = {(lane, step, layer): opened for lane, run in enumerate(runs) for (_, step, layer), opened in run.decisions.items()}
    return Run(reads, torch.cat(logits) if logits else None, None, decisions, "fork")
