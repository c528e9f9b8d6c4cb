"""Tests whether two conditions differ: McNemar's exact test on paired outcomes, and Holm's correction for several tests.

Source: McNemar 1947; Holm 1979.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from guardlens.errors import NumericsError
from guardlens.results.intervals import as_outcomes, require_paired


@dataclass(frozen=True)
class McNemar:
    """Two conditions on the same items: the discordant counts, which are always reported, and the exact two-sided p-value.

    Attributes:
        b: Number of items that are true in the first condition only.
        c: Number of items that are true in the second condition only.
        p: min(1, 2 Σ_{i ≤ min(b,c)} C(b+c, i) / 2^(b+c)); 1 if no item differs.
    """

    b: int
    c: int
    p: float

    def __str__(self) -> str:
        return f"{self.b} : {self.c} discordant, p = {self.p:.3g}"


def mcnemar(first: Bool[np.ndarray, "item"], second: Bool[np.ndarray, "item"]) -> McNemar:
    """Exact two-sided test of whether two conditions have the same rate on the same items.

    Shape: both [item], in the same order.

    Examples:
        >>> from guardlens.results.significance import mcnemar
        >>> print(mcnemar(np.array([True, True, True, False]), np.array([False, False, False, False])))
        3 : 0 discordant, p = 0.25
    """
    from scipy.stats import binomtest

    first, second = as_outcomes(first), as_outcomes(second)
    require_paired(first, second)
    b = int((first & ~second).sum())
    c = int((second & ~first).sum())
    return McNemar(b, c, float(binomtest(b, b + c).pvalue) if b + c else 1.0)


def holm(p_values: Float[np.ndarray, "test"]) -> Float[np.ndarray, "test"]:
    """Adjusted p-values of a family of tests, in the given order.

    Rejecting where they are at most α is Holm's step-down method at family-wise level α.

    Raises:
        NumericsError: A p-value is nan, or not between 0 and 1.

    Examples:
        >>> from guardlens.results.significance import holm
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
