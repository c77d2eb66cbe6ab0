"""Agreement between two attribution maps of the same image.

Every function takes two (N, H, W) tensors and gives (N) float32; the computation runs in float64. A pair in
which a map is constant (for the top-k sets by magnitude: constant in magnitude) or holds NaN gives NaN. Ties
at the edge of a top-k set share the places left: the expected overlap when each map breaks its ties at
random, independently. So a map agrees with itself by less than 1 where its top-k set is not unique.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from harmonize_lib.errors import HarmonizeError
from harmonize_lib.features import rank_bounds, top_count, top_membership

SSIM_WINDOW = 7


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman rank correlation of two maps, over pixels.

    Parameters
    ----------
    a : Tensor
        (N, H, W) maps, any range, signed.
    b : Tensor
        (N, H, W) maps, any range, signed.

    Returns
    -------
    Tensor
        (N) in [-1, 1]; NaN if a map is constant. Ties take their average rank.

    Raises
    ------
    HarmonizeError
        If the shapes differ or are not (N, H, W).
    """
    x, y = _pair(a, b)
    rx, ry = _centered_ranks(x), _centered_ranks(y)
    rho = (rx * ry).sum(1) / (rx.square().sum(1) * ry.square().sum(1)).sqrt()
    return _defined(rho.clamp(-1, 1), x, y)


def topk_iou(a: Tensor, b: Tensor, fraction: float = 0.1) -> Tensor:
    """Intersection over union of the top pixels of two maps.

    Parameters
    ----------
    a : Tensor
        (N, H, W) maps, ranked by signed value.
    b : Tensor
        (N, H, W) maps, ranked by signed value.
    fraction : float
        Part of the pixels in the top set, in (0, 1].

    Returns
    -------
    Tensor
        (N) in [0, 1]: I / (2k - I) with I the (expected) number of shared pixels; NaN if a map is constant.

    Raises
    ------
    HarmonizeError
        If the shapes do not match or the fraction is out of range.

    References
    ----------
    Fel et al. 2022 (arXiv 2211.04533): IoU of the top 10 % of pixels.
    """
    x, y = _pair(a, b)
    k = top_count(fraction, x.shape[1])
    shared = (_top(x, k) * _top(y, k)).sum(1)
    return _defined(shared / (2 * k - shared), x, y)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity of two maps, each min-max scaled to [0, 1] first.

    Parameters
    ----------
    a : Tensor
        (N, H, W) maps, any range; H and W at least 7.
    b : Tensor
        (N, H, W) maps, any range.

    Returns
    -------
    Tensor
        (N) in [-1, 1]; NaN if a map is constant.

    Raises
    ------
    HarmonizeError
        If the shapes differ or a side is under 7.

    References
    ----------
    Wang et al. 2004, equation 13, C1 = 0.01^2, C2 = 0.03^2.

    Notes
    -----
    A uniform 7x7 window with sample covariance, averaged over the windows that lie inside the map
    (scikit-image's default), not the paper's Gaussian window.
    """
    x, y = _pair(a, b)
    height, width = a.shape[1:]
    if min(height, width) < SSIM_WINDOW:
        raise HarmonizeError(f"maps of {height}x{width} are too small for ssim: give at least 7x7")
    u, v = (((m - m.amin(1, True)) / (m.amax(1, True) - m.amin(1, True))).view(a.shape) for m in (x, y))

    def window(m: Tensor) -> Tensor:
        return avg_pool2d(m[:, None], SSIM_WINDOW, stride=1)[:, 0]

    sample = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    mu, mv = window(u), window(v)
    uu, vv, uv = (sample * (window(p * q) - window(p) * window(q)) for p, q in ((u, u), (v, v), (u, v)))
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mu * mv + c1) * (2 * uv + c2) / ((mu**2 + mv**2 + c1) * (uu + vv + c2))
    return _defined(similarity.mean((1, 2)), x, y)


def feature_agreement(a: Tensor, b: Tensor, fraction: float = 0.1) -> Tensor:
    """Share of top pixels, by magnitude, that two maps have in common.

    Parameters
    ----------
    a : Tensor
        (N, H, W) maps, ranked by magnitude.
    b : Tensor
        (N, H, W) maps, ranked by magnitude.
    fraction : float
        Part of the pixels in the top set, in (0, 1].

    Returns
    -------
    Tensor
        (N) in [0, 1]: |T_a and T_b| / k; NaN if a map is constant in magnitude.

    Raises
    ------
    HarmonizeError
        If the shapes do not match or the fraction is out of range.

    References
    ----------
    Krishna et al. 2022 (arXiv 2202.01602), feature agreement.
    """
    x, y = _pair(a, b)
    k = top_count(fraction, x.shape[1])
    return _defined((_top(x.abs(), k) * _top(y.abs(), k)).sum(1) / k, x.abs(), y.abs())


def rank_agreement(a: Tensor, b: Tensor, fraction: float = 0.1) -> Tensor:
    """Share of top pixels, by magnitude, that two maps have in common at the same rank.

    Parameters
    ----------
    a : Tensor
        (N, H, W) maps, ranked by magnitude.
    b : Tensor
        (N, H, W) maps, ranked by magnitude.
    fraction : float
        Part of the pixels in the top set, in (0, 1].

    Returns
    -------
    Tensor
        (N) in [0, 1], at most the feature agreement; NaN if a map is constant in magnitude.

    Raises
    ------
    HarmonizeError
        If the shapes do not match or the fraction is out of range.

    References
    ----------
    Krishna et al. 2022 (arXiv 2202.01602), rank agreement.

    Notes
    -----
    Ties in value take each rank of their group with equal probability (OpenXAI gives them one dense rank).
    """
    x, y = _pair(a, b)
    k = top_count(fraction, x.shape[1])
    (low_x, high_x), (low_y, high_y) = rank_bounds(x.abs()), rank_bounds(y.abs())
    common = torch.minimum(high_x, high_y).clamp(max=k) - torch.maximum(low_x, low_y)
    equal = common.clamp(min=0).double() / ((high_x - low_x) * (high_y - low_y))
    return _defined(equal.sum(1) / k, x.abs(), y.abs())


def sign_agreement(a: Tensor, b: Tensor, fraction: float = 0.1) -> Tensor:
    """Share of top pixels, by magnitude, that two maps have in common with the same sign.

    Parameters
    ----------
    a : Tensor
        (N, H, W) signed maps, ranked by magnitude.
    b : Tensor
        (N, H, W) signed maps, ranked by magnitude.
    fraction : float
        Part of the pixels in the top set, in (0, 1].

    Returns
    -------
    Tensor
        (N) in [0, 1], at most the feature agreement; NaN if a map is constant in magnitude. Zero is a sign.

    Raises
    ------
    HarmonizeError
        If the shapes do not match or the fraction is out of range.

    References
    ----------
    Krishna et al. 2022 (arXiv 2202.01602), sign agreement.
    """
    x, y = _pair(a, b)
    k = top_count(fraction, x.shape[1])
    shared = _top(x.abs(), k) * _top(y.abs(), k) * (x.sign() == y.sign())
    return _defined(shared.sum(1) / k, x.abs(), y.abs())


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 3 or a.shape != b.shape:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise HarmonizeError(f"maps of shapes {shapes}: give two of one shape (N, H, W)")
    return a.flatten(1).double(), b.flatten(1).double()


def _centered_ranks(values: Tensor) -> Tensor:
    low, high = rank_bounds(values)
    doubled = (low + high).double()
    return doubled - doubled.mean(1, keepdim=True)


def _top(values: Tensor, count: int) -> Tensor:
    return top_membership(*rank_bounds(values), count)


def _defined(scores: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """NaN where a map is constant or holds NaN."""
    varied = (x.amax(1) > x.amin(1)) & (y.amax(1) > y.amin(1))
    return torch.where(varied, scores, torch.nan).float()
