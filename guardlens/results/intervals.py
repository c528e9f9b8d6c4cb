"""Intervals for measured numbers: proportions, paired differences, the gap that a defence closes, and bootstraps of any statistic.

Resampling draws whole *clusters* (a query shown with several images, colors or seeds is one cluster), keeps all conditions of an item
together, and starts from a fixed seed, so the same data give the same interval. An undefined number is nan, never 0.

Source: Wilson 1927; Efron & Tibshirani 1993 (percentile bootstrap). docs/explanation/statistics.md says when each is used.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from guardlens.errors import NumericsError, as_count

DRAWS = 10_000
"""Number of resamples for statistics that are computed for all draws at once."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval. As text, it takes the format of a number: `f"{interval:.1%}"`.

    Attributes:
        value: The estimate on the items as they are; nan where it is undefined.
        low: Lower bound; nan where the interval is undefined.
        high: Upper bound; nan where the interval is undefined.
        n: Number of items (not of clusters).
        level: Intended coverage, between 0 and 1.

    Examples:
        >>> from guardlens.results.intervals import wilson
        >>> print(wilson(15, 100))
        0.15 [0.09, 0.23] (n=100)
        >>> f"{wilson(15, 100):.1%}", f"{wilson(15, 100):+.2f}"
        ('15.0 % [9.3, 23.3]', '+0.15 [+0.09, +0.23]')
    """

    value: float
    low: float
    high: float
    n: int
    level: float = 0.95

    @classmethod
    def undefined(cls, n: int, level: float = 0.95) -> "Interval":
        """An interval without an estimate: nan in value and bounds."""
        return cls(math.nan, math.nan, math.nan, n, level)

    def __str__(self) -> str:
        return f"{self:.2f} (n={self.n})"

    def __format__(self, spec: str) -> str:
        if not spec:
            return str(self)
        if math.isnan(self.value):
            return "undefined"
        unit, scale = (" %", 100.0) if spec.endswith("%") else ("", 1.0)
        number_spec = spec.replace("%", "f")
        value, low, high = (format(scale * number + 0.0, number_spec) for number in (self.value, self.low, self.high))
        bounds = "undefined" if math.isnan(self.low) or math.isnan(self.high) else f"{low}, {high}"
        return f"{value}{unit} [{bounds}]"

    def percent(self) -> str:
        """The estimate and its bounds in percent, without n."""
        return f"{self:.1%}"

    def columns(self, name: str = "value", prefix: str = "") -> dict[str, float]:
        """The estimate and its bounds as columns of a table.

        Args:
            name: The column of the estimate.
            prefix: What the columns `low` and `high` begin with.

        Examples:
            >>> from guardlens.results.intervals import Interval
            >>> Interval(0.5, 0.25, 0.75, n=8).columns("asr", prefix="asr_")
            {'asr': 0.5, 'asr_low': 0.25, 'asr_high': 0.75}
        """
        return {name: self.value, f"{prefix}low": self.low, f"{prefix}high": self.high}


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """A proportion of independent items, with Wilson's score interval (1927); undefined if n is 0.

    Raises:
        NumericsError: `successes` is not between 0 and n, or `level` is not between 0 and 1.

    Examples:
        >>> from guardlens.results.intervals import wilson
        >>> print(wilson(0, 12))
        0.00 [0.00, 0.24] (n=12)
    """
    successes = as_count(successes, "successes", NumericsError, "count items", least=0)
    n = as_count(n, "n", NumericsError, "count items", least=0)
    if successes > n:
        raise NumericsError(f"{successes} successes among {n} items", f"a number from 0 to {n}", "count successes among these items only")
    if n == 0:
        return Interval.undefined(0, level)
    return Interval(successes / n, *_wilson_bounds(successes / n, n, level), n, level)


def proportion(outcomes: Bool[np.ndarray, "item"], clusters: Shaped[np.ndarray, "item"] | None = None, level: float = 0.95) -> Interval:
    """The share of true outcomes: Wilson's interval for independent items, otherwise the percentile bootstrap over clusters.

    If no resample can differ (all outcomes are equal, or every cluster has the same share), a bootstrap has no width. The bounds are then
    Wilson's, treating each cluster as a single observation.

    Args:
        outcomes: Shape [item].
        clusters: Shape [item], any labels; items with the same label are resampled together. None, or labels that all differ, stand for
            independent items.
        level: Coverage.

    Returns:
        An `Interval` in [0, 1] whose n counts items; undefined if there are none.
    """
    outcomes = as_outcomes(outcomes)
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

    If all differences are equal, the interval has no width; for rates, the counts of `mcnemar` then show how little was observed.

    Shape: both [item], in the same order; booleans count as 0 and 1, so this is also the paired difference of two rates.

    Examples:
        >>> from guardlens.results.intervals import mean_difference
        >>> print(mean_difference(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0])))
        1.00 [1.00, 1.00] (n=3)
    """
    require_paired(first, second)
    difference = np.asarray(second, float) - np.asarray(first, float)
    if difference.size == 0:
        return Interval.undefined(0, level)
    return percentile(difference.mean(), _resampled_means(difference, clusters=clusters)[:, 0], difference.size, level)


def gap_closed(
    text: Bool[np.ndarray, "item"],
    image: Bool[np.ndarray, "item"],
    defended: Bool[np.ndarray, "item"],
    clusters: Shaped[np.ndarray, "item"] | None = None,
    level: float = 0.95,
) -> Interval:
    """How much of the modality gap a defence closes: G = (image - defended) / (image - text), where each term is a rate of harmful answers.

    G = 1 restores the rate of text alone, G above 1 goes beyond it, and G below 0 makes things worse. It is undefined unless the bootstrap
    interval of the denominator lies above 0: without a gap there is nothing to close. If no resample can differ (text and defence are both
    at 0), the bounds follow from those of the defended rate alone (see `proportion`).

    Args:
        text: Shape [item]: was the answer to the request without an image harmful?
        image: Shape [item]: the same request with the image, undefended.
        defended: Shape [item]: the same request with the image and the defence.
        clusters: Shape [item], items that are resampled together; None for independent items.
        level: Coverage of both intervals.

    Source: docs/explanation/statistics.md, "The gap that a defence closes".
    """
    text, image, defended = (as_outcomes(condition) for condition in (text, image, defended))
    require_paired(text, image)
    require_paired(image, defended)
    n = len(text)
    if n == 0:
        return Interval.undefined(n, level)
    text_draws, image_draws, defended_draws = _resampled_means(text, image, defended, clusters=clusters).T
    gap = image.mean() - text.mean()
    change = image.mean() - defended.mean()
    share = per_gap(change, image_draws - defended_draws, gap, image_draws - text_draws, n, level)
    if gap <= 0 or math.isnan(share.value):
        return Interval.undefined(n, level)
    if share.low < share.high or np.array_equal(image, defended):
        return share
    rate = proportion(defended, clusters, level)
    return Interval(share.value, float((image.mean() - rate.high) / gap), float((image.mean() - rate.low) / gap), n, level)


def per_gap(
    change: float, changes: Float[np.ndarray, "draw"], gap: float, gaps: Float[np.ndarray, "draw"], n: int, level: float = 0.95
) -> Interval:
    """A change as a share of a gap, both from the same resamples; undefined if the gap's own interval reaches 0.

    Args:
        change: The change on the items as they are.
        changes: The change in each resample.
        gap: The gap on the items as they are.
        gaps: The gap in each resample.
        n: Number of items.
        level: Coverage of both intervals.
    """
    whole = percentile(gap, gaps, n, level)
    if not (whole.low > 0 or whole.high < 0):
        return Interval.undefined(n, level)
    return percentile(change / gap, ratio(changes, gaps), n, level)


def bootstrap(
    statistic: Callable[[Int[np.ndarray, "draw"]], float],
    n: int,
    clusters: Shaped[np.ndarray, "item"] | None = None,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of any statistic of n items.

    For several statistics of the same items, calling `resample_counts` once is faster.

    Args:
        statistic: Called with the (sorted) indices of the resampled items, so everything computed inside is paired. It may return nan.
        n: Number of items.
        clusters: Shape [item], items that are resampled together; None for independent items.
        draws: Number of resamples.
        seed: Seed of the random generator.
        level: Coverage.

    Returns:
        An `Interval`; `percentile` says how nan is treated.
    """
    items = np.arange(n)
    resampled = [statistic(np.repeat(items, row)) for row in resample_counts(n, clusters, draws, seed)]
    return percentile(statistic(items), np.array(resampled, float), n, level)


def resample_counts(
    n: int, clusters: Shaped[np.ndarray, "item"] | None = None, draws: int = 2000, seed: int = 0
) -> Int[np.ndarray, "draw item"]:
    """How often each item occurs in each resample: weights for statistics that are computed for all draws at once.

    Use one matrix for everything that is measured on the same items (runs, layers, metrics), so that all differences are paired:

        counts = resample_counts(len(labels), clusters=pair_ids)
        draws = bootstrap_auroc(vlm_scores, labels, counts) - bootstrap_auroc(llm_scores, labels, counts)
        change = percentile(auroc(vlm_scores, labels) - auroc(llm_scores, labels), draws, len(labels))

    Raises:
        NumericsError: There are no items or no draws, or the number of cluster labels is not that of the items.
    """
    draws = as_count(draws, "draws", NumericsError, "leave it out, or ask for some thousands")
    members = _members(n, clusters)
    groups = int(members.max()) + 1
    return np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=draws)[:, members]


def percentile(value: float, draws: Float[np.ndarray, "draw"], n: int, level: float = 0.95) -> Interval:
    """The interval between the outer percentiles of resampled values.

    Draws that are nan (a resample without one of the classes, a division by 0) are dropped. The bounds are nan if more than 5 % of the
    draws are, if there are no draws, or if the value itself is nan.
    """
    _require_level(level)
    defined = draws[~np.isnan(draws)]
    if math.isnan(value) or not len(defined) or len(defined) < 0.95 * len(draws):
        return Interval(float(value), math.nan, math.nan, n, level)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high), n, level)


def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Elementwise quotient; nan where the denominator is 0."""
    return np.divide(top, bottom, out=np.full(np.broadcast_shapes(top.shape, bottom.shape), np.nan), where=bottom != 0)


def _wilson_bounds(share: float, n: int, level: float) -> tuple[float, float]:
    """Wilson's bounds. scipy has them for whole numbers of successes alone, and clusters of one share have fractions of them."""
    _require_level(level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, min(share, center - half)), min(1.0, max(share, center + half))


def _resampled_means(*columns: np.ndarray, clusters: np.ndarray | None, seed: int = 0) -> Float[np.ndarray, "draw column"]:
    """Mean of each column in the same resamples, computed in blocks of draws to bound the memory."""
    members = _members(len(columns[0]), clusters)
    groups = int(members.max()) + 1
    sums = np.stack([np.bincount(members, weights=column) for column in (*columns, np.ones(len(members)))], axis=1)
    generator = np.random.default_rng(seed)
    block = max(1, 1_000_000 // groups)
    sizes = [min(block, DRAWS - start) for start in range(0, DRAWS, block)]
    totals = np.concatenate([sums[generator.integers(groups, size=(size, groups))].sum(axis=1) for size in sizes])
    return totals[:, :-1] / totals[:, -1:]


def _members(n: int, clusters: np.ndarray | None) -> Int[np.ndarray, "item"]:
    """The cluster of each item, numbered from 0."""
    if n == 0:
        raise NumericsError("no items to resample", "at least one", "check the filter that chose them")
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise NumericsError(f"{len(clusters)} cluster labels for {n} items", "one label per item", "select clusters and items alike")
    if any(cluster != cluster for cluster in clusters):
        raise NumericsError("a cluster label that is nan", "a label for each item", "give items without a cluster a label of their own")
    return np.unique(clusters, return_inverse=True)[1]


def _group_count(outcomes: np.ndarray, clusters: np.ndarray | None) -> int:
    return int(_members(len(outcomes), clusters).max()) + 1 if len(outcomes) else 0


def as_outcomes(given: np.ndarray) -> Bool[np.ndarray, "item"]:
    """Outcomes as booleans; the numbers 0 and 1 are accepted, missing values are not.

    Raises:
        NumericsError: An item is neither true nor false.
    """
    values = np.asarray(given)
    if values.ndim != 1 or not (values.dtype == bool or np.isin(values, (0, 1)).all()):
        raise NumericsError(f"outcomes of {values.dtype} and shape {values.shape}", "true or false for each item", "drop missing values")
    return values.astype(bool)


def require_paired(first: np.ndarray, second: np.ndarray) -> None:
    """Refuse two conditions with different numbers of items.

    Raises:
        NumericsError: The lengths differ.
    """
    if len(first) != len(second):
        raise NumericsError(f"{len(first)} and {len(second)} items", "paired arms of equal length", "align both arms on the query id")


def _require_level(level: float) -> None:
    if not 0 < level < 1:
        raise NumericsError(f"level {level}", "a coverage between 0 and 1, such as 0.95", "pass level=0.95")
