"""GLM-V: Qwen2-VL's positions, norms before and after each part."""

from typing import Any

from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm4vProcessor,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    Glm46VProcessor,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

from tests.zoo.family import assemble, build, tokenizer
from tests.zoo.qwen import EXPERTS, EYE, family, rotated
from tests.zoo.text import SMALL

TEMPLATE = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ '<|begin_of_image|><|image|><|end_of_image|>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SPECIALS = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>", "[gMASK]",
            "<sop>", "<|system|>", "<|user|>", "<|assistant|>")  # fmt: skip
IDS = {"image_start_token_id": 340, "image_end_token_id": 341, "video_start_token_id": 342, "video_end_token_id": 343,
       "image_token_id": 344, "video_token_id": 345}  # fmt: skip


def glm4v(cls=Glm4vForConditionalGeneration, config=Glm4vConfig, **traits: Any):
    eye = EYE | {"hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 32, "image_size": 32}
    text = SMALL | rotated(partial_rotary_factor=0.5) | {"head_dim": 16} | traits
    return build(cls, config(text_config=text, vision_config=eye, **IDS))


def glm46v():
    return glm4v(Glm46VForConditionalGeneration, Glm46VConfig)


def glm4v_moe():
    experts = {name: value for name, value in EXPERTS.items() if name != "num_experts"} | {"n_routed_experts": 4}
    return glm4v(Glm4vMoeForConditionalGeneration, Glm4vMoeConfig, **experts)


def glm_ocr():
    return glm4v(GlmOcrForConditionalGeneration, GlmOcrConfig)


def processor(cls=Glm4vProcessor, eye=Glm4vImageProcessorPil):
    size = {"shortest_edge": 128, "longest_edge": 2048}
    return assemble(cls, image_processor=eye(patch_size=4, merge_size=2, size=size), tokenizer=tokenizer(TEMPLATE, *SPECIALS),
                    video_processor=None, chat_template=TEMPLATE)  # fmt: skip


def processor_46v():
    return processor(Glm46VProcessor, Glm46VImageProcessorPil)


FAMILIES = (
    family("GLM-4.1V", glm4v, processor),
    family("GLM-4.5V", glm4v_moe, processor),
    family("GLM-4.6V", glm46v, processor_46v),
    family("GLM-OCR", glm_ocr, processor_46v),
)
