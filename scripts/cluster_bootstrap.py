"""How sure a mean is whose values come in groups that resemble one another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def cluster_interval(
    values: np.ndarray, clusters: Sequence[str], *, level: float = 0.95, samples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of the mean of `values` [Q] when whole clusters are drawn again with replacement.

    `clusters` [Q] names each value's cluster. For a paired comparison the values are differences, query by query.
    Raises ValueError for fewer than two clusters or differing lengths. (Field and Welsh 2007, the cluster bootstrap)
    """
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values and {len(clusters)} cluster names: expected one name a value")
    names, members = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{len(names)} cluster: expected at least two, one alone says nothing of how clusters differ")
    sums = np.bincount(members, weights=values)  # [C]
    sizes = np.bincount(members)  # [C]
    drawn = np.random.default_rng(seed).integers(len(names), size=(samples, len(names)))  # [samples, C]
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)  # [samples]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
