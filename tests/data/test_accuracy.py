"""The accuracy in the log counts the same number of candidates in a batch of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from kernels.infonce.exclusions import Exclusions
from retriever.data.accuracy import BINS, CANDIDATES, Ranking


@pytest.mark.parametrize("passages", [150, 1500])
def test_a_query_is_ranked_among_its_target_and_the_first_other_passages(passages: int) -> None:
    """Row by row: 100 candidates, less those that are known."""
    draw = torch.Generator().manual_seed(passages)
    p = normalize(torch.randn(passages, 8, generator=draw, dtype=torch.float64), dim=1)
    positives = torch.randint(passages, (60,), generator=draw)
    q = normalize(p[positives] + 0.3 * torch.randn(60, 8, generator=draw, dtype=torch.float64), dim=1)
    ids = torch.randperm(10_000, generator=draw)[:passages]
    known = [{int(ids[c]), *(int(i) for i in ids[torch.randint(passages, (3,), generator=draw)])} for c in positives]
    ptr = torch.tensor([0, *(len(row) for row in known)]).cumsum(0)
    exclusions = Exclusions(ids, ptr, torch.tensor([i for row in known for i in sorted(row)]))
    ranking = Ranking.of(positives, exclusions)
    assert ranking is not None
    expected, similarities = 0, list[tuple[float, float]]()
    for i, target in enumerate(positives.tolist()):
        others = [c for c in range(passages) if c != target][: CANDIDATES - 1]
        negatives = [c for c in others if int(ids[c]) not in known[i]]
        similarities.append((float(q[i] @ p[target]), max(float(q[i] @ p[c]) for c in negatives)))
        expected += similarities[-1][0] > similarities[-1][1]
    first, queries, *histograms = ranking.counts(q, p).tolist()
    assert (first, queries) == (expected, 60) and 5 < expected < 55
    for side, found in enumerate((histograms[:BINS], histograms[BINS:])):
        values = [both[side] for both in similarities]
        assert found == np.histogram(values, BINS, (-1.0, 1.0))[0].tolist() and sum(found) == 60


def test_a_batch_of_too_few_passages_is_not_ranked() -> None:
    ids, ptr = torch.arange(CANDIDATES), torch.arange(4)
    assert Ranking.of(torch.arange(3), Exclusions(ids, ptr, torch.arange(3))) is None
