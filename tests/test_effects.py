"""Causal sets on planted effects: what is planted is found and measured, and nothing is found where nothing is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from emosae_utils import causal, difficulty, effects, features, plots, tracing
from emosae_utils.data import EMOTIONS
from emosae_utils.effects import CONTRAST, EFFECT, EMOTION, LABEL, WHOLE, Job, Settings
from emosae_utils.files import EmosaeError, read_json, read_table
from emosae_utils.models import LM
from emosae_utils.scoring import build_prompts
from emosae_utils.stats import NOT_SUPPORTED, SUPPORTED, UNDECIDED
from emosae_utils.tracing import Effects
from tests.test_flow import crossed_frame
from tests.test_tracing import dictionaries

Array = np.ndarray[Any, np.dtype[Any]]
SETTINGS = Settings(permutations=300, draws=3, bootstraps=200, top=(1, 2, 5, 10))
N_LAYERS, N_FEATURES, AMOUNT, NOISE = 3, 60, 2.0, 0.1
# Of each emotion in each layer: two label features, which lower the label on all texts, and from layer 1 on two
# features of the reading, which lower it on texts of the emotion. The other features are noise.
LABEL_FEATURES = {e: (2 * k, 2 * k + 1) for k, e in enumerate(EMOTIONS)}
READING = {e: (20 + 2 * k, 21 + 2 * k) for k, e in enumerate(EMOTIONS)}


def frame(n_topics: int, seed: int = 0) -> pd.DataFrame:
    rows = crossed_frame(n_topics, seed)
    return rows[rows["row_id"].str[-1].astype(int) < 3].reset_index(drop=True)


ROWS = frame(12)


def planted(rows: pd.DataFrame, *, turned: bool = False, signal: float = 1.0, seed: int = 0) -> Effects:
    """Zero ablation of features that are active on most texts; along other directions there is only noise."""
    rng = np.random.default_rng(seed)
    n, y_P = len(rows), difficulty.gold_indices(rows, EMOTIONS)
    shape = (n, N_LAYERS, N_FEATURES)
    active_PLF = (rng.random(shape) < 0.8) * AMOUNT * rng.uniform(0.5, 1.5, shape)
    slope_PLFE = NOISE * (rng.standard_normal((1, *shape[1:], 6)) + 0.3 * rng.standard_normal((*shape, 6)))
    if not turned:
        for k, emotion in enumerate(EMOTIONS):
            slope_PLFE[:, :, LABEL_FEATURES[emotion], k] -= signal
            for f in READING[emotion]:
                slope_PLFE[:, 1:, f, k] = -signal * (y_P == k)[:, None] + 0.1 * NOISE * rng.standard_normal((n, 2))
    effect_PLFE = active_PLF[..., None] * slope_PLFE
    prompt_N, layer_N, feature_N = np.nonzero(active_PLF)
    clean_PE = rng.standard_normal((n, 6)) * 0.1 + 2.0 * np.eye(6)[y_P]
    found = effect_PLFE[prompt_N, layer_N, feature_N]
    scores_NE = clean_PE[prompt_N] + found - found.mean(axis=1, keepdims=True)
    return Effects(
        prompt_N, layer_N, feature_N, active_PLF[prompt_N, layer_N, feature_N], scores_NE, clean_PE, EMOTIONS,
        "zero", "exact", "difference", True,
    )  # fmt: skip


def selected(rows: pd.DataFrame = ROWS, settings: Settings = SETTINGS, **options: Any) -> pd.DataFrame:
    null = rows.groupby("emotion").head(12).sort_index()
    turned = planted(null, turned=True, seed=1)
    return effects.select(planted(rows, **options), turned, rows, null, settings)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return selected()


def members(table: pd.DataFrame, column: str, emotion: str) -> set[tuple[int, int]]:
    here = table[table[column] & (table["emotion"] == emotion)]
    return set(zip(here["layer"], here["feature"], strict=True))


def test_margins_are_gold_logit_differences() -> None:
    effects_NE = np.array([[1.0, 0.0, -1.0], [0.0, 3.0, 0.0]])
    np.testing.assert_allclose(effects.margins(effects_NE), [[1.5, 0.0, -1.5], [-1.5, 3.0, -1.5]])
    y_P, found = difficulty.gold_indices(ROWS, EMOTIONS), planted(ROWS)
    gold_N = effects.margins(found.effects_NE)[np.arange(len(found)), y_P[found.prompt_N]]
    np.testing.assert_allclose(gold_N, found.gold_effects(y_P), atol=1e-9)


def test_means_own_and_elsewhere_count_silent_texts() -> None:
    margin_PFE = np.zeros((4, 1, 2))
    margin_PFE[:, 0, 0], y_P = [-4.0, 0.0, -1.0, -2.0], np.array([0, 0, 1, 1])
    own_FE, elsewhere_FE = effects.own_and_elsewhere(margin_PFE, y_P)
    assert own_FE.tolist() == [[-2.0, 0.0]] and elsewhere_FE.tolist() == [[-1.5, 0.0]]


def test_planted_features_are_found_and_told_apart(table: pd.DataFrame) -> None:
    found, false = 0, 0
    for emotion in EMOTIONS:
        words = {(layer, f) for layer in range(3) for f in LABEL_FEATURES[emotion]}
        reading = {(layer, f) for layer in (1, 2) for f in READING[emotion]}
        label, emotional = (members(table, column, emotion) for column in ("in_label", "in_emotion"))
        assert words | reading <= label and reading <= emotional
        found += len(label) + len(emotional)
        false += len(label - words - reading) + len(emotional - reading)
    assert false / found <= 0.08
    one = table.query("layer == 1 and feature == 20 and emotion == 'anger'").iloc[0]
    # Removing 80 % x 2 on average at -1 per unit, and the mean of the other labels rises by a fifth of what is centred.
    assert one["effect"] == pytest.approx(-AMOUNT * 0.8, abs=0.25) and abs(one["elsewhere"]) < 0.1
    assert one["size"] == pytest.approx(AMOUNT * 0.8, abs=0.25) and one["frequency"] == pytest.approx(0.8, abs=0.2)
    assert one["per_unit"] == pytest.approx(-1.0, abs=0.15) and abs(one["null_mean"]) < 0.05
    assert one["q_emotion"] < 0.001 and one["q_label"] < 0.001


def test_without_signal_false_discoveries_stay_at_their_rate() -> None:
    """Labels dealt anew within topics leave no emotion set; noise along all directions leaves no label set."""
    hits_emotion, hits_label = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        order = ROWS.assign(at=rng.random(len(ROWS))).sort_values(["topic", "at"]).index
        dealt = ROWS.sort_values("topic", kind="stable").assign(emotion=ROWS.loc[order, "emotion"].to_numpy())
        dealt = dealt.sort_index()
        found = planted(ROWS, seed=seed)
        null = dealt.groupby("emotion").head(12).sort_index()
        table = effects.select(found, planted(null, turned=True, seed=50 + seed), dealt, null, SETTINGS)
        hits_emotion += [len(members(table, "in_emotion", e)) for e in EMOTIONS]
        flat = selected(signal=0.0, seed=100 + seed)
        hits_label += [len(members(flat, "in_label", e)) for e in EMOTIONS]
    # An emotion with any false member at all should be as rare as the level; 60 trials scatter by three per cent.
    assert np.mean(np.array(hits_emotion) > 0) <= 0.13
    assert np.mean(np.array(hits_label) > 0) <= 0.13


def test_tails_beyond_the_resolution_are_calibrated() -> None:
    rng = np.random.default_rng(0)
    p = np.concatenate([effects.lower_p(rng.standard_t(8, 4000), rng.standard_t(8, 300)) for _ in range(20)])
    for level in (0.05, 0.01, 1e-3):
        assert 0.4 * level < (p <= level).mean() < 2.0 * level
    assert (p <= 1e-5).mean() < 3e-4
    y_P, topic_P = np.repeat(np.arange(6), 36), np.tile(np.arange(12), 18)
    y_PR, fresh_PR = (features.permuted_labels(y_P, topic_P, n, seed) for n, seed in ((300, 1), (200, 2)))
    margin_PFE = ((rng.random((216, 60)) < 0.3) * rng.gamma(1.0, 1.0, (216, 60)))[:, :, None].repeat(6, axis=2)
    p = np.array([effects.contrast_p(margin_PFE, fresh_PR[:, r], y_PR) for r in range(40)])
    for level in (1e-2, 1e-3):
        assert (p <= level).mean() < 2.0 * level
    assert (p <= 1e-2).mean() > 0.5e-2


def test_the_selection_is_the_same_twice_and_refuses_other_labels(table: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(table, selected())
    null = replace(planted(ROWS), labels=tuple(reversed(EMOTIONS)))
    with pytest.raises(EmosaeError, match="cannot have a null on surprise, sadness"):
        effects.select(planted(ROWS), null, ROWS, ROWS, SETTINGS)


def test_rare_features_are_not_tested() -> None:
    table = selected(settings=replace(SETTINGS, min_active=len(ROWS) + 1))
    assert not table["in_label"].any() and table["p_emotion"].isna().all() and table["effect"].notna().all()


def test_concentration_in_closed_form() -> None:
    assert effects.gini(np.array([3.0, 3.0, 3.0, 3.0])) == pytest.approx(0.0)
    assert effects.gini(np.array([0.0, 0.0, 0.0, 5.0])) == pytest.approx(0.75)
    assert effects.gini(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / 9)
    assert effects.effective_number(np.array([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0)
    assert effects.effective_number(np.array([0.0, 7.0])) == pytest.approx(1.0)
    halves = effects.effective_number(np.array([[0.5, 0.25, 0.25], [1.0, 1.0, 1.0]]))
    assert halves == pytest.approx([2**1.5, 3.0])
    crossed = effects.crossed_weights(np.array([-1.0, -2.0, 3.0, 0.0]), np.array([[-4.0, 1.0, 2.0, 5.0]]))
    assert crossed.tolist() == [[4.0, 0.0, 2.0, 0.0]]


def held_of(rows: pd.DataFrame, found: Effects) -> effects.Held:
    return effects.make_held(rows, EMOTIONS, found.clean_PE, np.zeros(6), SETTINGS)


def test_held_out_values_and_concentration_of_planted_effects(table: pd.DataFrame) -> None:
    rows = frame(8, seed=5).assign(group=lambda x: "new " + x["group"], topic=lambda x: "new " + x["topic"])
    # The same features on new texts: slopes of noise features are redrawn, so only what is planted stays.
    found = planted(rows, seed=7)
    held = held_of(rows, found)
    known = effects.held_columns(table, found, held, 10)
    strong = known[known["in_emotion"]]
    assert (strong["held_contrast_high"] < 0).mean() > 0.9
    assert ((strong["held_contrast_low"] <= strong["held_contrast"]) & strong["held_contrast_low"].notna()).all()
    spread, numbers = effects.concentration(known, found, held, SETTINGS)
    number = spread.query("quantity == 'effective number'").set_index(["measure", "emotion"])
    for emotion in EMOTIONS:
        # Ten features lower the label, four of them the reading; the rest, 180 in all, is small noise.
        assert 9 < number.loc[(EFFECT, emotion), "value"] < 80
        assert 3.9 < number.loc[(CONTRAST, emotion), "value"] < number.loc[(EFFECT, emotion), "value"]
        assert number.loc[(CONTRAST, emotion), "null"] > 1.5 * number.loc[(CONTRAST, emotion), "value"]
        assert numbers[EFFECT, emotion][0] == number.loc[(EFFECT, emotion), "value"]
    layers = effects.layer_table(known).set_index(["layer", "emotion"])
    assert layers.loc[(0, "joy"), "emotion_set"] < 0.2 < 2.0 < layers.loc[(1, "joy"), "emotion_set"]


def test_random_counterparts_are_matched_and_disjoint(table: pd.DataFrame) -> None:
    own = effects.causal_sets(table, EMOTIONS)[EMOTION, "fear"]
    pool = table[table["emotion"] == "fear"]
    drawn = effects.matched(own, pool, 4, seed=3)
    size = pool.set_index(["layer", "feature"])["size"]
    for chosen in drawn:
        pairs = set(zip(chosen["layer"], chosen["feature"], strict=True))
        assert len(pairs) == len(chosen) == len(own)
        assert not pairs & set(zip(own["layer"], own["feature"], strict=True))
        assert sorted(chosen["layer"]) == sorted(own["layer"]) and sorted(chosen["rank"]) == list(range(len(own)))
        removed = size.reindex(pd.MultiIndex.from_frame(chosen[["layer", "feature"]])).sum()
        assert removed == pytest.approx(size.reindex(pd.MultiIndex.from_frame(own)).sum(), rel=0.25)
    again = effects.matched(own, pool, 4, seed=3)
    pd.testing.assert_frame_equal(drawn[2], again[2])


def planted_joint(strength: Mapping[str, float], *, spill: float = 0.0, seed: int = 0) -> effects.Joint:
    """Joint ablations of planted strength on own texts; `spill` is what disgust's set does to anger on its texts."""
    rng = np.random.default_rng(seed)
    held = held_of(ROWS, planted(ROWS))
    jobs, scores = [], []
    for kind in effects.KINDS:
        for own in EMOTIONS:
            for draw in (-1, 0, 1):
                jobs.append({"kind": kind, "emotion": own, "part": WHOLE, "draw": draw, "removed": 1.0, "features": 9})
                change_PE: Array = np.asarray(rng.standard_normal(held.clean_PE.shape)) * 0.05
                if draw < 0:
                    k = EMOTIONS.index(own)
                    change_PE[held.y_P == k, k] -= strength[own]
                    if own == "disgust":
                        change_PE[held.y_P == 0, 0] -= spill
                    if own == "anger":
                        change_PE[held.y_P == 1, 0] -= spill
                scores.append(held.clean_PE + change_PE)
    return effects.Joint(pd.DataFrame(jobs), np.array(scores), held)


def planted_numbers(value: Mapping[str, float]) -> dict[tuple[str, str], Array]:
    rng = np.random.default_rng(0)
    return {
        (m, e): np.concatenate([[value[e]], value[e] + rng.standard_normal(200)])
        for m in (EFFECT, CONTRAST)
        for e in EMOTIONS
    }


def test_the_claims_follow_what_is_planted() -> None:
    strength = {"anger": 2.0, "disgust": 0.5, "fear": 1.5, "joy": 1.0, "sadness": 2.5, "surprise": 1.8}
    number = {"anger": 50.0, "disgust": 90.0, "fear": 20.0, "joy": 60.0, "sadness": 50.0, "surprise": 10.0}
    joint = planted_joint(strength, spill=0.4)
    records = causal.claim_records(joint, planted_numbers(number))
    verdict = {(r["claim"], r["part"]): r["verdict"] for r in records}
    assert {r["claim"] for r in records} == {"C3", "C4"} and verdict["C3", ""] == SUPPORTED
    assert verdict["C3", "emotions differ"] == SUPPORTED and verdict["C3", "drives joy"] == SUPPORTED
    parts = {p: v for (c, p), v in verdict.items() if c == "C4" and p}
    # Anger's set frees disgust by .4 x 7/6 or so more than the reverse costs; all else is planted as claimed.
    assert {p: v for p, v in parts.items() if p != "disgust overshadowed"} == {
        "disgust diffuse": SUPPORTED, "disgust weak": SUPPORTED, "disgust shared with anger": SUPPORTED,
        "surprise concentrated": SUPPORTED, "fear concentrated": SUPPORTED,
    }  # fmt: skip
    by_part = {r["part"]: r for r in records}
    assert by_part["drives sadness"]["effect"] == pytest.approx(-2.5, abs=0.1)
    assert by_part["drives sadness"]["low"] <= by_part["drives sadness"]["effect"] <= by_part["drives sadness"]["high"]

    turned = causal.claim_records(
        planted_joint(dict.fromkeys(EMOTIONS, 0.0)), planted_numbers(dict.fromkeys(EMOTIONS, 50))
    )
    verdict = {(r["claim"], r["part"]): r["verdict"] for r in turned}
    assert verdict["C3", ""] != SUPPORTED and verdict["C4", ""] != SUPPORTED
    assert verdict["C4", "surprise concentrated"] in (UNDECIDED, NOT_SUPPORTED)
    swapped = number | {"disgust": 5.0, "surprise": 95.0}
    records = causal.claim_records(joint, planted_numbers(swapped))
    by_name = {r["part"]: r["verdict"] for r in records if r["claim"] == "C4"}
    assert by_name["disgust diffuse"] == by_name["surprise concentrated"] == by_name[""] == NOT_SUPPORTED


def test_an_empty_set_is_said_and_counts_against_the_claim() -> None:
    joint = planted_joint(dict.fromkeys(EMOTIONS, 1.0))
    jobs = joint.jobs.assign(features=joint.jobs["features"].where(~joint.jobs["emotion"].isin(EMOTIONS[:3]), 0))
    records = causal.claim_records(replace(joint, jobs=jobs), planted_numbers(dict.fromkeys(EMOTIONS, 50)))
    by_part = {r["part"]: r for r in records if r["claim"] == "C3"}
    assert by_part["drives anger"]["effect"] is None and by_part["drives anger"]["verdict"] == NOT_SUPPORTED
    assert by_part[""]["verdict"] == NOT_SUPPORTED


@pytest.fixture
def lm(tiny: Callable[[str], LM]) -> LM:
    return tiny("gemma3")


def test_sets_ablated_at_once_equal_their_edits(lm: LM, events: pd.DataFrame) -> None:
    found, prompts = dictionaries(lm), build_prompts(lm, events.head(3), labels=["anger", "joy", "fear"])
    sets: list[dict[int, Any]] = [{1: [0, 5, 7], 3: [2]}, {}, {2: list(range(48))}, {0: np.arange(20), 2: []}]
    ours = tracing.ablate_sets(lm, prompts, found, sets, batch_rows=2)
    rows: list[Any] = [[(k, int(f), "zero", None) for k, fs in s.items() for f in fs] for s in sets if s]
    full = tracing.run_edits(lm, prompts, rows, found)
    np.testing.assert_allclose(ours.scores_PRE[:, [0, 2, 3]], full.scores_PRE, atol=1e-4)
    np.testing.assert_array_equal(ours.scores_PRE[:, 1], ours.clean_PE)
    # Everything but the set to its value.
    values = {layer: np.linspace(0, 1, 48) for layer in found}
    kept = tracing.ablate_sets(lm, prompts, found, sets[:2], keep=True, values=values)
    rows = [
        [(k, f, "set", float(values[k][f])) for k in found for f in range(48) if f not in s.get(k, [])]
        for s in sets[:2]
    ]
    full = tracing.run_edits(lm, prompts, rows, found)
    np.testing.assert_allclose(kept.scores_PRE, full.scores_PRE, atol=1e-4)
    assert np.abs(kept.scores_PRE[:, 0] - kept.scores_PRE[:, 1]).max() > 1e-3
    for bad, message in (([], "no set to ablate"), ([{9: [1]}], "layer 9 has no dictionary"), ([{1: [48]}], "0 to 47")):
        with pytest.raises(EmosaeError, match=message):
            tracing.ablate_sets(lm, prompts, found, bad)


def test_removal_along_other_directions(lm: LM, events: pd.DataFrame) -> None:
    found, prompts = dictionaries(lm), build_prompts(lm, events.head(2), labels=["anger", "joy"])
    plain = tracing.ablate_features(lm, prompts, found, layers=[1, 2])
    rows = {layer: d.sae.W_dec.detach().numpy() for layer, d in found.items()}
    same = tracing.ablate_features(lm, prompts, found, layers=[1, 2], directions=rows)
    np.testing.assert_allclose(same.scores_NE, plain.scores_NE, atol=1e-5)
    turned = {layer: effects.other_directions(d, 0) for layer, d in found.items()}
    other = tracing.ablate_features(lm, prompts, found, layers=[1, 2], directions=turned)
    n = int(np.flatnonzero((other.prompt_N == 1) & (other.layer_N == 2))[0])
    f, a = other.feature_N[n], other.activation_N[n]
    added = tracing.run_edits(lm, prompts, [(2, "residual", "add", -a * turned[2][f])])
    np.testing.assert_allclose(other.scores_NE[n], added.scores_PRE[1, 0], atol=1e-4)
    # Lengths are kept and no feature keeps its own direction.
    np.testing.assert_allclose(np.linalg.norm(turned[1], axis=1), np.linalg.norm(rows[1], axis=1), rtol=1e-5)
    assert (np.abs(turned[1] - rows[1]).max(axis=1) > 1e-3).all()
    with pytest.raises(EmosaeError, match="layer 1 has none"):
        tracing.ablate_features(lm, prompts, found, layers=[1, 2], directions={2: rows[2]})
    with pytest.raises(EmosaeError, match="directions of layer 1 needs"):
        tracing.ablate_features(lm, prompts, found, layers=[1], directions={1: rows[1][:5]})


def test_pairs_are_balanced_and_matched() -> None:
    neutral = ROWS[ROWS["emotion"] == "joy"].assign(emotion="neutral")
    pairs = causal.choose_pairs(ROWS, neutral, EMOTIONS, SETTINGS)
    assert (pairs["emotion"].value_counts() == 5).all() and (pairs["emotion"] != pairs["target"]).all()
    assert (pairs.groupby("emotion")["target"].nunique() == 5).all()
    text, donor, same = (ROWS.loc[pairs[c]].reset_index(drop=True) for c in ("row", causal.CROSS, causal.SAME_EMOTION))
    assert (text["topic"] == donor["topic"]).all() and (text["person"] == donor["person"]).all()
    assert (donor["emotion"] == pairs["target"]).all()
    assert (same["emotion"] == text["emotion"]).all() and (same["row_id"] != text["row_id"]).all()
    pd.testing.assert_frame_equal(pairs, causal.choose_pairs(ROWS, neutral, EMOTIONS, SETTINGS))
    assert (causal.choose_pairs(ROWS, neutral.head(0), EMOTIONS, SETTINGS)[causal.NEUTRAL] == -1).all()


def test_a_patch_of_the_last_stream_carries_everything(lm: LM) -> None:
    neutral = ROWS[ROWS["emotion"] == "joy"].assign(emotion="neutral")
    settings = replace(SETTINGS, pairs_per_emotion=2, windows=(1, 3))
    moved, _ = causal.patching(lm, ROWS, neutral, EMOTIONS, settings)
    last = moved.query("task == @causal.CROSS and site == 'residual'").set_index("layer")["value"]
    assert last[lm.n_layers - 1] == pytest.approx(1.0, abs=1e-3)
    assert set(moved["task"]) == {causal.CROSS, causal.SAME_EMOTION, causal.NEUTRAL}
    assert len(moved) == 3 * lm.n_layers * (2 * 2 + 1)


def test_phases_come_from_the_flow_or_are_thirds(tmp_path: Path) -> None:
    assert causal.read_phases(tmp_path, "m", "d", range(30), 30)[0] == [10, 20]
    rows = [
        {
            "model": "m",
            "dataset": "d",
            "what": "boundary",
            "phases": 3,
            "representation": "codes",
            "name": name,
            "value": v,
        }
        for name, v in (("2", 14.0), ("1", 6.0))
    ]
    (tmp_path / "flow").mkdir()
    pd.DataFrame(rows).to_parquet(tmp_path / "flow" / "phases.parquet")
    assert causal.read_phases(tmp_path, "m", "d", range(30), 30) == (
        [6, 14], "the cut into three of the chapter on flow, codes",
    )  # fmt: skip
    assert "thirds" in causal.read_phases(tmp_path, "m", "other", range(30), 30)[1]


def test_from_prompts_to_files(lm: LM, tmp_path: Path) -> None:
    """The whole chapter on a tiny random model: every table, file and figure is made."""
    settings = Settings(
        rows_per_emotion=8, held_rows_per_emotion=4, null_rows_per_emotion=2, permutations=150, min_active=4, draws=2,
        top=(1, 4), operation_rows_per_emotion=1, operation_top=4, ladder_rows_per_emotion=1, pairs_per_emotion=1,
        windows=(1, 3), bootstraps=30,
    )  # fmt: skip
    rows = difficulty.Rows(
        "planted", ROWS.groupby("emotion").head(8).reset_index(drop=True),
        ROWS.groupby("emotion").tail(4).reset_index(drop=True),
    )  # fmt: skip
    found = dictionaries(lm)
    with torch.no_grad():
        measured = causal.with_model(lm, found, rows, ROWS.head(0), settings, tmp_path)
    tables = causal.save(causal.Study({(lm.name, "planted"): measured}, (), ()), settings, tmp_path)
    for name in ("selection", "sets", "matrix", "recovery", "phases", "sufficiency", "concentration", "patching"):
        assert len(read_table(tmp_path / f"{name}.parquet")) == len(tables[name]) > 0
    claims = read_json(tmp_path / "claims.json")
    assert all(tuple(sorted(c)) == tuple(sorted(causal.CLAIM_KEYS)) for c in claims)
    assert [c["claim"] for c in claims if c["part"] == ""] == ["C3", "C4"]
    sets = read_json(tmp_path / "sets.json")
    assert set(sets[lm.name]["planted"]) == {LABEL, EMOTION}
    assert set(tables["patching"]["task"]) == {causal.CROSS, causal.SAME_EMOTION}
    whole = tables["sets"].query("rows == 'all'").set_index(["kind", "emotion"])
    matrix = tables["matrix"].set_index(["kind", "set", "text"])
    assert matrix.loc[(LABEL, "joy", "joy"), "value"] == pytest.approx(whole.loc[(LABEL, "joy"), "value"])
    said = " ".join(
        [causal.sets_finding(tables, lm.name), causal.claim_finding(tables, lm.name), causal.rows_note(
            causal.Study({(lm.name, "planted"): measured}, ("isear",), ()), settings)]
    )  # fmt: skip
    assert "C3" in said and "nan" not in said
    for draw in (
        plots.tracing_features, plots.tracing_sets, plots.tracing_recovery, plots.tracing_matrix, plots.tracing_phases,
        plots.tracing_layers, plots.tracing_concentration, plots.tracing_sufficiency, plots.tracing_patching,
    ):  # fmt: skip
        plt.close(draw(tables, [lm.name]))


def test_a_job_on_one_emotion_leaves_the_others_alone(lm: LM) -> None:
    rows = ROWS.groupby("emotion").head(2).reset_index(drop=True)
    prompts, found = build_prompts(lm, rows, labels=EMOTIONS), dictionaries(lm)
    clean_PE = tracing.ablate_sets(lm, prompts, found, [{}]).clean_PE
    held = effects.make_held(rows, EMOTIONS, clean_PE, np.zeros(6), SETTINGS)
    jobs = [
        Job(LABEL, "fear", "early", -1, {1: np.array([3])}, 0.0, False),
        Job(LABEL, "joy", WHOLE, -1, {}, 0.0, True),
    ]
    joint = effects.run_jobs(lm, prompts, found, jobs, held)
    assert np.isnan(joint.scores_JPE[0]).all(axis=1).tolist() == (rows["emotion"] != "fear").tolist()
    np.testing.assert_allclose(joint.scores_JPE[1], clean_PE, atol=1e-5)
