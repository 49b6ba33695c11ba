"""How information flows across layers: form, topic and emotion at the read-out, and whether they come in phases.

Texts that cross topic, emotion, person and tense are put under several wordings of the question. Per layer we then ask
how much of the variance of the SAE codes, of the residual stream, and of what attention and the feed-forward network
add to it goes with each of these factors; what a linear probe finds; what single features tell; and what the model
would answer if it stopped there (the logit lens). Change points of the curves are the boundaries of phases.

The wording of the question sets the last token and with it nearly all of the variance at the read-out. So the factors
of the text are measured on what is left between texts that were asked about in the same words.

Every curve comes with what shuffled labels give and with a band from resampling whole topics (or bundles of writers).
One set of bootstrap weights serves all layers, so onsets and boundaries, which compare layers, inherit their intervals.

Shapes: P prompts, L layers, Q columns of the design, N shuffles, R bootstrap draws, G resampled blocks, E emotions.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse import csr_array
from threadpoolctl import threadpool_limits

from emosae_utils import probes, scoring, stats
from emosae_utils.codes import encode_residuals
from emosae_utils.data import EMOTIONS, load_corpus, which_are_here
from emosae_utils.features import activation_bins, false_discovery, permutation_null
from emosae_utils.files import EmosaeError, pick, write_json, write_table
from emosae_utils.ledger import Claim, save_claims
from emosae_utils.models import LM, load_model
from emosae_utils.saes import Dictionary, available_layers, load_dictionaries
from emosae_utils.stats import NOT_SUPPORTED, SUPPORTED, UNDECIDED

Array = np.ndarray[Any, np.dtype[Any]]

# What a text looks like; the wording of the question is surface form too, and is kept apart.
TEXT_FORM: tuple[str, ...] = ("person", "tense", "length")
FACTORS: tuple[str, ...] = ("template", *TEXT_FORM, "topic", "emotion")
FORM, TOPIC, EMOTION, WORDING, ALL_FORM = "form", "topic", "emotion", "template", "form with wording"
# The three kinds of information that the claim of a three-phase flow orders.
KINDS: tuple[str, ...] = (FORM, TOPIC, EMOTION)
CODES, RESIDUAL, RAW, ATTENTION, FFN = "codes", "residual", "residual, raw", "attention", "FFN"
N_FOLDS = 4
# Writers are resampled in bundles: hundreds of blocks of one text each say no more and cost a hundredfold.
MAX_BLOCKS = 24
PLACES = ("representation", "factor")
LENGTHS = ("short", "medium", "long")
# Ridge penalty of the closed-form probes, as a share of the mean squared length of the centred rows.
RIDGE = 1.0
# A feature that fires on fewer prompts than this is not tested.
MIN_ACTIVE = 10
# Two layers whose profiles differ by less than this share of a curve's peak are not told apart.
RESOLUTION = 0.02
PHASES_CLAIMED = 3


@dataclass(frozen=True)
class Settings:
    """How the flow is measured. One seed draws rows, templates, folds, shuffles and bootstrap samples alike."""

    rows_per_emotion: int = 144
    templates: Sequence[str] = ("feeling", "reaction", "label")
    layers: Sequence[int] = ()
    permutations: int = 60
    probe_shuffles: int = 20
    bootstraps: int = 400
    top_features: int = 20
    max_phases: int = 6
    tolerance: float = 0.1
    invariance_rows: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Design:
    """Prompts and the factors that describe them.

    Attributes:
        dataset: name.
        rows: one line per prompt, sorted by block.
        levels: level index per prompt of each factor the dataset has, [prompts].
        names: level names of each factor.
        missing: factors the dataset does not have.
        blocks_P: what is resampled together: a topic, or a bundle of writers, as an index from 0 on.
    """

    dataset: str
    rows: pd.DataFrame
    levels: Mapping[str, Array]
    names: Mapping[str, tuple[str, ...]]
    missing: tuple[str, ...]
    blocks_P: Array

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return int(self.blocks_P.max()) + 1

    @property
    def sets(self) -> dict[str, tuple[str, ...]]:
        """Factors and joint factors by name: every single one, "form" of the text, and form with the wording."""
        single = {f: (f,) for f in FACTORS if f in self.levels}
        form = tuple(f for f in TEXT_FORM if f in self.levels)
        joint = {FORM: form} if form else {}
        return joint | single | ({ALL_FORM: (WORDING, *form)} if form and WORDING in self.levels else {})


def _choose(frame: pd.DataFrame, settings: Settings, crossed: bool) -> pd.DataFrame:
    """At most `rows_per_emotion` rows of each emotion; of a crossed dataset whole topics, so that it stays crossed.

    Where that leaves too few topics to fold, the same few slots are taken of as many topics as folds need.
    """
    if not crossed:
        drawn = frame.sample(frac=1.0, random_state=settings.seed)
        return drawn.groupby("emotion").head(settings.rows_per_emotion)
    topics = np.random.default_rng(settings.seed).permutation(sorted(frame["topic"].unique()))
    cell = frame.groupby(["topic", "emotion"])
    n_slots = int(cell.size().max())
    n_topics = max(settings.rows_per_emotion // n_slots, N_FOLDS)
    wanted = min(n_slots, max(1, settings.rows_per_emotion // n_topics))
    slots = np.linspace(0, n_slots - 1, wanted).round() if wanted < n_slots else np.arange(n_slots)
    return frame[frame["topic"].isin(topics[:n_topics]) & cell.cumcount().isin(slots)]


def make_design(frame: pd.DataFrame, settings: Settings) -> Design:
    """Choose rows, give each one wording of the question, and write down its factors.

    Each text is asked about once. Within a topic and emotion the wordings take turns, from a start that is drawn per
    topic, so that every topic and every emotion meets every wording equally often, and the six emotions of one slot
    share a wording. Length is the third of the word counts that a text falls in.

    Args:
        frame: rows of a corpus; `topic`, `person` and `tense` are used where they are complete.
        settings: number of rows, templates and seed.

    Raises:
        EmosaeError: for an unknown template, or fewer than two emotions or four topics (or writers).
    """
    for template in settings.templates:
        pick("template", template, scoring.TEMPLATES)
    frame = frame[frame["emotion"].isin(EMOTIONS)]
    crossed = "topic" in frame and bool(frame["topic"].notna().all())
    rows = _choose(frame, settings, crossed)
    name = str(frame["dataset"].iloc[0]) if len(frame) else "the data"
    if rows["emotion"].nunique() < 2 or rows["group"].nunique() < N_FOLDS:
        raise EmosaeError(
            f"{len(rows)} rows of {name} hold {rows['emotion'].nunique()} emotions and {rows['group'].nunique()} "
            f"groups; the flow needs two emotions and {N_FOLDS} topics or writers, so raise rows_per_emotion"
        )
    rng = np.random.default_rng(settings.seed)
    cell = ["topic", "emotion"] if crossed else ["emotion"]
    starts = {t: int(rng.integers(len(settings.templates))) for t in sorted(rows["topic"].unique())} if crossed else {}
    turn_P = rows.groupby(cell).cumcount() + (rows["topic"].map(starts) if crossed else 0)
    words_P = rows["text"].str.split().str.len()
    band_P = np.searchsorted(np.quantile(words_P, [1 / 3, 2 / 3]), words_P)
    rows = rows.assign(
        template=[settings.templates[int(i) % len(settings.templates)] for i in turn_P],
        length=[LENGTHS[i] for i in band_P],
    )
    groups = rng.permutation(rows["group"].unique()) if not crossed else np.sort(rows["group"].unique())
    rows["block"] = rows["group"].map({g: i % MAX_BLOCKS for i, g in enumerate(groups)})
    rows = rows.sort_values("block", kind="stable").reset_index(drop=True)
    levels, names = {}, {}
    for factor in FACTORS:
        if factor in rows and rows[factor].notna().all() and len(set(rows[factor])) > 1:
            found = [e for e in EMOTIONS if e in set(rows["emotion"])] if factor == "emotion" else None
            codes_P, names_K = pd.factorize(pd.Categorical(rows[factor], categories=found), sort=True)
            levels[factor], names[factor] = np.asarray(codes_P), tuple(map(str, names_K))
    missing = tuple(f for f in FACTORS if f not in levels)
    return Design(name, rows, levels, names, missing, rows["block"].to_numpy())


def strata(design: Design, factor: str) -> Array:
    """Which prompts may swap their label of `factor`, as an index [prompts].

    Form is shuffled among the texts of one topic and emotion; topic among texts of one emotion, person, tense and
    wording; emotion among texts of one topic, person, tense and wording, which a crossed dataset has one each of per
    slot. Length is held only where there is no topic: a slot already fixes its band.
    """
    if factor not in (TOPIC, EMOTION):
        held = ["topic", "emotion"]
    else:
        held = [f for f in ("template", "person", "tense", "topic", "emotion") if f != factor]
        if "topic" not in design.levels:
            held.append("length")
    table = pd.DataFrame({f: design.levels[f] for f in held if f in design.levels}, index=range(len(design)))
    index_P: Array = table.assign(all=0).groupby(list(table.columns) or ["all"], sort=False).ngroup().to_numpy()
    return index_P


def shuffles(strata_P: Array, n: int, rng: np.random.Generator) -> Array:
    """Permutations of the prompts that stay within strata, [n, prompts]."""
    home_P = np.argsort(strata_P, kind="stable")
    orders_NP = np.empty((n, len(strata_P)), dtype=int)
    for i in range(n):
        orders_NP[i, home_P] = np.lexsort((rng.random(len(strata_P)), strata_P))
    return orders_NP


def _dummies(levels_P: Array) -> Array:
    """Indicator columns of all levels but the first, [prompts, levels - 1]."""
    columns_PK: Array = (levels_P[:, None] == np.arange(1, int(levels_P.max()) + 1)).astype(float)
    return columns_PK


@dataclass(frozen=True)
class Partition:
    """What splits the variance of any matrix over the factors; made once per design.

    Attributes:
        columns_PQ: the linear model with all factors: a constant and dummies.
        contrasts: by factor, what turns cross products of the columns with the data into the sum of squares that is
            lost when the factor is dropped, [draws + 1, columns, columns]; the first entry is the data as they are.
        bases: by factor, orthonormal directions of its shuffled dummies outside the other factors, [prompts, N x df].
        weights_RG: how often each block counts in each draw; the first row is all ones.
        blocks_P: block of each prompt, sorted.
        n_shuffles: N.
        wording_RQQ: like `contrasts`, for the sum of squares of the constant and the wording.
    """

    columns_PQ: Array
    contrasts: Mapping[str, Array]
    bases: Mapping[str, Array]
    weights_RG: Array
    blocks_P: Array
    n_shuffles: int
    wording_RQQ: Array


def make_partition(design: Design, settings: Settings) -> Partition:
    """Prepare the sums of squares, their bootstrap draws and their permutation nulls."""
    rng = np.random.default_rng(settings.seed)
    parts = {f: _dummies(design.levels[f]) for f in FACTORS if f in design.levels}
    columns_PQ = np.hstack([np.ones((len(design), 1)), *parts.values()])
    ends = np.cumsum([1, *(p.shape[1] for p in parts.values())])
    own = {f: np.arange(a, b) for f, a, b in zip(parts, ends[:-1], ends[1:], strict=True)}
    drawn_RG = stats.bootstrap_weights(design.n_blocks, settings.bootstraps, settings.seed)
    weights_RG = np.vstack([np.ones(design.n_blocks), drawn_RG])
    crossed_GQQ = np.array([columns_PQ[i].T @ columns_PQ[i] for i in _slices(design.blocks_P)])
    crossed_RQQ = np.einsum("rg,gpq->rpq", weights_RG, crossed_GQQ)
    full_RQQ = np.linalg.pinv(crossed_RQQ, rcond=1e-9, hermitian=True)
    wording = np.concatenate([[0], own.get(WORDING, np.array([], dtype=int))])
    wording_RQQ, at = np.zeros_like(full_RQQ), np.ix_(np.arange(len(weights_RG)), wording, wording)
    wording_RQQ[at] = np.linalg.pinv(crossed_RQQ[at], rcond=1e-9, hermitian=True)
    contrasts, bases = {}, {}
    for name, members in design.sets.items():
        dropped = np.concatenate([own[f] for f in members])
        kept = np.setdiff1d(np.arange(columns_PQ.shape[1]), dropped)
        contrasts[name] = full_RQQ.copy()
        at = np.ix_(np.arange(len(weights_RG)), kept, kept)
        contrasts[name][at] -= np.linalg.pinv(crossed_RQQ[at], rcond=1e-9, hermitian=True)
        # The reduced model's directions are projected out of each shuffled copy of the factor.
        others_PK = np.linalg.svd(columns_PQ[:, kept], full_matrices=False)
        basis_PK = others_PK[0][:, others_PK[1] > 1e-9 * others_PK[1][0]]
        orders_NP = shuffles(strata(design, name), settings.permutations, rng)
        copies = []
        for order_P in orders_NP:
            copy_PK = columns_PQ[np.ix_(order_P, dropped)]
            q_PK, r_KK = np.linalg.qr(copy_PK - basis_PK @ (basis_PK.T @ copy_PK))
            copies.append(q_PK * (np.abs(np.diagonal(r_KK)) > 1e-6))
        bases[name] = np.hstack(copies).astype(np.float32)
    n = settings.permutations
    return Partition(columns_PQ, contrasts, bases, weights_RG, design.blocks_P, n, wording_RQQ)


def _slices(blocks_P: Array) -> list[slice]:
    edges = np.searchsorted(blocks_P, np.arange(int(blocks_P.max()) + 2))
    return [slice(int(a), int(b)) for a, b in pairwise(edges)]


def _within(values_PD: Array, groups_P: Array) -> Array:
    """Rows less the mean of their group, [prompts, width], float64."""
    centred_PD = values_PD.astype(np.float64)
    for group in np.unique(groups_P):
        centred_PD[groups_P == group] -= centred_PD[groups_P == group].mean(axis=0)
    return centred_PD


def gram(x_PD: Array, wording_P: Array, *, standardise: bool = False) -> Array:
    """Inner products of the centred rows, [prompts, prompts], float32.

    Args:
        x_PD: activations.
        wording_P: index of each prompt's wording.
        standardise: give every dimension the same variance between texts asked about in the same words.
    """
    centred_PD = x_PD - x_PD.mean(axis=0, dtype=np.float64)
    if standardise:
        spread_D = _within(x_PD, wording_P).std(axis=0)
        centred_PD /= np.where(spread_D > 1e-9 * max(spread_D.max(initial=0.0), 1e-30), spread_D, np.inf)
    centred_PD /= max(float(np.sqrt((centred_PD**2).sum(axis=1).mean())), 1e-30)
    centred_PD = centred_PD.astype(np.float32)
    inner_PP: Array = centred_PD @ centred_PD.T
    return inner_PP


def variance_shares(gram_PP: Array, partition: Partition) -> tuple[dict[str, Array], dict[str, Array]]:
    """Share of variance that is lost when a factor is dropped from the linear model with all factors.

    Sums of squares are added up over dimensions before dividing; only inner products of the rows enter, so the width
    costs nothing. Factors of the text are shares of the variance within wordings; the wording itself, alone and with
    form, is a share of all variance.

    Args:
        gram_PP: inner products of the centred rows.
        partition: from `make_partition`.

    Returns:
        By factor, the plain share in the data and in each bootstrap draw [R + 1], and in each shuffle [N].
    """
    z_PQ, w_RG, cuts = partition.columns_PQ, partition.weights_RG, _slices(partition.blocks_P)
    left_GQP = np.stack([z_PQ[i].T @ gram_PP[i] for i in cuts])
    cross_GHQQ = np.stack([left_GQP[:, :, i] @ z_PQ[i] for i in cuts], axis=1)
    n_blocks, q = len(cuts), z_PQ.shape[1]
    pairs_RGH = (w_RG[:, :, None] * w_RG[:, None, :]).reshape(len(w_RG), -1)
    cross_RQQ = (pairs_RGH @ cross_GHQQ.reshape(n_blocks**2, q * q)).reshape(-1, q, q)
    sizes_G = np.array([i.stop - i.start for i in cuts])
    squares_R = w_RG @ np.array([np.diagonal(gram_PP)[i].sum(dtype=float) for i in cuts])
    all_R = np.maximum(squares_R - cross_RQQ[:, 0, 0] / (w_RG @ sizes_G), 1e-30)
    within_R = np.maximum(squares_R - np.einsum("rpq,rpq->r", partition.wording_RQQ, cross_RQQ), 1e-30)
    shares, nulls = {}, {}
    for name, contrast_RQQ in partition.contrasts.items():
        total_R = all_R if name in (WORDING, ALL_FORM) else within_R
        shares[name] = np.einsum("rpq,rpq->r", contrast_RQQ, cross_RQQ) / total_R
        basis_PK = partition.bases[name]
        squares_K = np.einsum("pk,pk->k", gram_PP @ basis_PK, basis_PK).astype(float)
        nulls[name] = squares_K.reshape(partition.n_shuffles, -1).sum(axis=1) / total_R[0]
    return shares, nulls


def recentred(value: Array | float, draws_R: Array) -> Array:
    """Bootstrap draws moved so that their mean is the value, along the first axis.

    A resample holds some topics twice, which inflates a variance share or a mutual information as a smaller sample
    would. The estimate is freed of that bias by its permutation null; the draws give the spread around it.
    """
    moved_R: Array = draws_R - draws_R.mean(axis=0) + value
    return moved_R


def probe_folds(design: Design, factor: str) -> Array:
    """Fold of each prompt, [prompts]: whole topics (or writers) are left out, and whole emotions to find the topic.

    A topic cannot be found if it was never seen; leaving out emotions asks whether it looks the same under others.
    """
    if factor == TOPIC:
        emotions_P = design.levels[EMOTION]
        folds_P: Array = emotions_P % min(3, int(emotions_P.max()) + 1)
        return folds_P
    blocked_P: Array = design.blocks_P % N_FOLDS
    return blocked_P


def ridge_right(gram_PP: Array, labels_NP: Array, folds_P: Array, *, ridge: float = RIDGE) -> Array:
    """Whether a linear probe finds the label of each left-out prompt, for many labellings at once, [N, prompts].

    The probe is one-against-rest least squares with an L2 penalty, solved in closed form from inner products.

    Args:
        gram_PP: inner products of the rows.
        labels_NP: labellings, each an index per prompt.
        folds_P: fold of each prompt; each fold is predicted from the others.
        ridge: penalty as a share of the mean squared length of the centred rows.
    """
    n_classes = int(labels_NP.max()) + 1
    right_NP = np.zeros(labels_NP.shape, dtype=bool)
    for fold in np.unique(folds_P):
        test, train = folds_P == fold, folds_P != fold
        k_TT, k_ST = gram_PP[np.ix_(train, train)], gram_PP[np.ix_(test, train)]
        mean_T, mean = k_TT.mean(axis=0), k_TT.mean()
        k_ST += mean - k_ST.mean(axis=1, keepdims=True) - mean_T
        k_TT += mean - mean_T[:, None] - mean_T
        k_TT[np.diag_indices_from(k_TT)] += ridge * max(float(np.trace(k_TT)) / len(k_TT), 1e-12)
        y_TNK = (labels_NP[:, train].T[:, :, None] == np.arange(n_classes)).astype(gram_PP.dtype)
        prior_NK = y_TNK.mean(axis=0)
        weights_TC = cho_solve(cho_factor(k_TT), (y_TNK - prior_NK).reshape(len(k_TT), -1))
        scores_SNK = (k_ST @ weights_TC).reshape(len(k_ST), *prior_NK.shape) + prior_NK
        right_NP[:, test] = (scores_SNK.argmax(axis=2) == labels_NP[:, test].T).T
    return right_NP


def _plug_in(counts_XBE: Array) -> Array:
    """Mutual information of bins and labels from their counts [..., bins, labels], nats."""
    total = np.maximum(counts_XBE.sum(axis=(-2, -1), keepdims=True), 1e-12)
    joint = counts_XBE / total
    apart = joint.sum(axis=-1, keepdims=True) * joint.sum(axis=-2, keepdims=True)
    information: Array = (joint * np.log(np.where(joint > 0, joint, 1) / np.where(joint > 0, apart, 1))).sum((-2, -1))
    return information


def _counts(binned_PF: Array, labels_P: Array, n_labels: int) -> Array:
    """How often each bin of each feature meets each label, [features, bins, labels]."""
    y_PE = (labels_P[:, None] == np.arange(n_labels)).astype(np.float32)
    counts_FBE: Array = np.stack([(binned_PF == b).astype(np.float32).T @ y_PE for b in range(4)], axis=1)
    return counts_FBE


@dataclass(frozen=True)
class Information:
    """What the single features of one layer tell about the emotion.

    Attributes:
        value_F: mutual information less the mean of its null, nats; features that fire often enough only.
        null_NF: the same under shuffled labels.
        draws_RF: bootstrap draws of `value_F`, centred on it.
        features_F: which features these are.
    """

    value_F: Array
    null_NF: Array
    draws_RF: Array
    features_F: Array

    def top(self, n: int) -> tuple[float, Array, Array]:
        """Mean of the `n` most informative features: value, bootstrap draws, and the same choice under the null."""
        if not len(self.value_F):
            return 0.0, np.zeros(len(self.draws_RF)), np.zeros(len(self.null_NF))
        best = np.argsort(-self.value_F)[:n]
        null_N = -np.sort(-self.null_NF, axis=1)[:, :n].mean(axis=1)
        return float(self.value_F[best].mean()), self.draws_RF[:, best].mean(axis=1), null_N

    def share_above(self) -> tuple[float, Array]:
        """Share of features above the 95th percentile of their own null: value and bootstrap draws. Chance is .05."""
        if not len(self.value_F):
            return 0.0, np.zeros(len(self.draws_RF))
        line_F = np.quantile(self.null_NF, 0.95, axis=0)
        return float((self.value_F > line_F).mean()), (self.draws_RF > line_F).mean(axis=1)

    def responsive(self, rate: float = 0.05) -> Array:
        """Which features tell of the emotion at a false discovery rate, [features].

        p values come from the nulls of all features of the layer, each in units of its own spread.
        """
        spread_F = np.maximum(self.null_NF.std(axis=0), 1e-12)
        pooled = np.sort((self.null_NF / spread_F).ravel())
        p_F = (1 + len(pooled) - np.searchsorted(pooled, self.value_F / spread_F)) / (1 + len(pooled))
        kept_F: Array = false_discovery(p_F) <= rate
        return kept_F


def feature_information(
    codes_PF: Array, design: Design, weights_RG: Array, n: int, rng: np.random.Generator
) -> Information:
    """Mutual information of single features with the emotion, its null within strata, and its bootstrap draws."""
    features_F = np.flatnonzero((codes_PF > 0).sum(axis=0) >= MIN_ACTIVE)
    active_PF, y_P = codes_PF[:, features_F], design.levels[EMOTION]
    binned_PF = activation_bins(active_PF)
    n_labels = int(y_P.max()) + 1
    orders_NP = shuffles(strata(design, EMOTION), n, rng)
    null_FN = permutation_null(active_PF, y_P[orders_NP].T, n_labels)
    counts_GFBE = np.stack([_counts(binned_PF[i], y_P[i], n_labels) for i in _slices(design.blocks_P)])
    value_F = _plug_in(counts_GFBE.sum(axis=0))
    flat_GC = counts_GFBE.reshape(len(counts_GFBE), -1)
    draws_RF = np.stack([_plug_in((w_G @ flat_GC).reshape(counts_GFBE.shape[1:])) for w_G in weights_RG])
    bias_F = null_FN.mean(axis=1)
    # The bias of a plug-in estimate grows as the effective number of prompts falls, by a different factor in each draw.
    sizes_G = np.bincount(design.blocks_P)
    growth_R = len(design) * (weights_RG**2 @ sizes_G) / (weights_RG @ sizes_G) ** 2
    draws_RF -= growth_R[:, None] * bias_F
    return Information(value_F - bias_F, null_FN.T - bias_F, recentred(value_F - bias_F, draws_RF), features_F)


def label_lens(lm: LM, resid_PLD: Array, label_ids: Sequence[Sequence[int]]) -> Array:
    """Label logits if the model stopped at a layer, less their mean over labels, [prompts, layers, labels], nats.

    The final norm and the label rows of the output matrix are put on the residual of each layer, with the model's own
    soft cap where it has one. A label counts by its first token; differences of logits are differences of scores.
    """
    kind, lens = getattr(torch, lm.dtype), np.empty((*resid_PLD.shape[:2], len(label_ids)))
    with torch.no_grad():
        for i in range(resid_PLD.shape[1]):
            x_PD = torch.from_numpy(np.ascontiguousarray(resid_PLD[:, i])).to(lm.device, kind)
            lens[:, i] = scoring.label_differences(lm, x_PD, label_ids).cpu().numpy()
    return lens


@dataclass(frozen=True)
class Reading:
    """What one model holds and says at the read-out of the prompts of one design.

    Attributes:
        model: name.
        n_layers: how many blocks the model has.
        layers: the blocks that were read, ascending.
        design: the prompts and their factors.
        inside: activations by place (residual, attention, FFN), [prompts, layers, d_model].
        codes: feature activations by layer, for layers with a dictionary.
        lens_PLE: label logits by layer less their mean, nats.
        lens_prior_PLE: the same for content-free texts under each prompt's wording.
        invariance: largest relative differences between batches of one and of many, by place; of scores, in nats.
        notes: what the reader should know.
    """

    model: str
    n_layers: int
    layers: tuple[int, ...]
    design: Design
    inside: Mapping[str, Array]
    codes: Mapping[int, csr_array] = field(default_factory=dict)
    lens_PLE: Array | None = None
    lens_prior_PLE: Array | None = None
    invariance: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def matrices(self) -> Iterator[tuple[str, int, Array, bool]]:
        """Representation, layer, activations [prompts, width], and whether dimensions are to be standardised.

        One dimension of a residual stream can hold most of its variance, so dimensions are given equal weight; the
        stream as it is comes too. Activations of unit-norm features share one scale and stay as they are.
        """
        for layer in sorted(self.codes):
            yield CODES, layer, self.codes[layer].toarray(), False
        for place, x_PLD in self.inside.items():
            for i, layer in enumerate(self.layers):
                yield place, layer, x_PLD[:, i], True
                if place == RESIDUAL:
                    yield RAW, layer, x_PLD[:, i], False


def read_sites(lm: LM, prompts: scoring.Prompts, layers: Sequence[int], **options: Any) -> dict[str, Array]:
    """The residual stream after each block and what attention and FFN added to it, at the read-out, by place.

    Attention and FFN are taken as they enter the sum: after the norm that Gemma puts on them, so that
    residual after = residual before + attention + FFN.
    """
    read = scoring.read_out(lm, prompts, layers=layers, parts=True, **options)
    assert read.resid_PLD is not None and read.attn_PLD is not None and read.ffn_PLD is not None
    return {"scores": read.scores_PE, RESIDUAL: read.resid_PLD, ATTENTION: read.attn_PLD, FFN: read.ffn_PLD}


def batch_invariance(lm: LM, prompts: scoring.Prompts, layers: Sequence[int]) -> dict[str, float]:
    """Largest difference between prompts read one at a time and in batches of up to 32.

    By place, the length of the difference as a share of the vector's; of scores, nats.
    """
    longest = max(len(ids) for ids in prompts.ids)
    one, many = (read_sites(lm, prompts, layers, batch_tokens=n) for n in (1, 32 * longest))
    found = {"scores": float(np.abs(one["scores"] - many["scores"]).max())}
    for place in (RESIDUAL, ATTENTION, FFN):
        gap_PL = np.linalg.norm(one[place] - many[place], axis=2)
        found[place] = float((gap_PL / np.maximum(np.linalg.norm(one[place], axis=2), 1e-30)).max())
    return found


def read(lm: LM, design: Design, settings: Settings, dictionaries: Mapping[int, Dictionary]) -> Reading:
    """Run the prompts of a design through a model and keep everything the flow needs.

    Raises:
        EmosaeError: for a layer the model does not have.
    """
    layers = tuple(sorted(settings.layers)) or tuple(range(lm.n_layers))
    labels = design.names[EMOTION]
    shape = (len(design), len(layers))
    inside = {p: np.empty((*shape, lm.d_model), dtype=np.float32) for p in (RESIDUAL, ATTENTION, FFN)}
    lens_PLE, prior_PLE = np.empty((*shape, len(labels))), np.empty((*shape, len(labels)))
    invariance: dict[str, float] = {}
    notes: tuple[str, ...] = ()
    for template in dict.fromkeys(design.rows["template"]):
        here_P = (design.rows["template"] == template).to_numpy()
        wording = {"template": template, "labels": labels}
        prompts = scoring.build_prompts(lm, design.rows[here_P], **wording)
        found = read_sites(lm, prompts, layers, progress=f"{lm.name}: {design.dataset}, {template}")
        for place in inside:
            inside[place][here_P] = found[place]
        lens_PLE[here_P] = label_lens(lm, found[RESIDUAL], prompts.label_ids)
        free = scoring.build_prompts(lm, pd.DataFrame({"text": list(scoring.CONTENT_FREE)}), **wording)
        held = scoring.read_out(lm, free, layers=layers).resid_PLD
        assert held is not None
        prior_PLE[here_P] = label_lens(lm, held, free.label_ids).mean(axis=0)
        if not invariance:
            few = scoring.Prompts(prompts.ids[: settings.invariance_rows], prompts.labels, prompts.label_ids)
            invariance = batch_invariance(lm, few, layers)
        if not scoring.first_tokens_differ(prompts):
            notes = ("two labels begin with the same token, so the logit lens cannot tell them apart",)
    have = [layer for layer in layers if layer in dictionaries]
    at = [layers.index(layer) for layer in have]
    codes = encode_residuals({k: dictionaries[k] for k in have}, inside[RESIDUAL][:, at]) if have else {}
    return Reading(lm.name, lm.n_layers, layers, design, inside, codes, lens_PLE, prior_PLE, invariance, notes)


@dataclass(frozen=True)
class Curve:
    """One quantity over layers, with its bootstrap draws.

    Attributes:
        layers: block indices.
        draws_LR: the value in the first column, bootstrap draws centred on it in the others, [layers, draws + 1].
        null_L: what shuffled labels stay below in 95 cases of 100.
    """

    layers: tuple[int, ...]
    draws_LR: Array
    null_L: Array

    @property
    def value_L(self) -> Array:
        """The estimate per layer."""
        values: Array = self.draws_LR[:, 0]
        return values

    def table(self, n_layers: int, **columns: Any) -> pd.DataFrame:
        """Columns layer, depth, value, low, high, null_high, and those given."""
        low_L, high_L = stats.interval(self.draws_LR[:, 1:].T)
        depth = np.array(self.layers) / max(n_layers - 1, 1)
        table = {"layer": self.layers, "depth": depth, "value": self.value_L, "low": low_L, "high": high_L}
        return pd.DataFrame(table | {"null_high": self.null_L}).assign(**columns)


def _block_means(values_P: Array, keep_P: Array, design: Design, weights_RG: Array) -> Array:
    """Mean of some of the prompts, in the data and in each draw, [draws + 1]."""
    sums_G = np.bincount(design.blocks_P, values_P * keep_P, minlength=design.n_blocks)
    sizes_G = np.bincount(design.blocks_P, keep_P.astype(float), minlength=design.n_blocks)
    means_R: Array = (weights_RG @ sums_G) / np.maximum(weights_RG @ sizes_G, 1e-12)
    return means_R


def _stack(layers: Sequence[int], found: Sequence[tuple[Array, float]]) -> Curve:
    return Curve(tuple(layers), np.array([draws for draws, _ in found]), np.array([null for _, null in found]))


def share_and_probe_curves(
    reading: Reading, partition: Partition, settings: Settings
) -> tuple[dict[tuple[str, str], Curve], dict[tuple[str, str], Curve]]:
    """Variance shares, freed of what shuffled labels explain, and probe accuracies, by (representation, factor)."""
    design, rng = reading.design, np.random.default_rng(settings.seed)
    wording_P = design.levels.get(WORDING, np.zeros(len(design), dtype=int))
    probed = [f for f in (WORDING, "person", "tense", TOPIC, EMOTION) if f in design.levels]
    labellings = {
        f: np.vstack([design.levels[f], design.levels[f][shuffles(strata(design, f), settings.probe_shuffles, rng)]])
        for f in probed
    }
    everyone_P, same = np.ones(len(design)), wording_P[:, None] == wording_P
    centring_PP = (np.eye(len(design)) - same / same.sum(axis=1)).astype(np.float32)
    shares: dict[tuple[str, str], list[tuple[int, Array, float]]] = {}
    accuracies: dict[tuple[str, str], list[tuple[int, Array, float]]] = {}
    for place, layer, x_PD, standardise in reading.matrices():
        gram_PP = gram(x_PD, wording_P, standardise=standardise)
        values, nulls = variance_shares(gram_PP, partition)
        for name, plain_R in values.items():
            chance = nulls[name].mean()
            draws_R = np.concatenate([plain_R[:1], recentred(plain_R[0], plain_R[1:])]) - chance
            line = float(np.quantile(nulls[name], 0.95) - chance)
            shares.setdefault((place, name), []).append((layer, draws_R, line))
        if place == RAW:
            continue
        if place == CODES:
            gram_PP = gram(probes.ParetoScaler().fit_transform(x_PD), wording_P)
        # The wording is known, so a probe for a factor of the text need not see past it.
        inner_PP = centring_PP @ gram_PP @ centring_PP
        for name in probed:
            seen_PP = gram_PP if name == WORDING else inner_PP
            right_NP = ridge_right(seen_PP, labellings[name], probe_folds(design, name))
            means_R = _block_means(right_NP[0], everyone_P, design, partition.weights_RG)
            line = float(np.quantile(right_NP[1:].mean(axis=1), 0.95))
            accuracies.setdefault((place, name), []).append((layer, means_R, line))

    def curves(found: Mapping[tuple[str, str], Sequence[tuple[int, Array, float]]]) -> dict[tuple[str, str], Curve]:
        return {k: _stack([layer for layer, _, _ in v], [(d, n) for _, d, n in v]) for k, v in found.items()}

    return curves(shares), curves(accuracies)


# What single features tell: mean of all active ones and of the best, share beyond their own null, and share responsive
# at a false discovery rate.
MEAN, TOP, ABOVE, RESPONSIVE = "mean (nats)", "top features (nats)", "share above null", "share responsive"


def feature_curves(reading: Reading, partition: Partition, settings: Settings) -> dict[str, Curve]:
    """Per layer, what single features tell of the emotion, by measure; empty without dictionaries.

    "share responsive" has no draws of its own and carries its value in all of them.
    """
    rng = np.random.default_rng(settings.seed)
    found: dict[str, list[tuple[Array, float]]] = {MEAN: [], TOP: [], ABOVE: [], RESPONSIVE: []}
    for layer in sorted(reading.codes):
        codes_PF = reading.codes[layer].toarray()
        told = feature_information(codes_PF, reading.design, partition.weights_RG, settings.permutations, rng)
        for measure, n in ((MEAN, len(told.features_F)), (TOP, settings.top_features)):
            value, draws_R, null_N = told.top(n)
            line = float(np.quantile(null_N, 0.95))
            found[measure].append((np.concatenate([[value], draws_R[1:]]), line))
        share, draws_R = told.share_above()
        found[ABOVE].append((np.concatenate([[share], recentred(share, draws_R[1:])]), 0.05))
        kept_F = told.responsive()
        found[RESPONSIVE].append((np.full(len(draws_R), kept_F.mean() if len(kept_F) else 0.0), 0.0))
    return {k: _stack(sorted(reading.codes), v) for k, v in found.items()} if reading.codes else {}


LENS_RAW, LENS_CALIBRATED, LENS_GAP = "accuracy, raw", "accuracy, calibrated", "gold difference"


def lens_curves(reading: Reading, partition: Partition, settings: Settings) -> dict[tuple[str, str], Curve]:
    """Logit lens by (measure, emotion or "all"): accuracy, and calibrated gold logit difference in nats."""
    if reading.lens_PLE is None or reading.lens_prior_PLE is None:
        return {}
    design, rng = reading.design, np.random.default_rng(settings.seed)
    gold_P = design.levels[EMOTION]
    shuffled_NP = gold_P[shuffles(strata(design, EMOTION), settings.permutations, rng)]
    found: dict[tuple[str, str], list[tuple[Array, float]]] = {}

    def add(measure: str, emotion: str, values_NP: Array, keep_NP: Array) -> None:
        draws_R = _block_means(values_NP[0], keep_NP[0], design, partition.weights_RG)
        null_N = (values_NP[1:] * keep_NP[1:]).sum(axis=1) / np.maximum(keep_NP[1:].sum(axis=1), 1)
        found.setdefault((measure, emotion), []).append((draws_R, float(np.quantile(null_N, 0.95))))

    labels_NP = np.vstack([gold_P, shuffled_NP])
    every_NP = np.ones(labels_NP.shape, dtype=bool)
    for i in range(len(reading.layers)):
        raw_PE = reading.lens_PLE[:, i]
        free_PE = raw_PE - reading.lens_prior_PLE[:, i]
        add(LENS_RAW, "all", raw_PE.argmax(axis=1) == labels_NP, every_NP)
        add(LENS_CALIBRATED, "all", free_PE.argmax(axis=1) == labels_NP, every_NP)
        # Scores come less their mean over labels, so gold minus the mean of the others is a multiple of gold.
        n_labels = free_PE.shape[1]
        gap_NP = np.take_along_axis(free_PE.T, labels_NP, axis=0) * n_labels / (n_labels - 1)
        add(LENS_GAP, "all", gap_NP, every_NP)
        for e, emotion in enumerate(design.names[EMOTION]):
            add(LENS_GAP, emotion, gap_NP, labels_NP == e)
    return {k: _stack(reading.layers, v) for k, v in found.items()}


def segment(profile_LC: Array, n_phases: int) -> tuple[int, ...]:
    """Where the phases after the first begin, as indices into the layers: the best piecewise-constant fit.

    Exact dynamic programming (ruptures) over squared error; a phase is at least two layers long.
    """
    if n_phases == 1:
        return ()
    import ruptures

    ends = ruptures.KernelCPD(kernel="linear", min_size=2).fit(profile_LC).predict(n_bkps=n_phases - 1)
    return tuple(int(i) for i in ends[:-1])


def misfit(profile_LC: Array, starts: Sequence[int]) -> float:
    """Squared error of the piecewise-constant fit with these boundaries."""
    edges = [0, *starts, len(profile_LC)]
    parts = [profile_LC[a:b] for a, b in pairwise(edges)]
    return float(sum(((p - p.mean(axis=0)) ** 2).sum() for p in parts))


def count_phases(profile_LC: Array, max_phases: int) -> int:
    """Number of phases by the Bayesian information criterion, 1 to `max_phases`.

    n log(squared error / n) + log(n) x (one mean per curve and phase, one place per boundary), n = layers x curves.
    """
    n, n_curves = profile_LC.size, profile_LC.shape[1]
    costs = []
    for k in range(1, min(max_phases, len(profile_LC) // 2) + 1):
        error = misfit(profile_LC, segment(profile_LC, k)) / n + RESOLUTION**2
        costs.append(n * np.log(error) + np.log(n) * (k * n_curves + k - 1))
    return 1 + int(np.argmin(costs))


def onset(curve_L: Array, null_L: Array, layers: Sequence[int]) -> float:
    """The layer at which a curve first reaches half of its peak, between layers by a straight line.

    The first layer read counts as the start; NaN where the curve never rises above its null.
    """
    peak = int(np.argmax(curve_L))
    if curve_L[peak] <= null_L[peak]:
        return float("nan")
    half = curve_L[peak] / 2
    i = int(np.argmax(curve_L >= half))
    if i == 0:
        return float(layers[0])
    share = (half - curve_L[i - 1]) / (curve_L[i] - curve_L[i - 1])
    return float(layers[i - 1] + share * (layers[i] - layers[i - 1]))


@dataclass(frozen=True)
class Phases:
    """Phases of one representation.

    Attributes:
        kinds: the kinds of information in the profile; those that never rise above their null are left out.
        chosen: number of phases by the information criterion.
        votes: share of bootstrap draws that choose each number of phases.
        boundaries: by number of phases, the first layer of each later phase in the data and in the draws,
            [draws + 1, phases - 1].
        onsets: by kind, the half-peak layer in the data and in the draws, [draws + 1].
        before: mean emotion share before the last of three phases over that within it, [draws + 1].
        explained: share of the profile's variance over layers that three constant phases account for.
    """

    kinds: tuple[str, ...]
    chosen: int
    votes: Mapping[int, float]
    boundaries: Mapping[int, Array]
    onsets: Mapping[str, Array]
    before: Array
    explained: float


def find_phases(curves: Mapping[str, Curve], settings: Settings) -> Phases | None:
    """Phases and onsets of the form, topic and emotion curves of one representation.

    Each curve is divided by its peak, so that the three speak with equal weight. None if there is no curve above its
    null, or fewer layers than three phases need.
    """
    live = {k: c for k, c in curves.items() if k in KINDS and (c.value_L > c.null_L).any()}
    layers = next(iter(live.values())).layers if live else ()
    if len(layers) < 2 * PHASES_CLAIMED:
        return None
    profile_RLC = np.stack([c.draws_LR.T / c.value_L.max() for c in live.values()], axis=2)
    counts_R = np.array([count_phases(profile_LC, settings.max_phases) for profile_LC in profile_RLC])
    chosen = int(counts_R[0])
    at = np.array(layers)
    starts = {k: np.array([segment(p, k) for p in profile_RLC], dtype=int) for k in {chosen, PHASES_CLAIMED} - {1}}
    onsets = {k: np.array([onset(d, c.null_L, layers) for d in c.draws_LR.T]) for k, c in live.items()}
    before_R = np.full(len(counts_R), np.nan)
    if EMOTION in live:
        last_R = starts[PHASES_CLAIMED][:, -1]
        emotion_RL = live[EMOTION].draws_LR.T
        before_R = _before(emotion_RL, last_R)
    constant = misfit(profile_RLC[0], ())
    explained = 1 - misfit(profile_RLC[0], starts[PHASES_CLAIMED][0]) / max(constant, 1e-30)
    votes = {k: float((counts_R[1:] == k).mean()) for k in range(1, settings.max_phases + 1)}
    return Phases(tuple(live), chosen, votes, {k: at[v] for k, v in starts.items()}, onsets, before_R, explained)


def _before(values_RL: Array, last_R: Array) -> Array:
    """Mean of each draw's values before a layer index over the mean from there on, [draws]."""
    early_RL = np.arange(values_RL.shape[1]) < last_R[:, None]
    early_R = (values_RL * early_RL).sum(axis=1) / early_RL.sum(axis=1)
    late_R = (values_RL * ~early_RL).sum(axis=1) / (~early_RL).sum(axis=1)
    ratio_R: Array = early_R / np.where(late_R > 0, late_R, np.nan)
    return ratio_R


def _summary(draws_R: Array) -> dict[str, float]:
    """Value and interval of draws whose first entry is the value; NaN where a draw in twenty has no value."""
    if not np.isfinite(draws_R[0]) or np.isnan(draws_R[1:]).mean() > 0.05:
        return {"value": float(draws_R[0]), "low": float("nan"), "high": float("nan")}
    low, high = np.nanpercentile(draws_R[1:], [2.5, 97.5])
    return {"value": float(draws_R[0]), "low": float(low), "high": float(high)}


TESTS = ("three phases", "form before topic", "topic before emotion", "emotion only late", "features only late")


def claim_tests(phases: Phases | None, told: Curve | None, settings: Settings) -> pd.DataFrame:
    """The claim of a three-phase flow as tests with a verdict each, and the verdict on all of them.

    Columns: test, value, low, high, verdict.

    - three phases: share of bootstrap draws in which the criterion chooses three. Supported from .80 on if it chooses
      three in the data too, not supported up to .20 if it does not. (Even where three phases are planted, some draws
      are cut further.)
    - form before topic, topic before emotion: later onset less earlier onset, in layers. Supported if the interval
      lies above zero, not supported if none of it does.
    - emotion only late: mean emotion share before the last of three phases over that within it. Supported if the
      interval lies below the tolerance, not supported if above it.
    - features only late: the same for the mean information of the active features, freed of chance.

    The claim is supported if all tests are, not supported if one is not, and undecided otherwise or where a kind of
    information is missing.
    """
    records: list[dict[str, Any]] = []

    def add(test: str, found: Mapping[str, float], yes: bool, no: bool) -> None:
        records.append({"test": test, **found, "verdict": SUPPORTED if yes else NOT_SUPPORTED if no else UNDECIDED})

    if phases is not None and set(phases.kinds) == set(KINDS):
        share = phases.votes.get(PHASES_CLAIMED, 0.0)
        nothing = {"low": float("nan"), "high": float("nan")}
        three = phases.chosen == PHASES_CLAIMED
        add(TESTS[0], {"value": share, **nothing}, three and share >= 0.8, not three and share <= 0.2)
        for test, early, late in ((TESTS[1], FORM, TOPIC), (TESTS[2], TOPIC, EMOTION)):
            gap = _summary(phases.onsets[late] - phases.onsets[early])
            add(test, gap, gap["low"] > 0, gap["high"] <= 0)
        ratios = [(TESTS[3], phases.before)]
        if told is not None:
            last_R = np.searchsorted(told.layers, phases.boundaries[PHASES_CLAIMED][:, -1])
            ratios.append((TESTS[4], _before(told.draws_LR.T, last_R)))
        for test, draws_R in ratios:
            ratio = _summary(draws_R)
            add(test, ratio, ratio["high"] < settings.tolerance, ratio["low"] > settings.tolerance)
    verdicts = [r["verdict"] for r in records]
    whole = NOT_SUPPORTED if NOT_SUPPORTED in verdicts else UNDECIDED
    if verdicts and set(verdicts) == {SUPPORTED}:
        whole = SUPPORTED
    nan = float("nan")
    return pd.DataFrame([*records, {"test": "all", "value": nan, "low": nan, "high": nan, "verdict": whole}])


@dataclass(frozen=True)
class Measured:
    """Curves, phases and tests of one model on one dataset."""

    reading: Reading
    shares: Mapping[tuple[str, str], Curve]
    accuracies: Mapping[tuple[str, str], Curve]
    features: Mapping[str, Curve]
    lens: Mapping[tuple[str, str], Curve]
    phases: Mapping[str, Phases | None]
    claims: Mapping[str, pd.DataFrame]

    @property
    def headline(self) -> str:
        """What the verdict rests on: the codes where every layer read has a dictionary, else the residual stream."""
        return CODES if set(self.reading.codes) == set(self.reading.layers) else RESIDUAL


def analyse(reading: Reading, settings: Settings) -> Measured:
    """Everything the chapter shows of one reading."""
    # On a few hundred rows, handing small matrices to threads costs more than the arithmetic does.
    with threadpool_limits(1):
        partition = make_partition(reading.design, settings)
        shares, accuracies = share_and_probe_curves(reading, partition, settings)
        features = feature_curves(reading, partition, settings)
        lens = lens_curves(reading, partition, settings)
    places = tuple(dict.fromkeys(place for place, _ in shares))
    phases = {p: find_phases({k: shares[p, k] for k in KINDS if (p, k) in shares}, settings) for p in places}
    claims = {p: claim_tests(phases[p], features.get(MEAN) if p == CODES else None, settings) for p in places}
    return Measured(reading, shares, accuracies, features, lens, phases, claims)


@dataclass(frozen=True)
class Study:
    """Every model on every dataset that is present, by (model, dataset), and the datasets that are not."""

    measured: Mapping[tuple[str, str], Measured]
    absent: tuple[str, ...]


def run_study(
    models: Sequence[str],
    datasets: Sequence[str],
    settings: Settings,
    *,
    saes: str = "",
    dtype: str | None = None,
    device: str = "auto",
) -> Study:
    """Measure every model on every dataset that is here, one model in memory at a time.

    Args:
        models: model names.
        datasets: names or paths of datasets; named public sets that are not present are left out and listed.
        settings: rows, wordings, numbers of draws and seed.
        saes: where dictionaries come from, as for `load_dictionaries`, with `{model}` for the model's name; the
            shipped ones if empty. A model without any is measured without codes.
        dtype: arithmetic; each profile's own if None.
        device: as for `load_model`.

    Raises:
        EmosaeError: for an unknown model, layer or dataset, or if no dataset is present.
    """
    here, absent = which_are_here(datasets)
    designs = [make_design(load_corpus(d).frame, settings) for d in here]
    measured: dict[tuple[str, str], Measured] = {}
    for model in dict.fromkeys(models):
        lm = load_model(model, dtype=dtype, device=device)
        source = saes.replace("{model}", model)
        have = [x for x in available_layers(lm, source) if not settings.layers or x in settings.layers]
        dictionaries = load_dictionaries(lm, source, layers=have, check=bool(source)) if have else {}
        for design in designs:
            measured[model, design.dataset] = analyse(read(lm, design, settings, dictionaries), settings)
        # Two models need not fit into memory together.
        del lm, dictionaries
        gc.collect()
    return Study(measured, absent)


def _long(curves: Mapping[tuple[str, str], Curve], names: tuple[str, str], n_layers: int) -> list[pd.DataFrame]:
    return [curve.table(n_layers, **dict(zip(names, key, strict=True))) for key, curve in curves.items()]


def _phase_rows(place: str, phases: Phases, n_layers: int) -> Iterator[dict[str, Any]]:
    """Boundaries and onsets of one representation as rows, in layers and in share of depth."""
    found = {("boundary", k, str(j + 1)): v[:, j] for k, v in phases.boundaries.items() for j in range(v.shape[1])}
    found |= {("onset", 0, kind): v for kind, v in phases.onsets.items()}
    for (what, n_phases, name), draws_R in found.items():
        where = _summary(draws_R.astype(float))
        depth = {f"depth_{k}": v / max(n_layers - 1, 1) for k, v in where.items()}
        chosen = what == "onset" or n_phases == phases.chosen
        key = {"representation": place, "what": what, "phases": n_phases, "name": name, "chosen": chosen}
        yield key | where | depth


def tables(study: Study) -> dict[str, pd.DataFrame]:
    """The chapter's tables by name; all have the columns dataset and model.

    - shares, probes: representation, factor, layer, depth, value, low, high, null_high (and chance for probes).
    - features: measure, layer, ...; lens: measure, emotion, layer, ...
    - phases: representation, what (boundary, onset), phases, name, value, low, high in layers, depth_* in share of
      depth, and whether that number of phases was chosen.
    - votes: representation, phases, share of bootstrap draws that choose them, chosen, explained.
    - claims: representation, test, value, low, high, verdict, headline.
    - invariance: what, difference.
    """
    found: dict[str, list[pd.DataFrame]] = {
        k: [] for k in ("shares", "probes", "features", "lens", "phases", "votes", "claims", "invariance")
    }
    for (model, dataset), m in study.measured.items():
        n, design = m.reading.n_layers, m.reading.design
        chance = {f: np.bincount(design.levels[f]).max() / len(design) for f in design.levels}
        probed = [t.assign(chance=chance[t["factor"].iloc[0]]) for t in _long(m.accuracies, PLACES, n)]
        votes = [
            {"representation": p, "phases": k, "share": v, "chosen": k == f.chosen, "explained": f.explained}
            for p, f in m.phases.items()
            if f is not None
            for k, v in f.votes.items()
        ]
        claims = [t.assign(representation=p, headline=p == m.headline) for p, t in m.claims.items()]
        rows = [row for p, f in m.phases.items() if f is not None for row in _phase_rows(p, f, n)]
        parts = {
            "shares": _long(m.shares, PLACES, n),
            "probes": probed,
            "features": [curve.table(n, measure=k) for k, curve in m.features.items()],
            "lens": _long(m.lens, ("measure", "emotion"), n),
            "phases": [pd.DataFrame(rows)],
            "votes": [pd.DataFrame(votes)],
            "claims": claims,
            "invariance": [pd.DataFrame(list(m.reading.invariance.items()), columns=["what", "difference"])],
        }
        for name, made in parts.items():
            found[name] += [t.assign(dataset=dataset, model=model) for t in made if len(t)]
    return {k: pd.concat(v, ignore_index=True) if v else pd.DataFrame() for k, v in found.items()}


# Unit of each test's value, and what has to hold.
TESTED = {
    TESTS[0]: ("share of draws", "The criterion chooses three phases, in the data and in 80 % of bootstrap draws."),
    TESTS[1]: ("layers", "Topic reaches half of its peak later than form."),
    TESTS[2]: ("layers", "Emotion reaches half of its peak later than topic."),
    TESTS[3]: ("of the later share", "Before the last phase the share of emotion is below the tolerance."),
    TESTS[4]: ("of the later mean", "Before the last phase the features' information is below the tolerance."),
    "all": ("", "Three phases, form before topic before emotion, and emotion in the last phase only."),
}


def claim_records(claims: pd.DataFrame) -> list[Claim]:
    """The tests that the verdict rests on (see `tables`), as records of the claims ledger."""
    records = []
    for row in claims[claims["headline"]].to_dict("records"):
        part, (unit, test) = "" if row["test"] == "all" else row["test"], TESTED[row["test"]]
        value, low, high = (float(row[k]) for k in ("value", "low", "high"))
        model, dataset, verdict = row["model"], row["dataset"], row["verdict"]
        records.append(Claim("C1", model, dataset, part, value, low, high, unit, test, verdict))
    return records


def save(study: Study, settings: Settings, out_dir: Path) -> dict[str, pd.DataFrame]:
    """Compute the chapter's tables, write each as parquet into `out_dir`, and return them by name.

    Also writes the claim (`claims.json`), and `settings.json` with the settings, the datasets that were absent, and the
    factors each dataset lacks.
    """
    made = tables(study)
    save_claims(out_dir, claim_records(made["claims"]))
    for name, table in made.items():
        if len(table.columns):
            write_table(out_dir / f"{name}.parquet", table)
    missing = {d: list(m.reading.design.missing) for (_, d), m in study.measured.items()}
    write_json(out_dir / "settings.json", asdict(settings) | {"absent": list(study.absent), "missing": missing})
    return made


def _where(row: Any) -> str:
    """A place in layers with its interval, and as a share of depth: "8.4 [7.9, 9.0] (0.49 of depth)"."""
    if not np.isfinite(row.low):
        return "nowhere" if not np.isfinite(row.value) else f"{row.value:.1f} (no interval)"
    return f"{row.value:.1f} [{row.low:.1f}, {row.high:.1f}] ({row.depth_value:.2f} of depth)"


def finding(made: Mapping[str, pd.DataFrame], model: str, dataset: str) -> str:
    """One paragraph on one model and dataset. Every number, and every verdict on it, comes from the tables."""

    def here(name: str) -> pd.DataFrame:
        table = made[name]
        return table[(table["model"] == model) & (table["dataset"] == dataset)] if len(table) else table

    claims = here("claims")
    claims = claims[claims["headline"]]
    place = claims["representation"].iloc[0]
    shares = here("shares")
    shares = shares[shares["representation"] == place]
    by_kind = {k: shares[shares["factor"] == k] for k in KINDS}
    peaks = [table.loc[table["value"].idxmax()] for table in by_kind.values() if len(table)]
    said = "; ".join(
        f"{r['factor']} {r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}] at layer {r['layer']}"
        + ("" if r["value"] > r["null_high"] else ", no more than shuffled labels give")
        for r in peaks
    )
    text = f"**{model}** on {dataset}, {place}: the largest share of variance within wordings is {said}."
    places = here("phases")
    if len(places) and (places["representation"] == place).any():
        places = places[places["representation"] == place]
        onsets = "; ".join(f"{r.name} {_where(r)}" for r in places[places["what"] == "onset"].itertuples())
        votes = here("votes")
        votes = votes[votes["representation"] == place]
        chosen = votes[votes["chosen"]].iloc[0]
        most = ", the most it may," if chosen["phases"] == votes["phases"].max() else ""
        cuts = places[(places["what"] == "boundary") & places["chosen"]]
        cut_text = "; ".join(_where(r) for r in cuts.itertuples())
        three = f"Three constant phases account for {chosen['explained']:.0%} of how the profile changes over layers."
        text += (
            f" Half of its peak is reached by {onsets}. The criterion chooses {chosen['phases']} "
            f"phase{'s' if chosen['phases'] > 1 else ''}{most} (in {chosen['share']:.0%} of the bootstrap draws)"
            + (f", the later ones from layer {cut_text}. " if len(cuts) else ". ")
            + three
        )
    whole = claims[claims["test"] == "all"]["verdict"].iloc[0]
    parts = claims[claims["test"] != "all"]
    why = "; ".join(f"{r.test}: {r.verdict}" for r in parts.itertuples())
    reason = why or "the dataset, or the layers read, lack what the tests need"
    return f"{text} The three-phase flow is **{whole}** ({reason})."


def setting(study: Study) -> str:
    """What was asked of what, and what a dataset lacks, as one paragraph."""
    lines = [f"Not on this machine, so not measured: {', '.join(study.absent)}."] if study.absent else []
    for dataset in dict.fromkeys(d for _, d in study.measured):
        design = next(m.reading.design for (_, d), m in study.measured.items() if d == dataset)
        factors = ", ".join(f"{f} ({len(v)})" for f, v in design.names.items())
        lacks = f" It has no {', no '.join(design.missing)}." if design.missing else ""
        lines.append(
            f"**{dataset}**: {len(design)} prompts; factors with their number of levels: {factors}; "
            f"{design.n_blocks} {'topics' if TOPIC in design.levels else 'bundles of writers'} are resampled.{lacks}"
        )
    for (model, dataset), m in study.measured.items():
        have, read = len(m.reading.codes), len(m.reading.layers)
        notes = "".join(f" Note: {note}." for note in m.reading.notes)
        lines.append(f"{model} on {dataset}: layers with a dictionary: {have} of the {read} read.{notes}")
    return "\n\n".join(lines)


def probe_check(measured: Measured, settings: Settings) -> tuple[int, float, float]:
    """The layer where the closed-form emotion probe on the residual is best, its accuracy, and that of a logistic one.

    Both leave out the same topics; the logistic probe is that of the chapter on difficulty.
    """
    reading, curve = measured.reading, measured.accuracies[RESIDUAL, EMOTION]
    at = int(np.argmax(curve.value_L))
    design = reading.design
    wording_P = design.levels.get(WORDING, np.zeros(len(design), dtype=int))
    x_PLD = _within(reading.inside[RESIDUAL][:, at], wording_P)[:, None]
    logistic = probes.layer_curve(x_PLD, design.levels[EMOTION], list(design.blocks_P), seed=settings.seed)
    return curve.layers[at], float(curve.value_L[at]), float(logistic[0])


def lens_text(lens: pd.DataFrame) -> str:
    """Where the calibrated lens first beats shuffled labels for good, and what it reaches, per model and dataset."""
    lines = []
    for (model, dataset), table in lens.groupby(["model", "dataset"], sort=False):
        line = table[table["measure"] == LENS_CALIBRATED].sort_values("layer")
        behind = (line["low"] <= line["null_high"]).to_numpy()
        last = line.iloc[-1]
        start = int(np.flatnonzero(behind)[-1]) + 1 if behind.any() else 0
        since = f"from layer {line['layer'].iloc[start]} on" if start < len(line) else "at no layer up to the last"
        lines.append(
            f"The calibrated lens of {model} on {dataset} is above shuffled labels {since} and ends at "
            f"{last['value']:.2f} [{last['low']:.2f}, {last['high']:.2f}]."
        )
    return " ".join(lines)


def claim_view(claims: pd.DataFrame) -> pd.DataFrame:
    """The tests to read: one row per model, dataset and representation, one column per test."""

    def cell(row: Any) -> str:
        if row.test == "all" or not np.isfinite(row.value):
            return str(row.verdict)
        span = f" [{row.low:.2f}, {row.high:.2f}]" if np.isfinite(row.low) else ""
        return f"{row.value:.2f}{span}: {row.verdict}"

    shown = claims.assign(
        cell=[cell(r) for r in claims.itertuples()],
        representation=claims["representation"] + np.where(claims["headline"], " *", ""),
    )
    order = [t for t in (*TESTS, "all") if t in set(claims["test"])]
    keys = ["dataset", "model", "representation"]
    return shown.pivot_table(index=keys, columns="test", values="cell", aggfunc="first", sort=False)[order].fillna("")


def probe_text(study: Study, settings: Settings) -> str:
    """How the closed-form probe compares with a logistic one at its best layer, per model and dataset."""
    lines = []
    for (model, dataset), measured in study.measured.items():
        layer, ours, logistic = probe_check(measured, settings)
        lines.append(f"{model} on {dataset}: {ours:.2f} at layer {layer}, against {logistic:.2f}")
    return f"At its best layer the closed-form emotion probe stands beside a logistic regression: {'; '.join(lines)}."
