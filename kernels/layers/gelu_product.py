"""A matrix product and the GELU after it, forward and backward; on Hopper one kernel each (`gelu_hopper`).

Elsewhere, and where a kernel of its own is not worth its launch: the library's product, then one pass over memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels.layers.api import gelu_backward, gelu_forward

# Numbers of a result from which on the kernel is taken: below, it spares the GPU less time than its launch takes from
# the host.
FUSED_FROM = 2**25


def gelu_product(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor | None, Tensor]:
    """(u, gelu(u)) of u = x Wᵀ + bias, each [T, F] in x's dtype; where not `keep`, u is None and need not be written at
    all.

    x [T, D], weight W [F, D], bias [F]: one floating dtype, contiguous. gelu(u) has the same bits with u and without.
    GELU in its exact form, of finite u; that of half precision on Hopper is of u before rounding.
    (Hendrycks and Gimpel 2016, arXiv:1606.08415)
    """
    if _is_fused(x, weight):
        from kernels.layers import gelu_hopper

        return gelu_hopper.gelu_product(x, weight, bias, keep)
    u = linear(x, weight, bias)
    return u if keep else None, gelu_forward(u)


def gelu_product_backward(dy: Tensor, weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(du, Σ_rows du) with du = (dy Wᵀ) gelu′(u): the gradient at u, and that of its bias.

    u [T, F] as `gelu_product` gave it; dy [T, D], like u, the gradient at gelu(u) W; weight W [F, D], like u, as
    `transposed` gives it. Returns du [T, F] in u's dtype and the sums [F] float32 (float64 of float64).
    """
    if _is_fused(dy, weight):
        from kernels.layers import gelu_hopper

        return gelu_hopper.gelu_product_backward(dy, weight, u)
    return gelu_backward(torch.mm(dy, weight.T), u)


def transposed(weight: Tensor) -> Tensor:
    """weight [D, F] transposed as `gelu_product_backward` reads it: in memory too where one kernel may do its work."""
    return weight.T.contiguous() if _can_fuse(weight) else weight.T


def _is_fused(x: Tensor, weight: Tensor) -> bool:
    return len(x) * len(weight) >= FUSED_FROM and _can_fuse(weight) and x.dtype == weight.dtype


def _can_fuse(weight: Tensor) -> bool:
    if not weight.is_cuda or weight.shape[0] % 8 or weight.shape[1] % 8:  # the copy engine takes rows of whole 16 bytes
        return False
    from kernels import hopper

    return hopper.fits(weight)
