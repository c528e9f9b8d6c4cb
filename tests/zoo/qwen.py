"""Qwen-VL and others that take images of any size and number their positions in several dimensions."""

from collections.abc import Callable
from typing import Any

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen4ExpConfig,
    Qwen4ExpForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.zoo.family import Family, assemble, build, tokenizer
from tests.zoo.parts import CHATML, TURNS
from tests.zoo.text import HELPFUL, SMALL

TEMPLATE = CHATML.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'")
THINKING = TEMPLATE.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
SPECIALS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", *TURNS)
IDS = {"vision_start_token_id": 340, "vision_end_token_id": 341, "image_token_id": 342, "video_token_id": 343}

EYE = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
EYE_3 = EYE | {"hidden_size": 24, "intermediate_size": 32, "out_hidden_size": 32, "num_position_embeddings": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2,
          "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 16}  # fmt: skip
"""One layer of three (in checkpoints one of four) has real attention, with a gate."""


def rotated(**traits: Any) -> dict[str, Any]:
    """Of four pairs of numbers that are rotated, one turns by time, one by row, two by column. Made anew, since configs write into it."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]} | traits}


def qwen2_vl():
    eye = EYE | {"embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2}
    return build(Qwen2VLForConditionalGeneration, Qwen2VLConfig(text_config=SMALL | rotated(), vision_config=eye, **IDS))


def qwen2_5_vl():
    eye = EYE | {"hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
    return build(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(text_config=SMALL | rotated(), vision_config=eye, **IDS))


def qwen3_vl(cls=Qwen3VLForConditionalGeneration, config=Qwen3VLConfig, **traits: Any):
    """With DeepStack: what the first vision block sees enters after the first decoder block."""
    text = SMALL | rotated() | {"head_dim": 8} | traits
    eye = EYE_3 | {"deepstack_visual_indexes": [0]}
    return build(cls, config(text_config=text, vision_config=eye, **IDS))


def qwen3_vl_moe():
    return qwen3_vl(Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig, **EXPERTS, mlp_only_layers=[0])


def qwen3_5():
    config = Qwen3_5Config(text_config=SMALL | LINEAR | rotated(partial_rotary_factor=0.5), vision_config=EYE_3, **IDS)
    return build(Qwen3_5ForConditionalGeneration, config)


def qwen3_5_moe():
    text = SMALL | LINEAR | rotated(partial_rotary_factor=0.5) | EXPERTS | {"shared_expert_intermediate_size": 16}
    return build(Qwen3_5MoeForConditionalGeneration, Qwen3_5MoeConfig(text_config=text, vision_config=EYE_3, **IDS))


def qwen4():
    text = SMALL | LINEAR | EXPERTS | rotated(partial_rotary_factor=0.5) | {"shared_expert_intermediate_size": 16}
    streams = {"hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
               "indexer_compress_ratio": 2}  # fmt: skip
    return build(Qwen4ExpForConditionalGeneration, Qwen4ExpConfig(text_config=text | streams, vision_config=EYE_3, **IDS))


def processor(cls: type, template: str, *specials: str, **traits: Any):
    eye = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024, **traits)
    words = tokenizer(template, *SPECIALS, *specials)
    return assemble(cls, image_processor=eye, tokenizer=words, video_processor=None, chat_template=template)


def family(name: str, model: Callable[[], Any], processor: Callable[[], Any], **traits: Any) -> Family:
    """One with Qwen2-VL's paths and a taste for images of any size."""
    return Family(name, model, processor, "model.language_model.layers", "model.visual.blocks", "model.visual.merger", ((24, 16), (32, 40)),
                  **traits)  # fmt: skip


GATED = (
    ("values as mixed", "a gate multiplies what each head has mixed"),
    ("branches", "layers with a recurrent state have no keys to continue from"),
)

FAMILIES = (
    family("Qwen2-VL", qwen2_vl, lambda: processor(Qwen2VLProcessor, HELPFUL + TEMPLATE)),
    family("Qwen2.5-VL", qwen2_5_vl, lambda: processor(Qwen2_5_VLProcessor, HELPFUL + TEMPLATE)),
    family("Qwen3-VL", qwen3_vl, lambda: processor(Qwen3VLProcessor, TEMPLATE), adds=("between",)),
    family("Qwen3-VL MoE", qwen3_vl_moe, lambda: processor(Qwen3VLProcessor, TEMPLATE), adds=("between",)),
    family("Qwen3.5", qwen3_5, lambda: processor(Qwen3VLProcessor, THINKING, "<think>"), unsupported=GATED),
    family("Qwen3.5 MoE", qwen3_5_moe, lambda: processor(Qwen3VLProcessor, THINKING, "<think>"), unsupported=GATED),
    family("Qwen4", qwen4, lambda: processor(Qwen3VLProcessor, THINKING, "<think>"), refused="keeps several residual streams"),
)
