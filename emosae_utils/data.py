"""Texts with emotion labels: the embedded sets, public corpora where they are present, and the user's own files.

Every set becomes one tidy frame with the same columns in the same order (`COLUMNS`). What is dropped on the way is
counted by reason, so that rows read = rows kept + the sum of the reasons. Cleaning looks at all labels of a set before
the labels asked for are chosen; which rows of an emotion are kept therefore never depends on what else was asked for.

Public files are never part of the repository. They are read from a folder the user names, or fetched when asked, and
their checksums are checked in both cases. Worker ids and demographics stay in the files: no frame holds them.
"""

from __future__ import annotations

import csv
import hashlib
import html
import io
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from emosae_utils.files import EmosaeError, cache_dir, pick, repo_dir, sha256_file, sha256_text

EMOTIONS: tuple[str, ...] = ("anger", "disgust", "fear", "joy", "sadness", "surprise")
OTHER_LABELS: tuple[str, ...] = (
    "anticipation",
    "boredom",
    "guilt",
    "neutral",
    "no-emotion",
    "other",
    "pride",
    "relief",
    "shame",
    "trust",
)
SPLITS: tuple[str, ...] = ("discovery", "validation", "test")
COLUMNS: tuple[str, ...] = (
    "row_id",
    "text",
    "emotion",
    "dataset",
    "split",
    "group",
    "topic",
    "person",
    "tense",
    "facet",
    "target",
)
APPRAISALS: tuple[str, ...] = (
    "suddenness",
    "familiarity",
    "predict_event",
    "pleasantness",
    "unpleasantness",
    "goal_relevance",
    "chance_responsblt",
    "self_responsblt",
    "other_responsblt",
    "predict_conseq",
    "goal_support",
    "urgency",
    "self_control",
    "other_control",
    "chance_control",
    "accept_conseq",
    "standards",
    "social_norms",
    "attention",
    "not_consider",
    "effort",
)
REASONS: tuple[str, ...] = (
    "missing label",
    "multi-label",
    "imagined event",
    "no response",
    "under three words",
    "label leak",
    "conflicting labels",
    "exact duplicate",
    "near duplicate",
    "other label",
)

_NULLABLE = ("topic", "person", "tense", "facet", "target")
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")

Row = dict[str, str | None]
Step = tuple[str, Callable[[str], str]]


@dataclass(frozen=True)
class SourceFile:
    """One file of a dataset.

    Attributes:
        url: public address the file is fetched from; None for embedded sets and own files.
        sha256: SHA-256 the file must have, in hex; None if it is not pinned.
        size: size of the published file, bytes; None if it is not pinned.
    """

    url: str | None = None
    sha256: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class DatasetCard:
    """What a dataset is, where it comes from and under which terms.

    Attributes:
        name: name that `load_corpus` takes.
        title: name for people.
        licence: terms of use as far as the sources state them.
        citation: publication to cite.
        homepage: where to read more.
        files: path below the data folder -> address, checksum and size.
        note: what a user should know before using it.
    """

    name: str
    title: str
    licence: str
    citation: str
    homepage: str
    files: Mapping[str, SourceFile]
    note: str = ""

    @property
    def is_public(self) -> bool:
        """True for sets that lie elsewhere and can be fetched; False for embedded sets and own files."""
        return any(source.url for source in self.files.values())


@dataclass(frozen=True)
class Corpus:
    """A loaded dataset.

    Attributes:
        frame: one row per text, columns `COLUMNS`: row_id (stable, unique), text, emotion (lower-case noun), dataset,
            split (discovery, validation, test), group (texts that share it must not be told apart by resampling: a
            writer, a topic, or the text itself), and, None where the set has no such thing, topic, person, tense,
            facet (kind of disgust or surprise) and target (the speaker of a dialogue whose emotion is asked).
        card: where it comes from.
        cleaning: counts. "rows read" and "rows kept"; "rows repaired: ..." for texts that were kept but altered; every
            other key is a reason for leaving rows out, one reason per row.
        sha256: one digest over the source files.
    """

    frame: pd.DataFrame
    card: DatasetCard
    cleaning: dict[str, int]
    sha256: str


def _public(repository: str, commit: str, files: Mapping[str, tuple[str, str, int]]) -> dict[str, SourceFile]:
    """Files of a repository at one commit: local path -> (path in the repository, SHA-256, bytes)."""
    base = f"https://raw.githubusercontent.com/{repository}/{commit}"
    return {name: SourceFile(f"{base}/{path}", sha256, size) for name, (path, sha256, size) in files.items()}


_CARDS: dict[str, DatasetCard] = {
    card.name: card
    for card in (
        DatasetCard(
            name="emoscenes",
            title="EmoScenes",
            licence="CC BY 4.0",
            citation="This project.",
            homepage="",
            files={"emoscenes/emoscenes.jsonl": SourceFile()},
            note="Constructed texts that name no emotion; topic, person and tense are crossed with emotion.",
        ),
        DatasetCard(
            name="emodialogues",
            title="EmoDialogues",
            licence="CC BY 4.0",
            citation="This project.",
            homepage="",
            files={"emodialogues/emodialogues.jsonl": SourceFile()},
            note="Constructed dialogues; the emotion is the target speaker's.",
        ),
        DatasetCard(
            name="crowd-envent",
            title="crowd-enVENT",
            licence="not stated; research use",
            citation=(
                "Troiano, E., Oberländer, L., & Klinger, R. (2023). Dimensional Modeling of Emotions in Text with "
                "Appraisal Theories: Corpus Creation, Annotation Reliability, and Prediction. Computational "
                "Linguistics, 49(1)."
            ),
            homepage="https://www.romanklinger.de/data-sets/",
            files=_public(
                "aminbana/emo-llm",
                "8d4ed2312aa7ac8783552ba3614d798e45462711",
                {
                    "crowd-enVENT/enVent_gen_Data.csv": (
                        "data/enVent_gen_Data.csv",
                        "941683c991923cdecf2953c4c945227bbbd3678b96139564c7ed68cb432c5a2c",
                        3601240,
                    ),
                    "crowd-enVENT/enVent_val_Data.csv": (
                        "data/enVent_val_Data.csv",
                        "395c940e4f4189ff170201ea71c9120935c8ab01307a99b707f09e75b60973f0",
                        1418936,
                    ),
                },
            ),
            note="Events reported by their writers, emotion words masked as '...'; 1,200 texts also judged by readers.",
        ),
        DatasetCard(
            name="isear",
            title="ISEAR",
            licence="reported as CC BY-NC-SA 3.0; the source repository says GPL-3.0",
            citation=(
                "Scherer, K. R., & Wallbott, H. G. (1994). Evidence for universality and cultural variation of "
                "differential emotion response patterning. Journal of Personality and Social Psychology, 66(2)."
            ),
            homepage="https://www.unige.ch/cisa/research/materials-and-online-research/research-material/",
            files=_public(
                "sinmaniphel/py_isear_dataset",
                "948f4cf80161ea28e6dc5bfb4ad729f21ff47723",
                {
                    "ISEAR/isear.csv": (
                        "isear.csv",
                        "370110fff70a1e1d9e23b10cf6db1f64876120fa02276afe5916fbfeb038cdca",
                        1670985,
                    )
                },
            ),
            note="Self-reports of students in many countries, translated; seven labels, no surprise; not masked.",
        ),
        DatasetCard(
            name="enisear",
            title="enISEAR with appraisals",
            licence="GPL-3.0 (source repository); no separate licence of the texts found",
            citation=(
                "Troiano, E., Padó, S., & Klinger, R. (2019). Crowdsourcing and Validating Event-focused Emotion "
                "Corpora for German and English. ACL 2019."
            ),
            homepage="https://github.com/bluzukk/appraisal-emotion-classification",
            files=_public(
                "bluzukk/appraisal-emotion-classification",
                "999f1ffaf6d03e31397306dd4cff6c2dc7efc53a",
                {
                    "enISEAR-appraisal/enISEAR_appraisal.tsv": (
                        "corpora/enISEAR-appraisal-V1/enISEAR_appraisal.tsv",
                        "689b5649730f2b8c083248ed7acda938eb0e533db2444ff95f308965c49d87ee",
                        192565,
                    )
                },
            ),
            note="'I felt ... when' events, emotion words masked as '...'; seven labels, no surprise.",
        ),
        DatasetCard(
            name="emoevent",
            title="EmoEvent (English)",
            licence="stated as Apache-2.0 in one place, as CC BY-NC-SA 4.0 in another",
            citation=(
                "Plaza-del-Arco, F. M., Strapparava, C., Ureña-López, L. A., & Martín-Valdivia, M. T. (2020). "
                "EmoEvent: A Multilingual Emotion Corpus based on different Events. LREC 2020."
            ),
            homepage="https://github.com/fmplaza/EmoEvent",
            files=_public(
                "fmplaza/EmoEvent",
                "f55f01c78e77fb2c711b40f3ff6925f605bc5101",
                {
                    "EmoEvent-en/train.tsv": (
                        "splits/en/train.tsv",
                        "ef53c0d66003210672683e97dde3e45f709774e417da1130e326542d7e5c50b6",
                        1126126,
                    ),
                    "EmoEvent-en/dev.tsv": (
                        "splits/en/dev.tsv",
                        "2e3b6ecf783ca28c29c8289641dc03c566a7bda8a00126ce8206f6098cf80e28",
                        164881,
                    ),
                    "EmoEvent-en/test.tsv": (
                        "splits/en/test.tsv",
                        "5bfa51b22df540684de2205217b4d99360f426d6afbc02ed1186b5975702fa29",
                        319042,
                    ),
                },
            ),
            note="Tweets about eight events; users masked as USER, links removed here. Not masked for emotion.",
        ),
        DatasetCard(
            name="xed",
            title="XED (English)",
            licence="CC BY 4.0",
            citation=(
                "Öhman, E., Pàmies, M., Kajava, K., & Tiedemann, J. (2020). XED: A Multilingual Dataset for Sentiment "
                "Analysis and Emotion Detection. COLING 2020."
            ),
            homepage="https://github.com/Helsinki-NLP/XED",
            files=_public(
                "Helsinki-NLP/XED",
                "76666d251f147cf518071bef4f8415dab6b96115",
                {
                    "XED-en/en-annotated.tsv": (
                        "AnnotatedData/en-annotated.tsv",
                        "26ac0254fbdb8b09cf2b00d44041d9084ece31bd200ae7c0e0662fbd8b037d98",
                        783663,
                    ),
                    "XED-en/neu_en.txt": (
                        "AnnotatedData/neu_en.txt",
                        "6e8b38af83b80fb64ec1139007973b1f09ec16d48549e82de22423cdba259f08",
                        314079,
                    ),
                },
            ),
            note="Film subtitle lines. Names are masked ([PERSON]) in emotional lines but stand in the neutral ones.",
        ),
        DatasetCard(
            name="goemotions",
            title="GoEmotions (Ekman mapping)",
            licence="Apache-2.0",
            citation=(
                "Demszky, D., Movshovitz-Attias, D., Ko, J., Cowen, A., Nemade, G., & Ravi, S. (2020). GoEmotions: A "
                "Dataset of Fine-Grained Emotions. ACL 2020."
            ),
            homepage="https://github.com/google-research/google-research/tree/master/goemotions",
            files=_public(
                "monologg/GoEmotions-pytorch",
                "b75f9d3a8b76bc1060687925b04ca98a1b8ea66b",
                {
                    "goemotions/ekman/train.tsv": (
                        "data/ekman/train.tsv",
                        "bb74d10aec0975674c665205741ba9fe644cd70f682214624997f3770fd9e53f",
                        3480448,
                    ),
                    "goemotions/ekman/dev.tsv": (
                        "data/ekman/dev.tsv",
                        "011e6579adc4d9bb2ffd908879b99e1594e7647b262cbb2e1c5c9c1c4d7d8bcc",
                        434234,
                    ),
                    "goemotions/ekman/test.tsv": (
                        "data/ekman/test.tsv",
                        "f9f9b91827fe134259469368b93abddc2a52e2e2a87beab661023b06cf490baa",
                        431950,
                    ),
                    "goemotions/ekman/labels.txt": (
                        "data/ekman/labels.txt",
                        "5ecd91c315ebf550ac798f06549e35a6ee1fb90866608fd640c24d520dc6aa0c",
                        47,
                    ),
                },
            ),
            note="Comments whose 27 labels were mapped to six and neutral (joy holds every positive one). Not masked.",
        ),
    )
}


# Labels

# Spellings in the sources and in users' files -> the nouns used here.
_ALIASES = {
    "angry": "anger",
    "bored": "boredom",
    "disgusted": "disgust",
    "afraid": "fear",
    "fearful": "fear",
    "guilty": "guilt",
    "happy": "joy",
    "happiness": "joy",
    "joyful": "joy",
    "no-emo": "no-emotion",
    "none": "no-emotion",
    "others": "other",
    "proud": "pride",
    "relieved": "relief",
    "sad": "sadness",
    "ashamed": "shame",
    "surprised": "surprise",
}

# The label word and its inflections, misspellings that occur in the sources included. Synonyms (scared, happy) stay:
# a text may tell of a scared dog and still leave the writer's emotion to be inferred.
_LABEL_WORDS = {
    "anger": r"anger\w*|angr\w+",
    "anticipation": r"anticipat\w+",
    "boredom": r"bored\w*|boring\w*|bores?",
    "disgust": r"disgust\w*",
    "fear": r"fear\w*",
    "guilt": r"guilt\w*",
    "joy": r"joys?|joyful\w*|joyous\w*|joyless\w*|overjoy\w*",
    "pride": r"prid(?:e|es|ed|ing|eful\w*)|proud\w*",
    "relief": r"reliefs?|reliev\w+",
    "sadness": r"sad|sadder|saddest|sadly|sadness\w*|sadden\w*",
    "shame": r"shame\w*|shaming|(?:un)?asham\w+",
    "surprise": r"(?:un)?(?:surpri[sz]|supris)\w*",
    "trust": r"(?:dis|en|mis|un)?trust\w*",
}
_NO_WORD = ("neutral", "no-emotion", "other", "")


def _canonical(label: str) -> str:
    plain = re.sub(r"[\s_]+", "-", label.strip().casefold())
    return _ALIASES.get(plain, plain)


def _leak_pattern(labels: Iterable[str]) -> re.Pattern[str]:
    """Any word that names one of the six emotions or of `labels`."""
    named = sorted({*EMOTIONS, *labels} - set(_NO_WORD))
    words = "|".join(_LABEL_WORDS.get(label, re.escape(label)) for label in named)
    return re.compile(rf"\b(?:{words})\b", re.IGNORECASE)


# Repairs of text

_MOJIBAKE = re.compile("[ÂÃâ][\u0080-\u00bf\u0152-\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]")
# Zero-width space, word joiner, byte-order mark, soft hyphen, control characters; not the joiner inside emoji.
_INVISIBLE = re.compile("[\u200b\u2060\ufeff\u00ad\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f]")


def _fix_encoding(text: str) -> str:
    """UTF-8 that was once read as cp1252 (â€™ for ’), turned back where that is possible."""
    if not _MOJIBAKE.search(text):
        return text
    try:
        return text.encode("cp1252").decode("utf-8")
    except UnicodeError:
        return text


def _fix_spacing(text: str) -> str:
    """No invisible characters, single spaces, no line breaks."""
    return " ".join(_INVISIBLE.sub("", unicodedata.normalize("NFC", text)).split())


def _fix_spacing_in_lines(text: str) -> str:
    """As `_fix_spacing`, with line breaks kept: they tell the turns of a dialogue apart."""
    lines = (_fix_spacing(line) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def _fix_masks(text: str) -> str:
    """Every mask, and every other ellipsis, is three dots; the sources have '…', '..', and '....' at full stops."""
    return re.sub(r"\.{2,}", "...", text.replace("…", "..."))


def _drop_links(text: str) -> str:
    return re.sub(r"https?://\S+", " ", text)


def _fix_tokenised(text: str) -> str:
    """'No , she said .' -> 'No, she said.'; an ellipsis stays apart."""
    return re.sub(r" +([,;:!?]|\.(?!\.))", r"\1", text)


def _drop_line_marks(text: str) -> str:
    # ISEAR has 'á' where a line of the original ended. No word of it is spelt with that letter.
    return text.replace("á", " ")


def _fix_quotes(text: str) -> str:
    # ISEAR's quoted words read \word\" and such a text ends in a stray quotation mark.
    if "\\" not in text:
        return text
    return text.removesuffix('"').replace('\\"', '"').replace("\\", '"')


def _fix_letters(text: str) -> str:
    # Letters that ISEAR lost in conversion: fiancT, Sm÷rgasbord, 180¦.
    return re.sub(r"(?<=[a-z])T(?=e?s?\b)", "é", text).replace("÷", "ö").replace("¦", "°")


def _drop_brackets(text: str) -> str:
    """ISEAR sets some answers, but not only empty ones, in brackets as a whole."""
    return re.sub(r"^\s*\[([^\[\]]*)\]\s*$", r"\1", text)


_ENCODING: Step = ("encoding", _fix_encoding)
_SPACING: Step = ("spacing", _fix_spacing)
_MASKS: Step = ("masks", _fix_masks)
_ENTITIES: Step = ("entities", html.unescape)

# An ISEAR answer without an event. Looked for in short answers only, from the beginning: "When I read a lot and did not
# remember anything" is an event.
_NO_RESPONSE = re.compile(
    r"""\W*(?:honestly,?\ )?(?:
    no\ (?:response|reponse|answer|description)\b
    |(?:nothing|none|never|blank|depressions)\W*$
    |(?:never\ experienced|not\ (?:applicable|included)|does(?:\ not|n't)\ apply|has\ not\ (?:really\ )?happened)\b
    |(?:the\ )?same\ (?:as|for|event)\b
    |(?:i\ )?(?:can\ ?not|can't|could\ not|couldn't|do\ not|don't)\ (?:really\ )?
        (?:remember|recall|think\ of|describe|know\W*$)
    |(?:i\ )?can\ think\ of\ no\b
    |(?:i\ )?(?:have\ )?(?:never|not)\ (?:felt|experienced)\b
    |(?:i\ )?haven't\ (?:felt|experienced|been\ frightened)\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_NO_RESPONSE_WORDS = 14


def _repair(text: str, steps: Iterable[Step], counts: Counter[str]) -> str:
    for name, step in steps:
        before, text = text, step(text)
        counts[name] += text != before
    return text


# Readers: one per source. Each returns rows (text, emotion, row_id and what the set has of the other columns; a "fault"
# names a reason to leave the row out that only the source knows of) and counts of repaired texts.

Read = tuple[list[Row], Counter[str]]


def _table(path: Path, *, delimiter: str, encoding: str = "utf-8", quoted: bool = True) -> list[list[str]]:
    """Records of a delimited file; line ends inside quotes are kept, odd Unicode line ends do not split a record."""
    text = path.read_bytes().decode(encoding)
    lines = io.StringIO(text, newline="")
    if quoted:
        return [record for record in csv.reader(lines, delimiter=delimiter) if record]
    return [record for record in csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE) if record]


def _records(path: Path, *, delimiter: str, encoding: str = "utf-8") -> list[dict[str, str]]:
    header, *rows = _table(path, delimiter=delimiter, encoding=encoding)
    return [dict(zip(header, row, strict=True)) for row in rows]


def _codes(ids: Iterable[str], prefix: str) -> list[str]:
    """Numbers in order of appearance instead of ids."""
    seen: dict[str, str] = {}
    return [seen.setdefault(i, f"{prefix}-{len(seen)}") for i in ids]


def _read_crowd_envent(paths: Mapping[str, Path]) -> Read:
    judged_texts = {r["text_id"] for r in _records(paths["crowd-enVENT/enVent_val_Data.csv"], delimiter=",")}
    records = _records(paths["crowd-enVENT/enVent_gen_Data.csv"], delimiter=",", encoding="cp1252")
    writers = _codes((r["prolific_id"] for r in records), "crowd-envent/writer")
    # Writers of texts that readers judged are test writers with all they wrote, so that people and models are compared
    # on held-out texts; the others go to discovery and validation.
    judged = {writer for r, writer in zip(records, writers, strict=True) if r["text_id"] in judged_texts}
    rows, counts = [], Counter[str]()
    for record, writer in zip(records, writers, strict=True):
        row: Row = {
            "row_id": f"crowd-envent/{record['text_id']}",
            "text": _repair(record["hidden_emo_text"], (_ENCODING, _MASKS, _SPACING), counts),
            "emotion": record["emotion"],
            "group": writer,
            "split": "test" if writer in judged else _hash_split(writer, discovery=0.8, validation=0.2),
        }
        # From the fifth round on, writers were asked whether the event had happened to them.
        if record["did_you_lie?"].startswith("I never experienced"):
            row["fault"] = "imagined event"
        rows.append(row)
    return rows, counts


def _read_isear(paths: Mapping[str, Path]) -> Read:
    # A plain split: the file's quotation marks do not quote. Some texts were broken over several fields, so the text is
    # everything between the key (field 40 of 43) and the last two fields.
    header, *lines = paths["ISEAR/isear.csv"].read_bytes().decode("utf-8").rstrip("\n").split("\n")
    first, name = header.split("|").index("SIT"), header.split("|").index("Field1")
    table = [line.split("|") for line in lines]
    steps: tuple[Step, ...] = (
        ("line-break marks", _drop_line_marks),
        ("quotation marks", _fix_quotes),
        ("letters", _fix_letters),
        ("brackets", _drop_brackets),
        _ENCODING,
        _SPACING,
    )
    rows, counts = [], Counter[str]()
    for n, (fields, writer) in enumerate(zip(table, _codes((f[0] for f in table), "isear/writer"), strict=True)):
        # Where a text was broken, the quotation mark that closes it may have ended up in the field behind it.
        text = " ".join(fields[first:-2]) + ('"' if fields[-2].endswith('"') else "")
        text = _repair(text, steps, counts)
        # The file's own key holds country, subject and label; the record's number does not.
        row: Row = {"row_id": f"isear/{n}", "text": text, "emotion": fields[name], "group": writer}
        if len(text.split()) <= _NO_RESPONSE_WORDS and _NO_RESPONSE.match(text):
            row["fault"] = "no response"
        rows.append(row)
    return rows, counts


def _read_enisear(paths: Mapping[str, Path]) -> Read:
    counts = Counter[str]()
    rows: list[Row] = [
        {
            "row_id": f"enisear/{record['Sentence_id']}",
            "text": _repair(record["Sentence"], (_ENCODING, _MASKS, _SPACING), counts),
            "emotion": record["Prior_Emotion"],
        }
        for record in _records(paths["enISEAR-appraisal/enISEAR_appraisal.tsv"], delimiter="\t")
    ]
    return rows, counts


_OWN_SPLITS = {"train": "discovery", "dev": "validation", "test": "test"}


def _read_emoevent(paths: Mapping[str, Path]) -> Read:
    steps = (_ENCODING, _ENTITIES, ("links", _drop_links), _SPACING)
    rows, counts = [], Counter[str]()
    for part, split in _OWN_SPLITS.items():
        for n, record in enumerate(_records(paths[f"EmoEvent-en/{part}.tsv"], delimiter="\t")):
            row: Row = {
                "row_id": f"emoevent/{part}-{n}",
                "text": _repair(record["tweet"], steps, counts),
                "emotion": record["emotion"],
                "split": split,
                "topic": record["event"],
            }
            rows.append(row)
    return rows, counts


_XED_LABELS = ("anger", "anticipation", "disgust", "fear", "joy", "sadness", "surprise", "trust")


def _read_xed(paths: Mapping[str, Path]) -> Read:
    # Emotional lines are tokenised and neutral ones are not; left so, spaces before full stops would tell them apart.
    steps = (_ENCODING, _SPACING, ("tokenised", _fix_tokenised))
    rows, counts = [], Counter[str]()
    for n, (text, labels) in enumerate(_table(paths["XED-en/en-annotated.tsv"], delimiter="\t", quoted=False)):
        numbers = [int(label) for label in labels.split(",")]
        row: Row = {"row_id": f"xed/annotated-{n}", "text": _repair(text, steps, counts)}
        if len(numbers) == 1:
            row["emotion"] = _XED_LABELS[numbers[0] - 1]
        else:
            row["fault"] = "multi-label"
        rows.append(row)
    for n, fields in enumerate(_table(paths["XED-en/neu_en.txt"], delimiter="\t", quoted=False)):
        # A few lines have empty fields behind the text.
        text = _repair(fields[1], steps, counts)
        rows.append({"row_id": f"xed/neutral-{n}", "text": text, "emotion": "neutral"})
    return rows, counts


def _read_goemotions(paths: Mapping[str, Path]) -> Read:
    labels = paths["goemotions/ekman/labels.txt"].read_text(encoding="utf-8").split()
    rows, counts = [], Counter[str]()
    for part, split in _OWN_SPLITS.items():
        for n, (text, numbers, _) in enumerate(_table(paths[f"goemotions/ekman/{part}.tsv"], delimiter="\t")):
            row: Row = {
                "row_id": f"goemotions/{part}-{n}",
                "text": _repair(text, (_ENCODING, _ENTITIES, _SPACING), counts),
                "split": split,
            }
            if "," in numbers:
                row["fault"] = "multi-label"
            else:
                row["emotion"] = labels[int(numbers)]
            rows.append(row)
    return rows, counts


def _json_lines(path: Path) -> list[dict[str, object]]:
    records = []
    for n, line in enumerate(_decoded(path).split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise EmosaeError(f"line {n} of {path} is not JSON ({error}); correct or remove it") from error
            if not isinstance(record, dict):
                raise EmosaeError(f"line {n} of {path} is not a JSON object; write one object per line")
            records.append(record)
    return records


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EmosaeError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error


def _string(value: object) -> str | None:
    # NaN is the one value that differs from itself; pandas' NA cannot be asked.
    return None if value is None or value is pd.NA or value != value or value == "" else str(value)


def _dialogue(turns: object, target: object, where: str) -> str:
    try:
        pairs = [(str(name), str(line)) for name, line in turns]  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise EmosaeError(f"the turns of {where} are not [name, line] pairs; correct the file") from error
    if target not in {name for name, _ in pairs}:
        raise EmosaeError(f"the target {target!r} of {where} says nothing in it; correct the file")
    return "\n".join(f"{name}: {line}" for name, line in pairs)


def _read_embedded(paths: Mapping[str, Path], *, name: str) -> Read:
    path = paths[f"{name}/{name}.jsonl"]
    rows, counts = [], Counter[str]()
    body = "turns" if name == "emodialogues" else "text"
    for n, record in enumerate(_json_lines(path), start=1):
        missing = [key for key in ("id", "topic", "split", "emotion", body) if record.get(key) in (None, "")]
        if missing:
            raise EmosaeError(f"record {n} of {path} has no {', '.join(missing)}; correct the file")
        text = record["text"] if body == "text" else _dialogue(record["turns"], record.get("target"), f"{record['id']}")
        row = {key: _string(record.get(key)) for key in ("emotion", "split", "topic", *_NULLABLE)}
        row["row_id"], row["group"] = f"{name}/{record['id']}", row["topic"]
        row["text"] = _repair(str(text), (_ENCODING, ("spacing", _fix_spacing_in_lines)), counts)
        rows.append(row)
    return rows, counts


def _read_own(path: Path, dataset: str) -> Read:
    """A user's file. Columns text and emotion are required; group, split and the nullable columns are optional."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            table = pd.read_parquet(path)
            records: list[dict[str, object]] = [
                dict(zip(map(str, table.columns), values, strict=True)) for values in table.itertuples(index=False)
            ]
            columns = {str(c) for c in table.columns}
        elif suffix == ".jsonl":
            records = _json_lines(path)
            columns = set().union(*(r.keys() for r in records)) if records else set()
        else:
            lines = io.StringIO(_decoded(path), newline="")
            reader = csv.DictReader(lines, delimiter="," if suffix == ".csv" else "\t", restkey="", strict=True)
            records = [dict(r) for r in reader]
            # A text with commas and no quotes would be cut at the first one without a word.
            if long := [n for n, record in enumerate(records, start=1) if record.get("")]:
                raise ValueError(f"record {long[0]} has more fields than the header, put quotes around its text")
            columns = set(reader.fieldnames or ())
    except (OSError, ValueError, csv.Error) as error:
        reason = str(error).split("\n")[0]
        raise EmosaeError(f"cannot read {path} as {suffix[1:]}: {reason}; check the file") from error
    missing = [column for column in ("text", "emotion") if column not in columns]
    if missing:
        found = ", ".join(sorted(columns)) or "nothing"
        raise EmosaeError(f"{path} has no column {' and '.join(missing)} (found: {found}); rename or add it")
    steps = (_ENCODING, ("spacing", _fix_spacing_in_lines))
    rows, counts = [], Counter[str]()
    for n, record in enumerate(records):
        row = {key: _string(record.get(key)) for key in ("emotion", "group", "split", *_NULLABLE)}
        if row["split"] is not None:
            row["split"] = _split_name(row["split"], path)
        row["row_id"] = f"{dataset}/{n}"
        row["text"] = _repair(_string(record.get("text")) or "", steps, counts)
        rows.append(row)
    return rows, counts


def _split_name(split: str, path: Path) -> str:
    known = {s: s for s in SPLITS} | _OWN_SPLITS | {"val": "validation", "valid": "validation"}
    try:
        return known[pick("split", split.strip().lower(), known)]
    except EmosaeError as error:
        raise EmosaeError(f"{path}: {error}") from error


_READERS: dict[str, Callable[[Mapping[str, Path]], Read]] = {
    "emoscenes": partial(_read_embedded, name="emoscenes"),
    "emodialogues": partial(_read_embedded, name="emodialogues"),
    "crowd-envent": _read_crowd_envent,
    "isear": _read_isear,
    "enisear": _read_enisear,
    "emoevent": _read_emoevent,
    "xed": _read_xed,
    "goemotions": _read_goemotions,
}


# Cleaning


def _key(text: str) -> str:
    """What is left of a text when case, punctuation and spacing do not count."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _n_words(text: str) -> int:
    """Words, not counting masks and free-standing punctuation."""
    return sum(any(c.isalnum() for c in word) for word in text.split())


def _hash_split(group: str, discovery: float = 0.50, validation: float = 0.17) -> str:
    """The split of a group by a hash of the group alone, in these shares; what is left is test."""
    share = int(hashlib.sha256(group.encode()).hexdigest()[:12], 16) / 16**12
    return "discovery" if share < discovery else "validation" if share < discovery + validation else "test"


def _clean(rows: Sequence[Row], asked: Sequence[str] | None) -> tuple[list[Row], Counter[str]]:
    """Rows that stay, in their order, and how many were left out for each reason. Labels are canonical already."""
    leaks = _leak_pattern({row["emotion"] or "" for row in rows})
    dropped = Counter[str]()
    sound: list[Row] = []
    for row in rows:
        text = row["text"] or ""
        fault = row.get("fault") or ("" if row["emotion"] else "missing label")
        if not fault and _n_words(text) < 3:
            fault = "under three words"
        if not fault and leaks.search(text):
            fault = "label leak"
        if fault:
            dropped[fault] += 1
        else:
            sound.append(row)

    # The same dialogue may be asked about two speakers: those are two rows.
    keys = [(_key(row["text"] or ""), row["target"]) for row in sound]
    labels: dict[tuple[str, str | None], set[str | None]] = {}
    for key, row in zip(keys, sound, strict=True):
        labels.setdefault(key, set()).add(row["emotion"])
    kept: list[Row] = []
    seen: dict[tuple[str, str | None], set[str | None]] = {}
    for key, row in zip(keys, sound, strict=True):
        texts = seen.setdefault(key, set())
        if len(labels[key]) > 1:
            dropped["conflicting labels"] += 1
        elif row["text"] in texts:
            dropped["exact duplicate"] += 1
        elif texts:
            dropped["near duplicate"] += 1
        elif asked is not None and row["emotion"] not in asked:
            dropped["other label"] += 1
        else:
            kept.append(row)
        texts.add(row["text"])
    return kept, dropped


def _complete(rows: Iterable[Row], dataset: str) -> None:
    """Fill in, in place, what a reader left open: canonical label, group, split and empty columns."""
    for row in rows:
        row["emotion"] = _canonical(row.get("emotion") or "")
        row["dataset"] = dataset
        group = row["group"] = row.get("group") or row["row_id"] or ""
        row["split"] = row.get("split") or _hash_split(group)
        for column in _NULLABLE:
            row.setdefault(column, None)


def _check_rows(rows: Sequence[Row], source: str) -> None:
    for row_id, n in Counter(row["row_id"] for row in rows).items():
        if n > 1:
            raise EmosaeError(f"{source} holds {row_id} {n} times; give every row an id of its own")
    places: dict[str | None, set[str | None]] = {}
    for row in rows:
        places.setdefault(row["group"], set()).add(row["split"])
    for group, splits in places.items():
        if unknown := splits - set(SPLITS):
            raise EmosaeError(f"{source} has the unknown split {unknown.pop()!r}; use one of {', '.join(SPLITS)}")
        if len(splits) > 1:
            found = " and ".join(s for s in SPLITS if s in splits)
            raise EmosaeError(f"{source} has the group {group!r} in {found}; keep each group in one split")


def _frame(rows: Sequence[Row]) -> pd.DataFrame:
    frame = pd.DataFrame({column: [row[column] for row in rows] for column in COLUMNS})
    for column in _NULLABLE:
        # An object column, for absent values to be None and not NaN.
        frame[column] = pd.Series([row[column] for row in rows], dtype=object)
    return frame


def _asked(emotions: Sequence[str] | None, present: Iterable[str]) -> tuple[str, ...] | None:
    if emotions is None:
        return None
    if isinstance(emotions, str):
        raise EmosaeError(f"emotions takes a list of labels, got the string {emotions!r}; write [{emotions!r}]")
    if not emotions:
        raise EmosaeError("no emotion was asked for; name at least one, or pass None for all labels")
    known = {*EMOTIONS, *OTHER_LABELS, *present} - {""}
    return tuple(pick("emotion", emotion, known) for emotion in emotions)


# Files


def _roots(card: DatasetCard, data_dir: Path | None) -> list[Path]:
    """Folders a set may lie in, in the order they are looked at."""
    given = [data_dir] if data_dir is not None else []
    if not card.is_public:
        return [*given, repo_dir() / "data"]
    if named := os.environ.get("EMOSAE_DATA_DIR"):
        given.append(Path(named))
    try:
        return [*given, _fetched_dir()]
    except EmosaeError:
        # Nothing was ever fetched into a cache that cannot be made; whoever only looks need not hear of it.
        return given


def _fetched_dir() -> Path:
    return cache_dir() / "datasets"


def _find(card: DatasetCard, data_dir: Path | None) -> dict[str, Path] | None:
    """Paths of a set's files in the first folder that has all of them."""
    for root in _roots(card, data_dir):
        paths = {name: root / name for name in card.files}
        if all(path.is_file() for path in paths.values()):
            return paths
    return None


def _absent(card: DatasetCard, data_dir: Path | None) -> EmosaeError:
    for root in _roots(card, data_dir):
        missing = [name for name in card.files if not (root / name).is_file()]
        if len(missing) < len(card.files):
            remedy = f"or run `emosae fetch {card.name}`" if card.is_public else "from version control"
            return EmosaeError(f"dataset {card.name} lacks {root / missing[0]}; put the file back {remedy}")
    if not card.is_public:
        where = repo_dir() / "data" / next(iter(card.files))
        return EmosaeError(f"{where} is missing; it belongs to the repository, check it out again")
    return EmosaeError(
        f"dataset {card.name} is not here; set EMOSAE_DATA_DIR to a folder that holds {next(iter(card.files))}, "
        f"or run `emosae fetch {card.name}`"
    )


def _checked(card: DatasetCard, paths: Mapping[str, Path]) -> str:
    """Compare files with the card's checksums; one digest over all of them.

    Raises:
        EmosaeError: if a file is not the published one.
    """
    sums = {}
    for name, path in paths.items():
        pinned = card.files[name]
        sums[name] = sha256_file(path)
        if pinned.sha256 is not None and sums[name] != pinned.sha256:
            size = path.stat().st_size
            how = "truncated" if pinned.size is not None and size < pinned.size else "altered"
            raise EmosaeError(
                f"{path} was {how} ({size} bytes, the published file has {pinned.size}; SHA-256 differs); delete it "
                f"and run `emosae fetch {card.name}`"
            )
    return sha256_text(*(part for name in sorted(sums) for part in (name, sums[name])))


def cards() -> tuple[DatasetCard, ...]:
    """The cards of all named datasets, the embedded ones (`is_public` False) first."""
    return tuple(_CARDS.values())


def is_present(name: str, *, data_dir: Path | None = None) -> bool:
    """Whether all files of a named dataset are there; their checksums are looked at when the set is loaded.

    Raises:
        EmosaeError: for an unknown name.
    """
    return _find(_CARDS[pick("dataset", name, _CARDS)], data_dir) is not None


def which_are_here(names: Iterable[str]) -> tuple[list[str], tuple[str, ...]]:
    """Of dataset names and paths, those that can be loaded, and the named sets that are not on this machine.

    A path counts as here; `load_corpus` says if it is not.

    Raises:
        EmosaeError: if none is here.
    """
    names = list(names)
    absent = tuple(name for name in names if name in _CARDS and not is_present(name))
    here = [name for name in names if name not in absent]
    if not here:
        raise EmosaeError(f"none of the datasets {', '.join(names)} is here; see `emosae list`")
    return here, absent


def fetch_corpus(name: str) -> list[Path]:
    """Make sure a named dataset is here and unaltered, and return the paths of its files.

    A set that lies in `EMOSAE_DATA_DIR` is only checked. Otherwise its files are fetched from their public address
    into `cache_dir()/"datasets"`; those already there with the right checksum are kept, altered ones replaced.

    Raises:
        EmosaeError: for an unknown name, a failed download, or a file that is not the published one.
    """
    card = _CARDS[pick("dataset", name, _CARDS)]
    found = _find(card, None)
    if not card.is_public and found is None:
        raise _absent(card, None)
    if found is not None and not next(iter(found.values())).is_relative_to(_fetched_dir()):
        _checked(card, found)
        return list(found.values())
    return [_fetch_file(card, file) for file in card.files]


def _fetch_file(card: DatasetCard, file: str) -> Path:
    # Imported here: the network library takes a while to import, and most runs never need it.
    import pooch

    source, path = card.files[file], _fetched_dir() / file
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("WARNING")
    try:
        pooch.retrieve(
            source.url,
            known_hash=f"sha256:{source.sha256}",
            path=path.parent,
            fname=path.name,
            downloader=pooch.HTTPDownloader(timeout=60),
        )
    except ValueError as error:
        raise EmosaeError(
            f"{source.url} no longer holds the published file (SHA-256 differs); get {file} elsewhere and set "
            "EMOSAE_DATA_DIR"
        ) from error
    except OSError as error:
        # Errors of the network library are OSErrors too.
        raise EmosaeError(
            f"cannot fetch {source.url} ({type(error).__name__}); check the network, or set EMOSAE_DATA_DIR to a "
            f"folder that holds {file}"
        ) from error
    finally:
        logger.setLevel(level)
    return path


def _locate(card: DatasetCard, data_dir: Path | None, fetch: bool) -> dict[str, Path]:
    paths = _find(card, data_dir)
    if paths is None and fetch and card.is_public:
        paths = dict(zip(card.files, fetch_corpus(card.name), strict=True))
    if paths is None:
        raise _absent(card, data_dir)
    return paths


def _own_path(name_or_path: str | Path) -> Path | None:
    """The path if the argument is meant as one: a Path, an existing file, or something with a separator or suffix."""
    if isinstance(name_or_path, Path):
        return name_or_path
    path = Path(name_or_path)
    looks_like = path.suffix.lower() in _SUFFIXES or len(path.parts) > 1 or path.is_file()
    return path if looks_like and name_or_path not in _CARDS else None


def load_corpus(
    name_or_path: str | Path,
    *,
    emotions: Sequence[str] | None = EMOTIONS,
    data_dir: Path | None = None,
    fetch: bool = False,
) -> Corpus:
    """Load a named dataset or a file of one's own, cleaned and with fixed splits.

    Named sets are looked for in `data_dir`, then in the folder `EMOSAE_DATA_DIR` names, then in
    `cache_dir()/"datasets"`; embedded sets in `data_dir`, then in the repository. Rows keep the order of the source.
    A set's own split is kept (train is discovery, dev is validation); other sets are split by a hash of the group, one
    half to one sixth to one third. No group is in two splits, and no text occurs twice.

    Args:
        name_or_path: a name of `cards()`, or a .csv, .tsv, .jsonl or .parquet file (UTF-8) with the columns text and
            emotion and, if wanted, group, topic, split, target, person, tense, facet.
        emotions: labels to keep, lower-case nouns; None keeps all.
        data_dir: folder of public datasets.
        fetch: fetch a public set that is not here; without it there is no network access.

    Raises:
        EmosaeError: for an unknown dataset or emotion (with the nearest match), a missing or altered file, a file
            that cannot be read or lacks a column, a group in two splits, or if no row is left.
    """
    path = _own_path(name_or_path)
    if path is not None:
        if path.suffix.lower() not in _SUFFIXES:
            raise EmosaeError(f"cannot read {path}: the suffix is none of {', '.join(_SUFFIXES)}; convert the file")
        if not path.is_file():
            raise EmosaeError(f"{path} is missing; check the path, or name one of the datasets {', '.join(_CARDS)}")
        # A file called isear.csv is not ISEAR.
        name = f"own-{path.stem}" if path.stem in _CARDS else path.stem
        digest = sha256_file(path)
        files = {path.name: SourceFile(sha256=digest, size=path.stat().st_size)}
        card = DatasetCard(name, path.name, "the user's own", "", "", files)
        digest = sha256_text(path.name, digest)
        rows, repaired = _read_own(path, name)
    else:
        card = _CARDS[pick("dataset", str(name_or_path), _CARDS)]
        # Checked before any reading, so that a misspelt emotion does not wait for a download.
        if emotions is not None:
            _asked(emotions, ())
        paths = _locate(card, data_dir, fetch)
        digest = _checked(card, paths)
        rows, repaired = _READERS[card.name](paths)

    _complete(rows, card.name)
    _check_rows(rows, card.name)
    asked = _asked(emotions, (row["emotion"] or "" for row in rows))
    kept, dropped = _clean(rows, asked)
    cleaning = {"rows read": len(rows)} | {reason: dropped[reason] for reason in REASONS} | {"rows kept": len(kept)}
    cleaning |= {f"rows repaired: {name}": n for name, n in repaired.items()}
    if not kept:
        left_out = ", ".join(f"{reason} {n}" for reason, n in dropped.items()) or "the file has no rows"
        raise EmosaeError(f"no row of {card.name} is left ({left_out}); check its texts and the emotions asked for")
    return Corpus(_frame(kept), card, cleaning, digest)


def _crowd_envent_file(name: str, data_dir: Path | None, encoding: str) -> list[dict[str, str]]:
    card = _CARDS["crowd-envent"]
    paths = _locate(card, data_dir, fetch=False)
    _checked(card, paths)
    return _records(paths[f"crowd-enVENT/{name}"], delimiter=",", encoding=encoding)


def reader_annotations(data_dir: Path | None = None) -> pd.DataFrame:
    """What readers of crowd-enVENT took the writer's emotion to be: five readers for each of 1,200 texts.

    Columns: row_id (as in `load_corpus`, which may leave some of these texts out), emotion (the writer's), reader (0 to
    4 within the text; the same number in two texts is not the same person), answer (the reader's label). Ordered by
    text number, then reader.

    Raises:
        EmosaeError: if crowd-enVENT is not here or a file of it was altered.
    """
    records = _crowd_envent_file("enVent_val_Data.csv", data_dir, "utf-8")
    readers = Counter[int]()
    rows: list[tuple[int, int, str, str]] = []
    for record in records:
        text = int(record["text_id"])
        rows.append((text, readers[text], _canonical(record["emotion"]), _canonical(record["annotator_emotion"])))
        readers[text] += 1
    # The order of the file would show which answers came from the same reader.
    rows.sort(key=lambda row: row[:2])
    return pd.DataFrame(
        {
            "row_id": [f"crowd-envent/{text}" for text, *_ in rows],
            "emotion": [row[2] for row in rows],
            "reader": [row[1] for row in rows],
            "answer": [row[3] for row in rows],
        }
    )


def appraisals(data_dir: Path | None = None) -> pd.DataFrame:
    """How the writers of crowd-enVENT appraised the event: row_id and `APPRAISALS`, ratings from 1 to 5.

    All 6,600 texts in the order of the source, also those that `load_corpus` leaves out.

    Raises:
        EmosaeError: if crowd-enVENT is not here or a file of it was altered.
    """
    records = _crowd_envent_file("enVent_gen_Data.csv", data_dir, "cp1252")
    columns: dict[str, list[str] | list[int]] = {"row_id": [f"crowd-envent/{r['text_id']}" for r in records]}
    return pd.DataFrame(columns | {name: [int(r[name]) for r in records] for name in APPRAISALS})
