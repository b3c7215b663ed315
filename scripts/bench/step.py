"""The whole training step: every form of Bigbatch's, its single-pass floor, sentence-transformers' cached loss and the
published gradient cache.

    python -m scripts.bench.step --output docs/bench/step.json
    python -m scripts.bench.step --sizes 1048576 --peers-at 0 --recomputing-at 0 --forms --methods bigbatch \
        --output docs/bench/step_million.json
    python -m scripts.bench.step --tiny --output /tmp/step.json           # on a CPU, to see that it runs

BERT-base, or another `--model`, with random weights, pairs of MS MARCO's lengths from a token store, bf16 autocast, the
model's own dropout (BERT's 0.1), AdamW. A form is not timed if its gradient is wrong, or if replayed chunks differ from
kept ones. Rows are saved as they are measured; the default form, the floor and the peers come first.
`scripts.bench.report` makes the page.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from itertools import product
from pathlib import Path

import torch
from transformers import BertConfig

from retriever.command import command, option
from retriever.data.batch import Batch
from retriever.parallel.world import World
from retriever.plan.forecast import Forecast
from scripts.bench.measure import add_matmul_rate, free_memory
from scripts.bench.step_data import random_store
from scripts.bench.step_forms import ALL_GRAPHS, AUTO, FORMS, PADDED, RECOMPUTING, Form
from scripts.bench.step_methods import (
    MODELS,
    TINY,
    Sample,
    Trainer,
    Work,
    gradient_error,
    random_model,
    replays_bitwise,
    sample,
    table_names,
)
from scripts.bench.step_peers import MINI_BATCHES, PEERS, best_timing, pairs_of
from scripts.bench.tables import Table

_PACKAGES = ("torch", "triton", "transformers", "sentence-transformers")
_WRONG = 1.5  # times the error of the library's own layers in bf16: a gradient further off is another function
_ROUNDING = 1e-4  # an error that fp32 may have
_CHECKED_PAIRS = 128
_REFERENCE_SIZE = 4096  # tokens of a chunk
_SMALL = 4096  # pairs
_TWO_STEPS = 32_768  # pairs: a larger batch is trained on once


class Bench:
    """Measures the rows of the step's table."""

    def __init__(self, work: Work, table: Table, seconds: float) -> None:
        self.work, self.table, self._seconds = work, table, seconds
        self.tflops = add_matmul_rate(table, work.device)
        self._sizes: dict[int, int] = {}  # tokens of a chunk that were measured to be best, by pairs in the batch
        self._checked: dict[tuple[str, ...], bool] = {}
        with torch.device("meta"):
            tower = random_model(work.model)
        tables = table_names(tower)
        self._parameters = sum(p.numel() for name, p in tower.named_parameters() if name not in tables)

    def measure_form(self, queries: int, form: Form) -> None:
        """Checks Bigbatch's step in one form, then measures it."""
        case = _case(queries, form.condition)
        with self.table.attempt(case, "bigbatch", "pairs_per_s", "pairs/s"):
            trainer = self._trainer(queries, form)
            if not self._right(trainer, form, case):
                return
            found = self._sample(trainer, trainer.step, queries)
            model, batch, kept = trainer.config.model, trainer.config.batch, trainer.retention
            layers = "fused" if model.fused else "compiled" if model.compile else "library's"
            note = f"{model.attention}, {layers} layers, chunks of {batch.tokens_per_chunk} tokens"
            self._add(case, "bigbatch", queries, found, note)
            graphs = min(1.0, kept.graphs / found.tokens)
            self.table.add(case, "bigbatch", "retained", graphs, "of tokens")
            products = min(1.0 - graphs, kept.products / found.tokens)
            self.table.add(case, "bigbatch", "products", products, "of tokens")
            if (forecast := trainer.forecast) is not None:
                self.table.add(case, "bigbatch", "predicted_pairs_per_s", forecast.pairs_per_s, "pairs/s")
                if forecast.working_bytes:
                    self._add_memory(case, forecast)

    def measure_floor(self, queries: int) -> None:
        """Measures a single pass of the encoder in its default form."""
        case = _case(queries)
        with self.table.attempt(case, "floor", "pairs_per_s", "pairs/s"):
            trainer = self._trainer(queries, Form(""))
            found = self._sample(trainer, trainer.single_pass, queries)
            self._add(case, "floor", queries, found, "one encoding with its graph, given gradients, update; no loss")

    def measure_peer(self, name: str, queries: int, *, by_length: bool) -> None:
        """Measures the fastest step of a peer, at its best mini-batch size."""
        case, sizes = _case(queries, "sorted" if by_length else ""), MINI_BATCHES[name]
        free_memory(self.work.device)  # of the method before
        with self.table.attempt(case, name, "pairs_per_s", "pairs/s"):
            peer, texts = PEERS[name](self.work), pairs_of(self.work, queries, by_length=by_length)
            timing, size = best_timing(self.work, peer, texts, sizes, self._seconds)
            found = Sample(min(timing.seconds), sum(len(text) for side in texts for text in side), timing.peak_gib)
            order = "sorted by length beforehand" if by_length else "in the data's order"
            chosen = f"{size} at once" + (f", the best of {', '.join(map(str, sizes))}" if len(sizes) > 1 else "")
            self._add(case, name, queries, found, f"{order}; {chosen}; {peer.note}")

    def _add_memory(self, case: str, forecast: Forecast) -> None:
        """Adds the predicted peak, and its parts: the peak is about data + max(loss, encoder) where nothing is kept.
        (Cheng et al. 2024, arXiv:2410.17243)
        """
        memory = forecast.memory
        parts = {
            "predicted_peak_gib": forecast.peak_bytes,
            "data_gib": memory.weights + memory.optimizer + memory.representations,
            "loss_gib": forecast.loss.peak_bytes,
            "encoder_gib": memory.gradients + memory.representations + forecast.working_bytes,
        }
        for metric, part in parts.items():
            self.table.add(case, "bigbatch", metric, part / 2**30, "GiB")

    def _trainer(self, queries: int, form: Form) -> Trainer:
        free_memory(self.work.device)  # of the method before
        size = self._sizes.get(queries, max(self._sizes.values(), default=None))
        chunks = () if form is AUTO or size is None else (f"batch.tokens_per_chunk={size}",)
        config = self.work.configuration(queries, *chunks, *form.settings)
        trainer = Trainer(self.work, config, retention=form.retention)
        if form is AUTO:
            self._sizes[queries] = int(trainer.config.batch.tokens_per_chunk)
        return trainer

    def _right(self, trainer: Trainer, form: Form, case: str) -> bool:
        """Whether the form computes the right gradient; checked once for each combination of settings."""
        if form.settings not in self._checked:
            pairs = min(_CHECKED_PAIRS, trainer.config.batch.queries)
            plain = (*PADDED, f"batch.tokens_per_chunk={_REFERENCE_SIZE}")
            exact, usual = (
                Trainer(self.work, self.work.configuration(pairs, *plain, *precision), retention=ALL_GRAPHS)
                for precision in (("optim.precision=fp32", "loss.precision=fp32"), ())
            )
            allowed = max(_ROUNDING, _WRONG * gradient_error(usual, exact, pairs))
            error, replayed = gradient_error(trainer, exact, pairs), replays_bitwise(trainer, pairs)
            note = f"against fp32; allowed {allowed:.2g}; " + ("replayed bitwise" if replayed else "the replay differs")
            self.table.add(case, "bigbatch", "gradient_error", error, "relative", note)
            self._checked[form.settings] = replayed and error <= allowed
        if not self._checked[form.settings]:
            self.table.add(case, "bigbatch", "pairs_per_s", None, "pairs/s", "not timed: wrong")
        return self._checked[form.settings]

    def _sample(self, trainer: Trainer, step: Callable[[Batch], object], queries: int) -> Sample:
        trainer.step(trainer.first_batch(min(queries, _SMALL)))  # compiles and tunes
        large = queries > _TWO_STEPS
        with closing(trainer.batches(queries)) as batches:  # type: ignore[type-var]
            return sample(step, batches, self.work.device, self._seconds / (1 + large), warm=not large)

    def _add(self, case: str, method: str, queries: int, found: Sample, note: str = "") -> None:
        tokens_per_s, mfu = found.tokens / found.seconds, None
        if self.tflops is not None:
            mfu = 6 * self._parameters * tokens_per_s / self.tflops / 1e12
        for metric, value, unit in (
            ("pairs_per_s", queries / found.seconds, "pairs/s"),
            ("tokens_per_s", tokens_per_s, "tokens/s"),
            ("mfu", mfu, "of the matmul rate"),
            ("peak_gib", found.peak_gib, "GiB"),
            ("waited", found.waited, "of the step"),
        ):
            if value is not None:
                self.table.add(case, method, metric, value, unit, note if metric == "pairs_per_s" else "")


def _case(queries: int, condition: str = "") -> str:
    return f"b={queries}" + (f",{condition}" if condition else "")


_METHODS, _OTHER_FORMS = ("bigbatch", "floor", *PEERS), ["unretained", "compiled", "padded"]


@command(
    "python -m scripts.bench.step",
    __doc__,
    option("--output", type=Path, default=Path("docs/bench/step.json")),
    option("--sizes", type=int, nargs="*", default=[1024, 16384, 65536], help="pairs (default: %(default)s)"),
    option("--peers-at", type=int, default=16384, help="where peers and other forms run; 0: nowhere"),
    option("--forms", nargs="*", choices=FORMS, default=_OTHER_FORMS, help="other forms (default: %(default)s)"),
    option("--forms-at", type=int, nargs="*", metavar="PAIRS", help="where other forms run (default: where peers do)"),
    option("--recomputing-at", type=int, default=4096, help="checkpointing against the cache; 0: not"),
    option("--methods", nargs="*", choices=_METHODS, default=list(_METHODS)),
    option("--seconds", type=float, default=4.0, help="of each timing"),
    option("--settings", nargs="*", default=[], metavar="key=value", help="of every run of ours"),
    option("--model", choices=MODELS, default="bert-base", help="whose shape is measured (default: %(default)s)"),
    option("--tiny", action="store_true", help="a model of two layers, dimension 32"),
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.bench.step`."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as in training
    # On Hopper torch prefers cuDNN for padded texts, which spends up to a second on a plan for each new shape: most of
    # the time of a short run.
    torch.backends.cuda.enable_cudnn_sdp(False)
    world = World(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model = BertConfig(**TINY) if args.tiny else MODELS[args.model]()
    ours, peers_at = "bigbatch" in args.methods, args.peers_at
    with tempfile.TemporaryDirectory() as folder:
        pairs = max([*args.sizes, *(args.forms_at or ()), peers_at, args.recomputing_at, 1 if args.tiny else 4096])
        store = random_store(Path(folder) / "store", pairs, min(model.vocab_size, 2**16))
        work = Work(model, store, world, tuple(args.settings))
        bench = Bench(work, Table.begin(args.command, _PACKAGES, args.output), args.seconds)
        for queries in sorted({*args.sizes, peers_at} - {0}, key=lambda n: (n != peers_at, n)):
            if ours:
                bench.measure_form(queries, AUTO)
            if "floor" in args.methods and queries <= max(peers_at, min(args.sizes, default=0)):
                bench.measure_floor(queries)
            for name, by_length in product(PEERS if queries == peers_at else (), (False, True)):
                if name in args.methods:
                    bench.measure_peer(name, queries, by_length=by_length)
        forms_at = [peers_at] if args.forms_at is None else args.forms_at
        others = [(queries, FORMS[name]) for queries, name in product(forms_at, args.forms)]
        for queries, form in others + [(args.recomputing_at, form) for form in RECOMPUTING]:
            if ours and queries:
                bench.measure_form(queries, form)


if __name__ == "__main__":
    sys.exit(main())
