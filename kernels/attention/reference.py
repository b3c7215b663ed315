"""Attention over packed texts in plain torch: what a CPU and float64 use, and what defines the dropout mask.

Texts are taken a few at a time, padded to the longest among them, so that nothing of size [T, T] exists. Reads `starts`
on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dropout import FIRST, GOLDEN, SECOND, WORD, drop_below, mix

READS_OUTPUT = False  # whether `backward` reads what `forward` gave first
_SCORES = 2**22  # most elements of one padded matrix of scores


def kept(seed: Tensor, heads: Tensor, rows: Tensor, columns: Tensor, dropout: float) -> Tensor:
    """Which probabilities survive dropout: a pure function of (seed, head, row, column), tokens counted from the
    chunk's first.

    seed int64 [1]; heads [H], rows [..., R] and columns [..., C] int64. Returns bool [..., H, R, C]. Rows and columns
    are hashed each for themselves, and their exclusive or once more, which takes six operations an element.
    """
    low, high = seed & WORD, (seed >> 32) & WORD
    key = mix(mix(mix(high ^ GOLDEN) ^ low) ^ heads)  # [H]
    row_word = mix(rows[..., None, :] ^ key[:, None])  # [..., H, R]
    column_word = columns[..., None, :] * GOLDEN + mix(key ^ GOLDEN)[:, None] & WORD  # [..., H, C]
    word = (row_word[..., :, None] ^ column_word[..., None, :]) * FIRST & WORD  # [..., H, R, C]
    word = (word ^ (word >> 16)) * SECOND & WORD
    return word >= drop_below(dropout)


class Mask(NamedTuple):
    """Which tokens of its own text a token attends to, the scale of the scores, and dropout of the probabilities."""

    scale: float
    dropout: float = 0.0  # in 0..1, of probabilities, by the hash of `seed`
    seed: Tensor | None = None  # int64 [1] on the inputs' device, needed where dropout > 0
    causal: bool = False  # j ≤ i
    window: int | None = None  # |i − j| ≤ window


class Texts(NamedTuple):
    """The boundaries of packed texts."""

    starts: Tensor  # int32 [n + 1]
    longest: int  # no text has more tokens
    angles: tuple[Tensor, Tensor] | None = None  # cos and sin [T, d/2], where attention turns queries and keys itself


Heads = tuple[Tensor, Tensor, Tensor]  # query [T, H, d], key and value [T, G, d], or their gradients


class _Padded(NamedTuple):
    """A few texts, padded: their tokens, and which of the padded places are tokens."""

    tokens: Tensor  # [m, L] int64; a filler place names some token of the chunk
    real: Tensor  # [m, L] bool


def forward(query: Tensor, key: Tensor, value: Tensor, texts: Texts, mask: Mask) -> tuple[Tensor, Tensor]:
    """softmax(scale · Q Kᵀ) V within each text, [T, H, d], and an empty tensor where kernels have statistics; arguments
    as `kernels.attention.api.packed_attention` has them.
    """
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    for group in _groups(texts, *query.shape[:2]):
        q, k, v = (_padded(x, group, query.shape[1]) for x in (query, key, value))  # [m, H, L, d]
        probabilities, factor = _probabilities(q, k, group, mask)
        out[group.tokens[group.real]] = _matmul(probabilities * factor, v).transpose(1, 2)[group.real].to(out.dtype)
    return out, query.new_empty((0, 0), dtype=torch.float32)


def backward(dout: Tensor, qkv: Heads, forward: tuple[Tensor, Tensor], into: Heads, texts: Texts, mask: Mask) -> None:
    """Writes the gradients at query [T, H, d], key and value [T, G, d] of Σ dout · forward `into` tensors like them."""
    heads, groups = qkv[0].shape[1], qkv[1].shape[1]
    dquery, dkey, dvalue = into
    for group in _groups(texts, *qkv[0].shape[:2]):
        q, k, v, do = (_padded(x, group, heads) for x in (*qkv, dout))  # [m, H, L, d]
        do = do * group.real[:, None, :, None]
        probabilities, factor = _probabilities(q, k, group, mask)  # [m, H, L, L]
        dprobabilities = _matmul(do, v.mT) * factor
        delta = (probabilities * dprobabilities).sum(-1, keepdim=True)
        dscores = mask.scale * probabilities * (dprobabilities - delta)
        positions = group.tokens[group.real]
        dquery[positions] = _matmul(dscores, k).transpose(1, 2)[group.real].to(dquery.dtype)
        for out, padded in ((dkey, _matmul(dscores.mT, q)), (dvalue, _matmul((probabilities * factor).mT, do))):
            by_group = padded.unflatten(1, (groups, heads // groups)).sum(2)  # [m, G, L, d]
            out[positions] = by_group.transpose(1, 2)[group.real].to(out.dtype)


def _groups(texts: Texts, tokens: int, heads: int) -> Iterator[_Padded]:
    starts, longest, _ = texts
    bounds = starts.tolist()
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0 or bounds[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"expected starts to rise from 0 to {tokens} (the number of tokens), received {bounds[0]} to {bounds[-1]}"
        )
    if max(lengths, default=0) > longest:
        raise ValueError(f"expected texts of at most longest = {longest} tokens, received one of {max(lengths)}")
    first = 0
    while first < len(lengths):
        width, last = lengths[first], first + 1
        while last < len(lengths) and (last + 1 - first) * heads * max(width, lengths[last]) ** 2 <= _SCORES:
            width, last = max(width, lengths[last]), last + 1
        if width:
            at = starts[first:last].long()[:, None] + torch.arange(width, device=starts.device)  # [m, L]
            yield _Padded(at.clamp(max=tokens - 1), at < starts[first + 1 : last + 1][:, None])
        first = last


def _padded(x: Tensor, texts: _Padded, heads: int) -> Tensor:
    """x [T, G, d] as [m, H, L, d], in float32 or float64, each of its heads as often as the queries have heads for
    it.
    """
    wide = x[texts.tokens].to(torch.float64 if x.dtype == torch.float64 else torch.float32)  # [m, L, G, d]
    return wide.transpose(1, 2).repeat_interleave(heads // x.shape[1], dim=1)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """Their product in their own dtype, under autocast too."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def _probabilities(q: Tensor, k: Tensor, texts: _Padded, mask: Mask) -> tuple[Tensor, Tensor | float]:
    """Softmax of the scores [m, H, L, L] and what dropout multiplies it with."""
    rows, columns = texts.tokens[:, :, None], texts.tokens[:, None, :]  # [m, L, 1], [m, 1, L]
    allowed = texts.real[:, None, :].expand(-1, rows.shape[1], -1)  # [m, L, L]
    if mask.causal:
        allowed = allowed & (columns <= rows)
    if mask.window is not None:
        allowed = allowed & ((rows - columns).abs() <= mask.window)
    allowed = allowed | ~texts.real[:, :, None]  # a filler row is dropped later, but must stay finite
    scores = (mask.scale * _matmul(q, k.mT)).masked_fill(~allowed[:, None], -torch.inf)
    factor: Tensor | float = 1.0
    if mask.dropout > 0 and mask.seed is not None:
        heads = torch.arange(q.shape[1], device=q.device)
        factor = kept(mask.seed, heads, texts.tokens, texts.tokens, mask.dropout).to(q.dtype) / (1 - mask.dropout)
    return scores.softmax(-1), factor
