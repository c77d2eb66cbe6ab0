from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from harmonize_lib.errors import HarmonizeError
from harmonize_lib.localization import (
    average_precision,
    mask_iou,
    pointing_game,
    relevance_mass,
    relevance_rank,
)

ALL = [relevance_mass, relevance_rank, pointing_game, average_precision, mask_iou]


def random_case(n=6, side=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, side, side, generator=rng), torch.rand(n, side, side, generator=rng) < 0.3


def literal(measure, values, inside):
    """By the definitions, ties in the order of the pixels."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    size = sum(inside)
    hits = sum(inside[i] for i in order[:size])
    if measure is relevance_mass:
        positive = [max(v, 0) for v in values]
        return sum(v for v, i in zip(positive, inside, strict=True) if i) / sum(positive)
    if measure is relevance_rank:
        return hits / size
    if measure is pointing_game:
        return float(inside[order[0]])
    if measure is mask_iou:
        return hits / (2 * size - hits)
    return average_precision_score(inside, values)


@pytest.mark.parametrize("measure", ALL)
def test_equals_the_definition(measure):
    maps, masks = random_case()
    lists = zip(maps.flatten(1).tolist(), masks.flatten(1).tolist(), strict=True)
    expected = [literal(measure, values, inside) for values, inside in lists]
    assert np.allclose(measure(maps, masks), expected, atol=1e-6)


def test_average_precision_equals_sklearn_with_ties():
    maps, masks = random_case(20)
    maps = maps.round()
    expected = [average_precision_score(s.flatten(), m.flatten()) for m, s in zip(maps, masks, strict=True)]
    assert np.allclose(average_precision(maps, masks), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("measure", "name"),
    [
        (relevance_mass, "RelevanceMassAccuracy"),
        (relevance_rank, "RelevanceRankAccuracy"),
        (pointing_game, "PointingGame"),
    ],
)
def test_equals_quantus(measure, name):
    import quantus

    maps, masks = random_case(12)
    maps = maps.abs()
    metric = getattr(quantus, name)(abs=False, normalise=False, disable_warnings=True)
    a, s = maps[:, None].numpy(), masks[:, None].numpy()
    scores = metric(model=None, x_batch=a, y_batch=np.zeros(12, dtype=int), a_batch=a, s_batch=s)
    assert np.allclose(measure(maps, masks), np.array(scores, dtype=float), atol=1e-6)


def test_known_answers():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 2:4, 2:6] = True
    for measure in ALL:
        assert measure(mask.float(), mask).item() == 1
        assert measure(mask.float() + 3, torch.ones_like(mask)).item() == pytest.approx(1)
    outside = (~mask).float()
    for measure in (relevance_mass, relevance_rank, pointing_game, mask_iou):
        assert measure(outside, mask).item() == 0
    constant = torch.full((1, 8, 8), 0.7)
    for measure in (relevance_mass, relevance_rank, pointing_game, average_precision):
        assert measure(constant, mask).item() == pytest.approx(8 / 64)
    assert mask_iou(constant, mask).item() == pytest.approx(1 / 15)


def test_negative_values_do_not_count_as_relevance():
    mask = torch.tensor([[[True, False], [False, False]]])
    maps = torch.tensor([[[-9.0, 1.0], [2.0, 0.0]]])
    for measure in ALL[:3]:
        assert measure(maps, mask).item() == 0
    assert relevance_mass(-maps, mask).item() == 1


@pytest.mark.parametrize("measure", [relevance_rank, pointing_game])
def test_ties_are_broken_at_random_in_expectation(measure):
    values, inside = np.array([1.0, 3, 3, 1, 3, 1]), [False, True, False, True, False, True]
    jitters = [1e-6 * np.array(p) for p in permutations(range(6))]
    expected = np.mean([literal(measure, list(values + p), inside) for p in jitters])
    got = measure(torch.tensor(values).view(1, 2, 3), torch.tensor(inside).view(1, 2, 3)).item()
    assert got == pytest.approx(expected, abs=1e-6)


def test_undefined_is_nan():
    maps, masks = random_case(4)
    masks[0] = False
    maps[1, 2, 2] = torch.nan
    maps[2] = -maps[2].abs()
    for measure in ALL:
        undefined = [True, True, measure is relevance_mass, False]
        assert measure(maps, masks).isnan().tolist() == undefined
    assert relevance_mass(torch.zeros(1, 8, 8), masks[3:]).isnan().all()


@pytest.mark.parametrize("measure", ALL)
def test_invariants(measure):
    maps, masks = random_case()
    maps = maps.round(decimals=1)
    before = maps.clone(), masks.clone()
    got = measure(maps, masks)
    assert got.shape == (6,) and got.dtype == torch.float32
    assert torch.equal(maps, before[0]) and torch.equal(masks, before[1])
    one_by_one = [measure(m[None], s[None]) for m, s in zip(maps, masks, strict=True)]
    assert torch.allclose(got, torch.cat(one_by_one))
    assert torch.allclose(got.flip(0), measure(maps.flip(0), masks.flip(0)))
    assert torch.allclose(got, measure(maps.flip(1), masks.flip(1)))
    assert torch.allclose(got, measure(7 * maps, masks))
    assert measure(maps[:0], masks[:0]).shape == (0,)


def test_mistakes_are_named():
    maps, masks = random_case()
    for measure in ALL:
        with pytest.raises(HarmonizeError, match="not every data set has masks"):
            measure(maps, None)
        with pytest.raises(HarmonizeError, match="do not match"):
            measure(maps, masks[:2])
        with pytest.raises(HarmonizeError, match=r"masks are torch\.float32: give torch\.bool"):
            measure(maps, masks.float())
