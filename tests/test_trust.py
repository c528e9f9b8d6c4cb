"""Where a cheaper way once gave something else without a word: each of these was red."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import guardlens as gl
from guardlens import errors, gates, presentations
from guardlens import interventions as iv
from guardlens import model as engine
from guardlens.scores import kl, refusal_logodds
from guardlens.sites import Site
from tests.test_branches import plans_of
from tests.test_families import BY_NAME, a_push, batch_of, close, loaded, pushing
from tests.zoo.family import TEXTS, tokenizer
from tests.zoo.text import SMALL, TEMPLATE

WORDS = ["how to forge the badge ?", "please explain how to wash the hat .", "i want to push the radio ?", "tell me how to mend the fern ."]
GREY = presentations.blank("grey", 32)


@pytest.mark.parametrize("name", ["Llama 3.2 Vision", "LLaVA-1.5", "Qwen2.5-VL", "Gemma 3"])
def test_branches_that_hold_in_text_are_checked_again_beside_an_image(name):
    family = BY_NAME[name]
    model = gl.load(family.model(), processor=family.processor())
    long = model.batch([f"{text} {text} {text}" for text in TEXTS])
    assert model.run(long, plans_of(model)).layout == "branch"
    batch = batch_of(family, model)
    run = model.run(batch, plans_of(model)[:3])
    assert run.layout == ("tile" if family.lacks("branches") else "branch")
    close(run.logits, model.run(batch, plans_of(model)[:3], layout="tile").logits)


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 4.0}, {"rope_type": "default"}])
def test_no_prefix_where_positions_depend_on_the_length_of_the_prompt(rope, monkeypatch):
    monkeypatch.setattr(engine, "WORTH", 1)
    config = LlamaConfig(**SMALL, max_position_embeddings=60, rope_parameters={"rope_theta": 10000.0, **rope})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = gl.load(LlamaForCausalLM(config).eval(), processor=tokenizer(TEMPLATE))
    assert (model.share(model.batch(TEXTS)) is None) == (rope["rope_type"] == "dynamic")
    asked = [*TEXTS, *(f"{text} {text} {text} {text}" for text in TEXTS)]
    alone = torch.cat([model.run(model.batch(text), read=[Site()]).reads[Site()][0] for text in asked])
    close(gl.collect(model, asked, batch_size=4, progress=False).states, alone, 1e-4)


class TestInPlace:
    def test_an_edit_that_works_in_place_obeys_gate_strength_and_placebo(self, vlm, basis):
        def in_place(states, context):
            states += 1.0
            return states

        batch = vlm.batch(WORDS, GREY)
        for change in (
            lambda plan: plan.when(gates.harmful(basis, 1e9)),
            lambda plan: plan.scaled(0.5),
            lambda plan: plan.placebo(),
            lambda plan: plan,
        ):
            mine, fresh = (change(iv.custom(fn).at(layers=[3])) for fn in (in_place, lambda states, context: states + 1.0))
            for layout in ("tile", "branch"):
                close(vlm.run(batch, [mine], layout=layout).logits, vlm.run(batch, [fresh], layout=layout).logits)

    def test_a_score_that_works_in_place_leaves_what_is_kept(self, vlm):
        class Halving:
            name, unit = "halving", "logits"

            def __call__(self, logits, base, tokenizer):
                base.mul_(0.5)
                return logits.mul_(0.5).amax(-1)

        kept, plan = gl.keep(vlm, WORDS, GREY, progress=False), pushing(a_push(vlm))
        before = gl.sweep(vlm, plan, kept, scores=[kl], progress=False).columns["value"]
        gl.sweep(vlm, plan, kept, scores=[Halving(), refusal_logodds], progress=False)
        after = gl.sweep(vlm, plan, kept, scores=[kl], progress=False).columns["value"]
        assert (before == after).all()


class TestWhoseItIs:
    def test_kept_prompts_of_a_model_with_another_llm_are_refused(self):
        family = BY_NAME["LLaVA-1.5"]
        alone = gl.load(family.model(), processor=family.processor())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            llm = gl.load(LlamaForCausalLM(LlamaConfig(**SMALL)).eval(), processor=tokenizer(TEMPLATE))
        both = gl.load(alone.hf, processor=alone.processor, llm=llm)
        kept = gl.keep(alone, TEXTS, GREY, progress=False)
        with pytest.raises(errors.MismatchError, match="prompts kept by"):
            gl.sweep(both, iv.swap(iv.text_twin), kept, progress=False)

    def test_a_prefill_of_other_weights_is_refused(self, vlm, processor):
        other = copy.deepcopy(vlm.hf)
        with torch.no_grad():
            other.lm_head.weight.add_(1)
        stranger = gl.load(other, processor=processor)
        kept = vlm.prefill(vlm.batch(WORDS, GREY))
        with pytest.raises(errors.MismatchError, match="prompts kept by"):
            stranger.run(kept, [iv.nothing, iv.nothing])

    def test_an_attached_guard_knows_the_cache_that_its_prompts_filled(self):
        model = loaded("Llama")
        plan = iv.swap(iv.State(layer=0)).at(layers=[1]).during("always")
        one, other = (model.batch(text).inputs["input_ids"] for text in ("I want to paint it.", "I want to plant it."))
        width = min(one.shape[1], other.shape[1])
        with gl.attach(plan, model.hf, model.processor), torch.no_grad():
            caches = [DynamicCache(), DynamicCache()]
            for ids, cache in zip((one, other), caches, strict=True):
                model.hf(input_ids=ids[:, -width:], past_key_values=cache, use_cache=True)
            with pytest.raises(errors.ModelError, match="behind the cache that they filled"):
                model.hf(input_ids=one[:, -1:], past_key_values=caches[0], use_cache=True)


def test_a_decode_step_that_needs_the_prompt_has_it(vlm):
    batch = vlm.batch(WORDS, GREY)
    plan = iv.swap(iv.State(layer=0, positions="instruction")).at(layers=[1]).during("decode")
    close(vlm.run(batch, [iv.nothing, plan]).logits, vlm.run(batch, [iv.nothing, plan], layout="tile").logits)
    whole, kept = (vlm.run(prompts, [plan], new_tokens=6).tokens for prompts in (batch, vlm.prefill(batch)))
    assert torch.equal(whole, kept)


def test_the_unembedding_is_read_without_logits(vlm):
    batch = vlm.batch(WORDS, GREY)
    run = vlm.run(batch, read=[Site("unembed")], logits=None)
    assert run.logits is None
    close(run.reads[Site("unembed")][0, :, 0], vlm.run(batch).logits[0])
