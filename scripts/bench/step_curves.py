"""Loss curves of every form of the step from the same weights on the same batches, dropout off: they part by bf16's noise alone.

    python -m scripts.bench.step_curves --output docs/bench/step_curves.json

A small BERT learns which passage a query's words came from. The yardstick of the noise is the library's own padded run in bf16 with chunks
of half the size, where nothing but the order of roundings differs. `scripts.bench.step_report --curves` draws the curves.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig

from retriever.parallel.world import World
from retriever.retention import EVERYTHING, Retention
from scripts.bench.step_bench import PACKED_COMPILED, PACKED_FUSED, PADDED, PLAIN, Form
from scripts.bench.step_data import random_store
from scripts.bench.step_methods import ALL_GRAPHS, Trainer, Work, settle_torch
from scripts.bench.tables import Row, Table

REFERENCE, YARDSTICK = "padded", "padded, other chunks"
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_SMALL: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
_TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 1000}


def forms(tokens_per_chunk: int) -> list[Form]:
    """What is compared, the reference and the yardstick first."""
    size, half = (f"batch.tokens_per_chunk={n}" for n in (tokens_per_chunk, tokens_per_chunk // 2))
    return [
        Form(REFERENCE, (*PADDED, size)),
        Form(YARDSTICK, (*PADDED, half)),
        Form("padded, fp32", (*PADDED, size, "optim.precision=fp32", "loss.precision=fp32")),
        Form("packed", (*PLAIN, size)),
        Form("packed, fused", (*PACKED_FUSED, size)),
        Form("packed, fused, products kept", (*PACKED_FUSED, size), Retention(products=EVERYTHING)),
        Form("packed, fused, graphs kept", (*PACKED_FUSED, size), ALL_GRAPHS),
        Form("packed, compiled", (*PACKED_COMPILED, size)),
    ]


def curve(work: Work, form: Form, queries: int, steps: int, lr: float) -> list[float]:
    """The loss of every step."""
    settings = (*form.settings, f"optim.lr={lr}", "optim.warmup=10")
    trainer = Trainer(work, work.configuration(queries, *settings), retention=form.retention, **_NO_DROPOUT)
    with closing(trainer.batches(queries, steps)) as batches:  # type: ignore[type-var]
        return [trainer.step(batch).loss for batch in batches]


def gap(curve: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """(largest, mean) of |difference|."""
    differences = [abs(a - b) for a, b in zip(curve, reference, strict=True)]
    return max(differences), sum(differences) / len(differences)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `python -m scripts.bench.step_curves`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/bench/step_curves.json"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--tokens-per-chunk", type=int, default=16_384)
    parser.add_argument("--runs", nargs="*", default=[], help=f"names of those to compare with {REFERENCE!r}; all if absent")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, dimension 32")
    args = parser.parse_args(arguments)
    settle_torch(cudnn_attention=False)
    world = World(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model = BertConfig(**(_TINY if args.tiny else _SMALL))
    table = Table.begin(("torch", "triton", "transformers"))
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder) / "store", args.queries * 20, model.vocab_size)
        for form in forms(args.tokens_per_chunk):
            if args.runs and form.condition not in (REFERENCE, *args.runs):
                continue
            losses = curves[form.condition] = curve(Work(model, store, world), form, args.queries, args.steps, args.lr)
            table.rows += [Row(f"step={i}", form.condition, "loss", value, "nats") for i, value in enumerate(losses)]
            largest, mean = gap(losses, curves[REFERENCE])
            case = f"b={args.queries},steps={args.steps}"
            table.add(case, form.condition, "last_loss", losses[-1], "nats", f"{losses[0]:.4f} at first")
            table.add(case, form.condition, "largest_gap", largest, "nats", f"to {REFERENCE}")
            table.add(case, form.condition, "mean_gap", mean, "nats", f"to {REFERENCE}")
            table.save(args.output)
            gc.collect()


if __name__ == "__main__":
    main()
