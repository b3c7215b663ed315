"""The pointwise parts of a transformer layer, each in one pass over memory: dropout + residual + LayerNorm, bias + GELU, column sums.

Each is one call to torch.compile and to autograd. On a GPU they are Triton kernels; a CPU and float64 take `fused_layer_reference`.
Arithmetic is in float32. Dropout masks are a hash of the seed (`dropout_hash`): the backward pass and a second forward pass draw them
again, a forward pass gives the same bits with and without a graph, and repeated runs the same gradients.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

__all__ = ["bias_gelu", "column_sum", "dropout_add_norm"]

_WIDEST_ROW = 4096


def dropout_add_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = LayerNorm(z) · weight + norm_bias of z = dropout(x + bias) + residual, over the last dimension: (y, y in x's dtype).

    x [..., D] bfloat16, float16 or float32; residual [..., D], weight [D] and norm_bias [D] float32 (where x is float64, all are); bias [D]
    of any floating dtype or None; all contiguous. Returns y in the residual's dtype and the same rounded to x's (for float32 and float64
    x one tensor twice). `dropout` in 0..1 (1 excluded) drops elements by the hash of `seed` (int64 [1] on the same device, needed where
    dropout > 0), their row and their column: two uses need two seeds. Differentiable once in all five tensors.
    Raises ValueError where shapes, dtypes, devices or numbers do not fit. (Ba et al. 2016, arXiv:1607.06450)
    """
    D = x.shape[-1] if x.ndim else 0
    if not 1 <= D <= _WIDEST_ROW or residual.shape != x.shape:
        raise ValueError(f"expected x and residual [..., D], D in 1..{_WIDEST_ROW}, received {list(x.shape)} and {list(residual.shape)}")
    wide = _wide_dtype(x)
    _check("residual", residual, x, wide)
    _check("weight", weight, x, wide, D)
    _check("norm_bias", norm_bias, x, wide, D)
    if bias is not None:
        _check("bias", bias, x, size=D)
    if not 0 <= dropout < 1 or (dropout > 0 and seed is None):
        raise ValueError(f"expected dropout in 0..1 (1 excluded) and a seed where it is above 0, received {dropout} and seed {seed}")
    if seed is not None and (seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != x.device):
        raise ValueError(f"expected seed [1] int64 on {x.device}, received {seed.dtype} {list(seed.shape)} on {seed.device}")
    normed, low, _, _ = _norm(x, bias, residual, weight, norm_bias, seed if dropout > 0 else None, eps, dropout)
    return normed, normed if x.dtype == wide else low


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """u Φ(u) of u = x + bias, Φ the normal distribution (GELU in its exact form): [..., F] in x's dtype.

    x [..., F] bfloat16, float16, float32 or float64, bias [F] of any floating dtype, both contiguous. Differentiable once in both.
    Raises ValueError where shapes, dtypes or devices do not fit. (Hendrycks and Gimpel 2016, arXiv:1606.08415)
    """
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"expected x [..., F], received {list(x.shape)}")
    _check("bias", bias, x, size=x.shape[-1])
    return _gelu(x, bias)


def column_sum(x: Tensor) -> Tensor:
    """Σ over all dimensions of x [..., F] but the last, contiguous: [F] float32 (float64 of float64). Not differentiable."""
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"expected x [..., F], received {list(x.shape)}")
    _check("x", x, x)
    return _column_sum(x)


def norm_forward(
    x: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, norm_bias: Tensor, seed: Tensor | None, eps: float, dropout: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, y in x's dtype or, where that is y's own, an empty tensor, mean [T], rstd [T]) of `dropout_add_norm`, without a graph."""
    if _on_gpu(x):
        from kernels import fused_norm_triton as kernels
    else:
        from kernels import fused_layer_reference as kernels
    return kernels.norm_forward(x, bias, residual, weight, norm_bias, seed if dropout > 0 else None, eps, dropout)


def norm_backward(
    d_normed: Tensor | None,
    d_low: Tensor | None,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dresidual, [K, D]: dweight, dnorm_bias and, where there is a bias, dbias) from the gradients at both results."""
    if _on_gpu(x):
        from kernels import fused_norm_triton as kernels
    else:
        from kernels import fused_layer_reference as kernels
    return kernels.norm_backward(d_normed, d_low, x, bias, residual, weight, mean, rstd, seed if dropout > 0 else None, dropout)


def gelu_forward(x: Tensor, bias: Tensor) -> Tensor:
    """`bias_gelu` without a graph."""
    if _on_gpu(x):
        from kernels import fused_gelu_triton as kernels
    else:
        from kernels import fused_layer_reference as kernels
    return kernels.gelu_forward(x, bias)


def gelu_backward(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dbias)."""
    if _on_gpu(x):
        from kernels import fused_gelu_triton as kernels
    else:
        from kernels import fused_layer_reference as kernels
    return kernels.gelu_backward(dout, x, bias)


@torch.library.custom_op("bigbatch::dropout_add_norm", mutates_args=())
def _norm(
    x: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, norm_bias: Tensor, seed: Tensor | None, eps: float, dropout: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, y in x's dtype or, where that is y's own, an empty tensor: outputs may not share memory, mean [T], rstd [T])."""
    if _on_gpu(x):
        from kernels.fused_norm_triton import norm_forward
    else:
        from kernels.fused_layer_reference import norm_forward
    normed, low, mean, rstd = norm_forward(_rows(x), bias, _rows(residual), weight, norm_bias, seed, eps, dropout)
    return normed.view(x.shape), low.view(x.shape if low.dtype != normed.dtype else 0), mean, rstd


@torch.library.custom_op("bigbatch::dropout_add_norm_backward", mutates_args=())
def _norm_backward(
    d_normed: Tensor | None,
    d_low: Tensor | None,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dresidual, [K, D]: dweight, dnorm_bias and, where there is a bias, dbias)."""
    if _on_gpu(x):
        from kernels.fused_norm_triton import norm_backward
    else:
        from kernels.fused_layer_reference import norm_backward
    d_normed, d_low = (None if g is None else _rows(g.contiguous()) for g in (d_normed, d_low))
    dx, dresidual, sums = norm_backward(d_normed, d_low, _rows(x), bias, _rows(residual), weight, mean, rstd, seed, dropout)
    return dx.view(x.shape), dresidual.view(x.shape), sums


@torch.library.custom_op("bigbatch::bias_gelu", mutates_args=())
def _gelu(x: Tensor, bias: Tensor) -> Tensor:
    if _on_gpu(x):
        from kernels.fused_gelu_triton import gelu_forward
    else:
        from kernels.fused_layer_reference import gelu_forward
    return gelu_forward(_rows(x), bias).view(x.shape)


@torch.library.custom_op("bigbatch::bias_gelu_backward", mutates_args=())
def _gelu_backward(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    if _on_gpu(x):
        from kernels.fused_gelu_triton import gelu_backward
    else:
        from kernels.fused_layer_reference import gelu_backward
    dx, dbias = gelu_backward(_rows(dout.contiguous()), _rows(x), bias)
    return dx.view(x.shape), dbias


@torch.library.custom_op("bigbatch::column_sum", mutates_args=())
def _column_sum(x: Tensor) -> Tensor:
    if _on_gpu(x):
        from kernels.column_sum_triton import column_sum
    else:
        from kernels.fused_layer_reference import column_sum
    return column_sum(_rows(x))


@_norm.register_fake
def _(x, bias, residual, weight, norm_bias, seed, eps, dropout):  # type: ignore[no-untyped-def]
    low = x.new_empty(0 if x.dtype == residual.dtype else x.shape)
    statistics = (residual.new_empty(x.numel() // x.shape[-1]) for _ in range(2))
    return residual.new_empty(x.shape), low, *statistics


@_norm_backward.register_fake
def _(d_normed, d_low, x, bias, residual, weight, mean, rstd, seed, dropout):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), residual.new_empty(x.shape), residual.new_empty(2 if bias is None else 3, x.shape[-1])


@_gelu.register_fake
def _(x, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@_gelu_backward.register_fake
def _(dout, x, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(x.shape[-1], dtype=_wide_dtype(x))


@_column_sum.register_fake
def _(x):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[-1], dtype=_wide_dtype(x))


def _remember_norm(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, bias, residual, weight, _, seed, _, ctx.dropout = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(x, bias, residual, weight, *output[2:], seed)


def _differentiate_norm(ctx, d_normed, d_low, *_):  # type: ignore[no-untyped-def]
    x, bias, residual, weight, mean, rstd, seed = ctx.saved_tensors
    d_low = None if x.dtype == residual.dtype else d_low
    dx, dresidual, sums = _norm_backward(d_normed, d_low, x, bias, residual, weight, mean, rstd, seed, ctx.dropout)
    return dx, None if bias is None else sums[2].to(bias.dtype), dresidual, sums[0], sums[1], None, None, None


def _remember_gelu(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _differentiate_gelu(ctx, dout):  # type: ignore[no-untyped-def]
    x, bias = ctx.saved_tensors
    dx, dbias = _gelu_backward(dout, x, bias)
    return dx, dbias.to(bias.dtype)


_norm.register_autograd(_differentiate_norm, setup_context=_remember_norm)
_gelu.register_autograd(_differentiate_gelu, setup_context=_remember_gelu)


def _on_gpu(x: Tensor) -> bool:
    return x.dtype != torch.float64 and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(name: str, tensor: Tensor, x: Tensor, dtype: torch.dtype | None = None, size: int | None = None) -> None:
    """`tensor` beside x: its dtype (None: any floating one), its device and, of a vector, its size; and that both are contiguous."""
    if not x.is_floating_point() or not x.is_contiguous():
        raise ValueError(f"expected x floating and contiguous, received {x.dtype} with strides {x.stride()}")
    if tensor.dtype != (dtype or tensor.dtype) or not tensor.is_floating_point() or tensor.device != x.device:
        raise ValueError(f"expected {name} {dtype or 'of a floating dtype'} on {x.device}, received {tensor.dtype} on {tensor.device}")
    if (size is not None and tensor.shape != (size,)) or not tensor.is_contiguous():
        shape = list(tensor.shape) if size is None else [size]
        raise ValueError(f"expected {name} {shape}, contiguous, received {list(tensor.shape)} with strides {tensor.stride()}")
