"""Gemma, PaliGemma and other families with a soft image token between marks."""

from unittest.mock import patch

from transformers import (
    AutoModel,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4Processor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.zoo.family import Family, assemble, build, tokenizer
from tests.zoo.parts import EYE, PIXELS
from tests.zoo.text import CAPPED, GEMMA, GEMMA_TURNS, SMALL, WINDOWS

TEMPLATE = GEMMA.replace("IMAGE", "'<start_of_image>'")
TEMPLATE_3N = GEMMA.replace("IMAGE", "'<image_soft_token>'")
TEMPLATE_4 = (
    ("{{ bos_token }}{% set prefix = '' %}{% for m in messages %}" + GEMMA_TURNS)
    .replace("IMAGE", "'\n\n<|image|>\n\n'")
    .replace("<start_of_turn>", "<|turn>")
    .replace("<end_of_turn>", "<turn|>")
)
SHARING = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 12, "head_dim": 8, "hidden_size_per_layer_input": 8,
           "layer_types": ["sliding_attention", "full_attention"] * 2, "final_logit_softcapping": 3.0}  # fmt: skip
EXPERTS = {"num_hidden_layers": 3, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
           "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "attention_k_eq_v": True,
           "num_global_key_value_heads": 1, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
           "use_bidirectional_attention": "vision", "use_double_wide_mlp": False}  # fmt: skip


def gemma3():
    text = Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=12, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    )
    config = Gemma3Config(text_config=text, vision_config=SiglipVisionConfig(**EYE), mm_tokens_per_image=4, boi_token_index=340,
                          eoi_token_index=341, image_token_id=342)  # fmt: skip
    return build(Gemma3ForConditionalGeneration, config)


def gemma3_processor(tokens: int = 4):
    words = tokenizer(TEMPLATE, "<start_of_turn>", "<end_of_turn>", boi_token="<start_of_image>", eoi_token="<end_of_image>",
                      image_token="<image_soft_token>")  # fmt: skip
    return Gemma3Processor(Gemma3ImageProcessorPil(**PIXELS), words, image_seq_length=tokens, chat_template=TEMPLATE)


def gemma3n():
    """With SigLIP for the real vision tower, MobileNet-v5, which is timm's and so needs torchvision."""
    text = SMALL | SHARING | {"vocab_size_per_layer_input": 344, "altup_num_inputs": 3, "laurel_rank": 4,
                              "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]}  # fmt: skip
    ear = {"hidden_size": 16, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2, "input_feat_size": 16,
           "sscp_conv_channel_size": (4, 4), "vocab_size": 6, "vocab_offset": 346}  # fmt: skip
    config = Gemma3nConfig(text_config=text, audio_config=ear, vision_config={"hidden_size": 24, "vocab_size": 2, "vocab_offset": 344},
                           vision_soft_tokens_per_image=16, boi_token_id=342, boa_token_id=343, eoi_token_id=344, image_token_id=345,
                           eoa_token_id=346, audio_token_id=347)  # fmt: skip
    eye, others = SiglipVisionConfig(**EYE, attn_implementation="eager"), AutoModel.from_config
    with patch.object(AutoModel, "from_config", lambda part: others(eye if part.model_type == "gemma3n_vision" else part)):
        return build(Gemma3nForConditionalGeneration, config)


def gemma3n_processor():
    words = tokenizer(TEMPLATE_3N, start_token="<start_of_turn>", end_token="<end_of_turn>", boi_token="<start_of_image>",
                      boa_token="<start_of_audio>", eoi_token="<end_of_image>", image_token="<image_soft_token>",
                      eoa_token="<end_of_audio>", audio_token="<audio_soft_token>")  # fmt: skip
    return assemble(Gemma3nProcessor, feature_extractor=None, image_processor=SiglipImageProcessorPil(**PIXELS), tokenizer=words,
                    chat_template=TEMPLATE_3N, image_seq_length=16)  # fmt: skip


def gemma4(**traits):
    text = SMALL | SHARING | {"vocab_size_per_layer_input": 352, "global_head_dim": 16, "use_double_wide_mlp": True} | traits
    eye = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
           "head_dim": 12, "patch_size": 4, "pooling_kernel_size": 2, "position_embedding_size": 128}  # fmt: skip
    model = build(Gemma4ForConditionalGeneration, Gemma4Config(text_config=text, vision_config=eye, boi_token_id=340, eoi_token_id=341,
                                                               image_token_id=342, boa_token_id=343, eoa_token_index=344,
                                                               audio_token_id=345, video_token_id=348))  # fmt: skip
    for block in model.model.language_model.layers:
        block.layer_scalar.fill_(0.9)
    return model


def gemma4_processor():
    words = tokenizer(TEMPLATE_4, "<|turn>", "<turn|>", "<|video|>", boi_token="<|image>", eoi_token="<image|>", image_token="<|image|>",
                      boa_token="<|audio>", eoa_token="<audio|>", audio_token="<|audio|>")  # fmt: skip
    eye = Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
    return assemble(Gemma4Processor, feature_extractor=None, image_processor=eye, tokenizer=words, video_processor=None,
                    chat_template=TEMPLATE_4)  # fmt: skip


def paligemma2():
    config = PaliGemmaConfig(text_config=Gemma2Config(**SMALL, **WINDOWS, **CAPPED), vision_config=SiglipVisionConfig(**EYE),
                             projection_dim=32, image_token_id=340)  # fmt: skip
    return build(PaliGemmaForConditionalGeneration, config)


def paligemma2_processor():
    """Without a chat template, as the checkpoints are."""
    return PaliGemmaProcessor(SiglipImageProcessorPil(**PIXELS, image_seq_length=16), tokenizer("", image_token="<image>"))


NORMED = (("values as mixed", "they are normalised before the heads mix them"),)

FAMILIES = (
    Family("Gemma 3", gemma3, gemma3_processor, "model.language_model.layers", "model.vision_tower.encoder.layers",
           "model.multi_modal_projector"),
    Family("Gemma 4", gemma4, gemma4_processor, "model.language_model.layers", "model.vision_tower.encoder.layers", "model.embed_vision",
           images=((40, 20), (32, 32)), adds=("rest",),
           unsupported=(*NORMED, ("forks", "later blocks take the keys and values of earlier ones"))),
    Family("Gemma 4 MoE", lambda: gemma4(**EXPERTS), gemma4_processor, "model.language_model.layers", "model.vision_tower.encoder.layers",
           "model.embed_vision", images=((40, 20), (32, 32)), adds=("rest",), unsupported=NORMED),
    Family("PaliGemma 2", paligemma2, paligemma2_processor, "model.language_model.layers", "model.vision_tower.encoder.layers",
           "model.multi_modal_projector", unsupported=(("text alone", "its processor takes no prompt without an image"),
                                                   ("branches", "the prompt's tokens look ahead at the last one"),
                                                   ("forced answers", "likewise"),
                                                       ("prefill", "its processor ends every prompt in a line break"))),
    Family("Gemma 3n", gemma3n, gemma3n_processor, "model.language_model.layers", "model.vision_tower.encoder.layers",
           "model.embed_vision", refused="keeps several residual streams"),
)  # fmt: skip
