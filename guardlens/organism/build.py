"""The organism before training: its processor, and its model with random weights."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from guardlens.organism import world
from guardlens.organism.lessons import IMAGE, RECIPE, Recipe

_TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{{- ' ' + message['role'] + ' :' -}}
{%- if message['role'] == 'assistant' -%}
{{- ' ' -}}{%- generation -%}
{{- (message['content'] if message['content'] is string else message['content'][0]['text']) + ' ' + eos_token -}}
{%- endgeneration -%}
{%- elif message['content'] is string -%}{{- ' ' + message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}{{- ' <image>' if part['type'] == 'image' else ' ' + part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' assistant :' -}}{%- endif -%}"""


def build_processor() -> LlavaProcessor:
    """The organism's processor: one token per word of the world, 16 tokens per picture, padding on the left."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(world.VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=128,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    size = {"height": world.PIXELS, "width": world.PIXELS}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, resample=2, image_mean=[0.5] * 3, image_std=[0.27] * 3)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )


def build_model(seed: int, recipe: Recipe = RECIPE) -> LlavaForConditionalGeneration:
    """The organism before training."""
    ends: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = LlamaConfig(
        vocab_size=len(world.VOCABULARY),
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.inner,
        max_position_embeddings=128,
        **ends,
    )
    vision = CLIPVisionConfig(
        hidden_size=recipe.eye_width,
        num_hidden_layers=recipe.eye_layers,
        num_attention_heads=4,
        intermediate_size=2 * recipe.eye_width,
        image_size=world.PIXELS,
        patch_size=8,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=16, vision_feature_layer=-2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**ends, do_sample=False, max_new_tokens=16)
    return model
