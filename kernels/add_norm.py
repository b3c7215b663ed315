"""Residual and LayerNorm where nothing is trained: half the memory traffic of the fused layers' own, which keep a float32 stream."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from kernels.dispatch import WIDEST_ROW, on_kernels

__all__ = ["add_norm"]

_HALF = (torch.bfloat16, torch.float16)


def add_norm(
    x: Tensor, bias: Tensor, stream: Tensor, weight: Tensor, norm_bias: Tensor, *, eps: float, last: bool = False
) -> tuple[Tensor, Tensor]:
    """y = LayerNorm(x + bias + stream) · weight + norm_bias over the last dimension: y as the next stream, and y in x's dtype.

    x [T, D] bfloat16 or float16, stream [T, D] float16, D ≤ 4096; bias, weight and norm_bias [D] float32; all contiguous, on one device.
    Computed in float32 and rounded once; for float16 x both results are one tensor. `last`: no layer follows, and both are y in float32,
    one tensor. Not differentiable.
    Raises ValueError where shapes, dtypes or devices do not fit. (Ba et al. 2016, arXiv:1607.06450)
    """
    if x.ndim != 2 or not 1 <= x.shape[1] <= WIDEST_ROW or x.dtype not in _HALF:
        raise ValueError(f"expected x [T, D] bfloat16 or float16, D in 1..{WIDEST_ROW}, received {list(x.shape)} {x.dtype}")
    vectors = {"bias": bias, "weight": weight, "norm_bias": norm_bias}
    expected = {"stream": (x.shape, torch.float16)} | {name: (x.shape[1:], torch.float32) for name in vectors}
    for name, tensor in {"stream": stream, **vectors}.items():
        if (
            (tensor.shape, tensor.dtype) != expected[name]
            or tensor.device != x.device
            or not (tensor.is_contiguous() and x.is_contiguous())
        ):
            shape, dtype = expected[name]
            raise ValueError(
                f"expected {name} {list(shape)} {dtype} on {x.device}, contiguous as x is, received {list(tensor.shape)} {tensor.dtype} "
                f"on {tensor.device}"
            )
    if on_kernels(x):
        from kernels import add_norm_triton

        return add_norm_triton.add_norm(x, bias, stream, weight, norm_bias, eps, last)
    y = layer_norm(x.float() + bias + stream.float(), x.shape[1:], weight, norm_bias, eps)  # [T, D]
    if last:
        return y, y
    following = y.to(torch.float16)
    return following, following if x.dtype == torch.float16 else y.to(x.dtype)
