"""`HookedModel`: a VLM or LLM of transformers under nnsight, with TransformerLens's hook names."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from guardlens.activations import ActivationCache
from guardlens.architectures import KNOWN, Architecture, Names, find, fingerprint
from guardlens.batches import Batch, Layout
from guardlens.errors import GuardlensError, MismatchError, PlanError
from guardlens.interventions import Context, Custom, Intervention, Step, nothing
from guardlens.prefixes import Prefill, prefill
from guardlens.program import Held, Tap, compile_taps, required_runs, site_of
from guardlens.prompts import instruction_mask, needs_image, require_showable, tokenise
from guardlens.queries import Presentation, Query, QueryPairs, WithoutImages, as_queries, text_only
from guardlens.runs import Run, agree, at_last, reads_of
from guardlens.sites import Site
from guardlens.storage import Provenance, digest
from guardlens.trace_driver import drive, wrap
from guardlens.verbs import HookFunction, NamesFilter, cache_taps, hook_taps

Queries = str | Query | QueryPairs | Sequence[str | Query]


@dataclass(frozen=True, eq=False)
class HookedModel:
    """A model with hooks. Make one with `guardlens.load`.

    Attributes:
        hf: The Hugging Face model; it is never changed.
        processor: Its processor, or the tokenizer of a text-only model.
        name: As it appears in results.
        revision: The hub's revision, where there is one.
        separate_llm: Another language model to compare with, of the same width and depth; None for the VLM's own.
        names: What its parts may be called.
    """

    hf: Any
    processor: Any
    name: str
    revision: str = ""
    separate_llm: "HookedModel | None" = None
    names: Names = KNOWN

    def __post_init__(self) -> None:
        llm = self.separate_llm
        if llm and (llm.cfg.d_model, llm.cfg.n_layers) != (self.cfg.d_model, self.cfg.n_layers):
            raise MismatchError(
                f"an LLM of width {llm.cfg.d_model} and {llm.cfg.n_layers} layers beside {self.name}",
                f"width {self.cfg.d_model} and {self.cfg.n_layers} layers, as the VLM's own language model",
                "give the LLM that the VLM was made from",
            )

    @property
    def llm(self) -> "HookedModel":
        """The model of the text twin: the LLM that was given beside the VLM, else the VLM itself, shown no image."""
        return self.separate_llm or self

    @cached_property
    def cfg(self) -> Architecture:
        """Sizes and paths: `n_layers`, `d_model`, `n_heads`, `d_vocab`, `image_token_id`, `image_size`, ..."""
        return find(self.hf, self.names)

    @cached_property
    def _wrapped(self) -> Any:
        return wrap(self.hf)

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
        require_showable(items, prompts, presentation, self.processor, self.sees_images)
        inputs = tokenise(self.processor, prompts, padding_side, self.sees_images)
        if missing := self._required - set(inputs):
            raise needs_image(type(self._inner).__name__, f"it needs {', '.join(sorted(missing))}")
        mask = inputs["attention_mask"].bool()
        image = inputs["input_ids"] == self.cfg.image_token_id if self.sees_images else torch.zeros_like(mask)
        instruction = instruction_mask(self.processor, prompts, inputs["input_ids"], self.sees_images)
        if image.any() and "mm_token_type_ids" in self._parameters:
            inputs.setdefault("mm_token_type_ids", image.long())  # some processors only make them when asked
        if self._needs_positions:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        device = self.hf.device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        return Batch(items, presentation, inputs, mask.to(device), image.to(device), instruction.to(device))

    def run(
        self,
        batch: Batch | Prefill,
        plans: Intervention | Sequence[Intervention] = nothing,
        *,
        read: Sequence[Site] = (),
        logits: Literal["last", "all"] | None = "last",
        new_tokens: int = 0,
        seed: int | None = None,
        generation: Mapping[str, Any] = MappingProxyType({}),
        layout: Literal["auto", "branch", "tile"] = "auto",
    ) -> Run:
        """Run one or several plans over a batch; each plan is a lane.

        Several plans that touch the last token alone ride as branches: the prompt is computed once, and each plan costs one token more.
        `Run.layout` says what was done, and `Run.why` why not that.

        Args:
            batch: The prompts, or what `prefill` kept of them.
            plans: What to change, one plan per lane.
            read: Sites to read, after all edits there.
            logits: At the prompt's last token, at all tokens, or none (the unembedding is then skipped).
            new_tokens: Generate up to so many tokens; `logits` are then not returned.
            seed: Of the draws, where `generation` asks for sampling.
            generation: Options of transformers' `generate`; greedy without any.
            layout: How several plans share a forward: as branches of the last token, as tiles (a copy of the batch each), or as branches
                where they can.

        Raises:
            MismatchError: A plan was made for another model.
            SiteError, PlanError: A plan asks for what this model, run or layout does not have.
            NumericsError: NaN or infinity in a read or in the logits; layer and query are named.
        """
        lanes = [plans] if isinstance(plans, Intervention) else list(plans)
        kept, batch = (batch, batch.batch) if isinstance(batch, Prefill) else (None, batch)
        for plan in lanes:
            plan.check((self.id, self.llm.id), self.cfg.n_layers, self.cfg.widths)
            self._check_sites(plan, read)
        lanes = [plan.to(self.hf.device) for plan in lanes]
        why = self.unbranchable(kept or batch, lanes, read, logits, new_tokens) if layout != "tile" else "tiles were asked for"
        if not why and (kept or len(lanes) > 1 or layout == "branch"):
            kept = kept or self.prefill(batch)
            why = kept.flaw
            if not why:
                return self._run_branches(kept, lanes, read, logits)
        if layout == "branch":
            raise PlanError(f"plans that can't run as branches: {why}", "edits and reads of the last token", 'choose layout="auto"')
        return replace(self._run_tiles(batch, lanes, read, logits, new_tokens, seed, generation), why=why)

    def prefill(self, batch: Batch) -> Prefill:
        """Run prompts unedited and keep their keys and values, so that whatever is asked of their last token costs that token alone.

        The first one of a model is checked: two branches without an edit and one with an edit must give what whole runs give. Where they
        don't (a recurrent layer, a prefix that looks ahead), `Prefill.flaw` says so, and plans run as tiles.
        """
        if not self._flaw:
            try:
                made = prefill(self.hf.get_submodule(self.cfg.decoder), self._text_config, batch, self._last_logits)
                self._memo["flaw"] = self._flaw_of(made)
                if not self._flaw:
                    return made
            except GuardlensError:
                raise
            except Exception as error:  # a foreign model or cache may fail in any way, and the table must say so
                self._memo["flaw"] = f"{type(error).__name__}: {error}".splitlines()[0]
        plain = self._run_tiles(batch, [nothing], (), "last").logits
        assert plain is not None
        return Prefill(batch, None, {}, batch.mask.new_zeros(1, len(batch.queries), 1).long(), plain[0], flaw=self._flaw)

    def _run_tiles(
        self,
        batch: Batch,
        lanes: Sequence[Intervention],
        read: Sequence[Site],
        logits: str | None,
        new_tokens: int = 0,
        seed: int | None = None,
        generation: Mapping[str, Any] = MappingProxyType({}),
    ) -> Run:
        layout = Layout.tile(len(batch.queries), batch.mask.shape[1], len(lanes), batch.mask.device)
        taps, record = compile_taps(lanes, read, layout, batch, self.cfg.n_layers, self._held(batch, lanes))
        run, tokens, by_lane = replace(batch, inputs=layout.spread(batch.inputs, self.cfg.packed)), None, None
        if new_tokens:
            tokens = self._generate(run, taps, new_tokens, seed, generation).unflatten(0, (len(lanes), -1))
        else:
            # On the left, every row ends in its last token, and the unembedding of all others can be skipped.
            raw = self._forward(run, taps, None if logits is None else int(logits == "last" and not batch.padded_right))
            by_lane = None if raw is None else raw.unflatten(0, (len(lanes), -1))
        reads = reads_of(record, read, batch, self.cfg.n_layers)
        by_lane = at_last(by_lane, batch) if by_lane is not None and logits == "last" else by_lane
        return Run(reads, by_lane, tokens, record.verdicts, layout.name)

    def _run_branches(self, kept: Prefill, lanes: Sequence[Intervention], read: Sequence[Site], logits: str | None) -> Run:
        batch = kept.batch
        layout = Layout.branch(len(batch.queries), batch.mask.shape[1], len(lanes), batch.mask.device)
        taps, record = compile_taps(lanes, read, layout, batch, self.cfg.n_layers, self._held(batch, lanes, kept.held))
        call = self._continue if logits else self._decoder
        with kept.kept():
            raw = self._drive(call, kept.branches(len(lanes), self.hf.dtype), taps, batch)
        reads = reads_of(record, read, batch, self.cfg.n_layers)
        by_lane = at_last(raw.transpose(0, 1)[:, :, None], batch) if logits else None
        return Run(reads, by_lane, None, record.verdicts, layout.name)

    def unbranchable(
        self,
        batch: Batch | Prefill,
        plans: Sequence[Intervention],
        read: Sequence[Site] = (),
        logits: str | None = "last",
        new_tokens: int = 0,
    ) -> str:
        """Why a run of these plans can't share all but the last token of its prompts; empty if it can."""
        steps = [step for plan in plans for step in plan.steps if step.phase != "decode"]
        sites = [*(step.site for step in steps), *read]
        asked = [state for step in steps for state in step.requires if state.run is None]
        elsewhere = next((place.positions for place in (*sites, *asked) if place.positions != "last"), None)
        within = f"{self.cfg.decoder}."
        paths = [(site.hook, self.cfg.locate(point).path) for site in sites for point in site.points(self.cfg.n_layers)[:1]]
        outside = next((hook for hook, path in paths if hook != "unembed" and not path.startswith(within)), None)
        reasons = {
            "answers are generated": new_tokens > 0,
            "logits of all tokens are asked for": logits == "all",
            "the batch is padded on the right": (batch.batch if isinstance(batch, Prefill) else batch).padded_right,
            f"the positions {elsewhere!r} are edited or read": elsewhere is not None,
            f"the hook {outside} is outside of the decoder": outside is not None,
        }
        return next((reason for reason, holds in reasons.items() if holds), batch.flaw if isinstance(batch, Prefill) else "")

    def _flaw_of(self, made: Prefill) -> str:
        """Whether branches give what whole runs give: unedited always, and edited when the model's first are made."""
        unedited = self._run_branches(made, [nothing, nothing], (), "last").logits
        assert unedited is not None
        if not agree(unedited, made.logits):
            return "branches without an edit differ from the plain run"
        if "flaw" not in self._memo:
            push = _PUSH
            edited, whole = (
                self._run_branches(made, [nothing, push], (), "last").logits,
                self._run_tiles(made.batch, [push], (), "last").logits,
            )
            if edited is None or whole is None or not agree(edited[1], whole[0]) or not agree(edited[0], made.logits):
                return "an edited branch differs from an edited run"
        return ""

    @cached_property
    def _memo(self) -> dict[str, str]:
        """What was found out about the model when it was first used so."""
        return {}

    @property
    def _flaw(self) -> str:
        return self._memo.get("flaw", "")

    def run_with_cache(
        self, queries: Queries | Batch, presentation: Presentation = text_only, *, names_filter: NamesFilter = None
    ) -> tuple[Float[Tensor, "query seq vocab"], ActivationCache]:
        """Logits at all tokens, and whole hook values, as in TransformerLens.

        Args:
            queries: What to ask, or a batch.
            presentation: How to show it.
            names_filter: A hook name, several, or a predicate; None caches everything that the run computes (attention patterns
                only of a model loaded with `attn_implementation="eager"`).

        Raises:
            SiteError: Unknown hook name (the closest is suggested), or a value that the run did not compute.
        """
        batch = queries if isinstance(queries, Batch) else self.batch(queries, presentation)
        computed = [p for p in self.cfg.computed(batch.beside_image) if p.hook != "pattern" or self._eager]
        taps, kept = cache_taps(self.cfg, names_filter, computed)
        logits = self._forward(batch, taps)
        return logits, ActivationCache(kept, self.cfg.n_layers, self.to_logits, self.cfg.residual_scale)

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
        batch = queries if isinstance(queries, Batch) else self.batch(queries, presentation)
        return self._forward(batch, hook_taps(self.cfg, fwd_hooks))

    def to_logits(self, states: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape vocab"]:
        """The residual stream through final norm and unembedding: the logit lens of any layer, the model's own logits for the last."""
        norm, unembed = (self.hf.get_submodule(path) for path in (self.cfg.norm, self.cfg.unembed))
        with torch.no_grad():
            return self.cfg.finish(unembed(norm(states)))

    def generate(
        self,
        queries: Queries | Batch,
        presentation: Presentation = text_only,
        intervention: Intervention = nothing,
        *,
        max_new_tokens: int = 64,
        seed: int | None = None,
        **options: Any,
    ) -> Any:
        """Answers under an intervention: a string for one query, else a list of them.

        Args:
            queries: What to ask, or a batch.
            presentation: How to show it.
            intervention: What to change.
            max_new_tokens: The longest answer.
            seed: Of the draws, with `do_sample=True`.
            options: Handed to transformers' `generate`: `do_sample=True, temperature=0.7`, `use_cache=False`, ... Greedy by default.

        Raises:
            PlanError: Options that give several answers per prompt.
        """
        batch = queries if isinstance(queries, Batch) else self.batch(queries, presentation)
        tokens = self.run(batch, intervention, new_tokens=max_new_tokens, seed=seed, generation=options).tokens
        answers = self.decode(tokens[0])  # type: ignore[index]
        return answers[0] if isinstance(queries, str | Query) else answers

    def decode(self, tokens: Int[Tensor, "query new"]) -> list[str]:
        """Token ids as text, special tokens left out."""
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def __repr__(self) -> str:
        kind = "VLM" if self.sees_images else "LLM"
        beside = f", beside {self.separate_llm.name!r}" if self.separate_llm else ""
        sizes = f"{self.cfg.n_layers} layers, d_model {self.cfg.d_model}"
        return f"HookedModel({self.name!r}: {type(self._inner).__name__}, {kind}, {sizes}{beside})"

    @cached_property
    def _inner(self) -> Any:
        """The model itself, where an adapter (PEFT) is around it."""
        return self.hf.get_base_model() if hasattr(self.hf, "get_base_model") else self.hf

    @property
    def _text_config(self) -> Any:
        return self._inner.config.get_text_config(decoder=True)

    @property
    def _eager(self) -> bool:
        return self._text_config._attn_implementation == "eager"

    def _forward(self, batch: Batch, taps: list[Tap], keep: int | None = 0) -> Any:
        """Logits of a forward: at all tokens (`keep` 0), at the last (1), or none (None; the unembedding is then skipped)."""
        trunk = self._inner.base_model
        inputs = {**batch.inputs, "use_cache": False}
        if keep is None and trunk is not self._inner:
            self._drive(trunk, inputs, taps, batch)
            return None
        if "logits_to_keep" in self._parameters:
            inputs["logits_to_keep"] = 0 if self._need_all_tokens(taps) else keep or 0
        logits = self._drive(self.hf, inputs, taps, batch).logits
        return None if keep is None else logits[:, -keep:]

    def _last_logits(self, inputs: dict[str, Any]) -> Tensor:
        """The unedited logits at the last column."""
        if "logits_to_keep" in self._parameters:
            inputs = {**inputs, "logits_to_keep": 0 if self.cfg.narrows else 1}
        with torch.no_grad():
            return self._inner(**inputs).logits[:, -1]

    def _decoder(self, **inputs: Any) -> Tensor:
        """The final normed states of the decoder alone."""
        return self.hf.get_submodule(self.cfg.decoder)(**inputs)[0]

    def _continue(self, **inputs: Any) -> Tensor:
        """The logits of the decoder alone."""
        return self.cfg.finish(self.hf.get_submodule(self.cfg.unembed)(self._decoder(**inputs)))

    def _need_all_tokens(self, taps: Sequence[Tap]) -> bool:
        """Whether a tap looks where the model would leave out tokens whose logits are not asked for."""
        return self.cfg.narrows or any(tap.point.hook == "unembed" for tap in taps)

    def _generate(self, batch: Batch, taps: list[Tap], new_tokens: int, seed: int | None, options: Mapping[str, Any]) -> Tensor:
        if batch.padded_right:
            raise PlanError("a batch padded on the right", "padding on the left for generation", "make it with padding_side='left'")
        if several := next((name for name in ("num_beams", "num_return_sequences") if options.get(name, 1) != 1), None):
            raise PlanError(f"{several}={options[several]}", "one answer per prompt", "hand in the query several times, or several seeds")
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": pad, **options}
        if self._need_all_tokens(taps):
            settings["logits_to_keep"] = 0
        if not settings.get("use_cache", True):
            taps = [replace(tap, decode=True) for tap in taps]
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            tokens = self._drive(self.hf.generate, {**batch.inputs, **settings}, taps, batch, new_tokens)
        return tokens[:, batch.mask.shape[1] :]

    def _drive(self, call: Callable[..., Any], inputs: dict[str, Any], taps: Sequence[Tap], batch: Batch, steps: int = 1) -> Any:
        return drive(self._wrapped, self.cfg, call, inputs, taps, beside_image=batch.beside_image, steps=steps)

    def _held(self, batch: Batch, plans: Sequence[Intervention], known: dict[Any, Tensor] | None = None) -> Held:
        """The states that the plans need of other presentations' runs: one unedited forward per presentation.

        Where what is `known` is kept, all layers are read at once, so that whatever layer asks next has its state.
        """
        wanted = required_runs(plans, self.cfg.n_layers)
        held = {} if known is None else known
        missing = {state: layers for state, layers in wanted.items() if any((state, layer) not in held for layer in layers)}
        for presentation in {state.run for state in missing if state.run is not None}:
            model, other = self.source(batch, presentation)
            asked = {state: layers for state, layers in missing.items() if state.run == presentation}
            if known is not None:
                computed = model.cfg.computed(other.beside_image)
                asked |= {
                    state: {point.layer for point in computed if point.hook == site_of(state, layers).hook}
                    for state, layers in asked.items()
                }
            sites = {state: site_of(state, layers) for state, layers in asked.items()}
            reads = model.run(other, read=tuple(dict.fromkeys(sites.values())), logits=None).reads
            for state, site in sites.items():
                for index, point in enumerate(site.points(self.cfg.n_layers)):
                    held[state, point.layer] = reads[site][0, :, index].to(self.hf.device)
        return held

    def source(self, batch: Batch, presentation: Presentation) -> "tuple[HookedModel, Batch]":
        """Where a held state of `presentation` is read: the model and its prompts. The text twin's are the same without their images."""
        if presentation == text_only:
            same = self.llm is self and not batch.beside_image
            return self.llm, batch if same else self.llm.batch(batch.queries, WithoutImages(batch.presentation))
        return self, batch if presentation == batch.presentation else self.batch(batch.queries, presentation)

    def _check_sites(self, plan: Intervention, read: Sequence[Site]) -> None:
        for site in (*(step.site for step in plan.steps), *read):
            for point in site.points(self.cfg.n_layers):
                self.cfg.locate(point)

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        """What the model's forward takes."""
        return inspect.signature(self._inner.forward).parameters

    @cached_property
    def _required(self) -> set[str]:
        """The inputs that it can't do without."""
        named = {name for name, p in self._parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        return named - {"self"}  # shown by modules that were copied after nnsight had wrapped them

    @cached_property
    def _needs_positions(self) -> bool:
        """Learned positions would count padding; VLMs work theirs out themselves (2-D ones would break M-RoPE)."""
        return not self.sees_images and "position_ids" in self._parameters


def _pushed(states: Float[Tensor, "state d"], context: Context) -> Float[Tensor, "state d"]:
    direction = torch.ones_like(states)
    direction[:, ::2] = -1
    return states + states.norm(dim=-1, keepdim=True) * direction / states.shape[-1] ** 0.5


_PUSH = Intervention((Step(Custom(_pushed), Site(layers=(0,))),))
"""What shows whether an edited branch gives what an edited run gives: a push as long as the state itself."""
