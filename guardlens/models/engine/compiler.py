"""Compile interventions and reads to taps, which any driver can run. Pure functions of tensors: no model, no nnsight.

The order of taps at one point is this. The steps of each lane come in the order of its intervention. If a step requires the state of this
run at its own place, that state is held just before it, so it includes the steps before. Then come the states that later places require,
and last the reads, which therefore see every edit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guardlens.data.queries import Query
from guardlens.errors import InterventionError, NumericsError
from guardlens.hooks import Point, Positions, Site
from guardlens.interventions.held_states import Context, State, resolved, source_of
from guardlens.interventions.intervention import Intervention
from guardlens.interventions.step import Step
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.layout import Layout, Placement
from guardlens.models.engine.out_of_memory import at_work

Held = Mapping[tuple[State, int | None], Float[Tensor, "query d_model"]]
Decisions = dict[tuple[int, int, int | None], Bool[Tensor, "query"]]
OwnKey = tuple[int, int | None, State, int | None]


@dataclass(eq=False)
class Record:
    """The results that the taps of a run record.

    Attributes:
        held: States of other presentations' runs, by state and layer. All lanes share them.
        own: States of this run, by lane, step, state and layer. Those without a step are held after all edits at their place.
        decisions: Which queries a gate opened for, by lane, step and layer.
        reads: One vector per lane and query, by site and point.
        broken: By edit and point, which states the edit made NaN or infinite when it last ran, and the queries of the states.
    """

    held: Held = field(default_factory=dict)
    own: dict[OwnKey, Tensor] = field(default_factory=dict)
    decisions: Decisions = field(default_factory=dict)
    reads: dict[tuple[Site, Point], Tensor] = field(default_factory=dict)
    broken: dict[tuple[int, int, Point], tuple[Step, Bool[Tensor, "state"], Int[Tensor, "state"]]] = field(default_factory=dict)

    def lookup(self, lane: int, number: int, asked_at: Point, n_layers: int, state: State) -> Float[Tensor, "query d_model"]:
        """The held state that the step `number` of a lane refers to at the point `asked_at`."""
        if state.presentation is None:
            return self.own[own_key(lane, number, asked_at, n_layers, state)]
        return self.held[resolved(state, asked_at), source_of(state, asked_at, n_layers).layer]

    def require_finite(self, queries: Sequence[Query]) -> None:
        """Refuse edits that gave NaN or infinity.

        Raises:
            NumericsError: The first such edit is named, with its layer and query.
        """
        flags = [bad.any() for _, bad, _ in self.broken.values()]
        if not flags or not torch.stack([flag.to(flags[0].device) for flag in flags]).any():  # each check waits for the GPU
            return
        for (_, _, point), (step, bad, owners) in self.broken.items():
            if bad.any():
                raise NumericsError(
                    f"NaN or infinity at {point.name} after the edit {step.edit!r}, query {queries[int(owners[bad][0])].id!r}",
                    "finite numbers",
                    "weaken the edit, look at what it is made of, or load the model in bfloat16 or float32 instead of float16",
                )


def own_key(lane: int, number: int, asked_at: Point, n_layers: int, state: State) -> OwnKey:
    """The key of a state of this run. A state at the step's own place is held for that step alone."""
    source = source_of(state, asked_at, n_layers)
    return lane, number if source == asked_at else None, resolved(state, asked_at), source.layer


@dataclass(frozen=True, eq=False)
class Hold:
    """A tap that holds one vector per query of this run."""

    record: Record
    key: OwnKey
    places: Placement
    queries: int

    def __call__(self, value: Float[Tensor, "row width d"], step: int) -> None:
        if step == 0:
            self.record.own[self.key] = mean_per_query(value, self.places, self.queries)


@dataclass(frozen=True, eq=False)
class Apply:
    """A tap that edits the chosen states of one lane."""

    record: Record
    lane: int
    number: int
    step: Step
    point: Point
    n_layers: int
    layout: Layout
    prompt: Placement | None

    def __call__(self, value: Float[Tensor, "row width d"], step: int) -> Float[Tensor, "row width d"] | None:
        if step == 0 and self.step.gate is not None:
            decision = self.step.gate.decide(self._lookup, self.point.layer)
            self.record.decisions[self.lane, self.number, self.point.layer] = decision
        places = self._places(value.shape[1], step)
        if places is None:
            return None
        places = places.to(value.device)
        states = value[places.rows, places.columns]
        context = Context(self.point.hook, self.point.layer, step, places.queries, self.step.strength, self._lookup)
        return value.index_put((places.rows, places.columns), self._edited(states, context))

    def _lookup(self, state: State) -> Float[Tensor, "query d_model"]:
        """A held state that the step requires.

        Raises:
            InterventionError: The step does not require it.
        """
        if resolved(state, self.point) not in [resolved(required, self.point) for required in self.step.requires]:
            raise InterventionError(
                f"{self.step.edit!r} asking for {state}, which it does not require",
                "a state that it requires, since these are held before it runs",
                "name it, as in custom(fn, requires=(state,))",
            )
        return self.record.lookup(self.lane, self.number, self.point, self.n_layers, state)

    def _places(self, width: int, step: int) -> Placement | None:
        """The prompt's places in the prefill, and the newest token while decoding. Without a KV cache, a decode step brings all of them."""
        if step == 0:
            return self.prompt
        whole = width > 1
        found = [self.prompt] if whole and self.prompt is not None else []
        if self.step.phase != "prefill":
            found.append(self.layout.decoding(self.lane, width - self.layout.column.shape[1] if whole else 1))
        return Placement(*map(torch.cat, zip(*found, strict=True))) if found else None

    def _edited(self, states: Float[Tensor, "state d"], context: Context) -> Float[Tensor, "state d"]:
        """The edited states, computed in single precision at least and rounded once."""
        exact = states.to(torch.promote_types(states.dtype, torch.float32))
        with at_work("the edit", self.step.edit):
            edited = self.step.edit(exact, context)
        if not isinstance(edited, Tensor) or edited.shape != states.shape or not edited.is_floating_point():
            made = f"shape {tuple(edited.shape)}" if isinstance(edited, Tensor) else f"type {type(edited).__name__}"
            made += f" and {edited.dtype}" if isinstance(edited, Tensor) else ""
            raise InterventionError(
                f"{self.step.edit!r} giving something of {made}",
                f"a tensor of shape {tuple(states.shape)} of floating-point numbers, as it was given",
                "return the states that it receives, changed",
            )
        if self.step.strength != 1:
            edited = exact + self.step.strength * (edited - exact)
        if self.step.gate is not None:
            opened = self.record.decisions[self.lane, self.number, self.point.layer].to(states.device)
            edited = torch.where(opened[context.query][:, None], edited, exact)
        edited = edited.to(states.dtype)
        bad = ~torch.isfinite(edited).all(dim=-1)
        self.record.broken[self.lane, self.number, self.point] = self.step, bad, context.query
        return edited


@dataclass(frozen=True, eq=False)
class Read:
    """A tap that records one vector per lane and query."""

    record: Record
    site: Site
    point: Point
    places: tuple[Placement, ...]
    queries: int

    def __call__(self, value: Float[Tensor, "row width d"], step: int) -> None:
        if step == 0:
            lanes = [mean_per_query(value, places, self.queries) for places in self.places]
            self.record.reads[self.site, self.point] = torch.stack(lanes)


@dataclass(frozen=True, eq=False)
class Tap:
    """A function at a point of the model. It gets the hook's value and the decode step, and returns a new value, or None to leave it.

    Attributes:
        decode: Whether it also runs in decode steps. Without a KV cache, all taps must.
    """

    point: Point
    fn: Callable[[Tensor, int], Tensor | None]
    decode: bool = False


def mean_per_query(value: Float[Tensor, "row width d"], places: Placement, queries: int) -> Float[Tensor, "query d"]:
    """The mean of the states at `places` for each query: a copy, never a view that a later edit could change."""
    places = places.to(value.device)
    states = value[places.rows, places.columns]
    if len(states) == queries:
        return states
    total = torch.zeros(queries, states.shape[-1], device=states.device).index_add(0, places.queries, states.float())
    return (total / torch.bincount(places.queries, minlength=queries)[:, None]).to(states.dtype)


def compile_taps(
    interventions: Sequence[Intervention], reads: Sequence[Site], layout: Layout, batch: Batch, n_layers: int, held: Held
) -> tuple[list[Tap], Record]:
    """Return the taps of a run, in order of execution, and the record that they will fill.

    Args:
        interventions: One per lane.
        reads: Sites to read in every lane.
        layout: How the lanes lie on the rows.
        batch: The prompts.
        n_layers: The number of layers of the model.
        held: The states of other presentations' runs that the interventions require.

    Raises:
        SiteError: A layer out of range, or no token at some positions.
        InterventionError: An intervention asks for a state that comes too late.
    """
    record, queries = Record(held), len(batch.queries)
    early: list[Tap] = []
    late: dict[OwnKey, Tap] = {}
    places = cache(partial(_places, layout, batch))
    for lane, intervention in enumerate(interventions):
        for number, step in enumerate(intervention.steps):
            decode, answer = step.phase != "prefill", step.phase != "prefill" and batch.answered > 0
            positions = None if step.phase == "decode" else step.site.positions
            prompt = places(positions, answer)[lane] if positions is not None or answer else None
            for point in step.site.points(n_layers):
                for state in step.requires:
                    if state.presentation is None:
                        source, key = source_of(state, point, n_layers), own_key(lane, number, point, n_layers, state)
                        hold = Tap(source, Hold(record, key, places(state.positions)[lane], queries))
                        if source == point:
                            early.append(hold)
                        else:
                            late[key] = hold
                early.append(Tap(point, Apply(record, lane, number, step, point, n_layers, layout, prompt), decode))
    last = [Tap(point, Read(record, site, point, places(site.positions), queries)) for site in reads for point in site.points(n_layers)]
    return sorted([*early, *late.values(), *last], key=lambda tap: tap.point.order), record


def _places(layout: Layout, batch: Batch, positions: Positions | None, answer: bool = False) -> tuple[Placement, ...]:
    """Where each lane has these tokens of the prompts, with the answers after them if `answer`."""
    chosen = torch.zeros_like(batch.mask) if positions is None else batch.select(positions)
    return layout.find(chosen | batch.answer if answer else chosen)
