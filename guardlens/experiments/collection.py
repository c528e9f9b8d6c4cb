"""`collect`: the hidden states of many queries, one per query and layer, in memory or streamed to a file that is mapped into it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from guardlens.data.activation_store import StateStore, dtype_of
from guardlens.data.activations import Activations
from guardlens.data.presentations import Presentation, text_only
from guardlens.data.presentations.protocol import require_presentation
from guardlens.data.queries import as_queries
from guardlens.errors import SiteError, require_type
from guardlens.hooks import Site
from guardlens.interventions.intervention import Intervention, nothing, require_intervention
from guardlens.models.batching import BatchResult, in_query_order, over_batches
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.kv_cache import Prefix
from guardlens.models.hooked_model import HookedModel, Queries, require_model
from guardlens.models.identity import configuration, of_intervention
from guardlens.results.progress import track

LARGEST = 32
"""Queries per forward where neither the user nor memory asks for fewer."""


def collect(
    model: HookedModel,
    queries: Queries,
    presentation: Presentation = text_only,
    intervention: Intervention = nothing,
    *,
    site: Site = Site(),  # noqa: B008  (frozen)
    out: str | Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    batch_size: int | None = None,
) -> Activations:
    """Read one state per query and layer.

    What prompts begin with alike (a template's head, a blank image) is computed once, where nothing there is edited or read.

    Args:
        model: The model.
        queries: Queries, or pairs of them (the harmful ones come first then).
        presentation: How they are shown. `text_only` is what the LLM sees.
        intervention: What to change in the run; states are read after all edits.
        site: Hook, layers and positions; by default the residual stream after every block at the prompt's last token.
        out: A directory to stream to, for more states than memory holds. Each batch is on the disk before the next one runs, and what is
            returned is mapped into memory from there, as it is by `Activations.load(out)`. The same call again resumes; another model,
            presentation, intervention or site, other queries or another dtype are refused.
        dtype: What states are kept in. `"bfloat16"` takes half the room, and loses nothing of a model that runs in it, unless several
            positions are averaged.
        batch_size: Queries per forward; by default as many as free memory holds, at most 32. Halved where memory runs out. Queries of like
            length share a forward; the result is in their own order.

    Returns:
        Activations of shape `query layer d_model` on the CPU. A hook without layers counts as layer -1.

    Raises:
        QueryError: No queries.
        ModelError, InterventionError, SiteError: Something else in the place of the model, the intervention or the site.
        NumericsError: NaN or infinity; layer and query are named.
        MismatchError: `out` was made by another call; the first difference is named.
        PresentationError: With `out`, a presentation that shows a query otherwise every time.
        StorageError: No room on the disk, `out` is open in another process or can't be read or written, or an intervention with custom
            functions without names and `out`.

    Warns:
        UserWarning: Rows in `out` that aren't what was written; they are made again.

    Examples:
        >>> beside = gl.collect(model, pairs, grey)  # the VLM's view; the LLM's is gl.collect(model.llm, pairs)
        >>> beside
        Activations(resid_post at 'last', 'blank grey', 200 queries, 8 layers, d_model 128)
        >>> heads = gl.collect(model, pairs, grey, site=gl.Site("z", layers=[5]))
        >>> heads.states.shape  # query, layer, heads x d_head
        torch.Size([200, 1, 128])
    """
    require_model(model)
    require_presentation(presentation)
    require_intervention(intervention)
    require_type(site, Site, SiteError, "say site=Site('resid_post')")
    items, kept = as_queries(queries), dtype_of(dtype)
    layers = tuple(-1 if point.layer is None else point.layer for point in site.points(model.cfg.n_layers))
    about = (layers, items, site.hook, site.positions, presentation.name, model.provenance)
    ran = {
        "intervention": repr(intervention) if intervention.steps else "",
        "shows_images": any(presentation(query).images for query in items),
    }

    def states(batch: Batch, prefix: Prefix | None) -> Tensor:
        run = model.run(batch, intervention, read=[site], logits=None, prefix=prefix)
        return on_host(run.reads[site][0]).to(kept)

    def portions(todo: Sequence[int]) -> Iterator[BatchResult[Tensor]]:
        found = over_batches(model, [items[place] for place in todo], presentation, states, batch_size, max_batch_size=LARGEST)
        return track(found, len(todo), f"collect, {presentation.name}")

    if out is None:
        return Activations(in_query_order(portions(range(len(items))), len(items)), *about, **ran, checked=True)
    header = Activations(torch.empty(len(items), len(layers), 0), *about, **ran).header
    depends_on = {**configuration(model, items, [presentation]), "site": repr(site), "intervention": of_intervention(intervention)}
    with StateStore(out, depends_on, len(items), dtype, model.provenance) as store:
        todo = store.missing
        for portion in portions(todo):
            store.write([todo[place] for place in portion.indices], portion.result, header)
        return replace(Activations.load(store.finish()), queries=items, checked=True)


def on_host(states: Tensor) -> Tensor:
    """The same on the CPU. A GPU copies it in one piece, to memory that is pinned for it, and is waited for once."""
    if not states.is_cuda:
        return states.cpu()
    pinned = torch.empty(states.shape, dtype=states.dtype, pin_memory=True).copy_(states, non_blocking=True)
    torch.cuda.current_stream(states.device).synchronize()
    return pinned
