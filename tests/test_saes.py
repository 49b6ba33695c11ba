"""Dictionaries: loading and its checks, published formats, exact splicing, and controls that behave as controls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from emosae_utils import saes
from emosae_utils.data import load_corpus
from emosae_utils.files import EmosaeError, check_manifest, read_json
from emosae_utils.models import LM, decoder_layers
from emosae_utils.saes import Dictionary, load_dictionaries, random_dictionary, splice_losses, splice_scores
from emosae_utils.scoring import build_prompts, read_out
from emosae_utils.training import save_dictionary
from tests.conftest import TEXTS


def basis(lm: LM, layer: int, k: int | None = None, shift: float = 0.0, **metadata: Any) -> Any:
    """A dictionary whose answer is known: plus and minus every axis, so that all active features rebuild x exactly."""
    from sae_lens import TopKSAE, TopKSAEConfig

    d = lm.d_model
    sae = TopKSAE(TopKSAEConfig(d_in=d, d_sae=2 * d, k=k or d))
    axes_FD = torch.cat([torch.eye(d), -torch.eye(d)])
    sae.W_dec.data, sae.W_enc.data = axes_FD, axes_FD.T.contiguous()
    sae.b_dec.data = torch.full((d,), shift)
    known = {"hook_name": f"blocks.{layer}.hook_resid_post", "model_fingerprint": lm.fingerprint} | metadata
    sae.cfg.metadata = type(sae.cfg.metadata)(**known)
    return sae


@pytest.fixture
def lm(tiny: Callable[[str], LM]) -> LM:
    return tiny("gemma3")


def write(lm: LM, folder: Path, layers: tuple[int, ...] = (0, 2), **metadata: Any) -> Path:
    for layer in layers:
        sae = basis(lm, layer)
        save_dictionary(sae, folder / f"layer_{layer:02d}", sae.cfg.metadata.to_dict() | metadata)
    return folder


def test_saved_dictionaries_load_and_rebuild_the_residual(lm: LM, tmp_path: Path) -> None:
    found = load_dictionaries(lm, str(write(lm, tmp_path)))
    assert sorted(found) == [0, 2]
    resid_PD = torch.randn(20, lm.d_model)
    for dictionary in found.values():
        torch.testing.assert_close(dictionary.reconstruct(resid_PD), resid_PD)
        assert ((dictionary.encode(resid_PD) > 0).sum(dim=1) == lm.d_model).all()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"model_fingerprint": "other"}, "other weights"),
        ({"model_fingerprint": None, "model_name": "someone/else"}, "belongs to someone/else"),
        ({"hook_name": "blocks.1.hook_resid_post"}, "reads blocks.1.hook_resid_post"),
        ({"hook_name": "blocks.0.hook_mlp_out"}, "residual-stream dictionary"),
    ],
)
def test_a_dictionary_of_another_place_is_refused(
    lm: LM, tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    write(lm, tmp_path, (0,), **metadata)
    with pytest.raises(EmosaeError, match=message):
        load_dictionaries(lm, str(tmp_path))


def test_width_and_depth_are_checked(lm: LM, smollm: LM, tmp_path: Path) -> None:
    write(lm, tmp_path / "narrow", (0,), model_fingerprint=smollm.fingerprint)
    with pytest.raises(EmosaeError, match=r"reads 32 dimensions and smollm2-135m has 576"):
        load_dictionaries(smollm, str(tmp_path / "narrow"))
    write(lm, tmp_path / "deep", (7,))
    with pytest.raises(EmosaeError, match=r"layer 7; tiny-gemma3 has 0 to 3"):
        load_dictionaries(lm, str(tmp_path / "deep"))
    with pytest.raises(EmosaeError, match=r"no dictionary for layer 3; it has \[7\]"):
        load_dictionaries(lm, str(tmp_path / "deep"), layers=[3])


def test_missing_and_altered_files_are_named(lm: LM, tmp_path: Path) -> None:
    path = write(lm, tmp_path, (0,)) / "layer_00" / "sae_weights.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(EmosaeError, match=r"sae_weights.safetensors was truncated or altered"):
        load_dictionaries(lm, str(tmp_path))
    path.unlink()
    with pytest.raises(EmosaeError, match=r"lacks cfg.json or sae_weights"):
        load_dictionaries(lm, str(tmp_path))
    with pytest.raises(EmosaeError, match=r"unknown SAE release or folder 'nowhere'"):
        load_dictionaries(lm, "nowhere")
    with pytest.raises(EmosaeError, match=r"emosae train-saes --model tiny-gemma3"):
        load_dictionaries(lm)


def test_what_is_off_is_named(lm: LM) -> None:
    """A dictionary that is right for one place and scale, put in the wrong ones."""
    layer, generator = lm.n_layers - 1, torch.Generator().manual_seed(0)

    def stream(rank: int = 6) -> torch.Tensor:
        axes_KD = torch.randn(rank, lm.d_model, generator=generator)
        return torch.randn(300, rank, generator=generator) @ axes_KD + 2 * torch.randn(lm.d_model, generator=generator)

    def fitted(x_PD: torch.Tensor, threshold: float = 0.0) -> Dictionary:
        # Principal components of one place, both signs, silent below a threshold in the units of that place.
        sae = basis(lm, layer, k=6)
        _, _, axes_DD = torch.linalg.svd(x_PD - x_PD.mean(dim=0))
        axes_FD = torch.cat([axes_DD[:6], -axes_DD[:6], torch.zeros(2 * lm.d_model - 12, lm.d_model)])
        sae.W_dec.data, sae.W_enc.data = axes_FD, axes_FD.T.contiguous()
        sae.b_dec.data = x_PD.mean(dim=0)
        sae.b_enc.data -= threshold
        return Dictionary(layer, sae, "made here")

    after_PD, before_PD = stream(), stream()
    with torch.no_grad():
        normed_PD = lm.hf.model.norm(after_PD)
    huge = fitted(after_PD * 1000, threshold=float(after_PD.std()) * 100)
    foreign = fitted(stream(), threshold=1e9)
    assert saes.variance_explained(after_PD, fitted(after_PD).reconstruct(after_PD)) > 0.9
    cases = {
        "fits the stream before this block": fitted(before_PD),
        "fits the stream after the final norm": fitted(normed_PD),
        "scaled by about 1e+03": huge,
        "belongs to other weights": foreign,
    }
    for reason, dictionary in cases.items():
        assert reason in saes._what_is_off(lm, dictionary, after_PD, before_PD)
    with pytest.raises(EmosaeError, match=rf"made here explains .* at layer {layer} of tiny-gemma3, less than 0.3"):
        saes.check_sanity(lm, {layer: foreign})


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_splicing_with_the_error_changes_nothing_and_without_equals_a_full_pass(
    tiny: Callable[[str], LM], events: pd.DataFrame, family: str
) -> None:
    lm = tiny(family)
    prompts = build_prompts(lm, events.head(4), labels=["anger", "joy", "fear"])
    found = {layer: Dictionary(layer, basis(lm, layer, k=5), "made here") for layer in range(lm.n_layers)}
    clean_PE = read_out(lm, prompts).scores_PE
    kept_PRE = splice_scores(lm, prompts, found, keep_error=True)
    np.testing.assert_allclose(kept_PRE, np.repeat(clean_PE[:, None], lm.n_layers + 1, axis=1), atol=1e-4)
    spliced_PRE = splice_scores(lm, prompts, found)
    np.testing.assert_allclose(spliced_PRE[:, -1], clean_PE, atol=1e-4)
    assert np.abs(spliced_PRE[:, :-1] - clean_PE[:, None]).max() > 0.05
    for p, ids in enumerate(prompts.ids):
        for layer, dictionary in found.items():
            expected_E = _full_pass(lm, ids, layer, dictionary, prompts.label_ids)
            np.testing.assert_allclose(spliced_PRE[p, layer], expected_E, atol=1e-3)


def _full_pass(lm: LM, ids: tuple[int, ...], layer: int, dictionary: Dictionary, label_ids: Any) -> Any:
    """The same intervention with a plain hook, one whole sequence per label."""

    def edit(module: Any, inputs: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, len(ids) - 1] = dictionary.reconstruct(hidden[:, len(ids) - 1])
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = decoder_layers(lm.hf)[layer].register_forward_hook(edit)
    try:
        scores = []
        for label in label_ids:
            logp_SV = torch.log_softmax(lm.hf(torch.tensor([[*ids, *label]])).logits[0].float(), dim=-1)
            scores.append(sum(float(logp_SV[len(ids) - 1 + i, token]) for i, token in enumerate(label)))
    finally:
        handle.remove()
    return np.array(scores)


def test_losses_have_their_landmarks(lm: LM) -> None:
    ids = [lm.tokenizer(t)["input_ids"] for t in TEXTS[3:5]]
    exact = {1: Dictionary(1, basis(lm, 1), "exact")}
    table = splice_losses(lm, ids, exact)
    np.testing.assert_allclose(table["spliced"], table["clean"], atol=1e-4)
    nothing = {1: Dictionary(1, basis(lm, 1), "nothing")}
    nothing[1].sae.W_dec.data.zero_()
    table = splice_losses(lm, ids, nothing)
    np.testing.assert_allclose(table["spliced"], table["zero"], atol=1e-4)


def test_a_random_dictionary_explains_less_and_has_no_partners(lm: LM) -> None:
    rng = torch.Generator().manual_seed(0)
    # Variance on the axes, so that the axis dictionary is the right one.
    resid_PD = torch.zeros(400, lm.d_model)
    for row in resid_PD:
        row[torch.randperm(lm.d_model, generator=rng)[:4]] = torch.randn(4, generator=rng) * 3
    own = Dictionary(1, basis(lm, 1, k=4), "axes")
    control = random_dictionary(own, resid_PD, seed=0)
    assert saes.variance_explained(resid_PD, own.reconstruct(resid_PD)) > 0.99
    assert saes.variance_explained(resid_PD, control.reconstruct(resid_PD)) < 0.7
    assert saes.partners(own, own).min() == pytest.approx(1.0)
    assert saes.partners(own, control).mean() < 0.7


def test_variance_explained_is_centred_within_groups() -> None:
    far_PD = torch.cat([torch.randn(50, 4), torch.randn(50, 4) + 100])
    groups = ["a"] * 50 + ["b"] * 50
    means_PD = torch.cat([far_PD[:50].mean(dim=0).expand(50, 4), far_PD[50:].mean(dim=0).expand(50, 4)])
    assert saes.variance_explained(far_PD, means_PD) > 0.99
    assert saes.variance_explained(far_PD, means_PD, groups) == pytest.approx(0.0, abs=1e-6)


# Published formats, written here as their publishers write them.

D_PUB, F_PUB = {"gemma-2-2b": 2304, "llama": 64, "gemma-3-270m": 640}, 16


def _jumprelu_arrays(d: int, n: int = F_PUB) -> dict[str, Any]:
    # The same few rows over and over: a dictionary of full width in a small file.
    w_FD = np.tile(np.random.default_rng(0).normal(size=(F_PUB, d)).astype(np.float32), (n // F_PUB, 1))
    return {
        "W_enc": w_FD.T.copy(),
        "W_dec": w_FD * 3,
        "b_enc": np.zeros(n, np.float32),
        "b_dec": np.ones(d, np.float32),
        "threshold": np.full(n, 0.5, np.float32),
    }


def _hub(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def download(repo_id: str, filename: str, subfolder: str = "", **options: Any) -> str:
        return str(files[f"{repo_id}/{subfolder}/{filename}".replace("//", "/")])

    monkeypatch.setattr(loaders, "hf_hub_download", download)


def test_gemma_scope_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "params.npz"
    np.savez_compressed(path, **_jumprelu_arrays(D_PUB["gemma-2-2b"], 16384))
    sae_id = saes._published_ids("gemma-scope-2b-pt-res-canonical")[12]
    assert sae_id == "layer_12/width_16k/canonical"
    folder = saes.published_releases()["gemma-scope-2b-pt-res-canonical"].saes_map[sae_id]
    _hub({f"google/gemma-scope-2b-pt-res/{folder}/params.npz": path}, monkeypatch)
    found = saes._published("gemma-scope-2b-pt-res-canonical", 12, "cpu")
    _is_unit_norm_jumprelu(found, 16384)
    assert found.neuronpedia.startswith("gemma-2-2b/12")


def test_gemma_scope_2_loads_for_the_embedded_model(gemma: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = "gemma-scope-2-270m-pt-res-all"
    assert gemma.profile.sae_release == release
    assert sorted(saes._published_ids(release)) == list(range(gemma.n_layers))
    sae_id = saes._published_ids(release)[5]
    arrays = {k.lower() if k.startswith("W") else k: torch.from_numpy(v) for k, v in _jumprelu_arrays(640).items()}
    save_file({k: v.contiguous() for k, v in arrays.items()}, tmp_path / "params.safetensors")
    config = {"architecture": "jump_relu", "model_name": "gemma-3-270m", "hf_hook_point_in": "model.layers.5.output"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    root = f"google/gemma-scope-2-270m-pt/resid_post_all/{sae_id}"
    _hub({f"{root}/{name}": tmp_path / name for name in ("params.safetensors", "config.json")}, monkeypatch)
    shapes = {k: list(v.shape) for k, v in arrays.items()}
    monkeypatch.setattr("sae_lens.loading.pretrained_sae_loaders.get_safetensors_tensor_shapes", lambda *a, **k: shapes)
    found = saes._published(release, 5, "cpu")
    _is_unit_norm_jumprelu(found)
    saes._check_fit(gemma, found)
    # These weights are noise: the check on the model's own activations says so.
    with pytest.raises(EmosaeError, match=r"explains .* at layer 5 of gemma-3-270m"):
        saes.check_sanity(gemma, {5: found})


def test_llama_scope_loads_with_its_scale_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    d, layer = D_PUB["llama"], 15
    arrays = _jumprelu_arrays(d)
    tensors = {
        "encoder.weight": arrays["W_enc"].T.copy(),
        "decoder.weight": arrays["W_dec"].T.copy(),
        "encoder.bias": arrays["b_enc"],
        "decoder.bias": arrays["b_dec"],
    }
    save_file({k: torch.from_numpy(v) for k, v in tensors.items()}, tmp_path / "final.safetensors")
    scale = saes.published_releases()["llama_scope_lxr_8x"]
    config = {
        "d_model": d,
        "d_sae": F_PUB,
        "jump_relu_threshold": 0.5,
        "dataset_average_activation_norm": {"in": 10.0},
        "hook_point_in": f"blocks.{layer}.hook_resid_post",
    }
    (tmp_path / "hyperparams.json").write_text(json.dumps(config))
    folder = "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L15R-8x"
    _hub(
        {
            f"{folder}/checkpoints/final.safetensors": tmp_path / "final.safetensors",
            f"{folder}/hyperparams.json": tmp_path / "hyperparams.json",
        },
        monkeypatch,
    )
    found = saes._published("llama_scope_lxr_8x", layer, "cpu")
    _is_unit_norm_jumprelu(found)
    assert scale.repo_id.startswith("fnlp/")
    # The published bias lives in normalised units; folded, it lives in those of the residual stream.
    assert float(found.sae.b_dec.detach().mean()) != pytest.approx(1.0, abs=0.05)


def _is_unit_norm_jumprelu(dictionary: Dictionary, n: int = F_PUB) -> None:
    assert dictionary.sae.cfg.architecture() == "jumprelu"
    torch.testing.assert_close(dictionary.sae.W_dec.detach().norm(dim=1), torch.ones(n))
    assert dictionary.encode(torch.randn(3, dictionary.d_model)).shape == (3, n)


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> str:
        raise OSError("We couldn't connect to the hub\nlong story")

    monkeypatch.setattr("sae_lens.loading.pretrained_sae_loaders.hf_hub_download", refuse)
    with pytest.raises(
        EmosaeError, match=r"cannot load gemma-scope-2b.*: We couldn't connect to the hub; check"
    ) as info:
        saes._published("gemma-scope-2b-pt-res-canonical", 3, "cpu")
    assert "\n" not in str(info.value)


# The dictionaries that come with the repository.


@pytest.mark.parametrize("name", ["gemma-3-270m", "smollm2-135m"])
def test_shipped_dictionaries_are_whole(name: str, request: pytest.FixtureRequest) -> None:
    lm: LM = request.getfixturevalue({"gemma-3-270m": "gemma", "smollm2-135m": "smollm"}[name])
    assert saes.available_layers(lm) == tuple(range(lm.n_layers))
    for layer in range(lm.n_layers):
        folder = saes.shipped_dir(name) / f"layer_{layer:02d}"
        assert check_manifest(folder) is None
        tensors = load_file(folder / "sae_weights.safetensors")
        assert {k: v.dtype for k, v in tensors.items() if v.ndim == 2} == dict.fromkeys(
            ("W_dec", "W_enc"), torch.bfloat16
        )
        metadata = read_json(folder / "cfg.json")["metadata"]
        assert metadata["model_fingerprint"] == lm.fingerprint
        assert metadata["held_out_mix"]["features"] == tensors["W_dec"].shape[0]


def test_shipped_dictionaries_stay_small() -> None:
    sizes = [p.stat().st_size for p in saes.shipped_dir("").rglob("*.safetensors")]
    assert sum(sizes) <= 200e6
    assert max(sizes) < 5e6


def test_shipped_dictionaries_explain_new_read_outs_and_keep_the_model_exact(gemma: LM) -> None:
    layers = [2, 9, 16]
    found = load_dictionaries(gemma, layers=layers)
    frame = load_corpus("emoscenes").frame.groupby("emotion").head(8)
    prompts = build_prompts(gemma, frame)
    read = read_out(gemma, prompts, layers=layers)
    assert read.resid_PLD is not None
    for i, layer in enumerate(layers):
        x_PD = torch.from_numpy(read.resid_PLD[:, i])
        assert saes.variance_explained(x_PD, found[layer].reconstruct(x_PD)) > 0.7
        assert (found[layer].encode(x_PD) > 0).sum(dim=1).float().mean() <= 48
    few = build_prompts(gemma, frame.head(2))
    kept_PRE = splice_scores(gemma, few, found, keep_error=True)
    np.testing.assert_allclose(kept_PRE[:, :-1], np.repeat(kept_PRE[:, -1:], len(layers), axis=1), atol=1e-4)


def test_dictionaries_of_one_model_are_refused_by_another(smollm: LM) -> None:
    with pytest.raises(EmosaeError, match=r"reads 640 dimensions and smollm2-135m has 576"):
        load_dictionaries(smollm, str(saes.shipped_dir("gemma-3-270m")), layers=[3])
