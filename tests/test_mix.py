"""The training mix: no evaluation text, all templates, and prompts packed without changing what the model holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from emosae_utils import mix
from emosae_utils.data import load_corpus
from emosae_utils.files import EmosaeError, sha256_text
from emosae_utils.harvest import READOUT, harvest, layer_file, pack_sequences, plan_windows, read_packs
from emosae_utils.models import LM
from emosae_utils.scoring import TEMPLATES, Prompts, read_out
from tests.conftest import TEXTS


def corpus_file(folder: Path, n: int = 400) -> Path:
    """A corpus of one's own: every line a few sentences that differ from line to line."""
    words = [
        "river",
        "train",
        "garden",
        "letter",
        "window",
        "market",
        "doctor",
        "winter",
        "kitchen",
        "bridge",
        "engine",
    ]
    rng = np.random.default_rng(0)
    lines = []
    for i in range(n):
        a, b, c = rng.choice(words, size=3)
        lines.append(
            f"The {a} was closed for {i + 2} days. Nobody at the {b} had told us about it. "
            f"We waited near the {c} with {i + 3} others until it was dark."
        )
    path = folder / "corpus.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_packed_prompts_hold_what_they_hold_alone(tiny: Callable[[str], LM], smollm: LM, family: str) -> None:
    lm = tiny(family)
    layers = list(range(lm.n_layers))
    starts = [tuple(smollm.tokenizer(text)["input_ids"]) for text in TEXTS]
    ids = [start + end for start in starts for end in ((5, 6, 7, 8), (5, 6, 9), (11,))]
    packs = [pack_sequences(ids[:9]), pack_sequences(ids[9:])]
    packed_LPD = read_packs(lm, packs, [p.ends for p in packs], layers)
    alone = read_out(lm, Prompts(tuple(ids), ("a", "b"), ((1,), (2,))), layers=layers).resid_PLD
    assert alone is not None
    expected_LPD = torch.from_numpy(alone).transpose(0, 1)
    assert sum(len(p) for p in packs) < 0.7 * sum(len(x) for x in ids)
    torch.testing.assert_close(packed_LPD, expected_LPD, rtol=1e-4, atol=1e-4)


def test_a_pack_is_a_trie() -> None:
    pack = pack_sequences([(1, 2, 3), (1, 2, 4), (1, 2)])
    assert pack.tokens_S.tolist() == [1, 2, 3, 4]
    assert pack.ends == (2, 3, 1)
    assert pack.depths().tolist() == [0, 1, 2, 2]
    assert not pack.ancestors()[3, 2]


def test_the_mix_holds_no_evaluation_text(smollm: LM, tmp_path: Path) -> None:
    evaluated = load_corpus("emoscenes").frame["text"].tolist()
    path = corpus_file(tmp_path)
    path.write_text("\n".join([*evaluated, path.read_text()]), encoding="utf-8")
    items, recipe = mix.training_items(smollm, n_prompts=300, n_running=500, seed=0, corpus=str(path))
    barred = mix.evaluation_hashes()
    assert recipe["barred hashes"] == len(barred) > 1000
    texts = [smollm.tokenizer.decode(ids) for item in items for ids in item.ids]
    assert len(texts) > 300
    pieces = {sha256_text(mix.normalised(s)) for text in texts for s in mix.sentences(text)}
    pieces |= {sha256_text(mix.normalised(text.split("\n")[0])) for text in texts}
    assert not pieces & barred
    # The check can fail: an evaluation text is recognised whatever its punctuation and case.
    assert sha256_text(mix.normalised(f"  {evaluated[0].upper()} ")) in barred


def test_every_template_is_asked_and_no_prompt_twice(smollm: LM, tmp_path: Path) -> None:
    items, _ = mix.training_items(smollm, n_prompts=600, n_running=300, seed=0, corpus=str(corpus_file(tmp_path)))
    prompts = [ids for item in items if item.templates[0] for ids in item.ids]
    assert len(set(prompts)) == len(prompts) >= 600
    assert {name for item in items for name in item.templates} == {*TEMPLATES, ""}
    assert 0 < sum(item.held_out for item in items) < len(items) / 4


def test_a_text_without_enough_prompts_is_said_so(smollm: LM, tmp_path: Path) -> None:
    with pytest.raises(EmosaeError, match="ask for fewer"):
        mix.training_items(smollm, n_prompts=100_000, n_running=10, seed=0, corpus=str(corpus_file(tmp_path, 40)))


def test_without_a_corpus_the_error_names_what_is_missing(
    smollm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMOSAE_DATA_DIR", str(tmp_path))
    with pytest.raises(EmosaeError, match="EMOSAE_DATA_DIR"):
        mix.training_items(smollm, n_prompts=10, n_running=10, seed=0)


def test_a_harvest_goes_on_where_it_stopped(
    tiny: Callable[[str], LM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emosae_utils.harvest.WINDOW", 8)
    lm = tiny("llama")
    items, _ = mix.training_items(lm, n_prompts=300, n_running=400, seed=0, corpus=str(corpus_file(tmp_path)))
    whole = harvest(lm, items, tmp_path / "whole", layers=[1, 3])
    assert len(plan_windows(items, seed=0, batch_tokens=2048)) > 3

    def stop(line: str) -> None:
        if ": 2 of" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harvest(lm, items, tmp_path / "parts", layers=[1, 3], say=stop)
    lines: list[str] = []
    harvest(lm, items, tmp_path / "parts", layers=[1, 3], say=lines.append)
    assert lines[0].startswith("tiny-llama: 3 of")
    for layer in (1, 3):
        assert layer_file(tmp_path / "parts", layer).read_bytes() == layer_file(tmp_path / "whole", layer).read_bytes()
    rows = pd.read_parquet(tmp_path / "parts" / "rows.parquet")
    assert (rows["kind"] == READOUT).sum() >= 300
    assert whole.equals(rows)
