"""Random splits of queries that keep pairs and clusters on one side."""

import math
from collections.abc import Iterable, Sequence
from numbers import Real

import numpy as np

from guardlens.data.queries import Query, QueryPairs, as_queries
from guardlens.errors import QueryError, as_count


def split(queries: Iterable[str | Query] | QueryPairs, shares: Sequence[float], seed: int = 0) -> tuple[tuple[Query, ...], ...]:
    """Split queries at random so that no pair and no cluster stands on two sides.

    Args:
        queries: What to split; order is kept within the parts.
        shares: Of each part, e.g. `(0.5, 0.25, 0.25)`; relative to their sum.
        seed: Of the shuffle.

    Raises:
        QueryError: A part would be empty, or shares or seed are no such numbers.

    Examples:
        >>> from guardlens.data.splits import split
        >>> first, second = split(queries, (2, 1))
        >>> len(first) + len(second), {q.cluster for q in first} & {q.cluster for q in second}
        (36, set())
    """
    queries = as_queries(queries)
    sound = [isinstance(share, Real) and 0 < share < math.inf for share in shares] if isinstance(shares, Iterable) else []
    if not sound or not all(sound):
        raise QueryError(f"the shares {shares!r}", "one positive number for each part", "split(queries, (2, 1))")
    seed = as_count(seed, "seed", QueryError, "split(queries, shares, seed=0)", least=0)
    groups = _linked(queries)
    names = np.array(sorted(set(groups)))
    order = np.random.default_rng(seed).permutation(len(names))
    bounds = np.rint(np.cumsum(shares) / np.sum(shares) * len(names)).astype(int)
    part_of = {str(names[place]): int(np.searchsorted(bounds, rank, side="right")) for rank, place in enumerate(order)}
    parts = tuple(tuple(q for q, g in zip(queries, groups, strict=True) if part_of[g] == part) for part in range(len(shares)))
    if not all(parts):
        raise QueryError(f"{len(names)} independent groups of queries for {len(shares)} parts", "enough for each part", "give more queries")
    return parts


def _linked(queries: Sequence[Query]) -> list[str]:
    """A name for each query that all queries share which are linked to it by pairs or clusters."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for query in queries:
        links = [f"{kind}:{value}" for kind, value in (("pair", query.pair), ("cluster", query.cluster)) if value]
        for link in links:
            parent[root(link)] = root(f"id:{query.id}")
    return [root(f"id:{query.id}") for query in queries]
