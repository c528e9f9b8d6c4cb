"""Small builders and hypothesis strategies: bases, directions, activations of pairs, batches of either padding, contexts."""

import torch
from hypothesis import strategies as st

from guardlens.data.activations import Activations
from guardlens.data.presentations import text_only
from guardlens.data.queries import Query, QueryPairs
from guardlens.directions import Directions
from guardlens.interventions import Context
from guardlens.models.engine.batch import Batch
from guardlens.results.provenance import Provenance

seeds = st.integers(0, 2**31 - 1)


def gaussian(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthonormal(seed, layers=2, rank=2, width=6, dtype=torch.float64):
    return torch.linalg.qr(gaussian(seed, layers, width, rank)).Q.transpose(1, 2).contiguous().to(dtype)


def make_directions(seed=0, layers=2, rank=2, width=6, dtype=torch.float64, model="", numbers=...):
    """Random orthonormal directions; `numbers=None` makes a single basis for every layer."""
    means = gaussian(seed + 1, 2, layers, width).to(dtype)
    numbers = tuple(range(layers)) if numbers is ... else numbers
    vectors = orthonormal(seed, layers, rank, width, dtype)
    return Directions(vectors, numbers, means[0], means[1], torch.zeros(layers, 0, dtype=dtype), "test", provenance=Provenance(model))


def make_pairs(n):
    return QueryPairs(tuple(Query(f"bad {i}", "harmful") for i in range(n)), tuple(Query(f"good {i}", "harmless") for i in range(n)))


def make_activations(seed=0, pairs=5, layers=2, width=6, shift=1.0, **more):
    queries = make_pairs(pairs).queries
    states = gaussian(seed, 2 * pairs, layers, width, dtype=torch.float32)
    states[:pairs] += shift
    return Activations(states, tuple(range(layers)), queries, **more)


def make_batch(lengths=(3, 5), side="left", image=(1, 2), instruction=(2, 3), width=None):
    """Rows of `lengths` real tokens; `image` and `instruction` are slices of the real tokens."""
    width = width or max(lengths)
    mask, images, texts = (torch.zeros(len(lengths), width, dtype=torch.bool) for _ in range(3))
    for row, length in enumerate(lengths):
        first = width - length if side == "left" else 0
        mask[row, first : first + length] = True
        images[row, first + image[0] : first + image[1]] = True
        texts[row, first + instruction[0] : first + instruction[1]] = True
    queries = tuple(Query(f"query {row}", id=f"q{row}") for row in range(len(lengths)))
    return Batch(queries, text_only, {"input_ids": torch.arange(mask.numel()).reshape(mask.shape)}, mask, images, texts)


def context(states, layer=0, held=None, step=0):
    """A context in which state i belongs to query i and `held` is what every held state is."""
    return Context("resid_post", layer, step, torch.arange(len(states)), 1.0, lambda state: held)


def apply(intervention, states, layer=0, held=None):
    """The one edit of an intervention on bare states."""
    return intervention.steps[0].edit(states, context(states, layer, held))
