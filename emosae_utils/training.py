"""Train sparse autoencoders on a harvest, fold the scaling into them, prune what never fires, and save them.

sae-lens does the training steps and knows the architectures; this module feeds it, watches it and makes it resumable.
Layers are trained in order. From the second on, a dictionary starts from the one before it: the residual stream
changes little from block to block, so most features need only be adjusted (layer-wise transfer, Ghilardi et al. 2024,
doi:10.18653/v1/2024.blackboxnlp-1.32). The loss of each kind of position is counted in units of its own variance;
otherwise running text, whose activations spread far wider, would leave nothing for the read-outs.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from emosae_utils.files import (
    EmosaeError,
    atomic_file,
    atomic_folder,
    check_manifest,
    pick,
    read_json,
    sha256_text,
    write_json,
    write_manifest,
)
from emosae_utils.harvest import READOUT, count_rows, harvest, layer_file
from emosae_utils.mix import Item, training_items
from emosae_utils.models import LM

Array = np.ndarray[Any, np.dtype[Any]]

ARCHITECTURES = ("topk", "batchtopk", "jumprelu", "standard", "gated", "matryoshka_batchtopk")


@dataclass(frozen=True)
class TrainConfig:
    """How one dictionary is trained.

    Attributes:
        architecture: a training architecture of sae-lens.
        d_sae: latents before pruning.
        k: active latents per position, for the top-k architectures.
        positions: positions seen in training, repeats counted.
        transfer_positions: the same for a layer that starts from the one before.
        batch: positions per step.
        lr: learning rate of Adam at its peak.
        readout_share: share of read-outs in every batch, and of their loss in the total.
        seed: of the order of the data and the first weights.
    """

    architecture: str = "topk"
    d_sae: int = 1536
    k: int = 48
    positions: int = 600_000
    transfer_positions: int = 240_000
    batch: int = 1024
    lr: float = 4e-3
    readout_share: float = 0.6
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.positions // self.batch

    @property
    def readouts(self) -> int:
        """Read-outs per batch."""
        return round(self.batch * self.readout_share)


@dataclass(frozen=True)
class Pools:
    """A layer's harvested activations by kind, and the spread that its losses are counted in.

    Attributes:
        acts_ND: scaled residuals, float16, on disk.
        readout_N, running_N: row numbers to train on.
        held_readout_N, held_running_N: row numbers to measure on.
        template_N: template of each row, empty for running text.
        var_readout: mean squared distance of read-outs to the mean of their template.
        var_running: the same for running text to its mean, the widest hundredth left out.
    """

    acts_ND: Array
    readout_N: Array
    running_N: Array
    held_readout_N: Array
    held_running_N: Array
    template_N: Array
    var_readout: float
    var_running: float


SAMPLE = 20_000


def _spread(acts_ND: Array, groups_N: Array, trim: float = 0.0) -> float:
    squares = []
    for group in np.unique(groups_N):
        own_ND = acts_ND[groups_N == group]
        squares.append(((own_ND - own_ND.mean(axis=0)) ** 2).sum(axis=1))
    distance_N = np.sort(np.concatenate(squares))
    return float(distance_N[: max(1, int(len(distance_N) * (1 - trim)))].mean())


def load_pools(folder: Path, layer: int, d_model: int, rows: pd.DataFrame, n_rows: int | None = None) -> Pools:
    """Open a layer of a harvest.

    Args:
        folder: the harvest.
        layer: block index.
        d_model: width.
        rows: what each row is.
        n_rows: rows written so far; all if None.
    """
    acts_ND = np.memmap(layer_file(folder, layer), dtype=np.float16, mode="r", shape=(len(rows), d_model))
    n = len(rows) if n_rows is None else n_rows
    kind, held = rows["kind"].to_numpy()[:n], rows["held_out"].to_numpy()[:n]
    readout_N, running_N = np.flatnonzero((kind == READOUT) & ~held), np.flatnonzero((kind != READOUT) & ~held)
    rng = np.random.default_rng(0)
    some = [np.sort(rng.permutation(x)[:SAMPLE]) for x in (readout_N, running_N)]
    template_N = rows["template"].to_numpy()
    return Pools(
        acts_ND,
        readout_N,
        running_N,
        np.flatnonzero((kind == READOUT) & held),
        np.flatnonzero((kind != READOUT) & held),
        template_N,
        _spread(acts_ND[some[0]].astype(np.float32), template_N[some[0]]),
        _spread(acts_ND[some[1]].astype(np.float32), np.zeros(len(some[1])), trim=0.01),
    )


def _endless(rows_N: Array, size: int, key: list[int], skip: int) -> Iterator[Array]:
    """Row numbers in batches, every epoch in a new order; `skip` batches are passed over."""
    per_epoch = max(1, len(rows_N) // size)
    number = skip
    while True:
        epoch, at = divmod(number, per_epoch)
        order = np.random.default_rng([*key, epoch]).permutation(rows_N)
        for i in range(at, per_epoch):
            yield np.sort(np.resize(order[i * size : (i + 1) * size], size))
            number += 1


def _batches(pools: Pools, config: TrainConfig, layer: int, skip: int) -> Iterator[torch.Tensor]:
    """Batches of scaled activations: read-outs first, then running text."""
    ends = _endless(pools.readout_N, config.readouts, [config.seed, layer, 1], skip)
    text = _endless(pools.running_N, config.batch - config.readouts, [config.seed, layer, 0], skip)
    for a, b in zip(ends, text, strict=False):
        yield torch.from_numpy(np.concatenate([pools.acts_ND[a], pools.acts_ND[b]]).astype(np.float32))


# An activation far outside its kind counts as if its square were this multiple of the kind's variance.
OUTLIER = 4.0


def _weighted_loss(pools: Pools, config: TrainConfig) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Squared error in units of each kind's variance, the first rows of a batch being read-outs.

    A few positions (attention sinks) are hundreds of times longer than the rest and would be all of the gradient;
    their error counts relative to their own square.
    """
    n = config.readouts
    unit_B1 = torch.full((config.batch, 1), pools.var_running)
    unit_B1[:n] = pools.var_readout
    share_B1 = torch.full((config.batch, 1), (1 - config.readout_share) * config.batch / max(1, config.batch - n))
    share_B1[:n] = config.readout_share * config.batch / max(1, n)

    def loss(predicted_BD: torch.Tensor, target_BD: torch.Tensor) -> torch.Tensor:
        unit = unit_B1.to(target_BD.device)
        square_B1 = target_BD.square().sum(dim=-1, keepdim=True)
        # Read-outs lie away from the common mean as a group; only running text has outliers.
        far = torch.clamp(OUTLIER * pools.var_running / square_B1, max=1.0)
        far[:n] = 1.0
        return (predicted_BD - target_BD).square() * (share_B1.to(target_BD.device) / unit * far)

    return loss


def _new_sae(config: TrainConfig, d_model: int, device: str) -> Any:
    from sae_lens.registry import get_sae_training_class

    sae_class, config_class = get_sae_training_class(pick("architecture", config.architecture, ARCHITECTURES))
    known = config_class.__dataclass_fields__
    options: dict[str, Any] = {"d_in": d_model, "d_sae": config.d_sae, "device": device}
    if "k" in known:
        options["k"] = config.k
    if "matryoshka_widths" in known:
        options["matryoshka_widths"] = [config.d_sae // 8, config.d_sae // 2, config.d_sae]
    torch.manual_seed(config.seed)
    return sae_class(config_class(**options))


def _template_means(pools: Pools) -> Array:
    """Mean scaled activation of each template's read-outs, [templates, d_model]."""
    some = pools.readout_N[:SAMPLE]
    acts_ND, template_N = pools.acts_ND[some].astype(np.float32), pools.template_N[some]
    return np.stack([acts_ND[template_N == name].mean(axis=0) for name in np.unique(template_N)])


def _directions(pools: Pools, config: TrainConfig, n: int, key: int) -> torch.Tensor:
    """Unit differences between harvested activations, [n, d_model]: directions that the data has.

    Read-outs are paired within their template, and what tells templates apart is taken out of every direction: it is
    one constant per template, many times longer than what differs from text to text.
    """
    rng = np.random.default_rng([config.seed, key])
    n_ends = round(n * config.readout_share)
    first_N = rng.choice(pools.readout_N, size=n_ends)
    second_N = np.empty_like(first_N)
    for name in np.unique(pools.template_N[first_N]):
        own = pools.template_N[first_N] == name
        second_N[own] = rng.choice(pools.readout_N[pools.template_N[pools.readout_N] == name], size=int(own.sum()))
    a, b = rng.choice(pools.running_N, size=(2, n - n_ends))
    pairs = ((first_N, second_N), (a, b))
    found = [pools.acts_ND[x].astype(np.float32) - pools.acts_ND[y].astype(np.float32) for x, y in pairs]
    # Two draws may hold the same activation; a little noise keeps their difference from being no direction at all.
    noise_ND = rng.normal(scale=1e-3, size=(n, pools.acts_ND.shape[1]))
    w_ND = np.concatenate(found) + noise_ND.astype(np.float32)
    means_TD = _template_means(pools)
    w_ND -= w_ND @ np.linalg.pinv(means_TD) @ means_TD
    return torch.from_numpy(w_ND / np.linalg.norm(w_ND, axis=1, keepdims=True))


def _start_from_data(sae: Any, pools: Pools, config: TrainConfig) -> None:
    """First decoder directions are template means and differences between activations; none is random.

    One latent per template rebuilds its mean exactly; directions taken from the data leave few latents dead. The
    encoder of the rest is their transpose, scaled so that the first reconstruction has the least squared error that
    this start allows.
    """
    means_TD = _template_means(pools)
    unit_TD = means_TD / np.linalg.norm(means_TD, axis=1, keepdims=True)
    n = len(unit_TD)
    w_ND = _directions(pools, config, config.d_sae, 7).to(sae.device)
    with torch.no_grad():
        sae.W_dec.data.copy_(w_ND)
        sae.W_enc.data.copy_(w_ND.T)
        sae.W_dec.data[:n] = torch.from_numpy(unit_TD).to(sae.device)
        # The dual basis: each of these latents is silent at the other templates' means.
        sae.W_enc.data[:, :n] = torch.from_numpy(np.linalg.pinv(unit_TD)).to(sae.device)
        x_BD = next(_batches(pools, config, 0, 0)).to(sae.device)
        codes_BF = sae.encode(x_BD)
        named_BF = torch.zeros_like(codes_BF)
        named_BF[:, :n] = codes_BF[:, :n]
        rest_BD = x_BD - sae.decode(named_BF)
        made_BD = sae.decode(codes_BF - named_BF)
        best = float((made_BD * rest_BD).sum() / made_BD.square().sum().clamp(min=1e-6))
        sae.W_enc.data[:, n:] *= max(best, 1e-3)


def _start_from_before(sae: Any, pools: Pools, config: TrainConfig, start: Mapping[str, torch.Tensor]) -> None:
    """Start from the parameters of the layer before; latents that are silent here start again from the data."""
    with torch.no_grad():
        for name, p in sae.named_parameters():
            p.copy_(start[name])
        some = np.sort(np.concatenate([pools.readout_N[: SAMPLE // 2], pools.running_N[: SAMPLE // 2]]))
        _, _, fired_F = explained(sae, pools.acts_ND[some], np.zeros(len(some)))
        silent = torch.from_numpy(np.flatnonzero(fired_F == 0)).to(sae.device)
        alive = torch.from_numpy(np.flatnonzero(fired_F > 0)).to(sae.device)
        if not len(silent) or not len(alive):
            return
        w_ND = _directions(pools, config, len(silent), 8).to(sae.device)
        # As long as the others, and no louder than a typical one of them.
        sae.W_dec.data[silent] = w_ND * sae.W_dec.data[alive].norm(dim=1).median()
        sae.W_enc.data[:, silent] = w_ND.T * sae.W_enc.data[:, alive].norm(dim=0).median()
        for name, p in sae.named_parameters():
            if name not in ("W_enc", "W_dec", "b_dec"):
                p.data[silent] = p.data[alive].median()


def _trainer(sae: Any, config: TrainConfig) -> Any:
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    options = SAETrainerConfig(
        total_training_samples=config.steps * config.batch,
        train_batch_size_samples=config.batch,
        lr=config.lr,
        lr_end=config.lr,
        lr_scheduler_name="constant",
        lr_warm_up_steps=min(20, max(1, config.steps // 20)),
        lr_decay_steps=max(1, config.steps // 3),
        device=str(sae.device),
        dead_feature_window=20,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(options, sae, iter(()))


def _save_state(path: Path, trainer: Any) -> None:
    """Weights, optimiser and counters of a training as safetensors, atomically."""
    tensors = {f"sae.{name}": p.detach().contiguous() for name, p in trainer.sae.named_parameters()}
    for i, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{name}": value.contiguous() for name, value in state.items()}
    tensors["since_fired"] = trainer.n_forward_passes_since_fired
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"step": str(trainer.n_training_steps)})


def _load_state(path: Path, trainer: Any, batch: int) -> None:
    tensors = load_file(path, device=str(trainer.sae.device))
    with safe_open(path, framework="pt") as header:
        step = int(header.metadata()["step"])
    with torch.no_grad():
        for name, p in trainer.sae.named_parameters():
            p.copy_(tensors[f"sae.{name}"])
    own = trainer.optimizer.state_dict()
    own["state"] = {}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, i, name = key.split(".")
            own["state"].setdefault(int(i), {})[name] = value
    trainer.optimizer.load_state_dict(own)
    trainer.n_forward_passes_since_fired = tensors["since_fired"]
    trainer.n_training_steps, trainer.n_training_samples = step, step * batch
    with warnings.catch_warnings():
        # The scheduler is walked to where it was; its optimiser has stepped in another process.
        warnings.simplefilter("ignore")
        for _ in range(step):
            trainer.lr_scheduler.step()


# A loss this many times the first one will not come back.
EXPLODED = 50.0
STATE_EVERY = 200


def train_layer(
    pools: Pools,
    layer: int,
    config: TrainConfig,
    *,
    state: Path | None = None,
    start: dict[str, torch.Tensor] | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> Any:
    """Train the dictionary of one layer in scaled coordinates.

    Args:
        pools: the layer's activations.
        layer: block index; a part of the seed.
        config: how to train.
        state: where the training's state is kept every few hundred steps, and found again after a kill.
        start: parameters to start from, such as those of the layer before; None starts from the data.
        device: where the dictionary lives.
        say: receives a line now and then.

    Returns:
        The sae-lens training SAE.

    Raises:
        EmosaeError: if the loss is not finite or explodes; the last good state stays in `state`.
    """
    os.environ.setdefault("WANDB_MODE", "disabled")
    sae = _new_sae(config, pools.acts_ND.shape[1], device)
    if hasattr(sae.cfg, "aux_loss_coefficient"):
        # Gao et al. 2024 weigh the loss of dead latents by 1/32 of the normalised error.
        sae.cfg.aux_loss_coefficient = 1 / 32 / pools.var_running
    if start is not None:
        config = replace(config, positions=config.transfer_positions)
    resumed = state is not None and state.is_file()
    if start is None and not resumed:
        _start_from_data(sae, pools, config)
    elif start is not None and not resumed:
        _start_from_before(sae, pools, config, start)
    sae.mse_loss_fn = _weighted_loss(pools, config)
    trainer = _trainer(sae, config)
    if state is not None and resumed:
        _load_state(state, trainer, config.batch)
    first, recent, clock = None, 0.0, time.perf_counter()
    begun = trainer.n_training_steps
    for batch_BD in _batches(pools, config, layer, begun):
        if trainer.n_training_steps >= config.steps:
            break
        loss = trainer.step(batch_BD).loss.item()
        first = loss if first is None else first
        if not np.isfinite(loss) or loss > EXPLODED * max(first, 1.0):
            kept = f"; the last good state is in {state}" if state is not None and state.is_file() else ""
            raise EmosaeError(
                f"training layer {layer} broke off at step {trainer.n_training_steps}: the loss is {loss:.3g}; "
                f"use a smaller learning rate than {config.lr:g}{kept}"
            )
        trainer.n_training_steps += 1
        recent = loss if recent == 0.0 else 0.98 * recent + 0.02 * loss
        if trainer.n_training_steps % STATE_EVERY == 0:
            if state is not None and trainer.n_training_steps < config.steps:
                _save_state(state, trainer)
            pace = (time.perf_counter() - clock) / (trainer.n_training_steps - begun)
            left = pace * (config.steps - trainer.n_training_steps)
            say(
                f"layer {layer}: step {trainer.n_training_steps} of {config.steps}, loss {recent:.3f}, "
                f"about {left:.0f} s left"
            )
    return sae


@torch.no_grad()
def explained(sae: Any, acts_ND: Array, groups_N: Array, chunk: int = 4096) -> tuple[float, float, Array]:
    """Share of variance explained, mean active latents, and how often each latent fires.

    Args:
        sae: a dictionary in the coordinates of `acts_ND`.
        acts_ND: activations [rows, d_model].
        groups_N: rows are centred on the mean of their group, so that telling groups apart earns nothing.
        chunk: rows at once.
    """
    error = total = active = 0.0
    fired_F = np.zeros(sae.W_dec.shape[0])
    means = {g: acts_ND[groups_N == g].astype(np.float32).mean(axis=0) for g in np.unique(groups_N)}
    for at in range(0, len(acts_ND), chunk):
        x_BD = acts_ND[at : at + chunk].astype(np.float32)
        codes_BF = sae.encode(torch.from_numpy(x_BD).to(sae.device))
        made_BD = sae.decode(codes_BF).cpu().numpy()
        centre_BD = np.stack([means[g] for g in groups_N[at : at + chunk]])
        error += float(((x_BD - made_BD) ** 2).sum(dtype=np.float64))
        total += float(((x_BD - centre_BD) ** 2).sum(dtype=np.float64))
        on_BF = (codes_BF > 0).float()
        active += float(on_BF.sum())
        fired_F += on_BF.sum(dim=0).cpu().numpy()
    return 1 - error / total, active / len(acts_ND), fired_F


# A latent that fires less often than once in this many positions of the mix is pruned.
DEAD_BELOW = 1 / 20_000
PRUNE_SAMPLE = 60_000


def _inference(sae: Any, scratch: Path) -> Any:
    """The trained dictionary as sae-lens saves it for use: norms folded, a batch-wide top-k turned into thresholds."""
    from sae_lens import SAE

    sae.save_inference_model(scratch)
    return SAE.load_from_disk(str(scratch), device=str(sae.device), dtype="float32")


@torch.no_grad()
def fold_scaling(sae: Any, mean_D: torch.Tensor, scale: float) -> None:
    """Make a dictionary of (x - mean) / scale read raw x, in place, with activations in the units of x.

    Codes change by the factor `scale` and choices of latents not at all; decoder rows get unit length.

    Args:
        sae: an inference SAE of sae-lens with unit-norm decoder rows.
        mean_D: subtracted mean.
        scale: divisor.
    """
    eye_DD = torch.eye(len(mean_D), device=sae.device)
    sae.fold_activation_whitening(mean_D.to(sae.device), eye_DD / scale, eye_DD * scale)
    # Every decoder row is now `scale` long; a common factor moves to the encoder without changing a top-k choice.
    sae.W_dec.data.div_(scale)
    sae.W_enc.data.mul_(scale)
    for name in ("b_enc", "threshold", "b_mag"):
        if hasattr(sae, name):
            getattr(sae, name).data.mul_(scale)


@torch.no_grad()
def prune(sae: Any, alive_F: Array) -> Any:
    """A copy of a dictionary with only the latents `alive_F`.

    Raises:
        EmosaeError: if fewer are left than fire at once.
    """
    keep = torch.from_numpy(np.flatnonzero(alive_F)).to(sae.device)
    if len(keep) < int(getattr(sae.cfg, "k", 1)):
        raise EmosaeError(f"only {len(keep)} latents ever fire; train longer or with another learning rate")
    config = copy.deepcopy(sae.cfg)
    config.d_sae = len(keep)
    smaller = type(sae)(config)
    for name, p in sae.named_parameters():
        value = p.data
        if name == "W_enc":
            value = value[:, keep]
        elif value.shape[0] == sae.cfg.d_sae and name != "b_dec":
            value = value[keep]
        getattr(smaller, name).data = value.clone().contiguous()
    return smaller


def save_dictionary(sae: Any, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a dictionary in sae-lens format, atomically: matrices in bfloat16, biases in float32.

    The constant part of the residual stream lies in the decoder bias and is up to a hundred times longer than what
    varies, so bfloat16 there would cost more variance than all other rounding together.
    """
    sae.cfg.metadata = type(sae.cfg.metadata)(**metadata)
    with atomic_folder(path) as temporary:
        weights, _ = sae.save_model(temporary)
        tensors = {k: v.to(torch.bfloat16) if v.ndim == 2 else v for k, v in load_file(weights).items()}
        save_file(tensors, weights)
        config = read_json(temporary / "cfg.json")
        write_json(temporary / "cfg.json", config | {"device": "cpu", "dtype": "float32"})
        write_manifest(temporary)


def _is_done(path: Path, key: str) -> bool:
    if check_manifest(path) is not None:
        return False
    return bool(read_json(path / "cfg.json").get("metadata", {}).get("training_key") == key)


def train_dictionaries(
    lm: LM,
    out: Path,
    work: Path,
    *,
    layers: Sequence[int] | None = None,
    config: TrainConfig | None = None,
    n_prompts: int = 100_000,
    n_running: int = 110_000,
    corpus: str = "",
    layers_at_once: int = 0,
    transfer: bool = True,
    keep_harvest: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Train, fold, prune and save one dictionary per layer: the whole way from text to `out/layer_XX`.

    Args:
        lm: the model.
        out: where the dictionaries go.
        work: where activations and unfinished states lie; the same folder resumes.
        layers: blocks; all if None.
        config: how each is trained.
        n_prompts: different emotion prompts in the mix.
        n_running: positions of running text in the mix.
        corpus: text to build the mix from, see `mix.read_documents`.
        layers_at_once: layers whose activations lie on the disk together; all if 0.
        transfer: start each layer from the one before.
        keep_harvest: leave the activations on disk.
        say: receives one line at a time.

    Raises:
        EmosaeError: for a layer out of range, missing text, a full disk, or a training that breaks off.
    """
    config = config or TrainConfig()
    chosen = list(range(lm.n_layers)) if layers is None else sorted(layers)
    if bad := [x for x in chosen if not 0 <= x < lm.n_layers]:
        raise EmosaeError(f"{lm.name} has layers 0 to {lm.n_layers - 1}; got {bad}")
    items, recipe = training_items(lm, n_prompts=n_prompts, n_running=n_running, seed=0, corpus=corpus)
    recipe_sum = sha256_text(json.dumps(recipe, sort_keys=True, default=str))
    write_json(out / "recipe.json", recipe)
    size = layers_at_once or len(chosen)
    start: dict[str, torch.Tensor] | None = None
    made: list[Path] = []
    for at in range(0, len(chosen), size):
        group = chosen[at : at + size]
        acts = work / f"activations_{group[0]:02d}_{group[-1]:02d}"
        keys = [
            sha256_text(
                lm.fingerprint, recipe_sum, json.dumps([asdict(config), transfer, chosen[: chosen.index(x) + 1]])
            )
            for x in group
        ]
        paths = [(out / f"layer_{x:02d}", work / f"final_{x:02d}.safetensors") for x in group]
        if all(_is_done(path, key) and final.is_file() for (path, final), key in zip(paths, keys, strict=True)):
            say(f"layers {group[0]} to {group[-1]}: up to date")
            start = load_file(paths[-1][1]) if transfer else None
            continue
        _require_room(lm, items, work, group, acts)
        rows = harvest(lm, items, acts, layers=group, say=say)
        scaling = np.load(acts / "scaling.npz")
        for i, (layer, (path, final), key) in enumerate(zip(group, paths, keys, strict=True)):
            if _is_done(path, key) and final.is_file():
                start = load_file(final) if transfer else None
                say(f"layer {layer}: up to date")
                continue
            pools = load_pools(acts, layer, lm.d_model, rows)
            state = work / f"state_{layer:02d}.safetensors"
            sae = train_layer(pools, layer, config, state=state, start=start, device=lm.device, say=say)
            with atomic_file(final) as temporary:
                save_file({n: p.detach().contiguous() for n, p in sae.named_parameters()}, temporary)
            metadata = {
                "model_name": lm.profile.base,
                "model_fingerprint": lm.fingerprint,
                "hook_name": f"blocks.{layer}.hook_resid_post",
                "training_key": key,
                "training": asdict(config) | {"from_layer_before": start is not None, "recipe_sha256": recipe_sum},
            }
            mean_D, scale = torch.from_numpy(scaling["mean_LD"][i]), float(scaling["scale_L"][i])
            facts = finish_layer(sae, pools, mean_D, scale, path, metadata)
            start = load_file(final) if transfer else None
            state.unlink(missing_ok=True)
            made.append(path)
            say(
                f"layer {layer}: {facts['features']} features, variance explained {facts['read_out_variance']:.3f} at "
                f"held-out read-outs, {facts['running_variance']:.3f} in held-out text"
            )
        if not keep_harvest:
            shutil.rmtree(acts)
    return made


def _require_room(lm: LM, items: Sequence[Item], work: Path, group: Sequence[int], acts: Path) -> None:
    """Say before the work how many layers the disk can take at once."""
    if (acts / "state.json").is_file():
        return
    work.mkdir(parents=True, exist_ok=True)
    per_layer = 2 * count_rows(items) * lm.d_model
    free = shutil.disk_usage(work).free
    if free < per_layer * len(group):
        raise EmosaeError(
            f"{work} has {free / 1e9:.1f} GB free and the activations of {len(group)} layers take "
            f"{per_layer * len(group) / 1e9:.1f} GB; use --layers-at-once {max(1, int(0.9 * free / per_layer))} "
            "or another --work folder"
        )


def finish_layer(
    sae: Any, pools: Pools, mean_D: torch.Tensor, scale: float, path: Path, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Fold, prune, save; then measure what was saved on the held-out part of the mix.

    Returns:
        Features kept and pruned, and share of variance explained at read-outs (within templates) and in text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        plain = _inference(sae, Path(scratch))
    rng = np.random.default_rng(0)
    seen = [np.sort(rng.permutation(rows)[: PRUNE_SAMPLE // 2]) for rows in (pools.readout_N, pools.running_N)]
    sample = np.concatenate([*seen, pools.held_readout_N, pools.held_running_N])
    _, _, fired_F = explained(plain, pools.acts_ND[sample], np.zeros(len(sample)))
    alive_F = fired_F / len(sample) >= DEAD_BELOW
    smaller = prune(plain, alive_F)
    fold_scaling(smaller, mean_D, scale)
    facts: dict[str, Any] = {"features": int(alive_F.sum()), "pruned": int((~alive_F).sum())}
    # Measured on raw activations through the rounded weights, as a user will load them.
    rounded = copy.deepcopy(smaller)
    for name in ("W_enc", "W_dec"):
        getattr(rounded, name).data = getattr(rounded, name).data.to(torch.bfloat16).float()
    for kind, held in (("read_out", pools.held_readout_N), ("running", pools.held_running_N)):
        raw_ND = pools.acts_ND[held].astype(np.float32) * scale + mean_D.numpy()
        groups = pools.template_N[held]
        share, active, _ = explained(rounded, raw_ND, groups)
        facts |= {f"{kind}_variance": share, f"{kind}_l0": active, f"{kind}_positions": len(held)}
    save_dictionary(smaller, path, dict(metadata) | {"held_out_mix": facts})
    return facts
