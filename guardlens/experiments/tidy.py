"""Tidy columns of a grid of measurements: one row for each combination of cell, query, score, ..."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from guardlens.data.queries import Query


def crossed(*axes: Mapping[str, Sequence[Any]]) -> dict[str, np.ndarray]:
    """The columns of a grid: every combination of one entry of each axis, with the last axis running fastest.

    Args:
        axes: The columns of each axis, all of one length.

    Examples:
        >>> from guardlens.experiments.tidy import crossed
        >>> columns = crossed({"score": ["kl"]}, {"layer": [5, 6]}, {"query": ["a", "b"], "label": ["harmful", "harmless"]})
        >>> columns["layer"].tolist(), columns["query"].tolist()
        ([5, 5, 6, 6], ['a', 'b', 'a', 'b'])
    """
    lengths = [len(next(iter(axis.values()))) for axis in axes]
    places = np.indices(lengths).reshape(len(axes), -1)
    return {name: np.array(values)[place] for axis, place in zip(axes, places, strict=True) for name, values in axis.items()}


def per_query(queries: Sequence[Query]) -> dict[str, list[str]]:
    """The columns that say which query a row is about."""
    return {
        "query": [query.id for query in queries],
        "label": [query.label or "" for query in queries],
        "cluster": [query.stands_with for query in queries],
    }
