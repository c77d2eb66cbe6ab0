"""What the notebooks share: their start, maps from the store, recognition, and saving figures."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from harmonize_lib import parameters, paths, plots, provenance
from harmonize_lib.attribution import METHODS, explain, refusal
from harmonize_lib.data import Dataset, load_dataset
from harmonize_lib.errors import HarmonizeError
from harmonize_lib.features import feature_image, mean_color
from harmonize_lib.models import LOADED, Model, list_models, load_model, manifest
from harmonize_lib.statistics import bootstrap_interval
from harmonize_lib.storage import remember, sha256_tensors, stored_at
from harmonize_lib.train import predict
from harmonize_lib.transfer import TRANSFER_SCHEMA, long_table, recognize

CHUNK = 50  # images per stored shard
RECOGNITION_VERSION = 1


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
        The images explained; None for a notebook that makes its own.
    models : dict[str, Model]
        The models compared, by name: the spec without its settings; empty for a notebook that trains its own.
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
    torch.set_num_threads(1)  # sums split over threads round differently, and what is stored is read by other runs
    provenance.check_injection()
    plots.style()
    started = time.monotonic()
    figures = Path(settings.output).expanduser() if settings.output else paths.FIGURES
    dataset: Any = None
    if hasattr(settings, "dataset"):
        dataset = load_dataset(settings.dataset, "test", settings.n_images, settings.seed)
    LOADED.clear()
    loaded = [load_model(spec, device=settings.device) for spec in getattr(settings, "models", [])]
    models = {model.name: model for model in loaded}
    if len(models) < len(loaded):
        raise HarmonizeError(
            f"models name the same network twice, give each once: {', '.join(model.name for model in loaded)}"[:200]
        )
    for model in loaded:
        check_classes(model, dataset)
    provenance.stamp_outputs(parameters.recorded(settings))
    return Run(notebook, settings, dataset, models, figures / notebook, started)


def check_classes(model: Model, dataset: Dataset) -> None:
    """Refuse a model that names other classes than the data.

    Parameters
    ----------
    model : Model
        The model.
    dataset : Dataset
        The data.

    Raises
    ------
    HarmonizeError
        They differ.
    """
    if tuple(model.classes) != tuple(dataset.classes):
        known, asked = (f"{len(names)} ({names[0][:20]}, ...)" for names in (model.classes, dataset.classes))
        line = f"model {model.name[:40]!r} knows other classes, {known}, than {dataset.name[:40]} has, {asked}"
        raise HarmonizeError(f"{line}: take models of the same labels")


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


def explained(settings: Any, dataset: Dataset) -> list[tuple[str, Dataset]]:
    """What a notebook explains by its methods: every model, for the images as they are.

    Parameters
    ----------
    settings : Any
        Checked parameters of a notebook that extracts maps.
    dataset : Dataset
        Its images.

    Returns
    -------
    list[tuple[str, Dataset]]
        Models as ``load_model`` takes them, each with the images it is shown and the labels explained.
    """
    return [(spec, dataset) for spec in settings.models]


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
    parts = [
        remember("attribution", key, partial(_explain, model, images, targets, method, seed, options))
        for key, images, targets in _shards(model, dataset, method, seed, options)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _shards(
    model: Model, dataset: Dataset, method: str, seed: int, options: dict[str, Any]
) -> Iterator[tuple[dict[str, object], Tensor, Tensor]]:
    """Key in the store, images and targets of each shard."""
    for index in torch.arange(len(dataset)).split(CHUNK):
        images, targets = dataset.images[index], dataset.labels[index]
        key = {
            "model": model.identity,
            "images": sha256_tensors({"images": images, "targets": targets}),
            "method": method,
            "version": METHODS[method].version,
            "options": options,
            "seed": seed,
        }
        yield key, images, targets


def missing_shards(model: Model, dataset: Dataset, method: str, seed: int = 0, **options: Any) -> dict[int, Path]:
    """Shards of the maps of one model by one method that are not in the store.

    Parameters
    ----------
    model : Model
        The model explained.
    dataset : Dataset
        N images; shard i holds the images from ``CHUNK`` * i on.
    method : str
        A method that is defined for the model.
    seed : int
        Seed of the method's randomness.
    **options : Any
        Options of the method.

    Returns
    -------
    dict[int, Path]
        Numbers of the shards, and where the store will keep them.
    """
    shards = enumerate(_shards(model, dataset, method, seed, options))
    places = {i: stored_at("attribution", key) for i, (key, _, _) in shards}
    return {i: place for i, place in places.items() if not place.exists()}


def _explain(
    model: Model, images: Tensor, targets: Tensor, method: str, seed: int, options: dict[str, Any]
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    result = explain(model, images, targets, method, generator, **options)
    n = len(images)
    nothing = torch.full((n,), float("nan"))
    relative = result.record["relative_gap"]
    steps = result.record["steps"]
    return {
        "maps": result.maps,
        "logit": result.logit.cpu(),
        "probability": result.probability.cpu(),
        "gap": nothing.clone() if relative is None else torch.tensor(relative),
        "steps": nothing if steps is None else torch.as_tensor(steps, dtype=torch.float32).expand(n).clone(),
        "seconds": torch.full((n,), result.record["seconds"] / n),
    }


def cost_estimate(
    models: Mapping[str, Model],
    dataset: Dataset,
    methods: Iterable[str],
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    probe: int = 2,
) -> pd.DataFrame:
    """Seconds that attributions which are not in the store will take, from explaining a few images.

    Parameters
    ----------
    models : Mapping[str, Model]
        Models by name.
    dataset : Dataset
        N images.
    methods : Iterable[str]
        Attribution methods; those a model refuses cost nothing.
    seed : int
        Seed of the methods' randomness.
    options : Mapping[str, Mapping[str, Any]] | None
        Method to its options.
    probe : int
        Images tried for each model and method.

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``method``, ``images`` still to explain, ``seconds`` they will take. Small probes waste
        room in a pass, so the estimate errs upward.
    """
    rows = []
    jobs = [(name, method) for name in models for method in methods if refusal(models[name], method) is None]
    for name, method in tqdm(jobs, desc="cost estimate", mininterval=1, leave=False):
        chosen = dict((options or {}).get(method, {}))
        shards = _shards(models[name], dataset, method, seed, chosen)
        missing = sum(len(targets) for key, _, targets in shards if not stored_at("attribution", key).exists())
        seconds = 0.0
        if missing:
            few = slice(0, probe)
            result = explain(models[name], dataset.images[few], dataset.labels[few], method, **chosen)
            seconds = result.record["seconds"] / len(result.maps) * missing
        rows.append((name, method, missing, seconds))
    return pd.DataFrame(rows, columns=["model", "method", "images", "seconds"])


def introduce(run: Run) -> None:
    """Say what will be explained, whether the models know the images, and what it will cost.

    Parameters
    ----------
    run : Run
        The run.
    """
    estimate = cost_estimate(run.models, run.dataset, run.settings.methods, run.settings.seed, run.settings.options)
    todo, seconds = estimate["images"].sum(), estimate["seconds"].sum()
    print(
        f"{len(run.dataset)} images of {run.dataset.name}, {len(run.models)} models, "
        f"{len(run.settings.methods)} methods: "
        f"{todo} maps are not stored and will take about {seconds:.0f} s"
    )
    for name, model in run.models.items():
        accuracy = (predictions(model, run.dataset.images) == run.dataset.labels).double().mean()
        print(f"{name} ({model.family}): accuracy {accuracy:.3f} on the whole images")


def all_maps(
    models: Mapping[str, Model],
    dataset: Dataset,
    methods: Iterable[str],
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[tuple[str, str], Tensor]:
    """Maps of every model by every method that is defined for it.

    Parameters
    ----------
    models : Mapping[str, Model]
        Models by name.
    dataset : Dataset
        N images.
    methods : Iterable[str]
        Attribution methods; those a model refuses are left out for that model.
    seed : int
        Seed of the methods' randomness.
    options : Mapping[str, Mapping[str, Any]] | None
        Method to its options.

    Returns
    -------
    dict[tuple[str, str], Tensor]
        (model, method) to maps (N, H, W).
    """
    jobs = [(name, method) for name in models for method in methods if refusal(models[name], method) is None]
    maps = {}
    for name, method in tqdm(jobs, desc="attributions", mininterval=1):
        chosen = (options or {}).get(method, {})
        maps[name, method] = attributions(models[name], dataset, method, seed, **chosen)["maps"]
    return maps


def recognition_table(
    run: Run,
    maps: Mapping[tuple[str, str], Tensor],
    targets: Mapping[str, Model],
    fractions: Sequence[float],
    complement: bool = False,
    dataset: Dataset | None = None,
) -> pd.DataFrame:
    """Show features to models, as ``transfer.recognition`` does, keeping what was computed in the store.

    Parameters
    ----------
    run : Run
        Gives patch, fill, seed and images.
    maps : Mapping[tuple[str, str], Tensor]
        (source, method) to maps (N, H, W).
    targets : Mapping[str, Model]
        The models that look.
    fractions : Sequence[float]
        Shares of the patches.
    complement : bool
        Show the non-feature images instead of the feature images.
    dataset : Dataset | None
        Other images with the same labels; None takes the run's.

    Returns
    -------
    pd.DataFrame
        ``transfer.TRANSFER_SCHEMA``.
    """
    settings, dataset = run.settings, dataset or run.dataset
    images = sha256_tensors({"images": dataset.images, "labels": dataset.labels})
    fixed = {
        "version": RECOGNITION_VERSION,
        "images": images,
        "fractions": list(fractions),
        "patch": settings.patch,
        "fill": getattr(settings, "fill", "mean"),
        "complement": complement,
        "seed": settings.seed,
    }
    correct, probability = [], []
    for values in tqdm(maps.values(), desc="recognition", mininterval=1):
        key = fixed | {"maps": sha256_tensors({"maps": values})}
        parts = [
            remember(
                "recognition",
                key | {"model": model.identity},
                partial(
                    _recognize,
                    model,
                    dataset,
                    values,
                    fractions,
                    settings.patch,
                    key["fill"],
                    complement,
                    settings.seed,
                ),
            )
            for model in targets.values()
        ]
        correct.append(torch.stack([part["correct"] for part in parts], 2).numpy())
        probability.append(torch.stack([part["probability"] for part in parts], 2).numpy())
    table = long_table(
        list(maps), fractions, [complement], list(targets), dataset.ids, np.stack(correct), np.stack(probability)
    )
    return TRANSFER_SCHEMA.validate(table)


def _recognize(
    model: Model,
    dataset: Dataset,
    maps: Tensor,
    fractions: Sequence[float],
    patch: int,
    fill: str,
    complement: bool,
    seed: int,
) -> dict[str, Tensor]:
    correct, probability = recognize({"": model}, dataset, maps, fractions, patch, fill, [complement], seed)
    return {"correct": torch.from_numpy(correct[:, :, 0]), "probability": torch.from_numpy(probability[:, :, 0])}


def masked_accuracy(run: Run) -> pd.DataFrame:
    """What models see of the object alone, everything else filled with the data's mean color.

    Parameters
    ----------
    run : Run
        The run; its data set has masks.

    Returns
    -------
    pd.DataFrame
        Columns ``source`` (``object_alone``), ``target``, ``image``, ``correct``.

    Raises
    ------
    HarmonizeError
        The data set has no masks.
    """
    data = run.dataset
    if data.masks is None:
        raise HarmonizeError(f"{data.name} has no masks: what models see of the object alone cannot be asked")
    images = feature_image(data.images, data.masks, "mean", mean_color(data.images))
    parts = [
        pd.DataFrame(
            {
                "source": "object_alone",
                "target": name,
                "image": data.ids,
                "correct": (predictions(model, images) == data.labels).numpy(),
            }
        )
        for name, model in run.models.items()
    ]
    return pd.concat(parts, ignore_index=True)


def controls(run: Run) -> dict[tuple[str, str], Tensor]:
    """Maps that know nothing of any model: random patches, the center, edges, and the object's exact mask.

    Parameters
    ----------
    run : Run
        Gives images, masks, seed and options.

    Returns
    -------
    dict[tuple[str, str], Tensor]
        ``(name, "control")`` to maps (N, H, W); the object mask only where masks are known.
    """
    model, options = next(iter(run.models.values())), getattr(run.settings, "options", {})
    maps = {
        (name, "control"): attributions(model, run.dataset, name, run.settings.seed, **options.get(name, {}))["maps"]
        for name in parameters.CONTROLS
    }
    if run.dataset.masks is not None:
        maps["object_mask", "control"] = run.dataset.masks.float()
    return maps


def save(run: Run, figure: Figure, table: pd.DataFrame, name: str, timed: bool = False) -> None:
    """Save a figure of the run with its numbers and provenance.

    Parameters
    ----------
    run : Run
        The run.
    figure : Figure
        The figure.
    table : pd.DataFrame
        Its numbers.
    name : str
        Its name.
    timed : bool
        The table holds measured seconds: verification and comparison of runs then know that it never repeats.
    """
    weights = LOADED | {key: model.weights_hash for key, model in run.models.items()}
    values = parameters.recorded(run.settings)
    code = provenance.code_hash(provenance.executed())
    seconds = time.monotonic() - run.started
    plots.save_figure(figure, table, run.folder, name, values, weights, seconds, code, timed)


def predictions(model: Model, images: Tensor) -> Tensor:
    """Predicted classes, computed once and kept in the store.

    Parameters
    ----------
    model : Model
        The model.
    images : Tensor
        (N, C, H, W) uint8.

    Returns
    -------
    Tensor
        (N) int64.
    """
    key = {"model": model.identity, "images": sha256_tensors({"images": images})}
    return remember("prediction", key, lambda: {"predicted": predict(model, images)})["predicted"]


def zoo_accuracy(architectures: Sequence[str], n: int, seed: int = 0, device: str = "auto") -> pd.DataFrame:
    """Test accuracy of every model of the zoo that has one of these architectures and was trained to generalize.

    Parameters
    ----------
    architectures : Sequence[str]
        E.g. ``["resnet", "vit"]``.
    n : int
        Test images.
    seed : int
        Seed of the bootstrap.
    device : str
        Where the models run.

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``architecture``, ``task`` (labels and seed), ``mean``, ``low``, ``high``, ``n``.
    """
    rows = []
    for name, entry in tqdm(manifest().items(), desc="accuracy"):
        general = "commonality" not in entry["labels"] and entry["labels"]["labels"] != "random_labels"
        if entry["architecture"] in architectures and general:
            data = load_dataset("shapes-on-scenes", "test", n, **entry["labels"])
            correct = predictions(load_model(name, device=device), data.images) == data.labels
            task = name.removeprefix(entry["architecture"] + "-")
            rows.append((name, entry["architecture"], task, *bootstrap_interval(correct.double().numpy(), seed)[:4]))
    return pd.DataFrame(rows, columns=["model", "architecture", "task", "mean", "low", "high", "n"])


def counterfactual_accuracy(models: Mapping[str, Model], dataset: Dataset, seed: int = 0) -> pd.DataFrame:
    """How often models still give the label when the object is there, is moved, or is gone.

    Parameters
    ----------
    models : Mapping[str, Model]
        Models by name, trained for objects or for scenes.
    dataset : Dataset
        shapes-on-scenes images.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``image`` (with object, object moved, without object), ``mean``, ``low``, ``high``, ``n``.
    """
    shown = {
        "with object": dataset.images,
        "object moved": dataset.extras["moved_object"],
        "without object": dataset.extras["without_object"],
    }
    rows = []
    for name, model in models.items():
        truth = dataset.extras["object_labels" if "-obj" in name else "scene_labels"]
        for kind, images in shown.items():
            correct = (predictions(model, images) == truth).double().numpy()
            rows.append((name, kind, *bootstrap_interval(correct, seed)[:4]))
    return pd.DataFrame(rows, columns=["model", "image", "mean", "low", "high", "n"])
