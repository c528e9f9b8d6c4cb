"""Readers of documents (Granite Docling, Qianfan-OCR), Aria, Perception LM."""

from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    AriaProcessor,
    GraniteDoclingConfig,
    GraniteDoclingForConditionalGeneration,
    GraniteDoclingProcessor,
    LlamaConfig,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PerceptionLMProcessor,
    QianfanOCRConfig,
    QianfanOCRForConditionalGeneration,
    QianfanOCRProcessor,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.granite_docling.image_processing_pil_granite_docling import GraniteDoclingImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.zoo.family import Family, assemble, build, tokenizer
from tests.zoo.idefics import SPECIALS, TILES
from tests.zoo.llava import DECODER, PROJECTOR, SIZES
from tests.zoo.others import HEADERS, ROLES
from tests.zoo.parts import CHATML, EYE, PIXELS, TURNS
from tests.zoo.text import MULTIPLIED, SMALL


def granite_docling():
    eye = EYE | {"out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0], "use_fine_route": False}
    config = GraniteDoclingConfig(text_config=SMALL | MULTIPLIED, vision_config=eye, image_token_id=341, pad_token_id=0)
    return build(GraniteDoclingForConditionalGeneration, config)


def granite_docling_processor():
    words = tokenizer(ROLES, *SPECIALS[:2], "<|start_of_role|>", "<|end_of_role|>", *TILES)
    eye = GraniteDoclingImageProcessorPil(**PIXELS, max_patches=4)
    return GraniteDoclingProcessor(eye, words, image_seq_len=4, chat_template=ROLES)


def qianfan_ocr():
    config = QianfanOCRConfig(text_config=Qwen3Config(**SMALL, head_dim=16), vision_config=EYE, image_token_id=340)
    return build(QianfanOCRForConditionalGeneration, config)


def qianfan_ocr_processor():
    template = CHATML.replace("IMAGE", "'<image>\n'")
    words = tokenizer(template, "<IMG_CONTEXT>", "<image>", *TURNS, context_image_token="<IMG_CONTEXT>", start_image_token="<img>",
                      end_image_token="</img>")  # fmt: skip
    return QianfanOCRProcessor(GotOcr2ImageProcessorPil(**PIXELS, max_patches=4), words, image_seq_length=4, chat_template=template)


def aria():
    text = SMALL | {"intermediate_size": 16, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    eye = {"model_type": "idefics3_vision", **EYE, "image_size": 980, "patch_size": 140}
    config = AriaConfig(text_config=text, vision_config=eye, image_token_id=340, projector_patch_to_query_dict={49: 4})
    return build(AriaForConditionalGeneration, config)


def aria_processor():
    template = CHATML.replace("IMAGE", "'<fim_prefix><|img|><fim_suffix>'")
    words = tokenizer(template, *TURNS, "<fim_prefix>", "<fim_suffix>", image_token="<|img|>")
    return AriaProcessor(AriaImageProcessorPil(), words, chat_template=template, size_conversion={980: 4})


class PerceptionLMImageProcessorPil(SiglipImageProcessorPil):
    """Perception LM's own needs torchvision. Like it when it takes an image for one tile, this one gives the tiles an axis."""

    def _preprocess(self, images, **kwargs):
        found = super()._preprocess(images, **kwargs)
        return found | {"pixel_values": found["pixel_values"][:, None]}


def perception_lm():
    """With SigLIP for the real vision tower, which is timm's and so needs torchvision."""
    eye = SiglipVisionConfig(**EYE, vision_use_head=False, model_args={"embed_dim": 24})
    config = PerceptionLMConfig(text_config=LlamaConfig(**SMALL), vision_config=eye, vision_use_cls_token=False, image_token_id=340,
                                video_token_id=341, projector_pooling_ratio=2)  # fmt: skip
    return build(PerceptionLMForConditionalGeneration, config)


def perception_lm_processor():
    words = tokenizer(HEADERS, "<|image|>", "<|video|>", "<|header_start|>", "<|header_end|>", "<|eot|>", image_token="<|image|>",
                      video_token="<|video|>")  # fmt: skip
    return assemble(PerceptionLMProcessor, video_processor=None, image_processor=PerceptionLMImageProcessorPil(**PIXELS), tokenizer=words,
                    patch_size=8, pooling_ratio=2, chat_template=HEADERS)  # fmt: skip


FAMILIES = (
    Family("Granite Docling", granite_docling, granite_docling_processor, "model.text_model.layers", "model.vision_model.encoder.layers",
           "model.vision_model.connector", SIZES, adds=("between",)),
    Family("Qianfan-OCR", qianfan_ocr, qianfan_ocr_processor, DECODER, "model.vision_tower.layers", PROJECTOR, SIZES),
    Family("Aria", aria, aria_processor, DECODER, "model.vision_tower.encoder.layers", PROJECTOR, SIZES),
    Family("Perception LM", perception_lm, perception_lm_processor, DECODER, "model.vision_tower.encoder.layers", PROJECTOR, SIZES),
)  # fmt: skip
