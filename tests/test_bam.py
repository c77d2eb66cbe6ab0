"""BAM's metrics against literal loops and known answers, and the insignificant patch."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import harmonize_lib as h
from harmonize_lib import bam
from harmonize_lib.data import load_dataset
from harmonize_lib.errors import HarmonizeError

N, SIDE = 12, 9


def random_maps(channels: int | None = None, seed: int = 0) -> torch.Tensor:
    shape = (N, SIDE, SIDE) if channels is None else (N, channels, SIDE, SIDE)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_masks(seed: int = 9) -> torch.Tensor:
    return torch.rand(N, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) < 0.3


def slow_percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def slow_concept(map_: torch.Tensor, mask: torch.Tensor, signed: bool) -> float:
    channels = map_.double()[None] if map_.ndim == 2 else map_.double()
    picture = {}
    for y in range(channels.shape[1]):
        for x in range(channels.shape[2]):
            values = [float(channel[y, x]) for channel in channels]
            picture[y, x] = sum(values) if signed else sum(max(value, 0.0) for value in values)
    inside = [key for key in picture if mask[key]]
    if not inside:
        return math.nan
    if signed:
        largest = max(abs(value) for value in picture.values())
        return math.nan if largest == 0 else statistics.fmean(picture[key] / largest for key in inside)
    low, high = min(picture.values()), slow_percentile(list(picture.values()), 0.99)
    if high <= low:
        return math.nan
    return statistics.fmean(min(max((picture[key] - low) / (high - low), 0.0), 1.0) for key in inside)


def slow_metric(name: str, a: list[float], b: list[float], correct: list[bool], threshold: float = 0.1) -> list[float]:
    values = []
    for x, y, counts in zip(a, b, correct, strict=True):
        if not counts or math.isnan(x) or math.isnan(y):
            values.append(math.nan)
        elif name == "MCS":
            values.append(x - y)
        elif name == "IDR":
            values.append(1.0 if x > y else 0.0)
        else:
            values.append(1.0 if abs(x - y) < threshold * abs(x) else 0.0)
    return values


METRICS = {
    "MCS": h.model_contrast_score,
    "IDR": h.input_dependence_rate,
    "IIR": h.input_independence_rate,
}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("channels", [None, 3])
def test_concept_attribution_equals_literal_loops(signed, channels):
    maps, masks = random_maps(channels), random_masks()
    masks[3] = False
    maps[5] = 2.5
    maps[6] = 0
    maps[7] = -maps[7].abs()
    expected = [slow_concept(m, mask, signed) for m, mask in zip(maps, masks, strict=True)]
    values, mean = h.concept_attribution(maps, masks, signed)
    torch.testing.assert_close(values, torch.tensor(expected).double(), rtol=0, atol=1e-6, equal_nan=True)
    assert mean == pytest.approx(statistics.fmean(v for v in expected if not math.isnan(v)), abs=1e-6)
    assert math.isnan(expected[3]) and math.isnan(expected[6])
    assert math.isnan(expected[5]) != signed and math.isnan(expected[7]) != signed


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", METRICS)
def test_metrics_equal_literal_loops(name, signed):
    first, masks = random_maps(seed=1), random_masks()
    second = first + 0.1 * random_maps(seed=2)
    second[4] = 0
    masks[8] = False
    correct = torch.rand(N, generator=torch.Generator().manual_seed(3)) < 0.7
    given = [[slow_concept(m, k, signed) for m, k in zip(maps, masks, strict=True)] for maps in (first, second)]
    expected = slow_metric(name, *given, correct.tolist())
    score = METRICS[name](first, second, masks, correct, signed=signed)
    torch.testing.assert_close(score.values, torch.tensor(expected).double(), rtol=0, atol=1e-6, equal_nan=True)
    defined = [value for value in expected if not math.isnan(value)]
    assert score.n == len(defined) < N and score.mean == pytest.approx(statistics.fmean(defined), abs=1e-6)
    if name != "MCS":
        assert set(defined) == {0.0, 1.0}
    everything = METRICS[name](first, second, masks, signed=signed).values
    torch.testing.assert_close(everything[correct], score.values[correct], equal_nan=True)


def test_independence_follows_its_threshold():
    maps, masks = random_maps(seed=1), random_masks()
    other = maps + 0.05 * random_maps(seed=2)
    rates = [h.input_independence_rate(maps, other, masks, threshold=t).mean for t in (0.001, 0.02, 0.1, 1.0)]
    assert rates == sorted(rates) and rates[0] < 0.5 and rates[-1] == 1
    g = [slow_concept(m, k, False) for m, k in zip(maps, masks, strict=True)]
    g2 = [slow_concept(m, k, False) for m, k in zip(other, masks, strict=True)]
    expected = statistics.fmean(slow_metric("IIR", g, g2, [True] * N, 0.02))
    assert rates[1] == pytest.approx(expected)


@pytest.mark.parametrize("signed", [False, True])
def test_known_answers(signed):
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[0, 2:5, 3:7] = True
    on, off = 7.0 * mask.float(), 3.0 * (~mask).float()
    assert h.concept_attribution(on, mask, signed).mean == pytest.approx(1)
    assert h.concept_attribution(off, mask, signed).mean == 0
    assert h.concept_attribution(on - 2 * off, mask, signed).mean == pytest.approx(1)
    assert h.model_contrast_score(on, off, mask, signed=signed).mean == pytest.approx(1)
    assert h.model_contrast_score(off, on, mask, signed=signed).mean == pytest.approx(-1)
    assert h.input_dependence_rate(on, off, mask, signed=signed).mean == 1
    assert h.input_dependence_rate(off, on, mask, signed=signed).mean == 0
    assert h.input_dependence_rate(on, on, mask, signed=signed).mean == 0
    assert h.input_independence_rate(on, 5 * on, mask, signed=signed).mean == 1
    assert h.input_independence_rate(on, off, mask, signed=signed).mean == 0
    assert h.input_independence_rate(off, off, mask, signed=signed).mean == 0  # 0 < 0.1 * 0 does not hold


def test_against_the_object_counts_only_when_signed():
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[0, :3] = True
    against = torch.where(mask, -4.0, 1.0)
    assert h.concept_attribution(against, mask).mean == 0
    assert h.concept_attribution(against, mask, signed=True).mean == -1


def test_constant_and_empty_maps_are_undefined_and_counted():
    masks = random_masks()
    constant = torch.full((N, SIDE, SIDE), 0.3)
    for maps in (constant, torch.zeros_like(constant)):
        score = h.concept_attribution(maps, masks)
        assert score.n == 0 and math.isnan(score.mean) and score.values.isnan().all()
    assert h.concept_attribution(torch.zeros_like(constant), masks, signed=True).n == 0
    torch.testing.assert_close(h.concept_attribution(-constant, masks, signed=True).values, -torch.ones(N).double())
    assert h.input_independence_rate(constant, constant, masks, signed=True).mean == 1  # insensitivity is rewarded
    speck = torch.zeros(N, SIDE, SIDE)
    speck[:, 0, 0] = 1  # 1 of 81 pixels: the 99th percentile lies just above the minimum
    assert h.concept_attribution(speck, masks).n == N
    speck = torch.zeros(N, 16, 16)
    speck[:, 0, 0] = 1  # 1 of 256: it is the minimum
    assert h.concept_attribution(speck, torch.ones(N, 16, 16, dtype=torch.bool)).n == 0


def test_no_image_correct_in_both_models():
    maps, masks, nobody = random_maps(), random_masks(), torch.zeros(N, dtype=torch.bool)
    for metric in METRICS.values():
        values, mean = metric(maps, maps.flip(1), masks, nobody)
        assert math.isnan(mean) and values.isnan().all() and len(values) == N


def test_random_maps_contrast_nothing():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 800, 16, 16, generator=generator)
    masks = torch.zeros(800, 16, 16, dtype=torch.bool)
    masks[:, 4:10, 4:10] = True
    contrast = h.model_contrast_score(a, b, masks)
    assert abs(contrast.mean) < 3 * float(contrast.values.std()) / 800**0.5
    assert abs(h.input_dependence_rate(a, b, masks).mean - 0.5) < 3 * 0.5 / 800**0.5


def test_batch_order_and_scale_change_nothing():
    maps, masks = random_maps(), random_masks()
    whole = h.concept_attribution(maps, masks).values
    one_by_one = [h.concept_attribution(maps[i : i + 1], masks[i : i + 1]).mean for i in range(N)]
    torch.testing.assert_close(whole, torch.tensor(one_by_one).double())
    torch.testing.assert_close(h.concept_attribution(maps.flip(0), masks.flip(0)).values, whole.flip(0))
    for signed in (False, True):
        torch.testing.assert_close(
            h.concept_attribution(40 * maps, masks, signed).values, h.concept_attribution(maps, masks, signed).values
        )


@pytest.mark.parametrize("side", [1, 2, 9, 10, 11, 15])
def test_percentile_is_numpys(side):
    flat = torch.randn(7, side * side, generator=torch.Generator().manual_seed(side)).double()
    flat[3] = flat[3].round()
    torch.testing.assert_close(bam._percentile(flat)[:, 0], torch.tensor(np.percentile(flat, 99, axis=1)))


def slow_correlation(a: list[float], b: list[float]) -> float:
    return statistics.correlation(a, b)


def test_contrast_correlation_against_the_standard_library():
    generator = torch.Generator().manual_seed(0)
    drop = (torch.rand(5, 30, generator=generator) < torch.linspace(0.9, 0.1, 5)[:, None]).double()
    contrast = 0.3 * drop.mean(1, keepdim=True) + 0.1 * torch.randn(5, 30, generator=generator)
    contrast[2, 4:9] = torch.nan
    found = bam.contrast_correlation(contrast, drop, seed=0)
    expected = slow_correlation(contrast.nanmean(1).tolist(), drop.mean(1).tolist())
    assert found.mean == pytest.approx(expected, abs=1e-9) and found.n == 30
    assert found.low < found.mean < found.high
    assert found == bam.contrast_correlation(contrast, drop, seed=0)
    perfect = bam.contrast_correlation(drop * 2 - 1, drop, seed=0)
    assert perfect.mean == pytest.approx(1) and perfect.low == pytest.approx(1)
    three = bam.contrast_correlation(
        torch.stack([contrast, contrast, -contrast]), torch.stack([drop, torch.zeros(5, 30), drop]), seed=0
    )  # the second architecture loses nothing, and has no correlation
    assert three.mean == pytest.approx(0, abs=1e-12) and three.low == pytest.approx(0, abs=1e-12)
    assert math.isnan(bam.contrast_correlation(contrast, torch.zeros(5, 30), seed=0).mean)
    assert math.isnan(bam.contrast_correlation(contrast[:2], drop[:2], seed=0).mean)
    with pytest.raises(HarmonizeError, match=r"contrast \(5, 30\) and drop \(4, 30\)"):
        bam.contrast_correlation(contrast, drop[:4], seed=0)


def test_errors_say_what_is_wrong():
    maps, masks = random_maps(), random_masks()
    with pytest.raises(HarmonizeError, match=r"masks must be bool .*torch.float32"):
        h.concept_attribution(maps, masks.float())
    with pytest.raises(HarmonizeError, match=r"masks must be bool .*\(11, 9, 9\)"):
        h.concept_attribution(maps, masks[1:])
    with pytest.raises(HarmonizeError, match="finite"):
        h.concept_attribution(maps / 0, masks)
    with pytest.raises(HarmonizeError, match=r"\(N, H, W\)"):
        h.concept_attribution(maps[0], masks[0])
    with pytest.raises(HarmonizeError, match=r"correct must be bool \(12,\)"):
        h.model_contrast_score(maps, maps, masks, torch.ones(N))


# The patch.


@pytest.fixture(scope="module")
def scenes():
    data = load_dataset("shapes-on-scenes", "test", 4, labels="scene")
    return data.extras["without_object"], data.images, data.masks


def slow_change(model: nn.Module, bare: torch.Tensor, shown: torch.Tensor) -> list[float]:
    changes = []
    for before, after in zip(bare, shown, strict=True):
        f = model(model.preprocess(before[None]))[0].double()
        g = model(model.preprocess(after[None]))[0].double()
        changes.append(float(torch.sqrt(((g - f) ** 2).sum()) / torch.sqrt(((f - f.mean()) ** 2).sum())))
    return changes


def test_the_patch_changes_little_stays_visible_and_reports_the_truth(scenes):
    bare, with_object, masks = scenes
    model = tiny.model("resnet")
    patch = bam.insignificant_patch([model], bare, with_object, masks, steps=30)
    assert patch.images.dtype == torch.uint8 and patch.images.shape == bare.shape
    assert torch.equal(patch.images[(~masks)[:, None].expand_as(bare)], bare[(~masks)[:, None].expand_as(bare)])
    for reported, shown in ((patch.change, patch.images), (patch.object_change, with_object)):
        torch.testing.assert_close(
            reported[0], torch.tensor(slow_change(model, bare, shown)).double(), rtol=1e-4, atol=1e-5
        )
    assert (patch.change < 0.5 * patch.object_change).all()
    for i, contrast in enumerate(patch.contrast.tolist()):
        inside = masks[i]
        step = (patch.images[i].double() - bare[i].double())[:, inside] / 255
        assert contrast == pytest.approx(math.sqrt(float((step**2).mean())), abs=1e-9)
    assert (patch.contrast > 0.1).all()
    same = model(model.preprocess(patch.images)).argmax(1) == model(model.preprocess(bare)).argmax(1)
    assert torch.equal(patch.accepted[0], (patch.change[0] <= bam.BOUND) & same & (patch.contrast >= 0.05))


def test_without_steps_the_patch_is_the_object_and_bounds_decide(scenes):
    bare, with_object, masks = scenes
    model = tiny.model("resnet")
    patch = bam.insignificant_patch([model], bare, with_object, masks, steps=0)
    assert torch.equal(patch.images, torch.where(masks[:, None], with_object, bare))
    torch.testing.assert_close(patch.change, patch.object_change)
    strict = bam.insignificant_patch([model], bare, with_object, masks, steps=0, bound=0.0)
    assert not strict.accepted.any()
    pale = bam.insignificant_patch([model], bare, with_object, masks, steps=0, bound=1e9, least_contrast=2.0)
    assert not pale.accepted.any()
    nothing = bam.insignificant_patch([model], bare, with_object, torch.zeros_like(masks), steps=2)
    assert torch.equal(nothing.images, bare) and nothing.contrast.isnan().all() and not nothing.accepted.any()


def test_one_patch_for_several_models_and_images_by_themselves(scenes):
    bare, with_object, masks = scenes
    models = [tiny.model("resnet"), tiny.model("vit")]
    states = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    patch = bam.insignificant_patch(models, bare, with_object, masks, steps=8)
    assert patch.change.shape == patch.accepted.shape == (2, len(bare))
    for i, model in enumerate(models):
        expected = torch.tensor(slow_change(model, bare, patch.images)).double()
        torch.testing.assert_close(patch.change[i], expected, rtol=1e-4, atol=1e-5)
    split = bam.insignificant_patch(models, bare, with_object, masks, steps=8, batch_size=3)
    assert (patch.images.int() - split.images.int()).abs().float().mean() < 0.5
    torch.testing.assert_close(split.object_change, patch.object_change, rtol=1e-4, atol=1e-5)
    for model, state in zip(models, states, strict=True):
        assert not model.training and all(not p.requires_grad and p.grad is None for p in model.parameters())
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_patch_errors(scenes):
    bare, with_object, masks = scenes
    with pytest.raises(HarmonizeError, match="0 models"):
        bam.insignificant_patch([], bare, with_object, masks)
    with pytest.raises(HarmonizeError, match=r"masks \(3, 64, 64\)"):
        bam.insignificant_patch([tiny.model("resnet")], bare, with_object, masks[1:])
    with pytest.raises(HarmonizeError, match="steps"):
        bam.insignificant_patch([tiny.model("resnet")], bare, with_object, masks, steps=-1)
