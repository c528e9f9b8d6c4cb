"""Hidden states on disk, written query by query while a long run goes on, and mapped into memory when they are read.

One file of the final size, not one per batch: batches come sorted by length, and so each row lies at its own place in the order of the
queries, and reading is a single memory map that no second pass over the data has to make. The file is safetensors from its first byte on.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.errors import StorageError, one_of, quoted, warn
from guardlens.results.files import atomic, digest, metadata_of, reading, writing
from guardlens.results.provenance import Provenance
from guardlens.results.run_directory import MANIFEST, RECORDS, RUN, RunDirectory, records_in, run_of

KIND, TENSOR = "activations", "states"
"""What a file of states says that it holds, and the name of the tensor in it."""

WHOLE, PARTIAL = "states.safetensors", "states.partial"

DTYPES = {"float32": "F32", "bfloat16": "BF16"}
"""What states may be stored as -> safetensors' name of it."""

LONGEST = 100_000_000
"""Bytes of a header that safetensors reads."""


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name in `DTYPES`.

    Raises:
        StorageError: Another one.
    """
    if not one_of(name, DTYPES):
        raise StorageError(f"the dtype {quoted(name)}", f"one of {list(DTYPES)}", "keep float32, or bfloat16 for half the size")
    return getattr(torch, name)


class StateStore:
    """One row of states per query in a directory, written in any order. Opening the directory again resumes.

    In it are `manifest.json`, how the states are made; `records.jsonl`, which rows are on the disk, with a checksum of each; and the rows,
    `states.partial` until the last one is there, then `states.safetensors`. A row counts once it and its record are on the disk, and while
    its bytes are those that were written: what a kill cut off, or what changed since, is written again.

    Args:
        path: The directory.
        configuration: What the states depend on.
        rows: How many there will be.
        dtype: What they are stored as, a name of `DTYPES`.
        provenance: Whose they are, for the manifest.

    Raises:
        StorageError: Another dtype, or a directory that `RunDirectory` can't open.
        MismatchError: The directory was made with another configuration; the first difference is named.
    """

    def __init__(
        self, path: str | Path, configuration: Mapping[str, Any], rows: int, dtype: str = "float32", provenance: Provenance | None = None
    ) -> None:
        self._dtype = dtype_of(dtype)
        self.run = RunDirectory(path, {**configuration, "rows": rows, "dtype": dtype}, provenance)
        self.rows, self.dtype = rows, dtype
        self._whole, self._partial = self.run.path / WHOLE, self.run.path / PARTIAL
        try:
            with writing(self._partial):
                self._mend()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "StateStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes open the directory."""
        self.run.close()

    def _mend(self) -> None:
        """Bring the rows into the shape that they must have. What was lost on the way no longer matches its checksum.

        Raises:
            StorageError: They are of another run, as after copying one directory over another.
        """
        for path in (self._whole, self._partial):
            if path.exists() and _run_in(path) not in ("", run_of(self.run.path)):
                raise StorageError(
                    f"{path}, which is of another run than {MANIFEST} beside it",
                    "states of this configuration",
                    "remove both, or use another directory",
                )
        if self._whole.exists() or not self._partial.exists():
            return self._partial.unlink(missing_ok=True)
        layout = _layout(self._partial)
        if layout is None or layout[2] != self.rows:
            warn(f"{self._partial} has a broken header: all its rows are made again")
            return self._partial.unlink()
        start, size, rows = layout
        if self._partial.stat().st_size != start + rows * size:
            os.truncate(self._partial, start + rows * size)

    @property
    def missing(self) -> list[int]:
        """The rows that are still to be written.

        Warns:
            UserWarning: Rows that aren't what was written.
        """
        if self._whole.exists():
            return []
        recorded = _recorded(self.run.path) if self._partial.exists() else {}
        changed = set(_changed(self._partial, recorded))
        if changed:
            warn(f"{len(changed)} rows of {self._partial} aren't what was written; they are made again")
        return [row for row in range(self.rows) if row not in recorded or row in changed]

    def write(self, rows: Sequence[int], states: Float[Tensor, "row layer d_model"], header: Mapping[str, Any]) -> None:
        """Write some rows and make sure that they are on the disk.

        Args:
            rows: Which.
            states: What is in them, on the CPU.
            header: What the file says beside them; the first call writes it.

        Raises:
            StorageError: The disk has no room for all rows, or the header none for all queries.
        """
        states = states.to(self._dtype).contiguous()
        if not self._partial.exists():
            self._begin(states, header)
        stored = [state.view(torch.uint8).numpy().data for state in states]
        with writing(self._partial), self._partial.open("r+b") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            for row, state in zip(rows, stored, strict=True):
                file.seek(start + row * state.nbytes)
                file.write(state)
            file.flush()
            os.fsync(file.fileno())
        self.run.append([{"rows": [*rows], "sums": [zlib.crc32(state) for state in stored]}])

    def _begin(self, states: Tensor, header: Mapping[str, Any]) -> None:
        """The file with its header and as many zeros as there will be numbers, which take no room on the disk yet."""
        size = self.rows * states[0].nbytes
        if (free := shutil.disk_usage(self.run.path).free) < size:
            raise StorageError(f"{_sized(free)} free for {self.run.path}", _sized(size), "choose another disk, fewer layers, or bfloat16")
        tensor = {"dtype": DTYPES[self.dtype], "shape": [self.rows, *states.shape[1:]], "data_offsets": [0, size]}
        meta = metadata_of(KIND, header) | {RUN: run_of(self.run.path)}
        described = json.dumps({"__metadata__": meta, TENSOR: tensor}).encode()
        described += b" " * (-len(described) % 8)  # so that numbers are aligned
        if len(described) > LONGEST:
            raise StorageError(
                f"{self.rows} queries that take {len(described) / 1e6:.0f} MB of text", f"at most {LONGEST / 1e6:.0f} MB", "split them up"
            )
        self.run.forget()
        with atomic(self._partial) as partial, partial.open("wb") as file:
            file.write(len(described).to_bytes(8, "little") + described)
            file.truncate(8 + len(described) + size)

    def finish(self) -> Path:
        """The file of all rows.

        Raises:
            StorageError: Some are missing, or aren't what was written.
        """
        if missing := self.missing:
            raise StorageError(
                f"{self._partial} without {len(missing)} of its {self.rows} rows", "all of them, as they were written", "repeat the call"
            )
        if not self._whole.exists():
            with writing(self._whole):
                self._partial.replace(self._whole)
        return self._whole


def _recorded(directory: Path) -> dict[int, set[int]]:
    """The rows that were written -> the checksums of what was written there."""
    found: dict[int, set[int]] = {}
    for record in records_in(directory, lambda record: tuple(zip(record["rows"], record["sums"], strict=True))):
        for row, checksum in zip(record["rows"], record["sums"], strict=True):
            found.setdefault(row, set()).add(checksum)
    return found


def _changed(path: Path, recorded: Mapping[int, set[int]]) -> Iterator[int]:
    """The rows of a file whose bytes have none of the checksums that were recorded."""
    if not recorded:
        return
    layout = _layout(path)
    if layout is None:
        yield from recorded
        return
    start, size, _ = layout
    with reading(path, "states"), path.open("rb") as file:
        for row in sorted(recorded):
            file.seek(start + row * size)
            if zlib.crc32(file.read(size)) not in recorded[row]:
                yield row


def _run_in(path: Path) -> str:
    """Whose states a file says that it holds; empty if it doesn't say, or its header is broken."""
    with reading(path, "states"), path.open("rb") as file:
        header = file.read(min(int.from_bytes(file.read(8), "little"), LONGEST))
    with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return str(json.loads(header)["__metadata__"].get(RUN, ""))
    return ""


def _layout(path: Path) -> tuple[int, int, int] | None:
    """Where the first row begins, how many bytes a row takes, and how many rows there are; None if the header is broken."""
    with reading(path, "states"), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, LONGEST))
    try:
        described = json.loads(header)
        meta, tensor = described["__metadata__"], described[TENSOR]
        rows, size = tensor["shape"][0], tensor["data_offsets"][1]
        return (8 + length, size // rows, rows) if meta["digest"] == digest(meta["guardlens"].encode()) else None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None


def _sized(count: int) -> str:
    """A number of bytes in a unit that fits."""
    power = min(max(count.bit_length() - 1, 0) // 10, 4)
    return f"{count / 2 ** (10 * power):.{1 if power else 0}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def states_in(directory: Path, *, verify: bool = False) -> Path:
    """The file of a finished store.

    Args:
        directory: The store.
        verify: Read all states and compare them with the checksums in its records.

    Raises:
        StorageError: The directory holds none, or other states than were written.
    """
    whole = directory / WHOLE
    if not whole.exists() and (directory / PARTIAL).exists():
        raise StorageError(
            f"{directory}, whose states are not all there yet", "a finished store", "repeat the call that made it: it resumes"
        )
    if not whole.exists():
        raise StorageError(f"{directory}, a directory without {WHOLE}", "one that gl.collect(..., out=...) made", "check the path")
    if verify:
        _verify(directory, whole)
    return whole


def _verify(directory: Path, whole: Path) -> None:
    layout, recorded = _layout(whole), _recorded(directory)
    changed = [*_changed(whole, recorded)]
    if changed or layout is None or len(recorded) != layout[2]:
        raise StorageError(
            f"{whole}, whose states aren't those of {RECORDS}", "what was written", "copy the directory again, or make it anew"
        )
