"""`activation_patching`: states of another run put into this one, layer by layer or head by head, to see what carries the difference.

The *donor* is a second presentation of the same queries. A patch takes one state from the donor's run, at the prompt's last token. If that
alone brings back what the donor's run does, the difference between both runs passes through that state.

Source: activation patching as in Meng et al. 2022 (arXiv 2202.05262) and Zhang & Nanda 2024 (arXiv 2309.16042).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from guardlens import interventions as iv
from guardlens.data.presentations import Presentation, text_only
from guardlens.data.presentations.protocol import require_presentation
from guardlens.data.queries import Query, require_ids
from guardlens.errors import ArgumentError, InterventionError, MismatchError, NumericsError, is_several, one_of, quoted, require_type, warn
from guardlens.experiments.scores import refusal_logodds
from guardlens.experiments.scoring import AnyScore, Scorer, require_scores
from guardlens.experiments.tidy import crossed, per_query
from guardlens.hooks import HOOKS, Point, as_layers, parse
from guardlens.interventions.intervention import Intervention
from guardlens.models.checks import warn_of_other_residual_terms
from guardlens.models.hooked_model import HookedModel, Queries
from guardlens.models.loaded_model import require_model
from guardlens.models.prompt_cache import PromptCache, queries_and_presentation
from guardlens.results.intervals import per_gap, percentile, resample_counts
from guardlens.results.tables import Frame, Table, cached_frame

WHOLE = -1
"""In the column `head`: the whole state is patched, not one head of it."""

MEASURED = ["base", "donor", "value"]
"""The columns of scores: without a patch, in the donor's run, with the patch."""


@dataclass(frozen=True)
class Cell:
    """One thing that is patched: the state at a hook of a layer, or one of its heads."""

    hook: str
    layer: int
    head: int = WHOLE
    heads: int = 1

    def intervention(self, donor: Presentation) -> Intervention:
        """The intervention that patches it at the prompt's last token."""
        part = None if self.head == WHOLE else (self.head, self.heads)
        return iv.swap(iv.State(presentation=donor, hook=self.hook), part).at(layers=self.layer)


class Patching(Table):
    """Scores of each query with one state patched; `base` is the score without a patch, `donor` that of the donor's own run.

    Columns: hook, layer, head (-1 if the whole state is patched), query, label, cluster, score, value, base, donor.

    Examples:
        >>> patched = gl.activation_patching(model, queries, grey, hooks="z", layers=[5])
        >>> patched.summary()["head"].unique().tolist()
        [0, 1, 2, 3]
        >>> panels = patched.plot("change")
    """

    kind: ClassVar[str] = "patching"

    @cached_frame
    def summary(self) -> Frame:
        """Means of each cell for each label, with 95 % bootstrap intervals over queries. Queries of a cluster or pair are drawn together.

        `change` is value - base, and `recovered` is (value - base) / (donor - base), a ratio of means. It is 1 if the patch alone does all
        that the donor's run does, and nan if the interval of donor - base reaches 0: then nothing was lost that could be recovered.

        Raises:
            NumericsError: The table is empty.
            MismatchError: A cell lacks a query or has one twice.
        """
        import pandas as pd

        if not len(self):
            raise NumericsError("a table without rows", "at least one row", "check the filter that made it")
        rows = []
        for (score, label), part in self.frame.groupby(["score", "label"], sort=False):
            queries = part.drop_duplicates("query")
            counts = resample_counts(len(queries), queries["cluster"].to_numpy())
            for (hook, layer, head), cell in part.groupby(["hook", "layer", "head"], sort=False):
                if sorted(cell["query"]) != sorted(queries["query"]):
                    found = f"{len(cell)} rows at {hook} of layer {layer} for {len(queries)} queries"
                    raise MismatchError(found, "one for each query", "filter all cells alike")
                place = {"score": score, "hook": hook, "layer": layer, "head": head, "label": label}
                rows.append(place | _recovery(cell.set_index("query").loc[queries["query"]], counts))
        return pd.DataFrame(rows)

    def plot(self, value: str = "recovered", score: str | None = None, ax: Any = None) -> Any:
        """A line over the layers for each hook, one panel per label. If heads were patched, heat maps of heads and layers.

        Args:
            value: `"recovered"`, or `"change"` in the score's unit.
            score: The score's name; by default the first score.
            ax: The axes to draw on, one per label (for heads, hook by hook); by default a new figure.

        Raises:
            ArgumentError: There is no such value or score.
            NumericsError: The table is empty.
        """
        from guardlens.results import plots
        from guardlens.results.plots import components as component_plots

        rows = self.summary()
        scores = list(dict.fromkeys(rows["score"]))
        score = str(scores[0]) if score is None else score
        _require_one_of("value", value, ["recovered", "change"])
        _require_one_of("score", score, scores)
        rows = rows[rows["score"] == score]
        unit = self.facts.get("units", {}).get(score, score)
        if value == "recovered":
            title = f"{unit.partition(' (')[0].replace('_', ' ')} recovered"
            rows = rows.assign(value=rows["recovered"], low=rows["recovered_low"], high=rows["recovered_high"])
        else:
            title = f"Δ {unit}"
            rows = rows.assign(value=rows["change"])
        heads = rows[rows["head"] != WHOLE]
        if len(heads):
            frame = heads.assign(panel=heads["hook"] + " · " + heads["label"], block=heads["layer"])
            return component_plots.head_maps(frame, unit=title, axes=ax)
        frame = rows.assign(metric=rows["label"], run=rows["hook"])
        return plots.layer_curves(frame, axes=ax, titles={label: f"{label}: {title}" if label else title for label in set(rows["label"])})

    def __repr__(self) -> str:
        cells = set(zip(self.columns["hook"], self.columns["layer"], self.columns["head"], strict=True))
        return f"Patching({', '.join(sorted(set(self.columns['hook'])))}: {len(cells)} cells, {len(self)} rows)"


def _require_one_of(what: str, given: Any, known: Sequence[str]) -> None:
    if not one_of(given, known):
        raise ArgumentError(f"the {what} {quoted(given)}", f"one of {', '.join(map(repr, known))}")


def activation_patching(
    model: HookedModel,
    queries: Queries | PromptCache,
    presentation: Presentation | None = None,
    *,
    donor: Presentation = text_only,
    hooks: str | Sequence[str] = "resid_post",
    layers: Sequence[int] | None = None,
    scores: Sequence[AnyScore] = (refusal_logodds,),
) -> Patching:
    """Run the queries with one state at a time taken from another run of them, at the prompt's last token.

    As many cells as fit run beside each other, and batches are as large as free memory allows, as in `gl.sweep`.

    Args:
        model: The model.
        queries: The queries, whose labels the table keeps. Or a prompt cache (`gl.keep`).
        presentation: How to show the queries in the run that is patched; by default as text alone, and as in the prompt cache.
        donor: How to show them in the run that the states come from. `text_only` is the text twin: the same prompt without its images, as
            `model.llm` sees it. With `presentation` itself every patch changes nothing, which is the placebo of this experiment.
        hooks: What to patch: `"resid_post"` (all that the last token knows by then), `"attn_out"`, `"mlp_out"`, or `"z"`, head by head.
        layers: The layers; None for all layers that have the hook.
        scores: What to measure: at the prompt's last token, or along an answer.

    Raises:
        QueryError: There are no queries, or two have one id.
        SiteError: There is no such hook, or a layer does not have it.
        ArgumentError: `scores` is not a list of scores, or a score gives something else than one number per query.
        InterventionError: There are no hooks, or one that can't be patched layer by layer.
        ModelError: The model is not a `HookedModel`.
        PresentationError: A presentation is none.
        NumericsError: A score is nan or infinite; query and patch are named.

    Warns:
        UserWarning: The donor's run gives what the patched run gives by itself, so that no patch changes anything. Or attention and MLP are
            patched in blocks that are known to add something else, too.

    Examples:
        >>> patched = gl.activation_patching(model, queries, grey, hooks=["resid_post", "attn_out"])
        >>> harmful = patched.summary().query("label == 'harmful' and hook == 'resid_post'")
        >>> [round(share) for share in harmful["recovered"]]  # by layer: how much of the lost refusal the text's state brings back
        [0, 0, 0, 0, 0, 1, 1, 1]
    """
    require_model(model)
    items, presentation = queries_and_presentation(queries, presentation)
    require_presentation(donor)
    require_ids(items)
    require_scores(scores)
    names = _hooks(hooks)
    if not set(names) <= {"resid_pre", "resid_post"}:
        warn_of_other_residual_terms(model)
    cells = list(dict.fromkeys(cell for name in names for cell in _cells(model, name, layers)))
    scorer = Scorer(model, [cell.intervention(donor) for cell in cells], scores, donor)
    prompts = queries if isinstance(queries, PromptCache) else items
    values = scorer.over(prompts, presentation, f"activation patching, {len(cells)} cells, {presentation.name}").numpy()
    if donor != presentation and np.allclose(values[:, -1], values[:, -2], rtol=1e-4, atol=1e-4):
        warn(f"the donor {donor.name!r} gives what {presentation.name!r} gives: no patch can change anything, and 'recovered' is nan")
    facts = {
        "presentation": presentation.name,
        "donor": donor.name,
        "layout": sorted(scorer.layouts),
        "donor_model": (model.llm if donor == text_only else model).id,
        "units": scorer.units,
    }
    return Patching(_columns(cells, items, scores, values), facts, model.provenance)


def _hooks(given: Any) -> list[str]:
    """The short names of the hooks, each once, in their order."""
    names = list(given) if is_several(given) else [given]
    for name in names:
        require_type(name, str, InterventionError, "name hooks, as in hooks=['resid_post', 'z']")
    if not names:
        raise InterventionError("no hooks", "at least one", "leave hooks out for resid_post")
    return list(dict.fromkeys(parse(name).hook for name in names))


def _cells(model: HookedModel, name: str, layers: Any) -> list[Cell]:
    """What is patched at a hook: each layer's whole state, or each of its heads."""
    hook = HOOKS[name]
    if not (hook.layered and hook.writable and hook.width):
        raise InterventionError(
            f"patching at {name!r}", "a hook of the blocks that can be written", "choose resid_post, attn_out, mlp_out or z"
        )
    with_hook = [point.layer for point in model.cfg.computed(beside_image=False) if point.hook == name and point.layer is not None]
    cells = []
    for layer in as_layers(layers) or with_hook:
        heads = model.cfg.locate(Point(name, layer)).heads
        cells += [Cell(name, layer)] if heads is None else [Cell(name, layer, head, heads) for head in range(heads)]
    return cells


def _columns(
    cells: Sequence[Cell], queries: Sequence[Query], scores: Sequence[AnyScore], values: Float[np.ndarray, "score run query"]
) -> dict[str, np.ndarray]:
    """Tidy columns of the scores of all cells, which those of the unpatched run and of the donor's run follow."""
    per_cell = {
        "hook": [cell.hook for cell in cells],
        "layer": [cell.layer for cell in cells],
        "head": [cell.head for cell in cells],
    }
    columns = crossed({"score": [score.name for score in scores]}, per_cell, per_query(queries))
    columns["score"] = columns.pop("score")  # in its place behind the cell and the query
    patched = values[:, :-2]
    base = values[:, -2:-1]
    donor = values[:, -1:]
    columns["value"] = patched.ravel()
    columns["base"] = np.broadcast_to(base, patched.shape).ravel()
    columns["donor"] = np.broadcast_to(donor, patched.shape).ravel()
    return columns


def _recovery(cell: Frame, counts: np.ndarray) -> dict[str, float]:
    """The means of one cell, their change, and the share of the gap that it recovers."""
    n = len(cell)
    base, donor, value = (float(mean) for mean in cell[MEASURED].mean())
    drawn = counts @ cell[MEASURED].to_numpy(float) / counts.sum(axis=1, keepdims=True)
    changes = drawn[:, 2] - drawn[:, 0]
    gaps = drawn[:, 1] - drawn[:, 0]
    change = percentile(value - base, changes, n)
    recovered = per_gap(change.value, changes, donor - base, gaps, n)
    return {
        "base": base,
        "donor": donor,
        "value": value,
        **change.columns("change"),
        **recovered.columns("recovered", prefix="recovered_"),
        "n": n,
    }
