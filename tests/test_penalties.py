"""Explanation penalties against literal loops; trainings that differ in the penalty alone."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from tiny import floats, settle, small
from torch import nn
from torch.nn import functional as F

from harmonize_lib import HarmonizeError
from harmonize_lib import penalty_study as study
from harmonize_lib.claims import JUDGED
from harmonize_lib.decomposition import contextual_decomposition, propagate
from harmonize_lib.operations import Operations
from harmonize_lib.penalties import explanation_penalty
from harmonize_lib.tasks import evaluated

Y = torch.tensor([1, 0, 2])


def net() -> nn.Module:
    return small(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)).double()


def masks(groups: int = 2, n: int = 3) -> torch.Tensor:
    return torch.rand(groups, n, 6, 6, generator=torch.Generator().manual_seed(3)) < 0.3


def images() -> torch.Tensor:
    return floats().double()


@pytest.mark.parametrize("form", ["paper", "code"])
def test_cdep_equals_a_loop_over_images_groups_and_classes(form):
    model, x, groups = net(), images(), masks()
    total = 0.0
    for group in groups:
        for i in range(3):
            beta, gamma = contextual_decomposition(model, x[i : i + 1], group[i : i + 1])
            for b, c in zip(beta[0].tolist(), gamma[0].tolist(), strict=True):
                total += abs(b) / 3 if form == "paper" else math.exp(b) / (math.exp(b) + math.exp(c)) / (2 * 3 * 3)
    assert explanation_penalty(model, x, Y, groups, "cdep", form).item() == pytest.approx(total, rel=1e-9)


def test_rrr_equals_finite_differences_of_each_images_loss():
    model, x, groups = net(), images(), masks()
    total = 0.0
    for i in range(3):
        for c, h, w in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(6)).tolist():
            step = torch.zeros_like(x[:1])
            step[0, c, h, w] = 1e-6
            ends = [F.cross_entropy(model(x[i : i + 1] + sign * step), Y[i : i + 1]).item() for sign in (1, -1)]
            total += int(groups[:, i, h, w].sum()) * ((ends[0] - ends[1]) / 2e-6) ** 2 / 3
    assert explanation_penalty(model, x, Y, groups, "rrr").item() == pytest.approx(total, rel=1e-5)


def test_eg_equals_a_loop_with_the_same_draws():
    model, x, groups = net(), images(), masks()
    references = torch.stack([x[2], x[0], x[1]])
    positions = torch.rand(3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    total = 0.0
    for i in range(3):
        at = (references[i] + positions[i] * (x[i] - references[i]))[None].requires_grad_()
        (slope,) = torch.autograd.grad(model(at)[0, Y[i]], at)
        values = ((x[i] - references[i]) * slope[0]).abs().sum(0)
        total += sum(float(values[group[i]].sum()) for group in groups) / 3
    generator = torch.Generator().manual_seed(5)
    found = explanation_penalty(model, x, Y, groups, "eg", generator=generator)
    assert found.item() == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize(("kind", "form"), [("cdep", "paper"), ("cdep", "code"), ("rrr", "paper"), ("eg", "paper")])
def test_gradient_of_the_penalty_with_respect_to_weights(kind, form):
    """Smooth activations, so that a double-backward error could not hide in a kink."""
    model = small(nn.Conv2d(2, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(48, 3)).double()
    x, groups = images(), masks(1)[0]

    def value() -> torch.Tensor:
        return explanation_penalty(model, x, Y, groups, kind, form, generator=torch.Generator().manual_seed(0))

    gradients = torch.autograd.grad(value(), list(model.parameters()), allow_unused=True, materialize_grads=True)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        flat = parameter.data.view(-1)
        at = len(flat) // 2
        flat[at] += 1e-6
        above = value().item()
        flat[at] -= 2e-6
        below = value().item()
        flat[at] += 1e-6
        assert gradient.flatten()[at].item() == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", ["cdep", "rrr", "eg"])
def test_nothing_is_penalized_without_pixels_and_groups_add_up(kind):
    model, x, groups = net(), images(), masks()
    draws = [torch.Generator().manual_seed(0) for _ in range(4)]
    assert explanation_penalty(model, x, Y, groups[0] & False, kind, generator=draws[0]).item() == 0
    parts = [
        explanation_penalty(model, x, Y, group, kind, generator=draw)
        for group, draw in zip(groups, draws[1:3], strict=True)
    ]
    torch.testing.assert_close(explanation_penalty(model, x, Y, groups, kind, generator=draws[3]), sum(parts))


@pytest.mark.parametrize("kind", ["cdep", "rrr"])
def test_a_batch_is_the_mean_of_its_images(kind):
    model, x, groups = net(), images(), masks()
    single = [explanation_penalty(model, x[i : i + 1], Y[i : i + 1], groups[:, i : i + 1], kind) for i in range(3)]
    torch.testing.assert_close(explanation_penalty(model, x, Y, groups, kind), torch.stack(single).mean())


@pytest.mark.parametrize("kind", ["cdep", "rrr", "eg"])
def test_the_model_is_left_as_found(kind):
    """Dropout and BatchNorm see nothing of the penalty: each module's own mode, statistics and gradients stay."""
    layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3))
    model = settle(nn.Sequential(*layers)).train()
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    first = explanation_penalty(model, floats(), Y, masks()[0], kind, generator=torch.Generator().manual_seed(0))
    again = explanation_penalty(model, floats(), Y, masks()[0], kind, generator=torch.Generator().manual_seed(0))
    assert first.item() == again.item() > 0
    assert [module.training for module in model] == [True, False, True, True, True, True] and model.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


def test_modes_come_back_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    model[1].eval()
    with pytest.raises(RuntimeError, match="stop"), evaluated(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == [True, True, False]


def test_mistakes_get_one_line():
    model, x = net(), images()
    with pytest.raises(HarmonizeError, match="unknown kind 'cdap': did you mean 'cdep'"):
        explanation_penalty(model, x, Y, masks(), "cdap")
    with pytest.raises(HarmonizeError, match="unknown form"):
        explanation_penalty(model, x, Y, masks(), form="book")
    with pytest.raises(HarmonizeError, match=r"groups must be bool .*not torch.float32"):
        explanation_penalty(model, x, Y, masks().float())
    with pytest.raises(HarmonizeError, match="generator"):
        explanation_penalty(model, x, Y, masks(), "eg")


# The study


def splits(seed: int = 0, n_train: int = 200) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return study.load("digits", n_train, 60, 80, seed)


def test_sets_do_not_overlap_and_lose_nothing():
    sets = study.load("digits", 1000, 200, 397, 0)
    assert [len(sets[name][1]) for name in study.SETS] == [1000, 200, 200, 397]
    rows = torch.cat([images.flatten(1) for images, _ in sets.values()])
    assert len(rows) == 1797 and len(rows.unique(dim=0)) == 1797
    with pytest.raises(HarmonizeError, match=r"= 1801 is more than the 1797 images of digits"):
        study.load("digits", 1000, 200, 401, 0)
    with pytest.raises(HarmonizeError, match="unknown digits"):
        study.load("letters", 10, 10, 10, 0)


@pytest.mark.parametrize("shifted", [False, True])
def test_decoys_tell_the_label_and_cover_no_digit(shifted):
    images, labels = study.load("digits", 300, 10, 10, 0)["train"]
    found = (study.decoy(images, labels, shifted, torch.Generator().manual_seed(0)) + 1) * 127.5
    seen = set()
    for image, before, y in zip(found[:, 0], images, labels.tolist(), strict=True):
        corners = [(r, c) for r in (0, 10) for c in (0, 10)]
        wanted = 25 * y if shifted else 255 - 25 * y
        hit = [at for at in corners if (image[at[0] : at[0] + 2, at[1] : at[1] + 2] - wanted).abs().max() < 0.01]
        changed = (image - before).abs() > 0.01
        if wanted:
            assert len(hit) == 1 and changed.sum() == 4
            seen.add(hit[0])
        torch.testing.assert_close(image[2:10, 2:10], before[2:10, 2:10], atol=1e-4, rtol=0)
    assert len(seen) == 4


def test_colors_tell_the_label_and_turn_around():
    colors = study.palette()
    assert len(colors.unique(dim=0)) == 10
    torch.testing.assert_close(colors[[0, -1]], torch.tensor([[1, 0, 0], [0.5, 0, 0.5]]), atol=1e-6, rtol=0)
    images, labels = torch.full((10, 2, 2), 127.5), torch.arange(10)
    torch.testing.assert_close(study.colored(images, labels, False)[:, :, 0, 0], colors / 2)
    torch.testing.assert_close(study.colored(images, labels, True), study.colored(images, labels, False).flip(0))


def test_groups_are_the_corners_or_one_pixel_where_digits_are():
    task = study.shortcut("decoy", splits(), 0)
    assert task.corners.sum() == 16 and task.corners[:2, :2].all() and task.corners[10:, 10:].all()
    assert torch.equal(study.groups_for(task, 5, torch.Generator()), task.corners.expand(5, -1, -1))
    task = study.shortcut("color", splits(), 0)
    groups = study.groups_for(task, 4000, torch.Generator().manual_seed(0))
    assert (groups.sum((1, 2)) == 1).all()
    share = task.activity / task.activity.sum()
    torch.testing.assert_close(groups.double().mean(0), share.double(), atol=0.01, rtol=0)


@pytest.mark.parametrize("arm", ["CDEP (paper)", "CDEP (code)", "RRR", "EG"])
def test_trainings_differ_in_the_penalty_alone(arm):
    """At strength 0 every arm ends at the weights of no penalty: same start, same batches, one step per batch."""
    for name in study.TASKS:
        task = study.shortcut(name, splits(n_train=100), 0)
        none = study.fit(task, "none", 0.0, 1, 1, 50)
        same = study.fit(task, arm, 0.0, 1, 1, 50)
        other = study.fit(task, arm, 1.0, 1, 1, 50)
        weights = [key for key in none if key.startswith("weights.")]
        assert len(weights) == 6
        assert all(torch.equal(none[key], same[key]) for key in weights)
        assert not all(torch.equal(none[key], other[key]) for key in weights)


def test_a_step_is_one_step_of_adam_on_the_sum():
    """A literal loop: penalty and cross-entropy added, one optimizer step each."""
    task = study.shortcut("decoy", splits(n_train=100), 0)
    found = study.fit(task, "RRR", 3.0, 2, 1, 50)
    model = study.network(1, 12, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=study.LEARNING_RATE, weight_decay=1e-4)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(6))
    for rows in order.split(50):
        x, y = task.x["train"][rows].requires_grad_(), task.y["train"][rows]
        loss = F.cross_entropy(model(x), y)
        (slope,) = torch.autograd.grad(loss * 50, x, create_graph=True)
        optimizer.zero_grad()
        (loss + 3.0 * (slope * task.corners).square().sum() / 50).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[f"weights.{name}"], value)


def table() -> pd.DataFrame:
    """Two seeds; the penalty is best at 1 under the shift, and costs too much validation accuracy at 10."""
    rows = []
    for task in study.TASKS:
        for seed in (0, 1):
            rows.append((task, "none", 0.0, seed, 0.95, 0.30, 0.31, 1.0))
            for arm, gain in zip(list(study.ARMS)[1:], (0.4, 0.3, 0.2, 0.1), strict=True):
                for strength, cost, share in ((0.1, 0.0, 0.5), (1.0, 0.01, 1.0), (10.0, 0.5, 0.2)):
                    values = (0.95 - cost, 0.30 + gain * share, 0.31 + gain * share + 0.01 * seed)
                    rows.append((task, arm, strength, seed, *values, 2.0))
    return pd.DataFrame(rows, columns=["task", "arm", "strength", "seed", *study.SETS[1:], "seconds"])


def test_strengths_are_chosen_by_validation_alone():
    chosen = study.select(table(), 0.02)
    strengths = chosen.groupby(["task", "arm", "protocol"])["strength"].first().unstack()
    assert (strengths.drop("none", level="arm") == 1.0).all().all()
    assert (strengths.xs("none", level="arm") == 0).all().all()
    strict = study.select(table(), 0.005)
    assert (strict.loc[(strict["arm"] != "none") & (strict["protocol"] == "shift unknown"), "strength"] == 0.1).all()
    test_blind = table().assign(**{"shifted test": 0.0})
    assert (study.select(test_blind, 0.02)["strength"] == chosen["strength"]).all()


def test_operations_of_a_plain_step_are_those_counted_by_hand():
    """Forward, weights' and inputs' gradients cost the same; nobody asks for the gradient of the images."""
    task = study.shortcut("decoy", study.load("digits", 100, 50, 50, 0), 0)
    first, second, last = 2 * 9 * 8 * 12**2, 2 * 9 * 8 * 16 * 6**2, 2 * 16 * 3**2 * 10
    assert study.operations(task, "none", 20) == 20 * (2 * first + 3 * second + 3 * last)
    assert study.operations(task, "RRR", 20) > study.operations(task, "EG", 20) > 2 * study.operations(task, "none", 20)


def test_a_pass_shared_with_the_loss_spares_a_plain_step():
    """RRR's literal step of one pass; CDEP's loss on beta + gamma, which are the logits."""
    task = study.shortcut("decoy", study.load("digits", 100, 50, 50, 0), 0)
    x, y, plain = task.x["train"][:20], task.y["train"][:20], study.operations(task, "none", 20)
    model = study.network(1, 12, 0)
    with Operations() as counter:
        at = x.clone().requires_grad_()
        loss = F.cross_entropy(model(at), y)
        (slope,) = torch.autograd.grad(loss * 20, at, create_graph=True)
        inside = torch.einsum("nchw,gnhw->", slope.square(), task.corners.expand(1, 20, -1, -1).float())
        (loss + inside / 20).backward(inputs=list(model.parameters()))
    assert counter.total == study.operations(task, "RRR", 20) - plain
    with Operations() as counter:
        beta, gamma = propagate(model.eval(), x * task.corners, x * ~task.corners)
        (F.cross_entropy(beta + gamma, y) + torch.sigmoid(beta - gamma).mean()).backward()
    assert counter.total == study.operations(task, "CDEP (code)", 20) - plain
    torch.testing.assert_close(beta + gamma, model(x))


def test_claims_are_paired_over_seeds():
    decoys = study.shortcut("decoy", study.load("digits", 100, 50, 50, 0), 0)
    measured = study.measured_claims(study.select(table(), 0.02), decoys, 50)
    cost = {arm: study.operations(decoys, arm, 50) / 1e6 for arm in study.ARMS}
    assert cost["CDEP (code)"] == cost["CDEP (paper)"]
    expected = {
        "cdep_color": 0.1,
        "cdep_color_paper": 0.2,
        "cdep_color_unknown_eg": 0.2,
        "cdep_color_unknown_rrr": 0.1,
        "cdep_decoy": 0.305,
        "cdep_decoy_paper": 0.405,
        "eg_rrr_decoy": -0.2,
        "eg_rrr_decoy_paper": -0.3,
        "eg_decoy_unknown": -0.2,
        "rrr_decoy_unknown": -0.1,
        "eg_cost": cost["CDEP (code)"] - cost["EG"],
        "rrr_cost": cost["CDEP (code)"] - cost["RRR"],
    }
    assert list(measured) == list(expected) == list(JUDGED["11_explanation_penalties"])
    for name, value in expected.items():
        assert measured[name].mean == pytest.approx(value, abs=1e-9), name
        assert measured[name].n == (1 if name.endswith("cost") else 2), name


def test_rivals_are_chosen_by_validation_alone():
    """On the test images EG is the best rival and no penalty the worst; validation says RRR and EG."""
    decoys = study.shortcut("decoy", study.load("digits", 100, 50, 50, 0), 0)
    chosen = study.select(table(), 0.02)
    chosen.loc[chosen["arm"] == "EG", "shifted test"] = 0.99
    measured = study.measured_claims(chosen, decoys, 50)
    assert measured["cdep_color"].mean == pytest.approx(0.1)  # minus RRR
    assert measured["eg_rrr_decoy"].mean == pytest.approx(0.99 - 0.615)  # EG minus CDEP (code)


def test_where_each_penalty_works_is_said_by_its_interval():
    gains = study.over_none(study.select(table(), 0.02)).set_index(["task", "arm"])
    assert gains.loc[("color", "EG"), "mean"] == pytest.approx(0.105)
    rows = [("decoy", "CDEP (code)", 0.01, -0.01, 0.03, 5), ("color", "CDEP (code)", 0.07, 0.01, 0.13, 5)]
    rows += [("decoy", "RRR", -0.1, -0.2, 0.0, 5), ("color", "RRR", 0.1, 0.0, 0.2, 5)]
    said = study.where_each_works(pd.DataFrame(rows, columns=["task", "arm", "mean", "low", "high", "n"])).split("\n")
    assert said == [
        "CDEP (code) works on color: decoy +0.010 [-0.010, 0.030], color +0.070 [0.010, 0.130], n = 5",
        "RRR works on neither task: decoy -0.100 [-0.200, 0.000], color +0.100 [0.000, 0.200], n = 5",
    ]


def test_cost_in_words_pairs_times_by_seed():
    times = table().assign(
        seconds=lambda t: t["seed"] + t["arm"].map(dict(zip(study.ARMS, (1, 9, 7, 5, 3), strict=True)))
    )
    tasks = {name: [study.shortcut(name, study.load("digits", 100, 50, 50, 0), 0)] for name in study.TASKS}
    figure, cost = study.draw_cost(times, tasks, 50, 0)
    plt.close(figure)
    eg, rrr, shared = study.cost_in_words(times, cost).split("\n")
    assert "8.7 million operations (counted, no interval); 4000.00 ms [4000.00, 4000.00]" in eg
    assert "-1.1 million operations" in rrr and "2000.00 ms [2000.00, 2000.00]" in rrr and "n = 2 seeds" in rrr
    assert shared == "with a pass shared with the loss, in millions: CDEP (code) 29.9, RRR 31.0; EG stays at 36.1"
