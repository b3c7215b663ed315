"""Retention between the two passes of a step: tokens that keep their graphs, or the costliest products of their layers.

A graph saves the second pass the whole encoding of a chunk. The products take a tenth of a graph's memory and save over
a quarter of the encoding. (Choosing by time and memory what to compute again: Korthikanti et al. 2022,
arXiv:2205.05198.)
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from retriever.config import Auto, BatchConfig

Keeps = Literal["graph", "products", "nothing"]
EVERYTHING = 2**62  # tokens: more than any batch has


class Retention(NamedTuple):
    """Computed tokens of a rank's chunks: the first ones keep their graphs, the next ones the products of their
    layers.
    """

    graphs: int = 0
    products: int = 0

    @classmethod
    def from_config(cls, batch: BatchConfig) -> Retention:
        """The retention that section `batch` sets; 0 for `auto`."""
        return cls(*(given_tokens(setting) or 0 for setting in (batch.retain, batch.retain_products)))


def given_tokens(setting: bool | int | Auto) -> int | None:
    """Tokens that `batch.retain` or `batch.retain_products` stands for; None for `auto`."""
    if setting == "auto":
        return None
    return EVERYTHING if setting is True else int(setting)


NOTHING = Retention()


class Budget:
    """The rest of a retention, as the chunks of a step take from it in turn."""

    def __init__(self, retention: Retention) -> None:
        self._graphs, self._products = retention

    def take(self, tokens: int) -> Keeps:
        """The retention of a chunk of `tokens` tokens."""
        self._graphs -= tokens
        if self._graphs >= 0:
            return "graph"
        self._products -= tokens
        return "products" if self._products >= 0 else "nothing"
