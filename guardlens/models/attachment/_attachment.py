"""`Attachment`: the hooks that run an intervention in every forward pass of a Hugging Face model."""

import inspect
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from threading import get_ident
from types import FrameType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from guardlens.errors import InterventionError, ModelError
from guardlens.interventions.intervention import Intervention
from guardlens.models.architectures import unwrapped
from guardlens.models.attachment._guarded_run import RunStarter, RunTracker
from guardlens.models.engine.drivers.torch_hooks import placed
from guardlens.models.engine.generation_options import merged, require_stepwise
from guardlens.models.engine.replaced_forwards import argument_names
from guardlens.models.engine.run import require_finite_step


@dataclass(frozen=True, eq=False)
class _Forward:
    """A forward pass in progress.

    Attributes:
        module: The module that was called: the model, or an adapter around it.
        hooks: The hooks of the taps.
        logits_to_keep: The tokens for which the caller wants logits; 0 for all.
        caller: The frame that runs the forward pass.
    """

    module: nn.Module
    hooks: ExitStack
    logits_to_keep: int | Tensor
    caller: FrameType

    @property
    def running(self) -> bool:
        """Whether it is still running, perhaps in another thread. A KeyboardInterrupt ends one without torch calling its hooks."""
        try:
            self.caller.clear()
        except RuntimeError:  # raised for a frame that is still executing
            return True
        return False


class Attachment:
    """An intervention on a Hugging Face model. Made by `attach`; used as a context manager, it is removed at the end.

    A forward pass with an empty KV cache brings new prompts, which must be whole. One with the cache that they filled, or without a cache
    and with one more token, is the next decode step of their answers. Each row is a prompt of its own, even if it repeats another one
    (beams, several answers). Threads that share the model must take turns, since only one forward pass may run at a time. NaN and infinity
    raise NumericsError.

    Attributes:
        intervention: The intervention.

    Examples:
        >>> handle = gl.attach(guard.at(layers=7), model.hf, model.processor)
        >>> tokens = model.hf.generate(**model.batch(queries[1], grey).inputs, max_new_tokens=16)
        >>> handle.remove()
        >>> "sorry" in model.decode(tokens)[0]
        True
    """

    def __init__(self, starter: RunStarter) -> None:
        self.intervention: Intervention = starter.intervention
        self._hf = starter.hf
        self._cfg = starter.cfg
        self._inner = unwrapped(self._hf)
        # Taps count columns from the left, so they must meet all tokens, even if the caller wants the logits of the last one alone.
        self._needs_all_tokens = self._cfg.narrows or any(step.site.hook == "unembed" for step in self.intervention.steps)
        # The class's forward: wrappers replace that of the object.
        self._argument_names = argument_names(type(self._inner))
        self._tracker = RunTracker(starter)
        self._forward: _Forward | None = None
        self._refused: list[int] = []
        self._handles: list[Any] = []

    @classmethod
    def on(cls, hf: Any) -> "Attachment | None":
        """Return the attachment on a model, or None.

        Examples:
            >>> handle = gl.attach(guard.at(layers=7), model.hf, model.processor)
            >>> found = gl.models.attachment.Attachment.on(model.hf)
            >>> found is handle
            True
            >>> found.remove()
        """
        owners = (getattr(hook, "__self__", None) for hook in unwrapped(hf)._forward_pre_hooks.values())
        return next((owner for owner in owners if isinstance(owner, cls)), None)

    @property
    def decisions(self) -> dict[tuple[int, int | None], Bool[Tensor, "row"]]:
        """(step of the intervention, layer) -> for which of the newest prompts the gate opened."""
        run = self._tracker.run
        if run is None:
            return {}
        return {(step, layer): opened for (_, step, layer), opened in run.record.decisions.items()}

    def remove(self) -> None:
        """Leave the model as it was."""
        self._close()
        if self._handles:
            del self._inner.generate
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Attachment({self.intervention!r} on {type(self._inner).__name__}{'' if self._handles else ', removed'})"

    def _hook(self) -> None:
        # An adapter's forward bypasses the hooks of the model in it, and its generate bypasses those of the adapter.
        for top in dict.fromkeys((self._hf, self._inner)):
            self._handles.append(top.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(top.register_forward_hook(self._after, always_call=True))
        self._handles.append(self._hf.get_submodule(self._cfg.decoder).register_forward_pre_hook(self._require_forward))
        self._inner.generate = self._generate

    def _generate(self, *args: Any, **options: Any) -> Any:
        """Call the model's own `generate`, if it brings whole prompts and then one token of every answer per forward pass."""
        own = type(self._inner).generate
        given = inspect.signature(own).bind_partial(self._inner, *args, **options).arguments
        settings = merged(self._inner, {**given, **options})
        require_stepwise(settings)
        mask = settings.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not mask[:, -1].all():
            raise InterventionError(
                "prompts padded on the right", "padding on the left for generation", "say padding_side='left' to the processor"
            )
        return own(self._inner, *args, **options)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The hook before a forward pass: place the taps of its decode step."""
        if self._forward is not None and self._forward.module is not module:
            return args, kwargs  # the model within its adapter's forward
        self._require_idle()
        self._close()
        logits_to_keep = kwargs.get("logits_to_keep", 0) if self._needs_all_tokens else 0
        self._forward = _Forward(module, ExitStack(), logits_to_keep, _frame_of_the_call())
        run, number, whole = self._tracker.advance(dict(zip(self._argument_names, args, strict=False)) | kwargs)
        taps = [tap for tap in run.taps if number == 0 or whole or tap.decode]
        self._forward.hooks.enter_context(placed(self._hf, self._cfg, taps, number, run.batch))
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            kwargs = {**kwargs, "logits_to_keep": 0}
        return args, kwargs

    def _require_idle(self) -> None:
        if self._forward is not None and self._forward.running:
            self._refused.append(get_ident())
            raise InterventionError(
                "a forward of a guarded model while another is going on, be it of an edit that calls the model or of another thread",
                "one forward at a time",
                "call it before or after; let threads take turns with a lock",
            )

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The hook after a forward pass: remove the taps, check the logits and keep those that the caller asked for."""
        if get_ident() in self._refused:  # torch calls this hook even after a call that was refused
            self._refused.remove(get_ident())
            return None
        if self._forward is None or self._forward.module is not module:
            return None
        keep = self._forward.logits_to_keep
        self._tracker.remember_cache(getattr(output, "past_key_values", None))
        self._close()
        if getattr(output, "logits", None) is not None:
            self._require_finite(output.logits)
        if output is not None and (isinstance(keep, Tensor) or keep):
            output.logits = output.logits[:, slice(-keep, None) if isinstance(keep, int) else keep]
        return output

    def _require_finite(self, logits: Float[Tensor, "row token vocab"]) -> None:
        """Check the logits at the newest token of every row."""
        run = self._tracker.run
        assert run is not None
        newest = logits[:, -1]
        if logits.shape[1] == run.prompt_width and run.batch.padded_right:
            newest = logits[torch.arange(len(logits)), run.batch.select("last").long().argmax(dim=1).to(logits.device)]
        require_finite_step(run.record, run.batch.queries, newest, self._tracker.width - run.prompt_width)

    def _close(self) -> None:
        if self._forward is not None:
            self._forward.hooks.close()
        self._forward = None

    def _require_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._forward is None:
            name = type(self._inner).__name__
            raise ModelError(
                f"a call of {self._cfg.decoder} that goes round the forward of {name}, and so round the guard",
                f"calls of {name} itself, also by its generate",
                "call the whole model, or remove the guard first with .remove()",
            )


def require_uncompiled(hf: Any) -> None:
    """Reject a model that torch.compile has wrapped: its graph does not call the hooks by which guardlens edits and reads.

    Raises:
        ModelError: torch.compile has wrapped the model.
    """
    if hasattr(hf, "_orig_mod"):
        raise ModelError("a model that torch.compile has wrapped", "the model itself, whose hooks run", "hand in model._orig_mod")


def _frame_of_the_call() -> FrameType:
    """The frame of torch's own code that runs the hooks and then the forward."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != nn.Module._call_impl.__code__.co_filename:
        frame = frame.f_back
    assert frame is not None
    return frame
