"""What the loss is told of one rank's queries and passages: positives, exclusions, weights and a teacher's views."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.infonce.exclusions import Exclusions
from kernels.infonce.rules import Guide, Lists, Pairs, Pools
from retriever.data.layout import OfTensors
from retriever.data.teacher import Groups
from retriever.data.text_vectors import TeacherVectors


class KnownPairs(NamedTuple):
    """Pairs of this rank's queries and all ranks' passages that are no plain negatives, looked up in advance."""

    # Without the queries' own targets, with their own negatives where the loss asks for these; columns counted over all
    # ranks' passages, rank after rank.
    pairs: Pairs
    counts: tuple[int, ...]  # passages of each rank
    passage_ids: Tensor | None = None  # [n] int64, of all ranks' passages; asked for where there are pools


@dataclass(frozen=True)
class Targets(OfTensors):
    """Which passages each query is compared with, and how. B queries and N passages on this rank."""

    positives: Tensor  # [B] int64: this rank's column of each query's positive, -1 for an ignored row
    passage_ids: Tensor  # [N] int64, unique across sources and ranks
    known_ptr: Tensor  # [B + 1] int64
    known_ids: Tensor  # [known_ptr[-1]] int64: passages that are no negatives of a row; the positive is among them
    global_queries: int  # queries of the whole batch, over all ranks
    groups: Groups | None = None  # what a teacher says of some passages, where it is distilled
    known_pairs: KnownPairs | None = None  # of `known_ids`; None: to be looked up where the ranks' passages meet
    ignores: bool | None = None  # whether any row is ignored; None: not asked yet
    pools: Pools | None = None  # of queries and of all ranks' passages; None: a query sees every passage
    shares: Tensor | None = None  # [B] float64: of a query's loss, where it stands once for each of several positives
    own: Lists | None = None  # each row's own negatives in the global batch, where the loss asks for them
    guide: Guide | None = None  # a guide model's vectors, where there is one
    teacher: TeacherVectors | None = None  # a teacher's embeddings, where they are distilled
    # [B] bool: which rows are contrasted with the batch's passages; None: all
    in_batch: Tensor | None = None
    own_groups: Groups | None = None  # of rows that are contrasted with their own negatives; None: no row of any rank
    contrasts: bool = True  # whether any row on any rank is contrasted with the batch's passages
    temperature: float | None = None  # of this batch; None: the objective's

    def to(self, device: torch.device) -> Targets:
        """A copy on `device`, `ignores` known. Raises ValueError where a positive is none of the N columns."""
        ignores = self._ignores() if self.ignores is None else self.ignores
        return replace(super().to(device), ignores=ignores)

    @property
    def exclusions(self) -> Exclusions:
        """Which pairs are no negatives, by what is known of the texts."""
        ids = self.passage_ids, self.known_ptr, self.known_ids
        return Exclusions(*ids, guide=self.guide, own=self.own, pools=self.pools)

    def reordered(self, query_rows: Tensor, passage_rows: Tensor) -> Targets:
        """The targets of a batch whose row i is query_rows[i] [B] of the queries, passage_rows[i] [N] of the passages.

        A teacher's groups are left out, and pairs that were looked up: they are of the old order, on other ranks too.
        """
        column_of = torch.empty_like(passage_rows)
        column_of[passage_rows] = torch.arange(len(passage_rows))  # [N]: where each passage stands now
        positives = self.positives[query_rows]
        exclusions = self.exclusions.of_rows(query_rows)
        guide, teacher = exclusions.guide, self.teacher
        return replace(
            self,
            positives=column_of[positives.clamp(min=0)].where(positives >= 0, -1),
            passage_ids=self.passage_ids[passage_rows],
            known_ptr=exclusions.known_ptr,
            known_ids=exclusions.known_ids,
            shares=None if self.shares is None else self.shares[query_rows],
            own=exclusions.own,
            guide=None if guide is None else guide._replace(passages=guide.passages[passage_rows]),
            teacher=teacher and TeacherVectors(teacher.queries[query_rows], teacher.passages[passage_rows]),
            groups=None,
            known_pairs=None,
            pools=exclusions.pools,
            in_batch=None if self.in_batch is None else self.in_batch[query_rows],
        )

    def _ignores(self) -> bool:
        """Waits for nothing where the targets are on the host, as they are before `to`."""
        least, most = (int(x) for x in self.positives.aminmax()) if len(self.positives) else (0, -1)
        if least < -1 or most >= len(self.passage_ids):
            raise ValueError(
                f"expected positives between -1 and {len(self.passage_ids) - 1} (a column), received {least} to {most}"
            )
        return least < 0
