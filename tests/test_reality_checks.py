"""The tables behind the reality checks, against loops; the report card and the ledger from tables written by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from scipy.stats import spearmanr

from harmonize_lib import (
    HarmonizeError,
    Interval,
    claims,
    consensus,
    explain,
    list_methods,
    load_dataset,
    parameters,
    sanity,
)
from harmonize_lib import reality_checks as checks
from harmonize_lib.study import Run

NOTHING = Interval(np.nan, np.nan, np.nan, 0)


@pytest.fixture
def run(monkeypatch, tmp_path) -> Run:
    """Three untrained networks, three images."""
    monkeypatch.setattr("harmonize_lib.paths.CACHE", tmp_path / "cache")
    models = {name: tiny.model(name) for name in ("vgg", "vit", "resnet")}
    settings = parameters.RealityChecks.model_construct(
        models=list(models), methods=["saliency", "grad_cam", "edges"], stages=3
    )
    return Run("13_reality_checks", settings, load_dataset("shapes-on-scenes", "test", 3), models, tmp_path, 0.0)


def test_every_cell_of_the_weight_table_is_the_similarity_of_two_maps(run):
    methods = checks.defined_methods(run)
    table = checks.weight_table(run, methods).set_index(["check", "stage", "model", "method", "measure", "image"])[
        "value"
    ]
    assert table.index.is_unique
    assert len(table) == 2 * 3 * (3 + 1) * 3 * 4 * 3  # kinds, stages, models and consensus, methods, measures, images
    images, labels, ids = run.dataset.images, run.dataset.labels, run.dataset.ids
    for kind, function in ((checks.CASCADING, sanity.cascading), (checks.INDEPENDENT, sanity.independent)):
        pairs = {name: (model, function(model, 0, 3)[1]) for name, model in run.models.items()}
        both = {
            name: [explain(model, images, labels, "saliency").maps for model in pair] for name, pair in pairs.items()
        }
        both[checks.HARMONIZED] = [consensus(torch.stack([both[n][i] for n in run.models]), "mean") for i in (0, 1)]
        for name, (before, after) in both.items():
            for i in range(3):
                slow = spearmanr(before[i].flatten().numpy(), after[i].flatten().numpy()).statistic
                assert table[kind, 2, name, "saliency", "spearman", ids[i]] == pytest.approx(slow, abs=1e-5)
    assert (table.xs("edges", level="method") > 0.99999).all()


def test_more_stages_than_layers_are_refused(run):
    many = replace(run, settings=run.settings.model_copy(update={"stages": 20}))
    with pytest.raises(HarmonizeError, match=r"stages=20: vgg has \d+ layers; take at most that many stages"):
        checks.weight_table(many, {name: ["saliency"] for name in run.models})


def test_without_second_seeds_nothing_is_judged(run):
    table = checks.weight_table(
        replace(run, settings=run.settings.model_copy(update={"methods": ["edges"]})),
        {name: ["edges"] for name in run.models},
    )
    found = checks.sensitivity(table, checks.CASCADING, 0)
    assert len(found) == 0
    assert checks.least_sensitive([found], checks.SINGLE)[1].n == 0
    assert checks.label_table(run, {}).empty
    assert checks.sharpening(table, checks.CASCADING, 0).n == 0


def test_a_map_undefined_for_a_member_is_undefined_for_all():
    maps = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    wanted = consensus(maps, "borda")
    maps[1, 2] = torch.nan
    found = checks.pooled(maps, "borda")
    assert found[2].isnan().all()
    kept = torch.tensor([0, 1, 3])
    assert torch.equal(found[kept], wanted[kept])


def scores() -> pd.DataFrame:
    """Two models and their consensus, two methods and a control, six images; one value undefined."""
    rng = np.random.default_rng(0)
    rows = [
        (check, stage, model, method, measure, f"i{image}", rng.uniform(-1, 1))
        for check, stage in (("cascading", 1), ("cascading", 2), ("second seed", 0))
        for model in ("a", "b", "harmonized")
        for method in ("saliency", "rise", "edges")
        for measure in ("spearman", "ssim")
        for image in range(6)
    ]
    table = pd.DataFrame(rows, columns=["check", "stage", "model", "method", "measure", "image", "value"])
    undefined = table.query(
        "check == 'cascading' and stage == 2 and model == 'a' and method == 'rise' and image == 'i3'"
    )
    table.loc[undefined.index, "value"] = np.nan
    return table


def slow_drop(table: pd.DataFrame, models: list[str], method: str, measure: str, image: str) -> tuple[float, float]:
    """Mean over models of the value for the second seed and for the last stage, both defined."""
    pairs = []
    for model in models:
        cell = table[(table["model"] == model) & (table["method"] == method)]
        cell = cell[(cell["measure"] == measure) & (cell["image"] == image)]
        before = cell.loc[cell["check"] == "second seed", "value"].item()
        after = cell.loc[(cell["check"] == "cascading") & (cell["stage"] == 2), "value"].item()
        if not np.isnan(after):
            pairs.append((before, after))
    return tuple(np.mean(pairs, axis=0))


def test_sensitivity_and_sharpening_against_loops():
    table = scores()
    found = checks.sensitivity(table, checks.CASCADING, 0).set_index(["maps", "measure", "method"]).sort_index()
    assert len(found) == 2 * 2 * 3
    images = [f"i{i}" for i in range(6)]
    for (maps, measure, method), row in found.iterrows():
        models = ["harmonized"] if maps == checks.HARMONIZED else ["a", "b"]
        pairs = np.array([slow_drop(table, models, method, measure, image) for image in images])
        np.testing.assert_allclose([row["before"], row["after"]], pairs.mean(0))
        assert row["mean"] == pytest.approx((pairs[:, 0] - pairs[:, 1]).mean())
        assert row["n"] == 6 and row["low"] < row["mean"] < row["high"]
        assert np.isnan(row["holm"]) == (method == "edges")
    drops = {
        kind: [
            np.mean([np.subtract(*slow_drop(table, models, method, "spearman", i)) for method in ("saliency", "rise")])
            for i in images
        ]
        for kind, models in (("harmonized", ["harmonized"]), ("members", ["a", "b"]))
    }
    interval = checks.sharpening(table, checks.CASCADING, 0)
    assert interval.mean == pytest.approx(np.mean(drops["harmonized"]) - np.mean(drops["members"]))
    worst, least = checks.least_sensitive([found.reset_index()], checks.SINGLE)
    singles = found.loc[(checks.SINGLE, "spearman")].drop("edges")["mean"].astype(float)
    assert worst == singles.idxmin() and least.mean == singles.min()


def test_magnitudes_that_say_what_values_say_have_no_row():
    table = scores()
    same = table[table["measure"] == "spearman"].assign(measure="spearman_of_magnitudes")
    other = same["method"] == "rise"
    same.loc[other, "value"] = same.loc[other, "value"] / 2
    found = checks.sensitivity(pd.concat([table, same]), checks.CASCADING, 0)
    told = found[found["measure"] == "spearman_of_magnitudes"]
    assert set(told["method"]) == {"rise"} and set(told["maps"]) == {checks.SINGLE, checks.HARMONIZED}
    assert len(found) == 2 * 2 * 3 + 2


def test_what_a_check_covers_is_counted():
    table = scores()
    table = table[~((table["model"] != "a") & (table["method"] == "rise"))]
    assert checks.coverage(table, "weights") == (
        "- The check of weights covers 2 methods on a, b, each where it is defined, and 6 images. "
        "Harmonized maps: 1 methods pool 2 networks; on one network only: RISE."
    )


@pytest.mark.parametrize("architecture", ["resnet", "vit", "swin"])
def test_a_blinkered_network_sees_the_left_half_alone(architecture):
    model = tiny.model(architecture)
    images = load_dataset("shapes-on-scenes", "test", 3).images
    other = checks.blinkered(model, (64, 64))
    x = model.preprocess(images)
    half = x.clone()
    half[..., 32:] = 0
    torch.testing.assert_close(other(x), model(half))
    half[..., 32:] = torch.randn(3, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other(x), other(half)) and not torch.equal(model(x), model(half))
    assert other.weights_hash != model.weights_hash
    assert "seen" not in model.network.state_dict()
    defined = set(list_methods(model))
    assert set(list_methods(other)) == defined and {"grad_cam"} <= defined


def test_insensitivity_is_the_share_on_the_half_that_is_ignored(run):
    found = checks.insensitivity(run, {name: ["saliency", "grad_cam"] for name in run.models}).set_index("method")
    assert found.loc["saliency", "mean"] == 0
    assert found.loc["center", "mean"] == pytest.approx(0.5, abs=1e-3) and (found["n"] == 3).all()
    assert found.loc["random", "mean"] == pytest.approx(0.5, abs=0.02)
    images, labels = run.dataset.images, run.dataset.labels
    shares = []
    for model in run.models.values():
        maps = explain(checks.blinkered(model, (64, 64)), images, labels, "grad_cam").maps.abs().numpy()
        shares.append([one[:, 32:].sum() / one.sum() for one in maps])
    assert found.loc["grad_cam", "mean"] == pytest.approx(np.mean(shares), abs=1e-5)


def write(figures: Path, notebook: str, name: str, **columns: list[object]) -> None:
    (figures / notebook).mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_csv(figures / notebook / f"{name}.csv", index=False)


def test_the_report_card_reads_ranks_and_tells_what_is_missing(tmp_path):
    metric, model = ["insertion"] * 4 + ["deletion"] * 4, ["mean"] * 8
    methods = ["saliency", "rise", "grad_cam", "edges"]
    values = [0.5, 0.9, 0.5, 0.7, 0.3, 0.1, 0.2, 0.05]
    write(tmp_path, "06_feature_detectors", "faithfulness", metric=metric, method=methods * 2, mean=values, model=model)
    write(tmp_path, "02_attribution_extraction", "cost", method=["rise"] * 3, seconds=[1.0, 5.0, 2.0])
    write(tmp_path, "07_bam", "metrics_original", metric=["MCS"], method=["rise"])  # a column is missing
    card, missing = checks.report_card(tmp_path, methods)
    beats = card.set_index(["check", "method"])["beats"]
    assert beats["insertion"].to_dict() == {
        "saliency": 0.25,
        "rise": 1.0,
        "grad_cam": 0.25,
        "edges": pytest.approx(2 / 3),
    }
    assert checks.empty_cells(card, ["rise", "saliency"]) == [
        "cost, s per image · not among the methods of notebook 02: Saliency"
    ]
    assert beats["deletion"].to_dict() == {"saliency": 0.0, "rise": 1.0, "grad_cam": 0.5, "edges": 1.0}
    value = card.set_index(["check", "method"])["value"]
    assert value["cost", "rise"] == 2 and np.isnan(beats["cost", "rise"])
    assert len(card) == 9
    assert [line.partition(":")[0] for line in missing] == [
        name for name in checks.CHECKS if name not in ("insertion", "deletion", "cost")
    ]
    assert all("run that notebook" in line for line in missing)
    assert "07_bam" in next(line for line in missing if line.startswith("MCS"))


def test_methods_that_a_notebook_leaves_out_come_from_a_run_with_all_unless_it_is_of_another_state(tmp_path):
    def cells(folder: str, **means: float) -> None:
        columns = {"metric": ["relevance_rank"] * len(means), "model": ["mean"] * len(means)}
        write(
            tmp_path / folder,
            "06_feature_detectors",
            "localization",
            **columns,
            method=[*means],
            mean=[*means.values()],
        )

    def localization() -> dict[str, float]:
        card, missing = checks.report_card(tmp_path, ["rise", "saliency", "edges"])
        told.extend(line for line in missing if line.startswith("localization"))
        return card.set_index("method")["value"].to_dict()

    told: list[str] = []
    cells(".", saliency=0.4, edges=0.6)
    cells(checks.ALL_METHODS, saliency=0.4, rise=0.7)
    assert localization() == {"rise": 0.7, "saliency": 0.4, "edges": 0.6} and told == []
    cells(checks.ALL_METHODS, saliency=0.41, rise=0.7)
    assert localization() == {"saliency": 0.4, "edges": 0.6}
    assert told == ["localization: all-methods/06_feature_detectors is of another state; run that notebook again"]


def test_a_map_that_collapses_ranks_best_and_what_it_lost_is_not_ranked(tmp_path):
    columns = {"maps": [checks.SINGLE] * 3, "measure": ["spearman"] * 3, "method": ["rise", "saliency", "grad_cam"]}
    write(tmp_path, checks.THIS, "sensitivity_weights", **columns, after=[0.6, -0.001, -0.2], mean=[0.3, 0.02, 0.4])
    card, _ = checks.report_card(tmp_path, columns["method"])
    rows = card.set_index(["check", "method"])
    assert rows.loc["weights_left", "beats"].to_dict() == {"rise": 0.0, "saliency": 1.0, "grad_cam": 0.5}
    assert rows.loc["weights", "beats"].isna().all() and rows.loc[("weights", "rise"), "value"] == 0.3


def test_harmonized_maps_stand_beside_single_ones_in_the_direction_of_the_check(tmp_path):
    outcomes = ["recognition", "localization", "deletion"]
    write(tmp_path, "05_harmonisation", "rules", rule=["mean"] * 3, level=[0.5, 0.6, 0.7], outcome=outcomes)
    against = ["vs. random single other"] * 3
    write(
        tmp_path,
        "05_harmonisation",
        "by_rule",
        outcome=outcomes,
        against=against,
        rule=["mean"] * 3,
        mean=[0.1, -0.2, 0.05],
        low=[0.05, -0.3, -0.1],
        high=[0.2, -0.1, 0.2],
    )
    maps, method = [checks.SINGLE, checks.HARMONIZED] * 2, ["rise", "rise", "edges", "edges"]
    drops = {"measure": "spearman", "maps": maps, "method": method, "mean": [0.2, 0.5, 0.0, 0.9]}
    drops["after"] = [0.3, -0.1, 1.0, 1.0]
    write(tmp_path, checks.THIS, "sensitivity_weights", **drops)
    card, missing = checks.harmonized_card(tmp_path, "mean", {"weights": Interval(0.3, 0.1, 0.5, 9), "labels": NOTHING})
    rows = card.set_index(["check", "method"])
    assert rows["value"].round(6).to_dict() == {
        ("weights_left", checks.SINGLE): 0.3,
        ("weights_left", checks.HARMONIZED): -0.1,
        ("weights", checks.SINGLE): 0.2,
        ("weights", checks.HARMONIZED): 0.5,
        ("transfer", checks.SINGLE): 0.4,
        ("transfer", checks.HARMONIZED): 0.5,
        ("localization", checks.SINGLE): 0.8,
        ("localization", checks.HARMONIZED): 0.6,
        ("deletion", checks.SINGLE): 0.35,
        ("deletion", checks.HARMONIZED): 0.3,
    }
    assert rows["beats"].isna().tolist() == [True, True] + [False] * 8
    assert rows["beats"].dropna().tolist() == [0, 1, 0, 1, 1, 0, 0.5, 0.5]
    assert len(missing) == 4


def test_card_and_ledger_are_drawn_from_whatever_is_there(tmp_path):
    pair = checks.harmonized_card(tmp_path, "mean", {"weights": NOTHING, "labels": NOTHING})[0]
    figure = checks.draw_card(checks.report_card(tmp_path, ["rise"])[0], pair, ["rise"])
    assert len(figure.axes[0].texts) == 0
    for notebook, name, mean in (("03_a", "selectivity", -0.1), ("04_b", "family", 0.1), ("04_c", "pool_size", -1.0)):
        (tmp_path / notebook).mkdir()
        claims.write_claims(tmp_path / notebook, {name: Interval(mean, mean - 0.05, mean + 0.05, 9)})
    ledger = claims.gather_claims(tmp_path)
    assert not (tmp_path / "claims.csv").exists()
    figure = checks.draw_ledger(ledger)
    written = " ".join(text.get_text() for text in figure.axes[0].texts).replace("\n", " ")
    assert all(source in written for source in ("Kadir et al. 2023", "this project's question"))
    assert "-0.10 [-0.15, -0.05]" in written and claims.CLAIMS["pool_size"].title in written
    assert "reproduced (2)" in [text.get_text() for text in figure.legends[0].get_texts()]
    plt.close("all")
