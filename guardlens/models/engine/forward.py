"""Calls of a Hugging Face model with taps in place: a forward pass, generation, and the decoder alone."""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from guardlens.errors import GuardlensError, InterventionError
from guardlens.hooks import Point
from guardlens.models.architectures import Architecture, unwrapped
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.compiler import Tap
from guardlens.models.engine.drivers.nnsight_trace import drive, wrap
from guardlens.models.engine.generation_options import OUTPUTS, REFUSALS, merged, refused
from guardlens.models.engine.model_lock import nested, running
from guardlens.models.engine.unedited_run import UneditedRun

Places = tuple[Int[Tensor, "state"], Int[Tensor, "state"]]
"""Rows and columns of tokens."""

Watch = Callable[[Float[Tensor, "row vocab"], int], None]
"""A function that sees the newest logits, and the decode step."""


@dataclass(frozen=True, eq=False)
class EndStates:
    """The last states of some tokens, whose logits are computed when they are asked for.

    Attributes:
        values: What the unembedding takes; the logits themselves if a tap has seen them.
        unembed: From these to logits.
    """

    values: Float[Tensor, "state value"]
    unembed: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.values)

    @torch.no_grad()
    def logits(self, start: int = 0, stop: int | None = None) -> Float[Tensor, "state vocab"]:
        """The logits of the tokens from `start` to `stop`."""
        return self.unembed(self.values[start:stop])


@dataclass(frozen=True, eq=False)
class Engine:
    """A Hugging Face model, where its parts are, and how it is called."""

    hf: Any
    cfg: Architecture

    @cached_property
    def inner(self) -> Any:
        """The model itself, without a PEFT adapter around it."""
        return unwrapped(self.hf)

    @property
    def device(self) -> torch.device:
        """The device of the inputs. If weights are offloaded, it is the one that they are brought to in order to run."""
        if self.hf.device.type != "meta":
            return self.hf.device
        hooks = (getattr(module, "_hf_hook", None) for module in self.hf.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((place for place in places if place is not None), "cpu"))

    @property
    def config(self) -> Any:
        """The language model's config."""
        return self.inner.config.get_text_config(decoder=True)

    @property
    def decoder(self) -> Any:
        """The language model's stack of layers."""
        return self.hf.get_submodule(self.cfg.decoder)

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers as modules."""
        return [self.hf.get_submodule(path) for path in self.cfg.blocks]

    @property
    def eager(self) -> bool:
        """Whether attention patterns are computed."""
        return self.config._attn_implementation == "eager"

    @property
    def stretches(self) -> bool:
        """Whether RoPE scaling depends on the length of the prompt, in which case prompts of different lengths can't share cached keys."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
        return not {"dynamic", "longrope"}.isdisjoint(kind.get("rope_type") for kind in kinds)

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of the model's `forward`."""
        return inspect.signature(self.inner.forward).parameters

    @cached_property
    def required(self) -> set[str]:
        """The inputs that `forward` requires."""
        named = {name for name, p in self.parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        return named - {"self"}  # shown by modules that were copied after nnsight had wrapped them

    def forward(self, batch: Batch, taps: Sequence[Tap], keep: int | None = 0) -> Any:
        """Logits of a forward pass: at the last `keep` tokens, at all for 0, at none for None, which skips the unembedding."""
        body = self.inner.base_model
        inputs = {**batch.inputs, "use_cache": False}
        if keep is None and body is not self.inner and not any(tap.point.hook == "unembed" for tap in taps):
            self._drive(body, inputs, taps, batch)
            return None
        if "logits_to_keep" in self.parameters:
            inputs["logits_to_keep"] = 0 if self._need_all_tokens(taps) else keep or 0
        logits = self._drive(self.hf, inputs, taps, batch).logits
        return None if keep is None else logits[:, -keep:]

    def last_logits(self, inputs: Mapping[str, Any]) -> Float[Tensor, "query vocab"]:
        """Logits at the last column, without taps, for inputs with a KV cache, which the call fills."""
        only = {"logits_to_keep": 0 if self.cfg.narrows else 1} if "logits_to_keep" in self.parameters else {}
        with running(self.hf), torch.no_grad():
            return self.inner(**inputs, **only).logits[:, -1]

    @torch.no_grad()
    def lens(self, states: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape vocab"]:
        """The logit lens: the final norm, then the unembedding."""
        norm = self.hf.get_submodule(self.cfg.norm)
        return self._unembedded(norm(states))

    def continued(self, inputs: Mapping[str, Any], taps: Sequence[Tap], batch: Batch, at: Places | None) -> EndStates | None:
        """Run the decoder alone on tokens that continue from a KV cache. Returns the last states `at` some rows and columns."""
        return self._drive(lambda **inputs: self._ends(self.decoder(**inputs)[0], taps, at), dict(inputs), taps, batch)

    def unedited(self, batch: Batch, layers: Collection[int]) -> UneditedRun:
        """Run the model unedited, recording the inputs of the decoder and of the given layers."""
        run = UneditedRun({}, {}, {})
        taps = [Tap(Point("resid_pre", layer), partial(run.record_states, layer)) for layer in sorted(layers)]
        handles = [self.decoder.register_forward_pre_hook(run.record_inputs, with_kwargs=True)]
        handles += [block.register_forward_hook(run.record_form) for block in self.blocks]
        try:
            self.forward(batch, taps, None)
        finally:
            for handle in handles:
                handle.remove()
        return run

    def forked(self, unedited: UneditedRun, first: int, taps: Sequence[Tap], batch: Batch, at: Places | None) -> EndStates | None:
        """Run the decoder from the layer `first` on, from the states of an unedited run. Returns the last states `at` some places."""

        def call(input_ids: Tensor) -> Any:
            return self._ends(self.decoder(**unedited.inputs)[0], taps, at)

        begin = Tap(Point("resid_pre", first), lambda states, step: unedited.states[first])
        with unedited.skipping(self.blocks[:first]):
            return self._drive(call, {"input_ids": batch.inputs["input_ids"]}, [begin, *taps], batch)

    def _ends(self, states: Float[Tensor, "row width d"], taps: Sequence[Tap], at: Places | None) -> EndStates | None:
        is_tapped = any(tap.point.hook == "unembed" for tap in taps)  # taps there count on all tokens
        values = self._unembedded(states) if is_tapped else states
        if at is None:
            return None
        chosen = values[tuple(index.to(states.device) for index in at)]
        return EndStates(chosen, (lambda logits: logits) if is_tapped else self._unembedded)

    def _unembedded(self, states: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape vocab"]:
        return self.cfg.finish(self.hf.get_submodule(self.cfg.unembed)(states))

    def generate(
        self, batch: Batch, taps: Sequence[Tap], new_tokens: int, seed: int | None, options: Mapping[str, Any], watch: Watch
    ) -> Int[Tensor, "row new"]:
        """Generate new tokens for every row, greedily unless the options say otherwise.

        Args:
            batch: The prompts.
            taps: The taps.
            new_tokens: The largest number of tokens.
            seed: The seed of the draws.
            options: Options of transformers' `generate`.
            watch: Sees the logits of each new token, as the model itself gives them, and the decode step.

        Raises:
            InterventionError: A batch padded on the right, or options that transformers refuses.
        """
        if batch.padded_right:
            raise InterventionError("a batch padded on the right", "padding on the left for generation", "make it with padding_side='left'")
        set_by_checkpoint = getattr(self.hf, "generation_config", None)
        settings = {name: False for name in OUTPUTS if getattr(set_by_checkpoint, name, None)}
        settings |= {"max_new_tokens": new_tokens, "do_sample": False, **options}
        if self._need_all_tokens(taps):
            settings["logits_to_keep"] = 0
        if not merged(self.hf, settings).get("use_cache", True):
            taps = [replace(tap, decode=True) for tap in taps]
        with torch.random.fork_rng(enabled=seed is not None), self._watched(watch), alone(self.inner, self.decoder) as begun:
            if seed is not None:
                torch.manual_seed(seed)
            try:
                tokens = self._drive(self.hf.generate, {**batch.inputs, **settings}, taps, batch, new_tokens)
            except REFUSALS as error:
                if begun or isinstance(error, GuardlensError):
                    raise
                raise refused(error) from error
        return tokens[:, batch.mask.shape[1] :]

    @contextmanager
    def _watched(self, watch: Watch) -> Iterator[None]:
        """Call `watch` with the logits of each step, before `generate` changes them."""
        show = partial(self._shown, watch, count())
        handle = self.hf.get_submodule(self.cfg.unembed).register_forward_hook(show)
        try:
            yield
        finally:
            handle.remove()

    def _shown(self, watch: Watch, steps: Iterator[int], module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> None:
        watch(self.cfg.finish(logits[:, -1]), next(steps))

    def _need_all_tokens(self, taps: Sequence[Tap]) -> bool:
        """Whether a tap sits where the model would leave out tokens whose logits nobody wants."""
        return self.cfg.narrows or any(tap.point.hook == "unembed" for tap in taps)

    def _drive(self, call: Callable[..., Any], inputs: dict[str, Any], taps: Sequence[Tap], batch: Batch, steps: int = 1) -> Any:
        tapped = [self.hf.get_submodule(self.cfg.locate(tap.point, batch.beside_image).path) for tap in taps]
        with running(self.hf), alone(self.inner, self.decoder, *tapped):
            return drive(self._wrapped, self.cfg, call, inputs, taps, beside_image=batch.beside_image, steps=steps)

    @cached_property
    def _wrapped(self) -> Any:
        return wrap(self.hf)


@contextmanager
def alone(*modules: nn.Module) -> Iterator[list[nn.Module]]:
    """Refuse to run any of the modules inside of itself, as an edit that calls the model would. Yields the module that ran last.

    Raises:
        InterventionError: A module is called while it is running.
    """
    inside: set[nn.Module] = set()
    begun: list[nn.Module] = []
    handles = [module.register_forward_pre_hook(partial(_enter, inside, begun)) for module in set(modules)]
    handles += [module.register_forward_hook(partial(_leave, inside), always_call=True) for module in set(modules)]
    try:
        yield begun
    finally:
        for handle in handles:
            handle.remove()


def _enter(inside: set[nn.Module], begun: list[nn.Module], module: nn.Module, args: tuple[Any, ...]) -> None:
    if module in inside:
        raise nested()
    inside.add(module)
    begun[:] = [module]


def _leave(inside: set[nn.Module], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    inside.discard(module)
