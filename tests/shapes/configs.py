"""The sizes of models that people use, cut to a layer or two: widths, heads, vocabularies, rotations, windows, images and their tokens.

`source` says where the values come from: transformers' defaults of the config's class, copies of the published config.json in public
repositories, and for all else memory of that file, which could not be fetched where this was written. The number of image tokens follows
from the values, and is what the makers say of LLaVA, Gemma 3, PaliGemma, Idefics3, SmolVLM, InternVL3 and Aya Vision.
The tokenizers are the zoo's (352 words), so that ids of special tokens are its own, far below the vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.zoo import gemma, idefics, llava, others, qwen


@dataclass(frozen=True)
class Shape:
    """One published model.

    Attributes:
        name: Of the checkpoint.
        config: Class of its config; the model's class is the one that transformers maps to it.
        text: The language model's config.
        vision: The vision encoder's.
        more: The rest.
        processor: Makes the zoo's processor of the family.
        eye: What its image processor is made of instead.
        sets: Attributes of the processor.
        side: Of the square test image, in pixels.
        tokens: How many image tokens stand for it.
        blocks: Path of the list of decoder blocks, as the zoo has it.
        source: Where the values come from.
        lacks: What `guardlens check` is known to find missing: a true limit of the family.
    """

    name: str
    config: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    more: Mapping[str, Any]
    processor: Callable[[], Any]
    eye: Mapping[str, Any]
    side: int
    tokens: int
    sets: Mapping[str, Any] = field(default_factory=dict)
    blocks: str = "model.language_model.layers"
    source: str = "memory"
    lacks: tuple[str, ...] = ()


def square(side: int) -> dict[str, Any]:
    return {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CUT = {"num_hidden_layers": 1, **IDS}
MIXED = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768}  # fmt: skip
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 1,
          "num_attention_heads": 16, "patch_size": 14, "vision_use_head": False}  # fmt: skip
QWEN_7B = {**CUT, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4, **rope(1e6)}
LLAMA_8B = {**CUT, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION = [[height, width] for height in range(384, 2305, 384) for width in range(384, 2305, 384)]
ANY = {"min_pixels": 56 * 56, "max_pixels": 12845056}

SHAPES = (
    Shape(
        "llava-1.5-7b", "LlavaConfig",
        {**CUT, "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
         "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        CLIP, {"image_token_id": 340, "vision_feature_layer": -2},
        llava.llava_processor, {**square(336), "crop_size": {"height": 336, "width": 336}}, 336, 576, {"patch_size": 14},
        source="transformers' defaults, but for the vocabulary, the longest prompt and the norm's epsilon (memory)",
    ),
    Shape(
        "llava-v1.6-mistral-7b", "LlavaNextConfig",
        {**LLAMA_8B, "model_type": "mistral", "vocab_size": 32064, "max_position_embeddings": 32768, "sliding_window": None, **rope(1e6)},
        CLIP, {"image_token_id": 340, "vision_feature_layer": -2, "image_grid_pinpoints": PINPOINTS},
        llava.llava_next_processor,
        {**square(336), "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "image_grid_pinpoints": PINPOINTS},
        336, 1176, {"patch_size": 14},
        source="transformers' defaults, but for the vocabulary, the longest prompt and the rotation (memory)",
    ),
    Shape(
        "llava-onevision-qwen2-7b-ov", "LlavaOnevisionConfig",
        {**QWEN_7B, "model_type": "qwen2", "vocab_size": 152000, "max_position_embeddings": 32768},
        {**SIGLIP, "image_size": 384},
        {"image_token_id": 340, "video_token_id": 341, "image_grid_pinpoints": ONEVISION, "vision_feature_layer": -1},
        llava.llava_onevision_processor, {**square(384), "image_grid_pinpoints": ONEVISION}, 384, 1485, {"num_image_tokens": 729},
        source="encoder: transformers' defaults; language model: memory",
    ),
    Shape(
        "Qwen2-VL-7B", "Qwen2VLConfig",
        {**QWEN_7B, "vocab_size": 152064, "max_position_embeddings": 32768, **rope(1e6, mrope_section=[16, 24, 24])},
        {"depth": 2, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14, "spatial_merge_size": 2},
        qwen.IDS, lambda: qwen.processor(qwen.Qwen2VLProcessor, qwen.HELPFUL + qwen.TEMPLATE), {**ANY, "patch_size": 14, "merge_size": 2},
        448, 256, source="encoder, vocabulary: transformers' defaults; rotation: public copies; the other widths: memory",
    ),
    Shape(
        "Qwen2.5-VL-7B", "Qwen2_5_VLConfig",
        {**QWEN_7B, "vocab_size": 152064, "max_position_embeddings": 128000, **rope(1e6, mrope_section=[16, 24, 24])},
        {"depth": 2, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "num_heads": 16, "patch_size": 14,
         "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [1]},
        qwen.IDS, lambda: qwen.processor(qwen.Qwen2_5_VLProcessor, qwen.HELPFUL + qwen.TEMPLATE),
        {**ANY, "patch_size": 14, "merge_size": 2}, 448, 256,
        source="as Qwen2-VL; the encoder's width: public copies; its whole attention is moved from block 7 to block 1",
    ),
    Shape(
        "Qwen3-VL-8B", "Qwen3VLConfig",
        {**LLAMA_8B, "intermediate_size": 12288, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144,
         "rms_norm_eps": 1e-6, **rope(5e6, mrope_section=[24, 20, 20])},
        {"depth": 2, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096, "num_heads": 16, "patch_size": 16,
         "spatial_merge_size": 2, "num_position_embeddings": 2304, "deepstack_visual_indexes": [0]},
        qwen.IDS, lambda: qwen.processor(qwen.Qwen3VLProcessor, qwen.TEMPLATE),
        {"min_pixels": 65536, "max_pixels": 16777216, "patch_size": 16, "merge_size": 2}, 448, 196,
        source="encoder, widths, vocabulary: transformers' defaults; the rest: memory; DeepStack is moved from block 8 to 0",
    ),
    Shape(
        "gemma-3-4b", "Gemma3Config",
        {**CUT, **MIXED, "hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 1024, "vocab_size": 262208, "max_position_embeddings": 131072,
         "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                             "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}},
        {**SIGLIP, "image_size": 896},
        {"mm_tokens_per_image": 256, "boi_token_index": 340, "eoi_token_index": 341, "image_token_id": 342},
        lambda: gemma.gemma3_processor(256), square(896), 896, 256,
        source="public copies; of 5 blocks with a window and 1 without, 1 and 1",
    ),
    Shape(
        "paligemma2-3b-pt-224", "PaliGemmaConfig",
        {**CUT, **MIXED, "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "final_logit_softcapping": 30.0,
         "attn_logit_softcapping": 50.0, "vocab_size": 257216, "max_position_embeddings": 8192},
        {**SIGLIP, "image_size": 224}, {"projection_dim": 2304, "image_token_id": 340},
        gemma.paligemma2_processor, {**square(224), "image_seq_length": 256}, 224, 256, {"image_seq_length": 256},
        source="transformers' defaults, but for the vocabulary and the encoder's inner width (memory)",
        lacks=("text twin",),  # its processor takes no prompt without an image
    ),
    Shape(
        "Idefics3-8B-Llama3", "Idefics3Config",
        {**LLAMA_8B, "model_type": "llama", "vocab_size": 128259, "max_position_embeddings": 131072, **rope(5e5)},
        {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 1, "num_attention_heads": 16, "image_size": 364,
         "patch_size": 14},
        {"image_token_id": 341, "scale_factor": 2}, idefics.idefics3_processor,
        {"size": {"longest_edge": 728}, "max_image_size": {"longest_edge": 364}}, 364, 5 * 169, {"image_seq_len": 169},
        blocks="model.text_model.layers", source="memory; 169 tokens a tile: its card; 2 x 2 tiles and a whole, not 4 x 4, to be quick",
    ),
    Shape(
        "SmolVLM-256M", "SmolVLMConfig",
        {**CUT, "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
         "vocab_size": 49280, "max_position_embeddings": 8192, **rope(1e5)},
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 1, "num_attention_heads": 12, "image_size": 512,
         "patch_size": 16},
        {"image_token_id": 341, "scale_factor": 4}, idefics.smolvlm_processor,
        {"size": {"longest_edge": 1024}, "max_image_size": {"longest_edge": 512}}, 512, 5 * 64, {"image_seq_len": 64},
        blocks="model.text_model.layers", source="memory; 2 x 2 tiles and a whole, not 4 x 4, to be quick",
    ),
    Shape(
        "SmolVLM2-2.2B", "SmolVLMConfig",
        {**CUT, "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
         "num_key_value_heads": 32, "vocab_size": 49280, "max_position_embeddings": 8192, **rope(130000.0)},
        {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 1, "num_attention_heads": 16, "image_size": 384,
         "patch_size": 14},
        {"image_token_id": 341, "scale_factor": 3}, idefics.smolvlm_processor,
        {"size": {"longest_edge": 768}, "max_image_size": {"longest_edge": 384}}, 384, 5 * 81, {"image_seq_len": 81},
        blocks="model.text_model.layers", source="memory, unsure of the rotation; 2 x 2 tiles and a whole",
    ),
    Shape(
        "InternVL3-8B", "InternVLConfig",
        {**QWEN_7B, "model_type": "qwen2", "vocab_size": 151674, "tie_word_embeddings": False, "max_position_embeddings": 32768},
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 16, "image_size": [448, 448],
         "patch_size": [14, 14]},
        {"image_token_id": 340, "tie_word_embeddings": False}, llava.internvl_processor,
        {**square(448), "max_patches": 12, "crop_to_patches": True}, 448, 256,
        {"image_seq_length": 256}, source="encoder: transformers' defaults; language model: memory",
    ),
    Shape(
        "Llama-3.2-11B-Vision", "MllamaConfig",
        {**LLAMA_8B, "num_hidden_layers": 2, "vocab_size": 128256, "max_position_embeddings": 131072, "cross_attention_layers": [1],
         "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192}},
        {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 16,
         "image_size": 560, "patch_size": 14, "max_num_tiles": 4, "intermediate_layers_indices": [0], "vision_output_dim": 2560},
        {"image_token_index": 340}, others.mllama_processor, square(560), 560, 1,
        source="transformers' defaults; images of 560: memory; of the encoder's 5 intermediate layers 1: it gives 2560, not 7680",
    ),
    Shape(
        "pixtral-12b", "LlavaConfig",
        {**LLAMA_8B, "model_type": "mistral", "hidden_size": 5120, "head_dim": 128, "vocab_size": 131072,
         "max_position_embeddings": 1024000, "sliding_window": None, **rope(1e9)},
        {"model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 16,
         "image_size": 1024, "patch_size": 16},
        {"image_token_id": 340, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        lambda: llava.pixtral_processor(patch_size=16),
        {"size": {"longest_edge": 1024}, "patch_size": {"height": 16, "width": 16}}, 256, 256,
        source="encoder: transformers' defaults; language model: memory",
    ),
    Shape(
        "aya-vision-8b", "AyaVisionConfig",
        {**LLAMA_8B, **MIXED, "model_type": "cohere2", "vocab_size": 256000, "max_position_embeddings": 8192, "sliding_window": 4096,
         "logit_scale": 0.25, **rope(5e4)},
        {**SIGLIP, "image_size": 364}, {"image_token_id": 342, "downsample_factor": 2}, llava.aya_vision_processor,
        {**square(364), "max_patches": 12}, 364, 169, {"patch_size": 28, "img_size": 364},
        source="encoder's widths, vocabulary, window: transformers' defaults; the rest: memory; of 3 windows and 1 whole, 1 and 1",
    ),
)  # fmt: skip
