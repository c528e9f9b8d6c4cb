"""Batches: every query once, in its own place again, with little padding, and no more of them than memory holds."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import guardlens as gl
from guardlens import errors, presentations
from guardlens import interventions as iv
from guardlens.data.presentations import text_only
from guardlens.data.queries import Query
from guardlens.evaluation.runner import evaluate
from guardlens.models import batching
from guardlens.models.batching import BatchResult, bucket_size, free_memory, in_query_order, over_batches, prompt_bytes, prompts_that_fit
from guardlens.models.hooked_model import HookedModel
from guardlens.models.processing.image_batching import repeats_one_row
from tests.strategies import make_batch

WORDS = ("hat", "fern", "radio")
TEXTS = [f"how to {verb} the {noun} ?" for verb in ("wash", "mend", "push") for noun in WORDS]
GREY = presentations.blank("grey", 32)


class Fake(HookedModel):
    """A model whose batches are made in no time; a prompt has as many tokens as its text has characters."""

    cfg = SimpleNamespace(image_layers=frozenset())

    def batch(self, queries, presentation=text_only, *, padding_side="left"):
        made = make_batch([len(query.text) for query in queries], width=max(max(len(query.text) for query in queries), 3))
        return batching.Batch(tuple(queries), presentation, made.inputs, made.mask, made.image, made.instruction)

    def share(self, batch):
        return None


def asked(lengths):
    return [Query("x" * length, id=str(place)) for place, length in enumerate(lengths)]


@given(st.lists(st.integers(3, 3000), min_size=1, max_size=40), st.integers(1, 9), st.sampled_from([0, 2]))
@example([5, 5, 2000, 5, 5], 9, 0)
def test_every_query_is_in_one_batch_and_back_in_its_place(lengths, size, axis):
    queries, seen = asked(lengths), []

    def work(batch):
        seen.append(batch)
        numbers = torch.tensor([float(query.id) for query in batch.queries])
        return numbers[:, None].expand(-1, 3) if axis == 0 else np.tile(numbers.numpy(), (2, 4, 1))

    found = in_query_order(over_batches(Fake(None, None, "fake"), queries, text_only, work, size), len(queries), axis)
    expected = torch.arange(float(len(queries)))
    assert torch.equal(found, (expected[:, None] if axis == 0 else expected).expand(found.shape))
    assert sorted(int(query.id) for batch in seen for query in batch.queries) == list(range(len(queries)))
    ordered = [len(query.text) for batch in seen for query in batch.queries]
    assert ordered == sorted(lengths, reverse=True)
    for batch in seen:
        assert len(batch.queries) <= size
        padding = int((~batch.mask).sum())
        assert padding <= max(1024, batch.mask.numel() / 4)


def test_like_lengths_fill_a_batch_and_an_outlier_does_not_pad_it():
    assert bucket_size([2000, 40, 40, 40]) == 1
    assert bucket_size([40] * 64) == 64 and bucket_size([40, 30, 20, 10]) == 4
    assert bucket_size([4000, 3900, 3800, 2000]) == 4  # 2300 of 16000: less than a quarter
    assert bucket_size([4000, 4000, 900, 900]) == 2
    lengths = [3000, *[60] * 63]
    naive, here = 64 * 3000, 3000 + 63 * 60
    seen = [p.result for p in over_batches(Fake(None, None, "f"), asked(lengths), text_only, lambda batch: batch.mask.numel(), 64)]
    assert sum(seen) == here < naive / 20


def test_no_queries_and_no_size():
    assert list(over_batches(Fake(None, None, "f"), [], text_only, lambda batch: 0)) == []
    with pytest.raises(errors.ArgumentError, match="Found batch_size=0"):
        list(over_batches(Fake(None, None, "f"), asked([5]), text_only, lambda batch: 0, 0))


class TestRoom:
    def test_of_a_prompt(self, vlm):
        """LLaVA-1.5-7B in bfloat16 at 600 tokens, by hand: its keys and values are 512 KiB per token."""
        cfg = replace(vlm.cfg, n_layers=32, n_kv_heads=32, n_heads=32, d_head=128, d_model=4096, d_mlp=11008)
        kept, block, scores = 600 * 512 * 1024, 600 * 2 * (8 * 4096 + 3 * 11008), 600 * 600 * 32 * 4
        cfg = replace(cfg, d_vocab=32064)
        logits = 6 * 4 * 32064
        assert prompt_bytes(cfg, 600, 2) == kept + block + scores + logits
        unknown = replace(cfg, d_head=0, d_mlp=0, n_kv_heads=8)
        assert prompt_bytes(unknown, 1, 4) == 4 * (2 * 32 * 8 * 128 + 8 * 4096 + 3 * 4 * 4096) + 4 * 32 + logits

    def test_is_half_of_what_is_free(self, vlm, monkeypatch):
        batch = vlm.batch(TEXTS, GREY)
        one = prompt_bytes(vlm.cfg, batch.mask.shape[1], 4)
        for free, expected in ((6 * one, 3), (6 * one - 1, 2), (0, 1)):
            monkeypatch.setattr(batching, "free_memory", lambda device, free=free: free)
            assert prompts_that_fit(vlm, batch) == expected
        monkeypatch.setattr(batching, "free_memory", lambda device: 6 * one)
        assert prompts_that_fit(vlm, batch, new_tokens=batch.mask.shape[1]) == 1
        monkeypatch.setattr(batching, "free_memory", lambda device: 2**40)
        assert prompts_that_fit(vlm, batch) >= len(TEXTS)

    def test_sets_the_batch_size_where_none_is_given(self, vlm, monkeypatch):
        whole = gl.collect(vlm, TEXTS, GREY)
        sizes, run = [], type(vlm).run
        monkeypatch.setattr(type(vlm), "run", lambda self, batch, *a, **o: sizes.append(len(batch.queries)) or run(self, batch, *a, **o))
        wide = vlm.batch([max(TEXTS, key=len)], GREY).mask.shape[1]
        monkeypatch.setattr(batching, "free_memory", lambda device: 8 * prompt_bytes(vlm.cfg, wide, 4))
        found = gl.collect(vlm, TEXTS, GREY)
        assert sizes == [4, 4, 1]
        torch.testing.assert_close(found.states, whole.states, atol=1e-4, rtol=0)
        sizes.clear()
        gl.collect(vlm, TEXTS, GREY, batch_size=9)
        assert sizes == [9]

    def test_memory_of_the_machine(self):
        assert 2**20 < free_memory(torch.device("cpu")) < 2**50

    def test_memory_of_a_gpu_counts_what_torch_keeps_for_itself(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
        assert free_memory(torch.device("cuda:1")) == 120


@pytest.mark.parametrize("after_room", [False, True])
def test_what_does_not_fit_is_halved_whoever_chose_its_size(vlm, monkeypatch, after_room):
    """Of the batch that was tried, not of the one that memory had cut already; what was done before is not done again."""
    monkeypatch.setattr(batching, "free_memory", lambda device: 2**40)
    if after_room:
        monkeypatch.setattr(batching, "prompts_that_fit", lambda model, batch, new_tokens=0: 6)
    sizes = []

    def work(batch):
        sizes.append(len(batch.queries))
        if len(batch.queries) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [query.text for query in batch.queries]

    found = list(over_batches(vlm, [Query(text) for text in TEXTS], GREY, work))
    assert sizes == ([6, 3, 1, *[1] * 8] if after_room else [9, 4, 2, 2, 2, 2, 1])
    back = {place: text for part in found for place, text in zip(part.indices, part.result, strict=True)}
    assert [back[place] for place in range(9)] == TEXTS


def cramped(vlm, monkeypatch, most):
    run, sizes = type(vlm).run, []

    def limited(self, batch, *rest, **options):
        sizes.append(len(batch.queries))
        if len(batch.queries) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, batch, *rest, **options)

    monkeypatch.setattr(type(vlm), "run", limited)
    return sizes


QUERIES = [Query(text, "harmful" if place % 2 else "harmless") for place, text in enumerate(TEXTS)]


def test_evaluate_halves_too(vlm, monkeypatch):
    judge = SimpleJudge()
    options = {"judge": judge, "max_new_tokens": 2}
    whole = evaluate(vlm, {"none": gl.defences.none}, QUERIES, [text_only, GREY], **options)
    sizes = cramped(vlm, monkeypatch, 4)
    halved = evaluate(vlm, {"none": gl.defences.none}, QUERIES, [text_only, GREY], **options)
    assert sizes == [9, 4, 4, 1] * 2
    assert halved.columns["query"].tolist() == whole.columns["query"].tolist() == [query.id for query in QUERIES] * 2
    assert halved.columns["answer"].tolist() == whole.columns["answer"].tolist()


def test_evaluate_continues_from_what_prompts_begin_with(vlm, basis, monkeypatch):
    """Longer words around the query make a beginning that is worth it; the answers are those of each query alone."""
    framed = presentations.framed(GREY, before="please tell me how to mend the hat and the fern and the radio . " * 2)
    arms = {"none": gl.defences.none, "guard": gl.defences.Defence("guard", gl.interventions.project_out(basis).at(layers=3))}
    options = {"judge": SimpleJudge(), "max_new_tokens": 4}
    begun, run = [], type(vlm).run

    def note(self, batch, *rest, **options):
        if options.get("new_tokens"):
            begun.append(batch.prefix is not None)
        return run(self, batch, *rest, **options)

    monkeypatch.setattr(type(vlm), "run", note)
    together = evaluate(vlm, arms, QUERIES, framed, **options)
    alone = evaluate(vlm, arms, QUERIES, framed, batch_size=1, **options)
    assert begun == [True] * 2 + [False] * 18
    assert together.columns["answer"].tolist() == alone.columns["answer"].tolist()
    assert len(set(alone.columns["answer"])) > 4


def test_prompts_that_continue_from_a_prefix_leave_their_common_image_in_one_row(vlm):
    """Only a run of whole prompts writes it out for each of them. Both have the same states."""
    framed = presentations.framed(GREY, before="please tell me how to mend the hat and the fern and the radio . " * 2)
    site = gl.Site(layers=(2,))

    def work(batch):
        before = vlm.run(batch, read=site).reads[site]
        assert batch.prefix is not None and repeats_one_row(batch.inputs.data["pixel_values"])
        whole = vlm.run(batch.after(None), read=site).reads[site]
        assert not repeats_one_row(batch.inputs.data["pixel_values"])
        torch.testing.assert_close(before, whole, atol=1e-4, rtol=0)

    assert len(list(over_batches(vlm, QUERIES, framed, work))) == 1


class SimpleJudge:
    name = "simple"

    def __call__(self, query, answer):
        return "refused" if len(answer) % 2 else "answered"


def test_attribute_halves_too(vlm, basis, monkeypatch):
    whole = gl.attribute(vlm, basis, QUERIES, GREY, layer=1)
    sizes = cramped(vlm, monkeypatch, 4)
    halved = gl.attribute(vlm, basis, QUERIES, GREY, layer=1)
    assert set(sizes) == {9, 4, 1}
    assert halved.columns["query"].tolist() == whole.columns["query"].tolist()
    np.testing.assert_allclose(halved.columns["value"], whole.columns["value"], atol=1e-4)


def test_results_are_joined_in_any_order():
    parts = [BatchResult((2, 0), torch.tensor([[2.0], [0.0]])), BatchResult((1,), torch.tensor([[1.0]]))]
    assert in_query_order(parts, 3).flatten().tolist() == [0, 1, 2]


class TestWhoseMemoryItWas:
    """A user's function that finds no room is not taken for a prompt that is too long."""

    QUERIES = (gl.Query("how to mend the hat ?", "harmless", id="a"), gl.Query("how to push the radio ?", "harmful", id="b"))

    @staticmethod
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def test_a_judge(self, vlm):
        class Judge:
            name, __call__ = "mine", self.full

        with pytest.raises(errors.ModelError, match="the judge mine, which ran out of memory"):
            gl.evaluate(vlm, {"none": iv.nothing}, self.QUERIES, presentations.text_only, judge=Judge(), max_new_tokens=2)

    def test_a_score(self, unchecked, vlm):
        class Mine:
            name, unit, __call__ = "mine", "", self.full

        intervention = iv.custom(lambda states, context: states + 1)
        with pytest.raises(errors.ModelError, match="the score mine, which ran out of memory"):
            gl.sweep(vlm, intervention, self.QUERIES, presentations.text_only, layers=[3], scores=[Mine()], placebos=0)

    def test_an_edit(self, vlm):
        intervention = iv.custom(self.full)
        with pytest.raises(errors.ModelError, match=r"the edit custom\(.*full\), which ran out of memory"):
            gl.sweep(vlm, intervention, self.QUERIES, presentations.text_only, layers=[3], placebos=0)

    def test_a_presentation(self, vlm):
        class Mine:
            name, __call__ = "mine", self.full

        with pytest.raises(errors.ModelError, match="the presentation mine, which ran out of memory"):
            gl.keep(vlm, self.QUERIES, Mine())
