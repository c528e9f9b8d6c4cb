import errno
import json
import os
import socket
import time

import numpy as np
import pytest
import torch

from guardlens import errors
from guardlens.results import files as storage
from guardlens.results.files import write_text
from guardlens.results.provenance import Provenance
from guardlens.results.run_directory import RunDirectory
from tests.forked_processes import forked


class TestRunDirectory:
    def test_resumes(self, tmp_path):
        run = RunDirectory(tmp_path / "r", {"a": (1, 2), "b": None})
        assert run.records() == []
        run.append([{"id": "ä\u2028"}, {"id": 2}])
        manifest = (tmp_path / "r/manifest.json").read_text(encoding="utf-8")
        run.close()
        again = RunDirectory(tmp_path / "r", {"b": None, "a": [1, 2]})
        again.append([{"id": 3}])
        assert [record["id"] for record in again.records()] == ["ä\u2028", 2, 3]
        assert (tmp_path / "r/manifest.json").read_text(encoding="utf-8") == manifest
        assert json.loads(manifest)["provenance"]["versions"]["torch"] == torch.__version__

    def test_refuses_another_configuration(self, tmp_path):
        RunDirectory(tmp_path, {"model": "a", "seed": 0})
        with pytest.raises(errors.MismatchError, match=r"made with seed = 0\.\nExpected seed = 1\.\nNext: use another directory"):
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
        lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
        assert [line["id"] for line in lines] == [each["id"] for each in [*whole, {"id": 2}]]

    def test_a_second_process_is_refused_and_a_dead_one_does_not_block(self, tmp_path):
        read, write = os.pipe()
        with forked(lambda: (RunDirectory(tmp_path, {}), os.write(write, b"open"), time.sleep(60))) as other:
            assert os.read(read, 4) == b"open"
            with pytest.raises(errors.StorageError, match=rf"process {other} on {socket.gethostname()} has open.\nExpected one process"):
                RunDirectory(tmp_path, {})
        with RunDirectory(tmp_path, {}) as run:
            with pytest.raises(errors.StorageError, match=r"which this very process has open"):
                RunDirectory(tmp_path, {})
            run.append([{"id": 1}])
        assert RunDirectory(tmp_path, {}).records() == [{"id": 1}]

    def test_a_refused_configuration_leaves_it_open_to_others(self, tmp_path):
        RunDirectory(tmp_path, {"a": 1}).close()
        with pytest.raises(errors.MismatchError) as caught:
            RunDirectory(tmp_path, {"a": 2})
        assert RunDirectory(tmp_path, {"a": 1}).records() == [] and caught.value.found

    @pytest.mark.parametrize("number", [errno.EROFS, errno.ENOLCK])
    def test_without_a_lock_what_is_there_can_be_read(self, tmp_path, monkeypatch, number):
        with RunDirectory(tmp_path, {}) as run:
            run.append([{"id": 1}])

        def refuse(*_, **__):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("guardlens.results.run_directory.FileLock.acquire", refuse)
        with pytest.warns(UserWarning, match=r"can't be locked \(.*\): make sure that no other process writes there"):
            assert RunDirectory(tmp_path, {}).records() == [{"id": 1}]
        with pytest.raises(errors.StorageError, match=r"new, which can't be written"):
            RunDirectory(tmp_path / "new", {})

    def test_records_of_another_run_are_left_out(self, tmp_path):
        for name in ("one", "other"):
            with RunDirectory(tmp_path / name, {"called": name}) as run:
                run.append([{"id": 1, "called": name}])
        one, other = ((tmp_path / name / "records.jsonl").read_bytes() for name in ("one", "other"))
        for lines, left in ((other + one, [{"id": 1, "called": "one"}]), (other, [])):
            (tmp_path / "one/records.jsonl").write_bytes(lines)
            with RunDirectory(tmp_path / "one", {"called": "one"}) as run, pytest.warns(UserWarning, match=r"1 of . records .*of this run"):
                assert run.records() == left

    @pytest.mark.parametrize("left", ["records.jsonl", "states.partial", "states.safetensors"])
    def test_what_lost_its_manifest_is_refused(self, tmp_path, left):
        (tmp_path / left).write_bytes(b"{}\n")
        with pytest.raises(errors.StorageError, match=rf"with {left} and without manifest.json[\s\S]*restore the manifest, or use another"):
            RunDirectory(tmp_path, {})
        assert [path.name for path in sorted(tmp_path.iterdir())] == [".lock", left]

    @pytest.mark.parametrize(
        "text",
        [
            *(b"", b"{", b"null", b"[]", b"5", b"{}", b'{"configuration": []}', b'{"configuration": null}', b"\xff\xfe"),
            *(b"[" * 100_000, b'{"configuration": ' + b"9" * 5000 + b"}"),
        ],
        ids=range(11),
    )
    def test_a_broken_manifest_is_named(self, tmp_path, text):
        (tmp_path / "manifest.json").write_bytes(text)
        with pytest.raises(errors.StorageError, match=r"manifest.json"):
            RunDirectory(tmp_path, {})
        assert (tmp_path / "manifest.json").read_bytes() == text

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
    def test_an_editor_may_write_the_manifest_in_another_encoding(self, tmp_path, encoding):
        (tmp_path / "manifest.json").write_text('{"configuration": {"n": "ä"}}', encoding=encoding)
        RunDirectory(tmp_path, {"n": "ä"})

    @pytest.mark.parametrize(
        "broken", [b"\0" * 9, b"\xff\xfe{", b'{"id": 2', b"null", b"[2]", b'{"other": 2}', b'{"id": [2]}', b'{"id": null}', b"[" * 9999]
    )
    def test_a_broken_line_is_made_again_and_loses_nothing_else(self, tmp_path, broken):
        run = RunDirectory(tmp_path, {})
        (tmp_path / "records.jsonl").write_bytes(b'{"id": 1}\n' + broken + b'\n\n{"id": 3}\n{"id": 1, "again": 1}\n')
        with pytest.warns(UserWarning, match=r"1 of 4 records in .*records.jsonl can't be read or aren't of this run; they are made again"):
            assert run.records(lambda record: record["id"]) == [{"id": 1}, {"id": 3}]
        run.append([{"id": 2}])
        with pytest.warns(UserWarning, match=r"1 of 5"):
            assert run.records(lambda record: record["id"]) == [{"id": 1}, {"id": 3}, {"id": 2}]

    def test_temporary_files_of_dead_processes_go(self, tmp_path):
        with forked(lambda: None) as dead:
            pass
        host, alive = storage._HOST, os.getppid()
        names = [f".{name}.{host}.{dead}.partial" for name in ("manifest.json", "states.partial", "mine.txt")]
        kept = [f".manifest.json.{host}.{alive}.partial", f".manifest.json.elsewhere.{dead}.partial", ".mine.partial", names[2]]
        for name in (*names, *kept):
            (tmp_path / name).touch()
        RunDirectory(tmp_path, {})
        assert {path.name for path in tmp_path.iterdir()} == {*kept, ".lock", "manifest.json"}
        write_text(tmp_path / "mine.txt", "")
        assert not (tmp_path / names[2]).exists()

    def test_numbers_of_numpy_are_numbers(self, tmp_path):
        RunDirectory(tmp_path, {"n": np.int64(8), "x": np.float32(0.5), "yes": np.bool_(True)}).append([{"id": np.int32(3)}])
        assert RunDirectory(tmp_path, {"n": 8, "x": 0.5, "yes": True}).records() == [{"id": 3}]
        with pytest.raises(errors.StorageError, match=r"something of type Tensor in the configuration"):
            RunDirectory(tmp_path / "new", {"n": torch.ones(1)})
