"""Reality checks on the study itself: sanity of single and harmonized maps, the report card, the ledger of claims."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from harmonize_lib import plots, sanity, study
from harmonize_lib.attribution import refusal
from harmonize_lib.claims import CLAIMS, NOT, PARTLY, REPRODUCED, UNTESTABLE
from harmonize_lib.consensus import consensus
from harmonize_lib.data import Dataset, load_dataset
from harmonize_lib.errors import HarmonizeError
from harmonize_lib.models import Model, list_models, load_model, manifest
from harmonize_lib.parameters import CONTROLS
from harmonize_lib.statistics import Interval, bootstrap_interval, holm, paired_difference, summarize
from harmonize_lib.study import Run

HARMONIZED, SINGLE = "harmonized", "single models"
CASCADING, INDEPENDENT, SECOND_SEED, RANDOM_LABELS = "cascading", "independent", "second seed", "random labels"
MEMORIZED = 0.95  # share of the training images with random labels
BLINKERED = 8  # images of the axiom
VERDICT_COLORS = {REPRODUCED: "#9fd8b8", PARTLY: "#fbe3a1", NOT: "#f4b393", UNTESTABLE: "#dddddd"}

Maps = dict[tuple[str, str], Tensor]


# Sanity of maps.


def random_label_models(names: Iterable[str]) -> dict[str, str]:
    """The zoo's models that memorized random labels.

    Parameters
    ----------
    names : Iterable[str]
        E.g. ``["resnet-obj"]``.

    Returns
    -------
    dict[str, str]
        Name to its counterpart, e.g. ``"resnet-random_labels"``, for those that have one.
    """
    there = list_models()
    pairs = {name: f"{name.removesuffix('-obj')}-random_labels" for name in names}
    return {name: other for name, other in pairs.items() if other in there}


def memorized(names: Iterable[str], seed: int, device: str = "auto") -> pd.DataFrame:
    """What the models of random labels know of the images they were trained on, and of new ones.

    Parameters
    ----------
    names : Iterable[str]
        Zoo names such as ``"resnet-random_labels"``.
    seed : int
        Seed of the bootstrap.
    device : str
        Where they run.

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``images`` (training: the random labels; test: the true ones), ``mean``, ``low``, ``high``,
        ``n``.
    """
    rows = []
    for name in names:
        model, count = load_model(name, device=device), manifest()[name]["recipe"]["train_images"]
        for kind, split, labels in (("training", "train", "random_labels"), ("test", "test", "obj")):
            data = load_dataset("shapes-on-scenes", split, count, labels=labels)
            correct = study.predictions(model, data.images) == data.labels
            rows.append((name, kind, *bootstrap_interval(correct.double().numpy(), seed)[:4]))
    return pd.DataFrame(rows, columns=["model", "images", "mean", "low", "high", "n"])


def defined_methods(run: Run) -> dict[str, list[str]]:
    """The methods that run on each model as it was trained.

    Parameters
    ----------
    run : Run
        Gives models and methods.

    Returns
    -------
    dict[str, list[str]]
        Model to methods.
    """
    return {
        name: [method for method in run.settings.methods if refusal(model, method) is None]
        for name, model in run.models.items()
    }


def explained(run: Run, models: Mapping[str, Model], methods: Mapping[str, Sequence[str]]) -> Maps:
    """Maps of the run's models, or of what stands in for them, and of their consensus.

    Parameters
    ----------
    run : Run
        Gives images, options, rule and seed.
    models : Mapping[str, Model]
        Name of one of the run's models to the network that is explained in its place.
    methods : Mapping[str, Sequence[str]]
        Name to methods.

    Returns
    -------
    Maps
        (name, method) to maps (N, H, W), and (``HARMONIZED``, method) to the consensus of all models given, where
        there are at least two. An image that a method cannot explain is NaN.
    """
    settings = run.settings
    maps = {
        (name, method): _maps(model, run.dataset, method, settings.seed, settings.options.get(method, {}))
        for name, model in models.items()
        for method in methods[name]
    }
    for method in dict.fromkeys(method for _, method in maps):
        members = [values for (_, each), values in maps.items() if each == method]
        if len(members) > 1:
            maps[HARMONIZED, method] = pooled(torch.stack(members), settings.rule)
    return maps


def _maps(model: Model, dataset: Dataset, method: str, seed: int, options: Mapping[str, Any]) -> Tensor:
    try:
        return study.attributions(model, dataset, method, seed, **options)["maps"]
    except HarmonizeError:
        if len(dataset) == 1:
            return torch.full((1, *dataset.images.shape[2:]), torch.nan)
    each = [dataset.select(torch.tensor([i])) for i in range(len(dataset))]
    return torch.cat([_maps(model, one, method, seed, options) for one in each])


def pooled(maps: Tensor, rule: str) -> Tensor:
    """Consensus that is undefined where a member is.

    Parameters
    ----------
    maps : Tensor
        (M, N, H, W); NaN where a map is undefined.
    rule : str
        See :func:`harmonize_lib.consensus.consensus`.

    Returns
    -------
    Tensor
        (N, H, W); NaN for an image of which any member's map is undefined.
    """
    known = maps.isfinite().flatten(2).all(2).all(0)[:, None, None]
    return consensus(maps.where(known, 0), rule).where(known, torch.nan)


def compare(
    run: Run, twins: Mapping[str, Model], methods: Mapping[str, Sequence[str]], check: str, stage: int = 0
) -> pd.DataFrame:
    """Similarity of each map before and after the models are replaced.

    Parameters
    ----------
    run : Run
        Gives the models before, images, options, rule and seed.
    twins : Mapping[str, Model]
        Name of one of the run's models to what replaces it; all are replaced together in the consensus.
    methods : Mapping[str, Sequence[str]]
        Name to methods.
    check : str
        What was done to the models.
    stage : int
        Stage of the randomization.

    Returns
    -------
    pd.DataFrame
        Columns ``check``, ``stage``, ``model``, ``method``, ``measure``, ``image``, ``value``; NaN where undefined.
    """
    before = explained(run, {name: run.models[name] for name in twins}, methods)
    after = explained(run, twins, methods)
    fixed = {"check": check, "stage": stage}
    parts = [
        pd.DataFrame(
            fixed
            | {"model": name, "method": method, "measure": measure, "image": run.dataset.ids}
            | {"value": similarity(before[name, method], values).double().numpy()}
        )
        for (name, method), values in after.items()
        for measure, similarity in sanity.SIMILARITIES.items()
    ]
    return pd.concat(parts, ignore_index=True)


def weight_table(run: Run, methods: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Similarity of maps to those of the trained model while weights are randomized, beside a second seed.

    Parameters
    ----------
    run : Run
        Gives models, images, stages and seed.
    methods : Mapping[str, Sequence[str]]
        From :func:`defined_methods`.

    Returns
    -------
    pd.DataFrame
        As :func:`compare` gives it, checks ``CASCADING``, ``INDEPENDENT`` (stages from 1, the logits' layer) and
        ``SECOND_SEED``.

    Raises
    ------
    HarmonizeError
        More stages than a model has layers.
    """
    count, seed = run.settings.stages, run.settings.seed
    least = min(run.models, key=lambda name: len(sanity.layers(run.models[name])))
    if count > (most := len(sanity.layers(run.models[least]))):
        raise HarmonizeError(f"stages={count}: {least[:60]} has {most} layers; take at most that many stages")
    kinds = {CASCADING: sanity.cascading, INDEPENDENT: sanity.independent}
    twins = [
        (kind, stage, dict(zip(run.models, stand_ins, strict=True)))
        for kind, function in kinds.items()
        for stage, stand_ins in enumerate(
            zip(*[function(model, seed, count) for model in run.models.values()], strict=True), start=1
        )
    ]
    jobs = [*twins, (SECOND_SEED, 0, second_seeds(run.models, run.settings.device))]
    parts = [
        compare(run, models, methods, kind, stage)
        for kind, stage, models in tqdm(jobs, desc="randomization", mininterval=1)
        if models
    ]
    return pd.concat(parts, ignore_index=True)


def second_seeds(names: Iterable[str], device: str) -> dict[str, Model]:
    """The zoo's second seeds of these models.

    Parameters
    ----------
    names : Iterable[str]
        Names.
    device : str
        Where they run.

    Returns
    -------
    dict[str, Model]
        Name to its second seed, for those that have one.
    """
    seeds = {name: study.second_seed(name) for name in names}
    return {name: load_model(other, device=device) for name, other in seeds.items() if other is not None}


def label_table(run: Run, methods: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Similarity of maps to those of models that memorized random labels, beside a second seed of the true ones.

    Parameters
    ----------
    run : Run
        Gives models, images and seed.
    methods : Mapping[str, Sequence[str]]
        From :func:`defined_methods`.

    Returns
    -------
    pd.DataFrame
        As :func:`compare` gives it, checks ``RANDOM_LABELS`` and ``SECOND_SEED``, over the models that have both;
        empty where there are none.
    """
    others = random_label_models(run.models)
    device = run.settings.device
    seeds = second_seeds(others, device)
    twins = {RANDOM_LABELS: {name: load_model(others[name], device=device) for name in seeds}, SECOND_SEED: seeds}
    parts = [compare(run, models, methods, check) for check, models in twins.items() if models]
    columns = ["check", "stage", "model", "method", "measure", "image", "value"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def sensitivity(table: pd.DataFrame, check: str, seed: int) -> pd.DataFrame:
    """How much more maps change when learning is destroyed than when it is repeated from another seed.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`weight_table` or :func:`label_table`.
    check : str
        ``CASCADING`` (its last stage: all weights) or ``RANDOM_LABELS``.
    seed : int
        Of bootstrap and sign flips.

    Returns
    -------
    pd.DataFrame
        Columns ``maps`` (``SINGLE``: mean over models; ``HARMONIZED``), ``measure``, ``method``, ``before`` (similarity
        to the second seed), ``after`` (to the destroyed model), ``mean``, ``low``, ``high``, ``n``, ``p`` of before -
        after, paired by image, and ``holm`` over the methods of one measure and kind of maps. Magnitudes have no row
        where they say what values say, because maps have no negative ones: harmonized maps never have.
    """
    both = _paired(table, check)
    rows = []
    for (maps, measure, method), part in both.groupby(["maps", "measure", "method"], sort=False):
        levels = part[["before", "after"]].mean()
        rows.append((maps, measure, method, *levels, *paired_difference(part["before"], part["after"], seed)))
    found = pd.DataFrame(
        rows, columns=["maps", "measure", "method", "before", "after", "mean", "low", "high", "n", "p"]
    )
    again = found.duplicated(["maps", "method", "before", "after"]) & (found["measure"] == "spearman_of_magnitudes")
    found = found[~again].reset_index(drop=True)
    tested = ~found["method"].isin(CONTROLS)
    found["holm"] = found[tested].groupby(["maps", "measure"])["p"].transform(holm)
    return found


def _paired(table: pd.DataFrame, check: str) -> pd.DataFrame:
    """``before`` and ``after`` of every image, means over the models for which both are defined."""
    if not len(table):
        return pd.DataFrame(columns=["maps", "measure", "method", "image", "before", "after"])
    part = table[table["check"] == check]
    part = part[part["stage"] == part["stage"].max()]
    keys = ["model", "measure", "method", "image"]
    seeds = table[table["check"] == SECOND_SEED]
    both = part[[*keys, "value"]].merge(seeds[[*keys, "value"]], on=keys, suffixes=("_after", "_before")).dropna()
    both["maps"] = np.where(both["model"] == HARMONIZED, HARMONIZED, SINGLE)
    both = both.rename(columns={"value_before": "before", "value_after": "after"})
    return both.groupby(["maps", "measure", "method", "image"], sort=False)[["before", "after"]].mean().reset_index()


def sharpening(table: pd.DataFrame, check: str, seed: int, measure: str = "spearman") -> Interval:
    """Sensitivity of harmonized maps minus that of their members.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`weight_table` or :func:`label_table`.
    check : str
        See :func:`sensitivity`.
    seed : int
        Of bootstrap and sign flips.
    measure : str
        A key of ``sanity.SIMILARITIES``.

    Returns
    -------
    Interval
        Paired by image, mean over the methods that can be harmonized; above 0: harmonizing sharpens the check.
    """
    both = _paired(table, check)
    both = both[(both["measure"] == measure) & ~both["method"].isin(CONTROLS)]
    drop = both.assign(drop=both["before"].astype(float) - both["after"].astype(float))
    wide = drop.pivot(index=["method", "image"], columns="maps", values="drop").dropna()
    if not {HARMONIZED, SINGLE} <= set(wide):
        return Interval(np.nan, np.nan, np.nan, 0)
    images = wide.groupby("image").mean()
    return paired_difference(images[HARMONIZED], images[SINGLE], seed)


def least_sensitive(
    found: Sequence[pd.DataFrame], maps: str, controls: Sequence[str] = CONTROLS, measure: str = "spearman"
) -> tuple[str, Interval]:
    """The method that comes off worst.

    Parameters
    ----------
    found : Sequence[pd.DataFrame]
        From :func:`sensitivity`, one table per check.
    maps : str
        ``SINGLE`` or ``HARMONIZED``.
    controls : Sequence[str]
        Methods that do not count.
    measure : str
        A key of ``sanity.SIMILARITIES``.

    Returns
    -------
    tuple[str, Interval]
        The method and its sensitivity, the least over all tables; n = 0 where nothing was measured.
    """
    table = pd.concat(list(found), ignore_index=True)
    table = table[(table["maps"] == maps) & (table["measure"] == measure) & ~table["method"].isin(controls)]
    if not len(table):
        return "", Interval(np.nan, np.nan, np.nan, 0)
    row = table.loc[table["mean"].astype(float).idxmin()]
    mean, low, high = (float(row[name]) for name in ("mean", "low", "high"))
    return row["method"], Interval(mean, low, high, int(row["n"]), row["p"])


def measured(run: Run, weights: pd.DataFrame, labels: pd.DataFrame) -> dict[str, Interval]:
    """What the notebook's claims are judged by.

    Parameters
    ----------
    run : Run
        Gives the seed.
    weights : pd.DataFrame
        From :func:`weight_table`.
    labels : pd.DataFrame
        From :func:`label_table`.

    Returns
    -------
    dict[str, Interval]
        Claim id to interval; n = 0 where there is nothing to measure.
    """
    seed = run.settings.seed
    by_weights, by_labels = sensitivity(weights, CASCADING, seed), sensitivity(labels, RANDOM_LABELS, seed)
    ends = weights[(weights["check"] == CASCADING) & (weights["stage"] == weights["stage"].max())]
    path = ends[(ends["method"] == "integrated_gradients") & (ends["measure"] == "spearman")]
    path = path[path["model"] != HARMONIZED].groupby("image")["value"].mean()
    return {
        "sanity_weights": least_sensitive([by_weights], SINGLE)[1],
        "sanity_labels": least_sensitive([by_labels], SINGLE)[1],
        "sanity_floor": bootstrap_interval(path.to_numpy(float), seed),
        "harmonized_sanity": least_sensitive([by_weights, by_labels], HARMONIZED)[1],
        "harmonized_sharpens": sharpening(weights, CASCADING, seed),
    }


def findings(weights: pd.DataFrame, labels: pd.DataFrame, by_weights: pd.DataFrame, by_labels: pd.DataFrame) -> str:
    """Say what the tables show, beyond the ledger.

    Parameters
    ----------
    weights : pd.DataFrame
        From :func:`weight_table`.
    labels : pd.DataFrame
        From :func:`label_table`.
    by_weights : pd.DataFrame
        From :func:`sensitivity` of the weights.
    by_labels : pd.DataFrame
        From :func:`sensitivity` of the labels.

    Returns
    -------
    str
        Markdown.
    """
    lines = []
    for check, found in (("all weights are randomized", by_weights), ("labels are random", by_labels)):
        for maps in (SINGLE, HARMONIZED):
            for measure in sanity.SIMILARITIES:
                part = found[(found["maps"] == maps) & (found["measure"] == measure) & ~found["method"].isin(CONTROLS)]
                if not len(part):
                    continue
                fails = part[~((part["low"] > 0) & (part["holm"] < 0.05))]
                names = ", ".join(plots.label(name) for name in fails["method"])
                lines.append(
                    f"- When {check}, {len(part) - len(fails)} of {len(part)} methods change more than from seed to "
                    f"seed ({maps}, {plots.label(measure)}; Holm-corrected p < 0.05)"
                    + (f". Not shown for: {names}." if names else ".")
                )
    told = [coverage(table, check) for table, check in ((weights, "weights"), (labels, "labels")) if len(table)]
    undefined = pd.concat([weights, labels]).groupby("method", sort=False)["value"].agg(lambda v: int(v.isna().sum()))
    undefined = undefined[undefined > 0]
    missing = ", ".join(f"{plots.label(name)} {count}" for name, count in undefined.items()) or "none"
    return "\n".join([*told, *lines, f"- Similarities left out because a map was undefined: {missing}."])


def coverage(table: pd.DataFrame, check: str) -> str:
    """Say which networks and how many methods a check covers, and what the consensus pools.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`weight_table` or :func:`label_table`.
    check : str
        What is destroyed.

    Returns
    -------
    str
        A line of Markdown.
    """
    own = table[~table["method"].isin(CONTROLS)]
    single = own[own["model"] != HARMONIZED]
    pooled = set(own.loc[own["model"] == HARMONIZED, "method"])
    sizes = single[single["method"].isin(pooled)].groupby("method")["model"].nunique().value_counts()
    pools = ", ".join(f"{count} methods pool {size} networks" for size, count in sizes.items()) or "none"
    alone = ", ".join(plots.label(name) for name in dict.fromkeys(single["method"]) if name not in pooled) or "none"
    names = ", ".join(plots.label(name) for name in dict.fromkeys(single["model"]))
    return (
        f"- The check of {check} covers {single['method'].nunique()} methods on {names}, each where it is defined, and "
        f"{single['image'].nunique()} images. Harmonized maps: {pools}; on one network only: {alone}."
    )


class Blinkered(nn.Module):
    """A network behind blinkers: the right half of its input is set to 0, whatever it was.

    Parameters
    ----------
    network : nn.Module
        The network.
    size : tuple[int, int]
        Height and width of its input.
    """

    seen: Tensor

    def __init__(self, network: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("seen", left_half(*size).float())
        if isinstance(pool := getattr(network, "global_pool", None), str):
            self.global_pool = pool  # where attention rollout starts

    def forward(self, x: Tensor) -> Tensor:
        """Logits from the left half alone.

        Parameters
        ----------
        x : Tensor
            (N, C, H, W) the network's input.

        Returns
        -------
        Tensor
            (N, K) logits.
        """
        return self.network(x * self.seen)


def left_half(height: int, width: int) -> Tensor:
    """What a blinkered network sees.

    Parameters
    ----------
    height : int
        Pixels.
    width : int
        Pixels.

    Returns
    -------
    Tensor
        (H, W) bool.
    """
    return (torch.arange(width) < width // 2).expand(height, -1)


def blinkered(model: Model, size: tuple[int, int]) -> Model:
    """Make a model ignore the right half of every image.

    Parameters
    ----------
    model : Model
        Left as it is.
    size : tuple[int, int]
        Height and width of the images.

    Returns
    -------
    Model
        A copy whose logits do not depend on the right half; places are read from the same layer.
    """
    network = Blinkered(copy.deepcopy(model.network), model.input_size or size)
    mean, deviation = (tuple(values.flatten().tolist()) for values in (model.mean, model.std))
    name = f"{model.name}-blinkered"
    other = Model(network, name, model.architecture, model.classes, mean, deviation, model.input_size)
    if model.geometry is not None:
        other.geometry = replace(model.geometry, layer=f"network.{model.geometry.layer}")
    return other.to(model.mean.device)


def insensitivity(run: Run, methods: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Axiom: what a network ignores gets nothing. Share of a map's magnitude on the half that its network ignores.

    Parameters
    ----------
    run : Run
        Gives models, the first ``BLINKERED`` images, options and seed.
    methods : Mapping[str, Sequence[str]]
        From :func:`defined_methods`; the controls are added.

    Returns
    -------
    pd.DataFrame
        Columns ``method``, ``mean``, ``low``, ``high``, ``n`` images, mean over the models: 0 keeps the axiom, 0.5 is
        a map that does not know which half it is.

    References
    ----------
    Sundararajan, Taly, Yan 2017 (arXiv 1703.01365), sensitivity (b); in games, the axiom of the dummy.
    """
    settings, dataset = run.settings, run.dataset.select(torch.arange(min(BLINKERED, len(run.dataset))))
    height, width = dataset.images.shape[2:]
    ignored = ~left_half(height, width)
    rows = []
    for name, model in run.models.items():
        other = blinkered(model, (height, width))
        for method in dict.fromkeys([*methods[name], *CONTROLS]):
            sizes = _maps(other, dataset, method, settings.seed, settings.options.get(method, {})).abs()
            share = (sizes * ignored).sum((1, 2)) / sizes.sum((1, 2))
            rows.append(pd.DataFrame({"method": method, "model": name, "image": dataset.ids, "share": share}))
    table = pd.concat(rows, ignore_index=True)
    names = [*settings.methods, *(name for name in CONTROLS if name not in settings.methods)]
    table["method"] = pd.Categorical(table["method"], names)
    return summarize(table, ["method"], "share", settings.seed)


def draw_insensitivity(shares: pd.DataFrame) -> Figure:
    """Share of each map on the half that its network ignores.

    Parameters
    ----------
    shares : pd.DataFrame
        From :func:`insensitivity`.

    Returns
    -------
    Figure
        The figure.
    """
    figure, ax = plt.subplots(figsize=(5.6, 0.2 * len(shares) + 0.9))
    plots.forest(ax, shares, "method", "The network sees the left half alone", "share of magnitude on the right half")
    ax.axvline(0.5, color="0.35", ls="--", lw=1, label="knows no half")
    ax.legend(fontsize=6.5, loc="upper center")
    return figure


def facts(weights: pd.DataFrame, known: pd.DataFrame, shares: pd.DataFrame) -> dict[str, bool]:
    """What must hold for the checks to mean anything.

    Parameters
    ----------
    weights : pd.DataFrame
        From :func:`weight_table`.
    known : pd.DataFrame
        From :func:`memorized`.
    shares : pd.DataFrame
        From :func:`insensitivity`.

    Returns
    -------
    dict[str, bool]
        Condition to whether it is met.
    """
    edges = weights[(weights["method"] == "edges") & (weights["model"] != HARMONIZED)]["value"]
    learned = known.loc[known["images"] == "training", "mean"]
    return {
        "a map that knows no model (edges) stays the same at every stage": bool(len(edges))
        and bool((edges > 0.999).all()),
        f"models of random labels memorized at least {MEMORIZED:.0%} of their training images": bool(len(learned))
        and bool((learned >= MEMORIZED).all()),
        "a gradient (saliency) is 0 where the network does not look": bool(
            (shares.loc[shares["method"] == "saliency", "mean"] == 0).all()
        ),
    }


# Drawing the checks.


def stage_panels(
    run: Run, methods: Mapping[str, Sequence[str]], shown: Sequence[str], image: int
) -> tuple[list[list[tuple[Tensor, str]]], list[str]]:
    """Maps of the first model, and of the consensus, while the weights are randomized.

    Parameters
    ----------
    run : Run
        The run.
    methods : Mapping[str, Sequence[str]]
        From :func:`defined_methods`.
    shown : Sequence[str]
        Methods to show.
    image : int
        Which of the run's images.

    Returns
    -------
    tuple[list[list[tuple[Tensor, str]]], list[str]]
        Rows for ``plots.gallery`` and their labels.
    """
    count, seed = run.settings.stages, run.settings.seed
    chosen = {name: [method for method in shown if method in methods[name]] for name in run.models}
    stand_ins = zip(*[sanity.cascading(model, seed, count) for model in run.models.values()], strict=True)
    steps = {"trained": run.models} | {
        stage_name(stage, count): dict(zip(run.models, models, strict=True))
        for stage, models in enumerate(stand_ins, start=1)
    }
    maps = {name: explained(run, models, chosen) for name, models in steps.items()}
    first = next(iter(run.models))
    rows: list[list[tuple[Tensor, str]]] = []
    labels: list[str] = []
    for method in shown:
        for name in (first, HARMONIZED):
            if (name, method) in maps["trained"] and not (name == HARMONIZED and method in CONTROLS):
                row = [
                    (_centered(each[name, method][image], name), step if not rows else "")
                    for step, each in maps.items()
                ]
                rows.append(row)
                labels.append(f"{plots.label(method)}\n{plots.label(name)}")
    return rows, labels


def _centered(values: Tensor, name: str) -> Tensor:
    return values - values.median() if name == HARMONIZED else values


def stage_name(stage: int, count: int) -> str:
    """A stage of the cascade as a reader should see it.

    Parameters
    ----------
    stage : int
        1 (the logits' layer) to ``count``.
    count : int
        All stages.

    Returns
    -------
    str
        E.g. ``"logits"``, ``"+33 %"``, ``"all"``.
    """
    if stage == count:
        return "all"
    return "logits" if stage == 1 else f"+{100 * (stage - 1) / (count - 1):.0f} %"


def curves(table: pd.DataFrame, kind: str, seed: int, measure: str = "spearman") -> pd.DataFrame:
    """Similarity over the stages of randomization.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`weight_table`.
    kind : str
        ``CASCADING`` or ``INDEPENDENT``.
    seed : int
        Seed of the bootstrap.
    measure : str
        A key of ``sanity.SIMILARITIES``.

    Returns
    -------
    pd.DataFrame
        Columns ``check``, ``method``, ``model``, ``stage``, ``mean``, ``low``, ``high``, ``n``: the kind with its
        stages, and the second seed (mean over single models) as stage 0.
    """
    part = table[table["measure"] == measure]
    names = [*(name for name in dict.fromkeys(part["model"]) if name != HARMONIZED), HARMONIZED, SECOND_SEED]
    part = part.assign(
        method=pd.Categorical(part["method"], list(dict.fromkeys(part["method"]))),
        model=pd.Categorical(part["model"], names),
    )
    keys = ["method", "model", "stage"]
    lines = summarize(part[part["check"] == kind], keys, "value", seed).assign(check=kind)
    seeds = part[(part["check"] == SECOND_SEED) & (part["model"] != HARMONIZED)].assign(model=SECOND_SEED)
    ceiling = summarize(seeds, keys, "value", seed).assign(check=SECOND_SEED)
    return pd.concat([lines, ceiling], ignore_index=True)[["check", *keys, "mean", "low", "high", "n"]]


def draw_curves(lines: pd.DataFrame, count: int, title: str, columns: int = 5) -> Figure:
    """Similarity over the stages, one panel per method.

    Parameters
    ----------
    lines : pd.DataFrame
        From :func:`curves`.
    count : int
        Stages.
    title : str
        What it shows.
    columns : int
        Panels side by side.

    Returns
    -------
    Figure
        The figure.
    """
    kinds = lines[lines["check"] != SECOND_SEED]
    cascades = (kinds["check"] == CASCADING).all()
    methods = list(dict.fromkeys(kinds["method"]))
    height = -(-len(methods) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(7.4, 1.35 * height + 0.8), sharex=True, sharey=True)
    order = [name for name in dict.fromkeys(kinds["model"]) if name != HARMONIZED]
    palette = dict(zip(order, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False)) | {HARMONIZED: "black"}
    for ax, method in zip(axes.flat, methods, strict=False):
        for name, color in palette.items():
            part = kinds[(kinds["method"] == method) & (kinds["model"] == name)].sort_values("stage")
            error = np.abs(part[["low", "high"]].to_numpy().T - part["mean"].to_numpy())
            if len(part):
                start = {"x": [0, *part["stage"]], "y": [1, *part["mean"]]}
                wide = np.hstack([np.zeros((2, 1)), error])
                ax.errorbar(**start, yerr=wide, color=color, lw=1.2, marker=".", ms=4, label=plots.label(name))
        ceiling = lines[(lines["check"] == SECOND_SEED) & (lines["method"] == method)]
        for value in ceiling["mean"]:
            ax.axhline(value, color="0.45", ls=":", lw=1.2, label="second seed (mean of single models)")
        ax.axhline(0, color="0.3", lw=0.6)
        ax.set_title(plots.label(method), fontsize=7, fontweight="normal")
        names = ["none", *(stage_name(i, count) if cascades else str(i) for i in range(1, count + 1))]
        ax.set_xticks(range(count + 1), names, fontsize=6, rotation=45 if cascades else 0)
        ax.tick_params(axis="y", labelsize=6)
    for ax in axes.flat[len(methods) :]:
        ax.set_visible(False)
    found: dict[str, Any] = {}
    for ax in axes.flat:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=5, fontsize=7)
    figure.supylabel("Spearman correlation with the trained model's map", fontsize=7.5)
    figure.suptitle(title, fontsize=9, fontweight="bold", x=0.01, ha="left")
    return figure


def draw_sensitivity(found: pd.DataFrame, title: str) -> Figure:
    """Similarity to the second seed minus similarity to the destroyed model, single and harmonized.

    Parameters
    ----------
    found : pd.DataFrame
        From :func:`sensitivity`.
    title : str
        What it shows.

    Returns
    -------
    Figure
        The figure.
    """
    order = list(dict.fromkeys(found["method"]))
    kinds = [maps for maps in (SINGLE, HARMONIZED) if (found["maps"] == maps).any()]
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(7.4, 0.27 * len(order) + 1.2), sharex=True, sharey=True, squeeze=False
    )
    for ax, maps in zip(axes[0], kinds, strict=True):
        part = found[found["maps"] == maps].assign(method=lambda rows: pd.Categorical(rows["method"], order))
        part = part.sort_values("measure", key=lambda names: names == "spearman_of_magnitudes", kind="stable")
        plots.forest(ax, part, "method", plots.label(maps).capitalize(), "", "measure")
        ax.set_ylim(len(order) - 0.5, -0.5)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=4, fontsize=7)
    figure.supxlabel("similarity to a second seed − similarity to the destroyed model", fontsize=8)
    figure.suptitle(title, fontsize=9, fontweight="bold", x=0.01, ha="left")
    return figure


# The report card.


class Check(NamedTuple):
    """A column of the report card: which table of which notebook holds it, in which rows and columns.

    ``better``: 1 higher; -1 nearer to 0; 0 not ranked.
    """

    title: str
    notebook: str
    table: str
    where: dict[str, object]
    better: int
    method: str = "method"
    value: str = "mean"
    empty: str = ""  # why a method has no value, where that is not that the notebook leaves it out


K = 0.05  # share of patches at which notebooks 04 and 05 are read
THIS = "13_reality_checks"
CHECKS: dict[str, Check] = {
    "completeness": Check(
        "relative\ncompleteness gap", "02_attribution_extraction", "completeness", {}, -1, empty="promises no sum"
    ),
    "ignored": Check("axiom: share on what\nthe network ignores", THIS, "insensitivity", {}, -1),
    **{
        f"{what}{ending}": Check(
            f"{what} destroyed,\nsimilarity {word}",
            THIS,
            f"sensitivity_{what}",
            {"maps": SINGLE, "measure": "spearman"},
            better,
            value=value,
            empty=empty,
        )
        for what, empty in (
            ("weights", "a control that is not randomized here"),
            ("labels", "a control, or not defined for the networks that have a twin of random labels"),
        )
        for ending, word, value, better in (("_left", "left", "after", -1), ("", "lost", "mean", 0))
    },
    **{
        metric: Check(f"BAM\n{metric}", "07_bam", "metrics_original", {"metric": metric, "model": "mean"}, 1)
        for metric in ("MCS", "IDR", "IIR")
    },
    "transfer": Check(
        f"transfer, accuracy\nat {K:.0%} of patches",
        "04_cross_architecture_transfer",
        "curves",
        {"panel": "By method (another's map)", "fraction": K},
        1,
        method="line",
    ),
    "localization": Check(
        "localization,\nrelevance rank",
        "06_feature_detectors",
        "localization",
        {"metric": "relevance_rank", "model": "mean"},
        1,
    ),
    "insertion": Check(
        "insertion\narea", "06_feature_detectors", "faithfulness", {"metric": "insertion", "model": "mean"}, 1
    ),
    "deletion": Check(
        "deletion\narea", "06_feature_detectors", "faithfulness", {"metric": "deletion", "model": "mean"}, -1
    ),
    "cost": Check("cost,\ns per image", "02_attribution_extraction", "cost", {}, -1, value="seconds"),
}
PAIRS = {"transfer": "recognition", "localization": "localization", "deletion": "deletion"}
ALL_METHODS = "all-methods"  # folder of runs with the methods that notebooks leave out by default, for their cost
OWN_TABLES = {"weights": "sensitivity_weights", "labels": "sensitivity_labels"}


def read_table(figures: Path, notebook: str, name: str, needed: Iterable[str]) -> pd.DataFrame | None:
    """A table that a notebook saved.

    Parameters
    ----------
    figures : Path
        The figures folder.
    notebook : str
        Name of the notebook.
    name : str
        Name of the table.
    needed : Iterable[str]
        Columns it must have.

    Returns
    -------
    pd.DataFrame or None
        The table; None where there is none with these columns.
    """
    path = figures / notebook / f"{name}.csv"
    table = pd.read_csv(path) if path.is_file() else pd.DataFrame()
    return table if set(needed) <= set(table) else None


def _rows(table: pd.DataFrame, where: Mapping[str, object]) -> pd.DataFrame:
    for column, value in where.items():
        table = table[np.isclose(table[column], value) if isinstance(value, float) else table[column] == value]
    return table


def report_card(figures: Path, methods: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Method by check, read from the tables that the notebooks saved.

    Parameters
    ----------
    figures : Path
        The figures folder.
    methods : Sequence[str]
        Rows; those in ``CONTROLS`` are not ranked.

    Returns
    -------
    tuple[pd.DataFrame, list[str]]
        Columns ``check``, ``method``, ``value`` (the median over models where a table tells them apart), ``beats``
        (share of the other methods, controls left out, that do worse on this check; ties count half; NaN where the
        check ranks nobody); and one line per check that is missing. A method that a notebook has not measured has no
        row.

    Notes
    -----
    Methods that a notebook leaves out are read from ``ALL_METHODS``, unless its tables differ on those in both.
    """
    parts, missing = [], []
    for name, check in CHECKS.items():
        values, more = (_values(folder, check) for folder in (figures, figures / ALL_METHODS))
        if not len(values):
            missing.append(f"{name}: no table of {check.notebook}; run that notebook first")
            continue
        both = values.index.intersection(more.index)
        if np.allclose(values[both], more[both], equal_nan=True):
            values = pd.concat([values, more.drop(both)])
        else:
            missing.append(f"{name}: {ALL_METHODS}/{check.notebook} is of another state; run that notebook again")
        values = values.reindex(methods).dropna()
        score = values if check.better > 0 else -values.abs()
        ranked = score[~score.index.isin(CONTROLS)].to_numpy()
        beats = [_share_beaten(score[method], ranked, method in CONTROLS) for method in score.index]
        if check.better == 0:
            beats = [np.nan] * len(values)
        parts.append(pd.DataFrame({"check": name, "method": values.index, "value": values.to_numpy(), "beats": beats}))
    empty = pd.DataFrame(columns=["check", "method", "value", "beats"])
    return pd.concat(parts, ignore_index=True) if parts else empty, missing


def _values(figures: Path, check: Check) -> pd.Series:
    """What every method that a notebook measured has on a check, the median over models; empty without a table."""
    table = read_table(figures, check.notebook, check.table, [check.method, check.value, *check.where])
    if table is None:
        return pd.Series(dtype=float)
    return _rows(table, check.where).groupby(check.method)[check.value].median()


def empty_cells(card: pd.DataFrame, methods: Sequence[str]) -> list[str]:
    """Say why methods have no value on a check.

    Parameters
    ----------
    card : pd.DataFrame
        From :func:`report_card`.
    methods : Sequence[str]
        Rows of the card.

    Returns
    -------
    list[str]
        One line per reason, for the checks whose table is there.
    """
    reasons: dict[str, list[str]] = {}
    for name, part in card.groupby("check", sort=False):
        check = CHECKS[name]
        without = ", ".join(plots.label(method) for method in methods if method not in set(part["method"]))
        reason = check.empty or f"not among the methods of notebook {check.notebook[:2]}"
        if without:
            reasons.setdefault(f"{reason}: {without}", []).append(check.title.replace("\n", " "))
    return [f"{'; '.join(titles)} · {reason}" for reason, titles in reasons.items()]


def _share_beaten(value: float, ranked: np.ndarray, outside: bool) -> float:
    others = len(ranked) - (not outside)
    ties = (ranked == value).sum() - (not outside)
    return float(((ranked < value).sum() + ties / 2) / others) if others else np.nan


def harmonized_card(figures: Path, rule: str, sharper: Mapping[str, Interval]) -> tuple[pd.DataFrame, list[str]]:
    """Single maps and harmonized maps on the checks that notebooks ran on both, mean over their methods.

    Parameters
    ----------
    figures : Path
        The figures folder.
    rule : str
        The rule of consensus.
    sharper : Mapping[str, Interval]
        ``"weights"`` and ``"labels"`` to what :func:`sharpening` found.

    Returns
    -------
    tuple[pd.DataFrame, list[str]]
        Columns ``check``, ``method`` (``SINGLE`` or ``HARMONIZED``), ``value``, ``beats`` (1: better than the other,
        the 95 % interval leaves 0 out; 0: worse; 0.5: undecided; NaN: not compared), and one line per table that is
        missing.
    """
    rows: list[tuple[str, float, float, float]] = []  # check, single, harmonized, verdict
    missing = []
    for name, table in OWN_TABLES.items():
        found = read_table(figures, THIS, table, ["maps", "measure", "method", "after", "mean"])
        if found is not None and sharper[name].n:
            for check, column, side in ((f"{name}_left", "after", np.nan), (name, "mean", _side(*sharper[name][1:3]))):
                levels = _rows(found, {"measure": "spearman"}).pivot(index="method", columns="maps", values=column)
                levels = levels[~levels.index.isin(CONTROLS)].dropna()
                rows.append((check, levels[SINGLE].mean(), levels[HARMONIZED].mean(), side))
        else:
            missing.append(f"{name}: no harmonized maps in {THIS}/{table}")
    needed = ["metric", "variant", "rule", "consensus", "members", "low", "high"]
    bam = read_table(figures, "07_bam", "harmonized_by_rule", needed)
    for metric in ("MCS", "IDR", "IIR"):
        found = None if bam is None else _rows(bam, {"metric": metric, "variant": "original", "rule": rule})
        if found is not None and len(found):
            row = found.iloc[0]
            rows.append((metric, row["members"], row["consensus"], _side(row["low"], row["high"])))
        else:
            missing.append(f"{metric}: no harmonized maps in 07_bam; run that notebook first")
    levels = read_table(figures, "05_harmonisation", "rules", ["rule", "level", "outcome"])
    against = read_table(figures, "05_harmonisation", "by_rule", ["outcome", "against", "rule", "mean", "low", "high"])
    for name, outcome in PAIRS.items():
        where = {"outcome": outcome, "rule": rule}
        level = pd.DataFrame() if levels is None else _rows(levels, where)
        gain = pd.DataFrame() if against is None else _rows(against, where | {"against": "vs. random single other"})
        if len(level) and len(gain):
            value, more = level.iloc[0]["level"], gain.iloc[0]
            pair = (value - more["mean"], value) if name != "deletion" else (1 - value + more["mean"], 1 - value)
            rows.append((name, *pair, _side(more["low"], more["high"])))
        else:
            missing.append(f"{name}: no harmonized maps in 05_harmonisation; run that notebook first")
    card = [
        row
        for check, single, together, side in rows
        for row in ((check, SINGLE, single, 1 - side), (check, HARMONIZED, together, side))
    ]
    return pd.DataFrame(card, columns=["check", "method", "value", "beats"]), missing


def _side(low: float, high: float) -> float:
    return 1.0 if low > 0 else 0.0 if high < 0 else 0.5


def draw_card(card: pd.DataFrame, pair: pd.DataFrame, methods: Sequence[str]) -> Figure:
    """Method by check, and single by harmonized maps below, on one grid.

    Parameters
    ----------
    card : pd.DataFrame
        From :func:`report_card`.
    pair : pd.DataFrame
        From :func:`harmonized_card`.
    methods : Sequence[str]
        Rows.

    Returns
    -------
    Figure
        The figure.
    """
    heights = [len(methods), 2]
    figure, axes = plt.subplots(
        2, 1, figsize=(7.6, 0.29 * sum(heights) + 1.9), height_ratios=heights, layout="constrained"
    )
    colors = plt.get_cmap("YlGnBu")
    for ax, table, rows in ((axes[0], card, list(methods)), (axes[1], pair, [SINGLE, HARMONIZED])):
        places = {(row, column): (y, x) for y, row in enumerate(rows) for x, column in enumerate(CHECKS)}
        for y, x in places.values():
            ax.add_patch(plt.Rectangle((x, y), 1, 1, facecolor="0.9", edgecolor="white"))
        for line in table.itertuples():
            y, x = places[line.method, line.check]
            color = "white" if np.isnan(line.beats) else colors(0.75 * line.beats)
            ax.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white"))
            dark = "white" if line.beats > 0.75 else "black"
            ax.text(x + 0.5, y + 0.5, _short(line.value), ha="center", va="center", fontsize=7, color=dark)
        ax.set(xlim=(0, len(CHECKS)), ylim=(len(rows), 0))
        ax.set_yticks(np.arange(len(rows)) + 0.5, [plots.label(row) for row in rows], fontsize=7.5)
        ax.grid(visible=False)
        ax.tick_params(length=0)
        for side in ax.spines.values():
            side.set_visible(False)
    arrows = [f"{check.title} {('', '↑', '↓')[check.better]}".rstrip() for check in CHECKS.values()]
    axes[0].xaxis.tick_top()
    axes[0].set_xticks(
        np.arange(len(CHECKS)) + 0.5, arrows, fontsize=6.5, rotation=50, ha="left", rotation_mode="anchor"
    )
    axes[1].set_xticks([])
    axes[1].set_title("mean over methods; darker: better with a 95 % interval", fontsize=7, fontweight="normal")
    figure.suptitle(
        "Report card (↑ higher, ↓ nearer to 0 is better; darker: beats more methods; white: not ranked)",
        fontsize=9,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    return figure


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.095 or value == 0 else f"{value:.1g}".replace("0.", ".", 1)


# The ledger.


def draw_ledger(ledger: pd.DataFrame, columns: int = 6) -> Figure:
    """The claims of all notebooks as tiles by source: what was measured, colored by verdict.

    Parameters
    ----------
    ledger : pd.DataFrame
        From :func:`harmonize_lib.claims.gather_claims`.
    columns : int
        Tiles side by side.

    Returns
    -------
    Figure
        The figure.
    """
    sources = list(dict.fromkeys(ledger["source"]))
    counts = ledger["source"].value_counts()
    height = sum(0.45 + -(-counts[source] // columns) for source in sources)
    figure, ax = plt.subplots(figsize=(7.4, 0.62 * height + 0.6))
    y = 0.0
    for source in sources:
        part = ledger[ledger["source"] == source]
        ax.text(0, y + 0.3, source, fontsize=8, fontweight="bold", va="center")
        y += 0.45
        for i, claim in enumerate(part.itertuples()):
            x, top = i % columns, y + i // columns
            color = VERDICT_COLORS[claim.verdict]
            ax.add_patch(plt.Rectangle((x, top), 0.97, 0.94, facecolor=color, edgecolor="none"))
            name = "\n".join(textwrap.wrap(CLAIMS[claim.id].title, 19))
            ax.text(x + 0.485, top + 0.36, name, ha="center", va="center", fontsize=6.5)
            numbers = [float(value) for value in (claim.estimate, claim.low, claim.high)]
            said = "not measured" if np.isnan(numbers[0]) else "{:.2f} [{:.2f}, {:.2f}]".format(*numbers)
            said = f"{numbers[0]:.2f}, counted" if numbers[1] == numbers[2] else said
            ax.text(x + 0.485, top + 0.8, said, ha="center", va="center", fontsize=6)
        y += -(-len(part) // columns)
    ax.set(xlim=(0, columns), ylim=(y, 0))
    ax.axis("off")
    patches = [plt.Rectangle((0, 0), 1, 1, facecolor=color) for color in VERDICT_COLORS.values()]
    counted = [f"{verdict} ({(ledger['verdict'] == verdict).sum()})" for verdict in VERDICT_COLORS]
    figure.legend(patches, counted, loc="outside lower center", ncols=4, fontsize=7)
    figure.suptitle(
        "The claims and their verdicts (estimate, 95 % interval)",
        fontsize=9,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    return figure
