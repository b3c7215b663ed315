"""Choice between Triton kernels and references, limits on row widths, and grids of persistent programs."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

WIDEST_ROW = 4096  # numbers: a row is normalised in the registers of one program
_INTERPRETED = 2  # processors that Triton's interpreter stands for


def on_kernels(x: Tensor) -> bool:
    """Whether `x` is computed on the Triton kernels: on a GPU, or through Triton's interpreter; float64 never is."""
    if x.dtype == torch.float64:
        return False
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def persistent_grid(x: Tensor, blocks: int, per_processor: float) -> int:
    """How many programs share `blocks` blocks of rows of x: `per_processor` for each multiprocessor of its GPU, at
    least one.

    Each stays on its multiprocessor and is there from the start.
    """
    processors = _processors(x.get_device()) if x.is_cuda else _INTERPRETED
    return max(1, min(blocks, int(processors * per_processor)))


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
