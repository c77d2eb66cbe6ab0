"""The oracle of contextual decomposition: beta and gamma carried apart, each by the papers' own rule for it.

Slow and literal: no part is ever the difference of a sum and the other part, except where a rule says so (ReLU).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import resolve_name


class Pair(Tensor):
    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = resolve_name(function).removesuffix(".__get__").rpartition(".")[2].strip("_")
        return propagate(name, function, args, kwargs or {})


def pair(beta: Tensor, gamma: Tensor, share: Tensor) -> Pair:
    both = torch.empty(beta.shape, device="meta").as_subclass(Pair)
    both.beta, both.gamma, both.share = beta, gamma, share
    return both


def split_bias(beta: Tensor, gamma: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """ACD, equations 5 and 6; where both parts are 0 the bias is the rest's."""
    total = beta.abs() + gamma.abs()
    own = torch.where(total > 0, beta.abs() / total, 0)
    rest = torch.where(total > 0, gamma.abs() / total, 1)
    return beta + own * bias, gamma + rest * bias


def propagate(name: str, function: Any, args: Any, kwargs: Any) -> Any:
    a = next((arg for arg in args if isinstance(arg, Pair)), None)
    if name in ("shape", "ndim", "dim", "size", "device", "dtype"):
        return function(a.beta, *args[1:])
    if name in ("cat", "scaled_dot_product_attention", "add", "mul", "matmul"):
        return MANY[name](function, *args, **kwargs)
    b, c, share = a.beta, a.gamma, a.share
    if name in ("conv2d", "linear"):
        bias = args[2]
        b, c = (function(part, args[1], None, *args[3:]) for part in (b, c))
        if bias is not None:
            b, c = split_bias(b, c, bias if name == "linear" else bias.view(1, -1, 1, 1))
        return pair(b, c, share)
    if name == "batch_norm":  # code of ACD: the bias is BN(0)
        weights = {key: kwargs[key] for key in ("weight", "bias", "eps")}
        normalize = [F.batch_norm(part, *args[1:3], **weights) for part in (b, c, torch.zeros_like(b))]
        return pair(*split_bias(normalize[0] - normalize[2], normalize[1] - normalize[2], normalize[2]), share)
    if name == "layer_norm":
        weight, bias, eps = args[2:] if len(args) > 3 else (kwargs["weight"], kwargs["bias"], kwargs["eps"])
        deviation = ((b + c).var(-1, correction=0, keepdim=True) + eps).sqrt()
        b, c = (weight * (part - part.mean(-1, keepdim=True)) / deviation for part in (b, c))
        return pair(*split_bias(b, c, bias), share)
    if name in ("relu", "gelu", "silu", "hardtanh", "hardswish"):
        kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
        return pair(
            function(b, *args[1:], **kwargs),
            function(b + c, *args[1:], **kwargs) - function(b, *args[1:], **kwargs),
            share,
        )
    if name in ("sigmoid", "hardsigmoid"):  # ACD's three terms with the constant in the middle
        zero = function(torch.zeros_like(b))
        own = (function(b) - zero + function(b + c) - function(c)) / 2
        rest = (function(c) - zero + function(b + c) - function(b)) / 2
        return pair(*split_bias(own, rest, zero), share)
    if name in ("max_pool2d", "adaptive_max_pool2d"):
        _, index = function(b + c, *args[1:], **{**kwargs, "return_indices": True})
        b, c = (part.flatten(2).gather(2, index.flatten(2)).view_as(index) for part in (b, c))
        return pair(b, c, share)
    if name == "softmax":
        return function(b + c, *args[1:], **kwargs)
    if name in ("dropout", "contiguous"):
        return a
    if name not in ALIKE:
        raise NotImplementedError(name)
    function = Tensor.reshape if name == "view" else function
    b, c = function(b, *args[1:], **kwargs), function(c, *args[1:], **kwargs)
    return (
        pair(b, c, share) if isinstance(b, Tensor) else tuple(pair(*parts, share) for parts in zip(b, c, strict=True))
    )


ALIKE = ("adaptive_avg_pool2d", "avg_pool2d", "flatten", "reshape", "view", "permute", "transpose", "unsqueeze")
ALIKE += ("expand", "getitem", "unbind", "mean", "pad", "roll", "clone")


def cat(function: Any, parts: Any, dim: int) -> Pair:
    share = next(part.share for part in parts if isinstance(part, Pair))
    betas = [p.beta if isinstance(p, Pair) else share.view(-1, 1, 1) * p for p in parts]
    gammas = [p.gamma if isinstance(p, Pair) else (1 - share).view(-1, 1, 1) * p for p in parts]
    return pair(torch.cat(betas, dim), torch.cat(gammas, dim), share)


def add(function: Any, a: Any, b: Any) -> Pair:
    if isinstance(a, Pair) and isinstance(b, Pair):
        return pair(a.beta + b.beta, a.gamma + b.gamma, a.share)
    a, b = (a, b) if isinstance(a, Pair) else (b, a)
    return pair(*split_bias(a.beta, a.gamma, b), a.share)


def product(function: Any, a: Any, b: Any) -> Pair:
    if isinstance(a, Pair) and isinstance(b, Pair):
        mixed = function(a.beta, b.gamma) + function(a.gamma, b.beta)
        return pair(function(a.beta, b.beta) + mixed / 2, function(a.gamma, b.gamma) + mixed / 2, a.share)
    if isinstance(a, Pair):
        return pair(function(a.beta, b), function(a.gamma, b), a.share)
    return pair(function(a, b.beta), function(a, b.gamma), b.share)


def attention(function: Any, query: Pair, key: Pair, value: Pair, attn_mask: Any = None, **kwargs: Any) -> Pair:
    parts = [
        function(query.beta + query.gamma, key.beta + key.gamma, part, attn_mask) for part in (value.beta, value.gamma)
    ]
    return pair(*parts, value.share)


MANY = {"cat": cat, "add": add, "mul": product, "matmul": product, "scaled_dot_product_attention": attention}


def decompose(model: nn.Module, x: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """beta and gamma of the logits for groups (N, H, W) of inputs (N, C, H, W)."""
    group = masks[:, None]
    size = x.abs().sum((1, 2, 3))
    logits = model(pair(x * group, x * ~group, (x * group).abs().sum((1, 2, 3)) / size))
    return logits.beta, logits.gamma
