"""Files: atomic writing, reading with clear errors, and tensors with a JSON header (safetensors). Pickle is never used."""

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
"""Version of the format of saved files; files of another version are refused."""


def digest(*parts: bytes | memoryview) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of these parts. It depends on where one part ends and the next begins."""
    sha = hashlib.sha256()
    for place, part in enumerate(parts):
        sha.update(b"\0" if place else b"")
        sha.update(part)
    return sha.hexdigest()[:12]


def bytes_of(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def encoded(value: Any, what: str, indent: int | None = None) -> str:
    """A value as JSON. Numbers of numpy are written as numbers.

    Args:
        value: The value.
        what: What the value is, for the error.
        indent: Indentation, as for `json.dumps`.

    Raises:
        StorageError: JSON can't represent the value.
    """

    def plain(part: Any) -> Any:
        if isinstance(part, np.generic):
            return part.item()
        raise TypeError(f"something of type {type(part).__name__}")

    try:
        return json.dumps(value, default=plain, indent=indent)
    except (TypeError, ValueError, RecursionError) as error:
        raise StorageError(
            f"{error} in {what}", "text, numbers, lists and dictionaries", "convert it, for example with .tolist()"
        ) from None


def require_path(path: Any) -> Path:
    """Check that a value is a path, and return it as one.

    Raises:
        StorageError: The value is empty, or no path.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text or any("\ud800" <= letter <= "\udbff" for letter in text):
        raise StorageError(f"the path {quoted(path)}", "the path of a file or directory", "pass one, such as 'runs/first'")
    return Path(path)


def require_writable(path: Any) -> Path:
    """Check, without creating it, that a directory exists or can be created, and return its path.

    Raises:
        StorageError: It can be neither written nor created.
    """
    path = require_path(path)
    nearest = next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))
    with writing(path):
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is not a directory")
        if not os.access(nearest, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of writing into errors that name the file and the reason.

    Raises:
        StorageError: The operating system reported an error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise StorageError(f"{path}, which can't be written ({why})", "a path that can be written to") from error


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn errors of reading and parsing into errors that name the file and the reason.

    Args:
        path: The file.
        what: What the file should contain.

    Raises:
        StorageError: The operating system or a parser reported an error, or the file's content makes no valid object.
    """
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, GuardlensError) as error:
        why = error.found if isinstance(error, GuardlensError) else f"{type(error).__name__}: {error}"
        raise StorageError(f"{path}, which can't be read ({why})", what) from error


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same directory, which replaces `path` at the end of the block unless an error is raised.

    Raises:
        StorageError: The file can't be written.
    """
    path = require_path(path)
    partial = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, re.escape(path.name))
        try:
            partial.touch()
            mode = partial.stat().st_mode  # follows the umask, unlike the files that safetensors makes
            yield partial
            partial.chmod(mode)
            partial.replace(path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:32]


def remove_leftovers(directory: Path, name: str) -> None:
    """Remove partial files that killed processes of this machine left behind. `name` is a regular expression for their targets."""
    for path in directory.glob(f".*.{_HOST}.*.partial"):
        found = re.fullmatch(rf"\.(?:{name})\.{_HOST}\.(\d+)\.partial", path.name)
        if found and not _alive(int(found[1])):
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere, signal 0 would not merely test for the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    with atomic(path) as partial:
        partial.write_bytes(text.encode())


def metadata_of(kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> dict[str, str]:
    """The metadata of a safetensors file of guardlens: its kind and header, with checksums of these and of the tensors."""
    sums = {name: checksum(tensor) for name, tensor in (tensors or {}).items()}
    text = encoded({"format": FORMAT, "kind": kind, "header": header, "tensors": sums}, f"the header of a file with {kind}")
    return {"guardlens": text, "digest": digest(text.encode())}


def checksum(tensor: Tensor) -> str:
    """A digest of the numbers, the dtype and the shape of a tensor."""
    return digest(str(tensor.dtype).encode(), repr(tuple(tensor.shape)).encode(), bytes_of(tensor))


def save_tensors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header to one safetensors file.

    Args:
        path: The file.
        kind: The kind of content, which is checked on loading.
        tensors: The tensors by name.
        header: Further data that JSON can represent.

    Raises:
        StorageError: The file can't be written, or the header is not JSON.
    """
    stored = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    described = metadata_of(kind, header, stored)
    with atomic(path) as partial:
        save_file(stored, partial, metadata=described)


def load_tensors(path: str | Path, kind: str, *, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file that `save_tensors` wrote. Tensors are memory-mapped, and read on first access.

    Args:
        path: The file.
        kind: The kind of content that is expected.
        verify: Whether to read all tensors and compare them with the checksums in the header.

    Raises:
        StorageError: The file can't be read, has another kind, or was changed since it was saved.
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
                "save it again with this version",
            )
        intact = described.get("digest") == digest(described["guardlens"].encode())
        if not intact or (verify and {name: checksum(tensor) for name, tensor in tensors.items()} != meta["tensors"]):
            raise StorageError(f"The file {path} was changed after it was saved.", "", "save it again, or copy it again")
        require_type(meta["header"], dict, StorageError, "save it again with this version")
        return tensors, meta["header"]


def in_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of memory-mapped tensors for computing: the alignment of a mapped file changes how products are rounded."""
    return {name: tensor.clone() for name, tensor in tensors.items()}
