import dataclasses
import json

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from safetensors.torch import save_file

from guardlens import Activations, Directions, Query, defences, directions, errors, gates
from guardlens import interventions as iv
from guardlens.results.files import FORMAT, checksum, digest, load_tensors, save_tensors
from guardlens.results.provenance import Provenance
from tests.strategies import gaussian, make_activations, make_directions, make_pairs


def test_one_layer_serves_all_and_indexing_goes_by_the_layer():
    made = make_directions(numbers=(3, 8))
    one = made[8]
    assert one.layers is None and torch.equal(one.at(0), made.vectors[1]) and torch.equal(one.at(8), made.at(8))
    assert torch.equal(one.harmful_mean[0], made.harmful_mean[1]) and one.method == "test[8]"
    assert torch.equal(made.truncate(1).vectors, made.vectors[:, :1])


def test_coordinates_and_midpoints():
    made = make_directions(dtype=torch.float32)
    activations = make_activations(seed=3)
    expected = np.stack([activations.states[:, i].numpy() @ made.vectors[i].numpy().T for i in (0, 1)], 1)
    assert made.coordinates(activations).numpy() == pytest.approx(expected, abs=1e-5)
    reverse = dataclasses.replace(activations, layers=(1, 0))
    assert made.coordinates(reverse)[:, 0].numpy() == pytest.approx(activations.states[:, 0].numpy() @ made.at(1).numpy().T, abs=1e-5)
    middle = [float(((made.harmful_mean[i] + made.harmless_mean[i]) / 2) @ made.vectors[i, 0]) for i in (0, 1)]
    assert made.midpoints.tolist() == pytest.approx(middle, abs=1e-6)


def test_cosine_of_first_directions_layer_by_layer():
    one, two = make_directions(), make_directions(seed=7)
    expected = [float(one.vectors[i, 0] @ two.vectors[i, 0]) for i in (0, 1)]
    assert one.cosine(two).tolist() == pytest.approx(expected) == two.cosine(one).tolist() and abs(expected[0]) < 0.99
    assert one.cosine(one).tolist() == pytest.approx([1, 1])
    assert one.cosine(two[1]).tolist() == pytest.approx([float(v @ two.vectors[1, 0]) for v in one.vectors[:, 0]])
    assert two[1].cosine(one[0]).tolist() == pytest.approx([float(two.vectors[1, 0] @ one.vectors[0, 0])])
    reverse = dataclasses.replace(two, layers=(1, 0), vectors=two.vectors.flip(0))
    assert one.cosine(reverse).tolist() == pytest.approx(expected)


def test_cosine_of_what_does_not_compare():
    with pytest.raises(errors.MismatchError, match=r"directions of the widths 6 and 8"):
        make_directions().cosine(make_directions(width=8))
    with pytest.raises(errors.MismatchError, match=r"of the model n@2"):
        make_directions(model="m@1").cosine(make_directions(model="n@2"))
    with pytest.raises(errors.MismatchError, match=r"of the hook resid_post, at z"):
        make_directions().cosine(dataclasses.replace(make_directions(), hook="z"))
    with pytest.raises(errors.SiteError, match=r"at layer 0\.\nExpected one of the layers \[1, 2\]"):
        make_directions().cosine(make_directions(numbers=(1, 2)))


def test_plot_coordinates_shows_each_run_at_the_layer():
    made = make_directions(dtype=torch.float32)
    runs = {"first": make_activations(seed=3), "second": make_activations(seed=4)}
    axes = made.plot_coordinates(runs, 1)
    assert [ax.get_title(loc="left") for ax in axes] == ["first", "second"] and axes[1].get_xlabel() == "projection on $v_1$, layer 1"
    for ax, run in zip(axes, runs.values(), strict=True):
        coordinates = run.states[:, 1].numpy() @ made.vectors[1, 0].numpy()
        means = sorted(float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() == "^")
        assert means == pytest.approx(sorted([coordinates[:5].mean(), coordinates[5:].mean()]), abs=1e-5)
        dashed = [float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() != "^"]
        assert dashed == pytest.approx([float(made.midpoints[1])])
    pyplot.close(axes[0].figure)


@pytest.mark.parametrize("numbers", [(0, 4), None])
def test_round_trip(tmp_path, numbers):
    made = make_directions(layers=2 if numbers else 1, numbers=numbers, model="m@1")
    made.save(tmp_path / "d")
    loaded = Directions.load(tmp_path / "d")
    assert loaded.fingerprint == made.fingerprint != make_directions(seed=9).fingerprint
    for name in ("vectors", "harmful_mean", "harmless_mean", "spectrum"):
        assert torch.equal(getattr(loaded, name), getattr(made, name))
    assert (loaded.layers, loaded.method, loaded.hook, loaded.provenance) == (made.layers, made.method, made.hook, made.provenance)


def test_provenance_and_hook_are_the_activations_own():
    activations = make_activations(hook="resid_mid", provenance=Provenance("m@1"))
    for made in (directions.ssd(activations), directions.diff_in_means(activations)):
        assert made.hook == "resid_mid" and made.provenance is activations.provenance


def test_rows_that_are_not_orthonormal_are_refused():
    made = make_directions(width=20)
    for vectors in (2 * made.vectors, made.vectors[:, :1].expand(2, 2, 20), gaussian(1, 2, 1, 20), made.vectors * float("nan")):
        with pytest.raises(errors.NumericsError, match=r"directions whose products are .* off.*\nExpected unit vectors at right angles"):
            dataclasses.replace(made, vectors=vectors)
    dataclasses.replace(made, vectors=made.vectors.to(torch.bfloat16).double())


class TestWithoutADirection:
    """Layer 1 of `still` has the same states for twins, and layer 0 has differences of rank 2."""

    @pytest.fixture
    def still(self):
        made = make_activations(seed=5, pairs=4)
        states = made.states.clone()
        states[:4, 0] = states[4:, 0] + (gaussian(6, 4, 2) @ gaussian(7, 2, 6)).float()
        states[:4, 1] = states[4:, 1]
        return dataclasses.replace(made, states=states)

    @pytest.fixture
    def flat(self, still):
        with pytest.warns(UserWarning, match=r"^ssd\(rank=1\) has fewer directions than rows \(0 of 1 at layer 1\)"):
            return directions.ssd(still)

    def test_twins_that_do_not_differ_have_no_direction(self, still, flat):
        assert not flat.at(1).any() and flat.exists.tolist() == [True, False]
        differences = (still.states[:4] - still.states[4:]).double().numpy()
        assert abs(float(np.linalg.svd(differences[:, 0])[2][0] @ flat.at(0)[0].double().numpy())) == pytest.approx(1, abs=1e-6)
        assert not flat.spectrum[1].any() and not flat.shares[1].any() and flat.shares[0].sum() == pytest.approx(1)
        assert flat.midpoints.isnan().tolist() == [False, True]
        assert flat.cosine(make_directions()).isnan().tolist() == [False, True]
        assert make_directions().cosine(flat).isnan().tolist() == [False, True]
        control = directions.random(flat)
        assert control.exists.tolist() == [True, False] and control.at(0).norm() == pytest.approx(1)

    def test_nor_has_the_difference_of_their_means(self, still):
        with pytest.warns(UserWarning, match=r"^diff_in_means\(\) has fewer .* \(0 of 1 at layer 1\)"):
            found = directions.diff_in_means(still)
        assert found.exists.tolist() == [True, False] and found.at(0).norm() == pytest.approx(1)

    @pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
    def test_rows_beyond_the_rank_of_the_differences_are_zero(self, still, scale):
        with pytest.warns(UserWarning, match=r"2 of 3 at layer 0, 0 of 3 at layer 1"):
            found = directions.ssd(dataclasses.replace(still, states=still.states * scale), rank=3)
        differences = (still.states[:4, 0] - still.states[4:, 0]).double().numpy()
        assert np.linalg.matrix_rank(differences, tol=1e-5) == 2
        rows = np.linalg.svd(differences)[2][:2]
        assert found.at(0).norm(dim=-1).tolist() == pytest.approx([1, 1, 0])
        V = found.at(0)[:2].double().numpy()
        assert V.T @ V == pytest.approx(rows.T @ rows, abs=1e-5)

    def test_one_pair_six_times_has_one_direction(self):
        made = make_activations(pairs=1).select([0] * 6 + [1] * 6)
        with pytest.warns(UserWarning, match="1 of 3 at layer 0, 1 of 3 at layer 1"):
            assert directions.ssd(made, rank=3).vectors.any(-1).tolist() == [[True, False, False]] * 2

    def test_rounding_is_no_difference(self, still):
        """As of one text in two batches: states that differ in their last bits."""
        states = still.states.clone()
        states[:4, 1] *= 1 + 2e-7 * gaussian(1, 4, 6).float()
        with pytest.warns(UserWarning, match="0 of 1 at layer 1"):
            assert not directions.ssd(dataclasses.replace(still, states=states)).at(1).any()

    @pytest.mark.parametrize(
        "use",
        [
            iv.project_out,
            iv.add,
            iv.add_relative,
            lambda made: iv.replace(made, iv.text_twin),
            gates.harmful,
            lambda made: gates.harmful(made, 0.0),
            defences.vlm_guard,
            lambda made: gates.threshold_at_fpr(made, make_activations()),
            lambda made: made.coordinates(make_activations()),
            lambda made: made.plot_coordinates({"text": make_activations()}, 1),
        ],
    )
    def test_nothing_acts_along_it(self, flat, use):
        """An intervention that changes nothing and a gate that never opens must not look like a guard."""
        with pytest.raises(errors.NumericsError, match=r"'ssd\(rank=1\)', which are zero at the layers \[1\]"):
            use(flat)
        assert iv.project_out(flat[0]).steps and gates.harmful(flat[0]) is not None
        with pytest.raises(errors.NumericsError, match=r"'ssd\(rank=1\)\[1\]', which are zero\.\nExpected a direction"):
            iv.project_out(flat[1])


def test_states_of_another_model():
    """As bfloat16 states of the very checkpoint are; and the LLM beside a VLM is no other model."""
    made = make_directions(model="llm@1", dtype=torch.float32)
    other = make_activations(provenance=Provenance("llm@2"))
    for use in (
        made.coordinates,
        lambda states: gates.threshold_at_fpr(made, states),
        lambda states: made.plot_coordinates({"a": make_activations(), "b": states}, 1),
    ):
        with pytest.raises(errors.MismatchError, match=r"of the model llm@1\.\nExpected those of llm@2"):
            use(other)
    assert made.coordinates(make_activations(provenance=Provenance("llm@1"))).shape == (10, 2, 2)
    assert made.coordinates(make_activations(provenance=Provenance("vlm@3", llm="llm@1"))).shape == (10, 2, 2)
    assert made.coordinates(make_activations()).shape == (10, 2, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"harmful_mean": torch.zeros(2, 5)},
        {"harmless_mean": torch.zeros(3, 6)},
        {"harmless_mean": torch.zeros(6)},
        {"spectrum": torch.zeros(3, 1)},
        {"vectors": torch.ones(2, 1, 6).long()},
        {"vectors": torch.zeros(2, 0, 6)},
    ],
)
def test_parts_of_other_shapes(wrong, unchecked):
    with pytest.raises(errors.MismatchError):
        dataclasses.replace(make_directions(rank=1), **wrong)


def test_a_fingerprint_in_any_precision():
    made = make_directions()
    half = dataclasses.replace(made, vectors=made.vectors.to(torch.bfloat16))
    assert len(half.fingerprint) == 12 and half.fingerprint != made.fingerprint


class TestErrors:
    @pytest.mark.parametrize("rank", [1.0, "1", True, None, -1])
    def test_a_rank_that_is_none(self, rank, unchecked):
        for use in (lambda: directions.ssd(make_activations(), rank), lambda: make_directions().truncate(rank)):
            with pytest.raises(errors.NumericsError):
                use()

    def test_rank(self):
        with pytest.raises(
            errors.NumericsError, match=r"Found rank 6 of 5 pairs\.\nExpected a rank from 1 to 5\.\nNext: ask for a lower rank"
        ):
            directions.ssd(make_activations(), rank=6)
        with pytest.raises(errors.NumericsError, match=r"a rank from 1 to 4"):
            directions.ssd(make_activations(width=4), rank=0)
        with pytest.raises(errors.NumericsError, match=r"Found rank 3.\nExpected a rank from 1 to 2"):
            make_directions().truncate(3)

    def test_labels_and_pairs(self):
        states = torch.zeros(2, 1, 3)
        with pytest.raises(errors.QueryError, match=r"query 'u' without a label"):
            directions.diff_in_means(Activations(states, (0,), (Query("a", "harmful"), Query("b", id="u"))))
        with pytest.raises(errors.QueryError, match=r"2 queries that are all harmful"):
            directions.diff_in_means(Activations(states, (0,), make_pairs(2).harmful))
        with pytest.raises(errors.QueryError, match=r"without a single pair"):
            directions.ssd(Activations(states, (0,), make_pairs(2).harmful))

    def test_layers_and_widths(self):
        with pytest.raises(errors.SiteError, match=r"at layer 2\.\nExpected one of the layers \[0, 1\]\.\nNext: collect that layer too"):
            make_directions().at(2)
        with pytest.raises(errors.MismatchError, match=r"states of width 4.\nExpected width 6"):
            make_directions().coordinates(make_activations(width=4))
        with pytest.raises(errors.MismatchError, match=r"one basis per layer"):
            dataclasses.replace(make_directions(), layers=(1,))


HEADERS = {
    "null": None,
    "a list": [],
    **{f"no {name}": {name: ...} for name in ("layers", "method", "hook", "provenance")},
    "a key more in the provenance": {"provenance": {"model": "", "cuda": "12"}},
    "no provenance": {"provenance": None},
    "layers a text": {"layers": "012"},
    "layers a number": {"layers": 5},
    "fewer layers": {"layers": [0]},
    "layers of floats": {"layers": [0.5, 1.5]},
    "a hook that there is not": {"hook": "resid_pots"},
    "a model that is no text": {"provenance": {"model": 5}},
}


TENSORS = {
    "one missing": {"spectrum": None},
    "one more": {"extra": torch.ones(1)},
    "vectors of two axes": {"vectors": torch.ones(2, 6)},
    "whole numbers": {"vectors": torch.ones(2, 1, 6).long()},
    "nan": {"vectors": torch.full((2, 1, 6), float("nan"))},
    "means of another width": {"harmful_mean": torch.ones(2, 3)},
    "means of other layers": {"harmless_mean": torch.ones(3, 6)},
    "means of one axis": {"harmful_mean": torch.ones(6)},
}


class TestFiles:
    """A file is read like directions that are made, or refused; also where its checksums are right, as of other code."""

    @pytest.fixture
    def saved(self, tmp_path):
        unit = torch.nn.functional.normalize(torch.ones(2, 1, 6), dim=-1)
        Directions(unit, (0, 1), torch.ones(2, 6), -torch.ones(2, 6), torch.ones(2, 3), "made").save(tmp_path / "d")
        return load_tensors(tmp_path / "d", "directions")

    @pytest.mark.parametrize("change", HEADERS)
    def test_headers(self, saved, tmp_path, change):
        tensors, header = saved
        given = HEADERS[change]
        changed = {name: value for name, value in (header | given).items() if value is not ...} if isinstance(given, dict) else given
        text = json.dumps(
            {"format": FORMAT, "kind": "directions", "header": changed, "tensors": {n: checksum(t) for n, t in tensors.items()}}
        )
        save_file(tensors, tmp_path / "e", metadata={"guardlens": text, "digest": digest(text.encode())})
        with pytest.raises(errors.StorageError):
            Directions.load(tmp_path / "e")

    @pytest.mark.parametrize("change", TENSORS)
    def test_tensors(self, saved, tmp_path, change):
        tensors, header = saved
        changed = {name: tensor for name, tensor in (tensors | TENSORS[change]).items() if tensor is not None}
        save_tensors(tmp_path / "e", "directions", changed, header)
        with pytest.raises(errors.StorageError):
            Directions.load(tmp_path / "e")

    def test_flipped_signs(self, saved, tmp_path):
        tensors, _ = saved
        data = bytearray((tmp_path / "d").read_bytes())
        place = data.rindex(tensors["vectors"].numpy().tobytes()) + 3
        data[place] ^= 0x80
        (tmp_path / "d").write_bytes(bytes(data))
        with pytest.raises(errors.StorageError, match=r"changed after it was saved"):
            Directions.load(tmp_path / "d")

    def test_half_precision(self, saved, tmp_path):
        tensors, header = saved
        halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        save_tensors(tmp_path / "e", "directions", halves, header)
        loaded = Directions.load(tmp_path / "e")
        assert loaded.vectors.dtype == torch.bfloat16 and len(loaded.fingerprint) == 12
