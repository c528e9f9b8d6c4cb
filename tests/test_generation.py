"""What generation is set to, by the checkpoint and by the call."""

import json

import numpy as np
import pytest
from transformers import GenerationConfig, LogitsProcessorList

from guardlens import errors
from guardlens.generation import generation_settings


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
        with pytest.raises(errors.PlanError, match="GenerationConfig"):
            generation_settings(vlm.hf, {"generation_config": {"top_k": 3}})
