"""Do features travel between architectures? The comparisons of notebook 04."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from sklearn.manifold import MDS
from torch import Tensor

from harmonize_lib import plots, study
from harmonize_lib.agreement import spearman, ssim, topk_iou
from harmonize_lib.data import Dataset
from harmonize_lib.features import feature_image, feature_mask, mean_color, patch_scores
from harmonize_lib.models import load_model, shuffled
from harmonize_lib.statistics import Interval, paired_difference, ratio_interval, summarize
from harmonize_lib.study import Run
from harmonize_lib.transfer import area_over_fractions, family_advantage, relative_transfer

Maps = Mapping[tuple[str, str], Tensor]

COMPLEMENT_FRACTIONS = [0.05, 0.1, 0.2, 0.5]
BY_RELATION = ["own map", "second seed", "same architecture", "same family", "other family", "random"]
AGAINST_NO_MODEL = ["other family", "object_mask", "edges", "center", "shuffled weights", "random"]
REFERENCE_LINES = ("object_mask", "edges", "center", "shuffled weights", "random")
MEASURES = {"Spearman": spearman, "top-10 % IoU": topk_iou, "SSIM": ssim}
ALL = "all methods"
OTHERS = "other architectures"
BY_TARGET = ["own map", OTHERS, "center", "edges", "random"]


def same_architecture(run: Run) -> dict[str, Maps]:
    """Maps of each model's own architecture: its second seed (ceiling) and itself with shuffled weights (floor).

    Parameters
    ----------
    run : Run
        The run.

    Returns
    -------
    dict[str, Maps]
        ``"second seed"`` (models of the zoo only) and ``"shuffled weights"``, each (model, method) to maps (N, H, W).
    """
    device = run.settings.device
    seeds = {name: load_model(other, device=device) for name in run.models if (other := study.second_seed(name))}
    floors = {name: shuffled(model, run.settings.seed) for name, model in run.models.items()}
    methods, seed, options = run.settings.methods, run.settings.seed, run.settings.options
    return {
        kind: study.all_maps(models, run.dataset, methods, seed, options)
        for kind, models in (("second seed", seeds), ("shuffled weights", floors))
        if models
    }


def explained(settings: Any, dataset: Dataset) -> list[tuple[str, Dataset]]:
    """What notebook 04 explains: every model, and its second seed where the zoo has one.

    Parameters
    ----------
    settings : Any
        The notebook's checked parameters.
    dataset : Dataset
        Its images.

    Returns
    -------
    list[tuple[str, Dataset]]
        As :func:`study.explained` has it.
    """
    seeds = filter(None, map(study.second_seed, settings.models))
    return study.explained(settings, dataset) + [(spec, dataset) for spec in seeds]


def same_architecture_table(run: Run, relatives: Mapping[str, Maps]) -> pd.DataFrame:
    """Show each model the features found with its own architecture.

    Parameters
    ----------
    run : Run
        The run.
    relatives : Mapping[str, Maps]
        From :func:`same_architecture`.

    Returns
    -------
    pd.DataFrame
        As ``transfer.TRANSFER_SCHEMA``; ``source`` is ``"second seed"`` or ``"shuffled weights"``.
    """
    parts = []
    for kind, maps in relatives.items():
        for name, model in run.models.items():
            own = {key: values for key, values in maps.items() if key[0] == name}
            if own:
                part = study.recognition_table(run, own, {name: model}, run.settings.fractions)
                parts.append(part.assign(source=kind))
    return pd.concat(parts, ignore_index=True)


def silhouettes(run: Run, maps: Maps) -> pd.DataFrame:
    """What the outline of a model's own features gives away: the mask in white on the mean color, nothing else.

    Parameters
    ----------
    run : Run
        The run.
    maps : Maps
        (model, method) to maps (N, H, W); only models' own maps are used.

    Returns
    -------
    pd.DataFrame
        Columns ``source`` (``"silhouette"``), ``target``, ``method``, ``image``, ``correct``.
    """
    data, settings = run.dataset, run.settings
    white, mean = torch.full_like(data.images, 255), mean_color(data.images)
    parts = []
    for (name, method), values in maps.items():
        if name in run.models:
            mask = feature_mask(values, settings.fraction, settings.patch)
            correct = study.predictions(run.models[name], feature_image(white, mask, "mean", mean)) == data.labels
            columns = {"source": "silhouette", "target": name, "method": method, "image": data.ids}
            parts.append(pd.DataFrame(columns | {"correct": correct.numpy()}))
    return pd.concat(parts, ignore_index=True)


def floors_and_ceilings(run: Run, table: pd.DataFrame, relatives: pd.DataFrame, outlines: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of every target on what bounds a transfer from below and above.

    Parameters
    ----------
    run : Run
        The run; its ``fraction`` is the share of patches.
    table : pd.DataFrame
        Recognition of all maps and controls by all targets.
    relatives : pd.DataFrame
        From :func:`same_architecture_table`.
    outlines : pd.DataFrame
        From :func:`silhouettes`.

    Returns
    -------
    pd.DataFrame
        Columns ``target``, ``bound``, ``mean``, ``low``, ``high``, ``n``.
    """
    at_k = pd.concat([table, relatives])
    at_k = at_k[at_k["fraction"] == run.settings.fraction].astype(
        {"source": object, "target": object, "method": object}
    )
    control = at_k[at_k["method"] == "control"].assign(bound=lambda part: part["source"])
    control = control.replace({"bound": {"object_mask": "object patches"}})
    own = at_k[at_k["source"] == at_k["target"]].assign(bound="own map")
    related = at_k[at_k["source"].isin(list(relatives["source"].unique()))].assign(bound=lambda part: part["source"])
    data = run.dataset
    known = {name: (study.predictions(model, data.images) == data.labels).numpy() for name, model in run.models.items()}
    whole = pd.DataFrame(known, index=pd.Index(data.ids, name="image")).melt(
        var_name="target", value_name="correct", ignore_index=False
    )
    parts = [control, outlines.assign(bound="silhouette"), related, own]
    parts.append(whole.reset_index().assign(bound="whole image"))
    if run.dataset.masks is not None:
        parts.append(study.masked_accuracy(run).assign(bound="whole object"))
    bounds = pd.concat(parts)[["target", "bound", "image", "correct"]].astype({"correct": float})
    order = ["random", "center", "edges", "silhouette", "shuffled weights", "second seed", "own map", "object patches"]
    bounds["target"] = pd.Categorical(bounds["target"], list(run.models))
    bounds["bound"] = pd.Categorical(bounds["bound"], [*order, "whole object", "whole image"])
    return summarize(bounds, ["target", "bound"], "correct", run.settings.seed)


def relation(run: Run, table: pd.DataFrame) -> pd.Series:
    """How source and target are related.

    Parameters
    ----------
    run : Run
        Knows architectures and families.
    table : pd.DataFrame
        Columns ``source``, ``target``.

    Returns
    -------
    pd.Series
        ``"own map"``, ``"same architecture"`` (another seed), ``"same family"``, ``"other family"``, or the source
        itself where it is no model.
    """
    family = {name: model.family for name, model in run.models.items()}
    architecture = {name: model.architecture for name, model in run.models.items()}
    source, target = table["source"].astype(object), table["target"].astype(object)
    kind = np.where(source.map(family) == target.map(family), "same family", "other family")
    kind = np.where(source.map(architecture) == target.map(architecture), "same architecture", kind)
    kind = np.where(source == target, "own map", kind)
    return pd.Series(np.where(source.isin(list(family)), kind, source), index=table.index)


def curves_over_k(run: Run, table: pd.DataFrame, relatives: pd.DataFrame | None) -> pd.DataFrame:
    """Accuracy over k: by relation of source and target, beside floors and ceilings, and by method.

    Parameters
    ----------
    run : Run
        The run.
    table : pd.DataFrame
        Recognition of all maps and controls by all targets.
    relatives : pd.DataFrame | None
        From :func:`same_architecture_table`.

    Returns
    -------
    pd.DataFrame
        Columns ``panel``, ``line``, ``fraction``, ``mean``, ``low``, ``high``, ``n``; a mean over targets, which all
        count the same, and over methods in the first two panels. The last panel's maps are those of different
        architectures.
    """
    seed = run.settings.seed
    every = table if relatives is None else pd.concat([table, relatives])
    lines = every.assign(line=relation(run, every))
    relations = _over_targets(lines, seed)
    others = lines[lines["line"].isin(["same family", "other family"]) | (lines["line"] == "random")]
    others = others.assign(line=np.where(others["line"] == "random", "random", others["method"].astype(object)))
    methods = _over_targets(others, seed)
    panels = {
        "By whose map": (relations, BY_RELATION),
        "Floors and ceilings": (relations, AGAINST_NO_MODEL),
        "By method (another's map)": (methods, [*run.settings.methods, "random"]),
    }
    parts = [
        part[part["line"] == line].assign(panel=panel) for panel, (part, order) in panels.items() for line in order
    ]
    return pd.concat(parts, ignore_index=True)


def _over_targets(lines: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Accuracy by line and share, where every target counts the same, however many sources it has."""
    by = ["line", "fraction", "target", "image"]
    each = lines.assign(correct=lines["correct"].astype(float)).groupby(by, observed=True)["correct"].mean()
    return summarize(each.reset_index(), ["line", "fraction"], "correct", seed)


def curves_by_target(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of every target over k on its own features, on other architectures', and on maps that know no model.

    Parameters
    ----------
    run : Run
        The run.
    table : pd.DataFrame
        Recognition of all maps and controls by all targets.

    Returns
    -------
    pd.DataFrame
        Columns ``target``, ``line`` (own map, other architectures, random, center, edges), ``fraction``, ``mean``,
        ``low``, ``high``, ``n``; means over sources and methods.
    """
    kind = relation(run, table).replace({"same family": OTHERS, "other family": OTHERS})
    lines = table.assign(line=kind, correct=table["correct"].astype(float), target=table["target"].astype(object))
    each = summarize(lines, ["target", "line", "fraction"], "correct", run.settings.seed)
    order = [(target, line) for target in run.models for line in BY_TARGET]
    return pd.concat([each[(each["target"] == target) & (each["line"] == line)] for target, line in order])


def same_minus_other_family(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy on features of the target's family minus that on the other family's, paired by image.

    Parameters
    ----------
    run : Run
        The run.
    table : pd.DataFrame
        Recognition of all maps by all targets.

    Returns
    -------
    pd.DataFrame
        Columns ``fraction``, ``mean``, ``low``, ``high``, ``n``, ``p``; a mean over methods and over the targets that
        have sources of both families.
    """
    lines = table.assign(line=relation(run, table), correct=table["correct"].astype(float))
    lines = lines[lines["line"].isin(["same family", "other family"])]
    by = ["fraction", "target", "image", "line"]
    wide = lines.groupby(by, observed=True)["correct"].mean().unstack("line").dropna()
    wide = wide.groupby(["fraction", "image"], observed=True).mean().reindex(columns=["same family", "other family"])
    rows = [
        (k, *paired_difference(part["same family"], part["other family"], run.settings.seed))
        for k, part in wide.groupby("fraction")
    ]
    return pd.DataFrame(rows, columns=["fraction", *Interval._fields])


def own_minus_other(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy on own features minus that on another architecture's, paired by image, a mean over targets.

    Parameters
    ----------
    run : Run
        The run.
    table : pd.DataFrame
        Recognition of all maps by all targets.

    Returns
    -------
    pd.DataFrame
        Columns ``method``, ``fraction``, ``mean``, ``low``, ``high``, ``n``, ``p``.
    """
    lines = table.assign(own=relation(run, table))
    lines = lines[lines["own"].isin(["own map", "same family", "other family"])]
    lines["own"] = lines["own"] == "own map"
    wide = (
        lines.groupby(["method", "fraction", "target", "image", "own"], observed=True)["correct"].mean().unstack("own")
    )
    wide = wide.dropna().groupby(["method", "fraction", "image"], observed=True, sort=False).mean()
    rows = [
        (*group, *paired_difference(part[True], part[False], run.settings.seed))
        for group, part in wide.groupby(["method", "fraction"], observed=True, sort=False)
    ]
    return pd.DataFrame(rows, columns=["method", "fraction", "mean", "low", "high", "n", "p"])


def _agreement(run: Run, a: Tensor, b: Tensor, measure: str) -> np.ndarray:
    """Agreement of two sets of maps, (N), on the patch grid so that resolutions match."""
    patch = run.settings.patch
    return MEASURES[measure](patch_scores(a, patch), patch_scores(b, patch)).numpy()


def agreement_table(run: Run, maps: Maps, relatives: Mapping[str, Maps]) -> pd.DataFrame:
    """Agreement of maps between architectures, between seeds (ceiling) and with shuffled weights (floor), per image.

    Parameters
    ----------
    run : Run
        The run.
    maps : Maps
        (model, method) to maps (N, H, W).
    relatives : Mapping[str, Maps]
        From :func:`same_architecture`.

    Returns
    -------
    pd.DataFrame
        Columns ``measure``, ``pair``, ``method``, ``models``, ``image``, ``agreement``; NaN where undefined.
    """
    parts = []
    methods = list(dict.fromkeys(method for _, method in maps))
    for method in methods:
        named = [
            (name, name, "other architecture", maps[name, method]) for name in run.models if (name, method) in maps
        ]
        pairs = [(f"{a[0]} {b[0]}", "other architecture", a[3], b[3]) for a, b in combinations(named, 2)]
        for kind, others in relatives.items():
            pairs += [(name, kind, own, others[name, method]) for name, _, _, own in named if (name, method) in others]
        for measure in MEASURES:
            for models, kind, a, b in pairs:
                columns = {
                    "measure": measure,
                    "pair": kind,
                    "method": method,
                    "models": models,
                    "image": run.dataset.ids,
                }
                parts.append(pd.DataFrame(columns | {"agreement": _agreement(run, a, b, measure)}))
    table = pd.concat(parts, ignore_index=True)
    orders = {"measure": list(MEASURES), "pair": ["other architecture", *relatives], "method": methods}
    return table.assign(**{name: pd.Categorical(table[name], order) for name, order in orders.items()})


def agreement_matrix(run: Run, agreement: pd.DataFrame) -> pd.DataFrame:
    """Mean Spearman of every pair of models over methods; the diagonal is a model and its second seed.

    Parameters
    ----------
    run : Run
        The run.
    agreement : pd.DataFrame
        From :func:`agreement_table`.

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``other model``, ``mean``, ``low``, ``high``, ``n``.
    """
    part = agreement[(agreement["measure"] == "Spearman") & (agreement["pair"] != "shuffled weights")]
    ends = part["models"].str.split(" ", expand=True).reindex(columns=[0, 1])
    part = part.assign(**{"model": ends[0], "other model": ends[1].fillna(ends[0])})
    mirrored = part.rename(columns={"model": "other model", "other model": "model"})
    both = pd.concat([part, mirrored[mirrored["model"] != mirrored["other model"]]])
    names = list(run.models)
    both = both.assign(**{column: pd.Categorical(both[column], names) for column in ("model", "other model")})
    return summarize(both, ["model", "other model"], "agreement", run.settings.seed)


def agreement_by_family(run: Run, agreement: pd.DataFrame) -> pd.DataFrame:
    """Mean Spearman of pairs of models by their families, beside that of two seeds.

    Parameters
    ----------
    run : Run
        The run.
    agreement : pd.DataFrame
        From :func:`agreement_table`.

    Returns
    -------
    pd.DataFrame
        Columns ``pair``, ``mean``, ``low``, ``high``, ``n``; means over pairs and methods.
    """
    part = agreement[(agreement["measure"] == "Spearman") & (agreement["pair"] != "shuffled weights")]
    family = {name: plots.label(model.family) for name, model in run.models.items()}
    kinds = {
        models: " and ".join(sorted(map(family.__getitem__, models.split(" ")))) if " " in models else "two seeds"
        for models in part["models"].unique()
    }
    return summarize(part.assign(pair=part["models"].map(kinds)), ["pair"], "agreement", run.settings.seed)


def areas(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """Area under the transfer curve of every method: mean accuracy over k, between architectures.

    Parameters
    ----------
    run : Run
        The run.
    table : pd.DataFrame
        Recognition of all maps by all targets.

    Returns
    -------
    pd.DataFrame
        Columns ``method``, ``mean``, ``low``, ``high``, ``n``, from the largest; the last row, ``best minus worst``,
        is paired by image.
    """
    area = area_over_fractions(table[table["method"] != "control"])
    area = area[area["source"].astype(str) != area["target"].astype(str)].astype({"method": object})
    found = summarize(area, ["method"], "correct", run.settings.seed).sort_values("mean", ascending=False)
    wide = area.groupby(["image", "method"], observed=True)["correct"].mean().unstack()
    best, worst = found["method"].iloc[[0, -1]]
    spread = paired_difference(wide[best], wide[worst], run.settings.seed)
    found.loc[len(found)] = ("best minus worst", *spread[:4])
    return found.reset_index(drop=True)


def _mean_over_methods(table: pd.DataFrame) -> pd.DataFrame:
    """The table with all methods averaged per image, beside the controls."""
    is_control = table["method"] == "control"
    by = ["source", "target", "fraction", "complement", "image"]
    mean = table[~is_control].groupby(by, observed=True, as_index=False)[["correct", "probability"]].mean()
    return pd.concat([mean.assign(method=ALL), table[is_control]])


def family_table(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """Family advantage at the run's share of patches, by method and over all methods.

    Parameters
    ----------
    run : Run
        The run.
    table : pd.DataFrame
        Recognition of all maps and controls by all targets.

    Returns
    -------
    pd.DataFrame
        Columns of ``transfer.family_advantage`` with ``mean`` for the advantage.
    """
    at_k = table[table["fraction"] == run.settings.fraction].astype(
        {"source": object, "target": object, "method": object}
    )
    families = {name: model.family for name, model in run.models.items()}
    architectures = {name: model.architecture for name, model in run.models.items()}
    joined = pd.concat([at_k, _mean_over_methods(at_k).query("method == @ALL")])
    result = family_advantage(joined, families, architectures, run.settings.seed)
    return result.rename(columns={"advantage": "mean"})


def landscape(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """Place models in the plane so that those who recognize each other's features are close.

    Parameters
    ----------
    run : Run
        The run.
    table : pd.DataFrame
        Recognition of all maps and controls by all targets.

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``family``, ``x``, ``y``: multidimensional scaling of 1 minus the symmetrized mean ρ.
    """
    at_k = table[table["fraction"] == run.settings.fraction]
    rho = relative_transfer(_mean_over_methods(at_k), seed=run.settings.seed)
    names = list(run.models)
    grid = rho.pivot_table(index="source", columns="target", values="rho", observed=True).reindex(
        index=names, columns=names
    )
    distance = np.clip(1 - (grid.to_numpy() + grid.to_numpy().T) / 2, 0, None)
    distance = np.nan_to_num(distance, nan=1.0)
    np.fill_diagonal(distance, 0)
    scaling = MDS(n_components=2, metric="precomputed", n_init=8, init="random", random_state=run.settings.seed)
    place = scaling.fit_transform(distance)
    return pd.DataFrame(
        {"model": names, "family": [run.models[name].family for name in names], "x": place[:, 0], "y": place[:, 1]}
    )


def draw_landscape(places: pd.DataFrame) -> Figure:
    """Draw the landscape of models.

    Parameters
    ----------
    places : pd.DataFrame
        From :func:`landscape`.

    Returns
    -------
    Figure
        The figure.
    """
    figure, ax = plt.subplots(figsize=(4.6, 3.6))
    shown = places.assign(family=places["family"].map(plots.label))
    sns.scatterplot(shown, x="x", y="y", hue="family", style="family", s=70, ax=ax)
    middle = places["x"].mean()
    for rank, row in enumerate(places.sort_values("y").itertuples()):
        side = 1 if row.x > middle else -1
        place, align = (6 * side, 4 if rank % 2 else -10), "left" if side > 0 else "right"
        ax.annotate(plots.label(row.model), (row.x, row.y), place, textcoords="offset points", fontsize=8, ha=align)
    ax.set(title="Models whose features others recognize alike", xlabel="first axis", ylabel="second axis")
    ax.set_aspect("equal", adjustable="datalim")
    ax.margins(0.2)
    return figure


def draw_matrices(cells: pd.DataFrame) -> Figure:
    """Draw one transfer matrix per method.

    Parameters
    ----------
    cells : pd.DataFrame
        Columns ``method``, ``source``, ``target``, ``mean``.

    Returns
    -------
    Figure
        The figure; rows of models that refuse a method stay empty.
    """
    methods = list(dict.fromkeys(cells["method"]))
    pairs = cells[["source", "target"]].drop_duplicates()
    rows = -(-len(methods) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(7.4, 2.9 * rows), sharex=True, sharey=True, squeeze=False)
    for ax, method in zip(axes.flat, methods, strict=False):
        part = pairs.merge(cells[cells["method"] == method], "left", ["source", "target"])
        plots.matrix(ax, part, "source", "target", "mean", plots.label(method))
    for ax in axes.flat[len(methods) :]:
        ax.set_visible(False)
    return figure


def measured_claims(run: Run, table: pd.DataFrame, agreement: pd.DataFrame) -> dict[str, Interval]:
    """What notebook 04 measured for the ledger.

    Parameters
    ----------
    run : Run
        The run.
    table : pd.DataFrame
        Recognition of all maps and controls by all targets.
    agreement : pd.DataFrame
        From :func:`agreement_table`.

    Returns
    -------
    dict[str, Interval]
        Claims ``transfer``, ``inconsistency`` and ``family``.
    """
    seed = run.settings.seed
    at_k = table[table["fraction"] == run.settings.fraction]
    lines = at_k.assign(line=relation(run, at_k).replace({"same family": "other", "other family": "other"}))
    per_image = lines.groupby(["line", "image"], observed=True)["probability"].mean().unstack("line")
    gained = ratio_interval(per_image["other"] - per_image["random"], per_image["own map"] - per_image["random"], seed)
    family = {name: model.family for name, model in run.models.items()}
    ends = agreement["models"].str.split(" ", expand=True).reindex(columns=[0, 1])
    across = ends[1].isna() | (ends[0].map(family) != ends[1].map(family))
    rank = agreement[(agreement["measure"] == "Spearman") & across]
    rank = rank.groupby(["pair", "image"], observed=True)["agreement"].mean().unstack("pair")
    undefined = Interval(np.nan, np.nan, np.nan, 0)
    different = undefined
    if {"second seed", "other architecture"} <= set(rank):
        different = paired_difference(rank["other architecture"], rank["second seed"], seed)
    advantage = family_table(run, table).query("method == @ALL")
    return {
        "transfer": gained,
        "inconsistency": different,
        "family": Interval(*advantage[["mean", "low", "high", "n", "p"]].iloc[0]) if len(advantage) else undefined,
    }


def in_words(folder: Path, fraction: float) -> str:
    """What the curves of a run on other data show, against maps that know no model.

    Parameters
    ----------
    folder : Path
        Figures of that run of notebook 04.
    fraction : float
        Share of patches at which they are read.

    Returns
    -------
    str
        Markdown: accuracies with intervals, who is ahead of whom where intervals do not overlap, the order of methods.
    """
    curves = pd.read_csv(folder / "curves.csv").query("fraction == @fraction")
    floors = pd.read_csv(folder / "transfer_matrix.csv").query("bound == 'whole image'")
    at = curves.drop_duplicates("line").set_index("line")

    def told(name: str, row: Any) -> str:
        return f"{plots.label(name)} {row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"

    def against(a: str, b: str) -> str:
        apart = at.loc[a, "low"] > at.loc[b, "high"], at.loc[a, "high"] < at.loc[b, "low"]
        words = "above" if apart[0] else "below" if apart[1] else "not apart from"
        return f"{plots.label(a)} is {words} {plots.label(b)}"

    methods = curves[curves["panel"].str.startswith("By method") & (curves["line"] != "random")]
    order = methods.sort_values("mean", ascending=False)["line"].map(plots.label)
    shown = [
        name for name in ("own map", "same family", "other family", "center", "edges", "random") if name in at.index
    ]
    pairs = [("own map", "other family"), ("own map", "center"), ("other family", "center"), ("other family", "random")]
    lines = [
        "whole images: " + "; ".join(told(row["target"], row) for _, row in floors.iterrows()),
        f"k = {fraction:.0%}: " + "; ".join(told(name, at.loc[name]) for name in shown),
        "by their intervals: " + "; ".join(against(a, b) for a, b in pairs if {a, b} <= set(at.index)),
        "methods, best first: " + ", ".join(order),
    ]
    return "\n".join(f"- {line}" for line in lines)


def separation(found: pd.DataFrame, gap: pd.DataFrame) -> dict[str, bool]:
    """Whether the data separate own from foreign features, and good from bad methods.

    Parameters
    ----------
    found : pd.DataFrame
        From :func:`areas`.
    gap : pd.DataFrame
        From :func:`own_minus_other`.

    Returns
    -------
    dict[str, bool]
        Condition in words, with what was found, to whether it is met.
    """
    small = gap[gap["fraction"] <= 0.05] if (gap["fraction"] <= 0.05).any() else gap
    counts = small.assign(mean=small["mean"] >= 0.05, low=small["low"] >= 0.05).groupby("fraction")[["mean", "low"]]
    at = counts.sum().sort_values(["mean", "low"]).iloc[-1]
    best, worst, spread = found.iloc[0], found.iloc[-2], found.iloc[-1]
    return {
        f"own features lead another's by ≥ 0.05 for at least 3 methods at some k ≤ {small['fraction'].max():.0%} "
        f"(k = {at.name:.0%}: {at['mean']} methods, {at['low']} of them with the whole interval)": bool(
            at["mean"] >= 3
        ),
        f"best and worst method differ by ≥ 0.05 in area under the transfer curve "
        f"({plots.label(best['method'])} {best['mean']:.3f}, {plots.label(worst['method'])} {worst['mean']:.3f}, "
        f"difference [{spread['low']:.3f}, {spread['high']:.3f}])": bool(spread["mean"] >= 0.05),
    }
