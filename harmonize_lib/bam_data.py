"""The published BAM folders: reading them, and building them from COCO instances and scene folders."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm.std import tqdm

from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.images import IMAGE_ENDINGS, Dataset, read_image

LABELS = ("obj", "scene", "scene_only")
OBJECTS = ("backpack", "bird", "dog", "elephant", "kite", "pizza", "stop_sign", "toilet", "truck", "zebra")
SCENES = (
    "bamboo_forest",
    "bedroom",
    "bowling_alley",
    "bus_interior",
    "cockpit",
    "corn_field",
    "laundromat",
    "runway",
    "ski_slope",
    "track",
)
SUBSETS = {"dog_bedroom": ("scene", "dog-bedroom-"), "bamboo_forest": ("scene_only", "dog-bamboo_forest-")}
LEAST_SIDE = 16  # pixels of an object's longer side: smaller ones would be blown up beyond recognition


class Cut(NamedTuple):
    """An object cut out of its photograph: RGBA picture, and the mask (h, w) uint8 that is stored beside it."""

    picture: Image.Image
    mask: NDArray[np.uint8]


def read_bam(
    root: Path,
    split: str,
    n: int | None,
    seed: int,
    labels: str = "obj",
    size: int | None = None,
    prefix: str = "",
) -> Dataset:
    """Read the folders that BAM's builder writes; ``load_dataset("bam:DIR")`` calls this.

    Parameters
    ----------
    root : Path
        Folder that holds ``obj``, ``scene`` and ``scene_only``.
    split : str
        ``"train"``, or ``"val"`` and ``"test"``, which both are the published validation set.
    n : int | None
        How many images, drawn without replacement and kept in the order of their names; None takes all.
    seed : int
        Of that draw.
    labels : str
        ``"obj"``, ``"scene"`` or ``"scene_only"``.
    size : int | None
        Side to which images (bilinear), boxes and masks are brought; None keeps the files' own size.
    prefix : str
        Only images whose names begin so: ``"dog-bedroom-"`` gives BAM's ``dog_bedroom``.

    Returns
    -------
    Dataset
        ``masks`` in the validation set alone (empty for ``scene_only``); ``extras`` with ``object_labels``,
        ``scene_labels``, ``without_object`` and ``boxes`` (left, top, right, bottom). For ``scene_only`` labels the
        images are those without object.

    Raises
    ------
    HarmonizeError
        A folder, list, image or mask that is missing or does not fit; n beyond the set.

    References
    ----------
    Yang, Kim 2019 (arXiv 1907.09701), public code: ``val.txt`` (name label), ``loc.txt`` and ``val_loc.txt`` (name
    top,left,bottom,right), ``val_mask`` (one cut mask per object and validation index, stretched over the box).
    """
    if labels not in LABELS:
        raise unknown("labels", labels, LABELS)
    if size is not None and size < 1:
        raise HarmonizeError(f"size must be at least 1 pixel, not {size}")
    for name in LABELS:
        if not (root / name / "train").is_dir() and not (root / name / "val").is_dir():
            raise HarmonizeError(f"{root}: no folder {name}/ with train/ or val/: 'bam:DIR' wants the published layout")
    files = _train_files(root) if split == "train" else _validation_files(root)
    objects, scenes = (tuple(sorted({_parts(name).of(kind) for name in files})) for kind in ("obj", "scene"))
    object_classes, scene_classes = (
        _class_folders(root / "obj", objects),
        _class_folders(root / "scene", scenes),
    )
    order = {index: place for place, index in enumerate(sorted({_parts(name).number for name in files}))}
    names = sorted(name for name in files if name.startswith(prefix))
    if len(names) < (n or 1):
        raise HarmonizeError(
            f"{root}: {n or 1} images asked for, {len(names)} in the {split} set begin with {prefix!r}: ask for fewer"
        )
    if n is not None:
        draw = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:n].sort().values
        names = [names[i] for i in draw.tolist()]
    places = _locations(root / "obj" / ("loc.txt" if split == "train" else "val_loc.txt"))
    with_object, boxes = _pictures([files[name]["scene"] for name in names], size, [places.get(n) for n in names])
    without, _ = _pictures([files[name]["scene_only"] for name in names], size, [None] * len(names))
    if with_object.shape != without.shape:
        raise HarmonizeError(f"{root}: scene/ and scene_only/ hold images of different sizes: build them together")
    object_labels = torch.tensor([object_classes.index(_parts(name).object) for name in names])
    scene_labels = torch.tensor([scene_classes.index(_parts(name).scene) for name in names])
    masks = None
    if split != "train":
        cuts = _read_masks(root / "obj" / "val_mask")
        if len(cuts) != len(object_classes) * len(order):
            raise HarmonizeError(
                f"{root}/obj/val_mask: {len(cuts)} masks, {len(object_classes) * len(order)} wanted, one per object "
                "and validation index"
            )
        chosen = [
            cuts[object_classes.index(_parts(name).object) * len(order) + order[_parts(name).number]] for name in names
        ]
        masks = _place(chosen, boxes, with_object.shape[-2:])
    bare = labels == "scene_only"
    return Dataset(
        images=without if bare else with_object,
        labels=object_labels if labels == "obj" else scene_labels,
        classes=object_classes if labels == "obj" else scene_classes,
        masks=torch.zeros_like(masks) if bare and masks is not None else masks,
        ids=tuple(names),
        name=f"bam:{root.name}",
        extras={
            "object_labels": object_labels,
            "scene_labels": scene_labels,
            "without_object": without,
            "boxes": boxes,
        },
    )


class Name(NamedTuple):
    """What a file name such as ``dog-bedroom-0900.jpg`` tells."""

    object: str
    scene: str
    number: int

    def of(self, labels: str) -> str:
        """The class by these labels."""
        return self.object if labels == "obj" else self.scene


def _parts(name: str) -> Name:
    words = Path(name).stem.split("-")
    if len(words) != 3 or not words[2].isdigit():
        raise HarmonizeError(f"{name}: BAM's images are named OBJECT-SCENE-NUMBER.jpg, e.g. dog-bedroom-0900.jpg")
    return Name(words[0], words[1], int(words[2]))


def _class_folders(folder: Path, seen: tuple[str, ...]) -> tuple[str, ...]:
    """The classes: folders of the training set where there is one, else what the names tell."""
    train = folder / "train"
    known = tuple(sorted(path.name for path in train.iterdir() if path.is_dir())) if train.is_dir() else ()
    for name in seen:
        if known and name not in known:
            raise HarmonizeError(f"{train}: no folder for class {name!r}, which other images show: complete the set")
    return known or seen


def _train_files(root: Path) -> dict[str, dict[str, Path]]:
    files: dict[str, dict[str, Path]] = {}
    for path in sorted((root / "scene" / "train").glob("*/*.jpg")):
        pair = {"scene": path, "scene_only": root / "scene_only" / "train" / path.parent.name / path.name}
        files[path.name] = pair
    return _there(files, root)


def _validation_files(root: Path) -> dict[str, dict[str, Path]]:
    listed = {}
    for labels in ("obj", "scene", "scene_only"):
        lines = _lines(root / labels / "val.txt")
        classes = _class_folders(root / labels, tuple(sorted({_parts(n).of(labels) for n, _ in lines})))
        for name, label in lines:
            if not label.isdigit() or int(label) >= len(classes) or classes[int(label)] != _parts(name).of(labels):
                raise HarmonizeError(f"{root}/{labels}/val.txt: label {label!r} of {name} is not its class's place")
        listed[labels] = {name for name, _ in lines}
    if not listed["obj"] == listed["scene"] == listed["scene_only"]:
        odd = sorted((listed["obj"] ^ listed["scene"]) | (listed["scene"] ^ listed["scene_only"]))[0]
        raise HarmonizeError(f"{root}: {odd} is not in val.txt of all of obj, scene, scene_only: complete the set")
    files = {name: {k: root / k / "val" / name for k in ("scene", "scene_only")} for name in listed["scene"]}
    return _there(files, root)


def _there(files: dict[str, dict[str, Path]], root: Path) -> dict[str, dict[str, Path]]:
    if not files:
        raise HarmonizeError(f"{root}: no images in this split: 'bam:DIR' wants the published layout")
    for pair in files.values():
        for path in pair.values():
            if not path.is_file():
                raise HarmonizeError(f"{path}: missing; restore the image or build the set again")
    return files


def _lines(path: Path) -> list[tuple[str, str]]:
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise HarmonizeError(f"{path}: missing; the published layout has it") from error
    for words in lines:
        if len(words) != 2:
            raise HarmonizeError(f"{path}: {' '.join(words)[:60]!r} is not a name and a value")
    return [(name, value) for name, value in lines]


def _locations(path: Path) -> dict[str, tuple[int, int, int, int]]:
    """Top, left, bottom and right of the object by file name."""
    places = {}
    for name, value in _lines(path):
        numbers = value.split(",")
        if len(numbers) != 4 or not all(number.isdigit() for number in numbers):
            raise HarmonizeError(f"{path}: place {value!r} of {name} is not top,left,bottom,right")
        top, left, bottom, right = map(int, numbers)
        places[name] = (top, left, bottom, right)
    return places


def _pictures(
    files: Sequence[Path], size: int | None, places: Sequence[tuple[int, int, int, int] | None]
) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) uint8 and boxes (N, 4) left, top, right, bottom; zeros where there is no place."""
    images: list[Tensor] = []
    boxes = []
    for path, place in zip(files, places, strict=True):
        image = read_image(path)
        height, width = image.shape[1:]
        scale = (1.0, 1.0)
        if size is not None:
            scale = (size / height, size / width)
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            image = pil_to_tensor(picture.resize((size, size), Image.Resampling.BILINEAR))
        if images and image.shape != images[0].shape:
            raise HarmonizeError(f"{path}: {width} x {height} pixels, unlike the first image: give size=SIDE")
        images.append(image)
        top, left, bottom, right = place or (0, 0, 0, 0)
        boxes.append([int(left * scale[1]), int(top * scale[0]), int(right * scale[1]), int(bottom * scale[0])])
    return torch.stack(images), torch.tensor(boxes)


def _place(cuts: Sequence[NDArray[Any]], boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Masks (N, H, W) bool: each cut mask stretched (bilinear, at least half) over its box."""
    masks = torch.zeros(len(cuts), *size, dtype=torch.bool)
    for mask, cut, box in zip(masks, cuts, boxes.tolist(), strict=True):
        left, top, right, bottom = box
        if right <= left or bottom <= top or right > size[1] or bottom > size[0]:
            raise HarmonizeError(f"box {left},{top},{right},{bottom} of an object does not lie in {tuple(size)}")
        picture = Image.fromarray((np.asarray(cut) != 0).astype(np.uint8))
        stretched = picture.resize((right - left, bottom - top), Image.Resampling.BILINEAR)
        mask[top:bottom, left:right] = torch.from_numpy(np.asarray(stretched) > 0)
    return masks


class _ArraysOnly(pickle.Unpickler):
    """Reads pickled NumPy arrays and nothing that could run code."""

    ALLOWED = frozenset(
        (module, name)
        for module, names in {
            "numpy": ("ndarray", "dtype"),
            "numpy.core.multiarray": ("_reconstruct",),
            "numpy._core.multiarray": ("_reconstruct",),
            "numpy.core.numeric": ("_frombuffer",),
            "numpy._core.numeric": ("_frombuffer",),
            "_codecs": ("encode",),
        }.items()
        for name in names
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is no array")
        return super().find_class(module, name)


def _read_masks(path: Path) -> list[NDArray[Any]]:
    """The masks that NumPy wrote as an array of objects, which only a pickle can hold."""
    try:
        data = io.BytesIO(path.read_bytes())
        major, _ = np.lib.format.read_magic(data)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        _, _, dtype = read(data)
        if dtype.hasobject:
            return list(_ArraysOnly(data).load())
        return list(np.load(path, allow_pickle=False))
    except OSError as error:
        raise HarmonizeError(f"{path}: missing; the published layout has it") from error
    except Exception as error:
        raise HarmonizeError(f"{path}: not NumPy's masks ({str(error)[:60]}): restore it or build anew") from error


def build_bam(
    annotations: Path,
    photographs: Path,
    places: Path,
    out: Path,
    per_class: int = 1000,
    seed: int = 0,
    as_published: bool = False,
    objects: Sequence[str] = OBJECTS,
    scenes: Sequence[str] = SCENES,
) -> dict[str, int]:
    """Build BAM: paste object i of every category on image i of every scene.

    Parameters
    ----------
    annotations : Path
        COCO instances (JSON with ``images``, ``annotations``, ``categories``; polygons, or RLE as counts or text).
    photographs : Path
        Folder of the images named there.
    places : Path
        Folder with one folder of images per scene; a name may go on with ``_outdoor`` or hold a folder ``outdoor``.
    out : Path
        Where; must not exist, or be empty. Appears whole or not at all.
    per_class : int
        Images per pair of object and scene; the last tenth of them (at least one) is the validation set.
    seed : int
        Of size and location; each image has numbers of its own, whatever else is built.
    as_published : bool
        Follow the public builder where this one departs (see Notes).
    objects : Sequence[str]
        COCO categories, underscores for spaces.
    scenes : Sequence[str]
        Names of the scenes.

    Returns
    -------
    dict[str, int]
        Images by folder: ``obj/train``, ``obj/val`` and so on, ``dog_bedroom``, ``bamboo_forest``.

    Raises
    ------
    HarmonizeError
        What is missing: file, key, category, image, scene, or enough of them; a place that is taken.

    References
    ----------
    Yang, Kim 2019 (arXiv 1907.09701), section 3, and public code, ``construct_bam_dataset.py``.

    Notes
    -----
    As there: of a photograph the category's largest annotation, the first ``per_class`` photographs in the order of
    the file, objects and scenes sorted by file name, JPEG, sets, lists and names. Departures, each undone by
    ``as_published``:

    - Black pixels belong to the object. There every pixel of value (0, 0, 0) turns transparent, also inside.
    - The object's box covers a third to half of the scene's area, less only where it would not fit. There its longer
      relative side is 1/sqrt(3) to 1/sqrt(2) of the scene's, which covers that area only if both have one shape.
    - Crowds are left out. There they count as one object.
    - The cut is the mask's own extent, and objects under 16 pixels are passed over. There the cut is the annotated
      box with its corners rounded down, of any size.
    - JPEG quality 95. There 75, which leaves halos about the object.

    Not taken over in either way: gray photographs are used (there they fail and are skipped), ``stop_sign`` finds
    COCO's "stop sign", and a missing photograph is an error. ``bamboo_forest_patch`` needs a model and is made where
    it is used (``bam.insignificant_patch``).
    """
    if per_class < 1:
        raise HarmonizeError(f"per_class must be at least 1, not {per_class}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HarmonizeError(f"{out}: is there already; choose a new folder")
    coco = _read_coco(annotations)
    objects, scenes = sorted(objects), sorted(scenes)
    backgrounds = {scene: _scene_files(places, scene, per_class) for scene in scenes}
    if not photographs.is_dir():
        raise HarmonizeError(f"{photographs}: no such folder of photographs")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    first = per_class - max(1, per_class // 10)
    try:
        locations: dict[str, str] = {}
        masks: dict[str, list[NDArray[np.uint8]]] = {}
        for o, name in enumerate(tqdm(objects, desc="objects", unit="category")):
            cuts = _cuts(coco, photographs, name, per_class, as_published)
            masks[name] = [cut.mask for cut in cuts[first:]]
            for s, scene in enumerate(scenes):
                for i, cut in enumerate(cuts):
                    file = f"{name}-{scene}-{i:04d}.jpg"
                    bare = Image.fromarray(read_image(backgrounds[scene][i]).permute(1, 2, 0).numpy())
                    picture, box = _paste(cut.picture, bare, np.random.default_rng([seed, o, s, i]), as_published)
                    locations[file] = ",".join(map(str, box))
                    kind = "val" if i >= first else "train"
                    for labels, image in (("obj", picture), ("scene", picture), ("scene_only", bare)):
                        folder = partial / labels / kind
                        if kind == "train":
                            folder /= name if labels == "obj" else scene
                        folder.mkdir(parents=True, exist_ok=True)
                        image.save(folder / file, quality=75 if as_published else 95)
        counts = _write_lists(partial, objects, scenes, locations, masks)
        if out.exists():
            out.rmdir()
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


def _read_coco(path: Path) -> dict[str, Any]:
    try:
        coco = json.loads(path.read_bytes())
    except OSError as error:
        raise HarmonizeError(f"{path}: missing; give COCO's instances_*.json") from error
    except ValueError as error:
        raise HarmonizeError(f"{path}: no JSON ({str(error)[:60]}): give COCO's instances_*.json") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco, dict) or key not in coco:
            raise HarmonizeError(f"{path}: no {key!r}: give COCO's instances_*.json")
    return coco


def _scene_files(places: Path, scene: str, count: int) -> list[Path]:
    candidates = [places / scene, places / scene / "outdoor", places / f"{scene}_outdoor"]
    for folder in candidates:
        files = sorted(p for p in folder.glob("*") if p.suffix.lower() in IMAGE_ENDINGS)
        if files and len(files) < count:
            raise HarmonizeError(f"{folder}: {len(files)} images, {count} asked for: lower per_class")
        if files:
            return files[:count]
    raise HarmonizeError(f"{places}: no folder of images for scene {scene!r}: every scene needs one")


def _cuts(coco: dict[str, Any], photographs: Path, name: str, count: int, as_published: bool) -> list[Cut]:
    """The first ``count`` usable objects of a category, in the order of their file names."""
    category = [c["id"] for c in coco["categories"] if c["name"] == name.replace("_", " ")]
    if not category:
        raise HarmonizeError(f"category {name!r} is not among COCO's {len(coco['categories'])} in the annotations")
    largest: dict[int, dict[str, Any]] = {}
    for entry in coco["annotations"]:
        if entry["category_id"] == category[0] and (as_published or not entry.get("iscrowd")):
            best = largest.get(entry["image_id"])
            if entry["area"] > (best["area"] if best else 0):
                largest[entry["image_id"]] = entry
    images = [image for image in coco["images"] if image["id"] in largest]
    found: dict[str, Cut] = {}
    for image, cut in _cut_all(images, largest, photographs, as_published):
        found[image] = cut
        if len(found) == count:
            break
    if len(found) < count:
        raise HarmonizeError(f"category {name!r}: {len(found)} usable objects, {count} asked for: lower per_class")
    return [found[image] for image in sorted(found)]


def _cut_all(
    images: Iterable[dict[str, Any]], largest: dict[int, dict[str, Any]], photographs: Path, as_published: bool
) -> Iterator[tuple[str, Cut]]:
    for image in images:
        path = photographs / image["file_name"]
        if not path.is_file():
            raise HarmonizeError(f"{path}: missing, but the annotations name it")
        entry = largest[image["id"]]
        pixels = read_image(path).permute(1, 2, 0).numpy()
        mask = _decode(entry["segmentation"], image["height"], image["width"], image["file_name"])
        if mask.shape != pixels.shape[:2]:
            raise HarmonizeError(f"{path}: {pixels.shape[:2]} pixels, but the annotations say {mask.shape}")
        if as_published:
            x, y, width, height = entry["bbox"]
            window = slice(int(y), int(y + height)), slice(int(x), int(x + width))
        else:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if not len(rows) or max(np.ptp(rows), np.ptp(columns)) + 1 < LEAST_SIDE:
                continue
            window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        inside, colors = mask[window], pixels[window] * mask[window][..., None]
        if not inside.any():
            continue
        opaque = colors.any(-1) if as_published else inside != 0
        picture = np.dstack([colors, 255 * opaque.astype(np.uint8)])
        yield image["file_name"], Cut(Image.fromarray(picture, "RGBA"), inside)


def _decode(segmentation: Any, height: int, width: int, name: str) -> NDArray[np.uint8]:
    """A COCO segmentation as (height, width) uint8: polygons, RLE as a list of counts, or RLE as text."""
    try:
        if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
            return coco_mask.decode(segmentation)
        encoded = coco_mask.frPyObjects(segmentation, height, width)
        return coco_mask.decode(coco_mask.merge(encoded) if isinstance(encoded, list) else encoded)
    except Exception as error:
        raise HarmonizeError(f"segmentation of an object in {name} is neither polygons nor RLE") from error


def _paste(
    cut: Image.Image, scene: Image.Image, rng: np.random.Generator, as_published: bool
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """The scene with the object, and the object's top, left, bottom and right."""
    (w, h), (width, height) = cut.size, scene.size
    if as_published:
        wide = w / width > h / height
        side = width if wide else height
        longer = int(rng.integers(int(side / np.sqrt(3)), int(side / np.sqrt(2))))
        new = (longer, int(longer / w * h)) if wide else (int(longer / h * w), longer)
    else:
        scale = min(np.sqrt(rng.uniform(1 / 3, 1 / 2) * width * height / (w * h)), width / w, height / h)
        new = (round(w * scale), round(h * scale))
    new = (max(1, min(new[0], width)), max(1, min(new[1], height)))
    top, left = int(rng.integers(height - new[1] + 1)), int(rng.integers(width - new[0] + 1))
    resized = cut.resize(new, Image.Resampling.BILINEAR)
    result = scene.copy()
    result.paste(resized, (left, top), resized)
    return result, (top, left, top + new[1], left + new[0])


def _write_lists(
    out: Path,
    objects: Sequence[str],
    scenes: Sequence[str],
    locations: dict[str, str],
    masks: dict[str, list[NDArray[np.uint8]]],
) -> dict[str, int]:
    """Labels, places and masks beside the images; the named subsets; how many images there are where."""
    counts = {}
    for labels in LABELS:
        folder = out / labels
        (folder / "train").mkdir(exist_ok=True)
        classes = objects if labels == "obj" else scenes
        for name in classes:
            (folder / "train" / name).mkdir(exist_ok=True)
        names = sorted(path.name for path in (folder / "val").iterdir())
        place = {name: classes.index(_parts(name).of(labels)) for name in names}
        (folder / "val.txt").write_text("".join(f"{name} {place[name]}\n" for name in names))
        (folder / "val_loc.txt").write_text("".join(f"{name} {locations[name]}\n" for name in names))
        (folder / "loc.txt").write_text("".join(f"{name} {where}\n" for name, where in sorted(locations.items())))
        _write_masks(folder / "val_mask", [mask for name in objects for mask in masks[name]])
        counts[f"{labels}/train"] = len(list(folder.glob("train/*/*.jpg")))
        counts[f"{labels}/val"] = len(names)
    for name, (labels, prefix) in SUBSETS.items():
        chosen = sorted((out / labels / "val").glob(f"{prefix}*"))
        if chosen:
            folder = out / name
            (folder / "val").mkdir(parents=True)
            for path in chosen:
                shutil.copy(path, folder / "val" / path.name)
            label = scenes.index(_parts(chosen[0].name).scene)
            (folder / "val.txt").write_text("".join(f"{path.name} {label}\n" for path in chosen))
            (folder / "val_loc.txt").write_text("".join(f"{path.name} {locations[path.name]}\n" for path in chosen))
            _write_masks(folder / "val_mask", masks["dog"])
            counts[name] = len(chosen)
    return counts


def _write_masks(path: Path, masks: list[NDArray[np.uint8]]) -> None:
    array = np.empty(len(masks), dtype=object)
    array[:] = masks
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=True)
