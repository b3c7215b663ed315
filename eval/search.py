"""The command that searches: embedding shards -> a run file. Exact, or through a FAISS index
(`eval.engines.faiss_index`).

python -m eval.search --queries shards/queries --passages shards/passages --k 1000 --output run.trec
accelerate launch -m eval.search --queries shards/queries --passages shards/passages --output run.trec
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval.arguments import SEARCH, launched_search
from retriever.command import at_least_one, command_parser, option, run
from retriever.wording import counted

if TYPE_CHECKING:
    from eval.trec import Ranking
    from retriever.parallel.world import World


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m eval.search`."""
    parser = command_parser(
        "python -m eval.search",
        "embedding shards -> a run file",
        option(
            "--queries", required=True, type=Path, help="folder of query shards, as retriever/encode.py writes them"
        ),
        option("--passages", required=True, type=Path, help="folder of passage shards"),
        option("--output", required=True, type=Path, help="the run file; .gz compresses it"),
        option("--k", type=at_least_one, default=1000, help="passages a query"),
        *SEARCH,
        option(
            "--verify",
            action="store_true",
            help="compare the embeddings with their checksums though no file changed since last time",
        ),
        option("--format", choices=("trec", "msmarco"), default="trec", help="of the run file"),
        option("--exclude-self", action="store_true", help="drop a passage whose id is the query's (ArguAna, Quora)"),
        option("--block-mib", type=at_least_one, default=256, help="MiB of passages that FAISS holds at once"),
    )
    return run(parser, arguments, _search, lower="--memory-gib or --block-mib")


def _search(args: argparse.Namespace) -> None:
    from eval.trec import write_msmarco, write_trec

    with launched_search(args) as world:
        found = _search_folders(args, world)
        if world.is_first:
            write = write_trec if args.format == "trec" else write_msmarco
            write(args.output, found)
            print(
                f"{args.output}: {counted(len(found), 'query')}, {counted(sum(len(r.passage_ids) for r in found.values()), 'line')}"
            )


def _search_folders(args: argparse.Namespace, world: World) -> dict[str, Ranking]:
    from eval.engines.embeddings import load_queries
    from eval.engines.nearest import search
    from retriever.shards import ShardError, open_shards

    query_shards, passage_shards = (open_shards(folder, again=args.verify) for folder in (args.queries, args.passages))
    models = query_shards.manifest["model"], passage_shards.manifest["model"]
    if models[0] != models[1]:
        raise ShardError(
            f"{args.queries} and {args.passages} hold embeddings of different models: {models[0]}, {models[1]}"
        )
    for folder, shards, side in ((args.queries, query_shards, "query"), (args.passages, passage_shards, "passage")):
        if shards.manifest["side"] != side:
            raise ShardError(
                f"{folder} holds embeddings of the {shards.manifest['side']} side; expected the {side} side"
            )
    queries, query_ids = load_queries(query_shards)
    return search(
        queries, query_ids, passage_shards, args.k, index=args.index, exclude_self=args.exclude_self, block_mib=args.block_mib,
        progress=True, world=world, engine=args.engine, memory_gib=args.memory_gib, faiss_gpu=args.faiss_gpu,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
