"""`load`: a model by name, from a directory or from memory, checked before it is handed out if its family is not known."""

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
from guardlens.models.hooked_model import HookedModel


def load(
    source: str | Path | nn.Module,
    *,
    processor: Any = None,
    llm: "HookedModel | str | Path | nn.Module | None" = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    names: Mapping[str, str] = MappingProxyType({}),
    self_check: bool = True,
    **options: Any,
) -> HookedModel:
    """Load a VLM or LLM.

    Args:
        source: `"organism"` (the embedded tiny model), a hub id, a local directory (also of a PEFT adapter), a GGUF file or a directory
            with one (its weights are unpacked; needs `guardlens[gguf]`), or a module in memory (also a `PeftModel` or a quantised one).
        processor: The processor (VLM) or tokenizer (LLM), where it does not lie beside the weights; needed with a module.
        llm: A separate language model for the text side, of the VLM's width and depth: anything that `load` takes, or a `HookedModel`.
            By default the VLM's own language model, shown no image. Either is `model.llm`; `collect(model.llm, ...)` is the LLM's view.
            Both share a space, so directions and interventions of either fit: text twins are read from `llm`, and edits are made in the
            VLM.
        dtype: float64, float32, float16 or bfloat16, as torch's or by name; `"auto"` takes the checkpoint's.
        device: Where to put the whole model, e.g. `"cuda"`. Leave it out with `device_map` or a quantised model.
        device_map: As in transformers, e.g. `"auto"` (needs accelerate).
        revision: The hub's revision.
        trust_remote_code: Off unless you ask for it.
        names: What parts are called, where the generic rule does not find them: `{"stack": "core.layers", "final_norm": "out_norm"}`; the
            parts are the fields of `guardlens.models.architectures.Names`.
        self_check: Refuse a model of a family that the tests don't know, if what was found does not compute its logits, or if batches,
            edits or images go wrong. `guardlens check MODEL` shows all that is tried.
        options: Handed to `from_pretrained` (none with a module): `quantization_config=BitsAndBytesConfig(...)`,
            `attn_implementation="eager"`, `gguf_file=` of a hub id, ...

    Raises:
        ModelError: It can't be loaded, there is no such dtype or device, its family is refused, a part of it is not found (the error says
            how to name it) or a name of yours is not, a VLM comes with a tokenizer alone, or what was found fails the self-check.
        MismatchError: `llm` has another width or depth.

    Examples:
        >>> gl.load("organism")  # or a hub id, with dtype="bfloat16", device_map="auto"
        HookedModel('organism': LlavaForConditionalGeneration, VLM, 8 layers, d_model 128)
        >>> gl.load(model.hf, processor=model.processor).cfg.n_layers
        8
    """
    known = KNOWN.preferring(names)
    _require_loadable(source, dtype, device, device_map)
    if isinstance(source, nn.Module):
        _require_whole(source, processor, {"dtype": None if dtype == "auto" else dtype, "device_map": device_map, **options})
        hf, name = source, Path(getattr(source.config, "name_or_path", "") or type(source).__name__).name
    else:
        path = str(importlib.resources.files("guardlens") / "organism" / "weights") if source == "organism" else str(source)
        name = Path(path).name if Path(path).exists() and source != "organism" else str(source)
        shared = {"revision": revision, "trust_remote_code": trust_remote_code}
        with _bar_of_transformers(show=source != "organism"):
            at = checkpoints.locate(path, options.pop("gguf_file", None))
            hf, processor = checkpoints.read(at, shared, {"dtype": dtype, "device_map": device_map, **options}, processor)
    require_named(hf, names)
    if device is not None:
        hf = _moved(hf, device)
    if isinstance(llm, nn.Module):
        llm = load(llm, device=device)
    elif llm is not None and not isinstance(llm, HookedModel):
        llm = load(llm, dtype=dtype, device=device, device_map=device_map)
    model = HookedModel(hf, processor, name, revision or "", llm, known)
    if model.sees_images and model.tokenizer is processor:
        raise ModelError(
            f"{type(processor).__name__}, which prepares no images, for the VLM {name}",
            "a processor with an image processor beside the tokenizer",
            "pass processor=AutoProcessor.from_pretrained(...); what it needs, such as torchvision, must be installed",
        )
    if self_check:
        require_sound(model)
    return model


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
    """A module in memory brings its config, comes with its processor, and is as it is: no option can change how it was loaded."""
    if not hasattr(hf, "config"):
        raise ModelError(
            f"{type(hf).__name__}, a module without a config", "a model of transformers", "pass the model that it is a part of"
        )
    if processor is None:
        raise ModelError("a module without its processor", "both", "pass processor=AutoProcessor.from_pretrained(...)")
    if option := next((name for name, value in options.items() if value is not None), None):
        raise ModelError(f"{option}= for a module in memory", "a name or a path", f"give {option} where the module is loaded or made")


def _moved(hf: Any, device: Any) -> Any:
    with _on(device):
        return hf.to(device)


@contextmanager
def _on(device: object) -> Iterator[None]:
    """What torch raises of a device that it does not know, does not have or may not move a model to, as a ModelError."""
    try:
        yield
    except Exception as error:  # of several classes, an AssertionError among them
        reason = str(error).strip().partition(chr(10))[0]
        raise ModelError(
            f"device={quoted(device)}, where the model can't be put ({reason})", "a device of this machine", "use 'cpu', or leave it out"
        ) from None


@contextmanager
def _bar_of_transformers(show: bool) -> Iterator[None]:
    """With transformers' bar over the weights, or without: the organism's are read in an instant."""
    from transformers.utils import logging

    hidden = not show and logging.is_progress_bar_enabled()
    if hidden:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            logging.enable_progress_bar()
