"""Harmonization: who is in a pool, against literal loops, and models whose features are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from harmonize_lib import harmonization, paths
from harmonize_lib.comparison import (
    CHOSEN,
    against_controls,
    compare,
    decided,
    differences,
    gain_by_size,
    measured,
    rules_compared,
)
from harmonize_lib.consensus import consensus, list_rules
from harmonize_lib.data import Dataset
from harmonize_lib.errors import HarmonizeError
from harmonize_lib.features import patch_scores
from harmonize_lib.harmonization import (
    BEST,
    DELETED,
    OWN,
    POOLED,
    RANDOM,
    consensus_scores,
    consistency,
    control_scores,
    held_out_consensus,
    held_out_maps,
    held_out_pools,
    pool_size_scores,
    pooling_scores,
    recognition_curves,
    shortcut_scores,
    single_scores,
)
from harmonize_lib.models import ARCHITECTURES
from harmonize_lib.parameters import Harmonization, check
from harmonize_lib.statistics import cross_fitted_best, holm
from harmonize_lib.study import Run
from harmonize_lib.transfer import recognize

SIDE, PATCH, N = 8, 2, 12
TOP = 4  # of the 16 patches are shown
NAMES = {"a-obj": "a", "a-obj-s1": "a", "b-obj": "b", "c-obj": "c", "d-obj": "d"}
METHODS = ("one", "two")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


class Spot(nn.Module):
    """Tells the class from the patch at the top left: bright if it is white, dark if it is black or filled."""

    def __init__(self, name: str, architecture: str) -> None:
        super().__init__()
        self.name, self.architecture, self.identity = name, architecture, name

    def forward(self, x: Tensor) -> Tensor:
        logit = 4 * x[:, 0, :PATCH, :PATCH].mean((1, 2)) - 3
        return torch.stack([-logit, logit], 1)


def data(masks: bool = True) -> Dataset:
    """Noise with mean 1/2; the patch at the top left, which is the object, is white for class 1, else black."""
    labels = torch.arange(N) % 2
    images = torch.rand(N // 2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    images = torch.stack([images, 1 - images], 1).flatten(0, 1)
    images[:, 0, :PATCH, :PATCH] = labels[:, None, None].float()
    mask = torch.zeros(N, SIDE, SIDE, dtype=torch.bool)
    mask[:, :PATCH, :PATCH] = True
    ids = tuple(f"image-{i}" for i in range(N))
    return Dataset(images, labels, ("dark", "bright"), mask if masks else None, ids, "spots")


def start(tmp_path: Path, names: Mapping[str, str] = NAMES, masks: bool = True, **settings: object) -> Run:
    given = {"models": list(names), "patch": PATCH, "fraction": TOP / 16, "fractions": [1 / 16, 0.25], "n_deletion": 8}
    values = Harmonization.model_construct(
        **(given | {"rules": ["mean", "borda"], "methods": list(METHODS)} | settings)
    )  # unchecked: these models and methods are known here alone
    models = {name: Spot(name, architecture).eval() for name, architecture in names.items()}
    return Run("05_harmonisation", values, data(masks), models, tmp_path, 0.0)


def noise(seed: int = 0, names: Mapping[str, str] = NAMES) -> dict[tuple[str, str], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(N, SIDE, SIDE, generator=generator) for key in product(names, METHODS)}


def distracted(names: Mapping[str, str] = NAMES) -> dict[tuple[str, str], Tensor]:
    """Every map gives the object 1 and one patch of its own, different for every architecture, 1.2."""
    maps = {}
    for name, method in product(names, METHODS):
        values = torch.zeros(N, SIDE, SIDE)
        place = 2 * (1 + "abcd".index(names[name]) % 3), 2 * ("abcd".index(names[name]) // 3)
        values[:, place[0] : place[0] + PATCH, place[1] : place[1] + PATCH] = 1.2
        values[:, :PATCH, :PATCH] = 1
        maps[name, method] = values
    return maps


def blind() -> dict[tuple[str, str], Tensor]:
    """Controls: one knows where the object is, one puts it last."""
    spot = torch.zeros(N, SIDE, SIDE)
    spot[:, :PATCH, :PATCH] = 1
    generator = torch.Generator().manual_seed(3)
    rest = torch.rand(N, SIDE, SIDE, generator=generator)
    return {("edges", "control"): spot + 0.01 * rest, ("center", "control"): rest - 2 * spot}


def recognized(run: Run, grids: Tensor, shown: int = TOP) -> Tensor:
    """Whether Spot is right on the top patches of (N, 4, 4): on dark images always, on bright ones by the spot."""
    above = (grids.flatten(1) > grids[:, :1, 0]).sum(1)
    up_to = (grids.flatten(1) >= grids[:, :1, 0]).sum(1)
    assert ((above >= shown) | (up_to <= shown)).all()  # no tie at the edge
    return (above < shown) | (run.dataset.labels == 0)


def equal(a: pd.DataFrame, b: pd.DataFrame) -> bool:
    return a.reset_index(drop=True).equals(b.reset_index(drop=True))


# Who is in the pool


def test_no_pool_of_the_zoo_has_the_evaluated_architecture_nor_a_second_seed() -> None:
    zoo = {f"{name}-obj{seed}": name for seed in ("", "-s1") for name in ARCHITECTURES}
    pools = held_out_pools(zoo)
    assert list(pools) == list(zoo)
    for target, pool in pools.items():
        assert pool == [f"{name}-obj" for name in ARCHITECTURES if name != zoo[target]]


@pytest.mark.parametrize("order", ["given", "reversed"])
def test_the_first_seed_given_is_the_one_in_the_pools(order: str) -> None:
    names = NAMES if order == "given" else dict(reversed(NAMES.items()))
    first = next(name for name in names if names[name] == "a")
    assert [name for name in held_out_pools(names)["b-obj"] if names[name] == "a"] == [first]


@pytest.mark.parametrize("rule", list_rules())
@pytest.mark.parametrize("target", list(NAMES))
def test_maps_of_the_evaluated_architecture_do_not_reach_its_consensus(target: str, rule: str, tmp_path: Path) -> None:
    run, maps = start(tmp_path), noise()
    clean = held_out_consensus(run, maps, target, "one", rule)
    poison = {key: values if NAMES[key[0]] != NAMES[target] else values * torch.nan for key, values in maps.items()}
    assert torch.equal(held_out_consensus(run, poison, target, "one", rule), clean)
    other = next(name for name in NAMES if NAMES[name] not in (NAMES[target], "a"))
    power = maps | {(other, "one"): 1e6 * noise(1)[other, "one"]}
    assert not torch.equal(held_out_consensus(run, power, target, "one", rule), clean)


@pytest.mark.parametrize("architecture", ["a", "b"])
def test_poisoned_maps_change_no_score_of_a_consensus_shown_to_their_architecture(
    architecture: str, tmp_path: Path
) -> None:
    run, maps = start(tmp_path), noise()
    poison = {key: 1e6 * noise(1)[key] if NAMES[key[0]] == architecture else values for key, values in maps.items()}
    own = [name for name in NAMES if NAMES[name] == architecture]

    def tables(some: dict[tuple[str, str], Tensor]) -> list[pd.DataFrame]:
        scores = pd.concat([single_scores(run, some), consensus_scores(run, some)])
        pooled = pooling_scores(run, some, scores, "borda")
        return [
            consensus_scores(run, some),
            scores[scores["kind"] == "other"],
            pool_size_scores(run, some, "borda"),
            pooled[pooled["models"] != "own model"],
        ]

    for before, after in zip(tables(maps), tables(poison), strict=True):
        held_out = before["target"].isin(own)
        assert held_out.any() and equal(before[held_out], after[after["target"].isin(own)])
        assert not equal(before[~held_out], after[~after["target"].isin(own)])


def test_a_second_seed_is_in_nobodys_pool(tmp_path: Path) -> None:
    run, maps = start(tmp_path), noise()
    poison = {key: values * torch.nan if key[0] == "a-obj-s1" else values for key, values in maps.items()}
    assert equal(consensus_scores(run, maps), consensus_scores(run, poison))
    assert equal(pool_size_scores(run, maps, "mean"), pool_size_scores(run, poison, "mean"))


# Scores


def test_the_consensus_finds_what_single_maps_miss(tmp_path: Path) -> None:
    """The object is second in every single map, first in the mean: known differences in all outcomes."""
    run, maps = start(tmp_path, fraction=1 / 16), distracted()
    maps["a-obj", "one"] = run.dataset.masks.float()
    scores = pd.concat([single_scores(run, maps), consensus_scores(run, maps)], ignore_index=True)
    assert len(scores) == len(NAMES) * len(METHODS) * N * (1 + 2) + N * len(METHODS) * (2 * 3 + 3 * 3)
    found = scores.groupby(["target", "method", "kind"])[["correct", "relevance_rank"]].mean()
    assert (found.xs("consensus", level="kind") == 1).all(axis=None)
    assert (found.loc["a-obj", "one", "own"] == 1).all()
    assert (found.loc["a-obj", "two", "own"] == [0.5, 0]).all()
    assert (found.loc["b-obj", "two", "other"] == [0.5, 0]).all()

    away = 1 / (1 + math.exp(-2 * 1))  # p(dark) once the object is filled with 1/2: logits +-1
    pooled = scores[(scores["kind"] == "consensus") & (scores["candidate"] == "mean")]
    expected = torch.where(run.dataset.labels == 1, away, 1 - away).tolist()
    for image, values in pooled.groupby("image")["deletion"]:
        index = int(image.removeprefix("image-"))
        assert values.isna().all() if index >= 8 else np.allclose(values, expected[index], atol=1e-5)

    table = compare(scores, 0).set_index(["outcome", "rule", "against"])["mean"]
    assert table["recognition", "mean", RANDOM] == pytest.approx((7 * 1 / 2 + 3 * 1 / 3) / 10)
    assert table["recognition", "mean", BEST] == pytest.approx(7 * 1 / 2 / 10)
    assert table["recognition", CHOSEN, OWN] == pytest.approx(0.5 * 9 / 10)
    assert table["localization", "mean", OWN] == pytest.approx(9 / 10)


def test_scores_equal_one_image_and_one_cell_at_a_time(tmp_path: Path) -> None:
    run, maps = start(tmp_path), noise()
    table = consensus_scores(run, maps).set_index(["target", "method", "candidate", "image"]).sort_index()
    for target, method in (("a-obj", "one"), ("c-obj", "two")):
        pool = [name for name in NAMES if NAMES[name] != NAMES[target] and name != "a-obj-s1"]
        for i in (0, 1, 7, 11):
            grids = torch.stack([patch_scores(maps[name, method][i : i + 1], PATCH) for name in pool])
            mean = consensus(grids, "mean")
            row = table.loc[target, method, "mean", f"image-{i}"]
            one = start(tmp_path)
            object.__setattr__(one, "dataset", run.dataset.select(torch.tensor([i])))
            assert row["correct"] == recognized(one, mean)[0]
            assert row["relevance_rank"] == (mean.argmax() == 0)
            assert row["pool"] == len(pool)


def test_deletion_takes_the_top_patches_away(tmp_path: Path) -> None:
    run, maps = start(tmp_path), noise()
    scores = single_scores(run, maps).set_index(["target", "candidate", "method", "image"])["deletion"].sort_index()
    scores = scores.loc["a-obj", "b-obj", "one"].loc[list(run.dataset.ids)]
    part = run.dataset.select(torch.arange(8))
    _, left = recognize({"": run.models["a-obj"]}, part, maps["b-obj", "one"][:8], DELETED, PATCH, sides=[True])
    curve, area = left[:, 0, 0], np.zeros(8)
    for i in range(len(DELETED) - 1):
        area += (DELETED[i + 1] - DELETED[i]) * (curve[i] + curve[i + 1]) / 2
    expected = 1 - area / (DELETED[-1] - DELETED[0])
    assert np.allclose(scores[:8], expected)
    assert scores[8:].isna().all()


def test_a_method_some_models_refuse_shrinks_the_pool(tmp_path: Path) -> None:
    run = start(tmp_path)
    maps = {key: values for key, values in noise().items() if key not in {("b-obj", "two"), ("c-obj", "two")}}
    scores = pd.concat([single_scores(run, maps), consensus_scores(run, maps)], ignore_index=True)
    pooled = scores[scores["kind"] == "consensus"].groupby(["target", "method"])["pool"].first()
    assert pooled["d-obj", "one"] == 3 and pooled["d-obj", "two"] == 1 and pooled["b-obj", "two"] == 2
    own = scores[scores["kind"] == "own"].groupby(["target", "method"]).size()
    assert ("b-obj", "two") not in own.index
    assert set(pool_size_scores(run, maps, "borda")["method"]) == {"one"}
    assert compare(scores, 0, ["method"])["mean"].notna().all()


def test_maps_against_controls_that_are_right_and_wrong(tmp_path: Path) -> None:
    run, maps = start(tmp_path), noise()
    scores = pd.concat([single_scores(run, maps), consensus_scores(run, maps)], ignore_index=True)
    found = against_controls(run, scores, control_scores(run, blind()))
    mean = found.set_index(["outcome", "against", "map"])["mean"]
    labels = run.dataset.labels.numpy()
    known = {"edges": np.ones(N), "center": labels == 0}  # without the spot a bright image is called dark
    cells = ["target", "method", "image"]
    for kind, name in (("own", OWN), ("other", RANDOM)):
        part = scores[scores["kind"] == kind].groupby(cells)[["correct", "relevance_rank"]].mean()
        for control, right in known.items():
            assert np.isclose(mean["recognition", f"minus {control}", name], part["correct"].mean() - right.mean())
        assert np.isclose(mean["localization", "minus edges", name], part["relevance_rank"].mean() - 1)
    gain = differences(scores, "correct", 0).xs((OWN, CHOSEN), level=["against", "rule"])
    own = scores[scores["kind"] == "own"].pivot_table(index=["target", "method"], columns="image", values="correct")
    expected = (gain + own[gain.columns]).to_numpy().mean() - 1
    assert np.isclose(mean["recognition", "minus edges", POOLED], expected)
    again = against_controls(run, scores, control_scores(run, blind())[::-1])
    assert equal(again, found)


def test_without_masks_there_is_no_localization(tmp_path: Path) -> None:
    run, maps = start(tmp_path, masks=False), noise()
    scores = pd.concat([single_scores(run, maps), consensus_scores(run, maps)], ignore_index=True)
    overall = compare(scores, 0)
    assert set(overall["outcome"]) == {"recognition", "deletion"}
    assert set(rules_compared(scores, 0)["outcome"]) == {"recognition", "deletion"}
    controls = against_controls(run, scores, control_scores(run, blind()))
    assert set(controls["outcome"]) == {"recognition"}
    claims = measured(run, overall, pool_size_scores(run, maps, "borda"), controls)
    assert claims["harmonized_localizes"].n == 0 and claims["harmonized_beats_own"].n == N
    assert len(shortcut_scores(run, maps, "borda")) == 0


def test_nothing_is_computed_twice(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, maps = start(tmp_path), noise()
    first = consensus_scores(run, maps), pool_size_scores(run, maps, "borda"), consistency(run, maps, "borda")

    def never(*args: object, **options: object) -> None:
        raise AssertionError("computed again")

    for name in ("recognize", "relevance_rank", "spearman"):
        monkeypatch.setattr(harmonization, name, never)
    second = consensus_scores(run, maps), pool_size_scores(run, maps, "borda"), consistency(run, maps, "borda")
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))


# The best of several, without the winner's curse


def test_cross_fitted_best_against_a_loop() -> None:
    values = np.random.default_rng(0).normal(size=(4, 13))
    values[2, [0, 5]] = np.nan
    flips = np.random.default_rng(3).integers(2, size=7)
    half = [(i + flips[i // 2]) % 2 for i in range(13)]
    best = cross_fitted_best(values, 3)
    for i in range(13):
        means = [np.nanmean([row[j] for j in range(13) if half[j] != half[i]]) for row in values]
        assert best[i] == pytest.approx(values[np.argmax(means), i], nan_ok=True)


def test_cross_fitted_best_is_the_best_where_one_is_and_luckless_where_none_is() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(5, 40))
    values[3] += 100
    assert np.array_equal(cross_fitted_best(values, 0), values[3])
    lucky, fair = [], []
    for _ in range(200):
        values = rng.normal(size=(8, 40))
        lucky.append(values.mean(1).max())
        fair.append(cross_fitted_best(values, 0).mean())
    error = np.std(fair) / np.sqrt(len(fair))
    assert abs(np.mean(fair)) < 4 * error < np.mean(lucky)
    assert np.isnan(cross_fitted_best(np.ones((2, 1)), 0)).all()


def test_neither_the_target_nor_the_evaluated_images_choose_its_rule() -> None:
    scores = made_up()
    pooled = scores["kind"] == "consensus"
    rigged = scores.copy()
    rigged["correct"] = np.where(rigged["candidate"] == "mean", 1.0, np.where(pooled, 0.0, rigged["correct"]))
    for_t = rigged["target"] == "t"
    rigged.loc[for_t & pooled, "correct"] = 1 - rigged.loc[for_t & pooled, "correct"]
    table = differences(rigged, "correct", 0).loc[OWN]
    own = rigged[for_t & (rigged["kind"] == "own")].pivot_table(index="method", columns="image", values="correct")
    for method in METHODS:
        chosen = table.loc[CHOSEN, "t", method] + own.loc[method]
        assert np.allclose(chosen, 0)  # all others take the mean, which is wrong for t alone


# Comparisons


def made_up(seed: int = 0) -> pd.DataFrame:
    rng, rows = np.random.default_rng(seed), []
    kinds = [("own", "own"), ("other", "x"), ("other", "y"), ("consensus", "mean"), ("consensus", "borda")]
    for target, method, (kind, candidate), image in product("ut", METHODS[::-1], kinds, range(10)):
        numbers = rng.random(4)
        rows.append((target, method, kind, candidate, 2, f"i{image}", *numbers))
    names = ["target", "method", "kind", "candidate", "pool", "image", "correct", "probability"]
    return pd.DataFrame(rows, columns=[*names, "deletion", "relevance_rank"])


@pytest.mark.parametrize("by", [(), ("target",), ("method",)])
def test_paired_differences_against_a_loop(by: tuple[str, ...]) -> None:
    scores = made_up()
    value = scores.set_index(["target", "method", "candidate", "image"])["deletion"].sort_index()
    table = compare(scores, 0, by)
    table = table[table["outcome"] == "deletion"]
    for row in table.itertuples():
        gaps = []
        for target, method in product("tu", METHODS):
            if any(getattr(row, name) not in (target, method) for name in by):
                continue
            x, y = (value[target, method, name].to_numpy() for name in "xy")
            pooled = {name: value[target, method, name].to_numpy() for name in ("mean", "borda")}
            other = "u" if target == "t" else "t"
            judges = np.stack([value[other, method, name] for name in ("mean", "borda")])
            pooled[CHOSEN] = cross_fitted_best(np.stack([pooled["mean"], pooled["borda"]]), 0, judges)
            against = {RANDOM: (x + y) / 2, BEST: cross_fitted_best(np.stack([x, y]), 0)}
            against[OWN] = value[target, method, "own"].to_numpy()
            gaps.append(pooled[row.rule] - against[row.against])
        assert row.mean == pytest.approx(np.mean(gaps)) and row.n == 10 and row.low < row.mean < row.high
    assert not by or list(dict.fromkeys(table[by[0]])) == list(dict.fromkeys(scores[by[0]]))
    for _, family in table.groupby("against"):
        assert len(family) == 3 * 2 ** len(by)
        assert np.allclose(family["holm"], holm(family["p"]))


def test_cells_are_counted_once() -> None:
    cells = compare(made_up(), 0, ["method"])
    counts = decided(cells)
    assert len(counts) == 9 and (counts["cells"] == 6).all()
    assert (counts["better"] + counts["undecided"] + counts["worse"] == 6).all()
    sure = decided(cells.assign(mean=[1.0, -1.0] * (len(cells) // 2), holm=0.01))
    assert (sure["better"] == 3).all() and (sure["worse"] == 3).all()


def test_differences_between_rules_sum_to_nothing() -> None:
    table = rules_compared(made_up(), 0)
    assert np.allclose(table.groupby("outcome")["mean"].sum(), 0)
    assert len(table) == 6


# Pool size, pooling, curves, consistency


def test_the_largest_pool_is_the_full_consensus(tmp_path: Path) -> None:
    run, maps = start(tmp_path, pool_draws=3), noise()
    sizes = pool_size_scores(run, maps, "borda")
    assert sorted(sizes["size"].unique()) == [1, 2, 3]
    cell = ["target", "method", "image"]
    largest = sizes[sizes["size"] == 3].set_index(cell)["correct"].sort_index()
    full = consensus_scores(run, maps)
    full = full[full["candidate"] == "borda"].set_index(cell)["correct"].sort_index()
    assert np.array_equal(largest, full)
    assert gain_by_size(sizes, 0)["mean"][0] == 0


def test_smaller_pools_against_a_loop(tmp_path: Path) -> None:
    run, maps = start(tmp_path), noise()
    found = pool_size_scores(run, maps, "mean").set_index(["target", "method", "size"])["correct"].sort_index()
    generator = torch.Generator().manual_seed(0)
    for target, method in product(NAMES, METHODS):
        members = held_out_maps(run, maps, target, method)
        order = torch.rand(3, N, generator=generator).argsort(0)
        for size in (1, 2):
            pools = [members[order[:size, i], i : i + 1] for i in range(N)]
            mean = torch.cat([consensus(pool, "mean") for pool in pools])
            assert np.array_equal(found[target, method, size], recognized(run, mean).double())


def test_pooling_over_methods_against_a_loop(tmp_path: Path) -> None:
    run, maps = start(tmp_path), noise()
    scores = pd.concat([single_scores(run, maps), consensus_scores(run, maps)], ignore_index=True)
    table = pooling_scores(run, maps, scores, "mean")
    table = table[table["target"] == "a-obj"].set_index(["models", "methods"])["correct"]
    pool = ("b-obj", "c-obj", "d-obj")

    def correct(names: tuple[str, ...]) -> np.ndarray:
        grids = torch.stack([patch_scores(maps[name, method], PATCH) for name in names for method in METHODS])
        return recognized(run, consensus(grids, "mean")).double().numpy()

    assert np.allclose(table["own model", "all methods"], correct(("a-obj",)))
    assert np.allclose(table["all other models", "all methods"], correct(pool))
    one = np.mean([correct((name,)) for name in pool], axis=0)
    assert np.allclose(table["one other model", "all methods"], one)
    others = scores[(scores["target"] == "a-obj") & (scores["kind"] == "other")].groupby("image")
    expected = others["correct"].mean()[list(run.dataset.ids)]
    assert np.allclose(table["one other model", "one method"], expected)


def test_curves_agree_with_the_scores(tmp_path: Path) -> None:
    run, maps = start(tmp_path), noise()
    controls = {("random", "control"): torch.rand(N, SIDE, SIDE, generator=torch.Generator().manual_seed(5))}
    lines = recognition_curves(run, maps, controls, "borda").set_index(["line", "fraction"])["mean"]
    scores = pd.concat([single_scores(run, maps), consensus_scores(run, maps)], ignore_index=True)
    table = compare(scores, 0).set_index(["outcome", "rule", "against"])["mean"]
    for against in (RANDOM, BEST, OWN):
        gap = lines[POOLED, TOP / 16] - lines[against, TOP / 16]
        assert gap == pytest.approx(table["recognition", "borda", against])
    assert set(lines.index.get_level_values("line")) == {POOLED, RANDOM, BEST, OWN, "random"}


def test_consistency_of_equal_and_of_unrelated_maps(tmp_path: Path) -> None:
    names = {f"{name}-obj": name for name in "abcdef"}
    run, same = start(tmp_path, names), torch.randn(N, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    alike = consistency(run, dict.fromkeys(product(names, METHODS), same), "borda")
    assert np.allclose(alike["spearman"], 1) and np.allclose(alike["topk_iou"], 1)
    unrelated = consistency(run, noise(0, names), "borda").groupby("pair", observed=True)["spearman"].mean()
    assert len(unrelated) == 3
    single, disjoint, shared = unrelated
    assert abs(single) < 0.1 and abs(disjoint) < 0.1 and shared > 0.5


# Parameters


@pytest.mark.parametrize(("name", "value"), [("rules", ["mean", "bord"]), ("rule", "bord")])
def test_an_unknown_rule_is_named(name: str, value: object) -> None:
    with pytest.raises(HarmonizeError, match=r"unknown rule 'bord'.*borda"):
        check("05_harmonisation", {name: value})


def test_eight_rules_by_default() -> None:
    settings = check("05_harmonisation", {})
    assert len(set(settings.rules) & set(list_rules())) >= 8 and settings.rule in settings.rules
    assert settings.fraction in settings.fractions
