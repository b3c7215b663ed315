"""Approximate indexes: recall against the exact search, reuse of what is saved, and what is refused by name."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from eval.engines import faiss_index as index_module
from eval.engines.embeddings import Embeddings
from eval.engines.faiss_gpu import check_faiss_build
from eval.engines.faiss_index import IndexSpec, check_index, index_spec, open_index
from eval.engines.nearest import SearchOptions, search
from retriever.checksums import write_checksums
from retriever.config import ConfigError
from retriever.shards import EmbeddingShards, ShardJob, ShardWriter, open_shards
from tests.commands import change_unseen

N, D = 11_000, 16


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Unit vectors around 200 centres."""
    rng = np.random.default_rng(0)
    found = rng.standard_normal((200, D))[rng.integers(0, 200, N)] + 0.4 * rng.standard_normal((N, D))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


class Parts:
    """Embeddings in memory."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.rows, self.dimension = vectors.shape
        self._vectors = vectors

    def __iter__(self) -> Iterator[tuple[np.ndarray, list[str]]]:
        yield self._vectors, [str(i) for i in range(self.rows)]


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
    exact, found = search(queries, ids, shards, 20), search(queries, ids, shards, 20, SearchOptions(index=index))
    again = search(queries, ids, shards, 20, SearchOptions(index=index))  # from the saved one
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


def _found(shards: EmbeddingShards, queries: np.ndarray, index: str) -> list[list[str]]:
    run = search(queries, [str(i) for i in range(len(queries))], shards, 20, SearchOptions(index))
    return [ranking.passage_ids for ranking in run.values()]


def test_a_search_has_its_own_parameters_whoever_built_the_index(tmp_path: Path, vectors: np.ndarray) -> None:
    """Those that the index of an earlier version holds are set anew too."""
    queries, plain = vectors[::300] + 0.1, "IVF256,Flat"
    alone, after = shards_of(tmp_path / "alone", vectors), shards_of(tmp_path / "after", vectors)
    expected, deep = _found(alone, queries, plain), _found(after, queries, "ivf nprobe=200")
    assert expected != deep, "nprobe makes a difference"
    assert _found(after, queries, plain) == expected
    assert _found(alone, queries, "ivf nprobe=200") == deep
    file = tmp_path / "after" / "index-ivf256-flat" / "index.faiss"
    built = faiss.read_index(str(file))
    faiss.ParameterSpace().set_index_parameters(built, "nprobe=256")  # type: ignore[arg-type]
    faiss.write_index(built, str(file))
    write_checksums(file.parent, [file.name])
    assert _found(after, queries, plain) == expected


def test_what_is_recorded_is_what_was_used(vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    set_parameters = faiss.ParameterSpace.set_index_parameters

    def recorded(space: Any, index: Any, parameters: Any) -> None:
        used.append(parameters)
        set_parameters(space, index, parameters)

    monkeypatch.setattr(faiss.ParameterSpace, "set_index_parameters", recorded)
    parts = Parts(vectors[:400])
    for index in ("hnsw", "hnsw efSearch=70", "ivf", "IVF4,Flat"):
        options, used[:] = SearchOptions(index, exclude_self=True), []
        search(vectors[:3], ["a", "b", "c"], parts, 300, options)
        described = options.describe(parts, 300)["parameters"]
        assert used[-len(described) :] == list(described)
    assert "efSearch=301" in SearchOptions("hnsw", exclude_self=True).describe(parts, 300)["parameters"]
    assert SearchOptions().describe(parts, 300) == {"index": "flat"}


def test_an_index_says_how_many_queries_it_leaves_short(vectors: np.ndarray) -> None:
    parts, ids = Parts(vectors[:2_000]), ["a", "b", "c"]
    for index, short in (("IVF32,Flat", True), ("IVF32,Flat nprobe=32", False), ("flat", False)):
        options = SearchOptions(index)
        run = search(vectors[:3], ids, parts, 1_500, options)
        found = sum(len(ranking.passage_ids) < 1_500 for ranking in run.values())
        assert (found > 0) == short
        notes = options.shortage(run, parts, 1_500)
        assert len(notes) == short
        if short:
            assert f"--index {index} found fewer than 1,500 passages for {found} of 3 queries; raise nprobe" in notes[0]
    own = search(vectors[:3], list("012"), parts, 2_000, SearchOptions("hnsw efSearch=2000", exclude_self=True))
    assert SearchOptions("hnsw", exclude_self=True).shortage(own, parts, 2_000) == (), "the query's own is not missed"


def test_an_index_is_built_by_one_process_at_a_time(
    tmp_path: Path, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process holds its lock: this one waits, and builds when the other is done."""
    shards, events = shards_of(tmp_path, vectors[:500]), list[str]()
    build = index_module._build

    def recorded(passages: Embeddings, index: str, spec: IndexSpec) -> faiss.Index:
        events.append("built")
        return build(passages, index, spec)

    monkeypatch.setattr(index_module, "_build", recorded)
    lock = tmp_path / "index-flat" / ".lock"
    lock.parent.mkdir()
    code = "import sys; from pathlib import Path; from retriever.lock import locked\n"
    code += "with locked(Path(sys.argv[1]), 'it'): print('held', flush=True); input()"
    command, pipe = [sys.executable, "-c", code, str(lock)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "held\n"
        opening = threading.Thread(target=open_index, args=(shards, "Flat"))
        opening.start()
        opening.join(1.0)
        events.append("released" if opening.is_alive() else "not waited for")
        other.stdin.write("\n")
        other.stdin.flush()
        opening.join(20.0)
    assert events == ["released", "built"]


def test_a_saved_index_is_verified_on_request(
    tmp_path: Path, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed bit that the file's time does not tell: the index is built again."""
    shards, file = shards_of(tmp_path, vectors[:500]), tmp_path / "index-flat" / "index.faiss"
    open_index(shards, "Flat")
    content = change_unseen(file, monkeypatch)
    open_index(shards, "Flat")
    assert file.read_bytes() != content
    open_index(shards, "Flat", verify=True)
    assert file.read_bytes() == content


def test_embeddings_in_memory_leave_nothing_behind(vectors: np.ndarray) -> None:
    found = search(vectors[:3], ["a", "b", "c"], Parts(vectors[:500]), 5, SearchOptions(index="ivf nprobe=64"))
    assert [found[q].passage_ids[0] for q in "abc"] == ["0", "1", "2"]


def test_defaults_by_corpus_size() -> None:
    assert [index_spec("ivf", n, 768).factory for n in (50, 5_000, 1_000_000, 8_841_823)] == [
        "IVF1,Flat", "IVF128,Flat", "IVF4096,Flat", "IVF16384,Flat",
    ]  # fmt: skip
    assert index_spec("ivf", 1_000_000, 768).parameters == ("nprobe=64",)
    assert index_spec("ivf nprobe=9", 50, 768).parameters == ("nprobe=9",)
    assert [index_spec("ivf", N, D, k).parameters for k in (10, 1_000, 10_000)] == [
        ("nprobe=16",), ("nprobe=47",), ("nprobe=256",),
    ]  # fmt: skip
    assert index_spec("ivfpq", 1_000_000, 768).factory == "IVF4096,PQ96"
    assert index_spec("ivfpq", 1_000_000, 100).factory == "IVF4096,PQ10"
    assert set(index_spec("hnsw", 1_000, 768, 1000).parameters) == {"efConstruction=200", "efSearch=1000"}
    assert set(index_spec("PCA12,IVF32,Flat,RFlat nprobe=4,k_factor_rf=2", N, D).parameters) == {
        "nprobe=4",
        "k_factor_rf=2",
    }


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


def test_quantised_indexes_need_passages_to_learn_from(vectors: np.ndarray) -> None:
    """Known before anything is encoded; what FAISS refuses for another reason is told in one line too."""
    for index, least in (("IVF512,Flat", 512), ("PQ4", 256), ("OPQ4,IVF16,PQ4", 256), ("PCA8,IVF512,Flat,RFlat", 512)):
        check_index(index, D, least)
        message = rf"flat or ivf for {least - 1} passages: {index} learns from at least {least}; received '{index}'"
        with pytest.raises(ConfigError, match=message):
            check_index(index, D, least - 1)
    for index, reason in (("PCA20,Flat", "PCA matrix cannot output 20 dimensions"), ("NSG32,Flat", "graph")):
        with pytest.raises(ConfigError, match=f"an index that FAISS can build of 50 passages .*{reason}") as refused:
            open_index(Parts(vectors[:50]), index)
        assert "\n" not in str(refused.value)
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
