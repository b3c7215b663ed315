"""Quantised embeddings hold what sentence-transformers and FAISS would make of them, in shards and in evaluations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from sentence_transformers import quantize_embeddings

from eval.engines.nearest import search
from eval.evaluate import EvalOptions, evaluate
from retriever.encoder.bundle import load_encoder
from retriever.quantized import Quantization, quantize
from retriever.shard_files import ShardError
from retriever.shards import ShardWriter, open_shards
from tests.eval.texts import help_texts, write_beir
from tests.test_shards import JOB, _fill, _write
from tests.tiny import save_tiny_model


def _vectors(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((rows, dimension)).astype(np.float32)
    found[:, 1] = 0.25  # a dimension without a range
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize(("to", "theirs"), [("int8", "int8"), ("binary", "ubinary")])
def test_codes_are_those_of_sentence_transformers(to: Quantization, theirs: Any) -> None:
    vectors = _vectors(500, 21)
    np.testing.assert_array_equal(quantize(vectors, to).codes, quantize_embeddings(vectors, theirs))


@pytest.mark.parametrize("rows", [1, 4])
def test_a_dimension_of_one_value_is_decoded_to_it(rows: int) -> None:
    """In a shard of one row every dimension is such."""
    vectors = np.random.default_rng(0).standard_normal((rows, 5)).astype(np.float32)
    vectors[:, 1] = 0.25
    found = quantize(vectors, "int8")[:]
    constant = vectors.min(axis=0) == vectors.max(axis=0)
    np.testing.assert_array_equal(found[:, constant], vectors[:, constant])
    step = (vectors.max(axis=0) - vectors.min(axis=0)) / 255
    assert constant.sum() == (5 if rows == 1 else 1) and (np.abs(found - vectors) <= 0.5001 * step).all()


def test_int8_is_decoded_as_by_faiss() -> None:
    """Within a step: FAISS cuts at the same places but for rounding."""
    vectors = np.delete(_vectors(500, 21), 1, axis=1)  # FAISS spreads one value over a range of 1e-6
    index = faiss.IndexScalarQuantizer(20, faiss.ScalarQuantizer.QT_8bit)
    index.train(vectors)
    index.add(vectors)
    theirs, ours = index.reconstruct_n(0, 500), quantize(vectors, "int8")[:]
    step = (vectors.max(axis=0) - vectors.min(axis=0)) / 255
    assert (np.abs(ours - vectors) <= 0.5001 * step).all()
    assert np.mean(np.abs(ours - theirs) < 0.01 * step) > 0.999


def test_signs_of_both_sides_are_ordered_by_hamming_distance() -> None:
    passages, queries = _vectors(300, 24), _vectors(9, 24, seed=1)
    coded, asked = quantize(passages, "binary"), quantize(queries, "binary")
    index = faiss.IndexBinaryFlat(24)
    index.add(coded.codes)
    distances, _ = index.search(asked.codes, 300)
    scores = np.sort(asked[:] @ coded[:].T, axis=1)[:, ::-1]
    np.testing.assert_allclose(scores, 1 - 2 * distances / 24, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bytes_per_row"), [("int8", 3), ("binary", 1)])
def test_shards_hold_codes_and_are_searched_decoded(tmp_path: Path, dtype: Quantization, bytes_per_row: int) -> None:
    embeddings = _fill(tmp_path, replace(JOB, dtype=dtype))
    shards = open_shards(tmp_path)
    parts = [part for part, _ in shards]
    expected = [quantize(embeddings[start : start + 4], dtype) for start in (0, 4, 8)]
    np.testing.assert_array_equal(np.concatenate(parts), np.concatenate([part[:] for part in expected]))
    assert [np.load(tmp_path / f"0000{i}.npy").nbytes for i in range(3)] == [
        4 * bytes_per_row,
        4 * bytes_per_row,
        2 * bytes_per_row,
    ]
    query = embeddings[:1]
    found = search(query, ["q"], shards, 10)["q"]
    scores = (query.astype(np.float64) @ np.concatenate([part[:] for part in expected]).T)[0]
    np.testing.assert_allclose(found.scores, np.sort(scores)[::-1], rtol=1e-6)


def test_ranges_belong_to_a_shard(tmp_path: Path) -> None:
    """A shard without them is written again, a damaged one is named."""
    job = replace(JOB, dtype="int8")
    embeddings = _fill(tmp_path, job)
    content = (tmp_path / "00001.ranges.npy").read_bytes()
    (tmp_path / "00001.ranges.npy").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ShardError, match=r"00001\.ranges\.npy is damaged"):
        open_shards(tmp_path)
    (tmp_path / "00001.ranges.npy").unlink()
    writer = ShardWriter(tmp_path, job)
    assert not writer.finished()
    writer.prepare()
    assert [writer.has(shard) for shard in range(3)] == [True, False, True]
    _write(writer, 1, embeddings)
    writer.finish(10)
    assert (tmp_path / "00001.ranges.npy").read_bytes() == content
    ShardWriter(tmp_path, JOB).prepare()
    assert not list(tmp_path.glob("0*"))


def test_an_evaluation_measures_what_quantised_shards_give(tmp_path: Path) -> None:
    data = write_beir(tmp_path / "data", help_texts())
    bundle = load_encoder(save_tiny_model(tmp_path / "model"), device="cpu")
    options = EvalOptions(k=50, quantize=("int8", "binary", "hamming"))
    result = evaluate(bundle, data, "test", ["nDCG@10"], options, tmp_path / "shards")
    assert result is not None
    passages, queries = (open_shards(tmp_path / "shards" / name) for name in ("passages", "queries-test"))
    vectors = np.concatenate([part for part, _ in queries])
    query_ids = [i for _, ids in queries for i in ids]
    signs = np.where(vectors > 0, 1, -1)
    cases: tuple[tuple[str, Quantization, np.ndarray], ...]
    cases = (("int8", "int8", vectors), ("binary", "binary", vectors), ("hamming", "binary", signs))
    for name, to, asked in cases:
        folder, job = tmp_path / name, replace(JOB, dtype=to, dimension=32, shard_rows=passages.manifest["shard_rows"])
        writer = ShardWriter(folder, job)
        writer.prepare()
        for shard, (part, ids) in enumerate(passages):
            writer.write(shard, np.asarray(part), ids)
        writer.finish(passages.rows)
        run = search(asked.astype(np.float32), query_ids, open_shards(folder), 50)
        expected = result.collection.measure(run, ["nDCG@10"]).means
        assert result.quantized[name]["nDCG@10"] == pytest.approx(expected["nDCG@10"], abs=1e-9), name
    assert len({result.means["nDCG@10"], *(means["nDCG@10"] for means in result.quantized.values())}) > 2
