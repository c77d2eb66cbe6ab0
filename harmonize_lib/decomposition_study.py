"""What notebook 10 measures: promises of the decomposition, planted interactions, hierarchies and their stability."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from harmonize_lib import plots
from harmonize_lib.agreement import spearman
from harmonize_lib.attribution import explain
from harmonize_lib.data import Dataset
from harmonize_lib.decomposition import contextual_decomposition
from harmonize_lib.hierarchy import SCORES, draw_hierarchies, hierarchies
from harmonize_lib.interactions import KINDS, features, inputs, interactions, planted
from harmonize_lib.literal_decomposition import decompose
from harmonize_lib.models import Model
from harmonize_lib.penalty_study import network
from harmonize_lib.statistics import Interval, bootstrap_interval, paired_difference, summarize
from harmonize_lib.study import Run, predictions

NAMES = {"cd": "contextual decomposition", "occlusion": "occlusion", "build_up": "build-up"}
PROMISES = ("β + γ − logits", "whole image: γ by the rules", "empty group: β")
ROUNDING = "β: single − double"
TOLERANCE = 1e-4  # of the largest logit
COST = 1.3  # of two forward passes per group
REPORTED = {"FGSM": (0.590, 0.131)}  # ACD and agglomerative occlusion, 100 images
PERTURBATIONS = ("FGSM", "random signs", "Gaussian", "shift")


def promises(models: Mapping[str, Model], dataset: Dataset, seed: int) -> pd.DataFrame:
    """How far the decomposition is from what it promises, image by image, in double precision.

    γ is carried apart from β by its own rules, without the exception for whole images, so that nothing holds by
    construction: the decomposition itself takes what the logits leave beside β, and 0 for a whole image.

    Parameters
    ----------
    models : Mapping[str, Model]
        Models by name.
    dataset : Dataset
        N images.
    seed : int
        Seed of the groups: one rectangle per image, a quarter to a half of the image on either side.

    Returns
    -------
    pd.DataFrame
        ``model``, ``image``, ``promise`` (one of ``PROMISES``, or ``ROUNDING``: what single precision does to β),
        ``gap`` (largest over classes, as a share of the image's largest logit).
    """
    rng = np.random.default_rng(seed)
    n, (height, width) = len(dataset), dataset.images.shape[2:]
    groups = torch.zeros(n, height, width, dtype=torch.bool)
    for group in groups:
        tall, wide = rng.integers(height // 4, height // 2), rng.integers(width // 4, width // 2)
        top, left = rng.integers(height - tall), rng.integers(width - wide)
        group[top : top + tall, left : left + wide] = True
    parts = []
    for name, model in tqdm(models.items(), desc="promises", mininterval=1):
        exact = copy.deepcopy(model).double()
        x = exact.preprocess(dataset.images)
        own = groups.to(x.device)
        with torch.no_grad():
            logits = exact(x)
            beta, _ = contextual_decomposition(exact, dataset.images, groups)
            _, gamma = decompose(exact, x, own)
            _, nothing = decompose(exact, x, torch.ones_like(own))
            empty, _ = contextual_decomposition(exact, dataset.images, torch.zeros_like(groups))
            single, _ = contextual_decomposition(model, dataset.images, groups)
        gaps = (beta + gamma - logits, nothing, empty, single - beta)
        for promise, gap in zip((*PROMISES, ROUNDING), gaps, strict=True):
            share = (gap.abs().amax(1) / logits.abs().amax(1)).cpu().numpy()
            parts.append(pd.DataFrame({"model": name, "image": dataset.ids, "promise": promise, "gap": share}))
    return pd.concat(parts, ignore_index=True)


def cost(models: Mapping[str, Model], dataset: Dataset, repeats: int, seed: int) -> pd.DataFrame:
    """Processor time of a map by contextual decomposition over that of two forward passes per group.

    Parameters
    ----------
    models : Mapping[str, Model]
        Models by name.
    dataset : Dataset
        Images; each repeat takes another.
    repeats : int
        Pairs of measurements, one after the other.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    pd.DataFrame
        ``model``, ``mean``, ``low``, ``high`` of the ratio, ``n`` repeats.
    """
    rows = []
    for name, model in tqdm(models.items(), desc="cost", mininterval=1):
        ratios = []
        for i in range(repeats + 1):
            image, label = dataset.images[i % len(dataset)][None], dataset.labels[i % len(dataset)][None]
            begin = time.process_time()
            groups = explain(model, image, label, "contextual_decomposition").record["steps"]
            middle = time.process_time()
            with torch.no_grad():
                x = model.preprocess(image).expand(groups, -1, -1, -1)
                for _ in range(2):
                    model(x)
            ratios.append((middle - begin) / (time.process_time() - middle))
        rows.append((name, *bootstrap_interval(ratios[1:], seed)[:4]))
    return pd.DataFrame(rows, columns=["model", "mean", "low", "high", "n"])


def draw_promises(gaps: pd.DataFrame, costs: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Worst gaps and the cost, by model.

    Parameters
    ----------
    gaps : pd.DataFrame
        From :func:`promises`.
    costs : pd.DataFrame
        From :func:`cost`.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure and its numbers.
    """
    worst = gaps.groupby(["promise", "model"], sort=False)["gap"].agg(["max", "size"]).reset_index()
    worst.columns = ["promise", "model", "worst", "n"]
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.6), width_ratios=(1.5, 1))
    words = worst.assign(text=worst["worst"].map(lambda value: f"{value:.0e}" if value else "0"))
    words["shown"] = np.log10(words["worst"].clip(lower=1e-9))
    title = "Largest gap, as a share of the logits"
    plots.tiles(axes[0], words, "promise", "model", "shown", title, "text", cmap="viridis_r")
    plots.forest(axes[1], costs, "model", "Cost of a map", "time / two forward passes per group")
    axes[1].axvline(COST, color="0.35", ls="--", lw=1)
    axes[1].set_xlim(left=0)
    return figure, pd.concat([worst, costs.assign(promise="cost")])


def recovery(count: int, n: int, seed: int) -> pd.DataFrame:
    """How well interaction scores tell planted pairs of features from others.

    Parameters
    ----------
    count : int
        Networks of each kind.
    n : int
        Inputs of each network.
    seed : int
        Seed of networks and inputs.

    Returns
    -------
    pd.DataFrame
        ``kind``, ``network``, ``score``, ``fit`` (R² of the network), ``auc`` (of the pairs' mean magnitude over
        inputs), ``auc_image`` (mean over inputs of the AUC of one input's magnitudes).
    """
    rows = []
    x = inputs(n, torch.Generator().manual_seed(seed))
    targets = torch.zeros(n, dtype=torch.int64)
    for kind in tqdm(KINDS, desc="planted interactions", mininterval=1):
        for i, known in enumerate(planted(kind, count, seed)):
            for score in SCORES:
                values, pairs = interactions(known.network, x, targets, features(), score)
                truth = (pairs[:, None] == known.pairs).all(2).any(1).numpy()
                sizes = values.abs().numpy()
                each = np.mean([roc_auc_score(truth, row) for row in sizes])
                rows.append((kind, f"{kind} {i}", score, known.fit, roc_auc_score(truth, sizes.mean(0)), each))
    return pd.DataFrame(rows, columns=["kind", "network", "score", "fit", "auc", "auc_image"])


def summarize_recovery(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Mean AUCs with intervals over networks, by kind and over all kinds.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`recovery`.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    pd.DataFrame
        ``measure``, ``kind``, ``score``, ``mean``, ``low``, ``high``, ``n`` networks.
    """
    both = pd.concat([table, table.assign(kind="all kinds")])
    measures = {"auc": "pairs of a network", "auc_image": "pairs in one input"}
    parts = []
    for column, measure in measures.items():
        part = both.assign(kind=pd.Categorical(both["kind"], [*KINDS, "all kinds"]))
        part = summarize(part, ["kind", "score"], column, seed, "network")
        parts.append(part.assign(measure=measure, score=pd.Categorical(part["score"], SCORES)))
    return pd.concat(parts).sort_values(["measure", "kind", "score"])


def draw_recovery(summary: pd.DataFrame) -> Figure:
    """AUCs by kind of network.

    Parameters
    ----------
    summary : pd.DataFrame
        From :func:`summarize_recovery`.

    Returns
    -------
    Figure
        The figure.
    """
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 3.6), sharey=True)
    shown = summary.assign(score=summary["score"].astype(str).map(NAMES))
    for ax, measure in zip(axes, ("pairs of a network", "pairs in one input"), strict=True):
        part = shown[shown["measure"] == measure]
        plots.forest(ax, part, "kind", f"AUC: {measure}", "AUC, chance is 0.5", "score")
        ax.axvline(0.5, color="0.35", ls=":", lw=1)
        ax.set_xlim(0.3, 1.03)
    axes[0].axvline(0.95, color="0.35", ls="--", lw=1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
    return figure


def digits_network(seed: int, epochs: int = 30) -> tuple[nn.Module, Tensor, Tensor]:
    """A small convolutional network trained on scikit-learn's digits.

    Parameters
    ----------
    seed : int
        Seed of the split, the weights and the batches.
    epochs : int
        Passes over the 1,297 training images.

    Returns
    -------
    tuple[nn.Module, Tensor, Tensor]
        The network, frozen and in eval mode; 500 test images (500, 1, 8, 8) float in [0, 1], black is 0; labels.
    """
    data = load_digits()
    images, labels = torch.from_numpy(data.images).float()[:, None] / 16, torch.from_numpy(data.target).long()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[:-500], order[-500:]
    model = network(1, 8, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train), generator=generator)].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False), images[test], labels[test]


def perturbed(model: nn.Module, images: Tensor, labels: Tensor, strength: float, seed: int) -> dict[str, Tensor]:
    """Images changed in ways that should not change what explains a class.

    Parameters
    ----------
    model : nn.Module
        In eval mode.
    images : Tensor
        (N, 1, H, W) float in [0, 1].
    labels : Tensor
        (N) int64, whose loss FGSM raises.
    strength : float
        Largest change of a pixel (FGSM, random signs), standard deviation (Gaussian).
    seed : int
        Seed of the noise.

    Returns
    -------
    dict[str, Tensor]
        By perturbation, like the images; ``"shift"`` is by one pixel to the right.

    References
    ----------
    Goodfellow, Shlens, Szegedy 2015 (arXiv 1412.6572), section 4 (FGSM).
    """
    generator = torch.Generator().manual_seed(seed)
    x = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x)
    signs = torch.randint(2, images.shape, generator=generator) * 2.0 - 1
    noise = torch.randn(images.shape, generator=generator)
    steps = {"FGSM": slope.sign(), "random signs": signs, "Gaussian": noise}
    moved = {name: (images + strength * step).clamp(0, 1) for name, step in steps.items()}
    return moved | {"shift": F.pad(images, (1, 0))[..., :-1]}


def stability(
    model: nn.Module, images: Tensor, labels: Tensor, strength: float, percentile: float, seed: int
) -> pd.DataFrame:
    """Rank correlation of the order in which pixels enter a hierarchy, before and after a perturbation.

    The class explained stays the one predicted before. Growth goes on until every pixel is in. Under the shift,
    pixels are compared with where they came from.

    Parameters
    ----------
    model : nn.Module
        In eval mode.
    images : Tensor
        (N, 1, H, W) float in [0, 1].
    labels : Tensor
        (N) int64.
    strength : float
        See :func:`perturbed`.
    percentile : float
        See :func:`harmonize_lib.hierarchy.hierarchies`.
    seed : int
        Seed of the noise.

    Returns
    -------
    pd.DataFrame
        ``image``, ``perturbation``, ``score`` (``cd`` is ACD, ``occlusion`` agglomerative occlusion),
        ``correlation`` (Spearman), ``kept`` (the prediction stayed).
    """
    with torch.no_grad():
        targets = model(images).argmax(1)
    versions = {"": images} | perturbed(model, images, labels, strength, seed)
    with torch.no_grad():
        kept = {name: (model(x).argmax(1) == targets).numpy() for name, x in versions.items()}
    parts = []
    rounds = images[0, 0].numel()
    for score in tqdm(("cd", "occlusion"), desc="stability", mininterval=1):
        everything = torch.cat(list(versions.values()))
        trees = hierarchies(model, everything, targets.repeat(len(versions)), score, 1, percentile, rounds)
        order = torch.from_numpy(np.stack([-tree.entered for tree in trees])).float().split(len(images))
        for name, after in list(zip(versions, order, strict=True))[1:]:
            before = order[0]
            if name == "shift":
                before, after = before[..., :-1], after[..., 1:]
            values = spearman(before, after).numpy()
            parts.append(
                pd.DataFrame(
                    {
                        "image": range(len(images)),
                        "perturbation": name,
                        "score": score,
                        "correlation": values,
                        "kept": kept[name],
                    }
                )
            )
    return pd.concat(parts, ignore_index=True)


def draw_stability(table: pd.DataFrame, seed: int) -> tuple[Figure, pd.DataFrame]:
    """Rank correlations by perturbation, beside the reported ones, and their paired differences.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`stability`.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure and its numbers.
    """
    names = {"cd": "ACD", "occlusion": "agglomerative occlusion"}
    order = pd.CategoricalDtype(list(PERTURBATIONS), ordered=True)
    shown = table.assign(perturbation=table["perturbation"].astype(order), score=table["score"].map(names))
    means = summarize(shown, ["perturbation", "score"], "correlation", seed)
    rows = [(name, *stability_difference(table, name, seed)[:4]) for name in PERTURBATIONS]
    difference = pd.DataFrame(rows, columns=["perturbation", "mean", "low", "high", "n"])
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.7), sharey=True)
    plots.forest(axes[0], means, "perturbation", "Stability of the order of pixels", "Spearman", "score")
    for name, values in REPORTED.items():
        for value, color in zip(values, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False):
            axes[0].plot(value, PERTURBATIONS.index(name), "x", color=color, ms=6)
    axes[0].plot([], [], "x", color="0.3", ms=6, label="reported (VGG-16, ImageNet)")
    plots.forest(axes[1], difference, "perturbation", "ACD minus agglomerative occlusion", "difference of Spearman")
    axes[1].locator_params(axis="x", nbins=5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
    return figure, pd.concat([means, difference.assign(score="difference")])


def stability_difference(table: pd.DataFrame, perturbation: str, seed: int) -> Interval:
    """ACD minus agglomerative occlusion, image by image.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`stability`.
    perturbation : str
        One of ``PERTURBATIONS``.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    Interval
        Of the difference of rank correlations.
    """
    wide = table[table["perturbation"] == perturbation].pivot(index="image", columns="score", values="correlation")
    return paired_difference(wide["cd"], wide["occlusion"], seed)


def most_often_wrong(run: Run) -> str:
    """The rule that chooses a model for right and wrong predictions: the CNN that errs most on the run's images.

    Parameters
    ----------
    run : Run
        The run.

    Returns
    -------
    str
        Its name; of equals, the first.
    """
    cnns = [name for name, model in run.models.items() if model.family == "cnn"] or list(run.models)
    errors = {
        name: int((predictions(run.models[name], run.dataset.images) != run.dataset.labels).sum()) for name in cnns
    }
    return max(cnns, key=lambda name: errors[name])


def draw_scenes(run: Run, name: str, n: int, patch: int, percentile: float, rounds: int) -> tuple[Figure, pd.DataFrame]:
    """Trees of the first right and the first wrong predictions; the wrong ones for the predicted and the true class.

    Parameters
    ----------
    run : Run
        The run.
    name : str
        The model.
    n : int
        Right, and wrong, predictions.
    patch : int
        Side of a unit in pixels.
    percentile : float
        See :func:`harmonize_lib.hierarchy.hierarchies`.
    rounds : int
        See there.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure and the trees as a table.
    """
    model, dataset = run.models[name], run.dataset
    index, targets, titles = _chosen(predictions(model, dataset.images), dataset.labels, dataset.classes, n)
    return _draw(model, dataset.images[index], dataset.images[index], targets, titles, patch, percentile, rounds)


def draw_digits(
    model: nn.Module, images: Tensor, labels: Tensor, n: int, percentile: float, rounds: int
) -> tuple[Figure, pd.DataFrame]:
    """Trees of the first right and the first wrong digits; the wrong ones for the predicted and the true class.

    Parameters
    ----------
    model : nn.Module
        From :func:`digits_network`.
    images : Tensor
        (N, 1, 8, 8) float in [0, 1].
    labels : Tensor
        (N) int64.
    n : int
        Right, and wrong, predictions.
    percentile : float
        See :func:`harmonize_lib.hierarchy.hierarchies`.
    rounds : int
        See there.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure and the trees as a table.
    """
    with torch.no_grad():
        predicted = model(images).argmax(1)
    index, targets, titles = _chosen(predicted, labels, [str(digit) for digit in range(10)], n)
    ink = (255 - images[index] * 255).byte()
    return _draw(model, images[index], ink, targets, titles, 1, percentile, rounds)


def _chosen(predicted: Tensor, labels: Tensor, classes: Sequence[str], n: int) -> tuple[Tensor, Tensor, list[str]]:
    """Images, classes explained and titles: right predictions, then wrong ones for the class predicted and the true."""
    said, true = predicted.tolist(), labels.tolist()
    right = predicted == labels
    chosen = [(i, said[i], f"right: {classes[said[i]]}") for i in right.nonzero()[:n, 0].tolist()]
    for i in (~right).nonzero()[:n, 0].tolist():
        head = f"wrong: {classes[said[i]]}, is {classes[true[i]]}"
        chosen += [(i, said[i], head), (i, true[i], head)]
    index, targets = (torch.tensor([row[place] for row in chosen]) for place in (0, 1))
    return index, targets, [f"{head}\nexplained: {classes[target]}" for _, target, head in chosen]


def _draw(
    model: nn.Module,
    images: Tensor,
    shown: Tensor,
    targets: Tensor,
    titles: Sequence[str],
    patch: int,
    percentile: float,
    rounds: int,
) -> tuple[Figure, pd.DataFrame]:
    trees = hierarchies(model, images, targets, "cd", patch, percentile, rounds)
    tables = [tree.table().assign(tree=title) for tree, title in zip(trees, titles, strict=True)]
    return draw_hierarchies(trees, shown, titles), pd.concat(tables, ignore_index=True)


def measured_claims(recovered: pd.DataFrame, stable: pd.DataFrame, seed: int) -> dict[str, Interval]:
    """What the ledger judges.

    Parameters
    ----------
    recovered : pd.DataFrame
        From :func:`recovery`.
    stable : pd.DataFrame
        From :func:`stability`.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    dict[str, Interval]
        By claim.
    """
    wide = recovered.pivot(index=["kind", "network"], columns="score", values="auc_image")
    kinds = wide.groupby("kind")[["occlusion", "build_up"]].mean().idxmax(axis=1)
    best = [row[kinds[kind]] for (kind, _), row in wide.iterrows()]
    return {
        "cd_interactions": bootstrap_interval(recovered.loc[recovered["score"] == "cd", "auc"].to_numpy(), seed),
        "cd_over_baselines": paired_difference(wide["cd"], best, seed),
        "acd_stability": stability_difference(stable, "FGSM", seed),
    }


def cost_in_words(costs: pd.DataFrame) -> str:
    """Say which models stay within the cost that was asked for.

    Parameters
    ----------
    costs : pd.DataFrame
        From :func:`cost`.

    Returns
    -------
    str
        Models below, above, and those whose interval holds ``COST``: undecided.
    """
    kinds = {
        "below": costs["high"] < COST,
        "above": costs["low"] > COST,
        "undecided (the interval holds it)": (costs["low"] <= COST) & (costs["high"] >= COST),
    }
    said = (f"{kind}: {', '.join(costs.loc[rows, 'model']) or 'no model'}" for kind, rows in kinds.items())
    return f"mean cost against {COST:g} of two forward passes per group: {'; '.join(said)}"


def kept_promises(gaps: pd.DataFrame) -> dict[str, bool]:
    """Facts asked of the decomposition beforehand.

    Parameters
    ----------
    gaps : pd.DataFrame
        From :func:`promises`.

    Returns
    -------
    dict[str, bool]
        Fact to whether it holds for every model.
    """
    worst: Any = gaps.groupby(["promise", "model"], sort=False)["gap"].max()
    facts = {}
    for promise in PROMISES:
        broken = worst[promise][worst[promise] > TOLERANCE].index
        but = f", but for {', '.join(broken)}" if len(broken) else ""
        facts[f"{promise} within {TOLERANCE:g} of the logits{but}"] = not but
    return facts
