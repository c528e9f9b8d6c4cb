import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from guardlens import errors, interventions
from guardlens.directions import Directions
from guardlens.interventions import Intervention
from guardlens.results import files as storage
from guardlens.results.files import atomic, digest, load_tensors, save_tensors, write_text
from guardlens.results.run_directory import RunDirectory
from tests.strategies import make_directions


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old ä")
    with pytest.raises(RuntimeError, match=r"power"), atomic(path) as partial:
        partial.write_text("half")
        raise RuntimeError("power")
    assert path.read_text(encoding="utf-8") == "old ä" and list(path.parent.iterdir()) == [path]


def test_tensors_round_trip_even_where_they_share_memory(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": base, "same": base, "view": base[1], "transposed": base.T, "half": base.bfloat16(), "empty": base[:0]}
    save_tensors(tmp_path / "t", "things", tensors, {"n": [1, None, "ä"]})
    loaded, header = load_tensors(tmp_path / "t", "things")
    assert header == {"n": [1, None, "ä"]} and loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) and loaded[name].dtype == tensors[name].dtype for name in tensors)


def test_what_cannot_be_loaded_is_said(tmp_path):
    save_tensors(tmp_path / "t", "things", {}, {})
    with pytest.raises(errors.StorageError, match=r"t with things, format 2\.\nExpected directions, format 2\."):
        load_tensors(tmp_path / "t", "directions")
    write_text(tmp_path / "text", "not tensors at all")
    with pytest.raises(errors.StorageError, match=r"text, which can't be read[\s\S]*a safetensors file with directions"):
        load_tensors(tmp_path / "text", "directions")
    with pytest.raises(errors.StorageError, match=r"nothing, which can't be read"):
        load_tensors(tmp_path / "nothing", "directions")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(errors.StorageError, match=r"no guardlens data"):
        load_tensors(tmp_path / "foreign", "directions")


def test_digest_knows_where_parts_end():
    assert digest(b"ab", b"c") != digest(b"a", b"bc") and len(digest(b"")) == 12


@pytest.mark.parametrize("path", ["", None, 5, b"a", "a\0b", ["a"]])
def test_what_is_no_path(path):
    uses = [lambda: RunDirectory(path, {}), lambda: write_text(path, ""), lambda: load_tensors(path, "things")]
    for use in [lambda: storage.require_path(path), *(uses if isinstance(path, str) else [])]:
        with pytest.raises(errors.StorageError, match=r"Found the path [\s\S]*such as 'runs/first'"):
            use()


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere/at/all")
    for place in ("file", "file/below", "dangling", "x" * 300):
        with pytest.raises(errors.StorageError, match=rf"{place}.*, which can't be written"):
            RunDirectory(tmp_path / place, {})
    for place in ("file/below", "x" * 300, "."):
        with pytest.raises(errors.StorageError, match=r"which can't be written"):
            save_tensors(tmp_path / place, "things", {"a": torch.ones(2)}, {})
    if Path("/dev/full").exists():
        RunDirectory(tmp_path / "full", {}).close()
        (tmp_path / "full/records.jsonl").symlink_to("/dev/full")
        with pytest.raises(errors.StorageError, match=r"records.jsonl, which can't be written \(No space left on device\)"):
            RunDirectory(tmp_path / "full", {}).append([{"id": 1}])


class TestWhatWasSavedIsWhatIsLoaded:
    def test_a_changed_byte_is_noticed(self, tmp_path):
        path = tmp_path / "t"
        save_tensors(
            path, "things", {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(1)}, {"of": "mine"}
        )
        whole = path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(errors.StorageError):
                load_tensors(path, "things")

    def test_only_what_is_asked_for_is_read(self, tmp_path):
        path = tmp_path / "t"
        save_tensors(path, "things", {"a": torch.zeros(3)}, {})
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
        assert load_tensors(path, "things", verify=False)[0]["a"][2] != 0
        with pytest.raises(errors.StorageError, match=r"changed after it was saved"):
            load_tensors(path, "things")

    @pytest.mark.parametrize(
        "text", ["", "null", "[]", "5", "[" * 99_999, '{"kind": "things", "format": 2}', '{"kind": "things", "format": 3, "header": {}}']
    )
    def test_broken_headers(self, tmp_path, text):
        save_file({"a": torch.zeros(1)}, tmp_path / "t", metadata={"guardlens": text, "digest": digest(text.encode())})
        with pytest.raises(errors.StorageError, match=r"things"):
            load_tensors(tmp_path / "t", "things")

    def test_what_json_cannot_hold_leaves_no_file(self, tmp_path):
        for header in ({"a": torch.ones(1)}, {"a": {1, 2}}, {"a": {(1, 2): 3}}):
            with pytest.raises(
                errors.StorageError, match=r"in the header of a file with things.\nExpected text, numbers, lists and dictionaries"
            ):
                save_tensors(tmp_path / "t", "things", {}, header)
        assert not list(tmp_path.iterdir())


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "t", "states", {"a": torch.ones(2)}, {})
        write_text(tmp_path / "w", "words")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "tw"] == [0o640, 0o640]


def test_what_runs_compute_with_is_loaded_to_where_torch_puts_tensors(tmp_path):
    """A mapped file lies at multiples of 8 bytes alone: products with it were rounded otherwise than before it was saved."""
    for length in range(8):
        made = replace(make_directions(width=10), method="m" * length)
        made.save(tmp_path / "directions.safetensors")
        interventions.add(made.truncate(1)).save(tmp_path / "intervention.safetensors")
        step = Intervention.load(tmp_path / "intervention.safetensors").steps[0].edit
        loaded = Directions.load(tmp_path / "directions.safetensors")
        assert all(tensor.data_ptr() % 64 == 0 for tensor in (loaded.vectors, loaded.harmful_mean, step.shift))
