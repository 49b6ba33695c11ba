"""Causal feature steering: change how strongly some features act, and measure what that repairs.

A *unit* reads a number from the residual stream after a block and writes along a direction: of a feature, its
activation and its decoder row. With gain g it moves the stream by (g - 1) a(x) v, so a gain of one leaves the model as
it is and the SAE error is never touched. Everything the book compares is made of such units: features (gain steering),
a fixed vector of a length relative to the stream's norm (additive steering), differences of class means, and controls
that write along the rows of other features.

Gains are learnt from a few labelled examples. Each step replaces the model by its tangent: label scores are linear in
the gains, with a slope that one backward pass through the suffix gives exactly (see `tracing`). On the tangent the
best gains under a penalty are a convex problem of as many unknowns as there are examples, whatever the number of
units. Then the model itself is asked, and the next step starts from there (ours; a Gauss-Newton method).

Shapes: P prompts, R steerings, E labels, U units of all layers, K units of one layer, X positions, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from tqdm import tqdm

from emosae_utils.files import EmosaeError, atomic_folder, check_manifest, read_json, write_json, write_manifest
from emosae_utils.models import LM, decoder_layers
from emosae_utils.saes import Dictionary
from emosae_utils.scoring import FloatArray, Prompts, _quiet
from emosae_utils.tracing import _Clean, _shared_prefix_mode, _Tracer, _tracer

Array = np.ndarray[Any, np.dtype[Any]]
Read = Literal["feature", "projection", "norm"]
# Rows of prompts in one pass: enough to keep the matrix products busy.
BATCH_ROWS = 192


@dataclass(frozen=True, eq=False)
class Bank:
    """The units of one layer.

    Attributes:
        layer: block index.
        read: "feature" for activations of the layer's dictionary, one unit per feature; "projection" for
            (x - centre) . reads; "norm" for the length of the stream.
        writes_KD: the direction each unit moves the stream along.
        reads_KD, centre_D: of projections.
        writes_from_K: for features, whose decoder rows `writes_KD` are; None if each writes along its own.
    """

    layer: int
    read: Read
    writes_KD: torch.Tensor
    reads_KD: torch.Tensor | None = None
    centre_D: torch.Tensor | None = None
    writes_from_K: Array | None = None

    def __len__(self) -> int:
        return len(self.writes_KD)

    def activations(self, x_XD: torch.Tensor, dictionaries: Mapping[int, Dictionary]) -> torch.Tensor:
        """What the units read from streams [X, D], [X, K]; gradients pass through."""
        x_XD = x_XD.float()
        if self.read == "feature":
            acts_XK: torch.Tensor = dictionaries[self.layer].sae.encode(x_XD)
            return acts_XK
        if self.read == "norm":
            return x_XD.norm(dim=1, keepdim=True).expand(-1, len(self))
        assert self.reads_KD is not None and self.centre_D is not None
        return (x_XD - self.centre_D.to(x_XD)) @ self.reads_KD.to(x_XD).T

    def moves(self, amounts_XK: torch.Tensor) -> torch.Tensor:
        """What the units write for what they read times its change of gain, [X, D]; gradients pass through."""
        return amounts_XK @ self.writes_KD.to(amounts_XK)


# Banks by layer. One object is shared by all steerings that differ in their gains alone.
Basis = Mapping[int, Bank]


@dataclass(frozen=True)
class Steering:
    """A set of gains and where they came from.

    Attributes:
        model: name of the model it was made for.
        basis: the units.
        gains: by layer, [K]; a unit with gain 1 does nothing.
        labels: emotions it was made for.
        provenance: how it was made: method, dataset, examples, seed, and what was chosen how.
    """

    model: str
    basis: Basis
    gains: Mapping[int, Array]
    labels: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_units(self) -> int:
        """Number of units that are turned up or down."""
        return int(sum((np.asarray(g_K) != 1).sum() for g_K in self.gains.values()))

    def at(self, strength: float) -> Steering:
        """The same steering at another strength: gains 1 + strength (g - 1)."""
        return replace(self, gains={layer: 1 + strength * (g_K - 1) for layer, g_K in self.gains.items()})


def feature_basis(dictionaries: Mapping[int, Dictionary]) -> dict[int, Bank]:
    """Every feature of every dictionary: read its activation, write along its decoder row."""
    return {layer: Bank(layer, "feature", d.sae.W_dec.detach().float()) for layer, d in dictionaries.items()}


def shuffled_basis(dictionaries: Mapping[int, Dictionary], active: Mapping[int, Array], seed: int) -> dict[int, Bank]:
    """A control: features with their own activations that write along the row of another feature of the same layer.

    Amount and place of what is written stay the same, only its meaning is lost. `active` are the features, by layer,
    among which rows are exchanged.
    """
    rng, found = np.random.default_rng(seed), {}
    for layer, dictionary in dictionaries.items():
        rows_FD, from_F = dictionary.sae.W_dec.detach().float(), np.arange(dictionary.n_features)
        # A cyclic shift of a random order leaves none in its place.
        order = rng.permutation(np.asarray(active[layer]))
        from_F[order] = np.roll(order, 1)
        found[layer] = Bank(layer, "feature", rows_FD[torch.from_numpy(from_F)], writes_from_K=from_F)
    return found


def mean_difference_basis(resid_PLD: Array, y_P: Array, n_classes: int, layers: Sequence[int]) -> dict[int, Bank]:
    """Differences of means: a unit reads and writes along the mean of one class less the mean of the others.

    Directions have length one; what is read is taken from the mean of all rows.
    """
    found = {}
    for i, layer in enumerate(layers):
        x_PD = torch.from_numpy(np.ascontiguousarray(resid_PLD[:, i])).float()
        rows = []
        for k in range(n_classes):
            own = torch.from_numpy(y_P == k)
            rows.append(x_PD[own].mean(0) - x_PD[~own].mean(0))
        unit_KD = torch.nn.functional.normalize(torch.stack(rows), dim=1)
        found[layer] = Bank(layer, "projection", unit_KD, unit_KD, x_PD.mean(0))
    return found


def additive_basis(directions: Mapping[int, Array]) -> dict[int, Bank]:
    """Fixed directions, scaled to length one and written in proportion to the norm of the stream: gain 1 + alpha.

    `directions` are [K, D] by layer.
    """
    found = {}
    for layer, rows in directions.items():
        rows_KD = torch.from_numpy(np.asarray(rows, dtype=np.float32))
        found[layer] = Bank(layer, "norm", torch.nn.functional.normalize(rows_KD, dim=1))
    return found


# The model under steering, at the read-out position.


@dataclass(frozen=True)
class Prepared:
    """Prompts with what a steered read-out needs of them: keys and values of their prefixes, and clean streams."""

    tracer: _Tracer
    clean: tuple[_Clean, ...]

    def __len__(self) -> int:
        return len(self.clean)


def prepare(lm: LM, prompts: Prompts, *, progress: str = "") -> Prepared:
    """Read the prompts once, in float32."""
    if not len(prompts):
        raise EmosaeError("there are no prompts to steer")
    tracer = _tracer(lm, prompts, "difference", "float32")
    return Prepared(
        tracer, tuple(tracer.clean(p) for p in tqdm(range(len(prompts)), desc=progress, disable=_quiet(progress)))
    )


def _batches(cleans: Sequence[_Clean], each: int) -> Iterator[Sequence[_Clean]]:
    size = max(1, BATCH_ROWS // each)
    for start in range(0, len(cleans), size):
        yield cleans[start : start + size]


def _compiled(steerings: Sequence[Steering]) -> dict[int, list[tuple[Bank, torch.Tensor, torch.Tensor]]]:
    """By layer, each bank with the rows that use it and their gains less one, [rows, K]."""
    found: dict[int, list[tuple[Bank, torch.Tensor, torch.Tensor]]] = {}
    for layer in sorted({layer for s in steerings for layer in s.gains}):
        groups: dict[int, tuple[Bank, list[int], list[Array]]] = {}
        for r, steering in enumerate(steerings):
            if layer in steering.gains:
                bank = steering.basis[layer]
                _, rows, gains = groups.setdefault(id(bank), (bank, [], []))
                rows.append(r)
                gains.append(np.asarray(steering.gains[layer], dtype=np.float32) - 1)
        found[layer] = [
            (bank, torch.tensor(rows), torch.from_numpy(np.stack(gains))) for bank, rows, gains in groups.values()
        ]
    return found


@torch.no_grad()
def steered_scores(
    lm: LM,
    prompts: Prompts | Prepared,
    steerings: Sequence[Steering],
    dictionaries: Mapping[int, Dictionary],
    *,
    progress: str = "",
) -> FloatArray:
    """Label scores of every prompt under every steering, applied at the read-out position alone, [R, P, E], nats.

    Scores are label logits less their mean over labels. All steerings of a prompt are rows of one sweep.

    Raises:
        EmosaeError: if there is no steering, or one was made for another model or width, or the prompts were read by
            another model.
    """
    _check(lm, steerings, dictionaries)
    plan = _compiled(steerings)
    ready = prompts if isinstance(prompts, Prepared) else prepare(lm, prompts, progress=progress)
    if ready.tracer.source.name != lm.name:
        raise EmosaeError(f"these prompts were read by {ready.tracer.source.name} and the model is {lm.name}")
    tracer, n, first = ready.tracer, len(steerings), min(plan, default=0)
    found = []
    for cleans in _batches(ready.clean, n):
        with _shared_prefix_mode(tracer.lm):
            # Prompt by prompt, the steerings in their order.
            rows_XSD = torch.cat([clean.after(first)[None].repeat(n, 1, 1) for clean in cleans])
            for layer in range(first, tracer.lm.n_layers):
                rows_XSD = tracer.block(layer, rows_XSD, *cleans) if layer > first else rows_XSD
                for bank, rows, less_one_RK in plan.get(layer, ()):
                    at_X = (torch.arange(len(cleans))[:, None] * n + rows).ravel()
                    acts_XK = bank.activations(rows_XSD[at_X, 0], dictionaries)
                    moves_XD = bank.moves(less_one_RK.repeat(len(cleans), 1).to(acts_XK) * acts_XK)
                    rows_XSD[at_X, 0] += moves_XD.to(rows_XSD.dtype)
            found.append(tracer.label_scores(rows_XSD).cpu().numpy().reshape(len(cleans), n, -1))
    scores_RPE: FloatArray = np.concatenate(found).transpose(1, 0, 2)
    return scores_RPE


def _check(lm: LM, steerings: Sequence[Steering], dictionaries: Mapping[int, Dictionary]) -> None:
    if not steerings:
        raise EmosaeError("the set of steerings is empty; give at least one")
    for steering in steerings:
        if steering.model != lm.name:
            raise EmosaeError(f"this steering was made for {steering.model} and the model is {lm.name}")
        for layer, gains_K in steering.gains.items():
            bank = steering.basis.get(layer)
            if bank is None or not 0 <= layer < lm.n_layers:
                raise EmosaeError(f"the steering has gains for layer {layer}, where it has no units")
            if bank.read == "feature" and layer not in dictionaries:
                raise EmosaeError(f"the steering reads features of layer {layer}, which has no dictionary here")
            if bank.read == "feature":
                dictionary = dictionaries[layer]
                if dictionary.n_features != len(bank):
                    raise EmosaeError(
                        f"the dictionary of layer {layer} has {dictionary.n_features} features and the steering was "
                        f"made for {len(bank)}"
                    )
                if str(dictionary.sae.cfg.normalize_activations) == "layer_norm":
                    raise EmosaeError(
                        f"{dictionary.origin} rescales each input, so its decoder rows are not fixed directions"
                    )
            if len(gains_K) != len(bank) or bank.writes_KD.shape[1] != lm.d_model:
                raise EmosaeError(f"the gains or directions of layer {layer} do not fit the units or the model")
            if not np.isfinite(gains_K).all():
                raise EmosaeError(f"layer {layer} has a gain that is not finite")


# Learning gains on the tangent of the model.


@dataclass(frozen=True)
class Units:
    """A choice of units: their layers and their places in the banks, [U] each."""

    layer_U: Array
    unit_U: Array

    def __len__(self) -> int:
        return len(self.layer_U)

    def gains(self, basis: Basis, theta_U: Array) -> dict[int, Array]:
        """Gains by layer, [K], with 1 + theta at the chosen units."""
        found = {}
        for layer in np.unique(self.layer_U):
            here_U = self.layer_U == layer
            gains_K = np.ones(len(basis[int(layer)]))
            gains_K[self.unit_U[here_U]] += theta_U[here_U]
            found[int(layer)] = gains_K
        return found


def all_units(basis: Basis) -> Units:
    """Every unit of every bank."""
    layers = sorted(basis)
    return Units(
        np.concatenate([np.full(len(basis[x]), x) for x in layers]),
        np.concatenate([np.arange(len(basis[x])) for x in layers]),
    )


@dataclass(frozen=True)
class Tangent:
    """A model's label scores as a linear function of gains: scores + slopes . (theta - theta_at).

    Attributes:
        scores_PE: scores at `theta_at`, nats, less their mean over labels.
        slopes_PEU: their derivative by each gain.
        theta_U: gains less one, where the tangent touches.
    """

    scores_PE: Array
    slopes_PEU: Array
    theta_U: Array

    @property
    def offset_PE(self) -> Array:
        """Scores the tangent gives at theta = 0."""
        return self.scores_PE - self.slopes_PEU @ self.theta_U


def tangent(
    ready: Prepared,
    basis: Basis,
    units: Units,
    dictionaries: Mapping[int, Dictionary],
    theta_U: Array | None = None,
    *,
    progress: str = "",
) -> Tangent:
    """Scores and their exact slopes by the gains of `units`, at `theta_U` (default 0): one backward pass a batch."""
    theta_U = np.zeros(len(units)) if theta_U is None else theta_U
    gains = units.gains(basis, theta_U)
    layers = sorted(gains)
    index = {layer: torch.from_numpy(units.unit_U[units.layer_U == layer]) for layer in layers}
    tracer, scores, slopes = ready.tracer, [], []
    n = len(tracer.prompts.labels)
    for cleans in tqdm(list(_batches(ready.clean, n)), desc=progress, disable=_quiet(progress)):
        # One row per prompt and label, each with its own copy of the gains, so that one backward pass gives all slopes.
        leaves = {
            layer: torch.from_numpy(gains[layer] - 1)
            .float()
            .to(tracer.lm.device)
            .repeat(n * len(cleans), 1)
            .requires_grad_()
            for layer in layers
        }
        with _shared_prefix_mode(tracer.lm), torch.enable_grad():
            rows_XSD = torch.cat([clean.after(layers[0])[None].repeat(n, 1, 1) for clean in cleans])
            for layer in range(layers[0], tracer.lm.n_layers):
                rows_XSD = tracer.block(layer, rows_XSD, *cleans) if layer > layers[0] else rows_XSD
                if layer in leaves:
                    acts_XK = basis[layer].activations(rows_XSD[:, 0], dictionaries)
                    moved_XD = rows_XSD[:, 0] + basis[layer].moves(leaves[layer] * acts_XK).to(rows_XSD.dtype)
                    rows_XSD = torch.cat([moved_XD[:, None], rows_XSD[:, 1:]], dim=1)
            scores_PEE = tracer.label_scores(rows_XSD).view(len(cleans), n, n)
            own = scores_PEE.diagonal(dim1=1, dim2=2).sum()
            grads = torch.autograd.grad(own, [leaves[layer] for layer in layers])
        scores.append(scores_PEE[:, 0].detach().cpu().numpy())
        found = {
            layer: grad_XK.view(len(cleans), n, -1).cpu()[:, :, index[layer]]
            for layer, grad_XK in zip(layers, grads, strict=True)
        }
        slopes.append(_in_order(units, found))
    return Tangent(np.concatenate(scores), np.concatenate(slopes), theta_U)


def _in_order(units: Units, by_layer: Mapping[int, torch.Tensor]) -> Array:
    """Slopes of each layer's chosen units, [P, E, K'], put into the order of `units`, [P, E, U], float32."""
    n_prompts, n_labels = next(iter(by_layer.values())).shape[:2]
    slopes_PEU = np.empty((n_prompts, n_labels, len(units)), dtype=np.float32)
    for layer, part in by_layer.items():
        slopes_PEU[:, :, units.layer_U == layer] = part.cpu().numpy()
    return slopes_PEU


@dataclass(frozen=True)
class Fit:
    """How gains are learnt.

    Attributes:
        n_units: units kept: those whose gain would change the loss on the examples most.
        penalties: ridge weights tried; chosen by cross-validation inside the examples, by log loss.
        penalty: used where there is one example per emotion, and so nothing to choose by.
        free_weight: weight of content-free prompts, which should favour no label, beside the examples.
        neutral_weight: of the predicted KL on neutral text, per nat a token.
        steps: tangents, each taken where the one before led.
    """

    n_units: int = 500
    penalties: Sequence[float] = (0.03, 0.1)
    penalty: float = 0.1
    free_weight: float = 0.5
    neutral_weight: float = 0.0
    steps: int = 3


@dataclass(frozen=True)
class Problem:
    """What gains are fitted to: slopes and scores of the examples and of content-free prompts, and neutral text.

    Attributes:
        slopes_XEU, offset_XE: the tangent of examples, then of content-free prompts.
        target_XE: what each row should say, times its weight.
        neutral_MU: rows whose Gram matrix is the Fisher information of the gains, per token of neutral text.
    """

    slopes_XEU: Array
    offset_XE: Array
    target_XE: Array
    neutral_MU: Array


def solve(problem: Problem, penalty: float, neutral_weight: float = 0.0, start_U: Array | None = None) -> Array:
    """The gains less one, [U], that minimise, on the tangent, cross-entropy + penalty/2 |theta|^2 + neutral_weight KL.

    KL of neutral text is 1/2 theta' F theta with F the Fisher information of the gains, its second-order expansion.
    The problem is convex.
    """
    rows_NU = problem.slopes_XEU.reshape(-1, problem.slopes_XEU.shape[-1]).astype(np.float64)
    shape, target_XE = problem.offset_XE.shape, problem.target_XE
    weight_X1 = target_XE.sum(axis=1, keepdims=True)

    def loss(theta_U: Array) -> tuple[float, Array]:
        z_XE = problem.offset_XE + (rows_NU @ theta_U).reshape(shape)
        logsum_X = logsumexp(z_XE, axis=1)
        p_XE = np.exp(z_XE - logsum_X[:, None])
        value = float((weight_X1[:, 0] * logsum_X).sum() - (target_XE * z_XE).sum())
        slope_U = rows_NU.T @ (weight_X1 * p_XE - target_XE).ravel() + penalty * theta_U
        value += penalty / 2 * float(theta_U @ theta_U)
        if neutral_weight:
            moved_M = problem.neutral_MU @ theta_U
            value += neutral_weight / 2 * float(moved_M @ moved_M)
            slope_U = slope_U + neutral_weight * (problem.neutral_MU.T @ moved_M)
        return value, slope_U

    start_U = np.zeros(rows_NU.shape[1]) if start_U is None else start_U
    found = minimize(loss, start_U, jac=True, method="L-BFGS-B", options={"maxiter": 300})
    theta_U: Array = found.x
    return theta_U


def _take(first: Tangent, rows_P: Array, keep_U: Array) -> Tangent:
    return Tangent(first.scores_PE[rows_P], first.slopes_PEU[rows_P][:, :, keep_U], first.theta_U[keep_U])


def _loss(scores_XE: Array, target_XE: Array) -> float:
    """Weighted cross-entropy, nats."""
    return float((target_XE.sum(axis=1) * logsumexp(scores_XE, axis=1)).sum() - (target_XE * scores_XE).sum())


def targets(y_P: Array, n_labels: int, n_free: int, free_weight: float) -> Array:
    """What examples and content-free prompts should say, times their weights, [P + free, E]."""
    own_PE = np.eye(n_labels)[y_P] / max(1, len(y_P))
    even_XE = np.full((n_free, n_labels), free_weight / max(1, n_free) / n_labels)
    return np.concatenate([own_PE, even_XE])


def loss_slopes(first: Tangent, target_PE: Array) -> Array:
    """How fast the loss on some prompts falls as each gain rises, [U], nats: the ranking by which units are kept."""
    z_PE = first.scores_PE
    p_PE = softmax(z_PE, axis=1)
    pull_PE = target_PE - target_PE.sum(axis=1, keepdims=True) * p_PE
    slopes_U: Array = np.einsum("pe,peu->u", pull_PE, first.slopes_PEU)
    return slopes_U


def cross_validate(
    first: Tangent, free: Tangent, target_XE: Array, fit: Fit, neutral_MU: Array, seed: int, n_folds: int = 3
) -> tuple[float, dict[float, float]]:
    """The penalty with the smallest loss on left-out examples, on the tangent; and the loss of each, nats.

    With fewer than two examples of a label there is nothing to leave out: `fit.penalty`.
    """
    from sklearn.model_selection import KFold, StratifiedKFold

    n, n_labels = first.scores_PE.shape
    if n < 2 * n_labels or len(fit.penalties) < 2:
        return (fit.penalty if len(fit.penalties) > 1 else fit.penalties[0]), {}
    # What examples should say is a mixture where steering is targeted; then its most likely label may occur only once.
    y_P = target_XE[:n].argmax(axis=1)
    fewest = int(np.bincount(y_P)[np.unique(y_P)].min())
    kind, n_folds = (StratifiedKFold, min(n_folds, fewest)) if fewest > 1 else (KFold, n_folds)
    folds = list(kind(n_folds, shuffle=True, random_state=seed).split(y_P, y_P))
    losses = {}
    for penalty in fit.penalties:
        total = 0.0
        for train, test in folds:
            kept_XE = np.concatenate([target_XE[train] * n / len(train), target_XE[n:]])
            problem = replace(_problem(first, free, kept_XE, train), neutral_MU=neutral_MU)
            theta_U = solve(problem, penalty, fit.neutral_weight)
            z_PE = first.offset_PE[test] + first.slopes_PEU[test] @ theta_U
            total += _loss(z_PE, target_XE[test])
        losses[penalty] = total
    return min(losses, key=lambda x: losses[x]), losses


def _problem(first: Tangent, free: Tangent, target_XE: Array, rows_P: Array) -> Problem:
    return Problem(
        np.concatenate([first.slopes_PEU[rows_P], free.slopes_PEU]),
        np.concatenate([first.offset_PE[rows_P], free.offset_PE]),
        target_XE,
        np.zeros((0, first.slopes_PEU.shape[2])),
    )


def fit_gains(
    ready: Prepared,
    free: Prepared,
    target_XE: Array,
    basis: Basis,
    units: Units,
    dictionaries: Mapping[int, Dictionary],
    fit: Fit,
    *,
    shift_E: Array | float = 0.0,
    first: Tangent | None = None,
    first_free: Tangent | None = None,
    neutral_MU: Array | None = None,
    seed: int = 0,
) -> tuple[dict[int, Array], dict[str, Any]]:
    """Learn gains from labelled examples.

    Args:
        ready: the examples.
        free: content-free prompts.
        target_XE: what examples, then content-free prompts, should say, times their weights; see `targets`.
        basis: the units.
        units: candidates among them.
        dictionaries: by layer.
        fit: how.
        shift_E: subtracted from all scores, as the label prior is where gains are learnt on top of calibration.
        first: the tangent of the examples at gain one, if known.
        first_free: that of the content-free prompts.
        neutral_MU: from `neutral_slopes`, for `fit.neutral_weight`.
        seed: of the folds.

    Returns:
        Gains by layer, and what was chosen: penalty, its cross-validated losses, units, and the loss by step.
    """
    first = tangent(ready, basis, units, dictionaries) if first is None else first
    first_free = tangent(free, basis, units, dictionaries) if first_free is None else first_free
    first, first_free = (replace(x, scores_PE=x.scores_PE - shift_E) for x in (first, first_free))
    n, everyone = len(ready), np.arange(len(ready))
    pull_U = loss_slopes(first, target_XE[:n]) + loss_slopes(first_free, target_XE[n:])
    keep_U = np.sort(np.argsort(-np.abs(pull_U), kind="stable")[: fit.n_units])
    kept = Units(units.layer_U[keep_U], units.unit_U[keep_U])
    here, here_free = _take(first, everyone, keep_U), _take(first_free, np.arange(len(free)), keep_U)
    neutral = np.zeros((0, len(kept))) if neutral_MU is None else neutral_MU[:, keep_U]
    penalty, losses = cross_validate(here, here_free, target_XE, fit, neutral, seed)
    lm = ready.tracer.source

    def exact(theta_U: Array) -> float:
        trial = [Steering(lm.name, basis, kept.gains(basis, theta_U))]
        scores = [steered_scores(lm, x, trial, dictionaries)[0] for x in (ready, free)]
        value = _loss(np.concatenate(scores) - shift_E, target_XE) + penalty / 2 * float(theta_U @ theta_U)
        return value + fit.neutral_weight / 2 * float(((neutral @ theta_U) ** 2).sum())

    theta_U, path = np.zeros(len(kept)), []
    now = exact(theta_U)
    for step in range(fit.steps):
        if step:
            here = tangent(ready, basis, kept, dictionaries, theta_U)
            here_free = tangent(free, basis, kept, dictionaries, theta_U)
            here, here_free = (replace(x, scores_PE=x.scores_PE - shift_E) for x in (here, here_free))
        problem = replace(_problem(here, here_free, target_XE, everyone), neutral_MU=neutral)
        goal_U = solve(problem, penalty, fit.neutral_weight, theta_U)
        # The tangent may overshoot: go back half way until the model itself agrees.
        for share in (1.0, 0.5, 0.25, 0.125, 0.0):
            trial_U = theta_U + share * (goal_U - theta_U)
            if share == 0 or (value := exact(trial_U)) < now:
                break
        theta_U, now = trial_U, min(now, value)
        path.append({"step": step, "share": share, "loss": now})
        if share == 0:
            break
    chosen = {"penalty": penalty, "cv_losses": {str(k): v for k, v in losses.items()}, "path": path}
    return kept.gains(basis, theta_U), chosen | {"n_units": len(kept)}


# Running text.


def neutral_slopes(
    lm: LM,
    ids: Sequence[Sequence[int]],
    bases: Mapping[str, Basis],
    dictionaries: Mapping[int, Dictionary],
    *,
    samples: int = 2,
    seed: int = 0,
    progress: str = "",
) -> dict[str, Array]:
    """For each basis rows [M, U], over `all_units`, whose Gram matrix is the Fisher information of gains on plain text.

    If the gains change by theta, the KL divergence of the model's next-token distributions grows by
    1/2 |rows theta|^2 nats a token, to second order. A row is the slope of the log probability of tokens drawn from
    the model itself, for all positions of a text at once: draws at different positions are independent given the text,
    so their cross terms vanish on average. Gains act at every position but the first. All bases share the passes.
    """
    layers, rng, n_tokens = sorted({x for basis in bases.values() for x in basis}), torch.Generator(), 0
    rng.manual_seed(seed)
    rows: dict[str, list[Array]] = {name: [] for name in bases}
    blocks = decoder_layers(lm.hf)
    for sequence in tqdm(ids, desc=progress, disable=_quiet(progress)):
        inputs = torch.tensor([list(sequence)], device=lm.device)
        leaves = {x: torch.zeros(1, len(sequence), lm.d_model, device=lm.device, requires_grad=True) for x in layers}
        streams: dict[int, torch.Tensor] = {}

        def read(layer: int, output: Any, leaves: Any = leaves, streams: Any = streams) -> Any:
            x_1SD = output[0] if isinstance(output, tuple) else output
            streams[layer] = x_1SD.detach()[0, 1:]
            moved = x_1SD + leaves[layer].to(x_1SD)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        with ExitStack() as stack, torch.enable_grad():
            for layer in layers:
                hook = blocks[layer].register_forward_hook(lambda m, i, o, layer=layer, read=read: read(layer, o))
                stack.callback(hook.remove)
            logits_SV = lm.hf(inputs, use_cache=False).logits[0, 1:].float()
            logp_SV = torch.log_softmax(logits_SV, dim=-1)
            p_SV = logp_SV.detach().exp()
            for draw in range(samples):
                drawn_S1 = torch.multinomial(p_SV.cpu(), 1, generator=rng).to(lm.device)
                total = logp_SV.gather(1, drawn_S1).sum()
                found = torch.autograd.grad(total, [leaves[x] for x in layers], retain_graph=draw + 1 < samples)
                grads = {x: grad_1SD[0, 1:].float() for x, grad_1SD in zip(layers, found, strict=True)}
                with torch.no_grad():
                    for name, basis in bases.items():
                        parts = [_gain_slopes(basis[x], streams[x], grads[x], dictionaries) for x in sorted(basis)]
                        rows[name].append(torch.cat(parts).cpu().numpy())
        n_tokens += len(sequence) - 1
    return {name: np.array(part) / np.sqrt(samples * max(1, n_tokens)) for name, part in rows.items()}


def _gain_slopes(
    bank: Bank, stream_SD: torch.Tensor, grad_SD: torch.Tensor, dictionaries: Mapping[int, Dictionary]
) -> torch.Tensor:
    """Slope by each gain of what has the slopes `grad_SD` by the stream, summed over positions, [K]."""
    acts_SK = bank.activations(stream_SD, dictionaries)
    return (acts_SK * (grad_SD @ bank.writes_KD.to(grad_SD).T)).sum(dim=0)


@contextmanager
def steered(lm: LM, steering: Steering, dictionaries: Mapping[int, Dictionary]) -> Iterator[None]:
    """Run the model with a steering at every position but the first, which is an attention sink.

    Works with everything that calls the model: scoring, generation, plain forward passes. `steered_scores` is faster
    and acts at the read-out position alone.

    Raises:
        EmosaeError: as `steered_scores` does.
    """
    _check(lm, [steering], dictionaries)
    state = {"past": 0}

    def start(module: Any, args: Any, kwargs: Any) -> None:
        past = kwargs.get("past_key_values")
        state["past"] = 0 if past is None else int(past.get_seq_length())

    def move(bank: Bank, less_one_K: torch.Tensor, output: Any) -> Any:
        x_BSD = output[0] if isinstance(output, tuple) else output
        skip = 1 if state["past"] == 0 else 0
        flat_XD = x_BSD[:, skip:].reshape(-1, x_BSD.shape[-1])
        moves_XD = bank.moves(less_one_K.to(flat_XD.device) * bank.activations(flat_XD, dictionaries))
        moved_BSD = x_BSD.clone()
        moved_BSD[:, skip:] += moves_XD.view(*moved_BSD[:, skip:].shape).to(x_BSD.dtype)
        return (moved_BSD, *output[1:]) if isinstance(output, tuple) else moved_BSD

    blocks = decoder_layers(lm.hf)
    with ExitStack() as stack, torch.no_grad():
        stack.callback(lm.hf.get_decoder().register_forward_pre_hook(start, with_kwargs=True).remove)
        for layer, gains_K in steering.gains.items():
            bank, less_one_K = steering.basis[layer], torch.from_numpy(np.asarray(gains_K) - 1).float()
            hook = blocks[layer].register_forward_hook(
                lambda m, i, o, bank=bank, less_one_K=less_one_K: move(bank, less_one_K, o)
            )
            stack.callback(hook.remove)
        yield


@torch.no_grad()
def preservation(
    lm: LM,
    ids: Sequence[Sequence[int]],
    steerings: Mapping[str, Steering],
    dictionaries: Mapping[int, Dictionary],
    *,
    every: int = 1,
    progress: str = "",
) -> pd.DataFrame:
    """What steering at every position does to running text.

    Args:
        lm: the model.
        ids: token sequences.
        steerings: by name.
        dictionaries: by layer.
        every: of the positions, score each so-manieth, to save output matrix.
        progress: a caption for a progress bar; none if empty.

    Returns:
        One row per sequence and steering: sequence, steering, tokens, clean and steered (cross-entropy, nats a token),
        kl (of the steered from the clean next-token distribution, nats a token).
    """
    records = []
    for number, sequence in enumerate(tqdm(ids, desc=progress, disable=_quiet(progress))):
        inputs = torch.tensor([list(sequence)], device=lm.device)
        at = torch.arange(1, inputs.shape[1] - 1, every, device=lm.device)
        gold = inputs[0, at + 1]

        def logp(inputs: torch.Tensor = inputs, at: torch.Tensor = at) -> torch.Tensor:
            logits_SV = lm.hf(inputs, use_cache=False, logits_to_keep=at).logits[0].float()
            return torch.log_softmax(logits_SV, dim=-1)

        clean_SV = logp()
        clean = -float(clean_SV.gather(1, gold[:, None]).mean())
        for name, steering in steerings.items():
            with steered(lm, steering, dictionaries):
                now_SV = logp()
            kl = float((clean_SV.exp() * (clean_SV - now_SV)).sum(dim=1).mean())
            loss = -float(now_SV.gather(1, gold[:, None]).mean())
            records.append((number, name, len(at), clean, loss, kl))
    return pd.DataFrame(records, columns=["sequence", "steering", "tokens", "clean", "steered", "kl"])


# A steering as files.


def _dictionary_sum(dictionary: Dictionary) -> str:
    """SHA-256 of a dictionary's weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(dictionary.sae.named_parameters()):
        digest.update(name.encode() + weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_steering(folder: Path, steering: Steering, dictionaries: Mapping[int, Dictionary]) -> None:
    """Write a steering as safetensors and JSON: gains, directions, and which dictionaries its features are of."""
    from safetensors.numpy import save_file

    tensors: dict[str, Array] = {}
    banks: dict[str, dict[str, str]] = {}
    for layer, gains_K in sorted(steering.gains.items()):
        bank = steering.basis[layer]
        tensors[f"{layer}.gains"] = np.asarray(gains_K, dtype=np.float32)
        banks[str(layer)] = {"read": bank.read}
        if bank.read == "feature":
            banks[str(layer)] |= {
                "origin": Path(dictionaries[layer].origin).name,
                "sha256": _dictionary_sum(dictionaries[layer]),
            }
        own_rows = bank.read == "feature" and bank.writes_from_K is None
        parts = {"reads": bank.reads_KD, "centre": bank.centre_D, "writes": None if own_rows else bank.writes_KD}
        if bank.writes_from_K is not None:
            tensors[f"{layer}.writes_from"] = np.asarray(bank.writes_from_K, dtype=np.int64)
        for name, tensor in parts.items():
            if tensor is not None:
                tensors[f"{layer}.{name}"] = np.ascontiguousarray(tensor.cpu().numpy())
    facts = {"model": steering.model, "labels": list(steering.labels), "banks": banks}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / "steering.safetensors")
        write_json(temporary / "steering.json", facts | {"provenance": dict(steering.provenance)})
        write_manifest(temporary)


def load_steering(folder: Path, dictionaries: Mapping[int, Dictionary]) -> Steering:
    """Read a steering that `save_steering` wrote; the features it names must be those of `dictionaries`.

    Raises:
        EmosaeError: if a file is missing or altered, or a dictionary is missing or another one.
    """
    from safetensors.torch import load_file

    if fault := check_manifest(folder):
        raise EmosaeError(f"the steering in {folder} cannot be read: {fault}; make it again")
    facts, tensors = read_json(folder / "steering.json"), load_file(folder / "steering.safetensors")
    basis, gains = {}, {}
    for key, bank in facts["banks"].items():
        layer, writes_KD = int(key), tensors.get(f"{key}.writes")
        if bank["read"] == "feature":
            here = dictionaries.get(layer)
            if here is None or _dictionary_sum(here) != bank["sha256"]:
                what = "there is none" if here is None else f"{here.origin} is another one"
                raise EmosaeError(f"the steering in {folder} needs {bank['origin']} for layer {layer} and {what}")
            writes_KD = here.sae.W_dec.detach().float() if writes_KD is None else writes_KD
        assert writes_KD is not None
        from_K = tensors.get(f"{key}.writes_from")
        reads_KD, centre_D = tensors.get(f"{key}.reads"), tensors.get(f"{key}.centre")
        # Without its origin a shuffled basis would be written as a plain one the next time.
        writes_from_K = None if from_K is None else from_K.numpy()
        basis[layer] = Bank(layer, bank["read"], writes_KD, reads_KD, centre_D, writes_from_K)
        gains[layer] = tensors[f"{key}.gains"].numpy().astype(float)
    return Steering(facts["model"], basis, gains, tuple(facts["labels"]), facts["provenance"])


# The nearest alternative that changes weights.


@dataclass(frozen=True)
class LowRank:
    """A low-rank change of what one attention output matrix writes at the read-out: z W + (z A) B.

    LoRA (Hu et al. 2021, "LoRA: low-rank adaptation of large language models") of rank one, of one matrix, is the
    smallest there is; the other methods get as many free numbers.
    """

    layer: int
    a_ZR: torch.Tensor
    b_RD: torch.Tensor

    @property
    def n_parameters(self) -> int:
        """Numbers learnt."""
        return self.a_ZR.numel() + self.b_RD.numel()


def low_rank_size(lm: LM) -> int:
    """Parameters of LoRA of rank one on one attention output matrix."""
    return sum(decoder_layers(lm.hf)[0].self_attn.o_proj.weight.shape)


def _low_rank_scores(ready: Prepared, change: LowRank, cleans: Sequence[_Clean]) -> torch.Tensor:
    """Label scores [P, E] with the change at the read-out; gradients pass through."""
    tracer = ready.tracer
    matrix = decoder_layers(tracer.lm.hf)[change.layer].self_attn.o_proj

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        moved = output.clone()
        moved += (inputs[0] @ change.a_ZR) @ change.b_RD
        return moved

    handle = matrix.register_forward_hook(hook)
    try:
        with _shared_prefix_mode(tracer.lm):
            rows_PSD = torch.stack([clean.after(change.layer - 1) for clean in cleans])
            for layer in range(change.layer, tracer.lm.n_layers):
                rows_PSD = tracer.block(layer, rows_PSD, *cleans)
    finally:
        handle.remove()
    return tracer.label_scores(rows_PSD)


def low_rank_scores(ready: Prepared, change: LowRank) -> Array:
    """Label scores of prompts under a low-rank change at the read-out, [P, E], nats."""
    with torch.no_grad():
        parts = [_low_rank_scores(ready, change, cleans) for cleans in _batches(ready.clean, 1)]
    scores_PE: Array = torch.cat(parts).cpu().numpy()
    return scores_PE


def fit_low_rank(
    ready: Prepared,
    free: Prepared,
    target_XE: Array,
    layer: int,
    *,
    steps: int = 30,
    rate: float = 0.01,
    decay: float = 0.01,
    seed: int = 0,
) -> LowRank:
    """Learn a rank-one change with Adam from what examples, then content-free prompts, should say (see `targets`).

    A is drawn at random with columns of length one, relative to the size of what it reads; B starts at zero.
    """
    lm = ready.tracer.lm
    matrix = decoder_layers(lm.hf)[layer].self_attn.o_proj
    d_out, d_in = matrix.weight.shape
    a_Z1 = (torch.randn((d_in, 1), generator=torch.Generator().manual_seed(seed)) / np.sqrt(d_in)).to(lm.device)
    # The stream's own length sets the scale of a step, so that one rate serves every model.
    scale = float(torch.stack([clean.after(layer)[0].norm() for clean in ready.clean]).mean()) / np.sqrt(d_out)
    a_Z1.requires_grad_()
    b_1D = torch.zeros((1, d_out), device=lm.device, requires_grad=True)
    goal_XE, n = torch.from_numpy(target_XE).to(lm.device), len(ready)
    optimiser = torch.optim.AdamW([a_Z1, b_1D], lr=rate, weight_decay=decay)
    with torch.enable_grad():
        for _ in range(steps):
            change, loss = LowRank(layer, a_Z1, scale * b_1D), torch.zeros((), dtype=torch.float64, device=lm.device)
            for one, goal in ((ready, goal_XE[:n]), (free, goal_XE[n:])):
                scores_PE = torch.cat([_low_rank_scores(one, change, cleans) for cleans in _batches(one.clean, 1)])
                loss = loss - (goal * torch.log_softmax(scores_PE, dim=1)).sum()
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
    return LowRank(layer, a_Z1.detach(), (scale * b_1D).detach())
