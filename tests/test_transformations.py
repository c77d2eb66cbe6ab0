"""Importance in transformed spaces against literal loops, PyWavelets, and coefficients known to matter."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch
from tiny import floats, small
from torch import nn

from harmonize_lib import HarmonizeError
from harmonize_lib.decomposition import contextual_decomposition
from harmonize_lib.transformations import (
    METHODS,
    Transform,
    dwt,
    fourier,
    idwt,
    level_matrix,
    nonnegative_factors,
    principal_components,
    scales,
    transform_importance,
    wavelet,
)
from harmonize_lib.wavelet_study import TRANSFORMS, knock_out, recovery

L = 16


def signals(n: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, L, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filters(name: str) -> torch.Tensor:
    return torch.tensor(pywt.Wavelet(name).rec_lo, dtype=torch.float64)


def net(inputs: int = L) -> nn.Module:
    return small(nn.Linear(inputs, 7), nn.ReLU(), nn.Linear(7, 3)).double().requires_grad_(False)


def every_transform() -> list[Transform]:
    data = signals(40, 1)
    return [
        fourier((L,)),
        wavelet(filters("db2"), 2),
        principal_components(data, 6),
        nonnegative_factors(data.abs(), 4),
    ]


@pytest.mark.parametrize("name", ["haar", "db3", "db5", "sym4", "coif1"])
@pytest.mark.filterwarnings("ignore:Level value")
def test_wavelet_transform_equals_pywavelets_in_one_and_two_dimensions(name):
    x = torch.randn(2, 3, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one = np.concatenate(pywt.wavedec(x.numpy(), name, mode="periodization", level=3), -1)
    np.testing.assert_allclose(dwt(x, filters(name), 3).numpy(), one, atol=1e-12)
    coefficients = pywt.wavedec2(x.numpy(), name, mode="periodization", level=2)
    two, _ = pywt.coeffs_to_array(coefficients, axes=(-2, -1))
    np.testing.assert_allclose(dwt(x, filters(name), 2, axes=2).numpy(), two, atol=1e-12)
    for axes in (1, 2):
        back = idwt(dwt(x, filters(name), 3, axes), filters(name), 3, axes)
        torch.testing.assert_close(back, x, atol=1e-10, rtol=0)


def test_level_matrix_row_by_row():
    h = torch.tensor([0.3, -0.2, 0.7, 0.5])
    matrix = level_matrix(h, 6)
    g = [(-1) ** n * float(h[3 - n]) for n in range(4)]
    for k in range(3):
        low, high = [0.0] * 6, [0.0] * 6
        for n in range(4):
            low[(2 * k + n - 1) % 6] += float(h[n])
            high[(2 * k + n - 1) % 6] += g[n]
        torch.testing.assert_close(matrix[[k, 3 + k]], torch.tensor([low, high]))


def test_scales_count_the_coefficients():
    assert scales(16, 3).bincount().tolist() == [2, 2, 4, 8]
    assert scales(16, 3).tolist() == sorted(scales(16, 3).tolist())


def test_a_filter_per_leading_index_is_the_same_as_one_by_one():
    h = torch.stack([filters("db2"), filters("db2").flip(0)])
    x = signals(6).view(2, 3, L)
    both = dwt(x, h, 2)
    torch.testing.assert_close(both, torch.stack([dwt(x[i], h[i], 2) for i in range(2)]))
    torch.testing.assert_close(idwt(both, h, 2), torch.stack([idwt(both[i], h[i], 2) for i in range(2)]))


def test_what_is_lost_is_kept_in_the_residual():
    data = signals(40, 1)
    for transform, lossless in zip(every_transform(), (True, True, False, False), strict=True):
        x = data.abs() if transform.name == "NMF" else data
        found = transform_importance(net(), x, torch.zeros(40, dtype=torch.long), transform)
        assert (found.residual.abs().max() < 1e-9) == lossless, transform.name
        torch.testing.assert_close(transform.inverse(found.coefficients) + found.residual, x)
        torch.testing.assert_close(found.logit, net()(x)[:, 0])


def test_a_response_that_only_reads_the_residual_leaves_no_importance():
    """f looks along a direction PCA dropped: without the residual its value would be wrong, with it beta is zero."""
    data = signals(60, 2)
    transform = principal_components(data, 5)
    basis = transform.inverse(torch.eye(5, dtype=torch.float64)) - transform.inverse(torch.zeros(1, 5).double())
    direction = torch.linalg.svd(basis)[2][-1]
    model = nn.Sequential(nn.Linear(L, 2), nn.ReLU(), nn.Linear(2, 1)).double().requires_grad_(False)
    model[0].weight.copy_(torch.stack([direction, -direction]))
    model[0].bias.zero_()
    model[2].weight.fill_(1.0)
    model[2].bias.zero_()
    x = signals(4, 3)
    assert not torch.allclose(model(x), model(transform.inverse(transform.forward(x))))
    for method in METHODS:
        found = transform_importance(model, x, torch.zeros(4, dtype=torch.long), transform, method)
        torch.testing.assert_close(found.logit, (x @ direction).abs())
        torch.testing.assert_close(found.scores, torch.zeros_like(found.scores))


def slow_gradient(model, transform, s, residual, target):
    """Central differences of f(T^-1(s) + r), coefficient by coefficient."""
    slope = torch.zeros_like(s)
    for i in range(s.numel()):
        step = torch.zeros(s.numel(), dtype=torch.float64)
        step[i] = 1e-6
        step = step.view_as(s)
        ends = [model(transform.inverse((s + sign * step)[None]) + residual)[0, target] for sign in (1, -1)]
        slope.view(-1)[i] = (ends[0] - ends[1]) / 2e-6
    return slope


@pytest.mark.parametrize("which", range(4))
def test_gradient_methods_equal_finite_differences(which):
    transform, model = every_transform()[which], net()
    x = signals(2, 5).abs() if transform.name == "NMF" else signals(2, 5)
    targets = torch.tensor([2, 0])
    plain = transform_importance(model, x, targets, transform, "input_x_gradient")
    path = transform_importance(model, x, targets, transform, "integrated_gradients", steps=8)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    for i in range(2):
        s, r = plain.coefficients[i], plain.residual[i]
        torch.testing.assert_close(
            plain.scores[i], s * slow_gradient(model, transform, s, r, int(targets[i])), atol=1e-6, rtol=1e-5
        )
        mean = sum(
            w / 2 * slow_gradient(model, transform, (t + 1) / 2 * s, r, int(targets[i]))
            for t, w in zip(nodes, weights, strict=True)
        )
        torch.testing.assert_close(path.scores[i], s * mean, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_model_has_an_exact_answer(method):
    """f(x) = w x without a bias: the importance of s_i is s_i (w . column i of the inverse)."""
    model = nn.Linear(L, 3, bias=False).double().requires_grad_(False)
    x, targets = signals(3, 7), torch.tensor([0, 2, 1])
    for transform in every_transform():
        x = x.abs() if transform.name == "NMF" else x
        found = transform_importance(model, x, targets, transform, method)
        s = found.coefficients
        columns = torch.eye(s[0].numel(), dtype=torch.float64).unflatten(1, s.shape[1:])
        zero = transform.inverse(torch.zeros_like(s[:1]))
        effect = (transform.inverse(columns) - zero) @ model.weight[targets].T
        torch.testing.assert_close(found.scores, (s.flatten(1) * effect.T).view_as(s))


def test_integrated_gradients_sum_to_the_difference():
    """Softplus is smooth, so the quadrature is exact to rounding."""
    model = small(nn.Linear(L, 7), nn.Softplus(), nn.Linear(7, 3)).double().requires_grad_(False)
    x, targets = signals(4), torch.tensor([0, 1, 2, 0])
    for transform in every_transform():
        x = x.abs() if transform.name == "NMF" else x
        found = transform_importance(model, x, targets, transform, steps=48)
        empty = model(transform.inverse(torch.zeros_like(found.coefficients)) + found.residual)
        difference = (model(x) - empty).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(found.scores.flatten(1).sum(1), difference, atol=1e-8, rtol=1e-6)
        assert found.completeness_gap.abs().max() < 1e-7


def test_decomposition_starts_from_the_group_and_leaves_the_rest_to_gamma():
    """For pixels as coefficients it is contextual decomposition itself."""
    model = small(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)).requires_grad_(False)
    x, targets = floats(3, 1), torch.tensor([1, 0, 2])
    groups = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    pixels = Transform("pixels", lambda x: x, lambda s: s)
    found = transform_importance(model, x, targets, pixels, "contextual_decomposition", groups)
    for g, group in enumerate(groups):
        beta, _ = contextual_decomposition(model, x, group[0].expand(3, -1, -1))
        torch.testing.assert_close(found.scores[:, g], beta.gather(1, targets[:, None])[:, 0])


def test_all_coefficients_together_are_the_whole_signal():
    x, targets = signals(3), torch.tensor([0, 1, 2])
    transform = wavelet(filters("db2"), 2)
    everything = torch.ones(1, L, dtype=torch.bool)
    found = transform_importance(net(), x, targets, transform, "contextual_decomposition", everything)
    torch.testing.assert_close(found.scores[:, 0], found.logit)
    nothing = transform_importance(net(), x, targets, transform, "contextual_decomposition", ~everything)
    torch.testing.assert_close(nothing.scores[:, 0], torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
def test_batch_is_one_by_one_and_groups_are_sums_of_gradient_scores(method):
    model, x, targets = net(), signals(5), torch.tensor([0, 1, 2, 0, 1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    transform = fourier((L,))
    groups = torch.rand(3, 9, 2, generator=torch.Generator().manual_seed(1)) < 0.5
    for given in (None, groups):
        whole = transform_importance(model, x, targets, transform, method, given, rows=7).scores
        rows = zip(x.split(1), targets.split(1), strict=True)
        single = [transform_importance(model, *row, transform, method, given).scores for row in rows]
        torch.testing.assert_close(whole, torch.cat(single))
    if method != "contextual_decomposition":
        alone = transform_importance(model, x, targets, transform, method).scores
        sums = torch.stack([(alone * group).sum((1, 2)) for group in groups], 1)
        torch.testing.assert_close(whole, sums)
    assert not model.training
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_images_in_the_frequency_domain():
    model = small(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).requires_grad_(False)
    x, targets = floats(), torch.tensor([0, 1, 2])
    found = transform_importance(model, x, targets, fourier((2, 6, 6)), "integrated_gradients", steps=128)
    assert found.scores.shape == (3, 2, 6, 4, 2)
    difference = found.logit - model(torch.zeros_like(x)).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.scores.flatten(1).sum(1) - found.completeness_gap, difference)
    assert found.completeness_gap.abs().max() < 0.02 * found.scores.abs().flatten(1).sum(1).max()


def test_the_coefficient_that_matters_ranks_first():
    """A small version of the simulation; the notebook runs 100 of each."""
    table = knock_out(4, 200, 0)
    assert len(table) == len(TRANSFORMS) * len(METHODS) * 2 * 4
    shares = recovery(table)
    trained = shares[shares["network"] == "trained"]
    assert (trained["mean"] >= 0.75).all() and trained["mean"].mean() >= 0.9, trained
    assert shares.loc[shares["network"] == "untrained", "mean"].mean() < 0.5


def test_mistakes_get_one_line():
    x, targets = signals(2), torch.tensor([0, 1])
    with pytest.raises(HarmonizeError, match="did you mean 'integrated_gradients'"):
        transform_importance(net(), x, targets, fourier((L,)), "integrated_gradient")
    with pytest.raises(HarmonizeError, match=r"groups must be \(G, 9, 2\)"):
        transform_importance(net(), x, targets, fourier((L,)), groups=torch.ones(3, 9, dtype=torch.bool))
    with pytest.raises(HarmonizeError, match="3 levels need sides that 8 divides, not 12"):
        dwt(torch.zeros(1, 12), filters("haar"), 3)
    with pytest.raises(HarmonizeError, match="not negative"):
        nonnegative_factors(signals(9), 2)
