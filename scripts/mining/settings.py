"""The settings of a mining, besides data, model and teachers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retriever.config_tree import require

Retriever = Literal["bm25", "model"]


@dataclass(frozen=True)
class MiningSettings:
    """Settings of mining: the ranks of candidates, how many are kept, and which count as false negatives.

    Ranks are those of the search and count from 1, positives included. With `line` the lowest score of the query's
    positives, a candidate is dropped if its score exceeds line − `margin`, or `percentage` · line (line / `percentage`
    where line is negative).
    """

    retrievers: tuple[Retriever, ...] = ("model",)
    first_rank: int = 10
    last_rank: int = 100
    negatives: int = 8
    pick: Literal["random", "top"] = "random"
    margin: float | None = None
    percentage: float | None = None
    judged: int | None = (
        None  # candidates scored for each query; None: twice `negatives` where any is filtered, else as many
    )
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            1 <= self.first_rank <= self.last_rank,
            "--ranks",
            "FIRST LAST with 1 <= FIRST <= LAST",
            (self.first_rank, self.last_rank),
        )
        require(self.negatives >= 1, "--negatives", "at least 1", self.negatives)
        require(
            self.percentage is None or 0 < self.percentage <= 1,
            "--percentage",
            "above 0 and at most 1",
            self.percentage,
        )
        require(self.margin is None or self.margin >= 0, "--margin", "0 or more", self.margin)
        require(
            self.judged is None or self.judged >= self.negatives,
            "--judged",
            f"at least --negatives, {self.negatives}",
            self.judged,
        )

    @property
    def filters(self) -> bool:
        """Whether candidates are dropped by their scores."""
        return self.margin is not None or self.percentage is not None

    @property
    def candidates(self) -> int:
        """The number of candidates scored for each query."""
        return self.judged or (2 * self.negatives if self.filters else self.negatives)

    def line(self, positive: float) -> float:
        """The highest score that a negative may have beside a positive with the score `positive`."""
        line = float("inf")
        if self.margin is not None:
            line = positive - self.margin
        if self.percentage is not None:
            line = min(line, positive * self.percentage if positive > 0 else positive / self.percentage)
        return line
