"""The chapter on causal tracing: effects of features and patches between prompts, the claims about them, their words.

`effects` holds the statistics of single features and sets; here are activation patching (what attention, FFN or the
stream carry from one text into another), the tests of the claims C3 and C4, and what runs and saves it all.

Shapes: P prompts, L layers, D width of the stream, E labels, R draws.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emosae_utils import browser, difficulty, effects, scoring, stats, tracing
from emosae_utils.codes import read_codes
from emosae_utils.data import load_corpus, which_are_here
from emosae_utils.effects import (
    ALL_ROWS,
    CONTRAST,
    CORRECT,
    EFFECT,
    EMOTION,
    EVERYTHING,
    KINDS,
    LABEL,
    PHASE_NAMES,
    WHOLE,
    Held,
    Job,
    Joint,
    Settings,
    margins,
    summary,
)
from emosae_utils.files import EmosaeError, write_json, write_table
from emosae_utils.flow import CODES, RESIDUAL, recentred
from emosae_utils.ledger import Claim, save_claims
from emosae_utils.models import LM, load_model
from emosae_utils.saes import Dictionary, available_layers, load_dictionaries
from emosae_utils.stats import NOT_SUPPORTED, SUPPORTED, UNDECIDED
from emosae_utils.tracing import Effects

Array = np.ndarray[Any, np.dtype[Any]]

CROSS, SAME_EMOTION, NEUTRAL = "other emotion", "same emotion", "neutral"
CONCENTRATED, DIFFUSE, RIVAL = ("surprise", "fear"), "disgust", "anger"
CLAIM_KEYS = ("claim", "model", "dataset", "part", "effect", "low", "high", "unit", "test", "verdict")

# Activation patching between prompts.


def choose_pairs(rows: pd.DataFrame, neutral: pd.DataFrame, labels: Sequence[str], settings: Settings) -> pd.DataFrame:
    """A fixed list of texts and donors: as many receiving texts of each emotion, donors of the others in turn.

    Donors come from the same topic where there is one, and of these from the same person and tense. Each receiving
    text has a donor of another emotion, another text of its own emotion and a neutral text.

    Returns:
        One row per receiving text: row, emotion, group, target (the donor's emotion), and the row positions of the
        donors under the names of the tasks; those of the neutral text count in `neutral`, -1 if there is none.
    """
    rng = np.random.default_rng(settings.seed)

    def nearest(to: Any, there: pd.DataFrame) -> int:
        score = sum((there[c] == to[c]).astype(float) * w for c, w in (("group", 4), ("person", 2), ("tense", 1)))
        return int(there.index[np.argmax(np.asarray(score) + 0.1 * rng.random(len(there)))]) if len(there) else -1

    rows, neutral, records = rows.reset_index(drop=True), neutral.reset_index(drop=True), []
    for emotion in labels:
        own, others = rows[rows["emotion"] == emotion], [e for e in labels if e != emotion]
        for i, at in enumerate(rng.permutation(own.index)[: settings.pairs_per_emotion]):
            text, target = rows.loc[at], others[i % len(others)]
            donors = {CROSS: nearest(text, rows[rows["emotion"] == target])}
            donors |= {SAME_EMOTION: nearest(text, own.drop(index=at)), NEUTRAL: nearest(text, neutral)}
            records.append({"row": int(at), "emotion": emotion, "group": text["group"], "target": target} | donors)
    return pd.DataFrame(records)


def patching(
    lm: LM, rows: pd.DataFrame, neutral: pd.DataFrame, labels: tuple[str, ...], settings: Settings
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Put what attention, FFN or the stream hold in a donor's prompt into another, layer by layer and in windows.

    A patch of the stream replaces all that came before it, so a window of several layers would equal its last one; the
    stream is patched at single layers only.

    Returns:
        Columns task, site, layer, window, value, low, high: how much of the clean difference between the emotional
        donor and the receiving text, in the score of the donor's emotion less that of the text's own, the patch moves;
        0 is nothing and 1 all of it. Controls are in units of the same difference. And the pairs.
    """
    pairs = choose_pairs(rows, neutral, labels, settings)
    wording: dict[str, Any] = {"template": settings.template, "labels": labels}
    rows = rows.reset_index(drop=True)
    prompts = scoring.build_prompts(lm, rows.loc[pairs["row"]], **wording)
    own_P, target_P = (pairs[c].map({e: k for k, e in enumerate(labels)}).to_numpy() for c in ("emotion", "target"))
    at_P = np.arange(len(pairs))
    names, group_P = np.unique(pairs["group"], return_inverse=True)
    drawn_RG = stats.bootstrap_weights(len(names), settings.bootstraps, settings.seed)
    w_RP = np.vstack([np.ones(len(pairs)), drawn_RG[:, group_P]])
    kinds = [(site, width) for site in ("attention", "ffn") for width in settings.windows] + [("residual", 1)]
    spans = [(site, layer, width) for site, width in kinds for layer in range(lm.n_layers)]
    records, gap_R = [], np.ones(len(w_RP))
    for task, source in ((CROSS, rows), (SAME_EMOTION, rows), (NEUTRAL, neutral.reset_index(drop=True))):
        if (pairs[task] < 0).any():
            continue
        donors = scoring.build_prompts(lm, source.loc[pairs[task]], **wording)
        read = scoring.read_out(lm, donors, layers=range(lm.n_layers), mode="first", parts=True)
        held = {"residual": read.resid_PLD, "attention": read.attn_PLD, "ffn": read.ffn_PLD}
        put = {site: np.asarray(x_PLD, dtype=float).transpose(1, 0, 2).copy() for site, x_PLD in held.items()}
        edits: list[Any] = []
        for site, layer, width in spans:
            window = range(max(0, layer - width // 2), min(lm.n_layers, layer + width // 2 + 1))
            edits.append([(i, site, "set", put[site][i]) for i in window])
        made = tracing.run_edits(lm, prompts, edits, progress=f"{lm.name}: patching, {task}")
        if task == CROSS:
            lead_P = (read.scores_PE[at_P, target_P] - read.scores_PE[at_P, own_P]) - (
                made.clean_PE[at_P, target_P] - made.clean_PE[at_P, own_P]
            )
            gap_R = w_RP @ lead_P
        moved_PR = made.effects_PRE[at_P, :, target_P] - made.effects_PRE[at_P, :, own_P]
        share_RX = (w_RP @ moved_PR) / gap_R[:, None]
        for (site, layer, width), draws_R in zip(spans, share_RX.T, strict=True):
            records.append({"task": task, "site": site, "layer": layer, "window": width} | summary(draws_R))
    return pd.DataFrame(records), pairs


# The claims. Each test is stated on the page before its result.


def _verdict(yes: bool, no: bool) -> str:
    return SUPPORTED if yes else NOT_SUPPORTED if no else UNDECIDED


def _overall(verdicts: Sequence[str]) -> str:
    """Supported if every part is, not supported if one is not, else undecided."""
    return next(v for v in (NOT_SUPPORTED, UNDECIDED, SUPPORTED) if v in verdicts)


def _below(draws_R: Array) -> tuple[dict[str, float], str]:
    """An effect that should be below zero: supported if its interval is, not supported if none of the interval is."""
    found = summary(draws_R)
    return found, _verdict(found["high"] < 0, found["low"] >= 0)


def claim_records(joint: Joint, numbers: Mapping[tuple[str, str], Array], kind: str = EMOTION) -> list[dict[str, Any]]:
    """C3 and C4 for one model: a record per part and one for the whole (part ""), without model and dataset.

    C3 is supported if (i) the set of at least four emotions of six (two in three) lowers the gold logit difference of
    its own held-out texts more than matched random sets, by intervals below zero, and (ii) these strengths differ
    between emotions: their spread exceeds 95 % of what the draws of topics give around equal strengths. It is not
    supported if (i) cannot be reached any more: too many emotions have no set, or an interval that is nowhere below
    zero.

    C4 is supported if every part is, not supported if one is not. Each part is an effect that should lie on one side
    of zero: supported if its interval does, not supported if none of it does.
    """
    labels, measure = joint.held.labels, EFFECT if kind == LABEL else CONTRAST
    records: list[dict[str, Any]] = []

    def add(claim: str, part: str, found: Mapping[str, float], unit: str, test: str, verdict: str) -> None:
        ends = {"effect": found["value"], "low": found["low"], "high": found["high"]}
        key = {"claim": claim, "part": part} | {k: float(v) if np.isfinite(v) else None for k, v in ends.items()}
        records.append(key | {"unit": unit, "test": test, "verdict": verdict})

    nothing = {"value": np.nan, "low": np.nan, "high": np.nan}
    strength = {e: joint.measured(kind, e, WHOLE, e)["difference"] for e in labels}
    size = {e: joint.size(kind, e) for e in labels}
    verdicts = []
    for e in labels:
        found, verdict = _below(strength[e]) if size[e] else (nothing, NOT_SUPPORTED)
        verdicts.append(verdict)
        test = f"the {kind} of {e} ({size[e]} features) lowers its gold logit difference more than random sets do"
        add("C3", f"drives {e}", found, "nats", test, verdict)
    wanted, n_yes = int(np.ceil(2 * len(labels) / 3)), verdicts.count(SUPPORTED)
    drives = _verdict(n_yes >= wanted, len(labels) - verdicts.count(NOT_SUPPORTED) < wanted)
    each_ER = np.array([strength[e] for e in labels])
    spread_R = each_ER.std(axis=0)
    around_R = (each_ER[:, 1:] - np.nanmean(each_ER[:, 1:], axis=1, keepdims=True)).std(axis=0)
    p = stats.permutation_p(float(spread_R[0]), around_R.tolist())
    spread = summary(np.concatenate([spread_R[:1], recentred(spread_R[0], spread_R[1:])]))
    differ = _verdict(p <= 0.05, False)
    test = f"the strengths of the sets differ between emotions (standard deviation; bootstrap p = {p:.3f})"
    add("C3", "emotions differ", spread, "nats", test, differ)
    number = {"value": float(n_yes), "low": np.nan, "high": np.nan}
    test = f"at least {wanted} of {len(labels)} {kind}s drive their emotion, and their strengths differ"
    whole = NOT_SUPPORTED if drives == NOT_SUPPORTED else _overall([drives, differ])
    add("C3", "", number, "emotions", test, whole)

    parts = []

    def judge(part: str, draws_R: Array, unit: str, test: str, needs: Sequence[str] = ()) -> None:
        """Judge a part on the side of zero that `test` names; undecided if a set that it `needs` is empty."""
        sign = 1 if test.endswith("below zero") else -1
        found, verdict = summary(draws_R), _below(sign * draws_R)[1]
        if not all(size[e] for e in needs):
            found, verdict, test = nothing, UNDECIDED, f"{test} (not tested: an empty set)"
        parts.append(verdict)
        add("C4", part, found, unit, test, verdict)

    rest = {e: [numbers[measure, o] for o in labels if o != e] for e in labels}
    if DIFFUSE in labels:
        gap_R = numbers[measure, DIFFUSE] - np.mean(rest[DIFFUSE], axis=0)
        judge("disgust diffuse", gap_R, "features", "effective number of disgust less that of the others: above zero")
        gap_R = strength[DIFFUSE] - np.mean([strength[e] for e in labels if e != DIFFUSE], axis=0)
        judge("disgust weak", gap_R, "nats", "change by the set of disgust less the others' mean: above zero")
    if {DIFFUSE, RIVAL} <= set(labels):
        shared_R = joint.measured(kind, DIFFUSE, WHOLE, RIVAL)["difference"]
        test = "the set of disgust on texts of anger, less random sets: below zero"
        judge("disgust shared with anger", shared_R, "nats", test, [DIFFUSE])
        test = "how far removing anger's set frees disgust on its texts, less the reverse: above zero"
        gap_R = overshadowing(joint, kind, DIFFUSE, RIVAL)
        judge("disgust overshadowed", gap_R, "nats", test, [DIFFUSE, RIVAL])
    for e in (e for e in CONCENTRATED if e in labels):
        gap_R = numbers[measure, e] - np.mean(rest[e], axis=0)
        judge(f"{e} concentrated", gap_R, "features", f"effective number of {e} less that of the others: below zero")
    if parts:
        test = f"all parts of the claim on disgust, surprise and fear hold, measured on the {kind}s"
        add("C4", "", nothing, "", test, _overall(parts))
    return records


def overshadowing(joint: Joint, kind: str, weak: str, strong: str) -> Array:
    """How much more the strong emotion's set keeps the weak one down than the reverse, [1 + draws], nats.

    Change of (own score less the other's) on own texts by removing the other's set, less random sets; of the weak
    emotion less that of the strong one.
    """
    held, found = joint.held, []
    for own, other in ((weak, strong), (strong, weak)):
        set_job, drawn = joint.at(kind, other, WHOLE)
        lead = [held.labels.index(own), held.labels.index(other)]
        moved = []
        for jobs in ([set_job], drawn):
            change_JPE = joint.scores_JPE[np.asarray(jobs, dtype=int)][:, :, lead] - held.clean_PE[:, lead]
            lead_P = (change_JPE[..., 0] - change_JPE[..., 1]).mean(axis=0) if len(jobs) else np.zeros(len(held.y_P))
            moved.append(held.mean(lead_P, held.keep(own)))
        found.append(moved[0] - moved[1])
    gap_R: Array = found[0] - found[1]
    return gap_R


# The chapter.


def read_phases(in_dir: Path, model: str, dataset: str, layers: Sequence[int], n_layers: int) -> tuple[list[int], str]:
    """First layers of the second and third phase, and where they come from.

    The best cut into three of the chapter on flow, on the codes or else the residual stream; equal thirds of the
    model where that chapter has none.
    """
    path = in_dir / "flow" / "phases.parquet"
    if path.is_file():
        found = pd.read_parquet(path)
        found = found[(found["model"] == model) & (found["dataset"] == dataset)]
        found = found[(found["what"] == "boundary") & (found["phases"] == len(PHASE_NAMES))]
        for place in (CODES, RESIDUAL):
            starts = found[found["representation"] == place].sort_values("name")["value"]
            if len(starts) == len(PHASE_NAMES) - 1:
                return [round(v) for v in starts], f"the cut into three of the chapter on flow, {place}"
    cuts = np.linspace(0, n_layers, len(PHASE_NAMES) + 1)[1:-1]
    return [int(np.ceil(c)) for c in cuts], "three equal thirds of the layers, as the chapter on flow has no cut"


@dataclass(frozen=True)
class Measured:
    """What one model shows on one dataset: tables by name, members of the sets, cards of the examples, and notes."""

    tables: Mapping[str, pd.DataFrame]
    sets: Mapping[str, Mapping[str, list[tuple[int, int]]]]
    cards: tuple[browser.FeatureCard, ...]
    phases: tuple[int, ...]
    phase_source: str
    notes: tuple[str, ...]


def _few(rows: pd.DataFrame, per_emotion: int, seed: int) -> pd.DataFrame:
    """A random few rows of each emotion, in the order they stand in; the index says which."""
    return rows.sample(frac=1.0, random_state=seed).groupby("emotion").head(per_emotion).sort_index()


def _texts(prompts: scoring.Prompts, index: Iterable[int]) -> scoring.Prompts:
    return replace(prompts, ids=tuple(prompts.ids[i] for i in index))


def examples(table: pd.DataFrame, found: Effects, held: Held) -> pd.DataFrame:
    """For each emotion the strongest feature of its set (of the label set if that is empty), on one held-out text.

    The feature is the one with the largest contrast in discovery, the text the one on which it is most active.
    Columns: emotion, kind, layer, feature, row_id, text, activation, before, after (gold logit difference, nats),
    answer, answer_after (after prior calibration).
    """
    records = []
    for k, emotion in enumerate(held.labels):
        own = table[table["emotion"] == emotion]
        kind, members = EMOTION, own[own["in_emotion"]].sort_values(CONTRAST)
        if members.empty:
            kind, members = LABEL, own[own["in_label"]].sort_values(EFFECT)
        for layer, feature in members[["layer", "feature"]].head(5).itertuples(index=False):
            here = (found.layer_N == layer) & (found.feature_N == feature) & (held.y_P[found.prompt_N] == k)
            if not here.any():
                continue
            n = np.flatnonzero(here)[np.argmax(found.activation_N[here])]
            p, scores_2E = found.prompt_N[n], np.array([held.clean_PE[found.prompt_N[n]], found.scores_NE[n]])
            before, after = margins(scores_2E)[:, k]
            said = [held.labels[i] for i in held.answers(scores_2E)]
            row = held.rows.iloc[p]
            records.append(
                {"emotion": emotion, "kind": kind, "layer": int(layer), "feature": int(feature)}
                | {"row_id": row["row_id"], "text": row["text"], "activation": float(found.activation_N[n])}
                | {"before": before, "after": after, "answer": said[0], "answer_after": said[1]}
            )
            break
    return pd.DataFrame(records)


def _part(found: Effects, index: Array, features: Mapping[int, Array] | None = None) -> Effects:
    """The effects on some prompts, renumbered, and of some features by layer."""
    place_P = np.full(len(found.clean_PE), -1)
    place_P[index] = np.arange(len(index))
    kept = place_P[found.prompt_N] >= 0
    if features is not None:
        wanted = pd.MultiIndex.from_tuples([(layer, f) for layer, fs in features.items() for f in fs])
        kept &= pd.MultiIndex.from_arrays([found.layer_N, found.feature_N]).isin(wanted)
    columns = {name: getattr(found, name)[kept] for name in ("layer_N", "feature_N", "activation_N", "scores_NE")}
    return replace(found, prompt_N=place_P[found.prompt_N[kept]], clean_PE=found.clean_PE[index], **columns)


def _operations(
    lm: LM,
    dictionaries: Mapping[int, Dictionary],
    prompts: scoring.Prompts,
    table: pd.DataFrame,
    found: Effects,
    put: Mapping[str, Mapping[int, Array]],
    held: Held,
    settings: Settings,
) -> pd.DataFrame:
    """Compare zero ablation with what `put` names, on a few held-out texts, for members and the top features.

    `put` has by operation and layer what is put in place: "mean" [features], "resample" [held-out prompts, features].
    """
    few = _few(held.rows, settings.operation_rows_per_emotion, settings.seed).index.to_numpy()
    ranked = table.groupby("emotion")[EFFECT].rank() <= settings.operation_top
    wanted_X = ranked | table["in_label"] | table["in_emotion"]
    chosen = effects.by_layer(table.loc[wanted_X, ["layer", "feature"]].drop_duplicates())
    by_name = {"zero": _part(found, few, chosen)}
    for name, values in put.items():
        here = {layer: x if name == "mean" else x[few] for layer, x in values.items()}
        by_name[name] = tracing.ablate_features(
            lm,
            _texts(prompts, few),
            dictionaries,
            operation="mean" if name == "mean" else "resample",
            values=here,
            features={layer: members.tolist() for layer, members in chosen.items()},
            progress=f"{lm.name}: {name} ablation",
        )
    return effects.operation_table(by_name, table.assign(top=ranked), held.y_P[few])


def _ladder(
    lm: LM,
    dictionaries: Mapping[int, Dictionary],
    prompts: scoring.Prompts,
    found: Effects,
    held: Held,
    settings: Settings,
) -> pd.DataFrame:
    """Agreement of the estimates with exact effects on a few texts: method, by, n, spearman, overlap, slope."""
    few = _few(held.rows, settings.ladder_rows_per_emotion, settings.seed).index.to_numpy()
    exact, part, parts = _part(found, few), _texts(prompts, few), []
    for estimate in (tracing.attribution, tracing.integrated_gradients):
        guess = estimate(lm, part, dictionaries, progress=f"{lm.name}: {estimate.__name__}")
        for by in ("prompt", "layer"):
            agreed = tracing.agreement(exact, guess, gold_P=held.y_P[few], by="prompt" if by == "prompt" else "layer")
            parts.append(agreed.rename(columns={by: "index"}).assign(by=by, method=guess.method))
    return pd.concat(parts, ignore_index=True)


def with_model(
    lm: LM,
    dictionaries: Mapping[int, Dictionary],
    rows: difficulty.Rows,
    neutral: pd.DataFrame,
    settings: Settings,
    in_dir: Path,
) -> Measured:
    """Trace one model on one dataset.

    Args:
        lm: the model.
        dictionaries: by layer.
        rows: discovery texts (`fit`) and held-out texts (`measure`).
        neutral: held-out texts without emotion, for the patching control; may be empty.
        settings: sample sizes, levels and seed.
        in_dir: where the chapter on flow has left its phases, if it has run.
    """
    labels = difficulty.label_set(rows)
    wording: dict[str, Any] = {"template": settings.template, "labels": labels}
    fit, measure = (scoring.build_prompts(lm, part, **wording) for part in (rows.fit, rows.measure))
    null_rows = _few(rows.fit, settings.null_rows_per_emotion, settings.seed)
    found = tracing.ablate_features(lm, fit, dictionaries, progress=f"{lm.name}: discovery")
    turned = {layer: effects.other_directions(d, settings.seed) for layer, d in dictionaries.items()}
    null = tracing.ablate_features(
        lm, _texts(fit, null_rows.index), dictionaries, directions=turned, progress=f"{lm.name}: other directions"
    )
    table = effects.select(found, null, rows.fit, null_rows, settings)
    del found, null, turned
    single = tracing.ablate_features(lm, measure, dictionaries, progress=f"{lm.name}: held-out")
    prior_E = scoring.label_prior(lm, **wording)
    held = effects.make_held(rows.measure, labels, single.clean_PE, prior_E, settings)
    table = effects.held_columns(table, single, held, max(settings.top))
    phases, source = read_phases(in_dir, lm.name, rows.dataset, sorted(dictionaries), lm.n_layers)
    jobs = effects.make_jobs(table, phases, labels, settings)
    joint = effects.run_jobs(lm, measure, dictionaries, jobs, held, progress=f"{lm.name}: sets")
    whole = [job for job in jobs if job.part == WHOLE and job.kind in KINDS]
    # With nothing to keep, everything goes to its mean.
    whole = [replace(job, everywhere=False) for job in whole] + [Job(EVERYTHING, "", WHOLE, -1, {}, 0.0, True)]
    codes = read_codes(lm, measure, dictionaries, rows.measure)
    fitted = read_codes(lm, fit, dictionaries, rows.fit)
    means = {layer: fitted.dense(layer).mean(axis=0) for layer in dictionaries}
    kept = effects.run_jobs(lm, measure, dictionaries, whole, held, means=means, progress=f"{lm.name}: only the set")
    donors_P = np.roll(np.random.default_rng(settings.seed).permutation(len(codes)), 1)
    put = {"mean": means, "resample": {layer: codes.dense(layer)[donors_P] for layer in dictionaries}}
    spread, numbers = effects.concentration(table, single, held, settings)
    claims = [r | {"kind": k} for k in KINDS for r in claim_records(joint, numbers, k)]
    patched, pairs = patching(lm, rows.measure, neutral, labels, settings)
    noise = tracing.noise_floor(lm, _texts(measure, range(2)), seed=settings.seed)
    shown = examples(table, single, held)
    chosen = list(dict.fromkeys(zip(shown.get("layer", []), shown.get("feature", []), strict=True)))
    acting = table.assign(effect=table["held_effect"])[["layer", "feature", "emotion", "effect"]]
    found_cards = browser.make_cards(
        lm, dictionaries, codes, chosen, effects=acting, template=settings.template, n_texts=2
    )
    parts = {
        "selection": table,
        "sets": effects.set_table(table, joint),
        "matrix": effects.matrix_table(joint),
        "phases": effects.part_table(joint, KINDS, PHASE_NAMES),
        "recovery": effects.part_table(joint, (EFFECT, CONTRAST), [f"top {k}" for k in settings.top]),
        "sufficiency": effects.keep_table(kept),
        "everything": effects.everything_table(joint),
        "concentration": spread,
        "layers": effects.layer_table(table),
        "operations": _operations(lm, dictionaries, measure, table, single, put, held, settings),
        "ladder": _ladder(lm, dictionaries, measure, single, held, settings),
        "patching": patched,
        "pairs": pairs,
        "noise": pd.DataFrame([asdict(noise) | {"said": str(noise)}]),
        "examples": shown,
        "claims": pd.DataFrame(claims),
    }
    members = effects.causal_sets(table, labels)
    listed = {k: {e: list(map(tuple, members[k, e].to_numpy().tolist())) for e in labels} for k in KINDS}
    return Measured(parts, listed, found_cards, tuple(phases), source, single.notes)


@dataclass(frozen=True)
class Study:
    """Every model on every dataset that is here, by (model, dataset), and what was left out and why."""

    measured: Mapping[tuple[str, str], Measured]
    absent: tuple[str, ...]
    notes: tuple[str, ...]


def run_study(
    models: Sequence[str],
    datasets: Sequence[str],
    settings: Settings,
    *,
    in_dir: Path = Path("results"),
    saes: str = "",
    dtype: str | None = None,
    device: str = "auto",
) -> Study:
    """Trace every model that has dictionaries on every dataset that is here, one model in memory at a time.

    Args:
        models: model names; the first is the one the text speaks of.
        datasets: names or paths.
        settings: sample sizes, levels and seed.
        in_dir: where earlier chapters have left their results.
        saes: where the dictionaries are, as for `load_dictionaries`.
        dtype: arithmetic of the unedited part; each profile's own if None.
        device: as for `load_model`.

    Raises:
        EmosaeError: if no model has a dictionary, no dataset is present, or a layer has no dictionary.
    """
    here, absent = which_are_here(datasets)
    sizes = difficulty.Settings(
        rows_per_emotion=settings.held_rows_per_emotion,
        fit_rows_per_emotion=settings.rows_per_emotion,
        seed=settings.seed,
    )
    chosen: list[tuple[difficulty.Rows, pd.DataFrame]] = []
    for dataset in here:
        frame = load_corpus(dataset, emotions=None).frame
        neutral = frame[(frame["emotion"] == "neutral") & (frame["split"] != "discovery")]
        chosen.append((difficulty.choose_rows(frame, sizes), neutral.reset_index(drop=True)))
    measured: dict[tuple[str, str], Measured] = {}
    notes: list[str] = []
    for model in dict.fromkeys(models):
        lm = load_model(model, dtype=dtype, device=device)
        if not (have := available_layers(lm, saes)):
            notes.append(f"{model} has no dictionaries; train them with `emosae train-saes --model {model}`")
            continue
        dictionaries = load_dictionaries(lm, saes, layers=list(settings.layers) or have)
        for rows, neutral in chosen:
            measured[model, rows.dataset] = with_model(lm, dictionaries, rows, neutral, settings, in_dir)
        # Two models need not fit into memory together.
        del lm, dictionaries
        gc.collect()
    if not measured:
        raise EmosaeError(notes[0] if notes else "no model was named; set `model`")
    return Study(measured, absent, tuple(notes))


def save(study: Study, settings: Settings, out_dir: Path) -> dict[str, pd.DataFrame]:
    """Write the chapter's tables as parquet into `out_dir` and return them by name; all have model and dataset.

    Also writes `sets.json` (members by model, dataset, kind and emotion), `claims.json` (on the emotion sets; the
    label sets' parts are in `claims.parquet`), `cards.json` and `settings.json`.
    """
    kept: dict[str, list[pd.DataFrame]] = {}
    for (model, dataset), m in study.measured.items():
        for name, table in m.tables.items():
            kept.setdefault(name, []).append(table.assign(model=model, dataset=dataset))
    tables = {name: pd.concat(parts, ignore_index=True) for name, parts in kept.items()}
    for name, table in tables.items():
        write_table(out_dir / f"{name}.parquet", table)
    sets: dict[str, dict[str, Any]] = {}
    for (model, dataset), m in study.measured.items():
        sets.setdefault(model, {})[dataset] = m.sets
    write_json(out_dir / "sets.json", sets)
    claims = tables["claims"][tables["claims"]["kind"] == EMOTION][list(CLAIM_KEYS)].astype(object)
    save_claims(out_dir, [Claim(**row) for row in claims.where(claims.notna(), None).to_dict("records")])
    browser.save_cards(out_dir / "cards.json", [card for m in study.measured.values() for card in m.cards])
    phases = {f"{model} on {dataset}": list(m.phases) for (model, dataset), m in study.measured.items()}
    left_out = {"absent": list(study.absent), "notes": list(study.notes), "phases": phases}
    write_json(out_dir / "settings.json", asdict(settings) | left_out)
    return tables


# The chapter's words: every number, and every verdict on it, comes from the tables.


def _range(row: Any, prefix: str = "", sign: str = "+") -> str:
    """As "-0.31 [-0.40, -0.22]", nats."""
    value, low, high = (float(row[f"{prefix}{k}"]) for k in ("value", "low", "high"))
    if not np.isfinite(value):
        return "not measured"
    return f"{value:{sign}.2f}" + (f" [{low:{sign}.2f}, {high:{sign}.2f}]" if np.isfinite(low) else " (no interval)")


def here(tables: Mapping[str, pd.DataFrame], name: str, model: str) -> pd.DataFrame:
    """A table's rows of one model, on the first dataset."""
    table = tables[name]
    return table[(table["model"] == model) & (table["dataset"] == table["dataset"].iloc[0])] if len(table) else table


def rows_note(study: Study, settings: Settings) -> str:
    """What was traced, where phases come from, and what was left out."""
    n_labels = {d: m.tables["sets"]["emotion"].nunique() for (_, d), m in study.measured.items()}
    texts = "; ".join(
        f"{d}: at most {settings.rows_per_emotion * n} discovery, {settings.held_rows_per_emotion * n} held-out texts"
        for d, n in n_labels.items()
    )
    lines = [f"**Texts.** {texts}, as many of each emotion."]
    for (model, dataset), m in study.measured.items():
        line = f"**Phases** of {model} on {dataset}: from layers {m.phases[0]} and {m.phases[1]} on ({m.phase_source})."
        lines.append(line + "".join(f" Note: {note}." for note in m.notes))
    lines += [f"Not on this machine: {', '.join(study.absent)}."] if study.absent else []
    return "\n\n".join([*lines, *(f"{note}." for note in study.notes)])


def noise_finding(tables: Mapping[str, pd.DataFrame], model: str) -> str:
    """How far rounding moves an effect, beside the size of effects."""
    effect_X = here(tables, "selection", model).query("in_label or in_emotion")["held_effect"].abs()
    size = f"{effect_X.median():.1e} nats" if len(effect_X) else "nothing, as the sets are empty"
    said = here(tables, "noise", model)["said"].iloc[0]
    return f"**{model}**: {said}. The median member of a set changes its label by {size}."


def selection_finding(tables: Mapping[str, pd.DataFrame], model: str) -> str:
    """How many features are in the sets, and how many of the label features carry the word alone."""
    table, sets = here(tables, "selection", model), here(tables, "sets", model).query("rows == @ALL_ROWS")
    parts = []
    for kind in KINDS:
        own = sets[sets["kind"] == kind]
        sizes = ", ".join(f"{r.emotion} {r.size}" for r in own[["emotion", "size"]].itertuples(index=False))
        parts.append(f"{kind}s: {sizes} (of {own['tested'].min()} to {own['tested'].max()} tested)")
    label = table[table["in_label"]]
    both = float(label["in_emotion"].mean()) if len(label) else float("nan")
    share = f"{both:.1%} of the memberships in label sets are also in the emotion set" if len(label) else ""
    line = f"**{model}**. {parts[0]}. {parts[1]}. {share}"
    if len(label):
        alike = float((label["elsewhere"] / label["effect"]).median())
        line += f"; the median member of a label set has {alike:.0%} of its effect on texts of other emotions as well"
    empty = sets.query("kind == @EMOTION and size == 0")["emotion"].tolist()
    return f"{line}." + (f" No feature is in the emotion set of {', '.join(empty)}." if empty else "")


def sets_finding(tables: Mapping[str, pd.DataFrame], model: str) -> str:
    """What joint ablation of each set does on held-out texts, with flips, and on the rows answered correctly."""
    sets, lines = here(tables, "sets", model), []
    for kind in KINDS:
        parts = []
        for row in sets[(sets["kind"] == kind) & (sets["rows"] == ALL_ROWS) & (sets["size"] > 0)].to_dict("records"):
            parts.append(
                f"{row['emotion']} {_range(row)} (random {_range(row, 'random_')}; answers changed {row['flips']:.0%} "
                f"against {row['flips_random']:.0%})"
            )
        lines.append(f"{kind}s: {'; '.join(parts) or 'all empty'}")
    right = sets[(sets["kind"] == EMOTION) & (sets["rows"] == CORRECT) & (sets["size"] > 0)]
    said = "; ".join(f"{r['emotion']} {_range(r)}, {r['texts']} texts" for r in right.to_dict("records"))
    return (
        f"**{model}**, change of the gold logit difference in nats. {lines[0]}. {lines[1]}. On the texts answered "
        f"correctly after prior calibration, emotion sets: {said or 'none'}."
    )


def recovery_finding(tables: Mapping[str, pd.DataFrame], model: str) -> str:
    """What the largest top set takes, and how few features take half of it."""
    table, lines = here(tables, "recovery", model), []
    for order in (EFFECT, CONTRAST):
        parts = []
        for emotion, line in table[table["kind"] == order].groupby("emotion", sort=False):
            most = line.loc[line["value"].idxmin()]
            if most["value"] >= 0:
                parts.append(f"{emotion} never below zero")
                continue
            half = line[line["value"] <= most["value"] / 2].iloc[0]
            parts.append(f"{emotion} {_range(most)} with {most['features']}, half of it with {half['features']}")
        lines.append(f"ranked by {order}: {'; '.join(parts)}")
    whole = here(tables, "everything", model).to_dict("records")
    said = ", ".join(f"{r['emotion']} {_range(r)}" for r in whole)
    return f"**{model}**, the deepest points: {lines[0]}. {lines[1]}. Removing every feature at once: {said}."


def named_tests(tables: Mapping[str, pd.DataFrame], model: str) -> str:
    """Disgust and anger in both directions, and surprise against all."""
    matrix = here(tables, "matrix", model).set_index(["kind", "set", "text"])
    labels, lines = list(dict.fromkeys(here(tables, "matrix", model)["text"])), []
    surprise = CONCENTRATED[0]
    pairs = [(DIFFUSE, RIVAL), (RIVAL, DIFFUSE)]
    pairs += [pair for e in labels if e != surprise for pair in ((surprise, e), (e, surprise))]
    for kind in KINDS:
        parts = [
            f"Δ({a}→{b}) {_range(matrix.loc[(kind, a, b)], 'difference_')}"
            for a, b in pairs
            if {a, b} <= set(labels) and matrix.loc[(kind, a, b), "features"] > 0
        ]
        lines.append(f"{kind}s: {', '.join(parts) or 'all empty'}")
    return f"**{model}**, less random sets, nats. {'. '.join(lines)}."


def phases_finding(tables: Mapping[str, pd.DataFrame], model: str) -> str:
    """In which phase each emotion's set acts."""
    table, parts = here(tables, "phases", model), []
    for emotion, own in table[table["kind"] == EMOTION].groupby("emotion", sort=False):
        said = ", ".join(
            f"{r['part']} {_range(r, 'difference_')} ({r['features']} features)"
            for r in own.to_dict("records")
            if r["features"]
        )
        parts.append(f"{emotion}: {said or 'no features'}")
    return f"**{model}**, emotion sets less random sets, nats. {'; '.join(parts)}."


def sufficiency_finding(tables: Mapping[str, pd.DataFrame], model: str) -> str:
    """How much of the gold logit difference comes back with a set alone."""
    table, lines = here(tables, "sufficiency", model), []
    for kind in KINDS:
        own = table[(table["kind"] == kind) & (table["features"] > 0)].to_dict("records")
        said = "; ".join(
            f"{r['emotion']} {_range(r)} (random {_range(r, 'random_')}, the whole model {r['clean']:+.2f})"
            for r in own
        )
        lines.append(f"{kind}s: {said or 'all empty'}")
    return f"**{model}**, gain over all features at their mean, nats. {'. '.join(lines)}."


def ladder_view(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Estimates against exact effects: medians over prompts of rank correlation, top-20 overlap and slope."""
    table = tables["ladder"][tables["ladder"]["by"] == "prompt"]
    return table.groupby(["model", "method"], sort=False)[["spearman", "overlap", "slope"]].median()


def operation_view(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Zero, mean and resample ablation: means over emotions of effect, rank correlation and slope against zero."""
    table = tables["operations"]
    shown = table[table["features"] > 0].groupby(["model", "kind", "operation"], sort=False)
    return shown[["value", "rank_correlation", "slope"]].mean()


def patching_finding(tables: Mapping[str, pd.DataFrame], model: str) -> str:
    """Where a patch carries most of the emotion, and how much the controls carry there."""
    table, parts = here(tables, "patching", model), []
    for (site, window), own in table.groupby(["site", "window"], sort=False):
        if site == "residual":
            line = own[own["task"] == CROSS].sort_values("layer")
            reached = line[line["low"] > 0.5]["layer"]
            parts.append(f"the stream carries half from layer {reached.min() if len(reached) else 'none'} on")
            continue
        most = own[own["task"] == CROSS].sort_values("value").iloc[-1]
        others = own[(own["layer"] == most["layer"]) & (own["task"] != CROSS)]
        controls = ", ".join(f"{r['task']} {_range(r)}" for r in others.to_dict("records"))
        width = "single layers" if window == 1 else f"{window} layers"
        parts.append(f"{site}, {width}: {_range(most)} at layer {most['layer']} ({controls})")
    return f"**{model}**, share of the clean difference: {'; '.join(parts)}."


def examples_note(tables: Mapping[str, pd.DataFrame], model: str) -> str:
    """One feature and one text per emotion, in words."""
    lines = []
    for row in here(tables, "examples", model).itertuples():
        turned = f"the answer stays {row.answer}" if row.answer == row.answer_after else "the answer changes from "
        turned += "" if row.answer == row.answer_after else f"{row.answer} to {row.answer_after}"
        lines.append(
            f"- **{row.emotion}**, feature L{row.layer}/{row.feature} of the {row.kind}, active at "
            f"{row.activation:.1f} on: *{row.text}* Without it the lead of {row.emotion} goes from "
            f"{row.before:+.2f} to {row.after:+.2f} nats; {turned}."
        )
    return f"**{model}**\n\n" + ("\n".join(lines) or "No set has a feature.")


def claim_finding(tables: Mapping[str, pd.DataFrame], model: str) -> str:
    """The verdicts on C3 and C4, on the emotion sets and beside them on the label sets."""
    table, lines = here(tables, "claims", model), []
    for claim in ("C3", "C4"):
        for kind in (EMOTION, LABEL):
            own = table[(table["claim"] == claim) & (table["kind"] == kind)]
            whole = own[own["part"] == ""]
            if whole.empty:
                continue
            parts = "; ".join(f"{r.part}: {r.verdict}" for r in own[own["part"] != ""].itertuples())
            beside = "" if kind == EMOTION else " (beside, not the verdict)"
            lines.append(f"**{claim}, {model}, {kind}s{beside}: {whole['verdict'].iloc[0]}.** {parts}.")
    return "\n\n".join(lines)


def claim_view(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Every part of the tests on the emotion sets, to read: effect with interval and unit, and verdict, by model."""
    own = tables["claims"][(tables["claims"]["kind"] == EMOTION) & (tables["claims"]["part"] != "")]
    ends = own[["effect", "low", "high"]].astype(float).rename(columns={"effect": "value"}).to_dict("records")
    cells = [f"{_range(r)} {unit}: {v}" for r, unit, v in zip(ends, own["unit"], own["verdict"], strict=True)]
    shown = own.assign(cell=cells).pivot_table(
        index=["claim", "part"], columns=["dataset", "model"], values="cell", aggfunc="first", sort=False
    )
    return shown.fillna("")
