"""The ways to do one thing: guardlens', a naive nnsight loop, raw PyTorch hooks, and transformers' own outputs."""

from collections.abc import Callable, Sequence
from typing import Any

import nnsight
import torch
from torch import Tensor

import guardlens as gl
from guardlens import interventions as iv
from guardlens.data.presentations import Presentation
from guardlens.data.queries import Query
from guardlens.hooks import Site
from guardlens.interventions import Intervention
from guardlens.models.engine.batch import Batch

Call = Callable[[gl.HookedModel, Batch], Tensor]
LAST = slice(-1, None)
SCORES = (gl.scores.refusal_logodds, gl.scores.kl)


def plain(subject: gl.HookedModel, batch: Batch) -> Tensor:
    """The floor of every way: one forward of transformers, logits of the last token."""
    with torch.no_grad():
        return subject.hf(**batch.inputs, use_cache=False, logits_to_keep=1).logits[:, -1]


def plain_keeping(subject: gl.HookedModel, batch: Batch) -> Tensor:
    """The same, with keys and values kept in a cache."""
    with torch.no_grad():
        return subject.hf(**batch.inputs, use_cache=True, logits_to_keep=1).logits[:, -1]


def plain_answer(subject: gl.HookedModel, batch: Batch) -> Tensor:
    """One forward over prompts and answers, logits of the tokens that the answers' tokens follow."""
    with torch.no_grad():
        return subject.hf(**batch.inputs, use_cache=False, logits_to_keep=1 + batch.answered).logits[:, :-1]


def cells(subject: gl.HookedModel, plan: Intervention, strengths: int = 1) -> list[Intervention]:
    """One plan per layer and strength."""
    steps = [(number + 1) / strengths for number in range(strengths)]
    return [plan.placed([layer], strength) for layer in range(subject.cfg.n_layers) for strength in steps]


def raw_hooks(
    subject: gl.HookedModel, batch: Batch, vectors: Sequence[Tensor], layers: Sequence[int], where: slice = LAST, call: Call = plain
) -> list[Tensor]:
    """A forward per layer, with a hook that adds a vector to the columns `where`."""
    found = []
    for layer in layers:

        def push(module: Any, args: Any, out: Tensor, vector: Tensor = vectors[layer]) -> Tensor:
            out = out.clone()
            out[:, where] += vector
            return out

        handle = subject.hf.get_submodule(subject.cfg.blocks[layer]).register_forward_hook(push)
        try:
            found.append(call(subject, batch))
        finally:
            handle.remove()
    return found


def scored_hooks(
    subject: gl.HookedModel, batch: Batch, variants: Sequence[Sequence[Tensor]], layers: Sequence[int], base: Tensor
) -> list[list[Tensor]]:
    """A forward per variant (an edit, its placebo) and layer, whose logits are scored beside those of the unedited run."""
    found = []
    for vectors in variants:
        for layer in layers:
            (logits,) = raw_hooks(subject, batch, vectors, [layer])
            found.append([score(logits, base, subject.tokenizer) for score in SCORES])
    return found


def naive_nnsight(subject: gl.HookedModel, batch: Batch, vectors: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
    """A trace per layer."""
    found: list[Tensor] = []
    wrapped: Any = nnsight.NNsight(subject.hf)
    for layer in layers:
        with torch.no_grad(), wrapped.trace(**batch.inputs, use_cache=False, logits_to_keep=1):
            block = wrapped.get(subject.cfg.blocks[layer])
            states = block.output.clone()
            states[:, -1] += vectors[layer]
            block.output = states
            found.append(wrapped.output.logits[:, -1])
    return found


def hidden_states(subject: gl.HookedModel, batch: Batch) -> Tensor:
    """Collection by transformers' own outputs. (Its last one is behind the final norm.)"""
    with torch.no_grad():
        out = subject.hf(**batch.inputs, use_cache=False, logits_to_keep=1, output_hidden_states=True)
    return torch.stack([states[:, -1] for states in out.hidden_states[1:]], dim=1)


def raw_collect(subject: gl.HookedModel, batch: Batch) -> Tensor:
    """Collection by hooks that copy the last token."""
    kept: list[Tensor] = []
    handles = [
        subject.hf.get_submodule(path).register_forward_hook(lambda module, args, out: kept.append(out[:, -1].clone()))
        for path in subject.cfg.blocks
    ]
    try:
        plain(subject, batch)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(kept, dim=1)


def raw_pool(subject: gl.HookedModel, pool: Sequence[Query], presentation: Presentation, size: int) -> Tensor:
    """The same of many queries, `size` at a time, as they come."""
    parts = [pool[start : start + size] for start in range(0, len(pool), size)]
    return torch.cat([raw_collect(subject, subject.batch(part, presentation)) for part in parts])


def collected(subject: gl.HookedModel, batch: Batch) -> Tensor:
    return subject.run(batch, read=[Site()], logits=None).reads[Site()][0]


def guard(subject: gl.HookedModel, ssd: gl.Directions, layers: Sequence[int]) -> Intervention:
    """VLM-Guard's edit and gate."""
    return iv.replace(ssd, iv.text_twin).when(gl.gates.harmful(ssd)).at(layers=layers)


def plain_generate(subject: gl.HookedModel, batch: Batch, new_tokens: int) -> Tensor:
    """transformers' own answers, prompts included."""
    return subject.hf.generate(
        **batch.inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=subject.tokenizer.pad_token_id
    )


def hooked_generate(subject: gl.HookedModel, batch: Batch, vectors: Sequence[Tensor], layers: Sequence[int], new_tokens: int) -> Tensor:
    """The same, with hooks that add vectors to the last token of the prompts."""

    def pushed(vector: Tensor) -> Callable[..., Tensor]:
        def push(module: Any, args: Any, out: Tensor) -> Tensor:
            if out.shape[1] > 1:  # the prompts, not a decode step
                out = out.clone()
                out[:, -1] += vector
            return out

        return push

    handles = [subject.hf.get_submodule(subject.cfg.blocks[layer]).register_forward_hook(pushed(vectors[layer])) for layer in layers]
    try:
        return plain_generate(subject, batch, new_tokens)
    finally:
        for handle in handles:
            handle.remove()


def guarded_generate(subject: gl.HookedModel, batch: Batch, plan: Intervention, new_tokens: int, shared: bool = False) -> Tensor | None:
    """guardlens' answers; with what the prompts begin with alike computed once if it is `shared`."""
    prefix = subject.share(batch) if shared else None
    return subject.run(batch.after(prefix), plan, new_tokens=new_tokens, generation={"min_new_tokens": new_tokens}).tokens
