import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info, threadpool_limits

from guardlens.errors import NumericsError
from guardlens.experiments import separability
from guardlens.experiments.separability import (
    auroc,
    bag_of_words_auroc,
    bag_of_words_scores,
    bootstrap_auroc,
    bootstrap_centroid_cosine,
    bootstrap_d_prime,
    bootstrap_mean,
    centroid_cosine,
    d_prime,
    drift,
    drift_terms,
    held_out,
    midpoint_accuracy,
    probe_accuracy,
    probe_correct,
)
from guardlens.results.intervals import bootstrap, percentile, resample_counts


@st.composite
def scored(draw):
    """Scores with ties, and labels of both classes."""
    scores = draw(st.lists(st.integers(-6, 6), min_size=2, max_size=40))
    labels = draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)).filter(lambda flags: 0 < sum(flags) < len(flags)))
    return np.array(scores, float), np.array(labels)


def two_classes(n=120, d=16, gap=3.0, seed=0):
    """States whose classes lie `gap` apart on the first axis; pairs are groups."""
    states = np.random.default_rng(seed).normal(size=(n, d))
    labels = np.arange(n) % 2 == 0
    states[labels, 0] += gap
    return states, labels, np.arange(n) // 2


@given(scored())
def test_auroc_equals_scikit_learn(case):
    scores, labels = case
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@given(scored(), st.sampled_from([np.exp, np.arctan, lambda x: 3 * x - 1, lambda x: x**3]))
def test_auroc_is_unmoved_by_monotone_maps(case, monotone):
    scores, labels = case
    assert auroc(monotone(scores), labels) == auroc(scores, labels)


@given(scored())
def test_auroc_of_flipped_labels_or_scores_is_the_complement(case):
    scores, labels = case
    assert auroc(scores, ~labels) == pytest.approx(1 - auroc(scores, labels), abs=1e-12)
    assert auroc(-scores, labels) == pytest.approx(1 - auroc(scores, labels), abs=1e-12)
    assert d_prime(scores, ~labels) == pytest.approx(-d_prime(scores, labels), nan_ok=True)


def test_auroc_of_ties_is_half_and_of_one_class_undefined():
    assert auroc(np.zeros(6), np.arange(6) < 3) == 0.5
    assert math.isnan(auroc(np.arange(3.0), np.ones(3, bool)))
    with pytest.raises(NumericsError, match=r"Found scores that are not finite, first at query 1\."):
        auroc(np.array([0.0, np.nan]), np.array([True, False]))


def test_d_prime_in_closed_form():
    scores, labels = np.array([1.0, 2, 3, 7, 9, 11]), np.arange(6) >= 3
    assert d_prime(scores, labels) == pytest.approx((9 - 2) / math.sqrt((4 + 1) / 2))
    assert d_prime(1e6 + 1e-3 * scores, labels) == pytest.approx(d_prime(scores, labels), rel=1e-4)


def test_d_prime_of_scores_without_spread_is_undefined():
    labels = np.arange(6) < 3
    assert math.isnan(d_prime(np.full(6, 0.1), labels))
    assert math.isnan(d_prime(np.arange(2.0), np.array([True, False])))


def test_midpoint_accuracy_sees_the_shift_that_auroc_cannot():
    states, labels, _ = two_classes(gap=6.0)
    scores = states[:, 0]
    assert midpoint_accuracy(scores, labels, 3.0) > 0.98
    assert midpoint_accuracy(scores - 9, labels, 3.0) == 0.5
    assert auroc(scores - 9, labels) == auroc(scores, labels)
    assert midpoint_accuracy(np.zeros(4), np.array([True, False, False, False]), 0.0) == 0.75


@settings(max_examples=20)
@given(scored(), st.integers(0, 100))
def test_resampled_metrics_equal_the_metrics_of_the_resample(case, seed):
    scores, labels = case
    for row in (counts := resample_counts(len(scores), draws=4, seed=seed)):
        chosen = np.repeat(np.arange(len(scores)), row)
        expected = auroc(scores[chosen], labels[chosen]), d_prime(scores[chosen], labels[chosen])
        found = bootstrap_auroc(scores, labels, row[None])[0], bootstrap_d_prime(scores, labels, row[None])[0]
        assert found == pytest.approx(expected, nan_ok=True, abs=1e-9)
    means = [np.repeat(scores, row).mean() for row in counts]
    assert bootstrap_mean(scores, counts) == pytest.approx(means)


def test_the_quick_bootstrap_equals_the_plain_one():
    states, labels, pairs = two_classes(gap=1.0)
    scores, counts = states[:, 0], resample_counts(120, pairs)
    quick = percentile(auroc(scores, labels), bootstrap_auroc(scores, labels, counts), 120)
    plain = bootstrap(lambda i: auroc(scores[i], labels[i]), 120, pairs)
    assert (quick.value, quick.low, quick.high) == pytest.approx((plain.value, plain.low, plain.high))
    assert quick.low < 0.76 < quick.high  # Φ(1/√2)


def test_probe_accuracy_equals_scikit_learns_own_loop():
    states, labels, pairs = two_classes(gap=1.5)
    other = states * 2 + 1
    correct, transferred = probe_accuracy(states, labels, pairs, other, folds=4, seed=3)
    for train, test in StratifiedGroupKFold(4, shuffle=True, random_state=3).split(states, labels, pairs):
        assert not set(pairs[train]) & set(pairs[test])
        model = make_pipeline(StandardScaler(), LogisticRegression()).fit(states[train], labels[train])
        assert np.array_equal(correct[test], model.predict(states[test]) == labels[test])
        assert np.array_equal(transferred[test], model.predict(other[test]) == labels[test])


def test_one_training_serves_many_runs():
    """Against scikit-learn's pipeline, fitted anew for each run and fold; and the folds are those of `held_out`, whatever the run."""
    states, labels, pairs = two_classes(gap=1.0)
    runs = [states, states * 2 + 1, np.roll(states, 1, axis=1), two_classes(gap=1.0, seed=5)[0].astype(np.float32)]
    found = probe_correct(states, labels, held_out(labels, pairs, seed=2), runs)
    expected = np.zeros_like(found)
    for row, run in zip(expected, runs, strict=True):
        for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=2).split(states, labels, pairs):
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(states[train], labels[train])
            row[test] = model.predict(run[test]) == labels[test]
    assert np.array_equal(found, expected)
    assert len({tuple(row) for row in found.tolist()}) > 2, "the runs differ, or nothing was compared"
    with pytest.raises(NumericsError, match="first at query 3"):
        probe_correct(states, labels, held_out(labels, pairs), [np.where(np.arange(120)[:, None] == 3, np.nan, states)])


def test_a_probe_has_one_thread_of_blas_and_leaves_them_as_they_were(monkeypatch):
    def threads():
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    (states, labels, pairs), probe, seen = two_classes(), separability._probe, []
    monkeypatch.setattr(separability, "_probe", lambda *given: seen.append(threads()) or probe(*given))
    with threadpool_limits(2, "blas"):
        probe_accuracy(states, labels, pairs)
        assert threads() == {2}
    assert seen == [{1}] * 5


def test_a_probe_finds_what_is_there_and_transfers_only_what_stays():
    states, labels, pairs = two_classes(gap=5.0)
    rotated = np.roll(states, 1, axis=1)
    correct, transferred = probe_accuracy(states, labels, pairs, rotated)
    assert correct.mean() > 0.95
    assert 0.3 < transferred.mean() < 0.7
    same, none = probe_accuracy(states, labels, pairs)
    assert np.array_equal(same, correct) and none is None


def test_a_probe_that_sees_its_groups_only_once_is_at_chance_on_group_noise():
    rng = np.random.default_rng(0)
    groups, labels = np.repeat(np.arange(40), 5), np.repeat(np.arange(40) % 2 == 0, 5)
    states = np.repeat(rng.normal(size=(40, 64)), 5, axis=0)  # 64 axes tell 40 groups apart; none tells the label
    assert 0.2 < probe_accuracy(states, labels, groups)[0].mean() < 0.8
    assert probe_accuracy(states, labels, np.arange(200))[0].mean() == 1.0


@pytest.mark.parametrize("labels", [[0, 1] * 6, [0.0, 1.0] * 6, ["harmful", "harmless"] * 6, [True, False] * 5])
def test_labels_that_numpy_would_take_for_indices(labels, unchecked):
    states, labels = np.random.default_rng(0).normal(size=(12, 3)), np.array(labels)
    for measure in (
        lambda: auroc(states[:, 0], labels),
        lambda: d_prime(states[:, 0], labels),
        lambda: midpoint_accuracy(states[:, 0], labels, 0.0),
        lambda: centroid_cosine(states, states, labels),
        lambda: held_out(labels, np.arange(12), folds=2),
    ):
        with pytest.raises(NumericsError, match="labels of"):
            measure()


@pytest.mark.parametrize("folds", [0, 1, 2.0, True, None])
def test_fewer_than_two_folds(folds, unchecked):
    with pytest.raises(NumericsError, match="Found folds="):
        held_out(np.arange(12) % 2 == 0, np.arange(12), folds)


def test_too_few_groups_are_said():
    states, labels, _ = two_classes(n=12)
    with pytest.raises(NumericsError) as caught:
        probe_accuracy(states, labels, np.arange(12) // 4)
    message = "Found a label that occurs in 3 groups.\nExpected each label in at least 5 groups, one per fold.\nNext: collect more pairs"
    assert str(caught.value).startswith(message)


def test_centroid_cosine_in_closed_form():
    labels = np.array([True, True, False, False])
    a = np.array([[1.0, 0], [3, 0], [0, 1], [0, -1]])
    b = np.array([[5.0, 5], [5, 5], [0, 0], [0, 0]]) + 100
    assert centroid_cosine(a, b, labels) == pytest.approx(math.sqrt(0.5))
    assert centroid_cosine(a, -a, labels) == pytest.approx(-1)
    assert math.isnan(centroid_cosine(a, np.ones((4, 2)), labels))


def test_resampled_centroid_cosine_equals_the_plain_one():
    (a, labels, pairs), b = two_classes(gap=2.0), two_classes(gap=1.0, seed=1)[0]
    counts = resample_counts(120, pairs, draws=30)
    expected = [centroid_cosine(a[i], b[i], labels[i]) for i in (np.repeat(np.arange(120), row) for row in counts)]
    assert bootstrap_centroid_cosine(a, b, labels, counts) == pytest.approx(expected)


def test_drift_in_closed_form():
    a = np.array([[2.0, 0, 0], [0, 4.0, 0]])
    b = a + np.array([-1.5, 3.0, 4.0])
    along, off = drift(a, b, np.array([10.0, 0, 0]))
    assert (along, off) == pytest.approx((-0.5, 5 / 3))
    assert drift(a, b, np.array([-1.0, 0, 0]))[0] == pytest.approx(0.5)
    terms = drift_terms(a, b, np.array([1.0, 0, 0]))
    assert bootstrap_mean(terms[0], np.array([[1, 1], [0, 2]]), per=terms[2]) == pytest.approx([-0.5, -1.5 / 4])


def test_drift_needs_a_direction_and_finite_states():
    states = np.ones((2, 3))
    with pytest.raises(NumericsError, match=r"Found a direction of norm 0\."):
        drift(states, states, np.zeros(3))
    with pytest.raises(NumericsError, match="first at query 1"):
        drift(states, np.array([[0.0, 0, 0], [0, np.inf, 0]]), np.ones(3))


def test_bag_of_words_sees_the_surface_and_nothing_else():
    labels, pairs = np.arange(80) % 2 == 0, np.arange(80) // 2
    telling = [f"how to {'x' if label else 'bake'} item{pair}" for label, pair in zip(labels, pairs, strict=True)]
    silent = [f"how to do item{pair}" for pair in pairs]
    assert bag_of_words_auroc(telling, labels, pairs) == 1.0
    assert bag_of_words_auroc(silent, labels, pairs) == pytest.approx(0.5, abs=0.1)
    assert bag_of_words_auroc(telling, labels, pairs, seed=1) == 1.0
    assert auroc(bag_of_words_scores(telling, labels, pairs), labels) == 1.0


def test_float32_states_are_computed_in_float64():
    states, labels, _ = two_classes()
    scores = (states[:, 0] * 1e-3 + 100).astype(np.float32)
    assert d_prime(scores, labels) == pytest.approx(d_prime(scores.astype(np.float64), labels), rel=1e-12)
