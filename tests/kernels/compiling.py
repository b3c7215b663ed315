"""Compiles the Triton kernels for a GPU that is not there, and reads what the assembler says of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    arch: int,
    warps: int,
    stages: int,
    gluon: bool = False,
    registers: int | None = None,
    fusion: bool = True,
) -> tuple[int, int, str]:
    """(bytes of shared memory, bytes of a thread's stack: spilled registers, PTX) of a kernel.

    Arguments without a type are constants or None; `registers`: the most that a thread may have, as the launch's
    `maxnreg`; `fusion`: whether the assembler may make one operation of a product and a sum.
    """
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    unknown = (set(types) | set(constants)) - set(kernel.arg_names)
    assert not unknown, f"no arguments of {kernel}: {unknown}"
    values = {(i,): constants.get(name) for i, name in enumerate(kernel.arg_names) if signature[name] == "constexpr"}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    source = (GluonASTSource if gluon else ASTSource)(kernel, signature, values, attributes)
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers, "enable_fp_fusion": fusion}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    stack = [int(found) for found in re.findall(r"STACK:(\d+)", usage)]
    assert stack, f"no resource usage in {usage!r}"
    return compiled.metadata.shared, max(stack), compiled.asm["ptx"]
