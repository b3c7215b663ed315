"""Embeddings for encoding on a GPU: by definition, and NaN where an id is outside its table."""

from __future__ import annotations

import pytest

from kernels.embed_norm import embed_norm
from tests.kernels.test_embed_norm import check, inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("T", "D"), [(1, 32), (37, 100), (4097, 768), (9, 4096)])
def test_the_result_is_the_definition_rounded_once(T: int, D: int) -> None:
    check({name: tensor.cuda() for name, tensor in inputs(T, D).items()})


@pytest.mark.parametrize(("name", "outside"), [("ids", 61), ("ids", -1), ("positions", 23)])
def test_an_id_outside_its_table_spoils_its_own_row(name: str, outside: int) -> None:
    given = {key: tensor.cuda() for key, tensor in inputs(5, 768).items()}
    given[name][2] = outside
    found = embed_norm(**given, eps=1e-5)
    assert found[2].isnan().all() and found[[0, 1, 3, 4]].isfinite().all()
