"""Llama 4, Mllama, and further families with an eye, a projector and a decoder of their own."""

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Cohere2Config,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Cohere2VisionProcessor,
    ConvNextConfig,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    DeepseekVLHybridProcessor,
    DeepseekVLProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    Granite4VisionProcessor,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    Lfm2Config,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm2VlProcessor,
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LightOnOcrProcessor,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4Processor,
    LlamaConfig,
    LlavaProcessor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2Processor,
    PixtralVisionConfig,
    Qwen2Config,
    Qwen3Config,
    SamVisionConfig,
    SiglipVisionConfig,
)
from transformers.image_utils import SizeDict
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import DeepseekVLHybridImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil, get_optimal_tiled_canvas
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil, get_image_size_for_max_num_patches

from tests.zoo.family import Family, assemble, build, tokenizer
from tests.zoo.llava import DECODER, PIXTRAL, PROJECTOR, SIZES, TILES
from tests.zoo.parts import CHATML, CONTENT, EYE, PIXELS, TURNS
from tests.zoo.text import COHERE, COHERE_SPECIALS, MULTIPLIED, SMALL, WINDOWS

HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|header_start|>' + m.role + '<|header_end|>\n\n' }}"
    + CONTENT.replace("IMAGE", "'<|image|>'")
    + "{{ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\n\n' }}{% endif %}"
)
COLONS = (
    "{% for m in messages %}{{ m.role.capitalize() + ': ' }}"
    + CONTENT.replace("IMAGE", "'<image_placeholder>'")
    + "{{ '\n\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
ROLES = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' }}"
    + CONTENT.replace("IMAGE", "'<image>'")
    + "{{ '</s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
LLAMA_4 = ("<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>",
           "<|header_start|>", "<|header_end|>", "<|eot|>")  # fmt: skip


class Llama4ImageProcessorPil(GotOcr2ImageProcessorPil):
    """Llama 4's own needs torchvision. Like it, this one cuts tiles row by row, then adds the whole image, and says how many there are."""

    crop_to_patches = True

    def _preprocess(self, images, *args, size, min_patches, max_patches, **kwargs):
        found = super()._preprocess(images, *args, size=size, min_patches=min_patches, max_patches=max_patches, **kwargs)
        grids = [get_optimal_tiled_canvas(image.shape[1:], (size.height, size.width), min_patches, max_patches) for image in images]
        found["aspect_ratios"] = torch.tensor([(rows, columns) for columns, rows in grids])
        del found["num_patches"]
        return found


def llama4():
    text = SMALL | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "moe_layers": [1, 2], "attention_chunk_size": 12,
                    "no_rope_layers": [1, 0, 1]}  # fmt: skip
    eye = EYE | {"projector_input_dim": 24, "projector_output_dim": 24, "vision_output_dim": 24, "intermediate_size": 96}
    config = Llama4Config(text_config=text, vision_config=eye, boi_token_index=341, eoi_token_index=342, image_token_index=343)
    return build(Llama4ForConditionalGeneration, config)


def llama4_processor():
    eye = Llama4ImageProcessorPil(**PIXELS, max_patches=4)
    words = tokenizer(HEADERS, *LLAMA_4)
    return assemble(Llama4Processor, image_processor=eye, tokenizer=words, patch_size=8, chat_template=HEADERS)


def mllama():
    text = SMALL | {"cross_attention_layers": [1], "num_hidden_layers": 3}
    eye = EYE | {"num_global_layers": 1, "vision_output_dim": 72, "intermediate_layers_indices": [0, 1], "max_num_tiles": 4}
    eye["attention_heads"] = eye.pop("num_attention_heads")
    model = build(MllamaForConditionalGeneration, MllamaConfig(text_config=text, vision_config=eye, image_token_index=340))
    for name, parameter in model.named_parameters():
        if "gate" in name and parameter.ndim == 1:
            parameter.data.fill_(0.7)
    return model


def mllama_processor():
    template = HEADERS.replace("header_start", "start_header_id").replace("header_end", "end_header_id").replace("<|eot|>", "<|eot_id|>")
    words = tokenizer(template, "<|image|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return MllamaProcessor(MllamaImageProcessorPil(**PIXELS), words, chat_template=template)


def ovis2():
    eye = EYE | {"vocab_size": 64, "num_visual_indicator_tokens": 5, "hidden_stride": 2}
    config = Ovis2Config(text_config=Qwen2Config(**SMALL), vision_config=eye, image_token_id=341, hidden_size=32, vocab_size=352,
                         visual_indicator_token_ids=[342, 343, 344, 345, 346])  # fmt: skip
    return build(Ovis2ForConditionalGeneration, config)


def ovis2_processor():
    template = CHATML.replace("IMAGE", "'<image>\n'")
    words = tokenizer(template, "<image>", "<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>", *TURNS)
    eye = Ovis2ImageProcessorPil(**PIXELS, crop_to_patches=True, max_patches=4)
    return Ovis2Processor(eye, words, image_seq_length=4, chat_template=template)


def deepseek_vl():
    config = DeepseekVLConfig(text_config=LlamaConfig(**SMALL), vision_config=SiglipVisionConfig(**EYE), image_token_id=340)
    return build(DeepseekVLForConditionalGeneration, config)


def deepseek_vl_processor():
    words = tokenizer(COLONS, image_token="<image_placeholder>")
    return DeepseekVLProcessor(DeepseekVLImageProcessorPil(**PIXELS), words, chat_template=COLONS, num_image_tokens=16)


def deepseek_vl_hybrid():
    eye = {"hidden_size": 24, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 4,
           "mlp_dim": 32, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 12}  # fmt: skip
    config = DeepseekVLHybridConfig(text_config=LlamaConfig(**SMALL), vision_config=SiglipVisionConfig(**EYE), image_token_id=340,
                                    high_res_vision_config=SamVisionConfig(**eye))  # fmt: skip
    model = build(DeepseekVLHybridForConditionalGeneration, config)
    model.model.high_res_vision_alpha.data.fill_(0.7)
    return model


def deepseek_vl_hybrid_processor():
    eye = DeepseekVLHybridImageProcessorPil(**PIXELS, high_res_size={"height": 64, "width": 64})
    words = tokenizer(COLONS, image_token="<image_placeholder>")
    return DeepseekVLHybridProcessor(eye, words, chat_template=COLONS, num_image_tokens=16)


def janus():
    eye = {name: value for name, value in EYE.items() if name != "intermediate_size"} | {"projection_dim": 32, "num_image_tokens": 16}
    painter = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1],
               "projection_dim": 32, "image_token_embed_dim": 32, "num_res_blocks": 1}  # fmt: skip
    return build(JanusForConditionalGeneration, JanusConfig(text_config=LlamaConfig(**SMALL), vision_config=eye, vq_config=painter,
                                                            image_token_id=340))  # fmt: skip


def janus_processor():
    template = COLONS.replace("m.role.capitalize()", "'<|' + m.role.capitalize() + '|>'").replace("Assistant:", "<|Assistant|>:")
    words = tokenizer(template, "<|User|>", "<|Assistant|>", image_token="<image_placeholder>", boi_token="<begin_of_image>",
                      eoi_token="<end_of_image>")  # fmt: skip
    return JanusProcessor(JanusImageProcessorPil(**PIXELS), words, chat_template=template, num_image_tokens=16)


def lighton_ocr():
    config = LightOnOcrConfig(text_config=Qwen3Config(**SMALL, head_dim=16), image_token_id=340,
                              vision_config=PixtralVisionConfig(**PIXTRAL | {"patch_size": 4}))  # fmt: skip
    return build(LightOnOcrForConditionalGeneration, config)


def lighton_ocr_processor():
    template = CHATML.replace("IMAGE", "'<|image_pad|>'")
    words = tokenizer(template, *TURNS, image_token="<|image_pad|>", image_break_token="<|vision_pad|>", image_end_token="<|vision_end|>")
    eye = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size=8)
    return LightOnOcrProcessor(eye, words, patch_size=4, spatial_merge_size=2, chat_template=template)


def cohere2_vision():
    text = Cohere2Config(**SMALL, **WINDOWS, logit_scale=0.5)
    config = Cohere2VisionConfig(text_config=text, vision_config=SiglipVisionConfig(**EYE), image_token_id=340,
                                 alignment_intermediate_size=48)  # fmt: skip
    return build(Cohere2VisionForConditionalGeneration, config)


def cohere2_vision_processor():
    """With GOT-OCR's image processor, which cuts the same tiles, for its own, which needs torchvision."""
    template = COHERE.replace("{{ m.content }}", CONTENT.replace("IMAGE", "'<image>'"))
    words = tokenizer(template, *COHERE_SPECIALS, image_token="<image>", boi_token="<|START_OF_IMG|>", eoi_token="<|END_OF_IMG|>",
                      img_line_break_token="<|IMG_LINE_BREAK|>")  # fmt: skip
    eye = GotOcr2ImageProcessorPil(**PIXELS, crop_to_patches=True, max_patches=4)
    eye.patch_size = 2
    return assemble(Cohere2VisionProcessor, image_processor=eye, tokenizer=words, chat_template=template)


def fast_vlm():
    """With ConvNeXt for the real vision tower, FastViT, which is timm's and so needs torchvision."""
    eye = ConvNextConfig(num_stages=2, hidden_sizes=[12, 24], depths=[1, 3], image_size=32, hidden_size=24)
    config = FastVlmConfig(text_config=Qwen2Config(**SMALL), vision_config=eye, image_token_id=340)
    return build(FastVlmForConditionalGeneration, config)


def fast_vlm_processor():
    template = CHATML.replace("IMAGE", "'<image>\n'")
    words = tokenizer(template, *TURNS, image_token="<image>")
    return LlavaProcessor(CLIPImageProcessorPil(**PIXELS, crop_size=PIXELS["size"]), words, patch_size=8, num_additional_image_tokens=0,
                          vision_feature_select_strategy="full", chat_template=template)  # fmt: skip


class Lfm2VlOptions(Siglip2ImageProcessorPil.valid_kwargs, total=False):
    return_row_col_info: bool


class Lfm2VlImageProcessorPil(Siglip2ImageProcessorPil):
    """LFM2-VL's own needs torchvision. Like it, this one keeps an image's shape, in patches; it does not cut large images into tiles."""

    valid_kwargs = Lfm2VlOptions
    use_thumbnail, tile_size, downsample_factor, encoder_patch_size = False, 32, 2, 4

    def _preprocess(self, images, do_resize, patch_size, max_num_patches, resample, **kwargs):
        shapes = [get_image_size_for_max_num_patches(*image.shape[1:], 2 * patch_size, max_num_patches // 4) for image in images]
        images = [self.resize(image, SizeDict(height=h, width=w), resample) for image, (h, w) in zip(images, shapes, strict=True)]
        found = super()._preprocess(images, False, patch_size, max_num_patches, resample, **kwargs)
        return found | {"image_rows": [1] * len(images), "image_cols": [1] * len(images), "image_sizes": shapes}


def lfm2_vl():
    text = Lfm2Config(**SMALL, layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False)
    eye = {"model_type": "siglip2_vision_model", **EYE, "patch_size": 4, "num_patches": 64}
    config = Lfm2VlConfig(text_config=text, vision_config=eye, image_token_id=340, projector_hidden_size=48)
    return build(Lfm2VlForConditionalGeneration, config)


def lfm2_vl_processor():
    template = "{{ bos_token }}" + CHATML.replace("IMAGE", "'<image>'")
    words = tokenizer(template, "<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *TURNS)
    eye = Lfm2VlImageProcessorPil(patch_size=4, max_num_patches=64)
    return assemble(Lfm2VlProcessor, image_processor=eye, tokenizer=words, chat_template=template)


def granite4_vision():
    former = {"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 32, "cross_attention_frequency": 1}
    eye = CLIPVisionConfig(**EYE | {"hidden_size": 64})
    config = Granite4VisionConfig(text_config=SMALL | MULTIPLIED, vision_config=eye, qformer_config=former, image_token_id=340,
                                  image_grid_pinpoints=TILES, downsample_rate="1/2", deepstack_layer_map=[[-1, 0]],
                                  spatial_target_layers=[1, 2, 1, 2])  # fmt: skip
    return build(Granite4VisionForConditionalGeneration, config)


def granite4_vision_processor():
    eye = LlavaNextImageProcessorPil(**PIXELS | {"size": {"shortest_edge": 32}}, crop_size=PIXELS["size"], image_grid_pinpoints=TILES)
    words = tokenizer(ROLES, "<|start_of_role|>", "<|end_of_role|>", image_token="<image>")
    return Granite4VisionProcessor(eye, words, patch_size=8, num_additional_image_tokens=1, vision_feature_select_strategy="default",
                                   downsample_rate="1/2", chat_template=ROLES)  # fmt: skip


ENCODER = "model.vision_tower.encoder.layers"

FAMILIES = (
    Family("Llama 4", llama4, llama4_processor, "language_model.model.layers", "vision_model.model.layers", "multi_modal_projector", SIZES),
    Family("Llama 3.2 Vision", mllama, mllama_processor, DECODER, "model.vision_model.transformer.layers", PROJECTOR, SIZES,
           adds=("rest",), unsupported=(("branches", "what a token sees of the image is known to the forward of the image alone"),
                        ("forced answers", "likewise"))),
    Family("Ovis2", ovis2, ovis2_processor, DECODER, "model.vision_tower.transformer.encoder.layers", "model.visual_embeddings_table",
           SIZES),
    Family("DeepSeek-VL", deepseek_vl, deepseek_vl_processor, DECODER, "model.vision_model.encoder.layers", "model.aligner", SIZES),
    Family("DeepSeek-VL 7B", deepseek_vl_hybrid, deepseek_vl_hybrid_processor, DECODER, "model.vision_model.encoder.layers",
           "model.aligner", SIZES),
    Family("Janus", janus, janus_processor, DECODER, "model.vision_model.encoder.layers", "model.aligner", SIZES,
           unsupported=(("answers", "its own `generate` hands no logits to a processor, so that they can't be compared"),)),
    Family("LightOnOCR", lighton_ocr, lighton_ocr_processor, DECODER, "model.vision_encoder.transformer.layers", "model.vision_projection",
           SIZES),
    Family("Cohere 2 Vision", cohere2_vision, cohere2_vision_processor, DECODER, ENCODER, PROJECTOR, SIZES),
    Family("FastVLM", fast_vlm, fast_vlm_processor, DECODER, "model.vision_tower.encoder.stages.1.layers", PROJECTOR),
    Family("LFM2-VL", lfm2_vl, lfm2_vl_processor, DECODER, ENCODER, None, SIZES,
           unsupported=(("projector", "it runs once for every image of a batch, so that it has no one output"),
                        ("branches", "layers with a convolution have no keys to continue from"))),
    Family("Granite 4 Vision", granite4_vision, granite4_vision_processor, DECODER, ENCODER, None, SIZES, adds=("between",)),
)  # fmt: skip
