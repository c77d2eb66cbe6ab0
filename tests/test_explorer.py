"""The explorer shows what its choice asks for: maps, features and predictions against direct calls."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import tiny
import torch
from PIL import Image

from harmonize_lib import HarmonizeError, consensus, explain, explorer, feature_mask, load_dataset, parameters
from harmonize_lib.study import Run


@pytest.fixture
def run(monkeypatch, tmp_path) -> Run:
    monkeypatch.setattr("harmonize_lib.paths.CACHE", tmp_path / "cache")
    models = {name: tiny.model(name) for name in ("vgg", "vit")}
    methods = ["saliency", "guided_backprop", "attention_rollout"]
    settings = parameters.Explorer(models=list(models), methods=methods)
    return Run("14_explorer", settings, load_dataset("shapes-on-scenes", "test", 3), models, tmp_path, 0.0)


def test_choices_are_what_is_defined(run):
    assert explorer.choices(run) == {
        "vgg": ["saliency", "guided_backprop"],
        "vit": ["saliency", "attention_rollout"],
        explorer.CONSENSUS: ["saliency"],
    }


def test_a_view_is_the_map_its_features_and_what_every_model_sees(run):
    images, labels = run.dataset.images[1:2], run.dataset.labels[1:2]
    single = explorer.look(run, 1, "vit", "saliency", "mean", 0.1)
    maps = {name: explain(model, images, labels, "saliency").maps for name, model in run.models.items()}
    torch.testing.assert_close(single.map, maps["vit"][0])
    mask = feature_mask(maps["vit"], 0.1, 4, torch.Generator().manual_seed(0))[0]
    assert torch.equal(single.features[:, mask], images[0][:, mask])
    assert len(single.features[:, ~mask].unique(dim=1).T) == 1
    together = explorer.look(run, 1, explorer.CONSENSUS, "saliency", "median", 0.1)
    torch.testing.assert_close(together.map, consensus(torch.stack(list(maps.values())), "median")[0])
    for shown, pixels in (("image", images), ("features", single.features[None])):
        for name, model in run.models.items():
            row = single.seen[(single.seen["model"] == name) & (single.seen["shown"] == shown)].iloc[0]
            expected = model(model.preprocess(pixels)).softmax(1)[0]
            assert row["probability"] == pytest.approx(float(expected[labels[0]]), rel=1e-5)
            assert row["prediction"] == model.classes[int(expected.argmax())]


def test_methods_follow_the_model_that_is_chosen(run):
    panel = explorer.explorer(run)
    _, model, method, *_ = panel.children[0].children
    method.value = "guided_backprop"
    model.value = "vit"
    assert method.options == ("saliency", "attention_rollout") and method.value == "saliency"
    method.value = "attention_rollout"
    model.value = explorer.CONSENSUS
    assert method.options == ("saliency",) and method.value == "saliency"
    plt.close("all")


def test_a_picture_from_outside_is_explained_as_what_each_model_takes_it_for(run, tmp_path):
    Image.new("RGB", (90, 70), (200, 30, 60)).save(tmp_path / "own.png")
    rows, names, seen = explorer.outside(run, str(tmp_path / "own.png"))
    assert [len(row) for row in rows] == [3, 3] and len(names) == len(seen) == 2
    for row, model, told in zip(rows, run.models.values(), seen.itertuples(), strict=True):
        picture = row[0][0][None]
        probabilities = model(model.preprocess(picture)).softmax(1)[0]
        assert told.prediction == model.classes[int(probabilities.argmax())]
        assert told.probability == pytest.approx(float(probabilities.max()), rel=1e-5)
        maps = explain(model, picture, probabilities.argmax()[None], "saliency").maps
        torch.testing.assert_close(row[1][0], maps[0])
    with pytest.raises(HarmonizeError, match="not a readable image"):
        explorer.outside(run, str(tmp_path / "none.png"))
