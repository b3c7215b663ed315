"""Checkpoints: training goes on bitwise from one, a folder with a final name is whole, and other data is refused."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from retriever import checkpoint, resume
from retriever.checkpoint import TrainingState
from retriever.config import (
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.lora import adapt
from retriever.loss.contrastive import ContrastiveObjective
from retriever.optim import Optimizer
from retriever.parallel.world import World
from retriever.step import train_step
from tests.problems import random_batch, rank_batch

CPU = World(torch.device("cpu"))
WHOLE = random_batch(queries=6, passages=9)


@pytest.fixture
def config(one_layer: Path, tmp_path: Path) -> Config:
    return Config(
        run=RunConfig(output_dir=str(tmp_path / "run")),
        model=ModelConfig(str(one_layer), tied=False, query_max_tokens=32, passage_max_tokens=32),
        data=DataConfig(train=(SourceConfig(path="x"),)),
        loss=LossConfig(learn_temperature=True, precision="fp32"),
        optim=OptimConfig(lr=1e-3, precision="fp32"),
        train=TrainConfig(max_steps=8),
    )


def _state(config: Config) -> TrainingState:
    encoder = DualEncoder.from_pretrained(config.model)
    objective = ContrastiveObjective(config.loss, unit_norm=True)
    return TrainingState(encoder, objective, Optimizer(config.optim, [encoder, objective], 8, CPU.device))


def _train(state: TrainingState, steps: range) -> list[Tensor]:
    batch, _, _ = rank_batch(WHOLE, 0, 60)
    for step in steps:
        train_step(state.encoder, state.objective, replace(batch, step=step), state.optimizer, CPU, seed=1)  # type: ignore[arg-type]
    return [w.detach().clone() for w in state.modules().parameters()]


def _export(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")


def _save(config: Config, step: int, state: TrainingState | None = None) -> Path:
    snapshot = checkpoint.snapshot(state or _state(config))
    return checkpoint.save(Path(config.run.output_dir) / checkpoint.FOLDER, step, snapshot, config, "f1", _export)


@pytest.mark.parametrize("optim", [{}, {"name": "adafactor"}, {"name": "adafactor_momentum"}, {"precision": "fp16"}])
def test_training_goes_on_bitwise(config: Config, optim: dict[str, Any]) -> None:
    """k + m steps equal k steps, save, load into fresh objects, m steps: weights, optimizer, scaler, temperature,
    dropout.
    """
    config = replace(config, optim=replace(config.optim, **optim))
    start, straight = _train(_state(config), range(0)), _train(_state(config), range(6))
    first = _state(config)
    _train(first, range(3))
    if optim.get("precision") == "fp16":
        first.optimizer.scaler.update(1024.0)  # a scale that a fresh scaler would not have
    saved = _save(config, 3, first)
    resumed = _state(config)
    assert checkpoint.load(saved, resumed, "f1") == 3
    assert resumed.optimizer.gradient_scale == first.optimizer.gradient_scale
    weights = _train(resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(weights, _train(first, range(3, 6)), strict=True))
    if optim.get("precision") != "fp16":
        assert all(torch.equal(a, b) for a, b in zip(weights, straight, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights, start, strict=True)), "nothing was trained"


def test_a_checkpoint_before_the_first_step_loads(config: Config) -> None:
    """An optimizer that has no state yet is saved and restored as such."""
    saved = _save(config, 0)
    resumed = _state(config)
    assert checkpoint.load(saved, resumed, "f1") == 0
    assert all(
        torch.equal(a, b) for a, b in zip(_train(resumed, range(2)), _train(_state(config), range(2)), strict=True)
    )


def test_what_a_checkpoint_holds(config: Config) -> None:
    """Safetensors and JSON alone, the resolved configuration, the data's fingerprint, and an export."""
    saved = _save(config, 3)
    assert saved.name == "step-00000003" and (saved / "export" / "config.json").exists()
    assert {p.suffix for p in saved.rglob("*") if p.is_file()} == {".safetensors", ".json"}
    manifest = json.loads((saved / "state.json").read_text())
    assert (manifest["step"], manifest["store"]) == (3, "f1")
    with safe_open(saved / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
    assert "objective.log_scale" in names and any(name.startswith("encoder.towers.query.") for name in names)


def test_other_data_and_other_formats_are_refused(config: Config, tmp_path: Path) -> None:
    """A changed store, a folder that is no checkpoint and a format of another version stop with a reason, before a
    weight changes.
    """
    saved, state = _save(config, 3), _state(config)
    with torch.no_grad():
        for w in state.modules().parameters():
            w.zero_()
    with pytest.raises(ConfigError, match=r"other data.*f1.*f2.*run.resume=never"):
        checkpoint.load(saved, state, "f2")
    with pytest.raises(ConfigError, match="no checkpoint"):
        checkpoint.load(tmp_path, state, "f1")
    manifest = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(ConfigError, match="99"):
        checkpoint.load(saved, state, "f1")
    assert all(not w.any() for w in state.modules().parameters())


@pytest.mark.parametrize("stage", ["export", "model", "rename"])
def test_a_save_that_dies_leaves_nothing_that_counts(
    config: Config, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Wherever it stops, the checkpoint before stays, nothing else does, and saving again works."""
    before = _save(config, 3)
    root = before.parent

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if stage == "model":
            patch.setattr(checkpoint, "save_file", die)
        if stage == "rename":
            patch.setattr(os, "replace", die)
        checkpoint.save(
            root, 5, checkpoint.snapshot(_state(config)), config, "f1", die if stage == "export" else _export
        )
    assert list(root.iterdir()) == [before] and checkpoint.newest(root) == before
    assert checkpoint.newest(root.parent / "nowhere") is None
    assert checkpoint.newest(root) != _save(config, 5) == checkpoint.newest(root)


def test_keep_last_removes_the_oldest(config: Config) -> None:
    """By step, not by time of writing; fewer than asked for are all kept."""
    root = _save(config, 900).parent
    for step in (1000, 20):
        _save(config, step)
    checkpoint.keep_last(root, 5)
    assert len(list(root.iterdir())) == 3
    checkpoint.keep_last(root, 2)
    assert sorted(p.name for p in root.iterdir()) == ["step-00000900", "step-00001000"]
    assert checkpoint.newest(root) == root / "step-00001000"


def test_publish_replaces_the_whole_folder(tmp_path: Path) -> None:
    """The target is the source's copy, without files of what stood there before; the source stays; nothing else is
    left.
    """
    source, target = tmp_path / "new", tmp_path / "best"
    for folder, name in ((source, "weights"), (target, "stale")):
        folder.mkdir()
        (folder / name).write_text(name)
    for _ in range(2):
        checkpoint.publish(source, target)
        assert [p.name for p in target.iterdir()] == ["weights"] and [p.name for p in source.iterdir()] == ["weights"]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "new"]


def test_a_copy_beside_the_checkpoints_is_left_alone(config: Config) -> None:
    root = Path(config.run.output_dir) / checkpoint.FOLDER
    copy = shutil.copytree(_save(config, 3), root / "step-00000003-best")
    newest = _save(config, 4)
    assert resume.find(config.run) == newest and checkpoint.finished_steps(copy) == 3
    checkpoint.keep_last(root, 1)
    assert sorted(p.name for p in root.iterdir()) == [copy.name, newest.name]


def test_resume_finds_the_checkpoint_that_was_asked_for(config: Config, tmp_path: Path) -> None:
    """auto: the newest or none; a path: that one; never: none, and no run in the folder."""
    run = config.run
    assert resume.find(run) is None and resume.find(replace(run, resume="never")) is None
    old, new = _save(config, 3), _save(config, 5)
    assert resume.find(run) == new
    with pytest.raises(ConfigError, match=f"{old.name} is followed by {new.name}"):
        resume.find(replace(run, resume=str(old)))
    assert resume.find(replace(run, resume=str(old), output_dir=str(tmp_path / "another"))) == old
    with pytest.raises(ConfigError, match="run.resume: never"):
        resume.find(replace(run, resume="never"))
    with pytest.raises(ConfigError, match="no checkpoint"):
        resume.find(replace(run, resume=str(tmp_path)))


def test_another_runs_checkpoint_does_not_go_into_a_folder_that_holds_a_run(config: Config, tmp_path: Path) -> None:
    """Else that run's checkpoints would be replaced; a run that began from it goes on, as often as the same command is
    given.
    """
    named = _save(config, 3)
    own = replace(config, run=replace(config.run, output_dir=str(tmp_path / "own")))
    begun = replace(own, run=replace(own.run, output_dir=str(tmp_path / "begun"), resume=str(named)))
    _save(own, 2)
    with pytest.raises(
        ConfigError, match=r"is of another run than the one in .*own; run.resume=auto goes on with that"
    ):
        resume.find(replace(own.run, resume=str(named)))
    assert resume.find(begun.run) == named
    _save(begun, 4)
    last = _save(begun, 6)
    shutil.rmtree(named)  # as that run itself does in time
    assert resume.find(begun.run) == last
    (last / "state.json").unlink()
    with pytest.raises(ConfigError, match="bring the file back, or remove .*: the run then goes on from step-00000004"):
        resume.find(begun.run)


@pytest.mark.parametrize("asked", ["auto", "never", "named"])
def test_a_folder_of_exports_without_checkpoints_is_left_alone(config: Config, tmp_path: Path, asked: str) -> None:
    """Whoever removes the checkpoints of a finished run keeps its model."""
    named = str(_save(config, 3)) if asked == "named" else asked
    run = replace(config.run, output_dir=str(tmp_path / "finished"), resume=named)
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "export.json").write_text('{"step": 3}')
    with pytest.raises(ConfigError, match="finished holds the exports of a run without its checkpoints"):
        resume.find(run)


def test_checkpoints_are_in_the_order_of_their_steps(config: Config) -> None:
    """Beyond eight digits too; what a person named by a shorter number is not one of the run's."""
    root = _save(config, 99_999_999).parent
    latest = _save(config, 100_000_000)
    shutil.copytree(latest, root / "step-9")
    assert checkpoint.newest(root) == latest and len(checkpoint.steps(root)) == 2
    checkpoint.keep_last(root, 1)
    assert sorted(p.name for p in root.iterdir()) == ["step-100000000", "step-9"]


def test_a_resume_keeps_what_auto_was_and_refuses_what_changes_the_result(config: Config) -> None:
    """Logging, saving, trackers and places may differ; any other key stops with a list of all that differ."""
    resolved = replace(config, batch=replace(config.batch, tokens_per_chunk=512))
    saved = _save(replace(resolved, batch=replace(resolved.batch, retain=1000, retain_products=2000)), 3)
    assert resume.continued(config, saved) == resolved  # what is kept between the passes is decided anew
    free = replace(
        config,
        batch=replace(config.batch, retain=5, retain_products=7),
        run=replace(config.run, trackers=(), resume="never", output_dir="elsewhere", timeout_s=5),
        train=replace(config.train, log_every=1, save_every=1, keep_last=9),
        data=replace(
            config.data, cache_dir="elsewhere", train=(SourceConfig(path="elsewhere/x"),)
        ),  # the store knows what is in it
    )
    assert resume.continued(free, saved) == replace(free, batch=replace(free.batch, tokens_per_chunk=512))
    changed = replace(config, optim=replace(config.optim, lr=1.0), run=replace(config.run, seed=7))
    with pytest.raises(ConfigError, match=r"(?s)optim.lr: 0.001 -> 1.0.*run.seed: 0 -> 7"):
        resume.continued(changed, saved)
    heavier = replace(config, data=replace(config.data, train=(SourceConfig(path="x", weight=2.0),)))
    with pytest.raises(ConfigError, match="data.train"):
        resume.continued(heavier, saved)


def test_frozen_weights_are_not_saved_and_must_be_the_same_again(config: Config, tmp_path: Path) -> None:
    """With low-rank adapters a checkpoint holds them alone, goes on bitwise over the same model and is refused over
    another.
    """
    config = replace(config, model=replace(config.model, lora=LoraConfig(r=2, dropout=0.1)))
    first, straight = _adapted(config), _train(_adapted(config), range(5))
    start = _train(_adapted(config), range(0))
    _train(first, range(3))
    saved = _save(config, 3, first)
    with safe_open(saved / "model.safetensors", "pt") as weights:
        assert {key.rpartition(".")[2] for key in weights.keys()} == {"lora_a", "lora_b", "log_scale"}  # noqa: SIM118
    resumed = _adapted(config)
    assert checkpoint.load(saved, resumed, "f1") == 3
    ended = _train(resumed, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(ended, straight, strict=True))
    trained = [p.requires_grad for p in resumed.modules().parameters()]
    assert [not torch.equal(a, b) for a, b in zip(ended, start, strict=True)] == trained
    for change in (
        lambda words: words[3, 3].add_(1e-6),
        lambda words: words.copy_(words.flip(0)),
        lambda words: words[:2].copy_(words[[1, 0]]),
    ):
        other = _adapted(config)
        change(next(p for p in other.encoder.parameters() if not p.requires_grad).data)
        with pytest.raises(ConfigError, match="other frozen weights than model.name_or_path holds now"):
            checkpoint.load(saved, other, "f1")


@pytest.mark.parametrize("part", [8, 1 << 22])
def test_a_fingerprint_sees_where_weights_stand(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the parts that are summed at once, and from one part to another."""
    monkeypatch.setattr(checkpoint, "_PART", part)
    weight = torch.arange(30.0).reshape(10, 3)
    orders = [torch.arange(10), torch.arange(10).flip(0), *(torch.arange(10).roll(n) for n in range(1, 10))]
    found = {checkpoint._fingerprint({"weight": weight[order]}) for order in orders}
    assert len(found) == len(orders)
    assert checkpoint._fingerprint({"weight": weight.T.contiguous().T}) == checkpoint._fingerprint({"weight": weight})


def _adapted(config: Config) -> TrainingState:
    """What `_state` gives, with adapters: they are in place before the optimizer looks for what to train."""
    encoder, objective = DualEncoder.from_pretrained(config.model), ContrastiveObjective(config.loss, unit_norm=True)
    assert config.model.lora is not None
    adapt(encoder.towers, config.model.lora, seed=1)
    return TrainingState(encoder, objective, Optimizer(config.optim, [encoder, objective], 8, CPU.device))
