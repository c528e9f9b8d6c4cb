"""Fixtures: tiny random models with the organism's own processor. Session-wide; tests must not change them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import beartype  # noqa: F401  (before nnsight: see guardlens.models.hooked_model)
import jaxtyping
import pytest
import torch
from hypothesis import settings

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("ci")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_bars():
    """Bars are shown in the tests of bars alone."""
    from guardlens.results.progress import progress_bars

    with progress_bars(False):
        yield


@pytest.fixture
def unchecked(monkeypatch):
    """Without the tests' type checks, as users run it: what is of the wrong type reaches the checks of guardlens."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def processor():
    from guardlens.organism.train import build_processor

    return build_processor()


def wide_llava():
    """A random LLaVA whose weights are large enough for edits to matter."""
    from guardlens.organism.train import build_model

    model = build_model(0).eval()
    _widen(model, 7)
    return model


@pytest.fixture(scope="session")
def hf_vlm():
    return wide_llava()


@pytest.fixture(scope="session")
def vlm(hf_vlm, processor):
    import guardlens as gl

    return gl.load(hf_vlm, processor=processor)


@pytest.fixture(scope="session")
def basis(vlm):
    """Random orthonormal directions of rank 2, with class means, made for `vlm`."""
    from guardlens.directions import Directions

    generator = torch.Generator().manual_seed(3)
    vectors = torch.linalg.qr(torch.randn(8, 128, 2, generator=generator)).Q.transpose(1, 2).contiguous()
    means = torch.randn(2, 8, 128, generator=generator)
    return Directions(vectors, tuple(range(8)), means[0], means[1], torch.zeros(8, 0), "test", provenance=vlm.provenance)


@pytest.fixture(scope="session")
def llm(processor):
    """A random text-only Llama of another width, with the same words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import guardlens as gl

    config = LlamaConfig(
        vocab_size=len(processor.tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        hf = LlamaForCausalLM(config).eval()
    _widen(hf, 8)
    return gl.load(hf, processor=processor.tokenizer)


def _widen(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.5 / parameter[0].numel() ** 0.5))
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(0.8 + 0.4 * torch.rand(parameter.shape, generator=generator))
