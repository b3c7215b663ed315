"""The command that evaluates a model, BM25 or a run on a BEIR folder, or a model or BM25 on a folder of many with a summary.

python -m eval.beir --model runs/demo/export --data datasets/scifact
accelerate launch -m eval.beir --model runs/demo/export --data datasets

A folder inside a folder of many that holds several collections itself (CQADupStack's twelve forums) enters the summary with their mean.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.arguments import command_parser, output_folder, parsed
from eval.commands import launched_ranks, one_line_errors, report_all

if TYPE_CHECKING:
    from eval.evaluate import EvalResult, Ranks

METRICS = ("nDCG@10", "MRR@10", "Recall@100", "MAP")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `python -m eval.beir`."""
    what = "evaluate on a BEIR folder (corpus.jsonl, queries.jsonl, qrels/<split>.tsv) or on a folder of many"
    parser = command_parser("python -m eval.beir", what, hub=True)
    parser.add_argument("--split", nargs="+", default=["test"], help="qrels/<split>.tsv, one or more (default: test)")
    parser.add_argument("--qrels", type=Path, help="judgments file instead of qrels/<split>.tsv")
    parser.add_argument("--relevance", type=int, default=1, help="lowest grade that is relevant for binary measures (default: 1)")
    exclude = "drop a passage whose id is the query's, as BEIR does for every collection (default: do)"
    parser.add_argument("--exclude-self", action=argparse.BooleanOptionalAction, default=True, help=exclude)
    given = parsed(parser, arguments)
    if given.qrels is not None and len(given.split) > 1:
        parser.error(f"--qrels is one judgments file, for one --split; received {' '.join(given.split)}")

    folders = collection_folders(given.data)
    if folders and (given.run is not None or given.qrels is not None or len(given.split) > 1):
        parser.error(f"{given.data} holds {len(folders)} collections; expected --model or --bm25, one --split and no --qrels for them")
    with one_line_errors(), launched_ranks(given.threads, given.faiss_gpu) as (ranks, device):
        if folders:
            _report_many(given, folders, ranks, device)
        else:
            _report_one(given, ranks, device)


def collection_folders(folder: Path) -> list[Path]:
    """The folders with a corpus, one or two floors below a folder that has none itself; empty where it has one."""
    if not folder.is_dir() or any(folder.glob("corpus.*")):
        return []
    return sorted({path.parent for pattern in ("*/corpus.*", "*/*/corpus.*") for path in folder.glob(pattern)})


def summary(rows: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The rows (`name` or `group/name` -> means), a mean for each group, and the mean of all, a group counting as one collection."""
    found = {name: dict(means) for name, means in rows.items()}
    single = {name: means for name, means in found.items() if "/" not in name}
    for group in dict.fromkeys(name.partition("/")[0] for name in rows if "/" in name):
        members = [means for name, means in rows.items() if name.startswith(f"{group}/")]
        label = f"{group} (mean of {len(members)})"
        found[label] = single[label] = _mean(members)
    return found | {f"mean of {len(single)} collections": _mean(list(single.values()))}


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


def _report_one(given: argparse.Namespace, ranks: Ranks, device: Any) -> list[EvalResult]:
    from eval.collections.collection import read_beir

    read = (read_beir(given.data, split, given.qrels, texts=given.run is None) for split in given.split)
    collections = [replace(collection, relevance=given.relevance, exclude_self=given.exclude_self) for collection in read]
    return report_all(given, [(collection, given.metrics or METRICS) for collection in collections], ranks, device)


def _report_many(given: argparse.Namespace, folders: Sequence[Path], ranks: Ranks, device: Any) -> None:
    from eval.report import format_table
    from retriever.data.collection import find_qrels
    from retriever.files import write_json

    for folder in folders:
        find_qrels(folder, given.split[0])  # a collection without judgments is told before the first one is encoded
    root = output_folder(given)
    rows: dict[str, Mapping[str, float]] = {}
    for folder in folders:
        name = folder.relative_to(given.data).as_posix()
        one = argparse.Namespace(**vars(given) | {"data": folder, "output_dir": root / name})
        for result in _report_one(one, ranks, device):  # one, or on other ranks none
            rows[name] = result.means
    if rows:  # on the first rank
        table = summary(rows)
        write_json(root / "summary.json", {"command": given.command, "split": given.split[0], "metrics": table})
        print(f"\n{given.data} {given.split[0]}: {len(folders)} folders; {root / 'summary.json'}\n{format_table(table)}", flush=True)


if __name__ == "__main__":
    main()
