"""Harmonization on held-out architectures: does the consensus of others beat one model's map?

Everything happens on the grid of patches: maps are averaged over patches first, so that a consensus gains nothing by
smoothing alone and all rules, single models and own maps are compared at one resolution. The model that is evaluated
looks at features of its own held-out pool only: one model of every *other* architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations

import numpy as np
import pandas as pd
import pandera.pandas as pa
import torch
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
from harmonize_lib.plots import label
from harmonize_lib.statistics import cross_fitted_best, summarize
from harmonize_lib.storage import remember, sha256_tensors
from harmonize_lib.study import Run
from harmonize_lib.transfer import area_over_fractions, held_out_pool, recognize

VERSION = 1
DELETED = (0.02, 0.05, 0.1, 0.2)  # shares of the patches taken away, over which the deletion curve is integrated
RANDOM, BEST, OWN = "random single other", "best single other", "own map"
POOLED = "consensus of the others"
OUTCOMES = {"correct": "recognition", "relevance_rank": "localization", "deletion": "deletion"}
TOP = 0.1  # share of the patches in the top-k overlap of two maps

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
    cells = [(*cell, rule) for cell in _cells(run, maps) for rule in rules_of(run)]
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


def control_scores(run: Run, controls: Maps) -> pd.DataFrame:
    """How well every target does with maps that know no model.

    Parameters
    ----------
    run : Run
        Gives models, images and parameters.
    controls : Maps
        (name, ``"control"``) to maps (N, H, W).

    Returns
    -------
    pd.DataFrame
        Columns ``target``, ``candidate``, ``image``, ``correct``, ``relevance_rank`` (NaN without masks), as in
        :func:`single_scores`.
    """
    seen = study.recognition_table(run, controls, run.models, list(run.settings.fractions))
    seen = _strings(seen[seen["fraction"] == run.settings.fraction]).rename(columns={"source": "candidate"})
    located = {name: _located(run, values) for (name, _), values in _grids(run, controls).items()}
    ranks = pd.DataFrame(located, index=pd.Index(run.dataset.ids, name="image")).melt(
        var_name="candidate", value_name="relevance_rank", ignore_index=False
    )
    columns = ["target", "candidate", "image", "correct", "relevance_rank"]
    return seen.merge(ranks.reset_index(), on=["candidate", "image"])[columns]


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
    scenes = load_dataset("shapes-on-scenes", "test", len(run.dataset), settings.seed, labels="scene")
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
    rules = {rule: held_out_consensus(run, maps, target, method, rule) for rule in rules_of(run)}
    rows = []
    for i in images:
        masks = [] if data.masks is None else [(data.masks[i], "object mask")]
        own = [(grids[name, method][i], label(name) + ("\n(own)" if name == target else "")) for name in names]
        pooled = [(values[i] - values[i].median(), label(rule).replace(" ", "\n", 1)) for rule, values in rules.items()]
        rows += [[(data.images[i], "image"), *own], [*masks, *pooled]]
    return rows


def _architectures(run: Run) -> dict[str, str]:
    return {name: model.architecture for name, model in run.models.items()}


def rules_of(run: Run) -> list[str]:
    """The run's rules of consensus, the one that is read everywhere included.

    Parameters
    ----------
    run : Run
        Gives rules.

    Returns
    -------
    list[str]
        Names without repetition.
    """
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
        "model": model.identity,
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
