"""`collect`: the hidden states of many queries, one per query and layer, in memory or streamed to a memory-mapped file."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
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
from guardlens.models.hooked_model import HookedModel, Queries
from guardlens.models.identity import configuration, of_intervention
from guardlens.models.loaded_model import require_model
from guardlens.results.progress import track

LARGEST = 32
"""Queries per forward pass if neither the user nor memory asks for fewer."""


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

    A prefix that prompts share (the head of a template, a blank image) is computed once, if nothing in it is edited or read.

    Args:
        model: The model.
        queries: Queries, or pairs of them (of which the harmful ones come first).
        presentation: How to show the queries. `text_only` is what the LLM sees.
        intervention: An intervention on the run; states are read after all edits.
        site: Hook, layers and positions; by default the residual stream after every block at the prompt's last token.
        out: A directory to stream to, for more states than memory holds. Each batch is on disk before the next one runs, and the result is
            memory-mapped from there, as by `Activations.load(out)`. The same call again resumes; a call with another model, presentation,
            intervention, site or dtype, or with other queries, is refused.
        dtype: The precision of the result. `"bfloat16"` takes half the memory, and loses nothing for a model that runs in bfloat16, unless
            several positions are averaged.
        batch_size: Queries per forward pass; by default as many as free memory holds, at most 32. It is halved if memory runs out. Queries
            of like length share a forward pass; the result is in the order of the queries.

    Returns:
        Activations of shape `query layer d_model` on the CPU. A hook without layers has the layer -1.

    Raises:
        QueryError: There are no queries.
        ModelError: The model is not a `HookedModel`.
        InterventionError: The intervention is none.
        SiteError: The site is none, or not the model's.
        NumericsError: A state is nan or infinite; layer and query are named.
        MismatchError: `out` was made by another call; the first difference is named.
        PresentationError: The presentation is none; or, with `out`, it shows a query differently every time.
        StorageError: The disk is full, or `out` is open in another process or can't be read or written; or, with `out`, a custom function
            of the intervention has no name.

    Warns:
        UserWarning: Rows in `out` are not what was written. They are made again.

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
    items = as_queries(queries)
    stored_dtype = dtype_of(dtype)
    layers = tuple(-1 if point.layer is None else point.layer for point in site.points(model.cfg.n_layers))
    activations = partial(
        Activations,
        layers=layers,
        queries=items,
        hook=site.hook,
        positions=site.positions,
        presentation=presentation.name,
        provenance=model.provenance,
        intervention=repr(intervention) if intervention.steps else "",
        shows_images=any(presentation(query).images for query in items),
    )

    def read(batch: Batch) -> Tensor:
        run = model.run(batch, intervention, read=[site], logits=None)
        return on_host(run.reads[site][0]).to(stored_dtype)

    def collected(todo: Sequence[int]) -> Iterator[BatchResult[Tensor]]:
        results = over_batches(model, [items[index] for index in todo], presentation, read, batch_size, max_batch_size=LARGEST)
        return track(results, len(todo), f"collect, {presentation.name}")

    if out is None:
        return activations(in_query_order(collected(range(len(items))), len(items)), checked=True)
    header = activations(torch.empty(len(items), len(layers), 0)).header
    depends_on = {**configuration(model, items, [presentation]), "site": repr(site), "intervention": of_intervention(intervention)}
    with StateStore(out, depends_on, len(items), dtype, model.provenance) as store:
        todo = store.missing
        for part in collected(todo):
            store.write([todo[index] for index in part.indices], part.result, header)
        return replace(Activations.load(store.finish()), queries=items, checked=True)


def on_host(states: Tensor) -> Tensor:
    """Copy states to the CPU. From a GPU they are copied in one piece to pinned memory, with a single synchronisation."""
    if not states.is_cuda:
        return states.cpu()
    pinned = torch.empty(states.shape, dtype=states.dtype, pin_memory=True).copy_(states, non_blocking=True)
    torch.cuda.current_stream(states.device).synchronize()
    return pinned
