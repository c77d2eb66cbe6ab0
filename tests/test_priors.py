"""Attribution priors against literal loops, finite differences and exact attributions; the model is left as found."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import GradientShap
from tiny import floats, model, settle, shapes5
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from harmonize_lib import (
    HarmonizeError,
    consensus_prior,
    expected_gradients_penalty,
    graph_prior,
    pixel_prior,
    sparsity_prior,
    training_attributions,
)
from harmonize_lib.double_backward import DoubleBackward
from harmonize_lib.models import ARCHITECTURES
from harmonize_lib.operations import Operations
from harmonize_lib.priors import METHODS


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ring(features: int) -> Tensor:
    """Weighted edges of a ring, self-loops that should not matter."""
    weights = torch.zeros(features, features, dtype=torch.float64)
    for i in range(features):
        weights[i, (i + 1) % features] += 0.5 + i
        weights[(i + 1) % features, i] += 0.5 + i
    return weights + 7 * torch.eye(features, dtype=torch.float64)


def tabular(features: int = 5, outputs: int = 1) -> nn.Module:
    return settle(nn.Sequential(nn.Linear(features, 7), nn.Tanh(), nn.Linear(7, outputs))).double()


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.Dropout(0.5)]
    layers += [nn.Conv2d(4, 4, (3, 2), stride=2, padding=1, groups=2, bias=False), nn.Softplus()]
    return settle(nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 4))).double()


class Attention(nn.Module):
    """One block with scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.head = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2).reshape(len(x), -1, 4)
        q, k, v = self.qkv(self.norm(tokens)).chunk(3, -1)
        return self.head((tokens + nn.functional.scaled_dot_product_attention(q, k, v)).mean(1))


# The formulas, literally


def slow_pixel(maps: Tensor) -> float:
    total = 0.0
    for a in maps.tolist():
        flat = [v for row in a for v in row]
        mean = sum(flat) / len(flat)
        std = math.sqrt(sum((v - mean) ** 2 for v in flat) / len(flat))
        u = [[(v - mean) / std if std else 0.0 for v in row] for row in a]
        for i, j in itertools.product(range(len(u)), range(len(u[0]))):
            total += abs(u[i + 1][j] - u[i][j]) if i + 1 < len(u) else 0.0
            total += abs(u[i][j + 1] - u[i][j]) if j + 1 < len(u[0]) else 0.0
    return total / len(maps)


def slow_graph(attributions: Tensor, weights: Tensor) -> float:
    p = [sum(abs(v) for v in column) / len(column) for column in attributions.T.tolist()]
    pairs = itertools.product(range(len(p)), repeat=2)
    return sum(float(weights[i, j]) * (p[i] - p[j]) ** 2 for i, j in pairs) / 2


def slow_gini(attributions: Tensor) -> float:
    p = [sum(abs(v) for v in column) / len(column) for column in attributions.flatten(1).T.tolist()]
    return sum(abs(a - b) for a in p for b in p) / (2 * len(p) * sum(p))


def test_pixel_prior_equals_loops_and_ignores_scale():
    attributions = floats(3, channels=2, side=5).double()
    attributions[1] = 0.25
    literal = slow_pixel(attributions.sum(1))
    assert float(pixel_prior(attributions)) == pytest.approx(literal, rel=1e-12)
    assert float(pixel_prior(attributions.sum(1))) == pytest.approx(literal, rel=1e-12)
    assert float(pixel_prior(1e-3 * attributions)) == pytest.approx(literal, rel=1e-6)
    assert float(pixel_prior(attributions + 5)) == pytest.approx(literal, rel=1e-9)


def test_pixel_prior_known_answers():
    half = torch.zeros(1, 4, 4)
    half[:, 2:] = 1  # one edge of 4 pixels, between -1 and 1
    assert float(pixel_prior(half)) == pytest.approx(8)
    board = (torch.arange(4)[:, None] + torch.arange(4)) % 2  # 24 neighbors, all between -1 and 1
    assert float(pixel_prior(board[None].float())) == pytest.approx(48)
    assert float(pixel_prior(torch.stack([half[0], board.float()]))) == pytest.approx(28)


def test_constant_maps_have_finite_gradients():
    attributions = torch.full((2, 1, 4, 4), 0.5, requires_grad=True)
    (pixel_prior(attributions) + consensus_prior(attributions, torch.rand(2, 4, 4, generator=seeded()))).backward()
    assert attributions.grad.isfinite().all()
    nothing = torch.zeros(2, 5, requires_grad=True)
    (sparsity_prior(nothing) + graph_prior(nothing, ring(5))).backward()
    assert nothing.grad.isfinite().all()
    assert sparsity_prior(nothing).item() == 0


def test_graph_prior_equals_loops_dense_and_sparse():
    attributions = floats(4, 1, 3)[:, 0, 0].double()
    attributions = torch.cat([attributions, -2 * attributions], 1)
    weights = ring(6)
    assert float(graph_prior(attributions, weights)) == pytest.approx(slow_graph(attributions, weights), rel=1e-12)
    assert float(graph_prior(attributions, weights.to_sparse())) == pytest.approx(slow_graph(attributions, weights))
    laplacian = weights.sum(1).diag() - weights
    p = attributions.abs().mean(0)
    assert float(graph_prior(attributions, weights)) == pytest.approx(float(p @ laplacian @ p), rel=1e-12)
    assert float(graph_prior(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.ones(2, 2))) == 0
    assert float(graph_prior(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0], [2.0, 0.0]]))) == 18


def test_sparsity_prior_is_minus_gini():
    attributions = floats(4, 2, 3).double()
    assert float(sparsity_prior(attributions)) == pytest.approx(-slow_gini(attributions), rel=1e-12)
    assert float(sparsity_prior(3 * attributions)) == pytest.approx(-slow_gini(attributions), rel=1e-12)
    p = attributions.flatten(1).abs().mean(0)
    code = 0.5 * (p[:, None] - p).abs().mean() / p.mean()
    assert float(sparsity_prior(attributions)) == pytest.approx(-float(code), rel=1e-12)
    assert float(sparsity_prior(torch.ones(2, 5))) == pytest.approx(0, abs=1e-6)
    assert float(sparsity_prior(torch.tensor([[0.0, 0.0, 0.0, 9.0]]))) == pytest.approx(-3 / 4)


def test_consensus_prior_is_one_minus_pearson():
    attributions, target = floats(3, 2, 4).double(), floats(3, 1, 4, seed=1)[:, 0].double()
    pearson = [np.corrcoef(a.flatten(), t.flatten())[0, 1] for a, t in zip(attributions.sum(1), target, strict=True)]
    assert float(consensus_prior(attributions, target)) == pytest.approx(1 - np.mean(pearson), rel=1e-12)
    u, v = (
        (m - m.mean((1, 2), True)) / m.std((1, 2), correction=0, keepdim=True) for m in (attributions.sum(1), target)
    )
    assert float(consensus_prior(attributions, target)) == pytest.approx(float((u - v).square().mean()) / 2, rel=1e-12)
    assert float(consensus_prior(2 * target + 1, target)) == pytest.approx(0, abs=1e-12)
    assert float(consensus_prior(-target, target)) == pytest.approx(2)
    assert float(consensus_prior(attributions, torch.ones(3, 4, 4))) == pytest.approx(1)
    coarse, wanted = (m.reshape(3, 2, 2, 2, 2).mean((2, 4)) for m in (attributions.sum(1), target))
    pearson = [np.corrcoef(a.flatten(), t.flatten())[0, 1] for a, t in zip(coarse, wanted, strict=True)]
    assert float(consensus_prior(attributions, target, patch=2)) == pytest.approx(1 - np.mean(pearson), rel=1e-12)


PRIORS = {
    "pixel": (convolutional, (3, 2, 6, 6), 4, pixel_prior),
    "graph": (tabular, (4, 5), None, partial(graph_prior, adjacency=ring(5))),
    "sparsity": (partial(tabular, outputs=3), (4, 5), 3, sparsity_prior),
    "consensus": (
        convolutional,
        (3, 2, 6, 6),
        4,
        partial(consensus_prior, consensus=floats(3, 1, 6, seed=5)[:, 0].double()),
    ),
    "attention": (lambda: settle(Attention()).double(), (3, 2, 4, 4), 3, pixel_prior),
}


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_the_penalty_are_right(name, method):
    """Backward through the attributions equals finite differences of the penalty, for every parameter."""
    build, shape, classes, prior = PRIORS[name]
    network = build()
    x = torch.randn(shape, generator=seeded(1), dtype=torch.float64)
    y = None if classes is None else torch.arange(len(x)) % classes
    references = torch.randn((1, *shape[1:]), generator=seeded(2), dtype=torch.float64)
    names = [key for key, _ in network.named_parameters()]

    class Bound(nn.Module):
        def __init__(self, values: tuple[Tensor, ...]) -> None:
            super().__init__()
            self.values = dict(zip(names, values, strict=True))

        def forward(self, rows: Tensor) -> Tensor:
            return functional_call(network.eval(), self.values, (rows,))

    def penalty(*values: Tensor) -> Tensor:
        return expected_gradients_penalty(Bound(values), x, y, references, prior, 2, method, seeded(3))

    values = tuple(value.detach().clone().requires_grad_() for value in network.parameters())
    assert torch.autograd.gradcheck(penalty, values, eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=len(shape) == 4)


def test_one_backward_trains_on_loss_and_prior():
    network, x, y = convolutional().eval(), floats(4).double(), torch.arange(4)
    parameters = list(network.parameters())

    def loss() -> Tensor:
        return nn.functional.cross_entropy(network(x), y)

    def penalty() -> Tensor:
        return expected_gradients_penalty(network, x, y, None, pixel_prior, generator=seeded())

    (loss() + 0.3 * penalty()).backward()
    separate = [torch.autograd.grad(part(), parameters, allow_unused=True) for part in (loss, penalty)]
    for parameter, of_loss, of_penalty in zip(parameters, *separate, strict=True):
        expected = of_loss if of_penalty is None else of_loss + 0.3 * of_penalty
        torch.testing.assert_close(parameter.grad, expected)


# Expected gradients


@pytest.mark.parametrize("roll", [False, True])
@pytest.mark.parametrize("outputs", [1, 3])
def test_training_estimator_equals_loops(roll, outputs):
    network = tabular(outputs=outputs)
    x = torch.randn(4, 5, generator=seeded(1), dtype=torch.float64)
    references = None if roll else torch.randn(6, 5, generator=seeded(2), dtype=torch.float64)
    y = None if outputs == 1 else torch.tensor([2, 0, 1, 2])
    got = training_attributions(network, x, y, references, 3, generator=seeded(7))
    draws = seeded(7)
    chosen = None if roll else torch.randint(6, (3, 4), generator=draws)
    places = torch.rand(3, 4, generator=draws, dtype=torch.float64)
    for row in range(4):
        total = torch.zeros(5, dtype=torch.float64)
        for draw in range(3):
            reference = x[(row - draw - 1) % 4] if roll else references[chosen[draw, row]]
            at = (reference + places[draw, row] * (x[row] - reference)).requires_grad_()
            output = network(at[None])[0, 0 if y is None else y[row]]
            total += (x[row] - reference) * torch.autograd.grad(output, at)[0]
        torch.testing.assert_close(got[row], total / 3)


def average_of_integrals(network: nn.Module, x: Tensor, references: Tensor, nodes: int = 64) -> Tensor:
    """Integrated gradients from every reference in turn, by Gauss-Legendre, averaged."""
    places, weights = np.polynomial.legendre.leggauss(nodes)
    total = torch.zeros_like(x)
    for reference in references:
        for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
            at = (reference + place * (x - reference)).requires_grad_()
            total += weight * (x - reference) * torch.autograd.grad(network(at).sum(), at)[0] / len(references)
    return total


def shapley(network: nn.Module, x: Tensor, references: Tensor) -> Tensor:
    """Interventional Shapley values over all coalitions, averaged over references."""
    count = x.shape[1]
    values = torch.zeros_like(x)
    for feature in range(count):
        others = [i for i in range(count) if i != feature]
        for size in range(count):
            weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
            for coalition in itertools.combinations(others, size):
                for reference in references:
                    without, using = reference.expand_as(x).clone(), reference.expand_as(x).clone()
                    without[:, list(coalition)] = x[:, list(coalition)]
                    using[:, [*coalition, feature]] = x[:, [*coalition, feature]]
                    values[:, feature] += weight * (network(using) - network(without)).flatten() / len(references)
    return values.detach()


class Quadratic(nn.Module):
    """x^T A x + b x: interactions of two features, which the straight path and Shapley split alike."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 4, generator=seeded(3), dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(4, generator=seeded(4), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,ij,nj->n", x, self.a, x) + x @ self.b


@pytest.mark.parametrize(
    ("network", "oracle"),
    [
        (settle(nn.Linear(4, 1)).double(), shapley),
        (Quadratic(), shapley),
        (settle(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))).double(), average_of_integrals),
        (settle(nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 1))).double(), average_of_integrals),
    ],
    ids=["linear", "quadratic", "tanh", "softplus"],
)
def test_expectation_is_exact_for_one_draw_and_many(network, oracle):
    x = torch.randn(2, 4, generator=seeded(1), dtype=torch.float64)
    references = torch.randn(3, 4, generator=seeded(2), dtype=torch.float64)
    exact = oracle(network, x, references)
    expected_sum = network(x).flatten() - network(references).mean()
    torch.testing.assert_close(exact.sum(1), expected_sum.detach())
    spread = {}
    for samples in (1, 4):
        copies = x.repeat_interleave(4000, 0)
        draws = training_attributions(network, copies, None, references, samples, generator=seeded(samples)).detach()
        draws = draws.view(2, 4000, 4)
        error = draws.std(1) / 4000**0.5
        assert ((draws.mean(1) - exact).abs() <= 4 * error + 1e-12).all()
        spread[samples] = draws.var(1)
    ratio = spread[1].sum() / spread[4].sum()
    assert 3.6 < ratio < 4.4  # independent draws: the variance falls as 1/k


def test_equals_gradient_shap_in_expectation():
    network = tabular(4, outputs=3)
    x = torch.randn(3, 4, generator=seeded(1), dtype=torch.float64)
    y = torch.tensor([0, 2, 1])
    references = torch.randn(5, 4, generator=seeded(2), dtype=torch.float64)
    runs = 400
    state = np.random.get_state()  # noqa: NPY002 - captum draws from the global generators
    try:
        np.random.seed(0)  # noqa: NPY002
        with torch.random.fork_rng():
            torch.manual_seed(0)
            shap = GradientShap(network)
            theirs = torch.stack([shap.attribute(x, references, 8, stdevs=0.0, target=y) for _ in range(runs)])
    finally:
        np.random.set_state(state)  # noqa: NPY002
    draws = seeded(3)
    ours = [training_attributions(network, x, y, references, 8, generator=draws).detach() for _ in range(runs)]
    ours = torch.stack(ours)
    error = ((theirs.var(0) + ours.var(0)) / runs).sqrt()
    assert ((theirs.mean(0) - ours.mean(0)).abs() <= 3 * error).all()


def test_other_methods_known_answers():
    network = settle(nn.Linear(5, 3)).double()
    x = torch.randn(4, 5, generator=seeded(), dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0])
    weight = network.weight[y].detach()
    torch.testing.assert_close(training_attributions(network, x, y, method="gradients").detach(), weight)
    torch.testing.assert_close(training_attributions(network, x, y, method="input_x_gradient").detach(), x * weight)
    start = torch.randn(1, 5, generator=seeded(1), dtype=torch.float64)
    got = training_attributions(network, x, y, start, 3, "integrated_gradients").detach()
    torch.testing.assert_close(got, (x - start) * weight)
    square = Quadratic()
    rows, start = x[:, :4], start[:, :4]
    for samples, places in ((1, [1.0]), (3, [1.0, 0.5, 0.0])):
        want = 0.0
        for place in places:
            at = start + place * (rows - start)
            want = want + (rows - start) * (at @ (square.a + square.a.T) + square.b) / samples
        got = training_attributions(square, rows, None, start, samples, "integrated_gradients")
        torch.testing.assert_close(got, want)


# Invariants


def test_model_and_data_are_left_as_found():
    network = convolutional().train()
    network[0].eval()
    network[7].bias.requires_grad_(False)
    x, y = floats(4).double(), torch.arange(4)
    parameters = [parameter.requires_grad for parameter in network.parameters()]
    flags = [module.training for module in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    before, everything = x.clone(), torch.random.get_rng_state()
    twice = [expected_gradients_penalty(network, x, y, None, pixel_prior, 2, generator=seeded()) for _ in range(2)]
    assert torch.equal(*twice)  # dropout is off
    assert [module.training for module in network.modules()] == flags
    assert [parameter.requires_grad for parameter in network.parameters()] == parameters
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert torch.equal(x, before) and not x.requires_grad
    assert torch.equal(torch.random.get_rng_state(), everything)
    with pytest.raises(HarmonizeError):
        training_attributions(network, x, y + 1, None, generator=seeded())
    assert [module.training for module in network.modules()] == flags


def test_generator_repeats_and_each_step_draws_anew():
    network, x = tabular(), torch.randn(6, 5, generator=seeded(1), dtype=torch.float64)
    for references in (None, x[:3]):
        generator = seeded(4)
        first, second = (training_attributions(network, x, None, references, generator=generator) for _ in range(2))
        again = training_attributions(network, x, None, references, generator=seeded(4))
        assert torch.equal(first, again)
        assert not torch.equal(first, second)
    unseeded = [training_attributions(network, x, None, None) for _ in range(2)]
    assert not torch.equal(*unseeded)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_the_slopes_of_plain_autograd(architecture):
    network = model(architecture, torch.float64)
    images, labels = shapes5()
    x = network.preprocess(images).double()
    trainable = {name: value.requires_grad for name, value in network.named_parameters()}
    network.requires_grad_(True)
    try:
        parameters = list(network.parameters())
        penalty = expected_gradients_penalty(network, x, labels, None, pixel_prior, generator=seeded())
        slopes = torch.autograd.grad(penalty, parameters, allow_unused=True)
        place = torch.rand(1, 5, generator=seeded(), dtype=torch.float64).view(5, 1, 1, 1)
        at = (x.roll(1, 0) + place * (x - x.roll(1, 0))).requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            score = network(at).gather(1, labels[:, None]).sum()
            (slope,) = torch.autograd.grad(score, at, create_graph=True)
            plain = torch.autograd.grad(pixel_prior((x - x.roll(1, 0)) * slope), parameters, allow_unused=True)
    finally:
        for name, value in network.named_parameters():
            value.requires_grad_(trainable[name])
    for parameter, ours, theirs in zip(parameters, slopes, plain, strict=True):
        nothing = torch.zeros_like(parameter)
        ours, theirs = nothing if ours is None else ours, nothing if theirs is None else theirs
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9 * max(float(theirs.abs().max()), 1))
        if parameter.ndim > 1:  # biases of ReLU networks have no slope
            assert ours.abs().max() > 0


def test_layers_for_double_backward_compute_the_same():
    layers = [nn.Conv2d(2, 6, 3, stride=2, dilation=2), nn.ReLU(), nn.BatchNorm2d(6)]
    layers += [nn.Conv2d(6, 6, 3, padding=4, dilation=2, groups=6), nn.Conv2d(6, 6, 3, dilation=2, groups=6)]
    layers += [nn.Conv2d(6, 6, 3, padding=(1, 3), dilation=(1, 3), groups=6), nn.MaxPool2d(3, 2, padding=1)]
    layers += [nn.Conv2d(6, 6, 3, padding="same", groups=6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(54, 3)]
    network = settle(nn.Sequential(*layers)).eval().double()
    x = torch.randn(4, 2, 15, 15, generator=seeded(), dtype=torch.float64)
    results = []
    for context in (nullcontext(), DoubleBackward()):
        with context:
            output = network(x.requires_grad_())
        results.append((output, *torch.autograd.grad(output.square().sum(), [x, *network.parameters()])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


class Block(nn.Module):
    """A dilated convolution, patches, attention and a perceptron."""

    def __init__(self):
        super().__init__()
        self.holes = nn.Conv2d(2, 4, (3, 2), padding=(3, 2), dilation=(3, 2), groups=2)
        self.cut, self.norm, self.last = nn.Conv2d(4, 6, 5, stride=5), nn.LayerNorm(6), nn.LayerNorm(6, bias=False)
        self.mix, self.up, self.down, self.head = nn.Linear(6, 18), nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.cut(self.holes(x)[..., 2:]).flatten(2).mT
        query, key, value = self.mix(self.norm(x)).unflatten(2, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.down(F.gelu(self.up(self.last(x))))
        masked = F.scaled_dot_product_attention(x, x, x, is_causal=True) + F.gelu(x, approximate="tanh")
        return self.head(F.layer_norm(masked, (6,)).mean(1))


def test_layers_of_transformers_have_the_same_first_and_second_derivatives():
    network = settle(Block()).double()
    x = torch.randn(4, 2, 15, 10, generator=seeded(), dtype=torch.float64)
    results = []
    for layers in (None, DoubleBackward()):
        at = x.clone().requires_grad_()
        with layers or nullcontext(), sdpa_kernel(SDPBackend.MATH):
            output = network(at)
            first = torch.autograd.grad(output.square().sum(), network.parameters(), retain_graph=True)
            if layers:
                layers.explaining = True
            (slope,) = torch.autograd.grad(output.pow(3).sum(), at, create_graph=True)
            if layers:
                layers.explaining = False
        second = torch.autograd.grad(slope.pow(3).sum(), [at, *network.parameters()])
        results.append((output, *first, slope, *second))
    for one, other in zip(*results, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_step_with_the_prior_computes_the_products_it_must_and_no_more():
    """By hand, per layer a product of n times in times out: forward, input gradient, and their gradients again.

    The last layer's slope is its weights, which no product gives back to anything before it.
    """
    sizes, n = (7, 11, 13, 5), 6
    layers = [part for i, o in itertools.pairwise(sizes) for part in (nn.Linear(i, o), nn.GELU())]
    network = nn.Sequential(*layers[:-1])
    first, second, last = (2 * n * i * o for i, o in itertools.pairwise(sizes))
    x, y = torch.randn(n, sizes[0], generator=seeded()), torch.arange(n) % sizes[-1]
    with Operations() as plain:
        F.cross_entropy(network(x), y).backward()
    assert plain.total == 2 * first + 3 * second + 3 * last
    with Operations() as prior:
        expected_gradients_penalty(network, x, y, None, sparsity_prior, generator=seeded()).backward()
    assert prior.total == 6 * (first + second) + 3 * last


def test_mistakes_get_one_line():
    network, x = tabular(outputs=3), torch.randn(4, 5, generator=seeded(), dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0])
    wrong = [
        (lambda: training_attributions(network, x, y, method="expected_gradient"), "did you mean 'expected_gradients'"),
        (lambda: training_attributions(network, x, y, samples=0), "samples must be a whole number of at least 1"),
        (lambda: training_attributions(network, x, y, samples=4), "minibatch of 4 cannot be rolled 4 times"),
        (lambda: training_attributions(network, x, y, x[:, :3]), r"references must be \(R, 5,\), not \(4, 3\)"),
        (lambda: training_attributions(network, x, y, x, method="integrated_gradients"), "needs one reference"),
        (lambda: training_attributions(network, x), r"outputs \(4, 3\): say by y"),
        (lambda: training_attributions(network, x, y[:2]), r"does not fit the outputs \(4, 3\)"),
        (lambda: training_attributions(network, x, y.double()), "classes are"),
        (lambda: training_attributions(network, x, y + 1), "target 3 is out of range"),
        (lambda: pixel_prior(x), r"must be \(n, C, H, W\) or \(n, H, W\), not \(4, 5\)"),
        (lambda: graph_prior(x, torch.ones(4, 4)), r"adjacency \(P, P\), not \(4, 5\) and \(4, 4\)"),
        (lambda: consensus_prior(torch.ones(2, 4, 4), torch.ones(2, 4, 5)), r"consensus must be \(2, 4, 4\)"),
        (lambda: consensus_prior(torch.ones(2, 4, 4), torch.ones(2, 4, 4), 3), "patch 3 does not divide the 4x4"),
    ]
    for call, says in wrong:
        with pytest.raises(HarmonizeError, match=says) as error:
            call()
        assert "\n" not in str(error.value) and len(str(error.value)) <= 200
