"""Damaged checkpoints: each is named in one line before a model is read, with a way on where one is known, and never a
whole one.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from retriever import checkpoint, resume
from retriever.checkpoint import Snapshot, TrainingState
from retriever.config import Config, ConfigError, RunConfig
from retriever.damage import damage
from retriever.optim import Optimizer

_TENSORS = {"bias": torch.ones(3), "weight": torch.arange(30.0)}
_PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(run=RunConfig(output_dir=str(tmp_path / "run")))


def _one_model(export: Path) -> None:
    export.mkdir(parents=True)
    save_file(_TENSORS, export / "model.safetensors")


def _two_towers(export: Path) -> None:
    for side in ("query", "passage"):
        _one_model(export / side)


def _model_in_parts(export: Path) -> None:
    export.mkdir()
    for part in _PARTS:
        save_file({part: torch.ones(3)}, export / part)
    (export / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {part: part for part in _PARTS}})
    )


def _save(config: Config, step: int, export: Callable[[Path], None] = _one_model) -> Path:
    root = Path(config.run.output_dir) / checkpoint.FOLDER
    return checkpoint.save(root, step, Snapshot(_TENSORS, _TENSORS, {}, ""), config, "f1", export)


def _damage(file: Path, how: str) -> None:
    if how == "missing":
        shutil.rmtree(file) if file.is_dir() else file.unlink()
        return
    content = file.read_bytes()
    file.write_bytes({"short": content[: len(content) * 2 // 3], "empty": b"", "zeros": bytes(len(content))}[how])


def _refused(asked: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as stopped:
        asked()
    said = str(stopped.value)
    assert "\n" not in said and "None" not in said, said
    return said


@pytest.mark.parametrize("how", ["one bit", "zeroed half", "without a tensor"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "export/model.safetensors"])
def test_values_that_are_not_those_written_are_damage(config: Config, name: str, how: str) -> None:
    """The file's length and header are in order, so that only its checksum tells."""
    before, last = _save(config, 3), _save(config, 5)
    file = last / name
    content = bytearray(file.read_bytes())
    if how == "one bit":
        content[-5] ^= 1
        file.write_bytes(content)
    elif how == "zeroed half":
        file.write_bytes(content[: len(content) - 60] + bytes(60))
    else:
        save_file({key: tensor for key, tensor in _TENSORS.items() if key != "bias"}, file)
    assert len(load_file(file)) == len(_TENSORS) - (how == "without a tensor"), "it is still a file of tensors"
    said = _refused(lambda: resume.find(config.run))
    assert re.match(rf"{file} is damaged \(its checksum is \w{{16}}; \w{{16}} was written\)", said), said
    assert said.endswith(f"remove {last}: the run then goes on from {before.name}")


@pytest.mark.parametrize(
    ("step", "expected"), [(1, "5, as the folder is named, received 1"), ("two", 'a number of steps, received "two"')]
)
def test_a_step_that_is_not_the_folders_is_damage(config: Config, step: object, expected: str) -> None:
    """With checksums and, as in a checkpoint of an earlier version, without."""
    before, last = _save(config, 3), _save(config, 5)
    state = json.loads((last / "state.json").read_text()) | {"step": step}
    (last / "state.json").write_text(json.dumps(state))
    for _ in range(2):
        said = _refused(lambda: resume.find(config.run))
        assert (
            said.startswith(f"{last / 'state.json'} is damaged (step: expected {expected})") and before.name in said
        ), said
        (last / "checksums.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"algorithm": "crc32", "files": {}}', '{"algorithm": "xxh3_64", "files": {"../x": "0"}}']
)
def test_checksums_that_cannot_be_used_are_damage(config: Config, content: str) -> None:
    last = _save(config, 5)
    (last / "checksums.json").write_text(content)
    assert _refused(lambda: resume.find(config.run)).startswith(f"{last / 'checksums.json'} is damaged (")


def test_a_checkpoint_without_checksums_opens_with_a_notice(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """Once, however often it is looked at."""
    last = _save(config, 5)
    (last / "checksums.json").unlink()
    assert resume.find(config.run) == last == resume.find(config.run)
    notice = f"note: {last} is of an earlier version and has no checksums: its files are not verified\n"
    assert capsys.readouterr().out == notice


def test_tensors_of_another_model_are_told_in_one_line(config: Config) -> None:
    """As a checkpoint of an earlier version, whose files nobody can verify, may hold them."""
    model = torch.nn.Linear(3, 2)
    optimizer = Optimizer(config.optim, [model], 8, torch.device("cpu"))
    said = _refused(lambda: checkpoint.load(_save(config, 5), TrainingState(model, torch.nn.Module(), optimizer), "f1"))
    assert "step-00000005 does not fit the model and optimizer of this run (Error(s) in loading state_dict" in said


_FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "export/model.safetensors")


@pytest.mark.parametrize(
    ("name", "how"), [*product(_FILES, ("short", "empty", "zeros", "missing")), ("export", "missing")]
)
def test_a_damaged_checkpoint_is_named_with_the_whole_one_before_it(config: Config, name: str, how: str) -> None:
    """Each file cut short, empty, zeros as a disk leaves it that lost its power, or not there."""
    oldest, before, last = (_save(config, step) for step in (2, 3, 5))
    assert resume.find(config.run) == last
    _damage(last / name, how)
    said = _refused(lambda: resume.find(config.run))
    assert (
        said.startswith(f"{last / name}") and f"remove {last}" in said and said.endswith(f"goes on from {before.name}")
    ), said
    _damage(before / "model.safetensors", "short")
    said = _refused(lambda: resume.find(config.run))
    assert said.endswith(f"remove {before}, {last}: the run then goes on from {oldest.name}")
    shutil.rmtree(oldest)
    assert "no checkpoint before it is whole" in _refused(lambda: resume.find(config.run))


_EXPORTS = {
    _one_model: ("model.safetensors",),
    _two_towers: ("query/model.safetensors", "passage/model.safetensors", "query", "passage"),
    _model_in_parts: ("model.safetensors.index.json", *_PARTS),
}


@pytest.mark.parametrize(("export", "name"), [(export, name) for export, names in _EXPORTS.items() for name in names])
def test_an_export_holds_all_its_weights(config: Config, export: Callable[[Path], None], name: str) -> None:
    """Of one model, of two towers, and of a model whose weights are too many for one file."""
    saved = _save(config, 3, export)
    assert damage(saved) is None
    _damage(saved / "export" / name, "missing")
    missing = "model.safetensors" if name.endswith(".json") else name
    assert str(damage(saved)).startswith(f"{saved / 'export' / missing}") and str(damage(saved)).endswith(" is missing")


def test_an_empty_export_is_not_whole(config: Config) -> None:
    saved = _save(config, 3, lambda export: export.mkdir())
    assert damage(saved) == f"{saved / 'export' / 'model.safetensors'} is missing"


@pytest.mark.parametrize(
    "content", ["[]", "null", "3", '"state"', "{}", '{"format_version": 1}', '{"format_version": 1, "step": 3}']
)
def test_a_state_that_says_too_little_is_damaged(config: Config, content: str) -> None:
    """Whatever JSON stands in it, and whoever asks."""
    before, last = _save(config, 3), _save(config, 5)
    (last / "state.json").write_text(content)
    assert _refused(lambda: resume.find(config.run)).endswith(f"goes on from {before.name}")
    for asked in (checkpoint.finished_steps, lambda folder: resume.continued(config, folder)):
        said = _refused(lambda asked=asked: asked(last))  # type: ignore[misc]
        assert said.startswith(f"{last} is no checkpoint to go on from: {last / 'state.json'} is damaged ("), said


def test_a_state_of_another_format_is_not_damaged(config: Config) -> None:
    """What another version leaves out is its own affair."""
    saved = _save(config, 3)
    (saved / "state.json").write_text('{"format_version": 99}')
    (saved / "checksums.json").unlink()
    assert damage(saved) is None and resume.find(config.run) == saved
    assert "checkpoint format 99; this version reads 1" in _refused(lambda: checkpoint.finished_steps(saved))


def test_a_damaged_checkpoint_that_was_asked_for_by_name_is_refused(config: Config, tmp_path: Path) -> None:
    named = _save(config, 3).rename(tmp_path / "kept")
    _damage(named / "optimizer.safetensors", "short")
    with pytest.raises(
        ConfigError,
        match=r"run.resume: .*kept is no checkpoint to go on from: .*kept/optimizer\.safetensors is damaged",
    ):
        resume.find(replace(config.run, resume=str(named)))


@pytest.mark.parametrize("name", _FILES)
def test_a_file_that_cannot_be_read_is_not_called_damaged(config: Config, name: str) -> None:
    """A link to itself stands for rights that are missing and mounts that went stale: nobody is told to remove a whole
    checkpoint.
    """
    oldest, before, last = (_save(config, step) for step in (2, 3, 5))
    content = (last / name).read_bytes()

    def unreadable(file: Path) -> str:
        file.unlink()
        file.symlink_to(file)
        return f"{file} cannot be read (Too many levels of symbolic links); start again once it can"

    expected = unreadable(last / name)
    for run in (config.run, replace(config.run, resume=str(last))):
        assert _refused(lambda run=run: resume.find(run)) == expected  # type: ignore[misc]
    (last / name).unlink()
    (last / name).write_bytes(content)
    assert resume.find(config.run) == last
    _damage(last / name, "short")
    expected = unreadable(before / name)
    said = _refused(lambda: resume.find(config.run))
    assert said.startswith(f"{last / name} is damaged") and said.endswith(expected) and "remove" not in said
    assert damage(oldest) is None


def test_a_fault_that_passes_is_told_as_it_was(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, whole = _save(config, 3), Path.read_text

    def once(file: Path, *arguments: Any, **named: Any) -> str:
        monkeypatch.setattr(Path, "read_text", whole)
        raise OSError(errno.EIO, "Input/output error", str(file))

    monkeypatch.setattr(Path, "read_text", once)
    assert "Input/output error" in _refused(lambda: checkpoint.finished_steps(saved))
    assert checkpoint.finished_steps(saved) == 3
