"""`sweep`: interventions at every layer and strength, scored for every query, with a placebo of equal norm beside them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from guardlens.data.presentations import Presentation
from guardlens.data.queries import Query, require_ids
from guardlens.errors import (
    InterventionError,
    MismatchError,
    NumericsError,
    as_count,
    as_number,
    is_several,
    one_of,
    quoted,
    require_type,
    type_of,
    warn,
)
from guardlens.experiments.scores import AnswerScore, Score, kl, refusal_logodds
from guardlens.hooks import Layers, as_layers
from guardlens.interventions.intervention import Intervention, require_intervention
from guardlens.models.batching import in_query_order
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.kv_cache import Prefill
from guardlens.models.engine.out_of_memory import at_work
from guardlens.models.engine.run import Run
from guardlens.models.hooked_model import HookedModel, Queries, require_model
from guardlens.models.prompt_cache import PromptCache, over_prefills, queries_and_presentation
from guardlens.results.intervals import percentile, resample_counts
from guardlens.results.progress import track
from guardlens.results.tables import Frame, Table

AnyScore = Score | AnswerScore


CELL = ["score", "intervention", "arm", "layers", "strength"]
"""What tells the cells of a sweep apart."""


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: an intervention, as itself or as a placebo, at some layers and a strength."""

    intervention: str
    arm: str
    layers: tuple[int, ...]
    strength: float

    @property
    def where(self) -> str:
        """The layers as text, `"5"` or `"5+6"`."""
        return "+".join(map(str, self.layers))


class Sweep(Table):
    """Scores per intervention, arm (`"edit"`, `"placebo 0"`, ...), layers, strength and query; `base` is the unedited run's score.

    Columns: intervention, arm, layers, layer (the first of them), strength, query, label, cluster, score, value, base.

    Examples:
        >>> effect = gl.sweep(model, guard, queries, grey, layers=[5, 7, (6, 7)])
        >>> effect.summary()["layers"].unique().tolist()
        ['5', '7', '6+7']
        >>> panels = effect.plot("kl")
    """

    kind: ClassVar[str] = "sweep"

    def summary(self) -> Frame:
        """Mean change of each cell for each label, placebo draws taken together, with a 95 % interval.

        The interval resamples clusters of queries (a pair, or the query itself, where no cluster is known), the same in every cell.

        Raises:
            MismatchError: No rows, or a cell that lacks a query or has one twice.
        """
        return self._summary

    @cached_property
    def _summary(self) -> Frame:
        if not len(self):
            raise MismatchError("a sweep without rows", "one at least", "select rows that are there, as in .where(score='kl')")
        self._require_whole()
        frame = self.frame.assign(arm=self.frame["arm"].str.split().str[0], change=self.frame["value"] - self.frame["base"])
        asked = {label: part.drop_duplicates("query") for label, part in frame.groupby("label", sort=False)}
        resampled = {label: resample_counts(len(part), part["cluster"].to_numpy()) for label, part in asked.items()}
        keys = ["score", "intervention", "arm", "layers", "layer", "strength", "label"]
        rows = []
        for key, part in frame.groupby(keys, sort=False):
            changes, counts = part.groupby("query")["change"].mean()[asked[key[-1]]["query"]].to_numpy(), resampled[key[-1]]
            change = percentile(changes.mean(), counts @ changes / counts.sum(axis=1), len(changes))
            rows.append(dict(zip(keys, key, strict=True)) | {"change": change.value, "low": change.low, "high": change.high, "n": change.n})
        import pandas as pd

        return pd.DataFrame(rows)

    def _require_whole(self) -> None:
        """Each query of a label once in every cell: means of other queries are no effect of layer or strength."""
        frame = self.frame
        asked = frame.groupby("label")["query"].nunique()
        cells = frame.groupby([*CELL, "label"])["query"].agg(["size", "nunique"])
        wanted = asked[cells.index.get_level_values("label")].to_numpy()
        odd = (cells["size"] != wanted) | (cells["nunique"] != wanted)
        if odd.any():
            place = odd.idxmax()
            raise MismatchError(
                f"{cells['size'][place]} rows of {cells['nunique'][place]} queries in the cell {', '.join(map(str, place))}",
                f"one for each of its {asked[place[-1]]} queries",
                "filter all cells alike, as with .where(score='kl')",
            )

    def best(self, k: int = 1, intervention: str | None = None) -> tuple[int, ...]:
        """The k single layers at which an intervention raises the refusal of harmful queries most and that of harmless ones least.

        The rule: mean change of the refusal log-odds over harmful queries minus that over harmless ones where it is a rise,
        averaged over the strengths; ties go to the later layer.

        Args:
            k: How many layers.
            intervention: Its name; needed where the sweep holds several.

        Raises:
            MismatchError: The sweep has no refusal log-odds, no labels, fewer single layers, or several interventions and none was named;
                or a cell lacks a query or has one twice.
            NumericsError: A layer's log-odds are nan.
        """
        k = as_count(k, "k", MismatchError, "ask for one layer or more, as in best(2)")
        self._require_whole()
        frame, interventions = self.frame, sorted(map(str, set(self.columns["intervention"])))
        if not one_of(intervention, interventions) if intervention is not None else len(interventions) > 1:
            raise MismatchError(
                f"the intervention {quoted(intervention)}" if intervention is not None else "several interventions",
                f"one of {interventions}",
                "say best(k, intervention=...)",
            )
        frame = frame[(frame["arm"] == "edit") & (frame["score"] == refusal_logodds.name) & ~frame["layers"].str.contains("+", regex=False)]
        frame = (
            frame[frame["intervention"] == (frame["intervention"].iloc[0] if intervention is None else intervention)]
            if len(frame)
            else frame
        )
        if frame["layer"].nunique() < k or set(frame["label"]) != {"harmful", "harmless"}:
            raise MismatchError(
                f"{frame['layer'].nunique()} single layers and the labels {sorted(set(frame['label']))}",
                f"at least {k} layers with the refusal log-odds of both labels",
                "sweep single layers over labelled queries with scores.refusal_logodds",
            )
        change = (frame["value"] - frame["base"]).groupby([frame["layer"], frame["strength"], frame["label"]]).mean().unstack()
        merit = (change["harmful"] - change["harmless"].clip(lower=0)).groupby(level="layer").mean()
        if merit.isna().any():
            raise NumericsError(
                f"log-odds that are nan at the layers {[int(layer) for layer in merit.index[merit.isna()]]}",
                "numbers for both labels at each layer and strength",
                "sweep all layers at the same strengths, with a score that is finite",
            )
        ranked = sorted(merit.index, key=lambda layer: (merit[layer], layer), reverse=True)
        return tuple(sorted(int(layer) for layer in ranked[:k]))

    def plot(self, score: str | None = None, ax: Any = None) -> Any:
        """Heat maps of the mean change, layer x strength, one per intervention, arm and label.

        Args:
            score: Its name; the first one without it.
            ax: Where to draw, one axes per map; a new figure without it.

        Raises:
            MismatchError: No rows, or none of this score.
        """
        from guardlens.results import plots

        summary = self.summary()
        score = str(summary["score"].iloc[0]) if score is None else score
        known = list(dict.fromkeys(summary["score"]))
        if not one_of(score, known):
            raise MismatchError(f"the score {quoted(score)}", f"one of {known}", "name a score that was swept")
        summary = summary[summary["score"] == score]
        several = summary["intervention"].nunique() > 1
        names = (
            summary["intervention"] + ", " + summary["arm"]
            if several
            else summary["arm"].replace("edit", str(summary["intervention"].iloc[0]))
        )
        unit = self.facts.get("units", {}).get(score, score)
        frame = summary.assign(intervention=names, value=summary["change"]).drop(columns=["arm"])
        return plots.effect_maps(frame, unit=f"Δ {unit}", axes=ax)

    def __repr__(self) -> str:
        interventions = len(set(self.columns["intervention"]))
        layer_sets = len(set(self.columns["layers"]))
        return f"Sweep({interventions} interventions, {layer_sets} layer sets, {len(self)} rows)"


def sweep(
    model: HookedModel,
    interventions: Intervention | Mapping[str, Intervention],
    queries: Queries | PromptCache,
    presentation: Presentation | None = None,
    *,
    scores: Sequence[AnyScore] = (refusal_logodds, kl),
    strengths: float | Iterable[float] = (1.0,),
    layers: Layers | Iterable[Layers] | None = None,
    placebos: int = 1,
    batch_size: int | None = None,
) -> Sweep:
    """Score interventions at every layer and strength.

    Only steps whose layers are free are moved and scaled; an intervention's other steps stay as they are in every cell.

    Args:
        model: The model.
        interventions: One intervention, or several by name (other gains, ranks, directions).
        queries: What to ask; labels are kept. Or prompts that `keep` has computed: asking about them again costs one token per cell.
        presentation: How to show it; without it as text alone, and kept prompts as they are kept.
        scores: What to measure: at the prompt's last token, or along an answer (`AnswerLogProb`, `AnswerKL`).
        strengths: Strength 0 is always "untouched" (and left out: it is the baseline), 1 the edit itself.
        layers: Layers, or groups of layers that are edited together; None for every single layer.
        placebos: How many placebos of equal norm ride along each cell (`Intervention.placebo`); 0 for none.
        batch_size: Queries per forward; chosen from free memory without it. Interventions for the ends of the prompts ride beside each
            other as branches, others as forks or as copies of the batch; `facts["layout"]` says what ran, and why not as branches.

    Raises:
        InterventionError: An intervention has no free layer, or interventions, scores, strengths or placebos are none, or scores don't give
            one number per query.
        SiteError: Layers that are none, or that the model has not.
        NumericsError: A score that is nan or infinite; intervention and query are named.
        QueryError: No queries.

    Warns:
        UserWarning: An intervention that changes no score in any cell, so that there is nothing to choose from.

    Examples:
        >>> effect = gl.sweep(model, guard, queries, grey, strengths=[0.5, 1.0])
        >>> effect.best(2)
        (6, 7)
        >>> effect.facts["layout"]  # the prompts ran once, and each cell as a branch of their last token
        ['branch']
    """
    require_model(model)
    items, presentation = queries_and_presentation(queries, presentation)
    require_told_apart(items, scores)
    named = _named(interventions)
    groups = _groups(range(model.cfg.n_layers) if layers is None else layers)
    strengths = [as_number(each, "strength", InterventionError, "say strengths=[0.5, 1.0]") for each in _several(strengths)]
    placebos = as_count(placebos, "placebos", InterventionError, "say placebos=0 for none", least=0)
    grid = _grid(named, groups, strengths, placebos)
    if not grid:
        found = f"{len(named)} interventions, {len(groups)} layers and the strengths {strengths}"
        raise InterventionError(found, "a cell at least; strength 0 is none", "name some")
    ran: set[str] = set()
    title = f"sweep, {len(grid)} cells, {presentation.name}"
    prompts = queries if isinstance(queries, PromptCache) else items
    work = partial(scored, model, interventions=list(grid.values()), scores=scores, ran=ran)
    parts = over_prefills(model, prompts, presentation, work, batch_size)
    values = in_query_order(track(parts, len(items), title), len(items), axis=2).numpy()
    _warn_of_no_change(list(grid), values)
    facts = {
        "interventions": {name: repr(intervention) for name, intervention in named.items()},
        "presentation": presentation.name,
        "placebos": placebos,
        "layout": sorted(ran),
        "units": {score.name: score.unit for score in scores},
    }
    return Sweep(_columns(list(grid), items, scores, values), facts, model.provenance)


def _warn_of_no_change(cells: Sequence[Cell], values: Float[np.ndarray, "score run query"]) -> None:
    """Say so where no cell of an intervention gives another score than the unedited run, which is the last."""
    for intervention in dict.fromkeys(cell.intervention for cell in cells):
        edited = [place for place, cell in enumerate(cells) if (cell.intervention, cell.arm) == (intervention, "edit")]
        if np.allclose(values[:, edited], values[:, -1:], rtol=1e-4, atol=1e-4):
            warn(
                f"the intervention {intervention!r} changes no score in any cell: its gate is closed for all queries, it edits later "
                "tokens than are scored, or it puts in what is there already, as the text twin is where no image is shown"
            )


def require_told_apart(queries: Sequence[Query], scores: Sequence[AnyScore]) -> None:
    """Refuse queries of one id and scores of one name, which a table would take for one; and what are no scores.

    Raises:
        QueryError, InterventionError: As said.
    """
    require_ids(queries)
    if isinstance(scores, Score) or not isinstance(scores, Sequence) or not len(scores):
        raise InterventionError("no scores" if is_several(scores) else type_of(scores), "scores in a list", "say scores=[scores.kl]")
    for score in scores:
        if isinstance(score, type):
            raise InterventionError(type_of(score), "a score", f"make one of it: {score.__name__}()")
        require_type(score, Score, InterventionError, "hand in scores such as [scores.kl, scores.AnswerKL()]")
        require_type(score.name, str, InterventionError, "name each score by a text")
    if len({score.name for score in scores}) < len(scores):
        raise InterventionError("two scores of one name", "a name for each", "say scores.AnswerLogProb(text, name=...)")


def _named(interventions: Any) -> dict[str, Intervention]:
    """The interventions by name, each with a step that the sweep can move; one alone is called "edit".

    Raises:
        InterventionError: Something else.
    """
    named = dict(interventions) if isinstance(interventions, Mapping) else {"edit": interventions}
    for name, intervention in named.items():
        require_type(name, str, InterventionError, "name each intervention by a text")
        require_intervention(intervention)
        if not intervention.free:
            raise InterventionError(
                f"the intervention {name!r}, whose layers are all set",
                "a step without layers, for the sweep to move",
                "leave .at(layers=...) out",
            )
    return named


def _several(given: Any) -> list[Any]:
    """What was given, one or several, as a list. An array without an axis is one."""
    return list(given) if is_several(given) else [given]


def _groups(layers: Any) -> list[tuple[int, ...]]:
    """Layers, or groups of layers that are edited together, each once.

    Raises:
        SiteError: A group that is none.
    """
    groups = [as_layers(group if isinstance(group, Iterable) else [group]) for group in _several(layers)]
    return list(dict.fromkeys(group for group in groups if group is not None))


def _grid(
    interventions: Mapping[str, Intervention], groups: Sequence[tuple[int, ...]], strengths: Sequence[float], placebos: int
) -> dict[Cell, Intervention]:
    cells = {}
    for name, intervention in interventions.items():
        arms = {"edit": intervention} | {f"placebo {seed}": intervention.placebo(seed) for seed in range(placebos)}
        for arm, acting in arms.items():
            for group in groups:
                for strength in strengths:
                    if strength != 0:
                        cells[Cell(name, arm, group, float(strength))] = acting.placed(group, strength)
    return cells


def scored(
    model: HookedModel,
    kept: Prefill,
    interventions: Sequence[Intervention],
    scores: Sequence[AnyScore],
    ran: set[str],
    others: Sequence[tuple[HookedModel, Batch]] = (),
) -> Float[Tensor, "score run query"]:
    """The scores of each intervention, then of the unedited run, then of unedited runs of other prompts, each against the unedited one.

    Those of the next token share their runs, and each score of an answer has its own.
    """
    of_next = [score for score in scores if not isinstance(score, AnswerScore)]
    found: dict[int, Tensor] = {}
    if of_next:
        base = kept.logits
        runs = chain(_lanes(model, kept, interventions, ran), [base], (_only(other.run(batch)).to(base.device) for other, batch in others))
        asked = [[_scored(score, run, base, model.tokenizer, len(kept)) for score in of_next] for run in runs]
        each = torch.stack([torch.stack(values) for values in asked], dim=1)
        found = {id(score): values for score, values in zip(of_next, each, strict=True)}
    for score in scores:
        if isinstance(score, AnswerScore):
            answer = score.answer(model, kept)
            givers = [(model, kept), *((other, other.prefill(batch)) for other, batch in others)]
            prompts, *beside = [(giver, prefill.answering(answer.tokens)) for giver, prefill in givers]
            base, *rest = [_only(giver.run(prefill, logits="answer")).to(kept.logits.device) for giver, prefill in (prompts, *beside)]
            runs = chain(_lanes(*prompts, interventions, ran), [base], rest)
            found[id(score)] = torch.stack([_scored(score, run, base, answer, len(kept)) for run in runs])
    values = torch.stack([found[id(score)] for score in scores]).double().cpu()
    _require_finite(values, scores, interventions, kept.batch)
    return values


def _scored(score: AnyScore, run: Tensor, base: Tensor, beside: Any, queries: int) -> Float[Tensor, "query"]:
    with at_work("the score", score):
        values = score(run.clone(), base.clone(), beside)
    return _checked(score, values, queries)


def _checked(score: AnyScore, values: Any, queries: int) -> Float[Tensor, "query"]:
    """What a score gave, as floating-point numbers.

    Raises:
        InterventionError: Other than one number per query.
    """
    if not isinstance(values, Tensor) or values.shape != (queries,) or values.is_complex():
        made = f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type_of(values)
        raise InterventionError(
            f"{made} from the score {score.name!r}",
            f"a tensor of one number per query, of shape ({queries},)",
            "score each row of the logits",
        )
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _require_finite(
    values: Float[Tensor, "score run query"], scores: Sequence[AnyScore], interventions: Sequence[Intervention], batch: Batch
) -> None:
    """Refuse scores that are nan or infinite.

    Raises:
        NumericsError: Score, query and intervention are named.
    """
    if values.isfinite().all():
        return
    score, run, query = (~values.isfinite()).nonzero()[0].tolist()
    under = repr(interventions[run]) if run < len(interventions) else "a run without an intervention"
    raise NumericsError(
        f"{values[score, run, query].item()} as the score {scores[score].name!r} of query {batch.queries[query].id!r} under {under}",
        "a finite number for each query",
        "leave this query or score out, or mend the score",
    )


def _lanes(model: HookedModel, kept: Prefill, interventions: Sequence[Intervention], ran: set[str]) -> Iterator[Float[Tensor, "query ..."]]:
    """Logits of each intervention, as many at once as fit; what ran is noted in `ran`."""
    for part in model.together(kept, interventions):
        run = model.run(kept, part, logits="answer" if kept.batch.answered else "last")
        assert run.logits is not None
        ran.add(f"{run.layout}: {run.why}" if run.why else run.layout)
        yield from run.logits


def _only(run: Run) -> Float[Tensor, "query ..."]:
    """The logits of a run of one intervention."""
    assert run.logits is not None
    return run.logits[0]


def _columns(cells: Sequence[Cell], queries: Sequence[Any], scores: Sequence[AnyScore], values: np.ndarray) -> dict[str, np.ndarray]:
    """Tidy columns of `values` (score, cell + baseline, query)."""
    n_scores, n_cells, n = len(scores), len(cells), len(queries)
    per_cell = {
        "intervention": [cell.intervention for cell in cells],
        "arm": [cell.arm for cell in cells],
        "layers": [cell.where for cell in cells],
        "layer": [cell.layers[0] for cell in cells],
        "strength": [cell.strength for cell in cells],
    }
    columns = {name: np.tile(np.repeat(np.array(column), n), n_scores) for name, column in per_cell.items()}
    columns["query"] = np.tile(np.array([query.id for query in queries]), n_scores * n_cells)
    columns["label"] = np.tile(np.array([query.label or "" for query in queries]), n_scores * n_cells)
    columns["cluster"] = np.tile(np.array([query.stands_with for query in queries]), n_scores * n_cells)
    columns["score"] = np.repeat(np.array([score.name for score in scores]), n_cells * n)
    columns["value"] = values[:, :-1].ravel()
    columns["base"] = np.repeat(values[:, -1:], n_cells, axis=1).ravel()
    return columns
