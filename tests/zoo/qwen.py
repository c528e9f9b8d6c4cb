"""Qwen-VL, GLM-V and others that take images of any size and number their positions in several dimensions."""

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.zoo.family import Family, assemble, build, tokenizer
from tests.zoo.parts import CHATML, TURNS
from tests.zoo.text import SMALL

TEMPLATE = CHATML.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'")
SPECIALS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", *TURNS)
IDS = {"vision_start_token_id": 340, "vision_end_token_id": 341, "image_token_id": 342, "video_token_id": 343}


def qwen2_5_vl():
    text = {**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
    eye = {"hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 32, "depth": 2, "num_heads": 2, "patch_size": 4,
           "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1]}  # fmt: skip
    return build(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(text_config=text, vision_config=eye, **IDS))


def qwen2_5_vl_processor():
    eye = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    words = tokenizer(TEMPLATE, *SPECIALS)
    return assemble(Qwen2_5_VLProcessor, image_processor=eye, tokenizer=words, video_processor=None, chat_template=TEMPLATE)


FAMILIES = (
    Family("Qwen2.5-VL", qwen2_5_vl, qwen2_5_vl_processor, "model.language_model.layers", "model.visual.blocks", "model.visual.merger",
           images=((24, 16), (32, 40))),
)  # fmt: skip
