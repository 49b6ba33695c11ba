"""What drives the answer: causal sets of features per emotion, how concentrated they are, and where they act.

Every active feature of every text is set to zero at the read-out position, one at a time and exactly (`tracing`). Two
causal sets are made of that for each emotion (both ours):

- the *label set*: features whose removal lowers the emotion's label on its own texts more than removing the same
  amount along the direction of another feature of the layer does. It may hold features that carry the word alone;
- the *emotion set*: features whose removal lowers the label on the emotion's own texts more than on texts of other
  emotions, beyond permutations of the emotions within topics, and by more than it raises the label elsewhere. Claims
  about emotion rest on it.

Sets are selected on discovery texts; everything said of them is measured on held-out texts, whole topics resampled.

Shapes: P prompts, F features of a layer, E labels, N edits in long form, J jobs (sets ablated jointly), R draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import pearson3, spearmanr
from scipy.stats import t as student

from emosae_utils import difficulty, features, scoring, stats, tracing
from emosae_utils.features import SAME, false_discovery, permuted_labels
from emosae_utils.files import EmosaeError
from emosae_utils.models import LM
from emosae_utils.saes import Dictionary
from emosae_utils.tracing import Effects

Array = np.ndarray[Any, np.dtype[Any]]

LABEL, EMOTION = "label set", "emotion set"
KINDS: tuple[str, ...] = (LABEL, EMOTION)
# The two orders of all features: by effect on own texts, and by how much larger that is than elsewhere.
EFFECT, CONTRAST = "effect", "contrast"
WHOLE, EVERYTHING = "whole", "all features"
PHASE_NAMES: tuple[str, ...] = ("early", "middle", "late")
ALL_ROWS, CORRECT = "all", "correct only"
# A partner of a feature is drawn from this many of the nearest.
NEAREST = 5
# Random counterparts of the top features, whose curves are many.
TOP_DRAWS = 2
# Bootstrap draws and permutations of measures that need every feature at once.
FEW_DRAWS, FEW_SHUFFLES = 200, 20


@dataclass(frozen=True)
class Settings:
    """How effects are measured. One seed draws rows, directions, random sets, pairs and resamples alike.

    Attributes:
        rows_per_emotion: discovery texts of each emotion.
        held_rows_per_emotion: held-out texts of each emotion.
        null_rows_per_emotion: discovery texts on which the same amounts are removed along other directions.
        template: the wording.
        layers: blocks; all that have a dictionary if empty.
        permutations: of the emotions within topics.
        level: false discovery rate of both sets.
        min_active: a feature active on fewer discovery texts is not tested.
        draws: random sets that each set stands beside.
        top: sizes of the sets of the recovery curves.
        operation_rows_per_emotion, operation_top: held-out texts, and features besides members, on which zero, mean
            and resample ablation are compared.
        ladder_rows_per_emotion: held-out texts on which the estimates are compared with exact effects.
        pairs_per_emotion: receiving texts of each emotion in activation patching.
        windows: numbers of neighbouring layers patched together.
        bootstraps: draws of topics for intervals.
        seed: of everything drawn.
    """

    rows_per_emotion: int = 36
    held_rows_per_emotion: int = 24
    null_rows_per_emotion: int = 4
    template: str = scoring.DEFAULT_TEMPLATE
    layers: Sequence[int] = ()
    permutations: int = 1000
    level: float = 0.05
    min_active: int = 10
    draws: int = 5
    top: Sequence[int] = (1, 2, 5, 10, 20, 50, 100, 200)
    operation_rows_per_emotion: int = 4
    operation_top: int = 50
    ladder_rows_per_emotion: int = 2
    pairs_per_emotion: int = 5
    windows: Sequence[int] = (1, 3, 5)
    bootstraps: int = 1000
    seed: int = 0


# Effects of one layer, and the two tests.


def margins(effects_XE: Array) -> Array:
    """Change of each label's score less the mean of the others', [..., labels], nats: what the gold one changes by."""
    total = effects_XE.sum(axis=-1, keepdims=True)
    margin: Array = effects_XE - (total - effects_XE) / (effects_XE.shape[-1] - 1)
    return margin


@dataclass(frozen=True)
class LayerEffects:
    """Effects of the features of one layer that are active on any text.

    Attributes:
        features_F: which these are.
        margin_PFE: change of each label's score less the mean of the others' by removing the feature, nats.
        size_PF: length of what was removed, 0 where the feature is silent.
    """

    features_F: Array
    margin_PFE: Array
    size_PF: Array


def layer_effects(found: Effects, layer: int, lengths_F: Array | None = None) -> LayerEffects:
    """Spread the effects of one layer over prompts and features; `lengths_F` are those of its directions, 1 if None."""
    here = found.layer_N == layer
    features_F, column_N = np.unique(found.feature_N[here], return_inverse=True)
    prompt_N, n_prompts = found.prompt_N[here], len(found.clean_PE)
    margin_PFE = np.zeros((n_prompts, len(features_F), len(found.labels)), dtype=np.float32)
    margin_PFE[prompt_N, column_N] = margins(found.scores_NE[here] - found.clean_PE[prompt_N])
    size_PF = np.zeros(margin_PFE.shape[:2], dtype=np.float32)
    length_N = 1.0 if lengths_F is None else lengths_F[features_F][column_N]
    size_PF[prompt_N, column_N] = found.activation_N[here] * length_N
    return LayerEffects(features_F, margin_PFE, size_PF)


def own_and_elsewhere(margin_PFE: Array, y_P: Array) -> tuple[Array, Array]:
    """Mean change of each label on the texts of its emotion and on the others, [features, labels] each, nats."""
    hot_PE = np.eye(margin_PFE.shape[2])[y_P]
    n_E = hot_PE.sum(axis=0)
    sum_FE = np.einsum("pfe,pe->fe", margin_PFE, hot_PE)
    rest_FE = margin_PFE.sum(axis=0, dtype=float) - sum_FE
    return sum_FE / np.maximum(n_E, 1), rest_FE / np.maximum(len(y_P) - n_E, 1)


def lower_p(values_X: Array, null_N: Array) -> Array:
    """How often a null value is as low, [X]; beyond the null's resolution the tail of a Student distribution.

    The distribution has the null's own mean, variance and kurtosis, and its tail never exceeds the counted bound.
    """
    n = len(null_N)
    if n < 2:
        return np.ones(len(values_X))
    below_X = np.searchsorted(np.sort(null_N), values_X + SAME, side="right")
    mean, spread = float(null_N.mean()), max(float(null_N.std()), SAME)
    excess = float((((null_N - mean) / spread) ** 4).mean() - 3)
    freedom = 4 + 6 / max(excess, 1e-3)
    tail_X = student.cdf((values_X - mean) / (spread * np.sqrt((freedom - 2) / freedom)), freedom)
    p_X: Array = np.where(below_X == 0, np.minimum(tail_X, 1 / (1 + n)), (1 + below_X) / (1 + n))
    return p_X


def contrast_p(margin_PFE: Array, y_P: Array, y_PR: Array) -> Array:
    """How often permuted emotions put as much of a label's loss on its own texts, [features, labels].

    The statistic is the mean change on own texts less that elsewhere. Below the smallest countable p value the tail is
    that of the Pearson type III distribution with the permutations' own mean, variance and skewness.
    """
    n_prompts, n_features, n_labels = margin_PFE.shape
    own_FE, elsewhere_FE = own_and_elsewhere(margin_PFE, y_P)
    observed_FE, p_FE = own_FE - elsewhere_FE, np.ones((n_features, n_labels))
    for k in range(n_labels):
        n_own, x_PF = int((y_P == k).sum()), margin_PFE[:, :, k]
        if not 0 < n_own < n_prompts:
            continue
        sum_FR = x_PF.T @ (y_PR == k).astype(np.float32)
        total_F1 = x_PF.sum(axis=0, dtype=float)[:, None]
        null_FR = sum_FR / n_own - (total_F1 - sum_FR) / (n_prompts - n_own)
        n, slack_F1 = null_FR.shape[1], 1e-5 * np.abs(x_PF).max(axis=0, initial=0.0)[:, None]
        below_F = (null_FR <= observed_FE[:, [k]] + slack_F1).sum(axis=1)
        mean_F, spread_F = null_FR.mean(axis=1), np.maximum(null_FR.std(axis=1), SAME)
        z_FR = (null_FR - mean_F[:, None]) / spread_F[:, None]
        tail_F = pearson3.cdf((observed_FE[:, k] - mean_F) / spread_F, (z_FR**3).mean(axis=1))
        p_FE[:, k] = np.where(below_F == 0, np.minimum(tail_F, 1 / (1 + n)), (1 + below_F) / (1 + n))
    return p_FE


def drives(own_X: Array, elsewhere_X: Array) -> Array:
    """Whether the label loses on its own texts, and more than it gains elsewhere.

    A feature that lowers a rival on the rival's texts raises this label there, and so has a contrast without driving
    anything here.
    """
    loses_X: Array = own_X < np.minimum(0.0, -elsewhere_X)
    return loses_X


def other_directions(dictionary: Dictionary, seed: int) -> Array:
    """For each feature the decoder row of another, drawn once, at the feature's own length, [features, d_model]."""
    w_FD = dictionary.sae.W_dec.detach().float().cpu().numpy()
    order = np.random.default_rng([seed, dictionary.layer]).permutation(len(w_FD))
    partner_F = np.empty(len(w_FD), dtype=int)
    partner_F[order] = np.roll(order, 1)
    length_F1 = np.linalg.norm(w_FD, axis=1, keepdims=True)
    rows_FD: Array = (w_FD / np.maximum(length_F1, SAME))[partner_F] * length_F1
    return rows_FD


def _per_unit(here: LayerEffects, y_P: Array) -> tuple[Array, Array]:
    """Mean change of each label on its own texts, and that per unit of what was removed; NaN where silent there."""
    own_FE, _ = own_and_elsewhere(here.margin_PFE, y_P)
    size_FE, _ = own_and_elsewhere(np.repeat(here.size_PF[:, :, None], own_FE.shape[1], axis=2), y_P)
    return size_FE, np.divide(own_FE, size_FE, out=np.full(own_FE.shape, np.nan), where=size_FE > 0)


def select_layer(
    found: LayerEffects, null: LayerEffects, y_P: Array, null_y_P: Array, y_PR: Array, labels: Sequence[str], least: int
) -> pd.DataFrame:
    """Both tests on every feature of a layer, without the correction over features.

    Args:
        found: zero ablation on discovery texts.
        null: the same amounts removed along other directions, on some of them.
        y_P: label indices of the former.
        null_y_P: and of the latter.
        y_PR: permuted labels of the former, as from `permuted_labels`.
        labels: their names.
        least: number of texts a feature must be active on to be tested.

    Returns:
        One row per feature and emotion: feature, emotion, effect, elsewhere, contrast (nats), size and frequency (on
        own texts), active (texts), per_unit (nats per unit removed), null_mean and null_spread of that, p_label,
        p_emotion (NaN where not tested).
    """
    own_FE, elsewhere_FE = own_and_elsewhere(found.margin_PFE, y_P)
    size_FE, unit_FE = _per_unit(found, y_P)
    hot_PE = np.eye(len(labels))[y_P]
    frequency_FE = (found.size_PF > 0).T.astype(float) @ hot_PE / np.maximum(hot_PE.sum(axis=0), 1)
    active_F = (found.size_PF > 0).sum(axis=0)
    tested_F = active_F >= least
    _, null_unit_FE = _per_unit(null, null_y_P)
    p_label_FE, p_emotion_FE = (np.full(own_FE.shape, np.nan) for _ in range(2))
    nulls = [column[np.isfinite(column)] for column in null_unit_FE.T]
    for k, null_N in enumerate(nulls):
        here_F = tested_F & (size_FE[:, k] > 0)
        p_label_FE[here_F, k] = lower_p(unit_FE[here_F, k], null_N)
    if tested_F.any():
        p_FE = contrast_p(found.margin_PFE[:, tested_F], y_P, y_PR)
        p_emotion_FE[tested_F] = np.where(drives(own_FE, elsewhere_FE)[tested_F], p_FE, 1.0)
    n, columns = len(labels), {"p_label": p_label_FE, "p_emotion": p_emotion_FE, "per_unit": unit_FE}
    columns |= {"effect": own_FE, "elsewhere": elsewhere_FE, "contrast": own_FE - elsewhere_FE}
    columns |= {"size": size_FE, "frequency": frequency_FE}
    centre = {"null_mean": [x.mean() if len(x) else np.nan for x in nulls]}
    centre |= {"null_spread": [x.std() if len(x) else np.nan for x in nulls]}
    return pd.DataFrame(
        {"feature": np.repeat(found.features_F, n), "emotion": np.tile(labels, len(active_F))}
        | {name: values.ravel() for name, values in columns.items()}
        | {name: np.tile(values, len(active_F)) for name, values in centre.items()}
        | {"active": np.repeat(active_F, n)}
    )


def select(
    found: Effects, null: Effects, rows: pd.DataFrame, null_rows: pd.DataFrame, settings: Settings
) -> pd.DataFrame:
    """Both tests on all layers, corrected within each emotion over all tested features of all layers.

    Args:
        found: zero ablation on `rows`.
        null: the same amounts removed along other directions, on `null_rows`.
        rows: one line per prompt of the former.
        null_rows: and of the latter.
        settings: levels, permutations and seed.

    Returns:
        The columns of `select_layer` and layer, q_label, q_emotion, in_label, in_emotion.

    Raises:
        EmosaeError: if the two tables differ in their labels.
    """
    if found.labels != null.labels:
        raise EmosaeError(f"effects on {', '.join(found.labels)} cannot have a null on {', '.join(null.labels)}")
    y_P, null_y_P = (difficulty.gold_indices(r, found.labels) for r in (rows, null_rows))
    y_PR = permuted_labels(y_P, features.strata(rows), settings.permutations, settings.seed)
    parts = []
    for layer in np.unique(found.layer_N):
        own, other = layer_effects(found, int(layer)), layer_effects(null, int(layer))
        tested = select_layer(own, other, y_P, null_y_P, y_PR, found.labels, settings.min_active)
        parts.append(tested.assign(layer=layer))
    table = pd.concat(parts, ignore_index=True)
    for name in ("label", "emotion"):
        table[f"q_{name}"] = np.nan
        for _, own in table[table[f"p_{name}"].notna()].groupby("emotion"):
            table.loc[own.index, f"q_{name}"] = false_discovery(own[f"p_{name}"].to_numpy())
        table[f"in_{name}"] = (table[f"q_{name}"] <= settings.level) & (table["effect"] < 0)
    return table


# Held-out texts and their intervals.


@dataclass(frozen=True)
class Held:
    """The texts that everything is measured on.

    Attributes:
        rows: one line per text.
        labels: the emotions.
        y_P: index of the gold label.
        clean_PE: label scores without any edit, nats.
        prior_E: label prior, nats; the answer is the best score less its prior.
        weights_RP: how often each text counts in each draw of topics; the first row is all ones.
    """

    rows: pd.DataFrame
    labels: tuple[str, ...]
    y_P: Array
    clean_PE: Array
    prior_E: Array
    weights_RP: Array

    def answers(self, scores_XE: Array) -> Array:
        """Index of the best label after prior calibration, [...]."""
        best: Array = (scores_XE - self.prior_E).argmax(axis=-1)
        return best

    def keep(self, emotion: str, which: str = ALL_ROWS) -> Array:
        """Mask of the texts of an emotion, or of those answered correctly."""
        own_P: Array = self.y_P == self.labels.index(emotion)
        return own_P & (self.answers(self.clean_PE) == self.y_P) if which == CORRECT else own_P

    def mean(self, values_P: Array, keep_P: Array) -> Array:
        """Mean over some texts, in the data and in each draw, [1 + draws]; NaN in draws without any."""
        w_RP = self.weights_RP[:, keep_P]
        total_R = w_RP.sum(axis=1)
        sums_R = w_RP @ np.asarray(values_P, dtype=float)[keep_P]
        means_R: Array = np.divide(sums_R, total_R, out=np.full(len(total_R), np.nan), where=total_R > 0)
        return means_R


def make_held(rows: pd.DataFrame, labels: tuple[str, ...], clean_PE: Array, prior_E: Array, settings: Settings) -> Held:
    """Texts with their draws of whole topics."""
    names, group_P = np.unique(rows["group"], return_inverse=True)
    drawn_RG = stats.bootstrap_weights(len(names), settings.bootstraps, settings.seed)
    weights_RP = np.vstack([np.ones(len(rows)), drawn_RG[:, group_P]])
    centred_E = prior_E - prior_E.mean()
    return Held(rows, labels, difficulty.gold_indices(rows, labels), clean_PE, centred_E, weights_RP)


def summary(draws_R: Array) -> dict[str, float]:
    """Value (the first entry) with the 95 % interval of the others; NaN where a draw in twenty has none."""
    value, rest = float(draws_R[0]), draws_R[1:]
    if not np.isfinite(value) or np.isnan(rest).mean() > 0.05:
        return {"value": value, "low": float("nan"), "high": float("nan")}
    low, high = np.nanpercentile(rest, [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}


def held_columns(table: pd.DataFrame, found: Effects, held: Held, n_top: int) -> pd.DataFrame:
    """The selection with held_effect and held_contrast, and intervals of both for members and the top features."""
    hot_PE = np.eye(len(held.labels))[held.y_P]
    own_RE, rest_RE = held.weights_RP @ hot_PE, held.weights_RP @ (1 - hot_PE)
    place = {name: np.full(len(table), np.nan) for name in ("held_effect", "held_contrast")}
    place |= {f"{name}_{end}": np.full(len(table), np.nan) for name in list(place) for end in ("low", "high")}
    ranked = table.groupby("emotion")[[EFFECT, CONTRAST]].rank().min(axis=1) <= n_top
    shown = (table["in_label"] | table["in_emotion"] | ranked).to_numpy()
    label_X = table["emotion"].map({e: k for k, e in enumerate(held.labels)}).to_numpy()
    for layer, here in table.groupby("layer"):
        effects = layer_effects(found, int(layer))
        column_X = np.searchsorted(effects.features_F, here["feature"])
        known = np.isin(here["feature"], effects.features_F)
        at, column, k = here.index.to_numpy()[known], column_X[known], label_X[here.index][known]
        own_FE, elsewhere_FE = own_and_elsewhere(effects.margin_PFE, held.y_P)
        place["held_effect"][here.index] = place["held_contrast"][here.index] = 0.0
        place["held_effect"][at] = own_FE[column, k]
        place["held_contrast"][at] = (own_FE - elsewhere_FE)[column, k]
        for e in range(len(held.labels)):
            some = shown[at] & (k == e)
            values_PX = effects.margin_PFE[:, column[some], e].astype(float)
            own_RX = (held.weights_RP * hot_PE[:, e]) @ values_PX / np.maximum(own_RE[:, [e]], SAME)
            rest_RX = (held.weights_RP * (1 - hot_PE[:, e])) @ values_PX / np.maximum(rest_RE[:, [e]], SAME)
            for name, draws_RX in (("held_effect", own_RX), ("held_contrast", own_RX - rest_RX)):
                if draws_RX.shape[1]:
                    low_X, high_X = stats.interval(draws_RX[1:])
                    place[f"{name}_low"][at[some]], place[f"{name}_high"][at[some]] = low_X, high_X
    return table.assign(**place)


# How concentrated.


def gini(weights_XF: Array) -> Array:
    """Gini coefficient of non-negative weights along the last axis: 0 for equal ones, 1 - 1/n for a single one."""
    sorted_XF = np.sort(weights_XF, axis=-1)
    n = sorted_XF.shape[-1]
    total = np.maximum(sorted_XF.sum(axis=-1), SAME**2)
    value: Array = (2 * np.arange(1, n + 1) - n - 1) @ np.moveaxis(sorted_XF, -1, 0) / (n * total)
    return value


def effective_number(weights_XF: Array) -> Array:
    """Exponential of the entropy of non-negative weights along the last axis: n for n equal ones, 1 for one."""
    share = weights_XF / np.maximum(weights_XF.sum(axis=-1, keepdims=True), SAME**2)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=-1)
    number: Array = np.exp(entropy)
    return number


def crossed_weights(discovery_XF: Array, held_XF: Array) -> Array:
    """Sizes of effects without the winner's curse: held-out values, as far as they have the sign found in discovery."""
    weights: Array = np.maximum(np.sign(discovery_XF) * held_XF, 0.0)
    return weights


def _weighted(weights_XP: Array, values_PF: Array) -> Array:
    """Weighted means over prompts, [X, features]; NaN where no prompt has weight."""
    total_X1 = weights_XP.sum(axis=1, keepdims=True)
    means_XF: Array = weights_XP @ values_PF / np.where(total_X1 > 0, total_X1, np.nan)
    return means_XF


def concentration(table: pd.DataFrame, found: Effects, held: Held, settings: Settings) -> tuple[pd.DataFrame, Any]:
    """Gini coefficient and effective number of features per emotion, and the draws of the latter.

    Over all features active on any discovery text, with `crossed_weights`, the same number of texts for each emotion;
    by contrast only those that drive the emotion in discovery have weight (see `drives`). A resample of topics adds
    noise, so draws are moved to have their mean at the value.

    Returns:
        Columns measure (effect, contrast), emotion, quantity, value, low, high, and null: the mean over permutations of
        the held-out emotions within topics. And the effective numbers [1 + draws] by (measure, emotion).
    """
    n_draws = min(settings.bootstraps, FEW_DRAWS)
    w_RP, n = held.weights_RP[: n_draws + 1], len(held.labels)
    y_PS = permuted_labels(held.y_P, features.strata(held.rows), FEW_SHUFFLES, settings.seed + 1)
    kept: dict[tuple[str, str, int], list[Array]] = {}
    for layer, here in table.groupby("layer"):
        effects = layer_effects(found, int(layer))
        pushes = drives(here["effect"].to_numpy(), here["elsewhere"].to_numpy())
        signs = {EFFECT: np.sign(here["effect"]), CONTRAST: np.sign(here["contrast"]) * pushes}
        wide = pd.DataFrame(signs).set_index([here["feature"], here["emotion"]]).unstack()  # noqa: PD010
        column_F, known_F = np.searchsorted(effects.features_F, wide.index), wide.index.isin(effects.features_F)
        for k, emotion in enumerate(held.labels):
            x_PF = effects.margin_PFE[:, column_F[known_F], k].astype(float)
            for which, y_PX in ((0, held.y_P[:, None]), (1, y_PS)):
                own_PX = (y_PX == k).astype(float)
                weights = (w_RP * own_PX.T, w_RP * (1 - own_PX.T)) if not which else (own_PX.T, 1 - own_PX.T)
                own_XF, rest_XF = (_weighted(w, x_PF) for w in weights)
                for measure, values_XF in ((EFFECT, own_XF), (CONTRAST, own_XF - rest_XF)):
                    sign_F = wide[measure, emotion].to_numpy()[known_F]
                    crossed = crossed_weights(sign_F, values_XF)
                    silent = np.zeros((len(values_XF), int((~known_F).sum())))
                    kept.setdefault((measure, emotion, which), []).append(
                        np.concatenate([crossed, silent], axis=1).astype(np.float32)
                    )
    records, numbers = [], {}
    for measure in (EFFECT, CONTRAST):
        for emotion in held.labels[:n]:
            real_RF, null_SF = (np.concatenate(kept[measure, emotion, which], axis=1) for which in (0, 1))
            for quantity, of in (("gini", gini), ("effective number", effective_number)):
                raw_R = of(real_RF).astype(float)
                draws_R = np.concatenate([raw_R[:1], raw_R[1:] - np.nanmean(raw_R[1:]) + raw_R[0]])
                if quantity == "effective number":
                    numbers[measure, emotion] = draws_R
                key = {"measure": measure, "emotion": emotion, "quantity": quantity}
                records.append(key | summary(draws_R) | {"null": float(of(null_SF).mean())})
    return pd.DataFrame(records), numbers


# Sets and their random counterparts.


def by_layer(members: pd.DataFrame) -> dict[int, Array]:
    """Features of a table with columns layer and feature, by layer."""
    return {int(k): own["feature"].to_numpy(dtype=int) for k, own in members.groupby("layer")}


def causal_sets(table: pd.DataFrame, labels: Sequence[str]) -> dict[tuple[str, str], pd.DataFrame]:
    """Members (layer, feature) of each kind of set and emotion, the strongest in discovery first."""
    found = {}
    for kind, column, order in ((LABEL, "in_label", EFFECT), (EMOTION, "in_emotion", CONTRAST)):
        for emotion in labels:
            here = table[table[column] & (table["emotion"] == emotion)]
            found[kind, emotion] = here.sort_values(order)[["layer", "feature"]].reset_index(drop=True)
    return found


def matched(members: pd.DataFrame, pool: pd.DataFrame, draws: int, seed: int) -> list[pd.DataFrame]:
    """Random counterparts of a set, one feature of the same layer for each member that has one left.

    Each is drawn from the few features outside the set that are nearest in frequency and in mean size (logarithm) on
    the emotion's own texts, each relative to its spread over the layer; no feature is drawn twice.

    Args:
        members: layer and feature.
        pool: the selection of one emotion: layer, feature, frequency, size.
        draws: number of counterparts.
        seed: of the draws.

    Returns:
        Tables of layer, feature and rank, the row of `members` that the feature stands for.
    """
    rng = np.random.default_rng(seed)
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(draws)]
    rank_of = members.assign(rank=np.arange(len(members)))
    pool = pool[pool["frequency"] > 0]
    for layer, own in rank_of.groupby("layer"):
        there = pool[pool["layer"] == layer]
        x_F2 = np.stack([there["frequency"], np.log(np.maximum(there["size"], SAME))], axis=1)
        x_F2 = x_F2 / np.maximum(x_F2.std(axis=0), SAME)
        names_F = there["feature"].to_numpy(dtype=int)
        place = {int(f): i for i, f in enumerate(names_F)}
        free_F = ~np.isin(names_F, own["feature"])
        for draw in range(draws):
            left_F = free_F.copy()
            for feature, rank in own[["feature", "rank"]].itertuples(index=False):
                choices = np.flatnonzero(left_F)
                if not len(choices) or int(feature) not in place:
                    continue
                gap_F = ((x_F2[choices] - x_F2[place[int(feature)]]) ** 2).sum(axis=1)
                near = choices[np.argsort(gap_F, kind="stable")[:NEAREST]]
                chosen = int(rng.choice(near))
                left_F[chosen] = False
                found[draw].append((int(layer), int(names_F[chosen]), int(rank)))
    return [pd.DataFrame(rows, columns=["layer", "feature", "rank"]) for rows in found]


@dataclass(frozen=True)
class Job:
    """A set ablated jointly: `draw` is -1 for the set itself, else which of its random counterparts it is.

    `removed` is the summed length of what it removes from an average own discovery text.
    """

    kind: str
    emotion: str
    part: str
    draw: int
    members: Mapping[int, Array]
    removed: float
    everywhere: bool


def make_jobs(table: pd.DataFrame, phases: Sequence[int], labels: Sequence[str], settings: Settings) -> list[Job]:
    """All joint ablations: each set whole (on texts of every emotion), by phase, and the top features of both orders.

    Args:
        table: from `select`.
        phases: the first layer of the second and of the third phase.
        labels: the emotions.
        settings: sizes of the top sets, number of random counterparts, seed.
    """
    jobs = [Job(EVERYTHING, "", WHOLE, -1, by_layer(table[["layer", "feature"]].drop_duplicates()), 0.0, True)]
    lists = dict(causal_sets(table, labels))
    for order in (EFFECT, CONTRAST):
        for emotion in labels:
            pushes = (table["effect"] < 0) if order == EFFECT else drives(table["effect"], table["elsewhere"])
            own = table[(table["emotion"] == emotion) & pushes]
            lists[order, emotion] = own.sort_values(order).head(max(settings.top))[["layer", "feature"]]
    for i, ((kind, emotion), members) in enumerate(lists.items()):
        members = members.assign(rank=np.arange(len(members)))
        pool = table[table["emotion"] == emotion]
        size = pool.set_index(["layer", "feature"])["size"]
        n = settings.draws if kind in KINDS else min(settings.draws, TOP_DRAWS)
        drawn = matched(members[["layer", "feature"]], pool, n, settings.seed + i)
        for draw, chosen in enumerate([members, *drawn], start=-1):
            parts = {f"top {k}": chosen[chosen["rank"] < k] for k in settings.top}
            if kind in KINDS:
                phase_X = np.searchsorted(phases, chosen["layer"], side="right")
                parts = {WHOLE: chosen} | {name: chosen[phase_X == n] for n, name in enumerate(PHASE_NAMES)}
            for part, own in parts.items():
                removed = float(size.reindex(pd.MultiIndex.from_frame(own[["layer", "feature"]])).sum())
                jobs.append(Job(kind, emotion, part, draw, by_layer(own), removed, part == WHOLE))
    return jobs


@dataclass(frozen=True)
class Joint:
    """Label scores of held-out texts under each job, NaN where it was not run.

    Attributes:
        jobs: one line per job: kind, emotion, part, draw, removed, features.
        scores_JPE: nats.
        held: the texts.
    """

    jobs: pd.DataFrame
    scores_JPE: Array
    held: Held

    def at(self, kind: str, emotion: str, part: str) -> tuple[int, Array]:
        """Index of a set, and of its random counterparts."""
        same = (self.jobs["kind"] == kind) & (self.jobs["emotion"] == emotion) & (self.jobs["part"] == part)
        return int(np.flatnonzero(same & (self.jobs["draw"] < 0))[0]), np.flatnonzero(same & (self.jobs["draw"] >= 0))

    def size(self, kind: str, emotion: str, part: str = WHOLE) -> int:
        """Number of features of a set."""
        return int(self.jobs["features"].iloc[self.at(kind, emotion, part)[0]])

    def changes(self, jobs: Sequence[int] | Array, label: str) -> Array:
        """Mean over jobs of the change of a label's score less the mean of the others', [P], nats."""
        if not len(jobs):
            return np.zeros(len(self.held.y_P))
        change_JPE = margins(self.scores_JPE[np.asarray(jobs)] - self.held.clean_PE)
        mean_P: Array = change_JPE[:, :, self.held.labels.index(label)].mean(axis=0)
        return mean_P

    def flips(self, jobs: Sequence[int] | Array) -> Array:
        """Mean over jobs of whether the answer changes, [P]."""
        if not len(jobs):
            return np.zeros(len(self.held.y_P))
        before_P = self.held.answers(self.held.clean_PE)
        share_P: Array = (self.held.answers(self.scores_JPE[np.asarray(jobs)]) != before_P).mean(axis=0)
        return share_P

    def measured(self, kind: str, emotion: str, part: str, text: str, which: str = ALL_ROWS) -> dict[str, Array]:
        """Change of the label of `text` on its texts: by the set, by random ones, and the difference, [1 + draws].

        With the share of answers that change, under flips and flips_random.
        """
        own, drawn = self.at(kind, emotion, part)
        keep_P = self.held.keep(text, which)
        effect_R, random_R = (self.held.mean(self.changes(jobs, text), keep_P) for jobs in ([own], drawn))
        found = {"effect": effect_R, "random": random_R, "difference": effect_R - random_R}
        for name, jobs in (("flips", [own]), ("flips_random", list(drawn))):
            found[name] = self.held.mean(self.flips(jobs), keep_P)
        return found


def run_jobs(
    lm: LM,
    prompts: scoring.Prompts,
    dictionaries: Mapping[int, Dictionary],
    jobs: Sequence[Job],
    held: Held,
    *,
    means: Mapping[int, Array] | None = None,
    progress: str = "",
) -> Joint:
    """Run every job on the texts of its emotion, or on all. With `means`, keep only the job's set: see `ablate_sets`.

    A job without features leaves the scores as they are, unless only it is to be kept.
    """
    scores_JPE = np.full((len(jobs), *held.clean_PE.shape), np.nan)
    for emotion in held.labels:
        here_P = np.flatnonzero(held.keep(emotion))
        wanted = [j for j, job in enumerate(jobs) if job.everywhere or job.emotion in (emotion, "")]
        part = replace(prompts, ids=tuple(prompts.ids[p] for p in here_P))
        sets = [jobs[j].members for j in wanted]
        made = tracing.ablate_sets(
            lm, part, dictionaries, sets, keep=means is not None, values=means, progress=f"{progress}, {emotion}"
        )
        scores_JPE[np.array(wanted)[:, None], here_P] = made.scores_PRE.transpose(1, 0, 2)
    columns = ("kind", "emotion", "part", "draw", "removed")
    listed = pd.DataFrame([{c: getattr(job, c) for c in columns} for job in jobs])
    return Joint(listed.assign(features=[sum(map(len, j.members.values())) for j in jobs]), scores_JPE, held)


# The tables of the chapter.


def _flat(draws: Mapping[str, Array], values: Iterable[str] = ("effect", "random", "difference")) -> dict[str, float]:
    """value, low, high of each quantity as columns; the first one without a prefix."""
    found: dict[str, float] = {}
    for i, name in enumerate(values):
        found |= {k if i == 0 else f"{name}_{k}": v for k, v in summary(draws[name]).items()}
    return found


def set_table(table: pd.DataFrame, joint: Joint) -> pd.DataFrame:
    """One row per kind of set, emotion and choice of rows (all, correct only).

    Columns: kind, emotion, rows, texts, size, tested, overlap (share of the set that other emotions' sets hold too),
    removed (length, relative to that of the random sets), clean (gold logit difference before), value, low, high
    (its change by joint ablation), random_*, difference_*, flips, flips_random (shares of answers).
    """
    records, held = [], joint.held
    clean_PE = margins(held.clean_PE)
    for kind, column, p in ((LABEL, "in_label", "p_label"), (EMOTION, "in_emotion", "p_emotion")):
        owners = table[table[column]].groupby(["layer", "feature"])["emotion"].transform("size")
        for k, emotion in enumerate(held.labels):
            own = table[table["emotion"] == emotion]
            members = own[own[column]]
            key = {"kind": kind, "emotion": emotion, "size": len(members), "tested": int(own[p].notna().sum())}
            key |= {"overlap": float((owners.reindex(members.index) > 1).mean()) if len(members) else 0.0}
            job, drawn = joint.at(kind, emotion, WHOLE)
            lengths_J = joint.jobs["removed"].to_numpy()
            key |= {"removed": lengths_J[job] / max(lengths_J[drawn].mean(), SAME) if len(members) else np.nan}
            for which in (ALL_ROWS, CORRECT):
                keep_P = held.keep(emotion, which)
                if not keep_P.any():
                    continue
                draws = joint.measured(kind, emotion, WHOLE, emotion, which)
                shares = {name: float(draws[name][0]) for name in ("flips", "flips_random")}
                facts = {"rows": which, "texts": int(keep_P.sum()), "clean": float(clean_PE[keep_P, k].mean())}
                records.append(key | facts | _flat(draws) | shares)
    return pd.DataFrame(records)


def part_table(joint: Joint, kinds: Sequence[str], parts: Sequence[str]) -> pd.DataFrame:
    """Joint ablation of parts of sets on own texts: kind, emotion, part, features, value, low, high, random_*, ..."""
    records = []
    for kind in kinds:
        for emotion in joint.held.labels:
            for part in parts:
                size = joint.size(kind, emotion, part)
                draws = joint.measured(kind, emotion, part, emotion)
                key = {"kind": kind, "emotion": emotion, "part": part, "features": size}
                records.append(key | _flat(draws) | {"flips": float(draws["flips"][0])})
    return pd.DataFrame(records)


def matrix_table(joint: Joint) -> pd.DataFrame:
    """Ablate the set of one emotion, measure the gold logit difference on texts of each.

    Columns: kind, set, text, features (of the set), value, low, high, random_*, difference_*.
    """
    labels = joint.held.labels
    return pd.DataFrame(
        [
            {"kind": kind, "set": own, "text": text, "features": joint.size(kind, own)}
            | _flat(joint.measured(kind, own, WHOLE, text))
            for kind in KINDS
            for own in labels
            for text in labels
        ]
    )


def keep_table(kept: Joint) -> pd.DataFrame:
    """What is left when all but a set is at its mean, on own texts.

    Columns: kind, emotion, features (of the set); value, low, high: gold logit difference with the set free, less that
    with nothing free; random_* the same for random sets, difference_*; clean: the unedited one less that with nothing
    free.
    """
    held, records = kept.held, []
    nothing = kept.at(EVERYTHING, "", WHOLE)[0]
    for kind in KINDS:
        for emotion in held.labels:
            keep_P = held.keep(emotion)
            own, drawn = kept.at(kind, emotion, WHOLE)
            floor_P = kept.changes([nothing], emotion)
            effect_R, random_R = (held.mean(kept.changes(j, emotion) - floor_P, keep_P) for j in ([own], drawn))
            draws = {"effect": effect_R, "random": random_R, "difference": effect_R - random_R}
            clean = float(held.mean(-floor_P, keep_P)[0])
            key = {"kind": kind, "emotion": emotion, "features": kept.size(kind, emotion)}
            records.append(key | _flat(draws) | {"clean": clean})
    return pd.DataFrame(records)


def layer_table(table: pd.DataFrame) -> pd.DataFrame:
    """Where effects are: layer, emotion, total (sum of held-out |effects|), label, emotion_set (sums over members)."""
    here = table.assign(
        total=table["held_effect"].abs(),
        label=-table["held_effect"].where(table["in_label"], 0.0),
        emotion_set=-table["held_contrast"].where(table["in_emotion"], 0.0),
    )
    return here.groupby(["layer", "emotion"], sort=False)[["total", "label", "emotion_set"]].sum().reset_index()


def operation_table(by_name: Mapping[str, Effects], table: pd.DataFrame, y_P: Array) -> pd.DataFrame:
    """Zero, mean and resample ablation of the same features on the same texts, own texts of each emotion.

    Columns: kind, emotion, operation, features, value (mean over features of the mean effect, nats), rank_correlation
    and slope against zero ablation over features.
    """
    records = []
    chosen = {LABEL: table["in_label"], EMOTION: table["in_emotion"], "top features": table["top"]}
    means = {}
    for name, found in by_name.items():
        y_N = y_P[found.prompt_N]
        gold_N = margins(found.effects_NE)[np.arange(len(found)), y_N]
        frame = pd.DataFrame({"layer": found.layer_N, "feature": found.feature_N, "y": y_N, "effect": gold_N})
        means[name] = frame.groupby(["y", "layer", "feature"])["effect"].sum() / np.bincount(y_P).max()
    for kind, mask in chosen.items():
        for k, emotion in enumerate(found.labels):
            own = table[mask & (table["emotion"] == emotion)]
            index = pd.MultiIndex.from_arrays([np.full(len(own), k), own["layer"], own["feature"]])
            zero_X = means["zero"].reindex(index).fillna(0.0).to_numpy()
            for name in by_name:
                x_X = means[name].reindex(index).fillna(0.0).to_numpy()
                varied = len(x_X) > 2 and np.ptp(x_X) > 0 and np.ptp(zero_X) > 0
                fit = {"rank_correlation": float(spearmanr(x_X, zero_X).statistic) if varied else np.nan}
                fit |= {"slope": float(x_X @ zero_X / max(zero_X @ zero_X, SAME**2)) if varied else np.nan}
                value = float(x_X.mean()) if len(x_X) else np.nan
                key = {"kind": kind, "emotion": emotion, "operation": name, "features": len(own)}
                records.append(key | {"value": value} | fit)
    return pd.DataFrame(records)


def everything_table(joint: Joint) -> pd.DataFrame:
    """Removing every feature at once, on own texts: emotion, value, low, high, nats."""
    held, (job, _) = joint.held, joint.at(EVERYTHING, "", WHOLE)
    return pd.DataFrame(
        [{"emotion": e} | summary(held.mean(joint.changes([job], e), held.keep(e))) for e in held.labels]
    )
