"""Files: tensors with a JSON header (safetensors), atomic writes, provenance, and run directories that can be resumed. Never pickle."""

import datetime
import errno
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from guardlens.errors import GuardlensError, MismatchError, StorageError, quoted, require_type, warn

FORMAT = 2
"""Of saved files; one of another format is refused."""


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

    def __post_init__(self) -> None:
        for each in fields(self):
            require_type(getattr(self, each.name), Mapping if each.name == "versions" else str, StorageError, f"mend the {each.name}")


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


def require_related(what: str, of: Provenance, against: Provenance) -> None:
    """Refuse a result of one model beside that of another. A VLM and the LLM that was loaded beside it belong together.

    Raises:
        MismatchError: The fingerprints differ; the models are named.
    """
    one, other = ({model.rpartition("@")[2] for model in provenance.models} for provenance in (of, against))
    if not one & other:
        require_same_model(what, of.model, *against.models)


def digest(*parts: bytes | memoryview) -> str:
    """A short name for these bytes: 12 hexadecimal digits of SHA-256."""
    found = hashlib.sha256()
    for place, part in enumerate(parts):
        found.update(b"\0" if place else b"")
        found.update(part)
    return found.hexdigest()[:12]


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as they lie in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def encoded(value: Any, what: str, indent: int | None = None) -> str:
    """A value as JSON; numbers of numpy are numbers.

    Raises:
        StorageError: JSON can't hold it.
    """

    def plain(part: Any) -> Any:
        if isinstance(part, np.generic):
            return part.item()
        raise TypeError(f"something of type {type(part).__name__}")

    try:
        return json.dumps(value, default=plain, indent=indent)
    except (TypeError, ValueError, RecursionError) as error:
        raise StorageError(
            f"{error} in {what}", "what JSON can hold: text, numbers, lists and dictionaries", "convert it, as with .tolist()"
        ) from None


def require_path(path: Any) -> Path:
    """The path that somebody gave.

    Raises:
        StorageError: It is empty, or none.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text or any("\ud800" <= letter <= "\udbff" for letter in text):
        raise StorageError(f"the path {quoted(path)}", "the path of a file or directory", "give one, such as 'runs/first'")
    return Path(path)


def require_writable(path: Any) -> Path:
    """The path of a directory that is there or can be made, as far as can be told without making it.

    Raises:
        StorageError: It can't.
    """
    path = require_path(path)
    nearest = next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))
    with writing(path):
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is no directory")
        if not os.access(nearest, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of what can't be written what and why.

    Raises:
        StorageError: An error of the operating system.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise StorageError(
            f"{path}, which can't be written ({why})", "a place that can be written to", "choose another one, or make room there"
        ) from error


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Say of what can't be read, or doesn't hold what it should, what and why.

    Raises:
        StorageError: An error of the operating system, of a parser, or of making an object of what was read.
    """
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, GuardlensError) as error:
        why = error.found if isinstance(error, GuardlensError) else f"{type(error).__name__}: {error}"
        raise StorageError(f"{path}, which can't be read ({why})", what, "check the path, or save it anew") from error


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary sibling to write to; it takes the place of `path` when all went well, and never half of it.

    Raises:
        StorageError: It can't be written.
    """
    path = require_path(path)
    partial = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent, re.escape(path.name))
        try:
            partial.touch()
            mode = partial.stat().st_mode  # as the umask has it, which safetensors' own files are not
            yield partial
            partial.chmod(mode)
            partial.replace(path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:32]


def _remove_leftovers(directory: Path, name: str) -> None:
    """Remove what killed processes of this machine had begun to write. `name` is a regular expression."""
    for path in directory.glob(f".*.{_HOST}.*.partial"):
        found = re.fullmatch(rf"\.(?:{name})\.{_HOST}\.(\d+)\.partial", path.name)
        if found and not _alive(int(found[1])):
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is not a question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic(path) as partial:
        partial.write_bytes(text.encode())


def metadata_of(kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> dict[str, str]:
    """What a safetensors file of guardlens says about itself, with a checksum of that and of the tensors."""
    sums = {name: checksum(tensor) for name, tensor in (tensors or {}).items()}
    text = encoded({"format": FORMAT, "kind": kind, "header": header, "tensors": sums}, f"the header of a file of {kind}")
    return {"guardlens": text, "digest": digest(text.encode())}


def checksum(tensor: Tensor) -> str:
    """A short name for a tensor: for its numbers, dtype and shape."""
    return digest(str(tensor.dtype).encode(), repr(tuple(tensor.shape)).encode(), bytes_of(tensor))


def save_tensors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header to one safetensors file.

    Args:
        path: The file.
        kind: What it holds; checked on loading.
        tensors: By name.
        header: Anything that JSON can hold.

    Raises:
        StorageError: It can't be written, or the header isn't JSON.
    """
    stored = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    described = metadata_of(kind, header, stored)
    with atomic(path) as partial:
        save_file(stored, partial, metadata=described)


def load_tensors(path: str | Path, kind: str, *, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file that `save_tensors` wrote. Tensors are mapped into memory, and read when they are looked at.

    Args:
        path: The file.
        kind: What it must hold.
        verify: Read all tensors and compare them with the checksums in the header.

    Raises:
        StorageError: It can't be read, holds something else, or was changed since it was saved.
    """
    path = require_path(path)
    with reading(path, f"a safetensors file with {kind}"):
        with safe_open(path, framework="pt") as file:
            described = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        meta = json.loads(described.get("guardlens", "{}"))
        if meta.get("kind") != kind or meta.get("format") != FORMAT:
            raise StorageError(
                f"{path} with {meta.get('kind', 'no guardlens data')}, format {meta.get('format')}",
                f"{kind}, format {FORMAT}",
                "check the path, or save it anew with this version",
            )
        intact = described.get("digest") == digest(described["guardlens"].encode())
        if not intact or (verify and {name: checksum(tensor) for name, tensor in tensors.items()} != meta["tensors"]):
            raise StorageError(
                f"{path}, which was changed after it was saved", "the bytes that were saved", "save it anew, or copy it again"
            )
        require_type(meta["header"], dict, StorageError, "save it anew with this version")
        return tensors, meta["header"]


def in_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of mapped tensors, for what runs compute with: where a file lies in memory changes how products are rounded."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


MANIFEST, RECORDS, LOCK = "manifest.json", "records.jsonl", ".lock"
"""The files of every run directory."""

RUN = "run"
"""The entry of a record that says whose it is."""

UNLOCKABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of a directory in which no lock can be had: it can only be read, or its file system keeps no locks."""


class RunDirectory:
    """Records of a long run, appended as they come, under a manifest that says how they were made.

    Opening a directory that another configuration made is refused; opening the same one again resumes. A directory is open in one process
    at a time: until `close`, the end of a `with` block, or the end of the process, however it ends. (The operating system keeps the lock.
    On network file systems it holds between machines only where the server keeps locks.)

    Args:
        path: The directory.
        configuration: What the records depend on, nested as the caller likes. Differences are looked for in its order.
        provenance: Whose they are; the manifest says it, and it isn't compared.

    Raises:
        MismatchError: The manifest differs; the first difference is named.
        StorageError: It is open elsewhere, can't be written, or its manifest can't be read or is gone.
    """

    def __init__(self, path: str | Path, configuration: Mapping[str, Any], provenance: Provenance | None = None) -> None:
        self.path = require_path(path)
        self._file = self.path / RECORDS
        with writing(self.path):
            self._lock = locked(self.path)
            try:
                _remove_leftovers(self.path, r".+\.(?:json|partial)")
                self._open(json.loads(encoded(configuration, "the configuration")), provenance or Provenance())
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes open it."""
        self._lock.release()

    def _open(self, wanted: dict[str, Any], provenance: Provenance) -> None:
        manifest = self.path / MANIFEST
        if manifest.exists():
            with reading(manifest, "the manifest of a run"):
                old = json.loads(manifest.read_bytes())["configuration"]
                require_type(old, dict, StorageError, f"give another directory, or mend {manifest}")
            return self._compare(old, wanted)
        orphans = [path.name for path in (self._file, *self.path.glob("states.*")) if path.exists() and path.stat().st_size]
        if orphans:
            raise StorageError(
                f"{self.path} with {' and '.join(orphans)} and without {MANIFEST}",
                "a manifest that says how they were made",
                "restore it, or give another directory",
            )
        write_text(manifest, encoded({"configuration": wanted, "provenance": asdict(provenance)}, "the manifest", indent=1))

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        if found := first_difference(old, new):
            key, was, now = found
            raise MismatchError(
                f"the results directory {self.path}, made with {key} = {was}",
                f"{key} = {now}",
                "give another directory, or the old configuration to resume it",
            )

    def records(self, key: Callable[[dict[str, Any]], Hashable] = json.dumps) -> list[dict[str, Any]]:
        """All whole records so far (see `records_in`)."""
        return records_in(self.path, key)

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add records and make sure that they are on disk.

        Raises:
            StorageError: They can't be written.
        """
        run = run_of(self.path)
        lines = "".join(encoded({**record, RUN: run}, "a record") + "\n" for record in records).encode()
        with writing(self._file), self._file.open("a+b") as stream:
            self._drop_cut_line(stream)
            stream.write(lines)
            stream.flush()
            os.fsync(stream.fileno())

    def forget(self) -> None:
        """Drop all records."""
        with writing(self._file):
            self._file.unlink(missing_ok=True)

    @staticmethod
    def _drop_cut_line(stream: BinaryIO) -> None:
        """Undo what a kill left half-written at the end."""
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        if size and stream.read(1) != b"\n":
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)


def records_in(directory: Path, key: Callable[[dict[str, Any]], Hashable] = json.dumps) -> list[dict[str, Any]]:
    """All whole records of a run directory. A last line that was cut off by a kill is dropped.

    Args:
        directory: The directory.
        key: What a record is of: the first record of each key counts. None, or an error, where a record is none of this run's.

    Warns:
        UserWarning: Lines that can't be read, or aren't of this run. They are left out, so that they are made again.
    """
    file = directory / RECORDS
    with reading(file, "the records of a run"):
        whole = file.read_bytes().rpartition(b"\n")[0] if file.exists() else b""
    lines, run = [line for line in whole.split(b"\n") if line.strip()], run_of(directory)
    found = [each for line in lines for each in _keyed(line, key, run)]
    if lost := len(lines) - len(found):
        warn(f"{lost} of {len(lines)} records in {file} can't be read or aren't of this run; they are made again")
    first: dict[Hashable, dict[str, Any]] = {}
    for name, record in found:
        first.setdefault(name, record)
    return [*first.values()]


def run_of(directory: Path) -> str:
    """What stands for a directory's configuration in its records and states, so that those of another one are known; empty without any."""
    manifest = directory / MANIFEST
    if not manifest.exists():
        return ""
    with reading(manifest, "the manifest of a run"):
        return digest(json.dumps(json.loads(manifest.read_bytes())["configuration"], sort_keys=True).encode())


def _keyed(line: bytes, key: Callable[[dict[str, Any]], Hashable], run: str) -> Iterator[tuple[Hashable, dict[str, Any]]]:
    """The record of a line with its key, if it is one of this run."""
    with suppress(ValueError, RecursionError, LookupError, TypeError):
        record = json.loads(line.decode())
        if isinstance(record, dict) and run in ("", record.pop(RUN, run)) and (name := key(record)) is not None:
            record.pop(RUN, None)
            hash(name)
            yield name, record


def locked(directory: Path) -> FileLock:
    """A lock on a directory, which is made if it isn't there. It is let go by `release`, or at the end of a `with` block.

    Raises:
        StorageError: Another process has it, or the directory can't be written.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        return _lock(directory)


def _lock(directory: Path) -> FileLock:
    lock = FileLock(directory / LOCK, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise StorageError(
            f"{directory}, which {_holder(directory)} has open", "one process at a time", "wait for it to end, or give another directory"
        ) from None
    except OSError as error:
        if error.errno not in UNLOCKABLE or not (directory / MANIFEST).exists():
            raise
        warn(f"{directory} can't be locked ({error.strerror}): see to it that no other process writes there")
        return lock
    with suppress(OSError):  # what says who has it is a courtesy
        (directory / LOCK).write_text(_this_process())
    return lock


def _holder(directory: Path) -> str:
    with suppress(OSError, ValueError):
        found = (directory / LOCK).read_text().strip()
        return "this very process" if found == _this_process() else found or "another process"
    return "another process"


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


SHOWN = 80
"""Characters of a value that a message shows."""


def first_difference(old: Any, new: Any, of: str = "") -> tuple[str, str, str] | None:
    """Where two values of JSON differ first, in the order of the second: the place (`model.config.layers[2]`), and both values, shortened.

    Examples:
        >>> from guardlens.results.files import first_difference
        >>> first_difference({"model": {"id": "a", "dtype": "float32"}}, {"model": {"id": "a", "dtype": "bfloat16"}})
        ('model.dtype', '"float32"', '"bfloat16"')
    """
    was, now = json.dumps(old), json.dumps(new)
    if isinstance(old, dict) and isinstance(new, dict):
        places = [(f"{of}.{key}" if of else key, old.get(key), new.get(key)) for key in {**new, **old}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and len(was) > SHOWN:
        places = [(f"{of}[{i}]", before, after) for i, (before, after) in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new or was == now else (of, *_excerpts(was, now))
    return next((found for place, before, after in places if (found := first_difference(before, after, place))), None)


def _excerpts(was: str, now: str) -> tuple[str, str]:
    """Both texts from shortly before the place at which they part, where they are long."""
    if max(len(was), len(now)) <= SHOWN:
        return was, now
    alike = next((i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
    start = max(0, alike - SHOWN // 4)

    def excerpt(text: str) -> str:
        return f"{'...' if start else ''}{text[start : start + SHOWN]}{'...' if len(text) > start + SHOWN else ''}"

    return excerpt(was), excerpt(now)
