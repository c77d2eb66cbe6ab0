"""Training with the pixel prior: the front of prior value and accuracy, its weight by a rule, robustness to noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.std import tqdm

from harmonize_lib import plots
from harmonize_lib.data import load_dataset
from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.models import find_device
from harmonize_lib.priors import expected_gradients_penalty, pixel_prior, training_attributions
from harmonize_lib.statistics import Interval, t_interval
from harmonize_lib.storage import remember, sha256_json, sha256_tensors

VERSION = 2
ARMS = {"baseline": "", "TV of gradients": "gradients", "TV of expected gradients": "expected_gradients"}
OURS = "TV of expected gradients"
MAP_SAMPLES = 100  # draws of the maps shown, as in the paper's figures
FRONT_SAMPLES = 10  # draws of the prior's value on the validation images
REPORTED_FLIPS = pd.DataFrame(
    {
        "flipped": [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3],
        "TV of expected gradients": [0.9951, 0.9871, 0.9128, 0.6941, 0.4070, 0.2069, 0.1247],
        "baseline": [0.9952, 0.8767, 0.4905, 0.2160, 0.1208, 0.0994, 0.0975],
    }
)  # MNIST, from the authors' repository: two optimizers in turn, 50 epochs, lambda 5e-11 on that scale


class Pixels(NamedTuple):
    """Images (N, C, H, W) in [-0.5, 0.5] with labels (N), for training, validation and test."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]
    name: str


class Recipe(NamedTuple):
    """Network and training: the paper's for MNIST, a smaller one for the 8 x 8 digits."""

    kernel: int
    channels: tuple[int, int]
    hidden: int
    dropout: float
    epochs: int
    batch_size: int
    learning_rate: float
    decay: float = 0.95


SMALL = Recipe(3, (16, 32), 64, 0.0, 15, 50, 5e-3, 0.9)
PAPER = Recipe(5, (32, 64), 1024, 0.5, 60, 50, 1e-4)


def recipe(name: str, epochs: int = 0) -> Recipe:
    """A recipe by name.

    Parameters
    ----------
    name : str
        ``"small"`` or ``"paper"``.
    epochs : int
        0 keeps the recipe's.

    Returns
    -------
    Recipe
        The recipe.

    Raises
    ------
    HarmonizeError
        Unknown name.
    """
    recipes = {"small": SMALL, "paper": PAPER}
    if name not in recipes:
        raise unknown("recipe", name, recipes)
    return recipes[name]._replace(epochs=epochs or recipes[name].epochs)


def load_pixels(spec: str, train_images: int = 0, seed: int = 0) -> Pixels:
    """Load small images for training.

    Parameters
    ----------
    spec : str
        ``"digits"`` (1,797 of 8 x 8, come with scikit-learn: 1,000 train, 300 validation, 497 test), or a set that
        :func:`harmonize_lib.data.load_dataset` knows with the splits train and test, e.g. ``"mnist:DIR"``.
    train_images : int
        Training images, drawn by the seed; 0 takes all that validation (a twelfth) leaves.
    seed : int
        Seed of the split.

    Returns
    -------
    Pixels
        The images.

    Raises
    ------
    HarmonizeError
        Unknown set, or more training images than there are.
    """
    if spec == "digits":
        from sklearn.datasets import load_digits

        data = load_digits()
        x, y = torch.from_numpy(data.images).float()[:, None] / 16 - 0.5, torch.from_numpy(data.target)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        train, validation, test = order.split([1000, 300, len(y) - 1300])
        classes, name = tuple(map(str, data.target_names)), "digits"
        parts = [(x[part], y[part]) for part in (train, validation, test)]
    else:
        source, held_out = (load_dataset(spec, split) for split in ("train", "test"))
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
        cut = len(source) // 12
        pairs = [(source, order[cut:]), (source, order[:cut]), (held_out, torch.arange(len(held_out)))]
        parts = [(data.images[index].float() / 255 - 0.5, data.labels[index]) for data, index in pairs]
        classes, name = source.classes, source.name
    most = len(parts[0][1])
    if train_images > most:
        raise HarmonizeError(f"train_images = {train_images}, but {name} leaves {most} for training: ask for fewer")
    x, y = (part[: train_images or most] for part in parts[0])
    return Pixels((x, y), parts[1], parts[2], classes, name)


def build_network(recipe: Recipe, shape: Sequence[int], classes: int) -> nn.Module:
    """Two convolutions with ReLU and pooling, a hidden layer, dropout.

    Parameters
    ----------
    recipe : Recipe
        Sizes.
    shape : Sequence[int]
        (C, H, W) of the images, sides multiples of 4.
    classes : int
        K.

    Returns
    -------
    nn.Module
        Gives logits (N, K).

    References
    ----------
    Erion et al. 2021 (arXiv 1906.10670), methods of the MNIST experiment; without the BatchNorm of their repository.
    """
    channels, height, width = shape
    first, second = recipe.channels
    return nn.Sequential(
        nn.Conv2d(channels, first, recipe.kernel, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, recipe.kernel, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * (height // 4) * (width // 4), recipe.hidden),
        nn.ReLU(),
        nn.Dropout(recipe.dropout),
        nn.Linear(recipe.hidden, classes),
    )


def batches(n: int, size: int, epoch: int, seed: int) -> Iterator[Tensor]:
    """Order of the training images, the same for every arm.

    Parameters
    ----------
    n : int
        Images.
    size : int
        Images in a batch; what is left over waits for the next epoch.
    epoch : int
        Which epoch.
    seed : int
        Seed of the network.

    Yields
    ------
    Tensor
        (size) positions.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1000 * seed + epoch))
    yield from order[: n // size * size].split(size)


def train_with_prior(
    images: tuple[Tensor, Tensor],
    classes: int,
    recipe: Recipe,
    method: str,
    weight: float,
    seed: int,
    prior: Callable[[Tensor], Tensor] = pixel_prior,
) -> nn.Module:
    """Train a network on cross-entropy + weight * prior, both on the same batch, with one Adam.

    Initial weights, batches and dropout follow from the seed alone: arms of one seed differ in the penalty.

    Parameters
    ----------
    images : tuple[Tensor, Tensor]
        x (N, C, H, W) and labels (N); the network trains on their device.
    classes : int
        K.
    recipe : Recipe
        Network and training.
    method : str
        What the prior is asked of, see :func:`harmonize_lib.priors.training_attributions`; empty trains without.
    weight : float
        Lambda.
    seed : int
        Of initial weights, batches, dropout, references and positions.
    prior : Callable[[Tensor], Tensor]
        Attributions to a scalar.

    Returns
    -------
    nn.Module
        In eval mode.

    References
    ----------
    Erion et al. 2021 (arXiv 1906.10670), equation 1; k = 1, references are the batch rolled by one.

    Notes
    -----
    Departure: one optimizer instead of two in turn, so lambda is tuned anew and cannot be compared with the authors'.
    """
    x, y = images
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # initial weights and dropout
        network = build_network(recipe, x.shape[1:], classes).to(x.device).to(memory_format=torch.channels_last)
        draws = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, recipe.decay)
        for epoch in range(recipe.epochs):
            for index in batches(len(y), recipe.batch_size, epoch, seed):
                loss = F.cross_entropy(network(x[index]), y[index])
                if method:
                    loss = loss + weight * expected_gradients_penalty(
                        network, x[index], y[index], None, prior, method=method, generator=draws
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
    return network.eval()


def flip_pixels(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Salt and pepper: a share of the pixels becomes the darkest or the brightest value, either as likely.

    Parameters
    ----------
    images : Tensor
        (N, C, H, W) in [-0.5, 0.5].
    share : float
        In [0, 1]: expected share of the pixels.
    generator : torch.Generator
        Which pixels.

    Returns
    -------
    Tensor
        Like ``images``.

    References
    ----------
    The authors' MNIST notebook: z ~ N(0, 1); + range where z > t, - range where z < -t, t = Phi^-1(1 - p / 2); clipped.
    """
    if share == 0:
        return images
    z = torch.randn(images.shape, generator=generator).to(images.device)
    threshold = float(norm.ppf(1 - share / 2))
    return (images + (z > threshold).float() - (z < -threshold).float()).clamp(-0.5, 0.5)


def add_gaussian(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Additive Gaussian noise, not clipped.

    Parameters
    ----------
    images : Tensor
        (N, C, H, W) in [-0.5, 0.5].
    sigma : float
        Standard deviation in units of the pixels' range.
    generator : torch.Generator
        The noise.

    Returns
    -------
    Tensor
        Like ``images``.
    """
    return images + sigma * torch.randn(images.shape, generator=generator).to(images.device)


NOISES: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "flipped pixels": flip_pixels,
    "Gaussian noise": add_gaussian,
}


def measure(
    network: nn.Module, data: Pixels, levels: Mapping[str, Sequence[float]], n_shown: int, seed: int
) -> dict[str, Tensor]:
    """What a trained network is worth: accuracy, prior values on validation images, accuracy under noise, maps.

    Parameters
    ----------
    network : nn.Module
        In eval mode.
    data : Pixels
        The images.
    levels : Mapping[str, Sequence[float]]
        Noise, a name of ``NOISES``, to its levels.
    n_shown : int
        Test images whose maps are kept.
    seed : int
        Seed of noise and draws: the same noise for every network.

    Returns
    -------
    dict[str, Tensor]
        ``validation`` accuracy; ``gradients`` and ``expected_gradients``, the pixel prior's value for either; per
        noise the accuracy (levels) on the test images; ``maps`` (n_shown, H, W).
    """
    result = {"validation": accuracy(network, *data.validation)[None]}
    x, y = (part[:500] for part in data.validation)
    for method in ("gradients", "expected_gradients"):
        samples = FRONT_SAMPLES if method == "expected_gradients" else 1
        result[method] = pixel_prior(_maps(network, x, y, x, method, samples, seed))[None]
    for name, disturb in NOISES.items():
        noisy = [disturb(data.test[0], level, torch.Generator().manual_seed(seed)) for level in levels[name]]
        result[name] = torch.stack([accuracy(network, images, data.test[1]) for images in noisy])
    x, y = (part[:n_shown] for part in data.test)
    references = data.train[0][:1000]
    return result | {"maps": _maps(network, x, y, references, "expected_gradients", MAP_SAMPLES, seed)}


def _maps(network: nn.Module, x: Tensor, y: Tensor, references: Tensor, method: str, samples: int, seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    parts = [
        training_attributions(network, rows, targets, references, samples, method, draws).detach().sum(1)
        for rows, targets in zip(x.split(100), y.split(100), strict=True)
    ]
    return torch.cat(parts)


def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Share of images whose class a network gets right.

    Parameters
    ----------
    network : nn.Module
        Gives logits.
    x : Tensor
        (N, C, H, W).
    y : Tensor
        (N).

    Returns
    -------
    Tensor
        Scalar in [0, 1], float64.
    """
    with torch.no_grad():
        predicted = torch.cat([network(rows).argmax(1) for rows in x.split(1000)])
    return (predicted == y).double().mean()


def pixel_study(
    data: Pixels,
    recipe: Recipe,
    weights: Sequence[float],
    seeds: Sequence[int],
    levels: Mapping[str, Sequence[float]],
    n_shown: int,
    device: str = "cpu",
) -> dict[tuple[str, float], dict[str, Tensor]]:
    """Train every arm with every weight and seed; each network's measurements are stored, so a killed run resumes.

    Parameters
    ----------
    data : Pixels
        The images.
    recipe : Recipe
        Network and training.
    weights : Sequence[float]
        Lambdas of both priors.
    seeds : Sequence[int]
        S seeds.
    levels : Mapping[str, Sequence[float]]
        Noise, a name of ``NOISES``, to its levels.
    n_shown : int
        Test images whose maps are kept.
    device : str
        As :func:`harmonize_lib.models.find_device` takes it.

    Returns
    -------
    dict[tuple[str, float], dict[str, Tensor]]
        (arm, lambda) to what :func:`measure` gives, stacked over seeds in front.
    """
    place = find_device(device)
    fixed = {
        "version": VERSION,
        "data": sha256_tensors({"x": data.train[0], "y": data.train[1], "test": data.test[0]}),
        "recipe": sha256_json(list(recipe)),
        "levels": {name: list(values) for name, values in levels.items()},
        "shown": n_shown,
    }
    jobs = [
        (arm, weight, seed)
        for arm, method in ARMS.items()
        for weight in (weights if method else [0.0])
        for seed in seeds
    ]
    train, validation, test = ((x.to(place), y.to(place)) for x, y in (data.train, data.validation, data.test))
    on_device = data._replace(train=train, validation=validation, test=test)
    parts: dict[tuple[str, float], list[dict[str, Tensor]]] = {}
    for arm, weight, seed in tqdm(jobs, desc=f"pixel prior on {data.name}", mininterval=1):
        key = fixed | {"method": ARMS[arm], "weight": weight, "seed": seed}
        compute = partial(_train_and_measure, on_device, recipe, ARMS[arm], weight, seed, levels, n_shown)
        parts.setdefault((arm, weight), []).append(remember("pixel-prior", key, compute))
    return {
        place: {name: torch.stack([part[name] for part in several]) for name in several[0]}
        for place, several in parts.items()
    }


def _train_and_measure(
    data: Pixels,
    recipe: Recipe,
    method: str,
    weight: float,
    seed: int,
    levels: Mapping[str, Sequence[float]],
    n_shown: int,
) -> dict[str, Tensor]:
    network = train_with_prior(data.train, len(data.classes), recipe, method, weight, seed)
    return measure(network, data, levels, n_shown, seed=0)


def front(results: dict[tuple[str, float], dict[str, Tensor]]) -> pd.DataFrame:
    """Prior value and validation accuracy of every arm and weight, mean over seeds.

    Parameters
    ----------
    results : dict[tuple[str, float], dict[str, Tensor]]
        From :func:`pixel_study`.

    Returns
    -------
    pd.DataFrame
        Columns ``arm``, ``weight``, ``prior`` (total variation of standardized expected gradients), ``prior_low``,
        ``prior_high``, ``own`` (of what the arm's prior acts on), ``mean``, ``low``, ``high`` (accuracy), ``n``.
    """
    rows = []
    for (arm, weight), values in results.items():
        prior = t_interval(values["expected_gradients"][:, 0])
        own = values[ARMS[arm] or "expected_gradients"].mean().item()
        rows.append((arm, weight, *prior[:3], own, *t_interval(values["validation"][:, 0])[:4]))
    columns = ["arm", "weight", "prior", "prior_low", "prior_high", "own", "mean", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns)


def choose_weights(table: pd.DataFrame, tolerance: float) -> dict[str, float]:
    """The rule: of the weights that cost at most ``tolerance`` in validation accuracy, the one with the lowest prior.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`front`.
    tolerance : float
        Accuracy that may be lost against the baseline, e.g. 0.01.

    Returns
    -------
    dict[str, float]
        Arm to weight, the baseline's 0 included; NaN where every weight costs more.

    References
    ----------
    Erion et al. 2021 (arXiv 1906.10670), methods: 10 % and, in the supplement, 1 %; there on test accuracy.
    """
    least = table.loc[table["arm"] == "baseline", "mean"].iloc[0] - tolerance
    chosen = {"baseline": 0.0}
    for arm in [name for name in ARMS if name != "baseline"]:
        fit = table[(table["arm"] == arm) & (table["mean"] >= least)]
        chosen[arm] = float(fit.loc[fit["own"].idxmin(), "weight"]) if len(fit) else float("nan")
    return chosen


def in_words(chosen: dict[str, float], tried: Sequence[float]) -> str:
    """Say the chosen weights.

    Parameters
    ----------
    chosen : dict[str, float]
        From :func:`choose_weights`.
    tried : Sequence[float]
        All weights.

    Returns
    -------
    str
        One line.
    """
    ends = {min(tried): ", the smallest tried", max(tried): ", the largest tried"}
    words = {
        arm: "no weight is allowed" if weight != weight else f"λ = {weight:g}{ends.get(weight, '')}"
        for arm, weight in chosen.items()
    }
    return "; ".join(f"{arm}: {word}" for arm, word in words.items() if arm != "baseline")


def robustness(
    results: dict[tuple[str, float], dict[str, Tensor]],
    chosen: dict[str, float],
    levels: Mapping[str, Sequence[float]],
) -> pd.DataFrame:
    """Test accuracy of the chosen networks over noise levels, with intervals over seeds.

    Parameters
    ----------
    results : dict[tuple[str, float], dict[str, Tensor]]
        From :func:`pixel_study`.
    chosen : dict[str, float]
        From :func:`choose_weights`.
    levels : Mapping[str, Sequence[float]]
        Noise to its levels.

    Returns
    -------
    pd.DataFrame
        Columns ``noise``, ``arm``, ``weight``, ``level``, ``mean``, ``low``, ``high``, ``n``.
    """
    rows = []
    for noise in NOISES:
        for arm, weight in chosen.items():
            if (arm, weight) in results:
                values = results[arm, weight][noise]
                for level, column in zip(levels[noise], values.T, strict=True):
                    rows.append((noise, arm, weight, level, *t_interval(column)[:4]))
    return pd.DataFrame(rows, columns=["noise", "arm", "weight", "level", "mean", "low", "high", "n"])


def gain(
    results: dict[tuple[str, float], dict[str, Tensor]],
    chosen: dict[str, float],
    levels: Mapping[str, Sequence[float]],
    noise: str,
    at: Sequence[float],
    against: str = "baseline",
) -> Interval:
    """Accuracy that the prior on expected gradients wins under noise, seed by seed.

    Parameters
    ----------
    results : dict[tuple[str, float], dict[str, Tensor]]
        From :func:`pixel_study`.
    chosen : dict[str, float]
        From :func:`choose_weights`.
    levels : Mapping[str, Sequence[float]]
        Noise to its levels.
    noise : str
        A name of ``NOISES``.
    at : Sequence[float]
        The levels that are averaged.
    against : str
        Another arm.

    Returns
    -------
    Interval
        Paired difference over seeds with its t interval; n = 0 where no weight was allowed or a level is missing.
    """
    pair = _accuracies(results, chosen, levels, noise, at, against)
    return Interval(float("nan"), float("nan"), float("nan"), 0) if pair is None else t_interval(pair[0] - pair[1])


def gain_ratio(
    results: dict[tuple[str, float], dict[str, Tensor]],
    chosen: dict[str, float],
    levels: Mapping[str, Sequence[float]],
    noise: str,
) -> Interval:
    """Accuracy with the prior on expected gradients over the baseline's at the highest level of noise, seed by seed.

    Parameters
    ----------
    results : dict[tuple[str, float], dict[str, Tensor]]
        From :func:`pixel_study`.
    chosen : dict[str, float]
        From :func:`choose_weights`.
    levels : Mapping[str, Sequence[float]]
        Noise to its levels.
    noise : str
        A name of ``NOISES``.

    Returns
    -------
    Interval
        Mean ratio over seeds with its t interval; n = 0 where no weight was allowed.
    """
    pair = _accuracies(results, chosen, levels, noise, [max(levels[noise])], "baseline")
    return Interval(float("nan"), float("nan"), float("nan"), 0) if pair is None else t_interval(pair[0] / pair[1])


def _accuracies(
    results: dict[tuple[str, float], dict[str, Tensor]],
    chosen: dict[str, float],
    levels: Mapping[str, Sequence[float]],
    noise: str,
    at: Sequence[float],
    against: str,
) -> tuple[Tensor, Tensor] | None:
    """Accuracy per seed of our arm and another, mean over levels; None where a weight or a level is missing."""
    places = [list(levels[noise]).index(level) for level in at if level in levels[noise]]
    ours, theirs = (results.get((arm, chosen[arm])) for arm in (OURS, against))
    if len(places) < len(at) or not places or ours is None or theirs is None:
        return None
    return ours[noise][:, places].mean(1), theirs[noise][:, places].mean(1)


def gallery(
    data: Pixels,
    results: dict[tuple[str, float], dict[str, Tensor]],
    chosen: dict[str, float],
) -> tuple[Figure, pd.DataFrame]:
    """Expected gradients of the first test images, one row per arm, first seed.

    Parameters
    ----------
    data : Pixels
        The images.
    results : dict[tuple[str, float], dict[str, Tensor]]
        From :func:`pixel_study`.
    chosen : dict[str, float]
        From :func:`choose_weights`.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure, and the total variation of every map.
    """
    arms = [(arm, weight) for arm, weight in chosen.items() if (arm, weight) in results]
    n = results["baseline", 0.0]["maps"].shape[1]
    pixels = ((data.test[0][:n] + 0.5) * 255).round().byte()
    names = [data.classes[label] for label in data.test[1][:n].tolist()]
    rows = [list(zip(pixels, names, strict=True))]
    table = []
    for arm, weight in arms:
        maps = results[arm, weight]["maps"][0]
        rows.append([(values, "") for values in maps])
        table += [(arm, weight, i, names[i], pixel_prior(maps[i : i + 1]).item()) for i in range(n)]
    figure = plots.gallery(rows, ["image", *(arm.replace(" of ", " of\n") for arm, _ in arms)])
    return figure, pd.DataFrame(table, columns=["arm", "weight", "image", "class", "total_variation"])


def claims_of(
    results: dict[tuple[str, float], dict[str, Tensor]],
    chosen: dict[str, float],
    levels: Mapping[str, Sequence[float]],
) -> dict[str, Interval]:
    """What the ledger asks of the pixel prior.

    Parameters
    ----------
    results : dict[tuple[str, float], dict[str, Tensor]]
        From :func:`pixel_study`.
    chosen : dict[str, float]
        From :func:`choose_weights`.
    levels : Mapping[str, Sequence[float]]
        Noise to its levels.

    Returns
    -------
    dict[str, Interval]
        Claim id to what was measured.
    """
    return {
        "prior_flipped_pixels": gain(results, chosen, levels, "flipped pixels", [0.1]),
        "prior_gaussian_noise": gain_ratio(results, chosen, levels, "Gaussian noise"),
    }


def draw_front(table: pd.DataFrame, chosen: dict[str, float], tolerance: float) -> Figure:
    """The front: what each weight buys in smoothness and costs in accuracy, the chosen weights ringed.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`front`.
    chosen : dict[str, float]
        From :func:`choose_weights`.
    tolerance : float
        Accuracy that may be lost.

    Returns
    -------
    Figure
        The figure.
    """
    figure, ax = plt.subplots(figsize=(5.2, 3.4))
    groups = table.groupby("arm", sort=False)
    for (arm, part), color, lift in zip(groups, sns.color_palette("colorblind"), (0, -9, 4), strict=False):
        ax.errorbar(
            part["prior"],
            part["mean"],
            xerr=[part["prior"] - part["prior_low"], part["prior_high"] - part["prior"]],
            yerr=[part["mean"] - part["low"], part["high"] - part["mean"]],
            fmt="o-",
            ms=3.5,
            lw=1,
            color=color,
            label=arm,
        )
        for row in part.itertuples():
            if row.weight:
                ax.annotate(
                    f"λ = {row.weight:g}", (row.prior, row.mean), (4, lift), textcoords="offset points", fontsize=6
                )
        ring = part[part["weight"] == chosen[str(arm)]]
        ax.plot(ring["prior"], ring["mean"], "o", ms=10, mfc="none", mec=color)
    least = table.loc[table["arm"] == "baseline", "mean"].iloc[0] - tolerance
    ax.axhline(least, color="0.35", ls="--", lw=1, label=f"baseline − {tolerance:g}")
    ax.set(
        title="What smooth maps cost",
        xlabel="total variation of standardized expected gradients",
        ylabel="validation accuracy",
    )
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncol=2, fontsize=7)
    return figure


def draw_robustness(table: pd.DataFrame) -> Figure:
    """Accuracy over both noises, with what the authors reported for MNIST.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`robustness`.

    Returns
    -------
    Figure
        The figure.
    """
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 3.2), sharey=True)
    units = {"flipped pixels": "share of pixels flipped", "Gaussian noise": "σ, share of the pixels' range"}
    for ax, (noise, part) in zip(axes, table.groupby("noise", sort=False), strict=True):
        plots.curves(ax, part, "level", "arm", f"Accuracy under {noise}")
        ax.set(xlabel=units[str(noise)])
    for arm, dash in ((OURS, "--"), ("baseline", ":")):
        axes[0].plot(
            REPORTED_FLIPS["flipped"], REPORTED_FLIPS[arm], color="0.4", ls=dash, lw=1, label=f"reported, MNIST: {arm}"
        )
    axes[0].set(ylabel="test accuracy", ylim=(0, 1.02))
    axes[0].legend(fontsize=6, loc="lower left")
    return figure


def facts(table: pd.DataFrame, chosen: dict[str, float], tolerance: float) -> dict[str, bool]:
    """What must hold for the pixel prior's comparison to mean anything.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`front`.
    chosen : dict[str, float]
        From :func:`choose_weights`.
    tolerance : float
        Accuracy that may be lost.

    Returns
    -------
    dict[str, bool]
        Statement to whether it holds.
    """
    rows = {arm: table[(table["arm"] == arm) & (table["weight"] == weight)] for arm, weight in chosen.items()}
    base, ours = rows["baseline"], rows[OURS]
    return {
        f"pixel prior: each arm has a weight within {tolerance:g} of the baseline's validation accuracy": all(
            len(row) == 1 for row in rows.values()
        ),
        "pixel prior: at the chosen weight, expected gradients are smoother than the baseline's": bool(
            len(ours) and ours["prior_high"].iloc[0] < base["prior_low"].iloc[0]
        ),
    }
