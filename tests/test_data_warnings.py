"""Warnings about training data, on stores of known duplicates, unknown words and evaluation queries."""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from retriever.config import BatchConfig, Config, DataConfig, LossConfig, ModelConfig, SourceConfig
from retriever.data.planner import Planner
from retriever.data.relations import Csr
from retriever.data.store import build_or_open
from retriever.data.text_table import TokenRows
from retriever.data_warnings import data_warnings
from tests.tiny import random_texts, tiny_tokenizer

_TOKENIZER = tiny_tokenizer()
_TEXTS = random_texts(200, shortest=8, longest=16)
_PAIRS = [(text, text + " bridge") for text in _TEXTS]


def _warnings(
    folder: Path,
    pairs: Sequence[tuple[str, str]],
    queries: Sequence[str] = (),
    *,
    masked: bool = True,
    prompt: str = "find ",
) -> list[str]:
    with (folder / "pairs.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("anchor", "positive"), *pairs])
    config = Config(
        model=ModelConfig("m", query_prompt=prompt, query_max_tokens=512),
        data=DataConfig(train=(SourceConfig(path=str(folder / "pairs.csv")),), cache_dir=str(folder / "cache")),
        batch=BatchConfig(queries=50),
        loss=LossConfig(mask_known_positives=masked),
    )
    store = build_or_open(config, _TOKENIZER, progress=False)
    planner = Planner.from_config(store, config)
    return data_warnings(config, _TOKENIZER, store, planner, {"held out": queries} if queries else {})


@pytest.mark.parametrize(
    ("pairs", "queries", "masked", "said"),
    [
        ([*_PAIRS, *_PAIRS[:1]], ["a query of its own"], True, []),
        ([*_PAIRS, *_PAIRS[:20]], [], True, ["data.train: 9.1% of the pairs repeat an earlier pair; remove them"]),
        (
            [(query, _PAIRS[i % 4][1]) for i, query in enumerate(_TEXTS)],
            [],
            True,
            ["data.train: 100.0% of the queries of a batch share their text or positive with another query of it"],
        ),
        (
            [*_PAIRS, *((query, passage + " of its own") for query, passage in _PAIRS)],
            [],
            False,
            ["loss.mask_known_positives=false: "],
        ),
        (_PAIRS * 2, [], False, ["data.train: 50.0% of the pairs"]),  # a passage stands once in a batch
        (
            [(query, "ДВА 二 " + passage) for query, passage in _PAIRS],
            [],
            True,
            ["model.name_or_path=m: "],
        ),
        (
            _PAIRS,
            ["a river", _TEXTS[7].upper(), _TEXTS[90], "a sea"],
            True,
            [f"eval: 2 of 4 queries of held out are training queries too, first {_TEXTS[7].upper()[:60]!r}: "],
        ),
    ],
    ids=["good", "repeated", "shared", "unmasked", "one positive", "unknown", "leaked"],
)
def test_what_is_wrong_with_the_data_is_said(
    tmp_path: Path, pairs: Sequence[tuple[str, str]], queries: Sequence[str], masked: bool, said: Sequence[str]
) -> None:
    found = _warnings(tmp_path, pairs, queries, masked=masked)
    assert [text[: len(start)] for text, start in zip(found, said, strict=True)] == said
    if said and "m: " in said[0]:
        assert "of the tokens of the passages are unknown to its tokenizer ([UNK])" in found[0]


def test_a_long_prompt_makes_no_leak(tmp_path: Path) -> None:
    """Texts are compared behind it; one that is a training query is found."""
    found = _warnings(tmp_path, _PAIRS, ["a query of its own"], prompt="find a river " * 40)
    assert found == []
    (said,) = _warnings(tmp_path, _PAIRS, ["a query of its own", _TEXTS[7]], prompt="find a river " * 40)
    assert said.startswith("eval: 1 of 2 queries of held out are training queries too")


def test_a_million_pairs_take_seconds() -> None:
    """As much of a store as is looked at: no text is tokenised for it."""
    count = 1_000_000
    draw = np.random.default_rng(0)

    def table(tokens: int) -> Any:
        return TokenRows(draw.integers(9, 30_000, count * tokens, dtype=np.uint16), np.arange(count + 1) * tokens)

    rows = np.arange(count)
    store: Any = SimpleNamespace(
        queries=table(9),
        passages=table(70),
        same_text=rows,
        positives=Csr(np.arange(count + 1), rows),
        negatives=Csr(np.zeros(count + 1, np.int64), np.empty(0, np.int64)),
        sources=[SimpleNamespace(name="pairs", first=0, last=count)],
        fingerprint="0" * 32,
    )
    config = replace(Config(), batch=BatchConfig(queries=16_384))
    planner = Planner(store, queries=16_384, negatives=0, seed=0)
    begun = time.process_time()
    assert data_warnings(config, _TOKENIZER, store, planner, {"dev": _TEXTS}) == []
    assert time.process_time() - begun < 10
