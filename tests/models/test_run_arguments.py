"""What `run` and the verbs beside it take, and that everything else is refused by name."""

import copy

import numpy as np
import pytest
import torch

import guardlens as gl
from guardlens import Site, errors, presentations
from guardlens import interventions as iv
from tests import zoo

TEXTS = ["how to forge the badge ?", "please explain how to wash the hat ."]
ALL = {family.name: family for family in zoo.ALL}


@pytest.fixture(scope="module")
def batch(vlm):
    return vlm.batch(TEXTS, presentations.blank("grey", 32))


@pytest.fixture(scope="module")
def kept(vlm, batch):
    return vlm.prefill(batch)


WRONG = {
    "logits, a typo": ({"logits": "first"}, errors.ArgumentError, "logits='first'"),
    "logits, a number": ({"logits": 5}, errors.ArgumentError, "logits=5"),
    "no reads": ({"read": None}, errors.SiteError, "read="),
    "reads that are no sites": ({"read": ["resid_post"]}, errors.SiteError, "Site"),
    "a negative count": ({"new_tokens": -1}, errors.ArgumentError, "new_tokens=-1"),
    "a broken count": ({"new_tokens": 2.5}, errors.ArgumentError, "new_tokens=2.5"),
    "a count of text": ({"new_tokens": "5"}, errors.ArgumentError, "new_tokens='5'"),
    "a count that is true": ({"new_tokens": True}, errors.ArgumentError, "new_tokens=True"),
    "a seed of text": ({"new_tokens": 2, "seed": "a"}, errors.ArgumentError, "seed='a'"),
    "a broken seed": ({"new_tokens": 2, "seed": 1.5}, errors.ArgumentError, "seed=1.5"),
    "options without tokens": ({"generation": {"do_sample": True}}, errors.ArgumentError, "generates nothing"),
    "a layout of a number": ({"layout": 5}, errors.ArgumentError, "layout 5"),
}


@pytest.mark.parametrize(("asked", "kind", "text"), WRONG.values(), ids=WRONG)
def test_what_run_refuses(unchecked, vlm, batch, asked, kind, text):
    with pytest.raises(kind, match=text):
        vlm.run(batch, **asked)


def test_a_prefix_that_is_none(unchecked, vlm, batch):
    with pytest.raises(errors.ArgumentError, match="Prefix"):
        vlm.run(batch.after(5))


def test_what_run_takes_for_the_same(unchecked, vlm, batch):
    site = Site(layers=(2,))
    assert torch.equal(vlm.run(batch, read=site).reads[site], vlm.run(batch, read=[site]).reads[site])
    sampled = {"generation": {"do_sample": True}}
    one, other = (vlm.run(batch, new_tokens=n, seed=s, **sampled).tokens for n, s in ((3, 5), (np.int64(3), torch.tensor(5))))
    assert torch.equal(one, other)


def test_a_batch_of_another_tokenizer(vlm, batch, hf_vlm, processor):
    other = ALL["Llama"]
    foreign = gl.load(other.model(), processor=other.processor())
    with pytest.raises(errors.MismatchError, match="a batch of another tokenizer"):
        vlm.run(foreign.batch(TEXTS))
    with pytest.raises(errors.MismatchError, match="a batch of another tokenizer"):
        foreign.run_with_cache(vlm.batch(TEXTS))
    same = gl.load(hf_vlm, processor=copy.deepcopy(processor))
    assert torch.equal(same.run(batch).logits, vlm.run(batch).logits)


@pytest.mark.parametrize(
    "tokens",
    [torch.ones(3, 2).long(), torch.ones(2), torch.ones(2, 2), torch.tensor([[1, -1], [1, 1]]), torch.full((2, 2), 10**6), [[1, 2], [3, 4]],
     torch.ones(2, 2).bool()],
    ids=["rows", "one axis", "floats", "negative", "beyond the vocabulary", "lists", "bools"],
)  # fmt: skip
def test_answers_that_are_none(unchecked, vlm, kept, tokens):
    with pytest.raises(errors.ArgumentError, match=r"answer|Tensor"):
        vlm.run(kept.answering(tokens), logits="answer")


@pytest.mark.parametrize("names", [5, [5], 2.5])
def test_names_of_hooks(unchecked, vlm, batch, names):
    with pytest.raises(errors.SiteError):
        vlm.run_with_cache(batch, names_filter=names)


@pytest.mark.parametrize("hooks", [5, [5], ["blocks.3.hook_resid_post"], [("blocks.3.hook_resid_post", 5)], [("a", "b", "c")], "ab"])
def test_hooks_that_are_no_pairs(unchecked, vlm, batch, hooks):
    with pytest.raises(errors.InterventionError, match="pairs of a hook name and a function"):
        vlm.run_with_hooks(batch, fwd_hooks=hooks)


@pytest.mark.parametrize("change", [lambda value, hook: value[:1], lambda value, hook: 1.0, lambda value, hook: value.mean()])
def test_hook_functions_give_what_they_get(vlm, batch, change):
    with pytest.raises(errors.InterventionError, match=r"a hook function at blocks.3.hook_resid_post that gives"):
        vlm.run_with_hooks(batch, fwd_hooks=[("blocks.3.hook_resid_post", change)])


def test_what_a_hook_function_gives_is_rounded_to_the_models_precision(vlm, batch):
    hooks = [("blocks.3.hook_resid_post", lambda value, hook: value.double() + 1)]
    expected = vlm.run_with_hooks(batch, fwd_hooks=[("blocks.3.hook_resid_post", lambda value, hook: (value.double() + 1).float())])
    assert torch.equal(vlm.run_with_hooks(batch, fwd_hooks=hooks), expected)


def test_states_of_another_width(unchecked, vlm):
    with pytest.raises(errors.MismatchError, match="a last axis of 128"):
        vlm.to_logits(torch.zeros(2, 64))
    with pytest.raises(errors.MismatchError, match="Tensor"):
        vlm.to_logits(np.zeros((2, 128)))


@pytest.mark.parametrize("tokens", [torch.ones(2, 3), [[1.5]], torch.tensor([[-1]]), 2.5])
def test_tokens_that_are_none(unchecked, vlm, tokens):
    with pytest.raises(errors.ArgumentError, match="token ids that are none"):
        vlm.decode(tokens)


@pytest.mark.parametrize("count", [1.5, "5", True, 0, None])
def test_the_length_of_answers(unchecked, vlm, batch, count):
    with pytest.raises(errors.ArgumentError, match="max_new_tokens="):
        vlm.generate(batch, max_new_tokens=count)


def test_a_fork_that_is_asked_for_is_tried_first():
    """Gemma 4 shares keys between blocks, which transformers can't find where the first ones are skipped."""
    family = ALL["Gemma 4"]
    model = gl.load(family.model(), processor=family.processor())
    interventions = [iv.custom(lambda states, context: states + 1).at(layers=3, positions="all")] * 2
    with pytest.raises(errors.InterventionError, match="can't run as forks: "):
        model.run(model.batch("How to fold a paper boat?"), interventions, layout="fork")


def test_offloaded_weights(vlm, batch, processor):
    """Their first weight is nowhere; inputs go to where weights are brought to run."""
    accelerate = pytest.importorskip("accelerate")
    push = 3 * torch.randn(128, generator=torch.Generator().manual_seed(0))
    intervention = iv.custom(lambda states, context: states + push).at(layers=[5])
    everywhere = [intervention.at(layers=[6], positions="all")] * 2

    def measured(model):
        prompts = model.batch(TEXTS, presentations.blank("grey", 32))
        return (
            model.run(prompts, everywhere).logits,
            model.run(model.prefill(prompts), [intervention, intervention], new_tokens=2).tokens,
            model.run_with_cache(prompts, names_filter="resid_post")[1]["resid_post", 3],
        )

    hf = copy.deepcopy(vlm.hf)
    accelerate.cpu_offload(hf, execution_device="cpu")
    found = measured(gl.load(hf, processor=processor))
    assert hf.device.type == "meta" and all(torch.equal(mine, plain) for mine, plain in zip(found, measured(vlm), strict=True))
