"""`compare`: how separable harmful and harmless are in the LLM and in the VLM, layer by layer, with paired intervals."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from guardlens.data.activations import Activations
from guardlens.data.queries import Query, require_labels
from guardlens.directions import Directions, warn_of_own_queries
from guardlens.errors import ArgumentError, MismatchError, as_count, one_of, quoted, require_type, warn
from guardlens.experiments import separability as sep
from guardlens.hooks import require_same_space
from guardlens.results.intervals import Interval, percentile, resample_counts
from guardlens.results.provenance import require_related, require_same_model
from guardlens.results.tables import Frame, Table

Measured = tuple[float, Float[np.ndarray, "draw"]]
"""A metric on the queries as they are, and in each resample."""

Probes = dict[int, tuple[Bool[np.ndarray, "query"], Bool[np.ndarray, "query"]]]
"""Layer -> which queries of a run are classified correctly by the run's own probe, and by the LLM's probe."""


class Comparison(Table):
    """One row per metric, run and layer, with a 95 % interval, and the paired change against the LLM with its own.

    Columns: metric, run, layer, value, low, high, change, change_low, change_high, n. A run is named after its presentation, and after its
    intervention if it has one. The metrics:

    - `auroc`, `d_prime`: how well the coordinate along v1 separates the classes.
    - `midpoint_accuracy`: accuracy of the threshold midway between the LLM's class means, as a gate of the LLM would decide on this run.
      It is missing for directions without class means.
    - `probe`: a linear probe trained and tested on the run (cross-validated); `transfer`: trained on the LLM, tested on the run.
    - `centroid_cosine`: the cosine between the class differences of the LLM and of the run (not for the LLM itself).
    - `drift_along`, `drift_off`: how far a query's state moves from the LLM's, along v1 (signed) and off it, in units of the mean norm of
      the LLM's states.

    `facts["bag_of_words"]` is the AUROC (value, low, high) of the words alone. A hidden state that does no better shows no understanding.

    Examples:
        >>> asked, shown = gl.collect(model.llm, queries), gl.collect(model, queries, grey)  # other queries than the directions'
        >>> gap = gl.compare(asked, shown, ssd, draws=200)
        >>> gap.summary().shape  # a row per layer, a column per metric and run
        (8, 13)
        >>> panels = gap.plot(["auroc", "drift_along"])
    """

    kind: ClassVar[str] = "comparison"

    def summary(self) -> Frame:
        """One row per layer, with metrics and runs as columns."""
        return self.frame.pivot_table(index="layer", columns=["metric", "run"], values="value", sort=False)

    def plot(self, metrics: Sequence[str] = ("auroc", "midpoint_accuracy", "drift_along"), ax: Any = None) -> Any:
        """One panel per metric over the layers, with one line and its interval per run.

        Raises:
            ArgumentError: None of the metrics is in the table.
        """
        from guardlens.results import plots

        frame = self.frame
        known = set(map(str, self.columns["metric"]))
        if isinstance(metrics, str) or not isinstance(metrics, Sequence) or not any(one_of(metric, known) for metric in metrics):
            raise ArgumentError(f"the metrics {quoted(metrics)}", f"some of {sorted(known)}", "say metrics=['auroc']")
        order = {metric: place for place, metric in enumerate(metrics) if one_of(metric, known)}
        frame = frame[frame["metric"].isin(order)].sort_values("metric", key=lambda names: names.map(order), kind="stable")
        return plots.layer_curves(frame, axes=ax)


def compare(llm: Activations, vlm: Activations | Sequence[Activations], directions: Directions, *, draws: int = 2000) -> Comparison:
    """Compare the LLM's view of some queries with the VLM's, along directions that were made from *other* queries.

    Args:
        llm: Activations without an image.
        vlm: Activations of the same queries with an image, in one presentation or several.
        directions: The directions, of which the first is v1.
        draws: The number of bootstrap resamples. Every metric, layer and run uses the same ones, so all differences are paired. Queries of
            one cluster (or pair) are resampled together, and are never on both sides of a probe's fold.

    Raises:
        QueryError: A query has no label, or all queries have one label.
        ArgumentError: `draws` is no count.
        MismatchError: The LLM's run shows an image or was edited; the runs differ in queries, texts, labels, hook, positions, layers or
            width; two runs have one name; or the models of runs and directions are unrelated.
        NumericsError: There are too few groups of queries for five folds, or there is no direction at a layer.

    Warns:
        UserWarning: The queries made the directions; or values are undefined (nan), with the reason.

    Examples:
        >>> asked, shown = gl.collect(model.llm, queries), gl.collect(model, queries, grey)  # other queries than the directions'
        >>> gap = gl.compare(asked, shown, ssd, draws=200)
        >>> rows = gap.where(metric="midpoint_accuracy", layer=7).frame.set_index("run")
        >>> bool(rows["value"]["LLM, text"] > rows["value"]["VLM, blank grey"])  # the threshold of the text serves less well
        True
    """
    draws = as_count(draws, "draws", ArgumentError, "leave it out, or ask for some thousands")
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
    of_llm: dict[tuple[str, int], Measured] = {}
    probed = zip(names, runs, _probes(runs, groups), strict=True)
    rows = [row for name, run, probes in probed for row in _rows(name, llm, run, directions, probes, counts, of_llm)]
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
    """The probes of each run, of which the LLM's comes first. All have the same folds; the LLM's is trained once for all runs."""
    labels = runs[0].harmful
    found = [Probes() for _ in runs]
    splits = sep.held_out(labels, groups)
    for layer in runs[0].layers:
        states = [run.at(layer).double().numpy() for run in runs]
        transferred = sep.probe_correct(states[0], labels, splits, states)
        within = [transferred[0], *(sep.probe_correct(run, labels, splits, [run])[0] for run in states[1:])]
        for probes, by_own, by_llm in zip(found, within, transferred, strict=True):
            probes[layer] = by_own, by_llm
    return found


def _rows(
    name: str,
    llm: Activations,
    run: Activations,
    directions: Directions,
    probes: Probes,
    counts: Int[np.ndarray, "draw query"],
    of_llm: dict[tuple[str, int], Measured],
) -> Iterator[dict[str, Any]]:
    """The rows of one run. The LLM's run comes first, and its values are stored in `of_llm` for the changes of the others."""
    is_llm = not of_llm
    n = counts.shape[1]
    for layer in llm.layers:
        for metric, measured in _metrics(llm, None if is_llm else run, layer, directions, probes, counts):
            change = _change(measured, None if is_llm else of_llm.get((metric, layer)), n)
            if is_llm:
                of_llm[metric, layer] = measured
            interval = percentile(*measured, n)
            place = {"metric": metric, "run": name, "layer": layer}
            yield place | interval.columns() | change.columns("change", prefix="change_") | {"n": n}


def _metrics(
    llm: Activations, vlm: Activations | None, layer: int, directions: Directions, probes: Probes, counts: np.ndarray
) -> Iterator[tuple[str, Measured]]:
    """The metrics of a VLM's run at a layer; those of the LLM's own run if there is no VLM's."""
    labels = llm.harmful
    first = directions.at(layer)[0].double().numpy()
    threshold = float(directions.midpoints[directions.index(layer)])
    text = llm.at(layer).double().numpy()
    states = text if vlm is None else vlm.at(layer).double().numpy()
    scores = states @ first
    yield "auroc", (sep.auroc(scores, labels), sep.bootstrap_auroc(scores, labels, counts))
    yield "d_prime", (sep.d_prime(scores, labels), sep.bootstrap_d_prime(scores, labels, counts))
    if np.isfinite(threshold):
        yield "midpoint_accuracy", _mean((scores > threshold) == labels, counts)
    for name, correct in zip(("probe", "transfer"), probes[layer], strict=True):
        yield name, _mean(correct, counts)
    if vlm is not None:
        yield (
            "centroid_cosine",
            (
                sep.centroid_cosine(text, states, labels),
                sep.bootstrap_centroid_cosine(text, states, labels, counts),
            ),
        )
        along, off, norm = sep.drift_terms(text, states, first)
        yield "drift_along", _mean(along, counts, norm)
        yield "drift_off", _mean(off, counts, norm)


def _mean(values: Shaped[np.ndarray, "query"], counts: np.ndarray, per: Float[np.ndarray, "query"] | None = None) -> Measured:
    once = np.ones((1, len(values)), int)
    return float(sep.bootstrap_mean(values, once, per)[0]), sep.bootstrap_mean(values, counts, per)


def _change(here: Measured, there: Measured | None, n: int) -> Interval:
    if there is None:
        return Interval.undefined(n)
    return percentile(here[0] - there[0], here[1] - there[1], n)


def _names(runs: Sequence[Activations]) -> list[str]:
    """The names of the runs in the table: LLM or VLM, presentation, and intervention if any."""
    names = []
    for place, run in enumerate(runs):
        parts = ["LLM" if place == 0 else "VLM", run.presentation, run.intervention]
        names.append(", ".join(part for part in parts if part))
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise MismatchError(f"two runs of the name {repeated!r}", "a name for each", "compare one of them in a call of its own")
    return names


def _require_directions(directions: Directions, runs: Sequence[Activations]) -> None:
    """Refuse directions of none of the models, and runs of a VLM that does not have the LLM beside it."""
    llm = runs[0]
    models = (model for run in runs for model in run.provenance.models)
    require_same_model(f"the directions {directions.method!r}", directions.provenance.model, *models)
    for run in runs[1:]:
        require_related(f"the run {run.presentation!r}", run.provenance, llm.provenance)


def _require_plain_text(llm: Activations) -> None:
    """Refuse a run with an image or an intervention in the LLM's place."""
    call = "compare(collect(model.llm, queries), collect(model, queries, presentation), directions)"
    if llm.intervention:
        found = f"the run {llm.presentation!r} with the intervention {llm.intervention} in the LLM's place"
        raise MismatchError(found, "the run without an image and without an edit first", call)
    if llm.shows_images:
        raise MismatchError(f"the run {llm.presentation!r} in the LLM's place", "the run without an image first", call)


def _require_comparable(llm: Activations, run: Activations, directions: Directions) -> None:
    """Refuse a run that was collected in another way than the LLM's, or that the directions do not fit."""
    require_same_space(f"the directions {directions.method!r}", directions.hook, run.hook)
    for what, here, there in (
        ("hook", run.hook, llm.hook),
        ("positions", run.positions, llm.positions),
        ("queries", [_identity(query) for query in run.queries], [_identity(query) for query in llm.queries]),
        ("layers", list(run.layers), list(llm.layers)),
        ("width", run.d_model, directions.d_model),
    ):
        if here != there:
            first = _first_other_query(run, llm) if what == "queries" else None
            raise MismatchError(
                f"other {what} in the run {run.presentation!r}",
                f"the same {what} as in the LLM's run and the directions",
                f"collect both alike; they differ first at query {first!r}" if first else "collect both alike",
            )
    directions.require_some(run.layers)


def _first_other_query(run: Activations, llm: Activations) -> str | None:
    """The id of the first query that differs between both runs."""
    pairs = zip(run.queries, llm.queries, strict=False)
    return next((other.id for query, other in pairs if _identity(query) != _identity(other)), None)


def _identity(query: Query) -> tuple[str, ...]:
    """The fields that must agree between two runs; images may differ."""
    return query.id, query.text, query.label or "", query.stands_with


UNDEFINED = {
    "d_prime": "a class has a single query, or neither class spreads along v1",
    "centroid_cosine": "harmful and harmless states have the same mean",
    "drift_along": "the LLM's states are all zero",
    "drift_off": "the LLM's states are all zero",
}
"""Metric -> the reason why it can be nan."""


def _warn_of_undefined(rows: Sequence[Mapping[str, Any]]) -> None:
    """Warn of values, or only intervals, that are nan, and say why they are."""
    layers: dict[tuple[str, str, str], list[int]] = {}
    for row in rows:
        metric = row["metric"]
        if np.isnan(row["value"]):
            undefined, reason = metric, UNDEFINED.get(metric, "there is no value")
        elif np.isnan(row["low"]):
            undefined, reason = f"the interval of {metric}", "it is so in more than 5 % of the resamples"
        else:
            continue
        layers.setdefault((undefined, row["run"], reason), []).append(row["layer"])
    if layers:
        places = [f"{undefined} of {run!r} at the layers {where}, as {reason}" for (undefined, run, reason), where in layers.items()]
        warn(f"undefined (nan): {'; '.join(places)}")
