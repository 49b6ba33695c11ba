"""What the dictionaries are worth: per layer, on texts that no dictionary was trained on, beside what else there is.

Variance explained is centred, and at the read-out position centred within the prompt template, so that telling
templates apart earns nothing. The controls have the same number of active directions per position: a dictionary of
random directions, and the leading principal components of the read-outs themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from emosae_utils import scoring, stats
from emosae_utils.data import EMOTIONS, load_corpus
from emosae_utils.difficulty import gold_indices
from emosae_utils.files import EmosaeError, read_json, write_json, write_table
from emosae_utils.models import LM, load_model
from emosae_utils.probes import fit_code_probe, fit_probe
from emosae_utils.saes import (
    Dictionary,
    available_layers,
    load_dictionaries,
    partners,
    random_dictionary,
    running_residuals,
    shipped_dir,
    splice_losses,
    splice_scores,
    variance_explained,
)

Array = np.ndarray[Any, np.dtype[Any]]

# The bars a dictionary should pass before a chapter builds on it.
BARS: dict[str, float] = {
    "read_out_variance": 0.75,
    "read_out_l0": 48.0,
    "probe_ratio": 0.95,
    "score_change": 0.25,
    "accuracy_change": 0.03,
    "running_variance": 0.65,
    "loss_recovered": 0.90,
}
MEDIAN_READ_OUT_VARIANCE = 0.80


@dataclass(frozen=True)
class Settings:
    """How much is measured. `splice_rows_per_emotion` and `sequences` cost most."""

    template: str = scoring.DEFAULT_TEMPLATE
    rows_per_emotion: int = 144
    splice_rows_per_emotion: int = 20
    sequences: int = 8
    sequence_tokens: int = 64
    bootstraps: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Quality:
    """Tables by layer of one model.

    Attributes:
        layers: one row per layer: variance explained and its controls, probes, splicing, losses.
        facts: numbers of the whole model, among them the greatest change when the error is kept (nats).
    """

    layers: pd.DataFrame
    facts: Mapping[str, Any]


def _share(error_P: Array, total_P: Array, weights_RP: Array) -> stats.Estimate:
    """1 - summed error over summed variance, with a bootstrap interval over rows."""
    low, high = stats.interval(1 - (weights_RP @ error_P) / (weights_RP @ total_P))
    return stats.Estimate(float(1 - error_P.sum() / total_P.sum()), float(low), float(high))


def principal_components(fit_PD: Array, test_PD: Array, k: int) -> Array:
    """Rebuild rows from the `k` leading principal components of others."""
    mean_D = fit_PD.mean(axis=0)
    _, _, axes_DD = np.linalg.svd(fit_PD - mean_D, full_matrices=False)
    top_KD = axes_DD[:k]
    rebuilt: Array = (test_PD - mean_D) @ top_KD.T @ top_KD + mean_D
    return rebuilt


def mean_differences(fit_PD: Array, y_P: Array, test_PD: Array) -> Array:
    """Class of each row by the difference-of-means directions: the nearest class mean along them."""
    means_ED = np.stack([fit_PD[y_P == e].mean(axis=0) for e in range(int(y_P.max()) + 1)])
    directions_ED = means_ED - means_ED.mean(axis=0)
    scores_PE = (test_PD - means_ED.mean(axis=0)) @ directions_ED.T - 0.5 * (directions_ED**2).sum(axis=1)
    found: Array = scores_PE.argmax(axis=1)
    return found


def running_texts(lm: LM, settings: Settings, frame: pd.DataFrame) -> list[tuple[int, ...]]:
    """Token sequences of held-out running text: texts of one topic joined, cut to one length."""
    found = []
    held = frame[frame["split"] == "test"].sample(frac=1.0, random_state=settings.seed)
    for _, texts in held.groupby("group", sort=True)["text"]:
        ids = lm.tokenizer(" ".join(texts))["input_ids"]
        for at in range(0, len(ids) - settings.sequence_tokens + 1, settings.sequence_tokens):
            found.append(tuple(ids[at : at + settings.sequence_tokens]))
    rng = np.random.default_rng(settings.seed)
    if lm.tokenizer.bos_token_id is not None and found and found[0][0] == lm.tokenizer.bos_token_id:
        bos = lm.tokenizer.bos_token_id
        found = [ids if ids[0] == bos else (bos, *ids[:-1]) for ids in found]
    return [found[i] for i in rng.permutation(len(found))[: settings.sequences]]


def measure(lm: LM, dictionaries: Mapping[int, Dictionary], settings: Settings, dataset: str = "emoscenes") -> Quality:
    """Measure every dictionary of a model.

    Args:
        lm: the model.
        dictionaries: by layer.
        settings: how much.
        dataset: labelled texts; its discovery and validation splits fit probes and controls, its test split is
            measured on. No shipped dictionary was trained on any of it.

    Raises:
        EmosaeError: if the dataset lacks an emotion or a split.
    """
    frame = load_corpus(dataset).frame
    frame = frame[frame["emotion"].isin(EMOTIONS)]
    frame = frame.sample(frac=1.0, random_state=settings.seed).groupby("emotion").head(settings.rows_per_emotion)
    labels = tuple(e for e in EMOTIONS if (frame["emotion"] == e).any())
    fit, test = frame[frame["split"] != "test"], frame[frame["split"] == "test"]
    if len(fit) == 0 or len(test) == 0:
        raise EmosaeError(f"{dataset} needs rows in its test split and in another; it has {len(test)} and {len(fit)}")
    layers = sorted(dictionaries)
    prompts = scoring.build_prompts(lm, pd.concat([fit, test]), template=settings.template, labels=labels)
    read = scoring.read_out(lm, prompts, layers=layers, progress=f"{lm.name}: reading")
    assert read.resid_PLD is not None
    y_P = gold_indices(pd.concat([fit, test]), labels)
    n_fit = len(fit)
    groups = fit["group"].tolist()
    sequences = running_texts(lm, settings, frame)
    after_LPD, _, _ = running_residuals(lm, sequences, layers)
    losses = splice_losses(lm, sequences, dictionaries)
    spliced = _splice_table(lm, test, dictionaries, labels, settings)
    weights_RP = stats.bootstrap_weights(len(test), settings.bootstraps, settings.seed)
    weights_RS = stats.bootstrap_weights(len(sequences), settings.bootstraps, settings.seed)
    rows = []
    for i, layer in enumerate(layers):
        dictionary = dictionaries[layer]
        acts_PD, text_PD = read.resid_PLD[:, i], after_LPD[i]
        codes_PF, text_codes_PF = dictionary.encode(torch.from_numpy(acts_PD)), dictionary.encode(text_PD)
        row: dict[str, Any] = {"layer": layer, "features": dictionary.n_features}
        row |= _variance(dictionary, acts_PD, codes_PF[n_fit:], weights_RP)
        row["running_variance"] = variance_explained(text_PD, dictionary.decode(text_codes_PF).cpu())
        row["running_l0"] = float((text_codes_PF > 0).sum(dim=1).float().mean())
        row |= _probes(dictionary, acts_PD, codes_PF.cpu().numpy(), y_P, groups, settings)
        row |= _recovered(losses[losses["layer"] == layer], weights_RS)
        row |= spliced[layer]
        row["silent"] = int((torch.cat([text_codes_PF, codes_PF]) > 0).sum(dim=0).eq(0).sum())
        row |= _training_facts(dictionary)
        rows.append(row)
    kept = _kept_error(lm, test, dictionaries, labels, settings)
    facts = {
        "model": lm.name,
        "dataset": dataset,
        "rows_measured": len(test),
        "rows_fitted_on": n_fit,
        "rows_spliced": int(min(settings.splice_rows_per_emotion * len(labels), len(test))),
        "running_positions": int(after_LPD.shape[1]),
        "kept_error_change": kept,
        "chance": 1 / len(labels),
    }
    return Quality(pd.DataFrame(rows), facts)


def _variance(dictionary: Dictionary, acts_PD: Array, codes_PF: torch.Tensor, weights_RP: Array) -> dict[str, Any]:
    """Variance explained at the read-out, by the dictionary and by controls with as many active directions.

    The codes are those of the last rows, which are measured on; controls are fitted to the rows before them.
    """
    fit_PD, test_PD = acts_PD[: -len(codes_PF)], acts_PD[-len(codes_PF) :]
    l0 = float((codes_PF > 0).sum(dim=1).float().mean())
    total_P = ((test_PD - test_PD.mean(axis=0)) ** 2).sum(axis=1)
    random = random_dictionary(dictionary, torch.from_numpy(fit_PD), seed=0)
    made = {
        "read_out": dictionary.decode(codes_PF).cpu().numpy(),
        "random": random.reconstruct(torch.from_numpy(test_PD)).numpy(),
        "pca": principal_components(fit_PD, test_PD, round(l0)),
    }
    found: dict[str, Any] = {"read_out_l0": l0}
    for name, made_PD in made.items():
        share = _share(((test_PD - made_PD) ** 2).sum(axis=1), total_P, weights_RP)
        found |= {f"{name}_variance": share.value, f"{name}_low": share.low, f"{name}_high": share.high}
    return found


def _probes(
    dictionary: Dictionary, acts_PD: Array, codes_PF: Array, y_P: Array, groups: Sequence[Any], settings: Settings
) -> dict[str, Any]:
    """Held-out accuracy of linear probes on the residual, on the codes, and along difference-of-means directions.

    Fitted to the first rows, which have a group.
    """
    n_fit = len(groups)
    directions_FD = dictionary.sae.W_dec.detach().cpu().numpy()
    residual = fit_probe(acts_PD[:n_fit, None], y_P[:n_fit], groups, seed=settings.seed)
    coded = fit_code_probe(codes_PF[:n_fit], directions_FD, y_P[:n_fit], groups, seed=settings.seed)
    found: dict[str, Any] = {
        "probe_residual": float((residual.predict(acts_PD[n_fit:, None]) == y_P[n_fit:]).mean()),
        "probe_codes": float((coded.predict(codes_PF[n_fit:]) == y_P[n_fit:]).mean()),
    }
    guessed = mean_differences(acts_PD[:n_fit], y_P[:n_fit], acts_PD[n_fit:])
    return found | {"probe_means": float((guessed == y_P[n_fit:]).mean())}


def _recovered(losses: pd.DataFrame, weights_RS: Array) -> dict[str, Any]:
    """Share of the loss that zeros would cost which the reconstruction does not cost."""
    gap_S = (losses["zero"] - losses["clean"]).to_numpy()
    cost_S = (losses["spliced"] - losses["clean"]).to_numpy()
    share = _share(cost_S, gap_S, weights_RS)
    found = {name: float(losses[name].mean()) for name in ("clean", "spliced", "zero")}
    return {f"loss_{k}": v for k, v in found.items()} | {
        "loss_recovered": share.value,
        "loss_low": share.low,
        "loss_high": share.high,
    }


def _some(frame: pd.DataFrame, per_emotion: int) -> pd.DataFrame:
    return frame.groupby("emotion").head(per_emotion)


def _splice_table(
    lm: LM, test: pd.DataFrame, dictionaries: Mapping[int, Dictionary], labels: Sequence[str], settings: Settings
) -> dict[int, dict[str, Any]]:
    """What splicing the reconstruction in at the read-out does to label scores and to calibrated answers."""
    rows = _some(test, settings.splice_rows_per_emotion)
    prompts = scoring.build_prompts(lm, rows, template=settings.template, labels=labels)
    scores_PRE = splice_scores(lm, prompts, dictionaries)
    prior_E = scoring.label_prior(lm, template=settings.template, labels=labels)
    gold_P = gold_indices(rows, labels)
    clean_PE = scores_PRE[:, -1]
    right_P = scoring.predict(scoring.calibrate(clean_PE, prior_E)) == gold_P
    weights_RP = stats.bootstrap_weights(len(rows), settings.bootstraps, settings.seed)
    found = {}
    for i, layer in enumerate(sorted(dictionaries)):
        change_P = np.abs(scores_PRE[:, i] - clean_PE).mean(axis=1)
        low, high = stats.interval(weights_RP @ change_P / len(rows))
        right_now_P = scoring.predict(scoring.calibrate(scores_PRE[:, i], prior_E)) == gold_P
        same_P = scores_PRE[:, i].argmax(axis=1) == clean_PE.argmax(axis=1)
        found[layer] = {
            "score_change": float(change_P.mean()),
            "score_change_low": float(low),
            "score_change_high": float(high),
            "accuracy_clean": float(right_P.mean()),
            "accuracy_spliced": float(right_now_P.mean()),
            "accuracy_change": float(right_now_P.mean() - right_P.mean()),
            "same_answer": float(same_P.mean()),
        }
    return found


def _kept_error(
    lm: LM, test: pd.DataFrame, dictionaries: Mapping[int, Dictionary], labels: Sequence[str], settings: Settings
) -> float:
    """Greatest change of any label score when the dictionary's error is added back, nats."""
    prompts = scoring.build_prompts(lm, _some(test, 1), template=settings.template, labels=labels)
    scores_PRE = splice_scores(lm, prompts, dictionaries, keep_error=True)
    return float(np.abs(scores_PRE[:, :-1] - scores_PRE[:, -1:]).max())


def _training_facts(dictionary: Dictionary) -> dict[str, Any]:
    """What was recorded when a dictionary was made; empty for a published one."""
    record = dictionary.sae.cfg.metadata.held_out_mix or {}
    return {f"mix_{k}": v for k, v in record.items()}


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """Each bar with the worst layer, and how many layers pass.

    Returns:
        Columns `bar`, `needed`, `worst`, `worst_layer`, `passing`, `layers`, `met`.
    """
    ratio = table["probe_codes"] / table["probe_residual"]
    checks: list[tuple[str, pd.Series, str, float]] = [
        ("variance explained, read-out", table["read_out_variance"], ">=", BARS["read_out_variance"]),
        ("active features, read-out", table["read_out_l0"], "<=", BARS["read_out_l0"]),
        ("probe on codes / probe on residual", ratio, ">=", BARS["probe_ratio"]),
        ("change of label scores (nats)", table["score_change"], "<=", BARS["score_change"]),
        ("change of accuracy", table["accuracy_change"].abs(), "<=", BARS["accuracy_change"]),
        ("variance explained, running text", table["running_variance"], ">=", BARS["running_variance"]),
        ("cross-entropy recovered", table["loss_recovered"], ">=", BARS["loss_recovered"]),
    ]
    medians = [("variance explained, read-out, median layer", table["read_out_variance"])]
    # The same on prompts and texts of the training sources that training never saw; a published dictionary has none.
    if "mix_read_out_variance" in table and table["mix_read_out_variance"].notna().all():
        mix, running = table["mix_read_out_variance"], table["mix_running_variance"]
        checks += [
            ("variance explained, read-out, held-out mix", mix, ">=", BARS["read_out_variance"]),
            ("variance explained, running text, held-out mix", running, ">=", BARS["running_variance"]),
        ]
        medians.append(("variance explained, read-out, held-out mix, median layer", mix))
    rows = []
    for name, values, sign, bar in checks:
        worst = int(values.idxmin() if sign == ">=" else values.idxmax())
        passing = int((values >= bar).sum() if sign == ">=" else (values <= bar).sum())
        at = int(table.loc[worst, "layer"])
        rows.append((name, f"{sign} {bar:g}", float(values[worst]), at, passing, len(values), passing == len(values)))
    for name, values in medians:
        median = float(values.median())
        met = median >= MEDIAN_READ_OUT_VARIANCE
        rows.append((name, f">= {MEDIAN_READ_OUT_VARIANCE:g}", median, -1, int(met), 1, met))
    columns = ["bar", "needed", "worst", "worst_layer", "passing", "layers", "met"]
    return pd.DataFrame(rows, columns=columns)


def stability(lm: LM, dictionaries: Mapping[int, Dictionary], source: str = "") -> pd.DataFrame:
    """Best decoder cosine of every feature with a dictionary trained from another seed, and with a random one.

    The second seed's dictionaries lie beside the others in `seed_1`; layers without one are left out.

    Returns:
        One row per layer, kind ("another seed", "random") and feature: `cosine`.
    """
    folder = (Path(source) if source else shipped_dir(lm.name)) / "seed_1"
    if not folder.is_dir():
        return pd.DataFrame(columns=["layer", "kind", "feature", "cosine"])
    chosen = [layer for layer in available_layers(lm, str(folder)) if layer in dictionaries]
    others = load_dictionaries(lm, str(folder), layers=chosen, check=False)
    parts = []
    for layer in chosen:
        acts_PD = torch.zeros((2, lm.d_model))
        for kind, other in (("another seed", others[layer]), ("random", random_dictionary(others[layer], acts_PD, 1))):
            cosine_F = partners(dictionaries[layer], other)
            parts.append(
                pd.DataFrame({"layer": layer, "kind": kind, "feature": np.arange(len(cosine_F)), "cosine": cosine_F})
            )
    return pd.concat(parts, ignore_index=True)


def run(
    models: Sequence[str],
    settings: Settings,
    *,
    saes: str = "",
    layers: Sequence[int] = (),
    dataset: str = "emoscenes",
    dtype: str | None = None,
    device: str = "auto",
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any], dict[str, Any]]:
    """Measure the dictionaries of several models.

    Returns:
        The table of layers, the table of seed stability, facts by model, and the recipe of the training text by model
        (empty where none is recorded).
    """
    tables, partners_of, facts, recipes = [], [], {}, {}
    for name in models:
        lm = load_model(name, dtype=dtype, device=device)
        # A folder or release belongs to the first model; the others show what is shipped for them.
        source = saes if name == models[0] else ""
        dictionaries = load_dictionaries(lm, source, layers=list(layers) or None)
        found = measure(lm, dictionaries, settings, dataset)
        tables.append(found.layers.assign(model=name, depth=found.layers["layer"] / (lm.n_layers - 1)))
        partners_of.append(stability(lm, dictionaries, source).assign(model=name))
        facts[name] = dict(found.facts)
        recipe = (Path(source) if source else shipped_dir(name)) / "recipe.json"
        recipes[name] = read_json(recipe) if recipe.is_file() else {}
    return pd.concat(tables, ignore_index=True), pd.concat(partners_of, ignore_index=True), facts, recipes


def save(
    table: pd.DataFrame, partners_table: pd.DataFrame, facts: Mapping[str, Any], settings: Settings, out: Path
) -> pd.DataFrame:
    """Write the results of the chapter and return the verdicts of every model."""
    verdict = pd.concat(
        [verdicts(own.reset_index(drop=True)).assign(model=name) for name, own in table.groupby("model", sort=False)],
        ignore_index=True,
    )
    write_table(out / "layers.parquet", table)
    write_table(out / "stability.parquet", partners_table)
    write_table(out / "verdicts.parquet", verdict)
    write_json(out / "facts.json", {"models": facts, "settings": asdict(settings)})
    return verdict
