"""Answers: generation that continues from the KV cache of the prompts, for interventions that touch only the prompts' last tokens."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.errors import InterventionError
from guardlens.interventions import nothing
from guardlens.models.engine import limits
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.compiler import Held, compile_taps
from guardlens.models.engine.forward import Engine
from guardlens.models.engine.kv_cache import Prefill
from guardlens.models.engine.layout import Layout
from guardlens.models.engine.request import RunRequest
from guardlens.models.engine.run import Run, reads_of, require_finite_step
from guardlens.models.engine.strategies.strategy import Disagreement, Strategy, require_agreement
from guardlens.models.engine.strategies.tiles import Tiles


@dataclass(frozen=True)
class Answers:
    """Each lane generates from the prompts' last tokens on, in rows of its own with a copy of the KV cache."""

    name: str = "branch"

    def unsuited(self, request: RunRequest) -> str:
        """Return why the prompts would have to run again before their answers."""
        own_cache = {"cache_implementation", "past_key_values"} & set(request.options)
        if own_cache or not request.options.get("use_cache", True):
            return "generation is asked to use another KV cache, or none"
        if request.beyond_decoder:
            return request.beyond_decoder
        return "" if set(request.positions) <= {"last"} else "more than the prompts' last tokens is edited or read"

    def cost(self, request: RunRequest) -> float:
        """Return 0: beside the new tokens, nothing of the prompts runs again."""
        return 0.0

    def lanes_per_forward(self, request: RunRequest, prefill: Prefill) -> int:
        """Return as many lanes as tiles, whose rows a generation has too."""
        return limits.TILES_PER_FORWARD

    def self_test(self, engine: Engine, batch: Batch, prefill: Prefill | None) -> None:
        """Check that the logits which the first answers are chosen by are those of whole prompts."""
        cached = _steps(engine, self, batch, prefill)
        plain = _steps(engine, Tiles(), batch, None)
        for mine, expected in zip(cached, plain, strict=False):
            require_agreement(mine[None], expected, "answers behind what is kept of the prompts differ from those of whole prompts")
            if not torch.equal(mine.argmax(-1), expected.argmax(-1)):
                break  # two tokens are equally likely up to rounding, and from here on the answers differ

    def run(self, engine: Engine, request: RunRequest, held: Held, prefill: Prefill | None = None) -> Run:
        """Generate all lanes' answers together."""
        assert prefill is not None and prefill.cache is not None
        batch, cache = request.batch, prefill.cache
        queries, width = batch.mask.shape
        layout = Layout.tile(queries, width, request.lanes, batch.mask.device, start=width - 1)
        taps, record = compile_taps(request.interventions, request.read, layout, batch, engine.cfg.n_layers, held)
        inputs = layout.spread({name: batch.inputs[name] for name in ("input_ids", "attention_mask")})
        rows = torch.arange(queries, device=batch.mask.device).repeat(request.lanes)
        options = {"past_key_values": cache.unpacked(rows), "position_ids": cache.position_ids[..., rows, :], **request.options}
        watch = partial(require_finite_step, record, batch.queries)
        tokens = engine.generate(replace(batch, inputs=inputs), taps, request.new_tokens, request.seed, options, watch)
        reads = reads_of(record, request.read, batch, engine.cfg.n_layers)
        return Run(reads, None, tokens.unflatten(0, (request.lanes, -1)), record.decisions, layout.name)


def answers_case(batch: Batch, shares_prefix: bool) -> str:
    """The case that decides how answers count positions: whether prompts continue from a prefix, and whether they are padded."""
    return f"answers{' behind a prefix' if shares_prefix else ''}{'' if bool(batch.mask.all()) else ', padded'}"


def _steps(engine: Engine, strategy: Strategy, batch: Batch, prefill: Prefill | None) -> list[Float[Tensor, "query vocab"]]:
    """The logits that the first answers are chosen by, step by step.

    Raises:
        Disagreement: The model's own `generate` shows them to no logits processor.
    """
    steps: list[Tensor] = []

    def note(ids: Tensor, scores: Tensor) -> Tensor:
        steps.append(scores.to(engine.hf.dtype))  # `generate` widens them
        return scores

    options: dict[str, Any] = {"logits_processor": [note]}
    try:
        strategy.run(engine, RunRequest(engine.cfg, batch, [nothing], new_tokens=3, options=options), {}, prefill)
    except InterventionError as error:
        raise Disagreement(f"its own generate takes no logits processor ({error.found})") from None
    if not steps:
        raise Disagreement("its own generate hands no logits to a processor, so that answers can't be compared")
    return steps
