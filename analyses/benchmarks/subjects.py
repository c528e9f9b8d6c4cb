"""What is timed: random LLaVA-like models of a given depth, width and number of image tokens, with queries that fit them."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

import guardlens as gl
from guardlens import presentations
from guardlens.data.queries import Query
from guardlens.directions import Directions
from guardlens.organism.train import build_processor

PATCH = 14


@dataclass(frozen=True)
class Eye:
    """Of a CLIP vision encoder. A small one, so that the time is the language model's."""

    layers: int = 2
    width: int = 64
    heads: int = 2
    mlp: int = 128


@dataclass(frozen=True)
class Size:
    """Of a model and of the prompts that it is shown."""

    layers: int = 16
    width: int = 256
    side: int = 24
    """Image patches in a row: the prompt has `side ** 2` image tokens and some twenty others."""
    vocabulary: int = 4096
    d_head: int = 32
    mlp: float = 2.75
    """In widths."""
    eye: Eye = Eye()

    @property
    def name(self) -> str:
        return f"{self.layers} layers, d_model {self.width}, {self.side**2} image tokens"

    def at(self, **traits: int) -> "Size":
        return replace(self, **traits)


SIZES = {
    "small": Size(),
    "tiny": Size(layers=3, width=64, side=4),
    "7b": Size(layers=32, width=4096, vocabulary=32064, d_head=128, mlp=2.6875, eye=Eye(24, 1024, 16, 4096)),
}
"""By name; 7b is that of LLaVA-1.5-7B."""


def processor(side: int) -> Any:
    """The organism's words and template, with larger pictures."""
    made = build_processor()
    made.tokenizer.model_max_length = 10**6
    pixels = {"height": side * PATCH, "width": side * PATCH}
    made.image_processor.size = made.image_processor.crop_size = pixels
    made.patch_size = PATCH
    return made


def built(size: Size, dtype: str = "float32", device: str = "cpu") -> gl.HookedModel:
    """A random LLaVA, whose weights are drawn on the device and in the precision in which they stay."""
    words = processor(size.side)
    heads = size.width // size.d_head
    text = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=int(size.width * size.mlp), num_hidden_layers=size.layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=8192, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    eye = CLIPVisionConfig(
        hidden_size=size.eye.width, intermediate_size=size.eye.mlp, num_hidden_layers=size.eye.layers, num_attention_heads=size.eye.heads,
        image_size=size.side * PATCH, patch_size=PATCH,
    )  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=eye)
    config.image_token_id = words.image_token_id
    torch.manual_seed(0)
    with torch.device(device):
        hf: Any = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    return gl.load(hf.eval(), processor=words)


model = lru_cache(maxsize=1)(built)
"""As `built`; the last one is kept."""


def queries(number: int) -> list[Query]:
    """Requests of the toy language, of different lengths, harmful and harmless ones in turn."""
    asked = gl.organism.queries("validation")
    labelled = [[query for query in asked if query.label == label] for label in ("harmful", "harmless")]
    known = [query for both in zip(*labelled, strict=False) for query in both]
    return [Query(known[i % len(known)].text, known[i % len(known)].label, id=f"q{i}") for i in range(number)]


def long_query() -> Query:
    """One with more than twenty tokens of text behind its image."""
    return Query(" ".join(query.text for query in queries(3)), "harmless", id="long")


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


def pushes(subject: gl.HookedModel, ssd: Directions, scale: float = 1.0) -> list[Tensor]:
    """The same as plain vectors, one per layer, where and as the model's states are."""
    return list((scale * ssd.vectors[:, 0]).to(subject.hf.device, subject.hf.dtype))
