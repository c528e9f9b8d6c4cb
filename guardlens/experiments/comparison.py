"""`compare`: how separable harmful and harmless are in the LLM and in the VLM, layer by layer, with paired intervals."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from guardlens.data.activations import Activations
from guardlens.data.queries import Query, require_labels
from guardlens.directions import Directions, warn_of_own_queries
from guardlens.errors import MismatchError, NumericsError, as_count, one_of, quoted, require_type, warn
from guardlens.experiments import separability as sep
from guardlens.hooks import require_same_space
from guardlens.results.intervals import Interval, percentile, resample_counts
from guardlens.results.provenance import require_related, require_same_model
from guardlens.results.tables import Frame, Table

Measured = tuple[float, Float[np.ndarray, "draw"]]
"""A value, and the value in each resample."""

Probes = dict[int, tuple[Bool[np.ndarray, "query"], Bool[np.ndarray, "query"]]]
"""Layer -> which queries of a run a probe gets right: the run's own one, and the LLM's."""


class Comparison(Table):
    """One row per metric, run and layer, with a 95 % interval, and the paired change against the LLM with its own.

    Columns: metric, run, layer, value, low, high, change, change_low, change_high, n. A run is called by its presentation, and by its
    intervention where it was edited. The metrics:

    - `auroc`, `d_prime`: of the coordinate along v1.
    - `midpoint_accuracy`: by the threshold between the LLM's class means: what a gate of the LLM would decide on this run. (Not for
      directions without class means.)
    - `probe`: a linear probe trained and tested on the run (cross-validated); `transfer`: trained on the LLM, tested on the run.
    - `centroid_cosine`: between the class differences of the LLM and of the run (not for the LLM itself).
    - `drift_along`, `drift_off`: how far a query's state moves from the LLM, along v1 (signed) and off it, in mean norms of the LLM's.

    `facts["bag_of_words"]` is the AUROC (value, low, high) of the words alone: a hidden state that does no better shows no understanding.

    Examples:
        >>> asked, shown = gl.collect(model.llm, queries), gl.collect(model, queries, grey)  # other queries than the directions'
        >>> gap = gl.compare(asked, shown, ssd, draws=200)
        >>> gap.summary().shape  # a row per layer, a column per metric and run
        (8, 13)
        >>> panels = gap.plot(["auroc", "drift_along"])
    """

    kind: ClassVar[str] = "comparison"

    def summary(self) -> Frame:
        """Metrics and runs as columns, a row per layer."""
        return self.frame.pivot_table(index="layer", columns=["metric", "run"], values="value", sort=False)

    def plot(self, metrics: Sequence[str] = ("auroc", "midpoint_accuracy", "drift_along"), ax: Any = None) -> Any:
        """One panel per metric over the layers, one line with its interval per run."""
        from guardlens.results import plots

        frame, known = self.frame, set(self.columns["metric"])
        if isinstance(metrics, str) or not isinstance(metrics, Sequence) or not any(one_of(metric, known) for metric in metrics):
            raise MismatchError(f"the metrics {quoted(metrics)}", f"some of {sorted(known)}", "say metrics=['auroc']")
        order = {metric: i for i, metric in enumerate(metrics) if one_of(metric, known)}
        frame = frame[frame["metric"].isin(order)].sort_values("metric", key=lambda names: names.map(order), kind="stable")
        return plots.layer_curves(frame, axes=ax)


def compare(llm: Activations, vlm: Activations | Sequence[Activations], directions: Directions, *, draws: int = 2000) -> Comparison:
    """Compare the LLM's view of some queries with the VLM's, on directions that were made from *other* queries.

    Args:
        llm: Activations without image.
        vlm: Activations of the same queries with an image, one or several presentations.
        directions: Their first row is v1.
        draws: Resamples of the bootstrap; the same for every metric, layer and run, so all differences are paired. Queries that share a
            cluster (or a pair) are resampled together, and never straddle the folds of a probe.

    Raises:
        QueryError: A label is missing, or there is only one class.
        MismatchError: The LLM's run shows an image or was edited; other queries, texts, labels, hook, positions, layers or width; two runs
            of one name; runs of unrelated models, or directions of another model or hook.
        NumericsError: Too few groups of queries for five folds, no draws, or no direction at a layer.

    Warns:
        UserWarning: Queries that made the directions; or values that are undefined (nan), with the reason.

    Examples:
        >>> asked, shown = gl.collect(model.llm, queries), gl.collect(model, queries, grey)  # other queries than the directions'
        >>> gap = gl.compare(asked, shown, ssd, draws=200)
        >>> rows = gap.where(metric="midpoint_accuracy", layer=7).frame.set_index("run")
        >>> bool(rows["value"]["LLM, text"] > rows["value"]["VLM, blank grey"])  # the threshold of the text serves less well
        True
    """
    draws = as_count(draws, "draws", NumericsError, "leave it out, or ask for some thousands")
    runs = [llm, *(vlm if isinstance(vlm, Sequence) else [vlm])]
    for run in runs:
        require_type(run, Activations, MismatchError, "compare(collect(model.llm, queries), collect(model, queries, shown), directions)")
    require_type(directions, Directions, MismatchError, "make directions of other queries first: directions.ssd(activations)")
    require_labels(llm.queries)
    _require_directions(directions, runs)
    _require_plain_text(llm)
    for run in runs:
        _require_comparable(llm, run, directions)
    names = _names(runs)
    warn_of_own_queries(directions, llm.queries)
    groups = np.array([query.stands_with for query in llm.queries])
    counts = resample_counts(len(groups), groups, draws)
    own: dict[tuple[str, int], Measured] = {}
    probed = zip(names, runs, _probes(runs, groups), strict=True)
    rows = [row for name, run, probes in probed for row in _rows(name, llm, run, directions, probes, counts, own)]
    _warn_of_undefined(rows)
    words = sep.bag_of_words_scores([query.text for query in llm.queries], llm.harmful, groups)
    surface = percentile(sep.auroc(words, llm.harmful), sep.bootstrap_auroc(words, llm.harmful, counts), len(groups))
    facts = {
        "bag_of_words": [surface.value, surface.low, surface.high],
        "directions": directions.method,
        "runs": names,
        "models": [run.provenance.model for run in runs],
        "n_groups": len(set(groups.tolist())),
    }
    return Comparison.from_rows(rows, facts=facts, provenance=llm.provenance)


def _probes(runs: Sequence[Activations], groups: Shaped[np.ndarray, "query"]) -> list[Probes]:
    """For each run, the LLM's first. All probes have the same folds, and the LLM's is trained once for all runs."""
    labels, found = runs[0].harmful, [Probes() for _ in runs]
    splits = sep.held_out(labels, groups)
    for layer in runs[0].layers:
        states = [run.at(layer).double().numpy() for run in runs]
        transferred = sep.probe_correct(states[0], labels, splits, states)
        within = [transferred[0], *(sep.probe_correct(mine, labels, splits, [mine])[0] for mine in states[1:])]
        for probes, own, of_llm in zip(found, within, transferred, strict=True):
            probes[layer] = own, of_llm
    return found


def _rows(
    name: str,
    llm: Activations,
    run: Activations,
    directions: Directions,
    probes: Probes,
    counts: Int[np.ndarray, "draw query"],
    own: dict[tuple[str, int], Measured],
) -> Iterator[dict[str, Any]]:
    """The rows of one run. The LLM's own values, which come first, are kept in `own` for the changes of the others."""
    first = not own
    for layer in llm.layers:
        for metric, (value, resampled) in _metrics(llm, None if first else run, layer, directions, probes, counts):
            interval = percentile(value, resampled, counts.shape[1])
            change = _change((value, resampled), None if first else own.get((metric, layer)), counts.shape[1])
            if first:
                own[metric, layer] = (value, resampled)
            yield {
                "metric": metric,
                "run": name,
                "layer": layer,
                "value": interval.value,
                "low": interval.low,
                "high": interval.high,
                "change": change.value,
                "change_low": change.low,
                "change_high": change.high,
                "n": interval.n,
            }


def _metrics(
    llm: Activations, vlm: Activations | None, layer: int, directions: Directions, probes: Probes, counts: np.ndarray
) -> Iterator[tuple[str, Measured]]:
    """Of the LLM itself without a VLM's run, else of that one."""
    labels, first = llm.harmful, directions.at(layer)[0].double().numpy()
    threshold = float(directions.midpoints[directions.index(layer)])
    text, states = llm.at(layer).double().numpy(), (vlm or llm).at(layer).double().numpy()
    scores = states @ first
    yield "auroc", (sep.auroc(scores, labels), sep.bootstrap_auroc(scores, labels, counts))
    yield "d_prime", (sep.d_prime(scores, labels), sep.bootstrap_d_prime(scores, labels, counts))
    if np.isfinite(threshold):
        yield "midpoint_accuracy", _mean((scores > threshold) == labels, counts)
    for name, correct in zip(("probe", "transfer"), probes[layer], strict=True):
        yield name, _mean(correct, counts)
    if vlm is not None:
        cosine = sep.centroid_cosine(text, states, labels), sep.bootstrap_centroid_cosine(text, states, labels, counts)
        yield "centroid_cosine", cosine
        along, off, norm = sep.drift_terms(text, states, first)
        for name, term in (("drift_along", along), ("drift_off", off)):
            yield name, _mean(term, counts, norm)


def _mean(values: Shaped[np.ndarray, "query"], counts: np.ndarray, per: Float[np.ndarray, "query"] | None = None) -> Measured:
    once = np.ones((1, len(values)), int)
    return float(sep.bootstrap_mean(values, once, per)[0]), sep.bootstrap_mean(values, counts, per)


def _change(here: Measured, there: Measured | None, n: int) -> Interval:
    if there is None:
        return Interval.undefined(n)
    return percentile(here[0] - there[0], here[1] - there[1], n)


def _names(runs: Sequence[Activations]) -> list[str]:
    """What the runs are called in tables: the LLM's comes first."""
    names = [
        f"{'LLM' if place == 0 else 'VLM'}, {run.presentation}{f', {run.intervention}' if run.intervention else ''}"
        for place, run in enumerate(runs)
    ]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise MismatchError(f"two runs of the name {twice!r}", "a name for each", "compare one of them in a call of its own")
    return names


def _require_directions(directions: Directions, runs: Sequence[Activations]) -> None:
    """Directions of one of the models; each run of the LLM's model, or of a VLM that has that LLM beside it."""
    llm = runs[0]
    models = (model for run in runs for model in run.provenance.models)
    require_same_model(f"the directions {directions.method!r}", directions.provenance.model, *models)
    for run in runs[1:]:
        require_related(f"the run {run.presentation!r}", run.provenance, llm.provenance)


def _require_plain_text(llm: Activations) -> None:
    """In the LLM's place, the model as it is, without an image."""
    if llm.shows_images or llm.intervention:
        raise MismatchError(
            f"the run {llm.presentation!r}{f' with the intervention {llm.intervention}' if llm.intervention else ''} in the LLM's place",
            "the run without an image and without an edit first" if llm.intervention else "the run without an image first",
            "compare(collect(model.llm, queries), collect(model, queries, presentation), directions)",
        )


def _require_comparable(llm: Activations, run: Activations, directions: Directions) -> None:
    require_same_space(f"the directions {directions.method!r}", directions.hook, run.hook)
    for what, here, there in (
        ("hook", run.hook, llm.hook),
        ("positions", run.positions, llm.positions),
        ("queries", _asked(run), _asked(llm)),
        ("layers", list(run.layers), list(llm.layers)),
        ("width", run.d_model, directions.d_model),
    ):
        if here != there:
            first = next((other.id for query, other in zip(run.queries, llm.queries, strict=False) if _said(query) != _said(other)), None)
            raise MismatchError(
                f"other {what} in the run {run.presentation!r}",
                f"the same {what} as in the LLM's run and the directions",
                f"collect both alike; they differ first at query {first!r}" if what == "queries" and first else "collect both alike",
            )
    directions.require_some(run.layers)


def _asked(run: Activations) -> list[tuple[str, ...]]:
    return [_said(query) for query in run.queries]


def _said(query: Query) -> tuple[str, ...]:
    """What two runs must agree on; images may differ."""
    return query.id, query.text, query.label or "", query.stands_with


UNDEFINED = {
    "d_prime": "a class has a single query, or neither class spreads along v1",
    "centroid_cosine": "harmful and harmless states have the same mean",
    "drift_along": "the LLM's states are all zero",
    "drift_off": "the LLM's states are all zero",
}
"""Metric -> why it can be nan."""


def _warn_of_undefined(rows: Sequence[Mapping[str, Any]]) -> None:
    """Say why values, or only their intervals, are nan."""
    layers: dict[tuple[str, str, str], list[int]] = {}
    for row in rows:
        metric, run = row["metric"], row["run"]
        if np.isnan(row["value"]):
            layers.setdefault((metric, run, UNDEFINED.get(metric, "there is no value")), []).append(row["layer"])
        elif np.isnan(row["low"]):
            layers.setdefault((f"the interval of {metric}", run, "it is so in more than 5 % of the resamples"), []).append(row["layer"])
    if layers:
        said = "; ".join(f"{what} of {run!r} at the layers {where}, as {why}" for (what, run, why), where in layers.items())
        warn(f"undefined (nan): {said}")
