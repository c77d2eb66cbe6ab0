"""Simulations with a known answer: the coefficient a response depends on (TRIM), the wavelet it was made with (AWD)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from harmonize_lib import plots
from harmonize_lib.statistics import Interval, share_interval, t_interval
from harmonize_lib.storage import remember
from harmonize_lib.transformations import (
    METHODS,
    Transform,
    dwt,
    fourier,
    idwt,
    nonnegative_factors,
    principal_components,
    scales,
    transform_importance,
    wavelet,
)
from harmonize_lib.wavelets import (
    atom,
    compression,
    descend,
    filter_similarity,
    loss_terms,
    orthonormalize,
    peaks,
    reference_filter,
    structure,
)

VERSION = 3
LENGTH, TAPS, LEVELS, SCALE = 64, 10, 3, 2  # signals, filters, depth of the transform, the scale that matters
COMPONENTS, HIDDEN, POINTS = 16, 32, 20
TEACHER_STEPS = 600
DENSITY = 0.15  # share of the wavelet's coefficients that are not zero
STARTS = ("db5", "sym5")  # of a distillation; the first is the reference
ARMS = ("db5", "without interpretation loss", "AWD")
STRUCTURE = ("sum", "highpass sum", "norm", "spectrum", "even shifts")
HISTORY = ("reconstruction", "orthonormality", "sparsity", "interpretation")
TRANSFORMS = ("Fourier", "Wavelet", "PCA", "NMF")


def knock_out(simulations: int, steps: int, seed: int) -> pd.DataFrame:
    """Ask in every transformed space which coefficient a network uses that was trained on one of them.

    In a simulation one coefficient s_k of T(x) is drawn, the response is the magnitude of s_k in units of its
    deviation plus noise, and a network with one hidden layer learns it from x. Its importance is averaged in
    magnitude over test signals.

    Parameters
    ----------
    simulations : int
        Networks per transform.
    steps : int
        Steps of training.
    seed : int
        Seed of signals, coefficients and networks.

    Returns
    -------
    pd.DataFrame
        One row per transform, simulation, method and network (trained or not): ``coefficient`` (k), ``rank`` of its
        importance (1 is the largest), ``r2`` of the network, ``gap`` of completeness, ``residual`` (share of the
        signals' energy that the transform loses).

    References
    ----------
    Singh, Ha, Lanusse, Boehm, Liu, Yu 2020 (arXiv 2003.01926), simulation with a knocked-out coefficient.
    """
    key = {"version": VERSION, "simulations": simulations, "steps": steps, "seed": seed}
    parts = []
    for name in tqdm(TRANSFORMS, desc="knock-out", mininterval=1):
        stored = remember("knock-out", key | {"transform": name}, partial(_knock_out, name, simulations, steps, seed))
        for at, network in enumerate(("trained", "untrained")):
            for place, method in enumerate(METHODS):
                columns = {"rank": stored["rank"][at, place], "gap": stored["gap"][at, place]}
                columns |= {column: stored[column] for column in ("coefficient", "r2", "residual")}
                table = pd.DataFrame({column: values.numpy() for column, values in columns.items()})
                fixed = {"transform": name, "network": network, "method": method}
                parts.append(table.assign(**fixed, simulation=range(simulations)))
    return pd.concat(parts, ignore_index=True)


def signals(kind: str, n: int, generator: torch.Generator) -> Tensor:
    """Signals a transform is at home with.

    Parameters
    ----------
    kind : str
        One of ``TRANSFORMS``: for NMF sums of nonnegative bumps with a little noise, else autoregressive noise.
    n : int
        How many.
    generator : torch.Generator
        Draws them.

    Returns
    -------
    Tensor
        (n, 64).
    """
    noise = torch.randn(n, LENGTH, generator=generator)
    if kind == "NMF":
        centers = torch.arange(COMPONENTS) * LENGTH / COMPONENTS
        bumps = torch.exp(-((torch.arange(LENGTH) - centers[:, None]) ** 2) / 8)
        weights = -torch.rand(n, COMPONENTS, generator=generator).log()
        return (weights @ bumps + 0.05 * noise).clamp(min=0)
    x = noise.clone()
    for t in range(1, LENGTH):
        x[:, t] += 0.5 * x[:, t - 1]
    return x


def transform_for(kind: str, data: Tensor) -> Transform:
    """The transform of a name.

    Parameters
    ----------
    kind : str
        One of ``TRANSFORMS``.
    data : Tensor
        (n, 64) signals PCA and NMF are fitted to.

    Returns
    -------
    Transform
        Fourier and wavelet (db5, 3 levels) lose nothing; PCA and NMF keep 16 coefficients.
    """
    if kind == "PCA":
        return principal_components(data, COMPONENTS)
    if kind == "NMF":
        return nonnegative_factors(data, COMPONENTS)
    return fourier((LENGTH,)) if kind == "Fourier" else wavelet(reference_filter("db5"), LEVELS)


def _knock_out(kind: str, simulations: int, steps: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = signals(kind, 2500, generator)
    transform = transform_for(kind, x)
    s = transform.forward(x).flatten(1)
    used = (s.std(0) > 1e-6).nonzero().flatten()
    chosen = used[torch.randint(len(used), (simulations,), generator=generator)]
    z = s / s.std(0).clamp(min=1e-6)
    y = (z - z.mean(0)).abs()[:, chosen].T + 0.1 * torch.randn(simulations, len(x), generator=generator)
    mean, deviation = x.mean(), x.std()
    start = _perceptrons(simulations, generator)
    trained = _fit_perceptrons(start, (x[:2000] - mean) / deviation, y[:, :2000], steps, generator)
    shown = x[2000 : 2000 + POINTS]
    ranks, gaps = torch.zeros(2, len(METHODS), simulations), torch.zeros(2, len(METHODS), simulations)
    r2 = torch.zeros(simulations)
    for i in range(simulations):
        networks = [_perceptron([part[i] for part in each], mean, deviation) for each in (trained, start)]
        with torch.no_grad():
            miss = networks[0](x[2000:])[:, 0] - y[i, 2000:]
            r2[i] = 1 - miss.square().mean() / y[i, 2000:].var()
        for at, network in enumerate(networks):
            for place, method in enumerate(METHODS):
                target = torch.zeros(len(shown), dtype=torch.long)
                found = transform_importance(network, shown, target, transform, method, steps=16, rows=4096)
                size = found.scores.flatten(1).abs().mean(0)
                ranks[at, place, i] = (size >= size[chosen[i]]).sum()
                gap = found.completeness_gap
                gaps[at, place, i] = float("nan") if gap is None else gap.abs().mean()
    lost = (x - transform.inverse(transform.forward(x))).square().sum() / (x - x.mean(0)).square().sum()
    return {"rank": ranks, "gap": gaps, "coefficient": chosen, "r2": r2, "residual": lost.expand(simulations)}


def _perceptrons(count: int, generator: torch.Generator) -> list[Tensor]:
    """Weights and biases of many networks, each tensor with the network first."""
    first = torch.randn(count, LENGTH, HIDDEN, generator=generator) / LENGTH**0.5
    second = torch.randn(count, HIDDEN, 1, generator=generator) / HIDDEN**0.5
    return [first, torch.zeros(count, 1, HIDDEN), second, torch.zeros(count, 1, 1)]


def _fit_perceptrons(start: list[Tensor], x: Tensor, y: Tensor, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Least squares by Adam for all networks side by side; (n, L) inputs, (count, n) responses."""
    weights = [part.clone().requires_grad_() for part in start]
    optimizer = torch.optim.AdamW(weights, lr=0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,), generator=generator)
        first, first_bias, second, second_bias = weights
        output = torch.relu(x[rows] @ first + first_bias) @ second + second_bias
        optimizer.zero_grad()
        (output[..., 0] - y[:, rows]).square().mean(1).sum().backward()
        optimizer.step()
        schedule.step()
    return [part.detach() for part in weights]


def _perceptron(weights: list[Tensor], mean: Tensor, deviation: Tensor) -> nn.Module:
    """One of the networks, with the normalization of its input inside its first layer."""
    first, first_bias, second, second_bias = weights
    inner, outer = nn.Linear(LENGTH, HIDDEN).requires_grad_(False), nn.Linear(HIDDEN, 1).requires_grad_(False)
    inner.weight.copy_(first.T / deviation)
    inner.bias.copy_(first_bias[0] - (mean / deviation) * first.sum(0))
    outer.weight.copy_(second.T)
    outer.bias.copy_(second_bias[0])
    return nn.Sequential(inner, nn.ReLU(), outer).eval()


def recovery(table: pd.DataFrame) -> pd.DataFrame:
    """Share of simulations in which the coefficient that matters ranks first.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`knock_out`.

    Returns
    -------
    pd.DataFrame
        Columns ``transform``, ``method``, ``network``, ``mean``, ``low``, ``high``, ``n``.
    """
    rows = []
    for group, part in table.groupby(["transform", "method", "network"], sort=False):
        rows.append((*group, *share_interval(int((part["rank"] == 1).sum()), len(part))[:4]))
    return pd.DataFrame(rows, columns=["transform", "method", "network", "mean", "low", "high", "n"])


def _stream(name: str, seed: int) -> int:
    """Every wavelet has its own draws."""
    return zlib.crc32(name.encode()) + seed


def simulate(name: str, n: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Signals that are sparse in a wavelet, and a response to the largest of its coefficients at one scale.

    Parameters
    ----------
    name : str
        The generating wavelet.
    n : int
        Signals per seed.
    seeds : Sequence[int]
        One data set each.

    Returns
    -------
    tuple[Tensor, Tensor]
        Signals (S, n, 64): 15 % of the coefficients are normal, the others zero, plus noise of deviation 0.1;
        responses (S, n): the sum of the three largest coefficients at scale 2 plus noise of half its deviation.
    """
    lowpass, which = reference_filter(name, TAPS).float(), scales(LENGTH, LEVELS)
    data = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(_stream(name, seed))
        size, present = (draw(n, LENGTH, generator=generator) for draw in (torch.randn, torch.rand))
        s = size * (present < DENSITY) / DENSITY**0.5
        x = idwt(s, lowpass, LEVELS) + 0.1 * torch.randn(n, LENGTH, generator=generator)
        y = s[:, which == SCALE].topk(3, 1).values.sum(1)
        y = (y - y.mean()) / y.std() + 0.5 * torch.randn(n, generator=generator)
        data.append((x, y))
    return torch.stack([x for x, _ in data]), torch.stack([y for _, y in data])


def teachers(count: int, seed: int, width: int = 8) -> nn.Module:
    """Small convolutional networks side by side in one, as groups of channels.

    Parameters
    ----------
    count : int
        S networks.
    seed : int
        Seed of their weights.
    width : int
        Channels of each.

    Returns
    -------
    nn.Module
        From (N, S, 64) signals, one per network, to (N, S) outputs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv1d(count, width * count, 17, stride=2, padding=8, padding_mode="circular", groups=count),
            nn.ReLU(),
            nn.Conv1d(width * count, width * count, 5, padding=2, padding_mode="circular", groups=count),
            nn.ReLU(),
            nn.Conv1d(width * count, 32 * count, LENGTH // 2, groups=count),
            nn.ReLU(),
            nn.Conv1d(32 * count, count, 1, groups=count),
            nn.Flatten(),
        )


def distillation(
    names: Sequence[str], seeds: int, n: int, steps: int, sparsities: Sequence[float], interpretation: float, seed: int
) -> dict[str, Any]:
    """Train teachers on signals of known wavelets, distil them, and judge what comes out on unseen signals.

    Each descent begins at db5 and at sym5, and the lower loss on the training signals is kept: from one start alone
    it can end at a shifted copy of the wavelet, close by cosine and useless on the grid of a decimated transform.
    With and without the interpretation loss, every weight of the sparsity term is tried, and of each data set's
    wavelets the one whose peaks predict best on validation signals is kept.

    Parameters
    ----------
    names : Sequence[str]
        Generating wavelets of at most 10 taps.
    seeds : int
        Data sets and teachers per wavelet.
    n : int
        Training signals; as many for validation, and for testing.
    steps : int
        Steps of each distillation.
    sparsities : Sequence[float]
        Weights of the coefficients' L1 norm.
    interpretation : float
        Weight of their importance's L1 norm.
    seed : int
        First seed.

    Returns
    -------
    dict[str, Any]
        ``table`` (one row per wavelet, seed and arm: ``r2``, ``compression``, ``similarity``, ``atom_similarity``,
        ``reconstruction`` before and after the last step, ``orthonormality``, ``sparsity`` (the weight chosen)),
        ``filters`` ((S, 3, 10) by arm) and ``history`` (terms of the loss over the steps, by arm).
    """
    options: dict[str, Any] = {
        "n": n,
        "steps": steps,
        "sparsities": list(sparsities),
        "interpretation": interpretation,
    }
    results = []
    for name in tqdm(names, desc="distillation", mininterval=1):
        key = {"version": VERSION, "wavelet": name, "seeds": seeds, "seed": seed, **options}
        results.append(
            remember("distillation", key, partial(_distil, name, list(range(seed, seed + seeds)), **options))
        )
    columns = [column for column in results[0] if column not in ("filters", "history")]
    tables, curves = [], []
    for name, result in zip(names, results, strict=True):
        for place, arm in enumerate((*ARMS, "teacher")):
            values = {column: result[column][:, place].numpy() for column in columns}
            tables.append(pd.DataFrame({"wavelet": name, "seed": range(seed, seed + seeds), "arm": arm, **values}))
        for place, arm in enumerate(ARMS[1:]):
            for term, values in zip(HISTORY, result["history"][place].T, strict=True):
                curves.append(pd.DataFrame({"wavelet": name, "arm": arm, "term": term, "value": values.numpy()}))
    history = pd.concat(curves)
    history["step"] = (history.groupby(["wavelet", "arm", "term"]).cumcount() * 20).clip(upper=steps - 1)
    filters = {name: result["filters"] for name, result in zip(names, results, strict=True)}
    return {"table": pd.concat(tables, ignore_index=True), "filters": filters, "history": history}


def _distil(
    name: str, seeds: list[int], n: int, steps: int, sparsities: list[float], interpretation: float
) -> dict[str, Tensor]:
    count = len(seeds)
    x, y = simulate(name, 3 * n, seeds)
    teacher = teachers(count, _stream(name, seeds[0]))
    slope, predicted = _teach(teacher, x, y, n, seeds[0])
    signals, responses = x.double().split(n, 1), y.double().split(n, 1)
    true = reference_filter(name)
    weights = [(sparsity, weight) for weight in (0.0, interpretation) for sparsity in sparsities]
    tried, terms = _descents(x[:, :n], slope, weights, steps, seeds[0])
    chosen = _by_validation(tried.view(2, len(sparsities), count, TAPS), signals, responses)
    filters = torch.empty(count, len(ARMS), TAPS, dtype=torch.float64)
    empty = torch.full((count, len(ARMS) + 1), float("nan"), dtype=torch.float64)
    names = "r2 compression similarity atom_similarity reconstruction orthonormality reconstruction_before sparsity"
    result = {column: empty.clone() for column in names.split()}
    histories = torch.zeros(2, len(terms), len(HISTORY), dtype=torch.float64)
    for i in range(count):
        result["r2"][i, -1] = _r2(predicted[i, -n:], y[i, -n:])
        test = signals[-1][i]
        for place in range(len(ARMS)):
            before = reference_filter(STARTS[0])
            if place:
                at = (place - 1) * len(sparsities) + int(chosen[place - 1, i])
                before = tried[at, i].double()
                result["sparsity"][i, place] = weights[at][0]
                histories[place - 1] += terms[:, at, i] / count
            h = filters[i, place] = orthonormalize(before)
            result["r2"][i, place] = _least_squares(signals[0][i], responses[0][i], test, responses[-1][i], h)
            result["compression"][i, place] = compression(test, h, LEVELS)
            result["similarity"][i, place] = filter_similarity(h, true)
            result["atom_similarity"][i, place] = filter_similarity(atom(h, SCALE), atom(true, SCALE))
            result["reconstruction"][i, place] = _missing(test, h)
            result["reconstruction_before"][i, place] = _missing(test, before)
            result["orthonormality"][i, place] = float(sum(structure(h).values()))
    return {**result, "filters": filters, "history": histories}


def _descents(
    x: Tensor, slope: Tensor, weights: list[tuple[float, float]], steps: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Descend with all weights from every start; for weights and data set keep the start that ends at the lower loss.

    Filters (W, S, T), and the terms of their losses over the steps (steps, W, S, 4).
    """
    taken, tried = len(STARTS), len(weights) * len(x)
    start = torch.cat([reference_filter(name, TAPS).float().repeat(tried, 1) for name in STARTS])
    copies = (taken * len(weights), 1, 1)
    data = x.repeat(copies), slope.repeat(copies)
    by_filter = torch.tensor(weights).repeat_interleave(len(x), 0).repeat(taken, 1)
    sparsity, interpretation = by_filter.T
    generator = torch.Generator().manual_seed(seed)
    found, history = descend(start, *data, LEVELS, sparsity, interpretation, generator, steps)
    weight = {"sparsity": sparsity, "interpretation": interpretation}
    terms = loss_terms(found, *data, LEVELS)
    loss = torch.stack([weight.get(name, 1.0) * term for name, term in terms.items()]).sum(0)
    kept = loss.view(taken, tried).argmin(0) * tried + torch.arange(tried)
    history["orthonormality"] = history[list(STRUCTURE)].sum(axis=1)
    over = torch.tensor(history[list(HISTORY)].to_numpy()).view(-1, len(found), len(HISTORY))
    return found[kept].view(len(weights), len(x), TAPS), over[:, kept].unflatten(1, (len(weights), len(x)))


def _by_validation(tried: Tensor, signals: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor:
    """(arms, S) which of the filters (arms, W, S, T) predicts best on the second part of the signals."""
    arms, count = tried.shape[:2], tried.shape[2]
    r2 = torch.empty(*arms, count)
    for arm, weight, i in product(*map(range, r2.shape)):
        h = orthonormalize(tried[arm, weight, i])
        r2[arm, weight, i] = _least_squares(signals[0][i], responses[0][i], signals[1][i], responses[1][i], h)
    return r2.argmax(1)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, by wavelet and arm.

    Parameters
    ----------
    table : pd.DataFrame
        ``table`` of :func:`distillation`.

    Returns
    -------
    pd.DataFrame
        Columns ``measure``, ``wavelet``, ``arm``, ``mean``, ``low``, ``high``, ``n``.
    """
    rows = []
    for measure in ("r2", "compression", "similarity"):
        for group, part in table.groupby(["wavelet", "arm"], sort=False):
            if part[measure].notna().any():
                interval = _cosine_interval if measure == "similarity" else t_interval
                rows.append((measure, *group, *interval(part[measure].dropna())[:4]))
    return pd.DataFrame(rows, columns=["measure", "wavelet", "arm", "mean", "low", "high", "n"])


def measured_claims(recovered: pd.DataFrame, table: pd.DataFrame) -> dict[str, Interval]:
    """What the claims are judged by.

    Parameters
    ----------
    recovered : pd.DataFrame
        From :func:`recovery`.
    table : pd.DataFrame
        ``table`` of :func:`distillation`.

    Returns
    -------
    dict[str, Interval]
        Claim id to interval, those of wavelet distillation over seeds: the wavelets were chosen, not drawn, so each
        seed gives one value, its mean over wavelets.
    """
    trained = recovered[recovered["network"] == "trained"]
    worst = trained.loc[trained["mean"].idxmin()]
    by_arm = {arm: part.groupby("seed").mean(numeric_only=True) for arm, part in table.groupby("arm")}

    def difference(measure: str, a: str, b: str) -> Interval:
        return t_interval(by_arm[a][measure] - by_arm[b][measure])

    return {
        "trim_recovery": Interval(worst["mean"], worst["low"], worst["high"], int(worst["n"])),
        "awd_recovery": _cosine_interval(by_arm["AWD"]["similarity"]),
        "awd_over_db5": difference("r2", "AWD", "db5"),
        "awd_over_teacher": difference("r2", "AWD", "teacher"),
        "awd_interpretation": difference("r2", "AWD", "without interpretation loss"),
        "awd_compression": difference("compression", "AWD", "db5"),
    }


def conditions(recovered: pd.DataFrame, table: pd.DataFrame) -> dict[str, bool]:
    """What was asked of the simulations beforehand.

    Parameters
    ----------
    recovered : pd.DataFrame
        From :func:`recovery`.
    table : pd.DataFrame
        ``table`` of :func:`distillation`.

    Returns
    -------
    dict[str, bool]
        Condition to whether it is met.
    """
    trained = recovered[recovered["network"] == "trained"]
    awd = table[table["arm"] == "AWD"]
    similarity = awd.groupby("wavelet", sort=False)["similarity"].mean()
    met = {
        "the coefficient that matters ranks first in at least 90 % of simulations, for every transform and method": (
            bool((trained["mean"] >= 0.9).all())
        ),
        "reconstruction is perfect to 1e-5 with every distilled wavelet": bool((awd["reconstruction"] <= 1e-5).all()),
        "orthonormality terms vanish (1e-10) for every distilled wavelet": bool((awd["orthonormality"] <= 1e-10).all()),
    }
    return met | {
        f"the generating wavelet {name} is recovered (mean cosine at least 0.95)": bool(value >= 0.95)
        for name, value in similarity.items()
    }


def draw_recovery(recovered: pd.DataFrame) -> Figure:
    """Share of simulations in which the coefficient that matters ranks first.

    Parameters
    ----------
    recovered : pd.DataFrame
        From :func:`recovery`.

    Returns
    -------
    Figure
        One panel for trained networks, one for the same before training.
    """
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.8), sharey=True, sharex=True)
    for ax, network in zip(axes, ("trained", "untrained"), strict=True):
        part = recovered[recovered["network"] == network]
        plots.forest(
            ax, part, "transform", f"{network.capitalize()} networks", "share of simulations, rank 1", "method"
        )
        ax.set_xlim(-0.03, 1.03)
    axes[0].axvline(0.9, color="0.5", ls=":", lw=1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def aligned(wave: Tensor, to: Tensor, length: int) -> np.ndarray:
    """A filter shifted and signed to lie on another.

    Parameters
    ----------
    wave : Tensor
        (T) filter.
    to : Tensor
        (U) filter.
    length : int
        Samples of the result; ``to`` begins at a quarter of it.

    Returns
    -------
    np.ndarray
        (length).
    """
    start = length // 4
    target = nn.functional.pad(to, (start, max(0, length - start - len(to))))[:length]
    shifts = range(max(1, length - len(wave) + 1))
    places = [nn.functional.pad(wave, (k, max(0, length - k - len(wave))))[:length] for k in shifts]
    products = torch.stack(places) @ target
    best = int(products.abs().argmax())
    return (places[best] * products[best].sign()).numpy()


def draw_filters(filters: dict[str, Tensor], table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """The generating wavelet of every simulation and what each arm found, first seed, at the scale that matters.

    Parameters
    ----------
    filters : dict[str, Tensor]
        ``filters`` of :func:`distillation`.
    table : pd.DataFrame
        ``table`` of :func:`distillation`, for the cosines written in.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure and its lines.
    """
    figure, axes = plt.subplots(
        len(filters), len(ARMS), figsize=(7.2, 1.25 * len(filters) + 0.6), sharex=True, sharey=True, squeeze=False
    )
    parts = []
    for ax, arm in zip(axes[0], ARMS, strict=True):
        ax.set_title(arm if arm != ARMS[0] else "db5, the reference", fontsize=8)
    for row, (name, found) in zip(axes, filters.items(), strict=True):
        true = atom(reference_filter(name), SCALE)
        for place, (ax, arm) in enumerate(zip(row, ARMS, strict=True)):
            wave = atom(found[0, place], SCALE)
            length = 2 * max(len(true), len(wave))
            lines = {"generating": aligned(true, true, length), arm: aligned(wave, true, length)}
            ax.plot(lines["generating"], color="0.6", lw=3, label="generating wavelet")
            ax.plot(lines[arm], color=sns.color_palette("colorblind")[place], lw=1.3, label="found")
            cell = table[(table["wavelet"] == name) & (table["arm"] == arm)].sort_values("seed").iloc[0]
            words = f"cosine {cell['similarity']:.3f}"
            ax.text(0.98, 0.93, words, transform=ax.transAxes, ha="right", va="top", fontsize=7)
            fixed = {"wavelet": name, "arm": arm, "sample": range(length)}
            parts += [pd.DataFrame({**fixed, "line": key, "value": values}) for key, values in lines.items()]
        row[0].set_ylabel(name)
    axes[0, 0].legend(fontsize=6, loc="lower right")
    figure.supxlabel("sample", fontsize=8)
    return figure, pd.concat(parts, ignore_index=True)


def draw_summary(means: pd.DataFrame) -> Figure:
    """Prediction, compression and recovery of every arm.

    Parameters
    ----------
    means : pd.DataFrame
        From :func:`summary`.

    Returns
    -------
    Figure
        One panel per measure.
    """
    titles = {
        "r2": ("Prediction", "R² on unseen signals"),
        "compression": ("Compression", "share of coefficients\nfor 95 % of energy"),
        "similarity": ("Recovery", "cosine to the\ngenerating filter"),
    }
    figure, axes = plt.subplots(1, 3, figsize=(7.4, 3), sharey=True)
    names = [*ARMS, "teacher"]
    for ax, (measure, (title, unit)) in zip(axes, titles.items(), strict=True):
        part = means[means["measure"] == measure].assign(arm=lambda t: pd.Categorical(t["arm"], names))
        plots.forest(ax, part, "arm", title, unit, "wavelet")
        ax.lines[-1].remove()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, title="generating wavelet")
    return figure


def draw_history(history: pd.DataFrame) -> Figure:
    """The terms of the loss over the steps.

    Parameters
    ----------
    history : pd.DataFrame
        ``history`` of :func:`distillation`.

    Returns
    -------
    Figure
        One panel per term.
    """
    figure, axes = plt.subplots(1, len(HISTORY), figsize=(7.6, 2.3))
    colors = dict(zip(ARMS[1:], sns.color_palette("colorblind")[1:3], strict=True))
    for ax, term in zip(axes, HISTORY, strict=True):
        for (_, arm), part in history[history["term"] == term].groupby(["wavelet", "arm"], sort=False):
            first = arm not in ax.get_legend_handles_labels()[1]
            ax.plot(part["step"], part["value"], color=colors[arm], lw=1, label=arm if first else None)
        ax.set_title(term.capitalize(), fontsize=8)
        ax.set(xlabel="step", yscale="log" if term in HISTORY[:2] else "linear")
    axes[0].set_ylabel("term of the loss, unweighted")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _teach(teacher: nn.Module, x: Tensor, y: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Train on the first n signals; gradients there (S, n, L) and outputs everywhere (S, 2n)."""
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=0.003, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TEACHER_STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(TEACHER_STEPS):
        rows = torch.randint(n, (64,), generator=generator)
        optimizer.zero_grad()
        (teacher(x[:, rows].transpose(0, 1)) - y[:, rows].T).square().mean(0).sum().backward()
        optimizer.step()
        schedule.step()
    teacher.requires_grad_(False).eval()
    at = x[:, :n].transpose(0, 1).clone().requires_grad_()
    (slope,) = torch.autograd.grad(teacher(at).sum(), at)
    return slope.transpose(0, 1), teacher(x.transpose(0, 1)).T


def _cosine_interval(values: pd.Series) -> Interval:
    """Student's interval, cut at 1, which no cosine exceeds."""
    found = t_interval(values)
    return found._replace(high=min(found.high, 1.0))


def _r2(predicted: Tensor, y: Tensor) -> float:
    return float(1 - (predicted - y).square().mean() / y.var(correction=0))


def _least_squares(train: Tensor, y: Tensor, test: Tensor, y_test: Tensor, lowpass: Tensor) -> float:
    """R2 on unseen signals of ordinary least squares on the peaks of every scale."""

    def design(x: Tensor) -> Tensor:
        features = peaks(x, lowpass, LEVELS)
        return torch.cat([features, torch.ones_like(features[:, :1])], 1)

    solution = torch.linalg.lstsq(design(train), y.double()[:, None]).solution
    return _r2((design(test) @ solution)[:, 0], y_test.double())


def _missing(x: Tensor, lowpass: Tensor) -> float:
    """Largest |x - x^| in units of the signals' deviation."""
    return float((idwt(dwt(x, lowpass, LEVELS), lowpass, LEVELS) - x).abs().max() / x.std())
