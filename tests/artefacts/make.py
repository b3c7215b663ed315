"""Makes the files that `tests/test_artefacts.py` opens: `python -m tests.artefacts.make tests/artefacts/<name>.tar.xz`.

The committed archive was written at commit 337befe and is not made again: it stands for what people have on disk.
Where a format changes, add an archive beside it.

Every path inside is relative to the archive's folder, so whatever opens it runs there. `recorded.json` says what the
code that wrote the files read from them.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from eval.engines.bm25 import Bm25
from eval.engines.embeddings import load_queries
from eval.engines.nearest import SearchOptions, search
from retriever.encoder.bundle import load_encoder
from retriever.shards import open_shards
from retriever.train import main as train
from scripts.pipeline import main as pipeline
from tests.tiny import random_texts, save_tiny_model

INDEX, K = "IVF2,Flat nprobe=2", 5
TEXTS = ("river storm", "the price of money", "a ship on the ocean, in winter")
EMBEDDINGS, BM25 = "loop/work/mined/embeddings", "loop/work/mined/bm25"
EXPORTS = ("run/export", "run/best", "adapted/export")
_TINY: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
_SHARED = {
    "model": {"name_or_path": "model", "query_max_tokens": 12, "passage_max_tokens": 24, "query_prompt": "query: "},
    "loss": {"temperature": 0.1, "precision": "fp32", "learn_temperature": True},
    "optim": {"lr": 1.0e-2, "precision": "fp32"},
}
_TRAINING = _SHARED | {
    "run": {"output_dir": "run", "seed": 3},
    "data": {
        "train": [{"path": "data"}, {"path": "loop/mined/mine/data", "weight": 0.5}],
        "negatives": 2,
        "cache_dir": "cache",
    },
    "batch": {"queries": 12, "tokens_per_chunk": 96},
    "train": {"max_steps": 6, "save_every": 3, "log_every": 1, "eval_every": 3},
    "eval": {"path": "data", "split": "dev", "metrics": ["MRR@10"], "k": 10},
}
_LOOP = {
    "output_dir": "loop",
    "source": {"path": "data", "format": "beir"},
    "train": _SHARED
    | {
        "run": {"trackers": []},
        "batch": {"queries": 12, "tokens_per_chunk": 96},
        "train": {"max_steps": 2, "save_every": 2},
    },
    "rounds": [
        {
            "name": "mined",
            "mine": {
                "retrievers": ["model", "bm25"],
                "teacher": ["model", "bm25"],
                "ranks": [1, 30],
                "negatives": 3,
                "index": "hnsw",
            },
            "train": {"loss": {"kl_weight": 1.0}, "data": {"negatives": 2}},
        }
    ],
    "evaluate": {"data": "data", "options": {"split": ["dev"], "metrics": ["MRR@10"], "k": 10}},
}
RUNS: dict[str, tuple[str, ...]] = {  # folder -> overrides of run.yaml
    "run": (),
    "adapted": (
        *("run.output_dir=adapted", "model.tied=false", "model.lora={r: 2, targets: [query]}", "optim.name=adafactor"),
        *("eval=null", "train.eval_every=0"),
    ),
}


def make(folder: Path) -> None:
    """Fills `folder`, the present directory: data, a loop (mined data, shards, indexes), and the two runs."""
    save_tiny_model(folder / "model", **_TINY)
    _write_data(folder / "data")
    for name, settings in (("run.yaml", _TRAINING), ("loop.yaml", _LOOP)):
        (folder / name).write_text(json.dumps(settings, indent=1))  # JSON is YAML
    _done(pipeline(["loop.yaml"]))
    for overrides in RUNS.values():
        _done(train(["--config", "run.yaml", *overrides]))
    (folder / "recorded.json").write_text(json.dumps(_read(), indent=1))


def _read() -> dict[str, object]:
    """What is in the files, as this code reads it."""
    passages = open_shards(f"{EMBEDDINGS}/passage")
    queries, ids = load_queries(open_shards(f"{EMBEDDINGS}/query"))
    runs = {index: search(queries, ids, passages, K, SearchOptions(index)) for index in ("flat", INDEX, "hnsw")}
    scores = Bm25(Path(BM25))
    named = {index: {q: [r.passage_ids, r.scores.tolist()] for q, r in run.items()} for index, run in runs.items()}
    return {
        "search": named,
        "bm25": {text: [float(score) for score in scores.scores(text)] for text in TEXTS},
        "embeddings": {name: np.asarray(load_encoder(name).encode(TEXTS, "query")).tolist() for name in EXPORTS},
    }


def _write_data(folder: Path) -> None:
    (folder / "qrels").mkdir(parents=True)
    draw, texts = random.Random(1), random_texts(60, shortest=4, longest=12, seed=5)
    corpus = [{"_id": f"p{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    queries = [{"_id": f"q{i}", "text": " ".join(draw.sample(text.split(), 3))} for i, text in enumerate(texts)]
    for name, records in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for split, rows in (("train", range(40)), ("dev", range(40, 60))):
        lines = "".join(f"q{i}\tp{i}\t1\n" for i in rows)
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)


def _kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Without what only people read."""
    return None if Path(entry.name).name in ("logs", "report.html") else entry


def _done(status: int) -> None:
    if status != 0:
        raise SystemExit(status)


def main() -> None:
    """Writes the archive that the command line names."""
    archive = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        make(Path())
        with tarfile.open(archive, "w:xz") as packed:
            packed.add(".", ".", filter=_kept)
    print(f"{archive}: {archive.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
