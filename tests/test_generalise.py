"""Transfer of gains: planted effects are found where they are, chance is chance, and the words follow the tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from emosae_utils import data, files, generalise, ledger, plots, repair, stats
from emosae_utils.data import EMOTIONS
from emosae_utils.files import EmosaeError
from emosae_utils.generalise import EVERY, LOST, OTHERS, SAME, VERSUS, Learnt, Settings, Study
from emosae_utils.models import LM
from emosae_utils.repair import CALIBRATED, GAIN, RAW
from emosae_utils.saes import Dictionary
from tests.test_difficulty import planted_frame
from tests.test_saes import basis

SETTINGS = Settings(
    examples=2,
    draws=2,
    rows_per_emotion=12,
    n_units=30,
    neutral_texts=2,
    steps=1,
    top=10,
    shuffles=10,
    bootstraps=200,
)


def answers(dataset: str, method: str, right: float, labels: Sequence[str], draw: int = 0, **more: Any) -> pd.DataFrame:
    """Answers to 40 texts of each emotion: in every group the given share is right, and the rest one label off."""
    rows = []
    for k, emotion in enumerate(labels):
        for i in range(40):
            # Ten groups, each with four texts of every emotion.
            pred = emotion if i // 10 < 4 * right else labels[(k + 1) % len(labels)]
            rows.append((f"{dataset}/{emotion}/{i}", f"{dataset}/{i % 10}", emotion, pred))
    said = pd.DataFrame(rows, columns=["row_id", "group", "gold", "pred"]).assign(confidence=right, method=method)
    facts = {"examples": 0, "draw": draw, "calibrated": False, "strength": 1.0, "units": 0, "target": ""}
    return said.assign(model="m", dataset=dataset, **(facts | more))


def planted_predictions(
    worth: dict[tuple[str, str], float], base: float = 0.25, calibrated: float = 0.5, labels: Sequence[str] = EMOTIONS
) -> pd.DataFrame:
    """Accuracy by (source, target) of raw gains; calibrated gains are as good as calibration alone."""
    parts = []
    for target in dict.fromkeys(t for _, t in worth):
        parts.append(answers(target, RAW, base, labels))
        parts.append(answers(target, CALIBRATED, calibrated, labels, calibrated=True))
        for (source, _), right in ((k, v) for k, v in worth.items() if k[1] == target):
            for draw in range(2):
                key: dict[str, Any] = {"examples": 2, "target": source}
                parts.append(answers(target, GAIN, right, labels, draw, **key))
                parts.append(answers(target, GAIN, calibrated, labels, draw, **key, calibrated=True))
    return pd.concat(parts, ignore_index=True)


WORTH = {
    ("a", "a"): 1.0, ("a", "b"): 0.75, ("a", "c"): 0.25,
    ("b", "a"): 0.0, ("b", "b"): 0.75, ("b", "c"): 0.5,
    ("c", "a"): 0.25, ("c", "b"): 0.25, ("c", "c"): 0.25,
}  # fmt: skip


def planted_learnt(
    dataset_seed: int,
    causal_seed: int = 0,
    *,
    labels: Sequence[str] = EMOTIONS,
    strength: float = 1.0,
    n_each: int = 8,
    n_units: int = 400,
    text_seed: int | None = None,
) -> Learnt:
    """Units of two layers; ten for each emotion, chosen by `causal_seed`, lower its score on its own texts.

    Each of them varies from text to text in a way of its own, given by `text_seed`; the rest is noise of a dataset.
    """
    rng = np.random.default_rng([1, dataset_seed])
    n = n_each * len(labels)
    y_P = np.repeat(np.arange(len(labels)), n_each)
    effects_PEU = rng.normal(size=(n, len(labels), n_units)).astype(np.float32) * 0.1
    order = np.random.default_rng([2, causal_seed]).permutation(n_units)
    own = np.random.default_rng([3, dataset_seed if text_seed is None else text_seed])
    # The planted units of an emotion do not depend on which other emotions there are.
    wave = {e: own.normal(size=(n_each, 10)) for e in EMOTIONS}
    for k, emotion in enumerate(labels):
        at = order[10 * EMOTIONS.index(emotion) :][:10]
        effects_PEU[np.ix_(y_P == k, np.array([k]), at)] -= strength * (1 + 0.5 * wave[emotion])[:, None]
    pairs = np.stack([np.repeat([3, 7], n_units // 2), np.tile(np.arange(n_units // 2), 2)], axis=1)
    return Learnt((), tuple(labels), pairs, tuple(f"row/{p}" for p in range(n)), y_P, effects_PEU)


@pytest.fixture(scope="module")
def transfer() -> pd.DataFrame:
    return generalise.transfer_table(generalise.transfer_samples(planted_predictions(WORTH), SETTINGS))


def cell(table: pd.DataFrame, source: str, target: str, versus: str) -> pd.Series:
    here = table[(table["source"] == source) & (table["target"] == target) & (table["versus"] == versus)]
    assert len(here) == 1
    return here.iloc[0]


# Gains on other datasets.


def test_changes_have_the_sign_of_what_was_planted(transfer: pd.DataFrame) -> None:
    raw, free, both = VERSUS
    for (source, target), right in WORTH.items():
        # With wrong answers one label off, macro-F1 is the share that is right.
        assert cell(transfer, source, target, raw)["value"] == pytest.approx(right - 0.25)
        assert cell(transfer, source, target, free)["value"] == pytest.approx(right - 0.5)
        assert cell(transfer, source, target, both)["value"] == pytest.approx(0.0)


def test_means_over_others_leave_the_source_out(transfer: pd.DataFrame) -> None:
    raw = next(iter(VERSUS))
    assert cell(transfer, "a", OTHERS, raw)["value"] == pytest.approx((0.5 + 0.0) / 2)
    assert cell(transfer, "b", OTHERS, raw)["value"] == pytest.approx((-0.25 + 0.25) / 2)
    assert cell(transfer, EVERY, OTHERS, raw)["value"] == pytest.approx((0.5 + 0 - 0.25 + 0.25 + 0 + 0) / 6)
    assert cell(transfer, EVERY, SAME, raw)["value"] == pytest.approx((0.75 + 0.5 + 0) / 3)
    gap = cell(transfer, EVERY, LOST, raw)
    assert gap["value"] == pytest.approx(0.5 / 6 - 1.25 / 3)
    # A mean of samples, not of ends of intervals.
    samples = generalise.transfer_samples(planted_predictions(WORTH), SETTINGS)
    others = np.mean([samples["m", "a", t, raw] for t in ("b", "c")], axis=0)
    assert cell(transfer, "a", OTHERS, raw)["low"] == pytest.approx(stats.interval(others[1:])[0])


def test_intervals_cover_groups_and_draws() -> None:
    said = planted_predictions({k: v for k, v in WORTH.items() if "c" not in k})
    # One of two draws of the gains of a is useless on b: the interval reaches from nothing to the full effect.
    useless = (said["method"] == GAIN) & (said["target"] == "a") & (said["dataset"] == "b") & (said["draw"] == 1)
    flat = answers("b", RAW, 0.25, EMOTIONS)["pred"].to_numpy()
    said.loc[useless & ~said["calibrated"], "pred"] = flat
    table = generalise.transfer_table(generalise.transfer_samples(said, SETTINGS))
    row = cell(table, "a", "b", "over no steering")
    assert row["value"] == pytest.approx(0.25) and row["low"] == pytest.approx(0.0) and row["high"] > 0.45


def test_claims_rest_on_all_pairs_and_are_accepted_by_the_ledger(transfer: pd.DataFrame, tmp_path: Path) -> None:
    made = generalise.claims(transfer)
    assert [c.part for c in made[:4]] == ["", *VERSUS]
    assert len(made) == 4 + 3 * 3 and {c.claim for c in made} == {"C7"}
    ledger.save_claims(tmp_path / "generalisation", made)
    found = ledger.read_ledger(tmp_path)
    assert (found[found["claim"] == "C7"]["model"] == "m").all()
    # Calibrated gains are worth nothing beyond calibration, so the whole cannot be supported.
    by_part = {c.part: c for c in made}
    assert by_part["on top of calibration"].verdict == stats.NOT_SUPPORTED == made[0].verdict
    assert by_part["from a, over no steering"].effect == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("right", "verdict"), [(1.0, stats.SUPPORTED), (0.5, stats.NOT_SUPPORTED), (0.0, stats.NOT_SUPPORTED)]
)
def test_the_verdict_follows_what_was_planted(right: float, verdict: str) -> None:
    said = planted_predictions({(s, t): right for s in "ab" for t in "ab"})
    better = (said["method"] == GAIN) & said["calibrated"]
    if right == 1.0:
        said.loc[better, "pred"] = said.loc[better, "gold"]
    table = generalise.transfer_table(generalise.transfer_samples(said, SETTINGS))
    assert generalise.claims(table)[0].verdict == verdict


def test_a_target_without_an_emotion_is_measured_on_the_rest() -> None:
    five = [e for e in EMOTIONS if e != "surprise"]
    said = pd.concat(
        [
            planted_predictions({("a", "a"): 1.0, ("b", "a"): 0.75}),
            planted_predictions({("a", "b"): 0.75, ("b", "b"): 1.0}, labels=five),
        ]
    )
    table = generalise.transfer_table(generalise.transfer_samples(said, SETTINGS))
    assert cell(table, "a", "b", "over no steering")["value"] == pytest.approx(0.5)


# Causal features on several datasets.


def test_planted_causal_features_are_found() -> None:
    found = planted_learnt(0)
    order = np.random.default_rng([2, 0]).permutation(400)
    sets = generalise.causal_sets(found, 10)
    for k, emotion in enumerate(EMOTIONS):
        assert sets[emotion] == frozenset(map(tuple, found.pairs[order[10 * k :][:10]].tolist()))
    # Only what lowers the score is causal: with the sign turned, none of the planted ones is left.
    turned = generalise.causal_sets(replace(found, effects_PEU=-found.effects_PEU), 10)
    assert not any(sets[e] & turned[e] for e in EMOTIONS)
    everything = generalise.causal_sets(found, 10**6)
    effects_EU = generalise.causal_effects(found)
    assert all(len(everything[e]) == (effects_EU[k] < 0).sum() < 400 for k, e in enumerate(EMOTIONS))


def test_effects_are_own_texts_less_the_others() -> None:
    found = planted_learnt(0)
    effects_EU, k = generalise.causal_effects(found), 2
    own = found.y_P == k
    expected = found.effects_PEU[own, k].mean(axis=0) - found.effects_PEU[~own, k].mean(axis=0)
    np.testing.assert_allclose(effects_EU[k], expected, rtol=1e-4)
    other = np.random.default_rng(0).permutation(found.y_P)
    assert not np.allclose(generalise.causal_effects(found, other)[k], expected, rtol=0.1)


def overlaps(first: Learnt, second: Learnt, **changes: Any) -> pd.DataFrame:
    learnt = {("m", "one"): first, ("m", "two"): second}
    table = generalise.overlap_table(learnt, replace(SETTINGS, **changes))
    return table[table["first"] != table["second"]].set_index("emotion")


def test_identical_sets_overlap_fully_and_unrelated_ones_by_chance() -> None:
    same = overlaps(planted_learnt(0), planted_learnt(0))
    assert (same["value"] == 1).all() and np.allclose(same["rank_correlation"], 1) and (same["both"] == 10).all()
    planted = overlaps(planted_learnt(0), planted_learnt(1))
    assert (planted["value"] > 0.8).all() and (planted["value"] > planted["shuffled_high"]).all()
    # 10 of 400: random sets share a quarter of a feature.
    assert planted["chance"].between(0.005, 0.03).all()
    none = overlaps(planted_learnt(0, 0), planted_learnt(1, 1))
    assert none["value"].mean() < 0.06 and abs(none["rank_correlation"].mean()) < 0.1
    assert (none["value"] <= none["shuffled_high"]).mean() > 0.5


def test_shuffled_labels_show_what_loud_units_do_anyway() -> None:
    """Units that sway every score are in the sets of any labels; random sets of units do not know that."""
    first, second = (planted_learnt(seed, strength=0.0) for seed in (0, 1))
    for found in (first, second):
        found.effects_PEU[:, :, :20] *= 30
    table = overlaps(first, second, shuffles=40)
    assert table["value"].mean() > 4 * table["chance"].mean()
    assert abs(table["value"].mean() - table["shuffled"].mean()) < 0.15
    assert (table["value"] <= table["shuffled_high"]).mean() > 0.5


def test_sources_that_lack_an_emotion_or_units_are_compared_on_the_rest() -> None:
    whole = planted_learnt(0)
    five = planted_learnt(1, labels=[e for e in EMOTIONS if e != "surprise"])
    part = replace(five, pairs=five.pairs[100:], effects_PEU=five.effects_PEU[:, :, 100:])
    table = overlaps(whole, part)
    assert set(table.index) == set(EMOTIONS) - {"surprise"}
    order = np.random.default_rng([2, 0]).permutation(400)
    for k, emotion in enumerate(EMOTIONS[:2]):
        planted = set(order[10 * k :][:10].tolist())
        assert table.loc[emotion, "both"] >= len([u for u in planted if u >= 100]) - 1
    apart = replace(five, pairs=five.pairs + 1000)
    learnt = {("m", "one"): whole, ("m", "two"): apart}
    table = generalise.overlap_table(learnt, SETTINGS)
    assert (table["first"] == table["second"]).all()
    assert "no two datasets" in generalise.overlap_finding(table, "m")
    plt.close(plots.generalisation_overlap(table))


def test_halves_share_no_text_and_hold_every_emotion() -> None:
    found = planted_learnt(0)
    first, second = generalise.halves(found)
    assert not set(first.row_ids) & set(second.row_ids)
    assert set(first.row_ids) | set(second.row_ids) == set(found.row_ids)
    for half in (first, second):
        assert (np.bincount(half.y_P) == 4).all() and half.effects_PEU.shape == (24, 6, 400)
    table = generalise.overlap_table({("m", "one"): found}, SETTINGS)
    assert (table["first"] == "one").all() and (table["second"] == "one").all() and (table["value"] > 0.5).all()


# Two models.


def matches(first: Learnt, second: Learnt) -> pd.DataFrame:
    learnt = {("m", "one"): first, ("n", "one"): second}
    return generalise.match_table(learnt, SETTINGS).set_index("emotion")


def test_features_that_follow_the_same_texts_are_matched() -> None:
    """The second model has its features elsewhere, but they rise and fall with the same texts."""
    table = matches(*(planted_learnt(seed, seed, text_seed=5, strength=2.0) for seed in (0, 1)))
    assert set(table.index) == set(EMOTIONS) and (table["features"] == 10).all()
    assert (table["value"] > 0.8).all() and (table["value"] > table["same_emotion_high"]).all()
    assert (table["same_emotion"] > table["any_high"]).all()


def test_features_that_only_share_the_emotion_fall_to_the_chance_within_emotions() -> None:
    table = matches(planted_learnt(0, 0, text_seed=5), planted_learnt(1, 1, text_seed=6))
    assert (table["value"] > table["any_high"]).all()
    assert abs(table["value"].mean() - table["same_emotion"].mean()) < 0.05


def test_shuffled_texts_take_the_match_away() -> None:
    first, second = (planted_learnt(seed, seed, text_seed=5) for seed in (0, 1))
    own, other = (np.random.default_rng([2, seed]).permutation(400)[:10] for seed in (0, 1))
    texts = np.random.default_rng(0).permutation(48)
    best = generalise._best(first.effects_PEU[:, :, own], second.effects_PEU[:, :, other])
    assert generalise._best(first.effects_PEU[texts][:, :, own], second.effects_PEU[:, :, other]) < 0.5 * best
    assert generalise._best(first.effects_PEU[:, :, own], first.effects_PEU[:, :, own]) == pytest.approx(1)


def test_other_texts_or_one_model_give_no_matches() -> None:
    first = planted_learnt(0)
    assert matches(first, replace(first, row_ids=first.row_ids[::-1])).empty
    assert generalise.match_table({("m", "one"): first}, SETTINGS).empty
    assert "One model alone" in generalise.match_finding(generalise.match_table({("m", "one"): first}, SETTINGS))


# The page.


def page(models: Sequence[str], datasets: Sequence[str]) -> tuple[Study, dict[str, pd.DataFrame]]:
    """A study of planted tables, as the page gets it."""
    rng = np.random.default_rng(0)
    parts, learnt = [], {}
    for m, model in enumerate(models):
        worth = {(s, t): float(rng.choice([0.0, 0.25, 0.5, 0.75])) for s in datasets for t in datasets}
        parts.append(planted_predictions(worth).assign(model=model))
        for d, dataset in enumerate(datasets):
            labels = EMOTIONS if d < 3 else [e for e in EMOTIONS if e != "surprise"]
            learnt[model, dataset] = planted_learnt(10 * m + d, m, strength=0.15, labels=labels, text_seed=d)
    found = {key: replace(x, steerings=(_steering(key[0]),)) for key, x in learnt.items()}
    study = Study(found, pd.concat(parts, ignore_index=True), ("xed",), ("Left out: goemotions has too few",))
    transfer = generalise.transfer_table(generalise.transfer_samples(study.predictions, SETTINGS))
    tables = {
        "transfer": transfer,
        "overlap": generalise.overlap_table(learnt, SETTINGS),
        "matches": generalise.match_table(learnt, SETTINGS),
    }
    return study, tables


def _steering(model: str) -> Any:
    from emosae_utils.steering import Steering

    return Steering(model, {}, {3: np.array([1.0, 0.5, 2.0])})


@pytest.mark.parametrize(("models", "datasets"), [(["m", "n"], list("abcd")), (["m"], list("ab"))])
def test_figures_and_words_hold_for_many_and_for_few(models: list[str], datasets: list[str]) -> None:
    study, tables = page(models, datasets)
    drawn = [
        plots.generalisation_transfer(tables["transfer"]),
        plots.generalisation_means(tables["transfer"]),
        plots.generalisation_overlap(tables["overlap"]),
        plots.generalisation_matches(tables["matches"]),
    ]
    for figure in drawn:
        figure.canvas.draw()
        plt.close(figure)
    # A panel for each model and comparison, a text for each cell.
    panels = drawn[0].axes
    assert len(panels) == 3 * len(models) and len(panels[0].texts) == len(datasets) ** 2
    assert panels[-1].get_xlabel() == "measured on" and panels[0].get_ylabel() == "learnt on"
    said = [generalise.setting(study, SETTINGS), generalise.match_finding(tables["matches"])]
    for model in models:
        said += [generalise.transfer_finding(tables["transfer"], model)]
        said += [generalise.overlap_finding(tables["overlap"], model)]
    assert not any("nan" in text for text in said)
    assert "xed" in said[0] and "Left out: goemotions" in said[0]
    assert ("Without surprise: d;" in said[0]) == (len(datasets) == 4)
    view = generalise.claim_view(tables["transfer"])
    assert len(view) == len(models) * (1 + len(datasets)) and list(view.columns) == [*VERSUS, "C7"]


def test_words_follow_the_tables(transfer: pd.DataFrame) -> None:
    text = generalise.transfer_finding(transfer, "m")
    assert "on average, +0.08 [" in text and f"C7 is **{stats.NOT_SUPPORTED}**" in text
    assert "of 6 pairs 2, 1 and 0 have their whole interval above zero, 1, 4 and 0 below" in text
    view = generalise.transfer_view(transfer, "over no steering")
    assert view.loc[("m", "a"), "b"].startswith("+0.50 [") and view.loc[("m", "a"), OTHERS].startswith("+0.25 [")
    planted = overlaps(planted_learnt(0), planted_learnt(1)).reset_index()
    assert "in 100% of 6 comparisons" in generalise.overlap_finding(planted, "m")


# The study.


Planted = tuple[LM, dict[int, Dictionary], dict[str, pd.DataFrame]]


@pytest.fixture
def two_sets(monkeypatch: pytest.MonkeyPatch, tiny: Callable[[str], LM]) -> Planted:
    """A tiny model with planted dictionaries, and two planted datasets."""
    lm = tiny("llama")
    frames = {name: planted_frame().assign(dataset=name) for name in ("first", "second")}
    for name, frame in frames.items():
        frame["row_id"] = name + "/" + frame["row_id"].astype(str)

    def load(name: str, **_: Any) -> Any:
        return data.Corpus(frames.get(name, frames["first"]), None, {}, "")  # type: ignore[arg-type]

    monkeypatch.setattr(generalise, "which_are_here", lambda names: ([n for n in names if n in frames], ("absent",)))
    for module in (generalise, repair):
        monkeypatch.setattr(module, "load_corpus", load)
    monkeypatch.setattr(generalise, "load_model", lambda *_, **__: lm)
    monkeypatch.setattr(generalise, "available_layers", lambda *_: (1, 2))
    found = {layer: Dictionary(layer, basis(lm, layer), "planted") for layer in (1, 2)}
    monkeypatch.setattr(generalise, "load_dictionaries", lambda *_, layers, **__: {x: found[x] for x in layers})
    return lm, found, frames


def test_a_study_runs_from_texts_to_claims(two_sets: Planted, tmp_path: Path) -> None:
    study = generalise.run_study(["tiny"], ["first", "second", "absent"], SETTINGS)
    assert study.absent == ("absent",) and not study.notes
    assert set(study.learnt) == {("tiny", "first"), ("tiny", "second")}
    for (_, dataset), found in study.learnt.items():
        assert found.effects_PEU.shape == (len(found.row_ids), 6, len(found.pairs))
        assert all(row.startswith(dataset) for row in found.row_ids) and len(found.steerings) == 2
        assert all(0 < s.n_units <= 30 for s in found.steerings)
        # Scores are less their mean over labels, so whatever a unit does to them sums to nothing.
        assert np.abs(found.effects_PEU.sum(axis=1)).max() < 1e-3 * np.abs(found.effects_PEU).max()
        # What stays in memory is gains, not directions.
        assert all(not s.basis and set(s.gains) <= {1, 2} for s in found.steerings)
    said = study.predictions.groupby(["dataset", "method", "calibrated", "target", "draw"]).size()
    # Two targets; without gains raw and calibrated, and two sources times two draws, raw and calibrated.
    assert len(said) == 2 * (2 + 2 * 2 * 2) and (said == 72).all()
    # Of a target come its test texts only, and gains are learnt without them.
    asked = set(study.predictions["row_id"])
    assert not asked & {row for found in study.learnt.values() for row in found.row_ids}
    tables = generalise.save(study, SETTINGS, tmp_path)
    assert len(ledger.read_ledger(tmp_path.parent)) and len(files.read_json(tmp_path / "claims.json")) == 4 + 2 * 3
    assert set(tables["transfer"]["versus"]) == set(VERSUS) and not tables["transfer"].isna().any().any()
    metrics = tables["metrics"]
    assert set(metrics["source"]) == {"", "first", "second"} and set(metrics["target"]) == {"first", "second"}
    again = files.read_table(tmp_path / "transfer.parquet")
    pd.testing.assert_frame_equal(again, tables["transfer"])


def test_the_effect_is_what_turning_a_unit_off_does_to_first_order(two_sets: Planted) -> None:
    from emosae_utils import scoring, steering

    settings = replace(SETTINGS, draws=1)
    study = generalise.run_study(["tiny"], ["first", "second"], settings, layers=[2])
    found = study.learnt["tiny", "first"]
    lm, dictionaries, frames = two_sets
    frame = frames["first"].set_index("row_id").loc[list(found.row_ids)].reset_index()
    prompts = scoring.build_prompts(lm, frame, template=settings.template, labels=found.labels)
    basis_of = steering.feature_basis(dictionaries)
    gains = np.ones((2, dictionaries[2].n_features))
    unit = int(np.abs(found.effects_PEU).max(axis=(0, 1)).argmax())
    step = 1e-2
    gains[1, found.pairs[unit, 1]] -= step
    trial = [steering.Steering(lm.name, basis_of, {2: g_K}) for g_K in gains]
    clean_PE, less_PE = steering.steered_scores(lm, prompts, trial, dictionaries)
    np.testing.assert_allclose((less_PE - clean_PE) / step, found.effects_PEU[:, :, unit], rtol=0.05, atol=2e-3)


def test_what_cannot_be_measured_is_refused_or_named(two_sets: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EmosaeError, match="transfer needs two datasets and 1 can be used; name more"):
        generalise.run_study(["tiny"], ["first"], SETTINGS)
    # A dataset with too few examples is left out by name; without it there is one.
    with pytest.raises(EmosaeError, match=r"0 can be used \(Left out: first has 72 discovery"):
        generalise.run_study(["tiny"], ["first", "second"], replace(SETTINGS, examples=1000))
    monkeypatch.setattr(generalise, "available_layers", lambda *_: ())
    with pytest.raises(EmosaeError, match="tiny has no dictionaries here; train them with"):
        generalise.run_study(["tiny"], ["first", "second"], SETTINGS)
