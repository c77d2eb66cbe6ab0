import pandas as pd
import pytest
import torch

from harmonize_lib import paths
from harmonize_lib.data import Dataset
from harmonize_lib.extraction import (
    against_captum,
    completeness_table,
    cost_table,
    extract,
    refusals,
    throughput,
    what_runs,
)
from harmonize_lib.models import Model
from harmonize_lib.study import cost_estimate

METHODS = ["saliency", "integrated_gradients", "attention_rollout", "random"]


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)


@pytest.fixture
def models():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 3),
    )
    return {"m": Model(layers, "m", "tiny", ("a", "b", "c"))}


@pytest.fixture
def data():
    images = torch.randint(0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Dataset(images, torch.arange(5) % 3, ("a", "b", "c"), None, tuple("abcde"), "photos")


def test_what_runs_names_every_pair_and_numbers_the_reasons(models):
    table, reasons = refusals(what_runs(models, METHODS))
    assert table["runs"].tolist() == [True, True, False, True]
    assert table["mark"].tolist() == ["", "", "a", ""]
    assert list(reasons) == ["a"] and "attention" in reasons["a"]


def test_estimate_counts_what_is_not_stored_and_nothing_afterwards(models, data):
    first = cost_estimate(models, data, METHODS)
    assert first["method"].tolist() == ["saliency", "integrated_gradients", "random"]
    assert first["images"].tolist() == [5, 5, 5]
    assert (first["seconds"] > 0).all()
    extract(models, data, METHODS)
    again = cost_estimate(models, data, METHODS)
    assert again["images"].sum() == 0
    assert again["seconds"].sum() == 0


def test_tables_hold_what_was_recorded(models, data):
    records = extract(models, data, METHODS)
    gaps = completeness_table(records)
    assert gaps["method"].tolist() == ["integrated_gradients"]
    gap = records["m", "integrated_gradients"]["gap"].double()
    assert gaps["mean"].item() == pytest.approx(gap.quantile(0.5).item())
    assert gaps["steps_most"].item() == records["m", "integrated_gradients"]["steps"].max()
    costs = cost_table(records).set_index("method")
    assert costs.loc["saliency", "steps"] == 1
    assert costs.loc["random", "seconds"] == pytest.approx(records["m", "random"]["seconds"].mean().item())


def test_throughput_states_its_settings(models, data):
    table = throughput(models, data, extract(models, data, METHODS), least=2).set_index("method")
    assert table["images"].tolist() == [5, 4, 5]  # 128 rows hold 4 images of 32 steps; there are 5 images
    assert table["threads"].eq(torch.get_num_threads()).all()
    assert not table.isna().any(axis=None)


def test_captum_gives_the_same_maps(models, data):
    table = against_captum(models, data, repeats=1)
    assert table["method"].tolist() == ["saliency", "integrated_gradients"]
    assert (table["difference"] <= 1e-5).all()
    pd.testing.assert_series_equal(table["ratio"], table["captum_seconds"] / table["seconds"], check_names=False)
