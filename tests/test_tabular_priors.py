"""Networks side by side equal networks alone; penalties and curves equal literal loops."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from sklearn.metrics import r2_score, roc_auc_score
from torch.nn import functional as F

from harmonize_lib import HarmonizeError
from harmonize_lib import tabular_priors as tp
from harmonize_lib.priors import graph_prior, sparsity_prior, training_attributions
from harmonize_lib.tabular import Table, load_table

R, ROWS, FEATURES = 3, 12, 5


def rows(seed: int = 0, n: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, R, FEATURES, generator=generator)
    return x, (x[..., 0] + torch.randn(n, R, generator=generator) > 0).float()


def networks(seeds=(4, 7, 9)) -> tp.Perceptrons:
    return tp.Perceptrons([FEATURES, 6, 4], seeds)


def test_forward_equals_each_network_by_loops():
    stack, (x, _) = networks(), rows()
    for r in range(R):
        for n in range(ROWS):
            hidden = x[n, r].tolist()
            for layer, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
                hidden = [
                    sum(h * weight[r, i, o].item() for i, h in enumerate(hidden)) + bias[r, 0, o].item()
                    for o in range(weight.shape[2])
                ]
                hidden = [max(h, 0) for h in hidden] if layer < 2 else hidden
            assert stack(x)[n, r].item() == pytest.approx(hidden[0], abs=1e-5)


def test_a_network_starts_the_same_whoever_its_neighbors_are():
    alone, together = networks([7]), networks()
    for one, many in zip(alone.parameters(), together.parameters(), strict=True):
        assert torch.equal(one[0], many[1])
        assert one.abs().max() <= one.shape[1] ** -0.5 or one.shape[1] == 1


@pytest.mark.parametrize("method", ["expected_gradients", "gradients"])
def test_attributions_side_by_side_equal_those_alone(method):
    stack, (x, _), references = networks(), rows(), rows(1)[0]
    together = tp.attributions(stack, x, references, torch.Generator().manual_seed(3), method, 2)
    for r, seed in enumerate((4, 7, 9)):
        alone = training_attributions(
            torch.nn.Sequential(networks([seed])),
            x[:, r : r + 1],
            None,
            references[:, r : r + 1],
            2,
            method,
            torch.Generator().manual_seed(3),
        )
        torch.testing.assert_close(together[:, r], alone[:, 0])


def test_penalties_equal_literal_loops():
    stack, (x, _) = networks(), rows()
    for r in range(R):
        flat, groups = [], 0.0
        for weight in stack.weights:
            for unit in weight[r]:
                flat += unit.tolist()
                groups += math.sqrt(len(unit)) * math.sqrt(sum(v**2 for v in unit.tolist()))
        size = sum(abs(v) for v in flat)
        none = torch.Generator()
        assert tp.l1(stack, x, none)[r].item() == pytest.approx(size / len(flat))
        assert tp.l2(stack, x, none)[r].item() == pytest.approx(sum(v**2 for v in flat) / len(flat))
        assert tp.sparse_group_lasso(stack, x, none)[r].item() == pytest.approx((groups + size) / len(flat))


def test_priors_of_the_stack_are_the_priors_of_each_network():
    stack, (x, _) = networks(), rows()
    phi = tp.attributions(stack, x, x, torch.Generator().manual_seed(1))
    gini = tp.gini_penalty(stack, x, torch.Generator().manual_seed(1), "expected_gradients")
    graphs = torch.rand(R, FEATURES, FEATURES, generator=torch.Generator().manual_seed(2))
    graphs = graphs + graphs.mT
    graph = tp.graph_penalty(stack, x, torch.Generator().manual_seed(1), graphs)
    for r in range(R):
        torch.testing.assert_close(gini[r], sparsity_prior(phi[:, r]))
        torch.testing.assert_close(graph[r], graph_prior(phi[:, r], graphs[r]))


def fit(stack, penalty, weights, part=slice(None), epochs=15):
    (x, y), (x_val, y_val) = rows(), rows(5, 30)
    loss = partial(F.binary_cross_entropy_with_logits, reduction="none")
    return tp.fit(
        stack, (x[:, part], y[:, part]), (x_val[:, part], y_val[:, part]), loss, tp.roc_auc, penalty, weights, epochs, 0
    )


@pytest.mark.parametrize("arm", tp.SPARSITY_ARMS)
def test_training_side_by_side_equals_training_alone(arm):
    penalty = tp.SPARSITY_ARMS[arm][0]
    stack = networks()
    best = fit(stack, penalty, torch.tensor([0.1, 0.5, 2.0]))
    for r, (seed, weight) in enumerate(zip((4, 7, 9), (0.1, 0.5, 2.0), strict=True)):
        alone = networks([seed])
        alone_best = fit(alone, penalty, torch.tensor([weight]), slice(r, r + 1))
        torch.testing.assert_close(best[r], alone_best[0])
        for one, many in zip(alone.parameters(), stack.parameters(), strict=True):
            torch.testing.assert_close(one[0], many[r], rtol=1e-4, atol=1e-5)


def test_arms_differ_in_the_penalty_alone():
    plain, weightless, moved = networks(), networks(), networks()
    penalty = tp.SPARSITY_ARMS[tp.OURS][0]
    fit(plain, None, torch.zeros(R))
    fit(weightless, penalty, torch.zeros(R))
    fit(moved, penalty, torch.ones(R))
    for a, b in zip(plain.parameters(), weightless.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(plain.parameters()), next(moved.parameters()))


def test_the_best_epoch_is_kept():
    stack = networks()
    best = fit(stack, None, torch.zeros(R), epochs=40)
    x_val, y_val = rows(5, 30)
    torch.testing.assert_close(tp.roc_auc(stack(x_val), y_val), best)
    seen = []
    for epochs in range(1, 41, 13):
        again = networks()
        seen.append(fit(again, None, torch.zeros(R), epochs=epochs))
    assert all((best >= earlier).all() for earlier in seen)


def test_tune_takes_each_replicates_best_weight():
    train, validation = rows(), rows(5, 30)
    sizes, grid = [FEATURES, 6, 4], [0.0, 1.0, 1e5]
    chosen, weights, edge = tp.tune(
        train, validation, sizes, F.binary_cross_entropy_with_logits, tp.roc_auc, tp.l2, grid, 20, 0
    )
    each = []
    for weight in grid:
        stack = tp.Perceptrons(sizes, range(R))
        each.append(fit(stack, tp.l2, torch.full((R,), weight), epochs=20))
    best = torch.stack(each).argmax(0)
    assert weights.tolist() == [grid[i] for i in best]
    assert edge.tolist() == [i in (0, 2) for i in best.tolist()]
    torch.testing.assert_close(tp.roc_auc(chosen(validation[0]), validation[1]), torch.stack(each).amax(0))


def test_roc_auc_and_r_squared_equal_scikit_learn():
    rng = np.random.default_rng(0)
    outputs, y = rng.integers(6, size=(40, 4)).astype(float), rng.integers(2, size=(40, 4))
    expected = [roc_auc_score(y[:, r], outputs[:, r]) for r in range(4)]
    np.testing.assert_allclose(tp.roc_auc(torch.tensor(outputs), torch.tensor(y)), expected)
    target = rng.normal(size=(40, 4))
    expected = [r2_score(target[:, r], outputs[:, r]) for r in range(4)]
    np.testing.assert_allclose(tp.r_squared(torch.tensor(outputs), torch.tensor(target)), expected)
    assert tp.roc_auc(torch.ones(5, 1), torch.ones(5, 1)).isnan().all()


def test_lorenz_curve_by_loops_and_its_area_is_the_gini_coefficient():
    p = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)).double()
    curves = tp.lorenz(p)
    for row, curve in zip(p.tolist(), curves.tolist(), strict=True):
        ordered = sorted(row)
        expected = [sum(ordered[:k]) / sum(row) for k in range(10)]
        assert curve == pytest.approx(expected)
        gini = 1 - 2 * sum((a + b) / 2 / 9 for a, b in pairwise(curve))
        assert -sparsity_prior(torch.tensor([row])).item() == pytest.approx(gini)
    assert tp.lorenz(torch.zeros(1, 3))[0, 1:].isnan().all()


def test_splits_know_nothing_of_their_test_rows():
    rng = np.random.default_rng(0)
    features = rng.normal(3, 5, size=(300, 4))
    features[rng.random((300, 4)) < 0.1] = np.nan
    table = Table(features, rng.integers(2, size=300), tuple("abcd"), "t", "yes")
    split = tp.split_table(table, 3, 0)
    assert [part[0].shape[:2] for part in split] == [(100, 3), (100, 3), (100, 3)]
    for r in range(3):
        torch.testing.assert_close(split.train[0][:, r].mean(0), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(split.train[0][:, r].std(0, correction=0), torch.ones(4))
        assert sum(float(part[1][:, r].sum()) for part in split) == table.outcome.sum()
    changed = Table(np.where(np.arange(300)[:, None] < 0, 0, features), table.outcome, table.names, "t", "yes")
    assert torch.equal(tp.split_table(changed, 3, 0).train[0], split.train[0])
    assert not torch.equal(split.train[0][:, 0], split.train[0][:, 1])
    with pytest.raises(HarmonizeError, match="200 for training and validation"):
        tp.split_table(Table(features[:220], table.outcome[:220], table.names, "t", "yes"), 1, 0)
    missing = np.isnan(features).mean()
    means = (torch.cat([part[0] for part in split]).abs() < 1e-6).double().mean().item()
    assert means == pytest.approx(missing, abs=0.01)  # imputed values are the training mean


def results() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(8, generator=generator).double()
    arms = {"a": one, "b": one + 1, "c": one - 0.5 + 0.1 * torch.randn(8, generator=generator)}
    return {
        name: {"r2": value, "weight": torch.ones(8), "edge": torch.tensor([True] * 2 + [False] * 6)}
        for name, value in arms.items()
    }


def test_comparisons_are_paired():
    table = tp.paired_table(results(), "a", ["r2"]).set_index("arm")
    assert table.loc["b", "mean"] == pytest.approx(-1) and table.loc["b", "n"] == 8
    test = ttest_rel(results()["a"]["r2"], results()["c"]["r2"])
    assert table.loc["c", "t"] == pytest.approx(test.statistic) and table.loc["c", "p"] == pytest.approx(test.pvalue)
    assert table.loc["c", "holm"] == pytest.approx(min(1, max(table["p"].min() * 2, table.loc["c", "p"])))
    low, high = test.confidence_interval(0.95)
    assert (table.loc["c", "low"], table.loc["c", "high"]) == pytest.approx((low, high))
    assert tp.against_best(results(), "a", "r2").mean == pytest.approx(-1)
    summary = tp.means(results(), ["r2"]).set_index("arm")
    assert summary.loc["a", "r2"] == pytest.approx(results()["a"]["r2"].mean().item())
    assert summary["at_edge"].tolist() == [0.25] * 3


def test_a_strong_graph_prior_evens_out_what_the_graph_connects():
    recipe = tp.GraphRecipe(train_rows=60, validation_rows=60, test_rows=60, hidden=(8,), epochs=60)
    rng = np.random.default_rng(0)
    draws = [tp.simulate_expression(180, rng, genes=12, modules=4, drivers=1) for _ in range(2)]
    data = tp._expression_split(draws, [60, 60, 60])
    graphs = torch.from_numpy(np.stack([d.adjacency for d in draws])).float()
    spread = []
    for penalty in (None, tp.graph_penalty):
        stack = tp.Perceptrons([12, 8], [0, 1])
        own = penalty and partial(penalty, adjacency=graphs)
        tp.fit(
            stack, data.train, data.train, partial(F.mse_loss, reduction="none"), tp._negative_error, own,
            torch.full((2,), 20.0), recipe.epochs, 0,
        )  # fmt: skip
        phi = tp.attributions(stack, data.test[0], data.train[0], torch.Generator().manual_seed(0), samples=20)
        importance = phi.detach().abs().mean(0)
        relative = importance / importance.sum(1, keepdim=True)
        spread.append([graph_prior(relative[r][None], graphs[r]).item() for r in range(2)])
    assert all(with_prior < without for without, with_prior in zip(*spread, strict=True))


def test_the_sparsity_study_keeps_every_replicate_and_repeats(tmp_path, monkeypatch):
    from harmonize_lib import paths

    monkeypatch.setattr(paths, "CACHE", tmp_path)
    table = load_table("breast_cancer")
    first = tp.sparsity_study(table, 2, 2, [4], 3, 0)
    assert set(first) == set(tp.SPARSITY_ARMS)
    for arm, values in first.items():
        assert values["auc"].shape == values["gini"].shape == (2,) and values["lorenz"].shape == (2, 31)
        exponents = tp.SPARSITY_ARMS[arm][1]
        ends = [0.0] if arm == "none" else [10.0**exponent for exponent in exponents]
        assert all(min(abs(weight - end) for end in ends) <= 1e-6 * max(ends) for weight in values["weight"].tolist())
    monkeypatch.setattr(tp, "tune", None)  # nothing may be computed again
    again = tp.sparsity_study(table, 2, 2, [4], 3, 0)
    assert all(torch.equal(first[arm][name], again[arm][name]) for arm in first for name in first[arm])


def test_words_on_the_graph_prior_are_paired_differences():
    r2 = {"none": [0.1, 0.2, 0.3], "rewired 0": [0.2, 0.3, 0.4], "rewired 1": [0.1, 0.1, 0.4], "LASSO": [0.2, 0.2, 0.2]}
    edge = torch.tensor([True, False, False])
    results = {arm: {"r2": torch.tensor(values), "edge": edge} for arm, values in r2.items()}
    lines = tp.graph_in_words(results).split("\n")
    assert lines[0].startswith("- R², true graph minus no prior: +0.1000 [+0.1000, +0.1000], n = 3")
    assert (
        lines[1].startswith("- R², random graph minus no prior: ")
        and "0.0000 [-0.2484, +0.2484]" in lines[1]
        and "p = 1" in lines[1]
    )
    assert lines[2].startswith("- R², true graph minus LASSO: +0.1000 [")
    assert lines[3].endswith("share of simulations: true graph 33%, random graph 33%, LASSO 33%")
