"""`load` a model by name, from a directory or from memory. A model of an unknown family is checked before it is returned."""

import importlib.resources
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from guardlens.errors import ModelError, one_of, quoted
from guardlens.models import checkpoints
from guardlens.models.architectures import KNOWN, require_named
from guardlens.models.checks import require_sound
from guardlens.models.eyes import Eyes, with_eyes
from guardlens.models.hooked_model import HookedModel


def load(
    source: str | Path | nn.Module,
    *,
    processor: Any = None,
    llm: HookedModel | str | Path | nn.Module | None = None,
    eyes: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
    self_check: bool = True,
    **options: Any,
) -> HookedModel:
    """Load a VLM or LLM.

    Args:
        source: `"organism"` (the embedded tiny model), a hub id, a local directory (also of a PEFT adapter), a GGUF file or a directory
            with one (its weights are unpacked; needs `guardlens[gguf]`), or a module in memory (also a `PeftModel` or a quantised one).
        processor: The processor (VLM) or tokenizer (LLM), if it is not stored with the weights; required with a module.
        llm: A separate language model for the text side, of the VLM's width and depth: anything that `load` takes, or a `HookedModel`. By
            default the text side is the VLM's own language model, shown no image. Either is `model.llm`, and `collect(model.llm, ...)` is
            the LLM's view. Both models share a space, so directions and interventions of either fit: the states of text twins come from
            `llm`, and edits are made in the VLM.
        eyes: A directory with eyes that `python -m guardlens.organism.eyes` trained for this language model, which they make a VLM.
        dtype: float64, float32, float16 or bfloat16, as a torch dtype or by name; `"auto"` takes the checkpoint's.
        device: The device for the whole model, e.g. `"cuda"`. Leave it out with `device_map` or a quantised model.
        names: The names of parts that the generic rule does not find: `{"stack": "core.layers", "final_norm": "out_norm"}`. The parts are
            the fields of `guardlens.models.architectures.Names`.
        self_check: Refuse a model of a family that the tests do not cover if the parts that were found do not compute its logits, or if
            batches, edits or images go wrong. `guardlens check MODEL` shows all checks.
        options: Passed to transformers' `from_pretrained`: `device_map="auto"` (needs accelerate; also used for `llm`), `revision="main"`,
            `trust_remote_code=True` (off by default), `quantization_config=BitsAndBytesConfig(...)`, `attn_implementation="eager"`,
            `gguf_file=` for a hub id, ... A module in memory takes none of them but `revision`, which is recorded in results.

    Raises:
        ModelError: The model cannot be loaded, there is no such dtype or device, the family is not supported, a part was not found (the
            error says how to name it), a name in `names` does not exist, a VLM comes with a tokenizer alone, or the self-check failed.
        MismatchError: `llm` has another width or depth, or the eyes are those of another language model.
        StorageError: There are no eyes in the directory.

    Examples:
        >>> gl.load("organism")  # or a hub id, with dtype="bfloat16", device_map="auto"
        HookedModel('organism': LlavaForConditionalGeneration, VLM, 8 layers, d_model 128)
        >>> gl.load(model.hf, processor=model.processor).cfg.n_layers
        8
    """
    known = KNOWN.preferring(names)
    _require_loadable(source, dtype, device, options.get("device_map"))
    if isinstance(source, nn.Module):
        _require_whole(source, processor, {"dtype": None if dtype == "auto" else dtype, **options, "revision": None})
        hf = source
        name = Path(getattr(source.config, "name_or_path", "") or type(source).__name__).name
    else:
        hf, processor, name = _read(source, processor, {"dtype": dtype, **options})
    if eyes is not None:
        hf, processor = with_eyes(hf, processor, Eyes.load(eyes))
        name = f"{name} with eyes {Path(eyes).name}"
    require_named(hf, names)
    if device is not None:
        hf = _moved(hf, device)
    beside = _llm_beside(llm, dtype, device, options.get("device_map"))
    model = HookedModel(hf, processor, name, options.get("revision") or "", beside, known)
    _require_image_processor(model)
    if self_check:
        require_sound(model)
    return model


def _read(source: str | Path, processor: Any, options: dict[str, Any]) -> tuple[Any, Any, str]:
    """Read a checkpoint: the model, its processor and its name."""
    embedded = source == "organism"
    path = str(importlib.resources.files("guardlens") / "organism" / "weights") if embedded else str(source)
    shared = {"revision": options.pop("revision", None), "trust_remote_code": options.pop("trust_remote_code", False)}
    with _bar_of_transformers(show=not embedded):
        checkpoint = checkpoints.locate(path, options.pop("gguf_file", None))
        hf, processor = checkpoints.read(checkpoint, shared, options, processor)
    is_file = Path(path).exists() and not embedded
    return hf, processor, Path(path).name if is_file else str(source)


def _llm_beside(llm: Any, dtype: Any, device: Any, device_map: Any) -> HookedModel | None:
    """Load the separate LLM onto the same device as the VLM."""
    if llm is None or isinstance(llm, HookedModel):
        return llm
    if isinstance(llm, nn.Module):
        return load(llm, device=device)
    placed = {} if device_map is None else {"device_map": device_map}
    return load(llm, dtype=dtype, device=device, **placed)


def _require_image_processor(model: HookedModel) -> None:
    if model.sees_images and model.tokenizer is model.processor:
        raise ModelError(
            f"{type(model.processor).__name__}, which prepares no images, for the VLM {model.name}",
            "a processor with an image processor beside the tokenizer",
            "pass processor=AutoProcessor.from_pretrained(...); what it needs, such as torchvision, must be installed",
        )


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _require_loadable(source: object, dtype: object, device: Any, device_map: object) -> None:
    if not isinstance(source, str | Path | nn.Module):
        raise ModelError(
            f"something of type {type(source).__name__}",
            "a name, a path or a module of transformers",
            "a HookedModel is loaded already: use it, or load its .hf" if isinstance(source, HookedModel) else "pass gl.load(path)",
        )
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not one_of(dtype, ("auto",)) and not any(named is each for each in FLOATS):
        known = ", ".join(str(each).removeprefix("torch.") for each in FLOATS)
        raise ModelError(f"dtype={quoted(dtype)}", f"'auto' or one of {known}", "choose one; fewer bits need a quantization_config")
    if device is not None and device_map is not None:
        raise ModelError("device and device_map", "one of them", "leave out device, which moves the whole model")
    if device is not None:
        with _on(device):
            torch.empty(0, device=device)


def _require_whole(hf: nn.Module, processor: object, options: dict[str, object]) -> None:
    """Check that a module in memory has a config and a processor, and comes without options: they cannot change how it was loaded."""
    if not hasattr(hf, "config"):
        raise ModelError(
            f"{type(hf).__name__}, a module without a config", "a model of transformers", "pass the model that it is a part of"
        )
    if processor is None:
        raise ModelError("a module without its processor", next_step="pass processor=AutoProcessor.from_pretrained(...)")
    if option := next((name for name, value in options.items() if value is not None), None):
        raise ModelError(f"{option}= for a module in memory", "a name or a path", f"give {option} where the module is loaded or made")


def _moved(hf: Any, device: Any) -> Any:
    with _on(device):
        return hf.to(device)


@contextmanager
def _on(device: object) -> Iterator[None]:
    """Turn torch's errors about a device (unknown, absent, not allowed for this model) into a ModelError."""
    try:
        yield
    except Exception as error:  # torch raises several classes here, AssertionError among them
        reason = str(error).strip().partition(chr(10))[0]
        raise ModelError(
            f"device={quoted(device)}, where the model can't be put ({reason})", "a device of this machine", "use 'cpu', or leave it out"
        ) from None


@contextmanager
def _bar_of_transformers(show: bool) -> Iterator[None]:
    """Show or hide transformers' progress bar over the weights; those of the organism are read in an instant."""
    from transformers.utils import logging

    hidden = not show and logging.is_progress_bar_enabled()
    if hidden:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            logging.enable_progress_bar()
