"""Hidden states on disk, written query by query while a long run goes on, and mapped into memory when they are read.

One file of the final size, not one per batch: batches come sorted by length, and so each row lies at its own place in the order of the
queries, and reading is a single memory map that no second pass over the data has to make. The file is safetensors from its first byte on.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.errors import StorageError
from guardlens.storage import Provenance, RunDirectory, atomic, metadata_of

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
    if name not in DTYPES:
        raise StorageError(f"the dtype {name!r}", f"one of {list(DTYPES)}", "keep float32, or bfloat16 for half the size")
    return getattr(torch, name)


class StateStore:
    """One row of states per query in a directory, written in any order. Opening the directory again resumes.

    In it are `manifest.json`, how the states are made; `records.jsonl`, which rows are on the disk; and the rows, `states.partial` until
    the last one is there, then `states.safetensors`. A row counts once it and its record are on the disk: what a kill cut off is written
    again.

    Args:
        path: The directory.
        configuration: What the states depend on.
        rows: How many there will be.
        dtype: What they are stored as, a name of `DTYPES`.
        provenance: Whose they are, for the manifest.

    Raises:
        StorageError: Another dtype.
        MismatchError: The directory was made with another configuration; the first difference is named.
    """

    def __init__(
        self, path: str | Path, configuration: Mapping[str, Any], rows: int, dtype: str = "float32", provenance: Provenance | None = None
    ) -> None:
        self._dtype = dtype_of(dtype)
        self.run = RunDirectory(path, {**configuration, "rows": rows, "dtype": dtype}, provenance)
        self.rows, self.dtype = rows, dtype
        self._whole, self._partial = self.run.path / WHOLE, self.run.path / PARTIAL

    @property
    def missing(self) -> list[int]:
        """The rows that are still to be written."""
        if self._whole.exists():
            return []
        written = {row for record in self.run.records() for row in record["rows"]} if self._partial.exists() else set()
        return [row for row in range(self.rows) if row not in written]

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
        with self._partial.open("r+b") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            for row, state in zip(rows, states, strict=True):
                file.seek(start + row * state.nbytes)
                file.write(state.view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        self.run.append([{"rows": [*rows]}])

    def _begin(self, states: Tensor, header: Mapping[str, Any]) -> None:
        """The file with its header and as many zeros as there will be numbers, which take no room on the disk yet."""
        size = self.rows * states[0].nbytes
        if (free := shutil.disk_usage(self.run.path).free) < size:
            raise StorageError(
                f"{free / 2**30:.1f} GiB free for {self.run.path}",
                f"{size / 2**30:.1f} GiB",
                "choose another disk, fewer layers, or bfloat16",
            )
        tensor = {"dtype": DTYPES[self.dtype], "shape": [self.rows, *states.shape[1:]], "data_offsets": [0, size]}
        described = json.dumps({"__metadata__": metadata_of(KIND, header), TENSOR: tensor}).encode()
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
        """The file of all rows, once none is missing."""
        if not self._whole.exists():
            self._partial.replace(self._whole)
        return self._whole


def states_in(directory: Path) -> Path:
    """The file of a finished store.

    Raises:
        StorageError: The directory holds none.
    """
    if (directory / PARTIAL).exists():
        raise StorageError(
            f"{directory}, whose states are not all there yet", "a finished store", "repeat the call that made it: it resumes"
        )
    if not (directory / WHOLE).exists():
        raise StorageError(f"{directory}, a directory without {WHOLE}", "one that gl.collect(..., out=...) made", "check the path")
    return directory / WHOLE
