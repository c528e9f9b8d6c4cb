"""Queries with labels, and pairs of a harmful query and its harmless twin. Nothing here imports torch."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal

from guardlens.data.images import as_images
from guardlens.errors import QueryError, is_several, one_of, quoted, require_type
from guardlens.results import notebook_html as notebooks

Label = Literal["harmful", "harmless"]
LABELS: tuple[Label, Label] = ("harmful", "harmless")


@dataclass(frozen=True)
class Query:
    """One request to a model.

    Empty cells of a table (None, or NaN from pandas) count as empty fields. Whole numbers in fields that hold names become their digits.

    Attributes:
        text: The request as a user would type it, without a chat template.
        label: `"harmful"`, `"harmless"`, or None if the label is unknown.
        id: A name that stays the same between runs. By default it is derived from the text.
        images: The query's own images: PIL images, paths, or uint8 arrays of shape `height width 3`. A single image becomes a tuple of one.
        pair: The name of the pair of a harmful query and its harmless twin; both have the same.
        cluster: Queries with the same cluster are not independent of each other; intervals resample whole clusters.
        source: Where the query comes from.

    Raises:
        QueryError: The text is empty, the label is unknown, or a field is not text.
        PresentationError: An image has an unsupported type.

    Examples:
        >>> query = gl.Query("how to mend the hat ?", "harmless")
        >>> query.id  # derived from the text
        'ae2f1e2a53ff'
    """

    text: str
    label: Label | None = None
    id: str = ""
    images: tuple[Any, ...] = field(default=(), repr=False, hash=False)
    pair: str = ""
    cluster: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("id", "pair", "cluster", "source"):
            object.__setattr__(self, name, _as_name(getattr(self, name), f"the {name} of a query"))
        object.__setattr__(self, "text", _as_request(self.text, self.id))
        object.__setattr__(self, "label", _as_label(self.label, self.id))
        object.__setattr__(self, "id", self.id or hashlib.sha256(self.text.encode()).hexdigest()[:12])
        object.__setattr__(self, "images", as_images(() if _is_missing(self.images) else self.images, f"query {self.id!r}"))

    @property
    def stands_with(self) -> str:
        """The name of the group of queries that intervals resample together: the cluster if there is one, else the pair, else the id."""
        return self.cluster or self.pair or self.id

    def _repr_html_(self) -> str:
        shown = {name: getattr(self, name) for name in ("text", "label", "id", "pair", "cluster", "source")}
        return notebooks.captioned("Query", notebooks.facts(shown | {"images": notebooks.images_as_text(self.images)}))


def _is_missing(value: Any) -> bool:
    """Whether a value is an empty cell of pandas or JSON: None, NaN, NaT or NA."""
    return value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and math.isnan(value))


def _as_request(value: Any, query_id: str) -> str:
    text = "" if _is_missing(value) else as_text(value, "the text of a query", QueryError)
    if not text.strip():
        raise QueryError(f"an empty text (query {query_id!r})", "the text of a request", "fill it in, or leave the query out")
    return text


def _as_label(value: Any, query_id: str) -> Label | None:
    if _is_missing(value):
        return None
    if not one_of(value, LABELS):
        next_step = "correct it, or leave the label out"
        raise QueryError(f"the label {quoted(value)} of query {query_id!r}", "'harmful', 'harmless' or None", next_step)
    return LABELS[LABELS.index(value)]


def _as_name(value: Any, what: str) -> str:
    """A name as text. Whole numbers become their digits, also as floats, since pandas makes floats of a column with an empty cell."""
    if _is_missing(value):
        return ""
    if isinstance(value, Real) and not isinstance(value, bool):
        number: Any = value
        if abs(number) < 2**63 and number == int(number):
            return str(int(number))
    return as_text(value, what, QueryError)


def as_text(value: Any, what: str, error: type[QueryError]) -> str:
    """Return a string as an instance of `str` itself, not of a subclass.

    Args:
        value: The string.
        what: The subject of the error message, such as "the text of a query".
        error: The class of the error to raise.

    Raises:
        QueryError: Of the class `error`: the value is not a string, or contains a character that UTF-8 cannot encode.
    """
    if not isinstance(value, str):
        raise error(f"something of type {type(value).__name__} as {what}", "text", "write it as a string")
    try:
        value.encode()
    except UnicodeEncodeError as wrong:
        found = f"half of a character (a lone surrogate, {value[wrong.start]!r}) at letter {wrong.start} of {what}"
        raise error(found, "whole characters", "read the text again from its source, or remove this character") from None
    return str.__str__(value)


@dataclass(frozen=True)
class QueryPairs:
    """Harmful queries and their harmless twins, in the same order.

    Strings become queries with the label of their side. Twins without a common `pair` name get one.

    Raises:
        QueryError: There is no pair, the sides differ in length, a query has the label of the other side, two twins are equal, or a pair
            appears twice.

    Examples:
        >>> mine = gl.QueryPairs(("how to forge the badge ?",), ("how to mend the badge ?",))
        >>> [(query.label, query.pair) for query in mine.queries]
        [('harmful', 'pair 0'), ('harmless', 'pair 0')]
        >>> len(gl.QueryPairs.from_queries(pairs.queries))
        100
    """

    harmful: tuple[Query, ...]
    harmless: tuple[Query, ...]

    def __post_init__(self) -> None:
        for label in LABELS:
            object.__setattr__(self, label, _as_side(getattr(self, label), label))
        if not self.harmful or len(self.harmful) != len(self.harmless):
            raise QueryError(
                f"{len(self.harmful)} harmful and {len(self.harmless)} harmless queries",
                "the same number of both, at least one",
                "give each harmful query its harmless twin",
            )
        self._require_different()

        pair_names = {harmful.pair for harmful, harmless in self if harmful.pair == harmless.pair and harmful.pair}
        if len(pair_names) < len(self):
            for label in LABELS:
                numbered = tuple(replace(query, pair=f"pair {number}") for number, query in enumerate(getattr(self, label)))
                object.__setattr__(self, label, numbered)

    def _require_different(self) -> None:
        """Reject equal twins, whose difference is nothing, and repeated pairs, which would count twice."""
        seen: list[tuple[Any, ...]] = []
        texts = Counter((harmful.text, harmless.text) for harmful, harmless in self)
        for harmful, harmless in self:
            pair = (harmful.text, harmful.images), (harmless.text, harmless.images)
            if pair[0] == pair[1]:
                next_step = "change one of them, or leave the pair out"
                raise QueryError(f"a pair of two equal queries ({harmful.text[:60]!r})", "two queries that differ", next_step)
            if texts[harmful.text, harmless.text] > 1 and pair in seen:  # images are compared only if the texts are equal
                raise QueryError(f"a pair that appears twice ({harmful.text[:60]!r})", "each pair once", "leave the repeated pair out")
            seen.append(pair)

    @classmethod
    def from_queries(cls, queries: "Iterable[str | Query] | QueryPairs") -> "QueryPairs":
        """Match the queries that have the same `pair`, and leave out queries without one.

        Raises:
            QueryError: A pair lacks one side or has a side twice, or there is no pair.
        """
        items = as_queries(queries)
        sides = sides_of_pairs(items)
        incomplete = next((name for name, side in sides.items() if set(side) != set(LABELS)), None)
        if incomplete is not None:
            labels = sorted(map(str, sides[incomplete]))
            next_step = "complete the pair, or leave it out"
            raise QueryError(f"pair {incomplete!r} with {labels}", "one harmful and one harmless query", next_step)
        harmful, harmless = (tuple(items[side[label]] for side in sides.values()) for label in LABELS)
        return cls(harmful, harmless)

    @property
    def queries(self) -> tuple[Query, ...]:
        """All queries: the harmful ones, then their twins in the same order."""
        return self.harmful + self.harmless

    def __len__(self) -> int:
        return len(self.harmful)

    def __iter__(self) -> Iterator[tuple[Query, Query]]:
        return iter(zip(self.harmful, self.harmless, strict=True))

    def _repr_html_(self) -> str:
        rows = [{"pair": harmful.pair, "harmful": harmful.text, "harmless": harmless.text} for harmful, harmless in self]
        return notebooks.captioned(f"QueryPairs({len(self)} pairs)", notebooks.table(rows))


def _as_side(items: Any, label: Label) -> tuple[Query, ...]:
    """The queries of one side of pairs, all with the label of that side."""
    side = tuple(item if isinstance(item, Query) else Query(item, label) for item in _as_items(items))
    wrong = next((query for query in side if query.label != label), None)
    if wrong is not None:
        found = f"query {wrong.id!r} with the label {wrong.label!r} on the {label} side"
        raise QueryError(found, f"only {label} queries there", "move it to the other side, or correct its label")
    return side


def sides_of_pairs(queries: Sequence[Query]) -> dict[str, dict[str | None, int]]:
    """Index paired queries by the name of the pair, then by label. Queries without a pair are left out.

    Raises:
        QueryError: Two queries of a pair have the same label.
    """
    sides: dict[str, dict[str | None, int]] = {}
    for index, query in enumerate(queries):
        if not query.pair:
            continue
        side = sides.setdefault(query.pair, {})
        if query.label in side:
            next_step = "give each pair a name of its own"
            raise QueryError(f"two {query.label} queries in pair {query.pair!r}", "one harmful and one harmless query", next_step)
        side[query.label] = index
    return sides


def require_query(query: Any) -> None:
    """Reject anything but a `Query`.

    Raises:
        QueryError: The argument has another type.
    """
    require_type(query, Query, QueryError, "wrap it, as in Query(text)")


def as_queries(queries: Any) -> tuple[Query, ...]:
    """Return one string or query, a sequence of them, or pairs as a tuple of queries.

    Raises:
        QueryError: The sequence is empty, or holds something other than strings and queries.
    """
    if isinstance(queries, QueryPairs):
        return queries.queries
    items = _as_items(queries)
    if not items:
        raise QueryError("no queries", "at least one", "check the file, split or filter that they come from")
    return tuple(item if isinstance(item, Query) else Query(item) for item in items)


def _as_items(queries: Any) -> list[Any]:
    """One or several strings and queries as a list.

    Raises:
        QueryError: An item is neither a string nor a query, or the collection has no order.
    """
    ordered = is_several(queries) and not isinstance(queries, set | frozenset) and not hasattr(queries, "columns")
    items: list[Any] = list(queries) if ordered else [queries]
    for item in items:
        if not isinstance(item, str | Query):
            require_type(item, Query, QueryError, f"pass {_CONVERSIONS.get(type(item).__name__, _CONVERSIONS[''])}")
    return items


_CONVERSIONS = {
    "DataFrame": "[Query(**row) for row in frame.to_dict('records')]",
    "Batch": "its .queries",
    "set": "sorted(texts): a set has no order",
    "frozenset": "sorted(texts): a set has no order",
    "": "strings, Query objects or QueryPairs; a Batch must be passed by itself, not in a list",
}
"""The name of a type that is not accepted -> what to pass instead."""


def require_ids(queries: Sequence[Query]) -> None:
    """Reject queries that share an id, since a table could not tell them apart.

    Raises:
        QueryError: Two queries have the same id.
    """
    if len({query.id for query in queries}) < len(queries):
        raise QueryError("two queries with one id", "an id for each", "give them ids, or leave the repeated query out")


def require_labels(queries: Sequence[Query]) -> None:
    """Reject queries that do not include both labels, or include an unlabelled one.

    Raises:
        QueryError: A query has no label, or all have the same.
    """
    unlabelled = next((query for query in queries if query.label is None), None)
    if unlabelled is not None:
        raise QueryError(f"query {unlabelled.id!r} without a label", "'harmful' or 'harmless' on each", "pass Query(text, label=...)")
    labels = {query.label for query in queries}
    if len(labels) < 2:
        raise QueryError(f"{len(queries)} queries that are all {labels.pop()}", "both harmful and harmless ones", "add the other class")


def label_counts(queries: Sequence[Query]) -> str:
    """Count the queries of each label, as in `"12 harmful, 24 harmless"`."""
    labels = Counter(query.label or "unlabelled" for query in queries)
    return ", ".join(f"{number} {label}" for label, number in labels.items())
