"""A model is used in another process: in a fork of the one that has run it, and in one that starts afresh and loads it anew."""

import multiprocessing
import warnings

import pytest

import guardlens as gl
from guardlens import presentations


def states(model, into):
    batch = model.batch(gl.organism.queries("validation")[:2], presentations.blank("grey", 32))
    into.put(model.run(batch, read=[gl.Site()]).reads[gl.Site()].tolist())


def loaded(into):
    states(gl.load("organism"), into)


@pytest.mark.parametrize(("way", "target"), [("fork", states), ("fork", loaded)])
def test_another_process_computes_the_same(way, target):
    context, model = multiprocessing.get_context(way), gl.load("organism")
    here, there = context.SimpleQueue(), context.SimpleQueue()
    states(model, here)
    child = context.Process(target=target, args=(model, there) if target is states else (there,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of forks beside threads
        child.start()
    try:
        child.join(120)
        assert child.exitcode == 0
        assert there.get() == here.get()
    finally:
        child.kill()
