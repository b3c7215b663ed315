"""A smaller collection to search: the passages that a split asks for, among a sample of all the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from retriever.files import replace_folder
from scripts.code_pairs.split import drawn


def write_bounded(source: Path, target: Path, split: str, passages: int, seed: int) -> int:
    """Writes the BEIR folder `target`: `split` of `source` with all its judged passages and others up to `passages` in all.

    The others are drawn by the seed, whatever side they are on; order is kept. Returns the number of passages.
    """
    qrels = source / "qrels" / f"{split}.tsv"
    judged = {line.split("\t")[1] for line in qrels.read_text(encoding="utf-8").splitlines()[1:]}
    with (source / "corpus.jsonl").open(encoding="utf-8") as corpus:
        records = [(json.loads(line)["_id"], line) for line in corpus]
    others = sorted((passage_id for passage_id, _ in records if passage_id not in judged), key=lambda name: drawn(seed, name))
    kept = judged | set(others[: max(0, passages - len(judged))])
    with replace_folder(target) as aside:
        (aside / "qrels").mkdir()
        (aside / "corpus.jsonl").write_text("".join(line for passage_id, line in records if passage_id in kept), encoding="utf-8")
        shutil.copyfile(source / "queries.jsonl", aside / "queries.jsonl")
        shutil.copyfile(qrels, aside / "qrels" / qrels.name)
    return len(kept)
