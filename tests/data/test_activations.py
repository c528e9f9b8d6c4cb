import dataclasses

import numpy as np
import pytest
import torch

from guardlens import Activations, Query, errors
from guardlens.results.files import save_tensors
from guardlens.results.provenance import Provenance
from tests.strategies import gaussian, make_activations, make_pairs


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_names_layer_and_query(bad):
    states = torch.zeros(2, 2, 3)
    states[1, 0, 2] = states[1, 1, 0] = bad
    with pytest.raises(
        errors.NumericsError, match=r"NaN or infinity in layer 4, query 'b' \(2 states in all\)[\s\S]*Next: load the model in bfloat16"
    ):
        Activations(states, (4, 7), (Query("x", id="a"), Query("y", id="b")))


def test_axes_must_match():
    with pytest.raises(errors.MismatchError, match=r"states of shape \(3, 2, 4\) for 2 queries and 2 layers"):
        Activations(torch.zeros(3, 2, 4), (0, 1), make_pairs(1).queries)


def test_pairs_are_found_in_any_order():
    activations = make_activations(pairs=4)
    order = [6, 0, 3, 2, 7, 1, 5, 4]
    shuffled = Activations(
        activations.states[order], activations.layers, (*(activations.queries[i] for i in order), Query("alone", "harmful"))[:8]
    )
    harmful, harmless = shuffled.pairs()
    twins = [(shuffled.queries[a].text, shuffled.queries[b].text) for a, b in zip(harmful.tolist(), harmless.tolist(), strict=True)]
    assert sorted(twins) == [(f"bad {i}", f"good {i}") for i in range(4)]
    assert shuffled.harmful.tolist() == [i < 4 for i in order]


def test_pairs_that_lack_a_twin_are_counted():
    queries = (*make_pairs(3).queries, Query("alone", "harmful", pair="x"), Query("of no pair", "harmless"))
    activations = Activations(gaussian(0, 8, 1, 4).float(), (0,), queries)
    with pytest.warns(UserWarning, match="1 of 4 pairs lack a twin and are left out"):
        harmful, harmless = activations.pairs()
    assert (harmful.tolist(), harmless.tolist()) == ([0, 1, 2], [3, 4, 5])


def test_reprs_are_short():
    assert repr(make_activations(presentation="blank grey")) == (
        "Activations(resid_post at 'last', 'blank grey', 10 queries, 2 layers, d_model 6)"
    )


def test_no_pairs():
    with pytest.raises(errors.QueryError, match=r"2 queries without a single pair[\s\S]*Next: collect QueryPairs"):
        Activations(torch.zeros(2, 1, 3), (0,), (Query("a", "harmful"), Query("b", "harmless"))).pairs()


def test_at_goes_by_the_layer_not_the_index():
    activations = dataclasses.replace(make_activations(), layers=(3, 8))
    assert torch.equal(activations.at(8), activations.states[:, 1])
    with pytest.raises(errors.SiteError, match=r"Found states of resid_post at layer 1\.\nExpected one of the layers \[3, 8\]"):
        activations.at(1)


@pytest.mark.parametrize("positions", ["image", (1, None)])
def test_round_trip(tmp_path, positions):
    told = {"presentation": "blank grey", "intervention": "add(ssd)", "shows_images": True, "provenance": Provenance("m@1", llm="l@2")}
    made = make_activations(seed=4, hook="resid_mid", positions=positions, **told)
    made.save(tmp_path / "a")
    loaded = Activations.load(tmp_path / "a")
    assert torch.equal(loaded.states, made.states)
    for name in ("layers", "queries", "hook", "positions", "presentation", "provenance", "intervention", "shows_images"):
        assert getattr(loaded, name) == getattr(made, name)


def test_images_are_left_out_when_saved(tmp_path):
    Activations(torch.zeros(1, 1, 2), (0,), (Query("a", images=("x.png",)),)).save(tmp_path / "a")
    assert Activations.load(tmp_path / "a").queries == (Query("a"),)


def test_another_file_is_refused(tmp_path):
    save_tensors(tmp_path / "t", "directions", {"vectors": gaussian(0, 2)}, {})
    with pytest.raises(errors.StorageError, match=r"with directions, format 2.\nExpected activations"):
        Activations.load(tmp_path / "t")


def test_select_takes_queries_with_their_states():
    made = make_activations(seed=2)
    picked = made.select([7, 1])
    assert torch.equal(picked.states, made.states[[7, 1]]) and picked.queries == (made.queries[7], made.queries[1])
    assert picked.layers == made.layers
    masked = made.select(made.harmful)
    assert torch.equal(masked.states, made.states[:5]) and masked.harmful.all()
    for nothing in ([], made.harmful & ~made.harmful):
        with pytest.raises(errors.QueryError, match="a selection without a single query"):
            made.select(nothing)


@pytest.mark.parametrize(
    "which",
    [
        np.ones(3, bool),
        np.ones(12, bool),
        np.ones((10, 1), bool),
        [0.9, 1.9],
        ["3"],
        np.array([float("nan")]),
        [10],
        [-11],
        [[0, 1]],
        [None],
        [True, False],
    ],
)
def test_what_selects_no_queries(which, unchecked):
    with pytest.raises(errors.QueryError, match="Expected a mask of 10, or whole numbers from 0 to 9"):
        make_activations().select(which)


@pytest.mark.parametrize(
    "which",
    [[1, 9], (1, 9), np.array([1, 9]), np.array([1, 9], np.uint8), iter([1, 9]), [1, -1], np.isin(np.arange(10), [1, 9]), {1: 0, 9: 0}],
)
def test_what_selects_two_queries(which, unchecked):
    made = make_activations()
    assert torch.equal(made.select(which).states, made.states[[1, 9]])


def test_a_query_counted_from_the_end_is_the_same_query():
    made = make_activations(pairs=2).select([0, 2, -4, -2])
    assert [len(side) for side in made.pairs()] == [2, 2]


def test_a_pair_with_a_side_twice():
    queries = (*make_pairs(2).queries, Query("bad too", "harmful", pair="pair 0"))
    with pytest.raises(errors.QueryError, match="two harmful queries in pair 'pair 0'"):
        Activations(gaussian(0, 5, 1, 4).float(), (0,), queries).pairs()


@pytest.mark.parametrize("layers", [(0, 0), (0.0, 1.0), ("0", "1"), (-1, 0)])
def test_layers_that_are_none(layers, unchecked):
    with pytest.raises(errors.SiteError):
        Activations(torch.zeros(2, 2, 4), layers, make_pairs(1).queries)


def test_states_are_floating_point_numbers(unchecked):
    with pytest.raises(errors.NumericsError):
        Activations(torch.zeros(2, 2, 4, dtype=torch.int64), (0, 1), make_pairs(1).queries)
    assert Activations(torch.zeros(2, 2, 4), np.array([3, 1]), make_pairs(1).queries).layers == (3, 1)


def test_a_pair_that_is_selected_twice_counts_twice():
    made = make_activations(seed=2)
    chosen = np.array([3, 0, 3, 3])
    harmful, harmless = made.select(np.concatenate([chosen, chosen + 5])).pairs()
    states = made.select(np.concatenate([chosen, chosen + 5])).states
    assert torch.equal(states[harmful] - states[harmless], (made.states[:5] - made.states[5:])[chosen])
