"""The published BAM folders: built from a small COCO-format set, read back, and refused where something is missing."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from typer.testing import CliRunner

from harmonize_lib import HarmonizeError, load_dataset
from harmonize_lib.bam_data import _decode, _read_masks, build_bam
from harmonize_lib.cli import app

OBJECTS, SCENES = ("dog", "stop_sign"), ("bamboo_forest", "bedroom", "track")
SHAPE = 96, 128  # of the photographs


def blank() -> np.ndarray:
    return np.zeros(SHAPE, np.uint8)


def rectangle(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = blank()
    mask[top:bottom, left:right] = 1
    return mask


def polygon(top: int, left: int, bottom: int, right: int) -> list[list[int]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def counts(mask: np.ndarray) -> list[int]:
    """Uncompressed RLE: column by column, lengths of runs that start with zeros."""
    runs, value, length = [], 0, 0
    for pixel in mask.flatten(order="F").tolist():
        if pixel != value:
            runs.append(length)
            value, length = pixel, 0
        length += 1
    return [*runs, length]


def text_rle(mask: np.ndarray) -> dict:
    encoded = coco_mask.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


# Boxes of the objects that are used: (top, left, bottom, right). Dogs are red with a black middle, signs are green.
USED = {
    "dog": {"a.jpg": (10, 20, 50, 90), "b.jpg": (5, 5, 85, 35), "c.jpg": (30, 40, 70, 80)},
    "stop_sign": {"a.jpg": (60, 10, 90, 100), "d.jpg": (20, 20, 60, 60), "e.jpg": (40, 30, 90, 70)},
}
COLORS = {"dog": (200, 30, 30), "stop_sign": (20, 180, 40)}


@pytest.fixture
def sources(tmp_path):
    photographs, places = tmp_path / "photographs", tmp_path / "places"
    photographs.mkdir()
    names = [f"{letter}.jpg" for letter in "abcdef"]
    pixels = {name: np.full((*SHAPE, 3), 128, np.uint8) for name in names}
    entries = []

    def add(name: str, category: int, segmentation: object, mask: np.ndarray, crowd: int = 0) -> None:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1] if len(rows) else [0, 0, 1, 1]
        entries.append(
            {
                "id": len(entries) + 1,
                "image_id": 10 + names.index(name),
                "category_id": category,
                "segmentation": segmentation,
                "area": max(float(mask.sum()), 0.5),
                "bbox": [float(v) for v in box],
                "iscrowd": crowd,
            }
        )

    for category, (kind, boxes) in enumerate(USED.items(), 18):
        for i, (name, box) in enumerate(boxes.items()):
            mask = rectangle(*box)
            pixels[name][mask > 0] = COLORS[kind]
            if kind == "dog":
                middle = rectangle(box[0] + 10, box[1] + 10, box[2] - 10, box[3] - 10)
                pixels[name][middle > 0] = 0
            forms = polygon(*box), {"size": list(SHAPE), "counts": counts(mask)}, text_rle(mask)
            add(name, category, forms[i], mask)
    add("a.jpg", 18, polygon(80, 110, 90, 120), rectangle(80, 110, 90, 120))  # a second, smaller dog
    add("d.jpg", 18, polygon(70, 100, 76, 106), rectangle(70, 100, 76, 106))  # a tiny dog
    add("e.jpg", 18, polygon(1, 1, 1, 2), blank())  # a dog without a pixel
    crowd = rectangle(0, 0, 96, 128)
    add("f.jpg", 18, {"size": list(SHAPE), "counts": counts(crowd)}, crowd, crowd=1)
    coco = {
        "images": [{"id": 10 + i, "file_name": n, "height": 96, "width": 128} for i, n in enumerate(names)],
        "annotations": entries,
        "categories": [{"id": 18, "name": "dog"}, {"id": 19, "name": "stop sign"}, {"id": 1, "name": "person"}],
    }
    annotations = tmp_path / "instances.json"
    annotations.write_text(json.dumps(coco))
    for name in names:
        Image.fromarray(pixels[name]).save(photographs / name, format="png")  # lossless inside, whatever the ending
    for i, folder in enumerate(("bamboo_forest", "bedroom", "track_outdoor")):
        (places / folder).mkdir(parents=True)
        for j in range(4):
            image = Image.fromarray(np.full((64, 64, 3), 60 + 50 * i + 10 * j, np.uint8))
            image = image.convert("L") if j == 1 else image
            image.save(places / folder / f"{j}.png")
    return annotations, photographs, places, tmp_path / "out"


def built(sources, **options) -> Path:
    build_bam(*sources, **{"per_class": 3, "objects": OBJECTS, "scenes": SCENES} | options)
    return sources[3]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_counts_names_and_lists(sources):
    found = build_bam(*sources, per_class=3, objects=OBJECTS, scenes=SCENES)
    out = sources[3]
    assert found == {
        **{f"{labels}/train": 12 for labels in ("obj", "scene", "scene_only")},
        **{f"{labels}/val": 6 for labels in ("obj", "scene", "scene_only")},
        "dog_bedroom": 1,
        "bamboo_forest": 1,
    }
    assert sorted(p.name for p in (out / "obj/train").iterdir()) == ["dog", "stop_sign"]
    assert sorted(p.name for p in (out / "scene_only/train").iterdir()) == sorted(SCENES)
    assert sorted(p.name for p in (out / "scene/train/track").iterdir()) == [
        f"{o}-track-000{i}.jpg" for o in OBJECTS for i in (0, 1)
    ]
    assert (out / "scene/val.txt").read_text().splitlines()[:3] == [
        "dog-bamboo_forest-0002.jpg 0",
        "dog-bedroom-0002.jpg 1",
        "dog-track-0002.jpg 2",
    ]
    assert (out / "obj/val.txt").read_text().splitlines()[-1] == "stop_sign-track-0002.jpg 1"
    assert (out / "dog_bedroom/val.txt").read_text() == "dog-bedroom-0002.jpg 1\n"
    assert len((out / "obj/loc.txt").read_text().splitlines()) == 18
    assert len((out / "obj/val_loc.txt").read_text().splitlines()) == 6
    assert not list(out.parent.glob(".*partial"))
    same = [(out / kind / "val/dog-bedroom-0002.jpg").read_bytes() for kind in ("obj", "scene", "dog_bedroom")]
    assert same[0] == same[1] == same[2] != (out / "scene_only/val/dog-bedroom-0002.jpg").read_bytes()


def test_masks_boxes_and_pixels_are_the_objects(sources):
    out = built(sources)
    data = load_dataset(f"bam:{out}")
    assert data.classes == OBJECTS and len(data) == 6 and data.images.shape == (6, 3, 64, 64)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1] and data.extras["scene_labels"].tolist() == [0, 1, 2] * 2
    kinds = [OBJECTS[i] for i in data.labels.tolist()]
    for kind, image, bare, mask, box in zip(
        kinds,
        data.images.int(),
        data.extras["without_object"].int(),
        data.masks,
        data.extras["boxes"].tolist(),
        strict=True,
    ):
        left, top, right, bottom = box
        rectangle_mask = torch.zeros_like(mask)
        rectangle_mask[top:bottom, left:right] = True
        assert torch.equal(mask, rectangle_mask)  # all objects are rectangles, so a mask fills its box
        height, width = bottom - top, right - left
        first = USED[kind][sorted(USED[kind])[2]]
        assert width / height == pytest.approx((first[3] - first[1]) / (first[2] - first[0]), rel=0.06)
        assert 1 / 3 - 0.03 < height * width / 64**2 < 1 / 2 + 0.03
        inner = torch.zeros_like(mask)
        inner[top + 3 : bottom - 3, left + 3 : right - 3] = True
        seen = image[:, inner]
        assert (seen - bare[:, inner]).abs().amax(0).gt(40).all()
        if kind == "stop_sign":
            assert (seen.float().mean(1) - torch.tensor(COLORS[kind])).abs().max() < 12
        outer = torch.ones_like(mask)
        outer[max(0, top - 18) : bottom + 18, max(0, left - 18) : right + 18] = False  # JPEG's blocks of 16
        assert torch.equal(image[:, outer], bare[:, outer])


def test_black_pixels_stay_or_vanish(sources):
    centers = {}
    for published in (False, True):
        annotations, photographs, places, out = sources
        out = out.with_name(f"out-{published}")
        build_bam(annotations, photographs, places, out, 3, as_published=published, objects=OBJECTS, scenes=SCENES)
        data = load_dataset(f"bam:{out}")
        left, top, right, bottom = data.extras["boxes"][0].tolist()
        y, x = (top + bottom) // 2, (left + right) // 2
        assert data.masks[0, y, x]
        centers[published] = data.images[0, :, y, x].float().mean(), data.extras["without_object"][0, :, y, x]
    assert centers[False][0] < 20
    assert abs(centers[True][0] - centers[True][1].float().mean()) < 20


def test_size_rules(sources):
    published = built(sources, as_published=True, objects=("stop_sign",))
    for line in (published / "obj/loc.txt").read_text().splitlines():
        top, left, bottom, right = map(int, line.split()[1].split(","))
        assert int(64 / 3**0.5) <= max(bottom - top, right - left) < int(64 / 2**0.5)
    shutil.rmtree(published)
    ours = built(sources, objects=("stop_sign",))
    areas = {}
    for line in (ours / "obj/loc.txt").read_text().splitlines():
        top, left, bottom, right = map(int, line.split()[1].split(","))
        assert 0 <= top < bottom <= 64 and 0 <= left < right <= 64
        areas[line.split()[0]] = (bottom - top) * (right - left) / 64**2
    wide = [area for name, area in areas.items() if name.endswith("0000.jpg")]  # 3 : 1, does not fit at a third
    assert all(area == pytest.approx(1 / 3, abs=0.02) for area in wide)
    assert all(0.3 < area < 0.53 for area in areas.values()) and max(areas.values()) > 0.34


def test_crowds_tiny_and_empty_objects_are_passed_over(sources):
    with pytest.raises(HarmonizeError, match="category 'dog': 3 usable objects, 4 asked for: lower per_class"):
        built(sources, per_class=4)
    assert not sources[3].exists()
    out = built(sources, per_class=4, as_published=True, objects=("dog",))  # tiny dog counts, too; crowd not needed
    assert len(list((out / "obj").glob("*/**/*.jpg"))) == 12
    masks = _read_masks(out / "obj/val_mask")
    assert len(masks) == 1 and masks[0].shape == (6, 6)


def test_the_largest_instance_is_taken_and_every_coding_decodes(sources):
    coco = json.loads(sources[0].read_text())
    for entry in coco["annotations"][:6]:
        kind, place = divmod(entry["id"] - 1, 3)
        box = list(list(USED.values())[kind].values())[place]
        mask = _decode(entry["segmentation"], *SHAPE, "x")
        assert np.array_equal(mask, rectangle(*box)), entry["id"]
    out = built(sources, per_class=1)
    (mask, _) = _read_masks(out / "obj/val_mask")
    assert mask.shape == (40, 70) and mask.all()  # the first dog of a.jpg, not the smaller one


def test_deterministic_by_seed_and_independent_of_company(sources):
    annotations, photographs, places, out = sources
    folders = [out.with_name(name) for name in ("one", "two", "three")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        build_bam(annotations, photographs, places, folder, 2, seed, objects=OBJECTS, scenes=SCENES)
    first, second, third = map(files_of, folders)
    assert first == second
    assert first.keys() == third.keys() and first["obj/loc.txt"] != third["obj/loc.txt"]
    assert all(first[name] == third[name] for name in first if name.startswith("scene_only/") and "loc" not in name)


def test_reader_splits_labels_size_and_selection(sources):
    out = built(sources)
    train = load_dataset(f"bam:{out}", "train", labels="scene")
    assert len(train) == 12 and train.masks is None and train.classes == SCENES
    assert [SCENES[i] for i in train.labels.tolist()] == [name.split("-")[1] for name in train.ids]
    boxes = {line.split()[0]: line.split()[1] for line in (out / "obj/loc.txt").read_text().splitlines()}
    for name, box in zip(train.ids, train.extras["boxes"].tolist(), strict=True):
        left, top, right, bottom = box
        assert boxes[name] == f"{top},{left},{bottom},{right}"
    bare = load_dataset(f"bam:{out}", labels="scene_only")
    composite = load_dataset(f"bam:{out}", labels="scene")
    assert torch.equal(bare.images, composite.extras["without_object"]) and not bare.masks.any()
    assert torch.equal(composite.images, load_dataset(f"bam:{out}").images)
    big = load_dataset(f"bam:{out}", labels="scene", size=112)
    assert big.images.shape == (6, 3, 112, 112)
    assert torch.equal(big.extras["boxes"], (composite.extras["boxes"] * (112 / 64)).int().long())
    assert (big.masks.float().mean((1, 2)) - composite.masks.float().mean((1, 2))).abs().max() < 0.03
    few = load_dataset(f"bam:{out}", n=4, seed=3)
    again = load_dataset(f"bam:{out}", n=4, seed=3)
    assert few.ids == again.ids and len(few) == 4 and list(few.ids) == sorted(few.ids)
    for i, name in enumerate(few.ids):
        assert torch.equal(few.images[i], composite.images[composite.ids.index(name)])
        assert torch.equal(few.masks[i], composite.masks[composite.ids.index(name)])
    pair = load_dataset(f"bam:{out}", labels="scene", prefix="dog-bedroom-")
    assert pair.ids == ("dog-bedroom-0002.jpg",) and pair.classes == SCENES
    assert torch.equal(pair.masks[0], composite.masks[1])


def test_masks_written_by_old_numpy_are_read_and_code_is_not(tmp_path):
    masks = np.empty(2, object)
    masks[:] = [np.ones((3, 4), bool), np.zeros((2, 2), np.uint8)]
    for protocol in (2, 3, 4):
        data = io.BytesIO()
        np.lib.format.write_array_header_1_0(data, {"descr": "|O", "fortran_order": False, "shape": (2,)})
        pickle.dump(masks, data, protocol=protocol)
        (tmp_path / "val_mask").write_bytes(data.getvalue())
        read = _read_masks(tmp_path / "val_mask")
        assert all(np.array_equal(a, b) for a, b in zip(read, masks, strict=True))

    class Evil:
        def __reduce__(self):
            return Path.write_text, (tmp_path / "owned", "x")

    with open(tmp_path / "val_mask", "wb") as file:
        np.save(file, np.array([Evil()], object), allow_pickle=True)
    with pytest.raises(HarmonizeError, match="not NumPy's masks"):
        _read_masks(tmp_path / "val_mask")
    assert not (tmp_path / "owned").exists()
    np.save(tmp_path / "plain.npy", np.ones((2, 3, 4), bool))
    assert len(_read_masks(tmp_path / "plain.npy")) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a, p, s: a.unlink(), "instances.json: missing"),
        (lambda a, p, s: a.write_text("{"), "instances.json: no JSON"),
        (lambda a, p, s: a.write_text("{}"), "instances.json: no 'images'"),
        (lambda a, p, s: a.write_text(a.read_text().replace('"dog"', '"cat"')), "category 'dog' is not among COCO's 3"),
        (lambda a, p, s: (p / "b.jpg").unlink(), "b.jpg: missing, but the annotations name it"),
        (lambda a, p, s: (p / "b.jpg").write_text("x"), "b.jpg: not a readable image"),
        (lambda a, p, s: shutil.rmtree(p), "no such folder of photographs"),
        (lambda a, p, s: shutil.rmtree(s / "bedroom"), "no folder of images for scene 'bedroom'"),
        (lambda a, p, s: [(s / "bedroom" / f"{i}.png").unlink() for i in (1, 2)], "bedroom: 2 images, 3 asked for"),
        (lambda a, p, s: a.write_text(a.read_text().replace("[[20, 10,", "[[20,")), "neither polygons nor RLE|a.jpg"),
        (lambda a, p, s: a.write_text(a.read_text().replace('"height": 96', '"height": 90')), "annotations say"),
    ],
)
def test_builder_says_in_one_line_what_is_missing(sources, change, says):
    change(*sources[:3])
    if says.startswith("neither"):
        coco = json.loads(sources[0].read_text())
        coco["annotations"][0]["segmentation"] = "polygon"
        sources[0].write_text(json.dumps(coco))
    with pytest.raises(HarmonizeError, match=says) as error:
        built(sources)
    assert "\n" not in str(error.value)
    assert not sources[3].exists() and not list(sources[3].parent.glob(".*partial"))


def test_a_taken_place_is_left_alone(sources):
    sources[3].mkdir()
    (sources[3] / "mine.txt").write_text("x")
    with pytest.raises(HarmonizeError, match="is there already"):
        built(sources)
    assert (sources[3] / "mine.txt").read_text() == "x"
    with pytest.raises(HarmonizeError, match="per_class must be at least 1"):
        built((*sources[:3], sources[3] / "new"), per_class=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda out: shutil.rmtree(out / "scene_only"), "no folder scene_only"),
        (lambda out: (out / "scene/val/dog-bedroom-0002.jpg").unlink(), "dog-bedroom-0002.jpg: missing"),
        (lambda out: (out / "obj/val.txt").unlink(), "obj/val.txt: missing"),
        (lambda out: (out / "obj/val_mask").unlink(), "obj/val_mask: missing"),
        (lambda out: (out / "obj/val_mask").write_bytes(b"x"), "not NumPy's masks"),
        (lambda out: (out / "obj/val_loc.txt").write_text("dog-bedroom-0002.jpg 1,2,3\n"), "top,left,bottom,right"),
        (lambda out: (out / "obj/val_loc.txt").write_text("dog-bedroom-0002.jpg 1,2,3,4\n"), "does not lie in"),
        (lambda out: (out / "scene/val.txt").write_text("dog-bedroom-0002.jpg 0\n"), "not its class's place"),
        (lambda out: (out / "scene/val.txt").write_text("dog-bedroom-0002.jpg 1\n"), "is not in val.txt of all"),
        (lambda out: (out / "scene/val.txt").write_text("dog.jpg 1\n"), "OBJECT-SCENE-NUMBER"),
        (lambda out: (out / "scene/val.txt").write_text("dog\n"), "not a name and a value"),
    ],
)
def test_reader_says_in_one_line_what_is_wrong(sources, change, says):
    out = built(sources)
    change(out)
    with pytest.raises(HarmonizeError, match=says) as error:
        load_dataset(f"bam:{out}")
    assert "\n" not in str(error.value)


def test_reader_refuses_wrong_requests(sources):
    out = built(sources)
    for options, says in (
        ({"labels": "objects"}, "unknown labels 'objects'"),
        ({"n": 7}, "7 images asked for, 6"),
        ({"size": 0}, "size must be at least 1"),
        ({"prefix": "cat-"}, "0 in the test set begin with 'cat-'"),
        ({"commonality": 3}, "unknown option of dataset bam"),
    ):
        with pytest.raises(HarmonizeError, match=says):
            load_dataset(f"bam:{out}", **options)
    with pytest.raises(HarmonizeError, match="needs a folder"):
        load_dataset("bam")


def test_the_command_says_what_is_missing(sources):
    result = CliRunner().invoke(app, ["build-bam", *map(str, sources)])
    assert isinstance(result.exception, HarmonizeError)
    assert "bamboo_forest: 4 images, 1000 asked for" in str(result.exception) and not sources[3].exists()


SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not (SHARED / "coco").is_dir(), reason="the samples of COCO and MiniPlaces are not here")
@pytest.mark.parametrize("options", [[], ["--as-published"]])
def test_the_command_builds_from_real_samples(tmp_path, options):
    out = tmp_path / "bam"
    given = SHARED / "coco/annotations/instances_val2017.json", SHARED / "coco/val2017", SHARED / "miniplaces", out
    result = CliRunner().invoke(app, ["build-bam", *map(str, given), "--per-class", "1", *options])
    assert result.exit_code == 0, result.exception
    assert {
        "obj/val: 100 images",
        "scene/val: 100 images",
        "scene_only/val: 100 images",
        "dog_bedroom: 1 images",
    } < set(result.stdout.splitlines())
    data = load_dataset(f"bam:{out}")
    assert data.images.shape == (100, 3, 128, 128) and len(data.classes) == 10
    assert torch.bincount(data.labels).tolist() == torch.bincount(data.extras["scene_labels"]).tolist() == [10] * 10
    changed = (data.images.int() - data.extras["without_object"].int()).abs().amax(1) > 40
    inside = (changed & data.masks).sum((1, 2)) / changed.sum((1, 2)).clamp(min=1)
    assert inside.median() > 0.97 and (data.masks.sum((1, 2)) > 200).all()
    for mask, (left, top, right, bottom) in zip(data.masks, data.extras["boxes"].tolist(), strict=True):
        assert mask.sum() == mask[top:bottom, left:right].sum()
