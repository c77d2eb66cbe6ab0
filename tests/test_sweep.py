"""Sweeps: the file is checked before anything starts, folders stay inside, and the table is tidy."""

from __future__ import annotations

import math
import shutil

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import yaml

from harmonize_lib import HarmonizeError, paths
from harmonize_lib.claims import write_claims
from harmonize_lib.statistics import Interval
from harmonize_lib.sweep import draw, find_notebook, folder_of, read_sweep, results, slug

GOOD = {"notebook": "03", "base": {"n_images": 20}, "grid": {"fill": ["mean", "blur"], "patch": [2, 4, 8]}}


def written(tmp_path, told):
    path = tmp_path / "grid.yaml"
    path.write_text(told if isinstance(told, str) else yaml.safe_dump(told))
    return path


def test_every_combination_in_the_order_of_the_grid(tmp_path):
    sweep = read_sweep(written(tmp_path, GOOD))
    assert sweep.notebook == "03_feature_images"
    assert [(values["fill"], values["patch"]) for values in sweep.sets] == [
        ("mean", 2), ("mean", 4), ("mean", 8), ("blur", 2), ("blur", 4), ("blur", 8),
    ]  # fmt: skip
    assert all(values["n_images"] == 20 for values in sweep.sets)
    assert sweep.varied(sweep.sets[4]) == {"fill": "blur", "patch": 4}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("notebook: [", "grid.yaml is no YAML"),
        ("- 1", "holds notebook: and grid:"),
        ("!!python/object/apply:os.system ['true']", "is no YAML"),
        ({"grids": {}}, "unknown key in grid.yaml 'grids': did you mean 'grid'"),
        ({"notebook": "77"}, "unknown notebook '77'"),
        ({"notebook": "no/such/03.ipynb"}, "no such notebook"),
        ({"grid": {}}, "must hold parameters with lists"),
        ({"grid": [1]}, "must hold parameters with lists"),
        ({"base": 3}, "must hold parameters with lists"),
        ({"grid": {"patch": 4}}, "patch must be a list of values"),
        ({"grid": {"patch": []}}, "patch must be a list of values"),
        ({"grid": {"patch": [4, 4]}}, "lists a value twice"),
        ({"grid": {"n_images": [4, 5]}}, "in base: and in grid:"),
        ({"grid": {"output": ["a", "b"]}}, "choose the folder with --out"),
        ({"base": {"output": "a"}}, "choose the folder with --out"),
        ({"grid": {"pach": [4]}}, "did you mean 'patch'"),
        ({"grid": {'open("x","w").close(); z': [4]}}, "unknown parameter of 03_feature_images"),
        ({"grid": {"patch": [4, "four"]}}, "'patch'.*valid integer"),
        ({"base": {"dataset": "shapes-on-scenes"}, "grid": {"patch": [1, 2]}}, None),
        ("notebook: 3\nbase: {dataset: 2020-01-01}\ngrid: {patch: [1, 2]}", "'dataset'.*is no JSON value"),
        ("notebook: 3\ngrid: {patch: [.nan, 2]}", "'patch'.*is no JSON value"),
        ("notebook: 3\ngrid: {patch: [1, 2], patch: [4, 8]}", "grid.yaml: patch is given twice"),
        ("notebook: 3\nbase: {n_images: 4}\ngrid: {patch: [1, 2]}\nbase: {}", "grid.yaml: base is given twice"),
        ("notebook: 3\ngrid: {options: [&a {x: *a}, {}]}", "'options'.*is no JSON value"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, change, says):
    path = written(tmp_path, change if isinstance(change, str) else GOOD | change)
    if says is None:
        assert read_sweep(path).sets
        return
    with pytest.raises(HarmonizeError, match=says) as error:
        read_sweep(path)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 200
    assert [file.name for file in tmp_path.iterdir()] == ["grid.yaml"]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(HarmonizeError, match=r"none.yaml cannot be read"):
        read_sweep(tmp_path / "none.yaml")


def test_folders_stay_inside_and_differ(tmp_path):
    wild = [
        {"x": "../../etc"},
        {"x": "/etc"},
        {"x": ".."},
        {"x": "{y.__class__}"},
        {"x": "a" * 500},
        {"x": "a b"},
        {"x": "a.b"},
    ]
    folders = [folder_of(tmp_path / "out", values) for values in wild]
    assert all(folder.parent == (tmp_path / "out").resolve() for folder in folders)
    assert len(set(folders)) == len(wild) and max(len(folder.name) for folder in folders) <= 80
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / slug(wild[0])).symlink_to(tmp_path)
    with pytest.raises(HarmonizeError, match="leads outside"):
        folder_of(tmp_path / "out", wild[0])


@pytest.mark.parametrize("name", ["3", "03", "03_feature_images"])
def test_notebooks_by_number_or_name(name):
    assert find_notebook(name) == "03_feature_images"


def test_a_path_means_the_repositorys_own_notebook(tmp_path, monkeypatch):
    own = paths.NOTEBOOKS / "03_feature_images.ipynb"
    monkeypatch.chdir(paths.ROOT)
    assert find_notebook(str(own)) == find_notebook("notebooks/03_feature_images.ipynb") == "03_feature_images"
    (tmp_path / "link.ipynb").symlink_to(own)
    assert find_notebook(str(tmp_path / "link.ipynb")) == "03_feature_images"


@pytest.mark.parametrize("name", ["03_feature_images.ipynb", "03.ipynb", "03.py", "03_feature_images"])
def test_a_copy_elsewhere_is_not_the_repositorys_notebook(tmp_path, name):
    shutil.copy(paths.NOTEBOOKS / "03_feature_images.ipynb", tmp_path / name)
    with pytest.raises(HarmonizeError, match=f"{name} is no notebook of this repository") as error:
        find_notebook(str(tmp_path / name))
    assert len(str(error.value)) <= 200
    with pytest.raises(HarmonizeError, match="is no notebook of this repository"):
        read_sweep(written(tmp_path, GOOD | {"notebook": str(tmp_path / name)}))
    (tmp_path / name).unlink()
    with pytest.raises(HarmonizeError, match=r"no such notebook|unknown notebook"):
        find_notebook(str(tmp_path / name))


def test_one_row_per_set_and_estimate(tmp_path):
    """Two sets of results made by hand come back as one table with their parameters beside them."""
    done = []
    for i, fill in enumerate(["mean", "blur"]):
        folder = tmp_path / fill / "03_feature_images"
        write_claims(folder, {"selectivity": Interval(-0.2 - i, -0.3 - i, -0.1 - i, 20, 0.01)})
        summary = pd.DataFrame(
            {
                "line": ["a", "a"],
                "fraction": [0.1, 0.5],
                "mean": [i, 1.5],
                "low": 0.0,
                "high": 2.0,
                "n": 20,
                "panel": "p",
            }
        )
        summary.to_csv(folder / "curves.csv", index=False)
        pd.DataFrame({"image": ["x"]}).to_csv(folder / "gallery.csv", index=False)
        done.append(({"fill": fill, "patch": 4}, tmp_path / fill))
    table = results("03_feature_images", done)
    assert list(table) == ["fill", "patch", "result", "what", "mean", "low", "high", "n", "verdict"]
    assert table[["fill", "result", "what"]].to_numpy().tolist() == [
        [fill, result, what]
        for fill in ("mean", "blur")
        for result, what in (
            ("claims", "selectivity"),
            ("curves", "line=a, panel=p, fraction=0.1"),
            ("curves", "line=a, panel=p, fraction=0.5"),
        )
    ]
    claims = table[table["result"] == "claims"]
    assert claims[["mean", "low", "high", "n"]].to_numpy().tolist() == [[-0.2, -0.3, -0.1, 20], [-1.2, -1.3, -1.1, 20]]
    assert claims["verdict"].tolist() == ["reproduced"] * 2 and table["patch"].tolist() == [4] * 6
    figure = draw(table, {"fill": ["mean", "blur"], "patch": [4]}, "title")
    (ax,) = figure.axes
    bars = [line for line in ax.containers]
    assert len(bars) == 1 and bars[0].lines[0].get_ydata().tolist() == [-0.2, -1.2]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["mean", "blur"]
    unmeasured = table.assign(what="family", mean=math.nan, low=math.nan, high=math.nan)
    again = draw(pd.concat([unmeasured, table]), {"fill": ["mean", "blur"], "patch": [4]}, "title")
    assert len(again.axes) == 1 and again.axes[0].get_title() == ax.get_title()
    plt.close("all")


def test_no_results_is_an_empty_table():
    assert len(results("03_feature_images", [])) == 0
