"""Train a cross-encoder on mined negatives, as a teacher for data that has no ready one.

    python -m scripts.train_cross_encoder --data runs/mined --model runs/first/export --output-dir runs/teacher
    python -m scripts.mine_negatives --teacher runs/teacher ...

A query is read together with one of its positives and with several of its negatives. The loss is the cross-entropy of
the positive's score among these. Training uses one device.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from retriever.command import TITLE, above_zero, at_least_one, command, option, seed
from retriever.wording import counted


@command(
    "python -m scripts.train_cross_encoder",
    __doc__,
    option("--data", required=True, help="training data with negatives inside, as scripts.mine_negatives writes them"),
    option(
        "--model",
        required=True,
        help="an encoder's folder or Hugging Face name, whose body the cross-encoder starts from",
    ),
    option("--output-dir", required=True, type=Path, help="a new folder for the model and its tokenizer"),
    option("--negatives", type=at_least_one, default=7, help="read beside a positive, at most"),
    option("--queries", type=at_least_one, default=32, help="of an optimizer step"),
    option("--epochs", type=above_zero, default=1.0, help="default: %(default)s"),
    option("--lr", type=above_zero, default=5e-5, help="highest rate; linear, a tenth of warm-up"),
    option("--max-tokens", type=at_least_one, default=256, help="of a pair"),
    option("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s"),
    option("--limit", type=at_least_one, help="of queries, the first ones"),
    *TITLE,
    option("--seed", type=seed, default=0, help="default: %(default)s"),
    lower="--queries, --negatives or --max-tokens",
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.train_cross_encoder`."""
    import torch

    from retriever.config import OptimConfig
    from scripts.mining.cross_encoder import Training, read_groups, train_cross_encoder

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    groups = read_groups(args.data, args.title, args.title_separator, args.limit)
    training = Training(args.negatives, args.queries, args.epochs, args.max_tokens, args.seed)
    optimizer = OptimConfig(lr=args.lr, precision=args.precision)
    loss, right = train_cross_encoder(args.model, groups, training, optimizer, args.output_dir, device)
    over = f"over the last tenth of {args.epochs:g} × {counted(len(groups), 'query')}"
    print(f"{args.output_dir}: {over} loss {loss:.3f}, positive first {100 * right:.1f}%", flush=True)


if __name__ == "__main__":
    sys.exit(main())
