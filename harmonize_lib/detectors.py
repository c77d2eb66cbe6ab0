"""Attributions as feature detectors: scored against exact masks and by faithfulness, against controls, and ranked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import pandera.pandas as pa
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from torch import Tensor
from tqdm import tqdm

from harmonize_lib import parameters
from harmonize_lib.data import Dataset
from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.faithfulness import area, deletion, insertion, road
from harmonize_lib.features import rank_bounds
from harmonize_lib.localization import average_precision, mask_iou, pointing_game, relevance_mass, relevance_rank
from harmonize_lib.models import Model
from harmonize_lib.statistics import Interval, holm, paired_difference
from harmonize_lib.storage import remember, sha256_tensors

CONTROLS = parameters.CONTROLS
LOCALIZATION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relevance_mass": relevance_mass,
    "relevance_rank": relevance_rank,
    "pointing_game": pointing_game,
    "mask_iou": mask_iou,
    "average_precision": average_precision,
}
FAITHFULNESS = ("insertion", "deletion", "road")
LOWER_IS_BETTER = ("deletion",)
CURVES: dict[str, Callable[..., Tensor]] = {
    "insertion": insertion,
    "deletion": deletion,
    "road_morf": partial(road, order="morf", score="correct"),
    "road_lerf": partial(road, order="lerf", score="correct"),
}
NO_MODEL = "none"
LOCALIZATION_VERSION = 1
CURVES_VERSION = 1
NEAR = 0.01  # of a pixel: recalls come in float32

SCHEMA = pa.DataFrameSchema(
    {
        "model": pa.Column("category", coerce=True),
        "method": pa.Column("category", coerce=True),
        "image": pa.Column("category", coerce=True),
        "metric": pa.Column("category", pa.Check.isin([*LOCALIZATION, *FAITHFULNESS]), coerce=True),
        "value": pa.Column(float, pa.Check.in_range(-1, 1), nullable=True, coerce=True),
    },
    checks=pa.Check(
        lambda table: not table.duplicated(["model", "method", "image", "metric"]).any(), name="one row per cell"
    ),
    strict=True,
)

Maps = Mapping[tuple[str, str], Tensor]


def localization_table(maps: Maps, dataset: Dataset) -> pd.DataFrame:
    """Score every map against the exact masks, image by image; computed once and kept in the store.

    Parameters
    ----------
    maps : Maps
        (model, method) to maps (N, H, W); controls under the model ``NO_MODEL``.
    dataset : Dataset
        N images with masks.

    Returns
    -------
    pd.DataFrame
        ``SCHEMA``, metrics ``LOCALIZATION``, each in [0, 1], higher better; undefined is NaN.

    Raises
    ------
    HarmonizeError
        The data set has no masks.
    """
    masks = dataset.masks
    if masks is None:
        raise HarmonizeError(f"{dataset.name} has no masks: localization needs them; faithfulness does not")
    known = sha256_tensors({"masks": masks})
    parts = []
    for (model, method), values in tqdm(maps.items(), desc="localization", mininterval=1):
        key = {"version": LOCALIZATION_VERSION, "masks": known, "maps": sha256_tensors({"maps": values})}
        scores = remember("localization", key, partial(_localize, values, masks))
        parts += [_rows(model, method, dataset.ids, metric, scores[metric]) for metric in LOCALIZATION]
    return SCHEMA.validate(pd.concat(parts, ignore_index=True))


def _localize(maps: Tensor, masks: Tensor) -> dict[str, Tensor]:
    return {metric: function(maps, masks) for metric, function in LOCALIZATION.items()}


def _rows(model: str, method: str, ids: Sequence[str], metric: str, values: Tensor) -> pd.DataFrame:
    return pd.DataFrame(
        {"model": model, "method": method, "image": list(ids), "metric": metric, "value": values.double().numpy()}
    )


def precision_recall(maps: Tensor, masks: Tensor, recall: Tensor) -> Tensor:
    """Precision of each map as a detector of mask pixels, at given recalls.

    Parameters
    ----------
    maps : Tensor
        (N, H, W) signed attributions, ranked as they are.
    masks : Tensor
        (N, H, W) bool, the object.
    recall : Tensor
        (R) recalls in (0, 1].

    Returns
    -------
    Tensor
        (N, R) float32 in [0, 1]: precision at the highest threshold whose recall is at least the one given. NaN for
        an empty mask or a map with NaN.

    Raises
    ------
    HarmonizeError
        Shapes differ, the masks are not bool, or a recall is out of range.

    References
    ----------
    Fawcett 2006, An introduction to ROC analysis, section 8.1: curves of several images are averaged at fixed
    recall (vertical averaging).

    Notes
    -----
    No interpolation: the area under this step function is
    :func:`harmonize_lib.localization.average_precision`. Tied pixels enter together.
    """
    if maps.ndim != 3 or maps.shape != masks.shape or masks.dtype != torch.bool:
        shapes = f"maps {tuple(maps.shape)} and {masks.dtype} masks {tuple(masks.shape)}"
        raise HarmonizeError(f"{shapes} do not match: give (N, H, W) for both, masks bool")
    if recall.ndim != 1 or not ((recall > 0) & (recall <= 1)).all():
        raise HarmonizeError(
            "recall must be one-dimensional with values in (0, 1], such as torch.linspace(0.02, 1, 50)"
        )
    inside = masks.flatten(1)
    values = maps.flatten(1).double()
    size = inside.sum(1)
    defined = (size > 0) & ~values.isnan().any(1)
    values = values.nan_to_num()
    order = values.argsort(1, descending=True)
    found = inside.gather(1, order).cumsum(1)
    ends = rank_bounds(values)[1].gather(1, order)
    wanted = (recall.double() * size[:, None] - NEAR).ceil().clamp(min=1).long()
    place = torch.searchsorted(found, wanted).clamp(max=values.shape[1] - 1)
    end = ends.gather(1, place)
    precision = found.gather(1, end - 1) / end
    return torch.where(defined[:, None], precision, torch.nan).float()


def faithfulness_curves(
    models: Mapping[str, Model], dataset: Dataset, maps: Maps, kinds: Sequence[str], steps: int
) -> dict[str, dict[tuple[str, str], Tensor]]:
    """Perturbation curves of every map on its own model, computed once and kept in the store.

    Parameters
    ----------
    models : Mapping[str, Model]
        The models, by name.
    dataset : Dataset
        N images; the label is the class looked for.
    maps : Maps
        (model, method) to maps (N, H, W); those of the model ``NO_MODEL`` are shown to every model.
    kinds : Sequence[str]
        Of ``CURVES``: insertion and deletion give the label's probability, ROAD the accuracy.
    steps : int
        Equal steps, see :func:`harmonize_lib.faithfulness.insertion`.

    Returns
    -------
    dict[str, dict[tuple[str, str], Tensor]]
        Kind to (model, method) to curves (N, steps + 1) in [0, 1].

    Raises
    ------
    HarmonizeError
        Unknown kind; else as the functions of :mod:`harmonize_lib.faithfulness`.
    """
    for kind in kinds:
        if kind not in CURVES:
            raise unknown("curve", kind, CURVES)
    images = sha256_tensors({"images": dataset.images, "labels": dataset.labels})
    jobs = [
        (kind, name, method, values)
        for kind in kinds
        for name in models
        for (source, method), values in maps.items()
        if source in (name, NO_MODEL)
    ]
    curves: dict[str, dict[tuple[str, str], Tensor]] = {kind: {} for kind in kinds}
    for kind, name, method, values in tqdm(jobs, desc="faithfulness", mininterval=1):
        key = {
            "version": CURVES_VERSION,
            "kind": kind,
            "model": models[name].identity,
            "images": images,
            "maps": sha256_tensors({"maps": values}),
            "steps": steps,
        }
        compute = partial(_curve, kind, models[name], dataset, values, steps)
        curves[kind][name, method] = remember("faithfulness", key, compute)["curves"]
    return curves


def _curve(kind: str, model: Model, dataset: Dataset, maps: Tensor, steps: int) -> dict[str, Tensor]:
    return {"curves": CURVES[kind](model, dataset.images, dataset.labels, maps, steps=steps)}


def faithfulness_table(curves: Mapping[str, Maps], ids: Sequence[str]) -> pd.DataFrame:
    """Areas of perturbation curves, image by image.

    Parameters
    ----------
    curves : Mapping[str, Maps]
        From :func:`faithfulness_curves`.
    ids : Sequence[str]
        N image ids.

    Returns
    -------
    pd.DataFrame
        ``SCHEMA``: ``insertion`` (higher is better), ``deletion`` (lower is better), and ``road``, the area of ROAD
        with the least relevant pixels first minus that with the most relevant first (higher is better).
    """
    parts = [
        _rows(*key, ids, kind, area(values))
        for kind in ("insertion", "deletion")
        for key, values in curves.get(kind, {}).items()
    ]
    if "road_morf" in curves and "road_lerf" in curves:
        lerf = curves["road_lerf"]
        parts += [_rows(*key, ids, "road", area(lerf[key]) - area(morf)) for key, morf in curves["road_morf"].items()]
    return SCHEMA.validate(pd.concat(parts, ignore_index=True))


def mean_curves(curves: Maps, x: ArrayLike, name: str, seed: int, n_resamples: int = 2000) -> pd.DataFrame:
    """Mean curve of every method over images, each image's curve being the mean over models.

    Parameters
    ----------
    curves : Maps
        (model, method) to curves (N, P); images with NaN are left out.
    x : ArrayLike
        (P) where the curves are known.
    name : str
        Name of that column.
    seed : int
        Seed of the bootstrap over images, the same for every method.
    n_resamples : int
        Bootstrap resamples.

    Returns
    -------
    pd.DataFrame
        Columns ``method``, ``name``, ``mean``, ``low``, ``high`` (pointwise 95 % percentile interval), ``n``.
    """
    parts = []
    for method in dict.fromkeys(method for _, method in curves):
        stacked = torch.stack([values for key, values in curves.items() if key[1] == method]).double()
        values = stacked.nanmean(0).numpy()
        values = values[~np.isnan(values).any(1)]
        low = high = np.full(len(np.asarray(x)), np.nan)
        if len(values) > 1:
            resampled = _resamples(len(values), seed, n_resamples) @ values
            low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
        mean = values.mean(0) if len(values) else low
        parts.append(
            pd.DataFrame({"method": method, name: x, "mean": mean, "low": low, "high": high, "n": len(values)})
        )
    return pd.concat(parts, ignore_index=True)


def _resamples(n: int, seed: int, n_resamples: int) -> NDArray[np.float64]:
    """How much each of n samples weighs in each bootstrap resample, (n_resamples, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples) / n


def _by_image(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row per image, one column per method: the mean over models, positive meaning better."""
    part = table[table["metric"] == metric]
    wide = part.pivot_table(index="image", columns="method", values="value", aggfunc="mean", observed=True)
    wide.columns = wide.columns.astype(str)
    return -wide if metric in LOWER_IS_BETTER else wide


def against_controls(table: pd.DataFrame, controls: Sequence[str], seed: int, n_resamples: int = 5000) -> pd.DataFrame:
    """Paired differences between every method and every control, metric by metric.

    Parameters
    ----------
    table : pd.DataFrame
        ``SCHEMA``; methods that are not controls are compared with them.
    controls : Sequence[str]
        Names of the controls.
    seed : int
        Seed of bootstrap and sign flips.
    n_resamples : int
        Resamples and sign flips.

    Returns
    -------
    pd.DataFrame
        Columns ``metric``, ``method``, ``control``, ``mean``, ``low``, ``high``, ``n``, ``p``, ``p_holm``: method minus
        control (control minus method where lower is better), mean over images of each image's mean over models;
        p-values are corrected over all comparisons of a metric.
    """
    rows = []
    for metric in dict.fromkeys(table["metric"]):
        wide = _by_image(table, metric)
        for method in [name for name in dict.fromkeys(table["method"]) if name not in controls and name in wide]:
            for control in controls:
                interval = paired_difference(wide[method], wide[control], seed, n_resamples=n_resamples)
                rows.append((metric, method, control, *interval))
    result = pd.DataFrame(rows, columns=["metric", "method", "control", "mean", "low", "high", "n", "p"])
    result["p_holm"] = result.groupby("metric", sort=False)["p"].transform(holm)
    return result


def best_against_best(
    table: pd.DataFrame, metric: str, controls: Sequence[str], seed: int
) -> tuple[str, str, Interval]:
    """Compare the best method with the best control on images that did not choose them.

    Parameters
    ----------
    table : pd.DataFrame
        ``SCHEMA``.
    metric : str
        The metric.
    controls : Sequence[str]
        Names of the controls.
    seed : int
        Seed of bootstrap and sign flips.

    Returns
    -------
    tuple[str, str, Interval]
        Method, control, and their paired difference. Both are chosen by their mean over every second image and
        compared on the others.
    """
    wide = _by_image(table, metric)
    chosen, compared = wide.iloc[::2].mean(), wide.iloc[1::2]
    floors = [name for name in controls if name in wide]
    method, control = chosen.drop(floors).idxmax(), chosen[floors].idxmax()
    return method, control, paired_difference(compared[method], compared[control], seed)


def kendall_w(scores: ArrayLike) -> NDArray[np.float64]:
    """Kendall's coefficient of concordance: how far raters agree on the order of items.

    Parameters
    ----------
    scores : ArrayLike
        (..., m, n) scores of n items by m raters; each rater's scores are ranked, ties share their mean rank.

    Returns
    -------
    NDArray[np.float64]
        (...) W in [0, 1]: 12 S / (m^2 (n^3 - n) - m T), S the sum of squared deviations of the items' rank sums, T
        the sum of t^3 - t over groups of t tied items. 1 is one order; independent raters give 1 / m on average.
        NaN for fewer than two raters or items, a NaN among the scores, or ties alone.

    References
    ----------
    Kendall, Babington Smith 1939, The problem of m rankings; Siegel, Castellan 1988, section 9.8 (ties).
    """
    scores = np.asarray(scores, dtype=np.float64)
    m, n = scores.shape[-2:]
    if m < 2 or n < 2:
        return np.full(scores.shape[:-2], np.nan)
    ranks = rankdata(scores, axis=-1)
    ranks[np.isnan(scores).any(-1)] = np.nan
    squares = ((ranks.sum(-2) - m * (n + 1) / 2) ** 2).sum(-1)
    equal = (scores[..., None, :] == scores[..., :, None]).sum(-1)  # each item's group of ties has this many
    ties = (equal**2 - 1).sum((-1, -2))
    bottom = m**2 * (n**3 - n) - m * ties
    return np.divide(12 * squares, bottom, out=np.full(squares.shape, np.nan), where=bottom > 0)


def _scores(table: pd.DataFrame, rater: str, methods: Sequence[str]) -> tuple[list[str], NDArray[np.float64]]:
    """Raters and scores (images, raters, methods), means over what is left; images that lack a score are left out."""
    raters = list(dict.fromkeys(table[rater]))
    sign = table["metric"].isin(LOWER_IS_BETTER).map({True: -1.0, False: 1.0})
    signed = table[["image", "method", rater]].assign(value=table["value"] * sign)
    wide = signed.pivot_table(index="image", columns=[rater, "method"], values="value", aggfunc="mean", observed=True)
    wide = wide.reindex(columns=pd.MultiIndex.from_product([raters, methods])).dropna()
    return raters, wide.to_numpy().reshape(len(wide), len(raters), len(methods))


def rank_table(
    table: pd.DataFrame, rater: str, methods: Sequence[str], seed: int, n_resamples: int = 2000
) -> pd.DataFrame:
    """Rank of every method by every rater, with the bootstrap interval of the rank.

    Parameters
    ----------
    table : pd.DataFrame
        ``SCHEMA``.
    rater : str
        ``"metric"`` or ``"model"``: what orders the methods, by their mean over images.
    methods : Sequence[str]
        The methods ranked; each has a score from every rater.
    seed : int
        Seed of the bootstrap over images.
    n_resamples : int
        Bootstrap resamples.

    Returns
    -------
    pd.DataFrame
        Columns ``rater``, ``method``, ``rank`` (1 is best, ties share their mean), ``low``, ``high``, ``n`` images:
        those with every score.
    """
    raters, scores = _scores(table, rater, methods)
    ranks = rankdata(-scores.mean(0), axis=-1)
    low, high = np.quantile(
        rankdata(-_resampled(scores, seed, n_resamples), axis=-1), [0.025, 0.975], axis=0, method="closest_observation"
    )
    rows = [
        (name, method, ranks[i, j], low[i, j], high[i, j], len(scores))
        for i, name in enumerate(raters)
        for j, method in enumerate(methods)
    ]
    return pd.DataFrame(rows, columns=[rater, "method", "rank", "low", "high", "n"])


def concordance(
    table: pd.DataFrame, rater: str, methods: Sequence[str], seed: int, n_resamples: int = 2000
) -> Interval:
    """Kendall's W of raters on the order of methods, with a bootstrap interval over images.

    Parameters
    ----------
    table : pd.DataFrame
        ``SCHEMA``.
    rater : str
        ``"metric"`` or ``"model"``.
    methods : Sequence[str]
        The methods ordered.
    seed : int
        Seed of the bootstrap.
    n_resamples : int
        Bootstrap resamples.

    Returns
    -------
    Interval
        W of the orders by mean over images, percentile interval, ``n`` images.

    Notes
    -----
    Every resample repeats images, which makes its orders noisier than the sample's: the interval leans downward
    where methods are close.
    """
    raters, scores = _scores(table, rater, methods)
    if len(raters) < 2 or len(methods) < 2 or len(scores) < 2:
        return Interval(np.nan, np.nan, np.nan, len(scores))
    low, high = np.nanquantile(kendall_w(_resampled(scores, seed, n_resamples)), [0.025, 0.975])
    return Interval(float(kendall_w(scores.mean(0))), float(low), float(high), len(scores))


def _resampled(scores: NDArray[np.float64], seed: int, n_resamples: int) -> NDArray[np.float64]:
    """Means over bootstrap resamples of the first axis."""
    return np.tensordot(_resamples(len(scores), seed, n_resamples), scores, 1)


def cost_and_quality(costs: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """Put what methods cost beside what they are worth.

    Parameters
    ----------
    costs : pd.DataFrame
        Columns ``model``, ``method``, ``seconds`` per image.
    quality : pd.DataFrame
        Columns ``method``, ``mean``, ``low``, ``high``, ``n``.

    Returns
    -------
    pd.DataFrame
        Columns ``method``, ``seconds`` (median over models), ``seconds_low``, ``seconds_high`` (their range),
        ``mean``, ``low``, ``high``, ``n``, and ``efficient``: no cheaper method is better.
    """
    spent = costs.groupby("method", observed=True, sort=False)["seconds"].agg(["median", "min", "max"])
    spent.columns = pd.Index(["seconds", "seconds_low", "seconds_high"])
    both = spent.reset_index().merge(quality, on="method").sort_values("seconds", ignore_index=True)
    both["efficient"] = both["mean"] >= both["mean"].cummax()
    return both
