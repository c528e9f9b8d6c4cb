"""`attribute`: which parts of the model write a direction: a query's coordinate as a sum over embedding, heads and MLPs.

The residual stream is a sum, so its coordinate along a direction v is one too. With h_l the stream after block l at the last token,

    h_l . v  =  embed . v  +  sum over blocks b <= l of (heads of b + attn_rest + mlp + rest + between) . v

A head adds its z times its slice of the output projection W_O. Some families (Gemma 2 and later, OLMo 2, GLM-4) apply a norm between W_O
and the stream. Its scale is frozen at its value for this very state, which makes it linear; for an RMS norm the heads then still sum
exactly. What belongs to no head (the bias of W_O, a linear attention) is `attn_rest`; `rest` and `between` are as in
`ActivationCache.decompose_resid`.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; the frozen norm is that of direct logit attribution.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float

from guardlens.data.presentations import Presentation, text_only
from guardlens.data.presentations.protocol import as_presentations
from guardlens.data.queries import Query, as_queries, require_ids, require_labels
from guardlens.directions import Directions, warn_of_own_queries
from guardlens.errors import ArgumentError, MismatchError, NumericsError, as_count, one_of, quoted, require_type
from guardlens.experiments.collection import LARGEST
from guardlens.experiments.component_means import CONTRAST, KEYS, means_by_label, summary_rows
from guardlens.experiments.residual_terms import Component, Terms, split
from guardlens.experiments.tidy import crossed, per_query
from guardlens.hooks import Site, as_layer
from guardlens.models.batching import BatchResult, in_query_order, over_batches
from guardlens.models.checks import warn_of_other_residual_terms
from guardlens.models.engine.batch import Batch
from guardlens.models.hooked_model import HookedModel, Queries
from guardlens.models.loaded_model import require_model
from guardlens.results.intervals import resample_counts
from guardlens.results.progress import track
from guardlens.results.provenance import require_same_model
from guardlens.results.tables import Frame, Table, cached_frame

LEFTOVERS = ("attn_rest", "rest", "between")
"""The components that may be nothing but rounding."""


class Attribution(Table):
    """One row per presentation, query, direction and component: what the component adds to the query's coordinate. The rows sum to it.

    Columns: presentation, query, label, cluster, layer (whose directions), direction (1 is the first), component, block, head,
    token_source, value; see `Component`.

    The first presentation is the LLM's. Components of the kinds `attn_rest`, `rest` and `between` are left out if they are nothing but
    rounding.

    Examples:
        >>> parts = gl.attribute(model, ssd, queries, grey, layer=5)
        >>> whole = parts.frame.groupby(["presentation", "query"])["value"].sum()["text"]
        >>> states = gl.collect(model.llm, queries)
        >>> bool(np.allclose(whole[[query.id for query in queries]], ssd.coordinates(states)[:, 5, 0], atol=1e-3))
        True
    """

    kind: ClassVar[str] = "attribution"

    @cached_frame
    def summary(self) -> Frame:
        """Means over queries for each label, and harmful - harmless, with 95 % bootstrap intervals.

        `change` is the difference from the LLM, paired by query. Queries of a cluster or pair are resampled together. A component that a
        run does not have counts as 0 there.

        Raises:
            NumericsError: The table is empty.
            MismatchError: A component lacks a query or has one twice.
        """
        import pandas as pd

        self._require_whole()
        wide = self.frame.pivot(index=["query", "label", "cluster"], columns=["presentation", *KEYS], values="value").fillna(0.0)
        labels = wide.index.get_level_values("label").to_numpy()
        counts = resample_counts(len(wide), wide.index.get_level_values("cluster").to_numpy())
        components = list(dict.fromkeys(zip(*(self.columns[name] for name in KEYS), strict=True)))
        first, *others = dict.fromkeys(self.columns["presentation"])
        llm = means_by_label(wide[first].reindex(columns=components, fill_value=0.0).to_numpy(), labels, counts)
        rows = list(summary_rows(first, components, llm, None, labels))
        for name in others:
            means = means_by_label(wide[name].reindex(columns=components, fill_value=0.0).to_numpy(), labels, counts)
            rows += summary_rows(name, components, means, llm, labels)
        return pd.DataFrame(rows)

    def _require_whole(self) -> None:
        """Refuse components that lack a query or have one twice: a row that a filter took away would count as 0."""
        if not len(self):
            raise NumericsError("a table without rows", "at least one row", "check the filter that made it")
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
        """The k components that change most from the LLM to a presentation; for the LLM itself, those that write most.

        Args:
            k: The number of components.
            presentation: The presentation's name; by default the first one after the LLM's.
            label: The queries: `"harmful"`, `"harmless"`, or `"harmful - harmless"`, which is what tells both apart.
            direction: The number of the direction; 1 is the first.

        Raises:
            ArgumentError: There is no such presentation, label or direction, or `k` is no count.
            NumericsError: The table is empty.
            MismatchError: A component lacks a query or has one twice.
        """
        k = as_count(k, "k", ArgumentError, "give a number of components, as in top(10)", least=0)
        self._require_whole()
        llm, *others = dict.fromkeys(map(str, self.columns["presentation"]))
        presentation = (others or [llm])[0] if presentation is None else presentation
        if not one_of(presentation, [llm, *others]):
            raise ArgumentError(f"the presentation {quoted(presentation)}", f"one of {[llm, *others]}")
        rows = self._chosen(label, direction)
        rows = rows[rows["presentation"] == presentation]
        order = rows["value" if presentation == llm else "change"].abs().sort_values(ascending=False, kind="stable").index
        return rows.loc[order[:k]].drop(columns=["label", "direction"]).reset_index(drop=True)

    def plot(self, label: str = CONTRAST, direction: int = 1, token_source: str | None = None, ax: Any = None) -> Any:
        """Heat maps of the heads over bars of everything else, for each presentation and for its change from the LLM.

        Args:
            label: The queries: `"harmful"`, `"harmless"`, or `"harmful - harmless"`.
            direction: The number of the direction; 1 is the first.
            token_source: Show only what heads write from `"image"` or from `"text"` tokens; needs `by_token_source`.
            ax: The axes to draw on, two per presentation and two per change; by default a new figure.

        Raises:
            ArgumentError: There is no such label, direction or token source.
            NumericsError: The table is empty.
            MismatchError: A component lacks a query or has one twice.
        """
        import pandas as pd

        from guardlens.results.plots import components as component_plots
        from guardlens.results.plots.style import counted

        rows = self._chosen(label, direction)
        if token_source is not None:
            known = sorted({str(name) for name in rows.loc[rows["component"] == "head", "token_source"]})
            if not one_of(token_source, known):
                raise ArgumentError(
                    f"the token source {quoted(token_source)}", f"one of {known}", "attribute with by_token_source=True to tell them apart"
                )
            rows = rows[(rows["component"] != "head") | (rows["token_source"] == token_source)]
        llm = rows["presentation"].iloc[0]
        written = f"{label.replace(' - ', ' − ')} ({counted(rows['n'])})\non $v_{{{direction}}}$ of layer {self.facts['layer']}"
        changes = rows[rows["presentation"] != llm]
        changes = changes.assign(
            panel=changes["presentation"] + f" − {llm}",
            unit="change from the LLM",
            value=changes["change"],
            low=changes["change_low"],
            high=changes["change_high"],
        )
        frame: Frame = pd.concat([rows.assign(panel=rows["presentation"], unit=written), changes])
        keys = ["panel", "unit", "component", "block", "head"]
        over_sources = {"value": "sum", "low": _bound, "high": _bound}
        return component_plots.component_maps(frame.groupby(keys, sort=False, as_index=False).agg(over_sources), axes=ax)

    def _chosen(self, label: str, direction: int) -> Frame:
        """The rows of the summary for a label and a direction."""
        rows = self.summary()
        labels = list(dict.fromkeys(rows["label"]))
        numbers = sorted(set(rows["direction"]))
        direction = as_count(direction, "direction", ArgumentError, "name one by its number; 1 is the first")
        if not one_of(label, labels):
            raise ArgumentError(f"the label {quoted(label)}", f"one of {labels}")
        if direction not in numbers:
            raise ArgumentError(f"direction {direction}", f"one of {numbers}")
        return rows[(rows["label"] == label) & (rows["direction"] == direction)]

    def __repr__(self) -> str:
        components = len(self.frame.drop_duplicates(list(Component._fields))) if len(self) else 0
        presentations = len(set(self.columns.get("presentation", ())))
        return f"Attribution(layer {self.facts.get('layer')}, {components} components, {presentations} presentations, {len(self)} rows)"


def attribute(
    model: HookedModel,
    directions: Directions,
    queries: Queries,
    presentations: Presentation | Sequence[Presentation],
    *,
    layer: int | None = None,
    by_token_source: bool = False,
    batch_size: int | None = None,
) -> Attribution:
    """Split each query's coordinate on the directions of a layer exactly into the components that wrote it, in the LLM and in the VLM.

    `Activations` hold no heads and MLPs, so unlike `gl.compare` this function takes the model and runs it. The LLM's run (`model.llm`, text
    only) always comes first, and everything else is compared with it.

    Args:
        model: The model.
        directions: Directions of the residual stream (`resid_post`), all of which are split. Make them from other queries.
        queries: Labelled queries of both classes.
        presentations: One presentation or several, to compare with text alone.
        layer: The layer whose directions are split, after its block; None for the last layer that the directions have.
        by_token_source: Split each head by the tokens whose values it mixes: image or text. Needs eager attention.
        batch_size: Queries per forward pass; by default as many as free memory holds, at most 32. With `by_token_source`, the attention
            patterns of one block and the logits of all tokens are in memory at once.

    Raises:
        QueryError: A query has no label, all queries have one label, or two have one id.
        PresentationError: A presentation is none, or two have one name.
        MismatchError: The directions are another model's, or of another width or hook.
        SiteError: There are no directions for the layer; or `by_token_source` is asked for without eager attention.
        ModelError: The model is not a `HookedModel`; or `by_token_source` is asked for in a family whose heads mix something else than the
            values at the hook v.
        NumericsError: The parts do not sum to the coordinate, or there is no direction at the layer.

    Warns:
        UserWarning: The queries made the directions; or blocks are known to add something else than their attention and MLP.

    Examples:
        >>> parts = gl.attribute(model, ssd, queries, grey, layer=5)
        >>> parts
        Attribution(layer 5, 31 components, 2 presentations, 2232 rows)
        >>> most = parts.top(1).iloc[0]  # what changes most from the text to the image
        >>> str(most["component"]), int(most["block"])
        ('head', 5)
    """
    require_model(model)
    items = as_queries(queries)
    shown = as_presentations(presentations)
    _require_usable(model, directions, items)
    layer = _last_layer(model, directions) if layer is None else as_layer(layer)
    Site(layers=(layer,)).points(model.cfg.n_layers)
    directions.require_some([layer])
    warn_of_own_queries(directions, items)
    warn_of_other_residual_terms(model)
    vectors = directions.at(layer).double()
    runs = [(model.llm, text_only), *((model, presentation) for presentation in shown if presentation != text_only)]
    found: dict[str, Terms] = {}
    for hooked, presentation in runs:
        work = partial(_split, hooked, layer, vectors, by_token_source)
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
        "by_token_source": by_token_source,
    }
    return Attribution(_columns(_without_rounding(found), items, layer), facts, model.provenance)


def _last_layer(model: HookedModel, directions: Directions) -> int:
    """The last layer that the directions have; the model's last one for directions that are the same at every layer."""
    return directions.layers[-1] if directions.layers else model.cfg.n_layers - 1


def _split(model: HookedModel, layer: int, vectors: Float[torch.Tensor, "rank d_model"], by_token_source: bool, batch: Batch) -> Terms:
    return split(model, batch, layer, vectors, by_token_source)


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
    """The terms without the leftovers that are nothing but rounding in every run."""
    sizes: dict[Component, float] = {}
    for terms in found.values():
        for component, values in terms.items():
            sizes[component] = max(sizes.get(component, 0.0), float(values.abs().max()))
    rounding = 50 * torch.finfo(torch.float32).eps * max(sizes.values())
    dropped = {component for component, size in sizes.items() if component.component in LEFTOVERS and not size > rounding}
    return {name: {c: values for c, values in terms.items() if c not in dropped} for name, terms in found.items()}


def _columns(found: Mapping[str, Terms], queries: Sequence[Query], layer: int) -> dict[str, np.ndarray]:
    """Tidy columns: presentation by presentation, component by component, direction by direction, query by query."""
    cells = [(name, component) for name, terms in found.items() for component in terms]
    values = np.stack([found[name][component].T.numpy() for name, component in cells])
    per_cell = {"presentation": [name for name, _ in cells], "layer": [layer] * len(cells)}
    per_cell |= {field: [getattr(component, field) for _, component in cells] for field in Component._fields}
    per_direction = {"direction": range(1, values.shape[1] + 1)}
    columns = crossed(per_cell, per_direction, per_query(queries))
    order = ["presentation", "query", "label", "cluster", "layer", *KEYS]
    return {name: columns[name] for name in order} | {"value": values.ravel()}


def _bound(bounds: Frame) -> float:
    """The bound of a single token source. That of a sum over several is not known."""
    return float(bounds.iloc[0]) if len(bounds) == 1 else float("nan")
