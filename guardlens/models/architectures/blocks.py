"""The parts of one block: how attention and MLP join the residual stream, and which matrices they hold."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from guardlens.models.architectures.families import KNOWN, LISTED, PARALLEL, WIRING, Names, Wiring
from guardlens.models.architectures.lookup import first_name, first_number, within
from guardlens.models.architectures.parts import Columns, Interleaved, Item, Part


def block_parts(block: nn.Module, text: Any, names: Names, softmax: tuple[type, ...] = ()) -> dict[str, Part]:
    """Find the parts of one block; their paths count from the block.

    Args:
        block: The block.
        text: The language model's config.
        names: What parts may be called.
        softmax: The classes of attention that have patterns, if transformers lists them.
    """
    attention = _module(block, names.attention)
    mlp = _module(block, names.mlp)
    parts = {"resid_pre": Part("", "input"), "resid_post": Part("")}
    wiring = _wiring(block, text)
    for hook in ("attn_out", "resid_mid", "mlp_out"):
        path, _, side = getattr(wiring, hook).replace("ATTENTION", attention).replace("MLP", mlp).rpartition(".")
        if module := within(block, path):
            listed = hook != "attn_out" and not {type(block).__name__, type(module).__name__}.isdisjoint(LISTED)
            parts[hook] = Part(path, side, listed=listed)  # type: ignore[arg-type]
    if attention and (not softmax or isinstance(block.get_submodule(attention), softmax)):
        inside = _attention_parts(block.get_submodule(attention), text, names, cross=attention == "cross_attn")
        parts |= {hook: part.under(attention) for hook, part in inside.items()}
    if down := _down(block, mlp, names):
        parts["post"] = Part(down, "input")
    return parts


def _wiring(block: nn.Module, text: Any) -> Wiring:
    """The first row of `WIRING` that fits the block."""
    if any(getattr(text, flag, False) for flag in PARALLEL):
        return WIRING[-1]
    return next(wiring for wiring in WIRING if not wiring.marker or (getattr(block, wiring.marker, False) and _fits(block, wiring)))


def _fits(block: nn.Module, wiring: Wiring) -> bool:
    """Whether a block has the modules that a row of `WIRING` names."""
    paths = [part.rpartition(".")[0] for part in (wiring.attn_out, wiring.resid_mid, wiring.mlp_out)]
    named = [path for path in paths if path not in ("ATTENTION", "MLP")]
    # Paths inside of ATTENTION and MLP are BLOOM's alone, which calls the two by these names.
    found = [within(block, path.replace("ATTENTION", "self_attention").replace("MLP", "mlp")) for path in named]
    return not any(isinstance(module, nn.ModuleList | None) for module in found)


def _down(block: nn.Module, mlp: str, names: Names) -> str:
    """Path of the MLP's last matrix; empty if it has no single one, like a mixture of experts."""
    return first_name(block, (f"{mlp}.{name}" for name in names.down)) if mlp else ""


def _attention_parts(attention: Any, text: Any, names: Names, cross: bool) -> dict[str, Part]:
    """Queries, keys and values before any norm or rotation, the heads' outputs and the pattern; empty for linear attention."""
    if not getattr(text, "num_attention_heads", None):
        return {}
    parts = (
        _separate_matrices(attention, text, names, cross)
        or _one_matrix_side_by_side(attention, text, names)
        or _one_matrix_head_by_head(attention, text, names)
    )
    if not parts:
        return {}
    if out := first_name(attention, names.out):
        parts["z"] = Part(out, "input", heads=text.num_attention_heads)
    if not cross:
        parts["pattern"] = Part("", view=Item(1))
    return parts


def _separate_matrices(attention: Any, text: Any, names: Names, cross: bool) -> dict[str, Part]:
    """One matrix each for queries, keys and values. In cross-attention, keys and values belong to the image's tokens and are left out."""
    query = _matrix(attention, names.query)
    if not query:
        return {}
    heads = text.num_attention_heads
    width = _d_head(attention, text, names)
    parts = {"q": _heads(attention, query, width)}
    if parts["q"].heads == 2 * heads:
        parts["q"] = Part(query, view=Interleaved(0, 1, 2, heads), heads=heads)  # each head's query, then its gate
    elif query != KNOWN.query[0]:
        parts["q"] = replace(parts["q"], heads=heads)
    for hook, candidates in (("k", names.key), ("v", names.value)):
        path = _matrix(attention, candidates)
        if path and not cross:
            parts[hook] = _heads(attention, path, width)
    return parts


def _one_matrix_side_by_side(attention: Any, text: Any, names: Names) -> dict[str, Part]:
    """Columns of one matrix: all queries, then all keys, then all values."""
    path = _matrix(attention, names.side_by_side)
    if not path:
        return {}
    width = _d_head(attention, text, names)
    queries = text.num_attention_heads * width
    keys = (_width(attention.get_submodule(path)) - queries) // 2
    columns = {
        "q": Columns(0, queries),
        "k": Columns(queries, queries + keys),
        "v": Columns(queries + keys, queries + 2 * keys),
    }
    return {hook: Part(path, view=view, heads=(view.stop - view.start) // width) for hook, view in columns.items()}


def _one_matrix_head_by_head(attention: Any, text: Any, names: Names) -> dict[str, Part]:
    """Heads of one matrix, group by group: the queries that share a key and a value, then this key and this value."""
    path = _matrix(attention, names.head_by_head)
    if not path:
        return {}
    heads = text.num_attention_heads
    groups = (_width(attention.get_submodule(path)) // _d_head(attention, text, names) - heads) // 2
    queries = heads // groups
    views = {
        "q": Interleaved(0, queries, queries + 2, groups),
        "k": Interleaved(queries, queries + 1, queries + 2, groups),
        "v": Interleaved(queries + 1, queries + 2, queries + 2, groups),
    }
    return {hook: Part(path, view=view, heads=(view.stop - view.start) * groups) for hook, view in views.items()}


def _d_head(attention: Any, text: Any, names: Names) -> int:
    own = first_number(attention, names.head_width, None)
    return own or getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def head_width(blocks: nn.ModuleList, text: Any, names: Names, softmax: tuple[type, ...] = ()) -> int:
    """Width of a head; 0 if blocks differ, or if queries and values do."""
    if not getattr(text, "num_attention_heads", None):
        return 0
    attentions: list[Any] = [block.get_submodule(name) for block in blocks if (name := _module(block, names.attention))]
    query_names = (*names.query, *names.side_by_side, *names.head_by_head)
    headed = [each for each in attentions if (not softmax or isinstance(each, softmax)) and _matrix(each, query_names)]
    widths = {_d_head(attention, text, names) for attention in headed}
    widths |= {attention.v_head_dim for attention in headed if hasattr(attention, "v_head_dim")}
    return widths.pop() if len(widths) == 1 else 0


def mlp_width(blocks: nn.ModuleList, names: Names) -> int:
    """Number of neurons of an MLP; 0 if blocks differ or no MLP was found."""
    found: list[Any] = [block.get_submodule(path) for block in blocks if (path := _down(block, _module(block, names.mlp), names))]
    widths = {down.in_features for down in found}
    return widths.pop() if len(widths) == 1 else 0


def _heads(attention: nn.Module, path: str, width: int) -> Part:
    return Part(path, heads=_width(attention.get_submodule(path)) // width)


def _module(block: nn.Module, candidates: Iterable[str]) -> str:
    """The first candidate that is a module with a forward of its own, not a list of modules; empty if there is none."""
    return next((name for name in candidates if not isinstance(within(block, name), nn.ModuleList | None)), "")


def _matrix(attention: nn.Module, candidates: Iterable[str]) -> str:
    """The first candidate that is a single matrix; in some families, modules of these names consist of several."""
    return next((name for name in candidates if _width(within(attention, name))), "")


def _width(linear: Any) -> int:
    """The output width of a linear layer, also of GPT-2's, a quantised or an adapted one; 0 for anything else."""
    weight = getattr(linear, "weight", None)
    return getattr(linear, "out_features", None) or getattr(linear, "nf", None) or (0 if weight is None else weight.shape[0])
