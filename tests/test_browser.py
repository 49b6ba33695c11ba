"""Feature cards: what they say is what the model and the dictionary do, and their page is safe and whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from emosae_utils import browser
from emosae_utils.browser import FeatureCard
from emosae_utils.codes import Codes, read_codes
from emosae_utils.files import EmosaeError
from emosae_utils.models import LM
from emosae_utils.saes import Dictionary
from emosae_utils.scoring import build_prompts
from tests.conftest import TEXTS
from tests.test_saes import basis

LABELS = ("anger", "joy")


@pytest.fixture
def lm(tiny: Callable[[str], LM]) -> LM:
    return tiny("gemma3")


@pytest.fixture
def dictionaries(lm: LM) -> dict[int, Dictionary]:
    return {layer: Dictionary(layer, basis(lm, layer), "made here") for layer in (0, 1, 3)}


@pytest.fixture
def codes(lm: LM, dictionaries: dict[int, Dictionary]) -> Codes:
    rows = pd.DataFrame({"row_id": [f"event/{i}" for i in range(len(TEXTS))], "text": TEXTS})
    rows["emotion"] = ["anger", "joy"] * 3 + ["anger"]
    return read_codes(lm, build_prompts(lm, rows, labels=LABELS), dictionaries, rows)


def test_a_card_says_what_the_codes_say(lm: LM, dictionaries: Mapping[int, Dictionary], codes: Codes) -> None:
    facts = pd.DataFrame(
        {"layer": [1], "feature": [5], "mi": [0.3], "q": [0.01], "entropy": [0.4], "kind": ["specific"]}
    )
    card = browser.card(lm, dictionaries, 1, 5, codes, facts=facts, n_texts=3)
    code_P = codes.dense(1)[:, 5]
    assert card.maximum == pytest.approx(code_P.max()) and card.frequency == pytest.approx((code_P > 0).mean())
    own = (codes.rows["emotion"] == "joy").to_numpy()
    assert dict(card.means)["joy"] == pytest.approx(code_P[own].mean())
    assert (card.mi, card.q, card.entropy, card.kind) == (0.3, 0.01, 0.4, "specific")
    order = [f"event/{p}" for p in np.argsort(-code_P) if code_P[p] > 0][:3]
    assert [text.row_id for text in card.texts] == order and order
    for text in card.texts:
        # The last token is the read-out position, where the codes were read; the first is never read.
        row = codes.rows.index[codes.rows["row_id"] == text.row_id][0]
        assert text.activations[-1] == pytest.approx(code_P[row], abs=1e-4)
        assert text.activations[0] == 0.0 and len(text.tokens) == len(text.activations)
        assert codes.rows["text"][row] in "".join(text.tokens)
    assert card.link == "" and card.effects == ()


def test_activations_at_every_token_are_those_of_a_plain_pass(
    lm: LM, dictionaries: Mapping[int, Dictionary], codes: Codes
) -> None:
    card = browser.card(lm, dictionaries, 1, 5, codes, n_texts=1)
    row = codes.rows.index[codes.rows["row_id"] == card.texts[0].row_id][0]
    (ids,) = build_prompts(lm, codes.rows.iloc[[row]], labels=LABELS).ids
    with torch.no_grad():
        hidden_SD = lm.hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
    # Feature 5 of this dictionary is the positive part of dimension 5.
    np.testing.assert_allclose(card.texts[0].activations[1:], hidden_SD[1:, 5].clamp(min=0), atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_vocabulary_of_a_known_direction_is_found(tiny: Callable[[str], LM], family: str) -> None:
    lm = tiny(family)
    token = lm.tokenizer(" window")["input_ids"][0]
    weight_VD, gain_D = lm.hf.get_output_embeddings().weight, browser._final_norm_weight(lm)
    norm = lm.hf.model.norm.weight
    torch.testing.assert_close(gain_D, norm if family == "llama" else 1 + norm, atol=1e-3, rtol=1e-3)
    direction_D = weight_VD[token] / gain_D
    ((promoted, suppressed),) = browser.vocabulary_of(lm, [direction_D])
    assert promoted[0][0] == " window"
    logits_V = weight_VD @ (direction_D * gain_D)
    assert promoted[0][1] == pytest.approx(float(logits_V[token] - logits_V.mean()), rel=1e-3)
    assert suppressed[0][1] < 0 and suppressed[0][1] == min(value for _, value in suppressed)
    assert all(token.strip().isprintable() and token.strip() for token, _ in (*promoted, *suppressed))


def test_neighbours_are_the_nearest_in_the_layers_at_hand(
    lm: LM, dictionaries: Mapping[int, Dictionary], codes: Codes
) -> None:
    """All three dictionaries have the same rows, so by decoder each feature's neighbour is itself."""
    card = browser.card(lm, dictionaries, 1, 7, codes)
    assert [(n.layer, n.by) for n in card.neighbours] == [
        (0, "decoder"), (0, "activation"), (3, "decoder"), (3, "activation")
    ]  # fmt: skip
    assert [(n.feature, round(n.cosine, 5)) for n in card.neighbours if n.by == "decoder"] == [(7, 1.0), (7, 1.0)]
    below = next(n for n in card.neighbours if n.layer == 0 and n.by == "activation")
    with np.errstate(invalid="ignore"):
        all_F = np.array([np.corrcoef(codes.dense(1)[:, 7], column)[0, 1] for column in codes.dense(0).T])
    assert below.correlation == pytest.approx(np.nanmax(all_F), abs=1e-4) and below.feature == np.nanargmax(all_F)
    assert [n.layer for n in browser.card(lm, dictionaries, 0, 7, codes).neighbours] == [1, 1]


def test_effects_and_published_pages_are_shown(lm: LM, dictionaries: Mapping[int, Dictionary], codes: Codes) -> None:
    published = {**dictionaries, 1: replace(dictionaries[1], neuronpedia="gemma-3-270m/1-res")}
    effects = pd.DataFrame({"layer": [1, 1, 0], "feature": [5, 6, 5], "emotion": "joy", "effect": [-0.25, 9.0, 9.0]})
    card = browser.card(lm, published, 1, 5, codes, effects=effects)
    assert card.effects == (("joy", -0.25),)
    assert card.link == "https://www.neuronpedia.org/gemma-3-270m/1-res/5"
    page = card._repr_html_()
    assert 'href="https://www.neuronpedia.org/gemma-3-270m/1-res/5"' in page and "Effect of removing it" in page
    assert "-0.25" in page
    plain = browser.card(lm, dictionaries, 1, 5, codes)._repr_html_()
    assert "neuronpedia.org" not in plain and "Effect of removing it" not in plain


class Whole(HTMLParser):
    """Collects tags and checks that they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.outside += [str(v) for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "input", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag


def test_hostile_text_stays_text(lm: LM, dictionaries: Mapping[int, Dictionary], codes: Codes, tmp_path: Path) -> None:
    bad = "<script>alert(1)</script><img src=x onerror=\"alert('2')\"> & more"
    rows = codes.rows.assign(text=bad, emotion=["anger", "joy"] * 3 + ["anger"])
    hostile = read_codes(lm, build_prompts(lm, rows, labels=LABELS), dictionaries, rows)
    facts = pd.DataFrame({"layer": [1], "feature": [5], "kind": ["</td><script>x"], "emotions": ["<b>joy"]})
    pair = next((1, int(f)) for f in np.flatnonzero(hostile.dense(1).max(axis=0) > 0) if f != 5)
    cards = browser.make_cards(lm, dictionaries, hostile, [(1, 5), pair], facts=facts)
    cards = tuple(replace(c, promoted=(("</code><script>y", 1.0),), model="<script>m") for c in cards)
    browser.write_browser(tmp_path / "page.html", cards, title="<script>t")
    page = (tmp_path / "page.html").read_text()
    assert "<img" not in page and page.count("<script") == 1
    parser = Whole()
    parser.feed(page)
    assert parser.open == [] and parser.seen.count("script") == 1 and "b" in parser.seen
    assert "onerror" not in re.sub(r">[^<]*<", "><", page)
    assert cards[1]._repr_html_().count("<script") == 0


def test_the_page_needs_nothing_from_elsewhere(
    lm: LM, dictionaries: Mapping[int, Dictionary], codes: Codes, tmp_path: Path
) -> None:
    chosen = [(1, f) for f in range(4)]
    cards = browser.make_cards(lm, dictionaries, codes, chosen)
    browser.write_browser(tmp_path / "page.html", cards)
    page = (tmp_path / "page.html").read_text()
    parser = Whole()
    parser.feed(page)
    assert parser.outside == [] and "@import" not in page and "url(" not in page and "http" not in page
    # One heading button per column and one opener per feature, each reachable by keyboard, and a labelled search.
    assert page.count('aria-sort="none"') == len(browser._COLUMNS)
    assert page.count('aria-expanded="false"') == 4
    assert re.search(r"<label>Search <input type=\"search\"", page)
    assert 'html[data-theme="dark"]' in page and "prefers-color-scheme:dark" in page
    for _, feature in chosen:
        assert f">L1/{feature}<" in page


def test_a_page_of_many_cards_is_small(lm: LM, dictionaries: Mapping[int, Dictionary], codes: Codes) -> None:
    card = browser.card(lm, dictionaries, 1, 5, codes, n_texts=1)
    long = replace(card.texts[0], tokens=(" something",) * 80, activations=(0.5,) * 80)
    full = replace(card, texts=(long,) * 5)
    assert 150 * 5 * 80 * 10 < len(browser.cards_html([full] * 150)) < 5_000_000


def test_cards_come_back_as_they_went(
    lm: LM, dictionaries: Mapping[int, Dictionary], codes: Codes, tmp_path: Path
) -> None:
    effects = pd.DataFrame({"layer": [1], "feature": [5], "emotion": ["joy"], "effect": [0.5]})
    cards: tuple[FeatureCard, ...] = browser.make_cards(lm, dictionaries, codes, [(1, 5), (3, 2)], effects=effects)
    browser.save_cards(tmp_path / "cards.json", cards)
    assert browser.load_cards(tmp_path / "cards.json") == cards
    (tmp_path / "cards.json").write_text('[{"model": "m"}]')
    with pytest.raises(EmosaeError, match="does not hold feature cards"):
        browser.load_cards(tmp_path / "cards.json")


def test_bad_input_is_one_line(lm: LM, dictionaries: Mapping[int, Dictionary], codes: Codes) -> None:
    with pytest.raises(EmosaeError, match=r"no dictionary for layer 2; there is one for \[0, 1, 3\]"):
        browser.card(lm, dictionaries, 2, 5, codes)
    with pytest.raises(EmosaeError, match=r"layer 1 has features 0 to 63; got 64"):
        browser.card(lm, dictionaries, 1, 64, codes)
    with pytest.raises(EmosaeError, match="needs the column 'emotion'"):
        browser.card(lm, dictionaries, 1, 5, codes, effects=pd.DataFrame(columns=["layer", "feature"]))
    assert browser.make_cards(lm, dictionaries, codes, []) == ()
