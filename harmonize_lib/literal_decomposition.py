"""Contextual decomposition written out: beta and gamma carried apart, each by the papers' own rule for it.

Slow and literal: no part is ever the difference of a sum and the other part, except where a rule says so (ReLU).
The decomposition that is used is held against it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import resolve_name

from harmonize_lib.decomposition import LINEAR, METADATA, VANISHING
from harmonize_lib.errors import HarmonizeError


def decompose(model: nn.Module, x: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Split the logits into what a group of pixels contributes and what the rest does, both carried by their rules.

    Parameters
    ----------
    model : nn.Module
        In eval mode, made of functions that have a rule.
    x : Tensor
        (N, C, H, W) float, the network's own input; no image is zero everywhere.
    masks : Tensor
        (N, H, W) bool, the group of each image.

    Returns
    -------
    tuple[Tensor, Tensor]
        beta and gamma, (N, K) each. That they sum to the logits is not assumed. The whole image has no exception, as
        it has in :func:`harmonize_lib.decomposition.contextual_decomposition`.

    Raises
    ------
    HarmonizeError
        A function without a rule, by its name.

    References
    ----------
    See :func:`harmonize_lib.decomposition.contextual_decomposition`.
    """
    group = masks[:, None]
    size = x.abs().sum((1, 2, 3))
    logits = model(_pair(x * group, x * ~group, (x * group).abs().sum((1, 2, 3)) / size))
    return logits.beta, logits.gamma


class _Pair(Tensor):
    beta: Tensor
    gamma: Tensor
    share: Tensor

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        path = (resolve_name(function) or function.__name__).removesuffix(".__get__").rpartition(".")[2]
        result = _propagate(path.strip("_"), function, args, kwargs or {})
        if path.endswith("_") and not path.endswith("__"):  # in place
            args[0].beta, args[0].gamma = result.beta, result.gamma
        return result


def _pair(beta: Tensor, gamma: Tensor, share: Tensor) -> _Pair:
    both = torch.empty(beta.shape, device="meta").as_subclass(_Pair)
    both.beta, both.gamma, both.share = beta, gamma, share
    return both


def _split_bias(beta: Tensor, gamma: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """ACD, equations 5 and 6; where both parts are 0 the bias is the rest's."""
    total = beta.abs() + gamma.abs()
    own = torch.where(total > 0, beta.abs() / total, 0)
    rest = torch.where(total > 0, gamma.abs() / total, 1)
    return beta + own * bias, gamma + rest * bias


def _propagate(name: str, function: Any, args: Any, kwargs: Any) -> Any:
    a = next((arg for arg in args if isinstance(arg, _Pair)), None)
    if name in MANY:
        return MANY[name](function, *args, **kwargs)
    if a is None:
        raise HarmonizeError(f"contextual decomposition has no literal rule for {name}")
    if name in METADATA or name == "len":
        return function(a.beta, *args[1:])
    b, c, share = a.beta, a.gamma, a.share
    if name in ("linear", "conv1d", "conv2d", "conv3d"):
        bias = args[2] if len(args) > 2 else kwargs.pop("bias", None)
        b, c = (function(part, args[1], None, *args[3:], **kwargs) for part in (b, c))
        if bias is not None:
            b, c = _split_bias(b, c, bias.view(-1, *[1] * (args[1].ndim - 2)))
        return _pair(b, c, share)
    if name == "batch_norm":  # code of ACD: the bias is BN(0)
        weights = {key: kwargs[key] for key in ("weight", "bias", "eps")}
        normalize = [F.batch_norm(part, *args[1:3], **weights) for part in (b, c, torch.zeros_like(b))]
        return _pair(*_split_bias(normalize[0] - normalize[2], normalize[1] - normalize[2], normalize[2]), share)
    if name == "layer_norm":
        weight, bias, eps = args[2:] if len(args) > 3 else (kwargs["weight"], kwargs["bias"], kwargs["eps"])
        deviation = ((b + c).var(-1, correction=0, keepdim=True) + eps).sqrt()
        b, c = (weight * (part - part.mean(-1, keepdim=True)) / deviation for part in (b, c))
        return _pair(*_split_bias(b, c, bias), share)
    kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
    if name in VANISHING:
        own, both = (function(part, *args[1:], **kwargs) for part in (b.clone(), b + c))
        return _pair(own, both - own, share)
    if name in ("sigmoid", "hardsigmoid", "tanh"):  # ACD's three terms with the constant in the middle
        zero = function(torch.zeros_like(b))
        own = (function(b) - zero + function(b + c) - function(c)) / 2
        rest = (function(c) - zero + function(b + c) - function(b)) / 2
        return _pair(*_split_bias(own, rest, zero), share)
    if "max_pool" in name:
        _, index = function(b + c, *args[1:], **{**kwargs, "return_indices": True})
        b, c = (part.flatten(2).gather(2, index.flatten(2)).view_as(index) for part in (b, c))
        return _pair(b, c, share)
    if name == "softmax":
        return function(b + c, *args[1:], **kwargs)
    if "dropout" in name or name == "contiguous":
        return a
    if name not in (*LINEAR, "view", "pad"):
        raise HarmonizeError(f"contextual decomposition has no literal rule for {name}")
    function = Tensor.reshape if name == "view" else function
    b, c = function(b, *args[1:], **kwargs), function(c, *args[1:], **kwargs)
    return (
        _pair(b, c, share) if isinstance(b, Tensor) else tuple(_pair(*parts, share) for parts in zip(b, c, strict=True))
    )


def _join(function: Any, parts: Any, *args: Any, **kwargs: Any) -> _Pair:
    share = next(part.share for part in parts if isinstance(part, _Pair))
    own, rest = (value.view(-1, *[1] * (parts[0].ndim - 1)) for value in (share, 1 - share))
    betas = [part.beta if isinstance(part, _Pair) else own * part for part in parts]
    gammas = [part.gamma if isinstance(part, _Pair) else rest * part for part in parts]
    return _pair(function(betas, *args, **kwargs), function(gammas, *args, **kwargs), share)


def _add(function: Any, a: Any, b: Any, *, alpha: float = 1) -> _Pair:
    b = _product(torch.mul, b, alpha) if isinstance(b, _Pair) else b * alpha
    if isinstance(a, _Pair) and isinstance(b, _Pair):
        return _pair(a.beta + b.beta, a.gamma + b.gamma, a.share)
    a, b = (a, b) if isinstance(a, _Pair) else (b, a)
    return _pair(*_split_bias(a.beta, a.gamma, torch.as_tensor(b).to(a.beta)), a.share)


def _subtract(function: Any, a: Any, b: Any, *, alpha: float = 1) -> _Pair:
    return _add(function, a, b, alpha=-alpha)


def _subtract_from(function: Any, a: Any, b: Any) -> _Pair:
    return _add(function, b, a, alpha=-1)


def _product(function: Any, a: Any, b: Any) -> _Pair:
    if isinstance(a, _Pair) and isinstance(b, _Pair):
        mixed = function(a.beta, b.gamma) + function(a.gamma, b.beta)
        return _pair(function(a.beta, b.beta) + mixed / 2, function(a.gamma, b.gamma) + mixed / 2, a.share)
    if isinstance(a, _Pair):
        return _pair(function(a.beta, b), function(a.gamma, b), a.share)
    return _pair(function(a, b.beta), function(a, b.gamma), b.share)


def _attention(function: Any, query: _Pair, key: _Pair, value: _Pair, attn_mask: Any = None, **kwargs: Any) -> _Pair:
    beta, gamma = (
        function(query.beta + query.gamma, key.beta + key.gamma, part, attn_mask, **kwargs)
        for part in (value.beta, value.gamma)
    )
    return _pair(beta, gamma, value.share)


MANY: dict[str, Callable[..., _Pair]] = {
    **dict.fromkeys(("cat", "concat", "stack"), _join),
    **dict.fromkeys(("add", "radd", "iadd"), _add),
    **dict.fromkeys(("sub", "subtract"), _subtract),
    **dict.fromkeys(("mul", "multiply", "matmul", "bmm"), _product),
    "rsub": _subtract_from,
    "scaled_dot_product_attention": _attention,
}
