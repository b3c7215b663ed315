"""Rules for negatives as tensors: which query–passage pairs count, and with what weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

_GUIDE_STEPS = 2048  # a guide's numbers are multiples of 1 / this


class Pairs(NamedTuple):
    """Some (row, column) of a block of rows and columns that are no plain negatives."""

    rows: Tensor  # [E] int64
    columns: Tensor  # [E] int64
    term: Tensor | None = None  # [E] float32: −inf of an excluded pair, 0 of an own negative; None: all are excluded

    def select(self, index: Tensor) -> Pairs:
        """The pairs of an index, bool [E] or int64."""
        return Pairs(self.rows[index], self.columns[index], None if self.term is None else self.term[index])

    def split(self) -> tuple[Pairs, Pairs]:
        """The excluded ones and the own negatives."""
        if self.term is None:
            return self, Pairs(self.rows[:0], self.columns[:0])
        return self.select(self.term < 0), self.select(self.term == 0)


class Lists(NamedTuple):
    """A list of passage ids for every row: row i has ids[ptr[i] : ptr[i + 1]]."""

    ptr: Tensor  # [B + 1] int64
    ids: Tensor  # [ptr[-1]] int64

    def of_rows(self, index: Tensor) -> Lists:
        """The lists of the rows `index` [n] int64."""
        counts = self.ptr.diff()[index]
        ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        within = torch.arange(int(ptr[-1]), device=index.device) - ptr[:-1].repeat_interleave(counts)
        return Lists(ptr, self.ids[self.ptr[:-1][index].repeat_interleave(counts) + within])

    def joined(self, other: Lists) -> Lists:
        """Each row's list with that of `other` behind it."""
        rows = torch.cat([torch.repeat_interleave(lists.ptr.diff()) for lists in (self, other)])
        return Lists(self.ptr + other.ptr, torch.cat([self.ids, other.ids])[rows.argsort(stable=True)])

    def pairs(self, passage_ids: Tensor) -> Pairs:
        """Every (row, column) whose entry of passage_ids [N] is in the row's list, rows ascending; an id may stand in
        several columns.
        """
        ids, order = passage_ids.sort(stable=True)
        first = torch.searchsorted(ids, self.ids)
        count = torch.searchsorted(ids, self.ids, right=True) - first  # columns that each listed id matches
        row_of = torch.repeat_interleave(self.ptr.diff())
        offset = torch.arange(int(count.sum()), device=ids.device)
        offset -= torch.repeat_interleave(count.cumsum(0) - count, count)
        return Pairs(row_of.repeat_interleave(count), order[first.repeat_interleave(count) + offset])


class Guide(NamedTuple):
    """Vectors of a guide model, made by `guide_vectors`: column j is no negative of row i where ⟨g_i, g_j⟩ > limit_i.
    (Solatorio 2024, arXiv:2402.16829)
    """

    queries: Tensor  # [B, G] float16
    passages: Tensor  # [N, G] float16
    limit: Tensor  # [B] float32

    def of_rows(self, index: Tensor) -> Guide:
        """The rule of the rows `index` [n] int64."""
        return Guide(self.queries[index], self.passages, self.limit[index])


class Hardness(NamedTuple):
    """α, by which hard negatives count more: a negative's logit is scale · s + α · stop_gradient(s). (Lan et al. 2025,
    arXiv:2503.04812, eq. 5)
    """

    own: float = 0.0  # of a query's own negatives
    in_batch: float = 0.0  # of all others


class Pools(NamedTuple):
    """A partition of queries and passages, in which a query's negatives are passages of its own pool."""

    rows: Tensor  # [B] int64: the pool of each query
    ids: Tensor  # [n] int64, ascending: ids of passages, among them all that are asked for
    of_ids: Tensor  # [n] int64: the pool of each

    def of_columns(self, passage_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The pools of the rows [B] and of the passages `passage_ids` [N]."""
        return self.rows, self.of_ids[torch.searchsorted(self.ids, passage_ids)]


def guide_vectors(vectors: Tensor) -> Tensor:
    """A guide's vectors [n, G] of any length as float16 unit vectors, rounded to multiples of 1/2048.

    A sum of their products is a multiple of 2⁻²² below 2, which float32 holds. So a similarity is exact in whichever
    order it is summed up, and no tile, block, rank or device changes whether a pair is excluded.
    """
    return (normalize(vectors.float(), dim=1) * _GUIDE_STEPS).round().div(_GUIDE_STEPS).half()
