from itertools import product

import numpy as np
import pytest
from scipy import stats

from harmonize_lib.errors import HarmonizeError
from harmonize_lib.statistics import bootstrap_interval, holm, paired_difference, share_interval, t_interval


def literal_bootstrap(values, clusters, seed, level, n_resamples):
    groups = [[v for v, c in zip(values, clusters, strict=True) if c == g] for g in sorted(set(clusters))]
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(n_resamples):
        resample = []
        for g in rng.integers(len(groups), size=len(groups)):
            resample += groups[g]
        means.append(sum(resample) / len(resample))
    return np.percentile(means, [50 * (1 - level), 50 * (1 + level)])


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_bootstrap_equals_literal_resampling(level):
    values = np.random.default_rng(0).normal(size=30)
    labels = np.random.default_rng(1).integers(7, size=30)
    got = bootstrap_interval(values, 3, level, 400)
    assert np.allclose(got[1:3], literal_bootstrap(values, range(30), 3, level, 400))
    got = bootstrap_interval(values, 3, level, 400, clusters=labels)
    assert np.allclose(got[1:3], literal_bootstrap(values, labels, 3, level, 400))
    assert got.mean == pytest.approx(values.mean()) and got.n == 30 and got.p is None


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).exponential(size=200)
    ours = bootstrap_interval(values, 0, n_resamples=20000)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=1)
    assert np.allclose((ours.low, ours.high), theirs.confidence_interval, atol=0.005)


def test_bootstrap_covers_at_its_level():
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.normal(1, 2, 100), seed, n_resamples=500) for seed in range(400)]
    covered = [i.low <= 1 <= i.high for i in intervals]
    assert 0.91 <= np.mean(covered) <= 0.98


def test_bootstrap_is_equivariant_and_seeded(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    base = bootstrap_interval(values, 5)
    assert np.allclose(bootstrap_interval(2 * values + 3, 5)[:3], 2 * np.array(base[:3]) + 3)
    assert bootstrap_interval(list(values), 5) == base != bootstrap_interval(values, 6)
    monkeypatch.setattr("harmonize_lib.statistics._BLOCK", 50 * 7)
    assert bootstrap_interval(values, 5) == base


def test_bootstrap_of_clusters_is_wider_when_clusters_differ():
    labels = np.repeat(np.arange(10), 20)
    values = labels + np.random.default_rng(0).normal(size=200) * 0.1
    alone, together = bootstrap_interval(values, 0), bootstrap_interval(values, 0, clusters=labels)
    assert together.high - together.low > 3 * (alone.high - alone.low)


def test_undefined_values_are_left_out():
    values = np.array([1.0, np.nan, 2.0, 3.0, np.nan])
    assert bootstrap_interval(values, 0) == bootstrap_interval([1.0, 2.0, 3.0], 0)
    clustered = bootstrap_interval(values, 0, clusters=["a", "b", "a", "c", "c"])
    assert clustered == bootstrap_interval([1.0, 2.0, 3.0], 0, clusters=["a", "a", "c"])
    empty, single = bootstrap_interval([np.nan], 0), bootstrap_interval([4.0, np.nan], 0)
    assert empty.n == 0 and np.isnan(empty[:3]).all()
    assert single.n == 1 and single.mean == 4 and np.isnan(single[1:3]).all()
    assert np.isnan(bootstrap_interval([1.0, 2.0], 0, clusters=[0, 0])[1:3]).all()


def literal_sign_flip(differences):
    observed = abs(sum(differences))
    flips = product((1, -1), repeat=len(differences))
    totals = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in flips]
    return sum(t >= observed - 1e-12 for t in totals) / len(totals)


def test_sign_flip_is_exact_for_few_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 1, 9), rng.normal(0, 1, 9)
    p = paired_difference(a, b, 0).p
    assert p == pytest.approx(literal_sign_flip(a - b))
    theirs = stats.permutation_test((a, b), lambda x, y: np.mean(x - y), permutation_type="samples", rng=0)
    assert p == pytest.approx(theirs.pvalue)


def test_sign_flip_by_sampling_is_near_the_exact_value():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.45, 1, 14), np.zeros(14)
    exact = literal_sign_flip(a)
    error = abs(paired_difference(a, b, 0, n_resamples=9999).p - exact)
    assert error < 4 * np.sqrt(exact * (1 - exact) / 9999)


def test_sign_flip_of_clusters_equals_the_test_on_their_sums():
    rng = np.random.default_rng(1)
    labels, a = rng.integers(8, size=60), rng.normal(0.3, 1, 60)
    p = paired_difference(a, np.zeros(60), 0, clusters=labels).p
    assert p == pytest.approx(literal_sign_flip([a[labels == g].sum() for g in range(8)]))


def test_sign_flip_holds_its_size():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 500, 40))
    p = np.array([paired_difference(a[s], b[s], s, n_resamples=200).p for s in range(500)])
    assert (p <= 0.05).mean() < 0.075 and 0.45 < p.mean() < 0.55


def test_paired_difference_is_the_interval_of_the_difference():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 100), rng.normal(0, 1, 100)
    a[3], b[7] = np.nan, np.nan
    got, other = paired_difference(a, b, 2), paired_difference(b, a, 2)
    assert got[:4] == bootstrap_interval(a - b, 2)[:4] and got.n == 98
    assert np.allclose((got.mean, got.low, got.high), (-other.mean, -other.high, -other.low))
    assert got.p == other.p == 1 / 2001


def test_paired_difference_without_evidence():
    assert paired_difference([1.0, 2.0], [1.0, 2.0], 0).p == 1
    assert paired_difference([1.0], [0.0], 0).p == 1
    assert np.isnan(paired_difference([np.nan], [0.0], 0).p)


def test_holm_by_hand():
    assert np.allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert np.allclose(holm([0.5, 0.6, np.nan]), [1, 1, np.nan], equal_nan=True)
    assert holm([]).size == 0


def literal_holm(p):
    """The smallest level at which step-down testing rejects each hypothesis, found by stepping down."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, (len(p) - rank) * p[place])
        adjusted[place] = min(1.0, largest)
    return adjusted


@pytest.mark.parametrize("seed", range(5))
def test_holm_equals_literal_stepping_down(seed):
    p = np.random.default_rng(seed).uniform(size=25) ** 3
    p[3] = p[7]  # a tie
    assert np.allclose(holm(p), literal_holm(p), rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([[1.0]], 0), "values has shape"),
        (lambda: bootstrap_interval([1.0, 2.0], 0, level=95), "level=95"),
        (lambda: bootstrap_interval([1.0, 2.0], 0, n_resamples=0), "n_resamples=0"),
        (lambda: bootstrap_interval([1.0, 2.0], 0, clusters=[1]), "clusters has shape"),
        (lambda: paired_difference([1.0], [1.0, 2.0], 0), "a has 1 values and b has 2"),
        (lambda: holm([0.1, 1.2]), r"outside \[0, 1\]"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(HarmonizeError, match=message):
        call()


def test_t_interval_equals_scipy():
    values = np.random.default_rng(0).normal(0.3, 1, size=6)
    test = stats.ttest_1samp(values, 0)
    got = t_interval([*values, np.nan], 0.9)
    assert np.allclose(got, (values.mean(), *test.confidence_interval(0.9), 6, test.pvalue))
    assert t_interval([2.0, 2.0])[:3] == (2.0, 2.0, 2.0) and t_interval([2.0, 2.0]).p == 0
    assert t_interval([0.0, 0.0]).p == 1
    one, none = t_interval([1.5]), t_interval([np.nan])
    assert one.mean == 1.5 and one.n == 1 and np.isnan([one.low, one.high, one.p]).all()
    assert none.n == 0 and np.isnan(none.mean)


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (7, 20), (100, 100)])
def test_share_interval_is_wilsons(successes, n):
    z, share = 1.959963984540054, successes / n
    middle, width = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    found = share_interval(successes, n)
    assert (found.mean, found.n) == (share, n)
    assert found[1:3] == pytest.approx(
        ((middle - width) / (1 + z**2 / n), (middle + width) / (1 + z**2 / n)), abs=1e-12
    )
