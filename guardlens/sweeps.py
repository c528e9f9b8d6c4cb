"""`sweep`: plans at every layer and strength, scored for every query, with a placebo of equal norm beside them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby, islice
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.errors import MismatchError, PlanError
from guardlens.intervals import mean_difference
from guardlens.interventions.plan import Intervention, require_plan
from guardlens.keeping import Kept, over_prompts, shown
from guardlens.model import HookedModel, Queries
from guardlens.prefixes import Prefill
from guardlens.queries import Presentation, text_only
from guardlens.scores import Score, kl, refusal_logodds
from guardlens.tables import Frame, Table

ROWS = 256
"""Prompts per forward where each plan needs a copy of the batch: lanes times queries."""

LOGITS = 2**27
"""Logits per forward where plans ride as branches: lanes times queries times vocabulary."""

BASELINE = "unedited"


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: a plan, as itself or as a placebo, at some layers and a strength."""

    plan: str
    arm: str
    layers: tuple[int, ...]
    strength: float

    @property
    def where(self) -> str:
        """The layers as text, `"5"` or `"5+6"`."""
        return "+".join(map(str, self.layers))


class Sweep(Table):
    """Scores per plan, arm (`"edit"`, `"placebo 0"`, ...), layers, strength and query; `base` is the unedited run's score.

    Columns: plan, arm, layers, layer (the first of them), strength, query, label, score, value, base.
    """

    kind: ClassVar[str] = "sweep"

    def summary(self) -> Frame:
        """Mean change of each cell for each label, with a 95 % bootstrap interval over queries; placebo draws taken together."""
        return self._summary

    @cached_property
    def _summary(self) -> Frame:
        frame = self.frame.assign(arm=self.frame["arm"].str.split().str[0])
        keys = ["score", "plan", "arm", "layers", "layer", "strength", "label"]
        rows = []
        for key, part in frame.groupby(keys, sort=False):
            per_query = part.groupby("query")[["base", "value"]].mean()
            change = mean_difference(per_query["base"].to_numpy(), per_query["value"].to_numpy())
            rows.append(dict(zip(keys, key, strict=True)) | {"change": change.value, "low": change.low, "high": change.high, "n": change.n})
        import pandas as pd

        return pd.DataFrame(rows)

    def best(self, k: int = 1, plan: str | None = None) -> tuple[int, ...]:
        """The k single layers at which a plan raises the refusal of harmful queries most and that of harmless ones least.

        The rule: mean change of the refusal log-odds over harmful queries minus that over harmless ones where it is a rise,
        averaged over the strengths; ties go to the later layer.

        Args:
            k: How many layers.
            plan: Its name, where the sweep holds several.

        Raises:
            MismatchError: The sweep has no refusal log-odds, no labels, or fewer single layers.
        """
        frame = self.frame
        frame = frame[(frame["arm"] == "edit") & (frame["score"] == refusal_logodds.name) & ~frame["layers"].str.contains("+", regex=False)]
        frame = frame[frame["plan"] == (plan or frame["plan"].iloc[0])] if len(frame) else frame
        if frame["layer"].nunique() < k or set(frame["label"]) != {"harmful", "harmless"}:
            raise MismatchError(
                f"{frame['layer'].nunique()} single layers and the labels {sorted(set(frame['label']))}",
                f"at least {k} layers with the refusal log-odds of both labels",
                "sweep single layers over labelled queries with scores.refusal_logodds",
            )
        change = (frame["value"] - frame["base"]).groupby([frame["layer"], frame["strength"], frame["label"]]).mean().unstack()
        merit = (change["harmful"] - change["harmless"].clip(lower=0)).groupby(level="layer").mean()
        ranked = sorted(merit.index, key=lambda layer: (merit[layer], layer), reverse=True)
        return tuple(sorted(int(layer) for layer in ranked[:k]))

    def plot(self, score: str | None = None, axes: Any = None) -> Any:
        """Heat maps of the mean change, layer x strength, one per plan, arm and label."""
        from guardlens import plots

        summary = self.summary()
        score = score or str(summary["score"].iloc[0])
        summary = summary[summary["score"] == score]
        several = summary["plan"].nunique() > 1
        names = summary["plan"] + ", " + summary["arm"] if several else summary["arm"].replace("edit", str(summary["plan"].iloc[0]))
        unit = self.facts.get("units", {}).get(score, score)
        frame = summary.assign(plan=names, value=summary["change"]).drop(columns=["arm"])
        return plots.effect_maps(frame, unit=f"Δ {unit}", axes=axes)

    def __repr__(self) -> str:
        return f"Sweep({len(set(self.columns['plan']))} plans, {len(set(self.columns['layers']))} layer sets, {len(self)} rows)"


def sweep(
    model: HookedModel,
    plans: Intervention | Mapping[str, Intervention],
    queries: Queries | Kept,
    presentation: Presentation = text_only,
    *,
    scores: Sequence[Score] = (refusal_logodds, kl),
    strengths: Sequence[float] = (1.0,),
    layers: Sequence[int | Sequence[int]] | None = None,
    placebos: int = 1,
    batch_size: int = 64,
    progress: bool = True,
) -> Sweep:
    """Score plans at every layer and strength.

    Only steps whose layers are free are moved and scaled; a plan's other steps stay as they are in every cell.

    Args:
        model: The model.
        plans: One plan, or several by name (other gains, ranks, directions).
        queries: What to ask; labels are kept. Or prompts that `keep` has computed: asking about them again costs one token per cell.
        presentation: How to show it.
        scores: What to measure at the prompt's last token.
        strengths: Strength 0 is always "untouched" (and left out: it is the baseline), 1 the edit itself.
        layers: Layers, or groups of layers that are edited together; None for every single layer.
        placebos: How many placebos of equal norm ride along each cell (`Intervention.placebo`); 0 for none.
        batch_size: Queries per forward. Edits of the last token ride as branches beside each other, others as copies of the batch up to
            `ROWS` prompts; `facts["layout"]` says what ran, and why not as branches.
        progress: Show a bar.

    Raises:
        PlanError: A plan has no free layer.
        QueryError: No queries.
    """
    items, presentation = shown(queries, presentation)
    named = dict(plans) if isinstance(plans, Mapping) else {"edit": plans}
    for plan in named.values():
        require_plan(plan)
    bound = next((name for name, plan in named.items() if not plan.free), None)
    if bound is not None:
        raise PlanError(
            f"the plan {bound!r}, whose layers are all set", "a step without layers, for the sweep to move", "leave .at(layers=...) out"
        )
    wanted = range(model.cfg.n_layers) if layers is None else layers
    groups = [(group,) if isinstance(group, int) else tuple(group) for group in wanted]
    grid = _grid(named, groups, strengths, placebos)
    ran: set[str] = set()
    title = f"sweep, {len(grid)} cells, {presentation.name}"
    prompts = queries if isinstance(queries, Kept) else items
    work = partial(_score_part, model, grid, scores, ran)
    values = over_prompts(model, prompts, presentation, work, batch_size, title, progress)
    facts = {
        "plans": {name: repr(plan) for name, plan in named.items()},
        "presentation": presentation.name,
        "placebos": placebos,
        "layout": sorted(ran),
        "units": {score.name: score.unit for score in scores},
    }
    return Sweep(_columns(list(grid), items, scores, np.concatenate(values, axis=2)), facts, model.provenance)


def _grid(
    plans: Mapping[str, Intervention], groups: Sequence[tuple[int, ...]], strengths: Sequence[float], placebos: int
) -> dict[Cell, Intervention]:
    cells = {}
    for name, plan in plans.items():
        arms = {"edit": plan} | {f"placebo {seed}": plan.placebo(seed) for seed in range(placebos)}
        for arm, acting in arms.items():
            for group in groups:
                for strength in strengths:
                    if strength != 0:
                        cells[Cell(name, arm, group, float(strength))] = acting.placed(group, strength)
    return cells


def _score_part(model: HookedModel, grid: Mapping[Cell, Intervention], scores: Sequence[Score], ran: set[str], kept: Prefill) -> np.ndarray:
    """Scores of all cells and, last, of the unedited run: shape `score cell+1 query`. What ran is noted in `ran`."""
    return scored((*lanes(model, kept, list(grid.values()), ran), kept.logits), kept.logits, scores, model.tokenizer)


def lanes(model: HookedModel, kept: Prefill, plans: Sequence[Intervention], ran: set[str]) -> Iterator[Float[Tensor, "query vocab"]]:
    """Logits of each plan, as many at once as fit: branches until their logits are `LOGITS` numbers, else `ROWS` prompts."""
    most = max(1, LOGITS // model.cfg.d_vocab)
    for why, alike in groupby(plans, lambda plan: model.unbranchable(kept, [plan])):
        for part in batched(alike, max(1, (ROWS if why else most) // len(kept))):
            run = model.run(kept, part)
            assert run.logits is not None
            ran.add(f"{run.layout}: {run.why}" if run.why else run.layout)
            yield from run.logits


def batched(items: Iterable[Intervention], size: int) -> Iterator[list[Intervention]]:
    """In lists of at most `size`."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def scored(
    runs: Iterable[Float[Tensor, "query vocab"]], base: Float[Tensor, "query vocab"], scores: Sequence[Score], tokenizer: Any
) -> Float[np.ndarray, "score run query"]:
    """The scores of several runs, each against the unedited one."""
    found = [torch.stack([score(logits.clone(), base.clone(), tokenizer) for score in scores]) for logits in runs]
    return torch.stack(found, dim=1).double().cpu().numpy()


def _columns(cells: Sequence[Cell], queries: Sequence[Any], scores: Sequence[Score], values: np.ndarray) -> dict[str, np.ndarray]:
    """Tidy columns of `values` (score, cell + baseline, query)."""
    n_scores, n_cells, n = len(scores), len(cells), len(queries)
    per_cell = {
        "plan": [cell.plan for cell in cells],
        "arm": [cell.arm for cell in cells],
        "layers": [cell.where for cell in cells],
        "layer": [cell.layers[0] for cell in cells],
        "strength": [cell.strength for cell in cells],
    }
    columns = {name: np.tile(np.repeat(np.array(column), n), n_scores) for name, column in per_cell.items()}
    columns["query"] = np.tile(np.array([query.id for query in queries]), n_scores * n_cells)
    columns["label"] = np.tile(np.array([query.label or "" for query in queries]), n_scores * n_cells)
    columns["score"] = np.repeat(np.array([score.name for score in scores]), n_cells * n)
    columns["value"] = values[:, :-1].ravel()
    columns["base"] = np.repeat(values[:, -1:], n_cells, axis=1).ravel()
    return columns
