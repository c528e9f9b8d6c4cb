"""What is asked of a model: queries with labels, pairs of them, and how a query is shown (the presentation protocol)."""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from guardlens import notebooks
from guardlens.errors import PresentationError, QueryError, require_type

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
        images: The query's own images: PIL images, or paths.
        pair: Queries that share it are twins (one harmful, one harmless).
        cluster: Queries that share it stand or fall together; intervals resample clusters.
        source: Where the query comes from.

    Raises:
        QueryError: The text is empty, or the label is none of the two.

    Examples:
        >>> query = gl.Query("how to mend the hat ?", "harmless")
        >>> query.id  # of the text
        'ae2f1e2a53ff'
    """

    text: str
    label: Label | None = None
    id: str = ""
    images: tuple[Any, ...] = field(default=(), repr=False)
    pair: str = ""
    cluster: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise QueryError(f"an empty text (query {self.id!r})", "the text of a request", "fill it in, or leave the query out")
        if self.label not in (*LABELS, None):
            raise QueryError(f"the label {self.label!r} of query {self.id!r}", "'harmful', 'harmless' or None", "rename it")
        if not self.id:
            object.__setattr__(self, "id", hashlib.sha256(self.text.encode()).hexdigest()[:12])

    @property
    def stands_with(self) -> str:
        """What is resampled together: its cluster, where it has one, else its pair, else itself."""
        return self.cluster or self.pair or self.id

    def _repr_html_(self) -> str:
        named = {name: getattr(self, name) for name in ("text", "label", "id", "pair", "cluster", "source")}
        return notebooks.captioned("Query", notebooks.facts(named | {"images": notebooks.pictured(self.images)}))


@dataclass(frozen=True)
class QueryPairs:
    """Harmful queries, each with its harmless twin in the same place. Texts alone get the label of their side, twins that share no `pair`
    name of their own get one.

    Raises:
        QueryError: Nothing in it, unequal lengths, or a label on the wrong side.

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
            side = tuple(query if isinstance(query, Query) else Query(query, label) for query in getattr(self, label))
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

        named = {harmful.pair for harmful, harmless in self if harmful.pair == harmless.pair and harmful.pair}
        if len(named) < len(self):
            for label in LABELS:
                numbered = tuple(replace(query, pair=f"pair {number}") for number, query in enumerate(getattr(self, label)))
                object.__setattr__(self, label, numbered)

    @classmethod
    def from_queries(cls, queries: Iterable[Query]) -> "QueryPairs":
        """Match the queries that share `pair`; queries without one are left out.

        Raises:
            QueryError: A pair lacks one side or has one twice, or there is no pair.
        """
        sides: dict[str, dict[str | None, Query]] = {}
        for query in queries:
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
    """

    text: str
    images: "tuple[Image.Image, ...]" = ()
    system: str = ""
    prefill: str = ""


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
        """As it appears in tables: begins with `text`, `blank`, `noise`, `own`, ..."""
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


def require_presentation(presentation: Any) -> None:
    """Refuse what can't show a query, such as an image or a function that makes presentations.

    Raises:
        PresentationError: As said.
    """
    if isinstance(presentation, type) or not isinstance(presentation, Presentation):
        shown = getattr(presentation, "__name__", None) or f"something of type {type(presentation).__name__}"
        raise PresentationError(
            f"{shown} as a presentation",
            "text_only, presentations.own, or what presentations.blank('grey') and its like give",
            "put an image of your own into Query(text, images=(image,)), and show it with presentations.own",
        )


def as_presentations(presentations: Any) -> list[Presentation]:
    """One presentation or several as a list, each with a name of its own.

    Raises:
        PresentationError: There is none, something else is among them, or two have one name.
    """
    several = isinstance(presentations, Iterable) and not isinstance(presentations, str | Presentation)
    shown: list[Any] = list(presentations) if several else [presentations]
    for presentation in shown:
        require_presentation(presentation)
    if not shown:
        raise PresentationError("no presentations", "at least one", "hand in [text_only], for queries without an image")
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
    single = isinstance(queries, str | Mapping) or not isinstance(queries, Iterable)
    items: list[Any] = [queries] if single else list(queries)
    for item in items:
        if not isinstance(item, str):
            require_type(item, Query, QueryError, "hand in texts, queries or QueryPairs; what model.batch makes of them, whole")
    if not items:
        raise QueryError("no queries", "at least one", "check the file, split or filter that they come from")
    return tuple(query if isinstance(query, Query) else Query(query) for query in items)


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


def split(queries: Sequence[Query], shares: Sequence[float], seed: int = 0) -> tuple[tuple[Query, ...], ...]:
    """Split queries at random so that no pair and no cluster stands on two sides.

    Args:
        queries: What to split; order is kept within the parts.
        shares: Of each part, e.g. `(0.5, 0.25, 0.25)`; relative to their sum.
        seed: Of the shuffle.

    Raises:
        QueryError: A part would be empty.

    Examples:
        >>> from guardlens.queries import split
        >>> first, second = split(queries, (2, 1))
        >>> len(first) + len(second), {q.cluster for q in first} & {q.cluster for q in second}
        (36, set())
    """
    import numpy as np

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

    The columns are the fields of `Query`; only `text` must be there. `images` is a path, or in JSONL a list of paths, relative to the file.
    Other columns are ignored.

    Raises:
        QueryError: The file can't be read, has no queries, or a line is not usable (the line is named).

    Examples:
        >>> from pathlib import Path
        >>> written = Path("mine.jsonl").write_text('{"text": "how to mend the hat ?", "label": "harmless"}')
        >>> gl.read_queries("mine.jsonl")[0].label
        'harmless'
    """
    path = Path(path)
    readers = {".jsonl": _jsonl, ".csv": _csv}
    if path.suffix not in readers:
        raise QueryError(f"{path.name!r}", "a .jsonl or .csv file", "convert it: one query per line, with the columns 'text' and 'label'")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise QueryError(f"{path}, which can't be read ({error})", "a text file in UTF-8", "check the path and its encoding") from None
    queries = [_query(row, path, line) for line, row in readers[path.suffix](text, path)]
    if not queries:
        raise QueryError(f"{path} without a single query", "one query per line", "check that it is the right file")
    return tuple(queries)


def _jsonl(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                yield line, json.loads(content)
            except json.JSONDecodeError as error:
                raise _unreadable(path, line, f"not JSON ({error.msg})") from None


def _csv(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        yield reader.line_num, {key: value for key, value in row.items() if value not in (None, "")}


def _query(row: Any, path: Path, line: int) -> Query:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise _unreadable(path, line, "without a 'text'")
    known = {key: row[key] for key in _COLUMNS if row.get(key) is not None}
    known.update({key: str(known[key]) for key in ("id", "pair", "cluster", "source") if key in known})
    images = known.pop("images", ())
    names = [images] if isinstance(images, str) else images
    try:
        return Query(**known, images=tuple(str(path.parent / name) for name in names))
    except (QueryError, TypeError) as error:
        raise _unreadable(path, line, error.found if isinstance(error, QueryError) else str(error)) from None


def _unreadable(path: Path, line: int, why: str) -> QueryError:
    return QueryError(f"{path}, line {line}: {why}", 'a line such as {"text": "...", "label": "harmless"}', "mend that line")
