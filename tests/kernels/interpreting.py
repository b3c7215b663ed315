"""Runs a program with the kernels in Triton's interpreter, which has to be chosen before Triton is imported: in a
process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy
import pytest
import triton

needs_interpreter = pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4),
    reason="the interpreter of Triton 3.6 turns one-element arrays into scalars, which NumPy 2.4 refuses",
)


def interpret(program: str, interpreted: bool = True) -> None:
    """Fails with the program's last words where it fails; `interpreted` False: without the interpreter."""
    environment = {"TRITON_INTERPRET": "1" if interpreted else "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
