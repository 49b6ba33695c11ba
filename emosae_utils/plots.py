"""The book's figures and tables: one look, one colour per emotion everywhere, readable without colour and in dark mode.

Colours are the Okabe-Ito set, which stays apart under the common colour-vision deficiencies; every emotion has its own
marker too. The face of a figure is always white, so that it looks the same on a dark page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from emosae_utils import repair
from emosae_utils.causal import CROSS, NEUTRAL, SAME_EMOTION, here
from emosae_utils.difficulty import (
    CALIBRATED,
    CODES,
    FEW_SHOT,
    FEW_SHOT_CALIBRATED,
    MAJORITY,
    PROBE,
    RAW,
    READER,
    VOTE,
    WORDS,
)
from emosae_utils.effects import ALL_ROWS, CONTRAST, EFFECT, KINDS, PHASE_NAMES
from emosae_utils.flow import ABOVE, MEAN, RESPONSIVE, TOP
from emosae_utils.wording import only, places

COLOURS: dict[str, str] = {
    "anger": "#D55E00",
    "disgust": "#009E73",
    "fear": "#A6518A",
    "joy": "#E69F00",
    "sadness": "#0072B2",
    "surprise": "#56B4E9",
    "neutral": "#808080",
}
MARKERS: dict[str, str] = {
    "anger": "^",
    "disgust": "s",
    "fear": "v",
    "joy": "o",
    "sadness": "D",
    "surprise": "P",
    "neutral": "X",
}
# From the least informed method to the best informed one, as the figures list them.
METHOD_ORDER = (MAJORITY, WORDS, RAW, FEW_SHOT, CALIBRATED, FEW_SHOT_CALIBRATED, PROBE, CODES, READER, VOTE)
RUNG_LABELS = {
    RAW: "raw\nanswer",
    CALIBRATED: "prior-\ncalibrated",
    PROBE: "residual\nprobe",
    CODES: "code\nprobe",
    READER: "one\nreader",
}


def with_intervals(table: pd.DataFrame, rows: Sequence[str], columns: str, *, signed: bool = False) -> pd.DataFrame:
    """A table to read: "0.31 [0.27, 0.35]" from value, low and high, spread over `columns`."""
    sign = "+" if signed else ""
    cells = [
        f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"
        for value, low, high in table[["value", "low", "high"]].to_numpy(dtype=float)
    ]
    # Methods and emotions in the book's order, everything else by name.
    orders = {"method": METHOD_ORDER, "emotion": tuple(COLOURS)}
    ranked = {c: pd.Categorical(table[c], categories=orders[c]) for c in rows if c in orders}
    wide = table.assign(cell=cells, **ranked).pivot_table(
        index=list(rows), columns=columns, values="cell", aggfunc="first", observed=True
    )
    wide = wide[list(dict.fromkeys(table[columns]))].fillna("")
    wide.columns.name = None
    return wide


def set_style() -> None:
    """Apply the book's figure style; called once at the top of a notebook."""
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.9)
    plt.rcParams.update(
        {
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "axes.facecolor": "white",
            "figure.dpi": 110,
            "savefig.dpi": 160,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "grid.color": "#E6E6E6",
        }
    )


def _note(text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure, ax = plt.subplots(figsize=(6, 0.8))
    ax.set_axis_off()
    ax.text(0, 0.5, text, va="center")
    return figure


def _bars(ax: Axes, x: Any, table: pd.DataFrame, **style: Any) -> None:
    """Points with their intervals as vertical lines."""
    ax.errorbar(x, table["value"], yerr=[table["value"] - table["low"], table["high"] - table["value"]], **style)


def _spread_labels(values: Sequence[float], gap: float) -> list[float]:
    """Heights for text labels near `values` that keep at least `gap` between neighbours."""
    order = np.argsort(values)
    heights = np.array(values, dtype=float)
    for _ in range(200):
        moved = False
        for low, high in pairwise(order):
            short = gap - (heights[high] - heights[low])
            if short > 1e-9:
                heights[low] -= short / 2
                heights[high] += short / 2
                moved = True
        if not moved:
            break
    return [float(h) for h in heights]


def ladder(metrics: pd.DataFrame, datasets: Sequence[str], models: Sequence[str]) -> Figure:
    """Recall per emotion at each rung of the difficulty ladder, one panel per dataset (row) and model (column)."""
    figure, grid = plt.subplots(
        len(datasets), len(models), figsize=(4.6 * len(models), 3.7 * len(datasets)), sharey=True, squeeze=False
    )
    recalls = metrics[(metrics["metric"] == "recall") & (metrics["variant"] == "")]
    for row, dataset in enumerate(datasets):
        for column, model in enumerate(models):
            ax = grid[row][column]
            here = recalls[(recalls["dataset"] == dataset) & recalls["model"].isin([model, ""])]
            rungs = [r for r in RUNG_LABELS if r in set(here["method"])]
            emotions = [e for e in COLOURS if e in set(here["emotion"])]
            last = []
            for i, emotion in enumerate(emotions):
                line = here[here["emotion"] == emotion].set_index("method").loc[rungs]
                offset = (i - (len(emotions) - 1) / 2) * 0.055
                style = {"color": COLOURS[emotion], "marker": MARKERS[emotion], "ms": 6, "lw": 1.6, "elinewidth": 1}
                _bars(ax, np.arange(len(rungs)) + offset, line, alpha=0.9, **style)
                last.append(float(line["value"].iloc[-1]))
            for emotion, y in zip(emotions, _spread_labels(last, 0.065), strict=True):
                ax.text(len(rungs) - 1 + 0.24, y, emotion, color=COLOURS[emotion], va="center", fontsize=9)
            ax.axhline(1 / len(emotions), color="#999999", ls=":", lw=1)
            ax.set_xticks(range(len(rungs)), [RUNG_LABELS[r] for r in rungs])
            ax.set_xlim(-0.35, len(rungs) - 1 + 0.85)
            ax.set_ylim(-0.03, 1.03)
            ax.set_title(f"{model} · {dataset}")
            if column == 0:
                ax.set_ylabel("recall (share of rows)")
    return figure


def confusions(counts: pd.DataFrame, dataset: str, model: str, methods: Sequence[str]) -> Figure:
    """Confusion matrices side by side; each row is one gold emotion and sums to 1."""
    figure, axes = plt.subplots(1, len(methods), figsize=(4.1 * len(methods), 3.9), squeeze=False)
    here = counts[(counts["dataset"] == dataset) & counts["model"].isin([model, ""])]
    emotions = [e for e in COLOURS if e in set(here["gold"])]
    for ax, method in zip(axes[0], methods, strict=True):
        table = here[here["method"] == method].pivot_table(index="gold", columns="pred", values="count", aggfunc="sum")
        table = table.reindex(index=emotions, columns=emotions, fill_value=0).fillna(0)
        shares = table.div(table.sum(axis=1), axis=0)
        sns.heatmap(
            shares, ax=ax, vmin=0, vmax=1, cmap="cividis", annot=True, fmt=".2f", cbar=False, annot_kws={"size": 8}
        )
        ax.set_title(method)
        ax.set_xlabel("predicted")
        ax.set_ylabel("gold" if method == methods[0] else "")
        ax.tick_params(axis="x", rotation=40)
        ax.tick_params(axis="y", rotation=0)
    return figure


def methods(metrics: pd.DataFrame, datasets: Sequence[str], models: Sequence[str]) -> Figure:
    """Macro-F1 of every method with its interval, one panel per dataset; models side by side by marker."""
    figure, axes = plt.subplots(1, len(datasets), figsize=(4.9 * len(datasets) + 1.2, 4.0), sharey=True, squeeze=False)
    shown = metrics[(metrics["metric"] == "macro_f1") & metrics["variant"].isin(["", "all"])]
    order = [m for m in METHOD_ORDER if m in set(shown["method"])]
    styles = {
        "": ("#555555", "D"),
        **dict(zip(models, (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^")), strict=False)),
    }
    for ax, dataset in zip(axes[0], datasets, strict=True):
        for k, (model, (colour, marker)) in enumerate(styles.items()):
            table = shown[(shown["dataset"] == dataset) & (shown["model"] == model)].set_index("method")
            table = table.loc[[m for m in order if m in table.index]]
            y = np.array([order.index(m) for m in table.index]) + (0 if model == "" else (k - 1.5) * 0.22)
            error = [table["value"] - table["low"], table["high"] - table["value"]]
            label = model or "without a model"
            ax.errorbar(table["value"], y, xerr=error, fmt=marker, color=colour, ms=6, elinewidth=1.4, label=label)
        ax.set_yticks(range(len(order)), order)
        ax.set_ylim(len(order) - 0.4, -0.6)
        ax.set_xlim(0, max(0.8, float(shown["high"].max()) + 0.03))
        ax.set_xlabel("macro-F1")
        ax.set_title(dataset)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    return figure


def priors(table: pd.DataFrame) -> Figure:
    """Label prior per model: mean label score without content, relative to the mean label (columns as in the table)."""
    models = list(dict.fromkeys(table["model"]))
    figure, axes = plt.subplots(1, len(models), figsize=(4.6 * len(models), 3.0), sharey=True, squeeze=False)
    for ax, model in zip(axes[0], models, strict=True):
        here = table[table["model"] == model]
        emotions = [e for e in COLOURS if e in set(here["emotion"])]
        for k, (source, fill) in enumerate((("content-free prompts", True), ("neutral texts", False))):
            part = here[here["source"] == source].set_index("emotion")
            if part.empty:
                continue
            values = part.loc[emotions, "value"]
            x = np.arange(len(emotions)) + (k - 0.5) * 0.38
            colours = [COLOURS[e] for e in emotions]
            ax.bar(x, values, width=0.34, color=colours if fill else "white", edgecolor=colours, lw=1.5, label=source)
        ax.axhline(0, color="#444444", lw=0.8)
        ax.set_xticks(range(len(emotions)), emotions, rotation=30)
        ax.set_title(model)
    axes[0][0].set_ylabel("log p(label), relative to\nthe mean label (nats)")
    axes[0][-1].legend(fontsize=8, loc="best")
    return figure


def templates(metrics: pd.DataFrame, dataset: str, models: Sequence[str]) -> Figure:
    """Macro-F1 of every wording of the question, raw and calibrated."""
    shown = metrics[
        (metrics["dataset"] == dataset)
        & (metrics["metric"] == "macro_f1")
        & metrics["method"].isin(["template raw", "template calibrated"])
    ]
    figure, axes = plt.subplots(1, len(models), figsize=(4.6 * len(models), 2.9), sharex=True, squeeze=False)
    for ax, model in zip(axes[0], models, strict=True):
        here = shown[shown["model"] == model]
        order = list(dict.fromkeys(here["variant"]))
        for k, (method, colour, marker) in enumerate(
            (("template raw", "#888888", "o"), ("template calibrated", "#0072B2", "s"))
        ):
            table = here[here["method"] == method].set_index("variant").loc[order]
            error = [table["value"] - table["low"], table["high"] - table["value"]]
            y = np.arange(len(order)) + (k - 0.5) * 0.2
            ax.errorbar(table["value"], y, xerr=error, fmt=marker, color=colour, ms=6, label=method.split()[1])
        ax.set_yticks(range(len(order)), order)
        ax.set_ylim(len(order) - 0.4, -0.6)
        ax.set_xlabel("macro-F1")
        ax.set_title(model)
    axes[0][0].legend(fontsize=8, loc="best")
    return figure


def layer_curves(table: pd.DataFrame) -> Figure:
    """Cross-validated probe accuracy over depth, one line per model and dataset, the chosen layer ringed."""
    figure, ax = plt.subplots(figsize=(7.2, 3.2))
    palette = ("#0072B2", "#D55E00", "#009E73", "#A6518A")
    for colour, ((model, dataset), line) in zip(
        palette * 4, table.groupby(["model", "dataset"], sort=False), strict=False
    ):
        depth = line["layer"] / (line["n_layers"] - 1)
        ax.plot(depth, line["accuracy"], color=colour, lw=1.8, label=f"{model} · {dataset}")
        chosen = line["chosen"].to_numpy()
        ax.scatter(depth[chosen], line["accuracy"][chosen], s=90, facecolors="none", edgecolors=colour, lw=1.8)
    ax.axhline(float(table["chance"].iloc[0]), color="#999999", ls=":", lw=1)
    ax.set_xlabel("depth (0 = after the first block, 1 = after the last)")
    ax.set_ylabel("accuracy")
    ax.set_ylim(0, None)
    ax.legend(fontsize=8, loc="best")
    return figure


def lengths(frame: pd.DataFrame) -> Figure:
    """Words per text and emotion, as boxes over all texts."""
    figure, ax = plt.subplots(figsize=(7.2, 2.8))
    emotions = [e for e in COLOURS if e in set(frame["emotion"])]
    table = frame.assign(words=frame["text"].str.split().str.len())
    sns.boxplot(
        table, x="emotion", y="words", order=emotions, hue="emotion", hue_order=emotions, ax=ax, width=0.55,
        palette=[COLOURS[e] for e in emotions], saturation=0.85, fliersize=2, legend=False,
    )  # fmt: skip
    ax.set_xlabel("")
    ax.set_ylabel("words per text")
    return figure


MODEL_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#A6518A")


def _over_depth(ax: Axes, line: pd.DataFrame, value: str, colour: str, label: str, low: str = "", **style: Any) -> None:
    """One curve over depth, with a band where the table has an interval."""
    ax.plot(line["depth"], line[value], color=colour, label=label, **{"lw": 1.8, **style})
    if low:
        ax.fill_between(line["depth"], line[low], line[low.replace("_low", "_high")], color=colour, alpha=0.18, lw=0)


def dictionary_variance(table: pd.DataFrame, bar: float) -> Figure:
    """Variance explained at the read-out over depth: the dictionaries and their controls, one panel per model."""
    models = list(dict.fromkeys(table["model"]))
    figure, axes = plt.subplots(1, len(models), figsize=(4.9 * len(models), 3.4), sharey=True, squeeze=False)
    for ax, model in zip(axes[0], models, strict=True):
        line = table[table["model"] == model]
        _over_depth(ax, line, "read_out_variance", "#0072B2", "dictionary", "read_out_low", marker="o", ms=4)
        _over_depth(ax, line, "pca_variance", "#D55E00", "principal components", "pca_low", ls="--")
        _over_depth(ax, line, "random_variance", "#777777", "random dictionary", "random_low", ls=":")
        ax.axhline(bar, color="#222222", lw=0.8)
        ax.text(0.0, bar + 0.012, "bar", fontsize=8, va="bottom")
        ax.set_xlabel("depth")
        ax.set_ylim(min(0.0, float(line["random_low"].min()) - 0.03), 1.02)
        ax.set_title(model)
    axes[0][0].set_ylabel("share of variance explained")
    axes[0][0].legend(fontsize=8, loc="lower left")
    return figure


def dictionary_probes(table: pd.DataFrame, chance: float) -> Figure:
    """Held-out accuracy of emotion probes over depth, on residuals, codes and difference-of-means directions."""
    models = list(dict.fromkeys(table["model"]))
    figure, axes = plt.subplots(1, len(models), figsize=(4.9 * len(models), 3.2), sharey=True, squeeze=False)
    shown = (("probe_residual", "residual", "#0072B2", "-"), ("probe_codes", "codes", "#D55E00", "--"))
    for ax, model in zip(axes[0], models, strict=True):
        line = table[table["model"] == model]
        for value, label, colour, dash in (*shown, ("probe_means", "difference of means", "#009E73", ":")):
            _over_depth(ax, line, value, colour, label, ls=dash)
        ax.axhline(chance, color="#999999", ls=":", lw=1)
        ax.set_xlabel("depth")
        ax.set_ylim(0, None)
        ax.set_title(model)
    axes[0][0].set_ylabel("accuracy, held-out topics")
    axes[0][0].legend(fontsize=8, loc="lower right")
    return figure


def dictionary_splices(table: pd.DataFrame, score_bar: float, loss_bar: float) -> Figure:
    """What the model does with the reconstruction: change of label scores, and cross-entropy recovered in text."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.8, 3.3))
    for colour, (model, line) in zip(MODEL_COLOURS, table.groupby("model", sort=False), strict=False):
        _over_depth(left, line, "score_change", colour, model, "score_change_low", marker="o", ms=3)
        _over_depth(right, line, "loss_recovered", colour, model, "loss_low", marker="o", ms=3)
    for ax, bar in ((left, score_bar), (right, loss_bar)):
        ax.axhline(bar, color="#222222", lw=0.8)
        ax.text(1.0, bar, "bar", fontsize=8, va="bottom", ha="right")
        ax.set_xlabel("depth")
    left.set_ylim(0, None)
    right.set_ylim(min(0.8, float(table["loss_low"].min()) - 0.02), 1.01)
    left.set_ylabel("mean |change| of a label score (nats)")
    right.set_ylabel("cross-entropy recovered (share)")
    left.set_title("emotion prompts")
    right.set_title("running text")
    left.legend(fontsize=8, loc="best")
    return figure


def dictionary_stability(table: pd.DataFrame, threshold: float = 0.7) -> Figure:
    """How close the nearest feature of another seed is, per layer, beside a random dictionary."""
    pairs = list(dict.fromkeys(zip(table["model"], table["layer"], strict=True)))
    if not pairs:
        return _note("No second seed was trained for the layers of this run.")
    figure, axes = plt.subplots(1, len(pairs), figsize=(2.9 * len(pairs), 2.8), sharey=True, squeeze=False)
    bins = np.linspace(0, 1, 41)
    for ax, (model, layer) in zip(axes[0], pairs, strict=True):
        here = table[(table["model"] == model) & (table["layer"] == layer)]
        for kind, colour in (("another seed", "#0072B2"), ("random", "#999999")):
            cosine = here[here["kind"] == kind]["cosine"]
            weights = np.full(len(cosine), 1 / max(1, len(cosine)))
            ax.hist(cosine, bins=bins, weights=weights, histtype="stepfilled", alpha=0.6, color=colour, label=kind)
        ax.axvline(threshold, color="#222222", lw=0.8)
        share = float((here[here["kind"] == "another seed"]["cosine"] >= threshold).mean())
        ax.set_title(f"{model}\nlayer {layer}: {share:.0%}", fontsize=9)
        ax.set_xlabel("cosine of nearest")
    axes[0][0].set_ylabel("share of features")
    axes[0][0].legend(fontsize=8, loc="upper right")
    return figure


# One colour and one dash per kind of information, in every figure of the chapter on flow.
FLOW_STYLES: dict[str, dict[str, Any]] = {
    "form": {"color": "#0072B2", "ls": "--"},
    "topic": {"color": "#009E73", "ls": (0, (5, 1.5, 1, 1.5))},
    "emotion": {"color": "#D55E00", "ls": "-"},
    "person": {"color": "#56B4E9", "ls": "--"},
    "tense": {"color": "#332288", "ls": ":"},
    "length": {"color": "#999999", "ls": "-."},
}
FLOW_PLACES = ("codes", "residual", "attention", "FFN")
FLOW_MARKERS = {"form": "s", "topic": "D", "emotion": "o"}


def _flow_grid(table: pd.DataFrame, dataset: str, height: float) -> tuple[Figure, list[tuple[Axes, str, str]]]:
    """A panel per model (row) and representation (column), shared axes, with its labels."""
    here = table[table["dataset"] == dataset]
    models = list(dict.fromkeys(here["model"]))
    places = [p for p in FLOW_PLACES if p in set(here["representation"])]
    figure, grid = plt.subplots(
        len(models), len(places), figsize=(3.1 * len(places) + 0.8, height * len(models)),
        sharex=True, sharey="row", squeeze=False,
    )  # fmt: skip
    panels = []
    for row, model in enumerate(models):
        for column, place in enumerate(places):
            ax = grid[row][column]
            ax.set_title(f"{model}\n{place}" if column == 0 else place, fontsize=10, loc="left")
            if row == len(models) - 1:
                ax.set_xlabel("depth")
            panels.append((ax, model, place))
    return figure, panels


def _flow_part(table: pd.DataFrame, dataset: str, model: str, place: str) -> pd.DataFrame:
    keep = (table["dataset"] == dataset) & (table["model"] == model) & (table["representation"] == place)
    return table[keep]


def _banded(ax: Axes, line: pd.DataFrame, colour: str, label: str, **style: Any) -> None:
    """A curve over depth with its interval as a band."""
    banded = line.rename(columns={"low": "value_low", "high": "value_high"})
    _over_depth(ax, banded, "value", colour, label, "value_low", **style)


def _flow_curves(ax: Axes, lines: pd.DataFrame, factors: Sequence[str], column: str = "factor") -> None:
    """Curves with bands and, thin, what shuffled labels stay below."""
    for factor in factors:
        line = lines[lines[column] == factor].sort_values("depth")
        if len(line):
            style = FLOW_STYLES[factor]
            _banded(ax, line, style["color"], factor, ls=style["ls"])
            ax.plot(line["depth"], line["null_high"], color=style["color"], lw=0.7, ls=":")


def _flow_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    found = {n: h for ax in axes for h, n in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        found.values(), found, loc="outside lower center", ncols=max(1, len(found)), frameon=False, fontsize=9
    )


def flow_shares(shares: pd.DataFrame, phases: pd.DataFrame, dataset: str) -> Figure:
    """Variance within wordings that goes with form, topic and emotion, over depth; the chosen boundaries as lines."""
    figure, panels = _flow_grid(shares, dataset, 2.7)
    for ax, model, place in panels:
        _flow_curves(ax, _flow_part(shares, dataset, model, place), ("form", "topic", "emotion"))
        if len(phases):
            cuts = _flow_part(phases, dataset, model, place)
            for row in cuts[(cuts["what"] == "boundary") & cuts["chosen"]].itertuples():
                ax.axvspan(row.depth_low, row.depth_high, color="#777777", alpha=0.15, lw=0)
                ax.axvline(row.depth_value, color="#444444", lw=0.8)
        ax.axhline(0, color="#bbbbbb", lw=0.6)
        if place == panels[0][2]:
            ax.set_ylabel("share of variance\nwithin wordings")
    _flow_legend(figure, [ax for ax, _, _ in panels])
    return figure


def flow_surface(shares: pd.DataFrame, dataset: str) -> Figure:
    """Left: all variance that goes with the wording of the question. Right: the parts of the text's own form."""
    here = shares[shares["dataset"] == dataset]
    models = list(dict.fromkeys(here["model"]))
    figure, grid = plt.subplots(len(models), 2, figsize=(8.4, 2.6 * len(models)), sharex=True, squeeze=False)
    dashes = ("-", "--", ":", "-.")
    for (left, right), model in zip(grid, models, strict=True):
        lines = here[here["model"] == model]
        for place, colour, dash in zip(FLOW_PLACES, MODEL_COLOURS, dashes, strict=True):
            line = lines[(lines["representation"] == place) & (lines["factor"] == "template")]
            if len(line):
                _banded(left, line, colour, place, ls=dash)
        place = next(p for p in FLOW_PLACES if p in set(lines["representation"]))
        _flow_curves(right, lines[lines["representation"] == place], ("person", "tense", "length"))
        left.set_title(f"{model} · wording", fontsize=10)
        right.set_title(f"{model} · form of the text, {place}", fontsize=10)
        left.set_ylabel("share of all variance")
        right.set_ylabel("share within wordings")
        left.set_ylim(0, 1.02)
        for ax in (left, right):
            if ax.has_data():
                ax.legend(fontsize=8, loc="best")
    for ax in grid[-1]:
        ax.set_xlabel("depth")
    return figure


def flow_probes(table: pd.DataFrame, dataset: str) -> Figure:
    """Accuracy of linear probes over depth, with what shuffled labels reach."""
    figure, panels = _flow_grid(table, dataset, 2.7)
    for ax, model, place in panels:
        lines = _flow_part(table, dataset, model, place)
        _flow_curves(ax, lines, ("person", "tense", "topic", "emotion"))
        ax.set_ylim(0, 1.02)
        if place == panels[0][2]:
            ax.set_ylabel("accuracy, left-out groups")
    _flow_legend(figure, [ax for ax, _, _ in panels])
    return figure


def flow_features(table: pd.DataFrame, dataset: str) -> Figure:
    """What single features tell of the emotion over depth, one panel per measure, one line per model."""
    if not len(table) or dataset not in set(table["dataset"]):
        return _note("No model of this run has dictionaries.")
    figure, axes = plt.subplots(1, 4, figsize=(12.6, 3.1), sharex=True)
    here = table[table["dataset"] == dataset]
    titles = {
        MEAN: "mutual information,\nall active features",
        TOP: "the most informative",
        ABOVE: "beyond their own null",
        RESPONSIVE: "responsive, FDR 5 %",
    }
    for ax, measure in zip(axes, titles, strict=True):
        for colour, dash, (model, line) in zip(
            MODEL_COLOURS,
            ("-", "--", ":", "-."),
            here[here["measure"] == measure].groupby("model", sort=False),
            strict=False,
        ):
            _banded(ax, line, colour, model, ls=dash, marker="o", ms=3)
            if measure != RESPONSIVE:
                ax.plot(line["depth"], line["null_high"], color=colour, lw=0.8, ls=":")
        ax.set_title(titles[measure], fontsize=10)
        ax.set_ylabel("nats" if measure in (MEAN, TOP) else "share of active features")
        ax.set_ylim(0, None)
        ax.set_xlabel("depth")
    axes[0].legend(fontsize=8, loc="best")
    return figure


def flow_lens(table: pd.DataFrame, dataset: str) -> Figure:
    """Logit lens over depth: accuracy raw and calibrated, and the calibrated gold difference of each emotion."""
    here = table[table["dataset"] == dataset]
    models = list(dict.fromkeys(here["model"]))
    figure, grid = plt.subplots(len(models), 2, figsize=(9.0, 2.9 * len(models)), sharex=True, squeeze=False)
    for (left, right), model in zip(grid, models, strict=True):
        lines = here[here["model"] == model]
        shown = (("accuracy, raw", "#888888", "--"), ("accuracy, calibrated", "#0072B2", "-"))
        for measure, colour, dash in shown:
            line = lines[lines["measure"] == measure]
            _banded(left, line, colour, measure.split(", ")[1], ls=dash)
        left.plot(line["depth"], line["null_high"], color="#0072B2", lw=0.8, ls=":", label="shuffled labels, 95 %")
        gaps = lines[(lines["measure"] == "gold difference") & (lines["emotion"] != "all")]
        for emotion in (e for e in COLOURS if e in set(gaps["emotion"])):
            line = gaps[gaps["emotion"] == emotion]
            _banded(
                right,
                line,
                COLOURS[emotion],
                emotion,
                marker=MARKERS[emotion],
                ms=4,
                lw=1.4,
                markevery=3,
            )
        right.axhline(0, color="#444444", lw=0.8)
        left.set_ylim(0, None)
        left.set_title(f"{model} · accuracy of the lens", fontsize=10)
        right.set_title(f"{model} · gold logit difference (nats)", fontsize=10)
        left.legend(fontsize=8, loc="best")
        right.legend(fontsize=7, loc="upper left", ncols=2)
    for ax in grid[-1]:
        ax.set_xlabel("depth")
    return figure


def flow_phases(phases: pd.DataFrame, dataset: str) -> Figure:
    """Onsets of form, topic and emotion, and chosen phase boundaries, with intervals, per representation."""
    if not len(phases) or dataset not in set(phases["dataset"]):
        return _note("Too few layers were read to look for phases.")
    here = phases[phases["dataset"] == dataset]
    models = list(dict.fromkeys(here["model"]))
    order = [p for p in ("codes", "residual", "residual, raw", "attention", "FFN") if p in set(here["representation"])]
    figure, axes = plt.subplots(
        1, len(models), figsize=(4.8 * len(models) + 0.6, 0.62 * len(order) + 1.3), sharey=True, squeeze=False
    )
    for ax, model in zip(axes[0], models, strict=True):
        for row in here[(here["model"] == model) & here["chosen"]].itertuples():
            y = order.index(row.representation)
            ends = [[row.depth_value - row.depth_low], [row.depth_high - row.depth_value]]
            if row.what == "boundary":
                ax.errorbar([row.depth_value], [y + 0.3], xerr=ends, fmt="|", color="#444444", ms=11, elinewidth=1)
                continue
            style = {"color": FLOW_STYLES[row.name]["color"], "fmt": FLOW_MARKERS[row.name], "ms": 6, "elinewidth": 1.4}
            shift = {"form": -0.24, "topic": -0.08, "emotion": 0.08}[row.name]
            ax.errorbar([row.depth_value], [y + shift], xerr=np.maximum(ends, 0), label=row.name, **style)
        ax.set_yticks(range(len(order)), order)
        ax.set_ylim(len(order) - 0.4, -0.6)
        ax.set_xlim(-0.03, 1.03)
        ax.set_xlabel("depth")
        ax.set_title(model)
    _flow_legend(figure, list(axes[0]))
    return figure


def features_counts(counts: pd.DataFrame) -> Figure:
    """Share of testable features that respond to emotion over layers (top), and the size of each emotion's set."""
    models = list(dict.fromkeys(counts["model"]))
    figure, grid = plt.subplots(2, len(models), figsize=(4.9 * len(models), 5.0), sharex="col", squeeze=False)
    for column, model in enumerate(models):
        here = counts[counts["model"] == model]
        top, bottom = grid[0][column], grid[1][column]
        line = here[here["set"] == "responsive"]
        top.plot(line["layer"], line["share"], color="#222222", marker="o", ms=4, lw=1.6, label="responsive")
        high = line["null_high"] / line["testable"].clip(lower=1)
        top.fill_between(line["layer"], 0, high, color="#999999", alpha=0.5, lw=0, label="95 % of shuffles")
        top.set_ylim(0, max(0.05, 1.1 * float(line["share"].max())))
        top.set_title(model)
        for emotion in (e for e in COLOURS if e in set(here["set"])):
            own = here[here["set"] == emotion]
            style = {"color": COLOURS[emotion], "marker": MARKERS[emotion], "ms": 4, "lw": 1.3}
            bottom.plot(own["layer"], own["features"], label=emotion, **style)
        bottom.set_ylim(0, None)
        bottom.set_xlabel("layer")
        bottom.xaxis.get_major_locator().set_params(integer=True)
    grid[0][0].set_ylabel("share of testable features")
    grid[1][0].set_ylabel("features in the set")
    grid[0][0].legend(fontsize=8, loc="best")
    handles, names = grid[1][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3 * len(models), frameon=False, fontsize=9)
    return figure


def features_entropy(table: pd.DataFrame, cuts: dict[str, Any]) -> Figure:
    """Normalised entropy of the responsive features, the same under permuted labels, the mixture and the cut."""
    table = table[table["responsive"]]
    models = [m for m in cuts if (table["model"] == m).any()]
    if not models:
        return _note("No feature responds.")
    figure, axes = plt.subplots(1, len(models), figsize=(4.9 * len(models), 3.2), sharey=True, squeeze=False)
    bins = np.linspace(0, 1, 51)
    x = np.linspace(0, 1, 400)
    for ax, model in zip(axes[0], models, strict=True):
        here, cut = table[table["model"] == model], cuts[model]
        ax.hist(here["entropy"], bins=bins, density=True, color="#0072B2", alpha=0.55, label="responsive features")
        style: dict[str, Any] = {"density": True, "histtype": "step", "color": "#777777", "lw": 1.4}
        ax.hist(here["entropy_shuffled"], bins=bins, label="same, labels permuted", **style)
        for mean, spread, share in zip(cut.means, cut.spreads, cut.shares, strict=True):
            curve = share / (spread * np.sqrt(2 * np.pi)) * np.exp(-0.5 * ((x - mean) / spread) ** 2)
            ax.plot(x, curve, color="#D55E00", lw=1.4)
        ax.axvline(cut.value, color="#222222", ls="-" if cut.natural else "--", lw=1)
        ax.set_xlim(0.1 * np.floor(10 * min(cut.value, float(table["entropy"].min())) - 0.1), 1)
        ax.set_xlabel("normalised entropy over emotions")
        ax.set_title(model)
    # The curve of a permuted feature near 1 would flatten the rest.
    tallest = max(
        float(np.histogram(table.loc[table["model"] == m, "entropy"], bins, density=True)[0].max()) for m in models
    )
    axes[0][0].set_ylim(0, 1.25 * tallest)
    axes[0][0].set_ylabel("density")
    axes[0][0].legend(fontsize=8, loc="upper left")
    return figure


def _square(ax: Axes, table: pd.DataFrame, title: str, **style: Any) -> None:
    sns.heatmap(table, ax=ax, annot=True, fmt=".2f", annot_kws={"size": 8}, cbar=False, square=True, **style)
    ax.set_title(title, fontsize=10)
    ax.grid(False)
    ax.tick_params(axis="x", rotation=40)
    ax.tick_params(axis="y", rotation=0)


def features_overlap(overlap: pd.DataFrame, active: pd.DataFrame, model: str) -> Figure:
    """Overlap of the emotions' sets, the same relative to chance, and activity of each set on texts of each emotion."""
    here, active = overlap[overlap["model"] == model], active[active["model"] == model]
    emotions = [e for e in COLOURS if e in set(active["set"])]
    figure, axes = plt.subplots(1, 3, figsize=(10.4, 3.7))
    for ax, value, title, centre in (
        (axes[0], "jaccard", "overlap (Jaccard)", None),
        (axes[1], "ratio", "overlap / expected", 1.0),
    ):
        table = pd.DataFrame(np.nan, index=emotions, columns=emotions)
        for first, second, number in here[["first", "second", value]].itertuples(index=False):
            table.loc[first, second] = table.loc[second, first] = number
        style: dict[str, Any] = {"cmap": "cividis", "vmin": 0} if centre is None else {"cmap": "vlag", "center": centre}
        if centre is not None:
            style |= {"vmin": 0, "vmax": 2}
        _square(ax, table, title, **style)
    table = active.pivot_table(index="set", columns="text", values="value").reindex(index=emotions, columns=emotions)
    bound = max(0.1, float(np.abs(np.nan_to_num(table.to_numpy())).max()))
    _square(axes[2], table, "activity on held-out texts", cmap="vlag", center=0, vmin=-bound, vmax=bound)
    axes[2].set_xlabel("texts of")
    axes[2].set_ylabel("set of")
    return figure


def features_trees(trees: dict[str, Any]) -> Figure:
    """Emotions joined by the likeness of their feature profiles; numbers are bootstrap support."""
    from scipy.cluster.hierarchy import dendrogram

    models = [m for m, tree in trees.items() if tree is not None]
    if not models:
        return _note("Too few features respond to compare profiles.")
    figure, axes = plt.subplots(1, len(models), figsize=(4.9 * len(models), 2.9), squeeze=False)
    for ax, model in zip(axes[0], models, strict=True):
        tree, merges = trees[model], np.asarray(trees[model].merges)
        drawn = dendrogram(
            merges, labels=list(tree.labels), ax=ax, orientation="right", link_color_func=lambda _: "#555555"
        )
        heights = {round(float(height), 9): support for height, support in zip(merges[:, 2], tree.support, strict=True)}
        for across, along in zip(drawn["dcoord"], drawn["icoord"], strict=True):
            support = heights[round(float(across[1]), 9)]
            if across[1] < merges[-1, 2]:
                y = (along[1] + along[2]) / 2
                ax.text(across[1], y, f" {support:.2f}", va="center", ha="right", fontsize=8)
        for label in ax.get_yticklabels():
            label.set_color(COLOURS.get(label.get_text(), "#222222"))
        ax.set_xlabel("1 - correlation of profiles")
        ax.grid(False)
        ax.set_title(model)
    return figure


def features_stability(stability: pd.DataFrame, sensitivity: pd.DataFrame) -> Figure:
    """Overlap of each set with itself on resampled topics, under other wordings and in other datasets, and chance."""
    models = list(dict.fromkeys(stability["model"]))
    figure, axes = plt.subplots(1, len(models), figsize=(4.9 * len(models), 3.9), sharey=True, squeeze=False)
    order = list(dict.fromkeys(stability["set"]))
    styles = (("#D55E00", "s"), ("#009E73", "^"), ("#A6518A", "v"), ("#E69F00", "P"), ("#56B4E9", "X"))
    for ax, model in zip(axes[0], models, strict=True):
        here = stability[stability["model"] == model].set_index("set").loc[order]
        y = np.arange(len(order))
        error = [here["value"] - here["low"], here["high"] - here["value"]]
        style: dict[str, Any] = {"fmt": "o", "color": "#222222", "ms": 5, "elinewidth": 1.2}
        ax.errorbar(here["value"], y - 0.24, xerr=error, label="topics resampled", **style)
        others = sensitivity[sensitivity["model"] == model] if len(sensitivity) else sensitivity
        groups = others.groupby("versus", sort=False) if len(others) else []
        for k, ((versus, line), (colour, marker)) in enumerate(zip(groups, styles, strict=False)):
            at = np.array([order.index(s) for s in line["set"]], dtype=float) + (k - 0.5) * 0.2
            ax.plot(line["value"], at, ls="", marker=marker, color=colour, ms=5, label=versus)
        ax.plot(here["chance"], y - 0.24, ls="", marker="|", ms=9, color="#777777", label="chance")
        ax.set_yticks(y, order)
        ax.set_ylim(len(order) - 0.4, -0.6)
        ax.set_xlim(-0.02, 1.02)
        ax.set_xlabel("overlap with the full set (Jaccard)")
        ax.set_title(model)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2 * len(models), frameon=False, fontsize=8)
    return figure


def features_replication(table: pd.DataFrame) -> Figure:
    """Contrast of every set on the texts it was selected on, on held-out texts, and on other datasets."""
    models, sources = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["measured_on"]))
    figure, axes = plt.subplots(1, len(models), figsize=(4.9 * len(models), 3.7), sharey=True, squeeze=False)
    order = [e for e in (*COLOURS, "specific", "shared") if e in set(table["set"])]
    styles = (("#999999", "o"), ("#0072B2", "s"), ("#D55E00", "^"), ("#009E73", "v"), ("#A6518A", "P"))
    for ax, model in zip(axes[0], models, strict=True):
        here = table[(table["model"] == model) & (table["features"] > 0)]
        for k, (source, (colour, marker)) in enumerate(zip(sources, styles, strict=False)):
            line = here[here["measured_on"] == source]
            if line.empty:
                continue
            y = np.array([order.index(s) for s in line["set"]], dtype=float) + (k - (len(sources) - 1) / 2) * 0.2
            error = [line["value"] - line["low"], line["high"] - line["value"]]
            ax.errorbar(line["value"], y, xerr=error, fmt=marker, color=colour, ms=5, elinewidth=1.2, label=source)
        ax.axvline(0, color="#444444", lw=0.8)
        ax.set_yticks(range(len(order)), order)
        ax.set_ylim(len(order) - 0.4, -0.6)
        ax.set_xlabel("contrast (standard deviations)")
        ax.set_title(model)
    handles, names = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    return figure


Tables = Mapping[str, pd.DataFrame]


def _emotions(table: pd.DataFrame, column: str = "emotion") -> list[str]:
    return [e for e in COLOURS if e in set(table[column])]


def tracing_features(tables: Tables, models: Sequence[str]) -> Figure:
    """Effect of each feature on its label, on own texts against others: all features, label sets, emotion sets."""
    figure, axes = plt.subplots(1, len(models), figsize=(4.9 * len(models), 4.3), squeeze=False)
    for ax, model in zip(axes[0], models, strict=True):
        table = here(tables, "selection", model)
        groups = (
            ("other features", table[~table["in_label"] & ~table["in_emotion"]], "#BBBBBB", ".", 3.0),
            ("label set", table[table["in_label"] & ~table["in_emotion"]], "#0072B2", "o", 9.0),
            ("emotion set", table[table["in_emotion"]], "#D55E00", "D", 13.0),
        )
        for label, part, colour, marker, size in groups:
            style: dict[str, Any] = {"color": colour, "marker": marker, "s": size, "lw": 0, "alpha": 0.7}
            ax.scatter(part["elsewhere"], part["effect"], label=label, rasterized=True, **style)
        ends = [float(table[["effect", "elsewhere"]].min().min()), float(table[["effect", "elsewhere"]].max().max())]
        ax.plot(ends, ends, color="#444444", lw=0.8, ls="--")
        ax.set_xscale("symlog", linthresh=0.01)
        ax.set_yscale("symlog", linthresh=0.01)
        ax.tick_params(axis="x", rotation=45)
        ax.set_xlabel("on texts of other emotions (nats)")
        ax.set_title(model)
    axes[0][0].set_ylabel("on texts of the emotion (nats)")
    axes[0][0].legend(fontsize=8, loc="best", markerscale=1.6)
    return figure


def tracing_sets(tables: Tables, models: Sequence[str]) -> Figure:
    """Change of the gold logit difference by joint ablation of each set, filled, and of random sets, open."""
    figure, grid = plt.subplots(
        len(KINDS), len(models), figsize=(4.9 * len(models), 5.4), sharex="col", squeeze=False
    )  # fmt: skip
    for column, model in enumerate(models):
        sets = here(tables, "sets", model)
        for ax, kind in zip(grid[:, column], KINDS, strict=True):
            table = sets[(sets["kind"] == kind) & (sets["rows"] == ALL_ROWS)].set_index("emotion")
            emotions = [e for e in COLOURS if e in table.index]
            for i, emotion in enumerate(emotions):
                own = table.loc[[emotion]]
                style: dict[str, Any] = {"color": COLOURS[emotion], "fmt": MARKERS[emotion], "ms": 7, "elinewidth": 1.5}
                if own["size"].iloc[0]:
                    _bars(ax, [i - 0.12], own, **style)
                    drawn = own.filter(like="random_").rename(columns=lambda c: c.removeprefix("random_"))
                    _bars(ax, [i + 0.18], drawn, **style, mfc="white", alpha=0.8)
                shown = f"{own['size'].iloc[0]}\n{own['flips'].iloc[0]:.0%}"
                ax.annotate(shown, (i, 1.0), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=8)
            ax.axhline(0, color="#444444", lw=0.8)
            ax.margins(y=0.3)
            ax.set_xticks(range(len(emotions)), emotions, rotation=30)
            ax.set_xlim(-0.6, len(emotions) - 0.4)
            ax.set_title(f"{model} · {kind}s", fontsize=10)
            if column == 0:
                ax.set_ylabel("change of gold\nlogit difference (nats)")
    return figure


def tracing_recovery(tables: Tables, models: Sequence[str]) -> Figure:
    """Joint ablation of the top k features against k, by emotion; grey: matched random sets, mean over emotions."""
    orders = ((EFFECT, "ranked by effect"), (CONTRAST, "ranked by contrast"))
    figure, grid = plt.subplots(
        len(orders), len(models), figsize=(4.9 * len(models), 5.6), sharex=True, squeeze=False
    )  # fmt: skip
    for column, model in enumerate(models):
        table = here(tables, "recovery", model)
        for ax, (order, title) in zip(grid[:, column], orders, strict=True):
            own = table[table["kind"] == order]
            for emotion in _emotions(own):
                line = own[own["emotion"] == emotion]
                style = {"color": COLOURS[emotion], "marker": MARKERS[emotion], "ms": 4, "lw": 1.5}
                ax.plot(line["features"], line["value"], label=emotion, **style)
                ax.fill_between(line["features"], line["low"], line["high"], color=COLOURS[emotion], alpha=0.12, lw=0)
                ax.plot(line["features"], line["random_value"], color=COLOURS[emotion], lw=0.9, ls=":")
            ax.axhline(0, color="#444444", lw=0.8)
            ax.set_xscale("log")
            ax.set_title(f"{model} · {title}", fontsize=10)
            if column == 0:
                ax.set_ylabel("change of gold\nlogit difference (nats)")
    for ax in grid[-1]:
        ax.set_xlabel("features ablated together")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=min(len(names), 3 * len(models)), frameon=False, fontsize=9
    )
    return figure


def tracing_matrix(tables: Tables, models: Sequence[str]) -> Figure:
    """Ablate the set of one emotion (row), measure on texts of another (column), less random sets, nats."""
    figure, grid = plt.subplots(len(models), len(KINDS), figsize=(9.4, 4.3 * len(models)), squeeze=False)
    for axes, model in zip(grid, models, strict=True):
        table = here(tables, "matrix", model)
        for ax, kind in zip(axes, KINDS, strict=True):
            own, emotions = table[(table["kind"] == kind) & (table["features"] > 0)], _emotions(table, "text")
            square = own.pivot_table(index="set", columns="text", values="difference_value")
            square = square.reindex(index=emotions, columns=emotions)
            bound = max(0.05, float(np.abs(np.nan_to_num(square.to_numpy())).max()))
            _square(ax, square, f"{model} · {kind}s", cmap="vlag", center=0, vmin=-bound, vmax=bound)
            ax.set_xlabel("texts of")
            ax.set_ylabel("set of")
    return figure


def tracing_phases(tables: Tables, models: Sequence[str]) -> Figure:
    """Joint ablation of the members of a set in one phase, less random sets of the same layers."""
    figure, grid = plt.subplots(
        len(KINDS), len(models), figsize=(4.9 * len(models), 5.0), sharex=True, squeeze=False
    )  # fmt: skip
    for column, model in enumerate(models):
        table = here(tables, "phases", model)
        for ax, kind in zip(grid[:, column], KINDS, strict=True):
            own = table[table["kind"] == kind]
            emotions = _emotions(own)
            for i, emotion in enumerate(emotions):
                part = own[own["emotion"] == emotion].set_index("part").loc[list(PHASE_NAMES)]
                line = part.filter(like="difference_").rename(columns=lambda c: c.removeprefix("difference_"))
                x = np.arange(len(PHASE_NAMES)) + (i - (len(emotions) - 1) / 2) * 0.11
                some = (part["features"] > 0).to_numpy()
                style = {"color": COLOURS[emotion], "fmt": MARKERS[emotion], "ms": 6, "elinewidth": 1.3}
                if some.any():
                    _bars(ax, x[some], line[some], label=emotion, **style)
            ax.axhline(0, color="#444444", lw=0.8)
            ax.set_xticks(range(len(PHASE_NAMES)), PHASE_NAMES)
            ax.set_xlim(-0.5, len(PHASE_NAMES) - 0.5)
            ax.set_title(f"{model} · {kind}s", fontsize=10)
            if column == 0:
                ax.set_ylabel("change less random\nsets (nats)")
    # An emotion may have members in one panel only.
    found = {n: h for ax in grid.ravel() for h, n in zip(*ax.get_legend_handles_labels(), strict=True)}
    if found:
        place: dict[str, Any] = {
            "loc": "outside lower center",
            "ncols": min(len(found), 3 * len(models)),
            "frameon": False,
            "fontsize": 9,
        }
        figure.legend(list(found.values()), list(found), **place)
    return figure


def tracing_layers(tables: Tables, models: Sequence[str]) -> Figure:
    """Where features act: summed absolute effects per layer, and summed effects of the members of emotion sets."""
    figure, grid = plt.subplots(2, len(models), figsize=(4.9 * len(models), 4.6), sharex="col", squeeze=False)
    for column, model in enumerate(models):
        table = here(tables, "layers", model)
        for emotion in _emotions(table):
            line = table[table["emotion"] == emotion]
            style = {"color": COLOURS[emotion], "marker": MARKERS[emotion], "ms": 4, "lw": 1.4}
            for ax, value in zip(grid[:, column], ("total", "emotion_set"), strict=True):
                ax.plot(line["layer"], line[value], label=emotion, **style)
        grid[0][column].set_title(model)
        grid[1][column].set_xlabel("layer")
        grid[1][column].xaxis.get_major_locator().set_params(integer=True)
    grid[0][0].set_ylabel("sum of |effects|,\nall features (nats)")
    grid[1][0].set_ylabel("sum of contrasts,\nemotion sets (nats)")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=min(len(names), 3 * len(models)), frameon=False, fontsize=9
    )
    return figure


def tracing_concentration(tables: Tables, models: Sequence[str]) -> Figure:
    """Effective number of features and Gini coefficient of each emotion; grey ticks: the same with dealt emotions."""
    quantities = (("effective number", "effective number of features"), ("gini", "Gini coefficient"))
    figure, grid = plt.subplots(2, len(models), figsize=(4.9 * len(models), 5.2), sharey=True, squeeze=False)
    for column, model in enumerate(models):
        table = here(tables, "concentration", model)
        emotions = _emotions(table)
        for ax, (quantity, title) in zip(grid[:, column], quantities, strict=True):
            for shift, measure in ((-0.18, EFFECT), (0.18, CONTRAST)):
                own = table[(table["measure"] == measure) & (table["quantity"] == quantity)].set_index("emotion")
                for i, emotion in enumerate(emotions):
                    row = own.loc[emotion]
                    ends = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
                    style: dict[str, Any] = {"color": COLOURS[emotion], "fmt": MARKERS[emotion], "ms": 6}
                    style |= {"mfc": COLOURS[emotion] if measure == EFFECT else "white", "elinewidth": 1.3}
                    ax.errorbar([row["value"]], [i + shift], xerr=np.maximum(ends, 0), **style)
                    ax.plot([row["null"]], [i + shift], ls="", marker="|", ms=9, color="#777777")
            ax.set_yticks(range(len(emotions)), emotions)
            ax.set_xlabel(title)
        grid[0][column].set_xscale("log")
        grid[0][column].set_title(model)
    grid[0][0].set_ylim(len(emotions) - 0.4, -0.6)
    for name, face in (("by effect", "#444444"), ("by contrast", "white")):
        grid[1][0].plot([], [], ls="", marker="o", mec="#444444", mfc=face, label=name)
    handles, names = grid[1][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def tracing_sufficiency(tables: Tables, models: Sequence[str]) -> Figure:
    """Gold logit difference gained when only a set is free, beside random sets (open) and the whole model (bar)."""
    figure, grid = plt.subplots(
        len(KINDS), len(models), figsize=(4.9 * len(models), 5.2), sharex=True, squeeze=False
    )  # fmt: skip
    for column, model in enumerate(models):
        table = here(tables, "sufficiency", model)
        for ax, kind in zip(grid[:, column], KINDS, strict=True):
            own = table[table["kind"] == kind].set_index("emotion")
            emotions = [e for e in COLOURS if e in own.index]
            for i, emotion in enumerate(emotions):
                row = own.loc[[emotion]]
                style: dict[str, Any] = {"color": COLOURS[emotion], "fmt": MARKERS[emotion], "ms": 6, "elinewidth": 1.4}
                ax.hlines(row["clean"], i - 0.35, i + 0.35, color="#444444", lw=1.4)
                if not row["features"].iloc[0]:
                    continue
                _bars(ax, [i - 0.12], row, **style)
                drawn = row.filter(like="random_").rename(columns=lambda c: c.removeprefix("random_"))
                _bars(ax, [i + 0.12], drawn, **style, mfc="white", alpha=0.8)
            ax.axhline(0, color="#999999", lw=0.8, ls=":")
            ax.set_xticks(range(len(emotions)), emotions, rotation=30)
            ax.set_title(f"{model} · only the {kind}", fontsize=10)
            if column == 0:
                ax.set_ylabel("gain over all at\ntheir mean (nats)")
    return figure


def tracing_patching(tables: Tables, models: Sequence[str]) -> Figure:
    """Share of the emotional difference that a patch carries, over layers, by site, task and window."""
    sites = ("attention", "ffn", "residual")
    figure, grid = plt.subplots(len(models), 3, figsize=(10.4, 3.1 * len(models)), sharex="row", squeeze=False)
    styles = {CROSS: ("#D55E00", "-"), SAME_EMOTION: ("#0072B2", "--"), NEUTRAL: ("#777777", ":")}
    for axes, model in zip(grid, models, strict=True):
        table = here(tables, "patching", model)
        for ax, site in zip(axes, sites, strict=True):
            own = table[table["site"] == site]
            widest = int(own["window"].max())
            for task, (colour, dash) in styles.items():
                for window in sorted(set(own["window"])):
                    line = own[(own["task"] == task) & (own["window"] == window)]
                    if line.empty or (task != CROSS and window != widest):
                        continue
                    label = f"{task}, {window} layers" if window > 1 else task
                    lw = 0.9 + 0.4 * (window - 1)
                    ax.plot(line["layer"], line["value"], color=colour, ls=dash, lw=lw, label=label)
                    if window == widest:
                        ax.fill_between(line["layer"], line["low"], line["high"], color=colour, alpha=0.15, lw=0)
            ax.axhline(0, color="#444444", lw=0.8)
            ax.set_title(f"{model} · {'FFN' if site == 'ffn' else site}", fontsize=10)
            ax.set_xlabel("layer")
            ax.xaxis.get_major_locator().set_params(integer=True)
        axes[0].set_ylabel("share of the difference carried")
    for ax in (grid[0][0], grid[0][2]):
        ax.legend(fontsize=7, loc="best")
    return figure


# One colour and one marker per method, in every figure of the chapter on steering.
STEERING_STYLES: dict[str, tuple[str, str]] = {
    repair.GAIN: ("#0072B2", "o"),
    repair.ADDITIVE: ("#56B4E9", "s"),
    repair.RANDOM: ("#999999", "X"),
    repair.MEANS: ("#009E73", "^"),
    repair.LORA: ("#D55E00", "P"),
    repair.PROBE: ("#A6518A", "D"),
    repair.FEW_SHOT: ("#E69F00", "v"),
}


def _steering_plain(metrics: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A metric of every method as it was learnt: full strength, all its units, no target."""
    return only(metrics, metric=metric, strength=1.0, units=0, target="")


def _steering_panels(table: pd.DataFrame, columns: int, size: tuple[float, float], **share: Any) -> tuple[Figure, Any]:
    """A row of panels per dataset and model."""
    shown = places(table)
    figure, grid = plt.subplots(
        len(shown), columns, figsize=(size[0] * columns, size[1] * len(shown) + 0.5), squeeze=False, **share
    )
    return figure, list(zip(shown, grid, strict=True))


def _levels(ax: Axes, plain: pd.DataFrame, along: str = "y") -> None:
    """What needs no examples, as lines: the answer as it is, and prior calibration."""
    line = ax.axhline if along == "y" else ax.axvline
    for method, dash in ((repair.RAW, ":"), (repair.CALIBRATED, "--")):
        name = "no steering" if method == repair.RAW else method
        line(float(only(plain, method=method)["value"].iloc[0]), color="#444444", ls=dash, lw=1.1, label=name)


def _dots(ax: Axes, x: Any, y: Any, colour: str, *, across: Any = None, up: Any = None, **style: Any) -> None:
    """Points with the ends of their intervals, [low, high], drawn as they are: a point may lie outside its own."""
    if across is not None:
        ax.hlines(y, *across, color=colour, lw=1.2)
    if up is not None:
        ax.vlines(x, *up, color=colour, lw=1.2)
    ax.plot(x, y, color=colour, **{"ls": "", "ms": 5.5, **style})


def steering_examples(metrics: pd.DataFrame) -> Figure:
    """Macro-F1 against examples per emotion: a row per dataset and model, answers as given and calibrated."""
    table = _steering_plain(metrics, "macro_f1")
    figure, rows = _steering_panels(table, 2, (4.7, 2.9), sharey=True)
    numbers = sorted(set(table["examples"]) - {0})
    for (dataset, model), axes in rows:
        here = only(table, dataset=dataset, model=model)
        for ax, calibrated in zip(axes, (False, True), strict=True):
            _levels(ax, here)
            for i, (method, (colour, marker)) in enumerate(STEERING_STYLES.items()):
                # A probe has no label prior to take off; it is shown on both sides.
                shown = calibrated and method != repair.PROBE
                line = only(here, method=method, calibrated=shown).sort_values("examples")
                if line.empty:
                    continue
                x = line["examples"].map(numbers.index) + (i - (len(STEERING_STYLES) - 1) / 2) * 0.07
                mine = method == repair.GAIN
                style = {"marker": marker, "ls": "-", "lw": 2.0 if mine else 1.1, "zorder": 4 if mine else 3}
                _dots(ax, x, line["value"], colour, up=(line["low"], line["high"]), label=method, **style)
            ax.set_xticks(range(len(numbers)), [str(n) for n in numbers])
            ax.set_xlim(-0.4, len(numbers) - 0.6)
            ax.set_title(f"{model} · {dataset}\n{'calibrated' if calibrated else 'as answered'}", fontsize=10)
        axes[0].set_ylabel("macro-F1")
        axes[0].set_ylim(0, None)
    for ax in rows[-1][1]:
        ax.set_xlabel("labelled examples per emotion")
    _rows_legend(figure, [ax for _, axes in rows for ax in axes])
    return figure


def _rows_legend(figure: Figure, axes: Sequence[Axes], columns: int = 5) -> None:
    """One legend below all panels, each name once."""
    found = {n: h for ax in axes for h, n in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)


def steering_recalls(metrics: pd.DataFrame, examples: int) -> Figure:
    """Recall per emotion without steering, with gains and with targeted gains; a row per dataset and model.

    Left the answers as given, right calibrated ones. A ring marks the emotion that targeted gains aim at.
    """
    table = only(metrics, metric="recall", strength=1.0, units=0)
    figure, rows = _steering_panels(table, 2, (4.7, 3.1), sharey=True)
    for (dataset, model), axes in rows:
        here = only(table, dataset=dataset, model=model)
        emotions = [e for e in COLOURS if e in set(here["emotion"])]
        for ax, calibrated in zip(axes, (False, True), strict=True):
            base = repair.CALIBRATED if calibrated else repair.RAW
            stops = {
                "prior\ncalibration" if calibrated else "no\nsteering": only(here, method=base),
                "feature\ngains": only(here, method=repair.GAIN, examples=examples, calibrated=calibrated),
                "targeted\ngains": only(here, method=repair.TARGETED, calibrated=calibrated),
            }
            aims = set(stops["targeted\ngains"]["target"])
            last = []
            for i, emotion in enumerate(emotions):
                line = pd.concat([only(t, emotion=emotion) for t in stops.values()])
                x = np.arange(len(line)) + (i - (len(emotions) - 1) / 2) * 0.055
                up = (line["low"], line["high"])
                _dots(ax, x, line["value"], COLOURS[emotion], up=up, marker=MARKERS[emotion])
                # Two alternatives to the first stop, not a path through all three.
                ax.plot(x[:2], line["value"][:2], color=COLOURS[emotion], lw=1.5)
                if emotion in aims:
                    ring = {"facecolors": "none", "edgecolors": "#222222", "lw": 1.3, "zorder": 5}
                    ax.scatter(x[2:], line["value"][2:], s=130, **ring)
                last.append(float(line["value"].iloc[-1]))
            for emotion, y in zip(emotions, _spread_labels(last, 0.085), strict=True):
                ax.text(len(stops) - 1 + 0.24, y, emotion, color=COLOURS[emotion], va="center", fontsize=8.5)
            ax.axhline(1 / len(emotions), color="#999999", ls=":", lw=1)
            ax.set_xticks(range(len(stops)), list(stops), fontsize=8.5)
            ax.set_xlim(-0.35, len(stops) - 1 + 0.8)
            ax.set_ylim(-0.1, 1.08)
            ax.set_title(f"{model} · {dataset}\n{'calibrated' if calibrated else 'as answered'}", fontsize=10)
        axes[0].set_ylabel("recall (share of texts)")
    return figure


def _cost_axis(ax: Axes, least: float, most: float, straight: float) -> None:
    """An x axis that is linear near zero and logarithmic above `straight`, with few ticks in plain figures."""
    ax.set_xscale("symlog", linthresh=straight, linscale=1)
    above = [straight * m * 10**k for k in range(7) for m in (1, 4)]
    ticks = [0.0, straight / 2, *(x for x in above if x < 1.5 * most)]
    ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
    ax.minorticks_off()
    ax.set_xlim(min(1.3 * least, -straight / 5), max(1.6 * most, straight))


def steering_trade(metrics: pd.DataFrame, perplexity: pd.DataFrame, examples: int) -> Figure:
    """Macro-F1 against what steering does to running text, by strength; controls as points."""
    scores = only(metrics, metric="macro_f1", calibrated=False, units=0, target="")
    figure, rows = _steering_panels(scores, 2, (4.7, 2.9), sharey="row")
    for (dataset, model), axes in rows:
        here = only(scores, dataset=dataset, model=model)
        raw = only(here, method=repair.RAW).iloc[0]
        for ax, metric in zip(axes, ("perplexity", "kl"), strict=True):
            cost = only(perplexity, dataset=dataset, model=model, metric=metric)
            scale = 100 if metric == "perplexity" else 1
            for method in (repair.RANDOM, repair.ADDITIVE, repair.GAIN):
                both = only(here, method=method, examples=examples).merge(
                    only(cost, method=method), on="strength", suffixes=("", "_cost")
                )
                both = both.sort_values("strength")
                colour, marker = STEERING_STYLES[method]
                x = scale * both["value_cost"]
                ends = scale * both["low_cost"], scale * both["high_cost"]
                up = (both["low"], both["high"])
                _dots(ax, x, both["value"], colour, across=ends, up=up, marker=marker, label=method)
                if method == repair.GAIN:
                    ax.plot([0, *x], [raw["value"], *both["value"]], color=colour, lw=1.6)
                    for at, y, strength in zip(x, both["value"], both["strength"], strict=True):
                        note = {"xytext": (5, -11), "textcoords": "offset points", "fontsize": 8, "color": colour}
                        ax.annotate(f"×{strength:g}", (at, y), **note)
            ax.plot([0], [raw["value"]], marker="*", ms=11, ls="", color="#222222", label="no steering")
            level = only(metrics, metric="macro_f1", dataset=dataset, model=model, method=repair.CALIBRATED)
            ax.axhline(float(level["value"].iloc[0]), color="#444444", ls="--", lw=1.1, label=repair.CALIBRATED)
            if metric == "perplexity":
                ax.axvline(100 * repair.PERPLEXITY_RISE, color="#222222", lw=0.8)
            ends = scale * cost["low"].min(), scale * cost["high"].max()
            _cost_axis(ax, *ends, 5.0 if metric == "perplexity" else 0.01)
            ax.set_title(f"{model} · {dataset}", fontsize=10)
        axes[0].set_ylabel("macro-F1, as answered")
    rows[-1][1][0].set_xlabel("rise of perplexity (%)")
    rows[-1][1][1].set_xlabel("KL from the unsteered model\n(nats a token)")
    _rows_legend(figure, [ax for _, axes in rows for ax in axes])
    return figure


def steering_units(metrics: pd.DataFrame, fits: pd.DataFrame, examples: int) -> Figure:
    """Macro-F1 against the number of units that are turned up or down, as answered and calibrated."""
    table = only(metrics, metric="macro_f1", strength=1.0, target="")
    shown = places(table)
    figure, axes = plt.subplots(
        1, len(shown), figsize=(max(6.4, 3.4 * len(shown) + 0.6), 3.3), sharey=True, squeeze=False
    )
    for ax, (dataset, model) in zip(axes[0], shown, strict=True):
        here = only(table, dataset=dataset, model=model)
        all_units = only(fits, dataset=dataset, model=model, method=repair.GAIN, examples=examples)["units"].mean()
        _levels(ax, here)
        styles = ((False, "#0072B2", "o", "gains"), (True, "#D55E00", "s", "gains, calibrated"))
        for calibrated, colour, marker, name in styles:
            line = only(here, method=repair.GAIN, examples=examples, calibrated=calibrated)
            line = line.assign(units=line["units"].where(line["units"] > 0, all_units)).sort_values("units")
            up = (line["low"], line["high"])
            _dots(ax, line["units"], line["value"], colour, up=up, marker=marker, ls="-", lw=1.5, label=name)
        counts = sorted(set(line["units"]))
        ax.set_xscale("log")
        ax.set_xticks(counts, [f"{x:.0f}" for x in counts])
        ax.minorticks_off()
        ax.set_xlabel("features with a gain")
        ax.set_title(f"{model}\n{dataset}", fontsize=10)
    axes[0][0].set_ylabel("macro-F1")
    axes[0][0].set_ylim(0, None)
    _rows_legend(figure, list(axes[0]))
    return figure


def steering_calibration(metrics: pd.DataFrame, examples: int) -> Figure:
    """Macro-F1 and calibration error of every method at one number of examples; a row per dataset, models by marker."""
    tables = {m: _steering_plain(metrics, m) for m in ("macro_f1", "calibration_error")}
    datasets, models = (list(dict.fromkeys(tables["macro_f1"][c])) for c in ("dataset", "model"))
    tables = {m: t[t["examples"].isin([0, examples])] for m, t in tables.items()}
    order = [m for m in repair.METHODS if m in set(tables["macro_f1"]["method"])]
    figure, grid = plt.subplots(
        len(datasets), 2, figsize=(9.4, 0.34 * len(order) * len(datasets) + 1.3), sharey=True, squeeze=False
    )
    for axes, dataset in zip(grid, datasets, strict=True):
        for ax, (metric, table) in zip(axes, tables.items(), strict=True):
            here = only(table, dataset=dataset)
            for k, (model, colour) in enumerate(zip(models, MODEL_COLOURS, strict=False)):
                for calibrated in (False, True):
                    line = only(here, model=model, calibrated=calibrated)
                    y = line["method"].map(order.index) + (k - (len(models) - 1) / 2) * 0.34 + (calibrated - 0.5) * 0.15
                    style = {"marker": "os^v"[k], "mfc": "white" if calibrated else colour, "ms": 5}
                    name = f"{model}, {'calibrated' if calibrated else 'as answered'}"
                    _dots(ax, line["value"], y, colour, across=(line["low"], line["high"]), label=name, **style)
            ax.set_yticks(range(len(order)), ["no steering" if m == repair.RAW else m for m in order])
            ax.set_ylim(len(order) - 0.4, -0.6)
            ax.set_xlim(0, None)
            ax.set_title(f"{dataset} · {'macro-F1' if metric == 'macro_f1' else 'calibration error'}", fontsize=10)
    _rows_legend(figure, list(grid.ravel()), 2)
    return figure


def steering_targeted(targeted: pd.DataFrame) -> Figure:
    """Change of recall under gains aimed at one emotion; a row per dataset and model, as answered and calibrated."""
    figure, rows = _steering_panels(targeted, 2, (4.4, 2.5), sharex=True, sharey=True)
    order = [*(e for e in COLOURS if e in set(targeted["emotion"])), "others"]
    names = [*order[:-1], "mean of others"]
    for (dataset, model), axes in rows:
        for ax, calibrated in zip(axes, (False, True), strict=True):
            here = only(targeted, dataset=dataset, model=model, calibrated=calibrated).set_index("emotion")
            target = str(here["target"].iloc[0])
            for y, emotion in enumerate(order):
                if emotion not in here.index:
                    continue
                row = here.loc[emotion]
                colour, marker = COLOURS.get(emotion, "#222222"), MARKERS.get(emotion, "o")
                _dots(ax, row["value"], y, colour, across=(row["low"], row["high"]), marker=marker, ms=6)
            ax.axhspan(order.index(target) - 0.42, order.index(target) + 0.42, color="#DDDDDD", alpha=0.6, lw=0)
            ax.axvline(0, color="#444444", lw=0.8)
            for emotion, bar in ((target, repair.WEAK_RISE), ("others", repair.OTHERS_LOSS)):
                y = order.index(emotion)
                ax.plot([bar, bar], [y - 0.42, y + 0.42], color="#222222", lw=1.6)
            ax.set_yticks(range(len(order)), names, fontsize=9)
            ax.set_ylim(len(order) - 0.4, -0.6)
            ax.set_title(f"{model} · {dataset}\n{'calibrated' if calibrated else 'as answered'}", fontsize=10)
    for ax in rows[-1][1]:
        ax.set_xlabel("change of recall")
    return figure


def _in_brackets(emotions: str) -> str:
    """The first two of a list of emotions, and how many more there are."""
    first, more = emotions.split(", ")[:2], len(emotions.split(", ")) - 2
    return f" ({', '.join(first)}{f' +{more}' if more > 0 else ''})" if emotions else ""


def steering_turned(turned: pd.DataFrame, count: int = 12) -> Figure:
    """The features whose gain is furthest from one on average over example draws, with the range of the draws."""
    shown = places(turned)
    n_columns = min(2, len(shown))
    n_rows = -(-len(shown) // n_columns)
    figure, grid = plt.subplots(
        n_rows, n_columns, figsize=(4.8 * n_columns, 0.27 * count * n_rows + 1.0), squeeze=False, sharex=True
    )
    for ax in grid.ravel()[len(shown) :]:
        ax.set_axis_off()
    for ax, (dataset, model) in zip(grid.ravel(), shown, strict=False):
        here = only(turned, dataset=dataset, model=model).head(count)
        y = np.arange(len(here))
        error = [here["gain"] - here["least"], here["most"] - here["gain"]]
        colours = ["#0072B2" if g > 1 else "#D55E00" for g in here["gain"]]
        ax.barh(y, here["gain"] - 1, left=1, color=colours, alpha=0.75, height=0.62)
        ax.errorbar(here["gain"], y, xerr=error, fmt="none", ecolor="#222222", elinewidth=1)
        ax.axvline(1, color="#444444", lw=0.8)
        names = [f"L{r.layer} · {r.feature}{_in_brackets(r.emotions)}" for r in here.itertuples()]
        ax.set_yticks(y, names, fontsize=8)
        ax.set_ylim(len(here) - 0.4, -0.6)
        ax.set_title(f"{model} · {dataset}", fontsize=10)
        ax.grid(axis="y", visible=False)
    for ax in grid[-1]:
        ax.set_xlabel("gain")
    return figure


# One colour and one marker per comparison, in every figure of the chapter on generalisation.
VERSUS_STYLES = {
    "over no steering": ("#0072B2", "o"),
    "over prior calibration": ("#D55E00", "s"),
    "on top of calibration": ("#009E73", "^"),
}


def generalisation_transfer(table: pd.DataFrame) -> Figure:
    """Change of macro-F1 by source (row) and target (column), a panel per model (row) and comparison (column)."""
    models = list(dict.fromkeys(table["model"]))
    sources = [s for s in dict.fromkeys(table["source"]) if s in set(table["target"])]
    pairs = table[table["source"].isin(sources) & table["target"].isin(sources)]
    side = max(2.6, 0.47 * len(sources) + 0.9)
    figure, grid = plt.subplots(
        len(models), len(VERSUS_STYLES), figsize=(3 * side + 1.5, (side + 0.7) * len(models)),
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    # A few large changes must not wash out the rest.
    bound = max(0.05, float(np.quantile(np.abs(pairs["value"]), 0.95)))
    for i, model in enumerate(models):
        for ax, versus in zip(grid[i], VERSUS_STYLES, strict=True):
            here = pairs[(pairs["model"] == model) & (pairs["versus"] == versus)]
            values, low, high = (
                here.pivot_table(index="source", columns="target", values=v).reindex(index=sources, columns=sources)
                for v in ("value", "low", "high")
            )
            clear = (low > 0) | (high < 0)
            # Without the sign of a zero.
            shown = values.round(2) + 0.0
            words = shown.map("{:+.2f}".format).where(~clear, shown.map("{:+.2f}*".format))
            style: dict[str, Any] = {"cmap": "vlag", "center": 0, "vmin": -bound, "vmax": bound, "square": True}
            sns.heatmap(values, ax=ax, annot=words, fmt="", annot_kws={"size": 7.5}, cbar=False, **style)
            for text, value in zip(ax.texts, values.to_numpy().ravel(), strict=True):
                text.set_color("white" if abs(value) > 0.75 * bound else "#222222")
            for k in range(len(sources)):
                ax.add_patch(Rectangle((k, k), 1, 1, fill=False, edgecolor="#222222", lw=1.3, clip_on=False))
            first = ax is grid[i][0]
            ax.set_title(f"{model}\n{versus}" if first else versus, fontsize=10)
            ax.set_xlabel("measured on" if i == len(models) - 1 else "")
            ax.set_ylabel("learnt on" if first else "")
            ax.grid(False)
            ax.tick_params(axis="x", rotation=40)
            ax.tick_params(axis="y", rotation=0)
            plt.setp(ax.get_xticklabels(), ha="right", rotation_mode="anchor")
    return figure


def generalisation_means(table: pd.DataFrame) -> Figure:
    """Mean change of macro-F1 on all other datasets, by source, and the change on the source itself as a tick."""
    models = list(dict.fromkeys(table["model"]))
    order = [s for s in dict.fromkeys(table["source"]) if s in set(table["target"])]
    order += [s for s in dict.fromkeys(table["source"]) if s not in order]
    figure, axes = plt.subplots(
        1, len(models), figsize=(4.9 * len(models) + 0.6, 0.5 * len(order) + 1.5), sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    others = table[table["target"] == "all others"]
    home = table[(table["target"] == table["source"]) | (table["target"] == "same dataset")]
    for ax, model in zip(axes[0], models, strict=True):
        for k, (versus, (colour, marker)) in enumerate(VERSUS_STYLES.items()):
            line, same = (
                t[(t["model"] == model) & (t["versus"] == versus)].set_index("source").loc[order]
                for t in (others, home)
            )
            y = np.arange(len(order)) + (k - 1) * 0.23
            error = [line["value"] - line["low"], line["high"] - line["value"]]
            ax.errorbar(line["value"], y, xerr=error, fmt=marker, color=colour, ms=5, elinewidth=1.3, label=versus)
            ax.plot(same["value"], y, ls="", marker="|", ms=9, mew=1.6, color=colour, alpha=0.6)
        ax.plot([], [], ls="", marker="|", ms=9, mew=1.6, color="#777777", label="same dataset")
        ax.axvline(0, color="#444444", lw=0.8)
        # The mean over all sources stands apart.
        ax.axhline(len(order) - 1.5, color="#999999", lw=0.8)
        ax.set_yticks(range(len(order)), order)
        ax.set_ylim(len(order) - 0.4, -0.6)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("change of macro-F1 on the other datasets")
        ax.set_title(model)
    axes[0][0].set_ylabel("learnt on")
    _flow_legend(figure, [axes[0][0]])
    return figure


def _by_emotion(ax: Axes, table: pd.DataFrame, value: str, references: dict[str, tuple[str, str, str]]) -> None:
    """Each comparison as a small dot and their mean as a large one, by emotion; references as ticks of their means."""
    emotions = [e for e in COLOURS if e in set(table["emotion"])]
    for y, emotion in enumerate(emotions):
        here, colour = table[table["emotion"] == emotion], COLOURS[emotion]
        spread = np.linspace(-0.16, 0.16, len(here)) if len(here) > 1 else np.zeros(1)
        ax.plot(here[value], y + spread, ls="", marker=".", ms=4, color=colour, alpha=0.6)
        ax.plot(here[value].mean(), y, ls="", marker=MARKERS[emotion], ms=8, color=colour, mec="white", mew=0.5)
    means = table.groupby("emotion").mean(numeric_only=True).loc[emotions]
    for column, (label, colour, dash) in references.items():
        for y, x in enumerate(means[column]):
            ax.plot([x, x], [y - 0.33, y + 0.33], color=colour, ls=dash, lw=1.8, label="" if y else label)
    ax.set_yticks(range(len(emotions)), emotions)
    ax.set_ylim(len(emotions) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def generalisation_overlap(table: pd.DataFrame) -> Figure:
    """Agreement of datasets on causal features: overlap and rank correlation by emotion, and overlap by pair."""
    apart = table[table["first"] != table["second"]]
    if apart.empty:
        return _note("No two datasets have active features in common.")
    models, datasets = list(dict.fromkeys(apart["model"])), list(dict.fromkeys([*table["first"], *table["second"]]))
    side = 0.45 * len(datasets) + 0.6
    figure, grid = plt.subplots(
        len(models), 3, figsize=(8.6 + side, max(3.2, side) * len(models)), sharex="col", squeeze=False,
        width_ratios=[3.9, 3.9, side],
    )  # fmt: skip
    chance = ("random sets", "#777777", ":")
    for (left, middle, right), model in zip(grid, models, strict=True):
        here = apart[apart["model"] == model]
        shuffled = ("95 % of shuffled labels", "#222222", "-")
        _by_emotion(left, here, "value", {"chance": chance, "shuffled_high": shuffled})
        _by_emotion(middle, here, "rank_correlation", {"rank_high": shuffled})
        middle.axvline(0, color="#444444", lw=0.8)
        middle.tick_params(axis="y", labelleft=False)
        left.set_title(f"{model}\noverlap (Jaccard)", fontsize=10)
        middle.set_title("correlation of effects (ranks)", fontsize=10)
        left.set_xlim(0, None)
        values = pd.DataFrame(np.nan, index=datasets, columns=datasets)
        own = table[table["model"] == model].groupby(["first", "second"])["value"].mean()
        for (first, second), value in own.items():
            values.loc[first, second] = values.loc[second, first] = value
        _square(right, values, "overlap by pair", cmap="cividis", vmin=0)
        plt.setp(right.get_xticklabels(), ha="right", rotation_mode="anchor")
    for ax, label in zip(grid[-1], ("Jaccard overlap", "Spearman correlation", ""), strict=True):
        ax.set_xlabel(label)
    _flow_legend(figure, [grid[0][0]])
    return figure


def generalisation_matches(table: pd.DataFrame) -> Figure:
    """Correlation of causal features with their best partners in the other model, by emotion, beside chance."""
    if table.empty:
        return _note("One model alone has no other to be matched with.")
    pairs = list(dict.fromkeys(zip(table["first"], table["second"], strict=True)))
    figure, axes = plt.subplots(1, len(pairs), figsize=(6.4 * len(pairs), 3.6), sharey=True, squeeze=False)
    for ax, (first, second) in zip(axes[0], pairs, strict=True):
        here = table[(table["first"] == first) & (table["second"] == second)]
        chance = {
            "any_high": ("95 %, all texts shuffled", "#777777", ":"),
            "same_emotion_high": ("95 %, shuffled within emotions", "#222222", "-"),
        }
        _by_emotion(ax, here, "value", chance)
        ax.set_xlim(0, 1)
        ax.set_xlabel("correlation with the best partner (median)")
        ax.set_title(f"{first} · {second}")
    _flow_legend(figure, [axes[0][0]])
    return figure
