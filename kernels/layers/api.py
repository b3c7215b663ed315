"""The pointwise parts of a transformer layer, each in one pass over memory: dropout + residual + norm, GELU, gated
activations, and norm + rotation of heads.

Forward and backward as plain functions, without a graph: `layer` calls them. On a GPU they are Triton
kernels; a CPU and float64 take `reference`. Arithmetic is in float32. Dropout masks are a hash of the seed (`dropout`):
the backward pass and a second forward pass draw them again, and runs repeat bitwise.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from kernels.dispatch import WIDEST_ROW, on_kernels
from kernels.layers import reference
from kernels.layers.reference import Activation, Norm, Rotary

__all__ = [
    "Activation",
    "Norm",
    "Rotary",
    "check_dropout",
    "gated_backward",
    "gated_forward",
    "gelu_backward",
    "gelu_forward",
    "norm_backward",
    "norm_forward",
    "rotate_heads",
    "rotate_heads_backward",
]


def norm_forward(norm: Norm, norm_bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """y = normalised(z) · weight + norm_bias of z = dropout(x + bias) + residual: (y, y in x's dtype, statistics of z
    for the backward). Of a `pre` norm the first is z.

    norm_bias [D] as the weight of `norm`, or None. Returns y (z) [T, D] in the residual's dtype, y rounded to x's (None
    where that is the first result), and [2, T] float32 (float64 of float64): the mean and the reciprocal standard
    deviation of each row of z; of RMSNorm 0 and the reciprocal root mean square. Raises ValueError where shapes,
    dtypes, strides or numbers do not fit. (Ba et al. 2016, arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467)
    """
    norm = _checked(norm, norm_bias=norm_bias)
    return _kernels("norm", norm.residual).norm_forward(norm, norm_bias, eps)


def norm_backward(
    d_stream: Tensor | None, d_rounded: Tensor | None, norm: Norm, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dresidual, sums) from the gradients at both results of `norm_forward`, whose `norm` is as it was; or x is
    None and the residual is z.

    residual and d_stream [T, D] float32 (float64 where x is), d_rounded [T, D] in x's dtype; either gradient may be
    None, which is zero; `statistics` [2, T] from `norm_forward`. Returns dx [T, D] in x's dtype (without x in
    d_rounded's), dresidual [T, D] in the residual's, and [K, D] of that dtype: dweight, dnorm_bias, dbias if there is a
    bias, and dadded_weight if there is an `added_weight`, which needs x. Raises ValueError as `norm_forward` does.
    """
    norm = _checked(norm)
    wide = torch.float64 if norm.residual.dtype == torch.float64 else torch.float32
    _check_rows(norm.residual, {"residual": norm.residual, "d_stream": d_stream}, wide)
    _check_rows(norm.residual, {"d_rounded": d_rounded}, None if norm.x is None else norm.x.dtype)
    if statistics.shape != (2, len(norm.residual)) or not statistics.is_contiguous():
        received = list(statistics.shape)
        raise ValueError(f"expected statistics [2, {len(norm.residual)}], contiguous, received {received}")
    return _kernels("norm", norm.residual).norm_backward(d_stream, d_rounded, norm, statistics)


def gelu_forward(u: Tensor) -> Tensor:
    """u Φ(u), Φ the normal distribution (GELU in its exact form): [T, F] in u's dtype.

    u [T, F] bfloat16, float16, float32 or float64, contiguous.
    Raises ValueError where shapes, dtypes or strides do not fit. (Hendrycks and Gimpel 2016, arXiv:1606.08415)
    """
    _check_rows(u, {}, None, widest=None, name="u")
    return _kernels("gelu", u).gelu_forward(u)


def gelu_backward(dout: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(du, Σ_rows du), du = dout · (Φ(u) + u φ(u)), φ = Φ′; `dout` is overwritten: its memory becomes du.

    dout [T, F] like u, as `gelu_forward` has it. Returns du [T, F] in u's dtype and the sums [F] float32 (float64 of
    float64). Raises ValueError where shapes, dtypes or strides do not fit.
    """
    _check_rows(u, {"dout": dout}, u.dtype, widest=None, name="u")
    return dout, _kernels("gelu", u).gelu_backward_(dout, u)


def gated_forward(gate_up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) · up, [T, F] in the dtype of gate_up [T, 2 F], whose left half is the gate.

    gate_up floating, contiguous. "gelu" is the exact form, "gelu_tanh" the approximation. Raises ValueError where
    shapes, dtypes or strides do not fit. (Shazeer 2020, arXiv:2002.05202)
    """
    _check_gate(gate_up)
    return _kernels("gated", gate_up).gated_forward(gate_up, activation)


def gated_backward(dout: Tensor, gate_up: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """(dgate_up [T, 2 F], activation(gate) · up [T, F]); `dout` [T, F] is overwritten: its memory becomes the second.

    As `gated_forward` has them; dout like its result, contiguous.
    """
    _check_gate(gate_up)
    _check_rows(dout, {}, None, widest=None, name="dout")
    if dout.shape != (len(gate_up), gate_up.shape[1] // 2) or dout.dtype != gate_up.dtype:
        raise ValueError(f"expected dout of half of gate_up, {_described(gate_up)}, received {_described(dout)}")
    return _kernels("gated", gate_up).gated_backward_(dout, gate_up, activation), dout


def rotate_heads(heads: Tensor, rotary: Rotary) -> Tensor:
    """Queries and keys, normed and rotated, and values: heads [T, H + 2 G, d], of which the first H + G change.

    heads contiguous, d even; they are rotated in place unless `rotary` has the weights of norms, whose backward pass
    reads them as they were: then the first H + G are new, [T, H + G, d]. Raises ValueError where shapes, dtypes or
    strides do not fit.
    """
    check_heads(heads, rotary.cos, rotary.sin)
    rotated = rotary.query_heads + rotary.key_heads
    out = heads if rotary.query_weight is None else heads.new_empty(len(heads), rotated, heads.shape[2])
    _kernels("rotary", heads).rotate_heads(heads, rotary, out)
    return out


def rotate_heads_backward(dheads: Tensor, heads: Tensor, rotary: Rotary) -> Tensor | None:
    """Turns the gradient at `rotate_heads`' result, dheads [T, H + 2 G, d], into that at `heads`, in place.

    Returns the gradients at the weights of the norms of queries and keys, [2, d] float32 (float64 of float64); None
    where there are none.
    """
    check_heads(dheads, rotary.cos, rotary.sin)
    return _kernels("rotary", dheads).rotate_heads_backward_(dheads, heads, rotary)


def _check_gate(gate_up: Tensor) -> None:
    _check_rows(gate_up, {}, None, widest=None, name="gate_up")
    if gate_up.shape[1] % 2:
        raise ValueError(f"expected gate_up [T, 2 F], received {_described(gate_up)}")


def check_heads(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raises ValueError where heads [T, heads, d] cannot be turned by cos and sin [T, d/2]."""
    T, _, d = heads.shape
    if d % 2 or not heads.is_contiguous():
        raise ValueError(f"expected heads [T, heads, even], contiguous, received {_described(heads)}")
    wide = torch.float64 if heads.dtype == torch.float64 else torch.float32
    for table in (cos, sin):
        if table.shape != (T, d // 2) or table.dtype != wide or not table.is_contiguous():
            raise ValueError(f"expected cos and sin {wide} [{T}, {d // 2}], contiguous, received {_described(table)}")


def _kernels(name: str, x: Tensor) -> ModuleType:
    """The module of kernels/layers that computes on x."""
    return import_module(f"kernels.layers.{name}") if on_kernels(x) else reference


def _checked(norm: Norm, **vectors: Tensor | None) -> Norm:
    rows = norm.residual if norm.x is None else norm.x
    _check_rows(rows, {"residual": norm.residual}, None)
    of_norm = {"bias": norm.bias, "weight": norm.weight, "added_weight": norm.added_weight}
    for name, vector in {**of_norm, **vectors}.items():
        D = rows.shape[1]
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
