"""Answers are those of transformers' own `generate`, with and without edits, token for token."""

import pytest
import torch

import guardlens as gl
from guardlens import interventions as iv
from tests import reference
from tests.real.test_reading import near

NEW = 6


def theirs(hf, inputs, **options):
    """New tokens that transformers gives."""
    pad = {"pad_token_id": hf.generation_config.pad_token_id or 0}
    with torch.no_grad():
        return hf.generate(**inputs, max_new_tokens=NEW, **pad, **({"do_sample": False} | options))[:, inputs["input_ids"].shape[1] :]


def said(model, tokens):
    """Each row up to its end."""
    ends = torch.tensor(model.hf.generation_config.eos_token_id if model.hf.generation_config.eos_token_id is not None else [])
    return [row[: int((torch.isin(row, ends.flatten()).cumsum(0) == 0).sum())].tolist() for row in tokens]


@pytest.fixture(scope="module")
def answers(hf, batch):
    return theirs(hf, batch.inputs)


def test_greedy_answers(model, batch, answers):
    assert said(model, model.run(batch, new_tokens=NEW).tokens[0]) == said(model, answers)
    decoded = [model.tokenizer.decode(row, skip_special_tokens=True).strip() for row in said(model, answers)]
    assert model.generate(batch, max_new_tokens=NEW) == decoded


def test_answers_behind_kept_prompts_and_a_shared_beginning(model, batch, answers):
    assert said(model, model.run(model.prefill(batch), new_tokens=NEW).tokens[0]) == said(model, answers)
    prefix = model.share(batch)
    assert said(model, model.run(batch.after(prefix), new_tokens=NEW).tokens[0]) == said(model, answers)


def test_sampled_answers_hang_on_the_seed_alone(model, hf, batch):
    drawn = {"do_sample": True, "temperature": 1.5, "top_k": 0, "top_p": 1.0}
    first, again, other = (model.run(batch, new_tokens=NEW, seed=seed, generation=drawn).tokens[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and first.tolist() != other.tolist()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert said(model, first) == said(model, theirs(hf, batch.inputs, **drawn))


def edited(hf, batch, middle, edit, phase):
    """Greedy tokens under a raw hook on one block, which sees the prompts once and then one token a step."""

    def hook(module, args, out):
        if phase != "always" and (out.shape[1] > 1) != (phase == "prefill"):
            return out
        out = out.clone()
        out[:, -1] = edit(out[:, -1])
        return out

    handle = reference.blocks(hf)[middle].register_forward_hook(hook)
    try:
        return theirs(hf, batch.inputs)
    finally:
        handle.remove()


@pytest.mark.parametrize("phase", ["prefill", "decode", "always"])
def test_edited_answers(model, hf, batch, ssd, middle, answers, phase):
    push = 2.0 * float(ssd.harmless_mean[middle].norm())
    intervention = iv.add(ssd, push).at(layers=[middle]).during(phase)
    expected = said(model, edited(hf, batch, middle, lambda h: h + push * ssd.at(middle)[0], phase))
    assert expected != said(model, answers)
    assert said(model, model.run(batch, intervention, new_tokens=NEW).tokens[0]) == expected
    both = model.run(batch, [iv.nothing, intervention], new_tokens=NEW).tokens
    assert [said(model, tokens) for tokens in both] == [said(model, answers), expected]
    assert said(model, model.run(model.prefill(batch), intervention, new_tokens=NEW).tokens[0]) == expected
    with gl.attach(intervention, hf, model.processor):
        assert said(model, theirs(hf, batch.inputs)) == expected
    assert said(model, theirs(hf, batch.inputs)) == said(model, answers)


def test_each_new_token_is_edited_once(model, batch, ssd, middle):
    """Also under positions of the prompt: a slice means nothing to a single new token."""
    seen = []

    def note(states, context):
        seen.append((context.decode_step, tuple(states.shape)))
        return states

    intervention = iv.custom(note).at(layers=[middle], positions=(2, 5)).during("always")
    new = model.run(batch, intervention, new_tokens=4).tokens.shape[-1]
    rows = len(batch.queries)
    assert seen[0] == (0, (3 * rows, model.cfg.d_model))
    assert seen[1:] == [(step, (rows, model.cfg.d_model)) for step in range(1, new)]


def test_forced_answers_are_one_forward_of_prompt_and_answer(model, hf, batch, ssd, middle):
    tokens = torch.tensor(model.tokenizer("Sorry, I can't help with that.", add_special_tokens=False).input_ids).expand(
        len(batch.queries), -1
    )
    kept = model.prefill(batch)
    if kept.cache is None:
        pytest.skip(kept.flaw)
    ids = torch.cat([batch.inputs["input_ids"], tokens], dim=1)
    mask = torch.cat([batch.inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
    inputs = {**batch.inputs, "input_ids": ids, "attention_mask": mask}
    if "position_ids" in inputs:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    if "token_type_ids" in inputs or "mm_token_type_ids" in inputs:
        pytest.skip("types of tokens are the family's own")
    answer = slice(batch.mask.shape[1] - 1, -1)
    push = 0.2 * float(ssd.harmless_mean[middle].norm()) * ssd.at(middle)[0]

    def hook(out):
        out = out.clone()
        out[:, answer] += push
        return out

    intervention = iv.add(ssd, float(push.norm())).at(layers=[middle]).during("always")
    run = model.run(kept.answering(tokens), [iv.nothing, intervention], logits="answer")
    near(run.logits[0], reference.with_hooks(hf, inputs)[:, answer], 1e-4)
    near(run.logits[1], reference.with_hooks(hf, inputs, {middle: hook})[:, answer], 1e-4)
    likelihood = gl.scores.AnswerLogProb("Sorry, I can't help with that.")
    mine = likelihood(run.logits[0], run.logits[0], likelihood.answer(model, kept))
    log_p = reference.with_hooks(hf, inputs)[:, answer].log_softmax(-1)
    near(mine, log_p.gather(2, tokens[..., None])[..., 0].sum(1), 1e-4)
