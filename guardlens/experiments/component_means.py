"""Means of components over queries, by label, with intervals and paired changes from the LLM: the summary of an `Attribution`."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from guardlens.data.queries import LABELS
from guardlens.experiments.residual_terms import Component
from guardlens.results.intervals import Interval, percentile

KEYS = ["direction", *Component._fields]
"""The columns that tell the terms of one presentation apart."""

CONTRAST = "harmful - harmless"
"""The label of differences between both classes."""

Means = dict[str, tuple[Float[np.ndarray, "component"], Float[np.ndarray, "draw component"]]]
"""Label -> the mean of each component on the queries as they are, and in each resample."""


def means_by_label(values: Float[np.ndarray, "query component"], labels: np.ndarray, counts: np.ndarray) -> Means:
    """The means over the queries of each label, and of harmful - harmless."""
    means: Means = {}
    for label in LABELS:
        here = labels == label
        if not here.any():
            means[label] = np.full(values.shape[1], np.nan), np.full((len(counts), values.shape[1]), np.nan)
            continue
        weights = counts * here
        with np.errstate(invalid="ignore"):  # a resample without the class is undefined
            means[label] = (values[here].mean(0), weights @ values / weights.sum(1, keepdims=True))
    harmful, harmless = (means[label] for label in LABELS)
    return means | {CONTRAST: (harmful[0] - harmless[0], harmful[1] - harmless[1])}


def summary_rows(name: str, components: Sequence[Any], means: Means, llm: Means | None, labels: np.ndarray) -> Iterator[dict[str, Any]]:
    """The rows of one presentation: each component's mean, and its change from the LLM's, which is undefined for the LLM itself."""
    sizes = {label: int((labels == label).sum()) for label in LABELS}
    for label, (values, drawn) in means.items():
        n = sizes.get(label, len(labels))
        for i, component in enumerate(components):
            mean = percentile(float(values[i]), drawn[:, i], n)
            if llm is None:
                change = Interval.undefined(n)
            else:
                llm_values, llm_drawn = llm[label]
                change = percentile(float(values[i] - llm_values[i]), drawn[:, i] - llm_drawn[:, i], n)
            yield {
                "presentation": name,
                "label": label,
                **dict(zip(KEYS, component, strict=True)),
                **mean.columns(),
                **change.columns("change", prefix="change_"),
                "n": n,
            }
