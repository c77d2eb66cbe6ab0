"""One image, one model, one method: the map, its features, and what every model sees in them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import sklearn.datasets
import torch
from matplotlib.figure import Figure
from torch import Tensor

from harmonize_lib import plots, study
from harmonize_lib.attribution import refusal
from harmonize_lib.consensus import consensus
from harmonize_lib.data import Dataset, read_image
from harmonize_lib.features import feature_image, feature_mask, mean_color
from harmonize_lib.study import Run
from harmonize_lib.train import predict

CONSENSUS = "consensus of all"


class View(NamedTuple):
    """What the explorer shows of one choice: (C, H, W) image, (H, W) map, (C, H, W) features, what models see."""

    title: str
    image: Tensor
    map: Tensor
    features: Tensor
    seen: pd.DataFrame


def choices(run: Run) -> dict[str, list[str]]:
    """The methods of every model, and of the consensus of all.

    Parameters
    ----------
    run : Run
        Gives models and methods.

    Returns
    -------
    dict[str, list[str]]
        Model name, or ``CONSENSUS``, to the methods that can be chosen with it; the consensus takes those that are
        defined for at least two models.
    """
    found = {
        name: [method for method in run.settings.methods if refusal(model, method) is None]
        for name, model in run.models.items()
    }
    shared = [method for method in run.settings.methods if sum(method in each for each in found.values()) > 1]
    return found | {CONSENSUS: shared}


def look(run: Run, image: int, model: str, method: str, rule: str, fraction: float) -> View:
    """Explain one image of the run and show its features to every model.

    Parameters
    ----------
    run : Run
        Gives images, models, methods, patch, fill and seed.
    image : int
        Which of the run's images.
    model : str
        A model's name, or ``CONSENSUS``.
    method : str
        One of its methods, see :func:`choices`.
    rule : str
        The rule of consensus.
    fraction : float
        Share of the patches that are kept, in (0, 1].

    Returns
    -------
    View
        Its table has the columns ``model``, ``shown`` (the image, its features), ``prediction`` (a class name) and
        ``probability`` (of the label).
    """
    settings, one = run.settings, run.dataset.select(torch.tensor([image]))
    pool = [name for name, each in run.models.items() if refusal(each, method) is None]
    options = settings.options.get(method, {})
    stack = torch.stack(
        [
            study.attributions(run.models[name], one, method, settings.seed, **options)["maps"]
            for name in (pool if model == CONSENSUS else [model])
        ]
    )
    values = consensus(stack, rule) if model == CONSENSUS else stack[0]
    generator = torch.Generator().manual_seed(settings.seed)
    mask = feature_mask(values, fraction, settings.patch, generator)
    features = feature_image(one.images, mask, settings.fill, mean_color(run.dataset.images), generator)
    seen = pd.concat([what_is_seen(run, one, "image"), what_is_seen(run, one, "features", features)], ignore_index=True)
    by = f"{plots.label(model)}, {rule}" if model == CONSENSUS else plots.label(model)
    title = f"{one.classes[int(one.labels[0])]}: {plots.label(method)} of {by}; k = {fraction:.0%}"
    return View(title, one.images[0], values[0], features[0], seen)


def what_is_seen(run: Run, dataset: Dataset, shown: str, images: Tensor | None = None) -> pd.DataFrame:
    """Every model's prediction for one image.

    Parameters
    ----------
    run : Run
        Gives the models.
    dataset : Dataset
        One image with its label.
    shown : str
        Name of what is shown.
    images : Tensor | None
        (1, C, H, W) shown in place of the image.

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``shown``, ``prediction``, ``probability``.
    """
    images = dataset.images if images is None else images
    rows = []
    for name, model in run.models.items():
        with torch.inference_mode():
            probabilities = model(model.preprocess(images)).softmax(1)[0]
        label = float(probabilities[dataset.labels[0]])
        rows.append((name, shown, model.classes[int(probabilities.argmax())], label))
    return pd.DataFrame(rows, columns=["model", "shown", "prediction", "probability"])


def draw(view: View) -> Figure:
    """Draw a view: image, map, features, and the probability that every model gives the label.

    Parameters
    ----------
    view : View
        From :func:`look`.

    Returns
    -------
    Figure
        The figure.
    """
    figure, axes = plt.subplots(1, 4, figsize=(7.4, 2.2), width_ratios=[1, 1, 1, 1.5])
    plots.show_image(axes[0], view.image, "image")
    plots.show_map(axes[1], view.map, "map (scaled by itself)")
    plots.show_image(axes[2], view.features, "its features")
    names = list(dict.fromkeys(view.seen["model"]))
    for shift, (shown, part) in zip((-0.19, 0.19), view.seen.groupby("shown", sort=False), strict=True):
        bars = axes[3].barh(np.arange(len(names)) + shift, part["probability"], height=0.36, label=shown)
        axes[3].bar_label(bars, part["prediction"], fontsize=5, padding=1)
    axes[3].set_yticks(range(len(names)), [plots.label(name) for name in names], fontsize=6.5)
    axes[3].set(xlim=(0, 1.7), xticks=[0, 0.5, 1], ylim=(len(names) - 0.5, -0.5))
    axes[3].tick_params(axis="x", labelsize=6.5)
    axes[3].set_xlabel("probability of the label; prediction", fontsize=6.5)
    figure.legend(*axes[3].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=6.5)
    figure.suptitle(view.title, fontsize=9, fontweight="bold", x=0.01, ha="left")
    return figure


def explorer(run: Run) -> widgets.VBox:
    """Controls for image, model, method, rule and share, and the view they choose.

    Parameters
    ----------
    run : Run
        The run.

    Returns
    -------
    widgets.VBox
        Displayed as the last line of a cell; its first child holds the controls, its second the view.
    """
    there = choices(run)
    image = widgets.IntSlider(0, 0, len(run.dataset) - 1, description="image", continuous_update=False)
    model = widgets.Dropdown(options=list(there), description="model")
    method = widgets.Dropdown(options=there[model.value], description="method")
    rule = widgets.Dropdown(options=run.settings.rules, description="rule")
    fraction = widgets.SelectionSlider(
        options=run.settings.fractions,
        value=run.settings.fraction,
        description="share k",
        continuous_update=False,
    )

    def follow(change: dict[str, str]) -> None:
        kept = method.value
        method.options = there[change["new"]]
        method.value = kept if kept in method.options else method.options[0]

    def show(**chosen: object) -> None:
        draw(look(run, **chosen))  # type: ignore[arg-type]
        plt.show()

    model.observe(follow, "value")
    controls = {"image": image, "model": model, "method": method, "rule": rule, "fraction": fraction}
    view = widgets.interactive_output(show, controls)
    return widgets.VBox([widgets.HBox(list(controls.values()), layout=widgets.Layout(flex_flow="row wrap")), view])


def outside(run: Run, picture: str) -> tuple[list[list[tuple[Tensor, str]]], list[str], pd.DataFrame]:
    """Maps of a picture from outside the data set: what each model takes it for, and why.

    Parameters
    ----------
    run : Run
        Gives models, methods, options and seed.
    picture : str
        Path of a picture; empty takes a photograph that scikit-learn ships.

    Returns
    -------
    tuple[list[list[tuple[Tensor, str]]], list[str], pd.DataFrame]
        Rows for ``plots.gallery``, their labels, and the predictions with the columns ``model``, ``prediction``,
        ``probability`` (of the prediction). Every map explains the model's own prediction.

    Raises
    ------
    HarmonizeError
        The picture is missing or no image.
    """
    folder = Path(sklearn.datasets.__file__).parent / "images"
    path = Path(picture).expanduser() if picture else folder / "china.jpg"
    image = read_image(path, run.dataset.images.shape[-1])[None]
    rows, seen, methods = [], [], choices(run)
    for name, model in run.models.items():
        target = predict(model, image)
        one = Dataset(image, target, model.classes, None, (path.name,), path.name)
        with torch.inference_mode():
            probability = float(model(model.preprocess(image)).softmax(1)[0, target])
        seen.append((name, model.classes[int(target)], probability))
        row = [(image[0], f"{model.classes[int(target)]} ({probability:.2f})")]
        for method in methods[name]:
            options = run.settings.options.get(method, {})
            maps = study.attributions(model, one, method, run.settings.seed, **options)["maps"]
            row.append((maps[0], plots.label(method)))
        rows.append(row)
    table = pd.DataFrame(seen, columns=["model", "prediction", "probability"])
    return rows, [plots.label(name) for name in run.models], table
