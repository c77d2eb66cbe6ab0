"""Loading: shipped weights, geometry proved by gradients, preprocessing, and weights that are not right."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from harmonize_lib import HarmonizeError, list_models, load_dataset, load_model, paths
from harmonize_lib.models import ARCHITECTURES, Model, _family, manifest, shuffled

FAMILIES = {"vit": "transformer", "swin": "transformer", "mobilevit": "hybrid"}


def fresh(architecture: str) -> Model:
    torch.manual_seed(0)
    classes = tuple(str(i) for i in range(10))
    return Model(ARCHITECTURES[architecture](10), architecture, architecture, classes, input_size=(64, 64))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_geometry_family_and_state(architecture):
    model = fresh(architecture)
    assert model.family == FAMILIES.get(architecture, "cnn")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    geometry = model.geometry
    assert geometry is not None and min(geometry.grid) >= 4
    outputs = []
    handle = dict(model.network.named_modules())[geometry.layer].register_forward_hook(
        lambda m, a, o: outputs.append(o)
    )
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = model(x)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), outputs[0])
    places = geometry.to_maps(gradient)
    assert places.shape[2:] == geometry.grid
    assert (places.abs().flatten(1).sum(1) > 0).all()


@pytest.mark.parametrize(
    ("tag", "family"),
    [("cait_xxs24_224", "transformer"), ("skresnet18", "cnn"), ("coatnet_pico_rw_224", "hybrid")],
)
def test_family_of_other_designs(tag, family):
    assert _family(timm.create_model(tag)) == family


def test_token_geometry_is_in_reading_order():
    model = fresh("vit")
    tokens = torch.arange(1 + 64.0)[None, :, None]
    grid = model.geometry.to_maps(tokens)
    assert torch.equal(grid[0, 0], torch.arange(1, 65.0).view(8, 8))


def test_every_shipped_model_is_whole_and_recognizes():
    for name in list_models():
        model = load_model(name, device="cpu")
        if name.endswith("random_labels"):
            assert manifest()[name]["train_accuracy"] >= 0.95, name
            continue
        data = load_dataset("shapes-on-scenes", "test", 100, **manifest()[name]["labels"])
        with torch.inference_mode():
            accuracy = (model(model.preprocess(data.images)).argmax(1) == data.labels).float().mean()
        assert accuracy >= 0.85, name


def test_preprocess_takes_bytes_floats_and_one_channel():
    model = fresh("vgg")
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(model.preprocess(images), (images.float() / 255 - 0.5) / 0.5)
    torch.testing.assert_close(model.preprocess(images.float() / 255), model.preprocess(images))
    assert model.preprocess(images[:, :1]).shape == (2, 3, 64, 64)
    with pytest.raises(HarmonizeError, match="NaN"):
        model.preprocess(torch.full((1, 3, 64, 64), torch.nan))
    with pytest.raises(HarmonizeError, match="must be"):
        model.preprocess(images[0])
    with pytest.raises(HarmonizeError, match=r"reach 255: scale them to \[0, 1\]"):
        model.preprocess(torch.full((1, 3, 64, 64), 255.0))
    assert model.preprocess(torch.full((1, 3, 64, 64), 1.03)).isfinite().all()  # noise above white
    assert model.preprocess(images[:0]).shape == (0, 3, 64, 64)


def test_shuffled_keeps_values_and_loses_their_order():
    model = fresh("resnet")
    other = shuffled(model, 0)
    before, after = model.network.fc.weight, other.network.fc.weight
    assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)
    assert not torch.equal(before, after) and other.weights_hash != model.weights_hash
    assert torch.equal(shuffled(model, 0).network.fc.weight, after)


def test_identity_changes_with_whatever_results_depend_on():
    def made(mean=0.5, stride=1, seed=0):
        torch.manual_seed(seed)
        return Model(nn.Conv2d(3, 2, 3, stride), "m", "own", ("a", "b"), mean=(mean,) * 3)

    assert made().identity == made().identity and made().weights_hash == made(mean=0.4).weights_hash
    assert len({model.identity for model in (made(), made(mean=0.4), made(stride=2), made(seed=1))}) == 4


def test_timm_tag_with_local_weights_and_its_own_preprocessing(tmp_path):
    network = timm.create_model("test_vit")
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    model = load_model("timm:test_vit.r160_in1k", weights=tmp_path / "w.safetensors")
    assert model.input_size == (160, 160) and len(model.classes) == 1000 and model.architecture == "test_vit"
    x = model.preprocess(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert x.shape == (1, 3, 64, 64) and model(x).shape == (1, 1000)
    given = load_model(f"timm:test_vit?mean=0.5&std=0.5&weights={tmp_path / 'w.safetensors'}")
    assert given.mean.flatten().tolist() == [0.5] * 3


def test_python_spec(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))\n"
        "    net.classes = ('a', 'b')\n"
        "    return net\n"
        "def bad():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mine", None)
    model = load_model("python:mine:build")
    assert model.classes == ("a", "b") and model.geometry is None
    with pytest.raises(HarmonizeError, match="must return"):
        load_model("python:mine:bad")
    with pytest.raises(HarmonizeError, match="python:module:callable"):
        load_model("python:nowhere:build")


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A copy of one shipped model to spoil."""
    entries = json.loads((paths.WEIGHTS / "manifest.json").read_text())
    shutil.copy(paths.WEIGHTS / "resnet-obj.safetensors", tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"resnet-obj": entries["resnet-obj"]}))
    monkeypatch.setattr(paths, "WEIGHTS", tmp_path)
    return tmp_path


def test_altered_truncated_and_missing_weights(zoo):
    path = zoo / "resnet-obj.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(HarmonizeError, match="sha256 differs"):
        load_model("resnet-obj")
    path.write_bytes(data[:1000])
    with pytest.raises(HarmonizeError, match="not a readable weights file"):
        load_model("resnet-obj", weights=path)
    path.unlink()
    with pytest.raises(HarmonizeError, match="harmonize train resnet-obj"):
        load_model("resnet-obj")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("resnet-object", "did you mean 'resnet-obj'"),
        ("timm:resnet5000", "unknown timm model"),
        ("timm:resnet18?weights=nowhere.safetensors", "nowhere.safetensors is missing"),
    ],
)
def test_unknown_models(spec, says):
    with pytest.raises(HarmonizeError, match=says) as error:
        load_model(spec)
    assert len(str(error.value)) <= 200


def test_weights_of_another_architecture_and_pickles_with_code(tmp_path):
    with pytest.raises(HarmonizeError, match="do not fit"):
        load_model("resnet-obj", weights=paths.WEIGHTS / "vgg-obj.safetensors")
    torch.save({"a": print}, tmp_path / "code.pth")
    with pytest.raises(HarmonizeError, match="not a readable weights file"):
        load_model("resnet-obj", weights=tmp_path / "code.pth")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_absent_gpu_is_one_line():
    with pytest.raises(HarmonizeError, match="not available"):
        load_model("resnet-obj", device="cuda")
