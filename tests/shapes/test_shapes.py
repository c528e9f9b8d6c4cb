"""guardlens on the sizes of published models, with random weights in bfloat16: one model in memory at a time, 4 GB at most.

Widths that are no power of two, heads wider than the stream, vocabularies that float32 can't count, hundreds of image tokens, windows and
rotations as they are: what tiny models of the same classes can't show. References are plain PyTorch hooks and transformers' own generation.
"""

import contextlib
import gc
import os
import resource
import time

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.initialization import no_init_weights

import guardlens as gl
from guardlens import interventions as iv
from guardlens import presentations
from guardlens.hooks import Site
from guardlens.models.batching import prompt_bytes
from guardlens.models.checks import check
from tests.shapes.configs import SHAPES

pytestmark = pytest.mark.shapes

TEXT = "How to fold a paper boat?"


def built(shape):
    config = getattr(transformers, shape.config)(text_config=dict(shape.text), vision_config=dict(shape.vision), **shape.more)
    with no_init_weights():
        hf = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    noise = torch.randn(1_048_573, generator=torch.Generator().manual_seed(0)).bfloat16()  # a prime, so that no two rows repeat
    for module in hf.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fill(module, name, parameter.data, noise)
    hf.tie_weights()
    return hf.eval()


def fill(module, name, weight, noise):
    """Weights that let every token, image and edit matter; drawn anew for each number they would take minutes."""
    if weight.ndim > 1:
        scale = weight.shape[-1] ** -0.5 if weight.ndim == 2 else weight[0].numel() ** -0.5
        for piece in weight.view(-1).split(len(noise)):
            torch.mul(noise[: len(piece)], scale, out=piece)
    elif isinstance(module, nn.LayerNorm):
        weight.fill_(float(name == "weight"))
    elif "Norm" not in type(module).__name__:
        weight.fill_(0.7 if "gate" in name else 0.0)


def processor_of(shape):
    made = shape.processor()
    made.image_processor = type(made.image_processor)(**shape.eye)
    for name, value in shape.sets.items():
        setattr(made, name, value)
    return made


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=SHAPES, ids=[shape.name for shape in SHAPES])
def shape(request):
    return request.param


@pytest.fixture(scope="module")
def model(shape):
    start = time.monotonic()
    made = gl.load(built(shape), processor=processor_of(shape))
    yield made
    size = sum(parameter.numel() * parameter.element_size() for parameter in made.hf.parameters()) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{shape.name}: {size:.1f} GiB of weights, peak so far {peak:.1f} GiB, {time.monotonic() - start:.0f} s")
    del made
    gc.collect()


@pytest.fixture(scope="module")
def batch(model, shape):
    return model.batch(TEXT, presentations.noise(0, shape.side))


@contextlib.contextmanager
def outputs(model, shape, change=None):
    """What each decoder block gives, by plain hooks; of the first one changed, if asked for."""
    seen = {}

    def hook(layer, args, out):
        states = out[0] if isinstance(out, tuple) else out
        if change is not None and layer == 0:
            states = change(states)
        seen[layer] = states
        return (states, *out[1:]) if isinstance(out, tuple) else states

    blocks = model.hf.get_submodule(shape.blocks)
    handles = [block.register_forward_hook(lambda _, args, out, layer=layer: hook(layer, args, out)) for layer, block in enumerate(blocks)]
    try:
        with torch.no_grad():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def close(mine, expected, within):
    """Up to a share of the largest number."""
    assert float((mine.float() - expected.float()).abs().max()) <= within * float(expected.float().abs().max())


def test_sizes(model, shape, batch):
    cfg, text = model.cfg, model.hf.config.get_text_config()
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_kv_heads) == (
        text.num_hidden_layers, shape.text["hidden_size"], shape.text["num_attention_heads"], shape.text["num_key_value_heads"],
    )  # fmt: skip
    assert cfg.d_vocab == shape.text["vocab_size"]
    assert cfg.d_head == shape.text.get("head_dim", cfg.d_model // cfg.n_heads)
    assert cfg.d_mlp == shape.text["intermediate_size"]
    assert int(batch.image.sum()) == shape.tokens
    assert prompt_bytes(cfg, batch.mask.shape[1], 2) > batch.mask.shape[1] * cfg.d_model * 2


def test_the_id_sees_the_last_weight(model):
    before, weight = model.id, model.hf.get_submodule(model.cfg.unembed).weight
    kept = weight[-1, -1].item()
    try:
        with torch.no_grad():
            weight[-1, -1] = kept + 1
        assert gl.load(model.hf, processor=model.processor).id != before
    finally:
        with torch.no_grad():
            weight[-1, -1] = kept
    assert gl.load(model.hf, processor=model.processor).id == before


@pytest.fixture(scope="module")
def plain(model, shape, batch):
    """What the blocks give, and the last token's logits, by plain hooks."""
    with outputs(model, shape) as seen:
        return seen, model.hf(**batch.inputs, use_cache=False, logits_to_keep=1).logits[:, -1]


def test_reads_are_what_blocks_give(model, batch, plain):
    sites = last, mean = Site("resid_post"), Site("resid_post", positions="all")
    run = model.run(batch, read=sites)
    for layer, states in plain[0].items():
        close(run.reads[last][0, :, layer], states[:, -1], 1e-2)
        close(run.reads[mean][0, :, layer], states.float().mean(1), 2e-2)
    close(run.logits[0], plain[1], 2e-2)


def test_a_sweep_of_edits(model, shape, batch, plain):
    push = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(1))

    def change(states):
        states = states.clone()
        states[:, -1] += push.to(states.dtype)
        return states

    edits = [iv.custom(lambda states, context, by=by: states + by * push.to(states.dtype)).at(layers=0) for by in (1.0, 0.5)]
    run = model.run(batch, [iv.nothing, *edits])
    print(f"\n{shape.name}: {batch.mask.shape[1]} tokens, layout {run.layout}")
    with outputs(model, shape, change):
        expected = model.hf(**batch.inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    close(run.logits[0], plain[1], 5e-2)
    close(run.logits[1], expected, 5e-2)
    assert not torch.equal(run.logits[0], run.logits[1]) and not torch.equal(run.logits[1], run.logits[2])


def test_generation(model, batch):
    expected = model.hf.generate(**batch.inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)[:, batch.mask.shape[1] :]
    assert torch.equal(model.run(batch, new_tokens=3).tokens[0], expected)


def test_check(model, shape):
    assert [result.name for result in check(model) if result.works is False] == list(shape.lacks)
