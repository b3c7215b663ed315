"""The command that evaluates a model, BM25 or a run on a BEIR folder.

python -m eval.beir --model runs/demo/export --data datasets/scifact
accelerate launch -m eval.beir --model runs/demo/export --data datasets/scifact
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eval.arguments import command_parser, parsed
from eval.commands import launched_ranks, one_line_errors, report_all

METRICS = ("nDCG@10", "MRR@10", "Recall@100", "MAP")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `python -m eval.beir`."""
    parser = command_parser("python -m eval.beir", "evaluate on a BEIR folder: corpus.jsonl, queries.jsonl, qrels/<split>.tsv")
    parser.add_argument("--split", nargs="+", default=["test"], help="qrels/<split>.tsv, one or more (default: test)")
    parser.add_argument("--qrels", type=Path, help="judgments file instead of qrels/<split>.tsv")
    parser.add_argument("--relevance", type=int, default=1, help="lowest grade that is relevant for binary measures (default: 1)")
    exclude = "drop a passage whose id is the query's, as BEIR does for every collection (default: do)"
    parser.add_argument("--exclude-self", action=argparse.BooleanOptionalAction, default=True, help=exclude)
    given = parsed(parser, arguments)
    if given.qrels is not None and len(given.split) > 1:
        parser.error(f"--qrels is one judgments file, for one --split; received {' '.join(given.split)}")

    from eval.collection import read_beir

    with one_line_errors(), launched_ranks(given.threads, given.faiss_gpu) as (ranks, device):
        collections = [
            replace(
                read_beir(given.data, split, given.qrels, texts=given.run is None),
                relevance=given.relevance,
                exclude_self=given.exclude_self,
            )
            for split in given.split
        ]
        report_all(given, [(collection, given.metrics or METRICS) for collection in collections], ranks, device)


if __name__ == "__main__":
    main()
