"""Importance in a transformed space (TRIM): attribution of f after the inverse of a transform."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from sklearn.decomposition import NMF, PCA
from torch import Tensor, nn

from harmonize_lib.decomposition import propagate
from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.gradients import quadrature
from harmonize_lib.tasks import check_numbers, logits_of, pick

ENDPOINT = (torch.ones(1), torch.ones(1))
METHODS = ("integrated_gradients", "input_x_gradient", "contextual_decomposition")


class Transform(NamedTuple):
    """A transform T and its affine, differentiable inverse; T may lose something, which the residual keeps."""

    name: str
    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TransformImportance:
    """What :func:`transform_importance` gives.

    Attributes
    ----------
    scores : Tensor
        (N, ...) like ``coefficients``, or (N, G) with groups; signed, in logits.
    coefficients : Tensor
        (N, ...) T(x).
    residual : Tensor
        Like x: what the transform loses, x - T^-1(T(x)).
    logit : Tensor
        (N) f(x) of the target.
    completeness_gap : Tensor | None
        (N) sum of the scores of all coefficients minus f(x) - f(T^-1(0) + residual); None for groups that are given and
        for contextual decomposition.
    """

    scores: Tensor
    coefficients: Tensor
    residual: Tensor
    logit: Tensor
    completeness_gap: Tensor | None


def transform_importance(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    transform: Transform,
    method: str = "integrated_gradients",
    groups: Tensor | None = None,
    steps: int = 32,
    rows: int = 1024,
) -> TransformImportance:
    """Attribute a prediction to the coefficients of a transform (TRIM).

    The network explained is f'(s) = f(T^-1(s) + r) at s = T(x), where r = x - T^-1(T(x)) is held fixed, so that
    f'(T(x)) = f(x) even where the transform loses something.

    Parameters
    ----------
    model : nn.Module
        In eval mode; gives logits (N, K).
    x : Tensor
        (N, ...) float, the model's own input.
    targets : Tensor
        (N) int64, the logit explained.
    transform : Transform
        From :func:`fourier`, :func:`wavelet`, :func:`principal_components`, :func:`nonnegative_factors`, or any
        other with an affine inverse.
    method : str
        ``"integrated_gradients"`` (from s = 0), ``"input_x_gradient"`` or ``"contextual_decomposition"``.
    groups : Tensor | None
        (G, ...) bool sets of coefficients; a gradient method's score of a group is the sum of its coefficients'.
        None: each coefficient by itself.
    steps : int
        Quadrature nodes of integrated gradients.
    rows : int
        Inputs in one pass at most.

    Returns
    -------
    TransformImportance
        Scores, coefficients, residual, logit, completeness gap.

    Raises
    ------
    HarmonizeError
        Unknown method; groups of another shape than the coefficients.

    References
    ----------
    Singh, Ha, Lanusse, Boehm, Liu, Yu 2020 (arXiv 2003.01926); seeds C.3 of Singh, Ha, Yu 2021 (arXiv 2108.06847).

    Notes
    -----
    Contextual decomposition starts from beta = T^-1(s 1_S) - T^-1(0) and gamma = x - beta: residual and offset of
    the inverse belong to the rest.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    check_numbers(1, steps=steps, rows=rows)
    with torch.no_grad():
        s = transform.forward(x)
        residual = x - transform.inverse(s)
        logit = pick(logits_of(model, x), targets)
    if groups is not None and groups.shape[1:] != s.shape[1:]:
        raise HarmonizeError(f"groups must be (G, {str(tuple(s.shape[1:]))[1:-1]}), not {tuple(groups.shape)}")
    if method == "contextual_decomposition":
        scores = _decompose(model, x, targets, transform, s, groups, rows)
        return TransformImportance(scores, s, residual, logit, None)
    nodes, weights = quadrature("gausslegendre", steps) if method == "integrated_gradients" else ENDPOINT
    slope = torch.cat(
        [
            _mean_slope(model, s[part], residual[part], targets[part], transform, nodes.to(s), weights.to(s))
            for part in torch.arange(len(x), device=x.device).split(max(1, rows // len(nodes)))
        ]
    )
    scores = s * slope
    if groups is not None:
        return TransformImportance(scores.flatten(1) @ groups.flatten(1).to(s).T, s, residual, logit, None)
    with torch.no_grad():
        empty = pick(logits_of(model, transform.inverse(torch.zeros_like(s)) + residual), targets)
    return TransformImportance(scores, s, residual, logit, scores.flatten(1).sum(1) - (logit - empty))


def _mean_slope(
    model: nn.Module, s: Tensor, residual: Tensor, targets: Tensor, transform: Transform, nodes: Tensor, weights: Tensor
) -> Tensor:
    """Weighted mean over nodes t of the gradient of f' at t s, (n, ...)."""
    points = torch.einsum("t,n...->tn...", nodes, s).flatten(0, 1).requires_grad_()
    repeats = (len(nodes), *(1 for _ in residual.shape[1:]))
    logits = logits_of(model, transform.inverse(points) + residual.repeat(repeats))
    (slope,) = torch.autograd.grad(pick(logits, targets.repeat(len(nodes))).sum(), points)
    return torch.einsum("t,tn...->n...", weights, slope.unflatten(0, (len(nodes), len(s))))


def _decompose(
    model: nn.Module, x: Tensor, targets: Tensor, transform: Transform, s: Tensor, groups: Tensor | None, rows: int
) -> Tensor:
    """beta of the target for every group of coefficients, (N, G), or like s without groups."""
    sets = torch.eye(s[0].numel(), dtype=torch.bool) if groups is None else groups.flatten(1)
    sets = sets.to(s.device).unflatten(1, s.shape[1:])
    parts = []
    with torch.no_grad():
        offset = transform.inverse(torch.zeros_like(s[:1]))
        for part in torch.arange(len(sets), device=s.device).split(max(1, rows // len(x))):
            chosen = torch.einsum("n...,g...->gn...", s, sets[part].to(s)).flatten(0, 1)
            beta = transform.inverse(chosen) - offset
            gamma = x.repeat(len(part), *(1 for _ in x.shape[1:])) - beta
            logits, _ = propagate(model, beta, gamma)
            parts.append(pick(logits, targets.repeat(len(part))).unflatten(0, (len(part), len(x))))
    scores = torch.cat(parts).T
    return scores.reshape(s.shape) if groups is None else scores


def fourier(shape: tuple[int, ...]) -> Transform:
    """Discrete Fourier transform of real signals or images.

    Parameters
    ----------
    shape : tuple[int, ...]
        Of one input: (L), or (..., H, W), whose last two axes are transformed.

    Returns
    -------
    Transform
        Coefficients (N, L // 2 + 1, 2) or (N, ..., H, W // 2 + 1, 2): real and imaginary parts of the half
        spectrum, unitary normalization.
    """
    axes = tuple(range(-min(len(shape), 2), 0))

    def forward(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.fft.rfftn(x, dim=axes, norm="ortho"))

    def inverse(s: Tensor) -> Tensor:
        spectrum = torch.view_as_complex(s.contiguous())
        return torch.fft.irfftn(spectrum, s=[shape[axis] for axis in axes], dim=axes, norm="ortho")

    return Transform("Fourier", forward, inverse)


def wavelet(lowpass: Tensor, levels: int, axes: int = 1) -> Transform:
    """Orthonormal discrete wavelet transform with periodic borders.

    Parameters
    ----------
    lowpass : Tensor
        (n) reconstruction low-pass filter, n even, e.g. ``torch.tensor(pywt.Wavelet("db5").rec_lo)``.
    levels : int
        Depth, at least 1.
    axes : int
        1 for signals (N, L), 2 for images (N, C, H, W).

    Returns
    -------
    Transform
        Coefficients shaped like the input, coarse ones first (see :func:`dwt`).
    """
    return Transform(
        "Wavelet", lambda x: dwt(x, lowpass.to(x), levels, axes), lambda s: idwt(s, lowpass.to(s), levels, axes)
    )


def principal_components(data: Tensor, components: int) -> Transform:
    """Principal components of a data set.

    Parameters
    ----------
    data : Tensor
        (N, ...) inputs the components are fitted to.
    components : int
        How many are kept; what the others hold goes into the residual.

    Returns
    -------
    Transform
        Coefficients (N, components), largest variance first.
    """
    fitted = PCA(components, svd_solver="full").fit(data.flatten(1).cpu().double().numpy())
    mean, basis = (torch.from_numpy(part).to(data) for part in (fitted.mean_, fitted.components_))
    shape = data.shape[1:]
    return Transform("PCA", lambda x: (x.flatten(1) - mean) @ basis.T, lambda s: (s @ basis + mean).unflatten(1, shape))


def nonnegative_factors(data: Tensor, components: int, seed: int = 0) -> Transform:
    """Nonnegative matrix factorization of a data set.

    Parameters
    ----------
    data : Tensor
        (N, ...) inputs that are not negative.
    components : int
        How many factors; what they do not explain goes into the residual.
    seed : int
        Seed of the fit.

    Returns
    -------
    Transform
        Coefficients (N, components), not negative; T itself is a nonnegative least-squares fit without a gradient.

    Raises
    ------
    HarmonizeError
        Negative data.
    """
    if (data < 0).any():
        raise HarmonizeError("nonnegative_factors takes data that are not negative: shift them, or take PCA")
    fitted = NMF(components, init="nndsvda", max_iter=1000, tol=1e-5, random_state=seed)
    fitted.fit(data.flatten(1).cpu().double().numpy())
    basis = torch.from_numpy(fitted.components_).to(data)

    def forward(x: Tensor) -> Tensor:
        return torch.from_numpy(fitted.transform(x.detach().flatten(1).cpu().double().numpy())).to(x)

    return Transform("NMF", forward, lambda s: (s @ basis).unflatten(1, data.shape[1:]))


def level_matrix(lowpass: Tensor, length: int) -> Tensor:
    """One level of the wavelet transform as a matrix.

    Row k < L/2 holds h shifted by 2k, row L/2 + k the high-pass filter g[n] = (-1)^n h[N - 1 - n] shifted by 2k,
    both periodic. The matrix is orthogonal exactly when h is orthonormal to its even shifts.

    Parameters
    ----------
    lowpass : Tensor
        (..., N) filters, N even.
    length : int
        L, even.

    Returns
    -------
    Tensor
        (..., L, L).

    References
    ----------
    Ha et al. 2021 (arXiv 2107.09145), section 2; alignment as in PyWavelets' mode ``periodization``.
    """
    taps = lowpass.shape[-1]
    n = torch.arange(taps, device=lowpass.device)
    highpass = lowpass.flip(-1) * (-1.0) ** n
    columns = (2 * torch.arange(length // 2, device=n.device)[:, None] + n - taps // 2 + 1) % length
    places = nn.functional.one_hot(columns, length).to(lowpass)
    return torch.cat([torch.einsum("...n,knl->...kl", each, places) for each in (lowpass, highpass)], -2)


def dwt(x: Tensor, lowpass: Tensor, levels: int, axes: int = 1) -> Tensor:
    """Discrete wavelet transform, differentiable in signal and filter.

    Parameters
    ----------
    x : Tensor
        (..., L) signals, or (..., H, W) images with ``axes=2``.
    lowpass : Tensor
        (N) filter, or (S, N) one for each leading index of ``x`` (S, n, L).
    levels : int
        Depth.
    axes : int
        1 or 2 last axes.

    Returns
    -------
    Tensor
        Like ``x``: for signals [approximation, details of the coarsest level, ..., details of the finest]; for
        images the same along both axes, the approximation in the upper left corner.

    Raises
    ------
    HarmonizeError
        A side that 2^levels does not divide.
    """
    for side in x.shape[-axes:]:
        if side % 2**levels:
            raise HarmonizeError(f"{levels} levels need sides that {2**levels} divides, not {side}")
    if levels == 0:
        return x
    x = x @ level_matrix(lowpass, x.shape[-1]).mT
    if axes == 2:
        x = level_matrix(lowpass, x.shape[-2]) @ x
    corner = _corner(x, axes)
    result = x.clone()
    result[corner] = dwt(x[corner], lowpass, levels - 1, axes)
    return result


def idwt(s: Tensor, lowpass: Tensor, levels: int, axes: int = 1) -> Tensor:
    """Synthesis by the transposed transform: the inverse of :func:`dwt` exactly when the filter is orthonormal.

    Parameters
    ----------
    s : Tensor
        Coefficients as :func:`dwt` gives them.
    lowpass : Tensor
        See :func:`dwt`.
    levels : int
        Depth.
    axes : int
        1 or 2 last axes.

    Returns
    -------
    Tensor
        Like ``s``.
    """
    if levels == 0:
        return s
    corner = _corner(s, axes)
    x = s.clone()
    x[corner] = idwt(s[corner], lowpass, levels - 1, axes)
    if axes == 2:
        x = level_matrix(lowpass, s.shape[-2]).mT @ x
    return x @ level_matrix(lowpass, s.shape[-1])


def scales(length: int, levels: int) -> Tensor:
    """Which scale each coefficient of a signal belongs to.

    Parameters
    ----------
    length : int
        L.
    levels : int
        Depth J.

    Returns
    -------
    Tensor
        (L) int64: 0 for the approximation, 1 for the coarsest details, ..., J for the finest.
    """
    sizes = [length >> levels, *(length >> level for level in range(levels, 0, -1))]
    return torch.repeat_interleave(torch.arange(levels + 1), torch.tensor(sizes))


def _corner(x: Tensor, axes: int) -> tuple[Any, ...]:
    return (..., *(slice(side // 2) for side in x.shape[-axes:]))
