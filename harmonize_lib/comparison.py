"""Consensus against its comparators: paired differences, what they decide, and their figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from harmonize_lib.harmonization import BEST, OUTCOMES, OWN, POOLED, RANDOM, rules_of
from harmonize_lib.plots import forest, label
from harmonize_lib.statistics import Interval, cross_fitted_best, holm, paired_difference, summarize
from harmonize_lib.study import Run

CHOSEN = "chosen rule"
UNITS = {
    "recognition": "difference in accuracy",
    "localization": "difference in relevance rank",
    "deletion": "difference in probability lost",
}
LEAST_P = 40  # sign flips per test of a family: the least p, Holm-corrected, is 1 / 40
ALPHA = 0.05


def differences(scores: pd.DataFrame, outcome: str, seed: int) -> pd.DataFrame:
    """Consensus minus each comparator, image by image.

    Parameters
    ----------
    scores : pd.DataFrame
        ``SCORES_SCHEMA``, single models and consensus.
    outcome : str
        A column of numbers.
    seed : int
        Of the split behind the best single other.

    Returns
    -------
    pd.DataFrame
        One row per ``against`` (random or best single other, own map), ``rule``, ``target`` and ``method`` (the
        index), one column per image.
        The random single other is the image's mean over the pool. The best single other is chosen for each target,
        method and outcome by :func:`cross_fitted_best`. So is the ``chosen rule``, added where there are several
        rules, but by the *other* targets: neither the evaluated model nor the evaluated images have a say.
        Images and cells without numbers are left out.
    """
    wide = scores.pivot_table(
        index=["kind", "target", "method", "candidate"], columns="image", values=outcome, sort=False
    )
    if not len(wide):
        return wide
    cell = ["target", "method"]

    others, pooled = wide.loc["other"], wide.loc["consensus"]
    best = {key: cross_fitted_best(part.to_numpy(), seed) for key, part in others.groupby(cell, sort=False)}
    against = {
        RANDOM: others.groupby(cell, sort=False).mean(),
        BEST: pd.DataFrame.from_dict(best, orient="index", columns=wide.columns).set_axis(_pairs(best), axis=0),
    }
    if "own" in wide.index.get_level_values("kind"):
        against[OWN] = wide.loc["own"].droplevel("candidate")
    rules = {rule: rows.droplevel("candidate") for rule, rows in pooled.groupby("candidate", sort=False)}
    if len(rules) > 1 and len(pooled.index.unique("target")) > 1:
        rules[CHOSEN] = _chosen(pooled, seed)
    parts = {
        (name, rule): (rows - against[name]).reindex(rows.index).dropna(how="all")
        for name in against
        for rule, rows in rules.items()
    }
    return pd.concat(parts, names=["against", "rule"])


def _pairs(keys: Iterable[tuple[str, str]]) -> pd.MultiIndex:
    return pd.MultiIndex.from_tuples(keys, names=["target", "method"])


def _chosen(pooled: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Scores (target, method) x images of the rule that the other targets choose on the other half of the images."""
    found = {}
    for method, rows in pooled.groupby("method", sort=False):
        values = {target: part.droplevel(["target", "method"]) for target, part in rows.groupby("target", sort=False)}
        for target, own in values.items():
            others = [part.loc[own.index] for name, part in values.items() if name != target]
            if others:
                judges = np.mean([part.to_numpy() for part in others], axis=0)
                found[target, method] = cross_fitted_best(own.to_numpy(), seed, judges)
    table = pd.DataFrame.from_dict(found, orient="index", columns=pooled.columns).set_axis(_pairs(found), axis=0)
    return table.reindex(pooled.droplevel("candidate").index.unique())


def compare(scores: pd.DataFrame, seed: int, by: Sequence[str] = ()) -> pd.DataFrame:
    """Paired differences of every rule's consensus to every comparator, in every outcome.

    Parameters
    ----------
    scores : pd.DataFrame
        ``SCORES_SCHEMA``, single models and consensus.
    seed : int
        Of bootstrap, sign flips and split.
    by : Sequence[str]
        What is kept apart: ``"target"``, ``"method"``, both or nothing. The rest is averaged within the image.

    Returns
    -------
    pd.DataFrame
        Columns ``outcome``, ``against``, ``rule``, ``by``, ``mean``, ``low``, ``high`` (bootstrap over images), ``n``,
        ``p`` (sign flips), ``holm``: p corrected over the family, which is one outcome against one comparator, with
        all its rules and groups. Positive: the consensus is better. Outcomes without numbers are left out.
    """
    tables = []
    for outcome in OUTCOMES:
        table = differences(scores, outcome, seed)
        if not len(table):
            continue
        groups = table.groupby(["against", "rule", *by], sort=False).mean()
        for _, family in groups.groupby(level="against", sort=False):
            flips = max(2000, LEAST_P * len(family))
            found = [paired_difference(row, np.zeros(len(row)), seed, n_resamples=flips) for row in family.to_numpy()]
            names = family.index.to_frame(index=False).assign(outcome=OUTCOMES[outcome])
            numbers = pd.DataFrame(found, columns=list(Interval._fields))
            tables.append(pd.concat([names, numbers], axis=1).assign(holm=holm(numbers["p"])))
    result = pd.concat(tables, ignore_index=True)
    return result[["outcome", "against", "rule", *by, *Interval._fields, "holm"]]


def decided(cells: pd.DataFrame) -> pd.DataFrame:
    """Count in how many cells the consensus is better, worse, or neither can be said.

    Parameters
    ----------
    cells : pd.DataFrame
        From :func:`compare`.

    Returns
    -------
    pd.DataFrame
        One row per outcome and comparator: ``question``, ``better``, ``undecided``, ``worse`` (Holm-corrected p
        under 0.05), and ``cells``, their sum.
    """
    sign = np.sign(cells["mean"]).where(cells["holm"] < ALPHA, 0)
    question = cells["outcome"] + " vs. " + cells["against"]
    counts = pd.crosstab(question, sign).reindex(index=question.unique(), columns=[1.0, 0.0, -1.0], fill_value=0)
    counts.columns = pd.Index(["better", "undecided", "worse"])
    return counts.assign(cells=counts.sum(axis=1)).rename_axis("question").reset_index()


def against_controls(run: Run, scores: pd.DataFrame, controls: pd.DataFrame) -> pd.DataFrame:
    """Consensus, own map and a random single other minus maps that know no model, paired by image.

    Parameters
    ----------
    run : Run
        Gives rules and seed.
    scores : pd.DataFrame
        ``SCORES_SCHEMA``, single models and consensus.
    controls : pd.DataFrame
        From :func:`harmonization.control_scores`.

    Returns
    -------
    pd.DataFrame
        Columns ``outcome``, ``against``, ``map``, ``mean``, ``low``, ``high``, ``n``, ``p``; means over targets and
        methods within the image. Positive: the control is worse.
    """
    rows, seed = [], run.settings.seed
    for outcome in ("correct", "relevance_rank"):
        gains = differences(scores, outcome, seed)
        if not len(gains):
            continue
        known = controls.pivot_table(index="candidate", columns="image", values=outcome)[gains.columns]
        cells = scores.pivot_table(index=["kind", "target", "method"], columns="image", values=outcome)[gains.columns]
        single = cells.loc["other"]
        consensus = (gains.xs((RANDOM, headline(run)), level=["against", "rule"]) + single).dropna(how="all")
        maps = {POOLED: consensus, RANDOM: single} | ({OWN: cells.loc["own"]} if "own" in cells.index else {})
        for against in known.index:
            for name, values in maps.items():
                found = paired_difference(values.mean(), known.loc[against], seed)
                rows.append((OUTCOMES[outcome], f"minus {against}", name, *found))
    return pd.DataFrame(rows, columns=["outcome", "against", "map", *Interval._fields])


def rules_compared(scores: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Each rule against the mean of all rules, averaged over targets and methods within the image.

    Parameters
    ----------
    scores : pd.DataFrame
        ``SCORES_SCHEMA``.
    seed : int
        Of bootstrap and sign flips.

    Returns
    -------
    pd.DataFrame
        Columns ``outcome``, ``rule``, ``level`` (mean of the outcome), ``mean``, ``low``, ``high``, ``n``, ``p`` of the
        difference, ``holm`` over the rules of one outcome.
    """
    tables = []
    pooled = scores[scores["kind"] == "consensus"]
    for outcome, name in OUTCOMES.items():
        wide = pooled.pivot_table(index="candidate", columns="image", values=outcome, sort=False)
        if not wide.size:
            continue
        mean = wide.mean().to_numpy()
        numbers = pd.DataFrame([paired_difference(row, mean, seed) for row in wide.to_numpy()])
        numbers.insert(0, "level", wide.mean(axis=1).to_numpy())
        numbers.insert(0, "rule", wide.index)
        tables.append(numbers.assign(holm=holm(numbers["p"]), outcome=name))
    return pd.concat(tables, ignore_index=True)


def gain_by_size(sizes: pd.DataFrame, seed: int) -> pd.DataFrame:
    """What a pool gains over a single other model, paired by image.

    Parameters
    ----------
    sizes : pd.DataFrame
        From :func:`pool_size_scores`.
    seed : int
        Of bootstrap and sign flips.

    Returns
    -------
    pd.DataFrame
        Columns ``size``, ``mean``, ``low``, ``high``, ``n``, ``p``: accuracy minus that of pools of one, mean over
        targets and methods.
    """
    rows = [(size, *paired(sizes, "size", size, 1, "correct", seed)) for size in sorted(sizes["size"].unique())]
    return pd.DataFrame(rows, columns=["size", *Interval._fields])


def paired(table: pd.DataFrame, column: str, a: object, b: object, value: str, seed: int) -> Interval:
    """Mean difference between two groups of a per-image table, paired by image.

    Parameters
    ----------
    table : pd.DataFrame
        Long table with a column ``image``.
    column : str
        Column that tells the groups apart.
    a : object
        One group.
    b : object
        The group that is subtracted.
    value : str
        Column of numbers; averaged within the image.
    seed : int
        Of bootstrap and sign flips.

    Returns
    -------
    Interval
        Of a - b; n = 0 where one of the groups is not there.
    """
    wide = table.pivot_table(index="image", columns=column, values=value, observed=True)
    if a not in wide or b not in wide:
        return Interval(np.nan, np.nan, np.nan, 0)
    return paired_difference(wide[a], wide[b], seed)


def headline(run: Run) -> str:
    """The rule that claims are judged by: chosen by other targets on other images, where there are several rules.

    Parameters
    ----------
    run : Run
        Gives rules.

    Returns
    -------
    str
        ``"chosen rule"``, or the only rule.
    """
    return CHOSEN if len(rules_of(run)) > 1 else run.settings.rule


def measured(run: Run, overall: pd.DataFrame, sizes: pd.DataFrame, controls: pd.DataFrame) -> dict[str, Interval]:
    """What the notebook's claims are judged by.

    Parameters
    ----------
    run : Run
        Gives rules and seed.
    overall : pd.DataFrame
        From :func:`compare` without groups.
    sizes : pd.DataFrame
        From :func:`pool_size_scores`.
    controls : pd.DataFrame
        From :func:`against_controls`.

    Returns
    -------
    dict[str, Interval]
        Claim id to interval; n = 0 where there is nothing to measure.
    """

    judged = overall[overall["rule"] == headline(run)]
    edges = controls[controls["map"] == POOLED]

    def read(outcome: str, against: str, table: pd.DataFrame = judged) -> Interval:
        rows = table[(table["outcome"] == outcome) & (table["against"] == against)]
        if not len(rows):
            return Interval(np.nan, np.nan, np.nan, 0)
        row = rows.iloc[0]
        return Interval(row["mean"], row["low"], row["high"], int(row["n"]), row["p"])

    largest = sizes["size"].max()
    return {
        "harmonized_detects": read("recognition", RANDOM),
        "harmonized_beats_best": read("recognition", BEST),
        "harmonized_beats_own": read("recognition", OWN),
        "harmonized_localizes": read("localization", OWN),
        "harmonized_beats_edges": read("recognition", "minus edges", edges),
        "pool_size": paired(sizes, "size", largest, 2 if largest > 2 else None, "correct", run.settings.seed),
    }


def findings(run: Run, overall: pd.DataFrame, alike: pd.DataFrame, shortcut: pd.DataFrame, kinds: pd.DataFrame) -> str:
    """Say what the tables show, beyond the ledger.

    Parameters
    ----------
    run : Run
        Gives rule and seed.
    overall : pd.DataFrame
        From :func:`compare` without groups.
    alike : pd.DataFrame
        From :func:`consistency`.
    shortcut : pd.DataFrame
        From :func:`shortcut_scores`.
    kinds : pd.DataFrame
        From :func:`pooling_scores`.

    Returns
    -------
    str
        Markdown, one line per finding: mean difference, interval, n, and p (Holm-corrected where it is of a family).
    """
    seed, lines = run.settings.seed, []

    def say(what: str, i: Interval) -> None:
        if i.n:
            lines.append(f"- {what}: {i.mean:+.3f} [{i.low:+.3f}, {i.high:+.3f}], n = {i.n}, p = {i.p:.4f}.")

    for rule in dict.fromkeys((headline(run), run.settings.rule)):
        rows = overall[overall["rule"] == rule]
        for row in rows.itertuples():
            difference = Interval(row.mean, row.low, row.high, int(row.n), row.holm)
            say(f"Consensus ({label(rule)}) minus {row.against}, {row.outcome}", difference)
    names = list(alike["pair"].unique())
    for name in names[1:]:
        for column, measure in (("spearman", "Spearman correlation"), ("topk_iou", "top-10 % overlap")):
            say(f"{measure}: {name} minus {names[0]}", paired(alike, "pair", name, names[0], column, seed))
    for labels in shortcut["trained"].unique():
        some = shortcut[shortcut["trained"] == labels]
        difference = paired(some, "map", "consensus", "single", "relevance_rank", seed)
        say(f"Relevance rank on the object, models trained for {labels}: consensus minus single", difference)
    for models in kinds["models"].unique():
        some = kinds[kinds["models"] == models]
        difference = paired(some, "methods", "all methods", "one method", "correct", seed)
        say(f"Recognition of {models}: all methods pooled minus one method", difference)
    return "\n".join(lines)


def draw_outcomes(table: pd.DataFrame, y: str, hue: str | None, title: str) -> Figure:
    """Paired differences side by side: one panel per outcome.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`compare` or :func:`rules_compared`.
    y : str
        Column on the vertical axis.
    hue : str | None
        Column that tells groups apart.
    title : str
        What it shows.

    Returns
    -------
    Figure
        The figure.
    """
    outcomes, rows = list(dict.fromkeys(table["outcome"])), table[y].nunique()
    groups = table[hue].nunique() if hue else 1
    size = (7.2, 1.3 + rows * max(0.2, 0.11 * groups))
    figure, axes = plt.subplots(1, len(outcomes), figsize=size, sharey=True, squeeze=False)
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        forest(ax, table[table["outcome"] == outcome], y, outcome.capitalize(), UNITS[outcome], hue)
        ax.grid(axis="y", visible=False)
        ax.locator_params(axis="x", nbins=4)
        ax.set_ylim(rows - 0.5, -0.5)
    if hue:
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncol=groups)
    figure.suptitle(title, fontweight="bold", fontsize="medium", x=0.01, ha="left")
    return figure


def draw_shortcut(run: Run, shortcut: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Where single maps and consensuses look, by what the models were trained for.

    Parameters
    ----------
    run : Run
        Gives masks and seed.
    shortcut : pd.DataFrame
        From :func:`shortcut_scores`.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure and its table: ``pool``, ``method``, ``mean``, ``low``, ``high``, ``n``.
    """
    named = shortcut.assign(pool="trained for " + shortcut["trained"] + ": " + shortcut["map"])
    named["method"] = named["method"].map(label)
    table = summarize(named, ["pool", "method"], "relevance_rank", run.settings.seed)
    table = table.sort_values("pool", ascending=False, kind="stable")
    figure, ax = plt.subplots(figsize=(7, 2.6))
    forest(ax, table, "method", "Where object and scene models look", "relevance rank on the object", "pool")
    if run.dataset.masks is not None:
        ax.axvline(float(run.dataset.masks.float().mean()), color="0.5", ls="--", lw=1)
    ax.grid(axis="y", visible=False)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure, table
