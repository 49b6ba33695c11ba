"""The claims ledger: what was tested of each claim, on which model and texts, and how it came out.

Every chapter that tests a claim writes `claims.json`, one record per part of a test and one for the whole. This module
says what a record is, collects the records of all chapters, and words them for the first page. The claims are those of
Shu and colleagues, in our own short words.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import ConfigDict, TypeAdapter, ValidationError

from emosae_utils.files import EmosaeError, read_json, repo_dir, write_json
from emosae_utils.stats import NOT_SUPPORTED, SUPPORTED, UNDECIDED

ClaimName = Literal["C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8"]
Verdict = Literal["supported", "not supported", "undecided"]
# No chapter says this of itself: it stands for the claims that none of the chapters here has tested.
NOT_TESTED = "not tested"
BADGES = {SUPPORTED: "success", NOT_SUPPORTED: "danger", UNDECIDED: "warning", NOT_TESTED: "muted"}


@dataclass(frozen=True)
class Statement:
    """What a claim says, in short, and the chapter that tests it."""

    title: str
    chapter: str


STATEMENTS: dict[str, Statement] = {
    "C1": Statement("form, then topic, then emotion: three phases", "flow"),
    "C2": Statement("features of one emotion, and features of several", "features"),
    "C3": Statement("a small set of features drives each emotion", "tracing"),
    "C4": Statement("disgust is diffuse and overshadowed; fear and surprise are concentrated", "tracing"),
    "C5": Statement("steering a few features improves recognition, from five examples", "steering"),
    "C6": Statement("steering leaves language modelling largely intact", "steering"),
    "C7": Statement("the gains carry over to other datasets", "generalisation"),
    "C8": Statement("steering repairs the weak emotions, one by one and all at once", "steering"),
}
CHAPTERS = tuple(dict.fromkeys(s.chapter for s in STATEMENTS.values()))


@dataclass(frozen=True)
class Claim:
    """The outcome of one test of a claim, or of one part of it.

    Attributes:
        claim: C1 to C8.
        model: the model tested.
        dataset: the texts tested on; the chapter's own where a test draws on several.
        part: the part of the test; empty for the verdict on the whole, which every model and dataset has once.
        effect: what was measured; None where nothing could be, or where the whole rests on its parts.
        low: lower end of its 95 % interval; None without an interval.
        high: upper end.
        unit: of the effect.
        test: one plain sentence: what has to hold.
        verdict: supported, not supported, or undecided.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    claim: ClaimName
    model: str
    dataset: str
    part: str
    effect: float | None
    low: float | None
    high: float | None
    unit: str
    test: str
    verdict: Verdict


COLUMNS = tuple(f.name for f in fields(Claim))
_RECORDS = TypeAdapter(list[Claim])


def _fault(claims: Sequence[Claim]) -> str | None:
    """What is wrong with records whose types are right; None if nothing is."""
    seen = Counter((c.claim, c.model, c.dataset, c.part) for c in claims)
    for c in claims:
        where = ", ".join(filter(None, (c.claim, c.model, c.dataset, c.part)))
        if not (c.model and c.dataset and c.test):
            return f"{where}: model, dataset and test must not be empty"
        if (c.low is None) != (c.high is None) or (c.low is not None and (c.effect is None or c.low > (c.high or 0.0))):
            return f"{where}: an interval needs an effect and two ends in order"
        if seen[c.claim, c.model, c.dataset, c.part] > 1:
            return f"{where}: there is more than one such record"
        if not seen[c.claim, c.model, c.dataset, ""]:
            return f"{where}: the verdict on the whole is missing (the record with an empty part)"
    return None


def _checked(records: object, path: Path) -> list[Claim]:
    try:
        # Strictly, no number is read from a string; only as JSON are records then taken for dataclasses.
        claims = _RECORDS.validate_json(json.dumps(records))
        fault = _fault(claims)
    except ValidationError as error:
        first = error.errors()[0]
        fault = f"{'.'.join(str(x) for x in first['loc']) or 'the file'}: {first['msg']}"
    if fault:
        raise EmosaeError(f"{path} is not a list of claims ({fault}); run its chapter again")
    return claims


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None


def save_claims(out_dir: Path, claims: Iterable[Claim]) -> None:
    """Write `claims.json`. A number that is not finite was not measured, and is written as null.

    Raises:
        EmosaeError: for a record that `read_ledger` would refuse.
    """
    path = out_dir / "claims.json"
    clean = [replace(c, effect=_number(c.effect), low=_number(c.low), high=_number(c.high)) for c in claims]
    _checked([asdict(c) for c in clean], path)
    write_json(path, [asdict(c) for c in clean])


def read_ledger(in_dir: Path) -> pd.DataFrame:
    """The records of every chapter that is there, and one row for each claim that none of them tested.

    Args:
        in_dir: holds a folder for each chapter.

    Returns:
        The fields of `Claim` and chapter, ordered by claim. An untested claim has the verdict "not tested", empty
        words, and the chapter that would test it.

    Raises:
        EmosaeError: for a file that is damaged or not what `save_claims` writes.
    """
    rows = []
    for chapter in CHAPTERS:
        path = in_dir / chapter / "claims.json"
        if path.is_file():
            rows += [asdict(c) | {"chapter": chapter} for c in _checked(read_json(path), path)]
    tested = {row["claim"] for row in rows}
    for claim, statement in STATEMENTS.items():
        if claim not in tested:
            nothing = dict.fromkeys(COLUMNS, "") | {"effect": None, "low": None, "high": None}
            rows.append(nothing | {"claim": claim, "verdict": NOT_TESTED, "chapter": statement.chapter})
    frame = pd.DataFrame(rows, columns=[*COLUMNS, "chapter"])
    numbers = ["effect", "low", "high"]
    return frame.astype(dict.fromkeys(numbers, float)).sort_values("claim", kind="stable", ignore_index=True)


# The first page's words.


def _effect(row: pd.Series) -> str:
    """The effect with its interval and unit, as in "0.21 [0.15, 0.27] nats"; empty if there is none."""
    if np.isnan(row["effect"]):
        return ""
    largest = max(abs(row["effect"]), np.nan_to_num(abs(row["low"])), np.nan_to_num(abs(row["high"])))
    # Shares need two decimals, perplexities none; a small effect must not be rounded to nothing.
    digits = 4 if largest < 0.01 else 3 if largest < 0.1 else 2 if largest < 100 else 0
    # The space is one that no line breaks at.
    span = "" if np.isnan(row["low"]) else f" [{row['low']:.{digits}f},\u00a0{row['high']:.{digits}f}]"
    return f"{row['effect']:.{digits}f}{span} {row['unit']}".strip()


def _parts(ledger: pd.DataFrame, row: pd.Series) -> pd.DataFrame:
    """The parts of a test whose verdict on the whole is `row`."""
    same = ["claim", "model", "dataset", "chapter"]
    return ledger[(ledger[same] == row[same]).all(axis=1) & (ledger["part"] != "")]


def _link(claim: str, chapter: str) -> str:
    """A claim in words, linked to its chapter if the book has that page."""
    title = f"{claim}: {STATEMENTS[claim].title}"
    there = (repo_dir() / "book" / f"{chapter}.ipynb").is_file()
    return f"{{doc}}`{title} <{chapter}>`" if there else title


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. What repeats the row above in the first or the last column is left blank there."""
    lines, above = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"], [""] * len(head)
    for row in rows:
        same_first = row[0] == above[0]
        shown = ["" if same_first else row[0], *row[1:-1], "" if same_first and row[-1] == above[-1] else row[-1]]
        lines.append(f"| {' | '.join(_cell(text) for text in shown)} |")
        above = list(row)
    return "\n".join(lines)


def _badge(verdict: str) -> str:
    return f"{{bdg-{BADGES[verdict]}-line}}`{verdict}`"


def table(ledger: pd.DataFrame) -> str:
    """The verdicts as a MyST table: one row per claim, model and dataset, each claim linked to its chapter.

    Where the verdict rests on parts alone, the effect is how many of them are supported.
    """
    rows = []
    for _, row in ledger[ledger["part"] == ""].iterrows():
        parts = _parts(ledger, row)
        effect = _effect(row)
        if not effect and len(parts):
            effect = f"{(parts['verdict'] == SUPPORTED).sum()} of {len(parts)} parts supported"
        test = row["test"] or f"for the chapter *{row['chapter']}* to test"
        where = ", ".join(filter(None, (row["model"], row["dataset"])))
        words = [where, effect, _badge(row["verdict"]), test]
        rows.append([_link(row["claim"], row["chapter"]), *words])
    caption = "Every claim, the test it was put to, and the verdict. Effects with 95 % intervals."
    body = _table(("claim", "model, texts", "effect", "verdict", "what has to hold"), rows)
    return f":::{{table}} {caption}\n:class: ledger\n\n{body}\n:::"


def part_table(ledger: pd.DataFrame) -> str:
    """The parts of the tests as a MyST table that folds out; empty if no test has parts."""
    parts = ledger[ledger["part"] != ""]
    rows = [
        [f"{r['claim']}, {r['model']}, {r['dataset']}", r["part"], _effect(r), _badge(r["verdict"]), r["test"]]
        for _, r in parts.iterrows()
    ]
    body = _table(("test", "part", "effect", "verdict", "what has to hold"), rows)
    inner = f":::{{table}}\n:class: ledger\n\n{body}\n:::"
    return f"::::{{dropdown}} Every part of these tests\n{inner}\n::::" if rows else ""


def summary(ledger: pd.DataFrame) -> str:
    """One sentence: how many verdicts of each kind each model got, and which claims were not tested."""
    whole = ledger[ledger["part"] == ""]
    tested = whole[whole["verdict"] != NOT_TESTED]
    said = []
    for model, here in tested.groupby("model", sort=False):
        counts = here["verdict"].value_counts()
        words = ", ".join(f"{counts.get(v, 0)} {v}" for v in (SUPPORTED, NOT_SUPPORTED, UNDECIDED))
        said.append(f"**{model}** ({len(here)} test{'s' if len(here) > 1 else ''}): {words}")
    missing = whole.loc[whole["verdict"] == NOT_TESTED, "claim"].tolist()
    if not said:
        return "No chapter that tests a claim has run yet."
    rest = f"; not tested here: {', '.join(missing)}" if missing else ""
    return f"Verdicts by model, one for each claim and dataset: {'; '.join(said)}{rest}."
