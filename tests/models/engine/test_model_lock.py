"""One run at a time: threads take turns, and a run inside of a run is refused."""

import contextlib
import multiprocessing
import os
import sys
import threading

import pytest
import torch

import guardlens as gl
from guardlens import errors, presentations
from guardlens import interventions as iv

TEXTS = ["how to forge the badge ?", "please explain how to wash the hat ."]
GREY = presentations.blank("grey", 32)


@pytest.fixture(scope="module")
def batch(vlm):
    return vlm.batch(TEXTS, GREY)


def push(layer, size, positions="last"):
    direction = torch.randn(128, generator=torch.Generator().manual_seed(layer))
    return iv.custom(lambda states, context: states + size * direction).at(layers=[layer], positions=positions)


def test_threads_give_what_one_alone_gives(vlm, batch):
    kept, interventions, everywhere = vlm.prefill(batch), [push(3, 2.0), push(5, 4.0)], [push(6, 2.0, "all")] * 2
    jobs = [
        lambda: vlm.run(batch, interventions[0]).logits,
        lambda: vlm.run(vlm.batch(TEXTS, GREY), interventions[1]).logits,
        lambda: vlm.run(kept, interventions).logits,
        lambda: vlm.run(batch, everywhere, layout="fork").logits,
        lambda: vlm.run(batch, interventions, new_tokens=3).tokens,
        lambda: vlm.run_with_cache(batch, names_filter="blocks.2.hook_resid_post")[0],
    ]
    alone, found = [job() for job in jobs], {}

    def work(number):
        found[number] = [jobs[number]() for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, alone[number]) for number, several in found.items() for each in several) and len(found) == len(jobs)
    assert not any(vlm._tests.flaws.values())


CALLS = {
    "run": lambda model, batch: model.run(batch),
    "generate": lambda model, batch: model.generate(batch, max_new_tokens=2),
    "cache": lambda model, batch: model.run_with_cache(batch),
    "prefill": lambda model, batch: model.prefill(batch),
    "collect": lambda model, batch: gl.collect(model, batch.queries),
    "transformers": lambda model, batch: model.hf(**batch.inputs),
    "its generate": lambda model, batch: model.hf.generate(**batch.inputs, max_new_tokens=2),
}


class TestInsideOfARun:
    @pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
    def test_a_run_is_refused(self, vlm, batch, call):
        def edit(states, context):
            call(vlm, batch)
            return states

        intervention, before = iv.custom(edit).at(layers=[5]), vlm.run(batch).logits
        for asked in (
            {},
            {"interventions": [intervention] * 2},
            {"new_tokens": 2},
            {"interventions": [intervention.at(positions="all")] * 2, "layout": "fork"},
        ):
            with pytest.raises(errors.InterventionError, match="a run of a model inside of a run"):
                vlm.run(batch, **{"interventions": intervention, **asked})
        with pytest.raises(errors.InterventionError, match="a run of a model inside of a run"):
            vlm.run_with_hooks(batch, fwd_hooks=[("vision.blocks.1.hook_resid_post", lambda value, hook: call(vlm, batch) and None)])
        assert torch.equal(vlm.run(batch).logits, before) and not any(vlm._tests.flaws.values())

    def test_prompts_can_be_made_and_another_model_can_run(self, vlm, llm, batch):
        def edit(states, context):
            llm.run(llm.batch(TEXTS), push_small)
            vlm.batch(TEXTS)
            return states

        push_small = iv.custom(lambda states, context: states).at(layers=[1])
        assert torch.equal(vlm.run(batch, iv.custom(edit).at(layers=[5])).logits, vlm.run(batch).logits)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_that_was_forked_while_another_thread_had_its_turn(vlm, batch):
    begun, end = threading.Event(), threading.Event()

    def slow(states, context):
        begun.set()
        end.wait(20)
        return states

    other = threading.Thread(target=lambda: vlm.run(batch, iv.custom(slow).at(layers=[0])))
    other.start()
    begun.wait(20)
    fork = multiprocessing.get_context("fork")
    with pytest.warns(DeprecationWarning, match="fork") if sys.version_info >= (3, 12) else contextlib.nullcontext():
        process = fork.Process(target=_take, args=(vlm,))
        process.start()
    process.join(20)
    end.set()
    other.join()
    assert process.exitcode == 0


def _take(model):
    from guardlens.models.engine.model_lock import taken

    with taken(model.hf) as first:
        os._exit(0 if first else 1)
