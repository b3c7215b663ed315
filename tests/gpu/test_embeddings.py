"""Embeddings as they are trained: by definition, and what an id outside its table does."""

from __future__ import annotations

import pytest
import torch

from kernels.layers.embeddings import embeddings
from tests.gpu.devices import toy
from tests.kernels.test_embeddings import EPS, check, inputs


@pytest.mark.parametrize(
    ("T", "D", "dropout"), [(1, 32, 0.0), (37, 100, 0.1), (4097, 768, 0.0), (4097, 768, 0.1), (9, 4096, 0.1)]
)
def test_the_definition_and_its_gradients(T: int, D: int, dropout: float, device: str) -> None:
    check(*inputs(*toy(device, T, D), torch.float32, device), dropout, 5e-6)


def test_the_library_computes_float64(device: str) -> None:
    check(*inputs(37, 100, torch.float64, device), 0.1, 1e-12)


def test_no_token_is_no_error(device: str) -> None:
    ids, positions, tables = inputs(0, 768, torch.float32, device)
    y = embeddings(ids, positions, tables, torch.tensor([1], device=device), eps=EPS, dropout=0.1)
    y.sum().backward()
    assert y.shape == (0, 768) and all(table.grad is not None and not table.grad.any() for table in tables[:5])


def test_an_id_outside_its_table_spoils_its_own_row(device: str) -> None:
    ids, positions, tables = inputs(5, 768, torch.float32, device)
    ids[2] = 61
    if device == "cpu":
        with pytest.raises(IndexError):
            embeddings(ids, positions, tables, None, eps=EPS, dropout=0.0)
        return
    with torch.no_grad():
        found = embeddings(ids, positions, tables, None, eps=EPS, dropout=0.0)
    assert found[2].isnan().all() and found[[0, 1, 3, 4]].isfinite().all()
