"""`keep`: prompts computed once and kept, so that the next question about them costs a token each instead of a prompt."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from guardlens.batches import Batch
from guardlens.errors import MismatchError, ModelError
from guardlens.model import HookedModel, Queries
from guardlens.prefixes import Prefill, Prefix
from guardlens.progress import track
from guardlens.queries import Presentation, Query, as_queries, text_only

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Kept:
    """Prompts whose keys and values are kept. Hand it to `sweep` or `activation_patching` in place of queries.

    What other presentations' runs gave (the text twin's states) is kept with them as soon as a plan has asked for it. They belong to the
    model that computed them and the LLM beside it, whose weights and adapters must stay as they were.

    Attributes:
        queries: What is asked.
        presentation: How it is shown.
        parts: Batches of them.
    """

    queries: tuple[Query, ...]
    presentation: Presentation
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
        ModelError: A single prompt does not fit in memory.

    Example:
        `prompts = gl.keep(model, queries, grey)`; then `gl.sweep(model, guard, prompts)` and `gl.sweep(model, other, prompts)` compute no
        prompt again.
    """
    items = as_queries(queries)
    parts = over_prompts(model, items, presentation, lambda kept: kept, batch_size, f"keep, {presentation.name}", progress)
    return Kept(items, presentation, tuple(parts))


def over_batches(
    model: HookedModel,
    queries: Sequence[Query],
    presentation: Presentation,
    work: Callable[[Batch, Prefix | None], Result],
    batch_size: int,
    what: str,
    progress: bool,
) -> list[Result]:
    """What `work` gives for batches of queries, in their order, under a bar; each comes with what its prompts begin with.

    A batch that does not fit in memory is halved, as often as needed, and those after it are as small.

    Raises:
        ModelError: A single prompt does not fit.
    """
    results: list[Result] = []
    prefix: Prefix | None = None

    def fits(part: Sequence[Query]) -> bool:
        nonlocal prefix
        try:
            batch = model.batch(part, presentation)
            begun = prefix.begins(batch) if prefix is not None else None
            if begun is None:
                prefix = begun = model.share(batch)
            results.append(work(batch, begun))
            return True
        except RuntimeError as error:
            _require_out_of_memory(error, part)
            return False

    def done() -> Iterator[Sequence[Query]]:
        start, size = 0, batch_size
        while start < len(queries):
            part = queries[start : start + size]
            if fits(part):
                start += len(part)
                yield part
            else:
                size = len(part) // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    for _ in track(done(), len(queries), what, progress):
        pass
    return results


def _require_out_of_memory(error: RuntimeError, part: Sequence[Query]) -> None:
    """Raise what is no lack of memory, and one that no smaller batch can mend."""
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        raise error
    if len(part) == 1:
        raise ModelError(
            f"the prompt of query {part[0].id!r}, which alone does not fit in memory", "room for one prompt", "load in bfloat16 or 4 bits"
        ) from None


def over_prompts(
    model: HookedModel,
    queries: Sequence[Query] | Kept,
    presentation: Presentation,
    work: Callable[[Prefill], Result],
    batch_size: int,
    what: str,
    progress: bool,
) -> list[Result]:
    """As `over_batches`, with the prompts computed up to their last token; or with what is kept of them.

    Raises:
        MismatchError: They were kept by another model.
    """
    if not isinstance(queries, Kept):
        return over_batches(
            model, queries, presentation, lambda batch, prefix: work(model.prefill(batch, prefix)), batch_size, what, progress
        )
    for part in queries.parts:
        model.require_own(part)
    return [work(part) for part in track(queries.parts, len(queries), what, progress)]


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
