"""`collect`: the hidden states of many queries, one per query and layer."""

import torch
from torch import Tensor

from guardlens.activations import Activations
from guardlens.batches import Batch
from guardlens.interventions.plan import Intervention, nothing
from guardlens.keeping import over_batches
from guardlens.model import HookedModel, Queries
from guardlens.prefixes import Prefix
from guardlens.queries import Presentation, as_queries, text_only
from guardlens.sites import Site


def collect(
    model: HookedModel,
    queries: Queries,
    presentation: Presentation = text_only,
    intervention: Intervention = nothing,
    *,
    site: Site = Site(),  # noqa: B008  (frozen)
    batch_size: int = 32,
    progress: bool = True,
) -> Activations:
    """Read one state per query and layer.

    What prompts begin with alike (a template's head, a blank image) is computed once, where nothing there is edited or read.

    Args:
        model: The model.
        queries: Queries, or pairs of them (the harmful ones come first then).
        presentation: How they are shown. `text_only` is what the LLM sees.
        intervention: What to change in the run; states are read after all edits.
        site: Hook, layers and positions; by default the residual stream after every block at the prompt's last token.
        batch_size: Queries per forward; halved where memory runs out.
        progress: Show a bar.

    Returns:
        Activations of shape `query layer d_model`, in float32 on the CPU. A hook without layers counts as layer -1.

    Raises:
        QueryError: No queries.
        NumericsError: NaN or infinity; layer and query are named.

    Example:
        `collect(model, pairs)` and `collect(model, pairs, presentations.blank("grey"))` are the LLM's and the VLM's view.
    """
    items = as_queries(queries)

    def states(batch: Batch, prefix: Prefix | None) -> Tensor:
        return model.run(batch, intervention, read=[site], logits=None, prefix=prefix).reads[site][0].float().cpu()

    found = over_batches(model, items, presentation, states, batch_size, f"collect, {presentation.name}", progress)
    layers = tuple(-1 if point.layer is None else point.layer for point in site.points(model.cfg.n_layers))
    return Activations(torch.cat(found), layers, items, site.hook, site.positions, presentation.name, model.provenance)
