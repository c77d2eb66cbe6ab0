"""Agglomerative contextual decomposition: groups of pixels that grow and merge by what they contribute together."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from harmonize_lib.decomposition import patch_groups, propagate
from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.tasks import check_numbers, logits_of, pick, prepare

SCORES = ("cd", "occlusion", "build_up")
CROSS = ndimage.generate_binary_structure(2, 1)  # a unit and its four neighbors
LOWERED = 15  # percentile points taken off once a third of the units is in
ROWS = 256
Growth = Generator[NDArray[np.bool_], NDArray[np.float64], "Hierarchy"]


@dataclass(frozen=True)
class Hierarchy:
    """A tree of groups of one image's units (squares of pixels).

    Attributes
    ----------
    groups : NDArray[np.bool_]
        (G, h, w) units of each group, in the order they arose; the last is the root.
    scores : NDArray[np.float64]
        (G) each group's score, in logits.
    levels : NDArray[np.int64]
        (G) the round each group arose in.
    children : tuple[tuple[int, ...], ...]
        Groups that each group was made of; units in none of them joined it directly.
    entered : NDArray[np.int64]
        (h, w) the round each unit was taken up in; one more than the last where it never was.
    """

    groups: NDArray[np.bool_]
    scores: NDArray[np.float64]
    levels: NDArray[np.int64]
    children: tuple[tuple[int, ...], ...]
    entered: NDArray[np.int64]

    def table(self) -> pd.DataFrame:
        """The tree as a table.

        Returns
        -------
        pd.DataFrame
            One row per group: ``group``, ``level``, ``score``, ``units``, ``children`` (numbers, spaces between).
        """
        return pd.DataFrame(
            {
                "group": range(len(self.groups)),
                "level": self.levels,
                "score": self.scores,
                "units": self.groups.sum((1, 2)),
                "children": [" ".join(map(str, below)) for below in self.children],
            }
        )


def group_scores(model: nn.Module, x: Tensor, targets: Tensor, masks: Tensor, score: str = "cd") -> Tensor:
    """Score groups of pixels by what they do to the target's logit.

    Parameters
    ----------
    model : nn.Module
        In eval mode.
    x : Tensor
        (N, C, H, W) the model's own input, on its device.
    targets : Tensor
        (N) int64.
    masks : Tensor
        (N, H, W) bool, a group for each row.
    score : str
        ``"cd"``: beta of the group; ``"build_up"``: f of the group alone; ``"occlusion"``: -f of the rest alone.

    Returns
    -------
    Tensor
        (N) in logits. What is left out is zero in the model's own units: the mean color.

    Raises
    ------
    HarmonizeError
        Unknown score; see also :func:`harmonize_lib.decomposition.propagate`.

    References
    ----------
    Singh, Murdoch, Yu 2019 (ACD), section 3.2; the baselines: section 4.
    """
    if score not in SCORES:
        raise unknown("score", score, SCORES)
    values = []
    with torch.no_grad():
        for rows in torch.arange(len(x)).split(ROWS):
            group, part = masks[rows, None].to(x.device), x[rows]
            if score == "cd":
                logits = propagate(model, part * group, part * ~group)[0]
            elif score == "build_up":
                logits = logits_of(model, part * group)
            else:
                logits = -logits_of(model, part * ~group)
            values.append(pick(logits, targets[rows]))
    return torch.cat(values)


def hierarchy(
    model: nn.Module,
    image: Tensor,
    target: int,
    score: str = "cd",
    patch: int | None = None,
    percentile: float = 95,
    rounds: int = 10,
) -> Hierarchy:
    """Agglomerate one image's units into a tree: see :func:`hierarchies`.

    Parameters
    ----------
    model : nn.Module
        In eval mode.
    image : Tensor
        (C, H, W) uint8 source pixels, or float for a plain module.
    target : int
        The class explained.
    score : str
        ``"cd"`` (ACD), ``"occlusion"`` (agglomerative occlusion) or ``"build_up"``.
    patch : int | None
        Side of a unit in pixels; None takes an eighth of the image's shorter side.
    percentile : float
        0 to 100: units and extensions at or above it are taken up.
    rounds : int
        Rounds of growth before what is left is merged in pairs.

    Returns
    -------
    Hierarchy
        The tree.
    """
    return hierarchies(model, image[None], torch.tensor([target]), score, patch, percentile, rounds)[0]


def hierarchies(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    score: str = "cd",
    patch: int | None = None,
    percentile: float = 95,
    rounds: int = 10,
) -> list[Hierarchy]:
    """Agglomerate the units of each image into a tree; all images' groups are scored together.

    Units at or above the percentile of single scores are the first groups; those that touch are one. In each round
    every group is tried with every neighboring unit j, and extensions whose gain s(S + j) - s(S) is at or above the
    percentile of the round's gains are made; units with three selected neighbors follow; groups that touch merge.
    Once a third of the units is in, the percentile is 15 lower. After ``rounds`` rounds the groups that are left
    merge in pairs, the largest s(A + B) - max(s(A), s(B)) first.

    Parameters
    ----------
    model : nn.Module
        In eval mode.
    images : Tensor
        (N, C, H, W) uint8 source pixels, or float images for a plain module.
    targets : Tensor
        (N) int64, the class explained.
    score : str
        ``"cd"`` (ACD), ``"occlusion"`` (agglomerative occlusion) or ``"build_up"``: see :func:`group_scores`.
    patch : int | None
        Side of a unit in pixels; None takes an eighth of the image's shorter side.
    percentile : float
        0 to 100.
    rounds : int
        Rounds of growth, at least 0.

    Returns
    -------
    list[Hierarchy]
        One tree per image.

    Raises
    ------
    HarmonizeError
        An option out of range; see also :func:`group_scores`.

    References
    ----------
    Singh, Murdoch, Yu 2019, "Hierarchical interpretations for neural network predictions", algorithm 1 and
    section 3.3. The paper starts from superpixels or pixels; here units are squares.
    """
    x = prepare(model, images)
    height, width = x.shape[2:]
    patch = max(1, min(height, width) // 8) if patch is None else patch
    check_numbers(1, patch=patch)
    check_numbers(0, rounds=rounds)
    if not 0 <= percentile <= 100:
        raise HarmonizeError(f"percentile must lie between 0 and 100, not {percentile}")
    shape = (-(-height // patch), -(-width // patch))
    squares = patch_groups(height, width, patch).flatten(1).float()
    targets = targets.to(x.device)
    growing = [_grow(shape, percentile, rounds) for _ in x]
    asked = {i: next(growth) for i, growth in enumerate(growing)}
    trees: dict[int, Hierarchy] = {}
    while asked:
        units = torch.from_numpy(np.concatenate(list(asked.values()))).flatten(1).float()
        masks = (units @ squares > 0).view(-1, height, width)
        row = torch.tensor([i for i, wanted in asked.items() for _ in wanted])
        values = group_scores(model, x[row], targets[row], masks, score).double().cpu().numpy()
        answers = np.split(values, np.cumsum([len(wanted) for wanted in asked.values()])[:-1])
        for i, answer in zip(list(asked), answers, strict=True):
            try:
                asked[i] = growing[i].send(answer)
            except StopIteration as end:
                trees[i] = end.value
                del asked[i]
    return [trees[i] for i in range(len(x))]


def _grow(shape: tuple[int, int], percentile: float, rounds: int) -> Growth:
    """Yields the groups whose scores it wants (M, h, w) and is sent the scores (M)."""
    n = shape[0] * shape[1]
    groups: list[NDArray[np.bool_]] = []
    scores: list[float] = []
    levels: list[int] = []
    children: list[tuple[int, ...]] = []
    current: list[int] = []

    def replace(made: list[NDArray[np.bool_]], values: NDArray[np.float64], level: int) -> None:
        for group, value in zip(made, values, strict=True):
            below = tuple(i for i in current if groups[i][group].any())
            current[:] = [i for i in current if i not in below] + [len(groups)]
            groups.append(group)
            scores.append(float(value))
            levels.append(level)
            children.append(below)

    single = (yield np.eye(n, dtype=bool).reshape(n, *shape)).reshape(shape)
    inside = single >= np.percentile(single, percentile)
    entered = np.where(inside, 0, -1)
    level = 0
    while True:
        parts, count = ndimage.label(inside, CROSS)
        known = {groups[i].tobytes() for i in current}
        made = [part for part in (parts == k for k in range(1, count + 1)) if part.tobytes() not in known]
        if made:
            replace(made, (yield np.stack(made)), level)
        if level == rounds or inside.all():
            break
        extended, gains = [], []
        for i in current:
            for unit in np.argwhere(ndimage.binary_dilation(groups[i], CROSS) & ~inside):
                larger = groups[i].copy()
                larger[tuple(unit)] = True
                extended.append(larger)
                gains.append(-scores[i])
        total = np.array(gains) + (yield np.stack(extended))
        least = np.percentile(total, percentile - LOWERED * (inside.mean() > 1 / 3))
        level += 1
        inside = inside | np.any([group for group, gain in zip(extended, total, strict=True) if gain >= least], axis=0)
        inside |= ndimage.convolve(inside.astype(int), CROSS.astype(int), mode="constant") - inside >= 3
        entered = np.where(inside & (entered < 0), level, entered)
    entered = np.where(entered < 0, level + 1, entered)
    while len(current) > 1:
        pairs = list(combinations(current, 2))
        merged = np.stack([groups[a] | groups[b] for a, b in pairs])
        values = yield merged
        best = int(np.argmax([value - max(scores[a], scores[b]) for value, (a, b) in zip(values, pairs, strict=True)]))
        level += 1
        replace([merged[best]], values[best : best + 1], level)
    return Hierarchy(np.stack(groups), np.array(scores), np.array(levels), tuple(children), entered)


MOST_LEAVES = 6


def draw_hierarchies(trees: Sequence[Hierarchy], images: Tensor, titles: Sequence[str]) -> Figure:
    """Trees two by two: first groups at the bottom, merged ones above; a group is outlined, what it leaves out faded.

    A chain of growth shows as its first and its last group. Of more than ``MOST_LEAVES`` first groups those that make
    up less than a tenth of the last group are left out, and their number is written in. Pictures are cut to the
    surroundings of the last group. The frame's color and the number below are the score.

    Parameters
    ----------
    trees : Sequence[Hierarchy]
        One per image.
    images : Tensor
        (N, C, H, W) uint8.
    titles : Sequence[str]
        Above each tree.

    Returns
    -------
    Figure
        The figure.
    """
    shown = [_shown(tree) for tree in trees]
    places = [_places(links) for links in shown]
    tops = [max(y for _, y in place.values()) for place in places]
    heights = [max(tops[i : i + 2]) + 1.2 for i in range(0, len(trees), 2)]
    figure, axes = plt.subplots(
        len(heights), 2, figsize=(7.4, 0.64 * sum(heights) + 0.35 * len(heights)), height_ratios=heights, squeeze=False
    )
    for ax in axes.flat[len(trees) :]:
        ax.set_visible(False)
    colors = plt.get_cmap("RdBu_r")
    for ax, tree, links, place, image, title in zip(axes.flat, trees, shown, places, images, titles, strict=False):
        limit = float(np.abs(tree.scores).max())
        width = sum(not below for below in links.values())
        size = min(1.0, 6 / width)
        for node, (x, y) in place.items():
            for child in links[node]:
                ax.plot([x, place[child][0]], [y, place[child][1]], color="0.6", lw=0.8, zorder=1)
            frame = {"edgecolor": colors(0.5 + 0.5 * tree.scores[node] / limit), "linewidth": 2}
            picture = _outlined(image, tree.groups[node], tree.groups[-1])
            zoom = 33 * size / len(picture)
            ax.add_artist(AnnotationBbox(OffsetImage(picture, zoom=zoom), (x, y), pad=0.12, bboxprops=frame))
            text = f"{tree.scores[node]:+.1f}"
            below = {"xytext": (0, -18 * size - 2), "textcoords": "offset points", "ha": "center", "va": "top"}
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            ax.annotate(text, (x, y), **below, fontsize=6, bbox=box)
        ax.set(xlim=(min(-0.6, width / 2 - 2), max(width - 0.4, width / 2 + 1)), xticks=[], yticks=[])
        ax.set_ylim(-0.7, heights[list(axes.flat).index(ax) // 2] - 0.7)
        ax.set_title(title, fontsize=7.5)
        if hidden := sum(not below for below in tree.children) - width:
            ax.text(1, 1, f"+{hidden} first groups not drawn", transform=ax.transAxes, ha="right", va="top", fontsize=6)
        ax.grid(visible=False)
        ax.set_frame_on(False)
    return figure


def _shown(tree: Hierarchy) -> dict[int, tuple[int, ...]]:
    """Groups to draw and what hangs below each: seeds, the tops of chains, merged groups."""
    last, sizes = len(tree.groups) - 1, tree.groups.reshape(len(tree.groups), -1).sum(1)
    leaves = [node for node, below in enumerate(tree.children) if not below]
    if len(leaves) > MOST_LEAVES:
        leaves = [leaf for leaf in leaves if sizes[leaf] >= sizes[last] / 10] or [
            max(leaves, key=lambda leaf: sizes[leaf])
        ]
    kept, children = set(leaves), list(tree.children)
    for node, below in enumerate(children):  # children come before their parents
        children[node] = tuple(child for child in below if child in kept)
        if children[node]:
            kept.add(node)
    parent = {child: node for node, below in enumerate(children) for child in below}
    drawn = {node for node in kept if len(children[node]) != 1 or node == last or len(children[parent[node]]) > 1}

    def nearest(node: int) -> int:
        while node not in drawn:
            (node,) = children[node]
        return node

    return {node: tuple(nearest(child) for child in children[node]) for node in sorted(drawn)}


def _places(links: dict[int, tuple[int, ...]]) -> dict[int, tuple[float, float]]:
    """Leaves side by side, each other group above the middle of what is below it."""
    place: dict[int, tuple[float, float]] = {}

    def put(node: int) -> tuple[float, float]:
        below = [put(child) for child in links[node]]
        if below:
            place[node] = (float(np.mean([x for x, _ in below])), 1 + max(y for _, y in below))
        else:
            place[node] = (float(sum(not links[other] for other in place)), 0.0)
        return place[node]

    put(max(links))
    return place


def _outlined(image: Tensor, group: NDArray[np.bool_], last: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(side, side, 3) in [0, 1], enlarged: the group's border in orange, pixels outside it fade into white.

    The square that is cut out holds the last group with two units around it, as far as the image goes.
    """
    pixels = image.permute(1, 2, 0).cpu().numpy() / 255
    pixels = np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels
    unit = [-(-pixels.shape[axis] // group.shape[axis]) for axis in (0, 1)]
    inside = group.repeat(unit[0], 0).repeat(unit[1], 1)[: pixels.shape[0], : pixels.shape[1]]
    reach = [np.nonzero(last.any(1 - axis))[0][[0, -1]] for axis in (0, 1)]
    side = min(4 + max(high - low + 1 for low, high in reach), *last.shape)
    starts = [
        int(np.clip((low + high + 1 - side) // 2, 0, length - side))
        for (low, high), length in zip(reach, last.shape, strict=True)
    ]
    cut = tuple(slice(start * step, (start + side) * step) for start, step in zip(starts, unit, strict=True))
    pixels, inside = pixels[cut], inside[cut]
    scale = max(1, 192 // len(pixels))
    pixels, inside = pixels.repeat(scale, 0).repeat(scale, 1), inside.repeat(scale, 0).repeat(scale, 1)
    border = inside & ~ndimage.binary_erosion(inside, iterations=max(1, len(pixels) // 48))
    faded = np.where(inside[..., None], pixels, 0.65 + 0.35 * pixels)
    return np.where(border[..., None], np.array([0.84, 0.37, 0.0]), faded)
