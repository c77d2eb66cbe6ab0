"""Every likely mistake gets one line that says what would be right, exit code 2, and leaves no file behind."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from small import NAME, notebook, process
from tiny import Linear, floats, model, shapes5, small
from torch import nn

from harmonize_lib import (
    Dataset,
    HarmonizeError,
    cli,
    consensus,
    contextual_decomposition,
    explain,
    feature_mask,
    input_independence_rate,
    insertion,
    load_dataset,
    load_model,
    model_contrast_score,
    paths,
    relevance_mass,
    study,
    transfer_table,
)
from harmonize_lib.errors import unknown
from harmonize_lib.storage import remember, stored_at, write_atomic
from harmonize_lib.train import predict
from harmonize_lib.transfer import recognize

TOLD: list[tuple[str, str]] = []  # every case with its message, printed at the end


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder of its own, with figures, cache and weights inside it, holding things that are wrong."""
    (tmp_path / "weights").mkdir()
    for name in ("manifest.json", *(f"{zoo}.safetensors" for zoo in ("resnet-obj", "vgg-obj", "resnet-scene"))):
        shutil.copyfile(paths.WEIGHTS / name, tmp_path / "weights" / name)
    for name, folder in (("FIGURES", "figures"), ("CACHE", "cache"), ("WEIGHTS", "weights")):
        monkeypatch.setattr(paths, name, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "file").write_text("a file\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_images" / "cat").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    for folder, count in (("photos", 3), ("truncated", 3), ("text", 1), ("wordnet", 1)):
        inside = tmp_path / folder / ("n99999999" if folder == "wordnet" else "cat")
        inside.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(noise).save(inside / f"{i}.png")
    cut = tmp_path / "truncated" / "cat" / "1.png"
    cut.write_bytes(cut.read_bytes()[:2000])
    (tmp_path / "text" / "cat" / "0.png").write_text("not a picture")
    (tmp_path / "one_bare" / "cat").mkdir(parents=True)
    (tmp_path / "one_bare" / "dog").mkdir()
    shutil.copyfile(tmp_path / "photos" / "cat" / "0.png", tmp_path / "one_bare" / "cat" / "0.png")
    (tmp_path / "one_bare" / "dog" / "0.gif").write_bytes(b"GIF89a")
    (tmp_path / "huge" / "cat").mkdir(parents=True)
    (tmp_path / "huge" / "cat" / "0.png").write_bytes(png_that_says(20_000, 20_000))
    (tmp_path / "broken.py").write_text("def build(:\n")
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def unnamed():\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))\n"
        "def nothing():\n    return None\n"
        "def oneside():\n    net = unnamed()\n    net.classes, net.input_size = ('a', 'b', 'c'), 64\n    return net\n"
        "def counted():\n    net = unnamed()\n    net.classes = 3\n    return net\n"
        "def others():\n    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))\n"
        "    net.classes = tuple('abcdefghij')\n    return net\n"
        "def sized(classes):\n    return others()\n"
        "def raises():\n    raise RuntimeError('no such\\nfile of mine')\n"
        "def lazy():\n    net = unnamed()\n    net.classes = ('a', 'b', 'c')\n    return net\n"
        "def graymean():\n    net = others()\n    net.mean = 'gray'\n    return net\n"
    )
    return tmp_path


def png_that_says(width: int, height: int) -> bytes:
    """A PNG of one pixel whose header claims another size."""
    file = BytesIO()
    Image.new("RGB", (1, 1)).save(file, "png")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def listing(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def one_line(name: str, line: str, says: str) -> None:
    TOLD.append((name, line))
    assert says in line, line
    assert "\n" not in line.strip() and len(line) <= 200, f"{len(line)}: {line}"
    assert "Traceback" not in line


@pytest.fixture(scope="module", autouse=True)
def _print_the_table():
    yield
    print("\n" + "\n".join(f"{name:<32} {line}" for name, line in TOLD))


def given(notebook: str, name: str, value: str) -> list[str]:
    return ["run", notebook, "-p", f"{name}={value}"]


COMMANDS: dict[str, tuple[list[str], str]] = {
    "unknown notebook": (["run", "07x"], "unknown notebook '07x'"),
    "notebook by a path": (["run", "../../etc/passwd"], "unknown notebook"),
    "misspelled parameter": (given("04", "n_image", "5"), "did you mean 'n_images'"),
    "unknown parameter": (given("04", "zzz", "5"), "choose from"),
    "a word for a number": (given("04", "n_images", "many"), "'n_images'"),
    "a fraction for a whole number": (given("04", "n_images", "2.5"), "'n_images'"),
    "true for a number": (given("04", "n_images", "true"), "'n_images'"),
    "nothing for a number": (given("04", "n_images", "null"), "'n_images'"),
    "too few images": (given("04", "n_images", "1"), "greater than or equal to 2"),
    "too many images": (given("04", "n_images", "1000000"), "less than or equal to 100000"),
    "a negative seed": (given("04", "seed", "-1"), "'seed'"),
    "a value that is no YAML": (given("04", "n_images", "[1"), "no YAML"),
    "k of 0": (given("04", "fractions", "[0, 0.1]"), "'fractions.0'"),
    "k above 1": (given("04", "fractions", "[0.1, 1.5]"), "'fractions.1'"),
    "k not a number": (given("04", "fractions", "[0.1, .nan]"), "'fractions"),
    "k where nothing is measured": (given("04", "fraction", "0.04"), "one of fractions"),
    "a patch that does not divide": (given("04", "patch", "7"), "patch=7 does not divide the image's side, 64"),
    "a patch of 0": (given("04", "patch", "0"), "'patch'"),
    "a patch beyond the image": (given("03", "patch", "128"), "patch=128"),
    "too few steps": (given("06", "steps", "1"), "'steps'"),
    "unknown fill": (given("04", "fill", "gray"), "'mean', 'blur' or 'road'"),
    "unknown model": (given("04", "models", "[resnet-object, vgg-obj]"), "did you mean 'resnet-obj'"),
    "unknown timm model": (given("04", "models", "[timm:resnet999, vgg-obj]"), "unknown timm model"),
    "other classes than the data's": (
        given("04", "models", "[python:mine:others, vgg-obj]"),
        "models of the same labels",
    ),
    "no such kind of model": (given("04", "models", "[hub:resnet, vgg-obj]"), "'timm:TAG' or 'python:"),
    "a callable with an argument": (given("04", "models", "[python:mine:sized, vgg-obj]"), "called without arguments"),
    "a callable that raises": (given("04", "models", "[python:mine:raises, vgg-obj]"), "no such file of mine"),
    "a module that is no Python": (given("04", "models", "[python:broken:build, vgg-obj]"), "mend the module"),
    "a lazy layer": (given("04", "models", "[python:mine:lazy, vgg-obj]"), "give its sizes"),
    "a mean that is no number": (given("04", "models", "[python:mine:graymean, vgg-obj]"), "number per channel"),
    "one model": (given("04", "models", "[resnet-obj]"), "'models'"),
    "a model twice": (given("04", "models", "[vgg-obj, vgg-obj]"), "'vgg-obj' twice"),
    "a method twice": (given("04", "methods", "[saliency, saliency]"), "'saliency' twice"),
    "a fraction twice": (given("04", "fractions", "[0.05, 0.1, 0.1]"), "'0.1' twice"),
    "a word for a list": (given("04", "models", "resnet-obj"), "'models'"),
    "unknown method": (given("04", "methods", "[salency]"), "did you mean 'saliency'"),
    "no method": (given("04", "methods", "[]"), "'methods'"),
    "unknown option of a method": (given("04", "options", "{saliency: {step: 3}}"), "unknown option of saliency"),
    "a negative number of steps": (
        given("04", "options", "{integrated_gradients: {steps: -4}}"),
        "options of integrated_gradients: steps must be",
    ),
    "a patch beyond the image, as an option": (given("04", "options", "{occlusion: {patch: 65}}"), "side 64 must hold"),
    "a baseline there is not": (
        given("04", "options", "{integrated_gradients: {baseline: gray}}"),
        "choose from black",
    ),
    "a list for a rule": (given("04", "options", "{integrated_gradients: {rule: [1]}}"), "cannot use rule=[1]"),
    "a method unlike any": (given("04", "methods", "[zzz]"), "harmonize params NAME lists all 15)"),
    "options of an unknown method": (given("04", "options", "{salency: {}}"), "did you mean 'saliency'"),
    "unknown rule": (given("05", "rules", "[meen]"), "did you mean 'mean'"),
    "a number for a list": (given("05", "rules", "3"), "'rules'"),
    "unknown dataset": (given("04", "dataset", "shape-on-scenes"), "did you mean 'shapes-on-scenes'"),
    "a misspelled method for shortcuts": (given("05", "shortcut_methods", "[salency]"), "did you mean 'saliency'"),
    "a misspelled method for consensus": (given("07", "harmonized_methods", "[salency]"), "did you mean 'saliency'"),
    "a misspelled scene model": (given("07", "scene_models", "[resnt-scene]"), "did you mean 'resnet-scene'"),
    "a rule beside the rules": (given("07", "rule", "borda"), "unknown rule 'borda': choose from agg_var"),
    "models of one commonality": (given("07", "relative_models", '["resnet-scene_k1"]'), "has no {k}"),
    "a commonality without a model": (given("07", "relative_models", '["vgg-scene_k{k}"]'), "'vgg-scene_k1'"),
    "a commonality of all scenes": (given("07", "commonalities", "[5, 10]"), "less than or equal to 9"),
    "a table there is not": (given("09", "table", "nope"), "choose from breast_cancer, csv, diabetes"),
    "a table that is missing": (given("09", "table", "csv:missing.csv"), "missing.csv: no such file"),
    "pixels that are missing": (given("09", "pixels", "mnist:missing"), "mnist at missing"),
    "a misspelled model to train": (
        [*given("09", "models", "[resnet-obj, vgg-obj]"), "-p", "fine_tuned=[resnt-obj, vgg-obj]"],
        "'resnt-obj' is not among the models: choose from resnet-obj, vgg-obj",
    ),
    "one judge for two models": (
        [*given("09", "models", "[resnet-obj, vgg-obj]"), "-p", "judges=[vgg-obj]"],
        "a judge of its own",
    ),
    "an unknown method to pool": (given("09", "consensus_method", "foo"), "unknown method 'foo'"),
    "a share above 1": (given("09", "flips", "[0, 1.5]"), "'flips.1'"),
    "a negative sigma": (given("09", "sigmas", "[0, -1]"), "'sigmas.1'"),
    "an endless sigma": (given("09", "sigmas", "[0, .inf]"), "no JSON value"),
    "three times a graph": (given("09", "graph_shares", "[0, 3]"), "'graph_shares.1'"),
    "a negative weight": (given("09", "pixel_weights", "[-1]"), "greater than 0"),
    "a layer of no width": (given("09", "hidden", "[0]"), "'hidden.0'"),
    "a seed twice": (given("09", "tuning_seeds", "[0, 0]"), "'tuning_seeds' has '0' twice"),
    "digits that are missing": (given("11", "digits", "mnist:missing"), "mnist at missing"),
    "more digits than there are": (given("11", "n_train", "50000"), "more than the 1797 images"),
    "a negative strength": (given("11", "strengths", "[-1, 1]"), "'strengths.0'"),
    "unknown wavelet": (given("12", "wavelets", "[foo]"), "choose from coif1, db1"),
    "a long wavelet": (given("12", "wavelets", "[db20]"), "of at most 10 taps 'db20'"),
    "a folder behind a space": (given("04", "dataset", "imagefolder:"), "as in imagefolder:PATH"),
    "a folder of what has none": (given("04", "dataset", "shapes-on-scenes:foo"), "leave the colon out"),
    "a dataset without its folder": (given("04", "dataset", "imagefolder"), "imagefolder:DIR"),
    "output in a file": (given("04", "output", "file"), "older"),
    "output below a file": (given("04", "output", "file/below"), "older"),
    "out in a file": ([*given("04", "models", "[resnet-obj, vgg-obj]"), "--out", "file"], "older"),
    "code as a parameter's name": (given("04", 'open("pwned", "w").close(); z', "1"), "unknown parameter"),
    "an object as a value": (given("04", "n_images", "!!python/object/apply:os.getcwd []"), "no YAML"),
    "train: unknown model": (["train", "resnet-object"], "no zoo name"),
    "train: no GPU": (["train", "resnet-obj", "--device", "cuda"], "use 'auto' or 'cpu'"),
    "train: out in a file": (["train", "resnet-obj", "--out", "file"], "older"),
    "data: unknown": (["data", "shape-on-scenes"], "did you mean 'shapes-on-scenes'"),
    "data: no such split": (["data", "--split", "dev"], "unknown split"),
    "data: no image asked for": (["data", "--n", "0"], "at least 1"),
    "data: no such folder": (["data", "imagefolder:missing"], "missing: no such folder"),
    "data: empty folder": (["data", "imagefolder:empty"], "no images"),
    "data: folder without images": (["data", "imagefolder:no_images"], "no images"),
    "data: too few images": (["data", "imagefolder:photos", "--n", "9"], "holds 3 images"),
    "data: a class without images": (["data", "imagefolder:one_bare", "--n", "1"], "one_bare/dog: no images"),
    "data: an image beyond measure": (["data", "imagefolder:huge", "--n", "1"], "more than 179 million pixels"),
    "data: a folder of what has none": (["data", "shapes-on-scenes:foo"], "leave the colon out"),
    "data: a truncated image": (["data", "imagefolder:truncated", "--n", "3"], "truncated/cat/1.png"),
    "data: a text for an image": (["data", "imagefolder:text", "--n", "1"], "text/cat/0.png"),
    "data: no ImageNet class": (["data", "imagefolder:wordnet", "--n", "1"], "'n99999999' is no ImageNet-1k class"),
    "data: MNIST that is not there": (["data", "mnist:empty"], "mnist at empty"),
    "data: MNIST without a folder": (["data", "mnist"], "mnist:DIR"),
    "data: a split MNIST has not": (["data", "mnist:empty", "--split", "val"], "train and test"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name, place, monkeypatch, capsys):
    arguments, says = COMMANDS[name]
    if "no GPU" in name and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    before = listing(place)
    monkeypatch.setattr(sys, "argv", ["harmonize", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    line = capsys.readouterr().err.strip()
    one_line(name, line.removeprefix("harmonize: "), says)
    assert listing(place) == before


@pytest.mark.parametrize(
    "arguments", [["runn"], ["run", "--parameters", "3"], ["data", "--n", "many"], ["train", "-x"]]
)
def test_usage_errors_are_the_parsers_own(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["harmonize", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and (arguments[1:] or arguments)[0] in error and "Traceback" not in error


class Returns(nn.Module):
    """A linear network whose logits something is done to."""

    def __init__(self, change: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.linear, self.change = Linear(), change
        self.eval()

    def forward(self, x):
        return self.change(self.linear(x))


def corrupt(name: str, change: Callable[[bytes], bytes]) -> None:
    path = paths.WEIGHTS / name
    path.write_bytes(change(path.read_bytes()))


def other_sha(place: Path) -> None:
    corrupt("resnet-obj.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    load_model("resnet-obj")


def lost(place: Path) -> None:
    (paths.WEIGHTS / "resnet-obj.safetensors").unlink()
    load_model("resnet-obj")


def truncated(place: Path) -> None:
    corrupt("resnet-obj.safetensors", lambda data: data[: len(data) // 2])
    load_model("resnet-obj", weights=paths.WEIGHTS / "resnet-obj.safetensors")


def garbage(place: Path) -> None:
    load_model("resnet-obj", weights=place / "file")


def unfit(place: Path) -> None:
    load_model("resnet-obj", weights=paths.WEIGHTS / "vgg-obj.safetensors")


def no_tensors(place: Path) -> None:
    torch.save([1, 2], place / "list.pth")
    try:
        load_model("resnet-obj", weights=place / "list.pth")
    finally:
        (place / "list.pth").unlink()


def pickled(place: Path) -> None:
    torch.save(SimpleNamespace(weight=1), place / "code.pth")
    try:
        load_model("resnet-obj", weights=place / "code.pth")
    finally:
        (place / "code.pth").unlink()


def no_manifest(place: Path) -> None:
    (paths.WEIGHTS / "manifest.json").write_text("{")
    load_model("resnet-obj")


def start(**values: object) -> Callable[[Path], object]:
    few = {"n_images": 3, "models": ["resnet-obj", "vgg-obj"], "methods": ["saliency"]}
    return lambda place: study.start(NAME, few | values)


def explained(**changes: object) -> Callable[[Path], object]:
    """A call of explain on a small network that would be right without the changes."""
    images = floats(3)
    call: dict[str, object] = {
        "model": small(nn.Flatten(), nn.Linear(72, 4)),
        "images": images,
        "targets": torch.tensor([0, 1, 2]),
        "method": "saliency",
    }
    return lambda place: explain(**(call | changes))  # type: ignore[arg-type]


def three_classes() -> Dataset:
    images, labels = shapes5()
    return Dataset(images, labels % 3, ("a", "b", "c"), None, tuple("12345"), "three")


def nan_images() -> torch.Tensor:
    images = floats(3)
    images[1, 0, 0, 0] = float("nan")
    return images


MODELS = [model("resnet")]
CALLS: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights missing": (lost, "resnet-obj.safetensors is missing"),
    "weights of another sha256": (other_sha, "sha256 differs"),
    "weights truncated": (truncated, "resnet-obj.safetensors: not a readable weights file"),
    "weights no such format": (garbage, "file: not a readable weights file"),
    "weights of another network": (unfit, "vgg-obj.safetensors: these weights do not fit"),
    "weights without tensors": (no_tensors, "list.pth"),
    "weights that hold code": (pickled, "code.pth: not a readable weights file"),
    "manifest damaged": (no_manifest, "manifest.json: missing or damaged"),
    "timm weights missing": (
        lambda place: load_model("timm:resnet18?weights=none.safetensors"),
        "none.safetensors is missing",
    ),
    "timm setting unknown": (
        lambda place: load_model("timm:vit_tiny_patch16_224?patches=3&weights=file"),
        "timm:vit_tiny_patch16_224",
    ),
    "timm mean no number": (lambda place: load_model("timm:resnet18?mean=x&weights=file"), "mean"),
    "no such Python module": (lambda place: load_model("python:nowhere:build"), "python:module:callable"),
    "no such callable": (lambda place: load_model("python:mine:build"), "python:module:callable"),
    "a callable without a network": (lambda place: load_model("python:mine:nothing"), "torch.nn.Module"),
    "an input size of one number": (lambda place: load_model("python:mine:oneside"), "(height, width)"),
    "a number of classes": (lambda place: load_model("python:mine:counted"), "list of names"),
    "a network without classes": (lambda place: load_model("python:mine:unnamed"), "'classes'"),
    "a device that is not there": (lambda place: load_model("resnet-obj", device="cuda:99"), "'cuda:99'"),
    "a device that does not exist": (lambda place: load_model("resnet-obj", device="gpu"), "'gpu'"),
    "run: unknown method": (start(methods=["salency"]), "did you mean 'saliency'"),
    "run: a model twice": (start(models=["vgg-obj", "vgg-obj"]), "'vgg-obj' twice"),
    "run: models of other classes": (
        start(models=["resnet-obj", "resnet-scene"]),
        "'resnet-scene' knows other classes, 10 (horizon",
    ),
    "run: an image folder of other classes": (
        start(dataset="imagefolder:photos"),
        "than imagefolder:photos has, 1 (cat",
    ),
    "run: a misspelled parameter": (start(n_image=3), "did you mean 'n_images'"),
    "NaN in images": (explained(images=nan_images()), "images hold NaN"),
    "a model that gives NaN": (explained(model=Returns(lambda y: y * float("nan"))), "NaN or infinite"),
    "a model that gives a tuple": (explained(model=Returns(lambda y: (y, y))), "returns a tuple"),
    "a model that gives maps": (explained(model=Returns(lambda y: y[..., None])), "logits must be (N, K)"),
    "a model that cuts the gradient": (explained(model=Returns(lambda y: y.detach())), "cuts the gradient"),
    "a model in train mode": (explained(model=small(nn.Flatten(), nn.Linear(72, 4)).train()), "call model.eval()"),
    "no model": (explained(model="resnet-obj"), "use load_model"),
    "a label out of range": (explained(targets=torch.tensor([0, 1, 4])), "target 4 is out of range"),
    "a negative label": (explained(targets=torch.tensor([0, -1, 2])), "target -1 is out of range"),
    "too few labels": (explained(targets=torch.tensor([0, 1])), "(3,), one class per image"),
    "labels that are no integers": (explained(targets=torch.rand(3)), "one class per image"),
    "no images": (explained(images=floats(3)[:0], targets=torch.zeros(0, dtype=torch.int64)), "N of at least 1"),
    "images of bytes for a plain network": (explained(images=floats(3).byte()), "takes float images"),
    "images without channels": (explained(images=floats(3)[:, 0]), "(N, C, H, W)"),
    "explain: unknown method": (explained(method="gradcam"), "did you mean 'grad_cam'"),
    "explain: unknown option": (explained(method="integrated_gradients", step=4), "did you mean 'steps'"),
    "explain: no steps": (explained(method="integrated_gradients", steps=0), "steps"),
    "explain: no rows": (explained(batch_size=0), "batch_size"),
    "rollout on a CNN": (
        lambda place: explain(model("resnet"), *shapes5(), "attention_rollout"),
        "attention",
    ),
    "guided backprop on a ViT": (lambda place: explain(model("vit"), *shapes5(), "guided_backprop"), "ReLU"),
    "Grad-CAM without a geometry": (explained(method="grad_cam"), "geometry is unknown"),
    "classes that are not the labels'": (
        lambda place: transfer_table(MODELS, three_classes(), ["saliency"], [0.1], 4, "mean"),
        "10 classes that are not the data set's 3",
    ),
    "transfer: k above 1": (
        lambda place: transfer_table(MODELS, load_dataset("shapes-on-scenes", n=2), ["center"], [1.5], 4, "mean"),
        "fraction=1.5",
    ),
    "mask: a patch that does not divide": (lambda place: feature_mask(torch.rand(2, 64, 64), 0.1, 7), "patch=7"),
    "mask: k of 0": (lambda place: feature_mask(torch.rand(2, 64, 64), 0, 4), "fraction=0"),
    "insertion: too many steps": (
        lambda place: insertion(model("vgg"), *shapes5(), torch.rand(5, 64, 64), steps=9999),
        "steps=9999",
    ),
    "consensus: unknown rule": (lambda place: consensus(torch.rand(2, 2, 8, 8), "meen"), "did you mean 'mean'"),
    "consensus: NaN": (lambda place: consensus(torch.full((2, 2, 8, 8), float("nan")), "mean"), "NaN"),
    "commonality out of range": (
        lambda place: load_dataset("shapes-on-scenes", n=2, commonality=11, object="disc"),
        "object",
    ),
    "an option the data set has not": (lambda place: load_dataset("shapes-on-scenes", n=2, size=64), "option"),
    "a negative seed of the images": (lambda place: load_dataset("shapes-on-scenes", n=2, seed=-1), "seed must be"),
    "half an image": (lambda place: load_dataset("shapes-on-scenes", n=2.5), "n must be a whole number"),  # type: ignore[arg-type]
    "explain: pixels of 0 to 255": (
        lambda place: explain(model("vgg"), 255 * torch.rand(2, 3, 64, 64), torch.tensor([0, 1]), "saliency"),
        "scale them to [0, 1]",
    ),
    "explain: a number for a generator": (explained(method="smoothgrad", generator=0), "torch.Generator"),
    "mask: a number for a generator": (
        lambda place: feature_mask(torch.rand(2, 64, 64), 0.1, 4, generator=0),  # type: ignore[arg-type]
        "torch.Generator",
    ),
    "mask: a patch that is no whole number": (
        lambda place: feature_mask(torch.rand(2, 64, 64), 0.1, 4.0),  # type: ignore[arg-type]
        "patch=4.0 does not divide maps of 64x64: use one of 1, 2, 4",
    ),
    "consensus: a list of maps": (
        lambda place: consensus([torch.rand(2, 8, 8)] * 2),  # type: ignore[arg-type]
        "torch.stack",
    ),
    "relevance: no masks": (lambda place: relevance_mass(torch.rand(2, 8, 8), None), "not None"),  # type: ignore[arg-type]
    "contrast: no masks": (
        lambda place: model_contrast_score(torch.rand(2, 8, 8), torch.rand(2, 8, 8), None),  # type: ignore[arg-type]
        "not None",
    ),
    "decomposition: no masks": (
        lambda place: contextual_decomposition(model("vgg"), shapes5()[0], None),  # type: ignore[arg-type]
        "not None",
    ),
    "independence: a negative threshold": (
        lambda place: input_independence_rate(*[torch.rand(2, 8, 8)] * 2, torch.ones(2, 8, 8).bool(), threshold=-1),
        "threshold must be",
    ),
    "a file in the place of a folder": (lambda place: write_atomic(place / "file" / "x.csv", "1"), "cannot write"),
    "a folder nothing can be made in": (lambda place: write_atomic(Path("/proc/1/figures/x.csv"), "1"), "cannot write"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name, place):
    call, says = CALLS[name]
    names = {path for path in listing(place) if not path.startswith("weights")}
    with warnings.catch_warnings(), pytest.raises(HarmonizeError) as error:
        warnings.simplefilter("error")
        call(place)
    one_line(name, str(error.value), says)
    assert {path for path in listing(place) if not path.startswith("weights")} == names


@pytest.mark.parametrize("length", [1, 7, 30, 150])
@pytest.mark.parametrize("listed", ["", "list_methods()"])
def test_names_that_are_listed_are_whole_and_fit_on_a_line(length, listed):
    for count in range(60):
        options = [f"{i:02d}{'x' * length}" for i in range(count)]
        line = str(unknown("method", "?" * 70, options, listed))
        assert len(line) <= 200 - len("harmonize: ")
        shown = line.partition("choose from ")[2].split(", ")
        if set(shown) != set(options) and count:
            assert shown.pop() == (f"... ({listed} lists all {count})" if listed else f"... (in all {count})")
            assert shown == options[: len(shown)]


def test_there_are_forty_cases():
    assert len(COMMANDS) + len(CALLS) >= 40


def test_a_full_disk_leaves_no_half_of_a_file(place):
    """A real file system of 64 KiB that runs full; skipped where none can be mounted."""
    (place / "disk").mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "disk"], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("no small file system can be mounted here")
    try:
        with pytest.raises(HarmonizeError) as error:
            write_atomic(place / "disk" / "table.csv", b"0" * 100_000)
        assert listing(place / "disk") == {}
    finally:
        subprocess.run(["umount", "disk"], check=True)
    one_line("a full disk", str(error.value), "No space left")


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16", "LA", "1"])
def test_images_of_every_mode_are_read_as_they_look(mode, place):
    gray = np.full((32, 32), 51, np.uint8)
    if mode == "I;16":
        image = Image.fromarray(gray.astype(np.uint16) * 257)
    elif mode in ("RGBA", "LA"):  # half transparent on white
        image = Image.fromarray(gray).convert(mode)
        image.putalpha(128)
    elif mode == "1":
        image = Image.new("1", (32, 32), 1)
    else:
        image = Image.fromarray(np.dstack([gray] * 3)).convert(mode)
    (place / "modes" / "cat").mkdir(parents=True)
    image.save(place / "modes" / "cat" / ("0.tif" if mode == "CMYK" else "0.png"))
    data = load_dataset("imagefolder:modes")
    wanted = {"RGBA": 153, "LA": 153, "1": 255}.get(mode, 51)
    assert data.images.shape == (1, 3, 224, 224)
    assert (data.images.float() - wanted).abs().max() <= 1


class Hungry(nn.Module):
    """A linear network with memory for so many rows, as a GPU has: beyond them it raises what torch raises."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.linear, self.most, self.seen = Linear(), most, []
        self.eval()

    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.linear(x)


def test_out_of_memory_halves_the_batch_and_says_so():
    hungry, images, targets = Hungry(5), floats(12), torch.arange(12) % 4
    with pytest.warns(UserWarning, match="out of memory: going on with batch_size=") as told:
        got = explain(hungry, images, targets, "saliency", batch_size=16)
    assert [str(warning.message)[-1] for warning in told] == ["8", "4"]
    assert got.record["batch_size"] == 4
    assert torch.equal(got.maps, explain(hungry.linear, images, targets, "saliency").maps)
    TOLD.append(("out of memory (a warning)", str(told[0].message)))


class Frugal(nn.Module):
    """A model with memory for so many images, for what is computed besides maps."""

    classes = tuple("0123456789")

    def __init__(self, most: int) -> None:
        super().__init__()
        self.inner, self.most = model("vgg"), most
        self.eval()

    def preprocess(self, images):
        return self.inner.preprocess(images)

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.inner(x)


def test_out_of_memory_elsewhere_halves_the_batch_too():
    images, labels = shapes5()
    maps = torch.rand(5, 64, 64, generator=torch.Generator().manual_seed(0))
    calls = {
        "predictions": lambda m, rows: predict(m, images, rows),
        "recognition": lambda m, rows: recognize(
            {"m": m},
            Dataset(images, labels, Frugal.classes, None, tuple("12345"), "five"),
            maps,
            [0.1],
            4,
            "mean",
            [False],
            0,
            rows,
        )[1],
        "insertion": lambda m, rows: insertion(m, images, labels, maps, steps=3, batch_size=rows),
    }
    for call in calls.values():
        with pytest.warns(UserWarning, match="going on with batch_size=2"):
            got = call(Frugal(3), 4)
        np.testing.assert_allclose(np.asarray(got), np.asarray(call(Frugal(3), 2)), rtol=1e-6)


def test_out_of_memory_for_one_image_is_one_line():
    with pytest.warns(UserWarning), pytest.raises(HarmonizeError) as error:
        explain(Hungry(0), floats(2), torch.zeros(2, dtype=torch.int64), "saliency", batch_size=2)
    one_line("out of memory for one image", str(error.value), "use device='cpu'")


@pytest.mark.parametrize(
    "change", [lambda d: d[:-1] + bytes([d[-1] ^ 1]), lambda d: d[:40], lambda d: b"", lambda d: b"\xff" * 90]
)
def test_a_corrupt_shard_is_computed_again_and_said(change, place):
    def compute():
        return {"maps": torch.arange(6.0)}

    remember("attribution", {"n": 1}, compute)
    path = stored_at("attribution", {"n": 1})
    good = path.read_bytes()
    path.write_bytes(change(good))
    with pytest.warns(UserWarning, match="is corrupt: computing it again") as told:
        again = remember("attribution", {"n": 1}, compute)
    assert torch.equal(again["maps"], torch.arange(6.0)) and path.read_bytes() == good
    TOLD.append(("a corrupt shard (a warning)", str(told[0].message)))


def papermill(place: Path, book: nbformat.NotebookNode, *arguments: str) -> tuple[int, list[nbformat.NotebookNode]]:
    """Run a notebook through papermill; its exit code and the errors in the notebook it leaves."""
    nbformat.write(book, place / "in.ipynb")
    done = process(
        *("papermill", "in.ipynb", "out.ipynb", "--no-progress-bar", "--log-level", "CRITICAL", *arguments),
        cwd=place,
        HARMONIZE_FIGURES=str(place / "figures"),
        HARMONIZE_CACHE=str(place / "cache"),
    )
    outputs = [output for cell in nbformat.read(place / "out.ipynb", 4).cells for output in cell.get("outputs", [])]
    return done.returncode, [output for output in outputs if output.output_type == "error"]


@pytest.mark.parametrize(
    ("name", "book", "arguments", "says"),
    [
        ("papermill: a misspelled parameter", notebook(), ["-p", "n_image", "3"], "did you mean 'n_images'"),
        ("papermill: k out of range", notebook(), ["-y", "{fractions: [0.1, 2]}"], "'fractions.1'"),
        ("papermill: a model twice", notebook(), ["-y", "{models: [vgg-obj, vgg-obj]}"], "'vgg-obj' twice"),
        (
            "papermill: a negative number of steps",
            notebook(),
            ["-y", "{methods: [integrated_gradients], options: {integrated_gradients: {steps: -4}}}"],
            "options of integrated_gradients: steps must be",
        ),
        (
            "papermill: a callable that raises",
            notebook(),
            ["-y", "{models: ['python:mine:raises', vgg-obj]}"],
            "no such file of mine",
        ),
        (
            "papermill: no parameters cell",
            nbformat.from_dict(
                notebook() | {"cells": [cell | {"metadata": {}} for cell in notebook().cells]}  # no tag at all
            ),
            ["-p", "n_images", "3"],
            "no cell tagged 'parameters'",
        ),
    ],
)
def test_in_a_notebook_a_mistake_is_one_line(name, book, arguments, says, place):
    code, errors = papermill(place, book, *arguments)
    assert code != 0
    (error,) = errors
    assert error.ename == "HarmonizeError"
    assert error.traceback == [f"HarmonizeError: {error.evalue}"]
    one_line(name, error.evalue, says)
    assert not (place / "figures").exists()


def test_commands_as_a_process(place):
    before = listing(place)
    done = process("harmonize", *given("04", "n_image", "5"), cwd=place)
    assert done.returncode == 2 and done.stdout == ""
    one_line("as a process", done.stderr.strip().removeprefix("harmonize: "), "did you mean 'n_images'")
    assert listing(place) == before
