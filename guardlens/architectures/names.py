"""The names that families of transformers give to their parts: all that is particular to a family is data here.

To add a family, see CONTRIBUTING.md: most need no line here, since the names repeat.
"""

STACK = ("layers", "h", "blocks", "block")
"""The list of blocks, in the module that `get_decoder()` leads to."""

FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "embedding_norm", "norm_f")

ATTENTION = ("self_attn", "attn", "attention", "self_attention", "cross_attn", "linear_attn", "temporal_block", "conv", "mamba")

MLP = ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn", "fc2")

QUERY, KEY, VALUE = ("q_proj", "q_b_proj"), ("k_proj",), ("v_proj",)

OUT = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""The matrix that joins the heads; its input is z."""

SIDE_BY_SIDE = ("qkv_proj", "c_attn", "Wqkv", "att_proj")
"""One matrix for queries, keys and values: all queries, then all keys, then all values."""

HEAD_BY_HEAD = ("query_key_value",)
"""One matrix for queries, keys and values, head by head."""

WIRING: dict[str, tuple[str, str, str]] = {
    # A block that has this norm     adds this of its attention        has resid_mid as the            and adds this of its MLP
    "pre_feedforward_layernorm": (
        "post_attention_layernorm.output",
        "pre_feedforward_layernorm.input",
        "post_feedforward_layernorm.output",
    ),
    "post_self_attn_layernorm": ("post_self_attn_layernorm.output", "post_attention_layernorm.input", "post_mlp_layernorm.output"),
    "post_feedforward_layernorm": ("post_attention_layernorm.output", "MLP.input", "post_feedforward_layernorm.output"),
    "post_attention_layernorm": ("ATTENTION.output", "post_attention_layernorm.input", "MLP.output"),
    "self_attn_layer_norm": ("ATTENTION.output", "final_layer_norm.input", "MLP.output"),
    "ln_2": ("ATTENTION.output", "ln_2.input", "MLP.output"),
    "ffn_norm": ("ATTENTION.output", "ffn_norm.input", "MLP.output"),
    "": ("ATTENTION.output", "", "MLP.output"),
}
"""How a block joins its parts to the residual stream; the first row whose norm the block has, counts.

Rows: norms before and after each part (Gemma 2 and later), GLM-4, norms after each part only (OLMo 2), Llama and most others, OPT, GPT-2,
LFM2; and attention and MLP beside each other, which leaves no resid_mid (Phi, Cohere).
"""

PARALLEL = ("use_parallel_residual", "parallel_attn")
"""Flags of a text config that put attention and MLP beside each other."""

PROJECTOR = (
    *("multi_modal_projector", "embed_vision", "connector", "aligner", "merger", "language_projection", "modality_projection"),
    *("vision_projection", "visual_embeddings_table", "projector"),
)
"""What turns the eye's vectors into as many of the language model's width as there are image tokens."""

SOFTCAP, SCALE, DIVISOR = ("final_logit_softcapping",), ("logit_scale",), ("logits_scaling",)
"""Names in a text config of what is done to the logits after the unembedding."""

RESIDUAL_SCALE = ("residual_multiplier",)
"""Names in a text config of the number that attention and MLP are multiplied by before they are added."""

PROVEN = frozenset("llama llava qwen2_5_vl qwen2_5_vl_text gemma3 gemma3_text".split())
"""`model_type` of the configs (the whole model's and its language model's) that the tests build and prove."""
