"""Every method on every architecture: one set of invariants, generated from the registry."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from harmonize_lib.attribution import METHODS, Attribution, explain, list_methods, refusal
from harmonize_lib.errors import HarmonizeError
from harmonize_lib.models import ARCHITECTURES

QUICK: dict[str, dict[str, Any]] = {
    "smoothgrad": {"samples": 2},
    "smoothgrad_squared": {"samples": 2},
    "integrated_gradients": {"steps": 2, "max_steps": 4},
    "integrated_gradients_smoothgrad": {"steps": 2, "samples": 2},
    "expected_gradients": {"samples": 2},
    "occlusion": {"patch": 32, "stride": 32},
    "rise": {"masks": 4},
    "contextual_decomposition": {"patch": 32},
}
RELU_RULES = {"guided_backprop", "deeplift", "guided_grad_cam"}
REFUSED = {
    "resnet": {"attention_rollout"},
    "vgg": {"attention_rollout"},
    "mobilenet": {"attention_rollout"},
    "convnext": {"attention_rollout"} | RELU_RULES,
    "vit": RELU_RULES,
    "swin": {"attention_rollout"} | RELU_RULES,
    "mobilevit": {"attention_rollout"} | RELU_RULES,
}
RUNS = [(name, method) for name in ARCHITECTURES for method in METHODS if method not in REFUSED[name]]


def run(model: nn.Module, method: str, index: Any = slice(None), **options: Any) -> Attribution:
    images, targets = tiny.shapes5()
    generator = torch.Generator().manual_seed(7)
    return explain(model, images[index], targets[index], method, generator, **QUICK.get(method, {}), **options)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything a method could leave behind in a model."""
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {name: [len(getattr(module, kind)) for kind in hooks] for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "fused": {name: getattr(module, "fused_attn", None) for name, module in modules.items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grad": {name: p.grad is None for name, p in model.named_parameters()},
        "values": {name: value.double().sum().item() for name, value in model.state_dict().items()},
    }


def test_what_runs_where() -> None:
    """The table of methods and architectures, as the registry tells it."""
    found = {name: {method for method in METHODS if refusal(tiny.model(name), method)} for name in ARCHITECTURES}
    width = max(map(len, METHODS))
    print(f"\n{'':{width}}", *(f"{name:>9}" for name in ARCHITECTURES))
    for method in METHODS:
        print(f"{method:{width}}", *(f"{'-' if method in found[name] else 'runs':>9}" for name in ARCHITECTURES))
    assert found == REFUSED
    for name in ARCHITECTURES:
        assert list_methods(tiny.model(name)) == [method for method in METHODS if method not in REFUSED[name]]
    assert list_methods() == list(METHODS)


@pytest.mark.parametrize(("name", "method"), [(n, m) for n in ARCHITECTURES for m in sorted(REFUSED[n])])
def test_refuses_with_the_stated_reason(name: str, method: str) -> None:
    reason = refusal(tiny.model(name), method)
    assert reason is not None and "\n" not in reason and len(reason) <= 200
    with pytest.raises(HarmonizeError) as error:
        run(tiny.model(name), method)
    assert str(error.value) == reason


@pytest.mark.parametrize(
    ("name", "method", "culprit"),
    [
        ("convnext", "guided_backprop", "GELU"),
        ("mobilevit", "guided_grad_cam", "SiLU"),
        ("convnext", "deeplift", "LayerNorm2d"),
        ("vit", "deeplift", "LayerNorm"),
        ("resnet", "attention_rollout", "none"),
        ("swin", "attention_rollout", "WindowAttention"),
    ],
)
def test_reason_names_the_culprit(name: str, method: str, culprit: str) -> None:
    assert culprit in str(refusal(tiny.model(name), method))


@pytest.mark.parametrize(("name", "method"), RUNS)
def test_conformance(name: str, method: str) -> None:
    model = tiny.model(name)
    images, targets = tiny.shapes5()
    before, pixels, rng = state_of(model), images.clone(), torch.get_rng_state()
    result = run(model, method)

    assert result.maps.shape == (5, 64, 64) and result.maps.dtype == torch.float32
    assert result.maps.device.type == "cpu" and not result.maps.requires_grad
    assert result.maps.isfinite().all() and result.maps.flatten(1).any(1).all()
    with torch.no_grad():
        logits = model(model.preprocess(images))
    torch.testing.assert_close(result.logit, logits[torch.arange(5), targets])
    torch.testing.assert_close(result.probability, logits.softmax(1)[torch.arange(5), targets])
    assert (result.completeness_gap is not None) == METHODS[method].completeness
    assert json.loads(json.dumps(result.record)) == result.record

    assert state_of(model) == before
    assert torch.equal(images, pixels) and torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize(("name", "method"), RUNS)
def test_shuffled_batches_equal_one_by_one(name: str, method: str) -> None:
    """In double precision: in single, rounding that differs by batch size flips a unit of a ReLU network at times."""
    model = tiny.model(name, torch.float64)
    order = torch.tensor([4, 0, 2])
    together = run(model, method, order, batch_size=2).maps
    alone = torch.cat([run(model, method, order[i : i + 1]).maps for i in range(3)])
    assert (together - alone).abs().amax((1, 2)).le(1e-6 * alone.abs().amax((1, 2))).all()


@pytest.mark.parametrize(("name", "method"), RUNS)
def test_model_is_as_found_after_an_error(name: str, method: str) -> None:
    """A NaN in the last bias makes the checked pass raise while hooks and flags are set."""
    model = tiny.model(name)
    bias = [p for key, p in model.named_parameters() if key.endswith("bias")][-1]
    kept = bias.detach().clone()
    before = state_of(model)
    bias.fill_(float("nan"))
    try:
        with pytest.raises(HarmonizeError, match="NaN"):
            run(model, method, slice(1))
    finally:
        bias.copy_(kept)
    assert state_of(model) == before


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", ["input_x_gradient", "integrated_gradients", "deeplift"])
def test_recorded_gap_is_what_the_map_misses(name: str, method: str) -> None:
    if method in REFUSED[name]:
        return
    model = tiny.model(name)
    result = run(model, method)
    with torch.no_grad():
        empty = model(torch.zeros(1, 3, 64, 64))[0, tiny.shapes5()[1]]
    difference = result.logit - empty
    gap = (result.maps.sum((1, 2)) - difference).abs()
    torch.testing.assert_close(result.completeness_gap, gap, rtol=1e-3, atol=1e-4 * float(difference.abs().max()))
    torch.testing.assert_close(torch.tensor(result.record["relative_gap"]), result.completeness_gap / difference.abs())
    if method == "deeplift":
        assert max(result.record["relative_gap"]) < 1e-3
    if method == "integrated_gradients":
        steps = result.record["steps"]
        done = [gap <= 0.01 for gap in result.record["relative_gap"]]
        assert all(ok or n == 4 for ok, n in zip(done, steps if isinstance(steps, list) else [steps] * 5, strict=True))


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].stochastic])
def test_randomness_is_the_generators(method: str) -> None:
    model = tiny.model("resnet")
    images, targets = tiny.shapes5()
    options = QUICK.get(method, {})
    maps = [
        explain(model, images, targets, method, generator, **options).maps
        for generator in (None, *(torch.Generator().manual_seed(seed) for seed in (1, 1, 2)))
    ]
    assert torch.equal(maps[1], maps[2]) and not torch.equal(maps[1], maps[3])
    assert torch.equal(maps[0], explain(model, images, targets, method, **options).maps)


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].stochastic])
def test_generator_is_left_alone_without_randomness(method: str) -> None:
    if method == "attention_rollout":
        return
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    images, targets = tiny.shapes5()
    explain(tiny.model("vgg"), images[:1], targets[:1], method, generator, **QUICK.get(method, {}))
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("method", METHODS)
def test_works_where_gradients_are_off(method: str) -> None:
    model = tiny.model("vit" if method == "attention_rollout" else "resnet")
    want = run(model, method, slice(2)).maps
    with torch.inference_mode():
        images, targets = (value[:2].clone() for value in tiny.shapes5())
        generator = torch.Generator().manual_seed(7)
        inside = explain(model, images, targets, method, generator, **QUICK.get(method, {}))
    with torch.no_grad():
        torch.testing.assert_close(run(model, method, slice(2)).maps, want)
    torch.testing.assert_close(inside.maps, want)
    assert not inside.maps.is_inference()


def test_parameters_that_want_gradients_get_none() -> None:
    network = tiny.small(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    network.requires_grad_(True)
    before = state_of(network)
    for method in list_methods(network):
        options = {"references": tiny.floats(4)} if method == "expected_gradients" else {}
        explain(network, tiny.floats(), torch.tensor([0, 1, 2]), method, **options)
    assert state_of(network) == before


def test_record_says_how_it_was_made() -> None:
    model = tiny.model("resnet")
    record = run(model, "integrated_gradients").record
    assert record["method"] == "integrated_gradients" and record["version"] == 1
    assert record["options"] == {
        "baseline": "mean",
        "steps": 2,
        "rule": "gausslegendre",
        "tolerance": 0.01,
        "max_steps": 4,
    }
    assert (record["reduction"], record["baseline"], record["quadrature"]) == ("sum", "mean", "gausslegendre")
    assert record["seconds"] > 0 and record["model"] == "tiny" and record["batch_size"] == 128
    images, targets = tiny.shapes5()
    options = explain(model, images[:1], targets[:1], "occlusion").record["options"]
    assert (options["patch"], options["stride"]) == (8, 4)
    assert run(model, "rise").record["steps"] == 4
    assert run(model, "grad_cam").record["grid"] == [8, 8]
    assert "bilinear" in run(model, "grad_cam").record["upsampling"]


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if entry.reduction is not None])
def test_channel_reduction_is_an_option(method: str) -> None:
    model = tiny.model("vgg")
    results = {name: run(model, method, reduction=name) for name in ("sum", "magnitude", "default")}
    assert (results["magnitude"].maps >= 0).all()
    assert (results["sum"].maps.abs() <= results["magnitude"].maps * (1 + 1e-4) + 1e-6).all()
    default = results[str(METHODS[method].reduction)]
    assert torch.equal(results["default"].maps, default.maps)
    assert {name: result.record["reduction"] for name, result in results.items()} == {
        "sum": "sum",
        "magnitude": "magnitude",
        "default": METHODS[method].reduction,
    }


class Broken(nn.Module):
    """A linear model with one flaw."""

    def __init__(self, flaw: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.head = tiny.Linear()
        self.flaw = flaw
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.flaw(self.head(x))


@pytest.mark.parametrize(
    ("flaw", "line"),
    [
        (lambda logits: (logits, logits), "returns a tuple"),
        (lambda logits: logits / 0, "NaN or infinite"),
        (lambda logits: logits[:, 0], "logits must be"),
        (lambda logits: logits.detach(), "cuts the gradient"),
    ],
)
def test_broken_models_are_named(flaw: Callable[[Tensor], Any], line: str) -> None:
    with pytest.raises(HarmonizeError, match=line):
        explain(Broken(flaw), tiny.floats(), torch.tensor([0, 1, 2]), "saliency")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"method": "salency"}, "did you mean 'saliency'"),
        ({"sampels": 3}, "did you mean 'samples'"),
        ({"samples": 0}, "samples must be a whole number of at least 1"),
        ({"samples": 2.5}, "samples must be a whole number"),
        ({"noise": -1.0}, "noise must be a number of at least 0"),
        ({"reduction": "summ"}, "did you mean 'sum'"),
        ({"batch_size": 0}, "batch_size"),
        ({"targets": torch.tensor([0, 1])}, r"shape \(3,\)"),
        ({"targets": torch.tensor([0.0, 1, 2])}, "int64"),
        ({"targets": torch.tensor([0, 1, 4])}, "target 4 is out of range: the model has classes 0..3"),
        ({"targets": torch.tensor([0, -1, 3])}, "target -1 is out of range"),
        ({"images": torch.zeros(3, 2, 6, 6, dtype=torch.uint8)}, "takes float images"),
        ({"images": torch.full((3, 2, 6, 6), float("nan"))}, "NaN"),
        ({"images": torch.zeros(0, 2, 6, 6), "targets": torch.zeros(0, dtype=torch.int64)}, "at least 1"),
        ({"images": torch.zeros(2, 6, 6)}, "N, C, H, W"),
        ({"model": "resnet-obj"}, "torch.nn.Module"),
    ],
)
def test_bad_input_is_one_line(change: dict[str, Any], line: str) -> None:
    call = {"model": tiny.Linear(), "images": tiny.floats(), "targets": torch.tensor([0, 1, 2]), "method": "smoothgrad"}
    with pytest.raises(HarmonizeError, match=line) as error:
        explain(**(call | change))
    assert "\n" not in str(error.value) and len(str(error.value)) <= 200


def test_train_mode_is_refused() -> None:
    network = tiny.small(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network[1].train()
    with pytest.raises(HarmonizeError, match=r"call model.eval\(\)"):
        explain(network, tiny.floats(), torch.tensor([0, 1, 2]), "saliency")


def test_batchnorm_that_mixes_images_is_refused() -> None:
    network = tiny.small(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.insert(1, nn.BatchNorm2d(3, track_running_stats=False).eval())
    with pytest.raises(HarmonizeError, match="running statistics"):
        explain(network, tiny.floats(), torch.tensor([0, 1, 2]), "saliency")


def test_zero_map_is_an_error_that_names_the_image() -> None:
    images = tiny.floats()
    images[1] = 0
    with pytest.raises(HarmonizeError, match="zero everywhere for images 1"):
        explain(tiny.Linear(), images, torch.tensor([0, 1, 2]), "input_x_gradient")


class Small(tiny.Linear):
    """A model on a device whose memory holds two rows."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x)


def test_out_of_memory_halves_the_batch_and_goes_on() -> None:
    images, targets = tiny.floats(7), torch.arange(7) % 4
    with pytest.warns(UserWarning, match="batch_size=[42]"):
        result = explain(Small(), images, targets, "smoothgrad", batch_size=8)
    torch.testing.assert_close(result.maps, explain(tiny.Linear(), images, targets, "smoothgrad").maps)
    assert result.record["batch_size"] == 2


def test_random_control() -> None:
    images, targets = tiny.shapes5()
    images = torch.cat([images, images[:1]])
    maps = explain(tiny.model("vgg"), images, torch.cat([targets, targets[:1]]), "random").maps
    assert torch.equal(maps[0], maps[5])
    correlation = torch.corrcoef(maps[:5].flatten(1)) - torch.eye(5)
    assert correlation.abs().max() < 0.08  # 5 standard errors of a correlation over 64 * 64 pixels
    assert abs(float(maps[:5].mean())) < 0.035 and abs(float(maps[:5].std()) - 1) < 0.025


def test_center_control_falls_with_distance() -> None:
    maps = run(tiny.model("vgg"), "center").maps
    for row, column in [(0, 0), (31, 31), (32, 40), (10, 50)]:
        square = (row - 31.5) ** 2 + (column - 31.5) ** 2
        want = torch.tensor(-square / (2 * 16**2)).exp()
        torch.testing.assert_close(maps[:, row, column], want.expand(5).to(maps))


def test_edges_control_is_sobel_energy() -> None:
    images, _ = tiny.shapes5()
    maps = run(tiny.model("vgg"), "edges").maps
    light = (0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]) / 255

    def at(n: int, row: int, column: int) -> float:
        return float(light[n, min(max(row, 0), 63), min(max(column, 0), 63)])

    for n, row, column in [(0, 0, 0), (1, 30, 30), (2, 63, 17), (4, 12, 63)]:
        across = sum(
            w * (at(n, row + d, column + 1) - at(n, row + d, column - 1)) for d, w in ((-1, 1), (0, 2), (1, 1))
        )
        down = sum(w * (at(n, row + 1, column + d) - at(n, row - 1, column + d)) for d, w in ((-1, 1), (0, 2), (1, 1)))
        assert float(maps[n, row, column]) == pytest.approx((across**2 + down**2) / 64, rel=1e-3, abs=1e-9)
