"""Generation: the answers of one condition, batch by batch. No judge takes part."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from guardlens.data.queries import Query
from guardlens.evaluation.conditions import Condition
from guardlens.models.batching import over_batches
from guardlens.models.engine.batch import Batch
from guardlens.models.hooked_model import HookedModel


@dataclass(frozen=True, eq=False)
class Answer:
    """A generated answer.

    Attributes:
        condition: The defence and the presentation that it was generated in.
        query: The query.
        text: The answer itself.
        gate: The share of the intervention's gates that opened for this query; nan if it has none.
    """

    condition: Condition
    query: Query
    text: str
    gate: float


def generate(
    model: HookedModel, condition: Condition, queries: Sequence[Query], max_new_tokens: int, batch_size: int | None = None
) -> Iterator[list[Answer]]:
    """Generate the greedy answers to queries in a condition, and yield them batch by batch.

    Args:
        model: The model.
        condition: The defence and the presentation.
        queries: The queries, of which there may be none. Batches hold queries of like length, so answers come in another order.
        max_new_tokens: The length of the longest answer.
        batch_size: Queries per batch; by default as many as free memory holds. It is halved if memory runs out.

    Raises:
        ModelError: A single prompt does not fit in memory.
    """
    work = partial(_answer_batch, model, condition, max_new_tokens)
    for portion in over_batches(model, queries, condition.shown, work, batch_size, new_tokens=max_new_tokens):
        yield portion.result


def _answer_batch(model: HookedModel, condition: Condition, max_new_tokens: int, batch: Batch) -> list[Answer]:
    run = model.run(batch, condition.defence.intervention, new_tokens=max_new_tokens)
    assert run.tokens is not None
    if run.decisions:
        gates = np.mean([decisions.cpu().numpy() for decisions in run.decisions.values()], axis=0)
    else:
        gates = np.full(len(batch.queries), np.nan)
    texts = model.decode(run.tokens[0])
    return [Answer(condition, query, text, float(gate)) for query, text, gate in zip(batch.queries, texts, gates, strict=True)]
