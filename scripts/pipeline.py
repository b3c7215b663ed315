"""Train, mine with the model, have a teacher score, train again, evaluate: the retrain loop as one command.

    python -m scripts.pipeline configs/loop_scifact.yaml
    python -m scripts.pipeline configs/loop_scifact.yaml output_dir=runs/other rounds.1.mine.negatives=4

Every stage is done once for the same inputs (data, model, teacher, settings). The same command after an interruption goes on where
it stopped, and after a change does again what the change reaches; it says which stages it reuses.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a stage failed, 2 a configuration or data error (said in one line), 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a YAML file; configs/loop_*.yaml are examples")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the file's")
    given = parser.parse_args(arguments)

    from retriever.environment import check_environment

    check_environment()
    from retriever.config import ConfigError
    from retriever.data.records import DataError
    from scripts.loop.config import load_loop
    from scripts.loop.rounds import Loop

    try:
        Loop(load_loop(given.config, given.overrides)).run()
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(map(str, error.cmd[:6]))} … ended with status {error.returncode}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
