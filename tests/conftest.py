"""Shared fixtures: the embedded models, loaded once, and tiny random models of every supported family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch

from emosae_utils.models import LM, ModelProfile, load_model

TEXTS = [
    "The neighbour parked across my drive again and laughed when I asked him to move.",
    "We heard the ice crack.",
    "My grandmother's chair is still by the window, and nobody sits in it.",
    "The parcel held a letter I had posted to myself in 1998, with somebody else's answer in it.",
    "There was a hair baked into the bread, and another one under it.",
    "She got the place at the school she had wanted since she was six, and we danced in the kitchen until midnight.",
    "The lift stopped.",
]


@pytest.fixture(scope="session")
def smollm() -> LM:
    return load_model("smollm2-135m", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def gemma() -> LM:
    return load_model("gemma-3-270m", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def events() -> pd.DataFrame:
    return pd.DataFrame({"row_id": [f"event/{i}" for i in range(len(TEXTS))], "text": TEXTS})


def _tiny_config(family: str, vocab: int) -> Any:
    from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig

    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "pad_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "llama":
        return LlamaConfig(**sizes)
    # A window shorter than the prompts, so that sliding layers really slide.
    kinds = ["sliding_attention", "full_attention"] * 2
    if family == "gemma2":
        return Gemma2Config(**sizes, sliding_window=12, layer_types=kinds, final_logit_softcapping=5.0)
    return Gemma3TextConfig(**sizes, sliding_window=12, layer_types=kinds)


@pytest.fixture(scope="session")
def tiny(smollm: LM) -> Callable[[str], LM]:
    """Random models of a family by name, with SmolLM2's tokenizer: small, but every code path is the real one."""
    from transformers import AutoModelForCausalLM

    made: dict[str, LM] = {}

    def make(family: str) -> LM:
        if family not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(_tiny_config(family, len(smollm.tokenizer)))
            # Weights larger than the default initialisation, so that attention to the right places matters.
            for parameter in model.parameters():
                parameter.data = torch.randn_like(parameter) * 0.15
            profile = ModelProfile(name=f"tiny-{family}", source="folder", base="memory")
            made[family] = LM(profile, model.eval().requires_grad_(False), smollm.tokenizer, "cpu", "float32", "tiny")
        return made[family]

    return make
