import json

import pytest
import torch
from safetensors import safe_open

from guardlens import Intervention, errors, gates, presentations
from guardlens import interventions as iv
from guardlens.sites import Site
from guardlens.storage import save_tensors
from tests.strategies import gaussian, make_directions

V = make_directions(dtype=torch.float32, model="mine@1")
GATE = gates.harmful(V)


def composed():
    return iv.project_out(V).at(hook="attn_out", layers=[1], positions="image").during("decode") >> iv.add(V.truncate(1)).scaled(0.5)


@pytest.mark.parametrize(
    ("modify", "changed"),
    [
        (lambda plan: plan.at(layers=[0]), {"layers"}),
        (lambda plan: plan.at(hook="mlp_out"), {"hook"}),
        (lambda plan: plan.at(positions="all"), {"positions"}),
        (lambda plan: plan.when(GATE), {"gate"}),
        (lambda plan: plan.during("always"), {"phase"}),
        (lambda plan: plan.scaled(3.0), {"strength"}),
        (lambda plan: plan.placebo(), {"edit"}),
    ],
)
def test_modifiers_change_only_what_they_are_given(modify, changed):
    plan = composed()
    before = plan.fingerprint
    for old, new in zip(plan.steps, modify(plan).steps, strict=True):
        for part in ("hook", "layers", "positions"):
            assert (getattr(old.site, part) != getattr(new.site, part)) == (part in changed)
        for part in ("edit", "gate", "phase", "strength"):
            assert (getattr(old, part) is not getattr(new, part) and getattr(old, part) != getattr(new, part)) == (part in changed)
    assert plan.fingerprint == before != modify(plan).fingerprint


def test_strengths_multiply():
    assert [step.strength for step in composed().scaled(0.5).scaled(3.0).steps] == [1.5, 0.75]


def test_placed_moves_only_free_steps():
    plan = composed()
    placed = plan.placed([4, 2], 2.0)
    assert plan.free and not placed.free
    assert placed.steps[0] is plan.steps[0]
    assert placed.steps[1].site == Site(layers=(2, 4)) and placed.steps[1].strength == 1.0


def test_requires():
    caption = iv.State(presentations.blank("white"), layer=3)
    plan = iv.patch(V, iv.text_twin).when(gates.harmful(V, state=caption)).at(layers=[1, 2]) >> iv.patch(V, iv.State(layer=0)).at(
        layers=[2]
    )
    assert plan.requires(4) == {iv.text_twin: {1, 2}, caption: {3}, iv.State(layer=0): {0}}
    assert iv.patch(V, iv.text_twin).at(hook="ln_final").requires(4) == {iv.text_twin: {3}}


@pytest.mark.parametrize("edited", [{"layers": [1]}, {"layers": [2], "hook": "mlp_out"}, {"hook": "embed"}])
def test_own_state_that_comes_too_late(edited):
    with pytest.raises(
        errors.PlanError,
        match=r"needs this run's own blocks.2.hook_resid_post\.\nExpected a state from the same place or before\.\nNext: read an earlier",
    ):
        iv.patch(V, iv.State(layer=2)).at(**edited).requires(4)
    iv.patch(V, iv.State(layer=2)).at(layers=[2, 3]).requires(4)


def test_refusals():
    with pytest.raises(errors.PlanError, match=r"Found a second gate on project_out[\s\S]*Next: combine gates with &, \| and ~"):
        (iv.project_out(V).when(GATE) >> iv.project_out(V)).when(GATE)
    with pytest.raises(errors.PlanError, match=r"an edit at 'hook_resid_mid'[\s\S]*Expected a hook that can be written"):
        iv.project_out(V).at(hook="hook_resid_mid")
    with pytest.raises(errors.SiteError, match=r"did you mean 'resid_post'"):
        iv.project_out(V).at(hook="resid_pots")


class TestCheck:
    def test_other_model_names_both(self):
        for plan in (iv.project_out(V), iv.project_out(V).placebo(), iv.custom(lambda h, c: h).when(~GATE)):
            plan.check(("same@1",), 4, {"d_model": 6})
            with pytest.raises(errors.MismatchError, match=r"of the model mine@1\.\nExpected those of theirs@2\.\nNext: collect"):
                plan.check(("theirs@2",), 4, {"d_model": 6})

    def test_gates_of_two_models_cannot_be_joined(self):
        with pytest.raises(errors.MismatchError, match=r"of the model theirs@2.\nExpected those of mine@1"):
            GATE & gates.harmful(make_directions(dtype=torch.float32, model="theirs@2"))

    def test_width_and_layer(self):
        for plan in (iv.linear(torch.eye(6)), iv.linear(torch.eye(6)).placebo()):
            with pytest.raises(errors.MismatchError, match=r"of width 6 at resid_post.\nExpected width 8, the model's"):
                plan.check(("",), 4, {"d_model": 8})
        with pytest.raises(errors.SiteError, match=r"Found layer 4.\nExpected a layer from 0 to 3"):
            iv.linear(torch.eye(6)).at(layers=[4]).check(("",), 4, {"d_model": 6})


def test_repr_reads_as_it_was_written():
    plan = iv.replace(V, iv.text_twin, gain=1.5).when(GATE & ~GATE).at(layers=[1, 2]) >> iv.add(V.truncate(1), 2.0).at(
        hook="mlp_out", positions="all"
    ).during("always").scaled(0.5)
    assert repr(plan) == (
        "replace(test, text_twin, gain=1.5).at(layers=[1, 2], positions='last')"
        ".when((harmful(test, threshold=midpoint) & ~harmful(test, threshold=midpoint)))"
        " >> add(test, alpha=2).at(hook='mlp_out', positions='all').during('always').scaled(0.5)"
    )
    assert repr(iv.nothing) == "nothing" and repr(iv.project_out(V).placebo(3)).startswith("placebo(project_out(test), seed=3)")


PLANS = {
    "vlm_guard": iv.replace(V, iv.text_twin, 2.0).when(GATE),
    "gates": iv.project_out(V).when((GATE & ~gates.harmful(V, 0.5)) | gates.harmful(V, torch.tensor([1.0, 2.0]))),
    "states": iv.patch(V, iv.State(presentations.framed(presentations.blank("white", 8), before="x"), layer=1, positions=(1, None))),
    "turned": iv.amplify(V[1], 0.5).placebo(4) >> iv.add_relative(V.truncate(1)).during("always"),
    "linear": iv.linear(gaussian(0, 6, 6, dtype=torch.float32)).at(layers=[0], positions=(-3, -1)).scaled(0.3),
    "nothing": iv.nothing,
}


@pytest.mark.parametrize("name", PLANS)
def test_a_loaded_plan_equals_the_saved_one(name, tmp_path):
    plan = PLANS[name]
    plan.save(tmp_path / "p")
    loaded = Intervention.load(tmp_path / "p")
    assert loaded.fingerprint == plan.fingerprint and repr(loaded) == repr(plan)
    assert [step.requires for step in loaded.steps] == [step.requires for step in plan.steps]
    assert [step.site for step in loaded.steps] == [step.site for step in plan.steps]


def test_fingerprints_tell_plans_apart():
    assert len({plan.fingerprint for plan in PLANS.values()}) == len(PLANS)
    other = make_directions(5, dtype=torch.float32, model="mine@1")
    assert iv.project_out(other).fingerprint != iv.project_out(V).fingerprint


def test_custom_cannot_be_saved(tmp_path):
    with pytest.raises(
        errors.StorageError, match=r"in the plan\.\nExpected data only\.\nNext: rebuild a plan with custom functions in code"
    ):
        iv.custom(lambda h, c: h).save(tmp_path / "p")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "kind",
    [
        *("os:system", "subprocess:Popen", "builtins:eval", "guardlensx:Edit", "tests.strategies:Query"),
        *("guardlens.storage:RunDirectory", "guardlens.interventions.files:importlib", "guardlens.__main__:app", "guardlens.nowhere:Edit"),
    ],
)
def test_a_file_that_names_other_types_is_refused(tmp_path, kind):
    save_tensors(tmp_path / "p", "intervention", {}, {"type": kind, "fields": {}})
    with pytest.raises(errors.StorageError, match=rf"the type '{kind}' in the file\.\nExpected a type of guardlens"):
        Intervention.load(tmp_path / "p")


def test_files_hold_data_only(tmp_path):
    PLANS["vlm_guard"].save(tmp_path / "p")
    with safe_open(tmp_path / "p", framework="pt") as file:
        assert json.loads(file.metadata()["guardlens"])["kind"] == "intervention"


def test_check_refuses_a_gate_and_a_relative_edit_of_another_width():
    V = make_directions()
    narrow = iv.custom(lambda states, context: states).when(gates.harmful(V))
    for plan in (narrow, iv.add_relative(V.truncate(1))):
        with pytest.raises(errors.MismatchError, match=f"of width {V.d_model}"):
            plan.check(("",), 99, {"d_model": V.d_model + 1})


def test_fingerprint_of_half_precision_factors():
    half = iv.linear(torch.eye(4, dtype=torch.bfloat16))
    assert (
        half.fingerprint
        == iv.linear(torch.eye(4, dtype=torch.bfloat16)).fingerprint
        != iv.linear(2 * torch.eye(4, dtype=torch.bfloat16)).fingerprint
    )
