"""`load`: a model by name, from a directory or from memory, checked before it is handed out if its family is not known."""

import importlib.resources
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from guardlens.architectures import KNOWN, require_named
from guardlens.check import require_sound
from guardlens.errors import ModelError
from guardlens.model import HookedModel


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
        source: `"organism"` (the embedded tiny model), a hub id, a local directory (also of a PEFT adapter), or a module in memory
            (also a `PeftModel` or a quantised one).
        processor: The processor (VLM) or tokenizer (LLM), where it does not lie beside the weights; needed with a module.
        llm: A separate language model for the text side, of the VLM's width and depth: anything that `load` takes, or a `HookedModel`.
            By default the VLM's own language model, shown no image. Either is `model.llm`; `collect(model.llm, ...)` is the LLM's view.
            Both share a space, so directions and plans of either fit: text twins are read from `llm`, and edits are made in the VLM.
        dtype: As in transformers; `"auto"` takes the checkpoint's.
        device: Where to put the whole model, e.g. `"cuda"`. Leave it out with `device_map` or a quantised model.
        device_map: As in transformers, e.g. `"auto"` (needs accelerate).
        revision: The hub's revision.
        trust_remote_code: Off unless you ask for it.
        names: What parts are called, where the generic rule does not find them: `{"stack": "core.layers", "final_norm": "out_norm"}`; the
            parts are the fields of `guardlens.architectures.Names`.
        self_check: Refuse a model of a family that the tests don't know, if what was found does not compute its logits, or if batches,
            edits or images go wrong. `guardlens check MODEL` shows all that is tried.
        options: Handed to `from_pretrained`: `quantization_config=BitsAndBytesConfig(...)`, `attn_implementation="eager"`, ...

    Raises:
        ModelError: It can't be loaded, its family is refused, a part of it is not found (the error says how to name it) or a name of yours
            is not, a VLM comes with a tokenizer alone, or what was found fails the self-check.
        MismatchError: `llm` has another width or depth.

    Examples:
        >>> gl.load("organism")  # or a hub id, with dtype="bfloat16", device_map="auto"
        HookedModel('organism': LlavaForConditionalGeneration, VLM, 8 layers, d_model 128)
        >>> gl.load(model.hf, processor=model.processor).cfg.n_layers
        8
    """
    if isinstance(source, nn.Module):
        if processor is None:
            raise ModelError("a module without its processor", "both", "pass processor=AutoProcessor.from_pretrained(...)")
        hf, name = source.eval(), Path(getattr(source.config, "name_or_path", "") or type(source).__name__).name
    else:
        path = str(importlib.resources.files("guardlens") / "organism" / "weights") if source == "organism" else str(source)
        name = Path(path).name if Path(path).exists() and source != "organism" else str(source)
        shared = {"revision": revision, "trust_remote_code": trust_remote_code}
        with _bar_of_transformers(show=source != "organism"):
            hf, processor = _from_pretrained(path, shared, {"dtype": dtype, "device_map": device_map, **options}, processor)
    known = KNOWN.also(names)
    require_named(hf, names)
    if device is not None:
        hf = hf.to(device)
    beside = llm if isinstance(llm, HookedModel) or llm is None else load(llm, dtype=dtype, device=device, device_map=device_map)
    model = HookedModel(hf, processor, name, revision or "", beside, known)
    if model.sees_images and model.tokenizer is processor:
        raise ModelError(
            f"{type(processor).__name__}, which prepares no images, for the VLM {name}",
            "a processor with an image processor beside the tokenizer",
            "pass processor=AutoProcessor.from_pretrained(...); what it needs, such as torchvision, must be installed",
        )
    if self_check:
        require_sound(model)
    return model


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


def _from_pretrained(path: str, shared: dict[str, Any], options: dict[str, Any], processor: Any) -> tuple[Any, Any]:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    except (ImportError, RuntimeError) as error:
        raise ModelError(
            f"a transformers that can't be imported ({_first_sentence(error)})",
            "torch, torchvision and transformers that fit one another",
            "install a torchvision of the same release as torch, or none",
        ) from None

    try:
        base = _adapted(path) or path
        config = AutoConfig.from_pretrained(base, **shared)
        multimodal = type(config) in AutoModelForImageTextToText._model_mapping  # type: ignore[operator]
        model_class, reader = (AutoModelForImageTextToText, AutoProcessor) if multimodal else (AutoModelForCausalLM, AutoTokenizer)
        hf = model_class.from_pretrained(path, **shared, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"{path!r}, which transformers can't load ({_first_sentence(error)})",
            "'organism', a local directory made by save_pretrained, or a hub id that can be reached",
            "check the name; install what is missing; for a gated model, log in with `hf auth login`",
        ) from None
    try:
        return hf.eval(), processor or reader.from_pretrained(base, **shared)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"the weights of {path!r}, but not its processor ({_first_sentence(error)})",
            "a processor beside the weights, and what it is made of",
            'install "guardlens[vision]", which brings torchvision, if that is missing; or pass processor=...',
        ) from None


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".")


def _adapted(path: str) -> str | None:
    """The base model of a directory that holds a PEFT adapter alone; transformers loads it with the adapter in place."""
    import json

    config = Path(path) / "adapter_config.json"
    if not config.is_file() or (Path(path) / "config.json").is_file():
        return None
    return json.loads(config.read_text()).get("base_model_name_or_path")
