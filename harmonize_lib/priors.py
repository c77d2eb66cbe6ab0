"""Attribution priors: attributions that can be trained on, and what may be asked of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from harmonize_lib.double_backward import DoubleBackward
from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.tasks import check_numbers, evaluated, pick

METHODS = ("expected_gradients", "integrated_gradients", "input_x_gradient", "gradients")
FLOOR = 1e-12  # smallest variance of a map, and smallest sum of magnitudes, that something is divided by


def expected_gradients_penalty(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None,
    references: Tensor | None,
    prior: Callable[[Tensor], Tensor],
    samples: int = 1,
    method: str = "expected_gradients",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Ask something of a model's attributions; add lambda times the answer to the loss of the same step.

    Parameters
    ----------
    model : nn.Module
        See :func:`training_attributions`.
    x : Tensor
        See :func:`training_attributions`.
    y : Tensor | None
        See :func:`training_attributions`.
    references : Tensor | None
        See :func:`training_attributions`.
    prior : Callable[[Tensor], Tensor]
        Turns attributions, shaped like ``x``, into a scalar, low where they are as wished: :func:`pixel_prior`,
        :func:`sparsity_prior`, a ``partial`` of :func:`graph_prior` or :func:`consensus_prior`, or any other.
    samples : int
        See :func:`training_attributions`.
    method : str
        See :func:`training_attributions`.
    generator : torch.Generator | None
        See :func:`training_attributions`.

    Returns
    -------
    Tensor
        Scalar with a graph to the parameters: one backward of ``loss + weight * penalty`` is one training step.

    References
    ----------
    Erion et al. 2021 (arXiv 1906.10670), equation 1 and section "Expected gradients".

    Notes
    -----
    Departure: the authors' image code minimizes loss and prior with two optimizers in turn, on different batches.
    Their lambda has another scale and must not be carried over.
    """
    return prior(training_attributions(model, x, y, references, samples, method, generator))


def training_attributions(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    references: Tensor | None = None,
    samples: int = 1,
    method: str = "expected_gradients",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Attributions of a minibatch that can themselves be differentiated.

    EG_i = mean over ``samples`` draws (x', a) of (x_i - x'_i) df(x' + a (x - x'))/dx_i, with a uniform on [0, 1].

    Parameters
    ----------
    model : nn.Module
        Gives (n, K) logits, or (n) or (n, 1) for one output, each row from its own input alone.
    x : Tensor
        (n, ...) float, the model's own input; n images (C, H, W) or n rows of features.
    y : Tensor | None
        (n) int64: the class whose logit is explained. None explains a single output (regression, one logit).
    references : Tensor | None
        (R, ...) inputs that each draw takes its x' from, with replacement. None takes the minibatch itself, rolled by
        1..``samples`` positions; it must be shuffled.
    samples : int
        Draws (x', a) per input, at least 1; all in one pass of n times ``samples`` rows.
    method : str
        ``"expected_gradients"``; ``"integrated_gradients"`` from one reference (1, ...), positions evenly spaced from
        1 to 0, ends included, and their plain mean; ``"input_x_gradient"``; ``"gradients"``.
    generator : torch.Generator | None
        On the CPU; where draws come from. None takes a new one that no seed repeats.

    Returns
    -------
    Tensor
        (n, ...) in units of the output (``"gradients"``: per unit of input), with a graph to the parameters.

    Raises
    ------
    HarmonizeError
        Unknown method; references of another shape; too few inputs to roll; targets and outputs that do not fit.

    References
    ----------
    Erion et al. 2021 (arXiv 1906.10670), section "Expected gradients": one draw per step suffices.

    Notes
    -----
    The pass runs in eval mode, dropout off and BatchNorm with its running statistics, which it does not change, as in
    the authors' code for images; training flags are put back. Attention runs on PyTorch's math kernel, because the
    fused ones have no second derivative; other layers as :class:`harmonize_lib.double_backward.DoubleBackward` says.
    Parameters keep their ``.grad``.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    check_numbers(1, samples=samples)
    with evaluated(model), sdpa_kernel(SDPBackend.MATH), DoubleBackward() as layers:
        if method in ("gradients", "input_x_gradient"):
            slope = _slope(model, x, y, layers)
            return slope if method == "gradients" else x.detach() * slope
        start, place = _draw(x.detach(), references, samples, method, generator)
        way = x.detach() - start
        at = (start + place * way).flatten(0, 1)
        slope = _slope(model, at, None if y is None else y.repeat(samples), layers)
        return (way * slope.view_as(way)).mean(0)


def _draw(
    x: Tensor, references: Tensor | None, samples: int, method: str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """References (samples, n, ...) and positions on the path that broadcast to them."""
    n, column = len(x), [1] * (x.ndim - 1)
    if references is not None and (references.shape[1:] != x.shape[1:] or len(references) == 0):
        raise HarmonizeError(f"references must be (R, {str(tuple(x.shape[1:]))[1:]}, not {tuple(references.shape)}")
    if method == "integrated_gradients":
        if references is None or len(references) != 1:
            raise HarmonizeError("integrated_gradients needs one reference: pass references of shape (1, ...)")
        place = torch.linspace(1, 0, samples, dtype=x.dtype, device=x.device)
        return references.to(x).expand(samples, *x.shape), place.view(-1, 1, *column)
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if references is None:
        if n <= samples:
            line = f"a minibatch of {n} cannot be rolled {samples} times onto other inputs"
            raise HarmonizeError(f"{line}: pass references, a larger minibatch or fewer samples")
        start = torch.stack([x.roll(shift, 0) for shift in range(1, samples + 1)])
    else:
        chosen = torch.randint(len(references), (samples, n), generator=generator)
        start = references.detach()[chosen.to(references.device)].to(x)
    place = torch.rand(samples, n, generator=generator, dtype=x.dtype)
    return start, place.view(samples, n, *column).to(x.device)


def _slope(model: nn.Module, at: Tensor, y: Tensor | None, layers: DoubleBackward) -> Tensor:
    at = at.detach().requires_grad_()
    output = model(at)
    if y is None and output.numel() != len(at):
        raise HarmonizeError(f"the model has outputs {tuple(output.shape)}: say by y which class is explained")
    if y is not None and (y.shape != (len(at),) or output.ndim != 2 or y.is_floating_point()):
        line = f"y {y.dtype} {tuple(y.shape)} does not fit the outputs {tuple(output.shape)}"
        raise HarmonizeError(f"{line}: classes are (n) int64 for logits (n, K); None explains a single output")
    score = output if y is None else pick(output, y)
    layers.explaining = True
    (slope,) = torch.autograd.grad(score.sum(), at, create_graph=True)
    layers.explaining = False
    return slope


def pixel_prior(attributions: Tensor) -> Tensor:
    """Wish for smooth maps: total variation of standardized maps.

    mean over images of sum_{i,j} |u_{i+1,j} - u_{i,j}| + |u_{i,j+1} - u_{i,j}|, u = (a - mean a) / std a.

    Parameters
    ----------
    attributions : Tensor
        (n, C, H, W), summed over channels first, or (n, H, W).

    Returns
    -------
    Tensor
        Scalar, at least 0; unchanged when a map is multiplied by a positive number. A constant map counts 0.

    Raises
    ------
    HarmonizeError
        Another shape.

    References
    ----------
    Erion et al. 2021 (arXiv 1906.10670), section "Pixel attribution prior".

    Notes
    -----
    Departures: the mean over images of the authors' code, not the paper's sum; the code's floor of the standard
    deviation, 1/sqrt(HW), is lowered to 1e-6, since above it small maps could meet the prior by shrinking.
    """
    u = _standardize(_maps(attributions))
    down, right = u.diff(dim=1).abs(), u.diff(dim=2).abs()
    return (down.sum((1, 2)) + right.sum((1, 2))).mean()


def graph_prior(attributions: Tensor, adjacency: Tensor) -> Tensor:
    """Wish for like importance of features that a graph connects.

    p^T L p = 1/2 sum_{ij} W_ij (p_i - p_j)^2 with p_i the mean of |attribution| over the minibatch, L = D - W.

    Parameters
    ----------
    attributions : Tensor
        (n, P).
    adjacency : Tensor
        (P, P) weights W of the edges, symmetric, not negative, dense or sparse; the diagonal does not matter.

    Returns
    -------
    Tensor
        Scalar, at least 0.

    Raises
    ------
    HarmonizeError
        Shapes that do not fit.

    References
    ----------
    Erion et al. 2021 (arXiv 1906.10670), section "Graph attribution prior".

    Notes
    -----
    The paper equates p^T L p with the sum over ordered pairs, which is twice as large; this is p^T L p.
    """
    if attributions.ndim != 2 or adjacency.shape != (attributions.shape[1],) * 2:
        shapes = f"{tuple(attributions.shape)} and {tuple(adjacency.shape)}"
        raise HarmonizeError(f"attributions must be (n, P) and adjacency (P, P), not {shapes}")
    p = attributions.abs().mean(0)
    weights = adjacency.to(p)
    degree = weights.sum(1)
    return ((degree.to_dense() if degree.is_sparse else degree) * p).dot(p) - (weights @ p).dot(p)


def sparsity_prior(attributions: Tensor) -> Tensor:
    """Wish for few important features: minus the Gini coefficient of the mean magnitudes.

    -G, G = sum_{ij} |p_i - p_j| / (2 P^2 mean p) with p_i the mean of |attribution| over the minibatch.

    Parameters
    ----------
    attributions : Tensor
        (n, P) or (n, ...), where all of the rest counts as features.

    Returns
    -------
    Tensor
        Scalar in (-1, 0]: 0 where all features matter alike, and where none matters at all.

    References
    ----------
    Erion et al. 2021 (arXiv 1906.10670), section "Sparsity attribution prior".

    Notes
    -----
    The paper's penalty is -2G, the authors' code minimizes -G, which is taken here; the paper's denominator is read
    with the number of features, without which it would be no Gini coefficient.
    """
    p = attributions.flatten(1).abs().mean(0).sort().values
    count = len(p)
    rank = torch.arange(1, count + 1, dtype=p.dtype, device=p.device)
    return -((2 * rank - count - 1) * p).sum() / (count * p.sum().clamp(min=FLOOR))


def consensus_prior(attributions: Tensor, consensus: Tensor, patch: int | None = None) -> Tensor:
    """Wish for maps like a given one: 1 - Pearson correlation with the consensus of other architectures.

    mean over images of 1 - mean_p u_p v_p, u and v the standardized maps; half their mean squared difference.

    Parameters
    ----------
    attributions : Tensor
        (n, C, H, W), summed over channels first, or (n, H, W).
    consensus : Tensor
        (n, H, W) a fixed map for each of these images, e.g. of :func:`harmonize_lib.consensus.consensus` over
        models of other architectures.
    patch : int | None
        Side in pixels of the squares over which both are averaged first; None compares pixels.

    Returns
    -------
    Tensor
        Scalar in [0, 2]. A constant map correlates with nothing: it counts 1.

    Raises
    ------
    HarmonizeError
        Shapes that do not fit; a patch that does not divide the map.

    References
    ----------
    This project's extension. Nearest: Parchami-Araghi et al. 2024 (arXiv 2402.03119), who match the maps of one
    teacher in distillation; Fel et al. 2022 (arXiv 2211.04533), who match those of humans.
    """
    maps = _maps(attributions)
    if consensus.shape != maps.shape:
        raise HarmonizeError(f"consensus must be {tuple(maps.shape)}, not {tuple(consensus.shape)}")
    target = consensus.detach().to(maps)
    if patch is not None:
        if patch < 1 or maps.shape[1] % patch or maps.shape[2] % patch:
            raise HarmonizeError(f"patch {patch} does not divide the {maps.shape[1]}x{maps.shape[2]} map")
        maps, target = F.avg_pool2d(maps, patch), F.avg_pool2d(target, patch)
    return 1 - (_standardize(maps) * _standardize(target)).mean()


def _maps(attributions: Tensor) -> Tensor:
    if attributions.ndim not in (3, 4):
        raise HarmonizeError(f"attributions must be (n, C, H, W) or (n, H, W), not {tuple(attributions.shape)}")
    return attributions.sum(1) if attributions.ndim == 4 else attributions


def _standardize(maps: Tensor) -> Tensor:
    centered = maps - maps.mean((1, 2), keepdim=True)
    return centered / centered.square().mean((1, 2), keepdim=True).clamp(min=FLOOR).sqrt()
