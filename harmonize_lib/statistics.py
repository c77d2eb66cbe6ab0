"""Intervals and tests for per-sample values: percentile bootstrap, sign-flip permutation, Holm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, t

from harmonize_lib.errors import HarmonizeError

_BLOCK = 2_000_000


class Interval(NamedTuple):
    """A mean with its interval: NaN where undefined; ``n`` values went in; ``p`` is None without a test."""

    mean: float
    low: float
    high: float
    n: int
    p: float | None = None


def bootstrap_interval(
    values: ArrayLike,
    seed: int,
    level: float = 0.95,
    n_resamples: int = 2000,
    clusters: ArrayLike | None = None,
) -> Interval:
    """Mean of per-sample values with a percentile bootstrap interval.

    Parameters
    ----------
    values : ArrayLike
        (N) numbers; NaN means undefined and is left out.
    seed : int
        Seed of the resampling.
    level : float
        Coverage of the interval, in (0, 1).
    n_resamples : int
        Bootstrap resamples, at least 1.
    clusters : ArrayLike | None
        (N) labels; whole clusters are resampled, with all their values. None: each value by itself.

    Returns
    -------
    Interval
        ``mean`` is NaN if no value is left; ``low`` and ``high`` are NaN for fewer than two values
        (clusters).

    Raises
    ------
    HarmonizeError
        If the values are not one-dimensional, the clusters do not match, or an option is out of range.

    References
    ----------
    Efron, Tibshirani 1993, An Introduction to the Bootstrap, section 13.3 (percentile interval).
    """
    sums, counts = _clustered(_vector("values", values), clusters)
    return _bootstrap(sums, counts, np.random.default_rng(seed), level, n_resamples)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    seed: int,
    level: float = 0.95,
    n_resamples: int = 2000,
    clusters: ArrayLike | None = None,
) -> Interval:
    """Mean of ``a - b`` with its bootstrap interval and a two-sided p-value.

    Parameters
    ----------
    a : ArrayLike
        (N) numbers; a pair with a NaN on either side is left out.
    b : ArrayLike
        (N) numbers of the same samples in the same order.
    seed : int
        Seed of the resampling and of the sign flips.
    level : float
        Coverage of the interval, in (0, 1).
    n_resamples : int
        Bootstrap resamples, and random sign flips; at least 1.
    clusters : ArrayLike | None
        (N) labels; clusters are resampled and flipped as a whole. None: each pair by itself.

    Returns
    -------
    Interval
        Mean, low, high as :func:`bootstrap_interval` gives them for ``a - b``; ``p`` is NaN if no pair is
        left.

    Raises
    ------
    HarmonizeError
        If the inputs do not match or an option is out of range.

    Notes
    -----
    p is the sign-flip permutation test of "the differences are symmetric about 0", statistic |mean(a - b)|.
    All 2^G flips of the G clusters are counted when there are at most ``n_resamples`` of them (p is exact, at
    least 2/2^G); otherwise ``n_resamples`` random flips are drawn and p = (1 + hits) / (1 + n_resamples). The
    interval and p come from different procedures, so near the level they may disagree.

    References
    ----------
    Good 2005, Permutation, Parametric and Bootstrap Tests of Hypotheses. Phipson, Smyth 2010, Permutation
    p-values should never be zero (the added 1).
    """
    a, b = _vector("a", a), _vector("b", b)
    if len(a) != len(b):
        raise HarmonizeError(f"a has {len(a)} values and b has {len(b)}: paired values come in equal numbers")
    rng = np.random.default_rng(seed)
    sums, counts = _clustered(a - b, clusters)
    interval = _bootstrap(sums, counts, rng, level, n_resamples)
    return interval._replace(p=_sign_flip(sums, rng, n_resamples))


def t_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of few independent values, e.g. one per seed, with Student's interval and the p-value of "the mean is 0".

    Parameters
    ----------
    values : ArrayLike
        (N) numbers, or differences of pairs; NaN is left out.
    level : float
        Coverage of the interval, in (0, 1).

    Returns
    -------
    Interval
        ``low``, ``high`` and ``p`` are NaN for fewer than two values.

    References
    ----------
    Student 1908, The probable error of a mean. With a handful of values the percentile bootstrap is too narrow.
    """
    vector = _vector("values", values)
    vector = vector[~np.isnan(vector)]
    n = len(vector)
    if n < 2:
        return Interval(float(vector.mean()) if n else np.nan, np.nan, np.nan, n, np.nan)
    mean, error = float(vector.mean()), float(vector.std(ddof=1) / np.sqrt(n))
    half = float(t.ppf((1 + level) / 2, n - 1)) * error
    p = 2 * float(t.sf(abs(mean) / error, n - 1)) if error > 0 else float(mean == 0)
    return Interval(mean, mean - half, mean + half, n, p)


def share_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's interval of a share; it has a width where all or none succeed.

    Parameters
    ----------
    successes : int
        How many of the trials did.
    n : int
        Independent trials, at least 1.
    level : float
        Coverage.

    Returns
    -------
    Interval
        The share, and n.
    """
    low, high = binomtest(successes, n).proportion_ci(level, method="wilson")
    return Interval(successes / n, float(low), float(high), n)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Adjust a family of p-values for multiple comparisons (step-down Bonferroni).

    Parameters
    ----------
    p_values : ArrayLike
        (N) p-values in [0, 1]; NaN means not tested: it stays NaN and does not count in the family.

    Returns
    -------
    NDArray[np.float64]
        (N) adjusted p-values in the given order: max over j <= i of (n - j) p_(j), j from 0, at most 1.

    Raises
    ------
    HarmonizeError
        If a p-value lies outside [0, 1].

    References
    ----------
    Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    p = _vector("p_values", p_values)
    tested = np.flatnonzero(~np.isnan(p))
    if ((p[tested] < 0) | (p[tested] > 1)).any():
        raise HarmonizeError("p_values has entries outside [0, 1]")
    order = tested[np.argsort(p[tested], kind="stable")]
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return adjusted


def _vector(name: str, values: ArrayLike) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise HarmonizeError(f"{name} has shape {vector.shape}: give one number per sample, shape (N,)")
    return vector


def _clustered(
    values: NDArray[np.float64], clusters: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and count of the defined values of each cluster, (G) and (G)."""
    defined = ~np.isnan(values)
    if clusters is None:
        return values[defined], np.ones(defined.sum())
    labels = np.asarray(clusters)
    if labels.shape != values.shape:
        raise HarmonizeError(f"clusters has shape {labels.shape}: give one label for each of {len(values)} values")
    _, index = np.unique(labels[defined], return_inverse=True)
    sums, counts = np.bincount(index, values[defined]), np.bincount(index)
    return sums.astype(np.float64), counts.astype(np.float64)


def _bootstrap(
    sums: NDArray[np.float64],
    counts: NDArray[np.float64],
    rng: np.random.Generator,
    level: float,
    n_resamples: int,
) -> Interval:
    if not 0 < level < 1:
        raise HarmonizeError(f"level={level} is out of range: give a coverage between 0 and 1, such as 0.95")
    if n_resamples < 1:
        raise HarmonizeError(f"n_resamples={n_resamples} is out of range: give at least 1, such as 2000")
    n, groups = int(counts.sum()), len(sums)
    if groups < 2:
        return Interval(float(sums.sum() / n) if n else np.nan, np.nan, np.nan, n)
    means = []
    for rows in _blocks(n_resamples, groups):
        drawn = rng.integers(groups, size=(rows, groups))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(sums.sum() / n), float(low), float(high), n)


def _sign_flip(sums: NDArray[np.float64], rng: np.random.Generator, n_resamples: int) -> float:
    groups = len(sums)
    if groups == 0:
        return np.nan
    observed = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()
    if 2**groups <= n_resamples:
        flips = np.arange(2**groups)[:, None] >> np.arange(groups) & 1
        return float((np.abs((1 - 2 * flips) @ sums) >= observed).mean())
    hits = 0
    for rows in _blocks(n_resamples, groups):
        flips = rng.integers(2, size=(rows, groups), dtype=np.int8)
        hits += int((np.abs(sums.sum() - 2 * (flips @ sums)) >= observed).sum())
    return (1 + hits) / (1 + n_resamples)


def _blocks(rows: int, columns: int) -> list[int]:
    """Split ``rows`` into pieces of at most ``_BLOCK`` entries each, to bound memory."""
    step = max(1, _BLOCK // columns)
    return [min(step, rows - start) for start in range(0, rows, step)]


def summarize(table: pd.DataFrame, by: Sequence[str], value: str, seed: int, unit: str = "image") -> pd.DataFrame:
    """Mean and interval of a per-sample table, group by group; the sample is the image.

    Parameters
    ----------
    table : pd.DataFrame
        Long table with one row per image and whatever else varies.
    by : Sequence[str]
        Columns that make the groups; within a group, rows of one image are averaged first.
    value : str
        Column of numbers; NaN is left out.
    seed : int
        Seed of the bootstrap, the same for every group: groups of the same images share their resamples.
    unit : str
        Column that names the image.

    Returns
    -------
    pd.DataFrame
        Columns ``by`` (categories and their order are kept), ``mean``, ``low``, ``high``, ``n``.
    """
    per_unit = table.groupby([*by, unit], observed=True, sort=True)[value].mean()
    rows = []
    for group, values in per_unit.groupby(level=list(range(len(by))), observed=True, sort=False):
        names = group if isinstance(group, tuple) else (group,)
        rows.append((*names, *bootstrap_interval(values.to_numpy(float), seed)[:4]))
    result = pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "n"])
    return result.astype({name: table[name].dtype for name in by if isinstance(table[name].dtype, pd.CategoricalDtype)})


def ratio_interval(
    numerator: ArrayLike, denominator: ArrayLike, seed: int, level: float = 0.95, n_resamples: int = 2000
) -> Interval:
    """Ratio of two means over the same samples, with a percentile bootstrap interval.

    Parameters
    ----------
    numerator : ArrayLike
        (N) numbers; a pair with a NaN on either side is left out.
    denominator : ArrayLike
        (N) numbers of the same samples.
    seed : int
        Seed of the resampling.
    level : float
        Coverage of the interval, in (0, 1).
    n_resamples : int
        Bootstrap resamples.

    Returns
    -------
    Interval
        mean(numerator) / mean(denominator); NaN with n = 0 where nothing is left or the mean of the denominator is 0.

    References
    ----------
    Efron, Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile interval).
    """
    pairs = np.column_stack([_vector("numerator", numerator), _vector("denominator", denominator)])
    pairs = pairs[~np.isnan(pairs).any(axis=1)]
    n = len(pairs)
    if n == 0 or pairs[:, 1].mean() == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    top, bottom = (weights @ pairs).T
    low, high = np.quantile(top / bottom, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(pairs[:, 0].mean() / pairs[:, 1].mean()), float(low), float(high), n)


def cross_fitted_best(
    values: NDArray[np.float64], seed: int, judges: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """What the best of several candidates scores, chosen on one half of the images and scored on the other.

    Parameters
    ----------
    values : NDArray[np.float64]
        (S, N) scores of S candidates, higher is better; NaN is left out of the choice.
    seed : int
        Of the split: of every two neighboring images one goes to each half, at random.
    judges : NDArray[np.float64] | None
        (S, N) scores that choose; None takes ``values`` themselves.

    Returns
    -------
    NDArray[np.float64]
        (N) for each half, the scores of the candidate that the other half ranks highest by its mean. NaN where the
        other half has no score to choose by.

    Notes
    -----
    The best of several noisy means, scored on the images that chose it, looks better than it is (the winner's curse);
    chosen on other images it does not.
    """
    n = values.shape[1]
    rng = np.random.default_rng(seed)
    half = (np.arange(n) + np.repeat(rng.integers(2, size=(n + 1) // 2), 2)[:n]) % 2 == 1
    best = np.full(n, np.nan)
    for scored in (half, ~half):
        choosing = (values if judges is None else judges)[:, ~scored]
        defined = ~np.isnan(choosing)
        count = defined.sum(1)
        if count.any():
            means = np.where(count > 0, np.where(defined, choosing, 0).sum(1) / np.maximum(count, 1), -np.inf)
            best[scored] = values[means.argmax(), scored]
    return best
