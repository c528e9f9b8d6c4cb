"""LLaVA and what is built like it: a vision tower, a projector, a text decoder."""

import sys

from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Cohere2Config,
    GraniteConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    Ministral3Config,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.utils import is_torchvision_available

from tests.zoo.family import Family, assemble, build, tokenizer
from tests.zoo.parts import CHATML, CONTENT, EYE, PIXELS, TURNS, USER_ASSISTANT
from tests.zoo.text import COHERE, COHERE_SPECIALS, MULTIPLIED, SMALL, WINDOWS

if not is_torchvision_available():  # of which the processor's module needs one function, the same in both modules
    sys.modules["transformers.models.pixtral.image_processing_pixtral"] = image_processing_pil_pixtral
from transformers.models.pixtral.processing_pixtral import PixtralProcessor

TILES = [[32, 64], [64, 32], [64, 64]]
INST = (
    "{% for m in messages %}{{ {'system': '<<SYS>>\n', 'user': '[INST] ', 'assistant': ' '}[m.role] }}"
    + CONTENT.replace("IMAGE", "'<image>\n'")
    + "{{ {'system': '\n<</SYS>>\n\n', 'user': ' [/INST]', 'assistant': '</s>'}[m.role] }}{% endfor %}"
)
HUMAN = (
    "{% for m in messages %}{{ {'system': '', 'user': '###Human: ', 'assistant': '###Assistant: '}[m.role] }}"
    + CONTENT.replace("IMAGE", "'<image>\n'")
    + "{% endfor %}{% if add_generation_prompt %}{{ '###Assistant:' }}{% endif %}"
)
BARS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    + CONTENT.replace("IMAGE", "'<image>\n'")
    + "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{{ {'system': '[SYSTEM_PROMPT]', 'user': '[INST]', 'assistant': ''}[m.role] }}"
    + CONTENT.replace("IMAGE", "'[IMG]'")
    + "{{ {'system': '[/SYSTEM_PROMPT]', 'user': '[/INST]', 'assistant': '</s>'}[m.role] }}{% endfor %}"
)
AYA = COHERE.replace("{{ m.content }}", CONTENT.replace("IMAGE", "'<image>'"))
AYA_SPECIALS = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<image>", "TILE_1", "TILE_2", "TILE_GLOBAL")
PIXTRAL = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}


def llava():
    config = LlavaConfig(
        text_config=LlamaConfig(**SMALL), vision_config=CLIPVisionConfig(**EYE), image_token_id=340, vision_feature_layer=-2
    )
    return build(LlavaForConditionalGeneration, config)


def llava_processor(template: str = USER_ASSISTANT):
    eye = CLIPImageProcessorPil(**PIXELS, crop_size=PIXELS["size"])
    return LlavaProcessor(eye, tokenizer(template, image_token="<image>"), patch_size=8, num_additional_image_tokens=1,
                          vision_feature_select_strategy="default", chat_template=template)  # fmt: skip


def vipllava():
    config = VipLlavaConfig(
        text_config=LlamaConfig(**SMALL), vision_config=CLIPVisionConfig(**EYE), image_token_id=340, vision_feature_layer=(-2, -1, 0)
    )
    return build(VipLlavaForConditionalGeneration, config)


def llava_next(text):
    config = LlavaNextConfig(text_config=text, vision_config=CLIPVisionConfig(**EYE), image_token_id=340, image_grid_pinpoints=TILES)
    return build(LlavaNextForConditionalGeneration, config)


def llava_next_processor(template: str = INST):
    eye = LlavaNextImageProcessorPil(**PIXELS | {"size": {"shortest_edge": 32}}, crop_size=PIXELS["size"], image_grid_pinpoints=TILES)
    return LlavaNextProcessor(eye, tokenizer(template, image_token="<image>"), patch_size=8, num_additional_image_tokens=1,
                              vision_feature_select_strategy="default", chat_template=template)  # fmt: skip


def llava_next_video():
    config = LlavaNextVideoConfig(text_config=LlamaConfig(**SMALL), vision_config=CLIPVisionConfig(**EYE), image_token_id=340,
                                  video_token_id=341, image_grid_pinpoints=TILES)  # fmt: skip
    return build(LlavaNextVideoForConditionalGeneration, config)


def llava_next_video_processor():
    parts = llava_next_processor(USER_ASSISTANT)
    words = tokenizer(USER_ASSISTANT, "<image>", "<video>")
    return assemble(LlavaNextVideoProcessor, video_processor=None, image_processor=parts.image_processor, tokenizer=words, patch_size=8,
                    num_additional_image_tokens=1, vision_feature_select_strategy="default", chat_template=USER_ASSISTANT)  # fmt: skip


def llava_onevision():
    config = LlavaOnevisionConfig(text_config=Qwen2Config(**SMALL), vision_config=SiglipVisionConfig(**EYE, vision_use_head=False),
                                  image_token_id=340, video_token_id=341, image_grid_pinpoints=TILES)  # fmt: skip
    return build(LlavaOnevisionForConditionalGeneration, config)


def llava_onevision_processor():
    template = CHATML.replace("IMAGE", "'<image>\n'")
    eye = LlavaOnevisionImageProcessorPil(**PIXELS, image_grid_pinpoints=TILES)
    return assemble(LlavaOnevisionProcessor, image_processor=eye, tokenizer=tokenizer(template, "<image>", "<video>", *TURNS),
                    video_processor=None, num_image_tokens=16, vision_feature_select_strategy="full", chat_template=template)  # fmt: skip


def internvl():
    config = InternVLConfig(text_config=Qwen2Config(**SMALL), vision_config=InternVLVisionConfig(**EYE), image_token_id=340)
    return build(InternVLForConditionalGeneration, config)


def internvl_processor():
    template = CHATML.replace("IMAGE", "'<IMG_CONTEXT>\n'")
    words = tokenizer(template, *TURNS, context_image_token="<IMG_CONTEXT>", start_image_token="<img>", end_image_token="</img>",
                      video_token="<video>")  # fmt: skip
    return assemble(InternVLProcessor, image_processor=GotOcr2ImageProcessorPil(**PIXELS, max_patches=4), tokenizer=words,
                    video_processor=None, image_seq_length=4, chat_template=template)  # fmt: skip


def mistral3(text):
    eye = PixtralVisionConfig(**PIXTRAL | {"patch_size": 4})
    return build(Mistral3ForConditionalGeneration, Mistral3Config(text_config=text, vision_config=eye, image_token_id=340))


def pixtral():
    config = LlavaConfig(text_config=MistralConfig(**SMALL, sliding_window=None), vision_config=PixtralVisionConfig(**PIXTRAL),
                         image_token_id=340, vision_feature_layer=-1, vision_feature_select_strategy="full")  # fmt: skip
    return build(LlavaForConditionalGeneration, config, seed=1)


def pixtral_processor(**sizes: int):
    eye = image_processing_pil_pixtral.PixtralImageProcessorPil(size={"longest_edge": 64})
    words = tokenizer(BRACKETS, "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    return assemble(PixtralProcessor, image_processor=eye, tokenizer=words, **sizes, chat_template=BRACKETS)


def aya_vision():
    config = AyaVisionConfig(text_config=Cohere2Config(**SMALL, **WINDOWS, logit_scale=0.5), vision_config=SiglipVisionConfig(**EYE),
                             image_token_id=342)  # fmt: skip
    return build(AyaVisionForConditionalGeneration, config)


def aya_vision_processor():
    eye = GotOcr2ImageProcessorPil(**PIXELS, max_patches=2)
    return AyaVisionProcessor(eye, tokenizer(AYA, *AYA_SPECIALS, *COHERE_SPECIALS), patch_size=8, img_size=32, downsample_factor=2,
                              chat_template=AYA)  # fmt: skip


DECODER, CLIP, PROJECTOR = "model.language_model.layers", "model.vision_tower.encoder.layers", "model.multi_modal_projector"
ROPED = "model.vision_tower.transformer.layers"
SIZES = ((40, 20), (32, 32))

FAMILIES = (
    Family("LLaVA-1.5", llava, llava_processor, DECODER, CLIP, PROJECTOR),
    Family("LLaVA-NeXT", lambda: llava_next(MistralConfig(**SMALL, sliding_window=None)), llava_next_processor, DECODER, CLIP, PROJECTOR,
           SIZES),
    Family("LLaVA-NeXT-Video", llava_next_video, llava_next_video_processor, DECODER, CLIP, PROJECTOR, SIZES),
    Family("Granite Vision", lambda: llava_next(GraniteConfig(**SMALL, **MULTIPLIED)), lambda: llava_next_processor(BARS), DECODER, CLIP,
           PROJECTOR, SIZES),
    Family("LLaVA-OneVision", llava_onevision, llava_onevision_processor, DECODER, CLIP, PROJECTOR, SIZES),
    Family("VipLLaVA", vipllava, lambda: llava_processor(HUMAN), DECODER, CLIP, PROJECTOR),
    Family("InternVL", internvl, internvl_processor, DECODER, "model.vision_tower.encoder.layer", PROJECTOR, SIZES),
    Family("Mistral 3", lambda: mistral3(MistralConfig(**SMALL, head_dim=16, sliding_window=None)),
           lambda: pixtral_processor(patch_size=4, spatial_merge_size=2), DECODER, ROPED, PROJECTOR, SIZES),
    Family("Ministral 3", lambda: mistral3(Ministral3Config(**SMALL, head_dim=16)),
           lambda: pixtral_processor(patch_size=4, spatial_merge_size=2), DECODER, ROPED, PROJECTOR, SIZES),
    Family("Pixtral", pixtral, lambda: pixtral_processor(patch_size=8), DECODER, ROPED, PROJECTOR, SIZES),
    Family("Aya Vision", aya_vision, aya_vision_processor, DECODER, CLIP, PROJECTOR, SIZES),
)  # fmt: skip
