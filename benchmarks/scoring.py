"""Label scoring beside the loop a user would write: one forward pass per prompt, no batching, no shared prefix.

Run `python benchmarks/scoring.py [MODEL]`. Prints the time of the loop divided by ours for zero-shot and for few-shot
prompts, the median of three rounds in alternation, and the largest difference between the two scores in nats.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from emosae_utils.data import load_corpus
from emosae_utils.models import LM, load_model
from emosae_utils.scoring import Prompts, build_prompts, draw_exemplars, read_out, without


def loop(lm: LM, prompts: Prompts) -> np.ndarray:
    """One pass per prompt; labels here have one token each."""
    first = [ids[0] for ids in prompts.label_ids]
    rows = []
    with torch.no_grad():
        for ids in prompts.ids:
            logits = lm.hf(torch.tensor([ids], device=lm.device)).logits[0, -1]
            rows.append(torch.log_softmax(logits, dim=-1)[first].cpu().numpy())
    return np.array(rows)


def timed(function: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def main() -> None:
    lm = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
    frame = load_corpus("emoscenes").frame
    shown = draw_exemplars(frame, 1, seed=0)
    asked = without(frame, shown).sample(48, random_state=0)
    for name, exemplars in (("zero-shot", None), ("few-shot", shown)):
        prompts = build_prompts(lm, asked, exemplars=exemplars)
        ratios, gap = [], 0.0
        for _ in range(3):
            slow, plain = timed(lambda prompts=prompts: loop(lm, prompts))
            fast, ours = timed(lambda prompts=prompts: read_out(lm, prompts).scores_PE)
            ratios.append(slow / fast)
            gap = max(gap, float(np.abs(plain - ours).max()))
        tokens = np.mean([len(ids) for ids in prompts.ids])
        line = f"{lm.name} {name}: {tokens:.0f} tokens a prompt, {statistics.median(ratios):.1f} x the loop's speed"
        sys.stdout.write(f"{line}, largest difference {gap:.1e} nats\n")


if __name__ == "__main__":
    main()
