"""What every strategy says of itself, and the arithmetic that they share."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from guardlens.models.engine import limits
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.compiler import Held
from guardlens.models.engine.forward import EndStates, Engine
from guardlens.models.engine.kv_cache import Prefill
from guardlens.models.engine.request import RunRequest
from guardlens.models.engine.run import Run, agree, checked


@runtime_checkable
class Strategy(Protocol):
    """A way to run the lanes of a request. All strategies give the same numbers, up to rounding."""

    @property
    def name(self) -> str:
        """The name that `Run.layout` reports."""
        ...

    def unsuited(self, request: RunRequest) -> str:
        """Why this strategy can't run the request; empty if it can."""
        ...

    def cost(self, request: RunRequest) -> float:
        """The cost of the request in plain forward passes of its batch, without the pass that fills the KV cache."""
        ...

    def lanes_per_forward(self, request: RunRequest, prefill: Prefill) -> int:
        """How many lanes like those of the request fit in one run."""
        ...

    def self_test(self, engine: Engine, batch: Batch, prefill: Prefill | None) -> None:
        """Compare the strategy with plain runs in this model.

        Raises:
            Disagreement: The numbers differ by more than rounding.
        """
        ...

    def run(self, engine: Engine, request: RunRequest, held: Held, prefill: Prefill | None) -> Run:
        """Run the request.

        Args:
            engine: The model.
            request: The interventions, and what to return.
            held: The held states of other presentations' runs that the interventions require.
            prefill: The batch's prompts, computed; needed by the strategies that continue from a KV cache.
        """
        ...


class Disagreement(Exception):
    """A strategy gives other numbers than a plain run."""


def require_agreement(mine: Tensor | None, expected: Tensor, what: str) -> None:
    """Compare two computations of one thing.

    Raises:
        Disagreement: They differ by more than rounding.
    """
    if mine is None or not agree(mine, expected):
        raise Disagreement(what)


def by_query(ends: EndStates | None, request: RunRequest) -> Float[Tensor, "lane query ... vocab"] | None:
    """The logits of the scored tokens, by lane and query; None if nobody asks for them, or if the request takes them lane by lane.

    Raises:
        NumericsError: NaN or infinity; lane and query are named.
    """
    if ends is None:
        return None
    if request.take is None:
        return _by_query(ends, request, range(request.lanes))
    at_once = max(1, limits.LOGIT_ROWS * request.lanes // len(ends))
    for first in range(0, request.lanes, at_once):
        taken(_by_query(ends, request, range(first, min(first + at_once, request.lanes))), request)
    return None


def taken(logits: Float[Tensor, "lane query ... vocab"], request: RunRequest) -> Float[Tensor, "lane query ... vocab"] | None:
    """Logits that were computed for all lanes at once; None if the request takes them lane by lane, which it then does."""
    if request.take is None:
        return logits
    for lane in logits:
        request.take(lane)
    return None


def _by_query(ends: EndStates, request: RunRequest, lanes: range) -> Float[Tensor, "lane query ... vocab"]:
    tokens = len(ends) // request.lanes
    raw = ends.logits(lanes.start * tokens, lanes.stop * tokens)
    found = raw.unflatten(0, (len(lanes), len(request.batch.queries), -1))
    return checked(found[:, :, 0] if request.logits == "last" else found, request.batch, first_lane=request.first_lane + lanes.start)
