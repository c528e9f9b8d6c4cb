"""Prompts as tokens: what is shown is what was meant, whatever the tokenizer's settings."""

from copy import deepcopy

import pytest
import torch

import guardlens as gl
from guardlens import Site, presentations

QUERIES = ("how to mend the hat ?", "how to paint the old red shed with a brush ?")
GREY = presentations.blank("grey", 32)


class TestWithoutAPadToken:
    """As Llama's and GPT-2's tokenizers come."""

    @pytest.mark.parametrize("asked", [QUERIES[:1], QUERIES], ids=["one", "many"])
    @pytest.mark.parametrize(("kind", "shown"), [("llm", presentations.text_only), ("vlm", presentations.text_only), ("vlm", GREY)])
    def test_states_and_answers_are_the_same(self, request, kind, shown, asked):
        model = request.getfixturevalue(kind)
        processor = deepcopy(model.processor)
        without = gl.load(model.hf, processor=processor)
        without.tokenizer.pad_token = None
        settings = deepcopy(without.tokenizer.special_tokens_map)

        mine, batch = without.batch(asked, shown), model.batch(asked, shown)
        assert torch.equal(mine.mask, batch.mask) and torch.equal(
            mine.inputs["input_ids"][mine.mask], batch.inputs["input_ids"][batch.mask]
        )
        site = Site()
        torch.testing.assert_close(without.run(mine, read=[site]).reads[site], model.run(batch, read=[site]).reads[site])
        assert without.generate(list(asked), shown, max_new_tokens=4) == model.generate(list(asked), shown, max_new_tokens=4)
        assert without.tokenizer.special_tokens_map == settings and without.tokenizer.pad_token is None

    @pytest.mark.parametrize("left", ["bos_token", "unk_token", None])
    def test_any_token_will_do(self, llm, left):
        words = deepcopy(llm.processor)
        known = llm.batch(QUERIES)
        for name in {"pad_token", "eos_token", "bos_token", "unk_token"} - {left}:
            setattr(words, name, None)
        found = gl.load(llm.hf, processor=words).batch(QUERIES, padding_side="left")
        assert torch.equal(found.mask, known.mask) or left != "bos_token"
        assert words.pad_token is None
