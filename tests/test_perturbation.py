"""Occlusion and RISE against literal loops, captum, and answers known in advance."""

from __future__ import annotations

from typing import Any

import captum.attr
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harmonize_lib.attribution import explain
from harmonize_lib.errors import HarmonizeError

TARGETS = torch.tensor([0, 2, 3])


def network() -> nn.Module:
    return tiny.small(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(45, 4))


@pytest.mark.parametrize(("patch", "stride", "side"), [(2, 1, 6), (3, 2, 8), (4, 3, 9), (6, 6, 6)])
def test_occlusion_literal(patch: int, stride: int, side: int) -> None:
    model, images, fill = network(), tiny.floats(side=side), tiny.floats(1, side=side, seed=3)[0]
    want = torch.zeros(3, side, side)
    for n, target in enumerate(TARGETS.tolist()):
        whole = model(images[n : n + 1])[0, target].item()
        drops: dict[tuple[int, int], list[float]] = {}
        top = 0
        while True:
            left = 0
            while True:
                hidden = images[n].clone()
                window = [
                    (row, column)
                    for row in range(top, min(top + patch, side))
                    for column in range(left, min(left + patch, side))
                ]
                for row, column in window:
                    hidden[:, row, column] = fill[:, row, column]
                drop = whole - model(hidden[None])[0, target].item()
                for pixel in window:
                    drops.setdefault(pixel, []).append(drop)
                if left + patch >= side:
                    break
                left += stride
            if top + patch >= side:
                break
            top += stride
        for (row, column), values in drops.items():
            want[n, row, column] = sum(values) / len(values)
    options = {"patch": patch, "stride": stride, "baseline": fill}
    found = explain(model, images, TARGETS, "occlusion", batch_size=5, **options).maps
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_occlusion_equals_captum() -> None:
    model = tiny.model("vgg")
    images, targets = (value[:2] for value in tiny.shapes5())
    judge = captum.attr.Occlusion(model)
    want = judge.attribute(model.preprocess(images), (3, 24, 24), (3, 16, 16), target=targets, perturbations_per_eval=9)
    found = explain(model, images, targets, "occlusion", patch=24, stride=16)
    torch.testing.assert_close(found.maps, want[:, 0].float(), rtol=1e-4, atol=1e-5)
    assert found.record["steps"] == 16


def test_occlusion_of_a_linear_model() -> None:
    """Hiding one pixel takes away w x; a patch of one pixel is input x gradient."""
    model, images = tiny.Linear(), tiny.floats()
    found = explain(model, images, TARGETS, "occlusion", patch=1, stride=1).maps
    torch.testing.assert_close(found, explain(model, images, TARGETS, "input_x_gradient").maps, rtol=1e-4, atol=1e-5)


def literal_masks(count: int, cells: int, p: float, side: int) -> list[Tensor]:
    """Each mask on its own: coarse grid, bilinear to one cell more than the image, crop."""
    seed = int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(5)))
    generator = torch.Generator().manual_seed(seed)
    grids = torch.rand(count, 1, cells, cells, generator=generator) < p
    cell = -(-side // cells)
    top = torch.randint(cell, (count,), generator=generator)
    left = torch.randint(cell, (count,), generator=generator)
    masks = []
    for i in range(count):
        large = F.interpolate(grids[i : i + 1].float(), ((cells + 1) * cell,) * 2, mode="bilinear")[0, 0]
        masks.append(large[top[i] : top[i] + side, left[i] : left[i] + side])
    return masks


@pytest.mark.parametrize("score", ["probability", "logit"])
def test_rise_literal(score: str) -> None:
    model, images = network(), tiny.floats(side=7)
    masks = literal_masks(11, 3, 0.4, 7)
    want = torch.zeros(3, 7, 7)
    for n, target in enumerate(TARGETS.tolist()):
        for mask in masks:
            logits = model((images[n] * mask)[None])[0]
            value = (logits.softmax(0) if score == "probability" else logits)[target].item()
            want[n] += value * mask / (11 * 0.4)
    options = {"masks": 11, "cells": 3, "p": 0.4, "score": score}
    generator = torch.Generator().manual_seed(5)
    found = explain(model, images, TARGETS, "rise", generator, batch_size=8, **options)
    torch.testing.assert_close(found.maps, want, rtol=1e-4, atol=1e-6)
    assert found.record["options"] == options | {"baseline": "mean"}


def test_rise_masks_keep_a_share_p() -> None:
    """A model that gives every image the same probability 1/2 maps to half the mean mask over p: 1/2 on average."""

    class Even(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.mean((1, 2, 3))[:, None].expand(-1, 2)

    images = tiny.floats(1, side=32)
    maps = explain(Even().eval(), images, TARGETS[:1], "rise", masks=2000, cells=8, p=0.3).maps
    assert float(maps.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(maps.std()) < 0.05  # sqrt(p (1 - p) / 2000) / (2 p) = 0.017 per pixel, less between cells


def test_rise_finds_the_pixels_that_count() -> None:
    class Corner(nn.Module):
        """Class 1 if the upper left quarter is bright."""

        def forward(self, x: Tensor) -> Tensor:
            bright = x[:, :, :16, :16].mean((1, 2, 3))
            return torch.stack([torch.zeros_like(bright), 8 * (bright - 0.5)], 1)

    maps = explain(Corner().eval(), torch.ones(1, 2, 32, 32), torch.tensor([1]), "rise", masks=500, cells=4).maps[0]
    assert float(maps[:14, :14].min()) > max(float(maps[22:].max()), float(maps[:, 22:].max()))


@pytest.mark.parametrize(
    ("method", "options", "line"),
    [
        ("occlusion", {"patch": 2, "stride": 3}, "stride 3 <= patch 2 <= side 6"),
        ("occlusion", {"patch": 7}, "must hold"),
        ("occlusion", {"patch": 0}, "patch must be a whole number"),
        ("rise", {"masks": 0}, "masks"),
        ("rise", {"cells": 1}, "cells"),
        ("rise", {"p": 1.0}, "between 0 and 1"),
        ("rise", {"score": "logits"}, "did you mean 'logit'"),
        ("rise", {"reduction": "sum"}, "knows no channels"),
    ],
)
def test_refuses(method: str, options: dict[str, Any], line: str) -> None:
    with pytest.raises(HarmonizeError, match=line):
        explain(tiny.Linear(), tiny.floats(), TARGETS, method, **options)
