"""Sparse autoencoders by layer: the shipped ones, published ones, one's own; what they keep and what they lose.

A dictionary reads the residual stream after a block and rewrites it as a sparse sum: x = b + sum_f a_f d_f + error.
Every dictionary here takes raw residuals, has unit-norm decoder rows, and is checked when it is loaded: the right
model, layer and width, unaltered files, and a sane reconstruction of the model's own activations.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from emosae_utils.files import EmosaeError, check_manifest, pick, repo_dir
from emosae_utils.models import LM, decoder_layers, final_norm
from emosae_utils.scoring import FloatArray, Prompts, _continuations, _prefix_cache

# A dictionary that explains less than this of the variance of the activations it was made for is wired wrongly.
SANE = 0.3


@dataclass(frozen=True)
class Dictionary:
    """A sparse autoencoder for the residual stream after one block.

    Attributes:
        layer: block index.
        sae: the sae-lens SAE, in float32, with unit-norm decoder rows.
        origin: where it came from: a folder, or "release/id" of a published one.
        neuronpedia: id of the dictionary's pages on Neuronpedia, if it has any.
    """

    layer: int
    sae: Any
    origin: str
    neuronpedia: str = ""

    @property
    def n_features(self) -> int:
        """Number of latents."""
        return int(self.sae.W_dec.shape[0])

    @property
    def d_model(self) -> int:
        """Width of the residual stream it reads."""
        return int(self.sae.W_dec.shape[1])

    @torch.no_grad()
    def encode(self, resid_PD: torch.Tensor) -> torch.Tensor:
        """Feature activations [positions, features] of raw residuals [positions, d_model]."""
        codes_PF: torch.Tensor = self.sae.encode(resid_PD.to(self.sae.device, torch.float32))
        return codes_PF

    @torch.no_grad()
    def decode(self, codes_PF: torch.Tensor) -> torch.Tensor:
        """Reconstruction [positions, d_model] of feature activations."""
        resid_PD: torch.Tensor = self.sae.decode(codes_PF)
        return resid_PD

    def reconstruct(self, resid_PD: torch.Tensor) -> torch.Tensor:
        """What the dictionary makes of raw residuals: decode(encode(x)), in the dtype and place of x."""
        return self.decode(self.encode(resid_PD)).to(resid_PD.device, resid_PD.dtype)


def shipped_dir(model: str) -> Path:
    """Where the dictionaries of a model lie in the repository."""
    return repo_dir() / "data" / "saes" / model


def _layer_dirs(folder: Path) -> dict[int, Path]:
    found = {}
    for path in sorted(folder.glob("layer_*")):
        if match := re.fullmatch(r"layer_(\d+)", path.name):
            found[int(match.group(1))] = path
    return found


def available_layers(lm: LM, source: str = "") -> tuple[int, ...]:
    """Layers that `source` (see `load_dictionaries`) has a dictionary for."""
    if source and source in published_releases():
        return tuple(sorted(_published_ids(source)))
    return tuple(sorted(_layer_dirs(Path(source) if source else shipped_dir(lm.name))))


def published_releases() -> dict[str, Any]:
    """The SAE releases that sae-lens knows, by name."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return dict(get_pretrained_saes_directory())


# Of several dictionaries of one layer, the one that comes first in this order of widths and sparsities is taken.
_PREFERENCE = (r"canonical", r"width_16k_l0_small", r"width_16k_l0_medium", r"width_16k", r"")


def _published_ids(release: str) -> dict[int, str]:
    """The SAE id of each layer of a release, the widths of 16k first."""
    ids = [i for i in published_releases()[release].saes_map if "embedding" not in i]
    found: dict[int, str] = {}
    for wanted in _PREFERENCE:
        for sae_id in ids:
            match = re.search(r"(?:layer_|(?:^|/)l)(\d+)", sae_id)
            if match and re.search(wanted, sae_id) and ("width_" not in sae_id or "width_16k" in sae_id):
                found.setdefault(int(match.group(1)), sae_id)
    return found


def load_dictionaries(
    lm: LM, source: str = "", *, layers: Sequence[int] | None = None, device: str | None = None, check: bool = True
) -> dict[int, Dictionary]:
    """Load one dictionary per layer.

    Args:
        lm: the model they are for.
        source: empty for the shipped ones; a release that sae-lens knows (`gemma-scope-2b-pt-res-canonical`,
            `llama_scope_lxr_8x`, ...), fetched from the hub; or a folder with `layer_XX` folders in sae-lens format.
        layers: blocks; every one there is if None.
        device: where the dictionaries live; the model's device if None.
        check: whether to reconstruct a few of the model's own activations first.

    Returns:
        Dictionaries by layer.

    Raises:
        EmosaeError: if there are none, one is for another model, layer or width, a file is missing or altered, or a
            reconstruction is not sane; the last names what is off.
    """
    published = bool(source) and source in published_releases()
    folder = Path(source).expanduser() if source else shipped_dir(lm.name)
    if source and not published and not folder.is_dir():
        pick("SAE release or folder", source, published_releases())
    have = _published_ids(source) if published else {k: str(v) for k, v in _layer_dirs(folder).items()}
    if not have:
        raise EmosaeError(
            f"no dictionaries for {lm.name} are in {folder}; train them with `emosae train-saes --model {lm.name}`"
        )
    wanted = sorted(have) if layers is None else list(layers)
    missing = [layer for layer in wanted if layer not in have]
    if missing:
        raise EmosaeError(f"{source or folder} has no dictionary for layer {missing[0]}; it has {sorted(have)}")
    found = {}
    for layer in wanted:
        where = device or lm.device
        found[layer] = _published(source, layer, where) if published else _from_folder(Path(have[layer]), layer, where)
        _check_fit(lm, found[layer])
    if check:
        check_sanity(lm, found)
    return found


def _quiet_load(load: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load()


def _from_folder(path: Path, layer: int, device: str) -> Dictionary:
    from sae_lens import SAE

    if not (path / "cfg.json").is_file() or not (path / "sae_weights.safetensors").is_file():
        raise EmosaeError(f"{path} lacks cfg.json or sae_weights.safetensors; restore it or train the layer again")
    if (path / "manifest.json").is_file() and (fault := check_manifest(path)):
        raise EmosaeError(f"the dictionary in {path} is damaged: {fault}; restore it (git checkout) or train it again")
    try:
        config = json.loads((path / "cfg.json").read_text(encoding="utf-8"))
        sae = _quiet_load(lambda: SAE.load_from_disk(str(path), device=device, dtype="float32"))
    except (ValueError, KeyError, RuntimeError, TypeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EmosaeError(f"cannot read the dictionary in {path}: {reason}; restore it or train it again") from error
    hook = str(config.get("metadata", {}).get("hook_name") or config.get("hook_name") or "")
    _check_hook(hook, layer, str(path))
    return Dictionary(layer, _unit_norm(sae), str(path))


def _published(release: str, layer: int, device: str) -> Dictionary:
    from sae_lens import SAE

    sae_id = _published_ids(release)[layer]
    try:
        sae = _quiet_load(lambda: SAE.from_pretrained(release, sae_id, device=device, dtype="float32"))
    except Exception as error:  # the hub client raises dozens of kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EmosaeError(
            f"cannot load {release}/{sae_id}: {reason}; check the network and your access to it"
        ) from error
    _check_hook(str(sae.cfg.metadata.hook_name or ""), layer, f"{release}/{sae_id}")
    pages = str(sae.cfg.metadata.neuronpedia_id or "")
    return Dictionary(layer, _unit_norm(sae), f"{release}/{sae_id}", pages)


def _check_hook(hook: str, layer: int, origin: str) -> None:
    """A dictionary must read the residual stream after its block."""
    accepted = (f"blocks.{layer}.hook_resid_post", f"model.layers.{layer}.output", f"model.layers.{layer}")
    if hook not in accepted:
        raise EmosaeError(
            f"{origin} reads {hook or 'an unnamed place'} and layer {layer} needs {accepted[0]}; "
            "choose a residual-stream dictionary of that layer"
        )


def _unit_norm(sae: Any) -> Any:
    """Scale every decoder row to length one and its activation to match, so that activations can be compared."""
    with torch.no_grad():
        norm_F = sae.W_dec.norm(dim=1)
        # A top-k choice compares activations, so only a scale common to all rows may be moved there.
        same = bool((norm_F - norm_F.mean()).abs().max() <= 0.02 * norm_F.mean())
        if sae.cfg.architecture() == "topk" and not sae.cfg.rescale_acts_by_decoder_norm:
            if not same:
                warnings.warn("decoder rows of unequal length under top-k are left as they are", stacklevel=2)
            return sae
        sae.fold_W_dec_norm()
    return sae


def _check_fit(lm: LM, dictionary: Dictionary) -> None:
    if dictionary.d_model != lm.d_model:
        raise EmosaeError(
            f"{dictionary.origin} reads {dictionary.d_model} dimensions and {lm.name} has {lm.d_model}; "
            "it belongs to another model"
        )
    if not 0 <= dictionary.layer < lm.n_layers:
        raise EmosaeError(f"{dictionary.origin} is for layer {dictionary.layer}; {lm.name} has 0 to {lm.n_layers - 1}")
    named = str(dictionary.sae.cfg.metadata.model_name or "")
    own = {lm.name, lm.profile.base, lm.profile.base.split("/")[-1]}
    # A published dictionary of the base model is used on a tuned one too, so only shipped ones must match by weights.
    weights = dictionary.sae.cfg.metadata.model_fingerprint
    if weights and weights != lm.fingerprint:
        raise EmosaeError(
            f"{dictionary.origin} was trained on {named or 'another model'} with other weights than this {lm.name}; "
            "use the dictionaries of this model"
        )
    if named and not weights and not any(named.split("/")[-1].lower() == o.split("/")[-1].lower() for o in own):
        raise EmosaeError(f"{dictionary.origin} belongs to {named}, not to {lm.name}; choose its own dictionaries")


PROBE_TEXTS: tuple[str, ...] = (
    "The bus was late again, so she walked along the river and counted the boats until the rain began.",
    "He put the letter back into its envelope and set it on the shelf, where nobody would look for it.",
    "After the lecture we talked about the results for an hour and could not agree on what they meant.",
    "A small dog ran across the square, barked twice at the fountain and disappeared into the market.",
)


@torch.no_grad()
def running_residuals(
    lm: LM, ids: Sequence[Sequence[int]], layers: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residuals of running text, without each sequence's first position, whose activations are like no other's.

    Args:
        lm: the model.
        ids: token sequences.
        layers: blocks.

    Returns:
        The streams after the blocks and before them, [layers, positions, d_model], and the tokens [positions].
    """
    import nnsight

    after, before, tokens = [], [], []
    blocks = decoder_layers(lm.nn)
    for sequence in ids:
        inputs = torch.tensor([list(sequence)], device=lm.device)
        with lm.nn.trace(
            {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}, use_cache=False, logits_to_keep=1
        ):
            outs, ins = [], []
            for layer in range(max(layers) + 1):
                if layer in layers:
                    ins.append(blocks[layer].input[0, 1:])
                    outs.append(blocks[layer].output[0, 1:])
            outs_LPD, ins_LPD = nnsight.save(torch.stack(outs)), nnsight.save(torch.stack(ins))
        after.append(outs_LPD.float().cpu())
        before.append(ins_LPD.float().cpu())
        tokens.append(inputs[0, 1:].cpu())
    return torch.cat(after, dim=1), torch.cat(before, dim=1), torch.cat(tokens)


def variance_explained(acts_PD: torch.Tensor, made_PD: torch.Tensor, groups_P: Sequence[Any] | None = None) -> float:
    """Share of variance explained: 1 - squared error / squared distance to the mean (of each group, if given)."""
    x_PD, centre_PD = acts_PD.double(), torch.zeros_like(acts_PD, dtype=torch.float64)
    groups = np.zeros(len(acts_PD)) if groups_P is None else np.asarray(groups_P)
    for group in np.unique(groups):
        own = torch.from_numpy(groups == group)
        centre_PD[own] = x_PD[own].mean(dim=0)
    return float(1 - (x_PD - made_PD.double()).square().sum() / (x_PD - centre_PD).square().sum())


def check_sanity(lm: LM, dictionaries: Mapping[int, Dictionary], texts: Sequence[str] = PROBE_TEXTS) -> None:
    """Reconstruct a few of the model's own activations; name what is off where that fails.

    Raises:
        EmosaeError: if a dictionary explains less than `SANE` of the variance of running text at its place.
    """
    layers = sorted(dictionaries)
    after_LPD, before_LPD, _ = running_residuals(lm, [lm.tokenizer(t)["input_ids"] for t in texts], layers)
    for i, layer in enumerate(layers):
        dictionary, x_PD = dictionaries[layer], after_LPD[i]
        share = variance_explained(x_PD, dictionary.reconstruct(x_PD))
        if np.isfinite(share) and share >= SANE:
            continue
        raise EmosaeError(
            f"{dictionary.origin} explains {share:.2f} of the variance at layer {layer} of {lm.name}, "
            f"less than {SANE}: {_what_is_off(lm, dictionary, x_PD, before_LPD[i])}"
        )


def _what_is_off(lm: LM, dictionary: Dictionary, after_PD: torch.Tensor, before_PD: torch.Tensor) -> str:
    """Try the known mistakes in turn and name the one that mends the reconstruction."""

    def mended(x_PD: torch.Tensor) -> bool:
        return variance_explained(x_PD, dictionary.reconstruct(x_PD)) >= SANE

    if mended(before_PD):
        return "it fits the stream before this block; use the layer below, or another hook point"
    if dictionary.layer == lm.n_layers - 1:
        norm = final_norm(lm)
        if norm is not None:
            with torch.no_grad():
                if mended(norm(after_PD.to(lm.device, getattr(torch, lm.dtype))).float().cpu()):
                    return "it fits the stream after the final norm; it was made for that place"
    unit = after_PD.shape[1] ** 0.5 / float(after_PD.norm(dim=1).mean())
    for factor in (unit, *(10.0**e for e in np.arange(-4, 4.5, 0.5))):
        if mended(after_PD * factor):
            return f"it fits activations scaled by about {factor:.3g}; fold that scale into its weights"
    return "no known change of place or scale mends it; it belongs to other weights"


def splice_scores(
    lm: LM,
    prompts: Prompts,
    dictionaries: Mapping[int, Dictionary],
    *,
    keep_error: bool = False,
) -> FloatArray:
    """Label scores when the reconstruction replaces the residual at the read-out position, one layer at a time.

    The keys and values of a prompt without its last token are computed once; the last token then goes through the
    model once for all layers, as a batch with one edited layer per row.

    Args:
        lm: the model.
        prompts: from `build_prompts`.
        dictionaries: by layer.
        keep_error: add the dictionary's error back, which must change nothing.

    Returns:
        Scores [prompts, layers + 1, labels], nats; the last row of each prompt is unedited.
    """
    layers = sorted(dictionaries)
    blocks = decoder_layers(lm.nn)
    several = any(len(ids) > 1 for ids in prompts.label_ids)
    first = [ids[0] for ids in prompts.label_ids]
    scores_PRE = np.empty((len(prompts), len(layers) + 1, len(prompts.labels)))
    with torch.no_grad():
        for p, ids in enumerate(prompts.ids):
            past = copy.deepcopy(_prefix_cache(lm, ids[:-1]))
            past.batch_repeat_interleave(len(layers) + 1)
            last_RS = torch.full((len(layers) + 1, 1), ids[-1], device=lm.device)
            mask_RT = torch.ones((len(layers) + 1, len(ids)), dtype=torch.long, device=lm.device)
            with lm.nn.trace(
                {"input_ids": last_RS, "attention_mask": mask_RT},
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
            ):
                for row, layer in enumerate(layers):
                    resid_BSD = blocks[layer].output
                    x_1D = resid_BSD[row, -1:].clone()
                    made_1D = dictionaries[layer].reconstruct(x_1D)
                    resid_BSD[row, -1:] = made_1D + (x_1D - made_1D) if keep_error else made_1D
                out = lm.nn.output.save()
            logp_RV = torch.log_softmax(out.logits[:, -1].float(), dim=-1)
            scores_RE = logp_RV[:, first].double()
            if several:
                scores_RE += _continuations(lm, out.past_key_values, len(layers) + 1, prompts.label_ids)
            scores_PRE[p] = scores_RE.cpu().numpy()
    return scores_PRE


@torch.no_grad()
def splice_losses(
    lm: LM, ids: Sequence[Sequence[int]], dictionaries: Mapping[int, Dictionary], *, every: int = 1
) -> pd.DataFrame:
    """Next-token cross-entropy with the reconstruction, and with zeros, in place of the residual of running text.

    The first position of a sequence is left alone: it is an attention sink that no dictionary here was trained on.

    Args:
        lm: the model.
        ids: token sequences.
        dictionaries: by layer.
        every: of the positions, score each so-manieth, to save output matrix.

    Returns:
        One row per sequence and layer: `clean`, `spliced`, `zero`, nats per token.
    """
    blocks = decoder_layers(lm.nn)
    rows = []
    for number, sequence in enumerate(ids):
        inputs = torch.tensor([list(sequence)], device=lm.device)
        at = torch.arange(1, inputs.shape[1] - 1, every, device=lm.device)
        options = {"use_cache": False, "logits_to_keep": at}
        batch = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}

        def loss(logits_1PV: torch.Tensor, inputs: torch.Tensor = inputs, at: torch.Tensor = at) -> float:
            return float(torch.nn.functional.cross_entropy(logits_1PV[0].float(), inputs[0, at + 1]))

        clean = loss(lm.hf(**batch, **options).logits)
        for layer in sorted(dictionaries):
            with lm.nn.trace(batch, **options):
                resid_BSD = blocks[layer].output
                resid_BSD[0, 1:] = dictionaries[layer].reconstruct(resid_BSD[0, 1:].clone())
                spliced = lm.nn.output.save()
            with lm.nn.trace(batch, **options):
                blocks[layer].output[0, 1:] = 0.0
                zero = lm.nn.output.save()
            rows.append((number, layer, clean, loss(spliced.logits), loss(zero.logits)))
    return pd.DataFrame(rows, columns=["sequence", "layer", "clean", "spliced", "zero"])


def random_dictionary(like: Dictionary, acts_PD: torch.Tensor, seed: int) -> Dictionary:
    """A control: the same size and sparsity with random directions, centred and scaled to do its best.

    Args:
        like: the dictionary to imitate.
        acts_PD: residuals that its bias and gain are fitted on.
        seed: of the directions.
    """
    sae = copy.deepcopy(like.sae)
    generator = torch.Generator().manual_seed(seed)
    w_FD = torch.randn(tuple(sae.W_dec.shape), generator=generator).to(sae.device)
    w_FD /= w_FD.norm(dim=1, keepdim=True)
    with torch.no_grad():
        sae.W_dec.data.copy_(w_FD)
        sae.W_enc.data.copy_(w_FD.T)
        sae.b_enc.data.zero_()
        sae.b_dec.data.copy_(acts_PD.mean(dim=0))
        control = Dictionary(like.layer, sae, f"random like {like.origin}")
        x_PD = acts_PD.to(sae.device) - sae.b_dec
        made_PD = control.reconstruct(acts_PD.to(sae.device)) - sae.b_dec
        gain = float((x_PD * made_PD).sum() / made_PD.square().sum().clamp(min=1e-9))
        sae.W_enc.data.mul_(max(gain, 1e-6))
    return control


def partners(one: Dictionary, other: Dictionary) -> FloatArray:
    """For each feature of `one`, the greatest cosine of its decoder row with any of `other`, [features]."""
    a_FD = one.sae.W_dec.detach() / one.sae.W_dec.detach().norm(dim=1, keepdim=True)
    b_FD = other.sae.W_dec.detach() / other.sae.W_dec.detach().norm(dim=1, keepdim=True)
    best_F: FloatArray = (a_FD @ b_FD.T).max(dim=1).values.cpu().numpy()
    return best_F
