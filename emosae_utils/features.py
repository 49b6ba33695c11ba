"""Which features respond to emotion, which belong to one emotion and which to several.

A feature is *emotion-responsive* if its activation at the read-out position shares more information with the emotion
label than it does under permuted labels, at a false discovery rate of 5 % within its layer (ours). Labels are permuted
within topics, so a feature that follows the topic alone is not responsive. It *belongs* to the emotions on which its
mean activation is above its grand mean beyond the same permutations, Holm-corrected over the emotions. It is *specific*
or *shared* by the normalised entropy of its mean activations over emotions, cut by a Gaussian mixture (ours).

Everything is selected on the discovery split; what is said of the selected sets is measured on the other two splits.
"""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import linkage
from scipy.sparse import csr_array
from scipy.stats import gamma, hypergeom, spearmanr
from threadpoolctl import threadpool_limits

from emosae_utils import browser, difficulty, scoring, stats
from emosae_utils.codes import Codes, read_codes, save_codes
from emosae_utils.data import load_corpus, which_are_here
from emosae_utils.files import EmosaeError, write_json, write_table
from emosae_utils.ledger import Claim, save_claims
from emosae_utils.models import LM, load_model
from emosae_utils.saes import Dictionary, available_layers, load_dictionaries
from emosae_utils.stats import NOT_SUPPORTED, SUPPORTED, UNDECIDED

Array = np.ndarray[Any, np.dtype[Any]]
# Features as (layer, feature).
Pairs = frozenset[tuple[int, int]]

RESPONSIVE, SPECIFIC, SHARED = "responsive", "specific", "shared"
DISCOVERY, HELD_OUT = "discovery", "held-out"
# Bins of a feature's activation: silent, and this many quantile groups of its positive values.
LEVELS = 3
# Counts held in memory at a time by the permutations.
CHUNK = 8_000_000
# Two sums of the same numbers in another order differ by less.
SAME = 1e-9
# A mixture is not fitted to fewer values, nor are profiles of fewer features compared.
MIN_MIXTURE = 20
MIN_PROFILE = 5


@dataclass(frozen=True)
class Settings:
    """How features are selected. One seed draws rows, permutations and resamples alike.

    Attributes:
        rows_per_emotion: texts of each emotion, of the discovery split and of the others alike.
        template: the wording that the chapter is about.
        templates: other wordings, under which the selection is repeated.
        layers: blocks; all that have a dictionary if empty.
        permutations: of the labels.
        level: false discovery rate, and error rate of the membership in an emotion's set.
        min_active: a feature active on fewer discovery texts is not tested.
        shuffles: of the permutations, how many go through the whole selection as if they were the labels.
        resamples: draws of topics on which the selection is repeated.
        resample_permutations: of the labels, in each of these.
        bootstraps: draws of topics for intervals.
        n_cards: features of each model shown in the browser.
        n_texts: texts on a card.
        seed: of everything drawn.
    """

    rows_per_emotion: int = 100
    template: str = scoring.DEFAULT_TEMPLATE
    templates: Sequence[str] = ("sentence", "label")
    layers: Sequence[int] = ()
    permutations: int = 1000
    level: float = 0.05
    min_active: int = 10
    shuffles: int = 100
    resamples: int = 20
    resample_permutations: int = 200
    bootstraps: int = 1000
    n_cards: int = 72
    n_texts: int = 5
    seed: int = 0


# Mutual information and its permutation null.


def activation_bins(codes_PF: Array) -> Array:
    """Bin of each activation, [prompts, features]: 0 if silent, else 1 to `LEVELS` by quantiles of the positive ones.

    Equal values share a bin, so that the order of the rows says nothing.
    """
    sorted_PF = np.sort(codes_PF, axis=0)
    positive_PF = codes_PF > 0
    active_F, bins_PF = positive_PF.sum(axis=0), positive_PF.astype(np.int8)
    for level in range(1, LEVELS):
        at_F = np.minimum(len(codes_PF) - active_F + level * active_F // LEVELS, len(codes_PF) - 1)
        bins_PF += positive_PF & (codes_PF >= np.take_along_axis(sorted_PF, at_F[None], axis=0))
    return bins_PF


def permuted_labels(y_P: Array, strata_P: Array, n: int, seed: int) -> Array:
    """The labels permuted `n` times within each stratum, [prompts, n]."""
    rng = np.random.default_rng(seed)
    y_PR = np.empty((len(y_P), n), dtype=np.int8)
    for stratum in np.unique(strata_P):
        own = np.flatnonzero(strata_P == stratum)
        y_PR[own] = rng.permuted(np.repeat(y_P[own, None], n, axis=1), axis=0)
    return y_PR


def _one_hot(y_PR: Array, n_classes: int) -> Array:
    """Indicator of each label under each permutation, [prompts, permutations * classes], float32."""
    hot_PRK = y_PR[:, :, None] == np.arange(n_classes, dtype=y_PR.dtype)
    hot: Array = hot_PRK.reshape(len(y_PR), -1).astype(np.float32)
    return hot


def permutation_null(codes_PF: Array, y_PR: Array, n_classes: int, weights_P: Array | None = None) -> Array:
    """Mutual information of each feature's binned activation with each column of labels, [features, columns], nats.

    The plug-in estimate; its upward bias is the same for the labels and their permutations. All features and a chunk
    of permutations are counted in one product of a sparse matrix (few features are active) with the one-hot labels.

    Args:
        codes_PF: activations.
        y_PR: label columns, as from `permuted_labels`.
        n_classes: number of labels.
        weights_P: how often each prompt counts, whole numbers; a repeated prompt keeps one label in every column.
    """
    bins_PF = activation_bins(codes_PF)
    w_P = np.ones(len(codes_PF)) if weights_P is None else np.asarray(weights_P, dtype=float)
    n_features, total = codes_PF.shape[1], w_P.sum()
    at_P, at_F = np.nonzero(bins_PF)
    rows = at_F * LEVELS + bins_PF[at_P, at_F] - 1
    binned = csr_array((w_P[at_P].astype(np.float32), (rows, at_P)), shape=(n_features * LEVELS, len(codes_PF)))
    counts = np.arange(int(total) + 1)
    x_log_x = counts * np.log(np.maximum(counts, 1))
    levels_FL = np.asarray(binned.sum(axis=1)).reshape(n_features, LEVELS)
    marginal_F = sum(x_log_x[n.astype(int)] for n in (*levels_FL.T, total - levels_FL.sum(axis=1)))
    found = np.empty((n_features, y_PR.shape[1]))
    step = max(1, CHUNK // max(1, n_features * LEVELS * n_classes))
    for start in range(0, y_PR.shape[1], step):
        hot = _one_hot(y_PR[:, start : start + step], n_classes)
        class_CK = (w_P @ hot).reshape(-1, n_classes)
        counts_FLCK = (binned @ hot).reshape(n_features, LEVELS, len(class_CK), n_classes)
        silent_FCK = class_CK - counts_FLCK.sum(axis=1)
        joint_FC = x_log_x[counts_FLCK.astype(np.int32)].sum(axis=(1, 3)) + x_log_x[silent_FCK.astype(int)].sum(axis=2)
        labels_C = x_log_x[class_CK.astype(int)].sum(axis=1)
        found[:, start : start + step] = (joint_FC - marginal_F[:, None] - labels_C) / total + np.log(total)
    return np.maximum(found, 0.0)


def mutual_information(codes_PF: Array, y_P: Array, n_classes: int, weights_P: Array | None = None) -> Array:
    """Mutual information of each feature's binned activation with the label, [features], nats."""
    mi_F: Array = permutation_null(codes_PF, np.asarray(y_P)[:, None], n_classes, weights_P)[:, 0]
    return mi_F


def p_values(mi_F: Array, null_FR: Array) -> Array:
    """How often permuted labels share as much information, [features].

    The share of permutations, counting the labels themselves. Where none reaches the observed value, that share is
    only known to be below 1 / (1 + permutations), too coarse to correct for a thousand features; there it is the tail
    of the gamma distribution with the null's own mean and variance, as 2 N MI is about chi-squared. Never above the
    coarse bound.
    """
    n = null_FR.shape[1]
    above_F = (null_FR >= mi_F[:, None] - SAME).sum(axis=1)
    mean_F, variance_F = null_FR.mean(axis=1), np.maximum(null_FR.var(axis=1), SAME**2)
    tail_F = gamma.sf(mi_F, mean_F**2 / variance_F, scale=variance_F / np.maximum(mean_F, SAME))
    p_F: Array = np.where(above_F == 0, np.minimum(tail_F, 1 / (1 + n)), (1 + above_F) / (1 + n))
    return p_F


def false_discovery(p_F: Array) -> Array:
    """Benjamini-Hochberg q values, [features]."""
    from statsmodels.stats.multitest import multipletests

    q_F: Array = multipletests(p_F, method="fdr_bh")[1] if len(p_F) else np.empty(0)
    return q_F


# What a feature prefers.


def class_means(codes_PF: Array, y_PR: Array, n_classes: int, weights_P: Array | None = None) -> Array:
    """Mean activation on the texts of each label, [features, label columns, classes]."""
    w_P = np.ones(len(codes_PF)) if weights_P is None else np.asarray(weights_P, dtype=float)
    weighted = csr_array((codes_PF * w_P[:, None]).T.astype(np.float32))
    hot = _one_hot(y_PR, n_classes)
    means_FRK: Array = (weighted @ hot).reshape(codes_PF.shape[1], y_PR.shape[1], n_classes) / np.maximum(
        (w_P @ hot).reshape(-1, n_classes), SAME
    )
    return means_FRK


def memberships(means_FK: Array, null_FRK: Array, level: float) -> Array:
    """Whether a feature belongs to an emotion, [features, classes].

    One-sided: its mean activation there exceeds that under permuted labels, Holm-corrected over the emotions.
    """
    n, n_classes = null_FRK.shape[1:]
    slack_F11 = 1e-6 * np.abs(means_FK).max(axis=1, initial=0.0)[:, None, None]
    p_FK = (1 + (null_FRK >= means_FK[:, None] - slack_F11).sum(axis=1)) / (1 + n)
    order_FK = np.argsort(p_FK, axis=1)
    steps_FK = np.take_along_axis(p_FK, order_FK, axis=1) * np.arange(n_classes, 0, -1)
    holm_FK = np.empty_like(p_FK)
    np.put_along_axis(holm_FK, order_FK, np.maximum.accumulate(steps_FK, axis=1), axis=1)
    belongs_FK: Array = holm_FK <= level
    return belongs_FK


def normalised_entropy(means: Array) -> Array:
    """Entropy of mean activations over the last axis, divided by its maximum: 0 for one emotion, 1 for all alike."""
    share = means / np.maximum(means.sum(axis=-1, keepdims=True), SAME)
    log_share = np.log(np.where(share > 0, share, 1.0))
    entropy: Array = -(share * log_share).sum(axis=-1) / np.log(means.shape[-1])
    return entropy


@dataclass(frozen=True)
class Cut:
    """Where specific ends and shared begins.

    Attributes:
        value: normalised entropy below which a feature is specific.
        natural: whether two components describe the entropies better than one; if not, `value` is the reference: the
            entropy of a feature that is equally active on half the emotions.
        bic_gain: BIC of one component minus BIC of two; positive where two are better.
        separation: Ashman's D of the two components; below 2 they run into each other.
        means, spreads, shares: of the two components, the lower first.
    """

    value: float
    natural: bool
    bic_gain: float
    separation: float
    means: tuple[float, ...] = ()
    spreads: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()


def entropy_cut(entropy_N: Array, n_classes: int, seed: int = 0) -> Cut:
    """Cut entropies by a two-component Gaussian mixture, at the point between the means where both are as likely."""
    from sklearn.mixture import GaussianMixture

    reference = float(np.log(n_classes / 2) / np.log(n_classes))
    x_N1 = np.asarray(entropy_N, dtype=float)[:, None]
    if len(x_N1) < MIN_MIXTURE:
        return Cut(reference, False, 0.0, 0.0)
    with threadpool_limits(1):
        one, two = (GaussianMixture(k, random_state=seed, n_init=3, reg_covar=1e-5).fit(x_N1) for k in (1, 2))
        gain = float(one.bic(x_N1) - two.bic(x_N1))
        order = np.argsort(two.means_[:, 0])
        means, shares = two.means_[order, 0], two.weights_[order]
        spreads = np.sqrt(two.covariances_[order, 0, 0])
        grid = np.linspace(means[0], means[1], 2001)
        upper = two.predict_proba(grid[:, None])[:, order[1]] >= 0.5
    separation = float(np.sqrt(2) * (means[1] - means[0]) / np.sqrt((spreads**2).sum()))
    # One component inside the other leaves no point between the means where the lower one is the likelier.
    natural = gain > 0 and bool(upper[-1]) and not bool(upper[0])
    value = float(grid[upper.argmax()]) if natural else reference
    found = (tuple(float(v) for v in values) for values in (means, spreads, shares))
    return Cut(value, natural, gain, separation, *found)


# The selection.


def strata(rows: pd.DataFrame) -> Array:
    """Within what labels are permuted: the topic where there is one, else the dataset."""
    topics = rows["topic"] if "topic" in rows else pd.Series([None] * len(rows))
    labels: Array = topics.where(topics.notna(), rows["dataset"]).to_numpy(dtype=str)
    return labels


def select_layer(
    codes_PF: Array,
    y_P: Array,
    y_PR: Array,
    labels: Sequence[str],
    settings: Settings,
    *,
    weights_P: Array | None = None,
    shuffles: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Test every feature of a layer, and find the emotions that the responsive ones belong to.

    Args:
        codes_PF: activations.
        y_P: label indices.
        y_PR: permuted labels, as from `permuted_labels`.
        labels: their names.
        settings: level and smallest number of active texts.
        weights_P: how often each prompt counts.
        shuffles: number of columns of `y_PR` to put in the place of the labels, against the other columns.

    Returns:
        One row per feature: feature, active (texts), frequency (share of texts), mean, maximum, testable, mi (nats), p,
        q, responsive, entropy and entropy_shuffled (responsive features; the second is the mean under permutations),
        mean_<emotion> and in_<emotion>. And one row per shuffle and feature selected on it: shuffle, feature, entropy.

    Raises:
        EmosaeError: if there are too few permutations for the correction over the emotions.
    """
    n, n_classes = y_PR.shape[1], len(labels)
    if n_classes / (1 + n) > settings.level:
        raise EmosaeError(
            f"{n} permutations cannot give p values small enough for {n_classes} emotions at {settings.level}; "
            f"use at least {int(np.ceil(n_classes / settings.level))}"
        )
    w_P = np.ones(len(codes_PF)) if weights_P is None else np.asarray(weights_P, dtype=float)
    active_F = w_P @ (codes_PF > 0)
    testable_F = active_F >= settings.min_active
    tested_PT = codes_PF[:, testable_F]
    null_TR = permutation_null(tested_PT, y_PR, n_classes, weights_P)
    mi_F, p_F, q_F = (np.full(codes_PF.shape[1], np.nan) for _ in range(3))
    mi_F[testable_F] = mutual_information(tested_PT, y_P, n_classes, weights_P)
    p_F[testable_F] = p_values(mi_F[testable_F], null_TR)
    q_F[testable_F] = false_discovery(p_F[testable_F])
    found_F = q_F <= settings.level
    means_FK = class_means(codes_PF, y_P[:, None], n_classes, weights_P)[:, 0]
    belongs_FK = np.zeros(means_FK.shape, dtype=bool)
    entropy_F, shuffled_F = np.full(len(mi_F), np.nan), np.full(len(mi_F), np.nan)
    null_means = class_means(codes_PF[:, found_F], y_PR, n_classes, weights_P)
    belongs_FK[found_F] = memberships(means_FK[found_F], null_means, settings.level)
    entropy_F[found_F] = normalised_entropy(means_FK[found_F])
    shuffled_F[found_F] = normalised_entropy(null_means).mean(axis=1)
    table = pd.DataFrame(
        {
            "feature": np.arange(len(mi_F)),
            "active": active_F.astype(int),
            "frequency": active_F / w_P.sum(),
            "mean": w_P @ codes_PF / w_P.sum(),
            "maximum": codes_PF.max(axis=0),
            "testable": testable_F,
            "mi": mi_F,
            "p": p_F,
            "q": q_F,
            "responsive": found_F,
            "entropy": entropy_F,
            "entropy_shuffled": shuffled_F,
            **{f"mean_{e}": means_FK[:, k] for k, e in enumerate(labels)},
            **{f"in_{e}": belongs_FK[:, k] for k, e in enumerate(labels)},
        }
    )
    index_T, chosen = np.flatnonzero(testable_F), []
    for s in range(min(shuffles, n)):
        others_TR = np.delete(null_TR, s, axis=1)
        picked = index_T[false_discovery(p_values(null_TR[:, s], others_TR)) <= settings.level]
        means = class_means(codes_PF[:, picked], y_PR[:, [s]], n_classes, weights_P)[:, 0]
        chosen.append(pd.DataFrame({"shuffle": s, "feature": picked, "entropy": normalised_entropy(means)}))
    shuffled = (
        pd.concat(chosen, ignore_index=True) if chosen else pd.DataFrame(columns=["shuffle", "feature", "entropy"])
    )
    return table, shuffled


def select(codes: Codes, labels: Sequence[str], settings: Settings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`select_layer` on every layer with the same permutations: features, and what shuffled labels select."""
    y_P = difficulty.gold_indices(codes.rows, labels)
    y_PR = permuted_labels(y_P, strata(codes.rows), settings.permutations, settings.seed)
    tables: list[pd.DataFrame] = []
    shuffled: list[pd.DataFrame] = []
    for layer in codes.layers:
        found = select_layer(codes.dense(layer), y_P, y_PR, labels, settings, shuffles=settings.shuffles)
        for kept, frame in zip((tables, shuffled), found, strict=True):
            frame.insert(0, "layer", layer)
            kept.append(frame)
    return pd.concat(tables, ignore_index=True), pd.concat(shuffled, ignore_index=True)


def resample(codes: Codes, labels: Sequence[str], settings: Settings) -> pd.DataFrame:
    """Repeat the selection on bootstrap draws of groups (topics or writers).

    A text drawn twice counts twice and keeps one label in every permutation, so the null is as inflated as the labels.

    Returns:
        One row per draw and feature selected in it: draw, layer, feature, entropy, in_<emotion>.
    """
    y_P = difficulty.gold_indices(codes.rows, labels)
    y_PR = permuted_labels(y_P, strata(codes.rows), settings.resample_permutations, settings.seed + 1)
    names, group_P = np.unique(codes.rows["group"], return_inverse=True)
    weights_DG = stats.bootstrap_weights(len(names), settings.resamples, settings.seed)
    tables = []
    kept = ["feature", "entropy", *(f"in_{e}" for e in labels)]
    for layer in codes.layers:
        codes_PF = codes.dense(layer)
        for draw, weights_G in enumerate(weights_DG):
            weighted, _ = select_layer(codes_PF, y_P, y_PR, labels, settings, weights_P=weights_G[group_P])
            tables.append(weighted.loc[weighted["responsive"], kept].assign(draw=draw, layer=layer))
    return pd.concat(tables, ignore_index=True)


def sets_of(table: pd.DataFrame, labels: Sequence[str], cut: float) -> dict[str, Pairs]:
    """The sets a selection makes, as (layer, feature): responsive, each emotion's, specific, shared."""
    here = table[table["responsive"]] if "responsive" in table else table
    masks = {RESPONSIVE: np.ones(len(here), dtype=bool)} | {e: here[f"in_{e}"].to_numpy(dtype=bool) for e in labels}
    masks |= {SPECIFIC: (here["entropy"] < cut).to_numpy(), SHARED: (here["entropy"] >= cut).to_numpy()}
    pairs = list(zip(here["layer"], here["feature"], strict=True))
    return {name: frozenset(pairs[i] for i in np.flatnonzero(mask)) for name, mask in masks.items()}


def jaccard(first: frozenset[Any], second: frozenset[Any]) -> float:
    """Share of the union that both sets have; 0 for two empty sets."""
    return len(first & second) / max(1, len(first | second))


def chance_jaccard(first: Pairs, second: Pairs, universe: Pairs) -> float:
    """Jaccard overlap at the expected intersection of random sets of as many (layer, feature) pairs in each layer."""
    in_first, in_second, there = (Counter(layer for layer, _ in pairs) for pairs in (first, second, universe))
    both = sum(n * in_second[layer] / max(1, there[layer]) for layer, n in in_first.items())
    return both / max(1e-9, len(first) + len(second) - both)


def _testable(table: pd.DataFrame) -> Pairs:
    """The (layer, feature) pairs that are active often enough."""
    here = table[table["testable"]]
    return frozenset(zip(here["layer"].astype(int), here["feature"].astype(int), strict=True))


def stability_table(table: pd.DataFrame, resampled: pd.DataFrame, labels: Sequence[str], cut: float) -> pd.DataFrame:
    """Jaccard overlap of each set with its counterpart on resampled topics: set, size, value, low, high, chance."""
    full, universe = sets_of(table, labels, cut), _testable(table)
    draws = [sets_of(draw, labels, cut) for _, draw in resampled.groupby("draw")]
    records = []
    for name, own in full.items():
        values = [jaccard(own, draw[name]) for draw in draws] or [0.0]
        low, high = stats.interval(np.array(values))
        chance = float(np.mean([chance_jaccard(own, d[name], universe) for d in draws] or [0.0]))
        key = {"set": name, "size": len(own), "value": float(np.mean(values))}
        records.append(key | {"low": float(low), "high": float(high), "chance": chance})
    return pd.DataFrame(records)


def sensitivity_table(
    table: pd.DataFrame, others: Mapping[str, pd.DataFrame], labels: Sequence[str], cut: float
) -> pd.DataFrame:
    """Jaccard overlap of each set with that of another wording or dataset, and the rank correlation of information.

    Only features that are active often enough on both sides enter the overlap; `testable` says what share of the set
    these are, since another wording wakes other features.

    Columns: versus, set, size, other_size, testable, value, chance, and rank_correlation (Spearman over the features of
    a layer that both can test, averaged over layers).
    """
    own, records = sets_of(table, labels, cut), []
    for versus, other in others.items():
        common = [e for e in labels if f"in_{e}" in other]
        found = sets_of(other, common, cut)
        both = table.merge(other, on=["layer", "feature"], suffixes=("", "_other"))
        both = both[both["testable"] & both["testable_other"]]
        ranks = [spearmanr(here["mi"], here["mi_other"])[0] for _, here in both.groupby("layer") if len(here) > 2]
        correlation = float(np.nanmean(ranks)) if ranks else float("nan")
        universe = _testable(table) & _testable(other)
        for name, members in found.items():
            mine, theirs = own[name] & universe, members & universe
            sizes = {"size": len(own[name]), "other_size": len(members)}
            values = {
                "testable": len(mine) / max(1, len(own[name])),
                "value": jaccard(mine, theirs),
                "chance": chance_jaccard(mine, theirs, universe),
            }
            records.append({"versus": versus, "set": name} | sizes | values | {"rank_correlation": correlation})
    return pd.DataFrame(records)


def overlap_table(table: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """How much the emotions' sets overlap, beside sets drawn at random from the responsive features of each layer.

    Columns: first, second, both (features), jaccard, expected (features), ratio (both / expected), p_more (that random
    sets share as many, exact).
    """
    here, records = table[table["responsive"]], []
    for first, second in combinations(labels, 2):
        a, b = here[f"in_{first}"], here[f"in_{second}"]
        both, either, expected = int((a & b).sum()), int((a | b).sum()), 0.0
        pmf = np.ones(1)
        for _, own in here.groupby("layer"):
            n, n_a, n_b = len(own), int(own[f"in_{first}"].sum()), int(own[f"in_{second}"].sum())
            pmf = np.convolve(pmf, hypergeom.pmf(np.arange(min(n_a, n_b) + 1), n, n_a, n_b))
            expected += n_a * n_b / n
        key = {"first": first, "second": second, "both": both, "jaccard": both / max(1, either)}
        ratio = both / expected if expected else float("nan")
        more = min(1.0, float(pmf[both:].sum()))
        records.append(key | {"expected": expected, "ratio": ratio, "p_more": more})
    return pd.DataFrame(records)


# What the sets do on texts they were not selected on.


def responses(codes: Codes, table: pd.DataFrame) -> Array:
    """Activations of the responsive features, each with these rows' own mean 0 and spread 1, [prompts, features].

    Features in the order of the table. A feature silent on all rows stays 0.
    """
    columns = [
        codes.dense(int(layer))[:, here["feature"].to_numpy()]
        for layer, here in table[table["responsive"]].groupby("layer", sort=False)
    ]
    if not columns:
        return np.zeros((len(codes), 0), dtype=np.float32)
    active_PN = np.concatenate(columns, axis=1)
    spread_N = active_PN.std(axis=0)
    z_PN: Array = (active_PN - active_PN.mean(axis=0)) / np.where(spread_N > 0, spread_N, 1.0)
    return z_PN


def cell_means(score_PX: Array, y_P: Array, groups_P: Sequence[Any], n_classes: int, weights_RG: Array) -> Array:
    """Means of each score over the texts of each label, [1 + draws, scores, classes]; first over all rows."""
    names, group_P = np.unique(np.asarray(groups_P), return_inverse=True)
    sums_GXK = np.zeros((len(names), score_PX.shape[1], n_classes))
    counts_GK = np.zeros((len(names), n_classes))
    for k in range(n_classes):
        own = y_P == k
        np.add.at(sums_GXK[:, :, k], group_P[own], score_PX[own])
        np.add.at(counts_GK[:, k], group_P[own], 1.0)
    w_RG = np.concatenate([np.ones((1, len(names))), weights_RG])
    means: Array = np.einsum("rg,gxk->rxk", w_RG, sums_GXK) / np.maximum(w_RG @ counts_GK, SAME)[:, None]
    return means


def _weights(rows: pd.DataFrame, settings: Settings) -> Array:
    return stats.bootstrap_weights(rows["group"].nunique(), settings.bootstraps, settings.seed)


def _estimate(draws_R: Array) -> dict[str, float]:
    low, high = stats.interval(draws_R[1:])
    return {"value": float(draws_R[0]), "low": float(low), "high": float(high)}


def coactivation_table(codes: Codes, table: pd.DataFrame, labels: Sequence[str], settings: Settings) -> pd.DataFrame:
    """How strongly each emotion's set responds to the texts of each emotion.

    Columns: set, text, value, low, high (mean over the set's features of the mean activation on these texts, in
    standard deviations from the mean over all texts; intervals over groups). All NaN for a set without features.
    """
    z_PN, here = responses(codes, table), table[table["responsive"]]
    member_NX = here[[f"in_{e}" for e in labels]].to_numpy(dtype=float)
    sizes_X = member_NX.sum(axis=0)
    score_PX = z_PN @ (member_NX / np.where(sizes_X > 0, sizes_X, 1.0))
    score_PX[:, sizes_X == 0] = np.nan
    y_P = difficulty.gold_indices(codes.rows, labels)
    means_RXK = cell_means(score_PX, y_P, codes.rows["group"], len(labels), _weights(codes.rows, settings))
    return pd.DataFrame(
        [
            {"set": own, "text": text} | _estimate(means_RXK[:, x, k])
            for x, own in enumerate(labels)
            for k, text in enumerate(labels)
        ]
    )


def contrast(
    codes: Codes, table: pd.DataFrame, plus_NK: Array, minus_NK: Array, labels: Sequence[str], settings: Settings
) -> dict[str, float]:
    """Mean over responsive features of (mean on some emotions - mean on others), standard deviations, with interval.

    Args:
        codes: of the texts to measure on.
        table: from `select`.
        plus_NK: the emotions each responsive feature should prefer.
        minus_NK: those to compare with; a feature with none on either side is left out.
        labels: names of the emotions.
        settings: bootstrap draws.

    Returns:
        value, low, high, and the number of features.
    """
    z_PN, n_classes = responses(codes, table), len(labels)
    patterns_NM = np.concatenate([plus_NK, minus_NK], axis=1).astype(bool)
    usable_N = patterns_NM[:, :n_classes].any(axis=1) & patterns_NM[:, n_classes:].any(axis=1)
    if not usable_N.any():
        return {"value": float("nan"), "low": float("nan"), "high": float("nan"), "features": 0}
    kinds_XM, kind_N = np.unique(patterns_NM[usable_N], axis=0, return_inverse=True)
    kind_N = kind_N.reshape(-1)
    sizes_X = np.bincount(kind_N, minlength=len(kinds_XM))
    score_PX = z_PN[:, usable_N] @ (np.eye(len(kinds_XM))[kind_N] / sizes_X)
    y_P = difficulty.gold_indices(codes.rows, labels)
    means_RXK = cell_means(score_PX, y_P, codes.rows["group"], n_classes, _weights(codes.rows, settings))
    plus_XK, minus_XK = kinds_XM[:, :n_classes], kinds_XM[:, n_classes:]
    gap_RX = (means_RXK * (plus_XK / plus_XK.sum(axis=1, keepdims=True))).sum(axis=2)
    gap_RX -= (means_RXK * (minus_XK / minus_XK.sum(axis=1, keepdims=True))).sum(axis=2)
    return _estimate(gap_RX @ (sizes_X / sizes_X.sum())) | {"features": int(usable_N.sum())}


def preferences(table: pd.DataFrame, labels: Sequence[str], cut: float) -> dict[str, tuple[Array, Array]]:
    """For each set of responsive features, what its members should prefer to what, as `contrast` takes it.

    An emotion's set: that emotion to all others. Specific features: the emotion they are most active on to the second.
    Shared features of two emotions or more: the second of their emotions to those outside their set.
    """
    here = table[table["responsive"]]
    member_NK = here[[f"in_{e}" for e in labels]].to_numpy(dtype=bool)
    means_NK = here[[f"mean_{e}" for e in labels]].to_numpy()
    eye, specific_N1 = np.eye(len(labels), dtype=bool), (here["entropy"] < cut).to_numpy()[:, None]
    ranked_NK = np.argsort(-means_NK, axis=1)
    found = {e: (member_NK[:, [k]] & eye[k], member_NK[:, [k]] & ~eye[k]) for k, e in enumerate(labels)}
    second_NK = eye[np.argsort(-np.where(member_NK, means_NK, -1.0), axis=1)[:, 1]]
    several_N1 = member_NK.sum(axis=1, keepdims=True) > 1
    return found | {
        SPECIFIC: (specific_N1 & eye[ranked_NK[:, 0]], specific_N1 & eye[ranked_NK[:, 1]]),
        SHARED: (~specific_N1 & several_N1 & second_NK, ~specific_N1 & several_N1 & ~member_NK),
    }


def replication_table(
    table: pd.DataFrame, read: Mapping[str, Codes], labels: Sequence[str], cut: float, settings: Settings
) -> pd.DataFrame:
    """Contrast of every set (see `preferences`) on the rows it was selected on and on others.

    Args:
        table: from `select`.
        read: codes by what they are measured on.
        labels: names of the emotions.
        cut: entropy between specific and shared.
        settings: bootstrap draws.

    Returns:
        Columns set, measured_on, value, low, high (standard deviations), features.
    """
    records = []
    for name, (plus_NK, minus_NK) in preferences(table, labels, cut).items():
        for source, codes in read.items():
            has_K = np.array([(codes.rows["emotion"] == e).any() for e in labels])
            found = contrast(codes, table, plus_NK & has_K, minus_NK & has_K, labels, settings)
            records.append({"set": name, "measured_on": source} | found)
    return pd.DataFrame(records)


@dataclass(frozen=True)
class Tree:
    """Emotions joined by the likeness of their feature profiles.

    Attributes:
        labels: the leaves.
        merges: scipy linkage [emotions - 1, 4], average linkage of correlation distances.
        support: of each merge, the share of bootstrap trees that have the same group of emotions.
    """

    labels: tuple[str, ...]
    merges: Array
    support: tuple[float, ...]


def _clades(merges: Array) -> list[frozenset[int]]:
    leaves = [frozenset([i]) for i in range(len(merges) + 1)]
    for first, second, *_ in merges:
        leaves.append(leaves[int(first)] | leaves[int(second)])
    return leaves[len(merges) + 1 :]


def emotion_tree(codes: Codes, table: pd.DataFrame, labels: Sequence[str], settings: Settings) -> Tree | None:
    """Cluster the emotions by their mean responses over the responsive features; None if hardly any respond."""
    z_PN, y_P = responses(codes, table), difficulty.gold_indices(codes.rows, labels)
    if z_PN.shape[1] < MIN_PROFILE:
        return None
    _, group_P = np.unique(codes.rows["group"], return_inverse=True)
    hot_PK = np.eye(len(labels))[y_P]

    def join(weights_P: Array) -> Array:
        weighted_PK = hot_PK * weights_P[:, None]
        profiles_KN = weighted_PK.T @ z_PN / np.maximum(weighted_PK.sum(axis=0), SAME)[:, None]
        distance_KK = 1 - np.nan_to_num(np.corrcoef(profiles_KN))
        merges: Array = linkage(distance_KK[np.triu_indices(len(labels), 1)], method="average")
        return merges

    with threadpool_limits(1):
        merges = join(np.ones(len(y_P)))
        draws = [set(_clades(join(weights_G[group_P]))) for weights_G in _weights(codes.rows, settings)]
    support = tuple(float(np.mean([clade in draw for draw in draws])) for clade in _clades(merges))
    return Tree(tuple(labels), merges, support)


# The chapter.


@dataclass(frozen=True)
class Measured:
    """What one model's dictionaries show.

    Attributes:
        labels: the emotions.
        codes: of the chapter's dataset and wording, all splits.
        others: codes of discovery texts under another wording, or of another dataset, by name.
        table: one row per layer and feature, from `select`, with kind, emotions and selected (share of resamples).
        shuffled: features that shuffled labels select.
        resampled: features selected on resampled topics.
        variants: the selection on each of `others`.
        cut: between specific and shared.
        tree: of the emotions, by their responses on held-out texts; None if hardly any feature responds.
        cards: for the browser.
        n_layers: of the model.
    """

    labels: tuple[str, ...]
    codes: Codes
    others: Mapping[str, Codes]
    table: pd.DataFrame
    shuffled: pd.DataFrame
    resampled: pd.DataFrame
    variants: Mapping[str, pd.DataFrame]
    cut: Cut
    tree: Tree | None
    cards: tuple[browser.FeatureCard, ...]
    n_layers: int

    @property
    def discovery(self) -> Codes:
        """The codes that features are selected on."""
        return self.codes.select(self.codes.rows["split"] == "discovery")

    @property
    def held_out(self) -> Codes:
        """The codes that nothing was selected on."""
        return self.codes.select(self.codes.rows["split"] != "discovery")


def described(table: pd.DataFrame, resampled: pd.DataFrame, labels: Sequence[str], cut: float, n: int) -> pd.DataFrame:
    """The table with kind (specific, shared or empty), emotions (names) and selected (share of `n` resamples)."""
    kind = np.where(table["entropy"] < cut, SPECIFIC, SHARED)
    belongs_FK = table[[f"in_{e}" for e in labels]].to_numpy(dtype=bool)
    names = [", ".join(e for e, own in zip(labels, row, strict=True) if own) for row in belongs_FK]
    often = resampled.groupby(["layer", "feature"]).size().rename("selected") / max(1, n)
    table = table.assign(kind=np.where(table["responsive"], kind, ""), emotions=names)
    table = table.merge(often.reset_index(), on=["layer", "feature"], how="left")
    return table.assign(selected=table["selected"].fillna(0.0))


def choose_cards(table: pd.DataFrame, labels: Sequence[str], n: int) -> list[tuple[int, int]]:
    """About `n` features worth a card, as (layer, feature).

    The most informative of each emotion and kind in turn, so that a rare kind is not crowded out.
    """
    here = table[table["responsive"]].sort_values("mi", ascending=False)
    queues = [here[here[f"in_{e}"] & (here["kind"] == kind)] for e in labels for kind in (SPECIFIC, SHARED)]
    ranked = sorted(
        (rank, i, (int(layer), int(feature)))
        for i, queue in enumerate([*queues, here])
        for rank, (layer, feature) in enumerate(zip(queue["layer"], queue["feature"], strict=True))
    )
    return list(dict.fromkeys(pair for _, _, pair in ranked))[:n]


def _read(
    lm: LM, dictionaries: Mapping[int, Dictionary], rows: pd.DataFrame, labels: Sequence[str], template: str, what: str
) -> Codes:
    prompts = scoring.build_prompts(lm, rows, labels=labels, template=template)
    return read_codes(lm, prompts, dictionaries, rows, progress=f"{lm.name}: {what}")


def with_model(
    lm: LM, dictionaries: Mapping[int, Dictionary], datasets: Mapping[str, difficulty.Rows], settings: Settings
) -> Measured:
    """Read one model's codes, select features, and select again on resamples, other wordings and other datasets.

    Args:
        lm: the model.
        dictionaries: by layer.
        datasets: rows by dataset; the first is the one the chapter is about.
        settings: sample sizes, levels and seed.
    """
    main, *further = datasets.values()
    labels = difficulty.label_set(main)
    rows = pd.concat([main.fit, main.measure], ignore_index=True)
    codes = _read(lm, dictionaries, rows, labels, settings.template, main.dataset)
    discovery = codes.select(codes.rows["split"] == "discovery")
    others = {}
    for template in settings.templates:
        if template != settings.template:
            name = f"template: {template}"
            others[name] = _read(lm, dictionaries, main.fit, labels, template, name)
    for rest in further:
        own = tuple(e for e in labels if e in difficulty.label_set(rest))
        fit = rest.fit[rest.fit["emotion"].isin(own)].reset_index(drop=True)
        others[f"dataset: {rest.dataset}"] = _read(lm, dictionaries, fit, own, settings.template, rest.dataset)
    table, shuffled = select(discovery, labels, settings)
    cut = entropy_cut(table.loc[table["responsive"], "entropy"].to_numpy(), len(labels), settings.seed)
    resampled = resample(discovery, labels, settings)
    quick = replace(settings, shuffles=0)
    variants = {name: select(read, read.labels, quick)[0] for name, read in others.items()}
    table = described(table, resampled, labels, cut.value, settings.resamples)
    tree = emotion_tree(codes.select(codes.rows["split"] != "discovery"), table, labels, settings)
    shown = browser.make_cards(
        lm,
        dictionaries,
        codes,
        choose_cards(table, labels, settings.n_cards),
        facts=table,
        template=settings.template,
        n_texts=settings.n_texts,
        progress=f"{lm.name}: cards",
    )
    return Measured(labels, codes, others, table, shuffled, resampled, variants, cut, tree, shown, lm.n_layers)


@dataclass(frozen=True)
class Study:
    """Every model that has dictionaries.

    Attributes:
        measured: by model.
        datasets: rows by dataset, the chapter's own first.
        absent: datasets that were asked for and are not on this machine.
        notes: what else was left out, and why.
    """

    measured: Mapping[str, Measured]
    datasets: Mapping[str, difficulty.Rows]
    absent: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def dataset(self) -> str:
        """The dataset that features are selected on."""
        return next(iter(self.datasets))


def run_study(
    models: Sequence[str],
    datasets: Sequence[str],
    settings: Settings,
    *,
    saes: str = "",
    dtype: str | None = None,
    device: str = "auto",
) -> Study:
    """Select and measure the features of every model that has dictionaries, one model in memory at a time.

    Args:
        models: model names; the first is the one the text speaks of.
        datasets: names or paths; features are selected on the first that is here and compared with the others.
        settings: sample sizes, levels and seed.
        saes: where the dictionaries are, as for `load_dictionaries`.
        dtype: arithmetic; each profile's own if None.
        device: as for `load_model`.

    Raises:
        EmosaeError: if no model has a dictionary, no dataset is present, or a layer has no dictionary.
    """
    here, absent = which_are_here(datasets)
    sizes = difficulty.Settings(
        rows_per_emotion=settings.rows_per_emotion, fit_rows_per_emotion=settings.rows_per_emotion, seed=settings.seed
    )
    rows = [difficulty.choose_rows(load_corpus(d).frame, sizes) for d in here]
    found = {chosen.dataset: chosen for chosen in rows}
    measured: dict[str, Measured] = {}
    notes: list[str] = []
    for model in dict.fromkeys(models):
        lm = load_model(model, dtype=dtype, device=device)
        have = available_layers(lm, saes)
        if not have:
            notes.append(
                f"{model} has no dictionaries, so it is left out; train them with `emosae train-saes --model {model}`"
            )
            continue
        dictionaries = load_dictionaries(lm, saes, layers=list(settings.layers) or have)
        measured[model] = with_model(lm, dictionaries, found, settings)
        # Two models need not fit into memory together.
        del lm, dictionaries
        gc.collect()
    if not measured:
        raise EmosaeError(notes[0] if notes else "no model was named; set `model`")
    return Study(measured, found, absent, tuple(notes))


def counts_table(measured: Measured, settings: Settings) -> pd.DataFrame:
    """Features per layer and set, beside what shuffled labels select.

    Columns: layer, set, features, testable, untestable, share (of testable), and for responsive features null and
    null_high, the mean and 95th percentile over shuffles. A feature counts in the set of every emotion it belongs to.
    """
    n_shuffles, records = max(1, min(settings.shuffles, settings.permutations)), []
    for layer, here in measured.table.groupby("layer"):
        testable = int(here["testable"].sum())
        null_S = _per_shuffle(measured.shuffled[measured.shuffled["layer"] == layer], n_shuffles)
        for name, members in sets_of(here, measured.labels, measured.cut.value).items():
            null = (float(null_S.mean()), float(np.percentile(null_S, 95))) if name == RESPONSIVE else (np.nan, np.nan)
            key = {"layer": layer, "set": name, "features": len(members), "testable": testable}
            key |= {"untestable": len(here) - testable, "share": len(members) / max(1, testable)}
            records.append(key | {"null": null[0], "null_high": null[1]})
    return pd.DataFrame(records)


def _per_shuffle(shuffled: pd.DataFrame, n: int) -> Array:
    """Number of features selected in each shuffle, [shuffles]."""
    counts: Array = np.bincount(shuffled["shuffle"].to_numpy(dtype=int), minlength=n)
    return counts


def claim_table(measured: Measured, replication: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Claim C2: specific and shared features both exist. One row per kind, and one for both.

    A kind exists if there are more features of it than on 95 % of the shuffles, and its contrast (see `preferences`)
    on held-out texts is above zero with its whole interval. It does not if there are no more than that, or the
    interval ends at or below zero; else the verdict is open. Columns: kind, features, null_high, value, low, high,
    verdict.
    """
    n_shuffles, records = max(1, min(settings.shuffles, settings.permutations)), []
    held = replication[replication["measured_on"] == HELD_OUT].set_index("set")
    low_entropy = measured.shuffled["entropy"].astype(float) < measured.cut.value
    for kind, chosen in ((SPECIFIC, low_entropy), (SHARED, ~low_entropy)):
        row = held.loc[kind]
        null_high = float(np.percentile(_per_shuffle(measured.shuffled[chosen], n_shuffles), 95))
        if row["features"] <= null_high or row["high"] <= 0:
            verdict = NOT_SUPPORTED
        else:
            verdict = SUPPORTED if row["low"] > 0 else UNDECIDED
        key = {"kind": kind, "features": int(row["features"]), "null_high": null_high}
        records.append(key | {k: float(row[k]) for k in ("value", "low", "high")} | {"verdict": verdict})
    verdicts = {r["verdict"] for r in records}
    both = next(v for v in (NOT_SUPPORTED, UNDECIDED, SUPPORTED) if v in verdicts)
    return pd.DataFrame([*records, {"kind": "both", "verdict": both}])


# What has to hold, by the kind of `claim_table`; its verdict on both has no part of its own.
TESTED = {
    SPECIFIC: "More of them than in 95 % of shuffles; on held-out texts the first emotion leads the second.",
    SHARED: "More of them than in 95 % of shuffles; on held-out texts the second emotion leads those outside the set.",
    "both": "Both kinds exist, by number and by held-out contrast.",
}


def claim_records(claims: pd.DataFrame, dataset: str) -> list[Claim]:
    """The table of `claim_table`, with its models, as records of the claims ledger."""
    records = []
    for row in claims.to_dict("records"):
        part, unit = ("", "") if row["kind"] == "both" else (row["kind"], "SD of activation")
        value, low, high = (float(row[k]) for k in ("value", "low", "high"))
        test, verdict = TESTED[row["kind"]], row["verdict"]
        records.append(Claim("C2", row["model"], dataset, part, value, low, high, unit, test, verdict))
    return records


def folder_of(model: str) -> str:
    """The folder of a model's codes: its name, with slashes as two dashes; of a local folder the last part."""
    name = Path(model).name if Path(model).is_dir() else model.replace("/", "--")
    return re.sub(r"[^\w.-]+", "-", name)


def save(study: Study, settings: Settings, out_dir: Path) -> dict[str, pd.DataFrame]:
    """Compute the chapter's tables, write each as parquet into `out_dir`, and return them by name.

    Also writes the codes of the chapter's dataset (`<model>/codes`), the cards (`cards.json`, and `browser.html` to
    open by itself), the claim (`claims.json`) and `settings.json` with what was left out.
    """
    kept: dict[str, list[pd.DataFrame]] = {}
    trees: dict[str, Any] = {}
    for model, measured in study.measured.items():
        labels, cut, held = measured.labels, measured.cut, measured.held_out
        read = {DISCOVERY: measured.discovery, HELD_OUT: held}
        read |= {name: codes for name, codes in measured.others.items() if name.startswith("dataset")}
        replication = replication_table(measured.table, read, labels, cut.value, settings)
        variants = [table.assign(versus=name) for name, table in measured.variants.items()]
        found = {
            "features": measured.table,
            "variants": pd.concat(variants, ignore_index=True) if variants else pd.DataFrame(),
            "shuffled": measured.shuffled,
            "counts": counts_table(measured, settings),
            "stability": stability_table(measured.table, measured.resampled, labels, cut.value),
            "sensitivity": sensitivity_table(measured.table, measured.variants, labels, cut.value),
            "overlap": overlap_table(measured.table, labels),
            "coactivation": coactivation_table(held, measured.table, labels, settings),
            "replication": replication,
            "claims": claim_table(measured, replication, settings),
        }
        for name, table in found.items():
            kept.setdefault(name, []).append(table.assign(model=model))
        tree = measured.tree
        trees[model] = None if tree is None else asdict(tree) | {"merges": tree.merges.tolist()}
        save_codes(out_dir / folder_of(model) / "codes", measured.codes)
    tables = {name: pd.concat(parts, ignore_index=True) for name, parts in kept.items()}
    for name, table in tables.items():
        write_table(out_dir / f"{name}.parquet", table)
    write_json(out_dir / "trees.json", trees)
    write_json(out_dir / "cuts.json", {model: asdict(m.cut) for model, m in study.measured.items()})
    save_claims(out_dir, claim_records(tables["claims"], study.dataset))
    shown = [card for measured in study.measured.values() for card in measured.cards]
    browser.save_cards(out_dir / "cards.json", shown)
    browser.write_browser(out_dir / "browser.html", shown)
    left_out = {"absent": list(study.absent), "notes": list(study.notes)}
    write_json(out_dir / "settings.json", asdict(settings) | left_out)
    return tables


# The chapter's words: every number, and every verdict on it, comes from the tables.


def _range(row: Any) -> str:
    return str(stats.Estimate(float(row["value"]), float(row["low"]), float(row["high"])))


def rows_note(study: Study) -> str:
    """What was read and what was left out."""
    main = study.datasets[study.dataset]
    sizes = f"{len(main.fit)} discovery texts of {study.dataset}, measured on {len(main.measure)} others"
    line = f"**Texts.** Selected on {sizes}."
    further = [f"{name} ({len(rows.fit)} texts)" for name, rows in study.datasets.items() if name != study.dataset]
    line += f" Compared with {', '.join(further)}." if further else ""
    line += f" Not on this machine: {', '.join(study.absent)} (see {{doc}}`reproduce`)." if study.absent else ""
    return " ".join([line, *(f"{note}." for note in study.notes)])


def selection_finding(tables: Mapping[str, pd.DataFrame], model: str, settings: Settings) -> str:
    """How many features respond, where, and how many would by chance."""
    counts = tables["counts"].query("model == @model")
    here, shuffled = counts[counts["set"] == RESPONSIVE], tables["shuffled"].query("model == @model")
    n_shuffles = max(1, min(settings.shuffles, settings.permutations))
    hit = len(shuffled[["shuffle", "layer"]].drop_duplicates()) / (n_shuffles * len(here))
    first = here[here["features"] > here["null_high"]]["layer"]
    most = here.loc[here["features"].idxmax()]
    per_set = counts[~counts["set"].isin([RESPONSIVE, SPECIFIC, SHARED])].groupby("set", sort=False)["features"].sum()
    sizes = ", ".join(f"{emotion} {n}" for emotion, n in per_set.items())
    onset = (
        f"The first layer with more than shuffled labels give is layer {first.min()}; most" if len(first) else "Most"
    )
    return (
        f"**{model}**: {here['features'].sum()} of {here['testable'].sum()} testable features respond to emotion, over "
        f"{len(here)} layers ({here['untestable'].sum()} more are active on fewer than {settings.min_active} texts and "
        f"were not tested). {onset} are in layer {most['layer']} ({most['features']}, {most['share']:.0%} of those "
        f"tested). On shuffled labels the same procedure selects {here['null'].mean():.2f} features in a layer on "
        f"average, and anything at all in {hit:.1%} of layers. Features by emotion, a shared one counted for each of "
        f"its emotions: {sizes}."
    )


def cut_finding(cut: Cut, table: pd.DataFrame) -> str:
    """Whether specific and shared features are two kinds or the ends of one."""
    here = table[table["responsive"]]
    if here.empty:
        return "No feature responds, so there is nothing to cut."
    model, counts = here["model"].iloc[0], here["kind"].value_counts()
    n_specific, n_shared = int(counts.get(SPECIFIC, 0)), int(counts.get(SHARED, 0))
    if cut.natural:
        apart = "are clearly apart" if cut.separation >= 2 else "run into each other, so the cut is a convention"
        how = (
            f"two components describe the entropies better than one (BIC lower by {cut.bic_gain:.0f}) and {apart} "
            f"(Ashman's D = {cut.separation:.1f}; 2 is a clean separation); the cut is {cut.value:.2f}"
        )
    else:
        how = (
            f"two components do not describe the entropies better than one, so there is no natural cut; the reference "
            f"{cut.value:.2f} is used, the entropy of a feature equally active on half the emotions"
        )
    chance = float(here["entropy_shuffled"].mean())
    return (
        f"**{model}**: {how}. That makes {n_specific} features specific and {n_shared} shared. The mean entropy is "
        f"{here['entropy'].mean():.2f}, against {chance:.2f} for the same features under permuted labels: a feature "
        f"active on few texts looks specific by chance."
    )


def claim_finding(claims: pd.DataFrame, model: str) -> str:
    """The verdict on C2 for one model."""
    here = claims[claims["model"] == model].set_index("kind")
    parts = []
    for kind, what in (
        (SPECIFIC, "lead of their first emotion over the second"),
        (SHARED, "lead of their second emotion over those outside their set"),
    ):
        row = here.loc[kind]
        effect = (
            f"{what} {_range(row)} standard deviations on held-out texts" if row["features"] else "no held-out test"
        )
        parts.append(
            f"{row['features']:.0f} {kind} features (95 % of shuffles give at most {row['null_high']:.0f}; {effect})"
        )
    return f"**C2, {model}: {here.loc['both', 'verdict']}.** There are {parts[0]} and {parts[1]}."


def overlap_finding(tables: Mapping[str, pd.DataFrame], model: str, emotion: str = "disgust") -> str:
    """Whether an emotion's set overlaps or is active together with others: an observation that bears on C4."""
    overlap = tables["overlap"].query("model == @model")
    overlap = overlap[(overlap["first"] == emotion) | (overlap["second"] == emotion)]
    active = tables["coactivation"].query("model == @model and set == @emotion").set_index("text")
    if overlap.empty or active.empty:
        return ""
    if active["value"].isna().all():
        return f"**{model}**: no feature belongs to {emotion}."
    overlap = overlap.assign(
        other=np.where(overlap["first"] == emotion, overlap["second"], overlap["first"]),
        p_holm=stats.holm(overlap["p_more"].tolist()),
    )
    beyond = overlap[overlap["p_holm"] <= 0.05].sort_values("ratio", ascending=False)
    said = ", ".join(f"{r.other} ({r.both} features, {r.ratio:.1f} × chance)" for r in beyond.itertuples())
    sharing = (
        f"shares more features than chance with {said}" if said else "shares more than chance with no other emotion"
    )
    own, others = active.loc[emotion], active.drop(index=emotion)
    nearest = others.loc[others["value"].idxmax()]
    lifted = "above" if nearest["low"] > 0 else "not clearly above"
    return (
        f"**{model}**: the {emotion} set {sharing}. On held-out texts of {emotion} it responds by {_range(own)} "
        f"standard deviations; of the other emotions, {nearest.name} moves it most ({_range(nearest)}, {lifted} "
        f"the average text)."
    )


def replication_finding(replication: pd.DataFrame, model: str, labels: Sequence[str]) -> str:
    """How much of the sets' contrast is left on texts they were not selected on."""
    here = replication[
        (replication["model"] == model) & replication["set"].isin(labels) & (replication["features"] > 0)
    ]
    before, after = (here[here["measured_on"] == m].set_index("set") for m in (DISCOVERY, HELD_OUT))
    if after.empty:
        return f"**{model}**: no emotion has a set."
    weak = [e for e in after.index if not after.loc[e, "low"] > 0]
    left = float((after["value"] / before["value"]).median())
    verdict = "Every set's contrast is above zero there" if not weak else f"Not clearly above zero: {', '.join(weak)}"
    strongest, weakest = after["value"].idxmax(), after["value"].idxmin()
    return (
        f"**{model}**: the median set keeps {left:.0%} of its contrast on held-out texts. {verdict}. The strongest is "
        f"{strongest} ({_range(after.loc[strongest])} standard deviations), the weakest {weakest} "
        f"({_range(after.loc[weakest])})."
    )


def stability_finding(tables: Mapping[str, pd.DataFrame], model: str) -> str:
    """How much of the sets another draw of topics, another wording and another dataset leave."""
    steady = tables["stability"].query("model == @model and set == @RESPONSIVE").iloc[0]
    line = (
        f"**{model}**: on resampled topics the responsive set overlaps with the full one by {_range(steady)} (Jaccard; "
        f"{steady['chance']:.2f} by chance)"
    )
    other = tables["sensitivity"]
    if len(other):
        other = other.query("model == @model and set == @RESPONSIVE")
        line += "; " + "; ".join(
            f"{r.versus}: {r.testable:.0%} of the set is active often enough to be tested there, and of what both can "
            f"test the overlap is {r.value:.2f} ({r.chance:.2f} by chance), rank correlation of information "
            f"{r.rank_correlation:.2f}"
            for r in other.itertuples()
        )
    return f"{line}."
