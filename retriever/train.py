"""Train a dense retriever: `accelerate launch retriever/train.py --config configs/x.yaml key.sub=value ...`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started as a file: the project's root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from retriever import config_help
from retriever.command import command, option
from retriever.config_file import load
from retriever.errors import RESUMES


@command(
    "retriever/train.py",
    __doc__,
    option("--config", help="a YAML file; configs/ has examples"),
    option(
        "--help-settings",
        nargs="?",
        const="",
        metavar="section",
        help="print the settings with their meanings, of one section or all, and exit",
    ),
    option(
        "--dry-run",
        action="store_true",
        help="check settings and data, print the summary, the warnings and the plan of a step, and stop; the same as "
        "run.preflight=only",
    ),
    option("--log-json", action="store_true", help="print every remark, logged step and evaluation as a line of JSON"),
    option("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the file's"),
    resumes=RESUMES,
    lower="batch.tokens_per_chunk, batch.retain or batch.retain_products",
)
def main(args: argparse.Namespace) -> None:
    """The command `accelerate launch retriever/train.py`."""
    if args.help_settings is not None:
        print(config_help.settings_text(args.help_settings))
        return
    dry = ["run.preflight=only"] if args.dry_run else []
    config = load(args.config, [*args.overrides, *dry])  # what is wrong with it is told before torch is imported
    from retriever.run import Run

    Run(config).train()


if __name__ == "__main__":
    sys.exit(main())
