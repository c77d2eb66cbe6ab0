"""Wavelet distillation: every term against literal loops, recovery of a wavelet that is known."""

from __future__ import annotations

import cmath
import math

import pandas as pd
import pytest
import pywt
import torch
from torch import nn

from harmonize_lib import HarmonizeError, wavelet_study
from harmonize_lib.statistics import Interval
from harmonize_lib.transformations import idwt, scales
from harmonize_lib.wavelet_study import ARMS, LEVELS, TAPS, simulate, teachers
from harmonize_lib.wavelets import (
    atom,
    compression,
    descend,
    distil_wavelet,
    filter_similarity,
    loss_terms,
    orthonormalize,
    peaks,
    reference_filter,
    structure,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_transform(x: list[float], h: list[float], levels: int) -> list[list[float]]:
    """Details from the finest, then the approximation: correlation with periodic borders, every other place kept."""
    taps = len(h)
    g = [(-1) ** n * h[taps - 1 - n] for n in range(taps)]
    parts = []
    for _ in range(levels):
        size = len(x)
        places = [[(2 * k + n - taps // 2 + 1) % size for n in range(taps)] for k in range(size // 2)]
        parts.append([sum(g[n] * x[at[n]] for n in range(taps)) for at in places])
        x = [sum(h[n] * x[at[n]] for n in range(taps)) for at in places]
    return [*parts, x]


def coefficients(x: torch.Tensor, h: torch.Tensor, levels: int) -> torch.Tensor:
    """The same in the library's order, coarse to fine."""
    rows = [[v for part in reversed(slow_transform(row.tolist(), h.tolist(), levels)) for v in part] for row in x]
    return torch.tensor(rows, dtype=torch.float64)


def slow_structure(h: list[float]) -> dict[str, float]:
    taps = len(h)
    g = [(-1) ** n * h[taps - 1 - n] for n in range(taps)]
    turns = [[cmath.exp(-2j * math.pi * k * n / taps) for n in range(taps)] for k in range(taps)]
    spectrum = [abs(sum(v * turn for v, turn in zip(h, row, strict=True))) ** 2 for row in turns]
    shifts = [sum(h[n + 2 * k] * h[n] for n in range(taps - 2 * k)) - (k == 0) for k in range(taps // 2)]
    return {
        "sum": 0.5 * (sum(h) - math.sqrt(2)) ** 2,
        "highpass sum": 0.5 * sum(g) ** 2,
        "norm": 0.5 * (sum(v * v for v in h) - 1) ** 2,
        "spectrum": 0.5 * sum((spectrum[k] + spectrum[k + taps // 2] - 2) ** 2 for k in range(taps // 2)),
        "even shifts": 0.5 * sum(v * v for v in shifts),
    }


@pytest.mark.parametrize("attribution", ["saliency", "input_x_gradient"])
def test_every_term_equals_literal_loops(attribution):
    h, x, slope = 0.4 * draw(1, 6), draw(1, 3, 16, seed=1), draw(1, 3, 16, seed=2)
    terms = loss_terms(h, x, slope, 2, attribution)
    expected = slow_structure(h[0].tolist())
    sparsity = interpretation = 0.0
    for i in range(3):
        s, d = (slow_transform(each[0, i].tolist(), h[0].tolist(), 2) for each in (x, slope))
        for values, slopes in zip(s, d, strict=True):
            sparsity += sum(map(abs, values)) / 9
            weights = values if attribution == "input_x_gradient" else [1.0] * len(values)
            interpretation += sum(abs(v * w) for v, w in zip(weights, slopes, strict=True)) / 9
    for name, value in {**expected, "sparsity": sparsity, "interpretation": interpretation}.items():
        torch.testing.assert_close(terms[name].item(), value)
    back = x[0] - idwt(coefficients(x[0], h[0], 2), h[0], 2)
    torch.testing.assert_close(terms["reconstruction"].item(), back.square().sum(1).mean().item())


@pytest.mark.parametrize("name", ["haar", "db2", "db5", "sym5", "coif1"])
def test_structure_is_zero_exactly_for_orthonormal_wavelets(name):
    h = reference_filter(name)
    assert max(float(term) for term in structure(h).values()) < 1e-20
    padded = structure(reference_filter(name, len(h) + 4))
    assert max(float(term) for term in padded.values()) < 1e-20
    assert max(float(term) for term in structure(h + 0.05 * draw(len(h))).values()) > 1e-4


def test_the_importance_of_a_coefficient_is_that_of_the_network_behind_the_inverse():
    """The interpretation term is TRIM's saliency: the gradient of f(T^-1(s) + r) at s = T(x)."""
    model = nn.Sequential(nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 1)).double().requires_grad_(False)
    h, x = reference_filter("db2"), draw(4, 16)
    s = coefficients(x, h, 2).requires_grad_()
    residual = (x - idwt(s, h, 2)).detach()
    (slope,) = torch.autograd.grad(model(idwt(s, h, 2) + residual).sum(), s)
    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(at).sum(), at)
    term = loss_terms(h[None], x[None], gradient[None], 2)["interpretation"]
    torch.testing.assert_close(term.item(), (slope.abs().sum() / 4 / 3).item())


def test_orthonormalize_repairs_a_disturbed_wavelet_and_refuses_others():
    true = reference_filter("db5")
    found = orthonormalize(true + 0.01 * draw(10))
    assert max(float(term) for term in structure(found).values()) < 1e-20
    assert filter_similarity(found, true) > 0.99
    torch.testing.assert_close(orthonormalize(true), true, atol=1e-8, rtol=0)
    with pytest.raises(HarmonizeError, match="no orthonormal wavelet"):
        orthonormalize(torch.full((4,), float("nan")))


def test_filters_side_by_side_descend_as_they_do_alone():
    h = reference_filter("db2").repeat(2, 1)
    x, slope = draw(2, 80, 16), draw(2, 80, 16, seed=1)
    both, _ = descend(h, x, slope, 2, 0.01, 0.1, torch.Generator().manual_seed(0), steps=20)
    for i in range(2):
        part = slice(i, i + 1)
        alone, _ = descend(h[part], x[part], slope[part], 2, 0.01, 0.1, torch.Generator().manual_seed(0), steps=20)
        torch.testing.assert_close(both[part], alone)


def test_each_filter_descends_with_its_own_weights():
    h = reference_filter("db2").repeat(3, 1)
    x, slope = draw(1, 80, 16).repeat(3, 1, 1), draw(1, 80, 16, seed=1).repeat(3, 1, 1)
    sparsity, interpretation = torch.tensor([0.0, 0.1, 0.1]), torch.tensor([0.5, 0.5, 0.0])
    all_, _ = descend(h, x, slope, 2, sparsity, interpretation, torch.Generator().manual_seed(0), steps=20)
    for i, weights in enumerate(zip(sparsity.tolist(), interpretation.tolist(), strict=True)):
        alone, _ = descend(h[:1], x[:1], slope[:1], 2, *weights, torch.Generator().manual_seed(0), steps=20)
        torch.testing.assert_close(all_[i], alone[0])
    assert torch.pdist(all_).min() > 1e-3


def test_both_arms_choose_among_the_same_weights_by_validation_alone(monkeypatch):
    """The best weight is written out by hand; spoiled test responses change no choice and no filter."""
    monkeypatch.setattr(wavelet_study, "TEACHER_STEPS", 30)
    sparsities, seeds, n = [0.0, 0.3], [0, 1], 200
    found = wavelet_study._distil("coif1", seeds, n, 100, sparsities, 1.0)
    x, y = simulate("coif1", 3 * n, seeds)
    teacher = teachers(2, wavelet_study._stream("coif1", 0))
    slope, _ = wavelet_study._teach(teacher, x, y, n, 0)
    for arm, weight in enumerate((0.0, 1.0), start=1):
        tried = [wavelet_study._descents(x[:, :n], slope, [(s, weight)], 100, 0)[0][0] for s in sparsities]
        for i in range(2):
            scores = []
            for filters in tried:
                design = [
                    torch.cat([peaks(part, orthonormalize(filters[i]), LEVELS), torch.ones(n, 1).double()], 1)
                    for part in x[i].double().split(n)
                ]
                solution = torch.linalg.pinv(design[0]) @ y[i, :n].double()
                scores.append(-float((design[1] @ solution - y[i, n : 2 * n]).square().sum()))
            best = max(range(2), key=scores.__getitem__)
            assert float(found["sparsity"][i, arm]) == sparsities[best]
            torch.testing.assert_close(found["filters"][i, arm], orthonormalize(tried[best][i]), atol=1e-4, rtol=0)

    def spoiled(*args):
        x, y = simulate(*args)
        return x, torch.cat([y[:, : 2 * n], -y[:, 2 * n :]], 1)

    monkeypatch.setattr(wavelet_study, "simulate", spoiled)
    again = wavelet_study._distil("coif1", seeds, n, 100, sparsities, 1.0)
    assert torch.equal(again["filters"], found["filters"])
    assert not torch.isclose(again["r2"], found["r2"]).any()


def test_intervals_are_over_seeds_and_not_over_wavelets():
    """Wavelets that differ widely, seeds that agree: the interval is as narrow as the seeds are."""
    levels = {"a": 0.1, "b": 0.9}
    rows = []
    for wavelet, level in levels.items():
        for seed in range(3):
            for arm in (*ARMS, "teacher"):
                r2 = (level + 0.01 * seed) * (arm == "AWD")
                rows.append((wavelet, seed, arm, r2, 0.2 * r2, 0.5 + 0.1 * r2))
    table = pd.DataFrame(rows, columns=["wavelet", "seed", "arm", "r2", "compression", "similarity"])
    recovered = pd.DataFrame([("trained", 1.0, 0.9, 1.0, 5)], columns=["network", "mean", "low", "high", "n"])
    measured = wavelet_study.measured_claims(recovered, table)
    half = 4.302653 * 0.01 / 3**0.5  # Student's t with two degrees of freedom
    for name in ("awd_over_db5", "awd_over_teacher", "awd_interpretation"):
        assert measured[name][:4] == pytest.approx((0.51, 0.51 - half, 0.51 + half, 3), rel=1e-5)
    assert measured["awd_compression"].mean == pytest.approx(0.102)
    assert measured["awd_recovery"][:4] == pytest.approx((0.551, 0.551 - half / 10, 0.551 + half / 10, 3), rel=1e-5)
    assert measured["trim_recovery"] == Interval(1.0, 0.9, 1.0, 5)


def test_a_generating_wavelet_is_recovered_from_a_network_that_reads_it():
    """The network is exact: the sum of positive coefficients at one scale of coif1, on white noise."""
    true = reference_filter("coif1")
    rows = idwt(torch.eye(32, dtype=torch.float64), true, 2)[scales(32, 2) == 1]
    model = nn.Sequential(nn.Linear(32, len(rows), bias=False), nn.ReLU(), nn.Linear(len(rows), 1, bias=False))
    model = model.double().requires_grad_(False)
    model[0].weight.copy_(rows)
    model[2].weight.fill_(1.0)
    x = draw(200, 32)
    found = distil_wavelet(model, x, levels=2, sparsity=0.0, interpretation=0.1)
    blind = distil_wavelet(model, x, levels=2, sparsity=0.005, interpretation=0.0, steps=200)
    assert filter_similarity(reference_filter("db5"), true) < 0.9
    assert filter_similarity(blind.lowpass, true) < 0.95 <= filter_similarity(found.lowpass, true)
    assert found.reconstruction_error < 1e-9
    assert max(float(term) for term in structure(found.lowpass).values()) < 1e-20
    assert list(found.history["step"])[-1] == 999
    assert all(parameter.grad is None for parameter in model.parameters())


def test_filter_similarity_forgives_shift_and_sign_alone():
    h = reference_filter("db3")
    assert filter_similarity(h, h) == pytest.approx(1)
    assert filter_similarity(-nn.functional.pad(h, (3, 1)), h) == pytest.approx(1)
    assert filter_similarity(h.flip(0), h) < 0.97
    slow = max(
        abs(sum(float(h[i]) * float(h.flip(0)[i - k]) for i in range(6) if 0 <= i - k < 6)) for k in range(-5, 6)
    )
    assert filter_similarity(h, h.flip(0)) == pytest.approx(slow / float(h.norm()) ** 2)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_an_atom_is_what_a_single_coefficient_synthesizes(level):
    h = reference_filter("db2")
    s = torch.zeros(1, 64, dtype=torch.float64)
    s[0, 64 // 2**level + 3] = 1.0
    assert filter_similarity(idwt(s, h, level)[0], atom(h, level)) == pytest.approx(1, abs=1e-9)
    assert float(atom(h, level).norm()) == pytest.approx(1)


def test_peaks_and_compression_have_known_values():
    h = reference_filter("haar")
    s = torch.zeros(2, 16, dtype=torch.float64)
    s[0, 8:12] = torch.tensor([3.0, -2.0, 1.0, 4.0])
    s[1, 0] = 10.0
    found = peaks(idwt(s, h, 1), h, 1, count=3)
    torch.testing.assert_close(
        found, torch.tensor([[0, 0, 0, 4, 3, 1], [10, 0, 0, 0, 0, 0]]).double(), atol=1e-9, rtol=0
    )
    assert compression(idwt(s, h, 1), h, 1, 0.75) == 1 / 32  # 100 of 130 by one coefficient alone
    assert compression(idwt(s, h, 1), h, 1, 0.95) == 3 / 32  # 116 after two, 125 (96 %) with the third


def test_simulated_signals_are_sparse_in_their_own_wavelet():
    x, y = simulate("sym4", 300, [0, 1])
    assert x.shape == (2, 300, 64) and y.shape == (2, 300)
    own, other = (compression(x[0].double(), reference_filter(name, TAPS), 3) for name in ("sym4", "db5"))
    assert own < other
    again, _ = simulate("sym4", 300, [1])
    torch.testing.assert_close(again[0], x[1])


def test_teachers_side_by_side_do_not_see_each_other():
    teacher = teachers(3, 0)
    x = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 1] += 1
    same = torch.isclose(teacher(x), teacher(changed)).all(0)
    assert same.tolist() == [True, False, True]


def test_mistakes_get_one_line():
    assert "db5" in pywt.wavelist(kind="discrete")
    with pytest.raises(HarmonizeError, match="unknown wavelet 'db55'"):
        reference_filter("db55")
    with pytest.raises(HarmonizeError, match="not orthogonal"):
        reference_filter("bior2.2")
    with pytest.raises(HarmonizeError, match="12 taps, more than 10"):
        reference_filter("db6", 10)
    with pytest.raises(HarmonizeError, match=r"signals must be \(N, L\)"):
        distil_wavelet(nn.Linear(4, 1), torch.zeros(2, 2, 4))
    with pytest.raises(HarmonizeError, match="unknown attribution"):
        distil_wavelet(nn.Linear(8, 1), torch.zeros(2, 8), attribution="lime")
