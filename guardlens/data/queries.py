"""Queries with labels, and pairs of a harmful query and its harmless twin."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal

from guardlens.data.images import as_images
from guardlens.errors import QueryError, is_several, quoted, require_type
from guardlens.results import notebook_html as notebooks

Label = Literal["harmful", "harmless"]


LABELS: tuple[Label, Label] = ("harmful", "harmless")


@dataclass(frozen=True)
class Query:
    """One request.

    Attributes:
        text: The request as the user would type it, without a chat template.
        label: `"harmful"`, `"harmless"`, or None where it is not known.
        id: A name that is stable over runs; made from the text if empty.
        images: The query's own images: PIL images, paths, or arrays `height width 3` of uint8; one alone is taken for a tuple of one.
        pair: Queries that share it are twins (one harmful, one harmless).
        cluster: Queries that share it stand or fall together; intervals resample clusters.
        source: Where the query comes from.

    None and NaN (an empty cell of pandas) stand for an empty field, whole numbers as names for their digits.

    Raises:
        QueryError: The text is empty, the label is none of the two, or a field is no text.
        PresentationError: An image is none.

    Examples:
        >>> query = gl.Query("how to mend the hat ?", "harmless")
        >>> query.id  # of the text
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
        for name in ("id", "pair", "cluster", "source", "text"):
            value, what = getattr(self, name), f"the {name} of a query"
            text = "" if _missing(value) else as_text(value, what, QueryError) if name == "text" else _name(value, what)
            object.__setattr__(self, name, text)
        object.__setattr__(self, "label", None if _missing(self.label) else self.label)
        if not self.text.strip():
            raise QueryError(f"an empty text (query {self.id!r})", "the text of a request", "fill it in, or leave the query out")
        if not isinstance(self.label, str | None) or self.label not in (*LABELS, None):
            raise QueryError(f"the label {quoted(self.label)} of query {self.id!r}", "'harmful', 'harmless' or None", "rename it")
        if self.label is not None:
            object.__setattr__(self, "label", str(self.label))  # numpy's strings are another type
        if not self.id:
            object.__setattr__(self, "id", hashlib.sha256(self.text.encode()).hexdigest()[:12])
        object.__setattr__(self, "images", as_images(() if _missing(self.images) else self.images, f"query {self.id!r}"))

    @property
    def stands_with(self) -> str:
        """What is resampled together: its cluster, where it has one, else its pair, else itself."""
        return self.cluster or self.pair or self.id

    def _repr_html_(self) -> str:
        named = {name: getattr(self, name) for name in ("text", "label", "id", "pair", "cluster", "source")}
        return notebooks.captioned("Query", notebooks.facts(named | {"images": notebooks.pictured(self.images)}))


def _missing(value: Any) -> bool:
    """Whether it is what pandas and JSON have in an empty cell: None, NaN, NaT or NA."""
    return value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and math.isnan(value))


def _name(value: Any, what: str) -> str:
    """What something is called, as text: whole numbers by their digits, which pandas makes floats of beside an empty cell."""
    number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else math.inf
    return str(int(number)) if abs(number) < 2**63 and number == int(number) else as_text(value, what, QueryError)


def as_text(value: Any, what: str, error: type[QueryError]) -> str:
    """A string, of Python's own type.

    Raises:
        QueryError: Of the given class: something else, or letters that no file in UTF-8 can hold.
    """
    if not isinstance(value, str):
        raise error(f"something of type {type(value).__name__} as {what}", "text", "write it as a string")
    try:
        value.encode()
    except UnicodeEncodeError as wrong:
        found = f"half of a character (a lone surrogate, {value[wrong.start]!r}) at letter {wrong.start} of {what}"
        raise error(found, "whole characters", "read the text again from its source, or take it out") from None
    return str.__str__(value)


@dataclass(frozen=True)
class QueryPairs:
    """Harmful queries, each with its harmless twin in the same place. Texts alone get the label of their side, twins that share no `pair`
    name of their own get one.

    Raises:
        QueryError: Nothing in it, unequal lengths, a label on the wrong side, twins that are equal, or a pair that is there twice.

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
            side = tuple(item if isinstance(item, Query) else Query(item, label) for item in _items(getattr(self, label)))
            object.__setattr__(self, label, side)
        if not self.harmful or len(self.harmful) != len(self.harmless):
            raise QueryError(
                f"{len(self.harmful)} harmful and {len(self.harmless)} harmless queries",
                "the same number of both, at least one",
                "give each harmful query its harmless twin",
            )
        for label in LABELS:
            wrong = next((query for query in getattr(self, label) if query.label != label), None)
            if wrong is not None:
                raise QueryError(f"query {wrong.id!r} with the label {wrong.label!r} on the {label} side", f"only {label} ones", "swap it")

        self._require_different()

        named = {harmful.pair for harmful, harmless in self if harmful.pair == harmless.pair and harmful.pair}
        if len(named) < len(self):
            for label in LABELS:
                numbered = tuple(replace(query, pair=f"pair {number}") for number, query in enumerate(getattr(self, label)))
                object.__setattr__(self, label, numbered)

    def _require_different(self) -> None:
        """Twins that are equal have no difference, and a pair that is there twice would count twice."""
        seen: list[tuple[Any, ...]] = []
        texts = Counter((harmful.text, harmless.text) for harmful, harmless in self)
        for harmful, harmless in self:
            shown = (harmful.text, harmful.images), (harmless.text, harmless.images)
            if shown[0] == shown[1]:
                raise QueryError(f"a pair of two equal queries ({harmful.text[:60]!r})", "two that differ", "mend it, or leave it out")
            if texts[harmful.text, harmless.text] > 1 and shown in seen:
                raise QueryError(f"a pair that is there twice ({harmful.text[:60]!r})", "each pair once", "leave the repeated one out")
            seen.append(shown)

    @classmethod
    def from_queries(cls, queries: "Iterable[str | Query] | QueryPairs") -> "QueryPairs":
        """Match the queries that share `pair`; queries without one are left out.

        Raises:
            QueryError: A pair lacks one side or has one twice, or there is no pair.
        """
        sides: dict[str, dict[str | None, Query]] = {}
        for query in as_queries(queries):
            if query.pair and sides.setdefault(query.pair, {}).setdefault(query.label, query) is not query:
                raise QueryError(
                    f"two {query.label} queries in pair {query.pair!r}", "one harmful and one harmless", "name the pairs apart"
                )
        lame = next((name for name, side in sides.items() if set(side) != set(LABELS)), None)
        if lame is not None:
            raise QueryError(
                f"pair {lame!r} with {sorted(map(str, sides[lame]))}", "one harmful and one harmless query", "complete or drop it"
            )
        return cls(tuple(side["harmful"] for side in sides.values()), tuple(side["harmless"] for side in sides.values()))

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


def require_query(query: Any) -> None:
    """Refuse what is no query, where one is shown.

    Raises:
        QueryError: As said.
    """
    require_type(query, Query, QueryError, "wrap it, as in Query(text)")


def as_queries(queries: Any) -> tuple[Query, ...]:
    """One string or query, a sequence of them, or pairs, as a tuple of queries.

    Raises:
        QueryError: There is none, or something else is among them.
    """
    if isinstance(queries, QueryPairs):
        return queries.queries
    items = _items(queries)
    if not items:
        raise QueryError("no queries", "at least one", "check the file, split or filter that they come from")
    return tuple(item if isinstance(item, Query) else Query(item) for item in items)


def _items(queries: Any) -> list[Any]:
    """Texts and queries, of one or of several.

    Raises:
        QueryError: Something else is among them, or they have no order.
    """
    several = is_several(queries) and not isinstance(queries, set | frozenset) and not hasattr(queries, "columns")
    items: list[Any] = list(queries) if several else [queries]
    for item in items:
        if not isinstance(item, str | Query):
            require_type(item, Query, QueryError, f"hand in {_WAYS.get(type(item).__name__, _WAYS[''])}")
    return items


_WAYS = {
    "DataFrame": "[Query(**row) for row in frame.to_dict('records')]",
    "Batch": "its .queries",
    "set": "sorted(texts): a set has no order",
    "frozenset": "sorted(texts): a set has no order",
    "": "texts, queries or QueryPairs; what model.batch makes of them, whole",
}


def require_ids(queries: Sequence[Query]) -> None:
    """Refuse queries of one id, which a table would take for one.

    Raises:
        QueryError: As said.
    """
    if len({query.id for query in queries}) < len(queries):
        raise QueryError("two queries with one id", "an id for each", "give them ids, or leave the repeated query out")


def require_labels(queries: Sequence[Query]) -> None:
    """Refuse queries of which one has no label, or that all have the same one.

    Raises:
        QueryError: As said.
    """
    unlabelled = next((query for query in queries if query.label is None), None)
    if unlabelled is not None:
        raise QueryError(f"query {unlabelled.id!r} without a label", "'harmful' or 'harmless' on each", "pass Query(text, label=...)")
    if len(labels := {query.label for query in queries}) < 2:
        raise QueryError(f"{len(queries)} queries that are all {labels.pop()}", "both harmful and harmless ones", "add the other class")


def counted(queries: Sequence[Query]) -> str:
    """How many queries of each label there are, as in `"12 harmful, 24 harmless"`."""
    labels = Counter(query.label or "unlabelled" for query in queries)
    return ", ".join(f"{number} {label}" for label, number in labels.items())
