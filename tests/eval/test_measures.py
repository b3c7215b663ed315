"""Measures against trec_eval's own expected outputs, pytrec_eval on random runs, and hand-made cases."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.measures import Scores, measure_run, parse_measure
from eval.trec import Ranking, ranking, read_trec

DATA = Path(os.environ.get("BIGBATCH_TEST_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
TREC_EVAL = DATA / "trec_eval" / "test"
needs_trec_eval = pytest.mark.skipif(
    not TREC_EVAL.is_dir(), reason=f"no trec_eval test files in {TREC_EVAL}: set BIGBATCH_TEST_DATA"
)

# Our names of what trec_eval prints; a trailing number is the cutoff.
NAMES = {
    "map": "MAP",
    "map_cut": "MAP@",
    "recip_rank": "MRR",
    "ndcg": "nDCG",
    "ndcg_cut": "nDCG@",
    "P": "P@",
    "recall": "Recall@",
    "set_recall": "Recall",
    "success": "Success@",
    "Rprec": "Rprec",
}


def our_name(measure: str) -> str | None:
    family, _, number = measure.rpartition("_")
    return NAMES[family] + number if number.isdigit() and family in NAMES else NAMES.get(measure)


def read_qrels_file(path: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            query_id, _, passage_id, grade = line.split()
            qrels.setdefault(query_id, {})[passage_id] = int(grade)
    return qrels


def expected_values(path: Path) -> dict[tuple[str, str], float]:
    """(our measure name, query id or "all") -> the value trec_eval printed with four decimals."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {(name, row[1]): float(row[2]) for row in rows if len(row) == 3 and (name := our_name(row[0]))}


# file of expected values, run, qrels, relevance, passages kept of each ranking, values expected: what trec_eval's own
# test suite runs.
TREC_EVAL_CASES = [
    ("out.test", "results.test", "qrels.test", 1, None, 12),
    ("out.test.a", "results.test", "qrels.test", 1, None, 44),
    ("out.test.aq", "results.test", "qrels.test", 1, None, 176),
    ("out.test.aqc", "results.trunc", "qrels.test", 1, None, 176),
    ("out.test.aqcM", "results.trunc", "qrels.test", 1, 100, 176),
    ("out.test.aql", "results.test", "qrels.rel_level", 2, None, 176),
    ("out.test.meas_params", "results.test", "qrels.test", 1, None, 44),
    ("out.comment.test", "results.comment.test", "qrels.comment.test", 1, None, 12),
]


@needs_trec_eval
@pytest.mark.parametrize(("expected", "run", "qrels", "relevance", "kept", "count"), TREC_EVAL_CASES)
def test_equals_every_value_trec_eval_expects(
    expected: str, run: str, qrels: str, relevance: int, kept: int | None, count: int
) -> None:
    found = {
        query_id: Ranking(r.passage_ids[:kept], r.scores[:kept]) for query_id, r in read_trec(TREC_EVAL / run).items()
    }
    values = expected_values(TREC_EVAL / expected)
    assert len(values) == count
    judged = read_qrels_file(TREC_EVAL / qrels)
    if expected == "out.comment.test":  # trec_eval's default mean: over the queries the run has
        judged = {query_id: grades for query_id, grades in judged.items() if query_id in found}
        assert len(judged) == 31
    scores = measure_run(judged, found, sorted({name for name, _ in values}), relevance)
    for (name, query_id), value in values.items():
        ours = scores.means[name] if query_id == "all" else scores.per_query[name][scores.query_ids.index(query_id)]
        assert f"{ours:.4f}" == f"{value:.4f}", (name, query_id)


GRADES = st.dictionaries(st.sampled_from([f"d{i}" for i in range(12)]), st.integers(-1, 3), max_size=12)
# Scores that are equal only as float32, equal outright, and negative zero.
SCORE = st.sampled_from([0.5, 0.5 + 1e-9, 0.25, 1.0, -1.0, 0.0, -0.0, 16777216.0, 16777217.0])
HITS = st.dictionaries(st.sampled_from([f"d{i}" for i in range(16)]), SCORE, max_size=16)


@settings(max_examples=150, deadline=None)
@given(
    # trec_eval never returns where all of a query's grades are negative; test_negative_grades covers that.
    qrels=st.dictionaries(
        st.sampled_from("abcd"), GRADES.filter(lambda grades: max(grades.values(), default=-1) >= 0), min_size=1
    ),
    hits=st.dictionaries(st.sampled_from("abcdef"), HITS.filter(bool)),
    relevance=st.integers(1, 3),
)
def test_equals_pytrec_eval_with_ties_missing_and_extra_queries(qrels: dict, hits: dict, relevance: int) -> None:
    names = {
        "map": "MAP",
        "map_cut_3": "MAP@3",
        "recip_rank": "MRR",
        "ndcg": "nDCG",
        "ndcg_cut_5": "nDCG@5",
        "P_5": "P@5",
        "recall_3": "Recall@3",
        "success_2": "Success@2",
        "Rprec": "Rprec",
    }
    oracle = pytrec_eval.RelevanceEvaluator(
        qrels,
        {"map", "map_cut.3", "recip_rank", "ndcg", "ndcg_cut.5", "P.5", "recall.3", "success.2", "Rprec"},
        relevance_level=relevance,
    ).evaluate(hits)
    run = {query_id: ranking(list(scores), list(scores.values())) for query_id, scores in hits.items()}
    ours = measure_run(qrels, run, list(names.values()), relevance)
    assert set(ours.query_ids) == set(qrels)
    for theirs, name in names.items():
        wanted = [oracle[query_id][theirs] if query_id in hits else 0.0 for query_id in ours.query_ids]
        np.testing.assert_allclose(ours.per_query[name], wanted, rtol=0, atol=1e-12, err_msg=name)
        assert ours.means[name] == pytest.approx(sum(wanted) / len(qrels), abs=1e-12)  # over all judged queries


def scores_of(
    qrels: dict[str, dict[str, int]], run: dict[str, list[str]], *measures: str, relevance: int = 1
) -> Scores:
    rankings = {q: ranking(ids, list(range(len(ids), 0, -1))) for q, ids in run.items()}
    return measure_run(qrels, rankings, measures, relevance)


def test_mrr_counts_only_the_first_k_and_queries_without_hits() -> None:
    qrels = {"at 10": {"x": 1}, "at 11": {"x": 1}, "absent": {"x": 1}, "at 2 and 3": {"x": 1, "y": 1}}
    others = [f"other{i}" for i in range(20)]
    run = {
        "at 10": [*others[:9], "x"],
        "at 11": [*others[:10], "x"],
        "at 2 and 3": ["other", "y", "x"],
        "unjudged": ["x"],
    }
    scores = scores_of(qrels, run, "MRR@10", "MRR")
    assert scores.per_query["MRR@10"].tolist() == [0.1, 0, 0, 0.5]
    assert scores.means["MRR@10"] == pytest.approx(0.6 / 4)
    assert scores.means["MRR"] == pytest.approx((0.6 + 1 / 11) / 4)


def test_negative_grades_count_nothing_anywhere() -> None:
    plain = scores_of({"q": {"a": 2, "b": 0}}, {"q": ["b", "a"]}, "nDCG@10", "MAP", "Recall@1", "P@2")
    coded = scores_of({"q": {"a": 2, "b": -1}}, {"q": ["b", "a"]}, "nDCG@10", "MAP", "Recall@1", "P@2")
    assert plain.means == coded.means
    assert plain.means["nDCG@10"] == pytest.approx(1 / np.log2(3))
    assert scores_of({"q": {"a": -1}}, {"q": ["a"]}, "nDCG", "MAP", "Recall", "MRR").means == dict.fromkeys(
        ["nDCG", "MAP", "Recall", "MRR"], 0.0
    )


@pytest.mark.parametrize(
    ("given", "name"), [("ndcg@10", "nDCG@10"), (" MRR@10 ", "MRR@10"), ("map", "MAP"), ("RECALL@100", "Recall@100")]
)
def test_names_are_read_whatever_their_capitals(given: str, name: str) -> None:
    assert str(parse_measure(given)) == name


@pytest.mark.parametrize("name", ["nDCG@0", "nDCG@", "nDCG@-1", "F1", "P", "Success", "Rprec@5", "", "MRR10"])
def test_unknown_names_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="measure '"):
        parse_measure(name)


def test_nothing_to_average_and_a_relevance_of_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="no queries"):
        measure_run({}, {}, ["MAP"])
    with pytest.raises(ValueError, match="relevance 0"):
        measure_run({"q": {"a": 1}}, {}, ["MAP"], relevance=0)
