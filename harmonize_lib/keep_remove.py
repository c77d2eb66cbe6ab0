"""Keep and remove: what a network's output becomes when features are kept, or taken away, by their attribution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.std import tqdm

from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.tabular_priors import Perceptrons, attributions, r_squared

DATASETS = ("correlated groups", "independent")
FEATURES, ROWS, TEST_ROWS = 60, 1000, 100
METRICS = tuple(f"{kind}{sign}{fill}" for kind in "KR" for sign in "PNA" for fill in "MRI")
ATTRIBUTIONS = ("expected_gradients", "integrated_gradients", "gradients", "random")
BACKGROUND = 100  # training rows that stand in for features under "resample"
TURNED = {"KN": lambda area: -area, "RP": lambda area: -area, "RA": lambda area: 1 - area}  # so that higher is better
POINTS = 11  # of a curve over the number of features

# Erion et al. 2021 (arXiv 1906.10670), table 1: Correlated Groups 60, in the order of METRICS
REPORTED = {
    "expected_gradients": (
        *(3.731, 3.800, 3.973, 3.615, 3.551, 3.873, 0.906, 0.903, 0.919),
        *(3.612, 3.575, 3.525, 3.759, 3.830, 3.683, 0.897, 0.885, 0.880),
    ),
    "integrated_gradients": (
        *(3.667, 3.736, 3.920, 3.543, 3.476, 3.808, 0.905, 0.899, 0.920),
        *(3.539, 3.503, 3.365, 3.687, 3.754, 3.543, 0.872, 0.859, 0.822),
    ),
    "gradients": (
        *(0.096, 0.122, 0.099, 0.076, -0.112, 0.052, 0.838, 0.823, 0.887),
        *(0.035, -0.098, -0.020, 0.110, 0.105, 0.108, 0.729, 0.712, 0.616),
    ),
    "random": (
        *(0.033, 0.106, 0.077, -0.012, -0.093, -0.053, 0.593, 0.583, 0.715),
        *(-0.053, -0.100, -0.106, 0.034, 0.092, 0.111, 0.400, 0.400, 0.275),
    ),
}


def simulate(name: str, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Draw the benchmark's regression data.

    Sixty standard normal features, of which every third of the first thirty adds its value to the outcome; under
    ``"correlated groups"`` each of those is correlated by 0.99 with the two that follow it.

    Parameters
    ----------
    name : str
        One of ``DATASETS``.
    seeds : Sequence[int]
        R seeds.

    Returns
    -------
    tuple[Tensor, Tensor]
        Features (1000, R, 60), centered, sample correlations exact under ``"correlated groups"``; outcomes (1000, R)
        with normal noise of standard deviation 0.01.

    Raises
    ------
    HarmonizeError
        Unknown name.

    References
    ----------
    Lundberg et al. 2020 (Nature Machine Intelligence 2), supplementary methods; Erion et al. 2021 (arXiv 1906.10670),
    section "Expected gradients outperforms other attribution methods".
    """
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)
    parts = [_simulate(name, torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack([x for x, _ in parts], 1), torch.stack([y for _, y in parts], 1)


def _simulate(name: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    x -= x.mean(0)
    if name == "correlated groups":
        wanted = torch.eye(FEATURES, dtype=torch.float64)
        for first in range(0, FEATURES // 2, 3):
            wanted[first : first + 3, first : first + 3] += 0.99 * (1 - torch.eye(3))
        white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / ROWS), x.T, upper=False)
        x = (torch.linalg.cholesky(wanted) @ white).T
    y = x[:, 0 : FEATURES // 2 : 3].sum(1) + 0.01 * torch.randn(ROWS, generator=generator, dtype=torch.float64)
    return x.float(), y.float()


def train(x: Tensor, y: Tensor, seeds: Sequence[int], epochs: int = 30, batch: int = 32) -> Perceptrons:
    """Train one network per data set: 60-32-20-20-1, ReLU, Adam at 1e-3, squared error.

    Parameters
    ----------
    x : Tensor
        (n, R, 60).
    y : Tensor
        (n, R).
    seeds : Sequence[int]
        R seeds of the initial weights and the order of rows.
    epochs : int
        Passes over the rows.
    batch : int
        Rows in a step.

    Returns
    -------
    Perceptrons
        R networks, frozen.
    """
    networks = Perceptrons([x.shape[2], 32, 20, 20], seeds)
    optimizer = torch.optim.Adam(networks.parameters(), lr=1e-3)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    which = torch.arange(len(seeds))
    for _ in range(epochs):
        order = torch.stack([torch.randperm(len(x), generator=generator) for generator in generators], 1)
        for rows in order.split(batch):
            loss = F.mse_loss(networks(x[rows, which]), y[rows, which], reduction="none").mean(0).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return networks.requires_grad_(False)


def explain(
    networks: Perceptrons, x: Tensor, training: Tensor, method: str, samples: int, generator: torch.Generator
) -> Tensor:
    """Attributions the benchmark compares.

    Parameters
    ----------
    networks : Perceptrons
        R networks.
    x : Tensor
        (n, R, P) rows explained.
    training : Tensor
        (m, R, P) where expected gradients draw their references; their mean is the baseline of integrated gradients.
    method : str
        One of ``ATTRIBUTIONS``.
    samples : int
        Gradients per row of expected and integrated gradients.
    generator : torch.Generator
        Where draws come from.

    Returns
    -------
    Tensor
        (n, R, P).

    Raises
    ------
    HarmonizeError
        Unknown method.
    """
    if method not in ATTRIBUTIONS:
        raise unknown("method", method, ATTRIBUTIONS)
    if method == "random":
        return torch.randn(x.shape, generator=generator)
    references = training.mean(0, keepdim=True) if method == "integrated_gradients" else training
    return attributions(networks, x, references, generator, method, samples).detach()


def keep_remove(
    networks: nn.Module, x: Tensor, y: Tensor, training: Tensor, values: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Score attributions on 18 metrics; higher is better on all of them.

    A metric is the area under a curve over the largest number of features, from none to all (11 values, denser at the
    low end), that are kept (K) or removed (R), at most as many as have the sign asked for: the most positive (P), the
    most negative (N), or the largest in magnitude (A). What is missing is masked by the training mean (M), resampled
    from 100 training rows over which outputs are averaged (R), or imputed by the conditional mean of a normal
    distribution (I). The curve is the mean output for P, its negative for N, R squared for A; under R the other way
    round: negative, positive, 1 - R squared.

    Parameters
    ----------
    networks : nn.Module
        R networks: rows (n, R, P) to outputs (n, R).
    x : Tensor
        (n, R, P) test rows.
    y : Tensor
        (n, R) their outcomes.
    training : Tensor
        (m, R, P) training rows, m of at least 100.
    values : Tensor
        (n, R, P) attributions.
    generator : torch.Generator
        Chooses the rows to resample from.

    Returns
    -------
    dict[str, Tensor]
        Name of ``METRICS`` to (R) scores.

    Raises
    ------
    HarmonizeError
        Too few training rows; attributions of another shape.

    References
    ----------
    Lundberg et al. 2020 (Nature Machine Intelligence 2), supplementary methods, "keep" and "remove" metrics.

    Notes
    -----
    Departures from their public code: every data set has its own network, never trained on its test rows (there, one
    network serves all splits); resampled rows are drawn from all training rows.
    """
    if values.shape != x.shape:
        raise HarmonizeError(f"attributions must be {tuple(x.shape)}, not {tuple(values.shape)}")
    if len(training) < BACKGROUND:
        raise HarmonizeError(f"{len(training)} training rows are too few to resample from: give at least {BACKGROUND}")
    background = training[torch.randperm(len(training), generator=generator)[:BACKGROUND]]
    mean, covariance = training.mean(0), _covariance(training)
    counts = feature_counts(x.shape[2])
    scores = {}
    for kind in "KR":
        for sign, signed in {"P": values, "N": -values, "A": values.abs()}.items():
            rank = signed.sort(dim=2, descending=True, stable=True).indices.argsort(2)
            limit = (signed >= 0).sum(2, keepdim=True)
            curves: dict[str, list[Tensor]] = {fill: [] for fill in "MRI"}
            for count in counts:
                chosen = rank < limit.clamp(max=count)
                there = chosen if kind == "K" else ~chosen
                many = torch.where(there[:, None], x[:, None], background).flatten(0, 1)
                outputs = {
                    "M": networks(torch.where(there, x, mean)),
                    "R": networks(many).unflatten(0, (len(x), -1)).mean(1),
                    "I": networks(impute(x, there, mean, covariance)),
                }
                for fill, output in outputs.items():
                    curves[fill].append(r_squared(output, y) if sign == "A" else output.mean(0))
            for fill, curve in curves.items():
                area = torch.trapezoid(torch.stack(curve), torch.tensor(counts, dtype=x.dtype), dim=0) / counts[-1]
                scores[kind + sign + fill] = TURNED.get(kind + sign, lambda area: area)(area)
    return scores


def feature_counts(features: int) -> list[int]:
    """Numbers of features at which curves are taken.

    Parameters
    ----------
    features : int
        P, at least 1.

    Returns
    -------
    list[int]
        From 0 to P, at most 11 of them.
    """
    places = (np.logspace(0, 1, POINTS) - 1) / 9
    return sorted({round(float(place)) for place in features * places})


def impute(x: Tensor, there: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Fill in missing features by their normal conditional mean given those that are there.

    Parameters
    ----------
    x : Tensor
        (n, R, P).
    there : Tensor
        (n, R, P) bool.
    mean : Tensor
        (R, P).
    covariance : Tensor
        (R, P, P).

    Returns
    -------
    Tensor
        (n, R, P): m_i + C_io C_oo^-1 (x_o - m_o) where features are missing.
    """
    both = there[..., :, None] & there[..., None, :]
    system = torch.where(both, covariance.double(), 0) + torch.diag_embed((~there).double())
    known = torch.where(there, x - mean, 0).double()
    solved = torch.cholesky_solve(known[..., None], torch.linalg.cholesky(system))
    filled = mean + (covariance.double() @ solved)[..., 0].to(x)
    return torch.where(there, x, filled)


def _covariance(rows: Tensor) -> Tensor:
    centered = (rows - rows.mean(0)).transpose(0, 1)
    ridge = 1e-6 * torch.eye(rows.shape[2], dtype=rows.dtype)
    return centered.mT @ centered / (len(rows) - 1) + ridge


def benchmark(name: str, seeds: Sequence[int], samples: int) -> dict[str, Tensor]:
    """Train networks, explain their test rows and score every method on every metric.

    Parameters
    ----------
    name : str
        One of ``DATASETS``.
    seeds : Sequence[int]
        R seeds: of data, network and draws.
    samples : int
        Gradients per row of expected and integrated gradients.

    Returns
    -------
    dict[str, Tensor]
        ``score`` (methods of ``ATTRIBUTIONS``, ``METRICS``, R) and ``r2`` (R) of the intact test rows.
    """
    x, y = simulate(name, seeds)
    training, test = slice(TEST_ROWS, None), slice(0, TEST_ROWS)
    networks = train(x[training], y[training], seeds)
    scores = []
    for method in tqdm(ATTRIBUTIONS, desc=name):
        draws, background = (torch.Generator().manual_seed(seeds[0]) for _ in range(2))
        values = explain(networks, x[test], x[training], method, samples, draws)
        scored = keep_remove(networks, x[test], y[test], x[training], values, background)
        scores.append(torch.stack([scored[metric] for metric in METRICS]))
    return {"score": torch.stack(scores), "r2": r_squared(networks(x[test]), y[test])}
