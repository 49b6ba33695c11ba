"""Tracing: the engine against full passes on every family, planted truth, estimates, refusals, rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from emosae_utils import tracing
from emosae_utils.files import EmosaeError
from emosae_utils.models import LM, ModelProfile, decoder_layers
from emosae_utils.saes import Dictionary
from emosae_utils.scoring import Prompts, build_prompts, read_out
from emosae_utils.tracing import (
    Effects,
    ablate_features,
    agreement,
    attribution,
    full_pass,
    integrated_gradients,
    noise_floor,
    run_edits,
)

FAMILIES = ["llama", "gemma2", "gemma3", "mistral", "qwen2", "qwen3"]
LABELS = ["anger", "joy", "fear"]
# The first two have several tokens and begin differently.
LONG_LABELS = ["schadenfreude", "homesickness", "joy"]
# These begin with the same one.
SAME_LABELS = ["schadenfreude", "schadenfroh"]


def sparse(lm: LM, layer: int, seed: int = 0, n: int = 48, k: int = 6) -> Dictionary:
    """A top-k dictionary with random directions, which leaves an error that must be kept."""
    from sae_lens import TopKSAE, TopKSAEConfig

    generator = torch.Generator().manual_seed(seed + layer)
    sae = TopKSAE(TopKSAEConfig(d_in=lm.d_model, d_sae=n, k=k))
    w_FD = torch.randn(n, lm.d_model, generator=generator)
    w_FD /= w_FD.norm(dim=1, keepdim=True)
    sae.W_dec.data, sae.W_enc.data = w_FD, w_FD.T.contiguous()
    sae.b_dec.data = 0.1 * torch.randn(lm.d_model, generator=generator)
    return Dictionary(layer, sae, "made here")


def dictionaries(lm: LM) -> dict[int, Dictionary]:
    return {layer: sparse(lm, layer) for layer in range(lm.n_layers)}


def make(family: str, tiny: Callable[[str], LM], smollm: LM) -> LM:
    """The shared tiny models, and those of families that need no code of their own."""
    if family in ("llama", "gemma2", "gemma3"):
        return tiny(family)
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(smollm.tokenizer)}
    window: dict[str, Any] = {"sliding_window": 12, "max_position_embeddings": 1024, "pad_token_id": 2}
    if family != "mistral":
        window |= {"use_sliding_window": True, "max_window_layers": 2}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **window))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.15
    profile = ModelProfile(name=f"tiny-{family}", source="folder", base="memory")
    return LM(profile, model.eval().requires_grad_(False), smollm.tokenizer, "cpu", "float32", family)


@pytest.fixture
def lm(tiny: Callable[[str], LM]) -> LM:
    return tiny("gemma3")


@pytest.fixture
def prompts(lm: LM, events: pd.DataFrame) -> Prompts:
    return build_prompts(lm, events.head(4), labels=LABELS)


def every_edit(lm: LM, prompts: Prompts, found: dict[int, Dictionary]) -> list[Any]:
    """Each operation at each site, then sets over several sites and layers."""
    rng = np.random.default_rng(0)
    top, n = lm.n_layers - 1, len(prompts)
    vector_D, vectors_PD = rng.standard_normal(lm.d_model), rng.standard_normal((n, lm.d_model))
    resid_PLD = read_out(lm, prompts, layers=[0, 2, top]).resid_PLD
    assert resid_PLD is not None
    on = {
        layer: found[layer].encode(torch.tensor(resid_PLD[:1, i]))[0].argsort(descending=True)[:3].tolist()
        for i, layer in enumerate((0, 2, top))
    }
    rows: list[Any] = []
    for layer in (0, 2, top):
        f = on[layer][0]
        rows += [(layer, f, "zero", None), (layer, f, "scale", 3.0), (layer, f, "set", np.arange(1.0, n + 1))]
        rows += [(layer, f, "mean", None), (layer, f, "patch", 1), (layer, f, "add", -2.0)]
        for site in ("residual", "attention", "ffn"):
            rows += [(layer, site, "zero", None), (layer, site, "scale", [1.5] * n), (layer, site, "mean", None)]
            rows += [(layer, site, "set", vector_D), (layer, site, "add", vectors_PD)]
            rows += [(layer, site, "patch", [*range(1, n), 0])]
    rows.append([(0, f, "zero", None) for f in on[0]])
    rows.append([(layer, f, "zero", None) for layer in on for f in on[layer]])
    rows.append([(2, on[2][1], "scale", 4.0), (0, "attention", "zero", None), (2, "residual", "scale", 1.2)])
    rows.append([(2, "residual", "add", vector_D), (2, on[2][0], "zero", None), (2, on[2][1], "add", 1.0)])
    rows.append([(2, "ffn", "zero", None), (2, "attention", "scale", -1.0), (top, on[top][0], "set", 9.0)])
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_every_edit_equals_its_full_pass(
    tiny: Callable[[str], LM], smollm: LM, events: pd.DataFrame, family: str
) -> None:
    lm = make(family, tiny, smollm)
    prompts = build_prompts(lm, events.iloc[[0, 1]], labels=LABELS)
    assert len(prompts.ids[0]) > 12 + 5, "the sliding window must slide"
    found = dictionaries(lm)
    rows = every_edit(lm, prompts, found)
    ours, full = run_edits(lm, prompts, rows, found), full_pass(lm, prompts, rows, found)
    np.testing.assert_allclose(ours.clean_PE, full.clean_PE, atol=1e-4)
    np.testing.assert_allclose(ours.scores_PRE, full.scores_PRE, atol=1e-4)
    # Each edit does something, up to a mean or a patch of a feature that the other prompt has as well.
    assert (np.abs(full.effects_PRE).max(axis=(0, 2)) > 1e-3).mean() > 0.9


def test_the_full_pass_is_what_its_arithmetic_says(lm: LM, prompts: Prompts) -> None:
    """Plain hooks on a whole pass, with each operation written out, against the reference itself."""
    layer, found, ids = 2, dictionaries(lm), prompts.ids[0]
    resid_PLD = read_out(lm, prompts, layers=[layer]).resid_PLD
    assert resid_PLD is not None
    codes_PF = found[layer].encode(torch.tensor(resid_PLD[:, 0]))
    f = int(codes_PF[0].argmax())
    a, d_D = codes_PF[0, f], found[layer].sae.W_dec.detach()[f]
    v_D, x_D = torch.arange(float(lm.d_model)), torch.tensor(resid_PLD[0, 0])
    expected: list[tuple[Any, torch.Tensor]] = [
        ((layer, f, "zero", None), x_D - a * d_D),
        ((layer, f, "set", 5.0), x_D + (5.0 - a) * d_D),
        ((layer, f, "scale", 0.5), x_D - 0.5 * a * d_D),
        ((layer, f, "add", 2.0), x_D + 2.0 * d_D),
        ((layer, f, "mean", None), x_D + (codes_PF[:, f].mean() - a) * d_D),
        ((layer, f, "patch", 3), x_D + (codes_PF[3, f] - a) * d_D),
        ((layer, "residual", "zero", None), 0 * x_D),
        ((layer, "residual", "add", v_D), x_D + v_D),
        ((layer, "residual", "patch", 2), torch.tensor(resid_PLD[2, 0])),
    ]
    full = full_pass(lm, prompts, [edit for edit, _ in expected], found, scores="logp")
    for r, (_, wanted_D) in enumerate(expected):
        # The last prompt token's stream is put in place by hand.
        def put(module: Any, inputs: Any, output: Any, wanted_D: torch.Tensor = wanted_D) -> Any:
            changed = output.clone()
            changed[0, -1] = wanted_D
            return changed

        handle = decoder_layers(lm.hf)[layer].register_forward_hook(put)
        logp_V = torch.log_softmax(lm.hf(torch.tensor([ids])).logits[0, -1], dim=-1)
        handle.remove()
        by_hand_E = logp_V[[x[0] for x in prompts.label_ids]].numpy()
        np.testing.assert_allclose(full.scores_PRE[0, r], by_hand_E, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_log_p_of_labels_of_several_tokens_equals_its_full_pass(
    tiny: Callable[[str], LM], events: pd.DataFrame, family: str
) -> None:
    lm = tiny(family)
    prompts = build_prompts(lm, events.iloc[[0, 1]], labels=LONG_LABELS)
    assert max(len(ids) for ids in prompts.label_ids) > 2
    found = dictionaries(lm)
    rows = every_edit(lm, prompts, found)
    rows = rows[:-5:7] + rows[-3:]
    ours, full = (f(lm, prompts, rows, found, scores="logp") for f in (run_edits, full_pass))
    np.testing.assert_allclose(ours.scores_PRE, full.scores_PRE, atol=1e-3)
    np.testing.assert_allclose(ours.clean_PE, read_out(lm, prompts).scores_PE, atol=1e-3)
    assert ours.full_strings and ours.scores == "logp"


def test_differences_say_which_strings_they_are_of(lm: LM, events: pd.DataFrame) -> None:
    rows = [(1, "residual", "scale", 1.1)]
    one, several, same = (
        build_prompts(lm, events.head(1), labels=labels) for labels in (LABELS, LONG_LABELS, SAME_LABELS)
    )
    single = run_edits(lm, one, rows)
    assert single.full_strings and not single.notes
    np.testing.assert_allclose(single.scores_PRE.sum(axis=2), 0, atol=1e-9)
    logp = run_edits(lm, one, rows, scores="logp")
    centred_PRE = logp.scores_PRE - logp.scores_PRE.mean(axis=2, keepdims=True)
    np.testing.assert_allclose(single.scores_PRE, centred_PRE, atol=1e-5)
    first = run_edits(lm, several, rows)
    assert not first.full_strings and "first tokens" in first.notes[0]
    assert same.label_ids[0][0] == same.label_ids[1][0]
    fallen = run_edits(lm, same, rows)
    assert fallen.full_strings and fallen.scores == "logp" and "same token" in fallen.notes[0]
    np.testing.assert_allclose(fallen.clean_PE, read_out(lm, same).scores_PE, atol=1e-4)


def test_an_edit_of_nothing_changes_nothing(lm: LM, prompts: Prompts) -> None:
    found = dictionaries(lm)
    rows: list[Any] = [(1, 3, "scale", 1.0), (0, 5, "add", 0.0), (2, "ffn", "add", np.zeros(lm.d_model))]
    rows.append([(layer, f, "scale", 1.0) for layer in found for f in range(4)])
    result = run_edits(lm, prompts, rows, found)
    np.testing.assert_allclose(result.effects_PRE, 0, atol=1e-5)
    plain_PE = read_out(lm, prompts).scores_PE
    np.testing.assert_allclose(result.clean_PE, plain_PE - plain_PE.mean(axis=1, keepdims=True), atol=1e-4)


def test_order_batches_and_neighbours_do_not_matter(lm: LM, prompts: Prompts) -> None:
    found = dictionaries(lm)
    rows = [row for row in every_edit(lm, prompts, found) if isinstance(row, list) or row[2] not in ("mean", "patch")]
    # Values for each prompt would have to be turned round with the prompts.
    rows = [row for row in rows if isinstance(row, list) or np.ndim(row[3]) == 0]
    whole = run_edits(lm, prompts, rows, found)
    small = run_edits(lm, prompts, rows[::-1], found, batch_rows=3)
    np.testing.assert_allclose(small.scores_PRE[:, ::-1], whole.scores_PRE, atol=1e-5)
    turned = run_edits(lm, replace(prompts, ids=prompts.ids[::-1]), rows, found)
    np.testing.assert_allclose(turned.scores_PRE[::-1], whole.scores_PRE, atol=1e-5)
    alone = run_edits(lm, replace(prompts, ids=prompts.ids[2:3]), [rows[7]], found)
    np.testing.assert_allclose(alone.scores_PRE[0, 0], whole.scores_PRE[2, 7], atol=1e-5)


def test_a_prefix_shared_by_the_prompts_is_only_faster(lm: LM, events: pd.DataFrame) -> None:
    shots = events.head(2).assign(emotion=["anger", "fear"])
    prompts = build_prompts(lm, events.iloc[[3, 4]], labels=LABELS, exemplars=shots)
    tracer = tracing._tracer(lm, prompts, "difference", "float32")
    assert tracer.n_shared > 16 and tracer.shared is not None
    rows = [(0, "attention", "zero", None), (2, "residual", "scale", 1.2)]
    np.testing.assert_allclose(
        run_edits(lm, prompts, rows).scores_PRE, full_pass(lm, prompts, rows).scores_PRE, atol=1e-4
    )


@pytest.mark.parametrize("operation", ["zero", "mean", "resample", "scale"])
def test_every_active_feature_is_edited_alone(lm: LM, prompts: Prompts, operation: Any) -> None:
    found = {layer: sparse(lm, layer) for layer in (1, 3)}
    rng = np.random.default_rng(0)
    shape = {"mean": (48,), "resample": (len(prompts), 48)}.get(operation)
    single = {"zero": None, "scale": np.float32(2.5)}
    values: Any = {layer: rng.random(shape) for layer in found} if shape else single[operation]
    table = ablate_features(lm, prompts, found, operation=operation, values=values, batch_rows=5)
    assert len(table) == len(prompts) * 2 * 6
    assert (table.activation_N > 0).all()
    for n in range(0, len(table), 7):
        p, layer, f = table.prompt_N[n], int(table.layer_N[n]), int(table.feature_N[n])
        put = values[layer][f] if operation == "mean" else values[layer][p, f] if operation == "resample" else 0
        edit = (layer, f, "scale", values) if operation == "scale" else (layer, f, "set", float(put))
        expected = run_edits(lm, replace(prompts, ids=(prompts.ids[p],)), [edit], found)
        np.testing.assert_allclose(table.scores_NE[n], expected.scores_PRE[0, 0], atol=1e-5)
        np.testing.assert_allclose(table.clean_PE[p], expected.clean_PE[0], atol=1e-5)


def test_defaults_of_mean_and_resample_come_from_the_prompts(lm: LM, prompts: Prompts) -> None:
    found = {2: sparse(lm, 2)}
    resid_PLD = read_out(lm, prompts, layers=[2]).resid_PLD
    assert resid_PLD is not None
    codes_PF = found[2].encode(torch.tensor(resid_PLD[:, 0])).numpy()
    default = ablate_features(lm, prompts, found, operation="mean")
    given = ablate_features(lm, prompts, found, operation="mean", values={2: codes_PF.mean(axis=0)})
    np.testing.assert_allclose(default.scores_NE, given.scores_NE, atol=1e-5)
    drawn = ablate_features(lm, prompts, found, operation="resample", seed=3)
    for p in range(len(prompts)):
        fits = []
        for donor in range(len(prompts)):
            same_PF = np.repeat(codes_PF[donor : donor + 1], len(prompts), axis=0)
            put = ablate_features(lm, prompts, found, operation="resample", values={2: same_PF})
            fits.append(np.allclose(put.scores_NE[put.prompt_N == p], drawn.scores_NE[drawn.prompt_N == p], atol=1e-5))
        assert any(fits) and not fits[p], "another prompt's activations, never its own"


def test_a_choice_of_features_and_layers_is_a_part_of_the_whole(lm: LM, prompts: Prompts) -> None:
    found = dictionaries(lm)
    whole = ablate_features(lm, prompts, found)
    wanted = {1: [int(whole.feature_N[whole.layer_N == 1][0])], 3: list(range(24))}
    part = ablate_features(lm, prompts, found, features=wanted)
    inside = [f in wanted.get(layer, []) for layer, f in zip(whole.layer_N.tolist(), whole.feature_N, strict=True)]
    np.testing.assert_array_equal(part.feature_N, whole.feature_N[inside])
    np.testing.assert_allclose(part.scores_NE, whole.scores_NE[inside], atol=1e-5)
    gold_P = np.array([0, 1, 2, 0])
    n = len(whole) // 2
    delta_E, gold = whole.effects_NE[n], gold_P[whole.prompt_N[n]]
    by_hand = delta_E[gold] - np.delete(delta_E, gold).mean()
    assert whole.gold_effects(gold_P)[n] == pytest.approx(by_hand)


@pytest.mark.parametrize("name", ["smollm", "gemma"])
def test_embedded_models_are_exact(name: str, request: pytest.FixtureRequest, events: pd.DataFrame) -> None:
    lm: LM = request.getfixturevalue(name)
    prompts = build_prompts(lm, events.iloc[[3]])
    assert all(len(ids) == 1 for ids in prompts.label_ids)
    found = {layer: sparse(lm, layer, n=1400, k=48) for layer in (2, 9)}
    resid_PLD = read_out(lm, prompts, layers=[2, 9]).resid_PLD
    assert resid_PLD is not None
    low, high = (int(found[layer].encode(torch.tensor(resid_PLD[:, i])).argmax()) for i, layer in enumerate((2, 9)))
    rows: list[Any] = [[(2, low, "zero", None), (9, high, "zero", None)], (4, "attention", "zero", None)]
    rows.append((lm.n_layers - 2, "ffn", "zero", None))
    ours, full = run_edits(lm, prompts, rows, found), full_pass(lm, prompts, rows, found)
    np.testing.assert_allclose(ours.scores_PRE, full.scores_PRE, atol=1e-3)
    assert (np.abs(full.effects_PRE).max(axis=2) > 0.02).all()


def planted(tiny: Callable[[str], LM], smollm: LM) -> tuple[LM, Dictionary, torch.Tensor, torch.Tensor]:
    """A model whose answer to an edit after block 1 can be written down.

    Norms are the identity and everything after block 1 is silent but one neuron of the last FFN: it reads direction
    r, gated by g, and writes w. Features: 0 writes along the labels' rows, 1 along r, 2 along neither nor g.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(tiny("llama").hf.config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.15
    model.model.norm = torch.nn.Identity()
    for layer in (2, 3):
        block = model.model.layers[layer]
        block.input_layernorm = block.post_attention_layernorm = torch.nn.Identity()
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    profile = ModelProfile(name="planted", source="folder", base="memory")
    lm = LM(profile, model.eval().requires_grad_(False), smollm.tokenizer, "cpu", "float32", "planted")
    prompts = build_prompts(lm, pd.DataFrame({"text": ["x"]}), labels=LABELS)
    rows_ED = model.lm_head.weight[[ids[0] for ids in prompts.label_ids]]
    random_KD = torch.randn(3, lm.d_model)
    # Label rows, then r, g and an inert direction, each orthogonal to all before it.
    basis_DK = torch.linalg.qr(torch.cat([rows_ED, random_KD]).T).Q
    r_D, g_D, inert_D = basis_DK[:, 3], basis_DK[:, 4], basis_DK[:, 5]
    mlp, write_D = model.model.layers[3].mlp, rows_ED[1]
    mlp.gate_proj.weight.data[0], mlp.up_proj.weight.data[0] = g_D, r_D
    mlp.down_proj.weight.data[:, 0] = write_D
    toward_D = (rows_ED[0] - rows_ED.mean(dim=0)) / (rows_ED[0] - rows_ED.mean(dim=0)).norm()
    dictionary = sparse(lm, 1, n=3, k=3)
    directions_FD = torch.stack([toward_D, r_D, inert_D])
    # Biased so that all three are active whatever the stream holds.
    dictionary.sae.W_dec.data, dictionary.sae.W_enc.data = directions_FD, 0.1 * directions_FD.T
    dictionary.sae.b_enc.data = torch.full((3,), 4.0)
    return lm, dictionary, rows_ED, g_D


def test_planted_truth(tiny: Callable[[str], LM], smollm: LM, events: pd.DataFrame) -> None:
    lm, dictionary, rows_ED, g_D = planted(tiny, smollm)
    prompts = build_prompts(lm, events.head(3), labels=LABELS)
    table = ablate_features(lm, prompts, {1: dictionary})
    resid_PLD = read_out(lm, prompts, layers=[1]).resid_PLD
    assert resid_PLD is not None and table.feature_N.tolist() == [0, 1, 2] * 3
    centred_ED = rows_ED - rows_ED.mean(dim=0)
    for p in range(3):
        x_D = torch.tensor(resid_PLD[p, 0])
        a_F = dictionary.encode(x_D[None])[0]
        d_FD = dictionary.sae.W_dec.detach()
        gate = torch.nn.functional.silu(g_D @ x_D)
        direct_E = -a_F[0] * centred_ED @ d_FD[0]
        through_E = -a_F[1] * gate * (centred_ED @ rows_ED[1])
        effects_FE = table.effects_NE[table.prompt_N == p]
        np.testing.assert_allclose(effects_FE[0], direct_E.numpy(), atol=1e-5)
        np.testing.assert_allclose(effects_FE[1], through_E.numpy(), atol=1e-5)
        np.testing.assert_allclose(effects_FE[2], 0, atol=1e-6)
        assert np.abs(effects_FE[:2]).max(axis=1).min() > 0.01
    # Everything the features touch is linear, so both estimates are the truth.
    for estimate in (attribution, integrated_gradients):
        estimated = estimate(lm, prompts, {1: dictionary})
        np.testing.assert_allclose(estimated.effects_NE, table.effects_NE, atol=1e-5)
        seen = agreement(table, estimated, gold_P=np.array([0, 1, 2]), k=1)
        assert (seen["spearman"] > 0.99).all() and (seen["overlap"] == 1).all()
        np.testing.assert_allclose(seen["slope"], 1, atol=1e-3)


def test_estimates_are_close_where_edits_are_small_and_differ_where_they_are_not(lm: LM, prompts: Prompts) -> None:
    found = dictionaries(lm)
    exact, first = ablate_features(lm, prompts, found), attribution(lm, prompts, found)
    gap = np.abs(first.effects_NE - exact.effects_NE)
    assert gap.max() > 0.05
    # The slope at the clean stream is that of a small step: zeroing a thousandth is a scale of .999.
    step = ablate_features(lm, prompts, found, operation="scale", values=0.99)
    np.testing.assert_allclose(100 * step.effects_NE, first.effects_NE, atol=0.05 * np.abs(first.effects_NE).max())


def test_integrated_gradients_add_up(lm: LM, prompts: Prompts) -> None:
    found = {layer: sparse(lm, layer) for layer in (0, 2)}
    table = integrated_gradients(lm, prompts, found, steps=64)
    rough = attribution(lm, prompts, found)
    for p in range(len(prompts)):
        for layer, dictionary in found.items():
            here = (table.prompt_N == p) & (table.layer_N == layer)
            together = [(layer, int(f), "zero", None) for f in table.feature_N[here]]
            one = run_edits(lm, replace(prompts, ids=(prompts.ids[p],)), [together], {layer: dictionary})
            np.testing.assert_allclose(table.effects_NE[here].sum(axis=0), one.effects_PRE[0, 0], atol=0.02)
    # The first-order estimate has no such property.
    sums = [x.effects_NE[(x.prompt_N == 0) & (x.layer_N == 0)].sum(axis=0) for x in (table, rough)]
    assert np.abs(sums[0] - sums[1]).max() > 0.05


def by_hand(values: list[list[float]], **changes: Any) -> Effects:
    n = len(values)
    table = Effects(
        np.zeros(n, dtype=int),
        np.array([0, 0, 1, 1]),
        np.arange(n),
        np.ones(n),
        np.array(values),
        np.zeros((1, 2)),
        ("a", "b"),
        "zero",
        "exact",
        "difference",
        True,
    )
    return replace(table, **changes)


def test_agreement_by_hand() -> None:
    one, two = by_hand([[4, -4], [3, -3], [-2, 2], [1, -1]]), by_hand([[8, -8], [1, -1], [-4, 4], [2, -2]])
    row = agreement(one, two, gold_P=np.array([0]), k=2).iloc[0]
    # Gold differences 8 6 -4 2 and 16 2 -8 4: ranks 4 3 1 2 and 4 2 1 3; top two {0, 1} and {0, 2}.
    assert row["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert (row["overlap"], row["n"]) == (0.5, 4)
    assert row["slope"] == pytest.approx((8 * 16 + 6 * 2 + 4 * 8 + 2 * 4) / (64 + 36 + 16 + 4))
    layers = agreement(one, two, gold_P=np.array([0]), k=1, by="layer")
    assert layers["layer"].tolist() == [0, 1] and layers["overlap"].tolist() == [1.0, 1.0]
    with pytest.raises(EmosaeError, match="not of the same edits"):
        agreement(one, by_hand([[1, -1]] * 4, feature_N=np.array([0, 1, 2, 5])))
    with pytest.raises(EmosaeError, match="cannot compare the operation 'zero' with 'mean'"):
        agreement(one, by_hand([[1, -1]] * 4, operation="mean"))


NAN_VECTOR = np.full(32, np.nan)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([], "set of edits is empty"),
        ([[]], "row 0 of the edits is an empty set"),
        ((1, 3, "zero", None), "put a single edit into a list"),
        ([(1, 3, "zero")], r"an edit is a tuple \(layer, feature, operation, value\)"),
        ([(9, 3, "zero", None)], "out of range: tiny-gemma3 has layers 0 to 3"),
        ([(-1, "residual", "zero", None)], "out of range: tiny-gemma3 has layers 0 to 3"),
        ([(3, 3, "zero", None)], r"layer 3 has no dictionary; there are \[1\]"),
        ([(1, 48, "zero", None)], "unknown feature; layer 1 has 0 to 47"),
        ([(1, -1, "zero", None)], "unknown feature; layer 1 has 0 to 47"),
        ([(1, 2.5, "zero", None)], "needs the number of a feature or one of residual, attention, ffn"),
        ([(1, "residul", "zero", None)], "unknown site 'residul'; did you mean 'residual'"),
        ([(1, 3, "zeroe", None)], "unknown operation 'zeroe'; did you mean 'zero'"),
        ([(1, 3, "zero", 1.0)], "takes None as its value"),
        ([(1, 3, "set", float("nan"))], "not finite"),
        ([(1, 3, "scale", float("inf"))], "not finite"),
        ([(1, "residual", "add", NAN_VECTOR)], "not finite"),
        ([(1, 3, "set", None)], "needs a value, got None"),
        ([(1, 3, "set", "much")], "needs numbers as its value"),
        ([(1, 3, "set", [1.0, 2.0])], r"needs a number or \[4\] as its value, got shape \[2\]"),
        ([(1, "ffn", "set", [1.0, 2.0])], r"needs \[32\] or \[4, 32\] as its value, got shape \[2\]"),
        ([(1, 3, "patch", 4)], "takes the index of a prompt, 0 to 3"),
        ([(1, 3, "patch", 0.5)], "takes the index of a prompt, 0 to 3"),
        ([[(1, 3, "zero", None), (1, 3, "scale", 2.0)]], "row 0 edits layer 1, feature 3 twice"),
    ],
)
@pytest.mark.parametrize("how", [run_edits, full_pass])
def test_bad_edits_are_refused_before_any_compute(
    lm: LM, prompts: Prompts, edits: Any, message: str, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {1: sparse(lm, 1)}
    no_compute(lm, monkeypatch)
    with pytest.raises(EmosaeError, match=message) as refusal:
        how(lm, prompts, edits, found)
    assert "\n" not in str(refusal.value)


def no_compute(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("the model was run")

    monkeypatch.setattr(lm.hf.get_decoder(), "forward", refuse)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": []}, "set of layers is empty"),
        ({"layers": [2]}, r"layer 2 has no dictionary; there are \[1, 3\]"),
        ({"features": {1: []}}, "set of features of layer 1 is empty"),
        ({"features": {2: [3]}, "layers": [1]}, r"layer 2 has no dictionary"),
        ({"features": {3: [3]}, "layers": [1]}, r"features are given for layers \[3\] and edits asked for in \[1\]"),
        ({"features": {1: [3, 99]}}, "layer 1 has features 0 to 47; got 3 to 99"),
        ({"operation": "zap"}, "unknown operation 'zap'"),
        ({"values": 2.0}, "'zero' takes no values"),
        ({"operation": "scale"}, "'scale' needs a value, got None"),
        ({"operation": "mean", "values": {2: np.zeros(48)}}, r"values by layer, for each of the layers \[1, 3\]"),
        (
            {"operation": "mean", "values": {1: np.zeros(3)}, "layers": [1]},
            r"'mean' at layer 1 needs \[48\] as its value",
        ),
        (
            {"operation": "resample", "values": {1: np.zeros(48)}, "layers": [1]},
            r"'resample' at layer 1 needs \[4, 48\]",
        ),
        ({"scores": "logits"}, "unknown scores 'logits'"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
    ],
)
def test_bad_ablations_are_refused_before_any_compute(
    lm: LM, prompts: Prompts, options: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {layer: sparse(lm, layer) for layer in (1, 3)}
    no_compute(lm, monkeypatch)
    with pytest.raises(EmosaeError, match=message):
        ablate_features(lm, prompts, found, **options)


def test_models_and_prompts_that_do_not_fit_are_refused(
    lm: LM, smollm: LM, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(1, "residual", "scale", 2.0)]
    with pytest.raises(EmosaeError, match="no prompts"):
        run_edits(lm, replace(prompts, ids=()), rows)
    with pytest.raises(EmosaeError, match="at least two tokens"):
        run_edits(lm, replace(prompts, ids=((1,),)), rows)
    with pytest.raises(EmosaeError, match="reads 32 dimensions, smollm2-135m has 576"):
        run_edits(smollm, prompts, rows, {1: sparse(lm, 1)})
    with pytest.raises(EmosaeError, match="at least one step"):
        integrated_gradients(lm, prompts, {1: sparse(lm, 1)}, steps=0)
    with pytest.raises(EmosaeError, match="not finite; make the edits smaller"):
        run_edits(lm, prompts, [(1, "residual", "set", np.full(lm.d_model, 1e39))])
    monkeypatch.setattr(lm.hf.config, "model_type", "mixtral")
    with pytest.raises(EmosaeError, match="type 'mixtral', whose blocks tracing does not know"):
        run_edits(lm, prompts, rows)


def test_the_model_is_left_as_it_was(lm: LM, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    before = lm.hf.config._attn_implementation
    clean_PE = read_out(lm, prompts).scores_PE
    found = {1: sparse(lm, 1)}
    run_edits(lm, prompts, [(0, "attention", "zero", None), (1, "ffn", "zero", None), (1, 0, "add", 9.0)], found)

    def fail(*args: Any) -> Any:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(tracing, "_edit_features", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        run_edits(lm, prompts, [[(0, "ffn", "zero", None), (1, 0, "add", 9.0)]], found)
    assert lm.hf.config._attn_implementation == before != tracing._ATTENTION
    np.testing.assert_array_equal(read_out(lm, prompts).scores_PE, clean_PE)


def test_the_suffix_is_float32_whatever_the_model_is(tiny: Callable[[str], LM], events: pd.DataFrame) -> None:
    """A model in bfloat16 gets a float32 copy for the suffix; rounding is measured, and smaller with it."""
    from transformers import AutoModelForCausalLM

    exact = tiny("gemma3")
    model = AutoModelForCausalLM.from_config(exact.hf.config, dtype=torch.bfloat16)
    model.load_state_dict(exact.hf.state_dict())
    rounded = replace(exact, hf=model.eval().requires_grad_(False), dtype="bfloat16")
    twin = tracing._in_dtype(rounded, "float32")
    assert tracing._in_dtype(rounded, "float32") is twin and tracing._in_dtype(exact, "float32") is exact
    for (name, a), (_, b) in zip(twin.hf.state_dict().items(), model.state_dict().items(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float()), name
    prompts = build_prompts(exact, events.head(3), labels=LABELS)
    floors = [noise_floor(x, prompts, dtype=d) for x, d in ((twin, "float32"), (rounded, "float32"))]
    floors.append(noise_floor(rounded, prompts, dtype="bfloat16"))
    assert [(x.prefix_dtype, x.suffix_dtype) for x in floors] == [
        ("float32", "float32"),
        ("bfloat16", "float32"),
        ("bfloat16", "bfloat16"),
    ]
    assert floors[0].largest < 1e-4
    assert floors[0].median < floors[1].median < floors[2].median
    assert floors[2].median > 100 * floors[0].median
    assert "rounding moves an effect by" in str(floors[0]) and floors[0].n == 3 * 4 * 3
