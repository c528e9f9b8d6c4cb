"""Whose numbers are these? All that a model computes with, as facts that can be compared one by one, and a fingerprint of them."""

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
"""64-bit words that are summed up together; a tensor of fewer values is hashed as it is."""

PART, PART_ON_GPU = 2**18, 2**24
"""Values of a tensor that are looked at at once: as many as a cache holds."""

WITHOUT_EFFECT = {
    *("transformers_version", "_name_or_path", "_model_name_or_path", "name_or_path", "architectures", "dtype", "torch_dtype"),
    *("use_cache", "output_hidden_states", "output_attentions", "return_dict", "id2label", "label2id", "problem_type"),
    *("initializer_range", "initializer_factor", "pad_token_id", "bos_token_id", "eos_token_id"),
}
"""Entries of a config that change no state of a prompt."""

PASSING = {"max_seq_len_cached", "compute_type_is_set", "training", "gradient_checkpointing", "loss_type"} | WITHOUT_EFFECT
"""Attributes of modules that change as they run, or that change no state."""


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a model looked like when its fingerprint was made.

    Attributes:
        tensors: Its weights.
        marks: By which they, the config and the adapters are known to be the same.
        hashes: Of each weight, by its name.
        fingerprint: Of all.
    """

    tensors: list[Any]
    marks: Any
    hashes: dict[str, str]
    fingerprint: str


_SEEN: "WeakKeyDictionary[nn.Module, _Seen]" = WeakKeyDictionary()


def fingerprint(hf: nn.Module) -> str:
    """A digest of everything that the model computes with; other weights, another config or another adapter give another one.

    Weights that are equal as numbers are equal here, in whatever precision and on whatever device. Each is hashed once, and again when its
    storage or its version says that it was written to. What bypasses that (a write through `.data` or to an inference tensor) is seen by
    `facts(hf, anew=True)`, and by the fingerprint from then on.
    """
    tensors, seen = dict(_tensors(hf)), _SEEN.get(hf)
    if seen is not None and seen.marks == _marks(hf, tensors) and all(map(_is, seen.tensors, tensors.values())):
        return seen.fingerprint
    facts(hf)
    return _SEEN[hf].fingerprint


def facts(hf: nn.Module, *, anew: bool = False) -> dict[str, Any]:
    """What the model computes with: hashes of its weights, its config, the numbers in its modules, and the state of its adapters.

    Args:
        hf: The model.
        anew: Hash every weight again, which costs a pass over all of them.
    """
    tensors, seen = dict(_tensors(hf)), None if anew else _SEEN.get(hf)
    marks, kept = _marks(hf, tensors), _unchanged(seen, tensors)
    hashes = {name: kept.get(name) or _hash(hf, name, tensor) for name, tensor in tensors.items()}
    weights = digest(*(f"{name} {hashed}".encode() for name, hashed in sorted(hashes.items())))
    found = {"weights": weights, "config": _effective(_config_of(hf)), "constants": constants(hf), "adapters": _adapters(hf)}
    _SEEN[hf] = _Seen([ref(t) for t in tensors.values()], marks, hashes, digest(json.dumps(found, sort_keys=True).encode()))
    return found


def _tensors(hf: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters, and the buffers that are saved with them."""
    for path, module in hf.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}", tensor


def _marks(hf: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """What is cheap to look at, and differs where something was written to."""
    return {name: _mark(tensor) for name, tensor in tensors.items()}, _config_of(hf), _adapters(hf)


def _mark(tensor: Tensor) -> Any:
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version  # inference tensors don't count their versions


def _unchanged(seen: _Seen | None, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The hashes of the weights that are as they were."""
    if seen is None:
        return {}
    before = dict(zip(seen.hashes, seen.tensors, strict=True))
    same = {name for name, tensor in tensors.items() if name in before and _is(before[name], tensor)}
    return {name: seen.hashes[name] for name in same if seen.marks[0][name] == _mark(tensors[name])}


def _is(kept: Any, tensor: Tensor) -> bool:
    return kept() is tensor


def _hash(hf: nn.Module, name: str, tensor: Tensor) -> str:
    values = _offloaded(hf, name) if tensor.is_meta else tensor.detach()
    found = hashlib.sha256(f"{tuple(tensor.shape)}".encode())
    for part in (values, *_beside(tensor)):
        found.update(_summed(part.flatten()))
    return found.hexdigest()[:16]


def _beside(tensor: Any) -> Iterator[Tensor]:
    """The numbers that a quantised parameter is scaled by, which are none of the model's own tensors (bitsandbytes, 4 and 8 bits)."""
    if state := getattr(tensor, "quant_state", None):
        yield from (part for _, part in sorted(state.as_dict(packed=True).items()))
    if (scale := getattr(tensor, "SCB", None)) is not None:
        yield scale


def _offloaded(hf: nn.Module, name: str) -> Tensor:
    """A parameter that accelerate keeps in memory or on disk until its module runs; nothing of one that has no values at all."""
    owner, _, own = name.rpartition(".")
    kept = getattr(getattr(hf.get_submodule(owner), "_hf_hook", None), "weights_map", None)
    return torch.empty(0) if kept is None else kept[own]


def _summed(values: Tensor) -> bytes:
    """All values of a flat tensor: their bytes, or sums over stretches of them, in which every single change shows.

    Each word is multiplied by an odd number of its place, and its upper half once more alone, modulo 2^64. So sums are the same on every
    device, and one pass at the speed of memory makes them.
    """
    if values.numel() <= WORDS:
        return _bytes(values).cpu().numpy().tobytes()
    sums = [_sums(_bytes(part)) for part in values.split(PART_ON_GPU if values.is_cuda else PART)]
    return torch.cat(sums).cpu().numpy().tobytes()


def _sums(values: UInt8[Tensor, "byte"]) -> Int[Tensor, "sum"]:
    words = nn.functional.pad(values, (0, -len(values) % 8)).view(torch.int64)
    whole = len(words) // WORDS * WORDS
    rows = [words[:whole].view(-1, WORDS), words[whole:][None]]
    odd = _odd(words.device)
    return torch.cat([(half * odd[: row.shape[1]]).sum(1) for row in rows for half in (row, row >> 32)])


def _bytes(values: Tensor) -> UInt8[Tensor, "byte"]:
    """The bytes of values, of half-precision ones as single precision has them."""
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
    """A config without what changes no state, as JSON has it."""
    if isinstance(config, dict):
        return {str(key): _effective(value) for key, value in sorted(config.items(), key=str) if key not in WITHOUT_EFFECT}
    if isinstance(config, list | tuple):
        return [_effective(value) for value in config]
    return config if config is None or isinstance(config, bool | int | float | str) else str(config)


def constants(hf: nn.Module) -> str:
    """A digest of what modules are (which activation), and of what they keep as plain attributes: the epsilon of a norm, the scale of an
    attention, whether it is causal.
    """
    found = []
    for path, module in hf.named_modules():
        plain = {name: value for name, value in vars(module).items() if _is_plain(value) and name[0] != "_" and name not in PASSING}
        found.append(f"{path}: {type(module).__qualname__} {_effective(plain)}")
    return digest(*(each.encode() for each in found))


def _is_plain(value: Any) -> bool:
    return type(value) in (int, float, bool, str) or (type(value) in (list, tuple) and all(map(_is_plain, value)))


def _adapters(hf: nn.Module) -> list[str]:
    """What PEFT's layers say of themselves: which adapters are active, whether they are off, merged, and how strong they are."""
    said = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    layers = [module for module in hf.modules() if isinstance(getattr(type(module), "disable_adapters", None), property)]
    states = [", ".join(f"{name}={getattr(layer, name, None)}" for name in said) for layer in layers]
    return [f"{states.count(state)} layers: {state}" for state in sorted(set(states))] + (
        [digest(*map(str.encode, states))] if states else []
    )
