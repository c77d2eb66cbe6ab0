"""Attribution by gradients: plain, smoothed, along paths, and with the rules of guided backpropagation and DeepLIFT."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath, activations
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from torch import Tensor, nn
from torch.nn import functional as F

from harmonize_lib import shapes
from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.tasks import (
    Result,
    Task,
    check_numbers,
    gradient,
    logits_of,
    pick,
    prepare,
    resolve_baseline,
)

RULES = ("gausslegendre", "trapezoid", "riemann_left", "riemann_midpoint", "riemann_right")
ACTIVATIONS = (
    "ReLU ReLU6 LeakyReLU PReLU ELU SELU CELU GELU SiLU Mish Softplus Sigmoid Tanh Hardtanh Hardswish Hardsigmoid"
)
LINEAR = (
    "Conv1d Conv2d ConvTranspose2d Linear BatchNorm1d BatchNorm2d AvgPool2d AdaptiveAvgPool2d Upsample ZeroPad2d "
    "Identity Flatten Unflatten Dropout Dropout2d"
)
PATCHED = (
    *(getattr(nn, name) for name in ACTIVATIONS.split()),
    *(kind for kind in vars(activations).values() if isinstance(kind, type) and issubclass(kind, nn.Module)),
    nn.MaxPool2d,
)
AFFINE = (*(getattr(nn, name) for name in LINEAR.split()), FastAdaptiveAvgPool, DropPath)
NONLINEAR = re.compile("elu|silu|swish|mish|sigmoid|tanh|softmax|softplus|scaleddot|clamp|threshold|^erf$|^exp$")
NEAR = 1e-6  # below this difference of inputs DeepLIFT's ratio is the gradient
WITHOUT_RULE = re.compile(f"{NONLINEAR.pattern}|layernorm|groupnorm|^pow|sqrt|max")
PRODUCTS = ("mul", "div", "mm", "bmm", "addmm", "baddbmm")  # of two values that both depend on the input
COMPLETENESS = 1e-3  # relative gap above which DeepLIFT met an operation it has no rule for


def saliency(task: Task) -> Result:
    """Gradient of the target logit.

    Parameters
    ----------
    task : Task
        The images.

    Returns
    -------
    Result
        Gradients; their magnitudes are summed over channels unless told otherwise.

    References
    ----------
    Simonyan, Vedaldi, Zisserman 2013 (arXiv 1312.6034), section 3.

    Notes
    -----
    The paper takes the largest magnitude over channels, here it is their sum.
    """
    slope, logits = gradient(task.model, task.x, task.targets)
    return Result(slope, logits)


def input_x_gradient(task: Task) -> Result:
    """Input times gradient, in the model's own units: zero is the mean color.

    Parameters
    ----------
    task : Task
        The images.

    Returns
    -------
    Result
        Attributions. The gap to f(x) - f(0) is recorded, and zero only for networks without biases.

    References
    ----------
    Shrikumar et al. 2016 (arXiv 1605.01713), section 3.
    """
    slope, logits = gradient(task.model, task.x, task.targets)
    attributions = task.x * slope
    with torch.no_grad():
        empty = logits_of(task.model, torch.zeros_like(task.x[:1]))
    difference = pick(logits, task.targets) - pick(empty, task.targets)
    return Result(attributions, logits, _total(attributions) - difference, difference)


def smoothgrad(task: Task, *, samples: int = 16, noise: float = 0.15) -> Result:
    """Mean gradient over noisy copies.

    Parameters
    ----------
    task : Task
        The images.
    samples : int
        Noisy copies per image, at least 1.
    noise : float
        Standard deviation as a share of the image's range (largest minus smallest input), at least 0.

    Returns
    -------
    Result
        Mean gradients; magnitudes are taken after the mean.

    References
    ----------
    Smilkov et al. 2017 (arXiv 1706.03825), section 3.

    Notes
    -----
    All images share the same draws, scaled to each image's range, so that a map depends on its image alone.
    """
    return _smooth(task, samples, noise, 1)


def smoothgrad_squared(task: Task, *, samples: int = 16, noise: float = 0.15) -> Result:
    """Mean squared gradient over noisy copies.

    Parameters
    ----------
    task : Task
        The images.
    samples : int
        Noisy copies per image, at least 1.
    noise : float
        Standard deviation as a share of the image's range, at least 0.

    Returns
    -------
    Result
        Mean squares, not negative.

    References
    ----------
    Hooker et al. 2019 (arXiv 1806.10758), section 3.3; what BAM's code calls SmoothGrad.

    Notes
    -----
    All images share the same draws, as in :func:`smoothgrad`.
    """
    return _smooth(task, samples, noise, 2)


def integrated_gradients(
    task: Task,
    *,
    baseline: str | Tensor = "mean",
    steps: int = 32,
    rule: str = "gausslegendre",
    tolerance: float | None = 0.01,
    max_steps: int = 128,
) -> Result:
    """Gradient integrated along the straight path from a baseline.

    Parameters
    ----------
    task : Task
        The images.
    baseline : str | Tensor
        See :func:`harmonize_lib.tasks.resolve_baseline`.
    steps : int
        Gradients per image to begin with, at least 1.
    rule : str
        Quadrature: ``"gausslegendre"``, ``"trapezoid"`` (both ends included), ``"riemann_left"``,
        ``"riemann_midpoint"``, ``"riemann_right"``.
    tolerance : float | None
        Images whose completeness gap exceeds this share of \\|f(x) - f(baseline)\\| get twice the steps, again and
        again; None keeps ``steps``.
    max_steps : int
        Most gradients per image in one integral.

    Returns
    -------
    Result
        Attributions with their completeness gap and the steps each image took.

    References
    ----------
    Sundararajan, Taly, Yan 2017 (arXiv 1703.01365), equation 1 and section 5.

    Notes
    -----
    The paper fixes the steps for all images.
    """
    check_numbers(1, steps=steps, max_steps=max_steps)
    if tolerance is not None:
        check_numbers(0.0, tolerance=tolerance)
    start = resolve_baseline(task, baseline)
    logits, difference = _ends(task, start)
    attributions = _path(task, start, steps, rule)
    missing = _total(attributions) - difference
    taken = torch.full_like(task.targets, steps)
    while tolerance is not None and steps < max_steps:
        steps = min(2 * steps, max_steps)
        again = (missing.abs() > tolerance * difference.abs()).nonzero().flatten()
        if len(again) == 0:
            break
        part = Task(task.model, task.images, task.x[again], task.targets[again], task.rows, task.seed)
        attributions[again] = _path(part, start if len(start) == 1 else start[again], steps, rule)
        missing[again] = _total(attributions[again]) - difference[again]
        taken[again] = steps
    return Result(attributions, logits, missing, difference, taken, {"quadrature": rule})


def integrated_gradients_smoothgrad(
    task: Task,
    *,
    baseline: str | Tensor = "mean",
    steps: int = 16,
    rule: str = "gausslegendre",
    samples: int = 8,
    noise: float = 0.15,
) -> Result:
    """Mean integrated gradients over noisy copies.

    Parameters
    ----------
    task : Task
        The images.
    baseline : str | Tensor
        See :func:`harmonize_lib.tasks.resolve_baseline`; taken from the clean image.
    steps : int
        Gradients per noisy copy, at least 1.
    rule : str
        Quadrature, as in :func:`integrated_gradients`.
    samples : int
        Noisy copies per image, at least 1.
    noise : float
        Standard deviation as a share of the image's range, at least 0.

    Returns
    -------
    Result
        Attributions; the gap is measured against mean f(noisy copy) - f(baseline).

    References
    ----------
    Smilkov et al. 2017 (arXiv 1706.03825), section 4; Sundararajan, Taly, Yan 2017 (arXiv 1703.01365).
    """
    check_numbers(1, steps=steps, samples=samples)
    check_numbers(0.0, noise=noise)
    start = resolve_baseline(task, baseline)[:, None]
    ends = _noisy(task, samples, noise)
    nodes, weights = (values.to(task.x) for values in quadrature(rule, steps))

    def points(part: slice) -> tuple[Tensor, Tensor]:
        pairs = torch.arange(part.start, part.stop, device=task.x.device)
        way = ends(slice(part.start // steps, (part.stop - 1) // steps + 1))
        way = way[:, pairs // steps - part.start // steps] - start
        step = pairs % steps
        return start + _column(nodes[step]) * way, _column(weights[step]) / samples * way

    attributions = _accumulate(task, samples * steps, points)
    with torch.no_grad():
        noisy = torch.zeros(len(task.x), device=task.x.device)
        for part in task.chunks(samples):
            rows = ends(part)
            values = pick(logits_of(task.model, rows.flatten(0, 1)), task.targets.repeat_interleave(rows.shape[1]))
            noisy += values.unflatten(0, rows.shape[:2]).sum(1) / samples
        difference = noisy - pick(logits_of(task.model, start[:, 0]), task.targets)
    taken = torch.full_like(task.targets, samples * steps)
    missing = _total(attributions) - difference
    return Result(attributions, None, missing, difference, taken, {"quadrature": rule})


def expected_gradients(task: Task, *, references: Tensor | None = None, samples: int = 64) -> Result:
    """Integrated gradients averaged over a distribution of baselines.

    Parameters
    ----------
    task : Task
        The images.
    references : Tensor | None
        (R, C, H, W) images like the input images, from the training set. None takes one image of each of the 100
        (object, scene) pairs of shapes-on-scenes' training set, for a ``Model`` and images of its shape only.
    samples : int
        Pairs (reference, position on the path) per image, at least 1.

    Returns
    -------
    Result
        Attributions; the gap is measured against f(x) - mean f(references drawn) and shrinks with ``samples``.

    Raises
    ------
    HarmonizeError
        References are missing or of another shape.

    References
    ----------
    Erion et al. 2021 (arXiv 1906.10670), section "Expected gradients".

    Notes
    -----
    Departures: references are drawn without replacement as long as they last; positions are stratified (one per
    1/samples of the path, in random order); all images share the same pairs.
    """
    check_numbers(1, samples=samples)
    shape = tuple(task.x.shape[1:])
    notes = {"baseline": "references", "quadrature": "stratified Monte Carlo"}
    if references is None:
        if shape != (3, shapes.SIZE, shapes.SIZE) or not hasattr(task.model, "preprocess"):
            raise HarmonizeError("expected_gradients needs images to compare with: pass references=training images")
        references = _default_references()
        notes["references"] = f"shapes-on-scenes, train, seed 0, first {len(references)}"
    if references.ndim != 4 or references.shape[1:] != task.images.shape[1:] or len(references) == 0:
        raise HarmonizeError(f"references must be images (R, {str(shape)[1:-1]}), not {tuple(references.shape)}")
    generator = task.generator()
    rounds = [torch.randperm(len(references), generator=generator) for _ in range(-(-samples // len(references)))]
    chosen = torch.cat(rounds)[:samples]
    places = torch.randperm(samples, generator=generator) + torch.rand(samples, generator=generator)
    nodes = (places / samples).to(task.x)

    def points(part: slice) -> tuple[Tensor, Tensor]:
        start = prepare(task.model, references[chosen[part]])[None]
        way = task.x[:, None] - start
        return start + _column(nodes[part]) * way, way / samples

    attributions = _accumulate(task, samples, points)
    with torch.no_grad():
        logits = logits_of(task.model, task.x)
        empty = torch.cat(
            [logits_of(task.model, prepare(task.model, references[part])) for part in chosen.split(task.rows)]
        )
    difference = pick(logits, task.targets) - pick(empty.mean(0, keepdim=True), task.targets)
    taken = torch.full_like(task.targets, samples)
    return Result(attributions, logits, _total(attributions) - difference, difference, taken, notes)


def guided_backprop(task: Task) -> Result:
    """Gradient that passes a ReLU only where both its input and the gradient are positive.

    Parameters
    ----------
    task : Task
        The images.

    Returns
    -------
    Result
        Guided gradients.

    Raises
    ------
    HarmonizeError
        The network applies an activation outside its modules, where the rule does not reach.

    References
    ----------
    Springenberg et al. 2014 (arXiv 1412.6806), section 3.4.
    """
    calls = 0

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal calls
        calls += 1
        output.register_hook(lambda slope: slope.clamp(min=0))

    x = task.x.detach().requires_grad_()
    with _hooks(task.model, (nn.ReLU, nn.ReLU6), hook):
        logits = logits_of(task.model, x)
    names = [name for name, _ in _operations(logits, x) if NONLINEAR.search(name)]
    others = [name for name in names if name not in ("relu", "hardtanh")]
    if others or len(names) > calls:
        line = f"an activation outside its modules ({others[0] if others else names[0]})"
        raise HarmonizeError(f"guided_backprop patches ReLU modules, but the network applies {line}")
    (slope,) = torch.autograd.grad(pick(logits, task.targets).sum(), x)
    return Result(slope, logits.detach())


def guided_reason(model: nn.Module) -> str | None:
    """Tell why guided backpropagation is not defined for a network.

    Parameters
    ----------
    model : nn.Module
        The network.

    Returns
    -------
    str or None
        The reason, from the modules present.
    """
    for module in model.modules():
        kind = type(module)
        if "activation" in kind.__module__ and not isinstance(module, nn.ReLU | nn.ReLU6):
            return f"guided backpropagation is a rule for ReLU, and this network has {kind.__name__}"
    return None


def deeplift(task: Task, *, baseline: str | Tensor = "mean") -> Result:
    """DeepLIFT with the Rescale rule.

    An activation's slope is replaced by the ratio of the differences of its output and its input to those under the
    baseline; a max pooling splits its difference between the place of the image's and of the baseline's maximum.

    Parameters
    ----------
    task : Task
        The images.
    baseline : str | Tensor
        See :func:`harmonize_lib.tasks.resolve_baseline`.

    Returns
    -------
    Result
        Attributions with their completeness gap.

    Raises
    ------
    HarmonizeError
        The attributions miss f(x) - f(baseline): the network holds an operation without a rule.

    References
    ----------
    Shrikumar, Greenside, Kundaje 2017 (arXiv 1704.02685), section 3.5.1 (linear and Rescale rule).

    Notes
    -----
    The paper's rule for ReLU is applied to any elementwise activation. The baseline passes through the network once,
    not once per image as in captum, and modules that are called repeatedly are told apart.
    """
    start = resolve_baseline(task, baseline)
    before: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        before.append((args[0].clone(), output.clone()))

    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return _rescale(module, args[0], output, *next(queue))

    with torch.no_grad(), _hooks(task.model, PATCHED, keep):
        empty = logits_of(task.model, start)
    queue = iter(before)
    x = task.x.detach().requires_grad_()
    with _hooks(task.model, PATCHED, replace):
        logits = logits_of(task.model, x)
    for name, inputs in _operations(logits, x):
        if WITHOUT_RULE.search(name) or (name in PRODUCTS and inputs > 1):
            raise HarmonizeError(f"DeepLIFT has no rule for what this network does outside its modules: {name}")
    (slope,) = torch.autograd.grad(pick(logits, task.targets).sum(), x)
    logits = logits.detach()
    attributions = (task.x - start) * slope
    difference = pick(logits, task.targets) - pick(empty, task.targets)
    missing = _total(attributions) - difference
    rounding = 1e-5 * attributions.abs().sum((1, 2, 3))
    worst = (missing.abs() - rounding) / difference.abs().clamp(min=1e-6)
    if float(worst.max()) > COMPLETENESS:
        line = f"deeplift misses f(x) - f(baseline) by {float(worst.max()):.1%}"
        raise HarmonizeError(f"{line}: the network holds an operation that the Rescale rule does not cover")
    return Result(attributions, logits, missing, difference)


def deeplift_reason(model: nn.Module) -> str | None:
    """Tell why DeepLIFT is not defined for a network.

    Parameters
    ----------
    model : nn.Module
        The network.

    Returns
    -------
    str or None
        The reason, from the modules present.
    """
    for module in model.modules():
        if getattr(module, "inplace", False):
            return (
                f"DeepLIFT reads the input of {type(module).__name__}, which works in place: wrap the network in Model"
            )
        if next(module.children(), None) is None and not isinstance(module, (*PATCHED, *AFFINE, nn.Sequential)):
            kinds = "affine layers, elementwise activations and max pooling"
            return f"DeepLIFT has rules for {kinds}, none for {type(module).__name__}"
    return None


@lru_cache(maxsize=64)
def quadrature(rule: str, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1].

    Parameters
    ----------
    rule : str
        One of ``RULES``.
    steps : int
        Number of nodes, at least 1; the trapezoid needs 2.

    Returns
    -------
    tuple[Tensor, Tensor]
        (steps) nodes and (steps) weights, float64; the weights sum to 1.

    Raises
    ------
    HarmonizeError
        Unknown rule, too few steps.
    """
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    if rule == "gausslegendre":
        nodes, halves = np.polynomial.legendre.leggauss(steps)
        return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(halves / 2)
    index = torch.arange(steps, dtype=torch.float64)
    if rule == "trapezoid":
        check_numbers(2, steps=steps)
        weights = torch.full((steps,), 1 / (steps - 1), dtype=torch.float64)
        weights[[0, -1]] /= 2
        return index / (steps - 1), weights
    shift = {"riemann_left": 0.0, "riemann_midpoint": 0.5, "riemann_right": 1.0}[rule]
    return (index + shift) / steps, torch.full((steps,), 1 / steps, dtype=torch.float64)


def _total(attributions: Tensor) -> Tensor:
    return attributions.sum((1, 2, 3))


def _column(values: Tensor) -> Tensor:
    """(s) -> (s, 1, 1, 1)."""
    return values[:, None, None, None]


def _accumulate(
    task: Task, steps: int, points: Callable[[slice], tuple[Tensor, Tensor | float]], power: int = 1
) -> Tensor:
    """Sum over steps of factor * gradient^power, (n, C, H, W).

    ``points`` gives, for consecutive steps, inputs (n, s, C, H, W) and factors that broadcast to them.
    """
    total = torch.zeros_like(task.x)
    for part in task.chunks(steps):
        at, factor = points(part)
        slope, _ = gradient(task.model, at.flatten(0, 1), task.targets.repeat_interleave(at.shape[1]))
        slope = slope.view_as(at)
        total += (factor * (slope if power == 1 else slope**power)).sum(1)
    return total


def _noisy(task: Task, samples: int, noise: float) -> Callable[[slice], Tensor]:
    """Noisy copies (n, s, C, H, W) of the images, by sample; all images share the draws."""
    draws = torch.randn(samples, *task.x.shape[1:], generator=task.generator())
    scale = noise * (task.x.amax((1, 2, 3)) - task.x.amin((1, 2, 3)))
    return lambda part: task.x[:, None] + _column(scale)[:, None] * draws[part].to(task.x)


def _smooth(task: Task, samples: int, noise: float, power: int) -> Result:
    check_numbers(1, samples=samples)
    check_numbers(0.0, noise=noise)
    copies = _noisy(task, samples, noise)
    slope = _accumulate(task, samples, lambda part: (copies(part), 1 / samples), power)
    return Result(slope, steps=torch.full_like(task.targets, samples))


def _ends(task: Task, start: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, K) of the images and f(x) - f(start) (n)."""
    with torch.no_grad():
        logits, empty = logits_of(task.model, task.x), logits_of(task.model, start)
    return logits, pick(logits, task.targets) - pick(empty, task.targets)


def _path(task: Task, start: Tensor, steps: int, rule: str) -> Tensor:
    nodes, weights = (_column(values.to(task.x)) for values in quadrature(rule, steps))
    start, way = start[:, None], (task.x - start)[:, None]
    slope = _accumulate(task, steps, lambda part: (start + nodes[part] * way, weights[part]))
    return way[:, 0] * slope


@lru_cache(maxsize=1)
def _default_references() -> Tensor:
    return torch.from_numpy(shapes.draw_block(0, "train", 0).with_object).permute(0, 3, 1, 2)


@contextmanager
def _hooks(model: nn.Module, kinds: tuple[type[nn.Module], ...], hook: Callable[..., Any]) -> Iterator[None]:
    """Forward hooks on all modules of these kinds, gone at the end whatever happens."""
    handles = [module.register_forward_hook(hook) for module in model.modules() if isinstance(module, kinds)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _operations(output: Tensor, x: Tensor) -> list[tuple[str, int]]:
    """Operations that lead from x to the output: lower-case name, and how many of its inputs depend on x."""
    parents: dict[Any, list[Any]] = {}
    todo: list[Any] = [output.grad_fn]
    while todo:
        node = todo.pop()
        if node not in parents:
            parents[node] = [parent for parent, _ in node.next_functions if parent is not None]
            todo += parents[node]
    children: dict[Any, list[Any]] = {node: [] for node in parents}
    for node, above in parents.items():
        for parent in above:
            children[parent].append(node)
    touched = set()
    todo = [node for node in parents if getattr(node, "variable", None) is x]
    while todo:
        node = todo.pop()
        if node not in touched:
            touched.add(node)
            todo += children[node]
    return [
        (re.sub(r"backward\d*$", "", node.name().lower()), sum(parent in touched for parent in parents[node]))
        for node in parents
        if node in touched
    ]


def _rescale(module: nn.Module, x: Tensor, y: Tensor, x0: Tensor, y0: Tensor) -> Tensor:
    """The module's output with DeepLIFT's multipliers for gradients."""
    if isinstance(module, nn.MaxPool2d):
        return _rescale_max_pool(module, x, x0)
    with torch.no_grad():
        change = x - x0
        near = change.abs() < NEAR
        ratio = (y - y0) / change
    if near.any():
        at = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(module.forward(at).sum(), at)
        ratio = torch.where(near, slope, ratio)
    return y.detach() + ratio * _centered(x)


def _rescale_max_pool(module: nn.MaxPool2d, x: Tensor, x0: Tensor) -> Tensor:
    """Of the difference y - y0, the part above y0 goes to the image's maximum, the part below to the baseline's."""
    window: tuple[Any, ...] = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
    flat, flat0 = x.flatten(2), x0.expand_as(x).flatten(2)
    with torch.no_grad():
        pooled, place = F.max_pool2d_with_indices(x, *window)
        y, at = pooled.flatten(2), place.flatten(2)
        y0, at0 = (value.expand_as(pooled).flatten(2) for value in F.max_pool2d_with_indices(x0, *window))
        change, change0 = y - flat0.gather(2, at), flat.gather(2, at0) - y0
        ratio = torch.where(change > NEAR, (y - y0).clamp(min=0) / change, (y >= y0).to(y))
        ratio0 = torch.where(y < y0, (y - y0) / change0, 0)
    moved = ratio * _centered(flat.gather(2, at)) + ratio0 * _centered(flat.gather(2, at0))
    return pooled + moved.view_as(pooled)


def _centered(x: Tensor) -> Tensor:
    """Zero, with the gradient of x."""
    return x - x.detach()
