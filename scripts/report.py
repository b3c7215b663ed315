"""Overlay the curves of several training runs in one HTML page.

    python -m scripts.report runs/a runs/b --output compared.html

The page is one file and needs no network. It shows each run's last loss and best evaluation, every logged quantity
with a curve per run, and the settings in which the runs differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from eval.outputs import refuse_foreign
from retriever.command import command, option
from retriever.config import ConfigError
from retriever.config_tree import flatten
from retriever.files import write_text
from retriever.history import LoggedRun, read_metrics
from retriever.report import PAGE, charts, page, spelled, table


@command(
    "python -m scripts.report",
    __doc__,
    option("runs", nargs="+", type=Path, metavar="RUN", help="folders of training runs"),
    option("--output", type=Path, default=Path("report.html"), help="default: %(default)s"),
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.report`."""
    refuse_foreign(args.output, lambda file: file.read_bytes().startswith(PAGE.encode()))
    write_text(args.output, overlay(args.runs))
    print(f"{args.output}: {len(args.runs)} runs")


def overlay(folders: Sequence[Path]) -> str:
    """The page of the runs in `folders`. Raises ConfigError for a folder without a run."""
    for folder in folders:
        if not (folder / "metrics.jsonl").exists() or not (folder / "config.yaml").exists():
            raise ConfigError(f"{folder} holds no training run: expected config.yaml and metrics.jsonl in it")
    runs = [LoggedRun(str(folder), read_metrics(folder / "metrics.jsonl")) for folder in folders]
    settings = [flatten(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))) for folder in folders]
    keys = dict.fromkeys(key for found in settings for key in found)
    rows = [(key, *(spelled(found.get(key)) for found in settings)) for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return page(
        "Runs compared",
        [
            table(map(_results, runs), ("run", "steps", "last loss", "best evaluation")),
            *charts(runs),
            "<h2>Settings that differ</h2>",
            table(differing, ("setting", *(run.name for run in runs))),
        ],
    )


def _results(run: LoggedRun) -> tuple[str, ...]:
    """A run's name, steps, last loss, and its best evaluation with its step."""
    losses = run.curves.get("train/loss", [])
    last = f"{losses[-1][1]:.4f}" if losses else ""
    steps = f"{run.lines[-1]['step']:,}" if run.lines else "0"
    return run.name, steps, last, str(run.best or "")


if __name__ == "__main__":
    sys.exit(main())
