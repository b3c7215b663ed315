"""Run files: order, round trips, and what is said of malformed lines."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.trec import ranking, read_msmarco, read_run, read_trec, write_msmarco, write_trec
from retriever.data.records import DataError


def test_equal_float32_scores_are_ordered_by_descending_id() -> None:
    found = ranking(["9", "10", "b", "é", "a"], [0.5, 0.5 + 1e-9, 0.5, 0.5, 0.75])
    assert found.passage_ids == ["a", "é", "b", "9", "10"]
    assert found.scores.dtype == np.float32


@settings(max_examples=100, deadline=None)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), gz=st.booleans())
def test_float32_scores_read_back_bitwise(tmp_path_factory: pytest.TempPathFactory, bits: list[int], gz: bool) -> None:
    scores = np.array(bits, dtype=np.uint32).view(np.float32)
    scores = scores[~np.isnan(scores)]
    run = {"q": ranking([f"p{i}" for i in range(len(scores))], scores)} if len(scores) else {}
    path = tmp_path_factory.mktemp("run") / ("run.trec.gz" if gz else "run.trec")
    write_trec(path, run)
    back = read_trec(path)
    assert back.keys() == run.keys()
    for query_id in run:
        assert back[query_id].passage_ids == run[query_id].passage_ids
        assert back[query_id].scores.tobytes() == run[query_id].scores.tobytes()


def test_files_hold_the_fields_of_their_format(tmp_path: Path) -> None:
    run = {"q1": ranking(["b", "a"], [2.0, 0.1]), "q2": ranking(["c"], [-1.5])}
    write_trec(tmp_path / "run.trec", run)
    lines = ["q1 Q0 b 1 2 bigbatch", "q1 Q0 a 2 0.100000001 bigbatch", "q2 Q0 c 1 -1.5 bigbatch"]
    assert (tmp_path / "run.trec").read_text().splitlines() == lines
    write_msmarco(tmp_path / "run.tsv.gz", run)
    assert gzip.decompress((tmp_path / "run.tsv.gz").read_bytes()) == b"q1\tb\t1\nq1\ta\t2\nq2\tc\t1\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.trec", "run.tsv.gz"]


def test_an_msmarco_run_is_ordered_by_its_ranks(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    path.write_text("q\tm\t3\nq\tz\t2\nq\ta\t1\n")
    assert read_msmarco(path)["q"].passage_ids == ["a", "z", "m"]
    assert read_run(path)["q"].passage_ids == ["a", "z", "m"]


def test_a_trec_run_is_ordered_by_its_scores_and_not_its_ranks(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    path.write_text("# a comment\nq Q0 a 1 0.5 tag\n\nq\tQ0\tb\t2\t1e0\ttag and more\n")
    assert read_run(path)["q"].passage_ids == ["b", "a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q\ta\n", "2 fields; expected 3"),
        ("q\ta\t1.5\n", "rank '1.5'"),
        ("q\tfirst\t2\n", "passage 'first' of query 'q' stands twice"),
    ],
)
def test_a_malformed_line_of_an_msmarco_run_is_named(tmp_path: Path, line: str, message: str) -> None:
    """tests/malformed has more of both formats."""
    path = tmp_path / "run"
    path.write_text("q\tfirst\t1\n" + line)
    with pytest.raises(DataError, match=f"run, line 2: {message}"):
        read_msmarco(path)


@pytest.mark.parametrize("bad", ["with space", "tab\t", ""])
def test_ids_the_format_cannot_hold_leave_no_file(tmp_path: Path, bad: str) -> None:
    for run in ({bad: ranking(["a"], [1.0])}, {"q": ranking(["a", bad], [1.0, 0.5])}):
        for write in (write_trec, write_msmarco):
            with pytest.raises(ValueError, match="white space"):
                write(tmp_path / "run", run)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("passages", "scores", "message"),
    [
        (["a", "b", "a"], [1, 2, 3], "passage 'a' stands twice"),
        (["a", "b"], [1.0, float("nan")], "passage 'b' has the score NaN"),
        (["a", "b"], [1.0], "2 passage ids but 1 scores"),
    ],
)
def test_a_ranking_needs_numbers_and_distinct_passages(passages: list[str], scores: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranking(passages, scores)
