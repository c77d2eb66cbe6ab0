"""Tables with a yes-or-no outcome, real or the user's own, and a simulation of gene expression on a known graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harmonize_lib.errors import HarmonizeError, unknown

TABLES = ("diabetes", "breast_cancer", "csv")
LEAST_ROWS = 50


@dataclass(frozen=True)
class Table:
    """Rows of features with an outcome of 0 or 1.

    Attributes
    ----------
    features : NDArray[np.float64]
        (n, P); NaN where a value is missing.
    outcome : NDArray[np.int64]
        (n) 0 or 1.
    names : tuple[str, ...]
        P feature names.
    name : str
        What was loaded, without its folder.
    meaning : str
        What an outcome of 1 means.
    excluded : dict[str, int]
        Rows left out, by reason.
    """

    features: NDArray[np.float64]
    outcome: NDArray[np.int64]
    names: tuple[str, ...]
    name: str
    meaning: str
    excluded: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.outcome)


def load_table(spec: str, outcome: str = "", horizon: float = 0.0) -> Table:
    """Load a table by name.

    Parameters
    ----------
    spec : str
        ``"diabetes"`` or ``"breast_cancer"`` (they come with scikit-learn), or ``"csv:FILE"`` or ``"csv:FILE,FILE"``,
        the columns of the second file beside those of the first.
    outcome : str
        For CSV files: the column of the outcome; all others are features.
    horizon : float
        0: the outcome is 0 or 1. Above: the outcome is a time of follow-up, positive up to the event and negative up
        to censoring, and becomes "event within the horizon"; rows censored before it are left out and counted.

    Returns
    -------
    Table
        The table; every row of the source is in it or counted as excluded.

    Raises
    ------
    HarmonizeError
        Unknown name; a file that is missing or no CSV; a column that is missing, double, constant or no number; an
        outcome that is neither; fewer than 50 rows, or one outcome only.

    References
    ----------
    Efron et al. 2004 (Least Angle Regression), section 1: diabetes, its 10 variables with 9 squares and 45 products
    make 64. Street et al. 1993: breast cancer, 30 features of cell nuclei.

    Notes
    -----
    The schema of a CSV: a header of unique names; numbers, empty where missing; no infinite values. A first column
    without a name that counts the rows is taken for their index and dropped.
    """
    kind, _, files = spec.partition(":")
    if kind not in TABLES:
        raise unknown("table", kind, TABLES)
    if kind == "csv":
        return _check(_csv(files, outcome, horizon))
    if outcome or horizon:
        raise HarmonizeError(f"table {kind!r} has its own outcome: leave outcome and horizon out, or give csv:FILE")
    return _diabetes() if kind == "diabetes" else _breast_cancer()


def _diabetes() -> Table:
    from sklearn.datasets import load_diabetes

    data = load_diabetes(scaled=False)
    names = [str(name) for name in data.feature_names]
    x = (data.data - data.data.mean(0)) / data.data.std(0)
    columns = {name: x[:, i] for i, name in enumerate(names)}
    columns |= {f"{name}^2": x[:, i] ** 2 for i, name in enumerate(names) if len(np.unique(x[:, i])) > 2}
    columns |= {f"{a} * {b}": columns[a] * columns[b] for a, b in combinations(names, 2)}
    above = (data.target > np.median(data.target)).astype(np.int64)
    meaning = "disease progression after a year above the median"
    return Table(np.stack(list(columns.values()), 1), above, tuple(columns), "diabetes", meaning)


def _breast_cancer() -> Table:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    malignant = (data.target == list(data.target_names).index("malignant")).astype(np.int64)
    return Table(data.data, malignant, tuple(map(str, data.feature_names)), "breast_cancer", "malignant tumor")


def _csv(files: str, outcome: str, horizon: float) -> Table:
    parts = [_read(Path(file.strip()).expanduser()) for file in files.split(",") if file.strip()]
    if not parts:
        raise HarmonizeError("table 'csv' needs a file: write 'csv:FILE' or 'csv:FILE,FILE'")
    name = " and ".join(Path(file.strip()).name for file in files.split(","))
    if len({len(part) for part in parts}) > 1:
        counts = " and ".join(str(len(part)) for part in parts)
        raise HarmonizeError(f"{name}: {counts} rows: files side by side must have the same rows")
    frame = pd.concat(parts, axis=1)
    double = frame.columns[frame.columns.duplicated()]
    if len(double):
        raise HarmonizeError(f"{name}: column {double[0]!r} occurs twice: give every column a name of its own")
    if outcome not in frame.columns:
        raise unknown(f"outcome column of {name}", outcome, frame.columns)
    numbers = frame.apply(lambda column: _numbers(column, name))
    y = numbers.pop(outcome)
    if y.isna().any():
        line = f"{name}: outcome {outcome!r} is empty in row {int(y.isna().argmax()) + 2}"
        raise HarmonizeError(f"{line}: every row needs an outcome")
    meaning, excluded, keep = f"{outcome} = 1", {}, np.ones(len(y), dtype=bool)
    if horizon > 0:
        keep = ~((y <= 0) & (y > -horizon)).to_numpy()
        event = (y > 0) & (y <= horizon)
        excluded = {"no follow-up": int((y == 0).sum()), f"censored within {horizon:g}": int((~keep & (y < 0)).sum())}
        meaning, y = f"{outcome}: event within {horizon:g}", event.astype(float)
    if not y.isin([0, 1]).all():
        wrong = y[~y.isin([0, 1])].iloc[0]
        raise HarmonizeError(f"{name}: outcome {outcome!r} has the value {wrong:g}: 0 or 1, or a time with a horizon")
    return Table(
        numbers.to_numpy(float)[keep], y.to_numpy(np.int64)[keep], tuple(numbers.columns), name, meaning, excluded
    )


def _read(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise HarmonizeError(f"{path}: no such file: give the path of a CSV") from None
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        line = str(error).splitlines()[0][:60]
        raise HarmonizeError(f"{path.name}: not a readable CSV ({line}): separate columns by commas") from None
    first = frame.columns[0]
    if str(first).startswith("Unnamed") and frame[first].tolist() == [str(i) for i in range(len(frame))]:
        frame = frame.drop(columns=first)
    return frame


def _numbers(column: pd.Series, file: str) -> pd.Series:
    missing = column.str.strip().str.lower().isin(["", "na", "nan"])
    numbers = pd.to_numeric(column.mask(missing), errors="coerce")
    wrong = (numbers.isna() & ~missing) | np.isinf(numbers)
    if wrong.any():
        row = int(wrong.argmax())
        line = f"{file}: column {column.name!r} has {column.iloc[row][:30]!r} in row {row + 2}"
        raise HarmonizeError(f"{line}: columns hold finite numbers, or nothing where missing")
    return numbers


def _check(table: Table) -> Table:
    if len(table) < LEAST_ROWS:
        raise HarmonizeError(f"{table.name}: {len(table)} rows are left: at least {LEAST_ROWS} are needed")
    if len(np.unique(table.outcome)) < 2:
        raise HarmonizeError(f"{table.name}: every outcome is {table.outcome[0]}: both 0 and 1 must occur")
    for values, name in zip(table.features.T, table.names, strict=True):
        if len(np.unique(values[~np.isnan(values)])) < 2:
            raise HarmonizeError(f"{table.name}: column {name!r} is empty or constant: remove it")
    return table


class Expression(NamedTuple):
    """Simulated gene expression: ``x`` (n, P), ``y`` (n), ``adjacency`` (P, P), ``effects`` (P)."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    adjacency: NDArray[np.float64]
    effects: NDArray[np.float64]


def simulate_expression(
    n: int,
    rng: np.random.Generator,
    genes: int = 100,
    modules: int = 20,
    drivers: int = 4,
    coupling: float = 0.5,
    noise: float = 1.0,
) -> Expression:
    """Draw expression whose partial correlations, and a response whose causes, follow a known graph.

    x ~ N(0, (I + c L)^-1), scaled to variance 1, with L the graph's Laplacian: genes are dependent given all others
    exactly where an edge is. y = sum_i b_i relu(x_i), scaled to variance 1, + noise: b_i is one number, up to a fifth,
    on each driver module, with a random sign, and 0 elsewhere.

    Parameters
    ----------
    n : int
        Samples.
    rng : np.random.Generator
        Where everything is drawn from.
    genes : int
        P, a multiple of ``modules``.
    modules : int
        Groups of genes: each a ring whose other pairs are joined with probability 1/2; no edge leaves a module.
    drivers : int
        Modules that act on the response.
    coupling : float
        c, at least 0: how much neighbors share.
    noise : float
        Standard deviation of the noise; the signal's is 1.

    Returns
    -------
    Expression
        The draw, its graph and its effects.

    Raises
    ------
    HarmonizeError
        Numbers that do not fit each other.

    References
    ----------
    This project's stand-in for the drug response data of Erion et al. 2021 (arXiv 1906.10670), which are not public
    in one piece.
    """
    size = genes // max(modules, 1)
    if modules < 1 or genes != size * modules or size < 3 or not 0 <= drivers <= modules:
        raise HarmonizeError(
            f"{genes} genes in {modules} modules with {drivers} drivers: modules are equal, of 3 or more"
        )
    adjacency = np.zeros((genes, genes))
    for start in range(0, genes, size):
        for i, j in combinations(range(size), 2):
            if j - i in (1, size - 1) or rng.random() < 0.5:
                adjacency[start + i, start + j] = adjacency[start + j, start + i] = 1
    covariance = np.linalg.inv(np.eye(genes) + coupling * (np.diag(adjacency.sum(1)) - adjacency))
    x = rng.standard_normal((n, genes)) @ np.linalg.cholesky(covariance).T
    x /= np.sqrt(np.diag(covariance))
    effects = np.zeros(genes)
    for module in rng.choice(modules, drivers, replace=False):
        chosen = slice(module * size, (module + 1) * size)
        effects[chosen] = rng.choice([-1, 1]) * rng.uniform(0.8, 1.2, size)
    signal = np.maximum(x, 0) @ effects
    y = signal / max(signal.std(), 1e-12) + noise * rng.standard_normal(n)
    return Expression(x, y, adjacency, effects)


def rewire(adjacency: NDArray[np.float64], share: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Move a share of a graph's edges to pairs that had none.

    Parameters
    ----------
    adjacency : NDArray[np.float64]
        (P, P) symmetric, 0 or 1.
    share : float
        In [0, 1]; 1 leaves a random graph without a single true edge.
    rng : np.random.Generator
        Which edges, and where to.

    Returns
    -------
    NDArray[np.float64]
        (P, P) with as many edges.
    """
    upper = np.triu_indices(len(adjacency), 1)
    edges = adjacency[upper].copy()
    there, free = np.flatnonzero(edges), np.flatnonzero(edges == 0)
    moved = round(share * len(there))
    edges[rng.choice(there, moved, replace=False)] = 0
    edges[rng.choice(free, moved, replace=False)] = 1
    result = np.zeros_like(adjacency)
    result[upper] = edges
    return result + result.T
