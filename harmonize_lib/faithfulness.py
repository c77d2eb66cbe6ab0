"""Faithfulness: how the target's probability moves as pixels enter or leave in order of attribution."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.features import FILLS, blur, feature_image, ranks
from harmonize_lib.tasks import in_batches

ORDERS = ("morf", "lerf")
SCORES = ("probability", "correct")


def insertion(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    maps: Tensor,
    steps: int = 64,
    fill: str = "blur",
    order: str = "morf",
    score: str = "probability",
    batch_size: int = 256,
) -> Tensor:
    """Insertion curves: from the filled image to the image, pixels entering by rank.

    Parameters
    ----------
    model : nn.Module
        In eval mode, giving (N, K) logits. With ``.preprocess`` it takes the images through it.
    images : Tensor
        (N, C, H, W) uint8 source pixels, or, for a model without ``.preprocess``, float input as it is.
    targets : Tensor
        (N) int64 classes.
    maps : Tensor
        (N, H, W) signed attributions; ties are broken as in :func:`harmonize_lib.features.ranks`.
    steps : int
        Number of equal steps, 1 to HW; after step t, round(t * HW / steps) pixels have entered.
    fill : str
        ``"blur"`` (RISE), ``"mean"`` (zeros of the model's input) or ``"road"``.
    order : str
        ``"morf"``, most relevant first, or ``"lerf"``, least relevant first.
    score : str
        ``"probability"`` of the target, or ``"correct"``: 1 where the target is the top class.
    batch_size : int
        Perturbed images per forward pass.

    Returns
    -------
    Tensor
        (N, steps + 1) float32 in [0, 1], on the CPU: filled image first, whole image last. NaN if the map
        holds NaN.

    Raises
    ------
    HarmonizeError
        If inputs do not match, an option is unknown or out of range, or the model gives no finite logits.

    References
    ----------
    Petsiuk et al. 2018 (RISE, arXiv 1806.07421), causal metrics; ``evaluation.py`` of the authors' code.

    Notes
    -----
    RISE scores the predicted class and moves a fixed number of pixels per step (224 at 224x224); here the
    targets are given and the steps are equal parts. Higher area is better under ``"morf"``, lower under
    ``"lerf"``.
    """
    return _curves(model, images, targets, maps, steps, fill, order, score, batch_size, enter=True)


def deletion(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    maps: Tensor,
    steps: int = 64,
    fill: str = "mean",
    order: str = "morf",
    score: str = "probability",
    batch_size: int = 256,
) -> Tensor:
    """Deletion curves: from the image to the filled image, pixels leaving by rank.

    Parameters
    ----------
    model : nn.Module
        In eval mode, giving (N, K) logits. With ``.preprocess`` it takes the images through it.
    images : Tensor
        (N, C, H, W) uint8 source pixels, or, for a model without ``.preprocess``, float input as it is.
    targets : Tensor
        (N) int64 classes.
    maps : Tensor
        (N, H, W) signed attributions; ties are broken as in :func:`harmonize_lib.features.ranks`.
    steps : int
        Number of equal steps, 1 to HW; after step t, round(t * HW / steps) pixels have left.
    fill : str
        ``"mean"`` (RISE: zeros of the model's input, the mean its preprocessing subtracts), ``"blur"`` or
        ``"road"``.
    order : str
        ``"morf"``, most relevant first, or ``"lerf"``, least relevant first.
    score : str
        ``"probability"`` of the target, or ``"correct"``: 1 where the target is the top class.
    batch_size : int
        Perturbed images per forward pass.

    Returns
    -------
    Tensor
        (N, steps + 1) float32 in [0, 1], on the CPU: whole image first, filled image last. NaN if the map
        holds NaN.

    Raises
    ------
    HarmonizeError
        If inputs do not match, an option is unknown or out of range, or the model gives no finite logits.

    References
    ----------
    Petsiuk et al. 2018 (RISE, arXiv 1806.07421), causal metrics; ``evaluation.py`` of the authors' code.

    Notes
    -----
    Departures as in :func:`insertion`. Lower area is better under ``"morf"``, higher under ``"lerf"``.
    """
    return _curves(model, images, targets, maps, steps, fill, order, score, batch_size, enter=False)


def road(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    maps: Tensor,
    steps: int = 10,
    order: str = "morf",
    score: str = "probability",
    batch_size: int = 256,
) -> Tensor:
    """ROAD curves: pixels leaving by rank, replaced by noisy linear imputation.

    Parameters
    ----------
    model : nn.Module
        In eval mode, giving (N, K) logits. With ``.preprocess`` it takes the images through it.
    images : Tensor
        (N, C, H, W) uint8 source pixels, or, for a model without ``.preprocess``, float input as it is.
    targets : Tensor
        (N) int64 classes.
    maps : Tensor
        (N, H, W) signed attributions; ties are broken as in :func:`harmonize_lib.features.ranks`.
    steps : int
        Number of equal steps, 1 to HW; after step t, round(t * HW / steps) pixels have left.
    order : str
        ``"morf"``, most relevant first, or ``"lerf"``, least relevant first.
    score : str
        ``"probability"`` of the target, or ``"correct"``: 1 where the target is the top class (its mean over
        images is ROAD's accuracy).
    batch_size : int
        Perturbed images per forward pass.

    Returns
    -------
    Tensor
        (N, steps + 1) float32 in [0, 1], on the CPU: whole image first, mid-gray image last. NaN if the
        map holds NaN.

    Raises
    ------
    HarmonizeError
        If inputs do not match, an option is unknown or out of range, or the model gives no finite logits.

    References
    ----------
    Rong et al. 2022 (ROAD, arXiv 2202.00449).

    Notes
    -----
    Imputation runs on the source pixels, see :func:`harmonize_lib.features.feature_image`: one noise field,
    seeded 0, for all images and steps. A pixel leaves with all its channels. Lower area is better under
    ``"morf"``.
    """
    return _curves(model, images, targets, maps, steps, "road", order, score, batch_size, enter=False)


def area(curves: Tensor) -> Tensor:
    """Area under curves over the unit interval, by the trapezoid rule.

    Parameters
    ----------
    curves : Tensor
        (N, n) values at n equally spaced points, n at least 2.

    Returns
    -------
    Tensor
        (N) areas: (sum - first / 2 - last / 2) / (n - 1).

    Raises
    ------
    HarmonizeError
        If a curve has fewer than two points.

    References
    ----------
    Petsiuk et al. 2018 (RISE, arXiv 1806.07421), ``auc`` in ``evaluation.py`` of the authors' code.
    """
    if curves.ndim == 0 or curves.shape[-1] < 2:
        raise HarmonizeError(f"curves has shape {tuple(curves.shape)}: give (N, n) with two points or more")
    return (curves.sum(-1) - curves[..., 0] / 2 - curves[..., -1] / 2) / (curves.shape[-1] - 1)


def _curves(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    maps: Tensor,
    steps: int,
    fill: str,
    order: str,
    score: str,
    batch_size: int,
    enter: bool,
) -> Tensor:
    _check(model, images, targets, maps, steps, fill, order, score, batch_size)
    pixels = maps.shape[1] * maps.shape[2]
    rank = ranks(maps.nan_to_num())
    if order == "lerf":
        rank = pixels - 1 - rank
    moved = torch.tensor([round(t * pixels / steps) for t in range(steps + 1)])
    rate = partial(_rate, model, images, targets, rank, moved, fill, score, enter)
    with torch.no_grad():
        parts, _ = in_batches(rate, len(images) * (steps + 1), batch_size)
    values = torch.cat([torch.empty(0), *parts])
    curves = values.view(len(images), steps + 1)
    curves[maps.flatten(1).isnan().any(1).cpu()] = torch.nan
    return curves


def _rate(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    rank: Tensor,
    moved: Tensor,
    fill: str,
    score: str,
    enter: bool,
    part: slice,
    rows: int,
) -> Tensor:
    """Score of a slice of all (image, step) pairs."""
    device = next((p.device for p in model.parameters()), images.device)
    pairs = torch.arange(part.start, part.stop)
    image, step = pairs // len(moved), pairs % len(moved)
    first = rank[image] < moved.to(rank.device)[step, None, None]
    keep = (first if enter else ~first).to(device)
    span = slice(int(image[0]), int(image[-1]) + 1)
    batch = _perturbed(model, images[span].to(device), (image - image[0]).to(device), keep, fill)
    return _score(model, batch, targets[image].to(device), score).cpu()


def _perturbed(model: nn.Module, images: Tensor, index: Tensor, keep: Tensor, fill: str) -> Tensor:
    """Model input for each (image, mask) pair: images[index] where keep, fill elsewhere."""
    preprocess = getattr(model, "preprocess", lambda x: x)
    if fill == "road":
        return preprocess(feature_image(images[index], keep, "road"))
    inputs = preprocess(images)
    filled = blur(inputs) if fill == "blur" else torch.zeros_like(inputs)
    return torch.where(keep[:, None], inputs[index], filled[index])


def _score(model: nn.Module, batch: Tensor, targets: Tensor, score: str) -> Tensor:
    logits = model(batch)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise HarmonizeError(f"the model gives {type(logits).__name__}: it must give one tensor of logits (N, K)")
    if logits.isnan().any():
        raise HarmonizeError("the model gives NaN logits: check its weights and its input")
    if targets.min() < 0 or targets.max() >= logits.shape[1]:
        raise HarmonizeError(f"targets run outside 0..{logits.shape[1] - 1}, the classes of the model")
    if score == "correct":
        return (logits.argmax(1) == targets).float()
    return logits.float().softmax(1).gather(1, targets[:, None])[:, 0]


def _check(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    maps: Tensor,
    steps: int,
    fill: str,
    order: str,
    score: str,
    batch_size: int,
) -> None:
    for kind, name, options in (("fill", fill, FILLS), ("order", order, ORDERS), ("score", score, SCORES)):
        if name not in options:
            raise unknown(kind, name, options)
    grid = (*images.shape[:1], *images.shape[2:])
    if images.ndim != 4 or maps.shape != grid or targets.shape != grid[:1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (images, targets, maps))
        line = f"images, targets, maps of {shapes} do not match"
        raise HarmonizeError(f"{line}: give (N, C, H, W), (N), (N, H, W)")
    if not 1 <= steps <= maps.shape[1] * maps.shape[2]:
        raise HarmonizeError(f"steps={steps} is out of range: give 1 to {maps.shape[1] * maps.shape[2]}")
    if batch_size < 1:
        raise HarmonizeError(f"batch_size={batch_size} is out of range: give at least 1")
    if any(module.training for module in model.modules()):
        raise HarmonizeError("the model is in train mode: call model.eval() first")
    if not hasattr(model, "preprocess") and not images.is_floating_point():
        raise HarmonizeError(f"images are {images.dtype}: a model without .preprocess takes float input")
