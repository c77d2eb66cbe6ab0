"""Interactions: the formula, networks that are what they say, and the study's known answers."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from torch import Tensor, nn

from harmonize_lib import HarmonizeError
from harmonize_lib import decomposition_study as study
from harmonize_lib.data import load_dataset
from harmonize_lib.decomposition import contextual_decomposition, patch_groups
from harmonize_lib.hierarchy import SCORES
from harmonize_lib.interactions import BUILT, features, inputs, interactions, planted
from harmonize_lib.literal_decomposition import decompose

GATES = {
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "difference": lambda a, b: (a - b).abs(),
    "threshold": lambda a, b: (a + b - 1).relu(),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_interactions_are_the_formula() -> None:
    model = tiny.small(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)).double()
    x, targets, groups = tiny.floats(2).double(), torch.tensor([1, 3]), patch_groups(6, 6, 3)

    def score(n: int, group: Tensor, kind: str) -> float:
        if kind == "cd":
            return float(contextual_decomposition(model, x[n : n + 1], group[None])[0][0, targets[n]].detach())
        shown = x[n : n + 1] * (group if kind == "build_up" else ~group)
        return float(model(shown)[0, targets[n]].detach()) * (1 if kind == "build_up" else -1)

    for kind in SCORES:
        values, pairs = interactions(model, x, targets, groups, kind)
        assert pairs.tolist() == [list(pair) for pair in combinations(range(4), 2)]
        for n in range(2):
            for value, (i, j) in zip(values[n], pairs, strict=True):
                nothing = score(n, torch.zeros_like(groups[0]), kind)
                alone = score(n, groups[i], kind) + score(n, groups[j], kind)
                want = score(n, groups[i] | groups[j], kind) - alone + nothing
                assert float(value) == pytest.approx(want, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("kind", BUILT)
def test_built_networks_hold_their_gates_and_nothing_else(kind: str) -> None:
    x = inputs(20, generator(3)).double()
    for known in planted(kind, 3, 5):
        assert len(set(known.pairs.flatten().tolist())) == 8 and known.fit == 1
        values, pairs = interactions(known.network.double(), x, torch.zeros(20).long(), features(), "build_up")
        want = torch.zeros(20, 120, dtype=torch.float64)
        zero = torch.zeros(20, dtype=torch.float64)
        gate = GATES[kind]
        for column, (i, j) in enumerate(pairs.tolist()):
            if [i, j] in known.pairs.tolist():
                a, b = x.flatten(1)[:, i], x.flatten(1)[:, j]
                want[:, column] = gate(a, b) - gate(a, zero) - gate(zero, b) + gate(zero, zero)
        torch.testing.assert_close(values, want, rtol=1e-5, atol=1e-6)
        assert want.any()


def test_a_threshold_gate_shares_its_bias_so_that_the_interaction_vanishes() -> None:
    """max(0, a + b - 1) alone, open: beta of a is a - a / (a + b), so the features add up to the gate."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1, bias=False)).requires_grad_(False)
    network[1].weight.copy_(torch.ones(1, 2))
    network[1].bias.fill_(-1.0)
    network[3].weight.fill_(1.0)
    x = torch.tensor([[[[0.9, 0.8]]], [[[0.2, 0.3]]]])
    groups = torch.tensor([[[True, False]], [[False, True]]])
    assert network(x).flatten().tolist() == pytest.approx([0.7, 0.0])
    values = {score: interactions(network.eval(), x, torch.zeros(2).long(), groups, score)[0] for score in SCORES}
    assert values["cd"].flatten().tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert values["build_up"].flatten().tolist() == pytest.approx([0.7, 0.0], abs=1e-6)


def test_without_biases_decomposition_is_build_up() -> None:
    model = tiny.small(nn.Conv2d(2, 3, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4, bias=False)).double()
    groups, targets = patch_groups(6, 6, 2), torch.tensor([0, 1, 2])
    values = [interactions(model, tiny.floats().double(), targets, groups, score)[0] for score in ("cd", "build_up")]
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-10)


def test_learned_networks_learn_and_seeds_tell() -> None:
    first, second = planted("learned product", 2, 1)
    assert min(first.fit, second.fit) > 0.9
    assert first.pairs.tolist() != second.pairs.tolist()
    again = planted("minimum", 2, 1)
    assert [known.pairs.tolist() for known in again] != [first.pairs.tolist(), second.pairs.tolist()]
    x = inputs(4, generator())
    assert torch.equal(planted("minimum", 2, 1)[0].network(x), again[0].network(x))
    assert not torch.equal(planted("minimum", 2, 2)[0].network(x), again[0].network(x))
    with pytest.raises(HarmonizeError, match="did you mean 'minimum'"):
        planted("minimun", 1, 0)


def test_recovery_is_the_area_by_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "KINDS", ("maximum", "threshold"))
    table = study.recovery(1, 3, 4)
    assert len(table) == 2 * len(SCORES)
    known = planted("maximum", 1, 4)[0]
    x = inputs(3, generator(4))
    values, pairs = interactions(known.network, x, torch.zeros(3).long(), features(), "occlusion")
    truth = np.array([pair in known.pairs.tolist() for pair in pairs.tolist()])

    def area(sizes: np.ndarray) -> float:
        wins = [(a > b) + (a == b) / 2 for a in sizes[truth] for b in sizes[~truth]]
        return float(np.mean(wins))

    row = table[(table["kind"] == "maximum") & (table["score"] == "occlusion")].iloc[0]
    assert truth.sum() == 4
    assert row["auc"] == pytest.approx(area(values.abs().mean(0).numpy()))
    assert row["auc_image"] == pytest.approx(np.mean([area(sizes) for sizes in values.abs().numpy()]))


def test_perturbations_are_what_they_are_called() -> None:
    model = tiny.small(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    images = 0.3 + 0.4 * torch.rand(3, 1, 6, 6, generator=generator())
    labels = torch.tensor([0, 1, 2])
    moved = study.perturbed(model, images, labels, 0.05, 7)
    assert tuple(moved) == study.PERTURBATIONS
    loss = {
        name: float(nn.functional.cross_entropy(model(x), labels).detach())
        for name, x in (moved | {"": images}).items()
    }
    assert loss["FGSM"] > max(loss[""], loss["random signs"])
    for name in ("FGSM", "random signs"):
        torch.testing.assert_close((moved[name] - images).abs(), torch.full_like(images, 0.05))
    assert float((moved["Gaussian"] - images).std()) == pytest.approx(0.05, rel=0.2)
    assert torch.equal(moved["shift"][..., 1:], images[..., :-1]) and not moved["shift"][..., 0].any()
    assert all(
        torch.equal(value, moved[name]) for name, value in study.perturbed(model, images, labels, 0.05, 7).items()
    )


def test_what_hardly_moves_stays_in_order() -> None:
    model = tiny.small(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    images = 0.3 + 0.4 * torch.rand(2, 1, 6, 6, generator=generator())
    table = study.stability(model, images, torch.tensor([0, 1]), 1e-7, 90.0, 0)
    assert len(table) == 2 * 2 * 4
    still = table[table["perturbation"] != "shift"]
    assert (still["correlation"] > 0.999).all() and still["kept"].all()
    assert (table.loc[table["perturbation"] == "shift", "correlation"] < 0.999).all()


def test_claims_are_measured_as_stated() -> None:
    rows = [
        (kind, f"{kind} {i}", score, 1.0, auc, image + i / 100)
        for kind, best in (("minimum", "occlusion"), ("learned product", "build_up"))
        for i in range(3)
        for score, auc, image in (("cd", 0.9, 0.8), ("occlusion", 1.0, 0.7), ("build_up", 1.0, 0.7))
        for image in [image + 0.2 * (score == best)]
    ]
    recovered = pd.DataFrame(rows, columns=["kind", "network", "score", "fit", "auc", "auc_image"])
    stable = pd.DataFrame(
        [(i, "FGSM", score, value) for i in range(4) for score, value in (("cd", 0.5), ("occlusion", 0.2 + i / 10))],
        columns=["image", "perturbation", "score", "correlation"],
    )
    measured = study.measured_claims(recovered, stable, 0)
    assert measured["cd_interactions"].mean == pytest.approx(0.9) and measured["cd_interactions"].n == 6
    assert measured["cd_over_baselines"].mean == pytest.approx(-0.1)
    assert measured["acd_stability"].mean == pytest.approx(0.15) and measured["acd_stability"].n == 4


def test_promises_see_a_broken_one() -> None:
    gaps = pd.DataFrame(
        [("m", i, promise, 0.0) for i in range(2) for promise in study.PROMISES],
        columns=["model", "image", "promise", "gap"],
    )
    assert all(study.kept_promises(gaps).values())
    gaps.loc[0, "gap"] = 2e-4
    assert list(study.kept_promises(gaps).values()) == [False, True, True]
    assert "but for m" in next(iter(study.kept_promises(gaps)))


def test_promises_do_not_hold_by_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold; with a γ that is 0.1 % too large, or that takes a part of β, they do not."""
    data = load_dataset("shapes-on-scenes", "test", 3)
    models = {"resnet": tiny.model("resnet")}
    worst = study.promises(models, data, 0).groupby("promise")["gap"].max()
    assert (worst[list(study.PROMISES)] < 1e-12).all() and 0 < worst[study.ROUNDING] < 1e-3

    def larger(model: nn.Module, x: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        beta, gamma = decompose(model, x, masks)
        return beta, 1.001 * gamma

    monkeypatch.setattr(study, "decompose", larger)
    assert study.promises(models, data, 0).groupby("promise")["gap"].max()[study.PROMISES[0]] > study.TOLERANCE

    def shifted(model: nn.Module, x: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        beta, gamma = decompose(model, x, masks)
        return beta - 1, gamma + 1

    monkeypatch.setattr(study, "decompose", shifted)
    worst = study.promises(models, data, 0).groupby("promise")["gap"].max()
    assert (worst[list(study.PROMISES[:2])] > study.TOLERANCE).all()


def test_a_cost_whose_interval_holds_the_limit_is_undecided() -> None:
    costs = pd.DataFrame(
        [("a", 1.0, 0.9, 1.1, 5), ("b", 1.29, 1.2, 1.38, 5), ("c", 1.5, 1.4, 1.6, 5)],
        columns=["model", "mean", "low", "high", "n"],
    )
    assert study.cost_in_words(costs).endswith("below: a; above: c; undecided (the interval holds it): b")
