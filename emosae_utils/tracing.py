"""Exact causal tracing at the read-out position: edit features or streams there and see what the labels' scores do.

Nothing before the read-out position depends on it, so an edit there needs neither a full pass nor a gradient. The keys
and values of a prompt without its last token are computed once; of an edited prompt only the last token is computed
again, and only in the layers after the edit. All edits of a prompt, of all layers, are rows of one sweep over the
layers: a row joins where its edit is, and every row attends to the same keys and values, which are never copied. The
blocks are the model's own modules, run with an attention function that knows the rows.

The SAE error is always kept: an edit moves the residual along decoder rows, x + sum_f (a'_f - a_f) d_f.

Where exact is too dear there are two estimates of the same table: attribution patching (Syed et al. 2023, "Attribution
patching outperforms automated circuit discovery") and integrated gradients over the features of a layer (Marks et al.
2024, "Sparse feature circuits").

Shapes: P prompts, R rows (edited copies of a prompt), L layers, S suffix positions, D width of the stream, E labels,
N edits in long form, F features.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from emosae_utils.files import EmosaeError, pick
from emosae_utils.models import DTYPES, LM, decoder_layers, final_norm, free_memory, writer_names
from emosae_utils.saes import Dictionary
from emosae_utils.scoring import (
    MIN_SHARED_TOKENS,
    FloatArray,
    Prompts,
    _quiet,
    capped,
    first_tokens_differ,
    gold_logit_difference,
    label_differences,
    read_out,
    shared_prefix,
)

Array = np.ndarray[Any, np.dtype[Any]]
Scores = Literal["difference", "logp"]
# (layer, feature, operation, value). `feature` is a feature of the layer's dictionary, or the name of a site.
Edit = tuple[int, int | str, str, Any]

# The residual stream after a block, and what its attention and its feed-forward layer add to the stream.
SITES = ("residual", "attention", "ffn")
OPERATIONS = ("zero", "set", "mean", "patch", "scale", "add")
# Model types whose blocks the engine is tested on.
FAMILIES: tuple[str, ...] = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
# Rows per sweep: enough to keep the matrix products busy, few enough to stay in the processor's cache.
BATCH_ROWS = 512
# Rows of the whole vocabulary held at a time.
_VOCABULARY_ROWS = 64
_ATTENTION = "emosae_suffix"


@dataclass(frozen=True)
class Effects:
    """What single-feature edits do to the label scores, one line per edit, by prompt and layer.

    Attributes:
        prompt_N: index of the prompt.
        layer_N: layer of the feature.
        feature_N: the feature, in the layer's dictionary.
        activation_N: its activation before the edit.
        scores_NE: label scores after the edit, nats.
        clean_PE: label scores without any edit, nats.
        labels: names of the score columns.
        operation: what was done to the feature.
        method: "exact", or the name of the estimate.
        scores: "difference" (label logits minus their mean) or "logp".
        full_strings: whether the scores are those of the full label strings (False: of their first tokens).
        notes: what the reader should know, such as a fallback that was taken.
    """

    prompt_N: Array
    layer_N: Array
    feature_N: Array
    activation_N: FloatArray
    scores_NE: FloatArray
    clean_PE: FloatArray
    labels: tuple[str, ...]
    operation: str
    method: str
    scores: str
    full_strings: bool
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt_N)

    @property
    def effects_NE(self) -> FloatArray:
        """Change of each label score by the edit, nats."""
        return self.scores_NE - self.clean_PE[self.prompt_N]

    def gold_effects(self, gold_P: Array) -> FloatArray:
        """Change of the gold logit difference by each edit, [N], nats; `gold_P` is the label index of each prompt."""
        return gold_logit_difference(self.effects_NE, np.asarray(gold_P)[self.prompt_N])


@dataclass(frozen=True)
class Edited:
    """Label scores under sets of edits.

    Attributes:
        scores_PRE: scores of each prompt under each row of edits, nats.
        clean_PE: scores without any edit, nats.
        labels: names of the score columns.
        scores: "difference" (label logits minus their mean) or "logp".
        full_strings: whether the scores are those of the full label strings (False: of their first tokens).
        notes: what the reader should know, such as a fallback that was taken.
    """

    scores_PRE: FloatArray
    clean_PE: FloatArray
    labels: tuple[str, ...]
    scores: str
    full_strings: bool
    notes: tuple[str, ...] = ()

    @property
    def effects_PRE(self) -> FloatArray:
        """Change of each label score by each row of edits, nats."""
        return self.scores_PRE - self.clean_PE[:, None]


@dataclass(frozen=True)
class Noise:
    """How far rounding moves the effect of one and the same edit between this dtype and a full float32 pass, nats."""

    prefix_dtype: str
    suffix_dtype: str
    median: float
    p95: float
    largest: float
    n: int

    def __str__(self) -> str:
        return (
            f"{self.prefix_dtype} prefix, {self.suffix_dtype} suffix: rounding moves an effect by "
            f"{self.median:.1e} nats (median), {self.p95:.1e} (95 %), {self.largest:.1e} (largest of {self.n})"
        )


@dataclass(frozen=True)
class _Change:
    """One edit as an affine map of what stands at its place: new = gain * old + shift.

    `feature` is -1 on the streams. `gain_P` is [P]; `shift` is [P] on features and [P, D] on streams, or None until it
    is read from `donors_P` (prompt indices) or, without those, from the mean over all prompts.
    """

    layer: int
    site: str
    feature: int
    gain_P: FloatArray
    shift: FloatArray | None
    donors_P: Array | None = None

    def shift_of(self, p: int) -> Array:
        """What is added for prompt `p`: a number or [D]."""
        assert self.shift is not None, "resolved before use"
        return np.asarray(self.shift[p])


def _check_model(lm: LM, prompts: Prompts, dictionaries: Mapping[int, Dictionary], dtype: str) -> None:
    kind = str(lm.hf.config.get_text_config().model_type)
    if kind not in FAMILIES:
        raise EmosaeError(f"{lm.name} is of type {kind!r}, whose blocks tracing does not know: {', '.join(FAMILIES)}")
    pick("dtype", dtype, DTYPES)
    if not len(prompts):
        raise EmosaeError("there are no prompts to trace")
    if any(len(ids) < 2 for ids in prompts.ids):
        raise EmosaeError("a prompt of one token has no prefix; give prompts of at least two tokens")
    for layer, dictionary in dictionaries.items():
        if not 0 <= layer < lm.n_layers:
            raise EmosaeError(f"{lm.name} has layers 0 to {lm.n_layers - 1}; got a dictionary for layer {layer}")
        if dictionary.d_model != lm.d_model:
            raise EmosaeError(f"{dictionary.origin} reads {dictionary.d_model} dimensions, {lm.name} has {lm.d_model}")
        if str(dictionary.sae.cfg.normalize_activations) == "layer_norm":
            raise EmosaeError(f"{dictionary.origin} rescales each input, so its decoder rows are not fixed directions")


def _values(what: str, value: Any, shapes: Sequence[tuple[int, ...]]) -> FloatArray:
    """A number or array of one of `shapes`, float64.

    Raises:
        EmosaeError: if it is none, is of another shape or is not finite.
    """
    if value is None:
        raise EmosaeError(f"{what} needs a value, got None")
    try:
        array = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value, dtype=float)
    except (TypeError, ValueError):
        raise EmosaeError(f"{what} needs numbers as its value, got {type(value).__name__}") from None
    if array.shape not in shapes:
        wanted = " or ".join(str(list(shape)) if shape else "a number" for shape in shapes)
        raise EmosaeError(f"{what} needs {wanted} as its value, got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise EmosaeError(f"{what} has a value that is not finite")
    return array


def _change(lm: LM, n_prompts: int, edit: Edit, dictionaries: Mapping[int, Dictionary]) -> _Change:
    if not isinstance(edit, tuple) or len(edit) != 4:
        raise EmosaeError(f"an edit is a tuple (layer, feature, operation, value), got {edit!r:.80}")
    layer, feature, operation, value = edit
    what = f"the edit ({layer!r}, {feature!r}, {operation!r})"
    if isinstance(layer, bool) or not isinstance(layer, int | np.integer) or not 0 <= layer < lm.n_layers:
        raise EmosaeError(f"{what} is out of range: {lm.name} has layers 0 to {lm.n_layers - 1}")
    pick("operation", str(operation), OPERATIONS)
    if isinstance(feature, str):
        site, index = pick("site", feature, SITES), -1
        vector = [(lm.d_model,), (n_prompts, lm.d_model)]
    elif isinstance(feature, bool) or not isinstance(feature, int | np.integer):
        raise EmosaeError(f"{what} needs the number of a feature or one of {', '.join(SITES)}")
    elif layer not in dictionaries:
        raise EmosaeError(
            f"{what} names a feature and layer {layer} has no dictionary; there are {sorted(dictionaries)}"
        )
    elif not 0 <= feature < dictionaries[layer].n_features:
        raise EmosaeError(
            f"{what} names an unknown feature; layer {layer} has 0 to {dictionaries[layer].n_features - 1}"
        )
    else:
        site, index, vector = "feature", int(feature), [(), (n_prompts,)]
    if operation in ("zero", "mean") and value is not None:
        raise EmosaeError(f"{what} takes None as its value; use 'set' to give one")
    ones_P, zeros_P = np.ones(n_prompts), np.zeros(n_prompts)
    width = (n_prompts,) if site == "feature" else (n_prompts, lm.d_model)
    if operation == "mean":
        return _Change(int(layer), site, index, zeros_P, None)
    if operation == "patch":
        donors = _values(what, value, [(), (n_prompts,)])
        if (donors != donors.round()).any() or (donors < 0).any() or (donors >= n_prompts).any():
            raise EmosaeError(f"{what} takes the index of a prompt, 0 to {n_prompts - 1}, as its value")
        return _Change(int(layer), site, index, zeros_P, None, np.broadcast_to(donors.astype(int), (n_prompts,)))
    if operation == "scale":
        gain_P = np.broadcast_to(_values(what, value, [(), (n_prompts,)]), (n_prompts,))
        return _Change(int(layer), site, index, gain_P, np.zeros(width))
    shift = np.zeros(width) if operation == "zero" else _values(what, value, vector)
    if site == "feature" or shift.ndim == 1:
        shift = np.broadcast_to(shift, width)
    return _Change(int(layer), site, index, ones_P if operation == "add" else zeros_P, shift)


def _compile(
    lm: LM, prompts: Prompts, edits: Sequence[Edit | Sequence[Edit]], dictionaries: Mapping[int, Dictionary]
) -> list[list[_Change]]:
    """Rows of checked changes; a bare tuple is a row of one."""
    if isinstance(edits, tuple) and len(edits) == 4 and isinstance(edits[0], int | np.integer):
        raise EmosaeError("edits are a list of rows; put a single edit into a list")
    if not len(edits):
        raise EmosaeError("the set of edits is empty")
    rows = []
    for r, row in enumerate(edits):
        single = isinstance(row, tuple) and (not row or not isinstance(row[0], tuple | list))
        members: Sequence[Any] = [row] if single else list(row)
        if not members:
            raise EmosaeError(f"row {r} of the edits is an empty set")
        changes = [_change(lm, len(prompts), edit, dictionaries) for edit in members]
        places = [(c.layer, c.site, c.feature) for c in changes]
        if len(set(places)) < len(places):
            twice = next(place for place in places if places.count(place) > 1)
            raise EmosaeError(f"row {r} edits layer {twice[0]}, {twice[1]} {twice[2]} twice; merge the two edits")
        rows.append(changes)
    return rows


def _resolve(
    lm: LM, prompts: Prompts, rows: list[list[_Change]], dictionaries: Mapping[int, Dictionary]
) -> list[list[_Change]]:
    """Read what "mean" and "patch" put in place, in full passes over the prompts."""
    open_ = {(c.layer, c.site) for row in rows for c in row if c.shift is None}
    if not open_:
        return rows
    layers = sorted({layer for layer, _ in open_})
    parts = any(site in ("attention", "ffn") for _, site in open_)
    read = read_out(lm, prompts, layers=layers, mode="first", parts=parts)
    by_site = {"residual": read.resid_PLD, "feature": read.resid_PLD, "attention": read.attn_PLD, "ffn": read.ffn_PLD}
    found: dict[tuple[int, str], Array] = {}
    for layer, site in open_:
        x_PLD = by_site[site]
        assert x_PLD is not None
        found[layer, site] = x_PLD[:, layers.index(layer)]
        if site == "feature":
            found[layer, site] = dictionaries[layer].encode(torch.from_numpy(found[layer, site].copy())).cpu().numpy()

    def filled(change: _Change) -> _Change:
        if change.shift is not None:
            return change
        values = found[change.layer, change.site].astype(float)
        values = values[:, change.feature] if change.site == "feature" else values
        mean = np.broadcast_to(values.mean(axis=0), values.shape)
        return replace(change, shift=mean if change.donors_P is None else values[change.donors_P])

    return [[filled(change) for change in row] for row in rows]


def _writer(block: Any, family: tuple[str, str], site: str) -> Any:
    """The module of a block, or of its nnsight mirror, that writes what attention or the FFN adds to the stream."""
    return getattr(block, family[0] if site == "attention" else family[1])


@dataclass(frozen=True)
class _Tree:
    """The positions of a suffix: the read-out, and the tokens of labels that need more than one.

    `offsets_S` counts positions from the read-out, `sees_SS` says which suffix positions each one attends to, and
    `targets` lists (position, label, token): whose log p after that position belongs to which label.
    """

    tokens: tuple[int, ...]
    offsets_S: torch.Tensor
    sees_SS: torch.Tensor
    targets: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class _Suffix:
    """What the attention function needs: keys and values of the prefix by layer, [kv heads, prefix, head], the tree."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    tree: _Tree


@dataclass(frozen=True)
class _Clean:
    """An unedited suffix: the stream entering block 0 and leaving each block, [L + 1, S, D], and its surroundings."""

    stream_LSD: torch.Tensor
    rotary: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    suffix: _Suffix

    def after(self, layer: int) -> torch.Tensor:
        """The stream after a block, [S, D]; -1 is before the first."""
        return self.stream_LSD[layer + 1]


def _suffix_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    suffix: Sequence[tuple[_Suffix, int]] = (),
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of rows of several prompts: those of one share its prefix, and no row sees another.

    Args:
        module: the attention module.
        query: [1, heads, rows * S, head]; the S positions of a row stand together, and the rows of a prompt.
        key: of the suffix itself, [1, kv heads, rows * S, head].
        value: as `key`.
        attention_mask: not used; the suffix knows what it sees.
        suffix: keys and values of each prompt's prefix, and how many positions its rows have in all.
        options: whatever else a model hands to its attention.

    Returns:
        [1, rows * S, heads, head], as transformers wants it.
    """
    parts = (
        torch.split(query, [n for _, n in suffix], dim=2),
        *(torch.split(x, [n for _, n in suffix], dim=2) for x in (key, value)),
    )
    made = [_attend(module, q, k, v, own, **options) for q, k, v, (own, _) in zip(*parts, suffix, strict=True)]
    return torch.cat(made, dim=1), None


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    suffix: _Suffix,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """Attention of rows that share a prefix and do not see each other, [1, rows * S, heads, head].

    `scaling` is of the scores, head ** -0.5 if None; `softcap` their bound, if the model has one; `sliding_window` how
    many positions back a layer sees, itself included, all if None.
    """
    prefix_KPH, values_KPH = suffix.keys[module.layer_idx], suffix.values[module.layer_idx]
    n_kv, n_past, width = prefix_KPH.shape
    n_pos = len(suffix.tree.tokens)
    shape = (n_kv, query.shape[1] // n_kv, query.shape[2] // n_pos, n_pos)
    q_KXH = query[0].reshape(n_kv, -1, width)
    q_KGRSH = q_KXH.view(*shape, width)
    k_KGRSH, v_KGRSH = (x[0].reshape(n_kv, 1, *shape[2:], width) for x in (key, value))
    past_KGRSP = (q_KXH @ prefix_KPH.transpose(1, 2)).view(*shape, n_past)
    # A tiny matrix product per row is slower than a sum.
    own_KGRST = (q_KGRSH * k_KGRSH).sum(-1, keepdim=True) if n_pos == 1 else q_KGRSH @ k_KGRSH.transpose(-1, -2)
    scores_KGRSX = torch.cat([past_KGRSP, own_KGRST], dim=-1) * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores_KGRSX = torch.tanh(scores_KGRSX / softcap) * softcap
    hidden_SX = _hidden(suffix.tree, n_past, sliding_window)
    if hidden_SX is not None:
        scores_KGRSX = scores_KGRSX.masked_fill(hidden_SX, -torch.inf)
    weights_KGRSX = torch.softmax(scores_KGRSX, dim=-1, dtype=torch.float32).to(query.dtype)
    past_KGRSP, own_KGRST = weights_KGRSX[..., :n_past], weights_KGRSX[..., n_past:]
    out_KGRSH = (past_KGRSP.reshape(n_kv, -1, n_past) @ values_KPH).view(*shape, width)
    out_KGRSH = out_KGRSH + (own_KGRST * v_KGRSH if n_pos == 1 else own_KGRST @ v_KGRSH)
    return out_KGRSH.view(query.shape[1], query.shape[2], width).transpose(0, 1)[None]


def _hidden(tree: _Tree, n_past: int, sliding_window: int | None) -> torch.Tensor | None:
    """Which of the prefix and suffix positions each suffix position does not see, [S, prefix + S]; None if it sees all.

    The prefix ends just before the read-out, so its last position has offset -1.
    """
    n_pos = len(tree.tokens)
    if n_pos == 1 and (sliding_window is None or n_past < sliding_window):
        return None
    past_P = torch.arange(-n_past, 0, device=tree.offsets_S.device)
    offsets_X = torch.cat([past_P, tree.offsets_S])
    hidden_SX = torch.cat([torch.zeros((n_pos, n_past), dtype=torch.bool, device=past_P.device), ~tree.sees_SS], dim=1)
    if sliding_window is not None:
        hidden_SX = hidden_SX | (offsets_X[None, :] <= tree.offsets_S[:, None] - sliding_window)
    return hidden_SX


@contextmanager
def _shared_prefix_mode(lm: LM) -> Iterator[None]:
    """Run the model's blocks with `_suffix_attention`, and put everything back."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _suffix_attention)
    config = decoder_layers(lm.hf)[0].self_attn.config
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


_TWINS: weakref.WeakKeyDictionary[Any, dict[str, LM]] = weakref.WeakKeyDictionary()


def _in_dtype(lm: LM, dtype: str) -> LM:
    """The same model computing in `dtype`; a copy, made once, if that is not what it does already.

    Raises:
        EmosaeError: if the copy does not fit into memory.
    """
    if lm.dtype == dtype:
        return lm
    from transformers.initialization import no_init_weights

    twins = _TWINS.setdefault(lm.hf, {})
    if dtype not in twins:
        kind = getattr(torch, dtype)
        need = sum(p.numel() for p in lm.hf.parameters()) * torch.finfo(kind).bits // 8
        if need > (free := free_memory(lm.device)):
            raise EmosaeError(
                f"a {dtype} copy of {lm.name} needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
                f"use dtype={lm.dtype!r} and look at its noise floor"
            )
        # A model that nnsight has wrapped is not for copying, so the copy is built empty and filled. Only parameters
        # are cast: the frequencies of the rotary embedding stay in float32, as they do when a model is loaded.
        with no_init_weights():
            hf = type(lm.hf)(copy.deepcopy(lm.hf.config))
        hf.tie_weights()
        source = dict(lm.hf.named_parameters())
        for name, parameter in hf.named_parameters():
            parameter.data = source[name].detach().to(kind, copy=True)
        hf = hf.to(lm.device).eval().requires_grad_(False)
        twins[dtype] = LM(lm.profile, hf, lm.tokenizer, lm.device, dtype, lm.fingerprint)
    return twins[dtype]


@dataclass(frozen=True)
class _Tracer:
    """A model set up for one set of prompts.

    `source` computes prefixes in its own dtype, `lm` is the same model in the dtype of the suffix.
    """

    source: LM
    lm: LM
    prompts: Prompts
    scores: str
    full_strings: bool
    notes: tuple[str, ...]
    tree: _Tree
    n_shared: int
    shared: Any

    def clean(self, p: int) -> _Clean:
        """Read the unedited suffix of prompt `p`: one pass over its prefix, one traced pass over its last token."""
        import nnsight

        ids = self.prompts.ids[p]
        with torch.no_grad():
            if self.shared is None:
                past = _extended(self.source, None, ids[:-1])
            else:
                past = _extended(self.source, copy.deepcopy(self.shared), ids[self.n_shared : -1])
            kind = getattr(torch, self.lm.dtype)
            suffix = _Suffix(
                tuple(layer.keys[0].to(kind) for layer in past.layers),
                tuple(layer.values[0].to(kind) for layer in past.layers),
                self.tree,
            )
            tokens_1S = torch.tensor([[ids[-1], *self.tree.tokens[1:]]], device=self.lm.device)
            positions_1S = self.tree.offsets_S[None] + len(ids) - 1
            blocks = decoder_layers(self.lm.nn)
            with (
                _shared_prefix_mode(self.lm),
                self.lm.nn.trace(
                    {
                        "input_ids": tokens_1S,
                        "attention_mask": torch.ones_like(tokens_1S),
                        "position_ids": positions_1S,
                    },
                    use_cache=False,
                    logits_to_keep=1,
                    suffix=[(suffix, len(self.tree.tokens))],
                ) as trace,
            ):
                streams, rotary = [blocks[0].input[0]], []
                for layer in range(self.lm.n_layers):
                    rotary.append(blocks[layer].inputs[1]["position_embeddings"])
                    streams.append(blocks[layer].output[0])
                stream_LSD = nnsight.save(torch.stack(streams))
                nnsight.save(rotary)
                # The scores are computed with those of the edited rows.
                trace.stop()
        return _Clean(stream_LSD, tuple(rotary), suffix)

    def block(self, layer: int, rows_RSD: torch.Tensor, *cleans: _Clean) -> torch.Tensor:
        """Rows of suffixes through one block: equally many of each prompt, prompt by prompt."""
        n_rows, n_pos, width = rows_RSD.shape
        each = n_rows // len(cleans)
        turns = [[x.repeat(1, each, 1) for x in clean.rotary[layer]] for clean in cleans]
        cos, sin = (torch.cat(parts, dim=1) for parts in zip(*turns, strict=True))
        out = decoder_layers(self.lm.hf)[layer](
            rows_RSD.reshape(1, n_rows * n_pos, width),
            position_embeddings=(cos, sin),
            attention_mask=None,
            past_key_values=None,
            suffix=[(clean.suffix, each * n_pos) for clean in cleans],
        )
        return out.view(n_rows, n_pos, width)

    def label_scores(self, rows_RSD: torch.Tensor) -> torch.Tensor:
        """Label scores of streams after the last block, [R, E], nats; float64."""
        if self.scores == "difference":
            return label_differences(self.lm, rows_RSD[:, 0], self.prompts.label_ids)
        norm, head = final_norm(self.lm), self.lm.hf.get_output_embeddings()
        first = [ids[0] for ids in self.prompts.label_ids]
        parts = []
        size = max(1, _VOCABULARY_ROWS // rows_RSD.shape[1])
        for start in range(0, len(rows_RSD), size):
            logits_RSV = capped(self.lm, head(norm(rows_RSD[start : start + size])))
            logp_RSV = torch.log_softmax(logits_RSV.float(), dim=-1)
            parts.append(logp_RSV[:, 0, first].double())
            for position, label, token in self.tree.targets:
                parts[-1][:, label] += logp_RSV[:, position, token].double()
        return torch.cat(parts)


def _extended(lm: LM, past: Any, ids: Sequence[int]) -> Any:
    """Keys and values of a prefix and the tokens after it, for one row; the output matrix is not needed for them."""
    if not ids:
        return past
    inputs = torch.tensor([list(ids)], device=lm.device)
    return lm.hf.get_decoder()(inputs, past_key_values=past, use_cache=True).past_key_values


def _tree(prompts: Prompts, scores: str, device: str) -> _Tree:
    """The read-out alone; with log p of labels of several tokens, also a branch for each of these."""
    tokens, offsets, parents, targets = [-1], [0], [[0]], []
    for label, ids in enumerate(prompts.label_ids if scores == "logp" else ()):
        branch = [0]
        for step, (token, target) in enumerate(pairwise(ids)):
            branch = [*branch, len(tokens)]
            targets.append((len(tokens), label, target))
            tokens.append(token)
            offsets.append(step + 1)
            parents.append(branch)
    sees_SS = torch.zeros((len(tokens), len(tokens)), dtype=torch.bool)
    for position, seen in enumerate(parents):
        sees_SS[position, seen] = True
    return _Tree(tuple(tokens), torch.tensor(offsets, device=device), sees_SS.to(device), tuple(targets))


def _score_kind(prompts: Prompts, scores: str) -> tuple[str, bool, tuple[str, ...]]:
    """The scores that can be had, whether they are of full label strings, and what to tell the reader."""
    pick("scores", scores, ("difference", "logp"))
    if scores == "difference" and not first_tokens_differ(prompts):
        return "logp", True, ("two labels begin with the same token, so full label strings were scored by log p",)
    several = any(len(ids) > 1 for ids in prompts.label_ids)
    if scores == "difference" and several:
        return scores, False, ("some labels have several tokens; differences are those of their first tokens",)
    return scores, True, ()


def _tracer(lm: LM, prompts: Prompts, scores: str, dtype: str) -> _Tracer:
    scores, full_strings, notes = _score_kind(prompts, scores)
    twin = _in_dtype(lm, dtype)
    n_shared = shared_prefix(prompts.ids)
    n_shared = n_shared if n_shared >= MIN_SHARED_TOKENS else 0
    with torch.no_grad():
        shared = _extended(lm, None, prompts.ids[0][:n_shared]) if n_shared else None
    tree = _tree(prompts, scores, lm.device)
    return _Tracer(lm, twin, prompts, scores, full_strings, notes, tree, n_shared, shared)


@dataclass(frozen=True)
class _Plan:
    """The changes of all rows of one prompt: features in long form, [N] each, streams as (row, change).

    `directions` by layer, [features, D], are what features write along; their decoder rows if None.
    """

    n_rows: int
    row_N: Array
    layer_N: Array
    feature_N: Array
    gain_N: Array
    shift_N: Array
    streams: tuple[tuple[int, _Change], ...] = ()
    directions: Mapping[int, torch.Tensor] | None = None


def _starts(plan: _Plan) -> Array:
    """The block after which each row's stream first differs from the clean one, [R]; -1 is before block 0."""
    start_R = np.full(plan.n_rows, np.iinfo(np.int64).max)
    np.minimum.at(start_R, plan.row_N, plan.layer_N)
    for row, change in plan.streams:
        start_R[row] = min(start_R[row], change.layer - (change.site != "residual"))
    return start_R


@torch.no_grad()
def _sweep(
    tracer: _Tracer,
    clean: _Clean,
    codes: Mapping[int, torch.Tensor],
    plan: _Plan,
    dictionaries: Mapping[int, Dictionary],
    p: int,
    batch_rows: int,
) -> FloatArray:
    """Label scores of every row of a prompt, [R, E]: one pass over the layers per `batch_rows` rows."""
    start_R = _starts(plan)
    order_R = np.argsort(start_R, kind="stable")
    scores_RE = np.empty((plan.n_rows, len(tracer.prompts.labels)))
    size = max(1, batch_rows // len(tracer.tree.tokens))
    with _shared_prefix_mode(tracer.lm):
        for rows in np.split(order_R, range(size, plan.n_rows, size)):
            place_R = np.full(plan.n_rows, -1)
            place_R[rows] = np.arange(len(rows))
            streams = [(int(place_R[r]), c) for r, c in plan.streams if place_R[r] >= 0]
            keep_N = place_R[plan.row_N] >= 0
            part = _Plan(
                len(rows),
                place_R[plan.row_N[keep_N]],
                plan.layer_N[keep_N],
                plan.feature_N[keep_N],
                plan.gain_N[keep_N],
                plan.shift_N[keep_N],
                tuple(streams),
                plan.directions,
            )
            last_RSD = _run_rows(tracer, clean, codes, part, start_R[rows], dictionaries, p)
            scores_RE[rows] = tracer.label_scores(last_RSD).cpu().numpy()
    return scores_RE


def _run_rows(
    tracer: _Tracer,
    clean: _Clean,
    codes: Mapping[int, torch.Tensor],
    plan: _Plan,
    start_R: Array,
    dictionaries: Mapping[int, Dictionary],
    p: int,
) -> torch.Tensor:
    """Streams after the last block, [R, S, D]. Rows are in ascending order of `start_R`."""
    family, blocks = writer_names(tracer.lm), decoder_layers(tracer.lm.hf)
    touched_R = np.zeros(plan.n_rows, dtype=bool)
    for row, change in plan.streams:
        touched_R[row] |= change.layer == start_R[row]
    live_RSD = clean.after(-1)[None][:0]
    for layer in range(-1, tracer.lm.n_layers):
        if len(live_RSD):
            handles = []
            for site in ("attention", "ffn"):
                here = [(r, c) for r, c in plan.streams if (c.layer, c.site) == (layer, site)]
                if here:
                    hook = _write_hook(here, p, clean.after(-1).shape[0])
                    handles.append(_writer(blocks[layer], family, site).register_forward_hook(hook))
            try:
                live_RSD = tracer.block(layer, live_RSD, clean)
            finally:
                for handle in handles:
                    handle.remove()
        n_new = int((start_R == layer).sum())
        if n_new:
            live_RSD = torch.cat([live_RSD, clean.after(layer).expand(n_new, *clean.after(layer).shape)])
        for row, change in plan.streams:
            if (change.layer, change.site) == (layer, "residual"):
                live_RSD[row, 0] = _moved(live_RSD[row, 0], change, p)
        here_N = np.flatnonzero(plan.layer_N == layer)
        if len(here_N):
            fresh = bool((start_R[plan.row_N[here_N]] == layer).all() and not touched_R[plan.row_N[here_N]].any())
            known_F = codes[layer] if fresh else None
            _edit_features(live_RSD, plan, here_N, dictionaries[layer], known_F)
    return live_RSD


def _moved(x_D: torch.Tensor, change: _Change, p: int) -> torch.Tensor:
    shift_D = torch.as_tensor(change.shift_of(p).copy(), dtype=x_D.dtype, device=x_D.device)
    return float(change.gain_P[p]) * x_D + shift_D


def _write_hook(here: Sequence[tuple[int, _Change]], p: int, n_pos: int) -> Callable[..., Any]:
    """A forward hook that edits what some rows add to the stream, at their read-out position."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        written_1XD = (output[0] if isinstance(output, tuple) else output).clone()
        for row, change in here:
            written_1XD[0, row * n_pos] = _moved(written_1XD[0, row * n_pos], change, p)
        return (written_1XD, *output[1:]) if isinstance(output, tuple) else written_1XD

    return hook


def _edit_features(
    live_RSD: torch.Tensor, plan: _Plan, here_N: Array, dictionary: Dictionary, known_F: torch.Tensor | None
) -> None:
    """Move read-outs along decoder rows, in place. Activations are those of `known_F`, or of the rows as they are."""
    device = live_RSD.device
    row_N = torch.as_tensor(plan.row_N[here_N], device=device)
    feature_N = torch.as_tensor(plan.feature_N[here_N], device=device)
    if known_F is not None:
        old_N = known_F[feature_N]
    else:
        unique_U, index_N = torch.unique(row_N, return_inverse=True)
        old_N = dictionary.encode(live_RSD[unique_U, 0]).to(device)[index_N, feature_N]
    gain_N = torch.as_tensor(plan.gain_N[here_N], dtype=torch.float32, device=device)
    shift_N = torch.as_tensor(plan.shift_N[here_N], dtype=torch.float32, device=device)
    change_N = (gain_N - 1) * old_N + shift_N
    w_FD = dictionary.sae.W_dec.detach() if plan.directions is None else plan.directions[dictionary.layer]
    moves_ND = change_N[:, None] * w_FD.to(device)[feature_N]
    live_RSD[:, 0].index_add_(0, row_N, moves_ND.to(live_RSD.dtype))


def _codes(clean: _Clean, dictionaries: Mapping[int, Dictionary], layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Activations at the read-out by layer, [features]."""
    device = clean.stream_LSD.device
    return {layer: dictionaries[layer].encode(clean.after(layer)[:1])[0].to(device) for layer in layers}


def run_edits(
    lm: LM,
    prompts: Prompts,
    edits: Sequence[Edit | Sequence[Edit]],
    dictionaries: Mapping[int, Dictionary] | None = None,
    *,
    scores: Scores = "difference",
    dtype: str = "float32",
    batch_rows: int = BATCH_ROWS,
    progress: str = "",
) -> Edited:
    """Label scores of every prompt under every row of edits, exactly.

    An edit is a tuple (layer, feature, operation, value) at the read-out position. `feature` is the number of a
    feature of that layer's dictionary, or "residual" (the stream after the block), "attention" or "ffn" (what that
    part of the block adds to the stream). Operations, with their value:

    - "zero": None.
    - "set": what is put in place, a number for a feature, [d_model] for a stream.
    - "mean": None; the mean over the unedited prompts of this call.
    - "patch": the index of the prompt from whose unedited run the activation or vector is taken; random indices make
      it resampling.
    - "scale": a factor.
    - "add": a number (of decoder rows) for a feature, a vector for a stream.

    Values may also be one per prompt, [prompts] or [prompts, d_model]. The edits of a row act together: at each layer
    attention, then FFN, then residual, then all features at once, on activations read from the edited stream.

    Args:
        lm: the model.
        prompts: from `build_prompts`.
        edits: rows; a tuple is a row of one edit, a list of tuples a row of several.
        dictionaries: by layer, for edits of features.
        scores: "difference" for label logits minus their mean, which needs only the labels' rows of the output
            matrix and gives the same logit differences; "logp" for full label strings.
        dtype: arithmetic of the suffix. The prefix runs in the model's own.
        batch_rows: suffix positions per sweep; it changes speed and memory, not results.
        progress: a caption for a progress bar; none if empty.

    Raises:
        EmosaeError: for edits, dictionaries or a model that do not fit, before anything is computed.
    """
    dictionaries = dictionaries or {}
    _check_model(lm, prompts, dictionaries, dtype)
    rows = _compile(lm, prompts, edits, dictionaries)
    tracer = _tracer(lm, prompts, scores, dtype)
    rows = _resolve(tracer.lm, prompts, rows, dictionaries)
    flat = [(r, c) for r, row in enumerate(rows) for c in row]
    features = [(r, c) for r, c in flat if c.site == "feature"]
    streams = tuple((r, c) for r, c in flat if c.site != "feature")
    where = np.array([(r, c.layer, c.feature) for r, c in features], dtype=np.int64).reshape(-1, 3)
    scores_PRE = np.empty((len(prompts), len(rows), len(prompts.labels)))
    clean_PE = np.empty((len(prompts), len(prompts.labels)))
    for p in tqdm(range(len(prompts)), desc=progress, disable=_quiet(progress)):
        clean = tracer.clean(p)
        gain_N = np.array([c.gain_P[p] for _, c in features])
        shift_N = np.array([float(c.shift_of(p)) for _, c in features])
        plan = _Plan(len(rows), where[:, 0], where[:, 1], where[:, 2], gain_N, shift_N, streams)
        codes = _codes(clean, dictionaries, sorted(set(where[:, 1].tolist())))
        clean_PE[p] = _clean_scores(tracer, clean)
        scores_PRE[p] = _sweep(tracer, clean, codes, plan, dictionaries, p, batch_rows)
    _check_finite(tracer, scores_PRE)
    return Edited(scores_PRE, clean_PE, prompts.labels, tracer.scores, tracer.full_strings, tracer.notes)


@torch.no_grad()
def _clean_scores(tracer: _Tracer, clean: _Clean) -> Array:
    scores_E: Array = tracer.label_scores(clean.after(tracer.lm.n_layers - 1)[None])[0].cpu().numpy()
    return scores_E


def _check_finite(tracer: _Tracer, scores: Array) -> None:
    if not np.isfinite(scores).all():
        raise EmosaeError(f"{tracer.lm.name} gave scores that are not finite; make the edits smaller or use float32")


def ablate_features(
    lm: LM,
    prompts: Prompts,
    dictionaries: Mapping[int, Dictionary],
    *,
    operation: Literal["zero", "mean", "resample", "scale"] = "zero",
    values: float | Mapping[int, Array] | None = None,
    layers: Sequence[int] | None = None,
    features: Mapping[int, Sequence[int]] | None = None,
    directions: Mapping[int, Array] | None = None,
    seed: int = 0,
    scores: Scores = "difference",
    dtype: str = "float32",
    batch_rows: int = BATCH_ROWS,
    progress: str = "",
) -> Effects:
    """Edit every active feature of every layer of every prompt, one at a time, exactly.

    Args:
        lm: the model.
        prompts: from `build_prompts`.
        dictionaries: by layer.
        operation: "zero"; "mean" puts `values` [features] by layer in place, by default the mean over the prompts;
            "resample" puts `values` [prompts, features] by layer in place, by default the activation in another
            prompt, drawn once per prompt; "scale" multiplies by the number `values`.
        values: see `operation`.
        layers: the layers to edit; those of the dictionaries if None.
        features: features to edit by layer; all that are active if None. Inactive ones are left out in any case.
        directions: by layer, [features, d_model]: what each feature's change is made along in place of its decoder
            row, as when the same amount is to be removed along other directions.
        seed: of the draw of prompts to resample from.
        scores: as in `run_edits`.
        dtype: as in `run_edits`.
        batch_rows: as in `run_edits`.
        progress: a caption for a progress bar; none if empty.

    Returns:
        One line per prompt, layer and active feature, in that order.

    Raises:
        EmosaeError: for arguments that do not fit, before anything is computed.
    """
    used = _check_features(lm, prompts, dictionaries, layers, features, dtype)
    put = _check_put(lm, prompts, dictionaries, used, operation, values)
    along = _check_directions(dictionaries, used, directions)
    tracer = _tracer(lm, prompts, scores, dtype)
    if operation in ("mean", "resample") and put is None:
        put = _default_put(tracer.lm, prompts, dictionaries, used, operation, seed)
    gain = float(np.asarray(values)) if operation == "scale" else 0.0

    def edit(p: int, clean: _Clean, codes: Mapping[int, torch.Tensor], long: _Long) -> FloatArray:
        shift_N = np.zeros(len(long.layer_N)) if put is None else _pick_put(put, p, long)
        row_N = np.arange(len(long.layer_N))
        gain_N = np.full(len(row_N), gain)
        plan = _Plan(len(row_N), row_N, long.layer_N, long.feature_N, gain_N, shift_N, (), along)
        return _sweep(tracer, clean, codes, plan, dictionaries, p, batch_rows)

    return _over_active(tracer, dictionaries, used, features, edit, operation, "exact", progress)


@torch.no_grad()
def ablate_sets(
    lm: LM,
    prompts: Prompts,
    dictionaries: Mapping[int, Dictionary],
    sets: Sequence[Mapping[int, Sequence[int] | Array]],
    *,
    keep: bool = False,
    values: Mapping[int, Array] | None = None,
    scores: Scores = "difference",
    dtype: str = "float32",
    batch_rows: int = BATCH_ROWS,
    progress: str = "",
) -> Edited:
    """Put whole sets of features to zero together, one set per row, exactly.

    As a row of `run_edits` with one edit per feature, for sets of thousands: at each layer all activations are read
    from the edited stream and the set's are replaced at once.

    Args:
        lm: the model.
        prompts: from `build_prompts`.
        dictionaries: by layer.
        sets: rows; the features of each by layer. A layer may be absent, and a set empty.
        keep: replace everything but the set, in all layers that have a dictionary.
        values: by layer, [features], what is put in place of zero, for every layer that has a dictionary.
        scores: as in `run_edits`.
        dtype: as in `run_edits`.
        batch_rows: as in `run_edits`.
        progress: a caption for a progress bar; none if empty.

    Raises:
        EmosaeError: for arguments that do not fit, before anything is computed.
    """
    if not len(sets):
        raise EmosaeError("there is no set to ablate")
    _check_model(lm, prompts, dictionaries, dtype)
    for members in sets:
        _check_features(lm, prompts, dictionaries, None, _chosen(members), dtype)
    put = None if values is None else _check_put(lm, prompts, dictionaries, sorted(dictionaries), "mean", values)
    masks = {layer: torch.full((len(sets), d.n_features), keep) for layer, d in sorted(dictionaries.items())}
    for row, members in enumerate(sets):
        for layer, chosen in members.items():
            masks[layer][row, torch.tensor(np.asarray(chosen, dtype=np.int64))] = not keep
    touched_LR = np.array([mask.any(dim=1).numpy() for mask in masks.values()])
    # A row joins at its first edit; one without any never does and scores as the clean run.
    start_R = np.where(touched_LR.any(axis=0), np.array(list(masks))[touched_LR.argmax(axis=0)], lm.n_layers)
    order_R = np.argsort(start_R, kind="stable")
    tracer = _tracer(lm, prompts, scores, dtype)
    device, size = tracer.lm.device, max(1, batch_rows // len(tracer.tree.tokens))
    masks = {layer: mask.to(device) for layer, mask in masks.items()}
    put_F = {k: torch.zeros(d.n_features) if put is None else torch.tensor(put[k][0]) for k, d in dictionaries.items()}
    put_F = {layer: value.float().to(device) for layer, value in put_F.items()}
    scores_PRE = np.empty((len(prompts), len(sets), len(prompts.labels)))
    clean_PE = np.empty((len(prompts), len(prompts.labels)))
    for p in tqdm(range(len(prompts)), desc=progress, disable=_quiet(progress)):
        clean = tracer.clean(p)
        clean_PE[p] = scores_PRE[p] = _clean_scores(tracer, clean)
        with _shared_prefix_mode(tracer.lm):
            for rows in np.split(order_R, range(size, len(sets), size)):
                rows = rows[start_R[rows] < lm.n_layers]
                if not len(rows):
                    continue
                live_RSD = clean.after(-1)[None][:0]
                for layer in range(lm.n_layers):
                    live_RSD = tracer.block(layer, live_RSD, clean) if len(live_RSD) else live_RSD
                    n_new = int((start_R[rows] == layer).sum())
                    if n_new:
                        new_RSD = clean.after(layer).expand(n_new, *clean.after(layer).shape)
                        live_RSD = torch.cat([live_RSD, new_RSD])
                    if layer in masks and len(live_RSD):
                        mask_RF = masks[layer][torch.as_tensor(rows[: len(live_RSD)], device=device)]
                        live_RSD = _replaced(live_RSD, mask_RF, put_F[layer], dictionaries[layer])
                scores_PRE[p, rows] = tracer.label_scores(live_RSD).cpu().numpy()
    _check_finite(tracer, scores_PRE)
    return Edited(scores_PRE, clean_PE, prompts.labels, tracer.scores, tracer.full_strings, tracer.notes)


def _chosen(members: Mapping[int, Sequence[int] | Array]) -> dict[int, list[int]] | None:
    """Layers and features that a set names, None if it is empty."""
    return {layer: np.asarray(chosen).tolist() for layer, chosen in members.items() if len(chosen)} or None


def _replaced(
    live_RSD: torch.Tensor, mask_RF: torch.Tensor, put_F: torch.Tensor, dictionary: Dictionary
) -> torch.Tensor:
    """Streams whose masked activations are `put_F` at the read-out; the error is kept."""
    here_R = mask_RF.any(dim=1)
    if not bool(here_R.any()):
        return live_RSD
    live_RSD = live_RSD.clone()
    codes_RF = dictionary.encode(live_RSD[here_R, 0]).to(put_F)
    change_RF = torch.where(mask_RF[here_R], put_F - codes_RF, torch.zeros_like(codes_RF))
    live_RSD[here_R, 0] += (change_RF @ dictionary.sae.W_dec.detach().to(change_RF)).to(live_RSD)
    return live_RSD


def _check_features(
    lm: LM,
    prompts: Prompts,
    dictionaries: Mapping[int, Dictionary],
    layers: Sequence[int] | None,
    features: Mapping[int, Sequence[int]] | None,
    dtype: str,
) -> list[int]:
    """The layers to edit, ascending, after a check of everything that names layers or features."""
    _check_model(lm, prompts, dictionaries, dtype)
    used = sorted(set(dictionaries if layers is None else layers))
    if not used:
        raise EmosaeError("the set of layers is empty")
    for layer in [*used, *(features or {})]:
        if layer not in dictionaries:
            raise EmosaeError(f"layer {layer} has no dictionary; there are {sorted(dictionaries)}")
    for layer, wanted in (features or {}).items():
        n = dictionaries[layer].n_features
        if not len(wanted):
            raise EmosaeError(f"the set of features of layer {layer} is empty")
        if min(wanted) < 0 or max(wanted) >= n:
            raise EmosaeError(f"layer {layer} has features 0 to {n - 1}; got {min(wanted)} to {max(wanted)}")
    if features is not None and not set(used) & set(features):
        raise EmosaeError(f"features are given for layers {sorted(features)} and edits asked for in {used}")
    return used if features is None else [layer for layer in used if layer in features]


def _check_directions(
    dictionaries: Mapping[int, Dictionary], used: Sequence[int], directions: Mapping[int, Array] | None
) -> dict[int, torch.Tensor] | None:
    """Given directions as float32 tensors by layer; None if there are none."""
    if directions is None:
        return None
    if missing := [layer for layer in used if layer not in directions]:
        raise EmosaeError(f"directions are needed for each of the layers {list(used)}; layer {missing[0]} has none")
    shapes = {layer: (dictionaries[layer].n_features, dictionaries[layer].d_model) for layer in used}
    checked = {layer: _values(f"directions of layer {layer}", directions[layer], [shapes[layer]]) for layer in used}
    return {layer: torch.from_numpy(rows_FD).float() for layer, rows_FD in checked.items()}


def _check_put(
    lm: LM,
    prompts: Prompts,
    dictionaries: Mapping[int, Dictionary],
    used: Sequence[int],
    operation: str,
    values: Any,
) -> dict[int, Array] | None:
    """Given values to put in place, [P or 1, features] by layer; None if there are none to put."""
    pick("operation", operation, ("zero", "mean", "resample", "scale"))
    if operation == "zero" and values is not None:
        raise EmosaeError("operation 'zero' takes no values")
    if operation == "scale":
        _values("operation 'scale'", values, [()])
        return None
    if operation == "resample" and values is None and len(prompts) < 2:
        raise EmosaeError("resampling needs at least two prompts, or values to put in place")
    if values is None:
        return None
    if not isinstance(values, Mapping) or any(layer not in values for layer in used):
        raise EmosaeError(f"operation {operation!r} takes values by layer, for each of the layers {list(used)}")
    put = {}
    for layer in used:
        n = dictionaries[layer].n_features
        shape = (n,) if operation == "mean" else (len(prompts), n)
        put[layer] = _values(f"operation {operation!r} at layer {layer}", values[layer], [shape]).reshape(-1, n)
    return put


def _default_put(
    lm: LM,
    prompts: Prompts,
    dictionaries: Mapping[int, Dictionary],
    used: Sequence[int],
    operation: str,
    seed: int,
) -> dict[int, Array]:
    """Means over the prompts, [1, features] by layer; or the codes of another prompt for each, [P, features]."""
    resid_PLD = read_out(lm, prompts, layers=used, mode="first").resid_PLD
    assert resid_PLD is not None
    # Never the prompt itself: a step of one to P - 1 ahead.
    step_P = np.random.default_rng(seed).integers(1, max(2, len(prompts)), size=len(prompts))
    donors_P = (np.arange(len(prompts)) + step_P) % len(prompts)
    put = {}
    for i, layer in enumerate(used):
        codes_PF = dictionaries[layer].encode(torch.from_numpy(resid_PLD[:, i].copy())).cpu().numpy()
        put[layer] = codes_PF.mean(axis=0, keepdims=True) if operation == "mean" else codes_PF[donors_P]
    return put


@dataclass(frozen=True)
class _Long:
    """Active features of one prompt, by layer, [N] each."""

    layer_N: Array
    feature_N: Array
    activation_N: Array


def _pick_put(put: Mapping[int, Array], p: int, long: _Long) -> Array:
    shift_N = np.empty(len(long.layer_N))
    for layer in np.unique(long.layer_N):
        here_N = long.layer_N == layer
        rows = put[int(layer)]
        shift_N[here_N] = rows[p if len(rows) > 1 else 0, long.feature_N[here_N]]
    return shift_N


def _active(codes: Mapping[int, torch.Tensor], features: Mapping[int, Sequence[int]] | None) -> _Long:
    layers, found, activations = [], [], []
    for layer, codes_F in sorted(codes.items()):
        a_F = codes_F.cpu().numpy()
        active = np.flatnonzero(a_F > 0)
        if features is not None:
            active = active[np.isin(active, np.asarray(features[layer]))]
        layers.append(np.full(len(active), layer))
        found.append(active)
        activations.append(a_F[active].astype(float))
    return _Long(np.concatenate(layers), np.concatenate(found), np.concatenate(activations))


def _over_active(
    tracer: _Tracer,
    dictionaries: Mapping[int, Dictionary],
    used: Sequence[int],
    features: Mapping[int, Sequence[int]] | None,
    edit: Callable[[int, _Clean, Mapping[int, torch.Tensor], _Long], FloatArray],
    operation: str,
    method: str,
    progress: str,
) -> Effects:
    """Apply `edit`, which gives scores [N, E] of a prompt's active features, to every prompt."""
    longs, scores, prompt, clean_PE = [], [], [], []
    for p in tqdm(range(len(tracer.prompts)), desc=progress, disable=_quiet(progress)):
        clean = tracer.clean(p)
        codes = _codes(clean, dictionaries, used)
        clean_PE.append(_clean_scores(tracer, clean))
        long = _active(codes, features)
        longs.append(long)
        prompt.append(np.full(len(long.layer_N), p))
        empty_NE = np.empty((0, len(tracer.prompts.labels)))
        scores.append(edit(p, clean, codes, long) if len(long.layer_N) else empty_NE)
    scores_NE = np.concatenate(scores)
    _check_finite(tracer, scores_NE)
    return Effects(
        np.concatenate(prompt),
        np.concatenate([x.layer_N for x in longs]),
        np.concatenate([x.feature_N for x in longs]),
        np.concatenate([x.activation_N for x in longs]),
        scores_NE,
        np.array(clean_PE),
        tracer.prompts.labels,
        operation,
        method,
        tracer.scores,
        tracer.full_strings,
        tracer.notes,
    )


@torch.no_grad()
def full_pass(
    lm: LM,
    prompts: Prompts,
    edits: Sequence[Edit | Sequence[Edit]],
    dictionaries: Mapping[int, Dictionary] | None = None,
    *,
    scores: Scores = "difference",
    dtype: str = "float32",
) -> Edited:
    """What `run_edits` computes, by one nnsight trace of the whole prompt per row of edits, without any cache.

    The reference that the engine is tested against; slow. Arguments, result and errors are those of `run_edits`.
    """
    dictionaries = dictionaries or {}
    _check_model(lm, prompts, dictionaries, dtype)
    rows = _compile(lm, prompts, edits, dictionaries)
    scores_used, full_strings, notes = _score_kind(prompts, scores)
    twin = _in_dtype(lm, dtype)
    rows = _resolve(twin, prompts, rows, dictionaries)
    scores_PRE = np.empty((len(prompts), len(rows) + 1, len(prompts.labels)))
    for p in range(len(prompts)):
        for r, row in enumerate([*rows, []]):
            scores_PRE[p, r] = _traced_scores(twin, prompts, p, row, dictionaries, scores_used)
    return Edited(scores_PRE[:, :-1], scores_PRE[:, -1], prompts.labels, scores_used, full_strings, notes)


def _traced_scores(
    lm: LM, prompts: Prompts, p: int, row: Sequence[_Change], dictionaries: Mapping[int, Dictionary], scores: str
) -> Array:
    """Label scores of a prompt under one row of edits, [E]: a whole trace, or one per label of several tokens."""
    ids, first = prompts.ids[p], [x[0] for x in prompts.label_ids]
    if scores == "difference":
        logits_E = _traced_logits(lm, ids, len(ids) - 1, p, row, dictionaries)[0, first].double()
        return (logits_E - logits_E.mean()).cpu().numpy()
    plain_V = torch.log_softmax(_traced_logits(lm, ids, len(ids) - 1, p, row, dictionaries)[0].float(), dim=-1)
    scores_E = plain_V[first].double()
    for label, tokens in enumerate(prompts.label_ids):
        if len(tokens) > 1:
            logits_SV = _traced_logits(lm, (*ids, *tokens[:-1]), len(ids) - 1, p, row, dictionaries)
            logp_SV = torch.log_softmax(logits_SV.float(), dim=-1)
            scores_E[label] = sum(float(logp_SV[i, token]) for i, token in enumerate(tokens))
    return scores_E.cpu().numpy()


def _traced_logits(
    lm: LM, ids: Sequence[int], at: int, p: int, row: Sequence[_Change], dictionaries: Mapping[int, Dictionary]
) -> torch.Tensor:
    """Logits from position `at` on, [S, vocabulary], of one trace with the edits of `row` at that position."""
    blocks, family = decoder_layers(lm.nn), writer_names(lm)
    inputs = torch.tensor([list(ids)], device=lm.device)
    with lm.nn.trace(
        {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)},
        use_cache=False,
        logits_to_keep=len(ids) - at,
    ):
        for layer in sorted({change.layer for change in row}):
            for site in ("attention", "ffn"):
                for change in row:
                    if (change.layer, change.site) == (layer, site):
                        out = _writer(blocks[layer], family, site).output
                        written_1SD = out[0] if isinstance(out, tuple) else out
                        written_1SD[0, at] = _moved(written_1SD[0, at].clone(), change, p)
            resid_1SD = blocks[layer].output
            for change in row:
                if (change.layer, change.site) == (layer, "residual"):
                    resid_1SD[0, at] = _moved(resid_1SD[0, at].clone(), change, p)
            here = [change for change in row if (change.layer, change.site) == (layer, "feature")]
            if here:
                x_1D = resid_1SD[0, at][None].clone()
                codes_1F = dictionaries[layer].encode(x_1D)
                edited_1F = codes_1F.clone()
                for change in here:
                    edited_1F[0, change.feature] *= float(change.gain_P[p])
                    edited_1F[0, change.feature] += float(change.shift_of(p))
                rebuilt_1D = dictionaries[layer].decode(codes_1F).to(x_1D)
                error_1D = x_1D - rebuilt_1D
                resid_1SD[0, at] = (dictionaries[layer].decode(edited_1F).to(x_1D) + error_1D)[0]
        logits = lm.nn.output.logits[0].save()
    return logits


def attribution(
    lm: LM,
    prompts: Prompts,
    dictionaries: Mapping[int, Dictionary],
    *,
    layers: Sequence[int] | None = None,
    features: Mapping[int, Sequence[int]] | None = None,
    scores: Scores = "difference",
    dtype: str = "float32",
    progress: str = "",
) -> Effects:
    """Attribution patching: the first-order estimate -a_f d_f . grad s of every zero ablation.

    One pass of the read-out and one gradient per label give all features of all layers of a prompt. Arguments, result
    and errors are those of `ablate_features`.
    """
    used = _check_features(lm, prompts, dictionaries, layers, features, dtype)
    tracer = _tracer(lm, prompts, scores, dtype)

    def edit(p: int, clean: _Clean, codes: Mapping[int, torch.Tensor], long: _Long) -> FloatArray:
        slopes = _slopes_along(tracer, clean, used[0])
        return _clean_scores(tracer, clean) + _projected({layer: slopes[layer] for layer in used}, long, dictionaries)

    return _over_active(tracer, dictionaries, used, features, edit, "zero", "attribution", progress)


def integrated_gradients(
    lm: LM,
    prompts: Prompts,
    dictionaries: Mapping[int, Dictionary],
    *,
    steps: int = 8,
    layers: Sequence[int] | None = None,
    features: Mapping[int, Sequence[int]] | None = None,
    scores: Scores = "difference",
    dtype: str = "float32",
    progress: str = "",
) -> Effects:
    """Integrated gradients: as `attribution`, with the gradient averaged while a layer's features fade in together.

    The path of a layer goes from the stream without its features to the clean stream, at `steps` midpoints, so the
    estimates of all active features add up to the effect of zeroing them together. It costs `steps` passes and as many
    gradients per label for each layer: cheaper than exact only where many more features are active than that. Other
    arguments, result and errors are those of `ablate_features`.
    """
    if steps < 1:
        raise EmosaeError(f"integrated gradients need at least one step, got {steps}")
    used = _check_features(lm, prompts, dictionaries, layers, features, dtype)
    tracer = _tracer(lm, prompts, scores, dtype)

    def edit(p: int, clean: _Clean, codes: Mapping[int, torch.Tensor], long: _Long) -> FloatArray:
        paths = {}
        for layer in used:
            sae, x_SD = dictionaries[layer].sae, clean.after(layer)
            written_D = (codes[layer] @ sae.W_dec.detach().to(codes[layer])).to(x_SD)
            missing_K = 1 - (torch.arange(steps, device=x_SD.device) + 0.5) / steps
            paths[layer] = x_SD.repeat(steps, 1, 1)
            paths[layer][:, 0] -= missing_K[:, None].to(x_SD) * written_D
        return _clean_scores(tracer, clean) + _projected(_slopes_at(tracer, clean, paths), long, dictionaries)

    return _over_active(tracer, dictionaries, used, features, edit, "zero", "integrated gradients", progress)


def _slopes_along(tracer: _Tracer, clean: _Clean, layer: int) -> dict[int, torch.Tensor]:
    """Gradients of each label score at the clean read-out after `layer` and each later one, [E, D] each.

    One row per label, so that a single backward pass gives them all.
    """
    with _shared_prefix_mode(tracer.lm), torch.enable_grad():
        x_ESD = clean.after(layer).repeat(len(tracer.prompts.labels), 1, 1).requires_grad_()
        streams = {layer: x_ESD}
        for later in range(layer + 1, tracer.lm.n_layers):
            streams[later] = tracer.block(later, streams[later - 1], clean)
        own = tracer.label_scores(streams[tracer.lm.n_layers - 1]).diagonal().sum()
        grads = torch.autograd.grad(own, list(streams.values()))
    return {key: grad_ESD[:, 0] for key, grad_ESD in zip(streams, grads, strict=True)}


def _slopes_at(tracer: _Tracer, clean: _Clean, paths: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Gradients of each label score at the read-out, [E, D] by layer: means over streams [K, S, D] that join there."""
    with _shared_prefix_mode(tracer.lm), torch.enable_grad():
        leaves = {layer: path_KSD.detach().clone().requires_grad_() for layer, path_KSD in paths.items()}
        live_RSD = clean.after(-1)[None][:0]
        for layer in range(tracer.lm.n_layers):
            live_RSD = tracer.block(layer, live_RSD, clean) if len(live_RSD) else live_RSD
            live_RSD = torch.cat([live_RSD, leaves[layer]]) if layer in leaves else live_RSD
        sums_E = tracer.label_scores(live_RSD).sum(dim=0)
        parts = []
        for label in range(len(sums_E)):
            grads = torch.autograd.grad(sums_E[label], list(leaves.values()), retain_graph=label + 1 < len(sums_E))
            parts.append([grad_KSD[:, 0].mean(dim=0) for grad_KSD in grads])
    return {layer: torch.stack([part[i] for part in parts]) for i, layer in enumerate(leaves)}


def _projected(slopes: Mapping[int, torch.Tensor], long: _Long, dictionaries: Mapping[int, Dictionary]) -> Array:
    """-a_f d_f . slope for every active feature and label, [N, E]."""
    parts = []
    for layer in sorted(slopes):
        here_N = long.layer_N == layer
        w_FD = dictionaries[layer].sae.W_dec.detach()
        rows_ND = w_FD[torch.as_tensor(long.feature_N[here_N], device=w_FD.device)].double()
        parts.append(-(rows_ND @ slopes[layer].to(rows_ND).T).cpu().numpy() * long.activation_N[here_N, None])
    return np.concatenate(parts)


def agreement(
    exact: Effects,
    estimated: Effects,
    *,
    gold_P: Array | None = None,
    k: int = 20,
    by: Literal["prompt", "layer"] = "prompt",
) -> pd.DataFrame:
    """How well an estimate ranks features.

    Args:
        exact: from `ablate_features`.
        estimated: from `attribution` or `integrated_gradients`, of the same edits.
        gold_P: label index of each prompt, to compare changes of the gold logit difference; without it, the changes of
            all label scores.
        k: size of the top set, by absolute effect.
        by: what is compared separately.

    Returns:
        One row per prompt or layer: `n` effects, `spearman` rank correlation (NaN where effects are constant),
        `overlap` of the top k as a share of them, and `slope` of the estimates on the exact effects through zero.

    Raises:
        EmosaeError: if the two are not of the same edits, or k is not positive.
    """
    from scipy.stats import spearmanr

    same = ("prompt_N", "layer_N", "feature_N")
    if len(exact) != len(estimated) or not all((getattr(exact, x) == getattr(estimated, x)).all() for x in same):
        raise EmosaeError("the two tables are not of the same edits; use the same prompts, dictionaries and layers")
    if exact.operation != estimated.operation:
        raise EmosaeError(f"cannot compare the operation {exact.operation!r} with {estimated.operation!r}")
    pick("grouping", by, ("prompt", "layer"))
    if k < 1:
        raise EmosaeError(f"a top set needs at least one member, got k={k}")
    one, two = (x.effects_NE if gold_P is None else x.gold_effects(gold_P)[:, None] for x in (exact, estimated))
    groups_N = exact.prompt_N if by == "prompt" else exact.layer_N
    rows = []
    for group in np.unique(groups_N):
        a, b = one[groups_N == group].ravel(), two[groups_N == group].ravel()
        top = min(k, len(a))
        shared = np.intersect1d(
            np.argsort(-np.abs(a), kind="stable")[:top], np.argsort(-np.abs(b), kind="stable")[:top]
        )
        varied = len(a) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0
        rank = float(spearmanr(a, b).statistic) if varied else np.nan
        slope = float(a @ b / (a @ a)) if (a @ a) > 0 else np.nan
        rows.append((group, len(a), rank, len(shared) / top, slope))
    return pd.DataFrame(rows, columns=[by, "n", "spearman", "overlap", "slope"])


def noise_floor(
    lm: LM, prompts: Prompts, *, dtype: str = "float32", edits: int = 4, size: float = 0.02, seed: int = 0
) -> Noise:
    """How much of an effect is rounding: the same edits through the engine and through full float32 passes.

    The edits add random directions at random layers. What differs is the effect, scores after minus scores before, of
    label differences.

    Args:
        lm: the model, in the dtype of the prefix.
        prompts: a few; each costs `edits` + 1 full passes.
        dtype: arithmetic of the suffix.
        edits: per prompt.
        size: length of the directions, as a share of the residual's norm in the first prompt.
        seed: of layers and directions.

    Raises:
        EmosaeError: as `run_edits` does.
    """
    _check_model(lm, prompts, {}, dtype)
    rng = np.random.default_rng(seed)
    drawn = sorted(rng.integers(0, lm.n_layers, size=edits).tolist())
    reference = _in_dtype(lm, "float32")
    head = replace(prompts, ids=prompts.ids[:1])
    resid_PLD = read_out(reference, head, layers=list(range(lm.n_layers)), mode="first").resid_PLD
    assert resid_PLD is not None
    rows: list[Edit] = []
    for layer in drawn:
        direction_D = rng.standard_normal(lm.d_model)
        length = size * float(np.linalg.norm(resid_PLD[0, layer])) / float(np.linalg.norm(direction_D))
        rows.append((layer, "residual", "add", length * direction_D))
    ours, full = run_edits(lm, prompts, rows, dtype=dtype), full_pass(reference, prompts, rows)
    gaps = np.abs(ours.effects_PRE - full.effects_PRE).ravel()
    median, p95 = np.percentile(gaps, [50, 95])
    return Noise(lm.dtype, dtype, float(median), float(p95), float(gaps.max()), len(gaps))
