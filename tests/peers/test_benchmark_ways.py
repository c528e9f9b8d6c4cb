"""What the benchmarks time of TransformerLens' bridge computes what guardlens does, on the same random LLaVA. `make peers` runs it."""

import pytest
import torch

from analyses.benchmarks import peers, rows, subjects, ways

pytestmark = pytest.mark.peers
SIZE = rows.PLANS["tiny"].size


@pytest.mark.parametrize("number", [1, 3])
def test_the_bridge_sweeps_and_collects_the_same(number):
    subject, bridge = subjects.model(SIZE), peers.bridge(subjects.built(SIZE))
    batch, vectors = (
        subject.batch(subjects.queries(number), subjects.blank(SIZE)),
        subjects.pushes(subject, subjects.directions(subject), 2.0),
    )
    mine = ways.raw_hooks(subject, batch, vectors, [0, 2])
    torch.testing.assert_close(peers.hooks(bridge, batch, vectors, [0, 2]), mine, atol=1e-5, rtol=0)
    assert not torch.allclose(mine[0], ways.plain(subject, batch), atol=1e-3)
    torch.testing.assert_close(peers.collect(bridge, batch, SIZE.layers), ways.collected(subject, batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("number", [1, 3])
def test_the_bridge_sweeps_a_text_model_the_same(number):
    size = rows.PLANS["tiny"].text
    subject, bridge = subjects.text_model(size), peers.bridge(subjects.built_text(size))
    batch = subject.batch(subjects.prompts(subject, number, 16))
    vectors = subjects.pushes(subject, subjects.directions(subject), 2.0)
    mine = ways.raw_hooks(subject, batch, vectors, [0, 2])
    torch.testing.assert_close(peers.hooks(bridge, batch, vectors, [0, 2]), mine, atol=1e-5, rtol=0)
    assert not torch.allclose(mine[0], ways.plain(subject, batch), atol=1e-3)
