"""The torch reference of InfoNCE against its definition in float64, on problems of any shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.infonce.api import Exclusions, infonce
from tests.kernels.oracle import dense_infonce, excluded_matrix, relative_error


def random_problem(
    seed: int, B: int, N: int, D: int, norm: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Exclusions]:
    """Queries, passages, targets (some shared, some −1), weights, and exclusions of every kind, in float64."""
    generator = torch.Generator().manual_seed(seed)
    queries, passages = (norm * torch.randn(n, D, dtype=torch.float64, generator=generator) / D**0.5 for n in (B, N))
    if N > 2:
        passages[1] = passages[0]
    targets = torch.randint(-1, N, (B,), generator=generator)
    weights = torch.rand(B, dtype=torch.float64, generator=generator)
    counts = torch.randint(0, 4, (B,), generator=generator)
    counts[B // 2] = 3 * N
    known = torch.randint(0, N + 2, (int(counts.sum()),), generator=generator)
    threshold = 0.3 * norm**2 + torch.randn(B, dtype=torch.float64, generator=generator)
    threshold[-1] = -torch.inf
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    ids = torch.randint(0, N, (N,), generator=generator)
    return queries, passages, targets, weights, Exclusions(ids, ptr, known, threshold)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    B=st.integers(1, 40),
    N=st.integers(1, 60),
    D=st.integers(1, 48),
    scale=st.sampled_from([1.0, 20.0, 200.0]),
    norm=st.sampled_from([1.0, 4.0]),
    symmetric=st.booleans(),
    masked=st.booleans(),
)
def test_equals_the_definition(
    seed: int, B: int, N: int, D: int, scale: float, norm: float, symmetric: bool, masked: bool
) -> None:
    queries, passages, targets, weights, exclusions = random_problem(seed, B, N, D, norm)
    excluded = excluded_matrix(queries, passages, exclusions) if masked else torch.zeros(B, N, dtype=torch.bool)
    got = infonce(
        queries, passages, targets, scale, exclusions=exclusions if masked else None, weights=weights, symmetric=symmetric, precision="fp32"
    )  # fmt: skip
    want = dense_infonce(queries, passages, targets, scale, weights, excluded, symmetric)
    for x, y in zip((got.loss, got.dqueries, got.dpassages, got.dscale), want, strict=True):
        torch.testing.assert_close(x, y, atol=1e-9 * scale * norm, rtol=1e-9)


@pytest.mark.parametrize("precision", ["bf16", "high", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiers_keep_their_bounds(precision: str, dtype: torch.dtype) -> None:
    queries, passages, targets, weights, _ = random_problem(7, 30, 50, 16)
    queries, passages, weights = queries.to(dtype), passages.to(dtype), weights.float()
    got = infonce(queries, passages, targets, 20.0, weights=weights, precision=precision)  # type: ignore[arg-type]
    want = dense_infonce(queries, passages, targets, 20.0, weights, torch.zeros(30, 50, dtype=torch.bool), False)
    bound = 2e-2 if precision == "bf16" and dtype == torch.float32 else 1e-5
    assert got.loss.dtype == torch.float32
    assert relative_error(got.dqueries, want[1]) <= bound and relative_error(got.dpassages, want[2]) <= bound


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, 4])}, "targets between -1 and 3"),
        ({"targets": torch.tensor([0, -2])}, "targets between -1 and 3"),
        ({"targets": torch.tensor([0])}, "targets"),
        ({"targets": torch.tensor([0.0, 1.0])}, "int64"),
        ({"scale": 0.0}, "scale"),
        ({"precision": "tf32"}, "precision"),
        ({"workspace_mib": 0}, "workspace_mib"),
        ({"passages": torch.randn(4, 7)}, "queries"),
        ({"passages": torch.randn(4, 8, dtype=torch.float64)}, "dtype"),
    ],
)
def test_errors_name_what_was_received(change: dict[str, object], message: str) -> None:
    arguments = {
        "queries": torch.randn(2, 8),
        "passages": torch.randn(4, 8),
        "targets": torch.tensor([0, 1]),
        "scale": 20.0,
    }
    with pytest.raises(ValueError, match=message):
        infonce(**(arguments | change))  # type: ignore[arg-type]
