"""The words of the chapter on steering: its tables as sentences and as tables to read.

Every number, and every judgement on it, comes from the tables of `repair.save`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emosae_utils import ledger, repair
from emosae_utils.repair import CALIBRATED, FEW_SHOT, GAIN, PROBE, RANDOM, RAW, Settings, Study

Tables = Mapping[str, pd.DataFrame]
# Methods as running text calls them.
NAMES = {FEW_SHOT: "the few-shot prompt", PROBE: "the linear probe"}


def only(table: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """The rows in which every named column has its value."""
    keep = np.ones(len(table), dtype=bool)
    for column, value in where.items():
        keep &= (table[column] == value).to_numpy()
    return table[keep]


def places(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Every dataset and model of a table, the models of one dataset after each other: the order of the page."""
    models, datasets = (list(dict.fromkeys(table[c])) for c in ("model", "dataset"))
    have = set(zip(table["model"], table["dataset"], strict=True))
    return [(d, m) for d in datasets for m in models if (m, d) in have]


def _range(row: Any, *, signed: bool = False, percent: bool = False) -> str:
    """A value with its interval: "0.31 [0.27, 0.35]"."""
    sign, form = "+" if signed else "", ".1%" if percent else ".2f"
    value, low, high = (f"{float(row[c]):{sign}{form}}" for c in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _side(row: Any, bar: float = 0.0) -> str:
    """Where an interval lies: "above", "below", or "not told apart from"."""
    return "above" if row["low"] > bar else "below" if row["high"] < bar else "not told apart from"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def setting(study: Study, settings: Settings) -> str:
    """What was measured on what, and what was left out, as one paragraph."""
    lines = []
    for dataset in dict.fromkeys(d for _, d in study.measured):
        rows = next(m.rows for (_, d), m in study.measured.items() if d == dataset)
        lines.append(
            f"**{dataset}**: {len(rows.test)} test texts of {len(rows.labels)} emotions "
            f"({rows.test['group'].nunique()} topics or writers); examples are drawn from {len(rows.pool)} discovery "
            f"texts."
        )
    for (model, dataset), m in study.measured.items():
        units = only(m.fits, method=GAIN, examples=settings.main_examples)["units"]
        some = next(s for (method, _, _), s in m.steerings.items() if method == GAIN)
        layers = f"{_count(len(some.basis), 'layer')} with a dictionary"
        lines.append(f"{model} on {dataset}: {layers}; {units.mean():.0f} features get a gain.")
    absent = f"Not on this machine, so not measured: {', '.join(study.absent)}." if study.absent else ""
    return "\n\n".join(filter(None, [" ".join(lines), absent, *(f"Left out: {n}." for n in study.notes)]))


def tests(settings: Settings) -> str:
    """The tests of the three claims, as `repair.claims` applies them."""
    n = settings.main_examples
    return "\n".join(
        (
            f"1. **C5, recognition.** With gains learnt from {_count(n, 'example')} per emotion, macro-F1 on the test "
            f"texts exceeds (i) that of the answer as it is, (ii) that of prior calibration, (iii) when calibrated "
            f"too, that of prior calibration, and (iv) that of as many gains on random directions. Supported if every "
            f"interval lies above zero; not supported if one lies at or below zero; undecided otherwise.",
            f"2. **C6, language modelling.** With the gains at every position, perplexity of running text rises by at "
            f"most {repair.PERPLEXITY_RISE:.0%}. Supported if the whole interval is below that bar, not supported if "
            f"it is at or above it.",
            f"3. **C8, weak emotions.** The weakest emotion of the answer as it is, found on the validation texts: "
            f"targeted gains raise its recall by {100 * repair.WEAK_RISE:.0f} points, and the others lose at most "
            f"{-100 * repair.OTHERS_LOSS:.0f} on average. The same for the weakest emotion of the calibrated answer, "
            f"on top of calibration. All at once: global gains make the recalls of the emotions less unequal (a "
            f"smaller standard deviation) than they are in the answer as it is. Supported if all five intervals lie "
            f"on the right side of their bars; not supported if one lies on the wrong side.",
        )
    )


def _plain(metrics: pd.DataFrame, metric: str, model: str, dataset: str) -> pd.DataFrame:
    return only(metrics, metric=metric, model=model, dataset=dataset, strength=1.0, units=0, target="")


def level_finding(tables: Tables, model: str, dataset: str, settings: Settings) -> str:
    """What the gains do for macro-F1, beside what needs less."""
    n = settings.main_examples
    here = _plain(tables["metrics"], "macro_f1", model, dataset)
    gains, both = (only(here, method=GAIN, examples=n, calibrated=c).iloc[0] for c in (False, True))
    raw, prior = (only(here, method=m).iloc[0] for m in (RAW, CALIBRATED))
    compared = only(tables["comparisons"], model=model, dataset=dataset, method=GAIN, examples=n)
    parts = []
    for calibrated, versus, what in (
        (False, RAW, "the answer as it is"),
        (False, CALIBRATED, "prior calibration"),
        (True, CALIBRATED, "prior calibration when calibrated too"),
        (False, RANDOM, "gains on random directions"),
    ):
        row = only(compared, calibrated=calibrated, versus=versus).iloc[0]
        parts.append(f"{_side(row)} {what} ({_range(row, signed=True)})")
    row_both = only(compared, calibrated=True, versus=CALIBRATED).iloc[0]
    lesson = {
        "above": "So the examples taught more than the label prior.",
        "below": "So once the label prior is off, the gains do harm.",
    }.get(_side(row_both), "That the examples taught more than the label prior is not shown here.")
    rivals = here[(here["examples"] == n) & (here["method"] != GAIN)]
    best = rivals.loc[rivals["value"].idxmax()]
    top = f"{NAMES.get(best['method'], best['method'])}{', calibrated,' if best['calibrated'] else ''}"
    curve = only(here, method=GAIN, calibrated=True).sort_values("examples")
    many = ", ".join(f"{r.value:.2f} from {r.examples}" for r in curve.itertuples())
    return (
        f"**{model}** on {dataset}, {_count(n, 'example')} per emotion. Macro-F1 is {_range(raw)} without steering, "
        f"{_range(gains)} with gains, {_range(prior)} with prior calibration alone and {_range(both)} with gains and "
        f"calibration. Gains are {'; '.join(parts)}. {lesson} Of the other methods that see the "
        f"same examples, {top} does best "
        f"({_range(best)}). Gains and calibration together reach {many} per emotion."
    )


def comparison_view(comparisons: pd.DataFrame, examples: int) -> pd.DataFrame:
    """Differences of macro-F1 with intervals and corrected p values: a row per method, a column per comparison."""
    here = comparisons[comparisons["examples"] == examples]
    ways = ((False, RAW), (False, CALIBRATED), (True, CALIBRATED), (False, RANDOM))
    columns = {
        f"{'calibrated' if calibrated else 'as answered'}, less {'no steering' if versus == RAW else versus}": only(
            here, calibrated=calibrated, versus=versus
        )
        for calibrated, versus in ways
    }
    parts = []
    for name, table in columns.items():
        # Three lines in a cell keep the table narrow.
        cells = [f"{_range(r, signed=True)}\n{_p(r['p_holm'])}".replace(" [", "\n[") for _, r in table.iterrows()]
        parts.append(table.assign(cell=cells, column=name))
    long = pd.concat(parts)
    long["method"] = pd.Categorical(long["method"], [m for m in reversed(repair.METHODS) if m in set(long["method"])])
    keys = ["dataset", "model", "method"]
    wide = long.pivot_table(index=keys, columns="column", values="cell", aggfunc="first", observed=True)
    wide = wide[[c for c in columns if c in wide]].fillna("")
    wide.columns.name = None
    return wide


def _p(p: float) -> str:
    return "p < .001" if p < 0.001 else "p = 1" if p > 0.9995 else f"p = {p:.3f}".replace("0.", ".", 1)


def recall_finding(tables: Tables, model: str, dataset: str, settings: Settings) -> str:
    """What becomes of the emotions that the answer as it is misses most."""
    n = settings.main_examples
    here = _plain(tables["metrics"], "recall", model, dataset)
    kinds = {
        "as it is": only(here, method=RAW),
        "with gains": only(here, method=GAIN, examples=n, calibrated=False),
        "with prior calibration": only(here, method=CALIBRATED),
        "with both": only(here, method=GAIN, examples=n, calibrated=True),
    }
    by_emotion = {name: table.set_index("emotion") for name, table in kinds.items()}
    weak = by_emotion["as it is"]["value"].idxmin()
    said = ", ".join(f"{_range(table.loc[weak])} {name}" for name, table in by_emotion.items())
    lowest = ", ".join(f"{t['value'].idxmin()} {name} ({t['value'].min():.2f})" for name, t in by_emotion.items())
    spread = only(tables["spread"], model=model, dataset=dataset)
    change = only(spread, method=GAIN, examples=n, calibrated=False, versus=RAW).iloc[0]
    own, other = (
        only(spread, method=m, examples=k, calibrated=c, versus="").iloc[0]["value"]
        for m, k, c in ((GAIN, n, False), (CALIBRATED, 0, True))
    )
    word = {"below": "less unequal than", "above": "more unequal than"}.get(
        _side(change), "neither clearly more nor less unequal than"
    )
    return (
        f"**{model}** on {dataset}: the recall of {weak}, the lowest without steering, is {said}. The lowest of all "
        f"is {lowest}. Gains make the emotions {word} they were: the standard deviation of their recalls changes "
        f"by {_range(change, signed=True)} to {own:.2f}; prior calibration alone leaves {other:.2f}."
    )


def side_finding(tables: Tables, model: str, dataset: str, settings: Settings) -> str:
    """What the gains do to running text."""
    here = only(tables["perplexity"], model=model, dataset=dataset)

    def cost(method: str, strength: float = 1.0) -> str:
        rise, kl = (only(here, method=method, strength=strength, metric=m) for m in ("perplexity", "kl"))
        if rise.empty:
            return "not measured"
        return f"{_range(rise.iloc[0], signed=True, percent=True)}, KL {float(kl.iloc[0]['value']):.3f} nats a token"

    own = only(here, method=GAIN, strength=1.0, metric="perplexity").iloc[0]
    most = max(settings.strengths)
    bar = {"above": "beyond", "below": "within"}.get(_side(own, repair.PERPLEXITY_RISE), "not told apart from")
    others = "; ".join(f"{m}: {cost(m)}" for m in (RANDOM, repair.ADDITIVE))
    more = f" At strength {most:g}: {cost(GAIN, most)}." if most > 1 else ""
    return (
        f"**{model}**, gains learnt on {dataset}, {own['text']}: perplexity changes by {cost(GAIN)}, {bar} the bar of "
        f"{repair.PERPLEXITY_RISE:.0%}.{more} Beside them, {others}."
    )


def units_finding(tables: Tables, model: str, dataset: str, settings: Settings) -> str:
    """How much of the rise of macro-F1 the fewest features keep."""
    n = settings.main_examples
    metrics = only(tables["metrics"], metric="macro_f1", model=model, dataset=dataset, strength=1.0, target="")
    raw = float(only(metrics, method=RAW)["value"].iloc[0])
    curve = only(metrics, method=GAIN, examples=n, calibrated=False)
    full = float(only(curve, units=0)["value"].iloc[0])
    fits = only(tables["fits"], model=model, dataset=dataset, method=GAIN, examples=n)
    fewer = curve[curve["units"] > 0].sort_values("units")
    said = ", ".join(f"{r.value:.2f} with {r.units}" for r in fewer.itertuples())
    whole = f"{full:.2f} with all {fits['units'].mean():.0f}"
    if fewer.empty:
        return f"**{model}** on {dataset}: macro-F1 is {whole}."
    first = fewer.iloc[0]
    kept = (first["value"] - raw) / (full - raw) if full > raw else np.nan
    much = "at least as much as all of them" if kept >= 1 else f"{max(0.0, kept):.0%} of the rise"
    share = "" if np.isnan(kept) else f" The {first['units']} alone give {much}."
    return f"**{model}** on {dataset}: macro-F1 is {raw:.2f} with none, {said}, {whole} features.{share}"


def calibration_finding(tables: Tables, model: str, dataset: str, settings: Settings) -> str:
    """Whether the model's confidence fits its accuracy, before and after."""
    here = _plain(tables["metrics"], "calibration_error", model, dataset)
    n = settings.main_examples
    kinds = {
        "as it is": only(here, method=RAW),
        "with prior calibration": only(here, method=CALIBRATED),
        "with gains": only(here, method=GAIN, examples=n, calibrated=False),
        "with gains and calibration": only(here, method=GAIN, examples=n, calibrated=True),
    }
    said = ", ".join(f"{_range(t.iloc[0])} {name}" for name, t in kinds.items())
    return f"**{model}** on {dataset}: the expected calibration error is {said}."


def targeted_finding(tables: Tables, model: str, dataset: str) -> str:
    """What aiming at the weakest emotion does to it and to the others."""
    parts = []
    for calibrated, name in ((False, "answer as it is"), (True, "calibrated answer")):
        here = only(tables["targeted"], model=model, dataset=dataset, calibrated=calibrated).set_index("emotion")
        target = here["target"].iloc[0]
        lost = here.drop(index=[target, "others"])
        worst = lost.loc[lost["value"].idxmin()]
        loses = f", {worst.name} losing most ({_range(worst, signed=True)})" if worst["value"] < 0 else ""
        parts.append(
            f"in the {name} {target} is the weakest; aiming at it changes its recall by "
            f"{_range(here.loc[target], signed=True)} and that of the others by "
            f"{_range(here.loc['others'], signed=True)} on average{loses}"
        )
    return f"**{model}** on {dataset}: {'; '.join(parts)}."


def sample_view(samples: pd.DataFrame) -> pd.DataFrame:
    """What each model writes after each prompt: a column per strength."""
    named = samples.assign(column=[f"strength {x:g}" if x else "without steering" for x in samples["strength"]])
    wide = named.pivot_table(index=["model", "prompt"], columns="column", values="text", aggfunc="first", sort=False)
    wide = wide.reindex(columns=list(dict.fromkeys(named["column"])))
    wide.columns.name = None
    return wide


# Which features were turned.


def turned(study: Study, settings: Settings, in_dir: Path) -> pd.DataFrame:
    """Features by how far their gain is from one on average over example draws, furthest first.

    Columns: model, dataset, layer, feature, gain (mean over draws), least, most, chosen (share of draws in which the
    feature has a gain at all), and kind and emotions from the chapter on features ("" where it has not run or says
    nothing).
    """
    tables = []
    for (model, dataset), measured in study.measured.items():
        fits = [s for (method, n, _), s in measured.steerings.items() if (method, n) == (GAIN, settings.main_examples)]
        for layer in sorted(fits[0].basis):
            gains_DK = np.array([s.gains.get(layer, np.ones(len(s.basis[layer]))) for s in fits])
            at = np.flatnonzero((gains_DK != 1).any(axis=0))
            columns = {"model": model, "dataset": dataset, "layer": layer, "feature": at}
            own = gains_DK[:, at]
            columns |= {"gain": own.mean(axis=0), "least": own.min(axis=0), "most": own.max(axis=0)}
            tables.append(pd.DataFrame(columns | {"chosen": (own != 1).mean(axis=0)}))
    table = pd.concat(tables, ignore_index=True)
    table = table.loc[(table["gain"] - 1).abs().sort_values(ascending=False, kind="stable").index]
    path, known = in_dir / "features" / "features.parquet", ["model", "layer", "feature", "kind", "emotions"]
    if path.is_file():
        table = table.merge(pd.read_parquet(path)[known], on=known[:3], how="left")
    else:
        table = table.assign(kind="", emotions="")
    return table.fillna({"kind": "", "emotions": ""}).reset_index(drop=True)


def turned_finding(found: pd.DataFrame, model: str, dataset: str, count: int = 50) -> str:
    """Whether the draws agree on the features, where these lie, and whether they respond to emotion."""
    here = only(found, model=model, dataset=dataset)
    top = here.head(count)
    same = ((top["least"] > 1) | (top["most"] < 1)).mean()
    half = top["layer"].median()
    known = here["kind"] != ""
    text = (
        f"**{model}** on {dataset}: {len(here)} features have a gain in at least one draw, "
        f"{(here['chosen'] == 1).mean():.0%} of them in every draw. Of the {len(top)} turned furthest, "
        f"{(top['gain'] > 1).mean():.0%} are turned up, {same:.0%} in the same direction by every draw, and half lie "
        f"at layer {half:.0f} or above."
    )
    if not known.any():
        return f"{text} Whether they respond to emotion is not known here: the chapter on features has not read them."
    share = known.loc[top.index].mean()
    return f"{text} Of these, {share:.0%} respond to emotion, against {known.mean():.0%} of all with a gain."


def verdicts(tables: Tables, settings: Settings) -> str:
    """The verdicts on the three claims, and the parts of their tests, as the first page shows them."""
    claims = repair.claims(tables, settings)
    frame = pd.DataFrame([asdict(c) | {"chapter": "steering"} for c in claims])
    frame = frame.astype(dict.fromkeys(["effect", "low", "high"], float)).sort_values("claim", kind="stable")
    return f"{ledger.table(frame)}\n\n{ledger.part_table(frame)}"
