"""`attribute`: which parts of the model write a direction: a query's coordinate as a sum over embedding, heads and MLPs.

The residual stream is a sum, so its coordinate along a direction v is one too. With h_l the stream after block l at the last token,

    h_l . v  =  embed . v  +  sum over blocks b <= l of (heads of b + attn_rest + mlp + rest + between) . v

A head adds its z times its slice of the output projection W_O. Where a norm stands between W_O and the stream (Gemma 2 and later, OLMo 2,
GLM-4), it is taken with the scale that it has for this very state, which makes it linear; for an RMS norm the heads then still sum exactly.
What has no head (biases of W_O, a linear attention) is `attn_rest`; `rest` and `between` are as in `ActivationCache.decompose_resid`.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; the frozen norm is that of direct logit attribution.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float

from guardlens.data.presentations import Presentation, text_only
from guardlens.data.presentations.protocol import as_presentations
from guardlens.data.queries import LABELS, Query, as_queries, require_ids, require_labels
from guardlens.directions import Directions, warn_of_own_queries
from guardlens.errors import MismatchError, NumericsError, as_count, one_of, quoted, require_type
from guardlens.experiments.collection import LARGEST
from guardlens.experiments.residual_terms import Component, Terms, split
from guardlens.hooks import Site, as_layer
from guardlens.models.batching import BatchResult, in_query_order, over_batches
from guardlens.models.checks import warn_of_other_residual_terms
from guardlens.models.engine.batch import Batch
from guardlens.models.engine.kv_cache import Prefix
from guardlens.models.hooked_model import HookedModel, Queries, require_model
from guardlens.results.intervals import percentile, resample_counts
from guardlens.results.progress import track
from guardlens.results.provenance import require_same_model
from guardlens.results.tables import Frame, Table

KEYS = ["direction", *Component._fields]

CONTRAST = "harmful - harmless"


class Attribution(Table):
    """One row per presentation, query, direction and component: what the component adds to the query's coordinate. The rows sum to it.

    Columns: presentation, query, label, cluster, layer, direction (1 is the first), component, block, head, source, value; see `Component`.

    The first presentation is the LLM's. Components of the kinds `attn_rest`, `rest` and `between` that are nothing but rounding are left
    out.

    Examples:
        >>> parts = gl.attribute(model, ssd, queries, grey, layer=5)
        >>> whole = parts.frame.groupby(["presentation", "query"])["value"].sum()["text"]
        >>> states = gl.collect(model.llm, queries)
        >>> bool(np.allclose(whole[[query.id for query in queries]], ssd.coordinates(states)[:, 5, 0], atol=1e-3))
        True
    """

    kind: ClassVar[str] = "attribution"

    def summary(self) -> Frame:
        """Means over queries for each label, and harmful - harmless, with 95 % bootstrap intervals; `change` is against the LLM, paired.

        Queries of a cluster or pair are resampled together. A component that a run does not have counts as 0 there.
        """
        return self._summary.copy()

    @cached_property
    def _summary(self) -> Frame:
        import pandas as pd

        self._require_whole()
        wide = self.frame.pivot(index=["query", "label", "cluster"], columns=["presentation", *KEYS], values="value").fillna(0.0)
        labels, clusters = (wide.index.get_level_values(name).to_numpy() for name in ("label", "cluster"))
        counts = resample_counts(len(wide), clusters)
        components = list(dict.fromkeys(zip(*(self.columns[name] for name in KEYS), strict=True)))
        first, *others = dict.fromkeys(self.columns["presentation"])
        own = _means(wide[first].reindex(columns=components, fill_value=0.0).to_numpy(), labels, counts)
        rows = list(_summary_rows(first, components, own, None, labels))
        for name in others:
            means = _means(wide[name].reindex(columns=components, fill_value=0.0).to_numpy(), labels, counts)
            rows += _summary_rows(name, components, means, own, labels)
        return pd.DataFrame(rows)

    def _require_whole(self) -> None:
        """Each component of each presentation once for each query: one that a filter took away would count as 0."""
        if not len(self):
            raise NumericsError("a table without rows", "at least one", "check the filter that made it")
        number = len(set(self.columns["query"]))
        cells = self.frame.groupby(["presentation", *KEYS])["query"].agg(["size", "nunique"])
        if not (cells == number).all(axis=None):
            place = (cells != number).any(axis=1).idxmax()
            raise MismatchError(
                f"{cells['size'][place]} rows of {cells['nunique'][place]} queries for {place[2]} in {place[0]!r}",
                f"one for each of the {number} queries",
                "filter all presentations and components alike",
            )

    def top(self, k: int = 10, presentation: str | None = None, label: str = CONTRAST, direction: int = 1) -> Frame:
        """The k components that change most from the LLM to a presentation; of the LLM itself, those that write most.

        Args:
            k: How many.
            presentation: Its name; the first one beside the LLM's without it.
            label: Of which queries: `"harmful"`, `"harmless"`, or `"harmful - harmless"`: what tells them apart.
            direction: Which direction; 1 is the first.

        Raises:
            MismatchError: There are no such rows.
        """
        k = as_count(k, "k", MismatchError, "say how many", least=0)
        self._require_whole()
        llm, *others = dict.fromkeys(self.columns["presentation"])
        presentation = (others or [llm])[0] if presentation is None else presentation
        if not one_of(presentation, [llm, *others]):
            raise MismatchError(f"no rows of {quoted(presentation)}", f"one of {[llm, *others]}", "name a presentation of this table")
        rows = self._chosen(label, direction)
        rows = rows[rows["presentation"] == presentation]
        order = rows["value" if presentation == llm else "change"].abs().sort_values(ascending=False, kind="stable").index
        return rows.loc[order[:k]].drop(columns=["label", "direction"]).reset_index(drop=True)

    def plot(self, label: str = CONTRAST, direction: int = 1, source: str | None = None, ax: Any = None) -> Any:
        """What heads (a heat map) and all else (bars) write in each presentation, and what changes from the LLM to it.

        Args:
            label: Of which queries: `"harmful"`, `"harmless"`, or `"harmful - harmless"`.
            direction: Which direction; 1 is the first.
            source: Only what heads write from `"image"` or `"text"` tokens, where they were told apart.
            ax: Where to draw, two axes per presentation and two per change; a new figure without it.
        """
        import pandas as pd

        from guardlens.results.plots import components as component_plots
        from guardlens.results.plots.style import counted

        rows = self._chosen(label, direction)
        known = sorted({str(name) for name in rows.loc[rows["component"] == "head", "source"]})
        if source is not None and not one_of(source, known):
            raise MismatchError(f"the source {quoted(source)}", f"one of {known}", "attribute with by_source=True to tell them apart")
        if source is not None:
            rows = rows[(rows["component"] != "head") | (rows["source"] == source)]
        llm, shown = rows["presentation"].iloc[0], label.replace(" - ", " − ")
        written = f"{shown} ({counted(rows['n'])})\non $v_{{{direction}}}$ of layer {self.facts['layer']}"
        changes = rows[rows["presentation"] != llm]
        changes = changes.assign(
            **{"panel": changes["presentation"] + f" − {llm}", "unit": "change from the LLM"},
            **{name: changes[f"change_{name}" if name != "value" else "change"] for name in ("value", "low", "high")},
        )
        frame: Frame = pd.concat([rows.assign(panel=rows["presentation"], unit=written), changes])
        keys = ["panel", "unit", "component", "block", "head"]
        whole = {"value": "sum", "low": _of_one, "high": _of_one}
        return component_plots.component_maps(frame.groupby(keys, sort=False, as_index=False).agg(whole), axes=ax)

    def _chosen(self, label: str, direction: int) -> Frame:
        rows = self.summary()
        labels, numbers = list(dict.fromkeys(rows["label"])), sorted(set(rows["direction"]))
        direction = as_count(direction, "direction", MismatchError, "name one by its number; 1 is the first")
        if not one_of(label, labels) or direction not in numbers:
            found = f"the label {quoted(label)} and direction {direction}"
            raise MismatchError(found, f"one of {labels} and of {numbers}", "choose what this table has")
        return rows[(rows["label"] == label) & (rows["direction"] == direction)]

    def __repr__(self) -> str:
        shown, parts = (len(dict.fromkeys(zip(*(self.columns[n] for n in names), strict=True))) for names in (["presentation"], KEYS[1:]))
        return f"Attribution(layer {self.facts.get('layer')}, {parts} components, {shown} presentations, {len(self)} rows)"


def attribute(
    model: HookedModel,
    directions: Directions,
    queries: Queries,
    presentations: Presentation | Sequence[Presentation],
    *,
    layer: int | None = None,
    by_source: bool = False,
    batch_size: int | None = None,
) -> Attribution:
    """Split each query's coordinate on the directions of a layer exactly into what wrote it, in the LLM and in the VLM.

    Heads and MLPs are not in `Activations`, so unlike `gl.compare` it takes the model and what to show it, in the order of `gl.sweep` and
    `gl.evaluate`. The LLM's run (`model.llm`, text only) always comes first: everything else is compared with it.

    Args:
        model: The model.
        directions: Of the residual stream (`resid_post`); all of their rank are split. Make them from other queries.
        queries: Labelled, both classes.
        presentations: One or several to compare with the text alone.
        layer: Whose direction, after whose block; None for the last layer that the directions have.
        by_source: Split each head by the tokens whose values it mixes: image or text. Needs eager attention.
        batch_size: Queries per forward; by default as many as free memory holds, at most 32. With `by_source`, attention patterns of one
            block and logits of all tokens are in memory at once.

    Raises:
        QueryError: A label is missing, there is only one class, or two queries (or presentations) have one name.
        ModelError, PresentationError: Something else in the place of the model or of a presentation.
        MismatchError: Directions of another model, width or hook.
        SiteError: No directions for the layer; or `by_source` without eager attention.
        ModelError: `by_source` in a family whose heads mix something else than the values at the hook v.
        NumericsError: The parts do not sum to the coordinate, or there is no direction at the layer.

    Warns:
        UserWarning: Queries that made the directions; or blocks that are known to add something else than their attention and MLP.

    Examples:
        >>> parts = gl.attribute(model, ssd, queries, grey, layer=5)
        >>> parts
        Attribution(layer 5, 31 components, 2 presentations, 2232 rows)
        >>> most = parts.top(1).iloc[0]  # what changes most from the text to the image
        >>> str(most["component"]), int(most["block"])
        ('head', 5)
    """
    require_model(model)
    items, shown = as_queries(queries), as_presentations(presentations)
    _require_usable(model, directions, items)
    layer = as_layer(layer) if layer is not None else directions.layers[-1] if directions.layers else model.cfg.n_layers - 1
    Site(layers=(layer,)).points(model.cfg.n_layers)
    directions.require_some([layer])
    warn_of_own_queries(directions, items)
    warn_of_other_residual_terms(model)
    vectors = directions.at(layer).double()
    runs = [(model.llm, text_only), *((model, presentation) for presentation in shown if presentation != text_only)]
    found: dict[str, Terms] = {}
    for hooked, presentation in runs:
        work = partial(_split, hooked, layer, vectors, by_source)
        results = over_batches(hooked, items, presentation, work, batch_size, max_batch_size=LARGEST)
        parts = list(track(results, len(items), f"attribute, {presentation.name}"))
        found[presentation.name] = {
            component: in_query_order([BatchResult(part.indices, part.result[component]) for part in parts], len(items))
            for component in parts[0].result
        }
    facts = {
        "layer": layer,
        "directions": directions.method,
        "presentations": list(found),
        "models": [hooked.id for hooked, _ in runs],
        "by_source": by_source,
    }
    return Attribution(_columns(_without_rounding(found), items, layer), facts, model.provenance)


def _split(
    model: HookedModel, layer: int, vectors: Float[torch.Tensor, "rank d_model"], by_source: bool, batch: Batch, prefix: Prefix | None
) -> Terms:
    return split(model, batch, layer, vectors, by_source, prefix)


def _require_usable(model: HookedModel, directions: Directions, queries: Sequence[Query]) -> None:
    require_type(directions, Directions, MismatchError, "make directions of other queries first: directions.ssd(activations)")
    require_labels(queries)
    require_ids(queries)
    require_same_model(f"the directions {directions.method!r}", directions.provenance.model, model.id, model.llm.id)
    if (directions.hook, directions.d_model) != ("resid_post", model.cfg.d_model):
        raise MismatchError(
            f"directions of width {directions.d_model} at {directions.hook}",
            f"width {model.cfg.d_model} at resid_post: only the residual stream is a sum of components",
            "collect the residual stream of this model",
        )


def _without_rounding(found: Mapping[str, Terms]) -> dict[str, Terms]:
    """Without the leftovers (`attn_rest`, `rest`, `between`) that are nothing but rounding in every run."""
    largest = max(float(value.abs().max()) for terms in found.values() for value in terms.values())
    sizes: dict[Component, float] = {}
    for terms in found.values():
        for component, value in terms.items():
            sizes[component] = max(sizes.get(component, 0.0), float(value.abs().max()))
    kept = {
        c for c, size in sizes.items() if c.component in ("embed", "head", "mlp") or size > 50 * torch.finfo(torch.float32).eps * largest
    }
    return {name: {c: value for c, value in terms.items() if c in kept} for name, terms in found.items()}


def _columns(found: Mapping[str, Terms], queries: Sequence[Query], layer: int) -> dict[str, np.ndarray]:
    """Tidy columns: presentation by presentation, component by component, direction by direction, query by query."""
    cells = [(name, component, value.numpy()) for name, terms in found.items() for component, value in terms.items()]
    n, rank = cells[0][2].shape
    per_query = {
        "query": [query.id for query in queries],
        "label": [query.label for query in queries],
        "cluster": [query.stands_with for query in queries],
    }
    columns = {"presentation": np.repeat([name for name, _, _ in cells], rank * n)}
    columns |= {name: np.tile(np.array(column), len(cells) * rank) for name, column in per_query.items()}
    columns["layer"] = np.full(len(cells) * rank * n, layer)
    columns["direction"] = np.tile(np.repeat(np.arange(1, rank + 1), n), len(cells))
    columns |= {key: np.repeat([getattr(c, key) for _, c, _ in cells], rank * n) for key in Component._fields}
    columns["value"] = np.concatenate([value.T.ravel() for _, _, value in cells])
    return columns


def _of_one(bounds: Frame) -> float:
    """The bound of a single source; that of a sum of sources is not known."""
    return float(bounds.iloc[0]) if len(bounds) == 1 else float("nan")


Means = dict[str, tuple[Float[np.ndarray, "component"], Float[np.ndarray, "draw component"]]]
"""Label -> the mean of each component, and that in each resample."""


def _means(values: Float[np.ndarray, "query component"], labels: np.ndarray, counts: np.ndarray) -> Means:
    means: Means = {}
    for label in LABELS:
        here = labels == label
        if not here.any():
            means[label] = np.full(values.shape[1], np.nan), np.full((len(counts), values.shape[1]), np.nan)
            continue
        weights = counts * here
        with np.errstate(invalid="ignore"):  # a resample without the class is undefined
            means[label] = (values[here].mean(0), weights @ values / weights.sum(1, keepdims=True))
    harmful, harmless = (means[label] for label in LABELS)
    return means | {CONTRAST: (harmful[0] - harmless[0], harmful[1] - harmless[1])}


def _summary_rows(name: str, components: Sequence[Any], means: Means, own: Means | None, labels: np.ndarray) -> Iterator[dict[str, Any]]:
    sizes = {label: int((labels == label).sum()) for label in LABELS}
    for label, (values, drawn) in means.items():
        n = sizes.get(label, len(labels))
        for i, component in enumerate(components):
            mean = percentile(float(values[i]), drawn[:, i], n)
            row = {"presentation": name, "label": label, **dict(zip(KEYS, component, strict=True))}
            row |= {"value": mean.value, "low": mean.low, "high": mean.high}
            if own is None:
                change = percentile(float("nan"), drawn[:, i], n)
            else:
                change = percentile(float(values[i] - own[label][0][i]), drawn[:, i] - own[label][1][:, i], n)
            yield row | {"change": change.value, "change_low": change.low, "change_high": change.high, "n": n}
