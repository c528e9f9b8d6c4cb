"""Hidden states on disk: written row by row during a long collection, and mapped into memory for reading.

The store writes one safetensors file of the final size instead of a file per batch. Batches are sorted by length, so their rows are
scattered over the order of the queries; in a single file each row goes to its final place, and no second pass has to merge batches.
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
"""The kind of a file of states, and the name of the tensor in it."""

WHOLE, PARTIAL = "states.safetensors", "states.partial"

DTYPES = {"float32": "F32", "bfloat16": "BF16"}
"""The dtypes of stored states -> their names in safetensors."""

LONGEST = 100_000_000
"""The longest header, in bytes, that safetensors reads."""


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype with a name of `DTYPES`.

    Raises:
        StorageError: The name is not in `DTYPES`.
    """
    if not one_of(name, DTYPES):
        raise StorageError(f"the dtype {quoted(name)}", f"one of {list(DTYPES)}", "keep float32, or bfloat16 for half the size")
    return getattr(torch, name)


class StateStore:
    """A directory with one row of states per query, written in any order. Opening the directory again resumes the collection.

    The directory holds `manifest.json` with the configuration, `records.jsonl` with the numbers and checksums of the rows on disk, and the
    rows themselves: in `states.partial` until all are written, then in `states.safetensors`. A row counts as written if it has a record and
    its bytes have the recorded checksum. All other rows are written again: those that an interruption cut off, and those that changed.

    Args:
        path: The directory.
        configuration: Everything that determines the states.
        rows: The final number of rows.
        dtype: The dtype of the stored states, a name of `DTYPES`.
        provenance: The model and versions, for the manifest.

    Raises:
        StorageError: The dtype is unknown, or `RunDirectory` cannot open the directory.
        MismatchError: The directory was made with another configuration. The first difference is named.
    """

    def __init__(
        self, path: str | Path, configuration: Mapping[str, Any], rows: int, dtype: str = "float32", provenance: Provenance | None = None
    ) -> None:
        self._dtype = dtype_of(dtype)
        self.run = RunDirectory(path, {**configuration, "rows": rows, "dtype": dtype}, provenance)
        self.rows = rows
        self.dtype = dtype
        self._whole = self.run.path / WHOLE
        self._partial = self.run.path / PARTIAL
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
        """Release the directory to other processes."""
        self.run.close()

    def _mend(self) -> None:
        """Restore the size of the file of rows after an interruption. Damaged rows do not match their checksums.

        Raises:
            StorageError: The file belongs to another run, as after copying one directory over another.
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
        """The numbers of the rows that still have to be written.

        Warns:
            UserWarning: Some rows do not match their checksums.
        """
        if self._whole.exists():
            return []
        recorded = _recorded(self.run.path) if self._partial.exists() else {}
        changed = set(_changed(self._partial, recorded))
        if changed:
            warn(f"{len(changed)} rows of {self._partial} aren't what was written; they are made again")
        return [row for row in range(self.rows) if row not in recorded or row in changed]

    def write(self, rows: Sequence[int], states: Float[Tensor, "row layer d_model"], header: Mapping[str, Any]) -> None:
        """Write some rows, and return when they are on the disk.

        Args:
            rows: The numbers of the rows.
            states: Their states, on the CPU.
            header: The metadata of the file, which the first call writes.

        Raises:
            StorageError: The disk has no room for all rows, or the header has no room for all queries.
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
        """Create the file with its header and its final size. The part without rows takes no room on the disk yet."""
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
        """Rename the file of rows to its final name, and return its path.

        Raises:
            StorageError: Rows are missing, or do not match their checksums.
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
    """The number of each recorded row -> all checksums that were recorded for it."""
    found: dict[int, set[int]] = {}
    for record in records_in(directory, lambda record: tuple(zip(record["rows"], record["sums"], strict=True))):
        for row, checksum in zip(record["rows"], record["sums"], strict=True):
            found.setdefault(row, set()).add(checksum)
    return found


def _changed(path: Path, recorded: Mapping[int, set[int]]) -> Iterator[int]:
    """Yield the numbers of the rows whose bytes match none of their recorded checksums."""
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
    """The run that a file names in its header; empty if it names none, or if the header is broken."""
    with reading(path, "states"), path.open("rb") as file:
        header = file.read(min(int.from_bytes(file.read(8), "little"), LONGEST))
    with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return str(json.loads(header)["__metadata__"].get(RUN, ""))
    return ""


def _layout(path: Path) -> tuple[int, int, int] | None:
    """The offset of the first row, the bytes per row, and the number of rows; None if the header is broken."""
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
    """A number of bytes in a suitable unit."""
    power = min(max(count.bit_length() - 1, 0) // 10, 4)
    return f"{count / 2 ** (10 * power):.{1 if power else 0}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def states_in(directory: Path, *, verify: bool = False) -> Path:
    """Return the path of the states of a finished store.

    Args:
        directory: The directory of the store.
        verify: Read all states, and compare them with the recorded checksums.

    Raises:
        StorageError: The directory holds no states, the collection is unfinished, or (with `verify`) a row does not match its checksum.
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
