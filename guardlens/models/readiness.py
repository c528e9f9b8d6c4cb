"""The condition that a model must be in, so that what is measured is the model itself."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from guardlens.errors import ModelError, warn
from guardlens.models.architectures import require_parts_alone, unwrapped
from guardlens.models.attachment import Attachment, require_uncompiled

KNOWN_TO_HOOK = ("accelerate", "bitsandbytes", "guardlens", "nnsight", "peft", "torch", "transformers")
"""Packages whose hooks belong to the model as it was loaded."""


_SAID: "WeakKeyDictionary[nn.Module, frozenset[tuple[str, int]]]" = WeakKeyDictionary()
"""The hooks of other code, by path and identity, that a model had when it was last looked at."""


def require_ready(hf: Any) -> None:
    """Refuse a model under a guard or in training, and say which hooks of other code run with it.

    Raises:
        ModelError: A guard is attached, a module is in training mode, torch.compile has wrapped it, an adapter puts tokens of its own
            before the prompt, or the model gives tuples instead of what has names.
    """
    require_uncompiled(hf)
    require_parts_alone(hf)
    guard = Attachment.on(hf)
    if guard is not None:
        raise ModelError(
            f"a guard that is still attached: {guard!r}",
            "the model without it: whatever is measured would be the guard's doing, too",
            "call .remove() on what attach gave, or gl.models.attachment.Attachment.on(model.hf).remove()",
        )
    if not getattr(unwrapped(hf).config, "return_dict", True):
        raise ModelError("a model with config.return_dict=False", "outputs that have names", "set model.hf.config.return_dict = True")
    for path, module in hf.named_modules():
        if module.training:
            raise ModelError(
                f"training mode in {path or type(hf).__name__}: dropout and the like would make every number random",
                "evaluation mode",
                "call model.hf.eval(), and .train() again before you train on",
            )
    _say_hooks(hf)


def _say_hooks(hf: nn.Module) -> None:
    """Say which hooks of other code run with a model, each once while it is there: work of many batches looks at each of them."""
    there = {(path, id(hook)): hook for path, hook in foreign_hooks(hf)}
    for (path, number), hook in there.items():
        if (path, number) not in _SAID.get(hf, ()):
            where = path or type(hf).__name__
            warn(f"what guardlens measures includes the hook {hook_name(hook)} on {where}; remove it if it is left over")
    _SAID[hf] = frozenset(there)


def foreign_hooks(hf: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The hooks that run with a model and belong to none of the packages that it is loaded with, each with the path of its module."""
    for path, module in hf.named_modules():
        for hook in _hooks(module):
            if origin(hook) not in KNOWN_TO_HOOK:
                yield path, hook


def hook_name(hook: Callable[..., Any]) -> str:
    """What a hook is called where it is written."""
    found = _innermost(hook)
    return f"{found.__module__}.{getattr(found, '__qualname__', type(found).__qualname__)}"


def _hooks(module: nn.Module) -> Iterator[Callable[..., Any]]:
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()
    yield from _forwards(module)


def _forwards(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """What stands in for the forward of its class, if something does: as good as a hook."""
    forward = vars(module).get("forward")
    forward = getattr(getattr(forward, "state", None), "body", forward)  # nnsight keeps here what it stands in for itself
    if forward is not None and forward is not type(module).forward:
        held = [cell.cell_contents for cell in getattr(forward, "__closure__", None) or ()]
        yield from (each for each in (forward, *held) if callable(each))


def origin(hook: Callable[..., Any]) -> str:
    """The package that the hook's code is of."""
    return str(getattr(_innermost(hook), "__module__", "")).partition(".")[0]


def _innermost(hook: Callable[..., Any]) -> Any:
    """The function of a partial; the class of an object that is called."""
    while isinstance(hook, partial):
        hook = hook.func
    return hook if hasattr(hook, "__qualname__") else type(hook)
