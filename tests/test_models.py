from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from emosae_utils import files, models
from emosae_utils.files import EmosaeError
from emosae_utils.models import LM, load_model, model_profile


def test_names_are_registry_entries_folders_or_hub_ids(tmp_path: Path) -> None:
    assert model_profile("gemma-3-270m").source == "package"
    assert model_profile("google/gemma-3-1b-pt").source == "hub"
    with pytest.raises(EmosaeError, match="did you mean 'gemma-3-270m'"):
        model_profile("gemma-3-270")
    with pytest.raises(EmosaeError, match=r"holds no config\.json"):
        model_profile(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert model_profile(str(tmp_path)).source == "folder"


def test_registry_is_valid_and_names_licences() -> None:
    names = [p.name for p in models.registered()]
    assert {"gemma-3-270m", "smollm2-135m", "gemma-2-2b", "gemma-2-9b", "llama-3.1-8b"} <= set(names)
    assert all(p.licence and p.title for p in models.registered())


@pytest.mark.parametrize(("name", "layers", "width"), [("smollm", 30, 576), ("gemma", 18, 640)])
def test_embedded_models_are_the_real_ones(name: str, layers: int, width: int, request: pytest.FixtureRequest) -> None:
    """A language model that works gives ordinary English a low perplexity, and word salad a much higher one."""
    lm: LM = request.getfixturevalue(name)
    assert (lm.n_layers, lm.d_model, lm.dtype) == (layers, width, "float32")

    def loss(text: str) -> float:
        ids = lm.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return float(lm.hf(ids, labels=ids).loss)

    plain = (
        "The train was late again, so we sat on a bench at the station and shared the sandwiches my mother had made."
    )
    salad = "bench was sandwiches again the late and mother station, the shared train so at made my had a we sat on the"
    assert loss(plain) < 4.5
    assert loss(salad) > loss(plain) + 2.5


def test_nothing_is_padded_on_the_wrong_side(smollm: LM) -> None:
    assert smollm.tokenizer.padding_side == "left"
    _ = smollm.nn
    assert smollm.tokenizer.padding_side == "left"


def test_an_altered_cache_is_found_and_rebuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Flip one byte of the weights: the checksum notices, and the copy is made anew from the package."""
    good = models.ensure_weights("smollm2-135m", fetch=True)
    assert good is not None
    monkeypatch.setenv("EMOSAE_CACHE_DIR", str(tmp_path))
    folder = tmp_path / "models" / good.name
    folder.mkdir(parents=True)
    for part in good.iterdir():
        shutil.copyfile(part, folder / part.name)
    assert models.ensure_weights("smollm2-135m") == folder
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    fault = files.check_manifest(folder)
    assert fault == "model.safetensors was truncated or altered"
    built: list[Path] = []

    def rebuild(profile: object, parts: object, target: Path) -> None:
        built.append(target)
        for part in good.iterdir():
            shutil.copyfile(part, target / part.name)

    monkeypatch.setattr(models, "_convert", rebuild)
    monkeypatch.setattr(models, "_part_paths", lambda profile: [Path("part")])
    assert models.ensure_weights("smollm2-135m") == folder
    assert len(built) == 1 and files.check_manifest(folder) is None


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMOSAE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(models, "_part_paths", lambda profile: None)
    with pytest.raises(EmosaeError, match="run `emosae fetch smollm2-135m`"):
        load_model("smollm2-135m")


def test_packaged_weights_with_a_wrong_checksum_are_refused(tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(b"not the weights")
    with pytest.raises(EmosaeError, match="do not match their checksum"):
        models._join([part], model_profile("smollm2-135m"), tmp_path / "joined")


def test_too_large_a_model_is_refused_before_loading(smollm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(models, "free_memory", lambda device: 10**8)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", never)
    with pytest.raises(EmosaeError, match=r"needs about 0\.\d GB on cpu in float32 and 0\.1 GB are free"):
        load_model("smollm2-135m", device="cpu")


def test_memory_estimate_covers_the_parameters(smollm: LM) -> None:
    parameters = sum(p.numel() * p.element_size() for p in smollm.hf.parameters())
    need = models.estimate_bytes(smollm.hf.config, "float32", 2048)
    assert parameters < need < 3 * parameters


def test_device_and_dtype_are_explicit() -> None:
    with pytest.raises(EmosaeError, match="did you mean 'float16'"):
        load_model("smollm2-135m", dtype="flaot16")
    if not torch.cuda.is_available():
        with pytest.raises(EmosaeError, match="no CUDA device"):
            load_model("smollm2-135m", device="cuda")


def test_pickled_weights_are_never_loaded(smollm: LM, tmp_path: Path) -> None:
    smollm.hf.config.save_pretrained(tmp_path)
    smollm.tokenizer.save_pretrained(tmp_path)
    torch.save(smollm.hf.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(EmosaeError, match="cannot load"):
        load_model(str(tmp_path), device="cpu")


def test_a_local_folder_works_through_the_same_door(smollm: LM, tmp_path: Path) -> None:
    smollm.hf.save_pretrained(tmp_path)
    smollm.tokenizer.save_pretrained(tmp_path)
    lm = load_model(str(tmp_path), device="cpu")
    assert lm.n_layers == smollm.n_layers
    before = lm.fingerprint
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"note": "changed"}))
    assert load_model(str(tmp_path), device="cpu").fingerprint != before


def test_unknown_architectures_are_said() -> None:
    with pytest.raises(EmosaeError, match="unknown place"):
        models.decoder_layers(torch.nn.Linear(2, 2))


def test_a_model_says_briefly_what_it_is(smollm: LM) -> None:
    assert repr(smollm) == "LM(smollm2-135m, 30 layers of 576, float32 on cpu)"
