"""Everything that a model computes with, as facts that can be compared one by one, and a fingerprint of these facts."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from guardlens.results.files import digest

WORDS = 2**16
"""Number of 64-bit words per summation block. A tensor of no more values is hashed directly."""

CHUNK = 2**18
"""Values of a tensor that are processed at once on a CPU: as many as its cache holds."""

CHUNK_ON_GPU = 2**24
"""Values of a tensor that are processed at once on a GPU."""

WITHOUT_EFFECT = {
    "_model_name_or_path",
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "label2id",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Entries of a config that do not change a prompt's hidden states."""

TRANSIENT = {"max_seq_len_cached", "compute_type_is_set", "training", "gradient_checkpointing", "loss_type"} | WITHOUT_EFFECT
"""Attributes of modules that change while a model runs, or that do not change a prompt's hidden states."""

SCALARS = (int, float, bool, str)
"""The types of plain attributes of a module, beside lists and tuples of them."""


@dataclass(frozen=True, eq=False)
class _Snapshot:
    """A model as it was when its fingerprint was computed.

    Attributes:
        tensors: Weak references to its weights.
        marks: Cheap signs of change: they differ if a weight, the config or an adapter has changed.
        hashes: The name of each weight -> its hash.
        fingerprint: The model's fingerprint.
    """

    tensors: list[Any]
    marks: Any
    hashes: dict[str, str]
    fingerprint: str


_SNAPSHOTS: WeakKeyDictionary[nn.Module, _Snapshot] = WeakKeyDictionary()


def fingerprint(hf: nn.Module) -> str:
    """Return a digest of everything that the model computes with: it changes with the weights, the config and the adapters.

    Weights count as numbers, whatever their precision and device. Each weight is hashed once, and again when its storage or its version
    shows that it was written to. Writes that leave no such trace (through `.data`, or to an inference tensor) are noticed only by
    `facts(hf, anew=True)`, and by the fingerprint from then on.
    """
    tensors = dict(_tensors(hf))
    before = _SNAPSHOTS.get(hf)
    if before is not None and before.marks == _marks(hf, tensors):
        if all(reference() is tensor for reference, tensor in zip(before.tensors, tensors.values(), strict=True)):
            return before.fingerprint
    facts(hf)
    return _SNAPSHOTS[hf].fingerprint


def facts(hf: nn.Module, *, anew: bool = False) -> dict[str, Any]:
    """Return what the model computes with: a hash of its weights, its config, the numbers in its modules and the state of its adapters.

    Args:
        hf: The model.
        anew: Hash every weight again, which costs a pass over all of them.
    """
    tensors = dict(_tensors(hf))
    marks = _marks(hf, tensors)
    known = {} if anew else _unchanged(_SNAPSHOTS.get(hf), tensors, marks)
    hashes = {name: known.get(name) or _hash(hf, name, tensor) for name, tensor in tensors.items()}
    weights = digest(*(f"{name} {hashed}".encode() for name, hashed in sorted(hashes.items())))
    found = {"weights": weights, "config": _effective(_config_of(hf)), "constants": constants(hf), "adapters": _adapters(hf)}
    whole = digest(json.dumps(found, sort_keys=True).encode())
    _SNAPSHOTS[hf] = _Snapshot([ref(tensor) for tensor in tensors.values()], marks, hashes, whole)
    return found


def _tensors(hf: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of all parameters and of the buffers that are saved with them."""
    for path, module in hf.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}", tensor


def _marks(hf: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """Signs of change that cost no pass over the weights."""
    # Inference tensors do not count their versions.
    written = {name: (each.data_ptr(), None if each.is_inference() else each._version) for name, each in tensors.items()}
    return written, _config_of(hf), _adapters(hf)


def _unchanged(before: _Snapshot | None, tensors: Mapping[str, Tensor], marks: Any) -> dict[str, str]:
    """The hashes of the weights that have not changed since the snapshot."""
    if before is None:
        return {}
    references = dict(zip(before.hashes, before.tensors, strict=True))
    same = {name for name, tensor in tensors.items() if name in references and references[name]() is tensor}
    return {name: before.hashes[name] for name in same if before.marks[0][name] == marks[0][name]}


def _hash(hf: nn.Module, name: str, tensor: Tensor) -> str:
    values = _offloaded(hf, name) if tensor.is_meta else tensor.detach()
    found = hashlib.sha256(f"{tuple(tensor.shape)}".encode())
    for part in (values, *_beside(tensor)):
        found.update(_summed(part.flatten()))
    return found.hexdigest()[:16]


def _beside(tensor: Any) -> Iterator[Tensor]:
    """The scales of a quantised parameter, which are not among the model's own tensors (bitsandbytes, 4 and 8 bits)."""
    if state := getattr(tensor, "quant_state", None):
        yield from (part for _, part in sorted(state.as_dict(packed=True).items()))
    if (scale := getattr(tensor, "SCB", None)) is not None:
        yield scale


def _offloaded(hf: nn.Module, name: str) -> Tensor:
    """A parameter that accelerate keeps in memory or on disk until its module runs; empty if the parameter has no values at all."""
    owner, _, own = name.rpartition(".")
    offloaded = getattr(getattr(hf.get_submodule(owner), "_hf_hook", None), "weights_map", None)
    return torch.empty(0) if offloaded is None else offloaded[own]


def _summed(values: Tensor) -> bytes:
    """Return the bytes of a flat tensor or, if it is large, sums over blocks of words that any single change of a value alters.

    Each word is multiplied by an odd number that belongs to its position, and its upper half is multiplied once more on its own, modulo
    2^64. The sums are the same on every device and need one pass at the speed of memory.
    """
    if values.numel() <= WORDS:
        return _bytes(values).cpu().numpy().tobytes()
    sums = [_sums(_bytes(part)) for part in values.split(CHUNK_ON_GPU if values.is_cuda else CHUNK)]
    return torch.cat(sums).cpu().numpy().tobytes()


def _sums(values: UInt8[Tensor, "byte"]) -> Int[Tensor, "sum"]:
    words = nn.functional.pad(values, (0, -len(values) % 8)).view(torch.int64)
    whole = len(words) // WORDS * WORDS
    rows = [words[:whole].view(-1, WORDS), words[whole:][None]]
    odd = _odd(words.device)
    return torch.cat([(half * odd[: row.shape[1]]).sum(1) for row in rows for half in (row, row >> 32)])


def _bytes(values: Tensor) -> UInt8[Tensor, "byte"]:
    """The bytes of the values; half precision is converted to single precision first."""
    exact = values.float() if values.is_floating_point() and values.element_size() < 4 else values
    return exact.contiguous().view(torch.uint8)


@lru_cache(maxsize=8)
def _odd(device: torch.device) -> Int[Tensor, "word"]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**63), 2**63 - 1, (WORDS,), generator=generator) | 1).to(device)


def _config_of(hf: nn.Module) -> dict[str, Any]:
    config: Any = getattr(hf, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else {}


def _effective(config: Any) -> Any:
    """A config as JSON, without the entries that have no effect on hidden states."""
    if isinstance(config, dict):
        return {str(key): _effective(value) for key, value in sorted(config.items(), key=str) if key not in WITHOUT_EFFECT}
    if isinstance(config, list | tuple):
        return [_effective(value) for value in config]
    return config if config is None or isinstance(config, bool | int | float | str) else str(config)


def constants(hf: nn.Module) -> str:
    """Return a digest of the modules' classes (which activation?) and of their plain attributes.

    Such attributes are the epsilon of a norm, the scale of an attention, or whether it is causal.
    """
    found = []
    for path, module in hf.named_modules():
        own = {name: value for name, value in vars(module).items() if name[0] != "_" and name not in TRANSIENT}
        plain = {name: value for name, value in own.items() if type(value) in SCALARS or _is_plain_sequence(value)}
        found.append(f"{path}: {type(module).__qualname__} {_effective(plain)}")
    return digest(*(each.encode() for each in found))


def _is_plain_sequence(value: Any) -> bool:
    return type(value) in (list, tuple) and all(type(each) in SCALARS or _is_plain_sequence(each) for each in value)


def _adapters(hf: nn.Module) -> list[str]:
    """The state of PEFT's layers: which adapters are active, whether they are disabled or merged, and how strong they are."""
    properties = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    layers = [module for module in hf.modules() if isinstance(getattr(type(module), "disable_adapters", None), property)]
    states = [", ".join(f"{name}={getattr(layer, name, None)}" for name in properties) for layer in layers]
    if not states:
        return []
    counts = [f"{states.count(state)} layers: {state}" for state in sorted(set(states))]
    return [*counts, digest(*map(str.encode, states))]
