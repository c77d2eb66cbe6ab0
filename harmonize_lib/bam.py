"""BAM's metrics: attributions judged by the known relative importance of an object (MCS, RMCS, IDR, IIR)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from harmonize_lib.errors import HarmonizeError
from harmonize_lib.models import Model
from harmonize_lib.statistics import Interval
from harmonize_lib.tasks import check_numbers, logits_of

PERCENTILE = 0.99
BOUND = 0.1
LEAST_CONTRAST = 0.05
ALPHA = 0.01


class Score(NamedTuple):
    """Per-image values (N) float64, NaN where an image is excluded, and their mean over the others."""

    values: Tensor
    mean: float

    @property
    def n(self) -> int:
        """How many images count."""
        return int((~self.values.isnan()).sum())


class Patch(NamedTuple):
    """Images with a patch that should change nothing for M models, and whether it does.

    Attributes
    ----------
    images : Tensor
        (N, C, H, W) uint8, the images with their patches.
    change : Tensor
        (M, N) float64, norm of the logits' change over the norm of the (centered) logits.
    object_change : Tensor
        (M, N) float64, the same for the object itself, where the patch started.
    contrast : Tensor
        (N) float64, root mean square of the patch inside the mask, 1 is black to white; NaN for an empty mask.
    accepted : Tensor
        (M, N) bool: change within the bound, contrast not below the least, the prediction unchanged.
    """

    images: Tensor
    change: Tensor
    object_change: Tensor
    contrast: Tensor
    accepted: Tensor


def scaled_map(maps: Tensor, signed: bool = False) -> Tensor:
    """Bring every map, by itself, to the scale that concept attribution averages.

    Parameters
    ----------
    maps : Tensor
        (N, H, W), or (N, C, H, W) before channels are reduced; any units, signed, finite.
    signed : bool
        False, the original: the positive part, summed over channels, less its minimum, divided by its 99th
        percentile less its minimum, clipped to [0, 1]. True: the sum over channels divided by its largest
        magnitude, in [-1, 1]; negative evidence counts and nothing is clipped.

    Returns
    -------
    Tensor
        (N, H, W) float64; NaN all over where the scale is 0: the original's 99th percentile is its minimum (constant
        maps, maps without positive part, maps that are positive on less than a hundredth of the pixels), or a map
        that is 0 everywhere.

    Raises
    ------
    HarmonizeError
        A wrong shape; NaN or infinite values.

    References
    ----------
    Yang, Kim 2019 (arXiv 1907.09701), public code, ``visualize_pos_attr``. The signed scale is this project's.
    """
    if maps.ndim not in (3, 4) or not maps.isfinite().all():
        raise HarmonizeError(f"maps must be finite (N, H, W) or (N, C, H, W), not {tuple(maps.shape)} with NaN or not")
    maps = maps.detach().to(torch.float64)
    if signed:
        total = maps.sum(1) if maps.ndim == 4 else maps
        return total / total.abs().amax((1, 2), keepdim=True)
    positive = maps.clamp(min=0)
    flat = (positive.sum(1) if maps.ndim == 4 else positive).flatten(1)
    low = flat.amin(1, keepdim=True)
    high = _percentile(flat)
    scaled = ((flat - low) / (high - low)).clamp(0, 1).masked_fill(high <= low, torch.nan)
    return scaled.reshape(len(maps), *maps.shape[-2:])


def _percentile(flat: Tensor) -> Tensor:
    """99th percentile of each row (N, P), linear between neighbors, as (N, 1); sorts the top hundredth alone."""
    place = PERCENTILE * (flat.shape[1] - 1)
    top = flat.topk(flat.shape[1] - int(place), 1).values
    return top[:, -1:].lerp(top[:, -2:-1] if top.shape[1] > 1 else top[:, -1:], place - int(place))


def concept_attribution(maps: Tensor, masks: Tensor, signed: bool = False) -> Score:
    """How strongly maps mark an object: g_c = mean over the object's pixels of the scaled map.

    Parameters
    ----------
    maps : Tensor
        (N, H, W), or (N, C, H, W); see :func:`scaled_map`.
    masks : Tensor
        (N, H, W) bool, the object's pixels.
    signed : bool
        See :func:`scaled_map`.

    Returns
    -------
    Score
        Values in [0, 1] ([-1, 1] if signed); NaN where the mask is empty or the map has no scale. Their mean is G_c.

    Raises
    ------
    HarmonizeError
        Shapes that do not match; masks that are not bool; NaN in maps.

    References
    ----------
    Yang, Kim 2019 (arXiv 1907.09701), section 4, and public code, ``single_attr``.

    Notes
    -----
    The reference takes the positive part of each channel before it sums them: pass (N, C, H, W) for that. Maps of
    ``explain`` come with their channels reduced (the method's record says how), and the positive part is taken after.
    """
    if not isinstance(masks, Tensor):
        raise HarmonizeError(f"masks must be a bool tensor (N, H, W), not {masks!r:.40}: not every data set has masks")
    if masks.dtype != torch.bool or masks.shape != (len(maps), *maps.shape[-2:]):
        raise HarmonizeError(
            f"masks must be bool (N, H, W) like the maps {tuple(maps.shape)}, not {masks.dtype} {tuple(masks.shape)}"
        )
    inside = masks.to(maps.device)
    scaled = scaled_map(maps, signed)
    return _score((scaled * inside).sum((1, 2)) / inside.sum((1, 2)), None)


def model_contrast_score(
    maps_object: Tensor, maps_scene: Tensor, masks: Tensor, correct: Tensor | None = None, signed: bool = False
) -> Score:
    """MCS: how much stronger the object is marked where it decides the class than where it does not.

    Parameters
    ----------
    maps_object : Tensor
        (N, H, W), maps of the model that needs the object (trained on object labels; for RMCS the one whose object
        is common to fewer classes), explaining that model's class.
    maps_scene : Tensor
        (N, H, W), maps of the model that does not (trained on scene labels; for RMCS the one whose object is common
        to all classes), of the same images, explaining that model's class.
    masks : Tensor
        (N, H, W) bool, the object's pixels.
    correct : Tensor | None
        (N) bool, images that both models classify correctly; the others are excluded. None takes all.
    signed : bool
        See :func:`scaled_map`.

    Returns
    -------
    Score
        g_c(f_o, x) - g_c(f_s, x), higher is better; NaN for excluded images and where a value is undefined. The mean
        is NaN where no image is left.

    References
    ----------
    Yang, Kim 2019 (arXiv 1907.09701), section 4.1 (MCS and, for two degrees of commonality, relative MCS).
    """
    difference = _values(maps_object, masks, signed) - _values(maps_scene, masks, signed)
    return _score(difference, correct)


def input_dependence_rate(
    maps_scene_only: Tensor,
    maps_with_object: Tensor,
    masks: Tensor,
    correct: Tensor | None = None,
    signed: bool = False,
) -> Score:
    """IDR: share of images whose region loses attribution when an object the model does not need is put there.

    Parameters
    ----------
    maps_scene_only : Tensor
        (N, H, W), maps of the scene model for the images without the object.
    maps_with_object : Tensor
        (N, H, W), maps of the same model for the images with the object.
    masks : Tensor
        (N, H, W) bool, the object's pixels.
    correct : Tensor | None
        (N) bool, images classified correctly with and without the object. None takes all.
    signed : bool
        See :func:`scaled_map`.

    Returns
    -------
    Score
        1 where g_c(f_s, x without) > g_c(f_s, x with), else 0; NaN as in :func:`model_contrast_score`. 1 - mean is the
        rate of false positives.

    References
    ----------
    Yang, Kim 2019 (arXiv 1907.09701), section 4.2.
    """
    return _score(lowered(_values(maps_scene_only, masks, signed), _values(maps_with_object, masks, signed)), correct)


def input_independence_rate(
    maps: Tensor,
    maps_patched: Tensor,
    masks: Tensor,
    correct: Tensor | None = None,
    signed: bool = False,
    threshold: float = 0.1,
) -> Score:
    """IIR: share of images whose attribution stays when a patch that changes nothing for the model is put there.

    Parameters
    ----------
    maps : Tensor
        (N, H, W), maps of the scene-only model for the images.
    maps_patched : Tensor
        (N, H, W), maps of the same model for the images with a functionally insignificant patch
        (:func:`insignificant_patch`).
    masks : Tensor
        (N, H, W) bool, where the patch is.
    correct : Tensor | None
        (N) bool, images classified correctly with and without the patch, whose patch is insignificant. None takes all.
    signed : bool
        See :func:`scaled_map`.
    threshold : float
        Share of the attribution by which it may change.

    Returns
    -------
    Score
        1 where abs(g_c(x) - g_c(x + patch)) < threshold * abs(g_c(x)), else 0, so 0 where g_c(x) = 0; NaN as in
        :func:`model_contrast_score`. 1 - mean is the rate of false positives.

    References
    ----------
    Yang, Kim 2019 (arXiv 1907.09701), section 4.3; threshold from the public code.

    Notes
    -----
    A map that does not look at the image scores 1: read beside a control such as ``center``.
    """
    return _score(unchanged(_values(maps, masks, signed), _values(maps_patched, masks, signed), threshold), correct)


def lowered(without: Tensor, with_object: Tensor) -> Tensor:
    """Input dependence of single images from their concept attributions.

    Parameters
    ----------
    without : Tensor
        (N) g_c without the object.
    with_object : Tensor
        (N) g_c with it.

    Returns
    -------
    Tensor
        (N) 1 where without > with_object, else 0; NaN where one is undefined.
    """
    return _where_defined(without > with_object, without + with_object)


def unchanged(before: Tensor, after: Tensor, threshold: float = 0.1) -> Tensor:
    """Input independence of single images from their concept attributions.

    Parameters
    ----------
    before : Tensor
        (N) g_c without the patch.
    after : Tensor
        (N) g_c with it.
    threshold : float
        Share of g_c by which it may change.

    Returns
    -------
    Tensor
        (N) 1 where abs(before - after) < threshold * abs(before), else 0; NaN where one is undefined.

    Raises
    ------
    HarmonizeError
        A threshold below 0.
    """
    check_numbers(0.0, threshold=threshold)
    return _where_defined((before - after).abs() < threshold * before.abs(), before + after)


def contrast_correlation(
    contrast: ArrayLike, drop: ArrayLike, seed: int, level: float = 0.95, n_resamples: int = 2000
) -> Interval:
    """Pearson correlation, over models, of mean contrast with mean loss of accuracy.

    Parameters
    ----------
    contrast : ArrayLike
        (K, N) RMCS values of K models (one per degree of commonality); NaN is left out. Or (A, K, N) of A
        architectures: the mean of their correlations, of those that have one.
    drop : ArrayLike
        (K, N) or (A, K, N) what the same models lose on the same images when the object goes: correct with it minus
        correct without it, -1, 0 or 1.
    seed : int
        Seed of the bootstrap over images, which recomputes both means.
    level : float
        Coverage of the interval.
    n_resamples : int
        Bootstrap resamples.

    Returns
    -------
    Interval
        Correlation and percentile interval, ``n`` images; NaN for fewer than three models, or where all models of
        every architecture lose (or contrast) the same.

    References
    ----------
    Yang, Kim 2019 (arXiv 1907.09701), section 4.1.
    """
    contrast, drop = np.asarray(contrast, np.float64), np.asarray(drop, np.float64)
    if contrast.ndim not in (2, 3) or contrast.shape != drop.shape:
        raise HarmonizeError(f"contrast {contrast.shape} and drop {drop.shape} must both be (models, images)")
    models, n = contrast.shape[-2:]
    pairs = list(zip(contrast.reshape(-1, models, n), drop.reshape(-1, models, n), strict=True))
    if models < 3 or n < 2:
        return Interval(np.nan, np.nan, np.nan, n)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    once = np.ones((1, n))
    means = [float(_pearson(_means(once, a), _means(once, b))[0]) for a, b in pairs]
    pairs = [pair for pair, mean in zip(pairs, means, strict=True) if not np.isnan(mean)]
    resampled = [_pearson(_means(weights, a), _means(weights, b)) for a, b in pairs]
    together = np.mean(resampled, axis=0) if resampled else np.array([])
    defined = together[~np.isnan(together)]
    if not len(defined):
        return Interval(np.nan, np.nan, np.nan, n)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.nanmean(means)), float(low), float(high), n)


def _means(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Weighted means (resamples, models) of values (models, N), NaN left out."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return (weights @ np.where(defined, values, 0).T) / (weights @ defined.T)


def _pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation along the last axis, NaN where one side does not vary."""
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    flat = scale <= 1e-12
    return np.where(flat, np.nan, (a * b).sum(-1) / np.where(flat, 1, scale))


def _values(maps: Tensor, masks: Tensor, signed: bool) -> Tensor:
    return concept_attribution(maps, masks, signed).values


def _where_defined(flags: Tensor, values: Tensor) -> Tensor:
    return flags.to(torch.float64).masked_fill(values.isnan(), torch.nan)


def _score(values: Tensor, correct: Tensor | None) -> Score:
    if correct is not None:
        if correct.dtype != torch.bool or correct.shape != values.shape:
            raise HarmonizeError(
                f"correct must be bool ({len(values)},), one per image, not {correct.dtype} {tuple(correct.shape)}"
            )
        values = values.masked_fill(~correct.to(values.device), torch.nan)
    return Score(values, float(values.nanmean()))


def insignificant_patch(
    models: Sequence[Model],
    images: Tensor,
    with_object: Tensor,
    masks: Tensor,
    steps: int = 100,
    rate: float = 0.05,
    bound: float = BOUND,
    least_contrast: float = LEAST_CONTRAST,
    batch_size: int = 64,
) -> Patch:
    """Turn an object into a patch of its shape that is plain to see and changes nothing for the models.

    From the object's pixels, Adam on delta, inside the mask and the range of pixels, descends

        mean over m of change_m(delta) - alpha * contrast(delta),

    change_m = norm(f_m(x + delta) - f_m(x)) / norm(f_m(x) - mean over classes), alpha = 0.01, contrast the root mean
    square of delta over the mask. Of the iterates the one with the least worst change is kept.

    Parameters
    ----------
    models : Sequence[Model]
        M models whose logits should stay; one is BAM's case.
    images : Tensor
        (N, C, H, W) uint8, without object.
    with_object : Tensor
        (N, C, H, W) uint8, with it.
    masks : Tensor
        (N, H, W) bool, the object's pixels.
    steps : int
        Steps of descent; 0 keeps the object.
    rate : float
        Adam's, in units of black to white.
    bound : float
        Largest change that is accepted.
    least_contrast : float
        Smallest contrast that is accepted: a patch that fades away is insignificant to the eye, too.
    batch_size : int
        Images at a time; each is optimized by itself.

    Returns
    -------
    Patch
        One patch per image, the same for all models. What is reported is measured on the rounded images.

    Raises
    ------
    HarmonizeError
        No model; shapes that do not match; an option out of range.

    References
    ----------
    Yang, Kim 2019 (arXiv 1907.09701), section 4.3, and public code, ``construct_delta_patch.py``.

    Notes
    -----
    Departures: the change is measured relative to the logits, so that one bound serves every model, and may be asked
    of several models at once; Adam and a projection onto the range of pixels take the place of 300 steps of gradient
    descent at rate 500 and a penalty on pixels out of range, whose integer conversion wraps around; there the patch
    starts from scene plus object, here from the object; there every patch counts, here those within the bound.
    """
    if not models or images.shape != with_object.shape or masks.shape != (len(images), *images.shape[2:]):
        raise HarmonizeError(
            f"{len(models)} models, images {tuple(images.shape)}, with object {tuple(with_object.shape)}, masks "
            f"{tuple(masks.shape)}: at least one model and (N, C, H, W) twice and (N, H, W) are wanted"
        )
    check_numbers(0, steps=steps)
    check_numbers(0.0, rate=rate, bound=bound, least_contrast=least_contrast)
    parts = []
    for chosen in torch.arange(len(images)).split(batch_size):
        data = images[chosen], with_object[chosen], masks[chosen]
        patched = _optimize(models, *data, steps, rate)
        parts.append(_judge(models, *data, patched, bound, least_contrast))
    return Patch(*(torch.cat(field, 0 if field[0].ndim != 2 else 1) for field in zip(*parts, strict=True)))


def _optimize(
    models: Sequence[Model], images: Tensor, with_object: Tensor, masks: Tensor, steps: int, rate: float
) -> Tensor:
    x = images.float() / 255
    inside = masks[:, None].float()
    pixels = (inside.sum((1, 2, 3)) * x.shape[1]).clamp(min=1)
    before = [_centered_logits(model, x) for model in models]
    patch = (with_object.float() / 255 - x) * inside
    best, least = patch.clone(), torch.full((len(x),), torch.inf)
    first, second = torch.zeros_like(patch), torch.zeros_like(patch)
    for step in range(1, steps + 2):
        patch.requires_grad_()
        with torch.enable_grad():
            changes = torch.stack(
                [
                    (logits_of(model, model.preprocess(x + patch)).cpu() - raw).norm(dim=1) / size
                    for model, (raw, size) in zip(models, before, strict=True)
                ]
            )
            contrast = (patch.square().sum((1, 2, 3)) / pixels + 1e-12).sqrt()
            (slope,) = torch.autograd.grad((changes.mean(0) - ALPHA * contrast).sum(), patch)
        patch, worst = patch.detach(), changes.detach().amax(0)
        better = worst < least
        least = torch.where(better, worst, least)
        best = torch.where(better[:, None, None, None], patch, best)
        first.lerp_(slope, 0.1)
        second.lerp_(slope.square(), 0.01)
        move = (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
        cooling = 1 - (step - 1) / (steps + 1)
        patch = ((x + patch - rate * cooling * move).clamp(0, 1) - x) * inside
    return torch.where(masks[:, None], ((x + best) * 255).round().to(torch.uint8), images)


def _centered_logits(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, K), and the norm of what is left of them less their mean."""
    with torch.no_grad():
        raw = logits_of(model, model.preprocess(x)).cpu()
    return raw, (raw - raw.mean(1, keepdim=True)).norm(dim=1).clamp(min=1e-12)


def _judge(
    models: Sequence[Model],
    images: Tensor,
    with_object: Tensor,
    masks: Tensor,
    patched: Tensor,
    bound: float,
    least_contrast: float,
) -> Patch:
    changes, object_changes, same = [], [], []
    for model in models:
        raw, size = _centered_logits(model, images.float() / 255)
        after, with_it = (_centered_logits(model, shown.float() / 255)[0] for shown in (patched, with_object))
        changes.append((after - raw).norm(dim=1) / size)
        object_changes.append((with_it - raw).norm(dim=1) / size)
        same.append(after.argmax(1) == raw.argmax(1))
    change = torch.stack(changes).double()
    squares = ((patched.double() - images.double()) / 255).square().mean(1) * masks
    contrast = (squares.sum((1, 2)) / masks.sum((1, 2))).sqrt()
    accepted = torch.stack(same) & (change <= bound) & (contrast >= least_contrast)
    return Patch(patched, change, torch.stack(object_changes).double(), contrast, accepted)
