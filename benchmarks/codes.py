"""Reading the codes of every layer beside the plain forward passes of the same prompts, and codes read back from disk.

Run `python benchmarks/codes.py [MODEL [DICTIONARIES [PROMPTS]]]`. Prompts have 50 tokens each. They are read in blocks,
each once plainly (no nnsight, no dictionary, the same batches) and once with codes, in turns; prints the total time
with codes divided by the plain one, the median and the range over blocks, and the seconds to read the codes back.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.sparse import vstack

from emosae_utils.codes import Codes, load_codes, read_codes, save_codes
from emosae_utils.data import EMOTIONS, load_corpus
from emosae_utils.models import LM, load_model
from emosae_utils.saes import load_dictionaries
from emosae_utils.scoring import Prompts, _batches, build_prompts

N_TOKENS, N_BLOCKS = 50, 5


def prompts_of_50(lm: LM, n: int) -> Prompts:
    """EmoScenes prompts, each preceded by as much of another text as makes 50 tokens."""
    texts = load_corpus("emoscenes").frame.sample(n, random_state=0, replace=True)
    made = build_prompts(lm, texts)
    filler = [i for ids in made.ids for i in ids]
    ids = tuple((*filler[p : p + N_TOKENS], *own)[-N_TOKENS:] for p, own in enumerate(made.ids))
    return Prompts(ids, made.labels, made.label_ids)


@torch.no_grad()
def plain(lm: LM, prompts: Prompts) -> None:
    for batch in _batches([len(ids) for ids in prompts.ids], lm.profile.batch_tokens, 0):
        tokens_BS = torch.tensor([prompts.ids[i] for i in batch], device=lm.device)
        lm.hf(tokens_BS, use_cache=False, logits_to_keep=1).logits.float().log_softmax(dim=-1)[:, -1].cpu()


def main() -> None:
    lm = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
    dictionaries = load_dictionaries(lm, sys.argv[2] if len(sys.argv) > 2 else "")
    n = int(sys.argv[3]) if len(sys.argv) > 3 else 1000
    prompts, rows = prompts_of_50(lm, n), pd.DataFrame({"emotion": np.resize(EMOTIONS, n)})
    bare, coded, read = [], [], []
    for block in np.array_split(np.arange(n), N_BLOCKS):
        part = Prompts(tuple(prompts.ids[i] for i in block), prompts.labels, prompts.label_ids)
        start = time.perf_counter()
        plain(lm, part)
        middle = time.perf_counter()
        read.append(read_codes(lm, part, dictionaries, rows.iloc[block]))
        bare.append(middle - start)
        coded.append(time.perf_counter() - middle)
    ratios = [b / a for a, b in zip(bare, coded, strict=True)]
    whole = Codes(
        lm.name,
        read[0].layers,
        {layer: vstack([part.by_layer[layer] for part in read], format="csr") for layer in read[0].layers},
        rows,
        prompts.labels,
        np.concatenate([part.scores_PE for part in read]),
    )
    with tempfile.TemporaryDirectory() as folder:
        save_codes(Path(folder) / "codes", whole)
        start = time.perf_counter()
        load_codes(Path(folder) / "codes")
        back = time.perf_counter() - start
        size = sum(p.stat().st_size for p in (Path(folder) / "codes").iterdir())
    sys.stdout.write(
        f"{lm.name}: {n} prompts of {N_TOKENS} tokens, codes of {len(dictionaries)} of {lm.n_layers} layers: "
        f"{sum(coded) / sum(bare):.2f} x the plain passes (median of blocks {statistics.median(ratios):.2f}, "
        f"{min(ratios):.2f} to {max(ratios):.2f}; {sum(bare):.0f} s plain); codes of {len(whole)} prompts, "
        f"{size / 1e6:.1f} MB, read back in {back:.2f} s\n"
    )


if __name__ == "__main__":
    main()
