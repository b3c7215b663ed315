"""Random pairs of MS MARCO's lengths, as a token store that a training run reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from retriever.data.store import Store
from retriever.data.store_builder import MANIFEST, PASSAGES, QUERIES
from retriever.data.tokens import TokenTemplate
from scripts.bench.passages import passage_lengths

TEMPLATE = TokenTemplate(prefix=(2,), suffix=(3,), pad_id=0)
QUERY_MAX_TOKENS, PASSAGE_MAX_TOKENS = 32, 256
_FIRST_WORD = 5  # ids below are special tokens
_NOISE = 0.2  # of a query's tokens stand in no passage of its own


def query_lengths(n: int, generator: np.random.Generator) -> np.ndarray:
    """Tokens [n] int64 of queries, special tokens included: lognormal(ln 8, 0.35), clipped to 4 … 32."""
    return np.clip(generator.lognormal(np.log(8), 0.35, n), 4, QUERY_MAX_TOKENS).astype(np.int64)


def random_store(folder: Path, pairs: int, vocabulary: int, seed: int = 0) -> Store:
    """Writes and opens a store of `pairs` queries, each with one passage, of token ids below `vocabulary` ≤ 65,536.

    Four fifths of a query's tokens are drawn from its passage and the rest at random, so that a model can learn the
    pairs.
    """
    generator = np.random.default_rng(seed)
    own = {
        QUERIES: query_lengths(pairs, generator) - TEMPLATE.special_tokens,
        PASSAGES: passage_lengths(pairs, generator) - TEMPLATE.special_tokens,
    }
    offsets = {name: np.concatenate([[0], lengths.cumsum()]) for name, lengths in own.items()}
    passages = generator.integers(_FIRST_WORD, vocabulary, offsets[PASSAGES][-1], dtype=np.uint16)
    row = np.repeat(np.arange(pairs), own[QUERIES])
    queries = passages[offsets[PASSAGES][row] + generator.integers(own[PASSAGES][row])]
    noisy = generator.random(len(queries)) < _NOISE
    queries[noisy] = generator.integers(_FIRST_WORD, vocabulary, int(noisy.sum()), dtype=np.uint16)
    for name, tokens in ((QUERIES, queries), (PASSAGES, passages)):
        (folder / name).mkdir(parents=True)
        np.save(folder / name / "tokens.npy", tokens)
        np.save(folder / name / "offsets.npy", offsets[name])
    for name, ptr in (
        ("positives", np.arange(pairs + 1)),
        ("known", np.arange(pairs + 1)),
        ("negatives", np.zeros(pairs + 1, np.int64)),
    ):
        np.save(folder / f"{name}.ptr.npy", ptr)
        np.save(folder / f"{name}.ids.npy", np.arange(ptr[-1]))
    source = {"name": "random", "format": "columns", "first": 0, "last": pairs, "left_out": 0}
    (folder / MANIFEST).write_text(json.dumps({"fingerprint": f"{seed:032x}", "sources": [source]}))
    return Store(folder)
