"""Interventions change a run as raw torch hooks do, however their runs share what they can."""

import pytest
import torch

import guardlens as gl
from guardlens import gates, presentations
from guardlens import interventions as iv
from tests import reference
from tests.real.test_reading import near
from tests.reference import at_last

LAYOUTS = ("auto", "branch", "fork", "tile")


@pytest.fixture(scope="module")
def interventions(ssd, middle):
    """Interventions, each with what it does to a state, written out."""
    v = ssd.at(middle)[0]
    size = 0.2 * float(ssd.harmless_mean[middle].norm())
    every = {
        "nothing": (iv.nothing, lambda h: h),
        "project_out": (iv.project_out(ssd), lambda h: h - (h @ v)[:, None] * v),
        "add": (iv.add(ssd, size), lambda h: h + size * v),
        "add_relative": (iv.add_relative(ssd, 0.2), lambda h: h + 0.2 * h.norm(dim=-1, keepdim=True) * v),
        "patch": (iv.patch(ssd, ssd.harmless_mean), lambda h: h + ((ssd.harmless_mean[middle] - h) @ v)[:, None] * v),
        "half": (iv.amplify(ssd, 2.0).scaled(0.5), lambda h: h + (h @ v)[:, None] * v),
    }
    return {name: (intervention.at(layers=[middle]), edit) for name, (intervention, edit) in every.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lanes_are_what_raw_hooks_give(model, hf, batch, middle, interventions, layout):
    if layout == "branch" and model.prefill(batch).cache is None:
        pytest.skip(model.prefill(batch).flaw)
    run = model.run(batch, [intervention for intervention, _ in interventions.values()], layout=layout)
    for logits, (_, edit) in zip(run.logits, interventions.values(), strict=True):
        near(logits, reference.with_hooks(hf, batch.inputs, {middle: at_last(edit)})[:, -1], 1e-4)


@pytest.mark.parametrize("positions", ["all", "instruction", (1, 4), (-3, None)])
def test_more_tokens_of_the_prompt(model, hf, batch, ssd, middle, positions):
    chosen, step = batch.select(positions), 3.0 * ssd.at(middle)[0]
    if isinstance(positions, tuple):
        for row, (real, mine) in enumerate(zip(batch.mask, chosen, strict=True)):
            assert mine.nonzero().flatten().tolist() == real.nonzero().flatten()[slice(*positions)].tolist(), row
    expected = reference.with_hooks(hf, batch.inputs, {middle: lambda out: out + chosen[..., None] * step})
    intervention = iv.add(ssd, 3.0).at(layers=[middle], positions=positions)
    near(model.run(batch, intervention, logits="all").logits[0][batch.mask], expected[batch.mask], 1e-4)
    near(model.run(batch, [iv.nothing, intervention]).logits[1], expected[:, -1], 1e-4)


def test_the_instruction_is_the_words_that_the_user_typed(model, batch):
    texts = model.tokenizer.batch_decode([ids[chosen] for ids, chosen in zip(batch.inputs["input_ids"], batch.instruction, strict=True)])
    assert [text.strip() for text in texts] == [query.text for query in batch.queries]


def test_edits_of_several_layers_follow_each_other(model, hf, batch, ssd, middle):
    first, second = ssd.at(middle)[0], ssd.at(middle + 1)[0]
    intervention = iv.add(ssd, 4.0).at(layers=[middle]) >> iv.project_out(ssd).at(layers=[middle + 1])
    edits = {middle: at_last(lambda h: h + 4 * first), middle + 1: at_last(lambda h: h - (h @ second)[:, None] * second)}
    near(model.run(batch, intervention).logits[0], reference.with_hooks(hf, batch.inputs, edits)[:, -1], 1e-4)


def test_strength_zero_is_no_edit(model, batch, ssd, middle):
    plain, scaled = (
        model.run(batch, intervention).logits for intervention in (iv.nothing, iv.add(ssd, 50.0).at(layers=[middle]).scaled(0.0))
    )
    assert torch.equal(plain, scaled)


def test_hook_functions(model, hf, batch, middle):
    logits = model.run_with_hooks(batch, fwd_hooks=[(f"blocks.{middle}.hook_resid_post", lambda value, hook: value * 1.1)])
    near(logits[batch.mask], reference.with_hooks(hf, batch.inputs, {middle: lambda out: out * 1.1})[batch.mask])


def test_every_hook_that_can_be_written_changes_the_logits(model, batch, middle, shown):
    """None of them hangs on a path that the model does not take."""
    prompt, generator = model.batch("How do I fold a boat?", shown), torch.Generator().manual_seed(0)
    plain = model.run_with_cache(prompt, names_filter=[])[0][:, -1]
    tried = [point for point in model.cfg.computed(prompt.beside_image) if gl.hooks.HOOKS[point.hook].writable]
    assert {point.hook for point in tried} >= {"resid_pre", "resid_post", "z", "attn_out", "mlp_out", "post", "ln_final", "unembed"}
    for point in tried:
        if point.layer in (None, 0, middle):
            push = lambda value, hook: value + value.abs().mean() * torch.randn(value.shape, generator=generator)  # noqa: E731
            assert not torch.equal(model.run_with_hooks(prompt, fwd_hooks=[(point.name, push)])[:, -1], plain), point.name


def test_a_gate_opens_where_the_projection_says_so(model, hf, batch, ssd, middle):
    kept = {}
    plain = reference.with_hooks(hf, batch.inputs, keep=kept)[:, -1]
    along = reference.last(kept[middle], batch.mask) @ ssd.at(middle)[0]
    threshold = float(along.sort().values[1:].mean())
    opened = along > threshold
    assert 0 < opened.sum() < len(opened)
    intervention = iv.add(ssd, 20.0).at(layers=[middle]).when(gates.harmful(ssd, threshold=threshold, state=iv.own_state))
    run = model.run(batch, [iv.nothing, intervention])
    assert torch.equal(run.decisions[1, 0, middle].cpu(), opened.cpu())
    edited = reference.with_hooks(hf, batch.inputs, {middle: at_last(lambda h: h + 20.0 * ssd.at(middle)[0])})[:, -1]
    near(run.logits[1][opened], edited[opened], 1e-4)
    near(run.logits[1][~opened], plain[~opened], 1e-4)
    alone = model.run(batch, intervention)
    assert torch.equal(alone.logits[0][~opened], model.run(batch).logits[0][~opened])


def test_a_shared_beginning_changes_no_number(model, hf, middle, ssd, pairs, shown):
    if getattr(model.processor, "chat_template", None) is None:
        shown = presentations.framed(shown, before="You are a patient gardener who answers in one short sentence, and kindly. " * 4)
    else:
        shown = presentations.chat(shown, system="You are a patient gardener who answers in one short sentence, and kindly. " * 4)
    batch = model.batch(pairs.queries[:6], shown)
    prefix = model.share(batch)
    if prefix is None:
        pytest.skip("prompts of this model share no beginning")
    assert len(prefix) > 50
    intervention = iv.add(ssd, 4.0).at(layers=[middle])
    expected = [
        reference.with_hooks(hf, batch.inputs, edits)[:, -1] for edits in ({}, {middle: at_last(lambda h: h + 4 * ssd.at(middle)[0])})
    ]
    kept = model.prefill(batch.after(prefix))
    near(kept.logits, expected[0], 1e-4)
    for mine in (model.run(kept, [iv.nothing, intervention]), model.run(batch.after(prefix), [iv.nothing, intervention])):
        near(mine.logits, torch.stack(expected), 1e-4)
    near(model.run(batch.after(prefix), intervention).logits[0], expected[1], 1e-4)


def test_saved_directions_and_interventions_do_the_same(model, batch, ssd, middle, tmp_path):
    ssd.save(tmp_path / "ssd.safetensors")
    again = gl.Directions.load(tmp_path / "ssd.safetensors")
    assert torch.equal(again.vectors, ssd.vectors) and again.provenance == ssd.provenance
    intervention = iv.replace(ssd, ssd.harmless_mean).when(gates.harmful(ssd)).at(layers=[middle]) >> iv.add(ssd).at(layers=[middle + 1])
    intervention.save(tmp_path / "intervention.safetensors")
    loaded = gl.Intervention.load(tmp_path / "intervention.safetensors")
    assert loaded.fingerprint == intervention.fingerprint
    assert torch.equal(model.run(batch, loaded).logits, model.run(batch, intervention).logits)
