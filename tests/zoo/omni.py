"""Qwen-Omni's thinkers, which also hear: here without ears' processor, since guardlens shows images alone."""

from typing import Any

from transformers import (
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeProcessor,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.zoo.family import Family, assemble, build, tokenizer
from tests.zoo.parts import CHATML, TURNS
from tests.zoo.qwen import EXPERTS, EYE, EYE_3, rotated
from tests.zoo.text import SMALL

TEMPLATE = CHATML.replace("IMAGE", "'<|vision_bos|><|IMAGE|><|vision_eos|>'")
MARKS = {"image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>", "vision_bos_token": "<|vision_bos|>",
         "vision_eos_token": "<|vision_eos|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}  # fmt: skip
STARTS = {"vision_start_token_id": 343, "audio_start_token_id": 345}
EAR = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 8, "output_dim": 32,
       "max_source_positions": 16}  # fmt: skip


def omni_2_5():
    eye = EYE | {"hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
    config = Qwen2_5OmniThinkerConfig(text_config=SMALL | rotated(), vision_config=eye, audio_config=EAR, image_token_index=340,
                                      audio_token_index=341, video_token_index=342, **STARTS, audio_end_token_id=346)  # fmt: skip
    return build(Qwen2_5OmniThinkerForConditionalGeneration, config)


def omni_3():
    text = SMALL | rotated() | EXPERTS | {"head_dim": 8, "decoder_sparse_step": 1}
    ear = EAR | {"downsample_hidden_size": 8}
    config = Qwen3OmniMoeThinkerConfig(text_config=text, vision_config=EYE_3 | {"deepstack_visual_indexes": [0]}, audio_config=ear,
                                       image_token_id=340, audio_token_id=341, video_token_id=342, **STARTS)  # fmt: skip
    return build(Qwen3OmniMoeThinkerForConditionalGeneration, config)


def processor(cls: type) -> Any:
    eye = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    return assemble(cls, image_processor=eye, video_processor=None, feature_extractor=None, tokenizer=tokenizer(TEMPLATE, *TURNS, **MARKS),
                    chat_template=TEMPLATE)  # fmt: skip


FAMILIES = (
    Family("Qwen2.5-Omni", omni_2_5, lambda: processor(Qwen2_5OmniProcessor), "model.language_model.layers", "model.visual.blocks",
           "model.visual.merger", ((24, 16), (32, 40))),
    Family("Qwen3-Omni", omni_3, lambda: processor(Qwen3OmniMoeProcessor), "model.language_model.layers", "model.visual.blocks",
           "model.visual.merger", ((24, 16), (32, 40)), adds=("between",)),
)  # fmt: skip
