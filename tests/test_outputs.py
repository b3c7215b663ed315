"""A checkpoint that a signal asks for in the middle of a step, and what waits for one that is being written."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retriever import checkpoint, outputs
from retriever.config import Config, OptimConfig, RunConfig
from retriever.optim import Optimizer
from retriever.outputs import Outputs
from retriever.parallel.world import World
from retriever.published import Published


class _Run:
    """Outputs of a run after `updates` updates; writes down what is copied where, and what is encoded and saved."""

    def __init__(self, folder: Path, device: str, updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.hold = threading.Event()  # until it is set, nothing is written
        self.optimizer = SimpleNamespace(updates=updates, updating=threading.RLock(), averages={})
        placed = SimpleNamespace(copy=lambda keep: "the copy", whole=lambda device: "the live encoder")
        store = SimpleNamespace(fingerprint="f1", passages=())
        config = Config(run=RunConfig(output_dir=str(folder)))
        state = SimpleNamespace(optimizer=self.optimizer)
        arguments: Any = (config, state, placed, None, store, World(torch.device(device)))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "a stream of its own")
        monkeypatch.setattr(torch.cuda, "stream", self._stream)
        monkeypatch.setattr(checkpoint, "snapshot", lambda state, keep: self.events.append("copied"))
        monkeypatch.setattr(checkpoint, "save", self._save)
        monkeypatch.setattr(outputs, "Probe", SimpleNamespace(of=lambda encoder, *_: self.events.append(encoder)))
        monkeypatch.setattr(Published, "export", lambda published, step: None)
        monkeypatch.setattr(Published, "report", lambda published: None)
        self.outputs = Outputs(*arguments)

    @contextmanager
    def _stream(self, stream: str) -> Iterator[None]:
        self.events.append(stream)
        yield
        self.events.append("back")

    def _save(self, root: Path, step: int, *_: object) -> None:
        assert self.hold.wait(10)
        self.events.append(f"saved {step}")


def test_a_late_save_does_not_wait_for_the_step_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It copies in a stream of its own and encodes on the host. An ordinary save comes after what is queued."""
    run = _Run(tmp_path, "cuda", 3, monkeypatch)
    run.hold.set()
    assert run.outputs.save_last_update() == 3
    assert run.events == ["a stream of its own", "copied", "back", "the copy", "saved 3"]
    assert run.outputs.save_last_update() == 3 and len(run.events) == 5, "it is saved already"
    run.events.clear()
    run.outputs.save(4)
    run.outputs.wait()
    assert run.events == ["copied", "the live encoder", "saved 4"]


def test_a_signal_does_not_wait_for_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation holds the parameters; all is saved by then."""
    run = _Run(tmp_path, "cpu", 2, monkeypatch)
    run.hold.set()
    run.outputs.save(2)
    optimizer = Optimizer(OptimConfig(precision="fp32"), [torch.nn.Linear(1, 1)], 4, torch.device("cpu"))
    monkeypatch.setattr(run.optimizer, "updating", optimizer.updating)
    found: list[int] = []
    late = threading.Thread(target=lambda: found.append(run.outputs.save_last_update()), daemon=True)
    with optimizer.averaged():
        late.start()
        late.join(2)
        assert found == [2]


def test_before_the_first_update_there_is_nothing_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _Run(tmp_path, "cpu", 0, monkeypatch)
    assert run.outputs.save_last_update() == 0 and run.events == []


def test_a_run_that_ends_waits_for_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most as long as it is told."""
    run = _Run(tmp_path, "cpu", 1, monkeypatch)
    run.outputs.save(1)
    started = time.monotonic()
    run.outputs.close(0.2)
    assert 0.2 <= time.monotonic() - started < 5 and run.events == ["copied", "the live encoder"]
    run.hold.set()
    run.outputs.close(10)
    assert run.events[-1] == "saved 1"
