"""Steering: exact scores and slopes, the convex problem, text under steering, files, planted truth, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from emosae_utils import steering
from emosae_utils.files import EmosaeError, read_json, write_json, write_manifest
from emosae_utils.models import LM, ModelProfile, decoder_layers
from emosae_utils.saes import Dictionary, load_dictionaries
from emosae_utils.scoring import Prompts, build_prompts, read_out
from emosae_utils.steering import (
    Bank,
    Fit,
    LowRank,
    Problem,
    Steering,
    Tangent,
    Units,
    additive_basis,
    all_units,
    feature_basis,
    fit_gains,
    fit_low_rank,
    load_steering,
    low_rank_scores,
    mean_difference_basis,
    neutral_slopes,
    prepare,
    preservation,
    save_steering,
    shuffled_basis,
    solve,
    steered,
    steered_scores,
    tangent,
    targets,
)
from emosae_utils.tracing import run_edits

FAMILIES = ["llama", "gemma2", "gemma3"]
LABELS = ("anger", "joy", "fear")
# The first two begin with the same token.
SAME_LABELS = ("schadenfreude", "schadenfroh", "joy")


def sparse(lm: LM, layer: int, seed: int = 0, n: int = 48, k: int = 6) -> Dictionary:
    """A top-k dictionary with random directions, which leaves an error that must be kept."""
    from sae_lens import TopKSAE, TopKSAEConfig

    generator = torch.Generator().manual_seed(seed + layer)
    sae = TopKSAE(TopKSAEConfig(d_in=lm.d_model, d_sae=n, k=k))
    w_FD = torch.randn(n, lm.d_model, generator=generator)
    w_FD /= w_FD.norm(dim=1, keepdim=True)
    sae.W_dec.data, sae.W_enc.data = w_FD, w_FD.T.contiguous()
    sae.b_dec.data = 0.1 * torch.randn(lm.d_model, generator=generator)
    return Dictionary(layer, sae, f"somewhere/layer_{layer:02d}")


def dictionaries(lm: LM, seed: int = 0) -> dict[int, Dictionary]:
    return {layer: sparse(lm, layer, seed) for layer in range(lm.n_layers)}


def resid(lm: LM, prompts: Prompts) -> Any:
    """Clean streams at the read-out, [P, L, D]."""
    return read_out(lm, prompts, layers=range(lm.n_layers)).resid_PLD


def on(lm: LM, prompts: Prompts, found: dict[int, Dictionary]) -> Units:
    """The two features of each layer that are most active on the prompts: those that gains can act on."""
    resid_PLD = resid(lm, prompts)
    picked = [
        (layer, int(f))
        for layer, d in found.items()
        for f in d.encode(torch.from_numpy(resid_PLD[:, layer])).sum(0).argsort(descending=True)[:2]
    ]
    return Units(*np.array(picked).T)


def centred(scores: Any) -> Any:
    return scores - scores.mean(axis=-1, keepdims=True)


@pytest.fixture
def lm(tiny: Callable[[str], LM]) -> LM:
    return tiny("gemma3")


@pytest.fixture
def prompts(lm: LM, events: pd.DataFrame) -> Prompts:
    return build_prompts(lm, events.head(4), labels=LABELS)


# Scores under steering.


@pytest.mark.parametrize("family", FAMILIES)
def test_gains_equal_exact_scaling(tiny: Callable[[str], LM], events: pd.DataFrame, family: str) -> None:
    """Features of two layers at once, against the tracing engine; a gain of one leaves everything as it is."""
    lm = tiny(family)
    prompts = build_prompts(lm, events.head(3), labels=LABELS)
    assert min(len(ids) for ids in prompts.ids) > 12 or family == "llama", "the sliding window must slide"
    found = dictionaries(lm)
    units, basis = on(lm, prompts, found), feature_basis(found)
    theta_RU = np.array([[0] * 8, [1.5, 0, 0, -1, 0, 2, 0, 0], [0] * 6 + [3, -2], [-0.5] * 8])
    made = [Steering(lm.name, basis, units.gains(basis, theta_U)) for theta_U in theta_RU]
    rows = [
        [(int(layer), int(f), "scale", 1 + t) for layer, f, t in zip(units.layer_U, units.unit_U, theta_U, strict=True)]
        for theta_U in theta_RU
    ]
    ours_RPE = steered_scores(lm, prompts, made, found)
    exact = run_edits(lm, prompts, rows, found)
    np.testing.assert_allclose(ours_RPE, exact.scores_PRE.transpose(1, 0, 2), atol=1e-4)
    np.testing.assert_allclose(ours_RPE[0], exact.clean_PE, atol=1e-5)
    np.testing.assert_allclose(ours_RPE[0], centred(read_out(lm, prompts, mode="first").scores_PE), atol=1e-4)
    assert np.abs(ours_RPE[1:] - ours_RPE[0]).max(axis=(1, 2)).min() > 0.02, "the steerings must do something"


def every_kind(lm: LM, prompts: Prompts, found: dict[int, Dictionary]) -> list[Steering]:
    """Steerings of every kind of units, of different layers, two of them with the same units."""
    units, basis = on(lm, prompts, found), feature_basis(found)
    active = {layer: np.arange(48) for layer in found}
    directions = {1: np.eye(lm.d_model)[:2], 2: np.ones((1, lm.d_model))}
    means = mean_difference_basis(resid(lm, prompts), np.arange(len(prompts)) % 3, 3, range(lm.n_layers))
    some = {x: np.random.default_rng(x).uniform(0.5, 1.5, len(b)) for x, b in means.items()}
    return [
        Steering(lm.name, basis, units.gains(basis, np.full(8, 1.0)), LABELS, {"method": "gains"}),
        Steering(lm.name, additive_basis(directions), {1: np.array([1.3, 0.8]), 2: np.array([1.2])}),
        Steering(lm.name, shuffled_basis(found, active, 0), units.gains(basis, np.full(8, 1.0))),
        Steering(lm.name, means, some),
        Steering(lm.name, basis, {3: units.gains(basis, np.full(8, -1.0))[3]}),
    ]


def test_many_at_once_equal_one_at_a_time(lm: LM, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    found = dictionaries(lm)
    made = every_kind(lm, prompts, found)
    together_RPE = steered_scores(lm, prompts, made, found)
    assert together_RPE.shape == (5, 4, 3)
    ready = prepare(lm, prompts)
    for rows in (1, 10):
        monkeypatch.setattr(steering, "BATCH_ROWS", rows)
        np.testing.assert_allclose(steered_scores(lm, ready, made, found), together_RPE, atol=1e-5)
    for r, one in enumerate(made):
        for p in range(4):
            alone = replace(prompts, ids=(prompts.ids[p],))
            np.testing.assert_allclose(steered_scores(lm, alone, [one], found)[0, 0], together_RPE[r, p], atol=1e-5)
    gaps = np.abs(together_RPE[:, None] - together_RPE[None]).max(axis=(2, 3))
    assert gaps[~np.eye(5, dtype=bool)].min() > 0.01, "all must differ for the test to mean anything"


def test_strength_goes_from_nothing_to_what_was_learnt_and_beyond(lm: LM, prompts: Prompts) -> None:
    one = Steering("x", {}, {2: np.array([1.0, 3.0, 0.5])})
    assert one.n_units == 2 and one.at(0.0).n_units == 0
    np.testing.assert_allclose(one.at(2.0).gains[2], [1, 5, 0])


def test_a_vector_is_as_long_as_alpha_times_the_stream(lm: LM, prompts: Prompts) -> None:
    layer, direction_D = 1, np.arange(1.0, lm.d_model + 1)
    norms_P = np.linalg.norm(resid(lm, prompts)[:, layer], axis=1)
    basis = additive_basis({layer: direction_D[None]})
    made = [Steering(lm.name, basis, {layer: np.array([1 + alpha])}) for alpha in (0.25, -0.5)]
    unit_D = direction_D / np.linalg.norm(direction_D)
    rows = [[(layer, "residual", "add", alpha * norms_P[:, None] * unit_D)] for alpha in (0.25, -0.5)]
    exact = run_edits(lm, prompts, rows)
    np.testing.assert_allclose(steered_scores(lm, prompts, made, {}), exact.scores_PRE.transpose(1, 0, 2), atol=1e-4)
    assert np.abs(exact.effects_PRE).max(axis=(0, 2)).min() > 0.05


def test_projections_read_from_the_mean_and_write_along_class_differences(lm: LM, prompts: Prompts) -> None:
    layer, x_PD = 2, resid(lm, prompts)[:, 2]
    y_P = np.array([0, 1, 0, 1])
    basis = mean_difference_basis(resid(lm, prompts), y_P, 2, range(lm.n_layers))
    toward_D = x_PD[y_P == 0].mean(0) - x_PD[y_P == 1].mean(0)
    toward_D /= np.linalg.norm(toward_D)
    np.testing.assert_allclose(basis[layer].writes_KD.numpy(), [toward_D, -toward_D], atol=1e-5)
    moves_PD = 0.7 * ((x_PD - x_PD.mean(0)) @ toward_D)[:, None] * toward_D
    made = [Steering(lm.name, basis, {layer: np.array([1.7, 1.0])})]
    exact = run_edits(lm, prompts, [[(layer, "residual", "add", moves_PD)]])
    np.testing.assert_allclose(steered_scores(lm, prompts, made, {})[0], exact.scores_PRE[:, 0], atol=1e-4)


def test_labels_that_begin_alike_are_scored_over_their_full_strings(lm: LM, events: pd.DataFrame) -> None:
    prompts = build_prompts(lm, events.head(3), labels=SAME_LABELS)
    found = dictionaries(lm)
    units, basis = on(lm, prompts, found), feature_basis(found)
    theta_U = np.tile([1.0, -1.0], 4)
    rows = [
        [(int(x), int(f), "scale", 1 + t) for x, f, t in zip(units.layer_U, units.unit_U, theta_U, strict=True)],
    ]
    exact = run_edits(lm, prompts, rows, found)
    assert exact.scores == "logp"
    ours = steered_scores(lm, prompts, [Steering(lm.name, basis, units.gains(basis, theta_U))], found)
    np.testing.assert_allclose(ours[0], exact.scores_PRE[:, 0], atol=1e-4)


def test_a_shuffled_basis_keeps_rows_and_norms_but_no_place(lm: LM) -> None:
    found = {1: sparse(lm, 1)}
    found[1].sae.W_dec.data *= torch.linspace(1, 2, 48)[:, None]
    active = np.array([3, 4, 7, 11, 20])
    bank, rows_FD = shuffled_basis(found, {1: active}, seed=0)[1], found[1].sae.W_dec.detach()
    assert bank.writes_from_K is not None
    assert (bank.writes_from_K[active] != active).all() and set(bank.writes_from_K[active]) == set(active)
    others = np.setdiff1d(np.arange(48), active)
    assert (bank.writes_from_K[others] == others).all()
    torch.testing.assert_close(bank.writes_KD, rows_FD[torch.from_numpy(bank.writes_from_K)])
    torch.testing.assert_close(bank.writes_KD.norm(dim=1).sort().values, rows_FD.norm(dim=1).sort().values)
    again, other = (shuffled_basis(found, {1: active}, seed)[1].writes_KD for seed in (0, 1))
    assert torch.equal(again, bank.writes_KD) and not torch.equal(other, bank.writes_KD)


# Slopes and the convex problem.


@pytest.mark.parametrize("family", FAMILIES)
def test_slopes_equal_finite_differences(
    tiny: Callable[[str], LM], events: pd.DataFrame, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering, "BATCH_ROWS", 7)
    lm = tiny(family)
    prompts = build_prompts(lm, events.head(3), labels=LABELS)
    found = dictionaries(lm)
    units, basis, ready = on(lm, prompts, found), feature_basis(found), prepare(lm, prompts)
    # The order of units must not matter.
    units = Units(units.layer_U[::-1].copy(), units.unit_U[::-1].copy())
    step = 0.005 * np.eye(len(units))
    for theta_U in (np.zeros(8), np.array([0.3, -0.4, 0.0, 0.5, -0.2, 0.1, 0.6, 0.2])):
        moved = [*(theta_U + step), *(theta_U - step), theta_U]
        made = [Steering(lm.name, basis, units.gains(basis, t)) for t in moved]
        scores_RPE = steered_scores(lm, ready, made, found)
        here = tangent(ready, basis, units, found, theta_U)
        by_hand_UPE = (scores_RPE[:8] - scores_RPE[8:16]) / 0.01
        assert np.abs(by_hand_UPE).max(axis=(1, 2)).min() > 0.01
        np.testing.assert_allclose(here.slopes_PEU, by_hand_UPE.transpose(1, 2, 0), atol=3e-3, rtol=0.02)
        np.testing.assert_allclose(here.scores_PE, scores_RPE[16], atol=1e-5)
        np.testing.assert_allclose(here.offset_PE + here.slopes_PEU @ theta_U, here.scores_PE, atol=1e-6)


def convex_case(n: int = 60, n_labels: int = 3, n_units: int = 7) -> Problem:
    rng = np.random.default_rng(0)
    target_XE = rng.dirichlet(np.ones(n_labels), n) * rng.uniform(0.5, 1.5, (n, 1)) / n
    slopes_XEU = rng.standard_normal((n, n_labels, n_units))
    return Problem(slopes_XEU, rng.standard_normal((n, n_labels)), target_XE, rng.standard_normal((5, n_units)))


def objective(problem: Problem, theta_U: Any, penalty: float, neutral_weight: float) -> float:
    """The loss written out with torch, as float64."""
    z_XE = torch.from_numpy(problem.offset_XE + problem.slopes_XEU @ theta_U)
    value = -(torch.from_numpy(problem.target_XE) * torch.log_softmax(z_XE, dim=1)).sum()
    value += penalty / 2 * (theta_U**2).sum() + neutral_weight / 2 * ((problem.neutral_MU @ theta_U) ** 2).sum()
    return float(value)


@pytest.mark.parametrize(("penalty", "neutral_weight"), [(0.1, 0.0), (0.01, 0.5)])
def test_the_convex_problem_is_solved(penalty: float, neutral_weight: float) -> None:
    problem = convex_case()
    best_U = solve(problem, penalty, neutral_weight)
    best = objective(problem, best_U, penalty, neutral_weight)
    for step_U in 1e-3 * np.eye(7):
        up, down = (objective(problem, best_U + s * step_U, penalty, neutral_weight) for s in (1, -1))
        assert abs(up - down) / 2e-3 < 1e-3 and up > best and down > best
    rng = np.random.default_rng(1)
    for size in (0.01, 0.1, 1.0):
        moved = [objective(problem, best_U + size * rng.standard_normal(7), penalty, neutral_weight) for _ in range(20)]
        assert min(moved) > best
    np.testing.assert_allclose(solve(problem, penalty, neutral_weight, np.full(7, 2.0)), best_U, atol=1e-3)


def test_the_solution_is_that_of_a_logistic_regression() -> None:
    """Units that are a weight each of a linear classifier make the problem a multinomial regression."""
    rng = np.random.default_rng(0)
    x_PD, y_P = rng.standard_normal((80, 4)), rng.integers(0, 3, 80)
    # Slope of label e by the weight (k, d): x_d if e is k.
    slopes_PEU = np.einsum("ek,pd->pekd", np.eye(3), x_PD).reshape(80, 3, 12)
    problem = Problem(slopes_PEU, np.zeros((80, 3)), targets(y_P, 3, 0, 0.5), np.zeros((0, 12)))
    theta_U = solve(problem, penalty=0.05)
    # Its loss is a sum and its penalty 1 / C, ours is a mean.
    peer = LogisticRegression(C=1 / (0.05 * 80), fit_intercept=False, tol=1e-8, max_iter=1000).fit(x_PD, y_P)
    np.testing.assert_allclose(theta_U.reshape(3, 4), peer.coef_, atol=2e-3)


def test_weight_on_neutral_text_shrinks_what_it_would_change() -> None:
    problem = convex_case()
    kls = [float(((problem.neutral_MU @ solve(problem, 0.01, w)) ** 2).sum() / 2) for w in (0.0, 0.01, 0.1, 1.0)]
    assert all(a > b for a, b in pairwise(kls)) and kls[-1] < 0.1 * kls[0]


def test_targets_name_each_example_and_no_label_without_content() -> None:
    wanted_XE = targets(np.array([0, 2, 2]), 3, 4, 0.5)
    np.testing.assert_allclose(wanted_XE[:3], np.array([[1, 0, 0], [0, 0, 1], [0, 0, 1]]) / 3)
    np.testing.assert_allclose(wanted_XE[3:], np.full((4, 3), 0.5 / 12))


# Planted truth.


def planted(tiny: Callable[[str], LM], smollm: LM, n: int) -> tuple[LM, Dictionary, Prompts, Any]:
    """A model that hardly answers, and whose features say what it should: feature e < 3 is active on texts of label e.

    Norms are the identity and blocks 2 and 3 are silent, so that what is written after block 1 goes straight to the
    output. A text of label e holds the word that moves feature e; its decoder row pushes label e, weakly at gain one.
    The model itself leans to the first label. Feature 3 is always on and writes noise, 4 to 11 are on at random.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(tiny("llama").hf.config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.15
    model.model.norm = torch.nn.Identity()
    for block in model.model.layers:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    lm = LM(
        ModelProfile(name="planted", source="folder", base="memory"),
        model.eval().requires_grad_(False),
        smollm.tokenizer,
        "cpu",
        "float32",
        "planted",
    )
    rng = np.random.default_rng(0)
    # Blocks are silent, so the stream at the read-out is the embedding of the last token: each prompt gets its own.
    gold_P = np.arange(n) % 3
    tokens_P = 100 + np.arange(n)
    label_ids = tuple(tuple(lm.tokenizer(f" {e}", add_special_tokens=False)["input_ids"]) for e in LABELS)
    prompts = Prompts(tuple((5, 6, int(t)) for t in tokens_P), LABELS, label_ids)
    rows_ED = model.lm_head.weight.data[[ids[0] for ids in label_ids]]
    centred_ED = rows_ED - rows_ED.mean(dim=0)
    # Twelve reading directions orthogonal to what the labels read.
    reads_FD = torch.linalg.qr(torch.cat([rows_ED, torch.randn(12, lm.d_model)]).T).Q.T[3:15]
    codes_PF = torch.zeros(n, 12)
    codes_PF[torch.arange(n), torch.from_numpy(gold_P)] = torch.from_numpy(rng.uniform(0.5, 1.5, n)).float()
    codes_PF[:, 3] = 1.0
    codes_PF[:, 4:] = torch.from_numpy((rng.random((n, 8)) < 0.4) * rng.uniform(0.5, 1.5, (n, 8))).float()
    model.model.embed_tokens.weight.data[tokens_P] = codes_PF @ reads_FD + centred_ED[0] / centred_ED[0].norm() ** 2
    dictionary = sparse(lm, 1, n=12, k=12)
    dual_ED = torch.linalg.pinv(rows_ED).T
    dictionary.sae.W_enc.data, dictionary.sae.b_dec.data = reads_FD.T.contiguous(), torch.zeros(lm.d_model)
    writes_FD = torch.nn.functional.normalize(torch.randn(12, lm.d_model), dim=1)
    # Written along the dual rows, feature e raises the logit of label e and no other.
    writes_FD[:3] = torch.nn.functional.normalize(dual_ED, dim=1)
    dictionary.sae.W_dec.data = writes_FD
    return lm, dictionary, prompts, gold_P


def part(prompts: Prompts, rows: Any) -> Prompts:
    return replace(prompts, ids=tuple(prompts.ids[p] for p in rows))


def test_planted_features_are_found_and_help_on_new_texts_and_shuffled_labels_do_not(
    tiny: Callable[[str], LM], smollm: LM
) -> None:
    lm, dictionary, prompts, gold_P = planted(tiny, smollm, 90)
    found = {1: dictionary}
    basis, n = feature_basis(found), 15
    shown, free = prepare(lm, part(prompts, range(n))), prepare(lm, part(prompts, range(n, n + 3)))
    held, held_P = prepare(lm, part(prompts, range(n + 3, 90))), gold_P[n + 3 :]
    fit = Fit(n_units=6, penalties=(0.001, 0.01), free_weight=0.0, steps=2)

    def accuracy(gains: Any) -> float:
        scores_PE = steered_scores(lm, held, [Steering(lm.name, basis, gains)], found)[0]
        return float((scores_PE.argmax(axis=1) == held_P).mean())

    before = accuracy({1: np.ones(12)})
    assert before < 0.45, "the model must need repair"
    gains, chosen = fit_gains(shown, free, targets(gold_P[:n], 3, 3, 0.0), basis, all_units(basis), found, fit)
    assert gains[1][:3].min() > 2.0 and gains[1][:3].min() > np.abs(gains[1][3:] - 1).max() + 1
    assert (gains[1] != 1).sum() <= 6 == chosen["n_units"]
    assert accuracy(gains) > 0.95
    losses = [x["loss"] for x in chosen["path"]]
    assert losses == sorted(losses, reverse=True) and chosen["penalty"] in fit.penalties
    # Labels dealt anew: texts held out are then named no better than by chance, on average over deals.
    dealt = []
    for seed in range(5):
        wrong_P = np.random.default_rng(seed).permutation(gold_P[:n])
        goal_XE = targets(wrong_P, 3, 3, 0.0)
        wrong, _ = fit_gains(shown, free, goal_XE, basis, all_units(basis), found, replace(fit, steps=1))
        dealt.append(accuracy(wrong))
    assert np.mean(dealt) < 1 / 3 + 0.15, dealt


def test_a_fit_lowers_the_loss_of_the_model_itself(lm: LM, prompts: Prompts) -> None:
    """Not only on the tangent, also with a label prior taken off, and text without content pulled to no label."""
    found = dictionaries(lm)
    basis, y_P = feature_basis(found), np.array([0, 1, 2, 0])
    shown, free = prepare(lm, prompts), prepare(lm, replace(prompts, ids=prompts.ids[:2]))
    shift_E, fit = np.array([0.5, -1.0, 0.5]), Fit(n_units=20, penalty=0.01, steps=3)
    goal_XE = targets(y_P, 3, 2, 0.5)
    gains, chosen = fit_gains(shown, free, goal_XE, basis, all_units(basis), found, fit, shift_E=shift_E)

    def loss(gains: Any) -> float:
        one = [Steering(lm.name, basis, gains)]
        z_XE = np.concatenate([steered_scores(lm, x, one, found)[0] for x in (shown, free)]) - shift_E
        size = sum(float(((g_K - 1) ** 2).sum()) for g_K in gains.values())
        return -float((goal_XE * torch.log_softmax(torch.from_numpy(z_XE), 1).numpy()).sum()) + 0.005 * size

    assert chosen["penalty"] == 0.01, "one example of a label leaves nothing to choose by"
    np.testing.assert_allclose(loss(gains), chosen["path"][-1]["loss"], atol=1e-5)
    assert loss(gains) < 0.8 * loss({0: np.ones(48)})


def test_the_penalty_is_chosen_on_examples_left_out() -> None:
    """Where slopes are noise the largest penalty wins, where they say the label the smallest does."""
    rng, y_P = np.random.default_rng(0), np.arange(30) % 3
    noise_PEU = rng.standard_normal((30, 3, 40)).astype(np.float32)
    free = Tangent(np.zeros((1, 3)), np.zeros((1, 3, 40), dtype=np.float32), np.zeros(40))
    goal_XE, fit = targets(y_P, 3, 1, 0.5), Fit(penalties=(0.001, 10.0))
    honest_PEU = noise_PEU * 0.1
    honest_PEU[:, :, 0] += np.eye(3)[y_P]
    for slopes_PEU, wanted in ((noise_PEU, 10.0), (honest_PEU, 0.001)):
        first = Tangent(np.zeros((30, 3)), slopes_PEU, np.zeros(40))
        penalty, losses = steering.cross_validate(first, free, goal_XE, fit, np.zeros((0, 40)), 0)
        assert penalty == wanted and losses[wanted] == min(losses.values())


# Running text.


def sequences(lm: LM, n: int, width: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(10, len(lm.tokenizer) - 10, (n, width)).tolist()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_predicted_kl_is_the_measured_one_where_steering_is_weak(tiny: Callable[[str], LM], family: str) -> None:
    lm = tiny(family)
    found = {x: sparse(lm, x) for x in (1, 2)}
    basis, ids = feature_basis(found), sequences(lm, 5, 16)
    units = all_units(basis)
    rows_MU = neutral_slopes(lm, ids, {"own": basis}, found, samples=12)["own"]
    assert rows_MU.shape == (5 * 12, len(units))
    rng, ratios = np.random.default_rng(0), []
    for _ in range(3):
        theta_U = 0.05 * rng.standard_normal(len(units))
        predicted = float(((rows_MU @ theta_U) ** 2).sum()) / 2
        one = Steering(lm.name, basis, units.gains(basis, theta_U))
        measured = preservation(lm, ids, {"one": one}, found)["kl"].mean()
        assert measured > 1e-5
        ratios.append(predicted / measured)
    assert min(ratios) > 0.6 and max(ratios) < 1.6, ratios
    fixed = {x: Bank(x, "norm", bank.writes_KD) for x, bank in basis.items()}
    both = neutral_slopes(lm, ids[:1], {"own": basis, "fixed": fixed}, found, samples=1, seed=3)
    alone_MU = neutral_slopes(lm, ids[:1], {"own": basis}, found, samples=1, seed=3)["own"]
    np.testing.assert_array_equal(both["own"], alone_MU)
    assert not np.allclose(both["fixed"], alone_MU)


def hooked(lm: LM, one: Steering, found: dict[int, Dictionary], ids: list[int], first: int) -> torch.Tensor:
    """Logits of a plain pass with the arithmetic written out, from position `first` on, [S, V]."""

    def edit(layer: int, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        for s in range(first, len(ids)):
            x_D = output[0, s]
            acts_F = found[layer].encode(x_D[None])[0]
            for f in torch.nonzero(acts_F).ravel().tolist():
                changed[0, s] += (one.gains[layer][f] - 1) * acts_F[f] * found[layer].sae.W_dec[f].detach()
        return changed

    handles = [
        decoder_layers(lm.hf)[layer].register_forward_hook(lambda m, i, o, layer=layer: edit(layer, o))
        for layer in one.gains
    ]
    try:
        with torch.no_grad():
            logits_SV: torch.Tensor = lm.hf(torch.tensor([ids])).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits_SV


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_steered_at_every_position_but_the_first(
    tiny: Callable[[str], LM], events: pd.DataFrame, family: str
) -> None:
    lm = tiny(family)
    found = dictionaries(lm)
    prompts = build_prompts(lm, events.head(3), labels=LABELS)
    basis = feature_basis(found)
    units = all_units(basis)
    one = Steering(lm.name, basis, units.gains(basis, np.full(len(units), 0.5)))
    ids = list(prompts.ids[0])
    inputs = torch.tensor([ids])
    with torch.no_grad():
        clean_SV = lm.hf(inputs).logits[0]
    by_hand_SV = hooked(lm, one, found, ids, 1)
    with steered(lm, one, found):
        now_SV = lm.hf(inputs).logits[0]
        scores_PE = read_out(lm, prompts, mode="first").scores_PE
    torch.testing.assert_close(now_SV, by_hand_SV, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(now_SV[0], clean_SV[0], atol=1e-5, rtol=1e-5)
    assert (now_SV[5:] - clean_SV[5:]).abs().max() > 0.05
    assert not torch.allclose(hooked(lm, one, found, ids, 0)[0], clean_SV[0], atol=1e-3)
    # Scoring several prompts in one batch is steered too.
    for p in range(3):
        logp_V = torch.log_softmax(hooked(lm, one, found, list(prompts.ids[p]), 1)[-1], dim=0)
        np.testing.assert_allclose(scores_PE[p], logp_V[[x[0] for x in prompts.label_ids]].numpy(), atol=1e-3)


def test_hooks_go_whatever_happens(lm: LM, prompts: Prompts) -> None:
    found = dictionaries(lm)
    one, inputs = every_kind(lm, prompts, found)[0], torch.tensor([prompts.ids[0]])
    with torch.no_grad():
        before = lm.hf(inputs).logits
    with pytest.raises(KeyError, match="on purpose"), steered(lm, one, found):
        raise KeyError("on purpose")
    with torch.no_grad():
        torch.testing.assert_close(lm.hf(inputs).logits, before, atol=0, rtol=0)
    implementation = decoder_layers(lm.hf)[0].self_attn.config._attn_implementation
    broken = replace(found[2], sae=None)
    with pytest.raises((AttributeError, TypeError)):
        steered_scores(lm, prompts, [one], found | {2: broken})
    assert decoder_layers(lm.hf)[0].self_attn.config._attn_implementation == implementation


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_uncached(tiny: Callable[[str], LM], events: pd.DataFrame, family: str) -> None:
    lm = tiny(family)
    found = dictionaries(lm)
    prompts = build_prompts(lm, events.head(1), labels=LABELS)
    one, inputs = every_kind(lm, prompts, found)[0].at(3.0), torch.tensor([prompts.ids[0]])
    options = {"attention_mask": torch.ones_like(inputs), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    with steered(lm, one, found):
        cached, whole = (lm.hf.generate(inputs, use_cache=x, **options) for x in (True, False))
    assert cached.tolist() == whole.tolist() and cached.shape[1] > inputs.shape[1] + 1
    # Logits at each step, which tokens alone would hide.
    with steered(lm, one, found):
        past = lm.hf(cached[:, :-1], use_cache=True).past_key_values
        step_V = lm.hf(cached[:, -1:], past_key_values=past, use_cache=True).logits[0, -1]
    torch.testing.assert_close(step_V, hooked(lm, one, found, cached[0].tolist(), 1)[-1], atol=1e-4, rtol=1e-4)


def test_preservation_is_what_the_distributions_say(lm: LM) -> None:
    found = dictionaries(lm)
    ids = sequences(lm, 2, 12)
    units, basis = all_units(feature_basis(found)), feature_basis(found)
    one = Steering(lm.name, basis, units.gains(basis, np.full(len(units), 0.5)))
    table = preservation(lm, ids, {"one": one, "none": one.at(0.0)}, found, every=3)
    assert table["steering"].tolist() == ["one", "none"] * 2 and table["tokens"].tolist() == [4] * 4
    np.testing.assert_allclose(table.loc[table["steering"] == "none", "kl"], 0, atol=1e-7)
    at = [1, 4, 7, 10]
    with torch.no_grad():
        clean_SV = torch.log_softmax(lm.hf(torch.tensor(ids[:1])).logits[0], dim=-1)[at]
    now_SV = torch.log_softmax(hooked(lm, one, found, ids[0], 1), dim=-1)[at]
    gold = [ids[0][i + 1] for i in at]
    row = table.iloc[0]
    np.testing.assert_allclose(row["kl"], float((clean_SV.exp() * (clean_SV - now_SV)).sum(1).mean()), rtol=1e-3)
    np.testing.assert_allclose(row["clean"], -float(clean_SV[range(4), gold].mean()), rtol=1e-5)
    np.testing.assert_allclose(row["steered"], -float(now_SV[range(4), gold].mean()), rtol=1e-5)
    assert row["kl"] > 1e-3


# Files.


def test_every_kind_comes_back_from_its_files(lm: LM, prompts: Prompts, tmp_path: Path) -> None:
    found = dictionaries(lm)
    made = every_kind(lm, prompts, found)
    back = []
    for r, one in enumerate(made):
        save_steering(tmp_path / str(r), one, found)
        back.append(load_steering(tmp_path / str(r), found))
        assert (back[r].model, back[r].labels, dict(back[r].provenance)) == (
            one.model,
            one.labels,
            dict(one.provenance),
        )
        assert sorted(back[r].gains) == sorted(one.gains) and back[r].n_units == one.n_units
    scores_RPE = steered_scores(lm, prompts, made, found)
    np.testing.assert_allclose(steered_scores(lm, prompts, back, found), scores_RPE, atol=1e-5)
    # What was read can be written again: a shuffled basis must not become a plain one.
    twice = []
    for r, one in enumerate(back):
        save_steering(tmp_path / f"again-{r}", one, found)
        twice.append(load_steering(tmp_path / f"again-{r}", found))
    np.testing.assert_allclose(steered_scores(lm, prompts, twice, found), scores_RPE, atol=1e-5)


def test_altered_files_and_other_dictionaries_are_refused(lm: LM, prompts: Prompts, tmp_path: Path) -> None:
    found, folder = dictionaries(lm), tmp_path / "one"
    one = every_kind(lm, prompts, found)[0]
    save_steering(folder, one, found)
    with pytest.raises(EmosaeError, match=r"needs layer_00 for layer 0 and .* is another one"):
        load_steering(folder, found | {0: sparse(lm, 0, seed=5)})
    with pytest.raises(EmosaeError, match="for layer 2 and there is none"):
        load_steering(folder, {x: d for x, d in found.items() if x != 2})
    weights = folder / "steering.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-4] + b"\0\0\1\0")
    with pytest.raises(EmosaeError, match=r"steering\.safetensors was truncated or altered"):
        load_steering(folder, found)
    weights.unlink()
    with pytest.raises(EmosaeError, match=r"steering\.safetensors is missing"):
        load_steering(folder, found)
    with pytest.raises(EmosaeError, match="no manifest"):
        load_steering(tmp_path / "nowhere", found)
    weights.write_bytes(good)
    facts = read_json(folder / "steering.json")
    write_json(folder / "steering.json", facts | {"model": "other"})
    with pytest.raises(EmosaeError, match=r"steering\.json was truncated or altered"):
        load_steering(folder, found)
    write_manifest(folder)
    with pytest.raises(EmosaeError, match="made for other and the model is tiny-gemma3"):
        steered_scores(lm, prompts, [load_steering(folder, found)], found)


def test_steerings_that_do_not_fit_are_refused(lm: LM, prompts: Prompts) -> None:
    found = dictionaries(lm)
    basis = feature_basis(found)
    good = Steering(lm.name, basis, {1: np.ones(48)})
    bad: list[tuple[Steering, str]] = [
        (replace(good, model="other"), "made for other"),
        (replace(good, basis={}), "has gains for layer 1, where it has no units"),
        (replace(good, basis={9: basis[1]}, gains={9: np.ones(48)}), "layer 9"),
        (replace(good, gains={1: np.ones(47)}), "do not fit"),
        (replace(good, basis={1: Bank(1, "feature", torch.ones(48, 31))}), "do not fit"),
        (replace(good, gains={1: np.full(48, np.nan)}), "not finite"),
        (replace(good, gains={1: np.full(48, np.inf)}), "not finite"),
    ]
    for one, message in bad:
        with pytest.raises(EmosaeError, match=message) as error:
            steered_scores(lm, prompts, [good, one], found)
        assert "\n" not in str(error.value)
        with pytest.raises(EmosaeError, match=message), steered(lm, one, found):
            pass
    with pytest.raises(EmosaeError, match="layer 1, which has no dictionary here"):
        steered_scores(lm, prompts, [good], {})
    with pytest.raises(EmosaeError, match="layer 1 has 20 features"):
        steered_scores(lm, prompts, [good], {1: sparse(lm, 1, n=20)})
    rescaled = sparse(lm, 1)
    rescaled.sae.cfg.normalize_activations = "layer_norm"
    with pytest.raises(EmosaeError, match="layer_01 rescales each input"):
        steered_scores(lm, prompts, [good], {1: rescaled})
    with pytest.raises(EmosaeError, match="is empty"):
        steered_scores(lm, prompts, [], found)
    with pytest.raises(EmosaeError, match="no prompts"):
        prepare(lm, replace(prompts, ids=()))


def test_prompts_read_by_another_model_are_refused(
    tiny: Callable[[str], LM], lm: LM, prompts: Prompts, events: pd.DataFrame
) -> None:
    good = Steering(lm.name, additive_basis({1: np.ones((1, 32))}), {1: np.ones(1)})
    other = prepare(tiny("llama"), prompts)
    with pytest.raises(EmosaeError, match="were read by tiny-llama"):
        steered_scores(lm, other, [good], {})


# The low-rank change.


@pytest.mark.parametrize("layer", [0, 2])
def test_a_low_rank_change_is_what_its_weights_say(lm: LM, prompts: Prompts, layer: int) -> None:
    ready, rng = prepare(lm, prompts), torch.Generator().manual_seed(0)
    matrix = decoder_layers(lm.hf)[layer].self_attn.o_proj
    a_Z1, b_1D = torch.randn((32, 1), generator=rng), torch.randn((1, 32), generator=rng)
    assert LowRank(layer, a_Z1, b_1D).n_parameters == steering.low_rank_size(lm) == 64
    clean_PE = steered_scores(lm, ready, [Steering(lm.name, {}, {})], {})[0]
    np.testing.assert_allclose(low_rank_scores(ready, LowRank(layer, a_Z1, 0 * b_1D)), clean_PE, atol=1e-5)
    moved_PE = low_rank_scores(ready, LowRank(layer, a_Z1, b_1D))
    assert np.abs(moved_PE - clean_PE).max() > 0.02
    for p, ids in enumerate(prompts.ids):
        # At the read-out alone, in a whole pass.
        def edit(module: Any, inputs: Any, output: Any) -> Any:
            changed = output.clone()
            changed[0, -1] += (inputs[0][0, -1] @ a_Z1) @ b_1D
            return changed

        handle = matrix.register_forward_hook(edit)
        with torch.no_grad():
            logits_V = lm.hf(torch.tensor([ids])).logits[0, -1]
        handle.remove()
        np.testing.assert_allclose(moved_PE[p], centred(logits_V[[x[0] for x in prompts.label_ids]].numpy()), atol=1e-4)


def test_a_low_rank_fit_lowers_its_loss(lm: LM, prompts: Prompts) -> None:
    ready, free = prepare(lm, prompts), prepare(lm, replace(prompts, ids=prompts.ids[:1]))
    goal_XE = targets(np.array([0, 1, 2, 0]), 3, 1, 0.5)

    def loss(change: LowRank) -> float:
        z_XE = np.concatenate([low_rank_scores(x, change) for x in (ready, free)])
        return -float((goal_XE * torch.log_softmax(torch.from_numpy(z_XE), 1).numpy()).sum())

    losses = [loss(fit_low_rank(ready, free, goal_XE, 2, steps=steps)) for steps in (0, 5, 30)]
    np.testing.assert_allclose(losses[0], loss(LowRank(2, torch.zeros(32, 1), torch.zeros(1, 32))), atol=1e-6)
    assert losses[2] < losses[1] < losses[0] and losses[2] < 0.97 * losses[0]


# One real model.


def test_a_real_model_and_its_own_dictionary(smollm: LM, events: pd.DataFrame) -> None:
    layer = smollm.n_layers - 2
    found = load_dictionaries(smollm, layers=[layer], check=False)
    prompts = build_prompts(smollm, events.head(2), labels=LABELS)
    resid_PLD = read_out(smollm, prompts, layers=[layer]).resid_PLD
    assert resid_PLD is not None
    codes_PF = found[layer].encode(torch.from_numpy(resid_PLD[:, 0]))
    active = codes_PF.sum(0).argsort(descending=True)[:5].numpy()
    basis, units = feature_basis(found), Units(np.full(5, layer), active)
    theta_U = np.array([0.5, -0.5, 1.0, 0.0, 2.0])
    one = Steering(smollm.name, basis, units.gains(basis, theta_U))
    exact = run_edits(
        smollm, prompts, [[(layer, int(f), "scale", 1 + t) for f, t in zip(active, theta_U, strict=True)]], found
    )
    ready = prepare(smollm, prompts)
    np.testing.assert_allclose(steered_scores(smollm, ready, [one], found)[0], exact.scores_PRE[:, 0], atol=1e-3)
    assert np.abs(exact.effects_PRE).max() > 0.01
    first = tangent(ready, basis, units, found)
    small = Steering(smollm.name, basis, units.gains(basis, 0.02 * theta_U))
    moved_PE = steered_scores(smollm, ready, [small], found)[0] - exact.clean_PE
    np.testing.assert_allclose(moved_PE, first.slopes_PEU @ (0.02 * theta_U), atol=2e-3)
