"""Whatever a kill or a full disk interrupts: the same call again gives what an undisturbed one gives."""

import errno
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from guardlens import errors
from guardlens.data.activation_store import WHOLE, StateStore
from guardlens.results.files import load_tensors
from guardlens.results.run_directory import RunDirectory
from guardlens.results.tables import Table
from tests.forked_processes import code_of, forks

pytestmark = forks
STATES = torch.arange(24.0).reshape(6, 2, 2)
OPERATIONS = ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.chmod")


def records(path):
    with RunDirectory(path, {"of": "records"}) as run:
        done = {record["id"] for record in run.records(lambda record: record["id"])}
        for first in range(0, 6, 2):
            run.append([{"id": i, "text": f"{i}ä"} for i in (first, first + 1) if i not in done])
        return run.records(lambda record: record["id"])


def states(path):
    with StateStore(path, {"of": "states"}, len(STATES)) as store:
        missing = store.missing
        for rows in (missing[:3], missing[3:]):
            if rows:
                store.write(rows, STATES[rows], {"n": 1})
        return load_tensors(store.finish(), "activations", verify=False)[0]["states"].tolist()


def table(path):
    made = Table({"a": np.array([1, 2]), "b": np.array(["x", "ä"])}, {"run": "second"})
    made.save(path / "t.csv")
    loaded = Table.load(path / "t.csv")
    return {name: values.tolist() for name, values in loaded.columns.items()}, loaded.facts


def interrupted_at(call, path, act):
    """Act at one file operation below a path; the list that is returned holds the operations so far."""
    seen = []

    def hook(event, arguments):
        if event in OPERATIONS and str(path) in str(arguments[0]):
            seen.append(event)
            if len(seen) == call:
                act()

    sys.addaudithook(hook)
    fsync = os.fsync
    os.fsync = lambda number: (hook("open", (path,)), fsync(number))
    return seen


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def full():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("act", [kill, full])
@pytest.mark.parametrize("work", [records, states, table])
def test_at_any_file_operation(tmp_path, work, act):
    whole = work(tmp_path / "undisturbed")

    def disturbed(path, call):
        path.mkdir()
        if work is table:
            Table({"a": np.array([0])}, {"run": "first"}).save(path / "t.csv")
        seen = interrupted_at(call, path, act)
        with suppress(errors.StorageError):
            work(path)
        os._exit(0 if len(seen) < call else 2)

    for call in range(1, 99):
        path = tmp_path / str(call)
        code = code_of(lambda path=path, call=call: disturbed(path, call))
        if code == 0:
            break
        assert code == (-signal.SIGKILL if act is kill else 2), call
        if work is table:
            old_or_said(path, whole)
        assert work(path) == whole, call
        assert sorted(each.name for each in path.iterdir()) == sorted(each.name for each in (tmp_path / "undisturbed").iterdir()), call
    assert 5 < call < 98


def old_or_said(path, whole):
    """An interrupted save leaves the old table, the new one, or an error that says so."""
    try:
        loaded = Table.load(path / "t.csv")
    except errors.StorageError:
        return
    assert (loaded.facts == {"run": "first"} and loaded.columns["a"].tolist() == [0]) or loaded.facts == whole[1]


def test_two_writers_never_mix(tmp_path):
    with RunDirectory(tmp_path, {"of": "records"}):
        assert code_of(lambda: records(tmp_path)) == 1
    assert [record["id"] for record in records(tmp_path)] == list(range(6))
    assert not (Path(tmp_path) / WHOLE).exists()
