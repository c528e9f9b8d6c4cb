"""Run taps in an nnsight trace: the driver of a `HookedModel`. No other module imports nnsight."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

with contextlib.suppress(ImportError):
    # nnsight mounts a method on `object`; beartype fails to import after that, so it goes first where it is installed.
    import beartype  # noqa: F401  # pyright: ignore[reportMissingImports]
with warnings.catch_warnings():
    # In a notebook without widgets, tqdm writes its bars as text and warns that it does.
    warnings.filterwarnings("ignore", message="IProgress not found")
    import nnsight
import torch
from torch import nn

from guardlens.models.architectures import Architecture
from guardlens.models.engine.compiler import Tap


def wrap(hf: nn.Module) -> nnsight.NNsight:
    """Wrap a model in nnsight."""
    with warnings.catch_warnings():
        # As in a Q-Former; no hook is in one.
        warnings.filterwarnings("ignore", message=r".*has a submodule named 'output'")
        return nnsight.NNsight(hf)


def drive(
    wrapped: nnsight.NNsight,
    cfg: Architecture,
    call: Callable[..., Any],
    inputs: dict[str, Any],
    taps: Sequence[Tap],
    *,
    beside_image: bool,
    steps: int = 1,
) -> Any:
    """Run `call` with the taps in place. One body serves forward passes and generation.

    Args:
        wrapped: The model in nnsight.
        cfg: The architecture of the model.
        call: The callable that runs it: the model, its decoder, or its `generate`.
        inputs: The arguments of the call.
        taps: The taps.
        beside_image: Whether the prompts show an image.
        steps: The largest number of forward passes: 1, or the number of tokens to generate.
    """
    if not taps:
        with torch.no_grad():
            return call(**inputs)
    result: list[Any] = []
    every = [(tap, wrapped.get(part.path), part) for tap in taps for part in [cfg.locate(tap.point, beside_image)]]
    every.sort(key=lambda placed: cfg.rank[placed[0].point])  # nnsight's order is that of execution in this model
    later, rows = [placed for placed in every if placed[0].decode], len(inputs["input_ids"])
    with warnings.catch_warnings():
        # A bounded iteration over decode steps may end early, at the end-of-sequence token.
        warnings.filterwarnings("ignore", message=r".*was never reached: the loop asked for a step")
        with torch.no_grad(), wrapped.trace(fn=partial(_boxed, result), called=partial(call, **inputs)) as tracer:
            # The inputs go as one, unseen: nnsight would move them to where the first weight is, which of an offloaded one is nowhere.
            for step in tracer.iter[: steps if later else 1]:  # type: ignore[attr-defined]
                for tap, envoy, part in every if step == 0 else later:
                    whole = getattr(envoy, part.side)
                    new = tap.fn(part.read(whole, tap.point.name, rows), step)
                    if new is not None:
                        setattr(envoy, part.side, part.write(whole, new))
    return result[0]


def _boxed(result: list[Any], called: Callable[[], Any]) -> Any:
    """What a call gives, which is kept: a trace returns nothing."""
    result.append(called())
    return result[0]
