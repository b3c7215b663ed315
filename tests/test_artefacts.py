"""What earlier versions wrote still opens: runs, stores, shards, indexes, mined data, stages, exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from eval.engines.bm25 import Bm25
from eval.engines.embeddings import load_queries
from eval.engines.nearest import SearchOptions, search
from retriever.config import SourceConfig
from retriever.config_file import load
from retriever.data.formats import open_source
from retriever.data.store import build_or_open
from retriever.encoder.bundle import load_encoder, load_tokenizer
from retriever.shards import open_shards
from retriever.train import main as train
from scripts.loop.config import load_loop
from scripts.stages import run_stage
from tests.artefacts.archive import ARCHIVES, FIRST, unpack
from tests.artefacts.make import BM25, EMBEDDINGS, EXPORTS, INDEX, RUNS, TEXTS, K

APART = 1e-6  # of weights and embeddings, relative to the largest


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name)
def recorded(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the writing code read from the files of an archive, which are unpacked in the present directory."""
    unpack(tmp_path, request.param)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = json.loads(Path("recorded.json").read_text())
    return found


def test_the_first_archive_is_there() -> None:
    assert FIRST in ARCHIVES


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_from_its_checkpoint_to_the_same_weights(name: str) -> None:
    """One in the middle of its steps, without the later checkpoint and what was published from it."""
    run = Path(name)
    shutil.copytree(run, "whole")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    for published in ("export", "best"):
        shutil.rmtree(run / published, ignore_errors=True)
        (run / f"{published}.json").unlink(missing_ok=True)
    assert train(["--config", "run.yaml", *RUNS[name], "run.trackers=[]"]) == 0
    for file in ("checkpoints/step-00000006/model.safetensors", *_weights_of_export(Path("whole"))):
        _assert_close(load_file(run / file), load_file(Path("whole") / file), load_file(_started_from(file)))
    lines, expected = (_losses(folder / "metrics.jsonl") for folder in (run, Path("whole")))
    assert lines == pytest.approx(expected, rel=APART) and len(expected) == 6


def _weights_of_export(run: Path) -> list[str]:
    return [path.relative_to(run).as_posix() for path in sorted((run / "export").rglob("model.safetensors"))]


def _started_from(file: str) -> Path:
    """Earlier weights under the same names: the first model's, or those of the checkpoint that the run goes on from."""
    return Path("model/model.safetensors") if file.startswith("export") else Path("whole", file.replace("6/", "3/"))


def _assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], before: dict[str, np.ndarray]) -> None:
    """Equal to rounding, and far from the weights `before`."""
    assert found.keys() == expected.keys()
    # The gradient of a key bias is rounding, which Adam makes large.
    trained = [key for key in expected if not key.endswith("key.bias")]
    largest = max(float(np.abs(expected[key]).max()) for key in trained)
    for key in trained:
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=APART * largest, err_msg=key)
    assert max(float(np.abs(before[key] - expected[key]).max()) for key in trained) > 100 * APART * largest


def _losses(path: Path) -> list[float]:
    return [line["train/loss"] for line in map(json.loads, path.read_text().splitlines()) if "train/loss" in line]


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("settings", ["run.yaml", "run/config.yaml", "loop/mined/train/train.yaml"])
def test_a_store_opens_without_a_rebuild(settings: str) -> None:
    """By the settings that were written then; its texts, negatives and teacher's scores are those of the data."""
    config, tokenizer = load(settings), load_tokenizer("model")
    saved = _files("**/store-*/**/*")
    opened = build_or_open(config, tokenizer)
    assert _files("**/store-*/**/*") == saved and len(saved) > 20
    assert [source.last - source.first for source in opened.sources] == [40] * len(config.data.train)
    texts = [tokenizer.decode(opened.passages.tokens(row)) for row in range(len(opened.passages))]
    known = {json.loads(line)["text"] for line in Path("data/corpus.jsonl").read_text().splitlines()}
    assert len(set(texts)) == len(texts) > 40 and set(texts) <= known
    mined = opened.sources[-1]  # of every store: its negatives and their scores
    mined_records = [json.loads(line) for line in Path("loop/mined/mine/data/train.jsonl").read_text().splitlines()]
    scores = [score for record in mined_records for score in record["negative_scores"]]
    assert opened.negative_scores is not None
    stored = opened.negative_scores[opened.negatives.ptr[mined.first] : opened.negatives.ptr[mined.last]]
    assert sorted(stored.tolist()) == pytest.approx(sorted(scores), rel=1e-6) and len(scores) == 120


def _files(pattern: str) -> dict[Path, tuple[int, int]]:
    """Which files these are: of one written again the number or the time differs."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path().glob(pattern)}


@pytest.mark.parametrize("index", ["flat", INDEX, "hnsw"])
def test_shards_and_indexes_are_searched(recorded: dict[str, Any], index: str) -> None:
    """A saved index is read, not built again: its file stays the same one."""
    passages, queries = open_shards(f"{EMBEDDINGS}/passage"), open_shards(f"{EMBEDDINGS}/query")
    saved = _files("**/index-*/*")
    assert (passages.rows, passages.dimension, queries.rows, len(saved)) == (60, 8, 40, 4)
    vectors, ids = load_queries(queries)
    found = search(vectors, ids, passages, K, SearchOptions(index))
    assert found.keys() == recorded["search"][index].keys() == set(ids)
    for query, (names, scores) in recorded["search"][index].items():
        assert found[query].passage_ids == names
        assert found[query].scores.tolist() == pytest.approx(scores, rel=1e-5)
    assert _files("**/index-*/*") == saved


def test_a_bm25_index_is_searched(recorded: dict[str, Any]) -> None:
    scores = recorded["bm25"]
    assert sum(score > 0 for text in TEXTS for score in scores[text]) > 10
    for text in TEXTS:
        assert Bm25(Path(BM25)).scores(text).tolist() == pytest.approx(scores[text], rel=1e-6)


@pytest.mark.usefixtures("recorded")
def test_mined_data_are_read() -> None:
    """Every query with its positive, its negatives and the teachers' scores of both, as the lines have them."""
    source = open_source(SourceConfig(path="loop/mined/mine/data"))
    assert source.format == "tevatron"
    lines = [json.loads(line) for line in Path("loop/mined/mine/data/train.jsonl").read_text().splitlines()]
    examples = list(source.examples())
    assert len(examples) == len(lines) == 40
    for example, line in zip(examples, lines, strict=True):
        assert [passage.text for passage in example.negatives] == [found["text"] for found in line["negative_passages"]]
        assert list(example.negative_scores or ()) == line["negative_scores"]


@pytest.mark.usefixtures("recorded")
def test_finished_stages_are_reused() -> None:
    """For the inputs that they were worked on for; and the loop's configuration is one still."""
    found = {path: json.loads(path.read_text()) for path in sorted(Path("loop").rglob("manifest.json"))}
    manifests = {path: manifest for path, manifest in found.items() if "stage" in manifest}
    names = {manifest["stage"] for manifest in manifests.values()}
    assert {"mined: mine", "mined: train", "mined: evaluate", "mine", "encode", "score", "index for bm25"} <= names

    def refused(folder: Path) -> Sequence[str]:
        raise AssertionError(f"{folder} is worked on again")

    for path, manifest in manifests.items():
        assert run_stage(manifest["stage"], path.parent, manifest["inputs"], refused, writes=()) == manifest["outputs"]
    assert [described.name for described in load_loop("loop.yaml").rounds] == ["mined"]


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_embeds_as_it_did(recorded: dict[str, Any], name: str) -> None:
    bundle = load_encoder(name)
    assert bundle.settings.query_prompt == "query: " and bundle.settings.passage_max_tokens == 24
    found, expected = bundle.encode(TEXTS, "query"), np.array(recorded["embeddings"][name])
    assert np.linalg.norm(expected, axis=1) == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=APART)
