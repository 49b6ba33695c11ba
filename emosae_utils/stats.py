"""Metrics with intervals, and the tests that go with them.

Everything is computed from confusion counts per group (a topic, a writer): a bootstrap draw is then a weighting of
groups, so thousands of draws are one matrix product, and two methods measured on the same rows share their draws,
which makes their difference a paired one.

Shapes: G groups, R bootstrap draws, K classes; a confusion has gold labels in rows and predictions in columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

Array = np.ndarray[Any, np.dtype[Any]]

# What a test of a claim may say.
SUPPORTED: Final = "supported"
NOT_SUPPORTED: Final = "not supported"
UNDECIDED: Final = "undecided"


@dataclass(frozen=True)
class Estimate:
    """A value with a 95 % percentile bootstrap interval, in the unit of the value."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def group_confusions(
    gold_P: Array, pred_P: Array, groups_P: Sequence[Any], n_classes: int, weights_P: Array | None = None
) -> Array:
    """Confusion counts of each group, [G, K, K]; groups in sorted order.

    `weights_P` weighs rows, as when a text counts once although five readers judged it.
    """
    names, index_P = np.unique(np.asarray(groups_P), return_inverse=True)
    counts_GKK = np.zeros((len(names), n_classes, n_classes))
    np.add.at(counts_GKK, (index_P, gold_P, pred_P), 1.0 if weights_P is None else weights_P)
    return counts_GKK


def bootstrap_weights(n_groups: int, n_draws: int, seed: int) -> Array:
    """How often each group is drawn in each bootstrap sample, [R, G]. One group cannot be resampled: ones."""
    if n_groups < 2:
        return np.ones((n_draws, n_groups))
    rng = np.random.default_rng(seed)
    drawn: Array = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_draws).astype(float)
    return drawn


def _ratio(top: Array, bottom: Array) -> Array:
    """Divide, with 0 where the bottom is 0: a class that is never predicted has precision 0, not a gap."""
    return np.divide(top, bottom, out=np.zeros_like(top, dtype=float), where=bottom > 0)


def recall(counts: Array) -> Array:
    """Share of each class's rows that were found, [..., K]."""
    return _ratio(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(axis=-1))


def precision(counts: Array) -> Array:
    """Share of each class's predictions that were right, [..., K]."""
    return _ratio(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(axis=-2))


def f1(counts: Array) -> Array:
    """Harmonic mean of precision and recall per class, [..., K]."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    return _ratio(2 * hits, counts.sum(axis=-1) + counts.sum(axis=-2))


def macro_f1(counts: Array) -> Array:
    """Mean F1 over the classes, [...]."""
    means: Array = f1(counts).mean(axis=-1)
    return means


def accuracy(counts: Array) -> Array:
    """Share of rows that were right, [...]."""
    return _ratio(np.trace(counts, axis1=-2, axis2=-1), counts.sum(axis=(-2, -1)))


def interval(draws: Array, level: float = 0.95) -> tuple[Array, Array]:
    """Percentile interval over the first axis."""
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(draws, [tail, 100 - tail], axis=0)
    return low, high


def estimate(metric: Callable[[Array], Array], counts_GKK: Array, weights_RG: Array) -> list[Estimate]:
    """A metric of the pooled counts with bootstrap intervals; one estimate per class, or a single one."""
    value = np.atleast_1d(metric(counts_GKK.sum(axis=0)))
    draws = metric(np.einsum("rg,gkl->rkl", weights_RG, counts_GKK)).reshape(len(weights_RG), -1)
    low, high = interval(draws)
    return [Estimate(float(v), float(a), float(b)) for v, a, b in zip(value, low, high, strict=True)]


def difference(
    metric: Callable[[Array], Array], first_GKK: Array, second_GKK: Array, weights_RG: Array
) -> list[Estimate]:
    """metric(first) - metric(second) with paired bootstrap intervals: both are weighted by the same draws."""
    value = np.atleast_1d(metric(first_GKK.sum(axis=0)) - metric(second_GKK.sum(axis=0)))
    first = metric(np.einsum("rg,gkl->rkl", weights_RG, first_GKK)).reshape(len(weights_RG), -1)
    second = metric(np.einsum("rg,gkl->rkl", weights_RG, second_GKK)).reshape(len(weights_RG), -1)
    low, high = interval(first - second)
    return [Estimate(float(v), float(a), float(b)) for v, a, b in zip(value, low, high, strict=True)]


def mcnemar_p(right_a_P: Array, right_b_P: Array) -> float:
    """Two-sided exact McNemar test that two methods are right on the same number of rows."""
    from statsmodels.stats.contingency_tables import mcnemar

    table = pd.crosstab(right_a_P.astype(bool), right_b_P.astype(bool)).reindex(
        index=[True, False], columns=[True, False], fill_value=0
    )
    return float(mcnemar(table.to_numpy(), exact=True).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p values, in the order given."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(list(p_values), method="holm")[1]] if p_values else []


def permutation_p(observed: float, null: Sequence[float]) -> float:
    """Share of null values at least as large as the observed one, counting the observed (Phipson and Smyth 2010)."""
    return (1 + sum(value >= observed for value in null)) / (1 + len(null))
