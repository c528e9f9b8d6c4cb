"""The names that families of transformers give to their parts: everything that is specific to a family is data in this module.

To add a family, see docs/how-to/family.md. Most families need a line in `PROVEN` alone, since their names repeat.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from guardlens.errors import ModelError, quoted


@dataclass(frozen=True)
class Names:
    """What a part may be called. If a module has several of the names, the first one counts.

    A name may be a dotted path. `stack`, `inner` and `final_norm` are looked up in the module that `get_decoder()` returns and in the
    modules above it; `embed` and `unembed` from the top of the model (they are needed where transformers' `get_input_embeddings()` and
    `get_output_embeddings()` fail); all others in a block, its attention or its MLP.

    Attributes:
        stack: The list of blocks.
        inner: The module that leads to the list of blocks, in a module whose `get_decoder()` returns the module itself.
        final_norm: The norm before the unembedding.
        embed: The token embedding.
        unembed: The unembedding.
        attention: The attention, or the module in its place.
        mlp: The MLP, or the mixture of experts.
        down: The last matrix of an MLP; its input holds the activations of the neurons.
        query: The query matrix.
        key: The key matrix.
        value: The value matrix.
        side_by_side: One matrix for all three: all queries, then all keys, then all values.
        head_by_head: One matrix for all three, group by group: the queries that share a key and a value, then this key and this value.
        head_width: The attribute of an attention that holds the width of a query head.
        out: The output matrix of the attention; its input is `z`.
        projector: The module that maps the vision encoder's vectors to the language model's width, one vector per image token.
    """

    stack: tuple[str, ...] = ("layers", "h", "blocks", "block")
    inner: tuple[str, ...] = ("decoder", "model")
    final_norm: tuple[str, ...] = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "embedding_norm", "norm_f")
    embed: tuple[str, ...] = ()
    unembed: tuple[str, ...] = ()
    attention: tuple[str, ...] = (
        "self_attn",
        "attn",
        "attention",
        "self_attention",
        "cross_attn",
        "linear_attn",
        "temporal_block",
        "conv",
        "mamba",
    )
    mlp: tuple[str, ...] = ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn", "fc2")
    down: tuple[str, ...] = ("down_proj",)
    query: tuple[str, ...] = ("q_proj", "q_b_proj")
    key: tuple[str, ...] = ("k_proj",)
    value: tuple[str, ...] = ("v_proj",)
    side_by_side: tuple[str, ...] = ("qkv_proj", "c_attn", "Wqkv", "att_proj")
    head_by_head: tuple[str, ...] = ("query_key_value",)
    head_width: tuple[str, ...] = ("qk_head_dim", "head_dim")
    out: tuple[str, ...] = ("o_proj", "out_proj", "dense", "c_proj", "wo")
    projector: tuple[str, ...] = (
        "multi_modal_projector",
        "embed_vision",
        "connector",
        "aligner",
        "projector",
        "merger",
        "language_projection",
        "modality_projection",
        "vision_projection",
        "visual_embeddings_table",
        "mm_projector",
        "resampler_model",
    )

    def preferring(self, given: Mapping[str, str]) -> "Names":
        """Return these names with a user's own names in front of them.

        Raises:
            ModelError: A key is not the name of a part, or a value is not a string.
        """
        known = [field.name for field in fields(self)]
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given.values()):
            raise ModelError(f"names={quoted(given)}", "one name for each part, as strings", 'write names={"stack": "core.layers"}')
        if unknown := next((part for part in given if part not in known), None):
            raise ModelError(
                f"a name for {unknown!r}", f"one of the parts {', '.join(known)}", "see guardlens.models.architectures.families.Names"
            )
        return replace(self, **{part: (name, *getattr(self, part)) for part, name in given.items()})


KNOWN = Names()
"""The names of the families that guardlens knows."""


class Wiring(NamedTuple):
    """How a kind of block joins attention and MLP to the residual stream.

    Each part is given as `path.side`: the path from the block and whether the part is that module's input or output. `ATTENTION` and `MLP`
    stand for the paths that `Names` finds.

    Attributes:
        marker: An attribute that blocks of this kind have; empty for the kind that fits any block.
        attn_out: What the attention adds to the residual stream.
        resid_mid: The residual stream between attention and MLP; empty where there is none.
        mlp_out: What the MLP adds to the residual stream.
    """

    marker: str
    attn_out: str
    resid_mid: str
    mlp_out: str


WIRING = (
    # BLOOM: attention and MLP return their sum with the stream, so what they add is the output of their last matrix.
    Wiring("self_attention", "ATTENTION.dense.output", "post_attention_layernorm.input", "MLP.dense_4h_to_h.output"),
    # Gemma 2 and later: norms before and after each part.
    Wiring(
        "pre_feedforward_layernorm",
        "post_attention_layernorm.output",
        "pre_feedforward_layernorm.input",
        "post_feedforward_layernorm.output",
    ),
    # VaultGemma.
    Wiring("pre_feedforward_layernorm", "ATTENTION.output", "pre_feedforward_layernorm.input", "MLP.output"),
    # AFMoE.
    Wiring("pre_mlp_layernorm", "post_attention_layernorm.output", "pre_mlp_layernorm.input", "post_mlp_layernorm.output"),
    # GLM-4.
    Wiring("post_self_attn_layernorm", "post_self_attn_layernorm.output", "post_attention_layernorm.input", "post_mlp_layernorm.output"),
    # OLMo 2: norms after each part only.
    Wiring("post_feedforward_layernorm", "post_attention_layernorm.output", "MLP.input", "post_feedforward_layernorm.output"),
    # HyperCLOVA X.
    Wiring("post_norm1", "post_norm1.output", "post_attention_layernorm.input", "post_norm2.output"),
    # Molmo 2.
    Wiring("norm_after", "input_layernorm.output", "MLP.input", "post_attention_layernorm.output"),
    # LFM3.
    Wiring("post_operator_norm", "post_operator_norm.output", "ffn_norm.input", "post_ffn_norm.output"),
    # Llama and most others.
    Wiring("post_attention_layernorm", "ATTENTION.output", "post_attention_layernorm.input", "MLP.output"),
    # OPT.
    Wiring("do_layer_norm_before", "ATTENTION.output", "final_layer_norm.input", "MLP.output"),
    # GPT-2.
    Wiring("ln_2", "ATTENTION.output", "ln_2.input", "MLP.output"),
    # LFM2.
    Wiring("ffn_norm", "ATTENTION.output", "ffn_norm.input", "MLP.output"),
    # Phi, Cohere: attention and MLP in parallel, which leaves no resid_mid.
    Wiring("", "ATTENTION.output", "", "MLP.output"),
)
"""The kinds of blocks. The first row counts whose marker the block has, together with all other modules that the row names."""

LISTED = ("Llama4TextMoe", "OPTDecoderLayer")
"""Classes whose tensors hold the tokens of all prompts in one list, without a batch axis: an MLP, or a block from resid_mid on."""

PARALLEL = ("use_parallel_residual", "parallel_attn")
"""Flags of a text config that put attention and MLP in parallel."""

SOFTCAP = ("final_logit_softcapping",)
"""Names in a text config for the soft cap of the logits."""

SCALE = ("logit_scale", "output_multiplier")
"""Names in a text config for the factor that multiplies the logits after the unembedding."""

DIVISOR = ("logits_scaling",)
"""Names in a text config for the number that divides the logits after the unembedding."""

MULTIPLIED = frozenset({"hyperclovax"})
"""`model_type` of language models that multiply the logits by the number that other families, under the same name, divide by."""

PER_IMAGE = frozenset({"lfm2_vl"})
"""`model_type` of families whose projector runs once per image, so that a forward pass has no single projector output."""

GATES = {"attn_out": "cross_attn_attn_gate", "mlp_out": "cross_attn_mlp_gate"}
"""Hook -> the parameter of a block whose tanh multiplies what the block adds there (Llama 3.2 Vision)."""

BESIDES = {"layer_scalar": "they also add an embedding of the token, and scale the whole stream"}
"""Attribute of blocks that do more than add attention and MLP -> what else they do (Gemma 4)."""

RESIDUAL_SCALE = ("residual_multiplier",)
"""Names in a text config for the factor that multiplies attention and MLP before they are added to the stream."""

NARROWING = ("num_kv_shared_layers",)
"""Numbers in a text config that, unless 0, make the last blocks compute only the tokens whose logits are requested."""

_ALTUP = "keeps several residual streams side by side (AltUp), so that a token has no single state"
_HYPER_CONNECTIONS = "keeps several residual streams side by side (hyper-connections), so that a token has no single state"
_IMAGE_BEFORE_PADDING = "puts the image before the padding of a batch, so that a prompt's states depend on its neighbours"

REFUSED = {
    "blip-2": _IMAGE_BEFORE_PADDING,
    "deepseek_v4": _HYPER_CONNECTIONS,
    "gemma3n": _ALTUP,
    "gemma3n_text": _ALTUP,
    "glm5_next": _HYPER_CONNECTIONS,
    "hy_v4": _HYPER_CONNECTIONS,
    "instructblip": _IMAGE_BEFORE_PADDING,
    "instructblipvideo": _IMAGE_BEFORE_PADDING,
    "qwen4_exp": _HYPER_CONNECTIONS,
    "qwen4_exp_text": _HYPER_CONNECTIONS,
}
"""`model_type` -> why hook names would be misleading for this family."""

PACKED = {
    "minicpm_ocr": frozenset({"pixel_values"}),
    "minicpmv4_6": frozenset({"pixel_values"}),
    "minicpmv4_7": frozenset({"pixel_values"}),
}
"""`model_type` -> inputs that concatenate the images of all prompts along their last axis, behind a first axis of 1."""

PROVEN = frozenset(
    (
        "aria",
        "aria_text",
        "aya_vision",
        "bloom",
        "cohere",
        "cohere2",
        "cohere2_vision",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_vl",
        "deepseek_vl_hybrid",
        "ernie4_5_vl_moe",
        "ernie4_5_vl_moe_text",
        "exaone4",
        "exaone4_5",
        "falcon",
        "fast_vlm",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gemma4",
        "gemma4_text",
        "glm46v",
        "glm4v",
        "glm4v_moe",
        "glm4v_moe_text",
        "glm4v_text",
        "glm_ocr",
        "glm_ocr_text",
        "gpt2",
        "gpt_neox",
        "gptj",
        "granite",
        "granite4_vision",
        "granite4_vision_text",
        "granite_docling",
        "granite_docling_text",
        "hyperclovax",
        "hyperclovax_vision_v2",
        "idefics2",
        "idefics3",
        "internvl",
        "janus",
        "kimi_k25",
        "lfm2",
        "lfm2_vl",
        "lighton_ocr",
        "llama",
        "llama4",
        "llama4_text",
        "llava",
        "llava_next",
        "llava_next_video",
        "llava_onevision",
        "minicpmv4_6",
        "minicpmv4_7",
        "ministral3",
        "mistral",
        "mistral3",
        "mllama",
        "mllama_text_model",
        "molmo2",
        "molmo2_text",
        "olmo",
        "olmo2",
        "opt",
        "ovis2",
        "paddleocr_vl",
        "paddleocr_vl_text",
        "paligemma",
        "perception_lm",
        "phi",
        "phi3",
        "qianfan_ocr",
        "qwen2",
        "qwen2_5_omni_text",
        "qwen2_5_omni_thinker",
        "qwen2_5_vl",
        "qwen2_5_vl_text",
        "qwen2_vl",
        "qwen2_vl_text",
        "qwen3",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_omni_moe_text",
        "qwen3_omni_moe_thinker",
        "qwen3_vl",
        "qwen3_vl_moe",
        "qwen3_vl_moe_text",
        "qwen3_vl_text",
        "smolvlm",
        "stablelm",
        "starcoder2",
        "video_llama_3",
        "vipllava",
    )
)
"""`model_type` of every config (of the whole model and of its language model) that the tests build and prove."""
