"""Adaptive wavelet distillation (AWD): a wavelet that carries what a trained network looks at."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import pywt
import torch
from torch import Tensor, nn

from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.tasks import check_numbers, gradient
from harmonize_lib.transformations import dwt, idwt, scales

BATCH = 64  # signals in one step
ATTRIBUTIONS = ("saliency", "input_x_gradient")


@dataclass(frozen=True)
class DistilledWavelet:
    """What :func:`distil_wavelet` gives.

    Attributes
    ----------
    lowpass : Tensor
        (T) float64 reconstruction low-pass filter, orthonormal to its even shifts.
    before : Tensor
        (T) the filter as the descent left it, before it was made orthonormal.
    levels : int
        Depth of the transform.
    reconstruction_error : float
        Largest |x - x^| over the signals, in units of their standard deviation.
    history : pd.DataFrame
        Columns ``step`` and the terms of the loss.
    """

    lowpass: Tensor
    before: Tensor
    levels: int
    reconstruction_error: float
    history: pd.DataFrame


def reference_filter(name: str, taps: int | None = None) -> Tensor:
    """Low-pass filter of a named orthonormal wavelet.

    Parameters
    ----------
    name : str
        A discrete orthogonal wavelet of PyWavelets, e.g. ``"db5"``.
    taps : int | None
        Length, filled with zeros at the end; None keeps the wavelet's own.

    Returns
    -------
    Tensor
        (taps) float64 reconstruction filter, sum sqrt(2).

    Raises
    ------
    HarmonizeError
        Unknown or not orthogonal, or longer than ``taps``.
    """
    known = pywt.wavelist(kind="discrete")
    if name not in known:
        raise unknown("wavelet", name, known)
    filters = pywt.Wavelet(name)
    if not filters.orthogonal:
        raise HarmonizeError(f"wavelet {name!r} is not orthogonal: choose one of db1-db38, sym2-sym20, coif1-coif17")
    lowpass = torch.tensor(filters.rec_lo, dtype=torch.float64)
    taps = len(lowpass) if taps is None else taps
    if taps < len(lowpass):
        raise HarmonizeError(f"wavelet {name!r} has {len(lowpass)} taps, more than {taps}")
    return nn.functional.pad(lowpass, (0, taps - len(lowpass)))


def structure(lowpass: Tensor) -> dict[str, Tensor]:
    """The five terms that are zero exactly for an orthonormal wavelet.

    Parameters
    ----------
    lowpass : Tensor
        (..., T) filters h, T even; g[n] = (-1)^n h[T - 1 - n].

    Returns
    -------
    dict[str, Tensor]
        Name to (...) terms: half the squared misses of sum h = sqrt(2), sum g = 0, |h|^2 = 1,
        |h^_k|^2 + |h^_{k+T/2}|^2 = 2 for k < T/2, and <h, S_2k h> = [k = 0] for every even shift.

    References
    ----------
    Ha et al. 2021 (arXiv 2107.09145), section 3, conditions on the scaling filter.

    Notes
    -----
    The shifts in the last term are linear (zeros come in), for k >= 0: with circular shifts a filter could overlap
    itself at its far end.
    """
    taps = lowpass.shape[-1]
    sign = (-1.0) ** torch.arange(taps, device=lowpass.device)
    power = torch.fft.fft(lowpass).abs().square()
    shifted = torch.stack(
        [
            (lowpass[..., 2 * k :] * lowpass[..., : taps - 2 * k]).sum(-1) - (1.0 if k == 0 else 0.0)
            for k in range(taps // 2)
        ],
        -1,
    )
    terms = {
        "sum": (lowpass.sum(-1) - 2**0.5).square(),
        "highpass sum": (lowpass.flip(-1) * sign).sum(-1).square(),
        "norm": (lowpass.square().sum(-1) - 1).square(),
        "spectrum": (power[..., : taps // 2] + power[..., taps // 2 :] - 2).square().sum(-1),
        "even shifts": shifted.square().sum(-1),
    }
    return {name: term / 2 for name, term in terms.items()}


def loss_terms(
    lowpass: Tensor, x: Tensor, slope: Tensor, levels: int, attribution: str = "saliency"
) -> dict[str, Tensor]:
    """All terms of the loss, without their weights.

    Parameters
    ----------
    lowpass : Tensor
        (S, T) filters.
    x : Tensor
        (S, n, L) signals.
    slope : Tensor
        (S, n, L) gradient of the network at the signals.
    levels : int
        Depth J.
    attribution : str
        ``"saliency"`` or ``"input_x_gradient"``: how importance in the wavelet domain is measured.

    Returns
    -------
    dict[str, Tensor]
        ``reconstruction``, those of :func:`structure`, ``sparsity`` (mean over signals and over the J + 1 sets of
        coefficients of their L1 norm) and ``interpretation`` (the same of their importance), each (S).

    References
    ----------
    Ha et al. 2021 (arXiv 2107.09145), section 3; seeds C.5 of Singh, Ha, Yu 2021 (arXiv 2108.06847).

    Notes
    -----
    TRIM's residual keeps the network at x itself, so its gradient there is a constant of the loss and the importance
    of coefficient i is the i-th wavelet coefficient of that gradient. The reference code also differentiates the
    network's gradient with respect to the filter, which adds nothing for piecewise linear networks.
    """
    if attribution not in ATTRIBUTIONS:
        raise unknown("attribution", attribution, ATTRIBUTIONS)
    analysis = dwt(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1), lowpass, levels)
    s, importance = x @ analysis, slope @ analysis
    if attribution == "input_x_gradient":
        importance = s * importance
    sets = levels + 1
    return {
        "reconstruction": (x - s @ analysis.mT).square().sum(-1).mean(-1),
        **structure(lowpass),
        "sparsity": s.abs().sum(-1).mean(-1) / sets,
        "interpretation": importance.abs().sum(-1).mean(-1) / sets,
    }


def descend(
    lowpass: Tensor,
    x: Tensor,
    slope: Tensor,
    levels: int,
    sparsity: float | Tensor,
    interpretation: float | Tensor,
    generator: torch.Generator,
    steps: int = 1000,
    learning_rate: float = 0.01,
    attribution: str = "saliency",
) -> tuple[Tensor, pd.DataFrame]:
    """Minimize the loss by Adam, for many filters side by side.

    Parameters
    ----------
    lowpass : Tensor
        (S, T) filters to begin with.
    x : Tensor
        (S, n, L) signals.
    slope : Tensor
        (S, n, L) gradient of the network at the signals.
    levels : int
        Depth.
    sparsity : float | Tensor
        Weight lambda of the coefficients' L1 norm; (S) one for each filter.
    interpretation : float | Tensor
        Weight gamma of their importance's; (S) one for each filter.
    generator : torch.Generator
        Draws the signals of each step, on the CPU.
    steps : int
        Steps of Adam, 64 signals each; its rate falls to zero along a cosine.
    learning_rate : float
        The rate at the start.
    attribution : str
        See :func:`loss_terms`.

    Returns
    -------
    tuple[Tensor, pd.DataFrame]
        (S, T) filters, and the terms over the steps (columns ``step``, ``filter`` and the terms).
    """
    lowpass = lowpass.clone().requires_grad_()
    optimizer = torch.optim.Adam([lowpass], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rows = []
    for step in range(steps):
        drawn = torch.randint(x.shape[1], (BATCH,), generator=generator).to(x.device)
        terms = loss_terms(lowpass, x[:, drawn], slope[:, drawn], levels, attribution)
        if step % 20 == 0 or step == steps - 1:
            table = pd.DataFrame({name: term.detach().cpu().numpy() for name, term in terms.items()})
            rows.append(table.assign(step=step, filter=range(len(table))))
        weights = {"sparsity": sparsity, "interpretation": interpretation}
        optimizer.zero_grad()
        torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum().backward()
        optimizer.step()
        schedule.step()
    return lowpass.detach(), pd.concat(rows, ignore_index=True)


def orthonormalize(lowpass: Tensor, steps: int = 50) -> Tensor:
    """The nearby filter that is an orthonormal wavelet exactly, by Newton's method on the conditions.

    Parameters
    ----------
    lowpass : Tensor
        (T) filter not far from orthonormal.
    steps : int
        Newton steps at most.

    Returns
    -------
    Tensor
        (T) float64 with sum g = 0 and <h, S_2k h> = [k = 0] to rounding, from which sum h = sqrt(2) follows.

    Raises
    ------
    HarmonizeError
        No such filter was found nearby.
    """

    sign = (-1.0) ** torch.arange(len(lowpass), dtype=torch.float64, device=lowpass.device)

    def conditions(h: Tensor) -> Tensor:
        lags = [h[2 * k :] @ h[: len(h) - 2 * k] for k in range(len(h) // 2)]
        return torch.stack([(h * sign).sum(), lags[0] - 1, *lags[1:]])

    h = lowpass.detach().double()
    for _ in range(steps):
        missing = conditions(h)
        if not missing.isfinite().all() or missing.abs().max() < 1e-15:
            break
        h = h - torch.linalg.pinv(torch.func.jacrev(conditions)(h)) @ missing
    if not conditions(h).abs().max() < 1e-9:
        raise HarmonizeError("no orthonormal wavelet lies near this filter: descend longer, or weigh the others less")
    return h


def distil_wavelet(
    model: nn.Module,
    signals: Tensor,
    target: int = 0,
    wavelet: str = "db5",
    levels: int = 3,
    sparsity: float = 0.005,
    interpretation: float = 1.0,
    steps: int = 1000,
    learning_rate: float = 0.01,
    attribution: str = "saliency",
    seed: int = 0,
) -> DistilledWavelet:
    """Learn an orthonormal wavelet in which a network's importance is sparse.

    Parameters
    ----------
    model : nn.Module
        In eval mode; gives outputs (N, K).
    signals : Tensor
        (N, L) or (N, 1, L) float, as the network takes them; 2^levels divides L.
    target : int
        Output that is distilled.
    wavelet : str
        Where the descent begins.
    levels : int
        Depth.
    sparsity : float
        Weight of the coefficients' L1 norm.
    interpretation : float
        Weight of their importance's L1 norm; 0 ignores the network.
    steps : int
        Steps of Adam.
    learning_rate : float
        Its rate at the start.
    attribution : str
        ``"saliency"`` or ``"input_x_gradient"``.
    seed : int
        Seed of the order of signals.

    Returns
    -------
    DistilledWavelet
        The filter with its reconstruction error and history.

    Raises
    ------
    HarmonizeError
        Signals of another shape, an unknown wavelet or attribution, options out of range.

    References
    ----------
    Ha et al. 2021 (arXiv 2107.09145); seeds C.5 of Singh, Ha, Yu 2021 (arXiv 2108.06847).

    Notes
    -----
    Departure: a last step replaces the filter by the orthonormal one nearby, because the
    descent alone leaves the structural terms small but not zero.
    """
    check_numbers(1, levels=levels, steps=steps)
    check_numbers(0.0, sparsity=sparsity, interpretation=interpretation, learning_rate=learning_rate)
    if signals.shape[:-1] not in ((len(signals),), (len(signals), 1)):
        raise HarmonizeError(f"signals must be (N, L) or (N, 1, L), not {tuple(signals.shape)}")
    slope, _ = gradient(model, signals, torch.full((len(signals),), target, device=signals.device))
    x, slope = (part.flatten(1).double()[None] for part in (signals, slope))
    start = reference_filter(wavelet).to(x)[None]
    generator = torch.Generator().manual_seed(seed)
    before, history = descend(
        start, x, slope, levels, sparsity, interpretation, generator, steps, learning_rate, attribution
    )
    lowpass = orthonormalize(before[0])
    missing = (idwt(dwt(x[0], lowpass, levels), lowpass, levels) - x[0]).abs().max() / x.std()
    return DistilledWavelet(lowpass, before[0], levels, float(missing), history.drop(columns="filter"))


def filter_similarity(a: Tensor, b: Tensor) -> float:
    """Cosine of two filters after the best shift and sign.

    Parameters
    ----------
    a : Tensor
        (T) filter.
    b : Tensor
        (U) filter.

    Returns
    -------
    float
        In [0, 1]; shifts are linear.
    """
    overlaps = nn.functional.conv1d(nn.functional.pad(a, (len(b) - 1,) * 2)[None, None], b[None, None].to(a))
    return float(overlaps.abs().max() / (a.norm() * b.norm()))


def atom(lowpass: Tensor, level: int) -> Tensor:
    """The wavelet at a scale: what one detail coefficient stands for.

    Parameters
    ----------
    lowpass : Tensor
        (T) filter.
    level : int
        1 for the finest scale.

    Returns
    -------
    Tensor
        ((T - 1)(2^level - 1) + 1) samples.
    """
    taps = len(lowpass)
    wave = lowpass.flip(0) * (-1.0) ** torch.arange(taps, device=lowpass.device)
    for _ in range(level - 1):
        spread = torch.zeros(2 * len(wave) - 1, dtype=wave.dtype, device=wave.device)
        spread[::2] = wave
        wave = nn.functional.conv1d(nn.functional.pad(spread, (taps - 1,) * 2)[None, None], lowpass.flip(0)[None, None])
        wave = wave[0, 0]
    return wave


def peaks(x: Tensor, lowpass: Tensor, levels: int, count: int = 6) -> Tensor:
    """Features of a signal: the largest positive coefficients of every scale.

    Parameters
    ----------
    x : Tensor
        (N, L) signals.
    lowpass : Tensor
        (T) filter.
    levels : int
        Depth J.
    count : int
        Coefficients per scale.

    Returns
    -------
    Tensor
        (N, (J + 1) count) in descending order within a scale, 0 where a coefficient is negative.

    References
    ----------
    Ha et al. 2021 (arXiv 2107.09145), section 4.2: six maximum coefficients per scale.
    """
    s = dwt(x, lowpass, levels).clamp(min=0)
    which = scales(x.shape[-1], levels)
    parts = [s[:, which == scale] for scale in range(levels + 1)]
    return torch.cat([part.topk(min(count, part.shape[1]), 1).values for part in parts], 1)


def compression(x: Tensor, lowpass: Tensor, levels: int, energy: float = 0.95) -> float:
    """Share of the coefficients that holds most of the signals' energy.

    Parameters
    ----------
    x : Tensor
        (N, L) signals.
    lowpass : Tensor
        (T) filter.
    levels : int
        Depth.
    energy : float
        How much of the sum of squares is to be kept, in (0, 1).

    Returns
    -------
    float
        Smallest share of coefficients, the same threshold for all signals; lower is better.

    Notes
    -----
    The paper reports a compression factor without printing its threshold; this definition is this project's.
    """
    squares = dwt(x, lowpass, levels).square().flatten().sort(descending=True).values
    total = squares.cumsum(0)
    return (int((total < energy * total[-1]).sum()) + 1) / len(total)
