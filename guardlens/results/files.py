"""Files: tensors with a JSON header (safetensors), atomic writes, provenance, and run directories that can be resumed. Never pickle."""

import errno
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from guardlens.errors import GuardlensError, StorageError, quoted, require_type

FORMAT = 2
"""Of saved files; one of another format is refused."""


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
        remove_leftovers(path.parent, re.escape(path.name))
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


def remove_leftovers(directory: Path, name: str) -> None:
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
