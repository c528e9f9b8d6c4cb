"""Random splits of queries that keep pairs and clusters on one side."""

import math
from collections.abc import Iterable, Sequence
from numbers import Real

import numpy as np

from guardlens.data.queries import Query, QueryPairs, as_queries
from guardlens.errors import ArgumentError, QueryError, as_count


def split(queries: Iterable[str | Query] | QueryPairs, shares: Sequence[float], seed: int = 0) -> tuple[tuple[Query, ...], ...]:
    """Split queries at random into parts, so that every pair and every cluster lies within one part.

    Args:
        queries: The queries to split. Each part keeps their order.
        shares: The size of each part relative to the others, e.g. `(2, 1, 1)` for a half and two quarters.
        seed: The seed of the shuffle.

    Raises:
        ArgumentError: A share is not a positive number, or the seed is not a whole number from 0 up.
        QueryError: A part would be empty.

    Examples:
        >>> from guardlens.data.splits import split
        >>> first, second = split(queries, (2, 1))
        >>> len(first) + len(second), {q.cluster for q in first} & {q.cluster for q in second}
        (36, set())
    """
    queries = as_queries(queries)
    valid = [isinstance(share, Real) and 0 < share < math.inf for share in shares] if isinstance(shares, Iterable) else []
    if not valid or not all(valid):
        raise ArgumentError(f"the shares {shares!r}", "one positive number for each part", "split(queries, (2, 1))")
    seed = as_count(seed, "seed", ArgumentError, "split(queries, shares, seed=0)", least=0)
    groups = _connected_components(queries)
    part_of = _part_of_each_group(sorted(set(groups)), shares, seed)
    parts = tuple(
        tuple(query for query, group in zip(queries, groups, strict=True) if part_of[group] == part) for part in range(len(shares))
    )
    if not all(parts):
        found = f"{len(part_of)} independent groups of queries for {len(shares)} parts"
        raise QueryError(found, "enough for each part", "give more queries")
    return parts


def _part_of_each_group(groups: list[str], shares: Sequence[float], seed: int) -> dict[str, int]:
    """Shuffle the groups, and cut the result into parts of the given shares."""
    bounds = np.rint(np.cumsum(shares) / np.sum(shares) * len(groups)).astype(int)
    order = np.random.default_rng(seed).permutation(len(groups))
    return {groups[index]: int(np.searchsorted(bounds, place, side="right")) for place, index in enumerate(order)}


def _connected_components(queries: Sequence[Query]) -> list[str]:
    """Name the connected component of each query in the graph whose edges are common ids, pairs and clusters.

    A union-find: every id, pair and cluster is a node, each node points to its parent, and a component is named by its root.
    """
    parents: dict[str, str] = {}

    def find(node: str) -> str:
        while parents.setdefault(node, node) != node:
            node = parents[node]
        return node

    def union(node: str, other: str) -> None:
        parents[find(node)] = find(other)

    for query in queries:
        for kind, name in (("pair", query.pair), ("cluster", query.cluster)):
            if name:
                union(f"{kind}:{name}", f"id:{query.id}")
    return [find(f"id:{query.id}") for query in queries]
