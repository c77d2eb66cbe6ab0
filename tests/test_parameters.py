"""Parameters: the notebooks' cells are generated from the models, papermill reads them, mistakes get one line."""

from __future__ import annotations

import re

import nbformat
import papermill
import pytest

from harmonize_lib import HarmonizeError, paths
from harmonize_lib.parameters import NOTEBOOKS, check, parameters_cell


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
