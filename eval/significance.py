"""Is the difference of two runs more than chance? Paired tests over the same queries, from per-query differences d [Q].

All p-values are two-sided. With several runs against one baseline, `holm` corrects for how many comparisons were made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from retriever.errors import RefusedError

_AT_ONCE = 2**21  # float64 values that one batch of resamples holds
_RESAMPLES = 10_000
LEAST_P = 2 / (_RESAMPLES + 1)  # of `bootstrap_test`


def paired_t_test(differences: np.ndarray) -> tuple[float, float]:
    """(t, p) of Student's paired test: t = mean(d) / (std(d) / √Q), Q - 1 degrees of freedom.

    differences [Q]. Without any spread t is 0 and p 1 where all are 0, else t is infinite and p 0. Raises RefusedError
    where Q < 2.
    """
    d = _checked(differences)
    if np.ptp(d) == 0.0:  # the computed deviation of equal values need not be 0
        return (0.0, 1.0) if d[0] == 0.0 else (math.copysign(math.inf, d[0]), 0.0)
    found = stats.ttest_1samp(d, 0.0)
    return float(found.statistic), float(found.pvalue)


def randomisation_test(differences: np.ndarray, permutations: int = 10_000, seed: int = 0) -> float:
    """p of Fisher's randomisation test: how often |Σ ±d|, signs drawn at random, is at least |Σ d|.

    The observed signs count as one of the draws, so p is at least 1 / (permutations + 1). Raises RefusedError where Q <
    2.
    """
    d = _checked(differences)
    observed = abs(d.sum()) - 1e-12 * np.abs(d).sum()  # a sum in another order is the same sum
    rng, at_least = np.random.default_rng(seed), 1
    rows = max(1, _AT_ONCE // len(d))
    for first in range(0, permutations, rows):
        shape = min(rows, permutations - first), len(d)
        signs = rng.integers(0, 2, shape, dtype=np.int8) * 2.0 - 1.0  # [rows, Q]
        at_least += int((np.abs(signs @ d) >= observed).sum())
    return at_least / (permutations + 1)


def bootstrap_interval(
    differences: np.ndarray, clusters: Sequence[str] | None = None, *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of mean(d), by `bootstrap_means`."""
    means = bootstrap_means(differences, clusters, seed=seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_test(differences: np.ndarray, clusters: Sequence[str] | None = None, *, seed: int = 0) -> float:
    """p of mean(d) = 0: twice the share of `bootstrap_means` on the other side of 0, at least `LEAST_P`."""
    means = bootstrap_means(differences, clusters, seed=seed)
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    return min(1.0, 2 * (int(beyond) + 1) / (len(means) + 1))


def bootstrap_means(differences: np.ndarray, clusters: Sequence[str] | None = None, *, seed: int = 0) -> np.ndarray:
    """[R] means of d over queries drawn with replacement, or over whole clusters of them.

    differences [Q], or [S, Q] of S training seeds, which are drawn with replacement too, crossed with the queries.
    `clusters` [Q] names the cluster of each query; by default each is its own. Raises RefusedError where there are
    fewer than two. (Field and Welsh 2007, the cluster bootstrap; Owen 2007, crossed factors)
    """
    d = np.atleast_2d(np.asarray(differences, dtype=np.float64))
    _checked(d.mean(axis=0))
    names, members = np.unique(np.arange(d.shape[1]) if clusters is None else clusters, return_inverse=True)
    if len(names) < 2:
        raise RefusedError("1 cluster: expected at least two, one alone says nothing of how clusters differ")
    sizes = np.bincount(members)  # [C]
    sums = np.stack([np.bincount(members, weights=row) for row in d])  # [S, C]
    rng, means = np.random.default_rng(seed), list[np.ndarray]()
    rows = max(1, _AT_ONCE // sums.size)
    for first in range(0, _RESAMPLES, rows):
        count = min(rows, _RESAMPLES - first)
        drawn = rng.integers(len(names), size=(count, len(names)))
        seeds = rng.integers(len(d), size=(count, len(d)))
        of_seeds = sums[seeds].mean(axis=1)  # [count, C]
        means.append(np.take_along_axis(of_seeds, drawn, axis=1).sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(means)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, corrected so that the chance of any false finding among them is bounded. (Holm 1979)"""
    corrected, largest = [0.0] * len(p_values), 0.0
    for done, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - done)))
        corrected[place] = largest
    return corrected


def _checked(differences: np.ndarray) -> np.ndarray:
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or len(d) < 2:
        raise RefusedError(
            f"differences of shape {list(d.shape)}: expected [Q] with at least 2 queries to compare runs on"
        )
    return d
