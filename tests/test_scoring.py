"""Scores must not depend on batch size, padding, order or caches, and must cover whole label strings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from emosae_utils import scoring
from emosae_utils.data import EMOTIONS
from emosae_utils.files import EmosaeError
from emosae_utils.models import LM, decoder_layers
from emosae_utils.scoring import build_prompts, read_out

TOLERANCE = 1e-3
FAMILIES = ["llama", "gemma2", "gemma3"]


def by_hand(lm: LM, prompts: scoring.Prompts) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """The definition, one row and one label at a time: no batch, no padding, no cache."""
    scores = np.zeros((len(prompts), len(prompts.labels)))
    for p, ids in enumerate(prompts.ids):
        for e, label in enumerate(prompts.label_ids):
            with torch.no_grad():
                logits = lm.hf(torch.tensor([[*ids, *label]])).logits[0].double()
            logp = torch.log_softmax(logits, dim=-1)
            scores[p, e] = sum(float(logp[len(ids) - 1 + i, token]) for i, token in enumerate(label))
    return scores


@pytest.mark.parametrize("name", ["smollm", "gemma"])
def test_batch_1_and_batch_32_give_the_same_numbers(
    name: str, events: pd.DataFrame, request: pytest.FixtureRequest
) -> None:
    lm: LM = request.getfixturevalue(name)
    many = pd.concat([events] * 5, ignore_index=True).head(32)
    prompts = build_prompts(lm, many)
    layers = [0, lm.n_layers - 1]
    together = read_out(lm, prompts, layers=layers, batch_tokens=10**6)
    alone = read_out(lm, prompts, layers=layers, batch_tokens=1)
    assert np.abs(together.scores_PE - alone.scores_PE).max() < TOLERANCE
    assert together.resid_PLD is not None and alone.resid_PLD is not None
    scale = np.abs(alone.resid_PLD).max(axis=(0, 2), keepdims=True)
    assert (np.abs(together.resid_PLD - alone.resid_PLD) / scale).max() < 1e-4


@pytest.mark.parametrize("name", ["smollm", "gemma"])
def test_scores_are_the_definition(name: str, events: pd.DataFrame, request: pytest.FixtureRequest) -> None:
    lm: LM = request.getfixturevalue(name)
    prompts = build_prompts(lm, events.head(3))
    assert np.abs(read_out(lm, prompts).scores_PE - by_hand(lm, prompts)).max() < TOLERANCE


def test_labels_of_several_tokens_count_in_full(smollm: LM, events: pd.DataFrame) -> None:
    prompts = build_prompts(smollm, events.head(3), chat=True)
    # As a chat answer there is no leading space, and this tokenizer cuts "disgust" and "sadness" into three.
    assert max(len(ids) for ids in prompts.label_ids) >= 3
    full = read_out(smollm, prompts)
    assert np.abs(full.scores_PE - by_hand(smollm, prompts)).max() < TOLERANCE
    first = read_out(smollm, prompts, mode="first")
    longer = [e for e, ids in enumerate(prompts.label_ids) if len(ids) > 1]
    assert (first.scores_PE[:, longer] > full.scores_PE[:, longer]).all()
    assert not first.full_strings and full.full_strings


def test_the_last_token_alone_would_wipe_out_an_emotion(smollm: LM, events: pd.DataFrame) -> None:
    """The defect of public code: scoring a label by its last piece gives a different and wrong ranking."""
    prompts = build_prompts(smollm, events, chat=True)
    right = read_out(smollm, prompts).scores_PE
    last_pieces = replace(prompts, label_ids=tuple(ids[-1:] for ids in prompts.label_ids))
    wrong = read_out(smollm, last_pieces).scores_PE
    pieces = np.array([len(ids) for ids in prompts.label_ids])
    np.testing.assert_allclose(wrong[:, pieces == 1], right[:, pieces == 1], atol=TOLERANCE)
    # A word's last piece is all but impossible where a word should begin: the label sinks by many nats and in rank.
    assert (right - wrong)[:, pieces > 1].min() > 2
    assert (np.argsort(right, axis=1) != np.argsort(wrong, axis=1)).any(axis=1).mean() > 0.5


def test_first_token_mode_falls_back_when_first_tokens_collide(smollm: LM, events: pd.DataFrame) -> None:
    prompts = build_prompts(smollm, events.head(2), labels=("fear", "fear of loss"))
    assert not scoring.first_tokens_differ(prompts)
    fallback = read_out(smollm, prompts, mode="first")
    assert fallback.full_strings and "full label strings" in fallback.notes[0]
    np.testing.assert_allclose(fallback.scores_PE, read_out(smollm, prompts).scores_PE)
    assert np.abs(fallback.scores_PE - by_hand(smollm, prompts)).max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_padding_cache_and_window(family: str, tiny: Callable[[str], LM], events: pd.DataFrame) -> None:
    """Sliding windows shorter than the prompt, a shared prefix longer than the window, labels of several tokens."""
    lm = tiny(family)
    shots = events.assign(emotion=[*EMOTIONS, "joy"]).head(3)
    prompts = build_prompts(lm, events, exemplars=shots, labels=("anger", "fear", "schadenfreude"))
    assert scoring.shared_prefix(prompts.ids) > 40
    assert np.abs(read_out(lm, prompts).scores_PE - by_hand(lm, prompts)).max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_residuals_are_the_blocks_outputs(family: str, tiny: Callable[[str], LM], events: pd.DataFrame) -> None:
    lm = tiny(family)
    prompts = build_prompts(lm, events)
    read = read_out(lm, prompts, layers=[2, 0])
    assert read.resid_PLD is not None and read.resid_PLD.shape == (len(events), 2, lm.d_model)
    seen: dict[int, torch.Tensor] = {}
    for layer in (0, 2):
        block = decoder_layers(lm.hf)[layer]

        def hook(module: object, inputs: object, output: object, layer: int = layer) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            assert isinstance(tensor, torch.Tensor)
            seen[layer] = tensor[0, -1]

        handle = block.register_forward_hook(hook)
        with torch.no_grad():
            lm.hf(torch.tensor([prompts.ids[1]]))
        handle.remove()
    # In the order asked for, which is not the order of depth.
    np.testing.assert_allclose(read.resid_PLD[1, 0], seen[2], atol=1e-4)
    np.testing.assert_allclose(read.resid_PLD[1, 1], seen[0], atol=1e-4)


def test_order_does_not_matter(smollm: LM, events: pd.DataFrame) -> None:
    order = np.random.default_rng(0).permutation(len(events))
    straight = read_out(smollm, build_prompts(smollm, events)).scores_PE
    shuffled = read_out(smollm, build_prompts(smollm, events.iloc[order])).scores_PE
    assert np.abs(straight[order] - shuffled).max() < TOLERANCE


def test_the_readout_is_not_padding(smollm: LM, events: pd.DataFrame) -> None:
    """The defect of public code: position -1 of a right-padded batch. Here it is a different, wrong number."""
    prompts = build_prompts(smollm, events.iloc[[1, 5]])
    short, long = sorted(prompts.ids, key=len)
    padded = [*short, *[smollm.tokenizer.pad_token_id] * (len(long) - len(short))]
    with torch.no_grad():
        wrong = torch.log_softmax(smollm.hf(torch.tensor([padded])).logits[0, -1], dim=-1)
    columns = [ids[0] for ids in prompts.label_ids]
    right = read_out(smollm, prompts).scores_PE[prompts.ids.index(short)]
    assert np.abs(wrong[columns].numpy() - right).max() > 0.1


def test_calibration_removes_a_planted_prior() -> None:
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 6, 300)
    evidence = np.eye(6)[gold] * 2.0
    prior = np.array([0.0, -8.0, 0.0, 5.0, 0.0, -8.0])
    scores = evidence + prior
    assert set(scoring.predict(scores)) == {3}
    assert (scoring.predict(scoring.calibrate(scores, prior)) == gold).all()


def test_gold_logit_difference_by_hand() -> None:
    scores = np.array([[1.0, 2.0, 6.0], [0.0, 3.0, 3.0]])
    # 6 - (1 + 2) / 2 = 4.5 and 0 - (3 + 3) / 2 = -3
    np.testing.assert_allclose(scoring.gold_logit_difference(scores, np.array([2, 0])), [4.5, -3.0])


def test_label_prior_is_the_mean_over_content_free_prompts(smollm: LM) -> None:
    free = pd.DataFrame({"text": list(scoring.CONTENT_FREE)})
    expected = by_hand(smollm, build_prompts(smollm, free)).mean(axis=0)
    np.testing.assert_allclose(scoring.label_prior(smollm), expected, atol=TOLERANCE)


def test_exemplars_are_never_evaluated() -> None:
    frame = pd.DataFrame(
        {
            "row_id": [f"r{i}" for i in range(40)],
            "emotion": ["anger", "joy"] * 20,
            "text": [f"text {i}" for i in range(40)],
            "split": ["discovery"] * 20 + ["test"] * 20,
        }
    )
    shown = scoring.draw_exemplars(frame, 2, seed=3)
    assert shown["emotion"].value_counts().to_dict() == {"anger": 2, "joy": 2}
    assert set(shown["split"]) == {"discovery"}
    assert not set(scoring.without(frame, shown)["row_id"]) & set(shown["row_id"])
    assert not shown["row_id"].equals(scoring.draw_exemplars(frame, 2, seed=4)["row_id"])
    with pytest.raises(EmosaeError, match="fewer than 11 rows of anger, joy"):
        scoring.draw_exemplars(frame, 11, seed=0)


def test_target_of_a_dialogue_is_named_in_the_question(smollm: LM) -> None:
    frame = pd.DataFrame({"text": ["Ada: It broke.\nBen: Again?"], "target": ["Ada"]})
    text = smollm.tokenizer.decode(build_prompts(smollm, frame).ids[0])
    assert text.endswith("This gave Ada a feeling of")


def test_bad_input_is_refused_before_any_compute(smollm: LM, gemma: LM, events: pd.DataFrame) -> None:
    with pytest.raises(EmosaeError, match="did you mean 'label'"):
        build_prompts(smollm, events, template="lable")
    with pytest.raises(EmosaeError, match="event/1 has no text"):
        build_prompts(smollm, events.assign(text=["ok", "  ", *["ok"] * 5]))
    with pytest.raises(EmosaeError, match=r"event/0 makes a prompt of \d+ tokens and smollm2-135m takes"):
        build_prompts(smollm, events.assign(text="very long " * 9000).head(1))
    with pytest.raises(EmosaeError, match="at least two different labels"):
        build_prompts(smollm, events, labels=("joy", "joy"))
    with pytest.raises(EmosaeError, match="no chat template"):
        build_prompts(gemma, events, chat=True)
    with pytest.raises(EmosaeError, match="layers 0 to 29; got \\[30\\]"):
        read_out(smollm, build_prompts(smollm, events), layers=[30])


def test_shared_prefix_leaves_a_token_to_run() -> None:
    assert scoring.shared_prefix([(1, 2, 3), (1, 2, 4, 5)]) == 2
    assert scoring.shared_prefix([(1, 2), (1, 2)]) == 1
    assert scoring.shared_prefix([(1, 2)]) == 0
