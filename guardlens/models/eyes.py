"""Eyes: a small vision encoder and its projector, put before a language model that stays as it is.

The result is an ordinary `LlavaForConditionalGeneration`. Only the eye is new, so it can be stored and shared without the language
model that it was trained for.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guardlens.errors import MismatchError, ModelError
from guardlens.models.architectures import fingerprint
from guardlens.results.files import in_memory, load_tensors, require_path, save_tensors

FILE = "eyes.safetensors"
"""The name of an eye's file in a directory."""

IMAGE = "<image>"
"""The image token."""

PARTS = ("model.vision_tower.", "model.multi_modal_projector.")
"""How the names of an eye's parameters begin."""

JOIN_PARTS = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set line = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- set line.text = line.text + ('<image>' if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': line.text}] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
"""Goes before the chat template of a language model, which takes texts, not parts: it joins the parts of each message to a text."""


@dataclass(frozen=True)
class EyeSize:
    """The sizes of an eye, a CLIP vision encoder with one image token per patch.

    Attributes:
        pixels: Width and height of the image.
        patch: Width and height of a patch.
        width: Width of the encoder's residual stream.
        layers: Layers of the encoder. The image tokens come from the last but one, as in LLaVA.
        heads: Attention heads of a layer.
        inner: Width of its MLPs.
    """

    pixels: int = 96
    patch: int = 16
    width: int = 256
    layers: int = 5
    heads: int = 4
    inner: int = 768

    @property
    def tokens(self) -> int:
        """The number of image tokens."""
        return (self.pixels // self.patch) ** 2


@dataclass(frozen=True, eq=False)
class Eyes:
    """An eye and where it comes from.

    Attributes:
        size: Its sizes.
        llm: The fingerprint of the language model that it is for.
        weights: The values of its parameters, by their names in the whole model.
        record: How it was made.
    """

    size: EyeSize
    llm: str
    weights: Mapping[str, Tensor]
    record: Mapping[str, Any]

    def save(self, directory: str | Path) -> None:
        """Write the eye alone into a directory."""
        header = {"size": asdict(self.size), "llm": self.llm, "record": dict(self.record)}
        save_tensors(require_path(directory) / FILE, "eyes", self.weights, header)

    @classmethod
    def load(cls, directory: str | Path) -> "Eyes":
        """Read an eye from a directory.

        Raises:
            StorageError: The directory has none, or its file is damaged.
        """
        weights, header = load_tensors(require_path(directory) / FILE, "eyes")
        return cls(EyeSize(**header["size"]), header["llm"], in_memory(weights), header["record"])


def untrained(llm: Any, size: EyeSize, seed: int) -> Eyes:
    """Return an eye with random weights for a language model.

    Raises:
        ModelError: It can't be given eyes.
    """
    require_llm(llm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = _assembled(_config(llm, size))
    return Eyes(size, fingerprint(llm), dict(weights_of(hf)), {"seed": seed, "steps": 0})


def weights_of(hf: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a model's eye."""
    return ((name, weight) for name, weight in hf.named_parameters() if name.startswith(PARTS))


def with_eyes(llm: Any, tokenizer: Any, eyes: Eyes) -> tuple[Any, Any]:
    """Put an eye before the language model that it was made for.

    Args:
        llm: The language model, of transformers. Its modules become parts of the result. Its vocabulary grows by the image token if the
            tokenizer fills it.
        tokenizer: The language model's tokenizer, which stays as it is.
        eyes: The eye.

    Returns:
        The VLM and its processor.

    Raises:
        ModelError: The model is no plain language model: it sees images already, or its logits are more than its unembedding of the last
            states.
        MismatchError: The eye was made for another language model.
    """
    require_llm(llm)
    found = fingerprint(llm)
    if eyes.llm != found:
        raise MismatchError(
            f"eyes for the language model {eyes.llm}, before {found}",
            "the language model that they were trained for, in the same precision",
            f"load {eyes.record.get('model', 'that one')} with dtype={eyes.record.get('dtype', 'float32')!r}, or train others",
        )
    tokens = torch.tensor([[0, 1, 2, 3]], device=llm.device)
    with torch.no_grad():
        expected = llm(tokens).logits
        hf, processor = joined(llm, tokenizer, eyes)
        found = hf(tokens).logits[..., : expected.shape[-1]]
    if not torch.allclose(found, expected, atol=1e-3, rtol=1e-3):
        raise ModelError(
            f"{type(llm).__name__}, whose logits are more than its unembedding of the last states",
            "a language model that can be part of a LLaVA",
            "take one without scaled or capped logits, such as Qwen2.5, Llama 3.2 or SmolLM2",
        )
    return hf, processor


def require_llm(llm: Any) -> None:
    """Refuse a model that sees already, and one without a body and an unembedding.

    Raises:
        ModelError: It is not a causal language model of transformers.
    """
    sees = getattr(llm.config, "vision_config", None) is not None
    unembedding = llm.get_output_embeddings()
    fits = hasattr(llm.base_model, "embed_tokens") and unembedding is not None and unembedding.bias is None
    if sees or not fits:
        raise ModelError(
            f"{type(llm).__name__}, which can't be given eyes",
            "a causal language model that can be part of a LLaVA",
            "take one such as Qwen2.5, Llama 3.2 or SmolLM2",
        )


def joined(llm: Any, tokenizer: Any, eyes: Eyes) -> tuple[Any, Any]:
    """Put an eye before a language model, unchecked; see `with_eyes`."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    tokenizer.padding_side = "left"
    if len(tokenizer) > llm.get_input_embeddings().num_embeddings:
        _grow(llm, len(tokenizer))
    hf = _assembled(_config(llm, eyes.size, tokenizer.convert_tokens_to_ids(IMAGE)))
    hf.load_state_dict(dict(eyes.weights), strict=False)
    hf = hf.to(device=llm.device, dtype=llm.dtype)
    hf.model.language_model = llm.base_model
    hf.lm_head = llm.get_output_embeddings()
    hf.generation_config = copy.deepcopy(llm.generation_config)
    return hf.eval(), _processor(tokenizer, eyes.size)


@torch.no_grad()
def _grow(llm: Any, size: int) -> None:
    """Give the vocabulary rows for new tokens, all of them the mean of the old ones, so that they are the same every time."""
    before = llm.get_input_embeddings().num_embeddings
    llm.resize_token_embeddings(size, mean_resizing=False)
    if hasattr(llm.base_model, "vocab_size"):
        llm.base_model.vocab_size = size  # transformers leaves the old number there, and reads the new one from a saved config
    for embedding in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        embedding.weight[before:] = embedding.weight[:before].float().mean(0).to(embedding.weight.dtype)


def _config(llm: Any, size: EyeSize, image_token: int = 0) -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.inner,
        image_size=size.pixels,
        patch_size=size.patch,
    )
    text = copy.deepcopy(llm.config)
    sizes: dict[str, Any] = {"image_token_index": image_token, "image_seq_length": size.tokens}
    return LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-2, **sizes)


def _assembled(config: Any) -> Any:
    """A LLaVA whose eye has random weights, and whose language model has none."""
    from transformers import CLIPVisionModel, LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    with torch.device("meta"):
        hf = LlavaForConditionalGeneration(config)
    hf.model.vision_tower = CLIPVisionModel(config.vision_config)
    hf.model.multi_modal_projector = LlavaMultiModalProjector(config)
    hf.model.language_model = nn.Identity()
    hf.lm_head = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return hf


def _processor(tokenizer: Any, size: EyeSize) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    square = {"height": size.pixels, "width": size.pixels}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=size.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=JOIN_PARTS + tokenizer.chat_template if tokenizer.chat_template else None,
    )
