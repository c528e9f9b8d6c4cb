"""Families of transformers that no line of guardlens names: what is found of them is right, or refused for the reason that holds."""

import warnings

import pytest
import torch
import transformers

import guardlens as gl
from guardlens import errors
from guardlens.models.architectures import find
from guardlens.models.checks import check
from tests.zoo.family import build, tokenizer
from tests.zoo.text import SMALL, TEMPLATE, UNGROUPED

MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
TEXTS = ["How to fold a paper boat?", "I want to paint the shed, and then the fence."]


def made(name, **config):
    return build(getattr(transformers, f"{name}ForCausalLM"), getattr(transformers, f"{name}Config")(**config))


def loaded(hf, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return gl.load(hf, processor=tokenizer(TEMPLATE), **options)


HYBRIDS = {
    "OlmoHybrid": {**SMALL, **MIXED, "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 4},
    "BailingHybrid": {**UNGROUPED, **MIXED, **LATENT, "num_key_value_heads": 4, "head_dim": 8, "mlp_layer_types": ["dense"] * 3,
                      "linear_head_dim": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", HYBRIDS)
def test_linear_attention_has_no_heads_that_could_be_read(name):
    """Its queries are no softmax attention's: a pattern was asked of it, and for want of one the family was refused."""
    model = loaded(made(name, **HYBRIDS[name]))
    batch = model.batch(TEXTS)
    with torch.no_grad():
        states = model.hf(**batch.inputs, use_cache=False, output_hidden_states=True)
    logits, cache = model.run_with_cache(batch)
    torch.testing.assert_close(logits, states.logits)
    for layer in range(3):
        torch.testing.assert_close(cache["resid_pre", layer], states.hidden_states[layer])
    inside = {point.layer for point in model.cfg.points if point.hook in "q k v z pattern".split()}
    assert inside == {1} and ("attn_out", 0) in cache


JOINED = {
    "VaultGemma": {**SMALL, "head_dim": 8},
    "JetMoe": {**SMALL, **EXPERTS, "kv_channels": 8, "num_key_value_heads": 2},
    "Afmoe": {**SMALL, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 1, "moe_intermediate_size": 16},
    "Lfm3": {**SMALL, "layer_types": ["conv", "full_attention", "conv"]},
}


@pytest.mark.parametrize("name", JOINED)
def test_what_blocks_add_is_their_attention_and_their_mlp(name):
    """By other norms than most, or fewer: taken for wrong, or warned of where nothing was found."""
    model = loaded(made(name, **JOINED[name]))
    batch = model.batch(TEXTS)
    _, cache = model.run_with_cache(batch)
    for layer in range(model.cfg.n_layers):
        before, mid, after = (cache[f"resid_{place}", layer] for place in ("pre", "mid", "post"))
        torch.testing.assert_close(before + cache["attn_out", layer], mid, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mid + cache["mlp_out", layer], after, atol=1e-5, rtol=1e-5)


def test_a_model_without_attention_heads():
    model = loaded(made("Mamba", vocab_size=352, hidden_size=32, num_hidden_layers=3, state_size=8, pad_token_id=0, eos_token_id=2))
    batch = model.batch(TEXTS)
    given = []
    handle = model.hf.backbone.layers[1].register_forward_hook(lambda module, args, out: given.append(out))
    with torch.no_grad():
        expected = model.hf(**batch.inputs, use_cache=False).logits
    handle.remove()
    logits, cache = model.run_with_cache(batch)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(cache["resid_post", 1], given[0])
    assert (model.cfg.n_heads, model.cfg.d_head) == (0, 0)
    found = {result.name: result for result in check(model)}
    assert found["attention heads"].works is None and found["residual stream adds up"].works is None
    assert [what for what, finding in found.items() if finding.works is False] == []


def test_matrices_that_are_made_of_several_are_no_matrix():
    config = transformers.MoshiConfig(
        **SMALL, head_dim=8, ffn_dim=48, num_codebooks=2, audio_vocab_size=16, depth_decoder_config={"num_codebooks": 2, "ffn_dim": 48}
    )
    model = loaded(build(transformers.MoshiForCausalLM, config))
    hooks = {point.hook for point in model.cfg.points}
    assert "attn_out" in hooks and not {"q", "k", "v", "z", "pattern"} & hooks


def test_lists_of_attentions_are_no_attention():
    """LongCat's blocks have two of each part, so that neither is what the block adds."""
    config = {**UNGROUPED, **LATENT, "num_key_value_heads": 4, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16}
    config |= {"n_routed_experts": 4, "moe_topk": 2, "zero_expert_num": 1, "num_layers": 2, "head_dim": 8}
    config.pop("num_hidden_layers"), config.pop("intermediate_size")
    model = loaded(made("LongcatFlash", **config))
    assert not {"attn_out", "resid_mid", "z"} & {point.hook for point in model.cfg.points}


def test_a_norm_that_runs_twice_is_the_reason():
    with pytest.raises(errors.ModelError, match=r"failing at 'logits reproduced': model\.norm runs 2 times in a forward"):
        loaded(made("NanoChat", **SMALL))


def test_a_size_that_a_config_lacks():
    from types import SimpleNamespace

    from guardlens.models.architectures.discovery import _number

    with pytest.raises(errors.ModelError, match="SimpleNamespace without hidden_size"):
        _number(SimpleNamespace(), "hidden_size")
    assert _number(SimpleNamespace(), "num_attention_heads", 0) == 0


FUYU = transformers.FuyuConfig(**SMALL, image_size=32, patch_size=8, text_config={"model_type": "persimmon", **UNGROUPED})
FUYU.image_token_id = 340
VQ = {"codebook_size": 16, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1}
EMU3 = transformers.Emu3Config(
    vq_config={**VQ, "attn_resolutions": [], "hidden_size": 32, "num_attention_heads": 1},
    text_config=SMALL,
    vocabulary_map={"<image>": 340} | {f"<|visual token {i:06d}|>": 300 + i for i in range(16)},
)


@pytest.mark.parametrize(("name", "config"), [("FuyuForCausalLM", FUYU), ("Emu3ForConditionalGeneration", EMU3)])
def test_a_language_model_that_sees_by_itself_has_no_eye(name, config):
    """transformers gives the whole model for its encoder; its longest list of blocks is the language model's."""
    model = build(getattr(transformers, name), config)
    assert model.get_encoder(modality="image") is model
    cfg = find(model)
    assert cfg.image_token_id == 340 and cfg.n_layers == 3
    assert not [point.name for point in cfg.points if "vision" in point.name]


def test_a_multiplier_under_a_soft_cap():
    text = {**SMALL, "output_multiplier": 0.25, "final_logit_softcapping": 3.0}
    with torch.device("meta"):
        model = transformers.MuseGlimmerForConditionalGeneration(transformers.MuseGlimmerConfig(text_config=text))
    cfg = find(model)
    assert (cfg.logit_scale, cfg.softcap) == (0.25, 3.0)
