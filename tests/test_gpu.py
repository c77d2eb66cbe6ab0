"""A GPU gives the maps that the CPU gives: every method on every shipped architecture, and training with a prior."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from test_attribution import QUICK
from torch import Tensor

from harmonize_lib import prior_study
from harmonize_lib.attribution import METHODS, explain, refusal
from harmonize_lib.data import Dataset, load_dataset
from harmonize_lib.models import ARCHITECTURES, Model, list_models, load_model
from harmonize_lib.transfer import recognize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

ZOO = [name for name in ARCHITECTURES if f"{name}-obj" in list_models()]
SENSITIVE = pytest.mark.xfail(reason="rounding alone moves it by 0.1 to 0.2 %: see decomposition.py; 1.9e-3 on an H200")
RUNS = [
    pytest.param(name, method, marks=[SENSITIVE] * ((name, method) == ("mobilenet", "contextual_decomposition")))
    for name in ZOO
    for method in METHODS
    if refusal(load_model(f"{name}-obj", device="cpu"), method) is None
]


@cache
def pair(name: str) -> tuple[Model, Model]:
    return load_model(f"{name}-obj", device="cpu"), load_model(f"{name}-obj", device="cuda")


@cache
def images() -> Dataset:
    return load_dataset("shapes-on-scenes", "test", 12)


def maps_of(model: Model, method: str) -> Tensor:
    data, generator = images(), torch.Generator().manual_seed(1)
    return explain(model, data.images, data.labels, method, generator, **QUICK.get(method, {})).maps.cpu()


def gap(maps: Tensor, others: Tensor) -> float:
    """Median over images of the relative difference."""
    norms = [values.flatten(1).norm(dim=1) for values in (maps - others, maps)]
    return float((norms[0] / norms[1].clamp_min(1e-12)).median())


@pytest.mark.parametrize(("name", "method"), RUNS)
def test_maps_are_those_of_the_cpu(name, method):
    maps, others = (maps_of(model, method) for model in pair(name))
    print(f"{name:10} {method:32} {gap(maps, others):.1e}")
    assert gap(maps, others) <= 1e-3


@pytest.mark.parametrize("fill", ["mean", "blur", "road"])
def test_features_shown_on_a_gpu_are_recognized_as_on_the_cpu(fill):
    maps = torch.rand(12, 64, 64, generator=torch.Generator().manual_seed(3))
    here, there = (
        recognize({name: pair(name)[place] for name in ZOO}, images(), maps, [0.1, 0.5], fill=fill)[1]
        for place in (0, 1)
    )
    assert abs(here - there).max() <= 1e-3


def test_training_with_a_prior_starts_as_on_the_cpu():
    data = prior_study.load_pixels("digits", 200)
    recipe = prior_study.recipe("small", 1)
    weights = [
        torch.cat(
            [
                p.detach().cpu().flatten()
                for p in prior_study.train_with_prior(
                    tuple(part.to(device) for part in data.train), 10, recipe, "expected_gradients", 0.003, 0
                ).parameters()
            ]
        )
        for device in ("cpu", "cuda")
    ]
    assert (weights[0] - weights[1]).norm() <= 1e-3 * weights[0].norm()
