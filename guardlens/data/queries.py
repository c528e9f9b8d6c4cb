"""What is asked of a model: queries with labels, pairs of them, and how a query is shown (the presentation protocol)."""

import csv
import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from guardlens.data.images import as_images
from guardlens.errors import PresentationError, QueryError, as_count, is_several, quoted, require_type
from guardlens.results import notebook_html as notebooks

if TYPE_CHECKING:
    from PIL import Image

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


@dataclass(frozen=True)
class Prompt:
    """A query as it is shown: what goes into the chat template.

    Attributes:
        text: What the user says.
        images: What they show, before the text.
        system: The system prompt; none if empty.
        prefill: How the assistant's answer begins, the model going on from there.
        template_kwargs: What else the chat template is told, as JSON text.

    Raises:
        PresentationError: A field that is no text.
    """

    text: str
    images: "tuple[Image.Image, ...]" = ()
    system: str = ""
    prefill: str = ""
    template_kwargs: str = ""

    def __post_init__(self) -> None:
        for name in ("text", "system", "prefill", "template_kwargs"):
            object.__setattr__(self, name, as_text(getattr(self, name), f"the {name} of a prompt", PresentationError))


@runtime_checkable
class Presentation(Protocol):
    """How a query reaches the model. Frozen and comparable: equal presentations show equal prompts.

    Examples:
        >>> isinstance(grey, presentations.Presentation), grey.name
        (True, 'blank grey')
        >>> grey(gl.Query("how to mend the hat ?")).text  # what the user says; .images is what they show
        'how to mend the hat ?'
    """

    @property
    def name(self) -> str:
        """As it appears in tables, such as `text`, `blank grey`, `own`."""
        ...

    def __call__(self, query: Query) -> Prompt: ...


@dataclass(frozen=True)
class TextOnly:
    """The query's text without any image: what the LLM sees.

    Examples:
        >>> presentations.TextOnly()(gl.Query("how to mend the hat ?")).images
        ()
    """

    name: str = "text"

    def __call__(self, query: Query) -> Prompt:
        require_query(query)
        return Prompt(query.text)


text_only = TextOnly()
"""A query's text without any image: what the LLM sees.

Examples:
    >>> model.batch("how to mend the hat ?", presentations.text_only).mask.shape  # query, token
    torch.Size([1, 11])
"""


WITHOUT_IMAGES = "without images"


@dataclass(frozen=True)
class WithoutImages:
    """What another presentation shows, its images taken away: the words around the query stay."""

    inner: Presentation

    @property
    def name(self) -> str:
        return f"{self.inner.name} | {WITHOUT_IMAGES}"

    def __call__(self, query: Query) -> Prompt:
        return replace(self.inner(query), images=())


def require_query(query: Any) -> None:
    """Refuse what is no query, where one is shown.

    Raises:
        QueryError: As said.
    """
    require_type(query, Query, QueryError, "wrap it, as in Query(text)")


def require_presentation(presentation: Any) -> None:
    """Refuse what can't show a query, such as an image or a function that makes presentations.

    Raises:
        PresentationError: As said.
    """
    named = not isinstance(presentation, type) and isinstance(presentation, Presentation)
    if named and not (isinstance(presentation.name, str) and presentation.name.strip()):
        raise PresentationError(f"a presentation whose name is {quoted(presentation.name)}", "a name for tables", "give it one")
    if not named:
        shown = getattr(presentation, "__name__", None) or f"something of type {type(presentation).__name__}"
        raise PresentationError(
            f"{shown} as a presentation",
            "text_only, presentations.own, or what presentations.blank('grey') and its like give",
            _INSTEAD.get(type(presentation).__name__, _INSTEAD[""]),
        )


_INSTEAD = {
    "Intervention": "name an intervention: intervention=intervention",
    "Defence": "take both of its parts: defence.present(presentation), intervention=defence.intervention",
    "": "put an image of your own into Query(text, images=(image,)), and show it with presentations.own",
}


def as_presentations(presentations: Any) -> list[Presentation]:
    """One presentation, several or none as a list, each with a name of its own.

    Raises:
        PresentationError: Something else is among them, or two have one name.
    """
    several = is_several(presentations) and not isinstance(presentations, Presentation)
    given: Any = presentations if several else [presentations]
    shown: list[Any] = list(given)
    for presentation in shown:
        require_presentation(presentation)
    if len({presentation.name for presentation in shown}) < len(shown):
        raise PresentationError("two presentations of one name", "a name for each", "show sizes of one image in separate calls")
    return shown


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


def split(queries: Iterable[str | Query] | QueryPairs, shares: Sequence[float], seed: int = 0) -> tuple[tuple[Query, ...], ...]:
    """Split queries at random so that no pair and no cluster stands on two sides.

    Args:
        queries: What to split; order is kept within the parts.
        shares: Of each part, e.g. `(0.5, 0.25, 0.25)`; relative to their sum.
        seed: Of the shuffle.

    Raises:
        QueryError: A part would be empty, or shares or seed are no such numbers.

    Examples:
        >>> from guardlens.data.queries import split
        >>> first, second = split(queries, (2, 1))
        >>> len(first) + len(second), {q.cluster for q in first} & {q.cluster for q in second}
        (36, set())
    """
    import numpy as np

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


_COLUMNS = tuple(f.name for f in fields(Query))


def read_queries(path: str | Path) -> tuple[Query, ...]:
    """Read queries from a `.jsonl` or `.csv` file.

    The columns are the fields of `Query`, in capital or small letters; only `text` must be there. `images` is a path, or in JSONL a list of
    paths, relative to the file. Other columns are ignored, unless their name is that of a field but for a letter. A CSV file is read
    strictly: quotes are closed, and no line has more cells than the first.

    Raises:
        QueryError: The file can't be read, has no queries, names a column twice, or a line is not usable (the line is named).

    Examples:
        >>> from pathlib import Path
        >>> written = Path("mine.jsonl").write_text('{"text": "how to mend the hat ?", "label": "harmless"}')
        >>> gl.read_queries("mine.jsonl")[0].label
        'harmless'
    """
    if not isinstance(path, str | os.PathLike):
        raise QueryError(f"something of type {type(path).__name__} as a file", "the path of a .jsonl or .csv file", "write it there first")
    path = Path(path)
    readers = {".jsonl": _jsonl, ".csv": _csv}
    if path.suffix.lower() not in readers:
        raise QueryError(
            f"{path.name or str(path)!r}", "a .jsonl or .csv file", "convert it: one query per line, with the columns 'text' and 'label'"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise QueryError(f"{path}, which can't be read ({error})", "a text file in UTF-8", "check the path and its encoding") from None
    queries = [_query(row, path, line) for line, row in readers[path.suffix.lower()](text, path)]
    if not queries:
        raise QueryError(f"{path} without a single query", "one query per line", "check that it is the right file")
    return tuple(queries)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its names as they stand there, also those that are there twice."""


def _jsonl(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                row = json.loads(content, object_pairs_hook=_Pairs)
            except (ValueError, RecursionError) as error:
                raise _unreadable(path, line, f"not JSON ({str(error)[:100]})") from None
            yield line, _row(row, path, line) if isinstance(row, _Pairs) else row


def _csv(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(len(text) + 1)  # the module's own is far below what a text may have
    try:
        (_, header), *rows = [(reader.line_num, cells) for cells in reader] or [(1, [])]
    except csv.Error as error:
        raise _unreadable(path, reader.line_num, f"no CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)
    for line, cells in rows:
        if len(cells) > len(header):
            raise _unreadable(path, line, f"{len(cells)} cells under {len(header)} columns")
        if cells:
            pairs = [*zip(header, cells, strict=False), *((name, "") for name in header[len(cells) :])]
            yield line, {name: cell for name, cell in _row(pairs, path, 1).items() if cell != ""}


def _row(pairs: Iterable[tuple[str, Any]], path: Path, line: int) -> dict[str, Any]:
    """Names and values, the names as those of fields: each once, and none that is one of them but for a letter."""
    cells = [(name.strip().lower(), value) for name, value in pairs]
    names = [name for name, _ in cells]
    twice = next((name for name, number in Counter(names).items() if number > 1 and name in _COLUMNS), None)
    if twice is not None:
        raise _unreadable(path, line, f"{twice!r} twice")
    meant = {
        name: close for name in names if len(name) > 3 and name not in _COLUMNS and (close := get_close_matches(name, _COLUMNS, 1, 0.8))
    }
    if meant:
        name, (close,) = next(iter(meant.items()))
        raise _unreadable(path, line, f"the column {name!r}, which is not {close!r}")
    return dict(cells)


def _query(row: Any, path: Path, line: int) -> Query:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise _unreadable(path, line, "without a 'text'")
    known = {key: row[key] for key in _COLUMNS if row.get(key) is not None}
    images = known.pop("images", ())
    names = images if isinstance(images, list | tuple) else [images]
    try:
        as_images(names, "this line")  # before the folder in front makes a path of an empty or broken one
        return Query(**known, images=tuple(str(path.parent / name) for name in names))
    except QueryError as error:
        raise _unreadable(path, line, error.found) from None


def _unreadable(path: Path, line: int, why: str) -> QueryError:
    return QueryError(f"{path}, line {line}: {why}", 'a line such as {"text": "...", "label": "harmless"}', "mend that line")
