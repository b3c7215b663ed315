"""Embeddings for encoding: by definition in float64, in Triton's interpreter, and compiled for a GPU that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import embed_norm_triton
from kernels.add_norm_triton import block
from kernels.embed_norm import embed_norm
from tests.kernels.compiling import SHARED_LIMIT, compile_kernel

INTERPRETED = """
import torch
from kernels import embed_norm_triton
from kernels.embed_norm import embed_norm
from tests.kernels.test_embed_norm import check, inputs

launched, run = [], embed_norm_triton._embed_norm.run
embed_norm_triton._embed_norm.run = lambda *a, **k: (launched.append(k), run(*a, **k))[1]
for T, D in ((37, 48), (1, 100), (4, 768)):
    check(inputs(T, D))
for name, outside in (("ids", 61), ("ids", -1), ("positions", 23), ("positions", -1)):
    given = inputs(5, 48)
    given[name][2] = outside
    found = embed_norm(**given, eps=1e-5)
    assert found[2].isnan().all() and found[[0, 1, 3, 4]].isfinite().all(), (name, outside)
assert len(launched) == 7, "the kernel did not run"
"""


def inputs(T: int, D: int) -> dict[str, Tensor]:
    """The arguments of `embed_norm`: 61 words and 23 places, first and last among them, far from zero mean."""
    draw = torch.Generator().manual_seed(T)
    ids, positions = torch.randint(61, (T,), generator=draw), torch.randint(23, (T,), generator=draw)
    ids[: min(T, 2)] = torch.tensor([60, 0])[:T]
    positions[: min(T, 2)] = torch.tensor([0, 22])[:T]
    given = {name: torch.randn(shape, generator=draw) + 1 for name, shape in {"words": (61, D), "places": (23, D)}.items()}
    return {"ids": ids, "positions": positions, **given, **{n: torch.randn(D, generator=draw) for n in ("segment", "weight", "bias")}}


def check(given: dict[str, Tensor]) -> None:
    """The result is within one rounding of the definition."""
    wide = {name: tensor.double() for name, tensor in given.items() if tensor.is_floating_point()}
    z = torch.stack([wide["words"][i] + wide["places"][p] for i, p in zip(given["ids"], given["positions"], strict=True)]) + wide["segment"]
    centred = z - z.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * wide["weight"] + wide["bias"]
    found = embed_norm(**given, eps=1e-5)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), expected, rtol=1.01 * torch.finfo(torch.float16).eps / 2, atol=3e-6)


def test_the_result_is_the_definition_rounded_once() -> None:
    for T, D in ((37, 48), (1, 1), (3, 768)):
        check(inputs(T, D))
    assert embed_norm(**inputs(0, 32), eps=1e-5).shape == (0, 32)


def test_the_kernel_in_the_interpreter() -> None:
    """And an id outside its table, which no check on the host could see without waiting, makes its row NaN and no other."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("arch", "D"), [(90, 768), (80, 1024), (100, 4096)])
def test_the_kernel_compiles_without_spilling(arch: int, D: int) -> None:
    types = dict.fromkeys(("words", "places", "segment", "weight", "bias"), "*fp32") | dict.fromkeys(("ids", "positions"), "*i64")
    types |= dict.fromkeys(("T", "V", "P"), "i32") | {"following": "*fp16", "eps": "fp32", "inverse_keep": "fp32"}
    columns, warps = block(D)
    constants: dict[str, Any] = {"D": D, "THRESHOLD": 0, "ROWS": embed_norm_triton.ROWS, "BLOCK_D": columns}
    shared, spilled, ptx = compile_kernel(embed_norm_triton._embed_norm, types, constants, arch, warps, 3)
    assert shared <= SHARED_LIMIT[arch] and spilled == 0 and "ld.global.v4.b32" in ptx


def test_what_does_not_fit_is_refused() -> None:
    given = inputs(3, 8)
    wrong: list[tuple[str, Tensor, str]] = [
        ("ids", given["ids"].int(), r"expected ids \[3\] torch.int64 .*torch.int32"),
        ("positions", given["positions"][:2], r"expected positions \[3\] .*received \[2\]"),
        ("words", given["words"].half(), r"expected words \[61, 8\] torch.float32 .*torch.float16"),
        ("places", given["places"][:, :7], r"expected places \[23, 8\] .*received \[23, 7\]"),
        ("weight", given["weight"].double(), r"expected weight \[8\] torch.float32 .*torch.float64"),
        ("words", given["words"].T.contiguous().T, "contiguous"),
        ("words", given["words"][0], r"expected ids \[T\], words \[V, D\]"),
    ]
    for name, tensor, message in wrong:
        with pytest.raises(ValueError, match=message):
            embed_norm(**given | {name: tensor}, eps=1e-5)
    with pytest.raises(IndexError):
        embed_norm(**given | {"ids": torch.tensor([0, 61, 1])}, eps=1e-5)
