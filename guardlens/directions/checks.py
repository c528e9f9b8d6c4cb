"""Checks of directions where they are used."""

from collections.abc import Sequence
from typing import Any

from guardlens.data.queries import Query
from guardlens.directions.basis import Directions
from guardlens.errors import InterventionError, require_type, warn
from guardlens.results.files import digest


def warn_of_own_queries(directions: Directions, queries: Sequence[Query]) -> None:
    """Warn if directions are evaluated on queries that they were made from, which they separate better than new ones.

    Warns:
        UserWarning: The directions were made from some of the queries.

    Examples:
        >>> directions.warn_of_own_queries(ssd, queries)  # quiet: the directions were made from other queries
    """
    made_from = set(directions.made_from)
    n_own = sum(digest(query.text.encode()) in made_from for query in queries)
    if n_own:
        warn(
            f"{n_own} of the {len(queries)} queries made the directions {directions.method!r}, which separate these better than new ones: "
            "measure them on other queries",
        )


def require_directions(directions: Any) -> None:
    """Reject anything but directions without a zero at any layer, for edits and gates.

    Raises:
        InterventionError: The argument is not a `Directions`.
        NumericsError: Some layers have no direction.
    """
    require_type(directions, Directions, InterventionError, "make directions from a vector of your own: directions.from_vectors(vector)")
    directions.require_some()
