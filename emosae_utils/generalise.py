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
from scipy.stats import rankdata

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
        steerings: by draw of examples; in a `Study` without their directions.
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


def learn(
    lm: LM, rows: Rows, dictionaries: Mapping[int, Dictionary], neutral: Mapping[str, Array], settings: Settings
) -> Learnt:
    """Learn gains on every draw of examples, and read the effects of all active features on their texts."""
    wanted = settings.for_repair()
    # The source's own test texts are read with those of the other targets.
    bench = repair.set_up(lm, replace(rows, test=rows.test.groupby("emotion").head(1)), dictionaries, wanted)
    learner = repair.gain_learner(bench, neutral)
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
            notes.append(f"Left out: {error}")
    if len(targets) < 2:
        why = "".join(f" ({note})" for note in notes)
        raise EmosaeError(f"transfer needs two datasets and {len(targets)} can be used{why}; name more in `datasets`")
    learnt: dict[tuple[str, str], Learnt] = {}
    said: list[pd.DataFrame] = []
    for model in dict.fromkeys(models):
        lm = load_model(model, dtype=dtype, device=device)
        have = list(available_layers(lm, saes))
        if not have:
            notes.append(f"{model} has no dictionaries here; train them with `emosae train-saes --model {model}`")
            continue
        dictionaries = load_dictionaries(lm, saes, layers=list(layers) or have)
        neutral = repair.neutral_rows(lm, dictionaries, wanted, (GAIN,))
        # One basis for all, so that one sweep encodes each stream once.
        basis, own = steering.feature_basis(dictionaries), {}
        for rows in targets:
            found = learn(lm, rows, dictionaries, neutral, settings)
            own[rows.dataset] = replace(found, steerings=tuple(replace(s, basis=basis) for s in found.steerings))
        said += [ask(lm, rows, own, dictionaries, settings) for rows in targets]
        # Gains and effects stay; the directions would keep every dictionary in memory.
        for dataset, found in own.items():
            bare = tuple(replace(s, basis={}) for s in found.steerings)
            learnt[model, dataset] = replace(found, steerings=bare)
        # Two models need not fit into memory together.
        del lm, dictionaries, basis, own, found
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
# Means in the table of transfer, and what the claim is about.
EVERY, OTHERS, SAME, LOST = "all sources", "all others", "same dataset", "others less same"
PAIRS = "pairs of datasets"


def transfer_samples(predictions: pd.DataFrame, settings: Settings) -> dict[tuple[str, str, str, str], Array]:
    """Change of macro-F1 in every bootstrap sample, the data first, by (model, source, target, what is compared)."""
    found: dict[tuple[str, str, str, str], Array] = {}
    for (model, target), here in predictions.groupby(["model", "dataset"], sort=False):
        pooled = repair.pool(here, settings.for_repair())
        base = {key[0]: samples["macro_f1"] for key, samples in pooled.samples.items() if key[0] != GAIN}
        for key, samples in pooled.samples.items():
            for versus, (calibrated, rival) in VERSUS.items():
                if key[0] == GAIN and key[2] == calibrated:
                    found[str(model), str(key[5]), str(target), versus] = samples["macro_f1"] - base[rival]
    # Model by model, sources and targets in the order in which datasets were named.
    place = {d: i for i, d in enumerate(dict.fromkeys(predictions["dataset"]))}
    models = list(dict.fromkeys(predictions["model"]))
    order = sorted(found, key=lambda k: (models.index(k[0]), place[k[1]], place[k[2]]))
    return {key: found[key] for key in order}


def _estimate(samples_R: Array) -> dict[str, float]:
    low, high = stats.interval(samples_R[1:])
    return {"value": float(samples_R[0]), "low": float(low), "high": float(high)}


def transfer_table(samples: Mapping[tuple[str, str, str, str], Array]) -> pd.DataFrame:
    """Change of macro-F1: model, source, target, versus, value, low, high.

    Beside every pair stand means: of one source over `OTHERS`, and of `EVERY` source over `OTHERS`, over the datasets
    that gains were learnt on (`SAME`), and the former less the latter (`LOST`). Datasets weigh alike.
    """
    columns = ("model", "source", "target", "versus")
    found = dict(samples)
    for model, versus in dict.fromkeys((m, v) for m, _, _, v in samples):
        here = {(s, t): x for (m, s, t, v), x in samples.items() if (m, v) == (model, versus)}
        for source in dict.fromkeys(s for s, _ in here):
            others = [x for (s, t), x in here.items() if s == source and t != s]
            found[model, source, OTHERS, versus] = np.mean(others, axis=0)
        away, home = (np.mean([x for (s, t), x in here.items() if (s == t) is own], axis=0) for own in (False, True))
        for target, samples_R in ((OTHERS, away), (SAME, home), (LOST, away - home)):
            found[model, EVERY, target, versus] = samples_R
    return pd.DataFrame([dict(zip(columns, key, strict=True)) | _estimate(x) for key, x in found.items()])


def causal_effects(found: Learnt, y_P: Array | None = None) -> Array:
    """What the loss of each unit costs each emotion's own texts beyond what it costs other texts, [E, U], nats.

    The effect is on the emotion's label score: its mean change on texts of the emotion less that on others. `y_P` puts
    other labels in the place of the texts' own.
    """
    own_EP = np.arange(len(found.labels))[:, None] == (found.y_P if y_P is None else y_P)
    weights_EP = own_EP / own_EP.sum(axis=1, keepdims=True) - ~own_EP / (~own_EP).sum(axis=1, keepdims=True)
    rows = [w_P.astype(np.float32) @ found.effects_PEU[:, k] for k, w_P in enumerate(weights_EP)]
    effects_EU: Array = np.stack(rows)
    return effects_EU


def top_units(effects_EU: Array, top: int) -> list[Array]:
    """Places of the units whose loss costs each emotion most, at most `top`, all of them with a cost."""
    n = min(top, effects_EU.shape[1])
    chosen = [np.argpartition(effect_U, n - 1)[:n] for effect_U in effects_EU]
    return [np.sort(at[effect_U[at] < 0]) for at, effect_U in zip(chosen, effects_EU, strict=True)]


def causal_sets(found: Learnt, top: int) -> dict[str, frozenset[tuple[int, int]]]:
    """The causal features of each emotion as (layer, feature); see `causal_effects`."""
    return {e: _pairs(found, at) for e, at in zip(found.labels, top_units(causal_effects(found), top), strict=True)}


def _pairs(found: Learnt, at: Array) -> frozenset[tuple[int, int]]:
    return frozenset((int(a), int(b)) for a, b in found.pairs[at])


def halves(found: Learnt) -> tuple[Learnt, Learnt]:
    """Every other text of each emotion, and the rest."""
    place_P = np.zeros(len(found.y_P), dtype=int)
    for k in range(len(found.labels)):
        own = np.flatnonzero(found.y_P == k)
        place_P[own] = np.arange(len(own))
    kept = [np.flatnonzero(place_P % 2 == half) for half in (0, 1)]
    first, second = (
        replace(
            found,
            row_ids=tuple(found.row_ids[p] for p in at),
            y_P=found.y_P[at],
            effects_PEU=found.effects_PEU[at],
        )
        for at in kept
    )
    return first, second


def overlap_table(learnt: Mapping[tuple[str, str], Learnt], settings: Settings) -> pd.DataFrame:
    """How far two datasets agree on the causal features of an emotion; and, as a ceiling, the halves of one dataset.

    Columns: model, first, second (the same name for halves), emotion, both (features), value (Jaccard), chance (of
    random sets of as many in each layer, among units active in both), shuffled and shuffled_high (mean and 95th
    percentile when the labels of the second dataset's texts are shuffled, which keeps units that sway scores anyway),
    rank_correlation (Spearman, of the effects of units active in both) and rank_high (95th percentile when shuffled).
    """
    records = []
    for model in dict.fromkeys(m for m, _ in learnt):
        own = {d: found for (m, d), found in learnt.items() if m == model}
        for name, found in own.items():
            if np.bincount(found.y_P).min() > 1:
                records += _overlaps({"model": model, "first": name, "second": name}, *halves(found), settings)
        for first, second in combinations(own, 2):
            key = {"model": model, "first": first, "second": second}
            records += _overlaps(key, own[first], own[second], settings)
    return pd.DataFrame(records)


def _overlaps(key: Mapping[str, str], one: Learnt, two: Learnt, settings: Settings) -> list[dict[str, Any]]:
    place = {tuple(pair): i for i, pair in enumerate(two.pairs.tolist())}
    shared = [(i, place[tuple(pair)]) for i, pair in enumerate(one.pairs.tolist()) if tuple(pair) in place]
    at = np.array(shared, dtype=int).reshape(-1, 2)
    if not len(at):
        return []
    # From here on every unit is one that is active in both.
    one, two = (
        replace(found, pairs=found.pairs[i], effects_PEU=found.effects_PEU[:, :, i])
        for found, i in zip((one, two), at.T, strict=True)
    )
    universe = _pairs(one, np.arange(len(at)))
    rng = np.random.default_rng(settings.seed)
    mine_EU, theirs_EU = causal_effects(one), causal_effects(two)
    null = [causal_effects(two, rng.permutation(two.y_P)) for _ in range(settings.shuffles)]
    mine, theirs = (top_units(x, settings.top) for x in (mine_EU, theirs_EU))
    null_tops = [top_units(x, settings.top) for x in null]
    records = []
    for emotion in [e for e in EMOTIONS if e in one.labels and e in two.labels]:
        i, j = one.labels.index(emotion), two.labels.index(emotion)
        sets = frozenset(mine[i].tolist()), frozenset(theirs[j].tolist())
        by_layer = _pairs(one, mine[i]), _pairs(two, theirs[j])
        ranks_U = rankdata(mine_EU[i])
        shuffled = [jaccard(sets[0], frozenset(tops[j].tolist())) for tops in null_tops]
        rank_null = [_correlation(ranks_U, rankdata(x[j])) for x in null]
        values = {"both": float(len(sets[0] & sets[1])), "value": jaccard(*sets)}
        values |= {"chance": chance_jaccard(*by_layer, universe)}
        values |= {"shuffled": float(np.mean(shuffled)), "shuffled_high": float(np.quantile(shuffled, 0.95))}
        values |= {"rank_correlation": _correlation(ranks_U, rankdata(theirs_EU[j]))}
        values |= {"rank_high": float(np.quantile(rank_null, 0.95))}
        records.append({**key, "emotion": emotion, **values})
    return records


def _correlation(a_U: Array, b_U: Array) -> float:
    a_U, b_U = a_U - a_U.mean(), b_U - b_U.mean()
    return float(a_U @ b_U / max(1e-12, float(np.linalg.norm(a_U) * np.linalg.norm(b_U))))


def match_table(learnt: Mapping[tuple[str, str], Learnt], settings: Settings) -> pd.DataFrame:
    """Whether two models hold features that act alike, text by text.

    A feature's profile is its effect on every label score of every text. Of the causal features of an emotion in one
    model, each is matched with the one of the other model whose profile correlates most. Chance: the same after the
    texts of one model are shuffled, among all texts ("any") or among those of one emotion ("same_emotion").

    Columns: dataset, first, second (models), emotion, features, value (median best correlation), and of either chance
    level the mean and, as any_high and same_emotion_high, the 95th percentile.
    """
    records = []
    models = list(dict.fromkeys(m for m, _ in learnt))
    for first, second in combinations(models, 2):
        for dataset in [d for m, d in learnt if m == first and (second, d) in learnt]:
            one, two = learnt[first, dataset], learnt[second, dataset]
            if one.row_ids != two.row_ids or one.labels != two.labels:
                continue
            tops = [top_units(causal_effects(x), settings.top) for x in (one, two)]
            rng = np.random.default_rng(settings.seed)
            for k, emotion in enumerate(one.labels):
                mine, theirs = (x.effects_PEU[:, :, top[k]] for x, top in zip((one, two), tops, strict=True))
                if not mine.shape[2] or not theirs.shape[2]:
                    continue
                values = {"value": _best(mine, theirs)}
                for name, strata_P in (("any", np.zeros(len(one.y_P))), ("same_emotion", one.y_P)):
                    drawn = [_best(mine[_within(strata_P, rng)], theirs) for _ in range(settings.shuffles)]
                    values |= {name: float(np.mean(drawn)), f"{name}_high": float(np.quantile(drawn, 0.95))}
                key = {"dataset": dataset, "first": first, "second": second, "emotion": emotion}
                records.append(key | {"features": mine.shape[2]} | values)
    keys = ["dataset", "first", "second", "emotion", "features", "value"]
    return pd.DataFrame(records, columns=[*keys, "any", "any_high", "same_emotion", "same_emotion_high"])


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
    """C7 for every model: gains help on datasets they were not learnt on, on average over all pairs; and by source.

    The whole rests on the means over all pairs; the sources alone stand beside them as further parts.
    """
    made = []
    for model, here in table[table["target"] == OTHERS].groupby("model", sort=False):
        rows = {(row["source"], row["versus"]): row for _, row in here.iterrows()}
        parts = [_claim(str(model), versus, rows[EVERY, versus], "") for versus in VERSUS]
        sources = [s for s in dict.fromkeys(here["source"]) if s != EVERY]
        by_source = [_claim(str(model), v, rows[s, v], s) for s in sources for v in VERSUS]
        test = "gains help on other datasets: over no steering, over prior calibration, and calibrated too"
        whole = repair.all_of([part.verdict for part in parts])
        made += [replace(parts[0], part="", test=test, verdict=whole), *parts, *by_source]
    return made


def _claim(model: str, versus: str, row: Any, source: str) -> Claim:
    value, low, high = (float(row[x]) for x in ("value", "low", "high"))
    verdict = repair.verdict_above(value, low, high, 0.0)
    learnt = f"learnt on {source}" if source else "learnt on any dataset"
    test = f"gains {learnt} raise macro-F1 {versus}, on average over the other datasets"
    part = f"from {source}, {versus}" if source else versus
    return Claim("C7", model, PAIRS, part, value, low, high, "macro-F1", test, verdict)


def save(study: Study, settings: Settings, out_dir: Path) -> dict[str, pd.DataFrame]:
    """Compute the chapter's tables, write each as parquet into `out_dir`, and return them by name; also the claims.

    In "predictions" and "metrics" the columns source ("" without steering) and target are datasets, as in "transfer".
    """
    datasets = {"target": "source", "dataset": "target"}
    transfer = transfer_table(transfer_samples(study.predictions, settings))
    tables = {
        "predictions": study.predictions.rename(columns=datasets),
        "transfer": transfer,
        "metrics": repair.metrics_table(study.predictions, settings.for_repair()).rename(columns=datasets),
        "overlap": overlap_table(study.learnt, settings),
        "matches": match_table(study.learnt, settings),
    }
    for name, table in tables.items():
        write_table(out_dir / f"{name}.parquet", table)
    save_claims(out_dir, claims(transfer))
    left_out = {"absent": list(study.absent), "notes": list(study.notes)}
    write_json(out_dir / "settings.json", asdict(settings) | left_out)
    return tables


# The chapter's words. Every number, and every verdict on it, comes from the tables.


def _number(row: Any, sign: str = "+") -> str:
    # Without the sign of a zero.
    value, low, high = (round(float(row[x]), 2) + 0.0 for x in ("value", "low", "high"))
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def _listed(names: Sequence[str]) -> str:
    """Names as a phrase: a, b and c."""
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def setting(study: Study, settings: Settings) -> str:
    """What was learnt from what and asked of what, and what was left out, as short paragraphs."""
    labels = {d: found.labels for (_, d), found in study.learnt.items()}
    said = study.predictions[study.predictions["method"] == RAW]
    asked = said[said["model"] == said["model"].iloc[0]].groupby("dataset", sort=False).size()
    draws = f"{settings.draws} draws" if settings.draws > 1 else "one draw"
    lines = [
        f"Gains are learnt on {draws} of {settings.examples} examples per emotion of each of {len(labels)} datasets. "
        f"Test texts: {', '.join(f'{d} {n}' for d, n in asked.items())}."
    ]
    for emotion in EMOTIONS:
        lacking = [d for d, own in labels.items() if emotion not in own]
        if lacking:
            lines[0] += f" Without {emotion}: {_listed(lacking)}; no gain learnt there was shown that emotion."
    for model in dict.fromkeys(m for m, _ in study.learnt):
        mine = {d: found for (m, d), found in study.learnt.items() if m == model}
        layers = len(np.unique(next(iter(mine.values())).pairs[:, 0]))
        units = [s.n_units for found in mine.values() for s in found.steerings]
        active = [len(found.pairs) for found in mine.values()]
        lines.append(
            f"**{model}**: {layers} layers with a dictionary; {_span(active)} features are active on the examples of a "
            f"dataset, and {_span(units)} of them are turned up or down."
        )
    if study.absent:
        lines.append(f"Not on this machine, so left out: {_listed(study.absent)}.")
    return "\n\n".join([*lines, *(f"{note}." for note in study.notes)])


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def transfer_finding(table: pd.DataFrame, model: str) -> str:
    """One paragraph on what the gains of one model are worth elsewhere, and the verdict on C7."""
    here = table[table["model"] == model]
    whole = here[here["source"] == EVERY].set_index(["target", "versus"])
    sources = [s for s in dict.fromkeys(here["source"]) if s != EVERY]
    away, home, lost = (
        _listed([f"{_number(whole.loc[(target, versus)])} {versus}" for versus in VERSUS])
        for target in (OTHERS, SAME, LOST)
    )
    pairs = here[here["source"].isin(sources) & here["target"].isin(sources) & (here["source"] != here["target"])]
    by_versus = [pairs[pairs["versus"] == versus] for versus in VERSUS]
    above = _listed([str((rows["low"] > 0).sum()) for rows in by_versus])
    below = _listed([str((rows["high"] < 0).sum()) for rows in by_versus])
    text = (
        f"**{model}**: on datasets they were not learnt on, gains change macro-F1 by, on average, {away}. In the same "
        f"order, of {len(by_versus[0])} pairs {above} have their whole interval above zero, {below} below. On other "
        f"texts of the dataset they were learnt on the change is {home}; what carries over differs from that by "
        f"{lost}."
    )
    parts = [c for c in claims(here) if not c.part.startswith("from ")]
    verdicts = "; ".join(f"{c.part}: {c.verdict}" for c in parts if c.part)
    return f"{text} C7 is **{parts[0].verdict}** ({verdicts})."


def _means(table: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    return table.groupby(list(keys), sort=False).mean(numeric_only=True)


def overlap_finding(table: pd.DataFrame, model: str) -> str:
    """One paragraph on how far datasets agree about causal features."""
    here = table[table["model"] == model]
    apart, halved = here[here["first"] != here["second"]], here[here["first"] == here["second"]]
    if apart.empty:
        return f"**{model}**: no two datasets have active features in common."
    mean = apart.mean(numeric_only=True)
    above, ranks = (apart["value"] > apart["shuffled_high"]).mean(), (apart["rank_correlation"] > apart["rank_high"])
    text = (
        f"**{model}**: the causal features of an emotion on two datasets overlap by {mean['value']:.2f} on average; "
        f"random sets of as many features by {mean['chance']:.2f}, and with shuffled labels "
        f"{mean['shuffled']:.2f}. The overlap exceeds 95 % of the shuffles in {above:.0%} of {len(apart)} comparisons "
        f"(a pair of datasets and an emotion; by chance 5 % would). The effects of all features correlate by "
        f"{mean['rank_correlation']:.2f}, beyond 95 % of the shuffles in {ranks.mean():.0%}."
    )
    by_emotion = _means(apart, ["emotion"])["value"]
    if len(by_emotion) > 1:
        text += (
            f" Datasets agree most on {by_emotion.idxmax()} ({by_emotion.max():.2f}) and least on "
            f"{by_emotion.idxmin()} ({by_emotion.min():.2f})."
        )
    if len(halved):
        text += (
            f" The halves of one dataset, each with half of the texts, agree by {halved['value'].mean():.2f} and "
            f"correlate by {halved['rank_correlation'].mean():.2f}: the yardstick for differences between datasets."
        )
    return text


def match_finding(table: pd.DataFrame) -> str:
    """One paragraph for each pair of models on whether their features act alike."""
    if table.empty:
        return "One model alone has no other to be matched with; name two (`compare_with`)."
    lines = []
    for (first, second), here in table.groupby(["first", "second"], sort=False):
        mean = here.mean(numeric_only=True)
        any_text, same = ((here["value"] > here[c]).sum() for c in ("any_high", "same_emotion_high"))
        lines.append(
            f"**{first}** and **{second}**: the best partner of a causal feature correlates with it by "
            f"{mean['value']:.2f} (median over features, mean over emotions and datasets). With all texts shuffled it "
            f"is {mean['any']:.2f}; shuffled within each emotion, {mean['same_emotion']:.2f}. It exceeds 95 % of the "
            f"former in {any_text} and of the latter in {same} of {len(here)} sets: "
            + (
                "beyond the emotion, features of the two models follow the same texts."
                if same > len(here) / 2
                else "what the two models share is, for the most part, no more than the emotion of the text."
            )
        )
    return "\n\n".join(lines)


def claim_view(table: pd.DataFrame) -> pd.DataFrame:
    """The test of C7 to read: one row per model and source, one column per comparison, and the verdict on the whole."""
    records = []
    for one in claims(table):
        if one.part:
            source, _, versus = one.part.removeprefix("from ").rpartition(", ")
            cell = f"{_number({'value': one.effect, 'low': one.low, 'high': one.high})}: {one.verdict}"
            records.append({"model": one.model, "learnt on": source or EVERY, "versus": versus, "cell": cell})
        else:
            records.append({"model": one.model, "learnt on": EVERY, "versus": "C7", "cell": one.verdict})
    shown = pd.DataFrame(records).pivot_table(
        index=["model", "learnt on"], columns="versus", values="cell", aggfunc="first", sort=False
    )
    return shown[[*VERSUS, "C7"]].fillna("")


def transfer_view(table: pd.DataFrame, versus: str) -> pd.DataFrame:
    """Change of macro-F1 with intervals: one row per model and source, one column per target."""
    here = table[(table["versus"] == versus) & (table["target"] != LOST) & (table["source"] != EVERY)]
    cells = [_number(row) for _, row in here.iterrows()]
    keys = ["model", "source"]
    wide = here.assign(cell=cells).pivot_table(index=keys, columns="target", values="cell", aggfunc="first", sort=False)
    return wide[list(dict.fromkeys(here["target"]))].fillna("")


def overlap_view(table: pd.DataFrame) -> pd.DataFrame:
    """Overlap beside its chance levels, rank correlation beside its own: means over emotions, per pair of datasets."""
    columns = {
        "value": "overlap",
        "chance": "random sets",
        "shuffled": "labels shuffled",
        "rank_correlation": "correlation",
        "rank_high": "95 % of shuffles",
    }
    return _means(table, ["model", "first", "second"])[list(columns)].rename(columns=columns)
