"""Batch normalisation, by which a text's embedding depends on the other texts of its chunk.

Each chunk normalises by its own rows, in both passes of a step; so the gradient depends on how the batch is cut, and on
nothing else. The running values, which serve after training, are updated by the first pass alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """The modules of batch normalisation in `module`, by their names."""
    return {name: part for name, part in module.named_modules() if isinstance(part, _BatchNorm)}


@contextmanager
def running_values_kept(module: nn.Module) -> Iterator[None]:
    """Inside, training mode normalises by the rows at hand as it does outside, and the running values stay as they
    are.
    """
    tracking = [part for part in batch_norms(module).values() if part.track_running_stats]
    for part in tracking:
        part.track_running_stats = False
    try:
        yield
    finally:
        for part in tracking:
            part.track_running_stats = True
