"""Random contrastive batches spread over ranks, and the loss written out pair by pair as their oracle."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.infonce.rules import Guide, Lists, Pairs, Pools, guide_vectors
from retriever.data.batch import Batch
from retriever.data.chunks import Chunk, Chunks, filler, plan_chunks
from retriever.data.layout import pack_rows, pad_rows
from retriever.data.targets import KnownPairs, Targets
from retriever.gradcache import backward_through_encoder, encode_without_graph, representation_gradients
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World
from retriever.retention import NOTHING, Retention
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
    own: list[list[int]] = field(default_factory=list)  # passage ids of each query's own negatives; empty: not asked
    guide: Guide | None = None  # over all queries and passages
    shares: list[float] = field(default_factory=list)  # of each query in a loss that several have; empty: 1 each


def random_batch(
    *,
    queries: int = 14,
    passages: int = 31,
    ranks: int = 1,
    ignored: int = 0,
    vocabulary: tuple[int, int] = (40, 150),
    seed: int = 0,
    pools: int = 0,
    own: bool = False,
    guide: bool = False,
    shared: bool = False,
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
    whole = WholeBatch(
        [tokens(7) for _ in range(queries)], [tokens(19) for _ in range(passages)], ids, columns, known, owners
    )
    if pools:
        of_queries, of_passages = ([draw.randrange(pools) for _ in range(count)] for count in (queries, passages))
        whole = replace(whole, query_pools=of_queries, passage_pools=of_passages)
    if shared:  # thirds and a half, as of queries with three and two positives
        whole = replace(whole, shares=[(1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2, 1)[row % 6] for row in range(queries)])
    if own:
        whole = replace(whole, own=[sorted(draw.sample(ids, 4)) for _ in range(queries)])
    return replace(whole, guide=_random_guide(whole, seed)) if guide else whole


def _random_guide(whole: WholeBatch, seed: int) -> Guide:
    """Excludes what is more similar than the target less 0.1."""
    generator = torch.Generator().manual_seed(seed)
    sizes = len(whole.positives), len(whole.passage_ids)
    queries, passages = (guide_vectors(torch.randn(n, 5, generator=generator)) for n in sizes)
    targets = passages[torch.tensor(whole.positives).clamp(min=0)]
    return Guide(queries, passages, (queries.float() * targets.float()).sum(1) - 0.1)


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
        *_lists(known),
        global_queries=round(sum(whole.shares)) if whole.shares else len(whole.positives),
        shares=torch.tensor([whole.shares[r] for r in rows], dtype=torch.float64) if whole.shares else None,
        own=_lists([whole.own[r] for r in rows]) if whole.own else None,
        guide=whole.guide and Guide(whole.guide.queries[rows], whole.guide.passages[columns], whole.guide.limit[rows]),
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


def _lists(rows: list[list[int]]) -> Lists:
    ptr = torch.tensor([0, *np.cumsum([len(row) for row in rows])], dtype=torch.int64)
    return Lists(ptr, torch.tensor([i for row in rows for i in row], dtype=torch.int64))


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
    counts = tuple(whole.owners.count(rank) for rank in range(max(whole.owners) + 1))
    return KnownPairs(Pairs(*rows_and_columns), counts, torch.tensor([whole.passage_ids[column] for column in order]))


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


def cached_gradients(
    encoder: Any, objective: ContrastiveObjective, batch: Batch, world: World, retention: Retention = NOTHING
) -> Tensor:
    """Adds the gradients of all ranks, by the gradient cache, to those of the parameters; returns the batch's loss []."""
    representations, first = encode_without_graph(encoder, batch, retention, offload=objective.offload)
    loss, gradients = representation_gradients(objective, representations, batch, world)
    backward_through_encoder(encoder, batch, gradients, first)
    world.sum_gradients([*encoder.parameters(), *objective.parameters()])
    return world.sum(loss)


def oracle_loss(
    queries: Tensor,
    passages: Tensor,
    whole: WholeBatch,
    log_scale: Tensor,
    *,
    symmetric: bool = False,
    margin: float | None = None,
    directions: Sequence[str] = ("query_to_passage",),
    partition: str = "joint",
    hardness: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """The loss of the whole batch, each term summed as it is defined, for autograd in one process.

    hardness: α of own and of other negatives.
    """
    if symmetric:
        directions, partition = ("query_to_passage", "passage_to_query"), "per_direction"
    scale, guide = log_scale.exp(), whole.guide
    s, among_queries, among_passages = queries @ passages.T, queries @ queries.T, passages @ passages.T
    b, n = s.shape
    own = [set(ids) for ids in whole.own] or [set[int]()] * b

    def excluded(i: int, similarity: Tensor, g: Tensor | None, h: Tensor | None) -> bool:
        """By margin or guide; g and h are the guide's vectors of the two texts."""
        limit = torch.inf if margin is None else s[i, whole.positives[i]] + margin
        guided = (
            guide is not None and g is not None and h is not None and bool(g.double() @ h.double() > guide.limit[i])
        )
        return guided or bool(similarity > limit)

    def other_pool(i: int, j: int) -> bool:
        """Whether passage j is in another pool than query i."""
        return whole.query_pools is not None and whole.query_pools[i] != whole.passage_pools[j]  # type: ignore[index]

    def passage_to(i: int, j: int) -> bool:
        """Whether passage j is a negative of query i."""
        if whole.positives[i] < 0 or whole.passage_ids[j] in whole.known[i]:
            return False
        if other_pool(i, j):
            return False
        return not excluded(i, s[i, j], guide and guide.queries[i], guide and guide.passages[j])

    def query_to(i: int, k: int) -> bool:
        if whole.positives[k] < 0 or k == i or whole.passage_ids[whole.positives[k]] in whole.known[i]:
            return False
        if other_pool(i, whole.positives[k]):
            return False
        return not excluded(i, among_queries[i, k], guide and guide.queries[i], guide and guide.queries[k])

    def passage_to_target(i: int, t: int, j: int) -> bool:
        if j == t or whole.passage_ids[j] in {*whole.known[i], *own[i]} or other_pool(i, j):
            return False
        return not excluded(i, among_passages[t, j], guide and guide.passages[t], guide and guide.passages[j])

    def logits(direction: str, i: int, t: int) -> list[Tensor]:
        if direction == "query_to_passage":
            alphas = [hardness[whole.passage_ids[j] not in own[i]] for j in range(n)]
            return [scale * s[i, j] + alphas[j] * s[i, j].detach() for j in range(n) if passage_to(i, j)]
        if direction == "passage_to_query":
            return [scale * s[k, t] for k in range(b) if passage_to(k, t)]
        if direction == "query_to_query":
            return [scale * among_queries[i, k] for k in range(b) if query_to(i, k)]
        return [scale * among_passages[t, j] for j in range(n) if passage_to_target(i, t, j)]

    total = s.new_zeros(())
    for i, t in enumerate(whole.positives):
        if t < 0:
            continue
        target, each = scale * s[i, t], {direction: logits(direction, i, t) for direction in directions}
        if partition == "joint":
            pools = [[x for part in each.values() for x in part] + [target] * ("passage_to_query" in each)]
        else:
            pools = list(each.values())
        losses = [torch.stack([target, *pool]).logsumexp(dim=0) - target for pool in pools]
        total = total + (whole.shares[i] if whole.shares else 1.0) * torch.stack(losses).mean()
    return total / (round(sum(whole.shares)) if whole.shares else b)
