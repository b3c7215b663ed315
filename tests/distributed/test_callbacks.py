"""Callbacks on two ranks: either may stop the run, and an error in one ends it on both."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bigbatch import Callback, Run
from retriever.errors import LOST
from tests.determinism import make_strict
from tests.starts import FORKSERVER, free_port
from tests.workplace import make_workplace, metrics


class _Stop(Callback):
    """The second rank stops when step 2 is saved, which is after the step; the first alone hears what is logged."""

    def on_save(self, run: Any) -> None:
        run.should_stop = run.world.rank == 1

    def on_log(self, run: Any, values: dict[str, Any]) -> None:
        assert run.world.is_first


class _Fail(Callback):
    def on_log(self, run: Any, values: dict[str, Any]) -> None:
        raise ZeroDivisionError("by a callback")


def _rank(rank: int, folder: Path, ports: list[int]) -> None:
    """Trains twice in one process, and writes down how each run ended."""
    make_strict()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, callback, port in zip(("stop", "fail"), (_Stop(), _Fail()), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        settings = [
            "train.log_every=1",
            "train.save_every=2",
            "eval=null",
            "train.eval_every=0",
            "run.trackers=[]",
            "run.timeout_s=20",
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
    ports = [free_port(), free_port()]
    ranks = [FORKSERVER.Process(target=_rank, args=(rank, tmp_path, ports)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [LOST, LOST], "one hangs"
    assert [(tmp_path / f"stop-{rank}").read_text() for rank in range(2)] == ["after 2", "after 2"]
    assert [line["step"] for line in metrics(tmp_path / "stop")] == [1, 2]
    assert (tmp_path / "fail-0").read_text() == "ZeroDivisionError: by a callback"
    second = tmp_path / "fail-1"  # missing where its main thread waited for the first rank, and another ended it
    assert not second.exists() or "rank 0 ended with ZeroDivisionError: by a callback" in second.read_text()
