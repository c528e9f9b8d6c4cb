"""The parts of one block: how attention and MLP join the residual stream, and what is inside of these."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from guardlens.models.architectures.families import KNOWN, LISTED, PARALLEL, WIRING, Names
from guardlens.models.architectures.parts import Columns, Interleaved, Item, Part
from guardlens.models.architectures.search import first_name, first_number, within


def block_parts(block: nn.Module, text: Any, names: Names, softmax: tuple[type, ...] = ()) -> dict[str, Part]:
    """The parts of one block, their paths counted from it.

    Args:
        block: The block.
        text: The language model's config.
        names: What parts may be called.
        softmax: Classes of the attentions that have patterns, where they are known.
    """
    attention, mlp = _module(block, names.attention), _module(block, names.mlp)
    parallel = any(getattr(text, flag, False) for flag in PARALLEL)
    wired = next(row for mark, *row in WIRING if not mark or (not parallel and getattr(block, mark, False) and _fits(block, row)))
    parts = {"resid_pre": Part("", "input"), "resid_post": Part("")}
    for hook, where in zip(("attn_out", "resid_mid", "mlp_out"), wired, strict=True):
        path, _, side = where.replace("ATTENTION", attention).replace("MLP", mlp).rpartition(".")
        if module := within(block, path):
            listed = hook != "attn_out" and not {type(block).__name__, type(module).__name__}.isdisjoint(LISTED)
            parts[hook] = Part(path, side, listed=listed)  # type: ignore[arg-type]
    if attention and (not softmax or isinstance(block.get_submodule(attention), softmax)):
        inside = _attention_parts(block.get_submodule(attention), text, names, cross=attention == "cross_attn")
        parts |= {hook: part.under(attention) for hook, part in inside.items()}
    if down := _down(block, mlp, names):
        parts["post"] = Part(down, "input")
    return parts


def _fits(block: nn.Module, row: Sequence[str]) -> bool:
    """Whether a block has the norms of a row of `WIRING`, and BLOOM's matrices."""
    paths = [where.rpartition(".")[0] for where in row]
    named = [path for path in paths if path not in ("ATTENTION", "MLP")]
    found = [within(block, path.replace("ATTENTION", "self_attention").replace("MLP", "mlp")) for path in named]
    return not any(isinstance(module, nn.ModuleList | None) for module in found)


def _down(block: nn.Module, mlp: str, names: Names) -> str:
    """Path of the MLP's last matrix; empty where it has none of its own, as a mixture of experts."""
    return first_name(block, (f"{mlp}.{name}" for name in names.down)) if mlp else ""


def _attention_parts(attention: Any, text: Any, names: Names, cross: bool) -> dict[str, Part]:
    """Queries, keys and values before any norm or rotation, and what the heads give. None of a linear attention."""
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        return {}
    width = _d_head(attention, text, names)
    found = {hook: _matrix(attention, candidates) for hook, candidates in zip("qkv", (names.query, names.key, names.value), strict=True)}
    beside, by_head = (_matrix(attention, candidates) for candidates in (names.side_by_side, names.head_by_head))
    out = first_name(attention, names.out)
    if found["q"]:
        parts = {hook: _heads(attention, path, width) for hook, path in found.items() if path and not (cross and hook != "q")}
        if parts["q"].heads == 2 * heads:
            parts["q"] = Part(parts["q"].path, view=Interleaved(0, 1, 2, heads), heads=heads)  # each head's query, then its gate
        elif found["q"] != KNOWN.query[0]:
            parts["q"] = replace(parts["q"], heads=heads)
    elif beside:
        keys = (_width(attention.get_submodule(beside)) - heads * width) // 2
        edges = (0, heads * width, heads * width + keys, heads * width + 2 * keys)
        stretches = zip("qkv", edges[:-1], edges[1:], strict=True)
        parts = {hook: Part(beside, view=Columns(a, b), heads=(b - a) // width) for hook, a, b in stretches}
    elif by_head:
        groups = (_width(attention.get_submodule(by_head)) // width - heads) // 2
        each = heads // groups
        stretches = zip("qkv", (0, each, each + 1), (each, each + 1, each + 2), strict=True)
        parts = {hook: Part(by_head, view=Interleaved(a, b, each + 2, groups), heads=(b - a) * groups) for hook, a, b in stretches}
    else:
        return {}
    parts |= {"z": Part(out, "input", heads=heads)} if out else {}
    return parts if cross else parts | {"pattern": Part("", view=Item(1))}


def _d_head(attention: Any, text: Any, names: Names) -> int:
    own = first_number(attention, names.head_width, None)
    return own or getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def head_width(blocks: nn.ModuleList, text: Any, names: Names, softmax: tuple[type, ...] = ()) -> int:
    """Width of a head; 0 where blocks differ, or queries and values."""
    attentions: list[Any] = [block.get_submodule(name) for block in blocks if (name := _module(block, names.attention))]
    attentions = [attention for attention in attentions if not softmax or isinstance(attention, softmax)]
    headed = [attention for attention in attentions if _matrix(attention, (*names.query, *names.side_by_side, *names.head_by_head))]
    if not getattr(text, "num_attention_heads", None):
        return 0
    widths = {_d_head(attention, text, names) for attention in headed}
    widths |= {attention.v_head_dim for attention in headed if hasattr(attention, "v_head_dim")}
    return widths.pop() if len(widths) == 1 else 0


def mlp_width(blocks: nn.ModuleList, names: Names) -> int:
    """Neurons of an MLP; 0 where blocks differ, or none was found."""
    found: list[Any] = [block.get_submodule(path) for block in blocks if (path := _down(block, _module(block, names.mlp), names))]
    widths = {down.in_features for down in found}
    return widths.pop() if len(widths) == 1 else 0


def _heads(attention: nn.Module, path: str, width: int) -> Part:
    return Part(path, heads=_width(attention.get_submodule(path)) // width)


def _module(block: nn.Module, candidates: Iterable[str]) -> str:
    """The first candidate that is a module with a forward, not a list of several."""
    return next((name for name in candidates if not isinstance(within(block, name), nn.ModuleList | None)), "")


def _matrix(attention: nn.Module, candidates: Iterable[str]) -> str:
    """The first candidate that is one matrix: some families' modules of these names are made of several."""
    return next((name for name in candidates if _width(within(attention, name))), "")


def _width(linear: Any) -> int:
    """Outputs of a linear layer, also of GPT-2's, of a quantised or an adapted one; 0 of what is none."""
    weight = getattr(linear, "weight", None)
    return getattr(linear, "out_features", None) or getattr(linear, "nf", None) or (0 if weight is None else weight.shape[0])
