"""Data sets by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmonize_lib import shapes
from harmonize_lib.bam_data import read_bam
from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.images import IMAGE_ENDINGS, Dataset, read_image
from harmonize_lib.tasks import check_numbers

LABELS = ("obj", "scene", "scene_only", "random_labels")
TEST_SIZE = 10_000
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}


def check_name(name: str) -> None:
    """Refuse what ``load_dataset`` cannot know, without loading anything.

    Parameters
    ----------
    name : str
        See :func:`load_dataset`.

    Raises
    ------
    HarmonizeError
        Unknown kind, no folder where one is needed, or one where none is.
    """
    kind, colon, folder = name.partition(":")
    if kind not in LOADERS:
        raise unknown("dataset", kind, LOADERS)
    if kind != "shapes-on-scenes" and not folder:
        raise HarmonizeError(f"dataset {kind!r} needs a folder: write '{kind}:DIR'")
    if kind == "shapes-on-scenes" and colon:
        raise HarmonizeError(
            f"dataset {name[:60]!r}: shapes-on-scenes is drawn, not read from a folder: leave the colon out"
        )


def load_dataset(name: str, split: str = "test", n: int | None = None, seed: int = 0, **options: object) -> Dataset:
    """Load a data set by name.

    Parameters
    ----------
    name : str
        ``"shapes-on-scenes"`` (options ``labels="obj" | "scene" | "scene_only" | "random_labels"``, the last those of
        objects in a random order; ``commonality=k`` with ``object=name``: that object in the first k of 10 scene
        classes, nothing in the others),
        ``"imagefolder:DIR"`` (option ``size``: side of the common center crop, default 224),
        ``"bam:DIR"`` (the published BAM folders; options ``labels`` but the last, ``size``: side to resize to,
        ``prefix`` of the file names), or
        ``"mnist:DIR"``, ``"fashion-mnist:DIR"``, ``"cifar10:DIR"`` (option ``download``).
    split : str
        ``"train"``, ``"val"`` or ``"test"``. An image folder has one split; MNIST and its kin have no ``"val"``;
        BAM's ``"test"`` is its ``"val"``.
    n : int | None
        How many images; None takes all (10,000 of shapes-on-scenes).
    seed : int
        shapes-on-scenes: seed of the generator. Others: order in which images are taken when n is given.
    **options : object
        See ``name``.

    Returns
    -------
    Dataset
        The record.

    Raises
    ------
    HarmonizeError
        Unknown name, split or option; n < 1 or beyond the set; seed < 0; a class without images; a file that is not
        an image.

    Warns
    -----
    UserWarning
        An image folder holds files of other endings than images have; they are left out.
    """
    check_name(name)
    kind = name.partition(":")[0]
    if split not in shapes.SPLITS:
        raise unknown("split", split, shapes.SPLITS)
    if n is not None:
        check_numbers(1, n=n)
    check_numbers(0, seed=seed)
    allowed = {
        "shapes-on-scenes": {"labels", "commonality", "object"},
        "imagefolder": {"size"},
        "bam": {"labels", "size", "prefix"},
    }.get(kind, {"download"})
    for option in options:
        if option not in allowed:
            raise unknown(f"option of dataset {kind}", option, allowed)
    dataset = LOADERS[kind](name, split, n, seed, **options)
    wrong = n is not None and len(dataset) != n
    if wrong or not len(dataset) == len(dataset.images) == len(dataset.ids) == len(set(dataset.ids)):
        raise _fewer(name, len(dataset), n)
    return dataset


def _fewer(place: str, there: int, n: int | None) -> HarmonizeError:
    line = f"{place[-60:]} holds {there} images, not the {n} asked for"
    return HarmonizeError(f"{line}: give fewer (n, --n or n_images)")


def _shapes_on_scenes(
    name: str,
    split: str,
    n: int | None,
    seed: int,
    labels: str = "obj",
    commonality: int | None = None,
    object: str | None = None,
) -> Dataset:
    if labels not in LABELS:
        raise unknown("labels", labels, LABELS)
    if (commonality is None) != (object is None):
        raise HarmonizeError("commonality and object go together: give both or neither")
    if object is not None and object not in shapes.OBJECTS:
        raise unknown("object", object, shapes.OBJECTS)
    if commonality is not None and not 0 <= commonality <= 10:
        raise HarmonizeError(f"commonality must lie in 0..10 scene classes, not {commonality}")
    n = n or TEST_SIZE
    chosen = None if object is None else shapes.OBJECTS.index(object)
    blocks = [shapes.draw_block(seed, split, i, chosen) for i in range(-(-n // shapes.BLOCK))]
    with_object, without, moved, mask, moved_mask, object_labels, scene_labels = (
        np.concatenate(parts)[:n] for parts in zip(*blocks, strict=True)
    )
    if commonality is not None:
        bare = scene_labels >= commonality
        with_object[bare], moved[bare] = without[bare], without[bare]
        mask[bare], moved_mask[bare] = False, False
    if labels == "scene_only":
        with_object, mask = without, np.zeros_like(mask)
    by_scene = labels.startswith("scene") or commonality is not None
    given = scene_labels if by_scene else object_labels
    if labels == "random_labels":
        given = np.random.default_rng([seed, n]).permutation(object_labels)

    def channels_first(images: np.ndarray) -> Tensor:
        return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

    return Dataset(
        images=channels_first(with_object),
        labels=torch.from_numpy(given),
        classes=tuple(shapes.SCENES) if by_scene else shapes.OBJECTS,
        masks=torch.from_numpy(mask),
        ids=tuple(f"{split}-{seed}-{i:06d}" for i in range(n)),
        name=name,
        extras={
            "object_labels": torch.from_numpy(object_labels),
            "scene_labels": torch.from_numpy(scene_labels),
            "without_object": channels_first(without),
            "moved_object": channels_first(moved),
            "moved_masks": torch.from_numpy(moved_mask),
            "boxes": _boxes(torch.from_numpy(mask)),
        },
    )


def _boxes(masks: Tensor) -> Tensor:
    """Bounding boxes (N, 4) of masks (N, H, W): left, top, right, bottom; zeros where a mask is empty."""
    rows, columns = masks.any(2).int(), masks.any(1).int()
    edges = [
        columns.argmax(1),
        rows.argmax(1),
        masks.shape[2] - columns.flip(1).argmax(1),
        masks.shape[1] - rows.flip(1).argmax(1),
    ]
    return torch.stack(edges, 1) * masks.any((1, 2))[:, None]


def imagenet_index(wordnet_ids: list[str]) -> list[int]:
    """ImageNet-1k class index of WordNet ids, from timm's own table.

    Parameters
    ----------
    wordnet_ids : list[str]
        Such as ``["n01440764"]``.

    Returns
    -------
    list[int]
        Indices 0..999.

    Raises
    ------
    HarmonizeError
        An id that is no ImageNet-1k class.
    """
    from timm.data import ImageNetInfo

    table = {name: i for i, name in enumerate(ImageNetInfo().label_names())}
    for wordnet_id in wordnet_ids:
        if wordnet_id not in table:
            raise HarmonizeError(f"folder {wordnet_id!r} is no ImageNet-1k class: WordNet ids look like n01440764")
    return [table[wordnet_id] for wordnet_id in wordnet_ids]


def _imagefolder(name: str, split: str, n: int | None, seed: int, size: int = 224) -> Dataset:
    root = Path(name.partition(":")[2]).expanduser()
    place = str(root)[-80:]
    if not root.is_dir():
        raise HarmonizeError(f"{place}: no such folder; 'imagefolder:DIR' wants one folder per class inside DIR")
    root = root / split if (root / split).is_dir() else root
    folders = [path for path in _visible(root) if path.is_dir()]
    inside = [(path, label) for label, folder in enumerate(folders) for path in _visible(folder)]
    files = [(path, label) for path, label in inside if path.suffix.lower() in IMAGE_ENDINGS]
    if not files:
        raise HarmonizeError(f"{place}: no images; 'imagefolder:DIR' wants one folder of images per class inside DIR")
    if bare := sorted(set(range(len(folders))) - {label for _, label in files}):
        line = f"{str(folders[bare[0]])[-80:]}: no images in this class ({', '.join(IMAGE_ENDINGS)})"
        raise HarmonizeError(f"{line}: add some, or remove the folder")
    if len(files) < len(inside):
        other = sorted({path.suffix or path.name for path, _ in inside if path.suffix.lower() not in IMAGE_ENDINGS})
        line = f"{len(inside) - len(files)} ({', '.join(other[:5])})"
        warnings.warn(f"{place}: files left out, because they are no images: {line}", stacklevel=3)
    if n is not None:
        if n > len(files):
            raise _fewer(str(root), len(files), n)
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:n].sort().values
        files = [files[i] for i in order.tolist()]
    names = [folder.name for folder in folders]
    labels = torch.tensor([label for _, label in files])
    if all(len(folder) == 9 and folder[0] == "n" and folder[1:].isdigit() for folder in names):
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        labels = torch.tensor(imagenet_index(names))[labels]
        names = [info.index_to_description(i) for i in range(info.num_classes())]
    return Dataset(
        images=torch.stack([read_image(path, size) for path, _ in files]),
        labels=labels,
        classes=tuple(names),
        masks=None,
        ids=tuple(path.relative_to(root).as_posix() for path, _ in files),
        name=f"imagefolder:{root.name}",
    )


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _bam(name: str, split: str, n: int | None, seed: int, **options: Any) -> Dataset:
    return read_bam(Path(name.partition(":")[2]).expanduser(), split, n, seed, **options)


def _torchvision(name: str, split: str, n: int | None, seed: int, download: bool = False) -> Dataset:
    import torchvision

    kind, _, folder = name.partition(":")
    if split == "val":
        raise HarmonizeError(f"{kind} has the splits train and test, not val")
    try:
        source = getattr(torchvision.datasets, TORCHVISION[kind])(folder, train=split == "train", download=download)
    except (RuntimeError, OSError) as error:
        line = f"{kind} at {folder[-40:]}: not found or damaged; give the folder that holds it"
        raise HarmonizeError(f"{line} (in Python, load_dataset('{kind}:DIR', download=True) fetches it)") from error
    pixels = torch.as_tensor(source.data)
    images = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(source.targets)
    order = torch.arange(len(labels))
    if n is not None:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:n]
    return Dataset(
        images=images[order],
        labels=labels[order],
        classes=tuple(source.classes),
        masks=None,
        ids=tuple(f"{split}-{i:06d}" for i in order.tolist()),
        name=kind,
    )


LOADERS: dict[str, Callable[..., Dataset]] = {
    "shapes-on-scenes": _shapes_on_scenes,
    "imagefolder": _imagefolder,
    "bam": _bam,
    **dict.fromkeys(TORCHVISION, _torchvision),
}
