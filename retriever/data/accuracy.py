"""Accuracy of a batch among a fixed number of candidates, so that batches of different sizes can be compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.infonce.exclusions import Exclusions, known_pairs
from retriever.data.layout import OfTensors

CANDIDATES = 100  # passages that a query is ranked among, its target included
_QUERIES = 128  # of a rank that are ranked, at most


@dataclass(frozen=True)
class Ranking(OfTensors):
    """Some of a rank's queries, and which of its first passages each is ranked among."""

    positives: Tensor  # [n] int64: the column of each query's target
    excluded: Tensor  # [n, CANDIDATES] bool: first columns that are no candidates: the target, and what is known

    @staticmethod
    def of(positives: Tensor, exclusions: Exclusions) -> Ranking | None:
        """The ranking of the first queries; positives [B] int64. None where the rank has too few passages or queries.

        A query's candidates are its target and the first of the other passages, known positives left out.
        """
        n = min(len(positives), _QUERIES)
        if not n or len(exclusions.passage_ids) <= CANDIDATES:
            return None
        ids = exclusions.passage_ids[:CANDIDATES], exclusions.known_ptr, exclusions.known_ids
        first = Exclusions(*ids).of_rows(torch.arange(n))
        excluded = torch.zeros(n, CANDIDATES, dtype=torch.bool)
        rows, columns = known_pairs(first)[:2]
        excluded[rows, columns] = True
        excluded[positives[:n] >= CANDIDATES, -1] = True  # the target takes its place
        return Ranking(positives[:n], excluded)

    def counts(self, queries: Tensor, passages: Tensor) -> Tensor:
        """[2] of the dtype of queries [B, D] and passages [N, D]: queries whose target comes first, and queries."""
        here = self.to(queries.device)
        q = queries[: len(here.positives)]
        others = (q @ passages[:CANDIDATES].T).masked_fill(here.excluded, -torch.inf)
        first = (q * passages[here.positives]).sum(dim=1) > others.amax(dim=1)
        return torch.stack([first.sum(), torch.ones_like(first).sum()]).to(q.dtype)
