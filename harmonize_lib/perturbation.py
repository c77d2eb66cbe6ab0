"""Attribution by hiding parts of the image: occlusion and RISE."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.tasks import Result, Task, check_numbers, logits_of, pick, resolve_baseline


def occlusion(
    task: Task, *, patch: int | None = None, stride: int | None = None, baseline: str | Tensor = "mean"
) -> Result:
    """Drop of the target logit when a window is hidden, averaged over the windows that cover a pixel.

    Parameters
    ----------
    task : Task
        The images.
    patch : int | None
        Side of the window in pixels; None takes an eighth of the image's shorter side.
    stride : int | None
        Pixels between windows, at most ``patch``; None takes half of it.
    baseline : str | Tensor
        What is put in the window: see :func:`harmonize_lib.tasks.resolve_baseline`.

    Returns
    -------
    Result
        (n, H, W) maps.

    References
    ----------
    Zeiler, Fergus 2014 (arXiv 1311.2901), section 4.2.

    Notes
    -----
    The paper shows the probability that is left; here it is the logit that is lost, so that evidence is positive.
    """
    height, width = task.x.shape[2:]
    patch = max(1, min(height, width) // 8) if patch is None else patch
    stride = max(1, patch // 2) if stride is None else stride
    check_numbers(1, patch=patch, stride=stride)
    if stride > patch or patch > min(height, width):
        side = min(height, width)
        raise HarmonizeError(f"stride {stride} <= patch {patch} <= side {side} must hold, or pixels are left out")
    fill = resolve_baseline(task, baseline)[:, None]
    hidden = _windows(height, width, patch, stride).to(task.x.device)
    maps = torch.zeros_like(task.x[:, 0])
    with torch.no_grad():
        logits = logits_of(task.model, task.x)
        whole = pick(logits, task.targets)[:, None]
        for part in task.chunks(len(hidden)):
            masks = hidden[part]
            covered = torch.where(masks[:, None], fill, task.x[:, None])
            drop = whole - _values(task, covered)
            maps += torch.einsum("ns,shw->nhw", drop, masks.to(drop))
    taken = torch.full_like(task.targets, len(hidden))
    return Result(maps / hidden.sum(0), logits, steps=taken, notes={"patch": patch, "stride": stride})


def rise(
    task: Task,
    *,
    masks: int = 256,
    cells: int = 8,
    p: float = 0.5,
    score: str = "probability",
    baseline: str | Tensor = "mean",
) -> Result:
    """Mean score of the target over random masks that keep a pixel.

    Parameters
    ----------
    task : Task
        The images.
    masks : int
        Number of masks, at least 1.
    cells : int
        Cells along a side of the coarse random grid, at least 2.
    p : float
        Chance of a cell to be kept, between 0 and 1.
    score : str
        ``"probability"`` (the paper) or ``"logit"`` of the target.
    baseline : str | Tensor
        What shows where the mask hides: see :func:`harmonize_lib.tasks.resolve_baseline`.

    Returns
    -------
    Result
        (n, H, W) maps: sum of score * mask / (masks * p).

    References
    ----------
    Petsiuk, Das, Saenko 2018 (arXiv 1806.07421), equation 6 and section 3.2.

    Notes
    -----
    All images share the masks. The paper's thousands of masks (N = 4000 to 8000, p = 0.5) are an option.
    """
    check_numbers(1, masks=masks)
    check_numbers(2, cells=cells)
    if not isinstance(p, float) or not 0 < p < 1:
        raise HarmonizeError(f"p must lie between 0 and 1, not {p!r}")
    if score not in ("probability", "logit"):
        raise unknown("score", score, ("probability", "logit"))
    fill = resolve_baseline(task, baseline)[:, None]
    kept = _random_masks(task, masks, cells, p)
    maps = torch.zeros_like(task.x[:, 0])
    with torch.no_grad():
        for part in task.chunks(masks):
            shown = kept[part].to(task.x)
            values = _values(task, fill + shown[:, None] * (task.x[:, None] - fill), score == "probability")
            maps += torch.einsum("ns,shw->nhw", values, shown) / (masks * p)
    return Result(maps, steps=torch.full_like(task.targets, masks))


def _values(task: Task, x: Tensor, probability: bool = False) -> Tensor:
    """Target logits or probabilities (n, s) of inputs (n, s, C, H, W)."""
    logits = logits_of(task.model, x.flatten(0, 1))
    values = logits.softmax(1) if probability else logits
    return pick(values, task.targets.repeat_interleave(x.shape[1])).unflatten(0, x.shape[:2])


def _windows(height: int, width: int, patch: int, stride: int) -> Tensor:
    """(windows, H, W) bool; the last window of a row or column may reach over the border."""

    def along(side: int) -> Tensor:
        start = stride * torch.arange(math.ceil((side - patch) / stride) + 1)[:, None]
        pixel = torch.arange(side)
        return (pixel >= start) & (pixel < start + patch)

    return (along(height)[:, None, :, None] & along(width)[None, :, None, :]).flatten(0, 1)


def _random_masks(task: Task, masks: int, cells: int, p: float) -> Tensor:
    """(masks, H, W) in [0, 1]: random grids, upsampled to one cell more than the image, cropped at random."""
    height, width = task.x.shape[2:]
    cell = math.ceil(height / cells), math.ceil(width / cells)
    generator = task.generator()
    grids = (torch.rand(masks, 1, cells, cells, generator=generator) < p).float()
    top, left = (torch.randint(side, (masks,), generator=generator) for side in cell)
    size = [(cells + 1) * side for side in cell]
    large = F.interpolate(grids, size, mode="bilinear", align_corners=False)[:, 0]
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    return large[torch.arange(masks)[:, None, None], rows[:, :, None], columns[:, None, :]]
