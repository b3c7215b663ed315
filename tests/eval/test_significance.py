"""Paired tests against scipy and against full enumeration."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eval.significance import (
    bootstrap_interval,
    bootstrap_means,
    bootstrap_test,
    holm,
    paired_t_test,
    randomisation_test,
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**16), n=st.integers(2, 300), shift=st.floats(-0.5, 0.5))
def test_the_paired_t_test_is_scipys(seed: int, n: int, shift: float) -> None:
    before, after = np.random.default_rng(seed).random((2, n))
    t, p = paired_t_test(after + shift - before)
    wanted = stats.ttest_rel(after + shift, before)
    assert (t, p) == (pytest.approx(wanted.statistic, rel=1e-9, abs=1e-12), pytest.approx(wanted.pvalue, rel=1e-8))


def test_differences_without_spread() -> None:
    assert paired_t_test(np.zeros(5)) == (0.0, 1.0)
    assert paired_t_test(np.full(7, -0.1)) == (-np.inf, 0.0)
    assert randomisation_test(np.zeros(5)) == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_randomisation_approaches_the_full_enumeration_of_signs(seed: int) -> None:
    d = np.random.default_rng(seed).normal(0.4, 1.0, 9).round(1)  # rounded: many sums tie with the observed one
    sums = [abs(np.dot(signs, d)) for signs in product((-1, 1), repeat=len(d))]
    exact = np.mean([total >= abs(d.sum()) - 1e-9 for total in sums])
    assert randomisation_test(d, 40_000, seed) == pytest.approx(exact, abs=0.012)
    assert randomisation_test(d, 100, 3) == randomisation_test(d, 100, 3)


def test_randomisation_counts_the_observed_signs() -> None:
    assert randomisation_test(np.ones(60), 999) == 1 / 1000


def test_the_interval_is_the_normal_one_for_many_queries() -> None:
    d = np.random.default_rng(0).normal(0.3, 1.0, 2000)
    low, high = bootstrap_interval(d)
    half = 1.96 * d.std() / np.sqrt(len(d))
    assert (low, high) == (
        pytest.approx(d.mean() - half, abs=0.1 * half),
        pytest.approx(d.mean() + half, abs=0.1 * half),
    )


def test_seeds_are_drawn_crossed_with_clusters() -> None:
    """The variance is that of the two-way model: between seeds, between clusters, and what is left."""
    rng = np.random.default_rng(0)
    of_seeds, of_clusters = rng.normal(0, 0.3, 12), rng.normal(0, 0.5, 30)
    members = np.repeat(np.arange(30), 4)
    clusters = [*map(str, members)]
    d = 0.2 + of_seeds[:, None] + of_clusters[members] + rng.normal(0, 0.1, (12, 120))
    expected = (of_seeds.var() / 12 + of_clusters.var() / 30) ** 0.5
    assert bootstrap_means(d, clusters).std() == pytest.approx(expected, rel=0.1)
    assert bootstrap_means(d.mean(axis=0), clusters).std() == pytest.approx((of_clusters.var() / 30) ** 0.5, rel=0.1)
    low, high = bootstrap_interval(d, clusters)
    assert low < d.mean() < high


def test_the_bootstrap_p_value_is_about_the_t_tests() -> None:
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.1, 0.2, 1.0):
        d = rng.normal(shift, 1.0, 200)
        assert bootstrap_test(d) == pytest.approx(paired_t_test(d)[1], abs=0.02)
    assert bootstrap_test(np.ones(9)) == pytest.approx(2 / 10_001)


def test_holm_corrects_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_one_query_is_no_sample() -> None:
    for test in (paired_t_test, randomisation_test, bootstrap_interval):
        with pytest.raises(ValueError, match=r"shape \[1\]: expected \[Q\] with at least 2"):
            test(np.ones(1))
