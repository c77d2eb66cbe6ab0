"""Gradient methods against slow literal versions, captum, and answers known in advance."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import captum.attr
import pytest
import tiny
import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from harmonize_lib.attribution import explain, refusal
from harmonize_lib.errors import HarmonizeError
from harmonize_lib.gradients import RULES, quadrature

TARGETS = torch.tensor([0, 2, 3])


def smooth() -> nn.Module:
    """A small network whose gradient is continuous, in double precision."""
    layers = (nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.Softplus(), nn.Flatten(), nn.Linear(20, 4))
    return tiny.small(*layers).double()


def kinked(bias: bool = True) -> nn.Module:
    layers = (nn.Conv2d(2, 6, 3, bias=bias), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=bias), nn.ReLU(), nn.Flatten())
    return tiny.small(*layers, nn.Linear(20, 4, bias=bias))


def maps_of(network: nn.Module, images: Tensor, method: str, **options: Any) -> Tensor:
    return explain(network, images, TARGETS, method, torch.Generator().manual_seed(5), **options).maps


def slope(network: nn.Module, point: Tensor, target: int) -> Tensor:
    """Gradient of one logit at one point (C, H, W)."""
    point = point.clone().requires_grad_()
    network(point[None])[0, target].backward(inputs=[point])
    assert point.grad is not None
    return point.grad


def draws(count: int, images: Tensor) -> Tensor:
    """The noise the library draws for a generator seeded with 5."""
    seed = int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(5)))
    return torch.randn(count, *images.shape[1:], generator=torch.Generator().manual_seed(seed))


def noisy_copies(image: Tensor, noise: Tensor, level: float) -> Iterator[Tensor]:
    spread = level * float(image.max() - image.min())
    for draw in noise:
        yield image + spread * draw.to(image)


def test_saliency_is_the_difference_quotient() -> None:
    network, images, step = smooth(), tiny.floats().double(), 1e-6
    maps = maps_of(network, images, "saliency")
    for n, row, column in [(0, 0, 0), (1, 3, 2), (2, 5, 5)]:
        total = 0.0
        for channel in range(2):
            nudge = torch.zeros_like(images[n])
            nudge[channel, row, column] = step
            with torch.no_grad():
                high, low = (network((images[n] + sign * nudge)[None])[0, TARGETS[n]] for sign in (1, -1))
            total += abs(float(high - low) / (2 * step))
        assert float(maps[n, row, column]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(("method", "power"), [("smoothgrad", 1), ("smoothgrad_squared", 2)])
def test_smoothgrad_literal(method: str, power: int) -> None:
    network, images = smooth(), tiny.floats().double()
    want = []
    for image, target in zip(images, TARGETS.tolist(), strict=True):
        slopes = [slope(network, copy, target) ** power for copy in noisy_copies(image, draws(5, images), 0.3)]
        want.append((sum(slopes) / 5).abs().sum(0))
    found = maps_of(network, images, method, samples=5, noise=0.3, batch_size=4)
    torch.testing.assert_close(found, torch.stack(want).float())


def test_smoothgrad_without_noise_is_saliency() -> None:
    network, images = kinked(), tiny.floats()
    still = maps_of(network, images, "smoothgrad", noise=0.0, samples=2)
    torch.testing.assert_close(still, maps_of(network, images, "saliency"))


@pytest.mark.parametrize("rule", RULES)
def test_integrated_gradients_literal(rule: str) -> None:
    network, images = smooth(), tiny.floats().double()
    nodes, weights = quadrature(rule, 7)
    want = []
    for image, target in zip(images, TARGETS.tolist(), strict=True):
        slopes = [weight * slope(network, node * image, target) for node, weight in zip(nodes, weights, strict=True)]
        want.append((image * sum(slopes)).sum(0))
    options = {"steps": 7, "rule": rule, "tolerance": None}
    found = maps_of(network, images, "integrated_gradients", batch_size=5, **options)
    torch.testing.assert_close(found, torch.stack(want).float())


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        ("gausslegendre", "gausslegendre"),
        ("riemann_left", "riemann_left"),
        ("riemann_midpoint", "riemann_middle"),
        ("riemann_right", "riemann_right"),
    ],
)
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_integrated_gradients_equals_captum(name: str, rule: str, theirs: str) -> None:
    """Captum's trapezoid is left out: its weights sum to 1 - 1/n."""
    model = tiny.model(name, torch.float64)
    images, targets = tiny.shapes5()
    images, targets = images[:2], targets[:2]
    judge = captum.attr.IntegratedGradients(model)
    want = judge.attribute(model.preprocess(images), target=targets, n_steps=6, method=theirs).sum(1)
    found = explain(model, images, targets, "integrated_gradients", steps=6, rule=rule, tolerance=None).maps
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("rule", RULES)
def test_quadrature_weights_sum_to_one(rule: str) -> None:
    for steps in (2, 5, 32):
        nodes, weights = quadrature(rule, steps)
        assert float(weights.sum()) == pytest.approx(1)
        assert (nodes >= 0).all() and (nodes <= 1).all()


@pytest.mark.parametrize(
    ("rule", "steps", "error"),
    [("gausslegendre", 10, 0), ("trapezoid", 11, 0.01), ("riemann_left", 10, -0.19), ("riemann_right", 10, 0.21)],
)
def test_quadrature_of_a_cube(rule: str, steps: int, error: float) -> None:
    """Of 4 x^3 on [0, 1]: with h = 1/10 the trapezoid errs by h^2, and the one-sided sums by -+2h + h^2."""
    nodes, weights = quadrature(rule, steps)
    assert float((weights * 4 * nodes**3).sum()) - 1 == pytest.approx(error, abs=1e-12)


def test_linear_model_is_explained_exactly() -> None:
    network, images = tiny.Linear(), tiny.floats()
    want = torch.stack([(network.weight_of(t, x) * x).sum(0) for t, x in zip(TARGETS.tolist(), images, strict=True)])
    for method in ("input_x_gradient", "integrated_gradients", "deeplift"):
        torch.testing.assert_close(maps_of(network, images, method), want)
    options = {"steps": 1, "rule": "riemann_right", "tolerance": None}
    torch.testing.assert_close(maps_of(network, images, "integrated_gradients", **options), want)


def test_network_without_biases_integrates_to_input_x_gradient() -> None:
    """Hesse, Schaub-Meyer, Roth 2021: a homogeneous network's gradient is the same all along the way from zero."""
    network, images = kinked(bias=False), tiny.floats()
    result = explain(network, images, TARGETS, "integrated_gradients", steps=3, tolerance=None)
    product = explain(network, images, TARGETS, "input_x_gradient")
    torch.testing.assert_close(result.maps, product.maps)
    torch.testing.assert_close(product.maps.sum((1, 2)), product.logit)
    assert product.completeness_gap is not None and product.completeness_gap.max() < 1e-5


def test_steps_grow_only_where_the_gap_is_wide() -> None:
    network, images = kinked(), tiny.floats(3, seed=3)
    fixed = explain(network, images, TARGETS, "integrated_gradients", steps=8, tolerance=None)
    wide = torch.tensor(fixed.record["relative_gap"])
    tolerance = float(wide.sort().values[:2].mean())
    found = explain(network, images, TARGETS, "integrated_gradients", steps=8, tolerance=tolerance, max_steps=20)
    steps = torch.tensor(found.record["steps"])
    narrow = wide <= tolerance
    assert narrow.sum() == 1 and (steps[narrow] == 8).all() and set(steps[~narrow].tolist()) <= {16, 20}
    assert torch.equal(found.maps[narrow], fixed.maps[narrow])
    for i in (~narrow).nonzero().flatten().tolist():
        options = {"steps": int(steps[i]), "tolerance": None}
        alone = explain(network, images[i : i + 1], TARGETS[i : i + 1], "integrated_gradients", **options)
        torch.testing.assert_close(found.maps[i], alone.maps[0], rtol=1e-3, atol=1e-5)
        assert steps[i] == 20 or found.record["relative_gap"][i] <= tolerance
    assert fixed.record["steps"] == 8


def test_baselines() -> None:
    model = tiny.model("vgg", torch.float64)
    images, targets = (value[:2] for value in tiny.shapes5())
    x = model.preprocess(images)
    starts = {
        "mean": torch.zeros_like(x),
        "black": torch.full_like(x, -1),
        "white": torch.full_like(x, 1),
        "blur": gaussian_blur(x, [25, 25], [6.4, 6.4]),
    }
    judge = captum.attr.IntegratedGradients(model)
    options = {"steps": 4, "tolerance": None}
    for name, start in starts.items():
        want = judge.attribute(x, start, target=targets, n_steps=4).sum(1)
        result = explain(model, images, targets, "integrated_gradients", baseline=name, **options)
        assert (result.maps - want).abs().max() <= 1e-5 * want.abs().max()
        assert result.record["baseline"] == name
        complete = explain(model, images, targets, "deeplift", baseline=name)
        with torch.no_grad():
            difference = (model(x) - model(start))[torch.arange(2), targets]
        torch.testing.assert_close(complete.maps.sum((1, 2)).double(), difference, rtol=1e-4, atol=1e-4)
    gray = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    given = explain(model, images, targets, "integrated_gradients", baseline=gray, **options)
    white = explain(model, images, targets, "integrated_gradients", baseline="white", **options)
    torch.testing.assert_close(given.maps, white.maps)
    assert given.record["options"]["baseline"]["shape"] == [3, 64, 64]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"baseline": "balck"}, "did you mean 'black'"),
        ({"baseline": "black"}, "needs a model with preprocess"),
        ({"baseline": torch.zeros(3, 6, 6)}, "one image"),
        ({"rule": "simpson"}, "unknown rule"),
        ({"rule": "trapezoid", "steps": 1}, "at least 2"),
        ({"steps": 0}, "steps"),
        ({"tolerance": -0.1}, "tolerance"),
    ],
)
def test_integrated_gradients_refuses(options: dict[str, Any], line: str) -> None:
    with pytest.raises(HarmonizeError, match=line):
        maps_of(tiny.Linear(), tiny.floats(), "integrated_gradients", **options)


def test_integrated_gradients_smoothgrad_literal() -> None:
    network, images = smooth(), tiny.floats().double()
    start = tiny.floats(1, seed=9)[0].double()
    nodes, weights = quadrature("gausslegendre", 3)
    options = {"samples": 4, "steps": 3, "noise": 0.2, "baseline": start}
    result = explain(
        network,
        images,
        TARGETS,
        "integrated_gradients_smoothgrad",
        torch.Generator().manual_seed(5),
        batch_size=7,
        **options,
    )
    for n, target in enumerate(TARGETS.tolist()):
        total, ends = torch.zeros_like(start), 0.0
        for copy in noisy_copies(images[n], draws(4, images), 0.2):
            for node, weight in zip(nodes, weights, strict=True):
                total += weight * (copy - start) * slope(network, start + node * (copy - start), target) / 4
            ends += network(copy[None])[0, target].item() / 4
        torch.testing.assert_close(result.maps[n], total.sum(0).float())
        missing = float(total.sum()) - ends + network(start[None])[0, target].item()
        assert result.completeness_gap is not None
        assert float(result.completeness_gap[n]) == pytest.approx(abs(missing), abs=1e-5)


def test_expected_gradients_of_a_linear_model_is_exact() -> None:
    """phi = w (x - mean of the references) once every reference is drawn equally often, whatever the positions."""
    network, images, references = tiny.Linear(), tiny.floats(), tiny.floats(8, seed=4)
    result = explain(network, images, TARGETS, "expected_gradients", references=references, samples=16)
    for n, target in enumerate(TARGETS.tolist()):
        want = (network.weight_of(target, images) * (images[n] - references.mean(0))).sum(0)
        torch.testing.assert_close(result.maps[n], want, rtol=1e-4, atol=1e-5)
    assert result.completeness_gap is not None and result.completeness_gap.max() < 1e-4
    assert result.record["options"]["references"]["shape"] == [8, 2, 6, 6]


def test_expected_gradients_converges_to_integrated_gradients_over_references() -> None:
    network, images, references = smooth(), tiny.floats().double(), tiny.floats(4, seed=4).double()
    paths = [
        maps_of(network, images, "integrated_gradients", baseline=reference, steps=24, tolerance=None)
        for reference in references
    ]
    want = torch.stack(paths).mean(0)
    errors = [
        float((maps_of(network, images, "expected_gradients", references=references, samples=n) - want).norm())
        for n in (8, 512)
    ]
    assert errors[1] < 0.1 * errors[0] and errors[1] < 0.02 * float(want.norm())


def test_expected_gradients_wants_references() -> None:
    with pytest.raises(HarmonizeError, match="pass references="):
        maps_of(tiny.Linear(), tiny.floats(), "expected_gradients")
    with pytest.raises(HarmonizeError, match="references must be images"):
        maps_of(tiny.Linear(), tiny.floats(), "expected_gradients", references=tiny.floats(4, side=5))


def test_expected_gradients_has_default_references_on_the_embedded_set() -> None:
    from harmonize_lib.data import load_dataset

    model = tiny.model("vgg")
    images, targets = tiny.shapes5()
    default = explain(model, images, targets, "expected_gradients", samples=3)
    training = load_dataset("shapes-on-scenes", "train", 100).images
    given = explain(model, images, targets, "expected_gradients", samples=3, references=training)
    assert torch.equal(default.maps, given.maps)
    assert "shapes-on-scenes" in default.record["options"]["references"]


@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_guided_backprop_equals_captum(name: str) -> None:
    model = tiny.model(name)
    images, targets = tiny.shapes5()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = captum.attr.GuidedBackprop(model).attribute(model.preprocess(images), target=targets)
    found = explain(model, images, targets, "guided_backprop")
    torch.testing.assert_close(found.maps, want.abs().sum(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_guided_backprop_literal_for_relu6(inplace: bool) -> None:
    """y = V relu6(W x): the gradient passes a unit that is between 0 and 6 and whose gradient is positive."""
    first, last = (nn.Linear(12, 40), nn.Linear(40, 4))
    network = tiny.small(nn.Flatten(), first, nn.ReLU6(inplace=inplace), last)
    images = 4 * tiny.floats(3, 3, 2)
    found = maps_of(network, images, "guided_backprop", reduction="sum")
    saturated = 0
    for n, target in enumerate(TARGETS.tolist()):
        hidden = first.weight @ images[n].flatten() + first.bias
        total = torch.zeros(12)
        for unit in range(40):
            saturated += int(hidden[unit] >= 6)
            if 0 < hidden[unit] < 6 and last.weight[target, unit] > 0:
                total += last.weight[target, unit] * first.weight[unit]
        torch.testing.assert_close(found[n], total.detach().view(3, 2, 2).sum(0))
    assert saturated > 0


class Functional(nn.Module):
    """A ReLU network whose second activation is a function, not a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)
        self.last, self.function = nn.Linear(5, 10), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.second(self.act(self.first(x)))).mean((2, 3)))


@pytest.mark.parametrize("function", [torch.relu, torch.sigmoid, nn.functional.gelu, lambda x: x.clamp(min=0)])
def test_activations_outside_modules_are_refused(function: Any) -> None:
    model = tiny.wrap(Functional(function))
    for method in ("guided_backprop", "deeplift"):
        assert "outside its modules" in str(refusal(model, method))
        with pytest.raises(HarmonizeError, match="outside its modules"):
            explain(model, *tiny.shapes5(), method)


def test_functions_that_are_affine_are_fine() -> None:
    model = tiny.wrap(Functional(lambda x: 2 * x + 1))
    assert refusal(model, "guided_backprop") is None and refusal(model, "deeplift") is None


class Gate(nn.Module):
    """Squeeze and excitation: a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.squeeze, self.gate = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Linear(6, 6), nn.Sigmoid()
        self.last = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        return self.last((x * self.gate(self.squeeze(x.mean((2, 3))))[:, :, None, None]).mean((2, 3)))


def test_deeplift_refuses_products_of_activations() -> None:
    assert "outside its modules: mul" in str(refusal(tiny.wrap(Gate()), "deeplift"))
    network = tiny.settle(Gate()).eval()
    images, targets = tiny.shapes5()
    with pytest.raises(HarmonizeError, match="outside its modules: mul"):
        explain(network, images.float() / 255, targets, "deeplift")


class Sorted(nn.Module):
    """An operation the graph check does not know by name."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(72, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.flatten(1).sort(1).values)


def test_deeplift_checks_what_it_promises() -> None:
    with pytest.raises(HarmonizeError, match="misses"):
        maps_of(tiny.settle(Sorted()).eval(), tiny.floats(), "deeplift", baseline=tiny.floats(1, seed=8)[0])


def test_deeplift_refuses_activations_in_place() -> None:
    network = tiny.small(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 4))
    with pytest.raises(HarmonizeError, match="in place"):
        maps_of(network, tiny.floats(), "deeplift")


def test_deeplift_equals_captum_without_max_pooling() -> None:
    layers = (nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 5, 1), nn.Sigmoid())
    network = tiny.small(*layers, nn.Flatten(), nn.Linear(20, 4)).double()
    images, start = tiny.floats().double(), tiny.floats(1, seed=8).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = captum.attr.DeepLift(network).attribute(images, start.expand_as(images), target=TARGETS)
    found = maps_of(network, images, "deeplift", baseline=start[0])
    torch.testing.assert_close(found, want.detach().sum(1).float())


def literal_max_pool(values: Tensor, before: Tensor, multipliers: Tensor, size: int, stride: int) -> Tensor:
    """Contributions (C, H, W) of the inputs of a max pooling, window by window, from multipliers of its outputs."""
    contributions = torch.zeros_like(values)
    for c, row, column in torch.cartesian_prod(*(torch.arange(n) for n in multipliers.shape)).tolist():
        window = slice(row * stride, row * stride + size), slice(column * stride, column * stride + size)
        now, then = values[c][window], before[c][window]
        top = torch.maximum(now.max(), then.max())
        place, place0 = (
            (window[0].start + int(part.argmax()) // size, window[1].start + int(part.argmax()) % size)
            for part in (now, then)
        )
        contributions[c][place] += multipliers[c, row, column] * (top - then.max())
        contributions[c][place0] += multipliers[c, row, column] * (now.max() - top)
    return contributions


@pytest.mark.parametrize(("size", "stride"), [(2, 2), (3, 1)])
def test_deeplift_literal_through_max_pooling(size: int, stride: int) -> None:
    side = (6 - size) // stride + 1
    head = nn.Linear(2 * side * side, 4)
    network = tiny.small(nn.MaxPool2d(size, stride), nn.Flatten(), head).double()
    images, start = tiny.floats().double(), tiny.floats(1, seed=8)[0].double()
    result = explain(network, images, TARGETS, "deeplift", baseline=start)
    for n, target in enumerate(TARGETS.tolist()):
        multipliers = head.weight[target].detach().view(2, side, side)
        want = literal_max_pool(images[n], start, multipliers, size, stride)
        torch.testing.assert_close(result.maps[n], want.sum(0).float())
    assert max(result.record["relative_gap"]) < 1e-9


class Twice(nn.Module):
    """One ReLU module, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 5, 3), nn.ReLU()
        self.last = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.second(self.act(self.first(x)))).flatten(1))


def test_a_module_called_twice_is_told_apart() -> None:
    once = kinked().double()
    twice = Twice().double().eval()
    for name, index in (("first", 0), ("second", 2), ("last", 5)):
        getattr(twice, name).load_state_dict(once[index].state_dict())
    images = tiny.floats().double()
    for method in ("deeplift", "guided_backprop"):
        torch.testing.assert_close(maps_of(twice, images, method), maps_of(once, images, method))
