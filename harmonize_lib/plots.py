"""The look of the figures, and saving them with their numbers and their provenance."""

from __future__ import annotations

import io
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from harmonize_lib import paths
from harmonize_lib.storage import sha256_bytes, write_atomic

PACKAGES = ("harmonize_lib", "torch", "torchvision", "timm", "captum", "numpy", "pandas", "matplotlib", "seaborn")
LABELS = {
    "resnet": "ResNet",
    "vgg": "VGG",
    "mobilenet": "MobileNetV2",
    "convnext": "ConvNeXt",
    "vit": "ViT",
    "swin": "Swin",
    "mobilevit": "MobileViT",
    "saliency": "Saliency",
    "input_x_gradient": "Input × gradient",
    "smoothgrad": "SmoothGrad",
    "smoothgrad_squared": "SmoothGrad²",
    "guided_backprop": "Guided backprop",
    "deeplift": "DeepLIFT",
    "integrated_gradients": "Integrated gradients",
    "integrated_gradients_smoothgrad": "IG + SmoothGrad",
    "expected_gradients": "Expected gradients",
    "grad_cam": "Grad-CAM",
    "guided_grad_cam": "Guided Grad-CAM",
    "occlusion": "Occlusion",
    "rise": "RISE",
    "attention_rollout": "Attention rollout",
    "random": "Random",
    "center": "Center",
    "edges": "Edges",
    "object_mask": "Object mask",
    "cnn": "CNN",
    "transformer": "transformer",
    "hybrid": "hybrid",
    "mean": "Mean",
    "median": "Median",
    "borda": "Borda",
    "rrf": "Reciprocal rank",
    "agg_var": "Mean / std",
    "crh": "Truth discovery",
    "geometric": "Geometric mean",
    "partial_order": "Partial order",
}


def label(name: str) -> str:
    """A name as a reader should see it.

    Parameters
    ----------
    name : str
        Name of a model, architecture, method or rule.

    Returns
    -------
    str
        E.g. ``"Grad-CAM"`` for ``"grad_cam"``, ``"ViT (seed 1)"`` for ``"vit-obj-s1"``.
    """
    if name in LABELS:
        return LABELS[name]
    architecture, _, rest = name.removeprefix("timm:").partition("-obj")
    if architecture in LABELS and not rest:
        return LABELS[architecture]
    if architecture in LABELS and rest.startswith("-s"):
        return f"{LABELS[architecture]} (seed {rest[2:]})"
    return name.removeprefix("timm:").replace("_", " ")


def style() -> None:
    """Set the look of all figures: colorblind-safe, readable at column width, text kept as text in SVG."""
    sns.set_theme(context="paper", style="whitegrid", palette="colorblind", font_scale=1.0)
    mpl.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "harmonize",
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "savefig.dpi": 160,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "grid.linewidth": 0.5,
            "legend.frameon": False,
        }
    )


def show_image(ax: Axes, image: Tensor, title: str = "") -> None:
    """Draw an image without axes.

    Parameters
    ----------
    ax : Axes
        Where.
    image : Tensor
        (C, H, W) uint8.
    title : str
        Above it.
    """
    pixels = image.permute(1, 2, 0).cpu().numpy()
    ax.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray", interpolation="nearest")
    ax.set_title(title, fontsize=7, fontweight="normal", loc="center")
    ax.set(xticks=[], yticks=[])
    sns.despine(ax=ax, left=True, bottom=True)


def show_map(ax: Axes, values: Tensor, title: str = "") -> None:
    """Draw a signed map without axes: red for, blue against, scaled to its own 99th percentile.

    Parameters
    ----------
    ax : Axes
        Where.
    values : Tensor
        (H, W).
    title : str
        Above it.
    """
    pixels = values.cpu().numpy()
    limit = float(np.quantile(np.abs(pixels), 0.99)) or 1.0
    ax.imshow(pixels, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    ax.set_title(title, fontsize=7, fontweight="normal", loc="center")
    ax.set(xticks=[], yticks=[])
    sns.despine(ax=ax, left=True, bottom=True)


def save_figure(
    figure: Figure,
    table: pd.DataFrame,
    folder: Path,
    name: str,
    parameters: Mapping[str, Any],
    weights: Mapping[str, str],
    seconds: float,
) -> Path:
    """Save a figure as SVG and PNG, its numbers as CSV and its provenance as JSON.

    Parameters
    ----------
    figure : Figure
        The figure.
    table : pd.DataFrame
        The numbers it shows.
    folder : Path
        Folder of the notebook inside the figures folder.
    name : str
        File name without ending.
    parameters : Mapping[str, Any]
        Parameters of the notebook.
    weights : Mapping[str, str]
        Model name to ``Model.weights_hash``.
    seconds : float
        Time the notebook had spent when the figure was made.

    Returns
    -------
    Path
        The JSON, written last: a figure without it is not finished.
    """
    files: dict[str, bytes] = {"csv": table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()}
    for ending, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending, metadata=metadata, bbox_inches="tight")
        files[ending] = buffer.getvalue()
    for ending, data in files.items():
        write_atomic(folder / f"{name}.{ending}", data)
    provenance = {
        "figure": f"{folder.name}/{name}",
        "parameters": dict(parameters),
        "weights": dict(weights),
        "sha256": {ending: sha256_bytes(data) for ending, data in files.items()},
        "commit": _commit(),
        "versions": {package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads",
        "seconds": round(seconds, 1),
    }
    path = folder / f"{name}.json"
    write_atomic(path, json.dumps(provenance, indent=1) + "\n")
    return path


def _commit() -> str:
    try:
        result = subprocess.run(  # noqa: S603
            ["git", "describe", "--always", "--dirty"],  # noqa: S607
            cwd=paths.ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()
