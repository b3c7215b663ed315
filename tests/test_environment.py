"""A tracker that is not there stops a command with one line, before transformers is imported."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path

import pytest
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from accelerate.utils.imports import is_swanlab_available

from retriever.config_tree import ConfigError
from retriever.environment import check_environment, check_trackers


def test_this_environment_passes() -> None:
    check_environment()


def test_trackers_are_those_that_accelerate_knows_and_finds() -> None:
    """It raises for an unknown one, and leaves one out without a word whose package is not installed."""
    found = {str(tracker) for tracker in get_available_trackers()}
    assert "tensorboard" in found
    for name in LoggerType.list():
        if name in found or name == "all":
            check_trackers((name,))
        else:
            with pytest.raises(
                ConfigError, match=f"run.trackers: {name} .* not installed.*pip install {name.replace('_', '-')}"
            ):
                check_trackers(("tensorboard", name))


def test_an_unknown_tracker_is_named_with_the_known_ones() -> None:
    check_trackers(())
    with pytest.raises(ConfigError, match="run.trackers: expected .*'foo'") as refused:
        check_trackers(("tensorboard", "foo"))
    assert all(name in str(refused.value) for name in LoggerType.list())


def test_a_folder_named_as_a_tracker_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb writes its runs to ./wandb."""
    (tmp_path / "swanlab").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="swanlab is not installed"):
        check_trackers(("swanlab",))


def test_a_tracker_of_another_distribution_is_refused_as_accelerate_leaves_it_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tb-nightly brings tensorboard's module: accelerate would train without it and say nothing."""
    (tmp_path / "swanlab").mkdir()
    (tmp_path / "swanlab" / "__init__.py").write_text("")
    metadata = tmp_path / "swanlab_nightly-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: swanlab-nightly\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("swanlab") is not None and not is_swanlab_available()
    with pytest.raises(
        ConfigError, match="swanlab is not installed .no distribution swanlab, which accelerate asks for"
    ):
        check_trackers(("swanlab",))
    metadata.rename(tmp_path / "swanlab-1.0.dist-info")
    (tmp_path / "swanlab-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: swanlab\nVersion: 1.0\n")
    assert is_swanlab_available()
    check_trackers(("swanlab",))


@pytest.mark.parametrize(("rank", "logs"), [(None, True), ("0", True), ("1", False), ("8", False)])
def test_trackers_are_asked_for_where_they_are_used(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, logs: bool
) -> None:
    """A node of workers may lack them: were it to stop alone, the others would wait for it. Unknown names are wrong
    everywhere.
    """
    monkeypatch.delenv("RANK", raising=False) if rank is None else monkeypatch.setenv("RANK", rank)
    assert "dvclive" not in map(str, get_available_trackers())
    with pytest.raises(ConfigError, match="dvclive is not installed") if logs else nullcontext():
        check_trackers(("dvclive",))
    with pytest.raises(ConfigError, match="'foo'"):
        check_trackers(("foo",))
