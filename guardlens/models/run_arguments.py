"""The arguments of a run, checked before anything runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from guardlens.data.presentations.protocol import require_presentation
from guardlens.errors import (
    ArgumentError,
    InterventionError,
    MismatchError,
    PresentationError,
    QueryError,
    SiteError,
    as_count,
    is_several,
    one_of,
    quoted,
    require_type,
)
from guardlens.hooks import Site
from guardlens.interventions import Intervention
from guardlens.interventions.intervention import require_intervention
from guardlens.models.architectures import Architecture
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.generation_options import flat, merged, require_one_answer, require_options, require_stepwise
from guardlens.models.engine.kv_cache import Prefill, Prefix
from guardlens.models.engine.scheduler import LAYOUTS
from guardlens.models.processing.chat_template import padding_token

LOGITS = ("last", "answer", "all", None)
"""What `HookedModel.run` takes as `logits`."""


def as_lanes(interventions: Any, ids: tuple[str, str], cfg: Architecture) -> list[Intervention]:
    """One or several interventions as a list.

    Raises:
        InterventionError: There are none, or something else is among them.
        MismatchError: One was made for another model.
        SiteError: One has a hook or a layer that this model lacks.
    """
    lanes = list(interventions) if isinstance(interventions, Sequence) else [interventions]
    if not lanes:
        raise InterventionError("no interventions", "one at least", "hand in interventions.nothing for the unedited run")
    for intervention in lanes:
        require_intervention(intervention)
        intervention.require_fit(ids, cfg.n_layers, cfg.widths)
        _require_places([step.site for step in intervention.steps], cfg)
    return lanes


def as_sites(read: Any, cfg: Architecture) -> Sequence[Site]:
    """One or several sites as a sequence.

    Raises:
        SiteError: Something else is among them, or a hook or a layer that this model lacks.
    """
    sites = [read] if isinstance(read, Site) else read
    if not is_several(sites):
        raise SiteError(f"read={quoted(read)}", "sites", "say read=[Site('resid_post')], or leave it out")
    for site in sites:
        require_type(site, Site, SiteError, "say Site('resid_post')")
    _require_places(sites, cfg)
    return sites


def require_choices(logits: Any, layout: Any, new_tokens: int) -> None:
    """Refuse an unknown `logits` or `layout`, and a layout for generated answers.

    Raises:
        ArgumentError: The value is no choice.
    """
    if logits is not None and not one_of(logits, LOGITS):
        raise ArgumentError(
            f"logits={quoted(logits)}", f"one of {', '.join(map(repr, LOGITS))}", "leave it out for those of the last token"
        )
    if not one_of(layout, LAYOUTS):
        raise ArgumentError(f"the layout {quoted(layout)}", f"one of {', '.join(LAYOUTS)}", "leave it out: the cheapest is chosen")
    if new_tokens and layout != "auto":
        raise ArgumentError(f"the layout {quoted(layout)} of generated answers", "auto for answers", "leave it out: the cheapest is chosen")


def as_new_tokens(new_tokens: Any) -> int:
    """The largest length of an answer.

    Raises:
        ArgumentError: It is not a whole number, or not a single token.
    """
    return as_count(new_tokens, "max_new_tokens", ArgumentError, "ask model.run for logits, if no answer is wanted")


def require_batch(batch: Any, tokenizer: Any, name: str) -> None:
    """Refuse anything but a batch, and a batch whose tokens mean something else to this model.

    Raises:
        QueryError: It is no batch.
        MismatchError: Another tokenizer made it.
    """
    require_type(batch, Batch, QueryError, "make one of queries with model.batch(queries, presentation)")
    if batch.tokenizer is None or batch.tokenizer is tokenizer or batch.tokenizer.get_vocab() == tokenizer.get_vocab():
        return
    raise MismatchError(
        f"a batch of another tokenizer, a {type(batch.tokenizer).__name__}", f"one of {name!r}", "make it with this model's .batch"
    )


def require_same_presentation(batch: Batch, presentation: Any) -> None:
    """Refuse a presentation beside a batch that shows another.

    Raises:
        MismatchError: They differ.
        PresentationError: It is no presentation.
    """
    if presentation is None:
        return
    require_presentation(presentation)
    if presentation != batch.presentation:
        raise MismatchError(
            f"a batch that shows {batch.presentation.name!r}, with the presentation {presentation.name!r}",
            "one of the two",
            "leave the presentation out, or hand in the queries",
        )


def require_shown(batch: Batch, shows_images: bool, name: str) -> None:
    """Refuse images for the language model of a VLM.

    Raises:
        PresentationError: Some prompt shows one.
    """
    if batch.beside_image and not shows_images:
        raise PresentationError(f"an image for the language model of {name!r}", "text alone", "hand in the VLM itself to show it images")


def require_own_prefill(prefill: Prefill, state: tuple[str, ...]) -> None:
    """Refuse prompts that were computed by another model, beside another LLM, or before this model was changed.

    Raises:
        MismatchError: The ids, the attributes of modules or the hooks differ.
    """
    if prefill.models == state:
        return
    ids = state[:2]
    is_changed = prefill.models[:2] == ids
    before = ", before an attribute or a hook of its modules was changed" if is_changed else ""
    raise MismatchError(f"prompts kept by {prefill.models[:2]}{before}", f"those of {ids}", "keep them anew with this model")


def require_own_prefix(prefix: Any, model: str) -> None:
    """Refuse a prefix that this model did not compute.

    Raises:
        ArgumentError: It is something else.
        MismatchError: Another model computed it.
    """
    require_type(prefix, Prefix, ArgumentError, "hand in what model.share(batch) gave, or leave it out")
    if prefix.model != model:
        raise MismatchError(f"a prefix of {prefix.model}", f"one of {model}", "share the prompts anew with this model")


def require_answered(batch: Batch, prefill: Prefill | None, logits: str | None, new_tokens: int, d_vocab: int) -> None:
    """Refuse to score answers other than those of a prefill.

    Raises:
        ArgumentError: There are no answers, they would be generated, or a token is no id of this model.
    """
    is_scored = logits == "answer" or batch.answered
    can_be_scored = prefill is not None and batch.answered and not new_tokens
    if is_scored and not can_be_scored:
        raise ArgumentError("an answer behind no prefilled prompts", "prefilled prompts", "say model.prefill(batch).answering(tokens)")
    ids = batch.inputs["input_ids"][:, batch.mask.shape[1] - batch.answered :]
    if batch.answered and int(ids.max()) >= d_vocab:
        raise ArgumentError(f"the token {int(ids.max())} in an answer", f"ids below {d_vocab}", "hand in ids of this model's tokenizer")


def generation_options(hf: Any, tokenizer: Any, options: Any, batch: Batch, new_tokens: int) -> dict[str, Any]:
    """The options of transformers' `generate` for answers that are generated token by token.

    Raises:
        ArgumentError: They are no mapping, or nothing is generated.
        InterventionError: They, or the checkpoint's own settings, ask for something else than one answer per prompt, token by token.
    """
    require_type(options, Mapping, ArgumentError, "say generation={'do_sample': True, ...}")
    named = flat(options)
    if not new_tokens:
        if named:
            raise ArgumentError(
                "options of generation for a run that generates nothing", "new_tokens", "say new_tokens=16, or leave them out"
            )
        return {}
    require_options(named, batch.inputs)
    settings = merged(hf, named)
    require_stepwise(settings)
    require_one_answer(settings)
    for_stop_strings = {"tokenizer": tokenizer} if "stop_strings" in settings else {}
    caching = {name: settings[name] for name in ("use_cache", "cache_implementation") if name in settings}
    return {"pad_token_id": pad_token_id(tokenizer), **for_stop_strings, **caching, **named}


def as_text(tokenizer: Any, tokens: Any) -> list[str]:
    """Token ids as text, without special tokens.

    Raises:
        ArgumentError: They are no ids of this tokenizer.
    """
    try:
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    except (TypeError, ValueError, OverflowError, KeyError) as error:
        raise ArgumentError(f"token ids that are none ({error})", "whole numbers of the vocabulary", "hand in run.tokens[lane]") from None
    return [text.strip() for text in texts]


def pad_token_id(tokenizer: Any) -> int:
    """The id that answers are padded with."""
    with padding_token(tokenizer):
        return tokenizer.pad_token_id


def _require_places(sites: Sequence[Site], cfg: Architecture) -> None:
    for site in sites:
        for point in site.points(cfg.n_layers):
            cfg.locate(point)
