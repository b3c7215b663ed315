"""BERT's embeddings where nothing is trained: three rows a token, their sum and its norm in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, layer_norm

from kernels.dispatch import WIDEST_ROW, on_kernels

__all__ = ["check_embeddings", "embed_norm"]


def embed_norm(
    ids: Tensor, positions: Tensor, words: Tensor, places: Tensor, segment: Tensor, weight: Tensor, bias: Tensor, *, eps: float
) -> Tensor:
    """y_t = LayerNorm(words[ids_t] + segment + places[positions_t]) · weight + bias: [T, D] float16.

    ids, positions [T] int64; words [V, D], places [P, D], segment, weight and bias [D], D ≤ 4096: float32; all contiguous, on one device.
    Computed in float32 and rounded once. Not differentiable. Nobody waits for a GPU to say that an id is outside its table, so its row is
    NaN there; on a CPU it raises IndexError. Raises ValueError where shapes, dtypes or devices do not fit.
    (Devlin et al. 2019, arXiv:1810.04805, section 3; Ba et al. 2016, arXiv:1607.06450)
    """
    check_embeddings(ids, positions, words, places, segment, weight, bias, torch.float32)
    if on_kernels(ids):
        from kernels import embed_norm_triton

        return embed_norm_triton.embed_norm(ids, positions, words, places, segment, weight, bias, eps=eps, dtype=torch.float16)[0]
    z = embedding(ids, words) + segment + embedding(positions, places)  # [T, D]
    return layer_norm(z, z.shape[1:], weight, bias, eps).to(torch.float16)


def check_embeddings(
    ids: Tensor, positions: Tensor, words: Tensor, places: Tensor, segment: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> None:
    """Raises ValueError where the arguments of `embed_norm` or `embeddings` do not fit each other, tables and vectors being of `dtype`."""
    D = words.shape[-1]
    if ids.ndim != 1 or words.ndim != 2 or places.ndim != 2 or not 1 <= D <= WIDEST_ROW:
        raise ValueError(
            f"expected ids [T], words [V, D] and places [P, D], D in 1..{WIDEST_ROW}, received {list(ids.shape)}, {list(words.shape)} and "
            f"{list(places.shape)}"
        )
    vectors = {"segment": segment, "weight": weight, "bias": bias}
    expected = {"ids": (ids.shape, torch.int64), "positions": (ids.shape, torch.int64), "words": (words.shape, dtype)}
    expected |= {"places": (torch.Size([len(places), D]), dtype)} | {name: (torch.Size([D]), dtype) for name in vectors}
    for name, tensor in {"ids": ids, "positions": positions, "words": words, "places": places, **vectors}.items():
        if (tensor.shape, tensor.dtype) != expected[name] or tensor.device != ids.device or not tensor.is_contiguous():
            shape, kind = expected[name]
            raise ValueError(
                f"expected {name} {list(shape)} {kind} on {ids.device}, contiguous, received {list(tensor.shape)} {tensor.dtype} "
                f"on {tensor.device}"
            )
