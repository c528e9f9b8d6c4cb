"""Where each family of transformers keeps its parts: one generic rule, and exceptions as data. Knows modules, not nnsight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from guardlens.errors import ModelError
from guardlens.sites import HOOKS, Point
from guardlens.storage import digest

Side = Literal["input", "output"]

BLOCK: dict[str, tuple[tuple[str, ...], Side]] = {
    "resid_pre": (("",), "input"),
    "attn_out": (("self_attn", "attn", "attention"), "output"),
    "resid_mid": (("post_attention_layernorm", "ln_2"), "input"),
    "mlp_out": (("mlp", "block_sparse_moe"), "output"),
    "resid_post": (("",), "output"),
}
"""Hook -> the names that a block may use for the module, and which side of it is the hook's value."""

SANDWICH: dict[str, tuple[tuple[str, ...], Side]] = {
    "attn_out": (("post_attention_layernorm",), "output"),
    "resid_mid": (("pre_feedforward_layernorm",), "input"),
    "mlp_out": (("post_feedforward_layernorm",), "output"),
}
"""Blocks that normalise what they add (Gemma 2 and later): the added value is the norm's output."""

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@dataclass(frozen=True)
class Architecture:
    """Paths of the parts inside a Hugging Face model, and its sizes.

    Attributes:
        decoder: Path of the language model's stack of blocks.
        block_parts: Hook -> (path within a block, side).
        norm: Path of the final norm.
        embed: Path of the token embeddings.
        image_token_id: The token whose embedding an image replaces; None for a text-only model.
        image_size: Side of the square images that the vision tower sees, in pixels, where its config says so.
    """

    decoder: str
    block_parts: Mapping[str, tuple[str, Side]]
    norm: str
    embed: str
    n_layers: int
    d_model: int
    n_heads: int
    d_vocab: int
    image_token_id: int | None
    image_size: int | None

    def locate(self, point: Point) -> tuple[str, Side]:
        """Path of the module behind a point, and the side that is its value."""
        if point.hook == "embed":
            return self.embed, "output"
        if point.hook == "ln_final":
            return self.norm, "output"
        part, side = self.block_parts[point.hook]
        return ".".join(filter(None, (self.decoder, "layers", str(point.layer), part))), side

    @property
    def points(self) -> list[Point]:
        """All points of the model, in order of execution."""
        kinds = [Point("embed"), Point("ln_final")]
        kinds += [Point(hook, layer) for hook in self.block_parts for layer in range(self.n_layers)]
        return sorted(kinds, key=lambda point: point.order)


def find(hf: nn.Module) -> Architecture:
    """Find the parts of a model.

    Raises:
        ModelError: A part is missing; it is named.
    """
    decoder = _decoder(hf)
    blocks: Any = decoder.layers
    config: Any = hf.config
    text = config.get_text_config(decoder=True)
    norm = next((name for name in FINAL_NORMS if hasattr(decoder, name)), None)
    if norm is None:
        raise _missing(hf, "a final norm", f"one of {', '.join(FINAL_NORMS)} in {type(decoder).__name__}")
    image_token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    vision = getattr(config, "vision_config", None)
    size = getattr(vision, "image_size", None)
    return Architecture(
        decoder=_path(hf, decoder),
        block_parts=_block_parts(blocks[0]),
        norm=_path(hf, getattr(decoder, norm)),
        embed=_path(hf, hf.get_input_embeddings()),  # type: ignore[operator]
        n_layers=len(blocks),
        d_model=text.hidden_size,
        n_heads=text.num_attention_heads,
        d_vocab=text.vocab_size,
        image_token_id=image_token if vision is not None else None,
        image_size=size if isinstance(size, int) else None,
    )


def _decoder(hf: Any) -> Any:
    """The stack of blocks: `get_decoder()`, as often as needed (its answer may itself be a causal LM)."""
    module = hf
    for _ in range(4):
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            return module
        if not hasattr(module, "get_decoder") or (inner := module.get_decoder()) is module:
            break
        module = inner
    raise _missing(hf, "a stack of decoder blocks", "get_decoder() to lead to a module with .layers")


def _block_parts(block: nn.Module) -> dict[str, tuple[str, Side]]:
    rules = BLOCK | SANDWICH if hasattr(block, "pre_feedforward_layernorm") else BLOCK
    found = {}
    for hook in HOOKS:
        names, side = rules.get(hook, ((), "output"))
        name = next((name for name in names if not name or hasattr(block, name)), None)
        if name is not None:
            found[hook] = (name, side)
    return found


def _path(hf: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in hf.named_modules() if module is part)


def _missing(hf: nn.Module, what: str, expected: str) -> ModelError:
    return ModelError(
        f"{type(hf).__name__} without {what}", expected, "run `guardlens check MODEL`, and add the family to guardlens.architectures"
    )


def fingerprint(hf: nn.Module) -> str:
    """A digest of the weights: names, shapes and 64 values of each parameter. Quick for any size, and changes with any training."""
    parts = []
    for name, parameter in sorted(hf.named_parameters()):
        flat = parameter.detach().flatten()
        picked = (
            flat[torch.linspace(0, flat.numel() - 1, min(64, flat.numel())).long().to(flat.device)]
            if flat.device.type != "meta"
            else flat[:0]
        )
        parts += [f"{name}{tuple(parameter.shape)}".encode(), picked.float().cpu().numpy().tobytes()]
    return digest(*parts)
