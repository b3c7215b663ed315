"""A run's folder: one process trains in it, and nothing in it that no run wrote is replaced, removed or written
through.
"""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from retriever.config import Config, ConfigError, EvalConfig, ModelConfig, RunConfig, SourceConfig, to_yaml
from retriever.lock import LockedError
from retriever.run_folder import held, remove_embeddings, remove_run, take
from retriever.train import main
from tests.commands import assert_refused
from tests.starts import start
from tests.workplace import training_arguments

NAMES = (
    "config.yaml",
    "checkpoints",
    "metrics.jsonl",
    "export",
    "export.json",
    "report.html",
    "best",
    "best.json",
    "embeddings",
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(run=RunConfig(output_dir=str(tmp_path / "run")), eval=EvalConfig(path="x"))


def _put(entry: Path) -> None:
    """A person's own file, or folder with one."""
    file = entry if entry.suffix else entry / "thesis.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("years of work")


def _start(config: Config) -> None:
    with held(config):
        take(config)


def _refused(config: Config) -> str:
    with pytest.raises(ConfigError) as refused:
        _start(config)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", NAMES)
def test_what_no_run_wrote_is_refused_by_name_and_left_alone(config: Config, tmp_path: Path, name: str) -> None:
    entry = tmp_path / "run" / name
    _put(entry)
    assert (
        _refused(config)
        == f"{entry} was not written by a run of this folder; move it elsewhere, or choose another run.output_dir"
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name], "something else was left"
    entry.rename(tmp_path / "elsewhere")
    _start(config)
    _put(tmp_path / "run" / "notes.txt")
    _put(entry)
    _start(config)  # it is the run's own from now on


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("taken", [False, True])
def test_a_link_is_not_followed(config: Config, tmp_path: Path, name: str, taken: bool) -> None:
    """Also in a folder where a run took that name."""
    if taken:
        _start(config)
    _put(tmp_path / "elsewhere")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    assert _refused(config).startswith(f"{tmp_path / 'run' / name} is a symbolic link, which a run does not follow")
    assert (tmp_path / "elsewhere" / "thesis.txt").read_text() == "years of work"


def test_the_embeddings_of_evaluations_are_the_runs_until_it_ends(config: Config, tmp_path: Path) -> None:
    _start(config)
    embeddings = tmp_path / "run" / "embeddings"
    _put(embeddings)
    _start(config)
    remove_embeddings(tmp_path / "run")
    assert not embeddings.exists()
    _put(embeddings)
    assert _refused(config).startswith(f"{embeddings} was not written by a run")


def test_a_run_without_evaluations_takes_none_of_their_names(config: Config, tmp_path: Path) -> None:
    _put(tmp_path / "run" / "best")
    plain = Config(run=config.run)
    _start(plain)
    assert _refused(config).startswith(f"{tmp_path / 'run' / 'best'} was not written")


def test_a_run_without_evaluations_leaves_a_persons_embeddings(config: Config, tmp_path: Path) -> None:
    """At its start, at its end, and when it is started again after its end."""
    embeddings, plain = tmp_path / "run" / "embeddings", replace(config, eval=None)
    _put(embeddings)
    for _ in range(2):
        with held(plain):
            take(plain)
            remove_embeddings(tmp_path / "run")
        assert any(embeddings.iterdir())


def test_a_run_of_an_earlier_version_goes_on(config: Config, tmp_path: Path) -> None:
    """It kept no list; a person's configuration beside other files makes no run."""
    run = tmp_path / "run"
    for name in NAMES:
        _put(run / name)
    shutil.rmtree(run / "embeddings")
    (run / "config.yaml").write_text(to_yaml(config))
    _put(run / "embeddings" / "passages")
    _start(config)
    assert not (run / "embeddings").exists()
    assert {path.name for path in run.iterdir()} == {*NAMES, ".bigbatch"} - {"embeddings"}
    for change in (
        lambda: (run / "config.yaml").write_text("model: {tied: false}"),
        lambda: (run / "checkpoints").rename(tmp_path / "kept"),
        lambda: _put(run / "embeddings" / "mine"),
    ):
        shutil.rmtree(run)
        for name in NAMES[:-1]:
            _put(run / name)
        (run / "config.yaml").write_text(to_yaml(config))
        shutil.rmtree(tmp_path / "kept", ignore_errors=True)
        change()
        assert "was not written by a run of this folder" in _refused(config)


def test_what_a_run_wrote_is_removed_and_nothing_else(config: Config, tmp_path: Path) -> None:
    """Not while a run works there, and not from a folder that no run wrote."""
    run = tmp_path / "run"
    remove_run(run)
    assert not run.exists()
    with held(config):
        take(config)
        for name in (*NAMES, "logs"):
            _put(run / name)
        with pytest.raises(LockedError, match="run is in use by process"):
            remove_run(run)
        assert {path.name for path in run.iterdir()} == {*NAMES, "logs", ".bigbatch", ".lock"}
    _put(run / "notes.txt")
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(ConfigError, match="link was not written by a run; move it elsewhere"):
        remove_run(tmp_path / "link")
    remove_run(run)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
    with pytest.raises(ConfigError, match="run was not written by a run; move it elsewhere"):
        remove_run(run)


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize(
    ("name", "found", "expected"), [("metrics.jsonl", "folder", "file"), ("export", "file", "folder")]
)
def test_a_folder_instead_of_a_file_is_refused(
    config: Config, tmp_path: Path, name: str, found: str, expected: str, taken: bool
) -> None:
    """Or a file instead of a folder: also under a name that a run took, and an empty one."""
    if taken:
        _start(config)
    entry = tmp_path / "run" / name
    entry.parent.mkdir(exist_ok=True)
    entry.mkdir() if found == "folder" else entry.touch()
    said = _refused(config)
    if taken or found == "folder":
        assert said.startswith(f"{entry} is a {found}; expected a {expected}: move it elsewhere")
    else:
        assert said.startswith(f"{entry} was not written by a run")


def test_a_place_where_no_run_can_write_is_refused(config: Config, tmp_path: Path) -> None:
    """A file, and the model's own folder or a folder in it."""
    (tmp_path / "run").write_text("mine")
    assert _refused(config).startswith(f"run.output_dir: {tmp_path / 'run'} is a file; expected a folder")
    _put(tmp_path / "model" / "config.json")
    for place in (tmp_path / "model", tmp_path / "model" / "runs" / "a", tmp_path / "x" / ".." / "model"):
        inside = replace(config, run=RunConfig(output_dir=str(place)), model=ModelConfig(str(tmp_path / "model")))
        assert (
            _refused(inside)
            == f"run.output_dir: {place} is in the model folder {tmp_path / 'model'}; expected a folder elsewhere"
        )
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    _put(tmp_path / "pairs" / "corpus.jsonl")
    run, train = RunConfig(output_dir=f"{tmp_path}/pairs"), (SourceConfig(f"{tmp_path}/x/../pairs"),)
    onto = replace(config, run=run, data=replace(config.data, train=train))
    assert _refused(onto) == f"run.output_dir: {tmp_path}/pairs holds the data; expected a folder elsewhere"


def test_a_damaged_list_is_told(config: Config, tmp_path: Path) -> None:
    _start(config)
    (tmp_path / "run" / ".bigbatch").write_text("[]")
    assert _refused(config).startswith(f"{tmp_path / 'run' / '.bigbatch'} is damaged (")


def test_a_run_that_is_refused_leaves_nothing(config: Config, tmp_path: Path) -> None:
    with pytest.raises(KeyError), held(config):
        raise KeyError
    assert not (tmp_path / "run").exists()


def test_ranks_but_the_first_and_a_preflight_hold_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(Config(run=RunConfig(output_dir=config.run.output_dir, preflight="only"))):
        assert not (tmp_path / "run").exists()
    with held(config):
        with (
            pytest.raises(LockedError, match=rf"{tmp_path / 'run'} is in use by process {os.getpid()} on "),
            held(config),
        ):
            pass
        monkeypatch.setenv("RANK", "1")
        with held(config):
            pass


def test_of_two_starts_one_trains_and_the_other_is_refused(workplace: Path) -> None:
    """The first is named; once it is killed the same command goes on at once."""
    short = ("train.max_steps=6", "run.trackers=[]", "eval=null", "train.eval_every=0", "run.preflight=off")
    arguments, lock = training_arguments(workplace, "twice", *short), workplace / "twice" / ".lock"
    first = start(workplace, arguments)
    first.until(lambda: lock.exists() and lock.read_text() != "")
    first.signal(signal.SIGSTOP)
    process = f"process {first.processes[0].pid} on {os.uname().nodename}"
    assert_refused(main, arguments, f"twice is in use by {process} since 2")
    first.signal(signal.SIGKILL)
    first.wait()
    assert main(arguments) == 0
    assert not lock.exists()


def test_the_train_command_refuses_before_it_computes(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _put(workplace / "own" / "export")
    monkeypatch.setattr("retriever.assembly._prepare", lambda config: pytest.fail("training began"))
    assert_refused(main, training_arguments(workplace, "own"), "own/export was not written by a run of this folder")
