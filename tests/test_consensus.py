"""Consensus rules against literal loops, known answers and invariants."""

from __future__ import annotations

import itertools
import math
import statistics
import sys

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

from harmonize_lib.consensus import RULES, consensus, consensus_record, list_rules, normalize_maps
from harmonize_lib.errors import HarmonizeError

ORDER_RULES = [name for name in RULES if RULES[name].normalization is None]


def random_maps(models: int = 4, images: int = 3, side: int = 5, ties: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(models, images, side, side, generator=generator)
    return (2 * maps).round() if ties else maps


def slow_minmax(a: list[float]) -> list[float]:
    return [(v - min(a)) / (max(a) - min(a)) for v in a]


def slow_ranks(a: list[float]) -> list[float]:
    """Descending, 1 at the top, ties averaged."""
    ranks = []
    for v in a:
        above = sum(1 for w in a if w > v)
        equal = sum(1 for w in a if w == v)
        ranks.append(above + (equal + 1) / 2)
    return ranks


def slow_crh(maps: list[list[float]]) -> list[float]:
    pixels = range(len(maps[0]))
    truth = [statistics.median(a[p] for a in maps) for p in pixels]
    for _ in range(20):
        weights = [1 / (1e-6 + sum((a[p] - truth[p]) ** 2 for p in pixels) / len(a)) for a in maps]
        truth = [sum(w * a[p] for w, a in zip(weights, maps, strict=True)) / sum(weights) for p in pixels]
    return truth


def slow_agg_var(maps: list[list[float]]) -> list[float]:
    means = [statistics.fmean(a[p] for a in maps) for p in range(len(maps[0]))]
    stds = [statistics.pstdev(a[p] for a in maps) for p in range(len(maps[0]))]
    epsilon = 10 * statistics.fmean(means)
    return [m / (s + epsilon) for m, s in zip(means, stds, strict=True)]


def slow_partial_order(maps: list[list[float]]) -> list[float]:
    scores = []
    for p in range(len(maps[0])):
        score = 0
        for q in range(len(maps[0])):
            score += all(a[q] <= a[p] for a in maps)
            score -= all(a[p] <= a[q] for a in maps)
        scores.append(score)
    return scores


def per_pixel(function):
    return lambda maps: [function([a[p] for a in maps]) for p in range(len(maps[0]))]


SLOW_VALUES = {
    "mean": per_pixel(statistics.fmean),
    "median": per_pixel(statistics.median),
    "agg_var": slow_agg_var,
    "crh": slow_crh,
    "geometric": per_pixel(lambda v: math.prod(v) ** (1 / len(v))),
    "min": per_pixel(min),
    "max": per_pixel(max),
}
SLOW_RANKS = {
    "borda": per_pixel(lambda r: statistics.fmean(25 - v for v in r)),
    "rrf": per_pixel(lambda r: sum(1 / (60 + v) for v in r)),
    "rank_product": per_pixel(lambda r: -math.log(math.prod(r)) / len(r)),
    "partial_order": lambda ranks: slow_partial_order([[-v for v in r] for r in ranks]),
}


def slow_consensus(maps: torch.Tensor, rule: str) -> torch.Tensor:
    results = []
    for image in range(maps.shape[1]):
        flat = [m.flatten().tolist() for m in maps[:, image].double()]
        voting = [a for a in flat if max(a) > min(a)]
        if rule in SLOW_VALUES:
            results.append(SLOW_VALUES[rule]([slow_minmax(a) for a in voting]))
        else:
            results.append(SLOW_RANKS[rule]([slow_ranks(a) for a in voting]))
    return torch.tensor(results, dtype=torch.float32).reshape(maps.shape[1:])


def test_every_rule_has_an_oracle():
    assert list_rules() == list(RULES)
    assert set(SLOW_VALUES) | set(SLOW_RANKS) == set(RULES)
    assert len(RULES) >= 9


@pytest.mark.parametrize("rule", list_rules())
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("models", [1, 2, 5])
def test_rule_equals_literal_loops(rule, ties, models):
    maps = random_maps(models=models, ties=ties)
    torch.testing.assert_close(consensus(maps, rule), slow_consensus(maps, rule), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", list_rules())
def test_constant_map_has_no_vote(rule):
    maps = random_maps()
    maps[2] = 3.5
    torch.testing.assert_close(consensus(maps, rule), consensus(maps[[0, 1, 3]], rule))
    torch.testing.assert_close(consensus(maps, rule), slow_consensus(maps, rule), rtol=1e-5, atol=1e-6)
    flat = torch.full((3, 2, 4, 4), -1.25)
    assert consensus(flat, rule).eq(0).all()


@pytest.mark.parametrize("rule", list_rules())
def test_invariants(rule):
    maps = random_maps()
    before = maps.clone()
    whole = consensus(maps, rule)
    assert whole.shape == maps.shape[1:] and whole.dtype == torch.float32
    assert torch.equal(maps, before)
    one_by_one = torch.cat([consensus(maps[:, i : i + 1], rule) for i in range(maps.shape[1])])
    torch.testing.assert_close(whole, one_by_one)
    torch.testing.assert_close(consensus(maps[:, [2, 0, 1]], rule), whole[[2, 0, 1]])
    for order in itertools.permutations(range(len(maps))):
        torch.testing.assert_close(consensus(maps[list(order)], rule), whole)


@pytest.mark.parametrize("rule", list_rules())
def test_small_blocks_change_nothing(rule, monkeypatch):
    maps = random_maps(images=7)
    whole = consensus(maps, rule)
    monkeypatch.setattr(sys.modules["harmonize_lib.consensus"], "_BLOCK", 150)
    torch.testing.assert_close(consensus(maps, rule), whole)


@pytest.mark.parametrize("rule", list_rules())
@pytest.mark.parametrize("ties", [False, True])
def test_one_model_keeps_its_order(rule, ties):
    maps = random_maps(models=1, ties=ties)
    for given, combined in zip(maps[0], consensus(maps, rule), strict=True):
        assert spearmanr(given.flatten(), combined.flatten()).statistic == pytest.approx(1)


@pytest.mark.parametrize("rule", list_rules())
def test_rescaled_models_and_copies_change_nothing(rule):
    maps = random_maps()
    scaled = maps * torch.tensor([1, 10, 100, 0.25]).reshape(4, 1, 1, 1) + 2
    torch.testing.assert_close(consensus(scaled, rule), consensus(maps, rule), rtol=1e-4, atol=1e-5)
    copies = maps[:1].expand(3, -1, -1, -1)
    for one, many in zip(consensus(maps[:1], rule), consensus(copies, rule), strict=True):
        assert spearmanr(one.flatten(), many.flatten()).statistic == pytest.approx(1)


@pytest.mark.parametrize("rule", ORDER_RULES)
def test_order_rules_ignore_the_scale(rule):
    maps = random_maps()
    assert torch.equal(consensus(maps.exp(), rule), consensus(maps, rule))
    assert torch.equal(consensus(maps, rule, "l1"), consensus(maps, rule))
    assert consensus_record(rule, "l1")["normalization"] == "rank"


def test_partial_order_on_more_pixels_than_one_block():
    maps = random_maps(models=2, images=2, side=40)
    expected = []
    for image in maps.unbind(1):
        a, b = image.flatten(1).numpy()
        below = (a[:, None] >= a) & (b[:, None] >= b)
        expected.append(below.sum(1) - below.sum(0))
    expected = torch.tensor(np.stack(expected)).reshape(2, 40, 40).float()
    assert torch.equal(consensus(maps, "partial_order"), expected)


def test_known_answers():
    a = torch.tensor([[0.0, 1.0], [2.0, 4.0]])
    b = torch.tensor([[9.0, 5.0], [1.0, 13.0]])
    maps = torch.stack([a, b])[:, None]
    # minmax: a = 0 1/4 1/2 1, b = 2/3 1/3 0 1; ascending ranks: a = 1 2 3 4, b = 3 2 1 4
    answers = {
        "mean": [1 / 3, 7 / 24, 1 / 4, 1],
        "min": [0, 1 / 4, 0, 1],
        "max": [2 / 3, 1 / 3, 1 / 2, 1],
        "geometric": [0, math.sqrt(1 / 12), 0, 1],
        "borda": [1, 1, 1, 3],
        "rrf": [1 / 64 + 1 / 62, 2 / 63, 1 / 62 + 1 / 64, 2 / 61],
        "rank_product": [-math.log(8) / 2, -math.log(3), -math.log(8) / 2, 0],
        "partial_order": [-1, -1, -1, 3],
    }
    for rule, answer in answers.items():
        torch.testing.assert_close(consensus(maps, rule).flatten(), torch.tensor(answer, dtype=torch.float32), msg=rule)


def test_truth_discovery_trusts_the_agreeing_models_and_agg_var_punishes_disagreement():
    truth = torch.linspace(0, 1, 16).reshape(1, 4, 4)
    liar = truth.flip(-1, -2)
    maps = torch.stack([truth, truth, truth.square().sqrt(), liar, truth])
    torch.testing.assert_close(consensus(maps, "crh"), truth, atol=1e-4, rtol=0)
    assert (consensus(maps, "mean") - truth).abs().max() > 0.1
    agreed = torch.tensor([0.0, 0.5, 0.5, 1.0])
    first = torch.tensor([0.0, 0.9, 0.5, 1.0])
    second = torch.tensor([0.0, 0.1, 0.5, 1.0])
    pair = torch.stack([first, second]).reshape(2, 1, 2, 2)
    torch.testing.assert_close(consensus(pair, "mean").flatten(), agreed)
    scores = consensus(pair, "agg_var").flatten()
    assert scores[1] < scores[2]


def test_normalizations_known_answers_and_signs():
    maps = torch.tensor([[[-2.0, 0.0], [0.0, 6.0]], [[7.0, 7.0], [7.0, 7.0]]])
    answers = {
        "minmax": [0, 0.25, 0.25, 1],
        "l1": [-0.25, 0, 0, 0.75],
        "zscore": [-1, -1 / 3, -1 / 3, 5 / 3],
        "rank": [0, 0.5, 0.5, 1],
    }
    std = math.sqrt((9 + 1 + 1 + 25) / 4)
    assert std == 3
    for name, answer in answers.items():
        result = normalize_maps(maps, name)
        torch.testing.assert_close(result[0].flatten(), torch.tensor(answer, dtype=torch.float32), msg=name)
        assert result[1].eq(0).all()
    ranks = normalize_maps(random_maps(ties=True), "rank")
    expected = (rankdata(random_maps(ties=True).flatten(2), axis=2) - 1) / 24
    torch.testing.assert_close(ranks.flatten(2), torch.tensor(expected).float())


def test_normalization_can_be_chosen_and_is_recorded():
    maps = random_maps()
    for name in ("minmax", "l1", "zscore", "rank"):
        torch.testing.assert_close(consensus(maps, "mean", name), normalize_maps(maps, name).mean(0))
    assert consensus_record("mean") == {
        "rule": "mean",
        "normalization": "minmax",
        "patch": None,
        "formula": "mean_m a_m",
        "reference": "Rieger & Hansen 2019 (arXiv 1903.00519), AGG-Mean",
    }
    assert consensus_record("mean", "l1", 4)["normalization"] == "l1"
    clipped = consensus(maps, "geometric", "zscore")
    assert clipped[(normalize_maps(maps, "zscore") < 0).any(0)].eq(0).all()


@pytest.mark.parametrize("rule", list_rules())
def test_patch_pools_first_and_expands_back(rule):
    maps = random_maps(side=8)
    coarse = maps.reshape(4, 3, 2, 4, 2, 4).mean((3, 5))
    expected = consensus(coarse, rule).repeat_interleave(4, 1).repeat_interleave(4, 2)
    torch.testing.assert_close(consensus(maps, rule, patch=4), expected)


def test_errors_say_what_is_wrong():
    maps = random_maps()
    with pytest.raises(HarmonizeError, match="unknown rule 'boarda': did you mean 'borda'"):
        consensus(maps, "boarda")
    with pytest.raises(HarmonizeError, match="unknown normalization 'softmax': choose from l1, minmax, rank, zscore"):
        consensus(maps, "borda", "softmax")
    with pytest.raises(HarmonizeError, match="unknown rule"):
        consensus_record("vote")
    with pytest.raises(HarmonizeError, match="unknown normalization"):
        consensus_record("mean", "softmax")
    with pytest.raises(HarmonizeError, match=r"\(models, images, height, width\).*\(3, 5, 5\)"):
        consensus(maps[0], "mean")
    with pytest.raises(HarmonizeError, match="none of them 0"):
        consensus(maps[:0], "mean")
    with pytest.raises(HarmonizeError, match=r"patch 1\.0 does not divide the 5x5 map"):
        consensus(torch.rand(2, 1, 5, 5), patch=1.0)
    with pytest.raises(HarmonizeError, match="one tensor, not a tuple"):
        consensus((torch.rand(1, 5, 5), torch.rand(1, 5, 5)))
    with pytest.raises(HarmonizeError, match="patch 3 does not divide the 5x5 map"):
        consensus(maps, "mean", patch=3)
    for bad in (torch.nan, torch.inf):
        broken = maps.clone()
        broken[1, 2, 0, 0] = bad
        for rule in list_rules():
            with pytest.raises(HarmonizeError, match=r"NaN or infinite values in model 1, image 2 \(1 maps in all\)"):
                consensus(broken, rule)
    with pytest.raises(HarmonizeError, match="NaN or infinite values in map"):
        normalize_maps(broken[1], "rank")
