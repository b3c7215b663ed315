"""Chunks: every row once, within the budget, the same at every pass; prepared a few ahead by a thread that ends."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever.data.chunks import Chunk, Chunking, Chunks, plan_chunks
from retriever.data.layout import Packed, Padded, pack_rows, pad_rows
from retriever.data.text_table import TokenRows
from retriever.data.tokens import TokenTemplate, tokenize_flat
from tests.tiny import random_texts, tiny_tokenizer

TEXTS = [*random_texts(40, longest=50, seed=9), "", "ocean " * 80]
CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 40), max_size=60)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(40, 200))
def test_a_plan_covers_every_row_once_within_the_budget_longest_first(lengths: list[int], budget: int) -> None:
    """The chunks are a permutation of all rows; rows × longest ≤ budget; lengths descend; no chunk could take its
    successor's first row.
    """
    array = np.array(lengths, dtype=np.int64)
    plan = plan_chunks(array, budget)
    rows = [int(row) for part in plan for row in part]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    assert all(len(part) * array[part].max() <= budget for part in plan)
    assert all((len(part) + 1) * array[part].max() > budget for part in plan[:-1])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(40, 300))
def test_packed_chunks_share_the_tokens_evenly(lengths: list[int], budget: int) -> None:
    """Every row once, longest first, within the budget; no more chunks than filled one by one; none but the last below
    its share.
    """
    array = np.array(lengths, dtype=np.int64)
    plan = plan_chunks(array, budget, packed=True)
    rows = [int(row) for part in plan for row in part]
    assert sorted(rows) == list(range(len(lengths))) and [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    sizes, fewest = [int(array[part].sum()) for part in plan], -(-sum(lengths) // budget)
    assert max(sizes) <= budget
    filled, fullest = 1, 0
    for length in sorted(lengths, reverse=True):
        filled, fullest = (filled + 1, length) if fullest + length > budget else (filled, fullest + length)
    assert fewest <= len(plan) <= filled
    if sum(lengths) // fewest + max(lengths) <= budget:  # there is room to share evenly
        assert len(plan) == fewest and all(size > sum(lengths) // fewest for size in sizes[:-1])


def test_a_batch_a_little_larger_than_a_chunk_makes_two_of_a_size() -> None:
    plan = plan_chunks(np.full(780, 100), 65_536, packed=True)
    assert [len(part) for part in plan] == [391, 389]


def test_a_text_longer_than_the_budget_is_refused() -> None:
    """The message names the key, the budget and the length."""
    with pytest.raises(ValueError, match="batch.tokens_per_chunk=40 .* 41 tokens"):
        plan_chunks(np.array([3, 41]), 40)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(5, 99), min_size=1, max_size=9), min_size=1, max_size=8), st.sampled_from([0, 1, 7])
)
def test_padding_keeps_every_token_and_marks_the_rest(rows: list[list[int]], pad_id: int) -> None:
    """The mask recovers the rows, all else is the padding token, the width is the longest row's."""
    padded = pad_rows([np.array(row) for row in rows], pad_id)
    ids, mask = padded.input_ids, padded.attention_mask
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows))) and ids.dtype == mask.dtype == torch.int64
    assert [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)] == rows
    assert torch.all(ids[mask == 0] == pad_id)
    assert torch.all(mask.diff(dim=1) <= 0), "padding stands on the right"


def test_packed_texts_stand_one_behind_another() -> None:
    """An empty one too; positions count from 0 in each."""
    packed = pack_rows([np.array([7, 9]), np.empty(0, np.int64), np.array([5])])
    assert packed.input_ids.tolist() == [7, 9, 5] and packed.positions.tolist() == [0, 1, 0]
    assert packed.starts.tolist() == [0, 2, 2, 3] and packed.longest == 2 and len(packed) == 3
    dtypes = packed.input_ids.dtype, packed.positions.dtype, packed.starts.dtype
    assert dtypes == (torch.int64, torch.int64, torch.int32)
    nothing = pack_rows([])
    assert len(nothing) == len(nothing.input_ids) == nothing.longest == 0 and nothing.starts.tolist() == [0]


def _builders(count: int, built: list[int], fail_at: int | None = None) -> list[Callable[[], Chunk]]:
    def build(i: int) -> Chunk:
        if i == fail_at:
            raise OSError(f"chunk {i} cannot be read")
        built.append(i)
        return Chunk("query", torch.tensor([i]), Padded(torch.full((1, 2), i), torch.ones(1, 2, dtype=torch.int64)))

    return [lambda i=i: build(i) for i in range(count)]  # type: ignore[misc]


def _threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("chunks")]


def test_chunks_come_in_order_at_every_pass() -> None:
    """Iterating twice gives the same chunks in the same order, and no thread stays."""
    chunks = Chunks(_builders(11, []), CPU)
    for _ in range(2):
        assert [int(chunk.rows) for chunk in chunks] == list(range(11)) and len(chunks) == 11
    assert not _threads()


def test_only_a_few_chunks_are_prepared_ahead() -> None:
    """Data memory does not grow with the batch: builders are called at most a handful before their turn."""
    built: list[int] = []
    for taken, _ in enumerate(Chunks(_builders(60, built), CPU), start=1):
        threading.Event().wait(0.002)  # lets the thread run as far ahead as it will
        assert len(built) <= taken + 10
    assert len(built) == 60


@pytest.mark.parametrize("fail_at", [0, 3, 29])
def test_an_error_in_the_thread_is_raised_at_the_reader(fail_at: int) -> None:
    """The reader gets the chunks before the failing one, then the builder's own exception; nothing hangs, no thread
    stays.
    """
    read = []
    with pytest.raises(OSError, match=f"chunk {fail_at} cannot be read"):
        for chunk in Chunks(_builders(30, [], fail_at), CPU):
            read.append(int(chunk.rows))
    assert read == list(range(fail_at))
    assert not _threads()


def test_a_later_start_leaves_the_first_chunks_unbuilt() -> None:
    built: list[int] = []
    chunks = Chunks(_builders(11, built), CPU)
    assert [int(chunk.rows) for chunk in chunks.starting_at(7)] == [7, 8, 9, 10] and sorted(built) == [7, 8, 9, 10]
    assert list(chunks.starting_at(11)) == [] and not _threads()


def test_prefetched_chunks_are_taken_once_or_dropped() -> None:
    """The first iteration takes them, a later start or `close` drops them; no chunk is lost or doubled, no thread
    stays.
    """
    built: list[int] = []
    chunks = Chunks(_builders(20, built), CPU)
    for _ in range(2):
        chunks.prefetch()
        chunks.prefetch()
        assert len(built) <= 10
        assert [int(chunk.rows) for chunk in chunks] == list(range(20)) and len(built) == 20
        built.clear()
    chunks.prefetch()
    assert [int(chunk.rows) for chunk in chunks.starting_at(18)] == [18, 19]
    chunks.prefetch()
    chunks.close()
    chunks.close()
    assert not _threads() and [int(chunk.rows) for chunk in chunks] == list(range(20))


def test_leaving_the_loop_early_ends_the_thread() -> None:
    """By break or by an exception in the loop's body, the thread stops and the remaining chunks are never built."""
    built: list[int] = []
    for _ in Chunks(_builders(1000, built), CPU):
        break
    assert not _threads() and len(built) < 10
    with pytest.raises(ZeroDivisionError):
        for _ in Chunks(_builders(1000, built), CPU):
            raise ZeroDivisionError
    assert not _threads() and len(built) < 20


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_chunks_hold_every_text_once_as_the_tokenizer_gives_it(packed: bool, side: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.truncation_side = side
    tokens, counts = tokenize_flat(tokenizer, TEXTS)
    table = TokenRows(tokens, np.concatenate([[0], counts]).cumsum())
    rows = np.array([41, 3, 40, *range(10, 30), 3])
    chunking = Chunking("passage", table, TokenTemplate.from_tokenizer(tokenizer), 30, 100, packed)
    builders = chunking.builders(rows)
    found: dict[int, list[int]] = {}
    for chunk in (build() for build in builders):
        laid = chunk.tokens
        assert chunk.side == "passage" and len(laid) == len(chunk.rows) and laid.input_ids.numel() <= 100
        if isinstance(laid, Packed):
            texts = [laid.input_ids[a:b].tolist() for a, b in zip(laid.starts[:-1], laid.starts[1:], strict=True)]
            assert laid.longest == max(map(len, texts))
        else:
            texts = [row[mask.bool()].tolist() for row, mask in zip(laid.input_ids, laid.attention_mask, strict=True)]
        found |= dict(zip(chunk.rows.tolist(), texts, strict=True))
    assert isinstance(laid, Packed) == packed and len(builders) > 3
    expected = tokenizer([TEXTS[row] for row in rows], truncation=True, max_length=30)["input_ids"]
    assert [found[position] for position in range(len(rows))] == expected
    assert sum(len(text) for text in expected) == sum(map(len, found.values()))
