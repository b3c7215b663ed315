"""Pairs collected in any order, with repetitions, by reference or by row, equal sets of pairs kept in plain
dictionaries.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retriever.data import relations
from retriever.data.relations import REFERENCE, PairBuffer, absent, csr_of_keys

QUERIES, REFERENCES, ROWS = 5, 6, 2**31 - 1  # rows up to the largest that a store may have
PASSAGES = st.one_of(st.integers(0, REFERENCES - 1).map(lambda r: REFERENCE | r), st.integers(0, 3), st.just(ROWS))
EXTENSIONS = st.lists(st.tuples(st.integers(0, QUERIES - 1), st.lists(PASSAGES, max_size=4)), max_size=20)


@pytest.mark.parametrize("compact_pairs", [0, 3, 1 << 22])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extensions=EXTENSIONS, scored=st.booleans())
def test_a_buffer_equals_sets(compact_pairs: int, extensions: list[tuple[int, list[int]]], scored: bool) -> None:
    query_rows = np.array([10, -1, 11, 12, 13])  # query 1 is left out
    passage_rows = np.array(
        [0, ROWS, 7, 7, 8, 2]
    )  # two references are one passage, two are rows that come without reference too
    buffer, expected = PairBuffer(), dict[tuple[int, int], float]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relations, "_COMPACT_PAIRS", compact_pairs)
        for number, (query, passages) in enumerate(extensions):
            buffer.extend(query, passages, [number + i / 8 for i in range(len(passages))] if scored else [])
            for i, passage in enumerate(passages):
                row = int(passage_rows[passage ^ REFERENCE]) if passage & REFERENCE else passage
                if query_rows[query] >= 0:
                    expected.setdefault((int(query_rows[query]), row), number + i / 8)
        pairs = buffer.resolved(query_rows, passage_rows)
    csr = csr_of_keys(pairs.keys, 14)
    assert [(q, int(p)) for q in range(14) for p in csr.row(q)] == sorted(expected)
    assert csr.ptr.dtype == csr.ids.dtype == np.int64 and len(csr.ptr) == 15
    if scored and any(passages for _, passages in extensions):
        assert pairs.scores is not None and pairs.scores.tolist() == [expected[pair] for pair in sorted(expected)]
    else:
        assert pairs.scores is None


@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)))
def test_absent_is_the_difference_of_sets(keys: set[int], excluded: set[int]) -> None:
    ordered = np.array(sorted(keys), np.int64)
    assert ordered[absent(ordered, np.array(sorted(excluded), np.int64))].tolist() == sorted(keys - excluded)
