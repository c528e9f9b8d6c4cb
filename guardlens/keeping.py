"""`keep`: prompts computed once and kept, so that the next question about them costs a token each instead of a prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guardlens.batches import Batch
from guardlens.errors import MismatchError
from guardlens.model import HookedModel, Queries
from guardlens.prefixes import Prefill, Prefix
from guardlens.progress import track
from guardlens.queries import Presentation, Query, as_queries, text_only


@dataclass(frozen=True, eq=False)
class Kept:
    """Prompts whose keys and values are kept. Hand it to `sweep` or `activation_patching` in place of queries.

    What other presentations' runs gave (the text twin's states) is kept with them as soon as a plan has asked for it.

    Attributes:
        queries: What is asked.
        presentation: How it is shown.
        model: The model that computed them.
        parts: Batches of them.
    """

    queries: tuple[Query, ...]
    presentation: Presentation
    model: str
    parts: tuple[Prefill, ...]

    @property
    def bytes(self) -> int:
        """What the keys and values take, in memory of the model's device."""
        return sum(part.bytes for part in self.parts)

    def __len__(self) -> int:
        return len(self.queries)

    def __repr__(self) -> str:
        return f"Kept({len(self)} prompts, {self.presentation.name!r}, {self.bytes / 2**20:.1f} MiB)"


def keep(
    model: HookedModel,
    queries: Queries,
    presentation: Presentation = text_only,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> Kept:
    """Run prompts once, unedited, and keep their keys and values.

    Args:
        model: The model.
        queries: What to ask.
        presentation: How to show it.
        batch_size: Prompts per forward.
        progress: Show a bar.

    Raises:
        QueryError: No queries.

    Example:
        `prompts = gl.keep(model, queries, grey)`; then `gl.sweep(model, guard, prompts)` and `gl.sweep(model, other, prompts)` compute no
        prompt again.
    """
    items = as_queries(queries)
    return Kept(
        items, presentation, model.id, tuple(prefills(model, items, presentation, batch_size, f"keep, {presentation.name}", progress))
    )


def batches(
    model: HookedModel, queries: Sequence[Query], presentation: Presentation, batch_size: int, what: str, progress: bool
) -> Iterator[tuple[Batch, Prefix | None]]:
    """Batches of queries under a bar, each with what its prompts begin with, where that is computed already or worth it."""
    parts = [queries[start : start + batch_size] for start in range(0, len(queries), batch_size)]
    prefix: Prefix | None = None
    for part in track(parts, len(queries), what, progress):
        batch = model.batch(part, presentation)
        if prefix is None or prefix.begins(batch) is None:
            prefix = model.share(batch)
        yield batch, prefix


def prefills(
    model: HookedModel, queries: Queries | Kept, presentation: Presentation, batch_size: int, what: str, progress: bool
) -> Iterator[Prefill]:
    """The prompts batch by batch, computed up to their last token, under a bar.

    Raises:
        MismatchError: They were kept by another model.
    """
    if not isinstance(queries, Kept):
        for batch, prefix in batches(model, as_queries(queries), presentation, batch_size, what, progress):
            yield model.prefill(batch, prefix)
        return
    if queries.model != model.id:
        raise MismatchError(f"prompts kept by {queries.model}", f"those of {model.id}", "keep them anew with this model")
    yield from track(queries.parts, len(queries), what, progress)


def shown(queries: Queries | Kept, presentation: Presentation) -> tuple[tuple[Query, ...], Presentation]:
    """The queries, and how they are shown.

    Raises:
        MismatchError: They are kept in another presentation.
    """
    if not isinstance(queries, Kept):
        return as_queries(queries), presentation
    if presentation not in (text_only, queries.presentation):
        raise MismatchError(
            f"prompts kept in the presentation {queries.presentation.name!r}",
            f"those of {presentation.name!r}",
            "leave it out, or keep others",
        )
    return queries.queries, queries.presentation
