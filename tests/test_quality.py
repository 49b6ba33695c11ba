"""The report on dictionaries: right at both ends, where a dictionary is perfect and where it is noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from emosae_utils import quality
from emosae_utils.files import EmosaeError
from emosae_utils.models import LM
from emosae_utils.quality import Settings, mean_differences, measure, principal_components, verdicts
from emosae_utils.saes import Dictionary, random_dictionary
from tests.test_saes import basis

FEW = Settings(rows_per_emotion=30, splice_rows_per_emotion=2, sequences=3, sequence_tokens=24, bootstraps=50)


@pytest.fixture(scope="module")
def ends(tiny: Callable[[str], LM]) -> dict[str, quality.Quality]:
    """What is measured for a perfect dictionary and for one of random directions."""
    lm = tiny("llama")
    perfect = Dictionary(1, basis(lm, 1), "perfect")
    # Few of very many random directions would rebuild 32 dimensions well; few of few do not.
    small = Dictionary(1, basis(lm, 1, k=2), "small")
    noise = random_dictionary(small, torch.randn(200, lm.d_model), seed=0)
    return {"perfect": measure(lm, {1: perfect}, FEW), "noise": measure(lm, {1: noise}, FEW)}


def test_a_perfect_dictionary_passes_every_bar_but_sparsity(ends: dict[str, quality.Quality]) -> None:
    found = ends["perfect"]
    row = found.layers.iloc[0]
    assert row["read_out_variance"] == pytest.approx(1, abs=1e-4)
    assert row["running_variance"] == pytest.approx(1, abs=1e-4)
    assert row["score_change"] < 1e-3
    assert row["accuracy_change"] == 0
    assert row["loss_recovered"] == pytest.approx(1, abs=1e-3)
    assert found.facts["kept_error_change"] < 1e-4
    verdict = verdicts(found.layers).set_index("bar")
    assert verdict.drop(index="probe on codes / probe on residual")["met"].all()


def test_a_random_dictionary_fails_them(ends: dict[str, quality.Quality]) -> None:
    row = ends["noise"].layers.iloc[0]
    assert row["read_out_variance"] < 0.5
    assert row["score_change"] > ends["perfect"].layers.iloc[0]["score_change"] + 0.01
    # A random model gains nothing from its stream, so only that something changed can be asked here.
    assert abs(row["loss_recovered"] - 1) > 0.01
    assert row["read_out_low"] <= row["read_out_variance"] <= row["read_out_high"]
    verdict = verdicts(ends["noise"].layers).set_index("bar")
    assert not verdict.loc["variance explained, read-out", "met"]
    assert not verdict.loc["variance explained, read-out, median layer", "met"]
    # Its error is kept all the same.
    assert ends["noise"].facts["kept_error_change"] < 1e-4


def test_controls_recover_a_planted_answer_and_nothing_from_noise() -> None:
    rng = np.random.default_rng(0)
    axes_KD = np.linalg.qr(rng.normal(size=(20, 3)))[0].T
    fit_PD, test_PD = (rng.normal(size=(n, 3)) @ axes_KD + 5 for n in (200, 100))
    np.testing.assert_allclose(principal_components(fit_PD, test_PD, 3), test_PD, atol=1e-9)
    y_P, y_test_P = rng.integers(0, 4, 200), rng.integers(0, 4, 100)
    means_ED = rng.normal(size=(4, 20)) * 3
    planted = mean_differences(means_ED[y_P] + rng.normal(size=(200, 20)), y_P, means_ED[y_test_P])
    assert (planted == y_test_P).mean() > 0.95
    noise = mean_differences(rng.normal(size=(200, 20)), y_P, rng.normal(size=(100, 20)))
    assert (noise == y_test_P).mean() < 0.45


def test_results_are_written_and_without_a_second_seed_stability_is_empty(
    ends: dict[str, quality.Quality], tiny: Callable[[str], LM], tmp_path: Path
) -> None:
    found = ends["perfect"]
    table = found.layers.assign(model="tiny", depth=0.5)
    nothing = quality.stability(tiny("llama"), {}, str(tmp_path))
    assert nothing.empty
    verdict = quality.save(table, nothing.assign(model="tiny"), {"tiny": dict(found.facts)}, FEW, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "layers.parquet",
        "stability.parquet",
        "verdicts.parquet",
        "facts.json",
    }
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "verdicts.parquet"), verdict)


def test_a_dataset_without_a_test_split_is_refused(tiny: Callable[[str], LM], tmp_path: Path) -> None:
    own = tmp_path / "own.csv"
    rows = [
        f"The {w} came {e[0]} on a {d} day,{e},discovery,{w}" for w in "abc" for d in "xyz" for e in ("joy", "fear")
    ]
    own.write_text("text,emotion,split,group\n" + "\n".join(rows), encoding="utf-8")
    lm = tiny("llama")
    with pytest.raises(EmosaeError, match="needs rows in its test split"):
        measure(lm, {1: Dictionary(1, basis(lm, 1), "perfect")}, FEW, str(own))
