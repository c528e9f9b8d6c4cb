"""Where to read or edit: hook names of both generations of TransformerLens, layers, and token positions of the prompt.

The hooks of a model, in the order in which a forward pass reaches them:

    model
    ├── embed                               hook_embed
    ├── vision encoder (not in a text-only model)
    │   ├── blocks.{layer}                  vision.blocks.{layer}.hook_resid_post
    │   └── projector                       projector.hook_out
    ├── blocks.{layer}                      blocks.{layer}.hook_resid_pre
    │   ├── attn                            blocks.{layer}.attn.hook_q, hook_k, hook_v, hook_z, hook_pattern
    │   │                                   blocks.{layer}.hook_attn_out
    │   │                                   blocks.{layer}.hook_resid_mid
    │   └── mlp                             blocks.{layer}.mlp.hook_post
    │                                       blocks.{layer}.hook_mlp_out
    │                                       blocks.{layer}.hook_resid_post
    ├── ln_final                            ln_final.hook_normalized, ln_final.hook_out
    └── unembed                             unembed.hook_out

Every hook also has a short name, its key in `HOOKS`: `"resid_post"` and layer 5 stand for `blocks.5.hook_resid_post`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, Literal, SupportsIndex

from guardlens.errors import MismatchError, SiteError, as_count, is_several, quoted

Positions = str | tuple[int | None, int | None]
"""One of `POSITIONS`, or `(start, stop)`: a slice of the prompt's tokens without padding, counted from either end."""

Layers = SupportsIndex | Iterable[SupportsIndex]
"""One layer or several, counted from 0: numbers, a range, an array or a column of a data frame."""

POSITIONS = ("last", "all", "image", "instruction", "post_instruction")

SIMILAR = 0.75
"""How similar (from 0 to 1) the last parts of two hook names must be for one to be suggested in place of the other."""

MOST_LAYERS = 200
"""Layers whose names are compared with an unknown name of a model that is not known."""


@dataclass(frozen=True)
class Hook:
    """A kind of hook: one place in a transformer, or the same place in each of its layers.

    Attributes:
        name: The short name, as in `cache["resid_post", 5]`.
        pattern: The full TransformerLens name, with `{layer}` in place of the number of the layer.
        stage: `EMBEDDING`, `VISION`, `BLOCKS` or `END`.
        rank: The place in the order of execution within the stage, or within one layer.
        writable: Whether an edit of this hook changes the residual stream as the name promises.
        aliases: Other full names for this hook.
        width: Which model dimension its per-token vector has. Empty for hooks without one vector per prompt token; `Site` rejects those.
    """

    name: str
    pattern: str
    stage: int
    rank: int
    writable: bool = True
    aliases: tuple[str, ...] = ()
    width: Literal["d_model", "heads", "kv_heads", "neurons", "vocab", ""] = "d_model"

    @property
    def layered(self) -> bool:
        """Whether every layer has this hook."""
        return "{layer}" in self.pattern

    @property
    def space(self) -> str:
        """The vector space of this hook. Everything added to the residual stream shares one space; every other hook has its own."""
        return "resid_post" if self.width == "d_model" and self.stage != END else self.name

    def full_name(self, layer: int | None) -> str:
        """The full name at a layer, such as `blocks.5.hook_resid_post` for layer 5."""
        return self.pattern.format(layer=layer)


EMBEDDING, VISION, BLOCKS, END = range(4)
"""The stages of a forward pass, in order of execution."""

HOOKS = {
    hook.name: hook
    for hook in (
        Hook("embed", "hook_embed", EMBEDDING, 0, aliases=("embed.hook_out",)),
        Hook("vision_resid_post", "vision.blocks.{layer}.hook_resid_post", VISION, 0, width=""),
        Hook("projector", "projector.hook_out", VISION, 1, width=""),
        Hook("resid_pre", "blocks.{layer}.hook_resid_pre", BLOCKS, 0, aliases=("blocks.{layer}.hook_in",)),
        Hook("q", "blocks.{layer}.attn.hook_q", BLOCKS, 1, aliases=("blocks.{layer}.attn.q.hook_out",), width="heads"),
        Hook("k", "blocks.{layer}.attn.hook_k", BLOCKS, 2, aliases=("blocks.{layer}.attn.k.hook_out",), width="kv_heads"),
        Hook("v", "blocks.{layer}.attn.hook_v", BLOCKS, 3, aliases=("blocks.{layer}.attn.v.hook_out",), width="kv_heads"),
        Hook("z", "blocks.{layer}.attn.hook_z", BLOCKS, 4, aliases=("blocks.{layer}.attn.o.hook_in",), width="heads"),
        Hook("pattern", "blocks.{layer}.attn.hook_pattern", BLOCKS, 5, writable=False, width=""),
        Hook("attn_out", "blocks.{layer}.hook_attn_out", BLOCKS, 6, aliases=("blocks.{layer}.attn.hook_out",)),
        Hook("resid_mid", "blocks.{layer}.hook_resid_mid", BLOCKS, 7, writable=False),
        Hook("post", "blocks.{layer}.mlp.hook_post", BLOCKS, 8, aliases=("blocks.{layer}.mlp.out.hook_in",), width="neurons"),
        Hook("mlp_out", "blocks.{layer}.hook_mlp_out", BLOCKS, 9, aliases=("blocks.{layer}.mlp.hook_out",)),
        Hook("resid_post", "blocks.{layer}.hook_resid_post", BLOCKS, 10, aliases=("blocks.{layer}.hook_out",)),
        Hook("ln_final_normalized", "ln_final.hook_normalized", END, 0, writable=False),
        Hook("ln_final", "ln_final.hook_out", END, 1),
        Hook("unembed", "unembed.hook_out", END, 2, width="vocab"),
    )
}


@dataclass(frozen=True)
class Point:
    """One hook of one model: a kind of hook and a layer (None for a hook that is in no layer)."""

    hook: str
    layer: int | None = None

    @property
    def name(self) -> str:
        """The full TransformerLens name."""
        return HOOKS[self.hook].full_name(self.layer)

    @property
    def order(self) -> tuple[int, float, int]:
        """A key that sorts points in order of execution."""
        hook = HOOKS[self.hook]
        return (hook.stage, float("inf") if self.layer is None else float(self.layer), hook.rank)


@dataclass(frozen=True)
class Site:
    """The place of a read or an edit: a hook, layers, and token positions of the prompt.

    Attributes:
        hook: A short name (`"resid_post"`) or a full one (`"blocks.3.hook_resid_post"`, which also sets the layer).
        layers: One layer or several, counted from 0. None means every layer, and lets a sweep choose.
        positions: Tokens of the prompt: `"last"`, `"all"`, `"image"`, `"instruction"` (the user's message, including words that a
            presentation adds around the query), `"post_instruction"` (the tokens after it) or `(start, stop)`.

    Raises:
        SiteError: The hook or the positions do not exist, a layer is not a whole number, the layers contradict the name of the hook, or
            layers are given for a hook that is in no layer.

    Examples:
        >>> gl.Site("blocks.3.hook_resid_post")
        Site(hook='resid_post', layers=(3,), positions='last')
        >>> [point.name for point in gl.Site("z", layers=[5, 6]).points(model.cfg.n_layers)]
        ['blocks.5.attn.hook_z', 'blocks.6.attn.hook_z']
    """

    hook: str = "resid_post"
    layers: tuple[int, ...] | None = None
    positions: Positions = "last"

    def __post_init__(self) -> None:
        point = parse(self.hook)
        if not HOOKS[point.hook].width:
            raise SiteError(
                f"The hook {point.hook} has no vector per token of the prompt, so a site cannot select positions there.",
                "a hook with one vector per token, such as resid_post or z",
                "read it whole with model.run_with_cache, or change it with model.run_with_hooks",
            )
        layers = as_layers(self.layers)
        if layers is not None and not HOOKS[point.hook].layered:
            raise SiteError(f"the layers {list(layers)} of {point.name}, which is in no layer", "no layers there", "leave layers out")
        if layers is not None and point.layer is not None and layers != (point.layer,):
            raise SiteError(
                f"the layers {list(layers)} beside the hook {point.name}", "one place", f"say hook={point.hook!r}, or leave layers out"
            )
        object.__setattr__(self, "hook", point.hook)
        object.__setattr__(self, "layers", layers if point.layer is None else (point.layer,))
        object.__setattr__(self, "positions", as_positions(self.positions))

    @property
    def free(self) -> bool:
        """Whether the layers are left open, so that a sweep may choose them."""
        return self.layers is None and HOOKS[self.hook].layered

    def points(self, n_layers: int) -> tuple[Point, ...]:
        """List the points of this site in a model with `n_layers` layers, in order of execution.

        Raises:
            SiteError: A layer is out of range.
        """
        if not HOOKS[self.hook].layered:
            return (Point(self.hook),)
        layers = range(n_layers) if self.layers is None else self.layers
        for layer in layers:
            _require_layer(layer, n_layers)
        return tuple(Point(self.hook, layer) for layer in layers)


def as_layers(layers: Layers | None) -> tuple[int, ...] | None:
    """Return layers as a sorted tuple without repeats, and None as None.

    Raises:
        SiteError: The collection is empty, or a layer is not a whole number from 0 up.
    """
    if layers is None:
        return None
    if isinstance(layers, str | bytes | Mapping):
        raise SiteError(f"layers={quoted(layers)}", "one layer, or several", "say layers=5 or layers=[5, 6]")
    given: Any = layers if is_several(layers) else [layers]
    found = tuple(sorted({as_layer(layer) for layer in given}))
    if not found:
        raise SiteError("no layers", "at least one", "name some, or leave layers out for all of them")
    return found


def as_layer(layer: Any) -> int:
    """Return one layer as a Python int.

    Raises:
        SiteError: The layer is not a whole number from 0 up.
    """
    next_step = "count layers from 0, in whole numbers; turn a mask into numbers with numpy.flatnonzero(mask)"
    return as_count(layer, "layer", SiteError, next_step, least=0)


def axis_layers(layers: Any, hook: str = "") -> tuple[int, ...]:
    """Return the layers of an axis as Python integers, in their order. The single entry of a hook that is in no layer is layer -1.

    Args:
        layers: One layer or several.
        hook: The short name of the hook that has these layers; empty for any hook.

    Raises:
        SiteError: The hook does not exist or its name includes a layer, or a layer is not a whole number or appears twice.
    """
    point = parse(hook) if hook else None
    if point is not None and point.layer is not None:
        raise SiteError(f"the hook {hook!r} with a layer in it", "its short name", f"say hook={point.hook!r} and layers=({point.layer},)")
    least = 0 if point is not None and HOOKS[point.hook].layered else -1
    given: Any = layers if is_several(layers) else [layers]
    numbers = tuple(as_count(layer, "layer", SiteError, "name each layer by its number", least) for layer in given)
    if len(set(numbers)) < len(numbers):
        raise SiteError(f"One of the layers {list(numbers)} appears twice.", "each layer once")
    return numbers


def layer_index(layers: tuple[int, ...] | None, layer: int | None, owner: str) -> int:
    """Return where a layer is on an axis with one entry per layer; 0 if the axis has a single entry that serves every layer.

    Args:
        layers: The layer of each entry; None for a single entry that serves every layer.
        layer: The layer to find.
        owner: What the axis belongs to, for the error message.

    Raises:
        SiteError: There is no entry for the layer.

    Examples:
        >>> from guardlens.hooks import layer_index
        >>> layer_index((4, 5, 6), 5, "these states"), layer_index(None, 5, "these states")
        (1, 0)
    """
    if layers is None:
        return 0
    number = None if layer is None else as_count(layer, "layer", SiteError, "name one layer by its number", least=-1)
    if number not in layers:
        raise SiteError(f"{owner} at layer {number}", f"one of the layers {list(layers)}", "collect that layer too, or choose one of these")
    return layers.index(number)


def as_positions(positions: Any) -> Positions:
    """Return positions with the ends of a slice as Python integers.

    Raises:
        SiteError: The positions are neither one of `POSITIONS` nor a slice `(start, stop)` that can hold a token.
    """
    if isinstance(positions, str) and positions in POSITIONS:
        return positions
    if isinstance(positions, tuple | list) and len(positions) == 2 and not any(isinstance(end, bool) for end in positions):
        try:
            start, stop = (None if end is None else index(end) for end in positions)
        except TypeError:
            start = stop = 0
        if start is None or stop is None or (start < 0) != (stop < 0) or start < stop:
            return start, stop
    raise SiteError(
        f"the positions {quoted(positions)}",
        f"one of {', '.join(map(repr, POSITIONS))} or (start, stop) with start before stop",
        "name tokens of the prompt; edit decode steps with .during('decode')",
    )


def require_same_space(what: str, hook: str, *used_at: str) -> None:
    """Reject directions that are used at a hook whose vectors live in another space. An empty `hook` fits everywhere.

    Args:
        what: The subject of the error message, such as "the directions 'ssd(rank=1)'".
        hook: The hook at which the directions were read.
        used_at: The hooks at which they are used.

    Raises:
        MismatchError: The two hooks, which are named, have different spaces.
    """
    made_in = hook and HOOKS[parse(hook).hook].space
    other = next((name for name in used_at if made_in and HOOKS[parse(name).hook].space != made_in), None)
    if other is not None:
        raise MismatchError(
            f"{what} of the hook {hook}, at {other}",
            "one space: directions of the residual stream and of what is added to it, or of one hook such as z",
            f"collect with site=Site({other!r}), or edit with .at(hook={hook!r})",
        )


def _require_layer(layer: int | None, n_layers: int) -> None:
    if layer is not None and not 0 <= layer < n_layers:
        raise SiteError(f"layer {layer}", f"a layer from 0 to {n_layers - 1}", "choose one that this model has")


def hook_names(n_layers: int) -> list[str]:
    """List the full hook names of a model with `n_layers` layers, in order of execution."""
    points = [Point(hook.name, layer) for hook in HOOKS.values() for layer in (range(n_layers) if hook.layered else (None,))]
    return [point.name for point in sorted(points, key=lambda point: point.order)]


def parse(name: str, n_layers: int | None = None) -> Point:
    """Return the point that a hook name stands for. Its layer is None if the name leaves the layer open, as `"resid_post"` does.

    Raises:
        SiteError: The name is unknown (a similar known name is suggested), or its layer is negative or not below `n_layers`.
    """
    if not isinstance(name, str):
        raise SiteError(f"the hook name {quoted(name)}", "one hook name, as text", "say hook='resid_post'")
    short = name.removeprefix("hook_")
    if short in HOOKS:
        return Point(short)
    if re.search(r"\bblocks\.-\d+\.", name):
        raise SiteError(f"a negative layer in {name!r}", "layers counted from 0", 'or ask the cache for ("resid_post", -1)')
    layer = re.search(r"(?<=\bblocks\.)\d+(?=\.)", name)
    generic = name if layer is None else f"{name[: layer.start()]}{{layer}}{name[layer.end() :]}"
    for hook in HOOKS.values():
        if generic in (hook.pattern, *hook.aliases):
            point = Point(hook.name, None if layer is None else int(layer[0]))
            if n_layers is not None and hook.stage == BLOCKS:
                _require_layer(point.layer, n_layers)
            return point
    n_named = n_layers or min(MOST_LAYERS, 1 + int(layer[0] if layer else 0))
    raise _unknown_hook(name, [*HOOKS, *hook_names(n_named)])


def _unknown_hook(name: str, known: list[str]) -> SiteError:
    """The error about an unknown name, with the most similar known name if their last parts are alike."""
    closest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    last_part, last_part_of_closest = (full.rpartition(".")[2].removeprefix("hook_") for full in (name, closest))
    alike = difflib.SequenceMatcher(None, last_part, last_part_of_closest).ratio() > SIMILAR
    next_step = f"did you mean {closest!r}?" if alike else "choose one of those; this one is not offered"
    return SiteError(f"the hook name {name!r}", "a name from model.hook_names", next_step)
