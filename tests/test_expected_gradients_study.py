"""The study of notebook 08: its estimators of slopes and epochs, its exact values, its black pixels."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from harmonize_lib import claims, keep_remove, load_dataset, load_model
from harmonize_lib import expected_gradients_study as eg
from harmonize_lib.expected_gradients_study import _demonstrate, _path_average, _Saturated
from harmonize_lib.statistics import Interval
from harmonize_lib.study import Run
from harmonize_lib.tabular_priors import Perceptrons


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr("harmonize_lib.paths.CACHE", tmp_path)
    model = load_model("resnet-obj", device="cpu")
    values = {"dataset": "shapes-on-scenes", "seed": 0, "n_references": 6, "draws": 64, "timed_steps": 2, "n_shown": 1}
    values |= {"demo_seeds": 2, "demo_epochs": 2, "benchmark_seeds": 2, "benchmark_samples": 4}
    data = load_dataset("shapes-on-scenes", "test", 2)
    return Run("08_expected_gradients", SimpleNamespace(**values), data, {model.name: model}, tmp_path / "08", 0.0)


def test_completeness_gap_of_one_draw_is_literal(run):
    table = eg.completeness(run)
    assert len(table) == 2 * (5 + len(eg.STRATIFIED))
    model, start = run.models["resnet-obj"], eg.references(run)
    x, starts = model.preprocess(run.dataset.images), model.preprocess(start)
    with torch.no_grad():
        difference = model(x) - model(starts).mean(0)
    wanted = difference.gather(1, run.dataset.labels[:, None])[:, 0]
    single = eg._draws(model, x, run.dataset.labels, starts, 64, 0)
    for k in (1, 16):
        gaps = [[float(single[i : i + k, n].mean() - wanted[n]) for i in range(0, 64, k)] for n in range(2)]
        got = table[(table["estimator"] == "independent draws") & (table["references"] == k)]["gap"]
        np.testing.assert_allclose(got, [math.sqrt(np.mean(np.square(g))) for g in gaps], rtol=1e-4)


@pytest.mark.parametrize("power", [-0.5, -0.2])
def test_slope_is_recovered(power):
    rng = np.random.default_rng(0)
    rows = [
        ("independent draws", model, image, k, k**power * (1 + 0.01 * rng.standard_normal()))
        for model in "ab"
        for image in range(20)
        for k in (1, 2, 4, 8, 16)
    ]
    table = pd.DataFrame(rows, columns=["estimator", "model", "image", "references", "gap"])
    fits = eg.slopes(table, 0, 200)
    assert list(fits["model"]) == ["a", "b", "all models"]
    assert fits["mean"].to_numpy() == pytest.approx(power, abs=0.01)
    assert ((fits["low"] < fits["mean"]) & (fits["mean"] < fits["high"])).all()
    last = fits.iloc[-1]
    verdict = claims.CLAIMS["eg_complete"].judge(Interval(last["mean"], last["low"], last["high"], 20))
    assert verdict == ("reproduced" if power == -0.5 else "not reproduced")


def test_path_average_is_exact_for_a_known_function():
    bowl = eg._Bowl()
    x = torch.tensor([[2.0, 3.0, 1.0, 7.0]], dtype=torch.float64)
    starts = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, -1.0, 0.0]], dtype=torch.float64)
    first = [2 * 1.5 - 2, 3 * 1.0, 1.0, 0.0]  # x1 x2 halved, x3 squared, -x1
    second = [1 * 2.0 - 1, 2 * 1.5, 0.0, 0.0]
    want = torch.tensor([[(a + b) / 2 for a, b in zip(first, second, strict=True)]], dtype=torch.float64)
    torch.testing.assert_close(_path_average(bowl, x, starts), want)
    linear = nn.Linear(4, 1).double()
    got = _path_average(linear, x, starts).detach()
    torch.testing.assert_close(got, (x - starts.mean(0)) * linear.weight.detach())


def test_means_of_draws_are_exact_and_equal_captum(run):
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    torch_state = torch.random.get_rng_state()
    summary = eg.exactness_summary(eg.exactness(run, repeats=12, samples=4))
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert summary["numbers"].tolist() == [16, 16, 16, 128]
    assert (summary["largest |z|"][:3] < summary["bound"][:3]).all()
    assert (summary["mean z²"][:3].between(0.2, 2.5)).all()
    assert summary["within 3 standard errors"][3] > 0.95  # t with 22 degrees of freedom


def test_demonstration_equals_training_one_network_by_itself():
    """Networks side by side go the way that each goes alone, with another one's attribution penalized by hand."""
    together = _demonstrate("gradients", 1, False, [0, 5], 3)["dependence"]
    alone = _demonstrate("gradients", 1, False, [5], 3)["dependence"]
    torch.testing.assert_close(together[:, 1:], alone, atol=1e-5, rtol=1e-4)
    coins = (torch.rand(1000, generator=torch.Generator().manual_seed(5)) < 0.5).float()
    weight = torch.tensor([10.0, 10.0], requires_grad=True)
    bias = torch.tensor(-6.0, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=1e-2)
    order = torch.Generator().manual_seed(5)
    for _ in range(3):
        for rows in torch.randperm(1000, generator=order).split(64)[:15]:
            y = coins[rows]
            p = torch.sigmoid(weight[0] * y + weight[1] * y + bias)
            slope = p * (1 - p) * weight[1]
            loss = nn.functional.binary_cross_entropy(p, y) + slope.abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    grid = torch.arange(0, 1, 0.05)
    effect = [
        (torch.sigmoid(weight[i] + weight[1 - i] * grid + bias) - torch.sigmoid(weight[1 - i] * grid + bias)).mean()
        for i in (1, 0)
    ]
    assert float(together[-1, 1]) == pytest.approx((effect[0] / effect[1]).item(), abs=1e-4)
    assert together[0].tolist() == pytest.approx([1, 1])


def test_demonstration_logarithm_and_rows():
    networks = Perceptrons([2], [0, 1])
    x = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = _Saturated(networks, torch.sigmoid)(x)
        logs = _Saturated(networks, nn.functional.logsigmoid)(x)
    torch.testing.assert_close(logs, p.log())
    for row in range(6):
        weight, bias = networks.weights[0][row % 2, :, 0], networks.biases[0][row % 2, 0, 0]
        assert p[row].item() == pytest.approx(torch.sigmoid(x[row] @ weight + bias).item(), rel=1e-5)


def test_epochs_to_zero_counts_networks_that_never_get_there():
    rows = [("gradients", 0, e, v) for e, v in enumerate([1, 0.5, 0.01])]
    rows += [("gradients", 1, e, v) for e, v in enumerate([1, -0.005, 0.3])]
    rows += [("gradients", 2, e, v) for e, v in enumerate([1, 0.9, 0.8])]
    summary = eg.epochs_to_zero(pd.DataFrame(rows, columns=["penalty", "seed", "epoch", "dependence"]))
    row = summary.iloc[0]
    assert (row["mean"], row["reached"], row["n"], row["reported"]) == (1.5, 2, 3, math.inf)
    assert row["left"] == pytest.approx((0.01 + 0.3 + 0.8) / 3)


def test_black_pixels_are_the_darker_ones_of_the_object(run):
    painted, black = eg.black_pixels(run.dataset)
    for i in range(2):
        bright = run.dataset.images[i].float().mean(0)
        mask = run.dataset.masks[i]
        middle = (bright[mask].min() + bright[mask].max()) / 2
        assert torch.equal(black[i], mask & (bright < middle))
        assert 0 < int(black[i].sum()) < int(mask.sum())
        assert painted.images[i][:, black[i]].eq(0).all()
        assert torch.equal(painted.images[i][:, ~black[i]], run.dataset.images[i][:, ~black[i]])
    whole, dark = eg.black_pixels(replace(run.dataset, masks=None))
    assert whole.images.shape == run.dataset.images.shape and dark.any()


def test_integrated_gradients_are_blind_and_expected_gradients_are_not(run):
    table = eg.blindness(run)
    ratios = {name: part["ratio"].to_numpy() for name, part in table.groupby("method")}
    assert (ratios["integrated gradients from black"] == 0).all()
    assert (ratios["expected gradients"] > 0).all()
    painted, black = eg.black_pixels(run.dataset)
    maps = eg.blind_maps(run, run.models["resnet-obj"], painted)["expected gradients"]
    inside, outside = maps[0][black[0]].abs().mean(), maps[0][~black[0]].abs().mean()
    assert ratios["expected gradients"][0] == pytest.approx((inside / outside).item(), rel=1e-4)


def test_steps_are_timed_on_a_copy(run):
    model = run.models["resnet-obj"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = eg.step_cost(run)
    assert len(table) == 2 and (table["ratio"] > 1).all() and table["counted"][0] == table["counted"][1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_share_of_metrics_won():
    rows = [
        (keep_remove.DATASETS[0], seed, method, metric, float(method == "expected_gradients" and place < 9 + 3 * seed))
        for seed in range(3)
        for method in keep_remove.ATTRIBUTIONS
        for place, metric in enumerate(keep_remove.METRICS)
    ]
    table = pd.DataFrame(rows, columns=["dataset", "seed", "method", "metric", "score"])
    share = eg.metrics_won(table, keep_remove.DATASETS[0])
    assert share.mean == pytest.approx((9 + 12 + 15) / 3 / 18) and share.n == 3
    row = eg.benchmark_table(table, keep_remove.DATASETS[0]).iloc[0]
    assert row["EG − IG"] == 1 and row["reported expected_gradients"] == 3.731
    said = eg.benchmark_in_words(table, keep_remove.DATASETS[0])
    assert "above 0 on 15 of 18 metrics by its mean over networks, on 9 by its 95 % interval" in said
    assert (
        f"scores {(9 + 12 + 15) / 3 / 18:.4f} (reported: 0.0611, above 0 on 17); share won by one network 0.67" in said
    )


def test_networks_above_the_bound_are_named_by_their_interval():
    rows = [
        ("resnet-obj", 2.5, 2.4, 2.6, 5, 2.4),
        ("vit-obj", 3.3, 3.1, 3.5, 5, 3.2),
        ("convnext-obj", 3.5, 3.25, 3.75, 5, 3.1),
    ]
    said = eg.step_cost_in_words(pd.DataFrame(rows, columns=["model", "mean", "low", "high", "n", "counted"]))
    assert said == (
        "a step with the prior costs 3.10 plain steps, mean of 3 networks (2.90 by the operations counted); "
        "above the bound of 3.2 by their 95 % interval: ConvNeXt (3.50)"
    )
