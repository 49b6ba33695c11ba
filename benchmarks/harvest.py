"""Reading the residual stream of many emotion prompts, packed as tries, beside one padded pass per batch of prompts.

Run `python benchmarks/harvest.py [MODEL]`. Prints tokens per prompt, the time of the padded batches divided by ours
(median of three rounds in alternation), and the largest relative difference between the two sets of residuals.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
import torch

from emosae_utils.data import load_corpus
from emosae_utils.harvest import pack_sequences, read_packs
from emosae_utils.mix import prompts_of, sentences
from emosae_utils.models import load_model
from emosae_utils.scoring import Prompts, read_out


def main() -> None:
    lm = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
    rng = np.random.default_rng(0)
    texts = load_corpus("emoscenes").frame.sample(12, random_state=0)["text"]
    groups = [[text for _, _, text in prompts_of(sentences(t), ["feeling", "sentence"], rng)] for t in texts]
    ids = [[tuple(x) for x in lm.tokenizer(group)["input_ids"]] for group in groups]
    packs = sorted((pack_sequences(group) for group in ids), key=len)
    flat = tuple(x for group in ids for x in group)
    prompts = Prompts(flat, ("a", "b"), ((1,), (2,)))
    layers = list(range(lm.n_layers))
    ratios = []
    for _ in range(3):
        start = time.perf_counter()
        plain = read_out(lm, prompts, layers=layers).resid_PLD
        middle = time.perf_counter()
        packed_LKD = read_packs(lm, packs, [p.ends for p in packs], layers)
        ratios.append((middle - start) / (time.perf_counter() - middle))
    order = {pack.tokens_S.tobytes(): i for i, pack in enumerate(packs)}
    starts = np.cumsum([0, *(len(p.ends) for p in packs)])
    at = [starts[order[pack_sequences(g).tokens_S.tobytes()]] + i for g in ids for i in range(len(g))]
    assert plain is not None
    expected_LKD = torch.from_numpy(plain).transpose(0, 1)
    gap = ((packed_LKD[:, at] - expected_LKD).norm(dim=-1) / expected_LKD.norm(dim=-1)).max()
    sys.stdout.write(
        f"{lm.name}: {len(flat)} prompts of {np.mean([len(x) for x in flat]):.0f} tokens, "
        f"{sum(map(len, packs)) / len(flat):.1f} packed; {statistics.median(ratios):.1f} x as fast as padded batches, "
        f"largest relative difference {gap:.1e}\n"
    )


if __name__ == "__main__":
    main()
