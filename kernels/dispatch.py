"""Which tensors the Triton kernels compute, and how wide their rows may be."""

from __future__ import annotations

import os

import torch
from torch import Tensor

WIDEST_ROW = 4096  # numbers: a row is normalised in the registers of one program


def on_kernels(x: Tensor) -> bool:
    """Whether `x` is computed on the Triton kernels: on a GPU, or through Triton's interpreter; float64 never is."""
    if x.dtype == torch.float64:
        return False
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
