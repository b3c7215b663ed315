"""The pointwise parts of a transformer layer, each in one pass over memory: dropout + residual + LayerNorm, and GELU.

Forward and backward as plain functions, without a graph: `post_norm` calls them. On a GPU they are Triton
kernels; a CPU and float64 take `reference`. Arithmetic is in float32. Dropout masks are a hash of the seed (`dropout`):
the backward pass and a second forward pass draw them again, and runs repeat bitwise.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from kernels.dispatch import WIDEST_ROW, on_kernels
from kernels.layers import reference
from kernels.layers.reference import Norm

__all__ = ["Norm", "check_dropout", "gelu_backward", "gelu_forward", "norm_backward", "norm_forward"]


def norm_forward(norm: Norm, norm_bias: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """y = LayerNorm(z) · weight + norm_bias of z = dropout(x + bias) + residual: (y, y in x's dtype, statistics of z
    for the backward).

    norm_bias [D] as the weight of `norm`. Returns y [T, D] in the residual's dtype, the same rounded to x's (None where
    that is y's own), and [2, T] float32 (float64 of float64): the mean and the reciprocal standard deviation of each
    row of z. Raises ValueError where shapes, dtypes, strides or numbers do not fit. (Ba et al. 2016, arXiv:1607.06450)
    """
    norm = _checked(norm, norm_bias=norm_bias)
    return _norm_kernels(norm.x).norm_forward(norm, norm_bias, eps)


def norm_backward(
    d_normed: Tensor | None, d_rounded: Tensor | None, norm: Norm, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dresidual, sums) from the gradients at both results of `norm_forward`, whose `norm` is as it was.

    residual and d_normed [T, D] float32 (float64 where x is), d_rounded [T, D] in x's dtype; either gradient may be
    None, which is zero; `statistics` [2, T] from `norm_forward`. Returns dx [T, D] in x's dtype, dresidual [T, D] in
    the residual's, and [3, D] of that dtype: dweight, dnorm_bias and dbias ([2, D] without a bias). Raises ValueError
    as `norm_forward` does.
    """
    norm = _checked(norm)
    wide = torch.float64 if norm.x.dtype == torch.float64 else torch.float32
    _check_rows(norm.x, {"residual": norm.residual, "d_normed": d_normed}, wide)
    _check_rows(norm.x, {"d_rounded": d_rounded}, norm.x.dtype)
    if statistics.shape != (2, len(norm.x)) or not statistics.is_contiguous():
        raise ValueError(f"expected statistics [2, {len(norm.x)}], contiguous, received {list(statistics.shape)}")
    return _norm_kernels(norm.x).norm_backward(d_normed, d_rounded, norm, statistics)


def gelu_forward(u: Tensor) -> Tensor:
    """u Φ(u), Φ the normal distribution (GELU in its exact form): [T, F] in u's dtype.

    u [T, F] bfloat16, float16, float32 or float64, contiguous.
    Raises ValueError where shapes, dtypes or strides do not fit. (Hendrycks and Gimpel 2016, arXiv:1606.08415)
    """
    _check_rows(u, {}, None, widest=None, name="u")
    return _gelu_kernels(u).gelu_forward(u)


def gelu_backward(dout: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(du, Σ_rows du), du = dout · (Φ(u) + u φ(u)), φ = Φ′; `dout` is overwritten: its memory becomes du.

    dout [T, F] like u, as `gelu_forward` has it. Returns du [T, F] in u's dtype and the sums [F] float32 (float64 of
    float64). Raises ValueError where shapes, dtypes or strides do not fit.
    """
    _check_rows(u, {"dout": dout}, u.dtype, widest=None, name="u")
    return dout, _gelu_kernels(u).gelu_backward_(dout, u)


def _norm_kernels(x: Tensor) -> ModuleType:
    if not on_kernels(x):
        return reference
    from kernels.layers import norm

    return norm


def _gelu_kernels(x: Tensor) -> ModuleType:
    if not on_kernels(x):
        return reference
    from kernels.layers import gelu

    return gelu


def _checked(norm: Norm, **vectors: Tensor) -> Norm:
    _check_rows(norm.x, {"residual": norm.residual}, None)
    for name, vector in {"bias": norm.bias, "weight": norm.weight, **vectors}.items():
        D = norm.x.shape[1]
        if vector is not None and not (vector.shape == (D,) and vector.is_contiguous() and vector.is_floating_point()):
            raise ValueError(f"expected {name} floating [{D}], contiguous, received {_described(vector)}")
    return norm._replace(seed=check_dropout(norm.dropout, norm.seed))


def _check_rows(
    x: Tensor,
    others: dict[str, Tensor | None],
    dtype: torch.dtype | None,
    widest: int | None = WIDEST_ROW,
    name: str = "x",
) -> None:
    """x [T, D], called `name`, is floating and contiguous; so are the others, of its shape, and of `dtype` unless that
    is None.
    """
    D = x.shape[1] if x.ndim == 2 else 0
    if not (1 <= D <= (widest or D) and x.is_floating_point() and x.is_contiguous()):
        width = f"D in 1..{widest}" if widest else "D of at least 1"
        raise ValueError(f"expected {name} floating [T, D], {width}, contiguous, received {_described(x)}")
    for other_name, other in others.items():
        if other is None or (
            other.shape == x.shape
            and other.is_contiguous()
            and other.is_floating_point()
            and other.dtype == (dtype or other.dtype)
        ):
            continue
        raise ValueError(
            f"expected {other_name} {dtype or 'floating'} {list(x.shape)}, contiguous, received {_described(other)}"
        )


def check_dropout(dropout: float, seed: Tensor | None) -> Tensor | None:
    """The seed where dropout is on, else None."""
    if dropout == 0:
        return None
    if not 0 < dropout < 1 or seed is None or seed.dtype != torch.int64 or seed.shape != (1,):
        received = "no seed" if seed is None else f"a seed {seed.dtype} {list(seed.shape)}"
        raise ValueError(
            f"expected dropout in 0..1 (1 excluded) and, above 0, a seed int64 [1]; received {dropout} and {received}"
        )
    return seed


def _described(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} with strides {list(x.stride())}"
