"""Rows of the step's table: each form of ours checked and timed, the floor, the peers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from transformers import BertModel

from retriever.data.batch import Batch
from retriever.retention import Retention
from scripts.bench.measure import add_matmul_rate
from scripts.bench.step_methods import ALL_GRAPHS, Sample, Trainer, Work, gradient_error, replays_bitwise, sample
from scripts.bench.step_peers import MINI_BATCHES, PEERS, best_sample
from scripts.bench.tables import Table

_WRONG = 1.5  # times the error of the library's own layers in bf16: a gradient further off is another function
_ROUNDING = 1e-4  # an error that fp32 may have
_CHECKED_PAIRS = 128
_REFERENCE_SIZE = 4096  # tokens of a chunk
_SMALL = 4096  # pairs
_TWO_STEPS = 32_768  # pairs: a larger batch is trained on once


@dataclass(frozen=True)
class Form:
    """A way to run our step: what follows the batch size in its case, and the settings that make it."""

    condition: str
    settings: tuple[str, ...] = ()
    retention: Retention | None = None  # None: as preflight decides


_LIBRARY = ("model.fused=false", "model.compile=false")
PLAIN = ("model.attention=packed", *_LIBRARY)
PADDED = ("model.attention=padded", *_LIBRARY)
PACKED_FUSED = ("model.attention=packed", "model.fused=true", "model.compile=false")
PACKED_COMPILED = ("model.attention=packed", "model.fused=false", "model.compile=true")
_MEASURED = ("run.preflight=only", "batch.retain=auto")
AUTO = Form("", (*_MEASURED, "batch.retain_products=auto"))  # and chunks of the size that was measured to be best
FORMS = {
    "graphs": Form("graphs", _MEASURED),
    "unretained": Form("nothing kept"),
    "compiled": Form("packed,compiled", PACKED_COMPILED),
    "packed": Form("packed", PLAIN),
    "padded": Form("padded", PADDED),
}
# The same batch, packed and uncompiled: activations recomputed layer by layer, chunk by chunk, or (cost of neither) all
# kept.
RECOMPUTING = (
    Form("checkpointing", (*PLAIN, "model.gradient_checkpointing=true"), ALL_GRAPHS),
    Form("cache", PLAIN),
)


class Bench:
    """The table being filled, and what every row of it is measured with."""

    def __init__(self, work: Work, table: Table, seconds: float) -> None:
        self.work, self.table, self._seconds = work, table, seconds
        self.tflops = add_matmul_rate(table, work.device)
        self._sizes: dict[int, int] = {}  # tokens of a chunk that were measured to be best, by pairs in the batch
        self._checked: dict[tuple[str, ...], bool] = {}
        with torch.device("meta"):
            tower = BertModel(work.model, add_pooling_layer=False)
        self._parameters = sum(p.numel() for name, p in tower.named_parameters() if not name.startswith("embeddings."))

    def measure_form(self, queries: int, form: Form) -> None:
        """Our step in one form, checked first."""
        case = _case(queries, form.condition)
        with self.table.attempt(case, "bigbatch", "pairs_per_s", "pairs/s"):
            trainer = self._trainer(queries, form)
            if not self._right(trainer, form, case):
                return
            found = self._sample(trainer, trainer.step, queries)
            self._add(case, "bigbatch", queries, found, _modes(trainer))
            graphs = min(1.0, trainer.retention.graphs / found.tokens)
            self.table.add(case, "bigbatch", "retained", graphs, "of tokens")
            self.table.add(
                case, "bigbatch", "products", min(1.0 - graphs, trainer.retention.products / found.tokens), "of tokens"
            )
            if (forecast := trainer.forecast) is not None:
                self.table.add(case, "bigbatch", "predicted_pairs_per_s", forecast.pairs_per_s, "pairs/s")
                if forecast.working_bytes:
                    self.table.add(case, "bigbatch", "predicted_peak_gib", forecast.peak_bytes / 2**30, "GiB")

    def measure_floor(self, queries: int) -> None:
        """One pass of our own encoder in its default form."""
        case = _case(queries)
        with self.table.attempt(case, "floor", "pairs_per_s", "pairs/s"):
            trainer = self._trainer(queries, Form(""))
            found = self._sample(trainer, trainer.single_pass, queries)
            self._add(case, "floor", queries, found, "one encoding with its graph, given gradients, update; no loss")

    def measure_peer(self, name: str, queries: int, *, by_length: bool) -> None:
        """A peer at its best mini-batch size."""
        case, sizes = _case(queries, "sorted" if by_length else ""), MINI_BATCHES[name][by_length]
        with self.table.attempt(case, name, "pairs_per_s", "pairs/s"):
            peer = PEERS[name](self.work)
            found, size = best_sample(self.work, peer, queries, sizes, by_length=by_length, seconds=self._seconds)
            order = "sorted by length beforehand" if by_length else "in the data's order"
            chosen = f"{size} at once" + (f", the best of {', '.join(map(str, sizes))}" if len(sizes) > 1 else "")
            self._add(case, name, queries, found, f"{order}; {chosen}; {peer.note}")

    def _trainer(self, queries: int, form: Form) -> Trainer:
        size = self._sizes.get(queries, max(self._sizes.values(), default=None))
        given = () if form is AUTO or size is None else (f"batch.tokens_per_chunk={size}",)
        trainer = Trainer(self.work, self.work.configuration(queries, *given, *form.settings), retention=form.retention)
        if form is AUTO:
            self._sizes[queries] = int(trainer.config.batch.tokens_per_chunk)
        return trainer

    def _right(self, trainer: Trainer, form: Form, case: str) -> bool:
        """Whether the form computes the right gradient, seen once for each way to run the encoder."""
        if form.settings not in self._checked:
            pairs = min(_CHECKED_PAIRS, trainer.config.batch.queries)
            exact, usual = (
                self._reference(pairs, *more) for more in (("optim.precision=fp32", "loss.precision=fp32"), ())
            )
            allowed = max(_ROUNDING, _WRONG * gradient_error(usual, exact, pairs))
            error, replayed = gradient_error(trainer, exact, pairs), replays_bitwise(trainer, pairs)
            note = f"against fp32; allowed {allowed:.2g}; " + ("replayed bitwise" if replayed else "the replay differs")
            self.table.add(case, "bigbatch", "gradient_error", error, "relative", note)
            self._checked[form.settings] = replayed and error <= allowed
        if not self._checked[form.settings]:
            self.table.add(case, "bigbatch", "pairs_per_s", None, "pairs/s", "not timed: wrong")
        return self._checked[form.settings]

    def _reference(self, queries: int, *settings: str) -> Trainer:
        size = f"batch.tokens_per_chunk={_REFERENCE_SIZE}"
        return Trainer(self.work, self.work.configuration(queries, *PADDED, size, *settings), retention=ALL_GRAPHS)

    def _sample(self, trainer: Trainer, step: Callable[[Batch], object], queries: int) -> Sample:
        trainer.step(trainer.first_batch(min(queries, _SMALL)))  # compiles and tunes
        large = queries > _TWO_STEPS
        with closing(trainer.batches(queries)) as batches:  # type: ignore[type-var]
            return sample(step, batches, self.work.device, self._seconds / (1 + large), warm=not large)

    def _add(self, case: str, method: str, queries: int, found: Sample, note: str = "") -> None:
        add = partial(self.table.add, case, method)
        add("pairs_per_s", queries / found.seconds, "pairs/s", note)
        add("tokens_per_s", found.tokens / found.seconds, "tokens/s")
        if self.tflops is not None:
            add("mfu", 6 * self._parameters * found.tokens / found.seconds / self.tflops / 1e12, "of the matmul rate")
        if found.peak_gib is not None:
            add("peak_gib", found.peak_gib, "GiB")
        if found.waited is not None:
            add("waited", found.waited, "of the step")


def _case(queries: int, condition: str = "") -> str:
    return f"b={queries}" + (f",{condition}" if condition else "")


def _modes(trainer: Trainer) -> str:
    """How the towers computed."""
    model = trainer.config.model
    layers = "fused" if model.fused else "compiled" if model.compile else "library's"
    return f"{model.attention}, {layers} layers, chunks of {trainer.config.batch.tokens_per_chunk} tokens"
