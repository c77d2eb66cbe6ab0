"""Hierarchies against a literal re-implementation, and what a tree must be."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from harmonize_lib import HarmonizeError
from harmonize_lib.decomposition import contextual_decomposition
from harmonize_lib.hierarchy import SCORES, Hierarchy, _outlined, _shown, group_scores, hierarchies, hierarchy

Unit = tuple[int, int]


def network() -> nn.Module:
    layers = (nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 4))
    return tiny.small(*layers).double()


def images(n: int = 3) -> Tensor:
    return tiny.floats(n).double()


def score_of(model: nn.Module, image: Tensor, target: int, units: frozenset[Unit], patch: int, score: str) -> float:
    mask = torch.zeros(image.shape[1:], dtype=torch.bool)
    for row, column in units:
        mask[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = True
    if score == "cd":
        return float(contextual_decomposition(model, image[None], mask[None])[0][0, target].detach())
    kept = image * mask if score == "build_up" else image * ~mask
    value = float(model(kept[None])[0, target].detach())
    return value if score == "build_up" else -value


def around(unit: Unit, side: int) -> list[Unit]:
    row, column = unit
    near = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    return [(r, c) for r, c in near if 0 <= r < side and 0 <= c < side]


def components(units: set[Unit], side: int) -> list[frozenset[Unit]]:
    left, found = set(units), []
    while left:
        group, edge = set(), [min(left)]
        while edge:
            unit = edge.pop()
            if unit in left:
                left.remove(unit)
                group.add(unit)
                edge += around(unit, side)
        found.append(frozenset(group))
    return found


def literal(
    model: nn.Module, image: Tensor, target: int, score: str, patch: int, percentile: float, rounds: int
) -> tuple[list[tuple[frozenset[Unit], float]], dict[Unit, int]]:
    """Algorithm of ACD on a square grid, one group at a time: groups with scores, and when each unit came in."""
    side = image.shape[1] // patch
    units = [(r, c) for r in range(side) for c in range(side)]

    def s(group: frozenset[Unit]) -> float:
        return score_of(model, image, target, group, patch, score)

    single = {unit: s(frozenset([unit])) for unit in units}
    least = np.percentile(list(single.values()), percentile)
    inside = {unit for unit in units if single[unit] >= least}
    entered = dict.fromkeys(inside, 0)
    current: list[frozenset[Unit]] = []
    made: list[tuple[frozenset[Unit], float]] = []
    for level in range(rounds + 1):
        new = components(inside, side)
        made += [(group, s(group)) for group in new if group not in current]
        current = new
        if level == rounds or len(inside) == len(units):
            break
        gains = [
            (unit, s(group | {unit}) - s(group))
            for group in current
            for unit in {near for member in group for near in around(member, side)} - inside
        ]
        least = np.percentile([gain for _, gain in gains], percentile - (15 if 3 * len(inside) > len(units) else 0))
        inside |= {unit for unit, gain in gains if gain >= least}
        inside |= {unit for unit in units if sum(near in inside for near in around(unit, side)) >= 3}
        for unit in inside - set(entered):
            entered[unit] = level + 1
    last = max(level for level in [*entered.values(), level])
    while len(current) > 1:
        pairs = [(a, b) for i, a in enumerate(current) for b in current[i + 1 :]]
        a, b = max(pairs, key=lambda pair: s(pair[0] | pair[1]) - max(s(pair[0]), s(pair[1])))
        current = [group for group in current if group not in (a, b)] + [a | b]
        made.append((a | b, s(a | b)))
    return made, {unit: entered.get(unit, last + 1) for unit in units}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("patch", "percentile", "rounds"), [(1, 90.0, 3), (1, 80.0, 40), (2, 70.0, 0), (2, 60.0, 2)])
def test_equals_the_literal_algorithm(score: str, patch: int, percentile: float, rounds: int) -> None:
    model = network()
    for image, target in zip(images(2), (1, 2), strict=True):
        tree = hierarchy(model, image, target, score, patch, percentile, rounds)
        made, entered = literal(model, image, target, score, patch, percentile, rounds)
        found = {
            frozenset((int(r), int(c)) for r, c in np.argwhere(group)): value
            for group, value in zip(tree.groups, tree.scores, strict=True)
        }
        assert found.keys() == {group for group, _ in made} and len(tree.groups) == len(made)
        for group, value in made:
            assert found[group] == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert {unit: int(tree.entered[unit]) for unit in entered} == entered


@pytest.mark.parametrize("rounds", [0, 3, 40])
def test_a_tree_is_a_tree(rounds: int) -> None:
    for tree in hierarchies(network(), images(), torch.tensor([0, 1, 2]), rounds=rounds, patch=1, percentile=85):
        parents = [child for below in tree.children for child in below]
        assert sorted(parents) == list(range(len(tree.groups) - 1))
        for node, below in enumerate(tree.children):
            union = np.any([tree.groups[child] for child in below], axis=0) if below else np.zeros_like(tree.groups[0])
            assert (tree.groups[node] | union == tree.groups[node]).all()
            assert sum(tree.groups[child].sum() for child in below) == union.sum()
            assert all(tree.levels[child] < tree.levels[node] for child in below)
        assert (tree.groups[-1] == (tree.entered <= max(rounds, 0))).all()
        links = _shown(tree)
        assert max(links) == len(tree.groups) - 1
        assert sorted(child for below in links.values() for child in below) == sorted(links)[:-1]
        assert tree.table()["units"].tolist() == [int(group.sum()) for group in tree.groups]


def test_a_linear_network_takes_up_the_heaviest_first() -> None:
    model = tiny.Linear(bias=False).double()
    image = torch.ones(2, 6, 6, dtype=torch.float64)
    weight = model.weight_of(1, image).sum(0)
    tree = hierarchy(model, image, 1, patch=1, percentile=99.9, rounds=60)
    assert tree.entered.max() < 60
    assert np.unravel_index(np.argmin(tree.entered), (6, 6)) == np.unravel_index(int(weight.argmax()), (6, 6))
    for group, value in zip(tree.groups, tree.scores, strict=True):
        assert value == pytest.approx(float(weight[torch.from_numpy(group)].sum()), rel=1e-9, abs=1e-9)
    grown = [group for group, below in zip(tree.groups, tree.children, strict=True) if below]
    first = grown[0] & ~tree.groups[0]
    near = {(r, c) for unit in np.argwhere(tree.groups[0]) for r, c in around((int(unit[0]), int(unit[1])), 6)}
    assert {(int(r), int(c)) for r, c in np.argwhere(first)} == {max(near, key=lambda unit: float(weight[unit]))}


def test_a_batch_is_one_by_one_and_leaves_the_model_as_found() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    targets = torch.tensor([3, 0, 1])
    together = hierarchies(model, images(), targets, patch=1, rounds=5)
    for tree, image, target in zip(together, images(), targets, strict=True):
        alone = hierarchy(model, image, int(target), patch=1, rounds=5)
        assert (tree.groups == alone.groups).all() and (tree.entered == alone.entered).all()
        np.testing.assert_allclose(tree.scores, alone.scores, rtol=1e-9)
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_scores_of_the_whole_and_of_nothing() -> None:
    model, x, targets = network(), images(), torch.tensor([0, 1, 2])
    logits = model(x)[range(3), targets].detach()
    zero = model(torch.zeros_like(x))[range(3), targets].detach()
    whole, nothing = torch.ones(3, 6, 6).bool(), torch.zeros(3, 6, 6).bool()
    want = {"cd": (logits, 0 * logits), "build_up": (logits, zero), "occlusion": (-zero, -logits)}
    for score, (full, empty) in want.items():
        torch.testing.assert_close(group_scores(model, x, targets, whole, score), full)
        torch.testing.assert_close(group_scores(model, x, targets, nothing, score), empty)


def test_picture_keeps_the_group_and_fades_the_rest() -> None:
    image = torch.full((1, 6, 6), 100, dtype=torch.uint8)
    group = np.zeros((3, 3), dtype=bool)
    group[1, 1:] = True
    picture = _outlined(image, group, group)
    scale = len(picture) // 6
    assert picture[3 * scale, 4 * scale] == pytest.approx(100 / 255)
    assert picture[0, 0] == pytest.approx(0.65 + 0.35 * 100 / 255)
    assert picture[2 * scale, 3 * scale] == pytest.approx([0.84, 0.37, 0.0])


def test_picture_is_cut_to_the_surroundings_of_the_last_group() -> None:
    """Pixel values are their places: units of 2, the last group in rows 4 to 5 and columns 8 to 9 of 10."""
    image = torch.arange(20 * 20).view(1, 20, 20).remainder(251).byte()
    last = np.zeros((10, 10), dtype=bool)
    last[4:6, 8:10] = True
    picture = _outlined(image, np.zeros_like(last), last)
    scale = 192 // 12  # a square of two units and two around them, 12 pixels, moved inside the image's border
    want = 0.65 + 0.35 * image[0, 4:16, 8:20].numpy() / 255
    np.testing.assert_allclose(picture[::scale, ::scale, 0], want, rtol=1e-12)
    np.testing.assert_allclose(picture[scale - 1 :: scale, scale - 1 :: scale, 0], want, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"score": "cdd"}, "did you mean 'cd'"),
        ({"patch": 0}, "patch must be a whole number of at least 1"),
        ({"percentile": 101.0}, "percentile must lie between 0 and 100"),
        ({"rounds": -1}, "rounds must be a whole number of at least 0"),
        ({"target": 4}, "target 4 is out of range"),
    ],
)
def test_bad_input_is_one_line(options: dict[str, object], says: str) -> None:
    with pytest.raises(HarmonizeError, match=says):
        hierarchy(network(), images()[0], **({"target": 0} | options))  # type: ignore[arg-type]


def test_many_small_first_groups_are_left_out_of_the_picture():
    groups = [np.arange(16).reshape(4, 4) < 6, *(np.arange(16).reshape(4, 4) == 8 + i for i in range(7))]
    children = [() for _ in groups]
    for leaf in range(1, 8):
        before = 0 if leaf == 1 else len(groups) - 1
        groups.append(groups[before] | groups[leaf])
        children.append((before, leaf))
    tree = Hierarchy(np.stack(groups), np.zeros(15), np.zeros(15, int), tuple(children), np.zeros(16, int))
    assert _shown(tree) == {0: (), 14: (0,)}  # a chain: its first group, and its last
    few = Hierarchy(np.stack(groups[:8] + groups[8:9]), *[np.zeros(9, int)] * 2, tuple(children[:9]), np.zeros(16, int))
    assert _shown(few)[8] == (0, 1)  # one unit of seven is more than a tenth
