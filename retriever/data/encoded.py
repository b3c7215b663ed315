"""Texts that the encoder cannot tell apart: the tokenizer and the length limits make them rows of equal tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retriever.checksums import write_checksums
from retriever.data.relations import Csr, Pairs, absent, keys_of_csr, of_queries, write_relations
from retriever.data.text_table import TokenRows, at
from retriever.files import replace_folder, write_json

MANIFEST, SAME_TEXT = "manifest.json", "same_text.npy"
_BLOCK_ROWS = 1 << 15
_THREADS = 4


class EqualRows(NamedTuple):
    """Row of a store -> the first row with the same tokens: of queries [Q] int64 and of passages [N] int64."""

    queries: np.ndarray
    passages: np.ndarray

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of queries and passages that equal an earlier one."""
        return {name: int((rows != np.arange(len(rows))).sum()) for name, rows in self._asdict().items()}


def write_encoded(folder: Path, equal: EqualRows, relations: Mapping[str, tuple[Csr, np.ndarray | None]]) -> None:
    """Writes the relations (positives, known, negatives; with scores) of a store with equal passages as one passage.

    Queries that are equal share what they know: the row of the first holds it all. Where no row is equal to another,
    only that is written.
    """
    with replace_folder(folder) as building:
        if any(equal.counts.values()):
            found = {
                name: Pairs.distinct(keys_of_csr(rows, equal.passages), scores)
                for name, (rows, scores) in relations.items()
            }
            known = Pairs.distinct(of_queries(found["known"].keys, equal.queries), None)
            negatives = found["negatives"].kept(absent(of_queries(found["negatives"].keys, equal.queries), known.keys))
            write_relations(building, len(equal.queries), found["positives"], known, negatives)
            np.save(building / SAME_TEXT, equal.queries, allow_pickle=False)
        write_json(building / MANIFEST, equal.counts)
        write_checksums(building)


def first_of_equal(texts: TokenRows, room: int | np.ndarray, *, keep_end: bool) -> np.ndarray:
    """For each of n texts, the row of the first text with the same tokens once both are cut to `room`, one for all or
    one for each: [n] int64.

    The cut keeps the first tokens, or with `keep_end` the last. Exact: rows are grouped by a 64-bit hash, then compared
    within a group.
    """
    hashes = row_hashes(texts, np.arange(len(texts)), room, keep_end=keep_end)
    order = np.argsort(hashes, kind="stable")  # [n]: equal ones stay in their order
    new = np.ones(len(order), bool)
    new[1:] = hashes[order[1:]] != hashes[order[:-1]]
    first = np.empty(len(order), np.int64)
    first[order] = order[new][np.cumsum(new) - 1]
    for rows in _blocks(np.flatnonzero(first != np.arange(len(first)))):
        gathered = (texts.gather(of, at(room, of), keep_end=keep_end) for of in (rows, first[rows]))
        mine, theirs = (np.split(tokens, np.cumsum(counts)[:-1]) for tokens, counts in gathered)
        equal = [np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True)]
        first[rows] = np.where(equal, first[rows], rows)
    return first


def row_hashes(texts: TokenRows, rows: np.ndarray, room: int | np.ndarray, *, keep_end: bool = False) -> np.ndarray:
    """A hash of each of `rows` [n] of `texts`, cut to `room`, one for all or one for each text: [n] uint64."""

    def hashed(rows: np.ndarray) -> np.ndarray:
        return _hashes(*texts.gather(rows, at(room, rows), keep_end=keep_end))

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="hash") as pool:
        return np.concatenate([np.empty(0, np.uint64), *pool.map(hashed, _blocks(rows))])


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[start : start + _BLOCK_ROWS] for start in range(0, len(rows), _BLOCK_ROWS))


def _hashes(tokens: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[n] uint64: the sum, over the tokens of each row, of a hash of token and position."""
    ends = np.cumsum(counts)
    position = np.arange(len(tokens), dtype=np.uint64) - np.repeat(ends - counts, counts).astype(np.uint64)
    mixed = tokens.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + (position + np.uint64(1)) * np.uint64(
        0xD1B54A32D192ED03
    )
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    sums = np.zeros(len(tokens) + 1, np.uint64)
    np.cumsum(mixed ^ (mixed >> np.uint64(31)), out=sums[1:])
    return sums[ends] - sums[ends - counts] + counts.astype(np.uint64)
