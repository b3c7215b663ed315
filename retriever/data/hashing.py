"""Hashes that take the place of a random generator: any draw can be repeated alone, from its indices."""

from __future__ import annotations

import numpy as np


def hashed_order(key: np.ndarray, n: int) -> np.ndarray:
    """The permutation [n] int64 of 0 … n − 1 that `key` gives."""
    return np.argsort(hashed(key, np.arange(n, dtype=np.uint64)), kind="stable")


def hashed(*parts: np.ndarray | np.uint64) -> np.ndarray:
    """A 64-bit hash of the parts (splitmix64 over them in turn), element by element."""
    mixed = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            mixed = mixed + part + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed
