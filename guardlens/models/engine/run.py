"""`Run`: the result of running one or several interventions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guardlens.data.activations import require_finite
from guardlens.data.queries import Query
from guardlens.errors import NumericsError
from guardlens.hooks import Site
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.compiler import Record


@dataclass(frozen=True, eq=False)
class Run:
    """The result of a run. The first axis of every tensor is the lane: one per intervention.

    Attributes:
        reads: Site -> one vector per query and layer, the mean if the site has several positions.
        logits: The logits at the prompt's last token, at each token that one of an answer follows, or at all tokens; None if not asked for.
        tokens: The generated token ids, padded; None without generation.
        decisions: (lane, step, layer) -> which queries the gate opened for.
        layout: The strategy that computed the lanes: `"plain"`, `"tile"`, `"branch"` or `"fork"`.
        why: Why the lanes were not branches; empty if they were, or if there was one lane.
    """

    reads: Mapping[Site, Float[Tensor, "lane query layer d_model"]]
    logits: Float[Tensor, "lane query ... vocab"] | None
    tokens: Int[Tensor, "lane query new"] | None
    decisions: Mapping[tuple[int, int, int | None], Bool[Tensor, "query"]]
    layout: str
    why: str = ""

    def __repr__(self) -> str:
        shapes = {"logits": self.logits, "tokens": self.tokens, **{f"reads[{site.hook}]": value for site, value in self.reads.items()}}
        found = "".join(f", {name} {tuple(value.shape)}" for name, value in shapes.items() if value is not None)
        return f"Run({self.layout}{f': {self.why}' if self.why else ''}{found})"


def reads_of(record: Record, sites: Sequence[Site], batch: Batch, n_layers: int) -> dict[Site, Float[Tensor, "lane query layer d_model"]]:
    """The vectors that were read at each site, layer by layer.

    Raises:
        NumericsError: NaN or infinity, read or made by an edit; layer and query are named.
    """
    record.require_finite(batch.queries)
    reads = {}
    for site in sites:
        points = site.points(n_layers)
        reads[site] = torch.stack([record.reads[site, point].to(batch.mask.device) for point in points], dim=2)
        layers = tuple(-1 if point.layer is None else point.layer for point in points)
        if not torch.isfinite(reads[site]).all():  # once for all lanes: each check waits for the GPU
            for lane in reads[site]:
                require_finite(lane, batch.queries, layers)
    return reads


def checked(
    logits: Float[Tensor, "lane query *token vocab"], batch: Batch, real: Bool[Tensor, "query token"] | None = None, first_lane: int = 0
) -> Float[Tensor, "lane query *token vocab"]:
    """Return `logits` unchanged if all are finite.

    Args:
        logits: The logits of some tokens.
        batch: The prompts.
        real: Which tokens count; all by default.
        first_lane: The number of the first of these lanes.

    Raises:
        NumericsError: NaN or infinity; lane and query are named.
    """
    bad = _not_finite(logits)
    bad = bad if real is None else bad & real.to(bad.device)
    if bad.any():
        lane, query = (int(place) for place in bad.nonzero()[0][:2])
        raise not_finite(f"the logits of lane {first_lane + lane}, query {batch.queries[query].id!r}")
    return logits


def require_finite_step(record: Record, queries: Sequence[Query], logits: Float[Tensor, "row vocab"], step: int) -> None:
    """Refuse NaN and infinity while answers are generated.

    Args:
        record: The record of the run, which knows which edits gave them.
        queries: The queries, whose rows repeat lane after lane.
        logits: The logits of the newest token.
        step: The decode step; 0 for the prompts.

    Raises:
        NumericsError: The edit is named, else the step; and the query.
    """
    bad = _not_finite(logits)
    if bad.any():
        record.require_finite(queries)
        raise not_finite(f"the logits of step {step}, query {queries[int(bad.nonzero()[0]) % len(queries)].id!r}")


def _not_finite(logits: Float[Tensor, "*token vocab"]) -> Bool[Tensor, "*token"]:
    """Which tokens have a logit that is NaN or infinite. A sum over the vocabulary tells, and copies nothing."""
    total = logits.sum(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    bad = ~torch.isfinite(total)
    return ~torch.isfinite(logits).all(dim=-1) if bad.any() else bad


def not_finite(where: str) -> NumericsError:
    """The error about NaN or infinity somewhere."""
    return NumericsError(
        f"NaN or infinity in {where}", "finite numbers", "load the model in bfloat16 or float32 instead of float16, or weaken the edit"
    )


def agree(mine: Float[Tensor, "*lane row value"], expected: Float[Tensor, "*known row value"]) -> bool:
    """Whether two computations of one thing differ only by rounding: 1e-4 of the largest number in float32, 5e-2 in half precision."""
    tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
    return bool((mine - expected).abs().max() <= tolerance * expected.abs().max())
