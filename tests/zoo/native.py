"""Further families that take images of any size: Kimi, ERNIE, PaddleOCR-VL, HunYuan-VL, VideoLLaMA 3, EXAONE, HyperCLOVA X, MiniCPM-V."""

from types import SimpleNamespace
from typing import Any

import torch
from einops import rearrange
from transformers import (
    BatchFeature,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Ernie4_5_VLMoeProcessor,
    Exaone4_5_Config,
    Exaone4_5_ForConditionalGeneration,
    Exaone4_5_Processor,
    HunYuanVLConfig,
    HunYuanVLForConditionalGeneration,
    HunYuanVLProcessor,
    HyperCLOVAXVisionV2Config,
    HyperCLOVAXVisionV2ForConditionalGeneration,
    HyperCLOVAXVisionV2Processor,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    Kimi_K25Processor,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6Processor,
    MiniCPMV4_7Config,
    MiniCPMV4_7ForConditionalGeneration,
    MiniCPMV4_7Processor,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLProcessor,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
    VideoLlama3Processor,
)
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil
from transformers.models.hunyuan_vl.image_processing_pil_hunyuan_vl import HunYuanVLImageProcessorPil
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

from tests.zoo.family import Family, assemble, build, tokenizer
from tests.zoo.parts import CHATML, TURNS
from tests.zoo.qwen import EYE, GATED, LINEAR, family, rotated
from tests.zoo.text import LATENT, MULTIPLIED, ROLES, SMALL, UNFOLDED, WINDOWS

SIZES = ((24, 16), (32, 40))

KIMI = (
    "{% for m in messages %}{{ '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ '<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n' if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|><think>{% endif %}"
)
KIMI_SPECIALS = ("<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>", "<|kimi_k25_video_placeholder|>",
                 "<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>", "<think>")  # fmt: skip


def kimi():
    text = SMALL | LATENT | {"model_type": "deepseek_v3"}
    eye = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
           "pos_emb_height": 8, "pos_emb_width": 8}  # fmt: skip
    config = Kimi_K25Config(text_config=text, vision_config=eye, projection_hidden_size=24, tie_word_embeddings=False,
                            vision_start_token_id=340, image_token_id=342, vision_end_token_id=343, video_token_id=344)  # fmt: skip
    return build(Kimi_K25ForConditionalGeneration, config)


class PatchesInRows(Qwen2VLImageProcessorPil):
    """Stands in for Kimi's image processor, which needs torchvision: patches row by row, not flattened."""

    def preprocess(self, images: Any, **options: Any) -> BatchFeature:
        made = super().preprocess(images, **options)
        grids = made["image_grid_thw"]
        each = made["pixel_values"].split(grids.prod(-1).tolist())
        order, sizes = "(h w a b) (c p q) -> (h a w b) c p q", {"a": self.merge_size, "b": self.merge_size, "c": 3, "p": self.patch_size}
        rows = [rearrange(patches, order, h=int(h) // self.merge_size, **sizes) for patches, (_, h, _) in zip(each, grids, strict=True)]
        return BatchFeature({"pixel_values": torch.cat(rows), "image_grid_thw": grids})


def kimi_processor():
    eye = PatchesInRows(patch_size=4, temporal_patch_size=1, merge_size=2, min_pixels=64, max_pixels=1024)
    return assemble(Kimi_K25Processor, image_processor=eye, tokenizer=tokenizer(KIMI, *KIMI_SPECIALS), video_processor=None,
                    chat_template=KIMI)  # fmt: skip


ERNIE = (
    "{{ '<|begin_of_sentence|>' }}{% for m in messages %}"
    "{{ {'user': 'User: ', 'assistant': 'Assistant: '}.get(m.role, '') }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ IMAGE if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
    "{{ '<|end_of_sentence|>' if m.role == 'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
ERNIE_VL = ERNIE.replace("IMAGE", "'Picture 1:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>'")
PADDLE = ERNIE.replace("IMAGE", "'<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>'")
SENTENCE = ("<|begin_of_sentence|>", "<|end_of_sentence|>")


def ernie():
    text = SMALL | rotated() | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [16, 8], "moe_num_shared_experts": 1}
    eye = EYE | {"hidden_size": 24, "intermediate_size": 32}
    config = Ernie4_5_VLMoeConfig(text_config=text, vision_config=eye, image_start_token_id=340, image_end_token_id=341, image_token_id=342,
                                  video_start_token_id=343, video_end_token_id=344, video_token_id=345,
                                  tie_word_embeddings=False)  # fmt: skip
    return build(Ernie4_5_VLMoeForConditionalGeneration, config)


def ernie_processor():
    eye = Ernie4_5_VLMoeImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024})
    words = tokenizer(ERNIE_VL, *SENTENCE, image_start_token="<|IMAGE_START|>", image_end_token="<|IMAGE_END|>",
                      image_token="<|IMAGE_PLACEHOLDER|>", video_start_token="<|VIDEO_START|>", video_end_token="<|VIDEO_END|>",
                      video_token="<|VIDEO_PLACEHOLDER|>")  # fmt: skip
    return assemble(Ernie4_5_VLMoeProcessor, image_processor=eye, tokenizer=words, video_processor=None, chat_template=ERNIE_VL)


def paddleocr():
    eye = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": 32}
    config = PaddleOCRVLConfig(text_config=SMALL | rotated() | {"head_dim": 8}, vision_config=eye, vision_start_token_id=340,
                               vision_end_token_id=341, image_token_id=342, video_token_id=345, tie_word_embeddings=False)  # fmt: skip
    return build(PaddleOCRVLForConditionalGeneration, config)


def paddleocr_processor():
    eye = PaddleOCRVLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024})
    words = tokenizer(PADDLE, *SENTENCE, start="<|IMAGE_START|>", end="<|IMAGE_END|>", image_token="<|IMAGE_PLACEHOLDER|>")
    return PaddleOCRVLProcessor(eye, words, chat_template=PADDLE)


VIDEO = CHATML.replace("IMAGE", "'<image>\n'")


def video_llama():
    eye = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
    config = VideoLlama3Config(text_config=SMALL | {"model_type": "qwen2"}, vision_config=eye, image_token_id=340, video_token_id=341)
    return build(VideoLlama3ForConditionalGeneration, config)


def video_llama_processor():
    eye = VideoLlama3ImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024})
    words = tokenizer(VIDEO, *TURNS, image_token="<image>", video_token="<video>")
    return assemble(VideoLlama3Processor, image_processor=eye, tokenizer=words, video_processor=None, chat_template=VIDEO)


EXAONE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ '<vision><|image_pad|></vision>\n' if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
    "{{ '<|endofturn|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n<think>\n' }}{% endif %}"
)
EXAONE_SPECIALS = ("<vision>", "</vision>", "<|image_pad|>", "<|video_pad|>", *ROLES, "<|endofturn|>", "<think>")


def exaone():
    text = SMALL | WINDOWS | {"model_type": "exaone4"}
    eye = EYE | {"hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 32, "window_size": 16, "fullatt_block_indexes": [1],
                 "num_key_value_heads": 1}  # fmt: skip
    return build(Exaone4_5_ForConditionalGeneration, Exaone4_5_Config(text_config=text, vision_config=eye, image_token_id=342,
                                                                       video_token_id=343))  # fmt: skip


def exaone_processor():
    eye = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    return assemble(Exaone4_5_Processor, image_processor=eye, tokenizer=tokenizer(EXAONE, *EXAONE_SPECIALS), video_processor=None,
                    chat_template=EXAONE)  # fmt: skip


def hyperclovax():
    """Its language model is Granite's with norms after each part, and multiplies the logits by `logits_scaling`."""
    text = SMALL | MULTIPLIED | {"model_type": "hyperclovax"}
    eye = EYE | {"hidden_size": 24, "out_hidden_size": 24, "intermediate_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
    config = HyperCLOVAXVisionV2Config(text_config=text, vision_config=eye, image_token_id=342, video_token_id=343,
                                       tie_word_embeddings=False)  # fmt: skip
    return build(HyperCLOVAXVisionV2ForConditionalGeneration, config)


HYPERCLOVA = CHATML.replace("IMAGE", "'<|image_start|><|image_pad|><|image_end|>'")


def hyperclovax_processor():
    eye = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    words = tokenizer(HYPERCLOVA, "<|image_start|>", "<|image_end|>", "<|image_pad|>", "<|video_pad|>", *TURNS)
    return assemble(HyperCLOVAXVisionV2Processor, image_processor=eye, tokenizer=words, video_processor=None, chat_template=HYPERCLOVA)


HUNYUAN = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + '<hy_Assistant>' }}{% else %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ '<hy_image_start><hy_image><hy_image_end>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
    "{{ '<hy_User>' if m.role == 'user' else '<hy_sep>' }}{% endif %}{% endfor %}"
)


def hunyuan():
    """Its norms of queries and keys come after the rotation, so positions count, and without an image those of a padded prompt shift."""
    text = SMALL | rotated(mrope_section=[1, 1, 1, 1]) | {"head_dim": 8, "tie_word_embeddings": False}
    eye = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
           "out_hidden_size": 32, "max_image_size": 32, "min_image_size": 8}  # fmt: skip
    config = HunYuanVLConfig(text_config=text, vision_config=eye, im_start_id=340, image_token_id=341, im_end_id=342, im_newline_id=343,
                             tie_word_embeddings=False)  # fmt: skip
    return build(HunYuanVLForConditionalGeneration, config)


def hunyuan_processor():
    eye = HunYuanVLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024})
    words = tokenizer(HUNYUAN, "<hy_User>", "<hy_Assistant>", "<hy_sep>", image_start_token="<hy_image_start>", image_token="<hy_image>",
                      image_end_token="<hy_image_end>")  # fmt: skip
    return HunYuanVLProcessor(eye, words, chat_template=HUNYUAN)


MINICPM = CHATML.replace("IMAGE", "'<image_placeholder>\n'").replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")


def minicpm(cls=MiniCPMV4_6ForConditionalGeneration, config=MiniCPMV4_6Config, **traits: Any):
    text = SMALL | LINEAR | rotated(partial_rotary_factor=0.5) | {"model_type": "qwen3_5_text"}
    eye = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": 32}
    return build(cls, config(text_config=text, vision_config=eye, insert_layer_id=0, image_token_id=340, video_token_id=341, **traits))


def minicpm_4_7():
    newline = tokenizer(MINICPM).convert_tokens_to_ids("\u010a")
    marks = {"image_start_id": 342, "image_end_id": 343, "slice_start_id": 344, "slice_end_id": 345, "newline_id": newline}
    return minicpm(MiniCPMV4_7ForConditionalGeneration, MiniCPMV4_7Config, **marks)


def minicpm_processor(cls=MiniCPMV4_6Processor):
    """With images in slices: four of them and the whole, where the image is larger than 32 by 32 pixels."""
    eye = MiniCPMV4_6ImageProcessorPil(patch_size=4, scale_resolution=32, max_slice_nums=4)
    words = tokenizer(MINICPM, *TURNS, "<think>", image_token="<image_placeholder>", video_token="<video_placeholder>",
                      image_start_token="<image>", image_end_token="</image>", slice_start_token="<slice>", slice_end_token="</slice>",
                      image_id_start_token="<image_id>", image_id_end_token="</image_id>")  # fmt: skip
    video = SimpleNamespace(slice_mode=False, downsample_mode="16x")
    return assemble(cls, image_processor=eye, video_processor=video, tokenizer=words, chat_template=MINICPM)


FAMILIES = (
    Family("Kimi K2.5", kimi, kimi_processor, "model.language_model.layers", "model.vision_tower.layers", "model.mm_projector", SIZES,
           unsupported=UNFOLDED),
    Family("ERNIE 4.5 VL", ernie, ernie_processor, "model.language_model.layers", "model.vision_tower.blocks", "model.resampler_model",
           SIZES, unsupported=(("generation without a cache", "transformers forgets to lengthen what chooses between its experts"),)),
    Family("PaddleOCR-VL", paddleocr, paddleocr_processor, "model.language_model.layers", "model.visual.vision_model.encoder.layers",
           "model.projector", SIZES),
    Family("VideoLLaMA 3", video_llama, video_llama_processor, "model.language_model.layers", "model.vision_model.encoder.layers",
           "model.projector", SIZES),
    family("EXAONE 4.5", exaone, exaone_processor),
    Family("HyperCLOVA X Vision V2", hyperclovax, hyperclovax_processor, "model.language_model.layers", "model.vision_model.blocks",
           "model.projector", SIZES),
    Family("HunYuan-VL", hunyuan, hunyuan_processor, "model.language_model.layers", "model.vision_tower.layers",
           "model.vision_tower.patch_merger", SIZES, refused="failing at 'batches and padding'"),
    Family("MiniCPM-V 4.6", minicpm, minicpm_processor, "model.language_model.layers", "model.vision_tower.encoder.layers", "model.merger",
           SIZES, unsupported=GATED),
    Family("MiniCPM-V 4.7", minicpm_4_7, lambda: minicpm_processor(MiniCPMV4_7Processor), "model.language_model.layers",
           "model.vision_tower.encoder.layers", "model.merger", SIZES, unsupported=GATED),
)  # fmt: skip
