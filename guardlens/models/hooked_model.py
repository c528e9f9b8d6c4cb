"""`HookedModel`: a VLM or LLM of transformers under nnsight, with TransformerLens's hook names."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from guardlens.data.presentations import Presentation, Prompt, WithoutImages, text_only
from guardlens.data.presentations.protocol import require_presentation
from guardlens.data.queries import Query, QueryPairs, as_queries
from guardlens.errors import (
    ArgumentError,
    InterventionError,
    MismatchError,
    ModelError,
    PresentationError,
    QueryError,
    SiteError,
    as_count,
    is_several,
    one_of,
    quoted,
    require_type,
    warn,
)
from guardlens.hooks import Site
from guardlens.interventions import Intervention, nothing
from guardlens.interventions.intervention import require_intervention
from guardlens.models.activation_cache import ActivationCache
from guardlens.models.architectures import KNOWN, Architecture, Names, constants, find, fingerprint
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.compiler import Held, Tap, required_runs, site_of
from guardlens.models.engine.forward import Engine
from guardlens.models.engine.generation_options import flat, merged, require_one_answer, require_options, require_stepwise
from guardlens.models.engine.hook_functions import HookFunction, NamesFilter, cache_taps, hook_taps
from guardlens.models.engine.kv_cache import Prefill, Prefix, answers_kind
from guardlens.models.engine.lanes import run_answers, run_forks, run_tails, run_tiles
from guardlens.models.engine.model_lock import lock_of, taken
from guardlens.models.engine.out_of_memory import at_work
from guardlens.models.engine.request import Asked, together
from guardlens.models.engine.run import Run, checked
from guardlens.models.engine.selftests import Trials
from guardlens.models.processing.chat_template import (
    instruction_mask,
    needs_image,
    padding_token,
    presented,
    require_showable,
    tokenize,
    tokenizer_of,
)
from guardlens.models.readiness import foreign_hooks, hook_name, require_ready
from guardlens.results.files import digest
from guardlens.results.notebook_html import captioned, facts
from guardlens.results.provenance import Provenance

Queries = str | Query | QueryPairs | Sequence[str | Query]


@dataclass(frozen=True, eq=False)
class HookedModel:
    """A model with hooks. Make one with `guardlens.load`.

    One run at a time: threads take turns, and an edit or hook function that calls the model it is in is refused. A model in training mode,
    or under a guard of `attach`, is refused, too. With `do_sample`, one seed gives other draws in batches of another size.

    Attributes:
        hf: The Hugging Face model. Its weights, mode and hooks are never changed; nnsight wraps its modules' `forward`, which stays so.
        processor: Its processor, or the tokenizer of a text-only model.
        name: As it appears in results.
        revision: The hub's revision, where there is one.
        separate_llm: Another language model to compare with, of the same width and depth; None for the VLM's own.
        names: What its parts may be called.

    Examples:
        >>> model
        HookedModel('organism': LlavaForConditionalGeneration, VLM, 8 layers, d_model 128)
        >>> model.cfg.n_layers, model.cfg.d_model, model.sees_images
        (8, 128, True)
        >>> run = model.run(batch, [iv.nothing, guard.at(layers=7)])  # two interventions, of which each is a lane
        >>> run.logits.shape  # lane, query, vocabulary; at the prompts' last token
        torch.Size([2, 3, 251])
        >>> model.generate(queries[1], grey, guard.at(layers=7)).split()[0]
        'sorry'
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

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: the model without what it has learned of it, which a copy learns anew."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def llm(self) -> "HookedModel":
        """The model of the text twin: the LLM that was given beside the VLM, else the VLM itself, shown no image."""
        return self.separate_llm or self

    @cached_property
    def cfg(self) -> Architecture:
        """Sizes and paths: `n_layers`, `d_model`, `n_heads`, `d_vocab`, `image_token_id`, `image_size`, ..."""
        return find(self.hf, self.names)

    @cached_property
    def _engine(self) -> Engine:
        return Engine(self.hf, self.cfg)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return tokenizer_of(self.processor)

    @property
    def sees_images(self) -> bool:
        """Whether it is a VLM."""
        return self.cfg.image_token_id is not None

    @property
    def id(self) -> str:
        """Name and fingerprint; directions and interventions of another fingerprint are refused. It changes with the weights, the config
        and the adapters, and costs a pass over the weights the first time that it is asked for.
        """
        return f"{self.name}@{self.fingerprint}"

    @property
    def fingerprint(self) -> str:
        """A digest of the weights, the config and the adapters, whatever the model is called; see `architectures.fingerprint`."""
        return fingerprint(self.hf)

    @property
    def ids(self) -> tuple[str, str]:
        """Of this model and of the LLM beside it, which is the same one if no other was given."""
        own = self.id
        return own, own if self.separate_llm is None else self.separate_llm.id

    @property
    def hook_names(self) -> list[str]:
        """Full TransformerLens names of everything that can be read, in order of execution."""
        return [point.name for point in self.cfg.points]

    @property
    def provenance(self) -> Provenance:
        """Model, chat template, versions, date, the LLM beside it."""
        template = getattr(self.processor, "chat_template", None) or ""
        return Provenance(self.id, digest(str(template).encode()), self.revision, llm=self.separate_llm.id if self.separate_llm else "")

    def batch(self, queries: Queries, presentation: Presentation = text_only, *, padding_side: str = "left") -> Batch:
        """Prompts as tensors: presented, put into the chat template with the generation prompt, padded.

        Raises:
            QueryError: No queries, a special token of the tokenizer in a text, or more tokens than learned positions.
            PresentationError: An image for a text-only model, a query that can't be presented so, or prompts of unlike numbers of images
                for a model that looks at them through cross-attention.
            ModelError: A prompt without image for a model that can't take one.
        """
        items = as_queries(queries)
        require_presentation(presentation)
        with at_work("the presentation", presentation):
            prompts = presented(items, presentation)
        require_showable(items, prompts, presentation, self.processor, self.sees_images)
        self._require_alike(prompts)
        with lock_of(self.hf):  # what the processor is set to meanwhile must not reach another thread's prompts
            inputs = tokenize(self.processor, prompts, padding_side, self.sees_images)
        if missing := self._engine.required - set(inputs):
            raise needs_image(type(self._engine.inner).__name__, f"it needs {', '.join(sorted(missing))}")
        mask = inputs["attention_mask"].bool()
        self._require_room(items[int(mask.sum(1).argmax())], int(mask.sum(1).max()))
        image = inputs["input_ids"] == self.cfg.image_token_id if self.sees_images else torch.zeros_like(mask)
        instruction = instruction_mask(self.processor, prompts, inputs["input_ids"], mask, self.sees_images)
        if image.any() and "mm_token_type_ids" in self._engine.parameters:
            inputs.setdefault("mm_token_type_ids", image.long())  # some processors only make them when asked
        if self._needs_positions:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        device = self._engine.device  # pixels in the model's own precision, which not every family sees to
        inputs = {name: value.to(device, self.hf.dtype if value.is_floating_point() else None) for name, value in inputs.items()}
        seen = {id(image): image for prompt in prompts for image in prompt.images}
        known = {number: _described(image) for number, image in seen.items()}
        pictures = tuple(digest(*(known[id(image)] for image in prompt.images)) for prompt in prompts)
        places = (mask.to(device), image.to(device), instruction.to(device))
        return Batch(items, presentation, inputs, *places, pictures, words=self.tokenizer)

    def run(
        self,
        batch: Batch | Prefill,
        interventions: Intervention | Sequence[Intervention] = nothing,
        *,
        read: Site | Sequence[Site] = (),
        logits: Literal["last", "answer", "all"] | None = "last",
        new_tokens: int = 0,
        seed: int | None = None,
        generation: Mapping[str, Any] = MappingProxyType({}),
        layout: Literal["auto", "branch", "fork", "tile"] = "auto",
        prefix: Prefix | None = None,
    ) -> Run:
        """Run one or several interventions over a batch; each intervention is a lane.

        Several interventions share what they can: `Run.layout` says how they were computed, and `Run.why` why not as branches.

        Args:
            batch: The prompts, or what `prefill` kept of them.
            interventions: What to change, one intervention per lane.
            read: Sites to read, one or several, after all edits there.
            logits: At the prompt's last token, at each token that one of an answer follows (`Prefill.answering`), at all tokens, or none
                (the unembedding is then skipped).
            new_tokens: Generate up to so many tokens; `logits` are then not returned.
            seed: Of the draws, where `generation` asks for sampling; several lanes draw in turn, so each has its own.
            generation: Options of transformers' `generate`; greedy without any.
            layout: How several interventions share a forward: as branches (copies of the prompts' ends), as forks (from the first block on
                that they touch), as tiles (a copy of the batch each), or as is cheapest.
            prefix: What `share` gave for prompts that begin alike; a run that looks behind it continues from it.

        Raises:
            MismatchError: An intervention was made for another model.
            SiteError, InterventionError: An intervention asks for what this model, run or layout does not have.
            NumericsError: NaN or infinity in a read or in the logits; layer and query are named.
        """
        kept, batch = (batch, batch.batch) if isinstance(batch, Prefill) else (None, batch)
        read = [read] if isinstance(read, Site) else read
        lanes, device = list(interventions) if isinstance(interventions, Sequence) else [interventions], self._engine.device
        if not lanes:
            raise InterventionError("no interventions", "one at least", "hand in interventions.nothing for the unedited run")
        self._require_runnable(batch, lanes, read)
        if logits is not None and not one_of(logits, LOGITS):
            raise InterventionError(
                f"logits={quoted(logits)}", f"one of {', '.join(map(repr, LOGITS))}", "leave it out for those of the last token"
            )
        new_tokens = as_count(new_tokens, "new_tokens", ArgumentError, "say how many tokens to generate; leave it out for none", least=0)
        seed = None if seed is None else as_count(seed, "seed", ArgumentError, "say seed=0, or leave it out", least=0)
        self._require_kept(kept, batch, logits, new_tokens)
        if not one_of(layout, LAYOUTS) or (new_tokens and layout != "auto"):
            found = f"the layout {quoted(layout)}{' of generated answers' if one_of(layout, LAYOUTS) else ''}"
            raise InterventionError(found, f"one of {', '.join(LAYOUTS)}, and auto for answers", "leave it out: the cheapest is chosen")
        options = self._options(generation, batch, new_tokens)
        asked = Asked(self.cfg, batch, [intervention.to(device) for intervention in lanes], read, logits, new_tokens, seed, options)
        with self._turn():
            if new_tokens:
                return self._answered(asked, kept, prefix)
            return self._shared(asked, kept, prefix, layout) if kept or len(lanes) > 1 or layout != "auto" else self._alone(asked, prefix)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The model, ready and for this thread alone.

        Raises:
            ModelError: It is in training mode, or under a guard.
            InterventionError: It is running already, as within an edit that calls it.
        """
        with taken(self.hf) as first:
            if first:
                require_ready(self.hf)
            yield

    def _shared(self, asked: Asked, kept: Prefill | None, prefix: Prefix | None, layout: str) -> Run:
        """Interventions that share what they can: the cheapest way, or the one that was asked for."""
        why = asked.unbranchable if layout in ("auto", "branch") else f"{layout}s were asked for"
        if not why and asked.batch.answered and self._engine.stretches:
            why = "an answer may stretch what positions mean"
        why = why or self._trials.flaws.get(("branches", asked.batch.beside_image), "")
        if not why:
            start = kept or self.prefill(asked.batch, prefix)
            if start.stem is not None:
                run, _ = run_tails(self._engine, asked, self._held(asked, start.held), start.stem, asked.tail)
                return replace(run, layout="branch")
            why = start.flaw
        if layout == "branch":
            raise InterventionError(
                f"interventions that can't run as branches: {why}", "edits and reads of the prompts' ends", 'choose layout="auto"'
            )
        if layout == "fork" and (why_not := asked.unforkable or self._trials.against_forks(asked.batch)):
            raise InterventionError(
                f"interventions that can't run as forks: {why_not}", "edits and reads from a block on", 'choose layout="auto"'
            )
        forks = layout == "fork" or (layout == "auto" and asked.forks and self._trials.forks(asked.batch))
        run = (run_forks if forks else run_tiles)(self._engine, asked, self._held(asked, kept.held if kept else None))
        return replace(run, layout="fork" if forks else "tile", why=why)

    def _alone(self, asked: Asked, prefix: Prefix | None) -> Run:
        """One intervention: a plain run, or one that goes on behind what all prompts begin with."""
        shared, held = self._begins(prefix, asked.batch), self._held(asked)
        if shared is not None and asked.follows(shared.rest(asked.batch)):
            return run_tails(self._engine, asked, held, shared.stem(asked.batch), shared.rest(asked.batch))[0]
        return run_tiles(self._engine, asked, held)

    def _answered(self, asked: Asked, kept: Prefill | None, prefix: Prefix | None) -> Run:
        """Answers: behind what is kept of the prompts, or what they begin with alike, where that can be."""
        shared = self._begins(prefix, asked.batch)
        hopeless = not kept and self._trials.flaws.get((answers_kind(asked.batch, shared=True), asked.batch.beside_image))
        if (kept or shared) and asked.follow_prompts and not hopeless:
            start = kept or self.prefill(asked.batch, shared)
            if start.stem is not None and self._trials.answers(start.stem):
                return replace(run_answers(self._engine, asked, self._held(asked, start.held), start.stem), layout="branch")
        run = run_tiles(self._engine, asked, self._held(asked, kept.held if kept else None))
        return replace(run, why="answers are generated" if len(asked.interventions) > 1 else "")

    def _options(self, generation: Mapping[str, Any], batch: Batch, new_tokens: int) -> dict[str, Any]:
        """What `generate` is called with, once it is known to give one answer per prompt, token by token."""
        require_type(generation, Mapping, InterventionError, "say generation={'do_sample': True, ...}")
        options = flat(generation)
        if not new_tokens:
            if options:
                raise InterventionError(
                    "options of generation for a run that generates nothing", "new_tokens", "say new_tokens=16, or leave them out"
                )
            return {}
        require_options(options, batch.inputs)
        settings = merged(self.hf, options)
        require_stepwise(settings)
        require_one_answer(settings)
        tokenizer = {"tokenizer": self.tokenizer} if "stop_strings" in settings else {}
        caching = {name: settings[name] for name in ("use_cache", "cache_implementation") if name in settings}
        return {"pad_token_id": self._pad_token_id, **tokenizer, **caching, **options}

    def _require_kept(self, kept: Prefill | None, batch: Batch, logits: str | None, new_tokens: int) -> None:
        """Refuse prompts that are not this model's own, and answers where they can't be scored."""
        if kept:
            self.require_own(kept)
        if (logits == "answer" or batch.answered) and not (kept and batch.answered and not new_tokens):
            raise InterventionError("an answer behind no kept prompts", "kept prompts", "say model.prefill(batch).answering(tokens)")
        ids = batch.inputs["input_ids"][:, batch.mask.shape[1] - batch.answered :]
        if batch.answered and int(ids.max()) >= self.cfg.d_vocab:
            raise InterventionError(
                f"the token {int(ids.max())} in an answer", f"ids below {self.cfg.d_vocab}", "hand in ids of this model's tokenizer"
            )
        if kept and batch.answered and kept.stem is None:
            self._trials.require_answers(batch, kept.logits)

    def _require_runnable(self, batch: Batch, interventions: Sequence[Intervention], read: Sequence[Site]) -> None:
        """Refuse what is no batch, no site or no intervention, and interventions and sites that this model has no place for."""
        self._require_own_words(batch)
        if not is_several(read):
            raise SiteError(f"read={quoted(read)}", "sites", "say read=[Site('resid_post')], or leave it out")
        for site in read:
            require_type(site, Site, SiteError, "say Site('resid_post')")
        models = self.ids
        for intervention in interventions:
            require_intervention(intervention)
            intervention.require_fit(models, self.cfg.n_layers, self.cfg.widths)
            for site in (*(step.site for step in intervention.steps), *read):
                for point in site.points(self.cfg.n_layers):
                    self.cfg.locate(point)

    def _require_own_words(self, batch: Batch) -> None:
        """Refuse what are no prompts, or prompts whose tokens mean something else to this model.

        Raises:
            QueryError: No batch.
            MismatchError: Another tokenizer made them.
        """
        require_type(batch, Batch, QueryError, "make one of queries with model.batch(queries, presentation)")
        if batch.words is None or batch.words is self.tokenizer or batch.words.get_vocab() == self.tokenizer.get_vocab():
            return
        raise MismatchError(
            f"a batch of another tokenizer, a {type(batch.words).__name__}", f"one of {self.name!r}", "make it with this model's .batch"
        )

    def prefill(self, batch: Batch, prefix: Prefix | None = None) -> Prefill:
        """Run prompts unedited and keep their keys and values, so that whatever is asked of their ends costs those alone.

        The first one of a model is checked: two branches without an edit and one with an edit must give what whole runs give. Where they
        don't (a recurrent layer, a prefix that looks ahead), `Prefill.flaw` says so, and interventions run otherwise.

        Args:
            batch: The prompts.
            prefix: What `share` gave for prompts that begin alike; it is used if these do.

        Raises:
            InterventionError: Prompts with answers behind them.
        """
        self._require_own_words(batch)
        if batch.answered:
            raise InterventionError("prompts with answers", "prompts alone", "keep them first, then say kept.answering(tokens)")
        shared = self._begins(prefix, batch)
        with self._turn():
            made = None if batch.padded_right else self._trials.stem(batch, shared)
            if made is not None:
                checked(made[1][None], batch)
                return Prefill(batch, *made, models=self._computing)
            flaw = "the batch is padded on the right" if batch.padded_right else self._trials.flaws["branches", batch.beside_image]
            plain = run_tiles(self._engine, Asked(self.cfg, batch, [nothing]), {}).logits
        assert plain is not None
        return Prefill(batch, None, plain[0], flaw=flaw, models=self._computing)

    def _begins(self, prefix: Prefix | None, batch: Batch) -> Prefix | None:
        """What of a prefix a batch begins with.

        Raises:
            MismatchError: Another model computed it.
        """
        if prefix is not None:
            require_type(prefix, Prefix, InterventionError, "hand in what model.share(batch) gave, or leave it out")
        if prefix is not None and prefix.model != self.id:
            raise MismatchError(f"a prefix of {prefix.model}", f"one of {self.id}", "share the prompts anew with this model")
        return None if prefix is None else prefix.begins(batch)

    def together(self, kept: Prefill, interventions: Iterable[Intervention]) -> Iterator[list[Intervention]]:
        """Interventions in their order, as many at once as fit in a run on these prompts."""
        return together(self.cfg, kept, interventions, lambda: self._trials.forks(kept.batch))

    def require_own(self, kept: Prefill) -> None:
        """Refuse prompts that another model has computed, or this one before it was changed, or that another LLM stood beside.

        Raises:
            MismatchError: As said.
        """
        if kept.models != self._computing:
            before = "" if kept.models[:2] != self.ids else ", before an attribute or a hook of its modules was changed"
            raise MismatchError(f"prompts kept by {kept.models[:2]}{before}", f"those of {self.ids}", "keep them anew with this model")

    @property
    def _computing(self) -> tuple[str, ...]:
        """The ids, and what these don't look at whenever they are asked for: attributes of modules, and hooks."""
        models = [each.hf for each in (self, self.separate_llm) if each]
        hooks = [f"{path} {hook_name(hook)} {id(hook)}" for hf in models for path, hook in foreign_hooks(hf)]
        return (*self.ids, *map(constants, models), *hooks)

    def share(self, batch: Batch) -> Prefix | None:
        """What the prompts of a batch begin with alike, computed once; None where it would not save `WORTH` tokens.

        The first one of a model is checked: prompts that continue from it must have the states that they have on their own.
        """
        self._require_own_words(batch)
        length = 0 if batch.padded_right or self._engine.stretches else batch.common_start
        apart = bool((batch.image & (batch.mask.cumsum(1) > length)).any())  # images that follow can't run behind a cache
        if apart or (len(batch.queries) - 1) * length < WORTH:
            return None
        first = self.batch(batch.queries[:1], batch.presentation)
        with self._turn():
            made = self._trials.prefix(first, length, lambda: self.batch(batch.queries[:2], batch.presentation))
        return None if made is None else replace(made, model=self.id)

    @cached_property
    def _trials(self) -> Trials:
        return Trials(self._engine)

    def run_with_cache(
        self, queries: Queries | Batch, presentation: Presentation | None = None, *, names_filter: NamesFilter = None
    ) -> tuple[Float[Tensor, "query seq vocab"], ActivationCache]:
        """Logits at all tokens, and whole hook values, as in TransformerLens.

        Args:
            queries: What to ask, or a batch.
            presentation: How to show it; its text alone by default.
            names_filter: A hook name, several, or a predicate; None caches everything that the run computes (attention patterns
                only of a model loaded with `attn_implementation="eager"`).

        Raises:
            SiteError: Unknown hook name (the closest is suggested), or a value that the run did not compute.
        """
        batch = self._asked(queries, presentation)
        computed = [p for p in self.cfg.computed(batch.beside_image) if p.hook != "pattern" or self._engine.eager]
        taps, kept = cache_taps(self.cfg, names_filter, computed)
        logits = self._logits(batch, taps)
        return logits, ActivationCache(kept, self.cfg.n_layers, self.to_logits, self.cfg.residual_scale)

    def run_with_hooks(
        self,
        queries: Queries | Batch,
        presentation: Presentation | None = None,
        *,
        fwd_hooks: Sequence[tuple[str | Callable[[str], bool], HookFunction]] = (),
    ) -> Float[Tensor, "query seq vocab"]:
        """Logits at all tokens of a run with hook functions, as in TransformerLens.

        Args:
            queries: What to ask, or a batch.
            presentation: How to show it; its text alone by default.
            fwd_hooks: Pairs of a hook name (or predicate) and `fn(value, hook)`, which returns the new value, or None to leave it;
                `hook.name` is the full name and `hook.layer()` the layer. Values are whole tensors, padding included.

        Raises:
            SiteError: Unknown hook name; the closest is suggested.
        """
        batch = self._asked(queries, presentation)
        return self._logits(batch, hook_taps(self.cfg, fwd_hooks))

    def _logits(self, batch: Batch, taps: Sequence[Tap]) -> Float[Tensor, "query seq vocab"]:
        with self._turn():
            return checked(self._engine.forward(batch, taps)[None], batch, batch.mask)[0]

    def _asked(self, queries: Queries | Batch, presentation: Presentation | None) -> Batch:
        """A batch as it is, or one of queries, as text alone by default: which is said where they have images."""
        shown = text_only if presentation is None else presentation
        require_presentation(shown)
        if isinstance(queries, Batch):
            if presentation not in (None, queries.presentation):
                raise MismatchError(
                    f"a batch that shows {queries.presentation.name!r}, with the presentation {shown.name!r}",
                    "one of the two",
                    "leave the presentation out, or hand in the queries",
                )
            self._require_own_words(queries)
            return queries
        items = as_queries(queries)  # once: it may be a generator
        if presentation is None and self.sees_images and any(query.images for query in items):
            warn("images of queries are not shown: ask with presentations.own_images to show them, or with text_only")
        return self.batch(items, shown)

    def to_logits(self, states: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape vocab"]:
        """The residual stream through final norm and unembedding: the logit lens of any layer, the model's own logits for the last."""
        require_type(states, Tensor, MismatchError, "hand in states as a tensor, as of run.reads or a cache")
        if states.shape[-1:] != (self.cfg.d_model,):
            raise MismatchError(
                f"states of shape {tuple(states.shape)}", f"a last axis of {self.cfg.d_model}", "hand in this model's states"
            )
        norm, unembed = (self.hf.get_submodule(path) for path in (self.cfg.norm, self.cfg.unembed))
        with torch.no_grad():
            return self.cfg.finish(unembed(norm(states)))

    def generate(
        self,
        queries: Queries | Batch | Prefill,
        presentation: Presentation | None = None,
        intervention: Intervention = nothing,
        *,
        max_new_tokens: int = 64,
        seed: int | None = None,
        **options: Any,
    ) -> Any:
        """Answers under an intervention: a string for one query, else a list of them.

        Args:
            queries: What to ask, a batch, or what `prefill` kept of one.
            presentation: How to show it; its text alone by default.
            intervention: What to change.
            max_new_tokens: The longest answer.
            seed: Of the draws, with `do_sample=True`.
            options: Handed to transformers' `generate`: `do_sample=True, temperature=0.7`, `use_cache=False`, ... Greedy by default.

        Raises:
            InterventionError: Options, of the call or in the checkpoint's own `generation_config`, that give several answers per prompt or
                bring more than one token per forward.
            NumericsError: NaN or infinity in an edit or in the logits of a step; step and query are named.
        """
        require_intervention(intervention)
        max_new_tokens = as_new_tokens(max_new_tokens)
        batch = queries if isinstance(queries, Prefill) else self._asked(queries, presentation)
        prefix = None if isinstance(batch, Prefill) else self.share(batch)
        tokens = self.run(batch, intervention, new_tokens=max_new_tokens, seed=seed, generation=options, prefix=prefix).tokens
        answers = self.decode(tokens[0])  # type: ignore[index]
        return answers[0] if isinstance(queries, str | Query) else answers

    def decode(self, tokens: Int[Tensor, "query new"]) -> list[str]:
        """Token ids as text, special tokens left out."""
        try:
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        except (TypeError, ValueError, OverflowError, KeyError) as error:
            raise InterventionError(
                f"token ids that are none ({error})", "whole numbers of the vocabulary", "hand in run.tokens[lane]"
            ) from None
        return [text.strip() for text in texts]

    def __repr__(self) -> str:
        kind = "VLM" if self.sees_images else "LLM"
        beside = f", beside {self.separate_llm.name!r}" if self.separate_llm else ""
        sizes = f"{self.cfg.n_layers} layers, d_model {self.cfg.d_model}"
        return f"HookedModel({self.name!r}: {type(self._engine.inner).__name__}, {kind}, {sizes}{beside})"

    def _repr_html_(self) -> str:
        named = {
            "weights": self.id,
            "blocks": f"{self.cfg.n_layers}, d_model {self.cfg.d_model}, {self.cfg.n_heads} heads, vocabulary {self.cfg.d_vocab:,}",
            "parameters": f"{self.hf.num_parameters():,}, {str(self.hf.dtype).removeprefix('torch.')} on {self.hf.device}",
            "images": f"{self.cfg.image_size or '?'} pixels a side" if self.sees_images else "",
            "LLM beside": "" if self.separate_llm is None else self.separate_llm.id,
            "revision": self.revision,
        }
        return captioned(repr(self), facts(named))

    def _held(self, asked: Asked, known: dict[Any, Tensor] | None = None) -> Held:
        """The states that the interventions need of other presentations' runs: one unedited forward per presentation.

        Where what is `known` is kept, all layers are read at once, so that whatever layer asks next has its state.
        """
        wanted = required_runs(asked.interventions, self.cfg.n_layers)
        held = {} if known is None else known
        missing = {state: layers for state, layers in wanted.items() if any((state, layer) not in held for layer in layers)}
        for presentation in {state.presentation for state in missing if state.presentation is not None}:
            model, other = self.source(asked.batch, presentation)
            sought = {state: layers for state, layers in missing.items() if state.presentation == presentation}
            if known is not None:
                computed = model.cfg.computed(other.beside_image)
                sought |= {
                    state: {point.layer for point in computed if point.hook == site_of(state, layers).hook}
                    for state, layers in sought.items()
                }
            sites = {state: site_of(state, layers) for state, layers in sought.items()}
            reads = model.run(other, read=tuple(dict.fromkeys(sites.values())), logits=None).reads
            for state, site in sites.items():
                for index, point in enumerate(site.points(self.cfg.n_layers)):
                    held[state, point.layer] = reads[site][0, :, index].to(self._engine.device)
        return held

    def source(self, batch: Batch, presentation: Presentation) -> "tuple[HookedModel, Batch]":
        """Where a held state of `presentation` is read: the model and its prompts. The text twin's are the same without their images."""
        if presentation == text_only:
            same = self.llm is self and not batch.beside_image and not batch.answered
            return self.llm, batch if same else self.llm.batch(batch.queries, WithoutImages(batch.presentation))
        same = presentation == batch.presentation and not batch.answered
        return self, batch if same else self.batch(batch.queries, presentation)

    @property
    def _pad_token_id(self) -> int:
        with padding_token(self.tokenizer):
            return self.tokenizer.pad_token_id

    def _require_alike(self, prompts: Sequence[Prompt]) -> None:
        """In a family with cross-attention, prompts with fewer images than their neighbours would attend to the padding of theirs."""
        counts = sorted({len(prompt.images) for prompt in prompts})
        if self.cfg.image_layers and len(counts) > 1:
            raise PresentationError(
                f"prompts of {' and '.join(map(str, counts))} images in one batch of {self.name}, whose cross-attention mixes them up",
                "one number of images in a batch",
                "make a batch of each; collect, keep, sweep and evaluate do",
            )

    def _require_room(self, query: Query, tokens: int) -> None:
        """Say where a prompt goes beyond the positions that the model was made for; beyond learned ones it can't be run."""
        config = self.hf.config.get_text_config()
        limit, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
        if not isinstance(limit, int) or tokens <= limit:
            return
        found = f"{tokens} tokens in the prompt of query {query.id!r}, and {limit} positions in {self.name}"
        beside = self.hf.get_submodule(self.cfg.decoder).children()
        words = self.hf.get_input_embeddings()
        tables = [child.num_embeddings for child in beside if isinstance(child, torch.nn.Embedding) and child is not words]
        if any(limit <= table <= limit + 2 for table in tables):  # OPT's begins at 2
            raise QueryError(found, "no more tokens than positions", "shorten the query or what is put around it")
        factors = [scaled.get("factor") or 1 for scaled in (rope, *rope.values()) if isinstance(scaled, dict)]
        if tokens > limit * max(factors, default=1):
            warn(f"{found}: it was not trained on so long a text")

    @cached_property
    def _needs_positions(self) -> bool:
        """Learned positions would count padding; VLMs work theirs out themselves (2-D ones would break M-RoPE)."""
        return not self.sees_images and "position_ids" in self._engine.parameters


def require_model(model: Any) -> None:
    """Refuse what is no model with hooks, such as that of transformers.

    Raises:
        ModelError: As said.
    """
    require_type(model, HookedModel, ModelError, "load it: gl.load('organism'), or gl.load(model, processor=processor)")


def as_new_tokens(new_tokens: Any) -> int:
    """How long an answer may be.

    Raises:
        ArgumentError: Not a whole number, or not a single token.
    """
    return as_count(new_tokens, "max_new_tokens", ArgumentError, "ask model.run for logits, if no answer is wanted")


def _described(image: Any) -> bytes:
    return digest(repr((image.mode, image.size)).encode(), image.tobytes()).encode()


LAYOUTS = ("auto", "branch", "fork", "tile")
LOGITS = ("last", "answer", "all", None)

WORTH = 256
"""Tokens that a shared prefix must save in a batch to be computed apart."""
