"""States on disk: the same as in memory, in constant memory, resumed after a kill, refused to another call, and mapped when read."""

import dataclasses
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import guardlens as gl
from guardlens import Activations, directions, errors, presentations
from guardlens import interventions as iv
from guardlens.data.activation_store import StateStore, _sized
from guardlens.data.presentations import text_only
from guardlens.data.queries import Query
from guardlens.hooks import Site
from tests.strategies import gaussian

GREY = presentations.blank("grey", 32)
PAIRS = gl.QueryPairs(gl.organism.pairs().harmful[:5], gl.organism.pairs().harmless[:5])
TEXTS = PAIRS.queries


def ask(model, out, queries=PAIRS, presentation=GREY, *intervention, **options):
    return gl.collect(model, queries, presentation, *intervention, out=out, **{"batch_size": 3, **options})


@pytest.fixture(scope="module")
def whole(vlm):
    return gl.collect(vlm, PAIRS, GREY, batch_size=3)


@pytest.fixture
def sizes(vlm, monkeypatch):
    """Sizes of the batches that run."""
    found, run = [], type(vlm).run
    monkeypatch.setattr(type(vlm), "run", lambda self, batch, *a, **o: found.append(len(batch.queries)) or run(self, batch, *a, **o))
    return found


linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells a process about its memory in /proc")


def mapped_file(tensor):
    """The file that the memory of a tensor is mapped from."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, *rest = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in bounds.split("-"))
        if first <= tensor.data_ptr() < last:
            return rest[-1]


class TestStore:
    def test_rows_are_those_of_a_safetensors_file(self, tmp_path):
        states = gaussian(0, 5, 2, 3, dtype=torch.float32)
        store = StateStore(tmp_path / "new", {"a": 1}, 5)
        store.write([3, 0], states[[3, 0]], {"n": "ä"})
        with safe_open(tmp_path / "new/states.partial", "pt") as file:
            half, meta = file.get_tensor("states"), json.loads(file.metadata()["guardlens"])
        assert torch.equal(half, torch.stack([states[0], *torch.zeros(2, 2, 3), states[3], torch.zeros(2, 3)]))
        store.close()
        assert meta == {"format": 2, "kind": "activations", "header": {"n": "ä"}, "tensors": {}}
        again = StateStore(tmp_path / "new", {"a": 1}, 5)
        assert again.missing == [1, 2, 4]
        again.write([4, 2, 1], states[[4, 2, 1]], {})
        assert again.missing == []
        with safe_open(again.finish(), "pt") as file:
            assert torch.equal(file.get_tensor("states"), states)
        again.close()
        assert StateStore(tmp_path / "new", {"a": 1}, 5).missing == []
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
            ".lock",
            "manifest.json",
            "records.jsonl",
            "states.safetensors",
        ]

    @pytest.mark.parametrize("seed", range(3))
    def test_numbers_are_aligned(self, tmp_path, seed):
        store = StateStore(tmp_path, {}, 1)
        store.write([0], torch.ones(1, 1, 1), {"n": "x" * seed})
        assert ((tmp_path / "states.partial").stat().st_size - 4) % 8 == 0

    def test_records_of_a_file_that_is_gone_do_not_count(self, tmp_path):
        store = StateStore(tmp_path, {}, 2)
        store.write([0], torch.ones(1, 1, 1), {})
        (tmp_path / "states.partial").unlink()
        store.close()
        again = StateStore(tmp_path, {}, 2)
        assert again.missing == [0, 1]
        again.write([1], torch.ones(1, 1, 1), {})
        assert again.missing == [0]

    @pytest.mark.parametrize("change", ["cut", "grown", "flipped", "cut in the header", "flipped in the header", "empty"])
    def test_rows_that_changed_on_the_disk_are_made_again(self, tmp_path, change):
        states, partial = gaussian(0, 5, 2, 3, dtype=torch.float32), tmp_path / "states.partial"
        with StateStore(tmp_path, {}, 5) as store:
            store.write([0, 1], states[:2], {"n": 1})
            store.write([4, 2], states[[4, 2]], {"n": 1})
        whole = partial.read_bytes()
        changed = {
            "cut": (whole[:-30], [3, 4]),
            "grown": (whole + b"more", [3]),
            "flipped": (whole[:-49] + bytes([whole[-49] ^ 1]) + whole[-48:], [2, 3]),
            "cut in the header": (whole[:50], [0, 1, 2, 3, 4]),
            "flipped in the header": (whole.replace(b"activations", b"activatioms"), [0, 1, 2, 3, 4]),
            "empty": (b"", [0, 1, 2, 3, 4]),
        }
        if change == "flipped":  # rows are 24 bytes: byte -49 lies in row 2
            assert partial.stat().st_size - 49 >= len(whole) - 3 * 24
        partial.write_bytes(changed[change][0])
        expected = changed[change][1]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with StateStore(tmp_path, {}, 5) as again:
                assert again.missing == expected
                assert bool(said) == (change != "grown")
                again.write(expected, states[expected], {"n": 1})
                with safe_open(again.finish(), "pt") as file:
                    assert torch.equal(file.get_tensor("states"), states)

    def test_a_file_with_missing_or_changed_rows_gets_no_name(self, tmp_path):
        store = StateStore(tmp_path, {}, 2)
        store.write([1], torch.ones(1, 1, 1), {})
        with pytest.raises(errors.StorageError, match=r"states.partial without 1 of its 2 rows"):
            store.finish()
        store.write([0], torch.ones(1, 1, 1), {})
        partial = tmp_path / "states.partial"
        partial.write_bytes(partial.read_bytes()[:-1] + b"!")
        with pytest.warns(UserWarning, match=r"1 rows of"), pytest.raises(errors.StorageError, match=r"without 1 of its 2 rows"):
            store.finish()

    def test_a_leftover_beside_a_finished_file_is_in_nobodys_way(self, vlm, whole, tmp_path):
        ask(vlm, tmp_path)
        (tmp_path / "states.partial").write_bytes((tmp_path / "states.safetensors").read_bytes())
        assert torch.equal(Activations.load(tmp_path).states, whole.states)
        ask(vlm, tmp_path)
        assert not (tmp_path / "states.partial").exists()

    def test_states_are_verified_where_it_is_asked_for(self, vlm, tmp_path):
        found = ask(vlm, tmp_path / "streamed")
        found.save(tmp_path / "saved")
        for path, file in ((tmp_path / "streamed", tmp_path / "streamed/states.safetensors"), (tmp_path / "saved", tmp_path / "saved")):
            Activations.load(path, verify=True)
            file.write_bytes(file.read_bytes()[:-1] + b"!")
            Activations.load(path)
            with pytest.raises(errors.StorageError, match=r"states aren't those of records.jsonl|changed after it was saved"):
                Activations.load(path, verify=True)

    def test_no_room(self, tmp_path, monkeypatch):
        monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(3 * 2**29))
        store = StateStore(tmp_path, {}, 2**18)
        assert [_sized(size) for size in (0, 999, 1024, 3 * 2**19, 2**52)] == ["0 bytes", "999 bytes", "1.0 KiB", "1.5 MiB", "4096.0 TiB"]
        with pytest.raises(errors.StorageError, match=r"Found 1\.5 GiB free for .*\nExpected 2\.0 GiB\.\nNext: choose another disk"):
            store.write([0], torch.ones(1, 2, 1024), {})
        assert store.missing == list(range(2**18))

    def test_a_header_that_could_not_be_read_again(self, tmp_path, monkeypatch):
        monkeypatch.setattr("guardlens.data.activation_store.LONGEST", 2_000_000)
        with pytest.raises(errors.StorageError, match=r"Found 1 queries that take 3 MB of text\.\nExpected at most 2 MB"):
            StateStore(tmp_path, {}, 1).write([0], torch.ones(1, 1, 1), {"n": "x" * 3_000_000})
        assert StateStore(tmp_path, {}, 1).missing == [0]

    def test_other_dtypes(self, tmp_path):
        with pytest.raises(errors.StorageError, match=r"Found the dtype 'int4'\.\nExpected one of \['float32', 'bfloat16'\]"):
            StateStore(tmp_path, {}, 1, "int4")


class TestStreaming:
    def test_is_collection(self, vlm, whole, tmp_path):
        streamed = ask(vlm, tmp_path)
        assert torch.equal(streamed.states, whole.states) and streamed.queries == whole.queries
        loaded = Activations.load(tmp_path)
        assert torch.equal(loaded.states, whole.states) and loaded.states.dtype == torch.float32
        assert loaded.queries == tuple(dataclasses.replace(query, images=()) for query in TEXTS)
        for name in ("layers", "hook", "positions", "presentation"):
            assert getattr(loaded, name) == getattr(streamed, name) == getattr(whole, name)
        assert loaded.provenance.model == vlm.id
        assert torch.equal(Activations.load(tmp_path / "states.safetensors").states, whole.states)

    def test_directions_and_comparison_take_it(self, vlm, whole, tmp_path):
        text = gl.collect(vlm, PAIRS)
        ask(vlm, tmp_path / "text", presentation=text_only)
        ask(vlm, tmp_path / "grey", dtype="float32")
        mapped = [Activations.load(tmp_path / name) for name in ("text", "grey")]
        ssd, again = directions.ssd(text, rank=2), directions.ssd(mapped[0], rank=2)
        torch.testing.assert_close(again.vectors, ssd.vectors, atol=1e-3, rtol=0)
        torch.testing.assert_close(again.coordinates(mapped[1]), again.coordinates(whole))
        with pytest.warns(UserWarning, match="10 of the 10 queries made the directions"):
            tables = [gl.compare(first, second, again, draws=20).frame["value"] for first, second in ((text, whole), mapped)]
        torch.testing.assert_close(*(torch.tensor(table.to_numpy()) for table in tables), atol=1e-3, rtol=1e-3)

    @linux
    def test_states_are_mapped(self, vlm, tmp_path):
        streamed = ask(vlm, tmp_path)
        for found in (streamed, Activations.load(tmp_path)):
            assert mapped_file(found.at(3)) == str(tmp_path / "states.safetensors")
        assert mapped_file(streamed.states.clone()) != str(tmp_path / "states.safetensors")

    def test_bfloat16(self, vlm, whole, tmp_path):
        streamed, kept = ask(vlm, tmp_path, dtype="bfloat16"), gl.collect(vlm, PAIRS, GREY, batch_size=3, dtype="bfloat16")
        assert streamed.states.dtype == torch.bfloat16
        assert torch.equal(streamed.states, whole.states.bfloat16()) and torch.equal(streamed.states, kept.states)
        assert (tmp_path / "states.safetensors").stat().st_size < 10 * 8 * 128 * 2 + 5000
        full, half = directions.ssd(whole), directions.ssd(streamed)
        assert half.vectors.dtype == torch.float32 and (full.vectors * half.vectors).sum(-1).min() > 0.999

    def test_heads_and_sites_without_layers(self, vlm, tmp_path):
        for name, site in (("z", Site("z", (5, 2), "all")), ("final", Site("ln_final.hook_out"))):
            streamed = ask(vlm, tmp_path / name, site=site)
            expected = gl.collect(vlm, PAIRS, GREY, site=site, batch_size=3)
            assert torch.equal(Activations.load(tmp_path / name).states, expected.states)
            assert (streamed.layers, streamed.positions) == (expected.layers, expected.positions)


class TestResume:
    @pytest.mark.parametrize("rows", [2, 5])
    def test_states_of_another_run_are_refused(self, tmp_path, rows):
        states = gaussian(0, 5, 2, 3, dtype=torch.float32)
        for name in ("one", "other"):
            with StateStore(tmp_path / name, {"called": name}, 5) as store:
                store.write([*range(rows)], states[:rows], {})
                if rows == 5:
                    store.finish()
        file = "states.safetensors" if rows == 5 else "states.partial"
        for copied in (file, "records.jsonl"):
            shutil.copy(tmp_path / "other" / copied, tmp_path / "one" / copied)
        with pytest.raises(errors.StorageError, match=r"which is of another run than manifest.json beside it"):
            StateStore(tmp_path / "one", {"called": "one"}, 5)
        with StateStore(tmp_path / "other", {"called": "other"}, 5) as store:
            assert len(store.missing) == 5 - rows

    @pytest.mark.parametrize(
        ("where", "call"),
        [
            ("guardlens.models.hooked_model.HookedModel.run", 3),
            ("guardlens.results.run_directory.RunDirectory.append", 3),
            ("os.fsync", 5),
            ("os.fsync", 6),
        ],
        ids=["in a run", "before the record", "amid the data", "amid the record"],
    )
    def test_only_what_is_missing_is_computed(self, vlm, whole, tmp_path, monkeypatch, sizes, where, call):
        calls, real = [], pkgutil.resolve_name(where)

        def killed(*args, **options):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return real(*args, **options)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(where, killed)
            ask(vlm, tmp_path)
        records = tmp_path / "records.jsonl"
        if call == 6:
            records.write_bytes(records.read_bytes()[:-4])
        with pytest.raises(errors.StorageError, match=r"whose states are not all there yet[\s\S]*Next: repeat the call that made it"):
            Activations.load(tmp_path)
        done = {row for line in records.read_text().splitlines()[: 2 if call == 6 else 9] for row in json.loads(line)["rows"]}
        assert len(done) == 6
        sizes.clear()
        with monkeypatch.context() as patch:
            asked, batch = [], type(vlm).batch
            patch.setattr(type(vlm), "batch", lambda self, queries, *a, **o: asked.append(queries) or batch(self, queries, *a, **o))
            resumed = ask(vlm, tmp_path)
        assert sizes == [3, 1]
        assert {query.id for part in asked for query in part} == {TEXTS[row].id for row in range(10) if row not in done}
        torch.testing.assert_close(resumed.states, whole.states, atol=1e-4, rtol=0)
        assert torch.equal(Activations.load(tmp_path).states, resumed.states)

    def test_a_kill_before_the_file_has_its_name(self, vlm, whole, tmp_path, monkeypatch, sizes):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(StateStore, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            ask(vlm, tmp_path)
        sizes.clear()
        assert torch.equal(ask(vlm, tmp_path).states, whole.states) and sizes == []

    def test_a_finished_one_runs_nothing(self, vlm, whole, tmp_path, sizes):
        ask(vlm, tmp_path)
        sizes.clear()
        assert torch.equal(ask(vlm, tmp_path, batch_size=None).states, whole.states) and sizes == []

    def test_nan_is_named_and_not_stored(self, vlm, tmp_path):
        with pytest.raises(errors.NumericsError, match=r"infinity[\s\S]*layer 2|infinity[\s\S]*blocks.2"):
            ask(vlm, tmp_path, PAIRS, GREY, iv.linear(torch.full((128, 128), 3e38)).at(layers=2))
        assert not (tmp_path / "records.jsonl").exists()

    def test_another_call_is_refused(self, vlm, basis, tmp_path):
        image = TEXTS[0].images[0]
        other = dataclasses.replace(TEXTS[0], images=(image.transpose(0),))
        assert other.images[0].tobytes() != image.tobytes()
        ask(vlm, tmp_path, TEXTS[:2])
        refused = {
            "queries": [
                (TEXTS[1:3], GREY), (TEXTS[1::-1], GREY), ([other, TEXTS[1]], GREY),
                ([dataclasses.replace(TEXTS[0], label=None), TEXTS[1]], GREY),
            ],
            r"presentations\.[a-z .]+": [(TEXTS[:2], text_only), (TEXTS[:2], presentations.blank("grey", 16))],
            "intervention": [(TEXTS[:2], GREY, iv.project_out(basis))],
        }  # fmt: skip
        for key, calls in refused.items():
            for call in calls:
                with pytest.raises(errors.MismatchError, match=rf"made with {key} = .*\nExpected {key} = .*\nNext: use another directory"):
                    ask(vlm, tmp_path, *call)
        for key, option in {"site": {"site": Site(layers=(1,))}, "dtype": {"dtype": "bfloat16"}}.items():
            with pytest.raises(errors.MismatchError, match=f"made with {key} = "):
                ask(vlm, tmp_path, TEXTS[:2], GREY, **option)

    def test_another_model_is_refused(self, vlm, llm, tmp_path):
        ask(vlm, tmp_path, ["how to mend the hat ?"], text_only)
        with pytest.raises(errors.MismatchError, match=r'made with model.kind = "LlavaForC.*\nExpected model.kind = "LlamaForC'):
            ask(llm, tmp_path, ["how to mend the hat ?"], text_only)

    def test_a_custom_intervention_is_refused(self, vlm, tmp_path):
        with pytest.raises(errors.StorageError, match="a function without a name"):
            ask(vlm, tmp_path, TEXTS, GREY, iv.custom(lambda states, context: states))

    def test_a_directory_of_something_else(self, tmp_path):
        with pytest.raises(errors.StorageError, match=r"a directory without states\.safetensors"):
            Activations.load(tmp_path)


MEMORY = r"""
import re, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from guardlens import Query
from guardlens.experiments import collection
from guardlens.experiments.collection import collect
from guardlens.models.hooked_model import HookedModel
from guardlens.hooks import Site
from guardlens.results.provenance import Provenance

WIDTH, LAYERS = 8192, 8
collection.configuration = lambda *_: {}  # the stub has no weights to tell it by


class Stub(HookedModel):
    id, provenance, cfg, hf = "stub@1", Provenance("stub@1"), SimpleNamespace(n_layers=LAYERS, image_layers=()), None

    def __init__(self):
        pass

    def batch(self, queries, presentation):
        batch = SimpleNamespace(queries=queries)
        batch.after = lambda prefix: batch
        return batch

    def share(self, batch):
        return None

    def run(self, batch, intervention, *, read, logits):
        numbers = torch.tensor([float(query.id) for query in batch.queries])
        return SimpleNamespace(reads={read[0]: numbers[None, :, None, None].expand(1, -1, LAYERS, WIDTH).contiguous()})


def peak(n, out):
    states = collect(Stub(), [Query("x", id=str(i)) for i in range(n)], out=out, batch_size=20).states
    grown = int(re.search("VmHWM: *([0-9]+) kB", Path("/proc/self/status").read_text().replace("\t", " "))[1]) / 1024
    assert states.shape == (n, LAYERS, WIDTH) and [int(states[i, 3, 7]) for i in (0, n // 2, n - 1)] == [0, n // 2, n - 1]
    return grown


sizes = [peak(100, f"{sys.argv[1]}/warm"), peak(100, f"{sys.argv[1]}/one"), peak(400, f"{sys.argv[1]}/four"), peak(400, None)]
print(*sizes)
"""


@linux
def test_memory_does_not_grow_with_the_number_of_queries(tmp_path):
    """100 queries have 25 MiB of states, 400 have 100 MiB. Kept in memory, they show in the process's peak; streamed, they don't."""
    given_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed no longer counts, however it was handed out
    shown = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True, env=given_back).stdout
    _, one, four, kept = map(float, shown.split())
    assert four - one < 8 and kept - four > 70


def test_queries_with_paths_of_images(vlm, tmp_path):
    TEXTS[0].images[0].save(tmp_path / "a.png")
    queries = [Query("how to mend the hat ?", images=(str(tmp_path / "a.png"),))]
    streamed = ask(vlm, tmp_path / "s", queries, presentations.own_images)
    assert torch.equal(streamed.states, gl.collect(vlm, queries, presentations.own_images).states)
    assert streamed.queries == tuple(queries) and Activations.load(tmp_path / "s").queries[0].images == ()
