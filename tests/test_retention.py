"""What is kept between the passes: products are used, change no bit and are given up; other calls' are refused."""

from __future__ import annotations

import weakref
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention.api import attention_forward
from kernels.layers import layer
from kernels.layers.layer import SavedActivations
from retriever.config import BatchConfig, LossConfig
from retriever.encoder.dual_encoder import DualEncoder
from retriever.gradcache import backward_through_encoder, encode_without_graph, representation_gradients
from retriever.loss.contrastive import ContrastiveObjective
from retriever.retention import EVERYTHING, Budget, Retention, given_tokens
from tests.problems import rank_batch
from tests.test_gradcache import CPU, OBJECTIVE, WHOLE, cached, make_encoder


def _fused(folder: Path, *, dropout: bool, tied: bool = True) -> DualEncoder:
    encoder = make_encoder(folder, dropout=dropout, tied=tied)
    encoder.pack()
    encoder.fuse_layers()
    return encoder


def test_settings_stand_for_tokens() -> None:
    assert [given_tokens(setting) for setting in ("auto", True, False, 1, 700)] == [None, EVERYTHING, 0, 1, 700]
    assert Retention.from_config(BatchConfig(retain=5, retain_products=True)) == (5, EVERYTHING)
    assert Retention.from_config(BatchConfig()) == (0, 0)


def test_a_budget_is_spent_in_order() -> None:
    """Graphs until a chunk does not fit, then products until one does not, then nothing, though a smaller chunk
    would.
    """
    budget = Budget(Retention(10, 10))
    assert [budget.take(n) for n in (6, 4, 1, 9, 4, 1)] == [
        "graph",
        "graph",
        "products",
        "products",
        "nothing",
        "nothing",
    ]
    budget = Budget(Retention(10, 10))
    assert [budget.take(n) for n in (11, 1, 10, 1)] == ["nothing"] * 4
    assert Budget(Retention(10, 11)).take(11) == "products"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("offload", [False, True])
def test_kept_products_are_not_computed_again_and_give_the_same_bits(
    one_layer: Path, tied: bool, offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout on: behind chunks that keep their graphs, chunks that keep products, and behind these chunks that
    keep nothing.
    """
    encoder = _fused(one_layer, dropout=True, tied=tied)
    attended: list[int] = []  # tokens

    def counted(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        attended.append(len(query))
        return attention_forward(query, *others)

    monkeypatch.setattr(layer, "attention_forward", counted)
    batch, _, _ = rank_batch(WHOLE, 0, 40, packed=True, chunks_a_side=9)
    objective = ContrastiveObjective(
        LossConfig(precision="fp32", temperature=0.1), block_rows=5 if offload else None, unit_norm=True
    )
    sizes = [chunk.tokens.input_ids.numel() for chunk in batch.chunks]
    replayed = cached(encoder, batch, objective=objective)
    assert attended == sizes + sizes
    for graphs, products in ((0, 2), (1, 3), (0, len(sizes)), (3, len(sizes))):
        attended.clear()
        behind = EVERYTHING if graphs + products >= len(sizes) else sum(sizes[graphs : graphs + products])
        again = cached(encoder, batch, Retention(sum(sizes[:graphs]), behind), objective)
        assert attended == sizes + sizes[graphs + products :]
        assert all(torch.equal(a, b) for a, b in zip(replayed, again, strict=True))


def test_products_are_given_up_as_they_are_used(one_layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is left when a chunk has its graph, so that the backward pass frees them with it."""
    encoder = _fused(one_layer, dropout=True)
    batch, _, _ = rank_batch(WHOLE, 0, 40, packed=True)
    representations, first = encode_without_graph(encoder, batch, Retention(products=EVERYTHING))
    assert (
        [len(begun.saved) for begun in first.partial] == [1] * len(batch.chunks) and not first.kept and not first.states
    )
    _, gradients = representation_gradients(OBJECTIVE, representations, batch, CPU)
    narrow = [weakref.ref(saved.ffn_out) for begun in first.partial for saved in begun.saved]
    alive: list[int] = []
    backward = torch.Tensor.backward

    def watched(self: Tensor, *given: Any) -> None:
        backward(self, *given)
        alive.append(sum(ref() is not None for ref in narrow))

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    backward_through_encoder(encoder, batch, gradients, first)
    assert not any(begun.saved for begun in first.partial)
    assert alive == list(range(len(narrow)))[::-1]


def test_products_of_other_calls_are_refused(one_layer: Path) -> None:
    encoder = _fused(one_layer, dropout=False)
    first, *_, last = (chunk.tokens for chunk in rank_batch(WHOLE, 0, 40, packed=True)[0].chunks)
    products = deque[SavedActivations]()
    with pytest.raises(ValueError, match="expected the products of 1 layer, received those of 0"):
        encoder("query", first, products)
    with torch.no_grad():
        encoder("query", first, products)
        with pytest.raises(ValueError, match="of 0 layers, received those of 1"):
            encoder("query", first, products)
    with pytest.raises(ValueError, match="expected products of"):
        encoder("query", last, products)


def test_layers_that_keep_no_products_say_so(one_layer: Path) -> None:
    batch, _, _ = rank_batch(WHOLE, 0, 40)
    with pytest.raises(ValueError, match="kept by fused layers only"):
        encode_without_graph(make_encoder(one_layer, dropout=False), batch, Retention(products=EVERYTHING))
