"""The look of the figures, and saving them with their numbers and their provenance."""

from __future__ import annotations

import io
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import PlaceHolderLayoutEngine
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
    "gradients": "Gradients",
    "grad_cam": "Grad-CAM",
    "guided_grad_cam": "Guided Grad-CAM",
    "occlusion": "Occlusion",
    "rise": "RISE",
    "attention_rollout": "Attention rollout",
    "contextual_decomposition": "Contextual decomposition",
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
    "min": "Minimum",
    "max": "Maximum",
    "relevance_mass": "Relevance mass",
    "relevance_rank": "Relevance rank",
    "pointing_game": "Pointing game",
    "mask_iou": "Mask IoU",
    "average_precision": "Average precision",
    "insertion": "Insertion",
    "deletion": "Deletion",
    "road": "ROAD, LeRF − MoRF",
    "harmonized": "Harmonized",
    "single models": "Single models",
    "spearman": "Spearman",
    "spearman_of_magnitudes": "Spearman of magnitudes",
    "ssim": "SSIM",
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
    return name.removeprefix("timm:").partition("?")[0].replace("_", " ")


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
    code: str = "",
    timed: bool = False,
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
    code : str
        ``provenance.code_hash`` of the cells run so far; empty outside a notebook.
    timed : bool
        The table holds measured seconds, so that no two runs give the same bytes.

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
    path = folder / f"{name}.json"
    path.unlink(missing_ok=True)
    for ending, data in files.items():
        write_atomic(folder / f"{name}.{ending}", data)
    provenance = {
        "figure": f"{folder.name}/{name}",
        "parameters": dict(parameters),
        "weights": dict(weights),
        "sha256": {ending: sha256_bytes(data) for ending, data in files.items()},
        "code": code,
        "timed": timed,
        "commit": _commit(),
        "versions": {package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "seconds": round(seconds, 1),
    }
    write_atomic(path, json.dumps(provenance, indent=1) + "\n")
    return path


def _commit() -> str:
    """The commit, with -dirty where the library or the weights are not as it has them."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", "harmonize_lib", "data")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def _git(*command: str) -> str:
    line = ["git", *command]
    return subprocess.run(line, cwd=paths.ROOT, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603


def gallery(
    rows: Sequence[Sequence[tuple[Tensor, str]]],
    row_labels: Sequence[str],
    width: float = 1.05,
    column_labels: Sequence[str] = (),
) -> Figure:
    """A grid of images and maps.

    Parameters
    ----------
    rows : Sequence[Sequence[tuple[Tensor, str]]]
        Per row, panels with their titles: uint8 (C, H, W) images, float (H, W) maps, bool (H, W) masks.
    row_labels : Sequence[str]
        Left of each row.
    width : float
        Inches per panel.
    column_labels : Sequence[str]
        Slanted above the first row, for columns too many for titles.

    Returns
    -------
    Figure
        The figure.
    """
    columns = max(len(row) for row in rows)
    label_width = 0.075 * max(len(line) for name in row_labels for line in name.split("\n"))
    titled = sum(any(title for _, title in row) for row in rows)
    size = (width * columns + label_width, (width + 0.02) * len(rows) + 0.2 * titled)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    if column_labels:  # no layout at all would become the style's when the figure is saved
        figure.set_layout_engine(PlaceHolderLayoutEngine(adjust_compatible=True, colorbar_gridspec=False))
        figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.06, hspace=0.06)
    else:
        figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02)
    for line, row, name in zip(axes, rows, row_labels, strict=True):
        for ax in line[len(row) :]:
            ax.set_visible(False)
        for ax, (panel, title) in zip(line, row, strict=False):
            if panel.ndim == 3:
                show_image(ax, panel, title)
            elif panel.dtype == torch.bool:
                show_image(ax, panel[None].byte() * 255, title)
            else:
                show_map(ax, panel, title)
        line[0].set_ylabel(name, fontsize=7, rotation=0, ha="right", va="center")
    for ax, title in zip(axes[0], column_labels, strict=False):
        ax.set_title(title, fontsize=7, fontweight="normal", rotation=50, ha="left", loc="center")
    return figure


def matrix(
    ax: Axes,
    table: pd.DataFrame,
    index: str,
    columns: str,
    values: str,
    title: str,
    limits: tuple[float, float] = (0, 1),
    cmap: str = "viridis",
    bar: str = "",
) -> None:
    """A heat map with its numbers written in.

    Parameters
    ----------
    ax : Axes
        Where.
    table : pd.DataFrame
        One row per cell.
    index : str
        Column whose values are the rows, in the order of its categories or of appearance.
    columns : str
        Column whose values are the columns, likewise.
    values : str
        Column of the numbers.
    title : str
        What it shows.
    limits : tuple[float, float]
        Range of the colors.
    cmap : str
        Color map.
    bar : str
        Label of the color bar; empty draws none.
    """
    grid = table.pivot_table(index=index, columns=columns, values=values, observed=True)
    grid = grid.reindex(index=_in_order(table[index]), columns=_in_order(table[columns]))
    grid.index, grid.columns = [label(str(name)) for name in grid.index], [label(str(name)) for name in grid.columns]
    low, high = limits
    sns.heatmap(
        grid,
        ax=ax,
        annot=True,
        fmt=".2f",
        annot_kws={"fontsize": 6.5},
        vmin=low,
        vmax=high,
        cmap=cmap,
        cbar=bool(bar),
        cbar_kws={"label": bar} if bar else None,
        linewidths=0.5,
    )
    ax.set(title=title, xlabel=columns, ylabel=index)
    ax.tick_params(axis="x", rotation=40)
    ax.tick_params(axis="y", rotation=0)
    for text in ax.get_xticklabels():
        text.set_horizontalalignment("right")


def _in_order(names: pd.Series) -> list[str]:
    """Distinct names: in the order of the categories where there are any, else of appearance."""
    there = list(dict.fromkeys(names))
    return [name for name in names.cat.categories if name in there] if hasattr(names, "cat") else there


COLORS = 10  # of the palette; where they come round again, points become triangles
CONTROL_LINES: dict[str, tuple[str, Any]] = {  # gray and dashes, the same in every figure
    "random": ("0.2", "--"),
    "center": ("0.5", ":"),
    "edges": ("0.6", "-."),
    "object_mask": ("0.1", (0, (8, 2))),
    "shuffled weights": ("0.7", (0, (5, 1, 1, 1))),
}


def curves(
    ax: Axes,
    table: pd.DataFrame,
    x: str,
    hue: str,
    title: str,
    controls: Sequence[str] = (),
    names: Sequence[str] = (),
) -> None:
    """Lines with bands: mean, low and high over x, one line per hue; controls are gray and dashed.

    Parameters
    ----------
    ax : Axes
        Where.
    table : pd.DataFrame
        Columns ``x``, ``hue``, ``mean``, ``low``, ``high``.
    x : str
        Column on the horizontal axis.
    hue : str
        Column that tells the lines apart.
    title : str
        What it shows.
    controls : Sequence[str]
        Values of ``hue`` that are floors or ceilings.
    names : Sequence[str]
        Values of ``hue`` over all panels of a figure, so that a line has one color in all of them.
    """
    shown = list(dict.fromkeys(table[hue]))
    solid = [name for name in dict.fromkeys([*names, *shown]) if name not in controls]
    colors = dict(zip(solid, sns.color_palette("colorblind", len(solid)), strict=True))
    again = solid[COLORS:]
    for name in shown:
        part = table[table[hue] == name].sort_values(x)
        gray, dashes = CONTROL_LINES.get(name, ("0.35", "--"))
        color = colors.get(name, gray)
        ax.plot(
            part[x],
            part["mean"],
            color=color,
            ls="-" if name in colors else dashes,
            lw=1.3,
            marker="^" if name in again else "." if len(part) <= 20 else "",
            ms=4,
            label=label(str(name)),
        )
        ax.fill_between(part[x], part["low"], part["high"], color=color, alpha=0.15, lw=0)
    ax.set(title=title, xlabel=x)


def share_axis(ax: Axes, fractions: Sequence[float]) -> None:
    """Make the horizontal axis one of shares of patches kept: logarithmic, a tick in percent at each.

    Parameters
    ----------
    ax : Axes
        Where.
    fractions : Sequence[float]
        Shares in (0, 1] that were measured.
    """
    ax.set(xscale="log", xlabel="share k of patches kept (%)")
    ax.set_xticks(fractions, [f"{100 * k:g}" for k in fractions])
    ax.set_xticks([], minor=True)


def forest(ax: Axes, table: pd.DataFrame, y: str, title: str, xlabel: str, hue: str | None = None) -> None:
    """Estimates with their intervals, one line per row, and a line at zero.

    Parameters
    ----------
    ax : Axes
        Where.
    table : pd.DataFrame
        Columns ``y``, ``mean``, ``low``, ``high`` and, if given, ``hue``.
    y : str
        Column on the vertical axis, from the top: all its categories, or values in order of appearance.
    title : str
        What it shows.
    xlabel : str
        Unit of the estimates.
    hue : str | None
        Column that tells groups apart.
    """
    names = list(table[y].cat.categories) if hasattr(table[y], "cat") else list(dict.fromkeys(table[y]))
    groups = list(dict.fromkeys(table[hue])) if hue else [None]
    for shift, (group, color) in enumerate(zip(groups, sns.color_palette("colorblind", len(groups)), strict=True)):
        part = table if group is None else table[table[hue] == group]
        place = np.array([names.index(name) for name in part[y]]) + 0.7 * ((shift + 0.5) / len(groups) - 0.5)
        error = np.abs(part[["low", "high"]].to_numpy().T - part["mean"].to_numpy())
        ax.errorbar(
            part["mean"],
            place,
            xerr=error,
            fmt="o",
            ms=3.5,
            lw=1.2,
            color=color,
            label=None if group is None else label(str(group)),
        )
    ax.axvline(0, color="0.3", lw=0.8)
    ax.set(title=title, xlabel=xlabel, yticks=range(len(names)), yticklabels=[label(str(name)) for name in names])
    if not ax.yaxis_inverted():
        ax.invert_yaxis()


def tiles(
    ax: Axes,
    table: pd.DataFrame,
    index: str,
    columns: str,
    values: str,
    title: str,
    text: str | None = None,
    bar: str = "",
    log: bool = False,
    cmap: str | Sequence[str] = "viridis",
) -> None:
    """A heat map with words, or rounded numbers, written in; cells without a value stay gray.

    Parameters
    ----------
    ax : Axes
        Where.
    table : pd.DataFrame
        One row per cell.
    index : str
        Column whose values are the rows, in the order of its categories or of appearance.
    columns : str
        Column whose values are the columns, likewise.
    values : str
        Column of the numbers that give the colors.
    title : str
        What it shows.
    text : str | None
        Column of what is written in; None writes the numbers, two digits each.
    bar : str
        Label of the color bar; empty draws none.
    log : bool
        Colors follow the logarithm.
    cmap : str | Sequence[str]
        Color map, or its colors.
    """
    rows, cols = list(dict.fromkeys(table[index])), list(dict.fromkeys(table[columns]))
    words = table[text] if text else table[values].map(lambda value: f"{float(f'{value:.2g}'):g}")
    grids = [
        table.assign(shown=shown).pivot(index=index, columns=columns, values="shown").reindex(index=rows, columns=cols)
        for shown in (table[values].astype(float), words)
    ]
    sns.heatmap(
        grids[0],
        ax=ax,
        annot=grids[1].fillna("").to_numpy(),
        fmt="",
        annot_kws={"fontsize": 7},
        cmap=cmap if isinstance(cmap, str) else mpl.colors.ListedColormap(list(cmap)),
        norm=mpl.colors.LogNorm() if log else None,
        cbar=bool(bar),
        cbar_kws={"label": bar} if bar else None,
        linewidths=0.5,
        xticklabels=[label(str(name)) for name in cols],
        yticklabels=[label(str(name)) for name in rows],
    )
    ax.set_facecolor("0.88")
    ax.grid(visible=False)
    ax.set(title=title, xlabel="", ylabel="")
    ax.tick_params(axis="x", rotation=40)
    ax.tick_params(axis="y", rotation=0)
    for name in ax.get_xticklabels():
        name.set_horizontalalignment("right")


def stacked(ax: Axes, table: pd.DataFrame, y: str, parts: Mapping[str, str], title: str, xlabel: str) -> None:
    """Counts as stacked horizontal bars, their numbers written in.

    Parameters
    ----------
    ax : Axes
        Where.
    table : pd.DataFrame
        One row per bar.
    y : str
        Column that names the bars, from the top.
    parts : Mapping[str, str]
        Columns of counts, in order, to colors.
    title : str
        What it shows.
    xlabel : str
        What is counted.
    """
    left = np.zeros(len(table))
    for part, color in parts.items():
        counts = table[part].to_numpy()
        bars = ax.barh(range(len(table)), counts, left=left, color=color, label=label(part), height=0.7)
        ax.bar_label(bars, [str(count) if count else "" for count in counts], label_type="center", fontsize=7)
        left += counts
    ax.set(title=title, xlabel=xlabel, yticks=range(len(table)), yticklabels=[label(str(name)) for name in table[y]])
    ax.grid(axis="y", visible=False)
    if not ax.yaxis_inverted():
        ax.invert_yaxis()


def small_forests(
    axes: Sequence[Axes],
    table: pd.DataFrame,
    single: pd.DataFrame,
    panel: str,
    y: str,
    panels: Sequence[str],
    names: Sequence[str],
    controls: Sequence[str],
) -> None:
    """Estimates with intervals side by side, one panel per measure; gray marks are its parts, lines the controls.

    Parameters
    ----------
    axes : Sequence[Axes]
        One per panel.
    table : pd.DataFrame
        Columns ``panel``, ``y``, ``mean``, ``low``, ``high``.
    single : pd.DataFrame
        Columns ``panel``, ``y``, ``mean``: what the means are made of.
    panel : str
        Column that chooses the panel.
    y : str
        Column on the vertical axis.
    panels : Sequence[str]
        Values of ``panel``, left to right.
    names : Sequence[str]
        Values of ``y`` that get a row, top to bottom.
    controls : Sequence[str]
        Values of ``y`` that are drawn as lines.
    """
    places = {name: place for place, name in enumerate(names)}
    dashes = dict(zip(controls, ("--", ":", "-.", "-"), strict=False))
    for ax, measure in zip(axes, panels, strict=True):
        means = table[table[panel] == measure].set_index(y)
        parts = single[(single[panel] == measure) & single[y].isin(names)]
        ax.plot(parts["mean"], [places[name] for name in parts[y]], "|", color="0.6", ms=6)
        for name, dash in dashes.items():
            ax.axvline(means.loc[name, "mean"], color="0.35", ls=dash, lw=1, label=label(name))
        shown = means.loc[list(names)]
        error = np.abs(shown[["low", "high"]].to_numpy().T - shown["mean"].to_numpy())
        ax.errorbar(shown["mean"], range(len(names)), xerr=error, fmt="o", ms=4, lw=1.4, color=sns.color_palette()[0])
        ax.set_title(label(measure), fontsize=8)
        ax.set(yticks=range(len(names)), yticklabels=[label(name) for name in names] if ax is axes[0] else [])
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.tick_params(axis="x", labelsize=7)
    lines, texts = axes[-1].get_legend_handles_labels()
    axes[-1].figure.legend(lines, texts, loc="outside upper right", ncols=len(texts), fontsize=7)


def trade_off(
    ax: Axes, table: pd.DataFrame, x: str, hue: str, title: str, controls: Mapping[str, float] | None = None
) -> None:
    """One point per row with its intervals on both axes; controls are horizontal lines.

    Parameters
    ----------
    ax : Axes
        Where.
    table : pd.DataFrame
        Columns ``x``, ``x`` + ``"_low"``, ``x`` + ``"_high"``, ``mean``, ``low``, ``high``.
    x : str
        Column on the horizontal axis.
    hue : str
        Column that names the points.
    title : str
        What it shows.
    controls : Mapping[str, float] | None
        Name to height.
    """
    for i, (color, row) in enumerate(
        zip(sns.color_palette("colorblind", len(table)), table.to_dict("records"), strict=True)
    ):
        wide = [[abs(row[x + side] - row[x])] for side in ("_low", "_high")]
        tall = [[abs(row[side] - row["mean"])] for side in ("low", "high")]
        ax.errorbar(
            row[x],
            row["mean"],
            yerr=tall,
            xerr=wide,
            fmt="o" if i < COLORS else "^",
            ms=5,
            lw=1.2,
            color=color,
            label=label(row[hue]),
        )
    for (name, height), dash in zip(
        dict({} if controls is None else controls).items(), ("--", ":", "-.", (0, (1, 3))), strict=False
    ):
        ax.axhline(height, color="0.35", ls=dash, lw=1, label=label(str(name)))
    ax.set(title=title)
