"""The retrain loop as one command: train, mine with the model, score by a teacher, train again, evaluate.

    python -m scripts.pipeline configs/loop_scifact.yaml
    python -m scripts.pipeline configs/loop_scifact.yaml output_dir=runs/other rounds.1.mine.negatives=4

Every stage is done once for the same inputs (data, model, teacher, settings). After an interruption the same command
resumes. After a change it repeats the stages that the change affects, and says which ones it reuses.
"""

from __future__ import annotations

import argparse
import sys

from retriever.command import command, option


@command(
    "python -m scripts.pipeline",
    __doc__,
    option("config", help="a YAML file; configs/loop_*.yaml are examples"),
    option("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the file's"),
    resumes="the same command goes on where it stopped",
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.pipeline`. If a stage fails, its exit status is returned."""
    from scripts.loop.config import load_loop
    from scripts.loop.rounds import Loop

    Loop(load_loop(args.config, args.overrides)).run()


if __name__ == "__main__":
    sys.exit(main())
