"""What the notebooks share: their start, maps from the store, recognition, and saving figures."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from harmonize_lib import parameters, paths, plots
from harmonize_lib.attribution import METHODS, explain, refusal
from harmonize_lib.data import Dataset, load_dataset
from harmonize_lib.models import Model, list_models, load_model
from harmonize_lib.storage import remember, sha256_tensors

CHUNK = 50  # images per stored shard
REFERENCES = 64


@dataclass(frozen=True)
class Run:
    """One execution of a notebook.

    Attributes
    ----------
    notebook : str
        Its name.
    settings : Any
        Its checked parameters.
    dataset : Dataset
        The images explained.
    models : dict[str, Model]
        The models compared, by spec.
    folder : Path
        Where its figures go.
    started : float
        Monotonic clock at the start.
    """

    notebook: str
    settings: Any
    dataset: Dataset
    models: dict[str, Model]
    folder: Path
    started: float


def start(notebook: str, values: Mapping[str, Any]) -> Run:
    """Check a notebook's parameters and load what it needs.

    Parameters
    ----------
    notebook : str
        A key of ``parameters.NOTEBOOKS``.
    values : Mapping[str, Any]
        ``globals()`` of the notebook.

    Returns
    -------
    Run
        The run.

    Raises
    ------
    HarmonizeError
        A parameter, data set or model that will not do.
    """
    settings = parameters.check(notebook, values)
    for method in settings.methods:
        if method not in METHODS:
            raise parameters.unknown("method", method, METHODS)
    plots.style()
    started = time.monotonic()
    figures = Path(settings.output).expanduser() if settings.output else paths.FIGURES
    dataset = load_dataset(settings.dataset, "test", settings.n_images)
    models = {name: load_model(name, device=settings.device) for name in settings.models}
    return Run(notebook, settings, dataset, models, figures / notebook, started)


def second_seed(name: str) -> str | None:
    """The zoo's second seed of a model.

    Parameters
    ----------
    name : str
        E.g. ``"resnet-obj"``.

    Returns
    -------
    str or None
        E.g. ``"resnet-obj-s1"``; None where there is none.
    """
    other = f"{name}-s1"
    return other if other in list_models() else None


def attributions(model: Model, dataset: Dataset, method: str, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    """Maps of one model by one method, computed once and kept in the store.

    Parameters
    ----------
    model : Model
        The model explained.
    dataset : Dataset
        N images; the label is the class explained.
    method : str
        A method that is defined for the model.
    seed : int
        Seed of the method's randomness.
    **options : Any
        Options of the method.

    Returns
    -------
    dict[str, Tensor]
        ``maps`` (N, H, W), ``logit``, ``probability``, ``gap`` (relative completeness gap, NaN where the method
        promises none), ``steps`` and ``seconds`` (each image's share), all (N).
    """
    references = None
    if method == "expected_gradients":
        references = load_dataset("shapes-on-scenes", "train", REFERENCES).images
    parts = []
    for index in torch.arange(len(dataset)).split(CHUNK):
        images, targets = dataset.images[index], dataset.labels[index]
        key = {
            "weights": model.weights_hash,
            "images": sha256_tensors({"images": images, "targets": targets}),
            "method": method,
            "version": METHODS[method].version,
            "options": options,
            "references": None if references is None else sha256_tensors({"images": references}),
            "seed": seed,
        }
        extra = {} if references is None else {"references": references}
        parts.append(remember("attribution", key, lambda i=images, t=targets, e=extra: _explain(model, i, t, method, seed, options | e)))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
