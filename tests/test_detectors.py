from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import precision_recall_curve

from harmonize_lib import paths
from harmonize_lib.data import Dataset
from harmonize_lib.detectors import (
    LOCALIZATION,
    NO_MODEL,
    against_controls,
    best_against_best,
    concordance,
    cost_and_quality,
    faithfulness_curves,
    faithfulness_table,
    kendall_w,
    localization_table,
    mean_curves,
    precision_recall,
    rank_table,
)
from harmonize_lib.errors import HarmonizeError
from harmonize_lib.faithfulness import area, deletion, road
from harmonize_lib.localization import average_precision
from harmonize_lib.models import Model


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)


def random_case(n=6, side=8, seed=0, levels=0):
    rng = torch.Generator().manual_seed(seed)
    maps = torch.randn(n, side, side, generator=rng)
    return (maps * levels).round() if levels else maps, torch.rand(n, side, side, generator=rng) < 0.3


def dataset(n=4, side=16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, side, side), generator=rng, dtype=torch.uint8)
    masks = torch.zeros(n, side, side, dtype=torch.bool)
    masks[:, 4:10, 5:9] = True
    return Dataset(images, torch.arange(n) % 3, ("a", "b", "c"), masks, tuple(f"i{i}" for i in range(n)), "made up")


def network(name, seed):
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 3),
    )
    return Model(layers, name, "tiny", ("a", "b", "c"))


def made_up_scores(values, metrics=("relevance_rank",), methods="abcd"):
    """Values (images, metrics, methods) as a long table of one model."""
    index = pd.MultiIndex.from_product(
        [[f"i{i:03d}" for i in range(len(values))], metrics, list(methods)], names=["image", "metric", "method"]
    )
    return pd.Series(np.ravel(values), index).rename("value").reset_index().assign(model="m")


# precision and recall


@pytest.mark.parametrize("levels", [0, 2])
def test_precision_at_recall_by_the_thresholds_of_scikit_learn(levels):
    maps, masks = random_case(levels=levels)
    recall = torch.linspace(0.05, 1, 20)
    result = precision_recall(maps, masks, recall)
    for values, inside, row in zip(maps.flatten(1), masks.flatten(1), result, strict=True):
        precisions, recalls, _ = precision_recall_curve(inside, values)  # recall falls along the curve
        reached = [max(i for i, r in enumerate(recalls) if r >= wanted - 1e-7) for wanted in recall.tolist()]
        assert row.numpy() == pytest.approx(precisions[reached], abs=1e-6)


@pytest.mark.parametrize("levels", [0, 1])
def test_area_under_the_curve_is_average_precision(levels):
    maps, masks = random_case(n=1, levels=levels)
    size = int(masks.sum())
    curve = precision_recall(maps, masks, torch.arange(1, size + 1) / size)
    assert curve.mean().item() == pytest.approx(average_precision(maps, masks).item(), abs=1e-6)


def test_precision_of_the_mask_itself_of_a_constant_and_of_the_undefined():
    _, masks = random_case(n=3)
    masks[2] = False
    maps = torch.stack([masks[0].float(), torch.ones(8, 8), masks[0].float()])
    result = precision_recall(maps, masks, torch.tensor([0.1, 1.0]))
    assert result[0].tolist() == [1, 1]
    assert result[1].tolist() == pytest.approx([masks[1].float().mean().item()] * 2)
    assert result[2].isnan().all()


def test_precision_of_a_batch_equals_one_by_one():
    maps, masks = random_case(levels=2)
    recall = torch.linspace(0.1, 1, 7)
    single = torch.cat([precision_recall(m[None], k[None], recall) for m, k in zip(maps, masks, strict=True)])
    assert torch.equal(precision_recall(maps, masks, recall), single)


def test_precision_refuses_a_recall_out_of_range():
    with pytest.raises(HarmonizeError, match="recall must be"):
        precision_recall(*random_case(), torch.tensor([0.0, 1.0]))


def test_mean_curve_averages_models_within_images_and_leaves_out_the_undefined():
    first = torch.tensor([[0.0, 1.0], [1.0, 1.0], [torch.nan, 0.0]])
    second = torch.tensor([[1.0, 0.0], [0.0, 1.0], [torch.nan, 1.0]])
    table = mean_curves({("m", "x"): first, ("n", "x"): second}, [0.5, 1.0], "recall", seed=0)
    assert table["mean"].tolist() == [0.5, 0.75]
    assert table["n"].tolist() == [2, 2]
    assert (table["low"].iloc[0], table["high"].iloc[0]) == (0.5, 0.5)  # both images have 0.5 there
    assert (table["low"].iloc[1], table["high"].iloc[1]) == (0.5, 1.0)


# tables


def test_the_object_mask_as_a_map_is_perfect_and_its_negative_finds_nothing():
    data = dataset()
    perfect, worst = data.masks.float(), -data.masks.float() - 1
    table = localization_table({("m", "mask"): perfect, ("m", "negative"): worst}, data)
    assert len(table) == 2 * 4 * len(LOCALIZATION)
    value = table.groupby(["method", "metric"], observed=True)["value"].mean()
    assert (value["mask"] == 1).all()
    assert value["negative"][["relevance_rank", "pointing_game", "mask_iou"]].eq(0).all()
    assert np.isnan(value["negative", "relevance_mass"])  # no positive attribution at all


def test_localization_is_read_from_the_store_the_second_time():
    data = dataset()
    maps = {("m", "x"): torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0))}
    first = localization_table(maps, data)
    stored = sorted(paths.CACHE.rglob("*.safetensors"))
    pd.testing.assert_frame_equal(first, localization_table(maps, data))
    assert len(stored) == len(sorted(paths.CACHE.rglob("*.safetensors"))) == 1


def test_localization_without_masks_refuses():
    data = dataset()
    with pytest.raises(HarmonizeError, match="no masks"):
        localization_table({}, Dataset(data.images, data.labels, data.classes, None, data.ids, "photos"))


def test_curves_are_those_of_the_library_and_controls_go_to_every_model():
    data = dataset()
    models = {"m": network("m", 0), "n": network("n", 1)}
    rng = torch.Generator().manual_seed(0)
    maps = {key: torch.randn(4, 16, 16, generator=rng) for key in [("m", "x"), ("n", "x"), (NO_MODEL, "random")]}
    curves = faithfulness_curves(models, data, maps, ["deletion", "road_morf", "road_lerf"], 4)
    assert set(curves["deletion"]) == {("m", "x"), ("n", "x"), ("m", "random"), ("n", "random")}
    own = deletion(models["n"], data.images, data.labels, maps[NO_MODEL, "random"], steps=4)
    assert torch.equal(curves["deletion"]["n", "random"], own)
    table = faithfulness_table(curves, data.ids).set_index(["model", "method", "metric", "image"])["value"].sort_index()
    assert table["n", "random", "deletion"].tolist() == pytest.approx(area(own).tolist())
    orders = {
        o: area(road(models["m"], data.images, data.labels, maps["m", "x"], 4, o, "correct")) for o in ("morf", "lerf")
    }
    assert table["m", "x", "road"].tolist() == pytest.approx((orders["lerf"] - orders["morf"]).tolist())


def test_unknown_curve_names_the_nearest():
    with pytest.raises(HarmonizeError, match="did you mean 'deletion'"):
        faithfulness_curves({}, dataset(), {}, ["deletoin"], 4)


# comparisons


def test_differences_to_controls_are_paired_and_signed_so_that_better_is_positive():
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 0.5, (30, 1))
    values = np.concatenate([base + 0.3, base], 1)
    table = pd.concat(
        [made_up_scores(values, [metric], ["good", "random"]) for metric in ("relevance_rank", "deletion")]
    )
    result = against_controls(table, ["random"], seed=0, n_resamples=500).set_index("metric")
    assert result.loc["relevance_rank", ["mean", "low", "high"]].tolist() == pytest.approx([0.3] * 3)
    assert result.loc["deletion", "mean"] == pytest.approx(-0.3)
    assert result["p_holm"].tolist() == result["p"].tolist()  # a family of one


def test_holm_runs_over_the_comparisons_of_a_metric():
    values = np.random.default_rng(0).uniform(size=(12, 3))
    values[:, 0] += 1
    table = made_up_scores(values / 2, ["relevance_rank"], ["good", "fair", "random"])
    result = against_controls(table, ["random"], seed=0, n_resamples=5000).set_index("method")
    assert result.loc["good", "p_holm"] == pytest.approx(min(1, 2 * result.loc["good", "p"]))


def test_best_method_is_chosen_on_one_half_and_compared_on_the_other():
    values = np.zeros((8, 3))
    values[::2] = [0.9, 0.1, 0.5]  # a wins where methods are chosen
    values[1::2] = [0.2, 0.8, 0.5]  # and loses where they are compared
    table = made_up_scores(values, ["relevance_rank"], ["a", "b", "random"])
    method, control, interval = best_against_best(table, "relevance_rank", ["random"], seed=0)
    assert (method, control, interval.n) == ("a", "random", 4)
    assert interval.mean == pytest.approx(-0.3)


def test_cost_and_quality_marks_what_no_cheaper_method_beats():
    costs = pd.DataFrame({"model": list("mnmnmn"), "method": list("aabbcc"), "seconds": [1, 3, 4, 6, 8, 9]})
    quality = pd.DataFrame({"method": list("cbad"), "mean": [0.9, 0.2, 0.5, 1], "low": 0, "high": 1, "n": 5})
    table = cost_and_quality(costs, quality).set_index("method")
    assert list(table.index) == ["a", "b", "c"]  # d costs nothing known
    assert table["efficient"].tolist() == [True, False, True]
    assert table.loc["a", ["seconds", "seconds_low", "seconds_high"]].tolist() == [2, 1, 3]


# agreement of raters


def literal_w(scores):
    """Kendall and Babington Smith's W with the correction for ties, by loops."""
    m, n = len(scores), len(scores[0])
    ranks = [[sum(x < y for x in row) + (sum(x == y for x in row) + 1) / 2 for y in row] for row in scores]
    sums = [sum(row[i] for row in ranks) for i in range(n)]
    squares = sum((total - m * (n + 1) / 2) ** 2 for total in sums)
    ties = sum(row.count(value) ** 3 - row.count(value) for row in scores for value in set(row))
    return 12 * squares / (m**2 * (n**3 - n) - m * ties)


@pytest.mark.parametrize("seed", range(4))
def test_w_equals_the_literal_formula_with_ties(seed):
    scores = np.random.default_rng(seed).integers(0, 5, (4, 6)).astype(float)
    assert kendall_w(scores) == pytest.approx(literal_w(scores.tolist()))


def test_w_follows_from_the_mean_spearman_correlation():
    scores = np.random.default_rng(0).normal(size=(5, 7))
    mean = np.mean([spearmanr(a, b).statistic for a, b in combinations(scores, 2)])
    assert kendall_w(scores) == pytest.approx((1 + 4 * mean) / 5)


def test_w_of_one_order_of_opposite_orders_and_of_nothing():
    assert kendall_w([[1, 2, 3], [10, 20, 30]]) == 1
    assert kendall_w([[1, 2, 3], [3, 2, 1]]) == 0
    assert np.isnan(kendall_w([[1, 1, 1], [2, 2, 2]]))
    assert np.isnan(kendall_w([[1, 2, np.nan], [1, 2, 3]]))
    assert np.isnan(kendall_w([[1, 2, 3]]))


def test_w_of_a_batch_equals_one_by_one():
    scores = np.random.default_rng(1).integers(0, 4, (3, 4, 5)).astype(float)
    assert kendall_w(scores).tolist() == [float(kendall_w(one)) for one in scores]


def test_w_of_independent_raters_is_one_over_their_number_on_average():
    scores = np.random.default_rng(2).normal(size=(20_000, 4, 6))
    assert kendall_w(scores).mean() == pytest.approx(1 / 4, abs=0.005)


def test_ranks_turn_around_where_lower_is_better():
    values = np.tile([0.9, 0.5, 0.5, 0.1], (5, 2, 1))
    table = made_up_scores(values, ("relevance_rank", "deletion"))
    ranks = rank_table(table, "metric", list("abcd"), seed=0).set_index(["metric", "method"])["rank"]
    assert ranks["relevance_rank"].tolist() == [1, 2.5, 2.5, 4]
    assert ranks["deletion"].tolist() == [4, 2.5, 2.5, 1]
    assert concordance(table, "metric", list("abcd"), seed=0)[:4] == (0, 0, 0, 5)


def test_images_that_lack_a_score_are_left_out_of_the_ranks():
    values = np.tile([0.9, 0.1], (4, 1, 1))
    values[3, 0] = [np.nan, 1]
    ranks = rank_table(made_up_scores(values, methods="ab"), "metric", ["a", "b"], seed=0)
    assert ranks["rank"].tolist() == [1, 2]
    assert ranks["n"].tolist() == [3, 3]


def test_the_order_of_the_images_does_not_matter():
    values = np.random.default_rng(3).uniform(size=(20, 3, 4))
    table = made_up_scores(values, ("relevance_rank", "mask_iou", "deletion"))
    shuffled = table.sample(frac=1, random_state=0).sort_values(["metric", "method"], kind="stable")
    first, second = (
        rank_table(t, "metric", list("abcd"), seed=0).set_index(["metric", "method"]).sort_index()
        for t in (table, shuffled)
    )
    pd.testing.assert_frame_equal(first, second)
