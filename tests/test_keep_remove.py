"""The keep/remove benchmark against loops over single rows, and on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import auc, r2_score
from torch import Tensor, nn

from harmonize_lib import HarmonizeError
from harmonize_lib.keep_remove import (
    ATTRIBUTIONS,
    BACKGROUND,
    DATASETS,
    METRICS,
    REPORTED,
    explain,
    feature_counts,
    impute,
    keep_remove,
    simulate,
    train,
)
from harmonize_lib.tabular_priors import Perceptrons


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Weighted(nn.Module):
    """Two linear networks side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(2, 6, seed=9))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(2)


def slow_scores(predict, x, y, training, values, background):
    """One network: every metric row by row, as its words say."""
    mean = training.mean(0)
    covariance = np.cov(training.T) + 1e-6 * np.eye(training.shape[1])
    counts = feature_counts(x.shape[1])
    scores = {}
    for metric in METRICS:
        kind, sign, fill = metric
        curve = []
        for count in counts:
            outputs = []
            for row, attribution in zip(x, values, strict=True):
                signed = {"P": attribution, "N": -attribution, "A": np.abs(attribution)}[sign]
                order = np.argsort(-signed, kind="stable")
                chosen = list(order[: min(count, int((signed >= 0).sum()))])
                missing = [i for i in range(len(row)) if (i in chosen) == (kind == "R")]
                known = [i for i in range(len(row)) if i not in missing]
                filled = row.copy()
                if fill == "M":
                    filled[missing] = mean[missing]
                    outputs.append(predict(filled))
                elif fill == "I":
                    if missing:
                        inverse = np.linalg.inv(covariance[np.ix_(known, known)])
                        shift = covariance[np.ix_(missing, known)] @ inverse @ (row[known] - mean[known])
                        filled[missing] = mean[missing] + shift
                    outputs.append(predict(filled))
                else:
                    several = []
                    for other in background:
                        filled[missing] = other[missing]
                        several.append(predict(filled))
                    outputs.append(np.mean(several))
            curve.append(r2_score(y, outputs) if sign == "A" else np.mean(outputs))
        area = auc(counts, curve) / x.shape[1]
        scores[metric] = {"KN": -area, "RP": -area, "RA": 1 - area}.get(kind + sign, area)
    return scores


def test_all_metrics_equal_loops():
    networks = Weighted().requires_grad_(False)
    x, training, values = normal(5, 2, 6), normal(130, 2, 6, seed=1), normal(5, 2, 6, seed=2)
    training = training @ normal(6, 6, seed=3)  # correlated
    y = networks(x) + 0.3 * normal(5, 2, seed=4)
    got = keep_remove(networks, x, y, training, values, torch.Generator().manual_seed(5))
    assert tuple(got) == tuple(sorted(got, key=METRICS.index)) and len(got) == 18
    chosen = torch.randperm(130, generator=torch.Generator().manual_seed(5))[:BACKGROUND]
    for network in range(2):
        weight = networks.weight[network].detach().numpy()
        one = [part[:, network].numpy() for part in (x, y, training, values, training[chosen])]
        want = slow_scores(lambda row, weight=weight: float(row @ weight), *one)
        for metric in METRICS:
            assert float(got[metric][network]) == pytest.approx(want[metric], rel=1e-5, abs=1e-6), metric


def test_exact_attributions_beat_wrong_ones_on_every_metric():
    networks = Weighted()
    x, training = normal(40, 2, 6), normal(200, 2, 6, seed=1)
    y = networks(x).detach()
    exact = (x - training.mean(0)) * networks.weight.detach()
    scores = [
        keep_remove(networks, x, y, training, values, torch.Generator().manual_seed(0))
        for values in (exact, normal(40, 2, 6, seed=7))
    ]
    for metric in METRICS:
        assert (scores[0][metric] > scores[1][metric]).all(), metric


def test_counts_run_from_none_to_all():
    assert feature_counts(60) == [0, 2, 4, 7, 10, 14, 20, 27, 35, 46, 60]
    assert feature_counts(3) == [0, 1, 2, 3]


def test_imputation_is_exact_where_features_are_copies():
    mean, rows = torch.zeros(1, 3), torch.tensor([[[2.0, 0.0, -1.0]]])
    covariance = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]) + 1e-6 * torch.eye(3)
    there = torch.tensor([[[True, False, False]]])
    torch.testing.assert_close(
        impute(rows, there, mean, covariance), torch.tensor([[[2.0, 2.0, 0.0]]]), atol=1e-4, rtol=0
    )
    assert torch.equal(impute(rows, torch.ones(1, 1, 3, dtype=torch.bool), mean, covariance), rows)
    nothing = torch.zeros(1, 1, 3, dtype=torch.bool)
    torch.testing.assert_close(impute(rows, nothing, mean + 5, covariance), torch.full((1, 1, 3), 5.0))


@pytest.mark.parametrize("name", DATASETS)
def test_data_are_what_they_claim(name):
    x, y = simulate(name, [0, 3])
    assert x.shape == (1000, 2, 60) and y.shape == (1000, 2)
    torch.testing.assert_close(x.mean(0), torch.zeros(2, 60), atol=1e-5, rtol=0)
    residual = y - x[:, :, 0:30:3].sum(2)
    assert 0.009 < float(residual.std()) < 0.011
    correlation = torch.corrcoef(x[:, 0].T)
    assert float(correlation[0, 3].abs()) < 0.1
    near = correlation[[0, 0, 1], [1, 2, 2]]
    if name == "correlated groups":
        torch.testing.assert_close(near, torch.full((3,), 0.99), atol=1e-4, rtol=0)
    else:
        assert float(near.abs().max()) < 0.15
    again, _ = simulate(name, [3])
    assert torch.equal(again[:, 0], x[:, 1])


def test_networks_learn_apart_and_attributions_are_complete():
    x, y = simulate("independent", [0, 1])
    networks = train(x, y, [0, 1], epochs=4)
    alone = train(x[:, 1:], y[:, 1:], [1], epochs=4)
    torch.testing.assert_close(networks(x)[:, 1], alone(x[:, 1:])[:, 0], atol=1e-4, rtol=1e-4)
    assert ((networks(x) - y).square().mean(0) < 0.5 * y.var(0)).all()
    assert not any(parameter.requires_grad for parameter in networks.parameters())
    generator = torch.Generator().manual_seed(0)
    rows, training = x[:20], x[20:]
    for method, missing in (("expected_gradients", 0.15), ("integrated_gradients", 0.05)):
        values = explain(networks, rows, training, method, 400, generator)
        start = networks(training).mean(0) if method == "expected_gradients" else networks(training.mean(0)[None])[0]
        assert float((values.sum(2) - (networks(rows) - start)).abs().mean()) < missing * float(y.std())
    slope = explain(networks, rows, training, "gradients", 1, generator)
    bent = rows.clone().requires_grad_()
    torch.testing.assert_close(slope, torch.autograd.grad(networks(bent).sum(), bent)[0])
    assert explain(networks, rows, training, "random", 1, generator).shape == rows.shape


def test_reported_table_is_whole_and_mistakes_get_one_line():
    assert tuple(REPORTED) == ATTRIBUTIONS
    assert all(len(scores) == len(METRICS) == 18 for scores in REPORTED.values())
    expected, integrated = (np.array(REPORTED[name]) for name in ATTRIBUTIONS[:2])
    assert [METRICS[i] for i in np.flatnonzero(expected <= integrated)] == ["KAI"]
    networks, x = Perceptrons([6], [0, 1]), torch.zeros(4, 2, 6)
    wrong = [
        (lambda: simulate("corrgroups", [0]), "unknown data set 'corrgroups'"),
        (lambda: explain(networks, x, x, "saliency", 1, torch.Generator()), "unknown method 'saliency'"),
        (lambda: keep_remove(networks, x, x[..., 0], x, x, torch.Generator()), "4 training rows are too few"),
        (lambda: keep_remove(networks, x, x[..., 0], x, x[:2], torch.Generator()), r"must be \(4, 2, 6\)"),
    ]
    for call, says in wrong:
        with pytest.raises(HarmonizeError, match=says):
            call()
