"""The generic rule: from any model of transformers to the parts that the hooks of `guardlens.sites` name."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from guardlens.architectures import names
from guardlens.architectures.parts import Columns, Interleaved, Item, Joined, Normalised, Part
from guardlens.errors import ModelError, SiteError
from guardlens.sites import BLOCKS, EYE, HOOKS, Point


@dataclass(frozen=True)
class Architecture:
    """The parts of a Hugging Face model, and its sizes.

    Attributes:
        parts: Where the value of each hook is.
        decoder: Path of the language model's stack of blocks.
        blocks: Path of each block.
        norm: Path of the final norm.
        unembed: Path of the unembedding.
        n_layers: Blocks of the language model.
        d_model: Width of its residual stream.
        n_heads: Attention heads in a block.
        n_kv_heads: Heads of keys and values.
        d_head: Width of a head; 0 where blocks differ, or queries and values, or it was not found.
        d_vocab: Size of the vocabulary.
        image_token_id: The token that stands for an image; None for a text-only model.
        image_size: Side of the square images that the vision tower sees, in pixels, where its config says so.
        proven: Whether the family is one that the tests run on.
        image_layers: Blocks that run only beside an image (cross-attention).
        residual_scale: What attention and MLP are multiplied by before they are added to the residual stream.
        logit_scale: What the unembedding's output is multiplied by.
        softcap: c of c tanh(logits / c), the last step to the logits; None without.
        packed: Inputs that have the images of all prompts behind each other in their last axis.
        narrows: Whether the last blocks compute only the tokens whose logits are asked for, unless all are.
    """

    parts: Mapping[Point, Part]
    decoder: str
    blocks: tuple[str, ...]
    norm: str
    unembed: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_vocab: int
    image_token_id: int | None
    image_size: int | None
    proven: bool = False
    image_layers: frozenset[int] = frozenset()
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    packed: frozenset[str] = frozenset()
    narrows: bool = False

    @cached_property
    def points(self) -> list[Point]:
        """All points of the model, in order of execution."""
        return sorted(self.parts, key=self._order)

    def _order(self, point: Point) -> tuple[int | float, ...]:
        """The eye before the embedding where blocks see the image by cross-attention; patterns last of an attention that is read inside."""
        pattern = self.parts.get(Point("pattern", point.layer))
        if point.hook == "embed" and self.image_layers:
            return EYE, float("inf"), float("inf")
        if point.hook == "attn_out" and pattern and self.parts[point].path.startswith(f"{pattern.path}."):
            return (*point.order[:2], HOOKS["pattern"].rank - 0.5)
        return point.order

    @property
    def widths(self) -> dict[str, int]:
        """Width of the vectors at each kind of hook; see `guardlens.sites.Hook.width`."""
        sizes = {"d_model": self.d_model, "vocab": self.d_vocab}
        return sizes | ({"heads": self.n_heads * self.d_head, "kv_heads": self.n_kv_heads * self.d_head} if self.d_head else {})

    def computed(self, beside_image: bool) -> list[Point]:
        """The points that a run computes: without an image, of the blocks of `image_layers` only the residual stream, which passes them."""
        return [
            point
            for point in self.points
            if beside_image or ((self._runs(point, False) or point.hook.startswith("resid")) and HOOKS[point.hook].stage != EYE)
        ]

    def locate(self, point: Point, beside_image: bool = True) -> Part:
        """Where a point's value is.

        Args:
            point: The hook and the layer.
            beside_image: Whether the run sees an image. Without one, the residual stream passes the blocks of `image_layers` unchanged,
                so it is found at the next block that runs.

        Raises:
            SiteError: This model has no such point, or does not compute it without an image.
        """
        if point not in self.parts:
            name = point.hook if point.layer is None else point.name
            raise SiteError(f"{name}, which this model does not have", "one of model.hook_names", "choose another hook or layer")
        if self._runs(point, beside_image):
            return self.parts[point]
        if not point.hook.startswith("resid"):
            raise SiteError(f"{point.name} in a run without an image, where this block does not run", "a block that runs", "show an image")
        layer = next((layer for layer in range(point.layer or 0, self.n_layers) if layer not in self.image_layers), None)
        return self.parts[Point("ln_final")].before() if layer is None else self.parts[Point("resid_pre", layer)]

    def _runs(self, point: Point, beside_image: bool) -> bool:
        return beside_image or point.layer not in self.image_layers or HOOKS[point.hook].stage != BLOCKS

    def finish(self, logits: Tensor) -> Tensor:
        """What the model does to the unembedding's output: a scale, a cap."""
        scaled = logits * self.logit_scale
        return scaled if self.softcap is None else self.softcap * (scaled / self.softcap).tanh()


def find(hf: nn.Module) -> Architecture:
    """Find the parts of a model.

    Raises:
        ModelError: A part is missing; it is named. Or the family is refused, with the reason.
    """
    model: Any = hf
    config: Any = getattr(model, "config", None)
    if reason := names.REFUSED.get(getattr(config, "model_type", "")):
        raise ModelError(f"{type(hf).__name__}, a family that {reason}", "one residual stream per prompt", "use another model")
    language_model, decoder, blocks = _decoder(model)
    text = config.get_text_config(decoder=True)
    norm = _first(decoder, names.FINAL_NORM)
    if norm is None:
        raise _missing(model, "a final norm", f"one of {', '.join(names.FINAL_NORM)} in {type(decoder).__name__}")
    unembed = model.get_output_embeddings() or language_model.get_output_embeddings()
    if unembed is None:
        raise _missing(model, "an unembedding", "get_output_embeddings() to give it")
    token = next((getattr(config, name) for name in ("image_token_id", "image_token_index") if hasattr(config, name)), None)
    vision = getattr(config, "vision_config", None)
    size = getattr(vision, "image_size", None)
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
    top = {
        "embed": Part(paths[id(model.get_input_embeddings())]),
        "ln_final": Part(paths[id(norm)]),
        "ln_final_normalized": Part(paths[id(norm)], "input", _before_gain(norm)),
        "unembed": Part(paths[id(unembed)]),
    }
    head = model.get_submodule(top["unembed"].path.rpartition(".")[0])
    where = tuple(paths[id(block)] for block in blocks)
    parts = {Point(hook): part for hook, part in top.items()}
    parts |= {
        Point(hook, layer): part.under(where[layer])
        for layer, block in enumerate(blocks)
        for hook, part in _block_parts(block, text).items()
    }
    if vision is not None:
        parts |= _eye(model, paths, paths[id(decoder)])
    return Architecture(
        parts=parts,
        decoder=paths[id(decoder)],
        blocks=where,
        norm=top["ln_final"].path,
        unembed=top["unembed"].path,
        n_layers=len(blocks),
        d_model=text.hidden_size,
        n_heads=text.num_attention_heads,
        n_kv_heads=next((part.heads for point, part in parts.items() if point.hook == "k" and part.heads), text.num_attention_heads),
        d_head=_head_width(blocks, text),
        d_vocab=text.vocab_size,
        image_token_id=token if vision is not None else None,
        image_size=size if isinstance(size, int) else None,
        proven={config.model_type, text.model_type} <= names.PROVEN,
        image_layers=frozenset(getattr(text, "cross_attention_layers", None) or ()),
        residual_scale=_number(text, names.RESIDUAL_SCALE, 1.0),
        logit_scale=_number(text, _read(head, names.SCALE), 1.0) / _number(text, _read(head, names.DIVISOR), 1.0),
        softcap=_number(text, _read(head, names.SOFTCAP), None),
        packed=names.PACKED.get(config.model_type, frozenset()),
        narrows=bool(_number(text, names.NARROWING, 0)),
    )


def _decoder(model: Any) -> tuple[Any, Any, nn.ModuleList]:
    """The causal language model, its decoder and the blocks: `get_decoder()`, as often as needed."""
    language_model = module = model
    for _ in range(5):
        for name in names.STACK:
            if isinstance(blocks := getattr(module, name, None), nn.ModuleList):
                return language_model, module, blocks
        inner = module.get_decoder() if hasattr(module, "get_decoder") else None
        inner = _first(module, names.INNER) if inner is None or inner is module else inner
        if inner is None:
            break
        language_model, module = module, inner
    raise _missing(model, "a stack of decoder blocks", f"get_decoder() to lead to a module with one of {', '.join(names.STACK)}")


def _block_parts(block: nn.Module, text: Any) -> dict[str, Part]:
    """The parts of one block, their paths counted from it."""
    attention, mlp = _name(block, names.ATTENTION), _name(block, names.MLP)
    parallel = any(getattr(text, flag, False) for flag in names.PARALLEL)
    mark = next(mark for mark in names.WIRING if not mark or (getattr(block, mark, False) and not parallel))
    wired = dict(zip(("attn_out", "resid_mid", "mlp_out"), names.WIRING[mark], strict=True))
    parts = {"resid_pre": Part("", "input"), "resid_post": Part("")}
    for hook, where in wired.items():
        path, _, side = where.replace("ATTENTION", attention).replace("MLP", mlp).rpartition(".")
        if module := _within(block, path):
            listed = hook != "attn_out" and not {type(block).__name__, type(module).__name__}.isdisjoint(names.LISTED)
            parts[hook] = Part(path, side, listed=listed)  # type: ignore[arg-type]
    if attention:
        inside = _attention_parts(getattr(block, attention), text, cross=attention == "cross_attn")
        parts |= {hook: part.under(attention) for hook, part in inside.items()}
    return parts


def _attention_parts(attention: Any, text: Any, cross: bool) -> dict[str, Part]:
    """Queries, keys and values before any norm or rotation, and what the heads give. None of a linear attention."""
    heads = text.num_attention_heads
    width = _d_head(attention, text)
    found = {hook: _name(attention, candidates) for hook, candidates in (("q", names.QUERY), ("k", names.KEY), ("v", names.VALUE))}
    beside, by_head, out = (_name(attention, candidates) for candidates in (names.SIDE_BY_SIDE, names.HEAD_BY_HEAD, names.OUT))
    if found["q"]:
        parts = {hook: _heads(attention, path, width) for hook, path in found.items() if path and not (cross and hook != "q")}
        if parts["q"].heads == 2 * heads:
            parts["q"] = Part(parts["q"].path, view=Interleaved(0, 1, 2, heads), heads=heads)  # each head's query, then its gate
        elif found["q"] != names.QUERY[0]:
            parts["q"] = replace(parts["q"], heads=heads)
    elif beside:
        keys = (_width(getattr(attention, beside)) - heads * width) // 2
        edges = (0, heads * width, heads * width + keys, heads * width + 2 * keys)
        stretches = zip("qkv", edges[:-1], edges[1:], strict=True)
        parts = {hook: Part(beside, view=Columns(a, b), heads=(b - a) // width) for hook, a, b in stretches}
    elif by_head:
        groups = (_width(getattr(attention, by_head)) // width - heads) // 2
        each = heads // groups
        stretches = zip("qkv", (0, each, each + 1), (each, each + 1, each + 2), strict=True)
        parts = {hook: Part(by_head, view=Interleaved(a, b, each + 2, groups), heads=(b - a) * groups) for hook, a, b in stretches}
    else:
        return {}
    parts |= {"z": Part(out, "input", heads=heads)} if out else {}
    return parts if cross else parts | {"pattern": Part("", view=Item(1))}


def _d_head(attention: Any, text: Any) -> int:
    own = _number(attention, names.HEAD_WIDTH, None)
    return own or getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _head_width(blocks: nn.ModuleList, text: Any) -> int:
    attentions: list[Any] = [getattr(block, name) for block in blocks if (name := _name(block, names.ATTENTION))]
    headed = [attention for attention in attentions if _name(attention, (*names.QUERY, *names.SIDE_BY_SIDE, *names.HEAD_BY_HEAD))]
    widths = {_d_head(attention, text) for attention in headed}
    widths |= {attention.v_head_dim for attention in headed if hasattr(attention, "v_head_dim")}
    return widths.pop() if len(widths) == 1 else 0


def _heads(attention: nn.Module, path: str, width: int) -> Part:
    return Part(path, heads=_width(getattr(attention, path)) // width)


def _width(linear: Any) -> int:
    """Outputs of a linear layer, also of GPT-2's, of a quantised or an adapted one."""
    return getattr(linear, "out_features", None) or getattr(linear, "nf", None) or linear.weight.shape[0]


def _eye(model: Any, paths: Mapping[int, str], decoder: str) -> Iterator[tuple[Point, Part]]:
    """The vision tower's blocks, the longest list of modules of one class in it, and the projector."""
    tower = model.get_encoder(modality="image")
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(set(map(type, module))) == 1]
    for layer, block in enumerate(max(lists, key=len, default=())):
        yield Point("vision_resid_post", layer), Part(paths[id(block)])
    outside = [path for path in paths.values() if not path.startswith(f"{decoder}.")]
    for name in names.PROJECTOR:
        for path in sorted((path for path in outside if path.rpartition(".")[2] == name), key=len):
            yield Point("projector"), Part(path, view=Joined())
            return


def _before_gain(norm: Any) -> Normalised:
    epsilon = next((getattr(norm, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(norm, name)), 1e-5)
    return Normalised("RMS" not in type(norm).__name__, epsilon)


def _name(module: nn.Module, candidates: Iterable[str]) -> str:
    return next((name for name in candidates if isinstance(getattr(module, name, None), nn.Module)), "")


def _within(block: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a path; None where there is none."""
    return dict(block.named_modules()).get(path) if path else None


def _first(module: nn.Module, candidates: Iterable[str]) -> Any:
    name = _name(module, candidates)
    return getattr(module, name) if name else None


def _number(config: Any, candidates: Iterable[str], default: Any) -> Any:
    return next((value for name in candidates if (value := getattr(config, name, None)) is not None), default)


def _read(head: nn.Module, candidates: Iterable[str]) -> list[str]:
    """The names that the forward of the unembedding's owner mentions: a VLM's may leave out what its language model's does (Aya Vision)."""
    code = inspect.unwrap(type(head).forward).__code__
    return [name for name in candidates if name in (*code.co_names, *code.co_consts)]


def _missing(hf: nn.Module, what: str, expected: str) -> ModelError:
    return ModelError(
        f"{type(hf).__name__} without {what}",
        expected,
        "add the name that this family uses to guardlens/architectures/names.py (CONTRIBUTING.md shows how)",
    )
