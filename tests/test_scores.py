import numpy as np
import pytest
import torch
from hypothesis import given
from scipy import special, stats

from guardlens import errors
from guardlens.scores import KL, RefusalLogOdds, Score, kl, refusal_logodds
from tests.strategies import gaussian, seeds


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
