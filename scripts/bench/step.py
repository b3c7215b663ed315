"""The whole training step: ours in every form, its single-pass floor, sentence-transformers' cached loss and the published gradient cache.

    python -m scripts.bench.step --output docs/bench/step.json
    python -m scripts.bench.step --sizes 1048576 --peers-at 0 --recomputing-at 0 --forms --methods bigbatch \\
        --output docs/bench/step_million.json
    python -m scripts.bench.step --tiny --output /tmp/step.json           # on a CPU, to see that it runs

BertConfig's defaults with random weights, pairs of MS MARCO's lengths from a token store, bf16 autocast, dropout 0.1, AdamW. A form whose
gradient is wrong, or whose replayed chunks differ from kept ones, is not timed. What is measured is saved as it comes, our default form,
the floor and the peers first. `scripts.bench.report` makes the page.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig

from retriever.parallel.world import World
from scripts.bench.step_bench import AUTO, FORMS, RECOMPUTING, Bench
from scripts.bench.step_data import random_store
from scripts.bench.step_methods import Work, settle_torch
from scripts.bench.step_peers import MINI_BATCHES, PEERS
from scripts.bench.tables import Table

_PACKAGES = ("torch", "triton", "transformers", "sentence-transformers")
_TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 1000}
_METHODS = ("bigbatch", "floor", *PEERS)
_USUAL_FORMS = ("unretained", "compiled", "padded")


def run(bench: Bench, sizes: Sequence[int], peers_at: int, recomputing_at: int, methods: Sequence[str], forms: Sequence[str]) -> None:
    """Every row: at `peers_at` our default form, the floor and the peers; the other sizes; other forms, at `peers_at` too."""
    for queries in sorted({*sizes, peers_at} - {0}, key=lambda n: (n != peers_at, n)):
        if "bigbatch" in methods:
            bench.measure_form(queries, AUTO)
            bench.save()
        if "floor" in methods and queries <= max(peers_at, min(sizes, default=0)):
            bench.measure_floor(queries)
            bench.save()
        if queries == peers_at:
            _peers(bench, queries, methods)
    compared = [(peers_at, FORMS[name]) for name in forms] + [(recomputing_at, form) for form in RECOMPUTING]
    for queries, form in compared:
        if "bigbatch" in methods and queries:
            bench.measure_form(queries, form)
            bench.save()


def _peers(bench: Bench, queries: int, methods: Sequence[str]) -> None:
    for name, make in PEERS.items():
        for by_length, sizes in MINI_BATCHES[name].items():
            if name in methods:
                bench.measure_peer(name, make, queries, sizes, by_length=by_length)
                bench.save()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `python -m scripts.bench.step`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/bench/step.json"))
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024, 16384, 65536], help="pairs in a batch (default: %(default)s)")
    parser.add_argument("--peers-at", type=int, default=16384, help="where peers and other forms run; 0: nowhere (default: %(default)s)")
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(_USUAL_FORMS), help="other forms of ours (default: %(default)s)")
    parser.add_argument("--recomputing-at", type=int, default=4096, help="checkpointing against the cache; 0: not (default: %(default)s)")
    parser.add_argument("--methods", nargs="*", choices=_METHODS, default=list(_METHODS))
    parser.add_argument("--seconds", type=float, default=4.0, help="of each timing (default: %(default)s)")
    parser.add_argument("--settings", nargs="*", default=[], metavar="key=value", help="of every run of ours")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, dimension 32")
    args = parser.parse_args(arguments)
    settle_torch()
    world = World(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model = BertConfig(**_TINY) if args.tiny else BertConfig()
    table = Table.begin(_PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        pairs = max([*args.sizes, args.peers_at, args.recomputing_at, 4096 if not args.tiny else 1])
        store = random_store(Path(folder) / "store", pairs, model.vocab_size)
        bench = Bench(Work(model, store, world, tuple(args.settings)), table, args.output, args.seconds)
        run(bench, args.sizes, args.peers_at, args.recomputing_at, args.methods, args.forms)


if __name__ == "__main__":
    main()
