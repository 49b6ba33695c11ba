"""What a linear reader can find: probes on the residual stream, and bag of words as their lexical control.

Features come in as [rows, layers, width] at the read-out position. A probe is standardisation and multinomial
logistic regression with an L2 penalty. Which layer and which penalty are chosen by grouped cross-validation inside the
rows a probe is fitted on, so the rows it is measured on have no say in it. No group (topic, writer) is ever on both
sides of a split.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from emosae_utils.files import EmosaeError

Array = np.ndarray[Any, np.dtype[Any]]

N_FOLDS = 4
# Inverse penalties tried for standardised features of a few hundred dimensions and rows.
PENALTIES: tuple[float, ...] = (0.001, 0.01)
# For Pareto-scaled sparse codes.
CODE_PENALTIES: tuple[float, ...] = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Probe:
    """A fitted probe and how it was chosen.

    Attributes:
        pipeline: the scaler and classifier; predicts class indices from [rows, width].
        layer: index into the layers axis of the features it was fitted on.
        penalty: inverse L2 penalty C.
        curve_L: cross-validated accuracy per layer inside the fitting rows, at the best penalty.
    """

    pipeline: Pipeline
    layer: int
    penalty: float
    curve_L: Array

    def predict(self, resid_PLD: Array) -> Array:
        """Class index of each row, [rows]."""
        predicted: Array = self.pipeline.predict(resid_PLD[:, self.layer])
        return predicted


def grouped_folds(
    y_P: Array, groups_P: Sequence[Any], n_folds: int = N_FOLDS, seed: int = 0
) -> Iterator[tuple[Array, Array]]:
    """Train and test indices of folds balanced over classes, with no group on both sides.

    Raises:
        EmosaeError: if there are fewer groups than folds.
    """
    n_groups = len(set(groups_P))
    if n_groups < n_folds:
        raise EmosaeError(f"{n_folds}-fold cross-validation needs {n_folds} groups and the data has {n_groups}")
    splitter = StratifiedGroupKFold(n_splits=n_folds, shuffle=True, random_state=seed)
    return iter(splitter.split(np.zeros(len(y_P)), y_P, groups=np.asarray(groups_P)))


class ParetoScaler(TransformerMixin, BaseEstimator):
    """Divide each feature by the square root of its standard deviation, without centring.

    Halfway between leaving sparse codes as they are, where a few strong features drown the rest, and giving all of
    them unit variance, where a feature that fired once counts as much as one that tells the classes apart
    (van den Berg et al. 2006, doi:10.1186/1471-2164-7-142). A common factor makes the typical row one long.
    """

    def fit(self, x_PF: Array, y_P: Array | None = None) -> ParetoScaler:
        """Learn the scales; a feature that never varies stays zero."""
        spread_F = x_PF.std(axis=0)
        self.scale_F = np.where(spread_F > 0, 1 / np.sqrt(np.where(spread_F > 0, spread_F, 1.0)), 0.0)
        size = float(np.sqrt(((x_PF * self.scale_F) ** 2).sum(axis=1).mean()))
        self.scale_F = self.scale_F / max(size, 1e-12) * np.sqrt(max(float((x_PF != 0).sum(axis=1).mean()), 1.0))
        return self

    def transform(self, x_PF: Array) -> Array:
        """Apply the scales."""
        scaled_PF: Array = x_PF * self.scale_F
        return scaled_PF


def _classifier(penalty: float, codes: bool = False) -> Pipeline:
    scaler = ParetoScaler() if codes else StandardScaler()
    return make_pipeline(scaler, LogisticRegression(C=penalty, max_iter=200))


def _fit(pipeline: Pipeline, x_PD: Array, y_P: Array) -> Pipeline:
    # On a few hundred rows, handing small matrices to threads costs over ten times what the arithmetic does.
    with warnings.catch_warnings(), threadpool_limits(1):
        # A fit stopped at the iteration limit predicts as well as a converged one here.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted: Pipeline = pipeline.fit(x_PD, y_P)
    return fitted


def layer_curve(
    resid_PLD: Array,
    y_P: Array,
    groups_P: Sequence[Any],
    *,
    penalty: float = PENALTIES[-1],
    codes: bool = False,
    seed: int = 0,
) -> Array:
    """Cross-validated accuracy of a probe on each layer, [layers]; `codes` says that features are sparse codes."""
    right_LP = np.zeros((resid_PLD.shape[1], len(y_P)))
    for train, test in grouped_folds(y_P, groups_P, seed=seed):
        for layer in range(resid_PLD.shape[1]):
            probe = _fit(_classifier(penalty, codes), resid_PLD[train, layer], y_P[train])
            right_LP[layer, test] = probe.predict(resid_PLD[test, layer]) == y_P[test]
    curve_L: Array = right_LP.mean(axis=1)
    return curve_L


def fit_probe(
    resid_PLD: Array,
    y_P: Array,
    groups_P: Sequence[Any],
    *,
    codes: bool = False,
    seed: int = 0,
) -> Probe:
    """Choose layer and penalty by grouped cross-validation on these rows, then fit on all of them.

    The penalties tried are `PENALTIES`, or `CODE_PENALTIES` for codes.

    Args:
        resid_PLD: features [rows, layers, width].
        y_P: class indices.
        groups_P: topic or writer of each row.
        codes: the features are sparse codes, which are Pareto-scaled and not standardised.
        seed: of the fold assignment.

    Raises:
        EmosaeError: if there are too few groups.
    """
    penalties = CODE_PENALTIES if codes else PENALTIES
    curves_CL = np.array([layer_curve(resid_PLD, y_P, groups_P, penalty=c, codes=codes, seed=seed) for c in penalties])
    best_c, layer = (int(i) for i in np.unravel_index(int(curves_CL.argmax()), curves_CL.shape))
    pipeline = _fit(_classifier(penalties[best_c], codes), resid_PLD[:, layer], y_P)
    return Probe(pipeline, layer, penalties[best_c], curves_CL[best_c])


@dataclass(frozen=True)
class CodeProbe:
    """A linear probe on a sparse code, which may weigh features one by one or through their directions.

    Attributes:
        probe: the fitted probe.
        directions_FD: decoder directions through which it reads; None if it reads the features themselves.
    """

    probe: Probe
    directions_FD: Array | None

    def predict(self, codes_PF: Array) -> Array:
        """Class index of each row, [rows]."""
        seen = codes_PF if self.directions_FD is None else codes_PF @ self.directions_FD
        return self.probe.predict(seen[:, None])


def fit_code_probe(
    codes_PF: Array, directions_FD: Array, y_P: Array, groups_P: Sequence[Any], *, seed: int = 0
) -> CodeProbe:
    """Fit a linear probe to a sparse code in the better of two metrics, chosen by grouped cross-validation.

    Either way the probe is a linear function of the code; what differs is what its penalty takes to be simple. The
    first treats all features as unrelated. The second counts two features of similar direction as similar, which pays
    where a dictionary has split one direction into many rarely active features.

    Args:
        codes_PF: activations [rows, features].
        directions_FD: the features' decoder directions [features, d_model].
        y_P: class indices.
        groups_P: topic or writer of each row.
        seed: of the fold assignment.
    """
    own = fit_probe(codes_PF[:, None], y_P, groups_P, codes=True, seed=seed)
    together = fit_probe((codes_PF @ directions_FD)[:, None], y_P, groups_P, seed=seed)
    if together.curve_L[0] > own.curve_L[0]:
        return CodeProbe(together, directions_FD)
    return CodeProbe(own, None)


def shuffled_accuracies(
    probe: Probe, fit_PLD: Array, y_fit_P: Array, test_PLD: Array, y_test_P: Array, *, n: int, seed: int
) -> list[float]:
    """Held-out accuracy of the same probe fitted to shuffled labels, `n` times: what chance gives."""
    rng = np.random.default_rng(seed)
    scores = []
    for _ in range(n):
        null = _fit(_classifier(probe.penalty), fit_PLD[:, probe.layer], rng.permutation(y_fit_P))
        scores.append(float((null.predict(test_PLD[:, probe.layer]) == y_test_P).mean()))
    return scores


def bag_of_words(fit_texts: Sequence[str], y_fit_P: Array, test_texts: Sequence[str]) -> Array:
    """Predictions of a tf-idf word-and-bigram logistic regression: what the words alone give away.

    The penalty is scikit-learn's default, C = 1; words seen in one text only are left out.
    """
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=1.0, max_iter=1000)
    )
    predicted: Array = model.fit(list(fit_texts), y_fit_P).predict(list(test_texts))
    return predicted
