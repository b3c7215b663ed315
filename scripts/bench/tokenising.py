"""Tokenising a corpus: the token store's writer beside the tokenizers library's bare loop over the same texts.

    python -m scripts.bench.tokenising --output docs/bench/tokenising.json

The bare loop calls `encode_batch_fast` on batches of the writer's size and throws the result away; the writer ends with the table on
disk. The two take turns; the share is the median over the turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from retriever.data import text_table
from retriever.data.text_table import TextTable, TextTableWriter
from scripts.bench.passages import random_passages, word_tokenizer
from scripts.bench.tables import Table


def bare(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    """What the library does by itself."""
    for start in range(0, len(texts), text_table._BATCH_TEXTS):
        tokenizer.backend_tokenizer.encode_batch_fast(texts[start : start + text_table._BATCH_TEXTS], add_special_tokens=False)


def written(tokenizer: PreTrainedTokenizerBase, texts: list[str], folder: Path) -> None:
    """What a token store does."""
    with TextTableWriter(folder, tokenizer) as writer:
        for number, text in enumerate(texts):
            writer.add(str(number), text)


def check(tokenizer: PreTrainedTokenizerBase, texts: list[str], folder: Path) -> None:
    """Raises ValueError where the table on disk is not what the tokenizer says."""
    table = TextTable(folder)
    for row in range(0, len(texts), max(1, len(texts) // 100)):
        expected = tokenizer(texts[row], add_special_tokens=False)["input_ids"]
        if table.tokens(row).tolist() != expected:
            raise ValueError(f"text {row} was written as {table.tokens(row).tolist()}; the tokenizer gives {expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file; none is written without it")
    parser.add_argument("--tokenizer", help="folder or name of a model (default: BERT's way with made-up words)")
    parser.add_argument("--input", type=Path, help="a text a line (default: random passages)")
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer) if args.tokenizer else word_tokenizer()
    texts = args.input.read_text().splitlines()[: args.texts] if args.input else random_passages(args.texts)[0]
    table = Table.begin(("tokenizers", "transformers", "numpy"))
    case = f"texts={len(texts)},cores={len(os.sched_getaffinity(0))}"

    def rate(work: Callable[[], None]) -> float:
        started = time.perf_counter()
        work()
        return len(texts) / (time.perf_counter() - started)

    with tempfile.TemporaryDirectory() as folder:
        written(tokenizer, texts, Path(folder) / "checked")
        check(tokenizer, texts, Path(folder) / "checked")
        turns = []
        for turn in range(args.turns):
            own = rate(lambda turn=turn: written(tokenizer, texts, Path(folder) / str(turn)))  # type: ignore[misc]
            turns.append((rate(lambda: bare(tokenizer, texts)), own))
    table.add(case, "floor", "texts_per_s", statistics.median(alone for alone, _ in turns), "texts/s", "encode_batch_fast alone")
    table.add(case, "bigbatch", "texts_per_s", statistics.median(own for _, own in turns), "texts/s", "text to table on disk")
    table.add(case, "bigbatch", "share", statistics.median(own / alone for alone, own in turns), "of encode_batch_fast")
    if args.output:
        table.save(args.output)


if __name__ == "__main__":
    main()
