"""Batches that don't fit in memory are halved, without losing work or order."""

from typing import ClassVar

import pytest
import torch

import guardlens as gl
from guardlens import errors, presentations
from guardlens import interventions as iv
from guardlens.data.presentations import text_only

TEXTS = [f"how to {verb} the {noun} ?" for verb in ("wash", "mend", "push") for noun in ("hat", "fern", "radio")]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
@pytest.mark.parametrize("presentation", [text_only, presentations.blank("grey", 32)], ids=["text", "grey"])
def test_a_batch_that_does_not_fit_is_halved(vlm, monkeypatch, error, presentation):
    expected = gl.collect(vlm, TEXTS, presentation, batch_size=3)
    run, sizes = type(vlm).run, []

    def cramped(self, batch, *rest, **options):
        sizes.append(len(batch.queries))
        if len(batch.queries) > 3:
            raise error
        return run(self, batch, *rest, **options)

    monkeypatch.setattr(type(vlm), "run", cramped)
    found = gl.collect(vlm, TEXTS, presentation, batch_size=9)
    assert sizes == [9, 4, 2, 2, 2, 2, 1]
    assert [query.text for query in found.queries] == TEXTS
    torch.testing.assert_close(found.states, expected.states, atol=1e-4, rtol=0)


def test_one_prompt_that_does_not_fit_is_named(vlm, monkeypatch):
    def full(self, *rest, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(vlm), "run", full)
    with pytest.raises(errors.ModelError, match="The prompt of query 'q1' alone does not fit in memory"):
        gl.collect(vlm, [TEXTS[0], gl.Query(TEXTS[1], id="q1")])


def test_other_errors_are_not_taken_for_it(vlm, monkeypatch):
    def broken(self, *rest, **options):
        raise RuntimeError("mine")

    monkeypatch.setattr(type(vlm), "run", broken)
    with pytest.raises(RuntimeError, match="mine"):
        gl.collect(vlm, TEXTS)


PUSH = iv.custom(lambda states, context: states * 1.5)


class TestShownAsKept:
    """What is asked of kept prompts is how they are kept, said or unsaid; text alone is a presentation like any other."""

    VERBS: ClassVar = {
        "sweep": lambda model, *asked: gl.sweep(model, PUSH, *asked, layers=[5], placebos=0),
        "patching": lambda model, *asked: gl.activation_patching(model, *asked, donor=presentations.noise(size=32)),
    }

    @pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
    @pytest.mark.parametrize("kept", [presentations.blank("grey", 32), text_only], ids=["grey", "text"])
    def test_of_kept_prompts(self, vlm, verb, kept):
        prompts, other = gl.keep(vlm, TEXTS, kept), presentations.blank("white", 32)
        unsaid, said = verb(vlm, prompts), verb(vlm, prompts, kept)
        assert unsaid.facts["presentation"] == said.facts["presentation"] == kept.name
        for name in (other, text_only) if kept != text_only else (other,):
            with pytest.raises(errors.MismatchError, match=f"a prompt cache of the presentation '{kept.name}'"):
                verb(vlm, prompts, name)

    @pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
    def test_of_queries_text_alone_is_unsaid(self, vlm, verb):
        assert verb(vlm, TEXTS).facts["presentation"] == verb(vlm, TEXTS, text_only).facts["presentation"] == "text"
