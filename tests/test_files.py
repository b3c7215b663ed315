"""Files and folders that get their names whole: modes, errors, what an earlier crash left, and what must not be
replaced.
"""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from retriever import files

Replace = Callable[[Path], AbstractContextManager[Path]]
BOTH = pytest.mark.parametrize("replace", [files.replace_file, files.replace_folder])


@pytest.fixture(params=[0o022, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def _fill(aside: Path, text: str) -> None:
    (aside / "part" if aside.is_dir() else aside).write_text(text)


def _text(path: Path) -> str:
    return (path / "part" if path.is_dir() else path).read_text()


def test_modes_are_those_of_the_umask(tmp_path: Path, umask: int) -> None:
    """Whoever wrote the file: safetensors makes files that no other user may read."""
    with files.replace_folder(tmp_path / "new" / "model") as aside:
        save_file({"a": torch.ones(2)}, aside / "model.safetensors")
    with files.replace_file(tmp_path / "weights") as aside:
        save_file({"a": torch.ones(2)}, aside)
    files.write_text(tmp_path / "text", "")
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert found == {name: 0o777 & ~umask for name in ("new", "model")} | {
        name: 0o666 & ~umask for name in ("model.safetensors", "weights", "text")
    }


def test_what_is_written_is_read(tmp_path: Path) -> None:
    files.write_text(tmp_path / "text", "é\n")
    files.write_json(tmp_path / "values.json", {"é": [1]})
    files.write_array(tmp_path / "array", np.arange(3))
    assert (tmp_path / "text").read_bytes() == "é\n".encode()
    assert (tmp_path / "values.json").read_text(encoding="utf-8") == '{\n  "é": [\n    1\n  ]\n}\n'
    assert np.load(tmp_path / "array").tolist() == [0, 1, 2]
    for text in "ab":
        files.append_text(tmp_path / "text", text)
    files.sync(tmp_path / "text")
    assert (tmp_path / "text").read_text(encoding="utf-8") == "é\nab"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["array", "text", "values.json"]


@BOTH
def test_what_was_there_stays_after_an_error(tmp_path: Path, replace: Replace) -> None:
    """And nothing else does; an aside that a crash left is no hindrance."""
    target = tmp_path / "target"
    for text in ("old", "new"):
        _fill_folder(tmp_path / ".writing-target")
        with replace(target) as aside:
            _fill(aside, text)
        assert _text(target) == text
    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error), replace(target) as aside:
            _fill(aside, "half")
            raise error
    with pytest.raises(OSError), replace(tmp_path / "absent"):
        raise OSError
    assert _text(target) == "new" and [path.name for path in tmp_path.iterdir()] == ["target"]


def _fill_folder(folder: Path) -> None:
    folder.mkdir()
    (folder / "stale").write_text("")


@BOTH
@pytest.mark.parametrize("operation", ["rename", "sync", "discard"])
def test_an_interruption_anywhere_leaves_the_old_or_the_new(
    tmp_path: Path, replace: Replace, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, stopped = tmp_path / "target", 0
    for at in range(20):
        with replace(target) as aside:
            _fill(aside, "old")
        left = at

        def interrupted(called: str, path: Path) -> None:
            nonlocal left
            left -= called == operation
            if left == -1:
                left = 10**6
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(files, "before", interrupted)
            try:
                with replace(target) as aside:
                    _fill(aside, "new")
                break
            except KeyboardInterrupt:
                stopped += 1
        assert _text(target) in ("old", "new")
        files.clean(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert 1 <= stopped < 20


def test_a_file_never_replaces_a_folder_nor_a_folder_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(IsADirectoryError):
        files.write_text(tmp_path / "folder", "")
    with pytest.raises(NotADirectoryError), files.replace_folder(tmp_path / "file"):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "mine"]


def test_a_removal_that_dies_leaves_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill_folder(tmp_path / "folder")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(files.shutil, "rmtree", die)
        files.remove(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == [".removing-folder"]
    files.clean(tmp_path, "another")
    assert list(tmp_path.iterdir())
    files.clean(tmp_path, "folder")
    assert not list(tmp_path.iterdir())


def test_what_is_gone_already_is_removed(tmp_path: Path) -> None:
    files.remove(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_a_file_that_vanishes_while_it_is_opened_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way it is looked at."""
    path, looked = tmp_path / "lock", list[str]()
    exists, lstat = Path.exists, Path.lstat

    def vanish(where: str) -> None:
        if not looked:
            looked.append(where)
            os.unlink(path)

    def existed(asked: Path) -> bool:
        found = exists(asked)
        vanish("after exists")
        return found

    def seen(asked: Path) -> os.stat_result:
        vanish("before lstat")
        return lstat(asked)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", existed)
        patch.setattr(Path, "lstat", seen)
        with files.alone(path) as file:
            assert os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    assert looked


def test_folders_that_a_file_system_cannot_sync_are_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems; of a file no such error is passed over."""
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if refused(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    refused = stat.S_ISDIR
    files.write_text(tmp_path / "folder" / "text", "x")
    refused = stat.S_ISREG
    with pytest.raises(OSError, match="Invalid argument"):
        files.write_text(tmp_path / "folder" / "text", "y")
    assert (tmp_path / "folder" / "text").read_text() == "x"


@BOTH
def test_planted_links_are_not_followed(tmp_path: Path, replace: Replace) -> None:
    """Under the names of asides and of what is replaced: the links go, what they point to stays."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis").write_text("years of work")
    target = tmp_path / "here" / "model"
    target.parent.mkdir()
    for name in (".writing-model", ".removing-model", *(["model"] if replace is files.replace_folder else [])):
        (target.parent / name).symlink_to(elsewhere)
    with replace(target) as aside:
        (aside / "weights" if aside.is_dir() else aside).write_text("new")
    assert not target.is_symlink() and [path.name for path in target.parent.iterdir()] == ["model"]
    (target.parent / ".writing-other").symlink_to(elsewhere)
    files.clean(target.parent)
    (target.parent / "link").symlink_to(elsewhere)
    files.remove(target.parent / "link")
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert {path.name: path.read_text() for path in elsewhere.iterdir()} == {"thesis": "years of work"}


def test_weights_that_the_system_does_not_take_are_its_error_by_their_name(tmp_path: Path) -> None:
    """safetensors raises an error of its own, which the commands would take for a bug."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))  # bytes
    try:
        with (
            pytest.raises(OSError, match=r"model\.safetensors: .*File too large"),
            files.replace_file(tmp_path / "model.safetensors") as aside,
        ):
            save_file({"weight": torch.ones(1_000)}, aside)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
