"""The ways to call a Hugging Face model with taps in place: a forward, generation, and the decoder alone behind what is cached."""

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

Places = tuple[Int[Tensor, "state"], Int[Tensor, "state"]]
"""Rows and columns."""

Watch = Callable[[Float[Tensor, "row vocab"], int], None]
"""Is shown the newest logits and the step."""


@dataclass(frozen=True, eq=False)
class Engine:
    """A Hugging Face model, and where its parts are."""

    hf: Any
    cfg: Architecture

    @cached_property
    def inner(self) -> Any:
        """The model itself, where an adapter (PEFT) is around it."""
        return unwrapped(self.hf)

    @property
    def device(self) -> torch.device:
        """Where inputs go: of a model whose weights are offloaded, where they are brought to run."""
        if self.hf.device.type != "meta":
            return self.hf.device
        hooks = (getattr(module, "_hf_hook", None) for module in self.hf.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((place for place in places if place is not None), "cpu"))

    @property
    def config(self) -> Any:
        """The language model's."""
        return self.inner.config.get_text_config(decoder=True)

    @property
    def decoder(self) -> Any:
        """The language model's stack of blocks."""
        return self.hf.get_submodule(self.cfg.decoder)

    @property
    def blocks(self) -> list[nn.Module]:
        """Its blocks."""
        return [self.hf.get_submodule(path) for path in self.cfg.blocks]

    @property
    def eager(self) -> bool:
        """Whether its attention computes patterns."""
        return self.config._attn_implementation == "eager"

    @property
    def stretches(self) -> bool:
        """Whether what a token's position means depends on how long its prompt is, so that prompts of other lengths can't share keys."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
        return not {"dynamic", "longrope"}.isdisjoint(kind.get("rope_type") for kind in kinds)

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """What the model's forward takes."""
        return inspect.signature(self.inner.forward).parameters

    @cached_property
    def required(self) -> set[str]:
        """The inputs that it can't do without."""
        named = {name for name, p in self.parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        return named - {"self"}  # shown by modules that were copied after nnsight had wrapped them

    def forward(self, batch: Batch, taps: Sequence[Tap], keep: int | None = 0) -> Any:
        """Logits of a forward: at all tokens (`keep` 0), at the last (1), or none (None; the unembedding is then skipped)."""
        trunk = self.inner.base_model
        inputs = {**batch.inputs, "use_cache": False}
        if keep is None and trunk is not self.inner and not any(tap.point.hook == "unembed" for tap in taps):
            self._drive(trunk, inputs, taps, batch)
            return None
        if "logits_to_keep" in self.parameters:
            inputs["logits_to_keep"] = 0 if self._need_all_tokens(taps) else keep or 0
        logits = self._drive(self.hf, inputs, taps, batch).logits
        return None if keep is None else logits[:, -keep:]

    def last_logits(self, inputs: Mapping[str, Any]) -> Float[Tensor, "query vocab"]:
        """Logits at the last column, no tap in place; for inputs with a cache, which is then filled."""
        only = {"logits_to_keep": 0 if self.cfg.narrows else 1} if "logits_to_keep" in self.parameters else {}
        with running(self.hf), torch.no_grad():
            return self.inner(**inputs, **only).logits[:, -1]

    def continued(self, inputs: Mapping[str, Any], taps: Sequence[Tap], batch: Batch, at: Places | None) -> Any:
        """The decoder alone, on tokens behind a cache: the logits of those `at` rows and columns; none without any."""
        return self._drive(lambda **inputs: self._logits(self.decoder(**inputs)[0], taps, at), dict(inputs), taps, batch)

    def trunk(self, batch: Batch, layers: Collection[int]) -> "Trunk":
        """An unedited run, of which it is kept what goes into the decoder, and into these blocks."""
        trunk = Trunk({}, {}, {})
        taps = [Tap(Point("resid_pre", layer), partial(trunk.note, layer)) for layer in sorted(layers)]
        handles = [self.decoder.register_forward_pre_hook(trunk.enter, with_kwargs=True)]
        handles += [block.register_forward_hook(trunk.leave) for block in self.blocks]
        try:
            self.forward(batch, taps, None)
        finally:
            for handle in handles:
                handle.remove()
        return trunk

    def forked(self, trunk: "Trunk", start: int, taps: Sequence[Tap], batch: Batch, at: Places | None) -> Any:
        """The decoder from a block on, as it went on in the `trunk`: the logits of those `at` rows and columns; none without any."""

        def call(input_ids: Tensor) -> Any:
            return self._logits(self.decoder(**trunk.inputs)[0], taps, at)

        begin = Tap(Point("resid_pre", start), lambda states, step: trunk.states[start])
        with trunk.skipping(self.blocks[:start]):
            return self._drive(call, {"input_ids": batch.inputs["input_ids"]}, [begin, *taps], batch)

    def _logits(self, states: Float[Tensor, "row width d"], taps: Sequence[Tap], at: Places | None) -> Any:
        whole, unembed = any(tap.point.hook == "unembed" for tap in taps), self.hf.get_submodule(self.cfg.unembed)
        logits = self.cfg.finish(unembed(states)) if whole else None  # taps count on all tokens
        if at is None:
            return None
        places = tuple(index.to(states.device) for index in at)
        return self.cfg.finish(unembed(states[places])) if logits is None else logits[places]

    def generate(
        self, batch: Batch, taps: Sequence[Tap], new_tokens: int, seed: int | None, options: Mapping[str, Any], watch: Watch
    ) -> Int[Tensor, "row new"]:
        """New tokens of every row; greedy without options.

        Args:
            batch: The prompts.
            taps: What to run, and where.
            new_tokens: At most so many.
            seed: Of the draws.
            options: Of transformers' `generate`.
            watch: Is shown the logits of each new token, as the model itself gives them, and the step.

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
        """Shows the logits of each step, before `generate` works on them."""
        steps = count()

        def show(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> None:
            watch(self.cfg.finish(logits[:, -1]), next(steps))

        handle = self.hf.get_submodule(self.cfg.unembed).register_forward_hook(show)
        try:
            yield
        finally:
            handle.remove()

    def _need_all_tokens(self, taps: Sequence[Tap]) -> bool:
        """Whether a tap looks where the model would leave out tokens whose logits are not asked for."""
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
    """Refuses to run any of the modules inside of itself, as an edit that calls the model would; gives those that have been run.

    Raises:
        InterventionError: As said.
    """
    inside: set[nn.Module] = set()
    begun: list[nn.Module] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module in inside:
            raise nested()
        inside.add(module)
        begun[:] = [module]

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        inside.discard(module)

    handles = [module.register_forward_pre_hook(enter) for module in set(modules)]
    handles += [module.register_forward_hook(leave, always_call=True) for module in set(modules)]
    try:
        yield begun
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class Trunk:
    """What an unedited run leaves for runs that fork from it.

    Attributes:
        inputs: What the decoder was called with.
        states: What went into some blocks, by layer.
        whole: For each block that ran, whether it gives a tuple.
    """

    inputs: dict[str, Any]
    states: dict[int, Float[Tensor, "row width d"]]
    whole: dict[nn.Module, bool]

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the decoder is called with."""
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        self.inputs.update(dict(zip(names, args, strict=False)) | kwargs)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note what a block gives."""
        self.whole[module] = isinstance(output, tuple)

    def note(self, layer: int, states: Float[Tensor, "row width d"], step: int) -> None:
        """Note what goes into a block."""
        self.states[layer] = states.clone()

    @contextmanager
    def skipping(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Inside, these blocks hand on what they get."""
        before = [block.__dict__.get("forward") for block in blocks]
        try:
            for block in blocks:
                block.forward = partial(_handed_on, self.whole.get(block, False))
            yield
        finally:
            for block, forward in zip(blocks, before, strict=True):
                if forward is None:
                    del block.__dict__["forward"]
                else:
                    block.forward = forward


def _handed_on(whole: bool, *args: Any, **kwargs: Any) -> Any:
    states = args[0] if args else kwargs["hidden_states"]
    return (states,) if whole else states
