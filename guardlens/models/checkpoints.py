"""Read a checkpoint from disk or from the hub: weights in transformers' format, a GGUF file or a PEFT adapter, and the processor."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardlens.errors import ModelError, first_sentence


@dataclass(frozen=True)
class Checkpoint:
    """Where to find weights, config and processor.

    Attributes:
        path: The directory or hub id of the weights.
        base: The directory or hub id of the config and the processor; for an adapter, this is its base model.
        gguf: The GGUF file in the directory that holds all three; None for other checkpoints.
    """

    path: str
    base: str
    gguf: str | None = None


def locate(source: str, gguf_file: str | None = None) -> Checkpoint:
    """Find the checkpoint that a user's path or hub id stands for.

    Raises:
        ModelError: A GGUF file does not exist, or a directory has several.
    """
    path = Path(source)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"no file {source!r}", "a GGUF file", "for a file on the hub, gl.load(id, gguf_file=...)")
        return Checkpoint(str(path.parent), str(path.parent), path.name)
    gguf = gguf_file or _gguf_in(path)
    return Checkpoint(source, source, gguf) if gguf else Checkpoint(source, _base_of_adapter(path) or source)


def read(checkpoint: Checkpoint, shared: Mapping[str, Any], options: Mapping[str, Any], processor: Any = None) -> tuple[Any, Any]:
    """Read the model and, unless it is given, its processor.

    Args:
        checkpoint: Where to find them.
        shared: Options for the config, the model and the processor.
        options: Options for the model alone.
        processor: The processor; None to read it.

    Raises:
        ModelError: transformers cannot be imported or cannot load one of them, or the packages that read GGUF files are not installed.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    except (ImportError, RuntimeError) as error:
        raise ModelError(
            f"a transformers that can't be imported ({_message(error)})",
            "torch, torchvision and transformers that fit one another",
            "install a torchvision of the same release as torch, or none",
        ) from None
    if checkpoint.gguf:
        shared, options = _for_gguf(checkpoint.gguf, shared, options)
    with _loading(f"{checkpoint.path!r}, which transformers can't load", "'organism', a local directory, a GGUF file or a hub id", NAME):
        config = AutoConfig.from_pretrained(checkpoint.base, **shared)
        multimodal = type(config) in AutoModelForImageTextToText._model_mapping  # type: ignore[operator]
        model_class, reader = (AutoModelForImageTextToText, AutoProcessor) if multimodal else (AutoModelForCausalLM, AutoTokenizer)
        hf = model_class.from_pretrained(checkpoint.path, **shared, **options).eval()
    if checkpoint.gguf:
        _forget_gguf(hf)
    if processor is None:
        with _loading(f"the weights of {checkpoint.path!r}, but not its processor", "a processor beside them", PROCESSOR):
            processor = reader.from_pretrained(checkpoint.base, **shared)
    return hf, processor


NAME = "correct the name; install missing packages; for a gated model, log in with `hf auth login`"
PROCESSOR = 'install "guardlens[vision]", which brings torchvision, if that is missing; or pass processor=...'
OPTIONS = "compare the options with those of from_pretrained, which gl.load passes them to"
FILES = "fetch the files again if one is damaged; if transformers loads it in some other way, pass the module: gl.load(hf, processor=...)"


@contextmanager
def _loading(found: str, expected: str, next_step: str) -> Iterator[None]:
    """Turn any error of transformers and the libraries below it into a ModelError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (OSError, ValueError, ImportError)) or next_step == PROCESSOR:
            raise ModelError(f"{found} ({_message(error)})", expected, next_step) from None
        step = OPTIONS if isinstance(error, TypeError) else FILES
        raise ModelError(f"{found} ({_message(error)})", expected, step) from error


def _message(error: Exception) -> str:
    """The first sentence of an error's message, behind the name of its class unless that is a common one."""
    sentence = first_sentence(error)
    return sentence if isinstance(error, (OSError, ValueError, ImportError, RuntimeError)) else f"{type(error).__name__}: {sentence}"


def _gguf_in(path: Path) -> str | None:
    """The GGUF file of a directory that has no other weights; None for any other path."""
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not files or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelError(f"{len(files)} GGUF files in {str(path)!r} ({names})", "one of them", f"name it: gl.load({str(files[0])!r})")
    return files[0].name


def _for_gguf(file: str, shared: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options with which transformers reads a GGUF file and unpacks its weights."""
    import transformers
    from transformers.utils.import_utils import is_accelerate_available, is_gguf_available

    if not (is_gguf_available() and is_accelerate_available()):
        raise ModelError(
            f"the GGUF file {file!r}, but not the packages that read it",
            "the packages gguf and accelerate",
            'pip install "guardlens[gguf]"',
        )
    unpacked = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    return {**shared, "gguf_file": file}, {**unpacked, **options}


def _forget_gguf(hf: Any) -> None:
    """Remove transformers' GGUF mark from a model with unpacked weights, which are ordinary ones: it can then be saved and adapted."""
    quantizer = getattr(hf, "hf_quantizer", None)
    if quantizer is not None and all(parameter.is_floating_point() for parameter in hf.parameters()):
        quantizer.remove_quantization_config(hf)


def _base_of_adapter(path: Path) -> str | None:
    """The base model of a directory that holds only a PEFT adapter; transformers loads it together with the adapter."""
    config = path / "adapter_config.json"
    if not config.is_file() or (path / "config.json").is_file():
        return None
    with _loading(f"{str(config)!r}, which can't be read", "the settings of a PEFT adapter", FILES):
        return json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
