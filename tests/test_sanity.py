"""Randomization of weights and labels: exactly what is named changes, and known maps answer as they must."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import tiny
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from harmonize_lib import HarmonizeError, explain, load_dataset, sanity
from harmonize_lib.models import ARCHITECTURES, Model, shuffled
from harmonize_lib.train import parse_name

LOGITS = {
    "resnet": "fc.weight",
    "vgg": "head.weight",
    "mobilenet": "classifier.weight",
    "convnext": "head.fc.weight",
    "vit": "head.weight",
    "swin": "head.fc.weight",
}
FIRST = {
    "resnet": "conv1.0.weight",
    "vgg": "features.0.weight",
    "mobilenet": "conv_stem.weight",
    "convnext": "stem.0.weight",
    "vit": "patch_embed.proj.weight",
    "swin": "patch_embed.proj.weight",
}


def changed(model: Model, other: Model) -> set[str]:
    """Parameters and buffers that differ, found one by one."""
    after = other.network.state_dict()
    return {name for name, value in model.network.state_dict().items() if not torch.equal(value, after[name])}


def plain(network: nn.Module, channels: int = 2, side: int = 6) -> Model:
    ones = (1.0,) * channels
    return Model(network, "plain", "plain", ("a", "b", "c", "d"), (0.0,) * channels, ones, (side, side))


class Called(nn.Module):
    """Registered in another order than called; one weight is used without calling its module."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.inner = nn.Linear(72, 8)
        self.scale = nn.Parameter(torch.ones(72))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.inner(x.flatten(1) * self.scale))[:, None]
        return self.head(self.attention(tokens, tokens, tokens)[0][:, 0])


def test_layers_follow_the_pass_and_not_the_order_of_registration():
    model = plain(tiny.settle(Called()))
    inner = ("scale", "inner.weight", "inner.bias", "norm.weight", "norm.bias")
    attention = ("attention.in_proj_weight", "attention.in_proj_bias")
    projection = ("attention.out_proj.weight", "attention.out_proj.bias")
    assert sanity.layers(model) == [inner, attention, projection, ("head.weight", "head.bias")]
    assert sanity.stages(model, 3) == [("head.weight", "head.bias"), projection + attention, inner]


@pytest.mark.parametrize("architecture", LOGITS)
def test_stages_begin_at_the_logits_end_at_the_input_and_hold_every_parameter_once(architecture):
    model = tiny.model(architecture)
    stages = sanity.stages(model, 4)
    assert len(stages) == 4
    assert stages[0][0] == LOGITS[architecture] and len(stages[0]) == 2
    assert FIRST[architecture] in stages[-1]
    names = [name for stage in stages for name in stage]
    assert sorted(names) == sorted(name for name, _ in model.network.named_parameters())


@pytest.mark.parametrize("architecture", ["resnet", "vit", "swin"])
def test_exactly_the_named_parameters_change(architecture):
    model = tiny.model(architecture)
    stages = sanity.stages(model, 4)
    values = dict(model.network.named_parameters())
    can = {name for name, value in values.items() if len(value.unique()) > 1}
    cascade, alone = sanity.cascading(model, 0, 4), sanity.independent(model, 0, 4)
    union: set[str] = set()
    for stage, down_to, one in zip(stages, cascade, alone, strict=True):
        union |= set(stage)
        assert changed(model, one) == set(stage) & can
        assert changed(model, down_to) == union & can
        for name in stage:  # the same numbers, whether randomized alone or together
            assert torch.equal(one.network.state_dict()[name], down_to.network.state_dict()[name])
            numbers = one.network.state_dict()[name].flatten().sort().values
            assert torch.equal(numbers, values[name].flatten().sort().values)
    assert changed(cascade[-1], shuffled(model, 0)) == set()
    assert len({other.weights_hash for other in (model, *cascade, *alone[1:])}) == 8


def test_the_seed_decides():
    model = tiny.model("vgg")
    names = sanity.stages(model, 4)[1]
    torch.manual_seed(1)
    first = sanity.randomize(model, names, 5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert changed(first, sanity.randomize(model, names, 5)) == set()
    assert torch.equal(state, torch.get_rng_state())
    assert {name for name in names if name.endswith("weight")} <= changed(first, sanity.randomize(model, names, 6))


def test_the_model_is_left_as_found():
    model = tiny.model("swin")
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    digest, name = model.weights_hash, model.name
    sanity.cascading(model, 0, 4)
    assert all(torch.equal(value, before[key]) for key, value in model.network.state_dict().items())
    assert (model.weights_hash, model.name) == (digest, name)
    modules = list(model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks or module.training for module in modules)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_mistakes_are_told():
    model = tiny.model("vgg")
    with pytest.raises(HarmonizeError, match=r"did you mean 'head\.weight'"):
        sanity.randomize(model, ["head.weigth"], 0)
    with pytest.raises(HarmonizeError, match="at least 1, not 0"):
        sanity.stages(model, 0)
    with pytest.raises(HarmonizeError, match="nothing to randomize"):
        sanity.stages(plain(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), channels=1))


def test_a_network_of_one_layer_has_one_stage():
    model = plain(tiny.Linear())
    assert sanity.stages(model, 4) == [("head.weight", "head.bias")]
    assert sanity.stages(model, 1) == [("head.weight", "head.bias")]


def test_a_map_that_knows_no_model_passes_nothing_and_keeps_everything():
    images, labels = tiny.shapes5()
    model = tiny.model("resnet")
    for other in sanity.cascading(model, 0, 3):
        maps = [explain(m, images, labels, "edges").maps for m in (model, other)]
        for similarity in sanity.SIMILARITIES.values():
            torch.testing.assert_close(similarity(*maps), torch.ones(5))


def test_a_linear_model_forgets_its_map_with_its_layer():
    """Input x gradient of an image of ones is the weight itself: after a shuffle, correlation 0 in the mean."""
    model = plain(tiny.Linear(channels=1, side=8), channels=1, side=8)
    image, target = torch.ones(1, 1, 8, 8), torch.tensor([2])
    before = explain(model, image, target, "input_x_gradient").maps
    torch.testing.assert_close(before[0].flatten(), model.network.head.weight[2])
    after = torch.cat(
        [
            explain(sanity.randomize(model, ["head.weight"], seed), image, target, "input_x_gradient").maps
            for seed in range(60)
        ]
    )
    found = sanity.SIMILARITIES["spearman"](before.expand(60, -1, -1), after)
    spread = 1 / (60 * 63) ** 0.5  # of a mean of 60 rank correlations of 64 independent pixels
    assert abs(found.mean()) < 4 * spread
    assert found.std() == pytest.approx(63**-0.5, rel=0.4)
    same = explain(sanity.randomize(model, ["head.bias"], 0), image, target, "input_x_gradient").maps
    torch.testing.assert_close(same, before)


def test_similarities_against_loops():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 8, 8, generator=generator) for _ in range(2))
    for name, change in (("spearman", np.asarray), ("spearman_of_magnitudes", np.abs)):
        flat = [change(maps.flatten(1).numpy()) for maps in (a, b)]
        slow = [spearmanr(x, y).statistic for x, y in zip(*flat, strict=True)]
        torch.testing.assert_close(sanity.SIMILARITIES[name](a, b), torch.tensor(slow, dtype=torch.float32))
    torch.testing.assert_close(sanity.SIMILARITIES["spearman"](a, -a), -torch.ones(3))
    torch.testing.assert_close(sanity.SIMILARITIES["spearman_of_magnitudes"](a, -a), torch.ones(3))


def slow_histograms(values: np.ndarray) -> np.ndarray:
    """Pixel by pixel: differences to the neighbors, votes for the two nearest orientations, means over cells."""
    height, width = values.shape
    found = np.zeros((9, height // 8, width // 8))
    for y in range(height // 8 * 8):
        for x in range(width // 8 * 8):
            up, down, left, right = max(y - 1, 0), min(y + 1, height - 1), max(x - 1, 0), min(x + 1, width - 1)
            rise = (values[down, x] - values[up, x]) / (down - up)
            slope = (values[y, right] - values[y, left]) / (right - left)
            degrees = math.degrees(math.atan2(rise, slope)) % 180
            for k in range(9):
                apart = min(abs(degrees - 20 * k - 10 - turn) for turn in (-180, 0, 180))
                found[k, y // 8, x // 8] += max(0, 1 - apart / 20) * math.hypot(rise, slope) / 64
    return found.ravel()


@pytest.mark.parametrize("shape", [(8, 8), (19, 26)])
def test_histograms_of_gradients_against_a_loop(shape):
    a, b = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slow = [[slow_histograms(each.numpy()) for each in maps] for maps in (a, b)]
    np.testing.assert_allclose(sanity.gradient_histograms(a).numpy(), slow[0], atol=1e-12)
    wanted = [np.corrcoef(x, y)[0, 1] for x, y in zip(*slow, strict=True)]
    np.testing.assert_allclose(sanity.hog_correlation(a, b).numpy(), wanted, atol=1e-12)


def test_histograms_of_gradients_know_ramps():
    """A ramp of slope 3 at 30 degrees fills one orientation, its reverse the same; one at 20 degrees fills two."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    ramps = [sign * 3 * (x * math.cos(t) + y * math.sin(t)) for t in (math.pi / 6, math.pi / 9) for sign in (1, -1)]
    found = sanity.gradient_histograms(torch.stack(ramps)).view(4, 9, 4)
    wanted = torch.zeros(4, 9, 4)
    wanted[:2, 1], wanted[2:, :2] = 3, 1.5
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    a, b = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sanity.hog_correlation(a, b), sanity.hog_correlation(3 - 2 * a, b))


@pytest.mark.parametrize("similarity", sanity.SIMILARITIES.values())
def test_undefined_is_nan(similarity: Callable[[Tensor, Tensor], Tensor]):
    a = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[0], b[1, 0, 0] = 1.0, torch.nan
    assert similarity(a, b).isnan().tolist() == [True, True, False]
    assert similarity(b, a).isnan().tolist() == [True, True, False]


def test_random_labels_are_those_of_objects_in_another_order():
    options = {"split": "train", "n": 300}
    true, random = (load_dataset("shapes-on-scenes", labels=labels, **options) for labels in ("obj", "random_labels"))
    assert torch.equal(true.images, random.images) and true.classes == random.classes and true.ids == random.ids
    assert torch.equal(true.labels.bincount(), random.labels.bincount())
    assert (true.labels == random.labels).float().mean() < 0.2  # chance is 0.1
    again = load_dataset("shapes-on-scenes", labels="random_labels", **options)
    assert torch.equal(again.labels, random.labels)
    assert parse_name("swin-random_labels-s2") == ("swin", {"labels": "random_labels"}, 2)
    assert set(LOGITS) <= set(ARCHITECTURES)
