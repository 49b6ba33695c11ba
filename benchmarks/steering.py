"""Steered label scores, and slopes by gains, beside what one would write with hooks and full passes.

Run `python benchmarks/steering.py [MODEL [PROMPTS [STEERINGS]]]`. Each steering turns 200 features, drawn at random
from those active, over all layers. All ways act at the read-out position on the same prompts; prints ratios of times in
one run, reading the prompts included, and how far the scores are apart.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from emosae_utils import steering
from emosae_utils.data import load_corpus
from emosae_utils.models import LM, decoder_layers, load_model
from emosae_utils.repair import active_units
from emosae_utils.saes import Dictionary, load_dictionaries
from emosae_utils.scoring import Prompts, build_prompts
from emosae_utils.steering import Steering

N_UNITS = 200


def _hooked(
    lm: LM, ids: tuple[int, ...], gains: dict[int, torch.Tensor], dictionaries: dict[int, Dictionary]
) -> torch.Tensor:
    """Label logits of one full pass with a hook on every block; gradients pass through."""
    handles = []
    for layer, less_one_F in gains.items():

        def move(
            module: object, inputs: object, output: torch.Tensor, layer: int = layer, less: torch.Tensor = less_one_F
        ) -> torch.Tensor:
            sae = dictionaries[layer].sae
            codes_1F = sae.encode(output[:, -1].float())
            moved_1D = output[:, -1] + (less * codes_1F) @ sae.W_dec
            return torch.cat([output[:, :-1], moved_1D[:, None]], dim=1)

        handles.append(decoder_layers(lm.hf)[layer].register_forward_hook(move))
    try:
        return lm.hf(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, 0]
    finally:
        for handle in handles:
            handle.remove()


def _labels(logits_V: torch.Tensor, prompts: Prompts) -> torch.Tensor:
    scores_E = logits_V[[x[0] for x in prompts.label_ids]].double()
    return scores_E - scores_E.mean()


def main() -> None:
    lm = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
    n_prompts, n_steerings = (int(sys.argv[i]) if len(sys.argv) > i else d for i, d in ((2, 12), (3, 20)))
    dictionaries = load_dictionaries(lm, check=False)
    prompts = build_prompts(lm, load_corpus("emoscenes").frame.sample(n_prompts, random_state=0))
    basis, rng = steering.feature_basis(dictionaries), np.random.default_rng(0)
    units, _ = active_units(dictionaries, steering.prepare(lm, prompts))
    made = []
    for _ in range(n_steerings):
        chosen = np.sort(rng.choice(len(units), N_UNITS, replace=False))
        some = steering.Units(units.layer_U[chosen], units.unit_U[chosen])
        made.append(Steering(lm.name, basis, some.gains(basis, rng.uniform(-1, 1, N_UNITS))))

    start = time.perf_counter()
    ready = steering.prepare(lm, prompts)
    ours_RPE = steering.steered_scores(lm, ready, made, dictionaries)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    theirs_RPE = np.empty_like(ours_RPE)
    with torch.no_grad():
        for r, one in enumerate(made):
            gains = {x: torch.from_numpy(g - 1).float() for x, g in one.gains.items()}
            for p, ids in enumerate(prompts.ids):
                theirs_RPE[r, p] = _labels(_hooked(lm, ids, gains, dictionaries), prompts).numpy()
    hooks = time.perf_counter() - start

    start = time.perf_counter()
    steering.tangent(steering.prepare(lm, prompts), basis, units, dictionaries)
    slopes = time.perf_counter() - start
    start = time.perf_counter()
    for ids in prompts.ids:
        leaves = {x: torch.zeros(len(bank), requires_grad=True) for x, bank in basis.items()}
        scores_E = _labels(_hooked(lm, ids, leaves, dictionaries), prompts)
        for e in range(len(scores_E)):
            torch.autograd.grad(scores_E[e], list(leaves.values()), retain_graph=True)
    full_slopes = time.perf_counter() - start
    width, gap = np.mean([len(x) for x in prompts.ids]), np.abs(ours_RPE - theirs_RPE).max()
    sys.stdout.write(
        f"{lm.name}, {n_prompts} prompts of {width:.0f} tokens: {n_steerings} steerings {hooks / ours:.1f} x as fast "
        f"as hooks and full passes (largest difference of a score {gap:.1e} nats); slopes of all labels by "
        f"{len(units)} gains {full_slopes / slopes:.1f} x as fast as full passes\n"
    )


if __name__ == "__main__":
    main()
