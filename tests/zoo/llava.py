"""LLaVA and what is built like it: a vision tower, a projector, a text decoder."""

from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from tests.zoo.family import Family, build, tokenizer
from tests.zoo.parts import EYE, PIXELS, USER_ASSISTANT
from tests.zoo.text import SMALL


def llava():
    config = LlavaConfig(
        text_config=LlamaConfig(**SMALL), vision_config=CLIPVisionConfig(**EYE), image_token_id=340, vision_feature_layer=-2
    )
    return build(LlavaForConditionalGeneration, config)


def llava_processor():
    eye = CLIPImageProcessorPil(**PIXELS, crop_size=PIXELS["size"])
    return LlavaProcessor(eye, tokenizer(USER_ASSISTANT, image_token="<image>"), patch_size=8, num_additional_image_tokens=1,
                          vision_feature_select_strategy="default", chat_template=USER_ASSISTANT)  # fmt: skip


FAMILIES = (
    Family("LLaVA-1.5", llava, llava_processor, "model.language_model.layers", "model.vision_tower.vision_model.encoder.layers",
           "model.multi_modal_projector"),
)  # fmt: skip
