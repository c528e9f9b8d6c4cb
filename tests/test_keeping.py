"""Batches that don't fit in memory are halved, without losing work or order."""

import pytest
import torch

import guardlens as gl
from guardlens import errors, presentations
from guardlens.queries import text_only

TEXTS = [f"how to {verb} the {noun} ?" for verb in ("wash", "mend", "push") for noun in ("hat", "fern", "radio")]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
@pytest.mark.parametrize("presentation", [text_only, presentations.blank("grey", 32)], ids=["text", "grey"])
def test_a_batch_that_does_not_fit_is_halved(vlm, monkeypatch, error, presentation):
    expected = gl.collect(vlm, TEXTS, presentation, batch_size=3, progress=False)
    run, sizes = type(vlm).run, []

    def cramped(self, batch, *rest, **options):
        sizes.append(len(batch.queries))
        if len(batch.queries) > 3:
            raise error
        return run(self, batch, *rest, **options)

    monkeypatch.setattr(type(vlm), "run", cramped)
    found = gl.collect(vlm, TEXTS, presentation, batch_size=9, progress=False)
    assert sizes == [9, 4, 2, 2, 2, 2, 1]
    assert [query.text for query in found.queries] == TEXTS
    torch.testing.assert_close(found.states, expected.states, atol=1e-4, rtol=0)


def test_one_prompt_that_does_not_fit_is_named(vlm, monkeypatch):
    def full(self, *rest, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(vlm), "run", full)
    with pytest.raises(errors.ModelError, match="the prompt of query 'q1', which alone does not fit in memory"):
        gl.collect(vlm, [TEXTS[0], gl.Query(TEXTS[1], id="q1")], progress=False)


def test_other_errors_are_not_taken_for_it(vlm, monkeypatch):
    def broken(self, *rest, **options):
        raise RuntimeError("mine")

    monkeypatch.setattr(type(vlm), "run", broken)
    with pytest.raises(RuntimeError, match="mine"):
        gl.collect(vlm, TEXTS, progress=False)
