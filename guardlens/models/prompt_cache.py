"""`keep`: prompts computed once and kept, so that the next question about them costs a token each instead of a prompt."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from guardlens.data.queries import Presentation, Query, as_queries, counted, require_presentation, text_only
from guardlens.errors import MismatchError
from guardlens.models.batching import Portion, over_batches
from guardlens.models.engine.kv_cache import Prefill
from guardlens.models.hooked_model import HookedModel, Queries, require_model
from guardlens.results.notebook_html import captioned, facts
from guardlens.results.progress import track

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Kept:
    """Prompts whose keys and values are kept. Hand it to `sweep` or `activation_patching` in place of queries.

    What other presentations' runs gave (the text twin's states) is kept with them as soon as an intervention has asked for it. They belong
    to the model that computed them and the LLM beside it, whose weights and adapters must stay as they were.

    Attributes:
        queries: What is asked.
        presentation: How it is shown.
        parts: Batches of them, of prompts of like length.

    Examples:
        >>> prompts = gl.keep(model, queries, grey)
        >>> len(prompts), prompts.bytes > 0
        (36, True)
    """

    queries: tuple[Query, ...]
    presentation: Presentation
    parts: tuple[Portion[Prefill], ...]

    @property
    def bytes(self) -> int:
        """What the keys and values take, in memory of the model's device."""
        return sum(part.result.bytes for part in self.parts)

    def __len__(self) -> int:
        return len(self.queries)

    def __repr__(self) -> str:
        return f"Kept({len(self)} prompts, {self.presentation.name!r}, {self.bytes / 2**20:.1f} MiB)"

    def _repr_html_(self) -> str:
        named = {"prompts": counted(self.queries), "presentation": repr(self.presentation)}
        return captioned(repr(self), facts(named | {"keys and values": f"{self.bytes:,} bytes"}))


def keep(
    model: HookedModel,
    queries: Queries,
    presentation: Presentation = text_only,
    *,
    batch_size: int | None = None,
) -> Kept:
    """Run prompts once, unedited, and keep their keys and values.

    Args:
        model: The model.
        queries: What to ask.
        presentation: How to show it.
        batch_size: Prompts per forward; chosen from free memory without it.

    Raises:
        QueryError: No queries.
        ModelError: A single prompt does not fit in memory.

    Examples:
        >>> prompts = gl.keep(model, queries, grey)
        >>> first = gl.sweep(model, guard, prompts, layers=[6, 7])
        >>> other = gl.sweep(model, iv.add(ssd, 4.0), prompts)  # computes no prompt again
    """
    require_model(model)
    require_presentation(presentation)
    items = as_queries(queries)
    parts = over_prompts(model, items, presentation, lambda kept: kept, batch_size)
    parts = track(parts, len(items), f"keep, {presentation.name}")
    return Kept(items, presentation, tuple(parts))


def over_prompts(
    model: HookedModel,
    queries: Sequence[Query] | Kept,
    presentation: Presentation,
    work: Callable[[Prefill], Result],
    batch_size: int | None = None,
) -> Iterator[Portion[Result]]:
    """As `over_batches`, with the prompts computed up to their last token; or with what is kept of them.

    Raises:
        MismatchError: They were kept by another model.
    """
    if not isinstance(queries, Kept):
        yield from over_batches(model, queries, presentation, lambda batch, prefix: work(model.prefill(batch, prefix)), batch_size)
        return
    for part in queries.parts:
        model.require_own(part.result)
    for part in queries.parts:
        yield Portion(part.places, work(part.result))


def shown(queries: Queries | Kept, presentation: Presentation | None) -> tuple[tuple[Query, ...], Presentation]:
    """The queries, and how they are shown: without a word, as they are kept, and else as text alone.

    Raises:
        MismatchError: They are kept in another presentation.
    """
    if presentation is not None:
        require_presentation(presentation)
    if not isinstance(queries, Kept):
        return as_queries(queries), presentation or text_only
    if presentation not in (None, queries.presentation):
        raise MismatchError(
            f"prompts kept in the presentation {queries.presentation.name!r}",
            f"those of {presentation.name!r}",
            "leave it out, or keep others",
        )
    return queries.queries, queries.presentation
