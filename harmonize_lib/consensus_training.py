"""Harmonization by training: fine-tuning a network towards the consensus of other architectures' attributions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import avg_pool2d
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.std import tqdm

from harmonize_lib import plots
from harmonize_lib.agreement import spearman, topk_iou
from harmonize_lib.consensus import consensus
from harmonize_lib.data import Dataset, load_dataset
from harmonize_lib.errors import HarmonizeError
from harmonize_lib.localization import pointing_game, relevance_rank
from harmonize_lib.models import Model, shuffled
from harmonize_lib.priors import consensus_prior, expected_gradients_penalty
from harmonize_lib.statistics import Interval, paired_difference, t_interval
from harmonize_lib.storage import remember, sha256_tensors
from harmonize_lib.study import Run, attributions, predictions

VERSION = 2
PATCH = 4  # side in pixels of the squares the prior compares
BATCH_SIZE = 50
LEARNING_RATE = 5e-4
TOLERANCE = 0.01
VALIDATION_IMAGES = 500
ARMS = ("consensus of others", "random models' maps", "no prior")
OURS, CONTROL, PLAIN = ARMS
OBJECTIVE = "correlation with the consensus"
AGREEMENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"Spearman": spearman, "top 10 % IoU": topk_iou}
LOCALIZATION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relevance rank": relevance_rank,
    "pointing game": pointing_game,
}


class Plan(NamedTuple):
    """Who is fine-tuned, who is never looked at but judges, and whose maps are pooled."""

    target: Model
    judge: Model
    pool: tuple[Model, ...]


def plan(models: Mapping[str, Model], targets: Sequence[str], judges: Sequence[str]) -> list[Plan]:
    """Leave the target's own architecture and the judge's out of the pool.

    Parameters
    ----------
    models : Mapping[str, Model]
        All models, by name.
    targets : Sequence[str]
        Names of those to fine-tune.
    judges : Sequence[str]
        For each target, the name of the model whose maps measure agreement.

    Returns
    -------
    list[Plan]
        One per target.

    Raises
    ------
    HarmonizeError
        A name that is not there, another number of judges, a judge of the target's architecture, an empty pool.
    """
    if len(targets) != len(judges):
        raise HarmonizeError(f"{len(targets)} fine-tuned models and {len(judges)} judges: give each a judge of its own")
    plans = []
    for target, judge in zip(targets, judges, strict=True):
        for name in (target, judge):
            if name not in models:
                raise HarmonizeError(f"{name!r} is not among the models: choose from {', '.join(models)}"[:200])
        own, other = models[target], models[judge]
        pool = tuple(m for m in models.values() if m.architecture not in (own.architecture, other.architecture))
        if own.architecture == other.architecture or not pool:
            raise HarmonizeError(f"{target} judged by {judge}: take a judge of another architecture, and leave a pool")
        plans.append(Plan(own, other, pool))
    return plans


def target_maps(pool: Sequence[Model], data: Dataset, method: str, seed: int) -> Tensor:
    """Consensus of a pool for every training image, computed once.

    Parameters
    ----------
    pool : Sequence[Model]
        The models.
    data : Dataset
        N images.
    method : str
        A cheap attribution method.
    seed : int
        Of the method's randomness.

    Returns
    -------
    Tensor
        (N, H, W): mean of min-max scaled maps, constant on squares of ``PATCH`` pixels.
    """
    maps = [attributions(model, data, method, seed)["maps"] for model in tqdm(pool, desc="consensus", leave=False)]
    return consensus(torch.stack(maps), "mean", patch=PATCH)


def fine_tune(model: Model, data: Dataset, maps: Tensor | None, weight: float, epochs: int, seed: int) -> Model:
    """Go on training on cross-entropy + weight * (1 - correlation of expected gradients with the given maps).

    Batches and drop path follow from the seed alone, so that arms differ in the penalty. BatchNorm keeps its running
    statistics: the fine-tuning is short.

    Parameters
    ----------
    model : Model
        Left as it is.
    data : Dataset
        N training images.
    maps : Tensor | None
        (N, H, W) what the attributions should look like; None trains without a prior.
    weight : float
        Lambda.
    epochs : int
        Passes over the images.
    seed : int
        Of batches, drop path, references and positions.

    Returns
    -------
    Model
        A copy with other weights, frozen and in eval mode.
    """
    network = copy.deepcopy(model.network).requires_grad_(True).train()
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    x = model.preprocess(data.images)
    y = data.labels.to(x.device)
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    order = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # drop path
        for _ in range(epochs):
            for index in torch.randperm(len(y), generator=order)[: len(y) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
                batch = x[index].contiguous(memory_format=torch.channels_last)
                loss = F.cross_entropy(network(batch), y[index])
                if maps is not None:
                    prior = partial(consensus_prior, consensus=maps[index], patch=PATCH)
                    loss = loss + weight * expected_gradients_penalty(
                        network, batch, y[index], None, prior, generator=draws
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return with_network(model, network, f"{model.name}-tuned")


def with_network(model: Model, network: torch.nn.Module, name: str) -> Model:
    """The same preprocessing and classes around other weights.

    Parameters
    ----------
    model : Model
        Left as it is.
    network : torch.nn.Module
        Of the model's architecture.
    name : str
        The new model's name.

    Returns
    -------
    Model
        Frozen, in eval mode.
    """
    other = copy.copy(model)
    other._modules = dict(model._modules, network=network.eval().requires_grad_(False))
    other.name = name
    other.weights_hash = sha256_tensors(network.state_dict())
    return other


def tuned(model: Model, data: Dataset, arm: str, maps: Tensor | None, weight: float, epochs: int, seed: int) -> Model:
    """A fine-tuned model whose weights are kept in the store.

    Parameters
    ----------
    model : Model
        See :func:`fine_tune`.
    data : Dataset
        See :func:`fine_tune`.
    arm : str
        One of ``ARMS``, for the name.
    maps : Tensor | None
        See :func:`fine_tune`.
    weight : float
        See :func:`fine_tune`.
    epochs : int
        See :func:`fine_tune`.
    seed : int
        See :func:`fine_tune`.

    Returns
    -------
    Model
        See :func:`fine_tune`.
    """
    key = {
        "version": VERSION,
        "model": model.identity,
        "images": sha256_tensors({"images": data.images, "labels": data.labels}),
        "maps": None if maps is None else sha256_tensors({"maps": maps}),
        "weight": weight,
        "epochs": epochs,
        "seed": seed,
    }
    state = remember(
        "consensus-prior",
        key,
        lambda: dict(fine_tune(model, data, maps, weight, epochs, seed).network.state_dict()),
    )
    network = copy.deepcopy(model.network)
    network.load_state_dict(state)
    return with_network(model, network, f"{model.name}, {arm}, seed {seed}")


class Tuned(NamedTuple):
    """All of one target: the plan, every weight tried, the weight of each arm, and the models by (arm, seed)."""

    plan: Plan
    tried: pd.DataFrame
    weights: dict[str, float]
    models: dict[tuple[str, int], Model]


def study_target(run: Run, chosen: Plan) -> Tuned:
    """Train every arm with every weight and seed, and keep each arm's weight by the rule of :func:`choose_weight`.

    Parameters
    ----------
    run : Run
        Gives ``train_images``, ``tuning_epochs``, ``tuning_weights``, ``tuning_seeds``, ``consensus_method``.
    chosen : Plan
        Who is fine-tuned towards whom.

    Returns
    -------
    Tuned
        The models at the chosen weights; the control's is chosen by the same rule.
    """
    settings = run.settings
    data = load_dataset("shapes-on-scenes", "train", settings.train_images)
    validation = load_dataset("shapes-on-scenes", "val", VALIDATION_IMAGES)
    random = [shuffled(model, settings.seed) for model in chosen.pool]
    maps = {
        OURS: target_maps(chosen.pool, data, settings.consensus_method, settings.seed),
        CONTROL: target_maps(random, data, settings.consensus_method, settings.seed),
        PLAIN: None,
    }
    before = accuracy(chosen.target, validation)
    jobs = [
        (arm, weight, seed)
        for arm in ARMS
        for weight in (sorted(settings.tuning_weights) if maps[arm] is not None else [0.0])
        for seed in settings.tuning_seeds
    ]
    models, rows = {}, []
    for arm, weight, seed in tqdm(jobs, desc=f"fine-tuning {chosen.target.name}", mininterval=1):
        model = tuned(chosen.target, data, arm, maps[arm], weight, settings.tuning_epochs, seed)
        models[arm, weight, seed] = model
        rows.append((chosen.target.name, arm, weight, seed, accuracy(model, validation), before))
    tried = pd.DataFrame(rows, columns=["model", "arm", "weight", "seed", "validation_accuracy", "before"])
    weights = {arm: choose_weight(tried[tried["arm"] == arm]) for arm in ARMS}
    kept = {(arm, seed): model for (arm, weight, seed), model in models.items() if weight == weights[arm]}
    return Tuned(chosen, tried, weights, kept)


def choose_weight(tried: pd.DataFrame) -> float:
    """The rule: the largest weight whose validation accuracy, mean over seeds, stays within a point of the original's.

    Parameters
    ----------
    tried : pd.DataFrame
        Columns ``weight``, ``validation_accuracy``, ``before``, one row per weight and seed.

    Returns
    -------
    float
        The weight; the smallest tried where none stays.
    """
    means = tried.groupby("weight")[["validation_accuracy", "before"]].mean()
    fit = means[means["validation_accuracy"] >= means["before"] - TOLERANCE]
    return float(fit.index.max() if len(fit) else means.index.min())


def accuracy(model: Model, data: Dataset) -> float:
    """Share of images a model gets right.

    Parameters
    ----------
    model : Model
        The model.
    data : Dataset
        The images.

    Returns
    -------
    float
        In [0, 1].
    """
    return float((predictions(model, data.images) == data.labels).double().mean())


def measure(run: Run, studies: Sequence[Tuned]) -> pd.DataFrame:
    """Agreement with the judge, on squares of ``PATCH`` pixels, and localization of every model's maps, per image.

    Parameters
    ----------
    run : Run
        Gives test images with masks, methods and seed.
    studies : Sequence[Tuned]
        From :func:`study_target`.

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``arm`` (``before`` included), ``seed``, ``method``, ``measure``, ``image``, ``value``.

    Raises
    ------
    HarmonizeError
        The data set has no masks.
    """
    data, settings = run.dataset, run.settings
    if data.masks is None:
        raise HarmonizeError(f"{data.name} has no masks: the consensus prior is studied on shapes-on-scenes")
    parts = []
    for study in studies:
        for method in settings.methods:
            options = settings.options.get(method, {})
            judged = attributions(study.plan.judge, data, method, settings.seed, **options)["maps"]
            judged = avg_pool2d(judged, PATCH)
            every = {("before", 0): study.plan.target, **study.models}
            for (arm, seed), model in tqdm(every.items(), desc=f"{study.plan.target.name}: {method}", mininterval=1):
                maps = attributions(model, data, method, settings.seed, **options)["maps"]
                scores = {name: score(avg_pool2d(maps, PATCH), judged) for name, score in AGREEMENT.items()}
                scores |= {name: score(maps, data.masks) for name, score in LOCALIZATION.items()}
                told = {"model": study.plan.target.name, "arm": arm, "seed": seed, "method": method}
                parts += [
                    pd.DataFrame(told | {"measure": name, "image": data.ids, "value": values.double().numpy()})
                    for name, values in scores.items()
                ]
    return pd.concat(parts, ignore_index=True)


def reached(run: Run, studies: Sequence[Tuned]) -> pd.DataFrame:
    """Whether training moved what it trained on: correlation of expected gradients with the pool's consensus.

    Parameters
    ----------
    run : Run
        Gives test images, ``consensus_method``, options of ``expected_gradients`` and seed.
    studies : Sequence[Tuned]
        From :func:`study_target`.

    Returns
    -------
    pd.DataFrame
        Columns as :func:`measure`; Pearson correlation on squares of ``PATCH`` pixels, of images never trained on.
    """
    data, settings, parts = run.dataset, run.settings, []
    options = settings.options.get("expected_gradients", {})
    for study in studies:
        wished = target_maps(study.plan.pool, data, settings.consensus_method, settings.seed)
        every = {("before", 0): study.plan.target, **study.models}
        for (arm, seed), model in tqdm(every.items(), desc=f"{study.plan.target.name}: objective", mininterval=1):
            maps = attributions(model, data, "expected_gradients", settings.seed, **options)["maps"]
            pairs = zip(maps.split(1), wished.split(1), strict=True)
            values = [1 - float(consensus_prior(one, other, PATCH)) for one, other in pairs]
            told = {"model": study.plan.target.name, "arm": arm, "seed": seed, "method": "expected_gradients"}
            parts.append(pd.DataFrame(told | {"measure": OBJECTIVE, "image": data.ids, "value": values}))
    return pd.concat(parts, ignore_index=True)


def differences(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """What the consensus prior changes, against the original model and against both controls.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`measure`.
    seed : int
        Seed of the bootstrap over images; an image's value is its mean over seeds.

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``method``, ``measure``, ``against``, ``mean``, ``low``, ``high``, ``n``, ``p``, and
        ``lowest`` and ``highest`` difference of a single seed.
    """
    rows = []
    for (model, method, name), part in table.groupby(["model", "method", "measure"], sort=False):
        values = part.pivot(index="image", columns=["arm", "seed"], values="value")
        ours = values[OURS]
        for against in ("before", PLAIN, CONTROL):
            other = values[against]
            interval = paired_difference(ours.mean(axis=1).to_numpy(), other.mean(axis=1).to_numpy(), seed)
            single = [ours[s].mean() - other[s if s in other.columns else 0].mean() for s in ours.columns]
            rows.append((model, method, name, against, *interval, min(single), max(single)))
    columns = ["model", "method", "measure", "against", "mean", "low", "high", "n", "p", "lowest", "highest"]
    return pd.DataFrame(rows, columns=columns)


def clean_accuracy(studies: Sequence[Tuned], n: int, seed: int) -> pd.DataFrame:
    """Test accuracy before and after, paired over images.

    Parameters
    ----------
    studies : Sequence[Tuned]
        From :func:`study_target`.
    n : int
        Test images.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``arm``, ``weight``, ``accuracy`` (mean over seeds), ``before``, and the difference
        ``mean``, ``low``, ``high``, ``n``.
    """
    data = load_dataset("shapes-on-scenes", "test", n)
    rows = []
    for study in studies:
        before = _correct(study.plan.target, data)
        for arm in ARMS:
            after = np.mean([_correct(model, data) for (name, _), model in study.models.items() if name == arm], 0)
            difference = paired_difference(after, before, seed)
            rows.append((study.plan.target.name, arm, study.weights[arm], after.mean(), before.mean(), *difference[:4]))
    columns = ["model", "arm", "weight", "accuracy", "before", "mean", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns)


def _correct(model: Model, data: Dataset) -> np.ndarray:
    return (predictions(model, data.images) == data.labels).double().numpy()


def pooled_difference(table: pd.DataFrame, name: str, against: str) -> Interval:
    """One measure's change over all fine-tuned models and methods, network by network.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`measure`.
    name : str
        The measure.
    against : str
        ``"before"`` or a control.
    Returns
    -------
    Interval
        Consensus prior minus the other, of networks fine-tuned from the same model with the same seed: means over
        images and methods, one per network.

    Notes
    -----
    What is compared are ways to train, so a trained network is the unit, not an image it explains.
    """
    part = table[table["measure"] == name]
    means = part.groupby(["arm", "model", "seed"])["value"].mean()
    other = means[against]
    if against == "before":
        other = other.droplevel("seed").reindex(means[OURS].index.get_level_values("model")).to_numpy()
    return t_interval(means[OURS] - other)


def claims_of(table: pd.DataFrame) -> dict[str, Interval]:
    """What the ledger asks of the consensus prior.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`measure`.

    Returns
    -------
    dict[str, Interval]
        Claim id to what was measured.
    """
    return {
        "prior_consensus_agrees": pooled_difference(table, "Spearman", PLAIN),
        "prior_consensus_localizes": pooled_difference(table, "relevance rank", PLAIN),
        "prior_consensus_specific": pooled_difference(table, "relevance rank", CONTROL),
    }


def draw_differences(table: pd.DataFrame) -> Figure:
    """What the consensus prior changes, a panel per measure.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`differences`.

    Returns
    -------
    Figure
        The figure.
    """
    names = {"before": "consensus − before", PLAIN: "consensus − no prior", CONTROL: "consensus − random maps"}
    measures = [*AGREEMENT, *LOCALIZATION]
    figure, axes = plt.subplots(1, len(measures), figsize=(7.4, 2.8), sharey=True)
    for ax, measure in zip(axes, measures, strict=True):
        part = table[table["measure"] == measure]
        rows = part.assign(
            row=[
                f"{plots.label(m)}, {plots.label(method)}"
                for m, method in zip(part["model"], part["method"], strict=True)
            ],
            pair=part["against"].map(names),
        )
        plots.forest(ax, rows, "row", measure, "difference", hue="pair")
        ax.title.set_fontsize(8)
    lines, texts = axes[0].get_legend_handles_labels()
    figure.suptitle(
        "What the consensus prior changes: agreement with a held-out judge, finding the object",
        x=0,
        ha="left",
        fontsize=9,
        fontweight="bold",
    )
    figure.legend(lines, texts, loc="outside lower center", ncols=3, fontsize=7)
    return figure


def gallery(run: Run, studies: Sequence[Tuned], method: str, n: int) -> tuple[Figure, pd.DataFrame]:
    """Maps of the first test images before and after, first seed, and the judge's: one row per image and target.

    Parameters
    ----------
    run : Run
        Gives images and seed.
    studies : Sequence[Tuned]
        From :func:`study_target`.
    method : str
        Attribution method.
    n : int
        Images.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure, and the relevance rank of every map shown.
    """
    few = run.dataset.select(torch.arange(n))
    options, first = run.settings.options.get(method, {}), run.settings.tuning_seeds[0]
    rows: list[list[tuple[Tensor, str]]] = []
    names, table = [], []
    for study in studies:
        name, judge = plots.label(study.plan.target.name), plots.label(study.plan.judge.name)
        shown = {
            "before": study.plan.target,
            **{arm: study.models[arm, first] for arm in ARMS},
            "judge": study.plan.judge,
        }
        maps = {arm: attributions(m, few, method, run.settings.seed, **options)["maps"] for arm, m in shown.items()}
        titles = {arm: f"{judge}\n(judge)" if arm == "judge" else arm.replace(" ", "\n", 1) for arm in shown}
        for i in range(n):
            panels = [(few.images[i], "image" if i == 0 else "")]
            rows.append([*panels, *((values[i], titles[arm] if i == 0 else "") for arm, values in maps.items())])
            names.append(name)
        if few.masks is not None:
            for arm, values in maps.items():
                ranks = relevance_rank(values, few.masks).tolist()
                table += [(study.plan.target.name, arm, few.ids[i], rank) for i, rank in enumerate(ranks)]
    return plots.gallery(rows, names), pd.DataFrame(table, columns=["model", "map", "image", "relevance_rank"])


def describe_objective(table: pd.DataFrame) -> str:
    """Say in words how far training moved what it trained on.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`reached`.

    Returns
    -------
    str
        One line per model: the means of all arms, and the consensus prior against each other arm.
    """
    lines = []
    for model, part in table.groupby("model", sort=False):
        means = part.groupby("arm", sort=False)["value"].mean()
        shown = ", ".join(f"{arm} {value:.3f}" for arm, value in means.items())
        gains = {arm: pooled_difference(part, OBJECTIVE, arm) for arm in (PLAIN, CONTROL)}
        told = "; ".join(
            f"consensus minus {arm} {g.mean:+.3f} [{g.low:+.3f}, {g.high:+.3f}], n = {g.n} networks"
            for arm, g in gains.items()
        )
        lines.append(f"{model}: {shown}; {told}")
    return "\n".join(lines)


def describe(table: pd.DataFrame) -> str:
    """Say clean accuracies in words.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`clean_accuracy`.

    Returns
    -------
    str
        One line per model and arm.
    """
    return "\n".join(
        f"{row.model}, {row.arm}{f', λ = {row.weight:g}' if row.weight else ''}: accuracy {row.before:.3f} → "
        f"{row.accuracy:.3f}, change {row.mean:+.4f} [{row.low:+.4f}, {row.high:+.4f}], n = {row.n}"
        for row in table.itertuples()
    )


def facts(table: pd.DataFrame, moved: pd.DataFrame) -> dict[str, bool]:
    """What must hold for the consensus prior's comparison to mean anything.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`clean_accuracy`.
    moved : pd.DataFrame
        From :func:`reached`.

    Returns
    -------
    dict[str, bool]
        Statement to whether it holds.
    """
    learned = {
        f"consensus prior: {model}'s expected gradients come nearer to the consensus than without a prior": bool(
            pooled_difference(part, OBJECTIVE, PLAIN).low > 0
        )
        for model, part in moved.groupby("model", sort=False)
    }
    return learned | {
        f"consensus prior: {model} with {arm} keeps clean accuracy within a point, by the mean": bool(
            change >= -TOLERANCE
        )
        for model, arm, change in zip(table["model"], table["arm"], table["mean"], strict=True)
    }
