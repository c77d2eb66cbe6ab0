"""Transfer against literal loops, models whose features are known, and invariants."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pandera.errors
import pytest
import torch
from torch import Tensor, nn

from harmonize_lib import cross_architecture
from harmonize_lib.attribution import explain
from harmonize_lib.consensus import consensus, list_rules
from harmonize_lib.data import Dataset
from harmonize_lib.errors import HarmonizeError
from harmonize_lib.models import ARCHITECTURES, Model
from harmonize_lib.transfer import (
    TRANSFER_SCHEMA,
    area_over_fractions,
    family_advantage,
    held_out_pool,
    recognition,
    relative_transfer,
    transfer_table,
)

ZOO = {
    f"{architecture}-obj{seed}": architecture
    for architecture in ("resnet", "vgg", "convnext", "vit", "swin")
    for seed in ("", "-s1")
}
SIDE, PATCH = 8, 2
SURE = 1 / (1 + math.exp(-4))  # two classes, logits +2 and -2


class Spot(nn.Module):
    """Knows the class from one patch: logits 4 (mean - 1/2) and its negative, +-2 for a white or black patch."""

    def __init__(self, row: int, column: int) -> None:
        super().__init__()
        self.place = (slice(None), 0, slice(row, row + PATCH), slice(column, column + PATCH))

    def forward(self, x: Tensor) -> Tensor:
        logit = 4 * (x[self.place].mean((1, 2)) - 0.5)
        return torch.stack([-logit, logit], 1)


def spot_data(n: int = 10) -> Dataset:
    """Noise with mean 1/2; the patches at the top left and at the bottom right are white for class 1, else black."""
    labels = torch.arange(n) % 2
    images = torch.rand(n // 2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    images = torch.stack([images, 1 - images], 1).flatten(0, 1)
    images[:, 0, :PATCH, :PATCH] = labels[:, None, None].float()
    images[:, 0, -PATCH:, -PATCH:] = labels[:, None, None].float()
    return Dataset(images, labels, ("dark", "bright"), None, tuple(f"image-{i}" for i in range(n)), "spots")


def spot_maps(n: int = 10) -> dict[tuple[str, str], Tensor]:
    """Maps that point at the patch each model uses; a floor that points at none of them."""
    maps = torch.rand(4, n, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    maps[:2, :, :PATCH, :PATCH] += 1
    maps[2, :, -PATCH:, -PATCH:] += 1
    maps[3, :, 4, 4] += 100
    keys = [("left", "m"), ("left-s1", "m"), ("right", "m"), ("random", "control")]
    return dict(zip(keys, maps, strict=True))


def spot_models() -> dict[str, nn.Module]:
    models = {"left": Spot(0, 0), "left-s1": Spot(0, 0), "right": Spot(SIDE - PATCH, SIDE - PATCH)}
    return {name: model.eval() for name, model in models.items()}


def made_table(
    transfer: Callable[[str, str], float], names: list[str], images: int = 40, noise: float = 0.02, seed: int = 0
) -> pd.DataFrame:
    """A table with given means and image effects, own features 0.9, floor 0.1."""
    rng = np.random.default_rng(seed)
    rows = []
    for fraction in (0.05, 0.2):
        for source in [*names, "random"]:
            for target in names:
                mean = 0.1 if source == "random" else 0.9 if source == target else transfer(source, target)
                effect = rng.normal(0, noise, images)
                for i, p in enumerate(np.clip(mean + effect - effect.mean(), 0, 1)):
                    method = "control" if source == "random" else "m"
                    rows.append((source, target, method, fraction, False, f"i{i}", bool(p > 0.5), p))
    return TRANSFER_SCHEMA.validate(pd.DataFrame(rows, columns=list(TRANSFER_SCHEMA.columns)))


# the pool


@pytest.mark.parametrize("target", ZOO)
def test_the_evaluated_architecture_is_never_in_the_pool(target):
    pool = held_out_pool(ZOO, target)
    assert len(pool) == 8
    assert all(ZOO[name] != ZOO[target] for name in pool)
    architecture = target.split("-")[0]
    assert f"{architecture}-obj" not in pool and f"{architecture}-obj-s1" not in pool
    assert {ZOO[name] for name in pool} == set(ZOO.values()) - {ZOO[target]}


@pytest.mark.parametrize("target", ["resnet-obj", "resnet-obj-s1"])
def test_consensus_of_the_pool_never_reads_the_targets_architecture(target):
    generator = torch.Generator().manual_seed(0)
    maps = {name: torch.randn(3, 4, 4, generator=generator) for name in ZOO}
    poisoned = {name: torch.full_like(m, torch.nan) if ZOO[name] == "resnet" else m for name, m in maps.items()}
    pool = held_out_pool(ZOO, target)
    for rule in list_rules():
        clean = consensus(torch.stack([maps[name] for name in pool]), rule)
        assert torch.equal(consensus(torch.stack([poisoned[name] for name in pool]), rule), clean)


def test_pool_from_real_models():
    models = [
        Model(ARCHITECTURES[architecture](2), f"{architecture}-obj{seed}", architecture, ("a", "b"))
        for architecture in ("vgg", "vit")
        for seed in ("", "-s1")
    ]
    names = {model.name: model.architecture for model in models}
    assert held_out_pool(names, "vit-obj-s1") == ["vgg-obj", "vgg-obj-s1"]


def test_pool_errors():
    with pytest.raises(HarmonizeError, match="unknown model 'resnet-ob': did you mean 'resnet-obj'"):
        held_out_pool(ZOO, "resnet-ob")
    with pytest.raises(HarmonizeError, match="all models are of architecture 'vit'"):
        held_out_pool({"vit-obj": "vit", "vit-obj-s1": "vit"}, "vit-obj")


# recognition


def test_features_travel_between_models_that_use_the_same_patch():
    table = recognition(spot_models(), spot_data(), spot_maps(), [1 / 16], PATCH, complement=True)
    mean = table.groupby(["complement", "source", "target"], observed=True)["probability"].mean()
    for source in ("left", "left-s1"):
        for target in ("left", "left-s1"):
            assert mean[False, source, target] == pytest.approx(SURE)
            assert mean[True, source, target] == pytest.approx(0.5)
        assert mean[False, source, "right"] == pytest.approx(0.5)
        assert mean[True, source, "right"] == pytest.approx(SURE)
    assert mean[False, "right", "right"] == pytest.approx(SURE)
    assert mean[False, "random", "left"] == pytest.approx(0.5)
    rho = relative_transfer(table).set_index(["source", "target"])["rho"]
    assert rho["left", "left"] == rho["left-s1", "left"] == rho["right", "right"] == 1
    assert rho["left", "right"] == pytest.approx(0)


def slow_recognition(
    models: Mapping[str, nn.Module], data: Dataset, maps: Mapping[tuple[str, str], Tensor], fractions: list[float]
) -> dict[tuple[str, str, str, float, bool, str], tuple[bool, float]]:
    mean = data.images.mean()
    cells = SIDE // PATCH
    rows = {}
    for (source, method), values in maps.items():
        for fraction in fractions:
            for i, name in enumerate(data.ids):
                scores = []
                for r in range(cells):
                    for c in range(cells):
                        block = values[i, r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH]
                        scores.append((float(block.mean()), r, c))
                top = sorted(scores, reverse=True)[: max(1, round(fraction * cells * cells))]
                kept = torch.zeros(SIDE, SIDE, dtype=torch.bool)
                for _, r, c in top:
                    kept[r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH] = True
                for complement in (False, True):
                    image = data.images[i].clone()
                    image[0][kept if complement else ~kept] = mean
                    for target, model in models.items():
                        p = model(image[None])[0].softmax(0)
                        label = int(data.labels[i])
                        key = (source, target, method, fraction, complement, name)
                        rows[key] = (int(p.argmax()) == label, float(p[label]))
    return rows


def test_table_equals_literal_loops():
    models, data, maps = spot_models(), spot_data(), spot_maps()
    fractions = [0.25, 0.0625, 1.0]
    table = recognition(models, data, maps, fractions, PATCH, complement=True, batch_size=3)
    expected = slow_recognition(models, data, maps, fractions)
    assert len(table) == len(expected) == 4 * 3 * 3 * 2 * 10
    for row in table.itertuples(index=False):
        correct, probability = expected[row.source, row.target, row.method, row.fraction, row.complement, row.image]
        assert row.probability == pytest.approx(probability, abs=1e-6)
        assert row.correct == correct or probability == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("fill", ["mean", "blur", "road"])
def test_batch_size_and_order_of_samples_change_nothing(fill):
    models, data, maps = spot_models(), spot_data(), spot_maps()
    before = data.images.clone(), {key: value.clone() for key, value in maps.items()}
    whole = recognition(models, data, maps, [0.25], PATCH, fill)
    assert torch.equal(data.images, before[0])
    assert all(torch.equal(maps[key], before[1][key]) for key in maps)
    pd.testing.assert_frame_equal(recognition(models, data, maps, [0.25], PATCH, fill, batch_size=1), whole)
    order = torch.arange(len(data)).flip(0)
    turned = {key: value[order] for key, value in maps.items()}
    other = recognition(models, data.select(order), turned, [0.25], PATCH, fill)
    by = ["source", "target", "method", "image"]
    sort = [table.astype({name: str for name in by}).sort_values(by, ignore_index=True) for table in (whole, other)]
    pd.testing.assert_frame_equal(*sort)


def test_random_floor_is_added_seeded_nested_and_the_same_for_all_targets():
    models, data = spot_models(), spot_data(200)
    flat = {("flat", "m"): torch.zeros(200, SIDE, SIDE)}
    table = recognition(models, data, flat, [0.25, 0.5], PATCH, seed=3)
    floor = table[table["source"] == "random"]
    assert set(floor["method"]) == {"control"}
    wide = floor.set_index(["image", "target", "fraction"])["probability"].unstack([1, 2])
    assert wide["left"].equals(wide["left-s1"])
    kept = (wide["left"] - 0.5).abs() > 0.1
    assert not (kept[0.25] & ~kept[0.5]).any()
    assert kept[0.25].mean() == pytest.approx(0.25, abs=0.1) and kept[0.5].mean() == pytest.approx(0.5, abs=0.1)
    again = recognition(models, data, flat, [0.25, 0.5], PATCH, seed=3)
    pd.testing.assert_frame_equal(table, again)
    other = recognition(models, data, flat, [0.25, 0.5], PATCH, seed=4)
    assert not other["probability"].equals(table["probability"])
    ties = recognition(models, data, flat | {("zero", "m"): flat["flat", "m"]}, [0.25], PATCH).set_index("source")
    assert ties.loc["flat", "probability"].tolist() == ties.loc["zero", "probability"].tolist()


def test_maps_are_streamed_one_after_the_other():
    data, asked = spot_data(), []

    class Store(Mapping):
        def __getitem__(self, key):
            asked.append(key)
            return spot_maps()[key]

        def __iter__(self):
            return iter(spot_maps())

        def __len__(self):
            return len(spot_maps())

    streamed = recognition(spot_models(), data, Store(), [0.25, 0.5], PATCH, complement=True)
    assert asked == list(spot_maps())
    pd.testing.assert_frame_equal(
        streamed, recognition(spot_models(), data, spot_maps(), [0.25, 0.5], PATCH, complement=True)
    )


def test_real_models_take_uint8_and_stay_as_they_were():
    torch.manual_seed(0)
    models = [Model(ARCHITECTURES[a](3), f"{a}-obj", a, ("a", "b", "c")) for a in ("vgg", "vit")]
    images = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    data = Dataset(images, torch.arange(6) % 3, ("a", "b", "c"), None, tuple("uvwxyz"), "noise")
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    maps = {(model.name, "m"): torch.rand(6, 64, 64) for model in models}
    table = recognition(models, data, maps, [0.1, 1.0])
    full = table[(table["fraction"] == 1) & (table["target"] == "vit-obj") & (table["source"] == "vgg-obj")]
    p = models[1](models[1].preprocess(images)).double().softmax(1)[torch.arange(6), data.labels]
    assert full["probability"].to_numpy() == pytest.approx(p.numpy(), abs=1e-5)
    for model, state in zip(models, before, strict=True):
        assert not model.training and all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_transfer_table_takes_maps_that_are_there():
    models, data = spot_models(), spot_data()
    maps = spot_maps() | {("left", "other"): spot_maps()["right", "m"], ("mean", "m"): spot_maps()["left", "m"]}
    table = transfer_table(models, data, ["m"], [0.25], PATCH, maps=maps)
    wanted = {key: value for key, value in maps.items() if key[1] != "other"}
    pd.testing.assert_frame_equal(table, recognition(models, data, wanted, [0.25], PATCH))
    with pytest.raises(HarmonizeError, match="methods is empty"):
        transfer_table(models, data, [], [0.25], PATCH, maps=maps)


def test_transfer_table_explains_what_is_not_there():
    torch.manual_seed(0)
    models = [Model(ARCHITECTURES[a](3), f"{a}-obj", a, ("a", "b", "c")) for a in ("vgg", "vit")]
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    data = Dataset(images, torch.arange(4) % 3, ("a", "b", "c"), None, tuple("wxyz"), "noise")
    maps = {(m.name, "saliency"): explain(m, images, data.labels, "saliency").maps for m in models}
    maps["edges", "control"] = explain(models[0], images, data.labels, "edges").maps
    table = transfer_table(models, data, ["saliency", "edges", "random"], [0.1])
    pd.testing.assert_frame_equal(table, recognition(models, data, maps, [0.1]))
    with pytest.raises(HarmonizeError, match="attention_rollout on vgg-obj: "):
        transfer_table(models, data, ["saliency", "attention_rollout"], [0.1])


# statistics of the table


def test_relative_transfer_known_answer_and_literal_bootstrap():
    names = ["a", "b"]
    table = made_table(lambda m, n: 0.5 if m == "a" else 0.7, names)
    result = relative_transfer(table, seed=5, n_resamples=50)
    assert len(result) == 2 * 2 * 2 and set(result["n"]) == {40}
    found = result.set_index(["source", "target", "fraction"])
    assert found.loc[("a", "b", 0.05), "rho"] == pytest.approx(0.5)
    assert found.loc[("b", "a", 0.2), "rho"] == pytest.approx(0.75)
    assert found.loc[("a", "b", 0.2), ["transfer", "floor", "own"]].tolist() == pytest.approx([0.5, 0.1, 0.9])
    own = found.loc[("a", "a", 0.05), ["rho", "low", "high"]]
    assert own.tolist() == pytest.approx([1, 1, 1])

    counts = np.random.default_rng(5).multinomial(40, np.full(40, 1 / 40), size=50)
    cell = table[table["fraction"] == 0.2].set_index(["source", "target", "image"])["probability"]
    images = sorted(f"i{i}" for i in range(40))
    draws = []
    for count in counts:
        transfer = sum(c * cell["b", "a", i] for c, i in zip(count, images, strict=True)) / 40
        floor = sum(c * cell["random", "a", i] for c, i in zip(count, images, strict=True)) / 40
        own = sum(c * cell["a", "a", i] for c, i in zip(count, images, strict=True)) / 40
        draws.append((transfer - floor) / (own - floor))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.loc[("b", "a", 0.2), ["low", "high"]].tolist() == pytest.approx([low, high])


def test_relative_transfer_is_undefined_without_a_clear_own_advantage():
    names = ["a", "b"]
    table = made_table(lambda m, n: 0.5, names)
    own_a = (table["source"] == "a") & (table["target"] == "a")
    floor_a = (table["source"] == "random") & (table["target"] == "a")
    table.loc[own_a, "probability"] = table.loc[floor_a, "probability"].to_numpy()[::-1] + 0.001
    result = relative_transfer(table)
    of_a = result[result["target"] == "a"]
    assert of_a[["rho", "low", "high"]].isna().all(axis=None) and of_a["transfer"].notna().all()
    assert result[result["target"] == "b"]["rho"].notna().all()
    no_own = table[~((table["source"] == "b") & (table["target"] == "b"))]
    result = relative_transfer(no_own)
    assert result[result["target"] == "b"][["rho", "own"]].isna().all(axis=None)


def test_order_of_rows_changes_no_statistic():
    table = made_table(lambda m, n: 0.5 if m == "a" else 0.7, ["a", "b"])
    mixed = table.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(relative_transfer(mixed), relative_transfer(table))
    read_back = mixed.astype({name: str for name in ("source", "target", "method", "image")})
    pd.testing.assert_frame_equal(relative_transfer(read_back), relative_transfer(table))
    names = {"a": "cnn", "b": "transformer"}
    pd.testing.assert_frame_equal(family_advantage(mixed, names, names), family_advantage(table, names, names))


FAMILIES = {"c1": "cnn", "c1-s1": "cnn", "c2": "cnn", "c3": "cnn", "t1": "transformer", "t2": "transformer"}
FAMILIES |= {"h": "hybrid"}
DESIGNS = {name: name.removesuffix("-s1") for name in FAMILIES}


def within_half(m: str, n: str) -> float:
    """rho = 0.6 within a family, 0.35 across, 0.95 for another seed, anything for the hybrid."""
    if DESIGNS[m] == DESIGNS[n]:
        return 0.1 + 0.8 * 0.95
    if "h" in (m, n):
        return 0.8
    return 0.1 + 0.8 * (0.6 if FAMILIES[m] == FAMILIES[n] else 0.35)


def test_family_advantage_known_answer():
    table = made_table(within_half, list(FAMILIES), images=20)
    result = family_advantage(table, FAMILIES, DESIGNS, n_resamples=200)
    assert result["fraction"].tolist() == [0.05, 0.2]
    for row in result.itertuples():
        assert (row.within, row.across, row.advantage) == pytest.approx((0.6, 0.35, 0.25))
        assert row.low < 0.25 < row.high and row.low > 0.2
        assert row.p == pytest.approx(2 / 201)
        # within: cnn 4 x 3 less the two seeds of c1, transformer 2; across: 4 x 2 both ways
        assert (row.n, row.pairs, row.targets) == (20, 10 + 2 + 16, 6)


def test_family_advantage_resamples_the_same_images_for_all_pairs():
    table = made_table(within_half, list(FAMILIES), images=20)
    result = family_advantage(table, FAMILIES, DESIGNS, seed=2, n_resamples=30).iloc[0]
    part = table[table["fraction"] == 0.05].set_index(["image", "source", "target"])
    cell = part["probability"].unstack([1, 2])
    cell = cell.loc[sorted(f"i{i}" for i in range(20))]
    draws = []
    for count in np.random.default_rng(2).multinomial(20, np.full(20, 1 / 20), size=30):
        blocks: dict[tuple[str, str], list[float]] = {}
        for m in FAMILIES:
            for n in FAMILIES:
                if DESIGNS[m] != DESIGNS[n] and "h" not in (m, n):
                    mean = {s: float(count @ cell[s, n] / 20) for s in (m, n, "random")}
                    rho = (mean[m] - mean["random"]) / (mean[n] - mean["random"])
                    blocks.setdefault((FAMILIES[m], FAMILIES[n]), []).append(rho)
        r = {route: sum(values) / len(values) for route, values in blocks.items()}
        within = (r["cnn", "cnn"] + r["transformer", "transformer"]) / 2
        draws.append(within - (r["cnn", "transformer"] + r["transformer", "cnn"]) / 2)
    assert [result["low"], result["high"]] == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist())


def test_better_sources_in_one_family_are_no_family_advantage():
    def better_sources(m: str, n: str) -> float:
        return 0.1 + 0.8 * (0.7 if FAMILIES[m] == "cnn" else 0.3)

    table = made_table(better_sources, list(FAMILIES), images=20)
    result = family_advantage(table, FAMILIES, DESIGNS, n_resamples=200)
    assert result["advantage"].to_numpy() == pytest.approx(0)
    assert ((result["low"] < 0) & (result["high"] > 0) & (result["p"] > 0.05)).all()


def test_family_advantage_is_undefined_without_pairs():
    names = ["c1", "c2", "t1"]
    result = family_advantage(made_table(within_half, names), FAMILIES, DESIGNS, n_resamples=20)
    assert result[["within", "across", "advantage", "low", "high", "p"]].isna().all(axis=None)
    with pytest.raises(HarmonizeError, match="target 'c2' has no family or architecture"):
        family_advantage(made_table(within_half, names), {"c1": "cnn", "t1": "transformer"}, DESIGNS)


def test_area_is_the_normalized_trapezoid():
    models, data, maps = spot_models(), spot_data(), spot_maps()
    fractions = [0.5, 0.0625, 0.125, 1.0]
    table = recognition(models, data, maps, fractions, PATCH, complement=True)
    areas = area_over_fractions(table)
    assert len(areas) == len(table) / 4
    k = np.sort(fractions)
    curves = table.set_index(["source", "target", "method", "complement", "image", "fraction"]).sort_index()
    for row in areas.sample(25, random_state=0).itertuples():
        curve = curves.loc[(row.source, row.target, row.method, row.complement, row.image)].loc[k]
        for value in ("correct", "probability"):
            expected = sum(
                (curve[value].iloc[i] * 1.0 + curve[value].iloc[i + 1]) / 2 * (k[i + 1] - k[i]) for i in range(3)
            ) / (k[-1] - k[0])
            assert getattr(row, value) == pytest.approx(expected)
    perfect = areas[(areas["source"] == "left") & (areas["target"] == "left") & ~areas["complement"]]
    assert perfect["probability"].to_numpy() == pytest.approx(SURE)
    rho = relative_transfer(areas).set_index(["source", "target"])["rho"]
    assert rho["left-s1", "left"] == pytest.approx(1)
    shuffled = area_over_fractions(table.sample(frac=1, random_state=1))
    pd.testing.assert_frame_equal(areas, shuffled)


def test_area_of_families():
    result = family_advantage(area_over_fractions(made_table(within_half, list(FAMILIES))), FAMILIES, DESIGNS)
    assert len(result) == 1 and result["advantage"].item() == pytest.approx(0.25)


# errors


def test_schema_refuses_what_is_not_the_table():
    table = made_table(lambda m, n: 0.5, ["a", "b"], images=3)
    for wrong in (
        table.assign(probability=table["probability"] + 1),
        table.assign(fraction=0.0),
        table.drop(columns="correct"),
        table.assign(extra=1),
        pd.concat([table, table], ignore_index=True),
        table.assign(probability=np.nan),
    ):
        with pytest.raises((pandera.errors.SchemaError, pandera.errors.SchemaErrors)):
            TRANSFER_SCHEMA.validate(wrong)


def test_recognition_errors():
    models, data, maps = spot_models(), spot_data(), spot_maps()

    def wrong(match: str, **changes: object) -> None:
        call = {"models": models, "dataset": data, "maps": maps, "fractions": [0.25], "patch": PATCH} | changes
        with pytest.raises(HarmonizeError, match=match) as caught:
            recognition(**call)
        assert len(str(caught.value)) <= 200 and "\n" not in str(caught.value)

    wrong("fraction=1.5 is out of range", fractions=[1.5])
    wrong("give at least one, none twice", fractions=[0.1, 0.1])
    wrong("give at least one, none twice", fractions=[])
    wrong("patch=3 does not divide", patch=3)
    wrong("unknown fill 'noise'", fill="noise")
    wrong("batch_size must be at least 1", batch_size=0)
    wrong("0 models", models={})
    twins = [Spot(0, 0).eval(), Spot(0, 0).eval()]
    for twin in twins:
        twin.name = "twin"
    wrong("2 models with 1 names", models=twins)
    wrong(r"maps of \('left', 'm'\) are \(10, 4, 4\)", maps={("left", "m"): torch.zeros(10, 4, 4)})
    wrong(r"maps of \('left', 'm'\) hold NaN", maps={("left", "m"): torch.full((10, 8, 8), torch.nan)})
    wrong("model 'left' is in train mode", models={"left": Spot(0, 0).train()})
    named = Spot(0, 0).eval()
    named.classes = ("cat", "dog")
    wrong("knows 2 classes that are not the data set's 2", models={"left": named})
    broken = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    nn.init.constant_(broken[1].weight, torch.nan)
    wrong("gives NaN or infinite logits", models={"left": broken})
    wrong(
        r"gives \(10, 3\): it must give logits \(10, 2\)",
        models={"left": nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()},
    )
    bytes_ = Dataset(
        torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2).long(), ("a", "b"), None, ("x", "y"), "u"
    )
    wrong("has no preprocess: it takes float images", dataset=bytes_, maps={("left", "m"): torch.zeros(2, 8, 8)})


def test_statistics_errors():
    table = made_table(lambda m, n: 0.5, ["a", "b"], images=4)
    with pytest.raises(HarmonizeError, match="floor 'randm' has 0 methods"):
        relative_transfer(table, floor="randm")
    with pytest.raises(HarmonizeError, match="unknown value 'accuracy'"):
        relative_transfer(table, value="accuracy")
    with pytest.raises(HarmonizeError, match="the table lacks image"):
        relative_transfer(table.drop(columns="image"))
    with pytest.raises(HarmonizeError, match="each cell needs all, once"):
        relative_transfer(table.iloc[1:])
    with pytest.raises(HarmonizeError, match="each cell needs all, once"):
        relative_transfer(pd.concat([table, table]))
    with pytest.raises(HarmonizeError, match="level=2"):
        relative_transfer(table, level=2)
    with pytest.raises(HarmonizeError, match="lacks some targets"):
        relative_transfer(table[(table["source"] != "random") | (table["target"] != "a")])
    with pytest.raises(HarmonizeError, match="at least 2 fractions"):
        area_over_fractions(table[table["fraction"] == 0.2])
    with pytest.raises(HarmonizeError, match="some curves lack some"):
        area_over_fractions(table.iloc[1:])


def test_a_method_that_models_refuse_leaves_their_rows_empty():
    pairs = [("all", "a"), ("all", "b"), ("some", "b")]
    rows = [(method, source, target, 0.5) for method, source in pairs for target in "ab"]
    figure = cross_architecture.draw_matrices(pd.DataFrame(rows, columns=["method", "source", "target", "mean"]))
    written = [sorted(text.get_position()[1] for text in ax.texts) for ax in figure.axes]
    assert written == [[0.5, 0.5, 1.5, 1.5], [1.5, 1.5]]
    assert all(sorted(ax.get_ylim()) == [0, 2] for ax in figure.axes)
    plt.close("all")
