"""Feature images: keep the patches an attribution ranks highest, fill the rest."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad
from torchvision.transforms.v2.functional import gaussian_blur

from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.tasks import check_generator

FILLS = ("mean", "blur", "road")
BLUR_KERNEL, BLUR_SIGMA = 11, 5.0
ROAD_NOISE = 0.01
REFINEMENTS = 2
_SOLVER_BYTES = 2**27


def patch_scores(maps: Tensor, patch: int) -> Tensor:
    """Pool attribution maps to the patch grid.

    Parameters
    ----------
    maps : Tensor
        (N, H, W) attributions, any range.
    patch : int
        Side of a patch in pixels; divides H and W.

    Returns
    -------
    Tensor
        (N, H / patch, W / patch) float32, the mean over each patch, signed.

    Raises
    ------
    HarmonizeError
        If the maps are not (N, H, W) or the patch does not divide them.
    """
    _check_maps(maps)
    height, width = maps.shape[1:]
    if not isinstance(patch, int) or patch < 1 or height % patch or width % patch:
        side = gcd(height, width)
        fits = ", ".join(str(d) for d in range(1, side + 1) if side % d == 0)
        line = f"patch={patch} does not divide maps of {height}x{width}: use one of {fits}"
        raise HarmonizeError(line[:200])
    return avg_pool2d(maps[:, None].float(), patch)[:, 0]


def ranks(maps: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Rank the pixels of each map, 0 for the highest value.

    Parameters
    ----------
    maps : Tensor
        (N, H, W) values, any range, without NaN.
    generator : torch.Generator | None
        Breaks ties; None means a generator seeded 0.

    Returns
    -------
    Tensor
        (N, H, W) int64, each map a permutation of 0 .. HW - 1. Distinct values are never reordered.

    Raises
    ------
    HarmonizeError
        If the maps are not (N, H, W) or hold NaN.

    Notes
    -----
    Ties follow one random order of the positions, shared by all maps of the call: the result for a batch
    equals the result one by one, and does not depend on the order of the samples.
    """
    _check_maps(maps)
    flat = maps.flatten(1)
    if bad := int(flat.isnan().any(1).sum()):
        raise HarmonizeError(f"{bad} of {len(maps)} maps hold NaN: their pixels have no rank, leave them out")
    generator = _seeded(generator)
    jitter = torch.randperm(flat.shape[1], generator=generator, device=generator.device).to(maps.device)
    order = jitter[flat[:, jitter].sort(dim=1, descending=True, stable=True).indices]
    places = torch.arange(flat.shape[1], device=maps.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view(maps.shape)


def feature_mask(maps: Tensor, fraction: float, patch: int, generator: torch.Generator | None = None) -> Tensor:
    """Mark the top fraction of patches of each map.

    Parameters
    ----------
    maps : Tensor
        (N, H, W) attributions, any range; signed, so negative evidence ranks last.
    fraction : float
        Part of the patches to keep, in (0, 1].
    patch : int
        Side of a patch in pixels; divides H and W.
    generator : torch.Generator | None
        Breaks ties, see :func:`ranks`; None means a generator seeded 0.

    Returns
    -------
    Tensor
        (N, H, W) bool, exactly max(1, round(fraction * patches)) patches on per map.

    Raises
    ------
    HarmonizeError
        If the fraction is out of range, the patch does not divide the map, or a map holds NaN.

    References
    ----------
    Kadir et al. 2023 (arXiv 2307.02150) ask which features transfer; the construction is this project's.
    """
    scores = patch_scores(maps, patch)
    mask = ranks(scores, generator) < top_count(fraction, scores.shape[1] * scores.shape[2])
    return mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)


def feature_image(
    images: Tensor,
    mask: Tensor,
    fill: str = "mean",
    mean: Sequence[float] | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keep the masked pixels of each image and fill the others.

    Parameters
    ----------
    images : Tensor
        (N, C, H, W) uint8, or float taken to be in [0, 1].
    mask : Tensor
        (N, H, W) bool, True where the image is kept; ``~mask`` gives the non-feature image.
    fill : str
        ``"mean"``: one color; ``"blur"``: the image blurred (Gaussian, 11 pixels, sigma 5); ``"road"``: noisy
        linear imputation from the kept pixels.
    mean : Sequence[float] | Tensor | None
        (C) color of the fill in the units of the images, meant to be the data set's mean. None means
        mid-gray, since a mean taken from the batch would make an image's result depend on its company.
    generator : torch.Generator | None
        Noise of ``"road"``; None means a generator seeded 0.

    Returns
    -------
    Tensor
        (N, C, H, W) in the type of the images, kept pixels untouched.

    Raises
    ------
    HarmonizeError
        If the fill is unknown, or images, mask and mean do not match.

    References
    ----------
    Rong et al. 2022 (ROAD, arXiv 2202.00449), noisy linear imputation; Petsiuk et al. 2018 (RISE, arXiv
    1806.07421), the blur of the insertion metric.

    Notes
    -----
    One noise field (standard deviation 0.01 of the value range) is drawn per call and shared by all its
    images, so that a batch equals one by one; ROAD draws per image. uint8 results are rounded and clipped to
    0..255. An image with nothing kept is imputed from ``mean``.
    """
    if fill not in FILLS:
        raise unknown("fill", fill, FILLS)
    _check_images(images, mask)
    white = 255.0 if images.dtype == torch.uint8 else 1.0
    channels = images.shape[1]
    color = torch.as_tensor([white / 2] * channels if mean is None else mean, dtype=torch.float32)
    if color.shape != (channels,):
        raise HarmonizeError(f"mean has shape {tuple(color.shape)}: give one value per channel, {channels} in all")
    color = color.to(images.device)[:, None, None]
    filled = images.float()
    if fill == "mean":
        filled = color.expand_as(filled)
    elif fill == "blur":
        filled = blur(filled)
    else:
        bare = ~mask.any(2, keepdim=True).any(1, keepdim=True)
        filled = linear_imputation(torch.where(bare[:, None], color, filled), mask | bare)
        generator = _seeded(generator)
        noise = torch.randn(filled.shape[1:], generator=generator, device=generator.device).to(filled.device)
        filled = filled + ROAD_NOISE * white * noise
    if images.dtype == torch.uint8:
        filled = filled.round().clamp(0, 255)
    return torch.where(mask[:, None], images, filled.to(images.dtype))


def mean_color(images: Tensor) -> Tensor:
    """Mean color of a data set, for the fill ``"mean"``.

    Parameters
    ----------
    images : Tensor
        (N, C, H, W), all images of the set.

    Returns
    -------
    Tensor
        (C) float32 in the units of the images.
    """
    return torch.stack([channel.double().mean() for channel in images.unbind(1)]).float()


def blur(images: Tensor) -> Tensor:
    """Blur images as the insertion metric does: Gaussian, 11 pixels wide, sigma 5.

    Parameters
    ----------
    images : Tensor
        (N, C, H, W) float, any range.

    Returns
    -------
    Tensor
        (N, C, H, W) float, same range.

    References
    ----------
    Petsiuk et al. 2018 (RISE, arXiv 1806.07421), insertion metric.

    Notes
    -----
    The kernel is a Gaussian cut off at 11 pixels and normalized, borders reflected; RISE's code folds the
    tails of the kernel back into the 11 pixels. Sides under 6 pixels take a narrower kernel.
    """
    height, width = images.shape[2:]
    kernel = [min(BLUR_KERNEL, 2 * side - 1) for side in (width, height)]
    return gaussian_blur(images, kernel, [BLUR_SIGMA, BLUR_SIGMA])


def linear_imputation(images: Tensor, mask: Tensor) -> Tensor:
    """Replace hidden pixels by the weighted mean of their eight neighbors, all at once.

    Solves x_i = sum_n w_n x_n / sum_n w_n over the neighbors n inside the image, w = 1/6 across an edge and
    1/12 across a corner, for every hidden pixel i; kept pixels are given.

    Parameters
    ----------
    images : Tensor
        (N, C, H, W) float, any range.
    mask : Tensor
        (N, H, W) bool, True where the pixel is kept; at least one per image.

    Returns
    -------
    Tensor
        (N, C, H, W) float, kept pixels untouched.

    Raises
    ------
    HarmonizeError
        If an image has no kept pixel.

    References
    ----------
    Rong et al. 2022 (ROAD, arXiv 2202.00449), noisy linear imputation, here without the noise.

    Notes
    -----
    The system is block tridiagonal in the rows of the image and is solved directly, by block elimination with
    one batched Cholesky factor per row, so that an image's result does not depend on its batch (to about
    1e-7). Time grows as H * W^3: some 6 ms for 64x64 and 0.3 s for 224x224 on one core.
    """
    if not mask.flatten(1).any(1).all():
        raise HarmonizeError("an image has no kept pixel: linear imputation needs at least one")
    size = max(1, _SOLVER_BYTES // (4 * images.shape[2] * images.shape[3] ** 2))
    filled = [_solve(x, m) for x, m in zip(images.split(size), mask.split(size), strict=True)]
    return torch.where(mask[:, None], images, torch.cat(filled))


def _solve(images: Tensor, mask: Tensor) -> Tensor:
    """Block elimination in float32, refined in float64 by its own residual."""
    x = images.double()
    hidden = (~mask).double()[:, None]
    total = _neighbors(torch.ones_like(x[:1, :1]))
    coupling = _coupling(images)
    inverses = _factor(hidden[:, 0].float(), total[0, 0].float(), coupling)
    x = x * (1 - hidden)
    for _ in range(REFINEMENTS):
        residual = hidden * (_neighbors(x) - total * x)
        x = x + _substitute(inverses, residual.float(), coupling)
    return x.to(images.dtype)


def _coupling(images: Tensor) -> Tensor:
    """(W, W) weights between a row of pixels and the next."""
    step = torch.eye(images.shape[3], device=images.device)
    return step / 6 + (pad(step, (1, 1))[:, :-2] + pad(step, (1, 1))[:, 2:]) / 12


def _factor(hidden: Tensor, total: Tensor, coupling: Tensor) -> list[Tensor]:
    """Inverse pivot block of every row, (N, W, W), zero where a pixel is kept."""
    beside = 2 * (coupling - coupling.diag().diag())
    inverses: list[Tensor] = []
    for h, t in zip(hidden.unbind(1), total, strict=True):
        block = beside + coupling @ inverses[-1] @ coupling if inverses else beside
        both = h[:, None] * h[:, :, None]
        pivot = torch.diag_embed(torch.where(h > 0, t, 1.0)) - block * both
        inverses.append(torch.cholesky_inverse(torch.linalg.cholesky(pivot)) * both)
    return inverses


def _substitute(inverses: list[Tensor], right: Tensor, coupling: Tensor) -> Tensor:
    """Forward and back substitution for right-hand sides (N, C, H, W)."""
    partial: list[Tensor] = []
    for inverse, value in zip(inverses, right.unbind(2), strict=True):
        partial.append((value + partial[-1] @ coupling if partial else value) @ inverse)
    solution = partial[-1:]
    for inverse, value in zip(inverses[-2::-1], partial[-2::-1], strict=True):
        solution.append(value + solution[-1] @ coupling @ inverse)
    return torch.stack(solution[::-1], 2)


def _neighbors(images: Tensor) -> Tensor:
    """Sum of the eight neighbors with ROAD's weights, zero outside the image."""
    weights = images.new_tensor([[1, 2, 1], [2, 0, 2], [1, 2, 1]]) / 12
    flat = images.flatten(0, 1)[:, None]
    return conv2d(flat, weights[None, None], padding=1).view_as(images)


def top_count(fraction: float, total: int) -> int:
    """Number of items in the top fraction.

    Parameters
    ----------
    fraction : float
        In (0, 1].
    total : int
        Number of items.

    Returns
    -------
    int
        max(1, round(fraction * total)), halves to even.

    Raises
    ------
    HarmonizeError
        If the fraction is out of range.
    """
    if not 0 < fraction <= 1:
        raise HarmonizeError(f"fraction={fraction} is out of range: give a part of the map in (0, 1], such as 0.1")
    return max(1, round(fraction * total))


def rank_bounds(values: Tensor) -> tuple[Tensor, Tensor]:
    """First and one-past-last rank that each value shares with its ties, 0 for the highest.

    Parameters
    ----------
    values : Tensor
        (N, P) values without NaN.

    Returns
    -------
    tuple[Tensor, Tensor]
        ``low`` and ``high``, (N, P) int64 each: how many values of the row are greater, and how many greater
        or equal. ``(low + high - 1) / 2`` is the average rank.
    """
    down = (-values).contiguous()
    ascending = down.sort(1).values
    return torch.searchsorted(ascending, down), torch.searchsorted(ascending, down, right=True)


def top_membership(low: Tensor, high: Tensor, count: int | Tensor) -> Tensor:
    """Probability of being among the top ``count`` when ties are broken at random.

    Parameters
    ----------
    low : Tensor
        (N, P) from :func:`rank_bounds`.
    high : Tensor
        (N, P) from :func:`rank_bounds`.
    count : int | Tensor
        Size of the top set, one for all or (N, 1).

    Returns
    -------
    Tensor
        (N, P) float64 in [0, 1], each row summing to ``count``.
    """
    return ((count - low).double() / (high - low)).clamp(0, 1)


def _seeded(generator: torch.Generator | None) -> torch.Generator:
    check_generator(generator)
    return torch.Generator().manual_seed(0) if generator is None else generator


def _check_maps(maps: Tensor) -> None:
    if not isinstance(maps, Tensor) or maps.ndim != 3:
        found = f"shape {tuple(maps.shape)}" if isinstance(maps, Tensor) else f"the type {type(maps).__name__}"
        raise HarmonizeError(f"maps has {found}: give a tensor (N, H, W)")


def _check_images(images: Tensor, mask: Tensor) -> None:
    if images.ndim != 4:
        raise HarmonizeError(f"images has shape {tuple(images.shape)}: give (N, C, H, W)")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise HarmonizeError(f"images are {images.dtype}: give uint8 or float in [0, 1]")
    if images.isnan().any():
        raise HarmonizeError("images hold NaN: clean them first")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise HarmonizeError(f"mask is {getattr(mask, 'dtype', mask)}: give torch.bool, such as mask > 0")
    if mask.shape != (len(images), *images.shape[2:]):
        shapes = f"mask {tuple(mask.shape)} does not match images {tuple(images.shape)}"
        raise HarmonizeError(f"{shapes}: give (N, H, W) for (N, C, H, W)")
