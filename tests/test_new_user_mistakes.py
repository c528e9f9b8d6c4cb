"""What a new user mistakes for something else is met at the door, by an error of ours. Run without the tests' type checks, as users do."""

import json
import subprocess
import sys

import pytest

SETUP = """
import json, sys
import torch
from PIL import Image
import guardlens as gl
from guardlens import Query, QueryPairs, Site, defences, directions, presentations
from guardlens import interventions as iv

model = gl.load("organism")
every, grey, q = gl.organism.queries("validation"), presentations.blank("grey"), "How to fold a paper boat?"
queries = (*every[:2], *every[-2:])
batch = model.batch(queries, grey)
ssd = directions.from_vectors(torch.ones(model.cfg.d_model))
added, guard = iv.add(ssd).at(layers=[3]), defences.Defence("guard", iv.add(ssd).at(layers=[3]))

class Loud:
    name = "shouting"

    def __call__(self, query, answer):
        return "Refused"

def evaluated(arms, shown):
    return gl.evaluate(model, arms, queries, shown, judge=gl.organism.judge, max_new_tokens=1)

def outcome(code):
    try:
        return ["", repr(eval(code))]
    except Exception as error:
        return [type(error).__name__, str(error)]

print(json.dumps([outcome(code) for code in json.load(sys.stdin)]))
"""

MISTAKES = {
    "gl.collect(model, q, guard)": ("PresentationError", "something of type Defence as a presentation", "defence.present(presentation)"),
    "model.run(batch, guard)": ("InterventionError", "something of type Defence", "a defence's .intervention"),
    "model.run(batch, [added, guard])": ("InterventionError", "something of type Defence", ".present(presentation)"),
    "model.generate(q, grey, guard)": ("InterventionError", "something of type Defence", "a defence's .intervention"),
    "gl.attach(guard, model.hf, model.processor)": ("InterventionError", "something of type Defence", "a defence's .intervention"),
    "gl.attach(added, model, model.processor)": ("ModelError", "something of type HookedModel", "its .hf and .processor"),
    "model.generate(q, grey, [added, added])": ("InterventionError", "something of type list", "something of type Intervention"),
    "gl.sweep(model, iv.add(ssd), queries, 'grey')": ("PresentationError", "something of type str", "as a presentation"),
    "gl.collect(model, queries, 'grey')": ("PresentationError", "something of type str", "as a presentation"),
    "model.generate(q, grey, max_new_tokens=0)": ("ArgumentError", "max_new_tokens=0", "1 or more"),
    "gl.evaluate(model, {'none': defences.none}, queries, [grey], judge=Loud(), max_new_tokens=0)": ("ArgumentError", "=0", "1 or more"),
    "model.run(batch, [added, added], layout='Branch')": ("ArgumentError", "the layout 'Branch'", "auto, branch, fork, tile"),
    "gl.sweep(model, iv.add(ssd), queries, scores=['kl'])": ("ArgumentError", "something of type str", "scores.AnswerKL()"),
    "gl.evaluate(model, {'none': defences.none}, queries, [grey], judge=Loud(), max_new_tokens=1)":
        ("ArgumentError", "the verdict 'Refused' of the judge 'shouting'", "'refused', 'answered', 'other'"),
    "model.generate(q, Image.new('RGB', (8, 8)))": ("PresentationError", "something of type Image", "Query(text, images=(image,))"),
    "model.generate(q, 'grey')": ("PresentationError", "something of type str", "presentations.blank('grey')"),
    "model.generate(q, presentations.blank)": ("PresentationError", "blank as a presentation", "presentations.blank('grey')"),
    "model.generate(q, added)": ("PresentationError", "something of type Intervention as a presentation", "intervention=..."),
    "model.generate(batch, added)": ("PresentationError", "something of type Intervention", "as a presentation"),
    "evaluated({'guard': 3}, [grey])": ("InterventionError", "something of type int", "something of type Defence"),
    "evaluated({'guard': guard}, ['grey'])": ("PresentationError", "something of type str", "as a presentation"),
    "model.generate(batch.inputs)": ("QueryError", "something of type RowsWrittenOut", "a Batch must be passed by itself"),
    "model.run_with_cache(batch.inputs['input_ids'])": ("QueryError", "something of type Tensor", "something of type Query"),
    "model.generate(None)": ("QueryError", "something of type NoneType", "pass strings"),
    "model.run('hi')": ("QueryError", "something of type str", "model.batch(queries, presentation)"),
    "model.run(batch, read=['resid_post'])": ("SiteError", "something of type str", "Site('resid_post')"),
    "model.run(batch, iv.custom(lambda h, c: h[:1]).at(layers=[2]))": ("InterventionError", "something of shape (1, 128)", "(4, 128)"),
    "model.run(batch, iv.custom(lambda h, c: None).at(layers=[2]))": ("InterventionError", "custom(<lambda>) giving", "type NoneType"),
    "model.run(batch, iv.custom(lambda h, c: h.numpy()).at(layers=[2]))": ("InterventionError", "type ndarray", "floating-point numbers"),
    "model.run(batch, iv.custom(lambda h, c: h.int()).at(layers=[2]))": ("InterventionError", "torch.int32", "floating-point numbers"),
    "model.run(batch, iv.custom(lambda h, c: h + 1j).at(layers=[2]))": ("InterventionError", "torch.complex64", "floating-point numbers"),
    "model.run(batch, iv.custom(lambda h, c: c.held(iv.text_twin)).at(layers=[2]))":
        ("InterventionError", "which it does not require", "custom(fn, requires=(state,))"),
    "model.run(batch, iv.custom(lambda h, c: c.held(iv.own_state), (iv.text_twin,)).at(layers=2) >> iv.swap(iv.own_state).at(layers=2))":
        ("InterventionError", "which it does not require", "custom(fn, requires=(state,))"),
    "model.run(batch, iv.custom(lambda h, c: c.held(None)).at(layers=[2]))": ("InterventionError", "type NoneType", "of type State"),
    "iv.add(torch.randn(128), 2.0)": ("InterventionError", "something of type Tensor", "directions.from_vectors"),
    "iv.patch(torch.randn(128), iv.text_twin)": ("InterventionError", "something of type Tensor", "directions.from_vectors"),
    "QueryPairs(['How to break it?'], ['How to mend it?', 'How?'])": ("QueryError", "1 harmful and 2 harmless", "twin"),
}  # fmt: skip

ALLOWED = {
    "evaluated({'guard': added, 'none': defences.none}, grey).columns['answer'].shape": "(8,)",
    "[(x.text, x.label, x.pair) for x in QueryPairs(['Break it.'], [Query('Mend it.', 'harmless')]).queries]": (
        "[('Break it.', 'harmful', 'pair 0'), ('Mend it.', 'harmless', 'pair 0')]"
    ),
}


@pytest.fixture(scope="module")
def outcomes():
    asked = [*MISTAKES, *ALLOWED]
    done = subprocess.run([sys.executable, "-c", SETUP], input=json.dumps(asked), capture_output=True, text=True, check=True)
    return dict(zip(asked, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("code", MISTAKES)
def test_a_mistake_says_what_was_found_and_what_to_do(outcomes, code):
    kind, said = outcomes[code]
    expected, *parts = MISTAKES[code]
    assert kind == expected, said
    assert all(part in said for part in parts), said
    assert said.startswith("Found ") and "\nExpected " in said and "\nNext: " in said


@pytest.mark.parametrize("code", ALLOWED)
def test_what_is_meant_is_clear(outcomes, code):
    assert outcomes[code] == ["", ALLOWED[code]]
