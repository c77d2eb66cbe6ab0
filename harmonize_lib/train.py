"""Recipes of the zoo, and the training that rebuilds any of it."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from harmonize_lib import paths, shapes
from harmonize_lib.data import Dataset, load_dataset
from harmonize_lib.errors import HarmonizeError
from harmonize_lib.models import ARCHITECTURES, Model, find_device
from harmonize_lib.storage import check_folder, sha256_bytes, sha256_json, write_atomic
from harmonize_lib.tasks import in_batches

RECIPES: dict[str, dict[str, Any]] = {
    "resnet": {"learning_rate": 4e-3, "bf16": True},
    "vgg": {"learning_rate": 4e-3, "bf16": True},
    "mobilenet": {"learning_rate": 4e-3, "bf16": False, "train_images": 20_000, "epochs": 4},
    "convnext": {"learning_rate": 1e-3, "bf16": True, "batch_size": 64, "muon": 0.01},
    "vit": {"learning_rate": 2e-3, "bf16": False, "train_images": 64_000, "batch_size": 64, "epochs": 6, "muon": 0.02},
    "swin": {"learning_rate": 2e-3, "bf16": True, "batch_size": 64, "epochs": 8, "muon": 0.02},
    "mobilevit": {"learning_rate": 3e-3, "bf16": False},
}
SCENE_RECIPES = {"vit": {"train_images": 16_000}}  # scenes are learned from fewer images
COMMON = {"train_images": 12_000, "epochs": 5, "batch_size": 128, "weight_decay": 0.05}
MEMORIZE = {"train_images": 1_000, "epochs": 40, "batch_size": 64, "weight_decay": 0.0, "flips": False}
COMMONALITY_OBJECT = shapes.OBJECTS[0]
TEST_IMAGES = 5_000


def parse_name(name: str) -> tuple[str, dict[str, Any], int]:
    """Take a zoo name apart.

    Parameters
    ----------
    name : str
        ``ARCHITECTURE-LABELS[-sSEED]`` with labels ``obj``, ``scene``, ``scene_only``, ``scene_kK`` (one object in
        K of 10 scene classes) or ``random_labels`` (the objects' in a random order, to be memorized), e.g.
        ``vit-obj-s1``, ``resnet-scene_k3``.

    Returns
    -------
    tuple[str, dict[str, Any], int]
        Architecture, options for ``load_dataset``, seed.

    Raises
    ------
    HarmonizeError
        Not such a name.
    """
    match = re.fullmatch(r"([a-z]+)-(obj|scene|scene_only|random_labels|scene_k(\d+))(?:-s(\d+))?", name)
    if match is None or match[1] not in ARCHITECTURES:
        raise HarmonizeError(
            f"{name!r} is no zoo name: write ARCHITECTURE-LABELS[-sSEED], e.g. resnet-obj or vit-scene-s1"
        )
    labels: dict[str, Any] = {"labels": match[2]}
    if match[3] is not None:
        labels = {"labels": "scene", "commonality": int(match[3]), "object": COMMONALITY_OBJECT}
    return match[1], labels, int(match[4] or 0)


def train(name: str, folder: Path = paths.WEIGHTS, device: str = "auto", quiet: bool = False) -> dict[str, Any]:
    """Train one model of the zoo and enter it in the manifest.

    Every epoch leaves a checkpoint; a killed run goes on from the last one and gives the same weights.

    Parameters
    ----------
    name : str
        See ``parse_name``.
    folder : Path
        Where weights (fp16 safetensors) and ``manifest.json`` are written.
    device : str
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    quiet : bool
        No progress bar.

    Returns
    -------
    dict[str, Any]
        The manifest's entry: file, sha256, recipe, accuracy on 5,000 test images with its 95 % interval, command; for
        random labels also ``train_accuracy``, the share of training images memorized.
    """
    architecture, labels, seed = parse_name(name)
    recipe = COMMON | RECIPES[architecture]
    if labels["labels"] == "random_labels":
        recipe |= MEMORIZE
    elif labels["labels"] != "obj":
        recipe |= SCENE_RECIPES.get(architecture, {})
    place = find_device(device)
    check_folder(folder)
    data = replace(load_dataset("shapes-on-scenes", "train", recipe["train_images"], **labels), masks=None, extras={})
    start = time.monotonic()
    torch.manual_seed(seed)  # initial weights and drop path; the order of images has its own generator
    network = ARCHITECTURES[architecture](len(data.classes)).to(memory_format=torch.channels_last).to(place)
    _initialize(network)
    checkpoints = paths.CACHE / "training" / f"{name}-{sha256_json(recipe)[:8]}"
    _fit(network, data, recipe, seed, checkpoints, place, quiet)
    state = {key: _half(value) for key, value in network.state_dict().items()}
    weights = save(state)
    network.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    )
    model = Model(network, name, architecture, data.classes, input_size=(64, 64)).to(place)
    test = load_dataset("shapes-on-scenes", "test", TEST_IMAGES, **labels)
    correct = int((predict(model, test.images) == test.labels).sum())
    interval = binomtest(correct, TEST_IMAGES).proportion_ci(method="wilson")
    entry = {
        "file": f"{name}.safetensors",
        "sha256": sha256_bytes(weights),
        "architecture": architecture,
        "labels": labels,
        "classes": list(data.classes),
        "seed": seed,
        "recipe": recipe,
        "accuracy": correct / TEST_IMAGES,
        "accuracy_low": round(interval.low, 5),
        "accuracy_high": round(interval.high, 5),
        "test_images": TEST_IMAGES,
        "parameters": sum(p.numel() for p in network.parameters()),
        "training_seconds": round(time.monotonic() - start),
        "device": place.type,
        "command": f"harmonize train {name}",
    }
    if labels["labels"] == "random_labels":
        entry["train_accuracy"] = (predict(model, data.images) == data.labels).double().mean().item()
    write_atomic(folder / entry["file"], weights)
    path = folder / "manifest.json"
    paths.CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(paths.CACHE / "manifest.lock"):
        entries = json.loads(path.read_text()) if path.exists() else {}
        entries[name] = entry
        write_atomic(path, json.dumps(dict(sorted(entries.items())), indent=1) + "\n")
    shutil.rmtree(checkpoints)
    return entry


def predict(model: Model, images: Tensor, batch_size: int = 256) -> Tensor:
    """Predicted class of every image.

    Parameters
    ----------
    model : Model
        The model.
    images : Tensor
        (N, C, H, W) uint8.
    batch_size : int
        Images at a time.

    Returns
    -------
    Tensor
        (N) int64.
    """
    with torch.inference_mode():
        parts, _ = in_batches(
            lambda part, _: model(model.preprocess(images[part])).argmax(1).cpu(), len(images), batch_size
        )
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])


def _optimizers(network: nn.Module, recipe: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """AdamW; where the recipe says so, Muon for the matrices inside the network."""
    inner = {
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and "head" not in name
    }
    muon: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        (muon if "muon" in recipe and name in inner else decayed if parameter.ndim > 1 else rest).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=recipe["learning_rate"])]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=recipe["muon"], weight_decay=recipe["weight_decay"]))
    return optimizers


def _initialize(network: nn.Module) -> None:
    """Glorot weights for every linear layer: timm's narrow normal leaves small transformers at chance for long."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)


def _half(value: Tensor) -> Tensor:
    return value.detach().cpu().half().contiguous() if value.is_floating_point() else value.detach().cpu().contiguous()


def _fit(
    network: nn.Module,
    data: Dataset,
    recipe: dict[str, Any],
    seed: int,
    checkpoints: Path,
    device: torch.device,
    quiet: bool,
) -> None:
    """Cross-entropy with random left-right flips, unless the recipe says no; rates rise over the first tenth, then
    fall linearly to zero."""
    steps: int = len(data) // recipe["batch_size"]
    total = steps * recipe["epochs"]
    optimizers = _optimizers(network, recipe)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(10 * (step + 1), total - step) / total)
        for optimizer in optimizers
    ]
    moving: list[Any] = [*optimizers, *schedules]
    checkpoint = checkpoints / "state.pt"
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        network.load_state_dict(saved["network"])
        for part, state in zip(moving, saved["parts"], strict=True):
            part.load_state_dict(state)
        torch.set_rng_state(saved["rng"].cpu())
        first = saved["epoch"] + 1
    network.train()
    for epoch in range(first, recipe["epochs"]):
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(data), generator=generator)[: steps * recipe["batch_size"]]
        flips = torch.rand(len(order), generator=generator) < (0.5 if recipe.get("flips", True) else 0)
        bar = tqdm(
            zip(order.split(recipe["batch_size"]), flips.split(recipe["batch_size"]), strict=True),
            total=steps,
            desc=f"{checkpoints.name} epoch {epoch + 1}/{recipe['epochs']}",
            disable=quiet,
        )
        for index, flip in bar:
            images = torch.where(flip[:, None, None, None], data.images[index].flip(3), data.images[index])
            x = (images.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe["bf16"]):
                logits = network(x)
            loss = F.cross_entropy(logits.float(), data.labels[index].to(device))
            network.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            for part in moving:
                part.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
        checkpoints.mkdir(parents=True, exist_ok=True)
        partial = checkpoint.with_suffix(".partial")
        torch.save(
            {
                "network": network.state_dict(),
                "parts": [part.state_dict() for part in moving],
                "rng": torch.get_rng_state(),
                "epoch": epoch,
            },
            partial,
        )
        partial.replace(checkpoint)
    network.eval()
