"""A stage is worked on once for its inputs: again after a change or a loss, from where it stopped after an
interruption.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from retriever.config import ConfigError
from retriever.lock import LockedError
from scripts.stages import model_fingerprint, run_stage


class Work:
    """Writes `out.txt`, and notes what it found in the folder each time it is called."""

    def __init__(self, text: str = "done", interrupted: bool = False) -> None:
        self.text, self.interrupted = text, interrupted
        self.found: list[list[str]] = []

    def __call__(self, folder: Path) -> list[str]:
        self.found.append(sorted(f.name for f in folder.iterdir() if f.name != ".lock"))
        (folder / "part").write_text("half")
        if self.interrupted:
            raise KeyboardInterrupt
        (folder / "out.txt").write_text(self.text)
        return ["out.txt"]


def _run(folder: Path, work: Work, **inputs: Any) -> dict[str, str]:
    return dict(run_stage("stage", folder, {"data": "a", **inputs}, work, writes=("part", "out.*", "folder")))


def test_the_same_inputs_are_worked_on_once(tmp_path: Path) -> None:
    """The second time the outputs' hashes come from the manifest; tuples and lists are the same inputs."""
    work = Work()
    first = _run(tmp_path / "s", work, ranks=(1, 2))
    assert _run(tmp_path / "s", work, ranks=[1, 2]) == first
    assert len(work.found) == 1
    assert _run(tmp_path / "t", Work("other"))["out.txt"] != first["out.txt"]


def test_an_interrupted_stage_finds_what_it_left(tmp_path: Path) -> None:
    work = Work(interrupted=True)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "s", work)
    work.interrupted = False
    _run(tmp_path / "s", work)
    assert work.found == [["job.json"], ["job.json", "part"]]


def test_other_inputs_start_from_an_empty_folder(tmp_path: Path) -> None:
    """What another job left, folders too, is gone before the work begins."""
    work = Work()
    _run(tmp_path / "s", work)
    (tmp_path / "s" / "folder").mkdir()
    _run(tmp_path / "s", work, seed=1)
    assert work.found == [["job.json"], ["job.json"]]


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_lost_output_is_made_again(tmp_path: Path, damage: str) -> None:
    work = Work()
    first, output = _run(tmp_path / "s", work), tmp_path / "s" / "out.txt"
    if damage == "missing":
        output.unlink()
    else:
        output.write_text("d")
    assert _run(tmp_path / "s", work) == first
    assert len(work.found) == 2 and output.read_text() == "done"


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"thesis.txt": "years of work"}, "thesis.txt"),
        ({"out.txt": "mine"}, "out.txt"),
        ({"job.json": "{}", "out.txt": "mine"}, "job.json"),
        ({"job.json": '{"name": "nightly"}', "out.txt": "mine"}, "job.json"),
        ({"manifest.json": "[]"}, "manifest.json"),
        ({"manifest.json": "{", "out.txt": "mine"}, "manifest.json"),
    ],
)
def test_a_folder_of_somebody_elses_is_refused(tmp_path: Path, files: dict[str, str], named: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    work = Work()
    with pytest.raises(ConfigError, match=rf"{tmp_path / named} was not written by the stage stage; move it elsewhere"):
        _run(tmp_path, work)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == files and not work.found


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("name", ["query/thesis.txt", "query/notes/thesis.npy", "thesis/00000.npy"])
def test_what_a_person_put_into_a_folder_of_a_stage_is_left_alone(tmp_path: Path, name: str, interrupted: bool) -> None:
    """Only files whose names the stage writes there are its own; they go, and then the folder."""

    def work(folder: Path) -> list[str]:
        assert [entry.name for entry in folder.iterdir() if entry.name != ".lock"] == ["job.json"]
        (folder / "query").mkdir()
        (folder / "query" / "00000.npy").write_text("shard")
        if interrupted:
            raise KeyboardInterrupt
        return ["query/00000.npy"]

    def run(data: str) -> None:
        with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
            run_stage("stage", tmp_path / "s", {"data": data}, work, writes=["query/*.npy"])

    run("a")
    own = tmp_path / "s" / name
    own.parent.mkdir(exist_ok=True, parents=True)
    own.write_text("years of work")
    named = "/".join(name.split("/")[:2]) if name.startswith("query") else "thesis"
    with pytest.raises(ConfigError, match=f"s/{named} was not written by the stage stage"):
        run_stage("stage", tmp_path / "s", {"data": "b"}, work, writes=["query/*.npy"])
    assert own.read_text() == "years of work" and (tmp_path / "s" / "query" / "00000.npy").exists()
    own.rename(tmp_path / "thesis")
    if own.parent != tmp_path / "s" / "query":
        own.parent.rmdir()
    run("b")


def test_an_output_that_vanishes_while_it_is_looked_at_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another process clears the folder."""
    work, output = Work(), tmp_path / "s" / "out.txt"
    first, status = _run(tmp_path / "s", work), Path.stat

    def vanished(path: Path, **options: Any) -> os.stat_result:
        if path == output and len(work.found) == 1:
            output.unlink(missing_ok=True)
        return status(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", lambda path: True)  # when it was asked for
        patch.setattr(Path, "stat", vanished)
        assert _run(tmp_path / "s", work) == first
    assert len(work.found) == 2


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("earlier", [False, True])
def test_what_a_person_put_into_a_stage_is_left_alone(tmp_path: Path, interrupted: bool, earlier: bool) -> None:
    """Of this version's stage or an earlier one's; and other inputs clear the folder once it is away."""
    folder, work = tmp_path / "s", Work(interrupted=interrupted)
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        _run(folder, work)
    if earlier:
        (folder / "checksums.json").unlink(missing_ok=True)
        (folder / "job.json").write_text('{"data": "a"}')
    (folder / "thesis.txt").write_text("years of work")
    before = sorted(folder.iterdir())
    work.interrupted = False
    for inputs in ({"data": "b"}, {} if interrupted else {"data": "c"}):
        with pytest.raises(ConfigError, match="s/thesis.txt was not written by the stage stage"):
            _run(folder, work, **inputs)
    assert sorted(folder.iterdir()) == before
    (folder / "thesis.txt").rename(tmp_path / "thesis.txt")
    _run(folder, work, data="b")
    assert work.found[1:] == [["job.json"]]


def test_a_link_in_place_of_an_output_is_left_alone(tmp_path: Path) -> None:
    work = Work()
    _run(tmp_path / "s", work)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "s" / "folder").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="s/folder was not written"):
        _run(tmp_path / "s", work, data="b")
    assert (tmp_path / "elsewhere").is_dir()


def test_an_output_with_a_changed_bit_is_made_again(tmp_path: Path) -> None:
    """Of the same size, it is not taken for what the work left."""
    work = Work()
    first = _run(tmp_path / "s", work)
    (tmp_path / "s" / "out.txt").write_text("dome")
    assert _run(tmp_path / "s", work) == first
    assert work.found[1:] == [["job.json", "part"]] and (tmp_path / "s" / "out.txt").read_text() == "done"


def test_a_stage_is_worked_on_by_one_process(tmp_path: Path) -> None:
    def work(folder: Path) -> list[str]:
        with pytest.raises(LockedError, match=rf"{tmp_path / 's'} is in use by process {os.getpid()} on "):
            _run(tmp_path / "s", Work())
        return Work()(folder)

    assert run_stage("stage", tmp_path / "s", {"data": "a"}, work, writes=["part", "out.txt"]).keys() == {"out.txt"}
    assert not (tmp_path / "s" / ".lock").exists()


def test_a_models_fingerprint_is_its_content(tmp_path: Path) -> None:
    """The same files elsewhere are the same model, a README is no part of it, and other weights are another model."""
    for name, weights in (("a", "w"), ("b", "w"), ("c", "x")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(weights)
        (tmp_path / name / "README.md").write_text(name)
    a, b, c = (model_fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c
    assert model_fingerprint("org/model") == "org/model"
