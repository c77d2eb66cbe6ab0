"""Parameters: the notebooks' cells are generated from the models, papermill reads them, mistakes get one line."""

from __future__ import annotations

import re

import nbformat
import papermill
import pytest
import torch
import yaml

from harmonize_lib import HarmonizeError, list_models, load_dataset, load_model, paths
from harmonize_lib.attribution import METHODS, check_options
from harmonize_lib.parameters import BAM_OPTIONS, CHEAP, NOTEBOOKS, check, known, parameters_cell
from harmonize_lib.study import check_classes


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_the_committed_cell_is_the_generated_one(notebook):
    book = nbformat.read(paths.NOTEBOOKS / f"{notebook}.ipynb", as_version=4)
    tagged = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    assert [cell.source for cell in tagged] == [parameters_cell(notebook)]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_papermill_knows_type_default_and_meaning(notebook):
    told = papermill.inspect_notebook(str(paths.NOTEBOOKS / f"{notebook}.ipynb"))
    fields = NOTEBOOKS[notebook].model_fields
    assert list(told) == list(fields)
    for name, info in fields.items():
        assert told[name]["inferred_type_name"] == type(info.default).__name__
        assert told[name]["help"] == info.description


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_no_cell_is_longer_than_a_dozen_lines(notebook):
    book = nbformat.read(paths.NOTEBOOKS / f"{notebook}.ipynb", as_version=4)
    code = [
        cell for cell in book.cells if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", [])
    ]
    assert max(len(cell.source.splitlines()) for cell in code) <= 14


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_defaults_pass_and_ipython_names_are_ignored(notebook):
    assert check(notebook, {"_i1": "x", "In": [], "Out": {}, "exit": print}) == NOTEBOOKS[notebook]()


def test_whole_numbers_are_fine_floats():
    assert check("04_cross_architecture_transfer", {"fractions": [0.1, 1], "fraction": 1}).fractions == [0.1, 1.0]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"n_image": 5}, "did you mean 'n_images'"),
        ({"n_images": 1}, "'n_images'.*greater than or equal to 2; got '1'"),
        ({"n_images": "many"}, "'n_images'.*valid integer"),
        ({"n_images": 2.5}, "'n_images'.*valid integer"),
        ({"n_images": True}, "'n_images'.*valid integer"),
        ({"fractions": [0.1, 1.5]}, "'fractions.1'.*less than or equal to 1"),
        ({"fractions": [0.1]}, "'fractions'.*at least 2"),
        ({"fill": "gray"}, "'fill'.*'mean', 'blur' or 'road'"),
        ({"models": "resnet-obj"}, "'models'.*valid list"),
        ({"fraction": 0.04}, "'fraction'.*one of fractions; got '0.04'"),
        ({"seed": -1}, "'seed'.*greater than or equal to 0"),
    ],
)
def test_mistakes_name_the_parameter_in_one_line(values, says):
    with pytest.raises(HarmonizeError) as error:
        check("04_cross_architecture_transfer", values)
    line = str(error.value)
    assert re.search(says, line), line
    assert "\n" not in line and len(line) <= 200


@pytest.mark.parametrize(
    ("notebook", "values", "message"),
    [
        ("04_cross_architecture_transfer", {"methods": ["saliency", "random"]}, "random is a control"),
        ("07_bam", {"methods": ["edges"]}, "edges is a control"),
        ("09_attribution_priors", {"dataset": "imagefolder:photos"}, "runs on shapes-on-scenes alone"),
        ("01_data_and_models", {"methods": ["saliency"]}, "unknown parameter"),
    ],
)
def test_what_a_notebook_would_ignore_or_average_wrongly_is_refused(notebook, values, message):
    with pytest.raises(HarmonizeError, match=message):
        check(notebook, values)
    assert check("02_attribution_extraction", {"methods": ["saliency", "random"]}).methods == ["saliency", "random"]


@pytest.mark.parametrize("path", sorted((paths.NOTEBOOKS / "profiles").glob("*/*.yaml")), ids=lambda p: p.parent.name)
def test_profiles_pass(path):
    told = yaml.safe_load(path.read_text())
    settings = check(path.stem, told)
    assert told and {name: getattr(settings, name) for name in told} == told


@pytest.mark.parametrize(
    ("notebook", "values", "message"),
    [
        ("03_feature_images", {"models": ["vgg-obj", "resnet-obj", "vgg-obj"]}, "'models' has 'vgg-obj' twice"),
        ("12_transformations_and_wavelets", {"sparsities": [0.1, 0.1]}, "'sparsities' has '0.1' twice"),
        ("12_transformations_and_wavelets", {"wavelets": ["bior2.2"]}, "choose from|did you mean"),
        ("09_attribution_priors", {"sigmas": [0, float("inf")]}, "'sigmas.1'.*finite number"),
        ("09_attribution_priors", {"horizon": float("nan")}, "'horizon'"),
        ("09_attribution_priors", {"consensus_method": "random"}, "unknown method 'random'"),
        ("04_cross_architecture_transfer", {"models": [{"timm": "resnet18"}, "vgg-obj"]}, "as in timm:resnet18"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(notebook, values, message):
    with pytest.raises(HarmonizeError, match=message):
        check(notebook, values)


def test_layers_may_be_equally_wide_and_models_share_a_judge():
    settings = check("09_attribution_priors", {"hidden": [8, 8], "judges": ["vit-obj", "vit-obj"]})
    assert settings.hidden == [8, 8] and settings.judges == ["vit-obj", "vit-obj"]


@pytest.mark.parametrize("notebook", [name for name in NOTEBOOKS if known(name)])
def test_what_is_listed_as_known_is_taken(notebook):
    names = known(notebook)
    assert check(notebook, names).models == names["models"]
    if not getattr(NOTEBOOKS[notebook], "controls_apart", True):
        assert names["methods"] == list(METHODS)


def test_models_are_listed_that_know_the_classes():
    dataset = load_dataset("shapes-on-scenes", n=2)
    listed = known("04_cross_architecture_transfer")["models"]
    for name in list_models():
        if name in listed:
            check_classes(load_model(name), dataset)
        else:
            with pytest.raises(HarmonizeError, match="other classes"):
                check_classes(load_model(name), dataset)


@pytest.mark.parametrize("side", [64, 224])
def test_options_are_tried_without_touching_the_global_generator(side):
    state = torch.get_rng_state()
    for options in (CHEAP, BAM_OPTIONS):
        for method, chosen in options.items():
            if method != "expected_gradients" or side == 64:  # needs references for images of another size
                check_options(method, chosen, side)
    with pytest.raises(HarmonizeError, match="options of occlusion: stride"):
        check_options("occlusion", {"patch": side + 1}, side)
    assert torch.equal(torch.get_rng_state(), state)
