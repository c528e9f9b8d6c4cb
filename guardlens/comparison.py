"""`compare`: how separable harmful and harmless are in the LLM and in the VLM, layer by layer, with paired intervals."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from guardlens import separability as sep
from guardlens.activations import Activations
from guardlens.directions import Directions
from guardlens.errors import MismatchError
from guardlens.intervals import Interval, percentile, resample_counts
from guardlens.queries import WITHOUT_IMAGES, Query, require_labels
from guardlens.sites import require_same_space
from guardlens.storage import require_same_model
from guardlens.tables import Frame, Table

Measured = tuple[float, Float[np.ndarray, "draw"]]
"""A value, and the value in each resample."""


class Comparison(Table):
    """One row per metric, run and layer, with a 95 % interval, and the paired change against the LLM with its own.

    Columns: metric, run, layer, value, low, high, change, change_low, change_high, n. The metrics:

    - `auroc`, `d_prime`: of the coordinate along v1.
    - `midpoint_accuracy`: by the threshold between the LLM's class means: what a gate of the LLM would decide on this run. (Not for
      directions without class means.)
    - `probe`: a linear probe trained and tested on the run (cross-validated); `transfer`: trained on the LLM, tested on the run.
    - `centroid_cosine`: between the class differences of the LLM and of the run (not for the LLM itself).
    - `drift_along`, `drift_off`: how far a query's state moves from the LLM, along v1 (signed) and off it, in mean norms of the LLM's.

    `facts["bag_of_words"]` is the AUROC (value, low, high) of the words alone: a hidden state that does no better shows no understanding.
    """

    kind: ClassVar[str] = "comparison"

    def summary(self) -> Frame:
        """Metrics and runs as columns, a row per layer."""
        return self.frame.pivot_table(index="layer", columns=["metric", "run"], values="value", sort=False)

    def plot(self, metrics: Sequence[str] = ("auroc", "midpoint_accuracy", "drift_along"), axes: Any = None) -> Any:
        """One panel per metric over the layers, one line with its interval per run."""
        from guardlens import plots

        frame = self.frame
        order = {metric: i for i, metric in enumerate(metrics)}
        frame = frame[frame["metric"].isin(order)].sort_values("metric", key=lambda names: names.map(order), kind="stable")
        return plots.layer_curves(frame, axes=axes)


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
        MismatchError: The LLM's run shows an image; other queries, hook, layers or width; or directions of another model or hook.
        NumericsError: Too few groups of queries for five folds.
    """
    runs = [llm, *([vlm] if isinstance(vlm, Activations) else vlm)]
    require_labels(llm.queries)
    require_same_model(
        f"the directions {directions.method!r}", directions.provenance.model, *(run.provenance.model for run in (llm, *runs))
    )
    _require_text(llm)
    for run in runs:
        _require_comparable(llm, run, directions)
    groups = np.array([_group(query) for query in llm.queries])
    counts = resample_counts(len(groups), groups, draws)
    own: dict[tuple[str, int], Measured] = {}
    rows = [row for run in runs for row in _rows(llm, run, directions, groups, counts, own)]
    words = sep.bag_of_words_scores([query.text for query in llm.queries], llm.harmful, groups)
    surface = percentile(sep.auroc(words, llm.harmful), sep.bootstrap_auroc(words, llm.harmful, counts), len(groups))
    facts = {
        "bag_of_words": [surface.value, surface.low, surface.high],
        "directions": directions.method,
        "runs": [_name(run, llm) for run in runs],
        "models": [run.provenance.model for run in runs],
        "n_groups": len(set(groups.tolist())),
    }
    return Comparison.from_rows(rows, facts=facts, provenance=llm.provenance)


def _rows(
    llm: Activations,
    run: Activations,
    directions: Directions,
    groups: Shaped[np.ndarray, "query"],
    counts: Int[np.ndarray, "draw query"],
    own: dict[tuple[str, int], Measured],
) -> Iterator[dict[str, Any]]:
    """The rows of one run. The LLM's own values, which come first, are kept in `own` for the changes of the others."""
    for layer in llm.layers:
        for metric, (value, resampled) in _metrics(llm, run, layer, directions, groups, counts):
            interval = percentile(value, resampled, len(groups))
            change = _change((value, resampled), own.get((metric, layer)), len(groups))
            if run is llm:
                own[metric, layer] = (value, resampled)
            yield {
                "metric": metric,
                "run": _name(run, llm),
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
    llm: Activations, run: Activations, layer: int, directions: Directions, groups: np.ndarray, counts: np.ndarray
) -> Iterator[tuple[str, Measured]]:
    labels, first = run.harmful, directions.at(layer)[0].double().numpy()
    threshold = float(directions.midpoints[directions.index(layer)])
    text, states = llm.at(layer).double().numpy(), run.at(layer).double().numpy()
    scores = states @ first
    yield "auroc", (sep.auroc(scores, labels), sep.bootstrap_auroc(scores, labels, counts))
    yield "d_prime", (sep.d_prime(scores, labels), sep.bootstrap_d_prime(scores, labels, counts))
    if np.isfinite(threshold):
        yield "midpoint_accuracy", _share((scores > threshold) == labels, counts)
    within, _ = sep.probe_accuracy(states, labels, groups)
    transferred = within if run is llm else sep.probe_accuracy(text, labels, groups, transfer=states)[1]
    assert transferred is not None
    yield "probe", _share(within, counts)
    yield "transfer", _share(transferred, counts)
    if run is not llm:
        cosine = sep.centroid_cosine(text, states, labels), sep.bootstrap_centroid_cosine(text, states, labels, counts)
        yield "centroid_cosine", cosine
        along, off, norm = sep.drift_terms(text, states, first)
        for name, term in (("drift_along", along), ("drift_off", off)):
            yield name, (float(term.mean() / norm.mean()), sep.bootstrap_mean(term, counts, per=norm))


def _share(correct: Bool[np.ndarray, "query"], counts: np.ndarray) -> Measured:
    return float(correct.mean()), sep.bootstrap_mean(correct, counts)


def _change(here: Measured, there: Measured | None, n: int) -> Interval:
    if there is None:
        return Interval(float("nan"), float("nan"), float("nan"), n)
    return percentile(here[0] - there[0], here[1] - there[1], n)


def _group(query: Query) -> str:
    return query.cluster or query.pair or query.id


def _name(run: Activations, llm: Activations) -> str:
    return f"{'LLM' if run is llm else 'VLM'}, {run.presentation}"


def _require_text(llm: Activations) -> None:
    """Presentations that show an image begin with its kind."""
    if llm.presentation.split()[0] in ("blank", "noise", "own") and not llm.presentation.endswith(WITHOUT_IMAGES):
        raise MismatchError(
            f"the run {llm.presentation!r} in the LLM's place",
            "the run without an image first",
            "compare(collect(model.llm, queries), collect(model, queries, presentation), directions)",
        )


def _require_comparable(llm: Activations, run: Activations, directions: Directions) -> None:
    require_same_space(f"the directions {directions.method!r}", directions.hook, run.hook)
    for what, here, there in (
        ("hook", run.hook, llm.hook),
        ("queries", [query.id for query in run.queries], [query.id for query in llm.queries]),
        ("layers", list(run.layers), list(llm.layers)),
        ("width", run.d_model, directions.d_model),
    ):
        if here != there:
            raise MismatchError(
                f"other {what} in the run {run.presentation!r}",
                f"the same {what} as in the LLM's run and the directions",
                "collect both alike",
            )
