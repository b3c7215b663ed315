"""InfoNCE on large problems: against float64, against itself in parts, and again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kernels.infonce.api import Exclusions, Guide, Hardness, Lists, Precision, block_of, infonce
from kernels.infonce.rules import guide_vectors
from tests.gpu.devices import toy
from tests.kernels.oracle import dense_infonce, excluded_matrix, hardness_matrix, relative_error


def problem(
    device: str, B: int, N: int, D: int, dtype: torch.dtype = torch.bfloat16, cosine: float = 0.3, norm: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(B + N + D)
    queries = normalize(torch.randn(B, D, device=device, generator=generator), dim=1)
    passages = normalize(torch.randn(N, D, device=device, generator=generator), dim=1)
    targets = torch.randint(N, (B,), device=device, generator=generator)
    passages[targets] = normalize(cosine * queries + (1 - cosine) * passages[targets], dim=1)
    return (norm * queries).to(dtype), (norm * passages).to(dtype), targets


def exclusions_for(device: str, B: int, N: int, most: int) -> Exclusions:
    """Up to `most` known positives a row, ids that stand in two columns, and a threshold that drops a whole row."""
    generator = torch.Generator("cpu").manual_seed(B)
    counts = torch.randint(0, most + 1, (B,), generator=generator)
    known = torch.randint(0, N // 2 + 3, (int(counts.sum()),), generator=generator)
    threshold = 0.15 + 0.1 * torch.randn(B, generator=generator)
    threshold[0] = -torch.inf
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    ids = torch.arange(N, device=device) // 2
    return Exclusions(ids, ptr.to(device), known.to(device), threshold.to(device))


# Few sizes: Triton's own pass is compiled for every number of tiles up to that of the GPU's programs, seconds a kernel.
@pytest.mark.parametrize(
    ("B", "N", "D", "scale", "dtype", "precision", "bound", "symmetric"),
    [
        (1000, 3001, 768, 50.0, torch.bfloat16, "bf16", 4e-3, False),
        (1000, 3001, 768, 50.0, torch.bfloat16, "bf16", 4e-3, True),
        (300, 700, 4096, 50.0, torch.bfloat16, "bf16", 4e-3, False),
        (300, 700, 33, 200.0, torch.bfloat16, "bf16", 4e-3, False),
        (300, 700, 33, 200.0, torch.bfloat16, "bf16", 4e-3, True),
        (300, 700, 256, 50.0, torch.float16, "bf16", 4e-3, False),
        (1000, 3001, 768, 100.0, torch.bfloat16, "high", 1e-5, True),
        (300, 700, 333, 50.0, torch.float32, "high", 1e-5, False),
        (300, 700, 333, 50.0, torch.float32, "fp32", 1e-5, False),
        (1, 1, 32, 20.0, torch.bfloat16, "bf16", 4e-3, False),
    ],
)
def test_matches_float64(
    B: int, N: int, D: int, scale: float, dtype: torch.dtype, precision: str, bound: float, symmetric: bool, device: str
) -> None:
    B, N = toy(device, B, N, most=90)
    queries, passages, targets = problem(device, B, N, D, dtype)
    targets[::7] = -1
    weights = torch.rand(B, device=device) / B
    exclusions = exclusions_for(device, B, N, most=12)
    excluded = excluded_matrix(queries, passages, exclusions)
    got = infonce(
        queries,
        passages,
        targets,
        scale,
        exclusions=exclusions,
        weights=weights,
        symmetric=symmetric,
        precision=precision,  # type: ignore[arg-type]
    )
    want = dense_infonce(queries, passages, targets, scale, weights, excluded, symmetric)
    if B == 1:
        assert all(x is not None and not x.any() for x in (got.loss, got.dqueries, got.dpassages))
        return
    assert want[1].norm() > 0 and want[2].norm() > 0
    # A similarity within rounding of its row's threshold may fall on either side of it, so none of these may lie there.
    near = (queries.double() @ passages.double().T - exclusions.threshold[:, None]).abs().min()  # type: ignore[index]
    slack = 1.0 if near > 1e-6 else 3.0
    assert relative_error(got.loss, want[0]) <= slack * max(1e-4, bound / 10)
    assert relative_error(got.dqueries, want[1]) <= slack * bound
    assert relative_error(got.dpassages, want[2]) <= slack * bound


@pytest.mark.parametrize(("guided", "hardness"), [(True, (0.0, 0.0)), (False, (5.0, 0.0)), (True, (0.0, 9.0))])
@pytest.mark.parametrize(("precision", "bound"), [("bf16", 4e-3), ("high", 1e-5)])
def test_a_guide_and_hard_negatives_match_float64(
    guided: bool, hardness: tuple[float, float], precision: Precision, bound: float, device: str
) -> None:
    """In one pass over the tiles, and in two where symmetric."""
    B, N = toy(device, 1000, 3001, most=90)
    queries, passages, targets = problem(device, B, N, 256)
    weights = torch.rand(B, device=device) / B
    generator = torch.Generator(device).manual_seed(1)
    vectors = [guide_vectors(torch.randn(n, 100, device=device, generator=generator)) for n in (B, N)]
    limit = 0.1 * torch.randn(B, device=device, generator=generator)
    own = torch.rand(B, N, device=device, generator=generator).topk(5, dim=1).indices  # distinct in a row
    exclusions = Exclusions(
        torch.arange(N, device=device),
        torch.arange(B + 1, device=device),
        targets,
        guide=Guide(vectors[0], vectors[1], limit) if guided else None,
        hardness=Hardness(*hardness),
        own=Lists(5 * torch.arange(B + 1, device=device), own.flatten()),
    )
    excluded, harder = excluded_matrix(queries, passages, exclusions), hardness_matrix(exclusions)
    for symmetric in (False, True):
        want = dense_infonce(queries, passages, targets, 50.0, weights, excluded, symmetric, harder)
        got = infonce(
            queries, passages, targets, 50.0,
            exclusions=exclusions, weights=weights, symmetric=symmetric, precision=precision,
        )  # fmt: skip
        assert want[1].norm() > 0 and want[2].norm() > 0
        assert relative_error(got.loss, want[0]) <= max(1e-4, bound / 10)
        assert relative_error(got.dqueries, want[1]) <= bound
        assert relative_error(got.dpassages, want[2]) <= bound


@pytest.mark.parametrize(("scale", "norm", "symmetric"), [(200.0, 3.0, True), (0.5, 40.0, False)])
def test_low_temperatures_and_long_vectors_lose_no_row(scale: float, norm: float, symmetric: bool, device: str) -> None:
    B, N = toy(device, 300, 700, most=90)
    queries, passages, targets = problem(device, B, N, 64, norm=norm, cosine=0.05)
    weights = torch.full((B,), 1 / B, device=device)
    nothing = torch.zeros(B, N, dtype=torch.bool, device=device)
    got = infonce(queries, passages, targets, scale, weights=weights, symmetric=symmetric)
    want = dense_infonce(queries, passages, targets, scale, weights, nothing, symmetric)
    assert relative_error(got.loss, want[0]) <= 1e-3
    assert relative_error(got.dqueries, want[1]) <= 1e-2
    assert relative_error(got.dpassages, want[2]) <= 1e-2


@pytest.mark.parametrize(("precision", "symmetric"), [("bf16", False), ("bf16", True), ("high", True)])
def test_repeats_give_the_same_bits(symmetric: bool, precision: str, device: str) -> None:
    queries, passages, targets = problem(device, *toy(device, 3000, 5000, 256, most=90))
    first, second = (
        infonce(queries, passages, targets, 50.0, symmetric=symmetric, precision=precision, workspace_mib=8)  # type: ignore[arg-type]
        for _ in range(2)
    )
    for name in ("loss", "dqueries", "dpassages", "dscale"):
        assert getattr(first, name).any() and torch.equal(getattr(first, name), getattr(second, name)), name


def test_a_smaller_workspace_changes_rounding_alone(device: str) -> None:
    queries, passages, targets = problem(device, *toy(device, 3000, 5000, 256, most=90))
    whole = infonce(queries, passages, targets, 50.0)
    for mib in (1, 8, 24):
        part = infonce(queries, passages, targets, 50.0, workspace_mib=mib)
        assert relative_error(part.loss, whole.loss.double()) <= 1e-4
        assert relative_error(part.dpassages, whole.dpassages.double()) <= 5e-3  # type: ignore[union-attr]


def test_row_strided_slices_are_read_in_place(device: str) -> None:
    queries, passages, targets = problem(device, *toy(device, 512, 1024, 256, most=90))
    sliced = infonce(queries[:, :64], passages[:, :64], targets, 50.0)
    copied = infonce(queries[:, :64].contiguous(), passages[:, :64].contiguous(), targets, 50.0)
    assert torch.equal(sliced.dqueries, copied.dqueries) and torch.equal(sliced.dpassages, copied.dpassages)  # type: ignore[arg-type]


def test_the_parts_of_the_ring_match_float64(device: str) -> None:
    B, N, D = toy(device, 700, 1300, 128, most=90)
    queries, passages, _ = problem(device, B, N, D)
    exclusions = exclusions_for(device, B, N, most=3)
    excluded = excluded_matrix(queries, passages, exclusions)
    logits = (50.0 * queries.double() @ passages.double().T).masked_fill(excluded, -torch.inf)
    block = block_of(queries, passages, 50.0, exclusions, precision="bf16")
    rows, columns = block.lse(columns=True)
    finite = logits.logsumexp(1) > -torch.inf
    assert columns is not None and torch.equal(rows > -torch.inf, finite)
    torch.testing.assert_close(rows[finite].double(), logits.logsumexp(1)[finite], atol=1e-4, rtol=1e-5)
    row_weights = torch.where(finite, -rows, -torch.inf)
    column_weights = torch.where(columns > -torch.inf, -columns, -torch.inf)
    dqueries, dpassages = block.gradient(row_weights, column_weights)
    dlogits = 50.0 * ((logits + row_weights[:, None]).exp() + (logits + column_weights).exp())
    assert relative_error(dqueries, dlogits @ passages.double()) <= 4e-3
    assert relative_error(dpassages, dlogits.T @ queries.double()) <= 4e-3


def test_a_target_outside_the_passages_is_an_error(device: str) -> None:
    queries, passages, targets = problem(device, 64, 128, 64)
    targets[3] = 128
    with pytest.raises(ValueError, match="targets between -1 and 127"):
        infonce(queries, passages, targets, 50.0)
