"""The identity of a run: all that its states and answers depend on, as facts that a run directory keeps and compares."""

import hashlib
import json
import re
import types
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from guardlens.data.presentations import Presentation
from guardlens.data.queries import Query
from guardlens.errors import PresentationError
from guardlens.interventions import Intervention
from guardlens.interventions.edits import Custom, Placebo
from guardlens.models.architectures import KNOWN, facts
from guardlens.models.content_digest import content
from guardlens.models.hooked_model import HookedModel
from guardlens.models.processing.chat_template import tokenizer_of
from guardlens.models.readiness import KNOWN_TO_HOOK, foreign_hooks, hook_name, origin
from guardlens.results.files import digest

FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
"""What a module may keep as an attribute and call."""


def configuration(model: HookedModel, queries: Sequence[Query], presentations: Sequence[Presentation]) -> dict[str, Any]:
    """What every run of a model on queries depends on: the model, the LLM beside it, the queries, and what is shown of them.

    Weights are looked at anew, all of them. What is asked of the run (an intervention, a site, a judge) is for the caller to add.

    Args:
        model: The model.
        queries: What is asked.
        presentations: How it is shown, each under a name of its own.

    Returns:
        Nested facts that JSON can hold, of which no two runs with other results have the same.
    """
    return {
        "queries": content([replace(query, images=()) for query in queries] + [query.images for query in queries], "the queries"),
        "presentations": {each.name: {"is": _spelt(each), "shows": shown(each, queries)} for each in presentations},
        "model": of_model(model),
        "llm": "the model itself" if model.separate_llm is None else of_model(model.separate_llm),
    }


def shown(presentation: Presentation, queries: Sequence[Query]) -> str:
    """A digest of the prompts that a presentation makes of queries: texts, system prompts and pixels, whatever its own fields say.

    Raises:
        PresentationError: It shows the first query otherwise when it is asked again, so that nothing says what a run will be shown.
    """
    found, first, parts = hashlib.sha256(), None, []
    known: list[Any] = [None, ""]  # the last image and its digest: one image is shown to many
    for query in (*queries, queries[0]):
        prompt = presentation(query)
        parts = [content(replace(prompt, images=()), f"a prompt of {presentation.name!r}")]
        for image in prompt.images:
            if image is not known[0]:
                known = [image, content(image)]
            parts.append(known[1])
        first = parts if first is None else first
        found.update("".join(parts).encode())
    if parts != first:
        raise PresentationError(
            f"the presentation {presentation.name!r}, which shows query {queries[0].id!r} otherwise every time",
            "the same prompt of the same query",
            "draw from a seed and query.id, as presentations.noise does; or leave out= away",
        )
    return found.hexdigest()[:12]


def of_intervention(intervention: Intervention) -> str:
    """What an intervention does: its fingerprint, and the code of custom functions, for which a fingerprint has their names alone."""
    edits = [step.edit.edit if isinstance(step.edit, Placebo) else step.edit for step in intervention.steps]
    functions = [edit.fn for edit in edits if isinstance(edit, Custom)]
    return "-".join([intervention.fingerprint, *([content(functions, "the custom functions of an intervention")] if functions else [])])


def of_model(model: HookedModel) -> dict[str, Any]:
    """What a model computes with: weights, config, adapters, precision, what its parts are called, hooks, and its processor."""
    return {
        "kind": type(model.hf).__name__,
        **facts(model.hf, anew=True),
        "dtypes": sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.hf.parameters()}),
        "computed": _computed(model.hf),
        "autocast": _autocast(model.hf.device.type),
        "names": {f.name: [*named] for f in fields(KNOWN) if (named := getattr(model.names, f.name)) != getattr(KNOWN, f.name)},
        "code": _code(model.hf),
        "hooks": [f"{path}: {hook_name(hook)}, {content(hook, f'the hook {hook_name(hook)}')}" for path, hook in foreign_hooks(model.hf)],
        "processor": of_processor(model.processor),
    }


def of_processor(processor: Any) -> dict[str, Any]:
    """What makes tensors of prompts: chat template, tokenizer, and whatever prepares images."""
    words = tokenizer_of(processor)
    templates = [str(getattr(part, "chat_template", None)) for part in (processor, words)]
    return {
        "template": digest(*(template.encode() for template in templates)),
        "tokenizer": _tokenizer(words),
        "images": {} if processor is words else _said(processor),
    }


def _tokenizer(words: Any) -> str:
    """A digest of the vocabulary, of all that turns text into tokens, and of all that turns them into text again."""
    said = {name: getattr(words, name, None) for name in ("special_tokens_map", "clean_up_tokenization_spaces", "split_special_tokens")}
    backend = getattr(words, "backend_tokenizer", None)
    if backend is None:
        return content([type(words).__qualname__, sorted(words.get_vocab().items()), {name: str(value) for name, value in said.items()}])
    whole = json.loads(backend.to_str())
    whole |= {"padding": None, "truncation": None}  # settings of the last call
    return digest(type(words).__qualname__.encode(), json.dumps(whole, sort_keys=True).encode(), repr(said).encode())


def _said(processor: Any) -> dict[str, Any]:
    """The settings of a processor and of its parts, as its own files have them."""
    own = processor.to_dict() if hasattr(processor, "to_dict") else vars(processor)
    inner: dict[str, Any] = {name: getattr(processor, name, None) for name in ("image_processor", "video_processor", "feature_extractor")}
    parts = {name: {"kind": type(part).__name__, **part.to_dict()} for name, part in inner.items() if hasattr(part, "to_dict")}
    return json.loads(
        json.dumps({"kind": type(processor).__name__, **own, **parts} | {"chat_template": None, "tokenizer": None}, default=content)
    )


def _computed(hf: nn.Module) -> str:
    """A digest of what modules compute once and keep (the frequencies of positions), to four digits: devices round differently."""
    found = []
    for path, module in hf.named_modules():
        stretches = {"dynamic", "longrope"} & set(re.findall(r"\w+", str(getattr(module, "rope_type", ""))))  # with the prompt's length
        for name in sorted(() if stretches else module._non_persistent_buffers_set):
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_floating_point() and not buffer.is_meta:
                values = buffer.double().flatten().cpu()
                weighted = values @ torch.arange(1.0, len(values) + 1, dtype=torch.float64)
                found.append(f"{path}.{name}: {tuple(buffer.shape)} {values.sum():.3e} {weighted:.3e}")
    return digest(*(each.encode() for each in found))


def _code(hf: nn.Module) -> str:
    """A digest of the code that is none of an installed package's: of modules' classes, of a forward or an attention put in their place."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    modules = [*hf.modules()]
    kinds = {type(module): None for module in modules}
    names = {getattr(getattr(module, "config", None), "_attn_implementation", None) for module in modules}
    attentions = {
        name: function for name, function in ALL_ATTENTION_FUNCTIONS.items() if name in names and origin(function) not in KNOWN_TO_HOOK
    }
    return content(
        [[(kind, kind.forward) for kind in kinds], [list(each) for each in sorted(attentions.items())], _functions(modules)],
        "the model's code",
    )


def _functions(modules: Sequence[nn.Module]) -> list[Any]:
    """The functions that modules keep as attributes, such as an activation, but for those by which packages move and wrap a model."""
    kept = [(name, each) for module in modules for name, each in vars(module).items() if isinstance(each, FUNCTIONS) and name != "forward"]
    return [[name, each] for name, each in kept if name[0] != "_" and origin(each) not in {*KNOWN_TO_HOOK} - {"torch"}]


def _autocast(device: str) -> str:
    """The precision that autocast runs in; empty where it is off."""
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.") if torch.is_autocast_enabled(device) else ""


def _spelt(presentation: Presentation) -> str:
    """For people: how a presentation of guardlens prints, and the kind of any other, which may print otherwise in every process."""
    return repr(presentation) if _printed_alike(presentation) else type(presentation).__qualname__


def _printed_alike(presentation: Any) -> bool:
    inner = [each for each in getattr(presentation, "__dict__", {}).values() if callable(each)]
    return type(presentation).__module__.startswith("guardlens.") and all(map(_printed_alike, inner))
