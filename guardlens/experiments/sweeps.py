"""`sweep`: interventions at every layer and strength, scored for every query, with placebos of equal norm beside them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from guardlens.data.presentations import Presentation
from guardlens.data.queries import Query, require_ids
from guardlens.errors import (
    ArgumentError,
    InterventionError,
    MismatchError,
    NumericsError,
    as_count,
    as_number,
    is_several,
    one_of,
    quoted,
    require_type,
    warn,
)
from guardlens.experiments.scores import kl, refusal_logodds
from guardlens.experiments.scoring import AnyScore, Scorer, require_scores
from guardlens.experiments.tidy import crossed, per_query
from guardlens.hooks import Layers, as_layers
from guardlens.interventions.intervention import Intervention, require_intervention
from guardlens.models.hooked_model import HookedModel, Queries
from guardlens.models.loaded_model import require_model
from guardlens.models.prompt_cache import PromptCache, queries_and_presentation
from guardlens.results.intervals import percentile, resample_counts
from guardlens.results.tables import Frame, Table, cached_frame

EDIT = "edit"
"""The variant of a cell that is the intervention itself; the others are placebos."""

CELL = ["score", "intervention", "variant", "layers", "strength"]
"""The columns that tell the cells of a sweep apart."""


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: an intervention, as itself or as a placebo, at some layers and a strength."""

    intervention: str
    variant: str
    layers: tuple[int, ...]
    strength: float


class Sweep(Table):
    """Scores per intervention, variant (`"edit"`, `"placebo 0"`, ...), layers, strength and query; `base` is the unedited run's score.

    Columns: intervention, variant, layers, layer (the first of them), strength, query, label, cluster, score, value, base.

    Examples:
        >>> effect = gl.sweep(model, guard, queries, grey, layers=[5, 7, (6, 7)])
        >>> effect.summary()["layers"].unique().tolist()
        ['5', '7', '6+7']
        >>> panels = effect.plot("kl")
    """

    kind: ClassVar[str] = "sweep"

    @cached_frame
    def summary(self) -> Frame:
        """Mean change of each cell for each label, with a 95 % interval. The draws of a placebo are taken together.

        The bootstrap resamples clusters of queries (a pair; or the query itself, if it has no cluster), the same ones in every cell.

        Raises:
            MismatchError: The table is empty, or a cell lacks a query or has one twice.
        """
        import pandas as pd

        if not len(self):
            raise MismatchError("a sweep without rows", "at least one row", "select rows that exist, as in .where(score='kl')")
        self._require_whole()
        frame = self.frame
        frame = frame.assign(variant=frame["variant"].str.split().str[0], change=frame["value"] - frame["base"])
        queries = {label: part.drop_duplicates("query") for label, part in frame.groupby("label", sort=False)}
        resamples = {label: resample_counts(len(part), part["cluster"].to_numpy()) for label, part in queries.items()}
        keys = ["score", "intervention", "variant", "layers", "layer", "strength", "label"]
        rows = []
        for key, part in frame.groupby(keys, sort=False):
            label = key[-1]
            changes = part.groupby("query")["change"].mean()[queries[label]["query"]].to_numpy()
            counts = resamples[label]
            change = percentile(changes.mean(), counts @ changes / counts.sum(axis=1), len(changes))
            rows.append({**dict(zip(keys, key, strict=True)), **change.columns("change"), "n": change.n})
        return pd.DataFrame(rows)

    def _require_whole(self) -> None:
        """Refuse cells that lack a query of their label or have one twice: differences between cells would not be the cells' effect."""
        frame = self.frame
        numbers = frame.groupby("label")["query"].nunique()
        cells = frame.groupby([*CELL, "label"])["query"].agg(["size", "nunique"])
        wanted = numbers[cells.index.get_level_values("label")].to_numpy()
        is_odd = (cells["size"] != wanted) | (cells["nunique"] != wanted)
        if is_odd.any():
            cell = is_odd.idxmax()
            raise MismatchError(
                f"{cells['size'][cell]} rows of {cells['nunique'][cell]} queries in the cell {', '.join(map(str, cell))}",
                f"one for each of its {numbers[cell[-1]]} queries",
                "filter all cells alike, as with .where(score='kl')",
            )

    def best(self, k: int = 1, intervention: str | None = None) -> tuple[int, ...]:
        """The k single layers at which an intervention raises the refusal of harmful queries most and that of harmless ones least.

        A layer's merit is the mean change of the refusal log-odds over harmful queries, minus that over harmless queries if it is a rise,
        averaged over the strengths. Ties go to the later layer.

        Args:
            k: The number of layers.
            intervention: The intervention's name; needed if the sweep holds several.

        Raises:
            ArgumentError: `k` is no count, there is no such intervention, or there are several and none is named.
            MismatchError: The sweep has no refusal log-odds, no labels or fewer single layers; or a cell lacks a query or has one twice.
            NumericsError: A layer's log-odds are nan.
        """
        k = as_count(k, "k", ArgumentError, "ask for one layer or more, as in best(2)")
        self._require_whole()
        frame = self._refusal_of_single_layers(intervention)
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

    def _refusal_of_single_layers(self, intervention: str | None) -> Frame:
        """The rows of one intervention's own edits at single layers, with the refusal log-odds."""
        known = sorted(map(str, set(self.columns["intervention"])))
        if intervention is None and len(known) > 1:
            raise ArgumentError("several interventions", f"one of {known}", "name it, as in best(k, intervention=...)")
        if intervention is not None and not one_of(intervention, known):
            raise ArgumentError(f"the intervention {quoted(intervention)}", f"one of {known}", "name it, as in best(k, intervention=...)")
        frame = self.frame
        if intervention is not None:
            frame = frame[frame["intervention"] == intervention]
        is_single = ~frame["layers"].str.contains("+", regex=False)
        return frame[(frame["variant"] == EDIT) & (frame["score"] == refusal_logodds.name) & is_single]

    def plot(self, score: str | None = None, ax: Any = None) -> Any:
        """Heat maps of the mean change, layer x strength, one per intervention, variant and label.

        Args:
            score: The score's name; by default the first score.
            ax: The axes to draw on, one per map; by default a new figure.

        Raises:
            ArgumentError: There is no such score.
            MismatchError: The table is empty.
        """
        from guardlens.results import plots

        summary = self.summary()
        known = list(dict.fromkeys(summary["score"]))
        score = str(known[0]) if score is None else score
        if not one_of(score, known):
            raise ArgumentError(f"the score {quoted(score)}", f"one of {known}", "name a score that was swept")
        summary = summary[summary["score"] == score]
        if summary["intervention"].nunique() > 1:
            titles = summary["intervention"] + ", " + summary["variant"]
        else:
            titles = summary["variant"].replace(EDIT, str(summary["intervention"].iloc[0]))
        unit = self.facts.get("units", {}).get(score, score)
        frame = summary.assign(intervention=titles, value=summary["change"]).drop(columns=["variant"])
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
) -> Sweep:
    """Score interventions at every layer and strength.

    Only steps with free layers are moved and scaled. An intervention's other steps stay as they are in every cell.

    Interventions on the ends of the prompts run beside each other as branches, others as forks or as copies of the batch;
    `facts["layout"]` says what ran, and why not as branches. Batches are as large as free memory allows; to choose their size, compute a
    prompt cache first, as in `gl.sweep(model, guard, gl.keep(model, queries, grey, batch_size=8))`.

    Args:
        model: The model.
        interventions: One intervention, or several by name (other gains, ranks, directions).
        queries: The queries, whose labels the table keeps. Or a prompt cache (`gl.keep`): another sweep over it costs one token per cell.
        presentation: How to show the queries; by default as text alone, and as in the prompt cache.
        scores: What to measure: at the prompt's last token, or along an answer (`AnswerLogProb`, `AnswerKL`).
        strengths: 1 is the edit itself. 0 is always "untouched", and is left out, since it is the baseline.
        layers: Layers, or groups of layers that are edited together; None for every single layer.
        placebos: The number of placebos of equal norm beside each cell (`Intervention.placebo`); 0 for none.

    Raises:
        ArgumentError: Scores, strengths or `placebos` are not what they should be, no cell is left, or a score gives something else than
            one number per query.
        InterventionError: An intervention has no free layer, or is none.
        SiteError: Layers are not layers, or not the model's.
        NumericsError: A score is nan or infinite; intervention and query are named.
        QueryError: There are no queries, or two have one id.

    Warns:
        UserWarning: An intervention changes no score in any cell, so that there is nothing to choose from.

    Examples:
        >>> effect = gl.sweep(model, guard, queries, grey, strengths=[0.5, 1.0])
        >>> effect.best(2)
        (6, 7)
        >>> effect.facts["layout"]  # the prompts ran once, and each cell as a branch of their last token
        ['branch']
    """
    require_model(model)
    items, presentation = queries_and_presentation(queries, presentation)
    require_ids(items)
    require_scores(scores)
    named = _named(interventions)
    groups = _groups(range(model.cfg.n_layers) if layers is None else layers)
    strengths = [as_number(each, "strength", ArgumentError, "say strengths=[0.5, 1.0]") for each in _as_list(strengths)]
    placebos = as_count(placebos, "placebos", ArgumentError, "say placebos=0 for none", least=0)
    grid = _grid(named, groups, strengths, placebos)
    if not grid:
        found = f"{len(named)} interventions, {len(groups)} layers and the strengths {strengths}"
        raise ArgumentError(found, "at least one cell; strength 0 is none", "give one intervention, layer and strength at least")
    scorer = Scorer(model, list(grid.values()), scores)
    prompts = queries if isinstance(queries, PromptCache) else items
    values = scorer.over(prompts, presentation, f"sweep, {len(grid)} cells, {presentation.name}").numpy()
    _warn_of_no_change(list(grid), values)
    facts = {
        "interventions": {name: repr(intervention) for name, intervention in named.items()},
        "presentation": presentation.name,
        "placebos": placebos,
        "layout": sorted(scorer.layouts),
        "units": scorer.units,
    }
    return Sweep(_columns(list(grid), items, scores, values), facts, model.provenance)


def _warn_of_no_change(cells: Sequence[Cell], values: Float[np.ndarray, "score run query"]) -> None:
    """Warn if no cell of an intervention scores differently from the unedited run, which is the last."""
    for name in dict.fromkeys(cell.intervention for cell in cells):
        edited = [place for place, cell in enumerate(cells) if cell.intervention == name and cell.variant == EDIT]
        if np.allclose(values[:, edited], values[:, -1:], rtol=1e-4, atol=1e-4):
            warn(
                f"the intervention {name!r} changes no score in any cell: its gate is closed for all queries, it edits later tokens than "
                "are scored, or it puts in what is there already, as the text twin is where no image is shown"
            )


def _named(interventions: Any) -> dict[str, Intervention]:
    """The interventions by name, each with a step that the sweep can move. A single intervention is called "edit".

    Raises:
        InterventionError: A name is no text, an intervention is none, or it has no free layer.
    """
    named = dict(interventions) if isinstance(interventions, Mapping) else {EDIT: interventions}
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


def _as_list(given: Any) -> list[Any]:
    """One value or several as a list. An array without an axis is one value."""
    return list(given) if is_several(given) else [given]


def _groups(layers: Any) -> list[tuple[int, ...]]:
    """Layers, or groups of layers that are edited together, each once.

    Raises:
        SiteError: A group is not made of layers.
    """
    groups = [as_layers(group if isinstance(group, Iterable) else [group]) for group in _as_list(layers)]
    return list(dict.fromkeys(group for group in groups if group is not None))


def _grid(
    interventions: Mapping[str, Intervention], groups: Sequence[tuple[int, ...]], strengths: Sequence[float], placebos: int
) -> dict[Cell, Intervention]:
    """Every cell with what runs there."""
    variants = {
        (name, variant): varied
        for name, intervention in interventions.items()
        for variant, varied in {EDIT: intervention, **{f"placebo {seed}": intervention.placebo(seed) for seed in range(placebos)}}.items()
    }
    return {
        Cell(name, variant, group, float(strength)): varied.placed(group, strength)
        for (name, variant), varied in variants.items()
        for group in groups
        for strength in strengths
        if strength != 0
    }


def _columns(
    cells: Sequence[Cell], queries: Sequence[Query], scores: Sequence[AnyScore], values: Float[np.ndarray, "score run query"]
) -> dict[str, np.ndarray]:
    """Tidy columns of the scores of all cells, which the unedited run's follow."""
    per_cell = {
        "intervention": [cell.intervention for cell in cells],
        "variant": [cell.variant for cell in cells],
        "layers": ["+".join(map(str, cell.layers)) for cell in cells],
        "layer": [cell.layers[0] for cell in cells],
        "strength": [cell.strength for cell in cells],
    }
    columns = crossed({"score": [score.name for score in scores]}, per_cell, per_query(queries))
    columns["score"] = columns.pop("score")  # in its place behind the cell and the query
    edited = values[:, :-1]
    base = values[:, -1:]
    return columns | {"value": edited.ravel(), "base": np.broadcast_to(base, edited.shape).ravel()}
