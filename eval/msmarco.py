"""The command that evaluates a model, BM25 or a run on MS MARCO passages: dev small, TREC DL 2019 and 2020.

python -m eval.msmarco --model runs/marco/export --data datasets/msmarco
python -m eval.msmarco --model runs/marco/export --source ir_datasets
python -m eval.msmarco --model runs/marco/export --source huggingface --data mteb/msmarco --split dev
accelerate launch -m eval.msmarco --model runs/marco/export --data datasets/msmarco --split dev
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eval.arguments import evaluation_command, launched_search
from eval.collections.collection import Collection
from eval.collections.msmarco import SPLITS, available_splits, count_notes, read_msmarco
from eval.collections.msmarco_sources import hub_splits, read_hub, read_ir_datasets
from retriever.command import option
from retriever.errors import RefusedError

DEFAULT_DATA = {"ir_datasets": "msmarco-passage", "huggingface": "mteb/msmarco"}


@evaluation_command(
    "python -m eval.msmarco",
    "evaluate on MS MARCO's passages: dev small, TREC DL 2019 and 2020",
    "folder with MS MARCO's files; of huggingface the name of a data set of BEIR's form (default: mteb/msmarco)",
    option(
        "--source",
        choices=("folder", *DEFAULT_DATA),
        default="folder",
        help="where passages, queries and judgments are: a folder, ir_datasets' cache, Hugging Face",
    ),
    option(
        "--corpus",
        metavar="NAME",
        help="passages from another Hugging Face data set, as one with titles; "
        "its figures compare with those of that corpus alone",
    ),
    option("--split", nargs="+", choices=tuple(SPLITS), help="default: all whose judgments are there"),
    data_required=False,
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m eval.msmarco`."""
    if args.data is None and args.source == "folder":
        raise RefusedError("--data: expected a folder with MS MARCO's files, or --source ir_datasets or huggingface")
    if args.corpus is not None and args.source != "huggingface":
        raise RefusedError(f"--corpus {args.corpus}: expected --source huggingface; received --source {args.source}")
    args.data = args.data or Path(DEFAULT_DATA[args.source])
    with launched_search(args) as world:
        from eval.commands import report_all

        work = [(collection, args.metrics or SPLITS[collection.split].metrics) for collection in _collections(args)]
        report_all(args, work, world, msmarco=True, check=count_notes)


def _collections(args: argparse.Namespace) -> list[Collection]:
    """The collections to evaluate. Raises ConfigError, DataError."""
    texts = args.run is None
    if args.source == "folder":
        return [read_msmarco(args.data, name, texts=texts) for name in args.split or available_splits(args.data)]

    data = str(args.data)
    if args.source == "ir_datasets":
        return [read_ir_datasets(data, name, SPLITS[name], texts=texts) for name in args.split or SPLITS]
    return [
        read_hub(data, name, SPLITS[name], args.corpus, texts=texts) for name in args.split or hub_splits(data, SPLITS)
    ]


if __name__ == "__main__":
    sys.exit(main())
