"""The explorer: its numbers are those of notebooks 04 and 05, and its controls change what a live notebook shows."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from harmonize_lib import explorer, paths, runner, study
from harmonize_lib.consensus import consensus
from harmonize_lib.data import load_dataset
from harmonize_lib.errors import HarmonizeError
from harmonize_lib.explorer import FLOORS, OTHERS, OWN, View
from harmonize_lib.features import patch_scores
from harmonize_lib.models import load_model
from harmonize_lib.parameters import check
from harmonize_lib.study import Run
from harmonize_lib.transfer import recognize

FEW = {"n_images": 6, "models": ["resnet-obj", "mobilenet-obj", "vit-obj"], "fractions": [0.05, 0.2], "image": 3}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")


def start(**values: object) -> Run:
    settings = check("14_explorer", FEW | values)
    models = {name: load_model(name, device="cpu") for name in settings.models}
    dataset = load_dataset(settings.dataset, "test", settings.n_images, settings.seed)
    return Run("14_explorer", settings, dataset, models, Path(), 0.0)


def test_own_maps_and_the_consensus_of_the_others():
    run = start()
    view = explorer.first_view(run)
    assert view == View(3, -1, "saliency", "mean", 0.05)
    found = explorer.selections(run, view)
    maps = {name: study.attributions(model, run.dataset, "saliency")["maps"] for name, model in run.models.items()}
    for name in run.models:
        assert list(found[name]) == [OWN, OTHERS, *FLOORS]
        torch.testing.assert_close(found[name][OWN], maps[name][3])
        others = torch.stack([patch_scores(maps[other][3:4], 4) for other in run.models if other != name])
        literal = consensus(others, "mean")[0].repeat_interleave(4, 0).repeat_interleave(4, 1)
        torch.testing.assert_close(found[name][OTHERS], literal)


def test_recognition_is_that_of_the_study_and_ends_with_the_whole_image():
    run = start()
    view = explorer.first_view(run)
    selected = explorer.selections(run, view)
    table = explorer.recognition(run, view, selected).set_index(["model", "map", "fraction"])
    assert len(table) == 3 * 4 * 3
    assert len(explorer.recognition(start(fractions=[0.05, 1.0]), view, selected)) == 3 * 4 * 2
    for name, model in run.models.items():
        for kind in (OWN, OTHERS, "edges"):
            maps = torch.stack([selected[name][kind]] * 6)
            correct, p = recognize({name: model}, run.dataset, maps, [0.05, 0.2])
            for i, fraction in enumerate((0.05, 0.2)):
                row = table.loc[(name, kind, fraction)]
                assert row["probability"] == pytest.approx(p[i, 0, 0, 3], rel=1e-4)
                assert row["recognized"] == correct[i, 0, 0, 3]
        with torch.inference_mode():
            whole = model(model.preprocess(run.dataset.images[3:4])).softmax(1)[0]
        row = table.loc[(name, "random", 1.0)]
        assert row["probability"] == pytest.approx(float(whole[run.dataset.labels[3]]), rel=1e-4)
        assert row["predicted"] == run.dataset.classes[whole.argmax()]


def test_another_class_is_explained_and_looked_for():
    run = start()
    label = int(run.dataset.labels[3])
    own, other = (View(3, target, "saliency", "mean", 0.05) for target in (-1, (label + 1) % 10))
    same = explorer.selections(run, own._replace(target=label))
    first, second = (explorer.selections(run, view) for view in (own, other))
    assert all(torch.equal(first[name][OWN], same[name][OWN]) for name in run.models)
    assert not any(torch.equal(first[name][OWN], second[name][OWN]) for name in run.models)
    assert all(torch.equal(first[name]["edges"], second[name]["edges"]) for name in run.models)
    name = "resnet-obj"
    kinds = {name: {OWN: first[name][OWN]}, **{other: {OWN: first[other][OWN]} for other in list(run.models)[1:]}}
    a, b = (explorer.recognition(run, view, kinds)["probability"] for view in (own, other))
    assert (a + b <= 1 + 1e-9).all() and not (a == b).any()


def test_models_that_a_method_is_not_defined_for_have_the_consensus_alone():
    run = start()
    found = explorer.selections(run, View(0, -1, "attention_rollout", "mean", 0.05))
    assert list(found["vit-obj"]) == [OWN, *FLOORS]  # nobody else has a map
    assert list(found["resnet-obj"]) == [OTHERS, *FLOORS]
    figure, lines, table = explorer.draw(run, View(0, -1, "attention_rollout", "mean", 0.05))
    assert {text.get_text() for text in lines.legends[0].get_texts()} == {OWN, OTHERS, "Edges", "Random"}
    assert sum("not defined" in ax.get_title() for ax in figure.axes) == 3
    assert len(table) == 3 * 3 * 3
    few = start(models=["resnet-obj", "mobilenet-obj"])
    with pytest.raises(HarmonizeError, match="attention_rollout is defined for none of the models: "):
        explorer.selections(few, View(0, -1, "attention_rollout", "mean", 0.05))


def test_data_without_masks_leave_the_mask_out():
    run = start()
    bare = replace(run, dataset=replace(run.dataset, masks=None))
    figure, _, _ = explorer.draw(bare, explorer.first_view(bare))
    titles = [ax.get_title() for ax in figure.axes]
    assert "object mask" not in titles and "image" in titles


def test_no_map_is_made_before_it_is_asked_for():
    assert runner.missing_maps([check("14_explorer", FEW)]) == []


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"image": 6}, "image=6, but n_images=6: the last one is 5"),
        ({"rule": "meen"}, "unknown rule 'meen': did you mean 'mean'?"),
        ({"methods": ["edges"]}, "edges is a control"),
        ({"fraction": 0.1}, "fraction must be one of fractions"),
    ],
)
def test_refuses_in_one_line(values, line):
    with pytest.raises(HarmonizeError, match=line.replace("?", r"\?")):
        check("14_explorer", FEW | values)


def live(tmp_path: Path, *sources: str) -> nbformat.NotebookNode:
    """A notebook in which a reader touched the controls, with what it shows in the end."""
    values = "\n".join(f"{name} = {value!r}" for name, value in FEW.items())
    begin = 'from harmonize_lib import explorer, study\nrun = study.start("14_explorer", globals())'
    cells = [
        values,
        begin,
        "controls = explorer.explore(run, explorer.draw(run, explorer.first_view(run))[:2])",
        *sources,
    ]
    notebook = new_notebook(cells=[new_code_cell(source) for source in cells])
    environment = os.environ | {"HARMONIZE_CACHE": str(tmp_path), "PYTHONPATH": str(paths.ROOT), "TQDM_DISABLE": "1"}
    NotebookClient(notebook, kernel_name="python3", timeout=600).execute(env=environment)
    return notebook


def pictures(notebook: nbformat.NotebookNode) -> list[str]:
    return [output.data["image/png"] for output in notebook.cells[2].outputs if "image/png" in output.data]


def said(notebook: nbformat.NotebookNode) -> list[str]:
    widgets = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    return [widget["state"]["value"] for widget in widgets if widget["model_name"] == "HTMLModel"]


def test_controls_change_the_pictures_in_place(tmp_path):
    before = live(tmp_path)
    wider = live(tmp_path, 'controls["fraction"].value = 0.2')
    back = live(tmp_path, 'controls["fraction"].value = 0.2\ncontrols["fraction"].value = 0.05')
    image = live(tmp_path, 'controls["image"].value = 4')
    target = live(tmp_path, 'controls["target"].value = (int(run.dataset.labels[3]) + 1) % 10')
    assert all(len(pictures(notebook)) == 2 for notebook in (before, wider, back, image, target))
    assert pictures(back) == pictures(before)
    for changed in (wider, image, target):
        assert all(a != b for a, b in zip(pictures(before), pictures(changed), strict=True))
    assert said(before) == said(back) == [""]


def test_what_cannot_be_shown_is_said_and_the_pictures_stay(tmp_path):
    before = live(tmp_path)
    refused = live(tmp_path, """run.models.pop("vit-obj")\ncontrols["method"].value = "attention_rollout\"""")
    (line,) = said(refused)
    assert line.startswith("attention_rollout is defined for none of the models: ") and "\n" not in line
    assert pictures(refused) == pictures(before)
