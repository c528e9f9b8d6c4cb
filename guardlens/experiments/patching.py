"""`activation_patching`: states of another run put into this one, layer by layer or head by head: where does what differs pass through?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from guardlens import interventions as iv
from guardlens.data.presentations import Presentation, text_only
from guardlens.data.presentations.protocol import require_presentation
from guardlens.data.queries import Query
from guardlens.errors import InterventionError, MismatchError, NumericsError, is_several, one_of, quoted, require_type, warn
from guardlens.experiments.scores import refusal_logodds
from guardlens.experiments.sweeps import AnyScore, require_told_apart, scored
from guardlens.hooks import HOOKS, Point, as_layers, parse
from guardlens.interventions.intervention import Intervention
from guardlens.models.batching import in_query_order
from guardlens.models.checks import warn_of_other_residual_terms
from guardlens.models.engine.kv_cache import Prefill
from guardlens.models.hooked_model import HookedModel, Queries, require_model
from guardlens.models.prompt_cache import PromptCache, over_prefills, queries_and_presentation
from guardlens.results.intervals import per_gap, percentile, resample_counts
from guardlens.results.progress import track
from guardlens.results.tables import Frame, Table

WHOLE = -1
"""In the column `head`: not one head, but all that the hook has."""

UNLABELLED = ""


@dataclass(frozen=True)
class Cell:
    """One thing that is patched: a hook at a layer, or one of its heads."""

    hook: str
    layer: int
    head: int = WHOLE
    heads: int = 1

    def intervention(self, source: Presentation) -> Intervention:
        """What patches it at the prompt's last token."""
        part = None if self.head == WHOLE else (self.head, self.heads)
        return iv.swap(iv.State(presentation=source, hook=self.hook), part).at(layers=self.layer)


class Patching(Table):
    """Scores of each query with one state of the source's run put in; `base` without that, `source` in the source's run itself.

    Columns: hook, layer, head (-1 where the whole state is patched), query, label, cluster, score, value, base, source.

    Examples:
        >>> patched = gl.activation_patching(model, queries, grey, hooks="z", layers=[5])
        >>> patched.summary()["head"].unique().tolist()
        [0, 1, 2, 3]
        >>> panels = patched.plot("change")
    """

    kind: ClassVar[str] = "patching"

    def summary(self) -> Frame:
        """Means of each cell for each label, with 95 % bootstrap intervals over queries; those of a cluster or pair go together.

        `change` is value - base, and `recovered` = (value - base) / (source - base), a ratio of means: 1 where the patch alone does all
        that the source's run does, undefined (nan) where the interval of source - base reaches 0: nothing was lost that could be recovered.
        """
        return self._summary.copy()

    @cached_property
    def _summary(self) -> Frame:
        import pandas as pd

        if not len(self):
            raise NumericsError("a table without rows", "at least one", "check the filter that made it")
        rows = []
        for (score, label), part in self.frame.groupby(["score", "label"], sort=False):
            queries = part.drop_duplicates("query")
            counts = resample_counts(len(queries), queries["cluster"].to_numpy())
            for (hook, layer, head), cell in part.groupby(["hook", "layer", "head"], sort=False):
                where = {"score": score, "hook": hook, "layer": layer, "head": head, "label": label}
                if sorted(cell["query"]) != sorted(queries["query"]):
                    found = f"{len(cell)} rows at {hook} of layer {layer} for {len(queries)} queries"
                    raise MismatchError(found, "one for each", "filter all cells alike")
                rows.append(where | _recovery(cell.set_index("query").loc[queries["query"]], counts))
        return pd.DataFrame(rows)

    def plot(self, value: str = "recovered", score: str | None = None, ax: Any = None) -> Any:
        """A line over the layers for each hook, one panel per label; where heads were patched, heat maps of heads and layers.

        Args:
            value: `"recovered"`, or `"change"` in the score's unit.
            score: Its name; the first one without it.
            ax: Where to draw, one axes per label (of heads: hook by hook); a new figure without it.

        Raises:
            MismatchError: There is no such value or score.
            NumericsError: The table is empty.
        """
        from guardlens.results import plots
        from guardlens.results.plots import components as component_plots

        rows = self.summary()
        score = str(rows["score"].iloc[0]) if score is None else score
        for what, given, known in (("value", value, ("recovered", "change")), ("score", score, tuple(dict.fromkeys(rows["score"])))):
            if not one_of(given, known):
                raise MismatchError(f"the {what} {quoted(given)}", f"one of {', '.join(map(repr, known))}", "choose what this table has")
        rows = rows[rows["score"] == score]
        unit = self.facts.get("units", {}).get(score, score)
        shown = f"{unit.partition(' (')[0].replace('_', ' ')} recovered" if value == "recovered" else f"Δ {unit}"
        low, high = ("recovered_low", "recovered_high") if value == "recovered" else ("low", "high")
        rows = rows.assign(value=rows[value], low=rows[low], high=rows[high])
        if (heads := rows[rows["head"] != WHOLE]).size:
            frame = heads.assign(panel=heads["hook"] + " · " + heads["label"], block=heads["layer"])
            return component_plots.head_maps(frame, unit=shown, axes=ax)
        frame = rows.assign(metric=rows["label"], run=rows["hook"])
        return plots.layer_curves(frame, axes=ax, titles={label: f"{label}: {shown}".removeprefix(": ") for label in set(rows["label"])})

    def __repr__(self) -> str:
        cells = set(zip(*(self.columns[name] for name in ("hook", "layer", "head")), strict=True))
        return f"Patching({', '.join(sorted(set(self.columns['hook'])))}: {len(cells)} cells, {len(self)} rows)"


def activation_patching(
    model: HookedModel,
    queries: Queries | PromptCache,
    presentation: Presentation | None = None,
    *,
    source: Presentation = text_only,
    hooks: str | Sequence[str] = "resid_post",
    layers: Sequence[int] | None = None,
    scores: Sequence[AnyScore] = (refusal_logodds,),
    batch_size: int | None = None,
) -> Patching:
    """Run the queries with one state at a time taken from another run of them, at the prompt's last token.

    Args:
        model: The model.
        queries: What to ask; labels are kept. Or prompts that `keep` has computed.
        presentation: How it is shown in the run that is patched; without it as text alone, and kept prompts as they are kept.
        source: How it is shown in the run that the states come from. `text_only` is the text twin: the same prompt without its images,
            as `model.llm` sees it. With `presentation` itself every patch changes nothing, which is the placebo of this experiment.
        hooks: What to patch: `"resid_post"` (all that the last token knows by then), `"attn_out"`, `"mlp_out"`, or `"z"`, head by head.
        layers: Which layers; None for all that have the hook.
        scores: What to measure: at the prompt's last token, or along an answer.
        batch_size: Queries per forward, chosen from free memory without it; as many cells as fit ride along, as in `gl.sweep`.

    Raises:
        QueryError: No queries, or two of one id.
        SiteError: Unknown hook, or a layer without it.
        InterventionError: No hooks, a hook that can't be patched layer by layer, or something else than scores.
        ModelError, PresentationError: Something else in the place of the model or of a presentation.

    Warns:
        UserWarning: A source that gives what the run gives by itself, so that no patch changes anything; or blocks that are known to add
            something else than their attention and MLP, where these are patched.

    Source: activation patching as in Meng et al. 2022 (arXiv 2202.05262) and Zhang & Nanda 2024 (arXiv 2309.16042).

    Examples:
        >>> patched = gl.activation_patching(model, queries, grey, hooks=["resid_post", "attn_out"])
        >>> harmful = patched.summary().query("label == 'harmful' and hook == 'resid_post'")
        >>> [round(share) for share in harmful["recovered"]]  # by layer: how much of the lost refusal the text's state brings back
        [0, 0, 0, 0, 0, 1, 1, 1]
    """
    require_model(model)
    items, presentation = queries_and_presentation(queries, presentation)
    require_presentation(source)
    require_told_apart(items, scores)
    names = _hooks(hooks)
    if not set(names) <= {"resid_pre", "resid_post"}:
        warn_of_other_residual_terms(model)
    interventions = {cell: cell.intervention(source) for name in names for cell in _cells(model, name, layers)}
    ran: set[str] = set()
    title = f"activation patching, {len(interventions)} cells, {presentation.name}"
    prompts = queries if isinstance(queries, PromptCache) else items
    work = partial(_score_part, model, source, interventions, scores, ran)
    parts = over_prefills(model, prompts, presentation, work, batch_size)
    values = in_query_order(track(parts, len(items), title), len(items), axis=2).numpy()
    if source != presentation and np.allclose(values[:, -1], values[:, -2], rtol=1e-4, atol=1e-4):
        warn(
            f"the source {source.name!r} gives what {presentation.name!r} gives: no patch can change anything, and 'recovered' is nan",
        )
    facts = {
        "presentation": presentation.name,
        "source": source.name,
        "layout": sorted(ran),
        "source_model": (model.llm if source == text_only else model).id,
        "units": {score.name: score.unit for score in scores},
    }
    return Patching(_columns(list(interventions), items, scores, values), facts, model.provenance)


def _hooks(given: Any) -> list[str]:
    """The short names of the hooks, each once, in their order."""
    names = list(given) if is_several(given) else [given]
    for name in names:
        require_type(name, str, InterventionError, "name hooks, as in hooks=['resid_post', 'z']")
    if not names:
        raise InterventionError("no hooks", "at least one", "leave hooks out for resid_post")
    return list(dict.fromkeys(parse(name).hook for name in names))


def _cells(model: HookedModel, name: str, layers: Any) -> list[Cell]:
    hook = HOOKS[name]
    if not (hook.layered and hook.writable and hook.width):
        raise InterventionError(
            f"patching at {name!r}", "a hook of the blocks that can be written", "choose resid_post, attn_out, mlp_out or z"
        )
    anywhere = [point.layer for point in model.cfg.computed(beside_image=False) if point.hook == name]
    wanted = as_layers(layers) or [layer for layer in anywhere if layer is not None]
    heads = {layer: model.cfg.locate(Point(name, layer)).heads for layer in wanted}
    return [
        cell
        for layer, number in heads.items()
        for cell in ([Cell(name, layer)] if number is None else [Cell(name, layer, head, number) for head in range(number)])
    ]


def _score_part(
    model: HookedModel,
    source: Presentation,
    interventions: Mapping[Cell, Intervention],
    scores: Sequence[AnyScore],
    ran: set[str],
    kept: Prefill,
) -> Float[Tensor, "score run query"]:
    """Scores of all cells, then of the unpatched run, then of the source's."""
    return scored(model, kept, list(interventions.values()), scores, ran, [model.source(kept.batch, source)])


def _columns(cells: Sequence[Cell], queries: Sequence[Query], scores: Sequence[AnyScore], values: np.ndarray) -> dict[str, np.ndarray]:
    """Tidy columns of `values` (score, cell + base + source, query)."""
    n_scores, n_cells, n = len(scores), len(cells), len(queries)
    per_cell = {name: [getattr(cell, name) for cell in cells] for name in ("hook", "layer", "head")}
    per_query = {
        "query": [query.id for query in queries],
        "label": [query.label or UNLABELLED for query in queries],
        "cluster": [query.stands_with for query in queries],
    }
    columns = {name: np.tile(np.repeat(np.array(column), n), n_scores) for name, column in per_cell.items()}
    columns |= {name: np.tile(np.array(column), n_scores * n_cells) for name, column in per_query.items()}
    columns["score"] = np.repeat(np.array([score.name for score in scores]), n_cells * n)
    columns["value"] = values[:, :-2].ravel()
    columns["base"] = np.repeat(values[:, -2:-1], n_cells, axis=1).ravel()
    columns["source"] = np.repeat(values[:, -1:], n_cells, axis=1).ravel()
    return columns


def _recovery(cell: Frame, counts: np.ndarray) -> dict[str, float]:
    means = cell[["base", "source", "value"]].mean()
    drawn = counts @ cell[["base", "source", "value"]].to_numpy(float) / counts.sum(axis=1, keepdims=True)
    n, changes, gaps = len(cell), drawn[:, 2] - drawn[:, 0], drawn[:, 1] - drawn[:, 0]
    change = percentile(means["value"] - means["base"], changes, n)
    share = per_gap(change.value, changes, means["source"] - means["base"], gaps, n)
    return {
        **means,
        **{"change": change.value, "low": change.low, "high": change.high},
        **{"recovered": share.value, "recovered_low": share.low, "recovered_high": share.high, "n": n},
    }
