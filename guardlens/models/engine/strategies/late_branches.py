"""Late branches: branches that begin at the first layer that their intervention touches.

Before that layer a branch is the unedited run. So one unedited branch runs through all layers, and stands for those that have not begun:

              unedited   lane 1   lane 2   lane 0      (in the order in which they begin)
    layer 0      x          .        .        .
    layer 1      x          x        .        .        x  computed
    layer 2      x          x        x        .        .  a copy of the unedited branch
    layer 3      x          x        x        x

With edits at every layer in turn, half of the branches' work is left out.
"""

from dataclasses import dataclass, replace

import torch

from guardlens.hooks import Site
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.compiler import Held
from guardlens.models.engine.forward import Engine
from guardlens.models.engine.kv_cache import Prefill
from guardlens.models.engine.late_starts import late_starts
from guardlens.models.engine.request import RunRequest
from guardlens.models.engine.run import Run
from guardlens.models.engine.strategies.branches import Branches, continued_in
from guardlens.models.engine.strategies.selftest_edit import push
from guardlens.models.engine.strategies.strategy import by_query, require_agreement


@dataclass(frozen=True)
class LateBranches(Branches):
    """Each lane runs on its own copy of the prompts' ends, from the first layer that its intervention touches on."""

    def unsuited(self, request: RunRequest) -> str:
        """Return why branches can't run the request, or why leaving layers out saves less than the unedited branch costs."""
        if unsuited := super().unsuited(request):
            return unsuited
        if request.is_early:
            return "something before the blocks is edited or read"
        saves = sum(request.first_layers) > request.cfg.n_layers
        return "" if saves else "the layers to leave out are no more than those of the unedited branch"

    def cost(self, request: RunRequest) -> float:
        """Return the share of the prompts that the ends are, for each lane and each layer that it runs, and for the unedited branch."""
        layers_run = sum(request.cfg.n_layers - first for first in request.first_layers) + request.cfg.n_layers
        return super().cost(request) / request.lanes * layers_run / request.cfg.n_layers

    def self_test(self, engine: Engine, batch: Batch, prefill: Prefill | None) -> None:
        """Check that branches which begin at every layer in turn have the states of branches that run through all of them."""
        assert prefill is not None and prefill.cache is not None
        lengths = batch.mask.sum(1)
        cache = prefill.cache.of(torch.stack([lengths.argmin(), lengths.argmax()]).unique())
        few = replace(prefill, cache=cache)
        last = Site(layers=(engine.cfg.n_layers - 1,))
        edits = [push("last", layer) for layer in range(engine.cfg.n_layers)]
        request = RunRequest(engine.cfg, cache.batch, edits, read=[last], logits=None)
        late = self.run(engine, request, {}, few)
        whole = Branches().run(engine, request, {}, few)
        require_agreement(late.reads[last], whole.reads[last], "branches that begin at a later layer differ from whole branches")

    def run(self, engine: Engine, request: RunRequest, held: Held, prefill: Prefill | None = None) -> Run:
        """Run all lanes in one forward pass of the decoder."""
        assert prefill is not None and prefill.cache is not None
        unedited = request.lanes
        starts = {unedited: 0} | dict(enumerate(request.first_layers))
        order = sorted(starts, key=starts.__getitem__)
        layout = prefill.cache.continuations(request.ends, order)
        begins = [starts[lane] for lane in order]
        with prefill.cache.unchanged() as unchanged, late_starts(engine.blocks, layout, begins):
            run, states = continued_in(layout, engine, request, held, unchanged)
        return replace(run, logits=by_query(states, request))
