"""Train a cross-encoder on mined negatives: a teacher for data that no ready cross-encoder was trained for.

    python -m scripts.train_cross_encoder --data runs/mined --model runs/first/export --output-dir runs/teacher
    python -m scripts.mine_negatives --teacher runs/teacher ...

A query is read together with one of its positives and with some of its negatives; the loss is the cross entropy of the positive's
score among them. Runs on one device.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from retriever.wording import counted


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `python -m scripts.train_cross_encoder`."""
    given = _parser().parse_args(arguments)

    from eval.commands import one_line_errors
    from retriever.environment import check_environment

    check_environment()
    import torch

    from retriever.config import OptimConfig
    from scripts.mining.cross_encoder import Training, read_groups, train_cross_encoder

    with one_line_errors():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        groups = read_groups(given.data, given.title, given.title_separator, given.limit)
        training = Training(given.negatives, given.queries, given.epochs, given.max_tokens, given.seed)
        loss, right = train_cross_encoder(
            given.model, groups, training, OptimConfig(lr=given.lr, precision=given.precision), given.output_dir, device
        )
    over = f"over the last tenth of {given.epochs:g} × {counted(len(groups), 'query')}"
    print(f"{given.output_dir}: {over} loss {loss:.3f}, positive first {100 * right:.1f}%", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train_cross_encoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="training data with negatives inside, as scripts.mine_negatives writes them")
    parser.add_argument("--model", required=True, help="an encoder's folder or Hugging Face name, whose body the cross-encoder starts from")
    parser.add_argument("--output-dir", required=True, type=Path, help="a new folder for the model and its tokenizer")
    parser.add_argument("--negatives", type=int, default=7, help="read beside a positive, at most (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=32, help="of an optimizer step (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=5e-5, help="highest rate; linear, a tenth of warm-up (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of a pair (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    parser.add_argument("--limit", type=int, help="of queries, the first ones")
    parser.add_argument("--title", choices=("join", "drop"), default="join", help="as data.title (default: %(default)s)")
    parser.add_argument("--title-separator", default=" ", help="as data.title_separator (default: one space)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    main()
