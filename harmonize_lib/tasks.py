"""What an attribution method is given and gives back, and the checked passes through the model that all share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from harmonize_lib.errors import HarmonizeError, unknown

T = TypeVar("T")
BASELINES = ("mean", "black", "white", "blur")
BLUR_SIGMA = 0.1  # of the image's shorter side


@dataclass(frozen=True)
class Task:
    """A slice of images to explain, at most ``rows`` of them.

    Attributes
    ----------
    model : nn.Module
        In eval mode; gives logits (N, K).
    images : Tensor
        (n, C, H, W) as the caller gave them.
    x : Tensor
        (n, C, H, W) float, the model's own input, on its device.
    targets : Tensor
        (n) int64, on the model's device.
    rows : int
        Images in one pass at most: (image, step) pairs are packed up to this number.
    seed : int
        Every slice draws the same numbers from it, so that all images share their noise, masks and references.
    """

    model: nn.Module
    images: Tensor
    x: Tensor
    targets: Tensor
    rows: int
    seed: int

    def generator(self) -> torch.Generator:
        """Start the task's random numbers anew.

        Returns
        -------
        torch.Generator
            On the CPU, so that every device sees the same numbers.
        """
        return torch.Generator().manual_seed(self.seed)

    def chunks(self, steps: int) -> Iterator[slice]:
        """Cut the steps so that a pass over all images of the slice holds at most ``rows`` rows.

        Parameters
        ----------
        steps : int
            Steps per image.

        Yields
        ------
        slice
            Consecutive steps.
        """
        size = max(1, self.rows // len(self.x))
        for start in range(0, steps, size):
            yield slice(start, min(start + size, steps))


@dataclass(frozen=True)
class Result:
    """What a method gives back for a task.

    Attributes
    ----------
    attributions : Tensor
        (n, C, H, W), or (n, H, W) where the method knows no channels.
    logits : Tensor | None
        (n, K) of the images, where the method has seen them anyway.
    missing : Tensor | None
        (n) sum of the attributions minus what they should sum to, in logits.
    difference : Tensor | None
        (n) what they should sum to, in logits.
    steps : Tensor | None
        (n) int64, passes spent on each image.
    notes : dict[str, Any]
        What the record should say besides.
    """

    attributions: Tensor
    logits: Tensor | None = None
    missing: Tensor | None = None
    difference: Tensor | None = None
    steps: Tensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def in_batches(compute: Callable[[slice, int], T], n: int, rows: int) -> tuple[list[T], int]:
    """Compute consecutive slices; where the GPU's memory runs out, halve them, say so, and go on.

    Parameters
    ----------
    compute : Callable[[slice, int], T]
        Takes a slice of at most ``rows`` items, and ``rows``.
    n : int
        Items in all.
    rows : int
        Items in a slice at first.

    Returns
    -------
    tuple[list[T], int]
        What it gave for each slice, and the items in a slice at last.

    Raises
    ------
    HarmonizeError
        Not even one item fits.
    """
    parts: list[T] = []
    start = 0
    while start < n:
        full = False
        chosen = slice(start, min(start + rows, n))
        try:
            parts.append(compute(chosen, rows))
            start = chosen.stop
        except torch.OutOfMemoryError:
            full = True  # acted on outside, where the failed pass no longer holds memory
        if full and rows == 1:
            raise HarmonizeError("the GPU has too little memory for one image: use device='cpu'")
        if full:
            rows //= 2
            torch.cuda.empty_cache()
            warnings.warn(f"out of memory: going on with batch_size={rows}", stacklevel=3)
    return parts, rows


def prepare(model: nn.Module, images: Tensor) -> Tensor:
    """Bring images into the model's own input space.

    Parameters
    ----------
    model : nn.Module
        With ``preprocess``, or a plain module, which takes float images as they are.
    images : Tensor
        (N, C, H, W).

    Returns
    -------
    Tensor
        (N, C, H, W) float on the model's device, detached.

    Raises
    ------
    HarmonizeError
        Integer images for a plain module, a wrong shape, NaN.
    """
    preprocess = getattr(model, "preprocess", None)
    if preprocess is not None:
        return preprocess(images).detach()
    if images.ndim != 4 or not images.is_floating_point():
        line = f"a plain nn.Module takes float images (N, C, H, W), not {images.dtype} {tuple(images.shape)}"
        raise HarmonizeError(f"{line}: wrap it in Model or normalize them")
    if not images.isfinite().all():
        raise HarmonizeError("images hold NaN or infinite values: clean them before they are explained")
    weight = next(model.parameters(), torch.empty(0))
    return images.detach().to(weight.device if weight.numel() else images.device, copy=True)


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """Pass inputs through the model and check what comes out.

    Parameters
    ----------
    model : nn.Module
        Any.
    x : Tensor
        (n, C, H, W) the model's own input.

    Returns
    -------
    Tensor
        (n, K) finite logits.

    Raises
    ------
    HarmonizeError
        The model returns no tensor of that shape, or NaN.
    """
    logits = model(x)
    if not isinstance(logits, Tensor):
        kind = type(logits).__name__
        raise HarmonizeError(f"the model returns a {kind}: its forward must return one tensor of logits (N, K)")
    if logits.ndim != 2 or len(logits) != len(x):
        raise HarmonizeError(f"the model turns {len(x)} images into {tuple(logits.shape)}: logits must be (N, K)")
    if not logits.isfinite().all():
        raise HarmonizeError("the model's logits hold NaN or infinite values: check its weights and its preprocessing")
    return logits


def pick(logits: Tensor, targets: Tensor) -> Tensor:
    """Choose each image's target logit.

    Parameters
    ----------
    logits : Tensor
        (n, K), or (1, K) for all images alike.
    targets : Tensor
        (n) int64.

    Returns
    -------
    Tensor
        (n) logits.

    Raises
    ------
    HarmonizeError
        A target outside 0..K-1.
    """
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= logits.shape[1]:
        wrong = low if low < 0 else high
        raise HarmonizeError(f"target {wrong} is out of range: the model has classes 0..{logits.shape[1] - 1}")
    return logits.expand(len(targets), -1).gather(1, targets[:, None])[:, 0]


def gradient(model: nn.Module, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the target logit with respect to the input alone; parameters are left out of it.

    Parameters
    ----------
    model : nn.Module
        Any without cross-image operations.
    x : Tensor
        (n, C, H, W) the model's own input.
    targets : Tensor
        (n) int64.

    Returns
    -------
    tuple[Tensor, Tensor]
        Gradients (n, C, H, W) and logits (n, K).

    Raises
    ------
    HarmonizeError
        The logits do not depend on the input by a differentiable path.
    """
    x = x.detach().requires_grad_()
    logits = logits_of(model, x)
    if not logits.requires_grad:
        raise HarmonizeError("the model cuts the gradient: its forward must not detach or run under no_grad")
    (slope,) = torch.autograd.grad(pick(logits, targets).sum(), x)
    return slope, logits.detach()


def resolve_baseline(task: Task, baseline: str | Tensor) -> Tensor:
    """The input that stands for absence.

    Parameters
    ----------
    task : Task
        The images.
    baseline : str | Tensor
        ``"mean"`` (zeros of the model's input: the mean color its preprocessing subtracts), ``"black"``,
        ``"white"``, ``"blur"`` (the image itself, Gaussian, sigma a tenth of the shorter side), or one image
        (C, H, W) like the input images.

    Returns
    -------
    Tensor
        (1, C, H, W), or (n, C, H, W) for ``"blur"``, in the model's input space.

    Raises
    ------
    HarmonizeError
        Unknown name; black or white for a plain module; an image of another shape.
    """
    shape = task.x.shape[1:]
    if isinstance(baseline, Tensor):
        if baseline.shape != shape:
            raise HarmonizeError(f"baseline must be one image {tuple(shape)}, not {tuple(baseline.shape)}")
        return prepare(task.model, baseline[None]).to(task.x.dtype)
    if baseline not in BASELINES:
        raise unknown("baseline", baseline, BASELINES)
    if baseline == "mean":
        return torch.zeros_like(task.x[:1])
    if baseline == "blur":
        sigma = BLUR_SIGMA * min(shape[-2:])
        return gaussian_blur(task.x, [2 * int(2 * sigma) + 1] * 2, [sigma, sigma])
    if not hasattr(task.model, "preprocess"):
        raise HarmonizeError(f"baseline {baseline!r} needs a model with preprocess: pass an image (C, H, W) instead")
    return prepare(task.model, torch.full((1, *shape), float(baseline == "white")))


def check_numbers(least: float, **values: Any) -> None:
    """Refuse options below their least value.

    Parameters
    ----------
    least : float
        Smallest value allowed; a whole number asks for whole numbers.
    **values : Any
        Options by name.

    Raises
    ------
    HarmonizeError
        Not a number, or too small.
    """
    kinds = int if isinstance(least, int) else (int, float)
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
            kind = "a whole number" if isinstance(least, int) else "a number"
            raise HarmonizeError(f"{name} must be {kind} of at least {least}, not {str(value)[:40]!r}")


def check_generator(generator: object) -> None:
    """Refuse what is given for a generator and is none.

    Parameters
    ----------
    generator : object
        What was given.

    Raises
    ------
    HarmonizeError
        Neither a ``torch.Generator`` nor None.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        kind = type(generator).__name__
        raise HarmonizeError(
            f"generator must be a torch.Generator, such as torch.Generator().manual_seed(0), not {kind}"
        )


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode afterwards, whatever happens.

    Parameters
    ----------
    model : nn.Module
        The network.

    Yields
    ------
    None
        Nothing.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
