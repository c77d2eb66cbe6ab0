"""Grad-CAM, guided Grad-CAM and rollout against captum and literal versions."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import captum.attr
import pytest
import timm
import tiny
import torch
from torch import Tensor
from torch.nn import functional as F

from harmonize_lib.attribution import explain, refusal
from harmonize_lib.models import Model


@lru_cache(maxsize=8)
def vit(distilled: bool = False, **settings: Any) -> Model:
    network = timm.create_model(
        "deit_tiny_distilled_patch16_224" if distilled else "vit_tiny_patch16_224",
        num_classes=10,
        img_size=64,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=3,
        **settings,
    )
    return tiny.wrap(network)


def upsampled(maps: Tensor) -> Tensor:
    return F.interpolate(maps[:, None], (64, 64), mode="bilinear", align_corners=False)[:, 0]


def layer_output(model: Model, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    layer = model.network.get_submodule(model.geometry.layer)
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(model.preprocess(images))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "convnext", "mobilevit"])
@pytest.mark.parametrize("relu", [False, True])
def test_grad_cam_equals_captum_on_channels_first(name: str, relu: bool) -> None:
    model = tiny.model(name)
    images, targets = tiny.shapes5()
    layer = model.network.get_submodule(model.geometry.layer)
    judge = captum.attr.LayerGradCam(model, layer)
    x = model.preprocess(images).requires_grad_()
    want = judge.attribute(x, target=targets, relu_attributions=relu)
    want = captum.attr.LayerAttribution.interpolate(want, (64, 64), "bilinear")[:, 0].detach()
    found = explain(model, images, targets, "grad_cam", relu=relu).maps
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", ["swin", "vit", "registers", "average"])
def test_grad_cam_literal_on_tokens_and_channels_last(name: str) -> None:
    models = {"registers": {"reg_tokens": 2}, "average": {"global_pool": "avg", "class_token": False}}
    model = vit(**models[name]) if name in models else tiny.model(name)
    images, targets = tiny.shapes5()
    geometry = model.geometry
    layer = model.network.get_submodule(geometry.layer)
    want = []
    for image, target in zip(images, targets.tolist(), strict=True):
        seen: list[Tensor] = []
        handle = layer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        logits = model(model.preprocess(image[None]).requires_grad_())
        handle.remove()
        (slope,) = torch.autograd.grad(logits[0, target], seen[0])
        output = seen[0].detach()
        rows, columns = geometry.grid
        cam = torch.zeros(rows, columns)
        for channel in range(output.shape[-1]):
            if geometry.layout == "NHWC":
                activation, change = output[0, :, :, channel], slope[0, :, :, channel]
            else:
                first = geometry.prefix_tokens
                activation, change = (value[0, first:, channel].view(rows, columns) for value in (output, slope))
            cam += change.mean() * activation
        want.append(cam)
    maps = explain(model, images, targets, "grad_cam").maps
    assert maps.flatten(1).any(1).all()
    torch.testing.assert_close(maps, upsampled(torch.stack(want)), rtol=1e-3, atol=1e-5 * float(maps.abs().max()))


def test_grad_cam_is_the_class_activation_map_of_a_pooled_head() -> None:
    """With logits = w mean(A), the gradient of A_k is w_k / area everywhere, so the map is sum_k w_k A_k / area."""
    model = tiny.model("vgg")
    images, targets = tiny.shapes5()
    weights = model.network.head.weight[targets]
    want = torch.einsum("nc,nchw->nhw", weights, layer_output(model, images)) / 64
    found = explain(model, images, targets, "grad_cam").maps
    torch.testing.assert_close(found, upsampled(want), rtol=1e-4, atol=1e-5)


def test_grad_cam_needs_a_geometry() -> None:
    assert "geometry is unknown" in str(refusal(tiny.Linear(), "grad_cam"))
    assert "geometry is unknown" in str(refusal(tiny.Linear(), "guided_grad_cam"))


@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_guided_grad_cam_equals_captum(name: str) -> None:
    model = tiny.model(name)
    images, targets = tiny.shapes5()
    judge = captum.attr.GuidedGradCam(model, model.network.get_submodule(model.geometry.layer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = judge.attribute(model.preprocess(images), target=targets, interpolate_mode="bilinear").sum(1)
    found = explain(model, images, targets, "guided_grad_cam", relu=True).maps
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()


def test_guided_grad_cam_is_the_product() -> None:
    model = tiny.model("mobilenet")
    images, targets = tiny.shapes5()
    cam = explain(model, images, targets, "grad_cam").maps
    guided = explain(model, images, targets, "guided_backprop", reduction="sum").maps
    torch.testing.assert_close(explain(model, images, targets, "guided_grad_cam").maps, cam * guided)


def literal_rollout(model: Model, images: Tensor, rows: list[int]) -> Tensor:
    """Softmax of queries and keys from the weights, image by image and head by head; then the product of layers."""
    network, prefix = model.network, model.geometry.prefix_tokens
    maps = []
    for image in images:
        inputs: list[Tensor] = []
        handles = [
            block.attn.register_forward_hook(lambda module, args, output, inputs=inputs: inputs.append(args[0]))
            for block in network.blocks
        ]
        with torch.no_grad():
            model(model.preprocess(image[None]))
        for handle in handles:
            handle.remove()
        product = torch.eye(inputs[0].shape[1])
        for block, tokens in zip(network.blocks, inputs, strict=True):
            attention = block.attn
            projected = attention.qkv(tokens[0])
            width = attention.num_heads * attention.head_dim
            mean = torch.zeros(len(tokens[0]), len(tokens[0]))
            for head in range(attention.num_heads):
                part = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
                queries, keys = projected[:, :width][:, part], projected[:, width : 2 * width][:, part]
                mean += (queries @ keys.T / attention.head_dim**0.5).softmax(1) / attention.num_heads
            product = (0.5 * mean + 0.5 * torch.eye(len(mean))) @ product
        maps.append(product[rows].mean(0)[prefix:].view(model.geometry.grid))
    return upsampled(torch.stack(maps))


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, [0]),
        ({"reg_tokens": 2}, [0]),
        ({"distilled": True}, [0, 1]),
        ({"global_pool": "avg"}, list(range(1, 65))),
        ({"global_pool": "avg", "class_token": False}, list(range(64))),
    ],
)
def test_rollout_literal(settings: dict[str, Any], rows: list[int]) -> None:
    model = vit(**settings)
    images, targets = tiny.shapes5()
    fused = [block.attn.fused_attn for block in model.network.blocks]
    found = explain(model, images, targets, "attention_rollout")
    torch.testing.assert_close(found.maps, literal_rollout(model, images, rows), rtol=1e-3, atol=1e-7)
    assert [block.attn.fused_attn for block in model.network.blocks] == fused == [True] * 3
    other = explain(model, images, targets.roll(1), "attention_rollout")
    assert torch.equal(other.maps, found.maps)


def test_rollout_refuses_a_head_it_cannot_follow() -> None:
    assert "global_pool='map'" in str(refusal(vit(global_pool="map"), "attention_rollout"))
    assert "geometry is unknown" in str(refusal(vit().network, "attention_rollout"))
