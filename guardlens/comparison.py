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
from guardlens.queries import WITHOUT_IMAGES, require_labels
from guardlens.sites import require_same_space
from guardlens.storage import require_same_model
from guardlens.tables import Frame, Table

Measured = tuple[float, Float[np.ndarray, "draw"]]
"""A value, and the value in each resample."""

Probes = dict[int, tuple[Bool[np.ndarray, "query"], Bool[np.ndarray, "query"]]]
"""Layer -> which queries of a run a probe gets right: the run's own one, and the LLM's."""


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
        from guardlens import plots

        frame = self.frame
        order = {metric: i for i, metric in enumerate(metrics)}
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
        MismatchError: The LLM's run shows an image; other queries, hook, layers or width; or directions of another model or hook.
        NumericsError: Too few groups of queries for five folds.

    Examples:
        >>> asked, shown = gl.collect(model.llm, queries), gl.collect(model, queries, grey)  # other queries than the directions'
        >>> gap = gl.compare(asked, shown, ssd, draws=200)
        >>> rows = gap.where(metric="midpoint_accuracy", layer=7).frame.set_index("run")
        >>> bool(rows["value"]["LLM, text"] > rows["value"]["VLM, blank grey"])  # the threshold of the text serves less well
        True
    """
    runs = [llm, *([vlm] if isinstance(vlm, Activations) else vlm)]
    require_labels(llm.queries)
    require_same_model(
        f"the directions {directions.method!r}", directions.provenance.model, *(run.provenance.model for run in (llm, *runs))
    )
    _require_text(llm)
    for run in runs:
        _require_comparable(llm, run, directions)
    groups = np.array([query.stands_with for query in llm.queries])
    counts = resample_counts(len(groups), groups, draws)
    own: dict[tuple[str, int], Measured] = {}
    probed = zip(runs, _probes(runs, groups), strict=True)
    rows = [row for run, probes in probed for row in _rows(llm, run, directions, probes, counts, own)]
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
    llm: Activations,
    run: Activations,
    directions: Directions,
    probes: Probes,
    counts: Int[np.ndarray, "draw query"],
    own: dict[tuple[str, int], Measured],
) -> Iterator[dict[str, Any]]:
    """The rows of one run. The LLM's own values, which come first, are kept in `own` for the changes of the others."""
    for layer in llm.layers:
        for metric, (value, resampled) in _metrics(llm, run, layer, directions, probes, counts):
            interval = percentile(value, resampled, counts.shape[1])
            change = _change((value, resampled), own.get((metric, layer)), counts.shape[1])
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
    llm: Activations, run: Activations, layer: int, directions: Directions, probes: Probes, counts: np.ndarray
) -> Iterator[tuple[str, Measured]]:
    labels, first = run.harmful, directions.at(layer)[0].double().numpy()
    threshold = float(directions.midpoints[directions.index(layer)])
    text, states = llm.at(layer).double().numpy(), run.at(layer).double().numpy()
    scores = states @ first
    yield "auroc", (sep.auroc(scores, labels), sep.bootstrap_auroc(scores, labels, counts))
    yield "d_prime", (sep.d_prime(scores, labels), sep.bootstrap_d_prime(scores, labels, counts))
    if np.isfinite(threshold):
        yield "midpoint_accuracy", _share((scores > threshold) == labels, counts)
    for name, correct in zip(("probe", "transfer"), probes[layer], strict=True):
        yield name, _share(correct, counts)
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
