"""What runs where, how complete the maps are, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from captum.attr import IntegratedGradients, Saliency
from torch import Tensor
from tqdm import tqdm

from harmonize_lib.attribution import METHODS, default_rows, explain, refusal
from harmonize_lib.data import Dataset
from harmonize_lib.models import Model
from harmonize_lib.study import attributions

CAPTUM_IMAGES, CAPTUM_STEPS, CAPTUM_RULE = 32, 32, "gausslegendre"
FULL_PASS_MOST = 64  # images in a throughput measurement, unless more are asked for

Records = Mapping[tuple[str, str], Mapping[str, Tensor]]


def what_runs(models: Mapping[str, Model], methods: Iterable[str]) -> pd.DataFrame:
    """Which method is defined for which model, and why not.

    Parameters
    ----------
    models : Mapping[str, Model]
        Models by name.
    methods : Iterable[str]
        Attribution methods.

    Returns
    -------
    pd.DataFrame
        Columns ``method``, ``model``, ``runs``, ``reason`` (empty where the method runs).
    """
    rows = []
    for method in methods:
        for name, model in models.items():
            reason = refusal(model, method)
            rows.append((method, name, reason is None, reason or ""))
    return pd.DataFrame(rows, columns=["method", "model", "runs", "reason"])


def extract(
    models: Mapping[str, Model],
    dataset: Dataset,
    methods: Iterable[str],
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """All that is stored of every model's attributions by every method that is defined for it.

    Parameters
    ----------
    models : Mapping[str, Model]
        Models by name.
    dataset : Dataset
        N images.
    methods : Iterable[str]
        Attribution methods.
    seed : int
        Seed of the methods' randomness.
    options : Mapping[str, Mapping[str, Any]] | None
        Method to its options.

    Returns
    -------
    dict[tuple[str, str], dict[str, Tensor]]
        (model, method) to what :func:`harmonize_lib.study.attributions` gives.
    """
    jobs = [(name, method) for name in models for method in methods if refusal(models[name], method) is None]
    return {
        (name, method): attributions(models[name], dataset, method, seed, **(options or {}).get(method, {}))
        for name, method in tqdm(jobs, desc="attributions", mininterval=1)
    }


def centered(method: str, values: Tensor) -> Tensor:
    """A map about zero, to be drawn: RISE's, a mean probability, minus its median; all others as they are.

    Parameters
    ----------
    method : str
        The attribution method.
    values : Tensor
        (H, W).

    Returns
    -------
    Tensor
        (H, W).
    """
    return values - values.median() if method == "rise" else values


def completeness_table(records: Records) -> pd.DataFrame:
    """How far the sum of the attributions is from what it should be, for the methods that promise one.

    Parameters
    ----------
    records : Records
        From :func:`extract`.

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``method``, ``mean`` (median over images of the gap relative to the difference of logits it
        should sum to), ``low`` and ``high`` (quartiles), ``steps`` and ``steps_most`` (median and largest number of
        gradients per image; NaN where the method takes no steps), ``n`` images.
    """
    rows = []
    for (name, method), record in records.items():
        gap, steps = (record[key].double().numpy() for key in ("gap", "steps"))
        if METHODS[method].completeness:
            low, median, high = np.nanquantile(gap, [0.25, 0.5, 0.75])
            rows.append((name, method, median, low, high, np.median(steps), np.max(steps), np.isfinite(gap).sum()))
    return pd.DataFrame(rows, columns=["model", "method", "mean", "low", "high", "steps", "steps_most", "n"])


def cost_table(records: Records) -> pd.DataFrame:
    """Seconds per image, as they were when the maps were made.

    Parameters
    ----------
    records : Records
        From :func:`extract`.

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``method``, ``seconds`` (mean over images), ``steps`` (median passes per image, 1 where a
        method counts none), ``n``.
    """
    rows = [
        (name, method, record["seconds"].mean().item(), _steps(record), len(record["seconds"]))
        for (name, method), record in records.items()
    ]
    return pd.DataFrame(rows, columns=["model", "method", "seconds", "steps", "n"])


def _steps(record: Mapping[str, Tensor]) -> float:
    return float(record["steps"].nan_to_num(1).median())


def throughput(
    models: Mapping[str, Model],
    dataset: Dataset,
    records: Records,
    least: int = 2,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> pd.DataFrame:
    """Images per second of every model and method, measured now.

    Parameters
    ----------
    models : Mapping[str, Model]
        Models by name.
    dataset : Dataset
        N images.
    records : Records
        From :func:`extract`: what is measured, and the steps that tell how many images fill one pass.
    least : int
        Images per measurement at least; more, up to 64, where steps times images leave room in a pass.
    seed : int
        Seed of the methods' randomness.
    options : Mapping[str, Mapping[str, Any]] | None
        Method to its options, as they were extracted.

    Returns
    -------
    pd.DataFrame
        Columns ``method``, ``model``, ``images_per_second``, and the settings: ``images``, ``rows`` (most (image, step)
        pairs in one pass), ``steps`` (median), ``device``, ``threads``, ``dtype``, ``torch``.

    Notes
    -----
    One measurement of the whole call, logits, checks and transfers included, after one call that warms up.
    """
    rows, most = [], default_rows(dataset.images)
    for (name, method), record in tqdm(records.items(), desc="throughput", mininterval=1):
        model, steps = models[name], _steps(record)
        n = min(max(least, min(FULL_PASS_MOST, int(most // steps))), len(dataset))
        images, targets = dataset.images[:n], dataset.labels[:n]
        explain(model, images[:1], targets[:1], "saliency")
        generator = torch.Generator().manual_seed(seed)
        chosen = (options or {}).get(method, {})
        seconds = explain(model, images, targets, method, generator, **chosen).record["seconds"]
        rows.append((method, name, n / seconds, n, most, steps, *_settings(model)))
    settings = ["images", "rows", "steps", "device", "threads", "dtype", "torch"]
    return pd.DataFrame(rows, columns=["method", "model", "images_per_second", *settings])


def _settings(model: Model) -> tuple[str, int, str, str]:
    weight = next(model.parameters())
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else "CPU"
    return device, torch.get_num_threads(), str(weight.dtype).removeprefix("torch."), torch.__version__


def against_captum(
    models: Mapping[str, Model], dataset: Dataset, images: int = CAPTUM_IMAGES, repeats: int = 3
) -> pd.DataFrame:
    """Time and compare with Captum: saliency and integrated gradients at the same settings, in turns.

    Parameters
    ----------
    models : Mapping[str, Model]
        Models by name.
    dataset : Dataset
        N images.
    images : int
        Images of saliency; integrated gradients take as many as fill one pass, at least 2.
    repeats : int
        Measurements of either, one after the other.

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``method``, ``seconds`` and ``captum_seconds`` per image (medians), ``ratio`` (Captum's over
        ours, above 1 where this library is faster; median over pairs) with ``low`` and ``high`` (its range),
        ``difference`` (largest difference of the maps relative to their largest value), and the settings ``images``,
        ``steps``, ``rows``, ``rule``, ``device``, ``threads``, ``dtype``, ``torch``.

    Notes
    -----
    Ours is the whole ``explain``, with logits, probabilities, completeness and checks; Captum's is ``attribute`` on
    preprocessed images and the sum over channels.
    """
    rows, most = [], default_rows(dataset.images)
    for name, model in tqdm(models.items(), desc="captum", mininterval=1):
        for method, n in (("saliency", images), ("integrated_gradients", max(2, most // CAPTUM_STEPS))):
            part = slice(0, min(n, len(dataset)))
            ours, captum = _pair(model, dataset.images[part], dataset.labels[part], method)
            ours(), captum()
            times = np.empty((repeats, 2))
            for turn in range(repeats):
                (times[turn, 0], mine), (times[turn, 1], theirs) = _timed(ours), _timed(captum)
            difference = ((mine - theirs).abs().max() / theirs.abs().max()).item()
            ratio = times[:, 1] / times[:, 0]
            each = np.median(times, axis=0) / len(mine)
            estimate = (*each, np.median(ratio), ratio.min(), ratio.max(), difference)
            steps = CAPTUM_STEPS if method == "integrated_gradients" else 1
            rows.append((name, method, *estimate, len(mine), steps, most, CAPTUM_RULE, *_settings(model)))
    estimates = ["seconds", "captum_seconds", "ratio", "low", "high", "difference"]
    settings = ["images", "steps", "rows", "rule", "device", "threads", "dtype", "torch"]
    return pd.DataFrame(rows, columns=["model", "method", *estimates, *settings])


def _pair(
    model: Model, images: Tensor, targets: Tensor, method: str
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    x, where = model.preprocess(images), targets.to(next(model.parameters()).device)
    if method == "saliency":
        saliency = Saliency(model)
        return (
            lambda: explain(model, images, targets, method).maps,
            lambda: saliency.attribute(x.clone().requires_grad_(), where, abs=True).sum(1).detach().cpu(),
        )
    options: dict[str, Any] = {"steps": CAPTUM_STEPS, "rule": CAPTUM_RULE, "tolerance": None}
    path, rows = IntegratedGradients(model), default_rows(images)
    return (
        lambda: explain(model, images, targets, method, **options).maps,
        lambda: (
            path.attribute(x, target=where, n_steps=CAPTUM_STEPS, method=CAPTUM_RULE, internal_batch_size=rows)
            .sum(1)
            .detach()
            .cpu()
        ),
    )


def _timed(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    begin = time.perf_counter()
    maps = function()
    return time.perf_counter() - begin, maps


def refusals(table: pd.DataFrame, marks: Sequence[str] = "abcdefghijklmnop") -> tuple[pd.DataFrame, dict[str, str]]:
    """Number the reasons for which methods do not run.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`what_runs`.
    marks : Sequence[str]
        Letters for the reasons, in order of appearance.

    Returns
    -------
    tuple[pd.DataFrame, dict[str, str]]
        The table with a column ``mark`` (empty where the method runs), and mark to reason.
    """
    reasons = dict(zip(dict.fromkeys(table.loc[~table["runs"], "reason"]), marks, strict=False))
    return table.assign(mark=table["reason"].map(reasons).fillna("")), {mark: why for why, mark in reasons.items()}
