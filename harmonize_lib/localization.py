"""Localization: does an attribution map point at the object? Scores against exact masks.

Every function takes maps (N, H, W) and masks bool (N, H, W) and gives (N) float32 in [0, 1], higher better;
the computation runs in float64. An empty mask or a map with NaN gives NaN. Maps are signed: relevance mass
looks at their positive part, the others rank the raw signed values, so negative evidence comes last. Tied
pixels share the places left, as if ties were broken at random: a constant map scores |mask| / HW in all but
mask IoU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harmonize_lib.errors import HarmonizeError
from harmonize_lib.features import rank_bounds, top_membership


def relevance_mass(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the positive attribution that lies in the mask.

    Parameters
    ----------
    maps : Tensor
        (N, H, W) signed attributions; negative values count as 0.
    masks : Tensor
        (N, H, W) bool, the object.

    Returns
    -------
    Tensor
        (N) in [0, 1]: sum of a+ in the mask / sum of a+. NaN without positive attribution or for an empty
        mask.

    Raises
    ------
    HarmonizeError
        If the shapes differ or the masks are not bool.

    References
    ----------
    Arras et al. 2022 (arXiv 2003.07258), relevance mass accuracy.
    """
    values, inside = _pair(maps, masks)
    positive = values.relu()
    return _defined((positive * inside).sum(1) / positive.sum(1), values, inside)


def relevance_rank(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the top |mask| pixels that lie in the mask.

    Parameters
    ----------
    maps : Tensor
        (N, H, W) signed attributions, ranked as they are.
    masks : Tensor
        (N, H, W) bool, the object.

    Returns
    -------
    Tensor
        (N) in [0, 1]: |top K and mask| / K with K = |mask|. NaN for an empty mask.

    Raises
    ------
    HarmonizeError
        If the shapes differ or the masks are not bool.

    References
    ----------
    Arras et al. 2022 (arXiv 2003.07258), relevance rank accuracy.
    """
    values, inside = _pair(maps, masks)
    size = inside.sum(1)
    return _defined(_hits(values, inside, size) / size, values, inside)


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Does the highest pixel lie in the mask?

    Parameters
    ----------
    maps : Tensor
        (N, H, W) signed attributions, ranked as they are.
    masks : Tensor
        (N, H, W) bool, the object.

    Returns
    -------
    Tensor
        (N) 1 for a hit, 0 for a miss, the share in the mask of several equal maxima. NaN for an empty mask.

    Raises
    ------
    HarmonizeError
        If the shapes differ or the masks are not bool.

    References
    ----------
    Zhang et al. 2018 (arXiv 1608.00507), without the 15 pixel tolerance.
    """
    values, inside = _pair(maps, masks)
    return _defined(_hits(values, inside, torch.ones_like(inside.sum(1))), values, inside)


def mask_iou(maps: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of the top |mask| pixels and the mask.

    Parameters
    ----------
    maps : Tensor
        (N, H, W) signed attributions, ranked as they are.
    masks : Tensor
        (N, H, W) bool, the object.

    Returns
    -------
    Tensor
        (N) in [0, 1]: I / (2K - I), K = |mask|, I the (expected) shared pixels. NaN for an empty mask.

    Raises
    ------
    HarmonizeError
        If the shapes differ or the masks are not bool.
    """
    values, inside = _pair(maps, masks)
    size = inside.sum(1)
    hits = _hits(values, inside, size)
    return _defined(hits / (2 * size - hits), values, inside)


def average_precision(maps: Tensor, masks: Tensor) -> Tensor:
    """Area under the precision-recall curve of the map as a detector of mask pixels.

    Parameters
    ----------
    maps : Tensor
        (N, H, W) signed attributions, ranked as they are.
    masks : Tensor
        (N, H, W) bool, the object.

    Returns
    -------
    Tensor
        (N) in (0, 1]: mean over the mask's pixels of the precision at their value. NaN for an empty mask.

    Raises
    ------
    HarmonizeError
        If the shapes differ or the masks are not bool.

    Notes
    -----
    The step-wise sum over distinct thresholds, sum_n (R_n - R_(n-1)) P_n, as in scikit-learn: tied pixels
    enter together.
    """
    values, inside = _pair(maps, masks)
    _, high = rank_bounds(values)
    found = inside.gather(1, values.argsort(1, descending=True)).cumsum(1)
    precision = found.gather(1, high - 1) / high
    return _defined((precision * inside).sum(1) / inside.sum(1), values, inside)


def _pair(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(masks, Tensor):
        raise HarmonizeError(f"masks must be a bool tensor (N, H, W), not {masks!r:.40}: not every data set has masks")
    if maps.ndim != 3 or maps.shape != masks.shape:
        shapes = f"{tuple(maps.shape)} and masks {tuple(masks.shape)}"
        raise HarmonizeError(f"maps {shapes} do not match: give (N, H, W) for both")
    if masks.dtype != torch.bool:
        raise HarmonizeError(f"masks are {masks.dtype}: give torch.bool, such as masks > 0")
    return maps.flatten(1).double(), masks.flatten(1).double()


def _hits(values: Tensor, inside: Tensor, count: Tensor) -> Tensor:
    """Expected number of the top ``count`` pixels that lie in the mask, (N)."""
    return (top_membership(*rank_bounds(values), count[:, None]) * inside).sum(1)


def _defined(scores: Tensor, values: Tensor, inside: Tensor) -> Tensor:
    """NaN where the mask is empty or the map holds NaN."""
    defined = inside.any(1) & ~values.isnan().any(1)
    return torch.where(defined, scores, torch.nan).float()
