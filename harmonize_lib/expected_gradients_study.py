"""Expected gradients under test: completeness, exactness, draws per step, blindness of baselines, and cost."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from captum.attr import GradientShap
from matplotlib.figure import Figure
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.std import tqdm

from harmonize_lib import plots, study
from harmonize_lib.attribution import explain
from harmonize_lib.data import Dataset, load_dataset
from harmonize_lib.features import feature_image, mean_color
from harmonize_lib.gradients import quadrature
from harmonize_lib.keep_remove import ATTRIBUTIONS, DATASETS, METRICS, REPORTED, benchmark
from harmonize_lib.models import Model
from harmonize_lib.operations import Operations
from harmonize_lib.priors import expected_gradients_penalty, pixel_prior, training_attributions
from harmonize_lib.statistics import Interval, bootstrap_interval, summarize, t_interval
from harmonize_lib.storage import remember, sha256_tensors
from harmonize_lib.tabular_priors import Perceptrons

VERSION = 1
DEMO_VERSION = 2
ROWS = 64  # in one pass
BLOCKS = 4  # estimates of the largest size that a completeness curve is made of
STRATIFIED = (4, 16, 64)
EXACT_DRAWS = 4000
GONE = 0.01  # dependence below which the demonstration counts it as gone
NETWORK = ([[10.0], [10.0]], [[-6.0]])  # weights and bias of the demonstration
DEMO_ROWS, DEMO_BATCH, DEMO_RATE = 1000, 64, 1e-2
TIMED_ROWS = 32
BOUND = 3.2  # what a training step with one draw may cost at most, in plain steps
DEMO: dict[str, tuple[str, int]] = {
    **{f"expected gradients, k = {k}": ("expected_gradients", k) for k in range(1, 6)},
    "gradients": ("gradients", 1),
    "gradients of log p": ("gradients", 1),
    "integrated gradients, k = 3": ("integrated_gradients", 3),
    "integrated gradients, k = 5": ("integrated_gradients", 5),
}
# Read off a figure of the authors' demonstration: epochs, or inf where the dependence stays
REPORTED_EPOCHS = dict(zip(DEMO, (68, 62, 61, 60, 59, math.inf, 106, math.inf, 105), strict=True))


def references(run: study.Run) -> Tensor:
    """Training images of the run's data set.

    Parameters
    ----------
    run : study.Run
        The run.

    Returns
    -------
    Tensor
        (R, C, H, W) uint8.
    """
    return load_dataset(run.settings.dataset, "train", run.settings.n_references, run.settings.seed).images


def _draws(model: Model, x: Tensor, y: Tensor, starts: Tensor, draws: int, seed: int) -> Tensor:
    """Sum over pixels of each single draw of the estimator, (draws, n)."""
    generator = torch.Generator().manual_seed(seed)
    copies, targets = x.repeat(draws, 1, 1, 1), y.repeat(draws)
    parts = [
        training_attributions(model, *part, starts, generator=generator).detach().flatten(1).sum(1)
        for part in zip(copies.split(ROWS), targets.split(ROWS), strict=True)
    ]
    return torch.cat(parts).view(draws, len(x))


def completeness(run: study.Run) -> pd.DataFrame:
    """How far attributions miss f(x) - mean f(references), by the number of references drawn.

    Parameters
    ----------
    run : study.Run
        The run; all of its images and models.

    Returns
    -------
    pd.DataFrame
        Columns ``estimator`` (``independent draws``, as in training; ``stratified``, as ``explain`` draws), ``model``,
        ``image``, ``references`` k, ``gap``: root mean square over disjoint sets of k draws, in logits.
    """
    images, labels = run.dataset.images, run.dataset.labels
    start = references(run)
    rows = []
    for name, model in tqdm(run.models.items(), desc="completeness"):
        key = {"model": model.identity, "version": VERSION, "seed": run.settings.seed}
        key["images"] = sha256_tensors({"images": images, "labels": labels, "references": start})
        key["draws"] = run.settings.draws
        gaps = remember("completeness", key, partial(_gaps, run, model, start))
        for estimator, size, column in sorted((*_parts(column), column) for column in gaps):
            part = {"image": run.dataset.ids, "gap": gaps[column].numpy()}
            rows.append(pd.DataFrame(part).assign(estimator=estimator, model=name, references=size))
    return pd.concat(rows, ignore_index=True)[["estimator", "model", "image", "references", "gap"]]


def _parts(column: str) -> tuple[str, int]:
    estimator, _, size = column.rpartition(" ")
    return estimator, int(size)


def _gaps(run: study.Run, model: Model, start: Tensor) -> dict[str, Tensor]:
    settings, images = run.settings, run.dataset.images
    device = next(model.parameters()).device
    labels = run.dataset.labels.to(device)
    x, starts = model.preprocess(images), model.preprocess(start)
    with torch.no_grad():
        wanted = model(x).gather(1, labels[:, None])[:, 0] - model(starts).mean(0)[labels]
    single = _draws(model, x, labels, starts, settings.draws, settings.seed)
    gaps = {}
    for k in [2**i for i in range(int(math.log2(settings.draws // BLOCKS)) + 1)]:
        estimates = single[: settings.draws // k * k].view(-1, k, len(x)).mean(1)
        gaps[f"independent draws {k}"] = (estimates - wanted).square().mean(0).sqrt()
    for k in STRATIFIED:
        generator = torch.Generator().manual_seed(settings.seed)
        result = explain(model, images, labels.cpu(), "expected_gradients", generator, references=start, samples=k)
        gaps[f"stratified {k}"] = (result.maps.sum((1, 2)) - wanted.cpu()).abs()
    return gaps


def slopes(table: pd.DataFrame, seed: int, n_resamples: int = 1000) -> pd.DataFrame:
    """Slope of log gap over log number of references, images resampled.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`completeness`.
    seed : int
        Seed of the bootstrap.
    n_resamples : int
        Bootstrap resamples.

    Returns
    -------
    pd.DataFrame
        Columns ``model`` (last row: all of them), ``mean``, ``low``, ``high``, ``n`` images; independent draws.
    """
    drawn = table[table["estimator"] == "independent draws"]
    grids = {
        name: part.pivot_table(index="image", columns="references", values="gap").pow(2)
        for name, part in drawn.groupby("model", sort=False)
    }
    rng = np.random.default_rng(seed)
    n = len(next(iter(grids.values())))
    samples = [np.arange(n), *rng.integers(n, size=(n_resamples, n))]
    fits = {
        name: np.array([_slope(grid.columns, grid.to_numpy()[rows].mean(0)) for rows in samples])
        for name, grid in grids.items()
    }
    fits["all models"] = np.mean(list(fits.values()), axis=0)
    rows = [(name, fit[0], *np.quantile(fit[1:], [0.025, 0.975]), n) for name, fit in fits.items()]
    return pd.DataFrame(rows, columns=["model", "mean", "low", "high", "n"])


def _slope(k: Sequence[int], mean_square: np.ndarray) -> float:
    return float(np.polyfit(np.log(np.asarray(k, float)), 0.5 * np.log(mean_square), 1)[0])


def draw_completeness(table: pd.DataFrame, fits: pd.DataFrame, seed: int) -> Figure:
    """Gap over number of references, log-log, with 95 % intervals over images and the slope -1/2.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`completeness`.
    fits : pd.DataFrame
        From :func:`slopes`.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    Figure
        The figure.
    """
    figure, ax = plt.subplots(figsize=(5.4, 3.6))
    squares = summarize(table.assign(gap=table["gap"] ** 2), ["estimator", "model", "references"], "gap", seed)
    rms = squares.set_index(["estimator", "model", "references"])[["mean", "low", "high"]].pow(0.5)
    slope = fits.set_index("model")["mean"]
    names = list(dict.fromkeys(table["model"]))
    for name, color in zip(names, sns.color_palette("colorblind", len(names)), strict=True):
        text = f"{plots.label(name)}, slope {slope[name]:.2f}".replace("-", "−")
        for estimator, form, label in (("independent draws", "o-", text), ("stratified", "x:", None)):
            part = rms.loc[estimator, name]
            error = np.abs(part[["low", "high"]].to_numpy().T - part["mean"].to_numpy())
            ax.errorbar(part.index, part["mean"], error, fmt=form, color=color, ms=4, lw=1.2, label=label)
    drawn = rms.loc["independent draws"]
    counts = drawn.index.unique("references").to_numpy()
    ax.plot(counts, 1.6 * drawn["mean"].max() * counts**-0.5, color="0.35", ls="--", lw=1, label="slope −1/2")
    ax.plot([], [], "x:", color="0.35", ms=4, lw=1.2, label="stratified draws (explain)")
    ax.set(xscale="log", yscale="log", xlabel="references drawn", ylabel="completeness gap, RMS in logits")
    ax.set_xticks(counts, [str(count) for count in counts])
    ax.set_xticks([], minor=True)
    low, high = drawn["low"].min() / 2, 2 * drawn["high"].max()
    ticks = [value for value in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low < value < high]
    ax.set_yticks(ticks, [f"{value:g}" for value in ticks])
    ax.set_yticks([], minor=True)
    ax.set_title("Completeness gap over the number of draws")
    ax.legend(fontsize=6.5)
    return figure


class _Bowl(nn.Module):
    """x_1 x_2 + x_3^2 - x_1: the straight path and Shapley values share x_1 x_2 alike."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0] * x[:, 1] + x[:, 2].square() - x[:, 0]


def _path_average(network: nn.Module, x: Tensor, starts: Tensor) -> Tensor:
    """Integrated gradients from each reference by 64-point Gauss-Legendre quadrature, averaged."""
    nodes, weights = (values.to(x)[:, None, None, None] for values in quadrature("gausslegendre", 64))
    way = x - starts[:, None]
    at = (starts[:, None] + nodes * way).requires_grad_()
    (slope,) = torch.autograd.grad(network(at.flatten(0, 2)).sum(), at)
    return (weights * way * slope).sum(0).mean(0)


def exactness(run: study.Run, repeats: int = 24, samples: int = 8) -> pd.DataFrame:
    """The mean of many draws against what it should be, in standard errors.

    Parameters
    ----------
    run : study.Run
        The run: its first model and images are compared with captum's GradientShap, on patches an eighth of the image.
    repeats : int
        Independent estimates behind each mean in the comparison with captum.
    samples : int
        Draws in each of them.

    Returns
    -------
    pd.DataFrame
        Columns ``comparison``, ``image``, ``feature``, ``z``: difference over its standard error.
    """
    generator = torch.Generator().manual_seed(run.settings.seed)
    x, starts = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (4, 8))
    linear, hidden, last = (
        nn.utils.skip_init(nn.Linear, *sizes, dtype=torch.float64) for sizes in ((4, 1), (4, 8), (8, 1))
    )
    network = nn.Sequential(hidden, nn.Tanh(), last)
    with torch.no_grad():
        for parameter in [*linear.parameters(), *network.parameters()]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    bowl = _Bowl()
    half = (x[:, None] + starts) / 2
    shares = torch.stack([half[..., 1] - 1, half[..., 0], 2 * half[..., 2], torch.zeros_like(half[..., 0])], -1)
    cases: dict[str, tuple[nn.Module, Tensor]] = {
        "linear model: exact Shapley value": (linear, (x - starts.mean(0)) * linear.weight.detach()),
        "product and square: exact Shapley value": (bowl, ((x[:, None] - starts) * shares).mean(1)),
        "tanh network: mean of integrated gradients": (network, _path_average(network, x, starts)),
    }
    rows = []
    for name, (model, exact) in cases.items():
        copies = x.repeat_interleave(EXACT_DRAWS, 0)
        draws = training_attributions(model, copies, None, starts, generator=generator).detach()
        draws = draws.view(len(x), EXACT_DRAWS, -1)
        rows.append(_standard_errors(name, draws.mean(1) - exact, draws.var(1) / EXACT_DRAWS))
    rows.append(_against_captum(run, repeats, samples))
    return pd.concat(rows, ignore_index=True)


def _standard_errors(name: str, difference: Tensor, variance: Tensor) -> pd.DataFrame:
    image, feature = torch.meshgrid(*(torch.arange(n) for n in difference.shape), indexing="ij")
    z = torch.where(variance > 1e-20, difference / variance.sqrt(), difference / 1e-9)
    columns = {"image": image.flatten(), "feature": feature.flatten(), "z": z.flatten().numpy()}
    return pd.DataFrame(columns).assign(comparison=name)[["comparison", "image", "feature", "z"]]


def _against_captum(run: study.Run, repeats: int, samples: int) -> pd.DataFrame:
    (name, model), images = next(iter(run.models.items())), run.dataset.images[:2]
    x, starts = model.preprocess(images), model.preprocess(references(run))
    y = run.dataset.labels[:2].to(x.device)
    key = {"model": model.identity, "repeats": repeats, "samples": samples, "version": VERSION}
    key |= {"inputs": sha256_tensors({"images": images, "references": starts}), "seed": run.settings.seed}

    def compute() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(run.settings.seed)
        ours = [training_attributions(model, x, y, starts, samples, generator=generator) for _ in range(repeats)]
        with torch.random.fork_rng(), _numpy_seed(run.settings.seed):
            torch.manual_seed(run.settings.seed)
            shap = GradientShap(model)
            theirs = [shap.attribute(x, starts, samples, stdevs=0.0, target=y) for _ in range(repeats)]
        side = x.shape[-1] // 8
        pooled = [F.avg_pool2d(torch.stack(part).detach().sum(2), side).flatten(2) for part in (ours, theirs)]
        variance = (pooled[0].var(0) + pooled[1].var(0)) / repeats
        return {"difference": pooled[0].mean(0) - pooled[1].mean(0), "variance": variance}

    result = remember("gradient_shap", key, compute)
    return _standard_errors(f"{plots.label(name)}: captum's GradientShap", result["difference"], result["variance"])


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """NumPy's global generator, which captum draws from, seeded and put back."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def exactness_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Sum up :func:`exactness`.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`exactness`.

    Returns
    -------
    pd.DataFrame
        Columns ``comparison``, ``numbers`` compared, ``within 3 standard errors`` (share), ``mean z²`` (1 expected),
        ``largest |z|`` and what it stays below by chance in 99 of 100 such tables, ``bound``.
    """
    rows = []
    for name, part in table.groupby("comparison", sort=False):
        z = part["z"].to_numpy()
        bound = float(norm.ppf(1 - 0.01 / 2 / len(z)))
        rows.append((name, len(z), float((np.abs(z) <= 3).mean()), float((z**2).mean()), float(np.abs(z).max()), bound))
    names = ["comparison", "numbers", "within 3 standard errors", "mean z²", "largest |z|", "bound"]
    return pd.DataFrame(rows, columns=names)


class _Saturated(nn.Module):
    """R networks sigmoid(w x + b) side by side; row i of a batch belongs to network i modulo R."""

    def __init__(self, networks: Perceptrons, output: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.networks, self.output = networks, output

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.networks(x.view(-1, self.networks.weights[0].shape[0], 2))).flatten()


def _demo_data(seeds: Sequence[int]) -> Tensor:
    """(rows, R): x_1 = x_2 = y, fair coins."""
    coins = [torch.rand(DEMO_ROWS, generator=torch.Generator().manual_seed(seed)) < 0.5 for seed in seeds]
    return torch.stack(coins, 1).float()


def _dependence(model: _Saturated, count: int) -> Tensor:
    """(R): mean effect of x_2 over mean effect of x_1, the other one in [0, 1)."""
    other = torch.arange(0, 1, 0.05)
    effects = []
    for feature in (1, 0):
        ends = torch.zeros(2, len(other), count, 2)
        ends[..., 1 - feature] = other[:, None]
        ends[1, ..., feature] = 1
        with torch.no_grad():
            low, high = model(ends.flatten(0, 2)).view(2, len(other), count).mean(1)
        effects.append(high - low)
    return effects[0] / effects[1]


def _demonstrate(method: str, samples: int, logarithm: bool, seeds: Sequence[int], epochs: int) -> dict[str, Tensor]:
    """Dependence after each epoch, (epochs + 1, R)."""
    count, y = len(seeds), _demo_data(seeds)
    networks = Perceptrons([2], seeds)
    with torch.no_grad():
        networks.weights[0].copy_(torch.tensor(NETWORK[0]).expand(count, 2, 1))
        networks.biases[0].copy_(torch.tensor(NETWORK[1]).expand(count, 1, 1))
    model = _Saturated(networks, torch.sigmoid)
    explained = _Saturated(networks, F.logsigmoid) if logarithm else model
    optimizer = torch.optim.Adam(networks.parameters(), lr=DEMO_RATE)
    orders = [torch.Generator().manual_seed(seed) for seed in seeds]
    generator = torch.Generator().manual_seed(seeds[0])
    zeros, which, history = torch.zeros(1, 2), torch.arange(count), [_dependence(model, count)]
    for _ in range(epochs):
        order = torch.stack([torch.randperm(DEMO_ROWS, generator=g) for g in orders], 1)
        for rows in order[: DEMO_ROWS // DEMO_BATCH * DEMO_BATCH].split(DEMO_BATCH):
            labels = y[rows, which].flatten()
            x = labels[:, None].expand(-1, 2).contiguous()
            values = training_attributions(explained, x, None, zeros, samples, method, generator)
            losses = F.binary_cross_entropy(model(x), labels, reduction="none") + values[:, 1].abs()
            optimizer.zero_grad()
            (losses.sum() / len(rows)).backward()
            optimizer.step()
        history.append(_dependence(model, count))
    return {"dependence": torch.stack(history)}


def demonstration(run: study.Run) -> pd.DataFrame:
    """Train networks that see the answer twice to ignore its second copy, by a penalty on its attribution.

    x_1 = x_2 = y are fair coins; sigmoid(10 x_1 + 10 x_2 - 6) starts saturated; loss = cross-entropy + mean |phi_2|;
    the reference is (0, 0); Adam at 0.01, batches of 64 of 1000 rows, what is left of a batch dropped.

    Parameters
    ----------
    run : study.Run
        Gives seeds and epochs.

    Returns
    -------
    pd.DataFrame
        Columns ``penalty`` (of ``DEMO``), ``seed``, ``epoch``, ``dependence``: mean effect of x_2 over that of x_1.
    """
    settings = run.settings
    seeds = range(settings.seed, settings.seed + settings.demo_seeds)
    parts = []
    for name, (method, samples) in tqdm(DEMO.items(), desc="demonstration"):
        task = (method, samples, name == "gradients of log p", list(seeds), settings.demo_epochs)
        key = {"task": list(task), "version": DEMO_VERSION}
        values = remember("demonstration", key, partial(_demonstrate, *task))["dependence"]
        epoch, seed = np.meshgrid(np.arange(len(values)), np.array(seeds), indexing="ij")
        columns = {"seed": seed.ravel(), "epoch": epoch.ravel(), "dependence": values.numpy().ravel()}
        parts.append(pd.DataFrame(columns).assign(penalty=name))
    return pd.concat(parts, ignore_index=True)[["penalty", "seed", "epoch", "dependence"]]


def epochs_to_zero(table: pd.DataFrame) -> pd.DataFrame:
    """First epoch with a dependence of at most 0.01, and what is left at the end, beside what was reported.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`demonstration`.

    Returns
    -------
    pd.DataFrame
        Columns ``penalty``, ``mean``, ``low``, ``high`` (Student's interval over the networks that get there, NaN
        where fewer than two do), ``reached`` (networks), ``n``, ``left`` (mean dependence after the last epoch),
        ``reported`` (inf: never).
    """
    rows = []
    for name, part in table.groupby("penalty", sort=False):
        first = _first_epochs(part)
        reached = first[np.isfinite(first)]
        left = part.loc[part["epoch"] == part["epoch"].max(), "dependence"].mean()
        rows.append((name, *t_interval(reached)[:3], len(reached), len(first), left, REPORTED_EPOCHS[name]))
    return pd.DataFrame(rows, columns=["penalty", "mean", "low", "high", "reached", "n", "left", "reported"])


def _first_epochs(part: pd.DataFrame) -> np.ndarray:
    gone = part[part["dependence"].abs() <= GONE].groupby("seed")["epoch"].min()
    return gone.reindex(np.sort(part["seed"].unique())).fillna(math.inf).to_numpy()


def draw_demonstration(table: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Dependence over epochs, and epochs until it is gone beside the reported ones.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`demonstration`.
    summary : pd.DataFrame
        From :func:`epochs_to_zero`.

    Returns
    -------
    Figure
        The figure.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 4.0), width_ratios=[1.25, 1])
    colors = dict(zip(DEMO, [*sns.color_palette("Blues_r", 7)[:5], *sns.color_palette("colorblind")[1:5]], strict=True))
    for name, part in table.groupby("penalty", sort=False):
        grouped = part.groupby("epoch")["dependence"]
        mean, half = grouped.mean(), 1.96 * grouped.sem()
        left.plot(mean.index, mean, color=colors[name], lw=1.3, label=name)
        left.fill_between(mean.index, mean - half, mean + half, color=colors[name], alpha=0.15, lw=0)
    top = 1.15 * table.loc[table["epoch"] == table["epoch"].min(), "dependence"].abs().max()
    left.set(xlabel="epoch", ylabel="dependence (excursions are cut)", ylim=(-0.3 * top, top))
    left.set_title("Dependence on the redundant feature", fontsize=9)
    left.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
    shown = summary[np.isfinite(summary["reported"]) | (summary["reached"] > 1)].reset_index(drop=True)
    error = np.abs(shown[["low", "high"]].to_numpy().T - shown["mean"].to_numpy())
    right.errorbar(shown["mean"], shown.index, xerr=error, fmt="o", ms=4, lw=1.4, label="here, 95 % interval")
    there = shown[np.isfinite(shown["reported"])]
    right.plot(there["reported"], there.index, "D", mfc="none", color="0.35", ms=6, label="reported (figure)")
    right.set(yticks=range(len(shown)), yticklabels=shown["penalty"], xlabel="epochs until it is gone")
    right.set_ylim(len(shown) - 0.5, -0.5)
    right.set_title("Epochs needed", fontsize=9)
    right.tick_params(axis="y", labelsize=7)
    right.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
    return figure


def benchmarks(run: study.Run) -> pd.DataFrame:
    """The keep/remove benchmark on both data sets.

    Parameters
    ----------
    run : study.Run
        Gives seeds and samples.

    Returns
    -------
    pd.DataFrame
        Columns ``dataset``, ``seed``, ``method``, ``metric``, ``score``; and ``r2`` of the intact test rows.
    """
    settings = run.settings
    seeds = list(range(settings.seed, settings.seed + settings.benchmark_seeds))
    parts = []
    for name in DATASETS:
        key = {"dataset": name, "seeds": seeds, "samples": settings.benchmark_samples, "version": VERSION}
        compute = partial(benchmark, name, seeds, settings.benchmark_samples)
        stored = remember("keep_remove", key, compute)
        shape = (len(ATTRIBUTIONS), len(METRICS), len(seeds))
        method, metric, seed = (axis.ravel() for axis in np.meshgrid(ATTRIBUTIONS, METRICS, seeds, indexing="ij"))
        columns = {"seed": seed, "method": method, "metric": metric, "score": stored["score"].numpy().ravel()}
        r2 = stored["r2"].numpy()[None, None].repeat(shape[0], 0).repeat(shape[1], 1).ravel()
        parts.append(pd.DataFrame(columns).assign(dataset=name, r2=r2))
    return pd.concat(parts, ignore_index=True)[["dataset", "seed", "method", "metric", "score", "r2"]]


def benchmark_table(table: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """Mean scores beside the reported ones, and on which metrics expected gradients beat integrated gradients.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`benchmarks`.
    dataset : str
        One of ``keep_remove.DATASETS``.

    Returns
    -------
    pd.DataFrame
        One row per metric: a column per method (mean over seeds), ``EG − IG`` with Student's interval ``low``,
        ``high`` over seeds, and for correlated groups ``reported`` columns.
    """
    part = table[table["dataset"] == dataset]
    rows = []
    for place, metric in enumerate(METRICS):
        scores = part[part["metric"] == metric].pivot_table(index="seed", columns="method", values="score")
        difference = t_interval(scores["expected_gradients"] - scores["integrated_gradients"])
        row = {"metric": metric, **scores.mean()[list(ATTRIBUTIONS)].to_dict()}
        row |= {"EG − IG": difference.mean, "low": difference.low, "high": difference.high}
        if dataset == DATASETS[0]:
            row |= {f"reported {method}": values[place] for method, values in REPORTED.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def metrics_won(table: pd.DataFrame, dataset: str) -> Interval:
    """Share of the 18 metrics on which expected gradients score higher than integrated gradients.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`benchmarks`.
    dataset : str
        One of ``keep_remove.DATASETS``.

    Returns
    -------
    Interval
        Mean over seeds with Student's interval; p tests "half of them". The seed is the unit, because the metrics of
        one network are not independent: a sign test over them, as reported, takes them to be.
    """
    part = table[table["dataset"] == dataset]
    scores = part.pivot_table(index=["seed", "metric"], columns="method", values="score")
    won = (scores["expected_gradients"] > scores["integrated_gradients"]).groupby("seed").mean()
    excess = t_interval(won - 0.5)
    return Interval(excess.mean + 0.5, excess.low + 0.5, excess.high + 0.5, excess.n, excess.p)


def benchmark_in_words(table: pd.DataFrame, dataset: str) -> str:
    """Say on how many metrics expected gradients beat integrated gradients, and by how much.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`benchmarks`.
    dataset : str
        One of ``keep_remove.DATASETS``.

    Returns
    -------
    str
        One line: metrics counted by their mean over networks, as reported, and by their interval; the mean difference
        of scores, beside the reported one where every metric of it is known; the share of :func:`metrics_won`.
    """
    rows, share = benchmark_table(table, dataset), metrics_won(table, dataset)
    size = f"mean difference of scores {rows['EG − IG'].mean():.4f}"
    if dataset == DATASETS[0]:
        reported = rows["reported expected_gradients"] - rows["reported integrated_gradients"]
        size += f" (reported: {reported.mean():.4f}, above 0 on {(reported > 0).sum()})"
    return (
        f"{dataset}: EG − IG is above 0 on {(rows['EG − IG'] > 0).sum()} of {len(rows)} metrics by its mean over "
        f"networks, on {(rows['low'] > 0).sum()} by its 95 % interval; {size}; share won by one network "
        f"{share.mean:.2f} [{share.low:.2f}, {share.high:.2f}], n = {share.n} networks, p = {share.p:.2g}"
    )


def draw_benchmark(table: pd.DataFrame) -> Figure:
    """Scores of all methods and metrics relative to expected gradients, and the difference to integrated gradients.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`benchmarks`.

    Returns
    -------
    Figure
        The figure.
    """
    first = benchmark_table(table, DATASETS[0]).set_index("metric")
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 4.2), sharey=True, width_ratios=[1.2, 1])
    places = np.arange(len(METRICS))
    for method, color in zip(ATTRIBUTIONS, sns.color_palette("colorblind"), strict=False):
        scale = first["expected_gradients"]
        left.plot(first[method] / scale, places, "o", ms=4.5, color=color, label=plots.label(method))
        reported = np.array(REPORTED[method]) / np.array(REPORTED["expected_gradients"])
        left.plot(reported, places, "D", mfc="none", ms=6, color=color, alpha=0.7)
    left.plot([], [], "D", mfc="none", color="0.35", ms=6, label="reported")
    left.set(yticks=places, yticklabels=METRICS, xlabel="score / score of expected gradients", ylabel="metric")
    left.set_ylim(len(METRICS) - 0.5, -0.5)
    left.set_title("Scores on correlated groups", fontsize=9)
    left.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
    for name, shift, color in zip(DATASETS, (-0.15, 0.15), sns.color_palette("colorblind")[4:], strict=False):
        rows = benchmark_table(table, name)
        error = np.abs(rows[["low", "high"]].to_numpy().T - rows["EG − IG"].to_numpy())
        right.errorbar(rows["EG − IG"], places + shift, xerr=error, fmt="o", ms=3.5, lw=1.1, color=color, label=name)
    gap = np.array(REPORTED["expected_gradients"]) - np.array(REPORTED["integrated_gradients"])
    right.plot(gap, places - 0.15, "D", mfc="none", color="0.35", ms=6, label="reported (correlated groups)")
    right.axvline(0, color="0.3", lw=0.8)
    right.set(xlabel="expected − integrated gradients")
    right.set_title("Expected minus integrated gradients", fontsize=9)
    right.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return figure


def black_pixels(dataset: Dataset) -> tuple[Dataset, Tensor]:
    """Paint the darker part of each object black.

    Parameters
    ----------
    dataset : Dataset
        N images; where masks are unknown, the whole image counts as the object.

    Returns
    -------
    tuple[Dataset, Tensor]
        The data with object pixels of less than the object's middle brightness at 0, and where these are, (N, H, W)
        bool.
    """
    brightness = dataset.images.float().mean(1)
    inside = torch.ones_like(brightness, dtype=torch.bool) if dataset.masks is None else dataset.masks
    low = brightness.masked_fill(~inside, torch.inf).amin((1, 2), keepdim=True)
    high = brightness.masked_fill(~inside, -torch.inf).amax((1, 2), keepdim=True)
    black = inside & (brightness < (low + high) / 2)
    return replace(dataset, images=dataset.images.masked_fill(black[:, None], 0)), black


BLIND: dict[str, tuple[str, dict[str, object]]] = {
    "integrated gradients from black": ("integrated_gradients", {"baseline": "black", "tolerance": None}),
    "integrated gradients from the mean color": ("integrated_gradients", {"baseline": "mean", "tolerance": None}),
}
OURS = "expected gradients"


def blindness(run: study.Run) -> pd.DataFrame:
    """What attributions say of black pixels, and what these do to the output.

    Parameters
    ----------
    run : study.Run
        The run.

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``image``, ``method`` (of ``BLIND``, and ``OURS``), ``ratio``: mean |attribution| on black
        pixels of the object over that on the rest of the image; ``correct``: the model knows the blackened image;
        ``drop``: fall of the target logit when the black pixels get the data's mean color.
    """
    painted, black = black_pixels(run.dataset)
    filled = feature_image(painted.images, ~black, "mean", mean_color(run.dataset.images))
    count, rest = black.sum((1, 2)), (~black).sum((1, 2))
    rows = []
    for name, model in tqdm(run.models.items(), desc="blindness"):
        with torch.no_grad():
            logits, without = (model(model.preprocess(images)).cpu() for images in (painted.images, filled))
        target = painted.labels[:, None]
        drop = (logits.gather(1, target) - without.gather(1, target))[:, 0]
        for method, maps in blind_maps(run, model, painted).items():
            size = maps.abs()
            ratio = (size * black).sum((1, 2)) / count / ((size * ~black).sum((1, 2)) / rest)
            columns = {
                "image": painted.ids,
                "ratio": ratio,
                "correct": logits.argmax(1) == painted.labels,
                "drop": drop,
            }
            rows.append(pd.DataFrame(columns).assign(model=name, method=method))
    return pd.concat(rows, ignore_index=True)[["model", "image", "method", "ratio", "correct", "drop"]]


def blind_maps(run: study.Run, model: Model, painted: Dataset) -> dict[str, Tensor]:
    """Maps of the blackened images, kept in the store.

    Parameters
    ----------
    run : study.Run
        Gives the seed and the references.
    model : Model
        The model explained.
    painted : Dataset
        From :func:`black_pixels`.

    Returns
    -------
    dict[str, Tensor]
        Name in ``BLIND``, and ``OURS``, to maps (N, H, W).
    """
    seed, start = run.settings.seed, references(run)
    key = {"model": model.identity, "version": VERSION, "seed": seed}
    key["images"] = sha256_tensors({"images": painted.images, "labels": painted.labels, "references": start})

    def compute() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shown = (model, painted.images, painted.labels, "expected_gradients", generator)
        return {"maps": explain(*shown, references=start).maps}

    return {
        name: study.attributions(model, painted, method, seed, **options)["maps"]
        for name, (method, options) in BLIND.items()
    } | {OURS: remember("blindness", key, compute)["maps"]}


def seen(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Sum up :func:`blindness`: per model and for all, images that the model knows.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`blindness`.
    seed : int
        Seed of the bootstrap over images.

    Returns
    -------
    pd.DataFrame
        Columns ``model`` (last: all models, by image), ``method``, ``mean``, ``low``, ``high``, ``n``: of ``ratio``.
    """
    known = table[table["correct"]]
    rows = []
    for name in [*dict.fromkeys(table["model"]), "all models"]:
        part = known if name == "all models" else known[known["model"] == name]
        for method in (*BLIND, OURS):
            values = part[part["method"] == method].groupby("image")["ratio"].mean()
            rows.append((name, method, *bootstrap_interval(values.to_numpy(), seed)[:4]))
    return pd.DataFrame(rows, columns=["model", "method", "mean", "low", "high", "n"])


def draw_blindness(table: pd.DataFrame) -> Figure:
    """How much attribution black pixels get, per model and method.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`seen`.

    Returns
    -------
    Figure
        The figure.
    """
    figure, ax = plt.subplots(figsize=(6.4, 3.0))
    title = "From black, integrated gradients see nothing of black pixels"
    plots.forest(ax, table, "model", title, "mean |attribution|: black pixels / rest of the image", hue="method")
    ax.axvline(1, color="0.35", ls="--", lw=1)
    ax.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=3)
    return figure


def draw_gallery(run: study.Run) -> tuple[Figure, pd.DataFrame]:
    """Blackened images, their black pixels, and maps of the first model.

    Parameters
    ----------
    run : study.Run
        The run.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure, and which images it shows: columns ``image``, ``class``, ``model``.
    """
    painted, black = black_pixels(run.dataset)
    name, model = next(iter(run.models.items()))
    maps = blind_maps(run, model, painted)
    short = ("IG from black", "IG from mean", "EG")
    chosen = black.sum((1, 2)).argsort(descending=True)[: run.settings.n_shown].tolist()
    rows = []
    for row, i in enumerate(chosen):
        titles = ("image", "black pixels", *short) if row == 0 else ("",) * 5
        rows.append(list(zip((painted.images[i], black[i], *(m[i] for m in maps.values())), titles, strict=True)))
    classes = [painted.classes[int(painted.labels[i])] for i in chosen]
    table = pd.DataFrame({"image": [painted.ids[i] for i in chosen], "class": classes, "model": name})
    return plots.gallery(rows, classes), table


def step_cost(run: study.Run) -> pd.DataFrame:
    """Time of a training step with the pixel prior, one draw, beside one without it, in turn.

    Parameters
    ----------
    run : study.Run
        Its models are copied; 32 training images.

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``pair``, ``plain``, ``prior`` (seconds), ``ratio``, ``counted`` (ratio of operations).
    """
    data = load_dataset(run.settings.dataset, "train", TIMED_ROWS, run.settings.seed)
    rows = []
    for name, model in tqdm(run.models.items(), desc="cost of a step"):
        network = copy.deepcopy(model).requires_grad_(True).train()
        x = network.preprocess(data.images)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6)
        generator = torch.Generator().manual_seed(run.settings.seed)
        step = partial(_step, network, x, data.labels.to(x.device), optimizer, generator)
        times, operations = [], []
        for weight in (0.0, 1e-6):
            with Operations() as counter:
                step(weight)
            operations.append(counter.total)
        for turn in range(2 * run.settings.timed_steps):
            begin = time.perf_counter()
            step(1e-6 * (turn % 2))
            times.append(time.perf_counter() - begin)
        counted = operations[1] / operations[0]
        rows += [(name, pair, *times[2 * pair - 2 : 2 * pair], counted) for pair in range(1, len(times) // 2 + 1)]
    table = pd.DataFrame(rows, columns=["model", "pair", "plain", "prior", "counted"])
    return table.assign(ratio=table["prior"] / table["plain"])


def _step(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    weight: float,
) -> None:
    loss = F.cross_entropy(network(x), y)
    if weight:
        loss = loss + weight * expected_gradients_penalty(network, x, y, None, pixel_prior, generator=generator)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if x.is_cuda:
        torch.cuda.synchronize()


def draw_step_cost(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Ratio of the times of a step with and without the prior.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`step_cost`.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure and its numbers: columns ``model``, ``mean``, ``low``, ``high``, ``n`` pairs, ``counted``.
    """
    rows = [
        (name, *t_interval(part["ratio"])[:4], part["counted"].iloc[0])
        for name, part in table.groupby("model", sort=False)
    ]
    summary = pd.DataFrame(rows, columns=["model", "mean", "low", "high", "n", "counted"])
    figure, ax = plt.subplots(figsize=(5.2, 0.9 + 0.32 * len(summary)))
    plots.forest(ax, summary, "model", "A step with the prior against a plain one", "ratio, one draw")
    ax.plot(summary["counted"], range(len(summary)), "|", color="0.2", ms=11, mew=1.4, label="operations, counted")
    ax.axvline(BOUND, color="0.35", ls=":", lw=1.4, label=f"bound: {BOUND:g}")
    ax.containers[0].set_label("seconds, 95 % interval")
    ax.set_xlim(left=0)
    ax.legend(fontsize=6.5, loc="upper left")
    return figure, summary


def step_cost_in_words(summary: pd.DataFrame) -> str:
    """Say what a step with the prior costs, and which networks are above the bound by their interval.

    Parameters
    ----------
    summary : pd.DataFrame
        From :func:`draw_step_cost`.

    Returns
    -------
    str
        One sentence.
    """
    over = summary[summary["low"] > BOUND]
    names = ", ".join(f"{plots.label(row.model)} ({row.mean:.2f})" for row in over.itertuples()) or "none"
    counted = f"{summary['counted'].mean():.2f} by the operations counted"
    mean = f"{summary['mean'].mean():.2f} plain steps, mean of {len(summary)} networks ({counted})"
    return f"a step with the prior costs {mean}; above the bound of {BOUND:g} by their 95 % interval: {names}"


def measured_claims(
    fits: pd.DataFrame, demo: pd.DataFrame, scores: pd.DataFrame, blind: pd.DataFrame
) -> dict[str, Interval]:
    """What the notebook measured, by claim.

    Parameters
    ----------
    fits : pd.DataFrame
        From :func:`slopes`.
    demo : pd.DataFrame
        From :func:`demonstration`.
    scores : pd.DataFrame
        From :func:`benchmarks`.
    blind : pd.DataFrame
        From :func:`seen`.

    Returns
    -------
    dict[str, Interval]
        Claim to estimate.
    """
    slope = fits.iloc[-1]
    by_penalty = dict(tuple(demo.groupby("penalty", sort=False)))
    one, five = (_first_epochs(by_penalty[f"expected gradients, k = {k}"]) for k in (1, 5))
    with np.errstate(invalid="ignore"):  # neither gets there: undefined
        relative = one / five
    last = demo[demo["epoch"] == demo["epoch"].max()].pivot_table(index="seed", columns="penalty", values="dependence")
    row = blind[(blind["model"] == "all models") & (blind["method"] == "expected gradients")].iloc[0]
    return {
        "eg_complete": Interval(slope["mean"], slope["low"], slope["high"], int(slope["n"])),
        "eg_one_draw": t_interval(relative),
        "eg_gradients_saturate": t_interval(last["gradients"] - last["expected gradients, k = 1"]),
        "eg_benchmark": metrics_won(scores, DATASETS[0]),
        "eg_blindness": Interval(row["mean"], row["low"], row["high"], int(row["n"])),
    }


def facts(exact: pd.DataFrame, demo: pd.DataFrame, blind: pd.DataFrame, intact: float) -> dict[str, bool]:
    """What had to hold.

    Parameters
    ----------
    exact : pd.DataFrame
        From :func:`exactness_summary`.
    demo : pd.DataFrame
        From :func:`epochs_to_zero`.
    blind : pd.DataFrame
        From :func:`blindness`.
    intact : float
        Lowest R squared of the benchmark's networks on intact test rows.

    Returns
    -------
    dict[str, bool]
        Sentence to whether it is so.
    """
    reached = demo.set_index("penalty")
    ours = [name for name in reached.index if name.startswith("expected")]
    dark = blind[blind["method"] == "integrated gradients from black"]
    found = dict(zip(exact["comparison"], exact["largest |z|"] <= exact["bound"], strict=True))
    return {f"the mean of many draws equals: {name}": bool(met) for name, met in found.items()} | {
        "every network loses its dependence under expected gradients, k = 1 to 5": bool(
            (reached.loc[ours, "reached"] == reached.loc[ours, "n"]).all()
        ),
        "no network loses its dependence under raw gradients": bool(reached.loc["gradients", "reached"] == 0),
        "integrated gradients from black give black pixels exactly 0": bool((dark["ratio"] == 0).all()),
        "black pixels matter: without them the target logit falls on average": bool(dark["drop"].mean() > 0),
        "the benchmark's networks explain at least 0.95 of the variance of intact test rows": intact >= 0.95,
    }
