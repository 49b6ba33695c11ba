"""Exact ablation of every active feature beside the ways it is usually done, in float32 on prompts of about 60 tokens.

Run `python benchmarks/tracing.py [MODEL]`. Uses the shipped dictionaries, or random ones where there are none. The
alternatives get the edit for free (a known direction and activation) and run in alternation with ours, one prompt per
round; printed are medians of three rounds: edits per second of ours divided by those of

- one full nnsight trace per edit,
- one TransformerLens pass with a hook per edit (its bridge around the same weights),
- full passes batched over 16 edits,

the time of ours over that of the bare matrix products of the suffix, how time grows with edits and with prompt length,
memory, the noise floor of three choices of dtype beside the effects, and the agreement of the two estimates. With one
thread (OMP_NUM_THREADS=1) processor time is taken, which a busy machine disturbs less than the time on the wall.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sae_lens import TopKSAE, TopKSAEConfig

from emosae_utils.data import load_corpus
from emosae_utils.models import LM, decoder_layers, load_model
from emosae_utils.saes import Dictionary, available_layers, load_dictionaries
from emosae_utils.scoring import Prompts, build_prompts
from emosae_utils.tracing import (
    Effects,
    ablate_features,
    agreement,
    attribution,
    integrated_gradients,
    noise_floor,
    run_edits,
)

ROUNDS, BATCH, SLOW_EDITS, TOKENS = 3, 16, 3, 60


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    result = function()
    return clock() - start, result


def random_dictionaries(lm: LM, n: int = 1400, k: int = 48) -> dict[int, Dictionary]:
    found = {}
    for layer in range(lm.n_layers):
        sae = TopKSAE(TopKSAEConfig(d_in=lm.d_model, d_sae=n, k=k))
        w_FD = torch.randn(n, lm.d_model, generator=torch.Generator().manual_seed(layer))
        w_FD /= w_FD.norm(dim=1, keepdim=True)
        sae.W_dec.data, sae.W_enc.data = w_FD, w_FD.T.contiguous()
        found[layer] = Dictionary(layer, sae, "random")
    return found


def centred(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(dim=-1, keepdim=True)


class Edits:
    """Some edits of one prompt as plain directions: what the alternatives have to do."""

    def __init__(self, lm: LM, prompts: Prompts, found: Mapping[int, Dictionary], table: Effects, n: int) -> None:
        self.lm, self.inputs = lm, torch.tensor([prompts.ids[0]], device=lm.device)
        self.first = [ids[0] for ids in prompts.label_ids]
        self.at = np.random.default_rng(0).choice(len(table), size=n, replace=False)
        self.layers = table.layer_N[self.at].tolist()
        self.moves_ND = torch.stack(
            [
                -float(table.activation_N[i]) * found[int(table.layer_N[i])].sae.W_dec.detach()[int(table.feature_N[i])]
                for i in self.at
            ]
        )

    @torch.no_grad()
    def nnsight(self) -> torch.Tensor:
        blocks, scores = decoder_layers(self.lm.nn), []
        batch = {"input_ids": self.inputs, "attention_mask": torch.ones_like(self.inputs)}
        for layer, move_D in list(zip(self.layers, self.moves_ND, strict=True))[:SLOW_EDITS]:
            with self.lm.nn.trace(batch, use_cache=False, logits_to_keep=1):
                blocks[layer].output[0, -1] += move_D
                logits_V = self.lm.nn.output.logits[0, -1].save()
            scores.append(centred(logits_V[self.first]))
        return torch.stack(scores)

    @torch.no_grad()
    def lens(self, bridge: Any) -> torch.Tensor:
        scores = []
        for layer, move_D in list(zip(self.layers, self.moves_ND, strict=True))[:SLOW_EDITS]:

            def edit(resid_BSD: torch.Tensor, hook: Any, move_D: torch.Tensor = move_D) -> torch.Tensor:
                resid_BSD = resid_BSD.clone()
                resid_BSD[0, -1] += move_D
                return resid_BSD

            logits = bridge.run_with_hooks(self.inputs, fwd_hooks=[(f"blocks.{layer}.hook_out", edit)])
            scores.append(centred(logits[0, -1, self.first]))
        return torch.stack(scores)

    @torch.no_grad()
    def batched(self) -> torch.Tensor:
        handles = []
        for layer in set(self.layers):
            rows = [i for i, x in enumerate(self.layers) if x == layer]

            def edit(module: Any, inputs: Any, output: Any, rows: list[int] = rows) -> Any:
                output[rows, -1] += self.moves_ND[rows]
                return output

            handles.append(decoder_layers(self.lm.hf)[layer].register_forward_hook(edit))
        try:
            logits = self.lm.hf(self.inputs.repeat(len(self.layers), 1), use_cache=False, logits_to_keep=1).logits
        finally:
            for handle in handles:
                handle.remove()
        return centred(logits[:, -1, self.first])


@torch.no_grad()
def products(lm: LM, table: Effects) -> None:
    """The matrix products that no exact method can avoid: every edited row through every later block."""
    for layer, block in enumerate(decoder_layers(lm.hf)):
        n = int((table.layer_N < layer).sum())
        for module in block.modules():
            if isinstance(module, torch.nn.Linear) and n:
                torch.nn.functional.linear(torch.ones(n, module.in_features), module.weight)


def lens_bridge(lm: LM) -> Any:
    """TransformerLens around a second copy of the weights, since it rebuilds the modules; None if it cannot."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from transformer_lens.model_bridge import TransformerBridge

        copy = load_model(lm.name, dtype="float32", device=lm.device)
        return TransformerBridge.boot_transformers(
            lm.profile.base, hf_model=copy.hf, tokenizer=copy.tokenizer, device=lm.device
        )
    except Exception as error:  # an optional comparison, and its library fails in many ways
        say(f"TransformerLens left out: {str(error).splitlines()[0]}")
        return None


def only(prompts: Prompts, p: int) -> Prompts:
    return replace(prompts, ids=prompts.ids[p : p + 1])


def speed(lm: LM, prompts: Prompts, found: Mapping[int, Dictionary], bridge: Any) -> list[Effects]:
    rates: dict[str, list[float]] = {"nnsight": [], "TransformerLens": [], "batched": []}
    bounds, tables, gap, seconds = [], [], 0.0, []
    for p in range(ROUNDS):
        one = only(prompts, p)
        ours, table = timed(lambda one=one: ablate_features(lm, one, found))
        edits = Edits(lm, one, found, table, BATCH)
        ways: list[tuple[str, Callable[[], torch.Tensor]]] = [("nnsight", edits.nnsight), ("batched", edits.batched)]
        if bridge is not None:
            ways.append(("TransformerLens", lambda edits=edits: edits.lens(bridge)))
        for name, way in ways:
            took, scores_NE = timed(way)
            rates[name].append(len(table) / ours * took / len(scores_NE))
            gap = max(gap, float(np.abs(scores_NE.numpy() - table.scores_NE[edits.at[: len(scores_NE)]]).max()))
        bound, _ = timed(lambda table=table: products(lm, table))
        bounds.append(ours / bound)
        seconds.append(ours)
        tables.append(table)
    for name, ratio in rates.items():
        if ratio:
            spread = f"{min(ratio):.0f} to {max(ratio):.0f}"
            say(f"edits per second, ours / {name}: {statistics.median(ratio):.0f} x ({spread})")
    say(f"largest difference from the alternatives: {gap:.1e} nats")
    say(f"time, prefix included, over the bare matrix products of the suffix: {statistics.median(bounds):.2f} x")
    minutes = 600 * statistics.median(seconds) / 60
    say(
        f"{len(tables[0])} edits a prompt; 600 such prompts would take {minutes:.0f} min "
        f"on this machine with {torch.get_num_threads()} thread(s)"
    )
    return tables


def growth(lm: LM, prompts: Prompts, found: Mapping[int, Dictionary], table: Effects) -> None:
    one, line, base = only(prompts, 0), [], 0.0
    places = list(zip(table.layer_N.tolist(), table.feature_N.tolist(), strict=True))
    rows: list[Any] = [(layer, f, "scale", factor) for factor in (0.0, 0.5) for layer, f in places]
    for n in (len(places), len(places) // 4, len(places) // 2, 2 * len(places)):
        # Spread over the layers as the whole is.
        took, _ = timed(lambda n=n: run_edits(lm, one, rows[:: len(rows) // n][:n], found))
        base = base or took
        line.append((n, took / base))
    say("time by edits, relative, prefix included: " + ", ".join(f"{n} edits {x:.2f}" for n, x in sorted(line)))
    times, base = [], 0.0
    for length in (60, 30, 120, 240):
        ids = (one.ids[0][0], *(one.ids[0][1:] * 9)[: length - 1])
        took, part = timed(lambda ids=ids: ablate_features(lm, replace(one, ids=(ids,)), found))
        base = base or took / len(part)
        times.append((length, took / len(part) / base))
    say("time per edit by prompt length, the same: " + ", ".join(f"{n} tokens {x:.2f}" for n, x in sorted(times)))


def main() -> None:
    lm = load_model(sys.argv[1] if len(sys.argv) > 1 else "gemma-3-270m", dtype="float32")
    shipped = set(available_layers(lm)) == set(range(lm.n_layers))
    found = load_dictionaries(lm) if shipped else random_dictionaries(lm)
    texts = load_corpus("emoscenes").frame.sample(300, random_state=0)
    prompts = build_prompts(lm, texts)
    near = sorted(prompts.ids, key=lambda ids: abs(len(ids) - TOKENS))[:ROUNDS]
    prompts = replace(prompts, ids=tuple(near))
    tokens = ", ".join(str(len(ids)) for ids in near)
    say(f"{lm.name}, prompts of {tokens} tokens, {'shipped' if shipped else 'random'} dictionaries")
    ablate_features(lm, only(prompts, 0), found, layers=[lm.n_layers - 2])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    bridge = lens_bridge(lm)
    tables = speed(lm, prompts, found, bridge)
    del bridge
    say(f"peak memory of the engine's process before the alternatives: {memory:.1f} GB")
    growth(lm, prompts, found, tables[0])
    effects = np.abs(tables[0].effects_NE)
    say(f"effects on label scores: median {np.median(effects):.1e}, 95 % {np.percentile(effects, 95):.1e} nats")
    say(str(noise_floor(lm, only(prompts, 0))))
    half = load_model(lm.name, dtype="bfloat16")
    for dtype in ("float32", "bfloat16"):
        say(str(noise_floor(half, only(prompts, 0), dtype=dtype)))
    one = only(prompts, 0)
    for name, estimate in (("attribution", attribution), ("integrated gradients", integrated_gradients)):
        exact_time, exact = timed(lambda: ablate_features(lm, one, found))
        took, estimated = timed(lambda estimate=estimate: estimate(lm, one, found))
        row = agreement(exact, estimated).iloc[0]
        say(
            f"{name}: rank correlation {row['spearman']:.2f}, top-20 overlap {row['overlap']:.2f}, "
            f"{exact_time / took:.1f} x the speed of exact"
        )


if __name__ == "__main__":
    main()
