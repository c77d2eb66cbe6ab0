"""How sharply maps select: the concern that coarse methods light up more than the object."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from harmonize_lib.localization import relevance_mass, relevance_rank
from harmonize_lib.statistics import Interval, paired_difference
from harmonize_lib.study import Run

MEASURES = {"relevance on the object": relevance_mass, "top pixels on the object": relevance_rank}
GRADIENT_METHODS = ("saliency", "input_x_gradient", "smoothgrad", "integrated_gradients", "expected_gradients")


def selectivity_table(run: Run, maps: Mapping[tuple[str, str], Tensor]) -> pd.DataFrame:
    """Selectivity of every map against the object's exact mask.

    Parameters
    ----------
    run : Run
        The run; without masks the table is empty.
    maps : Mapping[tuple[str, str], Tensor]
        (model, method) to maps (N, H, W).

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``method``, ``measure``, ``image``, ``value`` in [0, 1], NaN where undefined.
    """
    data = run.dataset
    columns = ["model", "method", "measure", "image", "value"]
    if data.masks is None:
        return pd.DataFrame(columns=columns)
    parts = [
        pd.DataFrame({"model": model, "method": method, "measure": name, "image": data.ids, "value": score})
        for (model, method), values in maps.items()
        for name, measure in MEASURES.items()
        for score in [measure(values, data.masks).numpy()]
    ]
    return pd.concat(parts, ignore_index=True)[columns]


def selectivity_claim(run: Run, table: pd.DataFrame) -> dict[str, Interval]:
    """Grad-CAM's relevance on the object minus that of the gradient methods, paired by image.

    Parameters
    ----------
    run : Run
        Gives the seed.
    table : pd.DataFrame
        From :func:`selectivity_table`.

    Returns
    -------
    dict[str, Interval]
        Claim ``selectivity``; n = 0 where there are no masks or the methods were not run.
    """
    mass = table[table["measure"] == "relevance on the object"]
    per_image = mass.pivot_table(index="image", columns="method", values="value", observed=True)
    gradients = [method for method in GRADIENT_METHODS if method in per_image]
    if "grad_cam" not in per_image or not gradients:
        nothing = float("nan")
        return {"selectivity": Interval(nothing, nothing, nothing, 0)}
    return {
        "selectivity": paired_difference(per_image["grad_cam"], per_image[gradients].mean(axis=1), run.settings.seed)
    }


def patch_sizes(images: Tensor, patch: int) -> list[int]:
    """Half, once, twice and four times the patch, as far as they divide the image.

    Parameters
    ----------
    images : Tensor
        (N, C, H, W).
    patch : int
        Side in pixels.

    Returns
    -------
    list[int]
        Sides in pixels.
    """
    side = torch.tensor(images.shape[2:])
    return [p for p in (patch // 2, patch, 2 * patch, 4 * patch) if p >= 1 and not (side % p).any()]
