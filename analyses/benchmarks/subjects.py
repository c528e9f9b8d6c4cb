"""What is timed: random LLaVA-like models of a given depth, width and number of image tokens, with queries that fit them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import guardlens as gl
from guardlens import presentations
from guardlens.directions import Directions
from guardlens.organism.train import build_processor
from guardlens.queries import Query

PATCH = 14


@dataclass(frozen=True)
class Size:
    """Of a model and of the prompts that it is shown."""

    layers: int = 16
    width: int = 256
    side: int = 24
    """Image patches in a row: the prompt has `side ** 2` image tokens and some twenty others."""
    vocabulary: int = 4096

    @property
    def name(self) -> str:
        return f"{self.layers} layers, d_model {self.width}, {self.side**2} image tokens"

    def at(self, **traits: int) -> "Size":
        return replace(self, **traits)


def processor(side: int) -> Any:
    """The organism's words and template, with larger pictures."""
    made = build_processor()
    made.tokenizer.model_max_length = 10**6
    pixels = {"height": side * PATCH, "width": side * PATCH}
    made.image_processor.size = made.image_processor.crop_size = pixels
    made.patch_size = PATCH
    return made


def model(size: Size, dtype: torch.dtype = torch.float32, device: str = "cpu") -> gl.HookedModel:
    """A random LLaVA: a small eye, so that the time is the language model's."""
    words = processor(size.side)
    text = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.width * 11 // 4, num_hidden_layers=size.layers,
        num_attention_heads=size.width // 32, num_key_value_heads=size.width // 32, max_position_embeddings=8192,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    eye = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=size.side * PATCH, patch_size=PATCH
    )
    config = LlavaConfig(text_config=text, vision_config=eye)
    config.image_token_id = words.image_token_id
    torch.manual_seed(0)
    hf: Any = LlavaForConditionalGeneration(config)
    hf.eval().to(device=device, dtype=dtype)
    return gl.load(hf, processor=words)


def queries(number: int) -> list[Query]:
    """Requests of the toy language, of different lengths."""
    known = gl.organism.queries("validation")
    return [Query(known[i % len(known)].text, known[i % len(known)].label, id=f"q{i}") for i in range(number)]


def blank(size: Size) -> presentations.Blank:
    return presentations.blank("grey", size.side * PATCH)


def noise(size: Size) -> presentations.Noise:
    """A picture of its own for every query, so that nothing can be shared."""
    return presentations.noise(0, size.side * PATCH)


def directions(subject: gl.HookedModel) -> Directions:
    """Random unit vectors: what is timed does not depend on what they mean."""
    generator = torch.Generator().manual_seed(1)
    layers, width = subject.cfg.n_layers, subject.cfg.d_model
    vectors = torch.nn.functional.normalize(torch.randn(layers, 1, width, generator=generator), dim=-1)
    means = torch.randn(2, layers, width, generator=generator)
    return Directions(vectors, tuple(range(layers)), means[0], means[1], torch.zeros(layers, 0), "random", provenance=subject.provenance)
