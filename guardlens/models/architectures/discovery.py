"""The generic rule: find, in any transformers model, the parts that the hooks of `guardlens.hooks` name."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from guardlens.errors import ModelError, first_sentence
from guardlens.hooks import Point
from guardlens.models.architectures import families
from guardlens.models.architectures.architecture import Architecture
from guardlens.models.architectures.blocks import block_parts, head_width, mlp_width
from guardlens.models.architectures.families import KNOWN, Names
from guardlens.models.architectures.lookup import first, first_number, within
from guardlens.models.architectures.parts import Joined, Normalised, Part


def find(hf: nn.Module, names: Names = KNOWN) -> Architecture:
    """Find the parts of a model.

    Args:
        hf: The model, with or without an adapter's or nnsight's wrapper.
        names: What its parts may be called.

    Raises:
        ModelError: A part was not found (the error names it), or the family or the adapter is not supported (the error says why).
    """
    require_parts_alone(hf)
    model: Any = hf
    config: Any = getattr(model, "config", None)
    if reason := families.REFUSED.get(getattr(config, "model_type", "")):
        raise ModelError(f"{type(hf).__name__}, a family that {reason}", "one residual stream per prompt", "use another model")
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
    language_model, decoder, blocks = _decoder(model, names)
    block_paths = tuple(paths[id(block)] for block in blocks)
    text = config.get_text_config(decoder=True)
    softmax = _softmax_classes(decoder)
    image_token = _image_token(hf, config)
    parts = _ends(model, language_model, decoder, paths, names)
    for layer, block in enumerate(blocks):
        found = block_parts(block, text, names, softmax)
        parts |= {Point(hook, layer): part.under(block_paths[layer]) for hook, part in found.items()}
    if image_token is not None:
        parts |= _vision_encoder(model, paths, decoder)
        parts |= _projector(model, paths, decoder, names)
    unembed = parts[Point("unembed")].path
    head = model.get_submodule(unembed.rpartition(".")[0])
    n_heads = _number(text, "num_attention_heads", 0)
    return Architecture(
        parts=parts,
        decoder=paths[id(decoder)],
        blocks=block_paths,
        norm=parts[Point("ln_final")].path,
        unembed=unembed,
        n_layers=len(blocks),
        d_model=_number(text, "hidden_size"),
        n_heads=n_heads,
        n_kv_heads=next((part.heads for point, part in parts.items() if point.hook == "k" and part.heads), n_heads),
        d_head=head_width(blocks, text, names, softmax),
        d_mlp=mlp_width(blocks, names),
        d_vocab=_number(text, "vocab_size"),
        image_token_id=image_token,
        image_size=_image_size(config),
        proven={config.model_type, text.model_type} <= families.PROVEN,
        image_layers=frozenset(getattr(text, "cross_attention_layers", None) or ()),
        residual_scale=first_number(text, families.RESIDUAL_SCALE, 1.0),
        logit_scale=_logit_scale(head, text),
        softcap=first_number(text, _mentioned(head, families.SOFTCAP), None),
        packed=families.PACKED.get(config.model_type, frozenset()),
        narrows=bool(first_number(text, families.NARROWING, 0)),
    )


def require_parts_alone(hf: Any) -> None:
    """Reject an adapter that works outside of the model's parts.

    Such an adapter puts tokens or keys before the prompt, which shifts positions, or waits for a phrase in the prompt. Code that runs parts
    of the model on their own would run without it.

    Raises:
        ModelError: The active adapter is of this kind.
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
    """Check that each name given by the user exists in the model; otherwise a known name might be used instead without notice.

    Raises:
        ModelError: A name does not exist; the first such name is shown.
    """
    for part, name in given.items():
        if not any(within(module, name) is not None or (part == "head_width" and hasattr(module, name)) for module in hf.modules()):
            raise ModelError(
                f"{name!r} for the part {part!r}, nowhere in {type(hf).__name__}",
                "the name of one of its modules, or a dotted path to it",
                "look it up in print(model)",
            )


def _decoder(model: Any, names: Names) -> tuple[Any, Any, nn.ModuleList]:
    """The causal language model, its decoder and the blocks, found by calling `get_decoder()` as often as needed."""
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
    """Embedding, final norm and unembedding.

    Raises:
        ModelError: One of them was not found.
    """
    embed = first(model, names.embed) or model.get_input_embeddings()
    if embed is None:
        raise _missing(model, "embed", f"{_or(names.embed, 'a result of get_input_embeddings()')} in {type(model).__name__}")
    norm = next(filter(None, (within(owner, name) for name in names.final_norm for owner in (decoder, language_model, model))), None)
    if norm is None:
        raise _missing(model, "final_norm", f"{', '.join(names.final_norm)} in {type(decoder).__name__}")
    unembed = first(model, names.unembed) or model.get_output_embeddings() or language_model.get_output_embeddings()
    if unembed is None:
        raise _missing(model, "unembed", f"{_or(names.unembed, 'a result of get_output_embeddings()')} in {type(model).__name__}")
    return {
        Point("embed"): Part(paths[id(embed)]),
        Point("ln_final"): Part(paths[id(norm)]),
        Point("ln_final_normalized"): Part(paths[id(norm)], "input", _before_gain(norm)),
        Point("unembed"): Part(paths[id(unembed)]),
    }


def _or(candidates: Iterable[str], otherwise: str) -> str:
    return ", ".join(candidates) or otherwise


def _softmax_classes(decoder: Any) -> tuple[type, ...]:
    """The classes of attention whose patterns transformers can return, which excludes linear attention; empty if it does not say."""
    recorded = (getattr(decoder, "_can_record_outputs", None) or {}).get("attentions", ())
    entries = recorded if isinstance(recorded, list | tuple) else [recorded]
    return tuple(getattr(entry, "target_class", entry) for entry in entries)


def _image_token(hf: nn.Module, config: Any) -> int | None:
    """The token that stands for an image; None for a text-only model.

    Raises:
        ModelError: The model has a vision encoder, but its config names no image token.
    """
    token = first_number(config, ("image_token_id", "image_token_index"), None)
    if token is None and getattr(config, "vision_config", None) is not None:
        raise ModelError(
            f"{type(hf).__name__}, which has a vision encoder but no image token", "config.image_token_id", "set it in the config"
        )
    return token


def _image_size(config: Any) -> int | None:
    """The side of the square images that the vision encoder sees, in pixels; None if its config does not say."""
    size = getattr(getattr(config, "vision_config", None), "image_size", None)
    return size if isinstance(size, int) else None


def _vision_encoder(model: Any, paths: Mapping[int, str], decoder: nn.Module) -> Iterator[tuple[Point, Part]]:
    """The blocks of the vision encoder: the longest list in it whose modules have one class.

    If images go straight into the language model (Fuyu, Emu3), transformers returns the whole model as the encoder. It does not count.
    """
    encoder = model.get_encoder(modality="image") or nn.Module()
    modules = list(encoder.modules())
    if any(module is decoder for module in modules):
        return
    lists = [module for module in modules if isinstance(module, nn.ModuleList) and len(set(map(type, module))) == 1]
    for layer, block in enumerate(max(lists, key=len, default=())):
        yield Point("vision_resid_post", layer), Part(paths[id(block)])


def _projector(model: Any, paths: Mapping[int, str], decoder: nn.Module, names: Names) -> dict[Point, Part]:
    """The projector: of the modules outside of the decoder that have the first name found, the one with the shortest path."""
    if model.config.model_type in families.PER_IMAGE:
        return {}
    outside = [path for path in paths.values() if not path.startswith(f"{paths[id(decoder)]}.")]
    for name in names.projector:
        named = [path for path in outside if f".{path}".endswith(f".{name}")]
        if named:
            return {Point("projector"): Part(min(named, key=len), view=Joined())}
    return {}


def _before_gain(norm: Any) -> Normalised:
    epsilon = first_number(norm, ("variance_epsilon", "eps", "epsilon"), 1e-5)
    return Normalised("RMS" not in type(norm).__name__, epsilon)


def _mentioned(head: nn.Module, candidates: Iterable[str]) -> list[str]:
    """The names that the forward of the unembedding's owner mentions. A VLM may ignore a setting of its language model (Aya Vision)."""
    code = inspect.unwrap(type(head).forward).__code__
    return [name for name in candidates if name in (*code.co_names, *code.co_consts)]


def _logit_scale(head: nn.Module, text: Any) -> float:
    scale = first_number(text, _mentioned(head, families.SCALE), 1.0)
    divisor = first_number(text, _mentioned(head, families.DIVISOR), 1.0)
    return scale * divisor if text.model_type in families.MULTIPLIED else scale / divisor


def _number(text: Any, name: str, default: int | None = None) -> int:
    """Return a size from the text config.

    Raises:
        ModelError: The size varies between layers, or it is absent and there is no default.
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
    by_hand = f'gl.load(..., names={{"{part}": "its.path"}})'
    return ModelError(
        f"{type(hf).__name__}, in which no {part.replace('_', ' ')} was found",
        expected,
        f"say what it is called: {by_hand}, or add the name to guardlens/models/architectures/families.py",
    )
