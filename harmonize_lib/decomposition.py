"""Contextual decomposition: what a group of pixels contributes to the logits, carried through the network as a pair."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name

from harmonize_lib.errors import HarmonizeError
from harmonize_lib.tasks import Result, Task, check_numbers, logits_of, pick, prepare

EPSILON = 1e-30  # makes 0/0 zero, with a finite gradient; lost in rounding elsewhere


def contextual_decomposition(model: nn.Module, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Split the logits into what a group of pixels contributes and what the rest does.

    Outside the group the input of beta is zero in the model's own units: the mean color its preprocessing subtracts.

    Parameters
    ----------
    model : nn.Module
        A ``Model``, or any module from float images to logits (N, K) made of functions that have a rule: ``RULES``.
    images : Tensor
        (N, C, H, W) uint8 source pixels, or float images for a plain module.
    masks : Tensor
        (N, H, W) bool, the group of each image.

    Returns
    -------
    tuple[Tensor, Tensor]
        beta and gamma, (N, K) each, in logits; their sum is the logits. Both carry the graph to the model's
        parameters where these require gradients.

    Raises
    ------
    HarmonizeError
        Masks that do not fit; a function without a rule, by its name; logits of a wrong shape, or NaN.

    References
    ----------
    Singh, Murdoch, Yu 2019, "Hierarchical interpretations for neural network predictions" (ACD), equations 5-11:
    linear, max pooling, ReLU. Murdoch, Liu, Yu 2018 (arXiv 1801.05453), section 3.2: sigmoid and tanh.

    Notes
    -----
    Beyond the papers. BatchNorm (running statistics) is affine and follows the linear rule. GELU, SiLU and other
    activations that vanish at 0 follow the rule of ReLU. A bias that meets neither part (0/0) is the rest's, as in
    ACD's code for BatchNorm, instead of half the group's: the empty group then has beta = 0, exactly. A group that
    leaves no rest has all of the logits.

    A bias is split in proportion to the parts, which jumps where both are near 0. On the zoo's MobileNet a change of
    the weights by their last bit moves a map by 0.1 to 0.2 % (median), on its ResNet by 0.0001 %.

    Every rule keeps the sum, so gamma is carried as what the full pass leaves beside beta; carrying it apart by its
    own rule gives the same (:mod:`harmonize_lib.literal_decomposition`, held against it in the tests and notebook 10).

    This project's extension, in no paper of the source: LayerNorm's mean is taken of each part and its variance is
    that of the full pass; a product of two parts shares the mixed term equally (squeeze-and-excite gates, queries
    times keys); softmax gives the weights of the full pass, so attention mixes both parts alike; constants that are
    added (position embedding) are biases; those that are joined (class token) are shared out by the group's part of
    the input's magnitude.
    """
    x = prepare(model, images)
    if not isinstance(masks, Tensor):
        raise HarmonizeError(f"masks must be a bool tensor (N, H, W), not {masks!r:.40}: not every data set has masks")
    if masks.dtype != torch.bool or masks.shape != (len(x), *x.shape[2:]):
        want = (len(x), *x.shape[2:])
        raise HarmonizeError(f"masks must be bool {want}, one group per image, not {masks.dtype} {tuple(masks.shape)}")
    group = masks[:, None].to(x.device)
    return propagate(model, x * group, x * ~group)


def propagate(model: nn.Module, beta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Carry any split of the input through the network.

    Parameters
    ----------
    model : nn.Module
        Any module made of functions that have a rule.
    beta : Tensor
        (N, C, H, W) float, the part asked about, in the model's own input space.
    gamma : Tensor
        (N, C, H, W) float, the rest; beta + gamma is the input.

    Returns
    -------
    tuple[Tensor, Tensor]
        beta and gamma of the logits, (N, K) each.

    Raises
    ------
    HarmonizeError
        A function without a rule, by its name; logits of a wrong shape, or NaN.
    """
    beta, logits = _through(model, beta, gamma, beta + gamma)
    logits_of(nn.Identity(), logits)
    return beta, logits - beta


def _through(model: nn.Module, beta: Tensor, gamma: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    own, rest = (part.detach().abs().flatten(1).sum(1) for part in (beta, gamma))
    logits = model(_split(beta, whole, torch.where(own + rest > 0, own / (own + rest), 0.5)))
    if not isinstance(logits, Split):
        raise HarmonizeError("contextual decomposition lost the input: the logits depend on it by a softmax alone")
    alone = ((own > 0) & (rest == 0)).view(-1, *[1] * (logits.whole.ndim - 1))
    return torch.where(alone, logits.whole, logits.beta), logits.whole


def patch_groups(height: int, width: int, patch: int) -> Tensor:
    """Squares that tile an image.

    Parameters
    ----------
    height : int
        Pixels.
    width : int
        Pixels.
    patch : int
        Side of a square; those at the right and lower border may be smaller.

    Returns
    -------
    Tensor
        (groups, H, W) bool, row by row; each pixel is in one.
    """
    rows, columns = torch.arange(height) // patch, torch.arange(width) // patch
    index = rows[:, None] * (int(columns[-1]) + 1) + columns
    return index == torch.arange(int(index.max()) + 1)[:, None, None]


def patch_contributions(task: Task, *, patch: int | None = None) -> Result:
    """Contextual decomposition of the target logit, one square of pixels at a time.

    Parameters
    ----------
    task : Task
        The images.
    patch : int | None
        Side of a square in pixels; None takes an eighth of the image's shorter side.

    Returns
    -------
    Result
        (n, H, W) maps: at each pixel, beta of the target for the square it is in. The squares' betas need not sum to
        the logit: what squares do together is in none of them.

    References
    ----------
    See :func:`contextual_decomposition`.
    """
    height, width = task.x.shape[2:]
    patch = max(1, min(height, width) // 8) if patch is None else patch
    check_numbers(1, patch=patch)
    groups = patch_groups(height, width, patch).to(task.x.device)
    betas, logits = [], []
    with torch.no_grad():
        for i, x in enumerate(task.x):
            beta, whole = _of_groups(task.model, x, groups, task.rows)
            logits.append(logits_of(nn.Identity(), whole))
            pick(whole, task.targets[i : i + 1])
            betas.append(beta[:, task.targets[i]])
    values = torch.stack(betas)
    maps = torch.einsum("ns,shw->nhw", values, groups.to(values))
    return Result(maps, torch.cat(logits), steps=torch.full_like(task.targets, len(groups)), notes={"patch": patch})


def _of_groups(model: nn.Module, x: Tensor, groups: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """beta (groups, K) of an image (C, H, W), and its logits (1, K): the groups share one full pass."""
    x = x[None]

    def split(group: Tensor) -> tuple[Tensor, Tensor]:
        beta, logits = _through(model, x * group, x * ~group, x)
        return beta[0], logits

    parts = [torch.func.vmap(split)(part) for part in groups.split(rows)]
    return torch.cat([beta for beta, _ in parts]), parts[0][1][0]


class Split(Tensor):
    """A tensor and a group's part of it; torch's functions reach it through ``RULES``.

    Attributes
    ----------
    beta : Tensor
        The group's part; the rest is gamma = whole - beta.
    whole : Tensor
        What the network itself computes there.
    share : Tensor
        (N) the group's share of the input's magnitude, in [0, 1].
    """

    beta: Tensor
    whole: Tensor
    share: Tensor

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer a call of a torch function that got a split tensor.

        Parameters
        ----------
        function : Any
            The function.
        types : Any
            Types of its tensors.
        args : Any
            Its arguments.
        kwargs : Any
            Its arguments by name.

        Returns
        -------
        Any
            What its rule gives.

        Raises
        ------
        HarmonizeError
            There is no rule.
        """
        path = _path(function)
        name = path.removesuffix(".__get__").rpartition(".")[2]
        if name in METADATA:
            return function(args[0].whole, *args[1:], **(kwargs or {}))
        rule = RULES.get(name.strip("_"))
        if rule is None:
            raise HarmonizeError(f"contextual decomposition has no rule for {path}, which this network calls")
        result = rule(function, *args, **(kwargs or {}))
        if name.endswith("_") and not name.endswith("__"):  # in place
            args[0].beta, args[0].whole = result.beta, result.whole
            return args[0]
        return result


@cache
def _path(function: Any) -> str:
    return resolve_name(function) or function.__name__


def _split(beta: Tensor, whole: Tensor, share: Tensor) -> Split:
    split = torch.empty(whole.shape, device="meta").as_subclass(Split)
    split.beta, split.whole, split.share = beta, whole, share
    return split


def _alone(x: Any, *others: Any) -> None:
    if not isinstance(x, Split) or any(isinstance(other, Split) for other in others):
        raise HarmonizeError("contextual decomposition has no rule for weights that depend on the image")


def _with_bias(beta: Tensor, whole: Tensor, bias: Tensor | float | None, share: Tensor) -> Split:
    """beta + r b with r = |beta| / (|beta| + |gamma|), 0 at 0/0; gamma gets the rest of b."""
    if bias is None:
        return _split(beta, whole, share)
    own = beta.abs()
    ratio = own.div_((whole + EPSILON - beta).abs_().add_(own))
    bias = torch.as_tensor(bias, dtype=whole.dtype, device=whole.device)
    return _split(torch.addcmul(beta, ratio, bias), whole + bias, share)


def _both(function: Callable[..., Any], x: Split, *args: Any, **kwargs: Any) -> Any:
    """Linear functions without a constant, changes of shape, and activations with f(0) = 0.

    For these gamma, the difference, is f(gamma), the same reshaped, and f(beta + gamma) - f(beta).
    """
    kwargs.pop("inplace", None)
    _alone(x, *args)
    beta, whole = function(x.beta, *args, **kwargs), function(x.whole, *args, **kwargs)
    if isinstance(whole, Tensor):
        return _split(beta, whole, x.share)
    return tuple(_split(*parts, x.share) for parts in zip(beta, whole, strict=True))


def _adaptive_average(function: Callable[..., Tensor], x: Split, size: Any) -> Split:
    """As a mean where one value is left: vmap has no fast way for the other."""
    if all(side == 1 for side in (size if isinstance(size, list | tuple) else [size])):
        return _both(torch.mean, x, (-2, -1), keepdim=True)
    return _both(function, x, size)


def _contiguous(function: Any, x: Split, **kwargs: Any) -> Split:
    return x


def _view(function: Any, x: Split, *shape: Any) -> Split:
    return _both(Tensor.reshape, x, *shape)


def _pad(
    function: Callable[..., Tensor], x: Split, pad: Any, mode: str = "constant", value: float | None = None
) -> Split:
    if value:
        raise HarmonizeError(f"contextual decomposition pads with zeros, not with {value}")
    return _both(function, x, pad, mode)


def _weighted(
    function: Callable[..., Tensor], x: Split, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Split:
    """Linear layers and convolutions."""
    _alone(x, weight)
    beta, whole = (function(part, weight, None, *args, **kwargs) for part in (x.beta, x.whole))
    if bias is not None:
        bias = bias.view(-1, *[1] * (weight.ndim - 2))
    return _with_bias(beta, whole, bias, x.share)


def _batch_norm(
    function: Any,
    x: Split,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Split:
    if training or mean is None or variance is None:
        raise HarmonizeError("contextual decomposition needs BatchNorm's running statistics: put it in eval mode")
    scale = (variance + eps).rsqrt() * (1 if weight is None else weight)
    offset = (0 if bias is None else bias) - mean * scale
    scale, offset = (value.view(-1, *[1] * (x.whole.ndim - 2)) for value in (scale, offset))
    return _with_bias(x.beta * scale, x.whole * scale, offset, x.share)


def _layer_norm(
    function: Any,
    x: Split,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Split:
    """Each part minus its own mean, over the deviation of the full pass."""
    axes = tuple(range(-len(normalized_shape), 0))
    scale = (x.whole.var(axes, correction=0, keepdim=True) + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    beta, whole = ((part - part.mean(axes, keepdim=True)) * scale for part in (x.beta, x.whole))
    return _with_bias(beta, whole, bias, x.share)


def _max_pool(function: Callable[..., Any], x: Split, *args: Any, return_indices: bool = False, **kwargs: Any) -> Split:
    """Both parts at the place where their sum is largest."""
    whole, index = function(x.whole, *args, **kwargs, return_indices=True)
    beta = x.beta.flatten(2).gather(2, index.flatten(2)).view(index.shape)
    return _split(beta, whole, x.share)


def _sigmoidal(function: Callable[..., Tensor], x: Split, *args: Any, **kwargs: Any) -> Split:
    """Each part's effect, averaged over whether the other is there; f(0) is a bias."""
    kwargs.pop("inplace", None)
    zero = function(torch.zeros_like(x.whole[:1]), *args, **kwargs)
    beta, gamma, whole = (function(part, *args, **kwargs) for part in (x.beta, x.whole - x.beta, x.whole))
    return _with_bias((beta - zero + whole - gamma) / 2, whole - zero, zero, x.share)


def _softmax(function: Callable[..., Tensor], x: Split, *args: Any, **kwargs: Any) -> Tensor:
    return function(x.whole, *args, **kwargs)


def _attention(
    function: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0,
    **kwargs: Any,
) -> Split:
    """The weights of the full pass mix both parts of the values."""
    if dropout_p or kwargs.get("is_causal") or kwargs.get("enable_gqa"):
        raise HarmonizeError("contextual decomposition has no rule for attention with dropout, causal or grouped")
    query, key = (part.whole if isinstance(part, Split) else part for part in (query, key))
    scale = kwargs.get("scale") or query.shape[-1] ** -0.5
    scores = query * scale @ key.transpose(-2, -1)
    return _product(torch.matmul, (scores if attn_mask is None else scores + attn_mask).softmax(-1), value)


def _dropout(
    function: Callable[..., Tensor], x: Split, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Split:
    """The same units are dropped from both parts."""
    if not training:
        return x
    kept = function(torch.ones_like(x.whole), p, training)
    return _split(x.beta * kept, x.whole * kept, x.share)


def _add(function: Any, a: Any, b: Any, *, alpha: float = 1) -> Split:
    b = b if alpha == 1 else b * alpha
    if isinstance(a, Split) and isinstance(b, Split):
        return _split(a.beta + b.beta, a.whole + b.whole, a.share)
    split, constant = (a, b) if isinstance(a, Split) else (b, a)
    return _with_bias(split.beta, split.whole, constant, split.share)


def _subtract(function: Any, a: Any, b: Any, *, alpha: float = 1) -> Split:
    return _add(function, a, -alpha * b)


def _subtract_from(function: Any, a: Any, b: Any) -> Split:
    return _add(function, b, -1 * a)


def _product(function: Callable[..., Tensor], a: Any, b: Any) -> Split:
    """Bilinear functions; the mixed terms of two splits go to both parts equally."""
    if isinstance(a, Split) and isinstance(b, Split):
        beta = (function(a.beta, b.whole) + function(a.whole, b.beta)) / 2
        return _split(beta, function(a.whole, b.whole), a.share)
    if isinstance(a, Split):
        return _split(function(a.beta, b), function(a.whole, b), a.share)
    return _split(function(a, b.beta), function(a, b.whole), b.share)


def _join(function: Callable[..., Tensor], parts: Any, *args: Any, **kwargs: Any) -> Split:
    """Constants among them are shared out like the input."""
    share = next(part.share for part in parts if isinstance(part, Split))
    splits = [x if isinstance(x, Split) else _split(share.view(-1, *[1] * (x.ndim - 1)) * x, x, share) for x in parts]
    beta, whole = (function([getattr(split, side) for split in splits], *args, **kwargs) for side in ("beta", "whole"))
    return _split(beta, whole, share)


METADATA: tuple[str, ...] = (
    "shape",
    "ndim",
    "dtype",
    "device",
    "layout",
    "is_cuda",
    "size",
    "dim",
    "numel",
    "is_floating_point",
)
METADATA += ("__len__", "requires_grad")
POOLING = tuple(f"{kind}_pool{axes}d" for kind in ("avg", "adaptive_avg", "max", "adaptive_max") for axes in (1, 2, 3))
LINEAR = (
    *(name for name in POOLING if "avg" in name),
    *("interpolate", "mean", "sum", "neg", "div", "truediv", "clone", "to", "float", "double"),
    *("flatten", "unflatten", "reshape", "permute", "transpose", "t", "T", "mT", "movedim", "squeeze", "unsqueeze"),
    *("expand", "getitem", "select", "narrow", "unbind", "chunk", "split", "roll", "pixel_shuffle", "pixel_unshuffle"),
)
VANISHING: tuple[str, ...] = (
    "relu",
    "relu6",
    "leaky_relu",
    "prelu",
    "elu",
    "selu",
    "celu",
    "gelu",
    "silu",
    "mish",
    "hardswish",
)
VANISHING += ("hardtanh",)  # ReLU6 in its general form; all of them are 0 at 0
RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(LINEAR + VANISHING, _both),
    **dict.fromkeys(("sigmoid", "tanh", "hardsigmoid"), _sigmoidal),
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), _weighted),
    **dict.fromkeys((name for name in POOLING if "max" in name), _max_pool),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), _dropout),
    **dict.fromkeys(("add", "radd", "iadd"), _add),
    **dict.fromkeys(("sub", "subtract"), _subtract),
    **dict.fromkeys(("mul", "multiply", "matmul", "bmm"), _product),
    **dict.fromkeys(("cat", "concat", "stack"), _join),
    "adaptive_avg_pool2d": _adaptive_average,
    "rsub": _subtract_from,
    "contiguous": _contiguous,
    "view": _view,
    "pad": _pad,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "scaled_dot_product_attention": _attention,
}
