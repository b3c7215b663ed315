"""Runs: what a search returned for each query, and their TREC and MS MARCO files (`.gz` ones too).

A `Ranking` is in trec_eval's order: float32 score descending, equal scores by passage id descending (byte order),
whatever rank the file states. MS MARCO's files carry ranks and no scores: there the rank is the order.
"""

from __future__ import annotations

import gzip
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retriever.data.files import is_file
from retriever.data.lines import read_lines
from retriever.data.records import DataError, shown
from retriever.errors import RefusedError
from retriever.files import replace_file

TAG = "bigbatch"  # of the runs written here
TREC_LINE = "query-id Q0 passage-id rank score tag"
_RANK = re.compile(r"0*[1-9][0-9]{0,8}")
MSMARCO_LINE = "query-id<tab>passage-id<tab>rank"


class Ranking(NamedTuple):
    """One query's passages, best first, and their scores [n] float32, descending."""

    passage_ids: list[str]
    scores: np.ndarray

    def without(self, passage_id: str) -> Ranking:
        """The ranking without one of its passages."""
        place = self.passage_ids.index(passage_id)
        return Ranking([*self.passage_ids[:place], *self.passage_ids[place + 1 :]], np.delete(self.scores, place))


Run = Mapping[str, Ranking]  # query id -> ranking


def ranking(passage_ids: Sequence[str], scores: Sequence[float] | np.ndarray) -> Ranking:
    """The passages in trec_eval's order; `scores` are rounded to float32 first, as trec_eval reads them.

    Raises DataError where a passage comes twice, ValueError where a score is NaN or the lengths differ.
    """
    rounded = np.asarray(scores, dtype=np.float64).astype(np.float32)  # [n]
    if len(rounded) != len(passage_ids):
        raise ValueError(f"{len(passage_ids)} passage ids but {len(rounded)} scores: expected one score a passage")
    if len(set(passage_ids)) != len(passage_ids):
        twice = Counter(passage_ids).most_common(1)[0][0]
        raise DataError(f"passage {twice!r} stands twice in one ranking: expected each passage once")
    if np.isnan(rounded).any():
        raise RefusedError(
            f"passage {passage_ids[int(np.isnan(rounded).argmax())]!r} has the score NaN: expected a number"
        )
    # Python compares strings by code point, which is the byte order of UTF-8 that trec_eval's strcmp sees.
    by_id = sorted(range(len(passage_ids)), key=lambda i: passage_ids[i], reverse=True)
    order = np.array(by_id, dtype=np.int64)[np.argsort(-rounded[by_id], kind="stable")]  # [n]
    return Ranking([passage_ids[i] for i in order], rounded[order])


def write_trec(path: str | Path, run: Run) -> None:
    """`query-id Q0 passage-id rank score tag`, ranks from 1; a float32 score reads back to the same float32.

    Raises DataError where an id is empty or has white space in it, which the format cannot hold.
    """
    # 9 digits name a float32 uniquely
    _write(path, run, lambda query, passage, rank, score: f"{query} Q0 {passage} {rank} {score:.9g} {TAG}\n")


def write_msmarco(path: str | Path, run: Run) -> None:
    """`query-id<tab>passage-id<tab>rank`, ranks from 1. Raises as `write_trec`."""
    _write(path, run, lambda query, passage, rank, score: f"{query}\t{passage}\t{rank}\n")


def read_trec(path: str | Path) -> dict[str, Ranking]:
    """A TREC run file; the rank column is not used, what follows the score is the tag, lines starting with `#` are
    comments.

    Raises DataError naming file and line where a line is malformed or repeats a passage of its query.
    """
    found: dict[str, dict[str, float]] = {}
    for line, (query_id, _, passage_id, _, score, _) in _fields(path, 6, TREC_LINE):
        _add(found.setdefault(query_id, {}), passage_id, _number(score, path, line), query_id, path, line)
    return {query_id: ranking(list(passages), list(passages.values())) for query_id, passages in found.items()}


def read_msmarco(path: str | Path) -> dict[str, Ranking]:
    """An MS MARCO run file; a passage's score is minus its rank, so that its order is the file's ranks.

    Raises DataError naming file and line where a line is malformed, or a query repeats a passage or a rank, or leaves a
    rank out.
    """
    found: dict[str, dict[str, int]] = {}
    taken: dict[str, dict[int, str]] = {}
    for line, (query_id, passage_id, rank) in _fields(path, 3, MSMARCO_LINE):
        if not _RANK.fullmatch(rank):
            raise DataError(f"rank {shown(rank)}; expected a whole number from 1 on, of at most 9 digits", path, line)
        _add(found.setdefault(query_id, {}), passage_id, int(rank), query_id, path, line)
        _add(taken.setdefault(query_id, {}), int(rank), passage_id, query_id, path, line)
    run = {}
    for query_id, by_rank in taken.items():
        ids = [by_rank[rank] for rank in sorted(by_rank)]
        if absent := next((rank for rank in range(1, len(ids) + 1) if rank not in by_rank), None):
            expected = f"expected the ranks 1 to {len(ids)}"
            raise DataError(f"query {query_id!r} has no rank {absent} but a later one; {expected}", path)
        run[query_id] = Ranking(ids, -np.arange(1, len(ids) + 1, dtype=np.float32))
    return run


def read_run(path: str | Path) -> dict[str, Ranking]:
    """A run file of either kind, told apart by its first line's number of fields. Raises as the two readers."""
    for _, line in _numbered_lines(path):
        return read_msmarco(path) if len(line.split()) == 3 else read_trec(path)
    raise DataError(f"no lines; expected a run: {TREC_LINE}, or {MSMARCO_LINE}", path)


def _fields(path: str | Path, count: int, expected: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, its fields). The sixth field is the rest of the line."""
    for number, line in _numbered_lines(path):
        fields = line.split(maxsplit=5)
        if len(fields) != count:
            raise DataError(f"{len(fields)} fields; expected {count}: {expected}", path, number)
        yield number, fields


def _add(values: dict[Any, Any], key: str | int, value: object, query_id: str, path: str | Path, line: int) -> None:
    """Records one line of a query. Raises DataError for a repeated passage or rank."""
    if key in values:
        what = "passage" if isinstance(key, str) else "rank"
        raise DataError(f"{what} {key!r} of query {query_id!r} stands twice; expected once", path, line)
    values[key] = value


def _number(text: str, path: str | Path, line: int) -> float:
    try:
        value = float(text) if "_" not in text else math.nan  # Python reads 1_0 as 10
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"score {shown(text)}; expected a finite number, as in '{TREC_LINE}'", path, line)
    return value


def _numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    path = Path(path)
    if not is_file(path):
        raise DataError("no such file; expected a run", path)
    yield from ((number, line) for number, line in read_lines(path) if line.strip() and not line.startswith("#"))


def _require_words(words: Iterable[str], name: str) -> None:
    for word in words:
        if len(word.split()) != 1 or word != word.strip():
            raise DataError(
                f"{name} {word!r}: a run file separates its fields by white space; expected an id without any"
            )


def _write(path: str | Path, run: Run, line: Callable[[str, str, int, float], str]) -> None:
    _require_words(run, "query id")
    opened = gzip.open if Path(path).suffix == ".gz" else open
    with replace_file(Path(path)) as aside, opened(aside, "wt", encoding="utf-8") as file:
        for query_id, (passage_ids, scores) in run.items():
            _require_words(passage_ids, "passage id")
            ranked = enumerate(zip(passage_ids, scores.tolist(), strict=True), start=1)
            file.writelines(line(query_id, passage_id, rank, score) for rank, (passage_id, score) in ranked)
