import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guardlens import Query, errors, gates
from guardlens import interventions as iv
from guardlens.data.presentations import text_only
from tests.strategies import gaussian, make_activations, make_directions, seeds

V = make_directions(dtype=torch.float32)


@given(seeds, st.floats(-1, 1, width=32), st.integers(0, 1))
def test_opens_on_the_far_side_of_the_threshold(seed, threshold, layer):
    states = gaussian(seed, 9, 6, dtype=torch.float32)
    opened = gates.harmful(V, threshold).decide(lambda state: states, layer)
    assert opened.tolist() == (states.numpy() @ V.at(layer)[0].numpy() > threshold).tolist()


def test_midpoint_parts_the_class_means():
    gate = gates.harmful(dataclasses.replace(V, harmful_mean=V.harmless_mean + V.vectors[:, 0]))
    for layer in (0, 1):
        means = torch.stack([V.harmless_mean[layer] + share * V.vectors[layer, 0] for share in (0.0, 0.49, 0.51, 1.0)])
        assert gate.decide(lambda state, means=means: means, layer).tolist() == [False, False, True, True]


def test_one_threshold_per_layer_and_a_state_of_its_own_layer():
    states = torch.stack([V.at(0)[0], V.at(1)[0]])
    gate = gates.harmful(V, torch.tensor([0.5, 2.0]))
    assert gate.decide(lambda state: states, 0)[0] and not gate.decide(lambda state: states, 1).any()
    fixed = gates.harmful(V, torch.tensor([0.5, 2.0]), iv.State(layer=0))
    assert torch.equal(fixed.decide(lambda state: states, 1), gate.decide(lambda state: states, 0))
    assert gate.requires == (iv.State(text_only, "resid_post"),) and fixed.requires == (iv.State(hook="resid_post", layer=0),)


@given(st.floats(-0.75, 0.75, width=32), st.floats(-0.75, 0.75, width=32), seeds)
def test_and_or_not(low, high, seed):
    states = gaussian(seed, 9, 6, dtype=torch.float32)
    twin, own = (dataclasses.replace(state, hook="resid_post") for state in (iv.text_twin, iv.own_state))
    a, b = gates.harmful(V, low), gates.harmful(V, high, own)

    def decide(gate):
        return gate.decide(lambda state: states if state == own else -states, 0)

    assert torch.equal(decide(a & b), decide(a) & decide(b))
    assert torch.equal(decide(a | b), decide(a) | decide(b))
    assert torch.equal(decide(~a), ~decide(a))
    assert torch.equal(decide(~(a & b)), decide(~a | ~b))
    assert (a & ~b).requires == (twin, own)


@given(seeds, st.floats(0, 1), st.integers(1, 40))
def test_threshold_at_fpr_lets_at_most_that_rate_through(seed, rate, pairs):
    activations = make_activations(seed, pairs)
    thresholds = gates.threshold_at_fpr(V, activations, rate)
    scores = torch.stack([activations.states[pairs:, i] @ V.at(i)[0] for i in (0, 1)]).numpy()
    expected = [np.quantile(values, 1 - rate, method="higher") for values in scores]
    assert thresholds.tolist() == pytest.approx(expected, abs=1e-6)
    opened = (scores > thresholds[:, None].numpy() + 1e-5).sum(1)
    assert (opened <= rate * pairs + 1e-9).all()
    assert ((scores >= thresholds[:, None].numpy() - 1e-5).sum(1) >= min(rate * pairs, 1)).all()


def test_unlabelled_queries_do_not_count_as_harmless():
    activations = make_activations(pairs=5)
    queries = tuple(Query(q.text, q.label if i != 9 else None) for i, q in enumerate(activations.queries))
    mixed = dataclasses.replace(activations, queries=queries)
    alone = dataclasses.replace(activations, states=activations.states[:9], queries=queries[:9])
    assert torch.equal(gates.threshold_at_fpr(V, mixed, 0.0), gates.threshold_at_fpr(V, alone, 0.0))


def test_errors():
    with pytest.raises(errors.InterventionError, match=r"Found the threshold 'median'\.\nExpected 'midpoint', a number"):
        gates.harmful(V, "median")
    with pytest.raises(errors.SiteError, match=r"harmful\(test, threshold=0.0\) at layer 7\.\nExpected one of the layers \[0, 1\]"):
        gates.harmful(V, 0.0).decide(lambda state: torch.zeros(1, 6), 7)
    with pytest.raises(errors.NumericsError, match=r"a rate of 1.5 over 5 harmless queries"):
        gates.threshold_at_fpr(V, make_activations(), 1.5)
    with pytest.raises(TypeError, match=r"abstract"):
        gates.Gate()


def test_thresholds_follow_the_layers_of_the_directions():
    """Activations with more layers, or in another order, give each direction its own layer's threshold."""
    V, activations = make_directions(), make_activations()
    flipped = dataclasses.replace(activations, states=activations.states.flip(1), layers=activations.layers[::-1])
    assert torch.equal(gates.threshold_at_fpr(V, flipped), gates.threshold_at_fpr(V, activations))
    one = gates.threshold_at_fpr(
        V[V.layers[1]], dataclasses.replace(activations, states=activations.states[:, 1:2], layers=activations.layers[1:2])
    )
    assert torch.equal(one, gates.threshold_at_fpr(V, activations)[1:2])


def test_a_layer_has_one_row_of_an_edit_and_of_a_gate():
    twice = {"layers": (5, 5), "thresholds": torch.zeros(2), "weights": torch.ones(2, 6)}
    with pytest.raises(errors.SiteError, match=r"One of the layers \[5, 5\] appears twice"):
        gates.Linear("mine", **twice)
    with pytest.raises(errors.SiteError, match=r"hook name 'residd'"):
        gates.Linear("mine", **twice | {"layers": (5, 6)}, hook="residd")
    edit = iv.add_relative(V.truncate(1)).steps[0].edit
    with pytest.raises(errors.SiteError, match="appears twice"):
        dataclasses.replace(edit, layers=(0, 0))


def test_its_name_says_what_it_sees():
    made = make_directions()
    assert repr(gates.harmful(made)) == "harmful(test, threshold=midpoint)"
    assert repr(gates.harmful(made, 0.0, iv.own_state)) == "harmful(test, threshold=0.0, state=own_state)"
    assert "layer=3" in repr(gates.harmful(made, state=iv.State(layer=3)))
