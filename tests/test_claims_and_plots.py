"""Verdicts follow the criteria; figures carry their numbers and provenance and are the same byte for byte."""

from __future__ import annotations

import json
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from harmonize_lib import HarmonizeError, Interval, claims, paths, plots
from harmonize_lib.storage import sha256_file


@pytest.mark.parametrize(
    ("name", "interval", "verdict"),
    [
        ("transfer", (0.8, 0.6, 0.9, 50), "reproduced"),
        ("transfer", (0.6, 0.4, 0.9, 50), "partly"),
        ("transfer", (0.1, -0.1, 0.3, 50), "not reproduced"),
        ("inconsistency", (-0.2, -0.3, -0.1, 50), "reproduced"),
        ("inconsistency", (-0.2, -0.5, 0.1, 50), "partly"),
        ("inconsistency", (0.2, 0.1, 0.3, 50), "not reproduced"),
        ("harmonized_detects", (0.1, 0.05, 0.15, 50), "reproduced"),
        ("harmonized_detects", (-0.1, -0.15, 0.05, 50), "not reproduced"),
        ("family", (float("nan"), float("nan"), float("nan"), 50), "not testable here"),
        ("family", (0.1, 0.05, 0.2, 0), "not testable here"),
    ],
)
def test_the_criterion_decides(tmp_path, name, interval, verdict):
    table = claims.write_claims(tmp_path, {name: Interval(*interval)})
    claim = claims.CLAIMS[name]
    said = {field: getattr(claim, field) for field in ("source", "reported", "measured", "criterion")}
    assert table.iloc[0][[*said, "verdict"]].to_dict() == said | {"verdict": verdict}


def test_ledger_gathers_notebooks_in_order_and_is_drawn_in_the_readme(tmp_path):
    for notebook, name in (("04_b", "family"), ("03_a", "selectivity")):
        (tmp_path / notebook).mkdir()
        claims.write_claims(tmp_path / notebook, {name: Interval(0.1, 0.05, 0.2, 9)})
    ledger = claims.merge_claims(tmp_path)
    assert ledger["id"].tolist() == ["selectivity", "family"]
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- claims -->\nold\n<!-- /claims -->\nafter\n")
    claims.update_readme(readme, ledger)
    claims.update_readme(readme, ledger)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("-->\nafter\n") and "old" not in text
    assert text.count("**reproduced**") == 1 and text.count("**not reproduced**") == 1


def test_verdicts_of_another_run_are_compared_where_both_can_be_tested(tmp_path):
    nothing = Interval(float("nan"), float("nan"), float("nan"), 0)
    here = {"transfer": Interval(0.8, 0.6, 0.9, 50), "inconsistency": Interval(-0.2, -0.3, -0.1, 50)}
    here = claims.write_claims(tmp_path / "here", here | {"family": Interval(0.1, 0.05, 0.2, 50)})
    there = {"transfer": Interval(0.7, 0.6, 0.8, 200), "inconsistency": Interval(0.2, 0.1, 0.3, 200)}
    claims.write_claims(tmp_path / "there", there | {"family": nothing})
    said = claims.elsewhere_in_words(here, tmp_path / "there").splitlines()
    assert "reproduced there, 0.7000 [0.6000, 0.8000], n = 200; reproduced here, 0.8000." in said[0]
    assert "not reproduced there, 0.2000" in said[1] and "not testable there; reproduced here, 0.1000." in said[2]
    assert said[-1].startswith("1 of 2 verdicts that can be tested there are the same. A verdict asks for")
    assert len(claims.elsewhere_in_words(here, tmp_path / "here").splitlines()) == 2  # the same data say nothing
    assert claims.elsewhere_in_words(here, tmp_path / "photos" / "04").startswith("No run on other data")


def test_unknown_claim(tmp_path):
    with pytest.raises(HarmonizeError, match="unknown claim"):
        claims.write_claims(tmp_path, {"nonsense": Interval(0, 0, 0, 1)})


def draw():
    plots.style()
    figure, ax = plt.subplots()
    table = pd.DataFrame({"x": [1, 2], "line": "random", "mean": [0.1, 0.2], "low": [0.0, 0.1], "high": [0.2, 0.3]})
    plots.curves(ax, table, "x", "line", "title", ["random"])
    return figure, table


def test_a_figure_has_four_files_that_match_its_provenance_and_repeat(tmp_path):
    for folder in ("a", "b"):
        figure, table = draw()
        plots.save_figure(figure, table, tmp_path / folder, "name", {"n": 1}, {"m": "hash"}, 1.5)
        plt.close(figure)
    told = json.loads((tmp_path / "a" / "name.json").read_text())
    assert told["parameters"] == {"n": 1} and told["weights"] == {"m": "hash"} and told["seconds"] == 1.5
    for ending in ("svg", "png", "csv"):
        path = tmp_path / "a" / f"name.{ending}"
        assert told["sha256"][ending] == sha256_file(path) == sha256_file(tmp_path / "b" / f"name.{ending}")
    saved = pd.read_csv(tmp_path / "a" / "name.csv")
    np.testing.assert_allclose(saved["mean"], [0.1, 0.2])


def test_labels_are_for_readers():
    assert plots.label("grad_cam") == "Grad-CAM" and plots.label("vit-obj-s1") == "ViT (seed 1)"
    assert plots.label("timm:vit_tiny_patch16_224") == "vit tiny patch16 224"


def test_every_claim_belongs_to_one_notebook_which_says_its_criterion_before_the_run():
    asked = [name for names in claims.JUDGED.values() for name in names]
    assert sorted(asked) == sorted(claims.CLAIMS)
    for notebook, names in claims.JUDGED.items():
        text = claims.criteria(notebook)
        assert all(claims.CLAIMS[name].criterion in text for name in names) and text.count("\n- ") == len(names)
    ledger = pd.read_csv(paths.FIGURES / "claims.csv")
    assert ledger.groupby("notebook")["id"].apply(tuple).to_dict() == claims.JUDGED


def test_titles_of_claims_differ_and_fit_their_tile():
    titles = [claim.title for claim in claims.CLAIMS.values()]
    assert len(set(titles)) == len(titles)
    assert max(len(textwrap.wrap(title, 19)) for title in titles) <= 3


def test_lines_beyond_the_colors_of_the_palette_are_still_told_apart():
    table = pd.DataFrame({"k": [1, 2] * 12, "method": np.repeat([f"m{i}" for i in range(12)], 2), "mean": 0.5})
    ax = plt.figure().add_subplot()
    plots.curves(ax, table.assign(low=0.4, high=0.6), "k", "method", "")
    assert len({(line.get_color(), line.get_marker()) for line in ax.lines}) == 12
    plt.close("all")
