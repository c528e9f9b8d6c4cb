"""The generic rule: from any model of transformers to the parts that the hooks of `guardlens.hooks` name."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from guardlens.errors import ModelError, first_sentence
from guardlens.hooks import Point
from guardlens.models.architectures import families as tables
from guardlens.models.architectures.architecture import Architecture
from guardlens.models.architectures.blocks import block_parts, head_width, mlp_width
from guardlens.models.architectures.families import KNOWN, Names
from guardlens.models.architectures.parts import Joined, Normalised, Part
from guardlens.models.architectures.search import first, first_number, within


def find(hf: nn.Module, names: Names = KNOWN) -> Architecture:
    """Find the parts of a model.

    Args:
        hf: The model, outside of any adapter's or nnsight's wrapper or inside of it.
        names: What its parts may be called.

    Raises:
        ModelError: A part is missing; it is named. Or the family or the adapter is refused, with the reason.
    """
    require_parts_alone(hf)
    model: Any = hf
    config: Any = getattr(model, "config", None)
    if reason := tables.REFUSED.get(getattr(config, "model_type", "")):
        raise ModelError(f"{type(hf).__name__}, a family that {reason}", "one residual stream per prompt", "use another model")
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
    language_model, decoder, blocks = _decoder(model, names)
    text, softmax = config.get_text_config(decoder=True), _softmax(decoder)
    heads = _number(text, "num_attention_heads", 0)
    where, parts = tuple(paths[id(block)] for block in blocks), _ends(model, language_model, decoder, paths, names)
    for layer, block in enumerate(blocks):
        parts |= {Point(hook, layer): part.under(where[layer]) for hook, part in block_parts(block, text, names, softmax).items()}
    vision, token = getattr(config, "vision_config", None), first_number(config, ("image_token_id", "image_token_index"), None)
    if vision is not None and token is None:
        raise ModelError(f"{type(hf).__name__} with a vision tower but no image token", "config.image_token_id", "set it in the config")
    if token is not None:
        parts |= _eye(model, paths, decoder, names)
    unembed = parts[Point("unembed")].path
    head, size = model.get_submodule(unembed.rpartition(".")[0]), getattr(vision, "image_size", None)
    return Architecture(
        parts=parts,
        decoder=paths[id(decoder)],
        blocks=where,
        norm=parts[Point("ln_final")].path,
        unembed=unembed,
        n_layers=len(blocks),
        d_model=_number(text, "hidden_size"),
        n_heads=heads,
        n_kv_heads=next((part.heads for point, part in parts.items() if point.hook == "k" and part.heads), heads),
        d_head=head_width(blocks, text, names, softmax),
        d_mlp=mlp_width(blocks, names),
        d_vocab=_number(text, "vocab_size"),
        image_token_id=token,
        image_size=size if isinstance(size, int) else None,
        proven={config.model_type, text.model_type} <= tables.PROVEN,
        image_layers=frozenset(getattr(text, "cross_attention_layers", None) or ()),
        residual_scale=first_number(text, tables.RESIDUAL_SCALE, 1.0),
        logit_scale=_logit_scale(head, text),
        softcap=first_number(text, _read(head, tables.SOFTCAP), None),
        packed=tables.PACKED.get(config.model_type, frozenset()),
        narrows=bool(first_number(text, tables.NARROWING, 0)),
    )


def require_parts_alone(hf: Any) -> None:
    """Refuse an adapter that works in its own forward: tokens or keys that it puts before the prompt, or weights that wait for a phrase in
    it. Tokens would be counted from another place, and what runs the model's parts alone would run without it.

    Raises:
        ModelError: As said.
    """
    config = getattr(hf, "active_peft_config", None)
    if config is None:
        return
    if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
        kind = getattr(config.peft_type, "value", config.peft_type)
        what = "virtual tokens before the prompt" if config.is_prompt_learning else "an invocation phrase"
        raise ModelError(
            f"an adapter of {what} ({kind}), which works in its own forward and not in the model's parts",
            "one that changes weights alone, as LoRA does",
            "take another adapter, or the model without it: hf.get_base_model()",
        )


def require_named(hf: nn.Module, given: Mapping[str, str]) -> None:
    """Refuse a user's name of a part that is nowhere in the model, where a known name might be taken instead.

    Raises:
        ModelError: The first of them.
    """
    for part, name in given.items():
        if not any(within(module, name) is not None or (part == "head_width" and hasattr(module, name)) for module in hf.modules()):
            raise ModelError(
                f"{name!r} for the part {part!r}, nowhere in {type(hf).__name__}",
                "the name of one of its modules, or a dotted path to it",
                "look it up in print(model)",
            )


def _decoder(model: Any, names: Names) -> tuple[Any, Any, nn.ModuleList]:
    """The causal language model, its decoder and the blocks: `get_decoder()`, as often as needed."""
    language_model = module = model
    for _ in range(5):
        if isinstance(blocks := first(module, names.stack), nn.ModuleList):
            return language_model, module, blocks
        inner = module.get_decoder() if hasattr(module, "get_decoder") else None
        inner = first(module, names.inner) if inner is None or inner is module else inner
        if inner is None:
            break
        language_model, module = module, inner
    raise _missing(model, "stack", f"get_decoder() to lead to a module with one of {', '.join(names.stack)}")


def _ends(model: Any, language_model: Any, decoder: nn.Module, paths: Mapping[int, str], names: Names) -> dict[Point, Part]:
    """Embedding, final norm and unembedding."""
    found = {
        "embed": first(model, names.embed) or model.get_input_embeddings(),
        "final_norm": next(filter(None, (within(at, name) for name in names.final_norm for at in (decoder, language_model, model))), None),
        "unembed": first(model, names.unembed) or model.get_output_embeddings() or language_model.get_output_embeddings(),
    }
    for part, module in found.items():
        if module is None:
            candidates = (
                ", ".join(getattr(names, part)) or f"what transformers' get_{'in' if part == 'embed' else 'out'}put_embeddings() gives"
            )
            raise _missing(model, part, f"{candidates} in {type(decoder).__name__ if part == 'final_norm' else type(model).__name__}")
    embed, norm, unembed = (paths[id(module)] for module in found.values())
    return {
        Point("embed"): Part(embed),
        Point("ln_final"): Part(norm),
        Point("ln_final_normalized"): Part(norm, "input", _before_gain(found["final_norm"])),
        Point("unembed"): Part(unembed),
    }


def _softmax(decoder: Any) -> tuple[type, ...]:
    """The classes of attention whose patterns transformers can give; empty where it does not say. Linear attentions are none of them."""
    recorded = (getattr(decoder, "_can_record_outputs", None) or {}).get("attentions", ())
    return tuple(getattr(each, "target_class", each) for each in (recorded if isinstance(recorded, list | tuple) else [recorded]))


def _eye(model: Any, paths: Mapping[int, str], decoder: nn.Module, names: Names) -> Iterator[tuple[Point, Part]]:
    """The vision tower's blocks, the longest list of modules of one class in it, and the projector.

    Where images go straight into the language model (Fuyu, Emu3), transformers gives the whole model for its encoder: it is none.
    """
    tower = model.get_encoder(modality="image") or nn.Module()
    if any(module is decoder for module in tower.modules()):
        tower = nn.Module()
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(set(map(type, module))) == 1]
    for layer, block in enumerate(max(lists, key=len, default=())):
        yield Point("vision_resid_post", layer), Part(paths[id(block)])
    outside = [path for path in paths.values() if not path.startswith(f"{paths[id(decoder)]}.")]
    for name in names.projector if model.config.model_type not in tables.PER_IMAGE else ():
        for path in sorted((path for path in outside if f".{path}".endswith(f".{name}")), key=len):
            yield Point("projector"), Part(path, view=Joined())
            return


def _before_gain(norm: Any) -> Normalised:
    epsilon = first_number(norm, ("variance_epsilon", "eps", "epsilon"), 1e-5)
    return Normalised("RMS" not in type(norm).__name__, epsilon)


def _read(head: nn.Module, candidates: Iterable[str]) -> list[str]:
    """The names that the forward of the unembedding's owner mentions: a VLM's may leave out what its language model's does (Aya Vision)."""
    code = inspect.unwrap(type(head).forward).__code__
    return [name for name in candidates if name in (*code.co_names, *code.co_consts)]


def _logit_scale(head: nn.Module, text: Any) -> float:
    scale, divisor = (first_number(text, _read(head, candidates), 1.0) for candidates in (tables.SCALE, tables.DIVISOR))
    return scale * divisor if text.model_type in tables.MULTIPLIED else scale / divisor


def _number(text: Any, name: str, default: int | None = None) -> int:
    """A size from the text config, which may have another one for each layer.

    Raises:
        ModelError: It has, or it has none and there is no default.
    """
    try:
        return getattr(text, name)
    except AttributeError:
        if default is not None:
            return default
        raise ModelError(f"{type(text).__name__} without {name}", "the sizes that language models have", "use another model") from None
    except Exception as error:  # transformers has a class of its own for sizes that vary, deep inside
        raise ModelError(
            f"{type(text).__name__} without one {name} ({first_sentence(error)})", "the same size in every layer", "use another model"
        ) from None


def _missing(hf: nn.Module, part: str, expected: str) -> ModelError:
    return ModelError(
        f"{type(hf).__name__}, in which no {part.replace('_', ' ')} was found",
        expected,
        f'say what it is called: gl.load(..., names={{"{part}": "its.path"}}), or add the name to guardlens/architectures/names.py',
    )
