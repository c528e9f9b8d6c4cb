"""What is timed: random LLaVA-like models, text-only models of real proportions or with real weights, and queries that fit them."""

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen2Config

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


@dataclass(frozen=True)
class TextSize:
    """The sizes of a text-only Qwen2. By default they are those of Qwen2-0.5B."""

    layers: int = 24
    width: int = 896
    heads: int = 14
    kv_heads: int = 2
    mlp: int = 4864
    """The number of neurons in a layer."""
    vocabulary: int = 151_936


QWEN = TextSize()


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


def built_text(size: TextSize, dtype: str = "float32", device: str = "cpu") -> gl.HookedModel:
    """Build a random Qwen2 that reads the organism's words. Its unembedding is the embedding, as in Qwen2-0.5B."""
    words = build_processor()
    words.tokenizer.model_max_length = 10**6
    words.tokenizer.chat_template = words.chat_template
    config = Qwen2Config(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.mlp, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, max_position_embeddings=8192, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        hf: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return gl.load(hf.eval(), processor=words.tokenizer)


def read_text(checkpoint: Path, dtype: str = "float32", device: str = "cpu") -> gl.HookedModel:
    """Read a text-only model with its weights: from a directory, or from a GGUF file."""
    return gl.load(checkpoint, dtype=dtype, device=device)


text_model = lru_cache(maxsize=1)(built_text)
"""Like `built_text`, but the last model is kept."""
text_checkpoint = lru_cache(maxsize=1)(read_text)
"""Like `read_text`, but the last model is kept."""


def sizes(subject: gl.HookedModel) -> str:
    """The sizes of a text-only model, as a page says them."""
    cfg = subject.cfg
    heads = f"{cfg.n_heads} query and {cfg.n_kv_heads} key-value heads"
    return f"{cfg.n_layers} layers, d_model {cfg.d_model}, {heads}, d_mlp {cfg.d_mlp:,}, vocabulary {cfg.d_vocab:,}"


def queries(number: int) -> list[Query]:
    """Requests of the toy language, of different lengths, harmful and harmless ones in turn."""
    asked = gl.organism.queries("validation")
    labelled = [[query for query in asked if query.label == label] for label in ("harmful", "harmless")]
    known = [query for both in zip(*labelled, strict=False) for query in both]
    return [Query(known[i % len(known)].text, known[i % len(known)].label, id=f"q{i}") for i in range(number)]


def prompts(subject: gl.HookedModel, number: int, tokens: int) -> list[Query]:
    """Requests of the toy language whose prompts have at most this number of tokens, the chat template's included.

    They have just so many where a word is a token. Each begins at another word.
    """
    words = " ".join(query.text for query in queries(tokens + number)).split()

    def request(first: int, length: int) -> Query:
        return Query(" ".join(words[first : first + length]), "harmful" if first % 2 else "harmless", id=f"p{first}")

    def tokens_of(first: int, length: int) -> int:
        return subject.batch([request(first, length)]).mask.shape[1]

    lengths = range(1, tokens + 1)
    return [request(i, max(1, bisect_right(lengths, tokens, key=lambda length: tokens_of(i, length)))) for i in range(number)]


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
