"""The names that families of transformers give to their parts: all that is particular to a family is data here.

To add a family, see docs/how-to/family.md: most need no line here, since the names repeat.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from guardlens.errors import ModelError, quoted


@dataclass(frozen=True)
class Names:
    """What a part may be called; where a module has several of the names, the first counts.

    A name may be a dotted path. The first three are looked up in the module that `get_decoder()` leads to and in those above it, `embed`
    and `unembed` from the top of the model (where transformers' own `get_input_embeddings()` and `get_output_embeddings()` fail), the
    others in a block, its attention or its MLP.

    Attributes:
        stack: The list of blocks.
        inner: The module that leads there, in one whose `get_decoder()` gives itself.
        final_norm: The norm before the unembedding.
        embed: The token embedding.
        unembed: The unembedding.
        attention: The attention, or what stands in its place.
        mlp: The MLP, or the mixture of experts.
        down: The last matrix of an MLP; its input is what the neurons give.
        query: The matrix of the queries.
        key: The matrix of the keys.
        value: The matrix of the values.
        side_by_side: One matrix for all three: all queries, then all keys, then all values.
        head_by_head: One matrix for all three, group by group: the queries that share a key and a value, then these.
        head_width: Number in an attention: the width of a query's head.
        out: The matrix that joins the heads; its input is z.
        projector: What turns the eye's vectors into as many of the language model's width as there are image tokens.
    """

    stack: tuple[str, ...] = ("layers", "h", "blocks", "block")
    inner: tuple[str, ...] = ("decoder", "model")
    final_norm: tuple[str, ...] = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "embedding_norm", "norm_f")
    embed: tuple[str, ...] = ()
    unembed: tuple[str, ...] = ()
    attention: tuple[str, ...] = (
        *("self_attn", "attn", "attention", "self_attention", "cross_attn"),
        *("linear_attn", "temporal_block", "conv", "mamba"),
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
        *("multi_modal_projector", "embed_vision", "connector", "aligner", "projector", "merger", "language_projection"),
        *("modality_projection", "vision_projection", "visual_embeddings_table", "mm_projector", "resampler_model"),
    )

    def also(self, given: Mapping[str, str]) -> "Names":
        """With a user's own names before the known ones.

        Raises:
            ModelError: There is no such part, or these are no names of parts.
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

LISTED = ("Llama4TextMoe", "OPTDecoderLayer")
"""Classes of MLPs that give the tokens of all prompts in one list, without the batch axis; and of blocks that do so from resid_mid on."""

WIRING: tuple[tuple[str, str, str, str], ...] = (
    # A block that has this      adds this of its attention        has resid_mid as the            and adds this of its MLP
    ("self_attention", "ATTENTION.dense.output", "post_attention_layernorm.input", "MLP.dense_4h_to_h.output"),
    (
        "pre_feedforward_layernorm",
        *("post_attention_layernorm.output", "pre_feedforward_layernorm.input", "post_feedforward_layernorm.output"),
    ),
    ("pre_feedforward_layernorm", "ATTENTION.output", "pre_feedforward_layernorm.input", "MLP.output"),
    ("pre_mlp_layernorm", "post_attention_layernorm.output", "pre_mlp_layernorm.input", "post_mlp_layernorm.output"),
    ("post_self_attn_layernorm", "post_self_attn_layernorm.output", "post_attention_layernorm.input", "post_mlp_layernorm.output"),
    ("post_feedforward_layernorm", "post_attention_layernorm.output", "MLP.input", "post_feedforward_layernorm.output"),
    ("post_norm1", "post_norm1.output", "post_attention_layernorm.input", "post_norm2.output"),
    ("norm_after", "input_layernorm.output", "MLP.input", "post_attention_layernorm.output"),
    ("post_operator_norm", "post_operator_norm.output", "ffn_norm.input", "post_ffn_norm.output"),
    ("post_attention_layernorm", "ATTENTION.output", "post_attention_layernorm.input", "MLP.output"),
    ("do_layer_norm_before", "ATTENTION.output", "final_layer_norm.input", "MLP.output"),
    ("ln_2", "ATTENTION.output", "ln_2.input", "MLP.output"),
    ("ffn_norm", "ATTENTION.output", "ffn_norm.input", "MLP.output"),
    ("", "ATTENTION.output", "", "MLP.output"),
)
"""How a block joins its parts to the residual stream; the first row whose norm (or other attribute) the block has, and all other modules
that the row names, counts.

Rows: BLOOM, whose attention and MLP give their sums with the stream, so that what they add is what their last matrices give; norms before
and after each part (Gemma 2 and later), VaultGemma, AFMoE, GLM-4, norms after each part only (OLMo 2), HyperCLOVA X, Molmo 2, LFM3, Llama
and most others, OPT, GPT-2, LFM2; and attention and MLP beside each other, which leaves no resid_mid (Phi, Cohere).
"""

PARALLEL = ("use_parallel_residual", "parallel_attn")
"""Flags of a text config that put attention and MLP beside each other."""

SOFTCAP, SCALE, DIVISOR = ("final_logit_softcapping",), ("logit_scale", "output_multiplier"), ("logits_scaling",)
"""Names in a text config of what is done to the logits after the unembedding."""

MULTIPLIED = frozenset({"hyperclovax"})
"""`model_type` of language models that multiply the logits by what others call, by the same name, their divisor."""

PER_IMAGE = frozenset({"lfm2_vl"})
"""`model_type` of families whose projector runs once for every image, so that it has no one output."""

GATES = {"attn_out": "cross_attn_attn_gate", "mlp_out": "cross_attn_mlp_gate"}
"""Parameters of a block whose tanh multiplies what it adds at a hook (Llama 3.2 Vision)."""

BESIDES = {"layer_scalar": "they also add an embedding of the token, and scale the whole stream"}
"""Attributes of blocks that do more than add attention and MLP -> what (Gemma 4)."""

RESIDUAL_SCALE = ("residual_multiplier",)
"""Names in a text config of the number that attention and MLP are multiplied by before they are added."""

NARROWING = ("num_kv_shared_layers",)
"""Numbers in a text config that, if not 0, make the last blocks compute only the tokens whose logits are asked for."""

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("blip-2", "instructblip", "instructblipvideo"),
        "puts the image before the padding of a batch, so that a prompt's states depend on its neighbours",
    ),
    **dict.fromkeys(
        ("gemma3n", "gemma3n_text"), "keeps several residual streams side by side (AltUp), so that a token has no single state"
    ),
    **dict.fromkeys(
        ("qwen4_exp", "qwen4_exp_text", "glm5_next", "deepseek_v4", "hy_v4"),
        "keeps several residual streams side by side (hyper-connections), so that a token has no single state",
    ),
}
"""`model_type` -> why guardlens can't mean by its words what they say."""

PACKED = dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), frozenset({"pixel_values"}))
"""`model_type` -> inputs that have the images of all prompts behind each other in their last axis, and a first axis of 1."""

PROVEN = frozenset(
    (
        "llama llava qwen2_5_vl qwen2_5_vl_text gemma3 gemma3_text "
        "qwen2_vl qwen2_vl_text qwen3_vl qwen3_vl_text qwen3_vl_moe qwen3_vl_moe_text qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text "
        "glm4v glm4v_text glm4v_moe glm4v_moe_text glm46v glm_ocr glm_ocr_text kimi_k25 deepseek_v3 ernie4_5_vl_moe ernie4_5_vl_moe_text "
        "paddleocr_vl paddleocr_vl_text video_llama_3 qwen2 exaone4_5 exaone4 minicpmv4_6 minicpmv4_7 "
        "qwen2_5_omni_thinker qwen2_5_omni_text qwen3_omni_moe_thinker qwen3_omni_moe_text molmo2 molmo2_text deepseek_v2 "
        "llava_next llava_onevision vipllava internvl mistral3 mistral aya_vision cohere2 paligemma gemma2 llama4 llama4_text "
        "mllama mllama_text_model idefics2 idefics3 smolvlm granite ovis2 deepseek_vl janus "
        "lighton_ocr qwen3 cohere2_vision fast_vlm lfm2_vl lfm2 granite4_vision granite4_vision_text "
        "granite_docling granite_docling_text qianfan_ocr aria aria_text perception_lm llava_next_video "
        "ministral3 deepseek_vl_hybrid hyperclovax_vision_v2 hyperclovax "
        "gemma4 gemma4_text phi phi3 gpt2 gpt_neox olmo olmo2 cohere opt falcon gptj bloom stablelm starcoder2"
    ).split()
)
"""`model_type` of the configs (the whole model's and its language model's) that the tests build and prove."""
