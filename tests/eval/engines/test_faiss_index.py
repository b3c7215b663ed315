"""Approximate indexes: recall against the exact search, reuse of what is saved, and what is refused by name."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest

from eval.engines import faiss_index as index_module
from eval.engines.embeddings import Embeddings
from eval.engines.faiss_build import check_faiss_build
from eval.engines.faiss_index import IndexSpec, check_index, describe, index_spec, open_index
from eval.engines.nearest import search
from retriever.config import ConfigError
from retriever.shards import EmbeddingShards, ShardJob, ShardWriter, open_shards

N, D = 11_000, 16


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Unit vectors around 200 centres."""
    rng = np.random.default_rng(0)
    found = rng.standard_normal((200, D))[rng.integers(0, 200, N)] + 0.4 * rng.standard_normal((N, D))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def shards_of(folder: Path, vectors: np.ndarray, texts: str = "t") -> EmbeddingShards:
    writer = ShardWriter(
        folder,
        ShardJob("passage", "m", "", 32, "mean", True, "fp32", "padded", vectors.shape[1], "float32", texts, 4000),
    )
    writer.prepare()
    for shard, start in enumerate(range(0, len(vectors), 4000)):
        writer.write(
            shard, vectors[start : start + 4000], [f"p{i}" for i in range(start, min(start + 4000, len(vectors)))]
        )
    writer.finish(len(vectors))
    return open_shards(folder)


@pytest.mark.parametrize(
    ("index", "least"),
    [
        ("ivf", 0.9),
        ("ivf nprobe=128", 0.999),
        ("hnsw", 0.95),
        ("IVF32,PQ4x4 nprobe=32", 0.2),
        ("SQ8", 0.95),
        ("PCA12,IVF32,Flat,RFlat nprobe=32", 0.5),
    ],
)
def test_recall_against_exact_search(tmp_path: Path, vectors: np.ndarray, index: str, least: float) -> None:
    shards, queries = shards_of(tmp_path, vectors), vectors[::500] + 0.02
    ids = [f"q{i}" for i in range(len(queries))]
    exact, found = search(queries, ids, shards, 20), search(queries, ids, shards, 20, index=index)
    again = search(queries, ids, shards, 20, index=index)  # from the saved one
    assert all(found[q].passage_ids == again[q].passage_ids for q in ids)
    assert all(len(found[q].passage_ids) == 20 and (np.diff(found[q].scores) <= 0).all() for q in ids)
    recall = np.mean([len(set(exact[q].passage_ids) & set(found[q].passage_ids)) / 20 for q in ids])
    assert recall >= least


def test_a_saved_index_is_used_again_until_embeddings_or_settings_change(
    tmp_path: Path, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    build = index_module._build

    def recorded(passages: Embeddings, index: str, spec: IndexSpec) -> faiss.Index:
        built.append(spec.factory)
        return build(passages, index, spec)

    monkeypatch.setattr(index_module, "_build", recorded)
    shards = shards_of(tmp_path, vectors)
    assert open_index(shards, "ivf").ntotal == N
    open_index(shards, "ivf nprobe=3")  # a setting of the search
    assert built == ["IVF256,Flat"]
    manifest = json.loads((tmp_path / "index-ivf256-flat" / "manifest.json").read_text())
    assert (manifest["factory"], manifest["rows"], manifest["train_rows"]) == ("IVF256,Flat", N, N)
    changed = vectors.copy()
    changed[0] = -changed[0]
    moved = shards_of(tmp_path, changed, "other texts")
    assert open_index(moved, "ivf").ntotal == N
    assert len(built) == 2
    open_index(moved, "hnsw")
    open_index(moved, "hnsw efConstruction=40")
    open_index(moved, "hnsw efConstruction=40")
    assert built[2:] == ["HNSW32,Flat"] * 2
    (tmp_path / "index-hnsw32-flat" / "manifest.json").write_text("{")  # damaged
    open_index(moved, "hnsw efConstruction=40")
    assert len(built) == 5


def test_embeddings_in_memory_leave_nothing_behind(vectors: np.ndarray) -> None:
    class Parts:
        rows, dimension = 500, D

        def __iter__(self):  # type: ignore[no-untyped-def]
            yield vectors[:500], [str(i) for i in range(500)]

    found = search(vectors[:3], ["a", "b", "c"], Parts(), 5, index="ivf nprobe=64")
    assert [found[q].passage_ids[0] for q in "abc"] == ["0", "1", "2"]


def test_defaults_by_corpus_size() -> None:
    assert [index_spec("ivf", n, 768).factory for n in (50, 5_000, 1_000_000, 8_841_823)] == [
        "IVF1,Flat", "IVF128,Flat", "IVF4096,Flat", "IVF16384,Flat",
    ]  # fmt: skip
    assert index_spec("ivf", 1_000_000, 768).parameters == ("nprobe=64",)
    assert index_spec("ivf nprobe=9", 50, 768).parameters == ("nprobe=1", "nprobe=9")
    assert index_spec("ivfpq", 1_000_000, 768).factory == "IVF4096,PQ96"
    assert index_spec("ivfpq", 1_000_000, 100).factory == "IVF4096,PQ10"
    assert index_spec("hnsw", 1_000, 768, 1000).parameters == ("efConstruction=200", "efSearch=1000")
    assert describe("flat", 1, 1, 1) == {"index": "flat"}
    assert describe("ivf", 50, 8, 1) == {"index": "ivf", "factory": "IVF1,Flat", "parameters": ("nprobe=1",)}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("hsnw", "expected flat, ivf, ivfpq, hnsw or a FAISS factory string for dimension 16 .*; received 'hsnw'"),
        ("IVF16,PQ5", "dimension 16 .*multiple of the number of subquantizers"),
        ("ivf probes=3", "FAISS refuses probes=3; received 'ivf probes=3'"),
        ("hnsw efSearch", "FAISS refuses efSearch"),
        ("", "expected flat, .*; received ''"),
    ],
)
def test_what_faiss_cannot_build_is_refused(index: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"eval.index \(--index\): .*" + message):
        check_index(index, D)


def test_quantised_indexes_need_passages_to_learn_from() -> None:
    with pytest.raises(
        ConfigError, match="flat or ivf for 500 passages: ivfpq learns from at least 9,984; received 'ivfpq'"
    ):
        index_spec("ivfpq", 500, D)


def test_a_build_of_faiss_that_cannot_do_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    check_faiss_build()
    if not hasattr(faiss, "StandardGpuResources"):
        with pytest.raises(ConfigError, match="--faiss-gpu shard: faiss-cpu .* has no GPU code"):
            check_faiss_build("shard")
    two = [SimpleNamespace(name=name, version="1.0") for name in ("numpy", "faiss-cpu", "faiss-gpu-cu12")]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: two)
    with pytest.raises(
        ConfigError, match="exactly one build of FAISS; found faiss-cpu 1.0, faiss-gpu-cu12 1.0: uninstall"
    ):
        check_faiss_build()
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: two[:1])
    with pytest.raises(ConfigError, match="found none: install one"):
        check_faiss_build()
