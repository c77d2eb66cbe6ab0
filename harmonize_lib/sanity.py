"""Sanity checks: do maps change when what the model has learned is destroyed?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harmonize_lib.agreement import spearman, ssim
from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.models import Model, shuffled
from harmonize_lib.storage import sha256_tensors

ORIENTATIONS, CELL = 9, 8  # of histograms of oriented gradients; pixels


def spearman_of_magnitudes(a: Tensor, b: Tensor) -> Tensor:
    """Spearman rank correlation of the magnitudes of two maps.

    Parameters
    ----------
    a : Tensor
        (N, H, W) maps, any range, signed.
    b : Tensor
        (N, H, W) maps, any range, signed.

    Returns
    -------
    Tensor
        (N) in [-1, 1]; NaN if a map is constant in magnitude.

    References
    ----------
    Adebayo et al. 2018 (arXiv 1810.03292), section 3: rank correlation with absolute values.
    """
    return spearman(a.abs(), b.abs())


def gradient_histograms(maps: Tensor) -> Tensor:
    """Histograms of oriented gradients: which way a map rises, cell by cell.

    A pixel votes with the size of its gradient for the two of nine orientations, 20 degrees wide and without sign,
    between whose centers its own lies, in shares that fall linearly with the distance; a cell is 8 x 8 pixels.

    Parameters
    ----------
    maps : Tensor
        (N, H, W) maps, any range; H and W at least 8.

    Returns
    -------
    Tensor
        (N, 9 * (H // 8) * (W // 8)) mean votes per orientation and cell, in units of the map per pixel.

    References
    ----------
    Dalal & Triggs 2005, whose normalization of blocks is left out: it would weigh cells without attribution like all
    others.
    """
    rise, slope = torch.gradient(maps, dim=(1, 2))
    size, place = torch.hypot(rise, slope), torch.atan2(rise, slope) * (ORIENTATIONS / math.pi) - 0.5
    below = place.floor()
    votes = maps.new_zeros(len(maps), ORIENTATIONS, *maps.shape[1:])
    for step, share in ((0, 1 - (place - below)), (1, place - below)):
        orientation = (below.nan_to_num().long() + step) % ORIENTATIONS
        votes.scatter_(1, orientation[:, None], (share * size)[:, None])
    return F.avg_pool2d(votes, CELL).flatten(1)


def hog_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of the histograms of oriented gradients of two maps.

    Parameters
    ----------
    a : Tensor
        (N, H, W) maps, any range, signed; H and W at least 8.
    b : Tensor
        (N, H, W) maps, any range, signed.

    Returns
    -------
    Tensor
        (N) in [-1, 1]; NaN if a map is constant.

    References
    ----------
    Adebayo et al. 2018 (arXiv 1810.03292), section 3, with the cells of :func:`gradient_histograms`.
    """
    x, y = (h - h.mean(1, keepdim=True) for h in (gradient_histograms(a.double()), gradient_histograms(b.double())))
    return ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).to(a.dtype)


SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "spearman": spearman,
    "spearman_of_magnitudes": spearman_of_magnitudes,
    "ssim": ssim,
    "HOG": hog_correlation,
}


def layers(model: Model) -> list[tuple[str, ...]]:
    """Parameters of the network, layer by layer, in the order in which a pass reaches them.

    Parameters
    ----------
    model : Model
        Any; left as it is.

    Returns
    -------
    list[tuple[str, ...]]
        Names of parameters, the input's layer first; each parameter stands in exactly one layer.

    Notes
    -----
    A layer begins with a module that owns a weight of two or more dimensions; what follows with vectors alone
    (normalization, layer scale) belongs to it, and what precedes the first to the first. A module that is not called
    itself stands where its nearest called ancestor does.
    """
    modules = dict(model.network.named_modules())
    called = _order_of_calls(model)
    owned: dict[str, list[str]] = {}
    for name, _ in model.network.named_parameters():
        owned.setdefault(name.rpartition(".")[0], []).append(name)

    def place(name: str) -> int:
        while name not in called:
            name = name.rpartition(".")[0]
        return called[name]

    found: list[list[str]] = [[]]
    weighed = False
    for owner in sorted(owned, key=place):
        weighs = any(parameter.ndim > 1 for parameter in modules[owner].parameters(recurse=False))
        if weighs and weighed:
            found.append([])
        weighed = weighed or weighs
        found[-1] += owned[owner]
    return [tuple(names) for names in found if names]


def _order_of_calls(model: Model) -> dict[str, int]:
    """Module name to its place among the modules that one pass calls, by first call."""
    called: dict[str, int] = {}

    def note(name: str, module: nn.Module, arguments: Any) -> None:
        called.setdefault(name, len(called))

    handles = [module.register_forward_pre_hook(partial(note, name)) for name, module in model.network.named_modules()]
    try:
        with torch.no_grad():
            size = model.input_size or (64, 64)
            model(torch.zeros(1, len(model.mean), *size, device=model.mean.device))
    finally:
        for handle in handles:
            handle.remove()
    return called


def stages(model: Model, count: int = 5) -> list[tuple[str, ...]]:
    """Parameters in the groups that are randomized one after the other, from the logits down.

    Parameters
    ----------
    model : Model
        Any; left as it is.
    count : int
        Groups at most, at least 1: the layer that gives the logits, then the other layers (see :func:`layers`) in
        equal numbers.

    Returns
    -------
    list[tuple[str, ...]]
        Names of parameters, the logits' layer first; each parameter stands in exactly one group.

    Raises
    ------
    HarmonizeError
        A count under 1; a network without parameters.
    """
    if count < 1:
        raise HarmonizeError(f"stages must be at least 1, not {count}")
    upward = layers(model)[::-1]
    if not upward:
        raise HarmonizeError(f"{model.name} has no parameters: there is nothing to randomize")
    if count == 1:
        return [tuple(name for layer in upward for name in layer)]
    rest = [part for part in np.array_split(np.arange(1, len(upward)), count - 1) if len(part)]
    return [upward[0], *(tuple(name for i in part for name in upward[i]) for part in rest)]


def randomize(model: Model, names: Iterable[str], seed: int) -> Model:
    """Destroy what some parameters have learned: their entries in random order.

    Parameters
    ----------
    model : Model
        Left as it is.
    names : Iterable[str]
        Parameters of ``model.network``.
    seed : int
        Seed of the order. A parameter's order does not depend on which others are chosen, so that randomizing two
        groups together is the same as randomizing one after the other.

    Returns
    -------
    Model
        A copy; the parameters not named and all buffers (BatchNorm statistics) are as they were.

    Raises
    ------
    HarmonizeError
        A name that is no parameter.

    References
    ----------
    Adebayo et al. 2018 (arXiv 1810.03292), section 4.

    Notes
    -----
    The paper draws new weights from a truncated normal distribution; a shuffle keeps each tensor's own distribution,
    so that activations keep their scale in every architecture.
    """
    kept = dict(model.network.named_parameters())
    chosen = set(names)
    for name in chosen:
        if name not in kept:
            raise unknown(f"parameter of {model.name}", name, kept)
    other = shuffled(model, seed)
    with torch.no_grad():
        for name, parameter in other.network.named_parameters():
            if name not in chosen:
                parameter.copy_(kept[name])
    other.weights_hash = sha256_tensors(other.network.state_dict())
    other.name = f"{model.name}-randomized"
    return other


def cascading(model: Model, seed: int, count: int = 5) -> list[Model]:
    """Randomize from the logits down, one stage more each time.

    Parameters
    ----------
    model : Model
        Left as it is.
    seed : int
        See :func:`randomize`.
    count : int
        See :func:`stages`.

    Returns
    -------
    list[Model]
        One copy per stage; in the last, all parameters are randomized.
    """
    groups = stages(model, count)
    return [randomize(model, sum(groups[: i + 1], ()), seed) for i in range(len(groups))]


def independent(model: Model, seed: int, count: int = 5) -> list[Model]:
    """Randomize one stage alone each time.

    Parameters
    ----------
    model : Model
        Left as it is.
    seed : int
        See :func:`randomize`.
    count : int
        See :func:`stages`.

    Returns
    -------
    list[Model]
        One copy per stage; the first is the first of :func:`cascading`.
    """
    return [randomize(model, group, seed) for group in stages(model, count)]
