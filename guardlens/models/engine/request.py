"""What a run is asked to do, and what that touches: which tokens, which layers, which modules."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from guardlens.hooks import BLOCKS, HOOKS, Point, Positions, Site
from guardlens.interventions import Intervention
from guardlens.interventions.held_states import source_of
from guardlens.models.architectures import Architecture
from guardlens.models.engine.batch import Batch


@dataclass(frozen=True, eq=False)
class RunRequest:
    """Interventions to run over a batch, and what to return.

    Attributes:
        cfg: The model's architecture.
        batch: The prompts.
        interventions: One per lane.
        read: The sites to read.
        logits: `"last"`, `"answer"`, `"all"` or None, as in `HookedModel.run`.
        new_tokens: The largest number of tokens to generate.
        seed: The seed of the draws, if tokens are sampled.
        options: Options of transformers' `generate`.
    """

    cfg: Architecture
    batch: Batch
    interventions: Sequence[Intervention]
    read: Sequence[Site] = ()
    logits: str | None = "last"
    new_tokens: int = 0
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lanes(self) -> int:
        """The number of interventions."""
        return len(self.interventions)

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """All points that some lane edits or reads."""
        return tuple(point for intervention in self.interventions for point in self._points_of(intervention))

    @cached_property
    def first_layers(self) -> list[int]:
        """For each lane, the first layer that it touches; the last layer if it touches none."""
        return [self._first_layer(intervention) for intervention in self.interventions]

    @cached_property
    def ends(self) -> Bool[Tensor, "query seq"]:
        """The ends of the prompts, from the first token that is edited or read; answers included."""
        chosen = torch.stack([self.batch.select(positions) for positions in {"last", *self.positions}]).any(0)
        return self.batch.mask & (chosen.cumsum(1) > 0)

    @property
    def earliest(self) -> Positions:
        """Those of the positions that begin first."""
        return max(self.positions, key=lambda positions: int(self._from(positions).sum()), default="last")

    @cached_property
    def positions(self) -> tuple[Positions, ...]:
        """The positions of the prompts that edits write to, or that reads and states of this run look at."""
        steps = [step for intervention in self.interventions for step in intervention.steps]
        edited = [step.site.positions for step in steps if step.phase != "decode"]
        looked_at = [state.positions for step in steps for state in step.requires if state.presentation is None]
        read = [site.positions for site in self.read]
        return tuple(dict.fromkeys((*edited, *looked_at, *read)))

    @cached_property
    def beyond_decoder(self) -> str:
        """Why the request needs more than a forward pass of the decoder alone; empty if it does not."""
        paths = [(point.hook, self.cfg.locate(point).path) for point in self.points]
        outside = next((hook for hook, path in paths if hook != "unembed" and not path.startswith(f"{self.cfg.decoder}.")), None)
        if self.logits == "all":
            return "logits of all tokens are asked for"
        if self.batch.padded_right:
            return "the batch is padded on the right"
        return "" if outside is None else f"the hook {outside} is outside of the decoder"

    def continues_from(self, rest: Bool[Tensor, "query seq"]) -> bool:
        """Whether a run can continue from a prefix, i.e. whether it edits and reads only the `rest` of the prompts."""
        return not self.beyond_decoder and not (self.ends & ~rest).any()

    def _points_of(self, intervention: Intervention) -> Iterator[Point]:
        for step in intervention.steps:
            for point in step.site.points(self.cfg.n_layers):
                yield point
                yield from (source_of(state, point, self.cfg.n_layers) for state in step.requires if state.presentation is None)
        for site in self.read:
            yield from site.points(self.cfg.n_layers)

    def _first_layer(self, intervention: Intervention) -> int:
        layers = [point.layer or 0 for point in self._points_of(intervention) if HOOKS[point.hook].stage == BLOCKS]
        return min(layers, default=self.cfg.n_layers - 1)

    def _from(self, positions: Positions) -> Bool[Tensor, "query seq"]:
        return self.batch.select(positions).cumsum(1) > 0


def scored_tokens(batch: Batch, logits: str) -> Bool[Tensor, "query seq"]:
    """The tokens whose logits are returned: each prompt's last one, or every token that is followed by one of an answer."""
    return batch.select("last") if logits == "last" else batch.answer.roll(-1, dims=1)
