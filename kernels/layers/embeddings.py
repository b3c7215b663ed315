"""BERT's embeddings as they are trained: three rows a token, the norm of their sum and its dropout, one pass over
memory each way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, layer_norm

from kernels.dispatch import WIDEST_ROW, on_kernels
from kernels.layers.api import check_dropout
from kernels.layers.reference import dropout_factor

__all__ = ["Tables", "embeddings"]


class Tables(NamedTuple):
    """The trained tables, and their padding rows, which are never trained."""

    words: Tensor  # [V, D]
    places: Tensor  # [P, D]
    segment: Tensor  # [D]
    weight: Tensor  # [D]: of the norm
    bias: Tensor  # [D]
    padding_word: int | None = None
    padding_place: int | None = None


def embeddings(
    ids: Tensor, positions: Tensor, tables: Tables, seed: Tensor | None, *, eps: float, dropout: float
) -> Tensor:
    """y_t = dropout(LayerNorm(words[ids_t] + segment + places[positions_t]) · weight + bias): [T, D], differentiable in
    the tables.

    ids, positions [T] int64; `tables` hold words, places, segment, weight and bias in one floating dtype, which y gets
    too, D ≤ 4096; all contiguous, on one device. Only float32 runs in the kernels; other dtypes use torch's operations.
    `dropout` in 0..1 (1 excluded) drops elements by the hash of `seed` (int64 [1], needed if dropout > 0), row and
    column. Call it with autocast off. The tables' gradients are dense; on a GPU torch may sum those of words and places
    by atomics. On a GPU an id outside its table makes its row of y, and one row of the gradient, NaN; on a CPU it
    raises IndexError. Raises ValueError where shapes, dtypes or devices do not fit. (Devlin et al. 2019,
    arXiv:1810.04805, section 3)
    """
    _check(ids, positions, tables)
    seed = check_dropout(dropout, seed)
    words, places, segment, weight, bias, padding_word, padding_place = tables
    if on_kernels(words) and words.dtype == torch.float32:
        out: Tensor = _Embeddings.apply(ids, positions, seed, eps, dropout, *tables)
        return out
    z = embedding(ids, words, padding_word) + segment + embedding(positions, places, padding_place)  # [T, D]
    y = layer_norm(z, z.shape[1:], weight, bias, eps)
    return y * dropout_factor(y, seed, dropout)


def _check(ids: Tensor, positions: Tensor, tables: Tables) -> None:
    """Raises ValueError where the arguments of `embeddings` do not fit each other."""
    words, places, D = tables.words, tables.places, tables.words.shape[-1]
    if ids.ndim != 1 or words.ndim != 2 or places.ndim != 2 or not 1 <= D <= WIDEST_ROW:
        raise ValueError(
            f"expected ids [T], words [V, D] and places [P, D], D in 1..{WIDEST_ROW}, received {list(ids.shape)}, "
            f"{list(words.shape)} and {list(places.shape)}"
        )
    expected: dict[str, tuple[Tensor, tuple[int, ...], torch.dtype]] = {
        "ids": (ids, ids.shape, torch.int64),
        "positions": (positions, ids.shape, torch.int64),
        "words": (words, words.shape, words.dtype),
        "places": (places, (len(places), D), words.dtype),
        "segment": (tables.segment, (D,), words.dtype),
        "weight": (tables.weight, (D,), words.dtype),
        "bias": (tables.bias, (D,), words.dtype),
    }
    for name, (x, shape, dtype) in expected.items():
        if (x.shape, x.dtype, x.device) != (shape, dtype, ids.device) or not x.is_contiguous():
            raise ValueError(
                f"expected {name} {list(shape)} {dtype} on {ids.device}, contiguous, received {list(x.shape)} "
                f"{x.dtype} on {x.device}"
            )


class _Embeddings(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, positions: Tensor, seed: Tensor | None, eps: float, dropout: float, *tables: Any
    ) -> Tensor:
        from kernels.layers.embeddings_triton import embed_norm

        words, places, segment, weight, bias, *ctx.paddings = tables
        vectors = (segment, weight, bias)
        out, statistics = embed_norm(ids, positions, (words, places, *vectors), eps=eps, seed=seed, dropout=dropout)
        ctx.dropout = dropout
        ctx.save_for_backward(ids, positions, words, places, segment, weight, statistics, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        from kernels.layers.embeddings_triton import embed_norm_backward

        ids, positions, words, places, segment, weight, statistics, seed = ctx.saved_tensors
        needs_words, needs_places, *needs_vectors = ctx.needs_input_grad[5:10]
        tables = (words, places, segment, weight)
        dz, sums = embed_norm_backward(dout.contiguous(), ids, positions, tables, statistics, seed, ctx.dropout)
        dweight, dbias, dsegment = sums
        padding_word, padding_place = ctx.paddings
        dwords = _table_gradient(dz, ids, words, padding_word) if needs_words else None
        dplaces = _table_gradient(dz, positions, places, padding_place) if needs_places else None
        vectors = [d if needed else None for d, needed in zip((dsegment, dweight, dbias), needs_vectors, strict=True)]
        return (None,) * 5 + (dwords, dplaces, *vectors, None, None)


def _table_gradient(dz: Tensor, rows: Tensor, table: Tensor, padding: int | None) -> Tensor:
    """[V, D]: the gradients dz [T, D] added up by the rows they belong to; those of rows outside, which are NaN, by the
    first one.
    """
    inside = rows.where((rows >= 0) & (rows < len(table)), 0)  # torch would write outside of the table
    total: Tensor = torch.ops.aten.embedding_dense_backward(
        dz, inside, len(table), -1 if padding is None else padding, False
    )
    return total
