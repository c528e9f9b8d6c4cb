"""`keep`: the KV cache of prompts, computed once, so that the next question about them costs a token each instead of a prompt."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from guardlens.data.presentations import Presentation, text_only
from guardlens.data.presentations.protocol import require_presentation
from guardlens.data.queries import Query, as_queries, label_counts
from guardlens.errors import MismatchError
from guardlens.models.batching import BatchResult, over_batches
from guardlens.models.engine.kv_cache import Prefill
from guardlens.models.hooked_model import HookedModel, Queries
from guardlens.models.loaded_model import require_model
from guardlens.results.notebook_html import captioned, facts
from guardlens.results.progress import track

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class PromptCache:
    """Prompts with their KV cache. Pass it to `sweep` or `activation_patching` in place of queries.

    Once an intervention has asked for states of another presentation (those of the text twin, for example), they are stored here as well. A
    prompt cache is valid for the model that computed it and the LLM beside it, whose weights and adapters must not change.

    Attributes:
        queries: The queries.
        presentation: How they are shown.
        parts: The prefilled batches, each of prompts of similar length.

    Examples:
        >>> prompts = gl.keep(model, queries, grey)
        >>> len(prompts), prompts.bytes > 0
        (36, True)
    """

    queries: tuple[Query, ...]
    presentation: Presentation
    parts: tuple[BatchResult[Prefill], ...]

    @property
    def bytes(self) -> int:
        """Size of the KV cache, in memory of the model's device."""
        return sum(part.result.bytes for part in self.parts)

    def __len__(self) -> int:
        return len(self.queries)

    def __repr__(self) -> str:
        return f"PromptCache({len(self)} prompts, {self.presentation.name!r}, {self.bytes / 2**20:.1f} MiB)"

    def _repr_html_(self) -> str:
        rows = {
            "prompts": label_counts(self.queries),
            "presentation": repr(self.presentation),
            "keys and values": f"{self.bytes:,} bytes",
        }
        return captioned(repr(self), facts(rows))


def keep(
    model: HookedModel,
    queries: Queries,
    presentation: Presentation = text_only,
    *,
    batch_size: int | None = None,
) -> PromptCache:
    """Run prompts once, unedited, and keep their KV cache.

    Args:
        model: The model.
        queries: The queries.
        presentation: How to show them.
        batch_size: Prompts per forward pass; chosen from free memory by default.

    Raises:
        QueryError: There are no queries.
        ModelError: A single prompt does not fit in memory.

    Examples:
        >>> prompts = gl.keep(model, queries, grey)
        >>> first = gl.sweep(model, guard, prompts, layers=[6, 7])
        >>> other = gl.sweep(model, iv.add(ssd, 4.0), prompts)  # computes no prompt again
    """
    require_model(model)
    require_presentation(presentation)
    items = as_queries(queries)
    prefills = over_prefills(model, items, presentation, lambda prefill: prefill, batch_size)
    parts = track(prefills, len(items), f"keep, {presentation.name}")
    return PromptCache(items, presentation, tuple(parts))


def over_prefills(
    model: HookedModel,
    queries: Sequence[Query] | PromptCache,
    presentation: Presentation,
    work: Callable[[Prefill], Result],
    batch_size: int | None = None,
) -> Iterator[BatchResult[Result]]:
    """Like `over_batches`, but `work` is called with prefilled prompts: those of the prompt cache, or prompts prefilled for this call.

    Raises:
        MismatchError: Another model computed the prompt cache.
    """
    if not isinstance(queries, PromptCache):
        yield from over_batches(model, queries, presentation, lambda batch: work(model.prefill(batch)), batch_size)
        return
    for part in queries.parts:
        model.require_own(part.result)
    for part in queries.parts:
        yield BatchResult(part.indices, work(part.result))


def queries_and_presentation(queries: Queries | PromptCache, presentation: Presentation | None) -> tuple[tuple[Query, ...], Presentation]:
    """Return the queries and how they are shown. The default is the presentation of the prompt cache, or text alone for plain queries.

    Raises:
        MismatchError: The prompt cache has another presentation than the one asked for.
    """
    if presentation is not None:
        require_presentation(presentation)
    if not isinstance(queries, PromptCache):
        return as_queries(queries), presentation or text_only
    if presentation not in (None, queries.presentation):
        raise MismatchError(
            f"a prompt cache of the presentation {queries.presentation.name!r}",
            f"one of {presentation.name!r}",
            "leave presentation= out, or compute another cache with gl.keep",
        )
    return queries.queries, queries.presentation
