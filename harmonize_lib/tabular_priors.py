"""Graph and sparsity priors on tables: many small networks trained side by side, the weight of each prior tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.stats import rankdata, ttest_rel
from sklearn.linear_model import Lasso, Ridge
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.std import tqdm

from harmonize_lib import plots
from harmonize_lib.errors import HarmonizeError
from harmonize_lib.priors import graph_prior, sparsity_prior, training_attributions
from harmonize_lib.statistics import Interval, holm, t_interval
from harmonize_lib.storage import remember, sha256_tensors
from harmonize_lib.tabular import Expression, Table, rewire, simulate_expression

VERSION = 1
TRAIN_ROWS, VALIDATION_ROWS = 100, 100
LEARNING_RATE = 3e-3  # 100 steps of 1e-3 could not bring the wider initial weights of a narrow network to zero
EVALUATION_ROWS = 500  # test rows, at most, whose expected gradients are measured
EVALUATION_SAMPLES = 20  # draws (x', a) per row when a trained network's expected gradients are measured

Penalty = Callable[["Perceptrons", Tensor, torch.Generator], Tensor]


class Perceptrons(nn.Module):
    """R multilayer perceptrons of one shape, with ReLU and one output each, that never see each other.

    Parameters
    ----------
    sizes : Sequence[int]
        Features, then the width of each hidden layer.
    seeds : Sequence[int]
        R seeds of the initial weights: each network's own, so that its start does not depend on its neighbors.
    """

    def __init__(self, sizes: Sequence[int], seeds: Sequence[int]) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for inputs, outputs in zip(sizes, [*sizes[1:], 1], strict=True):
            bound = inputs**-0.5
            drawn = torch.stack([2 * torch.rand(inputs + 1, outputs, generator=g) - 1 for g in generators])
            self.weights.append(nn.Parameter(bound * drawn[:, 1:].clone()))
            self.biases.append(nn.Parameter(bound * drawn[:, :1].clone()))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of all networks, each for its own rows.

        Parameters
        ----------
        x : Tensor
            (n, R, P).

        Returns
        -------
        Tensor
            (n, R).
        """
        hidden = x.transpose(0, 1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            hidden = torch.baddbmm(bias, hidden, weight)
            if weight is not self.weights[-1]:
                hidden = hidden.relu()
        return hidden[..., 0].T


class _Total(nn.Module):
    """Sum of the networks' outputs: its gradient with respect to a network's row is that network's own."""

    def __init__(self, networks: Perceptrons) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, x: Tensor) -> Tensor:
        return self.networks(x).sum(1)


def attributions(
    networks: Perceptrons,
    x: Tensor,
    references: Tensor,
    generator: torch.Generator,
    method: str = "expected_gradients",
    samples: int = 1,
) -> Tensor:
    """Attributions of every network for its own rows, with a graph to the parameters.

    Parameters
    ----------
    networks : Perceptrons
        R networks.
    x : Tensor
        (n, R, P).
    references : Tensor
        (m, R, P): row by row, every network draws the same position among its own references.
    generator : torch.Generator
        Where draws come from.
    method : str
        See :func:`harmonize_lib.priors.training_attributions`.
    samples : int
        Draws per row.

    Returns
    -------
    Tensor
        (n, R, P).
    """
    return training_attributions(_Total(networks), x, None, references, samples, method, generator)


def l1(networks: Perceptrons, x: Tensor, generator: torch.Generator) -> Tensor:
    """Mean magnitude of each network's weights.

    Parameters
    ----------
    networks : Perceptrons
        R networks.
    x : Tensor
        Not used.
    generator : torch.Generator
        Not used.

    Returns
    -------
    Tensor
        (R).
    """
    return _all_weights(networks).abs().mean(1)


def l2(networks: Perceptrons, x: Tensor, generator: torch.Generator) -> Tensor:
    """Mean square of each network's weights.

    Parameters
    ----------
    networks : Perceptrons
        R networks.
    x : Tensor
        Not used.
    generator : torch.Generator
        Not used.

    Returns
    -------
    Tensor
        (R).
    """
    return _all_weights(networks).square().mean(1)


def sparse_group_lasso(networks: Perceptrons, x: Tensor, generator: torch.Generator) -> Tensor:
    """Sparse group lasso: groups are the weights that leave one unit, input features among them.

    sum_g sqrt(\\|g\\|) \\|w_g\\|_2 + sum_i \\|w_i\\|, over the number of weights.

    Parameters
    ----------
    networks : Perceptrons
        R networks.
    x : Tensor
        Not used.
    generator : torch.Generator
        Not used.

    Returns
    -------
    Tensor
        (R).

    References
    ----------
    Scardapane et al. 2017 (arXiv 1607.00485), equation 8.
    """
    groups = sum(weight.shape[2] ** 0.5 * weight.norm(dim=2).sum(1) for weight in networks.weights)
    flat = _all_weights(networks)
    return (groups + flat.abs().sum(1)) / flat.shape[1]


def _all_weights(networks: Perceptrons) -> Tensor:
    return torch.cat([weight.flatten(1) for weight in networks.weights], 1)


def gini_penalty(networks: Perceptrons, x: Tensor, generator: torch.Generator, method: str) -> Tensor:
    """The sparsity prior of each network, on all its rows, with these rows as references.

    Parameters
    ----------
    networks : Perceptrons
        R networks.
    x : Tensor
        (n, R, P).
    generator : torch.Generator
        Where draws come from.
    method : str
        ``"expected_gradients"`` or ``"gradients"``.

    Returns
    -------
    Tensor
        (R) minus the Gini coefficient of the mean magnitudes.
    """
    return torch.func.vmap(sparsity_prior, 1)(attributions(networks, x, x, generator, method))


SPARSITY_ARMS: dict[str, tuple[Penalty | None, tuple[float, float]]] = {
    "none": (None, (0, 0)),
    "L1": (l1, (-1, 3)),
    "L2": (l2, (-1, 4)),
    "sparse group lasso": (sparse_group_lasso, (-1, 2)),
    "Gini of gradients": (partial(gini_penalty, method="gradients"), (-2, 1)),
    "Gini of expected gradients": (partial(gini_penalty, method="expected_gradients"), (-2, 1)),
}  # a penalty with the decimal logarithms of the smallest and the largest weight tried
OURS = "Gini of expected gradients"
TRUE_GRAPH, RANDOM_GRAPH = "rewired 0", "rewired 1"


def fit(
    networks: Perceptrons,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    score: Callable[[Tensor, Tensor], Tensor],
    penalty: Penalty | None,
    weights: Tensor,
    epochs: int,
    seed: int,
) -> Tensor:
    """Train every network on its own rows and leave it as it was at its best epoch by validation.

    Each network minimizes mean loss + weight * penalty by full-batch Adam; arms that differ in the penalty start from
    the same weights and see the same rows.

    Parameters
    ----------
    networks : Perceptrons
        R networks; trained in place.
    train : tuple[Tensor, Tensor]
        x (n, R, P) and y (n, R).
    validation : tuple[Tensor, Tensor]
        x (m, R, P) and y (m, R).
    loss : Callable[[Tensor, Tensor], Tensor]
        Outputs and y to elementwise loss (n, R).
    score : Callable[[Tensor, Tensor], Tensor]
        Outputs and y to (R), higher better.
    penalty : Penalty | None
        Gives (R); None trains without.
    weights : Tensor
        (R) what each network's penalty is multiplied by.
    epochs : int
        Steps, at least 1.
    seed : int
        Seed of the draws of expected gradients.

    Returns
    -------
    Tensor
        (R) best validation scores.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(networks.parameters(), lr=LEARNING_RATE)
    best = torch.full((len(weights),), -torch.inf)
    kept = [parameter.detach().clone() for parameter in networks.parameters()]
    x, y = train
    for _ in range(epochs):
        objective = loss(networks(x), y).mean(0)
        if penalty is not None:
            objective = objective + weights * penalty(networks, x, generator)
        optimizer.zero_grad()
        objective.sum().backward()
        optimizer.step()
        with torch.no_grad():
            reached = score(networks(validation[0]), validation[1])
            better = reached > best
            best = torch.where(better, reached, best)
            for keep, parameter in zip(kept, networks.parameters(), strict=True):
                keep[better] = parameter[better]
    with torch.no_grad():
        for keep, parameter in zip(kept, networks.parameters(), strict=True):
            parameter.copy_(keep)
    return best


def roc_auc(outputs: Tensor, y: Tensor) -> Tensor:
    """Area under the ROC curve of each column: the chance that a positive row outranks a negative one.

    Parameters
    ----------
    outputs : Tensor
        (n, R) scores, higher for outcome 1.
    y : Tensor
        (n, R) 0 or 1.

    Returns
    -------
    Tensor
        (R) in [0, 1], ties counted half; NaN where one outcome is missing.
    """
    ranks = torch.from_numpy(rankdata(outputs.detach().numpy(), axis=0))
    ones = y.double().sum(0)
    zeros = len(y) - ones
    return ((ranks * y).sum(0) - ones * (ones + 1) / 2) / (ones * zeros)


def lorenz(importance: Tensor) -> Tensor:
    """Lorenz curve of each row: which share of all importance the least important features hold.

    Parameters
    ----------
    importance : Tensor
        (R, P), not negative.

    Returns
    -------
    Tensor
        (R, P + 1) from 0 to 1; NaN where nothing matters.
    """
    total = importance.sort(1).values.cumsum(1)
    return F.pad(total / importance.sum(1, keepdim=True), (1, 0))


class Split(NamedTuple):
    """Standardized rows of R replicates: x (n, R, P) and y (n, R) for training, validation and test."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def split_table(table: Table, replicates: int, seed: int) -> Split:
    """Draw 100 training rows, 100 validation rows and the rest for the test, again and again.

    Parameters
    ----------
    table : Table
        The rows.
    replicates : int
        R.
    seed : int
        Seed of the draws.

    Returns
    -------
    Split
        Missing values are filled with the mean of the training rows, features scaled by their mean and deviation.

    Raises
    ------
    HarmonizeError
        Too few rows.

    References
    ----------
    Erion et al. 2021 (arXiv 1906.10670), methods of the NHANES experiment: 100 training rows, 100 for validation.
    """
    most = TRAIN_ROWS + VALIDATION_ROWS
    if len(table) < most + 50:
        raise HarmonizeError(
            f"{table.name}: {len(table)} rows: {most} for training and validation, 50 more for the test"
        )
    rng = np.random.default_rng(seed)
    columns = []
    for _ in range(replicates):
        order = rng.permutation(len(table))
        while (
            len(np.unique(table.outcome[order[:TRAIN_ROWS]])) * len(np.unique(table.outcome[order[TRAIN_ROWS:most]]))
            < 4
        ):
            order = rng.permutation(len(table))
        x, y = table.features[order], table.outcome[order]
        known = ~np.isnan(x[:TRAIN_ROWS])
        mean = np.where(known, x[:TRAIN_ROWS], 0).sum(0) / known.sum(0).clip(min=1)
        x = np.where(np.isnan(x), mean, x)
        deviation = x[:TRAIN_ROWS].std(0)
        columns.append(((x - mean) / np.where(deviation > 0, deviation, 1), y))
    features, outcomes = (torch.from_numpy(np.stack(part, 1)).float() for part in zip(*columns, strict=True))
    cuts = [TRAIN_ROWS, VALIDATION_ROWS, len(table) - most]
    return Split(*zip(features.split(cuts), outcomes.split(cuts), strict=True))


def sparsity_study(
    table: Table, replicates: int, weights: int, hidden: Sequence[int], epochs: int, seed: int
) -> dict[str, dict[str, Tensor]]:
    """Train every arm on the same splits, from the same weights, and measure what it predicts and what it uses.

    Parameters
    ----------
    table : Table
        The rows.
    replicates : int
        R splits.
    weights : int
        Weights of each penalty tried, evenly spaced in logarithm; a replicate takes the best by its validation AUC.
    hidden : Sequence[int]
        Widths of the hidden layers.
    epochs : int
        Full-batch steps; the best one by validation AUC is kept.
    seed : int
        Seed of splits, initial weights and draws.

    Returns
    -------
    dict[str, dict[str, Tensor]]
        Arm to ``auc`` (R) on the test rows, ``gini`` (R) and ``lorenz`` (R, P + 1) of the mean magnitude of expected
        gradients there, ``weight`` (R) chosen and ``edge`` (R) whether it was an end of the grid.

    References
    ----------
    Erion et al. 2021 (arXiv 1906.10670), section "Sparsity" and methods.

    Notes
    -----
    Departures: Adam at 3e-3 (the authors' code: Adam at 1e-3, the paper: SGD); k = 1 reference per row and step instead
    of 100; smaller networks and a coarser grid unless asked otherwise; the sparse group lasso covers all layers.
    """
    data = split_table(table, replicates, seed)
    fixed = {
        "version": VERSION,
        "data": sha256_tensors({"x": data.train[0], "y": data.test[1], "test": data.test[0]}),
        "hidden": list(hidden),
        "epochs": epochs,
        "seed": seed,
    }
    results = {}
    for arm in tqdm(SPARSITY_ARMS, desc="sparsity prior", mininterval=1):
        exponents = SPARSITY_ARMS[arm][1]
        grid = np.logspace(*exponents, weights).tolist() if SPARSITY_ARMS[arm][0] else [0.0]
        compute = partial(_sparsity_arm, data, arm, grid, hidden, epochs, seed)
        results[arm] = remember("sparsity-prior", fixed | {"arm": arm, "grid": grid}, compute)
    return results


def _sparsity_arm(
    data: Split, arm: str, grid: Sequence[float], hidden: Sequence[int], epochs: int, seed: int
) -> dict[str, Tensor]:
    replicates, features = data.train[0].shape[1:]
    networks, chosen, edge = tune(
        data.train,
        data.validation,
        [features, *hidden],
        F.binary_cross_entropy_with_logits,
        roc_auc,
        SPARSITY_ARMS[arm][0],
        grid,
        epochs,
        seed,
    )
    x, y = data.test
    with torch.no_grad():
        auc = roc_auc(networks(x), y)
    generator = torch.Generator().manual_seed(seed)
    importance = torch.zeros(replicates, features)
    x = x[:EVALUATION_ROWS]
    for rows in x.split(250):
        drawn = attributions(networks, rows, data.train[0], generator, samples=EVALUATION_SAMPLES)
        importance += drawn.detach().abs().sum(0) / len(x)
    gini = -torch.func.vmap(sparsity_prior)(importance[:, None])
    return {"auc": auc, "gini": gini, "lorenz": lorenz(importance), "weight": chosen, "edge": edge}


def tune(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    sizes: Sequence[int],
    loss: Callable[..., Tensor],
    score: Callable[[Tensor, Tensor], Tensor],
    penalty: Callable[..., Tensor] | None,
    grid: Sequence[float],
    epochs: int,
    seed: int,
    **own: Tensor,
) -> tuple[Perceptrons, Tensor, Tensor]:
    """Train every replicate with every weight of the penalty, in one go, and keep its best by validation.

    Parameters
    ----------
    train : tuple[Tensor, Tensor]
        x (n, R, P) and y (n, R).
    validation : tuple[Tensor, Tensor]
        Likewise.
    sizes : Sequence[int]
        See :class:`Perceptrons`.
    loss : Callable[..., Tensor]
        Takes outputs, y and ``reduction``.
    score : Callable[[Tensor, Tensor], Tensor]
        See :func:`fit`.
    penalty : Callable[..., Tensor] | None
        See :func:`fit`; takes ``own`` besides.
    grid : Sequence[float]
        W weights, ascending.
    epochs : int
        See :func:`fit`.
    seed : int
        See :func:`fit`; replicate r starts from weights of seed ``1000 * seed + r`` whatever the penalty.
    **own : Tensor
        (R, ...) what a replicate's penalty needs of its own.

    Returns
    -------
    tuple[Perceptrons, Tensor, Tensor]
        R networks; the weights (R) they were trained with; whether (R) an end of the grid was best.
    """
    replicates, many = train[0].shape[1], len(grid)

    def repeat(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0].repeat(1, many, 1), pair[1].repeat(1, many)

    seeds = [1000 * seed + r for r in range(replicates)]
    networks = Perceptrons(sizes, seeds * many)
    weights = torch.tensor(list(grid)).repeat_interleave(replicates)
    own = {name: torch.cat([value] * many) for name, value in own.items()}
    reached = fit(
        networks,
        repeat(train),
        repeat(validation),
        partial(loss, reduction="none"),
        score,
        partial(penalty, **own) if penalty is not None else None,
        weights,
        epochs,
        seed,
    )
    best = reached.view(many, replicates).argmax(0)
    picked = best * replicates + torch.arange(replicates)
    chosen = Perceptrons(sizes, seeds)
    chosen.load_state_dict({name: value[picked] for name, value in networks.state_dict().items()})
    edge = (best == 0) | (best == many - 1) if many > 1 else torch.zeros_like(best, dtype=torch.bool)
    return chosen, weights[picked], edge


def graph_penalty(
    networks: Perceptrons, x: Tensor, generator: torch.Generator, adjacency: Tensor, method: str = "expected_gradients"
) -> Tensor:
    """The graph prior of each network, on all its rows, with these rows as references.

    Parameters
    ----------
    networks : Perceptrons
        R networks.
    x : Tensor
        (n, R, P).
    generator : torch.Generator
        Where draws come from.
    adjacency : Tensor
        (R, P, P).
    method : str
        ``"expected_gradients"`` or ``"gradients"``.

    Returns
    -------
    Tensor
        (R).
    """
    return torch.func.vmap(graph_prior, (1, 0))(attributions(networks, x, x, generator, method), adjacency)


def _negative_error(outputs: Tensor, y: Tensor) -> Tensor:
    return -(outputs - y).square().mean(0)


def r_squared(outputs: Tensor, y: Tensor) -> Tensor:
    """Explained variance of each column.

    Parameters
    ----------
    outputs : Tensor
        (n, R).
    y : Tensor
        (n, R).

    Returns
    -------
    Tensor
        (R): 1 - sum of squared errors / sum of squares around the mean; NaN where y is constant.
    """
    return 1 - (outputs - y).square().sum(0) / (y - y.mean(0)).square().sum(0)


class GraphRecipe(NamedTuple):
    """How the graph study draws and trains: sizes of the simulation, of the network, and of the grid."""

    train_rows: int = 100
    validation_rows: int = 100
    test_rows: int = 1000
    noise: float = 1.0
    hidden: tuple[int, ...] = (64, 32)
    epochs: int = 200
    grid: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def graph_study(
    seeds: int, shares: Sequence[float], seed: int, recipe: GraphRecipe | None = None
) -> dict[str, dict[str, Tensor]]:
    """Fit simulated expression with the graph prior, with graphs more and more wrong, and without.

    Parameters
    ----------
    seeds : int
        R simulations, each with its own graph, effects and rows.
    shares : Sequence[float]
        Shares of rewired edges: 0 is the true graph, 1 a random one of as many edges.
    seed : int
        Seed of everything.
    recipe : GraphRecipe | None
        Sizes; None takes the defaults.

    Returns
    -------
    dict[str, dict[str, Tensor]]
        Arm to ``r2`` (R) on the test rows, ``weight`` (R) chosen and ``edge`` (R) whether it was an end of the grid.
        Arms: ``none``, ``ridge``, ``LASSO``, ``gradients`` (true graph, prior on gradients) and ``rewired S``.

    References
    ----------
    Erion et al. 2021 (arXiv 1906.10670), section "Graph attribution prior" and its controls.

    Notes
    -----
    Departures: simulated data; the prior acts from the first step on instead of in extra epochs, with k = 1 instead
    of 10 references; every arm chooses its weight and its epoch by validation error.
    """
    recipe = recipe or GraphRecipe()
    rngs = [np.random.default_rng([seed, i]) for i in range(seeds)]
    rows = [recipe.train_rows, recipe.validation_rows, recipe.test_rows]
    draws = [simulate_expression(sum(rows), rng, noise=recipe.noise) for rng in rngs]
    graphs = {
        share: torch.from_numpy(np.stack([rewire(d.adjacency, share, r) for d, r in zip(draws, rngs, strict=True)]))
        for share in shares
    }
    data = _expression_split(draws, rows)
    fixed = {
        "version": VERSION,
        "data": sha256_tensors({"x": data.train[0], "y": data.test[1]}),
        "recipe": [list(part) if isinstance(part, tuple) else part for part in recipe],
        "seed": seed,
    }
    true = graphs[0.0] if 0.0 in graphs else torch.from_numpy(np.stack([draw.adjacency for draw in draws]))
    arms: dict[str, tuple[Tensor | None, str]] = {"none": (None, ""), "gradients": (true, "gradients")}
    arms |= {f"rewired {share:g}": (graph, "expected_gradients") for share, graph in graphs.items()}
    results = {}
    for arm, (graph, method) in tqdm(arms.items(), desc="graph prior", mininterval=1):
        key = fixed | {"arm": arm, "graph": None if graph is None else sha256_tensors({"graph": graph})}
        results[arm] = remember("graph-prior", key, partial(_graph_arm, data, graph, method, recipe, seed))
    return results | {name: _linear_arm(data, name) for name in ("ridge", "LASSO")}


def _expression_split(draws: Sequence[Expression], rows: Sequence[int]) -> Split:
    x = torch.from_numpy(np.stack([draw.x for draw in draws], 1)).float()
    y = torch.from_numpy(np.stack([draw.y for draw in draws], 1)).float()
    y = y - y[: rows[0]].mean(0)
    return Split(*zip(x.split(list(rows)), y.split(list(rows)), strict=True))


def _graph_arm(data: Split, graph: Tensor | None, method: str, recipe: GraphRecipe, seed: int) -> dict[str, Tensor]:
    own = {} if graph is None else {"adjacency": graph.float()}
    networks, weight, edge = tune(
        data.train,
        data.validation,
        [data.train[0].shape[2], *recipe.hidden],
        F.mse_loss,
        _negative_error,
        None if graph is None else partial(graph_penalty, method=method),
        [0.0] if graph is None else recipe.grid,
        recipe.epochs,
        seed,
        **own,
    )
    with torch.no_grad():
        return {"r2": r_squared(networks(data.test[0]), data.test[1]), "weight": weight, "edge": edge}


def _linear_arm(data: Split, name: str) -> dict[str, Tensor]:
    kind, grid = (Ridge, np.logspace(-1, 4, 26)) if name == "ridge" else (Lasso, np.logspace(-3, 0, 26))
    r2, weight, edge = [], [], []
    for r in range(data.train[0].shape[1]):
        (x, y), (x_val, y_val), (x_test, y_test) = ((x[:, r].numpy(), y[:, r].numpy()) for x, y in data)
        fits = [kind(alpha=alpha, max_iter=20_000).fit(x, y) for alpha in grid]
        best = int(np.argmin([((model.predict(x_val) - y_val) ** 2).mean() for model in fits]))
        r2.append(fits[best].score(x_test, y_test))
        weight.append(grid[best])
        edge.append(best in (0, len(grid) - 1))
    return {"r2": torch.tensor(r2), "weight": torch.tensor(weight), "edge": torch.tensor(edge)}


def paired_table(results: Mapping[str, Mapping[str, Tensor]], ours: str, measures: Sequence[str]) -> pd.DataFrame:
    """One arm against every other, replicate by replicate.

    Parameters
    ----------
    results : Mapping[str, Mapping[str, Tensor]]
        Arm to measures (R).
    ours : str
        The arm that is compared.
    measures : Sequence[str]
        Which measures.

    Returns
    -------
    pd.DataFrame
        Columns ``measure``, ``arm``, ``mean``, ``low``, ``high``, ``n`` of the difference, ``t`` and ``p`` of
        the paired t test, and ``holm``: p adjusted over the arms of a measure.

    Notes
    -----
    Splits of one table share rows, so replicates are not independent and the intervals are narrower than they should
    be; the paper's t tests have the same flaw.
    """
    rows = []
    for measure in measures:
        mine = results[ours][measure].double().numpy()
        for arm in results:
            if arm != ours:
                other = results[arm][measure].double().numpy()
                interval = t_interval(mine - other)
                rows.append((measure, arm, *interval[:4], float(ttest_rel(mine, other).statistic), interval.p))
    table = pd.DataFrame(rows, columns=["measure", "arm", "mean", "low", "high", "n", "t", "p"])
    return table.assign(holm=table.groupby("measure")["p"].transform(holm))


def against_best(results: Mapping[str, Mapping[str, Tensor]], ours: str, measure: str) -> Interval:
    """One arm minus the best of the others by its mean, replicate by replicate.

    Parameters
    ----------
    results : Mapping[str, Mapping[str, Tensor]]
        Arm to measures (R).
    ours : str
        The arm that is compared.
    measure : str
        Higher is better.

    Returns
    -------
    Interval
        Difference with its t interval.
    """
    others = [values[measure].double() for arm, values in results.items() if arm != ours]
    best = max(others, key=lambda values: values.mean().item())
    return t_interval((results[ours][measure].double() - best).numpy())


def means(results: Mapping[str, Mapping[str, Tensor]], measures: Sequence[str]) -> pd.DataFrame:
    """Mean of every arm with its t interval over replicates.

    Parameters
    ----------
    results : Mapping[str, Mapping[str, Tensor]]
        Arm to measures (R), ``weight`` and ``edge`` among them.
    measures : Sequence[str]
        Which measures.

    Returns
    -------
    pd.DataFrame
        One row per arm: ``arm``, per measure its mean and ``_low``, ``_high``, ``n``, the median ``weight`` and the
        share of replicates whose weight was an end of the grid.
    """
    rows = []
    for arm, values in results.items():
        row: dict[str, object] = {"arm": arm}
        for measure in measures:
            interval = t_interval(values[measure].double().numpy())
            row |= {measure: interval.mean, f"{measure}_low": interval.low, f"{measure}_high": interval.high}
        row |= {"n": len(values["weight"]), "weight": values["weight"].double().median().item()}
        rows.append(row | {"at_edge": values["edge"].double().mean().item()})
    return pd.DataFrame(rows)


def lorenz_table(results: Mapping[str, Mapping[str, Tensor]]) -> pd.DataFrame:
    """Mean Lorenz curve of every arm.

    Parameters
    ----------
    results : Mapping[str, Mapping[str, Tensor]]
        From :func:`sparsity_study`.

    Returns
    -------
    pd.DataFrame
        Columns ``arm``, ``features`` (share, least important first), ``mean``, ``low``, ``high`` of their share of all
        importance.
    """
    rows = []
    for arm, values in results.items():
        points = values["lorenz"].shape[1] - 1
        for i, column in enumerate(values["lorenz"].double().numpy().T):
            rows.append((arm, i / points, *t_interval(column)[:3]))
    return pd.DataFrame(rows, columns=["arm", "features", "mean", "low", "high"])


def sparsity_claims(results: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Interval]:
    """What the ledger asks of the sparsity prior.

    Parameters
    ----------
    results : Mapping[str, Mapping[str, Tensor]]
        From :func:`sparsity_study`.

    Returns
    -------
    dict[str, Interval]
        Claim id to what was measured.
    """
    return {f"prior_sparsity_{measure}": against_best(results, OURS, measure) for measure in ("auc", "gini")}


def graph_claims(results: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Interval]:
    """What the ledger asks of the graph prior.

    Parameters
    ----------
    results : Mapping[str, Mapping[str, Tensor]]
        From :func:`graph_study`.

    Returns
    -------
    dict[str, Interval]
        Claim id to what was measured; n = 0 without the true or the random graph.
    """
    nothing = Interval(np.nan, np.nan, np.nan, 0)
    measured = {}
    for claim, other in (("prior_graph", "none"), ("prior_graph_random", RANDOM_GRAPH)):
        there = TRUE_GRAPH in results and other in results
        measured[claim] = (
            t_interval((results[TRUE_GRAPH]["r2"] - results[other]["r2"]).double().numpy()) if there else nothing
        )
    return measured


def graph_in_words(results: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Say what the graph prior gains, and what a random graph does.

    Parameters
    ----------
    results : Mapping[str, Mapping[str, Tensor]]
        From :func:`graph_study`.

    Returns
    -------
    str
        Markdown: paired differences of R² over simulations, and how often a weight was an end of its grid.
    """
    pairs = [(TRUE_GRAPH, "none"), (RANDOM_GRAPH, "none"), (TRUE_GRAPH, "ridge"), (TRUE_GRAPH, "LASSO")]
    lines = []
    for ours, other in pairs:
        if ours in results and other in results:
            i = t_interval((results[ours]["r2"] - results[other]["r2"]).double().numpy())
            numbers = f"{i.mean:+.4f} [{i.low:+.4f}, {i.high:+.4f}], n = {i.n}, p = {i.p:.2g}"
            lines.append(f"- R², {_graph_name(ours)} minus {_graph_name(other)}: {numbers}")
    ends = {arm: values["edge"].double().mean().item() for arm, values in results.items() if arm != "none"}
    shown = ", ".join(f"{_graph_name(arm)} {share:.0%}" for arm, share in ends.items())
    return "\n".join([*lines, f"- weight at an end of what was tried, share of simulations: {shown}"])


def draw_graph(results: Mapping[str, Mapping[str, Tensor]]) -> tuple[Figure, pd.DataFrame]:
    """R² over the share of wrong edges, and what the true graph wins against each other arm.

    Parameters
    ----------
    results : Mapping[str, Mapping[str, Tensor]]
        From :func:`graph_study`.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure and both tables.
    """
    table = means(results, ["r2"])
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 3.4), width_ratios=(1.1, 1))
    by_share = table[table["arm"].str.startswith("rewired")]
    share = by_share["arm"].str.removeprefix("rewired ").astype(float)
    axes[0].plot(share, by_share["r2"], "o-", ms=4, lw=1.3, label="graph prior on expected gradients")
    axes[0].fill_between(share, by_share["r2_low"], by_share["r2_high"], alpha=0.15, lw=0)
    others = table[~table["arm"].str.startswith("rewired")]
    for row, dash in zip(others.to_dict("records"), ("-", "--", "-.", ":"), strict=True):
        axes[0].axhline(row["r2"], color="0.35", ls=dash, lw=1, label=_graph_name(row["arm"]))
    axes[0].set(title="Graph prior and the graph's truth", xlabel="share of edges rewired", ylabel="R² on test samples")
    axes[0].legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    differences = paired_table(results, TRUE_GRAPH, ["r2"]) if TRUE_GRAPH in results else pd.DataFrame()
    if len(differences):
        named = differences.assign(arm=differences["arm"].map(_graph_name))
        plots.forest(axes[1], named, "arm", "True graph minus …", "difference of R², paired")
    return figure, pd.concat([table.assign(part="means"), differences.assign(part="true graph minus arm")])


def _graph_name(arm: str) -> str:
    share = float(arm.removeprefix("rewired ")) if arm.startswith("rewired") else 0.0
    names = {
        "none": "no prior",
        "gradients": "true graph, on gradients",
        TRUE_GRAPH: "true graph",
        RANDOM_GRAPH: "random graph",
    }
    return names.get(arm, f"{share:.0%} of edges rewired" if share else arm)


def draw_sparsity(results: Mapping[str, Mapping[str, Tensor]]) -> tuple[Figure, pd.DataFrame]:
    """ROC-AUC against the Gini coefficient, and the Lorenz curves.

    Parameters
    ----------
    results : Mapping[str, Mapping[str, Tensor]]
        From :func:`sparsity_study`.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure and both tables.
    """
    table = means(results, ["auc", "gini"])
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 3.2))
    points = table.rename(columns={"auc": "mean", "auc_low": "low", "auc_high": "high"})
    plots.trade_off(axes[0], points, "gini", "arm", "Prediction and sparsity")
    axes[0].set(xlabel="Gini coefficient of mean |EG|", ylabel="test ROC-AUC")
    curves = lorenz_table(results)
    plots.curves(axes[1], curves, "features", "arm", "Lorenz curves of importance")
    axes[1].plot([0, 1], [0, 1], color="0.6", lw=0.8)
    axes[1].set(xlabel="share of features, least important first", ylabel="share of all importance")
    axes[1].legend(fontsize=6, loc="upper left")
    return figure, pd.concat([table.assign(part="means"), curves.assign(part="Lorenz curve")])


def draw_paired(results: Mapping[str, Mapping[str, Tensor]]) -> tuple[Figure, pd.DataFrame]:
    """What the sparsity prior wins against every other arm, in AUC and in Gini.

    Parameters
    ----------
    results : Mapping[str, Mapping[str, Tensor]]
        From :func:`sparsity_study`.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure and its table.
    """
    table = paired_table(results, OURS, ["auc", "gini"])
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.2), sharey=True)
    for ax, (measure, part) in zip(axes, table.groupby("measure", sort=False), strict=True):
        name = {"auc": "ROC-AUC", "gini": "Gini"}[str(measure)]
        plots.forest(ax, part, "arm", f"{name}: sparsity prior minus …", f"difference of {name}, paired")
    return figure, table


def in_words(table: pd.DataFrame) -> str:
    """Say a paired table as a list.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`paired_table`.

    Returns
    -------
    str
        Markdown, one line per row.
    """
    names = {"auc": "ROC-AUC", "gini": "Gini", "r2": "R²"}
    return "\n".join(
        f"- {names[row.measure]}, sparsity prior minus {row.arm}: {row.mean:+.4f} [{row.low:+.4f}, {row.high:+.4f}], "
        f"n = {row.n}, t = {row.t:.2f}, p = {row.holm:.2g} (Holm)"
        for row in table.itertuples()
    )


def facts(graph: Mapping[str, Mapping[str, Tensor]], sparse: Mapping[str, Mapping[str, Tensor]]) -> dict[str, bool]:
    """What must hold for the graph and the sparsity prior's comparisons to mean anything.

    Parameters
    ----------
    graph : Mapping[str, Mapping[str, Tensor]]
        From :func:`graph_study`.
    sparse : Mapping[str, Mapping[str, Tensor]]
        From :func:`sparsity_study`.

    Returns
    -------
    dict[str, bool]
        Statement to whether it holds.
    """
    fits = t_interval(graph["none"]["r2"].double().numpy())
    predicts = t_interval(sparse["none"]["auc"].double().numpy() - 0.5)
    gini = t_interval((sparse[OURS]["gini"] - sparse["none"]["gini"]).double().numpy())
    return {
        "graph prior: without a prior the network explains some of the response": fits.low > 0,
        "sparsity prior: without a penalty the network predicts better than chance": predicts.low > 0,
        "sparsity prior: importance is more concentrated than without": gini.low > 0,
    }
