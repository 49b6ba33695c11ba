"""Feature selection on planted dictionaries: what is planted is found where it is, and nothing where nothing is."""

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
from scipy.sparse import csr_array
from scipy.stats import gamma
from sklearn.metrics import mutual_info_score

from emosae_utils import difficulty, features, plots
from emosae_utils.codes import Codes, encode_residuals, load_codes
from emosae_utils.data import EMOTIONS
from emosae_utils.features import RESPONSIVE, SHARED, SPECIFIC, Settings
from emosae_utils.files import EmosaeError, read_json, read_table
from emosae_utils.models import LM
from emosae_utils.saes import Dictionary
from tests.test_difficulty import planted_frame
from tests.test_saes import basis

SETTINGS = Settings(
    permutations=300, shuffles=30, resamples=3, resample_permutations=120, bootstraps=200, templates=(), n_cards=0
)
N_FEATURES = 32
# Emotions of each planted feature, by layer and axis; layer 0 holds none, and the other axes are noise or topics.
PLANTED: dict[int, list[tuple[str, ...]]] = {
    0: [],
    1: [(e,) for e in EMOTIONS],
    2: [("anger", "disgust", "fear"), ("joy", "surprise", "fear"), ("joy", "sadness", "anger", "disgust")],
    3: [*((e,) for e in EMOTIONS), ("sadness", "disgust", "fear"), ("anger", "surprise", "sadness", "joy")] * 2,
}


def planted_codes(rows: pd.DataFrame, planted: Mapping[int, list[tuple[str, ...]]], seed: int = 0) -> np.ndarray:
    """Activations [prompts, layers, features]: planted ones, then features of single topics, then noise."""
    rng = np.random.default_rng(seed)
    active_PLF = (rng.random((len(rows), len(planted), N_FEATURES)) < 0.3) * rng.gamma(
        2, 0.5, (len(rows), 4, N_FEATURES)
    )
    topics = sorted(rows["group"].unique())
    for layer, sets in planted.items():
        for f, emotions in enumerate(sets):
            chance = np.where(rows["emotion"].isin(emotions), 0.8, 0.02)
            active_PLF[:, layer, f] = (rng.random(len(rows)) < chance) * rng.gamma(2, 0.5, len(rows))
        for f in range(20, 24):
            active_PLF[:, layer, f] = (rows["group"] == topics[f - 20]) * rng.gamma(2, 0.5, len(rows))
    return active_PLF.astype(np.float32)


def as_codes(active_PLF: np.ndarray, rows: pd.DataFrame) -> Codes:
    by_layer = {layer: csr_array(active_PLF[:, layer]) for layer in range(active_PLF.shape[1])}
    return Codes("planted", tuple(by_layer), by_layer, rows.reset_index(drop=True), EMOTIONS, np.zeros((len(rows), 6)))


@pytest.fixture
def lm(tiny: Callable[[str], LM]) -> LM:
    return tiny("llama")


def measure(
    lm: LM,
    monkeypatch: pytest.MonkeyPatch,
    frame: pd.DataFrame,
    planted: Mapping[int, list[tuple[str, ...]]] = PLANTED,
    settings: Settings = SETTINGS,
) -> features.Measured:
    """The whole chapter on a tiny model whose residuals at the read-out position are planted."""
    truth = {row_id: i for i, row_id in enumerate(frame["row_id"])}
    active_PLF = planted_codes(frame, planted)

    def read(lm: Any, prompts: Any, dictionaries: Mapping[int, Dictionary], rows: pd.DataFrame, **_: Any) -> Codes:
        by_layer = encode_residuals(dictionaries, active_PLF[[truth[i] for i in rows["row_id"]]])
        scores_PE = np.zeros((len(rows), len(prompts.labels)))
        return Codes(lm.name, tuple(by_layer), by_layer, rows.reset_index(drop=True), prompts.labels, scores_PE)

    monkeypatch.setattr(features, "read_codes", read)
    found = {layer: Dictionary(layer, basis(lm, layer), "planted") for layer in range(lm.n_layers)}
    rows = difficulty.choose_rows(frame, difficulty.Settings(rows_per_emotion=100, fit_rows_per_emotion=100))
    return features.with_model(lm, found, {"planted": rows}, settings)


def with_topic(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(topic=frame["group"])


def test_bins_share_equal_values_and_split_the_positive_ones() -> None:
    codes_PF = np.array(
        [[0.0, 1.0], [3.0, 1.0], [1.0, 1.0], [2.0, 0.0], [0.0, 0.0], [9.0, 2.0], [4.0, 0.0], [8.0, 0.0]]
    )
    bins_PF = features.activation_bins(codes_PF)
    assert bins_PF[:, 0].tolist() == [0, 2, 1, 1, 0, 3, 2, 3]
    # Three equal values: one bin, whatever the order of the rows.
    assert len(set(bins_PF[:3, 1])) == 1 and bins_PF[5, 1] == 3
    order = np.random.default_rng(0).permutation(len(codes_PF))
    np.testing.assert_array_equal(features.activation_bins(codes_PF[order]), bins_PF[order])


def test_information_is_the_plug_in_estimate_and_weights_are_repeats() -> None:
    rng = np.random.default_rng(0)
    y_P, codes_PF = rng.integers(0, 4, 120), (rng.random((120, 7)) < 0.4) * rng.random((120, 7))
    mi_F = features.mutual_information(codes_PF, y_P, 4)
    bins_PF = features.activation_bins(codes_PF)
    np.testing.assert_allclose(mi_F, [mutual_info_score(y_P, bins_PF[:, f]) for f in range(7)], atol=1e-9)
    weights_P = rng.integers(0, 3, 120)
    weighted_F = features.mutual_information(codes_PF, y_P, 4, weights_P)
    again = np.repeat(np.arange(120), weights_P)
    np.testing.assert_allclose(
        weighted_F, [mutual_info_score(y_P[again], bins_PF[again, f]) for f in range(7)], atol=1e-9
    )


def test_the_tail_of_the_null_is_calibrated() -> None:
    """Without signal, a p value below t turns up in a share of at most about t of the cases, rare features included."""
    rng = np.random.default_rng(0)
    y_P, topic_P = np.repeat(np.arange(6), 40), np.tile(np.arange(8), 30)
    codes_PF = (rng.random((240, 150)) < np.exp(rng.uniform(np.log(0.05), 0, 150))) * rng.gamma(1, 1, (240, 150))
    null_FR = features.permutation_null(codes_PF, features.permuted_labels(y_P, topic_P, 200, 1), 6)
    fresh_FR = features.permutation_null(codes_PF, features.permuted_labels(y_P, topic_P, 2000, 2), 6)
    p = np.array([features.p_values(fresh_FR[:, r], null_FR) for r in range(fresh_FR.shape[1])])
    for level in (1e-2, 1e-3, 1e-4):
        assert (p <= level).mean() < 1.8 * level
    assert (p <= 1e-3).mean() > 0.3e-3
    # The floor of the counted p values is far above what a thousand tests need; the tail goes below it.
    strong_F = null_FR.max(axis=1) * 3
    assert (features.p_values(strong_F, null_FR) < 1e-6).mean() > 0.9
    mean_F, var_F = null_FR.mean(axis=1), null_FR.var(axis=1)
    expected_F = gamma.sf(strong_F, mean_F**2 / var_F, scale=var_F / mean_F)
    np.testing.assert_allclose(features.p_values(strong_F, null_FR), np.minimum(expected_F, 1 / 201))


def test_labels_are_permuted_within_topics() -> None:
    """A feature of one topic is no emotion feature, even where that topic has mostly one emotion."""
    rng = np.random.default_rng(0)
    topic_P = np.repeat(np.arange(10), 40)
    y_P = np.where(topic_P == 3, np.where(rng.random(400) < 0.8, 0, rng.integers(0, 6, 400)), rng.integers(0, 6, 400))
    codes_PF = np.stack([(topic_P == 3) * rng.random(400), (y_P == 2) * rng.random(400)], axis=1)
    y_PR = features.permuted_labels(y_P, topic_P, 200, 0)
    for topic in range(10):
        own = topic_P == topic
        assert (np.sort(y_PR[own], axis=0) == np.sort(y_P[own])[:, None]).all()
    within, _ = features.select_layer(codes_PF, y_P, y_PR, EMOTIONS, SETTINGS)
    assert within["responsive"].tolist() == [False, True]
    freely = features.permuted_labels(y_P, np.zeros(400), 200, 0)
    across, _ = features.select_layer(codes_PF, y_P, freely, EMOTIONS, SETTINGS)
    assert across["responsive"].tolist() == [True, True]


def test_planted_features_are_found_with_their_layers_and_their_sharing(
    lm: LM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured = measure(lm, monkeypatch, with_topic(planted_frame()))
    table = measured.table.set_index(["layer", "feature"])
    planted = {(layer, f): emotions for layer, sets in PLANTED.items() for f, emotions in enumerate(sets)}
    found = set(table.index[table["responsive"]])
    assert set(planted) <= found and len(found - set(planted)) <= 2
    for where, emotions in planted.items():
        assert table.loc[where, "emotions"] == ", ".join(e for e in EMOTIONS if e in emotions), where
        assert table.loc[where, "kind"] == (SPECIFIC if len(emotions) == 1 else SHARED), where
        assert table.loc[where, "selected"] == 1.0
    assert measured.cut.natural and measured.cut.bic_gain > 0 and measured.cut.separation > 2

    study = features.Study({"planted": measured}, {"planted": rows_of(measured)}, (), ())
    tables = features.save(study, SETTINGS, tmp_path)
    counts = tables["counts"].query("set == @RESPONSIVE").set_index("layer")["features"]
    assert counts[0] <= 1 and [counts[layer] - len(PLANTED[layer]) for layer in (1, 2, 3)] <= [1, 1, 1]
    claims = tables["claims"].set_index("kind")
    assert claims["verdict"].tolist() == ["supported"] * 3
    assert claims.loc[SPECIFIC, "features"] >= 18 and claims.loc[SHARED, "features"] >= 7
    held = tables["replication"].query("measured_on == 'held-out'").set_index("set")
    assert (held.loc[list(EMOTIONS), "low"] > 0.3).all()
    stable = tables["stability"].set_index("set")
    assert stable.loc[RESPONSIVE, "value"] > 0.85 > 0.4 > stable.loc[RESPONSIVE, "chance"]
    active = tables["coactivation"].set_index(["set", "text"])["value"]
    assert all(active[e, e] == max(active[e, other] for other in EMOTIONS) for e in EMOTIONS)

    assert load_codes(tmp_path / "planted" / "codes").layers == (0, 1, 2, 3)
    assert set(read_table(tmp_path / "features.parquet").columns) >= {"model", "layer", "feature", "mi", "q", "kind"}
    written = read_json(tmp_path / "claims.json")
    assert [(c["claim"], c["part"], c["verdict"]) for c in written] == [
        ("C2", part, "supported") for part in (SPECIFIC, SHARED, "")
    ]
    assert all(c["low"] > 0 for c in written[:2]) and written[2]["effect"] is None
    said = features.claim_finding(tables["claims"], "planted") + features.selection_finding(tables, "planted", SETTINGS)
    assert "C2, planted: supported" in said and "greater" not in said and "nan" not in said
    assert "first layer with more than shuffled labels give is layer 1" in said


def rows_of(measured: features.Measured) -> difficulty.Rows:
    return difficulty.Rows("planted", measured.discovery.rows, measured.held_out.rows)


def test_shuffled_labels_give_nothing(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = with_topic(planted_frame(seed=1))
    rng = np.random.default_rng(3)
    active = planted_codes(frame, PLANTED)
    selected, n_layers = 0, 0
    for _ in range(10):
        labels = frame.groupby("topic")["emotion"].transform(lambda e: rng.permutation(e.to_numpy()))
        rows = frame.assign(emotion=labels)
        codes = as_codes(active, rows).select(frame["split"] == "discovery")
        table, _ = features.select(codes, EMOTIONS, replace(SETTINGS, shuffles=0))
        selected += int(table.groupby("layer")["responsive"].any().sum())
        n_layers += 4
    # Under the null, the rate at which a layer has any discovery is the false discovery rate of 5 %.
    assert selected <= 6, f"{selected} of {n_layers} layers"
    # The chapter's own null, with real labels and shuffles through the same selection, agrees.
    _, shuffled = features.select(as_codes(active, frame).select(frame["split"] == "discovery"), EMOTIONS, SETTINGS)
    assert len(shuffled[["shuffle", "layer"]].drop_duplicates()) <= 0.12 * 4 * SETTINGS.shuffles
    measured = measure(lm, monkeypatch, frame, {layer: [] for layer in range(4)})
    replication = features.replication_table(
        measured.table, {"held-out": measured.held_out}, EMOTIONS, measured.cut.value, SETTINGS
    )
    claims = features.claim_table(measured, replication, SETTINGS).set_index("kind")
    assert claims.loc["both", "verdict"] == "not supported"


@pytest.mark.parametrize("something", [True, False])
def test_every_figure_and_sentence_survives_finding_little(
    lm: LM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, something: bool
) -> None:
    """One responsive feature, or none: nothing is divided by zero, and the text says so."""
    settings = replace(SETTINGS, shuffles=2, resamples=2, bootstraps=20)
    little: dict[int, list[tuple[str, ...]]] = {layer: [] for layer in range(4)}
    measured = measure(lm, monkeypatch, with_topic(planted_frame()), little | {2: [("disgust",)]}, settings)
    kept = (measured.table["layer"] == 2) & (measured.table["feature"] == 0) & something
    quiet = {f"in_{e}": measured.table[f"in_{e}"] & kept for e in EMOTIONS}
    table = measured.table.assign(responsive=kept, kind=measured.table["kind"].where(kept, ""), **quiet)
    tree = features.emotion_tree(measured.held_out, table, EMOTIONS, settings)
    measured = replace(measured, table=table, resampled=measured.resampled.head(0), tree=tree)
    study = features.Study({"planted": measured}, {"planted": rows_of(measured)}, ("isear",), ("a note",))
    tables = features.save(study, settings, tmp_path)
    for figure in (
        plots.features_counts(tables["counts"]),
        plots.features_entropy(tables["features"], {"planted": measured.cut}),
        plots.features_overlap(tables["overlap"], tables["coactivation"], "planted"),
        plots.features_trees({"planted": tree}),
        plots.features_stability(tables["stability"], tables["sensitivity"]),
        plots.features_replication(tables["replication"]),
    ):
        figure.savefig(tmp_path / "figure.png")
        plt.close(figure)
    said = [
        features.rows_note(study),
        features.selection_finding(tables, "planted", settings),
        features.cut_finding(measured.cut, tables["features"]),
        features.claim_finding(tables["claims"], "planted"),
        features.overlap_finding(tables, "planted"),
        features.replication_finding(tables["replication"], "planted", EMOTIONS),
        features.stability_finding(tables, "planted"),
    ]
    assert f"{int(something)} of " in said[1] and "nan" not in " ".join(said)
    assert "not supported" in said[3] and ("nothing to cut" in said[2]) != something
    assert ("no emotion has a set" in said[5]) != something


def test_one_kind_alone_does_not_support_the_claim(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    only = {0: [], 1: PLANTED[1], 2: PLANTED[1], 3: PLANTED[1]}
    measured = measure(lm, monkeypatch, with_topic(planted_frame()), only)
    read = {"held-out": measured.held_out}
    # All entropies are low, so whatever the mixture makes of them, none of these features has two emotions.
    replication = features.replication_table(measured.table, read, EMOTIONS, measured.cut.value, SETTINGS)
    claims = features.claim_table(measured, replication, SETTINGS).set_index("kind")["verdict"]
    assert claims[SHARED] == "not supported" and claims["both"] == "not supported"


def test_entropy_and_its_cut() -> None:
    assert features.normalised_entropy(np.eye(6)).tolist() == pytest.approx([0.0] * 6)
    assert features.normalised_entropy(np.ones((2, 6))).tolist() == pytest.approx([1.0, 1.0])
    half = features.normalised_entropy(np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))
    rng = np.random.default_rng(0)
    heap = features.entropy_cut(rng.normal(0.7, 0.05, 300), 6)
    assert not heap.natural and heap.bic_gain <= 0 and heap.value == pytest.approx(float(half))
    two = features.entropy_cut(np.concatenate([rng.normal(0.3, 0.05, 100), rng.normal(0.8, 0.05, 200)]), 6)
    assert two.natural and 0.45 < two.value < 0.65 and two.separation > 5
    assert two.means == pytest.approx((0.3, 0.8), abs=0.02) and two.shares == pytest.approx((1 / 3, 2 / 3), abs=0.05)
    assert not features.entropy_cut(np.array([0.1, 0.9]), 6).natural


def test_membership_is_one_sided_and_several() -> None:
    """Holm over three emotions: high on two, high on none but low on one."""
    means_FK = np.array([[2.0, 2.0, 0.1], [1.0, 1.0, 0.0]])
    null = np.random.default_rng(0).normal(1.0, 0.1, (2, 200, 3))
    assert features.memberships(means_FK, null, 0.05).tolist() == [[True, True, False], [False, False, False]]


def test_overlap_is_compared_with_random_sets() -> None:
    n = 40
    table = pd.DataFrame({"layer": np.repeat([0, 1], n // 2), "feature": list(range(n // 2)) * 2, "responsive": True})
    table["in_a"] = [True] * 10 + [False] * 30
    table["in_b"] = [True] * 10 + [False] * 30
    table["in_c"] = [False] * 20 + [True] * 20
    rows = features.overlap_table(table, ["a", "b", "c"]).set_index(["first", "second"])
    # All in layer 0, where sets of ten out of twenty share five by chance, and all ten in one case of C(20, 10).
    assert rows.loc[("a", "b"), "expected"] == pytest.approx(5.0) and rows.loc[("a", "b"), "ratio"] == pytest.approx(
        2.0
    )
    assert rows.loc[("a", "b"), "p_more"] == pytest.approx(1 / 184756)
    assert rows.loc[("a", "c"), "expected"] == 0.0 and rows.loc[("a", "c"), "p_more"] == pytest.approx(1.0)
    assert rows.loc[("a", "b"), "jaccard"] == 1.0


def test_the_tree_joins_what_was_planted_alike() -> None:
    frame = with_topic(planted_frame())
    alike: list[tuple[str, ...]] = [("anger", "disgust"), ("joy", "surprise"), ("fear", "sadness")] * 3
    codes = as_codes(planted_codes(frame, {0: alike, 1: alike, 2: [], 3: []}), frame)
    table, _ = features.select(codes.select(frame["split"] == "discovery"), EMOTIONS, replace(SETTINGS, shuffles=0))
    tree = features.emotion_tree(codes.select(frame["split"] != "discovery"), table, EMOTIONS, SETTINGS)
    assert tree is not None
    pairs = {
        frozenset(EMOTIONS[i] for i in clade): s
        for clade, s in zip(features._clades(tree.merges), tree.support, strict=True)
    }
    for emotions in alike[:3]:
        assert pairs[frozenset(emotions)] > 0.95
    assert features.emotion_tree(codes, table.assign(responsive=False), EMOTIONS, SETTINGS) is None


def test_other_wordings_and_datasets_are_compared() -> None:
    frame = with_topic(planted_frame())
    discovery = frame["split"] == "discovery"
    quick = replace(SETTINGS, shuffles=0)
    first, same, other = (
        features.select(as_codes(planted_codes(frame, planted, seed), frame).select(discovery), EMOTIONS, quick)[0]
        for planted, seed in ((PLANTED, 0), (PLANTED, 1), ({k: [] for k in range(4)}, 2))
    )
    rows = features.sensitivity_table(first, {"same": same, "other": other}, EMOTIONS, 0.6).set_index(["versus", "set"])
    assert rows.loc[("same", RESPONSIVE), "value"] > 0.85 and rows.loc[("same", "joy"), "value"] > 0.8
    assert rows.loc[("other", RESPONSIVE), "value"] < 0.1
    ranks = rows["rank_correlation"]
    assert ranks["same", RESPONSIVE] > ranks["other", RESPONSIVE] + 0.1


def test_cards_are_chosen_from_every_kind() -> None:
    table = pd.DataFrame(
        {"layer": 0, "feature": range(6), "responsive": [True] * 5 + [False], "mi": [6, 5, 4, 3, 2, 9]}
    )
    table["in_a"], table["in_b"] = [True] * 4 + [False] * 2, [False] * 4 + [True] + [False]
    table["kind"] = [SPECIFIC] * 3 + [SHARED, SPECIFIC, ""]
    chosen = features.choose_cards(table, ["a", "b"], 3)
    assert [feature for _, feature in chosen] == [0, 3, 4]
    assert [feature for _, feature in features.choose_cards(table, ["a", "b"], 99)] == [0, 3, 4, 1, 2]


def test_bad_input_is_one_line(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    y_P = np.zeros(20, dtype=int)
    with pytest.raises(EmosaeError, match=r"50 permutations cannot give .* at least 120"):
        features.select_layer(np.ones((20, 2)), y_P, np.zeros((20, 50), dtype=np.int8), EMOTIONS, SETTINGS)
    monkeypatch.setattr(features, "load_model", lambda *args, **options: lm)
    with pytest.raises(EmosaeError, match=r"has no dictionaries, so it is left out; train them with"):
        features.run_study([lm.name], ["emoscenes"], SETTINGS)


def test_folders_of_models_are_plain_names(tmp_path: Path) -> None:
    assert features.folder_of("gemma-3-270m") == "gemma-3-270m"
    assert features.folder_of("owner/model") == "owner--model"
    assert features.folder_of(str(tmp_path)) == tmp_path.name


def test_planted_residuals_are_their_own_codes(lm: LM) -> None:
    """The dictionary of these tests reads every planted activation back as it is."""
    active_PLF = planted_codes(with_topic(planted_frame()), PLANTED)[:50]
    found = {0: Dictionary(0, basis(lm, 0), "planted")}
    codes_PF = encode_residuals(found, active_PLF[:, :1])[0].toarray()
    torch.testing.assert_close(torch.from_numpy(codes_PF[:, :N_FEATURES]), torch.from_numpy(active_PLF[:, 0]))


def test_sets_drawn_at_random_overlap_as_much_as_chance_says() -> None:
    """Layers differ in how much is selected, and the two sides in what they can test."""
    rng = np.random.default_rng(0)
    layers, indices = np.repeat([0, 1], 500), np.tile(np.arange(500), 2)

    def side() -> pd.DataFrame:
        testable = rng.random(1000) < 0.5
        found = testable & (rng.random(1000) < np.where(layers == 0, 0.05, 0.6))
        table = {"layer": layers, "feature": indices, "testable": testable, "responsive": found, "entropy": 0.9}
        return pd.DataFrame(table | {"mi": rng.random(1000)} | {f"in_{e}": False for e in EMOTIONS})

    rows = [features.sensitivity_table(side(), {"other": side()}, EMOTIONS, 0.5) for _ in range(30)]
    here = pd.concat(rows).query("set == @RESPONSIVE")
    assert here["value"].mean() == pytest.approx(here["chance"].mean(), abs=0.02)
    assert here["chance"].mean() > 0.2
    assert here["testable"].mean() == pytest.approx(0.5, abs=0.03)
