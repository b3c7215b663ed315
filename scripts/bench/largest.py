"""The largest batch that one GPU's memory holds, by model, strategy, and what is kept between the passes.

    python -m scripts.bench.largest --output docs/bench/largest.json
    python -m scripts.bench.largest --tiny --most 64 --output /tmp/largest.json   # on a CPU, to see that it runs

The batch is doubled until a step runs out of memory; then the gap is halved, in ratio, until it is below `--within`. A
whole step over millions of pairs takes minutes to hours, so a step is shortened: of the encoder's chunks only the first
of each side is computed, of the tiled loss's blocks of rows and columns only the first and the last. All that a step
holds at once is allocated in full. A row compares the peak of a shortened step with that of a whole one.

With several `--ranks`, this is one of them, and local copies of the same size replace transfers: its memory is that of
a rank, its results mean nothing. A batch counts the pairs of all ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import BertConfig

from kernels.infonce.rules import Pairs
from retriever.command import command, option
from retriever.data.batch import Batch
from retriever.data.chunks import Chunk, Chunks
from retriever.data.targets import KnownPairs, Targets
from retriever.gradcache import backward_through_encoder, encode_without_graph, representation_gradients
from retriever.loss.offload import host_bytes
from retriever.retention import NOTHING, Retention
from scripts.bench.measure import Silent, free_memory
from scripts.bench.step_data import random_store
from scripts.bench.step_forms import ALL_GRAPHS
from scripts.bench.step_methods import MODELS, TINY, Trainer, Work
from scripts.bench.tables import Table

_PACKAGES = ("torch", "triton", "transformers")
_SMALL = 2048  # pairs whose texts fill a chunk of each side
_STRATEGIES = {
    "dense": ("loss.strategy=dense",),
    "local": ("loss.strategy=local",),
    "disco": ("loss.strategy=disco",),
    "tiled": ("loss.strategy=tiled", "loss.exchange=gather"),
    "tiled, ring": ("loss.strategy=tiled", "loss.exchange=ring"),
}
_KEPT = {  # between the passes; the first batch that is tried
    "nothing": ("nothing kept", NOTHING, 2**14),
    "graphs": ("all graphs", ALL_GRAPHS, 2**9),
}
_OFFLOAD = "batch.offload=true"


def shortened(trainer: Trainer, pairs: int) -> Batch:
    """A batch of `pairs` on each rank, with the first chunk of each side only."""
    world, first = trainer.world, dict[str, Chunk]()
    for chunk in trainer.first_batch(min(pairs, _SMALL) * world.size).chunks:
        first.setdefault(chunk.side, chunk.to(torch.device("cpu")))
    chunks = Chunks([partial(_same, chunk) for chunk in first.values()], world.device)
    rows, none = torch.arange(pairs), torch.empty(0, dtype=torch.int64)
    loss, offload = trainer.config.loss, trainer.config.batch.offload
    listed = loss.strategy == "tiled" and loss.exchange != "ring" and not offload  # as the loader has it
    known = KnownPairs(Pairs(none, none), (pairs,) * world.size) if listed else None
    targets = Targets(rows, rows, torch.arange(pairs + 1), rows, pairs * world.size, known_pairs=known, ignores=False)
    return Batch(0, 0, "", chunks, targets, (pairs, pairs), 0)


def _same(chunk: Chunk) -> Chunk:
    return chunk


@contextmanager
def first_and_last_blocks(device: torch.device) -> Iterator[None]:
    """Inside, the kernels compute the first and the last block of rows and of columns only."""

    def ends(total: int, size: int) -> Iterator[slice]:
        every = list(range(0, total, size))
        for start in sorted({every[0], every[-1]}):
            yield slice(start, min(start + size, total))

    with ExitStack() as stack:
        if device.type == "cuda":
            from kernels.infonce import one_pass, passes

            for module in (one_pass, passes):
                stack.enter_context(patch.object(module, "slices", ends))
        yield


def run(trainer: Trainer, batch: Batch) -> None:
    """One step over `batch`. Where it has chunks of some rows only, all rows become one unit vector."""
    encoder, objective, world = trainer.encoder, trainer.objective, trainer.world
    representations, first = encode_without_graph(encoder, batch, trainer.retention, offload=objective.offload)
    if not batch.tokens:
        for rows in (representations.query, representations.passage):
            rows.fill_(encoder.dimension**-0.5)
        for order in representations.order or ():
            torch.arange(len(order), out=order)
    gradients = representation_gradients(objective, representations, batch, world)[1]
    backward_through_encoder(encoder, batch, gradients, first)
    for parameter in trainer.optimizer.parameters:  # of a shortened loss they are anything
        if parameter.grad is not None:
            parameter.grad.zero_()
    trainer.optimizer.clip_and_step(batch.step)


def fits(call: Callable[[], object], device: torch.device) -> float | None:
    """The peak in GiB of a call (0 on a CPU); None if it runs out of memory."""
    peak = None
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        call()
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    except torch.cuda.OutOfMemoryError:
        pass
    free_memory(device)  # here and not above: the error holds on to what its call had allocated
    return peak


def search(peak_of: Callable[[int], float | None], first: int, most: int, within: float) -> tuple[int, int | None]:
    """The largest number found for which `peak_of` is not None, 0 if there is none, and the smallest found above it for
    which it is; None if `most` is reached before.
    """
    size, fitting, failing = first, 0, None
    while size:
        fitting, failing = (fitting, size) if peak_of(size) is None else (size, failing)
        if failing is None:
            if size == most:
                break
            size = min(2 * size, most)
        elif not fitting:
            size = size // 2
        elif failing <= within * fitting:
            break
        else:
            middle = round((fitting * failing) ** 0.5)
            size = middle // 64 * 64 if middle >= 1024 else middle
            if not fitting < size < failing:
                break
    return fitting, failing


class Search:
    """Finds the rows of the table for one model and number of ranks."""

    def __init__(self, work: Work, table: Table, args: argparse.Namespace, name: str) -> None:
        self.work, self.table, self._args, self._name = work, table, args, name
        self._tokens = f"batch.tokens_per_chunk={args.tokens_per_chunk}"

    def add(self, strategy: str, kept: str) -> None:
        """Adds the largest batch of a strategy, with nothing kept or all graphs."""
        (label, retention, first), args, ranks = _KEPT[kept], self._args, self.work.world.size
        case, peaks = self._case(label), dict[int, float | None]()
        with self.table.attempt(case, strategy, "largest", "pairs"):
            trainer = self._trainer(*_STRATEGIES[strategy], retention=retention)

            def peak_of(pairs: int) -> float | None:
                peaks[pairs] = self._peak(trainer, pairs, whole=kept == "graphs")
                return peaks[pairs]

            largest, failing = search(peak_of, min(first, args.most), args.most, args.within)
            note = "" if failing else "more were not tried"
            self.table.add(case, strategy, "largest", largest * ranks, "pairs", note)
            self.table.add(case, strategy, "fails_at", failing and failing * ranks, "pairs")
            self.table.add(case, strategy, "peak_gib", peaks.get(largest), "GiB")

    def compare(self, pairs: int) -> None:
        """Adds the peaks of a whole and of a shortened step."""
        trainer = self._trainer(*_STRATEGIES["tiled"])
        for metric, whole in (("whole_peak_gib", True), ("shortened_peak_gib", False)):
            peaks = [self._peak(trainer, pairs, whole=whole) for _ in range(2)]  # the first tunes
            self.table.add(f"{self._case()},b={pairs}", "tiled", metric, peaks[-1], "GiB")

    def offload(self, sizes: list[int]) -> None:
        """Adds the peak with representations in host memory, which then bounds the batch."""
        trainer = self._trainer(_OFFLOAD)
        each = 2 * host_bytes(trainer.config.loss.precision, dims=False) * trainer.encoder.dimension
        for pairs in sizes:
            self.table.add(f"{self._case()},b={pairs}", "tiled", "host_gib", each * pairs / 2**30, "GiB")
            peak = self._peak(trainer, pairs, whole=False)
            self.table.add(f"{self._case()},b={pairs}", "tiled", "offload_peak_gib", peak, "GiB")

    def _peak(self, trainer: Trainer, pairs: int, *, whole: bool) -> float | None:
        def step() -> None:
            if whole:
                run(trainer, trainer.first_batch(pairs * trainer.world.size))
            else:
                with first_and_last_blocks(trainer.world.device):
                    run(trainer, shortened(trainer, pairs))

        peak = fits(step, trainer.world.device)
        trainer.optimizer.torch.zero_grad(set_to_none=True)
        return peak

    def _trainer(self, *settings: str, retention: Retention = NOTHING) -> Trainer:
        free_memory(self.work.device)  # of the trainer before
        config = self.work.configuration(_SMALL, self._tokens, *settings)
        return Trainer(self.work, config, retention=retention)

    def _case(self, kept: str = "nothing kept") -> str:
        return f"{self._name},W={self.work.world.size},{kept}"


@command(
    "python -m scripts.bench.largest",
    __doc__,
    option("--output", type=Path, default=Path("docs/bench/largest.json")),
    option("--models", nargs="+", choices=MODELS, default=["bert-base", "bert-large", "qwen3-0.6b"]),
    option("--strategies", nargs="+", choices=_STRATEGIES, default=list(_STRATEGIES)),
    option("--ranks", type=int, nargs="+", default=[1], help="the ring is for several (default: %(default)s)"),
    option("--kept", nargs="*", choices=_KEPT, default=list(_KEPT), help="between the passes"),
    option("--compare-at", type=int, default=4096, help="pairs of a whole step; 0: not"),
    option("--offload-at", type=int, nargs="*", default=[65_536, 262_144], help="pairs"),
    option("--tokens-per-chunk", type=int, default=16_384),
    option("--most", type=int, default=2**24, help="pairs of a rank that are tried"),
    option("--within", type=float, default=1.1, help="the failing batch over the largest one (default: %(default)s)"),
    option("--settings", nargs="*", default=[], metavar="key=value", help="of every step"),
    option("--tiny", action="store_true", help="a model of two layers, dimension 32"),
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.bench.largest`."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as in training
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table.begin(args.command, _PACKAGES, args.output)
    names = ["tiny"] if args.tiny else args.models
    with tempfile.TemporaryDirectory() as folder:
        pairs = max(64 if args.tiny else 2**16, args.compare_at, _SMALL * max(args.ranks))
        store = random_store(Path(folder) / "store", pairs, 1000 if args.tiny else 2**15 - 2**11)
        for ranks, name in product(args.ranks, names):
            model = BertConfig(**TINY) if args.tiny else MODELS[name]()
            world = Silent(device, 0, ranks, distinct=False)
            searching = Search(Work(model, store, world, tuple(args.settings)), table, args, name)
            for kept, strategy in product(args.kept, args.strategies):
                if ranks > 1 or strategy != "tiled, ring":
                    searching.add(strategy, kept)
            if ranks == 1:
                searching.offload(args.offload_at)
            if ranks == 1 and args.compare_at:
                searching.compare(args.compare_at)


if __name__ == "__main__":
    sys.exit(main())
