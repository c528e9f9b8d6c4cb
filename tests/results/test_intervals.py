import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from guardlens.errors import NumericsError
from guardlens.results.intervals import (
    Interval,
    bootstrap,
    gap_closed,
    mean_difference,
    percentile,
    proportion,
    require_paired,
    resample_counts,
    wilson,
)
from guardlens.results.significance import holm, mcnemar


def flags(ones: int, n: int) -> np.ndarray:
    return np.arange(n) < ones


@pytest.mark.parametrize(("ones", "low", "high"), [(15, 9.3, 23.3), (34, 25.5, 43.7), (0, 0.0, 3.7), (5, 2.2, 11.2)])
def test_wilson_meets_the_published_anchors(ones, low, high):
    interval = wilson(ones, 100)
    assert (round(100 * interval.low, 1), round(100 * interval.high, 1)) == (low, high)


@given(st.integers(1, 400), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_equals_scipy(n, data, level):
    ones = data.draw(st.integers(0, n))
    reference = stats.binomtest(ones, n).proportion_ci(level, method="wilson")
    interval = wilson(ones, n, level)
    assert (interval.low, interval.high) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert interval.low <= interval.value <= interval.high


def test_wilson_of_nothing_is_undefined_and_of_nonsense_an_error():
    assert math.isnan(wilson(0, 0).value)
    with pytest.raises(NumericsError, match=r"Found 5 successes among 4 items\.\nExpected a number from 0 to 4\."):
        wilson(5, 4)
    with pytest.raises(NumericsError, match=r"Found level 95\.0\."):
        wilson(1, 4, level=95.0)


def test_intervals_are_readable():
    assert str(wilson(15, 100)) == "0.15 [0.09, 0.23] (n=100)"
    assert wilson(15, 100).percent() == "15.0 % [9.3, 23.3]"
    assert str(Interval(math.nan, math.nan, math.nan, 7)) == "undefined (n=7)"
    assert Interval(math.nan, math.nan, math.nan, 7).percent() == "undefined"
    assert str(Interval(0.5, math.nan, math.nan, 7)) == "0.50 [undefined] (n=7)"
    assert wilson(0, 100).percent() == "0.0 % [0.0, 3.7]"


def test_intervals_take_the_format_of_a_number():
    interval = Interval(0.5, -0.25, 0.75, 8)
    assert f"{interval:.1f}" == "0.5 [-0.2, 0.8]" and f"{interval:+.0%}" == "+50 % [-25, +75]" and f"{interval}" == str(interval)
    assert f"{Interval(-0.001, -0.001, 0.5, 8):.2f}" == "-0.00 [-0.00, 0.50]"
    assert f"{Interval(0.5, math.nan, math.nan, 8):.1%}" == "50.0 % [undefined]" and f"{Interval.undefined(8):.1%}" == "undefined"


def test_an_interval_becomes_columns():
    assert Interval(0.5, 0.25, 0.75, 8).columns() == {"value": 0.5, "low": 0.25, "high": 0.75}
    assert list(Interval(0.5, 0.25, 0.75, 8).columns("asr", prefix="asr_")) == ["asr", "asr_low", "asr_high"]


def test_proportion_of_independent_items_is_wilson():
    outcomes = flags(15, 100)
    assert proportion(outcomes) == wilson(15, 100)
    assert proportion(outcomes, clusters=np.arange(100)) == wilson(15, 100)
    assert math.isnan(proportion(np.zeros(0, bool)).value)


def test_pure_clusters_widen_the_interval_as_if_they_were_single_items():
    outcomes, clusters = np.repeat(flags(30, 100), 4), np.repeat(np.arange(100), 4)
    clustered, single = proportion(outcomes, clusters), proportion(outcomes)
    assert clustered.n == 400 and clustered.value == 0.3
    assert clustered.high - clustered.low > 1.8 * (single.high - single.low)
    assert (clustered.low, clustered.high) == pytest.approx((wilson(30, 100).low, wilson(30, 100).high), abs=0.012)


def test_clusters_are_named_freely_and_need_not_be_equal_or_sorted():
    names = np.array(["b", "a", "b", "c", "a", "a"])
    outcomes = np.array([True, False, True, False, False, True])
    order = np.array([3, 0, 5, 2, 4, 1])
    assert proportion(outcomes, names) == proportion(outcomes[order], names[order])


@pytest.mark.parametrize("outcome", [False, True])
def test_where_a_bootstrap_has_no_width_the_clusters_count(outcome):
    interval = proportion(np.full(40, outcome), np.repeat(np.arange(10), 4))
    reference = wilson(10 * outcome, 10)
    assert (interval.value, interval.low, interval.high, interval.n) == (outcome, reference.low, reference.high, 40)


def test_clusters_of_one_share_have_the_width_of_one_item_each():
    interval = proportion(np.tile([True, False], 10), np.repeat(np.arange(10), 2))
    assert (interval.low, interval.high) == (wilson(5, 10).low, wilson(5, 10).high)


def test_cluster_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(60), 3)
    rates = rng.beta(2, 4, size=(80, 60))
    covered = [(interval := proportion(rng.random(180) < np.repeat(rate, 3), clusters)).low <= 1 / 3 <= interval.high for rate in rates]
    assert 0.88 <= np.mean(covered) <= 0.99


def test_mean_difference_is_the_paired_one():
    rng = np.random.default_rng(0)
    first = rng.normal(size=300) * 10
    second = first + 1 + rng.normal(size=300)
    interval = mean_difference(first, second)
    reference = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert interval.value == pytest.approx((second - first).mean())
    assert (interval.low, interval.high) == pytest.approx((reference.low, reference.high), abs=0.02)
    assert mean_difference(flags(10, 40), flags(30, 40)).value == 0.5


def test_unpaired_arms_are_refused():
    with pytest.raises(NumericsError, match=r"Found 3 and 4 items\.\nExpected paired arms of equal length\.\nNext: align both arms"):
        require_paired(np.zeros(3), np.zeros(4))  # the public doors are met by the shape check of the tests first
    with pytest.raises(NumericsError, match="3 cluster labels for 4 items"):
        resample_counts(4, np.arange(3))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_equals_the_exact_binomial_test(pairs):
    first, second = np.array(pairs).T
    result = mcnemar(first, second)
    assert (result.b, result.c) == (sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))
    expected = stats.binomtest(result.b, result.b + result.c, 0.5).pvalue if result.b + result.c else 1.0
    assert result.p == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("b", "c", "p"), [(6, 0, 0.031), (5, 0, 0.063), (12, 3, 0.035)])
def test_mcnemar_meets_the_published_anchors(b, c, p):
    first = np.concatenate([np.ones(b, bool), np.zeros(c, bool)])
    assert mcnemar(first, ~first).p == pytest.approx(p, abs=5.1e-4)
    assert str(mcnemar(first, ~first)).startswith(f"{b} : {c} discordant")


def test_gap_closed_is_one_at_the_level_of_text_and_zero_without_a_defence():
    text, image, defended = flags(15, 100), flags(55, 100), flags(25, 100)
    assert gap_closed(text, image, text).value == 1
    assert gap_closed(text, image, image) == Interval(0.0, 0.0, 0.0, 100)
    interval = gap_closed(text, image, defended)
    assert interval.value == pytest.approx(0.75)
    assert interval.low < 0.75 < interval.high <= 1


def test_gap_closed_interval_equals_a_plain_bootstrap():
    rng = np.random.default_rng(1)
    text, image, defended = (rng.random(120) < rate for rate in (0.1, 0.6, 0.3))

    def ratio(i):
        return (image[i].mean() - defended[i].mean()) / (image[i].mean() - text[i].mean())

    plain, fast = bootstrap(ratio, 120, draws=4000), gap_closed(text, image, defended)
    assert (fast.value, fast.low, fast.high) == pytest.approx((plain.value, plain.low, plain.high), abs=0.02)


@pytest.mark.parametrize("image", [16, 15, 5])
def test_gap_closed_is_undefined_without_a_gap(image):
    interval = gap_closed(flags(15, 100), np.roll(flags(image, 100), 50), flags(2, 100))
    assert math.isnan(interval.value) and math.isnan(interval.low) and math.isnan(interval.high)
    assert interval.percent() == "undefined"


def test_holm_meets_a_hand_computed_family():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])
    assert holm(np.array([])).shape == (0,)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_order_and_lies_between_p_and_bonferroni(values):
    p = np.array(values)
    adjusted = holm(p)
    assert np.all(adjusted >= p) and np.all(adjusted <= np.minimum(1, p * len(p)) + 1e-12)
    assert np.all(np.diff(adjusted[np.argsort(p)]) >= 0)


def test_holm_refuses_undefined_tests():
    with pytest.raises(NumericsError, match="drop the tests that were undefined"):
        holm(np.array([0.1, np.nan]))


def test_bootstrap_of_a_mean_is_near_student():
    values = np.random.default_rng(2).normal(3, 2, size=400)
    interval = bootstrap(lambda i: values[i].mean(), 400)
    half = 1.96 * values.std() / 20
    assert (interval.low, interval.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert interval == bootstrap(lambda i: values[i].mean(), 400)
    assert interval != bootstrap(lambda i: values[i].mean(), 400, seed=1)


def test_bootstrap_keeps_clusters_whole():
    clusters = np.array([0, 1, 1, 2, 2, 2])
    counts = resample_counts(6, clusters, draws=200)
    assert np.all(counts[:, 1] == counts[:, 2]) and np.all(counts[:, 3] == counts[:, 5])
    assert np.all(counts[:, [0, 1, 3]].sum(axis=1) == 3)
    seen = []
    bootstrap(lambda i: seen.append(np.bincount(i, minlength=6)) or 0.0, 6, clusters, draws=200)
    assert np.array_equal(seen[:-1], counts)


def test_few_undefined_draws_are_dropped_and_many_undo_the_interval():
    draws = np.arange(100.0)
    draws[:5] = np.nan
    assert percentile(50.0, draws, 10).low == pytest.approx(np.quantile(np.arange(5, 100), 0.025))
    draws[5] = np.nan
    assert math.isnan(percentile(50.0, draws, 10).low) and percentile(50.0, draws, 10).value == 50


def test_nothing_to_resample_is_said():
    with pytest.raises(NumericsError, match=r"Found no items to resample\."):
        resample_counts(0)


@pytest.mark.parametrize("module", ["results.intervals", "results.significance", "experiments.separability", "results.plots"])
def test_heavy_libraries_load_lazily(module):
    heavy = "{'torch', 'sklearn', 'scipy', 'pandas', 'matplotlib'}"
    code = (
        f"import sys, guardlens.errors; before = set(sys.modules); import guardlens.{module}; print({heavy} & (set(sys.modules) - before))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


@pytest.mark.parametrize("draws", [0, -1, 1.5, True, None])
def test_draws_that_are_none(draws, unchecked):
    for resampled in (lambda: resample_counts(3, draws=draws), lambda: bootstrap(np.mean, 3, draws=draws)):
        with pytest.raises(NumericsError, match=r"Found draws=.*\nExpected a whole number, 1 or more"):
            resampled()


@pytest.mark.parametrize(("successes", "n"), [(2.5, 5), (-1, 5), (1, -5), (True, 5), (6, 5), ("2", 5)])
def test_counts_that_are_none(successes, n, unchecked):
    with pytest.raises(NumericsError):
        wilson(successes, n)
    assert wilson(np.int64(2), np.uint8(5)) == wilson(2, 5)


@pytest.mark.parametrize("odd", [[0.5, 1.0], [1.0, float("nan")], ["refused", "answered"], [2, 1], [None, True], [[True], [False]]])
def test_outcomes_that_are_neither_true_nor_false(odd, unchecked):
    whole, odd = np.array([True, False]), np.array(odd)
    for test in (proportion, lambda arm: mcnemar(whole, arm), lambda arm: mcnemar(arm, whole), lambda arm: gap_closed(whole, arm, whole)):
        with pytest.raises(NumericsError, match="outcomes of"):
            test(odd)
    assert mcnemar(np.array([1, 0]), np.array([0.0, 0.0])) == mcnemar(whole, ~whole & whole)


@pytest.mark.parametrize("clusters", [np.array([1.0, float("nan"), 2.0]), np.array(["a", float("nan"), "b"], object)])
def test_clusters_that_are_missing(clusters, unchecked):
    with pytest.raises(NumericsError, match="a cluster label that is nan"):
        proportion(np.array([True, False, True]), clusters)


def test_nothing_and_a_single_item():
    none, one = np.zeros(0, bool), np.ones(1, bool)
    for undefined in (proportion(none), mean_difference(none, none), gap_closed(none, none, none), percentile(0.5, np.zeros(0), 0)):
        assert np.isnan(undefined.low) and undefined.n == 0
    assert mcnemar(none, none).p == mcnemar(one, one).p == 1
    single = stats.binomtest(1, 1).proportion_ci(method="wilson")
    assert (proportion(one).low, proportion(one).high) == pytest.approx((single.low, single.high))
    assert mean_difference(one, ~one).value == -1 and gap_closed(~one, one, ~one).value == 1


@given(st.data())
def test_the_order_of_the_items_does_not_matter(data):
    n = data.draw(st.integers(1, 12))
    text, image, defended = (np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for _ in range(3))
    order = np.array(data.draw(st.permutations(range(n))))
    first, shuffled = mcnemar(image, defended), mcnemar(image[order], defended[order])
    assert first == shuffled
    assert first.p == pytest.approx(stats.binomtest(first.b, first.b + first.c).pvalue if first.b + first.c else 1)
    assert proportion(defended) == proportion(defended[order])
    closed, again = gap_closed(text, image, defended), gap_closed(text[order], image[order], defended[order])
    assert closed.value == pytest.approx(again.value, nan_ok=True)
    if not np.isnan(closed.value):
        assert closed.value == pytest.approx((image.mean() - defended.mean()) / (image.mean() - text.mean()))
