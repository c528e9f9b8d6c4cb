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

MANIFEST = "manifest.json"
RECORDS = "records.jsonl"
LOCK = ".lock"
"""The files of every run directory."""

RUN = "run"
"""The key of a record under which the digest of its run's configuration stands."""

UNLOCKABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of directories that can't be locked, because they are read-only or their file system has no locks."""


class RunDirectory:
    """Records of a long run, which are appended one batch at a time, under a manifest that says how they were made.

    Opening a directory again with the same configuration resumes the run; another configuration is refused. A directory is open in one
    process at a time: until `close`, the end of a `with` block, or the end of the process, even if it is killed. The operating system
    holds the lock; on network file systems it works between machines only if the server supports locks.

    Args:
        path: The directory.
        configuration: Everything that the records depend on, in any nesting. The first difference in its order is reported.
        provenance: Where the records come from. It is written to the manifest, but not compared.

    Raises:
        MismatchError: The manifest has another configuration; the first difference is named.
        StorageError: The directory is open elsewhere or can't be written, or its manifest is missing or can't be read.
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
        """Release the lock, so that other processes can open the directory."""
        self._lock.release()

    def _open(self, wanted: dict[str, Any], provenance: Provenance) -> None:
        manifest = self.path / MANIFEST
        if manifest.exists():
            with reading(manifest, "the manifest of a run"):
                old = json.loads(manifest.read_bytes())["configuration"]
                require_type(old, dict, StorageError, f"use another directory, or repair {manifest}")
            return self._compare(old, wanted)
        orphans = [path.name for path in (self._file, *self.path.glob("states.*")) if path.exists() and path.stat().st_size]
        if orphans:
            raise StorageError(
                f"{self.path} with {' and '.join(orphans)} and without {MANIFEST}",
                "a manifest that says how they were made",
                "restore the manifest, or use another directory",
            )
        write_text(manifest, encoded({"configuration": wanted, "provenance": asdict(provenance)}, "the manifest", indent=1))

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        difference = first_difference(old, new)
        if difference:
            key, was, now = difference
            raise MismatchError(
                f"the results directory {self.path}, made with {key} = {was}",
                f"{key} = {now}",
                "use another directory, or repeat the old configuration to resume",
            )

    def records(self, key: Callable[[dict[str, Any]], Hashable] = json.dumps) -> list[dict[str, Any]]:
        """All complete records so far (see `records_in`)."""
        return records_in(self.path, key)

    def append(self, records: list[dict[str, Any]]) -> None:
        """Append records and wait until they are on disk.

        Raises:
            StorageError: The records can't be written.
        """
        run = run_of(self.path)
        lines = "".join(encoded({**record, RUN: run}, "a record") + "\n" for record in records).encode()
        with writing(self._file), self._file.open("a+b") as stream:
            self._drop_cut_line(stream)
            stream.write(lines)
            stream.flush()
            os.fsync(stream.fileno())

    def forget(self) -> None:
        """Delete all records."""
        with writing(self._file):
            self._file.unlink(missing_ok=True)

    @staticmethod
    def _drop_cut_line(stream: BinaryIO) -> None:
        """Remove the incomplete last line that a killed process left."""
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        if size and stream.read(1) != b"\n":
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)


def records_in(directory: Path, key: Callable[[dict[str, Any]], Hashable] = json.dumps) -> list[dict[str, Any]]:
    """All complete records of a run directory. An incomplete last line, which a killed process left, is dropped.

    Args:
        directory: The directory.
        key: Identifies a record; of several records with one key the first counts. It returns None, or raises an error, for a record that
            does not belong to this run.

    Warns:
        UserWarning: Lines can't be read or belong to another run. They are left out, so their records are made again.
    """
    file = directory / RECORDS
    with reading(file, "the records of a run"):
        whole = file.read_bytes().rpartition(b"\n")[0] if file.exists() else b""
    lines = [line for line in whole.split(b"\n") if line.strip()]
    run = run_of(directory)
    usable = [each for line in lines for each in _keyed(line, key, run)]
    if lost := len(lines) - len(usable):
        warn(f"{lost} of {len(lines)} records in {file} can't be read or aren't of this run; they are made again")
    first: dict[Hashable, dict[str, Any]] = {}
    for name, record in usable:
        first.setdefault(name, record)
    return [*first.values()]


def run_of(directory: Path) -> str:
    """The digest of a directory's configuration, which marks its records and states as its own; empty if there is no manifest."""
    manifest = directory / MANIFEST
    if not manifest.exists():
        return ""
    with reading(manifest, "the manifest of a run"):
        return digest(json.dumps(json.loads(manifest.read_bytes())["configuration"], sort_keys=True).encode())


def _keyed(line: bytes, key: Callable[[dict[str, Any]], Hashable], run: str) -> Iterator[tuple[Hashable, dict[str, Any]]]:
    """The record in a line with its key, or nothing if it does not belong to this run."""
    with suppress(ValueError, RecursionError, LookupError, TypeError):
        record = json.loads(line.decode())
        if isinstance(record, dict) and run in ("", record.pop(RUN, run)) and (name := key(record)) is not None:
            record.pop(RUN, None)
            hash(name)
            yield name, record


def locked(directory: Path) -> FileLock:
    """Lock a directory, which is created if needed, until `release` or the end of a `with` block.

    Raises:
        StorageError: Another process holds the lock, or the directory can't be written.
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
            f"{directory}, which {_holder(directory)} has open", "one process at a time", "wait for it to end, or use another directory"
        ) from None
    except OSError as error:
        if error.errno not in UNLOCKABLE or not (directory / MANIFEST).exists():
            raise
        warn(f"{directory} can't be locked ({error.strerror}): make sure that no other process writes there")
        return lock
    with suppress(OSError):  # the name of the holder is a courtesy
        (directory / LOCK).write_text(_this_process())
    return lock


def _holder(directory: Path) -> str:
    with suppress(OSError, ValueError):
        holder = (directory / LOCK).read_text().strip()
        return "this very process" if holder == _this_process() else holder or "another process"
    return "another process"


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


EXCERPT = 80
"""The number of characters of a value that an error shows."""


def first_difference(old: Any, new: Any, of: str = "") -> tuple[str, str, str] | None:
    """The first difference of two JSON values, in the order of the second: its place (`model.config.layers[2]`) and both values, shortened.

    Examples:
        >>> from guardlens.results.run_directory import first_difference
        >>> first_difference({"model": {"id": "a", "dtype": "float32"}}, {"model": {"id": "a", "dtype": "bfloat16"}})
        ('model.dtype', '"float32"', '"bfloat16"')
    """
    was = json.dumps(old)
    now = json.dumps(new)
    if isinstance(old, dict) and isinstance(new, dict):
        places = [(f"{of}.{key}" if of else key, old.get(key), new.get(key)) for key in {**new, **old}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and len(was) > EXCERPT:
        places = [(f"{of}[{i}]", before, after) for i, (before, after) in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new or was == now else (of, *_excerpts(was, now))
    return next((found for place, before, after in places if (found := first_difference(before, after, place))), None)


def _excerpts(was: str, now: str) -> tuple[str, str]:
    """Both texts; long ones are cut out from shortly before their first difference."""
    if max(len(was), len(now)) <= EXCERPT:
        return was, now
    alike = next((i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
    start = max(0, alike - EXCERPT // 4)

    def excerpt(text: str) -> str:
        return f"{'...' if start else ''}{text[start : start + EXCERPT]}{'...' if len(text) > start + EXCERPT else ''}"

    return excerpt(was), excerpt(now)
