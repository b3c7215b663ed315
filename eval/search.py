"""The command that searches: embedding shards -> a run file. Exact, or through a FAISS index
(`eval.engines.faiss_index`).

python -m eval.search --queries shards/queries --passages shards/passages --k 1000 --output run.trec
accelerate launch -m eval.search --queries shards/queries --passages shards/passages --output run.trec
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from eval.arguments import SEARCH, launched_search, options_of
from eval.outputs import is_run, refuse_foreign
from retriever.command import at_least_one, command, option
from retriever.wording import counted

if TYPE_CHECKING:
    from retriever.shards import EmbeddingShards

_ALIKE = ("pooling", "normalize", "dimension")  # of a manifest, besides the model


@command(
    "python -m eval.search",
    "embedding shards -> a run file",
    option("--queries", required=True, type=Path, help="folder of query shards, as retriever/encode.py writes them"),
    option("--passages", required=True, type=Path, help="folder of passage shards"),
    option("--output", required=True, type=Path, help="the run file; .gz compresses it"),
    option("--k", type=at_least_one, default=1000, help="passages a query"),
    *SEARCH,
    option("--format", choices=("trec", "msmarco"), default="trec", help="of the run file"),
    option("--exclude-self", action="store_true", help="drop a passage whose id is the query's (ArguAna, Quora)"),
    option("--block-mib", type=at_least_one, default=256, help="MiB of passages that FAISS holds at once"),
    lower="--memory-gib or --block-mib",
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m eval.search`."""
    from eval.engines.embeddings import load_queries
    from eval.engines.nearest import SearchOptions, search
    from eval.trec import write_msmarco, write_trec

    refuse_foreign(args.output, is_run)
    with launched_search(args) as world:
        queries, passages = _opened(args)
        options = options_of(SearchOptions, args, progress=True)
        found = search(*load_queries(queries), passages, args.k, options, world)
        if world.is_first:
            write = write_trec if args.format == "trec" else write_msmarco
            write(args.output, found)
            lines = sum(len(ranking.passage_ids) for ranking in found.values())
            used = options.describe(passages, args.k)
            index = " ".join([used["factory"], *used["parameters"]]) if "factory" in used else "exact"
            print(f"{args.output}: {counted(len(found), 'query')}, {counted(lines, 'line')}; {index} search")
            for shards in (queries, passages):
                if prompt := shards.manifest["prompt"]:
                    print(f"note: {shards.folder}: every {shards.manifest['side']} begins with the prompt {prompt!r}")
            for note in options.shortage(found, passages, args.k):
                print(f"note: {note}")


def _opened(args: argparse.Namespace) -> tuple[EmbeddingShards, EmbeddingShards]:
    """The shards of queries and of passages. Raises ShardError where they cannot be searched together."""
    from retriever.shards import ShardError, open_shards

    queries, passages = (open_shards(folder, again=args.verify) for folder in (args.queries, args.passages))
    for shards, side in ((queries, "query"), (passages, "passage")):
        if shards.manifest["side"] != side:
            there = shards.manifest["side"]
            raise ShardError(f"{shards.folder} holds embeddings of the {there} side; expected the {side} side")
    values = {name: (queries.manifest[name], passages.manifest[name]) for name in _ALIKE}
    differing = [f"{name} ({a!r}, {b!r})" for name, (a, b) in values.items() if a != b]
    if queries.manifest["model"] != passages.manifest["model"]:
        differing.append("model")
    if differing:
        both = f"{args.queries} and {args.passages} differ in {', '.join(differing)}"
        raise ShardError(f"{both}; expected embeddings of one model, made alike: encode one of them again")
    return queries, passages


if __name__ == "__main__":
    sys.exit(main())
