"""Which kernel makes a pass over the tiles: Hopper's where it can do what is asked (`tiles_hopper`), else the portable
one (`tiles`).
"""

from __future__ import annotations

from torch import Tensor

from kernels.infonce import tiles, tiles_hopper
from kernels.infonce.exclusions import MaskTables
from kernels.infonce.tiles import Pass

__all__ = ["Pass", "tile_pass"]


def tile_pass(
    queries: Tensor, passages: Tensor, scale: float, masks: MaskTables, asked: Pass
) -> tuple[Tensor | None, Tensor | None]:
    """The partial reductions of `tiles.tile_pass`, whose arguments these are, on the faster kernel."""
    kernel = tiles_hopper if tiles_hopper.can_do(asked) and tiles_hopper.fits(queries) else tiles
    return kernel.tile_pass(queries, passages, scale, masks, asked)
