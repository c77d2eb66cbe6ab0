"""Contextual decomposition: the papers' rules, the promises of the split, and what has no rule."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from timm.layers import SqueezeExcite
from torch import Tensor, nn
from torch.nn import functional as F

from harmonize_lib import HarmonizeError, explain, list_models, load_model
from harmonize_lib.decomposition import LINEAR, VANISHING, contextual_decomposition, patch_groups, propagate
from harmonize_lib.literal_decomposition import decompose
from harmonize_lib.models import ARCHITECTURES


def box(n: int, side: int = 64) -> Tensor:
    masks = torch.zeros(n, side, side, dtype=torch.bool)
    masks[:, side // 4 : side // 2, side // 4 : side // 2 + 2] = True
    return masks


def inputs(n: int = 2, channels: int = 3, side: int = 8) -> Tensor:
    return tiny.floats(n, channels, side).double()


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.inner(x)
        return x


class Head(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


class Channels(nn.Module):
    """LayerNorm over channels, as ConvNeXt does it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Differences(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 - torch.sub(x, x.relu(), alpha=2) - 0.5


LAYERS = {
    "convolution": lambda: nn.Conv2d(3, 4, 3, padding=1, stride=2),
    "grouped": lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1),
    "batch norm": lambda: nn.BatchNorm2d(3),
    "layer norm": Channels,
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "max pooling": lambda: nn.MaxPool2d(3, 2, 1),
    "adaptive max pooling": lambda: nn.AdaptiveMaxPool2d(3),
    "average pooling": lambda: nn.AvgPool2d(2),
    "adaptive average pooling": lambda: nn.AdaptiveAvgPool2d(2),
    "dropout": nn.Dropout,
    "residual": lambda: Residual(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())),
    "squeeze-excite": lambda: SqueezeExcite(3, rd_channels=2),
    "tanh": nn.Tanh,
    "upsampling": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "differences": Differences,
}


@pytest.mark.parametrize("name", LAYERS)
def test_each_rule_is_the_literal_one(name: str) -> None:
    network = tiny.small(nn.Conv2d(3, 3, 3, padding=1), LAYERS[name](), Head()).double()
    masks = box(2, 8)
    beta, gamma = contextual_decomposition(network, inputs(), masks)
    want = decompose(network, inputs(), masks)
    torch.testing.assert_close(beta, want[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gamma, want[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(beta + gamma, network(inputs()), rtol=1e-9, atol=1e-12)
    assert beta.abs().min() > 0 and gamma.abs().min() > 0


def test_convolution_relu_and_pooling_by_hand() -> None:
    """Element by element, from the formulas of ACD (equations 5 to 11)."""
    convolution = tiny.settle(nn.Conv2d(1, 1, 2)).double()
    network = nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()).eval()
    x, mask = inputs(1, 1, 3), torch.tensor([[[True, True, False]] * 3])
    weight, bias = convolution.weight[0, 0].detach(), float(convolution.bias.detach())
    best, want = -1.0, (0.0, 0.0)
    for row in range(2):
        for column in range(2):
            own = rest = 0.0
            for i in range(2):
                for j in range(2):
                    value = float(weight[i, j] * x[0, 0, row + i, column + j])
                    own, rest = (own + value, rest) if column + j < 2 else (own, rest + value)
            ratio = abs(own) / (abs(own) + abs(rest))
            own, rest = own + ratio * bias, rest + (1 - ratio) * bias
            beta = max(own, 0.0)
            gamma = max(own + rest, 0.0) - beta
            if beta + gamma > best:
                best, want = beta + gamma, (beta, gamma)
    beta, gamma = contextual_decomposition(network, x, mask)
    assert best > 0
    assert (float(beta.detach()), float(gamma.detach())) == pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gamma_is_what_propagating_it_apart_gives(name: str) -> None:
    model = tiny.model(name, torch.float64)
    images, _ = tiny.shapes5()
    images, masks = images[:2], box(2)
    with torch.no_grad():
        beta, gamma = contextual_decomposition(model, images, masks)
        want_beta, want_gamma = decompose(model, model.preprocess(images).double(), masks)
    scale = float((want_beta + want_gamma).abs().max())
    torch.testing.assert_close(beta, want_beta, rtol=1e-6, atol=1e-7 * scale)
    torch.testing.assert_close(gamma, want_gamma, rtol=1e-6, atol=1e-7 * scale)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trained_parts_carried_apart_sum_to_the_logits(name: str) -> None:
    """In double precision: near 0/0 rounding alone moves a bias from one part to the other."""
    if f"{name}-obj" not in list_models():
        pytest.skip(f"{name}-obj is not in the zoo")
    model = copy.deepcopy(load_model(f"{name}-obj")).double()
    images, _ = tiny.shapes5()
    x = model.preprocess(images)
    with torch.no_grad():
        logits = model(x)
        beta, _ = contextual_decomposition(model, images, box(5))
        _, gamma = decompose(model, x, box(5))
    scale = logits.abs().amax(1, keepdim=True)
    assert ((beta + gamma - logits).abs() <= 1e-4 * scale).all()
    assert (gamma.abs().amax(1) > 1e-3 * scale[:, 0]).all()


@pytest.mark.parametrize("name", [*ARCHITECTURES, *(f"{name}-obj" for name in ARCHITECTURES)])
def test_parts_sum_to_the_logits_and_nothing_comes_of_nothing(name: str) -> None:
    if "-obj" in name and name not in list_models():
        pytest.skip(f"{name} is not in the zoo")
    model = load_model(name) if "-obj" in name else tiny.model(name)
    images, _ = tiny.shapes5()
    with torch.no_grad():
        logits = model(model.preprocess(images))
        scale = logits.abs().amax(1, keepdim=True)
        beta, gamma = contextual_decomposition(model, images, box(5))
        assert ((beta + gamma - logits).abs() <= 1e-4 * scale).all()
        assert (beta.abs().amax(1) > 1e-3 * scale[:, 0]).all() and (gamma.abs().amax(1) > 1e-3 * scale[:, 0]).all()
        beta, gamma = contextual_decomposition(model, images, torch.ones(5, 64, 64, dtype=torch.bool))
        assert ((beta - logits).abs() <= 1e-4 * scale).all() and not gamma.any()
        beta, gamma = contextual_decomposition(model, images, torch.zeros(5, 64, 64, dtype=torch.bool))
        assert ((gamma - logits).abs() <= 1e-4 * scale).all() and not beta.any()


def test_linear_network_gives_the_exact_contribution() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 5, bias=False))
    tiny.settle(network).double().eval()
    x, masks = inputs(), box(2, 8)
    beta, gamma = contextual_decomposition(network, x, masks)
    torch.testing.assert_close(beta, network(x * masks[:, None]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gamma, network(x * ~masks[:, None]), rtol=1e-12, atol=1e-12)


def test_batch_is_one_by_one_and_groups_of_an_image_together() -> None:
    model = tiny.model("swin", torch.float64)
    images, targets = tiny.shapes5()
    groups = patch_groups(64, 64, 32)
    with torch.no_grad():
        alone = [[contextual_decomposition(model, images[i : i + 1], g[None])[0][0] for g in groups] for i in (0, 1)]
        repeated = images[:2].repeat_interleave(4, 0)
        together, _ = contextual_decomposition(model, repeated, groups.repeat(2, 1, 1))
    alone = torch.stack([value for values in alone for value in values])
    torch.testing.assert_close(together, alone, rtol=1e-8, atol=1e-10)
    maps = explain(model, images[:2], targets[:2], "contextual_decomposition", patch=32, batch_size=3).maps
    want = alone.view(2, 4, 10)[torch.arange(2), :, targets[:2]].view(2, 2, 2).float()
    torch.testing.assert_close(maps, want.repeat_interleave(32, 1).repeat_interleave(32, 2), rtol=1e-5, atol=1e-6)


def test_patches_tile_the_image() -> None:
    groups = patch_groups(5, 7, 3)
    assert groups.shape == (6, 5, 7)
    assert (groups.sum(0) == 1).all()
    assert groups.sum((1, 2)).tolist() == [9, 9, 3, 6, 6, 2]


def test_gradients_reach_the_parameters() -> None:
    network = tiny.small(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.GELU(), nn.MaxPool2d(2), nn.Flatten()).double()
    network.append(tiny.settle(nn.Linear(2, 2)).double())
    x, masks = inputs(2, 1, 4), box(2, 4)

    def parts(weight: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        values = {"0.weight": weight, "0.bias": bias, "1.weight": scale}
        wrapped = Functional(network, values)
        return propagate(wrapped, x * masks[:, None], x * ~masks[:, None])

    given = [network[0].weight, network[0].bias, network[1].weight]
    assert torch.autograd.gradcheck(parts, [value.detach().clone().requires_grad_() for value in given])
    network.requires_grad_(True)
    beta, gamma = contextual_decomposition(network, x, masks)
    (beta - gamma).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network[5].parameters())
    assert network[0].weight.grad.any()


class Functional(nn.Module):
    def __init__(self, network: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.network, self.values = [network], values

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.network[0], self.values, (x,))


@pytest.mark.parametrize("name", ["mean", "sum", "neg", "flatten", "roll", "avg_pool2d", "adaptive_avg_pool2d"])
def test_functions_called_linear_are(name: str) -> None:
    assert name in LINEAR
    function = next(getattr(place, name) for place in (torch, F, Tensor) if hasattr(place, name))
    arguments = {"roll": (1,), "avg_pool2d": (2,), "adaptive_avg_pool2d": (2,)}.get(name, ())
    a, b = inputs(), inputs().flip(0)
    torch.testing.assert_close(function(2 * a + b, *arguments), 2 * function(a, *arguments) + function(b, *arguments))


@pytest.mark.parametrize("name", VANISHING)
def test_activations_vanish_at_zero(name: str) -> None:
    arguments = {"prelu": (torch.tensor([0.2]),), "hardtanh": (0.0, 6.0)}.get(name, ())
    assert float(getattr(F, name)(torch.zeros(1, 1), *arguments)) == 0


class Odd(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x).flatten(1)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (torch.cumsum, "cumsum"),
        (lambda x: x**2, "pow"),
        (lambda x: x.exp(), "exp"),
        (lambda x: 1 / x, "div"),
        (lambda x: x / x.sum(), "depend on the image"),
        (lambda x: x.data, "data"),
        (lambda x: F.pad(x, (1, 1), value=2.0), "pads with zeros"),
        (lambda x: x.flatten(1).softmax(1), "softmax alone"),
        (lambda x: F.batch_norm(x, None, None, training=True), "running statistics"),
    ],
)
def test_what_has_no_rule_is_named(function: object, says: str) -> None:
    network = Odd((lambda x: torch.cumsum(x, 1)) if function is torch.cumsum else function)
    with pytest.raises(HarmonizeError, match=says) as error:
        contextual_decomposition(network, tiny.floats(), torch.ones(3, 6, 6, dtype=torch.bool))
    assert "\n" not in str(error.value) and len(str(error.value)) <= 200


@pytest.mark.parametrize("masks", [torch.ones(3, 6, 6), torch.ones(2, 6, 6).bool(), torch.ones(3, 6, 5).bool()])
def test_masks_that_do_not_fit(masks: Tensor) -> None:
    with pytest.raises(HarmonizeError, match=r"masks must be bool \(3, 6, 6\)"):
        contextual_decomposition(tiny.Linear(), tiny.floats(), masks)


def test_black_pixels_of_a_plain_network_are_absent() -> None:
    """Zeros carry nothing: a group of zeros leaves everything to the rest."""
    network = tiny.small(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x = tiny.floats(2, 1).clone()
    x[:, :, :2] = 0
    masks = torch.zeros(2, 6, 6, dtype=torch.bool)
    masks[:, :2] = True
    beta, gamma = contextual_decomposition(network, x, masks)
    assert not beta.any()
    torch.testing.assert_close(gamma, network(x))
