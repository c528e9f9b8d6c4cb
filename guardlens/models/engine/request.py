"""Which way interventions run: what each way can't do, what it costs, and how many interventions go together.

The rule: *branches* where the ends of the prompts that they copy are at most half of the prompts; else *forks* where the blocks that they
skip add up to more than the one run that they begin with; else *tiles*.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, islice
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from guardlens.hooks import BLOCKS, HOOKS, Point, Positions, Site
from guardlens.interventions import Intervention
from guardlens.interventions.held_states import source_of
from guardlens.models.architectures import Architecture
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.kv_cache import Prefill

TOKENS = 4096
"""Tokens of branches in one forward."""

BESIDE = 1024
"""Tokens of branches in one row, each of which attends to all of them."""

COPIES = 4
"""Copies of the batch in one forward of tiles; more would not be halved with a batch that does not fit."""

LOGITS = 2**27
"""Logits in one forward."""


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of a run.

    Attributes:
        cfg: The model's parts.
        batch: The prompts.
        interventions: One per lane.
        read: Sites to read.
        logits: `"last"`, `"answer"`, `"all"` or none.
        new_tokens: How many tokens are generated.
        seed: Of the draws, where they are sampled.
        generation: Options of transformers' `generate`.
    """

    cfg: Architecture
    batch: Batch
    interventions: Sequence[Intervention]
    read: Sequence[Site] = ()
    logits: str | None = "last"
    new_tokens: int = 0
    seed: int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def unbranchable(self) -> str:
        """Why the interventions can't run as branches; empty if they can."""
        reasons = {"answers are generated": self.new_tokens > 0, **self._unsuited}
        if reason := next((reason for reason, holds in reasons.items() if holds), ""):
            return reason
        if (self.tail & self.batch.image).any():
            return f"the positions {self._earliest!r} are edited or read"
        short = 2 * int((self.tail & self.batch.prompt).sum()) <= int(self.batch.prompt.sum())
        return "" if short else f"from the positions {self._earliest!r} on, it is most of the prompts"

    @cached_property
    def unforkable(self) -> str:
        """Why the interventions can't run as forks; empty if they can."""
        stages = [
            HOOKS[point.hook].stage
            for intervention in self.interventions
            for point in points_of(intervention, self.read, self.cfg.n_layers)
        ]
        reasons = {
            "answers are generated": self.new_tokens > 0,
            **self._unsuited,
            "something before the blocks is edited or read": min(stages, default=BLOCKS) < BLOCKS,
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    @cached_property
    def forks(self) -> bool:
        """Whether forks are worth their while."""
        starts = [first_block(intervention, self.read, self.cfg.n_layers) for intervention in self.interventions]
        return not self.unforkable and sum(starts) > self.cfg.n_layers

    def follows(self, rest: Bool[Tensor, "query seq"]) -> bool:
        """Whether a run can go on behind a prefix: whether all that it edits and reads is in the `rest` of the prompts."""
        return not any(self._unsuited.values()) and not (self.tail & ~rest).any()

    @property
    def follow_prompts(self) -> bool:
        """Whether answers can be generated behind what is kept of the prompts: whether only their last tokens are edited and read."""
        cached = self.generation.get("use_cache", True) and not {"cache_implementation", "past_key_values"} & set(self.generation)
        return cached and not any(self._unsuited.values()) and set(self._positions) <= {"last"}

    @cached_property
    def tail(self) -> Bool[Tensor, "query seq"]:
        """The ends of the prompts, from the first token that is edited or read; answers included."""
        chosen = torch.stack([self.batch.select(positions) for positions in {"last", *self._positions}]).any(0)
        return self.batch.mask & (chosen.cumsum(1) > 0)

    @cached_property
    def _unsuited(self) -> dict[str, bool]:
        """What a run of the decoder alone can't do -> whether it is asked for."""
        paths = [
            (point.hook, self.cfg.locate(point).path)
            for intervention in self.interventions
            for point in points_of(intervention, self.read, self.cfg.n_layers)
        ]
        outside = next((hook for hook, path in paths if hook != "unembed" and not path.startswith(f"{self.cfg.decoder}.")), None)
        return {
            "logits of all tokens are asked for": self.logits == "all",
            "the batch is padded on the right": self.batch.padded_right,
            f"the hook {outside} is outside of the decoder": outside is not None,
        }

    @cached_property
    def _positions(self) -> tuple[Positions, ...]:
        """Where edits write in the prompt, and where reads and own states look."""
        steps = [step for intervention in self.interventions for step in intervention.steps]
        found = [step.site.positions for step in steps if step.phase != "decode"]
        found += [state.positions for step in steps for state in step.requires if state.presentation is None]
        return tuple(dict.fromkeys((*found, *(site.positions for site in self.read))))

    @property
    def _earliest(self) -> Positions:
        return max(self._positions, key=lambda positions: int(self._from(positions).sum()), default="last")

    def _from(self, positions: Positions) -> Bool[Tensor, "query seq"]:
        return self.batch.select(positions).cumsum(1) > 0


def points_of(intervention: Intervention, read: Sequence[Site], n_layers: int) -> Iterator[Point]:
    """All that a run of an intervention edits and reads."""
    for step in intervention.steps:
        for point in step.site.points(n_layers):
            yield point
            yield from (source_of(state, point, n_layers) for state in step.requires if state.presentation is None)
    for site in read:
        yield from site.points(n_layers)


def first_block(intervention: Intervention, read: Sequence[Site], n_layers: int) -> int:
    """The first block that a run of an intervention looks into; the last where it looks only behind them."""
    points = points_of(intervention, read, n_layers)
    return min((point.layer or 0 for point in points if HOOKS[point.hook].stage == BLOCKS), default=n_layers - 1)


def scored(batch: Batch, logits: str) -> Bool[Tensor, "query seq"]:
    """The tokens whose logits are asked for: the prompts' last ones, or those that each token of an answer follows."""
    return batch.select("last") if logits == "last" else batch.answer.roll(-1, dims=1)


def together(
    cfg: Architecture, kept: Prefill, interventions: Iterable[Intervention], forks: Callable[[], bool]
) -> Iterator[list[Intervention]]:
    """The interventions in their order, as many at once as fit in a run.

    Args:
        cfg: The model's parts.
        kept: The prompts.
        interventions: One per lane.
        forks: Says whether the model's forks hold.
    """
    logits = "answer" if kept.batch.answered else "last"
    most = max(1, LOGITS // (cfg.d_vocab * len(kept) * max(1, kept.batch.answered)))

    def asked(interventions: Sequence[Intervention]) -> Asked:
        return Asked(cfg, kept.batch, interventions, logits=logits)

    def at_once(why: str, interventions: Sequence[Intervention]) -> int:
        if why:
            return most if asked(interventions).forks and forks() else COPIES
        assert kept.stem is not None
        tails = [asked([intervention]).tail.sum(1) for intervention in interventions]
        longest = max(tails, key=lambda tail: int(tail.sum()))
        fullest = int(torch.bincount(kept.stem.row, weights=longest.double()).max())
        return max(1, min(most, TOKENS // int(longest.sum()), BESIDE // fullest))

    for why, alike in groupby(interventions, lambda intervention: kept.flaw or asked([intervention]).unbranchable):
        alike = list(alike)
        rest, size = iter(alike), at_once(why, alike)
        while part := list(islice(rest, size)):
            yield part
