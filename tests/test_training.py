"""Training: planted features are found, the loss is fair to both kinds, runs resume exactly, weights fold exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from emosae_utils import training
from emosae_utils.files import EmosaeError, read_json
from emosae_utils.harvest import READOUT, RUNNING
from emosae_utils.mix import PERSONS
from emosae_utils.models import LM
from emosae_utils.saes import load_dictionaries
from emosae_utils.training import (
    Pools,
    TrainConfig,
    add_span,
    explained,
    fold_scaling,
    make_pools,
    prune,
    train_dictionaries,
    train_layer,
)
from tests.test_mix import corpus_file

D, PLANTED, ACTIVE = 32, 48, 3
# Two latents fire for the span of the means of read-outs and of running text.
SMALL = TrainConfig(d_sae=64, k=ACTIVE + 2, positions=400 * 256, batch=256, lr=4e-3)


def planted(n: int = 12_000, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Sparse sums of known directions, and the directions."""
    rng = np.random.default_rng(seed)
    directions_FD = np.random.default_rng(99).normal(size=(PLANTED, D))
    directions_FD /= np.linalg.norm(directions_FD, axis=1, keepdims=True)
    acts_ND = np.zeros((n, D))
    for row in acts_ND:
        on = rng.choice(PLANTED, size=ACTIVE, replace=False)
        row += rng.uniform(1, 2, size=ACTIVE) @ directions_FD[on]
    return acts_ND.astype(np.float16), directions_FD


def pools_of(acts_ND: np.ndarray[Any, Any], n_readouts: int) -> Pools:
    n = len(acts_ND)
    is_readout = np.arange(n) < n_readouts
    rows = pd.DataFrame(
        {
            "kind": np.where(is_readout, READOUT, RUNNING),
            "template": np.where(is_readout, "feeling", ""),
            "person": np.where(is_readout, PERSONS[0], ""),
            "held_out": np.concatenate([np.arange(m) >= m - 500 for m in (n_readouts, n - n_readouts)]),
        }
    )
    return make_pools(acts_ND, rows)


@pytest.fixture(scope="module")
def pools() -> Pools:
    return pools_of(planted()[0], 6000)


@pytest.fixture(scope="module")
def trained(pools: Pools) -> Any:
    return train_layer(pools, 0, SMALL)


@pytest.fixture(scope="module")
def whole(pools: Pools, trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The dictionary for whole activations, before scaling is folded in."""
    plain = training._inference(trained, tmp_path_factory.mktemp("plain"))
    return add_span(plain, torch.from_numpy(pools.span_KD))


def test_planted_directions_are_found(pools: Pools, trained: Any) -> None:
    def unit(rows_FD: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        rows_FD = rows_FD - rows_FD @ pools.span_KD.T @ pools.span_KD
        return rows_FD / np.linalg.norm(rows_FD, axis=1, keepdims=True)

    directions_FD = unit(planted()[1])
    best = (directions_FD @ unit(trained.W_dec.detach().numpy()).T).max(axis=1)
    chance = (directions_FD @ unit(np.random.default_rng(1).normal(size=(64, D))).T).max(axis=1)
    assert (best > 0.9).mean() > 0.85
    assert (chance > 0.9).mean() < 0.05


def test_activations_without_structure_are_explained_far_less(whole: Any) -> None:
    held, noise = planted(2000, seed=5)[0], np.random.default_rng(2).normal(size=(12_000, D)).astype(np.float16)
    null = train_layer(pools_of(noise, 6000), 0, SMALL)
    good, l0, _ = explained(whole, held, np.zeros(len(held)))
    bad, _, _ = explained(null, np.random.default_rng(3).normal(size=(2000, D)), np.zeros(2000))
    assert good > 0.8
    assert l0 <= ACTIVE + 2
    assert bad < good - 0.3


def test_latents_of_the_span_rebuild_it_exactly_and_blind_the_others(pools: Pools, trained: Any, whole: Any) -> None:
    span_KD = torch.from_numpy(pools.span_KD)
    n = trained.W_dec.shape[0]
    assert whole.W_dec.shape[0] == n + 2 * len(span_KD)
    acts_ND = torch.from_numpy(planted(300, seed=7)[0].astype(np.float32))
    moved_ND = acts_ND + 50 * span_KD[0]
    codes_NF, moved_NF = whole.encode(acts_ND), whole.encode(moved_ND)
    # Nothing along the span changes what the other latents see.
    pre_NF, pre_moved_NF = ((x - whole.b_dec) @ whole.W_enc[:, :n] for x in (acts_ND, moved_ND))
    torch.testing.assert_close(pre_NF, pre_moved_NF, atol=1e-3, rtol=1e-3)
    missed_N = ((whole.decode(moved_NF) - moved_ND) @ span_KD[0]).detach()
    assert missed_N.abs().max().item() < 1e-2
    assert (codes_NF[:, n:].count_nonzero(dim=1) <= len(span_KD)).all()


def test_a_tight_cluster_is_learnt_beside_wide_text() -> None:
    """Read-outs ten times tighter than running text, with directions of their own, must not be starved."""
    acts_ND, _ = planted()
    turn_DD = np.linalg.qr(np.random.default_rng(4).normal(size=(D, D)))[0]
    tight_ND = 0.1 * planted(seed=3)[0].astype(np.float32) @ turn_DD + 0.05
    mixed = np.concatenate([tight_ND[:6000], acts_ND[:6000]]).astype(np.float16)
    pools = pools_of(mixed, 6000)
    shares = {}
    equal = np.full_like(pools.unit_N, pools.unit_running)
    for name, own in (("fair", pools), ("equal", replace(pools, unit_N=equal, weighted_unit_N=equal))):
        sae = train_layer(own, 0, replace(SMALL, d_sae=128, k=5))
        shares[name], _, _ = explained(sae, pools.varying(pools.held_readout_N), np.zeros(500))
    assert shares["fair"] > 0.6
    # Without weighing, the same training leaves the cluster out.
    assert shares["fair"] > shares["equal"] + 0.1


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard"])
def test_a_killed_training_resumes_to_the_same_weights(tmp_path: Path, architecture: str) -> None:
    config = replace(SMALL, architecture=architecture, positions=300 * 256)
    pools = pools_of(planted()[0], 6000)
    whole = train_layer(pools, 0, config)

    class Killed(Exception):
        pass

    def kill(line: str) -> None:
        raise Killed

    state = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        train_layer(pools, 0, config, state=state, say=kill)
    assert state.is_file()
    resumed = train_layer(pools, 0, config, state=state)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_exploding_training_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    acts_ND = planted()[0]
    pools = pools_of(acts_ND, 6000)
    state = tmp_path / "state.safetensors"
    with pytest.raises(RuntimeError):
        train_layer(pools, 0, SMALL, state=state, say=_raise)
    good = state.read_bytes()
    spoilt = replace(pools, acts_ND=np.full_like(acts_ND, np.nan))
    with pytest.raises(EmosaeError, match=r"broke off at step 200.*smaller learning rate.*last good state"):
        train_layer(spoilt, 0, SMALL, state=state)
    assert state.read_bytes() == good


def _raise(line: str) -> None:
    raise RuntimeError(line)


def test_folding_and_pruning_change_no_reconstruction(whole: Any) -> None:
    acts_ND = torch.from_numpy(planted(500, seed=7)[0].astype(np.float32))
    mean_D, scale = torch.linspace(900, 1100, D), 37.0
    plain, n = whole, whole.W_dec.shape[0]
    folded = copy.deepcopy(plain)
    fold_scaling(folded, mean_D, scale)
    raw_ND = acts_ND * scale + mean_D
    codes_NF, expected_NF = folded.encode(raw_ND), plain.encode(acts_ND) * scale
    # Rounding may swap two latents that tie for the last place, in a row or two of five hundred.
    same_N = (codes_NF - expected_NF).abs().amax(dim=1) < 0.1
    assert same_N.float().mean().item() > 0.99
    made_ND = folded.decode(codes_NF)[same_N]
    torch.testing.assert_close(made_ND, plain.decode(expected_NF / scale)[same_N] * scale + mean_D, rtol=1e-3, atol=0.1)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(n))
    fired_F = (plain.encode(acts_ND) > 0).any(dim=0).numpy()
    smaller = prune(plain, fired_F)
    assert smaller.W_dec.shape[0] == fired_F.sum() == smaller.cfg.d_sae
    torch.testing.assert_close(smaller.decode(smaller.encode(acts_ND)), plain.decode(plain.encode(acts_ND)))
    with pytest.raises(EmosaeError, match="train longer"):
        prune(plain, np.zeros(n, dtype=bool))


@pytest.fixture(scope="module")
def made(tiny: Callable[[str], LM], tmp_path_factory: pytest.TempPathFactory) -> tuple[LM, Path, dict[str, Any]]:
    """The whole way for a tiny model: text, activations, two dictionaries."""
    lm, folder = tiny("gemma3"), tmp_path_factory.mktemp("saes")
    options: dict[str, Any] = {
        "layers": [1, 2],
        "config": TrainConfig(d_sae=64, k=14, positions=100 * 256, batch=256),
        "n_prompts": 900,
        "n_running": 2000,
        "corpus": str(corpus_file(folder)),
    }
    train_dictionaries(lm, folder / "out", folder / "work", keep_harvest=True, **options)
    return lm, folder, options


def test_from_text_to_dictionaries(made: tuple[LM, Path, dict[str, Any]]) -> None:
    lm, folder, _ = made
    found = load_dictionaries(lm, str(folder / "out"))
    assert sorted(found) == [1, 2]
    for layer, dictionary in found.items():
        facts = read_json(folder / "out" / f"layer_{layer:02d}" / "cfg.json")["metadata"]["held_out_mix"]
        assert facts["features"] == dictionary.n_features
        assert facts["read_out_variance"] > 0.5
        assert facts["read_out_l0"] <= 14
        torch.testing.assert_close(
            dictionary.sae.W_dec.norm(dim=1), torch.ones(dictionary.n_features), rtol=0.01, atol=0
        )
    recipe = read_json(folder / "out" / "recipe.json")
    assert list(recipe["sha256"]) == ["corpus.txt"]


def test_a_finished_training_is_not_repeated_and_a_damaged_layer_is(made: tuple[LM, Path, dict[str, Any]]) -> None:
    lm, folder, options = made
    assert train_dictionaries(lm, folder / "out", folder / "work", keep_harvest=True, **options) == []
    weights = folder / "out" / "layer_02" / "sae_weights.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-10])
    again = train_dictionaries(lm, folder / "out", folder / "work", keep_harvest=True, **options)
    assert [p.name for p in again] == ["layer_02"]
    # The same seed gives the same bytes.
    assert weights.read_bytes() == before


def test_a_full_disk_is_said_before_the_work(
    made: tuple[LM, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, _, options = made
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(EmosaeError, match=r"GB free and the activations of 2 layers take .* --layers-at-once 1"):
        train_dictionaries(lm, tmp_path / "out", tmp_path / "work", **options)


def test_bad_settings_are_named(made: tuple[LM, Path, dict[str, Any]], tmp_path: Path) -> None:
    lm, _, options = made
    with pytest.raises(EmosaeError, match="layers 0 to 3"):
        train_dictionaries(lm, tmp_path, tmp_path, **{**options, "layers": [4]})
    with pytest.raises(EmosaeError, match="did you mean 'topk'"):
        train_layer(pools_of(planted(2000)[0], 1000), 0, replace(SMALL, architecture="topq"))
