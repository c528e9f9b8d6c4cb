"""`run_with_cache` and `run_with_hooks` as taps: the first keeps whole values, the second passes them to the user's functions."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from guardlens.errors import InterventionError, SiteError, is_several, quoted, type_of
from guardlens.hooks import Point, parse
from guardlens.models.architectures import Architecture, Part
from guardlens.models.engine.compiler import Tap

HookFunction = Callable[[Tensor, Any], Tensor | None]
NamesFilter = str | Iterable[str] | Callable[[str], bool] | None


@dataclass(frozen=True)
class HookPoint:
    """The second argument of a hook function: where it runs."""

    name: str
    index: int | None

    def layer(self) -> int | None:
        """The layer; None where the hook has none."""
        return self.index


def cache_taps(cfg: Architecture, names: NamesFilter, computed: Sequence[Point]) -> tuple[list[Tap], dict[Point, Tensor]]:
    """Return taps that keep the values of the named hooks (of all `computed` ones for None), and the dictionary that they will fill."""
    kept: dict[Point, Tensor] = {}
    chosen = computed if names is None else matching(cfg, names)
    return [Tap(point, _Keep(kept, point, cfg.locate(point))) for point in chosen], kept


def hook_taps(cfg: Architecture, hooks: Sequence[tuple[str | Callable[[str], bool], HookFunction]]) -> list[Tap]:
    """Return taps that call the user's functions, in order of execution."""
    placed = [(point, fn) for names, fn in _pairs(hooks) for point in matching(cfg, names)]
    taps = [Tap(point, _Call(fn, HookPoint(point.name, point.layer), cfg.locate(point))) for point, fn in placed]
    return sorted(taps, key=lambda tap: tap.point.order)


def _pairs(hooks: Any) -> Iterator[tuple[Any, Any]]:
    for pair in hooks if is_several(hooks) else [hooks]:
        if not (isinstance(pair, Sequence) and len(pair) == 2 and callable(pair[1])):
            raise InterventionError(
                f"the hook {quoted(pair)}", "pairs of a hook name and a function", "say fwd_hooks=[('blocks.3.hook_resid_post', fn)]"
            )
        yield pair[0], pair[1]


def matching(cfg: Architecture, names: str | Iterable[str] | Callable[[str], bool]) -> list[Point]:
    """Return the points that names or a predicate select, in order of execution.

    Raises:
        SiteError: A name is unknown (the closest is suggested), or this model lacks the hook.
    """
    if callable(names):
        return [point for point in cfg.points if names(point.name)]
    if not isinstance(names, str) and not is_several(names):
        raise SiteError(type_of(names), "a hook name, several, or a predicate", "say names_filter='resid_post'")
    wanted = [parse(name, cfg.n_layers) for name in ([names] if isinstance(names, str) else names)]
    found = {point for point in cfg.points if point in wanted or replace(point, layer=None) in wanted}
    for point in wanted:
        if not any(point in (one, replace(one, layer=None)) for one in found):
            cfg.locate(point)
    return sorted(found, key=lambda point: point.order)


@dataclass(frozen=True, eq=False)
class _Keep:
    kept: dict[Point, Tensor]
    point: Point
    part: Part

    def __call__(self, value: Tensor, step: int) -> None:
        self.kept[self.point] = self.part.split(value).clone()


@dataclass(frozen=True, eq=False)
class _Call:
    fn: HookFunction
    hook: HookPoint
    part: Part

    def __call__(self, value: Tensor, step: int) -> Tensor | None:
        given = self.part.split(value)
        new = self.fn(given, self.hook)
        if new is None:
            return None
        if getattr(new, "shape", None) != given.shape:
            made = f"shape {tuple(new.shape)}" if isinstance(new, Tensor) else f"type {type(new).__name__}"
            raise InterventionError(
                f"a hook function at {self.hook.name} that gives something of {made}",
                f"a value of shape {tuple(given.shape)}, or None to leave it",
                "return the value that it receives, changed",
            )
        return self.part.join(new.to(given))
