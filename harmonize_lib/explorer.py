"""One image at a time: what each architecture's map selects, what the others' consensus selects, who recognizes it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import display
from matplotlib.figure import Figure
from torch import Tensor

from harmonize_lib import plots, study
from harmonize_lib.attribution import refusal
from harmonize_lib.consensus import list_rules
from harmonize_lib.data import Dataset
from harmonize_lib.errors import HarmonizeError
from harmonize_lib.features import feature_image, feature_mask, mean_color
from harmonize_lib.harmonization import held_out_consensus, held_out_maps
from harmonize_lib.plots import label
from harmonize_lib.study import Run
from harmonize_lib.transfer import probabilities

OWN, OTHERS = "Own map", "Consensus of the others"
FLOORS = ("edges", "random")


class View(NamedTuple):
    """What is looked at: an image by position, the class explained (-1: its label), method, rule and share k."""

    image: int
    target: int
    method: str
    rule: str
    fraction: float


def first_view(run: Run) -> View:
    """What the parameters ask to be shown first.

    Parameters
    ----------
    run : Run
        The run.

    Returns
    -------
    View
        The view.
    """
    settings = run.settings
    return View(settings.image, -1, settings.methods[0], settings.rule, settings.fraction)


def selections(run: Run, view: View) -> dict[str, dict[str, Tensor]]:
    """Maps that rank the image's patches for every model.

    Parameters
    ----------
    run : Run
        Gives models, images, options, patch and seed.
    view : View
        What is looked at.

    Returns
    -------
    dict[str, dict[str, Tensor]]
        Model to kind (``OWN``, ``OTHERS`` and ``FLOORS``, those that there are) to a map (H, W). The consensus is
        that of notebook 05: one model of every other architecture, maps averaged over patches.

    Raises
    ------
    HarmonizeError
        The method is defined for none of the models.
    """
    settings, method, data = run.settings, view.method, _one(run, view)
    maps = study.all_maps(run.models, data, [method], settings.seed, settings.options)
    if not maps:
        reason = refusal(next(iter(run.models.values())), method)
        raise HarmonizeError(f"{method} is defined for none of the models: {reason}"[:200])
    controls = study.controls(replace(run, dataset=data))
    found = {}
    for name in run.models:
        kinds = {OWN: maps[name, method][0]} if (name, method) in maps else {}
        if len(held_out_maps(run, maps, name, method)):
            kinds[OTHERS] = held_out_consensus(run, maps, name, method, view.rule)[0]
        found[name] = kinds | {floor: controls[floor, "control"][0] for floor in FLOORS}
    return found


def _features(run: Run, view: View, selected: Tensor, fraction: float, mean: Tensor) -> Tensor:
    """What each of some maps (M, H, W) keeps of the image, the rest filled: (M, C, H, W)."""
    settings, images = run.settings, run.dataset.images
    mask = feature_mask(selected, fraction, settings.patch, torch.Generator().manual_seed(settings.seed))
    one = images[view.image].expand(len(mask), *images.shape[1:])
    return feature_image(one, mask, settings.fill, mean, torch.Generator().manual_seed(settings.seed))


def recognition(run: Run, view: View, selected: Mapping[str, Mapping[str, Tensor]]) -> pd.DataFrame:
    """How sure every model is of the target on feature images, over the share of patches kept.

    Parameters
    ----------
    run : Run
        Gives models, images, fractions, patch, fill and seed.
    view : View
        What is looked at.
    selected : Mapping[str, Mapping[str, Tensor]]
        From :func:`selections`.

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``map``, ``fraction`` (1 is the whole image), ``probability`` of the target, ``predicted``,
        ``recognized``. One image has no interval.
    """
    classes, target, mean = run.dataset.classes, int(_one(run, view).labels), mean_color(run.dataset.images)
    rows = []
    for name, model in run.models.items():
        kinds, stack = list(selected[name]), torch.stack(list(selected[name].values()))
        for fraction in sorted({*run.settings.fractions, 1.0}):
            p = probabilities(name, model, _features(run, view, stack, fraction, mean), len(classes))
            rows += [
                (name, kind, fraction, float(row[target]), classes[row.argmax()], bool(row.argmax() == target))
                for kind, row in zip(kinds, p, strict=True)
            ]
    return pd.DataFrame(rows, columns=["model", "map", "fraction", "probability", "predicted", "recognized"])


def draw_maps(run: Run, view: View, selected: Mapping[str, Mapping[str, Tensor]], table: pd.DataFrame) -> Figure:
    """Draw every architecture's own map and the others' consensus, and below each what it keeps.

    Parameters
    ----------
    run : Run
        Gives models and images.
    view : View
        What is looked at.
    selected : Mapping[str, Mapping[str, Tensor]]
        From :func:`selections`.
    table : pd.DataFrame
        From :func:`recognition`.

    Returns
    -------
    Figure
        One column per model; above a feature image what the model takes it for, and its probability of the target.
        Consensus maps have their median taken off, for the colors.
    """
    data, blank = _one(run, view), torch.full_like(run.dataset.images[0], 255)
    edges, mean = next(iter(selected.values()))["edges"], mean_color(run.dataset.images)
    rows = [
        [(data.images[0], "image")],
        [(blank, "") if data.masks is None else (data.masks[0], "object mask")],
        [(edges, label("edges"))],
        [(_features(run, view, edges[None], view.fraction, mean)[0], "kept by edges")],
    ]
    at = table[table["fraction"] == view.fraction].set_index(["model", "map"])
    for name, kinds in selected.items():
        for place, kind in ((0, OWN), (2, OTHERS)):
            title = label(name) if kind == OWN else ""
            if kind in kinds:
                values, seen = kinds[kind], at.loc[(name, kind)]
                kept = _features(run, view, values[None], view.fraction, mean)[0]
                mark = "✓" if seen["recognized"] else "✗"
                rows[place].append((values if kind == OWN else values - values.median(), title))
                rows[place + 1].append((kept, f"{mark} {seen['predicted']:.18}\np = {seen['probability']:.2f}"))
            else:
                rows[place].append((blank, f"{title}\nnot defined".strip()))
                rows[place + 1].append((blank, ""))
    share = f"kept, k = {100 * view.fraction:g} %"
    names = [f"{OWN}\n({label(view.method)})", share, f"{OTHERS}\n({label(view.rule)})", share]
    return plots.gallery(rows, names, 0.95)


def draw_recognition(run: Run, view: View, table: pd.DataFrame) -> Figure:
    """Draw the target's probability over the share of patches kept, one panel per model.

    Parameters
    ----------
    run : Run
        Gives classes and fractions.
    view : View
        What is looked at.
    table : pd.DataFrame
        From :func:`recognition`.

    Returns
    -------
    Figure
        The figure.
    """
    models, columns = list(dict.fromkeys(table["model"])), 3
    height = -(-len(models) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(7.2, 0.6 + 1.7 * height), sharey=True, squeeze=False)
    shown: dict[str, Any] = {}
    for i, (ax, name) in enumerate(zip(axes.flat, models, strict=False)):
        part = table[table["model"] == name]
        lines = part.assign(mean=part["probability"], low=part["probability"], high=part["probability"])
        plots.curves(ax, lines, "fraction", "map", label(name), FLOORS, (OWN, OTHERS))
        ax.axvline(view.fraction, color="0.7", lw=1, zorder=0)
        plots.share_axis(ax, sorted({*run.settings.fractions, 1.0}))
        ax.set_ylim(-0.03, 1.03)
        if i + columns < len(models):
            ax.set_xlabel("")
            ax.tick_params(labelbottom=False)
        shown |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    for ax in axes.flat[len(models) :]:
        ax.set_visible(False)
    target = run.dataset.classes[int(_one(run, view).labels)]
    figure.supylabel(f"probability of “{target}”", fontsize=8)
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncol=4)
    return figure


def draw(run: Run, view: View) -> tuple[Figure, Figure, pd.DataFrame]:
    """Look at one image.

    Parameters
    ----------
    run : Run
        The run.
    view : View
        What is looked at.

    Returns
    -------
    tuple[Figure, Figure, pd.DataFrame]
        Of :func:`draw_maps`, :func:`draw_recognition` and :func:`recognition`; the figures are closed for pyplot.
    """
    selected = selections(run, view)
    table = recognition(run, view, selected)
    figures = draw_maps(run, view, selected, table), draw_recognition(run, view, table)
    for figure in figures:
        plt.close(figure)
    return *figures, table


def explore(run: Run, first: Sequence[Figure]) -> dict[str, widgets.Widget]:
    """Display the first view with controls that change it; without a kernel the first view stays.

    Parameters
    ----------
    run : Run
        The run.
    first : Sequence[Figure]
        Both figures that :func:`draw` gives of :func:`first_view`.

    Returns
    -------
    dict[str, widgets.Widget]
        The controls, by the names of :class:`View`.
    """
    settings, view, classes = run.settings, first_view(run), run.dataset.classes
    image = widgets.IntSlider(view.image, 0, len(run.dataset) - 1, description="image", continuous_update=False)
    controls: dict[str, widgets.Widget] = {
        "image": image,
        "target": _dropdown("class", [("its label", -1), *zip(classes, range(len(classes)), strict=True)], view.target),
        "method": _dropdown("method", [(label(name), name) for name in settings.methods], view.method),
        "rule": _dropdown("rule", [(label(name), name) for name in list_rules()], view.rule),
        "fraction": widgets.SelectionSlider(
            options=[(f"{100 * k:g} %", k) for k in sorted(settings.fractions)],
            value=view.fraction,
            description="share k",
            continuous_update=False,
        ),
    }
    said = widgets.HTML()
    display(widgets.VBox([widgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"}), said]))
    handles = [display(figure, display_id=True) for figure in first]

    def update(change: object) -> None:
        said.value = "computing …"
        try:
            figures = draw(run, View(**{name: control.value for name, control in controls.items()}))[:2]
        except HarmonizeError as error:
            said.value = html.escape(str(error))
            return
        for handle, figure in zip(handles, figures, strict=True):
            handle.update(figure)
        said.value = ""

    for control in controls.values():
        control.observe(update, "value")
    return controls


def _dropdown(name: str, options: list[tuple[str, Any]], value: Any) -> widgets.Dropdown:
    return widgets.Dropdown(options=options, value=value, description=name)


def _one(run: Run, view: View) -> Dataset:
    """The image looked at, labeled by the class that is explained."""
    data = run.dataset.select(torch.tensor([view.image]))
    return data if view.target < 0 else replace(data, labels=torch.tensor([view.target]))
