"""Where: hook names (TransformerLens's, of both generations), layers, and token positions of the prompt."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, Literal, SupportsIndex

from guardlens.errors import MismatchError, SiteError, as_count, is_several, quoted

Positions = str | tuple[int | None, int | None]
"""One of `POSITIONS`, or `(start, stop)`: a slice of the prompt's real tokens, counted from either end."""

Layers = SupportsIndex | Iterable[SupportsIndex]
"""One layer or several, counted from 0: numbers, a range, an array, a column of a data frame."""

POSITIONS = ("last", "all", "image", "instruction", "post_instruction")


@dataclass(frozen=True)
class Hook:
    """One kind of place in a transformer.

    Attributes:
        name: Its short name, as in `cache["resid_post", 5]`.
        pattern: Its full TransformerLens name.
        stage: The embedding, the eye, the blocks, or what follows them.
        rank: Its place in the order of execution within a stage, or within a block.
        writable: Whether an edit there changes the residual stream as its name promises.
        aliases: Other full names for it.
        width: Of what width its one vector per token of the prompt is; empty where it has none, so that no `Site` can select some.
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
        """Whether there is one in every block."""
        return "{layer}" in self.pattern

    @property
    def space(self) -> str:
        """Of what its vectors are: what adds up to the residual stream is one space, any other hook is a space of its own."""
        return "resid_post" if self.width == "d_model" and self.stage != END else self.name

    def full_name(self, layer: int | None) -> str:
        """`blocks.5.hook_resid_post` for layer 5."""
        return self.pattern.format(layer=layer)


EMBEDDING, EYE, BLOCKS, END = range(4)
"""The stages of a run, in order of execution."""

HOOKS = {
    hook.name: hook
    for hook in (
        Hook("embed", "hook_embed", EMBEDDING, 0, aliases=("embed.hook_out",)),
        Hook("vision_resid_post", "vision.blocks.{layer}.hook_resid_post", EYE, 0, width=""),
        Hook("projector", "projector.hook_out", EYE, 1, width=""),
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
    """One hook of one model: a kind and a layer (None where there is only one)."""

    hook: str
    layer: int | None = None

    @property
    def name(self) -> str:
        """The full TransformerLens name."""
        return HOOKS[self.hook].full_name(self.layer)

    @property
    def order(self) -> tuple[int, float, int]:
        """Sorts points by execution."""
        hook = HOOKS[self.hook]
        return (hook.stage, float("inf") if self.layer is None else float(self.layer), hook.rank)


@dataclass(frozen=True)
class Site:
    """Where an edit writes or a read looks.

    Attributes:
        hook: A short name (`"resid_post"`) or a full one (`"blocks.3.hook_resid_post"`, which sets the layer too).
        layers: One layer or several, counted from 0; None leaves them free: all of them, and a sweep may choose.
        positions: Tokens of the prompt: `"last"`, `"all"`, `"image"`, `"instruction"` (what the user says, words that a presentation puts
            around the query included), `"post_instruction"` (what follows that) or `(start, stop)`.

    Raises:
        SiteError: There is no such hook or no such positions, or the layers are no whole numbers, contradict the hook's name, or are layers
            of a hook that is in no block.

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
                f"positions of {point.name if point.layer is not None else point.hook}, which has no vector per token of the prompt",
                "a hook that has, such as resid_post or z",
                "read it whole with model.run_with_cache, or change it with model.run_with_hooks",
            )
        layers = as_layers(self.layers)
        if layers is not None and not HOOKS[point.hook].layered:
            raise SiteError(f"the layers {list(layers)} of {point.name}, which is in no block", "no layers there", "leave layers out")
        if layers is not None and point.layer is not None and layers != (point.layer,):
            raise SiteError(
                f"the layers {list(layers)} beside the hook {point.name}", "one place", f"say hook={point.hook!r}, or no layers"
            )
        object.__setattr__(self, "hook", point.hook)
        object.__setattr__(self, "layers", layers if point.layer is None else (point.layer,))
        object.__setattr__(self, "positions", as_positions(self.positions))

    @property
    def free(self) -> bool:
        """Whether its layers are left open, so that a sweep may choose them."""
        return self.layers is None and HOOKS[self.hook].layered

    def points(self, n_layers: int) -> tuple[Point, ...]:
        """The points of this site in a model with `n_layers` layers, in order of execution.

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
    """One layer, several or None as a sorted tuple without repeats, or None. Layers may come out of an array or a data frame.

    Raises:
        SiteError: No layer among them, or something else than a whole number from 0 up.
    """
    if layers is None:
        return None
    if isinstance(layers, str | bytes | Mapping):
        raise SiteError(f"layers={quoted(layers)}", "one layer, or several", "say layers=5 or layers=[5, 6]")
    given: Any = layers if is_several(layers) else [layers]
    found = tuple(sorted({as_layer(layer) for layer in given}))
    if not found:
        raise SiteError("no layers", "one at least", "name some, or leave layers out for all of them")
    return found


def as_layer(layer: Any) -> int:
    """One layer as Python's own int.

    Raises:
        SiteError: Something else than a whole number from 0 up.
    """
    next_step = "count the layers from 0, in whole numbers; those of a mask are numpy.flatnonzero(mask)"
    return as_count(layer, "layer", SiteError, next_step, least=0)


def numbered(layers: Any, hook: str = "") -> tuple[int, ...]:
    """The layers of an axis as Python's integers, in their order. A hook without layers counts as layer -1.

    Args:
        layers: One, or several.
        hook: Whose layers they are; empty for any.

    Raises:
        SiteError: There is no such hook, or a layer is none or there twice.
    """
    if hook and (point := parse(hook)).layer is not None:
        raise SiteError(f"the hook {hook!r} with a layer in it", "its short name", f"say hook={point.hook!r} and layers=({point.layer},)")
    least = 0 if hook and HOOKS[parse(hook).hook].layered else -1
    given: Any = layers if is_several(layers) else [layers]
    numbers = tuple(as_count(layer, "layer", SiteError, "name each layer by its number", least) for layer in given)
    if len(set(numbers)) < len(numbers):
        raise SiteError(f"the layers {list(numbers)}, of which one is there twice", "each layer once", "leave the second one out")
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
    """One of `POSITIONS`, or `(start, stop)` in Python's own numbers.

    Raises:
        SiteError: Neither.
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
        "name tokens of the prompt; decode steps are a matter of .during('decode')",
    )


def require_same_space(what: str, hook: str, *used_at: str) -> None:
    """Refuse directions that were read at one hook where states of another space are. No hook fits all.

    Raises:
        MismatchError: Both are named.
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
    """All full hook names of a model with `n_layers` layers, in order of execution."""
    points = [Point(hook.name, layer) for hook in HOOKS.values() for layer in (range(n_layers) if hook.layered else (None,))]
    return [point.name for point in sorted(points, key=lambda point: point.order)]


def parse(name: str, n_layers: int | None = None) -> Point:
    """The point that a hook name means; layer None where the name leaves it open (`"resid_post"`).

    Raises:
        SiteError: Unknown; the closest known name is suggested if it is close. Or the layer is negative, or out of range of `n_layers`.
    """
    if not isinstance(name, str):
        raise SiteError(f"the hook name {quoted(name)}", "one hook name, as text", "say hook='resid_post'")
    short = name.removeprefix("hook_")
    if short in HOOKS:
        return Point(short)
    if re.search(r"\bblocks\.-\d+\.", name):
        raise SiteError(f"a negative layer in {name!r}", "layers counted from 0", 'count so; or ask the cache for ("resid_post", -1)')
    layer = re.search(r"(?<=\bblocks\.)\d+(?=\.)", name)
    generic = name if layer is None else f"{name[: layer.start()]}{{layer}}{name[layer.end() :]}"
    for hook in HOOKS.values():
        if generic in (hook.pattern, *hook.aliases):
            point = Point(hook.name, None if layer is None else int(layer[0]))
            if n_layers is not None and hook.stage == BLOCKS:
                _require_layer(point.layer, n_layers)
            return point
    known = [*HOOKS, *hook_names(n_layers or min(200, 1 + int(layer[0] if layer else 0)))]
    closest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    mine, its = (full.rpartition(".")[2].removeprefix("hook_") for full in (name, closest))
    close = difflib.SequenceMatcher(None, mine, its).ratio() > 0.75
    next_step = f"did you mean {closest!r}?" if close else "choose one of those; this one is not offered"
    raise SiteError(f"the hook name {name!r}", "a name from model.hook_names", next_step)
