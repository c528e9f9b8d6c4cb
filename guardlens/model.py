"""`HookedModel`: a VLM or LLM of transformers under nnsight, with TransformerLens's hook names. The one module that imports nnsight."""

import contextlib
import importlib.resources
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

with contextlib.suppress(ImportError):
    # nnsight mounts a method on `object`; beartype fails to import after that, so it goes first where it is installed.
    import beartype  # noqa: F401  # pyright: ignore[reportMissingImports]
import nnsight
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from guardlens.activations import ActivationCache, require_finite
from guardlens.architectures import Architecture, find, fingerprint
from guardlens.batches import Batch, Layout
from guardlens.errors import ModelError, PlanError, PresentationError, QueryError, SiteError
from guardlens.interventions import Intervention, State, nothing
from guardlens.program import Held, Tap, compile_taps, required_runs
from guardlens.prompts import instruction_mask, tokenise
from guardlens.queries import Presentation, Prompt, Query, QueryPairs, as_queries, text_only
from guardlens.sites import Point, Site, parse
from guardlens.storage import Provenance, digest

Queries = str | Query | QueryPairs | Sequence[str | Query]
HookFunction = Callable[[Tensor, Any], Tensor | None]


@dataclass(frozen=True, eq=False)
class Run:
    """What a run gives back. Every tensor begins with the lane axis: one lane per plan.

    Attributes:
        reads: Site -> one vector per query and layer (averaged where the site has several positions).
        logits: At the last token of the prompt, or at all; None where they were not asked for.
        tokens: The newly generated ids, padded; None without generation.
        verdicts: (lane, step, layer) -> which queries the gate opened for.
        layout: How the lanes were computed: `"plain"` or `"tile"`.
    """

    reads: Mapping[Site, Float[Tensor, "lane query layer d_model"]]
    logits: Float[Tensor, "lane query ... vocab"] | None
    tokens: Int[Tensor, "lane query new"] | None
    verdicts: Mapping[tuple[int, int, int | None], Bool[Tensor, "query"]]
    layout: str


@dataclass(frozen=True, eq=False)
class HookedModel:
    """A model with hooks. Make one with `guardlens.load`.

    Attributes:
        hf: The Hugging Face model; it is never changed.
        processor: Its processor, or the tokenizer of a text-only model.
        name: As it appears in results.
        revision: The hub's revision, where there is one.
    """

    hf: Any
    processor: Any
    name: str
    revision: str = ""

    @cached_property
    def cfg(self) -> Architecture:
        """Sizes and paths: `n_layers`, `d_model`, `n_heads`, `d_vocab`, `image_token_id`, `image_size`."""
        return find(self.hf)

    @cached_property
    def _wrapped(self) -> nnsight.NNsight:
        return nnsight.NNsight(self.hf)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def sees_images(self) -> bool:
        """Whether it is a VLM."""
        return self.cfg.image_token_id is not None

    @cached_property
    def id(self) -> str:
        """Name and fingerprint of the weights; directions and plans of another fingerprint are refused."""
        return f"{self.name}@{fingerprint(self.hf)}"

    @property
    def hook_names(self) -> list[str]:
        """Full TransformerLens names of everything that can be read, in order of execution."""
        return [point.name for point in self.cfg.points]

    @property
    def provenance(self) -> Provenance:
        """Model, chat template, versions, date."""
        template = getattr(self.processor, "chat_template", None) or ""
        return Provenance(self.id, digest(str(template).encode()), self.revision)

    def batch(self, queries: Queries, presentation: Presentation = text_only, *, padding_side: str = "left") -> Batch:
        """Prompts as tensors: presented, put into the chat template with the generation prompt, padded.

        Raises:
            QueryError: No queries, or a text that contains the model's image token.
            PresentationError: An image for a text-only model, or a query that can't be presented so.
            ModelError: A prompt without image for a model that can't take one.
        """
        items = as_queries(queries)
        prompts = [presentation(query) for query in items]
        self._check_prompts(items, prompts, presentation)
        inputs = tokenise(self.processor, prompts, padding_side, self.sees_images)
        mask = inputs["attention_mask"].bool()
        image = inputs["input_ids"] == self.cfg.image_token_id if self.sees_images else torch.zeros_like(mask)
        instruction = instruction_mask(self.processor, prompts, mask, padding_side, self.sees_images)
        if self._needs_positions:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        device = self.hf.device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        return Batch(items, presentation, inputs, mask.to(device), image.to(device), instruction.to(device))

    def run(
        self,
        batch: Batch,
        plans: Intervention | Sequence[Intervention] = nothing,
        *,
        read: Sequence[Site] = (),
        logits: Literal["last", "all"] | None = "last",
        new_tokens: int = 0,
    ) -> Run:
        """Run one or several plans over a batch; each plan is a lane.

        Args:
            batch: The prompts.
            plans: What to change, one plan per lane.
            read: Sites to read, after all edits there.
            logits: At the prompt's last token, at all tokens, or none (the unembedding is then skipped).
            new_tokens: Generate greedily up to so many tokens; `logits` are then not returned.

        Raises:
            MismatchError: A plan was made for another model.
            SiteError, PlanError: A plan asks for what this model or run does not have.
            NumericsError: NaN or infinity in a read or in the logits; layer and query are named.
        """
        lanes = [plans] if isinstance(plans, Intervention) else list(plans)
        for plan in lanes:
            plan.check(self.id, self.cfg.n_layers, self.cfg.d_model)
            self._check_sites(plan, read)
        lanes = [plan.to(self.hf.device) for plan in lanes]
        held = self._held(batch, lanes)
        layout = Layout.tile(len(batch.queries), batch.mask.shape[1], len(lanes), batch.mask.device)
        taps, record = compile_taps(lanes, read, layout, batch, self.cfg.n_layers, held)
        raw = self._execute(layout.spread(batch.inputs), taps, logits, new_tokens, batch.padded_right)
        reads = {site: torch.stack([record.reads[site, p] for p in site.points(self.cfg.n_layers)], dim=2) for site in read}
        self._require_finite(batch, reads)
        by_lane = None if raw is None else raw.unflatten(0, (len(lanes), -1))
        if new_tokens:
            return Run(reads, None, by_lane[..., batch.mask.shape[1] :], record.verdicts, layout.name)  # type: ignore[index]
        if by_lane is not None and logits == "last":
            by_lane = _at_last(by_lane, batch)
            require_finite(by_lane.transpose(0, 1), batch.queries, tuple(range(len(lanes))), "the logits of lane")
        return Run(reads, by_lane, None, record.verdicts, layout.name)

    def run_with_cache(
        self,
        queries: Queries | Batch,
        presentation: Presentation = text_only,
        *,
        names_filter: str | Iterable[str] | Callable[[str], bool] | None = None,
    ) -> tuple[Float[Tensor, "query seq vocab"], ActivationCache]:
        """Logits at all tokens, and whole hook values, as in TransformerLens.

        Args:
            queries: What to ask, or a batch.
            presentation: How to show it.
            names_filter: A hook name, several, or a predicate; None caches everything.

        Raises:
            SiteError: Unknown hook name; the closest is suggested.
        """
        cached: dict[Point, Tensor] = {}
        keep = _predicate(names_filter, self.cfg.n_layers)
        taps = [Tap(point, _Cache(cached, point)) for point in self.cfg.points if keep(point)]
        return self._run_taps(queries, presentation, taps), ActivationCache(cached, self.cfg.n_layers)

    def run_with_hooks(
        self,
        queries: Queries | Batch,
        presentation: Presentation = text_only,
        *,
        fwd_hooks: Sequence[tuple[str | Callable[[str], bool], HookFunction]] = (),
    ) -> Float[Tensor, "query seq vocab"]:
        """Logits at all tokens of a run with hook functions, as in TransformerLens.

        Args:
            queries: What to ask, or a batch.
            presentation: How to show it.
            fwd_hooks: Pairs of a hook name (or predicate) and `fn(value, hook)`, which returns the new value, or None to leave it;
                `hook.name` is the full name and `hook.layer()` the layer. Values are whole tensors, padding included.

        Raises:
            SiteError: Unknown hook name; the closest is suggested.
        """
        taps = []
        for name, fn in fwd_hooks:
            keep = _predicate(name, self.cfg.n_layers)
            taps += [Tap(point, _Hook(fn, HookPoint(point.name, point.layer))) for point in self.cfg.points if keep(point)]
        return self._run_taps(queries, presentation, sorted(taps, key=lambda tap: tap.point.order))

    def generate(
        self,
        queries: Queries | Batch,
        presentation: Presentation = text_only,
        intervention: Intervention = nothing,
        *,
        max_new_tokens: int = 64,
    ) -> Any:
        """Greedy answers under an intervention: a string for one query, else a list of them."""
        batch = queries if isinstance(queries, Batch) else self.batch(queries, presentation)
        tokens = self.run(batch, intervention, new_tokens=max_new_tokens).tokens
        answers = self.decode(tokens[0])  # type: ignore[index]
        return answers[0] if isinstance(queries, str | Query) else answers

    def decode(self, tokens: Int[Tensor, "query new"]) -> list[str]:
        """Token ids as text, special tokens left out."""
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def __repr__(self) -> str:
        kind = "VLM" if self.sees_images else "LLM"
        return f"HookedModel({self.name!r}: {type(self.hf).__name__}, {kind}, {self.cfg.n_layers} layers, d_model {self.cfg.d_model})"

    def _run_taps(self, queries: Queries | Batch, presentation: Presentation, taps: list[Tap]) -> Tensor:
        batch = queries if isinstance(queries, Batch) else self.batch(queries, presentation)
        logits = self._execute(dict(batch.inputs), taps, "all", 0, False)
        assert logits is not None
        return logits

    def _execute(
        self, inputs: dict[str, Tensor], taps: list[Tap], logits: str | None, new_tokens: int, padded_right: bool
    ) -> Tensor | None:
        if new_tokens:
            if padded_right:
                raise PlanError("a batch padded on the right", "padding on the left for generation", "make it with padding_side='left'")
            pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
            settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": pad}
            return self._drive(self.hf.generate, {**inputs, **settings}, taps, new_tokens)
        if logits is None:
            self._drive(self.hf.base_model, {**inputs, "use_cache": False}, taps, 1)
            return None
        # On the left, every row ends in its last token, and the unembedding of all others can be skipped.
        keep = 1 if logits == "last" and not padded_right else 0
        return self._drive(self.hf, {**inputs, "use_cache": False, "logits_to_keep": keep}, taps, 1).logits

    def _drive(self, call: Callable[..., Any], inputs: dict[str, Any], taps: list[Tap], new_tokens: int) -> Any:
        """Run `call` with the taps in place: the trace body, the same for forward and generate."""
        result: list[Any] = []

        def boxed(*args: Any, **kwargs: Any) -> Any:
            result.append(call(*args, **kwargs))
            return result[0]

        every = [(tap, self._wrapped.get(path), side) for tap in taps for path, side in (self.cfg.locate(tap.point),)]
        later = [located for located in every if located[0].decode]
        if not taps:
            with torch.no_grad():
                return call(**inputs)
        with warnings.catch_warnings():
            # A bounded iteration over decode steps may end early, at the end-of-sequence token.
            warnings.filterwarnings("ignore", message=r".*was never reached: the loop asked for a step")
            with torch.no_grad(), self._wrapped.trace(fn=boxed, **inputs) as tracer:
                for step in tracer.iter[: new_tokens if later else 1]:  # type: ignore[attr-defined]
                    for tap, envoy, side in every if step == 0 else later:
                        whole = getattr(envoy, side)
                        value = whole[0] if isinstance(whole, tuple) else whole
                        new = tap.fn(value, step)
                        if new is not None:
                            setattr(envoy, side, (new, *whole[1:]) if isinstance(whole, tuple) else new)
        return result[0]

    def _held(self, batch: Batch, plans: Sequence[Intervention]) -> Held:
        """The states that the plans need of other presentations' runs: one unedited forward per presentation."""
        wanted = required_runs(plans, self.cfg.n_layers)
        held: dict[tuple[State, int | None], Tensor] = {}
        for presentation in {state.run for state in wanted if state.run is not None}:
            sites = {state: self._site(state, wanted[state]) for state in wanted if state.run == presentation}
            twin = batch if presentation == batch.presentation else self.batch(batch.queries, presentation)
            reads = self.run(twin, read=tuple(set(sites.values())), logits=None).reads
            for state, site in sites.items():
                for index, point in enumerate(site.points(self.cfg.n_layers)):
                    held[state, point.layer] = reads[site][0, :, index]
        return held

    @staticmethod
    def _site(state: State, layers: set[int | None]) -> Site:
        return Site(state.hook, tuple(layer for layer in layers if layer is not None) or None, state.positions)

    def _check_sites(self, plan: Intervention, read: Sequence[Site]) -> None:
        known = set(self.cfg.points)
        for site in (*(step.site for step in plan.steps), *read):
            missing = next((point.name for point in site.points(self.cfg.n_layers) if point not in known), None)
            if missing:
                raise SiteError(f"{missing}, which {self.name} does not have", "one of model.hook_names", "choose another hook")

    def _require_finite(self, batch: Batch, reads: Mapping[Site, Tensor]) -> None:
        for site, states in reads.items():
            layers = tuple(point.layer if point.layer is not None else -1 for point in site.points(self.cfg.n_layers))
            for lane in states:
                require_finite(lane, batch.queries, layers)

    def _check_prompts(self, queries: Sequence[Query], prompts: Sequence[Prompt], presentation: Presentation) -> None:
        token = getattr(self.processor, "image_token", None) if self.sees_images else None
        for query, prompt in zip(queries, prompts, strict=True):
            if prompt.images and not self.sees_images:
                raise PresentationError(
                    f"the presentation {presentation.name!r}, which shows an image, for the text-only model {self.name}",
                    "presentations.text_only",
                    "load a vision-language model to show images",
                )
            if isinstance(token, str) and token in prompt.text:
                raise QueryError(
                    f"the image token {token!r} in the text of query {query.id!r}", "plain text", "remove it; images are added"
                )

    @cached_property
    def _needs_positions(self) -> bool:
        """Learned positions would count padding; VLMs work theirs out themselves (2-D ones would break M-RoPE)."""
        return not self.sees_images and "position_ids" in inspect.signature(self.hf.forward).parameters


@dataclass(frozen=True)
class HookPoint:
    """What a hook function is told about where it is."""

    name: str
    index: int | None

    def layer(self) -> int | None:
        """The layer; None where the hook has none."""
        return self.index


@dataclass(frozen=True, eq=False)
class _Cache:
    cached: dict[Point, Tensor]
    point: Point

    def __call__(self, value: Tensor, step: int) -> None:
        self.cached[self.point] = value.clone()


@dataclass(frozen=True, eq=False)
class _Hook:
    fn: HookFunction
    hook: HookPoint

    def __call__(self, value: Tensor, step: int) -> Tensor | None:
        return self.fn(value, self.hook)


def _at_last(logits: Float[Tensor, "lane query seq vocab"], batch: Batch) -> Float[Tensor, "lane query vocab"]:
    if not batch.padded_right:
        return logits[:, :, -1]
    last = batch.select("last").long().argmax(dim=1)
    return logits[:, torch.arange(len(last), device=last.device), last]


def _predicate(names: str | Iterable[str] | Callable[[str], bool] | None, n_layers: int) -> Callable[[Point], bool]:
    if names is None:
        return lambda point: True
    if callable(names):
        return lambda point: names(point.name)
    wanted = [parse(name, n_layers) for name in ([names] if isinstance(names, str) else names)]
    return lambda point: point in wanted or replace(point, layer=None) in wanted


def load(
    source: str | Path | nn.Module,
    *,
    processor: Any = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> HookedModel:
    """Load a VLM or LLM.

    Args:
        source: `"organism"` (the embedded tiny model), a hub id, a local directory, or a module already in memory.
        processor: For a module: its processor (VLM) or tokenizer (LLM).
        dtype: As in transformers; `"auto"` takes the checkpoint's.
        device_map: As in transformers, e.g. `"auto"`.
        revision: The hub's revision.
        trust_remote_code: Off unless you ask for it.
        options: Handed to `from_pretrained` (a quantisation config, an attention implementation, ...).

    Raises:
        ModelError: It can't be loaded, or a part of it is not found.
    """
    if isinstance(source, nn.Module):
        if processor is None:
            raise ModelError("a module without its processor", "both", "pass processor=AutoProcessor.from_pretrained(...)")
        name = getattr(source.config, "name_or_path", "") or type(source).__name__
        model = HookedModel(source.eval(), processor, Path(name).name)
    else:
        path = str(importlib.resources.files("guardlens") / "organism" / "weights") if source == "organism" else str(source)
        shared = {"revision": revision, "trust_remote_code": trust_remote_code}
        name = Path(path).name if Path(path).exists() and source != "organism" else str(source)
        model = HookedModel(*_from_pretrained(path, shared, {"dtype": dtype, "device_map": device_map, **options}), name, revision or "")
    _ = model.cfg  # finds the parts now, so that an unknown family fails here
    return model


def _from_pretrained(path: str, shared: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path, **shared)
        multimodal = type(config) in AutoModelForImageTextToText._model_mapping  # type: ignore[operator]
        model_class, reader = (AutoModelForImageTextToText, AutoProcessor) if multimodal else (AutoModelForCausalLM, AutoTokenizer)
        hf = model_class.from_pretrained(path, **shared, **options)
        return hf.eval(), reader.from_pretrained(path, **shared)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path!r}, which transformers can't load ({str(error).splitlines()[0]})",
            "'organism', a local directory made by save_pretrained, or a hub id that can be reached",
            "check the name; for a gated model, log in with `hf auth login`",
        ) from None
