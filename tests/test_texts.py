"""The embedded texts are what the datasheet says, and the measures that say so can fail."""

from __future__ import annotations

import pandas as pd
import pytest

from emosae_utils import data, texts
from emosae_utils.data import EMOTIONS
from emosae_utils.files import repo_dir

CLASSES = {*EMOTIONS, "neutral"}


@pytest.fixture(scope="module")
def scenes() -> pd.DataFrame:
    return data.load_corpus("emoscenes", emotions=None).frame


@pytest.fixture(scope="module")
def dialogues() -> pd.DataFrame:
    return data.load_corpus("emodialogues").frame


def test_the_design_is_crossed(scenes: pd.DataFrame) -> None:
    assert len(scenes) == 24 * 7 * 6
    assert (pd.crosstab(scenes["topic"], scenes["emotion"]) == 6).all(axis=None)
    # Within a topic, person and tense are distributed alike over all classes.
    form = scenes["person"] + " " + scenes["tense"]
    for _, topic in scenes.assign(form=form).groupby("topic"):
        table = pd.crosstab(topic["emotion"], topic["form"])
        assert (table == table.iloc[0]).all(axis=None)
    for emotion in CLASSES:
        mine = scenes[scenes["emotion"] == emotion]
        assert (mine["person"] == "first").sum() == 72 and (mine["tense"] == "past").sum() == 72


def test_splits_are_by_topic(scenes: pd.DataFrame, dialogues: pd.DataFrame) -> None:
    assert scenes.groupby("split")["topic"].nunique().to_dict() == {"discovery": 12, "validation": 4, "test": 8}
    place = scenes.groupby("topic")["split"].unique()
    assert place.map(len).eq(1).all()
    assert (dialogues["split"] == dialogues["topic"].map(place.map(lambda s: s[0]))).all()


def test_facets_are_balanced(scenes: pd.DataFrame, dialogues: pd.DataFrame) -> None:
    for frame, n in ((scenes, 144), (dialogues, 30)):
        counts = frame.groupby(["emotion", "facet"]).size()
        assert counts["disgust"].to_dict() == {"moral": n // 2, "physical": n // 2}
        assert counts["surprise"].to_dict() == {"bad": n // 3, "good": n // 3, "neutral": n // 3}
        assert set(frame.dropna(subset=["facet"])["emotion"]) == {"disgust", "surprise"}


def test_dialogues(dialogues: pd.DataFrame) -> None:
    assert dialogues["emotion"].value_counts().to_dict() == dict.fromkeys(EMOTIONS, 30)
    turns = dialogues["text"].str.split("\n")
    assert set(turns.map(len)) == {2, 3, 4}
    for lines, target in zip(turns, dialogues["target"], strict=True):
        names = {line.split(":")[0] for line in lines}
        assert len(names) == 2 and target in names


def test_no_text_names_an_emotion(scenes: pd.DataFrame, dialogues: pd.DataFrame) -> None:
    for frame in (scenes, dialogues):
        leaks = {row.row_id: texts.named_emotions(str(row.text)) for row in frame.itertuples()}
        assert {k: v for k, v in leaks.items() if v} == {}


def test_the_lexicon_catches_inflections_and_spares_please() -> None:
    assert texts.named_emotions("Please close the door, she said angrily and with dread.") == ["angrily", "dread"]
    for emotion in EMOTIONS:
        assert texts.named_emotions(f"It was {emotion} all over.") == [emotion]
    assert texts.named_emotions("She saddled the horse at the station.") == []


def test_no_two_texts_are_nearly_the_same(scenes: pd.DataFrame, dialogues: pd.DataFrame) -> None:
    for frame in (scenes, dialogues):
        assert texts.closest_pairs(frame["text"].tolist(), 1)["jaccard"].iloc[0] < 0.5


def test_closest_pairs_by_hand() -> None:
    found = texts.closest_pairs(["a cat sat", "a cat ran", "dogs bark"], 1).iloc[0]
    # {a, cat} of {a, cat, sat, ran}
    assert (found["first"], found["second"], found["jaccard"]) == (0, 1, 0.5)


def test_length_does_not_tell_the_classes_apart(scenes: pd.DataFrame) -> None:
    table, p = texts.length_test(scenes)
    assert p > 0.05
    assert table["mean"].max() - table["mean"].min() < 1.0
    longer = scenes.assign(
        text=[t + " and on" * 6 if e == "fear" else t for t, e in zip(scenes["text"], scenes["emotion"], strict=True)]
    )
    assert texts.length_test(longer)[1] < 1e-3


def test_the_words_do_not_give_the_answer_away(scenes: pd.DataFrame) -> None:
    found = texts.lexical_giveaway(scenes, n_draws=200)
    assert found.high < 0.55
    told = scenes.assign(text=[f"{t} {'xyzzy' + e}" for t, e in zip(scenes["text"], scenes["emotion"], strict=True)])
    assert texts.lexical_giveaway(told, n_draws=50).value > 0.95


def test_splits_and_license_stand_beside_the_data() -> None:
    sheet = (repo_dir() / "data" / "emoscenes" / "DATASHEET.md").read_text()
    assert "CC BY 4.0" in sheet and "1,008" in sheet
