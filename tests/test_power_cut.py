"""Power cuts between any two operations: what was finished is there, and what has its final name is whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.engines import bm25_index
from eval.engines.bm25 import Bm25
from eval.engines.faiss_index import open_index
from retriever import checkpoint, files, outputs, resume
from retriever.checkpoint import Snapshot
from retriever.config import Config, DataConfig, RunConfig, SourceConfig, TrainConfig
from retriever.damage import damage
from retriever.data.store import build_or_open
from retriever.history import read_metrics
from retriever.lock import LOCK
from retriever.model_card import TrainingFacts
from retriever.outputs import Outputs
from retriever.parallel.world import World
from retriever.shards import ShardError, ShardWriter, open_shards
from retriever.telemetry import Telemetry
from scripts.stages import run_stage
from tests.power_cut import PowerCuts
from tests.test_shards import JOB, _fill
from tests.test_telemetry import Accelerator
from tests.tiny import tiny_tokenizer

_EVALUATED = {1: 0.1, 2: 0.3, 3: 0.2}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def _tree(folder: Path) -> dict[str, bytes]:
    files = (
        file for file in folder.rglob("*") if file.is_file() and file.name != LOCK
    )  # a lock holds nobody up afterwards
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def _outputs(config: Config, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    """Of a run whose only weight is the number of the step."""

    def weight() -> dict[str, torch.Tensor]:
        return {"step": torch.tensor(float(_steps(run.history.path)[-1]))}

    def export(encoder: Any, tokenizer: Any, config: Config, folder: Path, *_: Any) -> None:
        with files.replace_folder(folder) as writing:
            (writing / "README.md").write_text("the card\n")
            save_file(weight(), writing / "model.safetensors")

    monkeypatch.setattr(outputs, "export", export)
    monkeypatch.setattr(outputs, "Probe", SimpleNamespace(of=lambda *_: None))
    facts = TrainingFacts((), 1, (1, 1), 0)
    monkeypatch.setattr(TrainingFacts, "of", lambda *_: facts)
    monkeypatch.setattr(checkpoint, "snapshot", lambda state, keep: Snapshot(weight(), {}, {}, ""))
    placed, store = (
        SimpleNamespace(whole=lambda *_: None, copy=lambda keep: None),
        SimpleNamespace(fingerprint="f1", passages=()),
    )
    state = SimpleNamespace(optimizer=SimpleNamespace(averages={}))
    run = Outputs(config, state, placed, None, store, World(torch.device("cpu")))  # type: ignore[arg-type]
    return run


def _steps(metrics: Path) -> list[int]:
    return [line["step"] for line in read_metrics(metrics)]


def _weight(folder: Path) -> float:
    return float(load_file(folder / "model.safetensors")["step"])


def test_a_run_keeps_a_checkpoint_its_metrics_and_its_exports(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `keep_last` 1: the newest whole checkpoint is the last that was saved or the one being saved, and a restart
    has the rest.

    An evaluation that is not recorded is made up.
    """

    def config(root: Path) -> Config:
        return Config(run=RunConfig(output_dir=str(root / "runs" / "run")), train=TrainConfig(max_steps=3, keep_last=1))

    with PowerCuts(disk) as cuts:
        run = _outputs(config(disk), monkeypatch)
        telemetry, state = Telemetry(Accelerator(), run.history), SimpleNamespace(done=0, total=4, epoch=0)
        telemetry.on_train_begin(state)
        for step, value in _EVALUATED.items():
            state.done = step
            telemetry.on_log(state, {"train/loss": 1.0})
            run.save(step)
            run.wait()
            cuts.promised = step
            telemetry.on_log(state, {"eval/x": value})
            run.publish_best(step)
        telemetry.on_train_end(state)
    made_up = set[bool]()
    for root, saved in cuts.left(tmp_path / "left"):
        folder = root / "runs" / "run"
        found = resume.find(config(root).run)
        if found is None:
            assert saved is None
            continue
        step = checkpoint.finished_steps(found)
        assert step >= (saved or 0) and _weight(found) == step
        assert [damage(whole) for whole in checkpoint.steps(found.parent)] == [None] * len(
            checkpoint.steps(found.parent)
        )
        lines = [line for line in _steps(folder / "metrics.jsonl") if line <= step]
        again = _outputs(config(root), monkeypatch)
        assert checkpoint.steps(found.parent) == [found]
        telemetry, state = Telemetry(Accelerator(), again.history), SimpleNamespace(done=step, total=4, epoch=0)
        telemetry.on_train_begin(state)
        if lacking := again.lacks_evaluation(step):
            lines += [step]
            telemetry.on_log(state, {"eval/x": _EVALUATED[step]})
            again.publish_best(step)
        telemetry.on_train_end(state)
        made_up.add(lacking)
        assert lines == [s for s in range(1, step + 1) for _ in "ab"]
        best = max(range(1, step + 1), key=_EVALUATED.__getitem__)
        assert (_weight(folder / "export"), _weight(folder / "best")) == (step, best)
        for name, at in (("export", step), ("best", best)):
            assert f"After step {at}:" in (folder / name / "README.md").read_text()
        assert not [*folder.rglob(".*ing-*")]
    assert made_up == {True, False}


def test_a_store_with_its_name_is_whole(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"anchor": f"q {i}", "positive": f"p {i}"}) + "\n" for i in range(9))
    )
    data = DataConfig(train=(SourceConfig(path=str(tmp_path / "pairs.jsonl")),), cache_dir=str(disk / "cache"))
    with PowerCuts(disk) as cuts:
        store = build_or_open(Config(data=data), tiny_tokenizer(), progress=False).folder
        cuts.promised = True
    whole = _tree(store)
    for root, built in cuts.left(tmp_path / "left"):
        found = root / store.relative_to(disk)
        assert _tree(found) == whole if found.exists() else not built


def test_shards_are_of_one_job_and_whole(disk: Path, tmp_path: Path) -> None:
    """Embeddings of another model replace those of the first; whatever opens is all of the one or all of the other.

    The same command then ends with all of the other.
    """
    values = {"first": 1.0, "second": 2.0}

    def encode(root: Path, model: str) -> None:
        writer = ShardWriter(root / "shards", replace(JOB, model=model, shard_rows=2), cache=True)
        writer.check()
        writer.prepare()
        for shard in range(3):
            if not writer.has(shard):
                writer.write(shard, np.full((2, 3), values[model]), ["a", "b"])
        writer.finish(6)

    def read(root: Path) -> tuple[str, np.ndarray]:
        shards = open_shards(root / "shards")
        return shards.manifest["model"], np.concatenate([embeddings for embeddings, _ in shards])

    encode(disk, "first")
    with PowerCuts(disk) as cuts:
        encode(disk, "second")
        cuts.promised = "second"
    for root, model in cuts.left(tmp_path / "left"):
        try:
            name, found = read(root)
            assert model in (None, name)
            np.testing.assert_array_equal(found, np.full((6, 3), values[name]))
        except ShardError:
            assert model is None
        encode(root, "second")
        np.testing.assert_array_equal(read(root)[1], np.full((6, 3), values["second"]))


def test_a_stage_that_is_done_has_its_outputs(disk: Path, tmp_path: Path) -> None:
    def work(folder: Path) -> list[str]:
        Bm25.build(["river city", "storm"], folder)
        return list(bm25_index.FILES)

    with PowerCuts(disk) as cuts:
        run_stage("index", disk / "bm25", {"texts": 1}, work, writes=["*"])
        cuts.promised = True
    whole = _tree(disk / "bm25")
    for root, done in cuts.left(tmp_path / "left"):
        found = _tree(root / "bm25") if (root / "bm25" / "manifest.json").exists() else None
        assert found == whole if found is not None else not done


def test_a_saved_index_is_that_of_its_manifest(disk: Path, tmp_path: Path) -> None:
    """It is built anew where the embeddings are others."""
    folder, known = disk / "shards" / "index-flat", dict[bytes, bytes]()

    def index() -> None:
        open_index(open_shards(disk / "shards"), "Flat")
        known[(folder / "manifest.json").read_bytes()] = (folder / "index.faiss").read_bytes()

    _fill(disk / "shards")
    index()
    _fill(disk / "shards", replace(JOB, model="other"), rows=9)
    with PowerCuts(disk) as cuts:
        index()
        cuts.promised = (folder / "manifest.json").read_bytes()
    assert len(known) == 2
    for root, done in cuts.left(tmp_path / "left"):
        found = root / folder.relative_to(disk)
        manifest = (found / "manifest.json").read_bytes() if (found / "manifest.json").exists() else None
        assert done in (None, manifest)
        assert manifest is None or (found / "index.faiss").read_bytes() == known[manifest]
