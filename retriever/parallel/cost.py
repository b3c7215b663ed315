"""Cost model of the exchange of passages, from bytes, hops and bandwidths.

`loss.exchange: auto` takes the cheaper exchange that fits in memory.

With W ranks, B = b/W queries and N = n/W passages a rank, dimension D, s bytes a number on the way and R operations a
second and rank:

    gather   6·B·n·D operations (8 if symmetric, or if the workspace holds few rows of n columns), between an all-gather
             of (n − N)·D·s bytes and a reduce-scatter of (n − N)·D·4 bytes, both counted in full
    ring     2·B·N·D operations per block in sweep 1, during a transfer of N·D·s bytes,
             and 6·B·N·D in sweep 2, during one of N·D·(s + 4) bytes

A hop is exposed as far as it takes longer than the work on a block. Between nodes a ring has one rank's network card
for a hop, a collective has the cards of all ranks of a node.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from retriever.config_sources import hard_negatives
from retriever.config_tree import ConfigError
from retriever.parallel.world import World

if TYPE_CHECKING:
    from retriever.config import Config

Exchange = Literal["ring", "gather"]

GATHER_SHARE = 0.25  # of the memory that is free before step 1: the encoder's activations need the rest
_AUTO_WORKSPACE_MIB = 1024
RING_OPERATIONS = 8  # for a number of a query and a passage: two sweeps
_ONE_PASS_ROWS = 2048  # in a workspace that holds fewer, `kernels.infonce.one_pass` takes two passes
_BYTES = {"bf16": 2, "high": 4, "fp32": 4}
_SLOWER = {"bf16": 1.0, "high": 2.7, "fp32": 12.0}  # than bf16, on the matrix units


@dataclass(frozen=True)
class Machine:
    """One rank's share of the hardware. Defaults are measured on H200s joined by NVLink; `between_gb_s` is a 400 Gb/s
    card.
    """

    ranks_per_node: int = 8
    tflops: float = 590.0  # of the loss's tile passes and matrix products, bf16
    inside_gb_s: float = 240.0  # from a rank to its neighbour in the node, each direction
    between_gb_s: float = 45.0  # through a rank's network card
    block_ms: float = 0.1  # of launches and waits, for a block in a sweep
    call_ms: float = 1.5  # of a ring: the device waits for the host, which asks how many known pairs there are

    def hop_gb_s(self, ranks: int) -> float:
        """Bandwidth from a rank to the next one in a ring of `ranks`."""
        return self.inside_gb_s if ranks <= self.ranks_per_node else min(self.inside_gb_s, self.between_gb_s)

    @staticmethod
    def here() -> Machine:
        """This launch's number of ranks a node, as torchrun and accelerate tell it."""
        return Machine(ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", torch.cuda.device_count() or 1)))


@dataclass(frozen=True)
class Workload:
    """One call of the tiled loss; numbers of queries and passages are global."""

    queries: int
    passages: int
    dim: int
    ranks: int
    symmetric: bool = False
    precision: str = "bf16"
    workspace_mib: int = _AUTO_WORKSPACE_MIB


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes of a rank in one call."""

    compute_ms: float
    transfer_ms: float
    exposed_ms: float  # of the transfers: not hidden behind work
    mib: float  # beside queries and passages: gradients, what was received, workspace

    @property
    def total_ms(self) -> float:
        """Work, and what of the transfers it does not hide."""
        return self.compute_ms + self.exposed_ms


def gathered_operations(rows: float, columns: int, symmetric: bool, precision: str, workspace_mib: float) -> int:
    """Operations for a number of a query and a passage, of `rows` queries and `columns` passages at hand: 8 in two
    passes, 6 in one.
    """
    in_workspace = workspace_mib * 2**20 / (columns * (2 if precision == "bf16" else 4))
    return RING_OPERATIONS if symmetric or in_workspace < min(rows, _ONE_PASS_ROWS) else 6


def gather_cost(work: Workload, machine: Machine) -> Estimate:
    """All passages at hand."""
    rows, columns = work.queries / work.ranks, work.passages
    each = gathered_operations(rows, columns, work.symmetric, work.precision, work.workspace_mib)
    compute = _compute_ms(each * rows * columns * work.dim, work, machine) + machine.block_ms
    wide = _BYTES[work.precision] + 4  # there in the loss's precision, back in float32
    nodes = -(-work.ranks // machine.ranks_per_node)
    inside = (columns - columns / work.ranks) * work.dim * wide / machine.inside_gb_s
    between = (columns - columns / nodes) * work.dim * wide / machine.between_gb_s / machine.ranks_per_node
    transfer = max(inside, between) / 1e6
    received = columns * work.dim * wide if work.ranks > 1 else 0.0
    return Estimate(
        compute,
        transfer,
        transfer,
        (received + (rows + columns / work.ranks) * work.dim * 4) / 2**20 + work.workspace_mib,
    )


def ring_cost(work: Workload, machine: Machine) -> Estimate:
    """Two sweeps over blocks, each with the next one in flight."""
    rows, columns = work.queries / work.ranks, work.passages / work.ranks
    narrow, hops = _BYTES[work.precision], work.ranks - 1
    a_block = _compute_ms(RING_OPERATIONS * rows * columns * work.dim, work, machine) + 2 * machine.block_ms
    compute = work.ranks * a_block + machine.call_ms
    transfer = exposed = 0.0
    # Sweep 2 begins with the block that sweep 1 ended on.
    for operations, width, times in ((2, narrow, hops), (6, 4, min(hops, 1)), (6, narrow + 4, max(0, hops - 1))):
        hop = columns * work.dim * width / machine.hop_gb_s(work.ranks) / 1e6
        transfer += times * hop
        exposed += times * max(0.0, hop - _compute_ms(operations * rows * columns * work.dim, work, machine))
    held = columns * work.dim * (min(2, hops) * narrow + min(3, work.ranks + 1) * 4) + rows * work.dim * 4
    return Estimate(compute, transfer, exposed, held / 2**20 + work.workspace_mib)


def choose(work: Workload, machine: Machine, budget_mib: float) -> Exchange:
    """The faster exchange of those whose memory stays within the budget; the ring, which needs least, where none
    does.
    """
    gather = gather_cost(work, machine)
    return "gather" if gather.mib <= budget_mib and gather.total_ms <= ring_cost(work, machine).total_ms else "ring"


def exchange_for(config: Config, dim: int, world: World) -> Exchange:
    """`loss.exchange` with `auto` settled for embeddings of `dim` numbers, the same on every rank; every rank calls it.

    Raises ConfigError where a ring is asked for with another strategy than tiled.
    """
    loss = config.loss
    if loss.exchange == "ring" and loss.strategy != "tiled":
        raise ConfigError(
            f"loss.exchange: 'ring' is for loss.strategy=tiled; received loss.strategy={loss.strategy}, which gathers"
        )
    if loss.exchange != "auto":
        return loss.exchange
    if config.batch.offload:
        return "ring"
    if world.size == 1 or loss.strategy != "tiled":
        return "gather"
    free = float("inf")
    if world.device.type == "cuda":
        free = world.least(torch.cuda.mem_get_info(world.device)[0]) / 2**20
    workspace = _AUTO_WORKSPACE_MIB if loss.workspace_mib == "auto" else loss.workspace_mib
    most = max(hard_negatives(config.data), default=config.data.negatives)
    passages = config.batch.queries * (loss.positives + most)
    work = Workload(
        config.batch.queries, passages, dim, world.size, len(loss.softmaxes[0]) > 1, loss.precision, workspace
    )
    machine = Machine.here()
    fewest = int(world.least(machine.ranks_per_node))  # nodes may be of unequal size
    return choose(work, replace(machine, ranks_per_node=fewest), GATHER_SHARE * free)


def _compute_ms(operations: float, work: Workload, machine: Machine) -> float:
    return operations * _SLOWER[work.precision] / machine.tflops / 1e9
