"""Attribution from a layer that carries places (Grad-CAM) and from attention (rollout)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harmonize_lib.errors import HarmonizeError
from harmonize_lib.gradients import guided_backprop, guided_reason
from harmonize_lib.models import Geometry, Model
from harmonize_lib.tasks import Result, Task, logits_of, pick

UPSAMPLING = "bilinear, align_corners=False"


def grad_cam(task: Task, *, relu: bool = False) -> Result:
    """Activations of the layer that carries places, weighted by their mean gradient.

    Works on every layout of :class:`harmonize_lib.models.Geometry`: channels first, channels last, tokens (prefix
    tokens left out).

    Parameters
    ----------
    task : Task
        The images.
    relu : bool
        Cut negative evidence, as the paper does. A map may then be zero everywhere.

    Returns
    -------
    Result
        (n, H, W) maps, upsampled from the layer's grid.

    References
    ----------
    Selvaraju et al. 2017 (arXiv 1610.02391), equations 1 and 2.

    Notes
    -----
    Departure: the paper's ReLU is off unless asked for, so that maps are signed.
    """
    network, geometry = _inside(task)
    layer = network.get_submodule(geometry.layer)
    seen: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[0].clone()

    handle = layer.register_forward_hook(cut)
    try:
        logits = logits_of(task.model, task.x)
    finally:
        handle.remove()
    (slope,) = torch.autograd.grad(pick(logits, task.targets).sum(), seen[0])
    weights = geometry.to_maps(slope).mean((2, 3), keepdim=True)
    maps = (weights * geometry.to_maps(seen[0].detach())).sum(1)
    maps = _upsample(maps.relu() if relu else maps, task)
    notes = {"layer": geometry.layer, "grid": list(geometry.grid), "upsampling": UPSAMPLING}
    return Result(maps, logits.detach(), notes=notes)


def grad_cam_reason(model: nn.Module) -> str | None:
    """Tell why Grad-CAM is not defined for a network.

    Parameters
    ----------
    model : nn.Module
        The network.

    Returns
    -------
    str or None
        The reason.
    """
    if getattr(model, "geometry", None) is None:
        return "Grad-CAM needs a layer that carries places, and this network's geometry is unknown"
    return None


def guided_grad_cam(task: Task, *, relu: bool = False) -> Result:
    """Guided backpropagation times Grad-CAM.

    Parameters
    ----------
    task : Task
        The images.
    relu : bool
        Cut Grad-CAM's negative evidence, as the paper does.

    Returns
    -------
    Result
        (n, C, H, W) products; channels are summed with their signs.

    References
    ----------
    Selvaraju et al. 2017 (arXiv 1610.02391), section 3.2.

    Notes
    -----
    Departure: Grad-CAM's ReLU is off unless asked for.
    """
    cam, guided = grad_cam(task, relu=relu), guided_backprop(task)
    return Result(cam.attributions[:, None] * guided.attributions, guided.logits, notes=cam.notes)


def guided_grad_cam_reason(model: nn.Module) -> str | None:
    """Tell why guided Grad-CAM is not defined for a network.

    Parameters
    ----------
    model : nn.Module
        The network.

    Returns
    -------
    str or None
        The reason: what either factor lacks.
    """
    return grad_cam_reason(model) or guided_reason(model)


def attention_rollout(task: Task) -> Result:
    """Attention followed from the tokens the head reads down to the patches.

    Heads are averaged, the residual stream counts half, and the layers' matrices are multiplied. The target plays no
    part. The head reads the class token (two of them in distilled networks), or the mean of the patch tokens.

    Parameters
    ----------
    task : Task
        The images.

    Returns
    -------
    Result
        (n, H, W) maps, not negative, upsampled from the grid of patches.

    References
    ----------
    Abnar, Zuidema 2020 (arXiv 2005.00928), section 3 (attention rollout).
    """
    network, geometry = _inside(task)
    layers: list[Tensor] = []
    with torch.no_grad(), _open_attention(network, layers):
        logits = logits_of(task.model, task.x)
    tokens = geometry.prefix_tokens + geometry.grid[0] * geometry.grid[1]
    if not layers or any(attention.shape[1:] != (tokens, tokens) for attention in layers):
        raise HarmonizeError(f"attention rollout needs attention among all {tokens} tokens in every layer")
    flow = torch.zeros_like(layers[0][:, :1])
    if getattr(network, "global_pool", None) == "token":
        read = 2 if hasattr(network, "head_dist") else 1
        flow[:, :, :read] = 1 / read
    else:
        flow[:, :, geometry.prefix_tokens :] = 1 / (flow.shape[2] - geometry.prefix_tokens)
    for attention in reversed(layers):
        flow = 0.5 * (flow @ attention + flow)
    maps = flow[:, 0, geometry.prefix_tokens :].unflatten(1, geometry.grid)
    notes = {"grid": list(geometry.grid), "upsampling": UPSAMPLING}
    return Result(_upsample(maps, task), logits, notes=notes)


def rollout_reason(model: nn.Module) -> str | None:
    """Tell why attention rollout is not defined for a network.

    Parameters
    ----------
    model : nn.Module
        The network.

    Returns
    -------
    str or None
        The reason, from the modules present and the geometry.
    """
    attentions = [module for module in model.modules() if _is_attention(module)]
    if not attentions:
        return "attention rollout needs attention, and this network has none"
    geometry = getattr(model, "geometry", None)
    if geometry is None:
        return "attention rollout needs the grid of patches, and this network's geometry is unknown"
    if geometry.layout != "NLC":
        line = f"{type(attentions[0]).__name__} here sees windows or parts of a feature map"
        return f"attention rollout needs one set of tokens throughout, and {line}"
    if not all(hasattr(module, "fused_attn") and hasattr(module, "attn_drop") for module in attentions):
        return f"attention rollout cannot read the attention of {type(attentions[0]).__name__}"
    pool = getattr(model.network, "global_pool", None)
    if pool not in ("token", "avg"):
        return f"attention rollout starts at the class token or at the mean of patches, not at global_pool={pool!r}"
    return None


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    return name.endswith("Attn") or ("Attention" in name and "Pool" not in name)


def _inside(task: Task) -> tuple[nn.Module, Geometry]:
    """The bare network and its geometry."""
    model = cast(Model, task.model)
    return model.network, cast(Geometry, model.geometry)


@contextmanager
def _open_attention(network: nn.Module, layers: list[Tensor]) -> Iterator[None]:
    """Collect each layer's attention (n, T, T), averaged over heads; fused kernels are off meanwhile."""
    modules: list[Any] = [module for module in network.modules() if _is_attention(module)]
    fused = [module.fused_attn for module in modules]
    handles = [
        module.attn_drop.register_forward_pre_hook(lambda _, args: layers.append(args[0].mean(1))) for module in modules
    ]
    try:
        for module in modules:
            module.fused_attn = False
        yield
    finally:
        for module, flag in zip(modules, fused, strict=True):
            module.fused_attn = flag
        for handle in handles:
            handle.remove()


def _upsample(maps: Tensor, task: Task) -> Tensor:
    with torch.no_grad():
        return F.interpolate(maps[:, None], task.x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
