"""Idefics and BLIP: families with a resampler or a Q-Former between eye and decoder, or with tiles."""

from types import SimpleNamespace
from unittest.mock import patch

from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.zoo.family import Family, assemble, build, tokenizer
from tests.zoo.parts import EYE, PIXELS, USER_ASSISTANT
from tests.zoo.text import SMALL, UNGROUPED

TEMPLATE = (
    "{% for m in messages %}{{ m.role.capitalize() + (':' if m.content[0].type == 'image' else ': ') }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SPECIALS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
TILES = ("<global-img>", *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)))
NO_PLACE = USER_ASSISTANT.replace("<image>\n", "")
"""BLIP's processors put the image before everything, whatever the template says."""
QUERIES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 352}


def idefics3(cls=Idefics3ForConditionalGeneration, config=Idefics3Config):
    return build(cls, config(text_config=LlamaConfig(**SMALL), vision_config=EYE, image_token_id=341, scale_factor=2))


def idefics3_processor():
    eye = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    template = "{{ bos_token }}" + TEMPLATE
    return Idefics3Processor(eye, tokenizer(template, *SPECIALS, *TILES), image_seq_len=4, chat_template=template)


def smolvlm():
    return idefics3(SmolVLMForConditionalGeneration, SmolVLMConfig)


def smolvlm_processor():
    """Without num2words, which the class demands but uses for videos alone; so with a video processor of two numbers."""
    eye = SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    template = "<|im_start|>" + TEMPLATE
    with patch.object(processing_smolvlm, "num2words", str):
        return assemble(SmolVLMProcessor, image_processor=eye, tokenizer=tokenizer(template, *SPECIALS, *TILES, "<|im_start|>"),
                        video_processor=SimpleNamespace(num_frames=1, fps=1), image_seq_len=4, chat_template=template)  # fmt: skip


def idefics2():
    resampler = {"resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 8, "num_key_value_heads": 2,
                 "hidden_size": 32}  # fmt: skip
    return build(Idefics2ForConditionalGeneration, Idefics2Config(text_config=MistralConfig(**SMALL, sliding_window=12), vision_config=EYE,
                                                                  perceiver_config=resampler, image_token_id=341))  # fmt: skip


def idefics2_processor():
    eye = Idefics2ImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=True)
    return Idefics2Processor(eye, tokenizer(TEMPLATE, *SPECIALS), image_seq_len=4, chat_template=TEMPLATE)


def instructblip():
    config = InstructBlipConfig(text_config=LlamaConfig(**SMALL), vision_config=EYE, qformer_config=QUERIES, num_query_tokens=4,
                                image_token_index=340)  # fmt: skip
    return build(InstructBlipForConditionalGeneration, config)


def instructblip_processor():
    made = InstructBlipProcessor(BlipImageProcessorPil(**PIXELS), tokenizer(NO_PLACE, "<image>"), tokenizer(NO_PLACE), num_query_tokens=4)
    made.chat_template = NO_PLACE
    return made


def blip2():
    text = OPTConfig(**UNGROUPED, ffn_dim=48, max_position_embeddings=512)
    return build(Blip2ForConditionalGeneration, Blip2Config(text_config=text, vision_config=EYE, qformer_config=QUERIES, num_query_tokens=4,
                                                            image_token_index=340))  # fmt: skip


def blip2_processor():
    made = Blip2Processor(BlipImageProcessorPil(**PIXELS), tokenizer(NO_PLACE, "<image>"), num_query_tokens=4)
    made.chat_template = NO_PLACE
    return made


FAMILIES = (
    Family("Idefics3", idefics3, idefics3_processor, "model.text_model.layers", "model.vision_model.encoder.layers",
           "model.connector", images=((40, 20), (32, 32))),
    Family("SmolVLM", smolvlm, smolvlm_processor, "model.text_model.layers", "model.vision_model.encoder.layers",
           "model.connector", images=((40, 20), (32, 32))),
    Family("Idefics2", idefics2, idefics2_processor, "model.text_model.layers", "model.vision_model.encoder.layers",
           "model.connector", images=((40, 20), (32, 32))),
    Family("InstructBLIP", instructblip, instructblip_processor, "language_model.model.layers", "vision_model.encoder.layers",
           "language_projection", refused="puts the image before the padding"),
    Family("BLIP-2", blip2, blip2_processor, "language_model.model.decoder.layers", "vision_model.encoder.layers", "language_projection",
           refused="puts the image before the padding"),
)  # fmt: skip
