import dataclasses

import numpy as np
import pytest
import torch
from matplotlib import pyplot

from guardlens import Activations, Directions, Query, directions, errors, gates
from guardlens import interventions as iv
from guardlens.storage import Provenance
from tests.strategies import apply, gaussian, make_activations, make_directions, make_pairs


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
    with pytest.raises(errors.SiteError, match=r"layer 0 for directions of \[1, 2\]"):
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
    still = make_activations()
    assert not directions.diff_in_means(dataclasses.replace(still, states=torch.ones_like(still.states))).vectors.any()


def test_ssd_says_how_many_pairs_it_uses():
    queries = tuple(Query(q.text, q.label, pair=q.pair) for q in make_pairs(5).queries)[:-2]
    states = gaussian(0, 8, 1, 6).float()
    with pytest.warns(UserWarning, match="2 of 5 pairs lack a twin"):
        found = directions.ssd(Activations(states, (0,), queries), rank=3)
    expected = directions.ssd(Activations(states[[0, 1, 2, 5, 6, 7]], (0,), (*queries[:3], *queries[5:])), rank=3)
    assert torch.equal(found.vectors, expected.vectors)


class TestFromVectors:
    def test_shapes_and_norms(self):
        one = directions.from_vectors(torch.tensor([3.0, 0, 4]))
        assert one.vectors.tolist() == [[[pytest.approx(0.6), 0, pytest.approx(0.8)]]] and one.layers is None and one.rank == 1
        each = directions.from_vectors(2 * torch.eye(3)[:2], layers=[4, 7], hook="attn_out", model="m@1", method="mine")
        assert each.layers == (4, 7) and each.at(7).tolist() == [[0, 1, 0]]
        assert (each.hook, each.provenance.model, each.method) == ("attn_out", "m@1", "mine")
        several = directions.from_vectors(torch.stack([torch.eye(3)[:2], -torch.eye(3)[1:]]), layers=range(2))
        assert several.rank == 2 and several.at(1).tolist() == [[0, -1, 0], [0, 0, -1]]

    def test_an_edit_of_them(self):
        states, vector = gaussian(0, 4, 6).float(), gaussian(1, 6).float()
        plan = iv.add(directions.from_vectors(vector), 2.0)
        torch.testing.assert_close(apply(plan, states), states + 2 * vector / vector.norm())

    def test_a_gate_needs_a_number(self):
        made = directions.from_vectors(torch.tensor([3.0, 4]))
        with pytest.raises(errors.PlanError, match=r"without class means\.\nExpected a threshold in numbers"):
            gates.harmful(made)
        assert gates.harmful(made, 0.5).decide(lambda state: torch.tensor([[1.0, 0], [0, 0.5]]), 0).tolist() == [True, False]

    def test_refusals(self):
        with pytest.raises(errors.NumericsError, match="unit vectors at right angles"):
            directions.from_vectors(torch.ones(1, 2, 3), layers=[0])
        with pytest.raises(errors.MismatchError, match="one basis per layer"):
            directions.from_vectors(torch.eye(3))


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
