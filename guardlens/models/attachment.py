"""`attach`: a guard leaves the lab. Its taps run under plain torch hooks, in whatever code calls a Hugging Face model, without nnsight."""

import inspect
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from threading import get_ident
from types import FrameType, MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from guardlens.data.presentations import TextOnly, text_only
from guardlens.data.queries import Query
from guardlens.errors import InterventionError, ModelError, quoted, require_type
from guardlens.interventions.held_states import State
from guardlens.interventions.intervention import Intervention, nothing, require_intervention
from guardlens.models.architectures import KNOWN, Architecture, find, fingerprint, require_named, unwrapped
from guardlens.models.engine.batch import Batch, Layout
from guardlens.models.engine.compiler import Held, Record, Tap, compile_taps, required_runs, site_of
from guardlens.models.engine.drivers.torch_hooks import placed
from guardlens.models.engine.generation_options import merged, require_stepwise
from guardlens.models.engine.run import require_finite_step
from guardlens.models.processing.chat_template import tokenizer_of
from guardlens.models.processing.text_twin import ImageRemover

Inputs = Mapping[str, Any]
TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


@dataclass(frozen=True, eq=False)
class _Run:
    """Prompts whose answers are being made."""

    batch: Batch
    taps: list[Tap]
    record: Record

    def goes_on(self, ids: Int[Tensor, "row seq"], seen: int) -> bool:
        """Whether these are the same prompts with one more token of the answers, as generation without a KV cache brings them."""
        rows, width = self.batch.mask.shape
        return ids.shape == (rows, seen + 1) and torch.equal(ids[:, :width], self.batch.inputs["input_ids"].to(ids.device))


@dataclass(frozen=True, eq=False)
class _Forward:
    """A forward in progress: of which module, the hooks of its taps, for which tokens logits were asked (0 for all), and who called it."""

    module: nn.Module
    hooks: ExitStack
    keep: int | Tensor
    caller: FrameType

    @property
    def goes_on(self) -> bool:
        """Whether it has not ended, be it in another thread. A KeyboardInterrupt ends one without a word to torch's hooks."""
        try:
            self.caller.clear()
        except RuntimeError:  # of a frame that is still executing
            return True
        return False


class Attachment:
    """A guard on a model of transformers. Made by `attach`; as a context manager, it is removed at the end.

    A forward with an empty KV cache shows new prompts. One with the cache that they filled, or without a cache and with one token more, is
    the next step of their answers: prompts come whole, never in pieces. Each row is a prompt of its own, whether or not it repeats another
    (beams, several answers). One forward at a time: threads that share the model must take turns. NaN and infinity raise NumericsError.

    Attributes:
        intervention: What it changes.

    Examples:
        >>> handle = gl.attach(guard.at(layers=7), model.hf, model.processor)
        >>> tokens = model.hf.generate(**model.batch(queries[1], grey).inputs, max_new_tokens=16)
        >>> handle.remove()
        >>> "sorry" in model.decode(tokens)[0]
        True
    """

    def __init__(self, intervention: Intervention, hf: Any, cfg: Architecture, twin: Callable[[Inputs], Inputs] | None) -> None:
        self.intervention = intervention
        self._hf, self._cfg, self._twin = hf, cfg, twin
        self._inner = unwrapped(hf)
        # Taps count columns from the left, so they must meet all tokens, also where the caller wants the logits of the last alone.
        self._wide = self._cfg.narrows or any(step.site.hook == "unembed" for step in intervention.steps)
        self._names = tuple(inspect.signature(type(self._inner).forward).parameters)[1:]  # of the class: wrappers replace the bound one
        self._run: _Run | None = None
        self._seen = 0
        self._cache: Callable[[], Any] = lambda: None
        self._forward: _Forward | None = None
        self._refused: list[int] = []
        self._handles: list[Any] = []

    @classmethod
    def on(cls, hf: Any) -> "Attachment | None":
        """The guard that is on a model; None without one.

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
        """(step of the intervention, layer) -> which of the newest prompts its gate opened for."""
        return {} if self._run is None else {key[1:]: opened for key, opened in self._run.record.decisions.items()}

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
        # An adapter's forward goes round the hooks of the model in it, its generate round those of the adapter.
        for top in dict.fromkeys((self._hf, self._inner)):
            self._handles.append(top.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(top.register_forward_hook(self._after, always_call=True))
        self._handles.append(self._hf.get_submodule(self._cfg.decoder).register_forward_pre_hook(self._require_forward))
        self._inner.generate = self._generate

    def _generate(self, *args: Any, **options: Any) -> Any:
        """The model's own `generate`, where it brings whole prompts and then one token of every answer per forward."""
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
        if self._forward is not None and self._forward.module is not module:
            return args, kwargs  # the model within its adapter's forward
        if self._forward is not None and self._forward.goes_on:
            self._refused.append(get_ident())
            raise InterventionError(
                "a forward of a guarded model while another is going on, be it of an edit that calls the model or of another thread",
                "one forward at a time",
                "call it before or after; let threads take turns with a lock",
            )
        self._close()
        keep = kwargs.get("logits_to_keep", 0) if self._wide else 0
        self._forward = _Forward(module, ExitStack(), keep, _frame_of_the_call())
        run, step, whole = self._advance(dict(zip(self._names, args, strict=False)) | kwargs)
        taps = [tap for tap in run.taps if step == 0 or whole or tap.decode]
        self._forward.hooks.enter_context(placed(self._hf, self._cfg, taps, step, run.batch))
        return args, {**kwargs, "logits_to_keep": 0} if isinstance(keep, Tensor) or keep else kwargs

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if get_ident() in self._refused:  # torch calls this behind a call that was refused, too
            self._refused.remove(get_ident())
            return None
        if self._forward is None or self._forward.module is not module:
            return None
        keep, cache = self._forward.keep, getattr(output, "past_key_values", None)
        self._cache = weakref.ref(cache) if cache is not None else lambda: None
        self._close()
        if getattr(output, "logits", None) is not None:
            self._require_finite(output.logits)
        if output is not None and (isinstance(keep, Tensor) or keep):
            output.logits = output.logits[:, slice(-keep, None) if isinstance(keep, int) else keep]
        return output

    def _require_finite(self, logits: Float[Tensor, "row token vocab"]) -> None:
        """Look at the newest token of every row."""
        assert self._run is not None
        batch, step = self._run.batch, self._seen - self._run.batch.mask.shape[1]
        newest = logits[:, -1]
        if logits.shape[1] == batch.mask.shape[1] and batch.padded_right:
            newest = logits[torch.arange(len(logits)), batch.select("last").long().argmax(dim=1).to(logits.device)]
        require_finite_step(self._run.record, batch.queries, newest, step)

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

    def _advance(self, inputs: Inputs) -> tuple[_Run, int, bool]:
        """The run that a forward belongs to, its step there, and whether it brings the whole sequence. New prompts begin a new run."""
        ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
        if ids is None:
            raise ModelError(
                "a forward without input_ids", "token ids, by which prompts are told apart", "pass input_ids, not inputs_embeds"
            )
        past = 0 if cache is None else int(cache.get_seq_length())
        run = self._run
        if past:
            run = self._require_next(ids, past, cache)
        elif cache is not None or run is None or not run.goes_on(ids, self._seen):
            self._run = None  # so that no later step belongs to the run before, should this one fail to begin
            self._run = run = self._begin(inputs)
            self._seen = ids.shape[1] - 1
        self._seen += 1
        return run, self._seen - run.batch.mask.shape[1], not past

    def _require_next(self, ids: Int[Tensor, "row new"], past: int, cache: Any) -> _Run:
        rows = 0 if self._run is None else len(self._run.batch.mask)
        if self._run is None or past != self._seen or ids.shape != (rows, 1) or self._cache() is not cache:
            raise ModelError(
                f"{ids.shape[1]} tokens in {len(ids)} rows beside a KV cache of {past}, where {self._seen} in {rows} rows have been seen",
                "whole prompts with an empty cache, then one token per row and step behind the cache that they filled",
                "leave out past_key_values, prefill_chunk_size and assistant models, and prompts begun before the guard was attached",
            )
        return self._run

    def _begin(self, inputs: Inputs) -> _Run:
        batch = _batch(inputs, self._cfg)
        intervention = self.intervention.to(batch.mask.device)
        taps, record = self._compile(intervention, batch, (), self._held(batch, inputs))
        return _Run(batch, taps, record)

    def _compile(self, intervention: Intervention, batch: Batch, reads: Sequence[Any], held: Held) -> tuple[list[Tap], Record]:
        rows, width = batch.mask.shape
        layout = Layout.tile(rows, width, 1, batch.mask.device)
        return compile_taps([intervention], reads, layout, batch, self._cfg.n_layers, held)

    def _held(self, batch: Batch, inputs: Inputs) -> Held:
        """The states of the text twin that the intervention needs: one unedited forward, without gradients."""
        wanted = required_runs([self.intervention], self._cfg.n_layers)
        if not wanted:
            return {}
        other = self._without_images(batch, inputs) if batch.beside_image else batch
        sites = {state: site_of(state, layers) for state, layers in wanted.items()}
        taps, record = self._compile(nothing, other, tuple(dict.fromkeys(sites.values())), {})
        with torch.no_grad(), placed(self._hf, self._cfg, taps, 0, other):
            self._inner.base_model.forward(**other.inputs, use_cache=False)
        return {
            (state, point.layer): record.reads[site, point][0] for state, site in sites.items() for point in site.points(self._cfg.n_layers)
        }

    def _without_images(self, batch: Batch, inputs: Inputs) -> Batch:
        assert self._twin is not None
        made = self._twin({**inputs, "attention_mask": batch.mask.long()})
        if not isinstance(made, Mapping) or "input_ids" not in made:
            raise ModelError(
                f"a twin= that gives something of type {type(made).__name__}", "inputs of the model", "give input_ids and attention_mask"
            )
        other = _batch(made, self._cfg)
        if other.beside_image or len(other.mask) != len(batch.mask):
            raise ModelError(
                f"a twin= that gives {len(other.mask)} rows{', some with image tokens' if other.beside_image else ''}",
                f"the same {len(batch.mask)} prompts without their images",
                "take the image tokens out of every row",
            )
        return other


def attach(
    intervention: Intervention,
    hf: Any,
    processor: Any = None,
    *,
    twin: Callable[[Inputs], Inputs] | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
) -> Attachment:
    """Put a guard on a model of transformers: every call of it, of its `generate` and of pipelines with it is then guarded.

    Runs the taps that `HookedModel` runs, under torch's own hooks. The weights stay as they are, and nnsight is not imported.

    Args:
        intervention: What to change, made for this model: a guard's `intervention`, or a loaded `Intervention`.
        hf: The Hugging Face model.
        processor: Its processor; needed of a VLM where the intervention asks for the text twin.
        twin: Makes the inputs of the text twin from those of a prompt, for a processor whose images can't be cut out of the text.
        names: What the model's parts are called, of a family that `load` needs them of.

    Raises:
        MismatchError: The intervention was made for another model, or for a separate LLM (`load(..., llm=...)`): here, the text twin is the
            model itself, shown no image.
        SiteError: It has a hook or a layer that this model has not.
        InterventionError: It needs what the tokens of a prompt don't tell (`"instruction"`, another presentation), or there is a guard
            already.
        ModelError: The text twin can't be had, or an adapter puts tokens of its own before the prompt.

    Examples:
        >>> inputs = model.batch("how to mend the hat ?", grey).inputs  # what model.processor makes of a prompt
        >>> with gl.attach(guard.at(layers=7), model.hf, model.processor) as handle:
        ...     tokens = model.hf.generate(**inputs, max_new_tokens=16)
        >>> handle.decisions[0, 7]  # (step of the intervention, layer) -> which prompts the gate opened for
        tensor([False])
    """
    require_intervention(intervention)
    require_type(hf, nn.Module, ModelError, "hand in the model of transformers and its processor; of a HookedModel, its .hf and .processor")
    require_uncompiled(hf)
    require_named(hf, names)
    cfg = find(hf, KNOWN.preferring(names))
    _require_alone(hf)
    _require_known(intervention, cfg.n_layers)
    intervention.check((f"{type(hf).__name__}@{fingerprint(hf)}",), cfg.n_layers, cfg.widths)
    for step in intervention.steps:
        for point in step.site.points(cfg.n_layers):
            cfg.locate(point)
    needs_twin = cfg.image_token_id is not None and bool(required_runs([intervention], cfg.n_layers))
    if needs_twin and processor is None and twin is None:
        raise ModelError(
            "an intervention that asks for the text twin, without a processor",
            "the model's processor",
            "call attach(intervention, hf, processor)",
        )
    if twin is not None and not callable(twin):
        raise InterventionError(f"twin={quoted(twin)}", "a function of a prompt's inputs", "leave it out, and hand in the processor")
    if processor is not None and not hasattr(tokenizer_of(processor), "convert_ids_to_tokens"):
        raise ModelError(
            f"a processor of type {type(processor).__name__}", "the model's processor", "hand in AutoProcessor.from_pretrained(...)"
        )
    learned = ImageRemover.learn(processor, cfg.image_token_id) if needs_twin and twin is None else None  # type: ignore[arg-type]
    made = Attachment(intervention, hf, cfg, learned if twin is None else twin)
    made._hook()
    return made


def require_uncompiled(hf: Any) -> None:
    """Refuse what torch.compile has wrapped: its graph does not call the hooks that edits and reads are.

    Raises:
        ModelError: As said.
    """
    if hasattr(hf, "_orig_mod"):
        raise ModelError("a model that torch.compile has wrapped", "the model itself, whose hooks run", "hand in model._orig_mod")


def _frame_of_the_call() -> FrameType:
    """Of torch's own code that runs the hooks and then the forward."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != nn.Module._call_impl.__code__.co_filename:
        frame = frame.f_back
    assert frame is not None
    return frame


def _require_alone(hf: Any) -> None:
    there = Attachment.on(hf)
    if there is not None:
        raise InterventionError(
            f"a second guard on a model with {there!r}",
            "one guard on a model",
            "join the interventions with >>, or call .remove() on the first",
        )


def _require_known(intervention: Intervention, n_layers: int) -> None:
    """Refuse what a prompt's tokens don't tell."""
    states: list[State] = list(intervention.requires(n_layers))
    other = next((state.presentation for state in states if state.presentation not in (None, text_only)), None)
    if other is not None:
        raise InterventionError(
            f"a state of the presentation {other.name!r}",
            "states of this run or of the text twin",
            "run this intervention with a HookedModel",
        )
    for positions in (*(step.site.positions for step in intervention.steps), *(state.positions for state in states)):
        if positions in ("instruction", "post_instruction"):
            raise InterventionError(
                f"the positions {positions!r}, which tokens alone do not tell", "'last', 'all', 'image' or (start, stop)",
                "choose these with .at(positions=...), or run this intervention with a HookedModel",
            )  # fmt: skip


def _batch(inputs: Inputs, cfg: Architecture) -> Batch:
    """The inputs of a forward as a batch. Its queries are the rows."""
    ids, given = inputs["input_ids"], inputs.get("attention_mask")
    if ids.ndim != 2:
        raise ModelError(f"input_ids of shape {tuple(ids.shape)}", "a row of ids per prompt", "hand in input_ids[None] of a single prompt")
    if given is not None and getattr(given, "shape", None) != ids.shape:
        shape = f" of shape {tuple(given.shape)}" if isinstance(given, Tensor) else "s of each kind of layer"
        raise ModelError(
            f"attention mask{shape} beside ids of shape {tuple(ids.shape)}",
            "the tokenizer's mask, as wide as the ids",
            "generate with the default cache: a static one (cache_implementation) brings masks that are worked out already",
        )
    mask = torch.ones_like(ids, dtype=torch.bool) if given is None else given.to(ids.device).bool()
    none = torch.zeros_like(mask)
    image = none if cfg.image_token_id is None else ids == cfg.image_token_id
    queries = tuple(Query(f"row {number}", id=f"row {number}") for number in range(len(ids)))
    text = {name: inputs[name] for name in TEXT_INPUTS if inputs.get(name) is not None}
    return Batch(queries, TextOnly("as it came"), text, mask, image, none)
