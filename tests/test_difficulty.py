"""The ladder on a planted model: a known prior, a known signal in a known layer, known human answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from emosae_utils import difficulty, scoring
from emosae_utils.data import EMOTIONS
from emosae_utils.difficulty import Settings
from emosae_utils.files import EmosaeError

SETTINGS = Settings(bootstraps=300, permutations=8, few_shot_draws=2)
PLANTED_LAYER = 2
# Disgust starts seven nats behind: never said, though the evidence is there for four texts of five.
PRIOR = {"anger": 0.0, "disgust": -7.0, "fear": 0.0, "joy": 0.0, "sadness": 3.0, "surprise": 0.0}
CLARITY = 0.8


def planted_frame(n_topics: int = 24, per_cell: int = 6, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    splits = ["discovery"] * 12 + ["validation"] * 4 + ["test"] * 8
    words = ["table", "river", "bread", "window", "street", "letter", "garden", "train"]
    rows = []
    for topic in range(n_topics):
        for emotion in EMOTIONS:
            for i in range(per_cell):
                text = " ".join(rng.choice(words, 8)) + (" clear" if rng.random() < CLARITY else " vague")
                rows.append(
                    {
                        "row_id": f"planted/{topic}-{emotion}-{i}",
                        "text": text,
                        "emotion": emotion,
                        "dataset": "planted",
                        "split": splits[topic],
                        "group": f"topic {topic}",
                        "target": None,
                    }
                )
    return pd.DataFrame(rows)


@pytest.fixture
def planted_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model by its answers: score = prior + 4 nats of evidence where the text is clear; layer 2 holds the emotion."""
    directions = np.linalg.qr(np.random.default_rng(7).normal(size=(16, 16)))[0][:6]

    def build(lm: Any, frame: pd.DataFrame, *, labels: Sequence[str] = EMOTIONS, **wording: Any) -> pd.DataFrame:
        return frame.assign(labels=[tuple(labels)] * len(frame))

    def read(lm: Any, frame: pd.DataFrame, *, layers: Sequence[int] = (), **_: Any) -> scoring.Readout:
        labels = frame["labels"].iloc[0]
        rng = np.random.default_rng(len(frame))
        scores = np.array([[PRIOR[e] for e in labels]] * len(frame)) + rng.normal(size=(len(frame), len(labels))) * 0.1
        resid = rng.normal(size=(len(frame), len(layers), 16)) * 0.2
        for p, row in enumerate(frame.itertuples()):
            if getattr(row, "emotion", None) in labels and str(row.text).endswith("clear"):
                e = labels.index(row.emotion)
                scores[p, e] += 4.0
                if layers:
                    resid[p, PLANTED_LAYER] += directions[e]
        return scoring.Readout(scores, resid if layers else None, tuple(labels), tuple(layers))

    monkeypatch.setattr(scoring, "build_prompts", build)
    monkeypatch.setattr(scoring, "read_out", read)
    return SimpleNamespace(name="planted", n_layers=4, profile=SimpleNamespace(chat=False))


def test_the_ladder_names_the_planted_cause(planted_model: Any) -> None:
    rows = difficulty.choose_rows(planted_frame(), SETTINGS)
    measured = difficulty.with_model(planted_model, rows, SETTINGS)
    said = pd.concat([measured.predictions, difficulty.without_model(rows).assign(dataset="planted", model="")])
    metrics = difficulty.metrics_table(said, SETTINGS)

    def recall(method: str, emotion: str) -> float:
        hit = metrics.query("method == @method and emotion == @emotion and metric == 'recall' and variant == ''")
        return float(hit["value"].iloc[0])

    assert recall("raw", "disgust") == 0.0
    for emotion in EMOTIONS:
        # Found where the text is clear; a vague text is a guess among six.
        assert CLARITY - 0.1 < recall("calibrated", emotion) < CLARITY + 0.15
    assert measured.probe.layer == PLANTED_LAYER
    assert recall("probe", "disgust") > CLARITY - 0.12
    np.testing.assert_allclose(measured.prior_E, [PRIOR[e] for e in EMOTIONS], atol=0.2)

    steps = difficulty.ladder_table(said, SETTINGS).set_index(["emotion", "step"])
    assert steps.loc[("disgust", "label prior"), "low"] > 0.5
    # The calibrated answer already uses all there is: no step at the read-out, for any emotion.
    for emotion in EMOTIONS:
        assert steps.loc[(emotion, "read-out"), "low"] < 0.05
    spread = difficulty.spread_table(said, SETTINGS).set_index("method")
    assert spread.loc["raw", "low"] > spread.loc["calibrated", "high"]
    assert spread.loc["calibrated", "low"] < spread.loc["calibrated", "expected"] * 2
    assert np.mean(measured.null_accuracies) < 0.28
    text = difficulty.finding(metrics, difficulty.spread_table(said, SETTINGS), "planted", "planted")
    assert "disgust 0.00" in text and "falls from" in text


def test_no_signal_gives_no_finding(planted_model: Any) -> None:
    """Labels shuffled against the texts: every rung is at chance and no step is positive beyond its interval."""
    frame = planted_frame(seed=1)
    rows = difficulty.choose_rows(frame, SETTINGS)
    rng = np.random.default_rng(0)
    broken = replace(
        rows,
        fit=rows.fit.assign(text=rows.fit["text"].str.replace("clear", "vague")),
        measure=rows.measure.assign(
            text=rows.measure["text"].str.replace("clear", "vague"),
            emotion=rng.permutation(rows.measure["emotion"].to_numpy()),
        ),
    )
    said = difficulty.with_model(planted_model, broken, SETTINGS).predictions
    metrics = difficulty.metrics_table(said, SETTINGS).query("metric == 'accuracy' and variant == ''")
    for method in ("raw", "calibrated", "probe"):
        row = metrics[metrics["method"] == method].iloc[0]
        assert row["low"] < 1 / 6 + 0.03 and row["value"] < 0.25
    tests = difficulty.tests_table(
        pd.concat([said, difficulty.without_model(broken).assign(dataset="planted", model="")]), SETTINGS
    )
    assert (tests["p_holm"] > 0.01).all()


def test_rows_to_fit_and_rows_to_measure_share_nothing() -> None:
    frame = planted_frame()
    rows = difficulty.choose_rows(frame, replace(SETTINGS, rows_per_emotion=20, fit_rows_per_emotion=10))
    assert not set(rows.fit["group"]) & set(rows.measure["group"])
    assert set(rows.fit["split"]) == {"discovery"}
    assert rows.measure["emotion"].value_counts().eq(20).all()
    assert rows.fit["emotion"].value_counts().eq(10).all()


def test_model_and_readers_are_measured_on_the_same_texts() -> None:
    frame = planted_frame()
    held = frame[frame["split"] != "discovery"]
    judged = held.groupby("emotion").head(5)["row_id"].tolist()
    readers = pd.DataFrame({"row_id": judged, "answer": "joy"})
    rows = difficulty.choose_rows(frame, replace(SETTINGS, rows_per_emotion=8), readers)
    assert set(rows.measure["row_id"]) == set(judged)


def test_readers_count_once_per_text() -> None:
    frame = planted_frame()
    rows = difficulty.choose_rows(frame, replace(SETTINGS, rows_per_emotion=2))
    first, second = rows.measure.iloc[0], rows.measure.iloc[1]
    wrong = next(e for e in EMOTIONS if e != first["emotion"])
    readers = pd.DataFrame(
        {
            # Five readers: three right, one wrong, one outside the six labels, who is left out.
            "row_id": [first["row_id"]] * 5 + [second["row_id"]],
            "answer": [first["emotion"]] * 3 + [wrong, "boredom"] + [second["emotion"]],
        }
    )
    said = difficulty.without_model(rows, readers)
    one = said[said["method"] == "one reader"]
    assert one.groupby("row_id")["weight"].sum().tolist() == pytest.approx([1.0, 1.0])
    right = one[one["gold"] == one["pred"]].groupby("row_id")["weight"].sum()
    assert right[first["row_id"]] == pytest.approx(3 / 4)
    vote = said[said["method"] == "readers' vote"].set_index("row_id")
    assert vote.loc[first["row_id"], "pred"] == first["emotion"]


def test_a_missing_emotion_is_said() -> None:
    frame = planted_frame()
    frame = frame[(frame["emotion"] != "fear") | (frame["split"] == "discovery")]
    with pytest.raises(EmosaeError, match="planted has no held-out rows for fear"):
        difficulty.choose_rows(frame, SETTINGS)


def test_transfer_fits_on_one_set_and_measures_on_the_other(planted_model: Any) -> None:
    first = difficulty.choose_rows(planted_frame(seed=0), SETTINGS)
    other_frame = planted_frame(seed=5).assign(dataset="other")
    second = difficulty.choose_rows(other_frame[other_frame["emotion"] != "surprise"], SETTINGS)
    a, b = (difficulty.with_model(planted_model, rows, SETTINGS) for rows in (first, second))
    said = difficulty.transfer(a, first, b, second)
    assert set(said["gold"]) == set(EMOTIONS) - {"surprise"}
    assert set(said["row_id"]) == set(second.measure["row_id"])
    assert (said["gold"] == said["pred"]).mean() > 0.7
    assert set(said["variant"]) == {"planted"} and set(said["dataset"]) == {"other"}
