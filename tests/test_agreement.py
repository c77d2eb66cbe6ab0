from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity

from harmonize_lib.agreement import (
    feature_agreement,
    rank_agreement,
    sign_agreement,
    spearman,
    ssim,
    topk_iou,
)
from harmonize_lib.errors import HarmonizeError

ALL = [spearman, topk_iou, ssim, feature_agreement, rank_agreement, sign_agreement]
TOPS = [topk_iou, feature_agreement, rank_agreement, sign_agreement]


def random_pair(n=5, side=9, seed=0):
    a, noise = torch.randn(2, n, side, side, generator=torch.Generator().manual_seed(seed))
    return a, a + noise


def literal_top(measure, a, b, k):
    """By the definitions, ties in the order of the pixels."""
    rank_by = (lambda v: v) if measure is topk_iou else np.abs
    top_a, top_b = (list(np.argsort(-rank_by(m), kind="stable")[:k]) for m in (a, b))
    both = set(top_a) & set(top_b)
    if measure is topk_iou:
        return len(both) / len(set(top_a) | set(top_b))
    if measure is rank_agreement:
        both = {f for f in both if top_a.index(f) == top_b.index(f)}
    if measure is sign_agreement:
        both = {f for f in both if np.sign(a[f]) == np.sign(b[f])}
    return len(both) / k


@pytest.mark.parametrize("levels", [None, 1, 0])
def test_spearman_equals_scipy(levels):
    a, b = random_pair()
    if levels is not None:
        a, b = a.round(decimals=levels), b.round(decimals=levels)
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    assert np.allclose(spearman(a, b), expected, atol=1e-6)


def test_ssim_equals_skimage():
    a, b = random_pair(side=20)
    u, v = (
        (m - m.amin((1, 2), True)) / (m.amax((1, 2), True) - m.amin((1, 2), True)) for m in (a.double(), b.double())
    )
    expected = [structural_similarity(x.numpy(), y.numpy(), data_range=1) for x, y in zip(u, v, strict=True)]
    assert np.allclose(ssim(a, b), expected, atol=1e-6)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("measure", TOPS)
def test_top_measures_equal_the_definitions(measure, fraction):
    a, b = random_pair()
    k = max(1, round(fraction * 81))
    expected = [literal_top(measure, x.flatten().numpy(), y.flatten().numpy(), k) for x, y in zip(a, b, strict=True)]
    assert np.allclose(measure(a, b, fraction), expected, atol=1e-6)


@pytest.mark.parametrize("measure", TOPS)
def test_ties_are_broken_at_random_in_expectation(measure):
    a, b = np.array([3.0, 1, 1, 1]), np.array([-1.0, 1, 2, 1])
    got = measure(torch.tensor(a).view(1, 2, 2), torch.tensor(b).view(1, 2, 2), 0.5).item()
    if measure is topk_iou:
        a, b = a + 2, b + 2  # positive: by magnitude is by value
    jitters = [1e-6 * np.array(p) for p in permutations(range(4))]
    overlap = feature_agreement if measure is topk_iou else measure
    expected = np.mean([literal_top(overlap, a * (1 + p), b * (1 + q), 2) for p in jitters for q in jitters])
    if measure is topk_iou:
        expected = expected / (2 - expected)
    assert got == pytest.approx(expected, abs=1e-6)


def test_known_answers():
    a = torch.arange(64.0).view(1, 8, 8) - 20.5
    assert spearman(a, a.exp()).item() == pytest.approx(1) and spearman(a, -a).item() == pytest.approx(-1)
    for measure in ALL:
        assert measure(a, a).item() == pytest.approx(1)
    assert ssim(a, 3 * a + 2).item() == pytest.approx(1) and ssim(a, -a).item() < 0
    assert topk_iou(a, -a).item() == 0
    assert feature_agreement(a, -a).item() == rank_agreement(a, -a).item() == 1 and sign_agreement(a, -a).item() == 0
    b = a.clone()
    b.view(-1)[62], b.view(-1)[63] = a.view(-1)[63], a.view(-1)[62]
    assert rank_agreement(a, b, 4 / 64).item() == 0.5 and feature_agreement(a, b, 4 / 64).item() == 1


@pytest.mark.parametrize("measure", ALL)
def test_constant_and_nan_maps_are_undefined(measure):
    a, b = random_pair(4)
    a[0], b[1], a[2, 3, 3] = 2.0, 0.0, torch.nan
    assert measure(a, b).isnan().tolist() == [True, True, True, False]
    assert measure(b, a).isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("measure", ALL)
def test_invariants(measure):
    a, b = random_pair()
    a, b = a.round(decimals=1), b.round(decimals=1)
    before = a.clone(), b.clone()
    got = measure(a, b)
    assert got.shape == (5,) and got.dtype == torch.float32
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])
    assert torch.allclose(got, torch.cat([measure(x[None], y[None]) for x, y in zip(a, b, strict=True)]))
    assert torch.allclose(got.flip(0), measure(a.flip(0), b.flip(0)))
    assert torch.allclose(got, measure(b, a))
    assert torch.allclose(got, measure(a.transpose(1, 2), b.transpose(1, 2)))
    assert torch.allclose(got, measure(5 * a, b))
    assert measure(a[:0], b[:0]).shape == (0,)


def test_mistakes_are_named():
    a, b = random_pair()
    for measure in ALL:
        with pytest.raises(HarmonizeError, match="give two of one shape"):
            measure(a, b[:1])
    with pytest.raises(HarmonizeError, match="fraction=0 is out of range"):
        topk_iou(a, b, 0)
    with pytest.raises(HarmonizeError, match="too small for ssim"):
        ssim(a[:, :5], b[:, :5])
