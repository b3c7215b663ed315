"""The command that evaluates a model, BM25 or a run on a BEIR folder, or a model or BM25 on a folder of many with a
summary.

python -m eval.beir --model runs/demo/export --data datasets/scifact
accelerate launch -m eval.beir --model runs/demo/export --data datasets

A folder inside a folder of many that holds several collections itself (CQADupStack's twelve forums) enters the summary
with their mean.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from eval.arguments import evaluation_command, launched_search
from eval.collections.collection import read_beir
from retriever.command import at_least_one, option
from retriever.data.folders import find_qrels
from retriever.errors import RefusedError

if TYPE_CHECKING:
    from eval.evaluate import EvalResult
    from retriever.parallel.world import World

METRICS = ("nDCG@10", "MRR@10", "Recall@100", "MAP")


@evaluation_command(
    "python -m eval.beir",
    "evaluate on a BEIR folder (corpus.jsonl, queries.jsonl, qrels/<split>.tsv) or on a folder of many",
    "folder of the collection, or hf:<name> of a Hugging Face data set of BEIR's form",
    option("--split", nargs="+", default=["test"], help="qrels/<split>.tsv, one or more (default: test)"),
    option("--qrels", type=Path, help="judgments file instead of qrels/<split>.tsv"),
    option("--relevance", type=at_least_one, default=1, help="lowest grade that is relevant for binary measures"),
    option(
        "--exclude-self",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="drop a passage whose id is the query's, as BEIR does for every collection (default: do)",
    ),
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m eval.beir`."""
    if args.qrels is not None and len(args.split) > 1:
        raise RefusedError(f"--qrels is one judgments file, for one --split; received {' '.join(args.split)}")
    folders = collection_folders(args.data)
    if folders and (args.run is not None or args.qrels is not None or len(args.split) > 1):
        expected = "--model or --bm25, one --split and no --qrels for them"
        raise RefusedError(f"{args.data} holds {len(folders)} collections; expected {expected}")
    with launched_search(args) as world:
        if folders:
            _report_many(args, folders, world)
        else:
            _report_one(args, world)


def collection_folders(folder: Path) -> list[Path]:
    """The folders with a corpus, one or two floors below a folder that has none itself; empty where it has one."""
    if not folder.is_dir() or any(folder.glob("corpus.*")):
        return []
    return sorted({path.parent for pattern in ("*/corpus.*", "*/*/corpus.*") for path in folder.glob(pattern)})


def summary(rows: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The rows (`name` or `group/name` -> means), a mean for each group, and the mean of all, a group counting as one
    collection.
    """
    found = {name: dict(means) for name, means in rows.items()}
    single = {name: means for name, means in found.items() if "/" not in name}
    for group in dict.fromkeys(name.partition("/")[0] for name in rows if "/" in name):
        members = [means for name, means in rows.items() if name.startswith(f"{group}/")]
        label = f"{group} (mean of {len(members)})"
        found[label] = single[label] = _mean(members)
    return found | {f"mean of {len(single)} collections": _mean(list(single.values()))}


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


def _report_one(args: argparse.Namespace, world: World) -> list[EvalResult]:
    from eval.commands import report_all

    read = (read_beir(args.data, split, args.qrels, texts=args.run is None) for split in args.split)
    collections = [replace(collection, relevance=args.relevance, exclude_self=args.exclude_self) for collection in read]
    return report_all(args, [(collection, args.metrics or METRICS) for collection in collections], world)


def _report_many(args: argparse.Namespace, folders: Sequence[Path], world: World) -> None:
    from eval.commands import output_folder
    from eval.report import format_table, refuse_foreign_results
    from retriever.files import write_json

    for folder in folders:
        find_qrels(folder, args.split[0])  # a collection without judgments is told before the first one is encoded
    root = output_folder(args)
    refuse_foreign_results(root, "summary")
    rows: dict[str, Mapping[str, float]] = {}
    for folder in folders:
        name = folder.relative_to(args.data).as_posix()
        one = argparse.Namespace(**vars(args) | {"data": folder, "output_dir": root / name})
        for result in _report_one(one, world):  # one, or on other ranks none
            rows[name] = result.means
    if rows:  # on the first rank
        table = summary(rows)
        write_json(root / "summary.json", {"command": args.command, "split": args.split[0], "metrics": table})
        print(
            f"\n{args.data} {args.split[0]}: {len(folders)} folders; {root / 'summary.json'}\n{format_table(table)}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
