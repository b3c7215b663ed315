"""Accuracy and similarities among a fixed number of candidates, so that batches of different sizes can be compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.infonce.exclusions import Exclusions, known_pairs
from retriever.data.layout import OfTensors

CANDIDATES = 100  # passages that a query is ranked among, its target included
BINS = 40  # of similarities, from -1 to 1
COUNTS = 2 + 2 * BINS
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
        """[COUNTS] of the dtype of queries [B, D] and passages [N, D]: queries whose target comes first, and queries;
        how many have the similarity of their target in each bin, and that of their most similar other candidate.
        """
        here = self.to(queries.device)
        q = queries[: len(here.positives)]
        others = (q @ passages[:CANDIDATES].T).masked_fill(here.excluded, -torch.inf)
        target, hardest = (q * passages[here.positives]).sum(dim=1), others.amax(dim=1)  # [n]
        first = target > hardest
        counts = torch.stack([first.sum(), torch.ones_like(first).sum()])
        return torch.cat([counts, _histogram(target), _histogram(hardest)]).to(q.dtype)


def _histogram(similarities: Tensor) -> Tensor:
    """[BINS] int64: how many of `similarities` [n] are in each bin; the first and the last take what lies outside."""
    places = ((similarities + 1) * (BINS / 2)).clamp(0, BINS - 1).long()
    return (places[:, None] == torch.arange(BINS, device=places.device)).sum(dim=0)
