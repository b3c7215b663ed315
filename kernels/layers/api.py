"""The pointwise parts of a transformer layer, each in one pass over memory: dropout + residual + LayerNorm, and GELU.

Forward and backward as plain functions, without a graph: `post_norm_layer` calls them. On a GPU they are Triton
kernels; a CPU and float64 take `reference`. Arithmetic is in float32. Dropout masks are a hash of the seed (`dropout`):
the backward pass and a second forward pass draw them again, and runs repeat bitwise.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from kernels.dispatch import WIDEST_ROW, on_kernels
from kernels.layers.reference import Norm

__all__ = ["check_dropout", "gelu_backward", "gelu_forward", "norm_backward", "norm_forward"]


def norm_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y = LayerNorm(z) · weight + norm_bias of z = dropout(x + bias) + residual: (y, y in x's dtype, statistics of z
    for the backward).

    x and residual [T, D], D in 1..4096, weight and norm_bias [D], bias [D] or None: each of any floating dtype (float64
    where x is), one device, all contiguous. Returns y [T, D] in the residual's dtype, the same rounded to x's (None
    where that is y's own), and [2, T] float32 (float64 of float64): the mean and the reciprocal standard deviation of
    each row of z. `dropout` in 0..1 (1 excluded) drops elements by the hash of `seed` (int64 [1], needed where dropout
    > 0), their row and their column: two uses need two seeds. Raises ValueError where shapes, dtypes, strides or
    numbers do not fit. (Ba et al. 2016, arXiv:1607.06450)
    """
    _check_rows(x, {"residual": residual}, None)
    _check_vectors(x, bias=bias, weight=weight, norm_bias=norm_bias)
    return _norm_kernels(x).norm_forward(
        Norm(x, bias, residual, weight, check_dropout(dropout, seed), dropout), norm_bias, eps
    )


def norm_backward(
    d_normed: Tensor | None,
    d_rounded: Tensor | None,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    statistics: Tensor,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dresidual, sums) from the gradients at both results of `norm_forward`, whose other arguments are as they
    were.

    residual and d_normed [T, D] float32 (float64 where x is), d_rounded [T, D] in x's dtype; either gradient may be
    None, which is zero; `statistics` [2, T] from `norm_forward`. Returns dx [T, D] in x's dtype, dresidual [T, D] in
    the residual's, and [3, D] of that dtype: dweight, dnorm_bias and dbias ([2, D] without a bias). Raises ValueError
    as `norm_forward` does.
    """
    _check_rows(x, {"residual": residual, "d_normed": d_normed}, _wide_dtype(x))
    _check_rows(x, {"d_rounded": d_rounded}, x.dtype)
    _check_vectors(x, bias=bias, weight=weight)
    if statistics.shape != (2, len(x)) or not statistics.is_contiguous():
        raise ValueError(f"expected statistics [2, {len(x)}], contiguous, received {list(statistics.shape)}")
    seed = check_dropout(dropout, seed)
    return _norm_kernels(x).norm_backward(
        d_normed, d_rounded, Norm(x, bias, residual, weight, seed, dropout), statistics
    )


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
    if on_kernels(x):
        from kernels.layers import norm

        return norm
    from kernels.layers import reference

    return reference


def _gelu_kernels(x: Tensor) -> ModuleType:
    if on_kernels(x):
        from kernels.layers import gelu

        return gelu
    from kernels.layers import reference

    return reference


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_rows(
    x: Tensor,
    others: dict[str, Tensor | None],
    dtype: torch.dtype | None,
    widest: int | None = WIDEST_ROW,
    name: str = "x",
) -> None:
    """x [T, D], called `name`, is floating and contiguous, and so are others of its shape, of `dtype` where one is
    given.
    """
    if (
        x.ndim != 2
        or not 1 <= x.shape[1] <= (widest or x.shape[1])
        or not x.is_floating_point()
        or not x.is_contiguous()
    ):
        width = f"D in 1..{widest}" if widest else "D of at least 1"
        raise ValueError(f"expected {name} floating [T, D], {width}, contiguous, received {_described(x)}")
    for other_name, other in others.items():
        fits = other is None or (
            other.shape == x.shape and other.is_contiguous() and other.dtype == (dtype or other.dtype)
        )
        if other is not None and not (fits and other.is_floating_point()):
            raise ValueError(
                f"expected {other_name} {dtype or 'floating'} {list(x.shape)}, contiguous, received {_described(other)}"
            )


def _check_vectors(x: Tensor, **vectors: Tensor | None) -> None:
    D = x.shape[1]
    for name, vector in vectors.items():
        if vector is not None and (
            vector.shape != (D,) or not vector.is_contiguous() or not vector.is_floating_point()
        ):
            raise ValueError(f"expected {name} floating [{D}], contiguous, received {_described(vector)}")


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
