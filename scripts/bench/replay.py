"""Whether a step's chunks have the same bits when they are encoded again, at a model's full depth, in every precision.

    python -m scripts.bench.replay --output docs/bench/replay.json

ModernBERT-base and Qwen3-0.6B's shape with random weights, fused layers and a dropout of 0.1 at every place that the
fused layers have; pairs of MS MARCO's lengths, in several chunks. A step's gradient is computed with all graphs
retained, with nothing retained and with products retained; embedding tables are left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from retriever.command import at_least_one, command, option
from retriever.parallel.world import World
from scripts.bench.measure import free_memory
from scripts.bench.step_data import random_store
from scripts.bench.step_methods import MODELS, Trainer, Work, replays_bitwise, resized
from scripts.bench.tables import Table

_DROPOUTS = {"modernbert": ("attention_dropout", "embedding_dropout"), "qwen3": ("attention_dropout",)}
_TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
}
_SETTINGS = ("model.attention=packed", "model.fused=true", "model.compile=false")


def with_dropout(name: str, *, tiny: bool) -> PreTrainedConfig:
    """The configuration of one of MODELS with dropout; `tiny`: two narrow layers."""
    config = MODELS[name]()
    return resized(config, **dict.fromkeys(_DROPOUTS[config.model_type], 0.1), **(_TINY if tiny else {}))


@command(
    "python -m scripts.bench.replay",
    __doc__,
    option("--output", type=Path, default=Path("docs/bench/replay.json")),
    option(
        "--models", nargs="*", choices=sorted(set(MODELS) - {"bert-base"}), default=["modernbert-base", "qwen3-0.6b"]
    ),
    option("--precisions", nargs="*", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16", "fp16"]),
    option("--pairs", type=at_least_one, default=256, help="of a step"),
    option("--tiny", action="store_true", help="two narrow layers"),
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.bench.replay`."""
    world = World(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    table = Table.begin(args.command, ("torch", "triton", "transformers"), args.output)
    with tempfile.TemporaryDirectory() as folder:
        configs = {name: with_dropout(name, tiny=args.tiny) for name in args.models}
        words = min(2**16, *(config.vocab_size for config in configs.values()))
        store = random_store(Path(folder) / "store", args.pairs, words)
        for name, config in configs.items():
            work = Work(config, store, world, (*_SETTINGS, "batch.tokens_per_chunk=8192"))
            for precision in args.precisions:
                case = f"{name},layers={config.num_hidden_layers},b={args.pairs},{precision}"
                with table.attempt(case, "bigbatch", "replayed_bitwise", "of 1"):
                    trainer = Trainer(work, work.configuration(args.pairs, f"optim.precision={precision}"))
                    table.add(case, "bigbatch", "replayed_bitwise", float(replays_bitwise(trainer, args.pairs)), "of 1")
                    del trainer
                free_memory(world.device)


if __name__ == "__main__":
    sys.exit(main())
