"""The embedded data set and the readers: what is promised of every image holds, and bad files are named."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harmonize_lib import HarmonizeError, load_dataset, shapes
from harmonize_lib.data import imagenet_index, read_image

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def data():
    return load_dataset("shapes-on-scenes", "test", 200)


def test_a_prefix_does_not_depend_on_n(data):
    fewer = load_dataset("shapes-on-scenes", "test", 130)
    assert torch.equal(fewer.images, data.images[:130])
    assert fewer.ids == data.ids[:130]


def test_every_pair_of_object_and_scene_once_per_block(data):
    pairs = set(
        zip(data.extras["object_labels"][:100].tolist(), data.extras["scene_labels"][:100].tolist(), strict=True)
    )
    assert len(pairs) == 100


def test_splits_and_seeds_differ(data):
    for other in (
        load_dataset("shapes-on-scenes", "train", 200),
        load_dataset("shapes-on-scenes", "test", 200, seed=1),
    ):
        assert not (other.images.flatten(1) == data.images.flatten(1)).all(1).any()


def test_pixels_outside_the_mask_are_those_of_the_bare_scene(data):
    outside = ~data.masks[:, None].expand_as(data.images)
    assert torch.equal(data.images[outside], data.extras["without_object"][outside])


def test_the_moved_object_leaves_its_place_and_keeps_its_size(data):
    still = (data.masks & data.extras["moved_masks"]).sum((1, 2)) / data.masks.sum((1, 2))
    assert still.mean() < 0.25
    ratio = data.extras["moved_masks"].sum((1, 2)) / data.masks.sum((1, 2))
    assert (ratio - 1).abs().max() < 0.1
    outside = ~data.extras["moved_masks"][:, None].expand_as(data.images)
    assert torch.equal(data.extras["moved_object"][outside], data.extras["without_object"][outside])


def test_boxes_are_tight_by_a_literal_loop(data):
    for mask, box in zip(data.masks[:20].numpy(), data.extras["boxes"][:20].tolist(), strict=True):
        rows, columns = np.nonzero(mask)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_scene_labels_change_labels_alone_and_scene_only_drops_the_object(data):
    scene = load_dataset("shapes-on-scenes", "test", 200, labels="scene")
    assert torch.equal(scene.images, data.images) and torch.equal(scene.labels, data.extras["scene_labels"])
    bare = load_dataset("shapes-on-scenes", "test", 200, labels="scene_only")
    assert torch.equal(bare.images, data.extras["without_object"]) and not bare.masks.any()


def test_commonality_puts_one_object_in_k_scene_classes():
    data = load_dataset("shapes-on-scenes", "test", 300, labels="scene", commonality=3, object=shapes.OBJECTS[4])
    present = data.masks.any((1, 2))
    assert torch.equal(present, data.labels < 3)
    assert set(data.extras["object_labels"].tolist()) == {4}


def test_color_does_not_tell_the_class(data):
    big = load_dataset("shapes-on-scenes", "train", 2000)
    inside = big.masks[:, None]
    color = (big.images * inside).sum((2, 3)) / inside.sum((2, 3))
    per_class = torch.stack([color[big.labels == c].mean(0) for c in range(10)])
    noise = color.std(0) / (len(big) / 10) ** 0.5
    assert ((per_class - color.mean(0)).abs() < 5 * noise).all()


def test_texture_type_and_shape_have_their_own_class():
    assert len(shapes.OBJECTS) == len(set(shapes.OBJECTS)) == len(shapes.SHAPES) == len(shapes.TEXTURES) == 10


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: load_dataset("shapes-on-scene"), "did you mean 'shapes-on-scenes'"),
        (lambda: load_dataset("shapes-on-scenes", "tset"), "did you mean 'test'"),
        (lambda: load_dataset("shapes-on-scenes", n=0), "at least 1"),
        (lambda: load_dataset("shapes-on-scenes", label="obj"), "did you mean 'labels'"),
        (lambda: load_dataset("shapes-on-scenes", labels="objects"), "did you mean 'obj'"),
        (lambda: load_dataset("shapes-on-scenes", commonality=3), "go together"),
        (lambda: load_dataset("imagefolder"), "imagefolder:DIR"),
        (lambda: load_dataset("imagefolder:no/such"), "no such folder"),
        (lambda: load_dataset("mnist:no/such"), "download=True"),
        (lambda: load_dataset(f"fashion-mnist:{'no/' * 100}such"), "fetches it"),
        (lambda: load_dataset("shapes-on-scenes:no/such"), "leave the colon out"),
        (lambda: load_dataset("shapes-on-scenes", n=True), "n must be a whole number"),
        (lambda: load_dataset("shapes-on-scenes", n=2, seed=0.5), "seed must be a whole number"),
    ],
)
def test_mistakes_get_one_line(call, says):
    with pytest.raises(HarmonizeError, match=says.replace("(", r"\(")) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) <= 200


def _folder(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(np.full((40, 50, 3), 60 * i, np.uint8)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_image_folder_counts_orders_and_crops(tmp_path):
    data = load_dataset(f"imagefolder:{_folder(tmp_path)}", size=32)
    assert data.images.shape == (6, 3, 32, 32) and data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.ids[0] == "cat/0.png" and data.masks is None
    few = load_dataset(f"imagefolder:{tmp_path}", n=4, size=32)
    assert len(few) == 4
    with pytest.raises(HarmonizeError, match="holds 6 images"):
        load_dataset(f"imagefolder:{tmp_path}", n=7)


def test_only_visible_folders_are_classes_and_what_is_left_out_is_said(tmp_path):
    folder = _folder(tmp_path)
    for hidden in (".ipynb_checkpoints", ".cache"):
        shutil.copytree(folder / "cat", folder / hidden)
    (folder / "cat" / ".DS_Store").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_dataset(f"imagefolder:{folder}", size=32).classes == ("cat", "dog")
    for name in ("cat/3.gif", "dog/3.gif", "dog/LICENSE"):
        (folder / name).write_text("")
    with pytest.warns(UserWarning, match=r"because they are no images: 3 \(\.gif, LICENSE\)"):
        assert len(load_dataset(f"imagefolder:{folder}", size=32)) == 6
    (folder / "bird").mkdir()
    with pytest.raises(HarmonizeError, match="bird: no images in this class"):
        load_dataset(f"imagefolder:{folder}", n=2, size=32)


def test_one_bad_file_among_many_is_named(tmp_path):
    folder = _folder(tmp_path)
    (folder / "dog" / "1.png").write_bytes((folder / "dog" / "0.png").read_bytes()[:60])
    with pytest.raises(HarmonizeError, match=r"1\.png: not a readable image"):
        load_dataset(f"imagefolder:{folder}", size=32)
    empty = tmp_path / "empty"
    (empty / "a").mkdir(parents=True)
    with pytest.raises(HarmonizeError, match="no images"):
        load_dataset(f"imagefolder:{empty}")


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    gray = np.full((20, 20), 128, np.uint8)
    image = Image.fromarray(gray.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(gray).convert(mode)
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
    image.save(path)
    pixels = read_image(path)
    assert pixels.shape == (3, 20, 20) and pixels.dtype == torch.uint8
    assert (pixels.int() - 128).abs().max() <= 1


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png") == 255).all()


def test_wordnet_folders_map_to_imagenet():
    assert imagenet_index(["n01440764", "n15075141"]) == [0, 999]
    with pytest.raises(HarmonizeError, match="no ImageNet-1k class"):
        imagenet_index(["n00000000"])


@pytest.mark.skipif(not SHARED.exists(), reason="the real data are not beside this checkout")
def test_real_folders_and_mnist():
    photos = load_dataset(f"imagefolder:{SHARED / 'imagenet-sample'}", n=5)
    assert photos.images.shape == (5, 3, 224, 224) and len(photos.classes) == 1000
    digits = load_dataset(f"mnist:{SHARED / 'torchvision'}", "test", 50)
    assert digits.images.shape == (50, 1, 28, 28)
