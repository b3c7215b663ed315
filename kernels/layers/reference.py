"""The pointwise parts of a transformer layer and their gradients in plain torch: what a CPU and float64 use.

Arithmetic is in float32, in float64 for float64 inputs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dropout import keep_mask


class Norm(NamedTuple):
    """What a norm reads, forward and backward: each of any floating dtype (float64 where x is), one device, contiguous.

    `dropout` drops elements by the hash of `seed`, their row and their column: two uses need two seeds.
    """

    x: Tensor  # [T, D], D in 1..4096
    bias: Tensor | None  # [D]
    residual: Tensor  # [T, D]
    weight: Tensor  # [D]
    seed: Tensor | None = None  # [1] int64, needed where dropout > 0
    dropout: float = 0.0  # in 0..1 (1 excluded)


def norm_forward(norm: Norm, norm_bias: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """(normed [T, D] like residual, rounded [T, D] like x or None where the dtypes are one, statistics [2, T])."""
    x, bias, residual, weight, seed, dropout = norm
    z = _dropped_sum(x, bias, residual, seed, dropout)  # [T, D]
    mean = z.mean(1)
    rstd = ((z - mean[:, None]).square().mean(1) + eps).rsqrt()
    normed = (z - mean[:, None]) * rstd[:, None] * weight + norm_bias
    rounded = None if x.dtype == residual.dtype else normed.to(x.dtype)
    return normed.to(residual.dtype), rounded, torch.stack([mean, rstd])


def norm_backward(
    d_normed: Tensor | None, d_rounded: Tensor | None, norm: Norm, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [T, D] in x's dtype, dresidual [T, D], [K, D]: dweight, dnorm_bias and, where there is a bias, dbias)."""
    x, bias, residual, weight, seed, dropout = norm
    mean, rstd = statistics
    normalised = (_dropped_sum(x, bias, residual, seed, dropout) - mean[:, None]) * rstd[:, None]  # [T, D]
    dy = torch.zeros_like(normalised)
    for gradient in (d_normed, d_rounded):
        if gradient is not None:
            dy = dy + gradient
    weighted = dy * weight
    along = (weighted * normalised).mean(1, keepdim=True)
    dz = rstd[:, None] * (weighted - weighted.mean(1, keepdim=True) - normalised * along)
    dx = dz * dropout_factor(x, seed, dropout)
    sums = [(dy * normalised).sum(0), dy.sum(0)] + ([] if bias is None else [dx.sum(0)])
    return dx.to(x.dtype), dz, torch.stack(sums)


def gelu_forward(u: Tensor) -> Tensor:
    """u Φ(u), [T, F] in u's dtype."""
    wide = _wide(u)
    return (wide * _normal_cdf(wide)).to(u.dtype)


def gelu_backward_(dout: Tensor, u: Tensor) -> Tensor:
    """Σ_rows du [F]; dout [T, F] becomes du = dout · (Φ(u) + u φ(u))."""
    wide = _wide(u)
    density = torch.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    du = dout * (_normal_cdf(wide) + wide * density)
    dout.copy_(du)
    return du.sum(0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _normal_cdf(u: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-u / math.sqrt(2))


def dropout_factor(x: Tensor, seed: Tensor | None, dropout: float) -> Tensor | float:
    """What dropout multiplies x [T, D] with: 0 or 1 / (1 − dropout)."""
    if seed is None:
        return 1.0
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return keep_mask(seed, rows, columns, dropout).to(wide) / (1 - dropout)


def _dropped_sum(x: Tensor, bias: Tensor | None, residual: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    shifted = _wide(x) if bias is None else _wide(x) + bias
    return shifted * dropout_factor(x, seed, dropout) + residual
