"""Branches: a copy of the prompts' ends for each lane, which continues from the KV cache of the unedited prompts.

They suit interventions that leave the beginnings of the prompts alone, and cost only the ends. The same run, with one lane and with the KV
cache of a shared prefix in place of the whole prompts, continues prompts that begin alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guardlens.hooks import Site
from guardlens.interventions import Intervention, nothing
from guardlens.models.engine import limits
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.compiler import Held, compile_taps
from guardlens.models.engine.forward import EndStates, Engine, Places
from guardlens.models.engine.kv_cache import KVCache, Prefill, Prefix
from guardlens.models.engine.layout import Layout
from guardlens.models.engine.request import RunRequest, scored_tokens
from guardlens.models.engine.run import Run, reads_of
from guardlens.models.engine.strategies.selftest_edit import push
from guardlens.models.engine.strategies.strategy import by_query, require_agreement
from guardlens.models.engine.strategies.tiles import Tiles


@dataclass(frozen=True)
class Branches:
    """Each lane runs on its own copy of the prompts' ends, side by side, after the KV cache of their beginnings."""

    name: str = "branch"

    def unsuited(self, request: RunRequest) -> str:
        """Return why not all edits and reads are in the ends of the prompts, or why the ends are too long for copies to pay."""
        if request.new_tokens:
            return "answers are generated"
        if request.beyond_decoder:
            return request.beyond_decoder
        if (request.ends & request.batch.image).any():
            return f"the positions {request.earliest!r} are edited or read"
        is_short = self.cost(request) <= request.lanes / 2
        return "" if is_short else f"from the positions {request.earliest!r} on, it is most of the prompts"

    def cost(self, request: RunRequest) -> float:
        """Return the share of the prompts that the ends are, for each lane."""
        prompt = request.batch.prompt
        return request.lanes * int((request.ends & prompt).sum()) / int(prompt.sum())

    def lanes_per_forward(self, request: RunRequest, prefill: Prefill) -> int:
        """Return how many copies of the longest ends fit in a forward pass, and in its fullest row."""
        assert prefill.cache is not None
        of_each = [RunRequest(request.cfg, request.batch, [lane], logits=request.logits).ends.sum(1) for lane in request.interventions]
        longest = max(of_each, key=lambda tokens: int(tokens.sum()))
        fullest_row = int(torch.bincount(prefill.cache.row, weights=longest.double()).max())
        by_forward = limits.BRANCH_TOKENS_PER_FORWARD // int(longest.sum())
        by_row = limits.BRANCH_TOKENS_PER_ROW // fullest_row
        return max(1, min(by_forward, by_row))

    def self_test(self, engine: Engine, batch: Batch, prefill: Prefill | None) -> None:
        """Check that an edited branch is an edited run, and that it leaves the branch beside it alone."""
        assert prefill is not None and prefill.cache is not None
        edited = _logits(engine, prefill.cache, [push("last"), nothing, push("last")])
        plain = Tiles().run(engine, RunRequest(engine.cfg, batch, [push("last")]), {}).logits
        assert plain is not None
        require_agreement(edited[::2], plain[0], "an edited branch differs from an edited run")
        require_agreement(edited[1:2], prefill.logits, "an edited branch changes the one beside it")

    def run(self, engine: Engine, request: RunRequest, held: Held, prefill: Prefill | None = None) -> Run:
        """Run all lanes in one forward pass of the decoder."""
        assert prefill is not None and prefill.cache is not None
        return continued(engine, request, held, prefill.cache, request.ends)


def continued(engine: Engine, request: RunRequest, held: Held, cache: KVCache, ends: Bool[Tensor, "query seq"]) -> Run:
    """Run the `ends` of the prompts in every lane, after what is cached of them. The KV cache stays as it is."""
    layout = cache.continuations(ends, range(request.lanes))
    with cache.unchanged() as unchanged:
        run, states = continued_in(layout, engine, request, held, unchanged)
    return replace(run, logits=by_query(states, request))


def continued_in(layout: Layout, engine: Engine, request: RunRequest, held: Held, cache: KVCache) -> tuple[Run, EndStates | None]:
    """Run continuations in a layout, which may have more lanes than the request. The KV cache grows by them, unless it is read-only.

    Returns:
        The run without its logits, and the last states that they come from.
    """
    batch = request.batch
    taps, record = compile_taps(request.interventions, request.read, layout, batch, engine.cfg.n_layers, held)
    inputs = cache.inputs(layout, engine.config, engine.hf.dtype)
    states = engine.continued(inputs, taps, batch, _places(layout, request))
    reads = reads_of(record, request.read, batch, engine.cfg.n_layers)
    of_lanes = {site: value[: request.lanes] for site, value in reads.items()}
    return Run(of_lanes, None, None, record.decisions, layout.name), states


def grown(engine: Engine, batch: Batch, prefix: Prefix) -> tuple[KVCache, Float[Tensor, "query vocab"]]:
    """The KV cache of whole prompts that begin with a prefix, and the logits at their last tokens."""
    cache = prefix.cache(batch)
    layout = cache.continuations(prefix.rest(batch), lanes=[0])
    _, states = continued_in(layout, engine, RunRequest(engine.cfg, batch, [nothing]), {}, cache)
    assert states is not None
    return cache.grown(layout), states.logits()


def check_unedited(engine: Engine, prefill: Prefill) -> None:
    """Check that branches without an edit are the plain run. A window or a chunk shows only in prompts longer than itself.

    Raises:
        Disagreement: Their logits differ by more than rounding.
    """
    assert prefill.cache is not None
    unedited = _logits(engine, prefill.cache, [nothing, nothing])
    require_agreement(unedited, prefill.logits, "branches without an edit differ from the plain run")


def check_prefix(engine: Engine, prefix: Prefix, pair: Batch) -> None:
    """Check that prompts which continue from a prefix have the states that they have on their own.

    Raises:
        Disagreement: Their states differ by more than rounding.
    """
    site = Site()
    shared = prefix.begins(pair)
    assert shared is not None
    request = RunRequest(engine.cfg, pair, [nothing], read=[site], logits=None)
    behind = continued(engine, request, {}, shared.cache(pair), shared.rest(pair))
    plain = Tiles().run(engine, request, {})
    differ = "prompts that continue from a common beginning have other states than on their own"
    require_agreement(behind.reads[site], plain.reads[site][0], differ)


def _places(layout: Layout, request: RunRequest) -> Places | None:
    """Where the scored tokens of the request's lanes are, lane by lane."""
    if request.logits is None:
        return None
    found = layout.find(scored_tokens(request.batch, request.logits))[: request.lanes]
    return torch.cat([places.rows for places in found]), torch.cat([places.columns for places in found])


def _logits(engine: Engine, cache: KVCache, lanes: Sequence[Intervention]) -> Float[Tensor, "lane query vocab"]:
    request = RunRequest(engine.cfg, cache.batch, lanes)
    logits = continued(engine, request, {}, cache, cache.batch.select("last")).logits
    assert logits is not None
    return logits
