"""Programs that stay on their multiprocessor and share the rows among them: how many, so that each is resident from the start."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_INTERPRETED = 2  # processors that Triton's interpreter stands for


def resident_programs(x: Tensor, blocks: int, per_processor: float) -> int:
    """How many programs share `blocks` blocks of rows of x: `per_processor` for each multiprocessor of its GPU, at least one."""
    processors = _processors(x.get_device()) if x.is_cuda else _INTERPRETED
    return max(1, min(blocks, int(processors * per_processor)))


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
