"""Harmonization on held-out architectures: does the consensus of others beat one model's map?

Everything happens on the grid of patches: maps are averaged over patches first, so that a consensus gains nothing by
smoothing alone and all rules, single models and own maps are compared at one resolution. The model that is evaluated
looks at features of its own held-out pool only: one model of every *other* architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pandera.pandas as pa
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from harmonize_lib import study
from harmonize_lib.agreement import spearman, topk_iou
from harmonize_lib.consensus import consensus
from harmonize_lib.data import Dataset, load_dataset
from harmonize_lib.features import patch_scores
from harmonize_lib.localization import relevance_rank
from harmonize_lib.models import Model, list_models, load_model
from harmonize_lib.plots import forest, label
from harmonize_lib.statistics import Interval, holm, paired_difference, summarize
from harmonize_lib.storage import remember, sha256_tensors
from harmonize_lib.study import Run
from harmonize_lib.transfer import area_over_fractions, held_out_pool, recognize

VERSION = 1
DELETED = (0.02, 0.05, 0.1, 0.2)  # shares of the patches taken away, over which the deletion curve is integrated
RANDOM, BEST, OWN = "random single other", "best single other", "own map"
CHOSEN = "chosen rule"
POOLED = "consensus of the others"
OUTCOMES = {"correct": "recognition", "relevance_rank": "localization", "deletion": "deletion"}
UNITS = {
    "recognition": "difference in accuracy",
    "localization": "difference in relevance rank",
    "deletion": "difference in probability lost",
}
TOP = 0.1  # share of the patches in the top-k overlap of two maps
LEAST_P = 40  # sign flips per test of a family: the least p, Holm-corrected, is 1 / 40
ALPHA = 0.05

Maps = Mapping[tuple[str, str], Tensor]

SCORES_SCHEMA = pa.DataFrameSchema(
    {
        "target": pa.Column(str),
        "method": pa.Column(str),
        "kind": pa.Column(str, pa.Check.isin(("own", "other", "consensus"))),
        "candidate": pa.Column(str),
        "pool": pa.Column(int, pa.Check.ge(1), coerce=True),
        "image": pa.Column(str),
        **{
            name: pa.Column(float, pa.Check.in_range(0, 1), nullable=True, coerce=True)
            for name in ("correct", "probability", "deletion", "relevance_rank")
        },
    },
    checks=pa.Check(
        lambda table: not table.duplicated(["target", "method", "candidate", "image"]).any(), name="one row per cell"
    ),
    strict=True,
)


def held_out_pools(architectures: Mapping[str, str]) -> dict[str, list[str]]:
    """Name, for every model, whose maps may form a consensus for it: one model of every other architecture.

    Parameters
    ----------
    architectures : Mapping[str, str]
        Model name to architecture.

    Returns
    -------
    dict[str, list[str]]
        Target to pool. Where an architecture comes with several seeds, its first model given is the one in the pools.

    Raises
    ------
    HarmonizeError
        All models are of one architecture.
    """
    first = {architectures[name]: name for name in reversed(list(architectures))}
    return {
        target: [name for name in held_out_pool(architectures, target) if name in first.values()]
        for target in architectures
    }


def held_out_maps(run: Run, maps: Maps, target: str, method: str) -> Tensor:
    """Maps of the target's pool by one method, averaged over patches.

    Parameters
    ----------
    run : Run
        Gives models and patch.
    maps : Maps
        (model, method) to maps (N, H, W).
    target : str
        The model to be evaluated.
    method : str
        An attribution method.

    Returns
    -------
    Tensor
        (M, N, H / patch, W / patch), one for each member of the pool that the method is defined for; M may be 0.
    """
    return _pool(run, _grids(run, maps), target, method)


def held_out_consensus(run: Run, maps: Maps, target: str, method: str, rule: str) -> Tensor:
    """Consensus of the others: of one model of every architecture but the target's.

    Parameters
    ----------
    run : Run
        Gives models and patch.
    maps : Maps
        (model, method) to maps (N, H, W).
    target : str
        The model to be evaluated.
    method : str
        An attribution method.
    rule : str
        A rule of consensus.

    Returns
    -------
    Tensor
        (N, H, W), constant on patches, in the rule's units.

    Raises
    ------
    HarmonizeError
        Unknown rule; nobody in the pool has a map.
    """
    return _upsample(consensus(held_out_maps(run, maps, target, method), rule), run.settings.patch)


def single_scores(run: Run, maps: Maps) -> pd.DataFrame:
    """How well every target does with its own map and with that of each single other model.

    Parameters
    ----------
    run : Run
        Gives models, images and parameters.
    maps : Maps
        (model, method) to maps (N, H, W).

    Returns
    -------
    pd.DataFrame
        ``SCORES_SCHEMA``: ``kind`` is ``own`` or ``other``, ``candidate`` the model whose map it is. ``correct`` and
        ``probability``: the target looks at the features at the run's ``fraction``. ``relevance_rank``: see
        :func:`localization.relevance_rank`, of the map averaged over patches; NaN without masks. ``deletion``: 1 - the
        target's probability as patches are taken away in order, averaged over the shares in ``DELETED``
        (trapezoid); for the first ``n_deletion`` images, NaN for the others. All in [0, 1], higher is better.
    """
    settings, part = run.settings, _deletion_part(run)
    seen = study.recognition_table(run, maps, run.models, list(run.settings.fractions))
    seen = seen[seen["fraction"] == settings.fraction]
    some = {key: values[: len(part)] for key, values in maps.items()}
    left = study.recognition_table(run, some, run.models, DELETED, complement=True, dataset=part)
    areas = area_over_fractions(left)
    areas = _strings(areas).assign(deletion=1 - areas["probability"])
    table = _strings(seen).merge(
        areas[["source", "target", "method", "image", "deletion"]],
        on=["source", "target", "method", "image"],
        how="left",
    )
    located = pd.concat(
        [
            pd.DataFrame(
                {"source": source, "method": method, "image": run.dataset.ids, "relevance_rank": _located(run, values)}
            )
            for (source, method), values in tqdm(_grids(run, maps).items(), desc="localization", mininterval=1)
        ]
    )
    table = table.merge(located, on=["source", "method", "image"]).assign(pool=1)
    pools = held_out_pools(_architectures(run))
    kinds = {
        (source, target): "own" if source == target else "other"
        for target in pools
        for source in (target, *pools[target])
    }
    table["kind"] = [kinds.get(pair) for pair in zip(table["source"], table["target"], strict=True)]
    return _validated(table.dropna(subset="kind").rename(columns={"source": "candidate"}))


def consensus_scores(run: Run, maps: Maps) -> pd.DataFrame:
    """How well every target does with the consensus of the others.

    Parameters
    ----------
    run : Run
        Gives models, images and parameters.
    maps : Maps
        (model, method) to maps (N, H, W).

    Returns
    -------
    pd.DataFrame
        ``SCORES_SCHEMA``, as :func:`single_scores`: ``kind`` is ``consensus``, ``candidate`` the rule, ``pool`` the
        number of models in it.
    """
    ids, parts = run.dataset.ids, []
    cells = [(*cell, rule) for cell in _cells(run, maps) for rule in _rules(run)]
    for target, method, members, digest, rule in tqdm(cells, desc="consensus", mininterval=1):
        found = _judge(run, target, members, digest, rule, [run.settings.fraction], whole=True)
        numbers = {name: found[name][0] for name in ("correct", "probability")}
        deletion = np.full(len(ids), np.nan)
        left = found["left"]
        deletion[: left.shape[1]] = 1 - np.trapezoid(left, DELETED, axis=0) / (DELETED[-1] - DELETED[0])
        numbers |= {"deletion": deletion, "relevance_rank": found["relevance_rank"]}
        names = {"target": target, "method": method, "kind": "consensus", "candidate": rule, "pool": len(members)}
        parts.append(pd.DataFrame(names | {"image": ids} | numbers))
    return _validated(pd.concat(parts, ignore_index=True))


def recognition_curves(run: Run, maps: Maps, controls: Maps, rule: str) -> pd.DataFrame:
    """Accuracy over the share of patches kept: consensus, singles, own map, and controls.

    Parameters
    ----------
    run : Run
        Gives models, images and parameters.
    maps : Maps
        (model, method) to maps (N, H, W).
    controls : Maps
        (name, ``"control"``) to maps that know no model.
    rule : str
        The rule of consensus.

    Returns
    -------
    pd.DataFrame
        Columns ``line``, ``fraction``, ``mean``, ``low``, ``high``, ``n``; means over targets and methods.
    """
    fractions, ids, parts = list(run.settings.fractions), run.dataset.ids, []
    seen = study.recognition_table(run, maps, run.models, fractions)
    cell = ["target", "method", "source", "fraction"]
    wide = seen.pivot_table(index=cell, columns="image", values="correct", sort=False, observed=True)[list(ids)]
    lines_of = {key: rows.to_numpy() for key, rows in wide.groupby(cell[:3], sort=False, observed=True)}
    for target, method, members, digest in tqdm(list(_cells(run, maps)), desc="curves", mininterval=1):
        others = np.stack([lines_of[target, method, name] for name in _members(run, maps, target, method)])
        lines = {
            POOLED: _judge(run, target, members, digest, rule, fractions)["correct"],
            BEST: np.stack([cross_fitted_best(part, run.settings.seed) for part in others.swapaxes(0, 1)]),
            RANDOM: others.mean(0),
        }
        if (target, method) in maps:
            lines[OWN] = lines_of[target, method, target]
        for line, values in lines.items():
            for fraction, row in zip(fractions, values, strict=True):
                parts.append(pd.DataFrame({"line": line, "fraction": fraction, "image": ids, "correct": row}))
    floor = study.recognition_table(run, controls, run.models, fractions)
    parts.append(_strings(floor).rename(columns={"source": "line"})[["line", "fraction", "image", "correct"]])
    table = pd.concat(parts, ignore_index=True)
    table["line"] = pd.Categorical(
        table["line"], categories=[POOLED, RANDOM, BEST, OWN, *(name for name, _ in controls)]
    )
    return summarize(table, ["line", "fraction"], "correct", run.settings.seed)


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


def differences(scores: pd.DataFrame, outcome: str, seed: int) -> pd.DataFrame:
    """Consensus minus each comparator, image by image.

    Parameters
    ----------
    scores : pd.DataFrame
        ``SCORES_SCHEMA``, single models and consensus.
    outcome : str
        A column of numbers.
    seed : int
        Of the split behind the best single other.

    Returns
    -------
    pd.DataFrame
        One row per ``against`` (random or best single other, own map), ``rule``, ``target`` and ``method`` (the
        index), one column per image.
        The random single other is the image's mean over the pool. The best single other is chosen for each target,
        method and outcome by :func:`cross_fitted_best`. So is the ``chosen rule``, added where there are several
        rules, but by the *other* targets: neither the evaluated model nor the evaluated images have a say.
        Images and cells without numbers are left out.
    """
    wide = scores.pivot_table(
        index=["kind", "target", "method", "candidate"], columns="image", values=outcome, sort=False
    )
    if not len(wide):
        return wide
    cell = ["target", "method"]

    others, pooled = wide.loc["other"], wide.loc["consensus"]
    best = {key: cross_fitted_best(part.to_numpy(), seed) for key, part in others.groupby(cell, sort=False)}
    against = {
        RANDOM: others.groupby(cell, sort=False).mean(),
        BEST: pd.DataFrame.from_dict(best, orient="index", columns=wide.columns).set_axis(_pairs(best), axis=0),
    }
    if "own" in wide.index.get_level_values("kind"):
        against[OWN] = wide.loc["own"].droplevel("candidate")
    rules = {rule: rows.droplevel("candidate") for rule, rows in pooled.groupby("candidate", sort=False)}
    if len(rules) > 1 and len(pooled.index.unique("target")) > 1:
        rules[CHOSEN] = _chosen(pooled, seed)
    parts = {
        (name, rule): (rows - against[name]).reindex(rows.index).dropna(how="all")
        for name in against
        for rule, rows in rules.items()
    }
    return pd.concat(parts, names=["against", "rule"])


def _pairs(keys: Iterable[tuple[str, str]]) -> pd.MultiIndex:
    return pd.MultiIndex.from_tuples(keys, names=["target", "method"])


def _chosen(pooled: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Scores (target, method) x images of the rule that the other targets choose on the other half of the images."""
    found = {}
    for method, rows in pooled.groupby("method", sort=False):
        values = {target: part.droplevel(["target", "method"]) for target, part in rows.groupby("target", sort=False)}
        for target, own in values.items():
            others = [part.loc[own.index] for name, part in values.items() if name != target]
            if others:
                judges = np.mean([part.to_numpy() for part in others], axis=0)
                found[target, method] = cross_fitted_best(own.to_numpy(), seed, judges)
    table = pd.DataFrame.from_dict(found, orient="index", columns=pooled.columns).set_axis(_pairs(found), axis=0)
    return table.reindex(pooled.droplevel("candidate").index.unique())


def compare(scores: pd.DataFrame, seed: int, by: Sequence[str] = ()) -> pd.DataFrame:
    """Paired differences of every rule's consensus to every comparator, in every outcome.

    Parameters
    ----------
    scores : pd.DataFrame
        ``SCORES_SCHEMA``, single models and consensus.
    seed : int
        Of bootstrap, sign flips and split.
    by : Sequence[str]
        What is kept apart: ``"target"``, ``"method"``, both or nothing. The rest is averaged within the image.

    Returns
    -------
    pd.DataFrame
        Columns ``outcome``, ``against``, ``rule``, ``by``, ``mean``, ``low``, ``high`` (bootstrap over images), ``n``,
        ``p`` (sign flips), ``holm``: p corrected over the family, which is one outcome against one comparator, with
        all its rules and groups. Positive: the consensus is better. Outcomes without numbers are left out.
    """
    tables = []
    for outcome in OUTCOMES:
        table = differences(scores, outcome, seed)
        if not len(table):
            continue
        groups = table.groupby(["against", "rule", *by], sort=False).mean()
        for _, family in groups.groupby(level="against", sort=False):
            flips = max(2000, LEAST_P * len(family))
            found = [paired_difference(row, np.zeros(len(row)), seed, n_resamples=flips) for row in family.to_numpy()]
            names = family.index.to_frame(index=False).assign(outcome=OUTCOMES[outcome])
            numbers = pd.DataFrame(found, columns=list(Interval._fields))
            tables.append(pd.concat([names, numbers], axis=1).assign(holm=holm(numbers["p"])))
    result = pd.concat(tables, ignore_index=True)
    return result[["outcome", "against", "rule", *by, *Interval._fields, "holm"]]


def decided(cells: pd.DataFrame) -> pd.DataFrame:
    """Count in how many cells the consensus is better, worse, or neither can be said.

    Parameters
    ----------
    cells : pd.DataFrame
        From :func:`compare`.

    Returns
    -------
    pd.DataFrame
        One row per outcome and comparator: ``question``, ``better``, ``undecided``, ``worse`` (Holm-corrected p
        under 0.05), and ``cells``, their sum.
    """
    sign = np.sign(cells["mean"]).where(cells["holm"] < ALPHA, 0)
    question = cells["outcome"] + " vs. " + cells["against"]
    counts = pd.crosstab(question, sign).reindex(index=question.unique(), columns=[1.0, 0.0, -1.0], fill_value=0)
    counts.columns = pd.Index(["better", "undecided", "worse"])
    return counts.assign(cells=counts.sum(axis=1)).rename_axis("question").reset_index()


def rules_compared(scores: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Each rule against the mean of all rules, averaged over targets and methods within the image.

    Parameters
    ----------
    scores : pd.DataFrame
        ``SCORES_SCHEMA``.
    seed : int
        Of bootstrap and sign flips.

    Returns
    -------
    pd.DataFrame
        Columns ``outcome``, ``rule``, ``level`` (mean of the outcome), ``mean``, ``low``, ``high``, ``n``, ``p`` of the
        difference, ``holm`` over the rules of one outcome.
    """
    tables = []
    pooled = scores[scores["kind"] == "consensus"]
    for outcome, name in OUTCOMES.items():
        wide = pooled.pivot_table(index="candidate", columns="image", values=outcome, sort=False)
        if not wide.size:
            continue
        mean = wide.mean().to_numpy()
        numbers = pd.DataFrame([paired_difference(row, mean, seed) for row in wide.to_numpy()])
        numbers.insert(0, "level", wide.mean(axis=1).to_numpy())
        numbers.insert(0, "rule", wide.index)
        tables.append(numbers.assign(holm=holm(numbers["p"]), outcome=name))
    return pd.concat(tables, ignore_index=True)


def pool_size_scores(run: Run, maps: Maps, rule: str) -> pd.DataFrame:
    """Recognition by the target of the consensus of 1, 2, ... of the others.

    Parameters
    ----------
    run : Run
        Gives models, images and parameters.
    maps : Maps
        (model, method) to maps (N, H, W).
    rule : str
        The rule of consensus.

    Returns
    -------
    pd.DataFrame
        Columns ``target``, ``method``, ``size``, ``image``, ``correct``, the mean of ``pool_draws`` draws. In each draw
        every image has its own random order of the others, of which the first ``size`` form its pool: the pools of an
        image are nested, and the mean over images is one over pools. The largest pool is the full one. Methods that
        some of the pool refuse are left out.
    """
    ids, parts = run.dataset.ids, []
    generator = torch.Generator().manual_seed(run.settings.seed)
    every = torch.arange(len(ids))
    full = {target: len(pool) for target, pool in held_out_pools(_architectures(run)).items()}
    cells = [cell for cell in _cells(run, maps) if len(cell[2]) == full[cell[0]]]
    for target, method, members, digest in tqdm(cells, desc="pool size", mininterval=1):
        m = len(members)
        orders = [torch.rand(m, len(ids), generator=generator).argsort(0) for _ in range(run.settings.pool_draws)]
        for size in range(1, m + 1):
            found = []
            for order in orders if size < m else [torch.arange(m)[:, None].expand(-1, len(ids))]:
                chosen = order[:size]
                drawn = f"{digest} {sha256_tensors({'order': chosen})}" if size < m else digest
                scores = _judge(run, target, members[chosen, every], drawn, rule, [run.settings.fraction])
                found.append(scores["correct"][0])
            names = {"target": target, "method": method, "size": size, "image": ids}
            parts.append(pd.DataFrame(names | {"correct": np.mean(found, axis=0)}))
    return _ordered(pd.concat(parts, ignore_index=True), "method")


def gain_by_size(sizes: pd.DataFrame, seed: int) -> pd.DataFrame:
    """What a pool gains over a single other model, paired by image.

    Parameters
    ----------
    sizes : pd.DataFrame
        From :func:`pool_size_scores`.
    seed : int
        Of bootstrap and sign flips.

    Returns
    -------
    pd.DataFrame
        Columns ``size``, ``mean``, ``low``, ``high``, ``n``, ``p``: accuracy minus that of pools of one, mean over
        targets and methods.
    """
    rows = [(size, *paired(sizes, "size", size, 1, "correct", seed)) for size in sorted(sizes["size"].unique())]
    return pd.DataFrame(rows, columns=["size", *Interval._fields])


def pooling_scores(run: Run, maps: Maps, scores: pd.DataFrame, rule: str) -> pd.DataFrame:
    """Pooling over models, over methods, over both, over neither.

    Parameters
    ----------
    run : Run
        Gives models, images and parameters.
    maps : Maps
        (model, method) to maps (N, H, W).
    scores : pd.DataFrame
        From :func:`single_scores` and :func:`consensus_scores`.
    rule : str
        The rule of consensus.

    Returns
    -------
    pd.DataFrame
        Columns ``models`` (own, one other, all others), ``methods`` (one, all), ``target``, ``image``,
        ``correct``: the mean over what is not pooled.
    """
    grids, ids, parts = _grids(run, maps), run.dataset.ids, []
    names = {"own": "own model", "other": "one other model", "consensus": "all other models"}
    alone = scores[(scores["kind"] != "consensus") | (scores["candidate"] == rule)].sort_values(
        "kind", ascending=False, kind="stable"
    )
    alone = alone.groupby(["kind", "target", "image"], sort=False)["correct"].mean().reset_index()
    parts.append(alone.assign(models=alone.pop("kind").map(names), methods="one method"))

    def judge(target: str, sources: Sequence[str], models: str) -> None:
        members = [values for (source, _), values in grids.items() if source in sources]
        if members:
            stack = torch.stack(members)
            found = _judge(run, target, stack, sha256_tensors({"maps": stack}), rule, [run.settings.fraction])
            cell = {"target": target, "image": ids, "models": models, "methods": "all methods"}
            parts.append(pd.DataFrame(cell | {"correct": found["correct"][0]}))

    for target, pool in tqdm(held_out_pools(_architectures(run)).items(), desc="pooling methods", mininterval=1):
        judge(target, [target], names["own"])
        judge(target, pool, names["consensus"])
        for source in pool:
            judge(target, [source], names["other"])
    table = pd.concat(parts, ignore_index=True)
    table = table.groupby(["models", "methods", "target", "image"], sort=False)["correct"].mean().reset_index()
    return _ordered(table, "models", "methods")


def consistency(run: Run, maps: Maps, rule: str, splits: int = 10) -> pd.DataFrame:
    """How alike maps are before and after harmonization, on the grid of patches.

    Parameters
    ----------
    run : Run
        Gives models, images and parameters.
    maps : Maps
        (model, method) to maps (N, H, W).
    rule : str
        The rule of consensus.
    splits : int
        Random splits of the architectures into two disjoint pools.

    Returns
    -------
    pd.DataFrame
        Columns ``pair``, ``method``, ``image``, ``spearman``, ``topk_iou`` (top 10 %), mean over pairs of maps. Pairs
        are two single models of different architectures; two disjoint pools of half the architectures; and the
        held-out consensuses of two targets, which share all members but two, so that they agree by construction.
    """
    pools, grids, parts = held_out_pools(_architectures(run)), _grids(run, maps), []
    firsts = list(dict.fromkeys(name for pool in pools.values() for name in pool))
    half = len(firsts) // 2
    names = {
        "single": "two single models",
        "disjoint": f"two disjoint pools of {half}",
        "shared": f"two held-out pools of {len(firsts) - 1} (sharing {len(firsts) - 2})",
    }
    rng = np.random.default_rng(run.settings.seed)
    orders = [rng.permutation(len(firsts)).tolist() for _ in range(splits if half > 1 else 0)]
    for method in tqdm(dict.fromkeys(method for _, method in maps), desc="consistency", mininterval=1):
        if any((name, method) not in grids for name in firsts):
            continue
        members = torch.stack([grids[name, method] for name in firsts])
        digest = sha256_tensors({"maps": members})
        key = {"version": VERSION, "maps": digest, "rule": rule, "orders": orders, "top": TOP}
        found = remember("consistency", key, partial(_agree, members, rule, orders))
        for name in (name for name in names if name in found):
            cell, (rho, iou) = {"pair": names[name], "method": method, "image": run.dataset.ids}, found[name]
            parts.append(pd.DataFrame(cell | {"spearman": rho.numpy(), "topk_iou": iou.numpy()}))
    empty = pd.DataFrame(columns=["pair", "method", "image", "spearman", "topk_iou"])
    return _ordered(pd.concat(parts, ignore_index=True) if parts else empty, "pair", "method")


def _agree(members: Tensor, rule: str, orders: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Mean agreement (2, N), Spearman and top-k overlap, of members (M, N, h, w) and of their consensuses."""
    every, half = range(len(members)), len(members) // 2

    def pooled(index: Sequence[int]) -> Tensor:
        return consensus(members[index], rule)

    pairs = {
        "single": list(combinations(members, 2)),
        "disjoint": [(pooled(order[:half]), pooled(order[half : 2 * half])) for order in orders],
        "shared": list(combinations([pooled([i for i in every if i != out]) for out in every], 2)),
    }

    def mean(measure: Callable[[Tensor, Tensor], Tensor], maps: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([measure(a, b) for a, b in maps]).nanmean(0)

    return {
        name: torch.stack([mean(spearman, maps), mean(partial(topk_iou, fraction=TOP), maps)])
        for name, maps in pairs.items()
        if maps
    }


def shortcut_scores(run: Run, maps: Maps, rule: str) -> pd.DataFrame:
    """Does the consensus inherit what its pool shares? Models trained for scenes, on the same pixels, look elsewhere.

    Parameters
    ----------
    run : Run
        Gives models, images and parameters; of its methods, those in ``shortcut_methods`` are used.
    maps : Maps
        (model, method) to maps (N, H, W) of the run's models.
    rule : str
        The rule of consensus.

    Returns
    -------
    pd.DataFrame
        Columns ``trained`` (objects, scenes), ``map`` (single, consensus), ``method``, ``image``, ``relevance_rank``:
        how much of the object-sized top of the map lies on the object, mean over single models or held-out pools.
        Empty unless the data are shapes-on-scenes and the zoo has the scene models of three architectures or more.
    """
    settings, empty = run.settings, pd.DataFrame(columns=["trained", "map", "method", "image", "relevance_rank"])
    names = {name: f"{name.removesuffix('-obj')}-scene" for name in run.models if name.endswith("-obj")}
    names = {name: scene for name, scene in names.items() if scene in list_models()}
    if run.dataset.name != "shapes-on-scenes" or len(names) < 3:
        return empty
    scenes = load_dataset("shapes-on-scenes", "test", len(run.dataset), labels="scene")
    models = {scene: load_model(scene, device=settings.device) for scene in names.values()}
    methods = [method for method in settings.shortcut_methods if method in settings.methods]
    trained = {
        "objects": {key: values for key, values in maps.items() if key[0] in names and key[1] in methods},
        "scenes": study.all_maps(models, scenes, methods, settings.seed, settings.options),
    }
    parts = []
    for labels, some in trained.items():
        for method in methods:
            members = [values for (_, name), values in _grids(run, some).items() if name == method]
            for out in tqdm(range(len(members)), desc=f"shortcut: {labels}, {method}", leave=False):
                others = torch.stack(members[:out] + members[out + 1 :])
                values = {"single": members[out], "consensus": consensus(others, rule)}
                for kind, grid in values.items():
                    cell = {"trained": labels, "map": kind, "method": method, "image": run.dataset.ids}
                    parts.append(pd.DataFrame(cell | {"relevance_rank": _located(run, grid)}))
    table = pd.concat(parts, ignore_index=True) if parts else empty
    return table.groupby(["trained", "map", "method", "image"], sort=False)["relevance_rank"].mean().reset_index()


def paired(table: pd.DataFrame, column: str, a: object, b: object, value: str, seed: int) -> Interval:
    """Mean difference between two groups of a per-image table, paired by image.

    Parameters
    ----------
    table : pd.DataFrame
        Long table with a column ``image``.
    column : str
        Column that tells the groups apart.
    a : object
        One group.
    b : object
        The group that is subtracted.
    value : str
        Column of numbers; averaged within the image.
    seed : int
        Of bootstrap and sign flips.

    Returns
    -------
    Interval
        Of a - b; n = 0 where one of the groups is not there.
    """
    wide = table.pivot_table(index="image", columns=column, values=value, observed=True)
    if a not in wide or b not in wide:
        return Interval(np.nan, np.nan, np.nan, 0)
    return paired_difference(wide[a], wide[b], seed)


def headline(run: Run) -> str:
    """The rule that claims are judged by: chosen by other targets on other images, where there are several rules.

    Parameters
    ----------
    run : Run
        Gives rules.

    Returns
    -------
    str
        ``"chosen rule"``, or the only rule.
    """
    return CHOSEN if len(_rules(run)) > 1 else run.settings.rule


def measured(run: Run, overall: pd.DataFrame, sizes: pd.DataFrame) -> dict[str, Interval]:
    """What the notebook's claims are judged by.

    Parameters
    ----------
    run : Run
        Gives rules and seed.
    overall : pd.DataFrame
        From :func:`compare` without groups.
    sizes : pd.DataFrame
        From :func:`pool_size_scores`.

    Returns
    -------
    dict[str, Interval]
        Claim id to interval; n = 0 where there is nothing to measure.
    """

    def read(outcome: str, against: str) -> Interval:
        rows = overall[
            (overall["outcome"] == outcome) & (overall["against"] == against) & (overall["rule"] == headline(run))
        ]
        if not len(rows):
            return Interval(np.nan, np.nan, np.nan, 0)
        row = rows.iloc[0]
        return Interval(row["mean"], row["low"], row["high"], int(row["n"]), row["p"])

    largest = sizes["size"].max()
    return {
        "harmonized_detects": read("recognition", RANDOM),
        "harmonized_beats_best": read("recognition", BEST),
        "harmonized_beats_own": read("recognition", OWN),
        "harmonized_localizes": read("localization", OWN),
        "pool_size": paired(sizes, "size", largest, 2 if largest > 2 else None, "correct", run.settings.seed),
    }


def findings(run: Run, overall: pd.DataFrame, alike: pd.DataFrame, shortcut: pd.DataFrame, kinds: pd.DataFrame) -> str:
    """Say what the tables show, beyond the ledger.

    Parameters
    ----------
    run : Run
        Gives rule and seed.
    overall : pd.DataFrame
        From :func:`compare` without groups.
    alike : pd.DataFrame
        From :func:`consistency`.
    shortcut : pd.DataFrame
        From :func:`shortcut_scores`.
    kinds : pd.DataFrame
        From :func:`pooling_scores`.

    Returns
    -------
    str
        Markdown, one line per finding: mean difference, interval, n, and p (Holm-corrected where it is of a family).
    """
    seed, lines = run.settings.seed, []

    def say(what: str, i: Interval) -> None:
        if i.n:
            lines.append(f"- {what}: {i.mean:+.3f} [{i.low:+.3f}, {i.high:+.3f}], n = {i.n}, p = {i.p:.4f}.")

    for rule in dict.fromkeys((headline(run), run.settings.rule)):
        rows = overall[overall["rule"] == rule]
        for row in rows.itertuples():
            difference = Interval(row.mean, row.low, row.high, int(row.n), row.holm)
            say(f"Consensus ({label(rule)}) minus {row.against}, {row.outcome}", difference)
    names = list(alike["pair"].unique())
    for name in names[1:]:
        for column, measure in (("spearman", "Spearman correlation"), ("topk_iou", "top-10 % overlap")):
            say(f"{measure}: {name} minus {names[0]}", paired(alike, "pair", name, names[0], column, seed))
    for labels in shortcut["trained"].unique():
        some = shortcut[shortcut["trained"] == labels]
        difference = paired(some, "map", "consensus", "single", "relevance_rank", seed)
        say(f"Relevance rank on the object, models trained for {labels}: consensus minus single", difference)
    for models in kinds["models"].unique():
        some = kinds[kinds["models"] == models]
        difference = paired(some, "methods", "all methods", "one method", "correct", seed)
        say(f"Recognition of {models}: all methods pooled minus one method", difference)
    return "\n".join(lines)


def draw_outcomes(table: pd.DataFrame, y: str, hue: str | None, title: str) -> Figure:
    """Paired differences side by side: one panel per outcome.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`compare` or :func:`rules_compared`.
    y : str
        Column on the vertical axis.
    hue : str | None
        Column that tells groups apart.
    title : str
        What it shows.

    Returns
    -------
    Figure
        The figure.
    """
    outcomes, rows = list(dict.fromkeys(table["outcome"])), table[y].nunique()
    groups = table[hue].nunique() if hue else 1
    size = (7.2, 1.3 + rows * max(0.2, 0.11 * groups))
    figure, axes = plt.subplots(1, len(outcomes), figsize=size, sharey=True, squeeze=False)
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        forest(ax, table[table["outcome"] == outcome], y, outcome.capitalize(), UNITS[outcome], hue)
        ax.grid(axis="y", visible=False)
        ax.locator_params(axis="x", nbins=4)
        ax.set_ylim(rows - 0.5, -0.5)
    if hue:
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncol=groups)
    figure.suptitle(title, fontweight="bold", fontsize="medium", x=0.01, ha="left")
    return figure


def draw_shortcut(run: Run, shortcut: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Where single maps and consensuses look, by what the models were trained for.

    Parameters
    ----------
    run : Run
        Gives masks and seed.
    shortcut : pd.DataFrame
        From :func:`shortcut_scores`.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure and its table: ``pool``, ``method``, ``mean``, ``low``, ``high``, ``n``.
    """
    named = shortcut.assign(pool="trained for " + shortcut["trained"] + ": " + shortcut["map"])
    named["method"] = named["method"].map(label)
    table = summarize(named, ["pool", "method"], "relevance_rank", run.settings.seed)
    table = table.sort_values("pool", ascending=False, kind="stable")
    figure, ax = plt.subplots(figsize=(7, 2.6))
    forest(ax, table, "method", "Where object and scene models look", "relevance rank on the object", "pool")
    if run.dataset.masks is not None:
        ax.axvline(float(run.dataset.masks.float().mean()), color="0.5", ls="--", lw=1)
    ax.grid(axis="y", visible=False)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure, table


def panels(run: Run, maps: Maps, target: str, method: str, images: Sequence[int]) -> list[list[tuple[Tensor, str]]]:
    """Rows of a gallery: the image, the target's own map and its pool; then the mask and the consensus by each rule.

    Parameters
    ----------
    run : Run
        Gives models, images, rules and patch.
    maps : Maps
        (model, method) to maps (N, H, W).
    target : str
        The model held out.
    method : str
        An attribution method.
    images : Sequence[int]
        Positions of the images shown.

    Returns
    -------
    list[list[tuple[Tensor, str]]]
        Two rows per image, for :func:`plots.gallery`. Consensus maps have their median taken off, for the colors.
    """
    data, patch = run.dataset, run.settings.patch
    grids = {key: _upsample(values, patch) for key, values in _grids(run, maps).items() if key[1] == method}
    names = [name for name in (target, *_members(run, maps, target, method)) if (name, method) in grids]
    rules = {rule: held_out_consensus(run, maps, target, method, rule) for rule in _rules(run)}
    rows = []
    for i in images:
        masks = [] if data.masks is None else [(data.masks[i], "object mask")]
        own = [(grids[name, method][i], label(name) + ("\n(own)" if name == target else "")) for name in names]
        pooled = [(values[i] - values[i].median(), label(rule).replace(" ", "\n", 1)) for rule, values in rules.items()]
        rows += [[(data.images[i], "image"), *own], [*masks, *pooled]]
    return rows


def _architectures(run: Run) -> dict[str, str]:
    return {name: model.architecture for name, model in run.models.items()}


def _rules(run: Run) -> list[str]:
    return list(dict.fromkeys([*run.settings.rules, run.settings.rule]))


def _deletion_part(run: Run) -> Dataset:
    return run.dataset.select(torch.arange(min(run.settings.n_deletion, len(run.dataset))))


def _grids(run: Run, maps: Maps) -> dict[tuple[str, str], Tensor]:
    return {key: patch_scores(values, run.settings.patch) for key, values in maps.items()}


def _upsample(grids: Tensor, patch: int) -> Tensor:
    return grids.repeat_interleave(patch, -2).repeat_interleave(patch, -1)


def _members(run: Run, maps: Maps, target: str, method: str) -> list[str]:
    return [name for name in held_out_pools(_architectures(run))[target] if (name, method) in maps]


def _pool(run: Run, grids: Maps, target: str, method: str) -> Tensor:
    members = [grids[name, method] for name in _members(run, grids, target, method)]
    return torch.stack(members) if members else torch.empty(0)


def _cells(run: Run, maps: Maps) -> Iterator[tuple[str, str, Tensor, str]]:
    """Target, method, the maps of the pool on the grid of patches, and their hash."""
    grids = _grids(run, maps)
    for target in run.models:
        for method in dict.fromkeys(method for _, method in maps):
            members = _pool(run, grids, target, method)
            if len(members):
                yield target, method, members, sha256_tensors({"maps": members})


def _judge(
    run: Run, target: str, members: Tensor, digest: str, rule: str, fractions: Sequence[float], whole: bool = False
) -> dict[str, NDArray[np.float64]]:
    """Scores of the consensus of members (M, N, h, w) by the target: correct and probability (F, N); if whole also the
    probability left after deletion (D, n) and the relevance rank (N)."""
    settings, data, part = run.settings, run.dataset, _deletion_part(run)
    model: Model = run.models[target]
    seen = {"images": data.images, "labels": data.labels}
    if data.masks is not None:
        seen["masks"] = data.masks
    key = {
        "version": VERSION,
        "weights": model.weights_hash,
        "images": sha256_tensors(seen),
        "maps": digest,
        "rule": rule,
        "patch": settings.patch,
        "fill": settings.fill,
        "seed": settings.seed,
        "fractions": list(fractions),
        "deletion": [len(part), *DELETED] if whole else None,
    }

    def compute() -> dict[str, Tensor]:
        harmonized = _upsample(consensus(members, rule), settings.patch)
        shown = (settings.patch, settings.fill)
        correct, probability = recognize({"": model}, data, harmonized, fractions, *shown, seed=settings.seed)
        found = {"correct": correct[:, 0, 0].astype(np.float64), "probability": probability[:, 0, 0]}
        if whole:
            some = harmonized[: len(part)]
            _, left = recognize({"": model}, part, some, DELETED, *shown, sides=[True], seed=settings.seed)
            rank = torch.full((len(data),), torch.nan) if data.masks is None else relevance_rank(harmonized, data.masks)
            found |= {"left": left[:, 0, 0], "relevance_rank": rank.double().numpy()}
        return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in found.items()}

    return {name: values.numpy() for name, values in remember("harmonization", key, compute).items()}


def _located(run: Run, grids: Tensor) -> NDArray[np.float64]:
    if run.dataset.masks is None:
        return np.full(len(grids), np.nan)
    masks, maps = run.dataset.masks, _upsample(grids, run.settings.patch)
    key = {"version": VERSION, "inputs": sha256_tensors({"maps": grids, "masks": masks})}
    return remember("relevance_rank", key, lambda: {"rank": relevance_rank(maps, masks)})["rank"].numpy()


def _ordered(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Let columns sort as they appear."""
    return table.assign(**{name: pd.Categorical(table[name], list(dict.fromkeys(table[name]))) for name in columns})


def _strings(table: pd.DataFrame) -> pd.DataFrame:
    return table.astype({name: str for name in ("source", "target", "method", "image")})


def _validated(table: pd.DataFrame) -> pd.DataFrame:
    return SCORES_SCHEMA.validate(table[list(SCORES_SCHEMA.columns)].reset_index(drop=True))
