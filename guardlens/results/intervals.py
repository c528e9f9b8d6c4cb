"""Every number with its uncertainty: proportions, paired differences, bootstrap intervals, corrected p-values.

Resampling is always of whole *clusters* (a query shown with several images, colours or seeds is one cluster), keeps all arms of an
item together, and starts from a fixed seed, so the same data give the same interval. Undefined is nan, never 0.

Source: Wilson 1927; McNemar 1947; Holm 1979; Efron & Tibshirani 1993 (percentile bootstrap).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from guardlens.errors import NumericsError, as_count

DRAWS = 10_000
"""Resamples for statistics that are computed for all draws at once."""


@dataclass(frozen=True)
class Interval:
    """A value and the interval that goes with it.

    Attributes:
        value: The estimate on the items as they are; nan where it is undefined.
        low: Lower bound; nan where the interval is undefined.
        high: Upper bound; nan where the interval is undefined.
        n: Number of items (not of clusters).
        level: Coverage that the interval aims at, between 0 and 1.

    Examples:
        >>> from guardlens.results.intervals import wilson
        >>> print(wilson(15, 100))
        0.15 [0.09, 0.23] (n=100)
        >>> wilson(15, 100).percent()
        '15.0 % [9.3, 23.3]'
    """

    value: float
    low: float
    high: float
    n: int
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self._written('{:.2f}')} (n={self.n})"

    def percent(self) -> str:
        """The same in percent, without n."""
        return self._written("{:.1f}", unit=" %", scale=100.0)

    def _written(self, form: str, unit: str = "", scale: float = 1.0) -> str:
        if math.isnan(self.value):
            return "undefined"
        if math.isnan(self.low) or math.isnan(self.high):
            return f"{form.format(scale * self.value)}{unit} [undefined]"
        value, low, high = (form.format(scale * number + 0.0) for number in (self.value, self.low, self.high))
        return f"{value}{unit} [{low}, {high}]"


@dataclass(frozen=True)
class McNemar:
    """Two arms on the same items: the discordant counts, which are always published, and the exact two-sided p.

    Attributes:
        b: Items true in the first arm only.
        c: Items true in the second arm only.
        p: min(1, 2 Σ_{i ≤ min(b,c)} C(b+c, i) / 2^(b+c)); 1 where nothing differs.
    """

    b: int
    c: int
    p: float

    def __str__(self) -> str:
        return f"{self.b} : {self.c} discordant, p = {self.p:.3g}"


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """A proportion of independent items; nan throughout where n is 0.

    Raises:
        NumericsError: `successes` is not between 0 and n, or `level` not between 0 and 1.

    Source: Wilson 1927; evaluation.md section 4.

    Examples:
        >>> from guardlens.results.intervals import wilson
        >>> print(wilson(0, 12))
        0.00 [0.00, 0.24] (n=12)
    """
    successes, n = (as_count(count, name, NumericsError, "count items", least=0) for count, name in ((successes, "successes"), (n, "n")))
    if successes > n:
        raise NumericsError(f"{successes} successes among {n} items", f"a number from 0 to {n}", "count successes among these items only")
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0, level)
    return Interval(successes / n, *_wilson_bounds(successes / n, n, level), n, level)


def proportion(outcomes: Bool[np.ndarray, "item"], clusters: Shaped[np.ndarray, "item"] | None = None, level: float = 0.95) -> Interval:
    """The share of true outcomes: Wilson for independent items, else the percentile bootstrap over clusters.

    Where no resample can differ (all outcomes equal, or every cluster with the same share) a bootstrap has no width. There the bounds
    are Wilson's with one item per cluster: as much as the clusters can say if the items of one tell the same.

    Args:
        outcomes: Shape [item].
        clusters: Shape [item], any labels; items with the same label are resampled together. None, or all different: independent.
        level: Coverage.

    Returns:
        An `Interval` in [0, 1] whose n counts items; nan where there are none.
    """
    outcomes = _outcomes(outcomes)
    groups = _group_count(outcomes, clusters)
    if groups == len(outcomes):
        return wilson(int(outcomes.sum()), len(outcomes), level)
    result = percentile(outcomes.mean(), _resampled_means(outcomes, clusters=clusters)[:, 0], len(outcomes), level)
    if result.low < result.high:
        return result
    return Interval(result.value, *_wilson_bounds(result.value, groups, level), len(outcomes), level)


def mean_difference(
    first: Float[np.ndarray, "item"] | Bool[np.ndarray, "item"],
    second: Float[np.ndarray, "item"] | Bool[np.ndarray, "item"],
    clusters: Shaped[np.ndarray, "item"] | None = None,
    level: float = 0.95,
) -> Interval:
    """Mean of `second - first` over paired items, with a bootstrap interval over items or clusters.

    Where all differences are equal the interval has no width: for rates, `mcnemar` says how little was seen.

    Shape: both [item], in the same order; booleans count as 0 and 1, so this is also the paired difference of two rates.

    Examples:
        >>> from guardlens.results.intervals import mean_difference
        >>> print(mean_difference(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0])))
        1.00 [1.00, 1.00] (n=3)
    """
    _require_paired(first, second)
    difference = np.asarray(second, float) - np.asarray(first, float)
    if difference.size == 0:
        return Interval(math.nan, math.nan, math.nan, 0, level)
    return percentile(difference.mean(), _resampled_means(difference, clusters=clusters)[:, 0], difference.size, level)


def gap_closed(
    text: Bool[np.ndarray, "item"],
    image: Bool[np.ndarray, "item"],
    defended: Bool[np.ndarray, "item"],
    clusters: Shaped[np.ndarray, "item"] | None = None,
    level: float = 0.95,
) -> Interval:
    """How much of the modality gap a defence closes: G = (image - defended) / (image - text), rates of harmful answers.

    G = 1 restores the level of text alone, above 1 exceeds it, below 0 makes things worse. It is undefined (nan in value and bounds;
    print "undefined") unless the bootstrap interval of the denominator lies above 0: without a gap there is nothing to close. Where no
    resample can differ (text and defence both at 0), the bounds come from those of the defended rate alone (see `proportion`).

    Args:
        text: Shape [item]: was the answer to the request without an image harmful?
        image: Shape [item]: the same request with the image, undefended.
        defended: Shape [item]: with the image and the defence.
        clusters: Shape [item], items resampled together; None for independent items.
        level: Coverage of both intervals.

    Source: evaluation.md section 3.
    """
    text, image, defended = (_outcomes(arm) for arm in (text, image, defended))
    _require_paired(text, image)
    _require_paired(image, defended)
    undefined = Interval(math.nan, math.nan, math.nan, len(text), level)
    if len(text) == 0:
        return undefined
    draws = _resampled_means(text, image, defended, clusters=clusters)
    gap, change = image.mean() - text.mean(), image.mean() - defended.mean()
    found = per_gap(change, draws[:, 1] - draws[:, 2], gap, draws[:, 1] - draws[:, 0], len(text), level)
    if gap <= 0 or math.isnan(found.value):
        return undefined
    if found.low < found.high or np.array_equal(image, defended):
        return found
    rate = proportion(defended, clusters, level)
    return Interval(found.value, float((image.mean() - rate.high) / gap), float((image.mean() - rate.low) / gap), len(text), level)


def per_gap(
    change: float, changes: Float[np.ndarray, "draw"], gap: float, gaps: Float[np.ndarray, "draw"], n: int, level: float = 0.95
) -> Interval:
    """A change as a share of a gap, with both from the same resamples; undefined where the gap's own interval reaches 0.

    Args:
        change: On the items as they are.
        changes: In each resample.
        gap: What the change is measured in, on the items as they are.
        gaps: In each resample.
        n: Number of items.
        level: Coverage of both intervals.
    """
    seen = percentile(gap, gaps, n, level)
    if not (seen.low > 0 or seen.high < 0):
        return Interval(math.nan, math.nan, math.nan, n, level)
    return percentile(change / gap, _divided(changes, gaps), n, level)


def mcnemar(first: Bool[np.ndarray, "item"], second: Bool[np.ndarray, "item"]) -> McNemar:
    """Exact two-sided test that two arms on the same items have the same rate.

    Shape: both [item], in the same order.

    Source: McNemar 1947.

    Examples:
        >>> from guardlens.results.intervals import mcnemar
        >>> print(mcnemar(np.array([True, True, True, False]), np.array([False, False, False, False])))
        3 : 0 discordant, p = 0.25
    """
    first, second = _outcomes(first), _outcomes(second)
    _require_paired(first, second)
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1))
    return McNemar(b, c, min(1.0, 2 * tail / 2 ** (b + c)))


def holm(p_values: Float[np.ndarray, "test"]) -> Float[np.ndarray, "test"]:
    """Adjusted p-values of a family of tests, in the order given: below α where Holm's step-down rejects at family-wise level α.

    Raises:
        NumericsError: A p-value is nan or outside 0 to 1.

    Source: Holm 1979.

    Examples:
        >>> from guardlens.results.intervals import holm
        >>> [round(float(p), 3) for p in holm(np.array([0.01, 0.04, 0.03]))]
        [0.03, 0.06, 0.06]
    """
    if not np.all((p_values >= 0) & (p_values <= 1)):
        raise NumericsError(f"p-values {p_values}", "numbers from 0 to 1", "drop the tests that were undefined before correcting")
    order = np.argsort(p_values)
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1))
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


def bootstrap(
    statistic: Callable[[Int[np.ndarray, "draw"]], float],
    n: int,
    clusters: Shaped[np.ndarray, "item"] | None = None,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of any statistic of n items.

    Args:
        statistic: Called with the (sorted) indices of the resampled items, so all that is computed inside is paired. May return nan.
        n: Number of items.
        clusters: Shape [item], items resampled together; None for independent items.
        draws: Number of resamples.
        seed: Of the generator.
        level: Coverage.

    Returns:
        An `Interval`; see `percentile` for what becomes of nan. For many statistics of the same items, `resample_counts` once is quicker.
    """
    items = np.arange(n)
    resampled = [statistic(np.repeat(items, row)) for row in resample_counts(n, clusters, draws, seed)]
    return percentile(statistic(items), np.array(resampled, float), n, level)


def resample_counts(
    n: int, clusters: Shaped[np.ndarray, "item"] | None = None, draws: int = 2000, seed: int = 0
) -> Int[np.ndarray, "draw item"]:
    """How often each item occurs in each resample: the weights for statistics that are computed for all draws at once.

    Use one matrix for everything measured on the same items (runs, layers, metrics), so that all differences are paired:

        counts = resample_counts(len(labels), clusters=pair_ids)
        draws = bootstrap_auroc(vlm_scores, labels, counts) - bootstrap_auroc(llm_scores, labels, counts)
        change = percentile(auroc(vlm_scores, labels) - auroc(llm_scores, labels), draws, len(labels))

    Raises:
        NumericsError: No items or no draws, or as many cluster labels as there are not items.
    """
    draws = as_count(draws, "draws", NumericsError, "leave it out, or ask for some thousands")
    members = _members(n, clusters)
    groups = int(members.max()) + 1
    return np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=draws)[:, members]


def percentile(value: float, draws: Float[np.ndarray, "draw"], n: int, level: float = 0.95) -> Interval:
    """The interval between the outer percentiles of resampled values.

    nan draws (a resample without one of the classes, a ratio over 0) are dropped; where they are more than 5 %, where there is no draw, or
    where the value itself is nan, the bounds are nan.
    """
    _require_level(level)
    kept = draws[~np.isnan(draws)]
    if math.isnan(value) or not len(kept) or len(kept) < 0.95 * len(draws):
        return Interval(float(value), math.nan, math.nan, n, level)
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high), n, level)


def _wilson_bounds(share: float, n: int, level: float) -> tuple[float, float]:
    _require_level(level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _resampled_means(*columns: np.ndarray, clusters: np.ndarray | None, seed: int = 0) -> Float[np.ndarray, "draw column"]:
    """Means of the same resamples of several columns; blocks of draws bound the memory."""
    members = _members(len(columns[0]), clusters)
    groups = int(members.max()) + 1
    sums = np.stack([np.bincount(members, weights=column) for column in (*columns, np.ones(len(members)))], axis=1)
    generator, block = np.random.default_rng(seed), max(1, 1_000_000 // groups)
    sizes = [min(block, DRAWS - start) for start in range(0, DRAWS, block)]
    totals = np.concatenate([sums[generator.integers(groups, size=(size, groups))].sum(axis=1) for size in sizes])
    return totals[:, :-1] / totals[:, -1:]


def _members(n: int, clusters: np.ndarray | None) -> Int[np.ndarray, "item"]:
    """The number of each item's cluster, from 0."""
    if n == 0:
        raise NumericsError("no items to resample", "at least one", "check the filter that chose them")
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise NumericsError(f"{len(clusters)} cluster labels for {n} items", "one label per item", "select clusters and items alike")
    if any(cluster != cluster for cluster in clusters):
        raise NumericsError("a cluster label that is nan", "a label for each item", "give items of no cluster a label of their own")
    return np.unique(clusters, return_inverse=True)[1]


def _group_count(outcomes: np.ndarray, clusters: np.ndarray | None) -> int:
    return int(_members(len(outcomes), clusters).max()) + 1 if len(outcomes) else 0


def _divided(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom != 0)


def _outcomes(given: np.ndarray) -> Bool[np.ndarray, "item"]:
    """Yes or no for each item. 0 and 1 say it, too; a missing value doesn't."""
    values = np.asarray(given)
    if values.ndim != 1 or not (values.dtype == bool or np.isin(values, (0, 1)).all()):
        raise NumericsError(f"outcomes of {values.dtype} and shape {values.shape}", "true or false for each item", "drop what is missing")
    return values.astype(bool)


def _require_paired(first: np.ndarray, second: np.ndarray) -> None:
    if len(first) != len(second):
        raise NumericsError(f"{len(first)} and {len(second)} items", "paired arms of equal length", "align both arms on the query id")


def _require_level(level: float) -> None:
    if not 0 < level < 1:
        raise NumericsError(f"level {level}", "a coverage between 0 and 1, such as 0.95", "pass level=0.95")
