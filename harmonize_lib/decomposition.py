"""Contextual decomposition: what a group of pixels contributes to the logits, carried through the network as a pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import resolve_name

from harmonize_lib.errors import HarmonizeError
from harmonize_lib.tasks import Result, Task, check_numbers, logits_of, pick, prepare

EPSILON = 1e-20  # what decides the split of a bias where neither part has a say


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
    activations that vanish at 0 follow the rule of ReLU. Where a bias meets neither part (0/0) it is split by the
    group's share of the input's magnitude, instead of in halves: the whole image then leaves gamma = 0 and the empty
    group beta = 0, exactly.

    This project's extension, in no paper of the source: LayerNorm's mean is taken of each part and its variance is
    that of the full pass; a product of two parts shares the mixed term equally (squeeze-and-excite gates, queries
    times keys); softmax gives the weights of the full pass, so attention mixes both parts alike; constants that
    are added or joined (position embedding, class token) are biases.
    """
    x = prepare(model, images)
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
    own, rest = (part.detach().abs().flatten(1).sum(1) for part in (beta, gamma))
    logits = model(_split(beta, gamma, torch.where(own + rest > 0, own / (own + rest), 0.5)))
    if not isinstance(logits, Split):
        raise HarmonizeError("contextual decomposition lost the input: the logits depend on it by a softmax alone")
    if logits.beta.ndim != 2 or len(logits.beta) != len(beta):
        shape = tuple(logits.beta.shape)
        raise HarmonizeError(f"the model turns {len(beta)} images into {shape}: logits must be (N, K)")
    if not (logits.beta + logits.gamma).isfinite().all():
        raise HarmonizeError("the decomposed logits hold NaN or infinite values: check weights and images")
    return logits.beta, logits.gamma


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
    maps = torch.zeros_like(task.x[:, 0])
    with torch.no_grad():
        logits = logits_of(task.model, task.x)
        for part in task.chunks(len(groups)):
            masks = groups[part]
            group = masks[None, :, None]
            beta = (task.x[:, None] * group).flatten(0, 1)
            gamma = (task.x[:, None] * ~group).flatten(0, 1)
            values = pick(propagate(task.model, beta, gamma)[0], task.targets.repeat_interleave(len(masks)))
            maps += torch.einsum("ns,shw->nhw", values.unflatten(0, (-1, len(masks))), masks.to(values))
    return Result(maps, logits, steps=torch.full_like(task.targets, len(groups)), notes={"patch": patch})


class Split(Tensor):
    """A tensor in two parts that stand for their sum; torch's functions reach it through ``RULES``.

    Attributes
    ----------
    beta : Tensor
        The group's part.
    gamma : Tensor
        The rest.
    share : Tensor
        (N) the group's share of the input's magnitude, in [0, 1].
    """

    beta: Tensor
    gamma: Tensor
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
        path = resolve_name(function) or function.__name__
        name = path.removesuffix(".__get__").rpartition(".")[2]
        if name in METADATA:
            return function(args[0].beta, *args[1:], **(kwargs or {}))
        rule = RULES.get(name.strip("_"))
        if rule is None:
            raise HarmonizeError(f"contextual decomposition has no rule for {path}, which this network calls")
        result = rule(function, *args, **(kwargs or {}))
        if name.endswith("_") and not name.endswith("__"):  # in place
            args[0].beta, args[0].gamma = result.beta, result.gamma
            return args[0]
        return result


def _split(beta: Tensor, gamma: Tensor, share: Tensor) -> Split:
    split = torch.empty(beta.shape, device="meta").as_subclass(Split)
    split.beta, split.gamma, split.share = beta, gamma, share
    return split


def _alone(x: Split, *others: Any) -> None:
    if not isinstance(x, Split) or any(isinstance(other, Split) for other in others):
        raise HarmonizeError("contextual decomposition has no rule for weights that depend on the image")


def _per_row(share: Tensor, value: Tensor) -> Tensor:
    """Share of the image each row of ``value`` came from; an image's rows (its windows, say) lie together."""
    repeats, left = divmod(len(value), len(share))
    if left:
        shape = tuple(value.shape)
        raise HarmonizeError(f"contextual decomposition needs images along the first axis, not {shape}")
    return share.repeat_interleave(repeats).view(-1, *[1] * (value.ndim - 1))


def _with_bias(beta: Tensor, gamma: Tensor, bias: Tensor | float | None, share: Tensor) -> Split:
    """beta + r b, gamma + (1 - r) b with r = |beta| / (|beta| + |gamma|)."""
    if bias is None:
        return _split(beta, gamma, share)
    own = beta.abs()
    ratio = (own + EPSILON * _per_row(share, beta)) / (own + gamma.abs() + EPSILON)
    part = ratio * bias
    return _split(beta + part, gamma + (bias - part), share)


def _each(function: Callable[..., Any], x: Split, *args: Any, **kwargs: Any) -> Any:
    """Linear functions without a constant, and changes of shape: applied to both parts."""
    _alone(x, *args)
    beta, gamma = function(x.beta, *args, **kwargs), function(x.gamma, *args, **kwargs)
    if isinstance(beta, Tensor):
        return _split(beta, gamma, x.share)
    return tuple(_split(*parts, x.share) for parts in zip(beta, gamma, strict=True))


def _pad(
    function: Callable[..., Tensor], x: Split, pad: Any, mode: str = "constant", value: float | None = None
) -> Split:
    if value:
        raise HarmonizeError(f"contextual decomposition pads with zeros, not with {value}")
    return _each(function, x, pad, mode)


def _weighted(
    function: Callable[..., Tensor], x: Split, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Split:
    """Linear layers and convolutions."""
    _alone(x, weight)
    beta, gamma = (function(part, weight, None, *args, **kwargs) for part in (x.beta, x.gamma))
    if bias is not None and function is not F.linear:
        bias = bias.view(-1, *[1] * (weight.ndim - 2))
    return _with_bias(beta, gamma, bias, x.share)


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
    shape = (-1, *[1] * (x.beta.ndim - 2))
    return _with_bias(x.beta * scale.view(shape), x.gamma * scale.view(shape), offset.view(shape), x.share)


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
    scale = ((x.beta + x.gamma).var(axes, correction=0, keepdim=True) + eps).rsqrt()
    beta, gamma = ((part - part.mean(axes, keepdim=True)) * scale for part in (x.beta, x.gamma))
    if weight is not None:
        beta, gamma = beta * weight, gamma * weight
    return _with_bias(beta, gamma, bias, x.share)


def _max_pool(function: Callable[..., Any], x: Split, *args: Any, return_indices: bool = False, **kwargs: Any) -> Split:
    """Both parts at the place where their sum is largest."""
    _, index = function(x.beta + x.gamma, *args, **kwargs, return_indices=True)
    beta, gamma = (part.flatten(2).gather(2, index.flatten(2)).view_as(index) for part in (x.beta, x.gamma))
    return _split(beta, gamma, x.share)


def _activation(function: Callable[..., Tensor], x: Split, *args: Any, **kwargs: Any) -> Split:
    """f(beta), and f(beta + gamma) - f(beta): functions with f(0) = 0."""
    kwargs.pop("inplace", None)
    _alone(x, *args)
    beta = function(x.beta, *args, **kwargs)
    return _split(beta, function(x.beta + x.gamma, *args, **kwargs) - beta, x.share)


def _sigmoidal(function: Callable[..., Tensor], x: Split, *args: Any, **kwargs: Any) -> Split:
    """Each part's effect, averaged over whether the other is there; f(0) is a bias."""
    kwargs.pop("inplace", None)
    zero = function(torch.zeros_like(x.beta[:1]), *args, **kwargs)
    beta, gamma, both = (function(part, *args, **kwargs) for part in (x.beta, x.gamma, x.beta + x.gamma))
    return _with_bias((beta - zero + both - gamma) / 2, (gamma - zero + both - beta) / 2, zero, x.share)


def _softmax(function: Callable[..., Tensor], x: Split, *args: Any, **kwargs: Any) -> Tensor:
    return function(x.beta + x.gamma, *args, **kwargs)


def _attention(
    function: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Split:
    """The weights of the full pass mix both parts of the values."""
    if kwargs.get("dropout_p", 0):
        raise HarmonizeError("contextual decomposition needs attention without dropout: call model.eval() first")
    _alone(value, *args, *kwargs.values())  # type: ignore[arg-type]
    query, key = _whole(query), _whole(key)
    beta, gamma = (function(query, key, part, *args, **kwargs) for part in (value.beta, value.gamma))  # type: ignore[attr-defined]
    return _split(beta, gamma, value.share)  # type: ignore[attr-defined]


def _whole(x: Tensor) -> Tensor:
    return x.beta + x.gamma if isinstance(x, Split) else x


def _dropout(
    function: Callable[..., Tensor], x: Split, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Split:
    """The same units are dropped from both parts."""
    if not training:
        return x
    kept = function(torch.ones_like(x.beta), p, training)
    return _split(x.beta * kept, x.gamma * kept, x.share)


def _add(function: Any, a: Any, b: Any, *, alpha: float = 1) -> Split:
    b = b if alpha == 1 else b * alpha
    if isinstance(a, Split) and isinstance(b, Split):
        return _split(a.beta + b.beta, a.gamma + b.gamma, a.share)
    split, constant = (a, b) if isinstance(a, Split) else (b, a)
    return _with_bias(split.beta, split.gamma, constant, split.share)


def _subtract(function: Any, a: Any, b: Any, *, alpha: float = 1) -> Split:
    return _add(function, a, -alpha * b)


def _subtract_from(function: Any, a: Any, b: Any) -> Split:
    return _add(function, b, -1 * a)


def _product(function: Callable[..., Tensor], a: Any, b: Any) -> Split:
    """Bilinear functions; the mixed terms of two splits go to both in equal parts."""
    if isinstance(a, Split) and isinstance(b, Split):
        whole_a, whole_b = _whole(a), _whole(b)
        beta, gamma = (
            (function(part_a, whole_b) + function(whole_a, part_b)) / 2
            for part_a, part_b in ((a.beta, b.beta), (a.gamma, b.gamma))
        )
        return _split(beta, gamma, a.share)
    if isinstance(a, Split):
        return _split(function(a.beta, b), function(a.gamma, b), a.share)
    return _split(function(a, b.beta), function(a, b.gamma), b.share)


def _join(function: Callable[..., Tensor], parts: Any, *args: Any, **kwargs: Any) -> Split:
    """Constants among them are biases that meet neither part."""
    share = next(part.share for part in parts if isinstance(part, Split))
    splits = [
        part if isinstance(part, Split) else _with_bias(part * 0, part * 0, part, share) for part in parts
    ]
    beta, gamma = (function([getattr(split, side) for split in splits], *args, **kwargs) for side in ("beta", "gamma"))
    return _split(beta, gamma, share)


METADATA = set("shape ndim dtype device layout is_cuda size dim numel stride is_contiguous is_floating_point".split()) | {
    "__len__",
    "requires_grad",
}
LINEAR = (
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate mean sum "
    "flatten unflatten reshape view permute transpose t T mT movedim squeeze unsqueeze expand getitem unbind chunk split "
    "roll contiguous clone to float double neg div truediv narrow select pixel_shuffle pixel_unshuffle"
)
ACTIVATIONS = "relu relu6 leaky_relu prelu elu selu celu gelu silu mish hardswish hardtanh"
RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(LINEAR.split(), _each),
    **dict.fromkeys(ACTIVATIONS.split(), _activation),
    **dict.fromkeys("sigmoid tanh hardsigmoid".split(), _sigmoidal),
    **dict.fromkeys("linear conv1d conv2d conv3d".split(), _weighted),
    **dict.fromkeys("max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d".split(), _max_pool),
    **dict.fromkeys("dropout dropout1d dropout2d dropout3d".split(), _dropout),
    **dict.fromkeys("add radd iadd".split(), _add),
    **dict.fromkeys("sub subtract".split(), _subtract),
    **dict.fromkeys("mul multiply matmul bmm".split(), _product),
    **dict.fromkeys("cat concat stack".split(), _join),
    "rsub": _subtract_from,
    "pad": _pad,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "scaled_dot_product_attention": _attention,
}
