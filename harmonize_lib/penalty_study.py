"""Penalties on explanations against shortcuts that are known: digits with decoy patches, digits in telling colors."""

from __future__ import annotations

import colorsys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from harmonize_lib import plots
from harmonize_lib.attribution import explain
from harmonize_lib.data import load_dataset
from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.operations import Operations
from harmonize_lib.penalties import explanation_penalty
from harmonize_lib.statistics import Interval, bootstrap_interval, t_interval
from harmonize_lib.storage import remember, sha256_tensors

VERSION = 3
LEARNING_RATE = 3e-3
TASKS = ("decoy", "color")
FRAME = 2  # empty pixels around the 8x8 digits, so that a decoy covers none of the digit
SETS = ("train", "validation", "shifted validation", "shifted test")


class Arm(NamedTuple):
    """A penalty as it is compared."""

    kind: str
    form: str
    unit: float  # of its strengths: the penalties differ in size


ARMS = {
    "none": None,
    "CDEP (paper)": Arm("cdep", "paper", 0.01),
    "CDEP (code)": Arm("cdep", "code", 1.0),
    "RRR": Arm("rrr", "paper", 1.0),
    "EG": Arm("eg", "paper", 0.1),
}
REPORTED = pd.DataFrame(
    [
        ("decoy", "CDEP (code)", 0.972, "Singh, Ha, Yu 2021 line of work, ICML table 2"),
        ("decoy", "RRR", 0.990, "the same table"),
        ("color", "CDEP (code)", 0.310, "the same table"),
        ("color", "CDEP (code)", 0.251, "README of the published code"),
        ("color", "CDEP (code)", 0.3425, "demo notebook of the published code"),
        ("color", "RRR", 0.002, "the same table"),
        ("color", "none", 0.002, "the same table"),
    ],
    columns=["task", "arm", "accuracy", "where"],
)


COSTS = "operations per step, millions", "processor time per step, ms"


def shown(arm: str) -> str:
    """An arm as a reader should see it.

    Parameters
    ----------
    arm : str
        A key of ``ARMS``.

    Returns
    -------
    str
        Its name.
    """
    return "no penalty" if arm == "none" else arm


@dataclass(frozen=True)
class Shortcut:
    """A task with a shortcut that turns around where it is shifted.

    Attributes
    ----------
    name : str
        ``"decoy"`` or ``"color"``.
    x : dict[str, Tensor]
        By set (``SETS``), (n, C, H, W) float network inputs; the shifted sets carry the other shortcut.
    y : dict[str, Tensor]
        By set, (n) int64.
    activity : Tensor
        (H, W) how bright a pixel is on average over the training images; what groups of pixels are drawn by.
    corners : Tensor
        (H, W) bool, where decoys may be.
    """

    name: str
    x: dict[str, Tensor]
    y: dict[str, Tensor]
    activity: Tensor
    corners: Tensor


def load(digits: str, n_train: int, n_validation: int, n_test: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Split digits into the four sets of the study.

    Parameters
    ----------
    digits : str
        ``"digits"`` (scikit-learn's 1,797 of 8x8 pixels, in a frame of two empty ones) or ``"mnist:DIR"``.
    n_train : int
        Training images.
    n_validation : int
        Images of each validation set.
    n_test : int
        Test images.
    seed : int
        Seed of the split.

    Returns
    -------
    dict[str, tuple[Tensor, Tensor]]
        By set: images (n, H, W) float in [0, 255] and labels (n).

    Raises
    ------
    HarmonizeError
        Unknown digits, or more images than there are.
    """
    if digits == "digits":
        data = load_digits()
        images = F.pad(torch.from_numpy(data.images).float() * (255 / 16), [FRAME] * 4)
        labels = torch.from_numpy(data.target).long()
    elif digits.startswith("mnist:"):
        parts = [load_dataset(digits, split) for split in ("train", "test")]
        images = torch.cat([part.images[:, 0] for part in parts]).float()
        labels = torch.cat([part.labels for part in parts])
    else:
        raise unknown("digits", digits, ["digits", "mnist:DIR"])
    sizes = [n_train, n_validation, n_validation, n_test]
    if sum(sizes) > len(images):
        line = f"n_train + 2 n_validation + n_test = {sum(sizes)}"
        raise HarmonizeError(
            f"{line} is more than the {len(images)} images of {digits.partition(':')[0]}: ask for fewer"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: sum(sizes)].split(sizes)
    return {name: (images[index], labels[index]) for name, index in zip(SETS, order, strict=True)}


def decoy(images: Tensor, labels: Tensor, shifted: bool, generator: torch.Generator) -> Tensor:
    """Put a patch into a random corner whose brightness tells the label.

    Parameters
    ----------
    images : Tensor
        (n, H, W) in [0, 255].
    labels : Tensor
        (n) 0 to 9.
    shifted : bool
        Brightness 25 y instead of 255 - 25 y.
    generator : torch.Generator
        Draws the corners.

    Returns
    -------
    Tensor
        (n, 1, H, W) in [-1, 1].

    References
    ----------
    Rieger, Singh, Murdoch, Yu 2020 (arXiv 1909.13584), DecoyMNIST, after Ross et al. 2017.
    """
    height, width = images.shape[1:]
    side = patch_side(height)
    bottom, right = torch.randint(2, (2, len(images)), generator=generator).bool()
    rows = (torch.arange(height) < side) ^ bottom[:, None] & _border(height, side)
    columns = (torch.arange(width) < side) ^ right[:, None] & _border(width, side)
    where = rows[:, :, None] & columns[:, None]
    brightness = 25.0 * labels if shifted else 255 - 25.0 * labels
    return torch.where(where, brightness[:, None, None], images)[:, None] / 127.5 - 1


def _border(size: int, side: int) -> Tensor:
    at = torch.arange(size)
    return (at < side) | (at >= size - side)


def patch_side(size: int) -> int:
    """Side of a decoy: 5 of 28 pixels, 2 of 12.

    Parameters
    ----------
    size : int
        Side of the image.

    Returns
    -------
    int
        Pixels.
    """
    return round(size * 5 / 28)


def palette() -> Tensor:
    """Ten colors from red to purple, the hue turning evenly.

    Returns
    -------
    Tensor
        (10, 3) in [0, 1].
    """
    steps = np.linspace(0, 1, 10)
    return torch.tensor([colorsys.hls_to_rgb(300 / 360 * t, 0.5 - 0.25 * t, 1.0) for t in steps]).float()


def colored(images: Tensor, labels: Tensor, shifted: bool) -> Tensor:
    """Give every digit the color of its label.

    Parameters
    ----------
    images : Tensor
        (n, H, W) in [0, 255].
    labels : Tensor
        (n) 0 to 9.
    shifted : bool
        Color 9 - y instead of y.

    Returns
    -------
    Tensor
        (n, 3, H, W) in [0, 1].

    References
    ----------
    Rieger, Singh, Murdoch, Yu 2020 (arXiv 1909.13584), ColorMNIST.
    """
    color = palette()[9 - labels if shifted else labels]
    return images[:, None] / 255 * color[:, :, None, None]


def shortcut(task: str, sets: dict[str, tuple[Tensor, Tensor]], seed: int) -> Shortcut:
    """Build a task.

    Parameters
    ----------
    task : str
        ``"decoy"`` or ``"color"``.
    sets : dict[str, tuple[Tensor, Tensor]]
        From :func:`load`.
    seed : int
        Seed of the decoys' corners.

    Returns
    -------
    Shortcut
        The task; color digits are standardized by the training set's channels.
    """
    generator = torch.Generator().manual_seed(seed)
    x = {}
    for name, (images, labels) in sets.items():
        shifted = name.startswith("shifted")
        x[name] = decoy(images, labels, shifted, generator) if task == "decoy" else colored(images, labels, shifted)
    if task == "color":
        mean, deviation = (f(x["train"], (0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
        x = {name: (values - mean) / deviation for name, values in x.items()}
    images = sets["train"][0]
    height, width = images.shape[1:]
    border = [_border(size, patch_side(size)) for size in (height, width)]
    return Shortcut(
        task, x, {name: labels for name, (_, labels) in sets.items()}, images.mean(0), border[0][:, None] & border[1]
    )


def network(channels: int, side: int, seed: int) -> nn.Module:
    """A small convolutional network.

    Parameters
    ----------
    channels : int
        Of the images.
    side : int
        Of the images, which 4 divides.
    seed : int
        Seed of the weights.

    Returns
    -------
    nn.Module
        Two convolutions with ReLU and max pooling, a linear layer; in train mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * (side // 4) ** 2, 10),
        )


def groups_for(task: Shortcut, n: int, generator: torch.Generator) -> Tensor:
    """The pixels a step's penalty is about.

    Parameters
    ----------
    task : Shortcut
        The task.
    n : int
        Images of the step.
    generator : torch.Generator
        Draws pixels.

    Returns
    -------
    Tensor
        (n, H, W) bool: all four corners of every image (decoy), or one pixel of each image, drawn in proportion to
        its activity (color).

    Notes
    -----
    The published code draws eight pixels for the whole batch; one for each image costs an eighth of the passes.
    """
    if task.name == "decoy":
        return task.corners.expand(n, -1, -1)
    chosen = torch.multinomial(task.activity.flatten(), n, replacement=True, generator=generator)
    return F.one_hot(chosen, task.activity.numel()).bool().unflatten(1, task.activity.shape)


def fit(task: Shortcut, arm: str, strength: float, seed: int, epochs: int, batch_size: int) -> dict[str, Tensor]:
    """Train one network: cross-entropy plus strength times the penalty, one step of Adam per batch on their sum.

    Networks of a seed begin alike and see the same batches and the same groups, whatever the penalty; all train for
    the same number of steps, without early stopping.

    Parameters
    ----------
    task : Shortcut
        The task.
    arm : str
        A key of ``ARMS``.
    strength : float
        Weight of the penalty.
    seed : int
        Seed of weights, batches, groups and draws.
    epochs : int
        Passes over the training images.
    batch_size : int
        Images per step; what is left over at the end of a pass is dropped.

    Returns
    -------
    dict[str, Tensor]
        Accuracy on the three held-out sets (``validation``, ``shifted validation``, ``shifted test``), ``seconds``
        of processor time per step, and the weights.
    """
    x = task.x["train"]
    model = network(x.shape[1], x.shape[2], seed)
    weights = list(model.parameters())
    optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE, weight_decay=1e-4)
    batches, drawn, positions = (torch.Generator().manual_seed(3 * seed + stream) for stream in range(3))
    steps, started = 0, time.process_time()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=batches)
        for rows in order[: len(x) // batch_size * batch_size].split(batch_size):
            loss = _loss(model, task, rows, arm, strength, drawn, positions)
            optimizer.zero_grad()
            loss.backward(inputs=weights)
            optimizer.step()
            steps += 1
    seconds = (time.process_time() - started) / steps
    model.eval()
    result = {"seconds": torch.tensor(seconds)}
    with torch.no_grad():
        for name in SETS[1:]:
            result[name] = (model(task.x[name]).argmax(1) == task.y[name]).double().mean()
    return result | {f"weights.{name}": value for name, value in model.state_dict().items()}


def _loss(
    model: nn.Module,
    task: Shortcut,
    rows: Tensor,
    arm: str,
    strength: float,
    drawn: torch.Generator,
    positions: torch.Generator,
) -> Tensor:
    x, y, penalty = task.x["train"][rows], task.y["train"][rows], ARMS[arm]
    groups = groups_for(task, len(rows), drawn)
    loss = F.cross_entropy(model(x), y)
    if penalty is None:
        return loss
    return loss + strength * explanation_penalty(model, x, y, groups, penalty.kind, penalty.form, generator=positions)


def operations(task: Shortcut, arm: str, batch_size: int) -> int:
    """Count what a training step computes, on whatever machine.

    Parameters
    ----------
    task : Shortcut
        The task.
    arm : str
        A key of ``ARMS``.
    batch_size : int
        Images of the step.

    Returns
    -------
    int
        Floating-point operations of convolutions and linear layers, forward and backward, as PyTorch counts them.
    """
    x = task.x["train"]
    model, rows = network(x.shape[1], x.shape[2], 0), torch.arange(batch_size)
    with Operations() as counter:
        loss = _loss(model, task, rows, arm, 1.0, *(torch.Generator().manual_seed(stream) for stream in (1, 2)))
        loss.backward(inputs=list(model.parameters()))
    return counter.total


def grid(settings: Any) -> tuple[pd.DataFrame, dict[tuple[str, str, float, int], nn.Module], dict[str, list[Shortcut]]]:
    """Train every penalty at every strength with every seed, and keep what was trained in the store.

    Parameters
    ----------
    settings : Any
        Parameters of notebook 11.

    Returns
    -------
    tuple[pd.DataFrame, dict[tuple[str, str, float, int], nn.Module], dict[str, list[Shortcut]]]
        The table (``task``, ``arm``, ``strength``, ``seed``, ``validation``, ``shifted validation``,
        ``shifted test``, ``seconds`` per step); the networks by (task, arm, strength, seed); the tasks by name, one
        per seed. Strength 0 is the arm ``none``.
    """
    seeds = range(settings.seed, settings.seed + settings.seeds)
    sizes = (settings.n_train, settings.n_validation, settings.n_test)
    splits = [load(settings.digits, *sizes, seed) for seed in seeds]
    tasks = {name: [shortcut(name, sets, seed) for sets, seed in zip(splits, seeds, strict=True)] for name in TASKS}
    arms = [
        (name, value * (arm.unit if arm else 0.0))
        for name, arm in ARMS.items()
        for value in (settings.strengths if arm else [0.0])
    ]
    jobs = [(name, arm, value, place) for name in TASKS for arm, value in arms for place in range(len(seeds))]
    data = {
        name: [sha256_tensors(task.x | {f"y {key}": y for key, y in task.y.items()}) for task in tasks[name]]
        for name in TASKS
    }
    rows, networks = [], {}
    for name, arm, value, place in tqdm(jobs, desc="training", mininterval=1):
        task, seed = tasks[name][place], seeds[place]
        protocol = {"epochs": settings.epochs, "batch_size": settings.batch_size}
        key = {"version": VERSION, "data": data[name][place], "arm": arm, "strength": value, "seed": seed, **protocol}
        result = remember("penalty", key, partial(fit, task, arm, value, seed, **protocol))
        model = network(task.x["train"].shape[1], task.x["train"].shape[2], seed)
        model.load_state_dict({key[8:]: tensor for key, tensor in result.items() if key.startswith("weights.")})
        networks[name, arm, value, seed] = model.requires_grad_(False).eval()
        rows.append((name, arm, value, seed, *(float(result[column]) for column in (*SETS[1:], "seconds"))))
    table = pd.DataFrame(rows, columns=["task", "arm", "strength", "seed", *SETS[1:], "seconds"])
    return table, networks, tasks


def _hash(task: Shortcut) -> str:
    labels = {f"labels of {name}": y for name, y in task.y.items()}
    return sha256_tensors({**task.x, **labels, "activity": task.activity, "corners": task.corners})


def over_strengths(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy against the strength of the penalty.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`grid`.

    Returns
    -------
    pd.DataFrame
        Columns ``task``, ``set``, ``arm``, ``strength``, ``mean``, ``low``, ``high``, ``n``; the arm ``none`` is
        repeated at every strength.
    """
    strengths = sorted(table.loc[table["strength"] > 0, "strength"].unique())
    none = pd.concat([table[table["arm"] == "none"].assign(strength=value) for value in strengths])
    full = pd.concat([none, table[table["arm"] != "none"]])
    rows = []
    for name in SETS[1:]:
        for group, part in full.groupby(["task", "arm", "strength"], sort=False):
            rows.append((name, *group, *t_interval(part[name])[:4]))
    return pd.DataFrame(rows, columns=["set", "task", "arm", "strength", "mean", "low", "high", "n"])


PROTOCOLS = ("shift unknown", "shift known")


def select(table: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """Choose each penalty's strength by two protocols, the same for all.

    Shift unknown: the largest strength whose mean accuracy on unshifted validation images is within the tolerance of
    training without a penalty. Shift known: the strength with the best mean accuracy on shifted validation images.
    Where nothing qualifies, the strength is 0: no penalty.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`grid`.
    tolerance : float
        Validation accuracy a penalty may cost.

    Returns
    -------
    pd.DataFrame
        The rows of ``table`` at the chosen strengths, with ``protocol``; ``arm`` is the penalty even where its
        strength is 0.
    """
    parts = []
    for _, part in table.groupby("task", sort=False):
        none = part[part["arm"] == "none"]
        for arm in ARMS:
            own = pd.concat([none, part[part["arm"] == arm]]) if arm != "none" else none
            means = own.groupby("strength")[["validation", "shifted validation"]].mean()
            within = means["validation"] >= none["validation"].mean() - tolerance
            best = {PROTOCOLS[0]: within[within].index.max(), PROTOCOLS[1]: means["shifted validation"].idxmax()}
            parts += [own[own["strength"] == value].assign(arm=arm, protocol=name) for name, value in best.items()]
    return pd.concat(parts, ignore_index=True)


def at_the_end(table: pd.DataFrame, chosen: pd.DataFrame) -> str:
    """Name the chosen strengths beyond which none was tried.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`grid`.
    chosen : pd.DataFrame
        From :func:`select`.

    Returns
    -------
    str
        A sentence.
    """
    tried = table[table["arm"] != "none"].groupby("arm")["strength"].agg(["min", "max"])
    picked = chosen[chosen["arm"] != "none"].drop_duplicates(["task", "arm", "protocol"])
    ends = [
        f"{row.task}, {shown(row.arm)}, {row.protocol} (λ = {row.strength:g})"
        for row in picked.itertuples()
        if row.strength in tuple(tried.loc[row.arm])
    ]
    return f"chosen at an end of the strengths tried: {'; '.join(ends) or 'none'}"


def selected_accuracy(chosen: pd.DataFrame) -> pd.DataFrame:
    """Accuracy under the shift at the chosen strengths.

    Parameters
    ----------
    chosen : pd.DataFrame
        From :func:`select`.

    Returns
    -------
    pd.DataFrame
        Columns ``task``, ``arm``, ``protocol``, ``strength``, ``mean``, ``low``, ``high``, ``n``.
    """
    rows = []
    for group, part in chosen.groupby(["task", "arm", "protocol", "strength"], sort=False):
        rows.append((*group, *t_interval(part["shifted test"])[:4]))
    return pd.DataFrame(rows, columns=["task", "arm", "protocol", "strength", "mean", "low", "high", "n"])


def _accuracy(chosen: pd.DataFrame, task: str, protocol: str, arm: str, images: str = "shifted test") -> np.ndarray:
    rows = chosen[(chosen["task"] == task) & (chosen["protocol"] == protocol) & (chosen["arm"] == arm)]
    return rows.sort_values("seed")[images].to_numpy()


def over_none(chosen: pd.DataFrame) -> pd.DataFrame:
    """What each penalty adds to the accuracy under the shift, where the shift is known.

    Parameters
    ----------
    chosen : pd.DataFrame
        From :func:`select`.

    Returns
    -------
    pd.DataFrame
        Columns ``task``, ``arm``, ``mean``, ``low``, ``high``, ``n``: shifted test accuracy minus that without a
        penalty, paired by seed.
    """
    rows = []
    for task in TASKS:
        none = _accuracy(chosen, task, PROTOCOLS[1], "none")
        for arm in list(ARMS)[1:]:
            rows.append((task, arm, *t_interval(_accuracy(chosen, task, PROTOCOLS[1], arm) - none)[:4]))
    return pd.DataFrame(rows, columns=["task", "arm", "mean", "low", "high", "n"])


def where_each_works(gains: pd.DataFrame) -> str:
    """Say on which tasks each penalty adds accuracy by its 95 % interval.

    Parameters
    ----------
    gains : pd.DataFrame
        From :func:`over_none`.

    Returns
    -------
    str
        One line per penalty.
    """
    lines = []
    for arm, part in gains.groupby("arm", sort=False):
        works = " and ".join(part.loc[part["low"] > 0, "task"]) or "neither task"
        sizes = (f"{row.task} {row.mean:+.3f} [{row.low:.3f}, {row.high:.3f}]" for row in part.itertuples())
        lines.append(f"{arm} works on {works}: {', '.join(sizes)}, n = {part['n'].iloc[0]:.0f}")
    return "\n".join(lines)


def measured_claims(chosen: pd.DataFrame, decoys: Shortcut, batch_size: int) -> dict[str, Interval]:
    """What the claims are judged by.

    Parameters
    ----------
    chosen : pd.DataFrame
        From :func:`select`.
    decoys : Shortcut
        Decoy digits of one seed, whose training step is counted.
    batch_size : int
        Images of a training step.

    Returns
    -------
    dict[str, Interval]
        Claim id to paired difference over seeds. CDEP stands in its published code's form; ids that end in ``_paper``
        take the paper's. Where the shift is known, the best or the worse rival is the one on shifted validation
        images. Costs are counted: their interval is a point.
    """
    unknown_shift, known = PROTOCOLS
    code, paper = "CDEP (code)", "CDEP (paper)"
    accuracy = partial(_accuracy, chosen)

    def validated(task: str, arm: str) -> float:
        return float(accuracy(task, known, arm, "shifted validation").mean())

    best = max(("RRR", "EG", "none"), key=partial(validated, "color"))
    worse = min(("RRR", "EG"), key=partial(validated, "decoy"))
    compared = {
        "cdep_color": ("color", known, code, best),
        "cdep_color_paper": ("color", known, paper, best),
        "cdep_color_unknown_eg": ("color", unknown_shift, code, "EG"),
        "cdep_color_unknown_rrr": ("color", unknown_shift, code, "RRR"),
        "cdep_decoy": ("decoy", known, code, "none"),
        "cdep_decoy_paper": ("decoy", known, paper, "none"),
        "eg_rrr_decoy": ("decoy", known, worse, code),
        "eg_rrr_decoy_paper": ("decoy", known, worse, paper),
        "eg_decoy_unknown": ("decoy", unknown_shift, "EG", code),
        "rrr_decoy_unknown": ("decoy", unknown_shift, "RRR", code),
    }
    measured = {
        name: t_interval(accuracy(task, protocol, one) - accuracy(task, protocol, other))
        for name, (task, protocol, one, other) in compared.items()
    }
    count = {arm: operations(decoys, arm, batch_size) / 1e6 for arm in (code, "EG", "RRR")}
    saved = {"eg_cost": count[code] - count["EG"], "rrr_cost": count[code] - count["RRR"]}
    return measured | {name: Interval(value, value, value, 1) for name, value in saved.items()}


def corner_share(
    task: Shortcut, networks: dict[tuple[str, str, float, int], nn.Module], chosen: pd.DataFrame, seed: int
) -> pd.DataFrame:
    """How much of the magnitude of integrated gradients lies where decoys may be, on shifted test images.

    Parameters
    ----------
    task : Shortcut
        Decoy digits of one seed.
    networks : dict[tuple[str, str, float, int], nn.Module]
        From :func:`grid`.
    chosen : pd.DataFrame
        From :func:`select`.
    seed : int
        The seed of task and networks, and of the bootstrap over images.

    Returns
    -------
    pd.DataFrame
        Columns ``arm``, ``mean``, ``low``, ``high``, ``n``, at the strength chosen where the shift is known.
    """
    rows = []
    for arm, maps in maps_of(task, networks, chosen, seed, 100).items():
        sizes = maps.abs()
        share = (sizes * task.corners).sum((1, 2)) / sizes.sum((1, 2))
        rows.append((arm, *bootstrap_interval(share.numpy(), seed)[:4]))
    return pd.DataFrame(rows, columns=["arm", "mean", "low", "high", "n"])


def maps_of(
    task: Shortcut,
    networks: dict[tuple[str, str, float, int], nn.Module],
    chosen: pd.DataFrame,
    seed: int,
    n: int,
) -> dict[str, Tensor]:
    """Integrated gradients from zero of the true class, for networks of every arm.

    Parameters
    ----------
    task : Shortcut
        The task of the seed.
    networks : dict[tuple[str, str, float, int], nn.Module]
        From :func:`grid`.
    chosen : pd.DataFrame
        From :func:`select`.
    seed : int
        Which networks.
    n : int
        Shifted test images, from the first.

    Returns
    -------
    dict[str, Tensor]
        Arm to maps (n, H, W), at the strength chosen where the shift is known.
    """
    x, y = task.x["shifted test"][:n], task.y["shifted test"][:n]
    known = chosen[(chosen["task"] == task.name) & (chosen["protocol"] == PROTOCOLS[1]) & (chosen["seed"] == seed)]
    maps = {}
    for arm, strength in zip(known["arm"], known["strength"], strict=True):
        model = networks[task.name, arm if strength else "none", strength, seed]
        maps[arm] = explain(model, x, y, "integrated_gradients").maps
    return maps


def pixels(task: Shortcut, name: str, n: int) -> Tensor:
    """Images as they look.

    Parameters
    ----------
    task : Shortcut
        The task.
    name : str
        The set.
    n : int
        Images, from the first.

    Returns
    -------
    Tensor
        (n, C, H, W) uint8.
    """
    x = task.x[name]
    low, high = (f(task.x["train"], (0, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    return ((x[:n] - low) / (high - low) * 255).clamp(0, 255).round().byte()


def draw_tasks(tasks: dict[str, list[Shortcut]], n: int) -> tuple[Figure, pd.DataFrame]:
    """Training images and shifted test images of both tasks.

    Parameters
    ----------
    tasks : dict[str, list[Shortcut]]
        From :func:`grid`.
    n : int
        Images per row.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure and the labels it shows.
    """
    rows, names, labels = [], [], []
    for name in TASKS:
        task = tasks[name][0]
        for kind in ("train", "shifted test"):
            order = task.y[kind].argsort(stable=True)
            first = [int(order[task.y[kind][order] == digit][0]) for digit in range(10)][:n]
            images = pixels(task, kind, len(task.y[kind]))[first]
            rows.append([(image, "") for image in images])
            names.append(f"{name},\n{'training' if kind == 'train' else 'shifted'}")
            labels += [(name, kind, digit) for digit in range(len(images))]
    return plots.gallery(rows, names, 0.62), pd.DataFrame(labels, columns=["task", "set", "label"])


def draw_curves(lines: pd.DataFrame) -> Figure:
    """Accuracy over strengths: a row per task, unshifted validation left, shifted test right.

    Parameters
    ----------
    lines : pd.DataFrame
        From :func:`over_strengths`.

    Returns
    -------
    Figure
        The figure.
    """
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 5), sharex=True, sharey=True)
    for row, task in zip(axes, TASKS, strict=True):
        for ax, name in zip(row, ("validation", "shifted test"), strict=True):
            part = lines[(lines["task"] == task) & (lines["set"] == name)]
            words = "shortcut as in training" if name == "validation" else "shortcut turned around"
            plots.curves(ax, part, "strength", "arm", f"{task.capitalize()} digits, {words}", ["none"])
            ax.set(xscale="log", xlabel="strength λ" if task == TASKS[-1] else "", ylim=(-0.02, 1.02))
        row[0].set_ylabel("accuracy")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, [shown(name) for name in names], loc="outside lower center", ncols=5)
    return figure


def draw_selected(accuracy: pd.DataFrame) -> Figure:
    """Accuracy under the shift at chosen strengths, beside what was reported on MNIST.

    Parameters
    ----------
    accuracy : pd.DataFrame
        From :func:`selected_accuracy`.

    Returns
    -------
    Figure
        The figure.
    """
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.9), sharey=True)
    names = list(ARMS)
    for ax, task in zip(axes, TASKS, strict=True):
        part = accuracy[accuracy["task"] == task].assign(arm=lambda t: pd.Categorical(t["arm"], names))
        plots.forest(ax, part, "arm", f"{task.capitalize()} digits", "accuracy, shortcut turned around", "protocol")
        reported = REPORTED[REPORTED["task"] == task]
        ax.plot(
            reported["accuracy"], [names.index(arm) for arm in reported["arm"]], "kx", ms=5, label="reported (MNIST)"
        )
        ax.set(xlim=(-0.03, 1.03))
    axes[0].set_yticks(range(len(names)), [shown(name) for name in names])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_maps(
    tasks: dict[str, list[Shortcut]],
    networks: dict[tuple[str, str, float, int], nn.Module],
    chosen: pd.DataFrame,
    n: int,
    seed: int,
) -> tuple[Figure, pd.DataFrame]:
    """Maps without and with each penalty, on shifted test images.

    Parameters
    ----------
    tasks : dict[str, list[Shortcut]]
        From :func:`grid`.
    networks : dict[tuple[str, str, float, int], nn.Module]
        From :func:`grid`.
    chosen : pd.DataFrame
        From :func:`select`.
    n : int
        Images per task.
    seed : int
        Which networks: the first seed.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure, and per panel the true and the predicted class.
    """
    rows: list[list[tuple[Tensor, str]]] = [[] for _ in range(1 + len(ARMS))]
    names, facts = ["image", *map(shown, ARMS)], []
    for name in TASKS:
        task = tasks[name][0]
        truth = task.y["shifted test"][:n].tolist()
        rows[0] += [(image, f"{y}") for image, y in zip(pixels(task, "shifted test", n), truth, strict=True)]
        maps = maps_of(task, networks, chosen, seed, n)
        known = chosen[(chosen["task"] == name) & (chosen["protocol"] == PROTOCOLS[1]) & (chosen["seed"] == seed)]
        strengths = dict(zip(known["arm"], known["strength"], strict=True))
        for row, arm in zip(rows[1:], ARMS, strict=True):
            model = networks[name, arm if strengths[arm] else "none", strengths[arm], seed]
            predicted = model(task.x["shifted test"][:n]).argmax(1).tolist()
            row += [(each, f"says {y}") for each, y in zip(maps[arm], predicted, strict=True)]
            facts += [
                (name, arm, strengths[arm], i, *pair) for i, pair in enumerate(zip(truth, predicted, strict=True))
            ]
    figure = plots.gallery(rows, names, 0.78)
    return figure, pd.DataFrame(facts, columns=["task", "arm", "strength", "image", "label", "predicted"])


def draw_cost(
    table: pd.DataFrame, tasks: dict[str, list[Shortcut]], batch_size: int, seed: int
) -> tuple[Figure, pd.DataFrame]:
    """Operations and processor time of a training step, by penalty.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`grid`.
    tasks : dict[str, list[Shortcut]]
        From :func:`grid`.
    batch_size : int
        Images of a training step.
    seed : int
        Seed of the bootstrap over networks.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure and its numbers, in millions of operations and in milliseconds per step.
    """
    rows = []
    for (task, arm), part in table.groupby(["task", "arm"], sort=False):
        count = operations(tasks[task][0], arm, batch_size) / 1e6
        rows.append((COSTS[0], task, arm, count, count, count, 1))
        rows.append((COSTS[1], task, arm, *bootstrap_interval(1000 * part["seconds"].to_numpy(), seed)[:4]))
    cost = pd.DataFrame(rows, columns=["measure", "task", "arm", "mean", "low", "high", "n"])
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.7), sharey=True)
    for ax, measure, title in zip(axes, COSTS, ("Counted", "Timed"), strict=True):
        part = cost[cost["measure"] == measure]
        plots.forest(ax, part, "arm", f"{title}: one training step", measure, "task")
    axes[0].set_yticks(range(len(ARMS)), [shown(name) for name in ARMS])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, title="digits")
    return figure, cost


def cost_in_words(table: pd.DataFrame, cost: pd.DataFrame) -> str:
    """Say what a step with EG or RRR saves against one with CDEP (code) on decoy digits, counted and timed.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`grid`.
    cost : pd.DataFrame
        From :func:`draw_cost`.

    Returns
    -------
    str
        One line per rival and one on a pass shared with the loss. Times are means over strengths, paired by seed, with
        Student's interval over seeds.
    """
    count = cost[(cost["measure"] == COSTS[0]) & (cost["task"] == "decoy")].set_index("arm")["mean"]
    decoys = table[table["task"] == "decoy"]
    seconds = decoys.pivot_table(index="seed", columns="arm", values="seconds")
    lines = []
    for arm in ("EG", "RRR"):
        counted = count["CDEP (code)"] - count[arm]
        timed = t_interval(1000 * (seconds["CDEP (code)"] - seconds[arm]))
        lines.append(
            f"CDEP (code) minus {arm}, one step: {counted:.1f} million operations (counted, no interval); "
            f"{timed.mean:.2f} ms [{timed.low:.2f}, {timed.high:.2f}] of processor time, n = {timed.n} seeds"
        )
    shared = (f"{arm} {count[arm] - count['none']:.1f}" for arm in ("CDEP (code)", "RRR"))
    lines.append(f"with a pass shared with the loss, in millions: {', '.join(shared)}; EG stays at {count['EG']:.1f}")
    return "\n".join(lines)
