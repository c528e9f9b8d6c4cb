"""Ways to run plans, the same numbers each: copies of the batch, branches of the last token, prompts behind a prefix.

A plan is a lane. What branches and prefixes rest on is measured on each model before it is trusted: see `Trials`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.architectures import Architecture
from guardlens.batches import Batch, Layout
from guardlens.engine import Engine
from guardlens.errors import GuardlensError
from guardlens.interventions import Context, Custom, Intervention, Step, nothing
from guardlens.prefixes import Prefill, Prefix, prefill, prefill_after, prefix_of
from guardlens.program import Held, compile_taps
from guardlens.runs import Run, agree, at_last, reads_of
from guardlens.sites import Positions, Site

Made = TypeVar("Made")


def run_tiles(
    engine: Engine,
    batch: Batch,
    plans: Sequence[Intervention],
    read: Sequence[Site],
    logits: str | None,
    held: Held,
    *,
    new_tokens: int = 0,
    seed: int | None = None,
    generation: Mapping[str, Any] = MappingProxyType({}),
) -> Run:
    """Each plan on its own copy of the batch, below each other. One plan is a plain run."""
    layout = Layout.tile(len(batch.queries), batch.mask.shape[1], len(plans), batch.mask.device)
    taps, record = compile_taps(plans, read, layout, batch, engine.cfg.n_layers, held)
    run, tokens, by_lane = replace(batch, inputs=layout.spread(batch.inputs, engine.cfg.packed)), None, None
    if new_tokens:
        tokens = engine.generate(run, taps, new_tokens, seed, generation).unflatten(0, (len(plans), -1))
    else:
        # On the left, every row ends in its last token, and the unembedding of all others can be skipped.
        raw = engine.forward(run, taps, None if logits is None else int(logits == "last" and not batch.padded_right))
        by_lane = None if raw is None else raw.unflatten(0, (len(plans), -1))
    reads = reads_of(record, read, batch, engine.cfg.n_layers)
    by_lane = at_last(by_lane, batch) if by_lane is not None and logits == "last" else by_lane
    return Run(reads, by_lane, tokens, record.verdicts, layout.name)


def run_branches(engine: Engine, kept: Prefill, plans: Sequence[Intervention], read: Sequence[Site], logits: str | None, held: Held) -> Run:
    """Each plan on its own copy of every prompt's last token, beside each other, behind what is kept of the prompts."""
    batch = kept.batch
    layout = Layout.branch(len(batch.queries), batch.mask.shape[1], len(plans), batch.mask.device)
    taps, record = compile_taps(plans, read, layout, batch, engine.cfg.n_layers, held)
    with kept.kept():
        raw = engine.continued(kept.branches(len(plans), engine.hf.dtype), taps, batch, logits=logits is not None)
    reads = reads_of(record, read, batch, engine.cfg.n_layers)
    by_lane = at_last(raw.transpose(0, 1)[:, :, None], batch) if logits else None
    return Run(reads, by_lane, None, record.verdicts, layout.name)


def run_suffixes(
    engine: Engine, prefix: Prefix, batch: Batch, plan: Intervention, read: Sequence[Site], logits: str | None, held: Held
) -> Run:
    """One plan on what follows a prefix in every prompt."""
    layout = Layout.suffix(batch.mask, len(prefix))
    taps, record = compile_taps([plan], read, layout, batch, engine.cfg.n_layers, held)
    at = (layout.lane == 0).sum(1) - 1
    raw = engine.continued(prefix.continued(batch, layout), taps, batch, at=at, logits=logits is not None)
    reads = reads_of(record, read, batch, engine.cfg.n_layers)
    by_lane = at_last(raw[None, :, None], batch) if logits else None
    return Run(reads, by_lane, None, record.verdicts, layout.name)


def unbranchable(
    cfg: Architecture, batch: Batch, plans: Sequence[Intervention], read: Sequence[Site], logits: str | None, new_tokens: int
) -> str:
    """Why a run of these plans can't share all but the last token of its prompts; empty if it can."""
    elsewhere = next((positions for positions in _positions(plans, read) if positions != "last"), None)
    reasons = {
        **_behind_a_cache(cfg, batch, plans, read, logits, new_tokens),
        f"the positions {elsewhere!r} are edited or read": elsewhere is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def followed(
    cfg: Architecture, prefix: Prefix | None, batch: Batch, plan: Intervention, read: Sequence[Site], logits: str | None
) -> Prefix | None:
    """As much of a prefix as a run can continue from: what it edits and reads must come after that."""
    shared = prefix.begins(batch) if prefix is not None else None
    if shared is None or any(_behind_a_cache(cfg, batch, [plan], read, logits, 0).values()):
        return None
    if any(site.hook == "unembed" for site in (*(step.site for step in plan.steps), *read)):
        return None
    layout = Layout.suffix(batch.mask, len(shared))
    return shared if all(layout.covers(batch.select(positions)) for positions in _positions([plan], read)) else None


def _behind_a_cache(
    cfg: Architecture, batch: Batch, plans: Sequence[Intervention], read: Sequence[Site], logits: str | None, new_tokens: int
) -> dict[str, bool]:
    """What a run of the decoder behind a cache can't do -> whether it is asked for."""
    sites = [*(step.site for plan in plans for step in plan.steps), *read]
    paths = [(site.hook, cfg.locate(point).path) for site in sites for point in site.points(cfg.n_layers)[:1]]
    outside = next((hook for hook, path in paths if hook != "unembed" and not path.startswith(f"{cfg.decoder}.")), None)
    return {
        "answers are generated": new_tokens > 0,
        "logits of all tokens are asked for": logits == "all",
        "the batch is padded on the right": batch.padded_right,
        f"the hook {outside} is outside of the decoder": outside is not None,
    }


def _positions(plans: Sequence[Intervention], read: Sequence[Site]) -> list[Positions]:
    """Where a run's edits write in the prompt, and where its reads and own states look."""
    steps = [step for plan in plans for step in plan.steps if step.phase != "decode"]
    own = [state.positions for plan in plans for step in plan.steps for state in step.requires if state.run is None]
    return [*(step.site.positions for step in steps), *(site.positions for site in read), *own]


class Disagreement(Exception):
    """A cheaper way to compute something gave something else."""


@dataclass(frozen=True, eq=False)
class Trials:
    """Branches and prefixes of one model, compared with whole runs before they are trusted.

    Attributes:
        engine: The model.
        flaws: What was found, of prompts with and without images apart: why branches (or prefixes) don't hold; empty where they do.
        widest: The most cached columns behind which branches have been compared, of either kind of prompt.
    """

    engine: Engine
    flaws: dict[tuple[str, bool], str] = field(default_factory=dict)
    widest: dict[bool, int] = field(default_factory=dict)

    def prefilled(self, batch: Batch, prefix: Prefix | None) -> Prefill | None:
        """The prompts up to their last token; None where branches of them differ from whole runs, edited or unedited."""
        return self._tried(("branches", batch.beside_image), lambda: self._prefilled(batch, prefix))

    def prefix(self, first: Batch, length: int, two: Callable[[], Batch]) -> Prefix | None:
        """The first tokens of one prompt; None where prompts that continue from it (`two`) have other states than on their own."""
        return self._tried(("prefixes", first.beside_image), lambda: self._prefix(first, length, two))

    def _tried(self, what: tuple[str, bool], make: Callable[[], Made]) -> Made | None:
        if self.flaws.get(what):
            return None
        try:
            made = make()
        except (GuardlensError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a foreign model or cache may fail in any way, and the table must say so
            self.flaws[what] = str(error) if isinstance(error, Disagreement) else f"{type(error).__name__}: {error}".splitlines()[0]
            return None
        self.flaws.setdefault(what, "")
        return made

    def _prefilled(self, batch: Batch, prefix: Prefix | None) -> Prefill:
        engine = self.engine
        if prefix is None:
            made = prefill(engine.decoder, engine.config, batch, engine.last_logits)
        else:
            made = prefill_after(
                prefix, engine.config, batch, engine.hf.dtype, lambda inputs, at: engine.continued(inputs, (), batch, at=at)
            )
        if made.width > self.widest.get(batch.beside_image, 0):  # a window or a chunk shows only in prompts that are longer than it
            unedited = run_branches(engine, made, [nothing, nothing], (), "last", {}).logits
            _require_agreement(unedited, made.logits, "branches without an edit differ from the plain run")
            self.widest[batch.beside_image] = made.width
        if ("branches", batch.beside_image) not in self.flaws:
            edited = run_branches(engine, made, [_PUSH, nothing, _PUSH], (), "last", {}).logits
            whole = run_tiles(engine, batch, [_PUSH], (), "last", {}).logits
            assert edited is not None and whole is not None
            _require_agreement(edited[::2], whole[0], "an edited branch differs from an edited run")
            _require_agreement(edited[1:2], made.logits, "an edited branch changes the one beside it")
        return made

    def _prefix(self, first: Batch, length: int, two: Callable[[], Batch]) -> Prefix:
        made = prefix_of(self.engine.decoder, first, length, self.engine.last_logits)
        if ("prefixes", first.beside_image) not in self.flaws:
            pair, site = two(), Site()
            shared = made.begins(pair)
            assert shared is not None
            mine = run_suffixes(self.engine, shared, pair, nothing, [site], None, {}).reads[site]
            whole = run_tiles(self.engine, pair, [nothing], [site], None, {}).reads[site]
            _require_agreement(mine, whole[0], "prompts that continue from a common beginning have other states than on their own")
        return made


def _require_agreement(mine: Tensor | None, expected: Tensor, what: str) -> None:
    if mine is None or not agree(mine, expected):
        raise Disagreement(what)


def _pushed(states: Float[Tensor, "state d"], context: Context) -> Float[Tensor, "state d"]:
    direction = torch.ones_like(states)
    direction[:, ::2] = -1
    return states + states.norm(dim=-1, keepdim=True) * direction / states.shape[-1] ** 0.5


_PUSH = Intervention((Step(Custom(_pushed), Site(layers=(0,))),))
"""What shows whether an edited branch gives what an edited run gives: a push as long as the state itself."""
