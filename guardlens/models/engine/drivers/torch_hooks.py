"""Run taps in torch's own hooks, for one forward pass: the driver of an attached guard."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from guardlens.models.architectures import Architecture, Part
from guardlens.models.architectures.parts import Side
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.compiler import Tap


@contextmanager
def placed(hf: nn.Module, cfg: Architecture, taps: Sequence[Tap], step: int, batch: Batch) -> Iterator[None]:
    """Place hooks that run the taps in the forward passes inside.

    Args:
        hf: The model.
        cfg: The architecture of the model.
        taps: The taps, in order of execution.
        step: The decode step that the taps get: 0 for the prompts, then 1, 2, ...
        batch: The prompts.
    """
    with ExitStack() as stack:
        for tap in taps:
            part = cfg.locate(tap.point, batch.beside_image)
            changed = partial(_changed, part, tap, step, len(batch.mask))
            stack.callback(_register(hf.get_submodule(part.path), part.side, changed).remove)
        yield


def _changed(part: Part, tap: Tap, step: int, rows: int, whole: Any) -> Any:
    """The input or output of a module after the tap."""
    new = tap.fn(part.read(whole, tap.point.name, rows), step)
    return whole if new is None else part.write(whole, new)


def _register(module: nn.Module, side: Side, changed: Callable[[Any], Any]) -> RemovableHandle:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (changed(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, kwargs | {first: changed(kwargs[first])}

    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(lambda module, args, output: changed(output))
