"""Callbacks on two ranks: either may stop the run, and an error in one ends it on both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigbatch import Callback, Run
from retriever.errors import LOST
from tests.determinism import make_strict
from tests.starts import FORKSERVER, free_port
from tests.workplace import make_workplace, metrics


class _Stop(Callback):
    """One rank stops the run at one event; the first alone hears what is logged."""

    def __init__(self, event: str, rank: int) -> None:
        self._event, self._rank = event, rank

    def _stop(self, event: str, run: Any) -> None:
        run.should_stop = run.should_stop or (event == self._event and run.world.rank == self._rank)

    def on_train_begin(self, run: Any) -> None:
        self._stop("begin", run)

    def on_log(self, run: Any, values: dict[str, Any]) -> None:
        assert run.world.is_first
        self._stop("log evaluation" if "eval/MRR@10" in values else "log", run)

    def on_evaluate(self, run: Any, measures: Mapping[str, float]) -> None:
        self._stop("evaluate", run)

    def on_save(self, run: Any) -> None:
        self._stop("save", run)


class _Fail(Callback):
    def on_log(self, run: Any, values: dict[str, Any]) -> None:
        raise ZeroDivisionError("by a callback")


_UNMEASURED = ["eval=null", "train.eval_every=0"]
RUNS: dict[str, tuple[Callback, list[str]]] = {
    "stop": (_Stop("save", 1), _UNMEASURED),
    "begin": (_Stop("begin", 1), ["eval.patience=2"]),
    "start": (_Stop("evaluate", 1), ["eval.at_start=true"]),
    "patience": (_Stop("log evaluation", 0), ["eval.patience=2", "train.eval_every=1"]),
    "fail": (_Fail(), _UNMEASURED),
}


def _rank(rank: int, folder: Path, ports: list[int]) -> None:
    """Trains several times in one process, and writes down how each run ended."""
    make_strict()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for (name, (callback, own)), port in zip(RUNS.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        settings = [
            "train.log_every=1",
            "train.save_every=2",
            "run.trackers=[]",
            "run.timeout_s=20",
            *own,
        ]
        run = Run(folder / "run.yaml", [*settings, f"run.output_dir={folder / name}"], callbacks=[callback])
        try:
            run.train()
            ended = f"after {run.done}"
        except Exception as error:
            ended = f"{type(error).__name__}: {error}"
        (folder / f"{name}-{rank}").write_text(ended)
    os._exit(LOST)


def test_either_rank_stops_the_run_and_an_error_ends_it_on_both(tmp_path: Path) -> None:
    make_workplace(tmp_path)
    ports = [free_port() for _ in RUNS]
    ranks = [FORKSERVER.Process(target=_rank, args=(rank, tmp_path, ports)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [LOST, LOST], "one hangs"
    for name, steps in {"stop": 2, "begin": 0, "start": 0, "patience": 1}.items():
        assert [(tmp_path / f"{name}-{rank}").read_text() for rank in range(2)] == [f"after {steps}"] * 2, name
    assert [line["step"] for line in metrics(tmp_path / "stop")] == [1, 2]
    assert (tmp_path / "fail-0").read_text() == "ZeroDivisionError: by a callback"
    second = tmp_path / "fail-1"  # missing where its main thread waited for the first rank, and another ended it
    assert not second.exists() or "rank 0 ended with ZeroDivisionError: by a callback" in second.read_text()
