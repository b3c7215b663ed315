"""Compiles the Triton kernels for a GPU that is not there, and reads what the assembler says of them."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}


def compile_kernel(kernel: Any, signature: dict[str, str], constants: dict[str, Any], arch: int, warps: int, stages: int) -> Any:
    """The compiled kernel; `signature` names every argument's type, "constexpr" for those in `constants`."""
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    for index, name in enumerate(kernel.arg_names):
        if types[name] == "constexpr" and (index,) not in values:
            values[(index,)] = None
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if types[name].startswith("*")}
    source = ASTSource(kernel, types, values, attrs)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages})
