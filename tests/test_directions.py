import dataclasses

import numpy as np
import pytest
import torch

from guardlens import Activations, Directions, Query, directions, errors
from guardlens.storage import Provenance
from tests.strategies import make_activations, make_directions, make_pairs


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("pairs", "width"), [(5, 6), (8, 4)])
def test_ssd_equals_numpy_svd_and_the_sign_rule(seed, pairs, width):
    activations = make_activations(seed, pairs, width=width, shift=0.3)
    found = directions.ssd(activations, rank=3)
    for layer in (0, 1):
        states = activations.states[:, layer].double().numpy()
        A = states[:pairs] - states[pairs:]
        _, spectrum, Vt = np.linalg.svd(A, full_matrices=False)
        V = found.at(layer).double().numpy()
        assert np.abs((V * Vt[:3]).sum(1)) == pytest.approx(1, abs=1e-5)
        assert V @ V.T == pytest.approx(np.eye(3), abs=1e-5)
        assert ((A @ V.T).mean(0) > 0).all()
        assert found.spectrum[layer].numpy() == pytest.approx(spectrum, rel=1e-5)
        assert found.harmful_mean[layer].numpy() == pytest.approx(states[:pairs].mean(0), abs=1e-6)
        assert found.harmless_mean[layer].numpy() == pytest.approx(states[pairs:].mean(0), abs=1e-6)
    assert (found.rank, found.d_model, found.layers, found.method) == (3, width, (0, 1), "ssd(rank=3)")


def test_ssd_is_not_centred():
    """Equal differences are all signal: a centred SVD would see nothing."""
    activations = make_activations()
    states = activations.states.clone()
    states[:5] = states[5:] + torch.tensor([0.0, 2, 0, 0, 0, 0])
    found = directions.ssd(dataclasses.replace(activations, states=states))
    torch.testing.assert_close(found.vectors[:, 0], torch.eye(6)[1].expand(2, 6), atol=1e-5, rtol=0)
    assert found.spectrum[0, 0] == pytest.approx(2 * 5**0.5)


def test_diff_in_means_is_the_unit_shift():
    activations = make_activations(pairs=4)
    queries = tuple(Query(q.text, "harmful" if i < 3 else "harmless") for i, q in enumerate(activations.queries))
    found = directions.diff_in_means(dataclasses.replace(activations, queries=queries))
    states = activations.states.numpy().astype(float)
    shift = states[:3].mean(0) - states[3:].mean(0)
    assert found.vectors[:, 0].numpy() == pytest.approx(shift / np.linalg.norm(shift, axis=1, keepdims=True), abs=1e-6)
    assert found.rank == 1 and found.spectrum.shape == (2, 0)


def test_random_is_orthonormal_seeded_and_its_own_in_each_layer():
    like = make_directions(layers=3, rank=2, width=20)
    found = directions.random(like, seed=1)
    torch.testing.assert_close(found.vectors @ found.vectors.transpose(1, 2), torch.eye(2).double().expand(3, 2, 2))
    assert torch.equal(found.vectors, directions.random(like, seed=1).vectors)
    assert not torch.allclose(found.vectors, directions.random(like, seed=2).vectors)
    assert (found.vectors[0] @ found.vectors[1].T).abs().max() < 0.95 and torch.equal(found.harmful_mean, like.harmful_mean)


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


class TestErrors:
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
        with pytest.raises(errors.SiteError, match=r"Found layer 2 for directions of \[0, 1\]\.[\s\S]*Next: collect that layer too"):
            make_directions().at(2)
        with pytest.raises(errors.MismatchError, match=r"states of width 4.\nExpected width 6"):
            make_directions().coordinates(make_activations(width=4))
        with pytest.raises(errors.MismatchError, match=r"one basis per layer"):
            dataclasses.replace(make_directions(), layers=(1,))
