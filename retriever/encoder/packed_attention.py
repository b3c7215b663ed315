"""Texts one behind another through Hugging Face models: attention that stays inside each text.

transformers looks its attention up by name; under ours a model runs on one row [1, T] of packed texts without a mask,
whose boundaries arrive as keyword arguments that the layers hand through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kernels.attention.api import Mask, packed_attention
from retriever.data.layout import Packed
from retriever.encoder.architectures import first_position, is_decoder

NAME = "bigbatch_packed"
_SEEDS = 2**62


def use_packed_attention(tower: PreTrainedModel) -> None:
    """Makes `tower` attend within packed texts from now on; `packed_inputs` makes what it is called with."""
    tower.set_attn_implementation(NAME)


def packed_inputs(tower: PreTrainedModel, texts: Packed) -> dict[str, Any]:
    """Keyword arguments of a forward pass of `tower` over `texts`; its hidden states are [1, T, H]."""
    inputs: dict[str, Any] = {
        "input_ids": texts.input_ids[None],  # [1, T]
        "position_ids": _positions(tower.config, texts)[None],  # [1, T]
        "attention_mask": None,
        "packed_starts": texts.starts,
        "packed_longest": texts.longest,
        "packed_positions": texts.positions,
    }
    return inputs | {"use_cache": False} if is_decoder(tower.config) else inputs


def _positions(config: Any, texts: Packed) -> Tensor:
    """[T]: the position ids that the model itself would give each text alone."""
    first = first_position(config)
    if first == 0:
        return texts.positions
    # A text may spell the padding token out: it keeps the padding's position, and the count of the others skips it.
    padding = texts.input_ids == first - 1
    seen = padding.cumsum(0)
    begins = torch.arange(len(padding), device=padding.device) - texts.positions
    skipped = seen - seen[begins] + padding[begins]  # of the same text
    return (texts.positions - skipped + first).where(~padding, first - 1)


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """[count] int64, seeds of dropout masks, from the device's generator, which a chunk's second pass restores."""
    return torch.randint(_SEEDS, (count,), device=device)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_starts: Tensor,
    packed_longest: int,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of a transformers layer: query, key, value [1, heads, T, d] to [1, T, heads, d].

    Of the `options` that layers give, scaling, dropout, sliding_window and is_causal count.
    """
    if attention_mask is not None:
        raise ValueError(f"packed texts take no attention mask, received one of shape {list(attention_mask.shape)}")
    scaling, dropout = options.get("scaling"), options.get("dropout", 0.0)
    causal = options.get("is_causal")
    mask = Mask(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        seed=draw_seeds(1, query.device) if dropout > 0 else None,
        causal=bool(getattr(module, "is_causal", False) if causal is None else causal),
        window=attention_window(options.get("sliding_window"), causal),
    )
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, d]
    output = packed_attention(queries, keys, values, packed_starts, packed_longest, mask)
    return output[None], None


def attention_window(sliding_window: int | None, causal: bool | None) -> int | None:
    """How many tokens a token sees to a side. transformers' number counts the token itself, unless the configuration
    (`is_causal`) makes a decoder's attention bidirectional.
    """
    return sliding_window if sliding_window is None or causal is False else sliding_window - 1


def _no_mask(*_: Any, **__: Any) -> None:
    """Packed texts need none: `_attend` knows where each begins."""


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _no_mask)
