"""One rank's part of the loss, as every strategy takes it: its rows and columns, and which pairs count."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from kernels.infonce.api import Block, Exclusions, MaskTables, Precision, block_of
from kernels.infonce.two_pass import Passages, first_pass, second_pass
from retriever.data.batch import KnownPairs


@dataclass(frozen=True)
class Problem:
    """One rank's part of the loss. B queries, N passages; float32, or float64 for float64 representations."""

    queries: Tensor  # [B, D], with the values of the precision tier
    passages: Tensor  # [N, D]
    positives: Tensor  # [B] int64: column of each query's positive, -1 for an ignored row
    exclusions: Exclusions  # the positive of a row is among its exclusions
    scale: float
    weight: float  # of each query's loss in the gradient: 1 / global queries, times the gradient scale
    symmetric: bool
    precision: Precision
    workspace_mib: int | None = None  # of the tiled strategy on a GPU; None: up to 1 GiB of what is free
    exchange: Literal["ring", "gather"] = "gather"  # how the ranks of the tiled strategy see each other's passages
    block_rows: int | None = None  # of the tiled strategy's blocks where queries and passages are in host memory
    # What is known beforehand, so that the host need not wait for the device to say it; None: it is asked.
    known_pairs: KnownPairs | None = None  # those of `exclusions`
    ignores: bool | None = None  # whether any row is ignored
    largest: float | None = None  # similarity that none exceeds, rounding apart

    @cached_property
    def active(self) -> Tensor:
        """Rows [B] that are not ignored."""
        return self.positives >= 0

    @cached_property
    def columns(self) -> Tensor:
        """Column [B] of each row's positive; column 0 stands in where the row is ignored."""
        return self.positives.clamp(min=0)

    @property
    def wire_dtype(self) -> torch.dtype:
        """The dtype in which representations go to other ranks and to host memory: their values are exact in it."""
        return torch.bfloat16 if self.precision == "bf16" else self.passages.dtype

    def block(self, queries: Tensor, passages: Tensor, masks: MaskTables) -> Block:
        """A block of some of the queries and of any rank's passages, under this problem's settings."""
        return block_of(
            queries, passages, self.scale, masks,
            precision=self.precision, workspace_mib=self.workspace_mib, largest=self.largest,
        )  # fmt: skip

    def contrast(self, passages: Passages) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [B] and both gradients in two passes. (Cheng et al. 2024, arXiv:2410.17243)"""
        weights = torch.zeros_like(self.columns, dtype=torch.promote_types(self.queries.dtype, torch.float32))
        weights.masked_fill_(self.active, self.weight)
        terms = first_pass(passages, self.columns, weights, symmetric=self.symmetric)
        return terms.loss.where(self.active, 0.0), *second_pass(passages, terms)
