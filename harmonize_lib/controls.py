"""Maps that no model has had a hand in: what any attribution has to beat."""

from __future__ import annotations

import hashlib

import torch
from torch.nn import functional as F

from harmonize_lib.tasks import Result, Task, check_numbers

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


def random(task: Task) -> Result:
    """Standard normal noise, another for each image.

    The draws depend on the generator and on the image's content, so that a map is the same whatever company its
    image is in, and two images do not share one. Models given the same generator state share the maps.

    Parameters
    ----------
    task : Task
        The images.

    Returns
    -------
    Result
        (n, H, W) maps.
    """
    height, width = task.images.shape[2:]
    maps = torch.empty(len(task.images), height, width)
    for image, out in zip(task.images.detach().cpu().contiguous(), maps, strict=True):
        digest = hashlib.sha256(task.seed.to_bytes(8, "little") + image.view(torch.uint8).numpy().tobytes()).digest()
        torch.randn(height, width, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7])), out=out)
    return Result(maps)


def center(task: Task, *, sigma: float = 0.25) -> Result:
    """Gaussian about the image's center.

    Parameters
    ----------
    task : Task
        The images.
    sigma : float
        Standard deviation as a share of the shorter side, above 0.

    Returns
    -------
    Result
        (n, H, W) maps in (0, 1].
    """
    check_numbers(1e-3, sigma=sigma)
    height, width = task.images.shape[2:]
    y = torch.arange(height) - (height - 1) / 2
    x = torch.arange(width) - (width - 1) / 2
    squares = (y[:, None] ** 2 + x**2) / (sigma * min(height, width)) ** 2
    return Result((-squares / 2).exp().expand(len(task.images), -1, -1))


def edges(task: Task) -> Result:
    """Sobel energy of the luminance.

    Parameters
    ----------
    task : Task
        The images; uint8 is scaled to [0, 1].

    Returns
    -------
    Result
        (n, H, W) squared length of the gradient; borders are replicated.
    """
    images = task.images.detach().cpu()
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    channels = images.shape[1]
    weights = torch.tensor(LUMINANCE if channels == 3 else [1 / channels] * channels)
    light = (images * weights[:, None, None]).sum(1, keepdim=True)
    slope = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    sobel = torch.stack([slope, slope.T])[:, None]
    return Result(F.conv2d(F.pad(light, (1, 1, 1, 1), mode="replicate"), sobel).square().sum(1))
