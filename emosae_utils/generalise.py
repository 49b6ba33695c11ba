"""Whether what was learnt on one dataset holds on others: gains applied unchanged, and causal features compared.

Gains are learnt from a few examples of a source dataset and applied as they are to the test texts of every other one.
Nothing of the target enters but its texts and, for prior calibration, its label words. Causal features are compared by
their first-order effect: what turning a feature off does to the label scores of each text, which is minus the slope of
the scores by its gain (see `steering`; the chapter on tracing shows how well the first order agrees with the exact).
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from emosae_utils import repair, scoring, stats, steering
from emosae_utils.data import EMOTIONS, load_corpus, which_are_here
from emosae_utils.difficulty import gold_indices
from emosae_utils.features import chance_jaccard, jaccard
from emosae_utils.files import EmosaeError, write_json, write_table
from emosae_utils.ledger import Claim, save_claims
from emosae_utils.models import LM, load_model
from emosae_utils.repair import CALIBRATED, GAIN, RAW, Rows
from emosae_utils.saes import Dictionary, available_layers, load_dictionaries
from emosae_utils.steering import Steering

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Settings:
    """How transfer is measured. One seed draws rows, examples and bootstrap samples alike.

    Attributes:
        examples: per emotion, that gains are learnt from.
        draws: how often examples are drawn.
        rows_per_emotion: test texts of each target.
        template: the wording.
        n_units: units turned up or down; as many as rank-one LoRA has parameters if 0.
        penalties: ridge weights tried.
        free_weight: of content-free prompts beside the examples.
        neutral_weight: of the predicted KL on plain text.
        neutral_texts: for that prediction.
        steps: tangents.
        top: causal features of each emotion that are compared.
        shuffles: of texts, for the chance level of matched features.
        bootstraps: draws of groups and example draws for intervals.
        seed: of everything drawn.
    """

    examples: int = 5
    draws: int = 3
    rows_per_emotion: int = 24
    template: str = scoring.DEFAULT_TEMPLATE
    n_units: int = 0
    penalties: Sequence[float] = (0.03, 0.1)
    free_weight: float = 0.5
    neutral_weight: float = 100.0
    neutral_texts: int = 144
    steps: int = 2
    top: int = 100
    shuffles: int = 20
    bootstraps: int = 1000
    seed: int = 0

    def for_repair(self) -> repair.Settings:
        """The same, in the terms of the chapter on steering."""
        return repair.Settings(
            examples=(self.examples,),
            main_examples=self.examples,
            draws=self.draws,
            rows_per_emotion=self.rows_per_emotion,
            template=self.template,
            n_units=self.n_units,
            penalties=self.penalties,
            penalty=max(self.penalties),
            free_weight=self.free_weight,
            neutral_weight=self.neutral_weight,
            neutral_texts=self.neutral_texts,
            steps=self.steps,
            bootstraps=self.bootstraps,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Learnt:
    """What one model took from one source dataset.

    Attributes:
        steerings: by draw of examples.
        labels: of the source.
        pairs: (layer, feature) of each unit.
        row_ids: texts that effects were read on.
        y_P: their labels, as indices.
        effects_PEU: first-order effect of turning each unit off on each label score, nats.
    """

    steerings: tuple[Steering, ...]
    labels: tuple[str, ...]
    pairs: Array
    row_ids: tuple[str, ...]
    y_P: Array
    effects_PEU: Array


def learn(lm: LM, rows: Rows, dictionaries: Mapping[int, Dictionary], neutral_MU: Array, settings: Settings) -> Learnt:
    """Learn gains on every draw of examples, and read the effects of all active features on their texts."""
    wanted = settings.for_repair()
    # The source's own test texts are read with those of the other targets.
    bench = repair.set_up(lm, replace(rows, test=rows.test.groupby("emotion").head(1)), dictionaries, wanted)
    learner = repair.gain_learner(bench, neutral_MU)
    steerings = [repair.fit_draw(bench, learner, settings.examples, draw, wanted) for draw in range(settings.draws)]
    shown = rows.pool.iloc[bench.at_P]
    return Learnt(
        tuple(steerings),
        rows.labels,
        np.stack([learner.units.layer_U, learner.units.unit_U], axis=1),
        tuple(shown["row_id"]),
        gold_indices(shown, rows.labels),
        -learner.pool.slopes_PEU,
    )


def ask(
    lm: LM, rows: Rows, learnt: Mapping[str, Learnt], dictionaries: Mapping[int, Dictionary], settings: Settings
) -> pd.DataFrame:
    """Predictions on the test texts of one target: without steering, calibrated, and with the gains of every source.

    One row per text and method, as in `repair`, with the source under "target" of `repair.KEYS` and the dataset asked
    about under "dataset".
    """
    wording: dict[str, Any] = {"template": settings.template, "labels": rows.labels}
    free = steering.prepare(
        lm, scoring.build_prompts(lm, pd.DataFrame({"text": list(scoring.CONTENT_FREE)}), **wording)
    )
    caption = f"{lm.name}: {rows.dataset}"
    test = steering.prepare(lm, scoring.build_prompts(lm, rows.test, **wording), progress=caption)
    keys = [(source, draw) for source, found in learnt.items() for draw in range(len(found.steerings))]
    steerings = [learnt[source].steerings[draw] for source, draw in keys]
    still = steerings[0].at(0.0)
    test_RPE, free_RPE = (steering.steered_scores(lm, x, [still, *steerings], dictionaries) for x in (test, free))
    tables = []
    for (source, draw), test_PE, free_PE in zip([("", 0), *keys], test_RPE, free_RPE, strict=True):
        for calibrated, shift_E in ((False, 0.0), (True, free_PE.mean(axis=0))):
            method = GAIN if source else (CALIBRATED if calibrated else RAW)
            n = settings.examples if source else 0
            key: dict[str, Any] = {"examples": n, "draw": draw, "calibrated": calibrated, "target": source}
            tables.append(repair.answers(rows.test, rows.labels, test_PE - shift_E, method, **key))
    return pd.concat(tables, ignore_index=True).assign(model=lm.name, dataset=rows.dataset)


@dataclass(frozen=True)
class Study:
    """What was learnt by (model, source), what was said of every target, and what was left out."""

    learnt: Mapping[tuple[str, str], Learnt]
    predictions: pd.DataFrame
    absent: tuple[str, ...]
    notes: tuple[str, ...]


def run_study(
    models: Sequence[str],
    datasets: Sequence[str],
    settings: Settings,
    *,
    layers: Sequence[int] = (),
    saes: str = "",
    dtype: str | None = None,
    device: str = "auto",
) -> Study:
    """Learn on every dataset and ask about every dataset, model by model.

    Raises:
        EmosaeError: if no model has a dictionary, fewer than two datasets can be used, or a layer has no dictionary.
    """
    here, absent = which_are_here(datasets)
    wanted, notes, targets = settings.for_repair(), [], []
    for name in here:
        try:
            targets.append(repair.choose_rows(load_corpus(name).frame, wanted))
        except EmosaeError as error:
            notes.append(f"{name} was left out: {error}")
    if len(targets) < 2:
        raise EmosaeError(f"transfer needs two datasets and there is {len(targets)}; name more in `datasets`")
    learnt: dict[tuple[str, str], Learnt] = {}
    said: list[pd.DataFrame] = []
    for model in dict.fromkeys(models):
        lm = load_model(model, dtype=dtype, device=device)
        have = list(available_layers(lm, saes))
        if not have:
            notes.append(f"{model} has no dictionaries here; train them with `emosae train-saes --model {model}`")
            continue
        dictionaries = load_dictionaries(lm, saes, layers=list(layers) or have)
        neutral_MU = repair.neutral_rows(lm, dictionaries, wanted)
        # One basis for all, so that one sweep encodes each stream once.
        basis, own = steering.feature_basis(dictionaries), {}
        for rows in targets:
            found = learn(lm, rows, dictionaries, neutral_MU, settings)
            own[rows.dataset] = replace(found, steerings=tuple(replace(s, basis=basis) for s in found.steerings))
        said += [ask(lm, rows, own, dictionaries, settings) for rows in targets]
        learnt |= {(model, dataset): found for dataset, found in own.items()}
        # Two models need not fit into memory together.
        del lm, dictionaries, basis
        gc.collect()
    if not learnt:
        raise EmosaeError(notes[-1] if notes else "no model was named; set `model`")
    return Study(learnt, pd.concat(said, ignore_index=True), absent, tuple(notes))


# Tables.

# What gains are compared with: (whether they are calibrated too, the reference).
VERSUS = {
    "over no steering": (False, RAW),
    "over prior calibration": (False, CALIBRATED),
    "on top of calibration": (True, CALIBRATED),
}


def transfer_samples(predictions: pd.DataFrame, settings: Settings) -> dict[tuple[str, str, str, str], Array]:
    """Change of macro-F1 in every bootstrap sample, the data first, by (model, source, target, what is compared)."""
    found: dict[tuple[str, str, str, str], Array] = {}
    for (model, target), here in predictions.groupby(["model", "dataset"]):
        pooled = repair.pool(here, settings.for_repair())
        base = {key[0]: samples["macro_f1"] for key, samples in pooled.samples.items() if key[0] != GAIN}
        for key, samples in pooled.samples.items():
            for versus, (calibrated, rival) in VERSUS.items():
                if key[0] == GAIN and key[2] == calibrated:
                    found[str(model), str(key[5]), str(target), versus] = samples["macro_f1"] - base[rival]
    return found


def _estimate(samples_R: Array) -> dict[str, float]:
    low, high = stats.interval(samples_R[1:])
    return {"value": float(samples_R[0]), "low": float(low), "high": float(high)}


def transfer_table(samples: Mapping[tuple[str, str, str, str], Array]) -> pd.DataFrame:
    """Change of macro-F1: model, source, target, versus, value, low, high; target "all others" is the mean of them."""
    records = []
    columns = ("model", "source", "target", "versus")
    for where, samples_R in samples.items():
        records.append({**dict(zip(columns, where, strict=True)), **_estimate(samples_R)})
    for model, source, versus in dict.fromkeys((m, s, v) for m, s, _, v in samples):
        others = [x for (m, s, t, v), x in samples.items() if (m, s, v) == (model, source, versus) and t != s]
        key = dict(zip(columns, (model, source, "all others", versus), strict=True))
        records.append({**key, **_estimate(np.mean(others, axis=0))})
    return pd.DataFrame(records)


def causal_sets(found: Learnt, top: int) -> tuple[dict[str, frozenset[tuple[int, int]]], dict[str, Array]]:
    """The units whose loss costs an emotion's own texts most, beyond what it costs other texts; and all units' effects.

    The effect is on the emotion's label score: its mean change on texts of the emotion less that on others, nats.
    """
    sets, effects = {}, {}
    for k, emotion in enumerate(found.labels):
        own_P = found.y_P == k
        effect_U = found.effects_PEU[own_P, k].mean(axis=0) - found.effects_PEU[~own_P, k].mean(axis=0)
        chosen = np.argsort(effect_U, kind="stable")[:top]
        sets[emotion] = frozenset((int(a), int(b)) for a, b in found.pairs[chosen[effect_U[chosen] < 0]])
        effects[emotion] = effect_U
    return sets, effects


def overlap_table(learnt: Mapping[tuple[str, str], Learnt], settings: Settings) -> pd.DataFrame:
    """How far two datasets agree on the causal features of an emotion.

    Columns: model, first, second, emotion, both (features), value (Jaccard), chance (of random sets of as many in each
    layer, among units active in both), rank_correlation (Spearman, of the effects of units active in both).
    """
    records = []
    for model in dict.fromkeys(m for m, _ in learnt):
        for first, second in combinations([d for m, d in learnt if m == model], 2):
            one, two = learnt[model, first], learnt[model, second]
            place = {tuple(pair): i for i, pair in enumerate(two.pairs.tolist())}
            shared = [(i, place[tuple(pair)]) for i, pair in enumerate(one.pairs.tolist()) if tuple(pair) in place]
            at = np.array(shared, dtype=int).reshape(-1, 2)
            universe = frozenset((int(a), int(b)) for a, b in one.pairs[at[:, 0]])
            (sets, effects), (other_sets, other_effects) = (causal_sets(x, settings.top) for x in (one, two))
            for emotion in [e for e in EMOTIONS if e in sets and e in other_sets]:
                mine, theirs = sets[emotion] & universe, other_sets[emotion] & universe
                ranks = spearmanr(effects[emotion][at[:, 0]], other_effects[emotion][at[:, 1]])[0]
                key = {"model": model, "first": first, "second": second, "emotion": emotion}
                values = {"both": len(mine & theirs), "value": jaccard(mine, theirs)}
                chance = chance_jaccard(mine, theirs, universe)
                records.append(key | values | {"chance": chance, "rank_correlation": float(ranks)})
    return pd.DataFrame(records)


def match_table(learnt: Mapping[tuple[str, str], Learnt], settings: Settings) -> pd.DataFrame:
    """Whether two models hold features that act alike, text by text.

    A feature's profile is its effect on every label score of every text. Of the causal features of an emotion in one
    model, each is matched with the one of the other model whose profile correlates most. Chance: the same after the
    texts of one model are shuffled, among all texts ("any") or among those of one emotion ("same emotion").

    Columns: dataset, first, second (models), emotion, features, value (median best correlation), any, same_emotion.
    """
    records = []
    models = list(dict.fromkeys(m for m, _ in learnt))
    for first, second in combinations(models, 2):
        for dataset in [d for m, d in learnt if m == first and (second, d) in learnt]:
            one, two = learnt[first, dataset], learnt[second, dataset]
            if one.row_ids != two.row_ids or one.labels != two.labels:
                continue
            (sets, _), (other_sets, _) = (causal_sets(x, settings.top) for x in (one, two))
            rng = np.random.default_rng(settings.seed)
            for emotion in one.labels:
                mine, theirs = (_profiles(x, s[emotion]) for x, s in ((one, sets), (two, other_sets)))
                if not mine.shape[2] or not theirs.shape[2]:
                    continue
                values = {"value": _best(mine, theirs)}
                for name, strata_P in (("any", np.zeros(len(one.y_P))), ("same_emotion", one.y_P)):
                    drawn = [_best(mine[_within(strata_P, rng)], theirs) for _ in range(settings.shuffles)]
                    values[name] = float(np.mean(drawn))
                key = {"dataset": dataset, "first": first, "second": second, "emotion": emotion}
                records.append(key | {"features": mine.shape[2]} | values)
    columns = ["dataset", "first", "second", "emotion", "features", "value", "any", "same_emotion"]
    return pd.DataFrame(records, columns=columns)


def _profiles(found: Learnt, pairs: frozenset[tuple[int, int]]) -> Array:
    """Effects of some units on every text and label, [P, E, K]."""
    place = {tuple(pair): i for i, pair in enumerate(found.pairs.tolist())}
    profiles_PEK: Array = found.effects_PEU[:, :, sorted(place[pair] for pair in pairs)]
    return profiles_PEK


def _within(strata_P: Array, rng: np.random.Generator) -> Array:
    """A random order that keeps every stratum in its places."""
    order_P = np.arange(len(strata_P))
    for stratum in np.unique(strata_P):
        own = np.flatnonzero(strata_P == stratum)
        order_P[own] = rng.permutation(own)
    return order_P


def _best(mine_PEK: Array, theirs_PEK: Array) -> float:
    """Median over units of the largest correlation with a unit of the other model."""
    a, b = (x.reshape(-1, x.shape[2]) for x in (mine_PEK, theirs_PEK))
    a, b = (x - x.mean(axis=0) for x in (a, b))
    a, b = (x / np.maximum(np.linalg.norm(x, axis=0), 1e-12) for x in (a, b))
    return float(np.median((a.T @ b).max(axis=1)))


def claims(table: pd.DataFrame) -> list[Claim]:
    """C7 for every model and source: gains help on the other datasets, over no steering and over prior calibration."""
    made = []
    for (model, source), here in table[table["target"] == "all others"].groupby(["model", "source"]):
        rows, parts = here.set_index("versus"), []
        for versus in VERSUS:
            row = rows.loc[versus]
            value, low, high = (float(row[x]) for x in ("value", "low", "high"))
            verdict = repair.verdict_above(value, low, high, 0.0)
            test = f"gains learnt on {source} raise macro-F1 {versus}, on average over the other datasets"
            parts.append(Claim("C7", str(model), str(source), versus, value, low, high, "macro-F1", test, verdict))
        first = parts[0]
        whole = repair.all_of([part.verdict for part in parts])
        test = "gains help on other datasets, over no steering, over prior calibration and on top of it"
        made += [replace(first, part="", test=test, verdict=whole), *parts]
    return made


def save(study: Study, settings: Settings, out_dir: Path) -> dict[str, pd.DataFrame]:
    """Compute the chapter's tables, write each as parquet into `out_dir`, and return them by name; also the claims."""
    transfer = transfer_table(transfer_samples(study.predictions, settings))
    tables = {
        "predictions": study.predictions,
        "transfer": transfer,
        "metrics": repair.metrics_table(study.predictions, settings.for_repair()),
        "overlap": overlap_table(study.learnt, settings),
        "matches": match_table(study.learnt, settings),
    }
    for name, table in tables.items():
        write_table(out_dir / f"{name}.parquet", table)
    save_claims(out_dir, claims(transfer))
    left_out = {"absent": list(study.absent), "notes": list(study.notes)}
    write_json(out_dir / "settings.json", asdict(settings) | left_out)
    return tables
