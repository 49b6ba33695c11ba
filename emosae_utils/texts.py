"""Is a set of texts fit for studying emotion inference? Measures of leaks, length and near-duplicates.

The embedded sets are held to these by the tests; the chapter on the texts shows the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy.stats import kruskal
from sklearn.feature_extraction.text import CountVectorizer

from emosae_utils import probes, stats
from emosae_utils.data import EMOTIONS, cards, is_present, load_corpus
from emosae_utils.files import repo_dir

Array = np.ndarray[Any, np.dtype[Any]]


@cache
def lexicon() -> dict[str, tuple[str, ...]]:
    """Words that name an emotion or a near synonym, by emotion; a trailing * stands for any ending."""
    text = (repo_dir() / "data" / "emoscenes" / "lexicon.yaml").read_text(encoding="utf-8")
    return {emotion: tuple(words) for emotion, words in yaml.safe_load(text).items()}


@cache
def _lexicon_pattern() -> re.Pattern[str]:
    words = [re.escape(w).replace(r"\*", r"\w*") for group in lexicon().values() for w in group]
    return re.compile(rf"\b(?:{'|'.join(words)})\b", re.IGNORECASE)


def named_emotions(text: str) -> list[str]:
    """The words of a text that are in the lexicon; "please" as a courtesy is not one of them."""
    return [w for w in _lexicon_pattern().findall(text) if w.lower() != "please"]


def closest_pairs(texts: Sequence[str], n: int = 10) -> pd.DataFrame:
    """The `n` pairs of texts with the largest token Jaccard overlap. Columns: first, second (indices), jaccard."""
    counts = CountVectorizer(binary=True, token_pattern=r"(?u)\b[\w']+\b").fit_transform(texts)
    both = (counts @ counts.T).toarray().astype(float)
    size = np.asarray(counts.sum(axis=1)).ravel()
    jaccard = np.triu(both / (size[:, None] + size[None, :] - both), k=1)
    flat = np.argsort(jaccard, axis=None)[::-1][:n]
    first, second = np.unravel_index(flat, jaccard.shape)
    return pd.DataFrame({"first": first, "second": second, "jaccard": jaccard[first, second]})


def length_test(frame: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    """Words per text by emotion (mean, standard deviation, n), and the Kruskal-Wallis p of equal distributions."""
    words = frame["text"].str.split().str.len()
    table = words.groupby(frame["emotion"]).agg(["mean", "std", "size"])
    return table, float(kruskal(*[words[frame["emotion"] == e] for e in table.index]).pvalue)


def lexical_giveaway(
    frame: pd.DataFrame, *, labels: Sequence[str] = EMOTIONS, n_draws: int = 2000, seed: int = 0
) -> stats.Estimate:
    """Accuracy of a bag-of-words classifier on topics it was not trained on, with an interval over topics.

    Low is good: the texts then cannot be told apart by their words, only by what happens in them. Four folds of
    topics; `frame` needs text, emotion and group.
    """
    here = frame[frame["emotion"].isin(labels)].reset_index(drop=True)
    y = here["emotion"].map({e: i for i, e in enumerate(labels)}).to_numpy(dtype=int)
    pred = np.zeros_like(y)
    for train, test in probes.grouped_folds(y, here["group"].tolist(), seed=seed):
        texts = here["text"].to_numpy()
        pred[test] = probes.bag_of_words(texts[train], y[train], texts[test])
    counts = stats.group_confusions(y, pred, here["group"].tolist(), len(labels))
    (found,) = stats.estimate(stats.accuracy, counts, stats.bootstrap_weights(len(counts), n_draws, seed))
    return found


def telling_words(frame: pd.DataFrame, emotions: Iterable[str] = EMOTIONS, n: int = 8) -> pd.DataFrame:
    """Words most tied to each emotion: smoothed log odds over texts. Columns: emotion, word, inside, outside."""
    vectorizer = CountVectorizer(binary=True, min_df=3)
    counts = vectorizer.fit_transform(frame["text"]).toarray()
    words = vectorizer.get_feature_names_out()
    records = []
    for emotion in emotions:
        mine = (frame["emotion"] == emotion).to_numpy()
        inside, outside = counts[mine].sum(axis=0), counts[~mine].sum(axis=0)
        odds = np.log((inside + 0.5) / (mine.sum() + 1)) - np.log((outside + 0.5) / ((~mine).sum() + 1))
        for i in np.argsort(odds)[::-1][:n]:
            records.append({"emotion": emotion, "word": words[i], "inside": int(inside[i]), "outside": int(outside[i])})
    return pd.DataFrame(records)


def public_overview() -> pd.DataFrame:
    """The public datasets: licence, rows of the six emotions, and what was left out for which reason, where present."""
    records = []
    for card in cards():
        if not card.is_public:
            continue
        kept, left_out = "not here", ""
        if is_present(card.name):
            counts = load_corpus(card.name).cleaning
            kept = f"{counts['rows kept']:,}"
            left_out = "; ".join(
                f"{reason} {n:,}" for reason, n in counts.items() if n and not reason.startswith("rows")
            )
        records.append({"dataset": card.title, "licence": card.licence, "rows of the six": kept, "left out": left_out})
    return pd.DataFrame(records).set_index("dataset")
