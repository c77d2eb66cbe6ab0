"""Notebook 07's tables against literal computations from small made-up maps."""

from __future__ import annotations

import itertools
import math
import statistics
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import harmonize_lib as h
from harmonize_lib import bam, bam_study
from harmonize_lib.bam_study import BARE, CONDITIONS, OBJECT, PAIRS, PATCHED, SCENE, SCENE_ONLY
from harmonize_lib.claims import CLAIMS
from harmonize_lib.consensus import consensus
from harmonize_lib.data import Dataset, load_dataset
from harmonize_lib.errors import HarmonizeError
from harmonize_lib.parameters import check
from harmonize_lib.statistics import Interval

N, SIDE = 11, 16
MODELS = {"resnet-obj": "resnet", "vgg-obj": "vgg", "vgg-obj-s1": "vgg", "vit-obj": "vit"}
METHODS = ["saliency", "grad_cam", "guided_backprop"]
GIVEN = {
    "methods": METHODS,
    "harmonized_methods": METHODS[:2],
    "rules": ["mean", "geometric", "borda"],
    "commonalities": [1, 5, 9],
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def run():
    masks = torch.zeros(N, SIDE, SIDE, dtype=torch.bool)
    for i, mask in enumerate(masks):
        mask[i % 5 : i % 5 + 6, 3:10] = True
    data = Dataset(
        images=torch.zeros(N, 3, SIDE, SIDE, dtype=torch.uint8),
        labels=torch.zeros(N, dtype=torch.int64),
        classes=("one",),
        masks=masks,
        ids=tuple(f"image-{i:02d}" for i in range(N)),
        name="made up",
    )
    models = {name: SimpleNamespace(architecture=kind) for name, kind in MODELS.items()}
    return SimpleNamespace(settings=check("07_bam", GIVEN), dataset=data, models=models)


@pytest.fixture(scope="module")
def maps(run):
    """The transformer has no guided backprop, and one map has no positive part."""
    found = {}
    for seed, (c, name, method) in enumerate(itertools.product(CONDITIONS, MODELS, [*METHODS, "random", "center"])):
        if (name, method) != ("vit-obj", "guided_backprop"):
            base = 2.0 * run.dataset.masks if c == OBJECT else 0.3 * run.dataset.masks
            found[c, name, method] = base + torch.randn(N, SIDE, SIDE, generator=generator(seed))
        if method == "center":
            found[c, name, method] = torch.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE).expand(N, -1, -1)
    found[SCENE, "vgg-obj", "saliency"][2] = -1.0
    return found


@pytest.fixture(scope="module")
def bench():
    correct = {
        metric: {name: torch.rand(N, generator=generator(100 + i + j)) < 0.8 for j, name in enumerate(MODELS)}
        for i, metric in enumerate(PAIRS)
    }
    accepted = torch.stack([correct["IIR"][name] for name in MODELS])
    change = torch.where(accepted, 0.05, 0.3).double()
    patch = bam.Patch(torch.zeros(N, 3, SIDE, SIDE), change, 3 * change, torch.full((N,), 0.2).double(), accepted)
    return bam_study.Bench({}, {}, patch, correct)


@pytest.fixture(scope="module")
def table(run, bench, maps):
    return bam_study.scores(run, bench, maps)


PUBLIC = {
    "MCS": h.model_contrast_score,
    "IDR": h.input_dependence_rate,
    "IIR": h.input_independence_rate,
}


def test_every_score_is_the_public_metric(run, bench, maps, table):
    wanted = {(m, v, *key[1:]) for m, v in itertools.product(PAIRS, bam_study.VARIANTS) for key in maps}
    groups = dict(list(table.groupby(["metric", "variant", "model", "method"])))
    assert set(groups) == wanted and all(len(part) == N for part in groups.values())
    for (metric, variant, name, method), part in groups.items():
        a, b = PAIRS[metric]
        expected = PUBLIC[metric](
            maps[a, name, method],
            maps[b, name, method],
            run.dataset.masks,
            bench.correct[metric][name],
            signed=variant == "signed",
        )
        assert list(part["image"]) == list(run.dataset.ids)
        np.testing.assert_allclose(part["value"], expected.values.numpy(), atol=1e-12)


def test_pairs_are_bams(run):
    assert PAIRS == {"MCS": (OBJECT, SCENE), "IDR": (BARE, SCENE), "IIR": (SCENE_ONLY, PATCHED)}


def test_excluded_images_are_counted(run, bench, table):
    counted = bam_study.counts(run, bench, table).set_index("model")
    for i, name in enumerate(MODELS):
        row = counted.loc[name]
        assert row["images"] == N and row["patches_refused"] == int((~bench.patch.accepted[i]).sum())
        for metric in PAIRS:
            assert row[metric] == int(bench.correct[metric][name].sum())
    lost = [bench.correct[metric]["vgg-obj"][2].item() for metric in ("MCS", "IDR")]
    assert counted["methods"].to_dict() == {name: 2 if name == "vit-obj" else 3 for name in MODELS}
    assert counted["undefined"].to_dict() == {name: sum(lost) * (name == "vgg-obj") for name in MODELS}


def test_bams_own_methods_decide_whose_findings_are_judged(run, table):
    assert bam_study.original_models(run, table) == ["resnet-obj", "vgg-obj", "vgg-obj-s1"]
    ranks, agreement = bam_study.ranked(run, table)
    assert bam_study.groups(run, table) == {
        "ReLU CNNs": (["resnet-obj", "vgg-obj", "vgg-obj-s1"], METHODS),
        "all models": (list(MODELS), METHODS[:2]),
    }
    methods = ranks.groupby("models")["method"].unique().map(set).to_dict()
    assert methods == {"ReLU CNNs": set(METHODS), "all models": set(METHODS[:2])}
    assert set(agreement) == {f"{g}, {v}" for g in methods for v in bam_study.VARIANTS}


def test_extremes_compare_methods_on_the_same_models(run, bench, table):
    raised = table.copy()
    raised.loc[
        (raised["method"] == "guided_backprop") & (raised["metric"] == "MCS") & raised["value"].notna(), "value"
    ] = 2
    harmonized = pd.DataFrame(columns=["metric", "variant", "target", "image", "consensus"])
    by_rule = pd.DataFrame({"n": []})
    told = bam_study.findings(run, raised, {"all models, original": Interval(0.5, 0.4, 0.6, 9)}, harmonized, by_rule)
    lines = told.splitlines()
    assert lines[0] == "- Methods by model: ResNet 3, VGG 3, VGG (seed 1) 3, ViT 2."
    assert lines[1] == "- Guided backprop: on 3 of 4 models (ResNet, VGG, VGG (seed 1))."
    (relu,) = (line for line in lines if line.startswith("- MCS (ReLU CNNs, original; 3 methods)"))
    assert "highest Guided backprop 2.000 [2.000, 2.000]" in relu
    (together,) = (line for line in lines if line.startswith("- MCS (all models, original; 2 methods)"))
    assert "Guided" not in together
    part = table.query("metric == 'MCS' and variant == 'original'")
    means = {m: part[part["method"] == m].groupby("image")["value"].mean().mean() for m in METHODS[:2]}
    best = max(means, key=means.get)
    assert f"highest {bam_study.plots.label(best)} {means[best]:.3f} [" in together
    names = {"ResNet": "resnet-obj", "VGG": "vgg-obj", "VGG (seed 1)": "vgg-obj-s1", "ViT": "vit-obj"}
    images = ", ".join(f"{shown} {int(bench.correct['IIR'][name].sum())}" for shown, name in names.items())
    assert sum(f"Images: {images}." in line for line in lines) == 2  # both scales
    assert lines[-1].endswith(f"0.50 [0.40, 0.60], n = 9. Images of IIR: {images}.")


def test_methods_not_on_all_models_come_last_and_say_so(run, table):
    edges = table[table["method"] == "center"].assign(method="edges")
    figure, numbers = bam_study.draw_metrics(run, pd.concat([table, edges]), "original")
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    means = numbers[(numbers["model"] == "mean") & (numbers["metric"] == "MCS")].set_index("method")
    first = sorted(METHODS[:2], key=lambda method: -means.loc[method, "mean"])
    assert labels == [*map(bam_study.plots.label, first), "Guided backprop (3 of 4)"]
    assert means.loc["guided_backprop", "models"] == 3 and means.loc["random", "models"] == 4
    bam_study.plt.close(figure)


def made_up_facts(on: dict[str, int]) -> dict[str, bool]:
    """Facts where each architecture has the first so many of 15 methods."""
    names = ["guided_backprop", "grad_cam", *(m for m in METHODS_OF_07 if m not in ("guided_backprop", "grad_cam"))]
    settings = check("07_bam", {"methods": names})
    rows = []
    for (model, count), metric in itertools.product(on.items(), PAIRS):
        chosen = names[:count] if model == "resnet" else [m for m in names if m != "guided_backprop"][:count]
        for method in [*chosen, "random", "center", "edges"]:
            value = {"MCS": 0.0, "IDR": 0.0, "IIR": 1.0}[metric]
            rows += [
                {
                    "metric": metric,
                    "variant": "original",
                    "model": model,
                    "method": method,
                    "value": value,
                    "image": "i",
                }
            ]
    fake = SimpleNamespace(settings=settings, models={name: SimpleNamespace(architecture=name) for name in on})
    patch = SimpleNamespace(change=torch.tensor([[0.05]]), accepted=torch.tensor([[True]]))
    table = pd.DataFrame(rows)
    return bam_study.facts(fake, SimpleNamespace(patch=patch), table, pd.DataFrame({"k": [1, 3, 5]}))


METHODS_OF_07 = check("07_bam", {}).methods


def test_facts_count_methods_on_each_architecture():
    each, cnn = "at least 9 methods on every architecture", "at least 12 methods on every ReLU CNN"
    found = made_up_facts({"resnet": 12, "vit": 9})
    assert found[each] and found[cnn] and found["3 controls on every architecture"]
    found = made_up_facts({"resnet": 13, "vit": 8})  # 13 names are there
    assert not found[each] and found[cnn]
    found = made_up_facts({"vit": 12})
    assert found[each] and not found[cnn]


def test_nobody_is_in_the_pool_of_its_own_architecture(run):
    pools = bam_study.held_out(MODELS, run.models)
    for target, pool in pools.items():
        assert pool == [name for name in MODELS if MODELS[name] != MODELS[target]] and len(pool) >= 2
    assert bam_study.held_out(["resnet-obj", "vit-obj"], run.models) == {}


def slow_harmonized(run, maps, metric, rule, target, method, i, signed):
    """One image's consensus and members, from the definitions."""
    pool = [name for name in MODELS if MODELS[name] != MODELS[target]]
    mask = run.dataset.masks[i : i + 1]
    normalization = "l1" if signed and rule in ("mean", "geometric") else None

    def combined(condition, names):
        scaled = [bam.scaled_map(maps[condition, name, method][i : i + 1], signed).nan_to_num(0) for name in names]
        return bam.concept_attribution(consensus(torch.stack(scaled), rule, normalization), mask, signed).mean

    def value(names):
        a, b = (combined(condition, names) for condition in PAIRS[metric])
        if math.isnan(a) or math.isnan(b):
            return math.nan
        return {"MCS": a - b, "IDR": float(a > b), "IIR": float(abs(a - b) < 0.1 * abs(a))}[metric]

    return value(pool), statistics.fmean(value([name]) for name in pool)


def test_harmonized_scores_equal_the_definitions_image_by_image(run, bench, maps):
    table = bam_study.harmonized_scores(run, bench, maps)
    assert set(table["rule"]) == {"mean", "geometric", "borda"}
    assert set(table.loc[table["variant"] == "signed", "rule"]) == {"mean"}
    assert len(table) == len(MODELS) * 2 * len(PAIRS) * (3 + 1) * N
    some = table.iloc[:: max(1, len(table) // 90)]
    for row in some.itertuples():
        i = run.dataset.ids.index(row.image)
        pool = [name for name in MODELS if MODELS[name] != MODELS[row.target]]
        if not all(bench.correct[row.metric][name][i] for name in pool):
            assert math.isnan(row.consensus) and math.isnan(row.members)
            continue
        expected = slow_harmonized(run, maps, row.metric, row.rule, row.target, row.method, i, row.variant == "signed")
        np.testing.assert_allclose((row.consensus, row.members), expected, atol=1e-6)
    assert some["consensus"].notna().sum() > 30


def test_comparison_pairs_by_image(run):
    rows = []
    for i, target in itertools.product(range(9), ("a", "b")):
        base = {"metric": "MCS", "variant": "original", "rule": "mean", "target": target, "image": f"{i}"}
        rows.append(base | {"consensus": 0.1 * i + 0.2, "members": 0.1 * i})
    rows[0]["consensus"] = math.nan
    result = bam_study.compare_harmonized(run, pd.DataFrame(rows)).iloc[0]
    assert result["n"] == 9 and result["mean"] == pytest.approx(0.2)
    assert result["low"] == pytest.approx(0.2) and result["p"] == result["holm"] < 0.01


def test_the_best_other_is_chosen_on_the_other_half():
    wide = pd.DataFrame({"a": [1, 0, 1, 0, 1, 0], "b": [0, 1, 0, 1, 0, 1], "c": [2.0] * 6}, index=list("uvwxyz"))
    # the even images are best served by a, so b's odd images get a, and the reverse
    assert bam_study.best_other(wide, ["a", "b"]).tolist() == [0, 0, 0, 0, 0, 0]
    assert bam_study.best_other(wide, ["a", "c"]).tolist() == [2] * 6
    assert bam_study.best_other(wide, ["a", "b"]).index.tolist() == list("uvwxyz")


@pytest.fixture(scope="module")
def relative(run):
    """Object marked in proportion to 1 / k; the model of k loses accuracy on its first images.

    The second architecture has no guided backprop, so it is no ReLU CNN.
    """
    names, ks = run.settings.relative_models, [1, 5, 9, bam_study.ALL]
    maps, correct, drop, logit_drop = {}, {}, {}, {}
    for a, (name, k) in enumerate(itertools.product(names, ks)):
        correct[name, k] = torch.ones(N, dtype=torch.bool)
        drop[name, k] = (torch.arange(N) < 8 / k).double() if k < bam_study.ALL else torch.zeros(N).double()
        logit_drop[name, k] = 5.0 / k + 0.1 * torch.randn(N, generator=generator(a)).double()
        for b, method in enumerate([*METHODS[:2], "random", *METHODS[2:][: name == names[0]]]):
            strength = 4.0 / k * (method != "random")
            noise = torch.rand(N, SIDE, SIDE, generator=generator(1000 * a + b))
            maps[name, k, method] = strength * run.dataset.masks + noise
    correct[names[0], 5][3] = False
    correct[names[1], bam_study.ALL][5] = False
    return bam_study.Relative(run.dataset, maps, correct, drop, logit_drop)


def test_relative_scores_and_their_correlation(run, relative):
    table = bam_study.relative_scores(relative)
    first, second = run.settings.relative_models
    assert set(table["k"]) == {1, 5, 9} and len(table) == 2 * 3 * (4 + 3) * N
    part = table[(table["variant"] == "original") & (table["method"] == "saliency")]
    for name, k in itertools.product((first, second), (1, 5, 9)):
        rows = part[(part["model"] == name) & (part["k"] == k)]
        expected = h.model_contrast_score(
            relative.maps[name, k, "saliency"],
            relative.maps[name, bam_study.ALL, "saliency"],
            relative.data.masks,
            relative.correct[name, k] & relative.correct[name, bam_study.ALL],
        )
        np.testing.assert_allclose(rows["value"], expected.values.numpy())
        np.testing.assert_allclose(rows["drop"], relative.drop[name, k].numpy())
    missing = part[part["value"].isna()]
    assert set(zip(missing["model"], missing["k"], missing["image"], strict=True)) == {
        (first, 5, "image-03"),
        *((second, k, "image-05") for k in (1, 5, 9)),
    }
    found = bam_study.relative_correlation(run, table)
    assert set(found["model"]) == {first, second, "ReLU CNNs"} and "random" not in set(found["method"])
    assert bam_study.original_models(run, table) == [first]
    columns = ["against", "variant", "method", "mean", "low", "high", "n"]
    alone, judged = (found.loc[found["model"] == name, columns].reset_index(drop=True) for name in (first, "ReLU CNNs"))
    pd.testing.assert_frame_equal(alone, judged)
    assert not (found["model"] == "ReLU CNNs")[~found["method"].isin(METHODS)].any()
    transformer = bam_study.relative_correlation(run, table[table["model"] == second])
    assert set(transformer["model"]) == {second}
    cells = table.query("method == 'grad_cam' and variant == 'original'")
    means = cells[cells["model"] == first].groupby("k")[["value", "drop", "logit_drop"]].mean()
    for against in ("drop", "logit_drop"):
        rows = found.query("against == @against and model == @first and method == 'grad_cam' and variant == 'original'")
        row = rows.iloc[0]
        assert len(rows) == 1 and row["mean"] == pytest.approx(statistics.correlation(means["value"], means[against]))
        assert row["n"] == N and row["low"] <= row["mean"] <= row["high"]


def test_relative_findings_are_told_by_architecture():
    names = ["resnet-scene_k{k}", "swin-scene_k{k}"]
    lost = {names[0]: {1: 0.5, 3: 0.0, 5: 0.0}, names[1]: {1: 0.5, 3: 0.5, 5: 0.0}}
    rows = [
        {"model": name, "k": k, "image": f"{i}", "drop": float(i < 2 * drop), "logit_drop": k + i}
        for name, drops in lost.items()
        for k, drop in drops.items()
        for i in range(2)
    ]
    cells = [
        ("drop", names[0], "grad_cam", 0.7, 0.6, 0.8),
        ("drop", names[0], "saliency", 0.9, 0.8, 1.0),
        ("drop", names[1], "grad_cam", -0.5, -0.6, -0.4),
        ("drop", names[1], "saliency", 0.1, -0.1, 0.2),
        ("drop", "ReLU CNNs", "grad_cam", 0.7, 0.6, 0.8),
    ]
    correlation = pd.DataFrame(cells, columns=["against", "model", "method", "mean", "low", "high"])
    told = bam_study.relative_findings(pd.DataFrame(rows), correlation.assign(variant="original", n=2)).splitlines()
    assert told == [
        "- ResNet: the accuracy drop is exactly 0 at 2 of 3 commonalities, all but k = 1, so a correlation with it is "
        "one point against the rest, which an interval over images does not cover.",
        "- ResNet, Grad-CAM's RMCS and accuracy drop: r = +0.700 [+0.600, +0.800], n = 2.",
        "- ResNet, RMCS and accuracy drop: correlation above 0 for 2 of 2 methods, below 0 for 0.",
        "- Swin: the accuracy drop is exactly 0 at 1 of 3 commonalities.",
        "- Swin, Grad-CAM's RMCS and accuracy drop: r = -0.500 [-0.600, -0.400], n = 2.",
        "- Swin, RMCS and accuracy drop: correlation above 0 for 0 of 2 methods, below 0 for 1.",
    ]


def test_of_two_members_the_median_is_the_mean_and_is_told_once(run, relative):
    fake = SimpleNamespace(settings=check("07_bam", GIVEN | {"rules": ["median", "mean"]}))
    assert set(bam_study.harmonized_relative(fake, relative)["rule"]) == {"mean"}
    two = torch.rand(2, N, SIDE, SIDE, generator=generator(5))
    torch.testing.assert_close(consensus(two, "median"), consensus(two, "mean"))
    alone = SimpleNamespace(settings=check("07_bam", GIVEN | {"rules": ["median"], "rule": "median"}))
    assert set(bam_study.harmonized_relative(alone, relative)["rule"]) == {"median"}


def test_harmonized_relative_contrast(run, relative):
    table = bam_study.harmonized_relative(run, relative)
    assert set(table["rule"]) == set(run.settings.rules) and set(table["method"]) == set(METHODS[:2])
    first, second = run.settings.relative_models
    row = table.query("rule == 'mean' and k == 5 and method == 'saliency'").set_index("image")
    assert set(row.index[row["consensus"].isna()]) == {"image-03", "image-05"}

    def g(names, k):
        scaled = torch.stack([bam.scaled_map(relative.maps[name, k, "saliency"]) for name in names])
        return bam.concept_attribution(consensus(scaled, "mean"), relative.data.masks).values[0]

    expected = float(g([first, second], 5) - g([first, second], bam_study.ALL))
    assert row.loc["image-00", "consensus"] == pytest.approx(expected, abs=1e-9)
    alone = [float(g([name], 5) - g([name], bam_study.ALL)) for name in (first, second)]
    assert row.loc["image-00", "members"] == pytest.approx(statistics.fmean(alone), abs=1e-9)
    assert not len(bam_study.relative_scores(bam_study.Relative(run.dataset, {}, {}, {}, {})))


def test_relative_images_show_one_object_in_one_scene(run):
    settings = check("07_bam", {"relative_pair": ["bars", "hills"]} | {"n_relative": 13})
    with pytest.raises(HarmonizeError, match="unknown object 'bars'"):
        bam_study.relative_data(settings)
    settings = check("07_bam", {"relative_pair": ["rings disc", "hill"], "n_relative": 13})
    with pytest.raises(HarmonizeError, match="unknown scene 'hill': did you mean 'hills'"):
        bam_study.relative_data(settings)
    settings = check("07_bam", {"relative_pair": ["rings disc", "hills"], "n_relative": 13})
    data = bam_study.relative_data(settings)
    assert len(data) == 13 and data.masks.any((1, 2)).all()
    assert {data.classes[i] for i in data.labels.tolist()} == {"hills"}
    assert data.extras["object_labels"].eq(0).all()


def wide_table(values: dict[str, dict[str, float]]) -> pd.DataFrame:
    """The same value for every image, metric by method."""
    rows = [
        {"metric": metric, "variant": "original", "model": "m", "method": method, "image": f"{i}", "value": value}
        for metric, cells in values.items()
        for method, value in cells.items()
        for i in range(8)
    ]
    return pd.DataFrame(rows)


def test_claims_read_the_right_sides(run):
    methods = ["saliency", "smoothgrad_squared", "integrated_gradients", "integrated_gradients_smoothgrad", "grad_cam"]
    settings = check("07_bam", {"methods": methods, "rules": ["mean"]})
    fake = SimpleNamespace(settings=settings, models={"m": None})
    table = wide_table(
        {
            "MCS": dict(zip(methods, (0.2, 0.3, 0.1, 0.15, 0.5), strict=True)),
            "IDR": dict(zip(methods, (1, 0.5, 0.25, 0.25, 1), strict=True)),
            "IIR": dict(zip(methods, (0.9, 0.1, 0.05, 0.0, 1.0), strict=True)),
        }
    )
    harmonized = pd.concat(
        pd.DataFrame(
            {
                "metric": metric,
                "variant": "original",
                "rule": "mean",
                "image": [f"{i}" for i in range(8)],
                "consensus": high,
                "members": low,
                "scene": 0.3,
                "object": 0.4,
                "member_scene": 0.1,
                "member_object": 0.2,
            }
        )
        for metric, high, low in (("MCS", 0.3, 0.4), ("IDR", 0.9, 0.6), ("IIR", 0.2, 0.5))
    )
    agreement = {"ReLU CNNs, original": Interval(0.4, 0.3, 0.5, 8)}
    columns = ["against", "variant", "model", "method", "mean", "low", "high", "n"]
    cells = [("drop", "original", "ReLU CNNs", "grad_cam", 0.9, 0.7, 1.0, 8)]
    cells += [("drop", "original", name, "grad_cam", 0.1, 0.0, 0.2, 8) for name in ("swin-scene_k{k}", "resnet")]
    correlation = pd.DataFrame(cells, columns=columns)
    found = bam_study.measured(fake, table, agreement, correlation, harmonized)
    expected = {
        "bam_grad_cam_contrast": 0.2,
        "bam_smoothgrad_gradient": 0.1,
        "bam_smoothgrad_ig": 0.05,
        "bam_dependence": 0 - (1 - 0.5),
        "bam_independence": 0.9,
        "bam_rankings": 0.4,
        "bam_relative": 0.9,
        "harmonized_dependence": (1 - 0.9) - (1 - 0.6),
        "harmonized_independence": (1 - 0.2) - (1 - 0.5),
        "harmonized_inherits": (1 - 0.3 / 0.4) / (1 - 0.1 / 0.2),
    }
    assert {claim: pytest.approx(interval.mean) for claim, interval in found.items()} == expected
    assert set(found) <= set(CLAIMS)
    few = SimpleNamespace(settings=check("07_bam", {"methods": ["grad_cam"], "rules": ["mean"]}), models={"m": None})
    nothing = bam_study.measured(few, table[table["method"] == "grad_cam"], {}, correlation[:0], harmonized)
    assert nothing["bam_dependence"].n == nothing["bam_relative"].n == nothing["bam_rankings"].n == 0


def test_prepare_refuses_what_it_cannot_judge(run):
    with pytest.raises(HarmonizeError, match="made up has no without_object"):
        bam_study.prepare(run)
    data = load_dataset("shapes-on-scenes", "test", 2)
    settings = check("07_bam", {"models": ["resnet-obj", "vgg-obj"], "scene_models": ["resnet-scene"]})
    with pytest.raises(HarmonizeError, match="scene_models: 1 given for 2 models"):
        bam_study.prepare(SimpleNamespace(settings=settings, dataset=data, models={}))
