"""Sites, interventions, gates and defences of odd parts are met where they are made. Run without the tests' type checks, as users do."""

import json
import subprocess
import sys

import pytest

SETUP = """
import dataclasses, json, sys
from types import SimpleNamespace
import numpy as np, pandas as pd, torch
import guardlens as gl
from guardlens import Intervention, Site, defences, directions, gates, presentations, scores
from guardlens import interventions as iv
from guardlens.interventions import edits, Affine, Step
from guardlens.experiments.sweeps import Sweep

def of(layers):
    means = torch.zeros(2, 3, 4)
    return directions.Directions(torch.eye(4)[:3, None], layers, means[0], means[1], torch.zeros(3, 0), "test")

V, nan = of((0, 1, 2)), float("nan")
added, gate, odd = iv.add(V), gates.harmful(V), iv.custom(lambda h, c: h)
guard = defences.Defence("guard", added)
none = torch.zeros(1, 0, 4)

def affine(shift, read=none, layers=None):
    return Affine(label="mine", layers=layers, down=read, up=read, held_down=none, held_up=none, shift=shift)

def swept(interventions=added, **more):
    "Up to where the model is needed."
    stand_in = object.__new__(gl.HookedModel)
    stand_in.__dict__["cfg"] = SimpleNamespace(n_layers=3)
    return gl.sweep(stand_in, interventions, ["how ?"], **more)

def table(*values, **more):
    rows = [{"intervention": "edit", "variant": "edit", "layers": str(layer), "layer": layer, "strength": 1.0, "query": label,
             "label": label, "cluster": label, "score": "refusal_logodds", "value": value, "base": 0.0} | more
            for layer, value in enumerate(values) for label in ("harmful", "harmless")]
    return Sweep.from_rows(rows)

def outcome(code):
    try:
        return ["", repr(eval(code))]
    except Exception as error:
        return [type(error).__name__, str(error)]

print(json.dumps([outcome(code) for code in json.load(sys.stdin)]))
"""

LAYER, POSITIONS, NUMBER = "a whole number, 0 or more", "(start, stop) with start before stop", "a finite number"

SITES = {
    **{f"Site(layers={layers})": LAYER for layers in (
        "1.0", "[1.0]", "['5']", "True", "[True]", "[None]", "[[1, 2]]", "nan", "slice(2)", "-1", "[-1]", "1j", "np.array([1.0, 2.0])",
        "np.ones(8, dtype=bool)", "np.array(True)", "torch.ones(8)", "torch.tensor(True)", "torch.ones(2, dtype=torch.bool)",
        "pd.Series([5.0, 6.0])", "np.ones((2, 2), dtype=int)", "np.array('5')",
    )},
    **{f"Site(layers={layers})": "one" for layers in ("'5'", "'all'", "b'x'", "{1: 2}", "[]", "()")},
    **{f"Site(positions={positions})": POSITIONS for positions in (
        "range(2)", "(False, True)", "(0, True)", "np.array([0, 1])", "torch.tensor([0, 1])", "(1,)", "(0, 1, 2)", "None", "3",
        "(0.0, 2.0)", "slice(2)", "{0, 1}", "True",
    )},
    **{f"Site({hook})": "one hook name, as text" for hook in ("5", "None", "['z']", "b'z'")},
    "Site('blocks.3.hook_resid_post', [5])": "one place",
    "Site('embed', [5])": "no layers there",
    "added.at(hook='blocks.3.hook_resid_post', layers=[5])": "one place",
    "added.at(hook='embed', layers=[5])": "no layers there",
    "added.at(hook='embed').at(layers=[5])": "no layers there",
    "added.at(layers=2.0)": LAYER,
    "iv.nothing.at(layers=-1)": LAYER,
    "iv.nothing.at(positions='first')": POSITIONS,
    "added.placed([1.0])": LAYER,
    "iv.State(layer=1.0)": LAYER,
    "iv.State(layer=[1, 2])": LAYER,
    "iv.State(hook='nope')": "a name from model.hook_names",
    "iv.State(hook='')": "a name from model.hook_names",
    "iv.State(hook='embed', layer=2)": "no layers there",
    "iv.State(hook='blocks.3.hook_out', layer=2)": "one place",
    "iv.State(positions=range(2))": POSITIONS,
    "gates.Linear('mine', [0.5], torch.ones(1, 4), torch.zeros(1))": "a whole number",
    **{f"swept(layers={layers})": LAYER
       for layers in ("5.0", "[5.0]", "True", "[None]", "[(5, None)]", "np.array([1.0])", "[[True]]", "-1")},
    **{f"swept(layers={layers})": "one" for layers in ("'5'", "['5']", "[()]", "[[]]", "[0, []]", "{0: 1}")},
    "defences.vlm_guard(V, layers='1')": "one layer, or several",
    "defences.vlm_guard(V, layers=1.0)": LAYER,
}  # fmt: skip

PLANS = {
    **{f"iv.{name}(V, {text}={value})": NUMBER for name, text in (("add", "alpha"), ("amplify", "alpha"), ("add_relative", "alpha"))
       for value in ("'2'", "None", "torch.ones(2)", "[1, 2]", "1j", "nan", "float('inf')", "True", "np.True_", "10**400")},
    **{f"iv.{name}(V, iv.text_twin, gain={value})": NUMBER for name in ("replace", "add_component") for value in ("None", "nan", "True")},
    **{f"added.scaled({value})": NUMBER for value in ("'2'", "None", "nan", "True", "1j")},
    **{f"iv.patch(V, {reference})": NUMBER
       for reference in ("None", "'text_twin'", "presentations.blank('grey')", "[0.0] * 4", "True", "nan")},
    **{f"iv.patch(V, torch.zeros({shape}))": "a vector of width 4, 3 of them, one per layer, or 0"
       for shape in ("2", "3", "2, 4", "1, 3, 4")},
    "iv.patch(V, np.zeros(3))": "a vector of width 4",
    **{f"iv.{call})": "the number 3 as a reference, which is no state"
       for call in ("patch(V, 3.0", "replace(V, 3", "add_component(V, np.float32(3), 0.5")},
    **{f"iv.linear({matrix})": "a square tensor" for matrix in ("torch.ones(4)", "torch.ones(4, 3)", "[[1.0]]", "None", "np.ones((2, 3))")},
    "iv.linear(torch.eye(4), alpha=True)": NUMBER,
    **{f"iv.swap({held})": "something of type State" for held in ("None", "'text_twin'", "presentations.text_only")},
    **{f"iv.swap(iv.own_state, part={part})": said for part, said in (
        ("3", "an index and a number of parts"), ("(0.0, 4.0)", LAYER), ("(4, 4)", "from 0 to 3"), ("(0, 0)", "from 0 to -1"),
        ("(-1, 4)", LAYER), ("(True, 4)", LAYER),
        ("(1, 2, 3)", "an index and a number of parts"), ("'ab'", "an index and a number of parts"),
    )},
    **{f"iv.custom({fn})": "a function (states, context) -> states" for fn in ("None", "3", "dict")},
    **{f"iv.custom(len, requires={requires})": said for requires, said in (
        ("iv.own_state", "states in a tuple"), ("None", "states in a tuple"), ("'text_twin'", "states in a tuple"),
        ("[None]", "type State"), ("(presentations.text_only,)", "type State"),
    )},
    **{f"added.when({gate})": "something of type Gate" for gate in ("None", "True", "'midpoint'", "gates.harmful", "0.5", "gates.Linear")},
    **{f"added >> {after}": "something of type Intervention" for after in ("None", "guard", "added.steps[0]", "[added]")},
    **{f"added.placebo({seed})": "a whole number, 0 or more" for seed in ("None", "1.5", "'a'", "-1", "True")},
    **{f"Step({edit})": "an edit" for edit in ("None", "added", "len", "edits.Swap", "guard")},
    "Step(odd.steps[0].edit, None)": "something of type Site",
    "Step(odd.steps[0].edit, Site('resid_mid'))": "a hook that can be written",
    "Step(odd.steps[0].edit, gate='midpoint')": "something of type Gate",
    "Step(odd.steps[0].edit, phase='later')": "'prefill', 'decode' or 'always'",
    "Step(odd.steps[0].edit, strength='1')": NUMBER,
    "iv.nothing.during('later')": "'prefill', 'decode' or 'always'",
    "iv.nothing.at(hook='resid_mid')": "a hook that can be written",
    "Intervention(odd.steps[0])": "steps in a tuple",
    "Intervention((added,))": "something of type Step",
    "Intervention(None)": "steps in a tuple",
    "edits.Placebo(None)": "an edit",
    **{f"bool({made})": "one answer for each query" for made in ("gate", "~gate", "gate and gate", "gate or gate", "not gate")},
    **{f"gate {operation} {other}": "something of type Gate" for operation in "&|" for other in ("None", "True", "added")},
    **{f"gates.{kind}({given})": said for kind in ("AllOf", "AnyOf")
       for given, said in (("()", "one gate at least"), ("gate", "gates in a tuple"), ("(gate, 'x')", "something of type Gate"))},
    "gates.Not((gate, gate))": "something of type Gate",
    **{f"gates.harmful({made})": "something of type Directions" for made in ("None", "torch.ones(4)")},
    **{f"gates.harmful(V, {threshold})": NUMBER
       for threshold in ("None", "True", "nan", "float('inf')", "1j", "[0.0, nan, 1.0]", "torch.ones(3, 2)")},
    **{f"gates.harmful(V, {threshold})": "one for each of 3 layers" for threshold in ("[0.0, 1.0]", "torch.zeros(1)", "np.zeros(4)")},
    "gates.harmful(V, 'median')": "'midpoint', a number, or one number per layer",
    "gates.harmful(V, state=None)": "something of type State",
    "gates.Linear('mine', None, torch.zeros(1, 4), torch.zeros(1))": "a direction",
    "gates.Linear('mine', None, torch.ones(1, 4), torch.zeros(1), state='own')": "something of type State",
    "gates.Linear('mine', None, [[1.0]], torch.zeros(1))": "something of type Tensor",
    "affine(None)": "something of type Tensor",
    **{f"defences.vlm_guard(V, gate={gate})": said for gate, said in (
        ("True", NUMBER), ("False", NUMBER), ("'mid'", "'midpoint'"), ("[0.0, 1.0]", "3 layers"), ("torch.zeros(4)", "3 layers"),
        ("torch.full((3,), nan)", NUMBER), ("gates.harmful", NUMBER),
    )},
    **{f"defences.vlm_guard(V, alpha={alpha})": NUMBER for alpha in ("'1'", "None", "nan", "True")},
    **{f"defences.vlm_guard(V, reference={held})": "something of type State" for held in ("None", "'own'", "presentations.text_only")},
    "defences.vlm_guard(None)": "something of type Directions",
    "defences.vlm_guard(V, reading='swap')": "one of replace, add, amplify, project, literal",
    **{f"swept({{{name}: added}})": "something of type str" for name in ("5", "None")},
    **{f"swept({interventions})": "something of type Intervention" for interventions in ("[added]", "None", "guard", "{'a': guard}")},
    "swept(added.at(hook='embed'))": "a step without layers",
    "defences.Defence(None)": "something of type str",
    "defences.Defence('guard', guard)": "something of type Intervention",
    "defences.Defence('guard', present='grey')": "a function of a presentation",
}  # fmt: skip

ARGUMENTS = {
    **{f"swept(strengths={strengths})": NUMBER for strengths in ("['1']", "'1'", "None", "[nan]", "[True]", "[[1.0]]", "{1.0: 2}")},
    **{f"swept(strengths={strengths})": "at least one cell" for strengths in ("[]", "[0.0]", "(x for x in [])")},
    **{f"swept(placebos={placebos})": "a whole number, 0 or more" for placebos in ("-1", "1.5", "'1'", "None", "True")},
    **{f"swept(scores={given})": "scores in a list"
       for given in ("[]", "()", "None", "scores.kl", "'kl'[:0]", "scores.KL", "iter([scores.kl])")},
    "swept(scores=[scores.KL])": "a score",
    "swept(scores=['kl'])": "something of type Score",
    "swept(scores=[scores.KL(name=None)])": "something of type str",
    "swept({})": "at least one cell",
    **{f"scores.AnswerKL({tokens})": "a whole number, 1 or more" for tokens in ("0", "-1", "1.5", "True", "None")},
    **{f"scores.AnswerLogProb({text})": "something of type str" for text in ("5", "None", "['sorry']")},
    **{f"scores.RefusalLogOdds({starts})": "texts in a tuple" for starts in ("'sorry'", "()", "None", "5")},
    "scores.RefusalLogOdds((5,))": "something of type str",
}  # fmt: skip

OTHERS = {
    "iv.add(dataclasses.replace(V, vectors=torch.zeros(3, 1, 4)))": ("NumericsError", "a direction at each layer"),
    "gates.harmful(dataclasses.replace(V, vectors=torch.zeros(3, 1, 4)), 0.0)": ("NumericsError", "a direction at each layer"),
    "iv.linear(torch.full((4, 4), nan))": ("NumericsError", "NaN or infinity in the up of linear(4 x 4, alpha=1)"),
    "iv.add(V, 1e39)": ("NumericsError", "NaN or infinity in the shift of add(test, alpha=1e+39)"),
    "iv.patch(V, torch.full((4,), nan))": ("NumericsError", "NaN or infinity in the shift of patch(test, constant)"),
    "gates.Linear('mine', None, torch.full((1, 4), nan), torch.zeros(1))": ("NumericsError", "NaN or infinity in the weights of mine"),
    "gates.Linear('mine', None, torch.ones(1, 4), torch.tensor([nan]))": ("NumericsError", "NaN or infinity in the thresholds of mine"),
    "edits.RelativeAdd('mine', None, torch.full((1, 4), nan), 1.0)": ("NumericsError", "NaN or infinity in the vectors of mine"),
    "edits.RelativeAdd('mine', (0, 1), torch.ones(1, 4), 1.0)": ("MismatchError", "2 on the first axis"),
    "affine(torch.ones(2, 4))": ("MismatchError", "1 on the first axis"),
    "affine(torch.ones(1, 5))": ("MismatchError", "all of one width"),
    "affine(torch.ones(2, 4), layers=(0, 1))": ("MismatchError", "2 on the first axis"),
    "gates.Linear('mine', (0, 1), torch.ones(1, 4), torch.zeros(1))": ("MismatchError", "2 on the first axis"),
    "gates.Linear('mine', None, torch.ones(1, 4, 4), torch.zeros(1))": ("MismatchError", "a row of weights and a threshold per layer"),
    "gates.threshold_at_fpr(V, None)": ("MismatchError", "something of type Activations"),
    **{f"table(1.0, 2.0).best({k})": ("ArgumentError", "a whole number, 1 or more") for k in ("0", "-1", "1.5", "'1'", "True")},
    "table(nan, 2.0).best()": ("NumericsError", "log-odds that are nan at the layers [0]"),
    "table(nan, nan).best()": ("NumericsError", "log-odds that are nan at the layers [0, 1]"),
    "table(1.0).plot('nope')": ("ArgumentError", "one of ['refusal_logodds']"),
    "table(1.0).where(layer=7).plot()": ("MismatchError", "a sweep without rows"),
    "table(1.0).where(layer=7).summary()": ("MismatchError", "a sweep without rows"),
    "table(1.0).where(layer='0')": ("MismatchError", "one number, as in layer=0"),
    "iv.State(presentation='grey')": ("PresentationError", "as a presentation"),
}

FIVE = ("5", "[5]", "range(5, 6)", "{5}", "(x for x in [5, 5])", "np.int64(5)", "[np.uint8(5)]", "np.array(5)", "np.array([5])",
        "torch.tensor(5)", "torch.tensor([5])", "pd.Series([5])", "pd.Index([5])")  # fmt: skip

ALLOWED = {
    **{f"Site(layers={layers}).layers": "(5,)" for layers in FIVE},
    **{f"added.at(layers={layers}).steps[0].site.layers": "(5,)" for layers in FIVE},
    "iv.State(layer=np.int64(5)).layer": "5",
    "Site(positions=[np.int64(0), torch.tensor(2)]).positions": "(0, 2)",
    "iv.State(hook='blocks.3.hook_out')": "State(presentation=None, hook='resid_post', layer=3, positions='last')",
    "added.at(layers=5).at(hook='blocks.3.hook_out').steps[0].site": "Site(hook='resid_post', layers=(3,), positions='last')",
    "added.at(layers=5).at(hook='embed').steps[0].site": "Site(hook='embed', layers=None, positions='last')",
    "added.at(hook='embed').free, added.at(hook='embed').placed([1], 9.0).steps[0].strength": "(False, 1.0)",
    **{f"iv.add(V, {two})": "add(test, alpha=2).at(positions='last')"
       for two in ("2", "np.float32(2)", "np.int64(2)", "torch.tensor(2.0)", "torch.tensor(2)", "np.array(2.0)")},
    **{f"(type(added.scaled({two}).steps[0].strength), added.scaled({two}).fingerprint == added.scaled(2.0).fingerprint)":
       "(<class 'float'>, True)" for two in ("2", "np.float32(2)", "torch.tensor(2)", "np.int64(2)")},
    "iv.add_relative(V, torch.tensor(0.5)).steps[0].edit.alpha": "0.5",
    "iv.add_relative(V, 2).fingerprint == iv.add_relative(V, 2.0).fingerprint": "True",
    "iv.add(of(np.array([0, 1, 2]))).fingerprint == added.fingerprint": "True",
    "gates.harmful(of(np.array([0, 1, 2]))).layers": "(0, 1, 2)",
    "iv.custom(len, requires=[iv.own_state]).steps[0].requires": "(State(presentation=None, hook=None, layer=None, positions='last'),)",
    "Intervention([odd.steps[0]]).steps == odd.steps": "True",
    "iv.swap(iv.own_state, part=[np.int64(1), 4]).steps[0].edit.part": "(1, 4)",
    "iv.linear(np.eye(4, dtype=int)).steps[0].edit.up.dtype": "torch.float32",
    "iv.patch(V, np.zeros(4)).fingerprint == iv.patch(V, torch.zeros(4)).fingerprint": "True",
    "gates.harmful(V, np.zeros(3)).thresholds": "tensor([0., 0., 0.])",
    "gates.harmful(V, np.float32(0.5))": "harmful(test, threshold=0.5)",
    "gates.harmful(V, [0.0, 1.0, 2.0])": "harmful(test, threshold=per layer)",
    "defences.vlm_guard(V, gate=None).intervention.steps[0].gate": "None",
    "defences.vlm_guard(V, gate=torch.tensor(0.0)).intervention.steps[0].gate": "harmful(test, threshold=0.0)",
}  # fmt: skip

MISTAKES = (
    {code: ("SiteError", said) for code, said in SITES.items()}
    | {code: ("InterventionError", said) for code, said in PLANS.items()}
    | {code: ("ArgumentError", said) for code, said in ARGUMENTS.items()}
    | OTHERS
)


@pytest.fixture(scope="module")
def outcomes():
    asked = [*MISTAKES, *ALLOWED]
    done = subprocess.run([sys.executable, "-c", SETUP], input=json.dumps(asked), capture_output=True, text=True, check=True)
    return dict(zip(asked, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("code", MISTAKES)
def test_a_mistake_says_what_was_found_and_what_to_do(outcomes, code):
    kind, said = outcomes[code]
    expected, part = MISTAKES[code]
    assert kind == expected and part in said, (kind, said)
    assert said.startswith("Found ") and ("\nExpected " in said or "\nNext: " in said)


@pytest.mark.parametrize("code", ALLOWED)
def test_what_is_meant_is_clear(outcomes, code):
    assert outcomes[code] == ["", ALLOWED[code]]
