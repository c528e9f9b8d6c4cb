"""The identity of a run: everything that its states and answers depend on, as facts that a run directory stores and compares."""

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
"""Types of functions that a module may hold as attributes."""


def configuration(model: HookedModel, queries: Sequence[Query], presentations: Sequence[Presentation]) -> dict[str, Any]:
    """Everything that a model's runs on queries depend on: the model, the LLM beside it, the queries and their presentation.

    All weights are hashed again. Callers add what is specific to their run: an intervention, a site, a judge.

    Args:
        model: The model.
        queries: The queries.
        presentations: How they are shown, each presentation under a name of its own.

    Returns:
        Nested facts that JSON can hold. Two runs with different results have different facts.
    """
    return {
        "queries": content([replace(query, images=()) for query in queries] + [query.images for query in queries], "the queries"),
        "presentations": {each.name: {"is": _readable(each), "shows": digest_of_prompts(each, queries)} for each in presentations},
        "model": of_model(model),
        "llm": "the model itself" if model.separate_llm is None else of_model(model.separate_llm),
    }


def digest_of_prompts(presentation: Presentation, queries: Sequence[Query]) -> str:
    """Return a digest of the prompts themselves: texts, system prompts and pixels, whatever the presentation's own fields say.

    Raises:
        PresentationError: The presentation shows the first query differently the second time, so prompts cannot be compared between runs.
    """
    name = f"a prompt of {presentation.name!r}"
    last_image: Any = None
    last_digest = ""
    digests = []
    for query in (*queries, queries[0]):
        prompt = presentation(query)
        parts = [content(replace(prompt, images=()), name)]
        for image in prompt.images:
            if image is not last_image:  # many prompts show one image, which is hashed once
                last_image = image
                last_digest = content(image)
            parts.append(last_digest)
        digests.append("".join(parts))
    if digests[-1] != digests[0]:
        raise PresentationError(
            f"the presentation {presentation.name!r}, which shows query {queries[0].id!r} otherwise every time",
            "the same prompt of the same query",
            "draw from a seed and query.id, as presentations.noise does; or leave out= away",
        )
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]


def of_intervention(intervention: Intervention) -> str:
    """Return an intervention's fingerprint, and a digest of its custom functions, of which a fingerprint holds the names alone."""
    edits = [step.edit.edit if isinstance(step.edit, Placebo) else step.edit for step in intervention.steps]
    functions = [edit.fn for edit in edits if isinstance(edit, Custom)]
    return "-".join([intervention.fingerprint, *([content(functions, "the custom functions of an intervention")] if functions else [])])


def of_model(model: HookedModel) -> dict[str, Any]:
    """Return what a model computes with: weights, config, adapters, precision, names of parts, hooks, and its processor."""
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
    """Return what turns prompts into tensors: chat template, tokenizer and the settings of image processing."""
    tokenizer = tokenizer_of(processor)
    templates = [str(getattr(part, "chat_template", None)) for part in (processor, tokenizer)]
    return {
        "template": digest(*(template.encode() for template in templates)),
        "tokenizer": _tokenizer(tokenizer),
        "images": {} if processor is tokenizer else _settings(processor),
    }


def _tokenizer(tokenizer: Any) -> str:
    """A digest of the vocabulary and of everything that encodes and decodes text."""
    names = ("special_tokens_map", "clean_up_tokenization_spaces", "split_special_tokens")
    settings = {name: getattr(tokenizer, name, None) for name in names}
    kind = type(tokenizer).__qualname__
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return content([kind, sorted(tokenizer.get_vocab().items()), {name: str(value) for name, value in settings.items()}])
    whole = json.loads(backend.to_str())
    whole |= {"padding": None, "truncation": None}  # settings of the last call
    return digest(kind.encode(), json.dumps(whole, sort_keys=True).encode(), repr(settings).encode())


def _settings(processor: Any) -> dict[str, Any]:
    """The settings of a processor and of its parts, as they are saved to its files."""
    own = processor.to_dict() if hasattr(processor, "to_dict") else vars(processor)
    inner: dict[str, Any] = {name: getattr(processor, name, None) for name in ("image_processor", "video_processor", "feature_extractor")}
    parts = {name: {"kind": type(part).__name__, **part.to_dict()} for name, part in inner.items() if hasattr(part, "to_dict")}
    found = {"kind": type(processor).__name__, **own, **parts, "chat_template": None, "tokenizer": None}
    return json.loads(json.dumps(found, default=content))


def _computed(hf: nn.Module) -> str:
    """A digest of buffers that modules compute once (such as rotary frequencies), to four digits, since devices round differently."""
    found = []
    for path, module in hf.named_modules():
        rope_types = set(re.findall(r"\w+", str(getattr(module, "rope_type", ""))))
        if rope_types & {"dynamic", "longrope"}:  # these buffers change with the length of the prompt
            continue
        for name in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_floating_point() and not buffer.is_meta:
                values = buffer.double().flatten().cpu()
                weighted = values @ torch.arange(1.0, len(values) + 1, dtype=torch.float64)
                found.append(f"{path}.{name}: {tuple(buffer.shape)} {values.sum():.3e} {weighted:.3e}")
    return digest(*(each.encode() for each in found))


def _code(hf: nn.Module) -> str:
    """A digest of the code that is not an installed package's: modules' classes, replaced forwards and replaced attention functions."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    modules = list(hf.modules())
    kinds = {type(module): None for module in modules}
    forwards = [(kind, kind.forward) for kind in kinds]
    used = {getattr(getattr(module, "config", None), "_attn_implementation", None) for module in modules}
    attentions = [
        [name, function]
        for name, function in sorted(ALL_ATTENTION_FUNCTIONS.items())
        if name in used and origin(function) not in KNOWN_TO_HOOK
    ]
    return content([forwards, attentions, _functions(modules)], "the model's code")


def _functions(modules: Sequence[nn.Module]) -> list[Any]:
    """The functions that modules hold as attributes, such as an activation, without those by which packages move and wrap a model."""
    ignored = {*KNOWN_TO_HOOK} - {"torch"}
    return [
        [name, value]
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, FUNCTIONS) and name != "forward" and not name.startswith("_") and origin(value) not in ignored
    ]


def _autocast(device: str) -> str:
    """The precision of autocast; empty if autocast is off."""
    if not torch.is_autocast_enabled(device):
        return ""
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.")


def _readable(presentation: Presentation) -> str:
    """A description for people: the repr of guardlens's own presentations; the class of others, whose repr may change between processes."""
    return repr(presentation) if _has_stable_repr(presentation) else type(presentation).__qualname__


def _has_stable_repr(presentation: Any) -> bool:
    inner = [each for each in getattr(presentation, "__dict__", {}).values() if callable(each)]
    return type(presentation).__module__.startswith("guardlens.") and all(map(_has_stable_repr, inner))
