"""The chapter on steering: sentences and figures from tables of made-up predictions, whose truth is known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from emosae_utils import plots, repair, wording
from emosae_utils.data import EMOTIONS
from emosae_utils.repair import CALIBRATED, FEW_SHOT, GAIN, PROBE, RANDOM, RAW, TARGETED, Settings
from emosae_utils.steering import Bank, Steering

SETTINGS = Settings(examples=(1, 5), draws=2, strengths=(0.5, 1.0, 2.0), unit_counts=(20,), bootstraps=40)
PLACES = [("model a", "stories"), ("model b", "stories"), ("model a", "letters"), ("model b", "letters")]


def answers(right: float, rng: np.random.Generator, per_emotion: int = 12, **given: Any) -> pd.DataFrame:
    """Answers of which a share is right; disgust is never answered where nothing is steered."""
    gold = np.repeat(EMOTIONS, per_emotion)
    other = np.array([rng.choice([e for e in EMOTIONS if e not in (g, "disgust")]) for g in gold])
    hit = rng.random(len(gold)) < right
    if given["method"] == RAW:
        hit &= gold != "disgust"
    if given.get("target"):
        hit |= gold == given["target"]
    facts = {"examples": 0, "draw": 0, "calibrated": False, "strength": 1.0, "units": 0, "target": ""} | given
    rows = {"row_id": [f"r{i}" for i in range(len(gold))], "group": [f"g{i % 12}" for i in range(len(gold))]}
    table = pd.DataFrame(rows | {"gold": gold, "pred": np.where(hit, gold, other)})
    return table.assign(confidence=rng.uniform(0.3, 0.9, len(gold)), **facts)


def predictions(model: str, dataset: str, gain: float, rng: np.random.Generator) -> pd.DataFrame:
    """Every method of the study; gains answer a share `gain` rightly, prior calibration half."""
    parts = [answers(0.3, rng, method=RAW), answers(0.5, rng, method=CALIBRATED, calibrated=True)]
    for method in (*repair.LEARNT, PROBE, repair.LORA, FEW_SHOT):
        right = gain if method == GAIN else 0.4
        for n in SETTINGS.examples:
            for draw in range(SETTINGS.draws):
                for calibrated in (False, True)[: 1 if method == PROBE else 2]:
                    facts: dict[str, Any] = {"method": method, "examples": n, "draw": draw, "calibrated": calibrated}
                    parts.append(answers(right + 0.03 * calibrated + 0.005 * n, rng, **facts))
    for draw in range(SETTINGS.draws):
        key: dict[str, Any] = {"method": GAIN, "examples": 5, "draw": draw}
        for calibrated in (False, True):
            key["calibrated"] = calibrated
            parts += [answers(gain * (0.6 + 0.2 * x), rng, **key, strength=x) for x in (0.5, 2.0)]
            parts.append(answers(0.8 * gain, rng, **key, units=20))
            parts.append(answers(0.4, rng, **{**key, "method": TARGETED}, target="fear" if calibrated else "disgust"))
    return pd.concat(parts, ignore_index=True).assign(model=model, dataset=dataset)


def effects(model: str, dataset: str, rng: np.random.Generator) -> pd.DataFrame:
    """Running text that gains hardly change and random directions spoil."""
    records = []
    shown = [(GAIN, d, x) for d in range(2) for x in (SETTINGS.strengths if not d else (1.0,))]
    for method, draw, strength in [*shown, (RANDOM, 0, 1.0), (repair.ADDITIVE, 0, 1.0)]:
        for sequence in range(6):
            more = 0.004 * strength if method == GAIN else 0.4
            kl = more * rng.uniform(0.8, 1.2)
            facts = {"sequence": sequence, "tokens": 60, "clean": 3.0, "steered": 3.0 + kl, "kl": kl}
            records.append(facts | {"method": method, "draw": draw, "strength": strength})
    return pd.DataFrame(records).assign(model=model, dataset=dataset, text="plain prose")


def made(gain: float) -> dict[str, pd.DataFrame]:
    rng = np.random.default_rng(0)
    said = pd.concat([predictions(*place, gain, rng) for place in PLACES], ignore_index=True)
    cost = pd.concat([effects(*place, rng) for place in PLACES], ignore_index=True)
    fits = [{"model": m, "dataset": d, "method": GAIN, "examples": 5, "draw": 0, "units": 300} for m, d in PLACES]
    samples = [(p, x, f"{p} and so on") for p in ("One", "Two") for x in (0.0, 1.0, 4.0)]
    return {
        "metrics": repair.metrics_table(said, SETTINGS),
        "comparisons": repair.comparison_table(said, SETTINGS),
        "targeted": repair.targeted_table(said, SETTINGS),
        "spread": repair.spread_table(said, SETTINGS),
        "fits": pd.DataFrame(fits),
        "perplexity": repair.perplexity_table(cost, SETTINGS),
        "samples": pd.DataFrame(samples, columns=["prompt", "strength", "text"]).assign(model="model a"),
    }


@pytest.fixture(scope="module")
def strong() -> dict[str, pd.DataFrame]:
    """Gains that beat everything."""
    return made(0.85)


@pytest.fixture(scope="module")
def weak() -> dict[str, pd.DataFrame]:
    """Gains that prior calibration beats."""
    return made(0.2)


def study() -> Any:
    """Two draws that turn feature 1 up and disagree about feature 2."""
    bank, found = {3: Bank(3, "feature", torch.zeros(4, 2))}, {}
    for draw, gains in enumerate(([1, 3.0, 1.5, 1], [1, 4.0, 0.5, 1])):
        found[GAIN, 5, draw] = Steering("model a", bank, {3: np.array(gains)})
    rows = SimpleNamespace(test=pd.DataFrame({"group": ["g", "h"]}), pool=[0] * 9, labels=EMOTIONS)
    fits = pd.DataFrame([{"method": GAIN, "examples": 5, "units": 2}])
    measured = SimpleNamespace(steerings=found, rows=rows, fits=fits)
    return SimpleNamespace(
        measured={("model a", "stories"): measured}, absent=("letters",), notes=("model c has none",)
    )


def test_sentences_follow_the_numbers(strong: Any, weak: Any) -> None:
    good = wording.level_finding(strong, "model a", "stories", SETTINGS)
    bad = wording.level_finding(weak, "model a", "stories", SETTINGS)
    assert "Gains are above the answer as it is (+" in good and "; above prior calibration (+" in good
    assert "above prior calibration" not in bad and "; below prior calibration when calibrated too (-" in bad
    plain = wording.only(strong["metrics"], metric="macro_f1", method=GAIN, examples=5, units=0, strength=1.0)
    value = wording.only(plain, model="model a", dataset="stories", calibrated=False)["value"].iloc[0]
    assert f"{value:.2f} [" in good
    assert "less unequal" in wording.recall_finding(strong, "model a", "stories", SETTINGS)
    cost = wording.side_finding(strong, "model a", "stories", SETTINGS)
    assert "+0.4% [" in cost and "within the bar of 2%" in cost and f"{RANDOM}: +" in cost
    aimed = wording.targeted_finding(strong, "model a", "stories")
    assert "in the answer as it is disgust is the weakest; aiming at it changes its recall by +1.00" in aimed
    assert "macro-F1 is" in wording.units_finding(strong, "model a", "stories", SETTINGS)
    assert "expected calibration error is" in wording.calibration_finding(strong, "model a", "stories", SETTINGS)


def test_verdicts_go_both_ways(strong: Any, weak: Any) -> None:
    good, bad = (wording.verdicts(t, SETTINGS).split("::::")[0] for t in (strong, weak))
    assert "C5: " in good and "C6: " in good and "C8: " in good
    assert "not supported" in bad and "not supported" not in good.partition("C6")[0]
    bars = wording.tests(SETTINGS)
    assert f"{repair.PERPLEXITY_RISE:.0%}" in bars and "15 points" in bars and "at most 3 on average" in bars


def test_tables_to_read(strong: Any) -> None:
    view = wording.comparison_view(strong["comparisons"], 5)
    row = view.loc[("stories", "model a", GAIN)]
    assert view.columns[0] == "as answered, less no steering" and "\np < .001" in row.iloc[0]
    # Only gains are compared with random directions.
    assert view["as answered, less random directions"].ne("").sum() == len(PLACES)
    assert list(wording.sample_view(strong["samples"]).columns) == ["without steering", "strength 1", "strength 4"]


def test_turned_features_are_ranked_and_joined(tmp_path: Path) -> None:
    found = wording.turned(study(), SETTINGS, tmp_path)
    assert found[["layer", "feature", "gain"]].values.tolist() == [[3, 1, 3.5], [3, 2, 1.0]]
    assert "not known here" in wording.turned_finding(found, "model a", "stories")
    known = pd.DataFrame([{"model": "model a", "layer": 3, "feature": 1, "kind": "specific", "emotions": "joy"}])
    (tmp_path / "features").mkdir()
    known.to_parquet(tmp_path / "features" / "features.parquet")
    found = wording.turned(study(), SETTINGS, tmp_path)
    assert found["emotions"].tolist() == ["joy", ""]
    text = wording.turned_finding(found, "model a", "stories", count=1)
    assert "Of these, 100% respond to emotion, against 50% of all with a gain" in text
    said = wording.setting(study(), SETTINGS)
    assert "2 test texts of 6 emotions (2 topics or writers)" in said
    assert "Left out: model c has none." in said and "so not measured: letters." in said


def test_every_figure_is_drawn(strong: Any, tmp_path: Path) -> None:
    drawn = {
        "examples": plots.steering_examples(strong["metrics"]),
        "recalls": plots.steering_recalls(strong["metrics"], 5),
        "trade": plots.steering_trade(strong["metrics"], strong["perplexity"], 5),
        "units": plots.steering_units(strong["metrics"], strong["fits"], 5),
        "calibration": plots.steering_calibration(strong["metrics"], 5),
        "targeted": plots.steering_targeted(strong["targeted"]),
        "turned": plots.steering_turned(wording.turned(study(), SETTINGS, tmp_path)),
    }
    for name, figure in drawn.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=40)
        assert any(ax.has_data() for ax in figure.axes), name
        plt.close(figure)
