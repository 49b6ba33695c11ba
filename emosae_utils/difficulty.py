"""Which emotions are harder, and where the difficulty sits.

A model that misses an emotion may fail for four different reasons. The *difficulty ladder* measures the same held-out
rows one rung at a time and reads the reasons off the steps between the rungs:

    raw recall -> prior-calibrated recall -> probe on the residual stream -> probe on SAE codes -> human readers
      (label prior)                (read-out)                       (dictionary)             (data)

The dictionary rung is there for models with dictionaries; it reads the layer that the residual probe chose. Everything
that is fitted (probes, bag of words) or shown (few-shot exemplars) comes from the discovery split; everything that is
reported is measured on the other two splits.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from emosae_utils import probes, scoring, stats
from emosae_utils.data import EMOTIONS, load_corpus, reader_annotations, which_are_here
from emosae_utils.files import EmosaeError, write_json, write_table
from emosae_utils.models import LM, load_model
from emosae_utils.saes import available_layers, load_dictionaries

Array = np.ndarray[Any, np.dtype[Any]]

MAJORITY, WORDS, RAW, CALIBRATED = "majority", "bag of words", "raw", "calibrated"
FEW_SHOT, FEW_SHOT_CALIBRATED = "few-shot", "few-shot calibrated"
PROBE, CODES, READER, VOTE = "probe", "code probe", "one reader", "readers' vote"
TEMPLATE_RAW, TEMPLATE_CALIBRATED = "template raw", "template calibrated"
RUNGS: tuple[str, ...] = (RAW, CALIBRATED, PROBE, CODES, READER)
# What the step up to a rung says about the failure that it removes.
STEP_NAMES: dict[str, str] = {CALIBRATED: "label prior", PROBE: "read-out", CODES: "dictionary", READER: "data"}
# Methods that read the text without the model: the same for every model.
MODEL_FREE = (MAJORITY, WORDS, READER, VOTE)


@dataclass(frozen=True)
class Settings:
    """How a measurement is made. One seed draws rows, exemplars, folds and bootstrap samples alike."""

    rows_per_emotion: int = 150
    fit_rows_per_emotion: int = 230
    template: str = scoring.DEFAULT_TEMPLATE
    template_rows_per_emotion: int = 24
    few_shot_per_emotion: int = 1
    few_shot_draws: int = 3
    few_shot_rows_per_emotion: int = 24
    permutations: int = 20
    bootstraps: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Rows:
    """The rows a dataset is fitted and measured on; both hold the six emotions only."""

    dataset: str
    fit: pd.DataFrame
    measure: pd.DataFrame


@dataclass(frozen=True)
class Measured:
    """What one model said of one dataset.

    Attributes:
        predictions: one row per (method, variant, row_id) with gold and pred.
        scores: label scores and gold logit difference of the default template, one row per row_id, nats.
        prior_E: mean content-free label scores, nats.
        neutral_E: mean label scores on neutral discovery texts, nats; None where there are none.
        probe: the fitted probe.
        null_accuracies: held-out accuracies of probes fitted to shuffled labels.
        fit_PLD, measure_PLD: residuals at the read-out position.
        notes: what the reader should know.
    """

    predictions: pd.DataFrame
    scores: pd.DataFrame
    prior_E: Array
    neutral_E: Array | None
    probe: probes.Probe
    null_accuracies: list[float]
    fit_PLD: Array
    measure_PLD: Array
    notes: tuple[str, ...]


def _capped(frame: pd.DataFrame, per_emotion: int, seed: int) -> pd.DataFrame:
    """At most `per_emotion` rows of each emotion, drawn at random."""
    return frame.sample(frac=1.0, random_state=seed).groupby("emotion").head(per_emotion).sort_index()


def choose_rows(frame: pd.DataFrame, settings: Settings, readers: pd.DataFrame | None = None) -> Rows:
    """Split a corpus into rows to fit on (discovery) and rows to measure on (validation and test).

    Where there are reader annotations, only texts that people judged are measured, so that model and people are
    compared on the same texts.

    Raises:
        EmosaeError: if an emotion is missing on either side.
    """
    frame = frame[frame["emotion"].isin(EMOTIONS)]
    seen = frame["split"] == "discovery"
    held = frame[~seen] if readers is None else frame[~seen & frame["row_id"].isin(readers["row_id"])]
    fit = _capped(frame[seen], settings.fit_rows_per_emotion, settings.seed)
    measure = _capped(held, settings.rows_per_emotion, settings.seed)
    name = str(frame["dataset"].iloc[0]) if len(frame) else "the data"
    present = [e for e in EMOTIONS if (frame["emotion"] == e).any()]
    for side, rows in (("discovery", fit), ("held-out", measure)):
        missing = [e for e in present if not (rows["emotion"] == e).any()]
        if missing or len(present) < 2:
            raise EmosaeError(f"{name} has no {side} rows for {', '.join(missing) or 'two emotions'}")
    return Rows(name, fit.reset_index(drop=True), measure.reset_index(drop=True))


def label_set(rows: Rows) -> tuple[str, ...]:
    """The emotions of the six that the dataset has (ISEAR has no surprise), in the fixed order."""
    return tuple(e for e in EMOTIONS if (rows.measure["emotion"] == e).any())


def _said(rows: pd.DataFrame, labels: Sequence[str], pred_P: Array, **columns: Any) -> pd.DataFrame:
    table = rows[["row_id", "group"]].assign(gold=rows["emotion"], pred=[labels[i] for i in pred_P], weight=1.0)
    return table.assign(**{"split": "held-out", **columns})


def gold_indices(rows: pd.DataFrame, labels: Sequence[str]) -> Array:
    """Index of each row's emotion in `labels`."""
    return rows["emotion"].map({e: i for i, e in enumerate(labels)}).to_numpy(dtype=int)


def without_model(rows: Rows, readers: pd.DataFrame | None = None) -> pd.DataFrame:
    """Predictions that need no language model: majority class, bag of words, and people where they were asked.

    A reader counts where one of the dataset's own emotions was chosen, each text weighing one in all; the vote is
    the plurality of those readers, ties shared.
    """
    labels = label_set(rows)
    fit_y, base = gold_indices(rows.fit, labels), rows.measure
    majority = np.full(len(base), np.bincount(fit_y, minlength=len(labels)).argmax())
    words = probes.bag_of_words(rows.fit["text"].tolist(), fit_y, base["text"].tolist())
    tables = [
        _said(base, labels, majority, method=MAJORITY, variant=""),
        _said(base, labels, words, method=WORDS, variant=""),
    ]
    if readers is not None:
        answers = readers[readers["answer"].isin(labels)][["row_id", "answer"]].rename(columns={"answer": "pred"})
        judged = base[["row_id", "group", "emotion"]].rename(columns={"emotion": "gold"}).merge(answers, on="row_id")
        if len(judged):
            judged["weight"] = 1 / judged.groupby("row_id")["pred"].transform("size")
            tables.append(judged.assign(method=READER, variant="", split="held-out"))
            votes = judged.groupby(["row_id", "group", "gold", "pred"], as_index=False).size()
            votes = votes[votes["size"] == votes.groupby("row_id")["size"].transform("max")].drop(columns="size")
            votes["weight"] = 1 / votes.groupby("row_id")["pred"].transform("size")
            tables.append(votes.assign(method=VOTE, variant="", split="held-out"))
    return pd.concat(tables, ignore_index=True)


def _score(
    lm: LM, rows: pd.DataFrame, labels: Sequence[str], caption: str, layers: Sequence[int] = (), **wording: Any
) -> scoring.Readout:
    prompts = scoring.build_prompts(lm, rows, labels=labels, **wording)
    return scoring.read_out(lm, prompts, layers=layers, progress=f"{lm.name}: {caption}")


def with_model(lm: LM, rows: Rows, settings: Settings, neutral: pd.DataFrame | None = None) -> Measured:
    """Score, calibrate, prompt with examples, reword and probe one model on one dataset.

    Args:
        lm: the model.
        rows: from `choose_rows`.
        settings: sample sizes, template and seed.
        neutral: emotionally neutral discovery texts, for the label prior on ordinary text; None if there are none.
    """
    labels, every_layer, base = label_set(rows), range(lm.n_layers), rows.measure
    fit = _score(lm, rows.fit, labels, "discovery texts", every_layer, template=settings.template)
    held = _score(lm, base, labels, "held-out texts", every_layer, template=settings.template)
    prior_E = scoring.label_prior(lm, template=settings.template, labels=labels)
    neutral_E = None
    if neutral is not None and len(neutral):
        neutral_E = _score(lm, neutral, labels, "neutral texts", template=settings.template).scores_PE.mean(axis=0)
    assert fit.resid_PLD is not None and held.resid_PLD is not None
    fit_y, y = gold_indices(rows.fit, labels), gold_indices(base, labels)
    probe = probes.fit_probe(fit.resid_PLD, fit_y, rows.fit["group"], seed=settings.seed)
    null = probes.shuffled_accuracies(
        probe, fit.resid_PLD, fit_y, held.resid_PLD, y, n=settings.permutations, seed=settings.seed
    )
    tables = [
        _said(base, labels, scoring.predict(held.scores_PE), method=RAW, variant=""),
        _said(base, labels, scoring.predict(held.scores_PE - prior_E), method=CALIBRATED, variant=""),
        _said(base, labels, probe.predict(held.resid_PLD), method=PROBE, variant=""),
        *_codes(lm, rows, labels, probe.layer, fit.resid_PLD, held.resid_PLD, settings),
        *_few_shot(lm, rows, labels, settings),
        *_templates(lm, rows, labels, settings),
    ]
    scores = base[["row_id", "emotion"]].assign(**{e: held.scores_PE[:, i] for i, e in enumerate(labels)})
    scores["gold_logit_difference"] = scoring.gold_logit_difference(held.scores_PE, y)
    predictions = pd.concat(tables, ignore_index=True).assign(dataset=rows.dataset, model=lm.name)
    return Measured(
        predictions,
        scores.assign(dataset=rows.dataset, model=lm.name),
        prior_E,
        neutral_E,
        probe,
        null,
        fit.resid_PLD,
        held.resid_PLD,
        held.notes,
    )


def _codes(
    lm: LM, rows: Rows, labels: Sequence[str], layer: int, fit_PLD: Array, held_PLD: Array, settings: Settings
) -> list[pd.DataFrame]:
    """What a probe finds in the dictionary's code of the residual probe's layer; nothing without a dictionary."""
    if layer not in available_layers(lm):
        return []
    dictionary = load_dictionaries(lm, layers=[layer], check=False)[layer]
    fit_PF, held_PF = (dictionary.encode(torch.from_numpy(x[:, layer])).cpu().numpy() for x in (fit_PLD, held_PLD))
    y_P, groups = gold_indices(rows.fit, labels), rows.fit["group"].tolist()
    directions_FD = dictionary.sae.W_dec.detach().cpu().numpy()
    probe = probes.fit_code_probe(fit_PF, directions_FD, y_P, groups, seed=settings.seed)
    return [_said(rows.measure, labels, probe.predict(held_PF), method=CODES, variant="")]


def _few_shot(lm: LM, rows: Rows, labels: Sequence[str], settings: Settings) -> list[pd.DataFrame]:
    tables = []
    sample = _capped(rows.measure, settings.few_shot_rows_per_emotion, settings.seed)
    for draw in range(settings.few_shot_draws):
        shown = scoring.draw_exemplars(rows.fit, settings.few_shot_per_emotion, settings.seed + draw)
        asked = scoring.without(sample, shown)
        wording = {"template": settings.template, "exemplars": shown}
        scores_PE = _score(lm, asked, labels, f"few-shot, draw {draw + 1}", **wording).scores_PE
        prior_E = scoring.label_prior(lm, labels=labels, **wording)
        for method, shift_E in ((FEW_SHOT, 0.0), (FEW_SHOT_CALIBRATED, prior_E)):
            pred_P = scoring.predict(scores_PE - shift_E)
            tables.append(_said(asked, labels, pred_P, method=method, variant=f"draw {draw + 1}"))
    return tables


def _templates(lm: LM, rows: Rows, labels: Sequence[str], settings: Settings) -> list[pd.DataFrame]:
    """Every wording on one sample of discovery rows, and as a chat turn where the model has a chat template.

    Discovery rows, because the default wording is chosen on this comparison.
    """
    tables = []
    sample = _capped(rows.fit, settings.template_rows_per_emotion, settings.seed)
    wordings = [(name, False) for name in scoring.TEMPLATES]
    if lm.profile.chat:
        wordings.append((settings.template, True))
    for name, chat in wordings:
        variant = f"{name}, chat" if chat else name
        scores_PE = _score(lm, sample, labels, f"template {variant}", template=name, chat=chat).scores_PE
        prior_E = scoring.label_prior(lm, template=name, labels=labels, chat=chat)
        for method, shift_E in ((TEMPLATE_RAW, 0.0), (TEMPLATE_CALIBRATED, prior_E)):
            pred_P = scoring.predict(scores_PE - shift_E)
            tables.append(_said(sample, labels, pred_P, method=method, variant=variant, split="discovery"))
    return tables


def _confusions(said: pd.DataFrame, labels: Sequence[str], groups: Sequence[str]) -> Array:
    """Weighted confusion counts per group, [G, K, K], with a (possibly empty) entry for every group of `groups`."""
    index = {e: i for i, e in enumerate(labels)}
    counts = np.zeros((len(groups), len(labels), len(labels)))
    place = {g: i for i, g in enumerate(groups)}
    at = (said["group"].map(place).to_numpy(), said["gold"].map(index).to_numpy(), said["pred"].map(index).to_numpy())
    np.add.at(counts, at, said["weight"].to_numpy())
    return counts


@dataclass(frozen=True)
class _Pool:
    """One dataset's predictions as group confusions that share their bootstrap draws."""

    labels: tuple[str, ...]
    counts: Mapping[tuple[str, str, str], Array]
    rows: Mapping[tuple[str, str, str], int]
    weights_RG: Array


def _pool(predictions: pd.DataFrame, settings: Settings) -> _Pool:
    labels = tuple(e for e in EMOTIONS if (predictions["gold"] == e).any())
    groups = sorted(predictions["group"].unique())
    weights_RG = stats.bootstrap_weights(len(groups), settings.bootstraps, settings.seed)
    split = dict(list(predictions.groupby(["model", "method", "variant"])))
    return _Pool(
        labels,
        {key: _confusions(said, labels, groups) for key, said in split.items()},
        {key: said["row_id"].nunique() for key, said in split.items()},
        weights_RG,
    )


def _held_out(predictions: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for dataset, said in predictions[predictions["split"] == "held-out"].groupby("dataset"):
        yield str(dataset), said


def metrics_table(predictions: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Recall, precision and F1 per emotion, and macro-F1 and accuracy, with intervals.

    Columns: dataset, split, model ("" for methods without one), method, variant, metric, emotion ("all" for the last
    two), value, low, high (shares), rows. Intervals are 95 % percentile bootstraps over groups (topics, writers). A
    method with several draws is pooled over them under the variant "all".
    """
    records: list[dict[str, Any]] = []
    pooled = predictions[predictions["variant"].str.startswith("draw")].assign(variant="all")
    for (dataset, split), said in pd.concat([predictions, pooled]).groupby(["dataset", "split"]):
        pool = _pool(said, settings)
        for (model, method, variant), counts in pool.counts.items():
            key = {"dataset": dataset, "split": split, "model": model, "method": method, "variant": variant}
            key |= {"rows": pool.rows[model, method, variant]}
            for name, metric in (("recall", stats.recall), ("precision", stats.precision), ("f1", stats.f1)):
                for emotion, value in zip(pool.labels, stats.estimate(metric, counts, pool.weights_RG), strict=True):
                    records.append(key | {"metric": name, "emotion": emotion} | asdict(value))
            for name, metric in (("macro_f1", stats.macro_f1), ("accuracy", stats.accuracy)):
                (value,) = stats.estimate(metric, counts, pool.weights_RG)
                records.append(key | {"metric": name, "emotion": "all"} | asdict(value))
    return pd.DataFrame(records)


def ladder_table(predictions: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """The steps of the difficulty ladder: recall gained from one rung to the next, with paired intervals.

    Columns: dataset, model, emotion, step (label prior, read-out, dictionary, data), value, low, high (share of rows,
    positive where the higher rung finds more).
    """
    records: list[dict[str, Any]] = []
    for dataset, said in _held_out(predictions):
        pool = _pool(said, settings)
        for model in sorted(set(said["model"]) - {""}):
            rungs = {r: pool.counts.get((model, r, ""), pool.counts.get(("", r, ""))) for r in RUNGS}
            present = [(r, counts) for r, counts in rungs.items() if counts is not None]
            for (_, lower), (rung, upper) in pairwise(present):
                gains = stats.difference(stats.recall, upper, lower, pool.weights_RG)
                for emotion, gain in zip(pool.labels, gains, strict=True):
                    key = {"dataset": dataset, "model": model, "emotion": emotion, "step": STEP_NAMES[rung]}
                    records.append(key | asdict(gain))
    return pd.DataFrame(records)


def spread_table(predictions: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """How uneven recall is over the emotions at each rung: its standard deviation, with intervals.

    Columns: dataset, model, method, value, low, high (standard deviation of the recalls), expected (the standard
    deviation that equal true recalls would show at these sample sizes, from the binomial).
    """
    records: list[dict[str, Any]] = []

    def unevenness(counts: Array) -> Array:
        spread: Array = stats.recall(counts).std(axis=-1)
        return spread

    for dataset, said in _held_out(predictions):
        pool = _pool(said, settings)
        for (model, method, variant), counts in pool.counts.items():
            if method not in (*RUNGS, VOTE) or variant:
                continue
            (value,) = stats.estimate(unevenness, counts, pool.weights_RG)
            total = counts.sum(axis=0)
            share, n = stats.accuracy(total), total.sum() / len(pool.labels)
            expected = float(np.sqrt(share * (1 - share) / n * (1 - 1 / len(pool.labels))))
            key = {"dataset": dataset, "model": model, "method": method}
            records.append(key | asdict(value) | {"expected": expected})
    return pd.DataFrame(records)


def tests_table(predictions: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Paired tests between methods on the same rows, Holm-corrected over the whole table.

    Columns: dataset, model, comparison, metric (macro_f1), value, low, high (difference), p (exact McNemar on
    accuracy), p_holm.
    """
    pairs = ((CALIBRATED, RAW), (PROBE, CALIBRATED), (CODES, PROBE), (PROBE, WORDS), (RAW, MAJORITY))
    records: list[dict[str, Any]] = []
    for dataset, said in _held_out(predictions):
        pool = _pool(said, settings)
        for model in sorted(set(said["model"]) - {""}):
            for better, base in pairs:
                if (model, better, "") not in pool.counts:
                    continue
                first = said[(said["model"] == model) & (said["method"] == better)].set_index("row_id")
                owner = "" if base in MODEL_FREE else model
                second = said[(said["model"] == owner) & (said["method"] == base)].set_index("row_id").loc[first.index]
                (gap,) = stats.difference(
                    stats.macro_f1,
                    pool.counts[model, better, ""],
                    pool.counts[owner, base, ""],
                    pool.weights_RG,
                )
                right = [(side["gold"] == side["pred"]).to_numpy() for side in (first, second)]
                key = {"dataset": dataset, "model": model, "comparison": f"{better} - {base}", "metric": "macro_f1"}
                records.append(key | asdict(gap) | {"p": stats.mcnemar_p(*right)})
    table = pd.DataFrame(records)
    return table.assign(p_holm=stats.holm(table["p"].tolist()))


def confusion_table(predictions: pd.DataFrame) -> pd.DataFrame:
    """Weighted counts by dataset, model, method, gold and pred, for the methods of the ladder and bag of words."""
    kept = predictions[predictions["method"].isin([*RUNGS, VOTE, WORDS])]
    keys = ["dataset", "model", "method", "gold", "pred"]
    return kept.groupby(keys, as_index=False)["weight"].sum().rename(columns={"weight": "count"})


def _standardised(resid_PLD: Array, reference_PLD: Array) -> Array:
    """Residuals with the mean and spread of each layer's dimensions in the reference rows taken out."""
    spread_LD = reference_PLD.std(axis=0)
    standardised: Array = (resid_PLD - reference_PLD.mean(axis=0)) / np.where(spread_LD > 0, spread_LD, 1.0)
    return standardised


def transfer(source: Measured, source_rows: Rows, target: Measured, target_rows: Rows, seed: int = 0) -> pd.DataFrame:
    """Predictions for the held-out rows of one dataset by a probe fitted on another dataset's discovery rows.

    Each dataset is standardised by the mean and spread of its own discovery rows, without their labels: genres differ
    by a shift of the residual stream that has nothing to do with emotion. Only emotions that both datasets have are
    used.
    """
    labels = tuple(e for e in label_set(source_rows) if e in label_set(target_rows))
    fit_in = source_rows.fit["emotion"].isin(labels).to_numpy()
    test_in = target_rows.measure["emotion"].isin(labels).to_numpy()
    fit, test = source_rows.fit[fit_in], target_rows.measure[test_in]
    known_PLD = _standardised(source.fit_PLD, source.fit_PLD)[fit_in]
    probe = probes.fit_probe(known_PLD, gold_indices(fit, labels), fit["group"], seed=seed)
    pred_P = probe.predict(_standardised(target.measure_PLD, target.fit_PLD)[test_in])
    said = _said(test, labels, pred_P, method=PROBE, variant=source_rows.dataset)
    return said.assign(dataset=target_rows.dataset, model=source.predictions["model"].iloc[0])


@dataclass(frozen=True)
class Study:
    """Every model on every dataset that is present.

    Attributes:
        rows: the rows of each dataset.
        measured: by (model, dataset).
        predictions: of all models and of the methods without one; one row per answer.
        absent: datasets that were asked for and are not on this machine.
    """

    rows: Mapping[str, Rows]
    measured: Mapping[tuple[str, str], Measured]
    predictions: pd.DataFrame
    absent: tuple[str, ...]


def run_study(
    models: Sequence[str],
    datasets: Sequence[str],
    settings: Settings,
    *,
    dtype: str | None = None,
    device: str = "auto",
) -> Study:
    """Measure every model on every dataset that is here, one model in memory at a time.

    Args:
        models: model names; the first is the one the text speaks of.
        datasets: names or paths of datasets; named public sets that are not present are left out and listed.
        settings: sample sizes, template and seed.
        dtype: arithmetic; each profile's own if None.
        device: as for `load_model`.

    Raises:
        EmosaeError: for an unknown model or dataset, or if no dataset is present.
    """
    here, absent = which_are_here(datasets)
    rows: dict[str, Rows] = {}
    tables: list[pd.DataFrame] = []
    neutral: dict[str, pd.DataFrame] = {}
    for dataset in here:
        readers = reader_annotations() if dataset == "crowd-envent" else None
        frame = load_corpus(dataset, emotions=None).frame
        chosen = choose_rows(frame, settings, readers)
        rows[chosen.dataset] = chosen
        neutral[chosen.dataset] = frame[(frame["emotion"] == "neutral") & (frame["split"] == "discovery")].head(72)
        tables.append(without_model(chosen, readers).assign(dataset=chosen.dataset, model=""))
    measured: dict[tuple[str, str], Measured] = {}
    for model in dict.fromkeys(models):
        lm = load_model(model, dtype=dtype, device=device)
        for dataset, chosen in rows.items():
            measured[model, dataset] = with_model(lm, chosen, settings, neutral[dataset])
            tables.append(measured[model, dataset].predictions)
        # Two models need not fit into memory together.
        del lm
        gc.collect()
    return Study(rows, measured, pd.concat(tables, ignore_index=True), absent)


def prior_table(study: Study) -> pd.DataFrame:
    """Label priors: mean label scores on content-free prompts and on neutral texts, relative to the mean label.

    Columns: dataset, model, source, emotion, value (nats).
    """
    records = []
    for (model, dataset), measured in study.measured.items():
        labels = label_set(study.rows[dataset])
        for source, scores_E in (("content-free prompts", measured.prior_E), ("neutral texts", measured.neutral_E)):
            if scores_E is not None:
                for emotion, value in zip(labels, scores_E - scores_E.mean(), strict=True):
                    key = {"dataset": dataset, "model": model, "source": source, "emotion": emotion}
                    records.append(key | {"value": float(value)})
    return pd.DataFrame(records)


def curve_table(study: Study) -> pd.DataFrame:
    """Probe accuracy over layers, cross-validated inside the discovery rows.

    Columns: dataset, model, layer, n_layers, accuracy, chosen, chance (share of the largest class), null (mean
    held-out accuracy of the chosen probe on shuffled labels), null_max, null_p (permutation p of its real accuracy).
    """
    tables = []
    for (model, dataset), measured in study.measured.items():
        probe, rows = measured.probe, study.rows[dataset]
        chance = rows.fit["emotion"].value_counts(normalize=True).max()
        layers = np.arange(len(probe.curve_L))
        table = pd.DataFrame({"layer": layers, "accuracy": probe.curve_L, "chosen": layers == probe.layer})
        null = measured.null_accuracies or [float("nan")]
        said = measured.predictions[measured.predictions["method"] == PROBE]
        p = stats.permutation_p(float((said["gold"] == said["pred"]).mean()), measured.null_accuracies)
        key = {"dataset": dataset, "model": model, "n_layers": len(layers), "chance": chance, "null_p": p}
        tables.append(table.assign(**key, null=float(np.mean(null)), null_max=float(np.max(null))))
    return pd.concat(tables, ignore_index=True)


def transfer_predictions(study: Study, settings: Settings) -> pd.DataFrame:
    """Probe predictions for every ordered pair of different datasets; the variant names the fitting dataset."""
    tables = []
    for (model, source), fitted in study.measured.items():
        for (other, target), read in study.measured.items():
            if model == other and source != target:
                tables.append(transfer(fitted, study.rows[source], read, study.rows[target], settings.seed))
    return pd.concat(tables, ignore_index=True) if tables else study.predictions.head(0)


def save(study: Study, settings: Settings, out_dir: Path) -> dict[str, pd.DataFrame]:
    """Compute the chapter's tables, write each as parquet into `out_dir`, and return them by name.

    Also writes `settings.json` with the settings and the datasets that were absent.
    """
    crossed = transfer_predictions(study, settings)
    tables = {
        "predictions": study.predictions,
        "scores": pd.concat([m.scores for m in study.measured.values()], ignore_index=True),
        "metrics": metrics_table(study.predictions, settings),
        "ladder": ladder_table(study.predictions, settings),
        "spread": spread_table(study.predictions, settings),
        "tests": tests_table(study.predictions, settings),
        "confusions": confusion_table(study.predictions),
        "priors": prior_table(study),
        "curves": curve_table(study),
        "transfer": metrics_table(crossed, settings) if len(crossed) else pd.DataFrame(),
    }
    for name, table in tables.items():
        if len(table.columns):
            write_table(out_dir / f"{name}.parquet", table)
    write_json(out_dir / "settings.json", asdict(settings) | {"absent": list(study.absent)})
    return tables


def _value(metrics: pd.DataFrame, model: str, method: str, metric: str, emotion: str = "all") -> stats.Estimate:
    hit = metrics[
        (metrics["model"] == model)
        & (metrics["method"] == method)
        & (metrics["metric"] == metric)
        & (metrics["emotion"] == emotion)
        & (metrics["variant"] == "")
    ].iloc[0]
    return stats.Estimate(float(hit["value"]), float(hit["low"]), float(hit["high"]))


def finding(metrics: pd.DataFrame, spread: pd.DataFrame, dataset: str, model: str) -> str:
    """One paragraph on one model and dataset. Every number, and every verdict on it, comes from the tables."""
    here = metrics[metrics["dataset"] == dataset]
    recalls = {r: here[(here["model"] == model) & (here["method"] == r) & (here["metric"] == "recall")] for r in RUNGS}
    hardest = {r: t.loc[t["value"].idxmin()] for r, t in recalls.items() if len(t)}
    easiest = {r: t.loc[t["value"].idxmax()] for r, t in recalls.items() if len(t)}
    uneven = spread[(spread["dataset"] == dataset) & (spread["model"] == model)].set_index("method")
    raw, calibrated, probe = (_value(here, model, r, "macro_f1") for r in (RAW, CALIBRATED, PROBE))
    names = sorted(here.loc[here["metric"] == "recall", "emotion"].unique())
    before = ", ".join(f"{e} {_value(here, model, RAW, 'recall', e).value:.2f}" for e in names)
    worst, best = hardest[RAW], hardest[CALIBRATED]
    moved = (
        f"the hardest emotion is then {best['emotion']} ({best['value']:.2f})"
        if best["emotion"] != worst["emotion"]
        else f"{worst['emotion']} stays the hardest ({best['value']:.2f})"
    )
    shift = uneven.loc[CALIBRATED, "value"] - uneven.loc[RAW, "value"]
    verdict = "falls" if shift < 0 else "does not fall"
    beyond = "above" if probe.low > calibrated.high else "not clearly above"
    return (
        f"Asked outright, **{model}** finds on {dataset} {before} (recall): {easiest[RAW]['emotion']} is the easiest "
        f"and {worst['emotion']} the hardest. Once the label prior is taken out, {moved}; the unevenness of recall "
        f"over the emotions (standard deviation) {verdict} from {uneven.loc[RAW, 'value']:.2f} to "
        f"{uneven.loc[CALIBRATED, 'value']:.2f}, and macro-F1 goes from {raw} to {calibrated}. A linear probe on the "
        f"residual stream reaches {probe}, {beyond} the calibrated answer; with it the hardest emotion is "
        f"{hardest[PROBE]['emotion']} ({hardest[PROBE]['value']:.2f})."
    )
