"""Probes find a planted signal in the planted layer, and nothing where there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from emosae_utils import probes
from emosae_utils.files import EmosaeError

Array = np.ndarray[Any, np.dtype[Any]]
LAYERS, WIDTH, PLANTED = 5, 24, 3


def planted(n: int = 360, strength: float = 1.6, seed: int = 0) -> tuple[Array, Array, list[str]]:
    """Noise everywhere; in layer 3 each class adds its own direction. One huge constant direction, as in Gemma."""
    rng = np.random.default_rng(seed)
    y = np.tile(np.arange(6), n // 6)
    resid = rng.normal(size=(n, LAYERS, WIDTH))
    resid[:, PLANTED] += strength * np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0][:6][y]
    resid[:, :, 0] += 5000.0
    return resid, y, [f"g{i}" for i in rng.integers(0, 24, n)]


def test_the_planted_layer_is_found_and_measured_on_other_rows() -> None:
    resid, y, groups = planted()
    probe = probes.fit_probe(resid[:240], y[:240], groups[:240])
    assert probe.layer == PLANTED
    # Bayes accuracy for six orthogonal directions of length 1.6 in unit noise is about .60
    assert (probe.predict(resid[240:]) == y[240:]).mean() > 0.4
    others = np.delete(probe.curve_L, PLANTED)
    assert others.max() < 0.3


def test_shuffled_labels_give_chance() -> None:
    resid, y, groups = planted()
    probe = probes.fit_probe(resid[:240], y[:240], groups[:240])
    null = probes.shuffled_accuracies(probe, resid[:240], y[:240], resid[240:], y[240:], n=30, seed=0)
    # 120 rows at chance 1/6: standard deviation .034 each, .0062 for the mean of 30 (rows are shared, so wider)
    assert 0.10 < np.mean(null) < 0.24
    rng = np.random.default_rng(1)
    curve = probes.layer_curve(resid, rng.permutation(y), groups)
    assert curve.max() < 0.26


def test_no_group_on_both_sides() -> None:
    _, y, groups = planted()
    names = np.array(groups)
    for train, test in probes.grouped_folds(y, groups):
        assert not set(names[train]) & set(names[test])
        assert len(train) + len(test) == len(y)
    with pytest.raises(EmosaeError, match="needs 4 groups and the data has 2"):
        probes.grouped_folds(y, ["a", "b"] * (len(y) // 2))


def test_a_group_signature_does_not_leak_through_grouped_folds() -> None:
    """Labels that follow the group, features that identify it: ungrouped validation would be misled."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(48), 8)
    signature = rng.normal(size=(48, WIDTH))
    y = rng.integers(0, 6, 48)[groups]
    resid = (signature[groups] + rng.normal(size=(len(groups), WIDTH)) * 0.1)[:, None, :]
    grouped = probes.layer_curve(resid, y, list(groups))[0]
    ungrouped = probes.layer_curve(resid, y, list(range(len(y))))[0]
    assert grouped < 0.35 and ungrouped > grouped + 0.25


def test_bag_of_words_reads_words_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    y = np.tile(np.arange(3), 40)
    cue = np.array(["storm", "cake", "ladder"])
    filler = ["the", "old", "house", "near", "river", "stood", "there", "with", "lamps"]
    given = [" ".join([cue[i], *rng.choice(filler, 6)]) for i in y]
    hidden = [" ".join(rng.choice(filler, 7)) for _ in y]
    assert (probes.bag_of_words(given[:60], y[:60], given[60:]) == y[60:]).mean() > 0.9
    assert (probes.bag_of_words(hidden[:60], y[:60], hidden[60:]) == y[60:]).mean() < 0.6


def test_a_code_probe_finds_planted_sparse_features_and_nothing_in_shuffled_labels() -> None:
    """Four hundred features, most of them rare; three tell the classes apart. Standardising drowns them."""
    rng = np.random.default_rng(0)
    n, groups = 600, (np.arange(600) % 12).tolist()
    y_P = rng.integers(0, 3, size=n)
    codes_PF = rng.exponential(5.0, size=(n, 400)) * (rng.random((n, 400)) < 0.01)
    for e in range(3):
        codes_PF[:, e] = np.where(rng.random(n) < np.where(y_P == e, 0.7, 0.1), rng.exponential(2.0, size=n), 0)
    planted = probes.layer_curve(codes_PF[:, None], y_P, groups, penalty=0.1, codes=True)[0]
    null = probes.layer_curve(codes_PF[:, None], rng.permutation(y_P), groups, penalty=0.1, codes=True)[0]
    standardised = probes.layer_curve(codes_PF[:, None], y_P, groups, penalty=0.1)[0]
    assert planted > 0.5 and planted > standardised + 0.05
    assert null < 0.42
    # Scale and unit of the activations do not matter.
    again = probes.layer_curve(1000 * codes_PF[:, None], y_P, groups, penalty=0.1, codes=True)[0]
    assert again == planted


def test_a_code_probe_sees_a_direction_that_was_split_into_many_features() -> None:
    """Sixty features share one of three directions; each fires rarely, and only their direction tells the class."""
    rng = np.random.default_rng(1)
    n, n_features = 360, 180
    groups, y_P = (np.arange(n) % 12).tolist(), rng.integers(0, 3, size=n)
    kind_F = np.arange(n_features) % 3
    directions_FD = np.eye(3)[kind_F] + 0.05 * rng.normal(size=(n_features, 3))
    rate_PF = np.where(kind_F[None] == y_P[:, None], 0.04, 0.01)
    codes_PF = (rng.random((n, n_features)) < rate_PF) * 1.0
    fit, test = slice(0, 240), slice(240, n)
    found = probes.fit_code_probe(codes_PF[fit], directions_FD, y_P[fit], groups[fit])
    assert found.directions_FD is not None
    assert (found.predict(codes_PF[test]) == y_P[test]).mean() > 0.65
    null = probes.fit_code_probe(codes_PF[fit], directions_FD, rng.permutation(y_P[fit]), groups[fit])
    assert (null.predict(codes_PF[test]) == y_P[test]).mean() < 0.45
