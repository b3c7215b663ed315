"""Predicts memory and time of a step for several batch sizes and numbers of GPUs: `python -m scripts.plan_cluster`.
Nothing is measured.

- time: encoder, loss with its exchange, and sum of the parameter gradients, one after another
- memory: weights, gradients, AdamW's state and a bucket; the activations of a chunk; embeddings, their gradients and
  rounded copies; what the exchange holds

The exchange is the one that `loss.exchange: auto` takes by `retriever.parallel.cost`: the fastest that fits in a
quarter of the memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from retriever.command import above_zero, at_least_one, command, option
from retriever.parallel.cost import GATHER_SHARE, Exchange, Machine, Workload, choose, gather_cost, ring_cost

_GIB = 2**30
_STATE_BYTES = 16  # of a parameter: fp32 weight, gradient and AdamW's two moments
_BUCKET_MIB = 2 * 256  # gradients of a bucket, flat, before and after the sum
_EMBEDDING_BYTES = (
    4 + 4 + 2
)  # of a number of an embedding: it, its gradient, and it as the loss's matrix products read it
_ACTIVATION_BYTES = 52  # of a token, layer and hidden unit, for backward


@dataclass(frozen=True)
class Model:
    """An encoder on one GPU. `pairs_per_s` is the rate of a whole step without its loss, at `tokens_per_chunk`.
    Defaults: BERT-base.
    """

    pairs_per_s: float
    parameters: float = 109.5e6
    dim: int = 768
    layers: int = 12
    tokens_per_chunk: int = 65_536


@dataclass(frozen=True)
class Step:
    """The prediction for one optimizer step of a rank."""

    exchange: Exchange
    encoder_s: float
    loss_s: float
    gradients_s: float
    gib: float

    @property
    def total_s(self) -> float:
        """The three parts one after the other."""
        return self.encoder_s + self.loss_s + self.gradients_s


def predict(queries: int, ranks: int, model: Model, machine: Machine, memory_gib: float) -> Step:
    """A step over `queries` pairs (one passage each) on `ranks` GPUs with `memory_gib` each."""
    state_gib = (_STATE_BYTES * model.parameters + _BUCKET_MIB * 2**20) / _GIB
    activations_gib = _ACTIVATION_BYTES * model.layers * model.dim * model.tokens_per_chunk / _GIB
    numbers = 2 * queries / ranks * model.dim  # of the rank's embeddings
    rows_gib = _EMBEDDING_BYTES * numbers / _GIB
    work = Workload(queries, queries, model.dim, ranks)
    free_gib = memory_gib - 4 * model.parameters / _GIB  # before step 1
    exchange = choose(work, machine, GATHER_SHARE * 1024 * free_gib) if ranks > 1 else "gather"
    loss = (ring_cost if exchange == "ring" else gather_cost)(work, machine)
    loss_gib = (
        loss.mib / 1024 - 4 * numbers / _GIB
    )  # less the rank's own gradients, which `Estimate.mib` and `_EMBEDDING_BYTES` both count
    return Step(
        exchange,
        encoder_s=queries / ranks / model.pairs_per_s,
        loss_s=loss.total_ms / 1e3,
        gradients_s=_gradient_sum_s(model.parameters, ranks, machine),
        # Activations are gone while the loss is computed: the two share their place.
        gib=state_gib + rows_gib + max(activations_gib, loss_gib),
    )


def _gradient_sum_s(parameters: float, ranks: int, machine: Machine) -> float:
    """Seconds of an all-reduce in float32. 2·(W − 1)/W of its bytes pass through every GPU and, between nodes, through
    all their network cards.
    """
    share = 2 * (ranks - 1) / ranks * parameters * 4
    between = share / machine.ranks_per_node / machine.between_gb_s if ranks > machine.ranks_per_node else 0.0
    return max(share / machine.inside_gb_s, between) / 1e9


def table(
    batches: Sequence[int], ranks: Sequence[int], model: Model, machine: Machine, memory_gib: float
) -> Iterator[str]:
    """Lines of Markdown: one row per batch size, one column per number of GPUs; `—` where the memory is too small."""
    yield "| pairs in the batch | " + " | ".join(f"{w:,} GPU{'s' if w > 1 else ''}" for w in ranks) + " |"
    yield "|---" * (len(ranks) + 1) + "|"
    for queries in batches:
        cells = [_cell(predict(queries, w, model, machine, memory_gib), queries, w, memory_gib) for w in ranks]
        yield f"| {queries:,} | " + " | ".join(cells) + " |"


def _cell(step: Step, queries: int, ranks: int, memory_gib: float) -> str:
    if step.gib > memory_gib:
        return f"— ({step.gib:,.0f} GiB)"
    how = f", {step.exchange}" if ranks > 1 else ""
    return f"{_seconds(step.total_s)}, loss {step.loss_s / step.total_s:.0%}, {step.gib:.0f} GiB{how}"


def _seconds(s: float) -> str:
    if s < 1:
        return f"{s * 1e3:.0f} ms"
    return f"{s:.{1 if s < 100 else 0}f} s" if s < 1000 else f"{s / 60:,.0f} min"


_MACHINE, _BERT = Machine(), Model(pairs_per_s=6_800)


@command(
    "python -m scripts.plan_cluster",
    (__doc__ or "").partition(":")[0],
    option(
        "--batches",
        type=at_least_one,
        nargs="+",
        default=[2**k for k in (16, 18, 20, 22, 24)],
        help="pairs of a global batch",
    ),
    option("--gpus", type=at_least_one, nargs="+", default=[1, 8, 64, 256, 1024]),
    option("--pairs-per-s", type=above_zero, default=_BERT.pairs_per_s, help="of the encoder on one GPU"),
    option("--parameters", type=above_zero, default=_BERT.parameters, help="default: %(default).4g, BERT-base"),
    option("--dim", type=at_least_one, default=_BERT.dim, help="of an embedding and of the hidden layers"),
    option("--layers", type=at_least_one, default=_BERT.layers, help="default: %(default)s"),
    option("--tokens-per-chunk", type=at_least_one, default=_BERT.tokens_per_chunk, help="default: %(default)s"),
    option("--memory-gib", type=above_zero, default=75.0, help="of a GPU, that a run may use"),
    option("--gpus-per-node", type=at_least_one, default=_MACHINE.ranks_per_node, help="default: %(default)s"),
    option("--tflops", type=above_zero, default=_MACHINE.tflops, help="of the loss's products"),
    option("--inside-gb-s", type=above_zero, default=_MACHINE.inside_gb_s, help="GPU to GPU in a node"),
    option("--between-gb-s", type=above_zero, default=_MACHINE.between_gb_s, help="a GPU's network card"),
)
def main(args: argparse.Namespace) -> None:
    """Prints the table of docs/cluster.md, or one for another machine."""
    model = Model(args.pairs_per_s, args.parameters, args.dim, args.layers, args.tokens_per_chunk)
    machine = Machine(args.gpus_per_node, args.tflops, args.inside_gb_s, args.between_gb_s)
    print("\n".join(table(args.batches, args.gpus, model, machine, args.memory_gib)))


if __name__ == "__main__":
    sys.exit(main())
