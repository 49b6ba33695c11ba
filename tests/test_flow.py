"""Flow: exact parts of the stream, and planted onsets, shares and phases that the estimators must find, or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_array

from emosae_utils import flow, probes
from emosae_utils.data import EMOTIONS
from emosae_utils.files import EmosaeError, read_json, read_table
from emosae_utils.flow import CODES, EMOTION, FORM, RESIDUAL, TOPIC, Settings
from emosae_utils.models import LM, decoder_layers, writer_names
from emosae_utils.saes import load_dictionaries
from emosae_utils.scoring import build_prompts, read_out
from emosae_utils.stats import NOT_SUPPORTED, SUPPORTED, UNDECIDED
from tests.test_saes import write

Array = np.ndarray[Any, np.dtype[Any]]
SETTINGS = Settings(rows_per_emotion=96, permutations=30, probe_shuffles=6, bootstraps=50)
LAYERS, WIDTH, NOISE = 12, 60, 0.25
# From this layer on each kind of information is there, with this strength.
ONSETS = {FORM: 0, TOPIC: 4, EMOTION: 8}


def crossed_frame(n_topics: int = 16, seed: int = 0) -> pd.DataFrame:
    """Topics x emotions x six slots; the slot fixes person and tense, the number of words is drawn."""
    rng = np.random.default_rng(seed)
    words = ["table", "river", "bread", "window", "street", "letter", "garden", "train"]
    rows = [
        {
            "row_id": f"planted/{topic}-{emotion}-{slot}",
            "text": " ".join(rng.choice(words, rng.integers(4, 12))),
            "emotion": emotion,
            "dataset": "planted",
            "split": "test",
            "group": f"topic {topic:02d}",
            "topic": f"topic {topic:02d}",
            "person": "first" if slot < 3 else "third",
            "tense": "past" if slot % 2 else "present",
            "target": None,
        }
        for topic in range(n_topics)
        for emotion in EMOTIONS
        for slot in range(6)
    ]
    return pd.DataFrame(rows)


DESIGN = flow.make_design(crossed_frame(), SETTINGS)


def planted_stream(design: flow.Design, onsets: Mapping[str, int], seed: int = 0) -> Array:
    """Noise, a large effect of the wording, and from its onset on an axis for each level of a factor."""
    rng = np.random.default_rng(seed)
    resid_PLD = rng.normal(size=(len(design), LAYERS, WIDTH)) * NOISE
    axes = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    at = 0
    for kind, factor in ((FORM, "person"), (TOPIC, TOPIC), (EMOTION, EMOTION), ("wording", "template")):
        n_levels = len(design.names[factor])
        effect_PD = axes[at : at + n_levels][design.levels[factor]]
        at += n_levels
        resid_PLD[:, onsets.get(kind, 0) :] += (5.0 if kind == "wording" else 1.0) * effect_PD[:, None]
    return resid_PLD.astype(np.float32)


def true_share(factor: str, present: list[str]) -> float:
    """An axis per level, levels equally frequent: each factor has variance 1 - 1 / levels, the noise its own."""
    sizes = {FORM: 2, TOPIC: 16, EMOTION: 6}
    variance = {f: 1 - 1 / sizes[f] for f in present}
    return variance[factor] / (sum(variance.values()) + WIDTH * NOISE**2)


def planted_reading(onsets: Mapping[str, int], design: flow.Design = DESIGN, seed: int = 0) -> flow.Reading:
    """The planted stream, and codes of which 60 features of 120 tell of the emotion from its onset on."""
    rng = np.random.default_rng(seed + 1)
    codes = {}
    for layer in range(LAYERS):
        codes_PF = rng.exponential(1.0, size=(len(design), 120)) * (rng.random((len(design), 120)) < 0.2)
        codes_PF[:, :2] += 2.0 * (design.levels["person"][:, None] == np.arange(2))
        if layer >= onsets[TOPIC]:
            codes_PF[:, 104:] += 2.0 * (design.levels[TOPIC][:, None] == np.arange(16))
        if layer >= onsets[EMOTION]:
            codes_PF[:, 2:62] += 2.0 * (design.levels[EMOTION][:, None] == np.arange(60) % 6)
        codes[layer] = csr_array(codes_PF.astype(np.float32))
    stream = planted_stream(design, onsets, seed)
    return flow.Reading("planted", LAYERS, tuple(range(LAYERS)), design, {RESIDUAL: stream}, codes)


@pytest.fixture(scope="module")
def found() -> flow.Measured:
    return flow.analyse(planted_reading(ONSETS), SETTINGS)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_parts_add_up_to_the_stream_at_any_batch_size(
    family: str, tiny: Callable[[str], LM], events: pd.DataFrame
) -> None:
    lm = tiny(family)
    prompts = build_prompts(lm, events)
    sites = flow.read_sites(lm, prompts, range(lm.n_layers))
    stream, added = sites[RESIDUAL], sites[flow.ATTENTION] + sites[flow.FFN]
    np.testing.assert_allclose(stream[:, 1:], stream[:, :-1] + added[:, 1:], rtol=1e-4, atol=1e-4)
    # Each part is what it is called: the feed-forward network, with its norm where there is one, run by itself.
    kept: list[torch.Tensor] = []
    block = decoder_layers(lm.hf)[2]
    last = block.mlp if family == "llama" else block.post_feedforward_layernorm
    handle = last.register_forward_hook(lambda module, args, out: kept.append(out[0, -1]))
    with torch.no_grad():
        lm.hf(torch.tensor([prompts.ids[0]]))
    handle.remove()
    np.testing.assert_allclose(sites[flow.FFN][0, 2], kept[0].numpy(), rtol=1e-4, atol=1e-4)
    assert max(flow.batch_invariance(lm, prompts, range(lm.n_layers)).values()) < 1e-4
    plain = read_out(lm, prompts, layers=[3, 1])
    assert plain.attn_PLD is None and plain.resid_PLD is not None
    np.testing.assert_allclose(plain.resid_PLD, stream[:, [3, 1]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_lens_on_the_last_layer_is_the_answer(family: str, tiny: Callable[[str], LM], events: pd.DataFrame) -> None:
    lm = tiny(family)
    prompts = build_prompts(lm, events)
    read = read_out(lm, prompts, layers=range(lm.n_layers), mode="first")
    assert read.resid_PLD is not None
    lens_PLE = flow.label_lens(lm, read.resid_PLD, prompts.label_ids)
    first = (
        prompts if read.full_strings is False else replace(prompts, label_ids=tuple(i[:1] for i in prompts.label_ids))
    )
    scores_PE = read_out(lm, first).scores_PE
    np.testing.assert_allclose(lens_PLE[:, -1], scores_PE - scores_PE.mean(axis=1, keepdims=True), atol=1e-3)
    assert np.abs(lens_PLE[:, 0] - lens_PLE[:, -1]).max() > 0.1


def test_an_unknown_architecture_is_refused(tiny: Callable[[str], LM], events: pd.DataFrame) -> None:
    lm = tiny("llama")
    other = replace(lm, hf=torch.nn.Module())
    other.hf.model = torch.nn.Module()
    other.hf.model.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(EmosaeError, match="hold no self_attn and mlp"):
        writer_names(other)


def test_every_factor_meets_every_other() -> None:
    table = pd.DataFrame({f: DESIGN.levels[f] for f in (TOPIC, EMOTION, "template")})
    assert set(table.value_counts()) == {2} and len(table.value_counts()) == 16 * 6 * 3
    assert DESIGN.missing == () and DESIGN.names[EMOTION] == EMOTIONS
    held = pd.DataFrame({f: DESIGN.levels[f] for f in (TOPIC, "person", "tense", "template")})
    for order_P in flow.shuffles(flow.strata(DESIGN, EMOTION), 3, np.random.default_rng(0)):
        np.testing.assert_array_equal(held.to_numpy()[order_P], held.to_numpy())
        assert (DESIGN.levels[EMOTION][order_P] != DESIGN.levels[EMOTION]).mean() > 0.5


def test_few_rows_stay_crossed_and_a_plain_corpus_has_fewer_factors() -> None:
    small = flow.make_design(crossed_frame(), replace(SETTINGS, rows_per_emotion=12))
    assert len(small) == 72 and len(small.names[TOPIC]) == 4 and {"person", "tense"} <= set(small.levels)
    plain = crossed_frame().assign(topic=None, person=None, tense=None, dataset="plain")
    design = flow.make_design(plain, replace(SETTINGS, rows_per_emotion=40))
    assert design.missing == ("person", "tense", TOPIC) and set(design.sets) == {
        FORM, "template", "length", EMOTION, flow.ALL_FORM,
    }  # fmt: skip
    assert pd.Series(design.levels[EMOTION]).value_counts().eq(40).all()
    with pytest.raises(EmosaeError, match="the flow needs two emotions and 4 topics or writers"):
        flow.make_design(plain[plain["group"] == "topic 00"], SETTINGS)
    with pytest.raises(EmosaeError, match="unknown template 'feelin'; did you mean 'feeling'"):
        flow.make_design(plain, replace(SETTINGS, templates=("feelin",)))


def test_planted_shares_are_found_within_wordings(found: flow.Measured) -> None:
    for layer in range(LAYERS):
        present = [k for k, start in ONSETS.items() if layer >= start]
        for kind in flow.KINDS:
            truth = true_share(kind, present) if kind in present else 0.0
            curve = found.shares["residual, raw", kind]
            assert curve.value_L[layer] == pytest.approx(truth, abs=0.025), (layer, kind)
    # The wording holds 25 x (1 - 1/3) of a variance of at most 16.67 + 2.27 + 3.75.
    assert found.shares["residual, raw", flow.WORDING].value_L[-1] == pytest.approx(16.67 / 22.7, abs=0.03)
    rise = found.shares[RESIDUAL, EMOTION]
    assert (rise.value_L[8:] > rise.null_L[8:] + 0.05).all() and (np.abs(rise.value_L[:8]) < 0.01).all()


def test_planted_phases_support_the_claim(found: flow.Measured) -> None:
    phases = found.phases[RESIDUAL]
    assert phases is not None and phases.chosen == 3
    assert phases.boundaries[3][0].tolist() == [4, 8]
    assert (phases.boundaries[3] == [4, 8]).all(axis=1).mean() > 0.9
    assert phases.onsets[FORM][0] == 0
    assert 3 <= phases.onsets[TOPIC][0] < 4 and 7 <= phases.onsets[EMOTION][0] < 8
    claims = found.claims[CODES].set_index("test")["verdict"]
    assert found.headline == CODES and set(claims.index) == {*flow.TESTS, "all"}
    assert set(claims) == {SUPPORTED}
    assert found.claims[RESIDUAL].set_index("test").loc["all", "verdict"] == SUPPORTED


def test_the_claim_fails_where_emotion_comes_first() -> None:
    turned = flow.analyse(planted_reading({FORM: 8, TOPIC: 4, EMOTION: 0}), SETTINGS)
    claims = turned.claims[RESIDUAL].set_index("test")["verdict"]
    assert claims["emotion only late"] == NOT_SUPPORTED and claims["all"] == NOT_SUPPORTED
    assert claims["topic before emotion"] == NOT_SUPPORTED


def test_shuffled_labels_show_nothing() -> None:
    """Emotion labels dealt anew: no share, no probe, no feature, no onset, and no verdict for the claim."""
    order_P = flow.shuffles(flow.strata(DESIGN, EMOTION), 1, np.random.default_rng(3))[0]
    dealt = replace(DESIGN, levels={**DESIGN.levels, EMOTION: DESIGN.levels[EMOTION][order_P]})
    reading = planted_reading(ONSETS)
    null = flow.analyse(replace(reading, design=dealt), SETTINGS)
    share, probe = null.shares[RESIDUAL, EMOTION], null.accuracies[RESIDUAL, EMOTION]
    assert np.abs(share.value_L).max() < 0.01
    # One deal decides for all layers past the onset, so the layers before it are counted: noise of their own.
    assert (share.value_L[:8] > share.null_L[:8]).sum() <= 3
    assert probe.value_L.max() < 0.26
    assert null.features[flow.ABOVE].value_L.mean() < 0.12
    assert null.features[flow.RESPONSIVE].value_L.mean() < 0.02
    # Topic and form are still there.
    assert (null.shares[RESIDUAL, TOPIC].value_L[4:] > 0.1).all()
    assert null.claims[RESIDUAL].set_index("test").loc["all", "verdict"] != SUPPORTED


def test_the_null_line_is_crossed_at_its_stated_rate() -> None:
    partition = flow.make_partition(DESIGN, replace(SETTINGS, permutations=60, bootstraps=1))
    rng, wording_P = np.random.default_rng(5), DESIGN.levels["template"]
    crossed, values = [], []
    for _ in range(60):
        shares, nulls = flow.variance_shares(flow.gram(rng.normal(size=(len(DESIGN), 40)), wording_P), partition)
        for kind in flow.KINDS:
            crossed.append(shares[kind][0] > np.quantile(nulls[kind], 0.95))
            values.append(shares[kind][0] - nulls[kind].mean())
    # 180 tests at .05: nine expected, standard deviation three.
    assert 1 <= sum(crossed) <= 18
    assert abs(float(np.mean(values))) < 0.001


def test_bands_hold_the_truth() -> None:
    """Topics that each have an emotion effect of their own size: the band of the share covers its long-run value."""
    settings = replace(SETTINGS, permutations=20, bootstraps=100)
    partition, wording_P = flow.make_partition(DESIGN, settings), DESIGN.levels["template"]
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(20, 20)))[0][:6]
    values, bands = [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        size_P = rng.gamma(4.0, 0.25, size=16)[DESIGN.blocks_P]
        x_PD = rng.normal(size=(len(DESIGN), 20)) * 0.3 + size_P[:, None] * axes[DESIGN.levels[EMOTION]]
        shares, nulls = flow.variance_shares(flow.gram(x_PD, wording_P), partition)
        draws_R = flow.recentred(shares[EMOTION][0], shares[EMOTION][1:]) - nulls[EMOTION].mean()
        values.append(shares[EMOTION][0] - nulls[EMOTION].mean())
        bands.append(np.percentile(draws_R, [2.5, 97.5]))
    inside = [low <= np.mean(values) <= high for low, high in bands]
    # Nominal .95; percentile bands over sixteen topics run short, and 30 trials scatter by .04.
    assert np.mean(inside) >= 0.75
    assert np.ptp(bands, axis=1).mean() < 6 * np.std(values)


def test_a_closed_form_probe_finds_what_a_logistic_one_finds(found: flow.Measured) -> None:
    curve = found.accuracies[RESIDUAL, EMOTION]
    assert curve.value_L[8:].min() > 0.9 and curve.value_L[:8].max() < 0.27
    assert (curve.null_L > 1 / 6 - 0.03).all() and (curve.null_L < 0.27).all()
    assert found.accuracies[RESIDUAL, TOPIC].value_L[4:].min() > 0.8
    assert found.accuracies[RESIDUAL, TOPIC].value_L[:4].max() < 0.15
    # A weaker signal, where the two could differ.
    rng = np.random.default_rng(0)
    x_PD = planted_stream(DESIGN, ONSETS)[:, -1] + rng.normal(size=(len(DESIGN), WIDTH)) * 0.5
    x_PD = x_PD - pd.DataFrame(x_PD).groupby(DESIGN.levels["template"]).transform("mean").to_numpy()
    gram_PP = flow.gram(x_PD, DESIGN.levels["template"], standardise=True)
    y_P = DESIGN.levels[EMOTION]
    ours = flow.ridge_right(gram_PP, y_P[None], flow.probe_folds(DESIGN, EMOTION)).mean()
    logistic = probes.layer_curve(x_PD[:, None], y_P, list(DESIGN.blocks_P))[0]
    assert 0.4 < logistic < 0.9 and ours == pytest.approx(logistic, abs=0.06)


def test_probes_never_see_what_they_are_measured_on() -> None:
    for factor, held in ((EMOTION, TOPIC), ("person", TOPIC), (TOPIC, EMOTION)):
        folds_P = flow.probe_folds(DESIGN, factor)
        assert len(set(zip(folds_P, DESIGN.levels[held], strict=True))) == len(DESIGN.names[held])
    # Labels that follow the topic, and a signature of the topic: leaving topics out leaves nothing.
    rng = np.random.default_rng(0)
    signature = rng.normal(size=(16, 30))[DESIGN.blocks_P] + rng.normal(size=(len(DESIGN), 30)) * 0.1
    labels_P = rng.integers(0, 2, 16)[DESIGN.blocks_P]
    gram_PP = flow.gram(signature, np.zeros(len(DESIGN), dtype=int))
    assert flow.ridge_right(gram_PP, labels_P[None], flow.probe_folds(DESIGN, EMOTION)).mean() < 0.8
    assert flow.ridge_right(gram_PP, labels_P[None], np.arange(len(DESIGN)) % 4).mean() > 0.99


def test_planted_features_are_the_responsive_ones(found: flow.Measured) -> None:
    partition = flow.make_partition(DESIGN, SETTINGS)
    codes_PF = found.reading.codes[LAYERS - 1].toarray()
    rng = np.random.default_rng(0)
    told = flow.feature_information(codes_PF, DESIGN, partition.weights_RG, 60, rng)
    responsive = set(told.features_F[told.responsive()])
    assert set(range(2, 62)) <= responsive and len(responsive) <= 70
    assert abs(np.delete(told.value_F, np.arange(2, 62)).mean()) < 0.003
    value, draws_R, null_N = told.top(60)
    assert value > 5 * np.quantile(null_N, 0.95) and draws_R.std() > 0
    assert draws_R.mean() == pytest.approx(value)
    early = found.features[flow.RESPONSIVE].value_L[:8]
    assert early.mean() < 0.02 and found.features[flow.RESPONSIVE].value_L[8:].min() >= 60 / 120


def test_phases_of_known_profiles_and_of_noise() -> None:
    rng = np.random.default_rng(0)
    steps_LC = np.repeat([[1.0, 0.0, 0.0], [0.6, 1.0, 0.1], [0.2, 0.4, 1.0]], [5, 8, 7], axis=0)
    noisy_LC = steps_LC + rng.normal(size=steps_LC.shape) * 0.1
    assert flow.count_phases(noisy_LC, 6) == 3 and flow.segment(noisy_LC, 3) == (5, 13)
    assert flow.segment(steps_LC, 1) == () and flow.misfit(steps_LC, (5, 13)) == pytest.approx(0.0)
    chosen = [flow.count_phases(rng.normal(size=(20, 3)) * 0.1 + 0.8, 6) for _ in range(60)]
    # A boundary in plain noise is to be rare: at most one profile in ten.
    assert np.mean(np.array(chosen) > 1) <= 0.1


def test_onset_by_hand() -> None:
    zero = np.zeros(5)
    assert flow.onset(np.array([0.0, 0.0, 0.2, 0.8, 1.0]), zero, range(5)) == pytest.approx(2.5)
    assert flow.onset(np.array([0.0, 0.0, 0.2, 0.8, 1.0]), zero, [0, 2, 4, 8, 10]) == pytest.approx(6.0)
    assert flow.onset(np.array([0.9, 0.1, 0.2, 0.8, 1.0]), zero, range(5)) == 0.0
    assert np.isnan(flow.onset(np.array([0.0, 0.01, 0.0, 0.0, 0.0]), zero + 0.02, range(5)))


def test_a_missing_kind_leaves_the_claim_undecided() -> None:
    plain = flow.make_design(crossed_frame().assign(topic=None, person=None, tense=None), SETTINGS)
    stream = np.random.default_rng(0).normal(size=(len(plain), 6, 8)).astype(np.float32)
    stream[:, :, :6] += np.eye(6)[plain.levels[EMOTION]][:, None]
    settings = replace(SETTINGS, permutations=8, probe_shuffles=3, bootstraps=10)
    measured = flow.analyse(flow.Reading("planted", 6, tuple(range(6)), plain, {RESIDUAL: stream}), settings)
    assert measured.headline == RESIDUAL and measured.features == {}
    assert measured.claims[RESIDUAL]["verdict"].tolist() == [UNDECIDED]
    made = flow.tables(flow.Study({("planted", "planted"): measured}, ("isear",)))
    assert "lack what the tests need" in flow.finding(made, "planted", "planted")
    assert "It has no person, no tense, no topic." in flow.setting(flow.Study({("m", "planted"): measured}, ("isear",)))


def test_from_prompts_to_files(tiny: Callable[[str], LM], tmp_path: Path) -> None:
    """A real pass of a tiny model with dictionaries for two of its four layers."""
    lm = tiny("gemma3")
    settings = replace(SETTINGS, rows_per_emotion=12, permutations=6, probe_shuffles=3, bootstraps=10)
    design = flow.make_design(crossed_frame(), settings)
    dictionaries = load_dictionaries(lm, str(write(lm, tmp_path / "saes", (0, 2))))
    reading = flow.read(lm, design, settings, dictionaries)
    assert sorted(reading.codes) == [0, 2] and max(reading.invariance.values()) < 1e-4
    d = lm.d_model
    codes_PF = reading.codes[2].toarray()
    np.testing.assert_allclose(codes_PF[:, :d] - codes_PF[:, d:], reading.inside[RESIDUAL][:, 2], atol=1e-4)
    # Each prompt is read under its own wording.
    one = (design.rows["template"] == "reaction").to_numpy()
    direct = read_out(lm, build_prompts(lm, design.rows[one], template="reaction"), layers=[3]).resid_PLD
    assert direct is not None
    np.testing.assert_allclose(reading.inside[RESIDUAL][one, 3], direct[:, 0], rtol=1e-3, atol=1e-3)
    measured = flow.analyse(reading, settings)
    made = flow.save(flow.Study({(lm.name, "planted"): measured}, ()), settings, tmp_path / "out")
    assert set(made["shares"]["representation"]) == {CODES, RESIDUAL, flow.RAW, flow.ATTENTION, flow.FFN}
    for name in ("shares", "probes", "features", "lens", "claims", "invariance"):
        assert len(read_table(tmp_path / "out" / f"{name}.parquet")) == len(made[name]) > 0
    written = read_json(tmp_path / "out" / "claims.json")
    assert written[-1]["part"] == "" and written[-1]["verdict"] == UNDECIDED
    assert {c["claim"] for c in written} == {"C1"} and {c["dataset"] for c in written} == {"planted"}
    assert read_json(tmp_path / "out" / "settings.json")["missing"] == {"planted": []}
    curve = made["shares"].query("representation == 'codes' and factor == 'emotion'")
    assert curve["layer"].tolist() == [0, 2] and curve["depth"].tolist() == [0.0, pytest.approx(2 / 3)]
    assert (made["lens"]["low"] <= made["lens"]["value"]).all()
    assert "undecided" in flow.finding(made, lm.name, "planted")
