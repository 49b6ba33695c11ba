"""The loader: cleaning, splits, checksums and privacy, on small files and on the public sets where present."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import http.server
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import pytest

from emosae_utils import data
from emosae_utils.data import APPRAISALS, COLUMNS, EMOTIONS, REASONS, SPLITS, load_corpus
from emosae_utils.files import EmosaeError, repo_dir, sha256_file

PUBLIC = Path(os.environ.get("EMOSAE_DATA_DIR") or repo_dir().parent / "shared" / "data")
PUBLIC_NAMES = ("crowd-envent", "isear", "enisear", "emoevent", "xed", "goemotions")
needs_public = pytest.mark.skipif(
    not (PUBLIC / "crowd-enVENT").is_dir(),
    reason="the public datasets are not here: EMOSAE_DATA_DIR is not set and ../shared/data does not exist",
)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test finds a dataset by accident, and none writes into the user's cache."""
    monkeypatch.delenv("EMOSAE_DATA_DIR", raising=False)
    monkeypatch.setenv("EMOSAE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def public() -> Callable[[str], data.Corpus]:
    loaded: dict[str, data.Corpus] = {}

    def load(name: str) -> data.Corpus:
        if name not in loaded:
            loaded[name] = load_corpus(name, emotions=None, data_dir=PUBLIC)
        return loaded[name]

    return load


Pin = Callable[..., Path]


@pytest.fixture
def pin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pin:
    """Write small files for a public set and pin the card's checksums to them."""

    def write(name: str, **contents: bytes) -> Path:
        files = {}
        for file, source in data._CARDS[name].files.items():
            content = contents[Path(file).stem]
            path = tmp_path / "sets" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            files[file] = dataclasses.replace(source, sha256=hashlib.sha256(content).hexdigest(), size=len(content))
        monkeypatch.setitem(data._CARDS, name, dataclasses.replace(data._CARDS[name], files=files))
        return tmp_path / "sets"

    return write


def own(path: Path, rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ("text", "emotion")) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def dropped(corpus: data.Corpus) -> dict[str, int]:
    return {reason: corpus.cleaning[reason] for reason in REASONS if corpus.cleaning[reason]}


def adds_up(corpus: data.Corpus) -> bool:
    counts = corpus.cleaning
    return counts["rows read"] == counts["rows kept"] + sum(counts[r] for r in REASONS) and counts["rows kept"] == len(
        corpus.frame
    )


# A user's own file


def test_own_file_is_cleaned_and_every_dropped_row_counted(tmp_path: Path) -> None:
    path = own(
        tmp_path / "mine.csv",
        [
            ("The neighbour sold  my bike.", "Angry"),  # 0 kept, the double space repaired
            ("The neighbour sold my bike.", "anger"),  # 1 exact duplicate once spaces are single
            ("the NEIGHBOUR sold my bike!!", "anger"),  # 2 near duplicate
            ("We won the cup final", "joy"),  # 3 conflicting with 4
            ("We won the cup final.", "surprise"),  # 4 conflicting with 3
            ("I was so disgusted by him", "anger"),  # 5 leak, although of another label
            ("I saddled the horse today", "joy"),  # 6 kept: a saddle is not sad
            ("I fell", "fear"),  # 7 under three words
            ("... ! he fell", "fear"),  # 8 under three words: dots and marks are not words
            ("They handed me the keys", "trust"),  # 9 other label
            ("They handed me a letter", ""),  # 10 missing label
        ],
    )
    corpus = load_corpus(path)
    assert corpus.frame["row_id"].tolist() == ["mine/0", "mine/6"]
    assert corpus.frame["text"].tolist() == ["The neighbour sold my bike.", "I saddled the horse today"]
    assert corpus.frame["emotion"].tolist() == ["anger", "joy"]
    assert dropped(corpus) == {
        "missing label": 1,
        "under three words": 2,
        "label leak": 1,
        "conflicting labels": 2,
        "exact duplicate": 1,
        "near duplicate": 1,
        "other label": 1,
    }
    # 11 read = 2 kept + 9 left out.
    assert corpus.cleaning["rows read"] == 11 and adds_up(corpus)
    assert corpus.cleaning["rows repaired: spacing"] == 1
    assert corpus.card.files["mine.csv"].sha256 == sha256_file(path)


def test_columns_and_absent_values(tmp_path: Path) -> None:
    frame = load_corpus(own(tmp_path / "mine.csv", [("a dog bit me", "fear")])).frame
    assert tuple(frame.columns) == COLUMNS
    row = frame.iloc[0].to_dict()
    assert row["dataset"] == "mine" and row["group"] == "mine/0" and row["split"] in SPLITS
    assert [row[c] for c in ("topic", "person", "tense", "facet", "target")] == [None] * 5


def test_all_labels_are_kept_on_demand_and_a_rows_fate_does_not_depend_on_it(tmp_path: Path) -> None:
    rows = [("we got a puppy", "joy"), ("We got a puppy", "relief"), ("the exam is over", "relief"), ("x y z", "joy")]
    path = own(tmp_path / "mine.csv", rows)
    assert load_corpus(path, emotions=None).frame["row_id"].tolist() == ["mine/2", "mine/3"]
    # The puppy is in conflict with a label that was not asked for, and stays out.
    assert load_corpus(path, emotions=["joy"]).frame["row_id"].tolist() == ["mine/3"]


def test_words_of_a_set_own_labels_leak_and_only_those(tmp_path: Path) -> None:
    text = "the bank lost the trust fund"
    assert len(load_corpus(own(tmp_path / "a.csv", [(text, "anger")])).frame) == 1
    corpus = load_corpus(own(tmp_path / "b.csv", [(text, "anger"), ("he is late", "joy"), ("we shook hands", "trust")]))
    assert dropped(corpus) == {"label leak": 1, "other label": 1}


@pytest.mark.parametrize(
    "word",
    ["anger", "angrily", "disgusting", "FEARS", "joyous", "overjoyed", "saddest", "sadly", "#surprise", "suprised"],
)
def test_inflections_are_leaks(tmp_path: Path, word: str) -> None:
    path = own(tmp_path / "mine.csv", [(f"it was {word} again", "joy"), ("it was late again", "joy")])
    assert dropped(load_corpus(path)) == {"label leak": 1}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_the_four_kinds_of_file_give_the_same_frame(tmp_path: Path, suffix: str) -> None:
    table = pd.DataFrame(
        {
            "text": ['Ann: I\'m off, "bye"\nBo: So soon?', "the roof, it leaks"],
            "emotion": ["sadness", "anger"],
            "target": ["Bo", None],
            "split": ["dev", "train"],
            "group": ["g", "h"],
        }
    )
    path = tmp_path / f"mine{suffix}"
    if suffix == ".parquet":
        table.to_parquet(path)
    elif suffix == ".jsonl":
        path.write_text(
            "\n".join(json.dumps(r) for r in table.astype(object).to_dict("records")).replace("NaN", "null")
        )
    else:
        table.to_csv(path, sep="," if suffix == ".csv" else "\t", index=False)
    frame = load_corpus(path).frame
    assert frame["text"].tolist() == table["text"].tolist()
    assert frame["target"].tolist() == ["Bo", None]
    assert frame["split"].tolist() == ["validation", "discovery"]
    assert frame["group"].tolist() == ["g", "h"]


def test_one_dialogue_asked_about_two_speakers_is_two_rows(tmp_path: Path) -> None:
    header = ("text", "emotion", "target")
    path = own(
        tmp_path / "mine.csv", [("A: I won.\nB: Oh no.", e, t) for e, t in (("joy", "A"), ("anger", "B"))], header
    )
    assert len(load_corpus(path).frame) == 2
    path = own(tmp_path / "mine.csv", [("A: I won.\nB: Oh no.", e, "A") for e in ("joy", "anger")], header)
    with pytest.raises(EmosaeError, match=r"no row of mine is left \(conflicting labels 2\)"):
        load_corpus(path)


def test_mojibake_is_turned_back_and_plain_accents_are_not_touched(tmp_path: Path) -> None:
    path = own(tmp_path / "mine.csv", [("I donâ€™t go there", "fear"), ("Café Âge à Paris", "joy")])
    corpus = load_corpus(path)
    assert corpus.frame["text"].tolist() == ["I don’t go there", "Café Âge à Paris"]
    assert corpus.cleaning["rows repaired: encoding"] == 1


def test_faulty_own_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(EmosaeError, match=r"has no column emotion \(found: label, text\); rename"):
        load_corpus(own(tmp_path / "a.csv", [("a b c", "joy")], ("text", "label")))
    with pytest.raises(EmosaeError, match="has no column text and emotion"):
        load_corpus(own(tmp_path / "a.csv", [("a b c", "joy")], ("t", "e")))
    with pytest.raises(EmosaeError, match=r"absent\.csv is missing"):
        load_corpus(tmp_path / "absent.csv")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(EmosaeError, match=r"the suffix is none of \.csv"):
        load_corpus(tmp_path / "a.txt")
    (tmp_path / "latin.csv").write_bytes("text,emotion\ncafé au lait,joy\n".encode("cp1252"))
    with pytest.raises(EmosaeError, match="is not UTF-8"):
        load_corpus(tmp_path / "latin.csv")
    (tmp_path / "commas.csv").write_text("text,emotion\nwe came, we saw,joy\n")
    with pytest.raises(EmosaeError, match="record 1 has more fields than the header, put quotes"):
        load_corpus(tmp_path / "commas.csv")
    (tmp_path / "bad.jsonl").write_text('{"text": "a b c", "emotion": "joy"}\n{"text":\n')
    with pytest.raises(EmosaeError, match=r"line 2 of .* is not JSON"):
        load_corpus(tmp_path / "bad.jsonl")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(EmosaeError, match=r"cannot read .* as parquet"):
        load_corpus(tmp_path / "bad.parquet")
    header = ("text", "emotion", "group", "split")
    with pytest.raises(EmosaeError, match="has the group 'g' in discovery and test"):
        load_corpus(own(tmp_path / "a.csv", [("a b c", "joy", "g", "train"), ("d e f", "joy", "g", "test")], header))
    with pytest.raises(EmosaeError, match="unknown split 'tset'; did you mean 'test'"):
        load_corpus(own(tmp_path / "a.csv", [("a b c", "joy", "g", "tset")], header))
    with pytest.raises(EmosaeError, match=r"no row of a is left \(other label 1\)"):
        load_corpus(own(tmp_path / "a.csv", [("a b c", "trust")]))


def test_unknown_names_come_with_the_nearest_match(tmp_path: Path) -> None:
    with pytest.raises(EmosaeError, match="unknown dataset 'isaer'; did you mean 'isear'"):
        load_corpus("isaer")
    with pytest.raises(EmosaeError, match="unknown dataset 'goemotion'; did you mean 'goemotions'"):
        data.is_present("goemotion")
    with pytest.raises(EmosaeError, match="unknown dataset"):
        data.fetch_corpus("nowhere")
    path = own(tmp_path / "mine.csv", [("a b c", "joy"), ("d e f", "awe")])
    with pytest.raises(EmosaeError, match="unknown emotion 'saddness'; did you mean 'sadness'"):
        load_corpus(path, emotions=["joy", "saddness"])
    # A label of the file itself is known.
    assert load_corpus(path, emotions=["awe"]).frame["emotion"].tolist() == ["awe"]
    with pytest.raises(EmosaeError, match="takes a list of labels"):
        load_corpus(path, emotions="joy")
    with pytest.raises(EmosaeError, match="no emotion was asked for"):
        load_corpus(path, emotions=[])


def test_a_file_named_like_a_dataset_is_not_that_dataset(tmp_path: Path) -> None:
    frame = load_corpus(own(tmp_path / "isear.csv", [("a b c", "joy")])).frame
    assert frame["dataset"].tolist() == ["own-isear"] and frame["row_id"].tolist() == ["own-isear/0"]


def test_splits_follow_the_group_in_fixed_proportions(tmp_path: Path) -> None:
    rows = [(f"text number {i} here", "joy", f"writer {i % 1500}") for i in range(3000)]
    frame = load_corpus(own(tmp_path / "mine.csv", rows, ("text", "emotion", "group"))).frame
    assert len(frame[["group", "split"]].drop_duplicates()) == frame["group"].nunique()
    share = frame.groupby("group")["split"].first().value_counts(normalize=True)
    # Three standard errors of a share of 1500 groups are at most 3 * sqrt(.25 / 1500) = .039.
    assert abs(share["discovery"] - 0.50) < 0.039
    assert abs(share["validation"] - 0.17) < 0.039
    assert abs(share["test"] - 0.33) < 0.039
    # The first 12 hex digits of the SHA-256 of "b" are 3e23e8160039 (.24 of the range), of "c" 2e7d2c03a950 (.18),
    # of "e" 3f79bb7b435b (.25), of "a" ca978112ca1b (.79), of "d" 18ac3e7343f0 (.10).
    assert [data._hash_split(g) for g in "abcde"] == ["test", *["discovery"] * 4]


# Embedded sets


def write_lines(path: Path, records: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


SCENE: dict[str, object] = {
    "id": "garden-anger-0",
    "topic": "garden",
    "split": "test",
    "emotion": "anger",
    "slot": 0,
    "person": "first",
    "tense": "past",
    "facet": None,
    "text": "Someone had driven over the beds.",
}


def test_scenes(tmp_path: Path) -> None:
    rest = SCENE | {"id": "garden-neutral-0", "emotion": "neutral", "text": "The beds lie along the wall."}
    write_lines(tmp_path / "emoscenes" / "emoscenes.jsonl", [SCENE, rest])
    corpus = load_corpus("emoscenes", emotions=None, data_dir=tmp_path)
    assert corpus.frame.iloc[0].to_dict() == {
        "row_id": "emoscenes/garden-anger-0",
        "text": "Someone had driven over the beds.",
        "emotion": "anger",
        "dataset": "emoscenes",
        "split": "test",
        "group": "garden",
        "topic": "garden",
        "person": "first",
        "tense": "past",
        "facet": None,
        "target": None,
    }
    assert corpus.frame["emotion"].tolist() == ["anger", "neutral"]
    assert load_corpus("emoscenes", data_dir=tmp_path).frame["emotion"].tolist() == ["anger"]


def test_the_digest_changes_with_the_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "a" / "emoscenes" / "emoscenes.jsonl", [SCENE])
    write_lines(tmp_path / "b" / "emoscenes" / "emoscenes.jsonl", [SCENE | {"slot": 1}])
    a, b, again = (load_corpus("emoscenes", data_dir=tmp_path / d) for d in ("a", "b", "a"))
    assert a.sha256 == again.sha256 != b.sha256
    assert a.frame.equals(b.frame)


def test_dialogues(tmp_path: Path) -> None:
    talk: dict[str, object] = {
        "id": "d1",
        "topic": "garden",
        "split": "discovery",
        "emotion": "fear",
        "slot": 0,
        "target": "Bo",
        "facet": None,
        "turns": [["Ann", "The shed is open."], ["Bo", "I  locked it."]],
    }
    path = tmp_path / "emodialogues" / "emodialogues.jsonl"
    write_lines(path, [talk])
    frame = load_corpus("emodialogues", data_dir=tmp_path).frame
    assert frame["text"].tolist() == ["Ann: The shed is open.\nBo: I locked it."]
    assert frame["target"].tolist() == ["Bo"] and frame["group"].tolist() == ["garden"]
    write_lines(path, [talk | {"target": "Cy"}])
    with pytest.raises(EmosaeError, match="target 'Cy' of d1 says nothing"):
        load_corpus("emodialogues", data_dir=tmp_path)
    write_lines(path, [talk | {"turns": ["Ann"]}])
    with pytest.raises(EmosaeError, match="turns of d1 are not"):
        load_corpus("emodialogues", data_dir=tmp_path)


def test_faulty_embedded_files_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "emoscenes" / "emoscenes.jsonl"
    write_lines(path, [SCENE, SCENE])
    with pytest.raises(EmosaeError, match="emoscenes/garden-anger-0 2 times"):
        load_corpus("emoscenes", data_dir=tmp_path)
    write_lines(path, [SCENE, SCENE | {"id": "x", "split": "discovery", "text": "The gate was off its hinges."}])
    with pytest.raises(EmosaeError, match="group 'garden' in discovery and test"):
        load_corpus("emoscenes", data_dir=tmp_path)
    write_lines(path, [SCENE | {"split": "train"}])
    with pytest.raises(EmosaeError, match="unknown split 'train'"):
        load_corpus("emoscenes", data_dir=tmp_path)
    write_lines(path, [{k: v for k, v in SCENE.items() if k != "topic"}])
    with pytest.raises(EmosaeError, match=r"record 1 of .* has no topic"):
        load_corpus("emoscenes", data_dir=tmp_path)


# Small stand-ins for public sets


def crowd_files(rows: list[tuple[str, str, str, str, str]]) -> dict[str, bytes]:
    """Rows are (text_id, writer, emotion, text, answer about lying). One of the texts gets two readers."""
    header = ["text_id", "prolific_id", "emotion", "hidden_emo_text", "did_you_lie?", "age", *APPRAISALS]
    lines = [header] + [[i, w, e, t, lie, "44", *["3"] * 20, "5"] for i, w, e, t, lie in rows]
    first = rows[0]
    val = [["text_id", "prolific_id", "emotion", "annotator_emotion", "age"]]
    val += [[first[0], "f" * 32, first[2], "Joy", "33"], [first[0], "e" * 32, first[2], first[2], "22"]]

    def text(table: list[list[str]]) -> str:
        return "".join(",".join(f'"{cell}"' for cell in line) + "\r\n" for line in table)

    return {"enVent_gen_Data": text(lines).encode("cp1252"), "enVent_val_Data": text(val).encode("utf-8")}


TRUE, IMAGINED = "The event really happened in my life.", "I never experienced that event, but I really imagined how"
CROWD = [
    ("71", "a" * 32, "anger", "I felt … when they didn’t pay me for £5 of  work", "--"),
    ("72", "b" * 32, "fear", "I felt .... when the lights went out", TRUE),
    ("73", "a" * 32, "joy", "I felt ... when they let me go home", TRUE),
    ("74", "c" * 32, "joy", "I felt ... when I flew to the moon", IMAGINED),
    ("75", "d" * 32, "pride", "I felt ... and not angry to be home", TRUE),
    ("76", "d" * 32, "no-emotion", "I ate a bowl of soup", TRUE),
]


def test_crowd_envent_on_a_small_file(pin: Pin) -> None:
    folder = pin("crowd-envent", **crowd_files(CROWD))
    corpus = load_corpus("crowd-envent", emotions=None, data_dir=folder)
    # cp1252: the quotation mark of "didn’t" is byte 92, the pound sign A3, the ellipsis 85.
    assert corpus.frame["text"].tolist() == [
        "I felt ... when they didn’t pay me for £5 of work",
        "I felt ... when the lights went out",
        "I felt ... when they let me go home",
        "I ate a bowl of soup",
    ]
    assert corpus.frame["row_id"].tolist() == [f"crowd-envent/{i}" for i in (71, 72, 73, 76)]
    # "angry" is a leak in a text of pride; the number of the writer is the order of first appearance.
    assert dropped(corpus) == {"imagined event": 1, "label leak": 1}
    assert corpus.frame["group"].tolist() == [f"crowd-envent/writer-{i}" for i in (0, 1, 0, 3)]
    assert corpus.cleaning["rows repaired: masks"] == 2


def test_readers_and_appraisals_on_a_small_file(pin: Pin) -> None:
    folder = pin("crowd-envent", **crowd_files(CROWD))
    readers = data.reader_annotations(folder)
    assert readers.to_numpy().tolist() == [
        ["crowd-envent/71", "anger", 0, "joy"],
        ["crowd-envent/71", "anger", 1, "anger"],
    ]
    assert list(readers.columns) == ["row_id", "emotion", "reader", "answer"]
    ratings = data.appraisals(folder)
    assert list(ratings.columns) == ["row_id", *APPRAISALS] and len(APPRAISALS) == 21
    # 20 ratings of 3 and one of 5.
    assert ratings.iloc[0, 1:].sum() == 65 and len(ratings) == 6


def isear_line(subject: str, emotion: str, text: str) -> str:
    """A line in the file's form: 40 fields before the text, of which the first is the subject, then two after it."""
    return "|".join([subject, *["1"] * 35, emotion, "3", "2", "0110011", text, "1", ""])


def test_isear_on_a_small_file(pin: Pin) -> None:
    header = "|".join(["ID", *[f"C{i}" for i in range(35)], "Field1", "Field3", "Field2", "MYKEY", "SIT", "STATE", ""])
    lines = [
        header,
        isear_line("11001", "joy", "When we met and á especially later.  "),
        isear_line("11001", "fear", "[ No response.]"),
        isear_line("11002", "fear", "NO RESPONSE"),
        isear_line("11002", "joy", "[ When I read a lot and did not remember anything.]"),
        isear_line("11002", "anger", 'A man asked me: \\May I sleep here?\\"  and I á|answered \\"No\\"."'),
        isear_line("11003", "sadness", "My fiancT left on a 180¦ turn"),
        isear_line("11003", "disgust", "Can't think of any."),
        isear_line("11003", "shame", "I have never felt this emotion."),
        isear_line("11003", "guilt", 'The same as in \\shame\\"."'),
        isear_line("11003", "guilt", "I was late again"),
    ]
    folder = pin("isear", isear="\n".join([*lines, ""]).encode())
    corpus = load_corpus("isear", data_dir=folder)
    assert corpus.frame["text"].tolist() == [
        "When we met and especially later.",
        "When I read a lot and did not remember anything.",
        'A man asked me: "May I sleep here?" and I answered "No".',
        "My fiancé left on a 180° turn",
    ]
    assert corpus.frame["row_id"].tolist() == ["isear/0", "isear/3", "isear/4", "isear/5"]
    assert corpus.frame["group"].tolist() == [f"isear/writer-{i}" for i in (0, 1, 1, 2)]
    assert dropped(corpus) == {"no response": 5, "other label": 1} and adds_up(corpus)


def test_xed_on_small_files(pin: Pin) -> None:
    annotated = 'Well , I never said that ... not me .\t1\r\n"What ?" he said to me\t4, 7\r\nWhat ?\t7\r\n'
    folder = pin("xed", **{"en-annotated": annotated.encode(), "neu_en": b"9\tIt rains all day.\t\t\t\n9\tYes\t\t\t\n"})
    corpus = load_corpus("xed", emotions=None, data_dir=folder)
    assert corpus.frame["text"].tolist() == ["Well, I never said that ... not me.", "It rains all day."]
    assert corpus.frame["emotion"].tolist() == ["anger", "neutral"]
    assert dropped(corpus) == {"multi-label": 1, "under three words": 2}


def test_goemotions_and_emoevent_on_small_files(pin: Pin) -> None:
    parts = {
        "train": b'"So ""good"" today."\t1\tx1\n',
        "dev": b"He &amp; I left\t0\tx2\n",
        "test": b"no no no\t0,1\tx3\n",
    }
    corpus = load_corpus("goemotions", data_dir=pin("goemotions", labels=b"anger\njoy\n", **parts))
    assert corpus.frame[["text", "emotion", "split"]].to_numpy().tolist() == [
        ['So "good" today.', "joy", "discovery"],
        ["He & I left", "anger", "validation"],
    ]
    assert dropped(corpus) == {"multi-label": 1}
    head = b"id\tevent\ttweet\toffensive\temotion\n"
    tweets = {
        p: head + f"7\tLaLiga\t{p} we go https://t.co/x1 now\tNO\tjoy\n".encode() for p in ("train", "dev", "test")
    }
    frame = load_corpus("emoevent", data_dir=pin("emoevent", **tweets)).frame
    assert frame["text"].tolist() == ["train we go now", "dev we go now", "test we go now"]
    assert frame["split"].tolist() == ["discovery", "validation", "test"]
    assert set(frame["topic"]) == {"LaLiga"} and frame["group"].tolist() == frame["row_id"].tolist()


# Where files come from


def test_an_altered_or_truncated_file_is_refused(pin: Pin) -> None:
    folder = pin("crowd-envent", **crowd_files(CROWD))
    path = folder / "crowd-enVENT" / "enVent_gen_Data.csv"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"soup", b"soap"))
    with pytest.raises(EmosaeError, match=r"enVent_gen_Data\.csv was altered .* run `emosae fetch crowd-envent`"):
        load_corpus("crowd-envent", data_dir=folder)
    path.write_bytes(whole[:-10])
    for read in (data.appraisals, data.reader_annotations):
        with pytest.raises(EmosaeError, match=r"enVent_gen_Data\.csv was truncated"):
            read(folder)
    path.write_bytes(whole)
    assert len(data.appraisals(folder)) == 6


def test_a_missing_set_or_file_is_explained(pin: Pin, tmp_path: Path) -> None:
    with pytest.raises(EmosaeError, match=r"isear is not here; set EMOSAE_DATA_DIR .*, or run `emosae fetch isear`"):
        load_corpus("isear")
    folder = pin("crowd-envent", **crowd_files(CROWD))
    assert data.is_present("crowd-envent", data_dir=folder) and not data.is_present("crowd-envent")
    (folder / "crowd-enVENT" / "enVent_val_Data.csv").unlink()
    with pytest.raises(EmosaeError, match=r"crowd-envent lacks .*enVent_val_Data\.csv"):
        load_corpus("crowd-envent", data_dir=folder)
    assert not data.is_present("crowd-envent", data_dir=folder)


def test_folders_are_looked_at_in_order(pin: Pin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pin("crowd-envent", **crowd_files(CROWD))
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("EMOSAE_DATA_DIR", str(folder))
    # data_dir has nothing, so the folder of the environment is used.
    assert len(load_corpus("crowd-envent", emotions=None, data_dir=empty).frame) == 4
    assert data.fetch_corpus("crowd-envent") == [folder / f for f in data._CARDS["crowd-envent"].files]
    monkeypatch.setenv("EMOSAE_DATA_DIR", str(empty))
    assert not data.is_present("crowd-envent")
    (tmp_path / "cache").mkdir(exist_ok=True)
    folder.rename(tmp_path / "cache" / "datasets")
    assert data.is_present("crowd-envent")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """A web server on this machine: its address and the folder it serves."""
    served = tmp_path / "served"
    served.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(served))  # type: ignore[arg-type]

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", served
        running.shutdown()
        thread.join()


def test_fetching_checks_what_it_gets(
    server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address, served = server
    content = b"Sentence_id\tPrior_Emotion\tSentence\r\n5\tFear\tI felt ... in the lift\r\n"
    (served / "e.tsv").write_bytes(content)
    (served / "wrong.tsv").write_bytes(content[:-9])
    card = data._CARDS["enisear"]
    (file,) = card.files

    def point_at(name: str) -> None:
        source = data.SourceFile(f"{address}/{name}", hashlib.sha256(content).hexdigest(), len(content))
        monkeypatch.setitem(data._CARDS, "enisear", dataclasses.replace(card, files={file: source}))

    point_at("gone.tsv")
    with pytest.raises(EmosaeError, match=r"cannot fetch .*gone\.tsv .*; check the network"):
        data.fetch_corpus("enisear")
    point_at("wrong.tsv")
    with pytest.raises(EmosaeError, match=r"wrong\.tsv no longer holds the published file"):
        load_corpus("enisear", fetch=True)
    assert not data.is_present("enisear")

    point_at("e.tsv")
    with pytest.raises(EmosaeError, match="is not here"):
        load_corpus("enisear")
    assert load_corpus("enisear", fetch=True).frame["row_id"].tolist() == ["enisear/5"]
    path = tmp_path / "cache" / "datasets" / file
    assert path.read_bytes() == content
    # What was damaged in the cache is replaced when asked for again, not before.
    path.write_bytes(content + b"!")
    with pytest.raises(EmosaeError, match="was altered"):
        load_corpus("enisear")
    assert data.fetch_corpus("enisear") == [path]
    assert path.read_bytes() == content


def test_cards() -> None:
    found = {card.name: card for card in data.cards()}
    assert tuple(found) == ("emoscenes", "emodialogues", *PUBLIC_NAMES)
    for name, card in found.items():
        assert card.title and card.licence and card.citation and card.files
        assert card.is_public == (name in PUBLIC_NAMES)
        for source in card.files.values():
            if card.is_public:
                # A commit, not a branch: what lies behind the address cannot change.
                assert re.match(r"https://raw\.githubusercontent\.com/[^/]+/[^/]+/[0-9a-f]{40}/", str(source.url))
                assert re.fullmatch(r"[0-9a-f]{64}", str(source.sha256)) and source.size


# The public sets themselves

KEPT = {
    # anger, disgust, fear, joy, sadness, surprise
    "crowd-envent": (527, 530, 538, 504, 517, 503),
    "isear": (830, 812, 912, 952, 828, 0),
    "enisear": (138, 142, 140, 134, 134, 0),
    "emoevent": (369, 729, 146, 1989, 326, 224),
    "xed": (2101, 1295, 1347, 1482, 1361, 1188),
    "goemotions": (5198, 498, 640, 18051, 2480, 4480),
}


@needs_public
@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_sets_are_tidy(public: Callable[[str], data.Corpus], name: str) -> None:
    corpus = public(name)
    frame = corpus.frame
    assert tuple(frame.columns) == COLUMNS and adds_up(corpus) and frame["row_id"].is_unique
    assert tuple((frame["emotion"] == e).sum() for e in EMOTIONS) == KEPT[name]
    assert set(frame["emotion"]) <= {*EMOTIONS, *data.OTHER_LABELS}
    # In the two masked sets every mask is three dots.
    dirt = r"  |^\s|\s$|[\n\t\r\ufeff\u200b]|&amp;|â€|https?://"
    dirt += r"|…" if name in ("crowd-envent", "enisear") else ""
    assert not frame["text"].str.contains(dirt, regex=True).any()
    named = r"\b(?:anger|angry|disgust(?:ed|ing)?|fears?|fearful|joy|joyful|sad|sadness|sadly|surprised?|surprising)\b"
    assert not frame["text"].str.contains(named, case=False, regex=True).any()
    key = frame["text"].str.casefold().str.replace(r"[^\w]+", " ", regex=True).str.strip()
    assert key.is_unique
    assert (frame["text"].str.count(r"\w+") >= 3).all()
    assert set(frame["split"]) == set(SPLITS)
    assert len(frame[["group", "split"]].drop_duplicates()) == frame["group"].nunique()
    share = frame["split"].value_counts(normalize=True)
    if name not in ("emoevent", "goemotions", "crowd-envent"):
        assert abs(share["discovery"] - 0.5) < 0.06 and abs(share["test"] - 0.33) < 0.06


@needs_public
def test_public_counts(public: Callable[[str], data.Corpus]) -> None:
    # 42 writers said they had imagined the event; 6600 - 42 - 10 - 196 - 58 - 15 - 21 = 6258.
    assert dropped(public("crowd-envent")) == {
        "imagined event": 42,
        "under three words": 10,
        "label leak": 196,
        "conflicting labels": 58,
        "exact duplicate": 15,
        "near duplicate": 21,
    }
    assert len(public("crowd-envent").frame) == 6258
    isear = public("isear")
    assert isear.cleaning["rows read"] == 7666 and isear.cleaning["no response"] == 159
    assert not isear.frame["text"].str.contains(r"á|\\|\[|\]|(?i:no response)", regex=True).any()
    # Quotation marks come in pairs again.
    assert (isear.frame["text"].str.count('"') % 2 == 0).all()
    assert public("goemotions").cleaning["rows read"] == 43410 + 5426 + 5427
    assert public("xed").cleaning["rows read"] == 17528 + 9675


@needs_public
def test_a_choice_of_labels_is_a_part_of_the_whole(public: Callable[[str], data.Corpus]) -> None:
    whole = public("enisear").frame
    part = load_corpus("enisear", emotions=["fear", "guilt"], data_dir=PUBLIC).frame
    assert part.equals(whole[whole["emotion"].isin(["fear", "guilt"])].reset_index(drop=True))


HEX_ID = re.compile(r"[0-9a-f]{32}")


def ids_in(frame: pd.DataFrame) -> list[str]:
    values = [*map(str, frame.columns), *map(str, frame.index), *map(str, frame.to_numpy().ravel())]
    return [found for value in values for found in HEX_ID.findall(value)]


@needs_public
def test_no_frame_holds_a_worker_id_or_demographics(public: Callable[[str], data.Corpus]) -> None:
    workers: list[str] = []
    for file, encoding in (("enVent_gen_Data.csv", "cp1252"), ("enVent_val_Data.csv", "utf-8")):
        with (PUBLIC / "crowd-enVENT" / file).open(encoding=encoding, newline="") as stream:
            workers += [record["prolific_id"] for record in csv.DictReader(stream)]
    # What is looked for has the form of every id there is, and would be found.
    assert len(workers) == 12600 and all(HEX_ID.fullmatch(w) for w in workers)
    assert ids_in(pd.DataFrame({"group": ["x", f"writer {workers[0]}"]})) == [workers[0]]

    frames = [public("crowd-envent").frame, data.reader_annotations(PUBLIC), data.appraisals(PUBLIC)]
    assert [tuple(f.columns) for f in frames] == [
        COLUMNS,
        ("row_id", "emotion", "reader", "answer"),
        ("row_id", *APPRAISALS),
    ]
    for frame in frames:
        assert ids_in(frame) == []
        assert not frame.attrs


@needs_public
def test_groups_are_the_writers(public: Callable[[str], data.Corpus]) -> None:
    with (PUBLIC / "crowd-enVENT" / "enVent_gen_Data.csv").open(encoding="cp1252", newline="") as stream:
        writer = {f"crowd-envent/{r['text_id']}": r["prolific_id"] for r in csv.DictReader(stream)}
    frame = public("crowd-envent").frame
    pairs = set(zip(frame["group"], frame["row_id"].map(writer), strict=True))
    # As many pairs as groups and as writers: one group, one writer.
    assert len(pairs) == frame["group"].nunique() == len({w for _, w in pairs})
    assert frame["group"].str.fullmatch(r"crowd-envent/writer-\d+").all()
    # Seven questions to a person: no group of ISEAR is larger.
    assert public("isear").frame.groupby("group").size().max() == 7


@needs_public
def test_readers(public: Callable[[str], data.Corpus]) -> None:
    readers = data.reader_annotations(PUBLIC)
    assert len(readers) == 6000 and readers["row_id"].nunique() == 1200
    assert readers.groupby("row_id")["reader"].agg(list).map(lambda r: r == [0, 1, 2, 3, 4]).all()
    # The order of the file would show which answers one reader gave.
    assert readers["row_id"].str.removeprefix("crowd-envent/").astype(int).is_monotonic_increasing
    joined = readers.merge(public("crowd-envent").frame, on="row_id")
    assert set(joined["split"]) == {"test"}
    assert (joined["emotion_x"] == joined["emotion_y"]).all() and joined["row_id"].nunique() > 1100
    # 750 of the 6000 answers in the file are joy.
    assert (readers["answer"] == "joy").sum() == 750
    ratings = data.appraisals(PUBLIC)
    assert len(ratings) == 6600 and ratings[list(APPRAISALS)].isin([1, 2, 3, 4, 5]).all(axis=None)
    assert set(public("crowd-envent").frame["row_id"]) <= set(ratings["row_id"])


@needs_public
@pytest.mark.parametrize("name", ["crowd-envent", "enisear"])
def test_loading_twice_gives_the_same(public: Callable[[str], data.Corpus], name: str) -> None:
    again = load_corpus(name, emotions=None, data_dir=PUBLIC)
    assert again.frame.equals(public(name).frame) and again.sha256 == public(name).sha256
    # A fixed point known in advance: the order of the source and the split of a writer do not depend on the machine.
    assert again.frame["row_id"].iloc[0] == {"crowd-envent": "crowd-envent/215", "enisear": "enisear/271"}[name]
