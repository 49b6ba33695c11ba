"""Whether causal feature steering repairs the emotions a model misses, beside everything else that might.

All methods see the same examples: k per emotion, drawn from the discovery split, several times. Whatever is chosen
(units, penalty, gains, layer of a probe) is chosen on them. Everything reported is measured on the test split. Neutral
texts without labels say what steering must leave alone.

Steering acts at the read-out position when labels are scored, and at every position when its side effects on running
text are measured, which is the harder case for it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from emosae_utils import scoring, stats, steering
from emosae_utils.data import EMOTIONS, load_corpus, which_are_here
from emosae_utils.difficulty import gold_indices
from emosae_utils.features import folder_of
from emosae_utils.files import EmosaeError, write_json, write_table
from emosae_utils.flow import recentred
from emosae_utils.ledger import Claim, Verdict, save_claims
from emosae_utils.models import LM, load_model
from emosae_utils.saes import Dictionary, available_layers, load_dictionaries
from emosae_utils.steering import Fit, Prepared, Steering, Tangent, Units

Array = np.ndarray[Any, np.dtype[Any]]

RAW, CALIBRATED, FEW_SHOT, PROBE, LORA = "none", "prior calibration", "few-shot prompt", "linear probe", "LoRA"
GAIN, ADDITIVE, MEANS, RANDOM = "feature gains", "feature vector", "difference of means", "random directions"
TARGETED = "targeted gains"
# Methods that are steerings, with what their units are.
LEARNT = (GAIN, ADDITIVE, MEANS, RANDOM)
METHODS = (RAW, CALIBRATED, FEW_SHOT, PROBE, LORA, MEANS, RANDOM, ADDITIVE, GAIN)
# Used where one example per emotion leaves nothing to choose a probe's layer by: two thirds up.
PROBE_DEPTH = 2 / 3
PROBE_PENALTIES = (0.001, 0.01, 0.1)


@dataclass(frozen=True)
class Settings:
    """How steering is learnt and measured. One seed draws rows, examples and bootstrap samples alike.

    Attributes:
        examples: numbers of labelled examples per emotion.
        draws: how often examples are drawn.
        main_examples: the number that claims are about.
        baseline_examples: the numbers that the dearer baselines are learnt from; `main_examples` if empty.
        rows_per_emotion: test texts.
        template: the wording.
        n_units: units turned up or down; as many as rank-one LoRA has parameters if 0.
        n_targeted: units of targeted steering.
        penalties: ridge weights tried.
        penalty: where one example per emotion leaves nothing to choose by.
        free_weight: of content-free prompts beside the examples.
        neutral_weight: of the predicted KL on neutral text.
        steps: tangents.
        neutral_texts: for that prediction.
        strengths: at which the trade-off is shown; 1 is what was learnt.
        unit_counts: numbers of units at which the effect is shown.
        few_shot_examples: numbers of examples that a prompt can hold.
        few_shot_draws: of these.
        few_shot_rows_per_emotion: test texts asked with examples.
        sequences: of running text.
        sequence_tokens: their length.
        every: of their positions, how many are passed over plus one.
        bootstraps: draws of groups and example draws for intervals.
        seed: of everything drawn.
    """

    examples: Sequence[int] = (1, 5, 20)
    draws: int = 5
    main_examples: int = 5
    baseline_examples: Sequence[int] = ()
    rows_per_emotion: int = 48
    template: str = scoring.DEFAULT_TEMPLATE
    n_units: int = 0
    n_targeted: int = 200
    penalties: Sequence[float] = (0.03, 0.1)
    penalty: float = 0.1
    free_weight: float = 0.5
    neutral_weight: float = 100.0
    steps: int = 3
    neutral_texts: int = 144
    strengths: Sequence[float] = (0.5, 1.0, 1.5, 2.0)
    unit_counts: Sequence[int] = (20, 100, 500)
    few_shot_examples: Sequence[int] = (1, 5)
    few_shot_draws: int = 2
    few_shot_rows_per_emotion: int = 12
    sequences: int = 24
    sequence_tokens: int = 128
    every: int = 2
    bootstraps: int = 1000
    seed: int = 0


# Rows and examples.


@dataclass(frozen=True)
class Rows:
    """A dataset for steering: where examples come from, what is measured, and nothing on both sides."""

    dataset: str
    labels: tuple[str, ...]
    pool: pd.DataFrame
    validation: pd.DataFrame
    test: pd.DataFrame


def choose_rows(frame: pd.DataFrame, settings: Settings) -> Rows:
    """Equally many test texts of each emotion, validation texts, and the pool that example draws come from.

    Raises:
        EmosaeError: if a split lacks an emotion, the pool has too few texts of one, or the number of examples that
            claims are about is not among those asked for.
    """
    if settings.main_examples not in settings.examples:
        asked = ", ".join(map(str, settings.examples))
        raise EmosaeError(f"main_examples is {settings.main_examples}, which is not in examples ({asked})")
    frame = frame[frame["emotion"].isin(EMOTIONS)]
    name = str(frame["dataset"].iloc[0]) if len(frame) else "the data"
    labels = tuple(e for e in EMOTIONS if (frame["emotion"] == e).any())
    by_split = {}
    for split in ("discovery", "validation", "test"):
        here = frame[frame["split"] == split]
        if len(labels) < 2 or set(here["emotion"]) != set(labels):
            raise EmosaeError(f"{name} lacks {split} texts of some emotion, so steering cannot be measured on it")
        cap = settings.rows_per_emotion if split != "discovery" else len(here)
        shuffled = here.sample(frac=1.0, random_state=settings.seed)
        n = min(cap, int(shuffled["emotion"].value_counts().min())) if split == "test" else cap
        by_split[split] = shuffled.groupby("emotion").head(n).sort_index().reset_index(drop=True)
    fewest = int(by_split["discovery"]["emotion"].value_counts().min())
    if fewest < max(settings.examples):
        wanted = max(settings.examples)
        raise EmosaeError(f"{name} has {fewest} discovery texts of an emotion and {wanted} examples were asked for")
    return Rows(name, labels, by_split["discovery"], by_split["validation"], by_split["test"])


def example_draws(rows: Rows, settings: Settings) -> dict[tuple[int, int], Array]:
    """Rows of the pool shown in each draw, by (examples per emotion, draw); fewer examples are a part of more."""
    found = {}
    y_P = gold_indices(rows.pool, rows.labels)
    for draw in range(settings.draws):
        rng = np.random.default_rng([settings.seed, draw])
        order = [rng.permutation(np.flatnonzero(y_P == k)) for k in range(len(rows.labels))]
        for n in settings.examples:
            found[n, draw] = np.sort(np.concatenate([own[:n] for own in order]))
    return found


# One model.


@dataclass(frozen=True)
class Bench:
    """A model set up for one dataset: everything its methods share.

    `pool` holds only the texts that some draw shows; `at_P` is their place in `rows.pool`.
    """

    lm: LM
    rows: Rows
    dictionaries: Mapping[int, Dictionary]
    draws: Mapping[tuple[int, int], Array]
    at_P: Array
    pool: Prepared
    free: Prepared
    test: Prepared
    prior_E: Array
    test_scores_PE: Array

    def examples(self, n: int, draw: int) -> tuple[Array, Array]:
        """Places in `pool` and label indices of a draw's examples."""
        shown = self.draws[n, draw]
        return np.searchsorted(self.at_P, shown), gold_indices(self.rows.pool.iloc[shown], self.rows.labels)


def _part(ready: Prepared, rows_P: Array) -> Prepared:
    return replace(ready, clean=tuple(ready.clean[p] for p in rows_P))


def _clean_scores(ready: Prepared) -> Array:
    """Scores without steering, less their mean over labels, [P, E]."""
    tracer = ready.tracer
    last = tracer.lm.n_layers - 1
    scores = [tracer.label_scores(clean.after(last)[None])[0].detach().cpu().numpy() for clean in ready.clean]
    return np.array(scores)


def _streams(ready: Prepared, layers: Sequence[int]) -> Array:
    """Residuals at the read-out, [P, L, D]."""
    return np.stack([clean.stream_LSD[[x + 1 for x in layers], 0].cpu().numpy() for clean in ready.clean])


def set_up(lm: LM, rows: Rows, dictionaries: Mapping[int, Dictionary], settings: Settings) -> Bench:
    """Read every prompt that the methods will need, once."""
    draws = example_draws(rows, settings)
    at_P = np.unique(np.concatenate(list(draws.values())))
    wording: dict[str, Any] = {"template": settings.template, "labels": rows.labels}
    texts = {
        "examples": rows.pool.iloc[at_P].reset_index(drop=True),
        "content-free": pd.DataFrame({"text": list(scoring.CONTENT_FREE)}),
        "test texts": rows.test,
    }
    pool, free, test = (
        steering.prepare(lm, scoring.build_prompts(lm, frame, **wording), progress=f"{lm.name}: {rows.dataset}, {what}")
        for what, frame in texts.items()
    )
    prior_E = _clean_scores(free).mean(axis=0)
    return Bench(lm, rows, dictionaries, draws, at_P, pool, free, test, prior_E, _clean_scores(test))


@dataclass(frozen=True)
class Learner:
    """A kind of units with the tangents of pool and content-free prompts at gain one.

    `rows_P` are the places of the pool that the tangent covers, ascending; all if None.
    """

    basis: steering.Basis
    units: Units
    pool: Tangent
    free: Tangent
    neutral_MU: Array
    rows_P: Array | None = None

    def first(self, at_P: Array) -> Tangent:
        """The tangent of some prompts of the pool."""
        here_P = at_P if self.rows_P is None else np.searchsorted(self.rows_P, at_P)
        return Tangent(self.pool.scores_PE[here_P], self.pool.slopes_PEU[here_P], self.pool.theta_U)


def _learner(bench: Bench, basis: steering.Basis, units: Units, neutral_MU: Array | None, what: str) -> Learner:
    caption = f"{bench.lm.name}: {bench.rows.dataset}, {what}"
    pool = steering.tangent(bench.pool, basis, units, bench.dictionaries, progress=caption)
    free = steering.tangent(bench.free, basis, units, bench.dictionaries)
    return Learner(basis, units, pool, free, np.zeros((0, len(units))) if neutral_MU is None else neutral_MU)


def active_units(dictionaries: Mapping[int, Dictionary], ready: Prepared) -> tuple[Units, dict[int, Array]]:
    """Features active on at least one prompt, and their mean activation over the mean length of the stream, by layer.

    A feature that is silent on every prompt has no slope, so its gain cannot be learnt.
    """
    layers = sorted(dictionaries)
    resid_PLD = _streams(ready, layers)
    at_layers, at_units, sizes = [], [], {}
    for i, layer in enumerate(layers):
        codes_PF = dictionaries[layer].encode(_tensor(resid_PLD[:, i])).cpu().numpy()
        active = np.flatnonzero((codes_PF > 0).any(axis=0))
        at_layers.append(np.full(len(active), layer))
        at_units.append(active)
        when_on_F = codes_PF.sum(axis=0) / np.maximum((codes_PF > 0).sum(axis=0), 1)
        sizes[layer] = when_on_F / np.linalg.norm(resid_PLD[:, i], axis=1).mean()
    return Units(np.concatenate(at_layers), np.concatenate(at_units)), sizes


def _tensor(x_PD: Array) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(x_PD))


def neutral_ids(lm: LM, settings: Settings) -> list[list[int]]:
    """Plain texts as token sequences, without question or label: how the model reads on is to stay as it is.

    The neutral texts of EmoScenes' discovery split, then others of it.
    """
    frame = load_corpus("emoscenes", emotions=None).frame
    frame = frame[frame["split"] == "discovery"].sample(frac=1.0, random_state=settings.seed)
    first = frame.sort_values("emotion", key=lambda x: x != "neutral", kind="stable")
    return [_with_start(lm, text) for text in first["text"].head(settings.neutral_texts)]


def _with_start(lm: LM, text: str) -> list[int]:
    ids, bos = list(lm.tokenizer(text)["input_ids"]), lm.tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def bases(dictionaries: Mapping[int, Dictionary], settings: Settings) -> dict[str, steering.Basis]:
    """What the units of the methods that learn gains on features read and write.

    Additive vectors still have length one here; see `learners`.
    """
    own = steering.feature_basis(dictionaries)
    everything = {x: np.arange(d.n_features) for x, d in dictionaries.items()}
    return {
        GAIN: own,
        RANDOM: steering.shuffled_basis(dictionaries, everything, settings.seed),
        ADDITIVE: {x: steering.Bank(x, "norm", bank.writes_KD) for x, bank in own.items()},
    }


def neutral_rows(
    lm: LM,
    dictionaries: Mapping[int, Dictionary],
    settings: Settings,
    methods: Sequence[str] = (GAIN, RANDOM, ADDITIVE),
) -> dict[str, Array]:
    """`steering.neutral_slopes` by method, in the order of `steering.all_units`; no rows without a weight."""
    wanted = {method: basis for method, basis in bases(dictionaries, settings).items() if method in methods}
    if not settings.neutral_weight:
        return {method: np.zeros((0, len(steering.all_units(basis)))) for method, basis in wanted.items()}
    ids, caption = neutral_ids(lm, settings), f"{lm.name}: neutral text"
    return steering.neutral_slopes(lm, ids, wanted, dictionaries, samples=1, seed=settings.seed, progress=caption)


def _places(units: Units, basis: steering.Basis) -> Array:
    """Where units stand among all units of a basis."""
    layers = sorted(basis)
    starts = np.cumsum([0, *(len(basis[x]) for x in layers)])
    places_U: Array = starts[np.searchsorted(layers, units.layer_U)] + units.unit_U
    return places_U


def gain_learner(bench: Bench, neutral: Mapping[str, Array]) -> Learner:
    """The gains of all features that are active on the pool; `neutral` is from `neutral_rows`."""
    units, _ = active_units(bench.dictionaries, bench.pool)
    basis = steering.feature_basis(bench.dictionaries)
    return _learner(bench, basis, units, neutral[GAIN][:, _places(units, basis)], GAIN)


def learners(bench: Bench, settings: Settings, neutral: Mapping[str, Array]) -> dict[str, Learner]:
    """The units of every method that learns gains on features; `neutral` is from `neutral_rows`.

    All of them have the active features as units and are held to leave plain text alone alike.
    """
    units, sizes = active_units(bench.dictionaries, bench.pool)
    found = {GAIN: gain_learner(bench, neutral)}
    for method, basis in bases(bench.dictionaries, settings).items():
        if method == GAIN:
            continue
        rows_MU = neutral[method][:, _places(units, basis)]
        if method == ADDITIVE:
            # A fixed vector of each feature, as long as the feature's own contribution where it is active.
            scaled = {x: _tensor(sizes[x].astype(np.float32))[:, None].to(b.writes_KD) for x, b in basis.items()}
            basis = {x: replace(bank, writes_KD=bank.writes_KD * scaled[x]) for x, bank in basis.items()}
            rows_MU = rows_MU * np.array([sizes[x][u] for x, u in zip(units.layer_U, units.unit_U, strict=True)])
        found[method] = _learner(bench, basis, units, rows_MU, method)
    return found


def fit_of(bench: Bench, settings: Settings, n_units: int = 0) -> Fit:
    """The settings of a fit, with as many units as rank-one LoRA has parameters unless told otherwise."""
    return Fit(
        n_units or settings.n_units or steering.low_rank_size(bench.lm),
        tuple(settings.penalties),
        settings.penalty,
        settings.free_weight,
        settings.neutral_weight,
        settings.steps,
    )


def fit_draw(
    bench: Bench,
    learner: Learner,
    n: int,
    draw: int,
    settings: Settings,
    *,
    n_units: int = 0,
    target_XE: Array | None = None,
    shift_E: Array | float = 0.0,
    method: str = GAIN,
) -> Steering:
    """Learn gains from one draw of examples; by default they should name every example's emotion."""
    at_P, y_P = bench.examples(n, draw)
    if target_XE is None:
        target_XE = steering.targets(y_P, len(bench.rows.labels), len(bench.free), settings.free_weight)
    gains, chosen = steering.fit_gains(
        _part(bench.pool, at_P),
        bench.free,
        target_XE,
        learner.basis,
        learner.units,
        bench.dictionaries,
        fit_of(bench, settings, n_units),
        shift_E=shift_E,
        first=learner.first(at_P),
        first_free=learner.free,
        neutral_MU=learner.neutral_MU,
        seed=settings.seed,
    )
    shown = bench.rows.pool["row_id"].iloc[bench.draws[n, draw]].tolist()
    facts = {"method": method, "dataset": bench.rows.dataset, "template": settings.template, "examples": shown}
    facts |= {"examples_per_emotion": n, "draw": draw, "seed": settings.seed, "fit": chosen}
    return Steering(bench.lm.name, learner.basis, gains, bench.rows.labels, facts)


def _means_learner(bench: Bench, n: int, draw: int) -> Learner:
    """Differences of class means among the examples themselves, at every layer."""
    at_P, y_P = bench.examples(n, draw)
    layers = list(range(bench.lm.n_layers))
    resid_PLD = _streams(_part(bench.pool, at_P), layers)
    basis = steering.mean_difference_basis(resid_PLD, y_P, len(bench.rows.labels), layers)
    units = steering.all_units(basis)
    pool = steering.tangent(_part(bench.pool, at_P), basis, units, {})
    free = steering.tangent(bench.free, basis, units, {})
    return Learner(basis, units, pool, free, np.zeros((0, len(units))), at_P)


def _keep_others(bench: Bench, n: int, draw: int, emotion: str, prior_E: Array | float, settings: Settings) -> Array:
    """Targets of targeted steering: examples of one emotion get its label, all else what the model says already."""
    at_P, y_P = bench.examples(n, draw)
    k = bench.rows.labels.index(emotion)
    scores_PE = _clean_scores(_part(bench.pool, at_P)) - prior_E
    free_PE = _clean_scores(bench.free) - prior_E
    keep_XE = _softmax(np.concatenate([scores_PE, free_PE]))
    keep_XE[: len(at_P)][y_P == k] = np.eye(len(bench.rows.labels))[k]
    # Every example counts alike. With half of the weight on the emotion its recall rose further on validation texts,
    # at the cost of the others.
    weights = np.full(len(at_P), 1 / len(at_P))
    free_weights = np.full(len(free_PE), settings.free_weight / len(free_PE))
    target_XE: Array = keep_XE * np.concatenate([weights, free_weights])[:, None]
    return target_XE


def _softmax(scores_PE: Array) -> Array:
    p_PE = np.exp(scores_PE - scores_PE.max(axis=1, keepdims=True))
    share: Array = p_PE / p_PE.sum(axis=1, keepdims=True)
    return share


def weakest(bench: Bench, prior_E: Array | float, settings: Settings) -> str:
    """The emotion with the lowest recall on the validation split; ties go to the first."""
    rows, labels = bench.rows.validation, bench.rows.labels
    prompts = scoring.build_prompts(bench.lm, rows, template=settings.template, labels=labels)
    scores_PE = scoring.read_out(bench.lm, prompts, mode="first").scores_PE
    pred_P, y_P = (scores_PE - prior_E).argmax(axis=1), gold_indices(rows, labels)
    return min(labels, key=lambda e: float((pred_P[y_P == labels.index(e)] == labels.index(e)).mean()))


# Predictions.


def answers(
    rows: pd.DataFrame,
    labels: Sequence[str],
    scores_PE: Array,
    method: str,
    *,
    examples: int = 0,
    draw: int = 0,
    calibrated: bool = False,
    **more: Any,
) -> pd.DataFrame:
    """One line per text: gold, pred and the probability the method gives its own answer."""
    p_PE = _softmax(scores_PE)
    table = rows[["row_id", "group"]].assign(
        gold=rows["emotion"], pred=[labels[i] for i in scores_PE.argmax(axis=1)], confidence=p_PE.max(axis=1)
    )
    facts: dict[str, Any] = {"method": method, "examples": examples, "draw": draw, "calibrated": calibrated}
    return table.assign(**(facts | {"strength": 1.0, "units": 0, "target": ""} | more))


def _probe_scores(bench: Bench, n: int, draw: int, settings: Settings) -> Array:
    """Log probabilities of a linear probe fitted to the examples, [P, E].

    Layer and penalty are chosen by cross-validation inside the examples. The scaler may see all texts of the pool,
    without their labels.
    """
    at_P, y_P = bench.examples(n, draw)
    layers = list(range(bench.lm.n_layers))
    pool_PLD, test_PLD = _streams(bench.pool, layers), _streams(bench.test, layers)
    fewest = int(np.bincount(y_P).min())
    choices = [(round(PROBE_DEPTH * (len(layers) - 1)), PROBE_PENALTIES[1])]
    with threadpool_limits(1):
        if fewest >= 2:
            folds = list(StratifiedKFold(min(4, fewest), shuffle=True, random_state=settings.seed).split(y_P, y_P))
            tried = [(layer, c) for layer in layers[2::2] for c in PROBE_PENALTIES]
            losses = []
            for layer, c in tried:
                x_PD = StandardScaler().fit(pool_PLD[:, layer]).transform(pool_PLD[at_P, layer])
                total = 0.0
                for train, held in folds:
                    logp = (
                        LogisticRegression(C=c, max_iter=100).fit(x_PD[train], y_P[train]).predict_log_proba(x_PD[held])
                    )
                    total -= float(logp[np.arange(len(held)), y_P[held]].sum())
                losses.append(total)
            choices = [tried[int(np.argmin(losses))]]
        layer, c = choices[0]
        scaler = StandardScaler().fit(pool_PLD[:, layer])
        model = LogisticRegression(C=c, max_iter=200).fit(scaler.transform(pool_PLD[at_P, layer]), y_P)
        scores_PE: Array = model.predict_log_proba(scaler.transform(test_PLD[:, layer]))
    return scores_PE


def _low_rank(bench: Bench, n: int, draw: int, settings: Settings) -> tuple[Array, Array]:
    """Scores of test and content-free prompts under LoRA of rank one at the read-out."""
    at_P, y_P = bench.examples(n, draw)
    target_XE = steering.targets(y_P, len(bench.rows.labels), len(bench.free), settings.free_weight)
    layer = round(PROBE_DEPTH * (bench.lm.n_layers - 1))
    change = steering.fit_low_rank(_part(bench.pool, at_P), bench.free, target_XE, layer, seed=settings.seed + draw)
    return steering.low_rank_scores(bench.test, change), steering.low_rank_scores(bench.free, change)


def _few_shot(bench: Bench, settings: Settings) -> Iterator[pd.DataFrame]:
    """The examples in the prompt, on a part of the test texts: long prompts are dear."""
    labels = bench.rows.labels
    # A random part, so that it spreads over topics or writers as the whole does.
    mixed = bench.rows.test.sample(frac=1.0, random_state=settings.seed)
    asked = mixed.groupby("emotion").head(settings.few_shot_rows_per_emotion).sort_index().reset_index(drop=True)
    for n in settings.few_shot_examples:
        for draw in range(settings.few_shot_draws if (n, 0) in bench.draws else 0):
            shown = bench.rows.pool.iloc[bench.draws[n, draw]].sample(frac=1.0, random_state=settings.seed + draw)
            wording: dict[str, Any] = {"template": settings.template, "labels": labels, "exemplars": shown}
            prompts = scoring.build_prompts(bench.lm, asked, **wording)
            caption = f"{bench.lm.name}: {bench.rows.dataset}, {n} examples in the prompt"
            scores_PE = scoring.read_out(bench.lm, prompts, mode="first", progress=caption).scores_PE
            prior_E = scoring.label_prior(bench.lm, **wording)
            for calibrated, shift_E in ((False, 0.0), (True, prior_E)):
                yield answers(
                    asked, labels, scores_PE - shift_E, FEW_SHOT, examples=n, draw=draw, calibrated=calibrated
                )


@dataclass(frozen=True)
class Measured:
    """What one model did on one dataset.

    Attributes:
        predictions: one row per text and method; see `answers`.
        steerings: what was learnt, by (method, examples per emotion, draw).
        targets: the weakest emotion without and with calibration.
        fits: one row per steering: units, penalty, largest gain, loss before and after.
    """

    rows: Rows
    predictions: pd.DataFrame
    steerings: Mapping[tuple[str, int, int], Steering]
    targets: Mapping[str, str]
    fits: pd.DataFrame


def measure(
    lm: LM, rows: Rows, dictionaries: Mapping[int, Dictionary], neutral: Mapping[str, Array], settings: Settings
) -> Measured:
    """Learn every steering and every baseline on every draw, and ask them all about the test texts."""
    bench = set_up(lm, rows, dictionaries, settings)
    labels, learnt = rows.labels, learners(bench, settings, neutral)
    made: dict[tuple[str, int, int], Steering] = {}
    for_baselines = settings.baseline_examples or (settings.main_examples,)
    caption = f"{lm.name}: {rows.dataset}, learning gains"
    for n, draw in tqdm(bench.draws, desc=caption, disable=scoring._quiet(caption)):
        for method in LEARNT if n in for_baselines else (GAIN,):
            learner = _means_learner(bench, n, draw) if method == MEANS else learnt[method]
            made[method, n, draw] = fit_draw(bench, learner, n, draw, settings, method=method)
    main, everyone = settings.main_examples, range(settings.draws)
    asked: list[tuple[dict[str, Any], Steering]] = [
        ({"method": method, "examples": n, "draw": draw}, s) for (method, n, draw), s in made.items()
    ]
    for draw in everyone:
        own = made[GAIN, main, draw]
        key: dict[str, Any] = {"method": GAIN, "examples": main, "draw": draw}
        asked += [(key | {"strength": x}, own.at(x)) for x in settings.strengths if x != 1.0]
        for n_units in settings.unit_counts:
            fewer = fit_draw(bench, learnt[GAIN], main, draw, settings, n_units=n_units)
            asked.append((key | {"units": n_units}, fewer))
    found_targets = {}
    for name, prior_E in ((RAW, 0.0), (CALIBRATED, bench.prior_E)):
        emotion = weakest(bench, prior_E, settings)
        found_targets[name] = emotion
        for draw in everyone:
            goal_XE = _keep_others(bench, main, draw, emotion, prior_E, settings)
            one = fit_draw(
                bench,
                learnt[GAIN],
                main,
                draw,
                settings,
                n_units=settings.n_targeted,
                target_XE=goal_XE,
                shift_E=prior_E,
                method=TARGETED,
            )
            made[f"{TARGETED}, {name}", main, draw] = one
            asked.append(({"method": TARGETED, "examples": main, "draw": draw, "target": emotion, "on": name}, one))
    tables = _ask(bench, asked)
    tables += [
        answers(rows.test, labels, bench.test_scores_PE, RAW),
        answers(rows.test, labels, bench.test_scores_PE - bench.prior_E, CALIBRATED, calibrated=True),
        *_few_shot(bench, settings),
    ]
    for n, draw in tqdm(bench.draws, desc=f"{lm.name}: baselines", disable=scoring._quiet("x")):
        tables.append(answers(rows.test, labels, _probe_scores(bench, n, draw, settings), PROBE, examples=n, draw=draw))
        if n not in for_baselines:
            continue
        test_PE, free_PE = _low_rank(bench, n, draw, settings)
        for calibrated, shift_E in ((False, 0.0), (True, free_PE.mean(axis=0))):
            said = answers(rows.test, labels, test_PE - shift_E, LORA, examples=n, draw=draw, calibrated=calibrated)
            tables.append(said)
    predictions = pd.concat(tables, ignore_index=True).assign(model=lm.name, dataset=rows.dataset)
    return Measured(
        rows, predictions, made, found_targets, _fits_table(made).assign(model=lm.name, dataset=rows.dataset)
    )


def _ask(bench: Bench, asked: Sequence[tuple[dict[str, Any], Steering]]) -> list[pd.DataFrame]:
    """Predictions of every steering on the test texts, raw and less its own label prior."""
    steerings = [s for _, s in asked]
    caption = f"{bench.lm.name}: {bench.rows.dataset}, steered test texts"
    test_RPE = steering.steered_scores(bench.lm, bench.test, steerings, bench.dictionaries, progress=caption)
    free_RPE = steering.steered_scores(bench.lm, bench.free, steerings, bench.dictionaries)
    tables = []
    for (key, _), test_PE, free_PE in zip(asked, test_RPE, free_RPE, strict=True):
        facts = dict(key)
        # Targeted steering keeps the calibration it was made for; all others are calibrated as they are steered.
        on = facts.pop("on", None)
        wanted = {RAW: [False], CALIBRATED: [True], None: [False, True]}[on]
        for calibrated in wanted:
            prior_E = (bench.prior_E if on else free_PE.mean(axis=0)) if calibrated else 0.0
            tables.append(
                answers(bench.rows.test, bench.rows.labels, test_PE - prior_E, **facts, calibrated=calibrated)
            )
    return tables


def _fits_table(made: Mapping[tuple[str, int, int], Steering]) -> pd.DataFrame:
    records = []
    for (method, n, draw), one in made.items():
        fit = one.provenance["fit"]
        largest = max(float(np.abs(np.asarray(g_K) - 1).max()) for g_K in one.gains.values())
        key = {"method": method, "examples": n, "draw": draw, "units": one.n_units, "penalty": fit["penalty"]}
        records.append(key | {"largest": largest, "loss": fit["path"][-1]["loss"], "steps": len(fit["path"])})
    return pd.DataFrame(records)


# Tables.

KEYS = ("method", "examples", "calibrated", "strength", "units", "target")
BINS = 10


@dataclass(frozen=True)
class _Tally:
    """Predictions of one method as counts by draw of examples and group.

    Attributes:
        counts_DGKK: confusion counts.
        bins_DGB3: by bin of confidence: texts, right answers, sum of confidence.
    """

    counts_DGKK: Array
    bins_DGB3: Array


def _tally(said: pd.DataFrame, labels: Sequence[str], groups: Sequence[str]) -> _Tally:
    place = {g: i for i, g in enumerate(groups)}
    draws = sorted(said["draw"].unique())
    counts = np.zeros((len(draws), len(groups), len(labels), len(labels)))
    bins = np.zeros((len(draws), len(groups), BINS, 3))
    for d, draw in enumerate(draws):
        here = said[said["draw"] == draw]
        group_P = here["group"].map(place).to_numpy()
        gold_P, pred_P = (here[c].map({e: i for i, e in enumerate(labels)}).to_numpy() for c in ("gold", "pred"))
        np.add.at(counts[d], (group_P, gold_P, pred_P), 1.0)
        confidence_P = here["confidence"].to_numpy()
        bin_P = np.minimum((confidence_P * BINS).astype(int), BINS - 1)
        seen_P3 = np.stack([np.ones(len(here)), (gold_P == pred_P).astype(float), confidence_P], axis=1)
        np.add.at(bins[d], (group_P, bin_P), seen_P3)
    return _Tally(counts, bins)


def calibration_error(bins_XB3: Array) -> Array:
    """Expected calibration error [...]: mean distance of confidence from accuracy, over bins weighted by their texts.

    Guo et al. 2017, "On calibration of modern neural networks".
    """
    n_XB = bins_XB3[..., 0]
    gaps_XB = np.abs(bins_XB3[..., 1] - bins_XB3[..., 2])
    error: Array = gaps_XB.sum(axis=-1) / np.maximum(n_XB.sum(axis=-1), 1e-12)
    return error


@dataclass(frozen=True)
class _Draws:
    """Bootstrap samples shared by all methods of a dataset: weights of groups, and which example draws count."""

    weights_RG: Array
    at_RD: Mapping[int, Array]


def _resampled(n_groups: int, sizes: Sequence[int], settings: Settings) -> _Draws:
    """The first sample is the data itself."""
    weights_RG = np.concatenate(
        [np.ones((1, n_groups)), stats.bootstrap_weights(n_groups, settings.bootstraps, settings.seed)]
    )
    at_RD = {}
    for n in set(sizes):
        rng = np.random.default_rng([settings.seed, n])
        at_RD[n] = np.concatenate([np.arange(n)[None], rng.integers(0, n, size=(settings.bootstraps, n))])
    return _Draws(weights_RG, at_RD)


def _samples(values_DR: Array, draws: _Draws) -> Array:
    """Means over example draws in every bootstrap sample, [R]; or [R, K] of values [D, R, K]."""
    at_RD = draws.at_RD[len(values_DR)]
    rows_R1 = np.arange(len(at_RD))[:, None]
    means: Array = values_DR[at_RD, rows_R1].mean(axis=1)
    return means


def _metric_samples(tally: _Tally, draws: _Draws) -> dict[str, Array]:
    """Every metric in every bootstrap sample, [R] or [R, K]; the first sample is the data."""
    counts_DRKK = np.einsum("rg,dgkl->drkl", draws.weights_RG, tally.counts_DGKK)
    bins_DRB3 = np.einsum("rg,dgbx->drbx", draws.weights_RG, tally.bins_DGB3)
    found = {
        "macro_f1": stats.macro_f1(counts_DRKK),
        "accuracy": stats.accuracy(counts_DRKK),
        "calibration_error": calibration_error(bins_DRB3),
        "recall": stats.recall(counts_DRKK),
        "f1": stats.f1(counts_DRKK),
    }
    return {name: _samples(values, draws) for name, values in found.items()}


def _interval(samples_R: Array, *, recentre: bool = False) -> dict[str, float]:
    """Value and interval. A resample inflates what grows with noise (a spread, a calibration error): recentre these."""
    drawn_R = recentred(samples_R[0], samples_R[1:]) if recentre else samples_R[1:]
    low, high = stats.interval(drawn_R)
    return {"value": float(samples_R[0]), "low": float(low), "high": float(high)}


@dataclass(frozen=True)
class Pool:
    """All methods of one model and dataset in the same bootstrap samples."""

    labels: tuple[str, ...]
    said: Mapping[tuple[Any, ...], pd.DataFrame]
    samples: Mapping[tuple[Any, ...], Mapping[str, Array]]


def pool(predictions: pd.DataFrame, settings: Settings) -> Pool:
    """Bootstrap every method over groups and example draws; methods share the samples, so differences are paired."""
    labels = tuple(e for e in EMOTIONS if (predictions["gold"] == e).any())
    groups = sorted(predictions["group"].unique())
    said = {tuple(key): part for key, part in predictions.groupby(list(KEYS))}
    sizes = [part["draw"].nunique() for part in said.values()]
    draws = _resampled(len(groups), sizes, settings)
    return Pool(labels, said, {key: _metric_samples(_tally(part, labels, groups), draws) for key, part in said.items()})


def metrics_table(predictions: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Macro-F1, accuracy and calibration error of every method, and recall and F1 per emotion, with intervals.

    Columns: model, dataset, method, examples, calibrated, strength, units, target, metric, emotion ("all" for the first
    three), value, low, high, rows. Values are means over example draws; intervals are 95 % percentile bootstraps over
    groups and draws.
    """
    records = []
    for (model, dataset), here in predictions.groupby(["model", "dataset"]):
        pooled = pool(here, settings)
        for key, samples in pooled.samples.items():
            facts = {"model": model, "dataset": dataset} | dict(zip(KEYS, key, strict=True))
            facts |= {"rows": pooled.said[key]["row_id"].nunique()}
            for metric, samples_RX in samples.items():
                whole = samples_RX.ndim == 1
                for k, emotion in enumerate(("all",) if whole else pooled.labels):
                    own_R = samples_RX if whole else samples_RX[:, k]
                    own = _interval(own_R, recentre=metric == "calibration_error")
                    records.append(facts | {"metric": metric, "emotion": emotion} | own)
    return pd.DataFrame(records)


def _plain(key: tuple[Any, ...]) -> bool:
    """Whether a method is as it was learnt: full strength, all its units, no target."""
    return bool(key[3] == 1.0 and key[4] == 0 and key[5] == "")


def comparison_table(predictions: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Macro-F1 of every method less that of a reference, on the same texts, paired.

    References: no steering, prior calibration, and for feature gains the same number of gains on random directions.
    Columns: model, dataset, method, examples, calibrated, versus, value, low, high, p (exact McNemar, the median over
    example draws) and p_holm (over the methods compared with one reference).
    """
    records: list[dict[str, Any]] = []
    for (model, dataset), here in predictions.groupby(["model", "dataset"]):
        pooled = pool(here, settings)
        raw, calibrated = (next(k for k in pooled.said if k[0] == m) for m in (RAW, CALIBRATED))
        found: list[dict[str, Any]] = []
        for key, part in pooled.said.items():
            if not _plain(key) or key[0] in (RAW, CALIBRATED):
                continue
            rivals = {RAW: raw, CALIBRATED: calibrated}
            if key[0] == GAIN and (RANDOM, *key[1:]) in pooled.said:
                rivals[RANDOM] = (RANDOM, *key[1:])
            for versus, other in rivals.items():
                facts = {"model": model, "dataset": dataset} | dict(zip(KEYS[:3], key[:3], strict=True))
                found.append(facts | {"versus": versus} | _paired(pooled, key, other, part, settings))
        for versus in {r["versus"] for r in found}:
            own = [r for r in found if r["versus"] == versus]
            for record, p in zip(own, stats.holm([r["p"] for r in own]), strict=True):
                record["p_holm"] = p
        records += found
    return pd.DataFrame(records)


def _on_same_texts(pooled: Pool, key: tuple[Any, ...], other: tuple[Any, ...], settings: Settings) -> Pool:
    """The pool itself, or that of two methods alone where one was asked about a part of the other's texts."""
    part, rival = pooled.said[key], pooled.said[other]
    if len(set(part["row_id"])) == len(set(rival["row_id"])):
        return pooled
    return pool(pd.concat([part, rival[rival["row_id"].isin(part["row_id"])]]), settings)


def _paired(
    pooled: Pool, key: tuple[Any, ...], other: tuple[Any, ...], part: pd.DataFrame, settings: Settings
) -> dict[str, float]:
    """Difference of macro-F1 with its interval, and McNemar's p."""
    pooled = _on_same_texts(pooled, key, other, settings)
    rival = pooled.said[other]
    ours, theirs = pooled.samples[key]["macro_f1"], pooled.samples[other]["macro_f1"]
    p_values = []
    for draw in sorted(part["draw"].unique()):
        one = part[part["draw"] == draw].set_index("row_id")
        drawn = rival[rival["draw"] == (draw if len(set(rival["draw"])) > 1 else 0)].set_index("row_id").loc[one.index]
        right = (one["gold"] == one["pred"]).to_numpy(), (drawn["gold"] == drawn["pred"]).to_numpy()
        p_values.append(stats.mcnemar_p(*right))
    return _interval(ours - theirs) | {"p": float(np.median(p_values))}


def targeted_table(predictions: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """What targeted steering does to its emotion and to the others: change of recall, paired.

    Columns: model, dataset, calibrated, target, emotion (each, and "others": the mean over all but the target), value,
    low, high.
    """
    records = []
    for (model, dataset), here in predictions.groupby(["model", "dataset"]):
        pooled = pool(here, settings)
        for key, samples in pooled.samples.items():
            if key[0] != TARGETED:
                continue
            base = next(k for k in pooled.said if k[0] == (CALIBRATED if key[2] else RAW))
            change_RK = samples["recall"] - pooled.samples[base]["recall"]
            facts = {"model": model, "dataset": dataset, "calibrated": key[2], "target": key[5]}
            others = [k for k, e in enumerate(pooled.labels) if e != key[5]]
            for k, emotion in enumerate(pooled.labels):
                records.append(facts | {"emotion": emotion} | _interval(change_RK[:, k]))
            records.append(facts | {"emotion": "others"} | _interval(change_RK[:, others].mean(axis=1)))
    return pd.DataFrame(records)


# Side effects on running text.


def running_texts(lm: LM, settings: Settings, seed: int = 0) -> tuple[list[list[int]], str]:
    """Sequences of running text that nothing was fitted to, and its name: WikiText-2 test, else neutral test texts."""
    text, name = wikitext("test"), "WikiText-2"
    if not text:
        frame = load_corpus("emoscenes", emotions=None).frame
        frame = frame[(frame["emotion"] == "neutral") & (frame["split"] == "test")]
        text, name = " ".join(frame["text"]), "neutral texts of EmoScenes"
    ids, bos = list(lm.tokenizer(text)["input_ids"]), lm.tokenizer.bos_token_id
    ids = ids[1:] if ids[:1] == [bos] else ids
    width = settings.sequence_tokens - 1
    starts = np.arange(0, max(1, len(ids) - width), width)
    chosen = np.sort(np.random.default_rng(seed).permutation(starts)[: settings.sequences])
    start = [] if bos is None else [bos]
    return [[*start, *ids[at : at + width]] for at in chosen], name


def wikitext(split: str) -> str:
    """Prose of a split of WikiText-2 without its headings; "" if it is not on this machine."""
    folder = os.environ.get("EMOSAE_DATA_DIR")
    path = Path(folder or ".") / "wikitext-2" / f"{split}.txt"
    if not folder or not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()
    # Short lines are headings and fragments.
    return " ".join(line.strip() for line in lines if len(line) > 200)


def side_effects(
    lm: LM, measured: Mapping[str, Measured], dictionaries: Mapping[int, Dictionary], settings: Settings
) -> pd.DataFrame:
    """Perplexity and KL of running text under feature gains and vectors, every draw, and gains at other strengths.

    Columns: model, dataset, method, draw, strength, text, sequence, tokens, clean, steered, kl (nats a token).
    """
    ids, name = running_texts(lm, settings, settings.seed)
    chosen: dict[str, Steering] = {}
    facts: dict[str, dict[str, Any]] = {}
    for dataset, found in measured.items():
        for (method, n, draw), one in found.steerings.items():
            shown = method in (GAIN, ADDITIVE, RANDOM) or method.startswith(TARGETED)
            if n != settings.main_examples or not shown or (method != GAIN and draw):
                continue
            for x in settings.strengths if method == GAIN and not draw else (1.0,):
                key = f"{dataset}/{method}/{draw}/{x}"
                chosen[key] = one.at(x)
                facts[key] = {"dataset": dataset, "method": method, "draw": draw, "strength": x, "text": name}
    caption = f"{lm.name}: running text"
    table = steering.preservation(lm, ids, chosen, dictionaries, every=settings.every, progress=caption)
    return pd.concat([table, pd.DataFrame([facts[x] for x in table["steering"]])], axis=1).assign(model=lm.name)


def perplexity_table(effects: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Rise of perplexity, as a share, and KL in nats a token, with intervals over sequences.

    Columns: model, dataset, method, strength, text, metric (perplexity, kl), value, low, high. Draws are averaged.
    """
    records = []
    keys = ["model", "dataset", "method", "strength", "text"]
    for key, here in effects.groupby(keys):
        wide = here.groupby("sequence")[["tokens", "clean", "steered", "kl"]].mean()
        weights_RS = np.concatenate(
            [np.ones((1, len(wide))), stats.bootstrap_weights(len(wide), settings.bootstraps, settings.seed)]
        )
        tokens_R = weights_RS @ wide["tokens"].to_numpy()
        rise_R = np.expm1((weights_RS @ (wide["tokens"] * (wide["steered"] - wide["clean"])).to_numpy()) / tokens_R)
        kl_R = (weights_RS @ (wide["tokens"] * wide["kl"]).to_numpy()) / tokens_R
        facts = dict(zip(keys, key, strict=True))
        records += [facts | {"metric": m} | _interval(x_R) for m, x_R in (("perplexity", rise_R), ("kl", kl_R))]
    return pd.DataFrame(records)


# Text for the reader to see.


def written(
    lm: LM, one: Steering, dictionaries: Mapping[int, Dictionary], texts: Sequence[str], tokens: int
) -> pd.DataFrame:
    """What the model writes after each prompt, greedily, at several strengths: prompt, strength, text."""
    import torch

    records = []
    for text in texts:
        ids = torch.tensor([_with_start(lm, text)], device=lm.device)
        for strength in (0.0, 1.0, 4.0):
            with steering.steered(lm, one.at(strength), dictionaries):
                out = lm.hf.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    do_sample=False,
                    pad_token_id=lm.tokenizer.pad_token_id,
                )
            said = lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            records.append((text, strength, " ".join(said.split())))
    return pd.DataFrame(records, columns=["prompt", "strength", "text"])


# Claims. Each test is stated in the chapter before its result.

RISE, WEAK_RISE, OTHERS_LOSS, PERPLEXITY_RISE = 0.0, 0.15, -0.03, 0.02


def verdict_above(value: float, low: float, high: float, bar: float, *, above: bool = True) -> Verdict:
    """Supported if the whole interval is on the right side of the bar, not supported if on the wrong one."""
    if not above:
        value, low, high, bar = -value, -high, -low, -bar
    if low > bar:
        return stats.SUPPORTED
    return stats.NOT_SUPPORTED if high <= bar else stats.UNDECIDED


def all_of(verdicts: Sequence[str]) -> Verdict:
    """The verdict on a whole: supported if every part is, not supported if one part is not."""
    return next((v for v in (stats.NOT_SUPPORTED, stats.UNDECIDED) if v in verdicts), stats.SUPPORTED)


def claims(tables: Mapping[str, pd.DataFrame], settings: Settings) -> list[Claim]:
    """The tests of C5, C6 and C8 on every model and dataset."""
    found: list[Claim] = []
    n = settings.main_examples
    compared = tables["comparisons"]
    for (model, dataset), here in compared[(compared["method"] == GAIN) & (compared["examples"] == n)].groupby(
        ["model", "dataset"]
    ):
        where = {"model": str(model), "dataset": str(dataset)}
        found += _improves(here, where, n) + _preserves(tables["perplexity"], where, settings)
        found += _repairs(tables, where, settings)
    return found


def _claim(where: Mapping[str, str], claim: str, part: str, row: Any, unit: str, test: str, verdict: str) -> Claim:
    effect, low, high = (None, None, None) if row is None else (float(row[x]) for x in ("value", "low", "high"))
    return Claim(claim, where["model"], where["dataset"], part, effect, low, high, unit, test, verdict)  # type: ignore[arg-type]


def _improves(here: pd.DataFrame, where: Mapping[str, str], n: int) -> list[Claim]:
    parts = {
        "over no steering": (False, RAW, f"macro-F1 with gains from {n} examples per emotion exceeds the raw answer's"),
        "over prior calibration": (False, CALIBRATED, "it exceeds that of prior calibration, which needs no examples"),
        "on top of calibration": (True, CALIBRATED, "calibrated too, it exceeds that of prior calibration"),
        "over random directions": (False, RANDOM, "it exceeds that of as many gains on random directions"),
    }
    made = []
    for part, (calibrated, versus, test) in parts.items():
        row = here[(here["calibrated"] == calibrated) & (here["versus"] == versus)].iloc[0]
        verdict = verdict_above(row["value"], row["low"], row["high"], RISE)
        made.append(_claim(where, "C5", part, row, "macro-F1", test, verdict))
    whole = all_of([c.verdict for c in made])
    test = "gains beat the raw answer, prior calibration with and without calibrating too, and random directions"
    row = here[(~here["calibrated"]) & (here["versus"] == RAW)].iloc[0]
    return [_claim(where, "C5", "", row, "macro-F1", test, whole), *made]


def _preserves(perplexity: pd.DataFrame, where: Mapping[str, str], settings: Settings) -> list[Claim]:
    here = perplexity[(perplexity["model"] == where["model"]) & (perplexity["dataset"] == where["dataset"])]
    here = here[(here["method"] == GAIN) & (here["strength"] == 1.0) & (here["metric"] == "perplexity")]
    if here.empty:
        return []
    row = here.iloc[0]
    test = f"with gains at every position, perplexity of {row['text']} rises by at most {PERPLEXITY_RISE:.0%}"
    verdict = verdict_above(row["value"], row["low"], row["high"], PERPLEXITY_RISE, above=False)
    return [_claim(where, "C6", "", row, "share of perplexity", test, verdict)]


def _repairs(tables: Mapping[str, pd.DataFrame], where: Mapping[str, str], settings: Settings) -> list[Claim]:
    aimed = tables["targeted"]
    aimed = aimed[(aimed["model"] == where["model"]) & (aimed["dataset"] == where["dataset"])]
    made = []
    for calibrated, name in ((False, "raw"), (True, "calibrated")):
        here = aimed[aimed["calibrated"] == calibrated].set_index("emotion")
        weak, others = here.loc[here["target"].iloc[0]], here.loc["others"]
        test = f"targeted gains raise the recall of {weak['target']}, weakest in the {name} answer, by 15 points"
        verdict = verdict_above(weak["value"], weak["low"], weak["high"], WEAK_RISE)
        made.append(_claim(where, "C8", f"weakest emotion, {name}", weak, "recall", test, verdict))
        test = "the other emotions lose at most 3 points of recall on average"
        verdict = verdict_above(others["value"], others["low"], others["high"], OTHERS_LOSS)
        made.append(_claim(where, "C8", f"other emotions, {name}", others, "recall", test, verdict))
    row = spread_row(tables["spread"], where, settings)
    test = "global gains leave the recalls of the emotions less unequal than the raw answer does"
    verdict = verdict_above(row["value"], row["low"], row["high"], 0.0, above=False)
    made.append(_claim(where, "C8", "all at once", row, "spread of recall", test, verdict))
    whole = all_of([c.verdict for c in made])
    test = (
        "targeted gains repair the weakest emotion at little cost to others, raw and calibrated; global ones even out"
    )
    return [_claim(where, "C8", "", None, "", test, whole), *made]


def spread_table(predictions: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """How unequal the emotions are: standard deviation of recall over emotions, of every method and less the raw one.

    A method asked about a part of the texts is compared on that part. Columns: model, dataset, method, examples,
    calibrated, versus ("" for the spread itself), value, low, high.
    """
    records = []
    for (model, dataset), here in predictions.groupby(["model", "dataset"]):
        pooled = pool(here, settings)
        raw = next(key for key in pooled.said if key[0] == RAW)
        for key in pooled.said:
            if not _plain(key):
                continue
            facts = {"model": model, "dataset": dataset} | dict(zip(KEYS[:3], key[:3], strict=True))
            samples = _on_same_texts(pooled, key, raw, settings).samples
            own_R, raw_R = (samples[x]["recall"].std(axis=1) for x in (key, raw))
            records.append(facts | {"versus": ""} | _interval(own_R, recentre=True))
            records.append(facts | {"versus": RAW} | _interval(own_R - raw_R, recentre=True))
    return pd.DataFrame(records)


def spread_row(spread: pd.DataFrame, where: Mapping[str, str], settings: Settings) -> Any:
    """The change of spread by the gains that claims are about."""
    here = spread[(spread["model"] == where["model"]) & (spread["dataset"] == where["dataset"])]
    mine = (here["method"] == GAIN) & (here["examples"] == settings.main_examples) & ~here["calibrated"]
    return here[mine & (here["versus"] == RAW)].iloc[0]


# The study.


@dataclass(frozen=True)
class Study:
    """Everything the chapter shows.

    Attributes:
        measured: by model and dataset.
        effects: from `side_effects`.
        samples: from `written`, with the model.
        absent: named datasets that are not on this machine.
        notes: what else was left out, and why.
    """

    measured: Mapping[tuple[str, str], Measured]
    effects: pd.DataFrame
    samples: pd.DataFrame
    absent: tuple[str, ...]
    notes: tuple[str, ...]


PROMPTS = ("The weather on Monday was", "When she opened the door, she felt", "My neighbour told me that")
SAMPLE_TOKENS = 24


def run_study(
    models: Sequence[str],
    datasets: Sequence[str],
    settings: Settings,
    out_dir: Path,
    *,
    layers: Sequence[int] = (),
    saes: str = "",
    dtype: str | None = None,
    device: str = "auto",
) -> Study:
    """Learn and measure on every model and dataset; each model is loaded once. Steerings are saved under `out_dir`.

    Raises:
        EmosaeError: if no model has a dictionary, no dataset is present, or a dataset has too few texts.
    """
    here, absent = which_are_here(datasets)
    frames = {name: load_corpus(name).frame for name in here}
    measured: dict[tuple[str, str], Measured] = {}
    effects, samples, notes = [], [], []
    for model in dict.fromkeys(models):
        lm = load_model(model, dtype=dtype, device=device)
        have = list(available_layers(lm, saes))
        if not have:
            notes.append(f"{model} has no dictionaries here; train them with `emosae train-saes --model {model}`")
            continue
        dictionaries = load_dictionaries(lm, saes, layers=list(layers) or have)
        own: dict[str, Measured] = {}
        neutral = neutral_rows(lm, dictionaries, settings)
        for frame in frames.values():
            rows = choose_rows(frame, settings)
            own[rows.dataset] = measure(lm, rows, dictionaries, neutral, settings)
        effects.append(side_effects(lm, own, dictionaries, settings))
        first = next(iter(own.values())).steerings[GAIN, settings.main_examples, 0]
        samples.append(written(lm, first, dictionaries, PROMPTS, SAMPLE_TOKENS).assign(model=lm.name))
        for dataset, found in own.items():
            measured[model, dataset] = found
            for (method, n, draw), one in found.steerings.items():
                if n == settings.main_examples and (method == GAIN or method.startswith(TARGETED)):
                    name = f"{method.replace(', ', '-').replace(' ', '-')}-{draw}"
                    folder = out_dir / "steerings" / folder_of(model) / dataset / name
                    steering.save_steering(folder, one, dictionaries)
        # Two models need not fit into memory together.
        del lm, dictionaries, own
        gc.collect()
    if not measured:
        raise EmosaeError(notes[0] if notes else "no model was named; set `model`")
    all_effects, all_samples = (pd.concat(x, ignore_index=True) for x in (effects, samples))
    return Study(measured, all_effects, all_samples, absent, tuple(notes))


def save(study: Study, settings: Settings, out_dir: Path) -> dict[str, pd.DataFrame]:
    """Compute the chapter's tables, write each as parquet into `out_dir`, and return them by name; also the claims."""
    predictions = pd.concat([m.predictions for m in study.measured.values()], ignore_index=True)
    tables = {
        "predictions": predictions,
        "metrics": metrics_table(predictions, settings),
        "comparisons": comparison_table(predictions, settings),
        "targeted": targeted_table(predictions, settings),
        "spread": spread_table(predictions, settings),
        "fits": pd.concat([m.fits for m in study.measured.values()], ignore_index=True),
        "effects": study.effects,
        "perplexity": perplexity_table(study.effects, settings),
        "samples": study.samples,
    }
    for name, table in tables.items():
        write_table(out_dir / f"{name}.parquet", table)
    save_claims(out_dir, claims(tables, settings))
    left_out = {"absent": list(study.absent), "notes": list(study.notes)}
    write_json(out_dir / "settings.json", asdict(settings) | left_out)
    return tables
