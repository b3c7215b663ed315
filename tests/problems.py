"""Random contrastive batches spread over ranks, and the loss written out pair by pair as their oracle."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kernels.infonce.exclusions import Pairs, Pools
from retriever.data.batch import Batch, KnownPairs, Targets
from retriever.data.chunks import Chunk, Chunks, filler, plan_chunks
from retriever.data.layout import pack_rows, pad_rows
from retriever.rng import seed_step


@dataclass(frozen=True)
class WholeBatch:
    """A global batch: texts as token ids, and which passages each query knows as positive."""

    query_tokens: list[np.ndarray]
    passage_tokens: list[np.ndarray]
    passage_ids: list[int]
    positives: list[int]  # column of each query's positive, -1: ignored
    known: list[list[int]]  # passage ids, the positive's among them; ids of passages outside the batch too
    owners: list[int]  # rank of each passage
    query_pools: list[int] | None = None
    passage_pools: list[int] | None = None


def random_batch(
    *,
    queries: int = 14,
    passages: int = 31,
    ranks: int = 1,
    ignored: int = 0,
    vocabulary: tuple[int, int] = (40, 150),
    seed: int = 0,
    pools: int = 0,
) -> WholeBatch:
    """Shared positives, a passage that is one query's negative and another's positive, several known positives, unequal
    ranks.

    The last of several ranks holds passages only. With `pools`, a target may be in another pool than its query.
    """
    draw = random.Random(seed)
    ids = draw.sample(range(10_000), passages)
    columns = [draw.randrange(passages * 2 // 3) for _ in range(queries - 2)] + [
        0,
        0,
    ]  # three queries may share column 0
    known = []
    for column in columns:
        others = draw.sample(ids, draw.choice([0, 0, 1, 3])) + draw.sample(range(10_000, 10_050), draw.choice([0, 2]))
        known.append(sorted({ids[column], *others}))
    with_queries = set(columns)
    owners = [
        draw.choice([0, 0, 0, *range(max(1, ranks - 1))]) if c in with_queries else draw.randrange(ranks)
        for c in range(passages)
    ]
    for row in draw.sample(range(queries), ignored):
        columns[row] = -1
    tokens = lambda longest: np.array([draw.randrange(*vocabulary) for _ in range(draw.randint(2, longest))])  # noqa: E731
    texts = [tokens(7) for _ in range(queries)], [tokens(19) for _ in range(passages)]
    whole = WholeBatch(*texts, ids, columns, known, owners)
    if not pools:
        return whole
    of_queries, of_passages = ([draw.randrange(pools) for _ in range(count)] for count in (queries, passages))
    return replace(whole, query_pools=of_queries, passage_pools=of_passages)


def views_batch(*, texts: int = 12, ranks: int = 1) -> WholeBatch:
    """Texts that are their own positives; the last query repeats the first one, and shares its passage."""
    whole = random_batch(queries=texts + 1, passages=texts, ranks=ranks, seed=5)
    positives = [*range(texts), 0]
    tokens = whole.passage_tokens
    return WholeBatch(
        [tokens[i] for i in positives],
        tokens,
        whole.passage_ids,
        positives,
        [[whole.passage_ids[i]] for i in positives],
        whole.owners,
    )


def rank_batch(
    whole: WholeBatch,
    rank: int,
    tokens_per_chunk: int,
    *,
    packed: bool = False,
    chunks_a_side: int = 0,
    looked_up: bool = False,
) -> tuple[Batch, list[int], list[int]]:
    """The rank's Batch, with fillers up to `chunks_a_side`, and which rows of the whole batch its queries and passages
    are.

    `looked_up`: with its known pairs, as the loader finds them.
    """
    columns = [c for c, owner in enumerate(whole.owners) if owner == rank]
    home = [whole.owners[c] if c >= 0 else 0 for c in whole.positives]
    rows = [r for r, owner in enumerate(home) if owner == rank]
    local = {c: i for i, c in enumerate(columns)}
    known = [whole.known[r] for r in rows]
    targets = Targets(
        torch.tensor([local[whole.positives[r]] if whole.positives[r] >= 0 else -1 for r in rows], dtype=torch.int64),
        torch.tensor([whole.passage_ids[c] for c in columns], dtype=torch.int64),
        torch.tensor([0, *np.cumsum([len(k) for k in known])], dtype=torch.int64),
        torch.tensor([i for k in known for i in k], dtype=torch.int64),
        global_queries=len(whole.positives),
        known_pairs=_known_pairs(whole, rows) if looked_up else None,
        pools=_pools(whole, rows),
    )
    sides = {"query": [whole.query_tokens[r] for r in rows], "passage": [whole.passage_tokens[c] for c in columns]}
    chunks = []
    for side, texts in sides.items():
        for part in plan_chunks(np.array([len(t) for t in texts], dtype=np.int64), tokens_per_chunk, packed=packed):
            own = [texts[i] for i in part]
            chunk = Chunk(side, torch.from_numpy(part), pack_rows(own) if packed else pad_rows(own, 0))  # type: ignore[arg-type]
            chunks.append(lambda chunk=chunk: chunk)
        missing = chunks_a_side - sum(chunk().side == side for chunk in chunks)
        chunks += [lambda side=side: filler(side, packed=packed)] * missing
    batch = Batch(0, 0, "test", Chunks(chunks, torch.device("cpu")), targets, (len(rows), len(columns)), 0)
    return batch, rows, columns


def _pools(whole: WholeBatch, rows: list[int]) -> Pools | None:
    if whole.query_pools is None or whole.passage_pools is None:
        return None
    ids, of_ids = zip(*sorted(zip(whole.passage_ids, whole.passage_pools, strict=True)), strict=True)
    of_rows = torch.tensor([whole.query_pools[row] for row in rows], dtype=torch.int64)
    return Pools(of_rows, torch.tensor(ids), torch.tensor(of_ids))


def _known_pairs(whole: WholeBatch, rows: list[int]) -> KnownPairs:
    """Of the queries `rows`, pair by pair; columns in the order of the ranks."""
    order = sorted(range(len(whole.owners)), key=lambda c: whole.owners[c])
    pairs = [
        (i, j)
        for i, row in enumerate(rows)
        for j, column in enumerate(order)
        if whole.passage_ids[column] in whole.known[row] and column != whole.positives[row]
    ]
    rows_and_columns = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return KnownPairs(
        Pairs(*rows_and_columns), tuple(whole.owners.count(rank) for rank in range(max(whole.owners) + 1))
    )


def encode_in_chunks(
    encoder: torch.nn.Module, parts: Sequence[tuple[Batch, list[int], list[int]]], sizes: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """All ranks' queries and passages, `parts` of `rank_batch`, in one graph over the chunks that the ranks encode,
    under the random numbers that they draw.
    """
    sides = {side: torch.zeros(n, 32, dtype=torch.float64) for side, n in zip(("query", "passage"), sizes, strict=True)}
    for rank, (batch, rows, columns) in enumerate(parts):
        seed_step(0, 0, rank)
        places = {"query": torch.tensor(rows), "passage": torch.tensor(columns)}
        for chunk in batch.chunks:
            whole, at = sides[chunk.side], places[chunk.side][chunk.rows]
            sides[chunk.side] = whole.index_copy(0, at, encoder(chunk.side, chunk.tokens))
    return sides["query"], sides["passage"]


def encode_whole(encoder: torch.nn.Module, texts: list[np.ndarray], side: str) -> Tensor:
    """All texts in one forward pass, in their order."""
    return encoder(side, pad_rows(texts, 0))


def oracle_loss(
    queries: Tensor,
    passages: Tensor,
    whole: WholeBatch,
    log_scale: Tensor,
    *,
    symmetric: bool = False,
    margin: float | None = None,
) -> Tensor:
    """The loss of the whole batch, each term summed as it is defined, for autograd in one process."""
    scale = log_scale.exp()
    s = queries @ passages.T
    b, n = s.shape

    def negative(i: int, j: int) -> bool:
        column = whole.positives[i]
        if column < 0 or whole.passage_ids[j] in whole.known[i]:
            return False
        if whole.query_pools is not None and whole.query_pools[i] != whole.passage_pools[j]:  # type: ignore[index]
            return False
        return margin is None or not bool(s[i, j] > s[i, column] + margin)

    total = s.new_zeros(())
    for i, t in enumerate(whole.positives):
        if t < 0:
            continue
        row = torch.stack([s[i, t], *(s[i, j] for j in range(n) if negative(i, j))])
        loss = torch.logsumexp(scale * row, dim=0) - scale * s[i, t]
        if symmetric:
            column = torch.stack([s[i, t], *(s[k, t] for k in range(b) if negative(k, t))])
            loss = 0.5 * (loss + torch.logsumexp(scale * column, dim=0) - scale * s[i, t])
        total = total + loss
    return total / b
