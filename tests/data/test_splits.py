import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardlens import Query, QueryPairs, errors
from guardlens.data.splits import split

queries = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=40, max_size=60).map(
    lambda rows: [Query(f"q{i}", pair=f"{a}" if a < 8 else "", cluster=f"{b}" if b < 3 else "") for i, (a, b) in enumerate(rows)]
)


@given(queries, st.integers(0, 5))
def test_split_never_straddles(items, seed):
    try:
        parts = split(items, (0.5, 0.5), seed)
    except errors.QueryError:
        return
    assert sorted(q.id for part in parts for q in part) == sorted(q.id for q in items)
    for kind in ("pair", "cluster"):
        first, second = ({getattr(q, kind) for q in part} - {""} for part in parts)
        assert not first & second
    assert all(list(part) == [q for q in items if q in part] for part in parts)
    assert parts == split(items, (0.5, 0.5), seed)


def test_split_shares_seeds_and_errors(unchecked):
    items = [Query(f"q{i}") for i in range(40)]
    assert [len(part) for part in split(items, (2.0, 1.0, 1.0))] == [20, 10, 10]
    assert split(items, (1.0, 1.0), 0) != split(items, (1.0, 1.0), 1)
    assert split(QueryPairs(("a", "b"), ("c", "d")), (1, 1)) and split(["a", "b"], np.array([1, 1]))
    for shares in (5, (), "ab", (1, 0), (1, -1), (1, float("nan")), (1, float("inf")), (1, "a"), None):
        with pytest.raises(errors.ArgumentError, match="Expected one positive number for each part"):
            split(items, shares)
    for seed in (-1, 1.5, "a", None):
        with pytest.raises(errors.ArgumentError, match="seed="):
            split(items, (1, 1), seed)
    with pytest.raises(errors.QueryError, match=r"1 independent groups of queries for 2 parts"):
        split([Query("a", pair="x"), Query("b", pair="x", cluster="c"), Query("c", cluster="c")], (1.0, 1.0))
