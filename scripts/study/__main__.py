"""Train the runs of a study, each at its best learning rate, and measure them query by query.

    python -m scripts.study configs/study_batch.yaml
    python -m scripts.study configs/study_batch.yaml output_dir=runs/other --seconds 300

Each arm varies one setting. Its learning rates are chosen on dev with seed 0; then every value is trained with the
arm's seeds and measured on the test collections. OUTPUT/study.json is written after every run; the same command goes on
with what is missing. OUTPUT/results.md and the figures beside it have the curves, the paired differences of
neighbouring values, and their intervals.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

from retriever.command import command, number, option


@command(
    "python -m scripts.study",
    __doc__,
    option("config", help="a YAML file; configs/study_batch.yaml is an example"),
    option("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the file's"),
    option("--seconds", type=number(above=True), default=math.inf, help="begin no run that would end later"),
    resumes="the same command goes on where it stopped",
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.study`."""
    started = time.perf_counter()
    from retriever.lock import working_in
    from scripts.study.config import load_study
    from scripts.study.page import write_page
    from scripts.study.record import Record
    from scripts.study.runs import Study, environment

    config = load_study(args.config, args.overrides)
    folder = Path(config.output_dir)
    with working_in(folder):
        record = Record.open(folder)
        command = " ".join(["python -m scripts.study", *sys.argv[1:]])
        record.begin({**environment(config.train), "command": command})
        Study(config, record, args.seconds - (time.perf_counter() - started)).run()
        write_page(folder, config, record)
        print(f"{folder / 'results.md'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
