"""Tables: their schema is checked, every row is accounted for; the simulated graph is in the data."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_diabetes

from harmonize_lib import HarmonizeError
from harmonize_lib.tabular import load_table, rewire, simulate_expression


@pytest.fixture
def frame():
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {"a": rng.normal(size=60), "b": rng.integers(5, size=60).astype(float), "y": rng.integers(2, size=60)}
    )


def test_diabetes_has_its_squares_and_products():
    table = load_table("diabetes")
    assert table.features.shape == (442, 64) and len(set(table.names)) == 64
    raw = load_diabetes(scaled=False)
    z = dict(zip(raw.feature_names, ((raw.data - raw.data.mean(0)) / raw.data.std(0)).T, strict=True))
    column = dict(zip(table.names, table.features.T, strict=True))
    np.testing.assert_allclose(column["bmi^2"], z["bmi"] ** 2)
    np.testing.assert_allclose(column["age * s5"], z["age"] * z["s5"])
    assert "sex^2" not in column  # two values: its square says nothing new
    assert table.outcome.sum() == (raw.target > np.median(raw.target)).sum()


def test_breast_cancer_counts_malignant_tumors():
    table = load_table("breast_cancer")
    assert table.features.shape == (569, 30) and table.outcome.sum() == 212 and table.meaning == "malignant tumor"


def test_csv_gives_back_what_was_written(tmp_path, frame):
    frame.loc[3, "a"] = np.nan
    frame.to_csv(tmp_path / "t.csv", index=False)
    table = load_table(f"csv:{tmp_path / 't.csv'}", "y")
    assert table.names == ("a", "b") and table.excluded == {} and table.name == "t.csv"
    np.testing.assert_allclose(table.features, frame[["a", "b"]])
    np.testing.assert_array_equal(table.outcome, frame["y"])


def test_two_files_with_row_numbers_stand_side_by_side(tmp_path, frame):
    frame[["a", "b"]].to_csv(tmp_path / "x.csv")
    frame[["y"]].to_csv(tmp_path / "y.csv")
    table = load_table(f"csv:{tmp_path / 'x.csv'},{tmp_path / 'y.csv'}", "y")
    assert table.names == ("a", "b") and len(table) == 60


def test_follow_up_becomes_an_event_within_the_horizon_and_every_row_is_counted(tmp_path, frame):
    frame = pd.concat([frame, frame], ignore_index=True)
    frame["y"] = np.tile([3.0, 12.0, -4.0, -15.0, 0.0, 10.0, -10.0, 9.5, -9.5, 20.0], 12)
    frame.to_csv(tmp_path / "t.csv", index=False)
    table = load_table(f"csv:{tmp_path / 't.csv'}", "y", horizon=10)
    np.testing.assert_array_equal(table.outcome, np.tile([1, 0, 0, 1, 0, 1, 0], 12))
    assert table.excluded == {"no follow-up": 12, "censored within 10": 24}
    assert len(table) + sum(table.excluded.values()) == len(frame)
    np.testing.assert_allclose(table.features[:2, 0], frame["a"][:2])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.assign(a=["x1", *f["a"][1:]]), "column 'a' has 'x1' in row 2"),
        (lambda f: f.assign(a=[*f["a"][:-1], np.inf]), "column 'a' has 'inf' in row 61"),
        (lambda f: f.assign(b=7.0), "column 'b' is empty or constant"),
        (lambda f: f.assign(b=np.nan), "column 'b' is empty or constant"),
        (lambda f: f.assign(y=f["y"] * 2), "outcome 'y' has the value 2: 0 or 1"),
        (lambda f: f.assign(y=[np.nan, *f["y"][1:]]), "outcome 'y' is empty in row 2"),
        (lambda f: f.assign(y=0), "every outcome is 0"),
        (lambda f: f[:20], "20 rows are left: at least 50"),
        (lambda f: f.rename(columns={"y": "why"}), "unknown outcome column of t.csv 'y'"),
    ],
)
def test_a_table_that_will_not_do_is_told_in_one_line(tmp_path, frame, change, says):
    change(frame).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(HarmonizeError) as error:
        load_table(f"csv:{tmp_path / 't.csv'}", "y")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_files_and_names_that_will_not_do(tmp_path, frame):
    with pytest.raises(HarmonizeError, match="unknown table 'diabete': did you mean 'diabetes'"):
        load_table("diabete")
    with pytest.raises(HarmonizeError, match="leave outcome and horizon out"):
        load_table("diabetes", "y")
    with pytest.raises(HarmonizeError, match="no such file"):
        load_table(f"csv:{tmp_path / 'nothing.csv'}", "y")
    with pytest.raises(HarmonizeError, match="needs a file"):
        load_table("csv:", "y")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(HarmonizeError, match=r"empty\.csv: not a readable CSV"):
        load_table(f"csv:{tmp_path / 'empty.csv'}", "y")
    frame.to_csv(tmp_path / "long.csv", index=False)
    frame[["y"]][:50].to_csv(tmp_path / "short.csv", index=False)
    with pytest.raises(HarmonizeError, match="60 and 50 rows"):
        load_table(f"csv:{tmp_path / 'long.csv'},{tmp_path / 'short.csv'}", "y")
    with pytest.raises(HarmonizeError, match="column 'a' occurs twice"):
        load_table(f"csv:{tmp_path / 'long.csv'},{tmp_path / 'long.csv'}", "y")


def test_partial_correlations_recover_the_graph_and_regression_the_effects():
    draw = simulate_expression(40_000, np.random.default_rng(0), genes=20, modules=4, drivers=2, noise=0.0)
    precision = np.linalg.inv(np.cov(draw.x.T))
    partial = -precision / np.sqrt(np.outer(np.diag(precision), np.diag(precision)))
    np.fill_diagonal(partial, 0)
    np.testing.assert_array_equal(partial > 0.06, draw.adjacency == 1)
    assert np.abs(partial[draw.adjacency == 0]).max() < 0.03
    np.testing.assert_allclose(draw.x.std(0), 1, atol=0.02)
    fitted = np.linalg.lstsq(np.maximum(draw.x, 0) - np.maximum(draw.x, 0).mean(0), draw.y - draw.y.mean(), rcond=None)
    ratio = fitted[0][draw.effects != 0] / draw.effects[draw.effects != 0]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
    np.testing.assert_allclose(fitted[0][draw.effects == 0], 0, atol=1e-9)


def test_effects_are_alike_inside_a_module_and_no_edge_leaves_it():
    draw = simulate_expression(10, np.random.default_rng(1), genes=30, modules=5, drivers=3)
    blocks = draw.effects.reshape(5, 6)
    driven = np.abs(blocks).sum(1) > 0
    assert driven.sum() == 3
    for block in blocks[driven]:
        assert len(set(np.sign(block))) == 1 and np.abs(block).max() / np.abs(block).min() <= 1.5
    module = np.arange(30) // 6
    assert draw.adjacency[module[:, None] != module].sum() == 0
    assert (draw.adjacency == draw.adjacency.T).all() and (draw.adjacency.sum(1) >= 2).all()
    with pytest.raises(HarmonizeError, match="modules are equal"):
        simulate_expression(10, np.random.default_rng(0), genes=31, modules=5)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_rewiring_moves_as_many_edges_as_it_says(share):
    true = simulate_expression(2, np.random.default_rng(2)).adjacency
    moved = rewire(true, share, np.random.default_rng(3))
    assert (moved == moved.T).all() and moved.sum() == true.sum() and np.diag(moved).sum() == 0
    edges = true.sum() / 2
    assert (moved * true).sum() / 2 == edges - round(share * edges)
