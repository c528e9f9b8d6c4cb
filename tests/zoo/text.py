"""Text models."""

from collections.abc import Callable
from typing import Any

from transformers import (
    BloomForCausalLM,
    Cohere2ForCausalLM,
    CohereForCausalLM,
    DeepseekV2ForCausalLM,
    DeepseekV3ForCausalLM,
    FalconForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GPT2LMHeadModel,
    GPTJForCausalLM,
    GPTNeoXForCausalLM,
    GraniteForCausalLM,
    HyperCLOVAXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    OlmoForCausalLM,
    OPTForCausalLM,
    Phi3ForCausalLM,
    PhiForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    StableLmForCausalLM,
    Starcoder2ForCausalLM,
)

from tests.zoo.family import Family, build, tokenizer
from tests.zoo.parts import CHATML, TURNS

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
SMALL = {"vocab_size": 352, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
UNGROUPED = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
WINDOWS = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
ROTATED = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
MULTIPLIED = {"embedding_multiplier": 3.0, "logits_scaling": 0.5, "residual_multiplier": 0.5, "attention_multiplier": 0.25}
CAPPED = {"head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 1.0}

FOLDED = (
    "{{ bos_token }}{% set system = messages[0].content if messages[0].content is string else messages[0].content[0].text %}"
    "{% for m in messages if m.role != 'system' %}"
    "{% set prefix = system + '\n\n' if messages[0].role == 'system' and loop.first else '' %}"
)
"""Begins a template that puts the system prompt into the user's first turn."""
MISTRAL = FOLDED + "{{ '[INST] ' + prefix + m.content + '[/INST]' if m.role == 'user' else ' ' + m.content + '</s>' }}{% endfor %}"
GEMMA_TURNS = (
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + prefix }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ IMAGE if p.type == 'image' else p.text }}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA = FOLDED + GEMMA_TURNS
"""Replace IMAGE by a Jinja string."""
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
HELPFUL = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"


def turns(head: str, tail: str) -> str:
    """A template: of every message `head`, with the role for ROLE, the text and `tail`."""
    turn = head.replace("ROLE", "{{ m.role }}") + "{{ m.content }}" + tail
    answer = head.replace("ROLE", "assistant")
    return f"{{{{ bos_token }}}}{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}{answer}{{% endif %}}"


ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
COHERE = (
    turns("<|START_OF_TURN_TOKEN|><|ROLE_TOKEN|>", "<|END_OF_TURN_TOKEN|>")
    .replace("m.role", "'CHATBOT' if m.role == 'assistant' else m.role.upper()")
    .replace("assistant_TOKEN", "CHATBOT_TOKEN")
)
COHERE_SPECIALS = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")


def family(
    name: str,
    cls: Callable[..., Any],
    traits: dict[str, Any],
    template: str = TEMPLATE,
    specials: tuple[str, ...] = (),
    blocks: str = "model.layers",
    **more: Any,
) -> Family:
    return Family(name, lambda: build(cls, cls.config_class(**traits)), lambda: tokenizer(template, *specials), blocks, **more)


LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
          "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
          "moe_intermediate_size": 16}  # fmt: skip
"""DeepSeek's attention: keys and values, in large models queries too, are unfolded from short vectors."""
UNFOLDED = (("keys and values", "unfolded together, at every step anew, from the short vectors that the cache holds"),)
NO_SYSTEM = (("system prompt", "the chat template raises an error"),)
ALIBI = (("branches", "its attention counts positions from the mask, which must then have two dimensions"),)
CLIPPED = (("values as mixed", "the attention clips them after hook_v"),)


FAMILIES = (
    family("Llama", LlamaForCausalLM, SMALL),
    family("Mistral", MistralForCausalLM, SMALL | {"sliding_window": 12, "head_dim": 16}, MISTRAL, ("[INST]", "[/INST]")),
    family("Qwen2", Qwen2ForCausalLM, SMALL | {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}, HELPFUL + CHATML,
           TURNS),
    family("Qwen3", Qwen3ForCausalLM, SMALL | {"head_dim": 16}, CHATML, TURNS),
    family("Gemma 2", Gemma2ForCausalLM, SMALL | WINDOWS | CAPPED, REFUSING + GEMMA, ("<start_of_turn>", "<end_of_turn>"),
           unsupported=NO_SYSTEM),
    family("Gemma 3 (text)", Gemma3ForCausalLM, SMALL | WINDOWS | {"head_dim": 16, "query_pre_attn_scalar": 16}, GEMMA,
           ("<start_of_turn>", "<end_of_turn>")),
    family("Phi", PhiForCausalLM, UNGROUPED | ROTATED),
    family("Phi-3", Phi3ForCausalLM, SMALL | {"sliding_window": 12}, turns("<|ROLE|>\n", "<|end|>\n"), (*ROLES, "<|end|>")),
    family("GPT-2", GPT2LMHeadModel, UNGROUPED | {"n_positions": 512}, blocks="transformer.h"),
    family("GPT-NeoX", GPTNeoXForCausalLM, UNGROUPED | ROTATED, blocks="gpt_neox.layers"),
    family("OLMo", OlmoForCausalLM, SMALL | {"clip_qkv": 1.0}, turns("<|ROLE|>\n", "\n"), ROLES, unsupported=CLIPPED),
    family("OLMo 2", Olmo2ForCausalLM, SMALL, turns("<|ROLE|>\n", "\n"), ROLES),
    family("Cohere", CohereForCausalLM, SMALL | {"logit_scale": 0.5, "use_qk_norm": True}, COHERE, COHERE_SPECIALS),
    family("Cohere 2", Cohere2ForCausalLM, SMALL | WINDOWS | {"logit_scale": 0.5}, COHERE, COHERE_SPECIALS),
    family("Granite", GraniteForCausalLM, SMALL | MULTIPLIED,
           turns("<|start_of_role|>ROLE<|end_of_role|>", "</s>\n"), ("<|start_of_role|>", "<|end_of_role|>")),
    family("HyperCLOVA X", HyperCLOVAXForCausalLM, SMALL | MULTIPLIED | {"use_post_norm": False}, CHATML, TURNS),
    family("OPT", OPTForCausalLM, UNGROUPED | {"ffn_dim": 48, "max_position_embeddings": 512}, blocks="model.decoder.layers"),
    family("Falcon", FalconForCausalLM, UNGROUPED, blocks="transformer.h"),
    family("Falcon 40B", FalconForCausalLM, UNGROUPED | {"new_decoder_architecture": True, "num_kv_heads": 2}, blocks="transformer.h"),
    family("GPT-J", GPTJForCausalLM, UNGROUPED | {"n_positions": 512, "rotary_dim": 4}, blocks="transformer.h"),
    family("BLOOM", BloomForCausalLM, UNGROUPED, blocks="transformer.h", unsupported=ALIBI),
    family("StableLM", StableLmForCausalLM, SMALL | ROTATED | {"use_qkv_bias": True, "qk_layernorm": True}, turns("<|ROLE|>\n", "</s>\n"),
           ROLES),
    family("StarCoder2", Starcoder2ForCausalLM, SMALL | {"sliding_window": 12}),
    family("DeepSeek-V2 Lite", DeepseekV2ForCausalLM, SMALL | LATENT | {"q_lora_rank": None}, unsupported=UNFOLDED),
    family("DeepSeek-V3", DeepseekV3ForCausalLM, SMALL | LATENT, unsupported=UNFOLDED),
)  # fmt: skip
