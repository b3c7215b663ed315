"""What one mining depends on besides its data, its model and its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retriever.config_tree import require

Retriever = Literal["bm25", "model"]


@dataclass(frozen=True)
class MiningSettings:
    """Where candidates come from, how many are kept, and which are taken for false negatives.

    Ranks count from 1 and are those of the search, positives included. A candidate is dropped where its score is above
    the lowest score of its query's positives less `margin`, or above `percentage` of that score (a score below 0 is
    divided by it instead).
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
        """Candidates of each query that are scored."""
        return self.judged or (2 * self.negatives if self.filters else self.negatives)

    def line(self, positive: float) -> float:
        """The highest score that a negative may have beside a positive's score."""
        line = float("inf")
        if self.margin is not None:
            line = positive - self.margin
        if self.percentage is not None:
            line = min(line, positive * self.percentage if positive > 0 else positive / self.percentage)
        return line
