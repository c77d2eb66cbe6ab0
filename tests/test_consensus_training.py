"""The consensus prior: who may teach whom, training in which the penalty alone differs, paired comparisons."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from torch.nn.functional import avg_pool2d

from harmonize_lib import HarmonizeError
from harmonize_lib import consensus_training as ct
from harmonize_lib.data import Dataset
from harmonize_lib.priors import consensus_prior, training_attributions
from harmonize_lib.storage import sha256_tensors
from harmonize_lib.study import Run, attributions


def data(n: int = 8) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, 64, 64), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n) % 10
    return Dataset(images, labels, tuple("0123456789"), None, tuple(map(str, range(n))), "made up")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(ct, "BATCH_SIZE", 4)


def weights(model) -> str:
    return sha256_tensors(model.network.state_dict())


def test_neither_the_own_nor_the_judges_architecture_is_in_the_pool():
    models = {name: tiny.model(name) for name in ("resnet", "vgg", "vit")}
    for name, model in models.items():
        model.architecture, model.name = name, name
    twin = ct.with_network(models["resnet"], models["resnet"].network, "resnet-s1")
    (plan,) = ct.plan({**models, "resnet-s1": twin}, ["resnet"], ["vit"])
    assert [model.name for model in plan.pool] == ["vgg"] and plan.judge.name == "vit"
    with pytest.raises(HarmonizeError, match="another architecture"):
        ct.plan({**models, "resnet-s1": twin}, ["resnet"], ["resnet-s1"])
    with pytest.raises(HarmonizeError, match="leave a pool"):
        ct.plan({name: models[name] for name in ("resnet", "vit")}, ["resnet"], ["vit"])
    with pytest.raises(HarmonizeError, match="'swin' is not among the models"):
        ct.plan(models, ["swin"], ["vit"])
    with pytest.raises(HarmonizeError, match="1 fine-tuned models and 2 judges"):
        ct.plan(models, ["resnet"], ["vit", "vgg"])


@pytest.mark.parametrize("architecture", ["resnet", "swin"])
def test_arms_differ_in_the_penalty_alone_and_the_model_is_left_as_found(architecture):
    model, images = tiny.model(architecture), data()
    before, state = weights(model), torch.get_rng_state()
    maps = torch.rand(8, 64, 64, generator=torch.Generator().manual_seed(1))
    plain = ct.fine_tune(model, images, None, 0.0, 1, 0)
    assert weights(ct.fine_tune(model, images, maps, 0.0, 1, 0)) == weights(plain)
    assert weights(ct.fine_tune(model, images, maps, 1.0, 1, 0)) != weights(plain) != before
    assert weights(ct.fine_tune(model, images, None, 0.0, 1, 1)) != weights(plain)
    assert weights(model) == before and torch.equal(torch.get_rng_state(), state)
    assert not plain.training and not any(p.requires_grad for p in plain.parameters())
    assert plain.weights_hash == weights(plain)
    for name, value in model.network.state_dict().items():
        if "running" in name:
            assert torch.equal(value, plain.network.state_dict()[name])


def test_maps_come_nearer_to_the_target(monkeypatch):
    monkeypatch.setattr(ct, "LEARNING_RATE", 5e-3)
    model, images = tiny.model("vgg"), data()
    maps = torch.zeros(8, 64, 64)
    maps[:, 16:40, 16:40] = 1

    def distance(tuned) -> float:
        phi = training_attributions(
            tuned.network,
            model.preprocess(images.images),
            images.labels,
            None,
            4,
            generator=torch.Generator().manual_seed(9),
        )
        return consensus_prior(phi, maps, ct.PATCH).item()

    plain = distance(ct.fine_tune(model, images, None, 0.0, 6, 0))
    assert distance(ct.fine_tune(model, images, maps, 10.0, 6, 0)) < plain - 0.05


def made_up() -> pd.DataFrame:
    rows = []
    for image, base in zip("abcd", (0.1, 0.2, 0.4, 0.8), strict=True):
        rows.append(("m", "before", 0, "saliency", "Spearman", image, base))
        for seed in (0, 1):
            for arm, gain in ((ct.OURS, 0.2 + 0.1 * seed), (ct.CONTROL, 0.05), (ct.PLAIN, 0.02 * seed)):
                rows.append(("m", arm, seed, "saliency", "Spearman", image, base + gain))
    return pd.DataFrame(rows, columns=["model", "arm", "seed", "method", "measure", "image", "value"])


def test_differences_are_paired_over_images_and_seeds():
    table = ct.differences(made_up(), 0).set_index("against")
    assert table.loc["before", "mean"] == pytest.approx(0.25) and table.loc["before", "n"] == 4
    assert (table.loc["before", "lowest"], table.loc["before", "highest"]) == pytest.approx((0.2, 0.3))
    assert table.loc[ct.PLAIN, "mean"] == pytest.approx(0.24)
    assert (table.loc[ct.PLAIN, "lowest"], table.loc[ct.PLAIN, "highest"]) == pytest.approx((0.2, 0.28))
    assert table.loc[ct.CONTROL, "low"] == pytest.approx(0.2)  # every image gains the same


def test_the_ledger_counts_networks_not_images():
    pooled = ct.pooled_difference(made_up(), "Spearman", ct.CONTROL)  # 0.15 and 0.25 by the two seeds
    assert pooled.mean == pytest.approx(0.2) and pooled.n == 2
    assert pooled.high - pooled.mean == pytest.approx(12.7062 * 0.05, rel=1e-5)  # Student's t with one degree
    assert ct.pooled_difference(made_up(), "Spearman", "before").mean == pytest.approx(0.25)


def test_facts_follow_the_accuracy():
    table = pd.DataFrame({"model": ["m", "m"], "arm": [ct.OURS, ct.PLAIN], "mean": [-0.011, -0.009]})
    moved = made_up().replace({"Spearman": ct.OBJECTIVE})  # 0.2 and 0.28 nearer than without a prior, by the two seeds
    assert list(ct.facts(table, moved).values()) == [False, False, True]  # two networks are too few for the interval
    sure = pd.concat([moved, moved[moved["seed"] == 1].assign(seed=2), moved[moved["seed"] == 1].assign(seed=3)])
    assert list(ct.facts(table, sure).values()) == [True, False, True]


def test_the_objective_is_the_correlation_with_the_consensus_of_the_pool():
    target, judge, *pool = (tiny.model(name) for name in ("vgg", "resnet", "mobilenet", "convnext"))
    options = {"expected_gradients": {"samples": 2}}
    settings = SimpleNamespace(consensus_method="input_x_gradient", seed=0, options=options)
    run = Run("09_attribution_priors", settings, data(), {}, Path(), 0.0)
    study = ct.Tuned(ct.Plan(target, judge, tuple(pool)), pd.DataFrame(), {}, {(ct.OURS, 0): judge})
    found = ct.reached(run, [study]).set_index(["arm", "image"])["value"]
    wished = ct.target_maps(pool, data(), "input_x_gradient", 0)
    for arm, model in (("before", target), (ct.OURS, judge)):
        maps = attributions(model, data(), "expected_gradients", 0, samples=2)["maps"]
        for i, image in enumerate(data().ids):
            a, b = (avg_pool2d(one[i : i + 1], ct.PATCH).flatten().double().numpy() for one in (maps, wished))
            assert found[arm, image] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-5)


def test_the_rule_takes_the_largest_weight_that_costs_little():
    rows = [(1.0, 0.99), (1.0, 0.98), (10.0, 0.995), (10.0, 0.97), (100.0, 0.9), (100.0, 0.95)]
    tried = pd.DataFrame(rows, columns=["weight", "validation_accuracy"]).assign(before=0.992)
    assert ct.choose_weight(tried) == 10.0
    assert ct.choose_weight(tried.assign(before=0.994)) == 1.0
    assert ct.choose_weight(tried.assign(before=1.0)) == 1.0  # none stays: the smallest
