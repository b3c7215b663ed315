"""Matrix products in the precision of a tier: operands as sums of parts, accumulated in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor


def parts_of(x: Tensor, precision: str) -> list[Tensor]:
    """`x` as the operands of `add_product`: bf16 (bf16), bf16 and what rounding left, also bf16 (high), or fp32
    (fp32).
    """
    if precision == "fp32":
        return [x.float()]
    value = x.to(torch.bfloat16)
    if precision == "bf16" or x.dtype == torch.bfloat16:
        return [value]
    return [value, (x.float() - value.float()).to(torch.bfloat16)]


def add_product(
    out: Tensor, left: Sequence[Tensor], right: Sequence[Tensor], *, fresh: bool, inner: int | None = None
) -> None:
    """out (+)= (Σ left) @ (Σ right), in place; `fresh` overwrites `out`, whatever it holds.

    left: parts [M, K], right: parts [K, N]; out [M, N] float32. The product of two residuals is below fp32 and left
    out. At most `inner` of K go through the matrix unit's accumulator at a time: it rounds towards zero, which adds up
    over long sums.
    """
    K = left[0].shape[1]
    step = inner or K
    for k in range(0, K, step):
        for i, a in enumerate(left):
            for b in right if i == 0 else right[:1]:
                _accumulate(out, a[:, k : k + step], b[k : k + step], fresh)
                fresh = False


def _accumulate(out: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    beta = 0 if fresh else 1
    if a.dtype == torch.bfloat16 and a.is_cuda:
        torch.addmm(out, a, b, torch.float32, beta=beta, out=out)
    else:
        with float32_products("ieee"):
            torch.addmm(out, a.float(), b.float(), beta=beta, out=out)


@contextmanager
def float32_products(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """A GPU's fp32 products in fp32 ("ieee") or on TF32 matrix units, whatever the program allows elsewhere."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
