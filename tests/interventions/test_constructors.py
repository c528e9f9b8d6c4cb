"""Closed forms and laws of the edits, in float64, without a model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guardlens import errors
from guardlens import interventions as iv
from guardlens.models.engine.compiler import compile_taps
from guardlens.models.engine.layout import Layout
from tests.strategies import apply, context, gaussian, make_batch, make_directions, seeds

ranks, numbers = st.integers(1, 4), st.floats(-3, 3)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def setting(seed, rank=2, layer=1):
    V = make_directions(seed, rank=rank)
    P = V.at(layer).T @ V.at(layer)
    return V, P, gaussian(seed + 7, 5, 6), gaussian(seed + 8, 5, 6)


@given(seeds, ranks, numbers)
def test_closed_forms(seed, rank, alpha):
    V, P, h, r = setting(seed, rank)
    one, vector, M = V.truncate(1), gaussian(seed, 6), gaussian(seed, 6, 6)
    mean, v = V.harmful_mean, V.at(1)[0]
    for intervention, expected in [
        (iv.project_out(V), h - h @ P),
        (iv.amplify(V, alpha), h + alpha * h @ P),
        (iv.patch(V, vector), h + (vector - h) @ P),
        (iv.patch(V, 0.0), h - h @ P),
        (iv.patch(V, mean), h + (mean[1] - h) @ P),
        (iv.patch(V, iv.text_twin), h + (r - h) @ P),
        (iv.replace(V, iv.text_twin, alpha), h - h @ P + alpha * r @ P),
        (iv.replace(V, vector, alpha), h - h @ P + alpha * vector @ P),
        (iv.add_component(V, iv.own_state, alpha), h + alpha * r @ P),
        (iv.add_component(V, mean, alpha), h + alpha * mean[1] @ P),
        (iv.add(one, alpha), h + alpha * v),
        (iv.add_relative(one, alpha), h + alpha * h.norm(dim=1, keepdim=True) * v),
        (iv.linear(M, alpha), h + alpha * h @ M),
        (iv.custom(lambda states, context: states * context.layer + 2), h + 2),
    ]:
        close(apply(intervention, h, 1, r), expected)


@given(seeds, ranks)
def test_laws(seed, rank):
    V, P, h, r = setting(seed, rank)
    out, patched = apply(iv.project_out(V), h, 1), apply(iv.patch(V, iv.text_twin), h, 1, r)
    close(apply(iv.project_out(V), out, 1), out)
    close(out @ V.at(1).T, torch.zeros(5, rank).double())
    close(apply(iv.amplify(V, -1.0), h, 1), out)
    close(apply(iv.patch(V, iv.text_twin), patched, 1, r), patched)
    close(patched - patched @ P, h - h @ P)
    close(apply(iv.patch(V, iv.own_state), h, 1, h), h)
    close(apply(iv.replace(V, iv.text_twin, 1.0), h, 1, r), patched)
    close(apply(iv.replace(V, iv.text_twin, 0.0), h, 1, r), out)


@given(seeds, ranks, st.lists(st.sampled_from([-1.0, 1.0]), min_size=4, max_size=4))
def test_signs_of_directions(seed, rank, signs):
    import dataclasses

    V, _, h, r = setting(seed, rank)
    signs = torch.tensor(signs, dtype=torch.float64)[:rank]
    flipped = dataclasses.replace(V, vectors=V.vectors * signs[:, None])
    for make in (iv.project_out, lambda V: iv.amplify(V, 2.0), lambda V: iv.patch(V, iv.text_twin), lambda V: iv.replace(V, r[0], 3.0)):
        close(apply(make(V), h, 1, r), apply(make(flipped), h, 1, r))
    same = torch.allclose(apply(iv.add(V.truncate(1)), h, 1), apply(iv.add(flipped.truncate(1)), h, 1))
    assert same == (signs[0] == 1)


@given(seeds)
def test_ace(seed):
    """After patch(r, mean) every state projects on r as the mean does."""
    V, _, h, _ = setting(seed, 1)
    for mean in (V.harmful_mean, V.harmless_mean):
        close(apply(iv.patch(V, mean), h, 1) @ V.at(1)[0], (mean[1] @ V.at(1)[0]).expand(5))


linear_edits = st.sampled_from(["project_out", "amplify", "patch", "patch_mean", "add", "linear", "add_component", "broadcast"])


def make(name, seed):
    V = make_directions(seed)
    interventions = {
        "project_out": lambda: iv.project_out(V),
        "amplify": lambda: iv.amplify(V, 0.7),
        "patch": lambda: iv.patch(V, iv.text_twin),
        "patch_mean": lambda: iv.patch(V, V.harmful_mean),
        "add": lambda: iv.add(V.truncate(1), -1.5),
        "linear": lambda: iv.linear(gaussian(seed, 6, 6) / 3, 0.5),
        "add_component": lambda: iv.add_component(V, iv.text_twin, 0.3),
        "broadcast": lambda: iv.amplify(V[1], 0.4),
    }
    return interventions[name]()


@given(st.lists(linear_edits, min_size=2, max_size=4), seeds, st.sampled_from([0, 1]), numbers)
def test_a_chain_equals_its_folded_affine(names, seed, layer, strength):
    interventions = [make(name, seed % 1000 + i) for i, name in enumerate(names)]
    h, r = gaussian(seed, 5, 6), gaussian(seed + 1, 5, 6)
    chained = h
    for intervention in interventions:
        chained = apply(intervention, chained, layer, r)
    folded = interventions[0].steps[0].edit
    for intervention in interventions[1:]:
        folded = folded.then(intervention.steps[0].edit)
    close(folded(h, context(h, layer, r)), chained)
    close(folded.scaled(strength)(h, context(h, layer, r)), h + strength * (chained - h))


def test_composition_is_associative():
    a, b, c = (make(name, 0).at(layers=[i]) for i, name in enumerate(["add", "patch", "linear"]))
    left, right = (a >> b) >> c, a >> (b >> c)
    assert left.steps == right.steps == a.steps + b.steps + c.steps and left.fingerprint == right.fingerprint
    assert (iv.nothing >> a).steps == (a >> iv.nothing).steps == a.steps


def run(intervention, value, n_layers=2):
    """Every hook's value after an intervention's taps, the values being independent tensors."""
    batch = make_batch((5, 5))
    taps, _ = compile_taps([intervention], [], Layout.tile(2, 5, 1), batch, n_layers, {})
    values = {tap.point: value for tap in taps}
    for tap in taps:
        values[tap.point] = tap.fn(values[tap.point], 0)
    return {point.name: changed for point, changed in values.items()}


@pytest.mark.parametrize(
    ("one", "other"),
    [({"layers": [0]}, {"layers": [1]}), ({"hook": "attn_out"}, {"hook": "mlp_out"}), ({"positions": "image"}, {"positions": "last"})],
)
def test_edits_at_disjoint_sites_commute(one, other):
    a, b, value = make("add", 0), make("linear", 1), gaussian(5, 2, 5, 6)
    ab, ba = run(a.at(**one) >> b.at(**other), value), run(b.at(**other) >> a.at(**one), value)
    assert ab.keys() == ba.keys() and all(torch.equal(ab[name], ba[name]) for name in ab)
    same = [run(x >> y, value)["blocks.1.hook_resid_post"] for x, y in ((a, b), (b, a))]
    assert not torch.allclose(*same)


@given(seeds, st.sampled_from(["project_out", "amplify", "patch", "add", "linear", "add_component"]), st.integers(0, 5))
def test_placebo_moves_as_far_elsewhere(seed, name, number):
    intervention, h, r = make(name, seed), gaussian(seed, 7, 6), gaussian(seed + 1, 7, 6)
    placebo = intervention.placebo(number)
    real, fake = (apply(p, h, 1, r) - h for p in (intervention, placebo))
    close(fake.norm(dim=1), real.norm(dim=1), 1e-7)
    assert not torch.allclose(fake, real)
    assert torch.linalg.matrix_rank(fake) == torch.linalg.matrix_rank(real)
    assert torch.equal(fake, apply(intervention.placebo(number), h, 1, r) - h)
    assert not torch.allclose(fake, apply(intervention.placebo(number + 1), h, 1, r) - h)
    constant = make("broadcast", seed).placebo(number)
    assert not torch.allclose(apply(constant, h, 0), apply(constant, h, 1))


def test_placebo_of_other_edits_keeps_the_norm():
    h = gaussian(0, 4, 6)
    for intervention in (iv.custom(lambda states, context: states.tanh()), iv.add_relative(make_directions(rank=1), 0.5)):
        close((apply(intervention.placebo(), h) - h).norm(dim=1), (apply(intervention, h) - h).norm(dim=1))
    assert torch.equal(apply(iv.amplify(make_directions(), 0.0).placebo(), h), h)


IN_HALF = {
    "project_out": lambda V: iv.project_out(V),
    "amplify": lambda V: iv.amplify(V, 1.7),
    "replace": lambda V: iv.replace(V, iv.text_twin, 1.3),
    "add": lambda V: iv.add(V.truncate(1), 2.0),
    "add_relative": lambda V: iv.add_relative(V.truncate(1), 0.3),
    "linear": lambda V: iv.linear(gaussian(5, 64, 64).float() / 8, 0.5),
    "placebo": lambda V: iv.project_out(V).placebo(3),
    "placebo of another edit": lambda V: iv.add_relative(V.truncate(1), 0.3).placebo(3),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", IN_HALF)
def test_half_precision_is_rounded_once(name, dtype):
    """Against the same map of the same numbers in float64: no further off than half a unit in the last place."""
    intervention = IN_HALF[name](make_directions(2, width=64, dtype=torch.float32))
    h, r = (gaussian(seed, 200, 64).to(dtype) for seed in (1, 2))
    found, exact = apply(intervention, h, 1, r), apply(intervention, h.double(), 1, r.double())
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6).all()


def test_errors():
    V, h = make_directions(), gaussian(0, 2, 6)
    for make_intervention in (iv.add, iv.add_relative):
        with pytest.raises(
            errors.InterventionError, match=r"Found 2 directions per layer\.\nExpected one\.\nNext: .*directions.truncate\(1\)"
        ):
            make_intervention(V)
    for intervention in (iv.project_out(V), iv.add_relative(V.truncate(1))):
        with pytest.raises(errors.SiteError, match=r"at layer 5[\s\S]*\[0, 1\]|at layer 5[\s\S]*Next: collect that layer too"):
            apply(intervention, h, 5)
    first, second = (iv.patch(V, state).steps[0].edit for state in (iv.text_twin, iv.own_state))
    with pytest.raises(errors.InterventionError, match=r"two held states[\s\S]*at most one in a folded map[\s\S]*a >> b"):
        first.then(second)
    with pytest.raises(errors.InterventionError, match=r"maps of the layers \(0, 1\) and \(3, 4\)"):
        first.then(iv.project_out(make_directions(numbers=(3, 4))).steps[0].edit)
