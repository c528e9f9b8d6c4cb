import dataclasses
import hashlib

import numpy as np
import pytest
import torch

from guardlens import Activations, Directions, Query, directions, errors, gates
from guardlens import interventions as iv
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
        intervention = iv.add(directions.from_vectors(vector), 2.0)
        torch.testing.assert_close(apply(intervention, states), states + 2 * vector / vector.norm())

    def test_a_gate_needs_a_number(self):
        made = directions.from_vectors(torch.tensor([3.0, 4]))
        with pytest.raises(errors.InterventionError, match=r"no class means, and so no midpoint\.\nExpected a threshold in numbers"):
            gates.harmful(made)
        assert gates.harmful(made, 0.5).decide(lambda state: torch.tensor([[1.0, 0], [0, 0.5]]), 0).tolist() == [True, False]

    @pytest.mark.parametrize(
        "vectors",
        [
            torch.tensor([3e30, 4e30]),
            torch.tensor([3e-30, 4e-30]),
            torch.tensor([3e-7, 4e-7]).half(),
            torch.tensor([3e200, 4e200], dtype=torch.float64),
            torch.tensor([3, 4]),
            np.array([3.0, 4.0]),
            np.float32([[3, 4]]),
            [3, 4],
            torch.tensor([3.0, 4.0], requires_grad=True),
        ],
    )
    def test_any_size_any_numbers(self, vectors):
        made = directions.from_vectors(vectors)
        own = torch.as_tensor(vectors).detach().double().reshape(-1) / torch.as_tensor(vectors).detach().double().abs().max()
        assert made.at(0)[0].tolist() == pytest.approx((own / own.norm()).tolist(), abs=1e-7)
        assert made.at(0)[0].norm() == pytest.approx(1, abs=1e-6)

    @pytest.mark.parametrize(
        ("vectors", "said"),
        [
            (torch.zeros(3), "zero or not finite"),
            (torch.tensor([1e-8, 0]).half(), "zero or not finite"),
            (torch.tensor([[1.0, 0], [0, 0]]), "zero or not finite"),
            (torch.tensor([torch.inf, 0]), "zero or not finite"),
            (torch.tensor([torch.nan, 1]), "zero or not finite"),
            (torch.zeros(0), r"shape \(0,\)"),
            (torch.tensor(1.0), r"shape \(\)"),
            (torch.ones(1, 1, 1, 2), r"shape \(1, 1, 1, 2\)"),
            (torch.ones(2).to_sparse(), "torch.sparse_coo"),
            (torch.ones(2, device="meta"), "on meta"),
            (torch.ones(2) * 1j, "complex"),
            (["a"], "cannot make a tensor of"),
            (None, "cannot make a tensor of"),
            ([[1.0], [1.0, 2.0]], "cannot make a tensor of"),
        ],
    )
    def test_what_is_no_vector(self, vectors, said):
        with pytest.raises((errors.NumericsError, errors.MismatchError), match=said):
            directions.from_vectors(vectors)

    @pytest.mark.parametrize("layers", [[1, 1], [-1, 0], [0.0, 1.0], ["0", "1"], "01", [True, 2], [None, 1], np.array([0.0, 1.0])])
    def test_layers_that_are_none(self, layers, unchecked):
        with pytest.raises(errors.SiteError, match=r"layer=|appears twice"):
            directions.from_vectors(torch.eye(2), layers=layers)

    @pytest.mark.parametrize(
        "layers", [[7, 4], (7, 4), np.array([7, 4]), np.array([7, 4], dtype=np.uint8), iter([7, 4]), torch.tensor([7, 4])]
    )
    def test_layers_keep_their_order_and_are_pythons(self, layers, tmp_path, unchecked):
        made = directions.from_vectors(torch.eye(2), layers=layers)
        assert made.layers == (7, 4) and made.at(4).tolist() == [[0, 1]] and {type(layer) for layer in made.layers} == {int}
        made.save(tmp_path / "d")
        assert Directions.load(tmp_path / "d").layers == (7, 4)

    def test_hooks(self, unchecked):
        assert directions.from_vectors(torch.ones(2), layers=4).layers == (4,)
        assert directions.from_vectors(torch.ones(2), layers=[-1], hook="ln_final").layers == (-1,)
        for hook in ("resid_pots", "blocks.3.hook_resid_post"):
            with pytest.raises(errors.SiteError):
                directions.from_vectors(torch.ones(1, 2), layers=[3], hook=hook)
        with pytest.raises(errors.SiteError):
            directions.from_vectors(torch.ones(2), hook="resid_pots")

    def test_a_model_in_place_of_its_id(self, vlm):
        with pytest.raises(errors.MismatchError, match=r"something of type HookedModel[\s\S]*model\.id"):
            directions.from_vectors(torch.ones(128), model=vlm)

    def test_refusals(self):
        with pytest.raises(errors.NumericsError, match="unit vectors at right angles"):
            directions.from_vectors(torch.ones(1, 2, 3), layers=[0])
        with pytest.raises(errors.MismatchError, match="one basis per layer"):
            directions.from_vectors(torch.eye(3))


def test_they_remember_the_texts_that_made_them(tmp_path):
    activations = make_activations(pairs=3)
    texts = {hashlib.sha256(query.text.encode()).hexdigest()[:12] for query in activations.queries}
    for made in (directions.ssd(activations), directions.diff_in_means(activations)):
        assert set(made.made_from) == texts == set(made[1].made_from)
        made.save(tmp_path / "d")
        assert Directions.load(tmp_path / "d").made_from == made.made_from
        assert directions.random(made).made_from == ()
