"""The search benchmark at a size that says nothing about speed: it runs, it checks itself, and its check can fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from eval.engines.nearest import SearchOptions, search
from eval.trec import Ranking
from scripts.bench.search import disagreement, main, unit_vectors, write_shards

CPU = torch.device("cpu")


def test_the_table_has_every_figure(tmp_path: Path) -> None:
    sizes = ["--passages", "3000", "--queries", "20", "--dimension", "16", "--k", "30", "--repeats", "1"]
    sizes += ["--ann-passages", "10000", "--ann-queries", "20", "--ann-dimension", "8"]
    sizes += ["--disk-passages", "2000", "--disk-index", "IVF8,PQ2x4 nprobe=8", "--rescore", "2000"]
    assert main([*sizes, "--output", str(tmp_path / "search.json"), "--folder", str(tmp_path)]) == 0
    rows = {
        (row["method"], row["metric"]): row["value"]
        for row in json.loads((tmp_path / "search.json").read_text())["rows"]
    }
    assert rows["exact, torch", "agreement with fp64"] == 100
    assert rows["exact, torch", "time, run 1"] > 0
    assert rows["Flat (Flat)", "recall@100"] == 1
    assert rows["ivf (IVF256,Flat) nprobe=256", "recall@100"] == 1
    assert rows["hnsw efConstruction=64 (HNSW32,Flat) efSearch=512", "recall@100"] > 0.9
    assert 0.05 < rows["ivfpq (IVF256,PQ1) nprobe=256", "recall@100"] < 1
    assert rows["IVF8,PQ2x4 nprobe=8", "recall@100, rescore 0"] < 1
    assert rows["IVF8,PQ2x4 nprobe=8", "recall@100, rescore 2000"] == 1
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["search.json"]  # the shards are gone


def test_the_check_sees_one_wrong_passage(tmp_path: Path) -> None:
    passages = write_shards(tmp_path, 500, 16, "float16", lambda rows, seed: unit_vectors(rows, 16, seed, CPU))
    queries = unit_vectors(4, 16, 0, CPU).numpy()
    found = list(search(queries, list("abcd"), passages, 10, SearchOptions(engine="torch")).values())
    assert disagreement(queries, found, passages, CPU)[0] == 1.0
    worst = int((queries[0] @ np.concatenate([np.asarray(part) for part, _ in passages]).T.astype(np.float32)).argmin())
    found[0] = Ranking([*found[0].passage_ids[:9], str(worst)], found[0].scores)
    right, error = disagreement(queries, found, passages, CPU)
    assert (right, error > 0.1) == (39 / 40, True)
    found[0] = Ranking([found[0].passage_ids[0]] * 10, found[0].scores)
    assert disagreement(queries, found, passages, CPU)[0] == 0.0
