"""The whole training step: ours in every form, its single-pass floor, sentence-transformers' cached loss and the
published gradient cache.

    python -m scripts.bench.step --output docs/bench/step.json
    python -m scripts.bench.step --sizes 1048576 --peers-at 0 --recomputing-at 0 --forms --methods bigbatch \\
        --output docs/bench/step_million.json
    python -m scripts.bench.step --tiny --output /tmp/step.json           # on a CPU, to see that it runs

BertConfig's defaults with random weights, pairs of MS MARCO's lengths from a token store, bf16 autocast, dropout 0.1,
AdamW. A form whose gradient is wrong, or whose replayed chunks differ from kept ones, is not timed. What is measured is
saved as it comes, our default form, the floor and the peers first. `scripts.bench.report` makes the page.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig

from retriever.command import command_parser, option, run
from retriever.parallel.world import World
from scripts.bench.measure import free_memory
from scripts.bench.step_bench import AUTO, FORMS, RECOMPUTING, Bench
from scripts.bench.step_data import random_store
from scripts.bench.step_methods import Work, settle_torch
from scripts.bench.step_peers import MINI_BATCHES, PEERS
from scripts.bench.tables import Table

_PACKAGES = ("torch", "triton", "transformers", "sentence-transformers")
_TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 1000,
}
_METHODS = ("bigbatch", "floor", *PEERS)
_USUAL_FORMS = ("unretained", "compiled", "padded")


def rows(bench: Bench, args: argparse.Namespace) -> Iterator[Callable[[], None]]:
    """What measures a row, one after another: at `--peers-at` our default form, the floor and the peers; the other
    sizes; other forms.
    """
    ours, peers_at = "bigbatch" in args.methods, args.peers_at
    for queries in sorted({*args.sizes, peers_at} - {0}, key=lambda n: (n != peers_at, n)):
        if ours:
            yield partial(bench.measure_form, queries, AUTO)
        if "floor" in args.methods and queries <= max(peers_at, min(args.sizes, default=0)):
            yield partial(bench.measure_floor, queries)
        if queries == peers_at:
            for name in args.methods:
                for by_length in MINI_BATCHES.get(name, ()):
                    yield partial(bench.measure_peer, name, queries, by_length=by_length)
    for queries, form in [(peers_at, FORMS[name]) for name in args.forms] + [
        (args.recomputing_at, form) for form in RECOMPUTING
    ]:
        if ours and queries:
            yield partial(bench.measure_form, queries, form)


def _step(args: argparse.Namespace) -> None:
    settle_torch()
    world = World(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model = BertConfig(**_TINY) if args.tiny else BertConfig()
    table = Table.begin(args.command, _PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        pairs = max([*args.sizes, args.peers_at, args.recomputing_at, 4096 if not args.tiny else 1])
        store = random_store(Path(folder) / "store", pairs, model.vocab_size)
        bench = Bench(Work(model, store, world, tuple(args.settings)), table, args.seconds)
        for measure in rows(bench, args):
            measure()
            table.save(args.output)
            free_memory(world.device)  # for the next method


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m scripts.bench.step`."""
    parser = command_parser(
        "python -m scripts.bench.step",
        __doc__,
        option("--output", type=Path, default=Path("docs/bench/step.json")),
        option(
            "--sizes", type=int, nargs="*", default=[1024, 16384, 65536], help="pairs in a batch (default: %(default)s)"
        ),
        option("--peers-at", type=int, default=16384, help="where peers and other forms run; 0: nowhere"),
        option(
            "--forms",
            nargs="*",
            choices=FORMS,
            default=list(_USUAL_FORMS),
            help="other forms of ours (default: %(default)s)",
        ),
        option("--recomputing-at", type=int, default=4096, help="checkpointing against the cache; 0: not"),
        option("--methods", nargs="*", choices=_METHODS, default=list(_METHODS)),
        option("--seconds", type=float, default=4.0, help="of each timing"),
        option("--settings", nargs="*", default=[], metavar="key=value", help="of every run of ours"),
        option("--tiny", action="store_true", help="a model of two layers, dimension 32"),
    )
    return run(parser, arguments, _step)


if __name__ == "__main__":
    sys.exit(main())
