"""What a run is asked to do, and what that touches: which tokens, which layers, which modules."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from guardlens.errors import ArgumentError, InterventionError, SiteError, as_count, is_several, one_of, quoted, require_type
from guardlens.hooks import BLOCKS, HOOKS, Point, Positions, Site
from guardlens.interventions import Intervention
from guardlens.interventions.held_states import source_of
from guardlens.interventions.intervention import require_intervention
from guardlens.models.architectures import Architecture
from guardlens.models.engine.batch import Batch

LOGITS = ("last", "answer", "all", None)
"""What `HookedModel.run` takes as `logits`."""


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
        take: Takes the logits of one lane after the other, which the run then does not keep; None if it keeps them.
        first_lane: The number of the first lane among all that the user asked for, as errors name it.
    """

    cfg: Architecture
    batch: Batch
    interventions: Sequence[Intervention]
    read: Sequence[Site] = ()
    logits: str | None = "last"
    new_tokens: int = 0
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    take: Callable[[Tensor], None] | None = None
    first_lane: int = 0

    @classmethod
    def checked(
        cls, cfg: Architecture, ids: tuple[str, str], batch: Batch, interventions: Any, read: Any, logits: Any, new_tokens: Any, seed: Any
    ) -> "RunRequest":
        """The request, once everything in it is something that this model can do.

        Args:
            cfg: The model's architecture.
            ids: The ids of the model, and of the LLM beside it.
            batch: The prompts.
            interventions: One or several interventions.
            read: One or several sites.
            logits: One of `LOGITS`.
            new_tokens: The largest number of tokens to generate.
            seed: The seed of the draws, or None.

        Raises:
            ArgumentError: The logits are no choice, or a number is no whole number.
            InterventionError: There are no interventions, or something else is among them.
            MismatchError: An intervention was made for another model.
            SiteError: Something else is among the sites, or this model lacks a hook or a layer.
        """
        lanes = _as_lanes(interventions, ids, cfg)
        sites = _as_sites(read, cfg)
        new_tokens = as_count(new_tokens, "new_tokens", ArgumentError, "say how many tokens to generate; leave it out for none", least=0)
        seed = None if seed is None else as_count(seed, "seed", ArgumentError, "say seed=0, or leave it out", least=0)
        if logits is not None and not one_of(logits, LOGITS):
            choices = ", ".join(map(repr, LOGITS))
            raise ArgumentError(f"logits={quoted(logits)}", f"one of {choices}", "leave it out for those of the last token")
        on_device = [intervention.to(batch.mask.device) for intervention in lanes]
        return cls(cfg, batch, on_device, sites, logits, new_tokens, seed)

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

    @property
    def is_early(self) -> bool:
        """Whether something before the blocks is edited or read, such as the embedding."""
        return any(HOOKS[point.hook].stage < BLOCKS for point in self.points)

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


def _as_lanes(interventions: Any, ids: tuple[str, str], cfg: Architecture) -> list[Intervention]:
    lanes = list(interventions) if isinstance(interventions, Sequence) else [interventions]
    if not lanes:
        raise InterventionError("no interventions", "one at least", "hand in interventions.nothing for the unedited run")
    for intervention in lanes:
        require_intervention(intervention)
        intervention.require_fit(ids, cfg.n_layers, cfg.widths)
        _require_places([step.site for step in intervention.steps], cfg)
    return lanes


def _as_sites(read: Any, cfg: Architecture) -> Sequence[Site]:
    sites = [read] if isinstance(read, Site) else read
    if not is_several(sites):
        raise SiteError(f"read={quoted(read)}", "sites", "say read=[Site('resid_post')], or leave it out")
    for site in sites:
        require_type(site, Site, SiteError, "say Site('resid_post')")
    _require_places(sites, cfg)
    return sites


def _require_places(sites: Sequence[Site], cfg: Architecture) -> None:
    for site in sites:
        for point in site.points(cfg.n_layers):
            cfg.locate(point)
