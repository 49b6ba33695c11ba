"""Ask a model which emotion a text is about: prompts, label scores, prior calibration, and the read-out residuals.

The score of a label is s_e = log p(label_e | prompt) in nats, over the full label string. The *read-out position* is
the last prompt token, where the label is about to be predicted. Batches are padded on the right, where causal
attention cannot see the padding, and the read-out is gathered at each prompt's own last token; so a score does not
depend on batch size, padding or order.

Prior calibration follows Zhao et al. 2021, "Calibrate before use", in log space: subtract the mean score that the
label gets on prompts without content.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from emosae_utils.data import EMOTIONS
from emosae_utils.files import EmosaeError, pick
from emosae_utils.models import LM, decoder_layers, final_norm, writer_names

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]

# What stands in for the text when the prior over labels is measured.
CONTENT_FREE: tuple[str, ...] = ("N/A", "[MASK]", "...", "Something happened.")
# A shared prefix shorter than this is not worth a cache.
MIN_SHARED_TOKENS = 16
# Logits are kept for every position between a batch's shortest and longest prompt; this bounds their number.
MAX_LENGTH_SPREAD = 4


@dataclass(frozen=True)
class Template:
    """One wording of the question. `body` holds {text}, and may hold {person} and {options}.

    `turn` is the question put as a chat message, for models with a chat template.
    """

    name: str
    body: str
    turn: str


_ASK = "Which emotion did {person} feel: {options}? Answer with one word."
TEMPLATES: dict[str, Template] = {
    t.name: t
    for t in (
        Template("feeling", "{text}\nThis gave {person} a feeling of", "{text}\n" + _ASK),
        Template("reaction", "What happened: {text}\nHow {person} reacted: with", "What happened: {text}\n" + _ASK),
        Template(
            "sentence", "{text}\nIn one word, what {person} felt at that moment was", "Read this: {text}\n" + _ASK
        ),
        Template("label", "Event: {text}\nEmotion felt by {person}:", "Event: {text}\n" + _ASK),
        Template(
            "options",
            "The emotions are {options}.\n\nEvent: {text}\nEmotion of {person}:",
            "The emotions are {options}.\n\nEvent: {text}\n" + _ASK,
        ),
    )
}
# Of these, the one with the best prior-calibrated macro-F1 on the discovery split of EmoScenes, averaged over the two
# embedded models; the chapter on difficulty shows the comparison.
DEFAULT_TEMPLATE = "feeling"


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts and the label strings to score after them.

    `ids` holds one token tuple per prompt; `labels` the emotion names in the order of the score columns;
    `label_ids` their tokens as they continue the prompt.
    """

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[str, ...]
    label_ids: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Readout:
    """What the model says and holds at the read-out position.

    Attributes:
        scores_PE: label scores [prompts, labels], nats.
        resid_PLD: residual stream after the asked-for blocks [prompts, layers, d_model], float32; or None.
        labels: names of the score columns.
        layers: block indices of `resid_PLD`.
        full_strings: whether labels were scored over their full strings (False: by their first token).
        notes: what the reader should know, such as a fallback that was taken.
        attn_PLD, ffn_PLD: what attention and the feed-forward network of each block added to the residual stream,
            like `resid_PLD`; None unless asked for.
    """

    scores_PE: FloatArray
    resid_PLD: FloatArray | None
    labels: tuple[str, ...]
    layers: tuple[int, ...] = ()
    full_strings: bool = True
    notes: tuple[str, ...] = field(default=())
    attn_PLD: FloatArray | None = None
    ffn_PLD: FloatArray | None = None


def options_text(labels: Sequence[str]) -> str:
    """Join labels for a prompt, as in "anger, fear or joy"."""
    return ", ".join(labels[:-1]) + f" or {labels[-1]}"


def draw_exemplars(frame: pd.DataFrame, per_emotion: int, seed: int) -> pd.DataFrame:
    """Draw `per_emotion` few-shot exemplars per emotion from the discovery split, in a shuffled order.

    Raises:
        EmosaeError: if an emotion has fewer discovery rows than that.
    """
    pool = frame[frame["split"] == "discovery"]
    counts = pool["emotion"].value_counts()
    short = [e for e in frame["emotion"].unique() if counts.get(e, 0) < per_emotion]
    if short:
        raise EmosaeError(
            f"the discovery split has fewer than {per_emotion} rows of {', '.join(sorted(short))}; "
            "ask for fewer exemplars"
        )
    drawn = pool.groupby("emotion").sample(n=per_emotion, random_state=seed)
    return drawn.sample(frac=1.0, random_state=seed)


def without(frame: pd.DataFrame, exemplars: pd.DataFrame) -> pd.DataFrame:
    """The rows of `frame` that are not exemplars, so that nothing shown in a prompt is also evaluated."""
    return frame[~frame["row_id"].isin(exemplars["row_id"])]


def build_prompts(
    lm: LM,
    frame: pd.DataFrame,
    *,
    template: str = DEFAULT_TEMPLATE,
    labels: Sequence[str] = EMOTIONS,
    exemplars: pd.DataFrame | None = None,
    chat: bool = False,
) -> Prompts:
    """Tokenise one prompt per row of `frame` (columns `text`, and optionally `target` and `row_id`).

    Args:
        lm: the model whose tokenizer and chat template are used.
        frame: the texts.
        template: a key of `TEMPLATES`.
        labels: the emotions to choose from, in score-column order.
        exemplars: rows with `text` and `emotion` shown before the question (few-shot).
        chat: put the question as a chat turn.

    Raises:
        EmosaeError: for an unknown template or label, an empty text, a prompt longer than the model's context, or
            `chat` on a model without a chat template.
    """
    wording = TEMPLATES[pick("template", template, TEMPLATES)]
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise EmosaeError(f"a label set needs at least two different labels, got {list(labels)}")
    if chat and not getattr(lm.tokenizer, "chat_template", None):
        raise EmosaeError(f"{lm.name} has no chat template; use chat=False")
    rows = frame.reset_index(drop=True)
    names = rows["row_id"].tolist() if "row_id" in rows else [f"row {i}" for i in range(len(rows))]
    for name, text in zip(names, rows["text"], strict=True):
        if not isinstance(text, str) or not text.strip():
            raise EmosaeError(f"{name} has no text; drop empty rows before scoring")
    questions = _questions(rows, wording, labels, chat)
    shots: list[tuple[str, str]] = []
    if exemplars is not None:
        shots = list(zip(_questions(exemplars, wording, labels, chat), exemplars["emotion"], strict=True))
    ids = [tuple(_encode(lm, question, shots, chat)) for question in questions]
    label_ids = tuple(_label_ids(lm, ids[0], questions[0], shots, label, chat) for label in labels) if ids else ()
    room = lm.context - max((len(x) for x in label_ids), default=0)
    for name, prompt in zip(names, ids, strict=True):
        if len(prompt) > room:
            raise EmosaeError(
                f"{name} makes a prompt of {len(prompt)} tokens and {lm.name} takes {room}; shorten or drop it"
            )
    return Prompts(tuple(ids), tuple(labels), label_ids)


def _questions(rows: pd.DataFrame, wording: Template, labels: Sequence[str], chat: bool) -> list[str]:
    form = wording.turn if chat else wording.body
    targets = rows["target"] if "target" in rows else [None] * len(rows)
    return [
        form.format(
            text=text, person=target if isinstance(target, str) else "the person", options=options_text(list(labels))
        )
        for text, target in zip(rows["text"], targets, strict=True)
    ]


def _prompt_text(lm: LM, question: str, shots: Sequence[tuple[str, str]], chat: bool) -> str:
    if not chat:
        return "".join(f"{shot} {label}\n\n" for shot, label in shots) + question
    turns = []
    for shot, label in shots:
        turns += [{"role": "user", "content": shot}, {"role": "assistant", "content": label}]
    turns.append({"role": "user", "content": question})
    return str(lm.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _encode(lm: LM, question: str, shots: Sequence[tuple[str, str]], chat: bool, answer: str = "") -> list[int]:
    # A chat template writes its own begin-of-sequence token.
    text = _prompt_text(lm, question, shots, chat) + answer
    return list(lm.tokenizer(text, add_special_tokens=not chat)["input_ids"])


def _label_ids(
    lm: LM, prompt: tuple[int, ...], question: str, shots: Sequence[tuple[str, str]], label: str, chat: bool
) -> tuple[int, ...]:
    """The tokens with which `label` continues a prompt, read off a joint tokenisation and not assumed."""
    joint = tuple(_encode(lm, question, shots, chat, answer=label if chat else f" {label}"))
    if joint[: len(prompt)] != prompt or len(joint) == len(prompt):
        raise EmosaeError(
            f"the tokenizer of {lm.name} merges the label {label!r} into the prompt's last token; "
            "use a template that ends in punctuation"
        )
    return joint[len(prompt) :]


def first_tokens_differ(prompts: Prompts) -> bool:
    """Whether the labels' first tokens are all different, so that one token tells them apart."""
    return len({ids[0] for ids in prompts.label_ids}) == len(prompts.label_ids)


def shared_prefix(ids: Sequence[tuple[int, ...]]) -> int:
    """Number of leading tokens that all prompts share, at most all but the last token of the shortest."""
    if len(ids) < 2:
        return 0
    first, last = min(ids), max(ids)
    limit = min(len(x) for x in ids) - 1
    n = 0
    while n < limit and first[n] == last[n]:
        n += 1
    return n


def _batches(lengths: Sequence[int], batch_tokens: int, spread: int) -> Iterator[list[int]]:
    """Indices of prompts of similar length, longest batches first so that memory runs out early or never."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batch[0]] if batch else lengths[i]
        if batch and ((len(batch) + 1) * longest > batch_tokens or longest - lengths[i] > spread):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def read_out(
    lm: LM,
    prompts: Prompts,
    *,
    layers: Sequence[int] = (),
    parts: bool = False,
    mode: Literal["full", "first"] = "full",
    batch_tokens: int | None = None,
    progress: str = "",
) -> Readout:
    """Score every label after every prompt, and read the residual stream at the read-out position.

    Args:
        lm: the model.
        prompts: from `build_prompts`.
        layers: blocks whose output is read; none by default.
        parts: also read what attention and the feed-forward network of these blocks add to the stream.
        mode: "full" scores the whole label string. "first" scores its first token, which is enough to rank labels
            whose first tokens differ; where they do not, it falls back to "full" and says so in `notes`.
        batch_tokens: tokens per forward pass; the profile's hint if None. It changes speed, not results.
        progress: a caption for a progress bar; none if empty, in CI, or without a terminal.

    Returns:
        Scores in nats, in the order of `prompts`.

    Raises:
        EmosaeError: for a layer out of range, scores that are not finite, or `parts` of an unknown architecture.
    """
    bad = [layer for layer in layers if not 0 <= layer < lm.n_layers]
    if bad:
        raise EmosaeError(f"{lm.name} has layers 0 to {lm.n_layers - 1}; got {bad}")
    notes: tuple[str, ...] = ()
    if mode == "first" and not first_tokens_differ(prompts):
        mode = "full"
        notes = ("two labels begin with the same token, so full label strings were scored",)
    longest_label = max((len(ids) for ids in prompts.label_ids), default=1)
    continued = mode == "full" and longest_label > 1
    n_shared = shared_prefix(prompts.ids)
    if n_shared < MIN_SHARED_TOKENS:
        n_shared = 0
    scores_PE = np.full((len(prompts), len(prompts.labels)), np.nan)
    n_sites = 0 if not layers else 3 if parts else 1
    read_SPLD = np.empty((n_sites, len(prompts), len(layers), lm.d_model), dtype=np.float32)
    with torch.no_grad():
        cache = _prefix_cache(lm, prompts.ids[0][:n_shared]) if n_shared else None
        lengths = [len(ids) - n_shared for ids in prompts.ids]
        # Labels of several tokens continue from the batch's cache, which must then hold no padding.
        spread = 0 if continued else MAX_LENGTH_SPREAD
        bar = tqdm(total=len(prompts), desc=progress, disable=_quiet(progress))
        for batch in _batches(lengths, batch_tokens or lm.profile.batch_tokens, spread):
            suffixes = [prompts.ids[i][n_shared:] for i in batch]
            logits_BV, read_SBLD, past = _forward(lm, suffixes, cache, layers, keep_cache=continued, parts=parts)
            logp_BV = torch.log_softmax(logits_BV.float(), dim=-1)
            scores_BE = logp_BV[:, [ids[0] for ids in prompts.label_ids]].double()
            if continued:
                scores_BE += _continuations(lm, past, len(batch), prompts.label_ids)
            scores_PE[batch] = scores_BE.cpu().numpy()
            if read_SBLD is not None:
                read_SPLD[:, batch] = read_SBLD.float().cpu().numpy()
            bar.update(len(batch))
        bar.close()
    if not np.isfinite(scores_PE).all():
        raise EmosaeError(f"{lm.name} gave scores that are not finite in {lm.dtype}; use dtype='float32'")
    resid_PLD, attn_PLD, ffn_PLD = (*read_SPLD, None, None, None)[:3]
    return Readout(
        scores_PE, resid_PLD, prompts.labels, tuple(layers), mode == "full", notes, attn_PLD=attn_PLD, ffn_PLD=ffn_PLD
    )


def _quiet(progress: str) -> bool | None:
    """The `disable` of tqdm: True for off, False in a notebook, None for "only on a terminal"."""
    if not progress or os.environ.get("CI"):
        return True
    return False if "ipykernel" in sys.modules else None


def _prefix_cache(lm: LM, prefix: Sequence[int]) -> Any:
    """Keys and values of a token prefix, for one row."""
    return lm.hf(torch.tensor([list(prefix)], device=lm.device), use_cache=True, logits_to_keep=1).past_key_values


def _forward(
    lm: LM,
    suffixes: Sequence[Sequence[int]],
    cache: Any,
    layers: Sequence[int],
    keep_cache: bool,
    parts: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
    """Run right-padded suffixes after an optional shared prefix; return read-out logits, residuals and the cache.

    Residuals come as [sites, rows, layers, d_model]: the stream, and with `parts` what attention and FFN added.
    """
    last_B = torch.tensor([len(s) - 1 for s in suffixes], device=lm.device)
    rows_B = torch.arange(len(suffixes), device=lm.device)
    width = int(last_B.max()) + 1
    first_kept = int(last_B.min())
    pad = int(lm.tokenizer.pad_token_id or 0)
    tokens_BS = torch.tensor([[*s, *[pad] * (width - len(s))] for s in suffixes], device=lm.device)
    options: dict[str, Any] = {
        "logits_to_keep": torch.arange(first_kept, width, device=lm.device),
        "use_cache": keep_cache or cache is not None,
    }
    if cache is not None:
        past = copy.deepcopy(cache)
        past.batch_repeat_interleave(len(suffixes))
        options["past_key_values"] = past
    if not layers:
        out = lm.hf(tokens_BS, **options)
        return out.logits[rows_B, last_B - first_kept], None, out.past_key_values
    import nnsight

    blocks = decoder_layers(lm.nn)
    # An all-ones mask says what causal attention over right padding needs: nothing is hidden. Without it nnsight
    # would make one from the padding token.
    n_past = 0 if cache is None else cache.get_seq_length()
    mask_BT = torch.ones((len(suffixes), n_past + width), dtype=torch.long, device=lm.device)
    writers = writer_names(lm) if parts else ()
    with lm.nn.trace({"input_ids": tokens_BS, "attention_mask": mask_BT}, **options):
        read = []
        for layer in range(lm.n_layers):
            if layer in layers:
                sites = []
                for writer in writers:
                    written = getattr(blocks[layer], writer).output
                    sites.append((written[0] if isinstance(written, tuple) else written)[rows_B, last_B])
                read.append(torch.stack([blocks[layer].output[rows_B, last_B], *sites]))
        read_LSBD = nnsight.save(torch.stack(read))
        out = lm.nn.output.save()
    order = [sorted(layers).index(layer) for layer in layers]
    read_SBLD = read_LSBD[order].permute(1, 2, 0, 3)
    return out.logits[rows_B, last_B - first_kept], read_SBLD, out.past_key_values


def _continuations(lm: LM, past: Any, n_rows: int, label_ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Sum of log p over each label's tokens after the first, [rows, labels]; zero for labels of one token."""
    extra_BE = torch.zeros((n_rows, len(label_ids)), dtype=torch.float64, device=lm.device)
    several = [e for e, ids in enumerate(label_ids) if len(ids) > 1]
    width = max(len(label_ids[e]) for e in several) - 1
    pad = int(lm.tokenizer.pad_token_id or 0)
    inputs_MS = torch.tensor([[*label_ids[e][:-1], *[pad] * (width - len(label_ids[e]) + 1)] for e in several])
    past = copy.deepcopy(past)
    past.batch_repeat_interleave(len(several))
    # Row-major over prompts, then labels, as batch_repeat_interleave lays the cache out.
    out = lm.hf(inputs_MS.repeat(n_rows, 1).to(lm.device), past_key_values=past, use_cache=True)
    logp_BMSV = torch.log_softmax(out.logits.float(), dim=-1).view(n_rows, len(several), width, -1)
    for m, e in enumerate(several):
        for step, token in enumerate(label_ids[e][1:]):
            extra_BE[:, e] += logp_BMSV[:, m, step, token].double()
    return extra_BE


def capped(lm: LM, logits: torch.Tensor) -> torch.Tensor:
    """Logits under the model's own soft cap, where it has one."""
    cap = getattr(lm.hf.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def label_differences(lm: LM, stream_XD: torch.Tensor, label_ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Label logits less their mean over labels, [positions, labels], nats, of residual streams put to the output.

    A label counts by its first token; differences of logits are differences of scores, and need only the labels' rows
    of the output matrix. Gradients pass through.

    Args:
        lm: the model.
        stream_XD: streams after the last block, or after an earlier one for the logit lens, in the model's dtype.
        label_ids: tokens of each label.

    Raises:
        EmosaeError: if the model keeps its final norm in an unknown place.
    """
    norm = final_norm(lm)
    if norm is None:
        raise EmosaeError(f"{lm.name} keeps its final norm in an unknown place; add it to final_norm")
    head = lm.hf.get_output_embeddings()
    rows_E = torch.tensor([ids[0] for ids in label_ids], device=stream_XD.device)
    bias_E = None if head.bias is None else head.bias[rows_E]
    logits_XE = torch.nn.functional.linear(norm(stream_XD), head.weight[rows_E], bias_E)
    scores_XE = capped(lm, logits_XE).double()
    return scores_XE - scores_XE.mean(dim=-1, keepdim=True)


def label_prior(
    lm: LM,
    *,
    template: str = DEFAULT_TEMPLATE,
    labels: Sequence[str] = EMOTIONS,
    exemplars: pd.DataFrame | None = None,
    chat: bool = False,
    texts: Sequence[str] = CONTENT_FREE,
) -> FloatArray:
    """Mean label scores over content-free prompts, [labels], nats: what the model says before it has read anything."""
    free = pd.DataFrame({"text": list(texts)})
    prompts = build_prompts(lm, free, template=template, labels=labels, exemplars=exemplars, chat=chat)
    prior_E: FloatArray = read_out(lm, prompts).scores_PE.mean(axis=0)
    return prior_E


def calibrate(scores_PE: FloatArray, prior_E: FloatArray) -> FloatArray:
    """Prior-calibrated scores: the log odds a text adds to what the label gets without one, nats."""
    return scores_PE - prior_E[None, :]


def predict(scores_PE: FloatArray) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Index of the best label per prompt; a tie goes to the first."""
    return scores_PE.argmax(axis=1)


def gold_logit_difference(
    scores_PE: FloatArray, gold_P: np.ndarray[Any, np.dtype[np.integer[Any]]]
) -> np.ndarray[Any, np.dtype[np.floating[Any]]]:
    """s_gold minus the mean of the other labels' scores, [prompts], nats."""
    n_labels = scores_PE.shape[1]
    gold = np.take_along_axis(scores_PE, gold_P[:, None], axis=1)[:, 0]
    others: FloatArray = (scores_PE.sum(axis=1) - gold) / (n_labels - 1)
    return gold - others
