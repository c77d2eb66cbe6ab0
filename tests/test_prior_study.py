"""Training with the pixel prior: arms differ in the penalty alone; noise, rule and front do what they say."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from scipy.stats import norm, t

from harmonize_lib import HarmonizeError, paths
from harmonize_lib import prior_study as ps
from harmonize_lib.priors import pixel_prior

RECIPE = ps.Recipe(3, (4, 6), 8, 0.5, 2, 10, 5e-3)


@pytest.fixture(scope="module")
def digits():
    data = ps.load_pixels("digits", 60)
    return data._replace(validation=tuple(p[:30] for p in data.validation), test=tuple(p[:40] for p in data.test))


def train(data, method="", weight=0.0, seed=0):
    return ps.train_with_prior(data.train, 10, RECIPE, method, weight, seed)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_digits_are_split_without_loss_or_overlap():
    from sklearn.datasets import load_digits

    data = ps.load_pixels("digits")
    parts = (data.train, data.validation, data.test)
    assert [len(y) for _, y in parts] == [1000, 300, 497]
    seen = torch.cat([x for x, _ in parts])[:, 0].flatten(1)
    raw = torch.from_numpy(load_digits().images).float().flatten(1) / 16 - 0.5
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, raw.tolist()))
    assert len(ps.load_pixels("digits", 200).train[1]) == 200
    with pytest.raises(HarmonizeError, match="leaves 1000 for training"):
        ps.load_pixels("digits", 1001)


def test_arms_of_one_seed_differ_in_the_penalty_alone(digits):
    state = torch.get_rng_state()
    baseline = train(digits)
    for method in ("gradients", "expected_gradients"):
        assert same(train(digits, method, 0.0), baseline)
        assert not same(train(digits, method, 0.1), baseline)
    assert same(train(digits), baseline)
    assert not same(train(digits, seed=1), baseline)
    assert torch.equal(torch.get_rng_state(), state) and not baseline.training


def test_every_image_but_the_rest_is_seen_once_an_epoch():
    index = torch.cat(list(ps.batches(23, 5, 1, 0)))
    assert len(index) == 20 and len(set(index.tolist())) == 20
    assert not torch.equal(index, torch.cat(list(ps.batches(23, 5, 2, 0))))


def test_a_strong_prior_smooths_what_it_is_asked_of(digits):
    values = {
        method: ps.measure(train(digits, method, 0.3), digits, {name: [0.0] for name in ps.NOISES}, 1, 0)
        for method in ("", "gradients", "expected_gradients")
    }
    for method in ("gradients", "expected_gradients"):
        assert values[method][method] < values[""][method]


def test_measurements_by_hand(digits):
    network = train(digits)
    levels = {"flipped pixels": [0.0, 0.3], "Gaussian noise": [0.0]}
    measured = ps.measure(network, digits, levels, 3, 0)
    x, y = digits.validation
    right = [network(image[None]).argmax().item() == label.item() for image, label in zip(x, y, strict=True)]
    assert measured["validation"].item() == pytest.approx(sum(right) / len(right))
    maps = []
    for image, label in zip(x, y, strict=True):
        image = image.clone().requires_grad_()
        maps.append(torch.autograd.grad(network(image[None])[0, label], image)[0].sum(0))
    assert measured["gradients"].item() == pytest.approx(pixel_prior(torch.stack(maps)).item(), rel=1e-4)
    x, y = digits.test
    clean = ps.accuracy(network, x, y)
    noisy = ps.flip_pixels(x, 0.3, torch.Generator().manual_seed(0))
    assert measured["flipped pixels"].tolist() == [clean.item(), ps.accuracy(network, noisy, y).item()]
    assert measured["Gaussian noise"].item() == clean and measured["maps"].shape == (3, 8, 8)


def test_flipped_pixels_follow_the_authors_formula():
    images = torch.rand(50, 1, 20, 20, generator=torch.Generator().manual_seed(1)) - 0.5
    noisy = ps.flip_pixels(images, 0.2, torch.Generator().manual_seed(2))
    z = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    threshold = norm.isf(0.1)
    for before, after, draw in zip(
        images.flatten().tolist(), noisy.flatten().tolist(), z.flatten().tolist(), strict=True
    ):
        assert after == (0.5 if draw > threshold else -0.5 if draw < -threshold else before)
    assert ((noisy - images) != 0).double().mean().item() == pytest.approx(0.2, abs=0.01)
    assert ps.flip_pixels(images, 0.0, torch.Generator()) is images
    rough = ps.add_gaussian(images, 0.3, torch.Generator().manual_seed(3)) - images
    assert rough.std().item() == pytest.approx(0.3, abs=0.01) and abs(rough.mean().item()) < 0.01


def front(rows):
    return pd.DataFrame(rows, columns=["arm", "weight", "own", "mean"])


def test_the_rule_takes_the_smoothest_that_costs_little():
    table = front(
        [
            ("baseline", 0.0, 90, 0.95),
            (ps.OURS, 0.001, 88, 0.951),
            (ps.OURS, 0.01, 80, 0.9401),
            (ps.OURS, 0.1, 60, 0.92),
            ("TV of gradients", 0.01, 85, 0.93),
        ]
    )
    chosen = ps.choose_weights(table, 0.01)
    assert chosen["baseline"] == 0 and chosen[ps.OURS] == 0.01
    assert pd.isna(chosen["TV of gradients"])
    assert ps.choose_weights(table, 0.05)[ps.OURS] == 0.1
    assert ps.choose_weights(table, 0.005)[ps.OURS] == 0.001


def made_up():
    levels = {"flipped pixels": [0.0, 0.1], "Gaussian noise": [0.0, 0.2, 0.4]}
    base = torch.tensor([[0.9, 0.5], [0.8, 0.6], [0.85, 0.4]])
    gains = torch.tensor([0.1, 0.2, 0.3])
    results = {}
    for arm, plus in (("baseline", 0.0), (ps.OURS, 1.0)):
        flips = base + plus * gains[:, None] * torch.tensor([0.0, 1.0])
        results[arm, 0.01 * plus] = {
            "flipped pixels": flips.double(),
            "Gaussian noise": torch.cat([flips, flips[:, 1:]], 1).double(),
            "validation": flips[:, :1].double(),
            "expected_gradients": flips[:, 1:].double(),
        }
    return levels, results, {"baseline": 0.0, ps.OURS: 0.01, "TV of gradients": float("nan")}


def test_gains_are_paired_over_seeds():
    levels, results, chosen = made_up()
    interval = ps.gain(results, chosen, levels, "flipped pixels", [0.1])
    half = t.ppf(0.975, 2) * 0.1 / 3**0.5
    assert interval.n == 3
    assert interval[:3] == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-6)
    assert ps.gain(results, chosen, levels, "Gaussian noise", [0.0, 0.2]).mean == pytest.approx(0.1)
    assert ps.gain(results, chosen, levels, "flipped pixels", [0.15]).n == 0
    assert ps.gain(results, chosen, levels, "flipped pixels", [0.1], "TV of gradients").n == 0
    ratio = ps.claims_of(results, chosen, levels)["prior_gaussian_noise"]
    literal = [(0.5 + 0.1) / 0.5, (0.6 + 0.2) / 0.6, (0.4 + 0.3) / 0.4]  # at the highest level
    assert ratio.mean == pytest.approx(sum(literal) / 3, abs=1e-6) and ratio.n == 3
    assert ps.gain_ratio(results, chosen | {ps.OURS: float("nan")}, levels, "Gaussian noise").n == 0


def test_a_weight_at_an_end_is_named():
    words = ps.in_words({"baseline": 0.0, ps.OURS: 0.01, "TV of gradients": 0.1}, [0.01, 0.03, 0.1])
    assert words == f"{ps.OURS}: λ = 0.01, the smallest tried; TV of gradients: λ = 0.1, the largest tried"


def test_tables_hold_every_level_and_weight():
    levels, results, chosen = made_up()
    robust = ps.robustness(results, chosen, levels)
    assert len(robust) == 2 * (2 + 3) and set(robust["n"]) == {3}
    row = robust[(robust["arm"] == ps.OURS) & (robust["noise"] == "flipped pixels") & (robust["level"] == 0.1)]
    assert row["mean"].item() == pytest.approx(0.7)
    table = ps.front(results)
    assert table["prior"].tolist() == pytest.approx([0.5, 0.7])
    facts = ps.facts(table, chosen, 0.01)
    assert list(facts.values()) == [False, False]


def test_a_second_run_trains_nothing(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    levels = {name: [0.0, 0.2] for name in ps.NOISES}
    first = ps.pixel_study(digits, RECIPE, [0.01], [0, 1], levels, 2)
    assert set(first) == {("baseline", 0.0), ("TV of gradients", 0.01), (ps.OURS, 0.01)}
    assert first[ps.OURS, 0.01]["flipped pixels"].shape == (2, 2)
    monkeypatch.setattr(ps, "train_with_prior", None)
    again = ps.pixel_study(digits, RECIPE, [0.01], [0, 1], levels, 2)
    assert all(torch.equal(first[arm][name], again[arm][name]) for arm in first for name in first[arm])


def test_recipes_by_name():
    assert ps.recipe("paper").epochs == 60 and ps.recipe("paper", 5) == ps.PAPER._replace(epochs=5)
    with pytest.raises(HarmonizeError, match="unknown recipe"):
        ps.recipe("papr")
