"""VLM-Guard's readings against raw PyTorch hooks and states, its switches, and the self-reminder."""

import dataclasses
import inspect

import pytest
import torch

import guardlens as gl
from guardlens import defences, directions, errors, gates, presentations
from guardlens.data.presentations import text_only
from guardlens.defences import none, self_reminder, vlm_guard
from guardlens.hooks import Site
from guardlens.interventions import State, own_state
from tests import reference

TEXTS = ["how to forge the badge ?", "please explain how to wash the hat .", "i want to push the radio ?", "tell me how to mend the fern ."]
GREY = presentations.blank("grey", 32)
LAYER, ALPHA = 4, 1.7
READINGS = ("replace", "add", "amplify", "project")


@pytest.fixture(scope="module")
def batch(vlm):
    return vlm.batch(TEXTS, GREY)


@pytest.fixture(scope="module")
def ssd(vlm):
    """Directions of rank 2 from a few pairs, as the method has it."""
    pairs = gl.QueryPairs(gl.organism.pairs().harmful[:8], gl.organism.pairs().harmless[:8])
    return directions.ssd(gl.collect(vlm, pairs), rank=2)


@pytest.fixture(scope="module")
def text(vlm):
    """h(q) at every layer, from raw hooks on the prompts without an image."""
    kept = {}
    reference.with_hooks(vlm.hf, vlm.batch(TEXTS, text_only).inputs, keep=kept)
    return torch.stack([kept[layer][:, -1] for layer in range(8)])


@pytest.fixture(scope="module")
def mixed(ssd, text):
    """A threshold between the queries: the gate is open for half of them."""
    return float((text[LAYER] @ ssd.at(LAYER)[0]).median()) + 1e-4


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance * max(1.0, float(b.abs().max())), rtol=0)


def formulas(ssd, text, alpha=ALPHA):
    """The readings of methods.md, section 2, as functions of h(Q)."""
    V = ssd.at(LAYER)
    P, h_q = V.T @ V, text[LAYER]
    return {
        "replace": lambda h: h - h @ P + alpha * h_q @ P,
        "add": lambda h: h + alpha * h_q @ P,
        "amplify": lambda h: h + alpha * h @ P,
        "project": lambda h: h - h @ P,
    }


@pytest.mark.parametrize("reading", READINGS)
def test_readings_are_what_the_paper_allows(vlm, batch, ssd, text, reading):
    """At the edited layer, and everything that follows from it."""
    intervention = vlm_guard(ssd, [LAYER], reading=reading, alpha=ALPHA, gate=None).intervention
    run = vlm.run(batch, intervention, read=[Site()])
    plain, edited = {}, {}
    logits = reference.with_hooks(vlm.hf, batch.inputs, keep=plain)[:, -1]
    edit = formulas(ssd, text)[reading]
    expected = reference.with_hooks(vlm.hf, batch.inputs, edits={LAYER: reference.at_last(edit)}, keep=edited)[:, -1]
    states = run.reads[Site()][0]
    close(states[:, LAYER], edit(plain[LAYER][:, -1]))
    close(states[:, LAYER - 1], plain[LAYER - 1][:, -1])
    close(states[:, 7], edited[7][:, -1])
    close(run.logits[0], expected)
    assert (expected - logits).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["all", "image"])
def test_other_positions_are_edited_on_demand(vlm, batch, ssd, positions):
    intervention = vlm_guard(ssd, [LAYER], reading="project", positions=positions).intervention
    V, chosen = ssd.at(LAYER), batch.select(positions)[..., None]
    expected = reference.with_hooks(vlm.hf, batch.inputs, edits={LAYER: lambda h: torch.where(chosen, h - h @ V.T @ V, h)})[:, -1]
    close(vlm.run(batch, intervention).logits[0], expected)


def test_decode_steps_are_edited_on_demand(vlm, batch, ssd):
    V = ssd.at(LAYER)
    for phase in ("prefill", "always"):
        intervention = vlm_guard(ssd, [LAYER], reading="amplify", alpha=9.0, gate=None, phase=phase).intervention
        expected = reference.generate(vlm.hf, batch.inputs, LAYER, lambda h: h + 9.0 * h @ V.T @ V, phase, 5)
        assert torch.equal(vlm.run(batch, intervention, new_tokens=5).tokens[0], expected)


def test_image_run_as_its_own_reference_is_the_identity(vlm, batch, ssd):
    """R1 with the text run replaced by the image run, alpha = 1, g = 1 (methods.md, section 6)."""
    plain = vlm.run(batch, read=[Site()])
    for reference_state in (own_state, State(presentation=GREY)):
        run = vlm.run(batch, vlm_guard(ssd, reference=reference_state, gate=None).intervention, read=[Site()])
        close(run.reads[Site()], plain.reads[Site()])
        close(run.logits, plain.logits)
    other = vlm.run(batch, vlm_guard(ssd, gate=None).intervention).logits
    assert (other - plain.logits).abs().max() > 1e-2


def test_text_alone_is_left_as_it_is(vlm, ssd):
    """Without an image the text twin is the run itself."""
    batch = vlm.batch(TEXTS, text_only)
    close(vlm.run(batch, vlm_guard(ssd, gate=None).intervention).logits, vlm.run(batch).logits)


class TestGate:
    def test_it_sees_the_image_free_query_along_v1(self, vlm, batch, ssd, text, mixed):
        coordinates = text[LAYER] @ ssd.at(LAYER)[0]
        midpoint = ((ssd.harmful_mean + ssd.harmless_mean) / 2)[LAYER] @ ssd.at(LAYER)[0]
        for gate, threshold in ((0.0, 0.0), (mixed, mixed), ("midpoint", midpoint)):
            run = vlm.run(batch, vlm_guard(ssd, [LAYER], gate=gate).intervention)
            assert torch.equal(run.decisions[0, 0, LAYER], coordinates > threshold)
        default = vlm.run(batch, vlm_guard(ssd, [LAYER]).intervention)
        assert torch.equal(default.decisions[0, 0, LAYER], coordinates > midpoint)

    def test_another_reference_is_seen_by_the_gate_too(self, vlm, batch, ssd):
        states = vlm.run(batch, read=[Site()], logits=None).reads[Site()][0, :, LAYER] @ ssd.at(LAYER)[0]
        threshold = float(states.median()) + 1e-4
        run = vlm.run(batch, vlm_guard(ssd, [LAYER], gate=threshold, reference=State(presentation=GREY)).intervention)
        assert torch.equal(run.decisions[0, 0, LAYER], states > threshold)

    @pytest.mark.parametrize("reading", ["replace", "add", "amplify"])
    def test_closed_untouched_is_bit_identical(self, vlm, batch, ssd, mixed, reading):
        plain = vlm.run(batch).logits[0]
        assert torch.equal(vlm.run(batch, vlm_guard(ssd, reading=reading, gate=1e9).intervention).logits[0], plain)
        half = vlm.run(batch, vlm_guard(ssd, [LAYER], reading=reading, alpha=ALPHA, gate=mixed).intervention)
        everyone = vlm.run(batch, vlm_guard(ssd, [LAYER], reading=reading, alpha=ALPHA, gate=None).intervention).logits[0]
        opened = half.decisions[0, 0, LAYER]
        assert opened.sum() == 2
        assert torch.equal(half.logits[0], torch.where(opened[:, None], everyone, plain))

    def test_the_literal_reading_projects_where_the_gate_is_closed(self, vlm, batch, ssd, text, mixed):
        """With g = 0, R1 must equal R4; with g = 1 it is R1 (methods.md, section 6)."""
        project = vlm.run(batch, vlm_guard(ssd, [LAYER], reading="project").intervention).logits[0]
        replaced = vlm.run(batch, vlm_guard(ssd, [LAYER], alpha=ALPHA, gate=None).intervention).logits[0]

        def literal(gate):
            return vlm.run(batch, vlm_guard(ssd, [LAYER], alpha=ALPHA, gate=gate, reading="literal").intervention).logits[0]

        close(literal(1e9), project)
        close(literal(-1e9), replaced)
        close(literal(None), replaced)
        opened = (text[LAYER] @ ssd.at(LAYER)[0] > mixed)[:, None]
        close(literal(mixed), torch.where(opened, replaced, project))
        assert (project - replaced).abs().max() > 1e-3

    def test_project_is_gated_by_a_gate_of_your_own_only(self, vlm, batch, ssd):
        plain = vlm.run(batch).logits
        assert not torch.equal(vlm.run(batch, vlm_guard(ssd, reading="project", gate=1e9).intervention).logits, plain)
        closed = gates.harmful(ssd, 1e9)
        assert torch.equal(vlm.run(batch, vlm_guard(ssd, reading="project", gate=closed).intervention).logits, plain)
        opened = vlm.run(batch, vlm_guard(ssd, reading="project", gate=~closed).intervention).logits
        assert torch.equal(opened, vlm.run(batch, vlm_guard(ssd, reading="project").intervention).logits)


@pytest.mark.parametrize("reading", READINGS)
def test_signs_of_the_directions_do_not_matter(vlm, batch, ssd, reading):
    flipped = dataclasses.replace(ssd, vectors=-ssd.vectors)
    runs = [
        vlm.run(batch, vlm_guard(basis, [LAYER], reading=reading, alpha=ALPHA, gate=None).intervention).logits for basis in (ssd, flipped)
    ]
    close(*runs)
    gated = [vlm.run(batch, vlm_guard(basis, [LAYER], reading="amplify", gate=0.0).intervention) for basis in (ssd, flipped)]
    assert torch.equal(gated[0].decisions[0, 0, LAYER], ~gated[1].decisions[0, 0, LAYER])


def test_layers_are_free_until_set(vlm, batch, ssd):
    guard = vlm_guard(ssd, gate=None).intervention
    assert guard.free and not vlm_guard(ssd, [2, 5], gate=None).intervention.free
    close(vlm.run(batch, guard.at(layers=[2, 5])).logits, vlm.run(batch, vlm_guard(ssd, (2, 5), gate=None).intervention).logits)
    single = vlm_guard(ssd, 5, gate=None).intervention
    assert [step.site.layers for step in single.steps] == [(5,)]


def test_names(ssd):
    assert [vlm_guard(ssd, reading=reading).name for reading in READINGS] == [f"vlm_guard[{reading}]" for reading in READINGS]
    assert (none.name, self_reminder.name) == ("none", "self_reminder")


def test_a_defence_prints_what_it_is_made_of(ssd):
    guard = vlm_guard(ssd, 2, gate=None)
    assert repr(guard) == f"Defence('vlm_guard[replace]', {guard.intervention!r})" and repr(none) == "Defence('none')"
    assert repr(dataclasses.replace(none, present=text_only.__call__)) == "Defence('none', present=__call__)"


class TestErrors:
    def test_unknown_reading(self, ssd):
        with pytest.raises(
            errors.InterventionError, match=r"Found the reading 'mend'.\nExpected one of replace, add, amplify, project, literal"
        ):
            inspect.unwrap(vlm_guard)(ssd, reading="mend")  # past the type checks of the test run

    def test_unknown_threshold(self, ssd):
        with pytest.raises(errors.InterventionError, match=r"Found the threshold 'median'.\nExpected 'midpoint', a number"):
            vlm_guard(ssd, gate="median")

    def test_another_model(self, llm, ssd):
        with pytest.raises(errors.MismatchError, match="Expected those of LlamaForCausalLM@"):
            llm.run(llm.batch(TEXTS), vlm_guard(ssd).intervention)


class TestSelfReminder:
    QUERY = gl.organism.queries("test")[0]

    @pytest.mark.parametrize(
        "presentation", [text_only, GREY, presentations.noise(size=32), presentations.own_images], ids=lambda p: p.name
    )
    def test_words_around_the_text_and_the_image_as_it_was(self, presentation):
        told, plain = self_reminder.present(presentation)(self.QUERY), presentation(self.QUERY)
        before, after = told.text.split(plain.text)
        assert before.startswith("You should be a responsible assistant") and before.endswith("\n")
        assert after.startswith("\nRemember, you should be a responsible assistant")
        assert [image.tobytes() for image in told.images] == [image.tobytes() for image in plain.images]

    def test_other_words(self):
        told = defences.reminder(before="please stay safe . ", after=" thanks .").present(GREY)
        assert told(self.QUERY).text == f"please stay safe . {self.QUERY.text} thanks ."
        assert told.name == "blank grey | self_reminder"

    def test_nothing_is_edited(self):
        assert self_reminder.intervention.steps == none.intervention.steps == ()
        assert none.present(GREY) is GREY

    def test_model_sees_the_words(self, vlm):
        reminder = defences.reminder(before="please stay safe . ", after="")
        told = vlm.batch([self.QUERY], reminder.present(GREY))
        assert "please stay safe" in vlm.tokenizer.decode(told.inputs["input_ids"][0])
        assert int(told.image.sum()) == int(vlm.batch([self.QUERY], GREY).image.sum())


def test_fingerprints_tell_defences_apart(ssd):
    guards = [
        vlm_guard(ssd),
        vlm_guard(ssd, alpha=2.0),
        vlm_guard(ssd, [3]),
        vlm_guard(ssd, [4]),
        vlm_guard(ssd, reading="add"),
        vlm_guard(ssd, gate=0.0),
        vlm_guard(ssd, gate=None),
        vlm_guard(ssd, reading="literal"),
        vlm_guard(ssd.truncate(1)),
        vlm_guard(ssd, positions="all"),
        vlm_guard(ssd, phase="always"),
        vlm_guard(ssd, reference=own_state),
        vlm_guard(dataclasses.replace(ssd, vectors=-ssd.vectors)),
        none,
        self_reminder,
        defences.reminder(after=""),
    ]
    prints = [(defence.intervention.fingerprint, defence.present(GREY)) for defence in guards]
    assert len(set(prints)) == len(prints)
    assert vlm_guard(ssd).intervention.fingerprint == prints[0][0]
    assert defences.reminder().present(GREY) == self_reminder.present(GREY) != self_reminder.present(text_only)
