"""Layers whose second derivatives cost what first ones do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class DoubleBackward(TorchFunctionMode):
    """Within this context a network computes the same, and its input gradient is cheap to differentiate.

    ReLU, max pooling and BatchNorm in eval mode have no curvature, yet PyTorch carries zeros back through the network
    for it; its second derivative of a convolution goes group by group. Under autocast nothing is changed.

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
        if func not in (F.relu, F.max_pool2d, F.batch_norm, F.conv2d):
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
            return _Convolution.apply(self, *args)
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
