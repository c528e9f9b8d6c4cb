"""How well hidden states tell harmful from harmless, and how far two runs of the same queries lie apart.

The metrics take arrays: scores [query] or states [query d_model], with labels [query] (True is harmful). Every metric has a twin,
`bootstrap_*`, that takes the counts of `intervals.resample_counts` and returns the metric in each resample. The plain metric is its twin on
the queries as they are, so there is one implementation. If a class is missing, a metric is undefined: nan.

Source: Hanley & McNeil 1982 (AUROC); Fisher 1936; Alain & Bengio 2016, arXiv 1610.01644 (probes); docs/explanation/statistics.md.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from guardlens.errors import NumericsError, as_count
from guardlens.results.intervals import ratio

FLAT = 1e-12
"""Scores count as constant if their spread is below this share of their size, as rounding in float64 makes it."""


def auroc(scores: Float[np.ndarray, "query"], labels: Bool[np.ndarray, "query"]) -> float:
    """P(a harmful score is above a harmless one), ties counted ½: 0.5 is chance, 1 perfect. Monotone maps of the scores don't change it.

    Raises:
        NumericsError: A score is not finite.

    Examples:
        >>> from guardlens.experiments.separability import auroc
        >>> auroc(np.array([0.1, 0.4, 0.6, 0.9]), np.array([False, True, False, True]))
        0.75
    """
    return float(bootstrap_auroc(scores, labels, _once(labels))[0])


def bootstrap_auroc(
    scores: Float[np.ndarray, "query"], labels: Bool[np.ndarray, "query"], counts: Int[np.ndarray, "draw query"]
) -> Float[np.ndarray, "draw"]:
    """AUROC in each resample. The scores are sorted once for all draws; each draw sums the harmless weight below each harmful score."""
    _require_finite("scores", scores)
    _require_labels(labels, len(scores))
    order = np.argsort(scores, kind="stable")
    starts = np.unique(scores[order], return_index=True)[1]
    harmful = np.add.reduceat(np.where(labels, counts, 0)[:, order], starts, axis=1)
    harmless = np.add.reduceat(np.where(labels, 0, counts)[:, order], starts, axis=1)
    wins = harmful * (harmless.cumsum(axis=1) - harmless / 2)
    return ratio(wins.sum(axis=1), harmful.sum(axis=1) * harmless.sum(axis=1))


def d_prime(scores: Float[np.ndarray, "query"], labels: Bool[np.ndarray, "query"]) -> float:
    """(μ⁺ - μ⁻) / √((σ₊² + σ₋²) / 2): the signed distance of the class means in sample standard deviations (n - 1).

    It is nan if a class has fewer than two queries, or if neither class spreads.

    Raises:
        NumericsError: A score is not finite.

    Examples:
        >>> from guardlens.experiments.separability import d_prime
        >>> round(d_prime(np.array([0.0, 2.0, 4.0, 6.0]), np.array([False, False, True, True])), 2)
        2.83
    """
    return float(bootstrap_d_prime(scores, labels, _once(labels))[0])


def bootstrap_d_prime(
    scores: Float[np.ndarray, "query"], labels: Bool[np.ndarray, "query"], counts: Int[np.ndarray, "draw query"]
) -> Float[np.ndarray, "draw"]:
    """d′ in each resample, from weighted sums of the scores and their squares."""
    _require_finite("scores", scores)
    _require_labels(labels, len(scores))
    scores = np.asarray(scores, np.float64)
    centred = scores - scores.mean()
    harmful, harmless = (_moments(centred[chosen], counts[:, chosen]) for chosen in (labels, ~labels))
    variance = (harmful[1] + harmless[1]) / 2
    flat = variance <= (FLAT * np.abs(scores).max()) ** 2
    return ratio(harmful[0] - harmless[0], np.sqrt(np.where(flat, 0, variance)))


def midpoint_accuracy(scores: Float[np.ndarray, "query"], labels: Bool[np.ndarray, "query"], threshold: float) -> float:
    """Share of queries on the right side of a threshold (harmful strictly above), where a gate would decide rightly.

    Take the threshold from the run in which the direction was found (the midpoint of its class means): that shows a drift, to which AUROC
    is blind. For an interval: `bootstrap_mean((scores > threshold) == labels, counts)`.

    Raises:
        NumericsError: A score is not finite.
    """
    _require_finite("scores", scores)
    _require_labels(labels, len(scores))
    return float(((scores > threshold) == labels).mean())


def bootstrap_mean(
    values: Shaped[np.ndarray, "query"], counts: Int[np.ndarray, "draw query"], per: Float[np.ndarray, "query"] | None = None
) -> Float[np.ndarray, "draw"]:
    """Mean of the values (booleans count 0 and 1) in each resample, in units of the mean of `per` if that is given."""
    unit = np.ones(len(values)) if per is None else np.asarray(per, np.float64)
    return ratio(counts @ np.asarray(values, np.float64), counts @ unit)


def probe_accuracy(
    states: Float[np.ndarray, "query d_model"],
    labels: Bool[np.ndarray, "query"],
    groups: Shaped[np.ndarray, "query"],
    transfer: Float[np.ndarray, "query d_model"] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> tuple[Bool[np.ndarray, "query"], Bool[np.ndarray, "query"] | None]:
    """Which queries a linear probe classifies correctly that has seen none of their group, in its own run and in another one.

    The probe is an L2 logistic regression (C = 1) on standardised states, trained on `states` in cross-validation by group, stratified by
    label. The same probe classifies the held-out queries from `states` and from `transfer`: does a probe of text hold beside an image? The
    scale of a state carries meaning, so `transfer` is standardised by the training states.

    Args:
        states: The run that trains the probe (the LLM's), shape [query d_model].
        labels: True is harmful, shape [query].
        groups: Queries of one group (a pair, topic or template) are never on both sides of a split, shape [query].
        transfer: The same queries in another run (the VLM's), shape [query d_model].
        folds: The number of folds; each label must occur in at least as many groups.
        seed: The seed of the shuffle of groups.

    Returns:
        For each query whether it is classified correctly from `states`, and from `transfer` (None without it). The mean is the accuracy;
        `bootstrap_mean` gives its resamples.

    Raises:
        NumericsError: A state is not finite, or there are too few groups.

    Source: Alain & Bengio 2016, arXiv 1610.01644.
    """
    runs = [states] if transfer is None else [states, transfer]
    correct = probe_correct(states, labels, held_out(labels, groups, folds, seed), runs)
    return correct[0], (correct[1] if transfer is not None else None)


def probe_correct(
    states: Float[np.ndarray, "query d_model"],
    labels: Bool[np.ndarray, "query"],
    splits: Sequence[tuple[np.ndarray, np.ndarray]],
    runs: Sequence[Float[np.ndarray, "query d_model"]],
) -> Bool[np.ndarray, "run query"]:
    """Like `probe_accuracy`, with one training for many runs: which queries of each run the probe of `states` classifies correctly.

    Args:
        states: The run that trains the probe.
        labels: True is harmful.
        splits: The splits of `held_out`, the same for all probes that are compared.
        runs: The runs to classify, which may include `states`.

    Raises:
        NumericsError: A state is not finite.
    """
    from threadpoolctl import threadpool_limits

    for run in (states, *runs):
        _require_finite("states", run)
    runs = [np.asarray(run, np.float64) for run in runs]
    correct = np.zeros((len(runs), len(labels)), bool)
    with threadpool_limits(1, "blas"):  # thousands of products too small to share: threads would only wait for each other
        for train, test in splits:
            predict = _probe(np.asarray(states[train], np.float64), labels[train])
            for row, run in zip(correct, runs, strict=True):
                row[test] = predict(run[test]) == labels[test]
    return correct


def held_out(
    labels: Bool[np.ndarray, "query"], groups: Shaped[np.ndarray, "query"], folds: int = 5, seed: int = 0
) -> list[tuple[Int[np.ndarray, "train"], Int[np.ndarray, "test"]]]:
    """Indices of training and test queries, fold by fold, stratified by label; no group is on both sides.

    Raises:
        NumericsError: A label occurs in fewer groups than there are folds, or there are fewer than two folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    folds = as_count(folds, "folds", NumericsError, "leave it out for five", least=2)
    _require_labels(labels, len(groups))
    fewest = min(len(np.unique(groups[chosen])) for chosen in (labels, ~labels))
    if fewest < folds:
        expected = f"each label in at least {folds} groups, one per fold"
        found = f"a label that occurs in {fewest} group{'s' if fewest != 1 else ''}"
        raise NumericsError(found, expected, "collect more pairs, or queries of more clusters")
    return list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels, groups))


def centroid_cosine(
    a: Float[np.ndarray, "query d_model"], b: Float[np.ndarray, "query d_model"], labels: Bool[np.ndarray, "query"]
) -> float:
    """Cosine between the class differences (μ⁺ - μ⁻) of two runs: 1 if harm points the same way in both, 0 if unrelated.

    It compares differences, since the centred centroids of two classes are opposite by construction.

    Raises:
        NumericsError: A state is not finite.
    """
    return float(bootstrap_centroid_cosine(a, b, labels, _once(labels))[0])


def bootstrap_centroid_cosine(
    a: Float[np.ndarray, "query d_model"],
    b: Float[np.ndarray, "query d_model"],
    labels: Bool[np.ndarray, "query"],
    counts: Int[np.ndarray, "draw query"],
) -> Float[np.ndarray, "draw"]:
    """The cosine between the class differences in each resample (resampled together in both runs)."""
    first, second = (_class_difference(run, labels, counts) for run in (a, b))
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return ratio((first * second).sum(axis=1), norms)


def drift(
    a: Float[np.ndarray, "query d_model"], b: Float[np.ndarray, "query d_model"], direction: Float[np.ndarray, "d_model"]
) -> tuple[float, float]:
    """How far states move from run `a` to run `b`, along the direction (signed) and off it, in units of the mean norm of `a`.

    Raises:
        NumericsError: A state is not finite, or the direction or all states are zero.
    """
    along, off, norm = drift_terms(a, b, direction)
    if not norm.any():
        raise NumericsError("The states are all zero.", "", "check the site they were read from")
    return float(along.mean() / norm.mean()), float(off.mean() / norm.mean())


def drift_terms(
    a: Float[np.ndarray, "query d_model"], b: Float[np.ndarray, "query d_model"], direction: Float[np.ndarray, "d_model"]
) -> tuple[Float[np.ndarray, "query"], Float[np.ndarray, "query"], Float[np.ndarray, "query"]]:
    """For each query, (b - a) along the unit direction, the norm of the remainder, and the norm of a.

    For an interval: `bootstrap_mean(along, counts, per=norm)`.
    """
    a, b, direction = (np.asarray(array, np.float64) for array in (a, b, direction))
    _require_finite("states", a)
    _require_finite("states", b)
    if not np.linalg.norm(direction) > 0:
        raise NumericsError("a direction of norm 0", "", "check the rank of the data it was fitted to")
    unit = direction / np.linalg.norm(direction)
    along = (b - a) @ unit
    off = np.linalg.norm(b - a - np.outer(along, unit), axis=1)
    return along, off, np.linalg.norm(a, axis=1)


def bag_of_words_auroc(
    texts: Sequence[str], labels: Bool[np.ndarray, "query"], groups: Shaped[np.ndarray, "query"], seed: int = 0, folds: int = 5
) -> float:
    """AUROC of a bag-of-words classifier: how far the words alone tell the classes apart, which is the floor for every hidden state.

    Raises:
        NumericsError: Too few groups for the folds.
    """
    return auroc(bag_of_words_scores(texts, labels, groups, seed, folds), labels)


def bag_of_words_scores(
    texts: Sequence[str], labels: Bool[np.ndarray, "query"], groups: Shaped[np.ndarray, "query"], seed: int = 0, folds: int = 5
) -> Float[np.ndarray, "query"]:
    """Log-odds of harm of each text by a logistic regression on word counts that has seen none of its group (pooled over folds)."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    scores = np.empty(len(labels))
    for train, test in held_out(labels, groups, folds, seed):
        model = make_pipeline(CountVectorizer(token_pattern=r"\w+"), LogisticRegression(max_iter=1000))
        training_texts = [str(texts[i]) for i in train]
        if not any(re.search(r"\w", text) for text in training_texts):
            scores[test] = 0.0  # texts without words tell nothing
            continue
        model.fit(training_texts, labels[train])
        scores[test] = model.decision_function([texts[i] for i in test])
    return scores


def _probe(states: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function that predicts labels of states: a logistic regression on states that are standardised by the training states."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(states)
    probe = LogisticRegression(max_iter=1000).fit(scaler.transform(states), labels)
    return lambda others: probe.predict(scaler.transform(others))


def _moments(values: np.ndarray, counts: np.ndarray) -> tuple[Float[np.ndarray, "draw"], Float[np.ndarray, "draw"]]:
    """Weighted mean and sample variance of one class in each resample. The values are shifted to a mean near 0 for precision."""
    weight = counts.sum(axis=1)
    shift = values.mean() if len(values) else 0.0
    mean = ratio(counts @ (values - shift), weight)
    variance = ratio(counts @ (values - shift) ** 2 - weight * mean**2, weight - 1)
    return mean + shift, np.maximum(variance, 0)


def _class_difference(states: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> Float[np.ndarray, "draw d_model"]:
    _require_finite("states", states)
    _require_labels(labels, len(states))
    states = np.asarray(states, np.float64)
    harmful, harmless = (ratio(counts[:, c] @ states[c], counts[:, c].sum(axis=1, keepdims=True)) for c in (labels, ~labels))
    return harmful - harmless


def _once(labels: np.ndarray) -> Int[np.ndarray, "1 query"]:
    return np.ones((1, len(labels)), int)


def _require_labels(labels: np.ndarray, n: int) -> None:
    """Refuse labels that numpy would take for indices."""
    labels = np.asarray(labels)
    if labels.dtype != bool or labels.shape != (n,):
        raise NumericsError(f"labels of {labels.dtype} and shape {labels.shape} for {n} queries", "a boolean for each", "say labels == 1")


def _require_finite(name: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        place = int(np.argwhere(~np.isfinite(values))[0][0])
        raise NumericsError(f"{name} that are not finite, first at query {place}", "finite numbers", "look at that query, or use float32")
