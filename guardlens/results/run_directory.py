"""Run directories: records of a long run that can be resumed, under a manifest and a lock."""

import errno
import json
import os
import socket
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from guardlens.errors import MismatchError, StorageError, require_type, warn
from guardlens.results.files import digest, encoded, reading, remove_leftovers, require_path, write_text, writing
from guardlens.results.provenance import Provenance

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
                remove_leftovers(self.path, r".+\.(?:json|partial)")
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
        >>> from guardlens.results.run_directory import first_difference
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
