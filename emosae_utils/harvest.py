"""Residual streams of many prompts in few tokens: prompts packed as a trie, activations streamed to disk.

Prompts that share a beginning are computed once up to where they part. A *pack* is a trie of token sequences laid out
as one row: each node attends to its ancestors only and has its depth as position, so every position holds what it
would hold in its own sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from emosae_utils.files import (
    EmosaeError,
    atomic_file,
    read_json,
    require_space,
    sha256_text,
    write_json,
    write_table,
)
from emosae_utils.mix import Item
from emosae_utils.models import LM, decoder_layers

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Pack:
    """A trie of token sequences as one row.

    Attributes:
        tokens_S: token of each node, parents before children.
        parent_S: index of each node's parent; -1 for a root.
        ends: for each sequence, the node of its last token.
    """

    tokens_S: Array
    parent_S: Array
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens_S)

    def depths(self) -> Array:
        """Position of each node in its own sequences, [nodes]."""
        depth_S = np.zeros(len(self), dtype=np.int64)
        for i, parent in enumerate(self.parent_S):
            if parent >= 0:
                depth_S[i] = depth_S[parent] + 1
        return depth_S

    def ancestors(self) -> Array:
        """Which nodes each node sees, itself included, [nodes, nodes]."""
        seen_SS = np.eye(len(self), dtype=bool)
        for i, parent in enumerate(self.parent_S):
            if parent >= 0:
                seen_SS[i] |= seen_SS[parent]
        return seen_SS


def pack_sequences(sequences: Sequence[Sequence[int]]) -> Pack:
    """Lay token sequences out as one trie."""
    tokens: list[int] = []
    parents: list[int] = []
    children: dict[tuple[int, int], int] = {}
    ends = []
    for ids in sequences:
        node = -1
        for token in ids:
            key = (node, token)
            if key not in children:
                children[key] = len(tokens)
                tokens.append(token)
                parents.append(node)
            node = children[key]
        ends.append(node)
    return Pack(np.array(tokens, dtype=np.int64), np.array(parents, dtype=np.int64), tuple(ends))


def _masks(lm: LM, packs: Sequence[Pack], width: int) -> tuple[Any, torch.Tensor]:
    """Attention masks of a batch of packs, and positions [batch, width].

    A model whose layers slide gets one mask per kind of layer.
    """
    seen_BSS = np.zeros((len(packs), width, width), dtype=bool)
    position_BS = np.zeros((len(packs), width), dtype=np.int64)
    for b, pack in enumerate(packs):
        seen_BSS[b, : len(pack), : len(pack)] = pack.ancestors()
        position_BS[b, : len(pack)] = pack.depths()
        # Padding sees itself: a row of nothing but masks would be NaN.
        pad = np.arange(len(pack), width)
        seen_BSS[b, pad, pad] = True

    def additive(allowed_BSS: Array) -> torch.Tensor:
        mask = torch.zeros(allowed_BSS.shape, dtype=getattr(torch, lm.dtype))
        return mask.masked_fill_(torch.from_numpy(~allowed_BSS), torch.finfo(mask.dtype).min)[:, None].to(lm.device)

    positions = torch.from_numpy(position_BS).to(lm.device)
    config = lm.hf.config.get_text_config()
    full = additive(seen_BSS)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return full, positions
    window = int(config.sliding_window)
    near_BSS = position_BS[:, :, None] - position_BS[:, None, :] < window
    sliding = additive(seen_BSS & near_BSS) if int(position_BS.max()) >= window else full
    return {"full_attention": full, "sliding_attention": sliding}, positions


def read_packs(lm: LM, packs: Sequence[Pack], keep: Sequence[Sequence[int]], layers: Sequence[int]) -> torch.Tensor:
    """Residual stream after `layers` at the nodes to keep, [layers, kept nodes, d_model], in the packs' order."""
    import nnsight

    width = max(len(p) for p in packs)
    pad = int(lm.tokenizer.pad_token_id or 0)
    tokens_BS = np.full((len(packs), width), pad, dtype=np.int64)
    for b, pack in enumerate(packs):
        tokens_BS[b, : len(pack)] = pack.tokens_S
    mask, positions_BS = _masks(lm, packs, width)
    rows = torch.tensor([b for b, nodes in enumerate(keep) for _ in nodes], device=lm.device)
    cols = torch.tensor([n for nodes in keep for n in nodes], device=lm.device)
    options = {
        "input_ids": torch.from_numpy(tokens_BS).to(lm.device),
        "attention_mask": mask,
        "position_ids": positions_BS,
        "use_cache": False,
        "logits_to_keep": 1,
    }
    # The plain wrapper: the one for language models would take the mask for a padding mask.
    model = nnsight.NNsight(lm.hf)
    blocks = decoder_layers(model)
    with torch.no_grad(), model.trace(**options):
        read = []
        for layer in range(max(layers) + 1):
            if layer in layers:
                read.append(blocks[layer].output[rows, cols])
        read_LKD = nnsight.save(torch.stack(read))
    return read_LKD


# Items are laid out in windows of this many: inside one, prompts with the same beginning are brought together.
WINDOW = 512
PACK_NODES = 192
# Of the text inside prompts this share of positions is kept, as running text of short context.
TEXT_SHARE = 0.12
READOUT, RUNNING, IN_PROMPT = 1, 0, 2


@dataclass(frozen=True)
class Planned:
    """One window of the harvest: packs in batches, the nodes to keep, and what each kept row is."""

    batches: tuple[tuple[Pack, ...], ...]
    keep: tuple[tuple[tuple[int, ...], ...], ...]
    rows: pd.DataFrame


# What a kept row is: kind, template, person, source, held out.
Fact = tuple[int, str, str, str, bool]


def _plan(items: Sequence[Item], rng: np.random.Generator, batch_tokens: int) -> Planned:
    """Pack one window of items and choose its batches; deterministic in the items and the generator."""
    ordered = sorted(items, key=lambda item: item.ids[0])
    groups: list[list[Item]] = []
    nodes = 0
    for item in ordered:
        size = sum(len(ids) for ids in item.ids[:1]) + 8 * (len(item.ids) - 1)
        prompt = bool(item.templates[0])
        if groups and prompt and groups[-1][0].templates[0] and nodes + size <= PACK_NODES:
            groups[-1].append(item)
            nodes += size
        else:
            groups.append([item])
            nodes = size
    made: list[tuple[Pack, tuple[int, ...], list[Fact]]] = []
    for group in groups:
        pack = pack_sequences([ids for item in group for ids in item.ids])
        depth_S = pack.depths()
        nodes_kept: list[int] = []
        facts: list[Fact] = []
        if not group[0].templates[0]:
            inside = np.flatnonzero(depth_S > 0)
            nodes_kept += inside.tolist()
            facts += [(RUNNING, "", "", group[0].source, group[0].held_out)] * len(inside)
        else:
            owner = [
                (item, name, person)
                for item in group
                for name, person in zip(item.templates, item.persons, strict=True)
            ]
            for end, (item, name, person) in zip(pack.ends, owner, strict=True):
                nodes_kept.append(end)
                facts.append((READOUT, name, person, item.source, item.held_out))
            if not any(item.held_out for item in group):
                inside = np.setdiff1d(np.flatnonzero(depth_S > 0), pack.ends)
                inside = inside[rng.random(len(inside)) < TEXT_SHARE]
                nodes_kept += inside.tolist()
                facts += [(IN_PROMPT, "", "", "prompts", False)] * len(inside)
        made.append((pack, tuple(nodes_kept), facts))
    made.sort(key=lambda entry: len(entry[0]))
    batches: list[list[tuple[Pack, tuple[int, ...], list[Fact]]]] = []
    for entry in made:
        # Sorted by length, so the newcomer is the widest.
        if batches and (len(batches[-1]) + 1) * len(entry[0]) <= batch_tokens:
            batches[-1].append(entry)
        else:
            batches.append([entry])
    rows = pd.DataFrame(
        [fact for batch in batches for entry in batch for fact in entry[2]],
        columns=["kind", "template", "person", "source", "held_out"],
    )
    return Planned(
        tuple(tuple(e[0] for e in batch) for batch in batches),
        tuple(tuple(e[1] for e in batch) for batch in batches),
        rows,
    )


def plan_windows(items: Sequence[Item], *, seed: int, batch_tokens: int) -> list[Planned]:
    """Every window of a harvest."""
    rng = np.random.default_rng(seed)
    return [_plan(items[at : at + WINDOW], rng, batch_tokens) for at in range(0, len(items), WINDOW)]


def count_rows(items: Sequence[Item]) -> int:
    """How many positions a harvest of these items will keep."""
    return sum(len(window.rows) for window in plan_windows(items, seed=0, batch_tokens=2048))


def _read_window(lm: LM, window: Planned, layers: Sequence[int]) -> torch.Tensor:
    parts = [read_packs(lm, p, k, layers).float().cpu() for p, k in zip(window.batches, window.keep, strict=True)]
    return torch.cat(parts, dim=1)


def layer_file(folder: Path, layer: int) -> Path:
    """Where a harvest keeps the residuals of a layer."""
    return folder / f"layer_{layer:02d}.f16"


def harvest(
    lm: LM,
    items: Sequence[Item],
    folder: Path,
    *,
    layers: Sequence[int],
    seed: int = 0,
    batch_tokens: int = 2048,
    say: Callable[[str], None] = lambda line: None,
) -> pd.DataFrame:
    """Write the residual stream at the kept positions of all items to `folder`, one file a layer.

    Rows are stored as float16 after subtracting a mean and dividing by a scale per layer, both estimated on the first
    window and written to `scaling.npz`: (x - mean) / scale has a mean square of about one per dimension. An interrupted
    harvest goes on where its last whole window ended.

    Returns:
        What each row is: kind, template, person, source, held_out.

    Raises:
        EmosaeError: if the disk is too small or activations are not finite.
    """
    windows = plan_windows(items, seed=seed, batch_tokens=batch_tokens)
    rows = pd.concat([w.rows for w in windows], ignore_index=True)
    folder.mkdir(parents=True, exist_ok=True)
    state_path, scaling_path = folder / "state.json", folder / "scaling.npz"
    key = sha256_text(lm.fingerprint, lm.dtype, repr(list(layers)), sha256_text(*(repr(i.ids) for i in items)))
    state = read_json(state_path) if state_path.is_file() else {}
    if state.get("key") != key:
        require_space(folder, 2 * len(rows) * len(layers) * lm.d_model)
        state = {"key": key, "windows": 0, "rows": 0}
        first_LKD = _read_window(lm, windows[0], layers)
        mean_LD = first_LKD.mean(dim=1)
        scale_L = (first_LKD - mean_LD[:, None]).square().mean(dim=(1, 2)).sqrt()
        if not torch.isfinite(scale_L).all():
            raise EmosaeError(f"{lm.name} gives residuals that are not finite in {lm.dtype}; use dtype='float32'")
        with atomic_file(scaling_path) as temporary:
            np.savez(temporary, mean_LD=mean_LD.numpy(), scale_L=scale_L.numpy(), layers=np.array(layers))
        write_table(folder / "rows.parquet", rows)
        for layer in layers:
            with layer_file(folder, layer).open("wb") as file:
                file.truncate(2 * len(rows) * lm.d_model)
        write_json(state_path, state)
    scaling = np.load(scaling_path)
    mean_LD, scale_L = torch.from_numpy(scaling["mean_LD"]), torch.from_numpy(scaling["scale_L"])
    started, done_before = time.perf_counter(), state["windows"]
    for number in range(state["windows"], len(windows)):
        acts_LKD = (_read_window(lm, windows[number], layers) - mean_LD[:, None]) / scale_L[:, None, None]
        if not torch.isfinite(acts_LKD).all():
            raise EmosaeError(f"{lm.name} gives residuals that are not finite in {lm.dtype}; use dtype='float32'")
        start, stop = state["rows"], state["rows"] + acts_LKD.shape[1]
        for layer, acts_KD in zip(layers, acts_LKD.clamp_(-6e4, 6e4).half().numpy(), strict=True):
            with layer_file(folder, layer).open("r+b") as file:
                file.seek(2 * start * lm.d_model)
                file.write(acts_KD.tobytes())
        state |= {"windows": number + 1, "rows": stop}
        write_json(state_path, state)
        left = (time.perf_counter() - started) / (number + 1 - done_before) * (len(windows) - number - 1)
        say(f"{lm.name}: {number + 1} of {len(windows)} windows read, about {left / 60:.0f} min left")
    return rows


SENSITIVITY_TEXTS = 16


def sensitivity(lm: LM, items: Sequence[Item], layers: Sequence[int], seed: int = 0) -> Array:
    """How much next-token predictions depend on each dimension of the residual stream, [layers, d_model], mean 1.

    The diagonal of the Fisher information: squared gradients of the log-probability of tokens that the model itself
    draws, averaged over the positions of a few running texts of the mix but their first.
    """
    texts = [item.ids[0] for item in items if not item.templates[0] and not item.held_out][:SENSITIVITY_TEXTS]
    generator = torch.Generator().manual_seed(seed)
    total_LD = torch.zeros(len(layers), lm.d_model)
    streams: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not hidden.requires_grad:
            # The weights are frozen, so the first stream is where gradients begin.
            hidden.requires_grad_(True)
        hidden.retain_grad()
        streams.append(hidden)

    blocks = decoder_layers(lm.hf)
    for ids in texts:
        streams.clear()
        hooks = [blocks[layer].register_forward_hook(keep) for layer in layers]
        try:
            with torch.enable_grad():
                logits_SV = lm.hf(torch.tensor([list(ids)], device=lm.device), use_cache=False).logits[0].float()
                drawn_S1 = torch.multinomial(logits_SV.detach().softmax(dim=-1).cpu(), 1, generator=generator)
                total = torch.log_softmax(logits_SV, dim=-1).gather(1, drawn_S1.to(lm.device)).sum()
                torch.autograd.backward(total)
        finally:
            for hook in hooks:
                hook.remove()
        for i, stream in enumerate(streams):
            assert stream.grad is not None
            total_LD[i] += stream.grad[0, 1:].float().square().sum(dim=0).cpu()
    weight_LD: Array = (total_LD / total_LD.mean(dim=1, keepdim=True).clamp(min=1e-30)).numpy()
    return weight_LD
