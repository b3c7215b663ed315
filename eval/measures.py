"""Retrieval measures of a run against judgments (qrels), counted as trec_eval counts them.

Conventions: a passage's gain is its grade, negative grades count 0 and an unjudged passage is not relevant; a measure's
mean is over all judged queries, one without hits counting 0 (`trec_eval -c`); a run's order is its `Ranking`'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.trec import Run
from retriever.errors import RefusedError

Qrels = Mapping[str, Mapping[str, int]]  # query id -> passage id -> grade


@dataclass(frozen=True)
class Measure:
    """One measure: its family and how many of the best passages it looks at (None: all that were retrieved)."""

    family: str
    cutoff: int | None

    def __str__(self) -> str:
        return self.family if self.cutoff is None else f"{self.family}@{self.cutoff}"


@dataclass(frozen=True)
class Scores:
    """Each measure's value for each judged query: `per_query[name]` is [Q] float64 in the order of `query_ids`."""

    query_ids: tuple[str, ...]
    per_query: dict[str, np.ndarray]

    @property
    def means(self) -> dict[str, float]:
        """Measure name -> mean over all judged queries."""
        return {name: float(values.mean()) for name, values in self.per_query.items()}


@dataclass(frozen=True)
class _Judged:
    """A run beside its judgments, one row a judged query; columns past a row's end are 0."""

    gains: np.ndarray  # [Q, depth] float64: the gain of the passage at each rank
    relevant: np.ndarray  # [Q, depth] bool: its grade is at least the relevance level
    ideal_gains: np.ndarray  # [Q, R] float64: all positive gains, largest first
    n_relevant: np.ndarray  # [Q] int64: relevant passages there are


def parse_measure(name: str) -> Measure:
    """`nDCG@10`, `MRR@10`, `Recall@100`, `MAP`, `P@5`, `Success@5`, `Rprec` -> Measure; capitals do not matter.

    Raises RefusedError where the measure is unknown, or has no cutoff and needs one.
    """
    match = re.fullmatch(r"([A-Za-z]+)(?:@([1-9][0-9]*))?", name.strip())
    families = {family.lower(): family for family in _FAMILIES}
    family = families.get(match[1].lower()) if match else None
    if match is None or family is None:
        raise RefusedError(
            f"measure {name!r}: expected one of {', '.join(_FAMILIES)}, most with a cutoff, as in nDCG@10"
        )
    cutoff = int(match[2]) if match[2] else None
    if cutoff is None and family in ("P", "Success"):
        raise RefusedError(f"measure {name!r}: needs a cutoff, as in {family}@10")
    if cutoff is not None and family == "Rprec":
        raise RefusedError(
            f"measure {name!r}: Rprec has no cutoff, a query's number of relevant passages is its cutoff"
        )
    return Measure(family, cutoff)


def measure_run(qrels: Qrels, run: Run, measures: Sequence[str], relevance: int = 1) -> Scores:
    """The value of every measure for every judged query, in float64.

    `relevance` is the lowest grade that counts as relevant for the binary measures (MRR, MAP, Recall, P, Success,
    Rprec; 2 for TREC DL passages); nDCG uses the grades themselves. Queries of the run without judgments are ignored.
    Raises RefusedError for an unknown measure, a relevance below 1, or qrels without queries.
    """
    if relevance < 1:
        raise RefusedError(f"relevance {relevance}: expected a grade of at least 1, since grade 0 means not relevant")
    if not qrels:
        raise RefusedError("the qrels hold no queries: there is nothing to average over")
    parsed = [parse_measure(name) for name in measures]
    query_ids = tuple(qrels)
    judged = _judge(qrels, run, relevance)
    values = {str(measure): _FAMILIES[measure.family](judged, measure.cutoff) for measure in parsed}
    return Scores(query_ids, values)


def _judge(qrels: Qrels, run: Run, relevance: int) -> _Judged:
    depth = max((len(run[query_id].passage_ids) for query_id in qrels if query_id in run), default=0)
    most = max(sum(grade > 0 for grade in grades.values()) for grades in qrels.values())
    grades_at_rank = np.zeros((len(qrels), depth), dtype=np.int64)  # [Q, depth]
    ideal = np.zeros((len(qrels), most), dtype=np.int64)  # [Q, R]
    n_relevant = np.zeros(len(qrels), dtype=np.int64)  # [Q]
    for row, (query_id, grades) in enumerate(qrels.items()):
        if query_id in run:
            ranked = run[query_id].passage_ids
            grades_at_rank[row, : len(ranked)] = [grades.get(passage_id, 0) for passage_id in ranked]
        positive = sorted((grade for grade in grades.values() if grade > 0), reverse=True)
        ideal[row, : len(positive)] = positive
        n_relevant[row] = sum(grade >= relevance for grade in positive)
    gains = np.maximum(grades_at_rank, 0).astype(np.float64)
    return _Judged(gains, grades_at_rank >= relevance, ideal.astype(np.float64), n_relevant)


def _ndcg(judged: _Judged, cutoff: int | None) -> np.ndarray:
    """DCG@k / ideal DCG@k, DCG@k = Σ_{r<=k} gain_r / log2(r + 1). (Järvelin and Kekäläinen 2002, with trec_eval's
    discount)
    """
    return _ratio(_dcg(judged.gains[:, :cutoff]), _dcg(judged.ideal_gains[:, :cutoff]))


def _dcg(gains: np.ndarray) -> np.ndarray:
    return gains @ (1.0 / np.log2(np.arange(2, gains.shape[1] + 2)))  # [Q]


def _mrr(judged: _Judged, cutoff: int | None) -> np.ndarray:
    """1 / rank of the first relevant passage, 0 where none is among the first k."""
    relevant = judged.relevant[:, :cutoff]
    reciprocal = relevant / np.arange(1, relevant.shape[1] + 1)  # [Q, k]
    return reciprocal.max(axis=1, initial=0.0)


def _map(judged: _Judged, cutoff: int | None) -> np.ndarray:
    """Σ over relevant ranks r <= k of precision at r, divided by all relevant passages there are."""
    relevant = judged.relevant[:, :cutoff]
    precision = relevant.cumsum(axis=1) / np.arange(1, relevant.shape[1] + 1)  # [Q, k]
    return _ratio((precision * relevant).sum(axis=1), judged.n_relevant)


def _recall(judged: _Judged, cutoff: int | None) -> np.ndarray:
    """Relevant passages among the first k, divided by all relevant passages there are."""
    return _ratio(judged.relevant[:, :cutoff].sum(axis=1), judged.n_relevant)


def _precision(judged: _Judged, cutoff: int | None) -> np.ndarray:
    """Relevant passages among the first k, divided by k, however many were retrieved."""
    assert cutoff is not None  # parse_measure refuses P without a cutoff
    return judged.relevant[:, :cutoff].sum(axis=1) / cutoff


def _success(judged: _Judged, cutoff: int | None) -> np.ndarray:
    """1 where a relevant passage is among the first k, else 0."""
    return np.asarray(judged.relevant[:, :cutoff].any(axis=1), dtype=np.float64)


def _r_precision(judged: _Judged, cutoff: int | None) -> np.ndarray:
    """Precision at R, R being the query's number of relevant passages."""
    within = np.arange(judged.relevant.shape[1]) < judged.n_relevant[:, None]  # [Q, depth]
    return _ratio((judged.relevant & within).sum(axis=1), judged.n_relevant)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, 0 where the denominator is 0 (a query without relevant passages)."""
    quotient = np.zeros(len(numerator), dtype=np.float64)
    return np.divide(numerator, denominator, out=quotient, where=denominator > 0)


_FAMILIES: dict[str, Callable[[_Judged, int | None], np.ndarray]] = {
    "nDCG": _ndcg,
    "MRR": _mrr,
    "MAP": _map,
    "Recall": _recall,
    "P": _precision,
    "Success": _success,
    "Rprec": _r_precision,
}
