"""Embeddings as they are trained: by definition in float64, in Triton's interpreter, and compiled for a GPU that is not
there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.dropout import drop_below, keep_mask
from kernels.layers import embeddings_triton, norm
from kernels.layers.embeddings import Tables, embeddings
from kernels.layers.embeddings_triton import block
from tests.kernels.compiling import SHARED_LIMIT, compile_kernel
from tests.kernels.interpreting import interpret
from tests.kernels.oracle import gradient, relative_error

EPS = 1e-5
INTERPRETED = """
import numpy, torch
from kernels.layers import embeddings_triton
from kernels.layers.embeddings import embeddings
from tests.kernels.test_embeddings import EPS, check, inputs

numpy.seterr(over="ignore")
launched, kernels = set(), (embeddings_triton._embed_norm, embeddings_triton._embed_norm_backward)
for kernel in kernels:
    kernel.run = lambda *a, run=kernel.run, **k: (launched.add(run), run(*a, **k))[1]
for T, D, dropout in ((37, 48, 0.3), (1, 100, 0.0), (5, 768, 0.1)):
    check(*inputs(T, D, torch.float32), dropout, 2e-6)
assert len(launched) == 2, "the kernels did not run"

for name, outside in (("ids", 61), ("ids", -1), ("positions", 23), ("positions", -1)):
    ids, positions, tables = inputs(5, 48, torch.float32)
    {"ids": ids, "positions": positions}[name][2] = outside
    found = embeddings(ids, positions, tables, None, eps=EPS, dropout=0.0)
    assert found[2].isnan().all() and found[[0, 1, 3, 4]].isfinite().all(), (name, outside)
ids, positions, tables = inputs(5, 48, torch.float32)
ids[4] = 61  # one more than there are: its gradient, which is NaN, goes to the first row and not beyond the table
embeddings(ids, positions, tables, None, eps=EPS, dropout=0.0).sum().backward()
assert tables.words.grad[0].isnan().all() and tables.words.grad[1:].isfinite().all()
"""


def inputs(T: int, D: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tables]:
    """ids, positions and tables of 61 words and 23 places, first and last among them; word 3 and place 1 are
    padding.
    """
    draw = torch.Generator().manual_seed(T)
    ids, positions = torch.randint(61, (T,), generator=draw), torch.randint(23, (T,), generator=draw)
    ids[: min(T, 3)] = torch.tensor([60, 0, 3])[:T]
    positions[: min(T, 3)] = torch.tensor([0, 22, 1])[:T]
    shapes = ((61, D), (23, D), (D,), (D,), (D,))
    made = (
        (torch.randn(shape, generator=draw, dtype=torch.float64) + 1).to(device, dtype).requires_grad_()
        for shape in shapes
    )
    return ids.to(device), positions.to(device), Tables._make((*made, 3, 1))


def by_definition(ids: Tensor, positions: Tensor, tables: Tables, dropout: float, seed: Tensor) -> Tensor:
    words, places, segment, weight, bias, *_ = tables
    z = words[ids] + places[positions] + segment
    centred = z - z.mean(1, keepdim=True)
    y = centred / (centred.square().mean(1, keepdim=True) + EPS).sqrt() * weight + bias
    rows, columns = (torch.arange(n, device=ids.device) for n in y.shape)
    return y * keep_mask(seed, rows, columns, dropout) / (1 - dropout)


def check(ids: Tensor, positions: Tensor, tables: Tables, dropout: float, bound: float) -> None:
    """Relative errors of the result and of every gradient; a padding's row gets none."""
    seed = torch.tensor([2**40 + 5], device=ids.device)
    exact = Tables._make((*(table.detach().double().requires_grad_() for table in tables[:5]), 3, 1))
    found = embeddings(ids, positions, tables, seed, eps=EPS, dropout=dropout)
    want = by_definition(ids, positions, exact, dropout, seed)
    assert found.dtype == tables.words.dtype and relative_error(found.detach(), want.detach()) < bound
    dout = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(want)
    got = torch.autograd.grad(found, tables[:5], dout.to(found.dtype))
    expected = torch.autograd.grad(want, exact[:5], dout)
    expected[0][3] = expected[1][1] = 0
    for name, a, b in zip(Tables._fields, got, expected, strict=False):
        assert a.dtype == found.dtype and b.norm() > 0 and relative_error(a, b) < bound, name
    assert not got[0][3].any() and not got[1][1].any()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_the_definition_and_its_gradients(dtype: torch.dtype, bound: float, dropout: float) -> None:
    check(*inputs(37, 24, dtype), dropout, bound)


def test_the_kernels_in_the_interpreter() -> None:
    interpret(INTERPRETED)


@pytest.mark.parametrize(("arch", "D"), [(90, 768), (80, 1024), (100, 384)])
def test_the_kernels_compile_without_spilling(arch: int, D: int) -> None:
    tables = dict.fromkeys(("words", "places", "segment", "weight", "statistics"), "*fp32")
    types = (
        tables
        | dict.fromkeys(("ids", "positions", "seed"), "*i64")
        | dict.fromkeys(("T", "V", "P"), "i32")
        | {"inverse_keep": "fp32"}
    )
    columns, warps = block(D)
    constants = {"D": D, "THRESHOLD": drop_below(0.1), "ROWS": embeddings_triton.ROWS, "BLOCK_D": columns}
    forward = types | {"bias": "*fp32", "out": "*fp32", "eps": "fp32"}
    backward = types | dict.fromkeys(("dout", "dz_out", "partial"), "*fp32")
    launch = norm.BACKWARD
    rows, columns, backward_warps = norm.block(launch, D)
    staying = {"ROWS": rows, "BLOCK_D": columns, "STAGES": launch.stages}
    for kernel, signature, more, count in (
        (embeddings_triton._embed_norm, forward, {}, warps),
        (embeddings_triton._embed_norm_backward, backward, staying, backward_warps),
    ):
        shared, spilled, ptx = compile_kernel(kernel, signature, constants | more, arch, count, 3)
        assert shared <= SHARED_LIMIT[arch] and spilled == 0 and "ld.global.v4.b32" in ptx


def test_what_is_frozen_gets_no_gradient() -> None:
    ids, positions, tables = inputs(9, 24, torch.float64)
    frozen = tables._replace(words=tables.words.detach(), weight=tables.weight.detach())
    embeddings(ids, positions, frozen, None, eps=EPS, dropout=0.0).square().sum().backward()
    assert (
        frozen.words.grad is None
        and frozen.weight.grad is None
        and tables.places.grad is not None
        and gradient(tables.bias).any()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a, t: a | {"tables": t._replace(places=t.places.double())},
            r"places \[23, 8\] torch.float32 .*float64",
        ),
        (lambda a, t: a | {"ids": a["ids"].int()}, r"ids \[3\] torch.int64 .*torch.int32"),
        (lambda a, t: a | {"positions": a["positions"][:2]}, r"positions \[3\] .*received \[2\]"),
        (lambda a, t: a | {"tables": t._replace(words=t.words[0])}, r"ids \[T\], words \[V, D\]"),
        (lambda a, t: a | {"tables": t._replace(words=t.words.T.contiguous().T)}, "contiguous"),
        (lambda a, t: a | {"dropout": 0.1}, r"a seed int64 \[1\]; received 0.1 and no seed"),
        (lambda a, t: a | {"ids": torch.tensor([0, 61, 1])}, "index out of range"),
    ],
)
def test_what_does_not_fit_is_refused(change: Callable[..., dict[str, Any]], message: str) -> None:
    ids, positions, tables = inputs(3, 8, torch.float32)
    fitting = {"ids": ids, "positions": positions, "tables": tables, "seed": None, "eps": EPS, "dropout": 0.0}
    embeddings(**fitting)  # type: ignore[arg-type]
    with pytest.raises((ValueError, IndexError), match=message):
        embeddings(**change(fitting, tables))


def test_half_precision_is_the_library_s() -> None:
    ids, positions, tables = inputs(37, 24, torch.bfloat16)
    y = embeddings(ids, positions, tables, None, eps=EPS, dropout=0.0)
    assert (
        y.dtype == torch.bfloat16
        and relative_error(y.detach(), by_definition(ids, positions, tables, 0.0, torch.tensor([1])).detach()) < 1e-2
    )
