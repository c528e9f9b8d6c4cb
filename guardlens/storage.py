"""Files: tensors with a JSON header (safetensors), atomic writes, provenance, and run directories that can be resumed. Never pickle."""

import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from guardlens.errors import MismatchError, StorageError

FORMAT = 1


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("guardlens", "torch", "transformers", "nnsight")}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Provenance:
    """Where a result comes from.

    Attributes:
        model: Name and fingerprint, `"organism@1f0c9a…"`; results of different fingerprints don't mix.
        template: Hash of the chat template that made the prompts.
        revision: The hub's revision, where there is one.
        versions: Package versions.
        date: When, in UTC.
        llm: Name and fingerprint of the LLM beside the model, where another one than its own was given.
    """

    model: str = ""
    template: str = ""
    revision: str = ""
    versions: Mapping[str, str] = field(default_factory=_versions)
    date: str = field(default_factory=_now)
    llm: str = ""

    @property
    def models(self) -> tuple[str, ...]:
        """The model, and the LLM beside it if that is another one: directions of either belong to the result."""
        return (self.model, self.llm) if self.llm else (self.model,)


def require_same_model(what: str, of: str, *against: str) -> None:
    """Refuse results of another model than those in `against`. An empty name belongs to every model.

    Raises:
        MismatchError: The fingerprints differ; the models are named.
    """
    if of and all(against) and of.rpartition("@")[2] not in {name.rpartition("@")[2] for name in against}:
        expected = " or ".join(dict.fromkeys(against))
        namesake = of.rpartition("@")[0] in {name.rpartition("@")[0] for name in against}
        again = "; one name and other numbers: are these the same weights in another dtype?" if namesake else ""
        raise MismatchError(
            f"{what} of the model {of}", f"those of {expected}", f"collect activations with this model and make them anew{again}"
        )


def digest(*parts: bytes) -> str:
    """A short name for these bytes: 12 hexadecimal digits of SHA-256."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary sibling to write to; it takes the place of `path` when all went well, and never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as the umask has it, which safetensors' own files are not
        yield partial
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def metadata_of(kind: str, header: Mapping[str, Any]) -> dict[str, str]:
    """What a safetensors file of guardlens says about itself."""
    return {"guardlens": json.dumps({"format": FORMAT, "kind": kind, "header": header})}


def save_tensors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header to one safetensors file.

    Args:
        path: The file.
        kind: What it holds; checked on loading.
        tensors: By name.
        header: Anything that JSON can hold.
    """
    from safetensors.torch import save_file

    with atomic(path) as partial:
        save_file(
            {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
            partial,
            metadata=metadata_of(kind, header),
        )


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file that `save_tensors` wrote. Tensors are mapped into memory, and read when they are looked at.

    Raises:
        StorageError: It can't be read, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("guardlens", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}, which can't be read ({error})", f"a safetensors file with {kind}", "check the path") from None
    if meta.get("kind") != kind or meta.get("format") != FORMAT:
        raise StorageError(
            f"{path} with {meta.get('kind', 'no guardlens data')}, format {meta.get('format')}",
            f"{kind}, format {FORMAT}",
            "check the path",
        )
    return tensors, meta["header"]


class RunDirectory:
    """Records of a long run, appended as they come, under a manifest that says how they were made.

    Opening a directory that another configuration made is refused; opening the same one again resumes.

    Args:
        path: The directory.
        configuration: What the records depend on, nested as the caller likes. Differences are looked for in its order.
        provenance: Whose they are; the manifest says it, and it isn't compared.

    Raises:
        MismatchError: The manifest differs; the first difference is named.
    """

    def __init__(self, path: str | Path, configuration: Mapping[str, Any], provenance: Provenance | None = None) -> None:
        self.path = Path(path)
        self._file = self.path / "records.jsonl"
        self.path.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps(configuration))
        manifest = self.path / "manifest.json"
        if manifest.exists():
            self._compare(json.loads(manifest.read_text(encoding="utf-8"))["configuration"], wanted)
        else:
            write_text(manifest, json.dumps({"configuration": wanted, "provenance": asdict(provenance or Provenance())}, indent=1))

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        if found := first_difference(old, new):
            key, was, now = found
            raise MismatchError(
                f"the results directory {self.path}, made with {key} = {was}",
                f"{key} = {now}",
                "give another directory, or the old configuration to resume it",
            )

    def records(self) -> list[dict[str, Any]]:
        """All whole records so far. A last line that was cut off by a kill is dropped."""
        if not self._file.exists():
            return []
        whole = self._file.read_bytes().rpartition(b"\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add records and make sure that they are on disk."""
        with self._file.open("a+b") as stream:
            self._drop_cut_line(stream)
            stream.write("".join(json.dumps(record) + "\n" for record in records).encode())
            stream.flush()
            os.fsync(stream.fileno())

    def forget(self) -> None:
        """Drop all records."""
        self._file.unlink(missing_ok=True)

    @staticmethod
    def _drop_cut_line(stream: BinaryIO) -> None:
        """Undo what a kill left half-written at the end."""
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        if size and stream.read(1) != b"\n":
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)


SHOWN = 80
"""Characters of a value that a message shows."""


def first_difference(old: Any, new: Any, of: str = "") -> tuple[str, str, str] | None:
    """Where two values of JSON differ first, in the order of the second: the place (`model.config.layers[2]`), and both values, shortened.

    Examples:
        >>> from guardlens.storage import first_difference
        >>> first_difference({"model": {"id": "a", "dtype": "float32"}}, {"model": {"id": "a", "dtype": "bfloat16"}})
        ('model.dtype', '"float32"', '"bfloat16"')
    """
    was, now = json.dumps(old), json.dumps(new)
    if isinstance(old, dict) and isinstance(new, dict):
        places = [(f"{of}.{key}" if of else key, old.get(key), new.get(key)) for key in {**new, **old}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and len(was) > SHOWN:
        places = [(f"{of}[{i}]", *both) for i, both in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new or was == now else (of, *_excerpts(was, now))
    return next((found for place, *both in places if (found := first_difference(*both, place))), None)


def _excerpts(was: str, now: str) -> tuple[str, str]:
    """Both texts from shortly before the place at which they part, where they are long."""
    if max(len(was), len(now)) <= SHOWN:
        return was, now
    alike = next((i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
    start = max(0, alike - SHOWN // 4)

    def excerpt(text: str) -> str:
        return f"{'...' if start else ''}{text[start : start + SHOWN]}{'...' if len(text) > start + SHOWN else ''}"

    return excerpt(was), excerpt(now)
