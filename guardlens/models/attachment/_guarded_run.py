"""Which forward passes belong together: one over new prompts begins a run, and each later one is the next decode step of its answers."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from guardlens.errors import ModelError
from guardlens.hooks import Site
from guardlens.interventions.intervention import Intervention, nothing
from guardlens.models.architectures import Architecture, unwrapped
from guardlens.models.attachment._inputs import Inputs, batch_of, text_twin_of, token_ids
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.compiler import Held, Record, Tap, compile_taps
from guardlens.models.engine.drivers.torch_hooks import placed
from guardlens.models.engine.held_states import held_states, read_states, wanted_states
from guardlens.models.engine.layout import Layout
from guardlens.models.engine.run import reads_of


@dataclass(frozen=True, eq=False)
class GuardedRun:
    """Prompts whose answers are being generated under an intervention.

    Attributes:
        batch: The prompts.
        taps: The compiled intervention.
        record: The gates' decisions and the states that later decode steps need.
    """

    batch: Batch
    taps: list[Tap]
    record: Record

    @property
    def prompt_width(self) -> int:
        """Number of columns of the prompts, padding included."""
        return self.batch.mask.shape[1]

    def goes_on(self, ids: Int[Tensor, "row seq"], width: int) -> bool:
        """Whether `ids` are the same prompts with one more token of the answers. Generation without a KV cache calls the model this way."""
        same_shape = ids.shape == (len(self.batch.mask), width + 1)
        return same_shape and torch.equal(ids[:, : self.prompt_width], self.batch.inputs["input_ids"].to(ids.device))


@dataclass(frozen=True)
class RunStarter:
    """Begins runs of an intervention on a model.

    Attributes:
        intervention: The intervention.
        hf: The Hugging Face model.
        cfg: Its parts and sizes.
        twin: Makes the inputs of the text twin; None if the intervention does not need it.
    """

    intervention: Intervention
    hf: Any
    cfg: Architecture
    twin: Callable[[Inputs], Inputs] | None

    def begin(self, inputs: Inputs) -> GuardedRun:
        """Begin a run on new prompts. If the intervention needs states of their text twin, this takes a forward pass over the twin."""
        batch = batch_of(inputs, self.cfg)
        held = self._held_states(batch, inputs)
        taps, record = self._compile(self.intervention.to(batch.mask.device), batch, (), held)
        return GuardedRun(batch, taps, record)

    def _held_states(self, batch: Batch, inputs: Inputs) -> Held:
        """The text twin's states that the intervention needs, from one unedited forward pass without gradients."""
        n_layers = self.cfg.n_layers

        def run(sites: tuple[Site, ...]) -> Mapping[Site, Float[Tensor, "lane query layer d_model"]]:
            other = self._text_twin(batch, inputs)
            taps, record = self._compile(nothing, other, sites, {})
            with torch.no_grad(), placed(self.hf, self.cfg, taps, 0, other):
                unwrapped(self.hf).base_model.forward(**other.inputs, use_cache=False)
            return reads_of(record, sites, other, n_layers)

        wanted = wanted_states([self.intervention], n_layers)
        return held_states(wanted, lambda _, states: read_states(states, n_layers, run))

    def _text_twin(self, batch: Batch, inputs: Inputs) -> Batch:
        if not batch.beside_image:
            return batch
        assert self.twin is not None
        return text_twin_of(batch, inputs, self.twin, self.cfg)

    def _compile(self, intervention: Intervention, batch: Batch, reads: Sequence[Any], held: Held) -> tuple[list[Tap], Record]:
        return compile_taps([intervention], reads, Layout.plain(batch.mask), batch, self.cfg.n_layers, held)


class DecodeStep(NamedTuple):
    """The place of a forward pass in its run.

    Attributes:
        run: The run.
        number: 0 for the prompts, then 1, 2, ... for the tokens of their answers.
        whole: Whether the forward pass brings the whole sequence, rather than its newest tokens behind a KV cache.
    """

    run: GuardedRun
    number: int
    whole: bool


class RunTracker:
    """Tells new prompts from the next decode step of the current run.

    Attributes:
        run: The current run; None before the first.
        width: Number of columns that the current run has seen, answers included.
    """

    def __init__(self, starter: RunStarter) -> None:
        self.run: GuardedRun | None = None
        self.width = 0
        self._starter = starter
        self._cache: Callable[[], Any] = lambda: None

    def advance(self, inputs: Inputs) -> DecodeStep:
        """Return the place of a forward pass with these inputs. New prompts begin a new run.

        Raises:
            ModelError: The forward pass is neither the beginning of a run nor the next decode step of the current one.
        """
        ids = token_ids(inputs)
        cache = inputs.get("past_key_values")
        cached = 0 if cache is None else int(cache.get_seq_length())
        run = self.run
        if cached:
            run = self._require_next(ids, cached, cache)
        elif cache is not None or run is None or not run.goes_on(ids, self.width):
            self.run = None  # if the new run fails to begin, no later step must be taken for one of the old run
            self.run = run = self._starter.begin(inputs)
            self.width = run.prompt_width - 1
        self.width += 1
        return DecodeStep(run, self.width - run.prompt_width, whole=not cached)

    def remember_cache(self, cache: Any) -> None:
        """Note the KV cache that a forward pass filled: the next decode step must bring the same one."""
        self._cache = weakref.ref(cache) if cache is not None else lambda: None

    def _require_next(self, ids: Int[Tensor, "row new"], cached: int, cache: Any) -> GuardedRun:
        rows = 0 if self.run is None else len(self.run.batch.mask)
        if self.run is None or cached != self.width or ids.shape != (rows, 1) or self._cache() is not cache:
            raise ModelError(
                f"{ids.shape[1]} tokens in {len(ids)} rows beside a KV cache of {cached}, where {self.width} in {rows} rows have been seen",
                "whole prompts with an empty cache, then one token per row and step behind the cache that they filled",
                "leave out past_key_values, prefill_chunk_size and assistant models, and prompts begun before the guard was attached",
            )
        return self.run
