"""The k best passages of each query so far, in one 8-byte key a passage whose order is trec_eval's.

A key's upper 32 bits are the float32 score, its bits rearranged so that a higher score is a larger number; its lower 32
bits fall with the passage's precedence among all passages when sorted by id descending. Sorting keys descending
therefore sorts by score and breaks ties by id descending, and merging two result lists is a sort of numbers, whatever
shard or block they came from.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from retriever.data.records import DataError
from retriever.errors import RefusedError
from retriever.parallel.world import World

_EMPTY = -(2**63)  # sorts behind every passage
_LOW = 0xFFFF_FFFF
_CPU = torch.device("cpu")


class PassageOrder:
    """All passages' precedence in a tie: position in the collection -> precedence, 0 for the greatest id (UTF-8 byte
    order).
    """

    def __init__(self, passage_ids: pa.LargeStringArray) -> None:
        """`passage_ids`: [N] in the collection's order. Raises DataError for a repeated id, RefusedError where N >=
        2^32 - 1.
        """
        if len(passage_ids) >= 2**32 - 1:
            raise RefusedError(f"{len(passage_ids)} passages: expected fewer than 2^32 - 1 in one search")
        order = pc.array_sort_indices(passage_ids, order="descending")  # [N]
        self._ids = passage_ids.take(order)  # [N], greatest id first
        if len(self._ids) > 1 and (same := pc.equal(self._ids[1:], self._ids[:-1])).true_count:
            twice = self._ids[pc.index(same, True).as_py()].as_py()
            raise DataError(f"passage id {twice!r} stands twice in the collection: expected each id once")
        self.precedence = torch.empty(len(passage_ids), dtype=torch.int64)  # [N]
        self.precedence[order.to_numpy().astype(np.int64)] = torch.arange(len(passage_ids))

    def ids(self, precedence: np.ndarray) -> np.ndarray:
        """The ids [n] (object) of passages given by precedence [n]; equal ids are one string object."""
        distinct, inverse = np.unique(precedence, return_inverse=True)
        return np.array(self._ids.take(pa.array(distinct)).to_pylist(), dtype=object)[inverse]


class TopK:
    """The k best passages of each of n queries; `merge` adds candidates, `row` reads the result."""

    def __init__(self, n_queries: int, k: int, device: torch.device = _CPU) -> None:
        """Holds no passage yet."""
        self._keys = torch.full((n_queries, k), _EMPTY, dtype=torch.int64, device=device)  # rows descending

    def worst_scores(self, queries: slice) -> Tensor:
        """The k-th best score of each query of the slice, float32; -inf where there are fewer than k passages so
        far.
        """
        return _scores_of(self._keys[queries, -1])

    def merge(self, queries: slice | np.ndarray, rows: Tensor, scores: Tensor, precedence: Tensor) -> None:
        """Adds candidates in flat form: `rows` [P] int64, ascending, places in `queries`; scores [P] float32;
        precedence [P].
        """
        best = self._keys[queries]  # [q, k]
        counts = rows.bincount(minlength=len(best))
        # place of a candidate in its row
        columns = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        most = int(counts.max()) if len(rows) else 0
        candidates = torch.full((len(best), most), _EMPTY, dtype=torch.int64, device=rows.device)  # [q, m]
        candidates[rows, columns] = _keys_of(scores, precedence)
        merged = torch.cat([best, candidates], dim=1).sort(dim=1, descending=True).values  # [q, k + m]
        self._keys[queries] = merged[:, : best.shape[1]]

    def gather(self, world: World) -> None:
        """Keeps the k best of all ranks' k best, in host memory. Every rank calls it."""
        if world.size > 1:
            every = world.gather_rows(self._keys).rows.view(world.size, *self._keys.shape)
            merged = every.transpose(0, 1).flatten(1).sort(dim=1, descending=True).values
            self._keys = merged[:, : self._keys.shape[1]]
        self._keys = self._keys.cpu()

    def row(self, query: int) -> tuple[np.ndarray, np.ndarray]:
        """(precedence [n] int64, scores [n] float32) of one query's passages, best first, n <= k."""
        keys = self._keys[query]
        keys = keys[keys != _EMPTY]
        return (_LOW - (keys & _LOW)).numpy(), _scores_of(keys).numpy()


def _keys_of(scores: Tensor, precedence: Tensor) -> Tensor:
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 one score
    return torch.where(bits < 0, bits ^ 0x7FFF_FFFF, bits).long() << 32 | (_LOW - precedence)


def _scores_of(keys: Tensor) -> Tensor:
    """The float32 scores of keys, -inf for an empty place."""
    bits = (keys >> 32).int()
    return torch.where(bits < 0, bits ^ 0x7FFF_FFFF, bits).view(torch.float32).masked_fill(keys == _EMPTY, -torch.inf)
