"""Codes: read in one pass, equal to encoding by hand, stored sparse and refused when altered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from emosae_utils.codes import Codes, load_codes, read_codes, save_codes
from emosae_utils.files import EmosaeError
from emosae_utils.models import LM
from emosae_utils.saes import load_dictionaries
from emosae_utils.scoring import build_prompts, read_out
from tests.test_saes import write


@pytest.fixture
def codes(tiny: Callable[[str], LM], events: pd.DataFrame, tmp_path: Path) -> Codes:
    lm = tiny("gemma2")
    return read_codes(lm, build_prompts(lm, events), load_dictionaries(lm, str(write(lm, tmp_path))), events)


def test_codes_are_the_dictionary_of_the_residual(codes: Codes, tiny: Callable[[str], LM]) -> None:
    lm = tiny("gemma2")
    prompts = build_prompts(lm, codes.rows)
    read = read_out(lm, prompts, layers=[0, 2])
    assert read.resid_PLD is not None
    d = lm.d_model
    for i, layer in enumerate(codes.layers):
        dense_PF = codes.dense(layer)
        np.testing.assert_allclose(dense_PF[:, :d] - dense_PF[:, d:], read.resid_PLD[:, i], atol=1e-5)
    np.testing.assert_allclose(codes.scores_PE, read.scores_PE, atol=1e-6)
    with pytest.raises(EmosaeError, match=r"no code for layer 1; there is one for \[0, 2\]"):
        codes.dense(1)


def test_codes_come_back_as_they_went(codes: Codes, tmp_path: Path) -> None:
    save_codes(tmp_path / "codes", codes)
    back = load_codes(tmp_path / "codes")
    for layer in codes.layers:
        np.testing.assert_array_equal(back.dense(layer), codes.dense(layer))
    pd.testing.assert_frame_equal(back.rows, codes.rows)
    np.testing.assert_array_equal(back.scores_PE, codes.scores_PE)
    assert (back.model, back.layers, back.labels) == (codes.model, codes.layers, codes.labels)
    some = back.select(back.rows["text"].str.len() > 40)
    assert 0 < len(some) < len(back)
    np.testing.assert_array_equal(some.dense(2), back.dense(2)[(back.rows["text"].str.len() > 40).to_numpy()])


def test_altered_codes_are_refused(codes: Codes, tmp_path: Path) -> None:
    save_codes(tmp_path / "codes", codes)
    path = tmp_path / "codes" / "codes.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(EmosaeError, match=r"codes.safetensors was truncated or altered"):
        load_codes(tmp_path / "codes")


def test_rows_must_belong_to_the_prompts(tiny: Callable[[str], LM], events: pd.DataFrame) -> None:
    lm = tiny("gemma2")
    with pytest.raises(EmosaeError, match="one row per prompt"):
        read_codes(lm, build_prompts(lm, events), {}, events.head(2))
