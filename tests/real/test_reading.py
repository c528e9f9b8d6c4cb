"""What is read is what raw torch hooks and transformers' own hidden states say, in any batch."""

import copy

import pytest
import torch

import guardlens as gl
from tests import reference

LONG = "The river runs past the mill, the old bridge and the school. " * 107


def raw(hf, inputs):
    """Logits, the blocks' outputs, and transformers' hidden states of a plain forward."""
    kept = {}
    logits = reference.with_hooks(hf, inputs, keep=kept)
    with torch.no_grad():
        hidden = hf(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    return logits, torch.stack([kept[layer] for layer in sorted(kept)]), torch.stack(hidden)


@pytest.fixture(scope="module")
def truth(hf, batch):
    return raw(hf, batch.inputs)


@pytest.fixture(scope="module")
def cached(model, batch):
    return model.run_with_cache(batch)


def near(mine, expected, tolerance=1e-5):
    """Equal up to rounding, relative to the largest value."""
    torch.testing.assert_close(mine, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_logits(cached, truth):
    assert torch.equal(cached[0], truth[0])


def test_the_residual_stream_of_every_layer(cached, truth):
    mine = cached[1].stack("resid_post")
    assert torch.equal(mine, truth[1])
    assert torch.equal(mine[:-1], truth[2][1:-1])  # transformers' last one is normed
    assert torch.equal(cached[1].stack("resid_pre"), truth[2][:-1])


def test_sites_read_the_last_token(model, batch, truth):
    site = gl.Site("resid_post")
    run = model.run(batch, read=[site])
    near(run.reads[site][0].transpose(0, 1), torch.stack([reference.last(states, batch.mask) for states in truth[1]]))
    near(run.logits[0], reference.last(truth[0], batch.mask))


def test_what_attention_and_mlp_take_and_give(hf, cached, batch):
    layers = {path: module for path, module in hf.named_modules() if path.endswith(("self_attn.o_proj", "mlp.down_proj"))}
    layers = [path for path in layers if "vision" not in path]
    if not layers:
        pytest.skip("no o_proj and down_proj")
    taken = reference.inputs_of(hf, batch.inputs, layers)
    for hook, end in (("z", "o_proj"), ("post", "down_proj")):
        theirs = [value for path, value in taken.items() if path.endswith(end)]
        mine = cached[1].stack(hook)
        assert len(mine) == len(theirs)
        assert all(torch.equal(one.flatten(2), other) for one, other in zip(mine, theirs, strict=True))
    added = cached[1].stack("resid_pre") + cached[1].stack("attn_out") + cached[1].stack("mlp_out")
    near(added[:, batch.mask], cached[1].stack("resid_post")[:, batch.mask])


def test_the_logit_lens(hf, cached, truth):
    decoder = hf.get_decoder()
    with torch.no_grad():
        expected = [hf.get_output_embeddings()(decoder.norm(states[:, -1])) for states in truth[1]]
    cap = getattr(hf.config.get_text_config(), "final_logit_softcapping", None)
    expected = [cap * torch.tanh(logits / cap) for logits in expected] if cap else expected
    lens = cached[1].logit_lens()
    near(lens, torch.stack(expected))
    near(lens[-1], truth[0][:, -1])


def test_prompts_alone_padded_and_padded_on_the_other_side(model, hf, batch, shown):
    site = gl.Site("resid_post")
    together = model.run(batch, read=[site]).reads[site][0]
    right = model.batch(batch.queries, shown, padding_side="right")
    near(model.run(right, read=[site]).reads[site][0], together)
    for query, states in zip(batch.queries, together, strict=True):
        alone = model.batch(query, shown)
        assert bool(alone.mask.all())
        near(states, raw(hf, alone.inputs)[1][:, 0, -1])


def test_a_prompt_of_1500_tokens(model, hf):
    tokens, site = model.batch(LONG), gl.Site("resid_post")
    assert tokens.mask.sum() >= 1500
    kept = {}
    with torch.no_grad():
        for layer, block in enumerate(reference.blocks(hf)):
            hook = lambda m, a, out, layer=layer: kept.__setitem__(layer, (out[0] if isinstance(out, tuple) else out)[:, -1])  # noqa: E731
            kept[-1 - layer] = block.register_forward_hook(hook)
        logits = hf(**tokens.inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    for layer in range(len(reference.blocks(hf))):
        kept.pop(-1 - layer).remove()
    run = model.run(tokens, read=[site])
    near(run.logits[0], logits)
    near(run.reads[site][0, 0], torch.cat([kept[layer] for layer in sorted(kept)]))


def test_a_tokenizer_without_a_pad_token(model, hf, batch, shown):
    processor = copy.deepcopy(model.processor)
    getattr(processor, "tokenizer", processor).pad_token = None
    padless, site = gl.load(hf, processor=processor, self_check=False), gl.Site("resid_post")
    expected = model.run(batch, read=[site]).reads[site]
    near(padless.run(padless.batch(batch.queries, shown), read=[site]).reads[site], expected)
    assert padless.generate(batch.queries, shown, max_new_tokens=4) == model.generate(batch.queries, shown, max_new_tokens=4)
