"""The claims ledger: what goes in comes out, what does not fit is refused, and what nobody tested is said."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from emosae_utils import files, ledger, stats
from emosae_utils.files import EmosaeError
from emosae_utils.ledger import Claim

WHOLE = Claim("C1", "m", "texts", "", None, None, None, "", "All parts hold.", "undecided")
PART = Claim("C1", "m", "texts", "early | late", 0.204, 0.1, 0.301, "nats", "One part holds.", "supported")
OTHER = Claim("C1", "m", "texts", "shape", 0.5, None, None, "share", "Another part holds.", "undecided")


def test_records_are_written_and_read_back(tmp_path: Path) -> None:
    nan = float("nan")
    unmeasured = replace(OTHER, effect=nan, low=nan, high=float("inf"))
    ledger.save_claims(tmp_path / "flow", [WHOLE, replace(PART, low=np.float64(0.1)), unmeasured])
    assert files.read_json(tmp_path / "flow" / "claims.json")[2] == asdict(replace(OTHER, effect=None))
    found = ledger.read_ledger(tmp_path)
    assert found["claim"].tolist() == ["C1"] * 3 + [f"C{i}" for i in range(2, 9)]
    assert found["verdict"].tolist()[3:] == [ledger.NOT_TESTED] * 7
    assert found["chapter"].tolist()[2:5] == ["flow", "features", "tracing"]
    assert found.loc[1, "low"] == pytest.approx(0.1) and np.isnan(found.loc[2, "effect"])


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], None),
        ({"claim": "C1"}, "the file: "),
        ([{"claim": "C1"}], "0.model: Field required"),
        ([asdict(WHOLE) | {"verdict": "yes"}], "0.verdict: Input should be 'supported'"),
        ([asdict(WHOLE) | {"claim": "C9"}], "0.claim: Input should be 'C1'"),
        ([asdict(WHOLE) | {"kind": "x"}], "0.kind: Unexpected keyword argument"),
        ([asdict(WHOLE), asdict(PART) | {"effect": "0.2"}], "1.effect: Input should be a valid number"),
        ([asdict(WHOLE) | {"model": ""}], "model, dataset and test must not be empty"),
        ([asdict(WHOLE) | {"effect": 1.0, "low": 1.0}], "an interval needs an effect and two ends in order"),
        ([asdict(WHOLE) | {"effect": 1.0, "low": 1.0, "high": -2.0}], "an interval needs"),
        ([asdict(WHOLE), asdict(WHOLE)], "C1, m, texts: there is more than one such record"),
        ([asdict(PART)], "C1, m, texts, early | late: the verdict on the whole is missing"),
    ],
)
def test_a_file_that_does_not_fit_is_an_error_of_one_line(tmp_path: Path, records: Any, message: str | None) -> None:
    path = tmp_path / "tracing" / "claims.json"
    files.write_json(path, records)
    if message is None:
        assert (ledger.read_ledger(tmp_path)["verdict"] == ledger.NOT_TESTED).all()
        return
    with pytest.raises(EmosaeError) as error:
        ledger.read_ledger(tmp_path)
    said = str(error.value)
    assert str(path) in said and message in said and "\n" not in said


def test_what_would_be_refused_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(EmosaeError, match="more than one such record"):
        ledger.save_claims(tmp_path, [WHOLE, WHOLE])
    assert not list(tmp_path.iterdir())


def test_the_views_say_it_in_words(tmp_path: Path) -> None:
    steered = Claim("C5", "m", "texts", "", 0.0042, 0.001, 0.0071, "macro-F1", "It gains.", "supported")
    ledger.save_claims(tmp_path / "flow", [WHOLE, PART, OTHER, *(replace(c, model="n") for c in (WHOLE, PART, OTHER))])
    ledger.save_claims(tmp_path / "steering", [steered, replace(steered, dataset="more", verdict="not supported")])
    found = ledger.read_ledger(tmp_path)
    lines = ledger.table(found).splitlines()
    first = next(i for i, line in enumerate(lines) if "C1" in line)
    assert lines[first].startswith("| {doc}`C1: form, then topic, then emotion: three phases <flow>` | m, texts |")
    assert "| 1 of 2 parts supported | {bdg-warning-line}`undecided` | All parts hold. |" in lines[first]
    # The second model's row repeats neither the claim nor the test.
    assert lines[first + 1].startswith("|  | n, texts | 1 of 2 parts supported |") and lines[first + 1].endswith("|  |")
    assert any("| 0.0042 [0.0010,\u00a00.0071] macro-F1 | {bdg-success-line}`supported` |" in line for line in lines)
    untested = [line for line in lines if "not tested" in line]
    assert len(untested) == 6 and all("{bdg-muted-line}`not tested`" in line for line in untested)
    assert {line.count(" | ") for line in lines if line.startswith("| ")} == {4}

    parts = ledger.part_table(found)
    assert parts.count("early \\| late | 0.20 [0.10,\u00a00.30] nats | {bdg-success-line}`supported`") == 2
    assert "| 0.50 share |" in parts
    assert ledger.summary(found) == (
        "Verdicts by model, one for each claim and dataset: "
        "**m** (3 tests): 1 supported, 1 not supported, 1 undecided; "
        "**n** (1 test): 0 supported, 0 not supported, 1 undecided; not tested here: C2, C3, C4, C6, C7, C8."
    )


def test_the_schema_and_the_tests_use_the_same_words() -> None:
    assert get_args(ledger.Verdict) == (stats.SUPPORTED, stats.NOT_SUPPORTED, stats.UNDECIDED)
    assert set(ledger.BADGES) == {*get_args(ledger.Verdict), ledger.NOT_TESTED}
    assert tuple(ledger.STATEMENTS) == get_args(ledger.ClaimName)


def test_nothing_tested_is_said(tmp_path: Path) -> None:
    found = ledger.read_ledger(tmp_path)
    assert ledger.part_table(found) == ""
    assert ledger.summary(found) == "No chapter that tests a claim has run yet."
    assert ledger.table(found).count("`not tested`") == 8


def test_a_claim_links_to_its_chapter_only_if_the_book_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "tracing.ipynb").touch()
    monkeypatch.setattr(ledger, "repo_dir", lambda: tmp_path)
    shown = ledger.table(ledger.read_ledger(tmp_path))
    assert "{doc}`C3: a small set of features drives each emotion <tracing>`" in shown
    assert "| C2: features of one emotion, and features of several |" in shown
    assert "for the chapter *features* to test" in shown
