"""Is the model itself measured? Guards, training mode and hooks of other code would change the results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from guardlens.errors import ModelError, warn
from guardlens.models.architectures import require_parts_alone, unwrapped
from guardlens.models.attachment import Attachment, require_uncompiled
from guardlens.models.engine.model_lock import taken

KNOWN_TO_HOOK = ("accelerate", "bitsandbytes", "guardlens", "nnsight", "peft", "torch", "transformers")
"""Packages whose hooks belong to the model as it was loaded."""

_REPORTED: WeakKeyDictionary[nn.Module, frozenset[tuple[str, int]]] = WeakKeyDictionary()
"""Model -> the hooks of other code that it had at the last check, by module path and identity."""


@contextmanager
def ready_turn(hf: Any) -> Iterator[None]:
    """Hold the model for this thread alone, once it is ready.

    Raises:
        ModelError: The model can't be measured as it is; see `require_ready`.
        InterventionError: It is running already, as within an edit that calls it.
    """
    with taken(hf) as is_first:
        if is_first:
            require_ready(hf)
        yield


def require_ready(hf: Any) -> None:
    """Check that the model can be measured, and warn of hooks of other code that run with it.

    Warns:
        UserWarning: A hook of other code runs with the model.

    Raises:
        ModelError: A guard is attached, a module is in training mode, torch.compile has wrapped the model, an adapter puts tokens of its
            own before the prompt, or the model returns tuples instead of outputs with names.
    """
    require_uncompiled(hf)
    require_parts_alone(hf)
    guard = Attachment.on(hf)
    if guard is not None:
        raise ModelError(
            f"a guard that is still attached: {guard!r}",
            "the model without it, since the guard would change whatever is measured",
            "call .remove() on the result of attach, or gl.models.attachment.Attachment.on(model.hf).remove()",
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
    _warn_of_hooks(hf)


def _warn_of_hooks(hf: nn.Module) -> None:
    """Warn of each hook of other code once while it is there, since the check is repeated for every batch."""
    there = {(path, id(hook)): hook for path, hook in foreign_hooks(hf)}
    reported = _REPORTED.get(hf, frozenset())
    for (path, number), hook in there.items():
        if (path, number) not in reported:
            where = path or type(hf).__name__
            warn(f"what guardlens measures includes the hook {hook_name(hook)} on {where}; remove it if it is left over")
    _REPORTED[hf] = frozenset(there)


def foreign_hooks(hf: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the hooks that do not belong to any package that the model was loaded with, each with the path of its module."""
    for path, module in hf.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        replaced = vars(module).get("forward")
        replaced = getattr(getattr(replaced, "state", None), "body", replaced)  # nnsight replaces forward, and keeps the one before here
        if replaced is not None and replaced is not type(module).forward:
            hooks += _with_closure(replaced)
        yield from ((path, hook) for hook in hooks if origin(hook) not in KNOWN_TO_HOOK)


def hook_name(hook: Callable[..., Any]) -> str:
    """Return the qualified name of a hook in its source."""
    found = _innermost(hook)
    return f"{found.__module__}.{getattr(found, '__qualname__', type(found).__qualname__)}"


def _with_closure(forward: Callable[..., Any]) -> list[Callable[..., Any]]:
    """A function that replaces the forward of a module's class, which acts like a hook, and the functions that it wraps."""
    in_closure = [cell.cell_contents for cell in getattr(forward, "__closure__", None) or ()]
    return [each for each in (forward, *in_closure) if callable(each)]


def origin(hook: Callable[..., Any]) -> str:
    """Return the name of the package that holds the hook's code."""
    return str(getattr(_innermost(hook), "__module__", "")).partition(".")[0]


def _innermost(hook: Callable[..., Any]) -> Any:
    """The function inside a partial; the class of a callable object."""
    while isinstance(hook, partial):
        hook = hook.func
    return hook if hasattr(hook, "__qualname__") else type(hook)
