"""`HookedModel`: a VLM or LLM of transformers under nnsight, with TransformerLens's hook names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from guardlens.data.presentations import Presentation, WithoutImages, text_only
from guardlens.data.presentations.protocol import require_presentation
from guardlens.data.queries import Query, QueryPairs, as_queries
from guardlens.errors import ArgumentError, InterventionError, MismatchError, require_type, warn
from guardlens.hooks import Site
from guardlens.interventions import Intervention, nothing
from guardlens.interventions.intervention import require_intervention
from guardlens.models.activation_cache import ActivationCache
from guardlens.models.engine import scheduler
from guardlens.models.engine.batch import Batch, require_batch, require_same_presentation
from guardlens.models.engine.compiler import Tap
from guardlens.models.engine.generation_options import as_new_tokens, options_of
from guardlens.models.engine.hook_functions import HookFunction, NamesFilter, cache_taps, hook_taps
from guardlens.models.engine.kv_cache import Prefill, Prefix
from guardlens.models.engine.request import RunRequest
from guardlens.models.engine.run import Run, checked
from guardlens.models.loaded_model import LoadedModel
from guardlens.models.processing.chat_template import decoded
from guardlens.models.prompting import make_batch
from guardlens.models.readiness import ready_turn

Queries = str | Query | QueryPairs | Sequence[str | Query]


@dataclass(frozen=True, eq=False, repr=False)
class HookedModel(LoadedModel):
    """A model with hooks. Make one with `guardlens.load`.

    One run at a time: threads take turns, and an edit or hook function that calls the model it is in is refused. A model in training mode,
    or under a guard of `attach`, is refused, too. With `do_sample`, one seed gives other draws in batches of another size.

    Attributes:
        hf: The Hugging Face model. Its weights, mode and hooks are never changed; nnsight wraps its modules' `forward`, which stays so.
        processor: Its processor, or the tokenizer of a text-only model. A tokenizer without a pad token gets one while it is used.
        name: As it appears in results.
        revision: The hub's revision, where there is one.
        separate_llm: Another language model to compare with, of the same width and depth; None for the VLM's own.
        names: The names that its parts may have.
        shows_images: False for `model.llm` of a VLM, which refuses images.

    Examples:
        >>> model
        HookedModel('organism': LlavaForConditionalGeneration, VLM, 8 layers, d_model 128)
        >>> model.cfg.n_layers, model.cfg.d_model, model.sees_images
        (8, 128, True)
        >>> run = model.run(batch, [iv.nothing, guard.at(layers=7)])  # two interventions, each a lane
        >>> run.logits.shape  # lane, query, vocabulary; at the prompts' last token
        torch.Size([2, 3, 251])
        >>> model.generate(queries[1], grey, guard.at(layers=7)).split()[0]
        'sorry'
    """

    separate_llm: "HookedModel | None" = None

    @cached_property
    def llm(self) -> "HookedModel":
        """The language model that reads the text twin: the LLM beside the VLM, or the VLM's own language model, which refuses images."""
        if self.separate_llm is not None:
            return self.separate_llm
        if not self.sees_images or not self.shows_images:
            return self
        view = replace(self, shows_images=False)
        view.__dict__.update(cfg=self.cfg, _tests=self._tests)
        return view

    def batch(self, queries: Queries, presentation: Presentation = text_only, *, padding_side: str = "left") -> Batch:
        """Turn queries into input tensors: presented, put into the chat template with the generation prompt, padded.

        Raises:
            QueryError: There are no queries, a text holds a special token, or a prompt has more tokens than learned positions.
            PresentationError: An image for a model that takes none, a query that can't be presented so, or prompts of unlike numbers of
                images for a model with cross-attention.
            ModelError: A prompt without image for a model that can't take one.
        """
        items = as_queries(queries)
        require_presentation(presentation)
        batch = make_batch(self._engine, self.processor, items, presentation, padding_side, self.name)
        self.require_own(batch)
        return batch

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
    ) -> Run:
        """Run one or several interventions over a batch; each intervention is a lane.

        Several interventions share computation where they can: `Run.layout` says how, and `Run.why` why they were not branches.

        Args:
            batch: The prompts, or their `prefill`. After a `share` (`batch.after(prefix)`), a run that edits and reads only what follows
                the prefix continues from it.
            interventions: What to change, one intervention per lane.
            read: The sites to read, one or several. Reads see all edits at their site.
            logits: `"last"` for the prompt's last token, `"answer"` for each token that one of an answer follows (`Prefill.answering`),
                `"all"` for all tokens, or None, which skips the unembedding.
            new_tokens: The largest number of tokens to generate; `Run.logits` is then None.
            seed: The seed of the draws, if `generation` asks for sampling. Lanes draw one after the other, so each has draws of its own.
            generation: Options of transformers' `generate`. Generation is greedy without any.
            layout: `"branch"`, `"fork"` or `"tile"` (see `guardlens.models.engine`), or `"auto"` for the cheapest of them.

        Raises:
            ArgumentError: A number or an option that a run does not take.
            MismatchError: An intervention, a batch or a prefill of another model.
            SiteError, InterventionError: An intervention asks for something that this model, run or layout does not have.
            NumericsError: NaN or infinity in a read or in the logits; layer and query are named.
        """
        self.require_own(batch)
        prefill = batch if isinstance(batch, Prefill) else None
        prompts = batch.batch if isinstance(batch, Prefill) else batch
        ids = self.ids if prefill is None else prefill.ids  # reading the model's own walks all modules
        asked = RunRequest.checked(self.cfg, ids, prompts, interventions, read, logits, new_tokens, seed)
        options = options_of(self.hf, self.tokenizer, generation, prompts.inputs, asked.new_tokens)
        with ready_turn(self.hf):
            return scheduler.run(self._tests, replace(asked, options=options), self.source, prefill, layout)

    def prefill(self, batch: Batch) -> Prefill:
        """Run prompts unedited and keep their KV cache, so that a question about their ends costs only the ends.

        The first prefill of a model is tested: two branches without an edit and one with an edit must give what whole runs give. If they
        don't (a recurrent layer, a prefix that looks ahead), `Prefill.flaw` says so, and interventions run as forks or tiles.

        Args:
            batch: The prompts; after a `share`, only what follows it is computed.

        Raises:
            InterventionError: The prompts have answers after them.
        """
        self.require_own(batch)
        if batch.answered:
            raise InterventionError("prompts with answers", "prompts alone", "keep them first, then say kept.answering(tokens)")
        with ready_turn(self.hf):
            return replace(scheduler.fill(self._tests, batch), models=self.state)

    def share(self, batch: Batch) -> Prefix | None:
        """The KV cache of what the prompts of a batch begin with. None if it would save fewer than `limits.PREFIX_WORTH_TOKENS` tokens.

        The first one of a model is tested: prompts that continue from it must have the states that they have on their own.
        """
        self.require_own(batch)
        with ready_turn(self.hf):
            made = scheduler.share(self._tests, batch, lambda few: self.batch(batch.queries[:few], batch.presentation))
        return None if made is None else replace(made, model=self.id)

    def run_each(self, prefill: Prefill, interventions: Sequence[Intervention], take: Callable[[Tensor], None]) -> list[Run]:
        """Run interventions on these prompts, as many at a time as fit, and hand the logits of one after the other to `take`.

        The runs do not keep them, so memory holds those of a few interventions, however many there are. `take` may write to them.
        """
        require_type(prefill, Prefill, ArgumentError, "hand in what model.prefill(batch) gave")
        self.require_own(prefill)
        logits = "answer" if prefill.batch.answered else "last"
        asked = RunRequest.checked(self.cfg, prefill.ids, prefill.batch, interventions, (), logits, 0, None)
        with ready_turn(self.hf):
            return scheduler.run_each(self._tests, replace(asked, take=take), self.source, prefill)

    def require_own(self, prompts: Batch | Prefill) -> None:
        """Refuse prompts that were made or computed by another model, beside another LLM, or before this model was changed.

        Raises:
            MismatchError: The tokenizers, the ids, the attributes of modules or the hooks differ.
            PresentationError: Some prompt shows an image to the language model of a VLM.
        """
        batch = prompts.batch if isinstance(prompts, Prefill) else prompts
        require_batch(batch, self.tokenizer, self.shows_images, self.name)
        if batch.prefix is not None:  # the id walks all modules
            require_type(batch.prefix, Prefix, ArgumentError, "hand in what model.share(batch) gave, or leave it out")
            batch.prefix.require_of(self.id)
        if isinstance(prompts, Prefill):
            prompts.require_of(self.state)

    def source(self, batch: Batch, presentation: Presentation) -> "tuple[HookedModel, Batch]":
        """The model and the prompts that a held state of `presentation` is read from. The text twin is the prompt without its images."""
        if presentation == text_only:
            is_same = self.separate_llm is None and not batch.beside_image and not batch.answered
            return (self, batch.after(None)) if is_same else (self.llm, self.llm.batch(batch.queries, WithoutImages(batch.presentation)))
        is_same = presentation == batch.presentation and not batch.answered
        return self, batch.after(None) if is_same else self.batch(batch.queries, presentation)

    def run_with_cache(
        self, queries: Queries | Batch, presentation: Presentation | None = None, *, names_filter: NamesFilter = None
    ) -> tuple[Float[Tensor, "query seq vocab"], ActivationCache]:
        """Return the logits at all tokens and whole hook values, as in TransformerLens.

        Args:
            queries: The queries, or a batch.
            presentation: How to show them; as text alone by default.
            names_filter: A hook name, several, or a predicate; None caches everything that the run computes (attention patterns only
                if the model was loaded with `attn_implementation="eager"`).

        Raises:
            SiteError: Unknown hook name (the closest is suggested), or a value that the run did not compute.
        """
        batch = self._as_batch(queries, presentation)
        computed = [point for point in self.cfg.computed(batch.beside_image) if point.hook != "pattern" or self._engine.eager]
        taps, values = cache_taps(self.cfg, names_filter, computed)
        logits = self._logits(batch, taps)
        return logits, ActivationCache(values, self.cfg.n_layers, self.to_logits, self.cfg.residual_scale)

    def run_with_hooks(
        self,
        queries: Queries | Batch,
        presentation: Presentation | None = None,
        *,
        fwd_hooks: Sequence[tuple[str | Callable[[str], bool], HookFunction]] = (),
    ) -> Float[Tensor, "query seq vocab"]:
        """Return the logits at all tokens of a run with hook functions, as in TransformerLens.

        Args:
            queries: The queries, or a batch.
            presentation: How to show them; as text alone by default.
            fwd_hooks: Pairs of a hook name (or predicate) and `fn(value, hook)`, which returns the new value, or None to leave it;
                `hook.name` is the full name and `hook.layer()` the layer. Values are whole tensors, padding included.

        Raises:
            SiteError: Unknown hook name; the closest is suggested.
        """
        return self._logits(self._as_batch(queries, presentation), hook_taps(self.cfg, fwd_hooks))

    def to_logits(self, states: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape vocab"]:
        """Apply the final norm and the unembedding: the logit lens at any layer, the model's own logits at the last."""
        require_type(states, Tensor, MismatchError, "hand in states as a tensor, as of run.reads or a cache")
        if states.shape[-1:] != (self.cfg.d_model,):
            raise MismatchError(
                f"states of shape {tuple(states.shape)}", f"a last axis of {self.cfg.d_model}", "hand in this model's states"
            )
        return self._engine.lens(states)

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
        """Generate answers under an intervention: a string for one query, else a list of strings.

        Args:
            queries: The queries, a batch, or its `prefill`.
            presentation: How to show them; as text alone by default.
            intervention: What to change.
            max_new_tokens: The longest answer.
            seed: The seed of the draws, with `do_sample=True`.
            options: Options of transformers' `generate`: `do_sample=True, temperature=0.7`, `use_cache=False`, ... Greedy by default.

        Raises:
            InterventionError: Options, of the call or in the checkpoint's own `generation_config`, that give several answers per prompt or
                bring more than one token per forward pass.
            NumericsError: NaN or infinity in an edit or in the logits of a decode step; step and query are named.
        """
        require_intervention(intervention)
        new_tokens = as_new_tokens(max_new_tokens)
        prompts = queries if isinstance(queries, Prefill) else self._as_batch(queries, presentation)
        if isinstance(prompts, Batch):
            prompts = prompts.after(self.share(prompts))
        run = self.run(prompts, intervention, new_tokens=new_tokens, seed=seed, generation=options)
        assert run.tokens is not None
        answers = self.decode(run.tokens[0])
        return answers[0] if isinstance(queries, str | Query) else answers

    def decode(self, tokens: Int[Tensor, "query new"]) -> list[str]:
        """Turn token ids into text, without special tokens."""
        return decoded(self.tokenizer, tokens)

    def _logits(self, batch: Batch, taps: Sequence[Tap]) -> Float[Tensor, "query seq vocab"]:
        with ready_turn(self.hf):
            return checked(self._engine.forward(batch, taps)[None], batch, batch.mask)[0]

    def _as_batch(self, queries: Queries | Batch, presentation: Presentation | None) -> Batch:
        """Return a batch unchanged, or build one. Queries default to text only, with a warning if they carry images."""
        if isinstance(queries, Batch):
            require_same_presentation(queries, presentation)
            self.require_own(queries)
            return queries
        items = as_queries(queries)  # once: it may be a generator
        if presentation is None and self.sees_images and any(query.images for query in items):
            warn("images of queries are not shown: ask with presentations.own_images to show them, or with text_only")
        return self.batch(items, text_only if presentation is None else presentation)
