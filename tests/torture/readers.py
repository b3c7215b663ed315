"""What reads people's files and our own, for `tests.torture.fuzz`."""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from eval.collections.collection import read_beir, read_judgments
from eval.trec import read_run
from retriever.checksums import write_checksums
from retriever.config import SourceConfig
from retriever.config_file import load
from retriever.damage import damage, read_state
from retriever.data.collection import passages_of
from retriever.data.formats import open_source
from retriever.data.store import build_or_open
from retriever.encoder.bundle import load_encoder
from retriever.history import read_metrics
from retriever.run_folder import take
from retriever.shards import ShardJob, ShardWriter, open_shards
from scripts.loop.config import load_loop
from tests.malformed.cases import FORMATS
from tests.tiny import save_tiny_model, tiny_tokenizer
from tests.torture.fuzz import Target

_RECORDS = [
    {"anchor": "who sings, and where", "positive": 'the "band"', "negative": "a river"},
    {"anchor": "what is a caf\u00e9", "positive": "a place\nfor coffee", "negative": "storm"},
]
_CSV = 'anchor,positive,negative\n"who, and where",the band,a river\nwhat is a café,a place,storm\n'
_TSV = "anchor\tpositive\tnegative\nwho, and where\tthe band\ta river\nwhat is a café\ta place\tstorm\n"
_HEADER = "query-id\tcorpus-id\tscore\n"


def _drain(items: Iterable[object]) -> None:
    deque(items, maxlen=0)


def _lines(records: Sequence[Any]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def _source(name: str) -> Callable[[Path], object]:
    return lambda folder: _drain(open_source(SourceConfig(path=str(folder / name))).examples())


def _training(name: str, file: str, content: str) -> Target:
    return Target(f"training data, {name}", (file,), _text(file, content), _source(file))


def _parquet(folder: Path) -> None:
    pq.write_table(pa.Table.from_pylist(_RECORDS), folder / "x.parquet")


def _sources() -> list[Target]:
    nested = []
    for kind in FORMATS[1:]:
        records = [kind.record(r["anchor"], [r["positive"]], [r["negative"]]) for r in _RECORDS]
        content = _lines(records) if kind.file == "x.jsonl" else json.dumps(records, indent=1)
        nested.append(_training(kind.name, kind.file, content))
    return [
        _training("columns in JSON lines", "x.jsonl", _lines(_RECORDS)),
        _training("columns in CSV", "x.csv", _CSV),
        _training("columns in TSV", "x.tsv", _TSV),
        *nested,
        Target("training data, Parquet", ("x.parquet",), _parquet, _source("x.parquet")),
    ]


def _beir(folder: Path) -> None:
    corpus = [{"_id": "d1", "title": "A", "text": "a river"}, {"_id": "d2", "title": "", "text": "storm"}]
    (folder / "corpus.jsonl").write_text(_lines(corpus))
    (folder / "queries.jsonl").write_text(_lines([{"_id": "q1", "text": "river"}, {"_id": "q2", "text": "wind"}]))
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(f"{_HEADER}q1\td1\t1\nq2\td2\t2\n")


def _read_beir(folder: Path) -> None:
    for table in read_beir(folder).corpus:
        _drain(passages_of(table))


def _shards(folder: Path) -> None:
    job = ShardJob("passage", "hash", "", 144, "mean", True, "fp32", "padded", 3, "float32", "texts", shard_rows=2)
    writer = ShardWriter(folder, job)
    writer.prepare()
    for shard in range(2):
        writer.write(shard, np.eye(2, 3), [f"a{shard}", f"b{shard}"])
    writer.finish(4)


def _checkpoint(folder: Path) -> None:
    state = {"format_version": 1, "step": 3, "scaler": {}, "store": "f1", "frozen": "", "config": {}}
    (folder / "export").mkdir()
    for name in ("model.safetensors", "optimizer.safetensors", "export/model.safetensors"):
        save_file({"weight": torch.ones(3)}, folder / name)
    (folder / "state.json").write_text(json.dumps(state))
    write_checksums(folder)


def _read_checkpoint(folder: Path) -> None:
    damage(folder)
    read_state(folder)


def _store(folder: Path) -> None:
    (folder / "x.jsonl").write_text(_lines(_RECORDS))
    _open_store(folder)


def _open_store(folder: Path) -> None:
    """A damaged one is built again."""
    config = load(None, [f"data.train=[{{path: {folder}/x.jsonl}}]", f"data.cache_dir={folder}/cache", *_NEEDED])
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        store = build_or_open(config, tiny_tokenizer(), progress=False)
    assert [store.passages.tokens(row).tolist() for row in range(4)] and len(store.queries) == 2


_NEEDED = ("model.name_or_path=model", "train.max_steps=1")
_CONFIG = """
run: {output_dir: runs/x, seed: 3, trackers: [tensorboard]}
model: {name_or_path: model, query_max_tokens: 16, query_prompt: "query: ", lora: {r: 4, targets: [query]}}
data:
  train: [{path: data, weight: 0.5}, {path: other.jsonl, format: columns, columns: [a, b]}]
batch: {queries: 24, tokens_per_chunk: auto}
loss: {temperature: 0.05, dims: [4, 8], dim_weights: [1, 0.5]}
optim: {lr: 1.0e-3, betas: [0.9, 0.99], precision: fp32}
train: {max_steps: 10}
eval: {path: data, split: dev, metrics: [MRR@10]}
"""
_LOOP = """
output_dir: loop
source: {path: data, format: beir}
train: {model: {name_or_path: model}, batch: {queries: 12}, train: {max_steps: 2}}
rounds:
- {name: mined, mine: {retrievers: [bm25], ranks: [1, 30]}, variants: [{optim: {lr: 0.1}}]}
evaluate: {data: data, options: {split: [dev], metrics: [MRR@10]}, choose: dev}
"""


def _run_folder(folder: Path) -> None:
    take(load(None, [f"run.output_dir={folder}", "data.train=[{path: x}]", *_NEEDED]))
    (folder / "metrics.jsonl").write_text(_lines([{"step": 1, "train/loss": 1.5}, {"step": 1, "eval/MRR@10": 0.5}]))


def _read_run_folder(folder: Path) -> None:
    config = load(None, [f"run.output_dir={folder}", "data.train=[{path: x}]", *_NEEDED])
    take(config)
    read_metrics(folder / "metrics.jsonl")


def _model(folder: Path) -> None:
    save_tiny_model(folder, num_hidden_layers=1)
    described = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    described += [{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    )
    (folder / "modules.json").write_text(json.dumps(described))
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "q: "}, "similarity_fn_name": "cosine"})
    )
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))


_MODEL_FILES = (
    *("config.json", "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"),
    *("sentence_bert_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"),
)


def _load_model(folder: Path) -> None:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        load_encoder(folder, device="cpu")


_CHECKPOINT_FILES = ("state.json", "checksums.json", "model.safetensors", "export/model.safetensors")
_SHARD_FILES = ("manifest.json", "job.json", "checksums.json", "00000.npy", "00001.ids.arrow")

TARGETS = (
    *_sources(),
    Target("BEIR folder", ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"), _beir, _read_beir),
    Target(
        "judgments, TREC",
        ("x.qrels",),
        _text("x.qrels", "q1 0 d1 1\nq2 0 d2 -1\n"),
        lambda f: read_judgments(f / "x.qrels"),
    ),
    Target(
        "run file, TREC",
        ("x.run",),
        _text("x.run", "q1 Q0 d1 1 1.5 t\nq1 Q0 d2 2 1.0 t\n"),
        lambda f: read_run(f / "x.run"),
    ),
    Target("run file, MS MARCO", ("x.tsv",), _text("x.tsv", "q1\td1\t1\nq1\td2\t2\n"), lambda f: read_run(f / "x.tsv")),
    Target("training configuration", ("c.yaml",), _text("c.yaml", _CONFIG), lambda f: load(f / "c.yaml")),
    Target("loop configuration", ("l.yaml",), _text("l.yaml", _LOOP), lambda f: load_loop(f / "l.yaml")),
    Target("model folder", _MODEL_FILES, _model, _load_model),
    Target("embedding shards", _SHARD_FILES, _shards, lambda folder: _drain(open_shards(folder))),
    Target("token store", ("cache/*/*.json", "cache/*/*/*.json", "cache/*/*.npy"), _store, _open_store),
    Target("checkpoint", _CHECKPOINT_FILES, _checkpoint, _read_checkpoint),
    Target("run folder", (".bigbatch", "metrics.jsonl"), _run_folder, _read_run_folder),
)
