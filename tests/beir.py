"""Writes BEIR folders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path


def write_beir(
    folder: Path,
    corpus: Iterable[Mapping[str, str]],
    queries: Mapping[str, str],
    **qrels: Mapping[str, Mapping[str, int]],
) -> Path:
    """A BEIR folder: passages as records, query id -> text, and of each split query id -> passage id -> grade."""
    (folder / "qrels").mkdir(parents=True)
    for name, records in (("corpus", corpus), ("queries", ({"_id": i, "text": text} for i, text in queries.items()))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for split, judged in qrels.items():
        rows = "".join(
            f"{query}\t{passage}\t{grade}\n" for query, grades in judged.items() for passage, grade in grades.items()
        )
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return folder
