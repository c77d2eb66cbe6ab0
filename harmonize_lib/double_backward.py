"""Layers whose second derivatives cost what first ones do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

CHANGED = (
    F.relu,
    F.max_pool2d,
    F.batch_norm,
    F.conv2d,
    F.gelu,
    F.layer_norm,
    F.scaled_dot_product_attention,
)
NO_MASK = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


class DoubleBackward(TorchFunctionMode):
    """Within this context a network computes the same, and its input gradient is cheap to differentiate.

    ReLU, max pooling and BatchNorm in eval mode have no curvature, yet PyTorch carries zeros back through the network
    for it; its second derivative of a convolution goes group by group, slowly where a CPU meets holes, those of GELU
    and LayerNorm step by step, and attention's guards against masks that are not there. Under autocast nothing is
    changed.

    Attributes
    ----------
    explaining : bool
        Set it while the input gradient is taken: convolutions then leave out the gradient of their weights.
    """

    explaining = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of PyTorch, or what stands for it here.

        Parameters
        ----------
        func : Any
            The function.
        types : Any
            Not used.
        args : Any
            Its arguments.
        kwargs : Any
            Its keyword arguments.

        Returns
        -------
        Any
            Its result.
        """
        kwargs = kwargs or {}
        if func not in CHANGED or not args:
            return func(*args, **kwargs)
        x, *rest = args
        if torch.is_autocast_enabled(x.device.type):
            return func(*args, **kwargs)
        if func is F.relu and not rest and not kwargs.get("inplace"):
            return x * (x > 0).to(x.dtype)
        if func is F.max_pool2d and not kwargs.get("return_indices"):
            values, place = F.max_pool2d_with_indices(x.detach(), *rest, **kwargs)
            return x.flatten(-2).gather(-1, place.flatten(-2)).view_as(values)
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func is F.conv2d and len(rest) == 6 and all(isinstance(option, tuple) for option in rest[2:5]):
            if _cuts_patches(*args):
                return _patches(*args)
            return _on_lattices(self, *args) if _is_dilated(*args) else _Convolution.apply(self, *args)
        if func is F.gelu and not rest and kwargs.get("approximate", "none") == "none":
            return _Gelu.apply(x)
        if func is F.layer_norm and len(rest) == 1 and len(rest[0]) == 1 and kwargs["weight"] is not None:
            return _LayerNorm.apply(self, x, kwargs["weight"], kwargs["bias"], kwargs["eps"])
        if func is F.scaled_dot_product_attention and len(rest) == 2 and NO_MASK | kwargs == NO_MASK:
            return _attention(x, *rest)
        return func(*args, **kwargs)


def _batch_norm(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """BatchNorm; in eval mode it is a scale and a shift."""
    if training or mean is None or variance is None:
        return F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
    scale = (variance + eps).rsqrt() if weight is None else (variance + eps).rsqrt() * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    column = (-1, *[1] * (x.ndim - 2))
    return x * scale.view(column) + shift.view(column)


class _Convolution(torch.autograd.Function):
    """conv2d whose input gradient is itself a (transposed) convolution."""

    @staticmethod
    def forward(
        ctx: Any, layers: DoubleBackward, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any
    ) -> Tensor:
        ctx.layers, ctx.options, ctx.bias = layers, options, None if bias is None else [len(bias)]
        ctx.save_for_backward(x, weight)
        return torch.conv2d(x, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        if not ctx.layers.explaining:
            wanted = list(ctx.needs_input_grad[1:4])
            options = (ctx.bias, stride, padding, dilation, False, (0, 0), groups, wanted)
            return None, *torch.ops.aten.convolution_backward(slope, x, weight, *options), *[None] * 4
        covered = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1
            for n, s, p, d, k in zip(slope.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True)
        ]
        left = [size - part for size, part in zip(x.shape[2:], covered, strict=True)]
        return None, F.conv_transpose2d(slope, weight, None, stride, padding, left, groups, dilation), *[None] * 6


def _cuts_patches(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> bool:
    """Whether a convolution sees every pixel once, in patches large enough that cutting them out pays."""
    stride, padding, dilation, groups = options
    size = tuple(weight.shape[2:])
    whole = all(n % k == 0 for n, k in zip(x.shape[2:], size, strict=True))
    return size > (4, 4) and whole and stride == size and padding == (0, 0) and dilation == (1, 1) and groups == 1


def _is_dilated(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> bool:
    """Whether a depthwise convolution has holes, for which a CPU is slow, and lattices that they divide evenly."""
    stride, padding, dilation, groups = options
    holes = not x.is_cuda and groups == x.shape[1] and stride == (1, 1) and max(dilation) > 1
    return holes and all(n % d == 0 for n, d in zip((*x.shape[2:], *padding), dilation * 2, strict=True))


def _on_lattices(
    layers: DoubleBackward,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    """Such a convolution as an ordinary one on each of the lattices that its holes leave."""
    down, right = dilation
    cells = x.permute(0, 2, 3, 1).unflatten(2, (-1, right)).unflatten(1, (-1, down))
    lattices = cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)
    around = (padding[0] // down, padding[1] // right)
    y = _Convolution.apply(layers, lattices, weight, bias, stride, around, (1, 1), groups)
    cells = y.permute(0, 2, 3, 1).unflatten(0, (-1, down, right)).permute(0, 3, 1, 4, 2, 5)
    return cells.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _patches(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    """Such a convolution as one matrix product."""
    k, j = weight.shape[2:]
    patches = x.unflatten(3, (-1, j)).unflatten(2, (-1, k)).permute(0, 2, 4, 1, 3, 5)
    return F.linear(patches.flatten(3), weight.flatten(1), bias).permute(0, 3, 1, 2)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _Softmax.apply(query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)) @ value


class _Softmax(torch.autograd.Function):
    """Softmax over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        p = x.softmax(-1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return _SoftmaxSlope.apply(slope, *ctx.saved_tensors)


class _SoftmaxSlope(torch.autograd.Function):
    """p (slope - sum(p slope))."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(slope, p)
        return torch.ops.aten._softmax_backward_data(slope, p, -1, p.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, change: Tensor) -> Any:
        slope, p = ctx.saved_tensors
        level, shift = ((p * part).sum(-1, keepdim=True) for part in (slope, change))
        for_p = (slope - level).mul_(change).addcmul_(slope, shift, value=-1)
        return torch.ops.aten._softmax_backward_data(change, p, -1, p.dtype), for_p


class _Gelu(torch.autograd.Function):
    """x Phi(x), of the normal distribution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return _GeluSlope.apply(slope, *ctx.saved_tensors)


class _GeluSlope(torch.autograd.Function):
    """Slope times gelu'(x); gelu''(x) = (2 - x^2) phi(x)."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(slope, x)
        return torch.ops.aten.gelu_backward(slope, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, change: Tensor) -> Any:
        slope, x = ctx.saved_tensors
        square = x * x
        density = torch.add(x.new_tensor(-0.5 * math.log(2 * math.pi)), square, alpha=-0.5).exp_()
        curvature = density.mul_(torch.rsub(square, 2))
        return torch.ops.aten.gelu_backward(change, x), curvature.mul_(slope).mul_(change)


class _LayerNorm(torch.autograd.Function):
    """z w + b, z = (x - mean x) r, r = (var x + eps)^(-1/2), over the last dimension."""

    @staticmethod
    def forward(ctx: Any, layers: DoubleBackward, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, r = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.layers = layers
        ctx.save_for_backward(x, weight, bias, mean, r)
        return y

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        x, weight, bias, mean, r = ctx.saved_tensors
        if ctx.layers.explaining:
            return None, _LayerNormSlope.apply(slope, x, weight, mean, r), None, None, None
        wanted = list(ctx.needs_input_grad[1:4])
        return (
            None,
            *torch.ops.aten.native_layer_norm_backward(slope, x, x.shape[-1:], mean, r, weight, bias, wanted),
            None,
        )


def _layer_norm_slope(slope: Tensor, x: Tensor, mean: Tensor, r: Tensor, weight: Tensor | None) -> Tensor:
    options = (x.shape[-1:], mean, r, weight, None, [True, False, False])
    return torch.ops.aten.native_layer_norm_backward(slope, x, *options)[0]


class _LayerNormSlope(torch.autograd.Function):
    """r P (slope w), P the projection that takes away what is constant and what is along z.

    Of s = sum(change r P g), g = slope w: ds/dg = r P change, ds/dz = -r (change mean(g z) + g mean(change z)), and
    ds/dr = s / r; by z and r, x changes it by r P ds/dz - z r s / n.
    """

    @staticmethod
    def forward(ctx: Any, slope: Tensor, x: Tensor, weight: Tensor, mean: Tensor, r: Tensor) -> Tensor:
        ctx.save_for_backward(slope, x, weight, mean, r)
        return _layer_norm_slope(slope, x, mean, r, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, change: Tensor) -> Any:
        slope, x, weight, mean, r = ctx.saved_tensors
        z, g = (x - mean).mul_(r), slope * weight
        along, size = ((part * z).mean(-1, keepdim=True).mul_(r) for part in (change, g))
        back = _layer_norm_slope(change, x, mean, r, None)
        bent = (change * size).addcmul_(g, along)
        s = (g * back).mean(-1, keepdim=True)
        for_x = _layer_norm_slope(bent, x, mean, r, None).addcmul_(z, s.mul_(r)).neg_()
        return back * weight, for_x, back.mul(slope).flatten(0, -2).sum(0), None, None
