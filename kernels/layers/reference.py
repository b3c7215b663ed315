"""The pointwise parts of a transformer layer and their gradients in plain torch: what a CPU and float64 use.

Arithmetic is in float32, in float64 for float64 inputs.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels.dropout import keep_mask

Activation = Literal["gelu", "gelu_tanh", "silu"]


class Rotary(NamedTuple):
    """Rotary position embedding of queries and keys, after a norm of each head if there are weights.

    (Su et al. 2021, arXiv:2104.09864)
    """

    cos: Tensor  # [T, d/2] float32 (float64), contiguous, as sin
    sin: Tensor
    query_heads: int
    key_heads: int
    query_weight: Tensor | None = None  # [d]: of the RMSNorm of a query's head
    key_weight: Tensor | None = None
    eps: float = 0.0


class Norm(NamedTuple):
    """The operands of a norm of z = dropout(x + bias) + residual, forward and backward: each of any floating dtype
    (float64 where x is), one device, contiguous. With `added_weight`, RMSNorm(x + bias) · added_weight is in the place
    of x + bias.

    `dropout` drops elements by the hash of `seed`, their row and their column: two uses need two seeds.
    """

    x: Tensor | None  # [T, D], D in 1..4096; None: nothing is added, and z is the residual
    bias: Tensor | None  # [D]
    residual: Tensor  # [T, D]
    weight: Tensor  # [D]
    seed: Tensor | None = None  # [1] int64, needed where dropout > 0
    dropout: float = 0.0  # in 0..1 (1 excluded)
    rms: bool = False  # RMSNorm: the mean counts as 0
    pre: bool = False  # the stream goes on as z, and matrix products read the norm; else both are the norm
    added_weight: Tensor | None = None  # [D]
    added_eps: float = 0.0


def norm_forward(norm: Norm, norm_bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """(stream [T, D] like residual, rounded [T, D] like x or None where they are one, statistics [2, T])."""
    x, _, residual, weight, _, _, rms, pre, *_ = norm
    assert x is not None
    z = _dropped_sum(norm)  # [T, D]
    mean = torch.zeros_like(z[:, 0]) if rms else z.mean(1)
    rstd = ((z - mean[:, None]).square().mean(1) + eps).rsqrt()
    normed = (z - mean[:, None]) * rstd[:, None] * weight
    if norm_bias is not None:
        normed = normed + norm_bias
    rounded = None if x.dtype == residual.dtype and not pre else normed.to(x.dtype)
    return (z if pre else normed).to(residual.dtype), rounded, torch.stack([mean, rstd])


def norm_backward(
    d_stream: Tensor | None, d_rounded: Tensor | None, norm: Norm, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [T, D] in x's dtype, dresidual [T, D], [K, D]: dweight, dnorm_bias and, as far as there are such, dbias and
    dadded_weight).
    """
    x, bias, residual, weight, seed, dropout, rms, pre, added_weight, _ = norm
    mean, rstd = statistics
    z = residual if x is None else _dropped_sum(norm)
    normalised = (z - mean[:, None]) * rstd[:, None]  # [T, D]
    dy = torch.zeros_like(normalised)
    for gradient in (None if pre else d_stream, d_rounded):
        if gradient is not None:
            dy = dy + gradient
    weighted = dy * weight
    along = (weighted * normalised).mean(1, keepdim=True)
    level = 0.0 if rms else weighted.mean(1, keepdim=True)
    dz = rstd[:, None] * (weighted - level - normalised * along)
    if pre and d_stream is not None:
        dz = dz + d_stream
    dx = dz * dropout_factor(residual, seed, dropout)
    of_added = []
    if added_weight is not None:
        assert x is not None
        shifted = _shifted(x, bias)
        spread = _rstd(shifted, norm.added_eps)
        of_added, weighted = [(dx * shifted * spread).sum(0)], dx * added_weight
        dx = spread * weighted - shifted * spread**3 * (weighted * shifted).mean(1, keepdim=True)
    sums = [(dy * normalised).sum(0), dy.sum(0), *([] if bias is None else [dx.sum(0)]), *of_added]
    computing = x if x is not None else d_rounded
    return dx.to(residual.dtype if computing is None else computing.dtype), dz, torch.stack(sums)


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


def gated_forward(gate_up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) · up, [T, F] in the dtype of gate_up [T, 2 F]."""
    gate, up = _wide(gate_up).chunk(2, 1)
    return (gate * _share(gate, activation)[0] * up).to(gate_up.dtype)


def gated_backward_(dout: Tensor, gate_up: Tensor, activation: Activation) -> Tensor:
    """dgate_up [T, 2 F]; dout [T, F] becomes activation(gate) · up."""
    gate, up = _wide(gate_up).chunk(2, 1)
    share, slope = _share(gate, activation)
    dgate, dup = dout * up * (share + gate * slope), dout * gate * share
    dout.copy_(gate * share * up)
    return torch.cat([dgate, dup], 1).to(gate_up.dtype)


def _share(gate: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """σ and σ′ of an activation gate · σ(gate)."""
    if activation == "gelu":
        return _normal_cdf(gate), torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
    if activation == "silu":
        share = gate.sigmoid()
        return share, share * (1 - share)
    twice = 2 * math.sqrt(2 / math.pi)
    share = (twice * (gate + 0.044715 * gate**3)).sigmoid()
    return share, share * (1 - share) * twice * (1 + 3 * 0.044715 * gate * gate)


def rotate_heads(heads: Tensor, rotary: Rotary, out: Tensor) -> None:
    """Writes the first heads of each token of heads [T, N, d], normed and rotated, to `out` [T, at least R, d]."""
    rotated = rotary.query_heads + rotary.key_heads
    x = _wide(heads[:, :rotated])
    if rotary.query_weight is not None:
        normalised, _, weight = _normalised(x, rotary)
        x = normalised * weight
    out[:, :rotated] = _turned(x, rotary.cos, rotary.sin)


def rotate_heads_backward_(dheads: Tensor, heads: Tensor, rotary: Rotary) -> Tensor | None:
    """The gradients at the weights of the norms [2, d], or None; those at the rotated heads become those before."""
    rotated = rotary.query_heads + rotary.key_heads
    g = _turned(_wide(dheads[:, :rotated]), rotary.cos, -rotary.sin)
    dweights = None
    if rotary.query_weight is not None:
        normalised, rstd, weight = _normalised(_wide(heads[:, :rotated]), rotary)
        by_head = (g * normalised).sum(0)  # [R, d]
        dweights = torch.stack([part.sum(0) for part in by_head.split([rotary.query_heads, rotary.key_heads])])
        weighted = g * weight
        g = rstd * (weighted - normalised * (weighted * normalised).mean(2, keepdim=True))
    dheads[:, :rotated] = g
    return dweights


def _normalised(x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """(x normed [T, R, d], reciprocal root mean squares [T, R, 1], weights [R, d])."""
    assert rotary.query_weight is not None and rotary.key_weight is not None
    rstd = (x.square().mean(2, keepdim=True) + rotary.eps).rsqrt()
    of_heads = rotary.query_weight.expand(rotary.query_heads, -1), rotary.key_weight.expand(rotary.key_heads, -1)
    return x * rstd, rstd, torch.cat(of_heads)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x_j, x_{j + d/2}) of a head turned by the angle of its token."""
    left, right = x.chunk(2, 2)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], 2)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _normal_cdf(u: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-u / math.sqrt(2))


def dropout_factor(x: Tensor, seed: Tensor | None, dropout: float) -> Tensor | float:
    """The factor by which dropout multiplies x [T, D]: 0 or 1 / (1 − dropout)."""
    if seed is None:
        return 1.0
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return keep_mask(seed, rows, columns, dropout).to(wide) / (1 - dropout)


def _dropped_sum(norm: Norm) -> Tensor:
    x, bias, residual, _, seed, dropout, _, _, added_weight, added_eps = norm
    assert x is not None
    shifted = _shifted(x, bias)
    if added_weight is not None:
        shifted = shifted * _rstd(shifted, added_eps) * added_weight
    return shifted * dropout_factor(x, seed, dropout) + residual


def _shifted(x: Tensor, bias: Tensor | None) -> Tensor:
    return _wide(x) if bias is None else _wide(x) + bias


def _rstd(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(1, keepdim=True) + eps).rsqrt()
