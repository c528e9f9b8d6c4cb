"""What generation is set to, by the checkpoint and by the call; and that it runs as it was asked, or is refused."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

import guardlens as gl
from guardlens import errors, presentations
from guardlens import interventions as iv
from guardlens.models.engine.generation_options import generation_settings


@pytest.fixture(scope="module")
def batch(vlm):
    return vlm.batch(["how to mend the hat ?", "how to push the radio ?"], presentations.blank("grey", 32))


@pytest.fixture
def config(vlm, monkeypatch):
    """The checkpoint's own settings, which a test may change."""
    own = GenerationConfig(**vlm.hf.generation_config.to_dict())
    monkeypatch.setattr(vlm.hf, "generation_config", own)
    return own


class TestSettings:
    def test_are_what_the_checkpoint_says_under_what_the_call_says(self, vlm, config):
        config.repetition_penalty, config.top_k, config.suppress_tokens = 1.05, 20, [7]
        found = generation_settings(vlm.hf, {"top_k": 5, "temperature": 0.5})
        assert (found["repetition_penalty"], found["top_k"], found["suppress_tokens"], found["temperature"]) == (1.05, 5, [7], 0.5)
        assert found["eos_token_id"] == config.eos_token_id

    def test_are_those_that_transformers_itself_works_with(self, vlm, config):
        config.repetition_penalty, config.no_repeat_ngram_size = 1.05, 3
        options = {"do_sample": True, "temperature": 0.5}
        used, _ = vlm.hf._prepare_generation_config(None, **options)
        found = generation_settings(vlm.hf, options)
        assert {name: getattr(used, name) for name in found} == found

    def test_answers_are_greedy_whatever_the_checkpoint_says(self, vlm, config):
        config.do_sample = True
        assert generation_settings(vlm.hf)["do_sample"] is False
        assert generation_settings(vlm.hf, {"do_sample": True})["do_sample"] is True

    def test_a_config_among_the_options_counts_as_its_settings(self, vlm, config):
        config.top_k = 20
        given = GenerationConfig(do_sample=True, temperature=0.5)
        found = generation_settings(vlm.hf, {"generation_config": given, "temperature": 0.25})
        assert (found["do_sample"], found["temperature"], found["top_k"]) == (True, 0.25, 20)

    def test_an_option_of_none_takes_back_what_the_checkpoint_says(self, vlm, config):
        config.repetition_penalty = 1.05
        assert "repetition_penalty" not in generation_settings(vlm.hf, {"repetition_penalty": None})

    def test_are_plain_data(self, vlm, config):
        config.sequence_bias = {(3, 4): -1.0}
        options = {"top_k": np.int64(5), "bad_words_ids": ((1, 2),), "logits_processor": LogitsProcessorList()}
        found = generation_settings(vlm.hf, options)
        assert json.loads(json.dumps(found)) == found
        assert (found["top_k"], found["bad_words_ids"], found["sequence_bias"]) == (5, [[1, 2]], {"(3, 4)": -1.0})

    def test_a_config_that_is_none_is_refused(self, vlm):
        with pytest.raises(errors.InterventionError, match="GenerationConfig"):
            generation_settings(vlm.hf, {"generation_config": {"top_k": 3}})


STEPWISE = {
    "num_beams": 2, "num_return_sequences": 2, "prompt_lookup_num_tokens": 3, "assistant_early_exit": 2, "guidance_scale": 2.0,
    "penalty_alpha": 0.5, "dola_layers": "low", "constraints": [1], "force_words_ids": [[1]], "num_beam_groups": 2,
    "prefill_chunk_size": 4, "token_healing": True,
}  # fmt: skip


class TestWhatRuns:
    @pytest.mark.parametrize(("name", "value"), STEPWISE.items())
    def test_more_than_one_answer_or_token_is_refused_from_the_call_and_from_the_checkpoint(self, vlm, batch, config, name, value):
        with pytest.raises(errors.InterventionError, match=name):
            vlm.generate(batch, max_new_tokens=2, **{name: value})
        with pytest.raises(errors.InterventionError, match=name):
            vlm.run(batch, new_tokens=2, generation={"generation_config": GenerationConfig(**{name: value, "do_sample": True})})
        setattr(config, name, value)
        with pytest.raises(errors.InterventionError, match=name):
            vlm.run(batch, new_tokens=2)

    def test_what_the_checkpoint_says_can_be_taken_back(self, vlm, batch, config):
        plain = vlm.run(batch, new_tokens=4).tokens
        config.num_beams, config.prompt_lookup_num_tokens = 2, 3
        taken_back = {"num_beams": 1, "prompt_lookup_num_tokens": None}
        assert torch.equal(vlm.run(batch, new_tokens=4, generation=taken_back).tokens, plain)

    def test_an_assistant_is_refused(self, vlm, batch):
        with pytest.raises(errors.InterventionError, match="assistant_model"):
            vlm.generate(batch, max_new_tokens=2, assistant_model=vlm.hf)

    @pytest.mark.parametrize("name", ["return_dict_in_generate", "output_scores", "output_hidden_states"])
    def test_answers_are_tokens_whatever_the_checkpoint_says(self, vlm, batch, config, name):
        plain = vlm.run(batch, new_tokens=3).tokens
        with pytest.raises(errors.InterventionError, match=name):
            vlm.run(batch, new_tokens=3, generation={name: True})
        setattr(config, name, True)
        assert torch.equal(vlm.run(batch, new_tokens=3).tokens, plain)

    @pytest.mark.parametrize("caching", [{"use_cache": False}, {"cache_implementation": "static"}])
    def test_caching_that_the_checkpoint_asks_for(self, vlm, batch, config, caching):
        """Also behind kept prompts, whose own cache goes beside no other."""
        push = 3 * torch.randn(128, generator=torch.Generator().manual_seed(0))
        intervention = iv.custom(lambda states, context: states + push).at(layers=[4]).during("always")
        plain = vlm.run(batch, intervention, new_tokens=4).tokens
        for name, value in caching.items():
            setattr(config, name, value)
        assert torch.equal(vlm.run(batch, intervention, new_tokens=4).tokens, plain)
        assert torch.equal(vlm.run(vlm.prefill(batch), intervention, new_tokens=4).tokens, plain)

    @pytest.mark.parametrize(
        "options",
        [
            {"do_sample": True, "temperature": 0}, {"temprature": 1.0}, {"top_k": -1}, {"min_new_tokens": -1}, {"max_new_tokens": 3},
            {"max_length": 9}, {"input_ids": torch.ones(1, 1)}, {"repetition_penalty": -1.0},
        ],
    )  # fmt: skip
    def test_options_that_are_none(self, vlm, batch, options):
        with pytest.raises(errors.InterventionError, match=next(reversed(options)).removeprefix("repetition_")):
            vlm.run(batch, new_tokens=2, generation=options)

    @pytest.mark.parametrize("generation", [None, 5, [("top_k", 3)]])
    def test_options_are_a_mapping(self, unchecked, vlm, batch, generation):
        with pytest.raises(errors.ArgumentError, match="Mapping"):
            vlm.run(batch, new_tokens=2, generation=generation)

    def test_an_error_of_an_edit_is_its_own(self, vlm, batch):
        def broken(states, context):
            raise ValueError("mine")

        with pytest.raises(ValueError, match="mine"):
            vlm.run(batch, iv.custom(broken).at(layers=[0]), new_tokens=2)

    def test_stop_strings_get_the_models_own_tokenizer(self, batch, vlm, monkeypatch):
        given = {}

        def seen(**options):
            given.update(options)
            raise NotImplementedError

        monkeypatch.setattr(vlm.hf, "generate", seen, raising=False)
        with pytest.raises(errors.InterventionError):
            vlm.run(batch, new_tokens=2, generation={"stop_strings": ["."]})
        assert given["tokenizer"] is vlm.tokenizer


class TestNumbersThatAreNone:
    """NaN and infinity while answers are made."""

    @pytest.mark.parametrize("phase", ["prefill", "decode", "always"])
    @pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"use_cache": False}])
    def test_the_edit_and_the_query_are_named(self, vlm, batch, phase, options):
        def poison(states, context):
            broken = torch.where(context.query == 1, float("inf"), 1.0)
            return states * broken[:, None]

        intervention = iv.custom(poison).at(layers=[3]).during(phase)
        text = rf"NaN or infinity at blocks.3.hook_resid_post after the edit custom\(.*poison\), query '{batch.queries[1].id}'"
        with pytest.raises(errors.NumericsError, match=text):
            vlm.run(batch, [iv.nothing, intervention], new_tokens=3, generation=options)
        if not options:
            with pytest.raises(errors.NumericsError, match=text):
                vlm.run(vlm.prefill(batch), intervention, new_tokens=3)

    def test_the_step_is_named_where_no_edit_did_it(self, vlm, batch):
        steps = itertools.count()

        def poison(module, args, output):
            return output * (float("nan") if next(steps) == 2 else 1)

        handle = vlm.hf.get_submodule(vlm.cfg.norm).register_forward_hook(poison)
        try:
            with (
                pytest.warns(UserWarning, match="includes the hook"),
                pytest.raises(errors.NumericsError, match=f"logits of step 2, query '{batch.queries[0].id}'"),
            ):
                vlm.run(batch, new_tokens=5)
        finally:
            handle.remove()

    def test_an_overflow_of_float16(self, hf_vlm, processor):
        half = gl.load(copy.deepcopy(hf_vlm).half(), processor=processor, self_check=False)
        batch = half.batch(["how to mend the hat ?"])
        with pytest.raises(errors.NumericsError, match=r"blocks.3.hook_resid_post after the edit"):
            half.run(batch, iv.custom(lambda states, context: states * 1e6).at(layers=[3]), new_tokens=2)

    def test_a_hook_functions(self, vlm, batch):
        hooks = [("blocks.3.hook_resid_post", lambda value, hook: value * float("nan"))]
        with pytest.raises(errors.NumericsError, match=f"query '{batch.queries[0].id}'"):
            vlm.run_with_hooks(batch, fwd_hooks=hooks)

    def test_evaluate_is_told(self, vlm):
        queries = [gl.Query("how to mend the hat ?", "harmless"), gl.Query("how to push the radio ?", "harmful")]
        nan, judge = iv.custom(lambda states, context: states * float("nan")).at(layers=[5]), gl.organism.judge
        with pytest.raises(errors.NumericsError, match=r"blocks.5"):
            gl.evaluate(vlm, {"nan": nan}, queries, presentations.text_only, judge=judge, max_new_tokens=2)
