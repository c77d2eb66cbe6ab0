"""One map out of many: rules that harmonize the attributions of several models (or methods)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.features import rank_bounds

RRF_BASE = 60
CRH_STEPS = 20
CRH_FLOOR = 1e-6
_BLOCK = 2**22


def _minmax(a: Tensor) -> Tensor:
    low, high = a.aminmax(dim=-1, keepdim=True)
    return (a - low) / (high - low)


def _l1(a: Tensor) -> Tensor:
    return a / a.abs().sum(-1, keepdim=True)


def _zscore(a: Tensor) -> Tensor:
    return (a - a.mean(-1, keepdim=True)) / a.std(-1, correction=0, keepdim=True)


def _ranks(a: Tensor) -> Tensor:
    """Ascending ranks 1..P along the last axis of (M, n, P), ties averaged."""
    above, up_to = rank_bounds(a.flatten(0, -2))
    return (a.shape[-1] - (above + up_to - 1).to(a.dtype) / 2).reshape(a.shape)


def _rank(a: Tensor) -> Tensor:
    return (_ranks(a) - 1) / (a.shape[-1] - 1)


NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "minmax": _minmax,
    "l1": _l1,
    "zscore": _zscore,
    "rank": _rank,
}


# Rules: a (M, n, P) normalized maps (order-only rules: ascending ranks), votes (M, n, 1) which maps are not
# constant. A map without a vote is zero in `a`; an image without any vote is overwritten with 0 afterwards.


def _mean(a: Tensor, votes: Tensor) -> Tensor:
    return (a * votes).sum(0) / votes.sum(0)


def _median(a: Tensor, votes: Tensor) -> Tensor:
    ordered = a.masked_fill(~votes, torch.inf).sort(0).values
    count = votes.sum(0, keepdim=True).clamp(min=1).expand(1, *a.shape[1:])
    return (ordered.gather(0, (count - 1) // 2) + ordered.gather(0, count // 2))[0] / 2


def _agg_var(a: Tensor, votes: Tensor) -> Tensor:
    mean = _mean(a, votes)
    std = _mean((a - mean).square(), votes).sqrt()
    epsilon = 10 * mean.abs().mean(-1, keepdim=True)
    return mean / (std + epsilon).clamp(min=1e-12)


def _crh(a: Tensor, votes: Tensor) -> Tensor:
    truth = _median(a, votes)
    for _ in range(CRH_STEPS):
        weight = votes / (CRH_FLOOR + (a - truth).square().mean(-1, keepdim=True))
        truth = (weight * a).sum(0) / weight.sum(0)
    return truth


def _geometric(a: Tensor, votes: Tensor) -> Tensor:
    logs = a.clamp(min=0).log().masked_fill(~votes, 0)
    return (logs.sum(0) / votes.sum(0)).exp()


def _minimum(a: Tensor, votes: Tensor) -> Tensor:
    return a.masked_fill(~votes, torch.inf).amin(0)


def _maximum(a: Tensor, votes: Tensor) -> Tensor:
    return a.masked_fill(~votes, -torch.inf).amax(0)


def _borda(ranks: Tensor, votes: Tensor) -> Tensor:
    return _mean(ranks - 1, votes)


def _rrf(ranks: Tensor, votes: Tensor) -> Tensor:
    descending = ranks.shape[-1] + 1 - ranks
    return (votes / (RRF_BASE + descending)).sum(0)


def _rank_product(ranks: Tensor, votes: Tensor) -> Tensor:
    descending = ranks.shape[-1] + 1 - ranks
    return -_mean(descending.log(), votes)


def _partial_order(ranks: Tensor, votes: Tensor) -> Tensor:
    """Score s_p = #{q: q <= p in every map} - #{q: p <= q in every map}; a constant map orders nothing."""
    models, images, pixels = ranks.shape
    ranks = (2 * ranks).to(torch.int16 if pixels < 2**14 else torch.int32)
    score = ranks.new_zeros((images, pixels), dtype=torch.int32)
    block = max(1, 2**20 // pixels**2)
    rows = max(1, min(pixels, 2**20 // pixels))
    for i in range(0, images, block):
        for p in range(0, pixels, rows):
            part = ranks[:, i : i + block]
            above = part[0, :, p : p + rows, None] >= part[0, :, None, :]
            for m in range(1, models):
                above &= part[m, :, p : p + rows, None] >= part[m, :, None, :]
            above = above.view(torch.uint8)
            score[i : i + block, p : p + rows] += above.sum(2, dtype=torch.int32)
            score[i : i + block] -= above.sum(1, dtype=torch.int32)
    return score


class Rule(NamedTuple):
    """A consensus rule: its formula, its own normalization (None: uses the order alone) and its source."""

    combine: Callable[[Tensor, Tensor], Tensor]
    normalization: str | None
    formula: str
    reference: str


RULES: dict[str, Rule] = {
    "mean": Rule(_mean, "minmax", "mean_m a_m", "Rieger & Hansen 2019 (arXiv 1903.00519), AGG-Mean"),
    "median": Rule(_median, "minmax", "median_m a_m", "Fox & Shaw 1994 (TREC-2), CombMED"),
    "agg_var": Rule(
        _agg_var,
        "minmax",
        "mean_m a_m / (std_m a_m + 10 mean_p |mean_m a_m|)",
        "Rieger & Hansen 2019 (arXiv 1903.00519), AGG-Var",
    ),
    "crh": Rule(
        _crh,
        "minmax",
        f"t = median; {CRH_STEPS} times: w_m = 1 / ({CRH_FLOOR} + mean_p (a_m - t)^2), t = sum w a / sum w",
        "Li et al. 2014 (SIGMOD), truth discovery",
    ),
    "geometric": Rule(_geometric, "minmax", "(prod_m max(a_m, 0))^(1/M)", "Genest & Zidek 1986 (Stat. Sci. 1)"),
    "min": Rule(_minimum, "minmax", "min_m a_m", "Fox & Shaw 1994 (TREC-2), CombMIN"),
    "max": Rule(_maximum, "minmax", "max_m a_m", "Fox & Shaw 1994 (TREC-2), CombMAX"),
    "borda": Rule(_borda, None, "mean_m #{pixels below p}", "Borda 1781"),
    "rrf": Rule(
        _rrf,
        None,
        f"sum_m 1 / ({RRF_BASE} + r_m), r_m = 1 at the top",
        "Cormack, Clarke & Buettcher 2009 (SIGIR)",
    ),
    "rank_product": Rule(
        _rank_product, None, "-mean_m log r_m, r_m = 1 at the top", "Breitling et al. 2004 (FEBS Letters 573)"
    ),
    "partial_order": Rule(
        _partial_order,
        None,
        "#{q: q <= p in all m} - #{q: p <= q in all m}",
        "Laberge et al. 2023 (arXiv 2110.13369)",
    ),
}


def list_rules() -> list[str]:
    """Name the consensus rules.

    Returns
    -------
    list[str]
        The names that :func:`consensus` takes.
    """
    return list(RULES)


def normalize_maps(maps: Tensor, normalization: str) -> Tensor:
    """Bring every map, by itself, to a common scale.

    Parameters
    ----------
    maps : Tensor
        (..., H, W), any units, signed; finite.
    normalization : str
        ``"minmax"``: (a - min) / (max - min), in [0, 1]; ``"l1"``: a / sum |a|, keeps the sign; ``"zscore"``:
        (a - mean) / std (population), mean 0; ``"rank"``: (r - 1) / (HW - 1) with average ranks for ties, in [0, 1].

    Returns
    -------
    Tensor
        (..., H, W) float32. A constant map has nothing to scale and becomes 0 everywhere.

    Raises
    ------
    HarmonizeError
        Unknown normalization; NaN or infinite values.

    Notes
    -----
    ``minmax`` and ``rank`` put the most negative pixel at 0: evidence against the class counts as least relevant.
    ``l1`` and ``zscore`` are signed. Pass ``maps.abs()`` where magnitude is meant.
    """
    flat = _flat(maps, normalization)
    return _normalize(flat, normalization).float().reshape(maps.shape)


def consensus(maps: Tensor, rule: str = "mean", normalization: str | None = None, patch: int | None = None) -> Tensor:
    """Combine the maps of several models into one map per image.

    Parameters
    ----------
    maps : Tensor
        (M, N, H, W), one map per model (or method) and image; any units, signed, finite. Left as it is.
    rule : str
        A name of :func:`list_rules`; formula and source of each stand in ``RULES``.
    normalization : str | None
        See :func:`normalize_maps`; None takes the rule's own (``RULES[rule].normalization``). The rules that use
        the order alone (``borda``, ``rrf``, ``rank_product``, ``partial_order``) give the same under each.
    patch : int | None
        Side in pixels of the squares over which maps are averaged first; the result is constant on each. None
        works on pixels.

    Returns
    -------
    Tensor
        (N, H, W) float32, larger = more relevant, in the rule's own units.

    Raises
    ------
    HarmonizeError
        Unknown rule or normalization; maps that are not (M, N, H, W); NaN or infinite values (names model and
        image); a patch that does not divide the map.

    Notes
    -----
    Each image is treated by itself; the order of models does not matter. A constant map (after pooling) carries no
    vote; where no map carries one, the result is 0 everywhere. Ties share their average rank. One model alone gives
    an increasing transform of its map. Negative values: see :func:`normalize_maps`; ``geometric`` counts what is
    still negative after normalization (``l1``, ``zscore``) as 0, so one model without evidence vetoes a pixel.

    Departures. ``agg_var``: epsilon is 10 times the mean, as in the public code of the RBM ensemble of explanations,
    but of each image rather than of the batch; std is the population's, so that M = 1 is defined. ``crh``: squared
    loss with inverse-loss weights instead of the paper's -log; the floor 1e-6 is meant for values of order one (under
    ``l1`` the weights are nearly equal). ``partial_order``: the difference of two counts is this project's way to
    make a map of a partial order; a pair that some maps tie is kept when no map contradicts it. It compares all pairs
    of pixels: about 70 ms per image for M = 6 at 64x64 on one core, under 1 ms with ``patch=4``.
    """
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    combine, own, *_ = RULES[rule]
    normalization = normalization or own or "rank"
    if not isinstance(maps, Tensor):
        raise HarmonizeError(f"maps must be one tensor, not a {type(maps).__name__}: torch.stack joins maps (N, H, W)")
    if maps.ndim != 4 or 0 in maps.shape:
        raise HarmonizeError(f"maps must be (models, images, height, width), none of them 0, not {tuple(maps.shape)}")
    pooled = maps.detach() if patch is None else _pool(maps.detach(), patch)
    flat = _flat(pooled, normalization)
    step = max(1, _BLOCK // (flat.shape[0] * flat.shape[2]))
    parts = []
    for part in flat.split(step, dim=1):
        votes = _votes(part)
        scaled = _ranks(part) if own is None else _normalize(part, normalization)
        parts.append(combine(scaled, votes).masked_fill(~votes.any(0), 0).float())
    result = torch.cat(parts).reshape(pooled.shape[1:])
    return result if patch is None else result.repeat_interleave(patch, 1).repeat_interleave(patch, 2)


def consensus_record(rule: str, normalization: str | None = None, patch: int | None = None) -> dict[str, object]:
    """Tell what :func:`consensus` does with these arguments, for the record of a run.

    Parameters
    ----------
    rule : str
        A name of :func:`list_rules`.
    normalization : str | None
        As in :func:`consensus`.
    patch : int | None
        As in :func:`consensus`.

    Returns
    -------
    dict[str, object]
        ``rule``, ``normalization`` (as applied), ``patch``, ``formula``, ``reference``.

    Raises
    ------
    HarmonizeError
        Unknown rule or normalization.
    """
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    if normalization is not None and normalization not in NORMALIZATIONS:
        raise unknown("normalization", normalization, NORMALIZATIONS)
    _, own, formula, reference = RULES[rule]
    applied = "rank" if own is None else normalization or own
    return {
        "rule": rule,
        "normalization": applied,
        "patch": patch,
        "formula": formula,
        "reference": reference,
    }


def _votes(a: Tensor) -> Tensor:
    low, high = a.aminmax(dim=-1, keepdim=True)
    return high > low


def _normalize(a: Tensor, normalization: str) -> Tensor:
    return NORMALIZATIONS[normalization](a).masked_fill(~_votes(a), 0)


def _flat(maps: Tensor, normalization: str) -> Tensor:
    """Check maps and give them as (..., HW) float64."""
    if normalization not in NORMALIZATIONS:
        raise unknown("normalization", normalization, NORMALIZATIONS)
    flat = maps.detach().to(torch.float64).flatten(-2)
    wrong = ~flat.isfinite().all(-1)
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        place = f"model {where[0]}, image {where[1]}" if len(where) == 2 else f"map {where}"
        count = int(wrong.sum())
        raise HarmonizeError(f"NaN or infinite values in {place} ({count} maps in all): maps must be finite")
    return flat


def _pool(maps: Tensor, patch: int) -> Tensor:
    height, width = maps.shape[-2:]
    if not isinstance(patch, int) or patch < 1 or height % patch or width % patch:
        raise HarmonizeError(f"patch {patch} does not divide the {height}x{width} map: choose a common divisor")
    return avg_pool2d(maps.to(torch.float64), patch)
