"""Do features travel? Features found with one model, shown to another (this project's operationalization)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pandera.pandas as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from harmonize_lib.attribution import explain, refusal
from harmonize_lib.data import Dataset
from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.features import feature_image, feature_mask, mean_color, patch_scores, top_count
from harmonize_lib.tasks import in_batches

FLOOR = ("random", "control")
CONTROLS = ("center", "edges")
FAMILIES = ("cnn", "transformer")
CELL = ["source", "target", "method", "fraction"]

TRANSFER_SCHEMA = pa.DataFrameSchema(
    {
        "source": pa.Column("category", coerce=True),
        "target": pa.Column("category", coerce=True),
        "method": pa.Column("category", coerce=True),
        "fraction": pa.Column(float, pa.Check.in_range(0, 1, include_min=False), coerce=True),
        "complement": pa.Column(bool),
        "image": pa.Column("category", coerce=True),
        "correct": pa.Column(bool),
        "probability": pa.Column(float, pa.Check.in_range(0, 1), coerce=True),
    },
    checks=pa.Check(lambda table: not table.duplicated([*CELL, "complement", "image"]).any(), name="one row per cell"),
    strict=True,
)


def held_out_pool(models: Mapping[str, str], target: str) -> list[str]:
    """Name the models that may form a consensus for a target: none of its architecture, whatever the seed.

    Parameters
    ----------
    models : Mapping[str, str]
        Model name to architecture (``Model.architecture``).
    target : str
        The model to be evaluated, one of ``models``.

    Returns
    -------
    list[str]
        {m : architecture(m) != architecture(target)}, in the order given.

    Raises
    ------
    HarmonizeError
        The target is not among the models, or no other architecture is.
    """
    if target not in models:
        raise unknown("model", target, models)
    pool = [name for name, architecture in models.items() if architecture != models[target]]
    if not pool:
        raise HarmonizeError(f"all models are of architecture {models[target]!r}: the pool needs another one")
    return pool


def recognition(
    models: Mapping[str, nn.Module] | Sequence[nn.Module],
    dataset: Dataset,
    maps: Mapping[tuple[str, str], Any],
    fractions: Sequence[float],
    patch: int = 4,
    fill: str = "mean",
    complement: bool = False,
    seed: int = 0,
    batch_size: int = 256,
) -> pd.DataFrame:
    """Show the features of every map to every model: T_k[m -> n] (and U_k for the complement), image by image.

    Parameters
    ----------
    models : Mapping[str, nn.Module] | Sequence[nn.Module]
        The targets n, by name, or with an attribute ``name``. In eval mode, logits (N, K).
    dataset : Dataset
        N images with labels; the label is the class looked for.
    maps : Mapping[tuple[str, str], Any]
        (source, method) to maps (N, H, W), or to a function without arguments that gives them. Each is asked for
        once, one after the other, so a lazy mapping may stream them from a store. The floor
        ``("random", "control")`` is added unless it is given.
    fractions : Sequence[float]
        Shares k of the patches that are features, each in (0, 1].
    patch : int
        Side of a patch in pixels.
    fill : str
        What replaces the rest: ``"mean"`` (color of the whole data set), ``"blur"`` or ``"road"``.
    complement : bool
        Also evaluate the non-feature images.
    seed : int
        Seeds the random floor (patch scores drawn per image, the same for all targets, nested over fractions), the
        order of ties and the noise of ``"road"`` (both the same for all maps).
    batch_size : int
        Images per forward pass; does not change the result.

    Returns
    -------
    pd.DataFrame
        ``TRANSFER_SCHEMA``, one row per source, target, method, fraction, complement and image (id): correct
        (argmax_c f_n(x_k) = label) and probability (softmax of f_n(x_k) at the label, in [0, 1]).

    Raises
    ------
    HarmonizeError
        No models or fractions; a fraction out of range or given twice; a patch that does not divide the images;
        maps of another shape or not finite; a model in train mode, with other classes than the data set, or
        without finite logits (N, K).

    References
    ----------
    The question is that of Kadir et al. 2023 (arXiv 2307.02150), the experiment this project's; it is of the class of
    cross-testing, Jiang et al. 2024 (arXiv 2212.06872).
    """
    networks = _named(models)
    _check(networks, dataset, fractions, batch_size)
    floor = _floor_maps(dataset.images, patch, seed)
    given = list(maps)
    keys = given if FLOOR in given else [*given, FLOOR]
    sides = (False, True) if complement else (False,)
    parts = [
        recognize(
            networks,
            dataset,
            _scores(maps[key] if key in given else floor, key, dataset.images),
            fractions,
            patch,
            fill,
            sides,
            seed,
            batch_size,
        )
        for key in keys
    ]
    correct, probability = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    table = long_table(keys, fractions, sides, list(networks), dataset.ids, correct, probability)
    return TRANSFER_SCHEMA.validate(table)


def recognize(
    models: Mapping[str, nn.Module],
    dataset: Dataset,
    maps: Tensor,
    fractions: Sequence[float],
    patch: int = 4,
    fill: str = "mean",
    sides: Sequence[bool] = (False,),
    seed: int = 0,
    batch_size: int = 256,
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Show the features of one set of maps to some models.

    Parameters
    ----------
    models : Mapping[str, nn.Module]
        The targets, by name.
    dataset : Dataset
        N images with labels.
    maps : Tensor
        (N, H, W), finite.
    fractions : Sequence[float]
        See :func:`recognition`.
    patch : int
        See :func:`recognition`.
    fill : str
        See :func:`recognition`.
    sides : Sequence[bool]
        False shows the feature image, True the non-feature image.
    seed : int
        See :func:`recognition`.
    batch_size : int
        Images per forward pass.

    Returns
    -------
    tuple[NDArray[np.bool_], NDArray[np.float64]]
        Correct and probability of the label, each (fractions, sides, models, N).
    """
    shape = (len(fractions), len(sides), len(models), len(dataset.labels))
    correct, probability = np.empty(shape, dtype=bool), np.empty(shape)
    mean, label = mean_color(dataset.images), dataset.labels.cpu()
    for j, fraction in enumerate(fractions):
        mask = feature_mask(maps, fraction, patch, _generator(seed, 1))
        for k, side in enumerate(sides):
            look = partial(_look, models, dataset, mask ^ side, fill, mean, seed)
            p = torch.cat(in_batches(look, len(mask), batch_size)[0], 1)
            correct[j, k] = p.argmax(2) == label
            probability[j, k] = p.gather(2, label.expand(len(p), -1)[..., None])[..., 0]
    return correct, probability


def _look(
    models: Mapping[str, nn.Module],
    dataset: Dataset,
    mask: Tensor,
    fill: str,
    mean: Tensor,
    seed: int,
    part: slice,
    rows: int,
) -> Tensor:
    """Softmax (models, n, K) of the feature images of a slice."""
    images = feature_image(dataset.images[part], mask[part], fill, mean, _generator(seed, 2))
    return torch.stack([probabilities(name, network, images, len(dataset.classes)) for name, network in models.items()])


def transfer_table(
    models: Mapping[str, nn.Module] | Sequence[nn.Module],
    dataset: Dataset,
    methods: Sequence[str],
    fractions: Sequence[float],
    patch: int = 4,
    fill: str = "mean",
    maps: Mapping[tuple[str, str], Any] | None = None,
    complement: bool = False,
    seed: int = 0,
    batch_size: int = 256,
) -> pd.DataFrame:
    """Explain every model by every method and show the features to every model.

    Parameters
    ----------
    models : Mapping[str, nn.Module] | Sequence[nn.Module]
        Sources and targets, see :func:`recognition`.
    dataset : Dataset
        N images with labels; the label is what is explained and looked for.
    methods : Sequence[str]
        Attribution methods, each defined for every model. ``"random"``, ``"center"`` and ``"edges"`` do not depend on
        the model: they become sources of that name with method ``"control"``.
    fractions : Sequence[float]
        See :func:`recognition`.
    patch : int
        See :func:`recognition`.
    fill : str
        See :func:`recognition`.
    maps : Mapping[tuple[str, str], Any] | None
        Maps that are there already, by (source, method): those of the models are not computed again; those of other
        sources (a consensus, a control) are added if their method is among ``methods`` or is ``"control"``.
    complement : bool
        See :func:`recognition`.
    seed : int
        See :func:`recognition`; also seeds each explanation's generator.
    batch_size : int
        Images per pass.

    Returns
    -------
    pd.DataFrame
        See :func:`recognition`.

    Raises
    ------
    HarmonizeError
        No methods; a method that a model refuses; else as :func:`recognition`.
    """
    if not methods:
        raise HarmonizeError("methods is empty: give at least one, such as 'saliency'")
    given = maps or {}
    wanted: dict[tuple[str, str], Callable[[], Tensor]] = {
        key: partial(given.__getitem__, key) for key in given if key[1] in (*methods, FLOOR[1])
    }
    networks = _named(models)
    for method in methods:
        for name, network in networks.items():
            key = (method, FLOOR[1]) if method in (FLOOR[0], *CONTROLS) else (name, method)
            if key in wanted or key == FLOOR:
                continue
            if (reason := refusal(network, method)) is not None:
                raise HarmonizeError(f"{method} on {name}: {reason}"[:200])
            wanted[key] = partial(_explain, network, dataset, method, seed, batch_size)
    return recognition(models, dataset, wanted, fractions, patch, fill, complement, seed, batch_size)


def relative_transfer(
    table: pd.DataFrame,
    floor: str = "random",
    value: str = "probability",
    seed: int = 0,
    level: float = 0.95,
    n_resamples: int = 2000,
) -> pd.DataFrame:
    """Relate transfer to the floor and to the target's own features.

    rho[m -> n] = (T[m -> n] - T[floor -> n]) / (T[n -> n] - T[floor -> n]), for every method and fraction.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`recognition` or :func:`area_over_fractions`; rows of the complement are left out.
    floor : str
        The source that is the floor; it has one method.
    value : str
        ``"probability"`` or ``"correct"``.
    seed : int
        Seed of the bootstrap over images (one resample for all cells).
    level : float
        Coverage of the interval, in (0, 1).
    n_resamples : int
        Bootstrap resamples, at least 1.

    Returns
    -------
    pd.DataFrame
        One row per source (but the floor), target, method and fraction: ``transfer`` T[m -> n], ``floor``, ``own``
        T[n -> n], ``rho`` with ``low`` and ``high``, ``n`` images. ``rho`` is NaN where the target has no own
        features by that method, or where its denominator is not clearly positive: the ``level`` bootstrap interval
        of T[n -> n] - T[floor -> n] reaches 0.

    Raises
    ------
    HarmonizeError
        A column is missing; the floor is absent, incomplete or has several methods; cells differ in their images.

    References
    ----------
    Percentile bootstrap of a ratio of means: Efron, Tibshirani 1993, section 13.3.
    """
    cells, means, rho, n = _relative(table, floor, value, seed, level, n_resamples)
    defined = np.isfinite(rho[0])
    bounds = np.full((2, len(cells)), np.nan)
    bounds[:, defined] = np.nanquantile(rho[1:, defined], [(1 - level) / 2, (1 + level) / 2], axis=0)
    result = cells.drop(columns=["own", "base"]).assign(
        transfer=means,
        floor=means[cells["base"]],
        own=np.where(cells["own"] < 0, np.nan, means[cells["own"]]),
        rho=rho[0],
        low=bounds[0],
        high=bounds[1],
        n=n,
    )
    return result[result["source"] != floor].reset_index(drop=True)


def family_advantage(
    table: pd.DataFrame,
    families: Mapping[str, str],
    architectures: Mapping[str, str],
    seed: int = 0,
    floor: str = "random",
    value: str = "probability",
    level: float = 0.95,
    n_resamples: int = 2000,
) -> pd.DataFrame:
    """Compare relative transfer within families with that across: do features travel better among relatives?

    within = (r[cnn -> cnn] + r[tr -> tr]) / 2, across = (r[cnn -> tr] + r[tr -> cnn]) / 2, where r[F -> G] is the mean
    of rho[m -> n] over m in F, n in G of different architecture; advantage = within - across.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`recognition` or :func:`area_over_fractions`; sources without a family are left out.
    families : Mapping[str, str]
        Model name to ``"cnn"``, ``"transformer"`` or another family, which does not count.
    architectures : Mapping[str, str]
        Model name to architecture: a model and its other seeds are no pair.
    seed : int
        Seed of the bootstrap over images (one resample for all pairs).
    floor : str
        See :func:`relative_transfer`.
    value : str
        See :func:`relative_transfer`.
    level : float
        Coverage of the interval, in (0, 1).
    n_resamples : int
        Bootstrap resamples, at least 1.

    Returns
    -------
    pd.DataFrame
        One row per method and fraction: ``within``, ``across``, ``advantage`` with ``low``, ``high`` and two-sided
        bootstrap ``p``, ``n`` images, ``pairs`` and ``targets`` that count. Pairs with undefined rho are left out;
        where one of the four means has no pair, the numbers are NaN.

    Raises
    ------
    HarmonizeError
        As :func:`relative_transfer`; a target without family or architecture.

    Notes
    -----
    The four means weigh the same however many models a family has, so that neither better sources nor easier targets
    in one family show up as an advantage. The interval covers the draw of images, not that of models.
    """
    cells, _, rho, n = _relative(table, floor, value, seed, level, n_resamples)
    for name in cells["target"].unique():
        if name not in families or name not in architectures:
            raise HarmonizeError(f"target {name!r} has no family or architecture: add it to both mappings")
    source, target = cells["source"], cells["target"]
    pairs = (
        source.map(families).isin(FAMILIES)
        & target.map(families).isin(FAMILIES)
        & (source.map(architectures) != target.map(architectures))
        & np.isfinite(rho[0])
    )
    rows = []
    by = [column for column in ("method", "fraction") if column in cells]
    own = cells[cells["own"] >= 0]
    for group, part in own.groupby(by):
        use = part[pairs[part.index]]
        route = use["source"].map(families) + " " + use["target"].map(families)
        r = {name: rho[:, use.index[route == name]] for name in (f"{a} {b}" for a in FAMILIES for b in FAMILIES)}
        empty = any(block.shape[1] == 0 for block in r.values())
        (cc, ct, tc, tt) = (np.full(len(rho), np.nan) if empty else block.mean(1) for block in r.values())
        within, across = (cc + tt) / 2, (ct + tc) / 2
        gap, draws = (within - across)[0], (within - across)[1:]
        low, high = (np.nan, np.nan) if empty else np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
        hits = min((draws <= 0).sum(), (draws >= 0).sum())
        p = np.nan if empty else min(1.0, 2 * (1 + hits) / (1 + n_resamples))
        numbers = (within[0], across[0], gap, low, high, p, n, len(use), use["target"].nunique())
        rows.append((*group, *numbers))
    names = ("within", "across", "advantage", "low", "high", "p", "n", "pairs", "targets")
    return pd.DataFrame(rows, columns=[*by, *names])


def area_over_fractions(table: pd.DataFrame) -> pd.DataFrame:
    """Sum up each curve over fractions: the trapezoid area over [k_1, k_F], divided by k_F - k_1.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`recognition`, with at least two fractions.

    Returns
    -------
    pd.DataFrame
        One row per source, target, method, complement and image: ``correct`` and ``probability``, both in [0, 1],
        means over the range of fractions.

    Raises
    ------
    HarmonizeError
        Fewer than two fractions, or a curve that lacks one.
    """
    fractions = np.sort(table["fraction"].unique())
    if len(fractions) < 2:
        raise HarmonizeError(f"an area needs at least 2 fractions, the table has {len(fractions)}")
    weights = np.trapezoid(np.eye(len(fractions)), fractions) / np.ptp(fractions)
    weight = weights[np.searchsorted(fractions, table["fraction"])]
    by = [*CELL[:-1], "complement", "image"]
    parts = table[by].assign(correct=table["correct"] * weight, probability=table["probability"] * weight, count=1)
    areas = parts.groupby(by, observed=True, as_index=False).sum()
    if (areas["count"] != len(fractions)).any():
        raise HarmonizeError(f"some curves lack some of the {len(fractions)} fractions: evaluate all on the same")
    return areas.drop(columns="count")


def _named(models: Mapping[str, nn.Module] | Sequence[nn.Module]) -> dict[str, nn.Module]:
    if isinstance(models, Mapping):
        named = dict(models)
    else:
        named = {str(getattr(model, "name", f"model {i}")): model for i, model in enumerate(models)}
    if not named or len(named) != len(models):
        raise HarmonizeError(f"{len(models)} models with {len(named)} names: give at least one, each with its own name")
    return named


def _check(networks: Mapping[str, nn.Module], dataset: Dataset, fractions: Sequence[float], batch_size: int) -> None:
    for fraction in fractions:
        top_count(fraction, 1)
    if not fractions or len(set(fractions)) != len(fractions):
        raise HarmonizeError(f"fractions {list(fractions)}: give at least one, none twice")
    if batch_size < 1:
        raise HarmonizeError(f"batch_size must be at least 1, not {batch_size}")
    for name, network in networks.items():
        if network.training:
            raise HarmonizeError(f"model {name!r} is in train mode: call its eval() first")
        classes = getattr(network, "classes", None)
        if classes is not None and tuple(classes) != tuple(dataset.classes):
            raise HarmonizeError(
                f"model {name!r} knows {len(classes)} classes that are not the data set's {len(dataset.classes)}: "
                "take models of the same labels"
            )
        if not hasattr(network, "preprocess") and not dataset.images.is_floating_point():
            raise HarmonizeError(f"model {name!r} has no preprocess: it takes float images, not uint8")


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(3 * seed + stream)


def _floor_maps(images: Tensor, patch: int, seed: int) -> Tensor:
    grid = patch_scores(torch.zeros(1, *images.shape[2:]), patch).shape[1:]
    scores = torch.rand(len(images), *grid, generator=_generator(seed, 0))
    return scores.repeat_interleave(patch, 1).repeat_interleave(patch, 2)


def _explain(network: nn.Module, dataset: Dataset, method: str, seed: int, batch_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return explain(network, dataset.images, dataset.labels, method, generator=generator, batch_size=batch_size).maps


def _scores(maps: Any, key: tuple[str, str], images: Tensor) -> Tensor:
    scores = maps
    while not isinstance(scores, Tensor):
        scores = scores()
    if scores.shape != (len(images), *images.shape[2:]):
        wanted = (len(images), *images.shape[2:])
        raise HarmonizeError(f"maps of {key} are {tuple(scores.shape)}: the images need {wanted}")
    if not scores.isfinite().all():
        raise HarmonizeError(f"maps of {key} hold NaN or infinite values: features need finite maps")
    return scores.to(images.device)


def probabilities(name: str, network: nn.Module, images: Tensor, classes: int) -> Tensor:
    """What a model takes images for.

    Parameters
    ----------
    name : str
        What it is called in messages.
    network : nn.Module
        A ``Model``, or a plain module that takes the images as they are.
    images : Tensor
        (N, C, H, W).
    classes : int
        K.

    Returns
    -------
    Tensor
        (N, K) float64, the softmax.

    Raises
    ------
    HarmonizeError
        Outputs that are not (N, K) finite logits.
    """
    preprocess = getattr(network, "preprocess", lambda x: x)
    with torch.inference_mode():
        logits = network(preprocess(images))
    if not isinstance(logits, Tensor) or logits.shape != (len(images), classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise HarmonizeError(f"model {name!r} gives {got}: it must give logits {(len(images), classes)}")
    if not logits.isfinite().all():
        raise HarmonizeError(f"model {name!r} gives NaN or infinite logits: check its weights")
    return logits.cpu().double().softmax(1)


def long_table(
    keys: Sequence[tuple[str, str]],
    fractions: Sequence[float],
    sides: Sequence[bool],
    targets: Sequence[str],
    ids: Sequence[str],
    correct: NDArray[np.bool_],
    probability: NDArray[np.float64],
) -> pd.DataFrame:
    """Lay out arrays as the long table.

    Parameters
    ----------
    keys : Sequence[tuple[str, str]]
        Source and method of each first index.
    fractions : Sequence[float]
        Second index.
    sides : Sequence[bool]
        Third index: True is the complement.
    targets : Sequence[str]
        Fourth index.
    ids : Sequence[str]
        Fifth index: names of the images.
    correct : NDArray[np.bool_]
        Values (key, fraction, side, target, image).
    probability : NDArray[np.float64]
        Values (key, fraction, side, target, image), in [0, 1].

    Returns
    -------
    pd.DataFrame
        Columns of ``TRANSFER_SCHEMA``.
    """

    def spread(values: Sequence[object], axis: int) -> NDArray[Any]:
        column = np.asarray(values).reshape([-1 if i == axis else 1 for i in range(5)])
        return np.broadcast_to(column, correct.shape).ravel()

    def category(values: Sequence[str], names: Sequence[str], axis: int) -> pd.Categorical[Any]:
        place = {name: i for i, name in enumerate(names)}
        codes = spread([place[value] for value in values], axis).astype(np.int32)
        return pd.Categorical.from_codes(codes, categories=pd.Index(names))

    sources, methods = zip(*keys, strict=True)
    models = list(dict.fromkeys([*sources, *targets]))
    return pd.DataFrame(
        {
            "source": category(sources, models, 0),
            "target": category(targets, models, 3),
            "method": category(methods, list(dict.fromkeys(methods)), 0),
            "fraction": spread([float(fraction) for fraction in fractions], 1),
            "complement": spread(sides, 2),
            "image": category(ids, ids, 4),
            "correct": correct.ravel(),
            "probability": probability.ravel(),
        }
    )


def _relative(
    table: pd.DataFrame, floor: str, value: str, seed: int, level: float, n_resamples: int
) -> tuple[pd.DataFrame, NDArray[np.float64], NDArray[np.float64], int]:
    """Cells (with the places of their own-feature and floor cells), their means, rho (1 + resamples, cells), n."""
    if not 0 < level < 1 or n_resamples < 1:
        raise HarmonizeError(f"level={level}, n_resamples={n_resamples}: give 0 < level < 1 and at least 1 resample")
    cells, values = _matrix(table, value)
    methods = cells.loc[cells["source"] == floor, "method"].unique()
    if len(methods) != 1:
        raise HarmonizeError(f"floor {floor!r} has {len(methods)} methods in the table: it needs exactly one")
    index = pd.MultiIndex.from_frame(cells)
    own = index.get_indexer(pd.MultiIndex.from_frame(cells.assign(source=cells["target"])))
    base = index.get_indexer(pd.MultiIndex.from_frame(cells.assign(source=floor, method=methods[0])))
    if (base < 0).any():
        raise HarmonizeError(f"floor {floor!r} lacks some targets or fractions: evaluate it with the others")
    n = len(values)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    means = np.vstack([np.ones(n), weights]) @ values / n
    gap = means[:, own] - means[:, base]
    clear = (own >= 0) & (np.quantile(gap[1:], (1 - level) / 2, axis=0) > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rho = np.where(clear & (gap != 0), (means - means[:, base]) / gap, np.nan)
    return cells.assign(own=own, base=base), means[0], rho, n


def _matrix(table: pd.DataFrame, value: str) -> tuple[pd.DataFrame, NDArray[np.float64]]:
    """Cells of the table and their values, (images, cells), images sorted by id."""
    if value not in ("probability", "correct"):
        raise unknown("value", value, ("probability", "correct"))
    lacking = [name for name in ("source", "target", "method", "image", value) if name not in table]
    if lacking:
        raise HarmonizeError(f"the table lacks {', '.join(lacking)}: give what recognition returns")
    kept = table[~table["complement"]] if "complement" in table else table
    by = [name for name in CELL if name in kept]
    groups = kept.groupby(by, observed=True)
    cells = groups.size().reset_index()[by].astype(dict.fromkeys(CELL[:3], object))
    image = kept["image"].astype("category").cat.remove_unused_categories().cat
    place = np.argsort(np.argsort(image.categories.astype(str)))
    values = np.full((len(place), len(cells)), np.nan)
    values[place[image.codes], groups.ngroup()] = kept[value]
    if not len(kept) or len(kept) != values.size or np.isnan(values).any():
        raise HarmonizeError(
            f"{len(kept)} rows for {len(cells)} cells x {len(place)} images: each cell needs all, once"
        )
    return cells, values
