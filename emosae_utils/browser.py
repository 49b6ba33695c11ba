"""Feature cards: what a feature of a dictionary responds to, what it promotes, and where it goes on in other layers.

One call makes a card for a notebook; a page of cards is one HTML file that needs no server and nothing from elsewhere,
and can be searched and sorted where it lies. The same markup goes into the book as the output of a cell.

Vocabulary is read by the logit lens: the decoder row, scaled by the final norm's weights, times the output matrix,
relative to the mean token. The norm's division by the stream's size is left out, so values compare within a card only.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from emosae_utils import scoring
from emosae_utils.codes import Codes
from emosae_utils.files import EmosaeError, atomic_file, read_json, write_json
from emosae_utils.models import LM, decoder_layers, final_norm
from emosae_utils.saes import Dictionary

Array = np.ndarray[Any, np.dtype[Any]]

NEURONPEDIA = "https://www.neuronpedia.org"
# Candidates looked at for a list of printable tokens, and the length of the list.
CANDIDATES, N_TOKENS = 400, 10
# Steps of shading.
SHADES = 8
EFFECT_COLUMNS = ("layer", "feature", "emotion", "effect")


@dataclass(frozen=True)
class Shaded:
    """A prompt as the feature sees it.

    Attributes:
        row_id: of the text.
        emotion: its label.
        tokens: of the prompt, as text.
        activations: of the feature at each token; the first token is not read and counts 0.
    """

    row_id: str
    emotion: str
    tokens: tuple[str, ...]
    activations: tuple[float, ...]


@dataclass(frozen=True)
class Neighbour:
    """A feature of a neighbouring layer: cosine of the decoder rows, correlation of activations over the prompts."""

    layer: int
    feature: int
    by: str
    cosine: float
    correlation: float


@dataclass(frozen=True)
class FeatureCard:
    """What is known of one feature.

    Attributes:
        model, layer, feature: which one.
        kind: specific, shared, or empty if it was not found responsive.
        emotions: names of the emotions it belongs to, joined by commas.
        mi, q: information with the emotion label (nats) and its q value; None where not tested.
        entropy: normalised entropy of its means over emotions; None where not responsive.
        frequency: share of the prompts it is active on.
        maximum: greatest activation over the prompts.
        means: mean activation by emotion.
        texts: prompts on which it is most active.
        promoted, suppressed: tokens with their logits relative to the mean token.
        neighbours: the nearest features of the layers before and after.
        effects: causal effect by emotion, nats, where it was measured.
        link: its page on Neuronpedia, if its dictionary is a published one.
    """

    model: str
    layer: int
    feature: int
    kind: str
    emotions: str
    mi: float | None
    q: float | None
    entropy: float | None
    frequency: float
    maximum: float
    means: tuple[tuple[str, float], ...]
    texts: tuple[Shaded, ...]
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]
    neighbours: tuple[Neighbour, ...]
    effects: tuple[tuple[str, float], ...]
    link: str

    @property
    def name(self) -> str:
        """Layer and feature, as in "L12/345"."""
        return f"L{self.layer}/{self.feature}"

    def _repr_html_(self) -> str:
        return f'<div class="emosae-features">{STYLE}<h4>{html.escape(self.model)} {self.name}</h4>{_body(self)}</div>'


def card(
    lm: LM, dictionaries: Mapping[int, Dictionary], layer: int, feature: int, codes: Codes, **options: Any
) -> FeatureCard:
    """The card of one feature, shown as HTML in a notebook; `options` are those of `make_cards`.

    Raises:
        EmosaeError: for a layer without a dictionary or code, or a feature out of range.
    """
    return make_cards(lm, dictionaries, codes, [(layer, feature)], **options)[0]


def make_cards(
    lm: LM,
    dictionaries: Mapping[int, Dictionary],
    codes: Codes,
    chosen: Sequence[tuple[int, int]],
    *,
    facts: pd.DataFrame | None = None,
    effects: pd.DataFrame | None = None,
    template: str = scoring.DEFAULT_TEMPLATE,
    n_texts: int = 5,
    progress: str = "",
) -> tuple[FeatureCard, ...]:
    """The cards of several features, with one pass per prompt for all of them.

    Args:
        lm: the model.
        dictionaries: by layer.
        codes: read from this model; the texts on a card are among its rows.
        chosen: (layer, feature).
        facts: the table of the chapter on features, for information, entropy and kind.
        effects: causal effects, with columns layer, feature, emotion, effect (nats).
        template: the wording that `codes` was read with.
        n_texts: texts on a card.
        progress: a caption for a progress bar; none if empty.

    Raises:
        EmosaeError: for a layer without a dictionary or code, a feature out of range, or effects without a column.
    """
    for layer, feature in chosen:
        if layer not in dictionaries:
            raise EmosaeError(f"there is no dictionary for layer {layer}; there is one for {sorted(dictionaries)}")
        if not 0 <= feature < codes.dense(layer).shape[1]:
            raise EmosaeError(f"layer {layer} has features 0 to {dictionaries[layer].n_features - 1}; got {feature}")
    if effects is not None and (missing := [c for c in EFFECT_COLUMNS if c not in effects]):
        raise EmosaeError(f"a table of effects needs the column {missing[0]!r}; it has {list(effects.columns)}")
    layers = sorted({layer for layer, _ in chosen})
    active = {layer: codes.dense(layer) for layer in layers}
    top = {pair: _top_rows(active[pair[0]][:, pair[1]], n_texts) for pair in chosen}
    shown = sorted({row for rows in top.values() for row in rows})
    read = _token_codes(lm, dictionaries, codes.rows, shown, chosen, codes.labels, template, progress)
    vocabulary = vocabulary_of(lm, [dictionaries[layer].sae.W_dec[feature] for layer, feature in chosen])
    near = {layer: _neighbours(dictionaries, codes, layer, [f for at, f in chosen if at == layer]) for layer in layers}
    cards = []
    for (layer, feature), (promoted, suppressed) in zip(chosen, vocabulary, strict=True):
        row = _facts(facts, layer, feature)
        code_P = active[layer][:, feature]
        texts = [
            Shaded(str(codes.rows["row_id"].iloc[p]), str(codes.rows["emotion"].iloc[p]), *read[p, layer, feature])
            for p in top[layer, feature]
        ]
        mean = {e: float(code_P[(codes.rows["emotion"] == e).to_numpy()].mean()) for e in codes.labels}
        own = effects[(effects["layer"] == layer) & (effects["feature"] == feature)] if effects is not None else None
        pages = dictionaries[layer].neuronpedia
        cards.append(
            FeatureCard(
                model=codes.model,
                layer=layer,
                feature=feature,
                kind=str(row.get("kind", "")),
                emotions=str(row.get("emotions", "")),
                mi=_number(row.get("mi")),
                q=_number(row.get("q")),
                entropy=_number(row.get("entropy")),
                frequency=float((code_P > 0).mean()),
                maximum=float(code_P.max(initial=0.0)),
                means=tuple(mean.items()),
                texts=tuple(texts),
                promoted=promoted,
                suppressed=suppressed,
                neighbours=tuple(near[layer].get(feature, ())),
                effects=() if own is None else tuple(zip(own["emotion"], own["effect"].astype(float), strict=True)),
                link=f"{NEURONPEDIA}/{pages}/{feature}" if pages else "",
            )
        )
    return tuple(cards)


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _facts(facts: pd.DataFrame | None, layer: int, feature: int) -> Mapping[str, Any]:
    if facts is None:
        return {}
    hit = facts[(facts["layer"] == layer) & (facts["feature"] == feature)]
    return {str(k): v for k, v in hit.iloc[0].items()} if len(hit) else {}


def _top_rows(code_P: Array, n: int) -> list[int]:
    """Rows on which a feature is most active, the strongest first; silent rows never."""
    return [int(p) for p in np.argsort(-code_P, kind="stable")[:n] if code_P[p] > 0]


@torch.no_grad()
def _token_codes(
    lm: LM,
    dictionaries: Mapping[int, Dictionary],
    rows: pd.DataFrame,
    shown: Sequence[int],
    chosen: Sequence[tuple[int, int]],
    labels: Sequence[str],
    template: str,
    progress: str,
) -> dict[tuple[int, int, int], tuple[tuple[str, ...], tuple[float, ...]]]:
    """Tokens and activations at every token of some prompts, by (row, layer, feature).

    The first position is left out: its activations are like no other's and no dictionary here was trained on them.
    """
    import nnsight

    if not shown:
        return {}
    prompts = scoring.build_prompts(lm, rows.iloc[list(shown)], template=template, labels=labels)
    blocks, found = decoder_layers(lm.nn), {}
    wanted = {layer: [f for at, f in chosen if at == layer] for layer in sorted({layer for layer, _ in chosen})}
    quiet = scoring._quiet(progress)
    for row, ids in tqdm(list(zip(shown, prompts.ids, strict=True)), desc=progress, disable=quiet):
        inputs = torch.tensor([list(ids)], device=lm.device)
        batch = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
        with lm.nn.trace(batch, use_cache=False, logits_to_keep=1):
            read = []
            for layer in wanted:
                read.append(blocks[layer].output[0])
            read_LSD = nnsight.save(torch.stack(read))
        tokens = tuple(str(lm.tokenizer.decode([i])) for i in ids)
        for i, (layer, features) in enumerate(wanted.items()):
            codes_SF = dictionaries[layer].encode(read_LSD[i]).cpu().numpy()
            codes_SF[0] = 0.0
            for feature in features:
                found[row, layer, feature] = (tokens, tuple(float(a) for a in codes_SF[:, feature]))
    return found


def _final_norm_weight(lm: LM) -> torch.Tensor:
    """The factor by which the final norm scales each direction, [d_model]; its bias and its division are left out."""
    norm, dtype = final_norm(lm), getattr(torch, lm.dtype)
    if norm is None:
        return torch.ones(lm.d_model, device=lm.device)
    # A vector of mean zero and mean square one passes every kind of norm unscaled.
    signs_D = torch.tensor([1.0, -1.0], device=lm.device).repeat(lm.d_model // 2 + 1)[: lm.d_model]
    weight_D: torch.Tensor = (norm(signs_D.to(dtype)) - norm(-signs_D.to(dtype))).float() / 2 * signs_D
    return weight_D


@torch.no_grad()
def vocabulary_of(
    lm: LM, directions: Sequence[torch.Tensor]
) -> list[tuple[tuple[tuple[str, float], ...], tuple[tuple[str, float], ...]]]:
    """Tokens that each direction of the residual stream promotes and suppresses most, by the logit lens.

    Tokens that cannot be printed are left out; values are logits relative to the mean token.
    """
    if not directions:
        return []
    embedding_VD, gain_D = lm.hf.get_output_embeddings().weight, _final_norm_weight(lm)
    special, lists = set(lm.tokenizer.all_special_ids), []
    printable: dict[int, str] = {}
    for direction_D in directions:
        scaled_D = (direction_D.detach().to(lm.device).float() * gain_D).to(embedding_VD.dtype)
        logits_V = (embedding_VD @ scaled_D).float()
        logits_V -= logits_V.mean()
        sides = []
        for largest in (True, False):
            kept: list[tuple[str, float]] = []
            values, index = torch.topk(logits_V, min(CANDIDATES, len(logits_V)), largest=largest)
            for value, i in zip(values.tolist(), index.tolist(), strict=True):
                if i not in printable:
                    printable[i] = "" if i in special else _printable(str(lm.tokenizer.decode([i])))
                if printable[i]:
                    kept.append((printable[i], value))
                if len(kept) == N_TOKENS:
                    break
            sides.append(tuple(kept))
        lists.append((sides[0], sides[1]))
    return lists


def _printable(token: str) -> str:
    """A token that can be shown, with a leading space kept; else an empty string."""
    bare = token.strip()
    return token if bare and bare.isprintable() and "\ufffd" not in bare and not bare.startswith("<unused") else ""


def _unit(x_FD: Array) -> Array:
    unit_FD: Array = x_FD / np.maximum(np.linalg.norm(x_FD, axis=-1, keepdims=True), 1e-12)
    return unit_FD


def _neighbours(
    dictionaries: Mapping[int, Dictionary], codes: Codes, layer: int, features: Sequence[int]
) -> dict[int, list[Neighbour]]:
    """The nearest feature in the next dictionary below and above, by decoder row and by activation."""
    found: dict[int, list[Neighbour]] = {feature: [] for feature in features}
    have = sorted(set(dictionaries) & set(codes.layers))
    place, own_PF = have.index(layer), codes.dense(layer)[:, list(features)]
    w_FD = _unit(dictionaries[layer].sae.W_dec.detach().cpu().numpy()[list(features)])
    for other in have[max(0, place - 1) : place] + have[place + 1 : place + 2]:
        cosine_FN = w_FD @ _unit(dictionaries[other].sae.W_dec.detach().cpu().numpy()).T
        other_PN = codes.dense(other)
        correlation_FN = _unit((own_PF - own_PF.mean(axis=0)).T) @ _unit((other_PN - other_PN.mean(axis=0)).T).T
        for i, feature in enumerate(features):
            for by, near_N in (("decoder", cosine_FN[i]), ("activation", correlation_FN[i])):
                n = int(near_N.argmax())
                found[feature].append(Neighbour(other, n, by, float(cosine_FN[i, n]), float(correlation_FN[i, n])))
    return found


# Cards as files and pages.


def save_cards(path: Path, cards: Sequence[FeatureCard]) -> None:
    """Write cards as JSON, so that another chapter can show them again or add to them."""
    write_json(path, [asdict(item) for item in cards])


def load_cards(path: Path) -> tuple[FeatureCard, ...]:
    """Read cards that `save_cards` wrote.

    Raises:
        EmosaeError: if the file is missing or holds something else.
    """

    def pairs(values: Sequence[Sequence[Any]]) -> tuple[tuple[str, float], ...]:
        return tuple((str(name), float(value)) for name, value in values)

    try:
        return tuple(
            FeatureCard(
                **entry
                | {name: pairs(entry[name]) for name in ("means", "promoted", "suppressed", "effects")}
                | {
                    "texts": tuple(
                        Shaded(t["row_id"], t["emotion"], tuple(t["tokens"]), tuple(t["activations"]))
                        for t in entry["texts"]
                    ),
                    "neighbours": tuple(Neighbour(**n) for n in entry["neighbours"]),
                }
            )
            for entry in read_json(path)
        )
    except (TypeError, KeyError) as error:
        raise EmosaeError(f"{path} does not hold feature cards; run the chapter that writes it again") from error


def cards_html(cards: Sequence[FeatureCard]) -> str:
    """A searchable, sortable table of cards as an HTML fragment with its own style and script."""
    heads = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{name}</button></th>' for name, _ in _COLUMNS
    )
    rows = "".join(_row(i, item) for i, item in enumerate(cards))
    return (
        f'<div class="emosae-features">{STYLE}'
        '<p class="find"><label>Search <input type="search" placeholder="emotion, word, layer, type"></label> '
        f'<span role="status">{len(cards)} features</span></p>'
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>{rows}</table></div>{SCRIPT}</div>'
    )


def write_browser(path: Path, cards: Sequence[FeatureCard], title: str = "Feature browser") -> None:
    """Write the cards as one HTML page that opens without a server or a network."""
    safe = html.escape(title)
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{safe}</title></head>'
        f'<body style="margin:1.5rem;font-family:system-ui,sans-serif"><h1>{safe}</h1>{cards_html(cards)}'
        "</body></html>\n"
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _show(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"


# Heading, and what of a card stands below it; numbers sort as numbers.
_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("feature", lambda c: f"{c.layer}/{c.feature}"),
    ("model", lambda c: c.model),
    ("layer", lambda c: c.layer),
    ("type", lambda c: c.kind),
    ("emotions", lambda c: c.emotions),
    ("information (nats)", lambda c: c.mi),
    ("entropy", lambda c: c.entropy),
    ("active on", lambda c: c.frequency),
    ("maximum", lambda c: c.maximum),
)


def _row(i: int, item: FeatureCard) -> str:
    cells = []
    for name, value_of in _COLUMNS[1:]:
        value = value_of(item)
        if isinstance(value, str):
            cells.append(f"<td>{html.escape(value)}</td>")
        else:
            text = f"{value:.0%}" if name == "active on" else _show(value)
            cells.append(f'<td data-v="{"" if value is None else value}">{text}</td>')
    key = item.layer * 10**7 + item.feature
    opener = f'<button type="button" class="open" aria-expanded="false">{item.name}</button>'
    return (
        f'<tbody><tr><th scope="row" data-v="{key}">{opener}</th>{"".join(cells)}</tr>'
        f'<tr class="detail" hidden><td colspan="{len(_COLUMNS)}">{_body(item)}</td></tr></tbody>'
    )


def _bars(values: Sequence[tuple[str, float]], unit: str) -> str:
    top = max((abs(v) for _, v in values), default=0.0) or 1.0
    return "".join(
        f'<div class="bar"><span>{html.escape(name)}</span><i style="width:{100 * abs(v) / top:.0f}%"></i>'
        f"<b>{_show(v)}{unit}</b></div>"
        for name, v in values
    )


def _tokens(values: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"<code>{html.escape(token)}</code> {value:+.2g}" for token, value in values) or "none"


def _shaded(text: Shaded, maximum: float) -> str:
    """A prompt with each active token on a ground whose strength is the activation; the value is in its tooltip."""
    parts = []
    for token, activation in zip(text.tokens, text.activations, strict=True):
        safe = html.escape(token).replace("\n", "↵ ")
        if activation > 0:
            shade = max(1, min(SHADES, round(SHADES * activation / max(maximum, 1e-12))))
            parts.append(f'<span class="s{shade}" title="{_show(activation)}">{safe}</span>')
        else:
            parts.append(safe)
    return f"<li><em>{html.escape(text.emotion)}</em> {''.join(parts)}</li>"


def _body(item: FeatureCard) -> str:
    top = max([item.maximum, *(a for text in item.texts for a in text.activations)])
    known = (("q", item.q), ("information (nats)", item.mi), ("entropy", item.entropy), ("maximum", item.maximum))
    facts = [html.escape(v) for v in (item.kind, item.emotions) if v]
    facts += [f"{name} {_show(value)}" for name, value in known if value is not None]
    facts.append(f"active on {item.frequency:.0%} of prompts")
    if item.link:
        facts.append(f'<a href="{html.escape(item.link)}">on Neuronpedia</a>')
    near = "".join(
        f"<li>L{n.layer}/{n.feature}, nearest by {html.escape(n.by)}: cosine {n.cosine:.2f}, "
        f"correlation {n.correlation:.2f}</li>"
        for n in item.neighbours
    )
    blocks = [
        f"<p>{' · '.join(facts)}</p><div class='two'><div><h5>Mean activation by emotion</h5>{_bars(item.means, '')}",
        "<h5>Effect of removing it (nats)</h5>" + _bars(item.effects, "") if item.effects else "",
        f"</div><div><h5>Promotes</h5><p>{_tokens(item.promoted)}</p><h5>Suppresses</h5>"
        f"<p>{_tokens(item.suppressed)}</p>",
        f"<h5>In neighbouring layers</h5><ul>{near}</ul>" if near else "",
        "</div></div><h5>Most active on</h5><ol>" + "".join(_shaded(t, top) for t in item.texts) + "</ol>",
    ]
    return "".join(blocks)


# The book's theme brings rules for plain class names such as "card"; none of them is used here.
_DARK = "--ink:#e6e6e6;--faint:#9aa0a6;--line:#454a50;--ground:#1f2327;--bar:#56B4E9;--shade:86,180,233"
_SHADE_RULES = "".join(
    f".emosae-features .s{s}{{background:rgba(var(--shade),{0.12 + 0.6 * s / SHADES:.2f})}}"
    for s in range(1, SHADES + 1)
)
STYLE = (
    "<style>.emosae-features{--ink:#1f2328;--faint:#59636e;--line:#d5d9de;--ground:#f6f8fa;--bar:#0072B2;"
    "--shade:230,159,0;color:var(--ink);font-size:.9rem}"
    f'html[data-theme="dark"] .emosae-features{{{_DARK}}}'
    f"@media (prefers-color-scheme:dark){{html:not([data-theme]) .emosae-features{{{_DARK}}}}}"
    ".emosae-features [hidden]{display:none!important}"
    ".emosae-features .scroll{overflow:auto;max-height:80vh;border:1px solid var(--line)}"
    ".emosae-features table,.bd-article .cell_output .emosae-features table{border-collapse:collapse;width:100%;"
    "color:var(--ink)!important;font-size:.9em;margin:0;display:table}"
    ".emosae-features th,.emosae-features td{padding:.25em .4em!important;text-align:left;vertical-align:top;"
    "border-top:1px solid var(--line);color:var(--ink)!important;font-weight:400}"
    ".emosae-features thead th{position:sticky;top:0;background:var(--ground);border-top:0;z-index:1}"
    ".emosae-features button{all:unset;cursor:pointer;font-weight:600;color:var(--ink)}"
    ".emosae-features button:focus-visible,.emosae-features input:focus-visible{outline:2px solid var(--bar)}"
    '.emosae-features th[aria-sort="ascending"] button::after{content:" ▲"}'
    '.emosae-features th[aria-sort="descending"] button::after{content:" ▼"}'
    ".emosae-features .open{text-decoration:underline;white-space:nowrap}"
    ".emosae-features tr.detail td,.bd-article .cell_output .emosae-features tr.detail td{white-space:normal;"
    "background:var(--ground)}"
    ".emosae-features input{font:inherit;color:var(--ink);background:var(--ground);border:1px solid var(--line);"
    "border-radius:4px;padding:.2em .5em;width:18em;max-width:60%}"
    ".emosae-features .find span{color:var(--faint)}"
    ".emosae-features h5{margin:.7em 0 .2em;font-size:.95em;color:var(--faint)}"
    ".emosae-features p{margin:.2em 0}.emosae-features ul,.emosae-features ol{margin:.2em 0 .2em 1.3em;padding:0}"
    ".emosae-features li{margin:.15em 0}.emosae-features em{color:var(--faint)}"
    ".emosae-features code{background:none;border:1px solid var(--line);border-radius:3px;padding:0 .25em;"
    "color:var(--ink);white-space:pre}"
    ".emosae-features .two{display:grid;grid-template-columns:repeat(auto-fit,minmax(17em,1fr));gap:0 2em}"
    ".emosae-features .bar{display:grid;grid-template-columns:5.5em 1fr 4.5em;align-items:center;gap:.5em}"
    ".emosae-features .bar i{background:var(--bar);height:.7em;min-width:1px}"
    ".emosae-features .bar b{font-weight:400}"
    f"{_SHADE_RULES}</style>"
)
SCRIPT = """<script>(function () {
  const root = document.currentScript.parentElement, table = root.querySelector("table");
  const bodies = Array.from(table.tBodies), heads = Array.from(table.tHead.rows[0].cells);
  const status = root.querySelector("[role=status]"), field = root.querySelector("input");
  // Every card names every emotion in its bars and beside its texts; those would match any search for one.
  const words = bodies.map(b => {
    const copy = b.cloneNode(true);
    copy.querySelectorAll(".bar, em, h5").forEach(e => e.remove());
    return copy.textContent.toLowerCase();
  });
  field.addEventListener("input", () => {
    const asked = field.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let n = 0;
    bodies.forEach((b, i) => { const hit = asked.every(w => words[i].includes(w)); b.hidden = !hit; n += hit; });
    status.textContent = n + " of " + bodies.length + " features";
  });
  const value = (body, at) => {
    const cell = body.rows[0].cells[at], v = cell.dataset.v;
    return v === undefined ? cell.textContent : (v === "" ? -Infinity : Number(v));
  };
  heads.forEach((head, at) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending", sign = down ? -1 : 1;
    heads.forEach(h => h.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sorted = Array.from(table.tBodies).sort((a, b) => {
      const x = value(a, at), y = value(b, at);
      return sign * (x < y ? -1 : x > y ? 1 : 0);
    });
    sorted.forEach(b => table.appendChild(b));
  }));
  table.addEventListener("click", event => {
    const button = event.target.closest(".open");
    if (!button) return;
    const detail = button.closest("tbody").rows[1];
    detail.hidden = !detail.hidden;
    button.setAttribute("aria-expanded", String(!detail.hidden));
  });
})();</script>"""
