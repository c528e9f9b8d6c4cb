import numpy as np
import pytest
import torch
from hypothesis import given
from scipy import special, stats
from transformers import LlamaConfig, LlamaForCausalLM

import guardlens as gl
from guardlens import errors
from guardlens import interventions as iv
from guardlens.experiments.scores import KL, AnswerKL, RefusalLogOdds, Score, kl, refusal_logodds
from tests.strategies import gaussian, seeds
from tests.zoo.family import build, tokenizer
from tests.zoo.text import TEMPLATE


class Words:
    """A tokenizer of five words."""

    unk_token_id = 0
    vocabulary = ("<unk>", "sorry", "sure", "I", "no")

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [self.vocabulary.index(word) if word in self.vocabulary else 0 for word in text.split()]}


SCORE = RefusalLogOdds(("sorry no", "no way", "sorry sure", "alas"))


def test_first_known_tokens_once():
    assert SCORE.token_ids(Words()) == [1, 4]
    with pytest.raises(
        errors.ModelError, match=r"knows none of the openings of a refusal\.\nExpected at least one\.\nNext: pass RefusalLogOdds"
    ):
        RefusalLogOdds(("alas", "oh no"))(torch.zeros(1, 5), torch.zeros(1, 5), Words())


@given(seeds)
def test_log_odds_equal_the_closed_form(seed):
    logits = 4 * gaussian(seed, 3, 5, dtype=torch.float32)
    p = special.softmax(logits.double().numpy(), axis=1)[:, [1, 4]].sum(1)
    assert SCORE(logits, torch.zeros(3, 5), Words()).numpy() == pytest.approx(special.logit(p), abs=1e-4)


def test_log_odds_stay_finite_where_p_rounds_to_one():
    logits = torch.tensor([[0.0, 200, 0, 0, 0], [0.0, 0, 200, 0, 0]])
    expected = [200 - np.log(3), np.log(2) - special.logsumexp([200, 0, 0])]
    assert SCORE(logits, logits, Words()).tolist() == pytest.approx(expected, abs=1e-3)


@given(seeds)
def test_kl_is_from_base_to_edited(seed):
    edited, base = gaussian(seed, 3, 5, dtype=torch.float32), 3 * gaussian(seed + 1, 3, 5, dtype=torch.float32)
    p, q = (special.softmax(x.double().numpy(), axis=1) for x in (base, edited))
    assert kl(edited, base, None).numpy() == pytest.approx(stats.entropy(p, q, axis=1), abs=1e-5)
    assert kl(base + 7, base, None).numpy() == pytest.approx(0, abs=1e-5)


def test_scores_have_names_and_units():
    assert isinstance(kl, Score) and isinstance(refusal_logodds, Score)
    assert (KL().name, RefusalLogOdds().name) == ("kl", "refusal_logodds") and "nats" in kl.unit and "nats" in refusal_logodds.unit


def test_what_fills_up_an_answer_that_a_stop_string_ended_is_not_of_it():
    """As long as each answer is alone, where nothing must be filled up."""
    words, sizes = tokenizer(TEMPLATE), {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = gl.load(build(LlamaForCausalLM, LlamaConfig(vocab_size=len(words), **sizes)), processor=words)
    texts = ["How to fold a paper boat?", "What is a boat?", "Say a word."]
    kept = model.prefill(model.batch(texts))
    said, *others = ([words.decode(token) for token in model.run(model.batch(text), new_tokens=12).tokens[0, 0]] for text in texts)
    stop = next(text for text in said[2:10] if text.isascii() and not any(text in "".join(other) for other in others))
    model.hf.generation_config.stop_strings = [stop]
    alone = [model.run(model.batch(text), new_tokens=12).tokens.shape[2] for text in texts]
    assert model.hf.generation_config.eos_token_id != words.pad_token_id and alone[0] < max(alone)
    assert AnswerKL(12).answer(model, kept).real.sum(1).tolist() == alone


class TestAgainstTheUneditedRun:
    """What a score computes once must be what it computes anew for every run."""

    @pytest.mark.parametrize("score", [kl, refusal_logodds])
    def test_of_the_next_token(self, vlm, score):
        base, *edited = 4 * torch.randn(4, 5, vlm.cfg.d_vocab, generator=torch.Generator().manual_seed(0))
        own = RefusalLogOdds(("how", "please")) if score is refusal_logodds else score
        of_logits = own.against(base, vlm.tokenizer)
        for logits in edited:
            before = logits.clone()
            assert torch.equal(of_logits(logits), own(logits, base, vlm.tokenizer))
            assert torch.equal(logits, before)

    def test_a_subclass_that_changes_the_call_alone_is_called(self, vlm, basis):
        class Doubled(KL):
            def __call__(self, logits, base, tokenizer):
                return 2 * super().__call__(logits, base, tokenizer)

        both = [kl, Doubled(name="doubled")]
        swept = gl.sweep(vlm, iv.add(basis.truncate(1), 3.0), ["how to forge the badge ?"], scores=both, placebos=0).columns
        single, doubled = (swept["value"][swept["score"] == name] for name in ("kl", "doubled"))
        assert single.max() > 1e-3
        np.testing.assert_allclose(doubled, 2 * single)

    def test_kl_keeps_its_precision_under_autocast(self, vlm):
        base = 4 * torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
        edited = base + 0.01 * torch.randn(3, 5000, generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16):
            found = kl(edited, base, vlm.tokenizer)
        torch.testing.assert_close(found, kl(edited, base, vlm.tokenizer), rtol=1e-5, atol=0)
