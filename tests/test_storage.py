import json
import os

import pytest
import torch
from safetensors.torch import save_file

from guardlens import errors
from guardlens.storage import Provenance, RunDirectory, atomic, digest, load_tensors, require_same_model, save_tensors, write_text


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
    with pytest.raises(errors.StorageError, match=r"t with things, format 1\.\nExpected directions, format 1\."):
        load_tensors(tmp_path / "t", "directions")
    write_text(tmp_path / "text", "not tensors at all")
    with pytest.raises(errors.StorageError, match=r"text, which can't be read[\s\S]*a safetensors file with directions"):
        load_tensors(tmp_path / "text", "directions")
    with pytest.raises(errors.StorageError, match=r"nothing, which can't be read"):
        load_tensors(tmp_path / "nothing", "directions")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(errors.StorageError, match=r"no guardlens data"):
        load_tensors(tmp_path / "foreign", "directions")


def test_same_model_goes_by_the_fingerprint():
    for of, against in (("a@1", "b@1"), ("", "b@1"), ("a@1", "")):
        require_same_model("x", of, against)
    with pytest.raises(errors.MismatchError, match=r"Found x of the model a@1.\nExpected those of a@2"):
        require_same_model("x", "a@1", "a@2")


def test_digest_knows_where_parts_end():
    assert digest(b"ab", b"c") != digest(b"a", b"bc") and len(digest(b"")) == 12


class TestRunDirectory:
    def test_resumes(self, tmp_path):
        run = RunDirectory(tmp_path / "r", {"a": (1, 2), "b": None})
        assert run.records() == []
        run.append([{"id": "ä\u2028"}, {"id": 2}])
        manifest = (tmp_path / "r/manifest.json").read_text(encoding="utf-8")
        again = RunDirectory(tmp_path / "r", {"b": None, "a": [1, 2]})
        again.append([{"id": 3}])
        assert [record["id"] for record in run.records()] == ["ä\u2028", 2, 3]
        assert (tmp_path / "r/manifest.json").read_text(encoding="utf-8") == manifest
        assert json.loads(manifest)["provenance"]["versions"]["torch"] == torch.__version__

    def test_refuses_another_configuration(self, tmp_path):
        RunDirectory(tmp_path, {"model": "a", "seed": 0})
        with pytest.raises(errors.MismatchError, match=r"made with seed = 0\.\nExpected seed = 1\.\nNext: give another directory"):
            RunDirectory(tmp_path, {"model": "a", "seed": 1})
        with pytest.raises(errors.MismatchError, match=r"made with extra = null"):
            RunDirectory(tmp_path, {"model": "a", "seed": 0, "extra": "x" * 200})

    def test_the_difference_that_is_named_is_the_first_of_the_call(self, tmp_path):
        RunDirectory(tmp_path, {"z": {"config": {"layer": -2, "eps": 1e-5}}, "a": ["x" * 80, "y"], "text": "b" * 200 + "1" + "b" * 200})

        def named(**changes):
            asked = {"z": {"config": {"layer": -2, "eps": 1e-5}}, "a": ["x" * 80, "y"], "text": "b" * 200 + "1" + "b" * 200} | changes
            with pytest.raises(errors.MismatchError) as caught:
                RunDirectory(tmp_path, asked)
            return caught.value.found.partition("made with ")[2], caught.value.expected

        assert named(z={"config": {"eps": 1e-5, "layer": -1}}, a=[]) == ("z.config.layer = -2", "z.config.layer = -1")
        assert named(a=["x" * 80, "z"]) == ('a[1] = "y"', 'a[1] = "z"')
        was, now = named(text="b" * 200 + "2" + "b" * 200)
        assert was != now and max(len(was), len(now)) < 100

    def test_the_manifest_says_whose_records_these_are(self, tmp_path):
        RunDirectory(tmp_path, {}, Provenance(model="m@1", template="t"))
        kept = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))["provenance"]
        assert (kept["model"], kept["template"]) == ("m@1", "t")
        RunDirectory(tmp_path, {}, Provenance(model="of another day"))

    @pytest.mark.parametrize("cut", ['{"id": 1}\n{"id', '{"id'])
    def test_a_cut_line_is_dropped_and_mended(self, tmp_path, cut):
        run = RunDirectory(tmp_path, {})
        (tmp_path / "records.jsonl").write_text(cut)
        whole = [{"id": 1}] if "\n" in cut else []
        assert run.records() == whole
        run.append([{"id": 2}])
        assert run.records() == [*whole, {"id": 2}]
        assert [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()] == [*whole, {"id": 2}]


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "t", "states", {"a": torch.ones(2)}, {})
        write_text(tmp_path / "w", "words")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "tw"] == [0o640, 0o640]


def test_one_name_and_other_numbers_may_be_another_dtype():
    with pytest.raises(errors.MismatchError, match=r"of the model m@1\.\nExpected those of m@2\.\n.*same weights in another dtype\?"):
        require_same_model("directions", "m@1", "m@2")
    with pytest.raises(errors.MismatchError) as caught:
        require_same_model("directions", "m@1", "n@2")
    assert "dtype" not in str(caught.value)
