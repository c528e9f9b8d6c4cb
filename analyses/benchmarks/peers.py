"""TransformerLens' bridge on the same weights. It needs an environment of its own, so it is measured only where it is installed."""

import importlib
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoTokenizer

import guardlens as gl
from guardlens.models.engine.batch import Batch

NAME = "TransformerLens' bridge"
NNTERP = "nnterp 1.3.0, the newest, is no peer here: it imports `nnsight.intervention.tracing`, which nnsight 0.8 does not have."
"""Why nnterp is left out."""
COMMAND = "make peers VENV=.venv-peers && .venv-peers/bin/python -m analyses.benchmarks"


def installed() -> bool:
    return find_spec("transformer_lens") is not None


def bridge(subject: gl.HookedModel) -> Any:
    """Wrap a model, which the bridge rewrites in place: it must be of no other use. Its attention is always the eager one."""
    package = "transformer_lens.model_bridge"
    subject.hf.config.architectures = [type(subject.hf).__name__]
    sources = importlib.import_module(f"{package}.sources.transformers.helpers")
    made = importlib.import_module(package).TransformerBridge
    # It would install torchvision by itself, which only its processors need.
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(sources, "_ensure_torchvision", lambda: False):
        subject.tokenizer.save_pretrained(folder)
        words = AutoTokenizer.from_pretrained(folder)
        return made.boot_transformers("random", hf_model=subject.hf, tokenizer=words, device=subject.hf.device)


def _inputs(batch: Batch) -> dict[str, Any]:
    named = {"input" if name == "input_ids" else name: value for name, value in batch.inputs.items()}
    return {**named, "use_cache": False, "logits_to_keep": 1}


def hooks(bridge: Any, batch: Batch, vectors: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
    """A forward per layer, with a hook that adds a vector to the last token."""
    found = []
    for layer in layers:

        def push(value: Tensor, hook: Any, vector: Tensor = vectors[layer]) -> Tensor:
            value = value.clone()
            value[:, -1] += vector
            return value

        with torch.no_grad():
            found.append(bridge.run_with_hooks(**_inputs(batch), fwd_hooks=[(f"blocks.{layer}.hook_resid_post", push)])[:, -1])
    return found


def collect(bridge: Any, batch: Batch, layers: int) -> Tensor:
    """All layers at the last token, from a cache of the residual stream after every block."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(layers)]
    with torch.no_grad():
        cache = bridge.run_with_cache(**_inputs(batch), names_filter=lambda name: name in names)[1]
    return torch.stack([cache[name][:, -1] for name in names], dim=1)
