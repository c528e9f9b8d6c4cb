import dataclasses
import json
import pkgutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from guardlens import Directions, Intervention, errors, gates, presentations
from guardlens import interventions as iv
from guardlens.data.presentations import text_only
from guardlens.hooks import Site
from guardlens.interventions import edits
from guardlens.interventions import held_states as states
from guardlens.interventions import serialization as files
from guardlens.results.files import FORMAT, digest, load_tensors, save_tensors
from tests.strategies import gaussian, make_directions

V = make_directions(dtype=torch.float32, model="mine@1")
GATE = gates.harmful(V)


def composed():
    return iv.project_out(V).at(hook="attn_out", layers=[1], positions="image").during("decode") >> iv.add(V.truncate(1)).scaled(0.5)


@pytest.mark.parametrize(
    ("modify", "changed"),
    [
        (lambda intervention: intervention.at(layers=[0]), {"layers"}),
        (lambda intervention: intervention.at(hook="mlp_out"), {"hook"}),
        (lambda intervention: intervention.at(positions="all"), {"positions"}),
        (lambda intervention: intervention.when(GATE), {"gate"}),
        (lambda intervention: intervention.during("always"), {"phase"}),
        (lambda intervention: intervention.scaled(3.0), {"strength"}),
        (lambda intervention: intervention.placebo(), {"edit"}),
    ],
)
def test_modifiers_change_only_what_they_are_given(modify, changed):
    intervention = composed()
    before = intervention.fingerprint
    for old, new in zip(intervention.steps, modify(intervention).steps, strict=True):
        for part in ("hook", "layers", "positions"):
            assert (getattr(old.site, part) != getattr(new.site, part)) == (part in changed)
        for part in ("edit", "gate", "phase", "strength"):
            assert (getattr(old, part) is not getattr(new, part) and getattr(old, part) != getattr(new, part)) == (part in changed)
    assert intervention.fingerprint == before != modify(intervention).fingerprint


def test_strengths_multiply():
    assert [step.strength for step in composed().scaled(0.5).scaled(3.0).steps] == [1.5, 0.75]


def test_placed_moves_only_free_steps():
    intervention = composed()
    placed = intervention.placed([4, 2], 2.0)
    assert intervention.free and not placed.free
    assert placed.steps[0] is intervention.steps[0]
    assert placed.steps[1].site == Site(layers=(2, 4)) and placed.steps[1].strength == 1.0


def test_requires():
    caption = iv.State(presentations.blank("white"), layer=3)
    intervention = iv.patch(V, iv.text_twin).when(gates.harmful(V, state=caption)).at(layers=[1, 2]) >> iv.patch(V, iv.State(layer=0)).at(
        layers=[2]
    )
    twin, first = iv.State(text_only, "resid_post"), iv.State(hook="resid_post", layer=0)
    assert intervention.requires(4) == {twin: {1, 2}, dataclasses.replace(caption, hook="resid_post"): {3}, first: {0}}
    assert iv.patch(V, twin).at(hook="ln_final").requires(4) == {twin: {3}}


def test_a_state_is_read_at_the_hook_of_the_edit_and_a_gates_at_that_of_its_directions():
    """Wherever the intervention is put: the hook of an edit says nothing about what a gate was made from."""
    intervention = iv.swap(iv.text_twin).when(gates.harmful(V)).at(hook="z", layers=[1])
    assert intervention.requires(4) == {iv.State(text_only, "z"): {1}, iv.State(text_only, "resid_post"): {1}}
    of_z = gates.harmful(dataclasses.replace(V, hook="z"))
    assert iv.nothing.requires(4) == {} and iv.swap(iv.own_state).when(of_z).requires(4) == {
        iv.State(hook="resid_post"): {0, 1, 2, 3},
        iv.State(text_only, "z"): {0, 1, 2, 3},
    }
    assert iv.swap(iv.text_twin).at(hook="ln_final").requires(4) == {iv.State(text_only, "ln_final"): {None}}


@pytest.mark.parametrize("edited", [{"layers": [1]}, {"layers": [2], "hook": "mlp_out"}, {"hook": "embed"}])
def test_own_state_that_comes_too_late(edited):
    with pytest.raises(
        errors.InterventionError,
        match=r"needs this run's own blocks.2.hook_resid_post\.\nExpected a state from the same place or before\.\nNext: read an earlier",
    ):
        iv.patch(V, iv.State(hook="resid_post", layer=2)).at(**edited).requires(4)
    iv.patch(V, iv.State(layer=2)).at(layers=[2, 3]).requires(4)


def test_refusals():
    with pytest.raises(errors.InterventionError, match=r"Found a second gate on project_out[\s\S]*Next: combine gates with &, \| and ~"):
        (iv.project_out(V).when(GATE) >> iv.project_out(V)).when(GATE)
    with pytest.raises(errors.InterventionError, match=r"an edit at 'hook_resid_mid'[\s\S]*Expected a hook that can be written"):
        iv.project_out(V).at(hook="hook_resid_mid")
    with pytest.raises(errors.SiteError, match=r"did you mean 'resid_post'"):
        iv.project_out(V).at(hook="resid_pots")


class TestRequireFit:
    def test_other_model_names_both(self):
        for intervention in (iv.project_out(V), iv.project_out(V).placebo(), iv.custom(lambda h, c: h).when(~GATE)):
            intervention.require_fit(("same@1",), 4, {"d_model": 6})
            with pytest.raises(errors.MismatchError, match=r"of the model mine@1\.\nExpected those of theirs@2\.\nNext: collect"):
                intervention.require_fit(("theirs@2",), 4, {"d_model": 6})

    def test_gates_of_two_models_cannot_be_joined(self):
        with pytest.raises(errors.MismatchError, match=r"of the model theirs@2.\nExpected those of mine@1"):
            GATE & gates.harmful(make_directions(dtype=torch.float32, model="theirs@2"))

    def test_width_and_layer(self):
        for intervention in (iv.linear(torch.eye(6)), iv.linear(torch.eye(6)).placebo()):
            with pytest.raises(errors.MismatchError, match=r"of width 6 at resid_post.\nExpected width 8, the model's"):
                intervention.require_fit(("",), 4, {"d_model": 8})
        with pytest.raises(errors.SiteError, match=r"Found layer 4.\nExpected a layer from 0 to 3"):
            iv.linear(torch.eye(6)).at(layers=[4]).require_fit(("",), 4, {"d_model": 6})


class TestSpaces:
    """Directions mean nothing in another space, though widths may agree. The residual stream and what is added to it are one."""

    OF_Z, OF_ATTENTION = (dataclasses.replace(V, hook=hook) for hook in ("z", "attn_out"))
    WIDTHS = {"d_model": 6, "heads": 6}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("intervention", "found"),
        [
            (iv.add(V.truncate(1)).at(hook="z"), r"Found add\(test, alpha=1\), with directions of the hook resid_post, at z"),
            (iv.add_relative(V.truncate(1)).at(hook="z"), r"Found add_relative\(.*, with directions of the hook resid_post, at z"),
            (iv.patch(V, iv.text_twin).placebo().at(hook="ln_final"), "hook resid_post, at ln_final"),
            (iv.project_out(OF_Z), "hook z, at resid_post"),
            (iv.patch(V, iv.State(text_only, "z")), "hook resid_post, at z"),
            (iv.swap(iv.own_state).when(~gates.harmful(OF_Z, state=iv.State(text_only, "mlp_out"))), "hook z, at mlp_out"),
        ],
    )
    def test_other_spaces_are_refused(self, intervention, found):
        with pytest.raises(errors.MismatchError, match=rf"{found}\.\nExpected one space.*\nNext: collect"):
            intervention.require_fit(("mine@1",), 2, self.WIDTHS)

    def test_one_space_passes(self):
        gate = gates.harmful(self.OF_ATTENTION, state=iv.State(text_only, "embed"))
        for hook in ("embed", "resid_pre", "attn_out", "mlp_out", "resid_post"):
            iv.patch(V, iv.text_twin).when(gate).at(hook=hook).require_fit(("mine@1",), 2, self.WIDTHS)
        iv.patch(self.OF_Z, iv.own_state).when(gates.harmful(self.OF_Z)).at(hook="z").require_fit(("mine@1",), 2, self.WIDTHS)
        iv.linear(torch.eye(6)).at(hook="z").require_fit(("mine@1",), 2, self.WIDTHS)

    def test_maps_of_two_spaces_are_not_folded(self):
        first, second = (iv.project_out(basis).steps[0].edit for basis in (V, self.OF_Z))
        with pytest.raises(errors.MismatchError, match="hook z, at resid_post"):
            first.then(second)
        linear = iv.linear(torch.eye(6)).steps[0].edit
        assert linear.then(second).hook == second.then(linear).hook == "z"


def test_a_file_from_before_directions_had_a_hook_is_read(tmp_path):
    """Then states always named their hook."""
    intervention = iv.patch(V, iv.text_twin).when(GATE) >> iv.add_relative(V.truncate(1))
    intervention.save(tmp_path / "new")
    with safe_open(tmp_path / "new", framework="pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["guardlens"])["header"]

    def aged(value):
        if isinstance(value, list):
            return [aged(item) for item in value]
        if not isinstance(value, dict):
            return value
        fields = value.get("fields", {})
        if value.get("type") == "state":
            fields["hook"] = "resid_post"
        elif "hook" in fields and value["type"] != "site":
            del fields["hook"]
        return {key: aged(item) for key, item in value.items()}

    save_tensors(tmp_path / "old", "intervention", tensors, aged(header))
    old = Intervention.load(tmp_path / "old")
    old.require_fit(("mine@1",), 2, {"d_model": 6})
    assert old.requires(2) == intervention.requires(2) and repr(old.steps[1]) == repr(intervention.steps[1])
    assert [step.edit.hook for step in old.steps] == ["", ""] and old.steps[0].gate.hook == ""


def test_repr_reads_as_it_was_written():
    intervention = iv.replace(V, iv.text_twin, gain=1.5).when(GATE & ~GATE).at(layers=[1, 2]) >> iv.add(V.truncate(1), 2.0).at(
        hook="mlp_out", positions="all"
    ).during("always").scaled(0.5)
    assert repr(intervention) == (
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
def test_a_loaded_intervention_equals_the_saved_one(name, tmp_path):
    intervention = PLANS[name]
    intervention.save(tmp_path / "p")
    loaded = Intervention.load(tmp_path / "p")
    assert loaded.fingerprint == intervention.fingerprint and repr(loaded) == repr(intervention)
    assert [step.requires for step in loaded.steps] == [step.requires for step in intervention.steps]
    assert [step.site for step in loaded.steps] == [step.site for step in intervention.steps]


@pytest.mark.parametrize("name", PLANS)
def test_all_tensors_move_to_a_device(name):
    """Those of edits and of gates, combined gates and placebos included; what lies there already is not copied."""
    tensors = {}
    files._encode(PLANS[name].to(torch.device("meta")), tensors, "")
    assert {tensor.device.type for tensor in tensors.values()} == ({"meta"} if PLANS[name].steps else set())
    stayed = PLANS[name].to(torch.device("cpu"))
    assert all(type(step.edit) is edits.Placebo or step.edit is old.edit for step, old in zip(stayed.steps, PLANS[name].steps, strict=True))


def test_fingerprints_tell_interventions_apart():
    assert len({intervention.fingerprint for intervention in PLANS.values()}) == len(PLANS)
    other = make_directions(5, dtype=torch.float32, model="mine@1")
    assert iv.project_out(other).fingerprint != iv.project_out(V).fingerprint


def test_custom_cannot_be_saved(tmp_path):
    with pytest.raises(
        errors.StorageError,
        match=r"in the intervention\.\nExpected data only\.\nNext: make it of the edits, gates and presentations of guardlens",
    ):
        iv.custom(lambda h, c: h).save(tmp_path / "p")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "kind",
    [
        *(
            "os:system",
            "builtins:eval",
            "guardlens.results.run_directory:RunDirectory",
            "guardlens.interventions.intervention:Step",
            "guardlens.nope.x:Y",
            "",
        ),
        *("custom", "query", "Step", 5, None, ["step"]),
    ],
    ids=str,
)
def test_a_file_that_names_other_types_is_refused(tmp_path, kind):
    for header in ({"type": kind, "fields": {}}, {"type": "intervention", "fields": {"steps": {"tuple": [{"type": kind, "fields": {}}]}}}):
        save_tensors(tmp_path / "p", "intervention", {}, header)
        with pytest.raises(errors.StorageError, match=r"the type .* in |can't be read \(TypeError"):
            Intervention.load(tmp_path / "p")


def changed(header, *keys, to):
    """The header with one field changed, by the names of fields and the places in tuples that lead there."""
    if not keys:
        return to
    key, *rest = keys
    if isinstance(key, int):
        items = [changed(item, *rest, to=to) if place == key else item for place, item in enumerate(header["tuple"])]
        return {"tuple": items}
    fields = header["fields"]
    return {**header, "fields": {**fields, key: changed(fields.get(key), *rest, to=to)}}


STEP = ("steps", 0)
CHANGES = {
    "steps a list": (("steps",), [1]),
    "steps a number": (("steps",), 5),
    "a field more": (("x",), 1),
    "a tensor that is not there": ((*STEP, "edit", "down"), {"tensor": "nope"}),
    "a text for a tensor": ((*STEP, "edit", "down"), "nope"),
    "a tensor for a text": ((*STEP, "phase"), {"tensor": "intervention.steps.0.edit.down"}),
    "another phase": ((*STEP, "phase"), "later"),
    "strength a text": ((*STEP, "strength"), "x"),
    "strength null": ((*STEP, "strength"), None),
    "strength nan": ((*STEP, "strength"), float("nan")),
    "edit null": ((*STEP, "edit"), None),
    "edit a site": ((*STEP, "edit"), {"type": "site", "fields": {}}),
    "gate a state": ((*STEP, "gate"), {"type": "state", "fields": {}}),
    "a hook that there is not": ((*STEP, "site", "hook"), "resid_pots"),
    "other layers": ((*STEP, "edit", "layers"), {"tuple": [*range(9)]}),
    "layers a text": ((*STEP, "edit", "layers"), "12345"),
    "another width": ((*STEP, "edit", "down"), {"tensor": "narrow"}),
    "factors of nan": ((*STEP, "edit", "shift"), {"tensor": "nan"}),
    "factors of integers": ((*STEP, "edit", "shift"), {"tensor": "whole"}),
    "no fields": ((*STEP,), {"type": "step"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_is_read_like_an_intervention_that_is_made(tmp_path, change):
    """Also where its checksums are right: somebody wrote it with other code."""
    intervention, (keys, value) = PLANS["vlm_guard"], CHANGES[change]
    intervention.save(tmp_path / "p")
    tensors, header = load_tensors(tmp_path / "p", "intervention")
    read, shift = tensors["intervention.steps.0.edit.down"], tensors["intervention.steps.0.edit.shift"]
    tensors |= {"narrow": read[..., :-1].contiguous(), "nan": torch.full_like(shift, float("nan")), "whole": shift.long()}
    save_tensors(tmp_path / "q", "intervention", tensors, changed(header, *keys, to=value))
    with pytest.raises(errors.StorageError):
        Intervention.load(tmp_path / "q")


@pytest.mark.parametrize(
    "header", [5, "x", None, [], {}, {"type": "step"}, {"type": "intervention"}, {"type": "intervention", "fields": 5}]
)
def test_a_header_that_is_no_intervention(tmp_path, header):
    save_file({}, tmp_path / "p", metadata=made_up(header))
    with pytest.raises(errors.StorageError):
        Intervention.load(tmp_path / "p")


def made_up(header):
    """What a file of an intervention says about itself, around any header."""
    text = json.dumps({"format": FORMAT, "kind": "intervention", "header": header, "tensors": {}})
    return {"guardlens": text, "digest": digest(text.encode())}


def test_every_tag_is_a_type_and_every_type_of_an_intervention_has_one():
    kinds = {tag: pkgutil.resolve_name(place) for tag, place in files.TAGS.items()}
    assert all(dataclasses.is_dataclass(kind) for kind in kinds.values()) and len(set(kinds.values())) == len(kinds)
    here = [(module, vars(module)) for module in (edits, gates, states, presentations)]
    made = {
        each for module, names in here for each in names.values() if isinstance(each, type) and each.__module__.startswith(module.__name__)
    }
    saved = {each for each in made if dataclasses.is_dataclass(each)} - {edits.Custom, states.Context, presentations.Prompt}
    assert {edits.Swap, gates.Not, states.State, presentations.Framed} <= saved <= set(kinds.values())


def test_fingerprints_stay():
    """What is in run directories and saved interventions: a change of these numbers makes all of them strangers."""
    eye = torch.eye(2)
    read = Directions(eye[None, :1], None, eye[:1], -eye[:1], eye[:1, :0], "made")
    interventions = (
        iv.nothing,
        iv.linear(2 * eye).at(layers=[3]),
        iv.replace(read, iv.text_twin).when(gates.harmful(read, 0.0)).scaled(0.5),
    )
    assert [intervention.fingerprint for intervention in interventions] == ["71342e3f55cf", "6772affa5312", "a743b3d69f44"]


def test_numbers_of_numpy_are_saved(tmp_path):
    save_tensors(tmp_path / "d", "directions", {}, {"layers": (np.int64(4),)})
    assert load_tensors(tmp_path / "d", "directions")[1] == {"layers": [4]}
    numbers = [np.float32(0.5), np.int64(4), np.bool_(True)]
    assert [(type(value), value) for value in (files._encode(number, {}, "") for number in numbers)] == [
        (float, 0.5),
        (int, 4),
        (bool, True),
    ]


def test_files_hold_data_only(tmp_path):
    PLANS["vlm_guard"].save(tmp_path / "p")
    with safe_open(tmp_path / "p", framework="pt") as file:
        assert json.loads(file.metadata()["guardlens"])["kind"] == "intervention"


def test_require_fit_refuses_a_gate_and_a_relative_edit_of_another_width():
    V = make_directions()
    narrow = iv.custom(lambda states, context: states).when(gates.harmful(V))
    for intervention in (narrow, iv.add_relative(V.truncate(1))):
        with pytest.raises(errors.MismatchError, match=f"of width {V.d_model}"):
            intervention.require_fit(("",), 99, {"d_model": V.d_model + 1})


def test_fingerprint_of_half_precision_factors():
    half = iv.linear(torch.eye(4, dtype=torch.bfloat16))
    assert (
        half.fingerprint
        == iv.linear(torch.eye(4, dtype=torch.bfloat16)).fingerprint
        != iv.linear(2 * torch.eye(4, dtype=torch.bfloat16)).fingerprint
    )


def test_a_name_stands_for_a_function_in_fingerprints():
    half = iv.custom(lambda h, c: h / 2, name="half").at(layers=[1])
    assert half.fingerprint == iv.custom(lambda h, c: h * 0.5, name="half").at(layers=[1]).fingerprint
    assert half.fingerprint != iv.custom(lambda h, c: h / 2, (iv.own_state,), name="half").at(layers=[1]).fingerprint
    assert (
        len(
            {
                intervention.fingerprint
                for intervention in (half, half.placebo(), iv.custom(lambda h, c: h / 3, name="third").at(layers=[1]))
            }
        )
        == 3
    )
    with pytest.raises(
        errors.StorageError, match=r"Found custom\(<lambda>\) in the intervention, a function without a name[\s\S]*custom\(fn, name="
    ):
        assert iv.custom(lambda h, c: h).fingerprint
    for intervention in (half, half.placebo()):
        with pytest.raises(errors.StorageError, match="Expected data only"):
            intervention.save("never")
