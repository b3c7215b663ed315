"""Queries that a run won and lost: those whose first relevant passage moved most since the run's first evaluation."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.evaluate import EvalResult
from retriever.files import read_json, write_json

MOST = 10  # queries won, and lost
_CHARACTERS = 400  # of a passage
_MOST_PASSAGES = 1_000_000  # of a corpus that is read for their texts


@dataclass(frozen=True)
class Examples:
    """Keeps the ranks of a run's first evaluation in `file`, and beside them the queries that moved most since."""

    file: Path
    title: Literal["join", "drop"]
    separator: str

    def add(self, step: int, result: EvalResult) -> None:
        """Compares an evaluation with the first one; one of the first one's step, or before it, becomes the first."""
        ranks = first_relevant(result)
        found: dict[str, Any] = read_json(self.file) if self.file.exists() else {}
        if found.get("collection") != result.collection.name or step <= found["before"]:
            write_json(self.file, {"collection": result.collection.name, "before": step, "ranks": ranks})
            return
        moved = {query: _gain(found["ranks"].get(query), rank) for query, rank in ranks.items()}
        won = [query for query in heapq.nlargest(MOST, moved, key=moved.__getitem__) if moved[query] > 0]
        lost = [query for query in heapq.nsmallest(MOST, moved, key=moved.__getitem__) if moved[query] < 0]
        passages = {query: _passages(result, query) for query in (*won, *lost)}
        texts = self._texts(result, {id_ for ids in passages.values() for id_ in ids})
        told = {
            query: {
                "query": result.collection.queries[query][:_CHARACTERS],
                "before": found["ranks"].get(query),
                "after": ranks[query],
                "relevant": texts[relevant],
                "first": texts[first],
            }
            for query, (relevant, first) in passages.items()
        }
        compared = {"after": step, "won": [told[query] for query in won], "lost": [told[query] for query in lost]}
        write_json(self.file, found | compared)

    def _texts(self, result: EvalResult, ids: Iterable[str]) -> dict[str, str]:
        """The beginnings of passages by id; of a large corpus the ids."""
        texts = {id_: id_ for id_ in ids}
        if texts and (result.n_passages or 0) <= _MOST_PASSAGES:
            for id_, text in result.collection.passages(self.title, self.separator):
                if id_ in texts:
                    texts[id_] = text[:_CHARACTERS]
        return texts


def first_relevant(result: EvalResult) -> dict[str, int | None]:
    """Query -> rank, from 1, of its first relevant passage; None where none was found."""
    return {query: _rank_of_first(result, query) for query in result.collection.qrels}


def _rank_of_first(result: EvalResult, query: str) -> int | None:
    relevant = _relevant(result, query)
    return next((rank for rank, id_ in enumerate(_ranked(result, query), start=1) if id_ in relevant), None)


def _ranked(result: EvalResult, query: str) -> list[str]:
    return result.run[query].passage_ids if query in result.run else []


def _relevant(result: EvalResult, query: str) -> Mapping[str, int]:
    least = result.collection.relevance
    return {id_: grade for id_, grade in result.collection.qrels[query].items() if grade >= least}


def _gain(before: int | None, after: int | None) -> float:
    """The difference of reciprocal ranks."""
    return (1 / after if after else 0.0) - (1 / before if before else 0.0)


def _passages(result: EvalResult, query: str) -> tuple[str, str]:
    """The first relevant passage of a query in the ranking, or else any, and the passage that stands first."""
    ranked, rank = _ranked(result, query), _rank_of_first(result, query)
    relevant = ranked[rank - 1] if rank is not None else next(iter(_relevant(result, query)))
    return relevant, ranked[0] if ranked else relevant
