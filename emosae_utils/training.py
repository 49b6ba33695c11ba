"""Train sparse autoencoders on a harvest, fold the scaling into them, prune what never fires, and save them.

sae-lens does the training steps and knows the architectures; this module feeds it, watches it and makes it resumable.
Three things make dictionaries good at read-outs, where all prompts of one template share a constant many times longer
than what differs from text to text:

- what lies in the span of the population means is rebuilt by latents of its own, and the others cannot see it; left in,
  the constant keeps the same few dozen latents on at every read-out, and the code is dense in disguise;
- the error of each population is counted in units of its own variance, or running text would take all the gradient;
- a part of the error counts each dimension by how much the model's predictions depend on it.
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
from dataclasses import asdict, dataclass
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
from emosae_utils.harvest import READOUT, count_rows, harvest, layer_file, sensitivity
from emosae_utils.mix import PERSONS, Item, training_items
from emosae_utils.models import LM

Array = np.ndarray[Any, np.dtype[Any]]

ARCHITECTURES = ("topk", "batchtopk", "jumprelu", "standard", "gated", "matryoshka_batchtopk")


@dataclass(frozen=True)
class TrainConfig:
    """How one dictionary is trained.

    Attributes:
        architecture: a training architecture of sae-lens.
        d_sae: latents before pruning, without those of the span.
        k: active latents per position, for the top-k architectures; those of the span included.
        positions: positions seen in training, repeats counted.
        batch: positions per step.
        lr: learning rate of Adam at its peak.
        readout_share: share of read-outs in every batch, and of their loss in the total.
        seed: of the order of the data and the first weights.
    """

    architecture: str = "topk"
    d_sae: int = 1536
    k: int = 48
    positions: int = 500_000
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
    """A layer's harvested activations by kind, and the spread that their losses are counted in.

    Attributes:
        acts_ND: scaled residuals, float16, on disk.
        readout_N, running_N: row numbers to train on.
        held_readout_N, held_running_N: row numbers to measure on.
        group_N: population of each row: its template and whether it names the usual person; empty for running text.
        unit_N: mean squared distance of each row's population to its mean (of running text, the widest hundredth is
            left out).
        weight_D: how much the model's predictions depend on each dimension, mean 1; ones if unknown.
        weighted_unit_N: as `unit_N`, every dimension counted by its weight.
        span_KD: orthonormal basis of the population means. What lies in it is rebuilt exactly, by latents of its own.
    """

    acts_ND: Array
    readout_N: Array
    running_N: Array
    held_readout_N: Array
    held_running_N: Array
    group_N: Array
    unit_N: Array
    weight_D: Array
    weighted_unit_N: Array
    span_KD: Array

    @property
    def unit_running(self) -> float:
        """The unit of running text."""
        return float(self.unit_N[self.running_N[0]])

    def varying(self, rows_N: Array) -> Array:
        """Scaled activations without what lies in the span of the population means, [rows, d_model], float32."""
        acts_ND = self.acts_ND[rows_N].astype(np.float32)
        rest: Array = acts_ND - acts_ND @ self.span_KD.T @ self.span_KD
        return rest


SAMPLE = 20_000
OTHER_PERSON = "/other"


def _spread(acts_ND: Array, trim: float) -> float:
    """Mean squared distance to the mean, the widest rows left out."""
    distance_N = np.sort(((acts_ND - acts_ND.mean(axis=0)) ** 2).sum(axis=1))
    return float(distance_N[: max(1, int((1 - trim) * len(distance_N)))].mean())


def make_pools(acts_ND: Array, rows: pd.DataFrame, weight_D: Array | None = None) -> Pools:
    """Sort a layer's activations into populations and measure how wide each is.

    Args:
        acts_ND: scaled residuals, in the order of `rows`.
        rows: what each row is, with the columns of a harvest.
        weight_D: weights of the dimensions, mean 1.
    """
    weight_D = np.ones(acts_ND.shape[1], dtype=np.float32) if weight_D is None else weight_D.astype(np.float32)
    kind, held = rows["kind"].to_numpy(), rows["held_out"].to_numpy()
    other = np.where(rows["person"].isin(["", PERSONS[0]]), "", OTHER_PERSON)
    group_N = (rows["template"].to_numpy().astype(object) + other).astype(str)
    readout_N, running_N = np.flatnonzero((kind == READOUT) & ~held), np.flatnonzero((kind != READOUT) & ~held)
    rng = np.random.default_rng(0)
    unit_N, weighted_N, means = np.ones(len(rows), np.float32), np.ones(len(rows), np.float32), []
    for name in np.unique(group_N):
        own = np.flatnonzero((group_N == name) & ~held)
        some_ND = acts_ND[np.sort(rng.permutation(own)[:SAMPLE])].astype(np.float32)
        unit_N[group_N == name] = _spread(some_ND, 0.0 if name else 0.01)
        weighted_N[group_N == name] = _spread(some_ND * np.sqrt(weight_D), 0.0 if name else 0.01)
        # The usual person's read-outs and running text; other persons differ by what a latent can learn.
        if not name.endswith(OTHER_PERSON):
            means.append(some_ND.mean(axis=0))
    _, size_K, axes_KD = np.linalg.svd(np.stack(means), full_matrices=False)
    span_KD = axes_KD[size_K > 1e-3 * max(float(size_K[0]), 1e-6)].astype(np.float32)
    held_readout_N, held_running_N = np.flatnonzero((kind == READOUT) & held), np.flatnonzero((kind != READOUT) & held)
    return Pools(
        acts_ND,
        readout_N,
        running_N,
        held_readout_N,
        held_running_N,
        group_N,
        unit_N,
        weight_D,
        weighted_N,
        span_KD,
    )


def load_pools(folder: Path, layer: int, d_model: int, rows: pd.DataFrame, weight_D: Array | None = None) -> Pools:
    """Open a layer of a harvest; the arguments are those of `make_pools`."""
    acts_ND = np.memmap(layer_file(folder, layer), dtype=np.float16, mode="r", shape=(len(rows), d_model))
    return make_pools(acts_ND, rows, weight_D)


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


def _batches(pools: Pools, config: TrainConfig, layer: int, skip: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of varying activations with both units of each row: half of the read-outs name the usual person."""
    others_N = np.char.endswith(pools.group_N[pools.readout_N], OTHER_PERSON)
    parts = [(pools.readout_N[~others_N], 1), (pools.readout_N[others_N], 2), (pools.running_N, 0)]
    half = config.readouts // 2 if len(parts[1][0]) else config.readouts
    sizes = (half, config.readouts - half, config.batch - config.readouts)
    streams = [
        _endless(rows_N, size, [config.seed, layer, number], skip)
        for (rows_N, number), size in zip(parts, sizes, strict=True)
        if size
    ]
    for rows in zip(*streams, strict=False):
        rows_B = np.concatenate(rows)
        units_B2 = np.stack([pools.unit_N[rows_B], pools.weighted_unit_N[rows_B]], axis=1)
        yield torch.from_numpy(pools.varying(rows_B)), torch.from_numpy(units_B2)


# An activation of running text far outside its kind counts as if its square were this multiple of the kind's unit.
OUTLIER = 4.0


# Share of the loss in which dimensions count as much as the model's predictions depend on them.
WEIGHTED_SHARE = 0.3


class _FairLoss:
    """Squared error of each row in units of its population's variance, plain and weighted by dimension.

    A few positions of running text (attention sinks) are hundreds of times longer than the rest and would be all of
    the gradient; their error counts relative to their own square.
    """

    def __init__(self, n_readouts: int, weight_D: torch.Tensor) -> None:
        self.n_readouts = n_readouts
        self.weight_D = weight_D
        self.units_B2 = torch.ones(1, 2)

    def __call__(self, predicted_BD: torch.Tensor, target_BD: torch.Tensor) -> torch.Tensor:
        units_B2 = self.units_B2.to(target_BD.device)
        unit_B1, weighted_B1 = units_B2[:, :1], units_B2[:, 1:]
        far_B1 = torch.clamp(OUTLIER * unit_B1 / target_BD.square().sum(dim=-1, keepdim=True), max=1.0)
        far_B1[: self.n_readouts] = 1.0
        scale_BD = (1 - WEIGHTED_SHARE) / unit_B1 + WEIGHTED_SHARE * self.weight_D.to(target_BD.device) / weighted_B1
        return (predicted_BD - target_BD).square() * (scale_BD * far_B1)


def _new_sae(config: TrainConfig, d_model: int, n_span: int, device: str) -> Any:
    from sae_lens.registry import get_sae_training_class

    sae_class, config_class = get_sae_training_class(pick("architecture", config.architecture, ARCHITECTURES))
    known = config_class.__dataclass_fields__
    options: dict[str, Any] = {"d_in": d_model, "d_sae": config.d_sae, "device": device}
    if "k" in known:
        # Of each sign of an axis of the span one latent fires.
        options["k"] = config.k - n_span
    if "matryoshka_widths" in known:
        options["matryoshka_widths"] = [config.d_sae // 8, config.d_sae // 2, config.d_sae]
    torch.manual_seed(config.seed)
    return sae_class(config_class(**options))


def _directions(pools: Pools, config: TrainConfig, n: int, key: int) -> torch.Tensor:
    """Unit directions of varying activations, [n, d_model]: directions that the data has leave few latents dead."""
    rng = np.random.default_rng([config.seed, key])
    n_ends = round(n * config.readout_share)
    drawn = [rng.choice(pools.readout_N, size=n_ends), rng.choice(pools.running_N, size=n - n_ends)]
    # An activation may lie in the span of the means; a little noise keeps it from being no direction at all.
    noise_ND = rng.normal(scale=1e-3, size=(n, pools.acts_ND.shape[1])).astype(np.float32)
    w_ND = pools.varying(np.concatenate(drawn)) + noise_ND
    return torch.from_numpy(w_ND / np.linalg.norm(w_ND, axis=1, keepdims=True))


def _start_from_data(sae: Any, pools: Pools, config: TrainConfig) -> None:
    """First decoder directions are activations, the encoder is their transpose.

    The encoder is scaled so that the first reconstruction has the least squared error that this start allows.
    """
    w_ND = _directions(pools, config, config.d_sae, 7).to(sae.device)
    with torch.no_grad():
        sae.W_dec.data.copy_(w_ND)
        sae.W_enc.data.copy_(w_ND.T)
        x_BD = next(_batches(pools, config, 0, 0))[0].to(sae.device)
        made_BD = sae.decode(sae.encode(x_BD))
        best = float((made_BD * x_BD).sum() / made_BD.square().sum().clamp(min=1e-6))
        sae.W_enc.data.mul_(max(best, 1e-3))


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
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> Any:
    """Train the dictionary of one layer in scaled coordinates.

    Args:
        pools: the layer's activations.
        layer: block index; a part of the seed.
        config: how to train.
        state: where the training's state is kept every few hundred steps, and found again after a kill.
        device: where the dictionary lives.
        say: receives a line now and then.

    Returns:
        The sae-lens training SAE.

    Raises:
        EmosaeError: if the loss is not finite or explodes; the last good state stays in `state`.
    """
    os.environ.setdefault("WANDB_MODE", "disabled")
    sae = _new_sae(config, pools.acts_ND.shape[1], len(pools.span_KD), device)
    if hasattr(sae.cfg, "aux_loss_coefficient"):
        # Gao et al. 2024 weigh the loss of dead latents by 1/32 of the normalised error.
        sae.cfg.aux_loss_coefficient = 1 / 32 / pools.unit_running
    resumed = state is not None and state.is_file()
    if not resumed:
        _start_from_data(sae, pools, config)
    sae.mse_loss_fn = fair = _FairLoss(config.readouts, torch.from_numpy(pools.weight_D))
    trainer = _trainer(sae, config)
    if state is not None and resumed:
        _load_state(state, trainer, config.batch)
    first, recent, clock = None, 0.0, time.perf_counter()
    begun = trainer.n_training_steps
    for batch_BD, units_B2 in _batches(pools, config, layer, begun):
        if trainer.n_training_steps >= config.steps:
            break
        fair.units_B2 = units_B2
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
def add_span(sae: Any, span_KD: torch.Tensor) -> Any:
    """A copy of a dictionary of varying activations that takes whole ones: two latents for each axis of the span.

    The other latents cannot see the span, so which of them fire does not depend on which population a position is
    from; without that, the constant that sets a template apart would keep the same latents on at every read-out.

    Args:
        sae: an inference SAE of sae-lens.
        span_KD: orthonormal axes.
    """
    config = copy.deepcopy(sae.cfg)
    axes_MD = torch.cat([span_KD, -span_KD]).to(sae.device)
    config.d_sae += len(axes_MD)
    if hasattr(config, "k"):
        config.k += len(span_KD)
    whole = type(sae)(config)
    for name, p in sae.named_parameters():
        value = p.data
        if name == "W_enc":
            value = torch.cat([value - span_KD.T @ (span_KD @ value), axes_MD.T], dim=1)
        elif name == "W_dec":
            rest_FD = value - value @ span_KD.T @ span_KD
            value = torch.cat([rest_FD, axes_MD])
        elif name == "b_dec":
            value = value - value @ span_KD.T @ span_KD
        elif value.shape[0] == sae.cfg.d_sae:
            value = torch.cat([value, value.new_zeros(len(axes_MD))])
        getattr(whole, name).data = value.clone().contiguous()
    return whole


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
    key = sha256_text(lm.fingerprint, recipe_sum, json.dumps(asdict(config), sort_keys=True))
    made: list[Path] = []
    for at in range(0, len(chosen), size):
        group = chosen[at : at + size]
        paths = [out / f"layer_{layer:02d}" for layer in group]
        if all(_is_done(path, key) for path in paths):
            say(f"layers {group[0]} to {group[-1]}: up to date")
            continue
        acts = work / f"activations_{group[0]:02d}_{group[-1]:02d}"
        _require_room(lm, items, work, group, acts)
        rows = harvest(lm, items, acts, layers=group, say=say)
        scaling = np.load(acts / "scaling.npz")
        weight_LD = sensitivity(lm, items, group)
        for i, (layer, path) in enumerate(zip(group, paths, strict=True)):
            if _is_done(path, key):
                say(f"layer {layer}: up to date")
                continue
            pools = load_pools(acts, layer, lm.d_model, rows, weight_LD[i])
            # The seed is in the name: two seeds may share a work folder and its activations.
            state = work / f"state_{layer:02d}_{key[:12]}.safetensors"
            sae = train_layer(pools, layer, config, state=state, device=lm.device, say=say)
            metadata = {
                "model_name": lm.profile.base,
                "model_fingerprint": lm.fingerprint,
                "hook_name": f"blocks.{layer}.hook_resid_post",
                "training_key": key,
                "training": asdict(config) | {"recipe_sha256": recipe_sum},
            }
            mean_D, scale = torch.from_numpy(scaling["mean_LD"][i]), float(scaling["scale_L"][i])
            facts = finish_layer(sae, pools, mean_D, scale, path, metadata)
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
        Features kept and pruned, and share of variance explained at read-outs (within populations) and in text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        plain = _inference(sae, Path(scratch))
    rng = np.random.default_rng(0)
    plain = add_span(plain, torch.from_numpy(pools.span_KD))
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
        groups = pools.group_N[held]
        share, active, _ = explained(rounded, raw_ND, groups)
        facts |= {f"{kind}_variance": share, f"{kind}_l0": active, f"{kind}_positions": len(held)}
    save_dictionary(smaller, path, dict(metadata) | {"held_out_mix": facts})
    return facts
