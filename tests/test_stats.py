from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn import metrics as reference

from emosae_utils import stats


def _random(n: int = 400, k: int = 4, seed: int = 0) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, k, n)
    pred = np.where(rng.random(n) < 0.5, gold, rng.integers(0, k, n))
    return gold, pred, rng.integers(0, 20, n)


def test_metrics_agree_with_scikit_learn() -> None:
    gold, pred, groups = _random()
    counts = stats.group_confusions(gold, pred, list(groups), 4).sum(axis=0)
    np.testing.assert_allclose(stats.recall(counts), reference.recall_score(gold, pred, average=None))
    np.testing.assert_allclose(stats.precision(counts), reference.precision_score(gold, pred, average=None))
    np.testing.assert_allclose(stats.f1(counts), reference.f1_score(gold, pred, average=None))
    assert stats.macro_f1(counts) == pytest.approx(reference.f1_score(gold, pred, average="macro"))
    assert stats.accuracy(counts) == pytest.approx(reference.accuracy_score(gold, pred))


def test_a_class_never_predicted_has_precision_zero() -> None:
    counts = np.array([[2.0, 0.0], [3.0, 0.0]])
    np.testing.assert_allclose(stats.precision(counts), [0.4, 0.0])
    # F1 of the first class: 2 * 2 / (2 + 5)
    np.testing.assert_allclose(stats.f1(counts), [4 / 7, 0.0])


def test_bootstrap_is_a_resampling_of_whole_groups() -> None:
    """The matrix form equals recomputing the metric on the drawn groups' rows."""
    gold, pred, groups = _random()
    counts = stats.group_confusions(gold, pred, list(groups), 4)
    weights = stats.bootstrap_weights(len(counts), 3, seed=1)
    assert (weights.sum(axis=1) == len(counts)).all()
    for draw in weights.astype(int):
        rows = np.concatenate([np.repeat(np.flatnonzero(groups == g), times) for g, times in enumerate(draw)])
        pooled = np.einsum("g,gkl->kl", draw, counts)
        assert stats.accuracy(pooled) == pytest.approx(reference.accuracy_score(gold[rows], pred[rows]))


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for repeat in range(200):
        gold = np.zeros(300, dtype=int)
        pred = (rng.random(300) > 0.7).astype(int)
        counts = stats.group_confusions(gold, pred, list(range(300)), 2)
        (found,) = stats.estimate(stats.accuracy, counts, stats.bootstrap_weights(300, 300, repeat))
        covered += found.low <= 0.7 <= found.high
    # Binomial(200, .95): between 180 and 199 with probability above .999
    assert 180 <= covered <= 199


def test_paired_difference_is_narrower_than_unpaired() -> None:
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 2, 600)
    base = np.where(rng.random(600) < 0.6, gold, 1 - gold)
    better = np.where((base != gold) & (rng.random(600) < 0.2), gold, base)
    groups = list(range(600))
    first, second = (stats.group_confusions(gold, p, groups, 2) for p in (better, base))
    weights = stats.bootstrap_weights(600, 1000, 0)
    (gap,) = stats.difference(stats.accuracy, first, second, weights)
    assert gap.value == pytest.approx((better == gold).mean() - (base == gold).mean())
    assert 0 < gap.low < gap.value < gap.high
    (alone,) = stats.estimate(stats.accuracy, first, weights)
    assert gap.high - gap.low < alone.high - alone.low


def test_weights_count_a_text_once() -> None:
    gold, pred = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    counts = stats.group_confusions(gold, pred, ["a"] * 4, 2, np.array([1 / 3, 1 / 3, 1 / 3, 1.0]))
    np.testing.assert_allclose(counts[0], [[2 / 3, 1 / 3], [0.0, 1.0]])


def test_mcnemar_and_holm() -> None:
    # 1 row only the first gets right, 9 only the second: 2 * (C(10,0) + C(10,1)) / 2^10
    a = np.array([True] * 1 + [False] * 9 + [True] * 5)
    b = np.array([False] * 1 + [True] * 9 + [True] * 5)
    assert stats.mcnemar_p(a, b) == pytest.approx(2 * 11 / 1024)
    assert stats.mcnemar_p(a, a) == 1.0
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([]) == []


def test_permutation_p_counts_the_observed_value() -> None:
    assert stats.permutation_p(2.0, [0.0, 1.0, 1.5]) == 0.25
    assert stats.permutation_p(1.0, [0.0, 1.0, 1.5]) == 0.75
